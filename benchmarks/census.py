"""Time attention on shapes of many real models: ``python -m benchmarks.census --help``.

Prints one table, sorted by the ratio of time to floor, slowest first, with the kernel that computed each call, and
writes JSON. A result that fails its check against fp64 gets no time. Kernels are compiled beforehand in ``--jobs``
processes, which fill Triton's cache on disk.

``--portable`` times what a card gets that no other kernels of this library are for: its portable kernels, beside the
peers that run on such a card.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import runner
from .implementations import FLEX_ORDERS, OURS, PEERS, Implementation, implementations, overridden
from .runner import Rates, Row
from .shapes import CENSUS, HEAVY
from .workloads import MODES, Mode, Workload, smoke

if TYPE_CHECKING:  # the module imports Triton
    from natten_layers.kernels.dispatch import Choice
    from natten_layers.kernels.host.problem import Inputs as Tensors
    from natten_layers.kernels.host.problem import Problem

DEFAULT_PEERS = ("fa2", "natten", "fa4")  # FlexAttention takes long to compile
PORTABLE_PEERS = ("fa2", "natten")
ONLY_HOPPER = "natten, hopper-fna"
"""An implementation for one generation of cards, as are the kernels that ``--portable`` leaves out"""

Context = Callable[[], AbstractContextManager[object]]
Timed = tuple[Row, str]
"""A row, and the names of the kernels that compute this library's call"""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if this library failed anywhere, or if there was no time for any row."""
    args = _parse(argv)
    device = torch.device(args.device)
    workloads = {name: smoke(CENSUS[name]) if args.smoke else CENSUS[name] for name in args.rows}
    if args.compile_only:
        for workload in workloads.values():
            runner.compile_ahead(workload, entries(workload, args, device), args.modes, device)
        return 0
    start = time.monotonic()
    flags = ["--mode", args.mode, "--peers", ",".join(args.peers), *(["--portable"] if args.portable else [])]
    runner.compile_in_processes("census", args, args.rows, lambda share: [*flags, "--rows", ",".join(share)])
    report = runner.Report(args, device)
    rows: list[Timed] = []
    skipped: list[str] = []
    for name, workload in workloads.items():
        if time.monotonic() - start > args.limit_s:
            skipped.append(name)
            continue
        rows += timed(workload, args, report.rates, device)
        report.keep(rows=as_records(rows))
    if not rows:
        print(runner.no_time(args), file=sys.stderr)
        return 1
    report.keep(skipped=skipped)
    late = [f"\nout of time before {', '.join(skipped)}"] if skipped else []
    print(report.text([*table(rows, workloads), *summary(as_records(rows)), *late]))
    return int(failed(rows))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runner.make_parser("census", __doc__, budget_s=0.2, timed="each row and mode", jobs=True)
    parser.add_argument(
        "--rows", type=runner.names(CENSUS), default=[name for name in CENSUS if name not in HEAVY],
        help=f"names, comma-separated; default: all but {', '.join(sorted(HEAVY))}",
    )  # fmt: skip
    add_flags(parser)
    runner.add_limit(parser, "row")
    args = parser.parse_args(argv)
    settle(args)
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is timed on each problem."""
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="default: %(default)s")
    parser.add_argument(
        "--peers", type=runner.names(PEERS, none=True),
        help="comma-separated, or an empty string: flex and natten (images, videos and texts), fa2 and fa4 (causal "
        "texts), cudnn (dense, images and videos), registers (what has such, forward); "
        f"default {','.join(DEFAULT_PEERS)}, with --portable {','.join(PORTABLE_PEERS)}",
    )  # fmt: skip
    parser.add_argument("--portable", action="store_true", help="time portable kernels alone")


def settle(args: argparse.Namespace) -> None:
    """Put what :func:`entries` and :func:`timed` read into ``args``, whose flags are those of :func:`add_flags`."""
    if args.peers is None:
        args.peers = list(PORTABLE_PEERS if args.portable else DEFAULT_PEERS)
    args.modes = list(MODES) if args.mode == "both" else [args.mode]


def timed(workload: Workload, args: argparse.Namespace, rates: Rates, device: torch.device) -> Iterator[Timed]:
    """This library and its peers on one problem, in each of ``args.modes``."""
    for mode in args.modes:
        with _context(args)():
            kernel = kernel_of(workload, mode, device)
        for row in runner.run(workload, mode, entries(workload, args, device), rates, args.budget_s, device):
            yield row, kernel


def entries(
    workload: Workload, args: argparse.Namespace, device: torch.device
) -> Iterator[Implementation | tuple[str, str]]:
    """What is timed on a problem: this library, with portable kernels alone if they are asked for, and peers."""
    for entry in implementations(workload, [workload.variant], args.peers, list(FLEX_ORDERS), device):
        if not isinstance(entry, Implementation):
            yield entry
        elif entry.peer == OURS:
            yield replace(entry, context=_context(args))
        elif not (args.portable and entry.name.startswith(ONLY_HOPPER)):
            yield entry


def _context(args: argparse.Namespace) -> Context:
    return partial(overridden, portable_only=True) if args.portable else nullcontext


def as_records(rows: Sequence[Timed]) -> list[dict[str, Any]]:
    """The rows as a report has them."""
    return [{**asdict(row), "kernel": kernel} for row, kernel in rows]


def failed(rows: Sequence[Timed]) -> bool:
    """Whether this library has no time, or a wrong result, anywhere."""
    return any(row.failure and row.peer == OURS for row, _ in rows)


def kernel_of(workload: Workload, mode: Mode, device: torch.device) -> str:
    """The names of the kernels that compute a call."""
    if device.type != "cuda":
        return "eager"
    from natten_layers.kernels import dispatch

    problem, tensors = problem_of_call(workload, device)
    found = dispatch.choices(problem, tensors, with_stats=False, with_gradients=mode != "fwd")
    return ", ".join(_named(choice) for choice in found.values())


def problem_of_call(workload: Workload, device: torch.device) -> tuple[Problem, Tensors]:
    """What kernels are chosen for, and tensors without memory."""
    from natten_layers.kernels.host.problem import Options, problem_of

    window, tensors = workload.window, tensors_of(workload)
    axes = window.kernel_size, window.stride, window.dilation, window.is_causal
    options = Options(None, *axes, workload.scale, window.is_periodic if any(window.is_periodic) else ())
    return problem_of(tensors, options)._replace(device=device), tensors


def tensors_of(workload: Workload) -> Tensors:
    """The tensors of a call, without memory."""
    from natten_layers.kernels.host.problem import Inputs as Tensors

    w = workload
    batch = (1,) if w.shapes else ()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=w.dtype, device="meta")

    query = empty(*batch, *w.query_axes, w.heads, w.head_dim)
    key, value = (empty(*batch, *w.key_axes, w.kv_heads, dim) for dim in w.head_dims)
    extra_keys, extra_values = (
        empty(w.batch, w.registers, w.kv_heads, dim) if w.registers else None for dim in w.head_dims
    )
    sink = torch.empty(w.heads, device="meta") if w.learned_sink else None
    mask = torch.empty(*w.key_axes, dtype=torch.bool, device="meta") if w.land else None
    shapes = torch.tensor(w.shapes) if w.shapes else None
    rpb = torch.empty(w.variant.bias, device="meta") if w.bias else None
    return Tensors(query, key, value, extra_keys, extra_values, sink, mask, shapes, rpb)


def _named(choice: Choice) -> str:
    boxes = ["x".join(map(str, choice.settings[name])) for name in ("tile", "chunk") if name in choice.settings]
    return " ".join([choice.variant.name, "/".join(boxes)]).strip()


def table(rows: Sequence[Timed], workloads: Mapping[str, Workload]) -> list[str]:
    """A Markdown table, sorted by this library's time over the floor, slowest first, with each row's best peer.

    Args:
        workloads: the problems by name.
    """
    lines = [
        "| row | shape | mode | ms | floor | x floor | best peer | peer / ours | kernel | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    own = [(row, kernel) for row, kernel in rows if row.peer == OURS]
    for row, kernel in sorted(own, key=lambda pair: -(pair[0].times_floor or math.inf)):
        peers = [r for r, _ in rows if r.peer != OURS and (r.workload, r.mode) == (row.workload, row.mode)]
        best = min((r for r in peers if r.median_ms is not None), key=lambda r: r.median_ms or 0.0, default=None)
        what = shape(workloads[row.workload])
        cells = [row.workload, what, row.mode, "-", f"{row.floor_ms:.3g}", "-", "-", "-"]
        if row.median_ms is not None:
            cells[3], cells[5] = f"{row.median_ms:.3g}", f"{row.times_floor:.2f}"
        if best is not None and best.median_ms is not None:
            cells[6] = f"{best.implementation} {best.median_ms:.3g}"
            cells[7] = f"{best.median_ms / row.median_ms:.2f}" if row.median_ms else "-"
        lines.append(f"| {' | '.join([*cells, kernel, row.failure or row.note or ''])} |")
    return lines


def summary(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of this library's rows in a report, the median and the worst time over the floor, a line for each mode."""
    own = [row for row in records if row["peer"] == OURS and row["times_floor"] is not None]
    lines = []
    for mode in MODES:
        if ratios := [row["times_floor"] for row in own if row["mode"] == mode]:
            middle, worst = statistics.median(ratios), max(ratios)
            lines.append(f"\n{mode}: {len(ratios)} rows, median {middle:.2f} x floor, worst {worst:.2f}")
    return lines


def shape(workload: Workload) -> str:
    """``batch, tokens, heads/KV heads, head dim, window``, followed by the options that are not at their defaults."""
    w, window = workload, workload.window
    tokens, keys, kernel = ("x".join(map(str, axes)) for axes in (w.spatial, w.key_spatial, w.kernel_size))
    if w.shapes:
        tokens = f"{math.prod(w.query_axes)} in {len(w.shapes)} samples"
    tokens += f" over {keys}" if keys else ""
    dims = "/".join(map(str, dict.fromkeys(w.head_dims)))
    extra = []
    for name, axes in (("stride", window.stride), ("dilation", window.dilation)):
        if max(axes) > 1:
            extra.append(f"{name} {'x'.join(map(str, axes))}")
    for name, flags in (("causal", window.is_causal), ("periodic", window.is_periodic)):
        if any(flags):
            extra.append(name if all(flags) else f"{name} {'x'.join(str(int(flag)) for flag in flags)}")
    extra += ["masked"] if w.land else []
    extra += [w.variant.label] if w.variant.label else []
    extra += [str(w.dtype).removeprefix("torch.")] if w.dtype != torch.bfloat16 else []
    return ", ".join([str(w.batch), tokens, f"{w.heads}/{w.kv_heads}", dims, kernel, *extra])


if __name__ == "__main__":
    sys.exit(runner.command(main))
