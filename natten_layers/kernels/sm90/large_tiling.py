"""Tiles of the kernels for large windows on compute capability 9.0. Needs neither Triton nor Gluon.

A tile is computed by groups of four warps, a part each. Two kinds of plans are considered for a call:
- Two groups, on one axis up to four, compute every chunk that the tile sees.
- Two to four groups skip the chunks that their own part does not see. A part sees less than a tile, which matters where
  windows are not much larger than tiles: of 11x11x11 windows 4x4x4 queries see 14x14x14 keys, 8x4x4 see 18x14x14.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any, NamedTuple

import torch

from ...geometry import query_bounds, window_bounds
from ..host.problem import Problem
from ..host.tiling import Axis, Bounds, Box, TileConfig, boxes, head_width, spans
from .small_tiling import most_packed

# Rows of a part: positions times packed heads. A matrix product of four warps has this many.
ROWS = 64
# By the number of groups of four warps that compute: hardware registers of their threads, and of all threads before
# these are redistributed. Four more warps load.
REGISTERS = {2: (240, 168), 3: (160, 128), 4: (112, 96)}
# Bytes of shared memory for tiles and chunks.
SHARED_MEMORY = 220 * 1024
# Stages of the ring of chunks where no group skips any, and most stages elsewhere.
STAGES, MOST_STAGES = 2, 8
# Costs where groups skip chunks, which compute masks for all that they do not skip. The share that each line of a chunk
# adds, and scores that take as long as a look at a chunk.
LINE, VISIT = 1 / 128, 256
# From this share of chunks without a mask on, a plan costs what it does without masks.
UNMASKED = 0.95
# Of slices of queries, for the gradients of register tokens: multiprocessors of an H200, fewest chunks of a slice, and
# the time that a slice takes beside them, in chunks.
MULTIPROCESSORS, LEAST_CHUNKS, SLICE = 132, 8, 4
# Queries whose statistics TMA loads together: at least 16 bytes, at addresses that are multiples of 16 bytes.
ALIGNMENT = 4


@dataclass(frozen=True)
class LargeTileConfig(TileConfig):
    """Tiles of kernels in which groups of four warps compute a part of a tile each."""

    groups: Box = (1, 1, 1)
    """Along each axis, the number of parts of a tile."""
    skip: bool = False
    """Whether groups skip the chunks that none of the rows of their own part sees."""
    first_maxima: bool = False
    """Whether the forward pass keeps the references of the first chunk (``online_softmax.py``)."""

    @property
    def part(self) -> Box:
        """Positions of a part."""
        t, h, w = (size // count for size, count in zip(self.tile, self.groups, strict=True))
        return t, h, w

    def work(self, producers: int, consumers: int | None = None) -> dict[str, Any]:
        """How many warps there are, and how many hardware registers a thread of them has."""
        consumers = consumers or prod(self.groups)
        own, most = REGISTERS[consumers]
        return {
            "num_warps": 4,
            "maxnreg": most,
            "WARPS": (4,) * (consumers - 1) + (1,) * producers,
            "REGISTERS": (own,) * (consumers - 1) + (24,) * producers,
        }


@dataclass(frozen=True)
class RegisterTileConfig(LargeTileConfig):
    """Tiles of register tokens along the last axis, and chunks of queries."""

    slices: int = 1
    """Number of parts of the queries, whose sums are added in order."""


class Plan(NamedTuple):
    """How many groups there are, the columns of a chunk, and what a score costs."""

    groups: int
    columns: int
    cost: float
    """Relative time of a score on an H200 (``docs/profiles.md``): from windows of 11x11x11, 21x21 and 18x24x24, and for
    plans of one axis from causal windows of 2047 and 4096 keys."""
    skip: bool
    one_axis: bool = False
    """Whether it is for windows on one axis alone, where parts of a tile see nearly the same chunks."""
    unmasked: float | None = None
    """The cost where hardly any chunk needs a mask, if it is another. Groups that skip chunks mask all others."""


# By the most channels of a head. Accumulators and scores of a group must fit into the registers of its threads. On one
# axis, smaller chunks for more groups take dQ of 128 channels from 1.52 to 1.44 ms. Of 96 channels, dQ would be slower
# (0.97 for 0.94). The forward of 64 takes 0.61 ms with four groups for 2047 causal keys and 0.66 with two. Where
# strides leave no chunk that needs a mask (64x64 with stride 16) it takes 1.22 with four, 1.28 with two, and 1.40 with
# three that skip; without stride 1.75, 1.60 and 1.53.
FORWARD = {64: (Plan(2, 128, 1.0, False, unmasked=0.87), Plan(2, 128, 0.96, True), Plan(3, 128, 0.88, True),
                Plan(4, 64, 0.93, True), Plan(4, 64, 0.97, False, one_axis=True),
                Plan(4, 64, 1.1, False, unmasked=0.83)),
           128: (Plan(2, 128, 1.0, False), Plan(2, 128, 1.01, True)),
           256: (Plan(2, 64, 1.0, False),)}  # fmt: skip
QUERY_GRADIENT = {64: (Plan(2, 128, 1.0, False), Plan(2, 128, 0.95, True), Plan(3, 64, 0.99, True)),
                  96: (Plan(2, 128, 1.0, False), Plan(2, 128, 1.01, True)),
                  128: (Plan(2, 128, 1.0, False), Plan(2, 128, 1.01, True), Plan(3, 64, 0.93, False, one_axis=True)),
                  256: (Plan(2, 32, 1.0, False),)}  # fmt: skip
KEY_GRADIENTS = {64: (Plan(2, 64, 1.0, False), Plan(2, 64, 0.95, True)),
                 128: (Plan(2, 64, 1.0, False), Plan(2, 64, 1.01, True)),
                 256: (Plan(1, 64, 1.0, False),)}  # fmt: skip


# More plans for rows that keep the references of the first chunk. Smaller chunks compute fewer scores that no row sees:
# with 1024 causal keys, 16 heads over four and 16384 tokens, 0.248 ms with two groups and 128 keys, 0.234 with three
# and 64 (with values of 128 and keys of 64 channels 0.215 and 0.197); 512 keys, two heads a group, 0.206 with two and
# 128, 0.173 with two and 64.
WITHOUT_MAXIMA = {128: (Plan(3, 64, 1.02, False, one_axis=True), Plan(2, 64, 1.06, False, one_axis=True))}


class NoTilesError(Exception):
    """A tile or a chunk would reach into the next video of the batch, however frames are divided."""


def keeps_references(problem: Problem, with_stats: bool) -> bool:
    """Whether a row's softmax may keep the reference of its first chunk (``online_softmax.py``), for large windows.

    Weights need bf16, whose exponents are those of fp32. The largest weight is rounded then, too, which moves all
    channels of an output alike. The backward pass, which reads outputs and statistics, would compute gradients of rows
    with nearly all of their weight on one key from that with up to three times the error
    (``tests/test_sm90_references.py`` computes it), so calls for statistics find maxima.
    """
    return problem.dtype == torch.bfloat16 and not with_stats


def forward_tile_config(problem: Problem, pack: int | None = None, with_stats: bool = False) -> LargeTileConfig:
    """Tiles of the forward; ``pack`` heads a program, if given: a power of two that divides the group."""
    pack, keeps = pack or most_packed(problem), keeps_references(problem, with_stats)
    plans = {most: own + (WITHOUT_MAXIMA.get(most, ()) if keeps else ()) for most, own in FORWARD.items()}
    return replace(tile_config(problem, plans, window_bounds, pack, buffers=2), first_maxima=keeps)


def dq_tile_config(problem: Problem, pack: int | None = None) -> LargeTileConfig:
    """Tiles of the kernel of dQ, which keeps the tile of a second tensor, the output gradient, in shared memory."""
    pack = pack or most_packed(problem)
    return tile_config(problem, QUERY_GRADIENT, window_bounds, pack, buffers=2)


def dkv_tile_config(problem: Problem) -> LargeTileConfig:
    """Tiles of the kernel of dK and dV, whose rows are keys."""
    return tile_config(problem, KEY_GRADIENTS, query_bounds, 1, buffers=2 * buffered_tiles(problem))


def register_tile_config(problem: Problem) -> RegisterTileConfig:
    """Tiles of the kernel of register tokens' gradients.

    Two groups compute both gradients for one part each or, of few tokens or wide heads, one gradient each for the only
    part.
    """
    width = width_of(problem)
    groups = 1 if is_wide(problem) or problem.registers <= ROWS else 2
    offset, batch, (t, h, w) = statistics_offset(problem.axes), problem.query.shape[0], problem.lengths
    # As in `best_boxes`, no chunk reaches into the next image.
    chunks = [c for c in boxes(ROWS, (t, h, w + offset)) if c[2] >= ALIGNMENT and (batch == 1 or t % c[0] == 0)]
    if not chunks:
        raise NoTilesError
    chunk = min(chunks, key=lambda chunk: (prod(query_steps(problem, chunk)), -chunk[2]))
    tiles = batch * problem.kv_heads * register_blocks(problem, ROWS * groups)
    slices = slice_count(tiles, prod(query_steps(problem, chunk)) * problem.group)
    tile_bytes, chunk_bytes = groups * ROWS * width * 4, ROWS * (width * 4 + 8)
    stages = min((SHARED_MEMORY - tile_bytes) // chunk_bytes, 4)
    return RegisterTileConfig(
        (1, 1, ROWS * groups), chunk, pack=1, num_warps=4, stages=stages, groups=(1, 1, groups), slices=slices
    )


def register_blocks(problem: Problem, tile: int) -> int:
    return ceil(problem.registers / tile)


def query_steps(problem: Problem, chunk: Box) -> Box:
    """Chunks of all queries of an image, per axis. Those of the last axis start where their statistics do."""
    t, h, w = problem.lengths
    return ceil(t / chunk[0]), ceil(h / chunk[1]), ceil((w + statistics_offset(problem.axes)) / chunk[2])


def slice_count(tiles: int, chunks: int) -> int:
    """The number of slices of ``chunks`` with which an H200 is expected to be done first. It depends on shapes alone,
    so that results do not differ between devices.
    """
    most = max(1, min(chunks // LEAST_CHUNKS, ceil(8 * MULTIPROCESSORS / tiles)))
    return min(range(1, most + 1), key=lambda n: ceil(tiles * n / MULTIPROCESSORS) * (ceil(chunks / n) + SLICE))


def is_wide(problem: Problem) -> bool:
    """Whether heads are so wide that shared memory holds smaller tiles, and a thread the accumulators of one result
    only.
    """
    return width_of(problem) > 128


def width_of(problem: Problem) -> int:
    return max(64, head_width(problem.query.shape[-1]), head_width(problem.value.shape[-1]))


def buffered_tiles(problem: Problem) -> int:
    """Buffers for tiles of keys in the kernel of dK and dV. With two, a group need not wait for the others before its
    next tile, but the loop spills registers in 1-D and with heads of more than 64 channels (of 128, windows of
    18x24x24 with strides took 49.7 and now 46.9 ms, 80x80 18.1 and 17.4, 40x40 1.65 and 1.55).
    """
    return 2 if problem.rank > 1 and width_of(problem) <= 64 else 1


def tile_config(
    problem: Problem, plans: dict[int, tuple[Plan, ...]], bounds: Bounds, pack: int, buffers: int
) -> LargeTileConfig:
    """The cheapest plan; ``buffers`` tensors like the tile are kept in shared memory."""
    width, keys = width_of(problem), bounds is query_bounds
    channels = max(problem.query.shape[-1], problem.value.shape[-1])
    alignment, batch = ALIGNMENT if keys else 1, problem.query.shape[0]
    known = next(plans[most] for most in sorted(plans) if channels <= most)
    suitable = tuple(plan for plan in known if not (plan.skip if problem.rank == 1 else plan.one_axis))
    if problem.packing is not None:  # tiles lie on the line of all tokens, whatever the lengths of samples
        plan = suitable[0]
        part, groups, chunk = (1, 1, ROWS // pack), (1, 1, plan.groups), (1, 1, plan.columns)
    else:
        plan, part, groups, chunk = best_boxes(problem.axes, suitable, ROWS // pack, bounds, alignment, batch)
    t, h, w = (size * count for size, count in zip(part, groups, strict=True))
    stages = STAGES + (keys and problem.rank == 1 and width <= 128)
    if plan.skip:
        tile_bytes, chunk_bytes = plan.groups * ROWS * width * 2 * buffers, plan.columns * (width * 4 + 8)
        stages = min((SHARED_MEMORY - tile_bytes) // chunk_bytes, MOST_STAGES)
    return LargeTileConfig((t, h, w), chunk, pack, num_warps=4, stages=stages, groups=groups, skip=plan.skip)


@lru_cache(maxsize=1024)
def best_boxes(
    axes: tuple[Axis, ...], plans: Sequence[Plan], rows: int, bounds: Bounds, alignment: int = 1, batch: int = 1
) -> tuple[Plan, Box, Box, Box]:
    """The plan, part of a tile, parts of a tile on each axis, and chunk for which scores cost least, those beyond
    borders included; of equals those with the longest rows.

    Args:
        rows: positions of a part.
        bounds: what the rows see.
        alignment: along the last axis, chunks start at multiples of it behind :func:`statistics_offset`, and have at
            least as many positions.
        batch: if there is more than one image, chunks must end with the last frame. TMA would load the first frames of
            the next image behind it, and although their weights are zero, zero times NaN is NaN.

    Raises:
        NoTilesError: there are none.
    """
    lengths = axes[0][0], axes[1][0], axes[2][0]
    starts = (1, 0), (1, 0), (alignment, statistics_offset(axes) if alignment > 1 else 0)
    best: tuple[tuple[float, int], tuple[Plan, Box, Box, Box]] | None = None
    for plan in plans:
        chunks = [chunk for chunk in boxes(plan.columns, lengths) if chunk[2] >= alignment]
        for part, groups, chunk in product(boxes(rows, lengths), divisions(plan.groups), chunks):
            if batch > 1 and not ends_inside(axes[0], part[0] * groups[0], chunk[0], bounds):
                continue
            t, h, w = (work(axes[i], part[i], groups[i], chunk[i], plan.skip, bounds, starts[i]) for i in range(3))
            scores = t[0] * h[0] * w[0] * prod(part) * prod(chunk)
            if plan.skip:
                lines, visited = plan.columns // chunk[2], t[1] * h[1] * w[1]
                scores = scores * (1 + LINE * lines) + visited * plan.groups * VISIT
            rows_first = -part[2] * groups[2] - chunk[2]
            if best is not None and (scores * (plan.unmasked or plan.cost), rows_first) >= best[0]:
                continue
            cost = scores * _cost_of_score(plan, axes, part, groups, chunk, bounds), rows_first
            if best is None or cost < best[0]:
                best = cost, (plan, part, groups, chunk)
    if best is None:
        raise NoTilesError
    return best[1]


def _cost_of_score(
    plan: Plan, axes: tuple[Axis, ...], part: Box, groups: Box, chunk: Box, bounds: Bounds
) -> float:  # fmt: skip
    if plan.unmasked is None:
        return plan.cost
    tile = part[0] * groups[0], part[1] * groups[1], part[2] * groups[2]
    return plan.unmasked if inside_share(axes, tile, chunk, (bounds,) * 3) >= UNMASKED else plan.cost


def divisions(groups: int) -> list[Box]:
    """All ways to divide a tile along its axes in as many parts as there are groups."""
    counts = range(1, groups + 1)
    return [(t, h, w) for t, h, w in product(counts, counts, counts) if t * h * w == groups]


known_spans = lru_cache(maxsize=1024)(spans)


@lru_cache(maxsize=4096)
def ends_inside(axis: Axis, tile: int, chunk: int, bounds: Bounds) -> bool:
    """Whether no walk of chunks reaches past the end of an axis. Chunks of one position never do."""
    low, high = known_spans(axis, tile, bounds)
    return bool((low + (high - low + chunk) // chunk * chunk <= axis[0]).all())


@lru_cache(maxsize=4096)
def work(
    axis: Axis, part: int, count: int, chunk: int, skip: bool, bounds: Bounds, start: tuple[int, int] = (1, 0)
) -> tuple[int, int]:
    """Along an axis, over all tiles of ``count`` parts: pairs of a part and a chunk that are computed, and chunks that
    are loaded. Walks ``start`` at multiples of a number behind an offset.
    """
    alignment, offset = start
    low, high = known_spans(axis, part * count, bounds)
    low = (low + offset) // alignment * alignment - offset
    visited = int(((high - low + chunk).clamp(min=0) // chunk).sum())
    if not skip:
        return visited * count, visited
    part_low, part_high = known_spans(axis, part, bounds)
    low = low[torch.arange(len(part_low)) // count]
    seen = (part_high - low) // chunk - (part_low - low) // chunk + 1
    return int(seen[part_high >= part_low].sum()), visited


def inside_share(axes: tuple[Axis, ...], tile: Box, chunk: Box, bounds: tuple[Bounds, ...]) -> float:
    """Share of chunks of which all rows of their tile see all positions."""
    return prod(_inside_share(*sides) for sides in zip(axes, tile, chunk, bounds, strict=True))


@lru_cache(maxsize=4096)
def _inside_share(axis: Axis, tile: int, chunk: int, bounds: Bounds) -> float:
    length, kernel, stride, causal = axis
    first = torch.arange(0, length, tile)
    low, inner_high = bounds(first, length, kernel, stride, causal)
    inner_low, high = bounds((first + tile - 1).clamp(max=length - 1), length, kernel, stride, causal)
    start, end = (inner_low - low + chunk - 1) // chunk, (inner_high + 1 - low) // chunk
    return float((end - start).clamp(min=0).sum() / ((high - low + chunk) // chunk).sum())


def tile_count(problem: Problem, tile: Box) -> int:
    """Number of tiles of queries, or of keys. Those of a packed batch lie on the line of all its tokens."""
    return problem.query.shape[0] * prod(problem.tiles(tile))


def offset_of(problem: Problem) -> int:
    """:func:`statistics_offset` of a problem. Packed samples begin anywhere, so no offset suits all of them."""
    return 0 if problem.packing is not None else statistics_offset(problem.axes)


@lru_cache(maxsize=1024)
def statistics_offset(axes: tuple[Axis, ...]) -> int:
    """Columns in front of the statistics of queries with which the queries that a tile of keys sees start at a multiple
    of ``ALIGNMENT``, for tiles away from the borders.
    """
    length, *_ = axis = axes[2]
    low, _ = query_bounds(torch.tensor(length // 2 // ALIGNMENT * ALIGNMENT), *axis)
    return int(-low % ALIGNMENT)
