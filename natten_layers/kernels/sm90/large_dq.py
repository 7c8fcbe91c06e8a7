"""dQ of large windows on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/backward.py`` computes. As in ``large_forward.py`` the kernel is persistent and takes tile
after tile off a counter: one producer warp loads tiles of queries by TMA, another one loads chunks of keys and values
into a ring, and two consumer groups of four warps compute half of the rows of a tile each. Weights and gradients of
scores stay in registers, where the following product takes them as left operand, so that nothing passes through shared
memory.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..host.launcher import TRITON_OPTIONS
from ..host.problem import Cotangents, Inputs, Options, Problem, RowStatistics, new_like, three_axes
from ..host.tiling import TileConfig, head_width
from ..portable.primitives import LOG2E
from ..portable.windows import inside_axes, shifted, unravel, windows_of
from .large_statistics import statistics_of
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
    query_descriptor,
    release,
    stage_of,
    start_product,
    store_half,
    take_tile,
    tile_walk,
)


@gluon.jit
def q_tile_producer(
    ring, schedule, TileCounter, q_desc, do_desc, plan, num_tiles,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """The warp that takes tiles off the counter and loads their queries and output gradients."""
    n = 0
    tile_id = take_tile(schedule, 0, TileCounter)
    while tile_id < num_tiles:
        i_batch, i_head, _i_flag, origin, _walk = tile_walk(tile_id, plan, CAUSAL, TILE, CHUNK)
        corner = [i_batch * plan[0][0] + origin[0], origin[1], origin[2], i_head * PACK, 0]
        expect_load(ring, n, q_desc.block_type.nbytes + do_desc.block_type.nbytes, TILES)
        load_box(ring, q_desc, corner, n, 0, TILES)
        load_box(ring, do_desc, corner, n, 1, TILES)
        n += 1
        tile_id = take_tile(schedule, n, TileCounter)


@gluon.jit
def kv_chunk_producer(
    ring, schedule, k_desc, v_desc, plan, num_tiles, group,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads chunks of keys and values."""
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_batch, i_head, _i_flag, _origin, walk = tile_walk(tile_id, plan, CAUSAL, TILE, CHUNK)
        i_walk = (0, 0, 0)
        for _ in range(chunk_count(walk)):
            t, h, w = corner_at(i_walk, walk, CHUNK)
            corner = [i_head * PACK // group, i_batch * plan[0][0] + t, h, w, 0]
            expect_load(ring, n, k_desc.block_type.nbytes + v_desc.block_type.nbytes, STAGES)
            load_box(ring, k_desc, corner, n, 0, STAGES)
            load_box(ring, v_desc, corner, n, 1, STAGES)
            i_walk, _wraps = next_walk_index(i_walk, walk)
            n += 1
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def add_keys(
    b_dq, b_q, b_do, b_hidden, ring, n, last, row_lse, row_delta, factor,
    N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Add the contribution of chunk ``n`` of keys, which has arrived, to dQ without its factor ``scale``."""
    i, _ = stage_of(n, STAGES)
    b_k = ring[0][0].index(i).reshape([N, b_q.shape[1]])
    b_v = ring[0][1].index(i).reshape([N, b_do.shape[1]])
    b_s = start_product(b_q, b_k, b_hidden)
    b_dp = start_product(b_do, b_v, None)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_p = gl.exp2(b_s * factor - row_lse[:, None])
    # This wait stands here because ptxas would move the next one above the exponentials if there were none before it.
    await_load(ring, n + 1, n < last, STAGES)
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    b_ds = b_p * (b_dp - row_delta[:, None])
    b_dq = warpgroup_mma(gl.convert_layout(b_ds.to(b_k.dtype), WEIGHTS), b_k, b_dq, is_async=True)
    b_dq = warpgroup_mma_wait(0, deps=[b_dq])
    release(ring, n, STAGES)
    return b_dq


@gluon.jit
def dq_consumer(
    tile_ring, ring, schedule, Lse, Delta, DQ, plan, num_tiles, width, scale,
    HALF: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr,
    RANK: gl.constexpr, D: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """One of the two groups of four warps; each computes one half of the rows of every tile of queries."""
    M: gl.constexpr = TILE[0] * TILE[1] * TILE[2] * PACK // 2
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    length, kernel, stride, tiles, blocks = plan
    factor = scale * LOG2E
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    position, head = half_rows(HALF, M, TILE, PACK, gl.SliceLayout(1, SCORES))
    images = num_tiles // (tiles[0] * tiles[1] * tiles[2] * blocks)
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_batch, i_head, _i_flag, origin, walk = tile_walk(tile_id, plan, CAUSAL, TILE, CHUNK)
        index = shifted(position, origin)
        row_lo, row_hi = windows_of(index, length, kernel, stride, CAUSAL)
        m_rows = inside_axes(index, length)
        image_row = ((i_head * PACK + head).to(gl.int64) * images + i_batch) * length[0] + index[0]
        o_stat = (image_row * length[1] + index[1]) * width + index[2]
        row_lse = gl.load(Lse + o_stat, mask=m_rows, other=0.0)
        row_delta = gl.load(Delta + o_stat, mask=m_rows, other=0.0)
        b_dq = gl.zeros([M, BD], gl.float32, OUT)
        await_load(tile_ring, i_tile, True, TILES)
        i, _ = stage_of(i_tile, TILES)
        b_q = tile_ring[0][0].index(i).reshape([2 * M, BD]).slice(HALF * M, M)
        b_do = tile_ring[0][1].index(i).reshape([2 * M, BDV]).slice(HALF * M, M)
        last = n + chunk_count(walk) - 1
        await_load(ring, n, True, STAGES)
        i_walk = (0, 0, 0)
        for _ in range(chunk_count(walk)):
            b_hidden = chunk_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, SCORES)
            b_dq = add_keys(
                b_dq, b_q, b_do, b_hidden, ring, n, last, row_lse, row_delta, factor, N, STAGES, SCORES, WEIGHTS
            )
            i_walk, _wraps = next_walk_index(i_walk, walk)
            n += 1

        store_half(b_q, b_dq * scale, DQ, i_head, i_batch, origin, length, blocks * PACK, HALF, TILE, PACK, D)
        fence_async_shared()
        release(tile_ring, i_tile, TILES)
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def large_dq_kernel(
    q_desc, k_desc, v_desc, do_desc, Lse, Delta, DQ, TileCounter,
    length, kernel, stride, tiles, group, blocks, num_tiles, width, scale,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr,
    D: gl.constexpr, BD: gl.constexpr, BDV: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """dQ, contiguous."""
    tile_ring, ring = new_ring((q_desc, do_desc), TILES), new_ring((k_desc, v_desc), STAGES)
    schedule = new_schedule(3)
    plan = (length, kernel, stride, tiles, blocks)
    gl.warp_specialize(
        [
            (dq_consumer, (tile_ring, ring, schedule, Lse, Delta, DQ, plan, num_tiles, width, scale,
                            0, CAUSAL, TILE, CHUNK, PACK, RANK, D, BD, BDV, STAGES, TILES)),
            (dq_consumer, (tile_ring, ring, schedule, Lse, Delta, DQ, plan, num_tiles, width, scale,
                            1, CAUSAL, TILE, CHUNK, PACK, RANK, D, BD, BDV, STAGES, TILES)),
            (q_tile_producer, (tile_ring, schedule, TileCounter, q_desc, do_desc, plan, num_tiles,
                               CAUSAL, TILE, CHUNK, PACK, TILES)),
            (kv_chunk_producer, (ring, schedule, k_desc, v_desc, plan, num_tiles, group,
                                 CAUSAL, TILE, CHUNK, PACK, STAGES)),
        ],
        [4, 1, 1],  # warps of all functions but the first, which has ``num_warps``
        [240, 24, 24],  # hardware registers a thread of these
    )  # fmt: skip


def query_gradient(
    config: TileConfig, problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, RowStatistics]:
    """dQ of a call without register tokens, and its statistics. Allocates only these."""
    grad_out = cotangents.grad_out
    statistics, delta = statistics_of(problem, cotangents)
    query, key, value = inputs[:3]
    grad_query = new_like(query)
    lengths, kernel_size, stride, _ = problem.geometry
    num_tiles = problem.programs(config)
    large_dq_kernel[(min(num_tiles, multiprocessors(query.device)),)](
        query_descriptor(query, config), box_descriptor(key, config.chunk), box_descriptor(value, config.chunk),
        query_descriptor(grad_out, config), *statistics, grad_query, query.new_zeros(1, dtype=torch.int32),
        lengths, kernel_size, stride, problem.tiles(config.tile), problem.group, query.shape[-2] // config.pack,
        num_tiles, statistics.lse.shape[-1], options.scale,
        CAUSAL=three_axes(problem.is_causal, False), TILE=config.tile, CHUNK=config.chunk, PACK=config.pack,
        RANK=problem.rank, D=query.shape[-1], BD=head_width(query.shape[-1]), BDV=head_width(value.shape[-1]),
        STAGES=config.stages, TILES=1,
        **TRITON_OPTIONS, num_warps=config.num_warps, maxnreg=config.maxnreg,
    )  # fmt: skip
    return grad_query, RowStatistics(delta, None, statistics)
