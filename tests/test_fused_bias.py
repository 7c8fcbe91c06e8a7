"""The bias on relative positions in the fused kernels: results, and the gradients of every input and of the table."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import FLOOR, Case, arguments, error, make_inputs, raises_naming
from torch import Tensor

from natten_layers import explain, neighborhood_attention
from natten_layers.explanation import Explanation
from natten_layers.kernels.host.problem import Inputs
from natten_layers.operations import Impl

pytest.importorskip("triton")

from natten_layers.kernels.host.tiling import Size
from natten_layers.kernels.host.tuned import forget, override
from natten_layers.kernels.portable import bias_gradient
from natten_layers.kernels.sm90.support import MEDIUM

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# These tests run interpreted without a GPU. With one, they run compiled and have the mark "gpu".
pytestmark = [pytest.mark.gpu] if ON_GPU else []

CASES = (
    Case("1d-causal-dilated", (19,), 5, 2, 2, True, heads=4, batch=1),
    Case("2d-all", (6, 7), (3, 2), (2, 1), (1, 2), (False, True), 4, 2, 16, 24, 2, "learned", -0.3, batch=1),
    Case("2d-masked", (5, 6), 3, heads=2, kv_heads=1, sink="zero", seen=0.6),
    Case("3d-dilated", (4, 3, 5), (2, 3, 2), 1, (2, 1, 2), heads=4, kv_heads=2, head_dim=8, value_dim=8, batch=1),
    Case("fp16", (6, 7), 3, heads=4, dtype=torch.float16, batch=1),
    Case("ring", (10,), 4, 3, 2, heads=2, is_periodic=True),
    Case("ring-whole", (5, 4), (5, 2), is_periodic=(True, False), batch=1),
    Case("wide", (40,), 37, heads=2, kv_heads=1, batch=1),
)
BORDERS = (
    Case("line", (41,), 13, 2, heads=1, kv_heads=1, head_dim=8, value_dim=8, batch=1),
    Case("causal", (37,), 20, 3, is_causal=True, heads=1, kv_heads=1, head_dim=8, value_dim=8, batch=1),
    Case("ring", (36,), 11, 3, 2, heads=1, kv_heads=1, head_dim=8, value_dim=8, is_periodic=True, batch=1),
    Case("plane", (4, 9), (3, 4), 1, (1, 2), heads=1, kv_heads=1, head_dim=8, value_dim=8, batch=1, seen=0.8),
    Case("texts", (18,), 2, heads=1, kv_heads=1, head_dim=8, value_dim=8, batch=3),
)
"""In tiles of 16 queries and chunks of 16 keys these have several of both, some at borders, and many slices."""
SHAPES = (
    Case("7x7", (31, 37), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64),
    Case("sliding", (500,), 128, is_causal=True, heads=4, kv_heads=2, head_dim=128, value_dim=128),
    Case("7x7-head-dim-40", (20, 25), 7, 1, (2, 1), heads=4, head_dim=40, value_dim=40, registers=3, sink="learned"),
    Case("video", (6, 10, 12), (3, 5, 5), heads=4, head_dim=256, value_dim=256, is_periodic=(False, False, True)),
)
ON_SM90 = (
    Case("even", (64, 72), 6, heads=1, kv_heads=1, head_dim=64, value_dim=64),
    Case("causal-plane", (48, 48), 7, is_causal=True, heads=2, kv_heads=1, head_dim=32, value_dim=32),
    Case("half-causal", (40, 56), 7, is_causal=(True, False), heads=2, head_dim=64, value_dim=64, registers=3),
    Case("causal-text", (600,), 40, is_causal=True, heads=1, kv_heads=1, head_dim=32, value_dim=32),
    Case("dilated-far", (64, 96), 5, 1, 2, heads=1, kv_heads=1, head_dim=32, value_dim=32),
    Case("video", (12, 24, 28), (3, 5, 5), heads=1, kv_heads=1, head_dim=64, value_dim=64, batch=1),
    Case("short-videos", (3, 3, 7), (1, 3, 3), heads=2, head_dim=96, value_dim=96, batch=3),
    Case("causal-videos", (5, 3, 3), (4, 1, 3), 1, 1, (True, False, True), heads=2, head_dim=64, value_dim=64, batch=3),
    Case("plane", (31, 45), (7, 9), (1, 2), heads=4, kv_heads=2, head_dim=32, value_dim=32),
    Case("slices", (64, 72), 11, heads=1, kv_heads=1, head_dim=64, value_dim=64),
    Case("frames", (5, 11, 14), (3, 5, 5), is_causal=(True, False, False), heads=2, head_dim=64, value_dim=64, batch=3),
    Case("dilated-line", (200,), 21, 1, 4, heads=2, kv_heads=1, head_dim=32, value_dim=32, dtype=torch.float16),
    Case("dilated-plane", (24, 40), 5, 1, (2, 4), heads=2, head_dim=64, value_dim=64, registers=3),
    Case("three-parts", (20, 33), 9, heads=2, head_dim=112, value_dim=112, sink="zero"),
    Case("wide", (9, 40), (4, 9), 2, heads=2, head_dim=128, value_dim=128),
    Case("causal-line", (333,), 70, 3, is_causal=True, heads=2, head_dim=80, value_dim=80),
)
"""Calls whose table's gradient has a kernel for compute capability 9.0."""


def make_table(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(case.heads, *(2 * k - 1 for k in case.window.kernel_size), generator=generator).to(DEVICE)


def results(case: Case, dtype: torch.dtype, table: Tensor, impl: Impl) -> dict[str, Tensor]:
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in make_inputs(case, DEVICE).items()}
    inputs["rpb"] = table.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out, lse = neighborhood_attention(**arguments(case, inputs), return_lse=True, impl=impl)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randint(-8, 9, x.shape, generator=generator).to(x) / 4 for x in (out, lse)]
    grads = torch.autograd.grad((out, lse), tuple(inputs.values()), cotangents)
    return {"out": out, "lse": lse} | dict(zip(inputs, grads, strict=True))


def check(case: Case) -> None:
    table = make_table(case)
    expected = results(case, torch.float64, table, "eager")
    peer, found = (results(case, case.dtype, table, impl) for impl in ("eager", "fused"))
    for name, tensor in found.items():
        limit = max(2 * FLOOR[tensor.dtype if name == "lse" else case.dtype], 2 * error(peer[name], expected[name]))
        assert error(tensor, expected[name]) <= limit, name


def assert_medium(said: Explanation) -> None:
    """Check that the table's gradient takes the kernel for compute capability 9.0 on such a GPU."""
    if ON_GPU and torch.cuda.get_device_capability() == (9, 0):
        assert (said.kernels[-1].direction, said.kernels[-1].name) == ("backward_bias", MEDIUM)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: Case) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_equals_the_definition_at_real_shapes(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_SM90, ids=str)
def test_kernels_for_medium_windows_equal_the_definition(case: Case) -> None:
    case = replace(case, dtype=case.dtype if case.dtype == torch.float16 else torch.bfloat16)
    tensors = {name: x.detach().to(case.dtype) for name, x in make_inputs(case, DEVICE).items()}
    with override(variants={"backward_key": "portable"}):
        portable = results(case, case.dtype, make_table(case), "fused")["rpb"]
    with override(variants={"backward_key": MEDIUM}):
        assert_medium(explain(**arguments(case, tensors), rpb=make_table(case), needs_grad=True))
        check(case)
        assert error(results(case, case.dtype, make_table(case), "fused")["rpb"], portable) <= 1e-5


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_in_a_bias_that_no_pair_has_changes_no_gradient(dtype: torch.dtype) -> None:
    """It is where the window would be of which a causal query sees the first half."""
    case = Case("nan", (400,), 6, is_causal=True, heads=2, kv_heads=1, head_dim=32, value_dim=32, batch=1, dtype=dtype)
    table = make_table(case)
    dirty = table.index_fill(1, torch.tensor(7, device=DEVICE), torch.nan)
    with override(variants={"backward_key": MEDIUM}):
        if dtype != torch.float32:
            tensors = {name: x.detach().to(dtype) for name, x in make_inputs(case, DEVICE).items()}
            assert_medium(explain(**arguments(case, tensors), rpb=table, impl="fused", needs_grad=True))
        clean = results(case, dtype, table, "fused")
        for name, tensor in results(case, dtype, dirty, "fused").items():
            assert torch.equal(tensor, clean[name]), name


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")  # to -inf, as on a GPU
@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_a_head_whose_bias_hides_every_key(case: Case, lowest: float) -> None:
    case = replace(case, sink=None)
    table = make_table(case)
    table[0] = lowest
    table[1].view(-1)[1::2] = lowest
    expected, found = (results(case, torch.float32, table, impl) for impl in ("eager", "fused"))
    assert (found["lse"][..., 0] == -math.inf).all()
    assert (found["out"][..., 0, :] == 0).all()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", BORDERS, ids=str)
def test_tiles_chunks_and_slices_add_up(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias_gradient, "program_size", lambda problem: Size(16, 16, 4, 1))
    monkeypatch.setattr(bias_gradient, "LEAST_TILES", 1)
    monkeypatch.setattr(bias_gradient, "SUM_ROWS", 32)
    forget()
    check(case)
    forget()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's NumPy
def test_biases_may_be_so_high_that_their_exponentials_overflow() -> None:
    """Also in rows of a tile that hold no query, whose scores have no maximum to subtract."""
    case = Case("high", (9,), 3, heads=1, kv_heads=1, head_dim=8, value_dim=8, batch=1)
    plain, high = (results(case, torch.float32, make_table(case) + shift, "fused")["rpb"] for shift in (0, 300))
    torch.testing.assert_close(high, plain, rtol=1e-3, atol=1e-4)


def test_the_tables_gradient_has_the_same_bits_in_every_run() -> None:
    case = Case("twice", (6, 7), 3, heads=1, kv_heads=1, batch=1)
    first, second = (results(case, torch.float32, make_table(case), "fused")["rpb"] for _ in range(2))
    assert torch.equal(first, second)


def test_a_table_may_be_a_view_in_half_precision() -> None:
    case = Case("view", (5, 6), 3, batch=1)
    inputs = {name: x.detach() for name, x in make_inputs(case, DEVICE).items()}
    table = make_table(case).half()
    view = table.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    plain, found = (neighborhood_attention(**arguments(case, inputs), rpb=x, impl="fused") for x in (table, view))
    assert torch.equal(found, plain)


def test_a_table_of_another_layout_compiles_into_one_graph() -> None:
    case = Case("view", (4, 4), 3, heads=1, kv_heads=1, batch=1)
    inputs = tuple(make_inputs(case, DEVICE).values())
    table = make_table(case).mT.contiguous().mT.requires_grad_()

    def attend(table: Tensor, *tensors: Tensor) -> Tensor:
        named = dict(zip(Inputs._fields, tensors, strict=False))
        return neighborhood_attention(**arguments(case, named), rpb=table, impl="fused")

    expected = attend(table, *inputs)
    found = torch.compile(attend, backend="aot_eager", fullgraph=True)(table, *inputs)
    assert torch.equal(found, expected)
    grads = (torch.autograd.grad(out.square().sum(), table)[0] for out in (found, expected))
    assert torch.equal(*grads)


def test_operators_keep_torchs_contract_with_a_table() -> None:
    case = Case("contract", (4,), 3, batch=1)
    q, k, v = (x.detach() for x in make_inputs(case, DEVICE).values())
    arguments = *Inputs(q, k, v, rpb=make_table(case)), None, [3], [1], [1], [False], 0.25, []
    state = torch.ops.natten_layers.forward(*arguments, True)
    torch.library.opcheck(torch.ops.natten_layers.forward.default, (*arguments, True))
    cotangents = torch.randn_like(state[0]), None
    torch.library.opcheck(torch.ops.natten_layers.backward.default, (*arguments, *state, *cotangents))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # one backward call a sample
def test_vmap_over_tables() -> None:
    case = Case("ensemble", (5,), 3, heads=1, kv_heads=1, batch=1)
    inputs = {name: x.detach() for name, x in make_inputs(case, DEVICE).items()}
    tables = torch.stack([make_table(case), -make_table(case)])

    def attend(table: Tensor) -> Tensor:
        return neighborhood_attention(**arguments(case, inputs), rpb=table, impl="fused")

    grads = torch.func.vmap(torch.func.grad(lambda table: attend(table).square().sum()))(tables)
    for i, table in enumerate(tables):
        assert torch.equal(torch.func.vmap(attend)(tables)[i], attend(table))
        leaf = table.detach().requires_grad_()
        assert torch.equal(grads[i], torch.autograd.grad(attend(leaf).square().sum(), leaf)[0])


def test_forward_mode_takes_the_eager_path() -> None:
    case = Case("forward", (5, 4), 3, batch=1)
    inputs = {name: x.detach() for name, x in make_inputs(case, DEVICE).items()}
    table = make_table(case)

    def tangent(impl: Impl) -> Tensor:
        def attend(table: Tensor) -> Tensor:
            return neighborhood_attention(**arguments(case, inputs), rpb=table, impl=impl)

        return torch.func.jvp(attend, (table,), (torch.ones_like(table) * table,))[1]

    assert torch.equal(tangent("auto"), tangent("eager"))
    assert tangent("auto").abs().max() > 0.01
    with raises_naming("rpb", "forward", "eager", error=RuntimeError):
        tangent("fused")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("name", ["key", "value", "rpb"])
def test_nan_reaches_those_that_see_it(name: str) -> None:
    case = Case("nan", (9, 12), 3, batch=1)
    inputs = {n: t.detach() for n, t in make_inputs(case, DEVICE).items()} | {"rpb": make_table(case)}

    def attend() -> Tensor:
        tensors = {n: t for n, t in inputs.items() if n != "rpb"}
        return neighborhood_attention(**arguments(case, tensors), rpb=inputs["rpb"], impl="fused")

    clean, seen = attend(), torch.zeros(1, 9, 12, 2, dtype=torch.bool)
    if name == "rpb":  # the distance to the key two lines below, which only the first line sees
        inputs[name][0, 4, 2] = torch.nan
        seen[:, 0, :, 0] = True
    else:
        inputs[name][0, 4, 5] = torch.nan
        seen[:, 3:6, 4:7] = True
    dirty = attend().cpu()
    assert dirty[seen].isnan().any(-1).all()
    torch.testing.assert_close(dirty[~seen], clean.cpu()[~seen], rtol=1e-5, atol=1e-6)


def test_explain_names_the_kernel_of_the_tables_gradient() -> None:
    case = CASES[2]
    inputs, table = make_inputs(case, DEVICE), make_table(case)
    said = explain(**arguments(case, inputs), rpb=table, impl="fused", needs_grad=True)
    assert [kernel.direction for kernel in said.kernels][-1] == "backward_bias"
