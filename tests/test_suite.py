"""Which tests are selected on machines with and without a GPU, in how many processes, and how much they compile."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import asks_for_gpu, most_processes, threads_of_a_process

from natten_layers.kernels.sm90.available import gluon_gap

COLLECT = """
import os, sys, pytest, torch
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
status = pytest.main(["--collect-only", "--quiet", "-p", "no:cacheprovider", "tests/test_random.py"])
print("threads:", torch.get_num_threads())
sys.exit(status)
"""


def test_kernels_are_tested_interpreted_on_a_machine_with_a_gpu_too() -> None:
    """The default selection includes the kernels' interpreted tests even if the machine has a GPU.

    The run believes itself to be one of a thousand, which leaves it one thread.
    """
    chosen = "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
    environment = {k: v for k, v in os.environ.items() if k not in chosen} | {"PYTEST_XDIST_WORKER_COUNT": "1000"}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deselected" not in done.stdout
    assert "tests/test_random.py::" in done.stdout
    assert "threads: 1\n" in done.stdout


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


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, 16), ({"PYTEST_XDIST_WORKER_COUNT": "5"}, 3), ({"PYTEST_XDIST_WORKER_COUNT": "30"}, 1),
     ({"PYTEST_XDIST_WORKER_COUNT": "30", "OMP_NUM_THREADS": "16"}, 16)],
)  # fmt: skip
def test_processes_share_the_cores(environment: dict[str, str], expected: int) -> None:
    assert threads_of_a_process(16, environment) == expected


def test_the_collector_walks_past_what_the_tests_import() -> None:
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000  # objects of PyTorch and others


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """What shared_kernels.py counts."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("shared_kernels.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), "60"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_random_calls_of_a_group_share_kernels(counted: dict[str, Any]) -> None:
    # Twelve groups with four kernels or more.
    assert 0.7 * counted["calls"] < counted["kernels"] <= 1.3 * counted["of first calls"]


def test_random_calls_take_every_kernel_for_compute_capability_9(counted: dict[str, Any]) -> None:
    """Calls with any options take the portable kernels, so that those which most users run were hardly tested."""
    if (gap := gluon_gap()) is not None:
        pytest.skip(gap)
    assert len(counted["shares"]) > 20
    assert [name for name, percent in counted["shares"].items() if percent < 3] == []
