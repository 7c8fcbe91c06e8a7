"""Hugging Face model directories: ``config.json`` and safetensors files, read and written without transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import readable_as_usual
from .modules.llm_config import DecoderLMConfig

__all__ = ["config_from_hf", "config_to_hf", "load_weights", "read_config", "save"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NATIVE = "natten_layers"
"""``model_type`` of models that transformers has no class for"""

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
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# What a key must be for the model to compute what its file means; a missing key is fine.
ONLY = {
    "attention_dropout": (None, 0.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
}


# ---- configs -------------------------------------------------------------------------------------------------------


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


FAMILIES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def config_from_hf(raw: Mapping[str, Any]) -> DecoderLMConfig:
    """The options that a ``config.json`` asks for.

    Both of transformers' ways to write RoPE are read, ``rope_parameters`` and ``rope_theta`` with ``rope_scaling``.
    Missing keys have the defaults of the family's class in transformers 5.

    Raises:
        ValueError: an unknown ``model_type``, a missing key, or an option that is not implemented, with its key.
    """
    family = raw.get("model_type")
    if family == NATIVE:
        fields = {field.name for field in dataclasses.fields(DecoderLMConfig)}
        if unknown := raw.keys() - fields - {"model_type", "dtype"}:
            raise ValueError(f"the config has unknown keys {sorted(unknown)}")
        return DecoderLMConfig(**{name: value for name, value in raw.items() if name in fields})
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not implemented; known are {[*FAMILIES, NATIVE]}")
    for key, allowed in ONLY.items():
        if raw.get(key) not in allowed:
            raise ValueError(f"config key {key}={raw[key]!r} is not implemented; it must be one of {allowed}")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if raw.get(key) is None]:
        raise ValueError(f"the config has no {', '.join(missing)}")
    # Each family's class in transformers reads one of the two keys.
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
    options |= FAMILIES[family](raw)
    rope, windowed = _ropes(raw, options["max_positions"], family)
    return DecoderLMConfig(**options, rope=rope, windowed_rope=None if windowed == rope else windowed)


def _windows(raw: Mapping[str, Any], is_windowed: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Per layer: what ``layer_types`` says, or else the family's rule."""
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
    """RoPE of full and of windowed layers."""
    gemma = family == "gemma3_text"
    theta = raw.get("rope_theta") or (1000000.0 if gemma else 10000.0)
    given = raw.get("rope_parameters") or {}
    if "full_attention" in given or "sliding_attention" in given:
        full, windowed = given.get("full_attention") or {}, given.get("sliding_attention") or {}
    else:
        full = raw.get("rope_scaling") or given
        windowed = {} if gemma else full
    windowed_theta = (raw.get("rope_local_base_freq") or 10000.0) if gemma else theta
    return _rope(full, theta, raw, max_positions), _rope(windowed, windowed_theta, raw, max_positions)


def _rope(given: Mapping[str, Any], theta: float, raw: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_KEYS:
        raise ValueError(f"config key rope_scaling: rope_type {kind!r} is not implemented; known are {list(ROPE_KEYS)}")
    if given.get("partial_rotary_factor") not in ONLY["partial_rotary_factor"]:
        raise ValueError(f"config key partial_rotary_factor={given['partial_rotary_factor']} is not implemented")
    rope = {"rope_type": kind, "rope_theta": given.get("rope_theta") or theta}
    rope |= {key: given[key] for key in ROPE_KEYS[kind] if given.get(key) is not None}
    if "original_max_position_embeddings" in ROPE_KEYS[kind]:
        original = raw.get("original_max_position_embeddings") or max_positions
        rope.setdefault("original_max_position_embeddings", original)
    if kind == "yarn":
        rope.setdefault("factor", max_positions / rope["original_max_position_embeddings"])
    elif missing := [key for key in ROPE_KEYS[kind] if key not in rope]:
        raise ValueError(f"config key rope_scaling of rope_type {kind!r} has no {', '.join(missing)}")
    return rope


def config_to_hf(config: DecoderLMConfig) -> dict[str, Any]:
    """The ``config.json`` of the transformers family that computes the same, or of ``model_type`` "natten_layers"."""
    for family in FAMILIES:
        raw = _family_config(config, family)
        try:
            if config_from_hf(raw) == config:
                return raw
        except ValueError:
            continue
    return {"model_type": NATIVE, **dataclasses.asdict(config)}


def _family_config(config: DecoderLMConfig, family: str) -> dict[str, Any]:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    window = next((window for window in config.windows if window is not None), None)
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "rope_parameters": dict(config.rope),
    }
    if family == "gemma3_text":
        scale = config.attention_scale
        windowed = dict(config.windowed_rope or config.rope)
        raw |= {
            "hidden_activation": activation,
            "query_pre_attn_scalar": config.head_dim if scale is None else round(scale**-2),
            "rope_parameters": {"full_attention": dict(config.rope), "sliding_attention": windowed},
        }
    else:
        raw["hidden_act"] = activation
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if family in ("llama", "qwen3", "gemma3_text"):
        raw["attention_bias"] = config.out_bias
    if family != "llama":
        raw["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = window is not None
    if family in ("qwen2", "qwen3", "gemma3_text"):
        raw["layer_types"] = kinds
    return raw


def read_config(directory: str | os.PathLike[str]) -> tuple[DecoderLMConfig, torch.dtype | None]:
    """The options in ``directory/config.json`` and the dtype that it names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON object, or what :func:`config_from_hf` refuses; the message names the file.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a directory with config.json and safetensors files")
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict):
            raise ValueError("expected a JSON object")
        dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")), None)
        return config_from_hf(raw), dtype if isinstance(dtype, torch.dtype) else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


# ---- weights -------------------------------------------------------------------------------------------------------


def load_weights(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put a directory's tensors in the place of ``model``'s, which may lie on the meta device.

    Names and shapes of all files are checked before the first tensor is read, and each is read once, to its device and
    dtype. On the CPU, tensors that need no conversion stay mapped to the file.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a file that is no safetensors file, or names and shapes that are not exactly the model's.
    """
    expected = model.state_dict()
    with contextlib.ExitStack() as stack:
        files = [(path, stack.enter_context(_open(path))) for path in _weight_files(Path(directory))]
        _check_tensors(expected, files, directory)
        for _, file in files:
            tensors = {name: file.get_tensor(name).to(device, dtype) for name in file.keys() if name in expected}  # noqa: SIM118
            model.load_state_dict(tensors, strict=False, assign=True)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{directory} holds neither {WEIGHTS} nor {INDEX}; other formats are not read")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error!r}") from error
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{directory} lacks {len(missing)} of the {len(names)} shards in {INDEX}: {missing}")
    return [directory / name for name in names]


def _check_tensors(expected: Mapping[str, Tensor], files: list[tuple[Path, Any]], directory: object) -> None:
    found = {name: tuple(file.get_slice(name).get_shape()) for _, file in files for name in file.keys()}  # noqa: SIM118
    # A tied projection may be stored all the same, and old Llama files hold RoPE's frequencies.
    extra = [
        name
        for name in found.keys() - expected.keys()
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
    ]
    wrong = [
        f"{name} has shape {shape}, the model's is {tuple(expected[name].shape)}"
        for name, shape in found.items()
        if name in expected and shape != tuple(expected[name].shape)
    ]
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is not in the model" for name in sorted(extra)] + wrong
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"the weights in {directory} do not fit its config: {'; '.join(problems[:8])}{more}")


def save(
    config: DecoderLMConfig,
    weights: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write ``config.json`` and safetensors files, sharded if larger than ``max_shard_bytes``.

    Everything is written beside the final names first, so that a failure (a full disk) leaves what was there. Takes the
    place of other weight files of these names in the directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        size = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.detach().contiguous()
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    texts = {CONFIG: json.dumps({**config_to_hf(config), "dtype": dtype}, indent=2) + "\n"}
    if len(shards) > 1:
        size = sum(t.nbytes for t in weights.values())
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        texts[INDEX] = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n"
    pending = {directory / name: directory / f".{name}.partial" for name in [*names, *texts]}
    try:
        for name, shard in zip(names, shards, strict=True):
            try:
                with readable_as_usual(pending[directory / name]):
                    save_file(shard, pending[directory / name], metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, among others
                raise OSError(f"cannot write {directory / name}: {error}") from error
        for name, text in texts.items():
            pending[directory / name].write_text(text)
        for final, partial in pending.items():
            os.replace(partial, final)
    except BaseException:
        for partial in pending.values():
            partial.unlink(missing_ok=True)
        raise
    for stale in {*directory.glob("model*.safetensors"), directory / INDEX} - pending.keys():
        stale.unlink(missing_ok=True)
