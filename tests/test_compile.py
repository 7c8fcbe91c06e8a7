"""The operators under torch.compile, export, opcheck, FLOP counting and function transforms.

The kernels run under Triton's interpreter where there is no GPU, as in ``test_fused.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import CASES, Case, error, make_inputs, raises_naming
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from natten_layers import AxialRoPE, HDiT, HDiTConfig, LevelConfig, NeighborhoodGQA, neighborhood_attention
from natten_layers.geometry import make_window, visible_pairs, window_mask
from natten_layers.kernels.host.problem import Inputs
from natten_layers.kernels.ops import define
from natten_layers.modules import make_axial_pos
from natten_layers.operations import Impl

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []

EVERYTHING = Case("all", (4, 5), 3, 1, 1, (True, False), heads=4, kv_heads=2, registers=3, sink="learned")
IMPLS: tuple[Impl, ...] = ("fused", "eager")
PLAIN = Case("plain", (9,), 3, heads=2, kv_heads=1)
RING = Case("ring", (7, 8), (3, 4), heads=4, is_periodic=(False, True))
FINER = Case("finer", (8,), 3, heads=4, key_spatial=(5,))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def attend(case: Case, *, return_lse: bool = True, impl: Impl = "fused") -> Callable[..., tuple[Tensor, ...]]:
    """The operation as a function of the case's inputs, in their order."""

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        sink: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"is_causal": case.is_causal, "is_periodic": case.is_periodic, "impl": impl}
        options |= {"additional_keys": additional_keys, "additional_values": additional_values, "sink": sink}
        results = neighborhood_attention(query, key, value, case.kernel_size, return_lse=return_lse, **options)
        return results if isinstance(results, tuple) else (results,)

    return call


def with_grads(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = function(*inputs)
    return *outputs, *torch.autograd.grad([t.square().sum() for t in outputs], inputs)


def operator_arguments(case: Case) -> tuple[object, ...]:
    """Arguments of ``natten_layers::forward`` up to the last one."""
    inputs = make_inputs(case, DEVICE)
    causal, periodic = list(case.window.is_causal), list(case.window.is_periodic)
    ones = [1] * len(case.spatial)
    tensors = tuple(inputs.get(name) for name in Inputs._fields)
    return *tensors, None, list(case.window.kernel_size), ones, ones, causal, 0.25, periodic


@pytest.mark.parametrize("case", [EVERYTHING, Case("1d", (9,), 4, is_causal=True), RING, FINER], ids=str)
def test_operators_keep_torchs_contract(case: Case) -> None:
    """Schemas, fakes (shapes, strides, dtypes), autograd registration and tracing with dynamic shapes."""
    arguments = operator_arguments(case)
    for with_stats in (True, False):
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(torch.ops.natten_layers.forward.default, (*detached, with_stats))
    with raises_naming("neighborhood_attention", error=NotImplementedError):
        torch.ops.natten_layers.forward(*arguments, True)[0].sum().backward()
    out, row_max, row_sum = torch.ops.natten_layers.forward(*detached, True)
    for grad_lse in (None, torch.randn_like(row_max)):
        state = (out, row_max, row_sum, torch.randn_like(out), grad_lse)
        torch.library.opcheck(torch.ops.natten_layers.backward.default, (*detached, *state))


def test_fakes_have_the_strides_of_results_for_views() -> None:
    """Heads of one projection are not contiguous; outputs and gradients are."""
    q, k, v = torch.randn(2, 6, 6, 8, 16, device=DEVICE).split((4, 2, 2), -2)
    leading = *Inputs(q, k, v), None  # no sink
    window = [3, 3], [1, 1], [1, 1], [False, False], 0.25, []
    torch.library.opcheck(torch.ops.natten_layers.forward.default, (*leading, *window, True))
    state = torch.ops.natten_layers.forward(*leading, *window, True)
    arguments = (*leading, *window, *state, torch.randn_like(state[0]), None)
    torch.library.opcheck(torch.ops.natten_layers.backward.default, arguments)


@pytest.mark.parametrize(
    ("case", "backend"),
    [(EVERYTHING, "aot_eager"), (EVERYTHING, "inductor"), (RING, "aot_eager"), (FINER, "aot_eager")],
    ids=str,
)
def test_compiles_into_one_graph(case: Case, backend: str) -> None:
    inputs = tuple(make_inputs(case, DEVICE).values())
    compiled = torch.compile(attend(case), fullgraph=True, backend=backend)
    expected = with_grads(attend(case), inputs)
    for actual, wanted in zip(with_grads(compiled, inputs), expected, strict=True):
        assert error(actual, wanted) < 2e-6


def test_a_changing_batch_compiles_at_most_twice() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend(PLAIN), fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        inputs = tuple(make_inputs(replace(PLAIN, batch=batch), DEVICE).values())
        for actual, wanted in zip(with_grads(compiled, inputs), with_grads(attend(PLAIN), inputs), strict=True):
            assert torch.equal(actual, wanted)
    assert counter.frame_count <= 2  # once for the first batch, once for any batch


def make_layer() -> nn.Module:
    torch.manual_seed(0)
    return NeighborhoodGQA(32, 4, 3, num_kv_heads=2, num_registers=2, sink="learned", qk_norm="cosine").to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layer_compiles_on_a_gpu(dtype: torch.dtype) -> None:
    layer = make_layer().to(dtype)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    wide = make_layer().double()
    for batch in (2, 3, 5):
        x = torch.randn(batch, 8, 9, 32, device=DEVICE, dtype=dtype, requires_grad=True)
        results = []
        for function, tokens in ((wide, x.detach().double().requires_grad_()), (layer, x), (compiled, x)):
            out = function(tokens)
            results.append((out, torch.autograd.grad(out.square().sum(), tokens)[0]))
        for wanted, plain, actual in zip(*results, strict=True):
            assert error(actual, wanted) < max(2 * error(plain, wanted), 1e-5)
    assert counter.frame_count <= 2


def test_exports() -> None:
    """The layer can be exported for inference with any batch size; on a GPU the program holds the fused operator."""
    layer = make_layer().eval().requires_grad_(False)
    x = torch.randn(2, 6, 7, 32, device=DEVICE)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    assert ("natten_layers.attention_with_qk_prep" in str(program.graph)) == ON_GPU
    for batch in (2, 4):
        x = torch.randn(batch, 6, 7, 32, device=DEVICE)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("case", [PLAIN, RING, FINER], ids=str)
def test_exports_the_fused_operator(case: Case) -> None:
    class Attend(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(case, return_lse=False)(query, key, value)[0]

    def draw(batch: int) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in make_inputs(replace(case, batch=batch), DEVICE).values())

    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Attend(), draw(2), dynamic_shapes=dict.fromkeys(("query", "key", "value"), batch))
    assert "natten_layers.forward" in str(program.graph)
    assert torch.equal(program.module()(*draw(3)), Attend()(*draw(3)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_visible_pairs_counts_the_mask(case: Case) -> None:
    mask = window_mask(case.spatial, case.window, key_spatial=case.key_spatial)
    assert visible_pairs(case.spatial, case.window) == mask.sum()


def test_flop_are_counted_by_visible_pairs() -> None:
    case = replace(EVERYTHING, value_dim=24)
    inputs = tuple(make_inputs(case, DEVICE).values())
    with FlopCounterMode(display=False) as counter:
        with_grads(attend(case), inputs)
    counts = counter.get_flop_counts()["Global"]
    window = make_window(case.spatial, 3, 1, 1, case.is_causal)
    pairs = int(window_mask(case.spatial, window).sum()) + 20 * case.registers
    forward = 2 * pairs * case.batch * case.heads * (16 + 24)
    assert counts[torch.ops.natten_layers.forward] == forward
    assert counts[torch.ops.natten_layers.backward] == 2.5 * forward


def test_flop_are_counted_without_running() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q = torch.empty(1, 1000, 2, 64, device=DEVICE)
        neighborhood_attention(q, q, q, 100, is_causal=True, impl="fused")
    assert counter.get_total_flops() == 2 * (100 * 101 // 2 + 900 * 100) * 2 * (64 + 64)


class Subclass(Tensor):
    """A tensor with torch-dispatch hooks, such as a sharded tensor."""


@pytest.mark.parametrize(
    ("within", "seen"),
    [
        (nullcontext(), False),
        (torch.inference_mode(), False),
        (FlopCounterMode(display=False), True),
        (forward_ad.dual_level(), False),  # an `autograd.Function` has rules for duals of its own
    ],
    ids=["none", "inference", "mode", "duals"],
)
def test_operators_go_through_the_dispatcher_only_where_it_sees_something(
    within: AbstractContextManager[object], seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatcher costs more host time than a launch, so it is skipped where that has no effect."""
    tensors = [t.detach() for t in make_inputs(PLAIN, DEVICE).values()]
    expected = attend(PLAIN, return_lse=False)(*tensors)[0]
    direct: list[str] = []
    for name, operator in define._operators.items():

        def watched(*args: object, name: str = name, kernel: Callable[..., object] = operator.kernel) -> object:
            direct.append(name)
            return kernel(*args)

        monkeypatch.setitem(define._operators, name, operator._replace(kernel=watched))
    with within:
        assert torch.equal(attend(PLAIN, return_lse=False)(*tensors)[0], expected)
        assert direct == ([] if seen else ["forward"])
        direct.clear()
        with_subclass = (tensors[0].as_subclass(Subclass), *tensors[1:])
        out = attend(PLAIN, return_lse=False)(*with_subclass)[0]
        assert direct == []
        assert torch.equal(out.as_subclass(Tensor), expected)


def largest_difference(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    return max(error(x, y) for x, y in zip(a, b, strict=True))


def per_sample(impl: Impl, sample: tuple[Tensor, ...], queries: Tensor) -> tuple[Tensor, ...]:
    function = attend(EVERYTHING, impl=impl)
    return torch.func.vmap(lambda q: function(q, *sample[1:]))(queries)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # one backward call a sample
def test_vmap_folds_samples_into_the_batch() -> None:
    sample = tuple(t.detach() for t in make_inputs(EVERYTHING, DEVICE).values())
    queries = torch.stack([sample[0], -2 * sample[0], sample[0] + 1]).requires_grad_()
    results = []
    for impl in IMPLS:
        with torch.no_grad():
            outputs = per_sample(impl, sample, queries)
        differentiable = per_sample(impl, sample, queries)
        grads = torch.autograd.grad([t.square().sum() for t in differentiable], queries)
        results.append((*outputs, *differentiable, *grads))
    assert largest_difference(*results) < 3e-6


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # one backward call a sample
def test_gradients_of_every_sample() -> None:
    sample = tuple(t.detach() for t in make_inputs(EVERYTHING, DEVICE).values())
    queries = torch.stack([sample[0], -2 * sample[0]])
    results = []
    for impl in IMPLS:
        function = attend(EVERYTHING, impl=impl)

        def loss(q: Tensor, k: Tensor, sink: Tensor, function: Callable[..., tuple[Tensor, ...]] = function) -> Tensor:
            out, lse = function(q, k, *sample[2:5], sink)
            return out.square().sum() + lse.sum()

        results.append(
            torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, None, None))(queries, sample[1], sample[5])
        )
    assert largest_difference(*results) < 3e-6


def test_second_derivatives_of_torch_func_say_that_they_are_missing() -> None:
    query, *rest = (t.detach() for t in make_inputs(PLAIN, DEVICE).values())

    def slope(q: Tensor) -> Tensor:
        return torch.func.grad(lambda x: attend(PLAIN, return_lse=False)(x, *rest)[0].square().sum())(q).square().sum()

    with raises_naming("second derivatives", 'impl="eager"', error=NotImplementedError):
        torch.func.grad(slope)(query)


@pytest.mark.parametrize("lengths", [[(9,), (12,), (14,)], [(5, 6), (7, 6), (8, 9)]], ids=["1d", "2d"])
def test_other_lengths_compile_into_one_graph_too(lengths: list[tuple[int, ...]]) -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return neighborhood_attention(q, k, k, 3, impl="eager")

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for spatial in lengths:
        q, k = (torch.randn(1, *spatial, heads, 8, requires_grad=True) for heads in (2, 1))
        results = [torch.autograd.grad(f(q, k).square().sum(), (q, k)) for f in (compiled, attend)]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_calls_give_every_expanded_head_its_own_gradient(impl: Impl) -> None:
    """The expanded tensor may be a leaf, a view, under a function transform, or passed twice."""
    q, k = torch.randn(1, 7, 2, 8, device=DEVICE), torch.randn(1, 7, 1, 8, device=DEVICE)

    def loss(kv: Tensor) -> Tensor:
        return neighborhood_attention(q, kv, kv, 3, impl=impl).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    whole = k.repeat(1, 1, 2, 1).requires_grad_()
    (expected,) = torch.autograd.grad(loss(whole), whole)
    leaf = k.expand(-1, -1, 2, -1).detach().requires_grad_()
    for asked in (leaf, leaf.view_as(leaf)):
        assert asked.stride(-2) == 0
        torch.testing.assert_close(torch.autograd.grad(compiled(asked), asked), (expected,))
    transformed = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(transformed(leaf.detach()), expected)


SIZES = ((3, 4), (4, 5), (5, 3))


def test_sizes_of_images_are_symbols() -> None:
    """One graph for the first image size and one for all others suffice, with gradients and with any window."""
    rope = AxialRoPE(8, 2, num_kv_heads=1).to(DEVICE)

    def call(q: Tensor, kv: Tensor) -> Tensor:
        query, key = rope(q, kv)
        local = neighborhood_attention(query, key, kv, 3, impl="fused")
        return local + neighborhood_attention(q, kv, kv, tuple(q.shape[1:3]), impl="fused")

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for size in SIZES:
        inputs = [torch.randn(1, *size, heads, 8, device=DEVICE, requires_grad=True) for heads in (2, 1)]
        for actual, wanted in zip(
            *(with_grads(lambda *x, f=f: (f(*x),), tuple(inputs)) for f in (compiled, call)), strict=True
        ):
            assert error(actual, wanted) < 2e-6
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("kernel_size", "dynamic"), [(3, None), (None, True)])
def test_a_layer_with_positions_compiles_at_every_size(kernel_size: int | None, dynamic: bool | None) -> None:
    rope = AxialRoPE(8, 4, num_kv_heads=2)
    layer = NeighborhoodGQA(32, 4, kernel_size, num_kv_heads=2, rope=rope).requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
    for size in SIZES[:2]:
        x = torch.randn(1, *size, 32)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.skipif(ON_GPU, reason="compiled models of any size are tested on a CPU")
def test_batches_of_an_hdit_are_symbols() -> None:
    model = HDiT(HDiTConfig(levels=[LevelConfig(1, 32, "global", d_head=16)] * 2)).requires_grad_(False)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for batch in (2, 3, 5):
        assert compiled(torch.randn(batch, 3, 32, 32), torch.ones(batch)).shape[0] == batch
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_lengths_as_symbols(strict: bool) -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor) -> tuple[Tensor, ...]:
            whole = (q.shape[1],)
            fused = [neighborhood_attention(q, q, q, k, is_causal=True, impl="fused") for k in (3, whole)]
            # On a CPU alone, windows of the whole axis take PyTorch's attention, which knows symbols.
            return *fused, *([] if ON_GPU else [neighborhood_attention(q, q, q, whole, impl="eager")])

    def draw(length: int) -> Tensor:
        return torch.randn(2, length, 2, 8, device=DEVICE)

    shapes = {"q": {1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Attend(), (draw(9),), dynamic_shapes=shapes, strict=strict).module()
    for length in (9, 14):
        q = draw(length)
        torch.testing.assert_close(program(q), Attend()(q))


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (7, 64), (128, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_positions_are_those_of_linspace(size: tuple[int, int], dtype: torch.dtype) -> None:
    compiled = torch.compile(make_axial_pos, fullgraph=True, backend="eager")
    expected = make_axial_pos(*size, dtype=torch.float64)
    found = compiled(*size, dtype=dtype)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.skipif(ON_GPU, reason="the eager path has symbols on a CPU alone")
def test_exported_images_may_be_wide_or_high() -> None:
    """The aspect ratio is a symbol too."""
    layer = NeighborhoodGQA(16, 2, None, rope=AxialRoPE(8, 2)).requires_grad_(False)
    shapes = {"x": {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(layer, (torch.randn(1, 4, 6, 16),), dynamic_shapes=shapes).module()
    for size in ((4, 6), (7, 5)):
        x = torch.randn(1, *size, 16)
        torch.testing.assert_close(program(x), layer(x))
