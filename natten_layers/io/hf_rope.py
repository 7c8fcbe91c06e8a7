"""The rotary position embedding that a ``config.json`` asks for, in the spelling of any version of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .hf_families import FAMILIES
from .schema import Count, NotNegative, Positive, check_mapping

__all__ = ["rope_options"]

ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    "dynamic": ("factor",),
}


class RopeKeys(TypedDict, total=False):
    """Keys that are read from ``rope_scaling``, from ``rope_parameters``, or from its entry for one kind of layer."""

    rope_type: str | None
    type: str | None
    rope_theta: Positive | None
    factor: Positive | None
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    original_max_position_embeddings: Count | None
    attention_factor: Positive | None
    beta_fast: Positive | None
    beta_slow: Positive | None
    mscale: NotNegative | None
    mscale_all_dim: NotNegative | None
    truncate: bool | None
    partial_rotary_factor: Positive | None
    short_factor: tuple[Positive, ...] | None
    long_factor: tuple[Positive, ...] | None
    llama_4_scaling_beta: float | None


def rope_options(
    raw: Mapping[str, Any], max_positions: int, windows: Sequence[int | None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """RoPE options of layers with full attention, and of those with a window.

    Args:
        raw: the content of ``config.json``, of a ``model_type`` in ``FAMILIES``.
        max_positions: the length of the longest text.
        windows: of each layer, None for full attention.

    Raises:
        ValueError: a key is missing or asks for something that is not implemented; the message names it.
    """
    name = raw["model_type"]
    family = FAMILIES[name]
    given = raw.get("rope_parameters") or {}
    if not given and not raw.get("rope_scaling"):
        given = family.rope
    if "full_attention" in given or "sliding_attention" in given:
        full, windowed = given.get("full_attention") or {}, given.get("sliding_attention") or {}
    elif name == "olmo3" and raw.get("rope_parameters"):
        raise ValueError("config key rope_parameters must name full_attention and sliding_attention for olmo3")
    else:
        full = raw.get("rope_scaling") or given
        windowed = full if family.scales_windows else {}
    theta = windowed_theta = raw.get("rope_theta") or family.theta
    if family.windowed_theta is not None:
        windowed_theta = raw.get("rope_local_base_freq") or family.windowed_theta
    if name in ("granite_swa", "granitemoe_swa") and raw.get("layer_rope_theta"):
        theta, windowed_theta = (
            _common_theta(raw["layer_rope_theta"], [(w is None) == is_full for w in windows]) or theta
            for is_full in (True, False)
        )
        full, windowed = ({**each, "rope_theta": None} for each in (full, windowed))
    return _rope(full, theta, raw, max_positions, name), _rope(windowed, windowed_theta, raw, max_positions, name)


def _common_theta(thetas: Sequence[float], chosen: Sequence[bool]) -> float | None:
    """The base of some layers' frequencies, where 0 stands for no RoPE; None if none of them has RoPE."""
    found = {theta for theta, is_chosen in zip(thetas, chosen, strict=True) if is_chosen and theta > 0}
    if len(found) > 1:
        raise ValueError(
            f"config key layer_rope_theta has the bases {sorted(found)} in layers of one kind, which is not "
            "implemented; layers with a window may have one, and layers without may have another"
        )
    return found.pop() if found else None


def _rope(given: Any, theta: float, raw: Mapping[str, Any], max_positions: int, family: str) -> dict[str, Any]:
    given = check_mapping(given, RopeKeys, 'config["rope_parameters"]', closed=False)
    kind = given.get("rope_type") or given.get("type") or "default"
    if family == "phi3" and kind in ("su", "yarn"):  # what Phi-3's first files called it
        kind = "longrope"
    if kind not in ROPE_KEYS:
        raise ValueError(f"config key rope_scaling: rope_type {kind!r} is not implemented; known are {list(ROPE_KEYS)}")
    rope = {"rope_type": kind, "rope_theta": given.get("rope_theta") or theta}
    rope |= {key: given[key] for key in ROPE_KEYS[kind] if given.get(key) is not None}
    rope |= _partial(given.get("partial_rotary_factor") or raw.get("partial_rotary_factor"), family)
    if beta := given.get("llama_4_scaling_beta"):
        if family != "ministral3" or given.get("original_max_position_embeddings") is None:
            raise ValueError(f"config key llama_4_scaling_beta={beta} is not implemented for model_type {family!r}")
        rope["llama_4_scaling_beta"] = beta
        rope["original_max_position_embeddings"] = given["original_max_position_embeddings"]
    if family == "phi3" and kind == "longrope":  # as in transformers, this key goes before the one in the dictionary
        rope["original_max_position_embeddings"] = raw.get("original_max_position_embeddings") or 4096
    if kind == "dynamic":  # which stretches texts beyond this key alone, in transformers as here
        rope["original_max_position_embeddings"] = max_positions
    if "original_max_position_embeddings" in ROPE_KEYS[kind]:
        original = raw.get("original_max_position_embeddings") or max_positions
        rope.setdefault("original_max_position_embeddings", original)
    if kind in ("yarn", "longrope"):
        rope.setdefault("factor", max_positions / rope["original_max_position_embeddings"])
    needed = {"yarn": (), "longrope": ("short_factor", "long_factor")}.get(kind, ROPE_KEYS[kind])
    if missing := [key for key in needed if key not in rope]:
        raise ValueError(f"config key rope_scaling of rope_type {kind!r} has no {', '.join(missing)}")
    return rope


def _partial(factor: float | None, family: str) -> dict[str, float]:
    default = FAMILIES[family].partial
    if default is None and factor not in (None, 1.0):
        raise ValueError(f"config key partial_rotary_factor={factor} is not implemented for model_type {family!r}")
    factor = factor or default or 1.0
    return {} if factor == 1.0 else {"partial_rotary_factor": factor}
