"""Batches to train on: which examples they hold, how these are made of images, and the processes that load them.

Every random choice about an example (crop, augmentation, noise) comes from a seed of its own, made from the run's seed
and the example's number in the run. So a resumed run sees what an uninterrupted one would have seen, and a run on
several processes what a run on one would have seen, without any state to save.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import RawValue
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .augmentation import augment
from .images import UnreadableError
from .sources import SkipUnreadable, Source

T = TypeVar("T")


class Key(NamedTuple):
    """Names an example of a run."""

    item: int
    """index in the source"""
    seed: int
    place: int
    """in the global batch"""


class Batch(NamedTuple):
    """Examples; without the batch axis, one example."""

    image: Tensor  # [B, C, H, W] in [-1, 1]
    noise: Tensor  # [B, C, H, W]
    label: Tensor  # [B]
    uniform: Tensor  # [B, 3] in [0, 1): for the noise level, for whether to drop the class, and for a second time
    place: Tensor  # [B]
    aug_cond: Tensor  # [B, 9]


class Examples(Dataset[Batch]):
    """Examples of a source, complete with their noise. Images that cannot be read are skipped."""

    def __init__(self, source: Source, augment_probability: float) -> None:
        self.source, self.augment_probability = SkipUnreadable(source), augment_probability

    def __getitem__(self, key: Key) -> Batch:
        generator = torch.Generator().manual_seed(key.seed)
        pixels, label = self.source.load(key.item, generator)
        image, aug_cond = pixels.float() / 127.5 - 1, torch.zeros(9)
        if self.augment_probability:
            image, aug_cond = augment(image, self.augment_probability, generator)
        noise = torch.randn(image.shape, generator=generator)
        uniform = torch.rand(3, generator=generator)
        return Batch(image, noise, torch.tensor(label), uniform, torch.tensor(key.place), aug_cond)


class Keys(Sampler[list[Key]]):
    """Batches of keys without end, from any step of a run on: one batch per process, step and accumulation step.

    The batches that all processes take in one step, one after another, are the global batch.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, first_step: int, accumulate: int, rank: int, world: int
    ) -> None:
        self.length, self.batch_size, self.seed, self.first_step = length, batch_size, seed, first_step
        self.accumulate, self.rank, self.world = accumulate, rank, world

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulate * self.world

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, []
        number = (self.first_step * self.accumulate * self.world + self.rank) * self.batch_size
        while True:
            keys = []
            for n in range(number, number + self.batch_size):
                if n // self.length != epoch:
                    epoch = n // self.length
                    order = random.Random(f"{self.seed} epoch {epoch}").sample(range(self.length), self.length)
                seed = random.Random(f"{self.seed} example {n}").getrandbits(32)
                keys.append(Key(order[n % self.length], seed, n % self.global_batch))
            yield keys
            number += self.world * self.batch_size


def by_shape(examples: Sequence[Batch]) -> list[Batch]:
    """The examples of a batch, those with images of one shape together."""
    groups: dict[torch.Size, list[Batch]] = {}
    for example in examples:
        groups.setdefault(example.image.shape, []).append(example)
    return [default_collate(group) for group in groups.values()]


def pack(groups: Sequence[Batch]) -> tuple[Batch, list[tuple[int, int]]]:
    """One batch of them all, for one pass: images and noise are pixels ``[N, C]``, those of image after image.

    Returns:
        It, and the images' heights and widths.
    """

    def pixels(images: Tensor) -> Tensor:
        return images.flatten(2).transpose(1, 2).flatten(0, 1)

    rows = [Batch(pixels(group.image), pixels(group.noise), *group[2:]) for group in groups]
    shapes = [(group.image.shape[2], group.image.shape[3]) for group in groups for _ in group.label]
    return Batch(*map(torch.cat, zip(*rows, strict=True))), shapes


def default_workers(most: int) -> int:
    """How many processes load images unless a flag says so: no more than there are cores, of which PyTorch warns."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, cores)


@contextmanager
def load_batches(examples: Examples, keys: Keys, *, workers: int, pin_memory: bool) -> Iterator[Iterator[list[Batch]]]:
    """Batches without end, as :func:`by_shape` has them, loaded by ``workers`` processes that end with the context.

    An error in one of them is raised here, by the batch that it belongs to.
    """
    ending = RawValue("b", 0)  # shared with the workers, and without a lock that one of them could die with
    loader = DataLoader(
        examples,
        batch_sampler=keys,
        collate_fn=by_shape,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=partial(_outlive_signals, ending),
    )
    iterator = iter(loader)
    try:
        yield in_one_line(iterator)
    finally:
        ending.value = 1
        # A traceback may hold the iterator until Python exits, which then would wait for workers that wait for work.
        shutdown: Callable[[], None] | None = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


def in_one_line(batches: Iterator[T]) -> Iterator[T]:
    """The loader puts a worker's traceback into the message of its error; what is wrong is in its last line."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if not str(error).startswith("Caught "):
                raise
            last = str(error).strip().splitlines()[-1]
            for kind in ("ValueError", f"{UnreadableError.__module__}.{UnreadableError.__qualname__}"):
                last = last.removeprefix(f"{kind}: ")
            raise ValueError(last) from error
        yield batch


def _outlive_signals(ending: Any, worker: int) -> None:
    """Signals to all processes of a run are the main one's to answer: it takes its step to the end, and needs the data.

    Ctrl-C comes to all, and schedulers send to all. Only when the main process ends does SIGTERM mean what it says.
    """
    parent = os.getppid()

    def end(number: int, frame: FrameType | None) -> None:
        if ending.value or os.getppid() != parent:
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
