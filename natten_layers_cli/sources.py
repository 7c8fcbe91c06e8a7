"""Where images come from: scikit-image's photographs, a folder, or a Hugging Face dataset, as a config names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from natten_layers.io.schema import check_keys

from .folders import Folder, scan, some
from .images import (
    MODES,
    Fit,
    UnreadableError,
    centre_crop,
    decode,
    open_image,
    resize_to_cover,
    to_tensor,
    why_unreadable,
)
from .running import one_line, tell

MOST_UNREADABLE = 50
"""Images in a row without one that can be read, at which it is their disk or their folder that is broken."""


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
            image = open_image(folder / name, channels)
            self.photographs.append(to_tensor(resize_to_cover(image, (short_side, short_side))))
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


class HuggingFace:
    """The training split of a Hugging Face dataset, by name, with images made to fit ``size``.

    Raises:
        ValueError: no such dataset, no such columns in it, no images or images without a class, or the ``datasets``
            package is missing.
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
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"dataset {name!r} is on the Hugging Face hub: pip install 'natten-layers[hub]' brings what reads it"
            ) from error
        try:
            self.name, rows = name, datasets.load_dataset(name, split="train")
        except Exception as error:  # of the many kinds that the packages below it raise
            raise ValueError(f"dataset {name!r} cannot be loaded: {one_line(error)}") from error
        for key in (image_key, class_key):
            if key is not None and key not in rows.features:
                raise ValueError(f"dataset {name!r} has no column {key!r}; it has {', '.join(rows.features)}")
        if not isinstance(rows.features[image_key], datasets.Image):
            raise ValueError(
                f"column {image_key!r} of dataset {name!r} holds no images; name another as dataset.image_key"
            )
        self.class_names = () if class_key is None else self._classes(rows, class_key)
        # The package itself would decode a file that was cut, and say nothing of the pixels that it lacks.
        self.rows = rows.cast_column(image_key, datasets.Image(decode=False))
        self.size, self.channels, self.image_key, self.class_key = size, channels, image_key, class_key
        self.fit = fit or centre_crop

    def _classes(self, rows: Any, class_key: str) -> tuple[str, ...]:
        """The names of the classes of all images, of which each must have one."""
        names = getattr(rows.features[class_key], "names", None)
        if names is None:
            raise ValueError(
                f"column {class_key!r} of dataset {self.name!r} is no ClassLabel; name another as dataset.class_key"
            )
        if unknown := set(rows.unique(class_key)).difference(range(len(names))):  # -1 is the hub's for unknown
            values = ", ".join(sorted(map(str, unknown)))
            raise ValueError(
                f"dataset {self.name!r} has images without a class, of which {class_key!r} is {values}: train on all "
                "images without classes, with --no-classes, or on another dataset without these"
            )
        return tuple(names)

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        try:
            row = self.rows[index]
            content, path = row[self.image_key]["bytes"], row[self.image_key]["path"]
            file = Path(path) if content is None else content
            image = self.fit(decode(file, self.channels), self.size)
        except Exception as error:  # of the many kinds that decoders raise
            raise UnreadableError(f"image {index} of {self.name} cannot be read: {why_unreadable(error)}") from error
        return to_tensor(image), 0 if self.class_key is None else row[self.class_key]


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


def describe(source: Source) -> str:
    """What was found, for the user to see whether it is what was meant."""
    count, names = len(source), source.class_names
    text = f"{count} image{'s' * (count != 1)}, "
    text += f"{len(names)} class{'es' * (len(names) != 1)}: {some(names)}" if names else "no classes"
    if isinstance(source, Folder) and source.skipped:
        text += f"; skipped {source.skipped.total()} other files: "
        text += some([f"{count} {suffix}" for suffix, count in source.skipped.most_common()])
    return text


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
