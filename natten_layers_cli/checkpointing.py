"""The files of a training run. Each appears whole or not at all, and the old ones stay until the new one is whole."""

from __future__ import annotations

import glob
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from natten_layers.io.checkpoints import hdit_name, load_plain, save_plain
from natten_layers.io.files import leftovers, make_folder, replacing, system_errors
from natten_layers.wording import shorten

from .parallel import Processes, local
from .running import one_line, reason, running_alone

SHARDED_CONFIG = "config.json"
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""what an AdamW keeps of a parameter"""


class DamagedError(ValueError):
    """A checkpoint that is not whole, or none at all; an older one may be."""


class RunFiles:
    """Where a run called ``name`` keeps its files: ``name`` is the prefix of their paths.

    Raises:
        ValueError: a name that makes hidden files, or names that no file has.
    """

    LONGEST = 200
    """bytes of the last part of a name, of a file's 255: the rest is for what is put around it"""

    def __init__(self, name: str) -> None:
        start = name.replace(os.sep, "/").rpartition("/")[2]
        if not start or start.startswith("."):
            raise ValueError(
                f"--name {name!r} is the start of all files' names, and would make hidden ones; "
                f"use, for example, {os.path.join(os.path.dirname(name), 'run')}"
            )
        if len(os.fsencode(start)) > self.LONGEST or "\0" in name:
            raise ValueError(
                f"--name {shorten(name)} is the start of all files' names, and makes such as no file can have; "
                f"its last part may have {self.LONGEST} bytes, and none of them 0"
            )
        self.name = name
        make_folder(Path(name).parent)

    def path(self, suffix: str) -> Path:
        return Path(f"{self.name}{suffix}")

    @property
    def state(self) -> Path:
        return self.path("_state.json")

    @contextmanager
    def own(self) -> Iterator[None]:
        """Keep other runs of this name away, and remove what one that was killed left half written.

        Raises:
            ValueError: another run has the name.
        """
        with running_alone(self.path(".lock"), f"training {self.name}"):
            start = re.escape(Path(self.name).name)
            kinds = r"_\d{8,}(\.pth)?|_state\.json|\.safetensors|_metrics\.csv|_loss\.png|_samples\.png|_demo_\d+\.png"
            for path, name in leftovers(Path(self.name).parent):
                if re.fullmatch(f"{start}({kinds})", name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield

    def checkpoints(self) -> tuple[list[Path], str]:
        """The run's checkpoints to go on from, the best first, and what is wrong with the state file, if anything.

        The best is the one that the state file names, then the newest of the older ones; without that file, the newest.
        """
        start = Path(self.name).name
        found = {}
        for path in self.state.parent.glob(f"{glob.escape(start)}_*"):
            if match := re.fullmatch(r"_(\d{8,})(\.pth)?", path.name.removeprefix(start)):
                found[int(match[1])] = path
        latest, problem = self._latest()
        if latest is None:
            return [found[step] for step in sorted(found, reverse=True)], problem
        match = re.fullmatch(r".*_(\d{8,})(\.pth)?", latest.name)
        before = int(match[1]) if match else math.inf
        return [latest, *(found[step] for step in sorted(found, reverse=True) if step < before)], ""

    def _latest(self) -> tuple[Path | None, str]:
        """The checkpoint that the state file names, or why it names none."""
        try:
            name = json.loads(self.state.read_bytes())["latest_checkpoint"]
            if isinstance(name, str) and name and Path(name).name == name:
                return self.state.parent / name, ""
        except FileNotFoundError:
            return None, f"{self.state} does not exist"
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        return None, f"{self.state} is damaged: it names no checkpoint"

    def record(self, checkpoint: Path) -> None:
        """Make ``checkpoint``, which lies beside the state file, the latest."""
        with replacing(self.state) as temporary:
            temporary.write_text(json.dumps({"latest_checkpoint": checkpoint.name}), encoding="utf-8")

    def prune(self, keep: int) -> None:
        """Delete all but ``keep`` checkpoints, the one that the state file names and those before; 0 keeps all."""
        latest, *older = self.checkpoints()[0]
        for path in older[keep - 1 :] if keep else []:
            if path.name != latest.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def losses(self, before: int) -> dict[int, float]:
        """What the metrics file holds of the steps up to ``before``, by step.

        A last line without an end, on which the run was killed, does not count.

        Raises:
            ValueError: a damaged file.
        """
        path = self.path("_metrics.csv")
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return {}
        if not lines:
            return {}
        if lines[0].rstrip() != b"step,loss":
            raise ValueError(f'{path} is damaged (its first line is not "step,loss"); mend or delete it')
        losses = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                step, loss = line.split(b",")
                losses[int(step)] = float(loss)
            except ValueError as error:
                if number == len(lines):  # a power cut can leave zeros in place of what was written last
                    break
                raise ValueError(f"{path} is damaged (line {number} is {line!r:.60}); mend or delete it") from error
        return {step: loss for step, loss in losses.items() if step <= before}

    def rewrite_metrics(self, losses: Mapping[int, float]) -> None:
        with replacing(self.path("_metrics.csv")) as temporary:
            rows = "".join(f"{step},{loss!r}\n" for step, loss in losses.items())
            temporary.write_text(f"step,loss\n{rows}", encoding="utf-8")


def check_finite(model: nn.Module, processes: Processes) -> None:
    """Refuse to save a model that NaN or infinity has reached; every process must call it.

    Raises:
        RuntimeError: it has.
    """
    finite = torch.stack([local(parameter).isfinite().all() for parameter in model.parameters()]).all()
    if processes.any(not finite):
        raise RuntimeError(
            "the weights are no longer finite, and are not saved: the last checkpoint is from before; try a lower --lr"
        )


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
    save_plain(content, path)


def load_checkpoint(
    path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Put a run back to where :func:`save_checkpoint` left it; returns ``rest``.

    Raises:
        DamagedError: a damaged file, or none.
        ValueError: a file of another model.
    """
    try:
        content = load_plain(path)
    except (ValueError, OSError) as error:
        raise DamagedError(one_line(error)) from error
    check_rest(path, content, ("model", "model_ema", "opt"))
    tensors, ema_tensors, state = content.pop("model"), content.pop("model_ema"), content.pop("opt")
    check_config(path, content["config"], config)
    try:
        model.load_state_dict(tensors)
        ema.load_state_dict({key: ema_tensors[hdit_name(key)] for key in ema.state_dict()})
        with own_settings(optimizer):
            optimizer.load_state_dict(state)
        check_moments(optimizer)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds other content than this command saves: {one_line(error)}") from error
    return content


def check_rest(path: Path, content: Any, states: tuple[str, ...] = ()) -> None:
    """What a checkpoint holds beside ``states``: a step, the run's config and a scaler's state.

    Raises:
        DamagedError: it does not.
    """
    types = {**dict.fromkeys(states, dict), "config": dict, "step": int, "scaler": dict}
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is no training checkpoint of this command")
    if missing := [key for key in types if key not in content]:
        raise DamagedError(f"{path} is no training checkpoint of this command: it lacks {', '.join(missing)}")
    for key, kind in types.items():
        if not isinstance(content[key], kind):
            raise DamagedError(f"{path} is no training checkpoint of this command: its {key} is a {type(content[key])}")
    if not isinstance(content["config"].get("model"), dict) or content["step"] < 0:
        raise DamagedError(f"{path} is no training checkpoint of this command: its config or its step is odd")


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Refuse the state of an AdamW that its next step would stumble over; loading takes it as it is.

    Raises:
        ValueError: a moment or a count is missing, or of another type or shape than its parameter's.
    """
    for parameter, state in optimizer.state.items():
        for key in sorted(MOMENTS):
            found, shape = state.get(key), () if key == "step" else parameter.shape
            is_plain = isinstance(found, Tensor) and found.layout == torch.strided and not found.is_meta
            if not is_plain or found.shape != shape or not found.is_floating_point():
                raise ValueError(
                    f"the optimizer's {key} for a parameter of shape {tuple(parameter.shape)} is {shorten(found)}"
                )


@contextmanager
def own_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let a state be loaded, and put what the config says of each group back: decay, betas and the like."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


MOST_DIFFERENCES = 3
"""between two configs that an error lists: of two presets nearly everything differs"""


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
        shown, rest = different[:MOST_DIFFERENCES], len(different) - MOST_DIFFERENCES
        more = f"; and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"{path} was trained with another config: {'; '.join(shown)}{more}. Use its config, or another --name."
        )


class _Writer(FileSystemWriter):
    """Says what the system says of a file that cannot be written; other processes get no more of an error than that."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with system_errors():
            return super().write_data(plan, planner)


def save_sharded(
    path: Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    rest: dict[str, Any],
    processes: Processes,
) -> None:
    """:func:`save_checkpoint` for a model that no process holds whole: a folder that every process writes to."""
    # Names that leftovers() knows, and that all processes share: replacing() would give each its own.
    temporary, old = (path.with_name(f".{path.name}.{i:08x}.tmp") for i in range(2))
    if processes.first:
        shutil.rmtree(temporary, ignore_errors=True)
    processes.barrier()
    try:
        state_dict_saver.save(_sharded_state(model, ema, optimizer), storage_writer=_Writer(temporary))
        if processes.first:
            (temporary / SHARDED_CONFIG).write_text(json.dumps(rest), encoding="utf-8")
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, CheckpointException) as error:
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
        # Not the file's name: it lies in the temporary folder, which is gone.
        raise OSError(f"cannot write {path}: {reason(_first(error))}") from error
    processes.barrier()


def _first(error: OSError | CheckpointException) -> BaseException:
    """What the first process that failed raised; several fail together."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def load_sharded(
    path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]
) -> dict[str, Any]:
    """:func:`load_checkpoint` for such a folder; any number of processes may have written it."""
    try:
        rest = json.loads((path / SHARDED_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no sharded checkpoint of this command: {one_line(error)}") from error
    check_rest(path, rest)
    check_config(path, rest["config"], config)
    state = _sharded_state(model, ema, optimizer)
    try:
        state_dict_loader.load(state, checkpoint_id=path)
    except CheckpointException as error:
        raise DamagedError(f"{path} is damaged: {one_line(_first(error))}") from error
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
