"""Train a language model: of bytes, with windows, grouped heads, zero attention and registers, or a Hugging Face one.

natten-layers-train-lm                                              Python's source; minutes on two CPU cores
natten-layers-train-lm --data ~/notes --pattern '*.md' --name runs/notes
natten-layers-train-lm --model ~/models/Qwen3-0.6B --data book.txt --name runs/book    # from its weights, in its tokens
natten-layers-train-lm --config examples/configs/lm-gpu.toml --sink none --registers 0
torchrun --nproc-per-node 2 -m natten_layers_cli.train_lm --fsdp --name runs/two-gpus

NAME/ gets checkpoint.pt (the same command goes on from there), model/ (config.json and safetensors, for
natten-layers-generate) and tensorboard/. At the end, bits per byte on held-out files are compared with ``xz -9`` on the
same files. A config file is TOML whose keys are the flags' names, with _ for -; flags win over it. While a run lasts,
NAME/lock keeps others away.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from natten_layers.io.files import leftovers, read_short

from .lm_trainer import Trainer
from .parallel import Processes
from .running import SIGNALS_HELP, Parser, check_device, list_length, positive, run_command, running_alone, seed

SIZES = {
    "layers": 4, "hidden": 128, "heads": 4, "kv_heads": 2, "window": 64, "full_every": 4, "sink": "zero", "registers": 4
}  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    switch = argparse.BooleanOptionalAction
    positives = ("layers", "hidden", "heads", "kv_heads", "window", "end_step", "batch_size", "grad_accum_steps")
    counts = ("full_every", "registers", "warmup", "held_out_bytes", "sample_tokens", "weight_decay")
    least = {"context": 2} | dict.fromkeys(counts, 0) | dict.fromkeys((*positives, "eval_every", "eval_tokens"), 1)
    parser = Parser(description=__doc__, epilog=SIGNALS_HELP, least=least)
    parser.add_argument("--config", type=Path, help="TOML file with defaults for these flags")
    parser.add_argument("--data", type=Path, help="text file, or folder of them; default: Python's standard library")
    parser.add_argument("--pattern", help="glob of the files to read in a folder")
    parser.add_argument("--name", type=Path, default=Path("runs/lm"), help="folder of the run, default: %(default)s")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from this checkpoint, not from NAME's")
    sizes = ", ".join(f"--{key.replace('_', '-')} {size}" for key, size in SIZES.items())
    model = parser.add_argument_group("model", f"without --model, by default: {sizes}")
    model.add_argument(
        "--model", type=Path, metavar="DIR", help="start from this Hugging Face model, with its tokenizer"
    )
    model.add_argument("--layers", type=list_length, help="blocks")
    model.add_argument("--hidden", type=int, help="channels")
    model.add_argument("--heads", type=int, help="query heads")
    model.add_argument("--kv-heads", type=int, help="heads that query heads share")
    model.add_argument("--window", type=int, help="bytes that a windowed layer sees")
    model.add_argument("--full-every", type=int, help="every so many layers one sees all; 0: none does")
    model.add_argument("--sink", choices=("none", "zero", "learned"), help="zero: softmax1")
    model.add_argument("--registers", type=int, help="learned tokens per layer that all bytes see")
    train = parser.add_argument_group("training")
    train.add_argument("--context", type=int, default=256, help="tokens of a training example; without --model, bytes")
    train.add_argument(
        "--separate-documents",
        action=switch,
        default=False,
        help="files do not see each other, and begin at 0",
    )
    train.add_argument("--end-step", type=int, default=800, help="stop after so many steps in all")
    train.add_argument("--batch-size", type=list_length, default=16, help="examples per process and accumulation step")
    train.add_argument("--grad-accum-steps", type=list_length, default=1, help="batches per optimiser step")
    train.add_argument(
        "--lr", type=positive, help="after warm-up; a cosine takes it to a tenth; default: 3e-3, or 2e-5"
    )
    train.add_argument("--warmup", type=int, default=50, help="steps")
    train.add_argument("--weight-decay", type=float, default=0.1, help="of matrices, by AdamW")
    train.add_argument("--grad-clip", type=positive, default=1.0, help="largest norm of the gradient")
    train.add_argument("--seed", type=seed, default=0, help="of the first weights and the order of examples")
    train.add_argument("--eval-every", type=int, default=200, help="steps between validation, sample and checkpoint")
    train.add_argument("--eval-tokens", type=int, default=32768, help="held-out tokens of a validation, all at the end")
    train.add_argument(
        "--held-out-bytes",
        type=int,
        default=0 if cuda else 200000,
        help="most bytes of held-out files to keep for the comparison at the end; 0: all",
    )
    train.add_argument("--sample-tokens", type=int, default=256, help="length of the text printed; 0: none")
    train.add_argument("--wandb", metavar="PROJECT", help="draw curves in this project of Weights & Biases")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda" if cuda else "cpu", help="to train on")
    machine.add_argument(
        "--mixed-precision", choices=("no", "bf16"), default="bf16" if cuda else "no", help="autocast to this type"
    )
    machine.add_argument("--compile", action=switch, default=False, help="torch.compile the model")
    machine.add_argument("--fsdp", action=switch, default=False, help="shard the model over torchrun's processes")
    config = parser.parse_known_args(argv)[0].config
    args = parser.parse(argv, None if config is None else _read_flags(config, parser))
    given_sizes = [key for key in SIZES if getattr(args, key) is not None]
    if args.model and given_sizes:
        parser.error(f"--model brings its own sizes: leave --{given_sizes[0].replace('_', '-')} away")
    if args.full_every == 1 and "window" in parser.given(argv):
        parser.error(f"--full-every 1 lets every layer see all: leave --window {args.window} away")
    vars(args).update({key: size for key, size in SIZES.items() if getattr(args, key) is None})
    args.lr = args.lr if args.lr is not None else 2e-5 if args.model else 3e-3
    check_device(parser, args.device)
    return args


def _read_flags(path: Path, parser: Parser) -> argparse.Namespace:
    """A config file's values, checked as flags are."""
    content = read_short(path)
    try:
        values = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    return parser.parse_section(values, str(path), without=["config"])


def remove_leftovers(name: Path) -> None:
    """What a run that was killed left half written; the run holds the lock of ``name``."""
    for folder in (name, name / "model"):
        for path, _ in leftovers(folder):
            path.unlink()


def run(args: argparse.Namespace, processes: Processes) -> int:
    with running_alone(args.name / "lock", f"training {args.name}") if processes.first else nullcontext():
        if processes.first:
            remove_leftovers(args.name)
        trainer = Trainer(args, processes)
        if processes.first:
            count = sum(p.numel() for p in trainer.model.parameters())
            size, unit = len(trainer.corpus.train), "million tokens" if args.model else "MB of text"
            print(f"{count / 1e6:.2f} M parameters, {size / 1e6:.1f} {unit}, device {processes.device}")
        return trainer.train()


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        args = parse_arguments(argv)
        with Processes(args.device, fsdp=args.fsdp) as processes:
            return run(args, processes)

    return run_command(body, less_memory=["a smaller --batch-size with more --grad-accum-steps", "a shorter --context"])


if __name__ == "__main__":
    sys.exit(main())
