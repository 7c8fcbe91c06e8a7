"""The random calls of test_random.py from several threads, each on a stream of its own, over memory that holds NaN.

A kernel that reads what it did not write, a launcher that threads share without a lock, and results that are used on a
stream before they are there show as wrong numbers.

The first call of a group, for which its kernels are compiled, is made alone, and then the others at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain

import pytest
import torch

pytest.importorskip("triton")

import test_random
from random_calls import ON_GPU, draw_call, first_of, groups
from test_random import (
    DEVICE,
    check_call,
    small_problems_take_kernels_of_large_ones,  # noqa: F401
)

pytestmark = [pytest.mark.gpu] if ON_GPU else []

THREADS = 4 if ON_GPU else 1  # Triton's interpreter serves one thread
FIRST_SEED = 10**6
"""so that these are other calls than those of test_random.py; a multiple of the size of groups"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        count = metafunc.config.getoption("--seeds") or (20 if ON_GPU else 0)
        metafunc.parametrize("seeds", groups(range(FIRST_SEED, FIRST_SEED + count)), ids=first_of)


@pytest.fixture(autouse=True)
def new_memory_on_a_cpu_is_nan() -> Iterator[None]:
    """By torch's own means, which on a GPU would replace the algorithms of the eager path."""
    torch.use_deterministic_algorithms(not ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """To the other processes that make such calls on the same GPU."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


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
                check_call(seed)
            except Exception as error:  # all of them, so that one run shows every fault
                found.append(f"seed {seed}: {type(error).__name__}: {error}"[:600])
    return found


def test_calls_on_threads_and_streams(seeds: range) -> None:
    found, others = failures(seeds[:1]), seeds[1:]
    with ThreadPoolExecutor(THREADS) as pool:
        found += chain.from_iterable(pool.map(failures, [others[i::THREADS] for i in range(THREADS)]))
    assert not found, "\n".join(found)


def test_memory_is_poisoned() -> None:
    poison_memory()
    assert torch.empty(2**18, device=DEVICE).isnan().any()


@pytest.mark.parametrize("wrong", [0, 1, 4])
def test_a_fault_is_found_and_named(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    made: list[int] = []

    def fail(seed: int) -> None:
        made.append(seed)
        assert seed != FIRST_SEED + wrong, "wrong numbers"

    monkeypatch.setitem(globals(), "check_call", fail)
    seeds = range(FIRST_SEED, FIRST_SEED + 5)
    with pytest.raises(AssertionError, match=f"seed {FIRST_SEED + wrong}: AssertionError: wrong numbers"):
        test_calls_on_threads_and_streams(seeds)
    assert (made[0], sorted(made)) == (FIRST_SEED, list(seeds))


def test_one_thread_at_a_time_is_in_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call in forward mode of pure torch stands for one of this library: both fail beside another."""
    call = draw_call(FIRST_SEED)._replace(moving=("query",))
    monkeypatch.setattr(test_random, "draw_call", lambda seed: call)
    monkeypatch.setattr(test_random, "check", lambda *_: None)

    def differentiate(*arguments: object) -> None:
        del arguments
        for _ in range(100):
            torch.func.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))

    monkeypatch.setattr(test_random, "check_in_forward_mode", differentiate)
    with ThreadPoolExecutor(4) as pool:
        assert not list(chain.from_iterable(pool.map(failures, [range(seed, seed + 4) for seed in range(8)])))
