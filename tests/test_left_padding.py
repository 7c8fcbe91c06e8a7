"""Training of rows that begin with padding in the transformers plug-in, on tiny random models."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from helpers import error  # noqa: E402
from test_transformers import FAMILIES, FP64_TOLERANCE, TOLERANCE, build, reference_for, tokens  # noqa: E402

from natten_layers import default_impl  # noqa: E402
from natten_layers.integrations import packed_texts  # noqa: E402
from natten_layers.integrations import transformers as plugin  # noqa: E402

LEFT = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])
SIDES = {
    "left": LEFT,
    "both": torch.tensor([[0] * 3 + [1] * 6 + [0] * 2, [1] * 9 + [0] * 2]),
    "beside an empty row": torch.tensor([[0] * 11, [0] * 2 + [1] * 9]),
}
BETWEEN = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]])
POSITIONS = {
    "counted": lambda mask: None,
    "of tokens": lambda mask: mask.cumsum(1) - mask,  # as TRL's PPO gives them: 0, 0, 0, 1, 2
    "of tokens, filled": lambda mask: (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    plugin.register()


def train(model: Any, mask: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Logits of tokens, and gradients."""
    logits = model(tokens(), attention_mask=mask, **inputs).logits
    assert logits.isfinite().all()  # also of padding
    logits[mask.bool()].square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits[mask.bool()].detach(), **gradients}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(error(found[name], expected[name]) for name in found)


def trained(family: str, mask: Tensor, **inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """By the plug-in and by transformers, and how much they may differ."""
    # Flint's eager path computes scores in fp32.
    dtype, tolerance = (torch.float32, TOLERANCE) if family == "flint" else (torch.float64, FP64_TOLERANCE)
    found, expected = (
        train(build(FAMILIES[family](), name, dtype), mask, **inputs)
        for name in ("natten_layers", reference_for(family))
    )
    return found, expected, tolerance


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt_oss", "mimo_v2_flash"])
def test_rows_train_without_positions(family: str, side: str, use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sliding and full layers, with sinks and without, as the path by positions has no backward kernel."""
    monkeypatch.setattr(plugin, "cached_attention", None)
    found, expected, tolerance = trained(family, SIDES[side], use_cache=use_cache)
    assert worst(found, expected) < tolerance


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_positions_of_one_text_are_not_those_of_many(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That padding's positions stay or go back begins no text, so that rows are not computed as packed texts."""
    monkeypatch.setattr(plugin, "cached_attention", None)
    monkeypatch.setattr(plugin, "attend_to_own_text", None)
    found, expected, tolerance = trained(family, LEFT, position_ids=POSITIONS[kind](LEFT))
    assert worst(found, expected) < tolerance


def test_fused_kernels_train_them() -> None:
    """With ``impl="fused"`` the path by positions raises where a gradient is needed."""
    config = FAMILIES["gpt_oss"]()
    config.num_hidden_layers, config.layer_types = 2, ["sliding_attention", "full_attention"]
    with default_impl("fused"):
        found = train(build(config, "natten_layers"), LEFT)
    assert worst(found, train(build(config, "eager"), LEFT)) < 10 * TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "gemma2"])
def test_padding_between_tokens(family: str) -> None:
    """Windows count what lies between, so such rows keep their order."""
    narrow = family == "gemma2"
    dtype, tolerance = (torch.float32, TOLERANCE) if narrow else (torch.float64, FP64_TOLERANCE)
    found, expected = (
        train(build(FAMILIES[family](), name, dtype), BETWEEN) for name in ("natten_layers", reference_for(family))
    )
    assert worst(found, expected) < tolerance


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_packed_texts_behind_padding(family: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are looked at once for each kind of layers, and texts do not see each other."""
    looked: list[Tensor] = []
    look = packed_texts.text_begins
    monkeypatch.setattr(packed_texts, "text_begins", lambda p, real=None: looked.append(p) or look(p, real))
    monkeypatch.setattr(plugin, "cached_attention", None)
    ids, mask = tokens(), LEFT
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 0, 1, 2, 0, 1, 2, 3]])
    parts = [(0, 0, 5), (0, 5, 11), (1, 4, 7), (1, 7, 11)]
    packed, alone = (build(FAMILIES[family](), "natten_layers").train() for _ in range(2))
    if checkpointed:
        getattr(packed, "activation_checkpointing_enable", packed.gradient_checkpointing_enable)()
    found = train(packed, mask, position_ids=positions)
    assert len(looked) == 2
    logits = torch.cat([alone(ids[row : row + 1, first:last]).logits[0] for row, first, last in parts])
    logits.square().mean().backward()
    grads = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert worst(found, {"logits": logits.detach(), **grads}) < 10 * TOLERANCE
    assert error(packed(ids, attention_mask=mask).logits[mask.bool()].detach(), found["logits"]) > 1000 * TOLERANCE


def test_positions_that_change_in_place() -> None:
    model, positions = build(FAMILIES["gpt_oss"](), "natten_layers"), torch.arange(11).repeat(2, 1)
    texts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]).repeat(2, 1)
    whole = train(model, LEFT, position_ids=positions)["logits"]
    positions.copy_(texts)
    apart = train(model, LEFT, position_ids=positions)["logits"]
    assert error(apart, whole) > 1000 * TOLERANCE
    assert torch.equal(train(model, LEFT, position_ids=texts)["logits"], apart)


def padded_mask() -> Tensor:
    """What full layers get."""
    make: Any = plugin._positions_mask
    mask = make(batch_size=2, q_length=11, kv_length=11, attention_mask=LEFT.bool())
    assert mask is not None
    assert mask.shape == (2, 1, plugin._PADDED, 22)
    return mask


def test_compiled_layers_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are given positions, at which they cannot look, those keep texts apart, in PyTorch."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 11, 8, requires_grad=True), torch.randn(2, 2, 11, 8)
    layer: Any = SimpleNamespace(is_causal=True, config=None)
    attend = partial(plugin._attention, layer, query, key, key, padded_mask())

    def run(function: Any, **inputs: Any) -> dict[str, Tensor]:
        query.grad = None
        out = function(**inputs)[0][LEFT.bool()]
        out.square().sum().backward()
        assert query.grad is not None
        return {"out": out.detach(), "gradient": query.grad}

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    texts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]).repeat(2, 1)
    expected = run(attend, position_ids=texts)
    assert worst(run(compiled, position_ids=texts), expected) < TOLERANCE
    assert error(run(attend)["out"], expected["out"]) > 1000 * TOLERANCE
    expected = run(attend)
    monkeypatch.setattr(plugin, "cached_attention", None)
    assert worst(run(compiled), expected) < TOLERANCE


@pytest.mark.parametrize("differentiated", ["query", "key", "sink"])
def test_any_input_that_needs_a_gradient(differentiated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "cached_attention", None)
    inputs = {"query": torch.randn(2, 4, 11, 8), "key": torch.randn(2, 2, 11, 8), "sink": torch.randn(4)}
    leaf = inputs[differentiated].requires_grad_()
    layer: Any = SimpleNamespace(is_causal=True, config=None)
    query, key = inputs["query"], inputs["key"]
    out = plugin._attention(layer, query, key, key.detach(), padded_mask(), s_aux=inputs["sink"])[0]
    out[LEFT.bool()].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.any()
