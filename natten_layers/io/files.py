"""Files that appear whole or not at all, and JSON files whose content nobody vouches for."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .schema import shorten

__all__ = ["naming", "parse_json", "read_json", "readable_as_usual", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to beside ``path``, which it replaces if all went well: a failure leaves the old file whole.

    Makes the folder where it is missing. The suffix stays, for writers that look at it. Who may read the file is what
    the user's umask says, also where a writer is stricter, as safetensors is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes and two threads that write one file do so beside each other; the last one to finish wins.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        with readable_as_usual(temporary):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def readable_as_usual(path: Path) -> Iterator[None]:
    """Give a file that is written here the mode of any new file of the user's."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)


MOST_JSON_BYTES = 2**26
MOST_DIGITS = 40
"""of a number in a JSON file: more than any 64-bit integer or double has, few enough to be shown in a message"""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what :func:`parse_json` refuses; the message names the file.
    """
    with path.open("rb") as file:
        content = file.read(MOST_JSON_BYTES + 1)
    return parse_json(content, path)


def parse_json(content: str | bytes, name: object) -> dict[str, Any]:
    """The JSON object in a text, which may be hostile.

    Raises:
        ValueError: longer than 64 MiB, no UTF-8, no JSON, no object, nested beyond Python's limit, or with an integer
            of more than 40 digits; the message begins with ``name``.
    """
    if len(content) > MOST_JSON_BYTES:
        raise ValueError(f"{name} is longer than {MOST_JSON_BYTES} bytes, too long for a JSON file of this kind")
    try:
        text = content if isinstance(content, str) else content.decode()
        value = json.loads(text, parse_int=_parse_int)
    except RecursionError:
        raise ValueError(f"{name} is no JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no JSON object, but {shorten(value)}")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, {digits[:10]}...")
    return int(digits)


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Put the name of a file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
