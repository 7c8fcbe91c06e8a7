"""Compare two sets of images: FID and KID, where torch-fidelity is installed, or distances of simpler features.

natten-layers-sample-hdit runs/flowers.safetensors -n 500 --out samples
natten-layers-evaluate samples ~/flowers --output fid.json

Images to compare with are cropped to the size of those that are evaluated, as training crops them. The published
numbers are of 50,000 samples; fewer make FID larger, and KID less certain.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from natten_layers.io.files import replacing

from .batches import default_workers
from .distances import (
    CONVOLUTIONS,
    INCEPTION,
    NAMES,
    features_of,
    frechet_distance,
    kernel_distance,
    open_features,
    usual_features,
)
from .folders import Folder
from .outputs import check_output
from .running import Parser, check_device, list_length, run_command, seed, side, worker_count
from .sources import Source, describe, open_source, parse_data_flag


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    least = {"size": 1, "batch_size": 1, "subset": 2, "subsets": 1}
    parser = Parser(description=__doc__, least=least)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of images to evaluate, all of one size")
    parser.add_argument("reference", metavar="DIR|hf:OWNER/NAME", help="images to compare them with")
    parser.add_argument(
        "--features",
        choices=(INCEPTION, CONVOLUTIONS),
        help="inception: FID and KID; random-convolutions: what needs no weights; default: what is installed",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="Inception's; default: torch-fidelity's download")
    parser.add_argument(
        "--size", type=side, nargs=2, metavar=("HEIGHT", "WIDTH"), help="crop all to it; default: the first image's"
    )
    parser.add_argument("--subset", type=int, default=1000, help="images of a subset of KID, default: %(default)s")
    parser.add_argument("--subsets", type=list_length, default=100, help="how many of them, default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="that chooses them, default: %(default)s")
    parser.add_argument(
        "--output", type=Path, metavar="JSON", help="write the numbers there, too: a name with .json, or no suffix"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time, default: %(default)s")
    parser.add_argument(
        "--num-workers",
        type=worker_count,
        default=default_workers(4),
        help="processes that load images, default: 4, or as many as there are cores",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    arguments = parser.parse(argv)
    check_device(parser, arguments.device)
    if arguments.features is None:
        arguments.features = INCEPTION if arguments.weights else usual_features()
    if arguments.weights and arguments.features != INCEPTION:
        parser.error(f"--weights are of --features {INCEPTION}")
    if arguments.output:
        check_output(parser, "--output", arguments.output, [".json"], needed=False)
    return arguments


def size_of(folder: Folder) -> tuple[int, int]:
    """Of the first image; to crop the others to it would hide that they are other images than was meant.

    Raises:
        ValueError: an image of another size.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for path, _ in folder.images:
        with Image.open(path) as image:
            sizes.setdefault((image.height, image.width), path)
        if len(sizes) > 1:
            (size, first), (other, last) = sizes.items()
            found = f"{first} has {size[0]}x{size[1]} pixels and {last} {other[0]}x{other[1]}"
            raise ValueError(f"{found}: say with --size what to crop them to")
    return next(iter(sizes))


def open_sources(arguments: argparse.Namespace) -> tuple[Source, Source, tuple[int, int]]:
    """The images, those to compare them with, and the size of both."""
    folder = Folder(arguments.images, (1, 1), 3, classes=False)
    folder.check(0, 1)
    size = (arguments.size[0], arguments.size[1]) if arguments.size else size_of(folder)
    section = parse_data_flag(arguments.reference)
    if section["type"] == "imagefolder-class":  # images beside folders of classes are images, too
        section["type"] = "imagefolder"
    reference = open_source(section, size, 3)
    if isinstance(reference, Folder):
        reference.check(0, 1)
    return Folder(arguments.images, size, 3, classes=False), reference, size


def run(arguments: argparse.Namespace) -> int:
    features = open_features(arguments.features, arguments.device, arguments.weights)
    *sources, size = open_sources(arguments)
    for name, source in zip(("images", "reference"), sources, strict=True):
        print(f"{name}: {describe(source)}")
    options = {"batch_size": arguments.batch_size, "workers": arguments.num_workers}
    first, second = (features_of(source, features, device=arguments.device, **options) for source in sources)
    numbers: dict[str, Any] = {
        "features": arguments.features,
        "frechet_distance": frechet_distance(first, second),
        "kernel_distance": kernel_distance(
            first, second, subset=arguments.subset, subsets=arguments.subsets, seed=arguments.seed
        )._asdict(),
        "images": len(first),
        "reference_images": len(second),
        "size": size,
    }
    report(numbers, first.shape[1])  # before a file that cannot be written loses them
    if arguments.output:
        with replacing(arguments.output) as temporary:
            temporary.write_text(json.dumps(numbers, indent=2) + "\n")
    return 0


def report(numbers: dict[str, Any], count: int) -> None:
    """Print the distances under the names that their features, of which there are ``count``, give them."""
    frechet, kernel = NAMES[numbers["features"]]
    images = numbers["images"], numbers["reference_images"]
    print(f"{frechet}: {numbers['frechet_distance']:.6g}")
    mean, std = numbers["kernel_distance"].values()
    print(f"{kernel}: {mean:.6g}" + (f" ± {std:.2g}" if std else ""))  # no spread is known of a single subset
    height, width = numbers["size"]
    print(f"by {count} features of {numbers['features']}, {images[0]} images against {images[1]}, at {height}x{width}")
    if numbers["features"] != INCEPTION:
        print("no FID and no KID: compare these numbers with others of the same features only")
    if min(images) <= count:
        print(f"note: of no more images than features, the {frechet} is much too large; see the {kernel}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(
        lambda: run(parse_arguments(argv)),
        when_interrupted="interrupted; nothing was written",
        less_memory=["a smaller --batch-size or --size"],
    )


if __name__ == "__main__":
    sys.exit(main())
