"""Loss by noise level, and the loss of images that are not trained on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .batches import Batch, Examples, Key, by_shape
from .sources import Photographs, Source


class Part:
    """Some images of a source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices, self.class_names = source, indices, source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        return self.source.load(self.indices[index], generator)


def hold_out(source: Source, count: int) -> tuple[Part, Part]:
    """What to train on, and ``count`` images to hold out: the same ones in every run on the same images.

    Raises:
        ValueError: photographs, each of which is all of its class, or fewer images than ``count + 1``.
    """
    if isinstance(source, Photographs):
        raise ValueError("--held-out needs other images: of the photographs, each is the only one of its class")
    if count >= len(source):
        raise ValueError(f"--held-out {count} leaves none of the {len(source)} images to train on")
    order = random.Random("held out").sample(range(len(source)), len(source))
    return Part(source, sorted(order[count:])), Part(source, order[:count])


def held_out_batches(part: Part, batch_size: int, rank: int, world: int) -> Iterator[list[Batch]]:
    """This process's share, always with the same noise. Only images whose place is less than ``len(part)`` count.

    All processes get as many batches of one size, as sharded models run in step: some see images again, uncounted.
    """
    examples = Examples(part, 0.0)
    own = -(-len(part) // world)
    for start in range(0, own, batch_size):
        places = [(start + i) * world + rank for i in range(min(batch_size, own - start))]
        yield by_shape([examples[Key(place % len(part), place, place)] for place in places])


def sums_by_level(losses: Tensor, levels: Tensor, edges: Sequence[float]) -> Tensor:
    """``[2, len(edges) + 1]``: sums and numbers of the losses ``[B]`` whose levels ``[B]`` lie between two edges."""
    bins = torch.bucketize(levels, torch.tensor(edges, dtype=levels.dtype, device=levels.device))
    sums = losses.new_zeros(2, len(edges) + 1)
    return sums.index_add(1, bins, torch.stack([losses, torch.ones_like(losses)]))


def level_names(name: str, edges: Sequence[float]) -> list[str]:
    bounds = [f"below {edges[0]:g}", *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges))]
    return [f"{name} {bound}" for bound in (*bounds, f"above {edges[-1]:g}")]


def means(sums: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The mean loss of each level that has any."""
    totals, counts = sums.tolist()
    return {name: total / n for name, total, n in zip(names, totals, counts, strict=True) if n}
