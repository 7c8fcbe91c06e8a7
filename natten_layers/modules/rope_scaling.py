"""The frequencies of :class:`~natten_layers.modules.rope.RoPE` for texts longer than those of a model's first training.

The dictionaries are those of ``rope_scaling`` / ``rope_parameters`` in Hugging Face configs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import is_finite_number
from ..wording import shorten

__all__ = [
    "STRETCHING",
    "attention_factor",
    "check_packed",
    "rope_type",
    "scaled_frequencies",
    "stretched_frequencies",
]

STRETCHING = ("longrope", "dynamic")
"""Values of ``rope_type`` with which frequencies depend on the length of a text"""


def rope_type(scaling: Mapping[str, Any]) -> str:
    """Of a scaling dictionary, in either spelling."""
    return scaling.get("rope_type", scaling.get("type")) or "default"


def _required(scaling: Mapping[str, Any], *keys: str) -> list[float]:
    for key in keys:
        if scaling.get(key) is None:
            raise ValueError(f'scaling of rope_type "{rope_type(scaling)}" needs the key "{key}", got {dict(scaling)}')
    return [_positive(scaling, key) for key in keys]


def _optional(scaling: Mapping[str, Any], key: str) -> float | None:
    """A number, or None where configs leave it out, or write None or 0 in its place."""
    value = scaling.get(key)
    return None if value is None or (is_finite_number(value) and value == 0) else _positive(scaling, key)


def _positive(scaling: Mapping[str, Any], key: str) -> float:
    if not is_finite_number(scaling[key]) or scaling[key] <= 0:
        raise ValueError(
            f'"{key}" in scaling of rope_type "{rope_type(scaling)}" must be a positive finite number, got '
            f"{shorten(scaling[key])}"
        )
    return float(scaling[key])


def scaled_frequencies(periods: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Frequencies of a Hugging Face scaling dictionary, which changes plain ``1 / periods [head_dim / 2]``."""
    kind, freqs = rope_type(scaling), 1.0 / periods
    if kind == "default":
        return freqs
    if kind == "linear":
        return freqs / _required(scaling, "factor")[0]
    if kind == "llama3":
        return _llama3(freqs, scaling)
    if kind == "yarn":
        return _yarn(periods, theta, scaling)
    if kind == "longrope":
        return _longrope(periods, scaling)
    if kind == "dynamic":  # in texts up to its length; those of longer ones are stretched_frequencies
        _required(scaling, "factor", "original_max_position_embeddings")
        return freqs
    known = '"default", "linear", "llama3", "yarn", "longrope" and "dynamic"'
    raise ValueError(f'rope_type "{kind}" is not implemented; known are {known}')


def _llama3(freqs: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, interpolate between."""
    factor, low, high, length = _required(
        scaling, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    )
    if high <= low:
        raise ValueError(f'"high_freq_factor" must be more than "low_freq_factor", got {high:g} and {low:g}')
    wavelength = 2 * math.pi / freqs
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * freqs / factor + smooth * freqs
    scaled = torch.where(wavelength > length / low, freqs / factor, between)
    return torch.where(wavelength < length / high, freqs, scaled)


def _yarn(periods: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Divide frequencies of fewer than ``beta_slow`` turns in the original text, keep those above ``beta_fast``."""
    factor, length = _required(scaling, "factor", "original_max_position_embeddings")
    if theta == 1:
        raise ValueError('rope_type "yarn" needs another theta than 1, with which all frequencies are alike')
    n = periods.shape[0]

    def dimension(turns: float) -> float:
        return 2 * n * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(_optional(scaling, "beta_fast") or 32.0), dimension(_optional(scaling, "beta_slow") or 1.0)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * n - 1)
    last = last if last != first else last + 0.001
    ramp = ((torch.arange(n, dtype=periods.dtype, device=periods.device) - first) / (last - first)).clamp(0, 1)
    # Written as transformers writes it, for its last bits: freqs / factor, or ramp for 1 - kept, would differ in them.
    kept = 1 - ramp
    return 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept


def _short_length(scaling: Mapping[str, Any]) -> float:
    """The length up to which LongRoPE takes its short factors."""
    (length,) = _required(scaling, "original_max_position_embeddings")
    if length < 2:
        raise ValueError(f'"longrope" needs original_max_position_embeddings of 2 or more, got {length:g}')
    return length


def _longrope(periods: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """``[2, head_dim / 2]``: every frequency divided by its own factor, in short and in long texts."""
    _short_length(scaling)  # by which each call chooses between them
    rows = []
    for key in ("short_factor", "long_factor"):
        factors = scaling.get(key)
        given = list(factors) if isinstance(factors, Sequence) else []
        if len(given) != len(periods) or not all(is_finite_number(factor) and factor > 0 for factor in given):
            raise ValueError(
                f'scaling of rope_type "longrope" needs {len(periods)} positive numbers "{key}", got {shorten(factors)}'
            )
        rows.append(1.0 / (torch.tensor(factors, dtype=periods.dtype, device=periods.device) * periods))
    return torch.stack(rows)


def stretched_frequencies(freqs: Tensor, theta: float, scaling: Mapping[str, Any], longest: Tensor) -> Tensor:
    """Dynamic NTK scaling: those of a text that ends at position ``longest``, a tensor of one integer.

    A text up to the original length has ``freqs``. Beyond, the base of the frequencies grows with the text. All of it
    is computed on the device, for which nobody waits.
    """
    factor, original = _required(scaling, "factor", "original_max_position_embeddings")
    dim, length = 2 * len(freqs), (longest + 1).to(freqs.dtype).clamp(min=original)
    base = theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=freqs.device).to(freqs.dtype) / dim
    return torch.where(length > original, 1.0 / base**exponents, freqs)


def check_packed(scaling: Mapping[str, Any], lengths: Tensor) -> None:
    """Refuse packed texts of which the longest would decide on the frequencies of others.

    Args:
        scaling: as RoPE's, with which LongRoPE and dynamic scaling stretch long texts.
        lengths: of the texts, in the host's memory.

    Raises:
        ValueError: texts of different frequencies.
    """
    kind = rope_type(scaling)
    if kind not in STRETCHING or not len(lengths):
        return
    limit, longest = scaling["original_max_position_embeddings"], int(lengths.max())
    others = lengths[(lengths > 0) & (lengths < longest)]
    if kind == "longrope":
        others = others[others <= limit]
    if longest > limit and len(others):
        raise ValueError(
            f"packed texts of {int(others.min())} and {longest} tokens have different frequencies in RoPE with "
            f"original_max_position_embeddings={limit}; pack them apart"
        )


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """The factor of YaRN and LongRoPE on cos and sin; 1 for the other types."""
    kind = rope_type(scaling)
    if kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return _positive(scaling, "attention_factor")
    (factor,) = _required(scaling, "factor")
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(_short_length(scaling))) if factor > 1 else 1.0

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, weight_of_all = _optional(scaling, "mscale"), _optional(scaling, "mscale_all_dim")
    return mscale(1.0) if weight is None or weight_of_all is None else mscale(weight) / mscale(weight_of_all)
