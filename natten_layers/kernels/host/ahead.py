"""Compilation of many kernels at once, before they are launched. Importing this module needs no Triton."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import Context
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["STATE", "compile_ahead", "submit", "zeroed"]

Results = TypeVar("Results", bound=Tensor | tuple[Tensor | None, ...])


class Compilation:
    """Compiles kernels in threads. It needs :meth:`finish`, in which errors of the compiler are raised."""

    def __init__(self) -> None:
        import triton

        self.threads = _Threads(len(os.sched_getaffinity(0)))
        self.mode = triton.AsyncCompileMode(self.threads)
        # Triton keeps the mode in a context variable, which the threads of a backward pass do not see.
        self.context = Context()
        self.context.run(self.mode.__enter__)

    def submit(self, kernel: Any, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph cannot be captured inside of compile_ahead, which launches no kernel")
        self.context.copy().run(kernel.warmup, *arguments, grid=(1,), **options)

    def finish(self) -> None:
        with self.threads:
            self.context.run(self.mode.__exit__, None, None, None)


class _Threads(ThreadPoolExecutor):
    """Threads that also load what they compiled, for which Triton builds a launcher in C."""

    def submit(self, fn: Callable[[], Any], /) -> Future[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        return super().submit(_compile_and_load, fn, device)


def _compile_and_load(compile_kernel: Callable[[], Any], device: int | None) -> Any:
    with nullcontext() if device is None else torch.cuda.device(device):
        kernel = compile_kernel()
        _ = kernel.run  # a property that loads the kernel
    return kernel


class State:
    is_on = False
    """Whether kernels are compiled instead of launched."""
    compilation: Compilation | None = None
    """It begins with the first kernel."""


STATE = State()
_LOCK = Lock()
"""Several threads submit kernels: a backward pass has one for each device."""


def submit(kernel: Any, arguments: Sequence[Any], options: dict[str, Any]) -> None:
    """Compile a kernel as a launch with these arguments would."""
    with _LOCK:
        if STATE.compilation is None:
            STATE.compilation = Compilation()
        STATE.compilation.submit(kernel, arguments, options)


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Compile the kernels of the calls in this context at once, in threads, instead of one by one as they are launched.

    In the context no kernel of this library is launched, and its operations return zeros; PyTorch computes what it
    always computes, the eager path included. So do once in it what you are going to do, and drop the result::

        with compile_ahead():
            model(x).sum().backward()
        model.zero_grad()

    The context ends when all kernels are compiled and loaded, for all threads of the process. They stay on disk for
    other processes, like all that Triton compiles. Whatever else happens in the context, happens: random numbers are
    drawn, caches are filled, and an optimizer would step.

    Raises:
        RuntimeError: a CUDA graph is captured in the context.
        Exception: what Triton raises where a kernel does not compile, at the end of the context.
    """
    if STATE.is_on:  # the context around this one waits for all
        yield
        return
    STATE.is_on = True
    try:
        yield
    finally:
        STATE.is_on, running, STATE.compilation = False, STATE.compilation, None
        if running is not None:
            running.finish()


def zeroed(results: Results) -> Results:
    """Zero the results of an operator whose kernels were not launched: memory that nobody wrote may hold NaN."""
    for x in (results,) if isinstance(results, Tensor) else results:
        if x is not None:
            x.zero_()
    return results
