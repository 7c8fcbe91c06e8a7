"""Tile configurations by rule: how many queries and keys a program takes at a time, for any problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Literal, NamedTuple

import torch

from ...geometry import query_bounds

Box = tuple[int, int, int]
Axis = tuple[int, int, int, bool]  # length, kernel, stride, causal
Bounds = Callable[[torch.Tensor, int, int, int, bool], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class TileConfig:
    """Tile configuration: a program computes a ``tile`` of positions times ``pack`` heads, a ``chunk`` at a time."""

    tile: Box
    chunk: Box
    pack: int
    num_warps: int
    stages: int
    maxnreg: int | None = None
    """``maxnreg``: most registers of a thread, so that more programs share a multiprocessor."""
    skip_mask: bool = False
    """Skip the mask of chunks that lie inside every window. It pays when windows are much larger than tiles."""


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile that holds a head dim: Triton's matrix products take powers of two from 16 on."""
    return max(16, next_power_of_2(head_dim))


def head_width(head_dim: int) -> int:
    """Columns of a head in shared memory, a power of two from 32 on. TMA fills those behind the last with zeros."""
    return max(32, next_power_of_2(head_dim))


def column_parts(head_dim: int) -> tuple[int, ...]:
    """Columns of the tiles that hold a head dim: a power of two, or two whose sum is at most 3/4 of it (80 = 64 + 16).

    Milliseconds of the forward kernel on an H200, padded and in two parts: head dim 80 0.141 and 0.114, head dim 96
    0.362 and 0.327, head dim 192 0.532 and 0.483.
    """
    padded = padded_head_dim(head_dim)
    first = padded // 2
    rest = padded_head_dim(head_dim - first) if head_dim > first else padded
    return (first, rest) if padded > 32 and first + rest <= padded * 3 // 4 else (padded,)


def channel_parts(head_dim: int) -> tuple[int, ...]:
    """A head dim, rounded up to a multiple of 16, as powers of two, the largest first: 112 = 64 + 32 + 16."""
    rest, parts = -(-head_dim // 16) * 16, []
    while rest:
        parts.append(1 << (rest.bit_length() - 1))
        rest -= parts[-1]
    return tuple(parts)


def boxes(size: int, limits: Sequence[int]) -> list[Box]:
    """All boxes of ``size`` positions whose sides are powers of two, and within the padded limits if possible."""
    caps = [next_power_of_2(n) for n in limits]
    sides = [2**i for i in range(size.bit_length())]
    fitting = [
        (t, h, size // (t * h))
        for t, h in product(sides, sides)
        if t * h <= size and t <= caps[0] and h <= caps[1] and size // (t * h) <= caps[2]
    ]
    return fitting or [(caps[0], caps[1], max(1, size // (caps[0] * caps[1])))]


def covered(extents: Sequence[int], chunk: Box) -> int:
    """Positions that a walk in chunks over a box of ``extents`` computes, those outside of the box included."""
    return prod(ceil(extent / step) * step for extent, step in zip(extents, chunk, strict=True))


@lru_cache(maxsize=1024)
def best_boxes(positions: int, keys: int, lengths: Box, kernel: Box, rows_are_keys: bool = False) -> tuple[Box, Box]:
    """Tile and chunk for which the fewest scores are computed, those of idle rows included.

    Among equals the tile with the smallest union of windows is taken, then the chunk whose rows are nearest to 16 keys.
    Idle rows decide where an axis is short: over 24x68x80 positions a tile of 32x2x2 sees fewer keys than one of 4x4x8,
    but makes the kernel compute more scores. Borders decide where ``rows_are_keys``, which are seen by more queries
    there: 8x8 keys of 9x9 windows are seen by 16x16 queries, and some near a border by 20x20, which chunks of 4x4 cover
    better than those of 1x16.
    """
    axes = [(n, min(k, n), 1, False) for n, k in zip(lengths, kernel, strict=True)]

    def cost(pair: tuple[Box, Box]) -> tuple[int, int, int]:
        tile, chunk = pair
        union = [min(b + k - 1, n) for b, k, n in zip(tile, kernel, lengths, strict=True)]
        if rows_are_keys:
            scores = prod(executed(*sides, query_bounds) for sides in zip(axes, tile, chunk, strict=True))
        else:
            scores = covered(union, chunk) * covered(lengths, tile)
        return scores, sum(union), abs(chunk[2] - 16)

    unions = tuple(min(n, positions + k - 1) for n, k in zip(lengths, kernel, strict=True))
    pairs = product(boxes(positions, lengths), boxes(keys, unions))
    return min(pairs, key=cost)


def packed_heads(group: int, positions: int) -> int:
    """Number of query heads of a KV head that a program computes; they share loads of keys, masks and window bounds.

    It is the largest power of two that leaves at most an eighth of the rows idle. For a group of 3 that is one head
    (17x17 keys of head dim 96 take 0.425 ms, and 0.464 ms with four heads a program).
    """

    def idle(pack: int) -> float:
        return 1 - group / (ceil(group / pack) * pack)

    packs = (2**i for i in range(5) if 2**i <= positions)
    return max(pack for pack in packs if pack <= next_power_of_2(group) and idle(pack) <= 0.125)


Kind = Literal["forward", "jvp", "backward_query", "backward_key"]


class ProblemClass(NamedTuple):
    """The properties of a call that tiles depend on. There are always three axes, ``t h w``."""

    device: str
    """Name of the device."""
    shared_memory: int
    """Bytes of shared memory that a program can have on the device."""
    lengths: Box
    """Tokens of the longest residue class, per axis."""
    kernel: Box
    group: int
    head_dim: int
    value_dim: int
    element_size: int
    """In bytes."""


class Room(NamedTuple):
    """The shared memory that there is, and the properties that decide how much of it tiles take."""

    limit: int
    """Bytes that a program can have."""
    width: int
    """Columns of tiles that hold the larger head dim, in units of two bytes."""
    element_size: int
    """In bytes."""
    copies: int = 1
    """See :func:`tile_copies`."""


def columns(kind: Kind, problem: ProblemClass) -> int:
    """Columns of a program's accumulators, which it holds in registers."""
    query, value = sum(column_parts(problem.head_dim)), sum(column_parts(problem.value_dim))
    return {"forward": value, "jvp": value, "backward_query": query, "backward_key": max(query, value)}[kind]


def room(problem: ProblemClass) -> Room:
    columns = max(sum(column_parts(dim)) for dim in (problem.head_dim, problem.value_dim))
    width = columns * max(problem.element_size // 2, 1)
    return Room(problem.shared_memory, width, problem.element_size, tile_copies(problem.element_size))


def has_operands_in_registers(limit: int) -> bool:
    """Whether products read both operands from registers on a device with ``limit`` bytes of shared memory a program.

    That stands for the compute capability, which tiles do not know: GPUs of data centres from 9.0 on have 227 KiB, an
    A100 163, others 99 or less.
    """
    return limit < 200 * 2**10


MAXNREG_BESIDE_OPERANDS = 168
"""To what limits of a thread's hardware registers are raised where operands take some. With 96, 256 causal keys of 64
channels spill 312 bytes forward and 292 in dQ on an A100, with 168 none and 16 (``docs/profiles.md``)."""
MOST_BESIDE_OPERANDS = 99 * 2**10
"""Bytes of shared memory for which tiles of register tokens leave registers for operands. Those that fill an A100's 163
KiB spill 3424 bytes a thread in their gradients, with 40 tokens of 256 channels."""


def room_for_registers(problem: ProblemClass) -> Room:
    """:func:`room` for tiles of register tokens."""
    space = room(problem)
    if has_operands_in_registers(space.limit):
        return space._replace(limit=min(space.limit, MOST_BESIDE_OPERANDS))
    return space


def tile_copies(element_size: int) -> int:
    """Most copies of a program's own tile in shared memory: 2 for fp32, as a product may be three products in TF32."""
    return 2 if element_size == 4 else 1


def rule(kind: Kind, problem: ProblemClass, pack: int | None = None) -> TileConfig:
    """The tile configuration for any problem, with ``pack`` heads a program if given."""
    group = 1 if kind == "backward_key" else problem.group
    return _rule(kind, problem.lengths, problem.kernel, group, pack, room(problem), columns(kind, problem))


def register_tile(problem: ProblemClass, registers: int, kind: Kind = "backward_query") -> int:
    """Register tokens that a kernel takes at a time. The forward kernel takes as many as that of dQ."""
    tile, config = min(max(16, next_power_of_2(registers)), 64), rule(kind, problem)
    space = room_for_registers(problem)
    rows = prod(config.tile) * config.pack
    while tile > 16 and shared_memory(kind, rows, tile, 1, space) > space.limit:
        tile //= 2
    return tile


def register_block(problem: ProblemClass, registers: int) -> tuple[int, int]:
    """Register tokens, at most ``registers``, and queries that the kernel of their gradients takes at a time."""
    rows, space = 64 if problem.element_size == 2 else 16, room_for_registers(problem)
    while register_memory(registers, rows, space.width, space.copies) > space.limit and registers * rows > 256:
        registers, rows = (registers, rows // 2) if rows > 16 else (registers // 2, rows)
    return registers, rows


def register_memory(registers: int, rows: int, width: int, copies: int = 1) -> int:
    """Most bytes of shared memory of the kernel of register tokens' gradients.

    It holds ``copies`` of the keys and values of registers, and three stages of queries and output gradients.
    """
    return (copies * registers + 3 * rows) * width * 4 + 1024


def shared_memory(kind: Kind, rows: int, keys: int, stages: int, space: Room) -> int:
    """Most bytes of shared memory that a program takes.

    It holds its own tile of one tensor, or of two in the backward pass and in forward mode, and per stage a chunk of
    two tensors, in forward mode of four. In one of the stages there may be the weights of a chunk instead, which are
    larger where the head dim is small. Compiled kernels report these sizes, and less than 1 KiB of scratch.
    """
    tile = rows * space.width * (2 if kind == "forward" else 4) * space.copies
    chunk = keys * space.width * (8 if kind == "jvp" else 4)
    if kind == "jvp":  # weights and their tangents are beside the chunks
        tile += 2 * rows * keys * space.element_size
    return (stages - 1) * chunk + max(chunk, rows * keys * space.element_size) + tile + 1024


def fit(kind: Kind, rows: int, keys: int, stages: int, space: Room) -> tuple[int, int, int]:
    """``rows``, ``keys`` and ``stages``, reduced until they fit: fewer stages first, then smaller tiles."""
    while shared_memory(kind, rows, keys, stages, space) > space.limit and (stages, keys, rows) != (1, 16, 16):
        if stages > 2 or (keys == rows == 16):
            stages -= 1
        elif keys >= rows or rows == 16:
            keys //= 2
        else:
            rows //= 2
    return rows, keys, stages


LARGE_WINDOW = 512  # keys from which on matrix products bound the kernels; below, other instructions and L2 do
MIDDLE_WINDOW = 100  # keys from which on a tile of 64 keys pays, although some queries see only a part of it
INSIDE = 0.2  # share of chunks inside every window of a tile, from which on it pays to branch around the mask


class Size(NamedTuple):
    """Size of a program, before the boxes of its tile and chunk are chosen."""

    rows: int
    keys: int
    num_warps: int
    stages: int
    maxnreg: int | None = None


def size_of(kind: Kind, lengths: Box, window: int, space: Room, columns: int) -> Size:
    """The size that was fastest for problems like this one (H200, Triton 3.6, ``python -m benchmarks.sweep``).

    Comments give examples: a problem, the milliseconds that its kernel takes with this size, and in parentheses those
    with the best size of another kind.
    """
    if kind == "jvp":
        return jvp_size(window, space, columns)
    large, middle = window >= LARGE_WINDOW, window >= MIDDLE_WINDOW
    deep, flat = lengths[0] > 1, lengths[0] == lengths[1] == 1
    if space.element_size == 4:
        # A product is computed as three in TF32. As the operands are split in registers, tiles are half as large.
        # 7x7, head dim 64: forward 0.54 (64 rows 1.23), dQ 0.78 (1.13), dK and dV 1.22 (32 queries a chunk 1.30).
        # 3x7x13: 1.58 (2.74), 2.43 (3.04), 4.06 (16 queries a chunk 5.05). 7x11, head dim 32: 1.75 (2.49), 2.46 (2.82),
        # 4.26 (4.60). 9x9, head dim 128, with four warps: 1.64 (two 2.37), 2.36 (4.13), 3.80 (7.35).
        if space.width > 128:
            return Size(32, 32, 4, 2)
        if kind == "forward":
            return Size(32, 32, 2, 2)
        if kind == "backward_query":
            return Size(64, 32, 4, 2, 128) if space.width <= 64 else Size(32, 32, 2, 2)
        if space.width <= 64:
            return Size(64, 32, 4, 3)
        return Size(32, 32, 4, 2) if middle else Size(32, 16, 2, 3)
    if space.width > 128:
        # 64 rows of 256 accumulators do not fit into the registers of four warps. 1024 keys: 0.68 with eight warps
        # (four 4.8, with 380 bytes spilled); 7x7 keys: 0.71 with four warps and 32 rows (eight 0.92). Where only keys
        # are so wide (head dim 192 with values of 128), four warps suffice: 0.53.
        if kind == "forward" and columns > 128:
            return Size(64, 64, 8, 2) if large else Size(32, 64, 4, 2)
        if kind == "forward":
            return Size(64, 32, 4, 3)
        # 1024 keys of 256: 0.45 (64 rows 0.56); 128 keys of 192: 0.77 (32 keys a chunk 0.81).
        if kind == "backward_query":
            return Size(128, 32, 8, 3) if large else Size(64, 16, 4, 3)
        return Size(32, 32, 4, 2)  # 1024 keys of 256: 1.37 (16 queries a chunk 1.91)
    if kind == "backward_key":
        # Short chunks suit 2-D windows. 13x13 keys of head dim 128: 1.26 (32 queries a chunk 1.41), of 64: 0.61 (0.64);
        # 9x9 of 80: 0.34 (0.37); but 4x7x7: 3.92 (2.79), 2048 keys on one axis: 1.50 (1.33). A third program on a
        # multiprocessor pays where 80 accumulators leave room for it: 9x9 of 80 0.218 (two programs 0.227).
        plane = not large and not flat and (space.width > 64 or not deep)
        return Size(64, 16, 4, 3, 168 if space.width == 80 else None) if plane else Size(64, 32, 4, 3)
    if large:
        # 11x11x11 keys of head dim 64: forward 1.27, dQ 1.15 (128 rows 2.3 and 2.6); 40x40 of 128: 0.33 and 0.37 with
        # 128 rows (64 rows 0.36 and 0.39); dQ of 512 keys on one axis: 0.23 (64 keys a chunk 0.26).
        # dQ of 1024 causal keys of 128 on an A100 spills 2116 bytes a thread with 128 rows, and none with 64.
        if columns > 64:
            rows = 64 if kind == "backward_query" and has_operands_in_registers(space.limit) else 128
            return Size(rows, 64, 8, 3)
        return Size(64, 32, 4, 3) if flat and kind == "backward_query" else Size(64, 64, 4, 3)
    if kind == "backward_query":
        return Size(64, 32, 4, 3, 96 if space.width <= 64 else None)
    if space.width > 64:
        return Size(64, 64, 4, 3)
    return Size(64, 32, 4, 3, 96) if flat else Size(64, 64, 4, 3, 128)


def jvp_size(window: int, space: Room, columns: int) -> Size:
    """The size of a program in forward mode, which holds scores, their tangents, and queries with their tangents.

    Comments give milliseconds of a call as those of :func:`size_of` do; sizes without are the largest for which ptxas
    spills few hardware registers or none, for compute capability 9.0.
    """
    large = window >= LARGE_WINDOW
    if space.element_size == 4:
        if space.width > 128:
            return Size(16, 16, 4, 2)
        return Size(16, 32, 4, 2) if large else Size(16, 16, 2, 2)  # 7x7, head dim 64: 1.82 (four warps, 32 keys 2.27)
    if space.width > 128:
        return Size(128, 16, 8, 2) if large else Size(32, 32, 4, 2)
    # 80x80 keys of head dim 128: 43.7 (32 keys a chunk 46.5); 4096 on one axis: 13.3 (13.6), of 64: 1.93 (64 rows
    # 2.00).
    if large and columns > 64 and shared_memory("jvp", 128, 64, 2, space) <= space.limit:
        return Size(128, 64, 8, 2)
    if large and columns <= 64 and shared_memory("jvp", 128, 32, 3, space) <= space.limit:
        return Size(128, 32, 8, 3)
    return Size(64, 32, 4, 2)  # 7x7: 0.69 (three stages 0.71)


@lru_cache(maxsize=1024)
def _rule(kind: Kind, lengths: Box, kernel: Box, group: int, pack: int | None, space: Room, columns: int) -> TileConfig:
    """The tile configuration for a problem's shape, reduced to what fits on devices with little shared memory."""
    window = prod(kernel)
    size = size_of(kind, lengths, window, space, columns)
    rows, keys, stages = fit(kind, size.rows, size.keys, size.stages, space)
    warps = min(size.num_warps, max(1, rows // 8))
    if window >= LARGE_WINDOW:
        pack = pack or min(packed_heads(group, rows), 4 if space.width > 128 else 2)
    pack = min(pack or packed_heads(group, rows), rows)
    tile, chunk = best_boxes(rows // pack, keys, lengths, kernel, kind == "backward_key")
    skip_mask = inside_share(tile, chunk, kernel) >= INSIDE
    return TileConfig(tile, chunk, pack, warps, stages, register_limit(size.maxnreg, space), skip_mask)


def register_limit(maxnreg: int | None, space: Room) -> int | None:
    """``maxnreg``, raised to ``MAXNREG_BESIDE_OPERANDS`` where operands take registers."""
    if maxnreg is not None and has_operands_in_registers(space.limit):
        return max(maxnreg, MAXNREG_BESIDE_OPERANDS)
    return maxnreg


def inside_share(tile: Box, chunk: Box, kernel: Box) -> float:
    """Estimated share of the chunks of a tile's walk that lie inside all its windows, and so need no mask."""
    axes = zip(tile, chunk, kernel, strict=True)
    return prod(max(0, k - b + 1 - c + 1) / (b + k - 1) for b, c, k in axes)


@lru_cache(maxsize=4096)
def extent(axis: Axis, tile: int, bounds: Bounds) -> int:
    """The most columns that a tile of rows sees along an axis."""
    low, high = spans(axis, tile, bounds)
    return int((high - low + 1).max())


@lru_cache(maxsize=4096)
def executed(axis: Axis, tile: int, chunk: int, bounds: Bounds, alignment: int = 1) -> int:
    """Pairs of a row and a column that a kernel computes along an axis, if chunks start at multiples of alignment."""
    low, high = spans(axis, tile, bounds)
    low = low // alignment * alignment
    return int(((high - low + chunk).clamp(min=0) // chunk).sum()) * tile * chunk


@lru_cache(maxsize=4096)
def executed_on_ring(axis: Axis, tile: int, chunk: int, bounds: Bounds) -> int:
    """:func:`executed` on a periodic axis, whose bounds are unwrapped, if a chunk ends where the ring does."""
    low, high = spans(axis, tile, bounds)
    length, size = axis[0], high - low + 1
    rest = (size - (length - low % length)).clamp(min=0)
    chunks = -((rest - size) // chunk) - (-(rest % length) // chunk) + rest // length * -(-length // chunk)
    return int(chunks.sum()) * tile * chunk


def spans(axis: Axis, tile: int, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last column that each tile of rows sees."""
    length, kernel, stride, causal = axis
    first = torch.arange(0, length, tile)
    low, _ = bounds(first, length, kernel, stride, causal)
    _, high = bounds((first + tile - 1).clamp(max=length - 1), length, kernel, stride, causal)
    return low, high
