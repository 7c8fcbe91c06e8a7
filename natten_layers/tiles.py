"""Tiles of queries and the unions of their windows, for ``tile_attention.py``: their geometry, and tensors in tiles.

Every residue class of every axis is cut into tiles of consecutive queries. The union of a tile's windows is a box of
keys, too.

Shapes: ``Z`` is batch * KV heads, ``G`` query heads of a KV head, ``m`` tiles of an axis, ``T`` queries of a tile,
``U`` keys of a union.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Index, Window, class_length, window_bounds

__all__ = ["Axis", "Block", "heads_first", "plan", "tile_queries", "untile"]

LEAST_ROWS, TILE_ROWS = 16, 64
"""Least and intended rows of a tile, which are its queries times the heads of the group."""
LOAD_SCORES = 45
"""Number of scores whose computation takes as long as gathering a key and its value. It follows from timings: tiles of
32 and 64 rows are equally fast for a window of 7 x 7, and the smaller ones faster for 3 x 3 x 3."""


@dataclass(frozen=True)
class Axis:
    """One spatial axis cut into tiles: ``count`` tiles of ``tile`` queries for each of ``dilation`` residue classes."""

    length: int
    kernel: int
    stride: int
    dilation: int
    causal: bool
    periodic: bool
    tile: int
    key_length: int | None = None
    """Number of keys, if they are on another grid than queries. Stride and dilation are then 1."""

    @property
    def lead(self) -> int:
        """Keys of a ring's end that are repeated before its first, so that windows are intervals; else 0."""
        return self.kernel // 2 if self.periodic else 0

    @property
    def longest(self) -> int:
        """Queries of the longest residue class. Others may be one token shorter, and are padded to it."""
        return class_length(self.length, self.dilation, 0)

    @property
    def distinct_keys(self) -> int:
        """Keys of the longest residue class."""
        return self.longest if self.key_length is None else self.key_length

    @property
    def keys(self) -> int:
        """Keys of the longest residue class, those included that a ring repeats at both ends."""
        return self.distinct_keys + (self.kernel - 1 if self.periodic else 0)

    def union_keys(self, tile: int) -> int:
        """About as many keys as a tile of this many queries sees, borders and strides neglected."""
        spread = tile - 1
        if self.key_length is not None:
            spread = -(-spread * self.key_length // self.length)
        return min(self.kernel + spread, self.keys)

    @property
    def count(self) -> int:
        return -(-self.longest // self.tile)

    @property
    def tiles(self) -> int:
        return self.dilation * self.count

    def bounds(self, index: int, residue: int) -> tuple[int, int]:
        length = class_length(self.length, self.dilation, residue)
        first, last = self.windows(min(index, length - 1), length)
        return first, last

    def windows(self, index: Index, length: int) -> tuple[Index, Index]:
        """First and last of the keys, repeated ones included, that queries of a class of this length see."""
        first, last = window_bounds(
            index, length, self.kernel, self.stride, self.causal, self.periodic, self.key_length
        )
        return first + self.lead, last + self.lead

    def union(self, tile: int) -> tuple[int, int, int]:
        """Residue class of a tile, and first and last key (class indices, inclusive) of the union of its windows."""
        residue, position = divmod(tile, self.count)
        start = position * self.tile
        return residue, self.bounds(start, residue)[0], self.bounds(start + self.tile - 1, residue)[1]

    def block(self, start: int, stop: int) -> Block:
        unions = [self.union(tile) for tile in range(start, stop)]
        keys = max(last - first + 1 for _, first, last in unions)
        # All unions get the size of the largest, so at a border a union starts further inwards.
        first = [min(first, self.keys - keys) for _, first, _ in unions]
        tokens = [f * self.dilation + residue for f, (residue, *_) in zip(first, unions, strict=True)]
        origin = min(tokens)
        return Block(
            self, start, keys, tuple(first), origin, max(tokens) - origin, tuple(token - origin for token in tokens)
        )


@dataclass(frozen=True)
class Block:
    """Consecutive tiles of one axis, whose unions have ``keys`` keys each."""

    axis: Axis
    start: int
    keys: int
    first: tuple[int, ...]
    """First key of every tile's union, as a class index."""
    origin: int
    """First token that any tile sees."""
    spread: int
    """Largest of the offsets."""
    offsets: tuple[int, ...]
    """First token of every tile's union, relative to the origin."""

    @property
    def reach(self) -> int:
        """Tokens from the first to the last key of one tile."""
        return (self.keys - 1) * self.axis.dilation + 1

    @property
    def width(self) -> int:
        return self.spread + self.reach

    def view(self, x: Tensor, tile: int, dim: int) -> Tensor:
        """Keys of one tile's union, as a view of ``x``, which starts at the origin along ``dim``."""
        x = x.narrow(dim, self.offsets[tile], self.reach)
        return x if self.axis.dilation == 1 else x[(slice(None),) * dim + (slice(None, None, self.axis.dilation),)]

    def bias(self, like: Tensor) -> Tensor:
        """``[tiles, T, U]``: 0 where the query sees the key, else -inf."""
        axis, longest, device = self.axis, self.axis.longest, like.device
        tiles = range(self.start, self.start + len(self.first))
        index, key = self._indices(device)
        first, last = axis.windows(index.clamp(max=longest - 1), longest)
        if axis.length % axis.dilation:
            shorter = [tile // axis.count >= axis.length % axis.dilation for tile in tiles]
            short = torch.tensor(shorter, device=device)[:, None]
            bounds = axis.windows(index.clamp(max=longest - 2), longest - 1)
            first, last = (torch.where(short, *pair) for pair in zip(bounds, (first, last), strict=True))
        seen = (key[:, None, :] >= first[..., None]) & (key[:, None, :] <= last[..., None])
        return like.new_zeros(seen.shape).masked_fill_(~seen, -math.inf)

    def entries(self, device: torch.device) -> Tensor:
        """``[tiles, T, U]``: index into the table of relative positions; arbitrary where the key is invisible."""
        index, key = self._indices(device)
        most = self.axis.kernel - 1
        return (key[:, None, :] - self.axis.lead - index[..., None]).clamp(-most, most) + most

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Class indices of queries ``[tiles, T]`` and keys ``[tiles, U]``."""
        axis, tiles = self.axis, range(self.start, self.start + len(self.first))
        start = torch.tensor([tile % axis.count * axis.tile for tile in tiles], device=device)
        index = start[:, None] + torch.arange(axis.tile, device=device)
        key = torch.tensor(self.first, device=device)[:, None] + torch.arange(self.keys, device=device)
        return index, key


def plan(
    spatial: Sequence[int], window: Window, group: int, key_spatial: Sequence[int] | None = None
) -> tuple[Axis, ...]:
    """Choose tiles: double the tile on the axis where that adds the fewest keys to the union, as long as it pays."""
    # A compiled graph is specialised for these lengths. If they were symbolic, tracing the loops would take minutes.
    lengths = map(operator.index, spatial)
    options = window.kernel_size, window.stride, window.dilation, window.is_causal, window.is_periodic
    axes = [Axis(*arguments, tile=1) for arguments in zip(lengths, *options, strict=True)]
    if key_spatial is not None and tuple(key_spatial) != tuple(spatial):
        axes = [replace(a, key_length=operator.index(n)) for a, n in zip(axes, key_spatial, strict=True)]
    while (rows := group * math.prod([a.tile for a in axes])) < TILE_ROWS:
        growth = [_growth(a) if a.tile < a.longest else math.inf for a in axes]
        i = growth.index(min(growth))
        a = axes[i]
        if a.tile == a.longest:
            break
        grown = [*axes]
        grown[i] = replace(a, tile=min(2 * a.tile, a.longest))
        if rows >= LEAST_ROWS and _cost_of_query(grown, group) > _cost_of_query(axes, group):
            break
        axes = grown
    return tuple(axes)


def _growth(a: Axis) -> float:
    """By which factor the keys of a tile's union grow if the tile is doubled."""
    step = 1 if a.key_length is None else a.key_length / a.length
    return (a.kernel + 2 * a.tile * step) / (a.kernel + a.tile * step)


def _cost_of_query(axes: Sequence[Axis], group: int) -> float:
    """Time of a query's share of its tile, in units of the time to compute a score; borders are neglected."""
    keys = math.prod([a.union_keys(a.tile) for a in axes])
    return keys * (1 + LOAD_SCORES / (group * math.prod([a.tile for a in axes])))


def _pad(x: Tensor, lengths: Sequence[int], dim: int) -> Tensor:
    """Pad the axes from ``dim`` on to ``lengths`` with zeros at their ends."""
    extra = [new - old for new, old in zip(lengths, x.shape[dim:], strict=False)]
    if not any(extra):
        return x
    trailing = [0, 0] * (x.ndim - dim - len(extra))
    return F.pad(x, trailing + [p for e in reversed(extra) for p in (0, e)])


def tile_queries(query: Tensor, axes: tuple[Axis, ...], group: int) -> Tensor:
    """Cut ``[B, *spatial, Hq, D]`` into tiles ``[Z, *m, G, T, D]``; those of a residue class follow each other."""
    rank = len(axes)
    x = _pad(query, [a.count * a.tile * a.dilation for a in axes], 1)
    shape = [n for a in axes for n in (a.count, a.tile, a.dilation)]
    kv_heads = x.shape[-2] // group  # no size below is -1, as an empty batch leaves nothing to infer it from
    x = x.reshape(x.shape[0], *shape, kv_heads, group, x.shape[-1])
    head = 1 + 3 * rank
    tiles = [d for i in range(rank) for d in (3 + 3 * i, 1 + 3 * i)]
    x = x.permute(0, head, *tiles, head + 1, *(2 + 3 * i for i in range(rank)), head + 2)
    rows = math.prod([a.tile for a in axes])
    return x.reshape(x.shape[0] * kv_heads, *(a.tiles for a in axes), group, rows, x.shape[-1])


def untile(x: Tensor, axes: tuple[Axis, ...], query: Tensor) -> Tensor:
    """The inverse of :func:`tile_queries`: ``[Z, *m, G, T, D]`` to ``[B, *spatial, Hq, D]``."""
    rank, batch = len(axes), query.shape[0]
    tiles = [n for a in axes for n in (a.dilation, a.count)]
    kv_heads = query.shape[-2] // x.shape[-3]
    x = x.reshape(batch, kv_heads, *tiles, x.shape[-3], *(a.tile for a in axes), x.shape[-1])
    inner = 3 + 2 * rank  # the first axis of the queries of a tile, after the group
    axis_dims = [d for i in range(rank) for d in (3 + 2 * i, inner + i, 2 + 2 * i)]
    x = x.permute(0, *axis_dims, 1, inner - 1, inner + rank)
    x = x.reshape(batch, *(a.count * a.tile * a.dilation for a in axes), query.shape[-2], x.shape[-1])
    return x[(slice(None), *(slice(a.length) for a in axes))]


def heads_first(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """``[B, *spatial, Hkv, D]`` to ``[Z, *spatial, D]``.

    All residue classes are padded to one length, and rings repeat keys at both ends.
    """
    x = _pad(x.movedim(-2, 1).flatten(0, 1), [a.distinct_keys * a.dilation for a in axes], 1)
    for dim, axis in enumerate(axes, 1):
        if axis.keys > axis.distinct_keys:
            before, after = axis.lead * axis.dilation, (axis.kernel - 1 - axis.lead) * axis.dilation
            end = axis.distinct_keys * axis.dilation
            x = torch.cat([x.narrow(dim, end - before, before), x, x.narrow(dim, 0, after)], dim)
    return x
