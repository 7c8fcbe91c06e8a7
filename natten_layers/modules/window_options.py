"""Checks of a layer's window options, in its constructor, before any input is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ..geometry import is_per_axis, longest_axis, make_window, normalise_axes

__all__ = ["all_one", "check_ranks", "check_window", "plain"]

T = TypeVar("T", int, bool)


def check_ranks(
    kernel_size: object, stride: object, dilation: object, is_causal: object, is_periodic: object
) -> tuple[int, ...]:
    """The numbers of axes that inputs may have."""
    ranks = {len(a) for a in (kernel_size, stride, dilation, is_causal, is_periodic) if is_per_axis(a)}
    if len(ranks) > 1 or not ranks <= {1, 2, 3}:
        raise ValueError(
            f"kernel_size={kernel_size}, stride={stride}, dilation={dilation}, is_causal={is_causal} and "
            f"is_periodic={is_periodic} must agree on 1 to 3 spatial axes"
        )
    return tuple(ranks) or (1, 2, 3)


def plain(name: str, value: T | Sequence[T], kind: type[T]) -> T | tuple[T, ...]:
    """An option of axes without types of NumPy, and hashable, as checked arguments are cached under these values."""
    entries = normalise_axes(name, value, len(value) if is_per_axis(value) else 1, kind)
    return entries if is_per_axis(value) else entries[0]


def check_window(
    kernel_size: int | tuple[int, ...] | None,
    stride: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    is_causal: bool | tuple[bool, ...],
    is_periodic: bool | tuple[bool, ...],
) -> None:
    """Raise in the constructor for window options that no input could fit, instead of at the first call."""
    options = stride, dilation, is_causal, is_periodic
    rank = next((len(a) for a in (kernel_size, *options) if isinstance(a, tuple)), 1)
    longest = longest_axis(dilation)
    make_window((longest,) * rank, longest if kernel_size is None else kernel_size, *options)


def all_one(value: int | tuple[int, ...]) -> bool:
    return all(v == 1 for v in value) if isinstance(value, tuple) else value == 1
