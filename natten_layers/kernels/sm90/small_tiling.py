"""Tiles of the kernels for small windows: single tiles, or runs of tiles along an axis with a rolling K/V buffer.

This module is separate from the kernels because it needs neither Triton nor Gluon, which older Tritons lack.
"""

from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import NamedTuple

import torch

from ...geometry import query_bounds, window_bounds
from ..host.problem import Layout, Problem, three_axes
from ..host.tiling import Axis, Bounds, Box, boxes, extent, head_width, next_power_of_2

# Most channels of a head: registers hold scores and accumulators.
MOST_CHANNELS = 128
# Query rows of a tile: positions times packed heads.
SMALL_ROWS = 64
# Most scores a query row may have: all are held in hardware registers.
SCORES = 320
# Most scores of a row in the rolling kernel: room for register tokens beside 320 keys is worth it although a few values
# spill.
ROLLING_SCORES = 336
# Most scores of a row in the backward pass, whose kernels hold gradients of scores beside the scores.
BACKWARD_SCORES = 256
# The rolling kernel is used where a tile sees at least this many keys, and at most this share of them is new to it.
LEAST_LOADED = 96
RELOADED = 0.6
# Most parts in which the keys of a tile are loaded.
PARTS = 3
# Time that a run needs for its first loads, in units of the time of a tile.
START = 0.2


class SmallTileConfig(NamedTuple):
    """How the kernel of small windows computes a problem one tile a program."""

    tile: Box
    """positions of a program"""
    pack: int
    """query heads of a program"""
    parts: tuple[Box, ...]
    """boxes of keys, one after the other along ``axis``, that cover what a tile sees"""
    axis: int
    registers: int
    """keys of the box that holds the register tokens, or 0"""
    maxnreg: int

    @property
    def keys(self) -> int:
        """Keys that a program loads, register tokens included."""
        return sum(map(prod, self.parts)) + self.registers

    @property
    def frames(self) -> int:
        """Frames that the parts have along ``t``."""
        return sum(box[0] for box in self.parts) if self.axis == 0 else self.parts[0][0]

    @property
    def programs(self) -> int:
        """Programs that share a multiprocessor."""
        return _programs(self.maxnreg)


class RollingTileConfig(NamedTuple):
    """How the rolling kernel of small windows computes a problem one run of tiles a program."""

    tile: Box
    """positions that a program computes at a time"""
    pack: int
    """query heads of a program"""
    axis: int
    """along which the tiles of a run follow each other"""
    box: Box
    """keys of one stage of the rolling buffer, which is as long as a tile"""
    stages: int
    """stages of the buffer: all that a tile sees"""
    rest: tuple[int, ...]
    """keys of the last stage that a tile sees, in parts"""
    shift: int
    """positions by which the first tile starts before the image, so that stages start where windows do"""
    phase: int
    """position on the axis at which the first stage starts, 0 or less"""
    registers: int
    """keys of the box that holds the register tokens, or 0"""
    in_ring: bool
    """whether results pass through a free stage of the buffer, not through shared memory of their own"""
    maxnreg: int

    @property
    def keys(self) -> int:
        """Keys whose scores a row has, register tokens included."""
        return (self.stages - 1) * prod(self.box) + sum(self.rest) + self.registers

    @property
    def programs(self) -> int:
        """Programs that share a multiprocessor."""
        return _programs(self.maxnreg)

    def tiles(self, problem: Problem) -> Box:
        """Tiles for each axis."""
        lengths = [n + self.shift if i == self.axis else n for i, n in enumerate(problem.lengths)]
        return three_axes([ceil(n / b) for n, b in zip(lengths, self.tile, strict=True)], 1)


class Spec(NamedTuple):
    """What all kernels of small windows are compiled for: their compile-time argument ``SPEC``.

    A kernel assigns a field to a ``constexpr`` of its own before it passes it on, as device functions of Triton 3.6
    take no bare tuples, strings and bools.
    """

    causal: tuple[bool, bool, bool]
    tile: Box
    pack: int
    axis: int
    rank: int
    head_dim: int
    columns: int
    """head dim in shared memory: ``head_dim`` padded to a power of two"""
    window: int | None = None
    """the kernel size of a problem in 1-D with stride 1, otherwise None"""
    sink: str = "none"
    with_stats: bool = False
    periodic: tuple[bool, bool, bool] = (False, False, False)
    skip_mask: bool = False
    """as in ``MediumTileConfig``"""

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return prod(self.tile) * self.pack

    @property
    def step(self) -> int:
        """Positions of a tile along ``axis``."""
        return self.tile[self.axis]


class PrepSpec(NamedTuple):
    """How a kernel prepares queries and keys: the argument ``PREP``. ``QKPrepKind`` explains the fields."""

    norm: str = "none"
    axes: int = 1
    pairs: int = 0

    @property
    def is_needed(self) -> bool:
        return self.norm != "none" or self.pairs > 0


def spec_of(config: SmallTileConfig | RollingTileConfig, problem: Problem) -> Spec:
    """The fields of a :class:`Spec` that follow from tiles and head dim; the forward pass sets the others."""
    dim = problem.query.shape[-1]
    causal = three_axes(problem.is_causal, False)
    return Spec(causal, config.tile, config.pack, config.axis, problem.rank, dim, head_width(dim))


def forward_spec(config: SmallTileConfig | RollingTileConfig, problem: Problem, with_stats: bool) -> Spec:
    window = problem.kernel_size[0] if problem.rank == 1 and problem.stride == (1,) else None
    return spec_of(config, problem)._replace(window=window, sink=problem.sink, with_stats=with_stats)


def rolling_gap(problem: Problem, rolling: RollingTileConfig, single: SmallTileConfig | None) -> str | None:
    """Why runs were measured to be slower than single tiles on problems like this one; None where they are faster."""
    if single is None:
        return None
    loaded = sum(map(prod, single.parts))
    if loaded < LEAST_LOADED:
        return f"tiles alone are faster: a tile sees {loaded} keys, fewer than {LEAST_LOADED}"
    if prod(rolling.box) > RELOADED * loaded:
        return f"tiles alone are faster: {prod(rolling.box)} of the {loaded} keys that a tile sees are new to it"
    if problem.rank == problem.group == 1:
        return "tiles alone are faster in 1-D where every query head has keys of its own"
    if rolling.programs < single.programs and head_width(problem.query.shape[-1]) > 64:
        return f"tiles alone are faster: {single.programs} programs share a multiprocessor, not {rolling.programs}"
    return None


@lru_cache(maxsize=1024)
def small_tile_config(problem: Problem, pack: int | None = None, with_stats: bool = False) -> SmallTileConfig | None:
    """The configuration with the fewest scores, in the fewest parts; None if the kernel cannot compute the problem.

    Where TMA writes, the rows of one image follow those of another, so that tiles must not reach past
    the end of an image along ``t``.
    """
    if not _is_small(problem):
        return None
    pack = pack or most_packed(problem)
    tiles = small_tiles(problem, pack)
    configs = [small_candidate(problem, tile, axis, pack, with_stats=with_stats) for tile in tiles for axis in range(3)]
    return min((x for x in configs if x.maxnreg and _fits(problem, x)), key=_small_cost, default=None)


@lru_cache(maxsize=1024)
def no_small_tiles(problem: Problem, pack: int | None = None) -> str:
    """Why there are no tiles for a problem that the kernels of small windows might compute otherwise."""
    if _is_small(problem):
        pack = pack or most_packed(problem)
        found = [small_candidate(problem, x, axis, pack) for x in small_tiles(problem, pack) for axis in range(3)]
        least = min((config.keys for config in found), default=0)
        if all(not config.maxnreg for config in found) and least > 0:
            room = "scores" if least > SCORES else "keys, values and scores"
            return f"no tiles: {SMALL_ROWS} query rows see at least {least} keys, whose {room} do not fit"
    return "no tiles: strides, additional keys, batch or frames do not fit"


def _is_small(problem: Problem) -> bool:
    """Whether the kernels of small windows can compute a call, if there are enough hardware registers."""
    p = problem
    registers = [x for x in (p.additional_keys, p.additional_values) if x is not None]
    if not _has_small_heads(p) or p.query.shape[0] >= 2**16 or not all(map(holds_registers, registers)):
        return False
    # All images share the keys and the values of register tokens, or neither.
    return len({x.stride[0] == 0 for x in registers}) < 2


def _has_small_heads(problem: Problem) -> bool:
    """Whether queries and values are equally wide, and narrow enough."""
    dim = problem.query.shape[-1]
    return dim == problem.value.shape[-1] and dim <= MOST_CHANNELS


def most_packed(problem: Problem) -> int:
    """The most query heads that a program can have: a power of two that divides the group."""
    return min(problem.group & -problem.group, 16)


def small_tiles(problem: Problem, pack: int) -> list[Box]:
    """Tiles of ``SMALL_ROWS`` query rows."""
    packing = problem.packing
    if packing is not None and problem.packs_images:
        return [x for x in boxes(SMALL_ROWS // pack, three_axes(packing.longest, 1)) if prod(x) * pack == SMALL_ROWS]
    tiles = boxes(SMALL_ROWS // pack, problem.class_lengths)
    return [x for x in tiles if problem.lengths[0] % x[0] == 0 and prod(x) * pack == SMALL_ROWS]


def _extents(problem: Problem, tile: Box, bounds: Bounds) -> list[int]:
    """The most keys that a tile sees on each axis, by ``bounds``; in packed images those of any sample."""
    packing = problem.packing
    if packing is None or not problem.packs_images:
        return [extent(x, b, bounds) for x, b in zip(problem.axes, tile, strict=True)]
    most = extent if bounds is window_bounds else _shifted_extent
    shapes = [three_axes(x, 1) for x in packing.shapes if prod(x)] or [(1, 1, 1)]
    axes = zip(zip(*shapes, strict=True), problem.axes, tile, strict=True)
    return [
        max(most((n, min(kernel, n), stride, causal), b, bounds) for n in set(lengths))
        for lengths, (_, kernel, stride, causal), b in axes
    ]


@lru_cache(maxsize=4096)
def _shifted_extent(axis: Axis, tile: int, bounds: Bounds) -> int:
    """:func:`extent` of tiles of keys that may start before a packed image."""
    length, kernel, stride, causal = axis
    first = torch.arange(-key_tile_shift(length, kernel, tile), length, tile)
    low, _ = bounds(first.clamp(min=0), length, kernel, stride, causal)
    _, high = bounds((first + tile - 1).clamp(max=length - 1), length, kernel, stride, causal)
    return int((high - low + 1).max())


def key_tile_shift(length: int, kernel: int, side: int) -> int:
    """By how many tokens tiles of keys start before an axis of a packed image: 1 or 0.

    The last ``kernel`` keys are seen by all queries up to the end. Where the first of them is the last key of a tile,
    ``side + kernel - 1 + kernel // 2`` queries see that tile, the most of all. A shift by one takes it out of the tile,
    and is possible as the last tile is not full then.
    """
    return int(length % side == (kernel - 1) % side != 0)


def _register_keys(problem: Problem) -> int:
    """Keys of the box that holds the register tokens."""
    return max(16, next_power_of_2(problem.registers)) if problem.registers else 0


def _fits(problem: Problem, config: SmallTileConfig) -> bool:
    """Whether an image of a batch has as many frames as the parts: else they would reach into the next image."""
    return problem.query.shape[0] == 1 or config.frames <= problem.lengths[0]


def _small_cost(config: SmallTileConfig) -> tuple[int, int, int]:
    return config.keys, len(config.parts), -config.parts[0][2]


def small_candidate(
    problem: Problem, tile: Box, axis: int, pack: int, bounds: Bounds = window_bounds, with_stats: bool = False
) -> SmallTileConfig:
    """The configuration of one tile, whose keys (by ``bounds``) come in parts along one axis.

    ``maxnreg`` is 0 if too few programs would share a multiprocessor.
    """
    extents = _extents(problem, tile, bounds)
    box = [next_power_of_2(e) for e in extents]
    unit = max(1, 16 // (prod(box) // box[axis]))  # a matrix instruction takes at least 16 keys
    sides = binary_parts(ceil(extents[axis] / unit), PARTS)
    parts = [three_axes([unit * side if i == axis else box[i] for i in range(3)], 1) for side in sides]
    config = SmallTileConfig(tile, pack, tuple(parts), axis, _register_keys(problem), 0)
    if config.keys > SCORES:
        return config
    dim = head_width(problem.query.shape[-1])
    # Room for scores, accumulators and, until the end, the addresses of statistics. With fewer registers ptxas
    # serializes the products, and with fewer than 94 it cannot compile those of 128 channels.
    least = 80 if config.keys <= 80 and dim <= 64 else 96
    needed = max(config.keys // 2 + max(dim, 64) // 2 + (8 if with_stats else 0), least)
    return config._replace(maxnreg=_maxnreg(needed, 2 * (2 * config.keys + SMALL_ROWS) * dim))


@lru_cache(maxsize=1024)
def rolling_tile_config(
    problem: Problem, pack: int | None = None, with_stats: bool = False, with_qk_prep: bool = False
) -> RollingTileConfig | None:
    """The configuration of the rolling kernel with few scores, few parts, and few keys that are new to a tile.

    Args:
        with_qk_prep: queries and keys are normalised or rotated first.
    """
    if not _is_small(problem) or prod(problem.stride) > 1 or prod(problem.dilation) > 1:
        return None
    most = most_packed(problem)
    packs = [pack] if pack else [most >> i for i in range(most.bit_length())]
    configs = [
        rolling_candidate(problem, tile, axis, heads, with_stats, with_qk_prep)
        for heads in packs for tile in small_tiles(problem, heads) for axis in range(3)
    ]  # fmt: skip
    return min((x for x in configs if x is not None), key=_rolling_cost, default=None)


def _rolling_cost(config: RollingTileConfig) -> tuple[int, int]:
    return config.keys + 4 * (config.stages - 1 + len(config.rest)), prod(config.box)


def rolling_candidate(
    problem: Problem, tile: Box, axis: int, pack: int, with_stats: bool = False, with_qk_prep: bool = False
) -> RollingTileConfig | None:
    """The configuration of runs of these tiles along an axis; None if there is none."""
    axes = problem.axes
    step, window = tile[axis], axes[axis][1]
    extents = [extent(x, b, window_bounds) for x, b in zip(axes, tile, strict=True)]
    box = three_axes([step if i == axis else next_power_of_2(n) for i, n in enumerate(extents)], 1)
    across = prod(box) // step
    stages, unit = ceil((step + window - 1) / step), max(1, 16 // across)  # a matrix instruction takes at least 16 keys
    last = step + window - 1 - (stages - 1) * step
    rest = tuple(across * unit * n for n in binary_parts(ceil(last / unit), PARTS))
    start = _rolling_start(axes[axis], step, (stages - 1) * step + sum(rest) // across)
    if stages == 1 or prod(box) < 16 or start is None or (axis == 0 and start[0]):
        return None
    config = RollingTileConfig(tile, pack, axis, box, stages, rest, *start, _register_keys(problem), False, 0)
    if config.keys > ROLLING_SCORES:
        return None
    dim = head_width(problem.query.shape[-1])
    shared = 2 * dim * (2 * (stages * prod(box) + config.registers) + SMALL_ROWS)
    # Room for scores, accumulators, what stays from tile to tile and, until the end, the addresses of statistics.
    needed = max(config.keys // 2 + max(dim, 64) // 2 + 12 + config.keys // 32 + (8 if with_stats else 0), 80)
    apart = config._replace(maxnreg=_maxnreg(needed, shared + 2 * dim * SMALL_ROWS))
    in_ring = config._replace(in_ring=True, maxnreg=_maxnreg(needed, shared))
    # Where every query head has keys of its own, loads that start early are worth more than another program, unless
    # queries and keys are prepared, which takes time of its own.
    ways = (apart, in_ring) if problem.group == 1 and not with_qk_prep else (in_ring, apart)
    return next((x for x in ways if x.maxnreg and (prod(box) >= SMALL_ROWS or not x.in_ring)), None)


@lru_cache(maxsize=4096)
def _rolling_start(axis: Axis, step: int, covered: int) -> tuple[int, int] | None:
    """``shift`` and ``phase`` of runs for which ``covered`` keys are enough for every tile; None if there are none."""
    length, window, stride, causal = axis
    for shift in range(step):
        phase = -((shift + (window - 1 if causal else window // 2)) % step)
        first = torch.arange(0, length + shift, step) - shift
        low, _ = window_bounds(first.clamp(min=0), length, window, stride, causal)
        _, high = window_bounds((first + step - 1).clamp(max=length - 1), length, window, stride, causal)
        first_stage = (low - phase) // step
        # At most one stage is new to a tile, and what a tile sees ends within its stages.
        if bool((high - first_stage * step - phase < covered).all()) and bool((first_stage.diff() <= 1).all()):
            return shift, phase
    return None


def cut(tiles: int, tile_rows: int, programs: int) -> tuple[tuple[int, int], int]:
    """How to cut rows of tiles into runs: number and length of the long runs of a row, and length of the others.

    Long runs load less; short runs that start last let all programs end at the same time.

    Args:
        tiles: tiles of a row.
        tile_rows: number of rows.
        programs: programs that run at the same time.
    """

    def cost(runs: tuple[tuple[int, int], int]) -> float:
        (count, long), short = runs
        rest = tiles - count * long
        work = count * (long + START) + ceil(rest / short) * START + rest
        longest = ceil(tile_rows * count / programs) * (long + START)
        return max(tile_rows * work / programs + (short + START) / 2, longest)

    longs = ((tiles // long, long) for long in range(2, min(tiles, 32) + 1))
    choices = [((0, 1), 1), *product(longs, (1, 2, 3))]
    return min(choices, key=cost)


@lru_cache(maxsize=1024)
def small_dq_tile_config(problem: Problem, pack: int | None = None) -> SmallTileConfig | None:
    """The configuration for gradients of queries; None if the kernel cannot compute them."""
    config = small_tile_config(problem, pack)
    if config is None or config.keys > BACKWARD_SCORES:
        return None
    dim = head_width(problem.query.shape[-1])
    # Room for scores of 64 keys and their gradients, accumulators and some more; with less ptxas serializes products.
    repeats = sum(prod(part) // 64 for part in config.parts) > 1
    needed = dim // 2 + (112 if repeats else 80)
    most = _maxnreg(needed, 4 * (config.keys + SMALL_ROWS) * dim)
    return config._replace(maxnreg=most) if most else None


@lru_cache(maxsize=1024)
def small_dkv_tile_config(problem: Problem) -> SmallTileConfig | None:
    """The configuration for gradients of keys and values; None if the kernel cannot compute them.

    Here rows are keys, and ``keys`` are the queries of one head that see a tile.
    """
    p = problem
    if not _has_small_heads(p) or p.query.shape[0] >= 2**16:
        return None
    dim = head_width(p.query.shape[-1])
    bare = p._replace(additional_keys=None)
    configs = [small_candidate(bare, tile, axis, 1, query_bounds) for tile in small_tiles(p, 1) for axis in range(3)]
    config = min((x for x in configs if x.keys <= BACKWARD_SCORES and _fits(p, x)), key=_small_cost, default=None)
    if config is None:
        return None
    needed = 72 + dim  # room for scores of 32 queries and their gradients, two accumulators and some more
    most = _maxnreg(needed, 4 * (config.keys + SMALL_ROWS) * dim + 8 * config.keys)
    return config._replace(maxnreg=most) if most else None


def _programs(maxnreg: int) -> int:
    """Programs of four warps for which the hardware registers of a multiprocessor are enough."""
    return 2**16 // (128 * maxnreg)


def _maxnreg(needed: int, shared: int) -> int:
    """Hardware registers a thread: as many as the programs that share a multiprocessor leave to each other.

    0 where a program would be alone on a multiprocessor, because nothing would be computed there while it waits.

    Args:
        needed: the least number that is tried.
        shared: bytes of shared memory of a program, without barriers and the like.
    """
    programs = min(228 * 1024 // (shared + 1024 + 256), _programs(needed))
    return min(2**16 // (128 * programs) // 8 * 8, 248) if programs > 1 else 0


def binary_parts(count: int, most: int) -> list[int]:
    """At most ``most`` powers of two, the largest first, with the sum ``count`` or the least possible one above."""
    parts: list[int] = []
    while count > 0:
        last = len(parts) == most - 1
        parts.append(next_power_of_2(count) if last else 1 << (count.bit_length() - 1))
        count -= parts[-1]
    return parts


def holds_registers(registers: Layout) -> bool:
    """Whether a TMA descriptor can hold register tokens: all images share them, or strides are like those of tokens."""
    axes = zip(registers.shape[:-1], registers.stride[:-1], strict=True)
    return all(size == 1 or (step > 0 and step % 8 == 0) or (i == step == 0) for i, (size, step) in enumerate(axes))
