"""Atomic replacement of files, and parsing of JSON files from untrusted sources."""

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
    """Yield a temporary path beside ``path``; the file written to it replaces ``path`` at the end of the context.

    If the context raises, an existing file stays unchanged. A missing folder is created. The temporary name keeps the
    suffix, for writers that depend on it. The file gets the permissions that the user's umask gives, even if the writer
    sets stricter ones, as safetensors does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes and threads that write the same file at once use different names; the last one to finish wins.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        with readable_as_usual(temporary):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def readable_as_usual(path: Path) -> Iterator[None]:
    """Give the file that is written in the context the permissions of any new file of this user."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)


MOST_JSON_BYTES = 2**26
MOST_DIGITS = 40
"""Most digits of an integer in a JSON file: more than any 64-bit integer needs, few enough to be shown in a message."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the content is refused by :func:`parse_json`; the message names the file.
    """
    with path.open("rb") as file:
        content = file.read(MOST_JSON_BYTES + 1)
    return parse_json(content, path)


def parse_json(content: str | bytes, name: object) -> dict[str, Any]:
    """The JSON object in a text that may come from an untrusted source.

    Raises:
        ValueError: the text is longer than 64 MiB, is not UTF-8 or not a JSON object, is nested beyond Python's limit,
            or has an integer of more than 40 digits; the message begins with ``name``.
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
    """Prefix the message of any ValueError raised in the context with the name of a file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
