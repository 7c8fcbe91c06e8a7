"""Calls in forward mode, and how their tangents are compared with exact ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers import FLOOR, Case, Inputs, arguments, error, key_mask, operation
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


def peer_of(case: Case, inputs: Inputs, tangents: Inputs, return_lse: bool = True) -> Moving:
    """The eager path in the same precision; in half precision, what kernels round adds to its errors."""
    peer = directional(attend(case, "eager", return_lse), inputs, tangents)
    if torch.finfo(case.dtype).bits > 16:
        return peer
    out_tangent, *others = peer.tangents
    return peer._replace(tangents=(out_tangent + roundings(case, inputs, tangents, peer.results[0]), *others))


def roundings(case: Case, inputs: Inputs, tangents: Inputs, out: Tensor, seed: int = 7) -> Tensor:
    """What roundings like those of kernels for half precision, drawn at random, add to the tangent of the output.

    The kernels compute ``(P * (Sdot - c)) V + P Vdot - (mu - c) * Out``, where c is the tangent of :func:`own_score`.
    They round ``P * (Sdot - c)``, ``P`` and, if a second launch reads it, ``Out``. Where one weight is nearly 1, the
    first and the last term nearly cancel, but not their errors. Errors of weights are drawn as those of the values and
    tangents that they multiply.
    """
    generator = torch.Generator().manual_seed(seed)

    def errors(x: Tensor) -> Tensor:
        numbers = torch.rand(x.shape, generator=generator, dtype=torch.float64).exp2()
        return x.double() * (numbers.to(case.dtype) / numbers - 1).to(x.device)

    def in_errors(given: Inputs) -> Inputs:
        return {name: errors(x) if "value" in name else x.double() for name, x in given.items()}

    def run(**given: Tensor) -> tuple[Tensor, ...]:
        return *attend(case, "eager")(**given), own_score(case, given)

    (weighted, *_), (moved, mu, own) = directional(run, in_errors(inputs), in_errors(tangents))
    return moved + (mu - own)[..., None] * (weighted - errors(out))


def own_score(case: Case, inputs: Inputs) -> Tensor:
    """The score of each query with the key at its own place, relative to whose tangent kernels take those of others.

    On another grid it is the key of the same index, or else the last. Where that is masked, the score is a constant.
    """

    def of_queries(x: Tensor) -> Tensor:
        for axis, length in enumerate(case.spatial, 1):
            x = x.index_select(axis, torch.arange(length, device=x.device).clamp(max=x.shape[axis] - 1))
        return x

    keys = of_queries(inputs["key"]).repeat_interleave(case.heads // case.kv_heads, -2)
    scores = (case.head_dim**-0.5 if case.scale is None else case.scale) * (inputs["query"] * keys).sum(-1)
    seen = key_mask(case, scores.device)
    return scores if seen is None else scores.masked_fill(~of_queries(seen)[..., None], 0.0)


def assert_moves_like(case: Case, found: Moving, exact: Moving, peer: Moving) -> None:
    """Check results and tangents against exact ones; they may err twice as much as those of ``peer_of``.

    Of half precision, lse and its tangent are in fp32, from products that are exact. In fp32 the products of a GPU are
    three of TF32 each, which err by a few 2^-22 of sums of magnitudes. The tangent of lse is a mean over a window, far
    smaller than what it is the mean of, so that its relative error is larger.
    """
    names = ("out", "lse")[: len(found.results)]
    for name, result, expected, other in zip(names, found.results, exact.results, peer.results, strict=True):
        there = expected.cpu() > -math.inf
        assert torch.equal(result.cpu() > -math.inf, there)
        wrong, allowed = (error(x.cpu()[there], expected.cpu()[there]) for x in (result, other))
        limit = max(2 * allowed, FLOOR[result.dtype])
        assert wrong <= limit, f"{name} has relative error {wrong:.2e}, allowed {limit:.2e}: {case!r}"
    every = zip(names, *found, exact.tangents, peer.tangents, strict=True)
    for name, result, tangent, expected, other in every:
        assert tangent.dtype == result.dtype
        assert tangent.is_contiguous()
        means = 3 if result.is_cuda and name == "lse" else 1
        limit = max(2 * error(other, expected), means * FLOOR[tangent.dtype])
        wrong = error(tangent, expected)
        assert wrong <= limit, f"tangent of {name} has relative error {wrong:.2e}, allowed {limit:.2e}: {case!r}"
