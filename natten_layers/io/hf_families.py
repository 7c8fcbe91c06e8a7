"""What sets the families of language models on the Hugging Face hub apart: one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..wording import shorten
from . import hf_readers as read
from . import hf_writers as write

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
    alike: bool = False
    """whether the class gives all layers one window, whatever ``layer_types`` says"""
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
        "LlamaForCausalLM",
        read.llama,
        lambda o: {**write.attention_bias(o), "mlp_bias": o["mlp_bias"]},
        refuses_odd_sizes=True,
        alike=True,
    ),
    "mistral": Family("MistralForCausalLM", read.mistral, write.sliding_window),
    "mixtral": Family(
        "MixtralForCausalLM",
        read.mixtral,
        lambda o: {**write.sliding_window(o), **write.chosen_experts(o), "num_local_experts": o["num_experts"]},
        1000000.0,
        names=MIXTRAL_NAMES,
        alike=True,
    ),
    "qwen2": Family("Qwen2ForCausalLM", read.qwen2, write.qwen_layer_types),
    "qwen3": Family("Qwen3ForCausalLM", read.qwen3, lambda o: {**write.attention_bias(o), **write.qwen_layer_types(o)}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", read.qwen3_moe, write.qwen3_moe, names={"router": "gate"}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        read.gemma2,
        write.gemma,
        refuses_odd_sizes=True,
        caps=SOFTCAPS,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        read.gemma3,
        lambda o: {**write.gemma(o), **write.nested_ropes(o)},
        1000000.0,
        scales_windows=False,
        windowed_theta=10000.0,
        refuses_odd_sizes=True,
        caps=("final_logit_softcapping",),
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
    ),
    "phi3": Family("Phi3ForCausalLM", read.phi3, write.phi3, partial=1.0, fused={**QKV, **GATE_UP}, alike=True),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        read.smollm3,
        lambda o: {
            **write.attention_bias(o),
            **write.qwen_layer_types(o),
            "mlp_bias": o["mlp_bias"],
            "no_rope_layers": [*map(int, write.of_layers(o, "rope_layers"))],
        },
        2000000.0,
    ),
    "olmo2": Family("Olmo2ForCausalLM", read.olmo2, write.attention_bias, alike=True),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        read.olmo3,
        lambda o: {**write.attention_bias(o), **write.layer_types(o), **write.nested_ropes(o)},
        500000.0,
        scales_windows=False,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        read.olmoe,
        lambda o: {**write.attention_bias(o), **write.chosen_experts(o), "num_experts": o["num_experts"]},
        names={"router": "gate"},
        alike=True,
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM", read.ministral3, write.sliding_window, 1000000.0, rope=MINISTRAL3_ROPE, alike=True
    ),
    "granite": Family("GraniteForCausalLM", read.granite, write.granite, alike=True),
    "granite_swa": Family("GraniteSWAForCausalLM", read.granite_swa, write.granite_swa),
    "granitemoe_swa": Family(
        "GraniteMoeSWAForCausalLM",
        read.granitemoe_swa,
        write.granitemoe_swa,
        stacked=STACKED_EXPERTS,
        names={"mlp": "block_sparse_moe"},
    ),
    "exaone4": Family("Exaone4ForCausalLM", read.exaone4, write.layer_types),
    "glm": Family(
        "GlmForCausalLM", read.glm, lambda o: {"attention_bias": o["qkv_bias"]}, partial=0.5, fused=GATE_UP, alike=True
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        read.glm4,
        lambda o: {"attention_bias": o["qkv_bias"]},
        partial=0.5,
        fused=GATE_UP,
        names=GLM_NORMS,
        alike=True,
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        read.cohere2,
        lambda o: {
            **write.attention_bias(o),
            **write.layer_types(o),
            "layer_norm_eps": float(o["norm_eps"]),
            "logit_scale": o["logit_scale"],
        },
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        read.gpt_oss,
        write.gpt_oss,
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
