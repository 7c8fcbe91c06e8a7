"""Calls in forward mode, and how their tangents are compared with exact ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers import FLOOR, Case, Inputs, arguments, error, operation
from torch import Tensor

from natten_layers.operations import Impl


class Moving(NamedTuple):
    """Results and their tangents: of the output and, where it was asked for, of lse."""

    results: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]


def tangents_of(inputs: Inputs, seed: int = 5) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator).to(t) for name, t in inputs.items()}


def detached(inputs: Inputs) -> Inputs:
    return {name: t.detach() for name, t in inputs.items()}


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """``torch.func.jvp`` without an auxiliary result, whose type has one."""
    results, moved, *_ = torch.func.jvp(function, primals, tangents)
    return results, moved


def directional(function: Callable[..., tuple[Tensor, ...]], inputs: Inputs, tangents: Inputs) -> Moving:
    """Results and tangents of a function of keyword arguments; inputs without a tangent are constants."""
    rest = {name: t for name, t in inputs.items() if name not in tangents}
    moving = {name: inputs[name] for name in tangents}
    return Moving(*jvp(lambda moved: function(**moved, **rest), (moving,), (tangents,)))


def attend(case: Case, impl: Impl, return_lse: bool = True) -> Callable[..., Any]:
    """A call as a function of its tensors that returns a tuple, with lse or without."""

    def run(**inputs: Tensor) -> Any:
        results = operation(case)(**arguments(case, inputs), return_lse=return_lse, impl=impl)
        return results if return_lse else (results,)

    return run


def assert_moves_like(case: Case, found: Moving, exact: Moving, peer: Moving) -> None:
    """Check results and tangents against exact ones; they may err twice as much as the eager path's, ``peer``.

    In fp32 the products of a GPU are three of TF32 each, which err by a few 2^-22 of sums of magnitudes. The tangent of
    lse is a mean over a window, far smaller than what it is the mean of, so that its relative error is larger.
    """
    for result, expected, other in zip(found.results, exact.results, peer.results, strict=True):
        there = expected.cpu() > -math.inf
        assert torch.equal(result.cpu() > -math.inf, there)
        wrong, allowed = (error(x.cpu()[there], expected.cpu()[there]) for x in (result, other))
        assert wrong <= max(2 * allowed, FLOOR[case.dtype]), f"{case!r}: {wrong:.2e}, the eager path {allowed:.2e}"
    names = ("out", "lse")[: len(found.results)]
    every = zip(names, *found, exact.tangents, peer.tangents, strict=True)
    for name, result, tangent, expected, other in every:
        assert tangent.dtype == result.dtype
        assert tangent.is_contiguous()
        means = 3 if result.is_cuda and name == "lse" and case.dtype == torch.float32 else 1
        limit = max(2 * error(other, expected), means * FLOOR[case.dtype])
        wrong = error(tangent, expected)
        assert wrong <= limit, f"tangent of {name} has relative error {wrong:.2e}, allowed {limit:.2e}: {case!r}"
