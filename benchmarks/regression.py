"""Compare a run of the census with the record: ``python -m benchmarks.regression RUN.json``.

``make bench-check`` runs the census and compares it; ``make bench-check ROWS=gemma3,fp32`` does so with these rows.

Times of two cards, or of one card on two days, differ; their ratios to the floor, which is computed of rates that each
run measures, less so: a card may run into its power limit in one of them. Where both runs timed the same peer on a
row, the ratio to that peer counts as well, and on cards of the same name the time itself. A row is worse if it is so by
all of them. A row that the record has a time for, and the run has not, is worse, too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from natten_layers.io.files import read_json
from natten_layers_cli.running import positive

from .implementations import OURS
from .runner import RESULTS, command, heading

__all__ = ["Change", "compare"]

RECORD = RESULTS / "census.json"
LIMIT = 1.1

Key = tuple[str, str, str]
"""workload, mode, and which of this library's implementations"""


@dataclass(frozen=True)
class Change:
    """What became of one row. Changes are factors: 1.1 is 10 % slower."""

    key: Key
    before: float
    """times the floor, in the record"""
    after: float | None
    """times the floor, in the run; None if that has no time"""
    beside_peers: float | None
    """change of the ratio to the peer for which it is least; None if no peer was timed in both"""
    in_time: float | None = None
    """change of the time; None on another card"""
    failure: str | None = None

    @property
    def beside_floor(self) -> float | None:
        return None if self.after is None else self.after / self.before

    def is_worse(self, limit: float) -> bool:
        found = [change for change in (self.beside_floor, self.beside_peers, self.in_time) if change is not None]
        return not found or min(found) > limit


def compare(record: Mapping[str, Any], run: Mapping[str, Any], rows: Sequence[str] | None = None) -> list[Change]:
    """One entry for each row of this library that the record has a time for and the run was asked for.

    Args:
        rows: names of rows, if not all are to be compared.

    Raises:
        ValueError: one of the two holds no rows as ``benchmarks.census`` writes them, or those of the tiny shapes of
            ``--smoke``, or one is of portable kernels alone, or they have none in common, or one of ``rows`` is in
            neither.
    """
    both = {"record": _parse(record, "record"), "run": _parse(run, "run")}
    if miniature := [name for name, each in both.items() if each.smoke]:
        raise ValueError(f"the {' and the '.join(miniature)} timed tiny shapes, by --smoke, which say nothing of speed")
    if len(portable := [name for name, each in both.items() if each.portable]) == 1:
        raise ValueError(f"the {portable[0]} timed portable kernels alone, by --portable, and the other one did not")
    before, after, failures, asked = both["record"].timed, both["run"].timed, both["run"].failures, both["run"].asked
    timed = {workload for workload, _, _ in before} & asked[0]
    if unknown := sorted(set(rows or ()) - timed):
        raise ValueError(f"no time of {', '.join(unknown)} in the record and in the run; both have {sorted(timed)}")
    same_card = record["environment"]["device"] == run["environment"]["device"]
    changes = []
    for key, row in before.items():
        workload, mode, _ = key
        if row["peer"] != OURS or workload not in (rows or timed) or mode not in asked[1]:
            continue
        now = after.get(key)
        ratios = []
        for other, peer in before.items():
            is_beside = other[:2] == (workload, mode) and peer["peer"] != OURS and other in after
            if is_beside and now is not None:
                ratios.append(_ratio(now, after[other]) / _ratio(row, peer))
        changes.append(
            Change(
                key,
                row["times_floor"],
                None if now is None else now["times_floor"],
                min(ratios, default=None),
                None if now is None or not same_card else _ratio(now, row),
                None if now is not None else failures.get(key, "not in the run"),
            )
        )
    if not changes:
        raise ValueError("the run and the record have no row in common")
    return changes


def _key(row: Mapping[str, Any]) -> Key:
    return row["workload"], row["mode"], row["implementation"]


class _Report(NamedTuple):
    timed: dict[Key, Mapping[str, Any]]
    failures: dict[Key, str]
    """of all rows, what one without a time says"""
    asked: tuple[set[str], set[str]]
    """rows and modes"""
    smoke: bool
    portable: bool


def _parse(report: Mapping[str, Any], name: str) -> _Report:
    """What is read of a report, the ``name`` of the two, with all that is computed with being numbers above 0."""
    try:
        heading(dict(report))
        rows, arguments = report["rows"], report["arguments"]
        timed = {_key(row): row for row in rows if row["median_ms"] is not None}
        numbers = [row[column] for row in timed.values() for column in ("median_ms", "times_floor")]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("a time that is no number above 0")
        failures = {_key(row): row["failure"] or "no time" for row in rows}
        asked = set(arguments["rows"]), set(arguments["modes"])
        return _Report(timed, failures, asked, arguments["smoke"], arguments.get("portable", False))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the {name} is no report of benchmarks.census: {error!r}") from error


def _ratio(row: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    return row["median_ms"] / other["median_ms"]


def table(changes: Sequence[Change], limit: float) -> list[str]:
    """A Markdown table, the worst first."""
    lines = [
        "| row | mode | x floor, record | x floor, run | change | change beside peers | |",
        "|---|---|---|---|---|---|---|",
    ]

    def size(change: Change) -> float:
        return float("inf") if change.beside_floor is None else change.beside_floor

    for change in sorted(changes, key=size, reverse=True):
        workload, mode, implementation = change.key
        name = workload if implementation == OURS else f"{workload}, {implementation.removeprefix(OURS).strip()}"
        factors = (_percent(change.beside_floor), _percent(change.beside_peers))
        after = change.failure if change.after is None else f"{change.after:.2f}"
        verdict = "WORSE" if change.is_worse(limit) else ""
        lines.append(f"| {name} | {mode} | {change.before:.2f} | {after} | {factors[0]} | {factors[1]} | {verdict} |")
    return lines


def _percent(factor: float | None) -> str:
    return "-" if factor is None else f"{factor - 1:+.0%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row is worse, 2 if the two cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.regression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="what benchmarks.census wrote")
    parser.add_argument("--rows", type=lambda text: text.split(","), help="names, comma-separated; default: all")
    parser.add_argument("--record", type=Path, default=RECORD, help="default: %(default)s")
    parser.add_argument(
        "--limit", type=positive, default=LIMIT, help="a row may be so many times slower, default %(default)s"
    )
    args = parser.parse_args(argv)
    try:
        record, run = read_json(args.record), read_json(args.run)
        changes = compare(record, run, args.rows)
        print(f"record: {heading(record)}\nrun:    {heading(run)}\n")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(changes, args.limit)))
    worse = [change for change in changes if change.is_worse(args.limit)]
    if new := sorted(set(run["arguments"]["rows"]) - {row["workload"] for row in record["rows"]}):
        print(f"\nnot in the record, so not compared: {', '.join(new)}")
    named = ", ".join(f"{change.key[0]} {change.key[1]}" for change in worse)
    print(f"\n{len(changes)} rows, {len(worse)} worse than {args.limit:g} times the record{named and f': {named}'}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(command(main))
