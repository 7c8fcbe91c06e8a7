"""The random calls of test_random.py from several threads, each on a stream of its own, over memory that holds NaN.

A kernel that reads what it did not write, a launcher that threads share without a lock, and results that are used on a
stream before they are there show as wrong numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain

import pytest
import torch

pytest.importorskip("triton")

from test_random import DEVICE, ON_GPU, small_problems_take_kernels_of_large_ones  # noqa: F401
from test_random import test_a_random_call as check_random_call

pytestmark = [pytest.mark.gpu] if ON_GPU else []

THREADS = 4 if ON_GPU else 1  # Triton's interpreter serves one thread
CALLS = 20
"""in a test, over all threads"""
FIRST_SEED = 10**6
"""so that these are other calls than those of test_random.py"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" in metafunc.fixturenames:
        seeds = metafunc.config.getoption("--seeds") or (CALLS if ON_GPU else 0)
        metafunc.parametrize("part", range(-(-seeds // CALLS)))


@pytest.fixture(autouse=True)
def new_memory_on_a_cpu_is_nan() -> Iterator[None]:
    """By torch's own means, which on a GPU would replace the algorithms of the eager path."""
    torch.use_deterministic_algorithms(not ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)


def poison_memory() -> None:
    """Leave NaN in the GPU memory that the next tensors on this stream get."""
    if not ON_GPU:
        return
    sizes = [2**n for n in range(9, 27, 2)]
    blocks = [torch.full((size // 4,), torch.nan, device=DEVICE) for size in sizes for _ in range(4)]
    del blocks


def failures(seeds: range) -> list[str]:
    found = []
    with torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else nullcontext():
        for seed in seeds:
            poison_memory()
            try:
                check_random_call(seed)
            except Exception as error:  # all of them, so that one run shows every fault
                found.append(f"seed {seed}: {type(error).__name__}: {error}"[:600])
    return found


def test_calls_on_threads_and_streams(part: int) -> None:
    first = FIRST_SEED + CALLS * part
    with ThreadPoolExecutor(THREADS) as pool:
        shares = pool.map(failures, [range(first + i, first + CALLS, THREADS) for i in range(THREADS)])
        found = list(chain.from_iterable(shares))
    assert not found, "\n".join(found)


def test_memory_is_poisoned() -> None:
    poison_memory()
    assert torch.empty(2**18, device=DEVICE).isnan().any()


def test_a_fault_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> None:
        assert seed != FIRST_SEED + 2, "wrong numbers"

    monkeypatch.setitem(globals(), "check_random_call", fail)
    with pytest.raises(AssertionError, match=f"seed {FIRST_SEED + 2}: AssertionError: wrong numbers"):
        test_calls_on_threads_and_streams(0)
