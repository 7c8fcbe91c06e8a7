"""Where commands write, checked before their work."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection
from pathlib import Path


def check_output(parser: argparse.ArgumentParser, name: str, path: Path, suffixes: Collection[str] = ()) -> None:
    """End with a usage error where the file that a command writes at its end cannot be written: before its work.

    Args:
        name: of the flag or argument that gave ``path``.
        suffixes: of the formats that the command writes, if the name chooses one.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        parser.error(f"{name} must end with {' or '.join(suffixes)}, got {path}")
    if path.is_dir():
        parser.error(f"{name} {path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        parser.error(f"{name} {path} is a device or a pipe, which a file would replace: name another")
    _check_writable(parser, f"{name} {path}", path)


def check_output_folder(parser: argparse.ArgumentParser, name: str, path: Path, instead: str) -> None:
    """End with a usage error where a command cannot write files to the folder ``path``, or a file must be meant by it.

    Args:
        name: of the flag or argument that gave ``path``.
        instead: what else the command writes, and how to ask for it.
    """
    if path.exists() and not path.is_dir():
        parser.error(f"{name} {path} is no folder: name another, or {instead}")
    if not path.exists() and re.fullmatch(r"\.[A-Za-z]\w*", path.suffix):  # that of best-0.5 is a number
        parser.error(f"{name} {path} would be a folder: leave {path.suffix} away, make it first, or name {instead}")
    _check_writable(parser, f"{name} {path}", path / "file")


def _check_writable(parser: argparse.ArgumentParser, what: str, file: Path) -> None:
    folder = next(parent for parent in file.absolute().parents if parent.exists())  # what is missing is made
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        parser.error(f"{what}: nothing can be written to {folder}")
