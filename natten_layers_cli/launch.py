"""Where installed commands begin: imports PyTorch only after it can answer Ctrl-C and say which package is missing."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

FAILED = 2  # the exit status of argparse, too


def train_hdit() -> int:
    return launch("natten_layers_cli.train_hdit", extra="hdit")


def sample_hdit() -> int:
    return launch("natten_layers_cli.sample_hdit", extra="hdit")


def evaluate() -> int:
    return launch("natten_layers_cli.evaluate", extra="hdit")


def train_lm() -> int:
    return launch("natten_layers_cli.train_lm", extra="lm")


def generate() -> int:
    return launch("natten_layers_cli.generate", extra="lm")


def convert() -> int:
    return launch("natten_layers_cli.convert")


def tune() -> int:
    return launch("natten_layers_cli.tune")


def launch(module: str, *, extra: str = "") -> int:
    """Import ``module`` and return the exit status of its ``main()``.

    Args:
        extra: the extra of natten-layers that brings what ``module`` imports beyond what the library needs.
    """
    open_streams()
    try:
        with noted_ctrl_c() as pressed:
            try:
                main = importlib.import_module(module).main
            except BaseException:
                if not pressed:
                    raise
                return 128 + signal.SIGINT
        return main()
    except ModuleNotFoundError as error:  # some are imported only when they are used
        if not error.name or error.name.startswith("natten_layers"):
            raise
        package = f"natten-layers[{extra}]" if extra else "natten-layers"
        print(f"error: Python finds no {error.name}: pip install '{package}' brings it", file=sys.stderr)
        return FAILED


def open_streams() -> None:
    """Open the standard streams that the caller has closed, as ``2>&-`` does, on nothing.

    The next file to be opened would get the number of one of them, and what is said to the user would go into it.
    """
    for name, flag, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_WRONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flag), mode))  # which takes the lowest number that is free


@contextmanager
def noted_ctrl_c() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C raises KeyboardInterrupt. Extensions turn that into other errors at times."""
    pressed: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    # A shell starts "command &" with the signal ignored, and only the main thread may have handlers.
    ignored = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if ignored or threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
