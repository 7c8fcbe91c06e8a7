"""Preconditioning and loss of a diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..checks import check_tensors, is_finite_number
from ..varlen import Shapes, packed_shapes
from ..wording import shorten
from .base import at_least_fp32, reset_children

__all__ = ["Denoiser"]

Weighting = Literal["karras", "snr", "soft-min-snr"]


class Denoiser(nn.Module):
    """A denoiser of images: a network with the preconditioning of Karras et al. 2022.

    It computes ``c_skip * x + c_out * model(c_in * x, sigma)``. With ``s = sigma`` and ``c = sigma_data``,
    ``c_skip = c^2 / (s^2 + c^2)``, ``c_out = s c / sqrt(s^2 + c^2)`` and ``c_in = 1 / sqrt(s^2 + c^2)``.

    Source: https://arxiv.org/abs/2206.00364, table 1, without the scaling of the noise level, which the network does.

    Args:
        model: called as ``model(x, sigma, **conditions)``.
        sigma_data: standard deviation of the data, default ``model.config.sigma_data``.
        weighting: weight of each noise level in :meth:`loss`, whose error is measured on the network's output:
            "karras" is 1, "snr" is ``c^2 / (s^2 + c^2)`` and "soft-min-snr" is ``(s c)^2 / (s^2 + c^2)^2``, the last
            two as in k-diffusion.

    Raises:
        ValueError: an unknown weighting, a ``sigma_data`` that is no positive number, or none is given and the model
            has no config with one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma_data: float | None = None,
        weighting: Weighting = "karras",
    ) -> None:
        super().__init__()
        if weighting not in get_args(Weighting):
            raise ValueError(f'weighting must be "karras", "snr" or "soft-min-snr", got {shorten(weighting)}')
        self.model, self.sigma_data, self.weighting = model, sigma_data_of(model, sigma_data), weighting

    def reset_parameters(self) -> None:
        """Initialise the network's parameters again."""
        reset_children(self)

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}, weighting={self.weighting!r}"

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(c_skip, c_out, c_in)``, each in ``sigma``'s shape."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt()

    def forward(self, x: Tensor, sigma: Tensor, *, shapes: Shapes | None = None, **conditions: Tensor | None) -> Tensor:
        """Estimate the clean image of each noisy one.

        Args:
            x: ``[B, C, H, W]``, clean images plus ``sigma`` times standard normal noise.
            sigma: noise levels ``[B]``, positive. They are used in fp32 or better.
            shapes: heights and widths of B images of many shapes, as :meth:`natten_layers.HDiT.forward` takes them;
                ``x`` is then ``[N, C]``, the pixels of image after image.
            conditions: passed to the network.

        Returns:
            In ``x``'s shape and dtype.
        """
        _check_levels(x, sigma)
        scalings = self.scalings(sigma.to(at_least_fp32(x.dtype)))
        c_skip, c_out, c_in = per_pixel(torch.stack(scalings), x, pixel_counts(shapes))
        return (self._output((x * c_in).to(x.dtype), sigma, shapes, conditions) * c_out + x * c_skip).to(x.dtype)

    __call__: Callable[..., Tensor]

    def loss(
        self, x: Tensor, noise: Tensor, sigma: Tensor, *, shapes: Shapes | None = None, **conditions: Tensor | None
    ) -> Tensor:
        """Weighted mean squared error of the network's output for each image.

        Args:
            x: clean images ``[B, C, H, W]``, or ``[N, C]`` with ``shapes``.
            noise: standard normal noise of the same shape.
            sigma: noise levels ``[B]``, positive.
            shapes: of images of many shapes, see :meth:`forward`.
            conditions: passed to the network.

        Returns:
            One loss per image, ``[B]``, in fp32 or better.
        """
        check_tensors(noise=noise)
        _check_levels(x, sigma)
        if noise.shape != x.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but x has {tuple(x.shape)}")
        sigma = sigma.to(at_least_fp32(x.dtype))
        counts = pixel_counts(shapes)
        c_skip, c_out, c_in, noise_level = per_pixel(torch.stack([*self.scalings(sigma), sigma]), x, counts)
        noised = x + noise * noise_level
        target = (x - c_skip * noised) / c_out
        error = (self._output((noised * c_in).to(x.dtype), sigma, shapes, conditions) - target).square()
        if counts is None:
            return error.flatten(1).mean(1) * self._weight(sigma)
        images = [image.mean() for image in error.split(counts)]
        return (torch.stack(images) if images else error.new_zeros(0)) * self._weight(sigma)

    def _output(
        self, x: Tensor, sigma: Tensor, shapes: Shapes | None, conditions: Mapping[str, Tensor | None]
    ) -> Tensor:
        packed = {} if shapes is None else {"shapes": shapes}  # not every network takes them
        return self.model(x, sigma, **packed, **conditions)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network, with the arguments of ``torch.compile``.

        ``nn.Module.compile`` would compile :meth:`forward` alone, but training calls :meth:`loss`; both call the
        network.
        """
        self.model.compile(*args, **kwargs)

    def _weight(self, sigma: Tensor) -> Tensor:
        total = sigma**2 + self.sigma_data**2
        if self.weighting == "snr":
            return self.sigma_data**2 / total
        if self.weighting == "soft-min-snr":
            return (sigma * self.sigma_data) ** 2 / total**2
        return torch.ones_like(sigma)


def _check_levels(x: Tensor, sigma: Tensor) -> None:
    check_tensors(x=x, sigma=sigma)
    if sigma.ndim > 1:
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)}; expected [B], one for each image: pass sigma.flatten()"
        )


def sigma_data_of(model: nn.Module, given: float | None) -> float:  # also MeanFlow's
    """The standard deviation of the data: ``given``, or what the model's config says."""
    sigma_data = getattr(getattr(model, "config", None), "sigma_data", None) if given is None else given
    if sigma_data is None:
        raise ValueError(f"{type(model).__name__} has no config with a sigma_data; give sigma_data")
    if not is_finite_number(sigma_data) or sigma_data <= 0:
        raise ValueError(f"sigma_data must be a positive finite number, got {shorten(sigma_data)}")
    return float(sigma_data)


def per_image(c: Tensor, x: Tensor) -> Tensor:
    """``c [B]`` in a shape that broadcasts to ``x [B, ...]``."""
    return c.view(c.numel(), *(1,) * (x.ndim - 1))


def per_pixel(c: Tensor, x: Tensor, counts: list[int] | None) -> Tensor:
    """``c [rows, B]`` in a shape whose rows broadcast to ``x [B, ...]``, or to pixels ``[N, C]``, ``counts`` an image.

    Raises:
        ValueError: the images do not have as many pixels, or ``c`` is not of as many.
    """
    if counts is None:
        return c.view(*c.shape, *(1,) * (x.ndim - 1))
    if x.ndim != 2 or len(x) != sum(counts) or c.shape[1] != len(counts):
        raise ValueError(
            f"shapes must be those of the {c.shape[1]} images of sigma, in x [pixels, channels], "
            f"got {sum(counts)} pixels in {len(counts)} images and x {tuple(x.shape)}"
        )
    repeats = torch.tensor(counts, dtype=torch.long, device=c.device)
    return c.repeat_interleave(repeats, 1, output_size=len(x))[..., None]


def pixel_counts(shapes: Shapes | None) -> list[int] | None:
    """Of each image; None for a batch of one shape."""
    return None if shapes is None else packed_shapes(shapes, None, rank=2).prod(1).tolist()
