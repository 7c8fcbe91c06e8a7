"""Hugging Face directories: agreement with transformers in both directions, and refusal of what does not fit."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import error, forget_peak_memory
from safetensors.torch import load_file, save_file
from torch import Tensor

from natten_layers import RoPE
from natten_layers.io import hf, mxfp4, tensors
from natten_layers.modules.llm import DecoderLM, DecoderLMConfig

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
HEADS_OF_8: dict[str, Any] = {"head_dim": None}
"""for classes that have no head_dim of their own: 32 channels in 4 heads"""
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 RoPE": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama, YaRN": ("LlamaConfig", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "llama, linear RoPE": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", WINDOWED),
    "qwen3": ("Qwen3Config", {**WINDOWED, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 24},
    ),
    "gemma3, soft cap": ("Gemma3TextConfig", {"final_logit_softcapping": 3.0}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "mixtral": ("MixtralConfig", {"sliding_window": 7, **EXPERTS}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **EXPERTS,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "qwen3_moe, normalised": (
        "Qwen3MoeConfig",
        {**EXPERTS, "moe_intermediate_size": 24, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "olmoe": ("OlmoeConfig", {**HEADS_OF_8, **EXPERTS}),
    "gpt_oss": ("GptOssConfig", {**EXPERTS, "sliding_window": 6, "swiglu_limit": 0.5, "swiglu_alpha": 1.5}),
    "granite_swa": (
        "GraniteSWAConfig",
        {
            **HEADS_OF_8,
            "sliding_window": 6,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "layer_rope_theta": [0.0, 500.0, 0.0, 500.0],
        },
    ),
    "granitemoe_swa": (
        "GraniteMoeSWAConfig",
        {
            **HEADS_OF_8,
            "num_local_experts": 5,
            "sliding_window": 6,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "layer_rope_theta": [0.0, 500.0, 0.0, 500.0],
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 7, **HEADS_OF_8, "partial_rotary_factor": 0.75}),
    "phi3, longrope": (
        "Phi3Config",
        {
            **HEADS_OF_8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "short_factor": [1.0, 1.5, 1.7],
                "long_factor": [2.0, 3.0, 5.0],
                "partial_rotary_factor": 0.75,
            },
            "original_max_position_embeddings": 32,
        },
    ),
    "smollm3": (
        "SmolLM3Config",
        {**HEADS_OF_8, "use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2},
    ),
    "olmo2": ("Olmo2Config", {**HEADS_OF_8, "attention_bias": True}),
    "olmo3": (
        "Olmo3Config",
        {
            **HEADS_OF_8,
            "sliding_window": 6,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "ministral3": (
        "Ministral3Config",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}},
    ),
    "granite": (
        "GraniteConfig",
        {
            **HEADS_OF_8,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "exaone4": ("Exaone4Config", {"sliding_window": 6, "sliding_window_pattern": 2}),
    "glm": ("GlmConfig", {}),
    "glm4": ("Glm4Config", {}),
    "cohere2": (
        "Cohere2Config",
        {**HEADS_OF_8, "sliding_window": 6, "sliding_window_pattern": 2, "logit_scale": 0.25, "attention_bias": True},
    ),
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="module", params=list(FAMILIES))
def theirs(request: pytest.FixtureRequest, transformers: Any) -> Any:
    """transformers' tiny model of one family, with all parameters random and large enough to affect the output."""
    name, options = FAMILIES[request.param]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    options = {key: value for key, value in {**COMMON, **options}.items() if key != "head_dim" or value is not None}
    config = getattr(transformers, name)(**options)
    if name in ("GlmConfig", "Glm4Config"):  # whose class puts its own in the place of None
        config.eos_token_id = None
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module")
def directory(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(path)
    return path


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_equal_transformers(theirs: Any, directory: Path) -> None:
    ours, ids = DecoderLM.from_pretrained(directory), tokens(3, 40)
    assert error(ours(ids), theirs(ids).logits) < 1e-5
    mask = torch.ones_like(ids)
    mask[0, :9] = 0  # left
    mask[1, -5:] = 0  # right
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts; forward() alone would count padding
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    text = mask.bool()
    assert error(ours(ids, attention_mask=mask)[text], expected[text]) < 1e-5


def as_files(model: Any, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``tensors``, named as a model's parameters, as its files name and stack them."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name]
    model.save_pretrained(path)
    return load_file(path / hf.WEIGHTS)


@torch.no_grad()
def test_gradients_equal_transformers(theirs: Any, directory: Path, tmp_path: Path) -> None:
    ours, ids = DecoderLM.from_pretrained(directory), tokens(2, 20)
    with torch.enable_grad():
        for model, logits in ((ours, ours(ids)), (theirs, theirs(ids).logits)):
            model.zero_grad()
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = as_files(theirs, {name: parameter.grad for name, parameter in theirs.named_parameters()}, tmp_path)
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    found = hf.to_family_names(found, theirs.config.model_type)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if expected[name].abs().max() < 1e-8:  # 0 but for rounding: a key's bias without RoPE shifts all scores
            assert gradient.abs().max() < 1e-8, name
        else:
            assert error(gradient, expected[name]) < 1e-4, name


def test_generation_equals_transformers(theirs: Any, directory: Path) -> None:
    ours, ids = DecoderLM.from_pretrained(directory), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
    assert torch.equal(ours.generate(ids, 32, attention_mask=mask, prefill_chunk=8), expected)


@torch.no_grad()
def test_transformers_loads_what_is_saved(theirs: Any, directory: Path, transformers: Any, tmp_path: Path) -> None:
    DecoderLM.from_pretrained(directory).save_pretrained(tmp_path, max_shard_bytes=40000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(back) is type(theirs)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(2, 30)
    assert error(back(ids).logits, theirs(ids).logits) < 1e-5


def test_sharded_equals_single(theirs: Any, directory: Path, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / hf.INDEX).is_file()
    single, sharded = (DecoderLM.from_pretrained(path).state_dict() for path in (directory, tmp_path))
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def dequantized(blocks: Tensor, scales: Tensor) -> list[float]:
    """MXFP4 by its definition: a sign, two bits of exponent and one of mantissa, times the block's power of two."""
    numbers = []
    for block, scale in zip(blocks.reshape(-1, 16).tolist(), scales.flatten().tolist(), strict=True):
        for bits in (nibble for byte in block for nibble in (byte & 15, byte >> 4)):
            exponent, mantissa = bits >> 1 & 3, bits & 1
            value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            numbers.append((-1.0 if bits & 8 else 1.0) * value * 2.0 ** (scale - 127))
    return numbers


def test_mxfp4_is_dequantised_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (3, 5, 2), dtype=torch.uint8, generator=generator)
    found = mxfp4.dequantize(blocks, scales)
    assert (found.dtype, found.shape) == (torch.bfloat16, (3, 5, 64))
    assert found.double().flatten().tolist() == dequantized(blocks, scales)


@pytest.fixture
def quantised(transformers: Any, tmp_path: Path) -> tuple[Any, Path]:
    """transformers' gpt-oss with experts that MXFP4 holds exactly, and a directory that holds them in it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    sizes = {**COMMON, **EXPERTS, "num_hidden_layers": 2, "intermediate_size": 64}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.GptOssConfig(**sizes)).bfloat16().eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / hf.WEIGHTS)
    for name, parameter in theirs.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = parameter.shape
        shape = experts, outputs, inputs // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 126, shape, dtype=torch.uint8, generator=generator)
        parameter.data = convert_moe_packed_tensors(blocks, scales)
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, tmp_path / hf.WEIGHTS)
    raw = json.loads((tmp_path / hf.CONFIG).read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / hf.CONFIG).write_text(json.dumps(raw))
    return theirs, tmp_path


@torch.no_grad()
def test_experts_in_mxfp4_are_read(quantised: tuple[Any, Path]) -> None:
    theirs, directory = quantised
    ours, ids = DecoderLM.from_pretrained(directory), tokens(2, 20)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert error(ours.float()(ids), theirs.float()(ids).logits) < 1e-5
    ours.save_pretrained(directory)
    assert error(DecoderLM.from_pretrained(directory)(ids), ours(ids)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, t: (name, t[:, :, :-1]) if name.endswith("down_proj_scales") else (name, t),
            "and its scales are",
        ),
        (lambda name, t: (name, t[..., :-1]) if name.endswith("down_proj_blocks") else (name, t), "and its scales are"),
        (lambda name, t: (name, t[1:]) if "router" not in name else (name, t), "the config asks for 5 experts"),
        (lambda name, t: (name.replace("_scales", "_odd"), t), 'has no "down_proj_scales" beside it'),
    ],
)
def test_mxfp4_that_does_not_fit_is_refused(change: Any, message: str, quantised: tuple[Any, Path]) -> None:
    directory = quantised[1]
    stored = load_file(directory / hf.WEIGHTS)
    changed = dict(change(name, t) if "experts" in name else (name, t) for name, t in stored.items())
    save_file({name: t.contiguous() for name, t in changed.items()}, directory / hf.WEIGHTS)
    with pytest.raises(ValueError, match=message) as caught:
        DecoderLM.from_pretrained(directory)
    assert str(directory) in str(caught.value)


def parts_read(model: DecoderLM) -> list[int]:
    """To which each call of the model will add how many tokens it reads."""
    lengths: list[int] = []

    def note(_: Any, args: tuple[Tensor]) -> None:
        if not args[0].is_floating_point():  # those are embedded, not the other way round
            lengths.append(args[0].shape[1])

    model.model.embed_tokens.register_forward_pre_hook(note)
    return lengths


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.5, 1.7, 2.0],
    "long_factor": [2.0, 3.0, 5.0, 7.0],
    "original_max_position_embeddings": 32,
    "factor": 4.0,
}


@torch.no_grad()
def test_longrope_changes_its_factors_where_a_text_gets_long() -> None:
    model = DecoderLM(dataclasses.replace(TINY, rope=LONGROPE, max_positions=128, initializer_range=0.3)).eval()
    ids = tokens(1, 40) % 17
    short, long = (
        DecoderLM(dataclasses.replace(model.config, rope={**LONGROPE, **factors})).eval()
        for factors in ({"long_factor": LONGROPE["short_factor"]}, {"short_factor": LONGROPE["long_factor"]})
    )
    for other in (short, long):
        other.load_state_dict(model.state_dict())
    assert torch.equal(model(ids[:, :32]), short(ids[:, :32]))
    assert torch.equal(model(ids), long(ids))
    assert error(model(ids), short(ids)) > 1e-3
    # However the prompt is read, its keys are those of the long text.
    whole = model.generate(ids, 8)
    lengths = parts_read(model)
    assert torch.equal(model.generate(ids, 8, prefill_chunk=8), whole)
    assert max(lengths) == 8
    assert torch.equal(long.generate(ids, 8), whole)
    # Step by step without a cache.
    steps = ids[:, :30]
    for _ in range(6):
        steps = torch.cat((steps, model(steps)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids[:, :30], 6), steps)
    lengths.clear()
    assert torch.equal(model.generate(ids[:, :30], 6, prefill_chunk=7), steps)
    assert max(lengths) == 7
    with pytest.raises(ValueError, match=r"packed texts of 7 and 33 tokens.*=32; pack them apart"):
        model(ids, cu_seqlens=torch.tensor([0, 33, 33, 40]))
    cache = model.make_cache(1)
    model(ids[:, :32], cache=cache)
    with pytest.raises(ValueError, match="original_max_position_embeddings=32"):
        model(ids[:, 32:33], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_the_language_model_of_a_composite_is_read(kind: str, transformers: Any, tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    if kind == "gemma3":
        text = transformers.Gemma3TextConfig(**COMMON, sliding_window=6)
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    else:
        text = transformers.Ministral3Config(**COMMON, tie_word_embeddings=False)
        vision = {**vision, "model_type": "pixtral", "head_dim": 8}
        config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    theirs = transformers.AutoModelForImageTextToText.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = DecoderLM.from_pretrained(tmp_path), tokens(2, 20)
    assert error(ours(ids), theirs(ids).logits) < 1e-5
    # Both as transformers writes names, which are those of its version 4, and as its modules are called today.
    now = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert now.keys() != load_file(tmp_path / hf.WEIGHTS).keys()
    save_file(now, tmp_path / hf.WEIGHTS)
    assert error(DecoderLM.from_pretrained(tmp_path)(ids), ours(ids)) < 1e-6


def test_the_published_composite_of_gemma_says_little() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = hf.config_from_hf({"model_type": "gemma3", "text_config": text}, DecoderLMConfig)
    assert (config.vocab_size, config.num_heads, config.kv_heads, config.dim) == (262208, 8, 4, 256)
    assert config.tie_embeddings
    assert config.rope["factor"] == 8.0
    assert config.windowed_rope == {"rope_type": "default", "rope_theta": 10000.0}


TIED = {**COMMON, "model_type": "llama", "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("stored", ["both", "the projection alone"])
@torch.no_grad()
def test_the_files_decide_whether_the_projection_is_the_embedding(
    stored: str, transformers: Any, tmp_path: Path
) -> None:
    DecoderLM(dataclasses.replace(hf.config_from_hf(TIED, DecoderLMConfig), tie_embeddings=False)).save_pretrained(
        tmp_path
    )
    (tmp_path / hf.CONFIG).write_text(json.dumps(TIED))
    tensors = load_file(tmp_path / hf.WEIGHTS)
    if stored != "both":
        del tensors[hf.EMBEDDING]
    save_file(tensors, tmp_path / hf.WEIGHTS, metadata={"format": "pt"})
    ours, theirs = DecoderLM.from_pretrained(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 9)
    assert error(ours(ids), theirs(ids).logits) < 1e-5
    assert ours.config.tie_embeddings == (ours.lm_head is None) == (stored != "both")
    ours.save_pretrained(tmp_path / "again")
    assert error(DecoderLM.from_pretrained(tmp_path / "again")(ids), ours(ids)) < 1e-6


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 4},
        {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 4, "sliding_window": None},
        {"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 4, "sliding_window": 5},
        {"model_type": "llama", "hidden_size": 36, "num_attention_heads": 8},
        {"model_type": "llama", "rms_norm_eps": 0, "initializer_range": 1, "rope_theta": 10000, "eos_token_id": [1, 2]},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen3", "use_sliding_window": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_transformers_runs_what_is_saved(raw: dict[str, Any], transformers: Any, tmp_path: Path) -> None:
    ours = DecoderLM(hf.config_from_hf({**COMMON, **raw}, DecoderLMConfig)).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 20)
    assert error(ours(ids), theirs(ids).logits) < 1e-5
    assert DecoderLM.from_pretrained(tmp_path).config == ours.config


# ---- without transformers ------------------------------------------------------------------------------------------

TINY = DecoderLMConfig(
    vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, head_dim=8, max_positions=64
)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, sink="learned", num_registers=3, windows=(4, None)),
        dataclasses.replace(TINY, sink="zero", windows=(4, 5), eos_token_id=(1, 2)),
        dataclasses.replace(TINY, windows=(4,)),
    ],
    ids=["llama", "learned", "zero", "mistral"],
)
def test_own_round_trip(config: DecoderLMConfig, tmp_path: Path) -> None:
    model = DecoderLM(config)
    model.save_pretrained(tmp_path)
    again = DecoderLM.from_pretrained(tmp_path)
    assert again.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # Not bit by bit: tensors that are mapped from a file have another alignment, which changes the order of sums.
    torch.testing.assert_close(again(tokens(1, 9) % 17), model(tokens(1, 9) % 17), rtol=1e-6, atol=1e-6)


def test_dtype_is_the_files_or_the_callers(tmp_path: Path) -> None:
    DecoderLM(TINY, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.bfloat16), (torch.float64, torch.float64)):
        model = DecoderLM.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {expected}
        assert next(b for n, b in model.named_buffers() if n.endswith("rope.freqs")).dtype == torch.float32
        assert model(tokens(1, 4) % 17).dtype == expected


def test_old_and_new_rope_keys_mean_the_same() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = {key.replace("rope_type", "type"): value for key, value in scaling.items()}
    new = hf.config_from_hf({**LLAMA, "rope_parameters": LLAMA3}, DecoderLMConfig)
    assert hf.config_from_hf({**LLAMA, "rope_theta": 10000.0, "rope_scaling": scaling}, DecoderLMConfig) == new
    assert hf.config_from_hf({**LLAMA, "rope_theta": 10000.0, "rope_scaling": old}, DecoderLMConfig) == new
    assert hf.config_from_hf({**LLAMA, "rope_theta": 7.0}, DecoderLMConfig).rope["rope_theta"] == 7.0


MIXED = ["sliding_attention", "full_attention"] * 4


def test_windows_follow_each_family() -> None:
    def windows(**raw: Any) -> tuple[int | None, ...]:
        return hf.config_from_hf({**LLAMA, **raw}, DecoderLMConfig).windows

    full = (None,) * 8
    assert windows() == full
    assert windows(model_type="mistral", num_key_value_heads=2, sliding_window=9) == (9,) * 8
    assert windows(model_type="mistral", num_key_value_heads=2, sliding_window=None) == full
    # AutoModel takes it for Ministral then.
    assert windows(model_type="mistral", num_key_value_heads=2, sliding_window=9, layer_types=MIXED) == (9, None) * 4
    assert windows(sliding_window=9, layer_types=["full_attention"] * 8) == full
    qwen = {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 9, "max_window_layers": 6}
    assert windows(**qwen) == full
    assert windows(**qwen, use_sliding_window=True) == (None,) * 6 + (9,) * 2
    gemma = {"model_type": "gemma3_text", "num_key_value_heads": 2, "sliding_window": 9}
    assert windows(**gemma) == (9,) * 5 + (None,) + (9,) * 2
    assert windows(**gemma, sliding_window_pattern=2) == (9, None) * 4
    kinds = ["sliding_attention"] * 3 + ["full_attention"] * 5
    assert windows(**gemma, layer_types=kinds) == (9,) * 3 + (None,) * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not implemented; known are"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4"),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        ({"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta=0.1"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 entries for 8 layers"),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, "sliding_window_pattern='LLLG'"),
        ({"sliding_window": 9, "layer_types": MIXED}, r"layer_types=.* for llama, whose layers are all alike"),
        ({"model_type": "phi3", "sliding_window": 9, "layer_types": MIXED}, "for phi3, whose layers are all alike"),
        ({"model_type": "ministral3", "sliding_window": 9, "layer_types": ["full_attention"] * 8}, "for ministral3"),
        ({"model_type": "olmo3", "rope_parameters": {"rope_theta": 5.0}}, "rope_parameters must name full_attention"),
        ({"model_type": "gemma3"}, "text_config of model_type 'gemma3'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"model_type": "olmoe", "num_experts": 2, "num_experts_per_tok": 3}, "must not exceed num_experts=2"),
        ({"model_type": "granitemoe_swa", "shared_intermediate_size": 8}, "shared_intermediate_size=8"),
        ({"model_type": "granite_swa", "layer_rope_theta": [5.0]}, "layer_rope_theta has 1 entries for 8 layers"),
        (
            {"model_type": "granite_swa", "num_key_value_heads": 2, "layer_rope_theta": [5.0, 6.0, 7.0, 0.0] * 2},
            r"layer_rope_theta has the bases \[6\.0, 7\.0\]",
        ),
        ({"rope_scaling": {"rope_type": "proportional"}}, "'proportional' is not implemented"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' has no short_factor, long_factor"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'llama3' has no factor"),
        ({"layer_types": ["chunked_attention"] * 8}, "layer_types has"),
        ({"layer_types": ["sliding_attention"] * 8}, "sets no sliding_window"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 8 layers"),
        ({"vocab_size": None}, r'config\["vocab_size"\] must be an int'),
        ({"num_attention_heads": 2.5}, r'config\["num_attention_heads"\] must be an int'),
        ({"model_type": "natten_layers"}, "unknown keys"),
    ],
)
def test_configs_that_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(ValueError, match=message) as error:
        DecoderLM.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        DecoderLM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hf download OWNER/NAME --local-dir DIRECTORY$"):
        DecoderLM.from_pretrained("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"not expanded here: give {re.escape(str(tmp_path))}/models/name$"):
        DecoderLM.from_pretrained("~/models/name")
    (tmp_path / "alone.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"and weights, and alone\.gguf is a file$"):
        DecoderLM.from_pretrained(tmp_path / "alone.gguf")
    model = DecoderLM(TINY)
    model.save_pretrained(tmp_path)
    weights = tmp_path / hf.WEIGHTS
    with pytest.raises(FileNotFoundError, match=f"expected a directory .*: give {re.escape(str(tmp_path))}$"):
        DecoderLM.from_pretrained(weights)
    tensors = load_file(weights)

    def refused(changed: dict[str, Tensor]) -> str:
        save_file(changed, weights)
        with pytest.raises(ValueError, match="does not fit its config") as error:
            DecoderLM.from_pretrained(tmp_path)
        return str(error.value)

    name = "model.layers.1.self_attn.k_proj.weight"
    assert f'it lacks "{name}"' in refused({n: t for n, t in tensors.items() if n != name})
    assert 'it has an unknown "more.weight"' in refused({**tensors, "more.weight": torch.zeros(1)})
    assert f'"{name}" has shape (4, 16), but the config asks for (16, 16)' in refused(
        {**tensors, name: torch.zeros(4, 16)}
    )
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        DecoderLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        DecoderLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_files_of_a_model_without_its_projection_are_read(tied: bool, tmp_path: Path, transformers: Any) -> None:
    """As transformers' base classes write them, such as those of models of embeddings."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen3Config(**sizes, **heads, tie_word_embeddings=tied)
    theirs = transformers.Qwen3Model(config).eval()
    theirs.save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / hf.WEIGHTS)
    if not tied:
        with pytest.raises(ValueError, match=r'it lacks "lm_head\.weight"\. '):
            DecoderLM.from_pretrained(tmp_path)
        return
    tokens = torch.randint(32, (2, 9))
    with torch.no_grad():
        expected = theirs(tokens).last_hidden_state @ theirs.embed_tokens.weight.mT
        torch.testing.assert_close(DecoderLM.from_pretrained(tmp_path)(tokens), expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_training_are_no_part_of_a_name(prefix: str, tmp_path: Path) -> None:
    model = DecoderLM(TINY)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / hf.WEIGHTS)
    loaded = DecoderLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    save_file({**tensors, prefix + hf.HEAD: tensors[hf.HEAD].clone()}, tmp_path / hf.WEIGHTS)
    with pytest.raises(ValueError, match=r'holds "lm_head\.weight" twice'):
        DecoderLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_torch_save_are_read(sharded: bool, tmp_path: Path) -> None:
    model = DecoderLM(dataclasses.replace(TINY, tie_embeddings=True))
    model.save_pretrained(tmp_path)
    (tmp_path / hf.WEIGHTS).unlink()
    state = model.state_dict()
    state[hf.HEAD] = state[hf.EMBEDDING]  # one storage under two names, as transformers wrote it
    names = ["a.bin", "b.bin"] if sharded else [hf.TORCH_WEIGHTS]
    where = {name: names[i % len(names)] for i, name in enumerate(state)}
    for file in names:
        torch.save({name: tensor for name, tensor in state.items() if where[name] == file}, tmp_path / file)
    if sharded:
        (tmp_path / hf.TORCH_INDEX).write_text(json.dumps({"weight_map": where}))
    loaded = DecoderLM.from_pretrained(tmp_path)
    assert loaded.lm_head is None
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.norm.weight": torch.zeros(1).expand(10**6)}, "more than the file"),
        ({"state": 1}, "other objects than tensors"),
        ({"model.norm.weight": Runs()}, "is damaged, or holds objects that are not plain tensors"),
    ],
    ids=["expanded", "objects", "code"],
)
def test_files_of_torch_save_that_are_refused(
    content: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    DecoderLM(TINY).save_pretrained(tmp_path)
    (tmp_path / hf.WEIGHTS).unlink()
    torch.save(content, tmp_path / hf.TORCH_WEIGHTS)
    with pytest.raises(ValueError, match=message) as error:
        DecoderLM.from_pretrained(tmp_path)
    assert str(tmp_path / hf.TORCH_WEIGHTS) in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_fused_projections_of_another_size_are_refused(tmp_path: Path) -> None:
    raw = {**COMMON, "model_type": "phi3", "head_dim": None, "rope_parameters": {"partial_rotary_factor": 0.5}}
    DecoderLM(hf.config_from_hf(raw, DecoderLMConfig)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    save_file({**tensors, name: tensors[name][1:].contiguous()}, tmp_path / hf.WEIGHTS)
    with pytest.raises(ValueError, match=r"qkv_proj.weight\" has shape \(63, 32\), but the config asks for 64 rows"):
        DecoderLM.from_pretrained(tmp_path)


@pytest.fixture
def dynamic(transformers: Any, tmp_path: Path) -> Any:
    """transformers' model of texts that are stretched from 24 tokens on."""
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
    config = transformers.LlamaConfig(**{**COMMON, "max_position_embeddings": 24}, rope_parameters=rope)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    return model


@torch.no_grad()
def test_dynamic_rope_stretches_long_texts(dynamic: Any, tmp_path: Path, transformers: Any) -> None:
    ours = DecoderLM.from_pretrained(tmp_path)
    for length in (24, 25, 40, 96):
        expected = dynamic(ids := tokens(2, length)).logits
        assert error(ours(ids), expected) < 1e-5
    plain = dataclasses.replace(ours.config, rope={"rope_type": "default", "rope_theta": 500.0})
    with_plain = DecoderLM(plain)
    with_plain.load_state_dict(ours.state_dict())
    assert error(with_plain(ids), expected) > 1e-2
    assert torch.equal(with_plain(ids[:, :24]), ours(ids[:, :24]))
    assert error(ours.double()(ids), expected) < 1e-5
    with pytest.raises(ValueError, match="max_positions=96"):
        ours(tokens(1, 97))
    with pytest.raises(ValueError, match=r"packed texts of 10 and 30 tokens.*=24; pack them apart"):
        ours(ids[:1, :40], cu_seqlens=torch.tensor([0, 30, 40]))
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").float()
    assert error(again(ids).logits, expected) < 1e-5
    assert DecoderLM.from_pretrained(tmp_path / "again").config == ours.config


@pytest.mark.parametrize("length", [10, 30])
def test_dynamic_rope_generates_as_transformers(length: int, dynamic: Any, tmp_path: Path) -> None:
    ours, ids = DecoderLM.from_pretrained(tmp_path), tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = dynamic.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    lengths = parts_read(ours)
    assert torch.equal(ours.generate(ids, 40, attention_mask=mask, prefill_chunk=8), expected)
    assert max(lengths) == 8


@torch.no_grad()
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    "rope", [LONGROPE, {**LONGROPE, "rope_type": "dynamic"}], ids=lambda rope: str(rope["rope_type"])
)
def test_parts_of_a_text_have_the_rope_of_the_whole(rope: dict[str, Any], watched: bool) -> None:
    model = DecoderLM(dataclasses.replace(TINY, rope=rope, max_positions=128, initializer_range=0.3)).eval()
    if watched:
        for rope_module in (module for module in model.modules() if isinstance(module, RoPE)):
            rope_module.register_forward_hook(lambda *_: None)
    ids = tokens(2, 40) % 17
    whole = model(ids)
    cache = model.make_cache(2)
    cache.expect(40)
    parts = torch.cat([model(part, cache=cache) for part in ids.split([20, 13, 1, 6], 1)], 1)
    assert error(parts, whole) < 1e-5
    with pytest.raises(ValueError, match="up to 40 tokens; call expect before"):
        cache.expect(50)
    apart = model.make_cache(2)
    apart.expect(20)
    with pytest.raises(ValueError, match="length must be"):
        apart.expect(-1)
    model(ids[:, :20], cache=apart)
    if rope["rope_type"] == "longrope":
        with pytest.raises(ValueError, match=r"of 20 tokens grows to 40.*cache\.expect\(length\)"):
            model(ids[:, 20:], cache=apart)
    else:
        assert error(model(ids[:, 20:], cache=apart), whole[:, 20:]) > 1e-3


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    DecoderLM(TINY).save_pretrained(tmp_path, max_shard_bytes=3000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 of the {len(shards)} shards.*{shards[1].name}"):
        DecoderLM.from_pretrained(tmp_path)
    (tmp_path / hf.INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is no index"):
        DecoderLM.from_pretrained(tmp_path)


def test_saving_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = DecoderLM(TINY), DecoderLM(TINY)
    first.save_pretrained(tmp_path, max_shard_bytes=3000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "save_file", full_disk)
        with pytest.raises(OSError, match=r"cannot write .*model\.safetensors: No space"):
            second.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    second.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    ids = tokens(1, 5) % 17
    torch.testing.assert_close(DecoderLM.from_pretrained(tmp_path)(ids), second(ids), rtol=1e-6, atol=1e-6)


def test_saved_weights_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        DecoderLM(TINY).save_pretrained(tmp_path)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_processes_that_save_to_one_directory_do_not_share_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save begins and ends before the first one is through; nothing of the first is lost."""
    first, second = DecoderLM(TINY), DecoderLM(TINY)
    write = hf.write_safetensors

    def write_and_wait(tensors: dict[str, Tensor], path: Path, *rest: Any, **options: Any) -> None:
        monkeypatch.setattr(hf, "write_safetensors", write)
        write(tensors, path, *rest, **options)
        second.save_pretrained(tmp_path)

    monkeypatch.setattr(hf, "write_safetensors", write_and_wait)
    first.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {hf.CONFIG, hf.WEIGHTS}
    assert torch.equal(DecoderLM.from_pretrained(tmp_path).lm_head.weight, first.lm_head.weight)  # pyright: ignore[reportOptionalMemberAccess]


def test_a_save_that_fails_names_its_file_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DecoderLM(TINY).save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("natten_layers.io.tensors.save_file", full_disk)
    with pytest.raises(OSError, match=f"cannot write {tmp_path / hf.WEIGHTS}: No space left on device$") as caught:
        DecoderLM(TINY).save_pretrained(tmp_path)
    assert str(caught.value).count("cannot write") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_removes_no_files_but_those_of_an_earlier_save(tmp_path: Path) -> None:
    others = ["model_flowers.safetensors", "model-ema.safetensors", "model.safetensors.bak", "model-1.safetensors"]
    for name in others:
        (tmp_path / name).write_bytes(b"another's")
    model = DecoderLM(TINY)
    model.save_pretrained(tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, hf.CONFIG, hf.WEIGHTS}


@pytest.mark.parametrize("size", ["5GB", 0, -5, 1.5, True])
def test_shards_have_a_size(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"max_shard_bytes must be an int of at least 1, got {size!r}"):
        DecoderLM(TINY).save_pretrained(tmp_path, max_shard_bytes=size)
    assert not list(tmp_path.iterdir())


def test_parameters_that_share_memory_are_saved(tmp_path: Path) -> None:
    model = DecoderLM(TINY)
    assert model.lm_head is not None
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1] = model.model.layers[0]
    model.save_pretrained(tmp_path)
    again = DecoderLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], x) for name, x in model.state_dict().items())


def test_tied_projection_may_be_stored(tmp_path: Path) -> None:
    model = DecoderLM(dataclasses.replace(TINY, tie_embeddings=True))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file({**tensors, **inv_freq, hf.HEAD: tensors[hf.EMBEDDING].clone()}, tmp_path / hf.WEIGHTS)
    assert DecoderLM.from_pretrained(tmp_path).lm_head is None


LOAD = """
import sys, torch
from helpers import forget_peak_memory, peak_memory
from natten_layers.modules.llm import DecoderLM
DecoderLM.from_pretrained(sys.argv[1])  # imports what loading takes, which is as large as the model
forget_peak_memory()
before = peak_memory()
model = DecoderLM.from_pretrained(sys.argv[2])
total = sum(float(p.sum()) for p in model.parameters())  # touch every page
print(peak_memory() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process' own peak")
def test_loading_takes_the_models_own_memory(tmp_path: Path) -> None:
    forget_peak_memory()  # skips the test where its process could not do so either
    config = dataclasses.replace(TINY, vocab_size=200000, hidden_size=64, tie_embeddings=True)
    DecoderLM(TINY).save_pretrained(tmp_path / "tiny")
    DecoderLM(config).save_pretrained(tmp_path / "wide")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "tiny"), str(tmp_path / "wide")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    taken, size = map(int, result.stdout.split())
    assert taken < 1.3 * size + 16 * 2**20


@pytest.mark.parametrize(
    ("family", "keys", "activation"),
    [
        ("llama", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "silu"),
        ("gemma3_text", {"hidden_act": "silu"}, "gelu_tanh"),
        ("gemma3_text", {"hidden_activation": "silu"}, "silu"),
    ],
)
def test_the_activation_is_what_the_family_reads(family: str, keys: dict[str, str], activation: str) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    raw = {"model_type": family, "num_attention_heads": 2, "num_key_value_heads": 2, **sizes, **keys}
    assert hf.config_from_hf(raw, DecoderLMConfig).activation == activation


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        {
            "rope_type": "yarn",
            "factor": 6.5,
            "original_max_position_embeddings": 4096,
            "mscale": 0.7,
            "mscale_all_dim": 1,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "beta_fast": 24,
            "beta_slow": 2,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2},  # both ends of the ramp coincide
    ],
    ids=lambda parameters: "-".join(map(str, parameters.values())),
)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 1e6), (80, 150000.0)])
def test_frequencies_are_those_of_transformers_bit_for_bit(
    parameters: dict[str, Any], head_dim: int, theta: float, transformers: Any
) -> None:
    """Frequencies must agree bit by bit: at positions in long texts, their last bit makes milliradians."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        rope_parameters={**parameters, "rope_theta": theta},
    )
    theirs, ours = LlamaRotaryEmbedding(config), RoPE(head_dim, theta=theta, scaling=parameters)
    assert torch.equal(ours.freqs, theirs.inv_freq)
    assert ours.attention_factor == theirs.attention_scaling
