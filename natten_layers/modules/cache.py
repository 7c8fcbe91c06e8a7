"""The key-value cache of :class:`~natten_layers.modules.llm.DecoderLM`: one rolling window per windowed layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Cache", "LayerCache"]


class CacheSlots(NamedTuple):
    """Where new tokens are stored, as indices into a buffer ``[B, slots]``, and the positions that are stored there."""

    batch: Tensor  # [B, 1]
    slots: Tensor  # [B, L]
    positions: Tensor  # [B, L]


class _SlotAllocator:
    """Places of one call's tokens, worked out once for all layers with the same window."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.known: dict[tuple[int | None, int], CacheSlots] = {}

    def of(self, positions: Tensor, window: int | None, capacity: int) -> CacheSlots:
        if positions is not self.positions:
            self.positions, self.known = positions, {}
        if (window, capacity) not in self.known:
            self.known[window, capacity] = _cache_slots(positions, window, capacity)
        return self.known[window, capacity]


def _cache_slots(positions: Tensor, window: int | None, capacity: int) -> CacheSlots:
    keep, slots = positions >= 0, positions
    if window is not None:
        slots = positions % window
        if positions.shape[1] > window:  # two of these tokens would claim one slot
            keep = keep & (positions > positions.amax(1, keepdim=True) - window)
    batch = torch.arange(len(positions), device=positions.device)[:, None]
    return CacheSlots(batch, torch.where(keep, slots, capacity), torch.where(keep, positions, -1))


class LayerCache:
    """Keys and values of one layer. Sequence ``b``'s token at position ``p`` lies in slot ``p``, or ``p % window``.

    Positions, not arrival, choose the slot, so texts of a batch may have different lengths and padding takes no room.
    Memory: at most ``window + 1`` tokens a sequence; without a window less than twice the longest text, or exactly
    ``max_length + 1`` where that is given.
    """

    def __init__(self, window: int | None, max_length: int | None, allocator: _SlotAllocator | None = None) -> None:
        self.window, self.max_length = window, max_length
        self.allocator = allocator or _SlotAllocator()
        self.used = 0
        """slots ``0 .. used - 1`` may hold tokens"""
        self.whole = False
        """return all slots, of which empty ones have position -1: then shapes stay the same from call to call"""
        self.keys = self.values = self.positions = torch.empty(0)
        self.registers: tuple[Tensor, Tensor] | None = None
        """projected registers ``[1, R, Hkv, D]``, which the layer leaves here so that they are computed once"""

    @property
    def capacity(self) -> int:
        """Slots for tokens, -1 before the first call. One more is there, for padding: its position stays -1."""
        return self.positions.shape[-1] - 1

    def extend(self, key: Tensor, value: Tensor, positions: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        """Store new tokens and return all that they may see.

        Args:
            key: ``[B, L, Hkv, D]``.
            value: ``[B, L, Hkv, Dv]``.
            positions: ``[B, L]``, growing by one from token to token; -1 for padding, which is dropped. Layers of one
                cache that are given the same tensor share what follows from it, so it must not change in between.
            longest: upper bound on the tokens of any sequence, these included.

        Returns:
            Keys ``[B, S, Hkv, D]``, values and positions ``[B, S]``. A view of the buffer, except when more than one
            token comes to a window that is full: then tokens that the first ones see are about to be overwritten, and
            a copy of window + L tokens is returned.
        """
        rolls = self.window is not None and longest > self.window
        seen = None
        if rolls and key.shape[1] > 1:
            seen = [key, value, positions]
            if self.used:
                past = (t[:, : self.used] for t in (self.keys, self.values, self.positions))
                seen = [torch.cat(pair, 1) for pair in zip(past, seen, strict=True)]
        self.used = longest if self.window is None else min(longest, self.window)
        self._reserve(key, value)
        self._write(key, value, positions)
        if seen is None:
            end = self.capacity if self.whole else self.used
            seen = [t[:, :end] for t in (self.keys, self.values, self.positions)]
        return seen[0], seen[1], seen[2]

    def _write(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        target = self.allocator.of(positions, self.window, self.capacity)
        self.keys[target.batch, target.slots] = key
        self.values[target.batch, target.slots] = value
        self.positions[target.batch, target.slots] = target.positions

    def _reserve(self, key: Tensor, value: Tensor) -> None:
        """Make room for ``used`` tokens, doubling so that growth costs a constant per token."""
        if self.used <= self.capacity:
            return
        room = max(self.used, 2 * self.capacity if self.max_length is None else self.max_length)
        if self.window is not None:
            room = min(room, self.window)
        kept = self.capacity

        def grow(old: Tensor, like: Tensor) -> Tensor:
            batch, _, heads, dim = like.shape
            # Heads before slots in memory: batch and heads are then one axis of the matrix products.
            new = like.new_zeros(batch, heads, room + 1, dim).transpose(1, 2)
            if kept > 0:
                new[:, :kept] = old[:, :kept]
            return new

        self.keys, self.values = grow(self.keys, key), grow(self.values, value)
        positions = torch.full((key.shape[0], room + 1), -1, dtype=torch.int64, device=key.device)
        if kept > 0:
            positions[:, :kept] = self.positions[:, :kept]
        self.positions = positions


class Cache:
    """What a model remembers of the texts of a batch, for inference. Make one with ``DecoderLM.make_cache``.

    Args:
        batch_size: number of sequences.
        windows: per layer, the window or None.
        max_length: tokens to make room for in layers without a window; None grows as needed.
    """

    def __init__(
        self,
        batch_size: int,
        windows: Sequence[int | None],
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        allocator = _SlotAllocator()
        self.layers = [LayerCache(window, max_length, allocator) for window in windows]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """tokens of every sequence so far, ``[B]``"""
        self.longest = 0
        """an upper bound on ``lengths`` that is known without asking the device"""

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        buffers = (t for layer in self.layers for t in (layer.keys, layer.values, layer.positions))
        return sum(t.numel() * t.element_size() for t in buffers)
