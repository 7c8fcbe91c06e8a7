"""Compare repeated KV heads with heads read with stride 0: ``python -m benchmarks.repeat --help``.

Measures time and peak memory of three ways to compute the same grouped-query attention with this library's kernels: an
explicit ``repeat_interleave`` of key and value (including its copy and, in the backward pass, its sum over the group),
unrepeated heads with one program for each query head, and unrepeated heads with the query heads of a group packed into
one program. Prints a Markdown table and writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natten_layers.io.files import replacing

from . import runner
from .implementations import OURS, Implementation, Layout, ours, overridden
from .workloads import MODES, Inputs, Variant, Workload, smoke

WAYS = {"repeat": "explicit repeat", "unpacked": "stride 0, unpacked", "packed": "stride 0, packed"}
GROUPS = (1, 2, 4, 8)
BEGIN, END = "<!-- measured -->", "<!-- end -->"

# 8 and 32 query heads; the number of KV heads follows from the size of the groups.
WORKLOADS = (
    Workload("7x7", 8, (128, 128), 8, 8, 64, (7, 7)),
    Workload("13x13", 8, (128, 128), 8, 8, 64, (13, 13)),
    Workload("512 causal", 1, (16384,), 32, 32, 128, (512,), causal=True),
    Workload("4096 causal", 1, (16384,), 32, 32, 128, (4096,), causal=True),
)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a way failed anywhere."""
    parser = runner.make_parser("repeat", __doc__, budget_s=0.5, timed="each window, group and mode")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="default: %(default)s")
    parser.add_argument("--report", nargs="+", type=Path, help="take the JSON of earlier runs and measure nothing")
    parser.add_argument("--page", type=Path, help="put the table between the marks of this markdown page")
    args = parser.parse_args(argv)
    try:
        page = args.page.read_text() if args.page else f"{BEGIN}{END}"
        fill(page, "")  # raise for a page without marks before measuring, not after
        reports = [json.loads(path.read_text()) for path in args.report or ()]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    reports = reports or [_measure(args)]
    text = "\n\n".join("\n".join([f"{runner.heading(r)}.", "", *table(r["rows"])]) for r in reports)
    print(f"\n{text}")
    if args.page:
        with replacing(args.page) as temporary:
            temporary.write_text(fill(page, text))
    return int(any(row["failure"] for report in reports for row in report["rows"]))


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    report = runner.Report(args, device)
    report.parts["rows"] = []
    for workload, group in itertools.product(WORKLOADS, GROUPS):
        small = smoke(workload) if args.smoke else workload
        heads = max(group, small.heads)
        grouped = replace(small, heads=heads, kv_heads=heads // group)
        for mode in MODES if args.mode == "both" else (args.mode,):
            rows = runner.run(grouped, mode, _ways(grouped), report.rates, args.budget_s, device)
            report.keep(rows=[*report.parts["rows"], *({"group": group, **asdict(row)} for row in rows)])
    print(f"\nwritten to {report.path}")
    return report.parts


def fill(page: str, text: str) -> str:
    """The text of ``page`` with ``text`` inserted between its marks.

    Raises:
        ValueError: the page does not have both marks.
    """
    head, mark, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END} to put the table between")
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table, one line per window, group and mode: ms and MiB of each way, and the speedup of packing."""
    cells: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["workload"], row["group"], row["mode"]), {})[row["implementation"]] = row
    names = " | ".join(f"{name}, ms" for name in WAYS.values())
    lines = [
        f"| window | group | pass | {names} | packed against repeat | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (window, group, mode), ways in cells.items():
        times = [_number(ways[way]["median_ms"], ".3g") for way in WAYS]
        slow, fast = ways["repeat"]["median_ms"], ways["packed"]["median_ms"]
        gain = f"{slow / fast:.2f}x" if slow and fast else "-"
        peaks = " / ".join(_number(ways[way]["peak_mib"], ".0f") for way in WAYS)
        lines.append(f"| {window} | {group} | {mode} | {' | '.join(times)} | {gain} | {peaks} |")
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ways(workload: Workload) -> Iterator[Implementation]:
    attend = ours(workload)
    plain = Implementation("packed", OURS, Variant(), workload, attend, Layout())
    yield replace(plain, name="repeat", forward=_repeated(workload, attend))
    yield replace(plain, name="unpacked", context=partial(overridden, pack=1))
    yield plain


def _repeated(workload: Workload, attend: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    group = workload.heads // workload.kv_heads

    def forward(inputs: Inputs) -> Tensor:
        key, value = (t.repeat_interleave(group, -2) for t in (inputs.key, inputs.value))
        return attend(replace(inputs, key=key, value=value))

    return forward if group > 1 else attend


if __name__ == "__main__":
    sys.exit(runner.command(main))
