"""The bias on relative positions of old NATTEN: by hand, against the definition in fp64, and in modules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import Case as AttentionCase
from helpers import arguments, error, make_inputs, raises_naming
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from natten_layers import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodGQA,
    attention_state,
    explain,
    neighborhood_attention,
)
from natten_layers.eager import dense_attention_state
from natten_layers.geometry import make_window

FP64 = torch.float64
CASES = (
    AttentionCase("1d", (9,), 4, dtype=FP64),
    AttentionCase("1d-causal-gqa", (19,), 5, 2, 2, True, heads=6, kv_heads=2, dtype=FP64),
    AttentionCase("2d", (9, 7), (3, 5), dtype=FP64),
    AttentionCase("2d-full", (4, 3), (4, 3), batch=1, dtype=FP64),
    AttentionCase("2d-all", (12, 10), (4, 3), 2, (2, 3), (True, False), 4, 2, 8, 16, 4, "learned", 0.3, dtype=FP64),
    AttentionCase("3d", (4, 6, 5), (2, 3, 3), (1, 2, 1), (2, 1, 1), (False, True, False), 2, 1, 8, 8, dtype=FP64),
    AttentionCase("ring", (12,), 5, 2, 2, heads=4, kv_heads=2, is_periodic=True, dtype=FP64),
    AttentionCase("ring-whole", (5, 4), (5, 2), is_periodic=(True, False), batch=1, dtype=FP64),
    AttentionCase("2d-fp32", (20, 20), 7, heads=4, kv_heads=4, batch=3),
)


def make_table(case: AttentionCase) -> Tensor:
    kernel = (case.kernel_size,) * len(case.spatial) if isinstance(case.kernel_size, int) else case.kernel_size
    return torch.randn(case.heads, *(2 * k - 1 for k in kernel), dtype=case.dtype).requires_grad_()


def test_by_hand() -> None:
    """Of 4 tokens and windows of 3, scores being zero: tokens 0 and 1 see 0-2, tokens 2 and 3 see 1-3."""
    zero = torch.zeros(1, 4, 1, 1, dtype=FP64)
    value = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=FP64).reshape(1, 4, 1, 1)
    table = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=FP64).log()  # of distances -2 .. 2
    out = neighborhood_attention(zero, zero, value, (3,), rpb=table).flatten()
    expected = [(3 + 40 + 500) / 12, (2 + 30 + 400) / 9, (20 + 300 + 4000) / 9, (10 + 200 + 3000) / 6]
    assert out.tolist() == pytest.approx(expected, rel=1e-12)


def test_by_hand_on_a_ring() -> None:
    """Of 4 tokens and windows of 3, scores being zero, each sees its neighbors, at distances -1, 0 and 1."""
    zero = torch.zeros(1, 4, 1, 1, dtype=FP64)
    value = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=FP64).reshape(1, 4, 1, 1)
    table = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=FP64).log()  # of distances -2 .. 2
    out = neighborhood_attention(zero, zero, value, (3,), rpb=table, is_periodic=True).flatten()
    expected = [(2000 + 3 + 40) / 9, (2 + 30 + 400) / 9, (20 + 300 + 4000) / 9, (200 + 3000 + 4) / 9]
    assert out.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: AttentionCase) -> None:
    """Results, and the gradients of every input and of the table."""
    torch.manual_seed(0)
    inputs, rpb = make_inputs(case), make_table(case)
    out, lse = neighborhood_attention(**arguments(case, inputs), rpb=rpb, return_lse=True)
    wide = {name: t.detach().double().requires_grad_() for name, t in (inputs | {"rpb": rpb}).items()}
    expected, row_max, row_sum = dense_attention_state(
        wide["query"],
        wide["key"],
        wide["value"],
        wide.get("additional_keys"),
        wide.get("additional_values"),
        wide.get("sink"),
        case.window,
        case.head_dim**-0.5 if case.scale is None else case.scale,
        wide["rpb"],
    )
    cotangents = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), (*inputs.values(), rpb), cotangents)
    expected_lse = row_max + row_sum.log()
    expected_grads = torch.autograd.grad(
        (expected, expected_lse), tuple(wide.values()), [c.double() for c in cotangents]
    )
    limit = 1e-13 if case.dtype == FP64 else 1e-6
    for name, found, wanted in zip(
        ("out", "lse", *wide), (out, lse, *grads), (expected, expected_lse, *expected_grads), strict=True
    ):
        assert error(found, wanted) <= limit, name
    state = attention_state(**arguments(case, inputs), rpb=rpb)
    assert torch.equal(state.out, out)
    # The bias is visible: without it, nothing of this holds.
    plain = neighborhood_attention(**arguments(case, inputs))
    assert error(plain, expected) > 0.05


def test_the_definition_is_that_of_old_natten() -> None:
    """By loops over a picture: every query and every key of its window, with dilation."""
    torch.manual_seed(0)
    case = AttentionCase("loops", (7, 6), (3, 2), 1, (2, 3), heads=2, kv_heads=2, head_dim=4, value_dim=4, batch=1)
    inputs, rpb = make_inputs(case), make_table(case)
    out = neighborhood_attention(**arguments(case, inputs), rpb=rpb)
    query, key, value = (inputs[name][0] for name in ("query", "key", "value"))

    def window(i: int, length: int, kernel: int, dilation: int) -> range:
        own, residue = divmod(i, dilation)
        start = min(max(own - kernel // 2, 0), -(-(length - residue) // dilation) - kernel)
        return range(start * dilation + residue, (start + kernel) * dilation, dilation)

    for y, x, head in itertools.product(range(7), range(6), range(2)):
        keys = list(itertools.product(window(y, 7, 3, 2), window(x, 6, 2, 3)))
        scores = torch.stack(
            [query[y, x, head] @ key[j, i, head] / 2 + rpb[head, (j - y) // 2 + 2, (i - x) // 3 + 1] for j, i in keys]
        )
        wanted = scores.softmax(0) @ torch.stack([value[j, i, head] for j, i in keys])
        torch.testing.assert_close(out[0, y, x, head], wanted)


def test_all_derivatives() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 5, 4, 2, 3, dtype=FP64, requires_grad=True)
    key = torch.randn(2, 5, 4, 1, 3, dtype=FP64, requires_grad=True)
    rpb = torch.randn(2, 5, 3, dtype=FP64, requires_grad=True)

    def run(query: Tensor, key: Tensor, rpb: Tensor) -> tuple[Tensor, Tensor]:
        return neighborhood_attention(query, key, key, (3, 2), rpb=rpb, return_lse=True)

    assert gradcheck(run, (query, key, rpb), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, (query, key, rpb), fast_mode=True)
    with forward_ad.dual_level():  # the table alone
        out, lse = run(query.detach(), key.detach(), forward_ad.make_dual(rpb.detach(), torch.ones_like(rpb)))
        tangents = [forward_ad.unpack_dual(result).tangent for result in (out, lse)]
        torch.testing.assert_close(tangents, [torch.zeros_like(out), torch.ones_like(lse)])  # a constant shifts the lse
    tables = torch.stack([rpb.detach(), 2 * rpb.detach()])
    mapped = torch.func.vmap(lambda table: run(query, key, table)[0])(tables)
    torch.testing.assert_close(mapped[1], run(query, key, tables[1])[0])


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's gradient does not depend on how the scores are cut, up to rounding."""
    torch.manual_seed(0)
    case = AttentionCase("chunks", (9, 8), 3, heads=4, kv_heads=2, batch=3, dtype=FP64)
    inputs, rpb = make_inputs(case), make_table(case)

    def grads() -> tuple[Tensor, ...]:
        out = neighborhood_attention(**arguments(case, inputs), rpb=rpb)
        return torch.autograd.grad(out.square().sum(), (inputs["query"], rpb))

    whole = grads()
    for scores in (1, 5000):
        monkeypatch.setattr("natten_layers.tile_attention.CHUNK_SCORES", scores)
        for found, wanted in zip(grads(), whole, strict=True):
            assert error(found, wanted) < 1e-14


@pytest.mark.gpu
def test_on_a_gpu_the_gradient_has_the_same_bits_in_every_run() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(4, 56, 56, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    rpb = torch.randn(2, 13, 13, device="cuda", requires_grad=True)
    grads = [
        torch.autograd.grad(neighborhood_attention(query, key, value, 7, rpb=rpb).float().square().sum(), rpb)[0]
        for _ in range(3)
    ]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    wide = rpb.detach().cpu().double().requires_grad_()
    query, key, value = (t.cpu().double() for t in (query, key, value))
    out = neighborhood_attention(query, key, value, 7, rpb=wide)
    assert error(grads[0], torch.autograd.grad(out.square().sum(), wide)[0]) < 1e-2


def test_wrong_tables() -> None:
    query = torch.randn(1, 6, 6, 4, 8)
    rpb = torch.zeros(4, 5, 5)
    for wrong, words in (
        (rpb[:2], ["rpb", "(2, 5, 5)", "(4, 5, 5)"]),
        (rpb[..., 1:], ["rpb", "(4, 5, 4)"]),
        (rpb.long(), ["rpb", "torch.int64"]),
        (rpb.to("meta"), ["rpb", "meta", "cpu"]),
        (0.5, ["rpb", "0.5", "tensor"]),
    ):
        with raises_naming(*words):
            neighborhood_attention(query, query, query, 3, rpb=wrong)  # pyright: ignore[reportArgumentType]
    assert explain(query, query, query, 3, rpb=rpb).impl == "eager"
    grouped = query.unflatten(3, (2, 2))
    out = neighborhood_attention(grouped, grouped, grouped, (3, 3), rpb=rpb.bfloat16())
    torch.testing.assert_close(out.flatten(3, 4), neighborhood_attention(query, query, query, 3))


def test_modules_load_old_state_dicts() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    assert layer.rpb is not None
    assert layer.rpb.shape == (2, 5, 5)
    assert 0.01 < layer.rpb.std() < 0.03
    assert "rel_pos_bias=True" in repr(layer)
    state = {name: torch.randn_like(t) for name, t in layer.state_dict().items()}
    assert sorted(state) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight", "rpb"]
    layer.load_state_dict(state)
    x = torch.randn(1, 5, 6, 16)
    heads = torch.nn.functional.linear(x, state["qkv.weight"], state["qkv.bias"]).unflatten(-1, (3, 2, 8))
    query, key, value = heads.unbind(-3)
    out = neighborhood_attention(query, key, value, 3, rpb=state["rpb"]).flatten(-2)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(out, state["proj.weight"], state["proj.bias"]))
    with pytest.raises(RuntimeError, match="rel_pos_bias=True"):
        NeighborhoodAttention2D(16, 2, 3).load_state_dict(state)
    layer.reset_parameters()
    assert layer.rpb.abs().max() < 0.1
    with raises_naming("rel_pos_bias", "kernel_size", "3"):
        NeighborhoodGQA(16, 2, 3, rel_pos_bias=True)


def test_the_table_serves_normalised_heads_registers_and_short_texts() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodGQA(16, 2, (5, 5), qk_norm="cosine", num_registers=2, sink="zero", rel_pos_bias=True)
    assert layer.rpb is not None
    x = torch.randn(1, 6, 6, 16)
    plain = layer(x)
    with torch.no_grad():
        layer.rpb.add_(torch.randn_like(layer.rpb))
    assert error(layer(x), plain) > 0.01
    layer(x).square().sum().backward()
    assert layer.rpb.grad is not None
    assert layer.rpb.grad.any()
    text = NeighborhoodAttention1D(16, 2, 8, is_causal=True, rel_pos_bias=True)
    long = torch.randn(1, 12, 16)
    # Five tokens see what they see as the beginning of twelve, though their window is cut to five.
    torch.testing.assert_close(text(long[:, :5]), text(long)[:, :5])
    assert math.isfinite(text(long).sum().item())


@pytest.mark.parametrize(("length", "kernel_size"), [(20, 2), (40, 13)])
def test_entries_of_minus_infinity_hide_keys(length: int, kernel_size: int) -> None:
    """Also in the last tile, which is not full. No query sees the key furthest before it."""
    torch.manual_seed(0)
    query = torch.randn(1, length, 1, 8, dtype=FP64, requires_grad=True)
    table = torch.zeros(1, 2 * kernel_size - 1, dtype=FP64)
    table[0, 0] = -math.inf
    table.requires_grad_()
    window = make_window((length,), (kernel_size,))
    definition = dense_attention_state(query, query, query, None, None, None, window, 8**-0.5, rpb=table)[0]
    out = neighborhood_attention(query, query, query, kernel_size, rpb=table)
    torch.testing.assert_close(out, definition)
    for actual, expected in zip(
        *(torch.autograd.grad(x.sin().sum(), (query, table)) for x in (out, definition)), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_a_head_that_sees_nothing(lowest: float) -> None:
    query = torch.randn(1, 8, 2, 8, requires_grad=True)
    table = torch.zeros(2, 5)
    table[0] = lowest
    out, lse = neighborhood_attention(query, query, query, 3, rpb=table, return_lse=True)
    assert (out[..., 0, :] == 0).all()
    assert (lse[..., 0] == -math.inf).all()
    assert torch.autograd.grad(out.sum(), query)[0].isfinite().all()
    assert (neighborhood_attention(query, query, query, 3, rpb=table, sink=0.0, return_lse=True)[1][..., 0] == 0).all()
