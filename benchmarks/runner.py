"""Check, then time, any number of implementations of one workload side by side."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from natten_layers.io.files import replacing

from . import timing
from .check import Errors, Reference
from .implementations import OURS, Implementation
from .workloads import Inputs, Mode, Variant, Workload, add_variant, floor, make_inputs

__all__ = [
    "RESULTS",
    "RUNS",
    "Rates",
    "Report",
    "Row",
    "add_names",
    "at_least",
    "call",
    "command",
    "compile_ahead",
    "compile_in_processes",
    "failures",
    "heading",
    "make_parser",
    "names",
    "report_failures",
    "reporting",
    "run",
    "save",
    "statuses",
]

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs")
"""The folder of reports, unless they are to be a record in ``RESULTS``"""

NumberT = TypeVar("NumberT", int, float)
Outputs = Callable[[int], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Rates:
    """Measured rates of the machine."""

    copy: float
    """Bytes per second, read plus written."""
    matmul: float
    """Floating point operations per second in bf16."""


@dataclass
class Row:
    """One implementation on one workload. Times are in ms; all are None if ``failure`` gives a reason."""

    workload: str
    mode: Mode
    implementation: str
    peer: str
    variant: str
    floor_ms: float
    failure: str | None = None
    note: str | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    samples: int | None = None
    times_floor: float | None = None
    peak_mib: float | None = None
    first_call_s: float | None = None
    """Time of the first call, which includes compilation unless a cache on disk has the kernels."""
    errors: Errors | None = None


def run(
    workload: Workload,
    mode: Mode,
    entries: Iterable[Implementation | tuple[str, str]],
    rates: Rates,
    budget_s: float,
    device: torch.device,
) -> list[Row]:
    """One row for each entry, which is an implementation, or a name and the reason why it cannot run."""
    _free(device)  # memory of the previous workload
    floor_ms = 1e3 * floor(workload, mode).seconds(rates.copy, rates.matmul)
    # So many copies of small inputs that none is still in the L2 cache when it is used again.
    copies = 1 + (2 * timing.L2_BYTES if device.type == "cuda" else 1) // floor(workload, "fwd").bytes
    inputs = [make_inputs(workload, device, seed) for seed in range(copies)]
    packed: dict[str, list[Inputs]] = {}
    references: dict[tuple[Variant, Workload], Reference] = {}
    rows: dict[str, Row] = {}
    calls: dict[str, timing.Call] = {}
    for entry in entries:
        if not isinstance(entry, Implementation):
            name, reason = entry
            rows[name] = Row(workload.name, mode, name, name, "", floor_ms, failure=reason)
            print(f"{workload.name} {mode} {name}: {reason}", flush=True)
            continue
        row = rows[entry.name] = Row(workload.name, mode, entry.name, entry.peer, entry.variant.label, floor_ms)
        try:
            if entry.layout.name not in packed:
                packed[entry.layout.name] = [entry.pack(each) for each in inputs]
            own = [add_variant(each, entry.variant, seed) for seed, each in enumerate(packed[entry.layout.name])]
            problem = (entry.variant, entry.workload)
            if problem not in references:
                references[problem] = Reference(entry.workload, add_variant(inputs[0], entry.variant, 0), mode)
            run_once = call(entry, own, mode)
            row.first_call_s = timing.host_seconds(run_once, device, 1)
            _check(entry, run_once, mode, references[problem], row)
            if row.failure is None:
                row.peak_mib = _mib(timing.peak_bytes(run_once, device))
                calls[entry.name] = run_once
        except Exception as error:  # one implementation's error must not stop the others
            row.failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        if row.failure:
            _free(device)
        print(
            f"{workload.name} {mode} {entry.name}: {row.failure or f'checked, first call {row.first_call_s:.2f} s'}",
            flush=True,
        )
    for name, sample in timing.measure(calls, device, budget_s).items():
        rows[name] = _timed(rows[name], sample)
        print(f"{workload.name} {mode} {name}: {rows[name].median_ms:.4g} ms", flush=True)
    return list(rows.values())


def call(implementation: Implementation, inputs: list[Inputs], mode: Mode) -> Outputs:
    """A function that returns ``(out,)``, or ``(out, *gradients)`` with None where there is no gradient.

    For a backward pass alone, the forward passes are run here.
    """
    if mode == "fwd":

        def forward(i: int) -> tuple[Tensor]:
            with torch.no_grad(), implementation.context():
                return (implementation.forward(inputs[i % len(inputs)]),)

        return forward

    leaves = []
    for each in inputs:
        named = {n: t.detach().requires_grad_() for n, t in implementation.differentiated(each).items()}
        leaves.append((replace(each, **named), list(named.values())))

    def forward_backward(i: int) -> tuple[Tensor | None, ...]:
        each, wanted = leaves[i % len(leaves)]
        with implementation.context():
            out = implementation.forward(each)
            return out, *torch.autograd.grad(out, wanted, each.grad_out, allow_unused=True)

    if mode == "fwdbwd":
        return forward_backward
    with implementation.context():
        outs = [implementation.forward(each) for each, _ in leaves]

    def backward(i: int) -> tuple[Tensor | None, ...]:
        (each, wanted), out = leaves[i % len(leaves)], outs[i % len(leaves)]
        with implementation.context():
            return out, *torch.autograd.grad(out, wanted, each.grad_out, retain_graph=True, allow_unused=True)

    return backward


def _check(implementation: Implementation, call: Outputs, mode: Mode, reference: Reference, row: Row) -> None:
    """Fill in ``row.errors``, and ``row.failure`` if an error is too large."""
    names = ["out"]
    if mode != "fwd":
        names += [f"d_{name}" for name in implementation.differentiated(reference.inputs)]
    outputs = dict(zip(names, call(0), strict=True))
    results = {name: implementation.unpack(name, t.detach()) for name, t in outputs.items() if t is not None}
    if missing := sorted(set(names) - set(results)):
        row.note = f"without {', '.join(missing)}"
        if implementation.peer == OURS:
            row.failure = row.note
    row.errors = reference.errors(results)
    wrong = [f"{n} {error:.2g} > {allowed:.2g}" for n, (error, allowed) in row.errors.items() if not error <= allowed]
    if wrong:
        row.failure = f"wrong result, relative error {', '.join(wrong)}"
    elif implementation.workload.learned_sink and implementation.variant.sink is None:
        row.note = "without sinks"


def _timed(row: Row, sample: timing.Sample) -> Row:
    median, p10, p90 = (1e3 * t for t in (sample.median, sample.p10, sample.p90))
    return replace(
        row, median_ms=median, p10_ms=p10, p90_ms=p90, samples=sample.count, times_floor=median / row.floor_ms
    )


def failures(rows: Sequence[Row]) -> list[str]:
    """What has no time, and why."""
    failed = [f"- {row.workload} {row.mode} {row.implementation}: {row.failure}" for row in rows if row.failure]
    return ["\nnot timed:\n", *failed] if failed else []


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compile_ahead(
    workload: Workload,
    entries: Iterable[Implementation | tuple[str, str]],
    modes: Iterable[Mode],
    device: torch.device,
) -> None:
    """Call every implementation once, so that its kernels are in the caches on disk."""
    inputs = make_inputs(workload, device, 0)
    for entry, mode in itertools.product(entries, modes):
        if isinstance(entry, Implementation):
            with reporting(f"{workload.name} {mode} {entry.name}"):
                call(entry, [add_variant(entry.pack(inputs), entry.variant, 0)], mode)(0)
    del inputs
    _free(device)


@contextmanager
def reporting(what: str) -> Iterator[None]:
    """Print an error of a call that only compiles: the timed run will have it, too, and report it."""
    try:
        yield
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def compile_in_processes(
    name: str, args: argparse.Namespace, items: Sequence[str], flags: Callable[[Sequence[str]], Sequence[str]]
) -> None:
    """Run ``benchmarks.NAME --compile-only`` in ``args.jobs`` processes, each with the ``flags`` for a share of items.

    They fill Triton's cache on disk, so that kernels are compiled side by side. One job compiles as it goes.
    """
    check_out(args.out)  # before minutes of compiling
    if args.jobs == 1:
        return
    start = time.monotonic()
    words = [sys.executable, "-m", f"benchmarks.{name}", "--compile-only", "--device", args.device]
    words += ["--smoke"] if args.smoke else []
    shares = [items[i :: args.jobs] for i in range(args.jobs)]
    report_failures(statuses(subprocess.Popen([*words, *flags(share)]) for share in shares if share))
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)


def statuses(processes: Iterable[subprocess.Popen[bytes]]) -> list[int]:
    """The exit statuses of processes, started as they are iterated. They end with this one, where a signal ends it."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.extend(processes)
        return [process.wait() for process in started]
    finally:
        for process in started:  # nothing happens to those that have ended
            process.terminate()


def report_failures(found: Sequence[int]) -> None:
    """Say how many processes that compile beforehand failed."""
    if failed := sum(status != 0 for status in found):
        print(f"{failed} of {len(found)} processes failed to compile; calls compile what they left", file=sys.stderr)


def check_out(path: Path) -> None:
    """Raise an OSError where a report cannot be written."""
    from natten_layers_cli.outputs import output_gap

    if (reason := output_gap(path)) is not None:
        raise OSError(f"--out {path}{reason}")


def command(main: Callable[[], int]) -> int:
    """The exit status of a benchmark. What users, files and machines do wrong becomes one line on standard error."""
    from natten_layers_cli.running import run_command  # here, as ``host`` imports this beside packages of other commits

    return run_command(
        main,
        when_interrupted="interrupted; what was written before is kept",
        less_memory=["fewer rows at a time", "--smoke"],
    )


def make_parser(
    name: str, description: str | None, *, budget_s: float, timed: str, jobs: bool = False
) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have; ``timed`` describes what the time budget covers.

    With ``jobs`` it has those of commands that compile beforehand, in several processes, too.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--budget-s", type=at_least(0.0), default=budget_s, help=f"seconds to time {timed}, default %(default)s"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=device, help="cpu, cuda or cuda:N, default here %(default)s")
    parser.add_argument("--commit", help="to record where there is no git checkout")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: a test of the benchmark, not of speed")
    # Not over the records, which pages and other commands read: a run may be of some rows, or of tiny sizes.
    parser.add_argument("--out", type=Path, default=RUNS / f"{name}.json", help="JSON to write, default %(default)s")
    if jobs:
        parser.add_argument(
            "--jobs", type=at_least(1), default=1, help="processes that compile beforehand, default %(default)s"
        )
        parser.add_argument("--compile-only", action="store_true", help="call everything once, and time nothing")
    return parser


def _device(text: str) -> str:
    """The type of ``--device``. Flags here are parsed without the commands' parser, as ``host`` would import that from
    packages of other commits.
    """
    known = re.fullmatch(r"cpu|cuda(?::(\d+))?", text, re.ASCII)
    if known is None:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text}")
    count = torch.cuda.device_count()
    if text != "cpu" and int(known[1] or 0) >= count:
        raise argparse.ArgumentTypeError(
            f"{text}: this PyTorch finds {count or 'no'} CUDA device{'' if count < 2 else 's'}"
        )
    return text


def at_least(least: NumberT, *, finite: bool = True) -> Callable[[str], NumberT]:
    """The type of a flag that takes numbers like ``least`` from there on."""

    def convert(text: str) -> NumberT:
        try:
            value = type(least)(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from error
        if not value >= least or (finite and value == math.inf):
            raise argparse.ArgumentTypeError(f"must be {'finite and ' * finite}at least {least:g}, got {text}")
        return value

    return convert


def names(valid: Collection[str], *, none: bool = False) -> Callable[[str], list[str]]:
    """The type of a flag that takes names of ``valid``, comma-separated; with ``none`` an empty string, too."""

    def split(text: str) -> list[str]:
        chosen = [part for part in text.split(",") if part]
        if (unknown := sorted(set(chosen) - set(valid))) or not (chosen or none):
            what = f"unknown {', '.join(unknown)}" if unknown else "no name"
            raise argparse.ArgumentTypeError(f"{what}; choose from {', '.join(valid)}")
        return chosen

    return split


def add_names(parser: argparse.ArgumentParser, flag: str, valid: Collection[str], *, none: bool = False) -> None:
    """Add a flag that takes names of ``valid``, comma-separated, and by default all of them."""
    parser.add_argument(
        flag, type=names(valid, none=none), default=list(valid),
        help=f"of {', '.join(valid)}, comma-separated{', or an empty string' * none}; default: all",
    )  # fmt: skip


def add_limit(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--limit-s", type=at_least(0.0, finite=False), default=math.inf,
        help=f"begin no {what} after so many seconds, of which compiling takes its part; default: no limit",
    )  # fmt: skip


def no_time(args: argparse.Namespace) -> str:
    """What a command says that has no row for a table."""
    return (
        f"error: nothing was timed, and nothing written: --limit-s {args.limit_s:g}, which includes compiling, was "
        "over before the first"
    )


def save(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, creating the folder if it is missing. Dataclasses become dictionaries.

    Numbers that JSON does not have become null: a limit that nobody set, or the error of a result with NaN.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_plain(report), indent=1, allow_nan=False) + "\n")


def _plain(part: Any) -> Any:
    if is_dataclass(part) and not isinstance(part, type):
        part = asdict(part)
    if isinstance(part, dict):
        return {name: _plain(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return list(map(_plain, part))
    if isinstance(part, Path):
        return str(part)
    return None if isinstance(part, float) and not math.isfinite(part) else part


class Report:
    """What a command has measured. It is written after every step, so that an interrupted run keeps its results."""

    def __init__(self, args: argparse.Namespace, device: torch.device, rates: Rates | None = None) -> None:
        self.path: Path = args.out
        check_out(self.path)
        if device.type == "cpu" and not args.smoke:
            reason = "" if torch.cuda.is_available() else ", as this PyTorch finds no CUDA device"
            print(f"timing the CPU at full size{reason}; --smoke times tiny sizes", file=sys.stderr, flush=True)
        self.rates = rates or Rates(timing.copy_rate(device), timing.matmul_rate(device))
        self.parts: dict[str, Any] = {
            "environment": timing.environment(device, args.commit),
            "arguments": {name: value for name, value in vars(args).items() if name != "out"},
            "rates": asdict(self.rates),
        }

    def keep(self, **parts: Any) -> None:
        """Write these parts, by name, beside those that are known."""
        self.parts |= parts
        save(self.parts, self.path)

    def text(self, table: Iterable[str]) -> str:
        """What a command prints last."""
        return "\n".join([f"\n{heading(self.parts)}\n", *table, f"\nwritten to {self.path}"])


def heading(report: dict[str, Any]) -> str:
    """One line with the machine and the code that were measured."""
    names = ("device", "driver", "torch", "triton", "commit", "date")
    copy, matmul = report["rates"]["copy"] / 1e12, report["rates"]["matmul"] / 1e12
    machine = ", ".join(f"{name} {report['environment'][name]}" for name in names)
    return f"{machine}; copy {copy:.2f} TB/s, bf16 matmul {matmul:.0f} TFLOP/s"
