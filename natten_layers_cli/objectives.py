"""What an image model is trained for: to denoise, or to tell average velocities, which sample in one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from natten_layers import Denoiser, HDiTConfig, MeanFlow

from .batches import Batch
from .diffusion import loss_weighting, make_sigma_quantile, stratified

MEANFLOW: dict[str, Any] = {"averaged": 0.25, "loc": -0.4, "scale": 1.0, "power": 0.75}
"""The paper's (https://arxiv.org/abs/2505.13447, tables 1 and 4): the share of a batch that learns averages, the
distribution of the logit of the times, and the power of the loss's weight, that of small images. The presets draw times
more widely: the paper's are seldom near 1, where a single step begins, and a short run would hardly learn of them."""


class Objective(Protocol):
    """A loss and what it draws, but for the network."""

    level: str
    """what :meth:`losses` returns beside the losses: a noise level, or a time"""
    edges: tuple[float, ...]
    """that divide its values, to show the loss of each range"""
    packs: bool
    """whether :meth:`losses` takes images of many shapes as :func:`natten_layers_cli.batches.pack` makes them, with
    their ``shapes`` among the conditions"""

    def around(self, model: nn.Module, sigma_data: float) -> nn.Module:
        """The network with what the loss needs beside it."""
        ...

    def losses(
        self, module: nn.Module, batch: Batch, global_batch: int, conditions: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The loss of each image, and the noise level or time that it is of: ``[B]`` both."""
        ...


def open_objective(config: Mapping[str, Any], plan: HDiTConfig) -> Objective:
    """The objective that ``plan`` names, as the sections of ``config`` describe it.

    Raises:
        ValueError, KeyError: they do not.
    """
    return AverageVelocity(config["meanflow"]) if plan.objective == "meanflow" else Diffusion(plan.to_json()["model"])


class Diffusion:
    """The loss of Karras et al. 2022, with noise levels and weights as k-diffusion's configs describe them."""

    level, edges, packs = "sigma", (0.1, 0.5, 2.0, 10.0), True

    def __init__(self, model_config: Mapping[str, Any]) -> None:
        self.quantile, self.weighting = make_sigma_quantile(model_config), loss_weighting(model_config)

    def around(self, model: nn.Module, sigma_data: float) -> nn.Module:
        return Denoiser(model, sigma_data=sigma_data, weighting=self.weighting)

    def losses(
        self, module: nn.Module, batch: Batch, global_batch: int, conditions: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(module, Denoiser)
        sigma = self.quantile(stratified(batch.place, global_batch, batch.uniform[:, 0]))
        return module.loss(batch.image, batch.noise, sigma, **conditions), sigma


class AverageVelocity:
    """The loss of MeanFlow: some images of a batch learn averages, and the others velocities."""

    level, edges, packs = "time", (0.25, 0.5, 0.75), False

    def __init__(self, section: Mapping[str, Any]) -> None:
        self.section = section

    def around(self, model: nn.Module, sigma_data: float) -> nn.Module:
        return MeanFlow(model, sigma_data=sigma_data, power=self.section["power"])

    def times(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The later and the earlier one of two logit-normal times: ``uniform [B, 2]`` in [0, 1) to ``[B]`` both.

        Not stratified over the batch, which would give the images that learn averages times of their own.
        """
        logits = self.section["loc"] + self.section["scale"] * torch.special.ndtri(uniform.clamp(1e-7, 1 - 1e-7))
        early, late = logits.sigmoid().sort(-1).values.unbind(-1)
        return late, early

    def losses(
        self, module: nn.Module, batch: Batch, global_batch: int, conditions: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(module, MeanFlow)
        # By the place in the global batch, the same ones whatever the number of processes; those must come first.
        share = self.section["averaged"]
        chosen = ((batch.place + 1) * share).floor() - (batch.place * share).floor()
        order = chosen.argsort(descending=True, stable=True)
        batch, conditions = Batch(*(part[order] for part in batch)), {k: v[order] for k, v in conditions.items()}
        t, r = self.times(batch.uniform[:, ::2])
        averaged = int(chosen.sum())
        losses, back = module.loss(batch.image, batch.noise, t, r[:averaged], **conditions), order.argsort()
        return losses[back], t[back]
