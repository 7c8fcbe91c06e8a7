"""What ``compile_ahead`` does on a GPU, without having one: run by ``test_ahead.py`` in a process of its own."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from benchmarks.compile_only import SHARED_MEMORY, Driver
from natten_layers import compile_ahead, neighborhood_attention
from natten_layers.kernels.host import problem
from natten_layers.kernels.host.launcher import launcher
from natten_layers.kernels.ops import attention as attention_ops

STUB = Driver(80)
THREADS: dict[str, threading.Thread] = {}
"""The thread that compiled each kernel"""


def attend() -> tuple[Tensor, ...]:
    query, key = (torch.full((1, 8, 8, heads, 16), torch.nan, dtype=torch.float16).requires_grad_() for heads in (2, 1))
    out = neighborhood_attention(query, key, key, 3, impl="fused")
    return out, *torch.autograd.grad(out.sum(), (query, key))


@triton.jit
def broken_kernel(X):
    tl.static_assert(False, "this kernel never compiles")


def check_calls() -> None:
    results: list[Tensor] = []
    with compile_ahead():
        threads = [threading.Thread(target=lambda: results.extend(attend())) for _ in range(2)]
        for thread in threads:
            thread.start()
            thread.join()
        with compile_ahead():  # changes nothing
            attend()
    names = sorted(THREADS)
    assert names == ["backward_key_kernel", "backward_query_kernel", "forward_kernel"], names
    assert sorted(STUB.utils.loaded) == names, f"loaded {STUB.utils.loaded}, each should be once"
    assert threading.current_thread() not in THREADS.values()
    assert threading.active_count() == 1
    assert all(not x.any() for x in results), "memory that no kernel wrote"
    THREADS.clear()
    attend()
    assert not THREADS, f"compiled once more: {THREADS}"


def check_errors() -> None:
    """A kernel that does not compile is an error at the end of the context and on each launch, and nothing more."""
    launch = launcher(broken_kernel, (1,), ())
    for context in (compile_ahead(), nullcontext()):
        with pytest.raises(triton.CompilationError, match="never compiles"), context:
            launch((torch.zeros(1),))
    assert threading.active_count() == 1
    query = torch.ones(1, 8, 2, 16)
    with compile_ahead():
        results = neighborhood_attention(query, query, query, 3, impl="fused")
    assert "forward_kernel" in THREADS
    assert not results.any()


def note_thread(*, src: Any, **_: object) -> None:
    THREADS[src.name] = threading.current_thread()


def main() -> None:
    driver.set_active(STUB)  # pyright: ignore[reportArgumentType]
    attention_ops.unsupported = lambda *_: None
    problem.device_traits = lambda device: ("stub", SHARED_MEMORY[80])
    knobs.compilation.listener = note_thread
    check_calls()
    check_errors()


if __name__ == "__main__":
    main()
