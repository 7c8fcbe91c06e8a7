"""Trains an HDiT: a run's model, optimiser and averaged weights, from where it was left to its last step."""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from natten_layers import HDiT, HDiTConfig
from natten_layers.io.checkpoints import read_hdit

from .batches import Batch, Examples, Keys, load_batches, pack
from .boards import Boards, Log
from .checkpointing import (
    DamagedError,
    RunFiles,
    check_finite,
    gathered_state,
    load_checkpoint,
    load_sharded,
    save_checkpoint,
    save_sharded,
)
from .diffusion import ema_decay, learning_rate_factor
from .held_out import held_out_batches, level_names, means, sums_by_level
from .objectives import open_objective
from .parallel import Processes, local
from .pictures import save_loss_curve, save_png
from .running import Showing, Signals, writing
from .sampled import Samples, SamplingStoppedError
from .starting_weights import kv_heads, load_weights, with_kv_heads
from .training_config import naming_config
from .training_data import open_training_data

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A run: what it trains, on what, and how far it has come."""

    def __init__(self, arguments: argparse.Namespace, processes: Processes, files: RunFiles) -> None:
        self.arguments, self.processes, self.files = arguments, processes, files
        self.signals, self.showing = Signals(), Showing()
        start = read_hdit(arguments.resume_inference) if arguments.resume_inference else None
        data = open_training_data(arguments, processes, self.say)
        self.config, self.plan = data.config, data.plan
        self.source, self.held_out, self.distances = data.source, data.held_out, data.distances
        if start is not None and start[0] is not None:
            with naming_config(arguments.resume_inference):
                self._take_kv_heads(HDiTConfig.from_json(start[0]))
        with naming_config(arguments.config):
            self.objective = open_objective(self.config, self.plan)

        torch.manual_seed(arguments.seed)
        with naming_config(arguments.config):
            self.model = HDiT(self.plan, checkpointing=arguments.checkpointing)
        if start is not None:  # a checkpoint of the run itself, loaded below, wins
            load_weights(self.model, start[1], arguments.resume_inference, arguments.reset)
        self.model.to(processes.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if arguments.compile:
            self.model.compile()
        self.wrapped = processes.wrap(self.model)
        if processes.fsdp:
            processes.shard(self.ema, reshard=True)  # it has no backward pass, and is updated in parts
        self.samples = Samples(
            self.ema, self.plan, processes, self.signals, steps=arguments.sample_steps, seed=arguments.seed
        )
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

    def _take_kv_heads(self, stored: HDiTConfig) -> None:
        """Those of the weights that the run starts from."""
        path, here = self.arguments.resume_inference, kv_heads(self.plan)
        self.plan = with_kv_heads(self.plan, stored, path)
        if (there := kv_heads(self.plan)) != here:
            self.say(f"the levels have {there} KV heads, as in {path}, not {here} as in the config")

    # Checkpoints

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole, and say so where that is not the one expected."""
        paths, problem = ([self.arguments.resume], "") if self.arguments.resume else self.files.checkpoints()
        problems = [problem] if problem else []
        load = load_sharded if self.processes.fsdp else load_checkpoint
        for path in paths:
            if path.exists() and path.is_dir() != self.processes.fsdp:
                kind = "a file, as runs without --fsdp save" if self.processes.fsdp else "a folder, as --fsdp saves"
                raise ValueError(f"{path} is {kind}: name a checkpoint of a run like this one")
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

    def measure_samples(self) -> dict[str, float]:
        """Distances of samples, as many of each class, from images of the data, as curves by name.

        Every process must call it; the first one returns them.
        """
        distances = self.distances
        assert distances is not None
        self._load(distances.load)
        count = -(-self.arguments.eval_samples // max(1, self.plan.num_classes))
        found = distances(self.samples.batches(self.samples.request(count)))
        self.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return found

    def demo(self, suffix: str) -> Image.Image:
        """Sample a grid, every class a row; the first process writes it.

        Raises:
            SamplingStoppedError: a process was asked to stop.
        """
        grid, record = self.samples.grid(self.arguments.sample_n)
        if self.processes.first:
            with self.showing:
                save_png(grid, self.files.path(suffix), record)
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
