"""Launches that cost the host little: what depends on shapes alone is worked out once, compiled kernels are kept.

Triton looks at every argument of every launch, which takes the host longer than everything else in a call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

__all__ = ["Launcher", "Plan", "launcher"]


TINY = torch.finfo(torch.float32).tiny


class Launcher:
    """A kernel, its grid, and all its arguments but tensors and floats.

    Of arguments that it does not compile in, Triton compiles for an integer's value (1, a multiple of 16, the bits that
    it needs), a tensor's dtype and whether its address is a multiple of 16, and whether there is a tensor or float at
    all. The integers of a launcher are fixed, so a compiled kernel is kept for every combination of the rest.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], sizes: Sequence[Any], options: dict[str, Any]) -> None:
        self.kernel, self.grid, self.sizes, self.options = kernel, (*grid, 1, 1)[:3], sizes, options
        # A compiled kernel takes all parameters in their order, and skips those that were compiled in.
        self.constants = [options[name] for name in kernel.arg_names if name in options]
        self.compiled: dict[Hashable, Callable[..., None]] = {}

    def __call__(self, tensors: Sequence[Any], floats: Sequence[float | None] = ()) -> None:
        """Launch on the current device, which is the tensors', and its current stream.

        Args:
            tensors: the kernel's first parameters: tensors, TMA descriptors of tensors, or None. The first is a tensor.
            floats: its last ones that are not compiled in. An integer is converted: Triton would compile it in. What
                is not normal in fp32 is zero, as it is for a GPU's instructions: Triton may take it for fp64.
        """
        numbers = [x if x is None else float(x) if abs(x) >= TINY else 0.0 for x in floats]
        if _is_watched(self.kernel):
            self.kernel[self.grid](*tensors, *self.sizes, *numbers, **self.options)
            return
        addresses, kinds = _passed(tensors)
        key = (tensors[0].device, *kinds, *map(type, numbers))
        if (run := self.compiled.get(key)) is not None:
            run(*addresses, *self.sizes, *numbers, *self.constants)
            return
        compiled = self.kernel[self.grid](*tensors, *self.sizes, *numbers, **self.options)
        if isinstance(compiled, CompiledKernel):  # Triton's interpreter compiles nothing
            self.compiled[key] = compiled[self.grid]


class Plan(NamedTuple):
    """How a portable kernel computes a call."""

    config: Any
    """its tiles and options, for people"""
    launch: Launcher


@lru_cache(maxsize=1024)
def launcher(
    kernel: Any, grid: Sequence[int], sizes: Sequence[Any], blocks: Hashable = None, **options: Any
) -> Launcher:
    """The launcher of one kernel for such arguments, in the order of its parameters: tensors, sizes, floats, options.

    Args:
        sizes: integers and tuples of integers.
        blocks: shapes of the blocks of its TMA descriptors, which each have a launcher of their own.
        options: compile-time arguments, and options of Triton such as ``num_warps``.
    """
    return Launcher(kernel, grid, sizes, options)


def _passed(tensors: Sequence[Any]) -> tuple[list[Any], list[Hashable]]:
    """What a compiled kernel takes for tensors, and what it was compiled for.

    Addresses, as Triton's launcher takes numbers as they are; of a tensor it asks for the address, and the driver
    about that.
    """
    addresses: list[Any] = []
    kinds: list[Hashable] = []
    for x in tensors:
        if x is None:
            addresses.append(0)  # compiled in
            kinds.append(None)
        elif isinstance(x, Tensor):
            address = x.data_ptr()
            addresses.append(address)
            kinds += x.dtype, address % 16 == 0
        else:
            addresses.append(x)
            kinds.append(x.base.dtype)
    return addresses, kinds


def _is_watched(kernel: Any) -> bool:
    """Whether Triton does something on each launch that a compiled kernel does not: debugging, hooks.

    On AMD it also compiles for the size of tensors. Hooks around launches, which profilers set, do not count: compiled
    kernels call them.
    """
    return bool(
        knobs.runtime.debug
        or knobs.runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
        or torch.version.hip
    )
