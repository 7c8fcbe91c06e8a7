"""Images that models make of the same noise in few and in many steps, a row each, a column for a class.

natten-layers-train-hdit --name runs/demo
natten-layers-train-hdit --objective meanflow --name runs/meanflow
python examples/compare_steps.py runs/meanflow.safetensors:1,2,4 runs/demo.safetensors:50 --output steps.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from natten_layers import HDiT
from natten_layers_cli.outputs import check_output
from natten_layers_cli.pictures import draw_grid, save_png
from natten_layers_cli.running import Parser, check_device, run_command
from natten_layers_cli.sample_hdit import DEFAULTS, Request, class_names, sample


def steps_of(entry: str) -> tuple[str, tuple[int, ...]]:
    """The file and the numbers of steps of ``FILE:STEPS,...``."""
    path, _, steps = entry.rpartition(":")
    numbers = tuple(int(number) if number.isdecimal() else 0 for number in steps.split(","))
    if not path or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of steps behind the file, such as FILE:1,2,4; got {entry}")
    return path, numbers


def run(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, least={"count": 1})
    parser.add_argument(
        "models", nargs="+", type=steps_of, metavar="FILE:STEPS,...", help="trained on images of one size and classes"
    )
    parser.add_argument("--output", type=Path, default=Path("steps.png"), help="the picture, a name with .png")
    parser.add_argument("--count", type=int, default=12, help="images in a row, of one class after another")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to run on")
    arguments = parser.parse(argv)
    check_device(parser, arguments.device)
    check_output(parser, "--output", arguments.output, [".png"])
    loaded = [HDiT.from_pretrained(path) for path, _ in arguments.models]
    classes = [class_names(model.config) for model in loaded]
    heads = [[names[i % len(names)] for i in range(arguments.count)] if names else [] for names in classes]
    if any(others != heads[0] for others in heads):
        raise ValueError(f"columns would show different classes: {', '.join(map(str, heads))}")
    shown = [i % len(classes[0]) for i in range(arguments.count)] if classes[0] else []
    rows, labels = [], []
    for model, (_, steps) in zip(loaded, arguments.models, strict=True):
        objective = model.to(arguments.device).config.objective
        for number in steps:
            request = Request(
                classes=tuple(shown),
                count=1 if shown else arguments.count,
                sampler=DEFAULTS[objective][0],
                steps=number,
            )
            rows.append(sample(model, model.config, request).cpu())
            labels.append(f"{objective}, {number} step{'s' if number > 1 else ''}")
        model.cpu()  # the device holds one model at a time
    models = [f"{path}:{','.join(map(str, steps))}" for path, steps in arguments.models]
    save_png(draw_grid(torch.cat(rows), arguments.count, labels, heads[0]), arguments.output, {"models": models})
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
