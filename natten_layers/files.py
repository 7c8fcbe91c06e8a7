"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["readable_as_usual", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to beside ``path``, which it replaces if all went well: a failure leaves the old file whole.

    Makes the folder where it is missing. The suffix stays, for writers that look at it. Who may read the file is what
    the user's umask says, also where a writer is stricter, as safetensors is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
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
