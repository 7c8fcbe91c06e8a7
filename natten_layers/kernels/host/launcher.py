"""Launching kernels at little cost to the host.

Triton inspects every argument on every launch, which takes the host longer than everything else in a call. A launcher
computes once what depends on shapes alone, and keeps the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from . import ahead

__all__ = ["Launcher", "Plan", "launcher"]

TRITON_OPTIONS = {"enable_fp_fusion": True}
"""Options of every kernel: products and sums become one instruction. Triton 3.10 does so no more where nobody asks."""


TINY = torch.finfo(torch.float32).tiny


class Launcher:
    """A kernel with its grid and all its arguments but tensors and floats.

    Triton specialises a compiled kernel for properties of its run-time arguments: whether an integer is 1 or a multiple
    of 16 and how many bits it needs, a tensor's dtype and whether its address is a multiple of 16, and whether an
    argument is None. The integers of a launcher are fixed, so it keeps a compiled kernel for each combination of the
    rest.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], sizes: Sequence[Any], options: dict[str, Any]) -> None:
        self.kernel, self.grid, self.sizes = kernel, (*grid, 1, 1)[:3], sizes
        # A compiled kernel needs no names, and Triton's launcher takes the fields of a named tuple at twice the time.
        self.plain_sizes = _plain(sizes)
        self.options: dict[str, Any] = TRITON_OPTIONS | options
        # A compiled kernel takes all parameters in order, and ignores those that are compile-time constants.
        self.constants = [options[name] for name in kernel.arg_names if name in options]
        self.compiled: dict[Hashable, Callable[..., None]] = {}

    def __call__(self, tensors: Sequence[Any], floats: Sequence[float | None] = ()) -> None:
        """Launch on the current stream of the current device, which must be the tensors' device.

        Args:
            tensors: the kernel's first parameters: tensors, TMA descriptors of tensors, None, or named tuples of
                tensors and None. The first one is a tensor, or a named tuple whose first is.
            floats: the kernel's last parameters that are not compile-time constants. Integers are converted to floats,
                as Triton would specialise the kernel for them. Numbers that are subnormal in fp32 become zero, as GPU
                instructions flush them; Triton might pass them in fp64 instead.
        """
        numbers = [x if x is None else float(x) if abs(x) >= TINY else 0.0 for x in floats]
        if ahead.STATE.is_on:
            ahead.submit(self.kernel, (*tensors, *self.sizes, *numbers), self.options)
            return
        if _is_watched(self.kernel):
            self.kernel[self.grid](*tensors, *self.sizes, *numbers, **self.options)
            return
        kinds: list[Hashable] = []
        addresses = _passed(tensors, kinds)
        first = tensors[0]
        key = (first.device if isinstance(first, Tensor) else first[0].device, *kinds, *map(type, numbers))
        if (run := self.compiled.get(key)) is not None:
            run(*addresses, *self.plain_sizes, *numbers, *self.constants)
            return
        compiled = self.kernel[self.grid](*tensors, *self.sizes, *numbers, **self.options)
        if isinstance(compiled, CompiledKernel):  # Triton's interpreter returns no compiled kernel
            self.compiled[key] = compiled[self.grid]


class Plan(NamedTuple):
    """The tile configuration of a portable kernel for a call, and its launcher."""

    config: Any
    """Tiles and options, for :func:`natten_layers.explain`."""
    launch: Launcher


@lru_cache(maxsize=1024)
def launcher(
    kernel: Any, grid: Sequence[int], sizes: Sequence[Any], blocks: Hashable = None, **options: Any
) -> Launcher:
    """The launcher of a kernel whose parameters are, in this order, tensors, sizes, floats and compile-time constants.

    Args:
        sizes: integers, and tuples or named tuples of these.
        blocks: block shapes of the kernel's TMA descriptors. They are no parameters, but a kernel is compiled for them,
            so each combination has a launcher of its own.
        options: compile-time constants, and options of Triton such as ``num_warps``.
    """
    return Launcher(kernel, grid, sizes, options)


def _plain(sizes: Any) -> Any:
    return tuple(map(_plain, sizes)) if isinstance(sizes, tuple) else sizes


def _passed(tensors: Sequence[Any], kinds: list[Hashable]) -> list[Any]:
    """What a compiled kernel is given for tensors; ``kinds`` gets the properties that it is specialised for.

    It is given addresses, which Triton's launcher passes on as they are. Given a tensor, it would ask for the address
    and check it with the driver on every launch.
    """
    addresses: list[Any] = []
    for x in tensors:
        if x is None:
            addresses.append(0)  # ignored: the kernel is specialised for None
            kinds.append(None)
        elif isinstance(x, Tensor):
            address = x.data_ptr()
            addresses.append(address)
            kinds += x.dtype, address % 16 == 0
        elif isinstance(x, tuple):
            addresses.append(tuple(_passed(x, kinds)))
        else:
            addresses.append(x)
            kinds.append(x.base.dtype)
    return addresses


def _is_watched(kernel: Any) -> bool:
    """Whether Triton has something to do on each launch that a compiled kernel does not do by itself.

    Debugging and some hooks are such things, and on AMD specialisation for the size of tensors. The hooks that
    profilers set around launches are not: compiled kernels call them.
    """
    return bool(
        knobs.runtime.debug
        or knobs.runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
        or torch.version.hip
    )
