"""Whether calls take the fastest kernel on shapes that nobody tuned for: ``python -m benchmarks.choice --help``.

Draws ``--count`` random problems, and times every variant that can compute a kernel of theirs beside the one that calls
take: the forward kernel in a forward pass, and each gradient's in a backward pass, whose other kernels stay as they
are. Prints one table, sorted by how many times longer the chosen kernel takes than the fastest one, and writes JSON.
``--no-rivals`` times the chosen kernels alone, which leaves time for more problems, and puts first what is far from its
floor. Results are checked against fp64 first, and a wrong one gets no time. Kernels are compiled beforehand in
``--jobs`` processes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from natten_layers import compile_ahead
from natten_layers.kernels.host.tiling import Kind
from natten_layers.kernels.host.variant import Question
from natten_layers.tune import rivals

from . import census, runner
from .implementations import Implementation, implementations, overridden
from .random_shapes import draw
from .runner import Row
from .workloads import Mode, Workload, smoke

KERNELS: Mapping[Mode, tuple[Kind, ...]] = {"fwd": ("forward",), "bwd": ("backward_query", "backward_key")}
CHOSEN = "chosen"
LIMIT = 1.1
"""The times of the fastest variant above which a choice is counted as a mistake"""
COMPILING = 0.6
"""The part of ``--limit-s`` after which no other problem is compiled beforehand"""

Rivals = Mapping[Kind, Sequence[str]]
"""For each kernel of a pass all variants that can compute it, first the one that calls take"""


@dataclass(frozen=True)
class Regret:
    """The chosen variant of one kernel beside the fastest one. Times are those of the kernel's pass, in ms."""

    problem: str
    shape: str
    kernel: Kind
    chosen: str
    chosen_ms: float
    fastest: str
    fastest_ms: float
    times_floor: float
    """Of the pass, with the chosen variants"""

    @property
    def ratio(self) -> float:
        return self.chosen_ms / self.fastest_ms


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a call failed with the kernels that it takes, or if there was no time for any."""
    args = _parse(argv)
    device = torch.device(args.device)
    start = time.monotonic()
    if args.compile_only:
        for number in args.problems:
            if time.monotonic() - start <= args.limit_s:
                _compile(_problem(args, number), device, args.rivals)
        return 0
    flags = ["--seed", str(args.seed), "--limit-s", str(COMPILING * args.limit_s)]
    flags += [] if args.rivals else ["--no-rivals"]
    numbers = list(map(str, args.problems))
    runner.compile_in_processes("choice", args, numbers, lambda share: [*flags, "--problems", ",".join(share)])
    report = runner.Report(args, device)
    rows: list[Row] = []
    found: list[Regret] = []
    skipped: list[str] = []
    for number in args.problems:
        workload = _problem(args, number)
        if time.monotonic() - start > args.limit_s:
            skipped.append(workload.name)
            continue
        _compile(workload, device, args.rivals)
        for mode in KERNELS:
            known = rivals_of(workload, mode, device, args.rivals)
            timed = runner.run(workload, mode, entries(workload, known, device), report.rates, args.budget_s, device)
            rows += timed
            found += regrets(census.shape(workload), timed, known)
        report.keep(rows=rows, regrets=[{**asdict(one), "ratio": one.ratio} for one in found])
    if not rows:
        print(runner.no_time(args), file=sys.stderr)
        return 1
    report.keep(skipped=skipped)
    late = [f"\nout of time before {', '.join(skipped)}"] if skipped else []
    print(report.text([*table(found), *runner.failures(rows), *late]))
    return int(any(row.failure for row in rows if row.implementation == CHOSEN))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runner.make_parser("choice", __doc__, budget_s=0.2, timed="each pass of a problem", jobs=True)
    parser.add_argument("--seed", type=int, default=0, help="of the problems, default %(default)s")
    parser.add_argument("--count", type=int, default=40, help="number of problems, default %(default)s")
    parser.add_argument("--problems", help="numbers of problems, comma-separated; default: the first --count")
    runner.add_limit(parser, "problem")
    parser.add_argument(
        "--rivals",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time all variants, rather than only those that calls take",
    )
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count takes a number from 1 on, got {args.count}")
    numbers = [str(n) for n in range(args.count)] if args.problems is None else args.problems.split(",")
    if not all(n.isascii() and n.isdecimal() for n in numbers):
        parser.error(f"--problems takes numbers such as 3,17, got {args.problems}")
    args.problems = list(dict.fromkeys(map(int, numbers)))
    return args


def _problem(args: argparse.Namespace, number: int) -> Workload:
    workload = draw(args.seed, number)
    return smoke(workload) if args.smoke else workload


def rivals_of(workload: Workload, mode: Mode, device: torch.device, others: bool = True) -> Rivals:
    """All variants, or without ``others`` those that calls take."""
    if device.type != "cuda":
        return {kind: ["eager"] for kind in KERNELS[mode]}
    problem, _ = census.problem_of_call(workload, device)
    question = Question(problem) if mode == "fwd" else Question(problem, True, problem.out)
    return {kind: rivals(kind, question)[: None if others else 1] for kind in KERNELS[mode]}


def entries(workload: Workload, known: Rivals, device: torch.device) -> Iterator[Implementation]:
    """A pass with the kernels that calls take, and with each other variant of each kernel."""
    (own,) = implementations(workload, [workload.variant], [], [], device)
    assert isinstance(own, Implementation)
    yield replace(own, name=CHOSEN)
    for kind, (_, *others) in known.items():
        for name in others:
            yield replace(own, name=_entry(kind, name), context=partial(overridden, variants={kind: name}))


def _entry(kind: Kind, variant: str) -> str:
    return f"{kind} {variant}"


def _compile(workload: Workload, device: torch.device, others: bool) -> None:
    """Compile all kernels of a problem, or load them if they are on disk, in threads."""
    with runner.reporting(workload.name), compile_ahead():
        for mode in KERNELS:
            known = rivals_of(workload, mode, device, others)
            runner.compile_ahead(workload, entries(workload, known, device), [mode], device)


def regrets(shape: str, rows: Sequence[Row], known: Rivals) -> Iterator[Regret]:
    """For each kernel of a pass what its choice cost. What failed has no time, and cannot be the fastest."""
    by_name = {row.implementation: row for row in rows}
    own = by_name[CHOSEN]
    if own.median_ms is None or own.times_floor is None:
        return
    for kind, (chosen, *others) in known.items():
        times = {chosen: own.median_ms}
        times |= {name: ms for name in others if (ms := by_name[_entry(kind, name)].median_ms) is not None}
        fastest = min(times, key=lambda name: times[name])
        yield Regret(own.workload, shape, kind, chosen, times[chosen], fastest, times[fastest], own.times_floor)


def table(found: Sequence[Regret]) -> list[str]:
    """A Markdown table, the worst choice first, and a summary of each kernel's choices and each pass's floor."""
    lines = [
        "| problem | shape | kernel | chosen | ms | fastest | ms | chosen / fastest | x floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(found, key=lambda one: (-one.ratio, -one.times_floor)):
        cells = [one.problem, one.shape, one.kernel, one.chosen, f"{one.chosen_ms:.3g}"]
        cells += [one.fastest, f"{one.fastest_ms:.3g}", f"{one.ratio:.2f}", f"{one.times_floor:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for what in (*(kind for kinds in KERNELS.values() for kind in kinds), "all"):
        ratios = [one.ratio for one in found if what in (one.kernel, "all")]
        if ratios:
            middle, worse = statistics.median(ratios), sum(ratio > LIMIT for ratio in ratios)
            lines.append(f"\n{what}: choices {len(ratios)}, median {middle:.3f}, above {LIMIT} {worse}")
    for mode, kinds in KERNELS.items():
        floors = {one.problem: one.times_floor for one in found if one.kernel in kinds}
        if floors:
            middle, worst = statistics.median(floors.values()), max(floors.values())
            lines.append(f"\n{mode}: problems {len(floors)}, median {middle:.2f} times the floor, worst {worst:.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(runner.command(main))
