"""What the kernels for compute capability 9.0 share: walks over chunks, masks, rings of buffers and TMA descriptors.

A walk visits the chunks of a box, which starts anywhere, in boxes of one size. On each axis it begins behind the chunks
that lie inside every row's box and wraps around, so that those come last; the others need a mask on that axis.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..host.problem import Layout, layout, strides, three_axes
from ..host.tiling import Box, Launch, head_width
from ..portable.primitives import (
    LOG2E,
    LOWEST,
    between,
    contiguous_row,
    inside_axes,
    shifted,
    spatial_tile,
    tokens_of,
    union_of_windows,
    unravel,
)

thread_barrier = getattr(gl, "barrier" if hasattr(gl, "barrier") else "thread_barrier")  # renamed in Triton 3.7


@gluon.jit
def axis_walk(lo, hi, inner_lo, inner_hi, STEP: gl.constexpr):
    """Chunks along an axis, how many of them reach past some row's box, and which one comes first."""
    steps = (hi - lo + STEP) // STEP
    first = (inner_lo - lo + STEP - 1) // STEP
    end = (inner_hi - lo + 1) // STEP
    inside = gl.maximum(end - first, 0)
    return steps, steps - inside, gl.where(inside > 0, end, 0)


@gluon.jit
def walk_over(lo, hi, inner_lo, inner_hi, CHUNK: gl.constexpr):
    """First place of a box, and by axis how many chunks it has, how many of them need a mask, and which comes first."""
    t, border_t, start_t = axis_walk(lo[0], hi[0], inner_lo[0], inner_hi[0], CHUNK[0])
    h, border_h, start_h = axis_walk(lo[1], hi[1], inner_lo[1], inner_hi[1], CHUNK[1])
    w, border_w, start_w = axis_walk(lo[2], hi[2], inner_lo[2], inner_hi[2], CHUNK[2])
    return lo, (t, h, w), (border_t, border_h, border_w), (start_t, start_h, start_w)


@gluon.jit
def tile_of(i_work, plan, TILE: gl.constexpr):
    """Batch, index in ``plan``'s last count, tile, lengths and first position; neighbours share what they load."""
    length, _kernel, _stride, tiles, heads = plan
    space = tiles[0] * tiles[1] * tiles[2]
    i_head = i_work // space % heads
    i_tile = i_work // (space * heads) * space + i_work % space
    i_batch, _, count, origin = spatial_tile(i_tile, length, (1, 1, 1), tiles, TILE)
    return i_batch.to(gl.int32), i_head, i_tile, count, origin


@gluon.jit
def tile_walk(i_work, plan, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr):
    """Batch, block of heads, place among ``Broken``, box of positions and walk of a program's next tile of queries."""
    _length, kernel, stride, _tiles, blocks = plan
    i_batch, i_head, i_tile, count, origin = tile_of(i_work, plan, TILE)
    lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE)
    return i_batch, i_head, i_tile * blocks + i_head, origin, walk_over(lo, hi, inner_lo, inner_hi, CHUNK)


@gluon.jit
def chunk_count(walk):
    return walk[1][0] * walk[1][1] * walk[1][2]


@gluon.jit
def next_place(place, walk):
    """The place of the walk after this one, and whether it is the first again."""
    t, h, w = place
    w += 1
    wraps = w >= walk[1][2]
    w = gl.where(wraps, 0, w)
    h += gl.where(wraps, 1, 0)
    wraps = h >= walk[1][1]
    h = gl.where(wraps, 0, h)
    t += gl.where(wraps, 1, 0)
    wraps = t >= walk[1][0]
    return (gl.where(wraps, 0, t), h, w), wraps


@gluon.jit
def wrapped(place, start, steps):
    return gl.where(start + place >= steps, start + place - steps, start + place)


@gluon.jit
def corner_at(place, walk, CHUNK: gl.constexpr):
    """First position of the chunk at a place of the walk."""
    lo, steps, _, start = walk
    return (
        lo[0] + wrapped(place[0], start[0], steps[0]) * CHUNK[0],
        lo[1] + wrapped(place[1], start[1], steps[1]) * CHUNK[1],
        lo[2] + wrapped(place[2], start[2], steps[2]) * CHUNK[2],
    )


@gluon.jit
def chunk_mask(
    place, walk, row_lo, row_hi, inner, M: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """0 and -inf ``[M, N]``: what the rows see of the chunk, worked out only if it reaches past some row's box.

    One loop that branches here, while no product is under way, and not one loop for each kind of chunk: behind a loop
    that may be skipped, ptxas 12.8 uses descriptors of shared memory that it works out in that loop only. One branch,
    not one an axis: what each of those leaves as it was would be copied.
    """
    b_hidden = gl.zeros([M, N], gl.float32, LAYOUT)
    if (place[0] < walk[2][0]) | (place[1] < walk[2][1]) | (place[2] < walk[2][2]):
        corner = corner_at(place, walk, CHUNK)
        for AXIS in gl.static_range(3 - RANK, 3):
            m_seen = between(row_lo[AXIS] - corner[AXIS], row_hi[AXIS] - corner[AXIS], inner[AXIS])
            b_hidden = gl.where(m_seen, b_hidden, float("-inf"))
    return b_hidden


@gluon.jit
def slot(n, STAGES: gl.constexpr):
    """Place in a ring, and phase of its barriers, of the ``n``-th load."""
    return n % STAGES, n // STAGES & 1


@gluon.jit
def new_barriers(SIZE: gl.constexpr, arrivals):
    barriers = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def new_ring(descs, STAGES: gl.constexpr):
    """Buffers for boxes that arrive together, and barriers that tell when they are ready, and when empty.

    Ready: the loads have arrived. Empty: both groups have read them.
    """
    buffers = ()
    for i in gl.static_range(len(descs)):
        buffer = gl.allocate_shared_memory(descs[i].dtype, [STAGES] + descs[i].block_type.shape, descs[i].layout)  # noqa: RUF005
        buffers = buffers + (buffer,)  # noqa: RUF005
    return buffers, new_barriers(STAGES, 1), new_barriers(STAGES, 2)


@gluon.jit
def expect_load(ring, n, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """Wait until both groups have read what the ``n``-th load overwrites."""
    i, phase = slot(n, STAGES)
    mbarrier.wait(ring[2].index(i), phase ^ 1)
    mbarrier.expect(ring[1].index(i), BYTES)


@gluon.jit
def load_box(ring, desc, corner, n, PART: gl.constexpr, STAGES: gl.constexpr):
    """One box of the ``n``-th load, which is expected."""
    i, _ = slot(n, STAGES)
    async_copy_global_to_shared(desc, corner, ring[1].index(i), ring[0][PART].index(i))


@gluon.jit
def await_load(ring, n, expected, STAGES: gl.constexpr):
    i, phase = slot(n, STAGES)
    mbarrier.wait(ring[1].index(i), phase, pred=expected)


@gluon.jit
def release(ring, n, STAGES: gl.constexpr):
    i, _ = slot(n, STAGES)
    mbarrier.arrive(ring[2].index(i), count=1)


@gluon.jit
def new_schedule(READERS: gl.constexpr):
    """A ring of numbers of tiles, and barriers that tell when one is there, and when all readers have read it.

    Tiles see more or fewer chunks: dealt out beforehand, they would leave multiprocessors idle at the end.
    """
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return numbers, new_barriers(2, 1), new_barriers(2, READERS)


@gluon.jit
def take_tile(schedule, n, Taken):
    """A tile that no program has taken, as the ``n``-th of this one: its number, which the other warps are told."""
    i, phase = slot(n, 2)
    i_work = gl.atomic_add(Taken, 1)
    mbarrier.wait(schedule[2].index(i), phase ^ 1)
    schedule[0].index(i).store(gl.full([1], i_work, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
    mbarrier.arrive(schedule[1].index(i), count=1)
    return i_work


@gluon.jit
def await_tile(schedule, n):
    """The number of this program's ``n``-th tile; one past the last if there is none."""
    i, phase = slot(n, 2)
    mbarrier.wait(schedule[1].index(i), phase)
    i_work = gl.max(schedule[0].index(i).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(schedule[2].index(i), count=1)
    return i_work


@gluon.jit
def half_rows(HALF: gl.constexpr, M: gl.constexpr, TILE: gl.constexpr, PACK: gl.constexpr, ROW: gl.constexpr):
    """Positions inside the tile, and heads inside the block, of half of a tile's rows."""
    row = HALF * M + gl.arange(0, M, ROW)
    return unravel(row // PACK, TILE[1], TILE[2]), row % PACK


@gluon.jit
def output_rows(position, head, i_batch, origin, length, heads):
    """Which rows lie inside the image, and their places in a contiguous ``[B, T, H, W, heads]``."""
    index = shifted(position, origin)
    token = tokens_of(index, (0, 0, 0), length, (1, 1, 1))
    m_inside = inside_axes(index, length) & (index[0] >= 0) & (index[1] >= 0) & (index[2] >= 0)
    return m_inside, contiguous_row(i_batch.to(gl.int64), token, length) * heads + head


@gluon.jit
def store_rows(Out, o_row, m_rows, b_rows, D: gl.constexpr, BD: gl.constexpr, STORE: gl.constexpr):
    """Store the first ``D`` of ``BD`` channels of rows, in a contiguous ``[rows, D]``."""
    col = gl.arange(0, BD, gl.SliceLayout(0, STORE))[None, :]
    mask = m_rows[:, None]
    if BD != D:
        mask = mask & (col < D)
    gl.store(Out + (o_row * D)[:, None] + col, b_rows, mask=mask)


@gluon.jit
def row_sinks(Sink, head, sink, SINK: gl.constexpr):
    """The sinks of rows, in powers of two; ``LOWEST`` where there is none."""
    row_sink = gl.full(head.shape, LOWEST, gl.float32, head.type.layout)
    if SINK == "tensor":
        row_sink = gl.maximum(gl.load(Sink + head).to(gl.float32) * LOG2E, row_sink)
    if SINK == "value":
        row_sink = gl.maximum(sink * LOG2E, row_sink)
    return row_sink


Boxes = dict[str, Any]
"""What a TMA descriptor says of a tensor, apart from its address: the fields of a ``TensorDescriptor`` but its base."""


def boxes_of(shape: list[int], strides: list[int], block_shape: list[int]) -> Boxes:
    swizzle = min(128, 2 * block_shape[-1])
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=len(shape))
    return {"shape": shape, "strides": strides, "block_shape": block_shape, "layout": layout, "padding": "zero"}


def axes_of(tensor: Layout) -> tuple[list[int], list[int]]:
    """Sizes and strides of the axes ``batch and t, h, w, head`` of a tensor: TMA knows five, so two share one."""
    batch, t, h, w, head = strides(tensor)
    size_t, size_h, size_w = three_axes(tensor.shape[1:-2], 1)
    sizes = [tensor.shape[0] * size_t, size_h, size_w, tensor.shape[-2]]
    steps = [batch if size_t == 1 else t, h, w, head]
    # The stride of an axis of one says nothing, and may be one that TMA does not take.
    return sizes, [8 if size == 1 else step for size, step in zip(sizes, steps, strict=True)]


def query_boxes(query: Layout, tile: Box, pack: int) -> Boxes:
    """Boxes of positions times heads."""
    sizes, steps = axes_of(query)
    dim = query.shape[-1]
    return boxes_of([*sizes, dim], [*steps, 1], [*tile, pack, head_width(dim)])


def key_boxes(tensor: Layout, box: Box) -> Boxes:
    """Boxes of positions of one head."""
    (*sizes, heads), (*steps, head) = axes_of(tensor)
    dim = tensor.shape[-1]
    return boxes_of([heads, *sizes, dim], [head, *steps, 1], [1, *box, head_width(dim)])


def register_boxes(registers: Layout, rows: int) -> Boxes:
    """Boxes of registers of one head. What all images share is there once."""
    batch, *counts, dim = registers.shape
    steps = [step if size > 1 else 8 for size, step in zip(registers.shape, registers.stride, strict=True)][:3]
    if registers.stride[0] == 0:
        batch, steps[0] = 1, 8
    return boxes_of([batch, *counts, dim], [*steps, 1], [1, rows, 1, head_width(dim)])


def descriptor(tensor: Tensor, boxes: Boxes) -> TensorDescriptor:
    """Without what its constructor checks: that takes the host longer than a launch, and a problem is checked once."""
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**boxes, "base": tensor}
    return made


def query_descriptor(query: Tensor, launch: Launch) -> TensorDescriptor:
    return descriptor(query, query_boxes(layout(query), launch.tile, launch.pack))


def box_descriptor(tensor: Tensor, box: Box) -> TensorDescriptor:
    return descriptor(tensor, key_boxes(layout(tensor), box))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
