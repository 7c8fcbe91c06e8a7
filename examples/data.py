"""Images to train on: scikit-image's photographs, a folder, or a Hugging Face dataset.

Every random choice about an example (crop, augmentation, noise) comes from a seed of its own, made from the run's seed
and the example's number in the run. So a resumed run sees what an uninterrupted one would have seen, and a run on
several processes what a run on one would have seen, without any state to save.
"""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Source(Protocol):
    """Where images come from."""

    class_names: tuple[str, ...]
    """empty if the images have no classes"""

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """An image ``[C, H, W]``, uint8, of the size to train at, and its class (0 where there are none)."""
        ...


# Sources


class Photographs:
    """Random crops, some of them mirrored, of the photographs inside scikit-image's package. Each is a class.

    Args:
        files: names in ``skimage/data``.
        size: (height, width) of the crops.
        short_side: pixels of a photograph's shorter side, before crops are taken.
    """

    def __init__(self, files: Mapping[str, str], size: tuple[int, int], channels: int, short_side: int) -> None:
        import skimage  # a light import: its data module, which downloads what the package lacks, is not touched

        folder = Path(skimage.__file__).parent / "data"
        self.class_names = tuple(files)
        self.size = size
        self.photographs = []
        for name in files.values():
            image = _open_image(folder / name, channels)
            self.photographs.append(_to_tensor(_resize_to_cover(image, (short_side, short_side))))
        if short_side < max(size):
            raise ValueError(f"dataset.short_side is {short_side}, less than the crops of {size[0]}x{size[1]}")

    def __len__(self) -> int:
        return len(self.photographs)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        photograph = self.photographs[index]
        corner = [
            int(torch.randint(length - crop + 1, (), generator=generator))
            for length, crop in zip(photograph.shape[1:], self.size, strict=True)
        ]
        crop = photograph[:, corner[0] : corner[0] + self.size[0], corner[1] : corner[1] + self.size[1]]
        return crop.flip(-1) if torch.rand((), generator=generator) < 0.5 else crop, index


class Folder:
    """All images under a folder, resized and cropped to their middle; with ``classes``, each subfolder is a class.

    Raises:
        ValueError: no folder, or no image in it.
    """

    def __init__(self, folder: Path, size: tuple[int, int], channels: int, *, classes: bool) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder of images")
        self.size, self.channels = size, channels
        self.class_names = tuple(sorted(p.name for p in folder.iterdir() if _is_class(p))) if classes else ()
        roots = [folder / name for name in self.class_names] or [folder]
        self.images = [
            (path, label)
            for label, root in enumerate(roots)
            for path in sorted(root.rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not self.images:
            raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        path, label = self.images[index]
        return _to_tensor(_centre_crop(_open_image(path, self.channels), self.size)), label


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


class HuggingFace:
    """The training split of a Hugging Face dataset, by name, resized and cropped to the middle.

    Raises:
        ValueError: no such columns in the dataset, or the ``datasets`` package is missing.
    """

    def __init__(
        self, name: str, size: tuple[int, int], channels: int, *, image_key: str, class_key: str | None
    ) -> None:
        try:
            from datasets import load_dataset  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"dataset {name!r} is on the Hugging Face hub: pip install datasets") from error
        self.rows = load_dataset(name, split="train")
        self.size, self.channels, self.image_key, self.class_key = size, channels, image_key, class_key
        for key in (image_key, class_key):
            if key is not None and key not in self.rows.features:
                raise ValueError(f"dataset {name!r} has no column {key!r}; it has {', '.join(self.rows.features)}")
        names = () if class_key is None else getattr(self.rows.features[class_key], "names", None)
        if names is None:
            raise ValueError(
                f"column {class_key!r} of dataset {name!r} is no ClassLabel; name another as dataset.class_key"
            )
        self.class_names = tuple(names)

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        row = self.rows[index]
        image = _centre_crop(_convert(row[self.image_key], self.channels), self.size)
        return _to_tensor(image), 0 if self.class_key is None else row[self.class_key]


def parse_data_flag(value: str) -> dict[str, Any]:
    """``DIR`` or ``hf:OWNER/NAME`` as a config's dataset section. A folder of folders has classes."""
    if value.startswith("hf:"):
        return {"type": "huggingface", "location": value.removeprefix("hf:"), "image_key": "image"}
    folder = Path(value)
    flat = not folder.is_dir() or any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.iterdir())
    return {"type": "imagefolder" if flat else "imagefolder-class", "location": value}


def open_source(dataset: Mapping[str, Any], size: tuple[int, int], channels: int) -> Source:
    """What a config's dataset section describes.

    Raises:
        ValueError: an unknown type, or what the sources raise.
    """
    if channels not in MODES:
        raise ValueError(f"model.input_channels is {channels}; images have {', '.join(map(str, MODES))}")
    kind = dataset.get("type", "imagefolder")
    if kind == "photographs":
        return Photographs(dataset["files"], size, channels, dataset["short_side"])
    if kind in ("imagefolder", "imagefolder-class"):
        return Folder(Path(dataset["location"]), size, channels, classes=kind == "imagefolder-class")
    if kind == "huggingface":
        class_key = dataset.get("class_key", "label") if dataset.get("num_classes") else None
        image_key = dataset.get("image_key", "image")
        return HuggingFace(dataset["location"], size, channels, image_key=image_key, class_key=class_key)
    raise ValueError(
        f"dataset.type is {kind!r}; known are photographs, imagefolder, imagefolder-class and huggingface "
        "(MNIST and CIFAR-10 are on the hub as ylecun/mnist and uoft-cs/cifar10)"
    )


# Images


def _open_image(path: Path, channels: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _convert(image, channels)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """To 8 bits a channel."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # 16-bit grey, which Pillow would clip to 255 instead of scaling it.
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return image.convert(MODES[channels])


def _resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The smallest image of the same shape that covers ``size``, (height, width)."""
    scale = max(size[0] / image.height, size[1] / image.width)
    shape = max(round(image.width * scale), size[1]), max(round(image.height * scale), size[0])
    return image.resize(shape, Image.Resampling.BICUBIC)


def _centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    image = _resize_to_cover(image, size)
    left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))


def _to_tensor(image: Image.Image) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).movedim(-1, 0).contiguous()


def augment(image: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Geometric augmentations of Karras et al. (2022, appendix F.2), with the 9 numbers that tell what was done.

    Args:
        image: ``[C, H, W]``, float.
        probability: of each augmentation but the mirroring, which always has one half.

    Returns:
        ``[C, H, W]`` and ``[9]``.
    """

    def chance() -> float:
        return float(torch.rand((), generator=generator) < probability)

    def normal() -> float:
        return torch.randn((), generator=generator).item()

    def angle() -> float:
        return (2 * torch.rand((), generator=generator).item() - 1) * math.pi

    mirror = float(torch.rand((), generator=generator) < 0.5)
    flip = chance() * float(torch.rand((), generator=generator) < 0.5)
    scale = chance() * normal()
    turn = chance() * angle()
    do = chance()
    stretch_angle, stretch = do * angle(), do * normal()
    do = chance()
    shift_x, shift_y = do * normal(), do * normal()

    height, width = image.shape[1:]
    size, aspect = 2 ** (0.2 * scale), 2 ** (0.2 * stretch)
    stretched = _rotation(stretch_angle) @ _scaling(aspect, 1 / aspect) @ _rotation(-stretch_angle)
    linear = _scaling(1 - 2 * mirror, 1 - 2 * flip) @ _scaling(size, size) @ _rotation(-turn) @ stretched
    offset = linear @ torch.tensor([width * shift_x / 8, height * shift_y / 8])
    # grid_sample asks where each output pixel comes from, in half widths and half heights from the centre.
    half = torch.tensor([width / 2, height / 2])
    inverse = torch.linalg.inv(linear)
    theta = torch.cat([inverse * half / half[:, None], (-(inverse @ offset) / half)[:, None]], 1)
    grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
    image = F.grid_sample(image[None], grid, mode="bicubic", padding_mode="reflection", align_corners=False)[0]
    condition = [
        *(mirror, flip, scale, math.cos(turn) - 1, math.sin(turn)),
        *(stretch * math.cos(stretch_angle), stretch * math.sin(stretch_angle), shift_x, shift_y),
    ]
    return image, torch.tensor(condition)


def _rotation(angle: float) -> Tensor:
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _scaling(x: float, y: float) -> Tensor:
    return torch.tensor([[x, 0.0], [0.0, y]])


# Batches


class Key(NamedTuple):
    """Names an example of a run."""

    item: int
    """index in the source"""
    seed: int
    place: int
    """in the global batch"""


class Batch(NamedTuple):
    """Examples; without the batch axis, one example."""

    image: Tensor  # [B, C, H, W] in [-1, 1]
    noise: Tensor  # [B, C, H, W]
    label: Tensor  # [B]
    uniform: Tensor  # [B, 2] in [0, 1): for the noise level, and for whether to drop the class
    place: Tensor  # [B]
    aug_cond: Tensor  # [B, 9]


class Examples(Dataset[Batch]):
    """Examples of a source, complete with their noise."""

    def __init__(self, source: Source, augment_probability: float) -> None:
        self.source, self.augment_probability = source, augment_probability

    def __getitem__(self, key: Key) -> Batch:
        generator = torch.Generator().manual_seed(key.seed)
        pixels, label = self.source.load(key.item, generator)
        image, aug_cond = pixels.float() / 127.5 - 1, torch.zeros(9)
        if self.augment_probability:
            image, aug_cond = augment(image, self.augment_probability, generator)
        noise = torch.randn(image.shape, generator=generator)
        uniform = torch.rand(2, generator=generator)
        return Batch(image, noise, torch.tensor(label), uniform, torch.tensor(key.place), aug_cond)


class Keys(Sampler[list[Key]]):
    """Batches of keys without end, from any step of a run on: one batch per process, step and accumulation step.

    The batches that all processes take in one step, one after another, are the global batch.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, first_step: int, accumulate: int, rank: int, world: int
    ) -> None:
        self.length, self.batch_size, self.seed, self.first_step = length, batch_size, seed, first_step
        self.accumulate, self.rank, self.world = accumulate, rank, world

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulate * self.world

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, []
        number = (self.first_step * self.accumulate * self.world + self.rank) * self.batch_size
        while True:
            keys = []
            for n in range(number, number + self.batch_size):
                if n // self.length != epoch:
                    epoch = n // self.length
                    order = random.Random(f"{self.seed} epoch {epoch}").sample(range(self.length), self.length)
                seed = random.Random(f"{self.seed} example {n}").getrandbits(32)
                keys.append(Key(order[n % self.length], seed, n % self.global_batch))
            yield keys
            number += self.world * self.batch_size


def load_batches(examples: Examples, keys: Keys, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
    loader = DataLoader(
        examples,
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_outlive_termination,
    )
    return iter(loader)


def _outlive_termination(worker: int) -> None:
    """SIGTERM to the whole group is the main process's to answer: it takes its step to the end, and needs the data."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
