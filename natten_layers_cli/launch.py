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
        with noted_stops() as stops:
            try:
                main = importlib.import_module(module).main
            except BaseException:
                if not stops:
                    raise
                return 128 + stops[0]
        if stops:  # a package swallowed it, and may be loaded by half
            return 128 + stops[0]
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
def noted_stops() -> Iterator[list[int]]:
    """A list of the signals that asked the command to stop: Ctrl-C, SIGTERM, SIGHUP. Each raises KeyboardInterrupt.

    The list tells them from errors, into which extensions turn the exception at times, or which they swallow. SIGTERM
    would otherwise leave files behind that were not finished.
    """
    stops: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        stops.append(number)
        raise KeyboardInterrupt

    # A shell starts "command &" with Ctrl-C ignored, and nohup with SIGHUP; only the main thread may have handlers.
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):  # which Windows lacks
        usual[signal.SIGHUP] = signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread():
        usual.clear()
    usual = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    for number in usual:
        signal.signal(number, interrupt)
    try:
        yield stops
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
