"""Sample images from an HDiT checkpoint: a safetensors file in, one PNG grid or single images out.

natten-layers-sample-hdit model.safetensors --classes cat coffee -n 8 --guidance 2 --output samples.png
natten-layers-sample-hdit model.safetensors -n 1000 --out samples      # samples/cat_00000.png, ...

A model that was trained with --objective meanflow samples in one step, or in the few that --steps says.
The grid's metadata says how it was made; ``--reproduce GRID.png`` samples it again and checks that it is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from natten_layers import Denoiser, HDiT, HDiTConfig, MeanFlow

from .diffusion import SAMPLERS, guided, karras_sigmas, sample_meanflow
from .outputs import check_output, check_output_folder
from .pictures import draw_grid, read_record, save_png, to_image
from .progress import progress
from .running import (
    MOST_LENGTH,
    MOST_SEED,
    MOST_SIDE,
    Parser,
    check_device,
    list_length,
    run_command,
    running_alone,
    seed,
    side,
)

MEANFLOW = "meanflow"
LONGEST_NAME = 200  # bytes of a class in the name of a file, which may have 255
DEFAULTS = {"diffusion": ("dpmpp-2m", 50), MEANFLOW: (MEANFLOW, 1)}
"""The sampler and its number of steps, by the model's objective."""


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
        in_range = in_range and max(request.count, request.steps) <= MOST_LENGTH
        in_range = in_range and max(request.size or (1,)) <= MOST_SIDE
        if request.sampler not in (*SAMPLERS, MEANFLOW) or not in_range:
            raise ValueError(f"a sampler or number is out of range in {dict(record)}")
        return request


def check_sampler(config: HDiTConfig, request: Request) -> None:
    """Refuse what a model of this objective cannot do.

    Raises:
        ValueError: another objective's sampler, or guidance of average velocities.
    """
    usual, _ = DEFAULTS[config.objective]
    if (request.sampler == MEANFLOW) != (config.objective == MEANFLOW):
        raise ValueError(f"--sampler {request.sampler}: this model's objective is {config.objective}; use {usual}")
    if config.objective == MEANFLOW and request.guidance != 1:
        raise ValueError(f"--guidance {request.guidance} does not apply to average velocities; leave it out")


def sample(model: HDiT, config: HDiTConfig, request: Request) -> Tensor:
    """Images ``[N, C, H, W]`` on the model's device, class by class."""
    return torch.cat(list(sample_batches(model, config, request)))


def sample_batches(
    model: HDiT,
    config: HDiTConfig,
    request: Request,
    *,
    quiet: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """What :func:`sample` returns, in batches as they are made. What ``on_step`` raises ends it."""
    device = next(model.parameters()).device
    size = request.size or config.input_size
    labels = torch.tensor(request.classes, dtype=torch.long).repeat_interleave(request.count)
    total = len(labels) or request.count
    generator = torch.Generator().manual_seed(request.seed)
    steps = request.steps * -(-total // request.batch_size)
    with progress(steps, "sampling", unit="step", leave=False, disable=quiet) as bar:

        def advance(steps: int) -> None:
            bar.update(steps)
            on_step()

        for start in range(0, total, request.batch_size):
            count = min(request.batch_size, total - start)
            x = torch.randn((count, config.input_channels, *size), generator=generator).to(device)
            batch = labels[start : start + request.batch_size].to(device) if request.classes else None
            yield _sample_batch(model, config, request, x, batch, advance)


@torch.inference_mode()
def _sample_batch(
    model: HDiT,
    config: HDiTConfig,
    request: Request,
    noise: Tensor,
    labels: Tensor | None,
    progress: Callable[[int], None],
) -> Tensor:
    if config.objective == MEANFLOW:
        velocity = partial(MeanFlow(model), class_cond=labels)
        return sample_meanflow(velocity, noise, request.steps, progress) * config.sigma_data
    denoiser: Callable[..., Tensor] = Denoiser(model)
    if labels is not None:
        denoiser = guided(denoiser, labels, config.num_classes, request.guidance)
    sigmas = karras_sigmas(request.steps, config.sigma_min, config.sigma_max)
    return SAMPLERS[request.sampler](denoiser, noise * config.sigma_max, sigmas, progress)


def check_pixels(images: Tensor) -> None:
    """Refuse what a picture would show as black or white pixels, as if the model had made these.

    Raises:
        RuntimeError: a pixel is NaN or infinite.
    """
    if not bool(images.isfinite().all()):
        raise RuntimeError("the model's images hold NaN or infinity: its weights are damaged; use an older checkpoint")


def file_starts(names: Sequence[str]) -> list[str]:
    """What the names of files of each class begin with: its name, or its number and its name where that is no file's.

    So it is where names differ only in characters that no file's name has, or are too long, or would hide the file.
    """
    safe = [name.encode(errors="replace").decode().replace(os.sep, "-").replace("\0", "-") for name in names]
    count = Counter(safe)
    fit = {name for name in safe if count[name] == 1 and name[:1] != "." and len(name.encode()) <= LONGEST_NAME}
    starts = []
    for label, name in enumerate(safe):
        start = name if name in fit else f"{label}-{name.encode()[:LONGEST_NAME].decode(errors='ignore')}"
        while name not in fit and start in fit:  # another class is called so
            start += "-"
        starts.append(f"{start}_")
    return starts


def write_images(model: HDiT, config: HDiTConfig, request: Request, folder: Path) -> int:
    """Write each image as ``CLASS_NUMBER.png``, or ``NUMBER.png`` without classes; returns how many there are.

    Raises:
        ValueError: the folder holds images, with which these would be mixed, or another process writes to it.
    """
    starts, number = file_starts(class_names(config)), 0
    with running_alone(folder / ".lock", f"writing images to {folder}"):
        if any(folder.glob("*.png")):
            raise ValueError(
                f"--out {folder} holds images already, with which these would be mixed: name another folder"
            )
        for images in sample_batches(model, config, request):
            check_pixels(images)
            for image in images:
                label, place = divmod(number, request.count)
                start = starts[request.classes[label]] if request.classes else ""
                save_png(to_image(image), folder / f"{start}{place:05}.png", asdict(request))
                number += 1
    return number


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
    """Names or numbers to numbers; all classes if none are given. What is a name is not taken for a number.

    Raises:
        ValueError: a class that the model does not have, or the same class twice.
    """
    names = class_names(config)
    if values is None:
        return tuple(range(config.num_classes))
    known = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    unknown = [value for value in values if value not in known]
    if unknown:
        has = f"classes 0 to {len(names) - 1}: {', '.join(names)}" if names else "no classes"
        raise ValueError(f"--classes {' '.join(unknown)}: this model has {has}")
    classes = tuple(known[value] for value in values)
    if len(set(classes)) < len(classes):
        raise ValueError(f"--classes {' '.join(values)}: names a class twice; --count says how many images of each")
    return classes


WHAT_TO_SAMPLE = tuple(field.name for field in fields(Request))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, least=dict.fromkeys(("size", "count", "steps", "batch_size"), 1))
    parser.add_argument("checkpoint", type=Path, help="a safetensors file, or a training checkpoint (.pth)")
    parser.add_argument("--config", type=Path, help="JSON config, in place of the checkpoint's, or where it holds none")
    parser.add_argument(
        "--output", type=Path, default=Path("samples.png"), help="the grid, a name with .png; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write single images there, and no grid")
    parser.add_argument("--reproduce", type=Path, metavar="PNG", help="sample this grid again; fail if it differs")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers, default: all")
    parser.add_argument("-n", "--count", type=list_length, default=8, help="images per class, default: %(default)s")
    parser.add_argument("--size", type=side, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: as trained")
    parser.add_argument("--sampler", choices=(*SAMPLERS, MEANFLOW), help="default: dpmpp-2m, or the model's only one")
    parser.add_argument("--steps", type=list_length, help="default: 50, or 1 of a model of average velocities")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance scale, 1 is none")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time, default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    arguments = parser.parse(argv)
    check_device(parser, arguments.device)
    given = parser.given(argv)
    beside = [name for name in ("output", "out", *WHAT_TO_SAMPLE) if name in given]
    if arguments.reproduce and beside:
        parser.error(f"--reproduce makes what its grid says: leave --{beside[0].replace('_', '-')} away")
    if {"output", "out"} <= given:
        parser.error("--out writes single images and --output a grid: leave one of them away")
    if arguments.out:
        check_output_folder(parser, "--out", arguments.out, "a grid with --output")
    elif not arguments.reproduce:
        check_output(parser, "--output", arguments.output, [".png"])  # which holds how the grid was made
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
        sampler, steps = DEFAULTS[config.objective]
        request = Request(
            classes=parse_classes(arguments.classes, config),
            count=arguments.count,
            size=tuple(arguments.size) if arguments.size else None,
            sampler=arguments.sampler or sampler,
            steps=arguments.steps or steps,
            guidance=arguments.guidance,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
        )
    check_sampler(config, request)
    if arguments.out:
        print(f"wrote {write_images(model, config, request, arguments.out)} images to {arguments.out}")
        return 0
    images = sample(model, config, request)
    check_pixels(images)
    found = digest(images)
    if expected is None:
        save_png(picture(images, config, request), arguments.output, asdict(request) | {"sha256": found})
        print(f"wrote {arguments.output}")
        return 0
    same = found == expected
    print(f"{arguments.checkpoint} gives {'the same images as' if same else 'OTHER images than'} {arguments.reproduce}")
    print(f"sha256 {found}" + ("" if same else f", but the grid was made from {expected}"))
    return 0 if same else 1


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(
        lambda: run(parse_arguments(argv)),
        when_interrupted="interrupted; images that were written are whole",
        less_memory=["a smaller --batch-size or --size", "fewer images"],
    )


if __name__ == "__main__":
    sys.exit(main())
