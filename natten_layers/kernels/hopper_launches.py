"""Which calls ``hopper.py``'s kernel computes, with what boxes; apart from it, as not every Triton has its Gluon."""

from functools import lru_cache
from itertools import product
from math import prod

import torch

from ..geometry import window_bounds
from .configs import Box, Launch, boxes
from .problem import Layout, Problem, strides, three_axes

ROWS = 128  # of a tile: positions times packed heads
KEYS = 128  # of a chunk
STAGES = 2  # chunks of keys, and of values, in shared memory
WINDOW = 2048  # keys, from which on it is used: half of the smallest window that it was timed with
PAIRS = 2**28  # of a query and a key: fewer are done before the host has prepared a launch with descriptors


@lru_cache(maxsize=1024)
def supports(problem: Problem) -> bool:
    """Whether the kernel can compute a call, if its tensors' addresses are multiples of 16."""
    p = problem
    return (
        p.device.type == "cuda"
        and torch.cuda.get_device_capability(p.device) == (9, 0)
        and p.dtype in (torch.float16, torch.bfloat16)
        and p.query.shape[-1] == p.value.shape[-1]
        and p.value.shape[-1] in (64, 128)
        and not p.scale_first
        and prod(p.dilation) == 1
        and all(map(is_addressable, (p.query, p.key, p.value)))
    )


def pays(problem: Problem) -> bool:
    """Whether it was measured to be faster than the portable kernel, on problems like this one."""
    window = prod(problem.kernel_size)
    return window >= WINDOW and problem.query.shape[-1] == 128 and prod(problem.query.shape[:-1]) * window >= PAIRS


def is_addressable(tensor: Layout) -> bool:
    """Whether a TMA descriptor can hold it: five axes at most, strides that are positive multiples of 16 bytes."""
    batch, t, *_ = strides(tensor)
    foldable = tensor.shape[0] == 1 or len(tensor.shape) < 6 or tensor.shape[1] == 1 or batch == tensor.shape[1] * t
    axes = zip(tensor.shape[:-1], tensor.stride[:-1], strict=True)
    return foldable and all(size == 1 or (step > 0 and step % 8 == 0) for size, step in axes)


def launch_of(problem: Problem, pack: int | None = None) -> Launch:
    """The launch of a problem, with ``pack`` heads a program if given: a power of two that divides the group."""
    _, kernel_size, stride, _ = problem.geometry
    causal = three_axes(problem.is_causal, False)
    return best_launch(problem.lengths, kernel_size, stride, causal, pack or min(problem.group & -problem.group, 16))


@lru_cache(maxsize=1024)
def best_launch(lengths: Box, kernel: Box, stride: Box, causal: tuple[bool, bool, bool], pack: int) -> Launch:
    """The boxes that execute the fewest scores, borders included; among equals those with the longest rows."""
    axes = tuple(zip(lengths, kernel, stride, causal, strict=True))

    def cost(pair: tuple[Box, Box]) -> tuple[int, int]:
        tile, chunk = pair
        return prod(map(executed, axes, tile, chunk)), -tile[2] - chunk[2]

    tile, chunk = min(product(boxes(ROWS // pack, lengths), boxes(KEYS, lengths)), key=cost)
    return Launch(tile, chunk, pack, num_warps=4, stages=STAGES, max_registers=168)


@lru_cache(maxsize=4096)
def executed(axis: tuple[int, int, int, bool], tile: int, chunk: int) -> int:
    """Pairs of a query and a key along an axis that the kernel computes."""
    length, kernel, stride, causal = axis
    first = torch.arange(0, length, tile)
    low, _ = window_bounds(first, length, kernel, stride, causal)
    _, high = window_bounds((first + tile - 1).clamp(max=length - 1), length, kernel, stride, causal)
    return int(((high - low + chunk) // chunk).sum()) * tile * chunk
