"""Tiles: how many queries and keys a program takes at a time, by a rule that knows every problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Literal, NamedTuple

import torch

Box = tuple[int, int, int]
Axis = tuple[int, int, int, bool]  # length, kernel, stride, causal
Bounds = Callable[[torch.Tensor, int, int, int, bool], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Launch:
    """Shape of one program: a ``tile`` of positions times ``pack`` heads, and a ``chunk`` it walks with."""

    tile: Box
    chunk: Box
    pack: int
    num_warps: int
    stages: int
    max_registers: int | None = None
    """Cap per thread, so that more programs share a multiprocessor."""
    skip_mask: bool = False
    """Branch around the mask where a chunk lies inside every window: pays when windows are much larger than tiles."""


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: matrix instructions take powers of two from 16."""
    return max(16, next_power_of_2(head_dim))


def head_width(head_dim: int) -> int:
    """Channels of a head in shared memory: matrix instructions take powers of two. TMA reads zeros behind the last."""
    return max(32, next_power_of_2(head_dim))


def boxes(size: int, limits: Sequence[int]) -> list[Box]:
    """Boxes of ``size`` positions with power-of-two sides, within the padded limits where that is possible."""
    caps = [next_power_of_2(n) for n in limits]
    sides = [2**i for i in range(size.bit_length())]
    fitting = [
        (t, h, size // (t * h))
        for t, h in product(sides, sides)
        if t * h <= size and t <= caps[0] and h <= caps[1] and size // (t * h) <= caps[2]
    ]
    return fitting or [(caps[0], caps[1], max(1, size // (caps[0] * caps[1])))]


def covered(extents: Sequence[int], chunk: Box) -> int:
    """Positions executed when chunks walk over a box of ``extents``."""
    return prod(ceil(extent / step) * step for extent, step in zip(extents, chunk, strict=True))


@lru_cache(maxsize=1024)
def best_boxes(positions: int, keys: int, lengths: Box, kernel: Box) -> tuple[Box, Box]:
    """Tile and chunk that execute the fewest scores per query; among equals near-cubes, then rows of 16."""

    def cost(pair: tuple[Box, Box]) -> tuple[int, int, int]:
        tile, chunk = pair
        union = [min(b + k - 1, n) for b, k, n in zip(tile, kernel, lengths, strict=True)]
        return covered(union, chunk), sum(union), abs(chunk[2] - 16)

    unions = tuple(min(n, positions + k - 1) for n, k in zip(lengths, kernel, strict=True))
    pairs = product(boxes(positions, lengths), boxes(keys, unions))
    return min(pairs, key=cost)


def packed_heads(group: int, positions: int) -> int:
    """Query heads of one KV head in one program: they share its key loads, its masks and its window arithmetic."""
    return min(next_power_of_2(group), 16, positions)


Kind = Literal["forward", "backward_query", "backward_key"]


class ProblemClass(NamedTuple):
    """What tiles depend on. Axes are three, ``t h w``."""

    device: str
    """its name"""
    shared_memory: int
    """bytes that a program can have on it"""
    lengths: Box
    """tokens of a residue class, the longest one"""
    kernel: Box
    group: int
    head_dim: int
    value_dim: int
    element_size: int
    """bytes"""


class Room(NamedTuple):
    """Of shared memory: what there is, and what decides how much tiles take."""

    limit: int
    """bytes that a program can have"""
    width: int
    """the wider padded head dim, in units of two bytes"""
    element_size: int
    """bytes"""
    copies: int = 1
    """of :func:`tile_copies`"""


def room(problem: ProblemClass) -> Room:
    columns = max(padded_head_dim(problem.head_dim), padded_head_dim(problem.value_dim))
    width = columns * max(problem.element_size // 2, 1)
    return Room(problem.shared_memory, width, problem.element_size, tile_copies(problem.element_size))


def tile_copies(element_size: int) -> int:
    """How often a program's own tile is in shared memory at most: a product of fp32 may be three in TF32."""
    return 2 if element_size == 4 else 1


def rule(kind: Kind, problem: ProblemClass, pack: int | None = None) -> Launch:
    """What serves any problem, with ``pack`` heads a program if given."""
    group = 1 if kind == "backward_key" else problem.group
    return _rule(kind, problem.lengths, problem.kernel, group, pack, room(problem))


def register_tile(problem: ProblemClass, registers: int) -> int:
    """Registers that the kernels over queries take at a time."""
    tile, space = min(max(16, next_power_of_2(registers)), 64), room(problem)
    while tile > 16 and shared_memory("backward_query", 16, tile, 1, space) > space.limit:
        tile //= 2
    return tile


def register_block(problem: ProblemClass, registers: int) -> tuple[int, int]:
    """Registers, at most so many, and queries that the kernel of registers' gradients takes at a time."""
    rows, space = 64 if problem.element_size == 2 else 16, room(problem)
    while register_memory(registers, rows, space.width, space.copies) > space.limit and registers * rows > 256:
        registers, rows = (registers, rows // 2) if rows > 16 else (registers // 2, rows)
    return registers, rows


def register_memory(registers: int, rows: int, width: int, copies: int = 1) -> int:
    """:func:`shared_memory` of that kernel: two tensors' registers, ``copies`` times, and their rows three times."""
    return (copies * registers + 3 * rows) * width * 4 + 1024


def shared_memory(kind: Kind, rows: int, keys: int, stages: int, space: Room) -> int:
    """Bytes of shared memory that a program takes at most.

    Its own tile, of one tensor or two, and two tensors' chunks a stage; or for one stage less the weights of a chunk,
    which are more where heads are narrow. Read off compiled kernels; scratch is under 1 KiB.
    """
    tile = rows * space.width * (2 if kind == "forward" else 4) * space.copies
    chunk = keys * space.width * 4
    return (stages - 1) * chunk + max(chunk, rows * keys * space.element_size) + tile + 1024


def fit(kind: Kind, rows: int, keys: int, stages: int, space: Room) -> tuple[int, int, int]:
    """``rows``, ``keys`` and ``stages`` that there is room for: fewer stages first, then smaller tiles."""
    while shared_memory(kind, rows, keys, stages, space) > space.limit and (stages, keys, rows) != (1, 16, 16):
        if stages > 2 or (keys == rows == 16):
            stages -= 1
        elif keys >= rows or rows == 16:
            keys //= 2
        else:
            rows //= 2
    return rows, keys, stages


LARGE_WINDOW = 512  # keys; from here on matrix products bound the kernels, below it instructions and L2 do


@lru_cache(maxsize=1024)
def _rule(kind: Kind, lengths: Box, kernel: Box, group: int, pack: int | None, space: Room) -> Launch:
    """Tiles from the problem's shape.

    Measured on an H200 at head dims 64 and 128 in bf16 (``benchmarks/results``); wider heads, and devices with less
    shared memory, take what fits.
    """
    width = space.width
    if width > 128:
        rows, keys, warps, stages, registers = (32, 16, 4, 2, None) if kind == "backward_key" else (64, 32, 4, 2, None)
        if width > 256:
            rows, keys = 16, 16
    elif prod(kernel) >= LARGE_WINDOW:
        rows, keys, warps, stages, registers = {
            "forward": (128, 128, 8, 3, None),
            "backward_query": (128, 64, 8, 3, None),
            "backward_key": (64, 32, 4, 3, None),
        }[kind]
        pack = pack or min(next_power_of_2(group), 2)
    else:
        flat = lengths[0] == lengths[1] == 1
        rows, keys, warps, stages, registers = {
            "forward": (64, 32, 4, 3, 96) if flat else (64, 64, 4, 3, 128),
            "backward_query": (64, 32, 4, 3, 96),
            "backward_key": (64, 32, 4, 3, None) if flat else (32, 32, 2, 3, None),
        }[kind]
        if width > 64:
            registers = None
    rows, keys, stages = fit(kind, rows, keys, stages, space)
    pack = min(pack or packed_heads(group, rows), rows)
    tile, chunk = best_boxes(rows // pack, keys, lengths, kernel)
    # A branch around the mask pays where many chunks lie inside every window: large windows, and long rows.
    skip_mask = prod(kernel) >= LARGE_WINDOW or kernel[2] >= 4 * chunk[2]
    return Launch(tile, chunk, pack, warps, stages, registers, skip_mask)


@lru_cache(maxsize=4096)
def extent(axis: Axis, tile: int, bounds: Bounds) -> int:
    """Most columns that some tile of rows sees along an axis."""
    low, high = spans(axis, tile, bounds)
    return int((high - low + 1).max())


def spans(axis: Axis, tile: int, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last column that each tile of rows sees."""
    length, kernel, stride, causal = axis
    first = torch.arange(0, length, tile)
    low, _ = bounds(first, length, kernel, stride, causal)
    _, high = bounds((first + tile - 1).clamp(max=length - 1), length, kernel, stride, causal)
    return low, high
