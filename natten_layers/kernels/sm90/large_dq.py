"""dQ of large windows on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/dq.py`` computes. As in ``large_forward.py`` the kernel is persistent and takes tile
after tile off a counter: one producer warp loads tiles of queries by TMA, another one loads chunks of keys and values
into a ring, and consumer groups of four warps compute a part of the rows of a tile each. Weights and gradients of
scores stay in registers, where the following product takes them as left operand, so that nothing passes through shared
memory.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from ..host.problem import Cotangents, Inputs, Layout, Options, Problem, RowStatistics, layout, new_like, three_axes
from ..portable.primitives import LOG2E
from ..portable.windows import inside_axes, is_empty, shifted, union_of_windows, unravel
from . import large_tiling
from .descriptors import Call, boxes_of_registers, call_of, key_boxes, multiprocessors, query_boxes
from .large_statistics import statistics_of
from .large_tiling import LargeTileConfig
from .packed_repair import repair_query
from .primitives import flag_nonfinite, part_rows, store_part
from .products import finished, new_sums, product_count, product_layout, start_channel_sums, start_product, sum_widths
from .rings import (
    await_load,
    await_tile,
    key_chunk_producer,
    loaded,
    new_notes,
    new_ring,
    new_schedule,
    query_tile_producer,
    read_note,
    release,
    repeated,
)
from .walk import (
    chunk_count,
    chunk_mask,
    first_walk_index,
    hidden_keys,
    keys_of,
    meets,
    next_walk_index,
    part_of,
    reach_of,
    register_chunks,
    row_sizes,
    tile_walk,
)


@gluon.jit
def add_keys(
    dqs, b_q, b_do, b_hidden, ring, n, following, expected, row_lse, row_delta, factor, D: gl.constexpr,
    DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add the contribution of chunk ``n`` of keys, which has arrived, to dQ without its factor ``scale``.

    Waits for the chunk ``following``, if it is ``expected``.
    """
    N: gl.constexpr = b_hidden.shape[1]
    b_k, b_v = loaded(ring, 0, n, N, STAGES), loaded(ring, 1, n, N, STAGES)
    b_s = start_product(b_q, b_k, b_hidden, D)
    b_dp = start_product(b_do, b_v, None, DV)
    b_s = warpgroup_mma_wait(product_count(DV), deps=[b_s])
    b_p = gl.exp2(b_s * factor - row_lse[:, None])
    # This wait stands here because ptxas would move the next one above the exponentials if there were none before it.
    await_load(ring, following, expected, STAGES)
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    b_ds = b_p * (b_dp - row_delta[:, None])
    return finished(start_channel_sums(b_ds.to(b_k.dtype), b_k, dqs, D))


@gluon.jit
def dq_consumer(
    tile_ring, ring, notes, schedule, Lse, Delta, DQ, Nonfinite, Windows, plan, num_tiles, width, offset, scale,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr, SKIP: gl.constexpr,
    CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, TILES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One of the groups of four warps; each computes one part of every tile of queries."""
    COUNT: gl.constexpr = GROUPS[0] * GROUPS[1] * GROUPS[2]
    M: gl.constexpr = PART[0] * PART[1] * PART[2] * PACK
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = product_layout(N)
    length, kernel, stride, tiles, blocks, _registers = plan
    factor = scale * LOG2E
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    position, head = part_rows(PART, PACK, gl.SliceLayout(1, SCORES))
    images = num_tiles // (tiles[0] * tiles[1] * tiles[2] * blocks)
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_batch, i_head, tile_origin, walk = tile_walk(tile_id, plan, CAUSAL, TILE, CHUNK, Windows)
        origin = part_of(tile_origin, GROUP, GROUPS, PART)
        index = shifted(position, origin)
        row_lo, row_hi = keys_of(index, plan, CAUSAL, Windows)
        m_rows = inside_axes(index, length)
        image_row = ((i_head * PACK + head).to(gl.int64) * images + i_batch) * length[0] + index[0]
        o_stat = (image_row * length[1] + index[1]) * width + index[2] + offset
        row_lse = gl.load(Lse + o_stat, mask=m_rows, other=0.0)
        row_delta = gl.load(Delta + o_stat, mask=m_rows, other=0.0)
        dqs = new_sums(M, sum_widths(D))
        await_load(tile_ring, i_tile, True, TILES)
        b_q, b_do = loaded(tile_ring, GROUP, i_tile, M, TILES), loaded(tile_ring, COUNT + GROUP, i_tile, M, TILES)
        if SKIP:
            lo, hi, _, _ = union_of_windows(origin, length, kernel, stride, CAUSAL, PART)
            reach, row_size = reach_of(lo, hi, is_empty(origin, length), CHUNK), row_sizes(row_lo, row_hi)
            for i_chunk in range(chunk_count(walk)):
                await_load(ring, n, True, STAGES)
                corner = read_note(notes, n, STAGES)
                if meets(corner, reach) | (i_chunk < register_chunks(walk)):
                    b_hidden = hidden_keys(i_chunk, walk, corner, row_lo, row_size, inner, M, N, RANK, SCORES)
                    dqs = add_keys(
                        dqs, b_q, b_do, b_hidden, ring, n, n, True, row_lse, row_delta, factor, D, DV, STAGES
                    )  # fmt: skip
                release(ring, n, STAGES)
                n += 1
        else:
            last = n + chunk_count(walk) - 1
            await_load(ring, n, True, STAGES)
            i_walk = first_walk_index(walk)
            for _ in range(chunk_count(walk)):
                b_hidden = chunk_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, SCORES)
                dqs = add_keys(
                    dqs, b_q, b_do, b_hidden, ring, n, n + 1, n < last, row_lse, row_delta, factor, D, DV, STAGES
                )  # fmt: skip
                release(ring, n, STAGES)
                i_walk, _wraps = next_walk_index(i_walk, walk)
                n += 1

        if Windows is not None:
            flag_nonfinite(Nonfinite, dqs, m_rows)
        store_part(b_q, dqs, scale, DQ, i_head, i_batch, origin, length, blocks * PACK, PART, PACK, D)
        fence_async_shared()
        release(tile_ring, i_tile, TILES)
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def dq_worker(
    tile_ring, ring, notes, schedule, q_desc, do_desc, k_desc, v_desc, regk_desc, regv_desc, Lse, Delta, DQ,
    TileCounter, Windows, plan, group, num_tiles, width, offset, scale,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr, SKIP: gl.constexpr,
    CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, TILES: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """What a group of warps does: the first ones compute, the others load tiles, and keys and values."""
    COUNT: gl.constexpr = GROUPS[0] * GROUPS[1] * GROUPS[2]
    if WORKER < COUNT:
        dq_consumer(
            tile_ring, ring, notes, schedule, Lse, Delta, DQ, TileCounter + 1, Windows, plan, num_tiles, width, offset,
            scale, CAUSAL, TILE, PART, GROUPS, SKIP, CHUNK, PACK, RANK, D, DV, STAGES, TILES, WORKER,
        )  # fmt: skip
    elif WORKER == COUNT:
        query_tile_producer(
            tile_ring, schedule, TileCounter, (q_desc, do_desc), plan, num_tiles,
            CAUSAL, TILE, PART, GROUPS, CHUNK, PACK, TILES, Windows,
        )  # fmt: skip
    else:
        key_chunk_producer(
            ring, notes, schedule, (k_desc, v_desc), (regk_desc, regv_desc), plan, num_tiles, group,
            CAUSAL, TILE, CHUNK, PACK, SKIP, STAGES, Windows,
        )  # fmt: skip


@gluon.jit
def large_dq_kernel(
    Lse, Delta, DQ, TileCounter, Windows, q_desc, do_desc, k_desc, v_desc, regk_desc, regv_desc,
    length, kernel, stride, tiles, group, blocks, registers, num_tiles, width, offset, scale,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr, SKIP: gl.constexpr,
    CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dQ, contiguous. ``WARPS``, ``REGISTERS`` and ``Windows`` are as in ``large_forward_kernel``.

    In packed batches the number behind the tile counter becomes 1 where a result is not finite.
    """
    COUNT: gl.constexpr = GROUPS[0] * GROUPS[1] * GROUPS[2]
    tile_ring = new_ring(repeated((q_desc, do_desc), COUNT), TILES, COUNT)
    ring, schedule = new_ring((k_desc, v_desc), STAGES, COUNT), new_schedule(COUNT + 1)
    notes = new_notes(STAGES)
    plan = (length, kernel, stride, tiles, blocks, registers)
    gl.warp_specialize(
        [
            (dq_worker, (tile_ring, ring, notes, schedule, q_desc, do_desc, k_desc, v_desc, regk_desc, regv_desc, Lse,
                         Delta, DQ, TileCounter, Windows, plan, group, num_tiles, width, offset, scale, CAUSAL, TILE,
                         PART, GROUPS, SKIP, CHUNK, PACK, RANK, D, DV, STAGES, TILES, WORKER))
            for WORKER in (0, 1, 2, 3, 4, 5, 6)[: COUNT + 2]
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


def query_gradient(
    config: LargeTileConfig, problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, RowStatistics]:
    """dQ and its statistics. Allocates only these."""
    grad_out = cotangents.grad_out
    statistics = statistics_of(problem, cotangents)
    query, *keys = inputs.addressed
    grad_query, counter = new_like(query), query.new_zeros(2, dtype=torch.int32)
    call = prepare(config, problem, layout(grad_out), statistics.head_major.lse.shape[-1])
    tensors = *statistics.head_major, grad_query, counter, problem.window_table()
    call(tensors, (query, grad_out, *keys), (options.scale,))
    if problem.packing is not None:
        repair_query(problem, inputs, options, cotangents, grad_query, statistics, counter[1:])
    return grad_query, statistics


@lru_cache(maxsize=1024)
def prepare(config: LargeTileConfig, p: Problem, grad_out: Layout, width: int) -> Call:
    """What all calls of a problem share."""
    lengths, kernel_size, stride, _ = p.geometry
    blocks = p.query.shape[-2] // config.pack
    programs = large_tiling.tile_count(p, config.tile) * blocks
    return call_of(
        large_dq_kernel,
        (min(programs, multiprocessors(p.device)),),
        (
            lengths, kernel_size, stride, p.tiles(config.tile), p.group, blocks, p.registers or None, programs, width,
            large_tiling.offset_of(p),
        ),
        [*(query_boxes(x, config.part, config.pack) for x in (p.query, grad_out)),
         *(key_boxes(x, config.chunk) for x in (p.key, p.value)), *boxes_of_registers(p, prod(config.chunk))],
        CAUSAL=three_axes(p.is_causal, False), TILE=config.tile, PART=config.part, GROUPS=config.groups,
        SKIP=config.skip, CHUNK=config.chunk, PACK=config.pack, RANK=p.rank, D=p.query.shape[-1],
        DV=p.value.shape[-1], STAGES=config.stages, TILES=1,
        **config.work(2),
    )  # fmt: skip
