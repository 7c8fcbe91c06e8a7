"""Noise levels, schedules and samplers of Karras et al., "Elucidating the design space of diffusion models" (2022).

Conventions are k-diffusion's. Images are ``[B, C, H, W]`` in [-1, 1]; ``sigma [B]`` is the standard deviation of the
noise. A *denoiser* is called as ``denoiser(noisy, sigma, **conditions)`` and returns the clean image it expects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from natten_layers.io.schema import check_keys
from natten_layers.modules.denoiser import Weighting

Denoiser = Callable[..., Tensor]
Quantile = Callable[[Tensor], Tensor]


# Noise levels to train on


DENSITY = "model.sigma_sample_density"
LIMITS = ("min_value", "max_value")
DENSITIES: dict[str, tuple[str, ...]] = {  # the keys that each type reads
    "lognormal": ("mean", "loc", "std", "scale"),
    "split-lognormal": ("mean", "loc", "std_1", "scale_1", "std_2", "scale_2"),
    "loglogistic": ("loc", "scale", *LIMITS),
    "loguniform": LIMITS,
    "v-diffusion": LIMITS,
    "cosine": LIMITS,
    "cosine-interpolated": (*LIMITS, "image_d", "noise_d_low", "noise_d_high"),
}


def make_sigma_quantile(model_config: Mapping[str, Any]) -> Quantile:
    """The quantile function of a config's ``sigma_sample_density``: uniform numbers in (0, 1) to noise levels.

    Raises:
        ValueError: an unknown type of density, keys that it lacks or does not read, or noise levels that are no
            positive numbers, or that fall where they should rise.
    """
    density = model_config["sigma_sample_density"]
    kind = density.get("type")
    if kind not in DENSITIES:
        raise ValueError(f"{DENSITY}.type is {kind!r}; known are {', '.join(DENSITIES)}")
    check_keys(density.keys(), ("type", *DENSITIES[kind]), f"{DENSITY} of type {kind}")
    quantile = _quantile(density, model_config)
    low, high = quantile(torch.tensor([1e-7, 1 - 1e-7])).tolist()  # the ends of what stratified() returns
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{DENSITY} of type {kind} gives noise levels from {low:g} to {high:g}")
    return quantile


def _either(density: Mapping[str, Any], *names: str) -> float:
    """The value of the one of ``names``, of which k-diffusion takes each for the same, that is there."""
    found = [name for name in names if name in density]
    if len(found) != 1:
        has = "lacks" if not found else "has both of"
        raise ValueError(f"{DENSITY} of type {density['type']} {has} {names[0]} (or {', '.join(names[1:])})")
    return density[found[0]]


def _limits(density: Mapping[str, Any], low: float, high: float, *, zero: bool) -> tuple[float, float]:
    """``min_value`` and ``max_value``, by default ``low`` and ``high``; ``zero`` tells whether the first may be 0."""
    low, high = density.get("min_value", low), density.get("max_value", high)
    if low > high or (low == 0 and not zero):
        least = "at most" if zero else "above 0 and at most"
        default = "" if "min_value" in density else " by default"
        raise ValueError(
            f"{DENSITY} of type {density['type']}: min_value must be {least} max_value {high:g}, got {low:g}{default}"
        )
    return low, high


def _quantile(density: Mapping[str, Any], model_config: Mapping[str, Any]) -> Quantile:
    sigma_data, sigma_min, sigma_max = (model_config[f"sigma_{name}"] for name in ("data", "min", "max"))
    kind = density["type"]
    normal = torch.special.ndtri
    if kind in ("lognormal", "split-lognormal"):
        loc = _either(density, "mean", "loc")
        if kind == "lognormal":
            scale = _either(density, "std", "scale")
            return lambda u: torch.exp(loc + scale * normal(u))
        below, above = (_either(density, f"std_{i}", f"scale_{i}") for i in (1, 2))
        split = below / (below + above)  # the mass of the half that lies below loc
        return lambda u: torch.exp(
            loc
            + torch.where(
                u < split,
                below * normal((u / (2 * split)).clamp(max=0.5)),
                above * normal((0.5 + (u - split) / (2 - 2 * split)).clamp(min=0.5)),
            )
        )
    if kind == "loglogistic":
        loc, scale = density.get("loc", math.log(sigma_data)), density.get("scale", 0.5)
        low, high = (_logistic_cdf(sigma, loc, scale) for sigma in _limits(density, 0.0, math.inf, zero=True))
        return lambda u: torch.exp(loc + scale * torch.logit(low + u * (high - low)))
    if kind == "loguniform":
        low, high = map(math.log, _limits(density, sigma_min, sigma_max, zero=False))
        return lambda u: torch.exp(low + u * (high - low))
    if kind in ("v-diffusion", "cosine"):
        low, high = (math.atan(sigma / sigma_data) for sigma in _limits(density, 1e-3, 1e3, zero=True))
        return lambda u: sigma_data * torch.tan(low + u * (high - low))
    size = max(model_config["input_size"])
    return _cosine_interpolated(
        sigma_data,
        *_limits(density, min(sigma_min, 1e-3), max(sigma_max, 1e3), zero=False),
        image_d=density.get("image_d", size),
        noise_d_low=density.get("noise_d_low", 32),
        noise_d_high=density.get("noise_d_high", size),
    )


def _logistic_cdf(sigma: float, loc: float, scale: float) -> float:
    return 0.0 if sigma == 0 else 1.0 / (1.0 + math.exp((loc - math.log(sigma)) / scale))


def _cosine_interpolated(
    sigma_data: float, low: float, high: float, *, image_d: float, noise_d_low: float, noise_d_high: float
) -> Quantile:
    """Cosine schedules shifted to two resolutions and interpolated: Hoogeboom et al., "simple diffusion" (2023).

    ``noise_d_low`` is that of high noise, ``noise_d_high`` that of low noise: time 0 there is the noisy end, ``u = 1``.
    """
    bounds = [-2 * math.log(sigma / sigma_data) for sigma in (high, low)]

    def shifted(u: Tensor, noise_d: float) -> Tensor:
        shift = 2 * math.log(noise_d / image_d)
        last, first = (math.atan(math.exp(-(bound - shift) / 2)) for bound in bounds)
        return shift - 2 * torch.log(torch.tan(first + u * (last - first)))

    return lambda u: sigma_data * torch.exp(-torch.lerp(shifted(u, noise_d_high), shifted(u, noise_d_low), u) / 2)


def stratified(places: Tensor, total: int, uniform: Tensor) -> Tensor:
    """Spread a batch over (0, 1): the number at place ``i`` of ``total`` falls into the ``i``-th of so many strata.

    Args:
        places: ``[B]`` int, where the elements stand in the global batch, which all processes share.
        uniform: ``[B]`` in [0, 1).
    """
    return ((places + uniform) / total).clamp(1e-7, 1 - 1e-7)


def loss_weighting(model_config: Mapping[str, Any]) -> Any:
    """The ``weighting`` of :class:`natten_layers.Denoiser` that a config's loss amounts to.

    Raises:
        ValueError: an option of k-diffusion's losses that is not here.
    """
    if model_config.get("loss_scales", 1) != 1 or model_config.get("has_variance", False):
        raise ValueError("training does not support model.loss_scales other than 1, nor model.has_variance")
    config = model_config.get("loss_config", "karras")
    if config not in ("karras", "simple"):
        raise ValueError(f'model.loss_config is {config!r}; known are "karras" and "simple"')
    if config == "simple":  # the plain error of the predicted noise is "snr" by another name
        return "snr"
    weighting = model_config.get("loss_weighting", "karras")
    if weighting not in get_args(Weighting):
        raise ValueError(f"model.loss_weighting is {weighting!r}; known are {', '.join(get_args(Weighting))}")
    return weighting


# Schedules


def ema_decay(step: int, power: float, max_value: float) -> float:
    """k-diffusion's warmed-up EMA: a plain average at first, a longer memory with every step."""
    return min(max_value, 1 - (1 + step) ** -power)


SCHEDULES = {  # the keys that each type reads, beside "warmup"
    "constant": (),
    "inverse": ("inv_gamma", "power"),
    "exponential": ("decay", "num_steps"),
    "cosine": ("num_steps",),
}


def check_schedule(schedule: Mapping[str, Any]) -> None:
    """Refuse what :func:`learning_rate_factor` does not read or lacks.

    Raises:
        ValueError: an unknown type of schedule, or keys of another one.
    """
    kind = schedule["type"]
    if kind not in SCHEDULES:
        raise ValueError(f"lr_sched.type is {kind!r}; known are {', '.join(SCHEDULES)}")
    check_keys(schedule.keys(), ("type", "warmup", *SCHEDULES[kind]), f"lr_sched of type {kind}")
    if "num_steps" in SCHEDULES[kind] and "num_steps" not in schedule:
        raise ValueError(f"lr_sched of type {kind} lacks num_steps")


def learning_rate_factor(schedule: Mapping[str, Any], step: int) -> float:
    """Factor on the base learning rate at optimiser step ``step``, counted from 0, by a schedule that was checked."""
    kind = schedule["type"]
    warmup = 1 - schedule.get("warmup", 0.0) ** (step + 1)
    if kind == "constant":
        return warmup
    if kind == "inverse":
        return warmup * (1 + step / schedule.get("inv_gamma", 1.0)) ** -schedule.get("power", 1.0)
    if kind == "exponential":
        return warmup * schedule.get("decay", 0.5) ** (step / schedule["num_steps"])
    # Not one of k-diffusion's: down to a tenth over num_steps, for short runs.
    return warmup * (0.55 + 0.45 * math.cos(math.pi * min(step / schedule["num_steps"], 1.0)))


# Samplers of the probability flow: x [B, C, H, W] of noise level sigmas[0]; sigmas fall to 0, one step between two


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """``steps`` noise levels equally spaced in ``sigma ** (1 / rho)``, equation 5 of the paper, and 0 after them."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(first + (last - first) * i / max(steps - 1, 1)) ** rho for i in range(steps)] + [0.0]


Progress = Callable[[int], object]


def _denoise(denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
    return denoiser(x, x.new_full((len(x),), sigma))


def sample_euler(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], progress: Progress) -> Tensor:
    """First order: one evaluation a step."""
    for sigma, following in pairwise(sigmas):
        x = x + (x - _denoise(denoiser, x, sigma)) * ((following - sigma) / sigma)
        progress(1)
    return x


def sample_heun(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], progress: Progress) -> Tensor:
    """Second order: two evaluations a step, one in the last. Algorithm 1 of the paper without churn."""
    for sigma, following in pairwise(sigmas):
        slope = (x - _denoise(denoiser, x, sigma)) / sigma
        ahead = x + slope * (following - sigma)
        if following > 0:
            slope = (slope + (ahead - _denoise(denoiser, ahead, following)) / following) / 2
            ahead = x + slope * (following - sigma)
        x = ahead
        progress(1)
    return x


def sample_dpmpp_2m(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], progress: Progress) -> Tensor:
    """Second order multistep, one evaluation a step: Lu et al., "DPM-Solver++" (2022), algorithm 2."""
    previous, previous_h = x, 0.0
    for sigma, following in pairwise(sigmas):
        denoised = _denoise(denoiser, x, sigma)
        progress(1)
        if following == 0:  # an infinite step in log sigma, of which only the target is left
            return denoised
        h = math.log(sigma / following)
        target = denoised + (denoised - previous) * (h / (2 * previous_h)) if previous_h else denoised
        x = x * (following / sigma) - target * math.expm1(-h)
        previous, previous_h = denoised, h
    return x


def sample_meanflow(velocity: Callable[..., Tensor], x: Tensor, steps: int, progress: Progress) -> Tensor:
    """From noise to images in ``steps`` steps of equal length: Geng et al., "Mean Flows" (2025), algorithm 2.

    Args:
        velocity: called as ``velocity(x, t, r)``, it estimates the average velocity between two times, ``[B]`` both.
        x: noise, the point of time 1.
    """
    for i in range(steps, 0, -1):
        t, r = (x.new_full((len(x),), j / steps) for j in (i, i - 1))
        x = x - velocity(x, t, r) / steps
        progress(1)
    return x


SAMPLERS = {"dpmpp-2m": sample_dpmpp_2m, "euler": sample_euler, "heun": sample_heun}


def guided(denoiser: Denoiser, class_cond: Tensor, unconditional: int, scale: float) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans, 2022): extrapolate from the unconditional prediction by ``scale``.

    Args:
        class_cond: ``[B]`` int.
        unconditional: the class that stands for none.
        scale: 1 is the plain conditional model, 0 the unconditional one.
    """
    if scale == 1:
        return lambda x, sigma: denoiser(x, sigma, class_cond=class_cond)
    both = torch.cat([torch.full_like(class_cond, unconditional), class_cond])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        plain, conditional = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), class_cond=both).chunk(2)
        return torch.lerp(plain, conditional, scale)

    return denoise
