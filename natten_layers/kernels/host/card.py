"""GPUs by name: what the choice of a kernel depends on, for a machine that does not have them."""

from __future__ import annotations

import re
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
    "A100 40GB": Card("NVIDIA A100-SXM4-40GB", (8, 0), 163 * 1024),
    "A100 PCIe": Card("NVIDIA A100 80GB PCIe", (8, 0), 163 * 1024),
    "A10": Card("NVIDIA A10", (8, 6), 99 * 1024),
    "RTX 3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 99 * 1024),
    "L4": Card("NVIDIA L4", (8, 9), 99 * 1024),
    "L40S": Card("NVIDIA L40S", (8, 9), 99 * 1024),
    "RTX 4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 99 * 1024),
    "H20": Card("NVIDIA H20", (9, 0), 227 * 1024),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 227 * 1024),
    "H100 NVL": Card("NVIDIA H100 NVL", (9, 0), 227 * 1024),
    "H100 PCIe": Card("NVIDIA H100 PCIe", (9, 0), 227 * 1024),
    "H200": Card("NVIDIA H200", (9, 0), 227 * 1024),
    "H200 NVL": Card("NVIDIA H200 NVL", (9, 0), 227 * 1024),
    "GH200": Card("NVIDIA GH200 480GB", (9, 0), 227 * 1024),
    "B200": Card("NVIDIA B200", (10, 0), 227 * 1024),
    "RTX 5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 99 * 1024),
}


def card_of(name: str | None) -> Card | None:
    """The card of this name, by which people or PyTorch know it; None for no name.

    Raises:
        ValueError: no card has this name.
    """
    if name is None:
        return None
    if isinstance(name, str):
        for known, card in CARDS.items():
            if _plain(name) in (_plain(known), _plain(card.name)):
                return card
    raise ValueError(f"device must be one of {', '.join(map(repr, CARDS))}, or None, got {name!r}")


def _plain(name: str) -> str:
    """Letters and digits of a name alone, without the maker, and without what says the same of every card."""
    return re.sub(r"nvidia|geforce|sxm\d*|hbm\w*|[^a-z0-9]", "", name.casefold())
