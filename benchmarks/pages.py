"""Write the recorded figures into the pages that show them: ``python -m benchmarks.pages``.

A page marks each of its tables with ``<!-- table: NAME -->`` and ``<!-- end -->``. The lines between these marks are
generated from the JSON files under ``benchmarks/results/``, so that a page shows only what was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from natten_layers.io.files import replacing

from .census import shape
from .plot import TITLES, best_rows, fastest_peer, summary
from .runner import RESULTS, command
from .shapes import CENSUS

__all__ = ["PAGES", "TABLES", "filled"]

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/speed.md", "docs/diffusers.md", "docs/forward-mode.md")
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

MEANING = {
    "hdit-l0": "HDiT's outer level, 1024x1024 pixels: windows of 7x7",
    "hdit-l1": "HDiT's second level: 7x7",
    "hdit-gqa": "the same, groups of 4 query heads: 7x7",
    "seed": "groups of 2 query heads: 13x13",
    "flux-4k": "FLUX.1's heads, 4096x4096 pixels: 80x80",
    "hunyuan": "HunyuanVideo's heads, 30 frames: 18x24x24",
    "mistral": "Mistral 7B, 32768 tokens: 4096, causal",
    "gpt-oss": "gpt-oss, 16384 tokens: 128, causal, sinks",
}
"""what a workload stands for, and its windows"""


def filled(page: str) -> str:
    """``page`` with every marked table regenerated.

    Raises:
        KeyError: a mark names no table.
        OSError: a record cannot be read.
        ValueError: a record lacks what a table shows, or is none of a GPU.
    """

    def table(marks: re.Match[str]) -> str:
        lines = TABLES[marks[2]]()
        if len(lines) < 3:
            raise ValueError(f"no record has a row for the table {marks[2]}")
        return "\n".join([marks[1], *lines, "", marks[3]])

    return MARKS.sub(table, page)


COMMANDS = {
    "census-flex": "census --peers flex --mode fwd --rows ROWS",
    "census-portable": "census --portable",
    "ltx": "ltx --compile-ahead",
    "registers": "attention --mode fwd --registers 16 --sink zero --peers registers --host",
    "step-hdit-flowers-compiled": "step --models hdit-flowers --compile yes",
    "step-mistral-block": "step --models mistral-block",
}
"""The benchmark and the flags that make a record, where they are not its name"""


class _Part(dict[Any, Any]):
    """A part of a record, which says so if something is missing."""

    record = ""

    def __missing__(self, key: Hashable) -> Any:
        raise _incomplete(self.record, f"lacks {', '.join(key) if isinstance(key, tuple) else key}")


def _part(record: str, entries: Mapping[Any, Any]) -> _Part:
    part = _Part(entries)
    part.record = record
    return part


def _incomplete(record: str, why: str) -> ValueError:
    words = f"python -m benchmarks.{COMMANDS.get(record, record)} --out benchmarks/results/{record}.json"
    return ValueError(f"{RESULTS / f'{record}.json'} {why}; on a GPU, {words} makes a whole record")


def _record(name: str) -> _Part:
    try:
        record = json.loads((RESULTS / f"{name}.json").read_text(), object_hook=partial(_part, name))
    except json.JSONDecodeError as error:
        raise _incomplete(name, f"is no JSON: {error}") from error
    if record["environment"]["cuda"] is None or record.get("arguments", {}).get("smoke"):
        raise _incomplete(name, "has times of a CPU, or of tiny sizes")
    return record


def _best(name: str) -> _Part:
    return _part(name, best_rows(_record(name)["rows"]))


def _timed(name: str) -> list[_Part]:
    """The rows of a record all of which have a time."""
    rows: list[_Part] = _record(name)["rows"]
    if failures := [row["failure"] for row in rows if row["median_ms"] is None]:
        raise _incomplete(name, f"has a row without a time ({failures[0]})")
    return rows


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _ms(row: dict[str, Any] | None) -> str:
    """A time with two digits, or in whole milliseconds: repeated runs do not agree on more."""
    if row is None:
        return ""
    ms = row["median_ms"]
    return f"{ms:.0f}" if ms >= 9.95 else f"{ms:#.2g}"


def _headline() -> list[str]:
    """One line per workload: this library, FlexAttention, and torch's dense or windowed kernel."""
    best = _best("attention")

    def cells(workload: str) -> Iterable[str]:
        yield f"`{workload}`: {MEANING[workload]}"
        for mode in ("fwd", "fwdbwd"):
            ours = best[mode, workload, "natten_layers"]
            flex, cudnn, fa2 = (best.get((mode, workload, peer)) for peer in ("flex", "cudnn", "fa2"))
            yield from (f"**{_ms(ours)}**", _ms(flex), _ms(cudnn or fa2))

    head = ["workload", "forward, ms", "Flex", "cuDNN or FA2", "and backward, ms", "Flex", "cuDNN or FA2"]
    return _table(head, map(cells, MEANING))


def _attention() -> list[str]:
    return summary(_record("attention")["rows"])


def _census() -> list[str]:
    """One line per shape, those furthest from the floor in the backward pass first."""
    rows = _record("census")["rows"]
    best = best_rows(rows)

    def times_floor(name: str) -> float:
        row = best.get(("fwdbwd", name, "natten_layers"))
        return row["times_floor"] if row else 0.0

    def cells(name: str) -> Iterable[str]:
        yield from (f"`{name}`", shape(CENSUS[name]))
        for mode in ("fwd", "fwdbwd"):
            ours, peer = best.get((mode, name, "natten_layers")), fastest_peer(best, mode, name)
            yield from (f"{ours['median_ms']:.3g}", f"{ours['times_floor']:.1f}") if ours else ("", "")
            yield f"{peer['peer']} {peer['median_ms']:.3g}" if peer else ""

    names = sorted({row["workload"] for row in rows}, key=times_floor, reverse=True)
    head = ["row", "batch, tokens, heads, head dim, window", "forward, ms", "x floor", "fastest peer, ms"]
    return _table([*head, "and backward, ms", "x floor", "fastest peer, ms"], map(cells, names))


def _census_flex() -> list[str]:
    """Shapes that FlexAttention was timed on in a run of their own, forward."""
    best = _best("census-flex")

    def cells(name: str) -> Iterable[str]:
        ours, flex = best["fwd", name, "natten_layers"], best["fwd", name, "flex"]
        yield from (f"`{name}`", f"{ours['median_ms']:.3g}", f"{flex['median_ms']:.3g}")
        yield f"{flex['median_ms'] / ours['median_ms']:.1f}"

    names = [name for _, name, peer in best if peer == "flex"]
    return _table(["row", "forward, ms", "FlexAttention, ms", "times faster"], map(cells, names))


def _portable() -> list[str]:
    """The portable kernels alone beside all kernels, and beside peers, on the same card."""
    taken, alone = map(_best, ("census", "census-portable"))

    def cells(name: str) -> Iterable[str]:
        yield f"`{name}`"
        for mode in ("fwd", "fwdbwd"):
            ours, peer = alone[mode, name, "natten_layers"], fastest_peer(alone, mode, name)
            yield from (f"{ours['median_ms']:.3g}", f"{ours['times_floor']:.1f}")
            yield f"{ours['median_ms'] / taken[mode, name, 'natten_layers']['median_ms']:.2f}"
            yield f"{peer['peer']} {peer['median_ms']:.3g}" if peer else ""

    names = [name for mode, name, peer in alone if (mode, peer) == ("fwd", "natten_layers")]
    names.sort(key=lambda name: alone["fwd", name, "natten_layers"]["times_floor"], reverse=True)
    beside = ["x floor", "x all kernels", "fastest peer, ms"]
    return _table(["row", "forward, ms", *beside, "and backward, ms", *beside], map(cells, names))


def _grid(record: str, kind: str, ways: Mapping[str, str]) -> list[str]:
    """Times of a record whose workloads end in ``kind``: a column for each implementation, and its heading."""
    rows = {(row["workload"], row["mode"], row["implementation"]): row for row in _record(record)["rows"]}

    def cells(key: tuple[str, str]) -> Iterable[str]:
        yield from (f"`{key[0].removesuffix(kind)}`", TITLES[key[1]])
        for way in ways:
            row = rows.get((*key, way))
            yield f"{row['median_ms']:.3g}" if row and row["median_ms"] is not None else ""

    keys = dict.fromkeys((name, mode) for name, mode, _ in rows if name.endswith(kind))
    return _table(["workload", "pass", *ways.values()], map(cells, keys))


MASKS = {
    "no mask": "no mask, ms",
    "no mask, kernels of a mask": "no mask, in the kernels that take one, ms",
    "mask of True": "a mask that hides no key, ms",
}
PACKED = {
    "one shape": "images of one shape, ms",
    "one shape, packed": "these packed, ms",
    "many shapes, packed": "samples of many shapes, packed, ms",
    "torch's varlen": "torch's `varlen_attn`, ms",
}
BIAS = {
    "natten_layers": "with bias, ms",
    "without bias": "without, ms",
    "eager": "eager, ms",
    "flex, raster": "FlexAttention, ms",
}


def _layer() -> list[str]:
    layers, bare = (
        _part("module", {row["workload"]: row for row in _timed("module") if row["implementation"] == name})
        for name in ("layer", "bare operation")
    )

    def cells(workload: str) -> Iterable[str]:
        yield workload
        yield from (f"{ways[workload]['median_ms']:.3f}" for ways in (bare, layers))
        yield f"{layers[workload]['times_bare']:.2f}"

    return _table(["workload", "operation, ms", "with normalisation and RoPE, ms", "ratio"], map(cells, layers))


def _rotation() -> list[str]:
    passes: dict[tuple[str, str], list[str]] = {}
    for row in _timed("rotation"):  # a forward pass, then its backward pass
        passes.setdefault((row["workload"], row["norm"]), []).extend(
            [f"{row['median_ms']:.3f}", f"{row['of_copy']:.0%}"]
        )
    head = ["workload", "normalisation", "forward, ms", "of copy bandwidth", "backward, ms", "of copy bandwidth"]
    return _table(head, [[*names, *cells] for names, cells in passes.items()])


def _models() -> list[str]:
    rows = [row for name in ("step-hdit-flowers-compiled", "step-mistral-block") for row in _timed(name)]

    def cells(row: dict[str, Any]) -> Iterable[str]:
        yield from (row["model"], row["step"], "yes" if row["compiled"] else "no")
        yield row["attention"].replace("flex", "FlexAttention")
        yield f"{row['median_ms']:.1f}"
        yield "" if row["attention_share"] is None else f"{row['attention_share']:.0%}"

    return _table(["model", "step", "compiled", "attention", "ms", "share of attention"], map(cells, rows))


def _decode() -> list[str]:
    cells: dict[str, _Part] = {}
    for row in _timed("decode"):
        cells.setdefault(row["workload"], _part("decode", {}))[row["implementation"]] = row

    def line(workload: str) -> Iterable[str]:
        ours, sdpa = cells[workload]["natten_layers"], cells[workload]["sdpa"]
        note = f" ({sdpa['note']})" if sdpa["note"] else ""
        yield workload
        yield f"{1000 * ours['median_ms']:.0f}"
        yield f"{ours['of_copy']:.0%}"
        yield f"{1000 * sdpa['median_ms']:.0f}{note}"

    head = ["cache", "natten_layers, us", "of copy bandwidth", "scaled_dot_product_attention, us"]
    return _table(head, map(line, cells))


def _generation() -> list[str]:
    def cells(row: dict[str, Any]) -> Iterable[str]:
        yield from (str(row["batch"]), f"{row['median_ms']:.1f}", f"{row['tokens_per_s']:.0f}", f"{row['of_copy']:.0%}")

    head = ["batch", "ms a token", "tokens a second", "of copy bandwidth"]
    return _table(head, map(cells, _timed("generation")))


def _host() -> list[str]:
    times = _record("registers")["host_us"]

    def cells(mode: str) -> Iterable[str]:
        ours, sdpa = times[f"ours {mode}"], times[f"sdpa {mode}"]
        yield from (TITLES[mode], f"{ours:.0f}", f"{sdpa:.0f}", f"{ours / sdpa:.1f}")

    return _table(["pass", "natten_layers, us", "scaled_dot_product_attention, us", "ratio"], map(cells, TITLES))


def _decoder() -> list[str]:
    """LTX-2.5's decoder, all its layers with neighborhood attention and the whole call."""
    record = _record("ltx")
    parts = {"projections": "projections", "norm and RoPE": "norms and rotation", "attention": "attention"}
    parts |= {"layer": "layers, all of it"}
    total = {
        name: sum(s["layers"] * s["ms"][name] for s in record["stages"]) for name in (*parts, "layer, steps in PyTorch")
    }
    decodes = _part("ltx", {one["processor"]: one for one in record["decode"]})
    ours, plain = decodes["natten_layers"], decodes["steps in PyTorch"]
    rows = [[text, f"{total[name]:.0f}", ""] for name, text in parts.items()]
    rows[-1][2] = f"{total['layer, steps in PyTorch']:.0f}"
    rows.append(["`decode`", f"{1e3 * ours['median_s']:.0f}", f"{1e3 * plain['median_s']:.0f}"])
    rows.append(["its peak memory, GiB", f"{ours['peak_gib']:.1f}", f"{plain['peak_gib']:.1f}"])
    return _table(["milliseconds", "`patch`", "norms and rotation in PyTorch, attention of this library"], rows)


def _windows_in_transformers() -> list[str]:
    record = "diffusers_attention"
    rows = _part(record, {(row["problem"], row["implementation"]): row for row in _timed(record)})

    def cells(problem: str) -> Iterable[str]:
        ours, dense = rows[problem, "windows"], rows[problem.partition(",")[0], "dense (cuDNN)"]
        window = "x".join(map(str, ours["window"]))
        yield from (problem, str(ours["tokens"]), window, f"{ours['share_of_pairs']:.0%}", _ms(ours), _ms(dense))
        yield f"{dense['median_ms'] / ours['median_ms']:.1f}"

    head = ["attention", "tokens", "window", "pairs of all", "windows, ms", "dense by cuDNN, ms", "times faster"]
    return _table(head, map(cells, dict.fromkeys(problem for problem, _ in rows)))


def _forward_mode() -> list[str]:
    def cells(row: dict[str, Any]) -> Iterable[str]:
        name = row["implementation"].removesuffix(" jvp")
        forward = rows[row["workload"], f"{name} forward"]
        yield from (f"`{row['workload']}`", name.replace("natten_layers", "this library"), _ms(forward), _ms(row))
        yield from (f"{row['times_forward']:.1f}", f"{forward['peak_mib']:.0f}", f"{row['peak_mib']:.0f}")

    found = [row for row in _record("forward_mode")["rows"] if row["median_ms"] is not None]
    rows = _part("forward_mode", {(row["workload"], row["implementation"]): row for row in found})
    head = ["workload", "kernels", "forward, ms", "with tangents, ms", "ratio", "forward, MiB", "with tangents, MiB"]
    return _table(head, map(cells, (row for row in found if row["implementation"].endswith(" jvp"))))


TABLES: dict[str, Callable[[], list[str]]] = {
    "decoder": _decoder,
    "forward_mode": _forward_mode,
    "windows_in_transformers": _windows_in_transformers,
    "headline": _headline,
    "attention": _attention,
    "census": _census,
    "census_flex": _census_flex,
    "portable": _portable,
    "masks": partial(_grid, "windows", ", mask", MASKS),
    "packed": partial(_grid, "windows", ", packed", PACKED),
    "bias": partial(_grid, "bias", "", BIAS),
    "layer": _layer,
    "rotation": _rotation,
    "models": _models,
    "decode": _decode,
    "generation": _generation,
    "host": _host,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2, and no page is written, if a record lacks what one of them shows."""
    argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__).parse_args(argv)
    try:
        texts = {ROOT / name: filled((ROOT / name).read_text()) for name in PAGES}
        for path, text in texts.items():
            with replacing(path) as temporary:
                temporary.write_text(text)
            print(path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
