"""Samples of a model in training, and how far they are from the images that it learns from."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from natten_layers import HDiT, HDiTConfig

from .distances import NAMES, features_of, frechet_distance, kernel_distance, open_features
from .held_out import Part
from .parallel import Processes
from .pictures import to_bytes
from .running import Signals
from .sample_hdit import DEFAULTS, Request, digest, picture, sample_batches
from .sources import Photographs, SkipUnreadable, Source

GATHERED = 1024
"""Features of a process that travel at a time: those of all images may not fit beside a model on a GPU."""


class SamplingStoppedError(Exception):
    """A process was told to stop while images were sampled."""


class Samples:
    """Images that a model makes at some step of its training, of all classes.

    Args:
        steps: of the sampler; None is what the model's objective takes.
        signals: whether this process was told to stop.
    """

    def __init__(
        self, model: HDiT, plan: HDiTConfig, processes: Processes, signals: Signals, *, steps: int | None, seed: int
    ) -> None:
        self.model, self.plan, self.processes, self.signals = model, plan, processes, signals
        self.steps, self.seed = steps, seed

    def request(self, count: int) -> Request:
        """For ``count`` images of each class."""
        sampler, steps = DEFAULTS[self.plan.objective]
        classes = tuple(range(self.plan.num_classes))
        return Request(classes=classes, count=count, sampler=sampler, steps=self.steps or steps, seed=self.seed)

    def batches(self, request: Request) -> Iterator[Tensor]:
        """Batches of images; every process must take all of them.

        Raises:
            SamplingStoppedError: a process was told to stop.
        """

        def on_step() -> None:
            if self.processes.any(self.signals.stop_wanted):
                raise SamplingStoppedError

        return sample_batches(self.model, self.plan, request, quiet=not self.processes.first, on_step=on_step)

    def grid(self, count: int) -> tuple[Image.Image, dict[str, Any]]:
        """``count`` images of each class, every class a row, and how they were made; every process must call it.

        Raises:
            SamplingStoppedError: a process was told to stop.
        """
        request = self.request(count)
        images = torch.cat(list(self.batches(request)))
        return picture(images, self.plan, request), asdict(request) | {"sha256": digest(images)}


class SampleDistances:
    """Measures samples by ``count`` images of a source, the same ones in every run on the same images.

    Args:
        features: the name of their features, which says what the distances are called.
        processes: share the images, and must do the same with these distances. If one of them computed all features,
            the others would wait for longer than a collective of theirs may take.

    Raises:
        ValueError: photographs, of which every crop is another image, or fewer images than ``count``.
    """

    def __init__(self, source: Source, count: int, *, features: str, processes: Processes, workers: int) -> None:
        if isinstance(source, Photographs):
            raise ValueError("--eval-samples needs other images: of the photographs, every crop is another one")
        if count > len(source):
            raise ValueError(
                f"--eval-samples {count} needs as many images to compare with, and there are {len(source)}"
            )
        self.part = Part(SkipUnreadable(source), random.Random("reference").sample(range(len(source)), count))
        self.name, self.features = features, open_features(features, str(processes.device))
        self.processes, self.workers = processes, workers
        self.own: Tensor | None = None
        """features of this process's share of the images"""
        self.reference: Tensor | None = None
        """features of all of them"""

    def load(self) -> None:
        """Compute the features of this process's share of the images, if that was not done."""
        if self.own is None:
            rank, world = self.processes.rank, self.processes.world
            # As many in every process: some compute features of another one's image again, which do not count.
            places = [(i * world + rank) % len(self.part) for i in range(-(-len(self.part) // world))]
            self.own = features_of(
                Part(self.part, places), lambda images: self.features(three_channels(images)),
                device=str(self.processes.device), batch_size=64, workers=self.workers, quiet=not self.processes.first,
            )  # fmt: skip

    def _gather(self) -> Tensor:
        """``[N, D]``, in the order of the images, whatever the number of processes is."""
        assert self.own is not None
        chunks = [self.processes.gather(rows.to(self.processes.device)).cpu() for rows in self.own.split(GATHERED)]
        return torch.cat(chunks, 1).transpose(0, 1).flatten(0, 1)[: len(self.part)]

    @torch.inference_mode()
    def __call__(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Of samples ``[B, C, H, W]`` in [-1, 1], both distances by their names: the first process measures."""
        if self.reference is None:
            self.reference = self._gather()
        if not self.processes.first:
            deque(batches, maxlen=0)
            return {}
        found = torch.cat([self.features(three_channels(to_bytes(images))).float().cpu() for images in batches])
        distances = frechet_distance(found, self.reference), kernel_distance(found, self.reference).mean
        return dict(zip(NAMES[self.name], distances, strict=True))


def three_channels(images: Tensor) -> Tensor:
    """Grey or red, green, blue and alpha, ``[B, C, H, W]``, uint8, as red, green and blue on white."""
    if images.shape[1] == 4:
        colours, alpha = images[:, :3].float(), images[:, 3:].float() / 255
        return (colours * alpha + 255 * (1 - alpha)).round().byte()
    return images.expand(-1, 3, -1, -1)
