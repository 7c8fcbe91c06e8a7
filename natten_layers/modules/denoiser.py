"""The diffusion model around a network: preconditioning and loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import at_least_fp32, reset_children

__all__ = ["Denoiser"]


class Denoiser(nn.Module):
    """A network in the preconditioner of Karras et al. 2022 (https://arxiv.org/abs/2206.00364): images in, images out.

    With ``c = sigma_data``: ``c_skip = c^2 / (s^2 + c^2)``, ``c_out = s c / sqrt(s^2 + c^2)``,
    ``c_in = 1 / sqrt(s^2 + c^2)``.

    Args:
        model: called as ``model(x, sigma, **conditions)``.
        sigma_data: standard deviation of the data; default ``model.config.sigma_data``.
        weighting: of :meth:`loss` over noise levels: "karras" is constant in the scale of the network's output; "snr",
            ``c^2 / (s^2 + c^2)``, and "soft-min-snr", ``(s c)^2 / (s^2 + c^2)^2``, are k-diffusion's.

    Raises:
        ValueError: an unknown weighting, or no ``sigma_data`` to be found.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma_data: float | None = None,
        weighting: Literal["karras", "snr", "soft-min-snr"] = "karras",
    ) -> None:
        super().__init__()
        if weighting not in ("karras", "snr", "soft-min-snr"):
            raise ValueError(f'weighting must be "karras", "snr" or "soft-min-snr", got {weighting!r}')
        if sigma_data is None:
            sigma_data = getattr(getattr(model, "config", None), "sigma_data", None)
        if sigma_data is None:
            raise ValueError(f"{type(model).__name__} has no config with a sigma_data; give sigma_data")
        self.model, self.sigma_data, self.weighting = model, float(sigma_data), weighting

    def reset_parameters(self) -> None:
        """Initialise the network anew."""
        reset_children(self)

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}, weighting={self.weighting!r}"

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_skip, c_out, c_in`` in ``sigma``'s shape."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt()

    def forward(self, x: Tensor, sigma: Tensor, **conditions: Tensor | None) -> Tensor:
        """The expected clean image behind each noisy one.

        Args:
            x: ``[B, C, H, W]``, clean image plus ``sigma`` times standard normal noise.
            sigma: ``[B]``.

        Returns:
            ``[B, C, H, W]`` in ``x``'s dtype.
        """
        c_skip, c_out, c_in = (_per_image(c, x) for c in self.scalings(sigma.to(at_least_fp32(x.dtype))))
        return (self.model((x * c_in).to(x.dtype), sigma, **conditions) * c_out + x * c_skip).to(x.dtype)

    def loss(self, x: Tensor, noise: Tensor, sigma: Tensor, **conditions: Tensor | None) -> Tensor:
        """Weighted mean squared error of each image, in the scale of the network's output.

        Args:
            x: clean images ``[B, C, H, W]``.
            noise: standard normal, of their shape.
            sigma: ``[B]``.

        Returns:
            ``[B]``
        """
        sigma = sigma.to(at_least_fp32(x.dtype))
        c_skip, c_out, c_in = (_per_image(c, x) for c in self.scalings(sigma))
        noised = x + noise * _per_image(sigma, x)
        target = (x - c_skip * noised) / c_out
        output = self.model((noised * c_in).to(x.dtype), sigma, **conditions)
        return (output - target).square().flatten(1).mean(1) * self._weight(sigma)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network, which :meth:`forward` and :meth:`loss` share, with ``torch.compile``'s arguments.

        ``nn.Module.compile`` compiles calls of this module alone, and training calls the loss.
        """
        self.model.compile(*args, **kwargs)

    def _weight(self, sigma: Tensor) -> Tensor:
        total = sigma**2 + self.sigma_data**2
        if self.weighting == "snr":
            return self.sigma_data**2 / total
        if self.weighting == "soft-min-snr":
            return (sigma * self.sigma_data) ** 2 / total**2
        return torch.ones_like(sigma)


def _per_image(c: Tensor, x: Tensor) -> Tensor:
    return c.view(c.numel(), *(1,) * (x.ndim - 1))
