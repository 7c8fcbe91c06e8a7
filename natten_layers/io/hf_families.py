"""What sets the families of language models on the Hugging Face hub apart: one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..wording import shorten

__all__ = ["ACTIVATIONS", "COMPOSITES", "FAMILIES", "SOFTCAPS", "Family", "text_config"]

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

SOFTCAPS = "attn_logit_softcapping", "final_logit_softcapping"

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
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}

# --- From the keys of a config.json to the options of DecoderLMConfig


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
        "logit_softcap": raw.get("final_logit_softcapping"),
    }


def _gemma2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_gemma3({"sliding_window_pattern": 2, **raw}),
        "max_positions": raw.get("max_position_embeddings", 8192),
        "qk_norm": False,
        "attention_softcap": raw.get("attn_logit_softcapping", 50.0),
        "logit_softcap": raw.get("final_logit_softcapping", 30.0),
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
    has_rope = raw.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in layers]  # 1 is RoPE
    if len(has_rope) != len(layers):
        raise ValueError(f"config key no_rope_layers has {len(has_rope)} entries for {len(layers)} layers")
    windowed = raw.get("use_sliding_window", False) and raw.get("sliding_window") is not None
    return {
        **_llama(raw),
        "num_kv_heads": raw.get("num_key_value_heads", 4),
        "max_positions": raw.get("max_position_embeddings", 32768),
        "rope_layers": tuple(map(bool, has_rope)),
        "windows": _windows(raw, lambda layer: windowed and not has_rope[layer]),
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


def _granite_swa(raw: Mapping[str, Any]) -> dict[str, Any]:
    windows = _windows({"sliding_window": 128, **raw}, lambda layer: layer % 4 != 0)
    thetas = raw.get("layer_rope_theta")
    if thetas is not None and len(thetas) != len(windows):
        raise ValueError(f"config key layer_rope_theta has {len(thetas)} entries for {len(windows)} layers")
    return {
        **_granite({**raw, "layer_types": None}),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "max_positions": raw.get("max_position_embeddings", 8192),
        "num_kv_heads": raw.get("num_key_value_heads", 4),
        "windows": windows,
        "rope_layers": (True,) if thetas is None else tuple(theta > 0 for theta in thetas),
        "sink": "learned",
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


def _granitemoe_swa(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_granite_swa({"num_key_value_heads": raw["num_attention_heads"], "tie_word_embeddings": False, **raw}),
        "num_experts": raw.get("num_local_experts", 8),
        "experts_per_token": raw.get("num_experts_per_tok", 2),
        "mlp_bias": False,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "max_positions": raw.get("max_position_embeddings", 2048),
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


def _glm(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**_glm4(raw), "post_norms": False}


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


def _experts(raw: Mapping[str, Any], number: int, chosen: int) -> dict[str, Any]:
    number = raw.get("num_experts", raw.get("num_local_experts", number))  # transformers 5 reads both
    return {"num_experts": number, "experts_per_token": raw.get("num_experts_per_tok", chosen)}


def _mixtral(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_mistral({"sliding_window": None, **raw}),
        **_experts(raw, 8, 2),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
    }


def _qwen3_moe(raw: Mapping[str, Any]) -> dict[str, Any]:
    step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
    return {
        **_qwen3({"num_key_value_heads": 4, **raw, "layer_types": None, "max_window_layers": 0}),
        **_experts(raw, 128, 8),
        "head_dim": raw.get("head_dim"),
        "expert_size": raw.get("moe_intermediate_size", 768),
        "expert_layers": tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(raw["num_hidden_layers"])
        ),
        "normalize_experts": raw.get("norm_topk_prob", False),
    }


def _olmoe(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_llama(raw),
        **_experts(raw, 64, 8),
        "mlp_bias": False,
        "max_positions": raw.get("max_position_embeddings", 4096),
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "qk_norm": "all heads",
        "normalize_experts": raw.get("norm_topk_prob", False),
    }


def _gpt_oss(raw: Mapping[str, Any]) -> dict[str, Any]:
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


# --- And back


def _bias(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": options["out_bias"]}


def _window(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": next((window for window in options["windows"] if window is not None), None)}


def _of_layers(options: Mapping[str, Any], name: str) -> tuple[bool, ...]:
    """An option that has one entry per layer, or one for all."""
    return options[name] * (options["num_layers"] // len(options[name]))


def _kinds(options: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in options["windows"]]
    return {**_window(options), "layer_types": kinds}


def _qwen_kinds(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**_kinds(options), "use_sliding_window": any(options["windows"])}


def _nested_ropes(options: Mapping[str, Any]) -> dict[str, Any]:
    windowed = options["windowed_rope"] or options["rope"]
    return {"rope_parameters": {"full_attention": dict(options["rope"]), "sliding_attention": dict(windowed)}}


def _gemma_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    scale, kinds = options["attention_scale"], _kinds(options)
    if kinds["sliding_window"] is None:  # transformers' Gemma 3 makes the mask of windows in any case
        del kinds["sliding_window"]
    return {
        **_bias(options),
        **kinds,
        "query_pre_attn_scalar": options["head_dim"] if scale is None else round(scale**-2),
        "attn_logit_softcapping": options["attention_softcap"],
        "final_logit_softcapping": options["logit_softcap"],
    }


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


def _granite_swa_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    full, windowed = (options[name] or options["rope"] for name in ("rope", "windowed_rope"))
    thetas = [
        (full if window is None else windowed)["rope_theta"] if has_rope else 0.0
        for window, has_rope in zip(options["windows"], _of_layers(options, "rope_layers"), strict=True)
    ]
    return {**_granite_keys(options), **_kinds(options), "layer_rope_theta": thetas}


def _granitemoe_swa_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    experts = {"num_local_experts": options["num_experts"], "num_experts_per_tok": options["experts_per_token"]}
    return {**_granite_swa_keys(options), **experts}


def _experts_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_experts_per_tok": options["experts_per_token"], "norm_topk_prob": options["normalize_experts"]}


def _qwen3_moe_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_bias(options),
        **_qwen_kinds(options),
        **_experts_keys(options),
        "num_experts": options["num_experts"],
        "moe_intermediate_size": options["expert_size"],
        "mlp_only_layers": [i for i, has in enumerate(_of_layers(options, "expert_layers")) if not has],
    }


def _gpt_oss_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_bias(options),
        **_kinds(options),
        "num_local_experts": options["num_experts"],
        "num_experts_per_tok": options["experts_per_token"],
        "swiglu_alpha": options["swiglu_alpha"],
        "swiglu_limit": options["swiglu_limit"],
    }


# --- The table


class Family(NamedTuple):
    """What sets a ``model_type`` of transformers apart."""

    architecture: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """options that follow from the keys of a config.json"""
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    """keys that say what is not written alike for all families, from the options"""
    theta: float = 10000.0
    partial: float | None = None
    """default of ``partial_rotary_factor``, None where the class in transformers does not know it"""
    rope: Mapping[str, Any] = {}
    """``rope_parameters`` of a config that has none"""
    scales_windows: bool = True
    """whether a scaling of RoPE that names no kind of layer holds for layers with a window too"""
    windowed_theta: float | None = None
    """default of ``rope_local_base_freq``, None where the class in transformers does not know it"""
    activation_key: str = "hidden_act"
    activation: str = "silu"
    caps: tuple[str, ...] = ()
    """which of the keys in ``SOFTCAPS`` the class in transformers honours"""
    refuses_odd_sizes: bool = False
    """whether the class refuses a ``hidden_size`` that ``num_attention_heads`` does not divide"""
    fused: Mapping[str, tuple[str, ...]] = {}
    """names of projections that its files hold as one, which has the name's rows in this order"""
    stacked: Mapping[str, tuple[str, ...]] = {}
    """names of tensors in which its files hold projections of all experts of a layer"""
    in_turn: bool = False
    """whether these are transposed, ``[experts, in, out]``, and of several projections the channels take turns"""
    names: Mapping[str, str] = {}
    """our names of modules to those in its files, where they differ"""


QKV = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj")}
GLM_NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}

MIXTRAL_NAMES = {
    "mlp": "block_sparse_moe",
    "router": "gate",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}
STACKED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", _llama, lambda o: {**_bias(o), "mlp_bias": o["mlp_bias"]}, refuses_odd_sizes=True
    ),
    "mistral": Family("MistralForCausalLM", _mistral, _window),
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixtral,
        lambda o: {**_window(o), **_experts_keys(o), "num_local_experts": o["num_experts"]},
        1000000.0,
        names=MIXTRAL_NAMES,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _qwen_kinds),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, lambda o: {**_bias(o), **_qwen_kinds(o)}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, _qwen3_moe_keys, names={"router": "gate"}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma2,
        _gemma_keys,
        refuses_odd_sizes=True,
        caps=SOFTCAPS,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3,
        lambda o: {**_gemma_keys(o), **_nested_ropes(o)},
        1000000.0,
        scales_windows=False,
        windowed_theta=10000.0,
        refuses_odd_sizes=True,
        caps=("final_logit_softcapping",),
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
    ),
    "phi3": Family("Phi3ForCausalLM", _phi3, _phi3_keys, partial=1.0, fused={**QKV, **GATE_UP}),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3,
        lambda o: {
            **_bias(o),
            **_qwen_kinds(o),
            "mlp_bias": o["mlp_bias"],
            "no_rope_layers": [*map(int, _of_layers(o, "rope_layers"))],
        },
        2000000.0,
    ),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, _bias),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _olmo3,
        lambda o: {**_bias(o), **_kinds(o), **_nested_ropes(o)},
        500000.0,
        scales_windows=False,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _olmoe,
        lambda o: {**_bias(o), **_experts_keys(o), "num_experts": o["num_experts"]},
        names={"router": "gate"},
    ),
    "ministral3": Family("Ministral3ForCausalLM", _ministral3, _window, 1000000.0, rope=MINISTRAL3_ROPE),
    "granite": Family("GraniteForCausalLM", _granite, _granite_keys),
    "granite_swa": Family("GraniteSWAForCausalLM", _granite_swa, _granite_swa_keys),
    "granitemoe_swa": Family(
        "GraniteMoeSWAForCausalLM",
        _granitemoe_swa,
        _granitemoe_swa_keys,
        stacked=STACKED_EXPERTS,
        names={"mlp": "block_sparse_moe"},
    ),
    "exaone4": Family("Exaone4ForCausalLM", _exaone4, _kinds),
    "glm": Family("GlmForCausalLM", _glm, lambda o: {"attention_bias": o["qkv_bias"]}, partial=0.5, fused=GATE_UP),
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
    "gpt_oss": Family(
        "GptOssForCausalLM",
        _gpt_oss,
        _gpt_oss_keys,
        150000.0,
        rope=GPT_OSS_ROPE,
        stacked=STACKED_EXPERTS,
        in_turn=True,
    ),
}
COMPOSITES = {"gemma3": {"vocab_size": 262208, "num_attention_heads": 8}, "mistral3": {}}
"""``model_type`` of models that have one of these as their ``text_config``, with its defaults there"""


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
