"""dK and dV of large windows on compute capability 9.0 (H100, H200), in Gluon.

They are computed as dQ is in ``large_dq.py``, but rows are keys, and chunks are of queries. The walk over the queries
of a KV head includes all query heads that share it, so that nothing is repeated and there are no atomic additions.
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

from ..host.problem import Inputs, Layout, Options, Problem, RowStatistics, layout, new_like, three_axes
from ..portable.primitives import LOG2E
from ..portable.windows import inside_axes, is_empty, queries_of, shifted, union_of_queries, unravel
from . import large_tiling
from .descriptors import Call, call_of, key_boxes, multiprocessors
from .large_statistics import head_major_of, statistics_boxes
from .large_tiling import LargeTileConfig
from .packed_repair import repair_key
from .primitives import flag_nonfinite, part_rows, store_part
from .products import (
    finished,
    new_sums,
    product_count,
    product_layout,
    split_sums,
    start_channel_sums,
    start_product,
    sum_count,
    sum_widths,
)
from .rings import (
    await_load,
    await_tile,
    expect_load,
    load_box,
    loaded,
    new_notes,
    new_ring,
    new_schedule,
    read_note,
    release,
    repeated,
    stage_of,
    take_tile,
    write_note,
)
from .walk import (
    chunk_count,
    chunk_mask,
    corner_at,
    hidden,
    meets,
    next_walk_index,
    on_line,
    part_of,
    reach_of,
    row_sizes,
    tile_of,
    union_on_line,
    walk_over,
)

ALIGNMENT: gl.constexpr = gl.constexpr(large_tiling.ALIGNMENT)


@gluon.jit
def key_walk(
    tile_id, plan, Queries, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, OFFSET: gl.constexpr
):  # fmt: skip
    """Batch, KV head, first position of a tile of keys, and the walk over the queries that see the tile.

    A key is seen by the query at its own position, so that no walk is empty.
    """
    i_batch, i_kv, count, origin = tile_of(tile_id, plan, TILE)
    if Queries is None:
        lo, hi, inner_lo, inner_hi = union_of_queries(origin, count, plan[1], plan[2], CAUSAL, TILE)
    else:
        lo, hi, inner_lo, inner_hi = union_on_line(Queries, origin, count, TILE)
    # TMA loads statistics, which stand behind ``OFFSET`` columns, from multiples of their alignment.
    lo = (lo[0], lo[1], (lo[2] + OFFSET) // ALIGNMENT * ALIGNMENT - OFFSET)
    return i_batch, i_kv, origin, walk_over(lo, hi, inner_lo, inner_hi, CHUNK)


@gluon.jit
def kv_tile_producer(
    ring, schedule, TileCounter, k_desc, v_desc, plan, Queries, num_tiles,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr, CHUNK: gl.constexpr,
    OFFSET: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """The warp that takes tiles off the counter and loads their keys and values."""
    COUNT: gl.constexpr = GROUPS[0] * GROUPS[1] * GROUPS[2]
    n = 0
    tile_id = take_tile(schedule, 0, TileCounter)
    while tile_id < num_tiles:
        i_batch, i_kv, origin, _walk = key_walk(tile_id, plan, Queries, CAUSAL, TILE, CHUNK, OFFSET)
        expect_load(ring, n, (k_desc.block_type.nbytes + v_desc.block_type.nbytes) * COUNT, TILES)
        for GROUP in gl.static_range(COUNT):
            t, h, w = part_of(origin, GROUP, GROUPS, PART)
            load_box(ring, k_desc, [i_kv, i_batch * plan[0][0] + t, h, w, 0], n, GROUP, TILES)
            load_box(ring, v_desc, [i_kv, i_batch * plan[0][0] + t, h, w, 0], n, COUNT + GROUP, TILES)
        n += 1
        tile_id = take_tile(schedule, n, TileCounter)


@gluon.jit
def q_chunk_producer(
    ring, notes, schedule, q_desc, do_desc, lse_desc, delta_desc, plan, Queries, num_tiles, group,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, OFFSET: gl.constexpr, SKIP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads chunks of queries with their output gradients, lse and delta."""
    BYTES: gl.constexpr = (
        q_desc.block_type.nbytes + do_desc.block_type.nbytes + lse_desc.block_type.nbytes + delta_desc.block_type.nbytes
    )
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_batch, i_kv, _origin, walk = key_walk(tile_id, plan, Queries, CAUSAL, TILE, CHUNK, OFFSET)
        i_walk, i_head = (0, 0, 0), i_kv * group
        for _ in range(chunk_count(walk) * group):
            t, h, w = corner_at(i_walk, walk, CHUNK, SKIP)
            if SKIP:
                write_note(notes, ring, n, (t, h, w), STAGES)
            t += i_batch * plan[0][0]
            expect_load(ring, n, BYTES, STAGES)
            load_box(ring, q_desc, [i_head, t, h, w, 0], n, 0, STAGES)
            load_box(ring, do_desc, [i_head, t, h, w, 0], n, 1, STAGES)
            load_box(ring, lse_desc, [i_head, t, h, w + OFFSET], n, 2, STAGES)
            load_box(ring, delta_desc, [i_head, t, h, w + OFFSET], n, 3, STAGES)
            i_walk, wraps = next_walk_index(i_walk, walk)
            i_head += gl.where(wraps, 1, 0)
            n += 1
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def load_statistic(ring, PART: gl.constexpr, n, b_s, STAGES: gl.constexpr):
    """``[N]``: a statistic of chunk ``n`` of queries, which has arrived, in the layout of columns of ``b_s [M, N]``."""
    i, _ = stage_of(n, STAGES)
    return ring[0][PART].index(i).reshape([b_s.shape[1]]).load(gl.SliceLayout(0, b_s.type.layout))


@gluon.jit
def queries_of_rows(index, plan, CAUSAL: gl.constexpr, Queries):
    """Corners of the boxes of queries that see the keys at ``index``."""
    if Queries is None:
        row_lo, row_hi = queries_of(index, plan[0], plan[1], plan[2], CAUSAL)
    else:
        row_lo, row_hi = on_line(Queries, index, plan[0])
    return row_lo, row_hi


@gluon.jit
def add_queries(
    dks, dvs, b_k, b_v, b_hidden, ring, n, factor, N: gl.constexpr, D: gl.constexpr, DIM_V: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Add the contribution of chunk ``n`` of queries, which has arrived, to dV, and to dK without its factor
    ``scale``.
    """
    b_q, b_do = loaded(ring, 0, n, N, STAGES), loaded(ring, 1, n, N, STAGES)
    b_s = start_product(b_k, b_q, b_hidden, D)
    b_dp = start_product(b_v, b_do, None, DIM_V)
    b_s = warpgroup_mma_wait(product_count(DIM_V), deps=[b_s])
    b_p = gl.exp2(b_s * factor - load_statistic(ring, 2, n, b_s, STAGES)[None, :])
    dvs = start_channel_sums(b_p.to(b_do.dtype), b_do, dvs, DIM_V)
    col_delta = load_statistic(ring, 3, n, b_s, STAGES)
    b_dp = warpgroup_mma_wait(sum_count(DIM_V), deps=[b_dp])
    b_ds = b_p * (b_dp - col_delta[None, :])
    dks = start_channel_sums(b_ds.to(b_q.dtype), b_q, dks, D)
    # Left running into the next chunk, these products would need more hardware registers than there are.
    return split_sums(finished(dks + dvs), sum_count(D))


@gluon.jit
def add_to_values(
    dvs, b_k, b_hidden, ring, n, factor, N: gl.constexpr, D: gl.constexpr, DIM_V: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Add the contribution of chunk ``n`` of queries, which has arrived, to dV alone."""
    b_s = start_product(b_k, loaded(ring, 0, n, N, STAGES), b_hidden, D)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    b_p = gl.exp2(b_s * factor - load_statistic(ring, 2, n, b_s, STAGES)[None, :])
    b_do = loaded(ring, 1, n, N, STAGES)
    return finished(start_channel_sums(b_p.to(b_do.dtype), b_do, dvs, DIM_V))


@gluon.jit
def add_to_keys(
    dks, b_k, b_v, b_hidden, ring, n, factor, N: gl.constexpr, D: gl.constexpr, DIM_V: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Add the contribution of chunk ``n`` of queries, which has arrived, to dK alone, without its factor ``scale``."""
    b_q = loaded(ring, 0, n, N, STAGES)
    b_s = start_product(b_k, b_q, b_hidden, D)
    b_dp = start_product(b_v, loaded(ring, 1, n, N, STAGES), None, DIM_V)
    b_s = warpgroup_mma_wait(product_count(DIM_V), deps=[b_s])
    b_p = gl.exp2(b_s * factor - load_statistic(ring, 2, n, b_s, STAGES)[None, :])
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    b_ds = b_p * (b_dp - load_statistic(ring, 3, n, b_s, STAGES)[None, :])
    return finished(start_channel_sums(b_ds.to(b_q.dtype), b_q, dks, D))


@gluon.jit
def dkv_consumer(
    tile_ring, ring, notes, schedule, DK, DV, Nonfinite, plan, Queries, num_tiles, group, scale,
    BY_RESULT: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr,
    SKIP: gl.constexpr, CHUNK: gl.constexpr, OFFSET: gl.constexpr, RANK: gl.constexpr, D: gl.constexpr,
    DIM_V: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One of the groups of four warps.

    Each group computes both results for one part of a tile of keys. ``BY_RESULT``, each of two computes one result for
    the only part: of wide heads, the registers of a thread hold the accumulators of only one.
    """
    COUNT: gl.constexpr = GROUPS[0] * GROUPS[1] * GROUPS[2]
    OWN: gl.constexpr = 0 if BY_RESULT else GROUP
    M: gl.constexpr = PART[0] * PART[1] * PART[2]
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = product_layout(N)
    WITH_DK: gl.constexpr = not (BY_RESULT and GROUP == 0)
    WITH_DV: gl.constexpr = not (BY_RESULT and GROUP == 1)
    length, kernel, stride, _tiles, kv_heads = plan
    factor = scale * LOG2E
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    position = part_rows(PART, 1, gl.SliceLayout(1, SCORES))[0]
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_batch, i_kv, tile_origin, walk = key_walk(tile_id, plan, Queries, CAUSAL, TILE, CHUNK, OFFSET)
        origin = part_of(tile_origin, OWN, GROUPS, PART)
        index = shifted(position, origin)
        row_lo, row_hi = queries_of_rows(index, plan, CAUSAL, Queries)
        if WITH_DK:
            dks = new_sums(M, sum_widths(D))
        if WITH_DV:
            dvs = new_sums(M, sum_widths(DIM_V))
        await_load(tile_ring, i_tile, True, TILES)
        b_k, b_v = loaded(tile_ring, OWN, i_tile, M, TILES), loaded(tile_ring, COUNT + OWN, i_tile, M, TILES)
        if SKIP:
            lo, hi, _, _ = union_of_queries(origin, length, kernel, stride, CAUSAL, PART)
            reach, row_size = reach_of(lo, hi, is_empty(origin, length), CHUNK), row_sizes(row_lo, row_hi)
            for _ in range(chunk_count(walk) * group):
                await_load(ring, n, True, STAGES)
                corner = read_note(notes, n, STAGES)
                if meets(corner, reach):
                    b_hidden = hidden(corner, row_lo, row_size, inner, RANK)
                    dks, dvs = add_queries(
                        dks, dvs, b_k, b_v, b_hidden, ring, n, factor, N, D, DIM_V, STAGES
                    )  # fmt: skip
                release(ring, n, STAGES)
                n += 1
        else:
            i_walk = (0, 0, 0)
            for _ in range(chunk_count(walk) * group):
                b_hidden = chunk_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, SCORES)
                await_load(ring, n, True, STAGES)
                if not BY_RESULT:
                    dks, dvs = add_queries(
                        dks, dvs, b_k, b_v, b_hidden, ring, n, factor, N, D, DIM_V, STAGES
                    )  # fmt: skip
                elif GROUP == 0:
                    dvs = add_to_values(dvs, b_k, b_hidden, ring, n, factor, N, D, DIM_V, STAGES)
                else:
                    dks = add_to_keys(dks, b_k, b_v, b_hidden, ring, n, factor, N, D, DIM_V, STAGES)
                release(ring, n, STAGES)
                i_walk, _wraps = next_walk_index(i_walk, walk)
                n += 1

        if Queries is not None:
            if WITH_DK:
                flag_nonfinite(Nonfinite, dks, inside_axes(index, length))
            if WITH_DV:
                flag_nonfinite(Nonfinite, dvs, inside_axes(index, length))
        # Results pass through the buffers of keys and values. ``BY_RESULT``, the other group may still read these.
        if WITH_DV:
            v_buffer = None if BY_RESULT else b_v
            store_part(v_buffer, dvs, None, DV, i_kv, i_batch, origin, length, kv_heads, PART, 1, DIM_V)
        if WITH_DK:
            k_buffer = None if BY_RESULT else b_k
            store_part(k_buffer, dks, scale, DK, i_kv, i_batch, origin, length, kv_heads, PART, 1, D)
        if not BY_RESULT:
            fence_async_shared()
        release(tile_ring, i_tile, TILES)
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def dkv_worker(
    tile_ring, ring, notes, schedule, q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, DK, DV, TileCounter,
    plan, Queries, group, num_tiles, scale,
    BY_RESULT: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr,
    SKIP: gl.constexpr, CHUNK: gl.constexpr, OFFSET: gl.constexpr, RANK: gl.constexpr, D: gl.constexpr,
    DIM_V: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """What the groups of warps do: the first ones compute, the last two load."""
    READERS: gl.constexpr = 2 if BY_RESULT else GROUPS[0] * GROUPS[1] * GROUPS[2]
    if WORKER < READERS:
        dkv_consumer(
            tile_ring, ring, notes, schedule, DK, DV, TileCounter + 1, plan, Queries, num_tiles, group, scale,
            BY_RESULT, CAUSAL, TILE, PART, GROUPS, SKIP, CHUNK, OFFSET, RANK, D, DIM_V, STAGES, TILES,
            WORKER,
        )  # fmt: skip
    elif WORKER == READERS:
        kv_tile_producer(
            tile_ring, schedule, TileCounter, k_desc, v_desc, plan, Queries, num_tiles,
            CAUSAL, TILE, PART, GROUPS, CHUNK, OFFSET, TILES,
        )  # fmt: skip
    else:
        q_chunk_producer(
            ring, notes, schedule, q_desc, do_desc, lse_desc, delta_desc, plan, Queries, num_tiles, group,
            CAUSAL, TILE, CHUNK, OFFSET, SKIP, STAGES,
        )  # fmt: skip


@gluon.jit
def large_dkv_kernel(
    DK, DV, TileCounter, Queries, lse_desc, delta_desc, q_desc, do_desc, k_desc, v_desc,
    length, kernel, stride, tiles, group, kv_heads, num_tiles, scale,
    BY_RESULT: gl.constexpr, CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr,
    SKIP: gl.constexpr, CHUNK: gl.constexpr, OFFSET: gl.constexpr, RANK: gl.constexpr, D: gl.constexpr,
    DIM_V: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV, contiguous. Heads have ``D`` and ``DIM_V`` channels, and more columns in shared memory (``products``).

    ``WARPS`` and ``REGISTERS`` are as in ``large_forward_kernel``. ``Queries`` is None except in packed batches
    (``on_line``), in which the number behind the tile counter becomes 1 where a result is not finite.
    """
    COUNT: gl.constexpr = GROUPS[0] * GROUPS[1] * GROUPS[2]
    READERS: gl.constexpr = 2 if BY_RESULT else COUNT
    tile_ring = new_ring(repeated((k_desc, v_desc), COUNT), TILES, READERS)
    ring, schedule = new_ring((q_desc, do_desc, lse_desc, delta_desc), STAGES, READERS), new_schedule(READERS + 1)
    notes = new_notes(STAGES)
    plan = (length, kernel, stride, tiles, kv_heads)
    gl.warp_specialize(
        [
            (dkv_worker, (tile_ring, ring, notes, schedule, q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, DK,
                          DV, TileCounter, plan, Queries, group, num_tiles, scale, BY_RESULT, CAUSAL, TILE, PART,
                          GROUPS, SKIP, CHUNK, OFFSET, RANK, D, DIM_V, STAGES, TILES, WORKER))
            for WORKER in (0, 1, 2, 3, 4, 5, 6)[: READERS + 2]
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


def key_gradients(
    config: LargeTileConfig, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor,
    statistics: RowStatistics,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV of the window keys; gradients of register tokens are computed elsewhere.

    Allocates its results and, if another kernel computed dQ, a copy of the statistics.
    """
    head_major = head_major_of(problem, statistics)
    query, key, value = inputs.query, inputs.key, inputs.value
    grad_key, grad_value, counter = new_like(key), new_like(value), key.new_zeros(2, dtype=torch.int32)
    call = prepare(config, problem, layout(grad_out), layout(head_major.lse))
    tensors = grad_key, grad_value, counter, problem.query_table()
    call(tensors, (*head_major, query, grad_out, key, value), (options.scale,))
    if problem.packing is not None:
        repair_key(problem, inputs, options, grad_out, statistics, (grad_key, grad_value), counter[1:])
    return grad_key, grad_value


@lru_cache(maxsize=1024)
def prepare(config: LargeTileConfig, p: Problem, grad_out: Layout, head_major: Layout) -> Call:
    """What all calls of a problem share."""
    lengths, kernel_size, stride, _ = p.geometry
    tiles, by_result = p.tiles(config.tile), large_tiling.is_wide(p)
    offset = large_tiling.offset_of(p)
    programs = p.query.shape[0] * prod(tiles) * p.kv_heads
    return call_of(
        large_dkv_kernel,
        (min(programs, multiprocessors(p.device)),),
        (lengths, kernel_size, stride, tiles, p.group, p.kv_heads, programs),
        [
            *(statistics_boxes(head_major, offset + lengths[2], config.chunk) for _ in range(2)),
            *(key_boxes(x, config.chunk) for x in (p.query, grad_out)),
            *(key_boxes(x, config.part) for x in (p.key, p.value)),
        ],
        BY_RESULT=by_result, CAUSAL=three_axes(p.is_causal, False), TILE=config.tile, PART=config.part,
        GROUPS=config.groups, SKIP=config.skip, CHUNK=config.chunk, OFFSET=offset, RANK=p.rank, D=p.key.shape[-1],
        DIM_V=p.value.shape[-1],
        STAGES=config.stages, TILES=large_tiling.buffered_tiles(p), **config.work(2, 2 if by_result else None),
    )  # fmt: skip
