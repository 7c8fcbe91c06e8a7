"""Random calls (random_calls.py) against the fp64 eager path. ``--seeds 1000`` makes that many.

Kernels for large problems are used for small ones as well, with sizes that are not multiples of tile sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from threading import Lock

import pytest
import torch
from helpers import FLOOR, Case, Inputs, Result, arguments, error, make_inputs, operation, run
from tangents import Moving, assert_moves_like, attend, detached, directional, peer_of, tangents_of
from torch import Tensor

pytest.importorskip("triton")

from random_calls import ON_GPU, Call, draw_call, first_of, groups, laid_out, lower_thresholds

from natten_layers.kernels.host.tuned import forget

DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
FORWARD_MODE = Lock()
"""torch counts levels of forward mode in the whole process: of two threads at once one fails, whatever it computes."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        count = metafunc.config.getoption("--seeds") or (200 if ON_GPU else 12)
        metafunc.parametrize("seeds", groups(range(count)), ids=first_of)


@pytest.fixture(autouse=True)
def small_problems_take_kernels_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    lower_thresholds(monkeypatch)
    forget()
    yield
    forget()


def check(case: Case, layout: str, seed: int = 0) -> Result:
    """Check the fused path, and return what it gave.

    Gradients are compared with those of the output as it was rounded, which is judged by itself.
    """
    inputs = laid_out(make_inputs(case, DEVICE, seed), layout)
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    exact, peer = run(case, wide, "eager").tensors(), run(case, inputs, "eager").tensors()
    with torch.no_grad():
        alone = operation(case)(**arguments(case, inputs), impl="fused")
    fused = run(case, inputs, "fused")
    expected = exact | {f"grad of {name}": x for name, x in run(case, wide, "eager", fused.out).grads.items()}
    for name, tensor in (item for tensors in ({"out": alone}, fused.tensors()) for item in tensors.items()):
        if name in ("grad of sink", "grad of rpb"):  # sums over all tokens that may cancel; other tests check them
            continue
        limit = 2 * FLOOR[case.dtype if name.startswith("grad") else tensor.dtype]
        limit, found = max(limit, 3 * error(peer[name], exact[name])), error(tensor, expected[name])
        assert found <= limit, (
            f"{name} has relative error {found:.2e}, allowed {limit:.2e}: seed {seed}, {case!r}, {layout}"
        )
    return fused


def check_in_forward_mode(call: Call, seed: int) -> None:
    """Check tangents with gradients, in a launch after the forward pass, and without, where one launch may do both."""
    inputs = detached(laid_out(make_inputs(call.case, DEVICE, seed), call.layout))
    tangents = {name: tangent for name, tangent in tangents_of(inputs, seed).items() if name in call.moving}
    wide, wide_tangents = ({name: x.double() for name, x in given.items()} for given in (inputs, tangents))
    eager, fused = (attend(call.case, impl, call.moves_lse) for impl in ("eager", "fused"))
    exact = directional(eager, wide, wide_tangents)
    peer = peer_of(call.case, inputs, tangents, call.moves_lse)
    leaves = {name: x.requires_grad_() for name, x in detached(inputs).items()}
    for given, context in ((leaves, nullcontext()), (inputs, torch.no_grad())):
        with context:
            assert_moves_like(call.case, directional(fused, given, tangents), exact, peer)


def check_call(seed: int) -> None:
    call = draw_call(seed)
    check(call.case, call.layout, seed)
    if call.moving:
        with FORWARD_MODE:
            check_in_forward_mode(call, seed)


def test_a_random_call(seeds: range) -> None:
    for seed in seeds:
        check_call(seed)


def test_gradients_of_few_scores_far_apart() -> None:
    """They are differences of numbers that are nearly equal, of which one comes from the rounded output.

    So they are far from those of the exact output, in any kernel that reads a rounded one.
    """
    dtype = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter cannot multiply bfloat16 matrices
    case = Case("far apart", (2,), 1, heads=4, head_dim=128, value_dim=128, registers=1, scale=-0.4, dtype=dtype)
    fused = check(case, "plain")
    wide = {name: x.detach().double().requires_grad_() for name, x in make_inputs(case, DEVICE).items()}
    assert error(fused.grads["key"], run(case, wide, "eager").grads["key"]) > 2 * FLOOR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_gradients", [True, False])
def test_wrong_tangents_are_found(with_gradients: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = Case("moving", (5,), 3, scale=0.6, dtype=dtype), directional
    call = Call(case, "plain", ("query", "value"), moves_lse=True)

    def wrong(function: Callable[..., tuple[Tensor, ...]], inputs: Inputs, tangents: Inputs) -> Moving:
        found = right(function, inputs, tangents)
        is_meant = inputs["query"].requires_grad if with_gradients else not torch.is_grad_enabled()
        return found._replace(tangents=tuple(1.01 * x for x in found.tangents)) if is_meant else found

    check_in_forward_mode(call, seed=0)
    monkeypatch.setitem(globals(), "directional", wrong)
    with pytest.raises(AssertionError, match="tangent of out has relative error 1"):
        check_in_forward_mode(call, seed=0)
