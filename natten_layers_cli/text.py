"""Text to train language models on: Python's standard library, a file, or the text files of a folder."""

from __future__ import annotations

import hashlib
import itertools
import lzma
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .running import fail
from .tokens import Codec

SEPARATOR = b"\0"  # before every file; text does not hold it
HELD_OUT = 1 / 12


class Corpus(NamedTuple):
    train: Tensor
    """``[bytes]``, uint8, or ``[tokens]``, int32: each file behind a separator"""
    held_out: Tensor
    """the same of the files that are not trained on"""
    held_out_bytes: int
    """bytes of the held-out files themselves"""
    xz_bits_per_byte: float
    """size of the held-out files, one behind the other, under ``xz -9``"""


def read_corpus(
    folder: Path | None,
    pattern: str | None,
    most_held_out: int = 0,
    codec: Codec | None = None,
    separator: int = SEPARATOR[0],
) -> Corpus:
    """Read all files below ``folder`` that match ``pattern`` and are UTF-8, or a file.

    A twelfth of the files is held out, by a hash of their relative paths: the same ones on every machine, and adding a
    file moves no other. Of a single file, the last twelfth is.

    Args:
        folder: None is Python's standard library, without what is installed beside it.
        pattern: a glob; None is every file, or ``*.py`` of the standard library.
        most_held_out: bytes to keep of the held-out files, by dropping files (not into training); 0 keeps all.
        codec: makes tokens of the text; None leaves bytes.
        separator: the token between files.

    Raises:
        ValueError: no such file or folder, or too little text in it to train on some and hold some out.
        OSError: a file or a folder that cannot be read.
    """
    if folder is not None and folder.is_file():
        return _corpus(*_split(folder, pattern, most_held_out), codec, separator)
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    if not root.is_dir():
        raise ValueError(f"there is neither a text file nor a folder of them at {root}")
    pattern = pattern or ("*.py" if folder is None else "*")
    parts: tuple[list[bytes], list[bytes]] = [], []
    for _ in os.walk(root, onerror=fail):  # a glob leaves folders out that cannot be listed, and says nothing
        pass
    try:
        paths = sorted(root.rglob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"--pattern {pattern} is no glob of files in a folder: {error}") from error
    for path in paths:
        relative = path.relative_to(root)
        if path.is_file() and not (folder is None and "site-packages" in relative.parts):
            text = path.read_bytes()
            if text and _is_text(text):
                digest = hashlib.sha256(relative.as_posix().encode()).digest()
                parts[int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32].append(text)
    train, held_out = parts
    if most_held_out:
        sizes = itertools.accumulate(map(len, held_out))
        held_out = [text for text, size in zip(held_out, sizes, strict=True) if size <= most_held_out] or held_out[:1]
    if sum(map(len, train)) < 10000 or not held_out:
        raise ValueError(
            f"{root} has {len(train)} files to train on ({sum(map(len, train))} bytes) and {len(held_out)} to hold out "
            f'that match "{pattern}" and are UTF-8 text; at least 10000 bytes and 1 file are needed. Names decide '
            "which files, one in twelve, are held out: give more of them, or a single file, the end of which is"
        )
    return _corpus(train, held_out, codec, separator)


def _split(path: Path, pattern: str | None, most_held_out: int) -> tuple[list[bytes], list[bytes]]:
    """A file's start to train on, and its last twelfth, which begins with a line if it can."""
    text = path.read_bytes()
    if pattern is not None:
        raise ValueError(f"--pattern {pattern} chooses files of a folder, and {path} is a file")
    if not _is_text(text):
        raise ValueError(f"{path} is not UTF-8 text without zero bytes")
    if len(text) < 10000:
        raise ValueError(f"{path} has {len(text)} bytes; at least 10000 are needed")
    characters = text.decode()
    cut = int(len(characters) * (1 - HELD_OUT))
    cut = characters.rfind("\n", 0, cut) + 1 or cut
    held_out = characters[cut:].encode()[: most_held_out or None].decode(errors="ignore")
    return [characters[:cut].encode()], [(held_out or characters[cut]).encode()]


def _corpus(train: list[bytes], held_out: list[bytes], codec: Codec | None, separator: int) -> Corpus:
    plain = b"".join(held_out)
    xz = 8 * len(lzma.compress(plain, preset=9)) / len(plain)
    first, second = (_join(files) if codec is None else _encode(files, codec, separator) for files in (train, held_out))
    return Corpus(first, second, len(plain), xz)


def random_windows(text: Tensor, length: int, count: int, seed: int) -> Tensor:
    """``[count, length + 1]`` tokens from random places: inputs, and targets one further. ``seed`` decides which."""
    starts = torch.randint(len(text) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return text[starts[:, None] + torch.arange(length + 1)].long()


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return SEPARATOR not in data


def _encode(files: list[bytes], codec: Codec, separator: int) -> Tensor:
    encoded = ([separator, *codec.encode(text.decode(), special=False)] for text in files)
    return torch.cat([torch.tensor(tokens, dtype=torch.int32) for tokens in encoded])


def _join(files: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(SEPARATOR + SEPARATOR.join(files)), dtype=torch.uint8)
