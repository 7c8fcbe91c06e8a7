"""Texts packed into rows by ``position_ids`` that begin anew, in the transformers plug-in, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from helpers import error  # noqa: E402
from test_transformers import (  # noqa: E402
    CACHES,
    FAMILIES,
    FP64_TOLERANCE,
    MIXED,
    SMALL,
    TOLERANCE,
    as_cache,
    build,
    multimodal,
    reference_for,
    tokens,
)

from benchmarks import transformers_support  # noqa: E402
from natten_layers.integrations import packed_texts  # noqa: E402
from natten_layers.integrations import transformers as plugin  # noqa: E402

LENGTHS = [[5, 6], [7, 1, 3]]
"""of the texts in each row"""
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
MOE = {"experts_implementation": "eager", "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, Callable[[], Any]] = {
    **FAMILIES,
    **{
        name: partial(getattr(transformers, f"{name}Config"), **SMALL)
        for name in ("Llama", "Qwen2", "Olmo2", "SmolLM3")
    },
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, initializer_range=0.3
    ),
    "opt": lambda: transformers.OPTConfig(
        **SMALL, word_embed_proj_dim=32, ffn_dim=48, dropout=0.0, activation_function="gelu", init_std=0.3
    ),
    "afmoe": lambda: transformers.AfmoeConfig(
        **SMALL, **MOE, layer_types=MIXED, num_experts=2, num_dense_layers=1, num_shared_experts=1
    ),
    # Its other layers are recurrent, and pass on what they saw from text to text.
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **SMALL, **MOE, layer_types=["full_attention"] * 3, num_experts=2, shared_expert_intermediate_size=16
    ),
    "bert": lambda: transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    ),
}
NARROW = ("gemma2", "gemma3", "gpt_oss", "flint", "mimo_v2_flash", "afmoe", "qwen3_next")
"""Soft caps, routers of experts and some norms are computed in fp32 whatever the model's dtype."""


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    plugin.register()


def output(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, **inputs)[0]


def separate(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """The outputs of each text alone, packed as the texts are."""
    rows = [
        torch.cat([output(model, text[None], **inputs) for text in row.split(lengths)], 1)
        for row, lengths in zip(ids, LENGTHS, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("use_cache", [None, False], ids=["default", "no cache"])
@pytest.mark.parametrize("name", MODELS)
def test_texts_train_as_if_alone(name: str, use_cache: bool | None) -> None:
    """Logits and gradients are those of each text alone, whether or not transformers' masks are told the positions."""
    dtype, tolerance = (torch.float32, TOLERANCE) if name in NARROW else (torch.float64, FP64_TOLERANCE)
    inputs = {} if use_cache is None or name == "bert" else {"use_cache": use_cache}
    packed, alone = (
        build(MODELS[name](), implementation, dtype).train()
        for implementation in ("natten_layers", "eager" if name == "afmoe" else reference_for(name))
    )
    found, expected = output(packed, tokens(), position_ids=POSITIONS, **inputs), separate(alone, tokens(), **inputs)
    assert error(output(packed, tokens(), **inputs), expected) > 1000 * tolerance
    assert error(found, expected) < tolerance
    grads = []
    for model, out in ((packed, found), (alone, expected)):
        out.float().log_softmax(-1)[..., 3].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    # The same number added to all keys changes nothing, so the gradients of such biases are rounding errors.
    named = [key for key in grads[0] if not key.endswith(("k_proj.bias", "key.bias"))]
    assert max(error(grads[0][key], grads[1][key]) for key in named) < 100 * tolerance


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "bert"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_texts_beside_padding(name: str, side: str) -> None:
    """An attention_mask says which tokens are padding. That their positions go back begins no text."""
    pad, before, behind = {"none": (0, 0, 0), "left": (1, 3, 0), "right": (0, 0, 3)}[side]
    ids = torch.nn.functional.pad(tokens(), (before, behind), value=3)
    positions = torch.nn.functional.pad(POSITIONS, (before, behind), value=pad)
    mask = torch.nn.functional.pad(torch.ones_like(POSITIONS), (before, behind))
    with torch.no_grad():
        model = build(MODELS[name](), "natten_layers")
        found = output(model, ids, position_ids=positions, attention_mask=mask)[mask.bool()]
        expected = separate(model, tokens())[torch.ones_like(POSITIONS).bool()]
    assert error(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("filler", [0, 1])
def test_positions_of_padding_begin_no_text(name: str, filler: int) -> None:
    """transformers gives padding the position 0, and gave it 1; here some lies between a text's tokens, too."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
    inputs = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        found, expected = (
            build(FAMILIES[name](), implementation)(tokens(), **inputs).logits[mask.bool()]
            for implementation in ("natten_layers", "eager")
        )
    assert error(found, expected) < TOLERANCE


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_texts_in_chunks_through_a_cache(name: str, cache: str) -> None:
    """A chunk goes on with the text in the cache, and other texts begin in it."""
    model = build(FAMILIES[name](), "natten_layers")
    past, ids = CACHES[cache](model.config), tokens(1, 17)
    first, second = ids.split([4, 13], 1)
    positions = torch.cat([torch.arange(4, 6), torch.arange(8), torch.arange(3)])[None]
    with torch.no_grad():
        before = model(first, position_ids=torch.arange(4)[None], **as_cache(model, past)).logits
        behind = model(second, position_ids=positions, **as_cache(model, past)).logits
        texts = [model(text, use_cache=False).logits for text in ids.split([6, 8, 3], 1)]
    assert error(torch.cat([before, behind], 1), torch.cat(texts, 1)) < TOLERANCE


def paligemma(implementation: str) -> Any:
    """Without windows, which its prefixes would have to fit into."""
    text = {**SMALL, "model_type": "gemma2", "layer_types": ["full_attention"] * 3, "sliding_window": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(
        transformers.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32),
        attn_implementation={"text_config": implementation, "": "eager"},
    ).eval()


@pytest.mark.parametrize(
    ("make", "types"),
    [
        (partial(multimodal, "gemma3"), [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]),
        (paligemma, [0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]),  # prefixes, all of which transformers takes for one block
    ],
)
def test_texts_with_tokens_that_see_each_other(make: Callable[[str], Any], types: list[int]) -> None:
    model, ids, kinds = make("natten_layers"), tokens(1), torch.tensor([types])
    inputs = {"position_ids": POSITIONS[:1], "token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        found = model(ids, **inputs).logits
        expected = [
            model(text, token_type_ids=kind, position_ids=position, use_cache=False).logits
            for text, kind, position in zip(
                ids.split([5, 6], 1), kinds.split([5, 6], 1), POSITIONS[:1].split([5, 6], 1), strict=True
            )
        ]
    assert error(found, torch.cat(expected, 1)) < TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ({"q": [5, 6]}, r"cu_seq_lens_q must begin with 0 and not decrease, got \[5, 6\]"),
        ({"q": [0, 5, 10], "k": [0, 5, 10]}, "cu_seq_lens_q ends with 10, but a row has 11 tokens"),
        ({"q": [0.0, 5.0, 11.0]}, "cu_seq_lens_q must be an integer tensor"),
        ({"k": [0, 5, 11]}, "came without cu_seq_lens_q"),
    ],
    ids=str,
)
def test_cumulative_lengths_that_do_not_fit(name: str, ends: dict[str, list[int]], message: str) -> None:
    """Layers with a soft cap compute from them in another way than the others, but judge them alike."""
    given = {f"cu_seq_lens_{of}": torch.tensor(values) for of, values in ends.items()}
    with pytest.raises(ValueError, match=message):
        output(build(MODELS[name](), "natten_layers"), tokens()[:1], **given)


def test_cumulative_lengths_that_are_no_tensor() -> None:
    with pytest.raises(ValueError, match=r"cu_seq_lens_k must be a tensor, got \[0, 11\] of type list"):
        output(
            build(MODELS["mistral"](), "natten_layers"), tokens()[:1],
            cu_seq_lens_q=torch.tensor([0, 11]), cu_seq_lens_k=[0, 11],
        )  # fmt: skip


def test_gradient_checkpointing() -> None:
    results = []
    for checkpointed in (False, True):
        model = build(FAMILIES["gpt_oss"](), "natten_layers").train()
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(tokens(), position_ids=POSITIONS, use_cache=False).logits.square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert max(error(results[1][name], grad) for name, grad in results[0].items()) < TOLERANCE


def test_positions_are_looked_at_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Tensor] = []
    look = packed_texts.text_begins
    monkeypatch.setattr(packed_texts, "text_begins", lambda p, real=None: looked.append(p) or look(p, real))
    model, positions = build(FAMILIES["gpt_oss"](), "natten_layers"), POSITIONS.clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(tokens(), position_ids=positions)
            assert len(looked) == 1
            model(tokens())
            assert len(looked) == 2
            model(tokens()[:, :1], position_ids=positions[:, :1])  # a decoding step
            assert len(looked) == 2
            looked.clear()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_positions_that_change_in_place(mode: Callable[[], Any]) -> None:
    model = build(FAMILIES["gpt_oss"](), "natten_layers")
    with mode():
        positions = torch.arange(11).repeat(2, 1)
        whole = model(tokens(), position_ids=positions).logits
        positions.copy_(POSITIONS)
        assert error(model(tokens(), position_ids=positions).logits, separate(model, tokens())) < TOLERANCE
        positions.copy_(torch.arange(11))
        assert torch.equal(model(tokens(), position_ids=positions).logits, whole)


def compiled_layer(attention_mask: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Attention of one layer, as a graph without breaks and as it is, of other position_ids each time."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 11, 8, requires_grad=True), torch.randn(2, 2, 11, 8)
    layer: Any = SimpleNamespace(is_causal=True, config=None)

    def attend(position_ids: Tensor) -> Tensor:
        return plugin._attention(layer, query, key, key, attention_mask, position_ids=position_ids)[0]

    faster = torch.compile(attend, backend="aot_eager", fullgraph=True)

    def both(position_ids: Tensor) -> tuple[Tensor, Tensor]:
        found = faster(position_ids)
        found.sum().backward()
        return found.detach(), attend(position_ids).detach()

    return both


def test_compiled_layers_that_cannot_look_raise() -> None:
    """Unless their masks are told of texts, compiled layers know only afterwards, when they have been computed."""
    layer = compiled_layer(torch.empty(0, 1, plugin._CAUSAL, 22, dtype=torch.long))
    found, whole = layer(torch.arange(11).repeat(2, 1))
    assert error(found, whole) < TOLERANCE
    right = torch.tensor([[1] * 9 + [0] * 2, [1] * 11])  # that these tokens are padding is not known to the layer
    found, _ = layer((right.cumsum(-1) - 1).masked_fill(right == 0, 1))
    assert error(found[right.bool()], whole[right.bool()]) < TOLERANCE
    with pytest.raises(RuntimeError, match=r"position_ids begin anew .* pass cu_seq_lens_q"):
        layer(POSITIONS)


def test_compiled_layers_beside_padding() -> None:
    """There layers compute with positions anyway, which they move apart without looking at them."""
    mask = torch.arange(11).repeat(2, 2)[:, None, None]
    mask[..., 11:13] = -1
    layer = compiled_layer(mask)
    found, one_text = layer((torch.arange(11) - 2).clamp_min(1).repeat(2, 1))
    assert error(found, one_text) < TOLERANCE
    found, expected = layer(torch.tensor([[1, 1, 0, 1, 2, 0, 1, 2, 3, 4, 5]]))
    assert error(one_text, expected) > 1000 * TOLERANCE
    assert error(found, expected) < TOLERANCE


def test_packed_masks_hold_the_ends_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers' masks know the texts, layers compute them as samples, and not by positions."""
    ends: list[list[int]] = []
    attend = plugin.attend_to_own_text
    monkeypatch.setattr(plugin, "attend_to_own_text", lambda *a: ends.append(a[3].tolist()) or attend(*a))
    monkeypatch.setattr(plugin, "cached_attention", None)
    for inputs in ({"use_cache": False}, {}):
        build(FAMILIES["qwen3"](), "natten_layers")(tokens(), position_ids=POSITIONS, **inputs)
    assert ends == [[0, 5, 11, 18, 19, 22]] * 6


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([0, 1, 2, 0, 1], [3]),
        ([0, 0, 0, 1], [1, 2]),
        ([2, 2, 3, 2], [1, 3]),
        ([0, 1, 5, 6], []),  # a gap
        ([7, 8, 9], []),
        ([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]], []),  # an image of 2x2 tokens
        ([[0, 1, 1, 1, 1, 2], [0, 1, 2, 1, 2, 3], [0, 1, 1, 1, 1, 3]], []),  # two frames at one time
        ([[0, 1, 1, 0, 1, 0], [0, 1, 2, 0, 1, 0], [0, 2, 2, 0, 1, 0]], [3, 5]),
        ([[0, 0, 0], [0, 0, 1], [0, 1, 0]], []),
        ([[0, 0, 1], [0, 0, 1], [0, 0, 1]], [1]),
    ],
)
def test_where_texts_begin(positions: list[Any], expected: list[int]) -> None:
    """Positions of three axes (time, height, width) are those of images and videos."""
    ids = torch.tensor(positions)
    begins = packed_texts.text_begins(ids[:, None] if ids.ndim == 2 else ids[None])
    assert begins[0].nonzero()[:, 0].tolist() == expected


def test_positions_of_three_axes_reach_layers() -> None:
    query, key = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 11, 8)
    layer: Any = SimpleNamespace(is_causal=True)
    expected = plugin._attention(layer, query, key, key, None, position_ids=POSITIONS)[0]
    found = plugin._attention(layer, query, key, key, None, position_ids=POSITIONS.expand(3, -1, -1))[0]
    assert torch.equal(found, expected)
    assert not torch.equal(plugin._attention(layer, query, key, key, None)[0], expected)


def test_cross_attention_ignores_the_positions_of_its_queries() -> None:
    query, key = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 11, 8)
    decoder: Any = SimpleNamespace(is_causal=False, is_decoder=True)
    for keys in (key, key[:, :, :7]):
        found = plugin._attention(decoder, query, keys, keys, None, position_ids=POSITIONS)[0]
        assert torch.equal(found, plugin._attention(decoder, query, keys, keys, None)[0])


@pytest.mark.parametrize(
    ("model_type", "kind", "packed"),
    [
        ("llama", "causal LM", "apart"),
        ("persimmon", "causal LM", "apart with `use_cache=False`"),
        ("gte", "masked LM", "apart with `cu_seq_lens_q`"),
        ("plbart", "causal LM", "apart; positions go on"),
        ("modernbert", "masked LM", "see each other"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # those of other people's models
def test_packed_texts_of_the_support_table(model_type: str, kind: str, packed: str) -> None:
    row = transformers_support.survey(model_type, kind)
    assert row.packed == packed
    assert f"| equal | {packed} | " in transformers_support.table([row])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma2", "bert"])
@pytest.mark.parametrize("use_cache", [None, False], ids=["default", "no cache"])
def test_cuda(name: str, use_cache: bool | None) -> None:
    inputs = {} if use_cache is None or name == "bert" else {"use_cache": use_cache}
    results = []
    for run in (partial(output, position_ids=POSITIONS.cuda()), separate):
        model = build(MODELS[name](), "natten_layers").cuda().train()
        out = run(model, tokens().cuda(), **inputs)
        (out * torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)).sum().backward()  # not that of a norm
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        results.append({"out": out.detach(), **{n: g for n, g in named if not n.endswith("key.bias")}})
    errors = {name: error(found, results[1][name]) for name, found in results[0].items()}
    assert max(errors.values()) < 10 * TOLERANCE, errors


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_cuda() -> None:
    """Texts that transformers' masks are told of are samples of a graph, whose number may change."""
    model = build(FAMILIES["mistral"](), "natten_layers").cuda().train()
    faster = torch.compile(model)
    for positions in (POSITIONS, torch.arange(11).repeat(2, 1), POSITIONS.flip(0), POSITIONS[:1].repeat(2, 1)):
        found, expected = (
            m(tokens().cuda(), position_ids=positions.cuda(), use_cache=False).logits for m in (faster, model)
        )
        assert error(found, expected) < 10 * TOLERANCE
        found.square().mean().backward()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_layers_wait_once_cuda() -> None:
    """Positions are looked at before the first layer that has them; the others find what it found."""
    query, key = torch.randn(2, 4, 11, 8, device="cuda"), torch.randn(2, 2, 11, 8, device="cuda")
    mask = torch.empty(0, 1, plugin._CAUSAL, 22, dtype=torch.long, device="cuda")
    module: Any = SimpleNamespace(is_causal=True, config=None)
    layer, positions = partial(plugin._attention, module, query, key, key, mask), POSITIONS.cuda()
    expected = layer(position_ids=positions)[0]
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = layer(position_ids=positions)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
