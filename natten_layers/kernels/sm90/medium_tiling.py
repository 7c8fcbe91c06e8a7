"""Tiles of the kernels for windows between small and large on compute capability 9.0.

A program computes one tile of 64 rows, like those for small windows. What the tile sees does not fit into its share of
shared memory, so it comes chunk by chunk, as it does for large windows, but no warps of their own load it: two to four
programs share a multiprocessor, and compute while others wait. Needs neither Triton nor Gluon.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

from ...geometry import query_bounds, window_bounds
from ..host.problem import Problem, three_axes
from ..host.tiling import Axis, Bounds, Box, boxes, executed, head_width
from .large_tiling import ends_inside
from .small_tiling import Spec, most_packed

# Rows of a tile: positions times packed heads of queries, or keys. A matrix product of four warps has this many.
ROWS = 64
# Chunks that shared memory holds at a time. With more of them, or with chunks of 32 keys where those of 64 leave enough
# registers, kernels were slower (``docs/profiles.md``).
STAGES = 2
# Where the keys and values of the lines that a line of queries sees exceed L2, videos are computed in columns of tiles:
# 11x11x11 of 61x136x240 tokens, 4 heads of 64 channels, on an H200: forward 17.95 ms line by line, 16.68 in columns of
# 4x4 tiles, 16.66 of 8x8 and 17.53 of 16x16; dQ 19.7, 18.8, 18.6 and 19.1. Images of 256x4096 tokens with 21x21 windows
# take 5.1 ms line by line and 5.6 in columns.
LINES_BYTES, SIDE = 28 * 2**20, 8
# Most parts into which the columns of a head are divided, and most columns.
COLUMN_PARTS, MOST_COLUMNS = 3, 128


class MediumTileConfig(NamedTuple):
    """How a kernel computes a problem one tile a program, with a ring of chunks of what the tile sees."""

    tile: Box
    """positions of a program"""
    chunk: Box
    """positions that are loaded, and whose scores are computed, at a time"""
    pack: int
    """query heads of a program"""
    columns: tuple[int, ...]
    """columns of a head in shared memory, in parts"""
    stages: int
    """chunks that shared memory holds at a time"""
    maxnreg: int
    side: int
    """tiles of a column in height and width (``small_tiles.tile_of_column``); 0 for tiles line by line"""


def forward_tile_config(problem: Problem, pack: int | None = None) -> MediumTileConfig | None:
    """The configuration of the forward pass; None if no tile suits the problem."""
    keys = 64 if _width(problem) <= 112 else 32
    return _tile_config(problem, problem.axes, pack, windows_on(problem.key_lengths), keys, _maxnreg(problem))


def dq_tile_config(problem: Problem, pack: int | None = None) -> MediumTileConfig | None:
    """The configuration for gradients of queries."""
    keys = 64 if _width(problem) <= 96 else 32
    return _tile_config(problem, problem.axes, pack, windows_on(problem.key_lengths), keys, _maxnreg(problem))


def dkv_tile_config(problem: Problem) -> MediumTileConfig | None:
    """The configuration for gradients of keys and values, whose rows are keys and whose chunks are of queries.

    Two accumulators take most registers that a thread can have.
    """
    keys = problem.key_lengths
    if keys is None:
        return _tile_config(problem, problem.axes, 1, (query_bounds,) * 3, 64, 248)
    axes = tuple((n, *axis[1:]) for n, axis in zip(keys, problem.axes, strict=True))
    return _tile_config(problem, axes, 1, queries_on(problem.lengths), 64, 248)


@lru_cache
def windows_on(key_lengths: Box | None) -> tuple[Bounds, Bounds, Bounds]:
    """For each axis, the keys that queries see, on their own grid or on one of these lengths."""

    def bounds(keys: int) -> Bounds:
        return lambda index, *axis: window_bounds(index, *axis, key_length=keys)

    if key_lengths is None:
        return window_bounds, window_bounds, window_bounds
    t, h, w = map(bounds, key_lengths)
    return t, h, w


@lru_cache
def queries_on(lengths: Box) -> tuple[Bounds, Bounds, Bounds]:
    """For each axis, the queries on a grid of these lengths that see keys on another."""

    def bounds(queries: int) -> Bounds:
        return lambda index, keys, *axis: query_bounds(index, queries, *axis, key_length=keys)

    t, h, w = map(bounds, lengths)
    return t, h, w


def _maxnreg(problem: Problem) -> int:
    """Hardware registers of a thread of the kernels whose rows are queries.

    Up to 128, four programs share a multiprocessor where shared memory has room for them: with up to 64 columns. With
    register tokens or a mask ptxas would take more there, although those that it may not take are hardly missed. With
    biases they are: in heads of 64 channels dQ takes 0.163 ms with 168 on an H200 and 0.231 with 128 (13x13 windows),
    in heads of 32 channels 0.241 and 0.225 (7x7). Keys on another grid take more anyway.
    """
    takes_more = problem.registers or problem.key_mask is not None or problem.has_bias
    most = 0 if problem.key_lengths is not None else 32 if problem.has_bias else 64
    return 128 if takes_more and _width(problem) <= most else 168


def bytes_of_lines(problem: Problem) -> int:
    """Bytes of the keys and values of all lines along the last axis that a line of queries sees."""
    p = problem
    keys = prod(p.kernel_size[:-1]) * (p.key_lengths or p.lengths)[2]
    return 2 * keys * p.kv_heads * p.query.shape[-1] * p.dtype.itemsize


def _width(problem: Problem) -> int:
    return sum(columns_of(problem))


def columns_of(problem: Problem) -> tuple[int, ...]:
    """Columns that hold a head, as at most three powers of two, the largest first: 80 = 64 + 16."""
    rest, parts = -(-problem.query.shape[-1] // 16) * 16, []
    while rest:
        parts.append(1 << (rest.bit_length() - 1))
        rest -= parts[-1]
    return tuple(parts)


def _tile_config(
    problem: Problem, axes: tuple[Axis, ...], pack: int | None, bounds: tuple[Bounds, ...], keys: int, maxnreg: int
) -> MediumTileConfig | None:
    """The best tile with chunks of ``keys``, and ``pack`` heads a program: by default one, or as many as share keys.

    These share what a program loads, but a tile has fewer positions, which share fewer keys.
    """
    packs = tuple(sorted({1, most_packed(problem)})) if pack is None else (pack,)
    best = best_tile(axes, packs, keys, bounds, problem.query.shape[0])
    if best is None:
        return None
    pack, tile, chunk = best
    side = SIDE if problem.rank == 3 and bytes_of_lines(problem) > LINES_BYTES else 0
    return MediumTileConfig(tile, chunk, pack, columns_of(problem), STAGES, maxnreg, side)


@lru_cache(maxsize=1024)
def best_tile(
    axes: tuple[Axis, ...], packs: tuple[int, ...], columns: int, bounds: tuple[Bounds, ...], batch: int
) -> tuple[int, Box, Box] | None:
    """Packed heads, tile and chunk for which the fewest scores are computed, or None if there are none.

    Where TMA reads and writes, the frames of one image follow those of another, so in a batch of several neither tiles
    nor chunks reach past the last frame of an image.
    """
    lengths = axes[0][0], axes[1][0], axes[2][0]

    def cost(choice: tuple[int, Box, Box]) -> tuple[int, int, int]:
        _, tile, chunk = choice
        scores = prod(executed(*sides) for sides in zip(axes, tile, chunk, bounds, strict=True))
        return scores, -tile[2], -chunk[2]

    choices = [
        (pack, tile, chunk)
        for pack in packs for tile in boxes(ROWS // pack, lengths) for chunk in boxes(columns, lengths)
        if batch == 1 or (lengths[0] % tile[0] == 0 and ends_inside(axes[0], tile[0], chunk[0], bounds[0]))
    ]  # fmt: skip
    return min(choices, key=cost, default=None)


def spec_of(config: MediumTileConfig, problem: Problem, with_stats: bool = False) -> Spec:
    """What the kernels share with those of small windows."""
    dim, causal = problem.query.shape[-1], three_axes(problem.is_causal, False)
    return Spec(
        causal, config.tile, config.pack, 0, problem.rank, dim, head_width(dim), sink=problem.sink,
        with_stats=with_stats, periodic=problem.periodic_axes,
    )  # fmt: skip
