"""The search of ``natten-layers-tune`` for the fastest variants and tile configurations of the fused kernels.

``python -m natten_layers.tune`` is another name of that command.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .kernels.host.tiling import Kind, ProblemClass, TileConfig, best_boxes, boxes, rule
from .kernels.host.tuned import override
from .kernels.host.variant import Question

__all__ = ["Fastest", "Found", "fastest", "neighbors", "rivals", "search", "tune", "tune_variants"]

MAXNREGS = (None, 96, 128, 168)
GAIN = 0.02
"""Part of the time that a change must save to be more than noise."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Timer = Callable[[Callable[[], object]], float]
Measure = Callable[[TileConfig], float]
"""Returns the seconds that a tile configuration takes; infinite if it cannot run or its results are wrong."""


@dataclass(frozen=True)
class Found:
    """The best tile configuration of one kernel, its seconds, and those of the rule's tile configuration."""

    config: TileConfig
    seconds: float
    rule_seconds: float

    @property
    def gains(self) -> bool:
        return self.seconds < (1 - GAIN) * self.rule_seconds


@dataclass(frozen=True)
class Fastest:
    """The fastest variant of a kernel, its seconds, and those of the variant that calls take by themselves."""

    name: str
    seconds: float
    own_seconds: float

    @property
    def gains(self) -> bool:
        return self.seconds < (1 - GAIN) * self.own_seconds


def rivals(kind: Kind, question: Question) -> list[str]:
    """All variants that can compute a kernel, expected to pay or not; first the one that calls take by themselves."""
    from .kernels.dispatch import VARIANTS, choose, plan_of  # imports Triton

    able = [variant.name for variant in VARIANTS[kind] if not isinstance(plan_of(variant, question), str)]
    return list(dict.fromkeys([choose(kind, question).variant.name, *able]))


def fastest(
    candidates: Sequence[str],
    measure: Callable[[str], float],
    report: Callable[[str, float], None] = lambda name, seconds: None,
) -> Fastest:
    """The fastest of :func:`rivals`, whose first entry is what calls take by themselves."""
    times = []
    for name in candidates:
        times.append(measure(name))
        report(name, times[-1])
    seconds = min(times)
    return Fastest(candidates[times.index(seconds)], seconds, times[0])


def neighbors(kind: Kind, problem: ProblemClass, config: TileConfig) -> Iterator[TileConfig]:
    """Tile configurations that differ from ``config`` in one respect."""
    for warps in (config.num_warps * 2, config.num_warps // 2):
        if 1 <= warps <= 16:
            yield replace(config, num_warps=warps)
    for stages in (config.stages + 1, config.stages - 1):
        if 1 <= stages <= 5:
            yield replace(config, stages=stages)
    yield from (replace(config, maxnreg=n) for n in MAXNREGS if n != config.maxnreg)
    yield replace(config, skip_mask=not config.skip_mask)
    positions, keys = math.prod(config.tile), math.prod(config.chunk)
    rows = positions * config.pack
    packs = (config.pack,) if kind == "backward_key" else (config.pack, config.pack * 2, config.pack // 2)
    for other_rows, other_keys, pack in (
        *((r, keys, config.pack) for r in (rows * 2, rows // 2)),
        *((rows, k, config.pack) for k in (keys * 2, keys // 2)),
        *((rows, keys, p) for p in packs if p != config.pack),
    ):
        if 16 <= other_rows <= 256 and 16 <= other_keys <= 256 and 1 <= pack <= min(16, other_rows):
            tile, chunk = best_boxes(
                other_rows // pack, other_keys, problem.lengths, problem.kernel, kind == "backward_key"
            )
            yield replace(config, tile=tile, chunk=chunk, pack=pack)
    unions = [min(n, t + k - 1) for n, t, k in zip(problem.lengths, config.tile, problem.kernel, strict=True)]
    yield from (replace(config, tile=tile) for tile in boxes(positions, problem.lengths) if tile != config.tile)
    yield from (replace(config, chunk=chunk) for chunk in boxes(keys, unions) if chunk != config.chunk)


def search(
    kind: Kind,
    problem: ProblemClass,
    measure: Measure,
    *,
    trials: int,
    report: Callable[[TileConfig, float], None] = lambda config, seconds: None,
) -> Iterator[Found]:
    """Hill climbing: from the rule's tile configuration to the best neighbor, until none gains or ``trials`` are used.

    Yields the best so far after every trial, so that an interrupted search has a result.
    """
    best = rule(kind, problem)
    seconds = rule_seconds = measure(best)
    report(best, seconds)
    yield Found(best, seconds, rule_seconds)
    seen, left, improved = {best}, trials, True
    while improved:
        improved = False
        origin, at_least = best, (1 - GAIN) * seconds
        for config in neighbors(kind, problem, origin):
            if left == 0:
                return
            if config in seen:
                continue
            seen.add(config)
            left -= 1
            time = measure(config)
            report(config, time)
            if time < min(seconds, at_least):
                best, seconds, improved = config, time, True
            yield Found(best, seconds, rule_seconds)


def tune_variants(
    kind: Kind,
    question: Question,
    attend: Attention,
    inputs: Sequence[Tensor],
    *,
    timer: Timer,
    report: Callable[[str, float], None],
) -> Fastest | None:
    """:func:`fastest` for one kernel, timing calls of the operation; None if only one variant can compute it.

    Args:
        question: what is asked about the kernel.
        attend: the operation, a function of query, key and value.
        inputs: query, key, value and the gradient of the output.
    """
    candidates = rivals(kind, question)
    if len(candidates) == 1:
        return None
    measure = _measure(kind, attend, inputs, timer)
    return fastest(candidates, lambda name: measure(variants={kind: name}), report)


def tune(
    problem: ProblemClass,
    attend: Attention,
    inputs: Sequence[Tensor],
    *,
    kinds: Sequence[Kind],
    trials: int,
    timer: Timer,
    report: Callable[[Kind, TileConfig, float], None],
) -> Iterator[tuple[Kind, Found]]:
    """:func:`search` for several kernels, timing calls of the operation.

    Args:
        attend: the operation, a function of query, key and value.
        inputs: query, key, value and the gradient of the output.
    """
    for kind in kinds:
        seconds = _measure(kind, attend, inputs, timer)

        def measure(config: TileConfig, kind: Kind = kind, seconds: Callable[..., float] = seconds) -> float:
            return seconds({kind: config})

        for found in search(kind, problem, measure, trials=trials, report=partial(report, kind)):
            yield kind, found


def _measure(kind: Kind, attend: Attention, inputs: Sequence[Tensor], timer: Timer) -> Callable[..., float]:
    """A function that returns the seconds of the pass under an :func:`override` with its arguments."""
    *leaves, grad_out = (t.detach() for t in inputs)
    if kind == "forward":

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(*leaves),)

    elif kind == "jvp":

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return torch.func.jvp(attend, tuple(leaves), tuple(leaves))[1:]

    else:
        leaves = [t.requires_grad_() for t in leaves]
        out = attend(*leaves)

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    expected = run()
    # Results may differ by the order of sums, and by the rounding of weights and of the result.
    limit = 4 * torch.finfo(grad_out.dtype).eps

    def seconds(*overrides: Mapping[Kind, TileConfig], **named: Mapping[Kind, str]) -> float:
        with override(*overrides, **named):
            try:
                results = run()
            except Exception:  # Triton raises many kinds of errors if a launch needs more than the device has
                return math.inf
            right = all(_error(a, b) <= limit for a, b in zip(results, expected, strict=True))
            return timer(run) if right else math.inf

    return seconds


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


if __name__ == "__main__":  # the commands stand above the library, which knows them here only, by name
    from natten_layers_cli.launch import tune as command

    sys.exit(command())
