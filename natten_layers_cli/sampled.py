"""How far samples of a model in training are from the images that it learns from."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor

from .data import Photographs, SkipUnreadable, Source
from .distances import NAMES, features_of, frechet_distance, kernel_distance, open_features
from .held_out import Part
from .pictures import to_bytes


class SampleDistances:
    """Measures samples by ``count`` images of a source, the same ones in every run on the same images.

    Args:
        features: the name of their features, which says what the distances are called.

    Raises:
        ValueError: photographs, of which every crop is another image, or fewer images than ``count``.
    """

    def __init__(self, source: Source, count: int, *, features: str, device: str, workers: int) -> None:
        if isinstance(source, Photographs):
            raise ValueError("--eval-samples needs other images: of the photographs, every crop is another one")
        if count > len(source):
            raise ValueError(
                f"--eval-samples {count} needs as many images to compare with, and there are {len(source)}"
            )
        self.part = Part(SkipUnreadable(source), random.Random("reference").sample(range(len(source)), count))
        self.name, self.features = features, open_features(features, device)
        self.device, self.workers = device, workers
        self.reference: Tensor | None = None

    def load(self) -> None:
        """Compute the images' features, if that was not done."""
        if self.reference is None:
            self.reference = features_of(
                self.part, lambda images: self.features(three_channels(images)),
                device=self.device, batch_size=64, workers=self.workers,
            )  # fmt: skip

    @torch.inference_mode()
    def __call__(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Of samples ``[B, C, H, W]`` in [-1, 1], both distances by their names."""
        assert self.reference is not None
        found = torch.cat([self.features(three_channels(to_bytes(images))).float().cpu() for images in batches])
        distances = frechet_distance(found, self.reference), kernel_distance(found, self.reference).mean
        return dict(zip(NAMES[self.name], distances, strict=True))


def three_channels(images: Tensor) -> Tensor:
    """Grey or red, green, blue and alpha, ``[B, C, H, W]``, uint8, as red, green and blue on white."""
    if images.shape[1] == 4:
        colours, alpha = images[:, :3].float(), images[:, 3:].float() / 255
        return (colours * alpha + 255 * (1 - alpha)).round().byte()
    return images.expand(-1, 3, -1, -1)
