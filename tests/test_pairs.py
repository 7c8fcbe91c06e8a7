"""The fp32 kernels whose products are those of fp16 pairs, against the fp64 oracle: those for any GPU, and those for
compute capability 9.0 where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Case, arguments, assert_close, assert_nan_stays, enlarge, error, make_inputs, oracle, run
from torch import Tensor

from natten_layers import explain, neighborhood_attention
from natten_layers.operations import Impl

pytest.importorskip("triton")

from natten_layers.kernels import dispatch
from natten_layers.kernels.host.packing import Packing
from natten_layers.kernels.host.problem import Inputs, Layout, Options, contiguous, problem_of
from natten_layers.kernels.host.tuned import forget, override
from natten_layers.kernels.portable import pair_variants, pairs
from natten_layers.kernels.sm90 import variants
from natten_layers.kernels.sm90.available import gluon_gap

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


HAS_SM90 = ON_GPU and torch.cuda.get_device_capability() == (9, 0) and gluon_gap() is None
KERNELS = [pair_variants.PAIRS, variants.MEDIUM_PAIRS] if HAS_SM90 else [pair_variants.PAIRS]


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the kernels that calls take, however small they are."""
    monkeypatch.setattr(pair_variants, "LEAST_PAIRS", 0)
    monkeypatch.setattr(pair_variants, "LEAST_WINDOW", 0)
    forget()
    with override(portable_only=request.param == pair_variants.PAIRS):
        yield request.param
    forget()


def suited(case: Case, kernels: str) -> Case:
    """The case, with heads that the kernels take."""
    if kernels == pair_variants.PAIRS or case.head_dim == case.value_dim == 64:
        return case
    return replace(case, head_dim=32, value_dim=32)


CASES = (
    Case("2d", (9, 13), (5, 7), head_dim=64, value_dim=64, heads=1, kv_heads=1, batch=1),
    Case("1d-causal-gqa-sink", (40,), 9, 1, 2, True, heads=3, kv_heads=1, sink="learned"),
    Case("2d-stride-value-dim", (9, 14), (5, 7), 2, heads=4, kv_heads=2, head_dim=24, value_dim=32, batch=1),
    Case("3d-scale", (4, 5, 6), (3, 3, 5), heads=2, kv_heads=1, scale=0.7, batch=1),
    Case("2d-many-keys", (24, 25), (11, 13), head_dim=64, value_dim=64, heads=1, kv_heads=1, batch=1, sink="zero"),
    Case("2d-128", (12, 14), (7, 5), head_dim=128, value_dim=128, heads=2, kv_heads=1, batch=1),
    Case("ring", (6, 14), (3, 7), is_periodic=(False, True), head_dim=32, value_dim=32, batch=1),
)
# What kernels for compute capability 9.0 do not take.
PORTABLE_CASES = (
    Case("1d-registers", (40,), 9, 1, 2, True, heads=4, kv_heads=2, registers=21, sink="learned"),
    Case("2d-unlike", (9, 13), (5, 7), heads=4, kv_heads=1, head_dim=48, value_dim=40),
    Case(
        "3d-ring-registers",
        (3, 6, 10),
        (3, 3, 5),
        (1, 1, 2),
        (1, 1, 2),
        heads=2,
        kv_heads=2,
        registers=2,
        sink="zero",
        is_periodic=(False, True, False),
    ),
    Case("2d-96", (9, 13), 3, heads=2, kv_heads=2, registers=1, head_dim=96, value_dim=72, batch=1),
    Case("1d-wide", (40,), 20, heads=3, kv_heads=1, head_dim=160, value_dim=64, batch=1),
    Case("2d-256", (7, 9), 5, heads=2, kv_heads=1, head_dim=200, value_dim=256, batch=1),
)
# What only kernels for compute capability 9.0 need, as their chunks come by TMA: several images and frames, dilation,
# strides, a ring over frames, tiles and chunks of all shapes.
MORE_CASES = (
    Case("2d-batch-gqa", (33, 47), (9, 11), heads=8, kv_heads=2, head_dim=64, value_dim=64, batch=3),
    Case("2d-dilated", (24, 36), (5, 5), 1, (2, 3), heads=4, kv_heads=4, head_dim=32, value_dim=32),
    Case("3d-causal-in-time", (8, 12, 20), (4, 5, 5), 1, 1, (True, False, False), 4, 2, 32, 32, batch=1),
    Case("3d-ring", (6, 9, 14), (3, 5, 7), is_periodic=(True, False, True), head_dim=64, value_dim=64, batch=1),
    Case("3d-odd", (5, 17, 19), (3, 5, 7), heads=3, kv_heads=3, head_dim=64, value_dim=64, sink="learned", batch=1),
    Case("1d-many-chunks", (1000,), 129, kv_heads=1, head_dim=64, value_dim=64),
    Case("1d-causal-stride", (500,), 64, 16, 1, True, heads=4, kv_heads=1, head_dim=32, value_dim=32),
)


def assert_matches_the_oracle(case: Case, kernels: str) -> None:
    inputs = make_inputs(case, DEVICE)
    taken = explain(**arguments(case, inputs), impl="fused").kernels
    assert [kernel.name for kernel in taken[:3]] == [kernels] * 3  # and then there may be one for registers
    assert_close(case, run(case, inputs, "fused"), oracle(case, inputs), run(case, inputs, "eager"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle_forward_and_backward(case: Case, kernels: str) -> None:
    assert_matches_the_oracle(suited(case, kernels), kernels)


@pytest.mark.parametrize("kernels", [pair_variants.PAIRS], indirect=True)
@pytest.mark.parametrize("case", PORTABLE_CASES, ids=str)
def test_options_match_the_oracle(case: Case, kernels: str) -> None:
    assert_matches_the_oracle(case, kernels)


@pytest.mark.skipif(not HAS_SM90, reason="needs a GPU of compute capability 9.0, and Gluon")
@pytest.mark.parametrize("kernels", [variants.MEDIUM_PAIRS], indirect=True)
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_what_tma_loads_matches_the_oracle(case: Case, kernels: str) -> None:
    assert_matches_the_oracle(case, kernels)


def test_units_follow_the_magnitudes_of_each_head(kernels: str) -> None:
    """Heads of very different magnitudes, one of zeros, and gradients that fp16 does not hold."""
    case = suited(Case("magnitudes", (5, 7), 3, heads=3, kv_heads=3, batch=1), kernels)
    inputs = {name: t.detach() for name, t in make_inputs(case, DEVICE).items()}
    factors = torch.tensor([1e-20, 0.0, 1e20], device=DEVICE)[:, None]
    inputs["key"] *= 1 / factors.clamp(1e-20) * (factors > 0)
    inputs["query"] *= factors
    inputs["value"] *= factors
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    grad = torch.randn_like(inputs["query"]) * 1e-12

    def results(tensors: dict[str, Tensor], impl: Impl) -> tuple[Tensor, ...]:
        out = neighborhood_attention(**arguments(case, tensors), impl=impl)
        return (out, *torch.autograd.grad(out, tuple(tensors.values()), grad.to(out.dtype)))

    for actual, expected in zip(results(leaves, "fused"), results(wide, "eager"), strict=True):
        for head in range(3):
            assert error(actual[..., head, :], expected[..., head, :]) < 2e-6


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to inf in fp16, which is split anew
@pytest.mark.parametrize("name", ["key", "value", "query", "grad_out"])
@pytest.mark.parametrize("token", [0, 7])
def test_a_token_much_larger_than_others_costs_these_no_precision(
    token: int, name: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches that split sample every tenth token; the split with the sample's factor does not hold token 7."""
    monkeypatch.setattr(pairs, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(pairs, "PROGRAMS", 8)
    case = suited(Case("outlier", (40,), 5, batch=1, kv_heads=1), kernels)
    inputs = {n: t.detach() for n, t in make_inputs(case, DEVICE).items()}
    tensors = inputs | {"grad_out": torch.randn_like(inputs["query"])}
    tensors[name][0, token] *= 2.0**13

    def results(dtype: torch.dtype, impl: Impl) -> list[Tensor]:
        leaves = {n: tensors[n].to(dtype, copy=True).requires_grad_() for n in inputs}
        out = neighborhood_attention(**arguments(case, leaves), impl=impl)
        grads = torch.autograd.grad(out, tuple(leaves.values()), tensors["grad_out"].to(dtype))
        return [t.detach() for t in (out, *grads)]

    for actual, expected in zip(results(torch.float32, "fused"), results(torch.float64, "eager"), strict=True):
        assert error(actual[:, 16:], expected[:, 16:]) < 2e-6
        assert error(actual[:, :16], expected[:, :16]) < 2e-3  # scores of 10^4, in whose gradients nearly all cancels


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["key", "value"])
def test_what_is_not_finite_stays_in_its_windows(name: str, value: float, kernels: str) -> None:
    case = suited(Case("nan", (9, 12), 3), kernels)
    inputs = {n: t.detach() for n, t in make_inputs(case, DEVICE).items()}
    clean = neighborhood_attention(**arguments(case, inputs), impl="fused")
    inputs[name][0, 4, 5] = value
    dirty = neighborhood_attention(**arguments(case, inputs), impl="fused")
    seen = torch.zeros(2, 9, 12, dtype=torch.bool)
    seen[0, 3:6, 4:7] = True
    assert not dirty[seen].isfinite().all(-1).any()
    torch.testing.assert_close(dirty[~seen], clean[~seen], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_nan_reaches_no_other_image_and_no_other_head(kernels: str) -> None:
    case = suited(Case("text", (9,), 3, heads=4, sink="learned"), kernels)
    assert_nan_stays(case, make_inputs(case, DEVICE))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to -inf, whose weight is 0
@pytest.mark.parametrize("exponent", [32, 112])
def test_scores_may_be_as_large_as_fp32_holds(exponent: int, kernels: str) -> None:
    case = suited(Case("2d", (5, 6), 3, heads=4), kernels)
    inputs = enlarge({name: t.detach() for name, t in make_inputs(case, DEVICE).items()}, exponent)
    expected = oracle(case, {name: t.requires_grad_() for name, t in inputs.items()})
    with torch.no_grad():
        out, lse = neighborhood_attention(**arguments(case, inputs), return_lse=True, impl="fused")
    assert expected.lse.abs().min() > 1e8
    assert error(out, expected.out) < 1e-6
    assert error(lse, expected.lse) < 1e-6


LARGE = Layout((8, 128, 128, 4, 64), contiguous((8, 128, 128, 4, 64)).stride)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"precision": "tf32"}, "torch asks for tf32 products"),
        ({"precision": "ieee"}, "torch asks for ieee products"),
        ({"dtype": torch.bfloat16}, "it takes float32"),
        ({"key_mask": contiguous((8, 128, 128, 1, 1))}, "key_mask"),
        ({"has_bias": True}, "rpb"),
        ({"scale_first": True}, "scale is not positive"),
        ({"query": contiguous((8, 64, 64, 4, 64))}, "another grid"),
        ({"packing": Packing(((128, 128),), 1)}, "packed batch"),
        ({"value": contiguous((8, 128, 128, 4, 264))}, "not of 264"),
        ({"kernel_size": (3, 3)}, "the window is small"),
        ({"query": contiguous((1, 8, 8, 4, 64)), "key": contiguous((1, 8, 8, 4, 64))}, "the call is small"),
        ({}, None),
        ({"additional_keys": Layout((8, 2, 4, 64), (512, 256, 64, 1))}, None),
        ({"value": contiguous((8, 128, 128, 4, 200))}, None),
    ],
)
def test_calls_that_take_other_kernels_have_a_reason(changes: dict[str, Any], reason: str | None) -> None:
    inputs = Inputs(*(torch.empty(1, 8, 8, 4, 64),) * 3)
    options = Options(None, (7, 7), (1, 1), (1, 1), (False, False), 0.125)
    problem = problem_of(inputs, options)._replace(query=LARGE, key=LARGE, value=LARGE)._replace(**changes)
    question = dispatch.Question(problem, True, grad_out=LARGE)
    for direction in ("forward", "backward_query", "backward_key"):
        choice = dispatch.choose(direction, question)
        if reason is None:
            assert choice.variant.name == pair_variants.PAIRS
        else:
            assert choice.variant.name != pair_variants.PAIRS
            assert reason in dict(choice.passed_over)[pair_variants.PAIRS]
