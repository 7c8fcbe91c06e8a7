"""Time your own problem beside its floor and peers: ``python -m benchmarks.problem --help``.

    python -m benchmarks.problem 128x128 --kernel-size 7x7 --heads 8 --kv-heads 2 --head-dim 64 --batch 8
    python -m benchmarks.problem 16384 --kernel-size 1024 --causal --heads 32 --head-dim 128 --peers fa2,flex

Flags are those of ``natten-layers-tune``, and options of the operation. Results are checked against fp64 first, and a
wrong one gets no time. Prints the census' table for this one problem, with the kernels that computed it, then what the
census on record has of other shapes, to compare with, and writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from natten_layers import explain
from natten_layers.io.files import read_json
from natten_layers_cli.tune import DTYPES, add_flags_of_call, axes, check_axes, spread

from . import census, runner
from .regression import RECORD
from .workloads import Workload, smoke

NAME = "yours"
"""The problem's name in the table"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if this library failed."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    workload = _workload(parser, args, device)
    record = read_json(RECORD)
    report, rows = runner.Report(args, device), []
    for row in census.timed(workload, args, report.rates, device):
        rows.append(row)
        report.keep(rows=census.as_records(rows))
    beside = [f"\nThe census on record, of one {record['environment']['device']}:", *census.summary(record["rows"])]
    failures = runner.failures([row for row, _ in rows])
    print(report.text([*census.table(rows, {NAME: workload}), *failures, *beside]))
    return int(census.failed(rows))


def _parser() -> argparse.ArgumentParser:
    parser = runner.make_parser("problem", __doc__, budget_s=0.5, timed="each mode")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("tokens", type=axes, help="length of every axis: 4096, 128x128, 30x48x80")
    add_flags_of_call(parser)
    parser.add_argument("--value-dim", type=int, help="elements of a value head; default: --head-dim")
    parser.add_argument("--stride", type=axes, metavar="S", help="default: 1")
    for flag, what in (("--causal", "windows end at the query"), ("--periodic", "windows wrap around")):
        parser.add_argument(
            flag, type=_switches, nargs="?", const=(1,), metavar="AXES",
            help=f"{what}: on all axes, or on those with a 1 in 1x0x0",
        )  # fmt: skip
    parser.add_argument("--registers", type=int, default=0, help="additional keys that all queries see")
    parser.add_argument("--learned-sink", action="store_true", help="a learned sink for each query head")
    parser.add_argument("--bias", action="store_true", help="a learned bias on relative positions (rpb)")
    census.add_flags(parser)
    return parser


def _switches(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if set(parts) - {"0", "1"}:
        raise argparse.ArgumentTypeError(f"expected 0 or 1 for each axis, such as 1x0x0, got {text}; put tokens first")
    return tuple(map(int, parts))


def _workload(parser: argparse.ArgumentParser, args: argparse.Namespace, device: torch.device) -> Workload:
    """The problem of the flags; ends with a usage error where the operation refuses it or has no kernels for it."""
    census.settle(args)
    if args.kernel_size is None or args.heads is None:
        parser.error("--kernel-size and --heads are needed")
    check_axes(parser, args, "kernel_size", "dilation", "stride", "causal", "periodic")
    least = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 1, "value_dim": 1, "registers": 0}
    for name, limit in least.items():
        if (value := getattr(args, name)) is not None and value < limit:
            parser.error(f"--{name.replace('_', '-')} must be at least {limit}, got {value}")
    rank = len(args.tokens)
    kernel_size, stride, dilation = (spread(v or (1,), rank) for v in (args.kernel_size, args.stride, args.dilation))
    causal, periodic = (tuple(map(bool, spread(v or (0,), rank))) for v in (args.causal, args.periodic))
    workload = Workload(
        NAME, args.batch, args.tokens, args.heads, args.kv_heads or args.heads, args.head_dim or 64, kernel_size,
        causal, args.learned_sink, stride, dilation, args.value_dim, args.registers, DTYPES[args.dtype], periodic,
        bias=args.bias,
    )  # fmt: skip
    try:
        why_eager = _why_eager(workload, device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if why_eager is not None and device.type == "cuda":
        parser.error(f"there are no kernels for this problem: {why_eager}")
    return smoke(workload) if args.smoke else workload


def _why_eager(workload: Workload, device: torch.device) -> str | None:
    """What :func:`natten_layers.explain` says of the call, all of whose arguments it checks."""
    tensors = {name: t for name, t in census.tensors_of(workload)._asdict().items() if t is not None}
    options: dict[str, Any] = {name: torch.empty_like(t, device=device) for name, t in tensors.items()}
    options |= {name: getattr(workload, name) for name in ("kernel_size", "stride", "dilation")}
    options |= {"is_causal": workload.causal, "is_periodic": workload.periodic}
    return explain(**options).why_eager


if __name__ == "__main__":
    sys.exit(runner.command(main))
