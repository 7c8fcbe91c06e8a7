"""Time what a call costs the host, and two checkouts side by side: ``python -m benchmarks.host --help``.

A call returns once its kernels are enqueued. Until then the host is busy, and with small images it is what takes time.
Beside this library stands ``scaled_dot_product_attention`` over as many tokens.

With ``--against PATH``, another checkout of this repository is measured in the same run, and the anchor workloads are
timed on the device, too. Each round runs in a process for each checkout, which take turns: this checkout's benchmarks
import the package of one or the other. The results of the first round are checked against fp64 before a time is taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import natten_layers
from natten_layers import neighborhood_attention

from . import runner, timing
from .implementations import OURS, Implementation, Layout, ours
from .workloads import MODES, WORKLOADS, Mode, Workload, add_variant, make_inputs, smoke

__all__ = ["Round", "host_times", "measured"]

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 200
SDPA = "sdpa"

# The package is imported from the checkout that the first argument names, the benchmarks from that of the second.
LAUNCH = """
import sys
package, benchmarks, *flags = sys.argv[1:]
sys.path.insert(0, package)
import natten_layers
sys.path[0] = benchmarks
from benchmarks.host import work
sys.exit(work(flags))
"""


@dataclass
class Round:
    """What one process has measured of one checkout."""

    package: str
    """The folder from which ``natten_layers`` was imported"""
    host_us: dict[str, float] = field(default_factory=dict)
    """Microseconds of the host a call, by implementation and mode"""
    device_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of the device, by workload and mode"""
    failures: dict[str, str] = field(default_factory=dict)


def host_times(device: torch.device) -> dict[str, float]:
    """Microseconds of host time per asynchronous call, at a size so small that the device is never waited for."""
    query, key, value = (torch.randn(1, 32, 32, 4, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    dense = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, 7)

    functions: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
        "ours": (attend, (query, key, value)),
        SDPA: (F.scaled_dot_product_attention, dense),
    }
    calls: dict[str, timing.Call] = {}
    for name, (function, tensors) in functions.items():
        leaves = [t.detach().requires_grad_() for t in tensors]
        grad = torch.randn_like(tensors[0])
        calls[f"{name} fwd"] = lambda _, f=function, t=tensors: f(*t)
        calls[f"{name} fwdbwd"] = lambda _, f=function, t=leaves, g=grad: torch.autograd.grad(f(*t), t, g)
    # On a CPU calls are not asynchronous, so that this only tests the code there.
    repeats = REPEATS if device.type == "cuda" else 3
    for call in calls.values():
        timing.host_seconds(call, device, repeats)
    return {name: 1e6 * timing.host_seconds(call, device, repeats) for name, call in calls.items()}


def entry_of(workload: Workload) -> Implementation:
    return Implementation(OURS, OURS, workload.variant, workload, ours(workload), Layout())


def device_times(
    workloads: Iterable[Workload], device: torch.device, budget_s: float, *, checked: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of this library, and what failed, by workload and mode."""
    times: dict[str, float] = {}
    failures: dict[str, str] = {}
    for workload in workloads:
        entry = entry_of(workload)
        for mode in MODES:
            name = f"{workload.name} {mode}"
            if checked:
                (row,) = runner.run(workload, mode, [entry], runner.Rates(1.0, 1.0), budget_s, device)
                if row.median_ms is None:
                    failures[name] = row.failure or "no time"
                    continue
                times[name] = row.median_ms
            else:
                times[name] = _milliseconds(entry, mode, device, budget_s)
    return times, failures


def _milliseconds(entry: Implementation, mode: Mode, device: torch.device, budget_s: float) -> float:
    copies = [make_inputs(entry.workload, device, seed) for seed in range(2)]
    call = runner.call(entry, [add_variant(each, entry.variant, 0) for each in copies], mode)
    return 1e3 * timing.measure({OURS: call}, device, budget_s)[OURS].median


def work(argv: Sequence[str]) -> int:
    """One round, in the process that :func:`measured` starts; the result is written to ``--out``."""
    parser = _parser()
    parser.add_argument("--checked", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    workloads = _workloads(args)
    if args.compile_only:
        for workload in workloads:
            runner.compile_ahead(workload, [entry_of(workload)], MODES, device)
        return 0
    times, failures = device_times(workloads, device, args.budget_s, checked=args.checked)
    found = Round(str(Path(natten_layers.__file__).parent), host_times(device), times, failures)
    args.out.write_text(json.dumps(asdict(found)))
    return 0


def process(checkout: Path, flags: Iterable[str]) -> subprocess.Popen[bytes]:
    """Start :func:`work` with the package of a checkout."""
    return subprocess.Popen([sys.executable, "-P", "-c", LAUNCH, str(checkout), str(ROOT), *flags])


def measured(checkout: Path, flags: Iterable[str]) -> Round:
    """One round of a checkout.

    Raises:
        RuntimeError: the process failed, and has printed why, or it imported another package.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "round.json"
        [status] = runner.statuses([process(checkout, [*flags, "--out", str(out)])])
        if status:
            raise RuntimeError(f"measuring {checkout} ended with status {status}")
        found = Round(**json.loads(out.read_text()))
    if not Path(found.package).is_relative_to(checkout):
        raise RuntimeError(f"{checkout} has no package of its own: {found.package} was imported")
    return found


def table(rounds: Mapping[str, Sequence[Round]]) -> list[str]:
    """Markdown tables of the host's times and, where there are any, of the device's, by checkout."""
    lines = _compared(rounds, "host_us", "us of the host a call")
    if any(one.device_ms for ones in rounds.values() for one in ones):
        lines += ["", *_compared(rounds, "device_ms", "ms of the device")]
    for name, ones in rounds.items():
        lines += [f"{name}, {what}: {why}" for one in ones for what, why in one.failures.items()]
    return lines


def _compared(rounds: Mapping[str, Sequence[Round]], what: str, title: str) -> list[str]:
    """One line for each call: each checkout's median over rounds with the least and most, then their ratio."""
    first, *others = rounds
    ratio = [f"{first} / {other}" for other in others] or [f"/ {SDPA}"] * (what == "host_us")
    head = [title, *rounds, *ratio]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    found = {name: _by_call(ones, what) for name, ones in rounds.items()}
    middle = {name: {call: median(times) for call, times in calls.items()} for name, calls in found.items()}
    for call in dict.fromkeys(call for calls in found.values() for call in calls):
        cells = [_spread(calls.get(call, [])) for calls in found.values()]
        bases = [middle[other].get(call) for other in others] or [middle[first].get(f"{SDPA} {call.split()[-1]}")]
        own = middle[first].get(call)
        ratios = [f"{own / base:.3f}" if own and base else "-" for base in bases[: len(ratio)]]
        lines.append(f"| {' | '.join([call, *cells, *ratios])} |")
    return lines


def _by_call(rounds: Iterable[Round], what: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for one in rounds:
        for call, time in getattr(one, what).items():
            found.setdefault(call, []).append(time)
    return found


def _spread(times: Sequence[float]) -> str:
    return f"{median(times):.4g} ({min(times):.4g} - {max(times):.4g})" if times else "-"


def _parser() -> argparse.ArgumentParser:
    parser = runner.make_parser("host", __doc__, budget_s=0.2, timed="each workload and mode of a round", jobs=True)
    parser.add_argument(
        "--workloads", type=runner.names(WORKLOADS, none=True),
        help="names, comma-separated; default: all with --against, else none",
    )  # fmt: skip
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout of this repository")
    parser.add_argument(
        "--rounds", type=runner.at_least(1), default=3, help="processes for each checkout, default %(default)s"
    )
    return parser


def _workloads(args: argparse.Namespace) -> list[Workload]:
    return [smoke(WORKLOADS[name]) if args.smoke else WORKLOADS[name] for name in args.workloads]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a result was wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.against is not None and not (args.against / "natten_layers").is_dir():
        parser.error(f"--against {args.against} has no natten_layers")
    if args.workloads is None:
        args.workloads = [] if args.against is None else list(WORKLOADS)
    checkouts = {"this": ROOT} | ({} if args.against is None else {str(args.against): args.against.resolve()})
    flags = ["--device", args.device, "--budget-s", str(args.budget_s), *(["--smoke"] if args.smoke else [])]
    if args.jobs > 1:
        compile_side_by_side(checkouts.values(), args.workloads, args.jobs, flags)
    report = runner.Report(args, torch.device(args.device))
    rounds: dict[str, list[Round]] = {name: [] for name in checkouts}
    for i in range(args.rounds):
        for name in (list(checkouts), list(reversed(checkouts)))[i % 2]:
            own = [*flags, *(["--checked"] if i == 0 else []), "--workloads", ",".join(args.workloads)]
            rounds[name].append(measured(checkouts[name], own))
        report.keep(rounds={name: [asdict(one) for one in ones] for name, ones in rounds.items()})
    print(report.text(table(rounds)))
    return int(any(one.failures for ones in rounds.values() for one in ones))


def compile_side_by_side(checkouts: Iterable[Path], workloads: Sequence[str], jobs: int, flags: Sequence[str]) -> None:
    """Fill Triton's cache on disk with the kernels of all checkouts."""
    shares = [workloads[i::jobs] for i in range(jobs)]
    own = [[*flags, "--compile-only", "--workloads", ",".join(share)] for share in shares if share]
    runner.report_failures(runner.statuses(process(checkout, each) for checkout in checkouts for each in own))


if __name__ == "__main__":
    sys.exit(runner.command(main))
