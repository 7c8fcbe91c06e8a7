"""The dense oracle against hand-computed numbers, and the blocked path against the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import CASES, FLOOR, Case, assert_close, error, make_inputs, oracle, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from natten_layers import attention_state, eager, merge_attention, neighborhood_attention, tile_attention, tiles
from natten_layers.eager import dense_attention_state
from natten_layers.geometry import make_window, window_mask

BLOCKINGS = {"default": (tiles.TILE_ROWS, tile_attention.CHUNK_SCORES), "small": (6, 200), "single": (1, 1)}


@pytest.fixture(params=BLOCKINGS)
def blocking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiles and chunks small during a test, so that tiny tensors have several of both."""
    rows, scores = BLOCKINGS[request.param]
    monkeypatch.setattr(tiles, "TILE_ROWS", rows)
    monkeypatch.setattr(tile_attention, "CHUNK_SCORES", scores)


@pytest.mark.parametrize(
    ("spatial", "kernel", "group", "sides"),
    [
        ((16, 16, 16), 3, 1, [4, 4, 2]),  # 144 keys for 32 queries; 64 would see 216
        ((64, 64), 7, 1, [8, 8]),
        ((64, 64), 7, 4, [4, 4]),
        ((4096,), 256, 1, [64]),
        ((4096,), 3, 1, [16]),  # smaller tiles make matrix products inefficient
        ((3, 5), 3, 1, [3, 5]),
    ],
)
def test_tiles_grow_as_long_as_it_pays(spatial: tuple[int, ...], kernel: int, group: int, sides: list[int]) -> None:
    axes = tiles.plan(spatial, make_window(spatial, kernel), group)
    assert [axis.tile for axis in axes] == sides


# ---- The oracle -----------------------------------------------------------------------------------------------------


def hand(scores: list[float], values: list[float]) -> tuple[float, float]:
    """Softmax attention over a few scalar keys, and its lse, in plain Python."""
    weights = [math.exp(s) for s in scores]
    total = sum(weights)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / total, math.log(total)


def test_oracle_equals_hand_computed_numbers():
    key = [0.3, -1.2, 0.7, 2.0]
    value = [1.0, -2.0, 3.0, 0.5]
    query = [0.5, 1.5, -1.0, 2.5]
    register_key, register_value, sink, scale = 0.4, -7.0, 0.9, 0.8
    q, k, v = (torch.tensor(x, dtype=torch.float64).reshape(1, 4, 1, 1) for x in (query, key, value))
    out, row_max, row_sum = dense_attention_state(
        q,
        k,
        v,
        torch.full((1, 1, 1, 1), register_key, dtype=torch.float64),
        torch.full((1, 1, 1, 1), register_value, dtype=torch.float64),
        sink,
        make_window((4,), 2, is_causal=True),
        scale,
    )
    for i, keys in enumerate([(0,), (0, 1), (1, 2), (2, 3)]):
        scores = [scale * query[i] * k for k in (register_key, *(key[j] for j in keys))]
        expected, lse = hand([*scores, sink], [register_value, *(value[j] for j in keys), 0.0])
        assert out[0, i, 0, 0].item() == pytest.approx(expected, rel=1e-14)
        assert (row_max + row_sum.log())[0, i, 0].item() == pytest.approx(lse, rel=1e-14)


def test_oracle_reads_kv_head_h_div_group():
    case = Case("gqa", (7,), 3, heads=4, kv_heads=2, dtype=torch.float64)
    inputs = make_inputs(case)
    whole = oracle(case, inputs).out
    for head, kv_head in enumerate((0, 0, 1, 1)):
        one = {
            "query": inputs["query"][..., head : head + 1, :],
            **{name: inputs[name][..., kv_head : kv_head + 1, :] for name in ("key", "value")},
        }
        single = oracle(replace(case, heads=1, kv_heads=1), one).out
        torch.testing.assert_close(whole[..., head : head + 1, :], single, rtol=1e-14, atol=1e-14)


# ---- The blocked path against the oracle ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("blocking")
def test_blocked_equals_oracle(case: Case):
    inputs = make_inputs(case)
    assert_close(case, run(case, inputs, "eager"), oracle(case, inputs))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    axes = []
    for _ in range(draw(st.integers(1, 3))):
        kernel = draw(st.integers(1, 4))
        dilation = draw(st.integers(1, 3))
        length = kernel * dilation + draw(st.integers(0, 4))
        axes.append((length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())))
    kv_heads = draw(st.integers(1, 2))
    return Case(
        "drawn",
        *zip(*axes, strict=True),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 5)),
        value_dim=draw(st.integers(1, 5)),
        registers=draw(st.integers(0, 2)),
        sink=draw(st.sampled_from(["none", "zero", "learned"])),
        batch=draw(st.integers(1, 2)),
        dtype=torch.float64,
    )


@given(case=cases(), rows=st.integers(1, 40), scores=st.sampled_from([1, 100, 3000]))
def test_blocked_equals_oracle_for_any_arguments(case: Case, rows: int, scores: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_ROWS", rows)
        patch.setattr(tile_attention, "CHUNK_SCORES", scores)
        inputs = make_inputs(case)
        assert_close(case, run(case, inputs, "eager"), oracle(case, inputs))


def test_blocked_reads_strided_views():
    case = Case("views", (9, 8), (3, 5), heads=2, kv_heads=2, dtype=torch.float64)
    query, key, value = torch.randn(2, 9, 8, 3, 2, 16, dtype=torch.float64).unbind(-3)
    expected = oracle(case, {"query": query, "key": key, "value": value}).out
    actual = neighborhood_attention(query, key, value, case.kernel_size, impl="eager")
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_state_has_the_true_maximum_where_there_is_no_sink():
    case = Case("state", (8, 9), 3, registers=2, dtype=torch.float64)
    query, key, value, registers, register_values = make_inputs(case).values()
    arguments = (query, key, value, registers, register_values, None, make_window(case.spatial, 3), 0.25)
    for actual, expected in zip(eager.attention_state(*arguments), dense_attention_state(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sink", [1e4, -1e4])
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4])
def test_extreme_sinks_and_scores_are_stable(sink: float, offset: float):
    case = Case("extreme", (6, 6), 3)
    # Eighths, so that every score near the offset is exact in fp32 and tolerances can stay tight.
    inputs = {n: (t * 8).round().div(8).detach().requires_grad_() for n, t in make_inputs(case).items()}
    shift = torch.zeros(16)
    shift[0] = 1.0
    query, key = inputs["query"] + shift * 4.0, inputs["key"] * (1 - shift) + shift * offset
    sinks = torch.full((2,), sink, requires_grad=True)
    out, lse = neighborhood_attention(query, key, inputs["value"], 3, sink=sinks, return_lse=True, impl="eager")
    q, k, v, s = (t.detach().double() for t in (query, key, inputs["value"], sinks))
    dense, row_max, row_sum = dense_attention_state(q, k, v, None, None, s, make_window((6, 6), 3), 0.25)
    torch.testing.assert_close(out.double(), dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), row_max + row_sum.log(), rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad((out.sum(), lse.sum()), (*inputs.values(), sinks))
    assert all(g.isfinite().all() for g in grads)
    # Every lse follows either the scores or the sink, whichever is larger.
    if abs(offset - sink) > 1e3:
        torch.testing.assert_close(grads[-1], torch.full((2,), 72.0 if sink > offset else 0.0))


# ---- Derivatives ----------------------------------------------------------------------------------------------------

DERIVATIVE_CASES = (
    Case("2d", (4, 5), (3, 2), (2, 1), 1, (False, True), 2, 1, 2, 3, 2, "learned", 0.6, 1, torch.float64),
    Case("1d", (7,), 3, 1, 2, False, 2, 2, 3, 2, 0, "none", None, 1, torch.float64),
    Case("3d", (2, 3, 3), (2, 2, 3), 1, 1, (True, False, False), 1, 1, 2, 2, 1, "zero", None, 1, torch.float64),
    Case("ring", (4, 5), (3, 4), (1, 3), heads=2, kv_heads=1, head_dim=2, value_dim=3, registers=1, sink="learned",
         is_causal=(True, False), is_periodic=(False, True), batch=1, dtype=torch.float64),
    Case("grid", (5, 2), (2, 3), heads=2, kv_heads=1, head_dim=2, value_dim=3, registers=1, batch=1,
         dtype=torch.float64, key_spatial=(3, 4)),
)  # fmt: skip


def as_function(case: Case) -> Callable[..., Any]:
    """The eager path as a function of its tensors, returning out and lse."""
    names = list(make_inputs(case))

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        if case.sink == "zero":
            given["sink"] = torch.zeros((), dtype=case.dtype).expand(case.heads)
        return neighborhood_attention(
            given.pop("query"),
            given.pop("key"),
            given.pop("value"),
            case.kernel_size,
            stride=case.stride,
            dilation=case.dilation,
            is_causal=case.is_causal,
            is_periodic=case.is_periodic,
            scale=case.scale,
            return_lse=True,
            impl="eager",
            **given,  # type: ignore[arg-type]
        )

    return attend


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
@pytest.mark.usefixtures("blocking")
def test_gradients_of_every_input_through_out_and_lse(case: Case):
    assert gradcheck(as_function(case), tuple(make_inputs(case).values()), fast_mode=True)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_exact_jacobian_of_every_input(case: Case):
    inputs = tuple(make_inputs(case).values())
    assert gradcheck(as_function(case), inputs)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_second_derivatives(case: Case):
    assert gradgradcheck(as_function(case), tuple(make_inputs(case).values()), fast_mode=True)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_forward_mode(case: Case):
    inputs = tuple(make_inputs(case).values())
    assert gradcheck(as_function(case), inputs, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


def test_forward_mode_of_one_input_alone():
    case = DERIVATIVE_CASES[0]
    attend, inputs = as_function(case), [t.detach() for t in make_inputs(case).values()]
    tangent = torch.randn_like(inputs[1])
    with forward_ad.dual_level():
        dual = [inputs[0], forward_ad.make_dual(inputs[1], tangent), *inputs[2:]]
        out, lse = (forward_ad.unpack_dual(t).tangent for t in attend(*dual))
    step = 1e-6
    moved = (attend(inputs[0], inputs[1] + sign * step * tangent, *inputs[2:]) for sign in (1, -1))
    for actual, plus, minus in zip((out, lse), *moved, strict=True):
        torch.testing.assert_close(actual, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-8)


def test_gradients_through_merged_states():
    case = Case("merge", (5, 4), (3, 2), heads=2, kv_heads=1, head_dim=2, value_dim=2, batch=1, dtype=torch.float64)
    inputs = make_inputs(case)
    registers = [torch.randn(1, 2, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    sink = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)

    def merged(query: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        a = attention_state(query, key, value, (3, 2), sink=sink, impl="eager")
        b = attention_state(query, key, value, (1, 1), additional_keys=k, additional_values=v, impl="eager")
        state = merge_attention(a, b)
        return state.out, state.lse

    assert gradcheck(merged, (*inputs.values(), *registers, sink), fast_mode=True)
    assert gradgradcheck(merged, (*inputs.values(), *registers, sink), fast_mode=True)


def test_function_transforms():
    case = Case("func", (5, 4), (3, 2), heads=2, kv_heads=1, head_dim=3, value_dim=3, batch=2, dtype=torch.float64)
    query, key, value = (t.detach() for t in make_inputs(case).values())

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = neighborhood_attention(query, key, value, (3, 2), sink=0.0, return_lse=True, impl="eager")
        return out.square().sum() + lse.sin().sum()

    queries = torch.stack([query, 2 * query, -query])
    per_sample = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None, None))(queries, key, value)
    for i, q in enumerate(queries):
        for batched, single in zip(per_sample, torch.func.grad(loss, (0, 1))(q, key, value), strict=True):
            torch.testing.assert_close(batched[i], single)
    tangents = tuple(torch.randn_like(t) for t in (query, key, value))
    forward = torch.func.jvp(loss, (query, key, value), tangents)[1]
    grads = torch.func.grad(loss, (0, 1, 2))(query, key, value)
    torch.testing.assert_close(forward, sum((g * t).sum() for g, t in zip(grads, tangents, strict=True)))
    # Forward over reverse against reverse over reverse.
    of_query = torch.func.grad(lambda q: loss(q, key, value))
    hessian_product = torch.func.jvp(of_query, (query,), tangents[:1])[1]
    pullback = torch.func.vjp(of_query, query)[1]
    torch.testing.assert_close(hessian_product, pullback(tangents[0])[0])


def test_compiles_into_one_graph():
    case = Case("compile", (6, 5), 3, 1, 1, (True, False), heads=4, kv_heads=2, registers=2, sink="learned")
    attend, inputs = as_function(case), tuple(make_inputs(case).values())
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*inputs), attend(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad([t.sum() for t in f(*inputs)], inputs) for f in (compiled, attend)]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_registers_of_each_image_compile_beside_a_batch_of_any_size():
    torch._dynamo.reset()
    case = Case("registers", (6, 5), 3, heads=4, kv_heads=2, registers=2)
    attend, inputs = as_function(case), tuple(make_inputs(case).values())
    for tensor in inputs[:3]:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), attend(*inputs))


def test_a_changing_batch_compiles_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")
    case = Case("batch", (6, 5), 3, heads=4, kv_heads=2)
    compiled = torch.compile(as_function(case), fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 7):
        inputs = tuple(make_inputs(replace(case, batch=batch)).values())
        torch.testing.assert_close(compiled(*inputs), as_function(case)(*inputs))
    assert counter.frame_count <= 2  # once for the first batch, once for any batch


# ---- NaN and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("poisoned", ["key", "value"])
@pytest.mark.usefixtures("blocking")
def test_nan_reaches_only_queries_that_see_it(poisoned: str, bad: float):
    case = Case("nan", (7, 8), (3, 4), dilation=(2, 1), heads=4, kv_heads=2, registers=1, sink="zero")
    inputs = {name: t.detach() for name, t in make_inputs(case).items()}
    clean = run(case, {n: t.clone().requires_grad_() for n, t in inputs.items()}, "eager").out
    inputs[poisoned][0, 3, 2, 1, 5] = bad
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    out = run(case, leaves, "eager").out
    window = make_window(case.spatial, case.kernel_size, dilation=case.dilation)
    sees = window_mask(case.spatial, window).reshape(7, 8, 7, 8)[:, :, 3, 2]
    hit = torch.zeros(out.shape, dtype=torch.bool)
    hit[0, :, :, 2:] = sees[:, :, None, None]
    assert 0 < sees.sum() < sees.numel()
    assert out[hit].isnan().all()
    torch.testing.assert_close(out[~hit], clean[~hit])


def attend_without_gradients(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    inputs: dict[str, Any] = {name: t.detach() for name, t in leaves.items()}
    if case.sink == "zero":
        inputs["sink"] = 0.0
    axes = {"kernel_size": case.kernel_size, "is_causal": case.is_causal}
    return neighborhood_attention(**inputs, **axes, scale=case.scale, impl="eager")  # pyright: ignore[reportArgumentType]


DENSE = (
    Case("full", (40,), 40, heads=4, kv_heads=2, sink="zero"),
    Case("full-2d-registers-sink", (5, 9), (5, 9), heads=6, kv_heads=2, registers=3, sink="learned"),
    Case("full-3d", (3, 4, 5), (3, 4, 5), heads=2, kv_heads=2, registers=2, scale=-0.5),
    Case("past", (50,), 50, is_causal=True, heads=4, kv_heads=1),
    Case("past-registers", (50,), 50, is_causal=True, heads=4, kv_heads=1, registers=2),
    Case("past-sink", (50,), 50, is_causal=True, sink="zero"),
)


@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_all_tokens_see_is_dense_attention(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients it is torch's own operator; for causal text only if there are no registers and no sink."""
    calls: list[str] = []
    dense = eager.scaled_dot_product_attention
    monkeypatch.setattr(eager, "scaled_dot_product_attention", lambda *a, **k: calls.append("") or dense(*a, **k))
    case = replace(case, dtype=dtype)
    leaves = make_inputs(case)
    out = attend_without_gradients(case, leaves)
    assert out.dtype == dtype
    assert error(out, oracle(case, leaves).out) < FLOOR[dtype]
    assert len(calls) == (case.name not in ("past-registers", "past-sink"))
    run(case, leaves, "eager")
    assert len(calls) == (case.name not in ("past-registers", "past-sink"))  # not with gradients


def test_forward_mode_of_what_all_tokens_see() -> None:
    query = torch.randn(1, 6, 1, 4, dtype=torch.float64)

    def attend(query: Tensor) -> Tensor:
        return neighborhood_attention(query, query, query, 6)

    step = torch.randn_like(query)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(attend(forward_ad.make_dual(query, step))).tangent
    expected = (attend(query + 1e-6 * step) - attend(query - 1e-6 * step)) / 2e-6
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("poisoned", ["key", "value"])
def test_nan_of_a_causal_text_reaches_only_what_comes_after(poisoned: str) -> None:
    tensors: dict[str, Any] = {name: torch.randn(1, 50, 2, 8) for name in ("query", "key", "value")}
    clean = neighborhood_attention(**tensors, kernel_size=50, is_causal=True)
    tensors[poisoned][0, 30, 0, 3] = math.nan
    out = neighborhood_attention(**tensors, kernel_size=50, is_causal=True)
    assert out[0, 30:, 0].isnan().all()
    torch.testing.assert_close(out[0, :30], clean[0, :30])
    torch.testing.assert_close(out[:, :, 1], clean[:, :, 1])


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operator returns without it being a view's expansion."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize(
    "case",
    [
        Case("image", (64, 64), 5, heads=2, kv_heads=1, head_dim=8, value_dim=8, batch=1),
        Case("causal", (4096,), 64, is_causal=True, heads=2, kv_heads=1, head_dim=8, value_dim=8, batch=1),
        Case("full", (4096,), 4096, heads=1, kv_heads=1, head_dim=8, value_dim=8, batch=1),
        Case("full-causal", (4096,), 4096, is_causal=True, heads=1, kv_heads=1, head_dim=8, value_dim=8, batch=1),
    ],
    ids=str,
)
def test_nothing_of_size_tokens_times_tokens(case: Case):
    inputs = make_inputs(case)
    with LargestTensor() as largest:
        run(case, inputs, "eager")
        attend_without_gradients(case, inputs)
    tokens = math.prod(case.spatial)
    assert largest.elements <= max(2 * tile_attention.CHUNK_SCORES, 4 * inputs["query"].numel())
    assert largest.elements <= tokens * tokens // 8


def test_scratch_grows_linearly():
    def largest(length: int) -> int:
        case = Case("long", (length,), 128, is_causal=True, heads=1, kv_heads=1, head_dim=64, value_dim=64, batch=1)
        inputs = make_inputs(case)
        with LargestTensor() as recorded:
            run(case, inputs, "eager")
        return recorded.elements

    assert largest(32768) <= 4.1 * largest(8192)
