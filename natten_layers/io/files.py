"""Files that appear whole or not at all, and JSON files whose content nobody vouches for."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .schema import shorten

__all__ = ["leftovers", "naming", "parse_json", "read_json", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to beside ``path``, which it replaces if all went well: a failure leaves the old file whole.

    Makes the folder where it is missing. The suffix stays, for writers that look at it. Who may read the file is what
    the user's umask says, also where a writer is stricter, as safetensors is. Every call has a path of its own, so
    that threads and processes may save one file at the same time: the last one to end wins.

    Raises:
        OSError: the file cannot be written, be it that the disk is full; the message names ``path``.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _readable_as_usual(temporary):
            yield temporary
        _sync(temporary)  # else a power cut could leave the name with nothing behind it
        os.replace(temporary, path)
        with suppress(OSError):  # not every file system lets a folder be opened; the file itself is safe
            _sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' words for a full disk
        if "cannot write " in str(error):  # it names this file, or another one that was to appear with it
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(f"cannot write {path}: {reason}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def leftovers(folder: Path) -> Iterator[tuple[Path, str]]:
    """What :func:`replacing` began to write in ``folder`` and was killed over, each with the name that it was to have.

    Some of it may be a file that another process writes right now.
    """
    for path in folder.glob(".*.tmp*"):
        if match := re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp(\.[^.]+)?", path.name):
            yield path, match[1] + (match[2] or "")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _readable_as_usual(path: Path) -> Iterator[None]:
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
