"""Configuration of HDiT, in Python and in k-diffusion's JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["HDiTConfig", "LevelConfig"]

MODEL_TYPE = "image_transformer_v2"
ATTENTION_TYPES = ("neighborhood", "global", "shifted-window", "none")

# Keys of an entry of "self_attns". The first group is k-diffusion's; the second this library's, written only where an
# option departs from its default, so that k-diffusion can run every model that it could have made.
SHARED_KEYS = ("d_head", "kernel_size", "window_size")
OWN_KEYS = ("num_kv_heads", "num_registers", "sink", "dilation")
KEYS_OF_TYPE = {
    "neighborhood": ("d_head", "kernel_size"),
    "global": ("d_head",),
    "shifted-window": ("d_head", "window_size"),
    "none": (),
}


@dataclass(frozen=True)
class LevelConfig:
    """One level of the hourglass. The outer levels have ``depth`` layers on the way down and as many on the way up."""

    depth: int
    width: int
    attention: Literal["neighborhood", "global", "shifted-window", "none"] = "neighborhood"
    d_ff: int | None = None
    """hidden length of the feed-forward layers, default ``3 * width``"""
    d_head: int = 64
    kernel_size: int = 7
    """of neighborhood attention, in tokens"""
    window_size: int | None = None
    """of shifted-window attention, in tokens"""
    dropout: float = 0.0
    num_kv_heads: int | None = None
    """heads of keys and values, a divisor of ``width // d_head``, which is the default"""
    num_registers: int = 0
    """register tokens that each layer adds to every token's keys"""
    sink: Literal["zero", "learned"] | None = None
    dilation: int = 1
    """of neighborhood attention"""

    def __post_init__(self) -> None:
        _check_counts(self, {"depth": 0, "width": 1, "d_head": 1, "kernel_size": 1, "num_registers": 0, "dilation": 1})
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 3 * self.width)
        _check_counts(self, {"d_ff": 1})
        _check_rate(self, "dropout")
        if self.attention not in ATTENTION_TYPES:
            known = ", ".join(f'"{name}"' for name in ATTENTION_TYPES)
            raise ValueError(f"unknown attention type {self.attention!r}; known are {known}")
        if self.attention != "none" and self.width % self.d_head:
            raise ValueError(f"width {self.width} is not a multiple of d_head {self.d_head}")
        if self.attention == "shifted-window":
            if self.window_size is None:
                raise ValueError("shifted-window attention needs window_size")
            _check_counts(self, {"window_size": 1})
        if self.attention != "neighborhood" and self.dilation != 1:
            raise ValueError(f"dilation {self.dilation} applies to neighborhood attention, not to {self.attention}")

    @property
    def num_heads(self) -> int:
        return self.width // self.d_head

    def attention_to_json(self) -> dict[str, Any]:
        """The entry of "self_attns"."""
        entry: dict[str, Any] = {"type": self.attention}
        entry |= {key: getattr(self, key) for key in KEYS_OF_TYPE[self.attention]}
        if self.attention != "none":
            changed = (key for key in OWN_KEYS if getattr(self, key) != getattr(type(self), key))
            entry |= {key: getattr(self, key) for key in changed}
        return entry


@dataclass(frozen=True)
class HDiTConfig:
    """Everything that :class:`HDiT` and its sampler need to know.

    ``HDiTConfig(levels=(LevelConfig(2, 128), LevelConfig(2, 256, "global")))`` is a small model. The last level is the
    middle of the hourglass; every other one halves height and width.

    Raises:
        ValueError: no level, or a level that contradicts itself.
    """

    levels: Sequence[LevelConfig]
    input_channels: int = 3
    patch_size: tuple[int, int] = (4, 4)
    """pixels of a token of the first level, (height, width)"""
    num_classes: int = 0
    """without the unconditional one, which has the index ``num_classes``; 0 is no class conditioning"""
    mapping_width: int = 256
    mapping_depth: int = 2
    mapping_d_ff: int | None = None
    """default ``3 * mapping_width``"""
    mapping_cond_dim: int = 0
    """length of ``mapping_cond``; 0 is none"""
    mapping_dropout_rate: float = 0.0
    input_size: tuple[int, int] = (256, 256)
    """(height, width) that the model is trained at; it runs at others"""
    sigma_data: float = 1.0
    """standard deviation of the data, for :class:`Denoiser`"""
    sigma_min: float = 1e-2
    sigma_max: float = 80.0
    other: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """the rest of the JSON form (optimizer, loss, ...), which no model reads; kept to be saved again"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels:
            raise ValueError("levels is empty; an HDiT has at least one level")
        if self.mapping_d_ff is None:
            object.__setattr__(self, "mapping_d_ff", 3 * self.mapping_width)
        for name in ("patch_size", "input_size"):
            size = getattr(self, name)
            if len(size) != 2 or any(type(length) is not int or length < 1 for length in size):
                raise ValueError(f"{name} must be two positive ints, (height, width), got {size}")
        for name in ("sigma_data", "sigma_min", "sigma_max"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < math.inf or (value == 0 and name != "sigma_min"):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        _check_rate(self, "mapping_dropout_rate")
        sizes = {"input_channels": 1, "mapping_width": 2, "mapping_d_ff": 1}
        _check_counts(self, sizes | {"num_classes": 0, "mapping_depth": 0, "mapping_cond_dim": 0})

    @classmethod
    def from_json(cls, source: Mapping[str, Any] | str | Path) -> HDiTConfig:
        """Read k-diffusion's JSON form, a dictionary or a file, and fill in k-diffusion's defaults.

        Entries of "self_attns" take this library's options too: "num_kv_heads", "num_registers", "sink", "dilation".
        "has_variance", "skip_stages" and "augment_wrapper" are kept and change nothing: k-diffusion's models of this
        type do not have those parts either.

        Raises:
            ValueError: another model type, a missing or unknown key, lists of different lengths; the message names the
                key.
        """
        if not isinstance(source, Mapping):
            path = Path(source)
            try:
                return cls.from_json(json.loads(path.read_text()))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
        model = config.get("model")
        if not isinstance(model, dict) or model.pop("type", None) != MODEL_TYPE:
            found = source["model"].get("type") if isinstance(source.get("model"), Mapping) else None
            raise ValueError(f'config["model"]["type"] must be "{MODEL_TYPE}", got {found!r}')
        known: dict[str, Any] = {"levels": _levels_from_json(model)}
        for key in ("patch_size", "input_size"):
            size = _pop(model, key)
            known[key] = tuple(size) if isinstance(size, list | tuple) else (size, size)
        known["input_channels"] = _pop(model, "input_channels")
        known["mapping_d_ff"] = model.pop("mapping_d_ff", None) or None
        scalars = ("mapping_width", "mapping_depth", "mapping_cond_dim", "mapping_dropout_rate")
        for key in (*scalars, "sigma_data", "sigma_min", "sigma_max"):
            if key in model:
                known[key] = model.pop(key)
        if not isinstance(config.setdefault("dataset", {}), dict):
            raise ValueError(f'config["dataset"] must be an object, got {config["dataset"]!r}')
        known["num_classes"] = config["dataset"].pop("num_classes", 0)
        return cls(**known, other={key: value for key, value in config.items() if value != {}})

    def to_json(self) -> dict[str, Any]:
        """k-diffusion's JSON form, defaults spelled out."""
        other = {key: dict(value) if isinstance(value, Mapping) else value for key, value in self.other.items()}
        model = {
            "type": MODEL_TYPE,
            "input_channels": self.input_channels,
            "input_size": list(self.input_size),
            "patch_size": list(self.patch_size),
            "depths": [level.depth for level in self.levels],
            "widths": [level.width for level in self.levels],
            "d_ffs": [level.d_ff for level in self.levels],
            "self_attns": [level.attention_to_json() for level in self.levels],
            "dropout_rate": [level.dropout for level in self.levels],
            "mapping_width": self.mapping_width,
            "mapping_depth": self.mapping_depth,
            "mapping_d_ff": self.mapping_d_ff,
            "mapping_cond_dim": self.mapping_cond_dim,
            "mapping_dropout_rate": self.mapping_dropout_rate,
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
        }
        dataset = {"num_classes": self.num_classes}
        return other | {"model": other.get("model", {}) | model, "dataset": other.get("dataset", {}) | dataset}


def _check_counts(config: LevelConfig | HDiTConfig, least: Mapping[str, int]) -> None:
    for name, minimum in least.items():
        value = getattr(config, name)
        if type(value) is not int or value < minimum:
            raise ValueError(f"{name} must be an int of at least {minimum}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rate(config: LevelConfig | HDiTConfig, name: str) -> None:
    if not _is_number(value := getattr(config, name)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def _pop(model: dict[str, Any], key: str) -> Any:
    if model.get(key) is None:
        raise ValueError(f'config["model"] lacks the key "{key}"')
    return model.pop(key)


def _check_list(key: str, value: object) -> None:
    if not isinstance(value, list | tuple):
        raise ValueError(f'config["model"]["{key}"] must be a list with an entry for each level, got {value!r}')


def _levels_from_json(model: dict[str, Any]) -> list[LevelConfig]:
    """Take the lists with one entry per level out of ``model``."""
    widths, depths = _pop(model, "widths"), _pop(model, "depths")
    _check_list("widths", widths)
    if not widths:
        raise ValueError('config["model"]["widths"] is empty; an HDiT has at least one level')
    count = len(widths)
    lists = {
        "depths": depths,
        "d_ffs": model.pop("d_ffs", None) or [None] * count,
        "self_attns": model.pop("self_attns", None) or [{"type": "neighborhood"}] * (count - 1) + [{"type": "global"}],
        "dropout_rate": model.pop("dropout_rate", None) or 0.0,
    }
    if isinstance(lists["dropout_rate"], int | float):
        lists["dropout_rate"] = [lists["dropout_rate"]] * count
    for key, values in lists.items():
        _check_list(key, values)
        if len(values) != count:
            raise ValueError(f'config["model"]["{key}"] has {len(values)} entries, but "widths" has {count}')
    levels = []
    for index, (width, depth, d_ff, entry, dropout) in enumerate(zip(widths, *lists.values(), strict=True)):
        if not isinstance(entry, Mapping):
            raise ValueError(f'config["model"]["self_attns"][{index}] must be an object with a "type", got {entry!r}')
        options = dict(entry)
        kind = options.pop("type", None)
        unknown = options.keys() - {*SHARED_KEYS, *OWN_KEYS}
        try:
            if unknown:
                raise ValueError(f"unknown keys {sorted(unknown)}; known are {[*SHARED_KEYS, *OWN_KEYS]}")
            levels.append(LevelConfig(depth, width, kind, d_ff=d_ff, dropout=dropout, **options))
        except ValueError as error:
            raise ValueError(f'config["model"]["self_attns"][{index}]: {error}') from error
    return levels
