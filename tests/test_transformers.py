"""The transformers plug-in on tiny random models, against transformers' own attention.

Weights are so large that windows, padding and sinks each change the logits by far more than the tolerance, which
``test_the_reference_feels_every_part`` checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from helpers import error  # noqa: E402
from transformers.masking_utils import create_masks_for_generate  # noqa: E402

from benchmarks import transformers_support  # noqa: E402
from natten_layers.integrations import transformers as plugin  # noqa: E402

WINDOW = 5
TOLERANCE = 1e-5  # relative, fp32
FP64_TOLERANCE = 1e-12
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2,  # all experts, because choosing some would turn rounding errors into jumps
    "experts_implementation": "eager",
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, use_sliding_window=True, layer_types=MIXED),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, layer_types=MIXED, query_pre_attn_scalar=8),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, layer_types=MIXED, attn_logit_softcapping=2.0),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **{**SMALL, "max_position_embeddings": 131072},
        **EXPERTS,
        layer_types=MIXED,
        num_local_experts=2,
    ),
    "flint": lambda: transformers.FlintConfig(
        **SMALL, **EXPERTS, layer_types=MIXED, mlp_only_layers=[0], num_experts=2, moe_intermediate_size=16
    ),
    "mimo_v2_flash": lambda: transformers.MiMoV2FlashConfig(
        **SMALL, **EXPERTS, layer_types=MIXED, v_head_dim=8, n_routed_experts=2, moe_intermediate_size=16
    ),
}
if not hasattr(transformers, "FlintConfig"):  # before transformers 5.21
    del FAMILIES["flint"]
SINKS = {"gpt_oss", "flint", "mimo_v2_flash"}
"""families whose heads have a learned sink"""
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
PADDING = {"none": [], "left": [(1, slice(0, 4))], "right": [(0, slice(8, 11)), (1, slice(9, 11))]}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    plugin.register()


def build(config: Any, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model in eval mode with weights that depend on the configuration only, not on the attention."""
    torch.manual_seed(0)
    auto = transformers.AutoModel if config.model_type in ("bert", "bart") else transformers.AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=implementation, dtype=dtype).eval()


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def padding_mask(kind: str, batch: int = 2, length: int = 11) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, columns in PADDING[kind]:
        mask[row, columns] = 0
    return mask


def reference_for(family: str) -> str:
    """transformers' eager softmax is fp32 even in an fp64 model, except beside sinks; its SDPA path stays in fp64."""
    return "eager" if family in {"gemma2", *SINKS} else "sdpa"


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, kind: str) -> None:
    ids, mask = tokens(), padding_mask(kind)
    with torch.no_grad():
        actual, expected = (
            build(FAMILIES[family](), name)(ids, attention_mask=mask).logits[mask.bool()]
            for name in ("natten_layers", "eager")
        )
    assert error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gemma2", "gpt_oss"])
def test_autocast(family: str) -> None:
    """RoPE leaves queries and keys of these models in fp32 beside values in bf16; a cache makes all of them fp32."""
    ids, mask = tokens(), padding_mask("left")

    @torch.no_grad()
    def results(model: Any) -> list[Tensor]:
        prompt = model(ids, use_cache=True)
        return [
            model(ids, use_cache=False).logits,
            model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()],
            prompt.logits,
            model(ids[:, :2], past_key_values=prompt.past_key_values).logits,
        ]

    exact = results(build(FAMILIES[family](), "natten_layers"))
    with torch.autocast("cpu", torch.bfloat16):
        found, eager = (results(build(FAMILIES[family](), name)) for name in ("natten_layers", "eager"))
    for ours, theirs, expected in zip(found, eager, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert error(ours, expected) < 1.5 * error(theirs, expected) < 0.1


def test_queries_and_keys_get_the_dtype_of_values() -> None:
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8).bfloat16()
    layer: Any = SimpleNamespace(is_causal=True)
    out, _ = plugin._attention(layer, query, key, value, None)
    assert torch.equal(out, plugin._attention(layer, query.bfloat16(), key.bfloat16(), value, None)[0])


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_in_fp64(family: str, kind: str) -> None:
    ids, mask = tokens(), padding_mask(kind)
    # Soft caps are in transformers' eager path alone, whose softmax is fp32 and which is NaN in an fp64 model. Flint's
    # eager path computes scores in fp32, too.
    narrow = family in ("gemma2", "flint")
    dtype, tolerance = (torch.float32, TOLERANCE) if narrow else (torch.float64, FP64_TOLERANCE)
    results = []
    for name in ("natten_layers", reference_for(family)):
        model = build(FAMILIES[family](), name, dtype)
        logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach(), **gradients})
    actual, expected = results
    assert actual.keys() == expected.keys()
    assert any("sinks" in name for name in actual) == (family in SINKS)
    errors = {name: error(actual[name], expected[name]) for name in actual}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_feels_every_part(family: str) -> None:
    """The comparisons above are meaningful only if leaving out a window, padding or a sink would make them fail."""
    ids, mask = tokens(), padding_mask("left")
    model = build(FAMILIES[family](), "eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        without_padding = model(ids).logits[mask.bool()]
        assert error(without_padding, expected) > 1000 * TOLERANCE
        config = FAMILIES[family]()
        config.sliding_window = WINDOW + 1
        assert error(build(config, "eager")(ids, attention_mask=mask).logits[mask.bool()], expected) > 1000 * TOLERANCE
        if family in SINKS:
            for name, parameter in model.named_parameters():
                if name.endswith("sinks"):
                    parameter.fill_(-1e9)
            assert error(model(ids, attention_mask=mask).logits[mask.bool()], expected) > 1000 * TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str, cache: str) -> None:
    """Left-padded prompts of 3 to 11 tokens, well past the windows; layers with windows get sliding-window caches."""
    ids, mask = tokens(3), padding_mask("left", 3)
    mask[2, :8] = 0
    actual, expected = (
        build(FAMILIES[family](), name).generate(
            ids,
            attention_mask=mask,
            max_new_tokens=9,
            do_sample=False,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for name in ("natten_layers", "eager")
    )
    assert torch.equal(actual.sequences, expected.sequences)
    assert error(torch.stack(actual.logits), torch.stack(expected.logits)) < TOLERANCE


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic, sliding": lambda config: transformers.DynamicCache(config=config),
    "dynamic, full": lambda config: transformers.DynamicCache(),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=20),
}


def as_cache(function: Any, cache: object) -> dict[str, Any]:
    """Pass a cache under the name that this release of transformers uses for it."""
    names = inspect.signature(getattr(function, "forward", function)).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["mistral", *sorted(SINKS)])
def test_chunks_through_a_cache_equal_one_pass(family: str, cache: str) -> None:
    """Chunks fill a sliding-window cache, overflow it, and follow when it is full, with padding on both sides."""
    ids, mask = tokens(2, 18), torch.ones(2, 18, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 3:4] = 0  # a text of three tokens, padded on the right before it goes on
    model = build(FAMILIES[family](), "natten_layers")
    reference = build(FAMILIES[family](), "eager")
    past, start, logits = CACHES[cache](model.config), 0, []
    positions = torch.arange(18)[None]
    with torch.no_grad():
        for length in (4, 3, 1, 6, 1, 3):
            end = start + length
            out = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                **as_cache(model, past),
            )
            logits.append(out.logits)
            start = end
        expected = reference(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert error(torch.cat(logits, 1)[mask.bool()], expected[mask.bool()]) < TOLERANCE


@pytest.mark.parametrize("kind", PADDING)
def test_bidirectional_encoder(kind: str) -> None:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    ids, mask = tokens(), padding_mask(kind)
    actual, expected = (
        build(config, name, torch.float64)(ids, attention_mask=mask).last_hidden_state.detach()[mask.bool()]
        for name in ("natten_layers", "sdpa")
    )
    assert error(actual, expected) < FP64_TOLERANCE


@pytest.mark.parametrize("kind", PADDING)
def test_cross_attention(kind: str) -> None:
    config = transformers.BartConfig(
        vocab_size=61,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
    )
    mask = padding_mask(kind)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "decoder_input_ids": tokens(2, 7)}
    actual, expected = (
        build(config, name, torch.float64)(**inputs).last_hidden_state.detach() for name in ("natten_layers", "sdpa")
    )
    assert error(actual, expected) < FP64_TOLERANCE


def test_window_that_the_layer_does_not_pass_on() -> None:
    """Qwen2-MoE's layers do not pass their window to attention; only the mask has it."""
    config = transformers.Qwen2MoeConfig(
        **{**SMALL, "num_hidden_layers": 2},
        use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        experts_implementation="eager",
    )
    with torch.no_grad():
        actual, expected = (build(config, name)(tokens()).logits for name in ("natten_layers", "eager"))
    assert error(actual, expected) < TOLERANCE


def test_the_paths_and_that_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole texts, also when padded on the right, take the 1-D operation on views of the unrepeated heads.

    Those padded on the left do where gradients are needed, which ``test_left_padding.py`` has.
    """
    calls: list[tuple[str, Any]] = []
    whole, cached = plugin.neighborhood_attention, plugin.cached_attention

    def spy_whole(query: Tensor, key: Tensor, value: Tensor, kernel_size: tuple[int], **options: Any) -> Tensor:
        assert all(tensor._is_view() for tensor in (query, key, value))
        calls.append(("whole", (key.shape[-2], *kernel_size)))
        return whole(query, key, value, kernel_size, **options)

    def spy_cached(query: Tensor, key: Tensor, value: Tensor, *args: Tensor, **options: Any) -> Tensor:
        calls.append(("cached", (key.shape[-2], options["window"])))
        return cached(query, key, value, *args, **options)

    monkeypatch.setattr(plugin, "neighborhood_attention", spy_whole)
    monkeypatch.setattr(plugin, "cached_attention", spy_cached)
    model, ids = build(FAMILIES["qwen3"](), "natten_layers"), tokens()
    prefill = [("whole", (2, WINDOW)), ("whole", (2, 11)), ("whole", (2, WINDOW))]
    later = [("cached", (2, WINDOW)), ("cached", (2, None)), ("cached", (2, WINDOW))]
    for kind, expected in {"none": prefill, "right": prefill, "left": later}.items():
        with torch.set_grad_enabled(kind != "left"):
            model(ids, attention_mask=padding_mask(kind))
        assert calls == expected, kind
        calls.clear()
    for cache in CACHES:
        past = CACHES[cache](model.config)
        model(ids, **as_cache(model, past))
        model(ids[:, :1], **as_cache(model, past))
        assert calls == prefill + later, cache
        calls.clear()


def test_decoder_used_as_an_encoder() -> None:
    config = transformers.LlamaConfig(**{**SMALL, "sliding_window": None})
    mask = padding_mask("left")
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            actual, expected = (
                build(config, name)(tokens(), is_causal=False, use_cache=False, **inputs).logits[mask.bool()]
                for name in ("natten_layers", "eager")
            )
            assert error(actual, expected) < TOLERANCE


def test_compiled_model() -> None:
    config = FAMILIES["mistral"]()
    config.num_hidden_layers = 1
    model, mask = build(config, "natten_layers"), padding_mask("left")
    with torch.no_grad():
        expected = model(tokens(), attention_mask=mask, use_cache=False).logits
        actual = torch.compile(model, backend="eager")(tokens(), attention_mask=mask, use_cache=False).logits
    assert error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_compiled_decoding_has_one_graph(softcap: float | None) -> None:
    """As in ``generate`` with a static cache on CUDA, masks are made first, then the compiled step runs."""
    sizes, types = {**SMALL, "num_hidden_layers": 1}, ["sliding_attention"]
    config = transformers.Gemma2Config(**sizes, layer_types=types, attn_logit_softcapping=softcap)
    model, ids, mask = build(config, "natten_layers"), tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :4] = 0
    past = transformers.StaticCache(config=config, max_cache_len=16)
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = build(config, "eager")(ids, attention_mask=mask, use_cache=False).logits
        model(ids[:, :11], attention_mask=mask[:, :11], **as_cache(model, past))
        for i in range(11, 14):
            positions = {"position_ids": torch.tensor([[i]])}
            made = create_masks_for_generate(
                config=config, inputs_embeds=torch.empty(2, 1, 0), attention_mask=mask[:, : i + 1], **positions,
                **as_cache(create_masks_for_generate, past),
            )  # fmt: skip
            actual = step(ids[:, i : i + 1], attention_mask=made, **positions, **as_cache(model, past)).logits
            assert error(actual[:, 0], expected[:, i]) < TOLERANCE


def modernbert(window: int = 2) -> Any:
    return transformers.ModernBertConfig(
        **{k: v for k, v in SMALL.items() if k not in ("sliding_window", "num_key_value_heads", "head_dim")},
        local_attention=2 * window,
        layer_types=MIXED,
    )


def t5gemma(window: int = 2) -> Any:
    module = transformers.T5GemmaConfig().encoder.__class__
    size = {**SMALL, "num_hidden_layers": 2, "sliding_window": window, "attn_logit_softcapping": 2.0}
    return transformers.T5GemmaEncoderModel, transformers.T5GemmaConfig(
        encoder=module(**size), decoder=module(**size), is_encoder_decoder=False
    )


def privacy_filter(window: int = 2) -> Any:
    return transformers.OpenAIPrivacyFilterConfig(**{**SMALL, "sliding_window": window}, **EXPERTS, num_local_experts=2)


def gemma3_encoder(window: int = 2) -> Any:
    """As EmbeddingGemma."""
    return transformers.Gemma3TextConfig(
        **{**SMALL, "sliding_window": 2 * window}, layer_types=MIXED, use_bidirectional_attention=True
    )


def encoded(config: Any, name: str, **inputs: Tensor) -> Tensor:
    torch.manual_seed(0)
    if isinstance(config, tuple):
        kind, config = config
        config._attn_implementation = name
        model = kind(config)
    else:
        model = transformers.AutoModel.from_config(config, attn_implementation=name)
    with torch.no_grad():
        return model.eval()(tokens(), **inputs).last_hidden_state


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("make", [modernbert, t5gemma, privacy_filter, gemma3_encoder])
def test_bidirectional_windows(make: Callable[..., Any], kind: str) -> None:
    mask = padding_mask(kind)
    actual, expected, wider = (
        encoded(make(*window), name, attention_mask=mask)[mask.bool()]
        for name, window in (("natten_layers", ()), ("eager", ()), ("eager", (3,)))
    )
    assert error(wider, expected) > 1000 * TOLERANCE
    assert error(actual, expected) < TOLERANCE


def multimodal(name: str, implementation: str) -> Any:
    """A model whose image tokens see each other in both directions."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    if name == "gemma3":
        text = transformers.Gemma3TextConfig(**SMALL, layer_types=MIXED, query_pre_attn_scalar=8)
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    else:
        text = {**SMALL, "model_type": "gemma2", "layer_types": MIXED, "attn_logit_softcapping": 2.0}
        config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32)
    torch.manual_seed(0)
    auto = transformers.AutoModelForImageTextToText
    return auto.from_config(config, attn_implementation={"text_config": implementation, "": "eager"}).eval()


IMAGES = torch.tensor([[0] * 2 + [1] * 7 + [0] * 2, [0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0]])
"""which tokens are of images: one longer than the window, and two in one text"""
PREFIXES = torch.tensor([[0] * 5 + [1] * 6, [0] * 3 + [1] * 8])
"""0 for tokens of PaliGemma's prefixes"""


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_images_see_their_whole_block(name: str, kind: str) -> None:
    mask = padding_mask(kind)
    inputs = {"attention_mask": mask, "use_cache": False}
    types = {"token_type_ids": IMAGES if name == "gemma3" else PREFIXES}
    with torch.no_grad():
        actual, expected = (
            multimodal(name, implementation)(tokens(), **types, **inputs).logits[mask.bool()]
            for implementation in ("natten_layers", "eager")
        )
        text = {"token_type_ids": 0 * IMAGES if name == "gemma3" else 0 * IMAGES + 1}
        text = multimodal(name, "eager")(tokens(), **text, **inputs).logits[mask.bool()]
    assert error(text, expected) > 1000 * TOLERANCE
    assert error(actual, expected) < TOLERANCE


def test_prefixes_longer_than_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a block of 6 tokens .* sliding_window=5"):
        multimodal("paligemma", "natten_layers")(tokens(), token_type_ids=(torch.arange(11) > 5).long()[None])


def test_images_through_a_cache() -> None:
    options = {"attention_mask": padding_mask("left"), "max_new_tokens": 8, "do_sample": False}
    actual, expected = (
        multimodal("gemma3", name).generate(tokens(), token_type_ids=IMAGES, **options)
        for name in ("natten_layers", "eager")
    )
    assert torch.equal(actual, expected)


def test_gradients_of_images() -> None:
    results = []
    for name in ("natten_layers", "sdpa"):
        model = multimodal("gemma3", name).double()
        model(tokens(), token_type_ids=IMAGES, use_cache=False).logits.square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert max(error(results[0][name], results[1][name]) for name in results[0]) < FP64_TOLERANCE


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3"])  # gpt-oss does not tell its masks the positions
@pytest.mark.parametrize(
    "positions", [PACKED, torch.tensor([[0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13]])], ids=["packed", "gap"]
)
def test_packed_sequences(family: str, positions: Tensor) -> None:
    """transformers takes every position that is not one more than the last for the start of another text."""
    inputs = {"position_ids": positions, "use_cache": False}
    with torch.no_grad():
        actual, expected = (
            build(FAMILIES[family](), name)(tokens(), **inputs).logits for name in ("natten_layers", "eager")
        )
        one_text = build(FAMILIES[family](), "eager")(tokens(), attention_mask=padding_mask("none"), **inputs).logits
    assert error(one_text, expected) > 1000 * TOLERANCE
    assert error(actual, expected) < TOLERANCE


OTHERS = ("Llama", "Qwen2", "Qwen3Moe", "Olmo2", "Granite", "Cohere", "Starcoder2", "SmolLM3")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_of_a_collator(family: str) -> None:
    """Whatever the rest of the call is, here a cache, which makes transformers ignore that positions begin anew."""
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    parts = tokens(1).split([5, 6], 1)
    batch = collate([{"input_ids": part[0].tolist()} for part in parts])
    model = build(FAMILIES[family](), "natten_layers")
    with torch.no_grad():
        found = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
        expected = torch.cat([model(part).logits for part in parts], 1)
    assert error(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_packed_texts_train_as_separate_ones(name: str) -> None:
    """``cu_seq_lens_q`` says where texts begin. Logits and gradients are those of each text alone."""
    make = FAMILIES[name] if name in FAMILIES else partial(getattr(transformers, f"{name}Config"), **SMALL)
    ids, ends = tokens(1), torch.tensor([0, 5, 11], dtype=torch.int32)
    # Soft caps, experts and some norms are computed in fp32 whatever the model's dtype.
    wide = name not in {"gemma2", "gemma3", "Qwen3Moe", "Cohere", *SINKS}
    dtype, tolerance = (torch.float64, FP64_TOLERANCE) if wide else (torch.float32, TOLERANCE)
    packed, alone = build(make(), "natten_layers", dtype), build(make(), reference_for(name), dtype)
    logits = packed(ids, position_ids=PACKED, use_cache=False, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits
    expected = torch.cat([alone(part, use_cache=False).logits for part in ids.split([5, 6], 1)], 1)
    one_text = packed(ids, use_cache=False).logits
    assert error(one_text, expected) > 1000 * tolerance
    assert error(logits, expected) < tolerance
    grads = []
    for model, out in ((packed, logits), (alone, expected)):
        out.float().log_softmax(-1)[..., 3].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert max(error(grads[0][key], grads[1][key]) for key in grads[0]) < 100 * tolerance


@pytest.mark.parametrize("kind", PADDING)
def test_chunked_attention(kind: str) -> None:
    mask = padding_mask(kind)
    with torch.no_grad():
        actual, expected = (
            build(llama4(), name)(tokens(), attention_mask=mask).logits[mask.bool()]
            for name in ("natten_layers", "eager")
        )
    assert error(actual, expected) < TOLERANCE


def test_chunked_attention_through_a_cache() -> None:
    options: dict[str, Any] = {"attention_mask": padding_mask("left"), "max_new_tokens": 7, "do_sample": False}
    actual, expected = (
        build(llama4(), name).generate(tokens(), output_logits=True, return_dict_in_generate=True, **options)
        for name in ("natten_layers", "eager")
    )
    assert error(torch.stack(actual.logits), torch.stack(expected.logits)) < TOLERANCE


def test_scales_that_are_tensors() -> None:
    attention = transformers.AttentionInterface()["natten_layers"]
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    module = SimpleNamespace(is_causal=True)
    expected = attention(module, query, key, key, None, scaling=0.3)[0]
    scale = torch.tensor(0.3, requires_grad=True)
    actual = attention(module, query, key, key, None, scaling=scale)[0]
    assert error(actual.detach(), expected) < TOLERANCE
    actual.square().sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 1e-3
    per_head = torch.tensor([0.3, 0.3, 0.3, 0.9]).view(1, 4, 1, 1)
    actual = attention(module, query, key, key, None, scaling=per_head)[0]
    assert error(actual[:, :, :3], expected[:, :, :3]) < TOLERANCE < error(actual[:, :, 3], expected[:, :, 3])
    with pytest.raises(ValueError, match="must not depend on the key"):
        attention(module, query, key, key, None, scaling=torch.ones(6, 6))


def test_compiled_training_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler cannot look at position_ids, so transformers' mask is then that of packed sequences.

    The plug-in's masks are made outside of the graph, where those of a single text are seen to be usual ones.
    """
    config = FAMILIES["mistral"]()
    config.num_hidden_layers = 1
    model = build(config, "natten_layers").train()
    inputs = {"position_ids": PACKED, "use_cache": False}
    expected = build(config, "eager")(tokens(), **inputs).logits
    compiled = torch.compile(model, backend="eager")
    actual = compiled(tokens(), **inputs).logits
    assert error(actual.detach(), expected.detach()) < TOLERANCE
    actual.square().mean().backward()
    expected = model(tokens(), use_cache=False).logits
    monkeypatch.setattr(plugin, "attend_to_own_text", None)
    assert error(compiled(tokens(), use_cache=False).logits.detach(), expected.detach()) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda(family: str, kind: str) -> None:
    """The fused kernels in fp32. Half precision is tested on single operations, where rounding can be bounded."""
    ids, mask = tokens().cuda(), padding_mask(kind).cuda()
    results = []
    for name in ("natten_layers", "eager"):
        model = build(FAMILIES[family](), name).cuda()
        logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach(), **gradients})
    actual, expected = results
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert errors["logits"] < TOLERANCE
    assert max(errors.values()) < 10 * TOLERANCE, errors


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # a piece between graph breaks may be
@pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled:UserWarning")  # of the router of gpt-oss
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_cuda(family: str, cache: str) -> None:
    """On CUDA, transformers compiles the decoding step over a static cache."""
    options: dict[str, Any] = {"attention_mask": padding_mask("left").cuda(), "max_new_tokens": 9, "do_sample": False}
    actual, expected = (
        build(FAMILIES[family](), name).cuda().generate(tokens().cuda(), cache_implementation=kind, **options)
        for name, kind in (("natten_layers", cache), ("eager", "dynamic"))
    )
    assert torch.equal(actual, expected)


def llama4() -> Any:
    keep = {k: v for k, v in SMALL.items() if k != "sliding_window"}
    return transformers.Llama4TextConfig(
        **{**keep, "num_hidden_layers": 1},
        attention_chunk_size=4,
        intermediate_size_mlp=16,
        layer_types=["chunked_attention"],
        num_local_experts=2,
        moe_layers=[],
    )


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (llama4, {"position_ids": PACKED, "use_cache": False}, "in causal and sliding-window layers only"),
        (gemma3_encoder, {"position_ids": PACKED, "use_cache": False}, "in causal and sliding-window layers only"),
        (FAMILIES["mistral"], {"attention_mask": torch.ones(2, 1, 11, 11, dtype=torch.bool)}, "2-D padding mask"),
        (FAMILIES["mistral"], {"attention_mask": torch.ones(2, 11, 11).long()}, r"\[batch, tokens\], .* \(2, 11, 11\)"),
        (FAMILIES["mistral"], {"attention_mask": torch.ones(2, 11, 11) > 0}, "position_ids that begin anew"),
        (FAMILIES["mistral"], {"block_table": object()}, "paged"),
        (FAMILIES["mistral"], {"output_attentions": True}, "attention weights"),
        (FAMILIES["mistral"], {"cu_seq_lens_q": torch.tensor([0, 22])}, "packed in one row"),
    ],
)
def test_what_is_not_supported_raises(config: Callable[[], Any], inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(), "natten_layers")(tokens(), **inputs)


@pytest.mark.parametrize(
    ("config", "option"), [(FAMILIES["mistral"], "sliding_window"), (llama4, "attention_chunk_size")]
)
def test_a_cache_that_forgets_nothing_is_refused(config: Callable[[], Any], option: str) -> None:
    """A dynamic cache of transformers keeps the last ``window - 1`` tokens, and so all of them where that is none."""
    narrow = config()
    setattr(narrow, option, 1)
    model, options = build(narrow, "natten_layers"), {"max_new_tokens": 3, "do_sample": False}
    with pytest.raises(ValueError, match=f'{option}=1: pass use_cache=False, .* cache_implementation="static"'):
        model.generate(tokens(), **options)
    expected = build(narrow, "eager").generate(tokens(), use_cache=False, **options)
    assert torch.equal(model.generate(tokens(), use_cache=False, **options), expected)
    static = model.generate(tokens(), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


@pytest.mark.parametrize(
    ("model_type", "kind", "verdict", "reason"),
    [
        ("llama", "causal LM", "equal", ""),
        ("llama4_text", "causal LM", "equal", ""),
        ("modernbert", "masked LM", "equal", ""),
        ("bloom", "causal LM", "refused", "arithmetic on its masks"),
        ("deepseek_v4", "causal LM", "refused", "compressed keys"),
        ("hy_v4", "causal LM", "refused", "an indexer chooses"),
        ("gemma2", "causal LM", "equal", ""),
        ("llama4", "causal LM", "not applicable", "its text model"),
        ("cpmant", "causal LM", "not applicable", "no attention through AttentionInterface"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # those of other people's models
def test_rows_of_the_support_table(model_type: str, kind: str, verdict: str, reason: str) -> None:
    row = transformers_support.survey(model_type, kind)
    assert row.verdict == verdict, row
    assert reason in row.reason
    page = transformers_support.table([row])
    assert f"| `{model_type}` | {kind} | {verdict} | " in page
    assert f"1 {verdict}" in page


def test_wrong_and_unclear_rows_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **options: Any) -> Any:
        return attention(*args, **{**options, "scaling": 1.0})

    attention = plugin._attention
    monkeypatch.setattr(plugin, "_attention", wrong)
    assert transformers_support.survey("llama", "causal LM").verdict == "WRONG"
    monkeypatch.setattr(plugin, "REFUSED", {})
    assert transformers_support.survey("bloom", "causal LM").verdict == "UNCLEAR"
    monkeypatch.undo()
    plugin.register()


def test_dropout_raises_in_training_only() -> None:
    config = FAMILIES["mistral"]()
    config.attention_dropout = 0.1
    model = build(config, "natten_layers")
    model(tokens())
    model.train()
    model.config.attention_dropout = 0.0  # which layers have read before
    with pytest.raises(ValueError, match=r"dropout=0\.1; .* attention_dropout=0\.0, set it in each layer of a model"):
        model(tokens())
    for layer in model.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.0
    model(tokens())
    build(model.config, "natten_layers").train()(tokens())


def test_masks_that_are_missing_raise() -> None:
    """If a model makes no masks, positions are unknown, and attention must raise instead of guessing them."""
    attention = transformers.AttentionInterface()["natten_layers"]
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="2 causal queries over 6 keys"):
        attention(SimpleNamespace(is_causal=True), query, key, key, None)
    with pytest.raises(ValueError, match="sliding_window=3"):
        attention(SimpleNamespace(is_causal=False), query, key, key, None, sliding_window=3)
