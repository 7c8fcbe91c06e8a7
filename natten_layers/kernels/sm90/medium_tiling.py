"""Tiles of the kernels for windows between small and large on compute capability 9.0.

A program computes one tile of 64 rows, like those for small windows. What the tile sees does not fit into its share of
shared memory, so it comes chunk by chunk, as it does for large windows, but no warps of their own load it: two to four
programs share a multiprocessor, and compute while others wait. Needs neither Triton nor Gluon.
"""

from collections.abc import Callable
from functools import lru_cache
from math import ceil, prod
from typing import Any, NamedTuple

import torch

from ...geometry import query_bounds, window_bounds
from ..host.problem import Problem, three_axes
from ..host.tiling import Axis, Bounds, Box, Kind, boxes, channel_parts, executed, executed_on_ring, head_width
from . import large_tiling
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
# How many times as many scores longer chunks may have (``longer_size``). Milliseconds on an H200 with 64 and 128 keys a
# chunk, 64 channels, with maxima: 21x21 0.604 and 0.581 (1.02 times as many), 11x11x11 1.93 and 1.86 (1.03), 5x15x15
# 0.875 and 0.821 (1.04), 4x7x7 causal in time 0.705 and 0.714 (1.13), 3x5x5 0.163 and 0.192 (1.36).
LONGER_SCORES = 1.05
# Least share of chunks without a mask for which it pays to ask each chunk whether it needs one, on one axis and on more
# (``docs/profiles.md``).
INSIDE_ON_ONE_AXIS, INSIDE = 0.3, 0.6
# Fewest chunks of a tile for which it pays to keep the references of the first. With one (5x5 on a coarse grid) the
# forward takes 0.165 ms with maxima and 0.172 with references, with 3.8 (9x9 of 80 channels) 0.077 and 0.075.
LEAST_CHUNKS = 3
# Hardware registers of a thread of the kernel for the gradient of a bias, of which sums and two products take most. So
# three programs share a multiprocessor, if shared memory has room for them: up to 32 channels.
BIAS_MAXNREG = 168
# Most parts into which the columns of a head are divided, and most columns.
COLUMN_PARTS, MOST_COLUMNS = 3, 128


class MediumTileConfig(NamedTuple):
    """How a kernel computes a problem one tile a program, with a ring of chunks of what the tile sees."""

    tile: Box
    """positions of a program"""
    chunk: Box
    """positions that are loaded at a time"""
    slice: int
    """rows of a chunk whose scores are computed at a time: all, but for gradients of keys and values"""
    pack: int
    """query heads of a tile"""
    chunk_pack: int
    """query heads of a chunk: one, but for gradients of keys and values"""
    columns: tuple[int, ...]
    """columns of a head in shared memory, in parts"""
    stages: int
    """chunks that shared memory holds at a time"""
    maxnreg: int
    held: bool
    """whether kernels of pairs keep the rows of a tile in hardware registers"""
    side: int
    """tiles of a column in height and width (``small_tiles.tile_of_column``); 0 for tiles line by line"""
    skip_mask: bool
    """whether chunks that all rows of a tile see are told from others, and need no mask"""
    first_maxima: bool = False
    """whether the forward pass keeps the references of the first chunk (``online_softmax.py``)"""


class Size(NamedTuple):
    """Size of a program, before the boxes of its tile and chunk are chosen; fields as in :class:`MediumTileConfig`."""

    keys: int
    """rows of a chunk: keys, or for gradients of keys and values queries"""
    slice: int
    maxnreg: int
    held: bool = False


def size_of(kind: Kind, problem: Problem) -> Size:
    """The size that was fastest for problems like this one (H200, Triton 3.6; ``docs/profiles.md`` has the tables)."""
    width = sum(columns_of(problem))
    if problem.dtype == torch.float32:
        return _size_of_pairs(kind, problem.query.shape[-1])
    if kind == "backward_key":  # two accumulators take most registers
        if width > 64:
            return Size(64, 64 if width <= 96 else 32, 248)
        # Three programs share a multiprocessor with up to 168, four with up to 128, which biases miss.
        return Size(64, 32, 128 if width <= 32 and not problem.has_bias else 168)
    if kind == "jvp":  # four tensors a chunk, and two accumulators
        return Size(32, 32, 128 if width <= 64 else 168 if width <= 112 else 248)
    fewer = width > 112 if kind == "forward" else width == 80 or width > 96
    keys = 32 if fewer else 64
    return Size(keys, keys, _maxnreg(kind, problem, width))


def _size_of_pairs(kind: Kind, dim: int) -> Size:
    if kind == "forward":
        return Size(64, 64, 128 if dim <= 32 else 168, held=True)
    if kind == "backward_query":
        return Size(64, 64, 128) if dim <= 32 else Size(32, 32, 168, held=True)
    return Size(64, 64, 248, held=dim <= 32)


def longer_size(kind: Kind, problem: Problem, keeps_references: bool) -> Size | None:
    """A size with longer chunks, which is faster if it computes hardly more scores (``LONGER_SCORES``), or None.

    What a chunk costs besides its scores, two fifths of the instructions, is shared by twice as many. That is less
    where rows keep the references of the first chunk (21x21 0.499 with 64 keys and 0.526 with 128).
    """
    p = problem
    if kind != "forward" or keeps_references or p.rank == 1 or columns_of(p) != (64,):
        return None
    takes_more = (
        p.registers or p.key_mask is not None or p.has_bias or p.key_lengths is not None or any(p.periodic_axes)
    )
    return None if takes_more else Size(128, 128, 168)


def forward_tile_config(problem: Problem, pack: int | None = None, with_stats: bool = False) -> MediumTileConfig | None:
    """The configuration of the forward pass; None if no tile suits the problem."""
    packs, keeps = _packs_of_tiles(problem, pack), keeps_references(problem, with_stats)
    return _tile_config("forward", problem, problem.axes, packs, windows_of(problem), keeps)


def dq_tile_config(problem: Problem, pack: int | None = None) -> MediumTileConfig | None:
    """The configuration for gradients of queries."""
    packs = _packs_of_tiles(problem, pack)
    return _tile_config("backward_query", problem, problem.axes, packs, windows_of(problem))


def jvp_tile_config(problem: Problem, pack: int | None = None) -> MediumTileConfig | None:
    """The configuration for tangents, with the output or without."""
    packs = _packs_of_tiles(problem, pack)
    return _tile_config("jvp", problem, problem.axes, packs, windows_of(problem))


def dkv_tile_config(problem: Problem, pack: int | None = None) -> MediumTileConfig | None:
    """The configuration for gradients of keys and values, whose rows are keys and whose chunks are of queries.

    Chunks have ``pack`` heads where they can; where not, and by default, as many as is best.
    """
    keys, packs = problem.key_lengths, _packs_of_chunks(problem, pack)
    if keys is None:
        bounds = tuple(ring_queries if ring else query_bounds for ring in problem.periodic_axes)
        return _tile_config("backward_key", problem, problem.axes, packs, bounds)
    axes = tuple((n, *axis[1:]) for n, axis in zip(keys, problem.axes, strict=True))
    return _tile_config("backward_key", problem, axes, packs, queries_on(problem.lengths))


def bias_tile_config(problem: Problem) -> MediumTileConfig:
    """The configuration for the gradient of a bias, whose chunks lie at one place relative to every tile.

    Its tiles may reach past an image, as they are only read. They are those for which the fewest scores would be
    computed if each tile had chunks from the first key on that it sees; those of all tiles together are a few more.
    """
    columns, packs = columns_of(problem), Packs()
    best = best_tile(problem.axes, (packs,), 64 if sum(columns) <= 64 else 32, windows_of(problem), 1)
    assert best is not None  # a batch of one has tiles
    return MediumTileConfig(
        best.tile, best.chunk, 32, *packs, columns, STAGES, BIAS_MAXNREG, held=False, side=0, skip_mask=False
    )


TILES_OF: dict[Kind, Callable[[Problem, int | None], MediumTileConfig | None]] = {
    "forward": forward_tile_config,
    "backward_query": dq_tile_config,
    "backward_key": dkv_tile_config,
}
"""The function that finds the tiles of a kernel."""


class Packs(NamedTuple):
    """Query heads of a tile, and of a chunk."""

    tile: int = 1
    chunk: int = 1


def _packs_of_tiles(problem: Problem, pack: int | None) -> tuple[Packs, ...]:
    """``pack`` heads a tile: by default one, or as many as share keys.

    These share what a program loads, but a tile has fewer positions, which share fewer keys.
    """
    return tuple(Packs(tile=n) for n in (sorted({1, most_packed(problem)}) if pack is None else (pack,)))


def _packs_of_chunks(problem: Problem, pack: int | None) -> tuple[Packs, ...]:
    """How many query heads a chunk may have: ``pack``, if it can.

    A chunk of more heads has fewer positions, and so covers the queries that see a tile more tightly. With biases it
    has one head, whose biases its program adds to all columns.
    """
    most = 1 if problem.has_bias else most_packed(problem)
    every = [2**i for i in range(most.bit_length())]
    return tuple(Packs(chunk=n) for n in every if n == pack or pack not in every)


def windows_of(problem: Problem) -> tuple[Bounds, ...]:
    """For each axis the keys that queries see: unwrapped where it is periodic, but not if they are on another grid."""
    if problem.key_lengths is not None:
        return windows_on(problem.key_lengths)
    return tuple(ring_windows if ring else window_bounds for ring in problem.periodic_axes)


def ring_windows(index: torch.Tensor, *axis: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return window_bounds(index, *axis, periodic=True)


def ring_queries(index: torch.Tensor, *axis: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return query_bounds(index, *axis, periodic=True)


@lru_cache
def windows_on(key_lengths: Box) -> tuple[Bounds, Bounds, Bounds]:
    """For each axis, the keys that queries see on a grid of these lengths."""

    def bounds(keys: int) -> Bounds:
        return lambda index, *axis: window_bounds(index, *axis, key_length=keys)

    t, h, w = map(bounds, key_lengths)
    return t, h, w


@lru_cache
def queries_on(lengths: Box) -> tuple[Bounds, Bounds, Bounds]:
    """For each axis, the queries on a grid of these lengths that see keys on another."""

    def bounds(queries: int) -> Bounds:
        return lambda index, keys, *axis: query_bounds(index, queries, *axis, key_length=keys)

    t, h, w = map(bounds, lengths)
    return t, h, w


def _maxnreg(kind: Kind, problem: Problem, width: int) -> int:
    """Hardware registers of a thread of the kernels whose rows are queries.

    Up to 128, four programs share a multiprocessor where shared memory has room for them: with up to 64 columns. Up to
    96 five do, which suits the forward pass, and up to 80 six. On an H200 64 channels take 0.210 ms with 128 and 0.193
    with 96 (513 keys on one axis), 32 channels 0.311 with 96 and 0.300 with 80; dQ of 64 channels 0.257 with 168 and
    0.244 with 128. With biases registers are missed: dQ of 64 channels takes 0.163 with 168 and 0.231 with 128 (13x13
    windows). Where each query has more keys of its own than others share, fewer programs are faster, as those compete
    for L2: 8x8 windows on a grid four times as fine 0.355 with 168 and 0.382 with 96, 5x5 on a coarse one 0.172 and
    0.160.
    """
    if width > 64:
        return 168
    if problem.has_bias:
        return 128 if width <= 32 else 168
    keys = problem.key_lengths
    if keys is not None:
        return 96 if kind == "forward" and prod(keys) < prod(problem.lengths) else 168
    if kind != "forward":
        return 128
    takes_more = problem.registers or problem.key_mask is not None
    return 96 if width > 32 or takes_more else 80


def bytes_of_lines(problem: Problem) -> int:
    """Bytes of the keys and values of all lines along the last axis that a line of queries sees."""
    p = problem
    keys = prod(p.kernel_size[:-1]) * (p.key_lengths or p.lengths)[2]
    return 2 * keys * p.kv_heads * p.query.shape[-1] * p.dtype.itemsize


def columns_of(problem: Problem) -> tuple[int, ...]:
    """:func:`channel_parts` of a head, of which there are at most three; of fp32, two as wide as a head, a pair."""
    if problem.dtype == torch.float32:
        return problem.query.shape[-1], problem.query.shape[-1]
    return channel_parts(problem.query.shape[-1])


class Tiles(NamedTuple):
    scores: int
    """how many are computed for one head"""
    packs: Packs
    tile: Box
    chunk: Box


def _tile_config(
    kind: Kind, problem: Problem, axes: tuple[Axis, ...], packs: tuple[Packs, ...], bounds: tuple[Bounds, ...],
    keeps: bool = False,
) -> MediumTileConfig | None:  # fmt: skip
    """The best tile with one of these numbers of heads, of rows that may keep the references of the first chunk."""
    size, longer = size_of(kind, problem), longer_size(kind, problem, keeps)
    best = best_tile(axes, packs, size.keys, bounds, problem.query.shape[0])
    if longer is not None and best is not None:
        other = best_tile(axes, packs, longer.keys, bounds, problem.query.shape[0])
        if other is not None and other.scores <= LONGER_SCORES * best.scores:
            size, best = longer, other
    if best is None:
        return None
    side = SIDE if problem.rank == 3 and bytes_of_lines(problem) > LINES_BYTES else 0
    skip_mask = can_skip_mask(kind, problem) and large_tiling.inside_share(axes, best.tile, best.chunk, bounds) >= (
        INSIDE_ON_ONE_AXIS if problem.rank == 1 else INSIDE
    )
    return MediumTileConfig(
        best.tile, best.chunk, size.slice, *best.packs, columns_of(problem), STAGES, size.maxnreg, size.held, side,
        skip_mask, keeps and chunks_of_a_tile(problem, best, size.keys) >= LEAST_CHUNKS,
    )  # fmt: skip


def can_skip_mask(kind: Kind, problem: Problem) -> bool:
    """Whether the kernel is faster if it computes no masks where none are needed.

    Wide heads spend little of their time on masks, and the branch costs dK and dV of 64 channels registers that they
    have not. On a periodic axis chunks end where the ring does.
    """
    width, on_one_axis = sum(columns_of(problem)), problem.rank == 1
    if any(problem.periodic_axes):
        return False
    if problem.dtype == torch.float32:
        return on_one_axis
    if kind == "backward_key":
        return on_one_axis and (width <= 32 or 64 < width <= 96)
    if kind == "jvp":
        return on_one_axis and width <= 64
    return width <= (112 if kind == "forward" else 64)


def keeps_references(problem: Problem, with_stats: bool) -> bool:
    """Whether a row's softmax may keep the reference of its first chunk: as for large windows, and if it sees a key."""
    may_see_nothing = problem.key_mask is not None or problem.has_bias
    return large_tiling.keeps_references(problem, with_stats) and not may_see_nothing


def chunks_of_a_tile(problem: Problem, best: Tiles, keys: int) -> float:
    """How many chunks of so many keys a tile of queries sees, on average."""
    tiles = prod(ceil(axis[0] / side) for axis, side in zip(problem.axes, best.tile, strict=True))
    return best.scores / (tiles * prod(best.tile) * keys)


@lru_cache(maxsize=1024)
def best_tile(
    axes: tuple[Axis, ...], packs: tuple[Packs, ...], columns: int, bounds: tuple[Bounds, ...], batch: int
) -> Tiles | None:
    """The tiles for which the fewest scores are computed, with the fewest heads a chunk; None if there are none.

    Where TMA reads and writes, the frames of one image follow those of another, so in a batch of several neither tiles
    nor chunks reach past the last frame of an image.
    """
    lengths = axes[0][0], axes[1][0], axes[2][0]
    choices = (
        Tiles(prod(map(_executed, axes, tile, chunk, bounds)), pack, tile, chunk)
        for pack in packs
        for tile in boxes(ROWS // pack.tile, lengths) for chunk in boxes(columns // pack.chunk, lengths)
        if batch == 1 or (lengths[0] % tile[0] == 0 and large_tiling.ends_inside(axes[0], tile[0], chunk[0], bounds[0]))
    )  # fmt: skip
    return min(choices, key=_cost, default=None)


def _executed(axis: Axis, tile: int, chunk: int, bounds: Bounds) -> int:
    on_ring = bounds in (ring_windows, ring_queries)
    return (executed_on_ring if on_ring else executed)(axis, tile, chunk, bounds)


def _cost(tiles: Tiles) -> tuple[int, int, int, int]:
    return tiles.scores, tiles.packs.chunk, -tiles.tile[2], -tiles.chunk[2]


def spec_of(config: MediumTileConfig, problem: Problem, with_stats: bool = False) -> Spec:
    """What the kernels share with those of small windows."""
    dim, causal = problem.query.shape[-1], three_axes(problem.is_causal, False)
    return Spec(
        causal, config.tile, config.pack, 0, problem.rank, dim, head_width(dim), sink=problem.sink,
        with_stats=with_stats, periodic=problem.periodic_axes, skip_mask=config.skip_mask,
    )  # fmt: skip
