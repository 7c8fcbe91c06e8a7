"""Neighborhood windows: which keys a query sees along one axis, and which queries see a key.

The host's window arithmetic is in this module; kernels have the same in ``kernels/portable/primitives.py``, and tests
compare the two.

An axis of length ``L`` with dilation ``d`` splits into ``d`` residue classes of tokens ``i`` with equal ``i % d``.
Inside its class a token has index ``i // d``, and the class has ``class_length(L, d, i % d)`` tokens. Windows are
intervals of class indices. The definition is that of NATTEN 0.21 (https://natten.org), but kernel size 1 is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "Window",
    "axis_mask",
    "class_length",
    "make_window",
    "query_bounds",
    "visible_pairs",
    "window_bounds",
    "window_mask",
]

T = TypeVar("T", int, bool)
Index = TypeVar("Index", int, Tensor)

AXES = {1: ("sequence",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True)
class Window:
    """A validated neighborhood: one entry per spatial axis in every field."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    def is_full(self, spatial: Sequence[int]) -> bool:
        """True if every query sees every key: plain self-attention."""
        return tuple(spatial) == self.kernel_size and not any(self.is_causal)

    def is_past(self, spatial: Sequence[int]) -> bool:
        """True if every token of a sequence sees itself and all tokens before it: plain causal attention."""
        return self == Window(tuple(spatial), (1,), (1,), (True,))


def normalise_axes(name: str, value: T | Sequence[T], rank: int, kind: type[T]) -> tuple[T, ...]:
    """Repeat one value for ``rank`` axes, or check a sequence of ``rank`` values.

    Raises:
        ValueError: a wrong number of entries, or an entry that is not of ``kind``. A bool does not count as an int, an
            integer of NumPy does.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name} has {len(values)} entries {values}, but the tensors have {rank} spatial axes")
    if kind is int and any(type(entry) is not int for entry in values):
        values = tuple(int(v) if isinstance(v, Integral) and not isinstance(v, bool) else v for v in values)  # NumPy
    for axis, entry in enumerate(values):
        # In an exported graph a size may be symbolic.
        if type(entry) is not kind and not (kind is int and isinstance(entry, torch.SymInt)):
            raise ValueError(
                f"{name} must be {kind.__name__} or a tuple of {kind.__name__}, "
                f"got {entry!r} of type {type(entry).__name__} on the {AXES[rank][axis]} axis"
            )
    return values


def make_window(
    spatial: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Window:
    """Validate a neighborhood over axes of the lengths ``spatial``.

    Raises:
        ValueError: on some axis not ``kernel_size >= 1``, ``1 <= stride <= kernel_size``, ``dilation >= 1`` and
            ``kernel_size * dilation <= length``; the message names the argument, the axis and the values.
    """
    rank = len(spatial)
    window = Window(
        normalise_axes("kernel_size", kernel_size, rank, int),
        normalise_axes("stride", stride, rank, int),
        normalise_axes("dilation", dilation, rank, int),
        normalise_axes("is_causal", is_causal, rank, bool),
    )
    for name, length, k, s, d in zip(
        AXES[rank], spatial, window.kernel_size, window.stride, window.dilation, strict=True
    ):
        if length < 1:
            raise ValueError(f"the {name} axis is empty (length {length})")
        if k < 1:
            raise ValueError(f"kernel_size must be at least 1, got {k} on the {name} axis")
        if d < 1:
            raise ValueError(f"dilation must be at least 1, got {d} on the {name} axis")
        if not 1 <= s <= k:
            raise ValueError(f"stride must lie in 1..kernel_size = 1..{k}, got {s} on the {name} axis")
        if k * d > length:
            raise ValueError(
                f"kernel_size * dilation = {k} * {d} = {k * d} exceeds the {name} axis of length {length}; "
                f"use a kernel_size of at most {length // d if d <= length else 0} or a smaller dilation"
            )
    return window


def class_length(length: int, dilation: int, residue: int) -> int:
    """Number of tokens ``i < length`` with ``i % dilation == residue``."""
    return (length - residue + dilation - 1) // dilation


def window_bounds(index: Index, length: int, kernel: int, stride: int, causal: bool) -> tuple[Index, Index]:
    """First and last key (inclusive) that each query of one residue class sees.

    Neither decreases as the query increases.

    Args:
        index: class indices of the queries: an int, or an integer tensor of any shape.
        length: length of the class.

    Returns:
        Two ints, or two tensors of the shape of ``index``.
    """
    group = index // stride * stride
    if causal:
        return _clamp(group + stride - kernel, 0, max(length - kernel, 0)), index
    first = _clamp(group + stride // 2 - kernel // 2, 0, length - kernel)
    return first, first + kernel - 1


def _clamp(value: Index, low: int, high: int) -> Index:
    return value.clamp(low, high) if isinstance(value, Tensor) else min(max(value, low), high)


def visible_pairs(spatial: Sequence[int], window: Window) -> int:
    """Number of (query, key) pairs of one head: the product of the numbers on each axis, as axes are independent."""
    axes = zip(spatial, window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True)
    return prod(_axis_pairs(*axis) for axis in axes)


@lru_cache
def _axis_pairs(length: int, kernel: int, stride: int, dilation: int, causal: bool) -> int:
    if not causal:
        return length * kernel
    pairs = 0
    for residue in range(dilation):
        members = class_length(length, dilation, residue)
        bounds = (window_bounds(i, members, kernel, stride, causal) for i in range(members))
        pairs += sum(last - first + 1 for first, last in bounds)
    return pairs


def query_bounds(index: Tensor, length: int, kernel: int, stride: int, causal: bool) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`window_bounds`: first and last query (inclusive) that see each key of one class.

    Window bounds never decrease as the query increases, so the queries that see a key form an interval. It is never
    empty, as every query sees its own token.
    """
    end = index.new_full((), length - 1)
    if causal:
        last = (index + kernel - stride).div(stride, rounding_mode="floor") * stride + stride - 1
        return index, torch.where(index >= length - kernel, end, last.clamp(max=length - 1))
    half = kernel // 2 - stride // 2
    last = (index + half).div(stride, rounding_mode="floor") * stride + stride - 1
    last = torch.where(index >= length - kernel, end, last.clamp(max=length - 1))
    # ceil((index - kernel + 1 + half) / stride) * stride
    first = -(-(index - kernel + 1 + half)).div(stride, rounding_mode="floor") * stride
    return torch.where(index < kernel, torch.zeros_like(index), first.clamp(min=0)), last


def axis_mask(
    length: int, kernel: int, stride: int, dilation: int, causal: bool, device: torch.device | str | None = None
) -> Tensor:
    """Visibility along one axis: bool ``[length, length]``, queries by keys."""
    token = torch.arange(length, device=device)
    index, residue = token // dilation, token % dilation
    mask = residue[:, None] == residue[None, :]
    for r in range(dilation):
        members = residue == r
        first, last = window_bounds(index[members], class_length(length, dilation, r), kernel, stride, causal)
        mask[members] &= (index[None, :] >= first[:, None]) & (index[None, :] <= last[:, None])
    return mask


def window_mask(spatial: Sequence[int], window: Window, device: torch.device | str | None = None) -> Tensor:
    """Visibility over all axes: bool ``[tokens, tokens]`` in raster order. Allocates tokens x tokens bytes."""
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for length, k, s, d, c in zip(
        spatial, window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True
    ):
        axis = axis_mask(length, k, s, d, c, device)
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).reshape(mask.shape[0] * length, -1)
    return mask
