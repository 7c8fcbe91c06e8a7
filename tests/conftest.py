import gc
import os
import re
import signal
import threading
from collections.abc import Generator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fast_interpreter import speed_up
from hypothesis import HealthCheck, settings

# Tests must not depend on tiles that were tuned on this machine, so the cache folder is one that does not exist.
os.environ["NATTEN_LAYERS_CACHE"] = str(Path(__file__).parent / "no-such-folder")

# Hypothesis draws the same examples in every run of the same modules, whose numbers it takes, and a slow machine does
# not fail a test.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, help="how many random calls test_random.py and test_stress.py make")
    parser.addoption("--examples", type=int, help="how many examples Hypothesis draws for each test, others every time")


def pytest_configure(config: pytest.Config) -> None:
    """Choose where kernels run before any is imported: on a GPU for ``-m gpu``, otherwise in Triton's interpreter.

    The interpreted suite hides GPUs, so that it has the same tests on every machine. xdist's workers inherit the
    environment.
    """
    if threading.current_thread() is threading.main_thread():  # nohup and shells in the background ignore these
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(threads_of_a_process(torch.get_num_threads(), os.environ))
    if (examples := config.getoption("--examples")) is not None:  # before test modules copy the settings
        checks = list(HealthCheck)
        settings.register_profile("fuzz", deadline=None, max_examples=examples, suppress_health_check=checks)
        settings.load_profile("fuzz")
    if asks_for_gpu(config.getoption("markexpr") or ""):
        if not torch.cuda.is_available():
            raise pytest.UsageError("-m gpu needs a CUDA GPU, and torch.cuda.is_available() is False here")
    else:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        if find_spec("triton"):
            speed_up(import_module("triton.runtime.interpreter"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the collector of garbage walks through what is imported with the tests, which stays until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let no test draw other numbers because of those that ran before it, which differ from run to run."""
    torch.manual_seed(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """What a test draws is not what its fixtures have drawn, and does not depend on whether they were made for it."""
    torch.manual_seed(0)


def threads_of_a_process(threads: int, environment: Mapping[str, str]) -> int:
    """How many of ``threads``, torch's own choice, one process of xdist starts, so that all together fill the cores.

    Torch would start a thread for every core in each of them. With OMP_NUM_THREADS the choice is the caller's.
    """
    if "OMP_NUM_THREADS" in environment:
        return threads
    return max(1, threads // int(environment.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def asks_for_gpu(marks: str) -> bool:
    """Whether an expression for pytest's ``-m`` selects the mark "gpu", rather than only excluding it."""
    return re.search(r"(?<!not )\bgpu\b", marks) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """What ``--numprocesses auto`` means where processes share a GPU; elsewhere xdist's own answer."""
    shares_gpu = asks_for_gpu(config.getoption("markexpr") or "") and torch.cuda.is_available()
    if not shares_gpu or "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return most_processes(len(os.sched_getaffinity(0)), memory, torch.cuda.mem_get_info()[0])


def most_processes(cores: int, memory: int, gpu_memory: int) -> int:
    """Processes that run tests on a GPU side by side, from bytes of the machine's memory and free ones of the GPU's.

    A process compiles on one core, in about 2 GiB. Its CUDA context and what the oracle takes in fp64 rarely need more
    than 4 GiB of the GPU, and hardly more than 6.
    """
    return max(1, min(cores, memory // 2**31, gpu_memory // 2**32))
