"""The backward pass of large windows on compute capability 9.0 (H100, H200): ``backward.py``'s kernels, in Gluon.

As in ``hopper.py`` a program takes tile after tile; one warp loads tiles by TMA, another one chunks into a ring, and
two warp groups take half of a tile's rows each. Rows are keys in one kernel and queries in the other. Either way the
scores' weights and gradients are in registers what the products that follow take as left operand, so that nothing goes
through shared memory. All query heads that share a KV head are part of the walk over its keys: no repeat, no atomics.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..host.problem import (
    Cotangents,
    Inputs,
    Options,
    Problem,
    RowStatistics,
    layout,
    new_like,
    strides,
    three_axes,
)
from ..host.tiling import Box, Launch, head_width
from ..portable.primitives import (
    LOG2E,
    inside_axes,
    load_rows,
    queries_of,
    shifted,
    token_offset,
    union_of_queries,
    unravel,
    windows_of,
)
from . import large_tiling
from .primitives import (
    await_load,
    await_tile,
    box_descriptor,
    chunk_count,
    chunk_mask,
    corner_at,
    expect_load,
    half_rows,
    load_box,
    multiprocessors,
    new_ring,
    new_schedule,
    next_place,
    output_rows,
    query_descriptor,
    release,
    slot,
    store_rows,
    take_tile,
    tile_of,
    tile_walk,
    walk_over,
)

ALIGNMENT: gl.constexpr = gl.constexpr(large_tiling.ALIGNMENT)
PLAIN = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)


@gluon.jit
def key_walk(i_work, plan, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr):
    """Batch, KV head, box of keys and walk over the queries that see them.

    A query sees the key at its own place, so that no walk is empty.
    """
    i_batch, i_kv, _i_tile, count, origin = tile_of(i_work, plan, TILE)
    lo, hi, inner_lo, inner_hi = union_of_queries(origin, count, plan[1], plan[2], CAUSAL, TILE)
    lo = (lo[0], lo[1], lo[2] // ALIGNMENT * ALIGNMENT)  # where statistics can be loaded from
    return i_batch, i_kv, origin, walk_over(lo, hi, inner_lo, inner_hi, CHUNK)


@gluon.jit
def load_tiles(ring, schedule, Taken, k_desc, v_desc, plan, works, CAUSAL: gl.constexpr, TILE: gl.constexpr,
               CHUNK: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """The warp that takes tiles and loads their keys and values."""
    n = 0
    i_work = take_tile(schedule, 0, Taken)
    while i_work < works:
        i_batch, i_kv, origin, _walk = key_walk(i_work, plan, CAUSAL, TILE, CHUNK)
        corner = [i_kv, i_batch * plan[0][0] + origin[0], origin[1], origin[2], 0]
        expect_load(ring, n, k_desc.block_type.nbytes + v_desc.block_type.nbytes, TILES)
        load_box(ring, k_desc, corner, n, 0, TILES)
        load_box(ring, v_desc, corner, n, 1, TILES)
        n += 1
        i_work = take_tile(schedule, n, Taken)


@gluon.jit
def load_chunks(ring, schedule, q_desc, do_desc, lse_desc, delta_desc, plan, works, group, CAUSAL: gl.constexpr,
                TILE: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The warp that loads queries, their output gradients, lse and delta."""
    BYTES: gl.constexpr = (
        q_desc.block_type.nbytes + do_desc.block_type.nbytes + lse_desc.block_type.nbytes + delta_desc.block_type.nbytes
    )
    n = 0
    i_tile = 0
    i_work = await_tile(schedule, 0)
    while i_work < works:
        i_batch, i_kv, _origin, walk = key_walk(i_work, plan, CAUSAL, TILE, CHUNK)
        place, i_head = (0, 0, 0), i_kv * group
        for _ in range(chunk_count(walk) * group):
            t, h, w = corner_at(place, walk, CHUNK)
            t += i_batch * plan[0][0]
            expect_load(ring, n, BYTES, STAGES)
            load_box(ring, q_desc, [i_head, t, h, w, 0], n, 0, STAGES)
            load_box(ring, do_desc, [i_head, t, h, w, 0], n, 1, STAGES)
            load_box(ring, lse_desc, [i_head, t, h, w], n, 2, STAGES)
            load_box(ring, delta_desc, [i_head, t, h, w], n, 3, STAGES)
            place, wraps = next_place(place, walk)
            i_head += gl.where(wraps, 1, 0)
            n += 1
        i_tile += 1
        i_work = await_tile(schedule, i_tile)


@gluon.jit
def start_product(b_rows, b_columns, b_acc):
    """``[M, D]`` times the transpose of ``[N, D]``, both in shared memory; what it is added to, or None."""
    M: gl.constexpr = b_rows.shape[0]
    N: gl.constexpr = b_columns.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    if b_acc is None:
        b_zero = gl.zeros([M, N], gl.float32, SCORES)
        b_product = warpgroup_mma(b_rows, b_columns.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    else:
        b_product = warpgroup_mma(b_rows, b_columns.permute((1, 0)), b_acc, is_async=True)
    return b_product


@gluon.jit
def add_queries(
    b_dk, b_dv, b_k, b_v, b_hidden, ring, n, factor,
    N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS_K: gl.constexpr, WEIGHTS_V: gl.constexpr,
):  # fmt: skip
    """Add what chunk ``n`` of queries gives to dK, which lacks ``scale``, and dV."""
    await_load(ring, n, True, STAGES)
    i, _ = slot(n, STAGES)
    b_q = ring[0][0].index(i).reshape([N, b_k.shape[1]])
    b_do = ring[0][1].index(i).reshape([N, b_v.shape[1]])
    b_s = start_product(b_k, b_q, b_hidden)
    b_dp = start_product(b_v, b_do, None)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    col_lse = ring[0][2].index(i).reshape([N]).load(gl.SliceLayout(0, SCORES))
    b_p = gl.exp2(b_s * factor - col_lse[None, :])
    b_dv = warpgroup_mma(gl.convert_layout(b_p.to(b_do.dtype), WEIGHTS_V), b_do, b_dv, is_async=True)
    col_delta = ring[0][3].index(i).reshape([N]).load(gl.SliceLayout(0, SCORES))
    b_dp = warpgroup_mma_wait(1, deps=[b_dp])
    b_ds = b_p * (b_dp - col_delta[None, :])
    b_dk = warpgroup_mma(gl.convert_layout(b_ds.to(b_q.dtype), WEIGHTS_K), b_q, b_dk, is_async=True)
    # Kept running into the next chunk, these two would need more registers than there are.
    b_dk, b_dv = warpgroup_mma_wait(0, deps=[b_dk, b_dv])
    release(ring, n, STAGES)
    return b_dk, b_dv


@gluon.jit
def store_half(buffer, b_rows, Out, i_head, i_batch, origin, length, heads, HALF: gl.constexpr, TILE: gl.constexpr,
               PACK: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Through shared memory that is not needed any more, so that a warp writes whole rows; without such if None."""
    M: gl.constexpr = b_rows.shape[0]
    BD: gl.constexpr = b_rows.shape[1]
    b_rows = b_rows.to(Out.dtype.element_ty)
    if buffer is None:
        STORE: gl.constexpr = b_rows.type.layout
    else:
        STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [4, 1], [1, 0])
        buffer.store(b_rows)
        b_rows = buffer.load(STORE)
    position, head = half_rows(HALF, M, TILE, PACK, gl.SliceLayout(1, STORE))
    m_rows, o_row = output_rows(position, i_head * PACK + head, i_batch, origin, length, heads)
    store_rows(Out, o_row, m_rows, b_rows, D, BD, STORE)


@gluon.jit
def add_to_values(
    b_dv, b_k, b_v, b_hidden, ring, n, factor,
    N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Add what chunk ``n`` of queries gives to dV alone."""
    await_load(ring, n, True, STAGES)
    i, _ = slot(n, STAGES)
    b_s = start_product(b_k, ring[0][0].index(i).reshape([N, b_k.shape[1]]), b_hidden)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    b_p = gl.exp2(b_s * factor - ring[0][2].index(i).reshape([N]).load(gl.SliceLayout(0, SCORES))[None, :])
    b_do = ring[0][1].index(i).reshape([N, b_v.shape[1]])
    b_dv = warpgroup_mma(gl.convert_layout(b_p.to(b_do.dtype), WEIGHTS), b_do, b_dv, is_async=True)
    b_dv = warpgroup_mma_wait(0, deps=[b_dv])
    release(ring, n, STAGES)
    return b_dv


@gluon.jit
def add_to_keys(
    b_dk, b_k, b_v, b_hidden, ring, n, factor,
    N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Add what chunk ``n`` of queries gives to dK alone, which lacks ``scale``."""
    await_load(ring, n, True, STAGES)
    i, _ = slot(n, STAGES)
    b_q = ring[0][0].index(i).reshape([N, b_k.shape[1]])
    b_s = start_product(b_k, b_q, b_hidden)
    b_dp = start_product(b_v, ring[0][1].index(i).reshape([N, b_v.shape[1]]), None)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_p = gl.exp2(b_s * factor - ring[0][2].index(i).reshape([N]).load(gl.SliceLayout(0, SCORES))[None, :])
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    b_ds = b_p * (b_dp - ring[0][3].index(i).reshape([N]).load(gl.SliceLayout(0, SCORES))[None, :])
    b_dk = warpgroup_mma(gl.convert_layout(b_ds.to(b_q.dtype), WEIGHTS), b_q, b_dk, is_async=True)
    b_dk = warpgroup_mma_wait(0, deps=[b_dk])
    release(ring, n, STAGES)
    return b_dk


@gluon.jit
def gather(
    tile_ring, ring, schedule, DK, DV, plan, works, group, scale,
    GROUP: gl.constexpr, BY_RESULT: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr,
    RANK: gl.constexpr, D: gl.constexpr, BD: gl.constexpr, DIM_V: gl.constexpr, BDV: gl.constexpr,
    STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """One of two groups of four warps. Each computes both results of one half of a tile's keys, or ``BY_RESULT`` one
    result of all of them: of wide heads a thread's registers hold only one.
    """
    M: gl.constexpr = TILE[0] * TILE[1] * TILE[2] // (1 if BY_RESULT else 2)
    HALF: gl.constexpr = 0 if BY_RESULT else GROUP
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    ROWS: gl.constexpr = TILE[0] * TILE[1] * TILE[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT_K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    OUT_V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    WEIGHTS_K: gl.constexpr = gl.DotOperandLayout(0, OUT_K, 2)
    WEIGHTS_V: gl.constexpr = gl.DotOperandLayout(0, OUT_V, 2)
    length, kernel, stride, _tiles, kv_heads = plan
    factor = scale * LOG2E
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    position = half_rows(HALF, M, TILE, 1, gl.SliceLayout(1, SCORES))[0]
    n = 0
    i_tile = 0
    i_work = await_tile(schedule, 0)
    while i_work < works:
        i_batch, i_kv, origin, walk = key_walk(i_work, plan, CAUSAL, TILE, CHUNK)
        row_lo, row_hi = queries_of(shifted(position, origin), length, kernel, stride, CAUSAL)
        if not (BY_RESULT and GROUP == 0):
            b_dk = gl.zeros([M, BD], gl.float32, OUT_K)
        if not (BY_RESULT and GROUP == 1):
            b_dv = gl.zeros([M, BDV], gl.float32, OUT_V)
        await_load(tile_ring, i_tile, True, TILES)
        i, _ = slot(i_tile, TILES)
        b_k = tile_ring[0][0].index(i).reshape([ROWS, BD])
        b_v = tile_ring[0][1].index(i).reshape([ROWS, BDV])
        if not BY_RESULT:
            b_k, b_v = b_k.slice(HALF * M, M), b_v.slice(HALF * M, M)
        place = (0, 0, 0)
        for _ in range(chunk_count(walk) * group):
            b_hidden = chunk_mask(place, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, SCORES)
            if not BY_RESULT:
                b_dk, b_dv = add_queries(
                    b_dk, b_dv, b_k, b_v, b_hidden, ring, n, factor, N, STAGES, SCORES, WEIGHTS_K, WEIGHTS_V
                )
            elif GROUP == 0:
                b_dv = add_to_values(b_dv, b_k, b_v, b_hidden, ring, n, factor, N, STAGES, SCORES, WEIGHTS_V)
            else:
                b_dk = add_to_keys(b_dk, b_k, b_v, b_hidden, ring, n, factor, N, STAGES, SCORES, WEIGHTS_K)
            place, _wraps = next_place(place, walk)
            n += 1

        if not BY_RESULT:
            # Only this group reads its half of the keys and values.
            store_half(b_v, b_dv, DV, i_kv, i_batch, origin, length, kv_heads, HALF, TILE, 1, DIM_V)
            store_half(b_k, b_dk * scale, DK, i_kv, i_batch, origin, length, kv_heads, HALF, TILE, 1, D)
            fence_async_shared()
        elif GROUP == 0:
            # The other group may still read keys and values, so their memory is not free for results.
            store_half(None, b_dv, DV, i_kv, i_batch, origin, length, kv_heads, HALF, TILE, 1, DIM_V)
        else:
            store_half(None, b_dk * scale, DK, i_kv, i_batch, origin, length, kv_heads, HALF, TILE, 1, D)
        release(tile_ring, i_tile, TILES)
        i_tile += 1
        i_work = await_tile(schedule, i_tile)


@gluon.jit
def hopper_key_kernel(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, DK, DV, Taken,
    length, kernel, stride, tiles, group, kv_heads, works, scale,
    BY_RESULT: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
    D: gl.constexpr, BD: gl.constexpr, DIM_V: gl.constexpr, BDV: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """dK and dV, contiguous; heads have ``D`` and ``DIM_V`` channels, ``BD`` and ``BDV`` in shared memory."""
    tile_ring = new_ring((k_desc, v_desc), TILES)
    ring, schedule = new_ring((q_desc, do_desc, lse_desc, delta_desc), STAGES), new_schedule(3)
    plan = (length, kernel, stride, tiles, kv_heads)
    gl.warp_specialize(
        [
            (gather, (tile_ring, ring, schedule, DK, DV, plan, works, group, scale,
                      0, BY_RESULT, CAUSAL, TILE, CHUNK, RANK, D, BD, DIM_V, BDV, STAGES, TILES)),
            (gather, (tile_ring, ring, schedule, DK, DV, plan, works, group, scale,
                      1, BY_RESULT, CAUSAL, TILE, CHUNK, RANK, D, BD, DIM_V, BDV, STAGES, TILES)),
            (load_tiles, (tile_ring, schedule, Taken, k_desc, v_desc, plan, works, CAUSAL, TILE, CHUNK, TILES)),
            (load_chunks, (ring, schedule, q_desc, do_desc, lse_desc, delta_desc, plan, works, group,
                           CAUSAL, TILE, CHUNK, STAGES)),
        ],
        [4, 1, 1],  # warps: the first function has those of the launch
        [240, 24, 24],  # registers a thread
    )  # fmt: skip


@gluon.jit
def load_queries(ring, schedule, Taken, q_desc, do_desc, plan, works, CAUSAL: gl.constexpr, TILE: gl.constexpr,
                 CHUNK: gl.constexpr, PACK: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """The warp that takes tiles and loads their queries and output gradients."""
    n = 0
    i_work = take_tile(schedule, 0, Taken)
    while i_work < works:
        i_batch, i_head, _i_flag, origin, _walk = tile_walk(i_work, plan, CAUSAL, TILE, CHUNK)
        corner = [i_batch * plan[0][0] + origin[0], origin[1], origin[2], i_head * PACK, 0]
        expect_load(ring, n, q_desc.block_type.nbytes + do_desc.block_type.nbytes, TILES)
        load_box(ring, q_desc, corner, n, 0, TILES)
        load_box(ring, do_desc, corner, n, 1, TILES)
        n += 1
        i_work = take_tile(schedule, n, Taken)


@gluon.jit
def load_windows(ring, schedule, k_desc, v_desc, plan, works, group, CAUSAL: gl.constexpr, TILE: gl.constexpr,
                 CHUNK: gl.constexpr, PACK: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The warp that loads keys and values."""
    n = 0
    i_tile = 0
    i_work = await_tile(schedule, 0)
    while i_work < works:
        i_batch, i_head, _i_flag, _origin, walk = tile_walk(i_work, plan, CAUSAL, TILE, CHUNK)
        place = (0, 0, 0)
        for _ in range(chunk_count(walk)):
            t, h, w = corner_at(place, walk, CHUNK)
            corner = [i_head * PACK // group, i_batch * plan[0][0] + t, h, w, 0]
            expect_load(ring, n, k_desc.block_type.nbytes + v_desc.block_type.nbytes, STAGES)
            load_box(ring, k_desc, corner, n, 0, STAGES)
            load_box(ring, v_desc, corner, n, 1, STAGES)
            place, _wraps = next_place(place, walk)
            n += 1
        i_tile += 1
        i_work = await_tile(schedule, i_tile)


@gluon.jit
def add_keys(
    b_dq, b_q, b_do, b_hidden, ring, n, last, row_lse, row_delta, factor,
    N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Add what chunk ``n`` of keys gives to dQ, which lacks ``scale``; the chunk was awaited."""
    i, _ = slot(n, STAGES)
    b_k = ring[0][0].index(i).reshape([N, b_q.shape[1]])
    b_v = ring[0][1].index(i).reshape([N, b_do.shape[1]])
    b_s = start_product(b_q, b_k, b_hidden)
    b_dp = start_product(b_do, b_v, None)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_p = gl.exp2(b_s * factor - row_lse[:, None])
    # Awaited here, because the assembler moves the next wait above the exponentials unless another stands before it.
    await_load(ring, n + 1, n < last, STAGES)
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    b_ds = b_p * (b_dp - row_delta[:, None])
    b_dq = warpgroup_mma(gl.convert_layout(b_ds.to(b_k.dtype), WEIGHTS), b_k, b_dq, is_async=True)
    b_dq = warpgroup_mma_wait(0, deps=[b_dq])
    release(ring, n, STAGES)
    return b_dq


@gluon.jit
def walk_windows(
    tile_ring, ring, schedule, Lse, Delta, DQ, plan, works, width, scale,
    HALF: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr,
    RANK: gl.constexpr, D: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """A group of four warps that computes one half of the rows of every tile of queries."""
    M: gl.constexpr = TILE[0] * TILE[1] * TILE[2] * PACK // 2
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    length, kernel, stride, tiles, blocks = plan
    factor = scale * LOG2E
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    position, head = half_rows(HALF, M, TILE, PACK, gl.SliceLayout(1, SCORES))
    images = works // (tiles[0] * tiles[1] * tiles[2] * blocks)
    n = 0
    i_tile = 0
    i_work = await_tile(schedule, 0)
    while i_work < works:
        i_batch, i_head, _i_flag, origin, walk = tile_walk(i_work, plan, CAUSAL, TILE, CHUNK)
        index = shifted(position, origin)
        row_lo, row_hi = windows_of(index, length, kernel, stride, CAUSAL)
        m_rows = inside_axes(index, length)
        line = ((i_head * PACK + head).to(gl.int64) * images + i_batch) * length[0] + index[0]
        o_stat = (line * length[1] + index[1]) * width + index[2]
        row_lse = gl.load(Lse + o_stat, mask=m_rows, other=0.0)
        row_delta = gl.load(Delta + o_stat, mask=m_rows, other=0.0)
        b_dq = gl.zeros([M, BD], gl.float32, OUT)
        await_load(tile_ring, i_tile, True, TILES)
        i, _ = slot(i_tile, TILES)
        b_q = tile_ring[0][0].index(i).reshape([2 * M, BD]).slice(HALF * M, M)
        b_do = tile_ring[0][1].index(i).reshape([2 * M, BDV]).slice(HALF * M, M)
        last = n + chunk_count(walk) - 1
        await_load(ring, n, True, STAGES)
        place = (0, 0, 0)
        for _ in range(chunk_count(walk)):
            b_hidden = chunk_mask(place, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, SCORES)
            b_dq = add_keys(
                b_dq, b_q, b_do, b_hidden, ring, n, last, row_lse, row_delta, factor, N, STAGES, SCORES, WEIGHTS
            )
            place, _wraps = next_place(place, walk)
            n += 1

        store_half(b_q, b_dq * scale, DQ, i_head, i_batch, origin, length, blocks * PACK, HALF, TILE, PACK, D)
        fence_async_shared()
        release(tile_ring, i_tile, TILES)
        i_tile += 1
        i_work = await_tile(schedule, i_tile)


@gluon.jit
def hopper_query_kernel(
    q_desc, k_desc, v_desc, do_desc, Lse, Delta, DQ, Taken,
    length, kernel, stride, tiles, group, blocks, works, width, scale,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr,
    D: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """dQ, contiguous."""
    tile_ring, ring = new_ring((q_desc, do_desc), TILES), new_ring((k_desc, v_desc), STAGES)
    schedule = new_schedule(3)
    plan = (length, kernel, stride, tiles, blocks)
    gl.warp_specialize(
        [
            (walk_windows, (tile_ring, ring, schedule, Lse, Delta, DQ, plan, works, width, scale,
                            0, CAUSAL, TILE, CHUNK, PACK, RANK, D, BD, BDV, STAGES, TILES)),
            (walk_windows, (tile_ring, ring, schedule, Lse, Delta, DQ, plan, works, width, scale,
                            1, CAUSAL, TILE, CHUNK, PACK, RANK, D, BD, BDV, STAGES, TILES)),
            (load_queries, (tile_ring, schedule, Taken, q_desc, do_desc, plan, works,
                            CAUSAL, TILE, CHUNK, PACK, TILES)),
            (load_windows, (ring, schedule, k_desc, v_desc, plan, works, group, CAUSAL, TILE, CHUNK, PACK, STAGES)),
        ],
        [4, 1, 1],  # warps: the first function has those of the launch
        [240, 24, 24],  # registers a thread
    )  # fmt: skip


@triton.jit
def statistics_kernel(
    Out, DOut, DLse, RowMax, RowSum, Delta, Lse, DeltaLines,
    do_strides, dl_strides, length, rows, heads, images, width,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(dOut * Out) - dLse`` like the output, and with the base-2 lse in lines ``[heads, B T H, W]``."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_rows = row < rows
    head, token = row % heads, row // heads
    w, line = token % length[2], token // length[2]
    h, t, i_batch = line % length[1], line // length[1] % length[0], line // (length[1] * length[0])
    o_do = i_batch * do_strides[0] + token_offset((t, h, w), do_strides) + head * do_strides[4]
    b_out, b_do = load_rows(Out, row * DV, m_rows, DV, BDV), load_rows(DOut, o_do, m_rows, DV, BDV)
    row_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    if WITH_DLSE:
        o_dl = i_batch * dl_strides[0] + token_offset((t, h, w), dl_strides) + head * dl_strides[4]
        row_delta -= tl.load(DLse + o_dl, mask=m_rows, other=0.0)
    row_lse = tl.load(RowMax + row, mask=m_rows, other=0.0) * LOG2E
    row_lse += tl.log2(tl.load(RowSum + row, mask=m_rows, other=1.0))
    o_stat = (head * (images * length[0] * length[1]) + line) * width + w
    tl.store(Delta + row, row_delta, mask=m_rows)
    tl.store(DeltaLines + o_stat, row_delta, mask=m_rows)
    tl.store(Lse + o_stat, row_lse, mask=m_rows)


class Statistics(NamedTuple):
    """Base-2 lse and delta of every query and head, fp32 ``[Hq, B T, H, W + padding]``, as TMA can load them."""

    lse: Tensor
    delta: Tensor


def line_descriptor(lines: Tensor, width: int, box: Box) -> TensorDescriptor:
    """Boxes of one head's statistics; those outside the image read as zero."""
    return TensorDescriptor(lines, [*lines.shape[:-1], width], list(lines.stride()), [1, *box], PLAIN)


def new_statistics(problem: Problem) -> Statistics:
    t, h, w = problem.lengths
    padded = triton.cdiv(w, large_tiling.ALIGNMENT) * large_tiling.ALIGNMENT
    shape = 2, problem.query.shape[-2], problem.query.shape[0] * t, h, padded
    return Statistics(*torch.empty(shape, dtype=torch.float32, device=problem.device))


def lined_up(problem: Problem, lse: Tensor, delta: Tensor) -> Statistics:
    """Statistics from those that the portable query kernel writes, ``[B, *spatial, Hq]``."""
    statistics, width = new_statistics(problem), problem.lengths[2]
    for lines, rows in zip(statistics, (lse, delta), strict=True):
        heads = rows.shape[-1]
        lines[..., :width] = rows.reshape(-1, heads).t().view(heads, *lines.shape[1:-1], width)
    return statistics


def statistics_of(problem: Problem, cotangents: Cotangents) -> tuple[Statistics, Tensor]:
    """Statistics, and delta ``[B, *spatial, Hq]``."""
    out, row_max, row_sum, grad_out, grad_lse = cotangents
    statistics, delta = new_statistics(problem), torch.empty_like(row_max)
    dl_strides = (0,) * 5 if grad_lse is None else strides(layout(grad_lse[..., None]))
    rows = row_max.numel()
    statistics_kernel[(triton.cdiv(rows, 64),)](
        out, grad_out, grad_lse, row_max, row_sum, delta, statistics.lse, statistics.delta,
        strides(layout(grad_out)), dl_strides, problem.lengths, rows, row_max.shape[-1], row_max.shape[0],
        statistics.lse.shape[-1],
        DV=out.shape[-1], BDV=head_width(out.shape[-1]), BM=64, WITH_DLSE=grad_lse is not None, num_warps=4,
    )  # fmt: skip
    return statistics, delta


def buffered_tiles(problem: Problem) -> int:
    """With two a group need not await the other one before its next tile; in 1-D the loop then spills registers."""
    return 2 if problem.rank > 1 and not large_tiling.is_wide(problem) else 1


def query_gradient(
    launch: Launch, problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, RowStatistics]:
    """dQ of a call without registers, and its statistics. Takes the tiles of the forward. Allocates only these."""
    grad_out = cotangents.grad_out
    statistics, delta = statistics_of(problem, cotangents)
    query, key, value = inputs[:3]
    grad_query = new_like(query)
    lengths, kernel_size, stride, _ = problem.geometry
    works = problem.programs(launch)
    hopper_query_kernel[(min(works, multiprocessors(query.device)),)](
        query_descriptor(query, launch), box_descriptor(key, launch.chunk), box_descriptor(value, launch.chunk),
        query_descriptor(grad_out, launch), *statistics, grad_query, query.new_zeros(1, dtype=torch.int32),
        lengths, kernel_size, stride, problem.tiles(launch.tile), problem.group, query.shape[-2] // launch.pack, works,
        statistics.lse.shape[-1], options.scale,
        CAUSAL=three_axes(problem.is_causal, False), TILE=launch.tile, CHUNK=launch.chunk, PACK=launch.pack,
        RANK=problem.rank, D=query.shape[-1], BD=head_width(query.shape[-1]), BDV=head_width(value.shape[-1]),
        STAGES=launch.stages, TILES=1,
        num_warps=launch.num_warps, maxnreg=launch.max_registers,
    )  # fmt: skip
    return grad_query, RowStatistics(delta, None, statistics)


def key_gradients(
    launch: Launch, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor, statistics: RowStatistics
) -> tuple[Tensor, Tensor]:
    """dK and dV, those of registers aside.

    Allocates these, and the statistics in head-major order where another kernel than :func:`query_gradient` wrote them.
    """
    lines = statistics.head_major
    if lines is None:
        assert statistics.lse is not None
        lines = lined_up(problem, statistics.lse, statistics.delta)
    query, key, value = inputs[:3]
    grad_key, grad_value = new_like(key), new_like(value)
    lengths, kernel_size, stride, _ = problem.geometry
    tiles = problem.tiles(launch.tile)
    works = query.shape[0] * prod(tiles) * problem.kv_heads
    hopper_key_kernel[(min(works, multiprocessors(query.device)),)](
        box_descriptor(query, launch.chunk), box_descriptor(key, launch.tile), box_descriptor(value, launch.tile),
        box_descriptor(grad_out, launch.chunk),
        *(line_descriptor(x, lengths[2], launch.chunk) for x in lines),
        grad_key, grad_value, key.new_zeros(1, dtype=torch.int32),
        lengths, kernel_size, stride, tiles, problem.group, problem.kv_heads, works, options.scale,
        BY_RESULT=large_tiling.is_wide(problem), CAUSAL=three_axes(problem.is_causal, False), TILE=launch.tile,
        CHUNK=launch.chunk, RANK=problem.rank, D=key.shape[-1], BD=head_width(key.shape[-1]),
        DIM_V=value.shape[-1], BDV=head_width(value.shape[-1]), STAGES=launch.stages, TILES=buffered_tiles(problem),
        num_warps=launch.num_warps, maxnreg=launch.max_registers,
    )  # fmt: skip
    return grad_key, grad_value
