"""Draw a result of ``benchmarks.attention`` or ``benchmarks.census``: ``python -m benchmarks.plot --help``.

Times are shown over the floor on a logarithmic axis. Workloads have a group of bars each, with the best of each peer's
alternatives. The census, which has many more rows, has a dot for this library and one for the fastest of all peers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from natten_layers.io.files import read_json, replacing
from natten_layers_cli.outputs import check_output

from .implementations import OURS
from .runner import command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["best_rows", "draw", "draw_census", "fastest_peer", "summary"]

TITLES = {"fwd": "forward", "fwdbwd": "forward + backward"}


def best_rows(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The fastest row of each (mode, workload, peer) among the plain variants of the workloads."""
    plain: dict[str, str] = {}
    for row in rows:
        plain.setdefault(row["workload"], row["variant"])  # the first row of a workload is this library's plain one
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["mode"], row["workload"], row["peer"])
        if row["median_ms"] is None or row["variant"] not in ("", plain[row["workload"]]):
            continue
        if key not in best or row["median_ms"] < best[key]["median_ms"]:
            best[key] = row
    return best


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table with one line per workload and mode: the floor and each peer's best time, in ms."""
    best = best_rows(rows)
    peers = list(dict.fromkeys(peer for _, _, peer in best))
    lines = [f"| workload | pass | floor | {' | '.join(peers)} |", f"|{'---|' * (3 + len(peers))}"]
    for mode, workload in dict.fromkeys(key[:2] for key in best):
        found = [best.get((mode, workload, peer)) for peer in peers]
        times = ["" if row is None else f"{row['median_ms']:.3g}" for row in found]
        floor_ms = next(row["floor_ms"] for row in found if row)
        lines.append(f"| {workload} | {TITLES[mode]} | {floor_ms:.3g} | {' | '.join(times)} |")
    return lines


def _label(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.2g}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the plot as a PNG file."""
    import matplotlib.pyplot as plt

    best = best_rows(report["rows"])
    modes, workloads, peers = (list(dict.fromkeys(key[i] for key in best)) for i in range(3))
    figure, axes = plt.subplots(len(modes), 1, figsize=(11, 4 * len(modes)), squeeze=False, layout="constrained")
    width = 0.85 / max(len(peers), 1)
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        for p, peer in enumerate(peers):
            rows = [(w, best[mode, name, peer]) for w, name in enumerate(workloads) if (mode, name, peer) in best]
            positions = [w + (p - (len(peers) - 1) / 2) * width for w, _ in rows]
            bars = axis.bar(positions, [row["times_floor"] for _, row in rows], width, label=peer)
            axis.bar_label(bars, [_label(row["median_ms"]) for _, row in rows], fontsize=6, rotation=90, padding=2)
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.margins(y=0.2)
        axis.set_xticks(range(len(workloads)), workloads)
        axis.set_xlim(-0.5, len(workloads) - 0.5)
        axis.set_ylabel("time / floor")
        axis.set_title(f"{TITLES[mode]}; labels in ms")
    axes[0, 0].legend(ncols=len(peers), fontsize=8)
    _save(figure, report, path)


def draw_census(report: dict[str, Any], path: Path) -> None:
    """Write the plot of all rows, those that are furthest from their floor first, as a PNG file."""
    import matplotlib.pyplot as plt

    best = best_rows(report["rows"])
    modes = list(dict.fromkeys(row["mode"] for row in report["rows"]))
    names = list(dict.fromkeys(row["workload"] for row in report["rows"]))
    figure, axes = plt.subplots(
        1, len(modes), figsize=(5.5 * len(modes), 1.5 + 0.2 * len(names)), squeeze=False, layout="constrained"
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        ours = {name: best[mode, name, OURS]["times_floor"] for name in names if (mode, name, OURS) in best}
        order = sorted(ours, key=lambda name: ours[name])
        fastest = [fastest_peer(best, mode, name) for name in order]
        for y, (name, peer) in enumerate(zip(order, fastest, strict=True)):
            if peer is not None:
                axis.plot([ours[name], peer["times_floor"]], [y, y], color="lightgray", zorder=1)
                side = "right" if peer["times_floor"] < ours[name] else "left"  # away from the other dot
                at, offset = (peer["times_floor"], y), (-4 if side == "right" else 4, -2)
                axis.annotate(peer["peer"], at, offset, textcoords="offset points", ha=side, fontsize=6)
        peers = [(peer["times_floor"], y) for y, peer in enumerate(fastest) if peer is not None]
        axis.scatter(*zip(*peers, strict=True), s=18, color="tab:orange", label="fastest peer") if peers else None
        axis.scatter([ours[name] for name in order], range(len(order)), s=18, color="tab:blue", label="natten_layers")
        axis.set_yticks(range(len(order)), order, fontsize=7)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel("time / floor")
        axis.set_title(f"{TITLES[mode]}: median {median(ours.values()):.2f}", fontsize=10)
        axis.margins(x=0.1, y=0.02)
    axes[0, 0].legend(fontsize=8, loc="lower right")
    _save(figure, report, path)


def fastest_peer(best: dict[tuple[str, str, str], dict[str, Any]], mode: str, name: str) -> dict[str, Any] | None:
    """The row of the fastest peer of this library in a mode of a workload; ``best`` comes from :func:`best_rows`."""
    rows = [row for key, row in best.items() if key[:2] == (mode, name) and key[2] != OURS]
    return min(rows, key=lambda row: row["median_ms"], default=None)


def _save(figure: Figure, report: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    environment = report["environment"]
    figure.suptitle(
        f"{environment['device']}, torch {environment['torch']}, Triton {environment['triton']}", fontsize=10
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("report", type=Path, help="JSON written by benchmarks.attention or benchmarks.census")
    parser.add_argument("--out", type=Path, help="PNG to write, default beside the JSON")
    args = parser.parse_args(argv)
    path = args.out or args.report.with_suffix(".png")
    check_output(parser, "--out", path, [".png"])
    report = read_json(args.report)
    try:
        lines, timed = summary(report["rows"]), {mode for mode, _, peer in best_rows(report["rows"]) if peer == OURS}
        if not timed or timed != {row["mode"] for row in report["rows"]}:
            raise ValueError("no time of this library")
        draw_one = draw_census if "kernel" in report["rows"][0] else draw
    except (LookupError, TypeError, ValueError) as error:
        parser.error(f"{args.report} is no report of benchmarks.attention or benchmarks.census: {error!r}")
    draw_one(report, path)
    print("\n".join([*lines, "", f"written to {path}"]))
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
