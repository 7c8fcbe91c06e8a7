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
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from natten_layers.io.files import read_json

from .batches import default_workers
from .checkpointing import RunFiles
from .distances import NAMES
from .hdit_trainer import DTYPES, Trainer
from .parallel import Processes
from .presets import PRESETS
from .running import (
    SIGNALS_HELP,
    Parser,
    check_device,
    list_length,
    positive,
    run_command,
    seed,
    take_out_flags_that_are_on,
    worker_count,
)
from .training_config import section_of

KINDS = {"diffusion": "demo", "meanflow": "meanflow"}  # the presets of an objective, after the device's name


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
        choices=list(PRESETS),
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
    config = arguments.config or PRESETS[preset]
    content = read_json(config)
    section = section_of(content, "run", config)
    here = parser.parse_section(section, f'{config}: config["run"]', without=["config", "preset"])
    arguments = parser.parse(argv, here)
    arguments.config, arguments.content = config, content
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
    less_memory = ["a smaller --batch-size with more --grad-accum-steps", "--checkpointing"]

    def body() -> int:
        arguments = parse_arguments(argv)
        take_out_flags_that_are_on(less_memory, arguments)
        with Processes(arguments.device, fsdp=arguments.fsdp) as processes:
            return run(arguments, processes)

    return run_command(
        body,
        when_interrupted="stopped at once; checkpoints that were saved before are whole",
        less_memory=less_memory,
    )


if __name__ == "__main__":
    sys.exit(main())
