"""Trains a language model: a run's model, optimiser, text and files, from where it was left to its last step."""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from tqdm import tqdm

from natten_layers.io import hf
from natten_layers.io.checkpoints import load_plain, save_plain
from natten_layers.io.files import replacing
from natten_layers.modules.llm import DecoderLM, DecoderLMConfig

from .boards import Boards
from .checkpointing import MOMENTS, check_finite, check_moments
from .parallel import Processes
from .progress import progress
from .running import Showing, Signals, one_line, writing
from .text import SEPARATOR, Corpus, random_windows, read_corpus
from .tokens import Bytes, Codec, open_codec

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_config(args: argparse.Namespace) -> DecoderLMConfig:
    def window(layer: int) -> int | None:
        return None if args.full_every and (layer + 1) % args.full_every == 0 else args.window

    return DecoderLMConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=-(-8 * args.hidden // 48) * 16,  # 8/3 of the channels: as many weights as without a gate
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        windows=tuple(window(layer) for layer in range(args.layers)),
        max_positions=max(4096, 4 * args.context),
        qk_norm=True,
        tie_embeddings=False,
        sink=None if args.sink == "none" else args.sink,
        num_registers=args.registers,
    )


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Of step 0 .. end_step - 1: linear warm-up, then a cosine to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.end_step - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW that decays matrices only: gains, biases, sinks and registers are no weights."""
    decays = {name: p.ndim == 2 and not name.endswith("registers") for name, p in model.named_parameters()}
    groups = [
        {"params": [p for name, p in model.named_parameters() if decays[name] is decay], "weight_decay": weight}
        for decay, weight in ((True, args.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device.startswith("cuda"))


class Trainer:
    """One run: model, optimiser, text and files, and the step it is at."""

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        self.args, self.processes, self.device = args, processes, processes.device
        self.global_batch = args.batch_size * args.grad_accum_steps * processes.world
        self.checkpoint = args.name / "checkpoint.pt"
        if args.model:  # before the text is read, which takes longer
            self.config = hf.read_config(args.model, DecoderLMConfig)
            self.codec = open_codec(args.model, self.config.vocab_size)
        else:
            self.config, self.codec = model_config(args), Bytes()
        positions, model = self.config.max_positions, args.model or "a model of this context"
        for flag, length, before in (("context", args.context, 0), ("sample-tokens", args.sample_tokens, 1)):
            if before + length > positions:  # a separator stands before a sample
                raise ValueError(f"--{flag} {length}: {model} knows {positions} positions")
        self.separator = separator(self.config, self.codec)
        self.corpus: Corpus = read_corpus(
            args.data, args.pattern, args.held_out_bytes, None if args.model is None else self.codec, self.separator
        )
        if len(self.corpus.train) <= args.context + 1 or len(self.corpus.held_out) <= args.context + 1:
            raise ValueError(f"--context {args.context} is longer than the text to train on or the one held out")
        torch.manual_seed(args.seed)
        if args.model:
            self.model = DecoderLM.from_pretrained(args.model, device=self.device, dtype=torch.float32).train()
        else:
            self.model = DecoderLM(self.config, device=self.device)
        self.gradient_norm = torch.zeros(())
        self.wrapped = processes.wrap(self.model)
        self.run = torch.compile(self.wrapped) if args.compile else self.wrapped
        self.optimizer = make_optimizer(self.model, args)
        self.step, self.saved_step = 0, -1
        self.signals, self.showing = Signals(), Showing()
        if args.resume or self.checkpoint.exists():
            self.load(args.resume or self.checkpoint)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16")

    def logits(self, model: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        """Of ``tokens [B, L]`` on the CPU: ``[B * L, V]`` in fp32."""
        if not self.args.separate_documents:
            return model(tokens.to(self.device)).flatten(0, 1).float()
        bounds = document_bounds(tokens, self.separator)
        return model(tokens.reshape(1, -1).to(self.device), cu_seqlens=bounds)[0].float()

    def train_step(self) -> Tensor:
        """One step; its mean loss in nats per byte, on the device."""
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, args)
        # Every process draws the global batch and takes its part, so only its size decides what is learned.
        batch = random_windows(self.corpus.train, args.context, self.global_batch, args.seed * 2**32 + self.step)
        parts = batch.chunk(self.processes.world)[self.processes.rank].split(args.batch_size)
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            with self.processes.accumulation(self.wrapped, last=i == len(parts) - 1), self.autocast():
                targets = part[:, 1:].to(self.device)
                loss = F.cross_entropy(self.logits(self.run, part[:, :-1]), targets.flatten())
                (loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), args.grad_clip)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.processes.mean(total)

    @torch.no_grad()
    def bits_per_byte(self, limit: int | None = None) -> float:
        """Of the held-out text, or its first ``limit`` tokens.

        Every one is predicted from half a context or more, or from all of its file that stands before it.
        """
        context, stride = self.args.context, self.args.context // 2
        text = self.corpus.held_out[: None if limit is None else max(limit, context) + 1]
        targets = len(text) - 1
        starts = torch.arange(0, targets - context + stride, stride).clamp(max=targets - context)
        scored = torch.cat(
            (starts.new_zeros(1), starts[:-1] + context)
        )  # targets before this one are an earlier window's
        batches = list(zip(starts.split(self.args.batch_size), scored.split(self.args.batch_size), strict=True))
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        world, rank = self.processes.world, self.processes.rank
        # Sharded models run in step: a process without a batch of its own repeats the first, and does not count it.
        for i in range(rank, -(-len(batches) // world) * world, world):
            start, first = batches[i if i < len(batches) else 0]
            index = start[:, None] + torch.arange(context)
            tokens, following = (text[index + shift].long() for shift in (0, 1))
            with self.autocast():
                logits = self.logits(self.wrapped, tokens)
            losses = F.cross_entropy(logits, following.flatten().to(self.device), reduction="none")
            if i < len(batches):
                nats += losses[(index >= first[:, None]).flatten().to(self.device)].double().sum()
        if limit is None:
            size = self.corpus.held_out_bytes  # separators are predicted, but no bytes of a file
        else:
            size = targets * (self.corpus.held_out_bytes / len(self.corpus.held_out) if self.args.model else 1)
        return float(self.processes.mean(nats)) * world / size / math.log(2)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return get_state_dict(self.model, self.optimizer, options=WHOLE)

    def save(self) -> None:
        """Write model and checkpoint; every process must call it.

        The checkpoint comes last: after a kill before it, a resumed run writes the model again.
        """
        check_finite(self.model, self.processes)
        model, optimizer = self.state()
        if self.processes.first:
            hf.save(self.config, model, self.args.name / "model")
            if self.args.model:
                copy_companions(self.args.model, self.args.name / "model")
            state = {"model": model, "optimizer": optimizer, "step": self.step, "config": asdict(self.config)}
            save_plain(state, self.checkpoint)
        self.processes.barrier()
        self.saved_step = self.step

    def load(self, path: Path) -> None:
        try:
            state = load_plain(path)
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: leave --resume out to start") from None
        try:
            parts = "model", "optimizer", "step", "config"
            if missing := [name for name in parts if name not in state]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            model, optimizer, step, config = (state[name] for name in parts)
            if not isinstance(step, int) or not isinstance(config, dict):
                raise TypeError(f"its step is {step!r:.50}, its config {config!r:.50}")
        except Exception as error:
            raise ValueError(f"{path} is no checkpoint of this command: {one_line(error)}") from error
        if config != asdict(self.config):
            here = asdict(self.config)
            differ = [
                f"{key} is {config.get(key)} there, {here[key]} here" for key in here if config.get(key) != here[key]
            ]
            raise ValueError(f"{path} is of another model: {'; '.join(differ)}. Use its flags, or another --name.")
        try:
            # What is missing would be made anew, and the run would go on without what it had learned of its gradients.
            for name, moments in optimizer["state"].items():
                if missing := MOMENTS - moments.keys():
                    raise ValueError(f"the optimizer's state of {name} lacks {', '.join(sorted(missing))}")
            set_state_dict(
                self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=WHOLE
            )
            check_moments(self.optimizer)
        except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds other content than this command saves: {error!r}") from error
        self.step = step
        if self.processes.first:
            print(f"resuming from {path} at step {step}")

    def sample(self) -> str:
        """Text from the start of a file on; every process must call it."""
        model = self.model
        if self.args.fsdp:  # no process holds the model: gather it
            weights, _ = self.state()
            if not self.processes.first:
                return ""
            model = DecoderLM(self.config, device=self.device)
            model.load_state_dict(weights)
        if not self.processes.first:
            return ""
        with self.autocast():
            prompt = torch.full((1, 1), self.separator, device=self.device)
            out = model.generate(prompt, self.args.sample_tokens, temperature=0.8, generator=self.args.seed)
        stream = self.codec.stream([self.separator])
        text = "".join(map(stream.add, out[0, 1:].tolist())) + stream.end()
        # An untrained model also writes what moves a terminal's cursor.
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)

    def train(self) -> int:
        """To the last step, or until told to stop; returns the exit status."""
        first = self.processes.first
        with self._boards() if first else nullcontext() as boards:
            with self.signals as signals:
                stopped = self._steps(boards)
                if self.step > self.saved_step:
                    self.save()
            self.showing.check()
            if not stopped:
                self.report(boards)
                self.showing.check()
                return 0
        if first:
            print(f"stopped at step {self.step}; the same command goes on from here")
        return signals.status

    def _boards(self) -> closing[Boards]:
        args = self.args
        folder = args.name / "tensorboard"
        return closing(Boards(folder, self.step, project=args.wandb, name=str(args.name), config=asdict(self.config)))

    def _steps(self, boards: Boards | None) -> bool:
        """Train to the last step; True if told to stop."""
        args, signals = self.args, self.signals
        clock, since = time.perf_counter(), self.step
        shown = boards is not None
        if shown and since >= args.end_step:
            print(f"nothing is left to train: step {since} is reached, and --end-step is {args.end_step}")
        with progress(args.end_step, initial=self.step, unit="step", disable=not shown) as bar:
            while self.step < args.end_step:
                with signals.interruptible():
                    loss = self.train_step()
                bar.update()
                if self.step % 10 == 0:
                    now = time.perf_counter()
                    speed = (self.step - since) * self.global_batch * args.context / (now - clock)
                    clock, since = now, self.step
                    bits = float(loss) / math.log(2)
                    if not math.isfinite(bits):
                        raise RuntimeError(f"the loss of step {self.step} is {bits}; try a lower --lr")
                    unit = "token" if args.model else "byte"
                    bar.set_postfix_str(f"{bits:.3f} bits/{unit}, {speed:.3g} {unit}s/s", refresh=False)
                    norm = float(self.gradient_norm)  # of a sharded model, gathered by every process
                    if boards is not None:
                        rate = self.optimizer.param_groups[0]["lr"]
                        curves = {f"bits per {unit}/train": bits, f"{unit}s per second": speed}
                        with self.showing:
                            boards.scalars(self.step, curves | {"learning rate": rate, "gradient norm": norm})
                # All processes must do the same after the same step, whichever of them was asked to.
                if self.processes.any(signals.stop_wanted or self.showing.failed):
                    return True
                evaluating = self.step % args.eval_every == 0 and self.step < args.end_step
                if self.processes.any(signals.take_save()) or evaluating:
                    self.save()
                if evaluating:
                    with signals.interruptible():
                        self.report(boards, args.eval_tokens)
                    clock, since = time.perf_counter(), self.step
        return False

    def report(self, boards: Boards | None, limit: int | None = None) -> None:
        """Held-out bits per byte, beside xz's if of the whole held-out text, and a sample."""
        bits = self.bits_per_byte(limit)
        text = self.sample() if self.args.sample_tokens else ""
        if boards is None:
            return
        lines = [f"step {self.step}: {bits:.4f} bits per byte held out"]
        if limit is None:
            lines[0] += f" ({self.corpus.held_out_bytes} bytes); xz -9: {self.corpus.xz_bits_per_byte:.4f}"
        if text:
            lines += ["-" * 80, text, "-" * 80]
        with self.showing, writing(Path("standard output")):
            tqdm.write("\n".join(lines))
        with self.showing:
            boards.scalars(self.step, {"bits per byte/held out": bits})
            if text:
                boards.text(self.step, "sample", text)


def separator(config: DecoderLMConfig, codec: Codec) -> int:
    """The token between files, and before the first.

    Raises:
        ValueError: a model that names no token at which texts begin or end.
    """
    if isinstance(codec, Bytes):
        return SEPARATOR[0]
    if not config.stop_tokens:
        raise ValueError("the model's config.json names no eos_token_id, which separates files of text")
    return config.stop_tokens[0]


def document_bounds(tokens: Tensor, separator: int) -> Tensor:
    """Where documents begin in the rows of ``tokens [B, L]``, one after the other, and where the last one ends.

    A document begins with the separator, and with each row.
    """
    begins = tokens == separator
    begins[:, 0] = True
    return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=tokens.numel())


def copy_companions(source: Path, target: Path) -> None:
    """What natten-layers-generate and transformers read beside the weights."""
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in (*tokenizer, "generation_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            with replacing(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
