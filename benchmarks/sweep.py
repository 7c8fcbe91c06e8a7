"""Find the fastest tiles of the portable kernels for many problems: the data behind the rule that chooses tiles.

    python -m benchmarks.sweep --rows gemma3,mid-2d --kinds forward backward_key

For each row of the census and each kernel, a grid of tile configurations is compiled in parallel processes, checked
against the result of the rule's choice and timed, followed by the neighbors of the fastest. ``natten_layers.tune``
searches the same neighbors for one user's problem; this benchmark looks for what many problems have in common. Prints a
table and writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeoutError
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from natten_layers.kernels.host.launcher import Launcher, Plan
from natten_layers.kernels.host.problem import (
    Cotangents,
    Inputs,
    Options,
    Problem,
    RowStatistics,
    SavedResults,
    Tangents,
    layout,
    problem_of,
)
from natten_layers.kernels.host.tiling import (
    Kind,
    TileConfig,
    best_boxes,
    fit,
    next_power_of_2,
    packed_heads,
    room,
    rule,
)
from natten_layers.kernels.host.tuned import override
from natten_layers.tune import neighbors
from natten_layers_cli.progress import progress

from . import runner, timing
from .forward_mode import FULL
from .shapes import CENSUS
from .workloads import WORKLOADS, Workload, make_inputs, smoke

KINDS: tuple[Kind, ...] = ("forward", "jvp", "backward_query", "backward_key")
"""in the order in which they need one another's results"""
TIMED_S = 0.02  # seconds for which one configuration is timed
LAUNCH_S = 1e-3  # if a launch takes longer, its first run shows whether it is much slower than the best one
INTERPRETED = "TRITON_INTERPRET"
"""The variable with which Triton's interpreter launches kernels on a CPU"""
SMOKE_TRIALS = 1  # of a row and a kernel in a round, with tiny sizes
ERROR = {2: 8e-3, 4: 1e-5}  # allowed error against the result of the rule's choice, by element size

# Query rows, keys, warps, stages and maxnreg (None for no limit).
GRID: dict[Kind, tuple[tuple[int, int, int, int, int | None], ...]] = {
    "forward": (
        (64, 64, 4, 2, None), (64, 32, 4, 3, None), (64, 32, 4, 2, 128), (64, 64, 8, 2, None), (64, 32, 8, 2, None),
        (128, 64, 8, 2, None), (128, 64, 8, 3, None), (128, 32, 8, 3, None), (128, 64, 4, 2, None),
        (128, 128, 8, 2, None), (32, 32, 2, 3, None), (32, 64, 4, 2, None), (64, 128, 8, 2, None),
        (32, 32, 4, 2, None), (32, 16, 2, 2, None),
    ),
    "jvp": (
        (64, 32, 4, 2, None), (64, 32, 4, 3, None), (64, 64, 4, 2, None), (64, 64, 4, 3, None), (64, 16, 4, 2, None),
        (64, 16, 4, 3, None), (64, 32, 2, 3, None), (32, 32, 2, 2, None), (32, 32, 4, 2, None), (32, 16, 2, 2, None),
        (128, 64, 8, 2, None), (128, 32, 8, 2, None), (128, 32, 8, 3, None), (128, 16, 8, 3, None),
        (128, 64, 4, 2, None), (128, 32, 4, 3, None), (16, 16, 2, 2, None), (16, 32, 4, 2, None), (16, 16, 4, 2, None),
    ),
    "backward_query": (
        (64, 64, 4, 2, None), (64, 32, 4, 3, None), (64, 32, 4, 2, 128), (64, 64, 8, 2, None), (64, 32, 8, 2, None),
        (128, 32, 8, 2, None), (128, 64, 8, 2, None), (128, 64, 8, 3, None), (32, 32, 4, 2, None),
        (32, 32, 2, 3, None), (64, 16, 4, 3, None), (32, 16, 2, 3, None), (32, 16, 4, 2, None),
    ),
    "backward_key": (
        (64, 64, 4, 2, None), (64, 32, 4, 3, None), (64, 32, 4, 2, None), (64, 64, 8, 2, None), (64, 32, 8, 2, None),
        (128, 32, 8, 2, None), (128, 64, 8, 2, None), (32, 32, 4, 2, None), (32, 32, 2, 3, None), (32, 64, 4, 2, None),
        (64, 16, 4, 3, None), (32, 16, 2, 3, None), (32, 16, 4, 2, None),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One tile configuration of one kernel on one problem, and its time in ms."""

    row: str
    kind: Kind
    config: TileConfig
    origin: str
    """How the configuration was found: "rule", "grid" or "neighbor"."""
    ms: float | None = None
    registers: int | None = None
    spills: int | None = None
    failure: str | None = None


class Launch(NamedTuple):
    """One launch of a kernel: its launcher, what it is given, and what it writes."""

    launcher: Launcher
    tensors: Sequence[Any]
    floats: Sequence[float | None]
    results: tuple[Any, ...]
    """What the kernel's function returns"""
    outputs: int
    """of the results before statistics"""

    def __call__(self) -> None:
        self.launcher(self.tensors, self.floats)

    @property
    def checked(self) -> tuple[Tensor, ...]:
        """The results without statistics."""
        return self.results[: self.outputs]


class Subject:
    """A problem and its tensors, on which a kernel can be launched with any tile configuration.

    Args:
        with_data: to launch kernels; to compile them, the addresses of tensors suffice.
    """

    def __init__(self, workload: Workload, device: torch.device, with_data: bool = False) -> None:
        window = workload.window
        if with_data:
            data = make_inputs(workload, device, 0)
            query, key, value, self.grad_out = data.query, data.key, data.value, data.grad_out
        else:
            shapes = ((heads, dim) for heads in (workload.heads, workload.kv_heads) for dim in workload.head_dims)
            query, self.grad_out, key, value = (
                torch.empty(workload.batch, *workload.spatial, *shape, dtype=workload.dtype) for shape in shapes
            )
        self.inputs = Inputs(query, key, value)
        self.options = Options(
            None, window.kernel_size, window.stride, window.dilation, window.is_causal, workload.scale
        )
        problem = problem_of(self.inputs, self.options)
        self.problem = problem._replace(precision="tf32x3") if workload.dtype == torch.float32 else problem
        self.tangents = Tangents(*(x.flip(1) for x in (query, key, value)))
        row_max, row_sum, delta, lse = (
            torch.empty(query.shape[:-1], dtype=torch.float32, device=device) for _ in range(4)
        )
        # The kernels after the forward read these, which the launches with the rule's tiles replace.
        self.saved = SavedResults(torch.empty_like(self.grad_out), row_max, row_sum)
        self.statistics = RowStatistics(delta, lse)

    def launch(self, kind: Kind, config: TileConfig) -> Launch:
        """What the kernel's own function launches; nothing is launched yet."""
        from natten_layers.kernels.portable import dkv, dq, forward, jvp

        p, grad_out = self.problem, layout(self.grad_out)
        with override({kind: config}):
            if kind == "forward":
                plan, function, arguments = forward.plan(p, True), forward.forward, (True,)
            elif kind == "jvp":
                layouts = tuple(None if x is None else layout(x) for x in self.tangents[:-1])
                plan, function, arguments = jvp.plan(p, layouts), jvp.jvp, (self.saved, self.tangents)
            elif kind == "backward_query":
                plan, function = dq.query_plan(p, grad_out, None), dq.backward_query
                arguments = (Cotangents(*self.saved, self.grad_out, None),)
            else:
                plan, function = dkv.key_plan(p, grad_out), dkv.backward_key
                arguments = self.grad_out, self.statistics
        given: list[tuple[Any, ...]] = []
        recording = Plan(plan.config, cast(Launcher, lambda *tensors_and_floats: given.append(tensors_and_floats)))
        results = cast(Callable[..., tuple[Any, ...]], function)(recording, p, self.inputs, self.options, *arguments)
        ((tensors, floats),) = given
        return Launch(plan.launch, tensors, floats, results, 2 if kind == "backward_key" else 1)

    def take_rule(self, kind: Kind) -> tuple[Tensor, ...]:
        """Launch with the rule's tiles, and keep what later kernels read."""
        launch = self.launch(kind, rule(kind, self.problem.problem_class))
        launch()
        if kind == "forward":
            self.saved = SavedResults(*launch.results)
        elif kind == "backward_query":
            self.statistics = launch.results[1]
        return launch.checked


def grid(kind: Kind, problem: Problem) -> Iterator[TileConfig]:
    """The tile configurations that are tried first."""
    known, space = problem.problem_class, room(problem.problem_class)
    base = rule(kind, known)
    group = 1 if kind == "backward_key" else known.group
    for rows, keys, warps, stages, registers in GRID[kind]:
        if fit(kind, rows, keys, stages, space) != (rows, keys, stages):
            continue
        for pack in {packed_heads(group, rows), min(2, packed_heads(group, rows)), min(next_power_of_2(group), 4)}:
            tile, chunk = best_boxes(rows // pack, keys, known.lengths, known.kernel, kind == "backward_key")
            yield TileConfig(tile, chunk, pack, warps, stages, registers, base.skip_mask)


def workload_of(name: str, miniature: bool) -> Workload:
    return smoke(PROBLEMS[name]) if miniature else PROBLEMS[name]


# Smaller versions of rows that take too long to be run many times, and variants of anchor workloads.
SMALLER = {
    w.name: w
    for w in (
        replace(WORKLOADS["flux-4k"], name="flux-s", spatial=(96, 96), heads=12, kv_heads=12, kernel_size=(40, 40)),
        replace(WORKLOADS["flux-4k"], name="flux-64", spatial=(96, 96), head_dim=64, kernel_size=(32, 32)),
        replace(WORKLOADS["mistral"], name="mistral-s", spatial=(8192,), kernel_size=(2048,)),
        replace(WORKLOADS["hdit-l1"], name="group-3", heads=12),
        replace(WORKLOADS["hdit-l1"], name="hdit-256", head_dim=256),
        replace(CENSUS["ltx-s5"], name="ltx-s", spatial=(24, 68, 80)),
        replace(CENSUS["sdxl-80"], name="sdxl-64", head_dim=64),
        replace(CENSUS["gemma3"], name="gemma3-s", spatial=(16384,)),
        replace(CENSUS["aurora"], name="aurora-s", spatial=(4, 90, 180)),
        replace(CENSUS["fp32"], name="fp32-128", head_dim=128, kernel_size=(9, 9)),
    )
}
PROBLEMS = {**CENSUS, **WORKLOADS, **SMALLER, FULL.name: FULL}
ROWS = (
    "gemma3-s", "mid-2d", "causal-video", "fp32", "sdxl-80", "dinat-s1", "ltx-s", "mid-128", "gpt-oss", "hdit-l1",
    "mimo", "lumina-96", "seed", "aurora-s", "phi4-flash", "gemma3-1b", "mistral-s", "sdxl-64", "flux-s", "globe",
)  # fmt: skip


# What follows runs in the processes that compile. They are forked before this process uses the GPU and never use it
# themselves: a driver that launches nothing replaces CUDA's. This process finds the compiled kernels in Triton's cache
# on disk.
_subjects: dict[str, Subject] = {}


def _compile(trial: Trial, capability: int, miniature: bool) -> Trial:
    from triton.runtime import driver

    from .compile_only import Driver

    if os.environ.get(INTERPRETED) == "1":  # there is nothing to compile
        return trial
    if not _subjects:
        driver.set_active(Driver(capability))  # pyright: ignore[reportArgumentType]
    if trial.row not in _subjects:
        _subjects.clear()
        _subjects[trial.row] = Subject(workload_of(trial.row, miniature), torch.device("cpu"))
    try:
        _subjects[trial.row].launch(trial.kind, trial.config)()
    except Exception as error:  # Triton raises many types of errors for configurations that do not fit the chip
        return replace(trial, failure=_reason(error))
    return trial


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


class Timer:
    """Checks and times tile configurations, and keeps the tensors of every row that it was given."""

    def __init__(self, device: torch.device, miniature: bool) -> None:
        self.device, self.miniature = device, miniature
        self.subjects: dict[str, Subject] = {}
        self.expected: dict[tuple[str, Kind], tuple[Tensor, ...]] = {}
        self.best: dict[tuple[str, Kind], float] = {}

    def __call__(self, trial: Trial) -> Trial:
        if trial.failure is not None:
            return trial
        try:
            if trial.row not in self.subjects:
                self.subjects[trial.row] = Subject(workload_of(trial.row, self.miniature), self.device, True)
                self._run_rule(trial.row)
            return self._timed(trial)
        except Exception as error:  # the same errors as in compilation
            return replace(trial, failure=_reason(error))

    def _run_rule(self, row: str) -> None:
        for kind in KINDS:
            self.expected[row, kind] = self.subjects[row].take_rule(kind)

    def _timed(self, trial: Trial) -> Trial:
        subject = self.subjects[trial.row]
        key: tuple[str, Kind] = (trial.row, trial.kind)
        launch = subject.launch(trial.kind, trial.config)
        for result in launch.checked:
            result.fill_(math.nan)
        launcher, numbers = launch.launcher, [x if x is None else float(x) for x in launch.floats]
        kernel = launcher.kernel[launcher.grid](*launch.tensors, *launcher.sizes, *numbers, **launcher.options)
        usage = {name: getattr(kernel, f"n_{short}", None) for name, short in (("registers", "regs"), ("spills",) * 2)}
        limit = ERROR[subject.grad_out.element_size()]
        pairs = zip(launch.checked, self.expected[key], strict=True)
        errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
        if not all(error <= limit for error in errors):
            return replace(trial, failure=f"wrong result, relative error {max(errors):.2g}", **usage)
        calls: dict[str, timing.Call] = {"launch": lambda _: launch()}
        seconds = _once(calls["launch"], self.device)
        if seconds < max(1.5 * self.best.get(key, math.inf), LAUNCH_S):  # includes host time
            seconds = timing.measure(calls, self.device, TIMED_S)["launch"].median
        self.best[key] = min(seconds, self.best.get(key, math.inf))
        return replace(trial, ms=1e3 * seconds, **usage)


def _once(call: timing.Call, device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call(0)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _round(
    pool: ProcessPoolExecutor, timer: Timer, trials: Sequence[Trial], deadline: float, capability: int
) -> list[Trial]:
    """Compile, check and time ``trials``. Those that did not finish before the deadline are left out of the result."""
    futures: list[Future[Trial]] = [pool.submit(_compile, t, capability, timer.miniature) for t in trials]
    done = []
    with contextlib.suppress(FuturesTimeoutError), progress(len(futures), "launches") as bar:
        for future in as_completed(futures, max(0.0, deadline - time.monotonic())):
            done.append(timer(future.result()))
            bar.update()
            if time.monotonic() > deadline:
                break
    for future in futures:
        future.cancel()
    return done


def sweep(
    pool: ProcessPoolExecutor, timer: Timer, rows: Sequence[str], kinds: Sequence[Kind], budget_s: float,
    capability: int,
) -> list[Trial]:  # fmt: skip
    """Try the rule's choice and a grid, then the neighbors of the best configuration for as long as time allows."""
    deadline = time.monotonic() + budget_s
    problems = {row: Subject(workload_of(row, timer.miniature), torch.device("cpu")).problem for row in rows}
    first, most = [], SMOKE_TRIALS if timer.miniature else None
    pairs: list[tuple[str, Kind]] = [(row, kind) for row in rows for kind in kinds]
    for row, kind in pairs:
        known = rule(kind, problems[row].problem_class)
        first.append(Trial(row, kind, known, "rule"))
        others = [x for x in dict.fromkeys(grid(kind, problems[row])) if x != known]
        first += [Trial(row, kind, x, "grid") for x in others[:most]]
    trials = _round(pool, timer, first, deadline, capability)
    moved = set(pairs)
    while moved and time.monotonic() < deadline:
        print(f"{len(trials)} launches, {deadline - time.monotonic():.0f} s left", flush=True)
        before, more = best_of(trials), []
        for row, kind in [key for key in before if key in moved]:
            seen = {t.config for t in trials if (t.row, t.kind) == (row, kind)}
            near = dict.fromkeys(neighbors(kind, problems[row].problem_class, before[row, kind].config))
            more += [Trial(row, kind, x, "neighbor") for x in [x for x in near if x not in seen][:most]]
        trials += _round(pool, timer, more, deadline, capability)
        after = best_of(trials)
        moved = {key for key in before if (after[key].ms or 0) < 0.98 * (before[key].ms or 0)}
    return trials


def best_of(trials: Sequence[Trial]) -> dict[tuple[str, Kind], Trial]:
    """The fastest configuration of every row and kernel."""
    best: dict[tuple[str, Kind], Trial] = {}
    for t in trials:
        if t.ms is not None and t.ms < (best[t.row, t.kind].ms or math.inf if (t.row, t.kind) in best else math.inf):
            best[t.row, t.kind] = t
    return best


def table(trials: Sequence[Trial]) -> list[str]:
    lines = [
        "| row | kernel | launches | rule, ms | best, ms | gain | tile | chunk | heads | warps | stages | maxnreg "
        "| branch | registers | spills |",
        f"|{'---|' * 15}",
    ]
    ruled = {(t.row, t.kind): t for t in trials if t.origin == "rule"}
    for (row, kind), t in sorted(best_of(trials).items()):
        base = ruled.get((row, kind))
        known = "-" if base is None or base.ms is None else f"{base.ms:.4g}"
        gain = "-" if base is None or base.ms is None or not t.ms else f"{base.ms / t.ms:.2f}"
        x, count = t.config, sum((t.row, t.kind) == (row, kind) for t in trials)
        boxes = ("x".join(map(str, box)) for box in (x.tile, x.chunk))
        cells = [row, kind, count, known, f"{t.ms:.4g}", gain, *boxes, x.pack, x.num_warps, x.stages, x.maxnreg]
        lines.append(f"| {' | '.join(map(str, [*cells, x.skip_mask, t.registers, t.spills]))} |")
    return lines


def failures(trials: Sequence[Trial]) -> list[str]:
    """How many launches have no time, by the reason."""
    reasons = Counter(trial.failure for trial in trials if trial.failure)
    return ["", *(f"{count} launches not timed: {why}" for why, count in reasons.most_common())] if reasons else []


def _leave_signals() -> None:
    """In a process that compiles: Ctrl-C, which the terminal sends it too, is the parent's, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if no launch was timed."""
    parser = runner.make_parser("sweep", __doc__, budget_s=240.0, timed="everything")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--rows", type=runner.names(PROBLEMS),
        help=f"names, comma-separated; default: {', '.join(ROWS)}; with --smoke the first of them",
    )  # fmt: skip
    runner.add_names(parser, "--kinds", KINDS)
    parser.add_argument(
        "--jobs",
        type=runner.at_least(1),
        default=os.cpu_count(),
        help="processes that compile, default here %(default)s",
    )
    parser.add_argument("--capability", type=int, default=90, help="compute capability of the GPU, default %(default)s")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    args.rows = args.rows or list(ROWS[:1] if args.smoke else ROWS)
    if device.type == "cpu":
        if not args.smoke:
            parser.error("a CPU times no tiles of a GPU's kernels; --smoke tests the benchmark on it")
        if os.environ.get(INTERPRETED) != "1":  # it is read when Triton is imported
            flags = sys.argv[1:] if argv is None else argv
            return subprocess.call(
                [sys.executable, "-m", "benchmarks.sweep", *flags], env={**os.environ, INTERPRETED: "1"}
            )
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork"), _leave_signals)
    try:
        pool.submit(int).result()  # starts all processes before this one uses the GPU
        report, timer = runner.Report(args, device), Timer(device, args.smoke)
        trials = sweep(pool, timer, args.rows, args.kinds, args.budget_s, args.capability)
        report.keep(trials=trials)
        print(report.text([*table(trials), *failures(trials)]), flush=True)
    finally:
        for process in list(getattr(pool, "_processes", {}).values()):  # a compilation may never end
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
    if not best_of(trials):
        print("error: no launch was timed", file=sys.stderr)
    return int(not best_of(trials))


if __name__ == "__main__":
    sys.exit(runner.command(main))
