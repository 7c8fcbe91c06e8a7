"""Where installed commands begin: imports PyTorch only after it can answer Ctrl-C and say which package is missing."""

from __future__ import annotations

import importlib
import signal
import sys

FAILED = 2  # the exit status of argparse, too


def train_hdit() -> int:
    return launch("natten_layers_cli.train_hdit", extra="hdit")


def sample_hdit() -> int:
    return launch("natten_layers_cli.sample_hdit", extra="hdit")


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
    main = None
    try:
        main = importlib.import_module(module).main
        return main()
    except KeyboardInterrupt:  # PyTorch takes seconds to load; main() answers for itself
        if main is not None:
            raise
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:  # some are imported only when they are used
        if not error.name or error.name.startswith("natten_layers"):
            raise
        package = f"natten-layers[{extra}]" if extra else "natten-layers"
        print(f"error: Python finds no {error.name}: pip install '{package}' brings it", file=sys.stderr)
        return FAILED
