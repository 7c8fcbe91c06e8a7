"""Which tests are selected on machines with and without a GPU, in how many processes, and how much they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import asks_for_gpu, most_processes

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


@pytest.mark.parametrize(
    ("cores", "memory", "gpu_memory", "expected"),
    [(32, 256, 139, 32), (128, 560, 139, 34), (8, 16, 139, 8), (16, 8, 139, 4), (16, 64, 22, 5), (16, 64, 3, 1)],
)
def test_processes_that_share_a_gpu_fit_into_its_memory(
    cores: int, memory: int, gpu_memory: int, expected: int
) -> None:
    assert most_processes(cores, memory << 30, gpu_memory << 30) == expected


def test_random_calls_of_a_group_share_kernels() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("shared_kernels.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), "60"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    calls, kernels, of_first_calls = map(int, done.stdout.split())
    assert 0.7 * calls < kernels <= 1.3 * of_first_calls  # twelve groups with four kernels or more
