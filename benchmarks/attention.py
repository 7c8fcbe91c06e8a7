"""Time neighborhood attention and its peers on the anchor workloads: ``python -m benchmarks.attention --help``.

Prints a table and writes it as JSON. A result that fails its correctness check gets no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from . import runner, timing
from .host import host_times
from .implementations import FLEX_ORDERS, OURS, PEERS, Implementation, implementations
from .runner import Row
from .workloads import MODES, WORKLOADS, Variant, Workload, smoke


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if this library failed anywhere."""
    args = _parse(argv)
    device = torch.device(args.device)
    workloads = [smoke(WORKLOADS[name]) if args.smoke else WORKLOADS[name] for name in args.workloads]

    def entries_of(workload: Workload) -> Iterator[Implementation | tuple[str, str]]:
        return implementations(workload, _variants(workload, args), args.peers, args.flex_order, device)

    if args.compile_only:
        for workload in workloads:
            runner.compile_ahead(workload, entries_of(workload), args.modes, device)
        return 0
    runner.compile_in_processes("attention", args, args.workloads, lambda share: _flags(args, share))
    rates = runner.Rates(
        args.copy_rate or timing.copy_rate(device),
        args.matmul_rate or timing.matmul_rate(device),
    )
    report = runner.Report(args, device, rates)
    if args.host:
        host_us = host_times(device)
        report.keep(host_us=host_us)
        print("host us per call:", json.dumps(host_us), flush=True)
    rows: list[Row] = []
    for workload in workloads:
        for mode in args.modes:
            rows += runner.run(workload, mode, entries_of(workload), rates, args.budget_s, device)
            report.keep(rows=rows)
    print(report.text(_table(rows)))
    return int(any(row.failure and row.peer == OURS for row in rows))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runner.make_parser("attention", __doc__, budget_s=1.0, timed="each workload and mode", jobs=True)
    runner.add_names(parser, "--workloads", WORKLOADS)
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="default: %(default)s")
    runner.add_names(parser, "--peers", PEERS, none=True)
    runner.add_names(parser, "--flex-order", FLEX_ORDERS)
    parser.add_argument("--registers", type=int, default=0, help="also run with so many register tokens")
    parser.add_argument("--sink", choices=("zero", "learned"), help="also run with a sink")
    parser.add_argument("--copy-rate", type=float, help="bytes/s, read plus written; measured by default")
    parser.add_argument("--matmul-rate", type=float, help="bf16 FLOP/s; measured by default")
    parser.add_argument("--host", action="store_true", help="also measure the host's time per call")
    args = parser.parse_args(argv)
    args.modes = list(MODES) if args.mode == "both" else [args.mode]
    return args


def _flags(args: argparse.Namespace, workloads: Sequence[str]) -> list[str]:
    """The flags of a process that compiles what these workloads take."""
    lists = {"workloads": workloads, "peers": args.peers, "flex-order": args.flex_order}
    flags = [f"--{name}={','.join(values)}" for name, values in lists.items()]
    sink = [f"--sink={args.sink}"] if args.sink else []
    return [*flags, f"--mode={args.mode}", f"--registers={args.registers}", *sink]


def _variants(workload: Workload, args: argparse.Namespace) -> list[Variant]:
    base = workload.variant
    variants = [base]
    if args.registers:
        variants.append(replace(base, registers=args.registers))
    if args.sink and args.sink != base.sink:
        variants.append(replace(base, sink=args.sink))
    return variants


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
    sys.exit(runner.command(main))
