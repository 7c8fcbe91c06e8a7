"""Images to train on: scikit-image's photographs, a folder, or a Hugging Face dataset.

Every random choice about an example (crop, augmentation, noise) comes from a seed of its own, made from the run's seed
and the example's number in the run. So a resumed run sees what an uninterrupted one would have seen, and a run on
several processes what a run on one would have seen, without any state to save.
"""

from __future__ import annotations

import math
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import RawValue
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from natten_layers.io.schema import check_keys

from .jpeg import ends_in_grey, lacks_pixels
from .progress import progress
from .running import fail, one_line, tell

IMAGE_SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff"),
    *((".webp",) if features.check("webp") else ()),  # what Pillow was built without is named as skipped
    *((".avif",) if features.check("avif") else ()),
}
LITTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}  # folders that systems leave, some with images in them
T = TypeVar("T")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
LOOKED_AT = 4096
"""Files that are handed to threads at a time: millions would take memory, and Ctrl-C would wait for all of them."""
MOST_UNREADABLE = 50
"""Images in a row without one that can be read, at which it is their disk or their folder that is broken."""


class UnreadableError(ValueError):
    """An image cannot be read. The message names it."""


Fit = Callable[[Image.Image, tuple[int, int]], Image.Image]
"""Makes an image fit a size, (height, width)."""


class Source(Protocol):
    """Where images come from."""

    class_names: tuple[str, ...]
    """empty if the images have no classes"""

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """An image ``[C, H, W]``, uint8, of the size to train at, and its class (0 where there are none).

        Raises:
            UnreadableError: its file or its row is damaged, or gone.
        """
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
        if not files:
            raise ValueError("dataset.files names no photographs")
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


class Found(NamedTuple):
    """What lies in a folder, but for hidden files and litter."""

    loose: list[Path]
    """images in the folder itself"""
    classes: dict[str, list[Path]]
    """images below each subfolder that has any"""
    skipped: Counter[str]
    """other files, by suffix"""


def scan(folder: Path) -> Found:
    """Sort what is in a folder, and in those below it.

    Raises:
        ValueError: no such folder.
        OSError: one that cannot be listed: its classes would be missing, and nobody would see why.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    images, skipped, seen = [], Counter(), set()
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        here = os.path.realpath(place)
        folders[:] = [] if here in seen else [name for name in folders if not _is_litter(name)]
        for name in [] if here in seen else files:
            path = Path(place, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not _is_litter(name):
                images.append(path)
            elif not _is_litter(name):
                skipped[path.suffix.lower() or name] += 1
        seen.add(here)
    loose, classes = [], {}
    for path in sorted(images, key=lambda path: path.parts):
        first, *below = path.relative_to(folder).parts
        (classes.setdefault(first, []) if below else loose).append(path)
    return Found(loose, classes, skipped)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in LITTER


def _some(names: Sequence[str], most: int = 10) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


class Folder:
    """All images under a folder, made to fit ``size``; with ``classes``, each subfolder is a class.

    Of an animation the first picture is taken. Hidden files and folders do not count, nor do folders without images.

    Raises:
        ValueError: no folder, no image in it, or with ``classes`` images that are in no class.
    """

    def __init__(
        self, folder: Path, size: tuple[int, int], channels: int, *, classes: bool, fit: Fit | None = None
    ) -> None:
        loose, subfolders, self.skipped = scan(folder)
        if not loose and not subfolders:
            has = f"; it has {_some(sorted(self.skipped))} files" if self.skipped else ""
            raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){has}")
        if classes and loose:
            found = f"{_some([path.name for path in loose], 3)} beside class folders ({_some(list(subfolders))})"
            raise ValueError(
                f"{folder} holds {found if subfolders else 'no class folders'}: move such images into class folders, "
                "or elsewhere; or train on all images without classes, with --no-classes"
            )
        self.size, self.channels, self.fit = size, channels, fit or centre_crop
        self.class_names = tuple(subfolders) if classes else ()
        groups = list(subfolders.values()) if classes else [sorted(chain(loose, *subfolders.values()))]
        self.images = [(path, label) for label, paths in enumerate(groups) for path in paths]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        path, label = self.images[index]
        return _to_tensor(self.fit(_open_image(path, self.channels), self.size)), label

    def check(self, rank: int, world: int) -> None:
        """Look at this process's share of the files for such as :meth:`load` would fail on.

        Raises:
            ValueError: there are; the message names them.
        """
        paths = [path for path, _ in self.images[rank::world]]
        problem_of = partial(_problem, channels=self.channels)
        problems: list[str] = []
        with (
            ThreadPoolExecutor() as pool,  # reading from a disk is most of the work
            progress(len(paths), "checking images", leave=False, disable=rank > 0 or len(paths) < 500) as bar,
        ):
            for start in range(0, len(paths), LOOKED_AT):
                for problem in pool.map(problem_of, paths[start : start + LOOKED_AT]):
                    problems += [problem] if problem else []
                    bar.update()
        if problems:
            raise ValueError(
                f"{len(problems)} of {len(paths)} images cannot be used; mend, move or delete: {_some(problems)}"
            )


def describe(source: Source) -> str:
    """What was found, for the user to see whether it is what was meant."""
    count, names = len(source), source.class_names
    text = f"{count} image{'s' * (count != 1)}, "
    text += f"{len(names)} class{'es' * (len(names) != 1)}: {_some(names)}" if names else "no classes"
    if isinstance(source, Folder) and source.skipped:
        text += f"; skipped {source.skipped.total()} other files: "
        text += _some([f"{count} {suffix}" for suffix, count in source.skipped.most_common()])
    return text


class HuggingFace:
    """The training split of a Hugging Face dataset, by name, with images made to fit ``size``.

    Raises:
        ValueError: no such dataset, no such columns in it, images without a class, or the ``datasets`` package is
            missing.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        channels: int,
        *,
        image_key: str,
        class_key: str | None,
        fit: Fit | None = None,
    ) -> None:
        try:
            from datasets import load_dataset  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"dataset {name!r} is on the Hugging Face hub: pip install 'natten-layers[hub]' brings what reads it"
            ) from error
        try:
            self.name, self.rows = name, load_dataset(name, split="train")
        except Exception as error:  # of the many kinds that the packages below it raise
            raise ValueError(f"dataset {name!r} cannot be loaded: {one_line(error)}") from error
        self.size, self.channels, self.image_key, self.class_key = size, channels, image_key, class_key
        self.fit = fit or centre_crop
        for key in (image_key, class_key):
            if key is not None and key not in self.rows.features:
                raise ValueError(f"dataset {name!r} has no column {key!r}; it has {', '.join(self.rows.features)}")
        names = () if class_key is None else getattr(self.rows.features[class_key], "names", None)
        if names is None:
            raise ValueError(
                f"column {class_key!r} of dataset {name!r} is no ClassLabel; name another as dataset.class_key"
            )
        self.class_names = tuple(names)
        labels = set() if class_key is None else set(self.rows.unique(class_key))
        if unknown := labels.difference(range(len(names))):  # -1 is the hub's for unknown
            values = ", ".join(sorted(map(str, unknown)))
            raise ValueError(
                f"dataset {name!r} has images without a class, of which {class_key!r} is {values}: train on all images "
                "without classes, with --no-classes, or on another dataset without these"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        try:
            row = self.rows[index]
            image = self.fit(_convert(row[self.image_key], self.channels), self.size)
        except Exception as error:  # of the many kinds that decoders raise
            raise UnreadableError(f"image {index} of {self.name} cannot be read: {one_line(error)}") from error
        return _to_tensor(image), 0 if self.class_key is None else row[self.class_key]


class SkipUnreadable:
    """A source in which the next image that can be read takes the place of one that cannot, with a warning.

    A look at a file does not tell whether all of its pixels can be decoded, and decoding millions of images before a
    run would take hours. So damage may show only during the run, which one bad image must not end. Which image takes
    the place depends on the files alone: runs that are resumed see the same ones.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.class_names = source, source.class_names
        self.warned: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """What the source's ``load`` returns.

        Raises:
            UnreadableError: all images of the source, or ``MOST_UNREADABLE`` in a row, cannot be read.
        """
        most = min(MOST_UNREADABLE, len(self.source))
        for tried in range(1, most + 1):
            try:
                return self.source.load(index, generator)
            except UnreadableError as error:
                if tried == most:
                    raise UnreadableError(f"{most} images in a row cannot be read; the last one: {error}") from error
                if index not in self.warned:  # once for every process that loads images, not in every epoch
                    tell(f"warning: {error}; the next image takes its place")
                self.warned.add(index)
                index = (index + 1) % len(self.source)
        raise ValueError("the source has no images")


def default_workers(most: int) -> int:
    """How many processes load images unless a flag says so: no more than there are cores, of which PyTorch warns."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, cores)


def parse_data_flag(value: str) -> dict[str, Any]:
    """``DIR`` or ``hf:OWNER/NAME`` as a config's dataset section. A folder of folders with images has classes.

    Raises:
        ValueError: no such folder, or no name of one.
    """
    if not value:  # Path("") is the working folder, which nobody means by an empty variable
        raise ValueError("the folder of images is an empty text; name one, or a dataset as hf:OWNER/NAME")
    if value.startswith("hf:"):
        return {"type": "huggingface", "location": value.removeprefix("hf:"), "image_key": "image"}
    return {"type": "imagefolder-class" if scan(Path(value)).classes else "imagefolder", "location": value}


KEYS = {  # that each type of dataset reads, beside those of classes; image_key is k-diffusion's for all of them
    "photographs": ("files", "short_side"),
    "imagefolder": ("location", "image_key"),
    "imagefolder-class": ("location", "image_key"),
    "huggingface": ("location", "image_key", "class_key"),
}


def open_source(dataset: Mapping[str, Any], size: tuple[int, int], channels: int, fit: Fit | None = None) -> Source:
    """What a config's dataset section describes; ``fit`` makes images fit ``size``, by default :func:`centre_crop`.

    Raises:
        ValueError: an unknown type, keys that it lacks or does not read, or what the sources raise.
    """
    if channels not in MODES:
        raise ValueError(f"model.input_channels is {channels}; images have {', '.join(map(str, MODES))}")
    kind = dataset.get("type", "imagefolder")
    if kind not in KEYS:
        raise ValueError(
            f"dataset.type is {kind!r}; known are {', '.join(KEYS)} "
            "(MNIST and CIFAR-10 are on the hub as ylecun/mnist and uoft-cs/cifar10)"
        )
    common = ("type", "num_classes", "class_names", "cond_dropout_rate")
    check_keys(dataset.keys(), (*common, *KEYS[kind]), f"dataset of type {kind}")
    if lacking := [key for key in KEYS[kind] if key not in dataset and not key.endswith("_key")]:
        raise ValueError(f"dataset of type {kind} lacks {', '.join(lacking)}")
    if kind == "photographs":
        if fit is not None:
            raise ValueError("--buckets none is for whole images; of the photographs, crops are trained on")
        return Photographs(dataset["files"], size, channels, dataset["short_side"])
    if kind in ("imagefolder", "imagefolder-class"):
        return Folder(Path(dataset["location"]), size, channels, classes=kind == "imagefolder-class", fit=fit)
    class_key = dataset.get("class_key", "label") if dataset.get("num_classes") else None
    image_key = dataset.get("image_key", "image")
    return HuggingFace(dataset["location"], size, channels, image_key=image_key, class_key=class_key, fit=fit)


# Images


def _open_image(path: Path, channels: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            converted = _convert(image, channels)
            if image.format in ("JPEG", "MPO") and ends_in_grey(image) and lacks_pixels(image, path.read_bytes()):
                raise ValueError("its last pixels are missing: the file was cut")
            return converted
    except Exception as error:  # of the many kinds that decoders raise
        raise UnreadableError(f"{path} cannot be read as an image: {one_line(error)}") from error


def _problem(path: Path, channels: int) -> str:
    """What :func:`_open_image` would say; decodes only where a look at the file does not tell.

    A JPEG file that ends as it should may be damaged before; PNG files have checksums, but of what was written, which
    may be a part of the pixels.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for somebody who writes to it
            return f"{path} (it is no regular file)"
        with Image.open(path) as image:
            _check_mode(image)
            if image.format == "PNG":
                image.verify()  # sums over all of its chunks, which decoding does not look at
            if image.format == "JPEG" and _ends_as_jpeg(path):
                return ""
        _open_image(path, channels)
    except Exception as error:
        return f"{path} ({one_line(error).removeprefix(f'{path} cannot be read as an image: ')})"
    return ""


def _ends_as_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))  # some programs write after the end
        return b"\xff\xd9" in file.read()


def _check_mode(image: Image.Image) -> None:
    """Refuse numbers of which nobody says what is white: clipping them to 8 bits would train on other pictures."""
    scaled = image.format in ("PNG", "PPM")  # Pillow makes wide integers of their 16 bits
    if image.mode == "F" or (image.mode == "I" and not scaled):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its pixels are {kind}, whose range is unknown: convert it to 8 or 16 bits a channel")


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """To 8 bits a channel, upright, and on white where it is transparent, unless alpha is a channel of the model."""
    _check_mode(image)
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF's BitsPerSample, which the mode does not tell
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Grey of 16 (or 12) bits, which Pillow would clip to 255 instead of scaling it.
        image = Image.fromarray(np.rint(np.asarray(image) * (255 / (2**bits - 1))).astype(np.uint8))
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def _resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The smallest image of the same shape that covers ``size``, (height, width)."""
    scale = max(size[0] / image.height, size[1] / image.width)
    shape = max(round(image.width * scale), size[1]), max(round(image.height * scale), size[0])
    return image.resize(shape, Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    image = _resize_to_cover(image, size)
    left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))


@dataclass(frozen=True)
class KeepShape:
    """Resizes an image to about as many pixels as a size has, in its own shape.

    Both sides become the nearest multiples of what the model takes. Where one would be shorter than it takes them, the
    image becomes larger instead; the ends of very long ones are cut, beyond :attr:`MOST` times as many pixels.
    """

    MOST = 4

    units: tuple[int, int]
    """what height and width must be multiples of"""
    least: tuple[int, int]
    """the shortest height and width"""

    def __call__(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        sides = image.height, image.width
        scale = math.sqrt(math.prod(size) / math.prod(sides))
        scale = max(scale, *(least / side for least, side in zip(self.least, sides, strict=True)))
        fitted = [max(unit, round(side * scale / unit) * unit) for side, unit in zip(sides, self.units, strict=True)]
        long = 0 if fitted[0] * size[1] > fitted[1] * size[0] else 1
        most = self.MOST * math.prod(size) // fitted[1 - long] // self.units[long] * self.units[long]
        seen = list(map(float, sides))  # the part of the image that is kept
        if fitted[long] > most:
            seen[long] *= most / fitted[long]
            fitted[long] = most
        top, left = ((side - part) / 2 for side, part in zip(sides, seen, strict=True))
        box = left, top, left + seen[1], top + seen[0]
        return image.resize((fitted[1], fitted[0]), Image.Resampling.BICUBIC, box=box)


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
    uniform: Tensor  # [B, 3] in [0, 1): for the noise level, for whether to drop the class, and for a second time
    place: Tensor  # [B]
    aug_cond: Tensor  # [B, 9]


class Examples(Dataset[Batch]):
    """Examples of a source, complete with their noise. Images that cannot be read are skipped."""

    def __init__(self, source: Source, augment_probability: float) -> None:
        self.source, self.augment_probability = SkipUnreadable(source), augment_probability

    def __getitem__(self, key: Key) -> Batch:
        generator = torch.Generator().manual_seed(key.seed)
        pixels, label = self.source.load(key.item, generator)
        image, aug_cond = pixels.float() / 127.5 - 1, torch.zeros(9)
        if self.augment_probability:
            image, aug_cond = augment(image, self.augment_probability, generator)
        noise = torch.randn(image.shape, generator=generator)
        uniform = torch.rand(3, generator=generator)
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


@contextmanager
def load_batches(examples: Examples, keys: Keys, *, workers: int, pin_memory: bool) -> Iterator[Iterator[list[Batch]]]:
    """Batches without end, as :func:`by_shape` has them, loaded by ``workers`` processes that end with the context.

    An error in one of them is raised here, by the batch that it belongs to.
    """
    ending = RawValue("b", 0)  # shared with the workers, and without a lock that one of them could die with
    loader = DataLoader(
        examples,
        batch_sampler=keys,
        collate_fn=by_shape,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=partial(_outlive_signals, ending),
    )
    iterator = iter(loader)
    try:
        yield in_one_line(iterator)
    finally:
        ending.value = 1
        # A traceback may hold the iterator until Python exits, which then would wait for workers that wait for work.
        shutdown: Callable[[], None] | None = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


def by_shape(examples: Sequence[Batch]) -> list[Batch]:
    """The examples of a batch, those with images of one shape together."""
    groups: dict[torch.Size, list[Batch]] = {}
    for example in examples:
        groups.setdefault(example.image.shape, []).append(example)
    return [default_collate(group) for group in groups.values()]


def pack(groups: Sequence[Batch]) -> tuple[Batch, list[tuple[int, int]]]:
    """One batch of them all, for one pass: images and noise are pixels ``[N, C]``, those of image after image.

    Returns:
        It, and the images' heights and widths.
    """

    def pixels(images: Tensor) -> Tensor:
        return images.flatten(2).transpose(1, 2).flatten(0, 1)

    rows = [Batch(pixels(group.image), pixels(group.noise), *group[2:]) for group in groups]
    shapes = [(group.image.shape[2], group.image.shape[3]) for group in groups for _ in group.label]
    return Batch(*map(torch.cat, zip(*rows, strict=True))), shapes


def in_one_line(batches: Iterator[T]) -> Iterator[T]:
    """The loader puts a worker's traceback into the message of its error; what is wrong is in its last line."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if not str(error).startswith("Caught "):
                raise
            last = str(error).strip().splitlines()[-1]
            for kind in ("ValueError", f"{UnreadableError.__module__}.{UnreadableError.__qualname__}"):
                last = last.removeprefix(f"{kind}: ")
            raise ValueError(last) from error
        yield batch


def _outlive_signals(ending: Any, worker: int) -> None:
    """Signals to all processes of a run are the main one's to answer: it takes its step to the end, and needs the data.

    Ctrl-C comes to all, and schedulers send to all. Only when the main process ends does SIGTERM mean what it says.
    """
    parent = os.getppid()

    def end(number: int, frame: FrameType | None) -> None:
        if ending.value or os.getppid() != parent:
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
