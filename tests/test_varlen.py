"""Samples of different shapes in one tensor: by hand, against each sample alone, and in the forms that users have."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FLOOR, Case, arguments, error, make_inputs, oracle, raises_naming, run
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

from natten_layers import (
    AxialRoPE,
    DecoderLM,
    DecoderLMConfig,
    HDiT,
    HDiTConfig,
    LevelConfig,
    NeighborhoodAttention1D,
    NeighborhoodGQA,
    RoPE,
    make_axial_pos,
    neighborhood_attention,
    neighborhood_attention_varlen,
)
from natten_layers.geometry import fitted, make_window, query_bounds, window_bounds
from natten_layers.modules.hdit_layers import ShiftedWindowGQA
from natten_layers.operations import Impl

pytest.importorskip("triton")

from natten_layers.kernels.host import packing as packing_module
from natten_layers.kernels.host.packing import FIELDS, line_tables, packing_of, sample_tables, tile_count

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
IMPLS = ("eager", "fused")

CASES = (
    Case("1d-causal", (), 6, is_causal=True, heads=4, shapes=((5,), (17,), (3,))),
    Case("1d-all", (), 4, 2, 2, heads=4, registers=3, sink="learned", seen=0.7, shapes=((5,), (0,), (11,), (1,), (5,))),
    Case("1d-one-shape", (), 5, heads=4, registers=2, shapes=((8,), (8,), (8,))),
    Case("2d", (), 5, shapes=((4, 9), (7, 3))),
    Case(
        "2d-all", (), (3, 4), (2, 1), (1, 2), (False, True), 4, 2, 24, 8, 2, "learned", 0.3, seen=0.8,
        is_periodic=(True, False), shapes=((5, 4), (5, 7), (0, 3), (2, 1), (5, 4)),
    ),
    Case("3d", (), 2, head_dim=8, value_dim=8, sink="zero", dtype=torch.float16, shapes=((2, 3, 4), (4, 3, 3))),
)  # fmt: skip
SHAPES = (
    Case("documents", (), 128, is_causal=True, heads=8, kv_heads=2, head_dim=64, value_dim=64, dtype=torch.bfloat16,
         shapes=((700,), (3,), (1200,), (129,))),
    Case("images", (), 7, heads=4, kv_heads=2, head_dim=64, value_dim=64, registers=4, sink="learned",
          dtype=torch.bfloat16, shapes=((32, 32), (24, 40), (5, 50))),
    Case("globes", (), 7, heads=4, kv_heads=2, head_dim=64, value_dim=64, is_periodic=(False, True),
          dtype=torch.bfloat16, shapes=((32, 32), (24, 40), (5, 50))),
    Case("videos", (), (3, 5, 5), head_dim=80, value_dim=80, dtype=torch.float16, shapes=((4, 16, 16), (9, 8, 12))),
)  # fmt: skip


def check(case: Case, impl: Impl) -> None:
    inputs = make_inputs(case, DEVICE)
    expected = oracle(case, inputs).tensors()
    peer = run(case, inputs, "eager").tensors()
    for name, tensor in run(case, inputs, impl).tensors().items():
        limit = FLOOR[case.dtype if name.startswith("grad") else tensor.dtype]
        found = error(tensor, expected[name])
        assert found <= max(2 * limit, 2 * error(peer[name], expected[name]) if impl == "fused" else 0), (name, found)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_sample_is_computed_as_if_it_were_alone(case: Case, impl: Impl) -> None:
    check(case, impl)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_real_shapes(case: Case) -> None:
    check(case, "fused")


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl: Impl) -> None:
    """Texts of 2, 5 and 1 tokens, windows of 3: equal scores make means of the visible values."""
    zero = torch.zeros(8, 1, 8, device=DEVICE)
    value = torch.tensor([1.0, 2.0, 10.0, 20.0, 30.0, 40.0, 50.0, 7.0], device=DEVICE)[:, None, None].expand(-1, 1, 8)
    cu_seqlens = torch.tensor([0, 2, 7, 8], dtype=torch.int32, device=DEVICE)
    out = neighborhood_attention_varlen(zero, zero, value, None, 3, cu_seqlens=cu_seqlens, impl=impl)
    assert out[:, 0, 0].tolist() == pytest.approx([1.5, 1.5, 20.0, 20.0, 30.0, 40.0, 40.0, 7.0])
    out = neighborhood_attention_varlen(zero, zero, value, [(2,), (5,), (1,)], 3, is_causal=True, impl=impl)
    assert out[:, 0, 0].tolist() == pytest.approx([1.0, 1.5, 10.0, 15.0, 20.0, 30.0, 40.0, 7.0])


def test_gradients_are_those_of_finite_differences() -> None:
    shapes = ((2, 3), (1, 2))
    case = Case("fp64", (), (2, 2), heads=2, kv_heads=1, head_dim=2, value_dim=2, dtype=torch.float64, shapes=shapes)

    for is_periodic in (False, (False, True)):

        def function(q: Tensor, k: Tensor, v: Tensor, is_periodic: Any = is_periodic) -> tuple[Tensor, Tensor]:
            return neighborhood_attention_varlen(
                q, k, v, shapes, (2, 2), is_periodic=is_periodic, return_lse=True, impl="eager"
            )

        assert gradcheck(function, tuple(make_inputs(case, DEVICE).values()), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_jagged_tensors(impl: Impl) -> None:
    lengths = [3, 0, 6]
    parts = [torch.randn(n, 3, 2, 8, device=DEVICE) for n in lengths]
    flat = torch.cat(parts).requires_grad_()
    offsets = torch.tensor([0, 3, 3, 9], device=DEVICE)
    query, key, value = (torch.nested.nested_tensor_from_jagged(x, offsets) for x in flat.unbind(1))
    out, lse = neighborhood_attention_varlen(query, key, value, None, 3, is_causal=True, return_lse=True, impl=impl)
    assert out.is_nested
    assert out.shape[2:] == (*lse.shape[2:], 8)
    (grad,) = torch.autograd.grad(out.values().sum() + lse.values().sum(), flat)
    shapes = torch.tensor(lengths)[:, None]
    query, key, value = flat.unbind(1)
    expected = neighborhood_attention_varlen(query, key, value, shapes, 3, is_causal=True, return_lse=True, impl=impl)
    (wanted,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), flat)
    assert torch.equal(out.values(), expected[0])
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_and_no_samples(impl: Impl) -> None:
    for shapes in ([], [(0, 4), (3, 0)]):
        q = torch.zeros(0, 2, 8, device=DEVICE, requires_grad=True)
        keys = torch.zeros(1, 2, 2, 8, device=DEVICE, requires_grad=True)
        out = neighborhood_attention_varlen(
            q, q, q, shapes, (3, 3), additional_keys=keys, additional_values=keys, impl=impl
        )
        assert out.shape == (0, 2, 8)
        grads = torch.autograd.grad(out.sum(), (q, keys))
        assert [grad.shape for grad in grads] == [q.shape, keys.shape]
        assert not grads[1].any()
    rings = {"is_periodic": (False, True), "impl": impl}  # any option for each axis says how many there are
    assert neighborhood_attention_varlen(q, q, q, [], 3, **rings).shape == (0, 2, 8)
    layer = NeighborhoodGQA(8, 2, 3, is_periodic=(False, True))
    assert layer(torch.zeros(0, 8), shapes=[]).shape == (0, 8)


def test_shared_registers_get_the_sum_of_their_gradients() -> None:
    q = torch.randn(9, 2, 8, device=DEVICE)
    grads = []
    for impl in IMPLS:
        keys = torch.ones(1, 2, 2, 8, device=DEVICE, requires_grad=True)
        out = neighborhood_attention_varlen(
            q, q, q, [(4,), (5,)], 3, additional_keys=keys, additional_values=keys, impl=impl
        )
        grads += torch.autograd.grad(out.square().sum(), keys)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.filterwarnings("ignore:(All-NaN slice|invalid value):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_sample(impl: Impl) -> None:
    case = Case("nan", (), 3, heads=2, kv_heads=1, registers=2, shapes=((5,), (7,), (4,)))
    inputs = make_inputs(case, DEVICE)
    clean = run(case, inputs, impl).tensors()
    for name in inputs:
        dirty = {n: t.detach().clone() for n, t in inputs.items()}
        dirty[name][1 if name.startswith("additional") else slice(5, 12)] = math.nan
        found = run(case, {n: t.requires_grad_() for n, t in dirty.items()}, impl).tensors()
        assert any(tensor.isnan().any() for tensor in found.values())
        for result, tensor in found.items():
            others = [0, 2] if len(tensor) == 3 else [*range(5), *range(12, 16)]
            assert error(tensor[others], clean[result][others]) < 2e-6, (name, result)


def test_equal_shapes_are_a_batch_bit_for_bit() -> None:
    """The kernels of packed samples are those of images, so results do not differ either where tiles are the same."""
    case = Case("images", (8, 8), 5, sink="learned")
    inputs = make_inputs(case, DEVICE)
    packed = {n: t.detach().flatten(0, 2).requires_grad_() if n != "sink" else t for n, t in inputs.items()}
    found = run(replace(case, shapes=((8, 8), (8, 8))), packed, "fused")
    out = neighborhood_attention(**arguments(case, inputs), impl="fused")
    assert torch.equal(found.out.view_as(out), out)


def test_a_compiled_call_takes_other_shapes() -> None:
    """One graph for all shapes: they are data."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, shapes: neighborhood_attention_varlen(q, q, q, shapes, (3,), impl="fused").square().sum(),
        backend="aot_eager",
        fullgraph=True,
    )
    q = torch.randn(8, 2, 8, device=DEVICE, requires_grad=True)
    for lengths in ([3, 5], [1, 7]):
        shapes = torch.tensor(lengths)[:, None]
        (grad,) = torch.autograd.grad(compiled(q, shapes), q)
        out = neighborhood_attention_varlen(q, q, q, shapes, (3,), impl="eager")
        (expected,) = torch.autograd.grad(out.square().sum(), q)
        torch.testing.assert_close(grad, expected)
    with raises_naming("shapes or cu_seqlens add up to 9", "8"):  # the operator does not know which were given
        compiled(q, torch.tensor([[4], [5]]))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo reads it, and hides the warning from users only
def test_a_compiled_call_breaks_its_graph_where_pytorch_computes_it() -> None:
    """Once, and the graphs around serve any number of samples: the computation itself is never traced."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        q = (x @ weight).unflatten(-1, (2, 8))
        return neighborhood_attention_varlen(q, q, q, None, (3,), cu_seqlens=ends, impl="eager").square().sum()

    compiled = torch.compile(attend, backend=counter)
    weight = torch.randn(16, 16, device=DEVICE, requires_grad=True)
    graphs = []
    for lengths in ([3, 5], [1, 7, 2], [2, 2, 0, 2, 2], [5] * 7):
        x, ends = torch.randn(sum(lengths), 16, device=DEVICE), torch.tensor([0, *lengths]).cumsum(0)
        (grad,) = torch.autograd.grad(compiled(x, weight, ends), weight)
        (expected,) = torch.autograd.grad(attend(x, weight, ends), weight)
        torch.testing.assert_close(grad, expected)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1], graphs  # the second call makes sizes symbols
    with raises_naming("PyTorch computes a packed batch shape by shape", error=Unsupported):
        torch.compile(attend, backend="eager", fullgraph=True)(x, weight, ends)


def test_packed_samples_without_a_graph_for_export_say_so() -> None:
    shapes = torch.tensor([[3, 4], [5, 2]])
    layer = NeighborhoodGQA(16, 2, 3)
    with raises_naming("shapes", "torch.export has no graph", "without shapes"):
        torch.export.export(layer, (torch.zeros(22, 16),), {"shapes": shapes})
    level = LevelConfig(1, 16, d_head=8, kernel_size=3)
    model = HDiT(HDiTConfig((level, level), patch_size=(1, 1), mapping_width=16, mapping_depth=1))
    with raises_naming("shapes", "torch.export has no graph", "x [B, C, H, W]"):
        torch.export.export(model, (torch.zeros(22, 3), torch.ones(2)), {"shapes": shapes})


def test_tables_of_samples() -> None:
    window = make_window((100, 100), (3, 2), (2, 1), (2, 1))
    packing = packing_of(torch.tensor([[3, 5], [0, 2], [1, 4]]), 19, window)
    tables = sample_tables(packing, window, (1, 2, 2), torch.device("cpu"))
    assert tables.samples.shape == (3, FIELDS)
    # Index, first tile and token; lengths, kernel sizes, strides, dilations and tiles of three axes.
    assert tables.samples.tolist() == [
        [0, 0, 0, 1, 3, 5, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 2, 3],
        [1, 6, 15, 1, 0, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 0, 1],
        [2, 6, 15, 1, 1, 4, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2],
    ]
    assert torch.equal(tables.tiles, tables.samples[[0] * 6 + [2] * 2])


def test_windows_are_fitted_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch may have hundreds of images, and the host has less time for them than a kernel takes."""
    fits: list[tuple[int, ...]] = []
    monkeypatch.setattr(packing_module, "fitted", lambda shape, window: fits.append(shape) or fitted(shape, window))
    window, tile = make_window((100, 100), (9, 8)), (1, 4, 8)
    for shapes in ([[11, 12]] * 50 + [[3, 4]], [[3, 4]] * 50 + [[11, 12]]):
        packing = packing_of(torch.tensor(shapes), sum(map(math.prod, shapes)), window)
        tables = sample_tables(packing, window, tile, torch.device("cpu"))
        assert len(tables.tiles) == tile_count(packing, window, tile)
    assert fits == [(11, 12), (3, 4)]


def test_tables_of_a_line() -> None:
    """By hand: windows of texts of 5, 0, 1 and 6 tokens, and which queries see a key."""
    windows = make_window((100,), 3, 1, 1, True), make_window((100,), 4, 2)
    packing = packing_of(torch.tensor([[5], [0], [1], [6]]), 12, windows[0])
    causal, centred = (line_tables(packing, window, torch.device("cpu")) for window in windows)
    assert causal.windows.tolist() == [[0, 0, 0, 1, 2, 5, 6, 6, 6, 7, 8, 9], list(range(12))]
    assert causal.queries.tolist() == [list(range(12)), [2, 3, 4, 4, 4, 5, 8, 9, 10, 11, 11, 11]]
    assert centred.windows.tolist() == [[0, 0, 1, 1, 1, 5, 6, 6, 7, 7, 8, 8], [3, 3, 4, 4, 4, 5, 9, 9, 10, 10, 11, 11]]
    assert centred.queries.tolist() == [[0, 0, 0, 0, 2, 5, 6, 6, 6, 6, 8, 10], [1, 4, 4, 4, 4, 5, 7, 9, 11, 11, 11, 11]]


@pytest.mark.parametrize("causal", [False, True])
def test_tables_of_a_line_are_windows_of_each_sample(causal: bool) -> None:
    lengths = [3, 40, 0, 1, 2, 13, 12, 11]
    for kernel, stride in ((1, 1), (12, 1), (12, 12), (7, 3), (100, 30)):
        window = make_window((1000,), kernel, stride, 1, causal)
        packing = packing_of(torch.tensor(lengths)[:, None], sum(lengths), window)
        tables = line_tables(packing, window, torch.device("cpu"))
        first = 0
        for length in filter(None, lengths):
            own, index = fitted((length,), window), torch.arange(length)
            axis = length, own.kernel_size[0], own.stride[0], causal
            for table, bounds in zip(tables, (window_bounds, query_bounds), strict=True):
                assert torch.equal(table[:, first : first + length] - first, torch.stack(bounds(index, *axis)))
            first += length


def test_bad_input() -> None:
    q = torch.zeros(8, 2, 8, device=DEVICE)

    def attend(shapes: Any, kernel_size: Any = 3, query: Tensor = q, **options: Any) -> Tensor:
        return neighborhood_attention_varlen(query, query, query, shapes, kernel_size, **options)

    for impl in IMPLS:
        with raises_naming("shapes add up to 9", "8"):
            attend([(4,), (5,)], impl=impl)
    with raises_naming("shapes must not be negative, got (-1,) for sample 1"):
        attend([(9,), (-1,)])
    with raises_naming("shapes must have equally many axes", "sample 2 is (2, 2)", "sample 1 (3,)"):
        attend([(1,), (3,), (2, 2)])
    for shapes in (5, "35", iter([(4,), (4,)]), {(8,): 0}):
        with raises_naming("shapes", "a list with a tuple for each sample", f"of type {type(shapes).__name__}"):
            attend(shapes)
    with raises_naming("shapes", "a list with a tuple for each sample", "got ndarray (2, 1) of dtype int64"):
        attend(np.array([[4], [4]]))
    for shapes, wrong in (
        ([(4,), "8"], "sample 1 is '8' of type str"),
        ([(4,), 4], "sample 1 is 4 of type int"),
        ([(1,), (True,)], "sample 1, (True,), has True of type bool"),
        ([(10**30,)], "sample 0, (1" + "0" * 30),
        ([(4,), (4.0,)], "has 4.0 of type float"),
    ):
        with raises_naming("shapes must", "lengths of", "axes", wrong):
            attend(shapes)
    assert torch.equal(attend([(np.int64(8),)]), attend([(8,)]))
    for ends in ([0, 4, 9], [0]):
        for impl in IMPLS:
            with pytest.raises(ValueError, match=f"^cu_seqlens ends with {ends[-1]}, but query has 8 tokens$"):
                attend(None, cu_seqlens=torch.tensor(ends), impl=impl)
    with raises_naming("kernel_size has 2 entries (3, 3), but there is 1 spatial axis"):
        attend([(8,)], (3, 3))
    with raises_naming("shapes", "integer tensor", "float32"):
        attend(torch.ones(1, 1))
    with raises_naming("cu_seqlens", "begin with 0", "[1, 8]"):
        attend(None, cu_seqlens=torch.tensor([1, 8]))
    with raises_naming("shapes must be", "(3,)", "given as cu_seqlens"):
        attend(torch.tensor([0, 4, 8]))
    with raises_naming("either shapes or"):
        attend(None)
    with raises_naming("query", "(1, 8, 2, 8)", "[N, heads, head_dim]"):
        attend([(8,)], query=q[None])
    with raises_naming("additional_keys", "[2 or 1, R, 2, 8]"):
        registers = torch.zeros(3, 1, 2, 8, device=DEVICE)
        attend([(4,), (4,)], additional_keys=registers, additional_values=registers)
    with raises_naming("key_mask", "(7,)", "[8]"):
        attend([(8,)], key_mask=torch.ones(7, dtype=torch.bool, device=DEVICE))
    with raises_naming("key", "nested"):
        nested = torch.nested.as_nested_tensor([q], layout=torch.jagged)
        neighborhood_attention_varlen(nested, q, q, None, 3)
    for shapes in (None, [(8,)]):
        with raises_naming("query must be a nested tensor"):
            neighborhood_attention_varlen(q, nested, nested, shapes, 3)
    with raises_naming("shapes", "ndarray", "torch.as_tensor(shapes)"):
        attend(torch.tensor([[8]]).numpy())
    with raises_naming("cu_seqlens", "[0, 8] of type list", "torch.as_tensor(cu_seqlens)"):
        attend(None, cu_seqlens=[0, 8])
    with raises_naming("got neither"):
        attend(None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_registers": 2, "sink": "learned", "qk_norm": "cosine"},
        {"rope": True, "qk_norm": "rms", "qkv_bias": False},
        {"is_causal": True, "kernel_size": None},
        {"is_periodic": (False, True), "stride": (1, 2)},
    ],
    ids=str,
)
def test_a_layer_takes_packed_images(options: dict[str, Any]) -> None:
    """As it takes each image alone, gradients of parameters included."""
    torch.manual_seed(0)
    shapes = [(3, 4), (5, 3), (0, 2)]
    with_rope = options.get("rope", False)
    options = {"kernel_size": 3, **options, "rope": AxialRoPE(8, 4, num_kv_heads=2) if with_rope else None}
    layer = NeighborhoodGQA(32, 4, num_kv_heads=2, **options).to(DEVICE)
    parts = [torch.randn(math.prod(shape), 32, device=DEVICE) for shape in shapes]
    places = [make_axial_pos(*shape).reshape(-1, 2).to(DEVICE) for shape in shapes[:2]]
    packed = layer(torch.cat(parts), shapes=shapes, positions=torch.cat(places) if with_rope else None)
    alone = torch.cat(
        [
            layer(
                part.view(1, *shape, 32), positions=place.view(*shape, 2) if with_rope else None
            ).flatten(0, 2)
            for part, shape, place in zip(parts, shapes, places, strict=False)
        ]
    )  # fmt: skip
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    found, expected = (torch.autograd.grad(out.square().sum(), parameters) for out in (packed, alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_takes_packed_texts_by_their_cumulative_lengths() -> None:
    torch.manual_seed(0)
    lengths, ends = (5, 0, 9), torch.tensor([0, 5, 5, 14], device=DEVICE)
    layer = NeighborhoodGQA(32, 4, num_kv_heads=2, kernel_size=6, is_causal=True, rope=RoPE(8)).to(DEVICE)
    x = torch.randn(14, 32, device=DEVICE)
    places = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    packed = layer(x, cu_seqlens=ends, positions=places)
    alone = torch.cat([layer(text[None])[0] for text in x.split([5, 9])])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(packed, layer(x, shapes=[(n,) for n in lengths], positions=places))
    assert error(layer(x, cu_seqlens=ends, positions=torch.arange(14, device=DEVICE).flip(0)), alone) > 1e-2
    own = NeighborhoodAttention1D(32, 4, 3).to(DEVICE)
    assert torch.equal(own(x, cu_seqlens=ends), own(x, shapes=[(5,), (0,), (9,)]))


@pytest.mark.parametrize(
    ("scaling", "refused", "taken"),
    [
        ({"rope_type": "dynamic"}, (9, 12), (12, 0, 12)),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}, (5, 24), (9, 24)),
    ],
    ids=["dynamic", "longrope"],
)
def test_a_layer_refuses_packed_texts_of_different_frequencies(
    scaling: dict[str, Any], refused: tuple[int, ...], taken: tuple[int, ...]
) -> None:
    rope = RoPE(8, scaling=scaling | {"factor": 2.0, "original_max_position_embeddings": 8})
    layer = NeighborhoodGQA(16, 2, 16, is_causal=True, rope=rope).double()

    def attend(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        x = torch.randn(sum(lengths), 16, dtype=torch.float64)
        positions = torch.cat([torch.arange(n) for n in (*lengths, 0)])
        return x, layer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), positions=positions)

    with pytest.raises(ValueError, match=f"packed texts of {refused[0]} and {refused[1]} tokens .*; pack them apart"):
        attend(refused)
    for lengths in (taken, (3, 8), (0,), ()):
        x, out = attend(lengths)
        for text, found in zip(x.split(lengths), out.split(lengths), strict=True):
            if len(text):
                torch.testing.assert_close(found, layer(text[None])[0])


def test_layers_refuse_what_packed_samples_do_not_have() -> None:
    x = torch.zeros(6, 8)
    with raises_naming("either shapes or"):
        NeighborhoodGQA(8, 2, 3)(x, shapes=[(6,)], cu_seqlens=torch.tensor([0, 6]))
    with raises_naming("x has shape (1, 6, 8)", "[N, 8] beside shapes or cu_seqlens"):
        NeighborhoodGQA(8, 2, 3)(x[None], cu_seqlens=torch.tensor([0, 6]))
    with raises_naming("kernel_size", "1 spatial axis"):
        NeighborhoodGQA(8, 2, (3, 3))(x, cu_seqlens=torch.tensor([0, 6]))
    with raises_naming("cu_seqlens", "integer tensor", "list"):
        NeighborhoodGQA(8, 2, 3)(x, cu_seqlens=[0, 6])
    with raises_naming("cu_seqlens ends with 5", "x has 6"):
        NeighborhoodGQA(8, 2, 3)(x, cu_seqlens=torch.tensor([0, 5]))
    with raises_naming("shapes add up to 4", "x has 6"):
        NeighborhoodGQA(8, 2, 3)(x, shapes=[(2, 2)])
    with raises_naming("rel_pos_bias=True", "once for each sample"):
        NeighborhoodGQA(8, 2, (3,), rel_pos_bias=True)(x, shapes=[(6,)])
    with raises_naming("registers_attend"):
        NeighborhoodGQA(8, 2, 3, num_registers=1, registers_attend=True)(x, shapes=[(6,)])
    with raises_naming("x has shape (1, 6, 8)", "[N, 8]"):
        NeighborhoodGQA(8, 2, 3)(x[None], shapes=[(6,)])
    with raises_naming("positions"):
        NeighborhoodGQA(8, 2, 3, rope=RoPE(4))(x, shapes=[(6,)])
    with raises_naming("shifted windows"):
        ShiftedWindowGQA(8, 2, 3, 1)(x, shapes=[(2, 3)])


@pytest.mark.parametrize(
    "options",
    [
        {"windows": (3, None), "qk_norm": True},
        {"windows": (3, None), "sink": "learned", "num_registers": 2},
        {"windows": (3, None), "attention_softcap": 2.0},
    ],
    ids=str,
)
def test_a_language_model_takes_packed_texts(options: dict[str, Any]) -> None:
    """Logits and gradients are those of each text alone."""
    torch.manual_seed(0)
    config = DecoderLMConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
        initializer_range=0.3, **options,
    )  # fmt: skip
    model = DecoderLM(config, device=DEVICE)
    ids = torch.randint(0, 31, (1, 11), device=DEVICE)
    packed = model(ids, cu_seqlens=torch.tensor([0, 5, 5, 11], device=DEVICE))
    alone = torch.cat([model(part) for part in ids.split([5, 6], 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert error(model(ids), alone) > 1e-2
    found, expected = (
        torch.autograd.grad(out.log_softmax(-1)[..., 3].sum(), list(model.parameters())) for out in (packed, alone)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with raises_naming("cu_seqlens ends with 10", "11"):
        model(ids, cu_seqlens=torch.tensor([0, 10]))
    with raises_naming("cu_seqlens", "got attention_mask"):
        model(ids, cu_seqlens=torch.tensor([0, 11]), attention_mask=torch.ones_like(ids))
    with raises_naming("cu_seqlens", "2 rows"):
        model(ids.expand(2, -1), cu_seqlens=torch.tensor([0, 11]))
