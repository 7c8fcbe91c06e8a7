"""Which calls the kernels in Gluon compute, with what boxes; apart from them, as not every Triton has it."""

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import product
from math import ceil, prod
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import query_bounds, window_bounds
from .configs import Box, Launch, boxes, next_power_of_2
from .launches import explicit_launch, override_pack, remembered
from .problem import Layout, Problem, strides, three_axes

ROWS = 128  # of a tile: positions times packed heads
COLUMNS = 128  # of a chunk; the kernel of key gradients keeps twice as many accumulators and takes half of it
SMALL_ROWS = 64  # of a tile of the kernels for small windows
SCORES = 320  # of a row there at most, as they are in registers at once
GRADIENTS = 256  # the same in the backward pass, whose kernels keep more beside them
PARTS = 3  # that the keys of a tile come in at most
STAGES = 2  # chunks in shared memory
NUMBERS = 2**15  # in a head's keys of a window, from which on it is large: 256 keys of 128 channels, 512 of 64
REGISTERED = 2**18  # the same where registers take a second launch, which reads and writes the output once more
LEAST_ROWS = 2**19  # of queries, from which on a small window's kernel runs longer than the host needs to launch it
PAIRS = 2**28  # of a query and a key in large windows: fewer are done before the host has prepared a launch
ALIGNMENT = 4  # statistics of queries: TMA loads 16 bytes at least, from multiples of as many

Axis = tuple[int, int, int, bool]  # length, kernel, stride, causal
Bounds = Callable[[torch.Tensor, int, int, int, bool], tuple[torch.Tensor, torch.Tensor]]


class BackwardLaunches(NamedTuple):
    query: Launch
    key: Launch


class SmallLaunch(NamedTuple):
    """How the kernel of small windows computes a problem."""

    tile: Box
    """positions of a program"""
    pack: int
    """query heads of a program"""
    parts: tuple[Box, ...]
    """boxes of keys, one behind the other along ``axis``, that cover what a tile sees"""
    axis: int
    registers: int
    """keys of the box that holds the registers, or 0"""
    max_registers: int

    @property
    def keys(self) -> int:
        """that a program loads, registers included"""
        return sum(map(prod, self.parts)) + self.registers


class SmallBackwardLaunches(NamedTuple):
    query: SmallLaunch | None
    key: SmallLaunch | None


class Kernels(NamedTuple):
    forward: ModuleType
    backward: ModuleType
    small_forward: ModuleType
    small_backward: ModuleType


@cache
def kernels() -> Kernels | None:
    """The modules with the kernels, if this Triton has the Gluon that they are written in."""
    try:
        from . import hopper, hopper_backward, hopper_small, hopper_small_backward
    except ImportError:
        return None
    return Kernels(hopper, hopper_backward, hopper_small, hopper_small_backward)


@remembered
def forward_launch(problem: Problem, with_state: bool = False) -> Launch | SmallLaunch | None:
    """How a call is computed here, with or without statistics of rows; None where the portable kernel does it."""
    pack, large = override_pack(), pays(problem)
    if not (large or small_pays(problem)) or not supports(problem) or kernels() is None:
        return None
    if explicit_launch("forward", problem.problem_class) is not None or (pack and problem.group % pack):
        return None
    return launch_of(problem, pack) if large else small_launch_of(problem, pack, with_state)


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


def pays(problem: Problem) -> bool:
    """Whether it was measured to be faster than the portable kernel, on problems like this one."""
    window = prod(problem.kernel_size)
    least = REGISTERED if problem.registers else NUMBERS
    return window * problem.query.shape[-1] >= least and prod(problem.query.shape[:-1]) * window >= PAIRS


def small_pays(problem: Problem) -> bool:
    """The same for the kernel of small windows."""
    return prod(problem.query.shape[:-1]) >= LEAST_ROWS and prod(problem.kernel_size) < SCORES


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
    pack = pack or min(problem.group & -problem.group, 16)
    tile, chunk = best_boxes(_axes(problem), ROWS // pack, COLUMNS, window_bounds)
    return Launch(tile, chunk, pack, num_warps=4, stages=STAGES, max_registers=168)


def key_launch_of(problem: Problem) -> Launch:
    """The launch over keys. In 1-D there is one buffer of tiles (``buffered_tiles``), which leaves room for a stage."""
    tile, chunk = best_boxes(_axes(problem), ROWS, COLUMNS // 2, query_bounds, ALIGNMENT)
    stages = STAGES if problem.rank > 1 else STAGES + 1
    return Launch(tile, chunk, pack=1, num_warps=4, stages=stages, max_registers=168)


@lru_cache(maxsize=1024)
def small_launch_of(problem: Problem, pack: int | None = None, with_state: bool = False) -> SmallLaunch | None:
    """The launch that computes the fewest scores, in the fewest parts; None if it can not be computed so.

    Strides are 1. Rows of one image follow those of another where TMA writes, so tiles do not reach past its end.
    """
    p = problem
    registers = [x for x in (p.additional_keys, p.additional_values) if x is not None]
    if prod(p.stride) > 1 or p.query.shape[0] >= 2**16 or not all(map(holds_registers, registers)):
        return None
    if len({x.stride[0] == 0 for x in registers}) > 1:  # keys that all images share, values that they do not
        return None
    pack = pack or min(p.group & -p.group, 16)
    tiles = (tile for tile in boxes(SMALL_ROWS // pack, p.lengths) if p.lengths[0] % tile[0] == 0)
    launches = [small_launch(p, tile, axis, pack, with_state=with_state) for tile in tiles for axis in range(3)]
    fitting = [x for x in launches if x.max_registers and prod(x.tile) * pack == SMALL_ROWS]
    return min(fitting, key=_small_cost, default=None)


@lru_cache(maxsize=1024)
def small_key_launch_of(problem: Problem) -> SmallLaunch | None:
    """The same for the gradients of keys and values: ``keys`` are the queries that see a tile, of one head."""
    p = problem
    if prod(p.stride) > 1 or p.query.shape[0] >= 2**16:
        return None
    dim = p.query.shape[-1]
    tiles = (tile for tile in boxes(SMALL_ROWS, p.lengths) if p.lengths[0] % tile[0] == 0 and prod(tile) == SMALL_ROWS)
    bare = p._replace(additional_keys=None)
    launches = [small_launch(bare, tile, axis, 1, query_bounds) for tile in tiles for axis in range(3)]
    launch = min((x for x in launches if x.keys <= GRADIENTS), key=_small_cost, default=None)
    if launch is None:
        return None
    needed = 72 + dim  # scores and their gradients of 32 queries, two accumulators and some more
    most = _registers_a_thread(needed, 4 * (launch.keys + SMALL_ROWS) * dim + 8 * launch.keys)
    return launch._replace(max_registers=most) if most else None


def _small_cost(launch: SmallLaunch) -> tuple[int, int, int]:
    return launch.keys, len(launch.parts), -launch.parts[0][2]


def small_launch(
    problem: Problem, tile: Box, axis: int, pack: int, bounds: Bounds = window_bounds, with_state: bool = False
) -> SmallLaunch:
    """That of one tile, which sees by ``bounds`` what comes in parts along one axis."""
    extents = [_extent(x, b, bounds) for x, b in zip(_axes(problem), tile, strict=True)]
    box = [next_power_of_2(e) for e in extents]
    unit = max(1, 16 // (prod(box) // box[axis]))  # matrix instructions take 16 keys at least
    sides = binary_parts(ceil(extents[axis] / unit), PARTS)
    parts = [three_axes([unit * side if i == axis else box[i] for i in range(3)], 1) for side in sides]
    registers = max(16, next_power_of_2(problem.registers)) if problem.registers else 0
    launch = SmallLaunch(tile, pack, tuple(parts), axis, registers, 0)
    if launch.keys > SCORES:
        return launch
    dim = problem.query.shape[-1]
    # Scores, accumulators and, kept for the end, where statistics go; with fewer ptxas serializes the products.
    needed = max(launch.keys // 2 + dim // 2 + (8 if with_state else 0), 80 if launch.keys <= 80 else 96)
    return launch._replace(max_registers=_registers_a_thread(needed, 2 * (2 * launch.keys + SMALL_ROWS) * dim))


@lru_cache(maxsize=1024)
def small_query_launch_of(problem: Problem, pack: int | None = None) -> SmallLaunch | None:
    """The same for the gradients of queries."""
    launch = small_launch_of(problem, pack)
    if launch is None or launch.keys > GRADIENTS:
        return None
    dim = problem.query.shape[-1]
    # Scores and their gradients of 64 keys, accumulators and some more; with too few ptxas serializes the products.
    repeats = sum(prod(part) // 64 for part in launch.parts) > 1
    needed = dim // 2 + (112 if repeats else 80)
    most = _registers_a_thread(needed, 4 * (launch.keys + SMALL_ROWS) * dim)
    return launch._replace(max_registers=most) if most else None


def _registers_a_thread(needed: int, shared: int) -> int:
    """As many as the programs that share a multiprocessor leave to each other.

    0 where a program would be alone there: then nothing is computed while it waits.

    Args:
        needed: less is not tried.
        shared: bytes of shared memory that a program has.
    """
    programs = min(227 * 1024 // (shared + 1024), 2**16 // (128 * needed))
    return min(2**16 // (128 * programs) // 8 * 8, 248) if programs > 1 else 0


def binary_parts(count: int, most: int) -> list[int]:
    """At most ``most`` powers of two, the largest first, whose sum is ``count`` or the next that can be had."""
    parts: list[int] = []
    while count > 0:
        last = len(parts) == most - 1
        parts.append(next_power_of_2(count) if last else 1 << (count.bit_length() - 1))
        count -= parts[-1]
    return parts


def holds_registers(registers: Layout) -> bool:
    """Whether a TMA descriptor can hold them: one batch of them for all images, or strides as those of tokens."""
    axes = zip(registers.shape[:-1], registers.stride[:-1], strict=True)
    return all(size == 1 or (step > 0 and step % 8 == 0) or (i == step == 0) for i, (size, step) in enumerate(axes))


def _axes(problem: Problem) -> tuple[Axis, ...]:
    lengths, kernel_size, stride, _ = problem.geometry
    return tuple(zip(lengths, kernel_size, stride, three_axes(problem.is_causal, False), strict=True))


@lru_cache(maxsize=1024)
def best_boxes(axes: tuple[Axis, ...], rows: int, columns: int, bounds: Bounds, alignment: int = 1) -> tuple[Box, Box]:
    """The tile and the chunk that execute the fewest scores, borders included; of equals those with the longest rows.

    ``bounds`` says what the rows see; chunks along the last axis start at multiples of ``alignment``.
    """
    lengths = axes[0][0], axes[1][0], axes[2][0]

    def cost(pair: tuple[Box, Box]) -> tuple[int, int]:
        tile, chunk = pair
        alignments = 1, 1, alignment
        scores = (executed(axes[i], tile[i], chunk[i], bounds, alignments[i]) for i in range(3))
        return prod(scores), -tile[2] - chunk[2]

    chunks = [chunk for chunk in boxes(columns, lengths) if chunk[2] >= alignment]
    return min(product(boxes(rows, lengths), chunks), key=cost)


@lru_cache(maxsize=4096)
def _extent(axis: Axis, tile: int, bounds: Bounds) -> int:
    """Most columns that some tile of rows sees along an axis."""
    low, high = _spans(axis, tile, bounds)
    return int((high - low + 1).max())


def _spans(axis: Axis, tile: int, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last column that each tile of rows sees."""
    length, kernel, stride, causal = axis
    first = torch.arange(0, length, tile)
    low, _ = bounds(first, length, kernel, stride, causal)
    _, high = bounds((first + tile - 1).clamp(max=length - 1), length, kernel, stride, causal)
    return low, high


@lru_cache(maxsize=4096)
def executed(axis: Axis, tile: int, chunk: int, bounds: Bounds, alignment: int) -> int:
    """Pairs of a row and a column along an axis that a kernel computes."""
    low, high = _spans(axis, tile, bounds)
    low = low // alignment * alignment
    return int(((high - low + chunk).clamp(min=0) // chunk).sum()) * tile * chunk
