"""Distances between two sets of images: between distributions of their features, Fréchet's (FID) and a kernel's (KID).

Features are those of Inception v3, which make the published numbers, or of small random convolutions, which need no
weights. Numbers of other features, other images to compare with, or another number of images are not comparable.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from .batches import in_one_line
from .progress import progress
from .sources import Source

INCEPTION, CONVOLUTIONS = "inception", "random-convolutions"
NAMES = {INCEPTION: ("FID", "KID"), CONVOLUTIONS: ("Fréchet distance", "kernel distance")}
"""What the two distances are called, by the features that they are of."""

Features = Callable[[Tensor], Tensor]
"""Of images ``[B, 3, H, W]``, uint8: ``[B, D]``."""


# Distances; features are [N, D] of one set and [M, D] of the other, in any dtype


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions with the sets' means and covariances.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``: Heusel et al. (2017), https://arxiv.org/abs/1706.08500, equation 6.
    Estimated from few images it is too large, and from fewer than there are features by much.

    Raises:
        ValueError: a set of less than two images, or numbers that are not finite.
    """
    _check(first, second)
    (mean, root, trace), (other_mean, other_root, other_trace) = map(_moments, (first, second))
    # The trace of the root of C1 C2 is the sum of the singular values of their roots' product.
    shared = torch.linalg.svdvals(root @ other_root).sum()
    distance = (mean - other_mean).square().sum() + trace + other_trace - 2 * shared
    return distance.clamp(min=0).item()  # of equal sets, rounding leaves either sign


def _moments(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, root of the covariance and trace of the covariance, in fp64."""
    covariance = torch.cov(features.double().T).reshape(features.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return features.double().mean(0), root, covariance.trace()


class KernelDistance(NamedTuple):
    mean: float
    std: float
    """over the subsets; 0 of a single one"""


def kernel_distance(
    first: Tensor, second: Tensor, *, subset: int = 1000, subsets: int = 100, seed: int = 0
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x . y / D + 1)^3``, a mean over random subsets.

    Bińkowski et al. (2018), https://arxiv.org/abs/1801.01401, section 4. Of two samples of one distribution it is 0 on
    average, and below 0 about every other time.

    Args:
        subset: images of each set in a subset. Where no set has more, all images are taken, once.

    Raises:
        ValueError: a set of less than two images, or numbers that are not finite.
    """
    _check(first, second)
    x, y = first.double(), second.double()
    if max(len(x), len(y)) <= subset:
        return KernelDistance(_unbiased_mmd(x, y), 0.0)
    generator = torch.Generator().manual_seed(seed)

    def draw(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset]]

    values = torch.tensor([_unbiased_mmd(draw(x), draw(y)) for _ in range(subsets)], dtype=torch.float64)
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


def _unbiased_mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(a: Tensor) -> Tensor:
        """Of an image with every other one."""
        values = kernel(a, a)
        return (values.sum() - values.trace()) / (len(a) * (len(a) - 1))

    return (mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()).item()


def _check(first: Tensor, second: Tensor) -> None:
    if min(len(first), len(second)) < 2:
        raise ValueError(f"two images of each set are needed at least, got {len(first)} and {len(second)}")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("features of some images are not finite")


# Features


def usual_features() -> str:
    """Those that FID and KID are defined by, if what computes them is installed."""
    return CONVOLUTIONS if importlib.util.find_spec("torch_fidelity") is None else INCEPTION


def open_features(name: str, device: str, weights: Path | None = None) -> Features:
    """What :func:`inception` or :func:`random_convolutions` returns."""
    return inception(weights, device) if name == INCEPTION else random_convolutions(device)


class _Images(Dataset[Tensor]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return self.source.load(index, torch.Generator())[0]


@torch.inference_mode()
def features_of(
    source: Source, features: Features, *, device: str, batch_size: int, workers: int, quiet: bool = False
) -> Tensor:
    """``[N, D]`` on the CPU, of images of one size."""
    loader = DataLoader(_Images(source), batch_size, num_workers=workers)
    found = []
    with progress(len(source), "features", unit="image", leave=False, disable=quiet) as bar:
        for images in in_one_line(iter(loader)):
            found.append(features(images.to(device)).float().cpu())
            bar.update(len(images))
    return torch.cat(found)


def inception(weights: Path | None, device: str) -> Features:
    """The 2048 features of Inception v3 that FID and KID are defined by, as torch-fidelity computes them.

    Args:
        weights: its file; None is the one that torch-fidelity has downloaded, or downloads.

    Raises:
        ValueError: no torch-fidelity, or a file of something else.
        OSError: the weights cannot be downloaded.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        message = f"--features inception: {error}: pip install 'natten-layers[fid]' brings what is needed"
        raise ValueError(message) from error
    if weights is not None:  # torch-fidelity would run code that the file brings
        try:
            torch.load(weights, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch has no one type for it
            raise ValueError(f"{weights} is no file of weights: {' '.join(str(error).split())[:200]}") from error
    path = None if weights is None else str(weights)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    network = network.to(device)
    return lambda images: network(images)[0]


def random_convolutions(device: str, widths: tuple[int, ...] = (16, 32, 64)) -> Features:
    """Means and standard deviations of three layers of random convolutions, each at half the resolution.

    They are always the same, and see colours, edges and textures, but no objects.
    """
    draws = np.random.RandomState(0)  # whose numbers are the same in every version of NumPy
    layers, channels = [], 3
    for width in widths:
        weight = draws.standard_normal((width, channels, 3, 3)) * (2 / (9 * channels)) ** 0.5
        layers.append(torch.tensor(weight, dtype=torch.float32, device=device))
        channels = width

    def features(images: Tensor) -> Tensor:
        x, found = images.float() / 127.5 - 1, []
        for weight in layers:
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight).relu()
            found += [x.mean((2, 3)), x.flatten(2).std(2, correction=0)]
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return torch.cat(found, 1)

    return features
