"""How the kernels of small windows compute a problem: tiles alone, or strips of them.

Apart from the kernels, as not every Triton has what they are written in.
"""

from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import NamedTuple

import torch

from ...geometry import query_bounds, window_bounds
from ..host.problem import Layout, Problem, three_axes
from ..host.tiling import Axis, Bounds, Box, boxes, extent, head_width, next_power_of_2

SMALL_ROWS = 64  # of a tile of the kernels for small windows
SCORES = 320  # of a row there at most, as they are in registers at once
STRIP_SCORES = 336  # the same of a strip: registers beside 320 keys are worth that some values spill
GRADIENTS = 256  # the same in the backward pass, whose kernels keep more beside them
LEAST_LOADED = 96  # keys that a tile sees, from which on strips are used,
RELOADED = 0.6  # if no more than this share of them is new to a strip
PARTS = 3  # that the keys of a tile come in at most
START = 0.2  # of a tile's time, that a strip needs for its first loads


class SmallLaunch(NamedTuple):
    """How the kernel of small windows computes a problem."""

    tile: Box
    """positions of a program"""
    pack: int
    """query heads of a program"""
    parts: tuple[Box, ...]
    """boxes of keys, one behind the other along ``axis``, that cover what a tile sees"""
    axis: int
    registers: int
    """keys of the box that holds the registers, or 0"""
    max_registers: int

    @property
    def keys(self) -> int:
        """that a program loads, registers included"""
        return sum(map(prod, self.parts)) + self.registers

    @property
    def frames(self) -> int:
        """that the parts have along ``t``"""
        return sum(box[0] for box in self.parts) if self.axis == 0 else self.parts[0][0]

    @property
    def programs(self) -> int:
        """that share a multiprocessor"""
        return _programs(self.max_registers)


class StripLaunch(NamedTuple):
    """How the kernel of small windows computes a problem a strip of tiles at a time."""

    tile: Box
    """positions of a turn"""
    pack: int
    """query heads of a program"""
    axis: int
    """along which the tiles of a strip follow each other"""
    box: Box
    """keys of a slab, which is as long as a tile"""
    slots: int
    """slabs that a tile sees"""
    rest: tuple[int, ...]
    """keys that it sees of the last one, in parts"""
    shift: int
    """positions that the first tile begins before the image, so that slabs begin where windows do"""
    phase: int
    """where on the axis the first slab begins, 0 or less"""
    registers: int
    """keys of the box that holds the registers, or 0"""
    in_ring: bool
    """whether results leave through a slot that is free, and not through memory of their own"""
    max_registers: int

    @property
    def keys(self) -> int:
        """whose scores a row has, registers included"""
        return (self.slots - 1) * prod(self.box) + sum(self.rest) + self.registers

    @property
    def programs(self) -> int:
        """that share a multiprocessor"""
        return _programs(self.max_registers)

    def tiles(self, problem: Problem) -> Box:
        """Tiles per axis."""
        lengths = [n + self.shift if i == self.axis else n for i, n in enumerate(problem.lengths)]
        return three_axes([ceil(n / b) for n, b in zip(lengths, self.tile, strict=True)], 1)


def strip_gap(problem: Problem, strip: StripLaunch, single: SmallLaunch | None) -> str | None:
    """Why strips were measured to be slower than tiles alone on problems like this one; None where they are faster."""
    if single is None:
        return None
    loaded = sum(map(prod, single.parts))
    if loaded < LEAST_LOADED:
        return f"tiles alone are faster: a tile sees {loaded} keys, fewer than {LEAST_LOADED}"
    if prod(strip.box) > RELOADED * loaded:
        return f"tiles alone are faster: {prod(strip.box)} of the {loaded} keys that a tile sees are new to it"
    if problem.rank == problem.group == 1:
        return "tiles alone are faster in 1-D where every query head has keys of its own"
    if strip.programs < single.programs and head_width(problem.query.shape[-1]) > 64:
        return f"tiles alone are faster: {single.programs} programs share a multiprocessor, not {strip.programs}"
    return None


@lru_cache(maxsize=1024)
def small_launch_of(problem: Problem, pack: int | None = None, with_state: bool = False) -> SmallLaunch | None:
    """The launch that computes the fewest scores, in the fewest parts; None if it can not be computed so.

    Strides are 1. Rows of one image follow those of another where TMA writes, so tiles do not reach past its end.
    """
    if not _is_small(problem):
        return None
    pack = pack or most_packed(problem)
    tiles = small_tiles(problem, pack)
    launches = [small_launch(problem, tile, axis, pack, with_state=with_state) for tile in tiles for axis in range(3)]
    return min((x for x in launches if x.max_registers and _fits(problem, x)), key=_small_cost, default=None)


def _is_small(problem: Problem) -> bool:
    """Whether the kernels of small windows can compute a call, given enough registers of the multiprocessor."""
    p = problem
    registers = [x for x in (p.additional_keys, p.additional_values) if x is not None]
    if (
        not _has_small_heads(p)
        or prod(p.stride) > 1
        or p.query.shape[0] >= 2**16
        or not all(map(holds_registers, registers))
    ):
        return False
    return len({x.stride[0] == 0 for x in registers}) < 2  # no keys that all images share, with values that they do not


def _has_small_heads(problem: Problem) -> bool:
    """Whether queries and values are equally wide, and registers hold scores and accumulators of that width."""
    dim = problem.query.shape[-1]
    return dim == problem.value.shape[-1] and head_width(dim) <= 128


def most_packed(problem: Problem) -> int:
    """Query heads of a program, the most that there can be: a power of two that divides the group."""
    return min(problem.group & -problem.group, 16)


def small_tiles(problem: Problem, pack: int) -> list[Box]:
    """Tiles of ``SMALL_ROWS`` rows."""
    tiles = boxes(SMALL_ROWS // pack, problem.lengths)
    return [x for x in tiles if problem.lengths[0] % x[0] == 0 and prod(x) * pack == SMALL_ROWS]


def _register_keys(problem: Problem) -> int:
    """Of the box that holds the registers."""
    return max(16, next_power_of_2(problem.registers)) if problem.registers else 0


def _fits(problem: Problem, launch: SmallLaunch) -> bool:
    """Whether an image of a batch has as many frames as parts have: else they would reach into another image."""
    return problem.query.shape[0] == 1 or launch.frames <= problem.lengths[0]


def _small_cost(launch: SmallLaunch) -> tuple[int, int, int]:
    return launch.keys, len(launch.parts), -launch.parts[0][2]


def small_launch(
    problem: Problem, tile: Box, axis: int, pack: int, bounds: Bounds = window_bounds, with_state: bool = False
) -> SmallLaunch:
    """That of one tile, which sees by ``bounds`` what comes in parts along one axis."""
    extents = [extent(x, b, bounds) for x, b in zip(problem.axes, tile, strict=True)]
    box = [next_power_of_2(e) for e in extents]
    unit = max(1, 16 // (prod(box) // box[axis]))  # matrix instructions take 16 keys at least
    sides = binary_parts(ceil(extents[axis] / unit), PARTS)
    parts = [three_axes([unit * side if i == axis else box[i] for i in range(3)], 1) for side in sides]
    launch = SmallLaunch(tile, pack, tuple(parts), axis, _register_keys(problem), 0)
    if launch.keys > SCORES:
        return launch
    dim = head_width(problem.query.shape[-1])
    # Scores, accumulators and, kept for the end, where statistics go; with fewer ptxas serializes the products, and
    # below 94 has no code for those of 128 channels.
    least = 80 if launch.keys <= 80 and dim <= 64 else 96
    needed = max(launch.keys // 2 + max(dim, 64) // 2 + (8 if with_state else 0), least)
    return launch._replace(max_registers=_registers_a_thread(needed, 2 * (2 * launch.keys + SMALL_ROWS) * dim))


@lru_cache(maxsize=1024)
def strip_launch_of(
    problem: Problem, pack: int | None = None, with_state: bool = False, rotates: bool = False
) -> StripLaunch | None:
    """The same a strip at a time: few scores, few parts, few keys that are new to a tile.

    Args:
        rotates: queries and keys are normalised or rotated first.
    """
    if not _is_small(problem):
        return None
    most = most_packed(problem)
    packs = [pack] if pack else [most >> i for i in range(most.bit_length())]
    launches = [
        strip_launch(problem, tile, axis, heads, with_state, rotates)
        for heads in packs for tile in small_tiles(problem, heads) for axis in range(3)
    ]  # fmt: skip
    return min((x for x in launches if x is not None), key=_strip_cost, default=None)


def _strip_cost(launch: StripLaunch) -> tuple[int, int]:
    return launch.keys + 4 * (launch.slots - 1 + len(launch.rest)), prod(launch.box)


def strip_launch(
    problem: Problem, tile: Box, axis: int, pack: int, with_state: bool = False, rotates: bool = False
) -> StripLaunch | None:
    """That of strips of such tiles along an axis, if there is one."""
    axes = problem.axes
    step, window = tile[axis], axes[axis][1]
    extents = [extent(x, b, window_bounds) for x, b in zip(axes, tile, strict=True)]
    box = three_axes([step if i == axis else next_power_of_2(n) for i, n in enumerate(extents)], 1)
    across = prod(box) // step
    slots, unit = ceil((step + window - 1) / step), max(1, 16 // across)  # matrix instructions take 16 keys at least
    last = step + window - 1 - (slots - 1) * step
    rest = tuple(across * unit * n for n in binary_parts(ceil(last / unit), PARTS))
    start = _strip_start(axes[axis], step, (slots - 1) * step + sum(rest) // across)
    if slots == 1 or prod(box) < 16 or start is None or (axis == 0 and start[0]):
        return None
    launch = StripLaunch(tile, pack, axis, box, slots, rest, *start, _register_keys(problem), False, 0)
    if launch.keys > STRIP_SCORES:
        return None
    dim = head_width(problem.query.shape[-1])
    shared = 2 * dim * (2 * (slots * prod(box) + launch.registers) + SMALL_ROWS)
    # Scores, accumulators, what stays from turn to turn and, kept for the end, where statistics go.
    needed = max(launch.keys // 2 + max(dim, 64) // 2 + 12 + launch.keys // 32 + (8 if with_state else 0), 80)
    apart = launch._replace(max_registers=_registers_a_thread(needed, shared + 2 * dim * SMALL_ROWS))
    in_ring = launch._replace(in_ring=True, max_registers=_registers_a_thread(needed, shared))
    # Where each query head has keys of its own, loads that start early are worth more than programs, if there is little
    # else to do.
    ways = (apart, in_ring) if problem.group == 1 and not rotates else (in_ring, apart)
    return next((x for x in ways if x.max_registers and (prod(box) >= SMALL_ROWS or not x.in_ring)), None)


@lru_cache(maxsize=4096)
def _strip_start(axis: Axis, step: int, covered: int) -> tuple[int, int] | None:
    """``shift`` and ``phase`` of strips, with which ``covered`` keys are enough for every tile."""
    length, window, stride, causal = axis
    for shift in range(step):
        phase = -((shift + (window - 1 if causal else window // 2)) % step)
        first = torch.arange(0, length + shift, step) - shift
        low, _ = window_bounds(first.clamp(min=0), length, window, stride, causal)
        _, high = window_bounds((first + step - 1).clamp(max=length - 1), length, window, stride, causal)
        slab = (low - phase) // step
        # No more than one slab is new to a tile, and what a tile sees does not reach past the last one.
        if bool((high - slab * step - phase < covered).all()) and bool((slab.diff() <= 1).all()):
            return shift, phase
    return None


def cut(tiles: int, lines: int, programs: int) -> tuple[tuple[int, int], int]:
    """How to cut ``lines`` of ``tiles`` into strips: how many long ones each, of how many tiles, and tiles of the rest.

    Long ones load less, short ones that start last let all programs end at the same time.

    Args:
        programs: that run at the same time.
    """

    def cost(strips: tuple[tuple[int, int], int]) -> float:
        (count, long), short = strips
        rest = tiles - count * long
        work = count * (long + START) + ceil(rest / short) * START + rest
        longest = ceil(lines * count / programs) * (long + START)
        return max(lines * work / programs + (short + START) / 2, longest)

    longs = ((tiles // long, long) for long in range(2, min(tiles, 32) + 1))
    choices = [((0, 1), 1), *product(longs, (1, 2, 3))]
    return min(choices, key=cost)


@lru_cache(maxsize=1024)
def small_query_launch_of(problem: Problem, pack: int | None = None) -> SmallLaunch | None:
    """The same for the gradients of queries."""
    launch = small_launch_of(problem, pack)
    if launch is None or launch.keys > GRADIENTS:
        return None
    dim = head_width(problem.query.shape[-1])
    # Scores and their gradients of 64 keys, accumulators and some more; with too few ptxas serializes the products.
    repeats = sum(prod(part) // 64 for part in launch.parts) > 1
    needed = dim // 2 + (112 if repeats else 80)
    most = _registers_a_thread(needed, 4 * (launch.keys + SMALL_ROWS) * dim)
    return launch._replace(max_registers=most) if most else None


@lru_cache(maxsize=1024)
def small_key_launch_of(problem: Problem) -> SmallLaunch | None:
    """The same for the gradients of keys and values: ``keys`` are the queries that see a tile, of one head."""
    p = problem
    if not _has_small_heads(p) or prod(p.stride) > 1 or p.query.shape[0] >= 2**16:
        return None
    dim = head_width(p.query.shape[-1])
    bare = p._replace(additional_keys=None)
    launches = [small_launch(bare, tile, axis, 1, query_bounds) for tile in small_tiles(p, 1) for axis in range(3)]
    launch = min((x for x in launches if x.keys <= GRADIENTS and _fits(p, x)), key=_small_cost, default=None)
    if launch is None:
        return None
    needed = 72 + dim  # scores and their gradients of 32 queries, two accumulators and some more
    most = _registers_a_thread(needed, 4 * (launch.keys + SMALL_ROWS) * dim + 8 * launch.keys)
    return launch._replace(max_registers=most) if most else None


def _programs(max_registers: int) -> int:
    """How many of four warps the registers of a multiprocessor are enough for."""
    return 2**16 // (128 * max_registers)


def _registers_a_thread(needed: int, shared: int) -> int:
    """As many as the programs that share a multiprocessor leave to each other.

    0 where a program would be alone there: then nothing is computed while it waits.

    Args:
        needed: less is not tried.
        shared: bytes of shared memory that a program has, but for barriers and the like.
    """
    programs = min(228 * 1024 // (shared + 1024 + 256), _programs(needed))
    return min(2**16 // (128 * programs) // 8 * 8, 248) if programs > 1 else 0


def binary_parts(count: int, most: int) -> list[int]:
    """At most ``most`` powers of two, the largest first, whose sum is ``count`` or the next that can be had."""
    parts: list[int] = []
    while count > 0:
        last = len(parts) == most - 1
        parts.append(next_power_of_2(count) if last else 1 << (count.bit_length() - 1))
        count -= parts[-1]
    return parts


def holds_registers(registers: Layout) -> bool:
    """Whether a TMA descriptor can hold them: one batch of them for all images, or strides as those of tokens."""
    axes = zip(registers.shape[:-1], registers.stride[:-1], strict=True)
    return all(size == 1 or (step > 0 and step % 8 == 0) or (i == step == 0) for i, (size, step) in enumerate(axes))
