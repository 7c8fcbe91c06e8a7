"""``config.json`` of Hugging Face models, read and written without transformers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from ..wording import shorten
from .files import naming, read_json
from .hf_families import ACTIVATIONS, COMPOSITES, FAMILIES, SOFTCAPS, Family, text_config
from .hf_rope import rope_options
from .schema import Count, Layers, Natural, NotNegative, Positive, build, check_mapping

__all__ = ["CONFIG", "config_from_hf", "config_to_hf", "read_config"]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C")

CONFIG = "config.json"
NATIVE = "natten_layers"
"""The ``model_type`` of models for which transformers has no class."""


# What a key must be for the model to compute what its file means; a missing key is fine.
ONLY = {
    "attention_dropout": (None, 0.0),
    "clip_qkv": (None,),
    "is_causal": (None, True),
    "resid_pdrop": (None, 0.0),
    "router_jitter_noise": (None, 0.0),
    "shared_intermediate_size": (None, 0),
    "use_bidirectional_attention": (None, False),
}


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
    attn_logit_softcapping: Positive | None
    final_logit_softcapping: Positive | None
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
    quantization_config: Mapping[str, Any] | None
    rope_parameters: Mapping[str, Any] | None
    layer_rope_theta: Sequence[NotNegative] | None
    num_experts: Count
    num_local_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    decoder_sparse_step: Count
    mlp_only_layers: Sequence[int] | None
    norm_topk_prob: bool
    swiglu_alpha: Positive
    swiglu_limit: Positive
    bos_token_id: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None


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
    _refuse(raw, FAMILIES[family])
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if raw.get(key) is None]:
        raise ValueError(f"the config has no {', '.join(missing)}")
    key = FAMILIES[family].activation_key
    activation = raw.get(key) or FAMILIES[family].activation
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
    _refuse_layer_types(raw, FAMILIES[family], options["windows"])
    rope, windowed = rope_options(raw, options["max_positions"], options["windows"])
    stretch = max(each["factor"] if each["rope_type"] == "dynamic" else 1.0 for each in (rope, windowed))
    options["max_positions"] = int(options["max_positions"] * max(stretch, 1.0))
    return {**options, "rope": rope, "windowed_rope": None if windowed == rope else windowed}


def _refuse_layer_types(raw: Mapping[str, Any], family: Family, windows: tuple[int | None, ...]) -> None:
    """Raise where ``layer_types`` gives other windows than the class in transformers, which does not look at it."""
    if family.alike and family.read({**raw, "layer_types": None})["windows"] != windows:
        raise ValueError(
            f"config key layer_types={shorten(raw['layer_types'])} is not implemented for {raw['model_type']}, whose "
            "layers are all alike in transformers, which ignores the key; remove it to get what transformers computes"
        )


def _refuse(raw: Mapping[str, Any], family: Family) -> None:
    """Raise for options that change what a model computes and that are not implemented."""
    uncapped = {key: (None,) for key in SOFTCAPS if key not in family.caps}
    for key, allowed in {**ONLY, **uncapped}.items():
        if raw.get(key) not in allowed:
            raise ValueError(f"config key {key}={shorten(raw[key])} is not implemented; it must be one of {allowed}")
    quantization = raw.get("quantization_config")
    if quantization is not None and not (family.stacked and quantization.get("quant_method") == "mxfp4"):
        raise ValueError(f"config key quantization_config={shorten(quantization)} is not implemented")


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


def _max_position_embeddings(options: Mapping[str, Any]) -> int:
    """The length of the longest text, or with dynamic RoPE of the longest one that is not stretched."""
    ropes = (options["rope"], options["windowed_rope"] or {})
    lengths = [rope["original_max_position_embeddings"] for rope in ropes if rope.get("rope_type") == "dynamic"]
    return min(lengths, default=options["max_positions"])


def _family_config(options: Mapping[str, Any], family: str) -> dict[str, Any]:
    # gpt-oss, which has one of its own, says "silu".
    activation = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == options["activation"]), "silu")
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
        "max_position_embeddings": _max_position_embeddings(options),
        "rms_norm_eps": float(options["norm_eps"]),  # transformers refuses an int
        "tie_word_embeddings": options["tie_embeddings"],
        "initializer_range": float(options["initializer_range"]),
        "bos_token_id": options["bos_token_id"],
        "eos_token_id": options["eos_token_id"],
        "pad_token_id": options["pad_token_id"],
        "rope_parameters": dict(options["rope"]),
    }
    raw[FAMILIES[family].activation_key] = activation
    return {**raw, **FAMILIES[family].write(options)}


def _way_out(directory: Path) -> str:
    """Where the files of a model may be that are not in ``directory``."""
    if (directory / "model" / CONFIG).is_file():  # a run of natten-layers-train-lm
        return f": {directory / 'model'} has them"
    if directory.is_file():
        has_config = (directory.parent / CONFIG).is_file()
        return f": give {directory.parent}" if has_config else f", and {directory.name} is a file"
    if directory.parts[:1] == ("~",):  # as from_pretrained("~/models/..."), which no shell sees
        return f"; ~ is not expanded here: give {os.path.expanduser(directory)}"
    if not directory.is_dir():
        return "; download a model of the Hugging Face hub first: hf download OWNER/NAME --local-dir DIRECTORY"
    return ""


def read_config(directory: str | os.PathLike[str], kind: type[C]) -> C:
    """Read ``directory/config.json`` as :func:`config_from_hf` does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a JSON object, or :func:`config_from_hf` refuses it; the message names the file.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a directory with config.json and weights{_way_out(Path(directory))}"
        )
    raw = read_json(path)
    with naming(path):
        return config_from_hf(raw, kind)
