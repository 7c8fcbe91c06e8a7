"""Sample images from an HDiT checkpoint: a safetensors file in, one PNG grid out.

natten-layers-sample-hdit model.safetensors --classes cat coffee -n 8 --guidance 2 --output samples.png

The grid's metadata says how it was made; ``--reproduce GRID.png`` samples it again and checks that it is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from natten_layers import Denoiser, HDiT, HDiTConfig

from .diffusion import SAMPLERS, guided, karras_sigmas
from .pictures import draw_grid, read_record, save_png
from .running import MOST_SEED, Parser, check_device, run_command, seed


@dataclass(frozen=True)
class Request:
    """What to sample. Two equal requests to the same model give the same images on the same machine."""

    classes: tuple[int, ...] = ()
    """one row of the grid each; empty for a model without classes"""
    count: int = 8
    """images per class, or in all for a model without classes"""
    size: tuple[int, int] | None = None
    """(height, width); None is the size trained at"""
    sampler: str = "dpmpp-2m"
    steps: int = 50
    guidance: float = 1.0
    seed: int = 0
    batch_size: int = 64

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Request:
        """From ``asdict`` by way of JSON, which has no tuples.

        Raises:
            KeyError, TypeError, ValueError: a record of another kind.
        """
        size = record["size"]
        request = cls(**{**record, "classes": tuple(record["classes"]), "size": tuple(size) if size else None})
        counts = (
            *request.classes,
            *(request.size or ()),
            request.count,
            request.steps,
            request.seed,
            request.batch_size,
        )
        if any(type(count) is not int for count in counts) or type(request.guidance) is not float:
            raise TypeError(f"a number is of another type in {dict(record)}")
        in_range = 0 <= request.seed <= MOST_SEED and min(request.count, request.steps, request.batch_size) >= 1
        if request.sampler not in SAMPLERS or not in_range:
            raise ValueError(f"a sampler or number is out of range in {dict(record)}")
        return request


def sample(
    denoiser: Denoiser,
    config: HDiTConfig,
    request: Request,
    *,
    quiet: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Images ``[N, C, H, W]`` on the model's device, class by class. What ``on_step`` raises ends it."""
    device = next(denoiser.parameters()).device
    size = request.size or config.input_size
    labels = torch.tensor(request.classes, dtype=torch.long).repeat_interleave(request.count)
    total = len(labels) or request.count
    noise = torch.randn((total, config.input_channels, *size), generator=torch.Generator().manual_seed(request.seed))
    sigmas = karras_sigmas(request.steps, config.sigma_min, config.sigma_max)
    images = []
    with (
        torch.inference_mode(),
        tqdm(
            total=request.steps * -(-total // request.batch_size),
            desc="sampling",
            unit="step",
            leave=False,
            disable=quiet,
        ) as bar,
    ):

        def progress(steps: int) -> None:
            bar.update(steps)
            on_step()

        for start in range(0, total, request.batch_size):
            x = noise[start : start + request.batch_size].to(device) * config.sigma_max
            denoise = denoiser
            if request.classes:
                batch = labels[start : start + request.batch_size].to(device)
                denoise = guided(denoiser, batch, config.num_classes, request.guidance)
            images.append(SAMPLERS[request.sampler](denoise, x, sigmas, progress))
    return torch.cat(images)


def digest(images: Tensor) -> str:
    """Of every bit, before rounding to a picture's 8."""
    return hashlib.sha256(images.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def class_names(config: HDiTConfig) -> list[str]:
    """The names in the config, or numbers.

    Raises:
        ValueError: another number of names than of classes.
    """
    names = config.other.get("dataset", {}).get("class_names") or range(config.num_classes)
    if len(names) != config.num_classes:
        raise ValueError(f"the model's config has {config.num_classes} classes, but names {len(names)}: {list(names)}")
    return [str(name) for name in names]


def picture(images: Tensor, config: HDiTConfig, request: Request) -> Image.Image:
    names = class_names(config)
    columns = request.count if request.classes else max(1, round(len(images) ** 0.5))
    return draw_grid(images, columns, [names[label] for label in request.classes])


def parse_classes(values: Sequence[str] | None, config: HDiTConfig) -> tuple[int, ...]:
    """Names or numbers to numbers; all classes if none are given.

    Raises:
        ValueError: a class that the model does not have.
    """
    names = class_names(config)
    if values is None:
        return tuple(range(config.num_classes))
    known = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(len(names))}
    unknown = [value for value in values if value not in known]
    if unknown:
        has = f"classes 0 to {len(names) - 1}: {', '.join(names)}" if names else "no classes"
        raise ValueError(f"--classes {' '.join(unknown)}: this model has {has}")
    return tuple(known[value] for value in values)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a safetensors file, or a training checkpoint (.pth)")
    parser.add_argument("--config", type=Path, help="JSON config, for a checkpoint that holds none")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="default: %(default)s")
    parser.add_argument("--reproduce", type=Path, metavar="PNG", help="sample this grid again; fail if it differs")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers, default: all")
    parser.add_argument("-n", "--count", type=int, default=8, help="images per class, default: %(default)s")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: as trained")
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpmpp-2m", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance scale, 1 is none")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time, default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    check_device(parser, arguments.device)
    output = arguments.output
    if output.suffix.lower() != ".png":
        parser.error(f"--output must end with .png, which holds how the grid was made, got {output}")
    folder = next(path for path in output.absolute().parents if path.exists())  # what is missing is made
    if not arguments.reproduce and not (folder.is_dir() and os.access(folder, os.W_OK)):
        parser.error(f"--output {output}: nothing can be written to {folder}")
    if min(arguments.size or (1, 1)) < 1:
        parser.error(f"--size must be at least 1, got {arguments.size}")
    for name in ("count", "steps", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    config = HDiTConfig.from_json(arguments.config) if arguments.config else None
    model = HDiT.from_pretrained(arguments.checkpoint, config=config).to(arguments.device)
    config = model.config
    if config.mapping_cond_dim:
        raise ValueError(f"{arguments.checkpoint} needs a mapping_cond, which this command cannot give it")
    if arguments.guidance != 1 and not config.num_classes:
        raise ValueError(f"--guidance {arguments.guidance} needs classes, and {arguments.checkpoint} has none")
    if arguments.reproduce:
        record = read_record(arguments.reproduce)
        try:
            expected = record.pop("sha256")
            request = Request.from_record(record)
            if any(not 0 <= label < config.num_classes for label in request.classes):
                raise ValueError(f"it shows classes {request.classes}, of which the model has {config.num_classes}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{arguments.reproduce} was made by another version or model: {error}") from error
    else:
        expected = None
        request = Request(
            classes=parse_classes(arguments.classes, config),
            count=arguments.count,
            size=tuple(arguments.size) if arguments.size else None,
            sampler=arguments.sampler,
            steps=arguments.steps,
            guidance=arguments.guidance,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
        )
    images = sample(Denoiser(model), config, request)
    found = digest(images)
    if expected is None:
        save_png(picture(images, config, request), arguments.output, asdict(request) | {"sha256": found})
        print(f"wrote {arguments.output}")
        return 0
    same = found == expected
    print(f"{arguments.checkpoint} gives {'the same' if same else 'OTHER'} images as {arguments.reproduce}")
    print(f"sha256 {found}" + ("" if same else f", but the grid was made from {expected}"))
    return 0 if same else 1


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: run(parse_arguments(argv)), when_interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
