"""Train an HDiT as k-diffusion's users know it: a JSON config, auto-resume, demo grids, EMA.

natten-layers-train-hdit                                   a few minutes on a CPU, or the GPU's preset
natten-layers-train-hdit --config flowers.json --name runs/flowers --mixed-precision bf16 --compile
natten-layers-train-hdit --objective meanflow              a model that samples in one step, as small
torchrun --nproc-per-node 2 -m natten_layers_cli.train_hdit --preset gpu-demo --name runs/two-gpus

A run called NAME writes NAME_STEP.pth (everything needed to go on), NAME_state.json (which of them is the latest; the
same command finds it and goes on from there), NAME.safetensors (EMA weights to sample from), NAME_metrics.csv,
NAME_demo_STEP.png, NAME_loss.png and NAME_tensorboard/. While it runs, NAME.lock keeps a second run of the name away.

The defaults below are those of a config that has no "run" section. Presets have one: their batches, steps and learning
rates are other ones.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from natten_layers import HDiT, HDiTConfig
from natten_layers.io.checkpoints import load_tensors, read_hdit
from natten_layers.io.files import read_json
from natten_layers.io.schema import check_keys
from natten_layers.modules.hdit_config import IMAGE_AXES, axis_grid, check_axis
from natten_layers.wording import shorten

from .batches import Batch, Examples, Keys, default_workers, load_batches, pack
from .boards import Boards, Log
from .checkpointing import (
    DamagedError,
    RunFiles,
    check_finite,
    gathered_state,
    load_checkpoint,
    load_sharded,
    reset,
    save_checkpoint,
    save_sharded,
)
from .diffusion import check_schedule, ema_decay, learning_rate_factor
from .distances import NAMES, usual_features
from .folders import Folder
from .held_out import held_out_batches, hold_out, level_names, means, sums_by_level
from .images import KeepShape
from .objectives import MEANFLOW, open_objective
from .parallel import Processes, local
from .pictures import save_loss_curve, save_png
from .running import (
    SIGNALS_HELP,
    Parser,
    Showing,
    Signals,
    check_device,
    list_length,
    positive,
    run_command,
    seed,
    worker_count,
    writing,
)
from .sample_hdit import DEFAULTS, Request, digest, picture, sample_batches
from .sampled import SampleDistances
from .sources import describe, open_source, parse_data_flag

PRESETS = Path(__file__).parent / "configs"
SECTIONS: dict[str, dict[str, Any]] = {  # k-diffusion's defaults for this type of model
    "optimizer": {"type": "adamw", "lr": 5e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 1e-4},
    "lr_sched": {"type": "constant", "warmup": 0.0},
    "ema_sched": {"type": "inverse", "power": 0.6667, "max_value": 0.9999},
}
KINDS = {"diffusion": "demo", "meanflow": "meanflow"}  # the presets of an objective, after the device's name
T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags win over the config's "run" section, and that over the defaults here, which are k-diffusion's."""
    counts = ("batch_size", "grad_accum_steps", "save_every", "sample_n", "sample_steps", "end_step", "eval_every")
    naturals = ("demo_every", "keep", "held_out", "eval_samples")
    least = {name: 1 if name in counts else 0 for name in (*counts, *naturals)}
    parser = Parser(description=__doc__, epilog=SIGNALS_HELP, least=least)
    switch = argparse.BooleanOptionalAction
    cuda = torch.cuda.is_available()
    parser.add_argument("--config", type=Path, help="JSON in k-diffusion's format (image_transformer_v2)")
    parser.add_argument(
        "--preset",
        choices=sorted(path.stem for path in PRESETS.glob("*.json")),
        help="a config that comes with this command; default: that of device and objective",
    )
    parser.add_argument(
        "--objective",
        choices=KINDS,
        help="what to train, in place of the config's: a diffusion model, or one that samples in one step (MeanFlow)",
    )
    parser.add_argument("--name", default="runs/hdit", help="prefix of all files written, default: %(default)s")
    parser.add_argument("--resume", type=Path, help="go on from this checkpoint, not from NAME's latest")
    parser.add_argument(
        "--resume-inference",
        type=Path,
        metavar="FILE",
        help="start at step 0 from these weights (safetensors or .pth), with the KV heads that they were made for",
    )
    parser.add_argument(
        "--reset",
        nargs="+",
        default=[],
        metavar="TENSOR",
        help="tensors, or modules of them, not to take from FILE: class_emb, to train on other classes",
    )
    parser.add_argument(
        "--data",
        metavar="DIR|hf:OWNER/NAME",
        help="train on these images, not on the config's; each subfolder is a class, transparent pixels become white",
    )
    parser.add_argument(
        "--classes",
        action=switch,
        default=True,
        help="learn what belongs to which class, where the images have classes",
    )
    parser.add_argument(
        "--buckets",
        choices=("one", "none"),
        default="one",
        help="one: images are cropped to the config's size; none: they keep their shapes, at about as many pixels",
    )
    parser.add_argument("--batch-size", type=list_length, default=64, help="images per process and accumulation step")
    parser.add_argument("--grad-accum-steps", type=list_length, default=1, help="batches per optimiser step")
    parser.add_argument("--end-step", type=int, help="stop after so many steps in all; default: at Ctrl-C")
    parser.add_argument("--demo-every", type=int, default=500, help="steps between grids of samples, 0 for none")
    parser.add_argument("--save-every", type=int, default=10000, help="steps between checkpoints")
    parser.add_argument("--keep", type=int, default=0, help="newest checkpoints not to delete; 0: all")
    parser.add_argument(
        "--held-out", type=int, default=0, help="images that are not trained on, to measure the loss of"
    )
    parser.add_argument(
        "--eval-samples",
        type=int,
        default=0,
        help="samples to measure by FID and KID, of as many images; 0: none; see natten-layers-evaluate",
    )
    parser.add_argument("--eval-features", choices=NAMES, help="of the images, as natten-layers-evaluate has them")
    parser.add_argument(
        "--eval-every", type=int, default=500, help="steps between measures of the held-out images' loss and of samples"
    )
    parser.add_argument("--sample-n", type=list_length, default=8, help="images per class in a grid")
    parser.add_argument(
        "--sample-steps", type=list_length, help="steps of the sampler; default: 50, or 1 with meanflow"
    )
    parser.add_argument("--lr", type=positive, help="learning rate, in place of the config's")
    parser.add_argument("--mixed-precision", choices=["no", *DTYPES], default="no", help="autocast to this type")
    parser.add_argument("--compile", action=switch, default=False, help="torch.compile the model")
    parser.add_argument("--checkpointing", action=switch, default=False, help="recompute activations to save memory")
    parser.add_argument("--fsdp", action=switch, default=False, help="shard parameters over the processes (torchrun)")
    parser.add_argument("--wandb", metavar="PROJECT", help="draw curves and grids in this project of Weights & Biases")
    parser.add_argument(
        "--num-workers",
        type=worker_count,
        default=default_workers(8),
        help="processes that load images, default: 8, or as many as there are cores",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the first weights, the noise and the order of images")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="to train on")
    arguments, given = parser.parse(argv), parser.given(argv)
    if {"config", "preset"} <= given:
        parser.error("--config and --preset both name a config: leave one of them away")
    preset = arguments.preset or f"{'gpu' if cuda else 'cpu'}-{KINDS[arguments.objective or 'diffusion']}"
    config = arguments.config or PRESETS / f"{preset}.json"
    section = _section(read_json(config), "run", config)
    here = parser.parse_section(section, f'{config}: config["run"]', without=["config", "preset"])
    arguments = parser.parse(argv, here)
    arguments.config = config
    if "eval_every" in given and not (arguments.held_out or arguments.eval_samples):
        parser.error("--eval-every needs --held-out, the images to measure the loss of, or --eval-samples")
    if "eval_features" in given and not arguments.eval_samples:
        parser.error("--eval-features needs --eval-samples, how many to measure")
    if arguments.eval_samples == 1:
        parser.error("--eval-samples must be 0 or at least 2, got 1")
    if arguments.reset and not arguments.resume_inference:
        parser.error("--reset needs --resume-inference, the weights of which it leaves some out")
    check_device(parser, arguments.device)
    return arguments


def _section(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A section that may be missing, or null."""
    section = config.get(name)
    if not isinstance(section, dict | None):
        raise ValueError(f'{path}: "{name}" is no JSON object, but {shorten(section)}')
    return section or {}


@contextmanager
def naming(path: Path) -> Iterator[None]:
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


def read_config(
    path: Path, data: Mapping[str, Any] | None, objective: str | None = None, *, classes: bool = True
) -> dict[str, Any]:
    """The JSON config, with k-diffusion's defaults of its training sections filled in, and ``data`` as its dataset."""
    config = read_json(path)
    config.pop("run", None)
    if objective is not None:
        config["model"] = _section(config, "model", path) | {"objective": objective}
    if data is not None:
        kept = {key: value for key, value in _section(config, "dataset", path).items() if key == "cond_dropout_rate"}
        config["dataset"] = {**data, **kept}
    elif not _section(config, "dataset", path):
        raise ValueError(f"{path} has no dataset; name one with --data")
    if not classes:
        config["dataset"]["num_classes"] = 0
        if config["dataset"].get("type") == "imagefolder-class":
            config["dataset"]["type"] = "imagefolder"
    if _section(config, "model", path).get("objective") == "meanflow":
        config["meanflow"] = MEANFLOW | _section(config, "meanflow", path)
    for section, defaults in SECTIONS.items():
        config[section] = defaults | _section(config, section, path)
    for section in ("optimizer", "ema_sched"):
        found, only = config[section]["type"], SECTIONS[section]["type"]
        if found != only:
            raise ValueError(f"{section}.type is {found!r}; only {only!r} is supported")
        check_keys(config[section].keys(), SECTIONS[section].keys(), f"{section} of type {only}")
    return config


class SamplingStoppedError(Exception):
    """A process was told to stop while images were sampled."""


CLASSES = "class_emb.weight"
"""the embedding of classes, in the model and in files"""


class Trainer:
    """A run: what it trains, on what, and how far it has come."""

    def __init__(self, arguments: argparse.Namespace, processes: Processes, files: RunFiles) -> None:
        self.arguments, self.processes, self.files = arguments, processes, files
        self.signals, self.showing = Signals(), Showing()
        start = read_hdit(arguments.resume_inference) if arguments.resume_inference else None
        self._read_data()
        if start is not None and start[0] is not None:
            with naming(arguments.resume_inference):
                self._take_kv_heads(HDiTConfig.from_json(start[0]))
        with naming(arguments.config):
            self.objective = open_objective(self.config, self.plan)

        torch.manual_seed(arguments.seed)
        with naming(arguments.config):
            self.model = HDiT(self.plan, checkpointing=arguments.checkpointing)
        if start is not None:  # a checkpoint of the run itself, loaded below, wins
            self._take_weights(start[1])
        self.model.to(processes.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if arguments.compile:
            self.model.compile()
        self.wrapped = processes.wrap(self.model)
        if processes.fsdp:
            processes.shard(self.ema, reshard=True)  # it has no backward pass, and is updated in parts
        self.learner = self.objective.around(self.wrapped, self.plan.sigma_data)
        shifted = any(level.attention == "shifted-window" for level in self.plan.levels)
        # A compiled network would be compiled anew for most batches: its graphs are of images of one shape.
        self.packs = self.objective.packs and not shifted and not arguments.compile
        """whether images of several shapes take one pass together, not one for each shape"""

        settings = self.config["optimizer"]
        lr = settings["lr"] if arguments.lr is None else arguments.lr
        groups = self.model.param_groups(lr, settings["weight_decay"])
        self.base_lrs = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=tuple(settings["betas"]), eps=settings["eps"])
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=arguments.mixed_precision == "fp16")
        self.by_level = torch.zeros(2, len(self.objective.edges) + 1, device=processes.device)
        """sums and numbers of this process's losses of the last step, by noise level"""
        self.gradient_norm = torch.zeros((), device=processes.device)
        self.step = 0
        self.saved_step = 0
        self.written_step: int | None = None
        """of which this process wrote the EMA weights to sample from"""
        self._resume()

    def _take_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Those of ``--resume-inference``, but for what ``--reset`` names."""
        own = self.model.state_dict()
        tensors = reset(self.model, tensors, self.arguments.reset)
        try:
            load_tensors(self.model, tensors, self.arguments.resume_inference, torch.float32)
        except ValueError as error:
            shapes = {state[CLASSES].shape if CLASSES in state else None for state in (own, tensors)}
            if len(shapes) == 1:
                raise
            raise ValueError(f"{error} To train on other classes, or on none, give --reset class_emb.") from error

    def _read_data(self) -> None:
        arguments = self.arguments
        data = None if arguments.data is None else parse_data_flag(arguments.data)
        with naming(arguments.config):
            config = read_config(arguments.config, data, arguments.objective, classes=arguments.classes)
            plan = HDiTConfig.from_json(config)
            if plan.mapping_cond_dim:
                raise ValueError("model.mapping_cond_dim: no data of this command has a mapping_cond; leave it out")
            check_schedule(config["lr_sched"])
            for axis, size, patch in zip(IMAGE_AXES, plan.input_size, plan.patch_size, strict=True):
                check_axis(axis, size, patch, plan.levels)
        dataset = config["dataset"]
        fit = None
        if self.arguments.buckets == "none":
            if self.processes.fsdp:  # which runs in step, but processes see other numbers of shapes
                raise ValueError("--buckets none does not go with --fsdp: leave one of them out")
            if any(level.wraps(axis) for level in plan.levels for axis in IMAGE_AXES):
                raise ValueError("--buckets none does not go with is_periodic, for which images have one aspect ratio")
            axes = zip(IMAGE_AXES, plan.patch_size, strict=True)
            units, least = zip(*(axis_grid(axis, patch, plan.levels) for axis, patch in axes), strict=True)
            fit = KeepShape(units, least)
        with naming(arguments.config) if arguments.data is None else nullcontext():
            self.source = open_source(dataset, plan.input_size, plan.input_channels, fit)
        names = list(self.source.class_names)
        with naming(arguments.config):
            for key, value in (("num_classes", len(names)), ("class_names", names)):
                if dataset.setdefault(key, value) not in (0, [], value):
                    raise ValueError(f"dataset.{key} is {dataset[key]}, but the data has {len(names)} classes: {names}")
        dataset["class_names"] = names if dataset["num_classes"] else []
        self.config, self.plan = config, HDiTConfig.from_json(config)
        self.say(describe(self.source))
        if isinstance(self.source, Folder):
            self.source.check(self.processes.rank, self.processes.world)
        if count := self.arguments.held_out:
            self.source, self.held_out = hold_out(self.source, count)
            self.say(f"{len(self.source)} images to train on, {count} held out")
        self.distances = self._open_distances() if arguments.eval_samples else None

    def _open_distances(self) -> SampleDistances:
        arguments = self.arguments
        if arguments.buckets == "none":
            raise ValueError("--eval-samples needs images of one size: leave --buckets none away")
        name = arguments.eval_features or usual_features()
        self.say(f"samples are measured by {' and '.join(NAMES[name])}, of the features {name}")
        options: dict[str, Any] = {"processes": self.processes, "workers": arguments.num_workers}
        return SampleDistances(self.source, arguments.eval_samples, features=name, **options)

    def _take_kv_heads(self, stored: HDiTConfig) -> None:
        """Give the model the KV heads of the weights it starts from, where ``natten_layers.convert`` has pooled them.

        Where more differs than those, the weights do not fit, and loading them says so.

        Raises:
            ValueError: weights with more KV heads than the config asks for, which are to be pooled first.
        """
        own, source = self.plan.levels, self.arguments.resume_inference
        if [(level.width, level.d_head) for level in own] != [(level.width, level.d_head) for level in stored.levels]:
            return
        here, there = ([level.num_kv_heads or level.num_heads for level in levels] for levels in (own, stored.levels))
        if any(theirs > ours for ours, theirs in zip(here, there, strict=True)):
            raise ValueError(
                f"{source} has {there} KV heads on its levels, and the config asks for {here}: "
                "pool them with natten-layers-convert, or change num_kv_heads"
            )
        if here != there:
            levels = zip(own, stored.levels, strict=True)
            levels = [replace(level, num_kv_heads=other.num_kv_heads) for level, other in levels]
            self.plan = replace(self.plan, levels=levels)
            self.say(f"the levels have {there} KV heads, as in {source}, not {here} as in the config")

    # Checkpoints

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole, and say so where that is not the one expected."""
        paths, problem = ([self.arguments.resume], "") if self.arguments.resume else self.files.checkpoints()
        problems = [problem] if problem else []
        load = load_sharded if self.processes.fsdp else load_checkpoint
        for path in paths:
            if path.exists() and path.is_dir() != self.processes.fsdp:
                raise ValueError(f"{path} was saved {'without' if self.processes.fsdp else 'with'} --fsdp")
            try:
                rest = load(path, self.model, self.ema, self.optimizer, self.plan.to_json())
            except DamagedError as error:
                problems.append(str(error))
                continue
            if rest["scaler"]:  # empty where the run had another precision
                self.scaler.load_state_dict(rest["scaler"])
            self.step = self.saved_step = rest["step"]
            for problem in problems:
                self.say(f"warning: {problem}")
            if problems and self.processes.first:
                self.files.record(path)
            self.say(f"resuming from {path} at step {self.step}")
            return
        if paths or self.files.state.exists():
            way_out = f"; no older checkpoint is whole: delete {self.files.state} to start anew"
            raise ValueError("; ".join(problems) + ("" if self.arguments.resume else way_out))

    def save(self) -> None:
        """Write a checkpoint, the weights to sample from, and last the state file: a kill before it undoes nothing.

        Every process must call it.
        """
        check_finite(self.model, self.processes)
        rest = {"config": self.plan.to_json(), "step": self.step, "scaler": self.scaler.state_dict()}
        suffix = "" if self.processes.fsdp else ".pth"
        path = self.files.path(f"_{self.step:08}{suffix}")
        if self.processes.fsdp:
            save_sharded(path, self.model, self.ema, self.optimizer, rest, self.processes)
        elif self.processes.first:
            save_checkpoint(path, self.model, self.ema, self.optimizer, rest)
        self.write_weights()
        if self.processes.first:
            self.files.record(path)
            self.files.prune(self.arguments.keep)
        self.processes.barrier()
        self.saved_step = self.step

    def write_weights(self) -> None:
        """The EMA weights, to sample from; every process must call it."""
        weights = gathered_state(self.ema) if self.processes.fsdp else self.ema.state_dict()
        if self.processes.first:
            whole = HDiT(self.plan)
            whole.load_state_dict(weights)
            whole.save_pretrained(self.files.path(".safetensors"))
        self.written_step = self.step

    # Training

    def train(self) -> bool:
        """Until ``--end-step``, or until somebody asks to stop; True if nobody did."""
        arguments, processes, signals = self.arguments, self.processes, self.signals
        keys = Keys(
            len(self.source),
            arguments.batch_size,
            seed=arguments.seed,
            first_step=self.step,
            accumulate=arguments.grad_accum_steps,
            rank=processes.rank,
            world=processes.world,
        )
        examples = Examples(self.source, self.plan.other.get("model", {}).get("augment_prob", 0.0))
        loading = load_batches(
            examples, keys, workers=arguments.num_workers, pin_memory=processes.device.type == "cuda"
        )
        if arguments.end_step is not None and self.step >= arguments.end_step:
            self.say(f"nothing is left to train: step {self.step} is reached, and --end-step is {arguments.end_step}")
        with self._log() as log, loading as batches:
            while arguments.end_step is None or self.step < arguments.end_step:
                taken = self._load(lambda: [next(batches) for _ in range(arguments.grad_accum_steps)])
                with signals.interruptible():
                    loss = self._train_step(taken, keys.global_batch)
                # All processes must do the same after the same step, whichever of them was asked to.
                asked = loss.new_tensor([signals.stop_wanted or self.showing.failed, signals.take_save()])
                seen = processes.mean(torch.cat([loss[None], asked, self.gradient_norm[None], self.by_level.flatten()]))
                loss, stopping, saving, norm, *_ = seen.tolist()
                if not math.isfinite(loss):
                    raise RuntimeError(f"the loss of step {self.step} is {loss}; try a lower --lr")
                by_level = self._by_level("loss by", seen[4:].view_as(self.by_level))
                with self.showing:
                    log.write(self.step, loss, keys.global_batch)
                    log.show(self.step, {"learning rate": self._learning_rate(), "gradient norm": norm} | by_level)
                if stopping or saving or self.step % arguments.save_every == 0:
                    self.save()
                if stopping:
                    self.showing.check()
                    return False
                try:
                    self._show(log)
                except SamplingStoppedError:
                    if self.step > self.saved_step:
                        self.save()
                    return False
                except Exception:  # such as memory that does not suffice for samples
                    if self.step > self.saved_step and processes.world == 1:  # others may wait for this one elsewhere
                        self.save()
                    raise
            if self.step > self.saved_step:  # before the log is closed, which may fail
                self.save()
        self.showing.check()
        return True

    def _show(self, log: Log) -> None:
        """What is due at this step of losses of held-out images, distances of samples, and grids."""
        arguments = self.arguments
        if self.step % arguments.eval_every == 0:
            if arguments.held_out:
                with self.signals.interruptible():
                    curves = self.evaluate()
                with self.showing:
                    log.show(self.step, curves)
            if arguments.eval_samples:
                curves = self.measure_samples()
                with self.showing:
                    log.show(self.step, curves)
        if arguments.demo_every and self.step % arguments.demo_every == 0:
            grid = self.demo(f"_demo_{self.step:08}.png")
            with self.showing:
                log.picture(self.step, grid)

    def _load(self, load: Callable[[], T]) -> T:
        """What ``load`` returns. Where it fails in a process, all of them save what they have learned, and end.

        Single images that cannot be read are skipped; here it is that the disk is gone.
        """
        loaded, problem = None, None
        try:
            with self.signals.interruptible():
                loaded = load()
        except Exception as error:  # of the many kinds that decoders and file systems raise
            problem = error
        if self.processes.any(problem is not None):
            if self.step > self.saved_step:
                self.save()
            raise problem or ValueError("another process of the run cannot read its images")
        return cast(T, loaded)

    def _train_step(self, batches: Sequence[list[Batch]], global_batch: int) -> Tensor:
        """One step of the optimiser; returns this process's part of the loss."""
        arguments, processes = self.arguments, self.processes
        # Dropout is all that draws from the global generator; a seed a step spares the checkpoint its state.
        torch.manual_seed(random.Random(f"{arguments.seed} step {self.step} {processes.rank}").getrandbits(63))
        self.by_level = torch.zeros_like(self.by_level)
        factor = learning_rate_factor(self.config["lr_sched"], self.step)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        losses = []
        for i, groups in enumerate(batches):
            with processes.accumulation(self.wrapped, last=i == len(batches) - 1):
                images, levels = self._losses(self.learner, groups, global_batch, drop_classes=True)
                loss = images.mean() / len(batches)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            self.by_level += sums_by_level(images.detach().float(), levels, self.objective.edges)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self._update_ema()
        self.step += 1
        return torch.stack(losses).sum()

    def _losses(
        self, learner: nn.Module, groups: Sequence[Batch], global_batch: int, *, drop_classes: bool
    ) -> tuple[Tensor, Tensor]:
        """Of each image, with its noise level; ``groups`` hold images of one shape each.

        Images of several shapes are packed and take one pass of the network where :attr:`packs` allows.
        """
        passes = [pack(groups)] if len(groups) > 1 and self.packs else [(group, None) for group in groups]
        parts = [self._pass(learner, *one, global_batch, drop_classes=drop_classes) for one in passes]
        losses, levels = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(levels)

    def _pass(
        self,
        learner: nn.Module,
        batch: Batch,
        shapes: list[tuple[int, int]] | None,
        global_batch: int,
        *,
        drop_classes: bool,
    ) -> tuple[Tensor, Tensor]:
        batch = Batch(*(tensor.to(self.processes.device, non_blocking=True) for tensor in batch))
        conditions: dict[str, Any] = {"aug_cond": batch.aug_cond}
        if shapes is not None:  # a list, which DistributedDataParallel does not move to the device
            conditions["shapes"] = shapes
        if self.plan.num_classes:
            rate = self.config["dataset"].get("cond_dropout_rate", 0.1) if drop_classes else 0.0
            drop = batch.uniform[:, 1] < rate
            conditions["class_cond"] = batch.label.masked_fill(drop, self.plan.num_classes)
        dtype = DTYPES.get(self.arguments.mixed_precision)
        with torch.autocast(self.processes.device.type, dtype, enabled=dtype is not None):
            return self.objective.losses(learner, batch, global_batch, conditions)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The EMA weights' loss of the held-out images, always under the same noise, as curves by name.

        Every process must call it.
        """
        learner = self.objective.around(self.ema, self.plan.sigma_data)
        sums = torch.zeros_like(self.by_level)
        batches = held_out_batches(self.held_out, self.arguments.batch_size, self.processes.rank, self.processes.world)
        while groups := self._load(lambda: next(batches, None)):
            losses, levels = self._losses(learner, groups, len(self.held_out), drop_classes=False)
            counts = torch.cat([group.place < len(self.held_out) for group in groups]).to(losses.device)
            sums += sums_by_level(losses[counts].float(), levels[counts], self.objective.edges)
        sums = self.processes.mean(sums)
        loss = (sums[0].sum() / sums[1].sum()).item()
        self.say(f"step {self.step}: held-out loss {loss:.4f}")
        return {"held-out loss": loss} | self._by_level("held-out loss by", sums)

    def _by_level(self, name: str, sums: Tensor) -> dict[str, float]:
        """Mean losses by noise level; a slash in their names makes one group of them."""
        level, edges = self.objective.level, self.objective.edges
        return means(sums, [f"{name} {level}/{bounds}" for bounds in level_names(level, edges)])

    def _learning_rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    @torch.no_grad()
    def _update_ema(self) -> None:
        schedule = self.config["ema_sched"]
        weight = 1 - ema_decay(self.step, schedule["power"], schedule["max_value"])
        for averaged, own in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            local(averaged).lerp_(local(own), weight)

    # What a run shows

    def _request(self, count: int) -> Request:
        """For ``count`` images of each class."""
        sampler, steps = DEFAULTS[self.plan.objective]
        return Request(
            classes=tuple(range(self.plan.num_classes)),
            count=count,
            sampler=sampler,
            steps=self.arguments.sample_steps or steps,
            seed=self.arguments.seed,
        )

    def _sample(self, request: Request) -> Iterator[Tensor]:
        """Batches of images of the EMA weights; every process must take all of them.

        Raises:
            SamplingStoppedError: a process was asked to stop.
        """

        def on_step() -> None:
            if self.processes.any(self.signals.stop_wanted):
                raise SamplingStoppedError

        return sample_batches(self.ema, self.plan, request, quiet=not self.processes.first, on_step=on_step)

    def measure_samples(self) -> dict[str, float]:
        """Distances of samples, as many of each class, from images of the data, as curves by name.

        Every process must call it; the first one returns them.
        """
        distances = self.distances
        assert distances is not None
        self._load(distances.load)
        count = -(-self.arguments.eval_samples // max(1, self.plan.num_classes))
        found = distances(self._sample(self._request(count)))
        self.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return found

    def demo(self, suffix: str) -> Image.Image:
        """Sample a grid, every class a row; the first process writes it.

        Raises:
            SamplingStoppedError: a process was asked to stop.
        """
        request = self._request(self.arguments.sample_n)
        images = torch.cat(list(self._sample(request)))
        grid = picture(images, self.plan, request)
        if self.processes.first:
            with self.showing:
                save_png(grid, self.files.path(suffix), asdict(request) | {"sha256": digest(images)})
        return grid

    def finish(self) -> bool:
        """The weights, the last grid and the loss curve; False if somebody asked to stop meanwhile."""
        if self.written_step != self.step:  # of a checkpoint that an earlier process saved, or another run
            self.write_weights()
        self.say(f"wrote {self.files.path('.safetensors')}")
        try:
            self.demo("_samples.png")
        except SamplingStoppedError:
            return False
        self.showing.check()
        self.say(f"wrote {self.files.path('_samples.png')}")
        if self.processes.first and (losses := self.files.losses(self.step)):
            save_loss_curve(losses, self.files.path("_loss.png"), f"{self.arguments.name}, {self.step} steps")
            self.say(f"wrote {self.files.path('_loss.png')}")
        self.showing.check()
        return True

    def say(self, text: str) -> None:
        if self.processes.first:
            with self.showing, writing(Path("standard output")):
                tqdm.write(text)

    def _log(self) -> Log:
        if not self.processes.first:
            return Log(None, self.step, None)
        arguments = self.arguments
        folder = self.files.path("_tensorboard")
        boards = Boards(folder, self.step, project=arguments.wandb, name=arguments.name, config=self.plan.to_json())
        return Log(self.files, self.step, arguments.end_step, boards)


def run(arguments: argparse.Namespace, processes: Processes) -> int:
    files = RunFiles(arguments.name)
    with files.own() if processes.first else nullcontext():
        trainer = Trainer(arguments, processes, files)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        trainer.say(f"{parameters:,} parameters, {processes.world} process(es) on {processes.device.type}")
        with trainer.signals as signals:
            if trainer.train() and trainer.finish():
                return 0
        command = "The same command without --resume" if arguments.resume else "The same command"
        trainer.say(f"stopped after step {trainer.step}; saved. {command} goes on from here.")
        return signals.status


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        arguments = parse_arguments(argv)
        with Processes(arguments.device, fsdp=arguments.fsdp) as processes:
            return run(arguments, processes)

    return run_command(body, when_interrupted="stopped at once; checkpoints that were saved before are whole")


if __name__ == "__main__":
    sys.exit(main())
