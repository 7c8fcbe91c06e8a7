"""The forward pass of large windows on compute capability 9.0 (H100, H200): ``forward.py``'s kernel, written in Gluon.

A program stays on its multiprocessor and takes tile after tile. One warp each loads queries, keys and values by TMA
into rings of shared memory; two warp groups take half of a tile's rows each. A group starts the scores of a chunk
together with the weighted sum of the chunk before, so that the tensor core works while the softmax is computed.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .configs import Launch
from .forward import forward_kernel
from .primitives import (
    LN2,
    LOG2E,
    LOWEST,
    contiguous_row,
    hidden,
    inside_axes,
    shifted,
    spatial_tile,
    tokens_of,
    union_of_windows,
    unravel,
    windows_of,
)
from .problem import Inputs, Problem, layout, strides, three_axes
from .registers import fold_registers


@gluon.jit
def axis_walk(lo, hi, inner_lo, inner_hi, STEP: gl.constexpr):
    """Chunks along an axis, how many of them reach past some query's window, and which one comes first.

    The walk starts behind the chunks that lie inside every window and wraps around, so that those come last.
    """
    steps = (hi - lo + STEP) // STEP
    first = (inner_lo - lo + STEP - 1) // STEP
    end = (inner_hi - lo + 1) // STEP
    inside = gl.maximum(end - first, 0)
    return steps, steps - inside, gl.where(inside > 0, end, 0)


@gluon.jit
def tile_walk(i_work, plan, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr):
    """Batch, block of heads, box of positions and walk of a program's next tile; neighbours share their keys."""
    length, kernel, stride, tiles, blocks = plan
    space = tiles[0] * tiles[1] * tiles[2]
    i_head = i_work // space % blocks
    i_tile = i_work // (space * blocks) * space + i_work % space
    i_batch, _, count, origin = spatial_tile(i_tile, length, (1, 1, 1), tiles, TILE)
    lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE)
    t, border_t, start_t = axis_walk(lo[0], hi[0], inner_lo[0], inner_hi[0], CHUNK[0])
    h, border_h, start_h = axis_walk(lo[1], hi[1], inner_lo[1], inner_hi[1], CHUNK[1])
    w, border_w, start_w = axis_walk(lo[2], hi[2], inner_lo[2], inner_hi[2], CHUNK[2])
    walk = (lo, (t, h, w), (border_t, border_h, border_w), (start_t, start_h, start_w))
    return i_batch.to(gl.int32), i_head, i_tile * blocks + i_head, origin, walk


@gluon.jit
def segment(steps, border, AXIS: gl.constexpr):
    """Half-open box of the walk's places whose chunks need a mask on ``AXIS`` and the axes after it; 3: on none."""
    begin = (border[0] * (AXIS > 0), border[1] * (AXIS > 1), border[2] * (AXIS > 2))
    end = (
        border[0] if AXIS == 0 else steps[0],
        border[1] if AXIS == 1 else steps[1],
        border[2] if AXIS == 2 else steps[2],
    )
    return begin, end


@gluon.jit
def volume(begin, end):
    return (end[0] - begin[0]) * (end[1] - begin[1]) * (end[2] - begin[2])


@gluon.jit
def next_place(place, begin, end):
    t, h, w = place
    w += 1
    wraps = w >= end[2]
    w = gl.where(wraps, begin[2], w)
    h += gl.where(wraps, 1, 0)
    wraps = h >= end[1]
    h = gl.where(wraps, begin[1], h)
    return t + gl.where(wraps, 1, 0), h, w


@gluon.jit
def wrapped(place, start, steps):
    return gl.where(start + place >= steps, start + place - steps, start + place)


@gluon.jit
def corner_at(place, walk, CHUNK: gl.constexpr):
    """First key of the chunk at a place of the walk."""
    lo, steps, _, start = walk
    return (
        lo[0] + wrapped(place[0], start[0], steps[0]) * CHUNK[0],
        lo[1] + wrapped(place[1], start[1], steps[1]) * CHUNK[1],
        lo[2] + wrapped(place[2], start[2], steps[2]) * CHUNK[2],
    )


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
def new_ring(desc, STAGES: gl.constexpr):
    """Buffers, and barriers that tell when one is ready (the load has arrived) and empty (both groups have read it)."""
    buffers = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)  # noqa: RUF005
    return buffers, new_barriers(STAGES, 1), new_barriers(STAGES, 2)


@gluon.jit
def load_box(ring, desc, corner, n, STAGES: gl.constexpr):
    buffers, ready, empty = ring
    i, phase = slot(n, STAGES)
    mbarrier.wait(empty.index(i), phase ^ 1)
    mbarrier.expect(ready.index(i), desc.block_type.nbytes)
    async_copy_global_to_shared(desc, corner, ready.index(i), buffers.index(i))


@gluon.jit
def await_load(ring, n, expected, STAGES: gl.constexpr):
    i, phase = slot(n, STAGES)
    mbarrier.wait(ring[1].index(i), phase, pred=expected)


@gluon.jit
def release(ring, n, STAGES: gl.constexpr):
    i, _ = slot(n, STAGES)
    mbarrier.arrive(ring[2].index(i), count=1)


@gluon.jit
def await_turn(turns, n, HALF: gl.constexpr):
    """Groups start matrix products in turns, so that one computes its softmax while the other has the tensor core."""
    mbarrier.wait(turns.index(HALF), (n + 1 + HALF) & 1)


@gluon.jit
def pass_turn(turns, HALF: gl.constexpr):
    mbarrier.arrive(turns.index(1 - HALF), count=1)


@gluon.jit
def load_queries(ring, desc, plan, works, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr,
                 PACK: gl.constexpr):  # fmt: skip
    """The warp that loads the tiles' queries."""
    n = 0
    for i_work in range(gl.program_id(0), works, gl.num_programs(0)):
        i_batch, i_head, _i_flag, origin, _walk = tile_walk(i_work, plan, CAUSAL, TILE, CHUNK)
        corner = [i_batch * plan[0][0] + origin[0], origin[1], origin[2], i_head * PACK, 0]
        load_box(ring, desc, corner, n, 2)
        n += 1  # noqa: SIM113


@gluon.jit
def load_chunks(ring, desc, plan, works, group, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr,
                PACK: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The warp that loads keys, or the one that loads values."""
    n = 0
    for i_work in range(gl.program_id(0), works, gl.num_programs(0)):
        i_batch, i_head, _i_flag, _origin, walk = tile_walk(i_work, plan, CAUSAL, TILE, CHUNK)
        for AXIS in gl.static_range(3 - RANK, 4):
            begin, end = segment(walk[1], walk[2], AXIS)
            place = begin
            for _ in range(volume(begin, end)):
                t, h, w = corner_at(place, walk, CHUNK)
                load_box(ring, desc, [i_head * PACK // group, i_batch * plan[0][0] + t, h, w, 0], n, STAGES)
                place = next_place(place, begin, end)
                n += 1


@gluon.jit
def start_scores(b_q, k_ring, n, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr):
    """Queries times keys of chunk ``n``, whose arrival was awaited."""
    i, _ = slot(n, STAGES)
    M: gl.constexpr = b_q.shape[0]
    b_k = k_ring[0].index(i).reshape([N, D]).permute((1, 0))
    b_zero = gl.zeros([M, N], gl.float32, SCORES)
    return warpgroup_mma(b_q, b_k, b_zero, use_acc=False, is_async=True)


@gluon.jit
def start_values(b_p, b_acc, v_ring, n, STAGES: gl.constexpr):
    """Add the weighted values of chunk ``n``."""
    await_load(v_ring, n, True, STAGES)
    i, _ = slot(n, STAGES)
    b_v = v_ring[0].index(i).reshape([b_p.shape[1], b_acc.shape[1]])
    return warpgroup_mma(b_p, b_v, b_acc, is_async=True)


@gluon.jit
def softmax_weights(b_s, row_m, part_l, factor, DTYPE: gl.constexpr, WEIGHTS: gl.constexpr, PARTS: gl.constexpr):
    """Weights of a chunk, the new maximum and sum, and the factor by which what was summed up before shrinks.

    ``part_l [M, 8]`` holds sums over every eighth key: those that one thread has, so none has to be exchanged.
    """
    row_m_new = gl.maximum(row_m, gl.max(b_s, 1) * factor)
    row_alpha = gl.exp2(row_m - row_m_new)
    b_p = gl.exp2(b_s * factor - row_m_new[:, None])
    part = gl.convert_layout(gl.sum(b_p.reshape([b_p.shape[0], b_p.shape[1] // 8, 8]), 1), PARTS)
    part_l = part_l * gl.convert_layout(row_alpha, gl.SliceLayout(1, PARTS))[:, None] + part
    return gl.convert_layout(b_p.to(DTYPE), WEIGHTS), row_m_new, part_l, row_alpha


@gluon.jit
def attend_first(
    b_q, row_m, part_l, k_ring, turns, n, row_lo, row_hi, corner, inner, factor,
    HALF: gl.constexpr, RANK: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SCORES: gl.constexpr, WEIGHTS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Weights of a tile's first chunk."""
    await_load(k_ring, n, True, STAGES)
    await_turn(turns, n, HALF)
    b_s = start_scores(b_q, k_ring, n, N, D, STAGES, SCORES)
    pass_turn(turns, HALF)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    release(k_ring, n, STAGES)
    b_s += hidden(row_lo, row_hi, corner, inner, RANK)
    b_p, row_m, part_l, _ = softmax_weights(b_s, row_m, part_l, factor, b_q.dtype, WEIGHTS, PARTS)
    return b_p, row_m, part_l


@gluon.jit
def attend_next(
    b_q, b_p, b_acc, row_m, part_l, k_ring, v_ring, turns, n, last, row_lo, row_hi, corner, inner, factor,
    HALF: gl.constexpr, AXIS: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SCORES: gl.constexpr, WEIGHTS: gl.constexpr, PARTS: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Weights of chunk ``n``, whose keys are there; meanwhile the weighted values of the chunk before are added."""
    await_turn(turns, n, HALF)
    b_s = start_scores(b_q, k_ring, n, N, D, STAGES, SCORES)
    b_acc = start_values(b_p, b_acc, v_ring, n - 1, STAGES)
    pass_turn(turns, HALF)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    release(k_ring, n, STAGES)
    if AXIS < 3:
        b_s += hidden(row_lo, row_hi, corner, inner, 3 - AXIS)
    b_p, row_m, part_l, row_alpha = softmax_weights(b_s, row_m, part_l, factor, b_q.dtype, WEIGHTS, PARTS)
    # Awaited here, because the assembler moves the next wait above the softmax unless another one stands before it.
    await_load(k_ring, n + 1, n < last, STAGES)
    b_acc = warpgroup_mma_wait(0, deps=[b_acc])
    release(v_ring, n - 1, STAGES)
    b_acc = b_acc * gl.convert_layout(row_alpha, gl.SliceLayout(1, OUT))[:, None]
    return b_p, b_acc, row_m, part_l


@gluon.jit
def initial_state(Sink, row_head, sink, SINK: gl.constexpr, M: gl.constexpr, ROW: gl.constexpr, PARTS: gl.constexpr):
    """Maximum and sum of an empty softmax, or of one that has seen the sink: an eighth, exactly, in each part."""
    if SINK == "none":
        row_m = gl.full([M], LOWEST, gl.float32, ROW)
        row_l = gl.zeros([M], gl.float32, ROW)
    else:
        if SINK == "tensor":
            row_sink = gl.load(Sink + row_head).to(gl.float32) * LOG2E
        else:
            row_sink = gl.full([M], sink * LOG2E, gl.float32, ROW)
        row_m = gl.maximum(row_sink, LOWEST)
        row_l = gl.where(row_sink > LOWEST, 0.125, 0.0)
    return row_m, gl.zeros([M, 8], gl.float32, PARTS) + gl.convert_layout(row_l, gl.SliceLayout(1, PARTS))[:, None]


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
    return inside_axes(index, length), contiguous_row(i_batch.to(gl.int64), token, length) * heads + head


@gluon.jit
def attend(
    q_ring, k_ring, v_ring, turns, Out, RowMax, RowSum, Broken, Sink, plan, works, sink, factor,
    HALF: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr,
    RANK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SINK: gl.constexpr, WITH_STATE: gl.constexpr,
):  # fmt: skip
    """A group of four warps that computes one half of the rows of every tile."""
    M: gl.constexpr = TILE[0] * TILE[1] * TILE[2] * PACK // 2
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    PARTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    length, kernel, stride, _tiles, blocks = plan
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    position, head = half_rows(HALF, M, TILE, PACK, gl.SliceLayout(1, SCORES))
    n = 0
    i_tile = 0
    for i_work in range(gl.program_id(0), works, gl.num_programs(0)):
        i_batch, i_head, i_flag, origin, walk = tile_walk(i_work, plan, CAUSAL, TILE, CHUNK)
        row_lo, row_hi = windows_of(shifted(position, origin), length, kernel, stride, CAUSAL)
        row_m, part_l = initial_state(Sink, i_head * PACK + head, sink, SINK, M, gl.SliceLayout(1, SCORES), PARTS)
        b_acc = gl.zeros([M, D], gl.float32, OUT)
        last = n + volume((0, 0, 0), walk[1]) - 1

        await_load(q_ring, i_tile, True, 2)
        b_q = q_ring[0].index(i_tile % 2).reshape([2 * M, D]).slice(HALF * M, M)
        b_p, row_m, part_l = attend_first(
            b_q, row_m, part_l, k_ring, turns, n, row_lo, row_hi, corner_at((0, 0, 0), walk, CHUNK), inner, factor,
            HALF, RANK, N, D, STAGES, SCORES, WEIGHTS, PARTS,
        )  # fmt: skip
        n += 1
        await_load(k_ring, n, n <= last, STAGES)
        done = 1  # chunks of the segments below
        for AXIS in gl.static_range(3 - RANK, 4):
            begin, end = segment(walk[1], walk[2], AXIS)
            size = volume(begin, end)
            place = begin
            if done > 0:
                place = next_place(place, begin, end)
            for _ in range(gl.minimum(done, size), size):
                b_p, b_acc, row_m, part_l = attend_next(
                    b_q, b_p, b_acc, row_m, part_l, k_ring, v_ring, turns, n, last, row_lo, row_hi,
                    corner_at(place, walk, CHUNK), inner, factor,
                    HALF, AXIS, N, D, STAGES, SCORES, WEIGHTS, PARTS, OUT,
                )  # fmt: skip
                place = next_place(place, begin, end)
                n += 1
            done = gl.maximum(done - size, 0)
        b_acc = start_values(b_p, b_acc, v_ring, n - 1, STAGES)
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        release(v_ring, n - 1, STAGES)

        row_l = gl.convert_layout(gl.sum(part_l, 1), gl.SliceLayout(1, OUT))
        # Through the queries' buffer, so that a warp writes whole rows.
        b_q.store((b_acc / row_l[:, None]).to(b_q.dtype))
        b_out = b_q.load(STORE)
        fence_async_shared()
        release(q_ring, i_tile, 2)
        i_tile += 1  # noqa: SIM113

        out_position, out_head = half_rows(HALF, M, TILE, PACK, gl.SliceLayout(1, STORE))
        m_rows, o_row = output_rows(out_position, i_head * PACK + out_head, i_batch, origin, length, blocks * PACK)
        col = gl.arange(0, D, gl.SliceLayout(0, STORE))
        gl.store(Out + (o_row * D)[:, None] + col[None, :], b_out, mask=m_rows[:, None])
        m_rows, o_row = output_rows(position, i_head * PACK + head, i_batch, origin, length, blocks * PACK)
        if WITH_STATE:
            gl.store(RowMax + o_row, row_m * LN2, mask=m_rows)
            gl.store(RowSum + o_row, gl.convert_layout(row_l, gl.SliceLayout(1, SCORES)), mask=m_rows)
        row_rest = gl.convert_layout(gl.sum(b_acc * 0.0, 1), gl.SliceLayout(1, SCORES))
        m_broken = m_rows & ~(gl.abs(row_rest) >= 0.0)
        gl.store(Broken + i_flag + head * 0, gl.full([M], 1, gl.int32, gl.SliceLayout(1, SCORES)), mask=m_broken)


@gluon.jit
def hopper_kernel(
    q_desc, k_desc, v_desc, Out, RowMax, RowSum, Broken, Sink,
    length, kernel, stride, tiles, group, blocks, works, sink, scale,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr,
    D: gl.constexpr, SINK: gl.constexpr, WITH_STATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of the tiles ``program_id + i * num_programs``; ``Broken`` marks those whose results are not finite."""
    q_ring, k_ring, v_ring = new_ring(q_desc, 2), new_ring(k_desc, STAGES), new_ring(v_desc, STAGES)
    turns = new_barriers(2, 1)
    plan = (length, kernel, stride, tiles, blocks)
    factor = scale * LOG2E
    gl.warp_specialize(
        [
            (attend, (q_ring, k_ring, v_ring, turns, Out, RowMax, RowSum, Broken, Sink, plan, works, sink, factor,
                      0, CAUSAL, TILE, CHUNK, PACK, RANK, D, STAGES, SINK, WITH_STATE)),
            (attend, (q_ring, k_ring, v_ring, turns, Out, RowMax, RowSum, Broken, Sink, plan, works, sink, factor,
                      1, CAUSAL, TILE, CHUNK, PACK, RANK, D, STAGES, SINK, WITH_STATE)),
            (load_queries, (q_ring, q_desc, plan, works, CAUSAL, TILE, CHUNK, PACK)),
            (load_chunks, (k_ring, k_desc, plan, works, group, CAUSAL, TILE, CHUNK, PACK, RANK, STAGES)),
            (load_chunks, (v_ring, v_desc, plan, works, group, CAUSAL, TILE, CHUNK, PACK, RANK, STAGES)),
        ],
        [4, 1, 1, 1],  # warps: the first function has those of the launch
        [240, 24, 24, 24],  # registers a thread
    )  # fmt: skip


@triton.jit
def repair_kernel(
    Broken, Q, K, V, Out, RowMax, RowSum, Sink, q_strides, k_strides, v_strides,
    length, kernel, stride, dilation, tiles, group, kv_heads, sink, scale,
    CAUSAL: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    PACK: tl.constexpr, D: tl.constexpr, SINK: tl.constexpr, WITH_STATE: tl.constexpr,
):  # fmt: skip
    """Tiles with NaN or inf once more, by the kernel that keeps them out of the queries that do not see them."""
    if tl.load(Broken + tl.program_id(0)) != 0:
        forward_kernel(
            Q, K, V, Out, RowMax, RowSum, None, None, Sink, q_strides, k_strides, v_strides, (0, 0, 0), (0, 0, 0),
            length, kernel, stride, dilation, tiles, group, kv_heads, 0, sink, scale,
            CAUSAL, TILE, CHUNK, RANK, WIDE, PACK, D, D, D, D, 0, SINK, WITH_STATE, "select", False, "ieee", 1,
        )  # fmt: skip


SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)


def axes_of(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of the axes ``batch and t, h, w, head`` of a tensor: TMA knows five, so two share one."""
    batch, t, h, w, head = strides(layout(tensor))
    size_t, size_h, size_w = three_axes(tensor.shape[1:-2], 1)
    sizes = [tensor.shape[0] * size_t, size_h, size_w, tensor.shape[-2]]
    steps = [batch if size_t == 1 else t, h, w, head]
    # The stride of an axis of one says nothing, and may be one that TMA does not take.
    return sizes, [8 if size == 1 else step for size, step in zip(sizes, steps, strict=True)]


def query_descriptor(query: Tensor, launch: Launch) -> TensorDescriptor:
    """Boxes of positions times heads."""
    sizes, steps = axes_of(query)
    dim = query.shape[-1]
    return TensorDescriptor(query, [*sizes, dim], [*steps, 1], [*launch.tile, launch.pack, dim], SWIZZLED)


def key_descriptor(key: Tensor, launch: Launch) -> TensorDescriptor:
    """Boxes of positions of one head."""
    (*sizes, heads), (*steps, head) = axes_of(key)
    dim = key.shape[-1]
    return TensorDescriptor(key, [heads, *sizes, dim], [head, *steps, 1], [1, *launch.chunk, dim], SWIZZLED)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    launch: Launch, problem: Problem, inputs: Inputs, sink_value: float | None, scale: float, with_state: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ``forward.forward`` computes, where ``hopper_launches.supports`` it and every address is a multiple of 16.

    Allocates its results, four bytes for every 128 rows of them, and with registers the statistics in any case.
    """
    out, row_max, row_sum = _attend_windows(
        launch, problem, inputs, sink_value, scale, with_state or problem.registers > 0
    )
    if row_max is not None and row_sum is not None and problem.registers:
        fold_registers(problem, inputs, scale, out, row_max, row_sum)
    return (out, row_max, row_sum) if with_state else (out, None, None)


def _attend_windows(
    launch: Launch, problem: Problem, inputs: Inputs, sink_value: float | None, scale: float, with_state: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    query, key, value, _, _, sink = inputs
    rows = query.shape[:-1]
    out = query.new_empty(query.shape)
    row_max = row_sum = None
    if with_state:
        row_max, row_sum = (query.new_empty(rows, dtype=torch.float32) for _ in range(2))
    lengths, kernel_size, stride, dilation = problem.geometry
    tiles, programs = problem.tiles(launch.tile), problem.programs(launch)
    broken = query.new_zeros(programs, dtype=torch.int32)
    options = {
        "CAUSAL": three_axes(problem.is_causal, False), "TILE": launch.tile, "CHUNK": launch.chunk,
        "RANK": problem.rank, "PACK": launch.pack, "D": query.shape[-1], "SINK": problem.sink, "WITH_STATE": with_state,
    }  # fmt: skip
    hopper_kernel[(min(programs, multiprocessors(query.device)),)](
        query_descriptor(query, launch), key_descriptor(key, launch), key_descriptor(value, launch),
        out, row_max, row_sum, broken, sink,
        lengths, kernel_size, stride, tiles, problem.group, query.shape[-2] // launch.pack, programs, sink_value, scale,
        **options, STAGES=launch.stages, num_warps=launch.num_warps, maxnreg=launch.max_registers,
    )  # fmt: skip
    repair_kernel[(programs,)](
        broken, query, key, value, out, row_max, row_sum, sink, *problem.input_strides()[:3],
        lengths, kernel_size, stride, dilation, tiles, problem.group, problem.kv_heads, sink_value, scale,
        **options, WIDE=problem.wide, num_warps=8,
    )  # fmt: skip
    return out, row_max, row_sum
