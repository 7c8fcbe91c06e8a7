"""Time normalisation and RoPE of queries and keys as a launch of their own: ``python -m benchmarks.rotation --help``.

That is how layers train. Queries and keys are slices of one projection, as layers pass them. The launch and its
backward pass read and write memory, so their bytes a second are given as a share of those of a large copy. A backward
pass with gains includes the sum of their gradients over programs. A result whose error exceeds twice that of the steps
in PyTorch gets no time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natten_layers.modules import RoPE
from natten_layers.modules.query_key import HeadNorm, normalize_and_rotate
from natten_layers.modules.rope import Angles, angles_of
from natten_layers.operations import Impl

from . import runner, timing
from .check import ERROR_FACTOR, wrong_result
from .module import axial_rope, positions_of
from .runner import Rates
from .shapes import CENSUS
from .workloads import DTYPE, Workload, smoke
from .workloads import WORKLOADS as ANCHORS

WORKLOADS = {
    name: (ANCHORS | CENSUS)[name] for name in ("hdit-l0", "hdit-gqa", "flux-4k", "hunyuan", "mistral", "video-3x5x5")
}
NORMS = "none", "cosine", "rms"
GOAL = 0.85
"""of the copy bandwidth"""


@dataclass
class Row(timing.Timed):
    workload: str
    norm: str
    direction: str
    """forward or backward"""
    bytes: int
    error: float
    allowed: float
    of_copy: float | None = None
    """Share of the copy bandwidth"""


class Problem:
    """Queries and keys of a workload, their normalisation and rotation, and gradients of both results."""

    def __init__(self, workload: Workload, norm: str, device: torch.device) -> None:
        w = workload
        rope = RoPE(w.head_dim) if len(w.spatial) == 1 else axial_rope(w)
        self.rope, self.positions = rope.to(device), None if len(w.spatial) == 1 else positions_of(w.spatial, device)
        self.norm = _head_norm(w, norm, device)
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int) -> Tensor:
            shape = w.batch, *w.spatial, heads, w.head_dim
            return torch.randn(shape, device=device, dtype=DTYPE, generator=generator)

        heads = w.heads, w.kv_heads
        # So many copies that none is still in the L2 cache when it is used again.
        copies = 2 if device.type == "cuda" else 1
        projections = [draw(w.heads + 2 * w.kv_heads) for _ in range(copies)]
        self.inputs = [_leaves(x.split((*heads, w.kv_heads), -2)[:2]) for x in projections]
        self.grads = tuple(map(draw, heads))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of queries and keys."""
        return sum(x.numel() * x.element_size() for x in self.grads)

    def angles(self, inputs: Sequence[Tensor]) -> Angles | None:
        query, key = inputs
        return angles_of(self.rope, query, key, self.positions)

    def backward(self, results: Sequence[Tensor], inputs: Sequence[Tensor], norm: HeadNorm | None) -> Sequence[Tensor]:
        grads = [x.to(result.dtype) for x, result in zip(self.grads, results, strict=True)]
        return torch.autograd.grad(results, [*inputs, *_gains(norm)], grads, retain_graph=True)

    def calls(self) -> dict[str, tuple[int, Callable[[int], object]]]:
        """For each direction the bytes that it has to move, and the call. The backward pass of a normalisation reads
        what was normalised, too.
        """
        angles = self.angles(self.inputs[0])  # once, as positions are no part of the launch
        results = [normalize_and_rotate(*inputs, self.norm, angles) for inputs in self.inputs]
        count, n = len(self.inputs), self.tensor_bytes
        return {
            "forward": (2 * n, lambda i: normalize_and_rotate(*self.inputs[i % count], self.norm, angles)),
            "backward": (
                (2 if self.norm is None else 3) * n,
                lambda i: self.backward(results[i % count], self.inputs[i % count], self.norm),
            ),
        }

    def errors(self) -> dict[str, tuple[float, float]]:
        """For each direction the relative error, and the one allowed."""
        exact, eager, found = (self._results(dtype, impl) for dtype, impl in _WAYS)
        return {
            name: (_error(found[name], exact[name]), ERROR_FACTOR * _error(eager[name], exact[name])) for name in exact
        }

    def _results(self, dtype: torch.dtype, impl: Impl) -> dict[str, Sequence[Tensor]]:
        inputs = _leaves([x.to(dtype) for x in self.inputs[0]])
        norm = None
        if self.norm is not None:
            gains = [None if x is None else x.detach().to(dtype).requires_grad_() for x in self.norm[1:3]]
            norm = HeadNorm(self.norm.kind, gains[0], gains[1])
        results = normalize_and_rotate(*inputs, norm, self.angles(inputs), impl=impl)
        return {"forward": results, "backward": self.backward(results, inputs, norm)}


_WAYS: tuple[tuple[torch.dtype, Impl], ...] = ((torch.float64, "eager"), (DTYPE, "eager"), (DTYPE, "auto"))


def _leaves(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Both tensors with their strides, and gradients of their own."""
    first, second = (x.detach().requires_grad_() for x in tensors)
    return first, second


def _head_norm(w: Workload, kind: str, device: torch.device) -> HeadNorm | None:
    """A normalisation whose gains are those that layers start with."""
    if kind == "cosine":
        return HeadNorm(kind, torch.full((w.heads,), 10.0, device=device, dtype=DTYPE).requires_grad_(), None)
    if kind == "rms":
        query_gain, key_gain = _leaves([torch.ones(w.head_dim, device=device, dtype=DTYPE)] * 2)
        return HeadNorm(kind, query_gain, key_gain)
    return None


def _gains(norm: HeadNorm | None) -> list[Tensor]:
    return [] if norm is None else [x for x in norm[1:3] if x is not None]


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of several tensors."""
    pairs = zip(found, exact, strict=True)
    return max(float((x.detach().double() - y.detach()).norm() / y.detach().norm()) for x, y in pairs)


def measure(workload: Workload, norm: str, rates: Rates, budget_s: float, device: torch.device) -> Iterator[Row]:
    problem = Problem(workload, norm, device)
    errors, calls = problem.errors(), problem.calls()
    rows = {name: Row(workload.name, norm, name, size, *errors[name]) for name, (size, _) in calls.items()}
    for row in rows.values():
        row.failure = wrong_result(row.error, row.allowed)
    correct = {name: call for name, (_, call) in calls.items() if rows[name].failure is None}
    for name, sample in timing.measure(correct, device, budget_s).items():
        row = rows[name]
        row.take(sample)
        row.of_copy = row.bytes / sample.median / rates.copy
    yield from rows.values()


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"| workload | normalisation | pass | ms | p10 - p90 | of copy bandwidth (goal {GOAL:.0%}) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.workload, row.norm, row.direction]
        if row.failure or row.median_ms is None or row.of_copy is None:
            cells += ["-", "-", row.failure or ""]
        else:
            cells += [f"{row.median_ms:.3g}", row.spread, f"{row.of_copy:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a result was wrong."""
    parser = runner.make_parser("rotation", __doc__, budget_s=0.2, timed="each workload and normalisation")
    runner.add_names(parser, "--workloads", WORKLOADS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    report = runner.Report(args, device)
    rows: list[Row] = []
    for name in args.workloads:
        workload = smoke(WORKLOADS[name]) if args.smoke else WORKLOADS[name]
        for norm in NORMS:
            rows += measure(workload, norm, report.rates, args.budget_s, device)
            report.keep(rows=rows)
    print(report.text(table(rows)))
    return int(any(row.failure for row in rows))


if __name__ == "__main__":
    sys.exit(runner.command(main))
