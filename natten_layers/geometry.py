"""Neighborhood windows: which keys a query sees along one axis, and which queries see a key.

The host's window arithmetic is in this module; kernels have the same in ``kernels/portable/windows.py``, and tests
compare the two.

An axis of length ``L`` with dilation ``d`` splits into ``d`` residue classes of tokens ``i`` with equal ``i % d``.
Inside its class a token has index ``i // d``, and the class has ``class_length(L, d, i % d)`` tokens. Windows are
intervals of class indices. The definition is that of NATTEN 0.21 (https://natten.org), but kernel size 1 is allowed.

On a periodic axis the tokens of a class form a ring. Its intervals are unwrapped: they may begin below 0 or end behind
the last index, and an index stands for the token at the index modulo the length of the class. As a window is no longer
than the ring, it holds every token at most once.

Queries may lie on another grid than keys: ``length`` is then that of the queries, and ``key_length`` is given. The two
axes have equal extents, so a query sees the keys around the one that its own centre falls on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm, prod
from numbers import Integral
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from .wording import shorten, with_type

__all__ = [
    "Window",
    "axis_mask",
    "class_length",
    "fitted",
    "is_per_axis",
    "longest_axis",
    "make_window",
    "normalise_axes",
    "query_bounds",
    "visible_pairs",
    "window_bounds",
    "window_mask",
    "without_numpy",
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
    is_periodic: tuple[bool, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    def is_full(self, spatial: Sequence[int]) -> bool:
        """True if every query sees every key: plain self-attention."""
        return tuple(spatial) == self.kernel_size and not any(self.is_causal)

    def is_past(self, spatial: Sequence[int]) -> bool:
        """True if every token of a sequence sees itself and all tokens before it: plain causal attention."""
        return self == Window(tuple(spatial), (1,), (1,), (True,), (False,))


def is_per_axis(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether an option has an entry for each axis. Texts are sequences too, but not of numbers."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def normalise_axes(name: str, value: T | Sequence[T], rank: int, kind: type[T]) -> tuple[T, ...]:
    """Repeat one value for ``rank`` axes, or check a sequence of ``rank`` values.

    Raises:
        ValueError: a wrong number of entries, or an entry that is not of ``kind``. A bool does not count as an int;
            integers and bools of NumPy count as Python's.
    """
    per_axis = is_per_axis(value)
    values: tuple[Any, ...] = tuple(value) if per_axis else (value,) * rank
    if len(values) != rank:
        axes = "there is 1 spatial axis" if rank == 1 else f"there are {rank} spatial axes"
        raise ValueError(f"{name} has {len(values)} entries {shorten(values)}, but {axes}")
    if any(type(entry) is not kind for entry in values):
        values = tuple(without_numpy(entry, kind) for entry in values)
    for axis, entry in enumerate(values):
        # In an exported graph a size may be symbolic.
        if type(entry) is not kind and not (kind is int and isinstance(entry, torch.SymInt)):
            raise ValueError(
                f"{name} must be {kind.__name__} or a tuple of {kind.__name__}, "
                f"got {with_type(entry)}"
                + (f" on the {AXES[rank][axis]} axis" if per_axis else "")
                + (f"; pass {name}.tolist()" if not per_axis and _lists(entry, kind) else "")
            )
    return values


def _lists(value: Any, kind: type) -> bool:
    """Whether ``value.tolist()``, of a tensor or an array, is what an argument may be."""
    try:
        listed = value.tolist()
    except (AttributeError, RuntimeError):  # it is none, or has no values, as on the device "meta"
        return False
    entries = listed if isinstance(listed, list) else [listed]
    return bool(entries) and all(type(entry) is kind for entry in entries)


def without_numpy(value: Any, kind: type) -> Any:
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    # By name, as NumPy need not be installed. Its bool is of no abstract class.
    if kind is bool and type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    return value


def make_window(
    spatial: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    is_periodic: bool | Sequence[bool] = False,
) -> Window:
    """Validate a neighborhood over axes of the lengths ``spatial``.

    Raises:
        ValueError: on some axis not ``kernel_size >= 1``, ``1 <= stride <= kernel_size``, ``dilation >= 1`` and
            ``kernel_size * dilation <= length``; or an axis is periodic and causal, or periodic with a length that its
            dilation does not divide. The message names the argument, the axis and the values.
    """
    rank = len(spatial)
    window = Window(
        normalise_axes("kernel_size", kernel_size, rank, int),
        normalise_axes("stride", stride, rank, int),
        normalise_axes("dilation", dilation, rank, int),
        normalise_axes("is_causal", is_causal, rank, bool),
        normalise_axes("is_periodic", is_periodic, rank, bool),
    )
    for name, length, k, s, d, causal, periodic in zip(
        AXES[rank], spatial, window.kernel_size, window.stride, window.dilation, window.is_causal, window.is_periodic,
        strict=True,
    ):  # fmt: skip
        if length < 1:
            raise ValueError(f"the {name} axis is empty (length {length})")
        if k < 1:
            raise ValueError(f"kernel_size must be at least 1, got {k} on the {name} axis")
        if d < 1:
            raise ValueError(f"dilation must be at least 1, got {d} on the {name} axis")
        if not 1 <= s <= k:
            raise ValueError(f"stride must lie in 1..kernel_size = 1..{k}, got {s} on the {name} axis")
        if k * d > length:
            ways = [f"a kernel_size of at most {length // d}"] if d <= length else []
            ways += ["a smaller dilation"] if d > 1 else []
            raise ValueError(
                f"kernel_size * dilation = {k} * {d} = {k * d} exceeds the {name} axis of length {length}; "
                f"use {' or '.join(ways)}"
            )
        if periodic and causal:
            raise ValueError(
                f"is_causal and is_periodic are both True on the {name} axis, but a ring has no first token; set one "
                "of them to False there"
            )
        if periodic and length % d:
            raise ValueError(
                f"dilation {d} does not divide the length {length} of the {name} axis, which is_periodic closes to a "
                "ring; use a dilation that does, or pad or crop the axis"
            )
    return window


def longest_axis(dilation: object) -> int:
    """The length of the longest axis of all that every dilation divides, as it must that of a ring.

    For checks of windows before the length of an axis is known. What is no valid dilation is left to them.
    """
    multiple = lcm(*(d for d in (dilation if is_per_axis(dilation) else (dilation,)) if isinstance(d, int) and d > 0))
    return sys.maxsize // multiple * multiple


def fitted(shape: Sequence[int], window: Window) -> Window:
    """The window cut to a sample of a packed batch, whose axes may be shorter than it.

    ``kernel_size`` becomes at most ``length // dilation``, and ``stride`` at most that. On an axis that is shorter than
    its dilation every token sees itself only, for which the dilation is 1 as well.
    """
    axes: list[tuple[int, int, int]] = []
    for length, k, s, d in zip(shape, window.kernel_size, window.stride, window.dilation, strict=True):
        k = max(1, min(k, length // d))
        axes.append((k, min(s, k), d if length >= d else 1))
    kernel_size, stride, dilation = zip(*axes, strict=True)
    return replace(window, kernel_size=kernel_size, stride=stride, dilation=dilation)


def class_length(length: int, dilation: int, residue: int) -> int:
    """Number of tokens ``i < length`` with ``i % dilation == residue``."""
    return (length - residue + dilation - 1) // dilation


def window_bounds(
    index: Index,
    length: int,
    kernel: int,
    stride: int,
    causal: bool,
    periodic: bool = False,
    key_length: int | None = None,
) -> tuple[Index, Index]:
    """First and last key (inclusive) that each query of one residue class sees.

    Neither decreases as the query increases.

    Args:
        index: class indices of the queries: an int, or an integer tensor of any shape.
        length: length of the class.
        periodic: the class is a ring, and the bounds are unwrapped.
        key_length: number of keys, if they are on another grid than queries.

    Returns:
        Two ints, or two tensors of the shape of ``index``.
    """
    group = index // stride * stride
    if causal:
        return _clamp(group + stride - kernel, 0, max(length - kernel, 0)), index
    if key_length is not None:
        leader = (2 * index + 1) * key_length // (2 * length)
    else:
        leader = _clamp(group + stride // 2, 0, length - 1)
    first = leader - kernel // 2
    if not periodic:
        first = _clamp(first, 0, (length if key_length is None else key_length) - kernel)
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


def query_bounds(
    index: Tensor,
    length: int,
    kernel: int,
    stride: int,
    causal: bool,
    periodic: bool = False,
    key_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`window_bounds`: first and last query (inclusive) that see each key of one class.

    Window bounds never decrease as the query increases, so the queries that see a key form an interval. It is never
    empty, as every query sees its own token, except where there are fewer queries than keys; its last query then comes
    before its first. Bounds on a ring are unwrapped.
    """
    end = index.new_full((), length - 1)
    if causal:
        last = (index + kernel - stride).div(stride, rounding_mode="floor") * stride + stride - 1
        return index, torch.where(index >= length - kernel, end, last.clamp(max=length - 1))
    # A window begins ``kernel // 2`` keys before its leader.
    first = _first_query(index + kernel // 2 - kernel + 1, length, stride, key_length)
    last = _first_query(index + kernel // 2 + 1, length, stride, key_length) - 1
    if periodic:
        return first, last
    keys = length if key_length is None else key_length
    first = torch.where(index < kernel, torch.zeros_like(index), first.clamp(min=0))
    return first, torch.where(index >= keys - kernel, end, last.clamp(max=length - 1))


def _first_query(leader: Tensor, length: int, stride: int, key_length: int | None) -> Tensor:
    """The first query, unwrapped, whose leader does not come before an unwrapped key."""
    keys = length if key_length is None else key_length
    turns = leader.div(keys, rounding_mode="floor")
    leader = leader - turns * keys
    if key_length is None:  # ceil((leader - stride // 2) / stride) * stride; the last group may be a part of one
        first = (-(-(leader - stride // 2)).div(stride, rounding_mode="floor") * stride).clamp(max=length)
    else:  # (2 query + 1) * key_length >= 2 * length * leader
        first = -(key_length - 2 * length * leader).div(2 * key_length, rounding_mode="floor")
    return first + turns * length


def axis_mask(
    length: int,
    kernel: int,
    stride: int,
    dilation: int,
    causal: bool,
    device: torch.device | str | None = None,
    *,
    periodic: bool = False,
    key_length: int | None = None,
) -> Tensor:
    """Visibility along one axis: bool ``[length, length or key_length]``, queries by keys.

    Args:
        key_length: number of keys, if they are on another grid than queries. Stride and dilation are then 1.
    """
    token, key = (torch.arange(length if n is None else n, device=device) for n in (None, key_length))
    mask = token[:, None] % dilation == key % dilation
    for r in range(dilation):
        members, class_keys = (class_length(n, dilation, r) for n in (length, len(key)))
        queries = token % dilation == r
        first, last = window_bounds(
            token[queries] // dilation,
            members,
            kernel,
            stride,
            causal,
            periodic,
            None if key_length is None else class_keys,
        )
        distance = key // dilation - first[:, None]
        distance = distance % class_keys if periodic else distance
        mask[queries] &= (distance >= 0) & (distance <= (last - first)[:, None])
    return mask


def window_mask(
    spatial: Sequence[int],
    window: Window,
    device: torch.device | str | None = None,
    key_spatial: Sequence[int] | None = None,
) -> Tensor:
    """Visibility over all axes: bool ``[queries, keys]`` in raster order. Allocates queries x keys bytes.

    Args:
        spatial: lengths of the queries' axes.
        key_spatial: lengths of the keys' axes, if they are on another grid.
    """
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for length, keys, k, s, d, causal, periodic in zip(
        spatial, key_spatial or [None] * len(spatial),
        window.kernel_size, window.stride, window.dilation, window.is_causal, window.is_periodic,
        strict=True,
    ):  # fmt: skip
        axis = axis_mask(length, k, s, d, causal, device, periodic=periodic, key_length=keys)
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return mask
