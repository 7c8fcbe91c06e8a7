import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# What this machine's user has tuned is not what is tested.
os.environ["NATTEN_LAYERS_CACHE"] = str(Path(__file__).parent / "no-such-folder")

# Examples are the same in every run, and a busy machine is no failure.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, help="how many random calls test_random.py makes")


def pytest_configure(config: pytest.Config) -> None:
    """Decide where kernels run, before anything imports one: on a GPU for ``-m gpu``, else under Triton's interpreter.

    The interpreted suite does not see a GPU, so that it holds the same tests on every machine. xdist's workers inherit
    the environment.
    """
    if asks_for_gpu(config.getoption("markexpr") or ""):
        if not torch.cuda.is_available():
            raise pytest.UsageError("-m gpu needs a CUDA GPU, and torch.cuda.is_available() is False here")
    else:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def asks_for_gpu(marks: str) -> bool:
    """Whether an expression of pytest's ``-m`` names the mark "gpu", and not only to exclude it."""
    return re.search(r"(?<!not )\bgpu\b", marks) is not None
