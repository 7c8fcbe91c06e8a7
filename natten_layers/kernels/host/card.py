"""GPUs by name: what the choice of a kernel depends on, for a machine that does not have them."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """What the choice of a kernel depends on."""

    name: str
    """As PyTorch reports it, so that what was tuned on such a card holds."""
    capability: tuple[int, int]
    shared_memory: int
    """Bytes that a program can have."""


# NVIDIA's CUDA C++ Programming Guide has a table of shared memory by compute capability.
CARDS = {
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 163 * 1024),
    "RTX 4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 99 * 1024),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 227 * 1024),
    "H200": Card("NVIDIA H200", (9, 0), 227 * 1024),
    "B200": Card("NVIDIA B200", (10, 0), 227 * 1024),
    "RTX 5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 99 * 1024),
}


def card_of(name: str | None) -> Card | None:
    """The card of this name; None for no name.

    Raises:
        ValueError: no card has this name.
    """
    if name is None:
        return None
    if not isinstance(name, str) or name not in CARDS:
        raise ValueError(f"device must be one of {', '.join(map(repr, CARDS))}, or None, got {name!r}")
    return CARDS[name]
