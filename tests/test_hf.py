"""Hugging Face directories: agreement with transformers in both directions, and refusal of what does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import error
from safetensors.torch import load_file, save_file
from torch import Tensor

from natten_layers import RoPE
from natten_layers.io import hf, tensors
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
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="module", params=list(FAMILIES))
def theirs(request: pytest.FixtureRequest, transformers: Any) -> Any:
    """A tiny model of one family, every parameter random and large enough to matter."""
    name, options = FAMILIES[request.param]
    config = getattr(transformers, name)(**COMMON, **options)
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
    expected = theirs(ids, attention_mask=mask).logits
    text = mask.bool()
    assert error(ours(ids, attention_mask=mask)[text], expected[text]) < 1e-5


@torch.no_grad()
def test_gradients_equal_transformers(theirs: Any, directory: Path) -> None:
    ours, ids = DecoderLM.from_pretrained(directory), tokens(2, 20)
    with torch.enable_grad():
        for model, logits in ((ours, ours(ids)), (theirs, theirs(ids).logits)):
            model.zero_grad()
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert error(parameter.grad, expected[name].grad) < 1e-4, name  # pyright: ignore


def test_generation_equals_transformers(theirs: Any, directory: Path) -> None:
    ours, ids = DecoderLM.from_pretrained(directory), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False)
    assert torch.equal(ours.generate(ids, 64, attention_mask=mask, prefill_chunk=8), expected)


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
    ours, theirs = (kind.from_pretrained(tmp_path) for kind in (DecoderLM, transformers.AutoModelForCausalLM))
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
    # Not bit for bit: tensors that are mapped from a file are aligned otherwise, and sums take another order.
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


def test_windows_follow_each_family() -> None:
    def windows(**raw: Any) -> tuple[int | None, ...]:
        return hf.config_from_hf({**LLAMA, **raw}, DecoderLMConfig).windows

    full = (None,) * 8
    assert windows() == full
    assert windows(model_type="mistral", num_key_value_heads=2, sliding_window=9) == (9,) * 8
    assert windows(model_type="mistral", num_key_value_heads=2, sliding_window=None) == full
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
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not implemented"),
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


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        DecoderLM.from_pretrained(tmp_path)
    model = DecoderLM(TINY)
    model.save_pretrained(tmp_path)
    weights = tmp_path / hf.WEIGHTS
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


def test_tied_projection_may_be_stored(tmp_path: Path) -> None:
    model = DecoderLM(dataclasses.replace(TINY, tie_embeddings=True))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file({**tensors, **inv_freq, hf.HEAD: tensors[hf.EMBEDDING].clone()}, tmp_path / hf.WEIGHTS)
    assert DecoderLM.from_pretrained(tmp_path).lm_head is None


LOAD = """
import resource, sys, torch
from natten_layers.modules.llm import DecoderLM
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = DecoderLM.from_pretrained(sys.argv[1])
total = sum(float(p.sum()) for p in model.parameters())  # touch every page
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_loading_takes_the_models_own_memory(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vocab_size=200000, hidden_size=64, tie_embeddings=True)
    DecoderLM(config).save_pretrained(tmp_path)
    result = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True)
    kibibytes, size = map(int, result.stdout.split())
    assert kibibytes * 1024 < 1.3 * size + 16 * 2**20


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
    """The last bit of an fp32 frequency is milliradians at positions of long texts."""
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
