"""Folders of images, with a class for each subfolder or without classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import features
from torch import Tensor

from .images import Fit, centre_crop, open_image, problem_of, to_tensor
from .progress import progress
from .running import fail

IMAGE_SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff"),
    *((".webp",) if features.check("webp") else ()),  # what Pillow was built without is named as skipped
    *((".avif",) if features.check("avif") else ()),
}
LITTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}  # folders that systems leave, some with images in them
LOOKED_AT = 4096
"""Files that are handed to threads at a time: millions would take memory, and Ctrl-C would wait for all of them."""


class Found(NamedTuple):
    """What lies in a folder, but for hidden files and litter."""

    loose: list[Path]
    """images in the folder itself"""
    classes: dict[str, list[Path]]
    """images below each subfolder that has any"""
    skipped: Counter[str]
    """other files, by suffix"""


def scan(folder: Path) -> Found:
    """Sort what is in a folder, and in those below it.

    Raises:
        ValueError: no such folder.
        OSError: one that cannot be listed: its classes would be missing, and nobody would see why.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    images, skipped, seen = [], Counter(), set()
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        here = os.path.realpath(place)
        folders[:] = [] if here in seen else [name for name in folders if not _is_litter(name)]
        for name in [] if here in seen else files:
            path = Path(place, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not _is_litter(name):
                images.append(path)
            elif not _is_litter(name):
                skipped[path.suffix.lower() or name] += 1
        seen.add(here)
    loose, classes = [], {}
    for path in sorted(images, key=lambda path: path.parts):
        first, *below = path.relative_to(folder).parts
        (classes.setdefault(first, []) if below else loose).append(path)
    return Found(loose, classes, skipped)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in LITTER


def some(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many there are beside them."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


class Folder:
    """All images under a folder, made to fit ``size``; with ``classes``, each subfolder is a class.

    Of an animation the first picture is taken. Hidden files and folders do not count, nor do folders without images.

    Raises:
        ValueError: no folder, no image in it, or with ``classes`` images that are in no class.
    """

    def __init__(
        self, folder: Path, size: tuple[int, int], channels: int, *, classes: bool, fit: Fit | None = None
    ) -> None:
        loose, subfolders, self.skipped = scan(folder)
        if not loose and not subfolders:
            has = f"; it has {some(sorted(self.skipped))} files" if self.skipped else ""
            raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){has}")
        if classes and loose:
            found = f"{some([path.name for path in loose], 3)} beside class folders ({some(list(subfolders))})"
            raise ValueError(
                f"{folder} holds {found if subfolders else 'no class folders'}: move such images into class folders, "
                "or elsewhere; or train on all images without classes, with --no-classes"
            )
        self.size, self.channels, self.fit = size, channels, fit or centre_crop
        self.class_names = tuple(subfolders) if classes else ()
        groups = list(subfolders.values()) if classes else [sorted(chain(loose, *subfolders.values()))]
        self.images = [(path, label) for label, paths in enumerate(groups) for path in paths]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        path, label = self.images[index]
        return to_tensor(self.fit(open_image(path, self.channels), self.size)), label

    def check(self, rank: int, world: int) -> None:
        """Look at this process's share of the files for such as :meth:`load` would fail on.

        Raises:
            ValueError: there are; the message names them.
        """
        paths = [path for path, _ in self.images[rank::world]]
        look_at = partial(problem_of, channels=self.channels)
        problems: list[str] = []
        with (
            ThreadPoolExecutor() as pool,  # reading from a disk is most of the work
            progress(len(paths), "checking images", leave=False, disable=rank > 0 or len(paths) < 500) as bar,
        ):
            for start in range(0, len(paths), LOOKED_AT):
                for problem in pool.map(look_at, paths[start : start + LOOKED_AT]):
                    problems += [problem] if problem else []
                    bar.update()
        if problems:
            raise ValueError(
                f"{len(problems)} of {len(paths)} images cannot be used; mend, move or delete: {some(problems)}"
            )
