"""Which tests are selected on machines with and without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import asks_for_gpu

COLLECT = """
import os, sys, pytest, torch
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
sys.exit(pytest.main(["--collect-only", "--quiet", "-p", "no:cacheprovider", "tests/test_random.py"]))
"""


def test_kernels_are_tested_interpreted_on_a_machine_with_a_gpu_too() -> None:
    """The default selection includes the kernels' interpreted tests even if the machine has a GPU."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deselected" not in done.stdout
    assert "tests/test_random.py::" in done.stdout


@pytest.mark.parametrize(
    ("marks", "expected"), [("not gpu", False), ("", False), ("gpu", True), ("gpu and not slow", True)]
)
def test_only_a_run_that_asks_for_the_gpu_takes_it(marks: str, expected: bool) -> None:
    assert asks_for_gpu(marks) == expected
