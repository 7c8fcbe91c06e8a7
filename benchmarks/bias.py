"""Time the bias on relative positions of NAT and DiNAT: ``python -m benchmarks.bias --help``.

The operation with a table of biases takes turns with the same call without one, with the operations of PyTorch that the
table needed before it was fused, and with compiled FlexAttention, whose ``score_mod`` reads the table and whose mask is
the exact neighborhood. The table's gradient is computed, too. A result that fails its check against fp64 gets no time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from natten_layers import neighborhood_attention

from . import runner
from .implementations import FLEX_ORDERS, OURS, Implementation, implementations
from .runner import Row
from .workloads import MODES, Inputs, Mode, Variant, Workload, smoke

PROBLEMS = {
    w.name: w
    for batch in (1, 64)
    for w in (
        # NAT-Base's stage 1 on pictures of 224x224 (arXiv 2204.07143), and wider windows over more tokens.
        Workload(f"nat-{batch}", batch, (56, 56), 4, 4, 32, (7, 7), bias=True),
        Workload(f"wide-{batch}", batch, (128, 128), 4, 4, 64, (13, 13), bias=True),
    )
}
PLAIN, EAGER, FLEX = "without bias", "eager", "flex"
WAYS = (PLAIN, OURS, EAGER, FLEX)


def ways(workload: Workload, wanted: Sequence[str], device: torch.device) -> Iterator[Implementation | tuple[str, str]]:
    """This library with the bias, then the other ways that are wanted."""
    biased, *flex = implementations(workload, [workload.variant], [FLEX] * (FLEX in wanted), list(FLEX_ORDERS), device)
    assert isinstance(biased, Implementation)
    yield replace(biased, name=OURS)
    if PLAIN in wanted:
        yield replace(biased, name=PLAIN, peer=PLAIN, variant=Variant(), workload=replace(workload, bias=False))

    def eager(inputs: Inputs) -> Tensor:
        qkv = inputs.query, inputs.key, inputs.value
        return neighborhood_attention(*qkv, workload.kernel_size, rpb=inputs.rpb, impl="eager")

    if EAGER in wanted:
        yield replace(biased, name=EAGER, peer=EAGER, forward=eager)
    yield from flex


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of each way's time, of FlexAttention the better order's, then what failed."""
    groups: dict[tuple[str, Mode], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.mode), []).append(row)
    head = ["workload", "pass", "floor, ms", *(f"{way}, ms" for way in WAYS), "beside no bias", "x floor"]
    lines = [
        f"| {' | '.join([*head, f'{EAGER} / ours', f'{FLEX} / ours'])} |",
        f"|{'---|' * (len(head) + 2)}",
    ]
    for (name, mode), found in groups.items():
        times = [_best(found, way) for way in WAYS]
        plain, own, *others = times
        cells = [name, mode, f"{found[0].floor_ms:.3g}", *("-" if ms is None else f"{ms:.3g}" for ms in times)]
        cells += [_ratio(own, plain), _ratio(own, found[0].floor_ms), *(_ratio(other, own) for other in others)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + [f"{row.workload} {row.mode}, {row.implementation}: {row.failure}" for row in rows if row.failure]


def _best(rows: Sequence[Row], peer: str) -> float | None:
    return min((row.median_ms for row in rows if row.peer == peer and row.median_ms is not None), default=None)


def _ratio(ms: float | None, other: float | None) -> str:
    return "-" if ms is None or other is None else f"{ms / other:.2f}"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if this library failed anywhere."""
    parser = runner.make_parser("bias", __doc__, budget_s=0.4, timed="each problem and mode", jobs=True)
    runner.add_names(parser, "--problems", PROBLEMS)
    runner.add_names(parser, "--ways", [way for way in WAYS if way != OURS], none=True)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    workloads = [smoke(PROBLEMS[name]) if args.smoke else PROBLEMS[name] for name in args.problems]
    if args.compile_only:
        for workload in workloads:
            runner.compile_ahead(workload, ways(workload, args.ways, device), MODES, device)
        return 0
    flags = ["--ways", ",".join(args.ways)]
    runner.compile_in_processes("bias", args, args.problems, lambda share: [*flags, "--problems", ",".join(share)])
    report = runner.Report(args, device)
    rows: list[Row] = []
    for workload in workloads:
        for mode in MODES:
            rows += runner.run(workload, mode, ways(workload, args.ways, device), report.rates, args.budget_s, device)
            report.keep(rows=rows)
    print(report.text(table(rows)))
    return int(any(row.failure for row in rows if row.peer in (OURS, PLAIN, EAGER)))


if __name__ == "__main__":
    sys.exit(runner.command(main))
