"""Finds JPEG files that lack pixels although they end with the mark of the end, as some programs close cut ones.

The decoder fills up with grey, and Pillow does not pass on its warning. A progressive file is looked at in its first
scan only. Later ones make pixels finer, and the format does not require that all of them be there: a file that was
closed before some cannot be told from one that was written without them. What was cut and not closed Pillow refuses.
"""

from __future__ import annotations

import io
import re

from PIL import Image

__all__ = ["ends_in_grey", "lacks_pixels"]

MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
"""what ends the pixels of a scan: within them, 0xff stands before zero and before marks to restart only"""
START_OF_SCAN = 0xDA
MORE_PIXELS = bytes(range(1, 200)) * 4


def lacks_pixels(image: Image.Image, data: bytes) -> bool:
    """Whether ``image``, which was decoded from ``data``, has grey pixels for want of others.

    A decoder that has all pixels passes over more bytes at their end; one that lacks some takes these as pixels. So
    this decodes another image with such bytes, and compares them.
    """
    end = _end_of_scan(data)
    if end is None:
        return False
    with Image.open(io.BytesIO(data[:end] + MORE_PIXELS + data[end:])) as other:
        return other.tobytes() != image.tobytes()


def ends_in_grey(image: Image.Image) -> bool:
    """Whether the last pixel is what decoders make of no data, to a rounding."""
    last = image.getpixel((image.width - 1, image.height - 1))
    channels = last if isinstance(last, tuple) else (last,)
    return all(isinstance(value, int) and 126 <= value <= 129 for value in channels)


def _end_of_scan(data: bytes) -> int | None:
    """Where the pixels of the first scan end, or None in a file of another structure."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        kind = data[at + 1]
        if kind == 0xFF:  # a byte that fills up
            at += 1
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == START_OF_SCAN:
            end = MARKER.search(data, at)
            return None if end is None else end.start()
    return None
