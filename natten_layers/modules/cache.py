"""The key-value cache of :class:`~natten_layers.modules.llm.DecoderLM`: one rolling window per windowed layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .base import check_count

__all__ = ["Cache", "LayerCache"]


class CacheSlots(NamedTuple):
    """Cache slots of new tokens, as indices into a buffer ``[B, slots]``, and the positions that these slots get."""

    batch: Tensor  # [B, 1]
    slots: Tensor  # [B, L]
    positions: Tensor  # [B, L]


class _SlotAllocator:
    """Cache slots of one call's tokens, computed once for all layers with the same window and capacity."""

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
        if positions.shape[1] > window:  # several of these tokens map to one slot; only the last one is kept
            keep = keep & (positions > positions.amax(1, keepdim=True) - window)
    batch = torch.arange(len(positions), device=positions.device)[:, None]
    return CacheSlots(batch, torch.where(keep, slots, capacity), torch.where(keep, positions, -1))


class LayerCache:
    """Keys and values of one layer. The token at position ``p`` is stored in slot ``p``, or ``p % window``.

    Because the position determines the slot, texts of a batch may have different lengths and padding takes no memory.
    A layer with a window holds at most ``window + 1`` tokens a sequence. A layer without one holds fewer than twice the
    tokens of the longest text, or exactly ``max_length + 1`` if that is given.
    """

    def __init__(self, window: int | None, max_length: int | None, allocator: _SlotAllocator | None = None) -> None:
        self.window, self.max_length = window, max_length
        self.allocator = allocator or _SlotAllocator()
        self.used = 0
        """Only slots ``0 .. used - 1`` may hold tokens."""
        self.whole = False
        """Return all slots, the empty ones with position -1, so that shapes stay the same from call to call."""
        self.keys = self.values = self.positions = torch.empty(0)
        self.expected_length = 0
        """As that of the whole cache, see :meth:`Cache.expect`."""
        self.registers: tuple[Tensor, Tensor] | None = None
        """Keys and values of the layer's register tokens, ``[1, R, Hkv, D]`` each, kept after the first call."""

    @property
    def capacity(self) -> int:
        """Number of slots for tokens, -1 before the first call.

        The buffers have one slot more, to which padding is written: its position is always -1.
        """
        return self.positions.shape[-1] - 1

    def extend(self, key: Tensor, value: Tensor, positions: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        """Store new tokens and return the keys and values of all tokens that they may see.

        Args:
            key: ``[B, L, Hkv, D]``.
            value: ``[B, L, Hkv, Dv]``.
            positions: ``[B, L]`` int64, increasing by one from token to token; -1 marks padding, which is dropped.
                Layers of one cache compute the slots once per tensor, so it must not be changed between layers.
            longest: upper bound on the tokens of any sequence, the new ones included.

        Returns:
            Keys ``[B, S, Hkv, D]``, values ``[B, S, Hkv, Dv]`` and positions ``[B, S]``. They are views of the buffers,
            except when several tokens at once overflow the window: they overwrite tokens that the first of them still
            see, so copies of up to ``window + L`` tokens are returned.
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
        """Make room for ``used`` tokens. Buffers double in size, so that growth costs constant time per token."""
        if self.used <= self.capacity:
            return
        room = max(self.used, 2 * self.capacity if self.max_length is None else self.max_length)
        if self.window is not None:
            room = min(room, self.window)
        kept = self.capacity

        def grow(old: Tensor, like: Tensor) -> Tensor:
            batch, _, heads, dim = like.shape
            # In memory, heads come before slots, so that matrix products see batch and heads as one axis.
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
    """Keys and values of a batch of texts in every layer, for inference. ``DecoderLM.make_cache`` makes one.

    Args:
        batch_size: number of sequences.
        windows: one entry per layer: the number of tokens that a token sees, or None for all before it.
        max_length: tokens to allocate in layers without a window; None lets them grow as needed.

    Raises:
        ValueError: ``batch_size`` is negative, or ``max_length`` or a window is not at least 1.
    """

    def __init__(
        self,
        batch_size: int,
        windows: Sequence[int | None],
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_count("batch_size", batch_size, least=0)
        if max_length is not None:
            check_count("max_length", max_length)
        for layer, window in enumerate(windows):
            if window is not None:
                check_count(f"the window of layer {layer}", window)
        allocator = _SlotAllocator()
        self.layers = [LayerCache(window, max_length, allocator) for window in windows]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """Number of tokens of every sequence so far, ``[B]``."""
        self.longest = 0
        """An upper bound on ``lengths`` that the host knows without waiting for the device."""
        self.expected_length = 0
        """What :meth:`expect` was told."""

    def expect(self, length: int) -> None:
        """Say that the longest text will have so many tokens, before it is read in parts.

        RoPE that long texts stretch (LongRoPE, dynamic) then has the frequencies of the whole text from the first part
        on. Without this, each part has those of a text that ends there. The model refuses a length of more than its
        positions when it reads the first part.

        Raises:
            ValueError: ``length`` is negative, or there are tokens in the cache.
        """
        check_count("length", length, least=0)
        if self.longest:
            raise ValueError(f"the cache holds texts of up to {self.longest} tokens; call expect before they are read")
        for layer in self.layers:
            layer.expected_length = length
        self.expected_length = length

    @property
    def rope_length(self) -> int:
        """The length of text whose frequencies the keys have, 0 if there are none."""
        return max(self.longest, self.expected_length) if self.longest else 0

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def nbytes(self) -> int:
        """Total size of the buffers in bytes."""
        buffers = (t for layer in self.layers for t in (layer.keys, layer.values, layer.positions))
        return sum(t.numel() * t.element_size() for t in buffers)
