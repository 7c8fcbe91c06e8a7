"""The JSON config of a training run, in k-diffusion's format, and what it says where it says nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from natten_layers.io.schema import check_keys
from natten_layers.wording import shorten

from .objectives import MEANFLOW

SECTIONS: dict[str, dict[str, Any]] = {  # k-diffusion's defaults for this type of model
    "optimizer": {"type": "adamw", "lr": 5e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 1e-4},
    "lr_sched": {"type": "constant", "warmup": 0.0},
    "ema_sched": {"type": "inverse", "power": 0.6667, "max_value": 0.9999},
}


def section_of(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A section that may be missing, or null."""
    section = config.get(name)
    if not isinstance(section, dict | None):
        raise ValueError(f'{path}: "{name}" is no JSON object, but {shorten(section)}')
    return section or {}


@contextmanager
def naming_config(path: Path) -> Iterator[None]:
    """Say of which file it is that something is missing in it, or of another type or out of bounds."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no config of this command: {error}") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}") from error


def complete_config(
    raw: Mapping[str, Any],
    path: Path,
    data: Mapping[str, Any] | None,
    objective: str | None = None,
    *,
    classes: bool = True,
) -> dict[str, Any]:
    """A JSON config, with k-diffusion's defaults of its training sections filled in, and ``data`` as its dataset.

    Args:
        raw: what is in the file ``path``, which is not read a second time: it may be a pipe.
    """
    config = copy.deepcopy({key: value for key, value in raw.items() if key != "run"})
    if objective is not None:
        config["model"] = section_of(config, "model", path) | {"objective": objective}
    if data is not None:
        kept = {key: value for key, value in section_of(config, "dataset", path).items() if key == "cond_dropout_rate"}
        config["dataset"] = {**data, **kept}
    elif not section_of(config, "dataset", path):
        raise ValueError(f"{path} has no dataset; name one with --data")
    if not classes:
        config["dataset"]["num_classes"] = 0
        if config["dataset"].get("type") == "imagefolder-class":
            config["dataset"]["type"] = "imagefolder"
    if section_of(config, "model", path).get("objective") == "meanflow":
        config["meanflow"] = MEANFLOW | section_of(config, "meanflow", path)
    for section, defaults in SECTIONS.items():
        config[section] = defaults | section_of(config, section, path)
    for section in ("optimizer", "ema_sched"):
        found, only = config[section]["type"], SECTIONS[section]["type"]
        if found != only:
            raise ValueError(f"{section}.type is {found!r}; only {only!r} is supported")
        check_keys(config[section].keys(), SECTIONS[section].keys(), f"{section} of type {only}")
    return config
