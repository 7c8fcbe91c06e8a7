"""Hugging Face model directories: ``config.json`` and safetensors files, read and written without transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from .files import naming, read_json, replacing
from .schema import Between, Count, Natural, NotNegative, Positive, build, check_mapping, shorten
from .tensors import Info, SafeTensors, check_fit, open_safetensors, write_safetensors

__all__ = ["Weights", "config_from_hf", "config_to_hf", "open_weights", "read_config", "save"]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C")

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
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What a key must be for the model to compute what its file means; a missing key is fine.
ONLY = {
    "attention_dropout": (None, 0.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (None, True),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
}


class RopeKeys(TypedDict, total=False):
    """What is read of ``rope_scaling``, of ``rope_parameters``, and of an entry of it for one kind of layers."""

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
    partial_rotary_factor: float | None


class Keys(TypedDict, total=False):
    """What is read of a ``config.json``. Other keys are ignored: every version of every tool writes its own there."""

    model_type: str
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Between(1, 2**16)]
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
    sliding_window_pattern: Count | None
    use_sliding_window: bool
    max_window_layers: Natural
    layer_types: Sequence[str] | None
    original_max_position_embeddings: Count | None
    rope_theta: Positive | None
    rope_local_base_freq: Positive | None
    rope_scaling: Mapping[str, Any] | None
    rope_parameters: Mapping[str, Any] | None
    bos_token_id: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None


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


def config_from_hf(raw: Mapping[str, Any], kind: type[C]) -> C:
    """The options that a ``config.json`` asks for, as an instance of ``kind``, a dataclass like DecoderLMConfig.

    Both of transformers' ways to write RoPE are read, ``rope_parameters`` and ``rope_theta`` with ``rope_scaling``.
    Missing keys have the defaults of the family's class in transformers 5. A config of ``model_type`` "natten_layers"
    holds the options themselves; of the other families' keys those that this library does not know are ignored, unless
    they are known to change what is computed.

    Raises:
        ValueError: an unknown ``model_type``, a missing key, a value of another type, or an option that is not
            implemented, with its key.
    """
    if raw.get("model_type") == NATIVE:
        options = {key: value for key, value in raw.items() if key not in ("model_type", "dtype")}
    else:
        options = _options(raw)
    return build(kind, options, "the config")


def _options(raw: Mapping[str, Any]) -> dict[str, Any]:
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"model_type {shorten(family)} is not implemented; known are {[*FAMILIES, NATIVE]}")
    raw = check_mapping(raw, Keys, "config", closed=False)
    for key, allowed in ONLY.items():
        if raw.get(key) not in allowed:
            raise ValueError(f"config key {key}={shorten(raw[key])} is not implemented; it must be one of {allowed}")
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
    return {**options, "rope": rope, "windowed_rope": None if windowed == rope else windowed}


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


def _rope(given: Any, theta: float, raw: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    given = check_mapping(given, RopeKeys, 'config["rope_parameters"]', closed=False)
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


def config_to_hf(config: DataclassInstance) -> dict[str, Any]:
    """The ``config.json`` of the transformers family that computes the same, or of ``model_type`` "natten_layers"."""
    options = dataclasses.asdict(config)
    for family in FAMILIES:
        # These classes of transformers refuse such sizes, though a head_dim of its own makes them no contradiction.
        if family in ("llama", "gemma3_text") and options["hidden_size"] % options["num_heads"]:
            continue
        raw = _family_config(options, family)
        try:
            if config_from_hf(raw, type(config)) == config:
                return raw
        except ValueError:
            continue
    return {"model_type": NATIVE, **options}


def _family_config(options: Mapping[str, Any], family: str) -> dict[str, Any]:
    windows = options["windows"]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    window = next((window for window in windows if window is not None), None)
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == options["activation"])
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
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
    if family == "gemma3_text":
        scale = options["attention_scale"]
        windowed = dict(options["windowed_rope"] or options["rope"])
        raw |= {
            "hidden_activation": activation,
            "query_pre_attn_scalar": options["head_dim"] if scale is None else round(scale**-2),
            "rope_parameters": {"full_attention": dict(options["rope"]), "sliding_attention": windowed},
        }
    else:
        raw["hidden_act"] = activation
    if family == "llama":
        raw["mlp_bias"] = options["mlp_bias"]
    if family in ("llama", "qwen3", "gemma3_text"):
        raw["attention_bias"] = options["out_bias"]
    # transformers' Gemma 3 makes the mask of windows in any case, and has a default where the key is missing.
    if family != "llama" and not (family == "gemma3_text" and window is None):
        raw["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = window is not None
    if family in ("qwen2", "qwen3", "gemma3_text"):
        raw["layer_types"] = kinds
    return raw


def read_config(directory: str | os.PathLike[str], kind: type[C]) -> C:
    """The options in ``directory/config.json``, see :func:`config_from_hf`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON object, or what :func:`config_from_hf` refuses; the message names the file.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a directory with config.json and safetensors files")
    raw = read_json(path)
    with naming(path):
        return config_from_hf(raw, kind)


# ---- weights -------------------------------------------------------------------------------------------------------


class Weights:
    """The open safetensors files of a directory, whose tensors are looked at before they are read.

    Args:
        tied: whether the config says that the output projection is the embedding.
    """

    def __init__(self, directory: Path, files: Sequence[SafeTensors], *, tied: bool) -> None:
        self.directory = directory
        self._files: dict[str, SafeTensors] = {}
        for file in files:
            if twice := sorted(file.infos.keys() & self._files.keys()):
                raise ValueError(
                    f'{directory} holds "{twice[0]}" twice: in {self._files[twice[0]].path} and {file.path}'
                )
            self._files |= dict.fromkeys(file.infos, file)
        self.tied = tied and not self._differ(EMBEDDING, HEAD)
        """whether the output projection is the embedding; not so where the files hold both and they differ"""

    @property
    def infos(self) -> dict[str, Info]:
        return {name: file.infos[name] for name, file in self._files.items()}

    def _differ(self, first: str, second: str) -> bool:
        if first not in self._files or second not in self._files:
            return False
        if self._files[first].infos[first] != self._files[second].infos[second]:
            return True
        return not torch.equal(self._files[first].read(first), self._files[second].read(second))

    def fill(self, model: nn.Module, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Put the tensors in the place of ``model``'s, which may lie on the meta device.

        Names, shapes and dtypes of all files are checked before the first tensor is put in place, and each is read
        once, to its device and dtype. On the CPU, tensors that need no conversion stay mapped to the file.

        Raises:
            ValueError: what :func:`~natten_layers.io.tensors.check_fit` refuses.
        """
        expected = model.state_dict()
        # Some tools keep, of two tied tensors, the projection.
        source = {name: name for name in expected}
        if self.tied and EMBEDDING in expected and EMBEDDING not in self._files and HEAD in self._files:
            source[EMBEDDING] = HEAD
        check_fit(
            {source[name]: tensor for name, tensor in expected.items()},
            self.infos,
            self.directory,
            dtype=dtype,
            parameters={source[name] for name, _ in model.named_parameters()},
            # A tied projection may be stored all the same, and old Llama files hold RoPE's frequencies.
            ignored=lambda name: name == HEAD or name.endswith("rotary_emb.inv_freq"),
        )
        tensors = {name: self._files[stored].read(stored).to(device, dtype) for name, stored in source.items()}
        model.load_state_dict(tensors, assign=True)


@contextmanager
def open_weights(directory: str | os.PathLike[str], *, tied: bool) -> Iterator[Weights]:
    """Open the weights of a directory for as long as the context lasts.

    Args:
        tied: whether the config says that the output projection is the embedding. As in transformers, the files decide:
            a projection of their own that differs from the embedding is used, and one alone is the embedding too.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a file that is no safetensors file, an odd index, or a tensor that is there twice.
    """
    directory = Path(directory)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_safetensors(path)) for path in _weight_files(directory)]
        yield Weights(directory, files, tied=tied)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{directory} holds neither {WEIGHTS} nor {INDEX}; other formats are not read")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f'{index} is no index of safetensors files: "weight_map" is {shorten(shards)}')
    for tensor, name in shards.items():
        # On any system: no folders, no drives, nothing that leads out of the directory.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.,=+ -]*\.safetensors", name):
            raise ValueError(
                f"{index}: the shard of {shorten(tensor)} is {shorten(name)}; expected the name of a .safetensors file "
                "beside the index"
            )
    names = sorted(set(shards.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{directory} lacks {len(missing)} of the {len(names)} shards in {INDEX}: {missing}")
    return [directory / name for name in names]


def save(
    config: DataclassInstance,
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
    with contextlib.ExitStack() as stack:  # whose last file is the first to appear: the weights, and then the texts
        for name, text in texts.items():
            stack.enter_context(replacing(directory / name)).write_text(text)
        for name, shard in zip(names, shards, strict=True):
            temporary = stack.enter_context(replacing(directory / name))
            write_safetensors(shard, temporary, {"format": "pt"}, final=directory / name)
    for stale in {*directory.glob("model*.safetensors"), directory / INDEX} - {
        directory / name for name in [*names, *texts]
    }:
        stale.unlink(missing_ok=True)
