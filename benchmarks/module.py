"""Time a layer without its projections against the bare operation: ``python -m benchmarks.module --help``.

Three ways are timed, from the output of ``qkv`` to the input of ``proj``, and their launches counted:
``NeighborhoodGQA`` with cosine normalisation and axial RoPE, the bare operation on heads that are already normalised
and rotated, and the operation after both steps in PyTorch. A result whose error exceeds twice that of the steps in
PyTorch gets no time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natten_layers import neighborhood_attention
from natten_layers.modules import AxialRoPE, NeighborhoodGQA, make_axial_pos
from natten_layers.modules.query_key import HeadNorm, normalize_and_rotate
from natten_layers.modules.rope import angles_of
from natten_layers.operations import Impl

from . import runner, timing
from .check import ERROR_FACTOR, Reference, wrong_result
from .shapes import CENSUS
from .workloads import DTYPE, Inputs, Workload, smoke
from .workloads import WORKLOADS as ANCHORS

WORKLOADS = {
    name: (ANCHORS | CENSUS)[name]
    for name in ("hdit-l0", "hdit-l1", "hdit-gqa", "flux-4k", "hunyuan", "mid-2d", "sdxl-80", "video-3x5x5")
}
GOAL = 1.4
"""times the bare operation"""


@dataclass
class Row(timing.Timed):
    workload: str
    implementation: str
    error: float
    allowed: float
    launches: int | None
    """Number of kernel launches, None without a GPU."""
    times_bare: float | None = None


def positions_of(spatial: Sequence[int], device: torch.device) -> Tensor:
    """Coordinates ``[*spatial, axes]`` of an image as HDiT has them, and of a video those of its axes from -1 to 1."""
    if len(spatial) == 2:
        return make_axial_pos(*spatial, device=device)
    axes = [torch.linspace(-1, 1, n, device=device) for n in spatial]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def axial_rope(w: Workload) -> AxialRoPE:
    """That of a layer for a workload."""
    return AxialRoPE(w.head_dim, w.heads, num_kv_heads=w.kv_heads, axes=len(w.spatial))


class Problem:
    """One workload as input of a layer, and the steps of the layer."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload = w = workload
        rope = axial_rope(w)
        rows = (w.heads + 2 * w.kv_heads) * w.head_dim
        options: dict[str, Any] = {"num_kv_heads": w.kv_heads, "head_dim": w.head_dim, "scale": w.scale}
        layer = NeighborhoodGQA(rows, w.heads, w.kernel_size, qk_norm="cosine", rope=rope, **options)
        layer.register_module("qkv", nn.Identity())  # its output is the input
        self.rope, self.layer = rope.to(device), layer.to(device, DTYPE).eval()
        assert layer.qk_scale is not None
        # This gives the layer's default temperature of 10, since the operation multiplies by its scale too.
        nn.init.constant_(layer.qk_scale, 10 / w.scale)
        self.gain = layer.qk_scale.detach()
        self.positions = positions_of(w.spatial, device)
        generator = torch.Generator(device).manual_seed(0)
        shape = (w.batch, *w.spatial, rows)
        # So many copies of the input that none is still in the L2 cache when it is used again.
        copies = 2 if device.type == "cuda" else 1
        self.qkv = [torch.randn(shape, device=device, dtype=DTYPE, generator=generator) for _ in range(copies)]

    def heads(self, qkv: Tensor, impl: Impl) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and rotated heads as inputs of the operation, in the dtype of ``qkv``."""
        w = self.workload
        query, key, value = qkv.unflatten(-1, (-1, w.head_dim)).split((w.heads, w.kv_heads, w.kv_heads), -2)
        angles = angles_of(self.rope, query, key, self.positions)
        norm = HeadNorm("cosine", self.gain.to(qkv.dtype), None)
        return *normalize_and_rotate(query, key, norm, angles, impl=impl), value

    def attend(self, heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return neighborhood_attention(*heads, self.workload.kernel_size, scale=self.workload.scale)

    def calls(self) -> dict[str, Callable[[int], Tensor]]:
        """The calls to time, by name. Each returns ``[B, *spatial, Hq, D]`` for one of the inputs, which take turns."""
        ready = [tuple(t.contiguous() for t in self.heads(qkv, "auto")) for qkv in self.qkv]
        count = len(self.qkv)
        return {
            "layer": lambda i: self.layer.attend(self.qkv[i % count], positions=self.positions)[0].unflatten(
                -1, (self.workload.heads, -1)
            ),
            "bare operation": lambda i: self.attend(ready[i % count]),  # pyright: ignore[reportArgumentType]
            "steps in PyTorch": lambda i: self.attend(self.heads(self.qkv[i % count], "eager")),
        }

    def reference(self) -> Reference:
        query, key, value = self.heads(self.qkv[0].double(), "eager")
        return Reference(self.workload, Inputs(query, key, value, query), "fwd")


@torch.no_grad()
def measure(workload: Workload, device: torch.device, budget_s: float) -> list[Row]:
    problem = Problem(workload, device)
    reference, calls = problem.reference(), problem.calls()
    errors = {name: reference.errors({"out": call(0)})["out"][0] for name, call in calls.items()}
    allowed = ERROR_FACTOR * errors["steps in PyTorch"]
    rows = {
        name: Row(workload.name, name, errors[name], allowed, _launches(call, device)) for name, call in calls.items()
    }
    for row in rows.values():
        row.failure = wrong_result(row.error, allowed)
    correct = {name: call for name, call in calls.items() if rows[name].failure is None}
    for name, sample in timing.measure(correct, device, budget_s).items():
        row = rows[name]
        row.take(sample)
    bare = rows["bare operation"].median_ms
    for row in rows.values():
        if row.median_ms is not None and bare is not None:
            row.times_bare = row.median_ms / bare
    return list(rows.values())


def _launches(call: Callable[[int], Tensor], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    call(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call(0)
        torch.cuda.synchronize(device)
    return sum("CUDA" in str(event.device_type) for event in profile.events() or [])


def table(rows: list[Row]) -> list[str]:
    lines = [
        f"| workload | implementation | launches | ms | p10 - p90 | x bare (goal of the layer: {GOAL}) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.workload, row.implementation, "-" if row.launches is None else str(row.launches)]
        if row.failure or row.median_ms is None:
            cells += ["-", "-", row.failure or ""]
        else:
            cells += [f"{row.median_ms:.3g}", row.spread]
            cells += ["-" if row.times_bare is None else f"{row.times_bare:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@torch.no_grad()
def compile_ahead(workload: Workload, device: torch.device) -> None:
    """Call everything once, so that its kernels are in Triton's cache on disk."""
    for name, call in Problem(workload, device).calls().items():
        with runner.reporting(f"{workload.name} {name}"):
            call(0)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a result was wrong."""
    parser = runner.make_parser("module", __doc__, budget_s=0.5, timed="each workload", jobs=True)
    runner.add_names(parser, "--workloads", WORKLOADS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    workloads = [smoke(WORKLOADS[name]) if args.smoke else WORKLOADS[name] for name in args.workloads]
    if args.compile_only:
        for workload in workloads:
            compile_ahead(workload, device)
        return 0
    runner.compile_in_processes("module", args, args.workloads, lambda share: ["--workloads", ",".join(share)])
    report = runner.Report(args, device)
    rows: list[Row] = []
    for workload in workloads:
        rows += measure(workload, device, args.budget_s)
        report.keep(rows=rows)
    print(report.text(table(rows)))
    return int(any(row.failure for row in rows))


if __name__ == "__main__":
    sys.exit(runner.command(main))
