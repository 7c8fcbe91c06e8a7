"""What a run trains on: images as its config and its flags name them, and those that it is measured by."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from natten_layers import HDiTConfig
from natten_layers.modules.hdit_config import IMAGE_AXES, axis_grid, check_axis

from .diffusion import check_schedule
from .distances import NAMES, usual_features
from .folders import Folder
from .held_out import Part, hold_out
from .images import Fit, KeepShape
from .parallel import Processes
from .sampled import SampleDistances
from .sources import Source, describe, open_source, parse_data_flag
from .training_config import complete_config, naming_config


@dataclass(frozen=True)
class TrainingData:
    """The images of a run, and what it trains on them."""

    config: dict[str, Any]
    """the JSON config, with the classes of the images in its dataset section"""
    plan: HDiTConfig
    source: Source
    """images to train on"""
    held_out: Part
    """images to measure the loss of; none without ``--held-out``"""
    distances: SampleDistances | None
    """of samples; None without ``--eval-samples``"""


def open_training_data(arguments: argparse.Namespace, processes: Processes, say: Callable[[str], None]) -> TrainingData:
    """Open the images, look at this process's share of them, and tell the user what was found.

    Raises:
        ValueError: a config, flags or images that do not go together, or images that cannot be used.
    """
    data = None if arguments.data is None else parse_data_flag(arguments.data)
    with naming_config(arguments.config):
        config = complete_config(
            arguments.content, arguments.config, data, arguments.objective, classes=arguments.classes
        )
        plan = HDiTConfig.from_json(config)
        if plan.mapping_cond_dim:
            raise ValueError("model.mapping_cond_dim: no data of this command has a mapping_cond; leave it out")
        check_schedule(config["lr_sched"])
        for axis, size, patch in zip(IMAGE_AXES, plan.input_size, plan.patch_size, strict=True):
            check_axis(axis, size, patch, plan.levels)
    fit = _keep_shapes(plan, processes) if arguments.buckets == "none" else None
    with naming_config(arguments.config) if arguments.data is None else nullcontext():
        source = open_source(config["dataset"], plan.input_size, plan.input_channels, fit)
    with naming_config(arguments.config):
        _set_classes(config["dataset"], list(source.class_names))
    say(describe(source))
    if isinstance(source, Folder):
        source.check(processes.rank, processes.world)
    held_out = Part(source, ())
    if arguments.held_out:
        source, held_out = hold_out(source, arguments.held_out)
        say(f"{len(source)} images to train on, {len(held_out)} held out")
    distances = _open_distances(source, arguments, processes, say) if arguments.eval_samples else None
    return TrainingData(config, HDiTConfig.from_json(config), source, held_out, distances)


def _keep_shapes(plan: HDiTConfig, processes: Processes) -> Fit:
    """What ``--buckets none`` makes of images."""
    if processes.fsdp:  # which runs in step, but processes see other numbers of shapes
        raise ValueError("--buckets none does not go with --fsdp: leave one of them out")
    if any(level.wraps(axis) for level in plan.levels for axis in IMAGE_AXES):
        raise ValueError("--buckets none does not go with is_periodic, for which images have one aspect ratio")
    axes = zip(IMAGE_AXES, plan.patch_size, strict=True)
    units, least = zip(*(axis_grid(axis, patch, plan.levels) for axis, patch in axes), strict=True)
    return KeepShape(units, least)


def _set_classes(dataset: dict[str, Any], names: list[str]) -> None:
    """Fill in the classes of the images, which the config may name, too, or leave out as a whole."""
    for key, value in (("num_classes", len(names)), ("class_names", names)):
        if dataset.setdefault(key, value) not in (0, [], value):
            way_out = "leave it out"
            if dataset.get("type") == "imagefolder":  # in k-diffusion, too, the type without classes
                way_out += ', or name the type "imagefolder-class", whose classes are the subfolders'
            raise ValueError(
                f"dataset.{key} is {dataset[key]}, but the data has {len(names)} classes: {names}; {way_out}"
            )
    dataset["class_names"] = names if dataset["num_classes"] else []


def _open_distances(
    source: Source, arguments: argparse.Namespace, processes: Processes, say: Callable[[str], None]
) -> SampleDistances:
    if arguments.buckets == "none":
        raise ValueError("--eval-samples needs images of one size: leave --buckets none away")
    name = arguments.eval_features or usual_features()
    say(f"samples are measured by {' and '.join(NAMES[name])}, of the features {name}")
    options: dict[str, Any] = {"processes": processes, "workers": arguments.num_workers}
    return SampleDistances(source, arguments.eval_samples, features=name, **options)
