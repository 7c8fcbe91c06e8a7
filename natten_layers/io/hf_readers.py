"""The keys of a config.json read to the options of DecoderLMConfig: what each family on the hub does its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3",
    "glm",
    "glm4",
    "gpt_oss",
    "granite",
    "granite_swa",
    "granitemoe_swa",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
]


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


def llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = raw.get("attention_bias", False)
    return {
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": raw.get("mlp_bias", False),
        "max_positions": raw.get("max_position_embeddings", 2048),
        "windows": _windows(raw, lambda layer: False),
    }


def mistral(raw: Mapping[str, Any]) -> dict[str, Any]:
    window = raw.get("sliding_window", 4096)
    return {
        "num_kv_heads": raw.get("num_key_value_heads", 8),
        "max_positions": raw.get("max_position_embeddings", 131072),
        "windows": _windows({"sliding_window": window, **raw}, lambda layer: window is not None),
    }


def qwen2(raw: Mapping[str, Any]) -> dict[str, Any]:
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


def qwen3(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = raw.get("attention_bias", False)
    head_dim = raw.get("head_dim", 128)
    return {**qwen2(raw), "qkv_bias": bias, "out_bias": bias, "qk_norm": True, "head_dim": head_dim}


def gemma3(raw: Mapping[str, Any]) -> dict[str, Any]:
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
        "logit_softcap": raw.get("final_logit_softcapping"),
    }


def gemma2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **gemma3({"sliding_window_pattern": 2, **raw}),
        "max_positions": raw.get("max_position_embeddings", 8192),
        "qk_norm": False,
        "attention_softcap": raw.get("attn_logit_softcapping", 50.0),
        "logit_softcap": raw.get("final_logit_softcapping", 30.0),
    }


def phi3(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "max_positions": raw.get("max_position_embeddings", 4096),
        "windows": _windows(raw, lambda layer: raw.get("sliding_window") is not None),
    }


def smollm3(raw: Mapping[str, Any]) -> dict[str, Any]:
    interval = raw.get("no_rope_layer_interval") or 4
    layers = range(raw["num_hidden_layers"])
    has_rope = raw.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in layers]  # 1 is RoPE
    if len(has_rope) != len(layers):
        raise ValueError(f"config key no_rope_layers has {len(has_rope)} entries for {len(layers)} layers")
    windowed = raw.get("use_sliding_window", False) and raw.get("sliding_window") is not None
    return {
        **llama(raw),
        "num_kv_heads": raw.get("num_key_value_heads", 4),
        "max_positions": raw.get("max_position_embeddings", 32768),
        "rope_layers": tuple(map(bool, has_rope)),
        "windows": _windows(raw, lambda layer: windowed and not has_rope[layer]),
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


def olmo2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **llama(raw),
        "mlp_bias": False,
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": "all heads",
    }


def olmo3(raw: Mapping[str, Any]) -> dict[str, Any]:
    windows = _windows({"sliding_window": 4096, **raw}, lambda layer: (layer + 1) % 4 != 0)
    return {**olmo2({**raw, "layer_types": None}), "windows": windows}


def ministral3(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_kv_heads": raw.get("num_key_value_heads", 8),
        "head_dim": raw.get("head_dim", 128),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "max_positions": raw.get("max_position_embeddings", 262144),
        "windows": _windows(raw, lambda layer: raw.get("sliding_window") is not None),
    }


def granite(raw: Mapping[str, Any]) -> dict[str, Any]:
    scale = raw.get("attention_multiplier", 1.0)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    return {
        **llama(raw),
        "attention_scale": None if scale == head_dim**-0.5 else scale,
        "embedding_scale": raw.get("embedding_multiplier", 1.0),
        "residual_scale": raw.get("residual_multiplier", 1.0),
        "logit_scale": 1 / raw.get("logits_scaling", 1.0),
    }


def granite_swa(raw: Mapping[str, Any]) -> dict[str, Any]:
    windows = _windows({"sliding_window": 128, **raw}, lambda layer: layer % 4 != 0)
    thetas = raw.get("layer_rope_theta")
    if thetas is not None and len(thetas) != len(windows):
        raise ValueError(f"config key layer_rope_theta has {len(thetas)} entries for {len(windows)} layers")
    return {
        **granite({**raw, "layer_types": None}),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "max_positions": raw.get("max_position_embeddings", 8192),
        "num_kv_heads": raw.get("num_key_value_heads", 4),
        "windows": windows,
        "rope_layers": (True,) if thetas is None else tuple(theta > 0 for theta in thetas),
        "sink": "learned",
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


def granitemoe_swa(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **granite_swa({"num_key_value_heads": raw["num_attention_heads"], "tie_word_embeddings": False, **raw}),
        "num_experts": raw.get("num_local_experts", 8),
        "experts_per_token": raw.get("num_experts_per_tok", 2),
        "mlp_bias": False,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "max_positions": raw.get("max_position_embeddings", 2048),
    }


def exaone4(raw: Mapping[str, Any]) -> dict[str, Any]:
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


def glm4(raw: Mapping[str, Any]) -> dict[str, Any]:
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


def glm(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**glm4(raw), "post_norms": False}


def cohere2(raw: Mapping[str, Any]) -> dict[str, Any]:
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


def _experts(raw: Mapping[str, Any], number: int, chosen: int) -> dict[str, Any]:
    number = raw.get("num_experts", raw.get("num_local_experts", number))  # transformers 5 reads both
    return {"num_experts": number, "experts_per_token": raw.get("num_experts_per_tok", chosen)}


def mixtral(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **mistral({"sliding_window": None, **raw}),
        **_experts(raw, 8, 2),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
    }


def qwen3_moe(raw: Mapping[str, Any]) -> dict[str, Any]:
    step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
    return {
        **qwen3({"num_key_value_heads": 4, **raw, "layer_types": None, "max_window_layers": 0}),
        **_experts(raw, 128, 8),
        "head_dim": raw.get("head_dim"),
        "expert_size": raw.get("moe_intermediate_size", 768),
        "expert_layers": tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(raw["num_hidden_layers"])
        ),
        "normalize_experts": raw.get("norm_topk_prob", False),
    }


def olmoe(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **llama(raw),
        **_experts(raw, 64, 8),
        "mlp_bias": False,
        "max_positions": raw.get("max_position_embeddings", 4096),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "qk_norm": "all heads",
        "normalize_experts": raw.get("norm_topk_prob", False),
    }


def gpt_oss(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = raw.get("attention_bias", True)
    return {
        **_experts(raw, 128, 4),
        "num_kv_heads": raw.get("num_key_value_heads", 8),
        "head_dim": raw.get("head_dim", 64),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "max_positions": raw.get("max_position_embeddings", 131072),
        "windows": _windows({"sliding_window": 128, **raw}, lambda layer: layer % 2 == 0),
        "sink": "learned",
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": True,
        "router_bias": True,
        "activation": "clamped_swiglu",
        "swiglu_alpha": raw.get("swiglu_alpha", 1.702),
        "swiglu_limit": raw.get("swiglu_limit", 7.0),
    }
