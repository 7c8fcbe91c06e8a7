"""The budget of tangents in half precision (tangents.py) follows the errors of the kernels, and faults exceed it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import Case, Inputs, error, make_inputs
from tangents import Moving, assert_moves_like, attend, detached, directional, peer_of, tangents_of

pytest.importorskip("triton")

import triton
import triton.language as tl

from natten_layers.kernels.portable import jvp
from natten_layers.kernels.portable.primitives import add_weighted

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []

PEAKED = Case("peaked", (24,), 7, head_dim=64, scale=0.3, dtype=torch.float16)
"""Scores have a standard deviation of 2.4, so that a few keys have nearly all the weight."""
CASES = (
    PEAKED,
    replace(PEAKED, name="steeper", scale=0.6),
    replace(PEAKED, name="sink-and-registers", heads=4, kv_heads=1, registers=5, sink="learned"),
    replace(PEAKED, name="zero-sink", spatial=(5, 6), kernel_size=(3, 4), heads=4, registers=2, sink="zero"),
    replace(PEAKED, name="masked", seen=0.5),
    replace(PEAKED, name="packed", spatial=(), shapes=((4, 5), (3, 4)), kernel_size=3, kv_heads=1, registers=1),
    replace(PEAKED, name="finer-grid", key_spatial=(9,), kernel_size=5),
    replace(PEAKED, name="coarser-grid-masked", spatial=(9,), key_spatial=(24,), seen=0.5),
)


def calls(case: Case, inputs: Inputs, tangents: Inputs) -> tuple[Moving, Moving, Moving]:
    """A call by kernels, in fp64 and by the eager path."""
    wide, wide_tangents = ({name: x.double() for name, x in given.items()} for given in (inputs, tangents))
    found, eager = (directional(attend(case, impl), inputs, tangents) for impl in ("fused", "eager"))
    return found, directional(attend(case, "eager"), wide, wide_tangents), eager


@pytest.mark.parametrize(
    ("case", "moving"),
    [*((case, ()) for case in CASES), *((PEAKED, (name,)) for name in ("query", "key", "value"))],
    ids=str,
)
def test_the_budget_is_twice_what_kernels_err_by(case: Case, moving: tuple[str, ...]) -> None:
    """Where the softmax is peaked it is more than twice what the eager path errs by, unless only values move."""
    inputs = detached(make_inputs(case, DEVICE))
    tangents = {name: x for name, x in tangents_of(inputs).items() if not moving or name in moving}
    found, exact, eager = calls(case, inputs, tangents)
    peer = peer_of(case, inputs, tangents)
    assert_moves_like(case, found, exact, peer)
    wrong, expected = (error(x.tangents[0], exact.tangents[0]) for x in (found, peer))
    assert 0.7 < wrong / expected < 1.4
    if moving != ("value",):
        with pytest.raises(AssertionError, match="tangent of out"):
            assert_moves_like(case, found, exact, eager)


def test_lse_and_its_tangent_are_as_exact_as_in_fp32() -> None:
    inputs = detached(make_inputs(PEAKED, DEVICE))
    tangents = tangents_of(inputs)
    (found, exact, _), peer = calls(PEAKED, inputs, tangents), peer_of(PEAKED, inputs, tangents)
    assert_moves_like(PEAKED, found, exact, peer)
    for kind in ("results", "tangents"):
        out, lse = getattr(found, kind)
        with pytest.raises(AssertionError, match="lse has relative error"):
            assert_moves_like(PEAKED, found._replace(**{kind: (out, lse * 1.00002)}), exact, peer)


@triton.jit
def too_heavy(b_acc, b_weight, b_rows, PRECISION: tl.constexpr):
    return add_weighted(b_acc, 1.01 * b_weight, b_rows, PRECISION)


@triton.jit
def no_reference(b_q, b_q_dot, keys, key_dots, key_mask, tile, axes, key_length, scale, SPEC: tl.constexpr):
    return tl.zeros(tile.m_rows.shape, tl.float32)


@pytest.mark.skipif(ON_GPU, reason="kernels that are compiled keep their functions")
@pytest.mark.parametrize(("name", "fault"), [("add_weighted", too_heavy), ("reference_tangent", no_reference)])
def test_faults_of_kernels_exceed_the_budget(name: str, fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are 1 % too large, and tangents of scores that are not relative, though keys have a common part."""
    inputs = detached(make_inputs(PEAKED))
    tangents = tangents_of(inputs)
    inputs["key"], tangents["key"] = inputs["key"] + 8, tangents["key"] + 8
    peer = peer_of(PEAKED, inputs, tangents)
    found, exact, _ = calls(PEAKED, inputs, tangents)
    assert_moves_like(PEAKED, found, exact, peer)
    monkeypatch.setattr(jvp, name, fault)
    faulty, _, _ = calls(PEAKED, inputs, tangents)
    with pytest.raises(AssertionError, match="tangent of out"):
        assert_moves_like(PEAKED, faulty, exact, peer)
