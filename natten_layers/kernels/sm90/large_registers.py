"""dK and dV of register tokens, for the backward pass of large windows on compute capability 9.0, in Gluon.

All queries see all register tokens, so this is ``large_dkv.py`` without windows and masks: rows are register tokens,
and programs walk over the queries of an image in chunks. The walk is cut into slices, so that there are tiles for all
multiprocessors; the sums of slices are added in order, so that results are the same bits in every run.
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

from ..host.problem import Inputs, Layout, Options, Problem, RowStatistics, layout
from ..portable.primitives import LOG2E
from . import large_tiling
from .descriptors import Call, boxes_of_registers, call_of, key_boxes, multiprocessors
from .large_dkv import add_queries, add_to_keys, add_to_values
from .large_statistics import head_major_of, statistics_boxes
from .large_tiling import ROWS, RegisterTileConfig
from .primitives import store_part
from .products import new_sums, sum_widths
from .rings import (
    await_load,
    await_tile,
    expect_load,
    load_box,
    loaded,
    new_ring,
    new_schedule,
    release,
    repeated,
    take_tile,
)

M: gl.constexpr = gl.constexpr(ROWS)  # register tokens of a part of a tile


@gluon.jit
def share_of(tile_id, plan):
    """Of a tile: block of register tokens, KV head, image, slice, and the chunks of queries that the slice holds, from
    one to before another. Tiles that read the same queries have neighbouring numbers.
    """
    blocks, kv_heads, images, slices, steps, group = plan
    i_block, i_kv = tile_id % blocks, tile_id // blocks % kv_heads
    i_batch, i_slice = tile_id // (blocks * kv_heads) % images, tile_id // (blocks * kv_heads * images)
    count = steps[0] * steps[1] * steps[2] * group
    return i_block, i_kv, i_batch, i_slice, i_slice * count // slices, (i_slice + 1) * count // slices


@gluon.jit
def register_tile_producer(ring, schedule, TileCounter, descs, plan, num_tiles, COUNT: gl.constexpr):
    """The warp that takes tiles off the counter and loads their register tokens, part by part."""
    n = 0
    tile_id = take_tile(schedule, 0, TileCounter)
    while tile_id < num_tiles:
        i_block, i_kv, i_batch, _slice, _first, _end = share_of(tile_id, plan)
        expect_load(ring, n, (descs[0].block_type.nbytes + descs[1].block_type.nbytes) * COUNT, 1)
        for GROUP in gl.static_range(COUNT):
            for i in gl.static_range(2):
                # Descriptors of tokens that all images share have a batch of one.
                i_own = gl.minimum(i_batch, descs[i].shape[0] - 1)
                load_box(ring, descs[i], [i_own, (i_block * COUNT + GROUP) * M, i_kv, 0], n, i * COUNT + GROUP, 1)
        n += 1
        tile_id = take_tile(schedule, n, TileCounter)


@gluon.jit
def all_queries_producer(
    ring, schedule, descs, plan, frames, num_tiles, CHUNK: gl.constexpr, OFFSET: gl.constexpr, STAGES: gl.constexpr
):
    """The warp that loads chunks of queries with their output gradients, lse and delta.

    Beyond the image all of these are zeros, and so is what such queries add. Along the last axis chunks start in front
    of the first query, where TMA can load statistics from.
    """
    BYTES: gl.constexpr = (
        descs[0].block_type.nbytes
        + descs[1].block_type.nbytes
        + descs[2].block_type.nbytes
        + descs[3].block_type.nbytes
    )
    steps, group = plan[4], plan[5]
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        _block, i_kv, i_batch, _slice, first, end = share_of(tile_id, plan)
        for i_chunk in range(first, end):
            i_head = i_kv * group + i_chunk // (steps[0] * steps[1] * steps[2])
            t = i_chunk // (steps[1] * steps[2]) % steps[0] * CHUNK[0] + i_batch * frames
            h = i_chunk // steps[2] % steps[1] * CHUNK[1]
            w = i_chunk % steps[2] * CHUNK[2]
            expect_load(ring, n, BYTES, STAGES)
            load_box(ring, descs[0], [i_head, t, h, w - OFFSET, 0], n, 0, STAGES)
            load_box(ring, descs[1], [i_head, t, h, w - OFFSET, 0], n, 1, STAGES)
            load_box(ring, descs[2], [i_head, t, h, w], n, 2, STAGES)
            load_box(ring, descs[3], [i_head, t, h, w], n, 3, STAGES)
            n += 1
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def register_consumer(
    tile_ring, ring, schedule, DK, DV, plan, registers, num_tiles, scale,
    BY_RESULT: gl.constexpr, COUNT: gl.constexpr, N: gl.constexpr, D: gl.constexpr, DIM_V: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One of the groups of four warps, which are as those of ``large_dkv.dkv_consumer``."""
    OWN: gl.constexpr = 0 if BY_RESULT else GROUP
    factor = scale * LOG2E
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_block, i_kv, i_batch, i_slice, first, end = share_of(tile_id, plan)
        dks, dvs = new_sums(M, sum_widths(D)), new_sums(M, sum_widths(DIM_V))
        await_load(tile_ring, i_tile, True, 1)
        b_k, b_v = loaded(tile_ring, OWN, i_tile, M, 1), loaded(tile_ring, COUNT + OWN, i_tile, M, 1)
        for _ in range(first, end):
            await_load(ring, n, True, STAGES)
            if not BY_RESULT:
                dks, dvs = add_queries(dks, dvs, b_k, b_v, None, ring, n, factor, N, D, DIM_V, STAGES)
            elif GROUP == 0:
                dvs = add_to_values(dvs, b_k, None, ring, n, factor, N, D, DIM_V, STAGES)
            else:
                dks = add_to_keys(dks, b_k, b_v, None, ring, n, factor, N, D, DIM_V, STAGES)
            release(ring, n, STAGES)
            n += 1
        release(tile_ring, i_tile, 1)
        i_part = i_slice * plan[2] + i_batch
        origin = (0, 0, (i_block * COUNT + OWN) * M)
        if not (BY_RESULT and GROUP == 1):
            store_part(None, dvs, None, DV, i_kv, i_part, origin, (1, 1, registers), plan[1], (1, 1, M), 1, DIM_V)
        if not (BY_RESULT and GROUP == 0):
            store_part(None, dks, scale, DK, i_kv, i_part, origin, (1, 1, registers), plan[1], (1, 1, M), 1, D)
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def register_worker(
    tile_ring, ring, schedule, q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, DK, DV, TileCounter,
    plan, frames, registers, num_tiles, scale,
    BY_RESULT: gl.constexpr, COUNT: gl.constexpr, CHUNK: gl.constexpr, OFFSET: gl.constexpr, D: gl.constexpr,
    DIM_V: gl.constexpr, STAGES: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """What the groups of warps do: the first two compute, the others load."""
    if WORKER < 2:
        register_consumer(
            tile_ring, ring, schedule, DK, DV, plan, registers, num_tiles, scale,
            BY_RESULT, COUNT, CHUNK[0] * CHUNK[1] * CHUNK[2], D, DIM_V, STAGES, WORKER,
        )  # fmt: skip
    elif WORKER == 2:
        register_tile_producer(tile_ring, schedule, TileCounter, (k_desc, v_desc), plan, num_tiles, COUNT)
    else:
        all_queries_producer(
            ring, schedule, (q_desc, do_desc, lse_desc, delta_desc), plan, frames, num_tiles, CHUNK, OFFSET, STAGES
        )


@gluon.jit
def large_registers_kernel(
    DK, DV, TileCounter, lse_desc, delta_desc, q_desc, do_desc, k_desc, v_desc,
    steps, frames, images, group, kv_heads, registers, blocks, slices, num_tiles, scale,
    BY_RESULT: gl.constexpr, COUNT: gl.constexpr, CHUNK: gl.constexpr, OFFSET: gl.constexpr, D: gl.constexpr,
    DIM_V: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Sums of each slice for dK and dV of register tokens, ``[slices, images, registers, kv_heads, D]`` in fp32.

    ``WARPS`` and ``REGISTERS`` are as in ``large_forward_kernel``.
    """
    tile_ring = new_ring(repeated((k_desc, v_desc), COUNT), 1, 2)
    ring, schedule = new_ring((q_desc, do_desc, lse_desc, delta_desc), STAGES, 2), new_schedule(3)
    plan = (blocks, kv_heads, images, slices, steps, group)
    gl.warp_specialize(
        [
            (register_worker, (tile_ring, ring, schedule, q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, DK, DV,
                               TileCounter, plan, frames, registers, num_tiles, scale, BY_RESULT, COUNT, CHUNK, OFFSET,
                               D, DIM_V, STAGES, WORKER))
            for WORKER in (0, 1, 2, 3)
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


def register_gradients(
    config: RegisterTileConfig, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor,
    statistics: RowStatistics,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV of the register tokens.

    Allocates these, ``slices`` times as much in fp32 for partial sums and, if another kernel computed dQ, a copy of the
    statistics.
    """
    head_major = head_major_of(problem, statistics)
    query, keys, values = inputs.query, inputs.additional_keys, inputs.additional_values
    assert keys is not None
    assert values is not None
    sums_k, sums_v = (
        torch.empty((config.slices, *x.shape), dtype=torch.float32, device=x.device) for x in (keys, values)
    )
    counter = keys.new_zeros(1, dtype=torch.int32)
    call = prepare(config, problem, layout(grad_out), layout(head_major.lse))
    call((sums_k, sums_v, counter), (*head_major, query, grad_out, keys, values), (options.scale,))
    return sums_k.sum(0).to(keys.dtype), sums_v.sum(0).to(values.dtype)


@lru_cache(maxsize=1024)
def prepare(config: RegisterTileConfig, p: Problem, grad_out: Layout, head_major: Layout) -> Call:
    """What all calls of a problem share."""
    assert p.additional_keys is not None
    assert p.additional_values is not None
    offset, images, parts = large_tiling.statistics_offset(p.axes), p.query.shape[0], prod(config.groups)
    blocks, steps = large_tiling.register_blocks(p, config.tile[2]), large_tiling.query_steps(p, config.chunk)
    programs = blocks * p.kv_heads * images * config.slices
    return call_of(
        large_registers_kernel,
        (min(programs, multiprocessors(p.device)),),
        (steps, p.lengths[0], images, p.group, p.kv_heads, p.registers, blocks, config.slices, programs),
        [
            *(statistics_boxes(head_major, offset + p.lengths[2], config.chunk) for _ in range(2)),
            *(key_boxes(x, config.chunk) for x in (p.query, grad_out)),
            *boxes_of_registers(p, ROWS),
        ],
        BY_RESULT=parts == 1, COUNT=parts, CHUNK=config.chunk, OFFSET=offset, D=p.key.shape[-1],
        DIM_V=p.value.shape[-1], STAGES=config.stages, **config.work(2, 2),
    )  # fmt: skip
