"""Time forward-mode derivatives against the forward pass: ``python -m benchmarks.forward_mode --help``.

``jvp`` is ``torch.func.jvp`` of the operation with tangents of query, key and value: it computes the output and its
tangent. Beside it, on a full window, runs the public kernel for dense attention, ``jvp-flash-attention``, if it is
installed. Tangents of sampled queries are compared with the formula in fp64; a result that errs more than twice as much
as the formula with the roundings that a kernel makes gets no time. The forward pass beside it is one without gradients,
which in bf16 may be faster than one for them, as it finds no maxima of rows; tangents find them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from natten_layers import neighborhood_attention
from natten_layers.geometry import window_bounds

from . import runner, timing
from .check import ERROR_FACTOR, wrong_result
from .workloads import WORKLOADS, Workload, make_inputs, smoke

FULL = Workload("full-4k", 4, (4096,), 16, 16, 64, (4096,))
PROBLEMS = {w.name: w for w in (*(WORKLOADS[name] for name in ("hdit-l0", "hdit-gqa", "flux-4k", "mistral")), FULL)}
PEER = "jvp-flash-attention"
GOAL = 2.2
"""times the forward pass"""
SAMPLES = 32

Heads = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Row(timing.Timed):
    workload: str
    implementation: str
    error: float | None = None
    allowed: float | None = None
    times_forward: float | None = None
    """Its own forward pass"""
    peak_mib: float | None = None
    """Beyond the inputs, results included"""


def tangent_at(
    workload: Workload, primals: Heads, tangents: Heads, at: tuple[int, ...], *, rounding: bool
) -> Tensor:  # fmt: skip
    """The tangent of the output ``[Dv]`` at ``(batch, *position, head)``, in fp64.

    With ``rounding``, weights, weighted tangents of scores and the output are rounded to the dtype of the inputs.
    """
    batch, *position, head = at
    axes = zip(position, workload.spatial, workload.kernel_size, workload.window.is_causal, strict=True)
    bounds = [window_bounds(i, length, kernel, 1, causal) for i, length, kernel, causal in axes]
    window = tuple(slice(first, last + 1) for first, last in bounds)
    kv_head = head * workload.kv_heads // workload.heads
    (q, qd), pairs = (x[0][at].double() for x in (primals, tangents)), (primals, tangents)
    k, kd = (x[1][(batch, *window, kv_head)].flatten(0, -2).double() for x in pairs)
    v, vd = (x[2][(batch, *window, kv_head)].flatten(0, -2).double() for x in pairs)

    def rounded(x: Tensor) -> Tensor:
        return x.to(primals[0].dtype).double() if rounding else x

    weights = (workload.scale * k @ q).softmax(0)
    moving = workload.scale * (k @ qd + kd @ q)
    own = tuple(i - first for i, (first, _) in zip(position, bounds, strict=True))
    moving = moving - moving.unflatten(0, [last - first + 1 for first, last in bounds])[own]
    weighted, out = weights * moving, rounded(rounded(weights) @ v)
    return rounded(rounded(weighted) @ v + rounded(weights) @ vd - weighted.sum() * out)


def sampled(workload: Workload, seed: int = 0) -> list[tuple[int, ...]]:
    """Indices ``(batch, *position, head)``: both corners, then random ones."""
    generator = torch.Generator().manual_seed(seed)
    sizes = workload.batch, *workload.spatial, workload.heads
    drawn = [tuple(int(torch.randint(n, (), generator=generator)) for n in sizes) for _ in range(SAMPLES - 2)]
    return [(0,) * len(sizes), tuple(n - 1 for n in sizes), *drawn]


def errors(workload: Workload, primals: Heads, tangents: Heads, found: Tensor) -> tuple[float, float]:
    """Relative error of the sampled tangents, and the error allowed."""
    at = sampled(workload)
    exact, rounded = (
        torch.stack([tangent_at(workload, primals, tangents, i, rounding=r) for i in at]) for r in (False, True)
    )
    got = torch.stack([found[i].double() for i in at])
    error, twin = ((x - exact).norm().item() / exact.norm().item() for x in (got, rounded))
    return error, ERROR_FACTOR * twin


def peer_attention() -> Attention | None:
    """The public dense kernel on heads that come last, or None if it is not installed."""
    if importlib.util.find_spec("jvp_flash_attention") is None:
        return None
    from jvp_flash_attention.jvp_attention import JVPAttn  # pyright: ignore[reportMissingImports]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return JVPAttn.fwd_dual(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


def implementations(workload: Workload) -> dict[str, Attention | None]:
    """Implementations by name; None if one is missing."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, workload.kernel_size, is_causal=workload.causal)

    return {"natten_layers": ours} | ({PEER: peer_attention()} if workload.name == FULL.name else {})


def draw(workload: Workload, device: torch.device, seed: int) -> Heads:
    inputs = make_inputs(workload, device, seed)
    return inputs.query, inputs.key, inputs.value


@torch.no_grad()
def measure(workload: Workload, device: torch.device, budget_s: float) -> list[Row]:
    # Two copies of the inputs take turns: together they exceed the L2 cache.
    inputs = [(draw(workload, device, seed), draw(workload, device, seed + 2)) for seed in range(2)]
    rows: dict[str, Row] = {}
    calls: dict[str, timing.Call] = {}
    for name, attend in implementations(workload).items():
        forward, jvp = (Row(workload.name, f"{name} {mode}") for mode in ("forward", "jvp"))
        rows |= {row.implementation: row for row in (forward, jvp)}
        if attend is None:
            forward.failure = jvp.failure = "not installed"
            continue

        def run_forward(i: int, attend: Attention = attend) -> Tensor:
            return attend(*inputs[i % 2][0])

        def run_jvp(i: int, attend: Attention = attend) -> tuple[Tensor, Tensor]:
            out, tangent, *_ = torch.func.jvp(attend, *inputs[i % 2])
            return out, tangent

        try:
            _, tangent = run_jvp(0)
            jvp.error, jvp.allowed = errors(workload, *inputs[0], tangent)
            del tangent
            jvp.failure = wrong_result(jvp.error, jvp.allowed)
            if jvp.failure is not None:
                continue
            for row, call in ((forward, run_forward), (jvp, run_jvp)):
                peak = timing.peak_bytes(call, device)
                row.peak_mib = None if peak is None else peak / 2**20
                calls[row.implementation] = call
        except Exception as error:  # the peer's error must not stop the rest
            jvp.failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    for name, sample in timing.measure(calls, device, budget_s).items():
        row = rows[name]
        row.take(sample)
        own = rows[f"{name.split()[0]} forward"].median_ms
        row.times_forward = None if own is None else 1e3 * sample.median / own
    return list(rows.values())


def table(rows: list[Row]) -> list[str]:
    """One line for each workload and kernel: its own forward pass, then the same with tangents."""
    lines = [
        f"| workload | kernels | forward, ms | with tangents, ms | p10 - p90 | x own forward (goal: {GOAL}) "
        "| MiB | with tangents | error (allowed) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = {(row.workload, row.implementation): row for row in rows}
    for (workload, name), jvp in found.items():
        kernels = name.removesuffix(" jvp")
        if kernels == name:
            continue
        forward = found[workload, f"{kernels} forward"]
        cells = [workload, kernels, *[""] * 6, jvp.failure or "not timed"]
        if forward.median_ms is not None and jvp.median_ms is not None:
            error = "" if jvp.error is None else f"{jvp.error:.2g} ({jvp.allowed:.2g})"
            spread, ratio = jvp.spread, f"{jvp.times_forward:.2f}"
            peaks = ("" if row.peak_mib is None else f"{row.peak_mib:.0f}" for row in (forward, jvp))
            cells[2:] = [f"{forward.median_ms:.3g}", f"{jvp.median_ms:.3g}", spread, ratio, *peaks, error]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@torch.no_grad()
def compile_ahead(workload: Workload, device: torch.device) -> None:
    """Call everything once, so that its kernels are in Triton's cache on disk."""
    primals, tangents = (draw(workload, device, seed) for seed in range(2))
    for name, attend in implementations(workload).items():
        if attend is not None:
            with runner.reporting(f"{workload.name} {name}"):
                attend(*primals)
                torch.func.jvp(attend, primals, tangents)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if this library failed anywhere."""
    parser = runner.make_parser("forward_mode", __doc__, budget_s=1.0, timed="each workload", jobs=True)
    runner.add_names(parser, "--workloads", PROBLEMS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    workloads = [smoke(PROBLEMS[name]) if args.smoke else PROBLEMS[name] for name in args.workloads]
    if args.compile_only:
        for workload in workloads:
            compile_ahead(workload, device)
        return 0
    runner.compile_in_processes("forward_mode", args, args.workloads, lambda share: ["--workloads", ",".join(share)])
    report = runner.Report(args, device)
    rows: list[Row] = []
    for workload in workloads:
        found = measure(workload, device, args.budget_s)
        rows += found
        report.keep(rows=rows)
        print("\n".join(table(found)[2:]), flush=True)
    print(report.text(table(rows)))
    return int(any(row.failure for row in rows if not row.implementation.startswith(PEER)))


if __name__ == "__main__":
    sys.exit(runner.command(main))
