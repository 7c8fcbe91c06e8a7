"""Atomic replacement of files, and parsing of JSON files from untrusted sources."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..wording import shorten

__all__ = [
    "FILE_SUFFIXES",
    "check_directory_name",
    "check_regular",
    "leftovers",
    "make_folder",
    "naming",
    "parse_json",
    "read_json",
    "read_short",
    "replacing",
    "system_errors",
]

FILE_SUFFIXES = frozenset(
    {
        *(".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".gguf", ".npy", ".npz"),
        *(".json", ".jsonl", ".toml", ".yaml", ".yml", ".txt", ".csv", ".pdf"),
        *(".avif", ".bmp", ".eps", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".svg", ".tga"),
        *(".tif", ".tiff", ".webp", ".mp4", ".gz", ".tar", ".zip"),
    }
)
"""Endings by which users know a file, in lower case. Others, as of ``runs.v2`` and ``model.bf16``, say nothing."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file written to it replaces ``path`` at the end of the context.

    If the context raises, an existing file stays unchanged. A missing folder is created. The temporary name keeps the
    suffix, for writers that depend on it. The file gets the permissions that the user's umask gives, even if the writer
    sets stricter ones, as safetensors does. Every call has a temporary path of its own, so threads and processes may
    save the same file at once; the last one to finish wins.

    Raises:
        OSError: the file cannot be written, for example because the disk is full, or because ``path`` is a device or a
            pipe; the message names ``path``.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        make_folder(path.parent)
        if path.exists() and not (path.is_file() or path.is_dir()):  # the system itself refuses a folder
            raise OSError("it is a device or a pipe, which a file would replace")
        with _readable_as_usual(temporary), system_errors():
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


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing.

    Raises:
        OSError: it cannot be made. Where a file has its name, that is what the message says, not that it exists.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise, in place of a RuntimeError, the OSError that it hides.

    ``torch.save`` finishes its archive even after a write has failed: of a full disk it says that a position is
    unexpected, if it writes to an open file, and nothing of the system's error if it opens the file itself.
    """
    try:
        yield
    except RuntimeError as error:
        hidden = error.__context__
        while hidden is not None and not isinstance(hidden, OSError):
            hidden = hidden.__context__
        if hidden is None:
            raise
        raise OSError(hidden.errno, hidden.strerror, hidden.filename) from error


def check_regular(path: Path) -> None:
    """Refuse a pipe or a device, where a file is to be read in parts: opening one can wait forever for its writer.

    Raises:
        ValueError: it is one.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or a device, of which no weights are read: copy them into a file")


def check_directory_name(path: Path, way_out: str = "") -> None:
    """Refuse to make a directory whose name is that of a file, for which users would take it.

    Raises:
        ValueError: the name ends like that of a file.
    """
    if path.suffix.lower() in FILE_SUFFIXES and not path.is_dir():
        raise ValueError(f"{path} must be the name of a directory, without {path.suffix}{way_out}")


def leftovers(folder: Path) -> Iterator[tuple[Path, str]]:
    """Temporary files that :func:`replacing` left in ``folder`` when its process was killed, each with its final name.

    Some of them may belong to another process that is still writing.
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
    """Give the file that is written in the context the permissions of any new file of this user."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)


MOST_BYTES = 2**26
"""The longest JSON or config that is read, in bytes. Of a text that is decoded already, characters are counted."""
MOST_DIGITS = 40
"""Most digits of an integer in a JSON file: more than any 64-bit integer needs, few enough to be shown in a message."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the content is refused by :func:`parse_json`; the message names the file.
    """
    return parse_json(read_short(path), path)


def read_short(path: Path) -> bytes:
    """What is in a file that is none of weights or texts.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer than 64 MiB, as a device is that has no end, or an empty pipe.
    """
    if path.is_fifo():
        content = _read_pipe(path)
    else:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    _check_length(content, path)
    return content


def _read_pipe(path: Path) -> bytes:
    """What is written to a pipe, which would be waited for without end where nobody has opened it to write."""
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as pipe:
        content = pipe.read(1)  # None where somebody has opened it, and writes later
        if content != b"":
            os.set_blocking(pipe.fileno(), True)
            with io.BufferedReader(pipe) as rest:
                content = (content or b"") + rest.read(MOST_BYTES + 1)
    if not content:
        raise ValueError(
            f"{path} is an empty pipe: nothing was written to it, or nobody writes to it yet; start what writes to it "
            "first, or name a file"
        )
    return content


def _check_length(content: str | bytes, name: object) -> None:
    if len(content) > MOST_BYTES:
        raise ValueError(f"{name} is longer than {MOST_BYTES} bytes, too long for JSON or a config")


def parse_json(content: str | bytes, name: object) -> dict[str, Any]:
    """The JSON object in a text that may come from an untrusted source.

    Raises:
        ValueError: the text is longer than 64 MiB, is not UTF-8 or not a JSON object, is nested beyond Python's limit,
            has an integer of more than 40 digits, or a key twice with different values; the message begins with
            ``name``.
    """
    _check_length(content, name)
    try:
        text = content if isinstance(content, str) else content.decode()
        value = json.loads(text, parse_int=_parse_int, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{name} is no JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no JSON object, but {shorten(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse keys of which Python would take the last value, and another program may take the first."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {shorten(key)} is there twice, with different values")
        found[key] = value
    return found


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
