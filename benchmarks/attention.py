"""Time neighborhood attention and its peers on the anchor workloads: ``python -m benchmarks.attention --help``.

Prints a table and writes it as JSON. A result that fails its correctness check gets no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natten_layers import neighborhood_attention

from . import runner, timing
from .implementations import FLEX_ORDERS, OURS, PEERS, implementations
from .runner import Row
from .workloads import MODES, WORKLOADS, Variant, Workload, smoke


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if this library failed anywhere."""
    args = _parse(argv)
    device = torch.device(args.device)
    rates = runner.Rates(
        args.copy_rate or timing.copy_rate(device),
        args.matmul_rate or timing.matmul_rate(device),
    )
    report: dict[str, Any] = {
        "environment": timing.environment(device, args.commit),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "rates": asdict(rates),
        "rows": [],
    }
    if args.host:
        report["host_us"] = _host_times(device)
        print("host us per call:", json.dumps(report["host_us"]), flush=True)
    rows: list[Row] = []
    for name in args.workloads:
        workload = smoke(WORKLOADS[name]) if args.smoke else WORKLOADS[name]
        for mode in args.modes:
            entries = implementations(workload, _variants(workload, args), args.peers, args.flex_order, device)
            rows += runner.run(workload, mode, entries, rates, args.budget_s, device)
            report["rows"] = [asdict(row) for row in rows]
            runner.save(report, args.out)  # after every step, so that an interrupted run keeps its results
    print(f"\n{runner.heading(report)}\n")
    print("\n".join(_table(rows)))
    print(f"\nwritten to {args.out}")
    return int(any(row.failure and row.peer == OURS for row in rows))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    def names(valid: tuple[str, ...]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            chosen = [part for part in text.split(",") if part]
            unknown = set(chosen) - set(valid)
            if unknown:
                raise argparse.ArgumentTypeError(f"unknown {sorted(unknown)}; choose from {', '.join(valid)}")
            return chosen

        return split

    parser = runner.make_parser("attention", __doc__, budget_s=1.0, timed="each workload and mode")
    workloads = tuple(WORKLOADS)
    parser.add_argument("--workloads", type=names(workloads), default=list(workloads), help="names, comma-separated")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--peers", type=names(PEERS), default=list(PEERS), help='names, comma-separated, or ""')
    parser.add_argument("--flex-order", type=names(FLEX_ORDERS), default=list(FLEX_ORDERS))
    parser.add_argument("--registers", type=int, default=0, help="also run with so many register tokens")
    parser.add_argument("--sink", choices=("zero", "learned"), help="also run with a sink")
    parser.add_argument("--copy-rate", type=float, help="bytes/s, read plus written; measured by default")
    parser.add_argument("--matmul-rate", type=float, help="bf16 FLOP/s; measured by default")
    parser.add_argument("--host", action="store_true", help="also measure the host's time per call")
    args = parser.parse_args(argv)
    args.modes = list(MODES) if args.mode == "both" else [args.mode]
    return args


def _variants(workload: Workload, args: argparse.Namespace) -> list[Variant]:
    base = workload.variant
    variants = [base]
    if args.registers:
        variants.append(replace(base, registers=args.registers))
    if args.sink and args.sink != base.sink:
        variants.append(replace(base, sink=args.sink))
    return variants


def _host_times(device: torch.device) -> dict[str, float]:
    """Microseconds of host time per asynchronous call, at a size so small that the device is never waited for."""
    query, key, value = (torch.randn(1, 32, 32, 4, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    dense = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, 7)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    calls: dict[str, timing.Call] = {}
    for function, tensors in ((ours, (query, key, value)), (sdpa, dense)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        grad = torch.randn_like(query) if function is ours else torch.randn_like(dense[0])
        calls[f"{function.__name__} fwd"] = lambda _, f=function, t=tensors: f(*t)
        calls[f"{function.__name__} fwdbwd"] = lambda _, f=function, t=leaves, g=grad: torch.autograd.grad(f(*t), t, g)
    repeats = 50 if device.type == "cuda" else 3  # on the CPU, calls are not asynchronous, so this only tests the code
    for call in calls.values():
        timing.host_seconds(call, device, repeats)
    return {name: 1e6 * timing.host_seconds(call, device, repeats) for name, call in calls.items()}


def _table(rows: list[Row]) -> list[str]:
    lines = [
        "| workload | mode | implementation | ms | p10 - p90 | floor ms | x floor | peak MiB | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.median_ms is None:
            cells = ["", "", f"{row.floor_ms:.3g}", "", "", row.failure or ""]
        else:
            assert row.times_floor is not None
            peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
            spread = f"{row.p10_ms:.3g} - {row.p90_ms:.3g}"
            cells = [
                f"{row.median_ms:.3g}",
                spread,
                f"{row.floor_ms:.3g}",
                f"{row.times_floor:.2f}",
                peak,
                row.note or "",
            ]
        lines.append(f"| {' | '.join([row.workload, row.mode, row.implementation, *cells])} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
