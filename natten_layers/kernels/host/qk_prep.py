"""What is done to queries and keys before attention, as the host sees it: its tensors, and what launches depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class QKPrepKind(NamedTuple):
    """The properties of normalisation and RoPE that the choice of a kernel depends on."""

    norm: str
    split: tuple[int, ...]
    """How many pairs of elements RoPE rotates by each coordinate of a position."""
    by_head: bool
    """Whether frequencies differ by head."""
    batched: bool
    """Whether positions differ by image."""
    interleaved: bool = False
    """Whether element ``2 i`` is rotated with ``2 i + 1``; otherwise ``i`` is rotated with ``i + pairs``."""
    by_axis: bool = False
    """Whether each of several coordinates has frequencies of its own."""

    @property
    def axes(self) -> int:
        """Number of coordinates of a position."""
        return len(self.split)

    @property
    def pairs(self) -> int:
        """Number of pairs of elements that RoPE rotates, over all axes."""
        return sum(self.split)


class QKPrep(NamedTuple):
    """The arguments of what is done to queries and keys before attention: normalisation of every head, then RoPE."""

    query_gain: Tensor | None
    """cosine: ``[Hq]`` or None; rms: ``[D]``"""
    key_gain: Tensor | None
    """cosine: ``[Hkv]`` or None; rms: ``[D]``"""
    positions: Tensor | None
    """``[B or 1, *spatial, axes]``"""
    freqs: Tensor | None
    """``[1 or more, n]``, fp32; several rows serve equally many consecutive heads each.

    A row has the frequencies of every axis or, with ``split``, those of all axes one after the other.
    """
    factor: float
    """Factor on the cosine and sine of all angles."""
    norm: str
    """none, cosine or rms"""
    eps: float
    split: Sequence[int] = ()
    """How many pairs of elements RoPE rotates by each axis; empty if all axes have the same frequencies."""
    interleaved: bool = False

    @property
    def kind(self) -> QKPrepKind:
        if self.positions is None or self.freqs is None:
            return QKPrepKind(self.norm, (0,), False, False)
        batch, *_, axes = self.positions.shape
        heads, each = self.freqs.shape
        split = tuple(self.split) or (each,) * axes
        return QKPrepKind(self.norm, split, heads > 1, batch > 1, self.interleaved, len(self.split) > 1)

    @property
    def by_head(self) -> bool:
        """Whether angles differ by head. A program then computes a head of several images, else heads of an image."""
        return self.freqs is not None and len(self.freqs) > 1
