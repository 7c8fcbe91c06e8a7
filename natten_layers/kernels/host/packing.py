"""Samples of different shapes, packed one after the other: their windows, and the tables that kernels read.

A packed tensor ``[N, heads, head_dim]`` holds the tokens of sample after sample, each in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import AXES, Window, fitted, window_bounds
from ...wording import shorten

__all__ = [
    "FIELDS",
    "LineTables",
    "Packing",
    "SampleTables",
    "line_tables",
    "packing_of",
    "sample_bounds",
    "sample_tables",
]

FIELDS = 18
"""Integers that describe a sample to a kernel: its index, its first tile, its first token, and for each of three axes
its length, kernel size, stride, dilation and number of tiles."""


class Packing:
    """The shapes of a packed batch's samples. Equal shapes are equal packings; the hash is computed once."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], rank: int) -> None:
        self.shapes, self.rank = shapes, rank
        self.sizes = [prod(shape) for shape in shapes]
        """Number of tokens of each sample."""
        self.tokens = sum(self.sizes)
        self.negative = next((i for i, shape in enumerate(shapes) if min(shape, default=0) < 0), None)
        """A sample with a negative length, if there is one."""
        self._hash = hash((shapes, rank))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Packing) and (self.rank, self.shapes) == (other.rank, other.shapes))

    def __repr__(self) -> str:
        return f"Packing({len(self.shapes)} samples of {self.tokens} tokens)"

    @property
    def longest(self) -> tuple[int, ...]:
        """The largest length of each axis, at least 1."""
        return tuple(max((shape[axis] for shape in self.shapes), default=1) or 1 for axis in range(self.rank))


_packing = lru_cache(maxsize=256)(Packing)


def packing_of(
    shapes: Tensor, tokens: int, window: Window, name: str = "shapes or cu_seqlens", of: str = "query"
) -> Packing:
    """The packing of ``tokens`` tokens that ``shapes [samples, rank]`` on the CPU describes.

    ``name`` is that of the user's argument, where it is known: operators have one argument for both. ``of`` is the
    argument that has the tokens.

    Raises:
        ValueError: a length is negative, the samples do not have as many tokens, or the window, which is not cut to
            samples yet, has a dilation that does not divide a sample's periodic axis.
    """
    make = Packing if torch.compiler.is_compiling() else _packing  # a compiler warns of caches
    packing = make(tuple(map(tuple, shapes.tolist())), shapes.shape[1])
    if packing.negative is not None:
        i = packing.negative
        raise ValueError(f"{name} must not be negative, got {packing.shapes[i]} for sample {i}")
    if packing.tokens != tokens:
        given = shorten(packing.shapes, 200)
        raise ValueError(f"{name} add up to {packing.tokens} tokens, but {of} has {tokens}: {given}")
    _check_rings(packing, window)
    return packing


def _check_rings(packing: Packing, window: Window) -> None:
    for axis, (d, periodic) in enumerate(zip(window.dilation, window.is_periodic, strict=True)):
        if not periodic or d == 1:
            continue
        for i, (shape, size) in enumerate(zip(packing.shapes, packing.sizes, strict=True)):
            if size and shape[axis] % d:
                raise ValueError(
                    f"dilation {d} does not divide the length {shape[axis]} of the {AXES[packing.rank][axis]} axis of "
                    f"sample {i} with the shape {shape}, which is_periodic closes to a ring; use a dilation that does, "
                    "or pad or crop the sample"
                )


class SampleTables(NamedTuple):
    """What a kernel reads of its sample. Both are int32, on the device."""

    tiles: Tensor
    """``[tiles, FIELDS]``, for each tile its sample, so that a program waits for memory once before it begins"""
    samples: Tensor
    """``[samples, FIELDS]``"""


Box = tuple[int, int, int]


def _three(values: Sequence[int]) -> list[int]:
    return [1] * (3 - len(values)) + list(values)


def _tiles(shape: Sequence[int], window: Window, tile: Box) -> list[int]:
    """Number of tiles on each of three axes of a sample, over all its residue classes."""
    axes = zip(_three(shape), _three(window.dilation), tile, strict=True)
    return [d * ceil(ceil(n / d) / b) for n, d, b in axes]


# Batches of many images have the same few shapes again and again.
@lru_cache(maxsize=4096)
def _axes_of_sample(shape: tuple[int, ...], window: Window, tile: Box) -> tuple[tuple[int, ...], int]:
    """The last fields of a sample, from its lengths on, and its number of tiles."""
    own = fitted(shape, window)
    tiles = _tiles(shape, own, tile)
    axes = (shape, own.kernel_size, own.stride, own.dilation)
    return (*(n for values in axes for n in _three(values)), *tiles), prod(tiles)


@lru_cache(maxsize=64)
def _samples(packing: Packing, window: Window, tile: Box) -> tuple[list[tuple[int, ...]], list[int]]:
    """:func:`_axes_of_sample` of all samples: their fields, and their numbers of tiles."""
    found = [_axes_of_sample(shape, window, tile) for shape in packing.shapes]
    return [fields for fields, _ in found], [tiles for _, tiles in found]


def tile_count(packing: Packing, window: Window, tile: Box) -> int:
    return sum(_samples(packing, window, tile)[1])


# Every layer of a model asks for the same few tables in a step. They take 72 bytes a tile, of some 16 to 128 tokens.
@lru_cache(maxsize=64)
def sample_tables(packing: Packing, window: Window, tile: Box, device: torch.device) -> SampleTables:
    """The tables of a packed batch for tiles of one size. They are copied to the device once for equal arguments."""
    rows, counts = _samples(packing, window, tile)
    first_tiles, first_tokens = (accumulate(n, initial=0) for n in (counts, packing.sizes))
    starts = zip(range(len(rows)), first_tiles, first_tokens, rows, strict=False)
    samples = torch.tensor([[*start, *row] for *start, row in starts], dtype=torch.int32).reshape(-1, FIELDS)
    tiles = samples.repeat_interleave(torch.tensor(counts, dtype=torch.long), 0)
    return SampleTables(tiles.to(device), samples.to(device))


class LineTables(NamedTuple):
    """Bounds of windows in a packed batch with one axis and no dilation: ``[2, tokens]``, int32, on the device.

    Tokens count from the first one of the batch. No bound decreases from a token to the next, nor from a sample to the
    next.
    """

    windows: Tensor
    """the first and the last key that each query sees"""
    queries: Tensor
    """the first and the last query that sees each key"""


def _sample_bounds(packing: Packing, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last token of the sample of each token, ``[tokens]``, int32, on the device.

    They are made there from the lengths of the samples.
    """
    sizes = torch.tensor(packing.sizes, dtype=torch.int32).to(device)
    ends = sizes.cumsum(0, dtype=torch.int32)
    token = torch.arange(packing.tokens, dtype=torch.int32, device=device)
    sample = torch.searchsorted(ends, token, right=True)
    return (ends - sizes)[sample], ends[sample] - 1


# Every layer of a model asks for the same one or two tables in a step. They take 8 and 16 bytes a token.
sample_bounds = lru_cache(maxsize=16)(_sample_bounds)


@lru_cache(maxsize=16)
def line_tables(packing: Packing, window: Window, device: torch.device) -> LineTables:
    """The tables of a packed batch with one axis."""
    (kernel,), (stride,), (causal,) = window.kernel_size, window.stride, window.is_causal
    # Not the bounds that are kept: as their lengths are copied to the device, no table is made during the capture of a
    # CUDA graph, which would take back its memory.
    begin, end = _sample_bounds(packing, device)
    token = torch.arange(packing.tokens, dtype=torch.int32, device=device)
    # Windows of a longer axis, of which the last ones move back and the longest are cut.
    first, _ = window_bounds(token - begin, packing.tokens + kernel, kernel, stride, causal)
    first = torch.maximum(torch.minimum(begin + first, end + 1 - kernel), begin)
    last = token if causal else torch.minimum(first + kernel - 1, end)
    queries = torch.searchsorted(last, token), torch.searchsorted(first, token, right=True) - 1
    return LineTables(torch.stack((first, last)), torch.stack(queries).to(torch.int32))
