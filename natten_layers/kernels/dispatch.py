"""Which calls the kernels in Gluon compute, with what boxes; apart from them, as not every Triton has it."""

from functools import cache, lru_cache
from itertools import product
from math import prod
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import query_bounds, window_bounds
from .host.problem import Layout, Problem, RotationKind, strides
from .host.tiling import Axis, Bounds, Box, Launch, boxes, spans
from .host.tuned import explicit_launch, override_pack, remembered
from .sm90.small_tiling import (
    SCORES,
    SmallBackwardLaunches,
    SmallLaunch,
    StripLaunch,
    most_packed,
    small_key_launch_of,
    small_launch_of,
    small_query_launch_of,
    strip_launch_of,
    strip_pays,
)

ROWS = 128  # of a tile: positions times packed heads
COLUMNS = 128  # of a chunk; the kernel of key gradients keeps twice as many accumulators and takes half of it
STAGES = 2  # chunks in shared memory
NUMBERS = 2**15  # in a head's keys of a window, from which on it is large: 256 keys of 128 channels, 512 of 64
REGISTERED = 2**18  # the same where registers take a second launch, which reads and writes the output once more
LEAST_ROWS = 2**18  # of queries, from which on a small window's kernel runs for as long as the host needs to launch it
PAIRS = 2**28  # of a query and a key in large windows: fewer are done before the host has prepared a launch
ALIGNMENT = 4  # statistics of queries: TMA loads 16 bytes at least, from multiples of as many


class BackwardLaunches(NamedTuple):
    query: Launch
    key: Launch


class Kernels(NamedTuple):
    forward: ModuleType
    backward: ModuleType
    small_forward: ModuleType
    strip_forward: ModuleType
    small_backward: ModuleType

    def forward_of(self, launch: Launch | SmallLaunch | StripLaunch) -> ModuleType:
        """The module whose kernel takes such a launch."""
        return {SmallLaunch: self.small_forward, StripLaunch: self.strip_forward}.get(type(launch), self.forward)


@cache
def kernels() -> Kernels | None:
    """The modules with the kernels, if this Triton has the Gluon that they are written in."""
    try:
        from .sm90 import large_backward, large_forward, small_backward, small_forward, small_forward_rolling
    except ImportError:
        return None
    return Kernels(large_forward, large_backward, small_forward, small_forward_rolling, small_backward)


def forward_launch(problem: Problem, with_state: bool = False) -> Launch | SmallLaunch | StripLaunch | None:
    """How a call is computed here, with or without statistics of rows; None where the portable kernel does it."""
    pack, large = override_pack(), pays(problem)
    if not (large or small_pays(problem)) or not supports(problem) or kernels() is None:
        return None
    if _is_chosen_elsewhere(problem):
        return None
    if large:
        return launch_of(problem, pack)
    single, strip = small_launch_of(problem, pack, with_state), strip_launch_of(problem, pack, with_state)
    return strip if strip is not None and strip_pays(problem, strip, single) else single


@remembered
def projected_launch(problem: Problem, rotation: RotationKind) -> StripLaunch | None:
    """The launch that also normalises and rotates queries and keys; None where that takes one of its own.

    However small the problem: two launches take the host longer than one.
    """
    p = problem
    if not has_small_window(p) or pays(p) or not supports(p) or not is_rotatable(p, rotation) or kernels() is None:
        return None
    return None if _is_chosen_elsewhere(p) else strip_launch_of(p, override_pack(), rotates=True)


def _is_chosen_elsewhere(problem: Problem) -> bool:
    """Whether somebody chose a launch, or heads a program, of the portable forward kernel."""
    pack = override_pack()
    return explicit_launch("forward", problem.problem_class) is not None or bool(pack and problem.group % pack)


@remembered
def backward_launches(problem: Problem, grad_out: Layout) -> BackwardLaunches | None:
    """The same for the gradients."""
    pack = override_pack()
    if (
        not (pays(problem) and supports_backward(problem, grad_out))
        or kernels() is None
        or (pack and problem.group % pack)
    ):
        return None
    if any(explicit_launch(kind, problem.problem_class) for kind in ("backward_query", "backward_key")):
        return None
    return BackwardLaunches(launch_of(problem, pack), key_launch_of(problem))


@remembered
def small_backward_launches(problem: Problem, grad_out: Layout) -> SmallBackwardLaunches | None:
    """The same for the gradients of small windows, of which the portable kernels may compute some."""
    pack = override_pack()
    if not (small_pays(problem) and supports(problem) and is_addressable(grad_out)) or kernels() is None:
        return None
    query, key = (explicit_launch(kind, problem.problem_class) for kind in ("backward_query", "backward_key"))
    return SmallBackwardLaunches(
        None if query is not None or (pack and problem.group % pack) else small_query_launch_of(problem, pack),
        None if key is not None else small_key_launch_of(problem),
    )


def are_aligned(*tensors: Tensor | None) -> bool:
    """Whether the tensors start where TMA can: addresses are not part of a problem."""
    for x in tensors:  # noqa: SIM110 - all() over a generator takes twice as long, in every call
        if x is not None and x.data_ptr() % 16:
            return False
    return True


@lru_cache(maxsize=1024)
def supports(problem: Problem) -> bool:
    """Whether the forward kernel can compute a call, if its tensors' addresses are multiples of 16."""
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


def is_rotatable(problem: Problem, rotation: RotationKind) -> bool:
    """Whether a thread can have whole pairs of a head: half of it turns, or all, or nothing."""
    dim, pairs = problem.query.shape[-1], rotation.pairs
    return pairs in (0, dim // 4, dim // 2) and pairs % rotation.axes == 0


def pays(problem: Problem) -> bool:
    """Whether it was measured to be faster than the portable kernel, on problems like this one."""
    window = prod(problem.kernel_size)
    least = REGISTERED if problem.registers else NUMBERS
    return window * problem.query.shape[-1] >= least and prod(problem.query.shape[:-1]) * window >= PAIRS


def small_pays(problem: Problem) -> bool:
    """The same for the kernel of small windows."""
    return prod(problem.query.shape[:-1]) >= LEAST_ROWS and has_small_window(problem)


def has_small_window(problem: Problem) -> bool:
    return prod(problem.kernel_size) < SCORES


def is_addressable(tensor: Layout) -> bool:
    """Whether a TMA descriptor can hold it: five axes at most, strides that are positive multiples of 16 bytes."""
    batch, t, *_ = strides(tensor)
    foldable = tensor.shape[0] == 1 or len(tensor.shape) < 6 or tensor.shape[1] == 1 or batch == tensor.shape[1] * t
    axes = zip(tensor.shape[:-1], tensor.stride[:-1], strict=True)
    return foldable and all(size == 1 or (step > 0 and step % 8 == 0) for size, step in axes)


def supports_backward(problem: Problem, grad_out: Layout) -> bool:
    """Whether the backward kernels can compute a call's gradients, if its tensors' addresses are multiples of 16."""
    return supports(problem) and problem.lengths[2] >= ALIGNMENT and is_addressable(grad_out)


def launch_of(problem: Problem, pack: int | None = None) -> Launch:
    """The launch over queries of a problem, with ``pack`` heads a program if given: a power of two in the group."""
    pack = pack or most_packed(problem)
    tile, chunk = best_boxes(problem.axes, ROWS // pack, COLUMNS, window_bounds, batch=problem.query.shape[0])
    return Launch(tile, chunk, pack, num_warps=4, stages=STAGES, max_registers=168)


def key_launch_of(problem: Problem) -> Launch:
    """The launch over keys. In 1-D there is one buffer of tiles (``buffered_tiles``), which leaves room for a stage."""
    tile, chunk = best_boxes(problem.axes, ROWS, COLUMNS // 2, query_bounds, ALIGNMENT, problem.query.shape[0])
    stages = STAGES if problem.rank > 1 else STAGES + 1
    return Launch(tile, chunk, pack=1, num_warps=4, stages=stages, max_registers=168)


@lru_cache(maxsize=1024)
def best_boxes(
    axes: tuple[Axis, ...], rows: int, columns: int, bounds: Bounds, alignment: int = 1, batch: int = 1
) -> tuple[Box, Box]:
    """The tile and the chunk that execute the fewest scores, borders included; of equals those with the longest rows.

    ``bounds`` says what the rows see; chunks along the last axis start at multiples of ``alignment``. In a batch they
    end with the last frame: TMA would load the first ones of the next image behind it, and a weight of zero times NaN
    is NaN.
    """
    lengths = axes[0][0], axes[1][0], axes[2][0]

    def cost(pair: tuple[Box, Box]) -> tuple[int, int]:
        tile, chunk = pair
        alignments = 1, 1, alignment
        scores = (executed(axes[i], tile[i], chunk[i], bounds, alignments[i]) for i in range(3))
        return prod(scores), -tile[2] - chunk[2]

    chunks = [chunk for chunk in boxes(columns, lengths) if chunk[2] >= alignment]
    pairs = product(boxes(rows, lengths), chunks)
    return min((x for x in pairs if batch == 1 or ends_inside(axes[0], x[0][0], x[1][0], bounds)), key=cost)


@lru_cache(maxsize=4096)
def ends_inside(axis: Axis, tile: int, chunk: int, bounds: Bounds) -> bool:
    """Whether no walk of chunks reaches past the end of an axis. Those of one position never do."""
    low, high = spans(axis, tile, bounds)
    return bool((low + (high - low + chunk) // chunk * chunk <= axis[0]).all())


@lru_cache(maxsize=4096)
def executed(axis: Axis, tile: int, chunk: int, bounds: Bounds, alignment: int) -> int:
    """Pairs of a row and a column along an axis that a kernel computes."""
    low, high = spans(axis, tile, bounds)
    low = low // alignment * alignment
    return int(((high - low + chunk).clamp(min=0) // chunk).sum()) * tile * chunk
