import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Without a GPU the kernels run under Triton's interpreter, which wants to know before they are first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What this machine's user has tuned is not what is tested.
os.environ["NATTEN_LAYERS_CACHE"] = str(Path(__file__).parent / "no-such-folder")

# Examples are the same in every run, and a busy machine is no failure.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, help="how many random calls test_random.py makes")
