"""Noise levels, schedules and samplers of diffusion models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from natten_layers import Denoiser, MeanFlow
from natten_layers_cli.diffusion import (
    SAMPLERS,
    guided,
    karras_sigmas,
    learning_rate_factor,
    make_sigma_quantile,
    stratified,
)


@pytest.mark.parametrize(
    ("density", "median"),
    [
        ({"type": "lognormal", "mean": -1.2, "std": 1.2}, math.exp(-1.2)),
        ({"type": "split-lognormal", "loc": -1.0, "scale_1": 2.0, "scale_2": 2.0}, math.exp(-1.0)),
        ({"type": "loglogistic", "loc": -0.5}, math.exp(-0.5)),
        ({"type": "loguniform"}, math.sqrt(0.01 * 80)),
        ({"type": "v-diffusion"}, 0.5),
        ({"type": "cosine-interpolated", "image_d": 32}, 0.5),
    ],
)
def test_sigma_quantile(density: dict, median: float) -> None:
    model = {"sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80.0, "input_size": [32, 32]}
    quantile = make_sigma_quantile({**model, "sigma_sample_density": density})
    u = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    sigma = quantile(u)
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(sigma[50].item(), median, rtol=2e-3, atol=0)


def test_cosine_interpolated_shifts_high_noise_up_with_resolution() -> None:
    """By hand: ``sigma_data tan(u pi / 2) (size / noise_d_low) ** u (size / noise_d_high) ** (1 - u)``.

    That is the schedule with ends at 0 and infinity; from 1e-3 to 1e3 it differs by 2 % at u = 0.9.
    """
    model = {"sigma_data": 0.5, "sigma_min": 1e-3, "sigma_max": 1e3, "input_size": [256, 256]}
    quantile = make_sigma_quantile({**model, "sigma_sample_density": {"type": "cosine-interpolated"}})
    u = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    expected = 0.5 * torch.tan(u * math.pi / 2) * (256 / 32) ** u
    torch.testing.assert_close(quantile(u), expected, rtol=3e-2, atol=0)


def test_split_lognormal_has_its_mass_where_its_scales_say() -> None:
    density = {"type": "split-lognormal", "loc": 0.0, "scale_1": 3.0, "scale_2": 1.0}
    model = {"sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80.0, "input_size": [32, 32]}
    quantile = make_sigma_quantile({**model, "sigma_sample_density": density})
    u = torch.tensor([0.375, 0.75, 0.875], dtype=torch.float64)  # quartile of the lower half, loc, median of the upper
    expected = torch.tensor([-3.0, 0.0, 1.0], dtype=torch.float64) * torch.special.ndtri(torch.tensor(0.75))
    torch.testing.assert_close(quantile(u).log(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("density", "message"),
    [
        ({"type": "cauchy"}, "type is 'cauchy'; known are lognormal"),
        ({}, "type is None; known are lognormal"),
        *(
            ({"type": kind, "min_value": 2, "max_value": 1}, r"min_value must be .*max_value 1, got 2$")
            for kind in ("loguniform", "loglogistic", "v-diffusion", "cosine", "cosine-interpolated")
        ),
        ({"type": "loguniform", "min_value": 100}, "max_value 80, got 100$"),
        ({"type": "loguniform", "min_value": 0}, "must be above 0 and at most max_value 80, got 0$"),
        ({"type": "cosine-interpolated", "max_value": 1e-5}, "max_value 1e-05, got 0.001 by default"),
        ({"type": "lognormal", "std": 1}, r"lacks mean \(or loc\)"),
        ({"type": "lognormal", "mean": 1, "loc": 2, "std": 1}, r"has both of mean \(or loc\)"),
        ({"type": "split-lognormal", "loc": 1, "scale_1": 1}, r"lacks std_2 \(or scale_2\)"),
        ({"type": "lognormal", "mean": 1, "std": 1, "max_value": 3}, "has unknown keys 'max_value'"),
        ({"type": "lognormal", "mean": 90, "std": 1}, "gives noise levels from .* to inf"),
        ({"type": "lognormal", "mean": -90, "std": 9}, "gives noise levels from 0 to"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_densities_without_noise_levels(density: dict[str, Any], message: str) -> None:
    model = {"sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80.0, "input_size": [32, 32]}
    with pytest.raises(ValueError, match=rf"^model.sigma_sample_density.*{message}"):
        make_sigma_quantile({**model, "sigma_sample_density": density})


@pytest.mark.parametrize("kind", ["loguniform", "cosine-interpolated"])
def test_a_density_down_to_no_noise(kind: str) -> None:
    model = {"sigma_data": 0.5, "sigma_min": 0, "sigma_max": 80.0, "input_size": [32, 32]}
    with pytest.raises(ValueError, match=r"min_value must be above 0 and .*, got 0 by default"):
        make_sigma_quantile({**model, "sigma_sample_density": {"type": kind}})
    make_sigma_quantile({**model, "sigma_sample_density": {"type": kind, "min_value": 0.01}})


def test_stratified_covers_every_stratum() -> None:
    places = torch.randperm(16)
    u = stratified(places, 16, torch.rand(16))
    assert torch.equal((u * 16).long(), places)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp-2m", 2)])
def test_samplers_converge_at_their_order(name: str, order: int) -> None:
    """Data ``N(0, c^2)``: the flow scales ``x`` by ``sqrt((s'^2 + c^2) / (s^2 + c^2))``, so the end is known."""
    c, x = 0.5, torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (c**2 / (sigma**2 + c**2)).view(-1, 1, 1, 1)

    def error(steps: int) -> float:
        sigmas = karras_sigmas(steps, 0.5, 80.0)[:-1]  # to sigma_min: the last step, to 0, is Euler's in all of them
        end = SAMPLERS[name](denoiser, x, sigmas, lambda _: None).item()
        return abs(end - 80.0 * math.sqrt((0.25 + c**2) / (6400 + c**2)))

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.25)


def test_guidance_extrapolates() -> None:
    def denoiser(x: Tensor, sigma: Tensor, class_cond: Tensor) -> Tensor:
        return x * class_cond.view(-1, 1, 1, 1)

    x, sigma, label = torch.ones(2, 1, 1, 1), torch.ones(2), torch.tensor([1, 3])
    for scale, expected in ((0.0, [7.0, 7.0]), (1.0, [1.0, 3.0]), (2.0, [-5.0, -1.0])):
        assert guided(denoiser, label, 7, scale)(x, sigma).flatten().tolist() == expected


def test_learning_rates() -> None:
    assert learning_rate_factor({"type": "constant", "warmup": 0.5}, 1) == 0.75
    assert learning_rate_factor({"type": "inverse", "inv_gamma": 10, "power": 0.5}, 30) == 0.5
    assert learning_rate_factor({"type": "exponential", "num_steps": 10, "decay": 0.5}, 20) == 0.25
    assert learning_rate_factor({"type": "cosine", "num_steps": 10}, 20) == pytest.approx(0.1)


@pytest.mark.parametrize("sigma_data", [0, -1.0, math.inf, math.nan, "a", True])
@pytest.mark.parametrize("kind", [Denoiser, MeanFlow])
def test_data_have_a_standard_deviation(kind: type[Denoiser] | type[MeanFlow], sigma_data: Any) -> None:
    with pytest.raises(ValueError, match=f"sigma_data must be a positive finite number, got {sigma_data!r}"):
        kind(nn.Identity(), sigma_data=sigma_data)
