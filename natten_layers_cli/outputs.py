"""Where commands write, checked before their work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path

from natten_layers.io.files import FILE_SUFFIXES, check_directory_name


def check_output(
    parser: argparse.ArgumentParser, name: str, path: Path, suffixes: Collection[str] = (), *, needed: bool = True
) -> None:
    """End with a usage error where the file that a command writes at its end cannot be written: before its work.

    Args:
        name: of the flag or argument that gave ``path``.
        suffixes: of the formats that the command writes; without any, all names are taken.
        needed: whether the name chooses the format; else only the suffix of another kind of file is refused.
    """
    suffix = path.suffix.lower()
    if suffixes and suffix not in suffixes and (needed or suffix in FILE_SUFFIXES):
        parser.error(f"{name} must end with {' or '.join(suffixes)}, got {path}")
    if (reason := output_gap(path)) is not None:
        parser.error(f"{name} {path}{reason}")


def output_gap(path: Path) -> str | None:
    """Why no file can be written at ``path``, or None. It goes on where its name ends."""
    if path.is_dir():
        return " is a folder: name a file in it"
    if path.exists() and not path.is_file():
        return " is a device or a pipe, which a file would replace: name another"
    folder = next(parent for parent in path.absolute().parents if parent.exists())  # what is missing is made
    return None if folder.is_dir() and os.access(folder, os.W_OK) else f": nothing can be written to {folder}"


def check_output_folder(parser: argparse.ArgumentParser, name: str, path: Path, instead: str) -> None:
    """End with a usage error where a command cannot write files to the folder ``path``, or a file must be meant by it.

    Args:
        name: of the flag or argument that gave ``path``.
        instead: what else the command writes, and how to ask for it.
    """
    if path.exists() and not path.is_dir():
        parser.error(f"{name} {path} is no folder: name another, or {instead}")
    try:
        check_directory_name(path, f": make it first, or name {instead}")
    except ValueError as error:
        parser.error(f"{name} {error}")
    if (reason := output_gap(path / "file")) is not None:
        parser.error(f"{name} {path}{reason}")
