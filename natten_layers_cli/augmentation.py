"""Random changes of images' geometry, of which the model is told, so that it does not learn to make them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(image: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Geometric augmentations of Karras et al. (2022, appendix F.2), with the 9 numbers that tell what was done.

    Args:
        image: ``[C, H, W]``, float.
        probability: of each augmentation but the mirroring, which always has one half.

    Returns:
        ``[C, H, W]`` and ``[9]``.
    """

    def chance() -> float:
        return float(torch.rand((), generator=generator) < probability)

    def normal() -> float:
        return torch.randn((), generator=generator).item()

    def angle() -> float:
        return (2 * torch.rand((), generator=generator).item() - 1) * math.pi

    mirror = float(torch.rand((), generator=generator) < 0.5)
    flip = chance() * float(torch.rand((), generator=generator) < 0.5)
    scale = chance() * normal()
    turn = chance() * angle()
    do = chance()
    stretch_angle, stretch = do * angle(), do * normal()
    do = chance()
    shift_x, shift_y = do * normal(), do * normal()

    height, width = image.shape[1:]
    size, aspect = 2 ** (0.2 * scale), 2 ** (0.2 * stretch)
    stretched = _rotation(stretch_angle) @ _scaling(aspect, 1 / aspect) @ _rotation(-stretch_angle)
    linear = _scaling(1 - 2 * mirror, 1 - 2 * flip) @ _scaling(size, size) @ _rotation(-turn) @ stretched
    offset = linear @ torch.tensor([width * shift_x / 8, height * shift_y / 8])
    # grid_sample asks where each output pixel comes from, in half widths and half heights from the centre.
    half = torch.tensor([width / 2, height / 2])
    inverse = torch.linalg.inv(linear)
    theta = torch.cat([inverse * half / half[:, None], (-(inverse @ offset) / half)[:, None]], 1)
    grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
    image = F.grid_sample(image[None], grid, mode="bicubic", padding_mode="reflection", align_corners=False)[0]
    condition = [
        *(mirror, flip, scale, math.cos(turn) - 1, math.sin(turn)),
        *(stretch * math.cos(stretch_angle), stretch * math.sin(stretch_angle), shift_x, shift_y),
    ]
    return image, torch.tensor(condition)


def _rotation(angle: float) -> Tensor:
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _scaling(x: float, y: float) -> Tensor:
    return torch.tensor([[x, 0.0], [0.0, y]])
