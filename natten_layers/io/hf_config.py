"""``config.json`` of Hugging Face models, read and written without transformers: one table of families."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

from .files import naming, read_json
from .schema import Count, Layers, Natural, NotNegative, Positive, build, check_mapping, shorten

__all__ = ["CONFIG", "FAMILIES", "Family", "config_from_hf", "config_to_hf", "read_config", "text_config"]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C")

CONFIG = "config.json"
NATIVE = "natten_layers"
"""The ``model_type`` of models for which transformers has no class."""

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
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""of a Ministral 3 whose config does not say any"""

# What a key must be for the model to compute what its file means; a missing key is fine.
ONLY = {
    "attention_dropout": (None, 0.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (None, True),
    "resid_pdrop": (None, 0.0),
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
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


class Keys(TypedDict, total=False):
    """Keys that are read from a ``config.json``. Others are ignored, since many tools add keys of their own."""

    model_type: str
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count | None
    head_dim: Count | None
    max_position_embeddings: Count
    rms_norm_eps: NotNegative
    initializer_range: NotNegative
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str | None
    hidden_activation: str | None
    query_pre_attn_scalar: Positive
    sliding_window: Count | None
    sliding_window_pattern: Count | str | None
    use_sliding_window: bool
    max_window_layers: Natural
    layer_types: Sequence[str] | None
    no_rope_layers: Sequence[int] | None
    no_rope_layer_interval: Count
    attention_multiplier: Positive
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: Positive
    logit_scale: float
    layer_norm_eps: NotNegative
    partial_rotary_factor: Positive | None
    original_max_position_embeddings: Count | None
    rope_theta: Positive | None
    rope_local_base_freq: Positive | None
    rope_scaling: Mapping[str, Any] | None
    rope_parameters: Mapping[str, Any] | None
    bos_token_id: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None


def _llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = raw.get("attention_bias", False)
    return {
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": raw.get("mlp_bias", False),
        "max_positions": raw.get("max_position_embeddings", 2048),
        "windows": _windows(raw, lambda layer: False),
    }


def _mistral(raw: Mapping[str, Any]) -> dict[str, Any]:
    window = raw.get("sliding_window", 4096)
    return {
        "num_kv_heads": raw.get("num_key_value_heads", 8),
        "max_positions": raw.get("max_position_embeddings", 131072),
        "windows": _windows({"sliding_window": window, **raw}, lambda layer: window is not None),
    }


def _qwen2(raw: Mapping[str, Any]) -> dict[str, Any]:
    windowed = raw.get("use_sliding_window", False)
    raw = {**raw, "sliding_window": raw.get("sliding_window", 4096) if windowed else None}
    return {
        "qkv_bias": True,
        "num_kv_heads": raw.get("num_key_value_heads", 32),
        "max_positions": raw.get("max_position_embeddings", 32768),
        "windows": _windows(
            raw, lambda layer: raw["sliding_window"] is not None and layer >= raw.get("max_window_layers", 28)
        ),
    }


def _qwen3(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = raw.get("attention_bias", False)
    head_dim = raw.get("head_dim", 128)
    return {**_qwen2(raw), "qkv_bias": bias, "out_bias": bias, "qk_norm": True, "head_dim": head_dim}


def _gemma3(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias, head_dim = raw.get("attention_bias", False), raw.get("head_dim", 256)
    scalar = raw.get("query_pre_attn_scalar", 256)
    every = raw.get("sliding_window_pattern") or 6
    return {
        "num_kv_heads": raw.get("num_key_value_heads", 4),
        "head_dim": head_dim,
        "max_positions": raw.get("max_position_embeddings", 131072),
        "windows": _windows({"sliding_window": 4096, **raw}, lambda layer: (layer + 1) % every != 0),
        "zero_centered_norm": True,
        "post_norms": True,
        "qk_norm": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "attention_scale": None if scalar == head_dim else scalar**-0.5,
        "embedding_scale": raw["hidden_size"] ** 0.5,
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


def _phi3(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "max_positions": raw.get("max_position_embeddings", 4096),
        "windows": _windows(raw, lambda layer: raw.get("sliding_window") is not None),
    }


def _smollm3(raw: Mapping[str, Any]) -> dict[str, Any]:
    interval = raw.get("no_rope_layer_interval") or 4
    layers = range(raw["num_hidden_layers"])
    turns = raw.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in layers]  # 1 is RoPE
    if len(turns) != len(layers):
        raise ValueError(f"config key no_rope_layers has {len(turns)} entries for {len(layers)} layers")
    windowed = raw.get("use_sliding_window", False) and raw.get("sliding_window") is not None
    return {
        **_llama(raw),
        "num_kv_heads": raw.get("num_key_value_heads", 4),
        "max_positions": raw.get("max_position_embeddings", 32768),
        "rope_layers": tuple(map(bool, turns)),
        "windows": _windows(raw, lambda layer: windowed and not turns[layer]),
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


def _olmo2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_llama(raw),
        "mlp_bias": False,
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": "all heads",
    }


def _olmo3(raw: Mapping[str, Any]) -> dict[str, Any]:
    windows = _windows({"sliding_window": 4096, **raw}, lambda layer: (layer + 1) % 4 != 0)
    return {**_olmo2({**raw, "layer_types": None}), "windows": windows}


def _ministral3(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw.get("layer_types") is not None:
        raise ValueError("config key layer_types is not implemented for ministral3, whose layers are all alike")
    return {
        "num_kv_heads": raw.get("num_key_value_heads", 8),
        "head_dim": raw.get("head_dim", 128),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "max_positions": raw.get("max_position_embeddings", 262144),
        "windows": _windows(raw, lambda layer: raw.get("sliding_window") is not None),
    }


def _granite(raw: Mapping[str, Any]) -> dict[str, Any]:
    scale = raw.get("attention_multiplier", 1.0)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    return {
        **_llama(raw),
        "attention_scale": None if scale == head_dim**-0.5 else scale,
        "embedding_scale": raw.get("embedding_multiplier", 1.0),
        "residual_scale": raw.get("residual_multiplier", 1.0),
        "logit_scale": 1 / raw.get("logits_scaling", 1.0),
    }


def _exaone4(raw: Mapping[str, Any]) -> dict[str, Any]:
    window, every = raw.get("sliding_window", 4096), raw.get("sliding_window_pattern", 4)
    if raw.get("layer_types") is None and window is not None and not isinstance(every, int):
        raise ValueError(f"config key sliding_window_pattern={every!r} is not implemented without layer_types")
    windows = _windows({**raw, "sliding_window": window}, lambda layer: window is not None and (layer + 1) % every != 0)
    return {
        "num_kv_heads": raw.get("num_key_value_heads", 32),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "max_positions": raw.get("max_position_embeddings", 2048),
        "windows": windows,
        # Full layers of a model that has windows know no positions.
        "rope_layers": tuple(window is None or own is not None for own in windows),
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": True,
    }


def _glm4(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_kv_heads": raw.get("num_key_value_heads", 2),
        "head_dim": raw.get("head_dim", 128),
        "norm_eps": raw.get("rms_norm_eps", 1.5625e-7),
        "max_positions": raw.get("max_position_embeddings", 131072),
        "windows": _windows(raw, lambda layer: False),
        "qkv_bias": raw.get("attention_bias", True),
        "post_norms": True,
        "rope_interleaved": True,
    }


def _cohere2(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias, every = raw.get("attention_bias", False), raw.get("sliding_window_pattern") or 4
    windows = _windows({"sliding_window": 4096, **raw}, lambda layer: (layer + 1) % every != 0)
    return {
        "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
        "norm": "layer",
        "norm_eps": raw.get("layer_norm_eps", 1e-5),
        "max_positions": raw.get("max_position_embeddings", 8192),
        "windows": windows,
        "rope_layers": tuple(window is not None for window in windows),
        "rope_interleaved": True,
        "parallel_blocks": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "logit_scale": raw.get("logit_scale", 0.0625),
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


class Family(NamedTuple):
    """What sets a ``model_type`` of transformers apart."""

    architecture: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """options that follow from the keys of a config.json"""
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    """keys that say what :func:`_family_config` does not write for all, from the options"""
    theta: float = 10000.0
    partial: float | None = None
    """default of ``partial_rotary_factor``, None where the class in transformers does not know it"""
    refuses_odd_sizes: bool = False
    """whether the class refuses a ``hidden_size`` that ``num_attention_heads`` does not divide"""
    fused: Mapping[str, tuple[str, ...]] = {}
    """names of projections that its files hold as one, which has the name's rows in this order"""
    names: Mapping[str, str] = {}
    """our names of modules to those in its files, where they differ"""


QKV = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj")}
GLM_NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def _bias(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": options["out_bias"]}


def _window(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": next((window for window in options["windows"] if window is not None), None)}


def _kinds(options: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in options["windows"]]
    return {**_window(options), "layer_types": kinds}


def _qwen_kinds(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**_kinds(options), "use_sliding_window": any(options["windows"])}


def _nested_ropes(options: Mapping[str, Any]) -> dict[str, Any]:
    windowed = options["windowed_rope"] or options["rope"]
    return {"rope_parameters": {"full_attention": dict(options["rope"]), "sliding_attention": dict(windowed)}}


def _gemma3_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    scale, kinds = options["attention_scale"], _kinds(options)
    if kinds["sliding_window"] is None:  # transformers' Gemma 3 makes the mask of windows in any case
        del kinds["sliding_window"]
    scalar = options["head_dim"] if scale is None else round(scale**-2)
    return {**_bias(options), **kinds, **_nested_ropes(options), "query_pre_attn_scalar": scalar}


def _phi3_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    original = options["rope"].get("original_max_position_embeddings")
    return {**_window(options), **({} if original is None else {"original_max_position_embeddings": original})}


def _granite_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    scale = options["attention_scale"]
    return {
        **_bias(options),
        "mlp_bias": options["mlp_bias"],
        "attention_multiplier": options["head_dim"] ** -0.5 if scale is None else scale,
        "embedding_multiplier": options["embedding_scale"],
        "residual_multiplier": options["residual_scale"],
        "logits_scaling": 1 / options["logit_scale"] if options["logit_scale"] else 1.0,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", _llama, lambda o: {**_bias(o), "mlp_bias": o["mlp_bias"]}, refuses_odd_sizes=True
    ),
    "mistral": Family("MistralForCausalLM", _mistral, _window),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _qwen_kinds),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, lambda o: {**_bias(o), **_qwen_kinds(o)}),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, _gemma3_keys, 1000000.0, refuses_odd_sizes=True),
    "phi3": Family("Phi3ForCausalLM", _phi3, _phi3_keys, partial=1.0, fused={**QKV, **GATE_UP}),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3,
        lambda o: {
            **_bias(o),
            **_qwen_kinds(o),
            "mlp_bias": o["mlp_bias"],
            "no_rope_layers": [*map(int, o["rope_layers"])] * (o["num_layers"] // len(o["rope_layers"])),
        },
        2000000.0,
    ),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, _bias),
    "olmo3": Family("Olmo3ForCausalLM", _olmo3, lambda o: {**_bias(o), **_kinds(o), **_nested_ropes(o)}, 500000.0),
    "ministral3": Family("Ministral3ForCausalLM", _ministral3, _window, 1000000.0),
    "granite": Family("GraniteForCausalLM", _granite, _granite_keys),
    "exaone4": Family("Exaone4ForCausalLM", _exaone4, _kinds),
    "glm4": Family(
        "Glm4ForCausalLM",
        _glm4,
        lambda o: {"attention_bias": o["qkv_bias"]},
        partial=0.5,
        fused=GATE_UP,
        names=GLM_NORMS,
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        _cohere2,
        lambda o: {**_bias(o), **_kinds(o), "layer_norm_eps": float(o["norm_eps"]), "logit_scale": o["logit_scale"]},
    ),
}
COMPOSITES = {"gemma3": {"vocab_size": 262208, "num_attention_heads": 8}, "mistral3": {}}
"""``model_type`` of models that have one of these as their ``text_config``, with its defaults there"""


def config_from_hf(raw: Mapping[str, Any], kind: type[C]) -> C:
    """Convert a ``config.json`` to an instance of ``kind``, a dataclass such as DecoderLMConfig.

    Both ways in which transformers writes RoPE are read: ``rope_parameters``, and ``rope_theta`` with
    ``rope_scaling``. Missing keys get the defaults of the family's class in transformers 5. Unknown keys are ignored,
    except those that change what is computed. A config of ``model_type`` "natten_layers" holds the fields of ``kind``,
    and unknown keys in it are errors.

    Args:
        raw: the content of ``config.json``.
        kind: the dataclass to make.

    Raises:
        ValueError: ``model_type`` is unknown, a key is missing, a value has another type, or an option is not
            implemented; the message names the key.
    """
    if raw.get("model_type") == NATIVE:
        options = {key: value for key, value in raw.items() if key not in ("model_type", "dtype")}
    else:
        options = _options(raw)
    return build(kind, options, "the config")


def _options(raw: Mapping[str, Any]) -> dict[str, Any]:
    raw = text_config(raw)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = [*FAMILIES, *COMPOSITES, NATIVE]
        raise ValueError(f"model_type {shorten(family)} is not implemented; known are {known}")
    raw = check_mapping(raw, Keys, "config", closed=False)
    for key, allowed in ONLY.items():
        if raw.get(key) not in allowed:
            raise ValueError(f"config key {key}={shorten(raw[key])} is not implemented; it must be one of {allowed}")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if raw.get(key) is None]:
        raise ValueError(f"the config has no {', '.join(missing)}")
    # Gemma's class in transformers reads the activation from another key than the other families' classes.
    key, usual = ("hidden_activation", "gelu_pytorch_tanh") if "gemma" in family else ("hidden_act", "silu")
    activation = raw.get(key) or usual
    if activation not in ACTIVATIONS:
        raise ValueError(f"config key {key}={activation!r} is not implemented; known are {list(ACTIVATIONS)}")
    options = {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": raw["num_attention_heads"],
        "num_kv_heads": raw.get("num_key_value_heads"),
        "head_dim": raw.get("head_dim"),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "activation": ACTIVATIONS[activation],
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "initializer_range": raw.get("initializer_range", 0.02),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": raw.get("eos_token_id"),
        "pad_token_id": raw.get("pad_token_id"),
    }
    options |= FAMILIES[family].read(raw)
    rope, windowed = _ropes(raw, options["max_positions"], family)
    return {**options, "rope": rope, "windowed_rope": None if windowed == rope else windowed}


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model in a composite one, or the config itself."""
    composite = raw.get("model_type")
    if not isinstance(composite, str) or composite not in COMPOSITES:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"config key text_config of model_type {composite!r} must be an object, got {shorten(text)}")
    # About the whole, so the outer config has the word on them.
    outer = {"tie_word_embeddings": raw.get("tie_word_embeddings", True)}
    if raw.get("quantization_config") is not None:
        outer["quantization_config"] = raw["quantization_config"]
    return {**COMPOSITES[composite], **text, **outer}


def _windows(raw: Mapping[str, Any], is_windowed: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer, None for full attention, from ``layer_types`` or else from the family's rule."""
    kinds = raw.get("layer_types") or [
        "sliding_attention" if is_windowed(layer) else "full_attention" for layer in range(raw["num_hidden_layers"])
    ]
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"config key layer_types has {sorted(unknown)}, which is not implemented")
    if len(kinds) != raw["num_hidden_layers"]:
        raise ValueError(f"config key layer_types has {len(kinds)} entries for {raw['num_hidden_layers']} layers")
    window = raw.get("sliding_window")
    if window is None and "sliding_attention" in kinds:
        raise ValueError("config key layer_types has sliding_attention, but the config sets no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ropes(raw: Mapping[str, Any], max_positions: int, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """RoPE options of layers with full attention, and of those with a window."""
    gemma = family == "gemma3_text"
    theta = raw.get("rope_theta") or FAMILIES[family].theta
    given = raw.get("rope_parameters") or {}
    if family == "ministral3" and not given and not raw.get("rope_scaling"):
        given = MINISTRAL3_ROPE
    if "full_attention" in given or "sliding_attention" in given:
        full, windowed = given.get("full_attention") or {}, given.get("sliding_attention") or {}
    elif family == "olmo3" and raw.get("rope_parameters"):
        raise ValueError("config key rope_parameters must name full_attention and sliding_attention for olmo3")
    else:
        full = raw.get("rope_scaling") or given
        windowed = {} if gemma or family == "olmo3" else full
    windowed_theta = (raw.get("rope_local_base_freq") or 10000.0) if gemma else theta
    return (
        _rope(full, theta, raw, max_positions, family),
        _rope(windowed, windowed_theta, raw, max_positions, family),
    )


def _rope(given: Any, theta: float, raw: Mapping[str, Any], max_positions: int, family: str) -> dict[str, Any]:
    given = check_mapping(given, RopeKeys, 'config["rope_parameters"]', closed=False)
    kind = given.get("rope_type") or given.get("type") or "default"
    if family == "phi3" and kind in ("su", "yarn"):  # what Phi-3's first files called it
        kind = "longrope"
    if kind == "dynamic":  # stretches texts beyond max_position_embeddings alone, where this model ends
        kind = "default"
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


def config_to_hf(config: DataclassInstance) -> dict[str, Any]:
    """Convert a DecoderLMConfig to a ``config.json``.

    It has the ``model_type`` of a transformers family that computes the same, or "natten_layers" if there is none.
    """
    options = dataclasses.asdict(config)
    for family, its in FAMILIES.items():
        # Some classes of transformers refuse such sizes, though a head_dim of its own makes them no contradiction.
        if its.refuses_odd_sizes and options["hidden_size"] % options["num_heads"]:
            continue
        raw = _family_config(options, family)
        try:
            if config_from_hf(raw, type(config)) == config:
                return raw
        except ValueError:
            continue
    return {"model_type": NATIVE, **options}


def _family_config(options: Mapping[str, Any], family: str) -> dict[str, Any]:
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == options["activation"])
    raw: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": options["vocab_size"],
        "hidden_size": options["hidden_size"],
        "intermediate_size": options["intermediate_size"],
        "num_hidden_layers": options["num_layers"],
        "num_attention_heads": options["num_heads"],
        "num_key_value_heads": options["num_kv_heads"],
        "head_dim": options["head_dim"],
        "max_position_embeddings": options["max_positions"],
        "rms_norm_eps": float(options["norm_eps"]),  # transformers refuses an int
        "tie_word_embeddings": options["tie_embeddings"],
        "initializer_range": float(options["initializer_range"]),
        "bos_token_id": options["bos_token_id"],
        "eos_token_id": options["eos_token_id"],
        "pad_token_id": options["pad_token_id"],
        "rope_parameters": dict(options["rope"]),
    }
    raw["hidden_activation" if family == "gemma3_text" else "hidden_act"] = activation
    return {**raw, **FAMILIES[family].write(options)}


def read_config(directory: str | os.PathLike[str], kind: type[C]) -> C:
    """Read ``directory/config.json`` as :func:`config_from_hf` does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a JSON object, or :func:`config_from_hf` refuses it; the message names the file.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a directory with config.json and weights")
    raw = read_json(path)
    with naming(path):
        return config_from_hf(raw, kind)
