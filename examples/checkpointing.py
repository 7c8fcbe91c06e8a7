"""The files of a training run. Each appears whole or not at all, and the old ones stay until the new one is whole."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from natten_layers.io.checkpoints import hdit_name, load_plain
from natten_layers.io.files import replacing
from parallel import Processes

SHARDED_CONFIG = "config.json"


class RunFiles:
    """Where a run called ``name`` keeps its files: ``name`` is the prefix of their paths."""

    def __init__(self, name: str) -> None:
        self.name = name
        Path(name).parent.mkdir(parents=True, exist_ok=True)

    def path(self, suffix: str) -> Path:
        return Path(f"{self.name}{suffix}")

    @property
    def state(self) -> Path:
        return self.path("_state.json")

    def latest(self) -> Path | None:
        """The checkpoint that the state file names, if the run has one.

        Raises:
            ValueError: a damaged state file.
        """
        try:
            name = json.loads(self.state.read_text())["latest_checkpoint"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.state} does not name a checkpoint; give one with --resume") from error
        return self.state.parent / name

    def record(self, checkpoint: Path) -> None:
        """Make ``checkpoint``, which lies beside the state file, the latest."""
        with replacing(self.state) as temporary:
            temporary.write_text(json.dumps({"latest_checkpoint": checkpoint.name}))

    def losses(self, before: int) -> dict[int, float]:
        """What the metrics file holds of the steps up to ``before``, by step.

        Raises:
            ValueError: a damaged file.
        """
        path = self.path("_metrics.csv")
        try:
            with path.open() as file:
                rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); mend or delete it") from error
        return {step: loss for step, loss in rows if step <= before}

    def rewrite_metrics(self, losses: Mapping[int, float]) -> None:
        with replacing(self.path("_metrics.csv")) as temporary:
            rows = "".join(f"{step},{loss!r}\n" for step, loss in losses.items())
            temporary.write_text(f"step,loss\n{rows}")


def save_checkpoint(
    path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, rest: Mapping[str, Any]
) -> None:
    """Write everything that a run needs to go on, as one file in k-diffusion's layout."""
    content = {
        **rest,
        "model": model.state_dict(),
        "model_ema": {hdit_name(key): tensor for key, tensor in ema.state_dict().items()},
        "opt": optimizer.state_dict(),
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # the state file must never name a checkpoint that a power cut could empty


def load_checkpoint(
    path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Put a run back to where :func:`save_checkpoint` left it; returns ``rest``.

    Raises:
        ValueError: a damaged file, or one of another model.
    """
    content = load_plain(path)
    keys = ("model", "model_ema", "opt", "config", "step", "scaler")
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is no training checkpoint of this script: it lacks {', '.join(missing)}")
    tensors, ema_tensors, state = content.pop("model"), content.pop("model_ema"), content.pop("opt")
    check_config(path, content["config"], config)
    try:
        model.load_state_dict(tensors)
        ema.load_state_dict({key: ema_tensors[hdit_name(key)] for key in ema.state_dict()})
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} holds other weights than this script saves: {error}") from error
    with own_settings(optimizer):
        optimizer.load_state_dict(state)
    return content


@contextmanager
def own_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let a state be loaded, and put what the config says of each group back: decay, betas and the like."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def check_config(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """What weights and labels mean must not have changed.

    Raises:
        ValueError: it has; what differs and what would fix it.
    """
    there, here = saved["model"], current["model"]
    pairs = [(f"model.{key}", there.get(key), here.get(key)) for key in sorted({*there, *here})]
    names = [config.get("dataset", {}).get("class_names") for config in (saved, current)]
    if all(names):  # the meaning of a label
        pairs.append(("dataset.class_names", *names))
    different = [f"{name} is {one!r} there and {other!r} here" for name, one, other in pairs if one != other]
    counts = [config.get("dataset", {}).get("num_classes", 0) for config in (saved, current)]
    if counts[0] != counts[1]:
        different.append(f"dataset.num_classes is {counts[0]} there and {counts[1]} here")
    if different:
        raise ValueError(
            f"{path} was trained with another config: {'; '.join(different)}. Use its config, or another --name."
        )


def save_sharded(
    path: Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    rest: dict[str, Any],
    processes: Processes,
) -> None:
    """:func:`save_checkpoint` for a model that no process holds whole: a folder that every process writes to."""
    temporary = path.with_name(f".{path.name}.tmp")
    if processes.first:
        shutil.rmtree(temporary, ignore_errors=True)
    processes.barrier()
    state_dict_saver.save(_sharded_state(model, ema, optimizer), checkpoint_id=temporary)
    if processes.first:
        (temporary / SHARDED_CONFIG).write_text(json.dumps(rest))
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    processes.barrier()


def load_sharded(
    path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]
) -> dict[str, Any]:
    """:func:`load_checkpoint` for such a folder; any number of processes may have written it."""
    try:
        rest = json.loads((path / SHARDED_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no sharded checkpoint of this script: {error}") from error
    check_config(path, rest["config"], config)
    state = _sharded_state(model, ema, optimizer)
    state_dict_loader.load(state, checkpoint_id=path)
    with own_settings(optimizer):
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["opt"])
    set_model_state_dict(ema, state["model_ema"])
    return rest


def _sharded_state(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    tensors, state = get_state_dict(model, optimizer)
    return {"model": tensors, "opt": state, "model_ema": get_model_state_dict(ema)}


def gathered_state(model: nn.Module) -> dict[str, Any]:
    """The whole state dict of a sharded model, on the CPU of the first process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
