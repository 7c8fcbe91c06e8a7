"""Configuration of HDiT, in Python and in k-diffusion's JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from ..io.files import naming, read_json
from ..io.schema import (
    MOST_LAYERS,
    Between,
    Count,
    Decay,
    Natural,
    NotNegative,
    Positive,
    Rate,
    check_keys,
    check_mapping,
    check_types,
)
from ..wording import shorten

__all__ = ["HDiTConfig", "LevelConfig"]

MODEL_TYPE = "image_transformer_v2"
Objective = Literal["diffusion", "meanflow"]
Axis = Literal["height", "width"]
IMAGE_AXES: tuple[Axis, Axis] = ("height", "width")
AttentionType = Literal["neighborhood", "global", "shifted-window", "none"]
MappingWidth = Annotated[int, Between(2, 2**31 - 1)]
Depth = Annotated[int, Between(0, MOST_LAYERS)]

# Keys of an entry of "self_attns": first k-diffusion's, then this library's own. The latter are written only where an
# option differs from its default, so that k-diffusion can read every config without such options.
SHARED_KEYS = ("d_head", "kernel_size", "window_size")
OWN_KEYS = ("num_kv_heads", "num_registers", "sink", "dilation", "is_periodic")
KEYS_OF_TYPE = {
    "neighborhood": ("d_head", "kernel_size"),
    "global": ("d_head",),
    "shifted-window": ("d_head", "window_size"),
    "none": (),
}


# The JSON form: every key that k-diffusion reads for models of this type, and those of this library's examples. Any
# other key is misspelt or of another type of model; it is an error, since it would be ignored silently otherwise.


class _Density(TypedDict, total=False):
    type: str
    mean: float
    loc: float
    std: Positive
    scale: Positive
    std_1: Positive
    std_2: Positive
    scale_1: Positive
    scale_2: Positive
    min_value: NotNegative
    max_value: Positive
    image_d: Positive
    noise_d_low: Positive
    noise_d_high: Positive


class _Model(TypedDict, total=False):
    type: str
    input_channels: Count
    input_size: Count | tuple[Count, Count]
    patch_size: Count | tuple[Count, Count]
    widths: Sequence[Count]
    depths: Sequence[Depth]
    d_ffs: Sequence[Count | None] | None
    self_attns: Sequence[Mapping[str, Any]] | None
    dropout_rate: Rate | Sequence[Rate] | None
    mapping_width: MappingWidth
    mapping_depth: Depth
    mapping_d_ff: Natural | None
    mapping_cond_dim: Natural
    mapping_dropout_rate: Rate
    sigma_data: Positive
    sigma_min: NotNegative
    sigma_max: Positive
    sigma_sample_density: _Density
    loss_config: str
    loss_weighting: str
    loss_scales: Count
    objective: str
    augment_wrapper: bool
    augment_prob: Rate
    has_variance: bool
    skip_stages: Natural


class _Dataset(TypedDict, total=False):
    type: str
    location: str
    image_key: str | int
    class_key: str | int
    num_classes: Natural
    cond_dropout_rate: Rate
    get_dataset: str
    config: Any
    files: Mapping[str, str]
    short_side: Count
    class_names: Sequence[str]


class _Optimizer(TypedDict, total=False):
    type: str
    lr: Positive
    betas: tuple[Decay, Decay]
    eps: Positive  # with 0, parameters without a gradient, as many of a new model are, become NaN
    weight_decay: NotNegative
    momentum: NotNegative
    nesterov: bool


class _LearningRate(TypedDict, total=False):
    type: str
    warmup: Decay
    inv_gamma: Positive
    power: float
    num_steps: Positive
    decay: Positive


class _MeanFlow(TypedDict, total=False):
    averaged: Rate
    loc: float
    scale: Positive
    power: Rate


class _Ema(TypedDict, total=False):
    type: str
    power: NotNegative
    max_value: Rate


SECTIONS: dict[str, type | None] = {
    "model": _Model,
    "dataset": _Dataset,
    "optimizer": _Optimizer,
    "lr_sched": _LearningRate,
    "ema_sched": _Ema,
    "meanflow": _MeanFlow,
    "run": None,  # flags of the training script, which checks them itself
}


def _check_sections(config: Mapping[str, Any]) -> None:
    """Raise for unknown keys, and for values of other types than k-diffusion expects."""
    check_keys(config.keys(), SECTIONS.keys(), "the config")
    for name, kind in SECTIONS.items():
        if kind is not None and config.get(name) is not None:
            check_mapping(config[name], kind, f'config["{name}"]')


@dataclass(frozen=True)
class LevelConfig:
    """One level of the hourglass.

    All levels but the last have ``depth`` layers on the way down and as many on the way up; the last has ``depth``.

    Raises:
        ValueError: a value of another type or out of bounds, or options that contradict each other.
    """

    depth: Depth
    width: Count
    attention: AttentionType = "neighborhood"
    d_ff: Count | None = None
    """Hidden length of the feed-forward layers, default ``3 * width``."""
    d_head: Count = 64
    kernel_size: Count = 7
    """Window of neighborhood attention on each axis, in tokens."""
    window_size: Count | None = None
    """Side of the windows of shifted-window attention, in tokens."""
    dropout: Rate = 0.0
    num_kv_heads: Count | None = None
    """Number of key and value heads, a divisor of the ``width // d_head`` query heads, which is the default."""
    num_registers: Natural = 0
    """Number of register tokens that each layer adds to every token's keys."""
    sink: Literal["zero", "learned"] | None = None
    dilation: Count = 1
    """Dilation of neighborhood attention on both axes."""
    is_periodic: bool | tuple[bool, bool] = False
    """Whether both axes, or height and width, are rings, such as longitudes: windows of neighborhood attention wrap
    around them, and positions come back to the same place, in global attention too. If all levels have a ring, and no
    register tokens, which have no position, an image that is rolled by whole tokens of the last level gives the rolled
    result."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 3 * self.width)
        if self.attention != "none" and self.width % self.d_head:
            raise ValueError(f"width {self.width} is not a multiple of d_head {self.d_head}")
        if self.attention == "shifted-window" and self.window_size is None:
            raise ValueError("shifted-window attention needs window_size")
        if self.attention != "neighborhood" and self.dilation != 1:
            raise ValueError(f"dilation {self.dilation} applies to neighborhood attention, not to {self.attention}")
        if self.attention not in ("neighborhood", "global") and any(map(self.wraps, IMAGE_AXES)):
            raise ValueError(
                f"is_periodic {self.is_periodic} applies to neighborhood and global attention, not to {self.attention}"
            )

    def wraps(self, axis: Axis) -> bool:
        """Whether an axis is a ring."""
        flags = self.is_periodic
        return flags if isinstance(flags, bool) else flags[IMAGE_AXES.index(axis)]

    @property
    def num_heads(self) -> int:
        return self.width // self.d_head

    def attention_to_json(self) -> dict[str, Any]:
        """This level's entry of "self_attns" in the JSON form."""
        entry: dict[str, Any] = {"type": self.attention}
        entry |= {key: getattr(self, key) for key in KEYS_OF_TYPE[self.attention]}
        if self.attention != "none":
            changed = (key for key in OWN_KEYS if getattr(self, key) != getattr(type(self), key))
            entry |= {key: getattr(self, key) for key in changed}
        if isinstance(self.is_periodic, tuple) and "is_periodic" in entry:
            entry["is_periodic"] = list(self.is_periodic)
        return entry


@dataclass(frozen=True)
class HDiTConfig:
    """Sizes and options of an :class:`HDiT`, and the noise levels for its sampler.

    ``HDiTConfig(levels=(LevelConfig(2, 128), LevelConfig(2, 256, "global")))`` is a small model. The last level is the
    middle of the hourglass; after every other level, height and width are halved.

    Raises:
        ValueError: there is no level, or a value has another type or is out of bounds; the message names the field.
    """

    levels: Sequence[LevelConfig]
    input_channels: Count = 3
    patch_size: tuple[Count, Count] = (4, 4)
    """Pixels of a token of the first level, (height, width)."""
    num_classes: Natural = 0
    """Number of classes; 0 means no class conditioning. The index ``num_classes`` stands for "unconditional"."""
    mapping_width: MappingWidth = 256
    mapping_depth: Depth = 2
    mapping_d_ff: Count | None = None
    """Hidden length of the mapping network's feed-forward layers, default ``3 * mapping_width``."""
    mapping_cond_dim: Natural = 0
    """Length of ``mapping_cond``; 0 means that the model takes none."""
    mapping_dropout_rate: Rate = 0.0
    input_size: tuple[Count, Count] = (256, 256)
    """Size of the training images, (height, width). The model runs at other sizes too."""
    sigma_data: Positive = 1.0
    """Standard deviation of the data, for :class:`Denoiser`."""
    sigma_min: NotNegative = 1e-2
    sigma_max: Positive = 80.0
    objective: Objective = "diffusion"
    """What the model learns: "diffusion" is for :class:`Denoiser`, "meanflow" for :class:`MeanFlow`, whose models have
    an embedding more, of the time that a velocity is averaged over."""
    other: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """Other parts of the JSON form (optimizer, loss, ...). The model ignores them; :meth:`to_json` writes them back."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.levels:
            raise ValueError("levels is empty; an HDiT has at least one level")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}, but must be less than sigma_max, {self.sigma_max}")
        if self.mapping_d_ff is None:
            object.__setattr__(self, "mapping_d_ff", 3 * self.mapping_width)
        if self.num_layers + len(self.levels) > MOST_LAYERS:
            counts = f"{len(self.levels)} levels and {self.num_layers} layers"
            raise ValueError(f"levels and mapping_depth make {counts}, more than {MOST_LAYERS} together")
        _check_sections(self.other)

    @property
    def num_layers(self) -> int:
        """Number of blocks: those of the outer levels count twice, down and up, and the mapping network's once."""
        *outer, middle = (level.depth for level in self.levels)
        return 2 * sum(outer) + middle + self.mapping_depth

    @classmethod
    def from_json(cls, source: Mapping[str, Any] | str | Path) -> HDiTConfig:
        """Read k-diffusion's JSON form and fill in k-diffusion's defaults.

        Entries of "self_attns" take this library's options too: "num_kv_heads", "num_registers", "sink", "dilation",
        "is_periodic".
        "has_variance", "skip_stages" and "augment_wrapper" are kept but have no effect, as in k-diffusion, whose
        models of this type do not have those parts.

        Args:
            source: the config as a mapping, or the path of a JSON file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another model type, a missing or unknown key, a value of another type, or lists of different
                lengths; the message names the key.
        """
        if not isinstance(source, Mapping):
            path = Path(source)
            config = read_json(path)
            with naming(path):
                return cls.from_json(config)
        config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
        model = config.get("model")
        kind = model.pop("type", None) if isinstance(model, dict) else None
        if not isinstance(model, dict) or kind != MODEL_TYPE:
            raise ValueError(f'config["model"]["type"] must be "{MODEL_TYPE}", got {shorten(kind)}')
        if not isinstance(config.setdefault("dataset", {}), dict):
            raise ValueError(f'config["dataset"] must be an object, got {shorten(config["dataset"])}')
        _check_sections(config)
        known: dict[str, Any] = {"levels": _levels_from_json(model)}
        for key in ("patch_size", "input_size"):
            size = _pop(model, key)
            known[key] = (size, size) if isinstance(size, int) else tuple(size)
        known["input_channels"] = _pop(model, "input_channels")
        known["mapping_d_ff"] = model.pop("mapping_d_ff", None) or None
        scalars = ("mapping_width", "mapping_depth", "mapping_cond_dim", "mapping_dropout_rate")
        for key in (*scalars, "sigma_data", "sigma_min", "sigma_max", "objective"):
            if key in model:
                known[key] = model.pop(key)
        known["num_classes"] = config["dataset"].pop("num_classes", 0)
        with naming('config["model"]'):
            return cls(**known, other={key: value for key, value in config.items() if value != {}})

    def to_json(self) -> dict[str, Any]:
        """k-diffusion's JSON form of this config, with all defaults written out."""
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
        if self.objective != "diffusion":
            model["objective"] = self.objective
        dataset = {"num_classes": self.num_classes}
        return other | {"model": other.get("model", {}) | model, "dataset": other.get("dataset", {}) | dataset}


def axis_grid(axis: Axis, patch: int, levels: Sequence[LevelConfig]) -> tuple[int, int]:
    """What the pixels of an image's axis must be a multiple of to fit all levels, and the least number of them."""
    unit, least = 1, 1
    for index, level in enumerate(levels):
        pixels = patch * 2**index
        window = level.window_size if level.attention == "shifted-window" else None
        unit = math.lcm(unit, pixels * (window or 1))
        if level.attention == "neighborhood":
            unit = math.lcm(unit, pixels * (level.dilation if level.wraps(axis) else 1))
            least = max(least, pixels * level.kernel_size * level.dilation)
    return unit, -(-least // unit) * unit


def check_axis(axis: Axis, size: int, patch: int, levels: Sequence[LevelConfig]) -> None:
    """Raise if an axis of the image does not fit a level; tokens of a level are ``patch * 2**index`` pixels long."""
    for index, level in enumerate(levels):
        pixels = patch * 2**index
        tokens, reach = size // pixels, level.kernel_size * level.dilation
        fault = None
        if size % pixels:
            fault = f"is not a multiple of {pixels}, the pixels of a token of level {index}"
        elif level.attention == "neighborhood" and tokens < reach:
            product = f"kernel_size * dilation = {level.kernel_size} * {level.dilation}"
            fault = f"has {tokens} tokens on level {index}, fewer than {product}"
        elif level.wraps(axis) and tokens % level.dilation:
            fault = f"has {tokens} tokens on level {index}, a ring that dilation {level.dilation} does not divide"
        elif level.attention == "shifted-window" and level.window_size is not None and tokens % level.window_size:
            fault = f"has {tokens} tokens on level {index}, not a multiple of window_size {level.window_size}"
        if fault is not None:
            raise ValueError(f"image {axis} {size} {fault}; use {_nearest_sizes(axis, size, patch, levels)} pixels")


def _nearest_sizes(axis: Axis, size: int, patch: int, levels: Sequence[LevelConfig]) -> str:
    """Describe the lengths nearest to ``size`` that fit all levels, not only the one that raised."""
    unit, least = axis_grid(axis, patch, levels)
    below, above = size // unit * unit, -(-max(size, least) // unit) * unit
    return f"{below} or {above}" if below >= least else f"at least {above}"


def _pop(model: dict[str, Any], key: str) -> Any:
    if model.get(key) is None:
        raise ValueError(f'config["model"] lacks the key "{key}"')
    return model.pop(key)


def _levels_from_json(model: dict[str, Any]) -> list[LevelConfig]:
    """Make the levels from the lists in ``model`` that have one entry per level, and remove these lists from it."""
    widths, depths = _pop(model, "widths"), _pop(model, "depths")
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
        if len(values) != count:
            raise ValueError(f'config["model"]["{key}"] has {len(values)} entries, but "widths" has {count}')
    levels = []
    for index, (width, depth, d_ff, entry, dropout) in enumerate(zip(widths, *lists.values(), strict=True)):
        where = f'config["model"]["self_attns"][{index}]'
        options = dict(entry)
        kind: Any = options.pop("type", None)
        named = str(kind)  # LevelConfig refuses what is no string
        shared = KEYS_OF_TYPE.get(named, SHARED_KEYS)
        check_keys(options.keys(), shared if named == "none" else (*shared, *OWN_KEYS), where)
        with naming(where):
            levels.append(LevelConfig(depth, width, kind, d_ff=d_ff, dropout=dropout, **options))
    return levels
