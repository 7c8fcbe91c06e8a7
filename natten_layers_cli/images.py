"""Single images: opened, looked at for damage, converted to what a model takes, and made to fit a size."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .jpeg import ends_in_grey, lacks_pixels
from .running import reason

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names of pixels, by their channels"""

Fit = Callable[[Image.Image, tuple[int, int]], Image.Image]
"""Makes an image fit a size, (height, width)."""


class UnreadableError(ValueError):
    """An image cannot be read. The message names it."""


def open_image(path: Path, channels: int) -> Image.Image:
    """What :func:`decode` makes of a file.

    Raises:
        UnreadableError: no image, a damaged one, or one that was cut.
    """
    try:
        return decode(path, channels)
    except Exception as error:  # of the many kinds that decoders raise
        raise UnreadableError(f"{path} cannot be read as an image: {why_unreadable(error)}") from error


def decode(file: Path | bytes, channels: int) -> Image.Image:
    """The image in a file, or in its bytes: 8 bits a channel, upright, on white where the model has no alpha.

    Raises:
        Exception: of the many kinds that decoders raise.
        ValueError: a file that was cut, or pixels whose range is unknown.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        converted = _convert(image, channels)
        may_lack = image.format in ("JPEG", "MPO") and ends_in_grey(image)
        if may_lack and lacks_pixels(image, file if isinstance(file, bytes) else file.read_bytes()):
            raise ValueError("its last pixels are missing: the file was cut")
        return converted


def why_unreadable(error: Exception) -> str:
    """What a decoder says, for a message that names the image, which Pillow names again where it knows no format."""
    return "it begins like no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else reason(error)


def problem_of(path: Path, channels: int) -> str:
    """What :func:`open_image` would say; decodes only where a look at the file does not tell.

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
        decode(path, channels)
    except Exception as error:
        return f"{path} ({why_unreadable(error)})"
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


def resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The smallest image of the same shape that covers ``size``, (height, width)."""
    scale = max(size[0] / image.height, size[1] / image.width)
    shape = max(round(image.width * scale), size[1]), max(round(image.height * scale), size[0])
    return image.resize(shape, Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    image = resize_to_cover(image, size)
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


def to_tensor(image: Image.Image) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).movedim(-1, 0).contiguous()
