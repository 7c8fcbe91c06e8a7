"""The options of DecoderLMConfig written as keys of a config.json: what each family on the hub does its own way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "attention_bias",
    "chosen_experts",
    "gemma",
    "gpt_oss",
    "granite",
    "granite_swa",
    "granitemoe_swa",
    "layer_types",
    "nested_ropes",
    "of_layers",
    "phi3",
    "qwen3_moe",
    "qwen_layer_types",
    "sliding_window",
]


def attention_bias(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": options["out_bias"]}


def sliding_window(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": next((window for window in options["windows"] if window is not None), None)}


def of_layers(options: Mapping[str, Any], name: str) -> tuple[bool, ...]:
    """An option that has one entry per layer, or one for all."""
    return options[name] * (options["num_layers"] // len(options[name]))


def layer_types(options: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in options["windows"]]
    return {**sliding_window(options), "layer_types": kinds}


def qwen_layer_types(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**layer_types(options), "use_sliding_window": any(options["windows"])}


def nested_ropes(options: Mapping[str, Any]) -> dict[str, Any]:
    windowed = options["windowed_rope"] or options["rope"]
    return {"rope_parameters": {"full_attention": dict(options["rope"]), "sliding_attention": dict(windowed)}}


def gemma(options: Mapping[str, Any]) -> dict[str, Any]:
    scale, kinds = options["attention_scale"], layer_types(options)
    if kinds["sliding_window"] is None:  # transformers' Gemma 3 makes the mask of windows in any case
        del kinds["sliding_window"]
    return {
        **attention_bias(options),
        **kinds,
        "query_pre_attn_scalar": options["head_dim"] if scale is None else round(scale**-2),
        "attn_logit_softcapping": options["attention_softcap"],
        "final_logit_softcapping": options["logit_softcap"],
    }


def phi3(options: Mapping[str, Any]) -> dict[str, Any]:
    original = options["rope"].get("original_max_position_embeddings")
    return {**sliding_window(options), **({} if original is None else {"original_max_position_embeddings": original})}


def granite(options: Mapping[str, Any]) -> dict[str, Any]:
    scale = options["attention_scale"]
    return {
        **attention_bias(options),
        "mlp_bias": options["mlp_bias"],
        "attention_multiplier": options["head_dim"] ** -0.5 if scale is None else scale,
        "embedding_multiplier": options["embedding_scale"],
        "residual_multiplier": options["residual_scale"],
        "logits_scaling": 1 / options["logit_scale"] if options["logit_scale"] else 1.0,
    }


def granite_swa(options: Mapping[str, Any]) -> dict[str, Any]:
    full, windowed = (options[name] or options["rope"] for name in ("rope", "windowed_rope"))
    thetas = [
        (full if window is None else windowed)["rope_theta"] if has_rope else 0.0
        for window, has_rope in zip(options["windows"], of_layers(options, "rope_layers"), strict=True)
    ]
    return {**granite(options), **layer_types(options), "layer_rope_theta": thetas}


def granitemoe_swa(options: Mapping[str, Any]) -> dict[str, Any]:
    experts = {"num_local_experts": options["num_experts"], "num_experts_per_tok": options["experts_per_token"]}
    return {**granite_swa(options), **experts}


def chosen_experts(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_experts_per_tok": options["experts_per_token"], "norm_topk_prob": options["normalize_experts"]}


def qwen3_moe(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **attention_bias(options),
        **qwen_layer_types(options),
        **chosen_experts(options),
        "num_experts": options["num_experts"],
        "moe_intermediate_size": options["expert_size"],
        "mlp_only_layers": [i for i, has in enumerate(of_layers(options, "expert_layers")) if not has],
    }


def gpt_oss(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **attention_bias(options),
        **layer_types(options),
        "num_local_experts": options["num_experts"],
        "num_experts_per_tok": options["experts_per_token"],
        "swiglu_alpha": options["swiglu_alpha"],
        "swiglu_limit": options["swiglu_limit"],
    }
