"""Progress: a bar on a terminal, and in a log a line now and then."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""Between two lines of a log, and before the first one: what takes less is not worth a line."""


class _Lines:
    """A file of which tqdm, which writes over what it wrote, makes lines. A log on a full disk gets none."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            with suppress(OSError):
                sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def progress(total: int | None, description: str | None = None, **options: Any) -> tqdm:
    """A bar, or where standard error is no terminal, its lines."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, dynamic_ncols=True, **options)
    form = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    # With a fixed miniters, tqdm's monitor does not show more than was asked for.
    intervals = {"delay": SECONDS, "mininterval": SECONDS, "miniters": 1}
    return tqdm(
        total=total, desc=description, file=_Lines(), bar_format=form, **{**options, **intervals, "leave": False}
    )
