"""PNG files: labelled grids of samples and loss curves. A file appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from natten_layers.io.files import replacing

from .running import reason

RECORD = "natten_layers"  # the text chunk that says how a grid was made


def to_bytes(images: Tensor) -> Tensor:
    """Of values in [-1, 1]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_image(image: Tensor) -> Image.Image:
    """Of ``[C, H, W]`` in [-1, 1]."""
    pixels = to_bytes(image).movedim(0, -1).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def draw_grid(images: Tensor, columns: int, labels: Sequence[str] = (), heads: Sequence[str] = ()) -> Image.Image:
    """Rows of ``columns`` images ``[N, C, H, W]`` in [-1, 1].

    Each row has its label, if any, on its left, and each column its head above, as large as the widest one fits.
    """
    height, width = images.shape[2:]
    zoom = max(1, 96 // max(height, width))  # small images are shown larger, pixel by pixel
    cell_height, cell_width, gap = height * zoom, width * zoom, 2
    size = max(12, cell_height // 7)
    font = ImageFont.load_default(size)
    left = max((int(font.getlength(label)) for label in labels), default=0) + (16 if labels else 0)
    widest = max((font.getlength(head) for head in heads), default=0)
    head_size = size * min(1, cell_width / max(1, widest))
    top = int(head_size * 1.5) if heads else 0
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (left + columns * (cell_width + gap), top + rows * (cell_height + gap)), "white")
    for i, image in enumerate(images.cpu()):
        row, column = divmod(i, columns)
        cell = to_image(image).resize((cell_width, cell_height), Image.Resampling.NEAREST)
        canvas.paste(cell, (left + column * (cell_width + gap), top + row * (cell_height + gap)))
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels):
        middle = top + row * (cell_height + gap) + cell_height // 2
        draw.text((left - 8, middle), label, fill="black", font=font, anchor="rm")
    for column, head in enumerate(heads):
        middle = left + column * (cell_width + gap) + cell_width // 2
        draw.text((middle, top // 2), head, fill="black", font=ImageFont.load_default(head_size), anchor="mm")
    return canvas


def save_png(image: Image.Image, path: Path, record: Mapping[str, Any]) -> None:
    """Write ``image``, with ``record`` in its metadata."""
    info = PngImagePlugin.PngInfo()
    info.add_text(RECORD, json.dumps(record))
    with replacing(path) as temporary:
        image.save(temporary, pnginfo=info)


def read_record(path: Path) -> dict[str, Any]:
    """What :func:`save_png` was given.

    Raises:
        ValueError: no such picture.
    """
    try:
        with PngImagePlugin.PngImageFile(path) as image:  # of no pixels, of which Image.open allows only so many
            text = image.info.get(RECORD)
    except Exception as error:  # of the many kinds that decoders raise
        raise ValueError(f"{path} cannot be read as a picture: {reason(error)}") from error
    if text is None:
        raise ValueError(f"{path} does not say how it was made; give a grid of samples that these commands drew")
    try:
        record = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} says how it was made in another form than this command: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} says how it was made in another form than this command: {record!r:.100}")
    return record


def save_loss_curve(losses: Mapping[int, float], path: Path, title: str) -> None:
    """Losses by step, with a running mean."""
    from matplotlib.figure import Figure  # slow to import, and only needed at the end

    window = max(1, len(losses) // 50)
    steps, values = list(losses), list(losses.values())
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, linewidth=0.5, alpha=0.4, label="loss")
    axes.plot(steps[window - 1 :], mean, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=title)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
