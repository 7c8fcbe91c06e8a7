"""How errors show what users gave."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["count_or_one", "listed", "shorten", "with_type"]


def shorten(value: object, most: int = 100) -> str:
    """A value as an error shows it: its ``repr`` on one line, cut to ``most`` characters.

    Arrays and tensors are shown by type, dtype and shape, as the beginning of their ``repr`` says little about them.
    """
    if (array := _array(value)) is not None:
        return array
    try:
        text = " ".join(line.strip() for line in repr(value).splitlines())
    except (RecursionError, ValueError):  # too deeply nested, or an int of more digits than Python prints
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(values: Sequence[object], most: int = 8) -> str:
    """The first values of a list as an error shows it, and how many there are if these are not all."""
    shown = ", ".join(map(shorten, values[:most]))
    return f"[{shown}]" if len(values) <= most else f"[{shown}, ...], {len(values)} in all"


def with_type(value: object) -> str:
    """:func:`shorten`, and the type."""
    return _array(value) or f"{shorten(value)} of type {type(value).__name__}"


def _array(value: object) -> str | None:
    """The type of an array with axes, its shape and dtype; None for all other values, NumPy's numbers among them."""
    shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
    if not isinstance(shape, tuple) or not shape or dtype is None:
        return None
    return f"{type(value).__name__} {tuple(shape)} of dtype {dtype}"


def count_or_one(count: object) -> str:
    """The lengths that an axis may have which is as long as another or, to be expanded, 1."""
    return "1" if count == 1 else f"{count} or 1"
