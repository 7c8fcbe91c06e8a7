"""Time masks of keys and packed samples: ``python -m benchmarks.windows --help``.

Three questions, each answered by calls that take turns. What does a mask of keys cost that masks none? How fast are
packed samples of many shapes, beside as many tokens in images of one shape? And packed texts, beside torch's attention
over them with the same window?

Not every kernel takes a mask. So a call without one is also timed with the kernels and tiles of the call that has one:
beside these a mask should cost nothing. A result that errs more than twice as much as the formula with the roundings of
a kernel gets no time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from natten_layers import explain
from natten_layers.explanation import Kernel

from . import runner
from .implementations import OURS, Implementation, Layout, ours, overridden, varlen
from .runner import Row
from .shapes import IMAGES, TEXTS
from .workloads import MODES, WORKLOADS, Inputs, Mode, Variant, Workload, floor, make_inputs, smoke

MASKED = tuple(WORKLOADS[name] for name in ("hdit-gqa", "seed", "mistral"))
PACKED = (
    *(WORKLOADS[name] for name in ("hdit-gqa", "seed")),
    replace(WORKLOADS["mistral"], name="mistral", batch=4, spatial=(8192,)),
    replace(WORKLOADS["gpt-oss"], name="gpt-oss", batch=4, spatial=(8192,), learned_sink=False),
)
SMOKE_IMAGES, SMOKE_TEXTS = ((8, 8), (4, 32), (16, 16), (16, 4)), ((100,), (5,), (87,))
"""512 and 192 tokens, twice those of :func:`smoke`"""

NONE, SAME, MASK = "no mask", "no mask, kernels of a mask", "mask of True"
ALIKE, EQUAL, MIXED, PEER = "one shape", "one shape, packed", "many shapes, packed", "torch's varlen"
MASK_GOAL, PACKED_GOAL = 1.03, 0.9
"""Most time beside the same kernels without a mask; least speed beside images of one shape"""


@dataclass(frozen=True)
class Comparison:
    """Calls that are timed in turn. Each is on as many tokens, heads and channels as the workload has."""

    workload: Workload
    ways: list[Implementation]


class Packed(Layout):
    """The tokens of all images on one axis."""

    name = "packed"

    def pack(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, -3)


def comparisons(device: torch.device, miniature: bool) -> dict[str, Callable[[], Comparison]]:
    """What is compared, by name."""

    def sized(workload: Workload) -> Workload:
        return replace(smoke(workload), batch=2) if miniature else workload

    def shapes(workload: Workload) -> tuple[tuple[int, ...], ...]:
        images, texts = (SMOKE_IMAGES, SMOKE_TEXTS) if miniature else (IMAGES, TEXTS)
        return images if len(workload.spatial) == 2 else texts

    return {
        **{f"{w.name}, mask": partial(masks, sized(w), device) for w in MASKED},
        **{f"{w.name}, packed": partial(packs, sized(w), shapes(w), device) for w in PACKED},
    }


def masks(workload: Workload, device: torch.device) -> Comparison:
    """Calls without a mask, and with one that hides no key."""
    attend, mask = ours(workload), torch.ones(1, *workload.spatial, dtype=torch.bool, device=device)
    x = make_inputs(workload, device, 0)
    options: dict[str, Any] = {"is_causal": workload.causal, "key_mask": mask, "needs_grad": True}
    said = explain(x.query, x.key, x.value, workload.kernel_size, **options)

    def masked(inputs: Inputs) -> Tensor:
        return attend(replace(inputs, key_mask=mask))

    plain = Implementation(NONE, OURS, Variant(), workload, attend, Layout())
    same = replace(plain, name=SAME, context=taking(said.kernels))
    return Comparison(workload, [plain, same, replace(plain, name=MASK, forward=masked)])


def taking(kernels: Sequence[Kernel]) -> Callable[[], AbstractContextManager[object]]:
    """Makes contexts in which calls take these kernels. Calls that run in PyTorch have none.

    Tiles are given for portable kernels only; others find the same ones, as a mask changes none, and maxima, as rows
    with a mask do.
    """
    if not kernels:
        return nullcontext
    from natten_layers.kernels.host.tiling import TileConfig
    from natten_layers.kernels.sm90 import large_tiling

    portable = [kernel for kernel in kernels if kernel.name == "portable"]
    configs: Any = {kernel.direction: TileConfig(**dict(kernel.settings)) for kernel in portable}
    variants = {kernel.direction: kernel.name for kernel in kernels}

    @contextmanager
    def context() -> Iterator[None]:
        with patch.object(large_tiling, "keeps_references", lambda *_: False), overridden(configs, variants=variants):
            yield

    return context


def packs(workload: Workload, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Comparison:
    """Calls on the workload's images, on these packed, and on packed samples of other shapes with as many tokens."""

    def packed(name: str, shapes: tuple[tuple[int, ...], ...]) -> Implementation:
        samples = replace(workload, batch=1, spatial=(), shapes=shapes)
        return Implementation(name, OURS, Variant(), samples, ours(samples), Packed())

    assert sum(map(math.prod, shapes)) == math.prod(workload.query_axes)
    alike = Implementation(ALIKE, OURS, Variant(), workload, ours(workload), Layout())
    mixed = packed(MIXED, shapes)
    ways = [alike, packed(EQUAL, (workload.spatial,) * workload.batch), mixed]
    if len(workload.spatial) == 1:
        ways.append(replace(mixed, name=PEER, peer=PEER, forward=varlen(mixed.workload, device)))
    return Comparison(workload, ways)


def measure(
    name: str, comparison: Comparison, mode: Mode, rates: runner.Rates, budget_s: float, device: torch.device
) -> list[Row]:
    """A row for each way, with the floor of what it computes: packed samples may have fewer pairs in their windows."""
    rows = []
    found = runner.run(comparison.workload, mode, comparison.ways, rates, budget_s, device)
    for row, way in zip(found, comparison.ways, strict=True):
        least = 1e3 * floor(way.workload, mode).seconds(rates.copy, rates.matmul)
        ratio = None if row.median_ms is None else row.median_ms / least
        rows.append(replace(row, workload=name, floor_ms=least, times_floor=ratio))
    return rows


def tables(rows: Sequence[Row]) -> list[str]:
    """Markdown tables of masks and of packed samples, then what failed."""
    groups: dict[tuple[str, Mode], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.mode), {})[row.implementation] = row
    masked = [
        f"| workload | pass | {NONE}, ms | {SAME}, ms | {MASK}, ms | beside the same kernels (goal: {MASK_GOAL}) "
        "| beside no mask |",
        "|---|---|---|---|---|---|---|",
    ]
    packed = [
        f"| workload | pass | {ALIKE}, ms | {EQUAL}, ms | {MIXED}, ms | speed beside {ALIKE} (goal: {PACKED_GOAL}) "
        f"| speed beside {EQUAL} | {PEER}, ms | {PEER} / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, mode), ways in groups.items():
        if MASK in ways:
            times = [_ms(ways.get(way)) for way in (NONE, SAME, MASK)]
            ratios = [_ratio(ways[MASK], ways.get(way)) for way in (SAME, NONE)]
            masked.append(f"| {' | '.join([name, mode, *times, *ratios])} |")
        else:
            ours, peer = ways[MIXED], ways.get(PEER)
            times = [_ms(ways.get(way)) for way in (ALIKE, EQUAL, MIXED)]
            speeds = [_ratio(ways.get(way), ours) for way in (ALIKE, EQUAL)]
            packed.append(f"| {' | '.join([name, mode, *times, *speeds, _ms(peer), _ratio(peer, ours)])} |")
    failed = [f"{row.workload} {row.mode}, {row.implementation}: {row.failure}" for row in rows if row.failure]
    return [*masked, "", *packed, *([""] if failed else []), *failed]


def _ms(row: Row | None) -> str:
    return "-" if row is None or row.median_ms is None else f"{row.median_ms:.3g} ({row.p10_ms:.3g} - {row.p90_ms:.3g})"


def _ratio(row: Row | None, other: Row | None) -> str:
    """The time of a way by that of another, for as much work."""
    if row is None or other is None or row.times_floor is None or other.times_floor is None:
        return "-"
    return f"{row.times_floor / other.times_floor:.3f}"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if this library failed anywhere."""
    args = _parse(argv)
    device = torch.device(args.device)
    wanted = {name: make for name, make in comparisons(device, args.smoke).items() if name in args.comparisons}
    if args.compile_only:
        for comparison in (make() for make in wanted.values()):
            runner.compile_ahead(comparison.workload, comparison.ways, MODES, device)
        return 0
    runner.compile_in_processes("windows", args, args.comparisons, lambda share: ["--comparisons", *share])
    report = runner.Report(args, device)
    rows: list[Row] = []
    for name, make in wanted.items():
        comparison = make()
        for mode in MODES:
            rows += measure(name, comparison, mode, report.rates, args.budget_s, device)
            report.keep(rows=rows)
    print(report.text(tables(rows)))
    return int(any(row.failure and row.peer == OURS for row in rows))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    names = list(comparisons(torch.device("cpu"), miniature=True))
    parser = runner.make_parser("windows", __doc__, budget_s=0.5, timed="each comparison and mode", jobs=True)
    parser.add_argument(
        "--comparisons", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"default: all of {'; '.join(names)}",
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(runner.command(main))
