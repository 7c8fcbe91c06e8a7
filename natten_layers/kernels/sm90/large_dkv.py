"""dK and dV of large windows on compute capability 9.0 (H100, H200), in Gluon.

They are computed as dQ is in ``large_dq.py``, but rows are keys, and chunks are of queries. The walk over the queries
of a KV head includes all query heads that share it, so that nothing is repeated and there are no atomic additions.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from math import prod

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..host.launcher import TRITON_OPTIONS
from ..host.problem import Inputs, Options, Problem, RowStatistics, new_like, three_axes
from ..host.tiling import TileConfig, head_width
from ..portable.primitives import LOG2E
from ..portable.windows import queries_of, shifted, union_of_queries, unravel
from . import large_tiling
from .large_statistics import statistics_descriptor, to_head_major
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
    next_walk_index,
    release,
    stage_of,
    start_product,
    store_half,
    take_tile,
    tile_of,
    walk_over,
)

ALIGNMENT: gl.constexpr = gl.constexpr(large_tiling.ALIGNMENT)


@gluon.jit
def key_walk(tile_id, plan, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr):
    """Batch, KV head, first position of a tile of keys, and the walk over the queries that see the tile.

    A key is seen by the query at its own position, so that no walk is empty.
    """
    i_batch, i_kv, _i_tile, count, origin = tile_of(tile_id, plan, TILE)
    lo, hi, inner_lo, inner_hi = union_of_queries(origin, count, plan[1], plan[2], CAUSAL, TILE)
    lo = (lo[0], lo[1], lo[2] // ALIGNMENT * ALIGNMENT)  # TMA loads statistics from multiples of this
    return i_batch, i_kv, origin, walk_over(lo, hi, inner_lo, inner_hi, CHUNK)


@gluon.jit
def kv_tile_producer(
    ring, schedule, TileCounter, k_desc, v_desc, plan, num_tiles,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """The warp that takes tiles off the counter and loads their keys and values."""
    n = 0
    tile_id = take_tile(schedule, 0, TileCounter)
    while tile_id < num_tiles:
        i_batch, i_kv, origin, _walk = key_walk(tile_id, plan, CAUSAL, TILE, CHUNK)
        corner = [i_kv, i_batch * plan[0][0] + origin[0], origin[1], origin[2], 0]
        expect_load(ring, n, k_desc.block_type.nbytes + v_desc.block_type.nbytes, TILES)
        load_box(ring, k_desc, corner, n, 0, TILES)
        load_box(ring, v_desc, corner, n, 1, TILES)
        n += 1
        tile_id = take_tile(schedule, n, TileCounter)


@gluon.jit
def q_chunk_producer(
    ring, schedule, q_desc, do_desc, lse_desc, delta_desc, plan, num_tiles, group,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads chunks of queries with their output gradients, lse and delta."""
    BYTES: gl.constexpr = (
        q_desc.block_type.nbytes + do_desc.block_type.nbytes + lse_desc.block_type.nbytes + delta_desc.block_type.nbytes
    )
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_batch, i_kv, _origin, walk = key_walk(tile_id, plan, CAUSAL, TILE, CHUNK)
        i_walk, i_head = (0, 0, 0), i_kv * group
        for _ in range(chunk_count(walk) * group):
            t, h, w = corner_at(i_walk, walk, CHUNK)
            t += i_batch * plan[0][0]
            expect_load(ring, n, BYTES, STAGES)
            load_box(ring, q_desc, [i_head, t, h, w, 0], n, 0, STAGES)
            load_box(ring, do_desc, [i_head, t, h, w, 0], n, 1, STAGES)
            load_box(ring, lse_desc, [i_head, t, h, w], n, 2, STAGES)
            load_box(ring, delta_desc, [i_head, t, h, w], n, 3, STAGES)
            i_walk, wraps = next_walk_index(i_walk, walk)
            i_head += gl.where(wraps, 1, 0)
            n += 1
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def add_queries(
    b_dk, b_dv, b_k, b_v, b_hidden, ring, n, factor,
    N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS_K: gl.constexpr, WEIGHTS_V: gl.constexpr,
):  # fmt: skip
    """Add the contribution of chunk ``n`` of queries to dV, and to dK without its factor ``scale``."""
    await_load(ring, n, True, STAGES)
    i, _ = stage_of(n, STAGES)
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
    # Left running into the next chunk, these two products would need more hardware registers than there are.
    b_dk, b_dv = warpgroup_mma_wait(0, deps=[b_dk, b_dv])
    release(ring, n, STAGES)
    return b_dk, b_dv


@gluon.jit
def add_to_values(
    b_dv, b_k, b_v, b_hidden, ring, n, factor,
    N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Add the contribution of chunk ``n`` of queries to dV alone."""
    await_load(ring, n, True, STAGES)
    i, _ = stage_of(n, STAGES)
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
    """Add the contribution of chunk ``n`` of queries to dK alone, without its factor ``scale``."""
    await_load(ring, n, True, STAGES)
    i, _ = stage_of(n, STAGES)
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
def dkv_consumer(
    tile_ring, ring, schedule, DK, DV, plan, num_tiles, group, scale,
    GROUP: gl.constexpr, BY_RESULT: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr,
    RANK: gl.constexpr, D: gl.constexpr, BD: gl.constexpr, DIM_V: gl.constexpr, BDV: gl.constexpr,
    STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """One of the two groups of four warps.

    Each group computes both results for one half of the keys of a tile. ``BY_RESULT``, each computes one result for all
    keys: of wide heads, the registers of a thread hold the accumulators of only one.
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
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_batch, i_kv, origin, walk = key_walk(tile_id, plan, CAUSAL, TILE, CHUNK)
        row_lo, row_hi = queries_of(shifted(position, origin), length, kernel, stride, CAUSAL)
        if not (BY_RESULT and GROUP == 0):
            b_dk = gl.zeros([M, BD], gl.float32, OUT_K)
        if not (BY_RESULT and GROUP == 1):
            b_dv = gl.zeros([M, BDV], gl.float32, OUT_V)
        await_load(tile_ring, i_tile, True, TILES)
        i, _ = stage_of(i_tile, TILES)
        b_k = tile_ring[0][0].index(i).reshape([ROWS, BD])
        b_v = tile_ring[0][1].index(i).reshape([ROWS, BDV])
        if not BY_RESULT:
            b_k, b_v = b_k.slice(HALF * M, M), b_v.slice(HALF * M, M)
        i_walk = (0, 0, 0)
        for _ in range(chunk_count(walk) * group):
            b_hidden = chunk_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, SCORES)
            if not BY_RESULT:
                b_dk, b_dv = add_queries(
                    b_dk, b_dv, b_k, b_v, b_hidden, ring, n, factor, N, STAGES, SCORES, WEIGHTS_K, WEIGHTS_V
                )
            elif GROUP == 0:
                b_dv = add_to_values(b_dv, b_k, b_v, b_hidden, ring, n, factor, N, STAGES, SCORES, WEIGHTS_V)
            else:
                b_dk = add_to_keys(b_dk, b_k, b_v, b_hidden, ring, n, factor, N, STAGES, SCORES, WEIGHTS_K)
            i_walk, _wraps = next_walk_index(i_walk, walk)
            n += 1

        if not BY_RESULT:
            # No other group reads this half of the keys and values, so the buffers are free for results.
            store_half(b_v, b_dv, DV, i_kv, i_batch, origin, length, kv_heads, HALF, TILE, 1, DIM_V)
            store_half(b_k, b_dk * scale, DK, i_kv, i_batch, origin, length, kv_heads, HALF, TILE, 1, D)
            fence_async_shared()
        elif GROUP == 0:
            # The other group may still read keys and values, so results do not pass through their buffers.
            store_half(None, b_dv, DV, i_kv, i_batch, origin, length, kv_heads, HALF, TILE, 1, DIM_V)
        else:
            store_half(None, b_dk * scale, DK, i_kv, i_batch, origin, length, kv_heads, HALF, TILE, 1, D)
        release(tile_ring, i_tile, TILES)
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def large_dkv_kernel(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, DK, DV, TileCounter,
    length, kernel, stride, tiles, group, kv_heads, num_tiles, scale,
    BY_RESULT: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
    D: gl.constexpr, BD: gl.constexpr, DIM_V: gl.constexpr, BDV: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """dK and dV, contiguous. Heads have ``D`` and ``DIM_V`` channels, and ``BD`` and ``BDV`` in shared memory."""
    tile_ring = new_ring((k_desc, v_desc), TILES)
    ring, schedule = new_ring((q_desc, do_desc, lse_desc, delta_desc), STAGES), new_schedule(3)
    plan = (length, kernel, stride, tiles, kv_heads)
    gl.warp_specialize(
        [
            (dkv_consumer, (tile_ring, ring, schedule, DK, DV, plan, num_tiles, group, scale,
                            0, BY_RESULT, CAUSAL, TILE, CHUNK, RANK, D, BD, DIM_V, BDV, STAGES, TILES)),
            (dkv_consumer, (tile_ring, ring, schedule, DK, DV, plan, num_tiles, group, scale,
                            1, BY_RESULT, CAUSAL, TILE, CHUNK, RANK, D, BD, DIM_V, BDV, STAGES, TILES)),
            (kv_tile_producer, (tile_ring, schedule, TileCounter, k_desc, v_desc, plan, num_tiles,
                                CAUSAL, TILE, CHUNK, TILES)),
            (q_chunk_producer, (ring, schedule, q_desc, do_desc, lse_desc, delta_desc, plan, num_tiles, group,
                                CAUSAL, TILE, CHUNK, STAGES)),
        ],
        [4, 1, 1],  # warps of all functions but the first, which has ``num_warps``
        [240, 24, 24],  # hardware registers a thread of these
    )  # fmt: skip


def buffered_tiles(problem: Problem) -> int:
    """Buffers for tiles of keys. With two, a group need not wait for the other before its next tile; in 1-D the loop
    would then spill registers.
    """
    return 2 if problem.rank > 1 and not large_tiling.is_wide(problem) else 1


def key_gradients(
    config: TileConfig, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor, statistics: RowStatistics
) -> tuple[Tensor, Tensor]:
    """dK and dV of the window keys; gradients of register tokens are computed elsewhere.

    Allocates these, and the statistics in head-major order if another kernel than :func:`query_gradient` wrote them.
    """
    head_major = statistics.head_major
    if head_major is None:
        assert statistics.lse is not None
        head_major = to_head_major(problem, statistics.lse, statistics.delta)
    query, key, value = inputs[:3]
    grad_key, grad_value = new_like(key), new_like(value)
    lengths, kernel_size, stride, _ = problem.geometry
    tiles = problem.tiles(config.tile)
    num_tiles = query.shape[0] * prod(tiles) * problem.kv_heads
    large_dkv_kernel[(min(num_tiles, multiprocessors(query.device)),)](
        box_descriptor(query, config.chunk), box_descriptor(key, config.tile), box_descriptor(value, config.tile),
        box_descriptor(grad_out, config.chunk),
        *(statistics_descriptor(x, lengths[2], config.chunk) for x in head_major),
        grad_key, grad_value, key.new_zeros(1, dtype=torch.int32),
        lengths, kernel_size, stride, tiles, problem.group, problem.kv_heads, num_tiles, options.scale,
        BY_RESULT=large_tiling.is_wide(problem), CAUSAL=three_axes(problem.is_causal, False), TILE=config.tile,
        CHUNK=config.chunk, RANK=problem.rank, D=key.shape[-1], BD=head_width(key.shape[-1]),
        DIM_V=value.shape[-1], BDV=head_width(value.shape[-1]), STAGES=config.stages, TILES=buffered_tiles(problem),
        **TRITON_OPTIONS, num_warps=config.num_warps, maxnreg=config.maxnreg,
    )  # fmt: skip
    return grad_key, grad_value
