"""Bytes to train language models on: Python's standard library, or the text files of a folder."""

from __future__ import annotations

import hashlib
import itertools
import lzma
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SEPARATOR = b"\0"  # before every file; text does not hold it
HELD_OUT = 1 / 12


class Corpus(NamedTuple):
    train: Tensor
    """``[bytes]``, uint8, each file behind a separator"""
    held_out: Tensor
    """the same of the files that are not trained on"""
    held_out_bytes: int
    """bytes of the held-out files themselves"""
    xz_bits_per_byte: float
    """size of the held-out files, one behind the other, under ``xz -9``"""


def read_corpus(folder: Path | None, pattern: str | None, most_held_out: int = 0) -> Corpus:
    """Read all files below ``folder`` that match ``pattern`` and are UTF-8.

    A twelfth of the files is held out, by a hash of their relative paths: the same ones on every machine, and adding a
    file moves no other.

    Args:
        folder: None is Python's standard library, without what is installed beside it.
        pattern: a glob; None is every file, or ``*.py`` of the standard library.
        most_held_out: bytes to keep of the held-out files, by dropping files (not into training); 0 keeps all.

    Raises:
        ValueError: no such folder, or too little text in it to train on some and hold some out.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder of text files")
    pattern = pattern or ("*.py" if folder is None else "*")
    parts: tuple[list[bytes], list[bytes]] = [], []
    for path in sorted(root.rglob(pattern)):
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
            f'that match "{pattern}" and are UTF-8 text; at least 10000 bytes and 1 file are needed'
        )
    plain = b"".join(held_out)
    xz = 8 * len(lzma.compress(plain, preset=9)) / len(plain)
    return Corpus(_join(train), _join(held_out), len(plain), xz)


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


def _join(files: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(SEPARATOR + SEPARATOR.join(files)), dtype=torch.uint8)
