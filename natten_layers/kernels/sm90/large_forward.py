"""The forward pass of large windows on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/forward.py`` computes. The kernel is persistent with an atomic tile scheduler: one program a
multiprocessor takes tile after tile off a counter. One producer warp each loads queries, keys and values by TMA into
rings of shared memory; consumer groups of four warps compute a part of the rows of a tile each. Two groups start the
scores of a chunk together with the weighted sum of the previous chunk, so that the tensor cores are busy while the
softmax is computed. With ``SKIP``, more groups keep them busy, each computing one chunk after the other and skipping
those that none of its own rows sees: where windows are not much larger than tiles, a tile sees much more than a part.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma_wait,
)

from ..host.problem import Inputs, Options, Problem, new_results, three_axes
from ..host.tiling import head_width
from ..portable.primitives import LN2, LOG2E
from ..portable.windows import is_empty, shifted, union_of_windows, unravel
from . import large_tiling
from .descriptors import Call, boxes_of_registers, call_of, key_boxes, multiprocessors, query_boxes
from .large_repair import repair
from .large_tiling import LargeTileConfig
from .online_softmax import (
    LEAST_SUM,
    are_usable,
    first_references,
    initial_stats,
    references_of_tile,
    row_maximum,
    softmax_weights,
    weights,
)
from .primitives import by_rows, flag_nan, output_rows, part_rows, store_part_rows, through_buffer
from .products import (
    finished,
    new_sums,
    product_layout,
    rests_of_rows,
    scaled_sums,
    start_channel_sums,
    start_product,
    sum_count,
    sum_widths,
)
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
def start_scores(b_q, k_ring, n, b_hidden, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Start the product of queries and the ``N`` keys of chunk ``n``, which have arrived, added to a mask of 0 and -inf
    if it is given.
    """
    return start_product(b_q, loaded(k_ring, 0, n, N, STAGES), b_hidden, D)


@gluon.jit
def start_values(b_p, sums, v_ring, n, DV: gl.constexpr, STAGES: gl.constexpr):
    """Start to add the values of chunk ``n``, which have arrived, weighted."""
    return start_channel_sums(b_p, loaded(v_ring, 0, n, b_p.shape[1], STAGES), sums, DV)


@gluon.jit
def attend_first(
    b_q, b_hidden, row_m, part_l, k_ring, n, factor, D: gl.constexpr, STAGES: gl.constexpr, WEIGHTS: gl.constexpr,
    FIRST_MAXIMA: gl.constexpr,
):  # fmt: skip
    """Weights of the first chunk of a tile."""
    await_load(k_ring, n, True, STAGES)
    b_s = start_scores(b_q, k_ring, n, None if FIRST_MAXIMA else b_hidden, b_hidden.shape[1], D, STAGES)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    release(k_ring, n, STAGES)
    if FIRST_MAXIMA:
        # Rows that see nothing of this chunk take its maximum all the same: mostly it is like the scores that they see.
        row_other = gl.max(b_s, 1) * factor
        b_s += b_hidden
        row_m, part_l, _ = first_references(row_m, part_l, gl.max(b_s, 1) * factor, row_other)
        b_p, part_l = weights(b_s, row_m, part_l, factor, b_q.dtype, WEIGHTS)
    else:
        b_p, row_m, part_l, _ = softmax_weights(b_s, gl.max(b_s, 1), row_m, part_l, factor, b_q.dtype, WEIGHTS)
    return b_p, row_m, part_l


@gluon.jit
def attend_next(
    b_q, b_hidden, b_p, sums, row_m, part_l, k_ring, v_ring, n, last, factor, D: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, FIRST_MAXIMA: gl.constexpr,
):  # fmt: skip
    """Weights of chunk ``n``, whose keys have arrived, while the weighted values of the previous chunk are added."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, sums[0].type.layout, 2)
    b_s = start_scores(b_q, k_ring, n, b_hidden, b_hidden.shape[1], D, STAGES)
    await_load(v_ring, n - 1, True, STAGES)
    sums = start_values(b_p, sums, v_ring, n - 1, DV, STAGES)
    b_s = warpgroup_mma_wait(sum_count(DV), deps=[b_s])
    release(k_ring, n, STAGES)
    row_alpha = None
    if FIRST_MAXIMA:
        b_p, part_l = weights(b_s, row_m, part_l, factor, b_q.dtype, WEIGHTS)
    else:
        b_p, row_m, part_l, row_alpha = softmax_weights(
            b_s, gl.max(b_s, 1), row_m, part_l, factor, b_q.dtype, WEIGHTS
        )  # fmt: skip
    # This wait stands here because ptxas would move the next one above the softmax if there were none before it.
    await_load(k_ring, n + 1, n < last, STAGES)
    sums = finished(sums)
    release(v_ring, n - 1, STAGES)
    if not FIRST_MAXIMA:
        sums = scaled_sums(sums, row_alpha)
    return b_p, sums, row_m, part_l


@gluon.jit
def attend_last(b_p, sums, v_ring, n, DV: gl.constexpr, STAGES: gl.constexpr):
    """Add the weighted values of the last chunk of a tile, whose weights are ``b_p``."""
    await_load(v_ring, n, True, STAGES)
    sums = finished(start_values(b_p, sums, v_ring, n, DV, STAGES))
    release(v_ring, n, STAGES)
    return sums


@gluon.jit
def attend_alone(
    b_q, b_hidden, sums, row_m, part_l, pending, k_ring, v_ring, n, factor, D: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, FIRST_MAXIMA: gl.constexpr,
):  # fmt: skip
    """Add chunk ``n``, which has arrived, with no product under way before and after."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, sums[0].type.layout, 2)
    b_s = start_scores(b_q, k_ring, n, b_hidden, b_hidden.shape[1], D, STAGES)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    if FIRST_MAXIMA:
        if pending:
            row_m, part_l, row_alpha, pending = references_of_tile(b_s, row_m, part_l, factor)
            sums = scaled_sums(sums, row_alpha)
        b_p, part_l = weights(b_s, row_m, part_l, factor, b_q.dtype, WEIGHTS)
    else:
        row_max = gl.convert_layout(row_maximum(b_s), row_m.type.layout)
        b_p, row_m, part_l, row_alpha = softmax_weights(b_s, row_max, row_m, part_l, factor, b_q.dtype, WEIGHTS)
        sums = scaled_sums(sums, row_alpha)
    sums = start_values(b_p, sums, v_ring, n, DV, STAGES)
    return finished(sums), row_m, part_l, pending


@gluon.jit
def normalized(sums, row_l, DTYPE: gl.constexpr):
    """Sums divided by the sum of the weights of each row."""
    results = ()
    for i in gl.static_range(len(sums)):
        row_own = gl.convert_layout(row_l, gl.SliceLayout(1, sums[i].type.layout))
        results = results + ((sums[i] / row_own[:, None]).to(DTYPE),)  # noqa: RUF005
    return results


@gluon.jit
def flag_of(i_batch, i_head, origin, parts, blocks, PART: gl.constexpr):
    """Index of the flag of the part of a tile at ``origin``."""
    i_part = (i_batch * parts[0] + origin[0] // PART[0]) * parts[1] + origin[1] // PART[1]
    return (i_part * parts[2] + origin[2] // PART[2]) * blocks + i_head


@gluon.jit
def q_consumer(
    q_ring, k_ring, v_ring, notes, schedule, Out, RowMax, RowSum, Nonfinite, Sink, Windows, plan, parts, num_tiles,
    sink, factor,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr, SKIP: gl.constexpr,
    CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, TILES: gl.constexpr, SINK: gl.constexpr, WITH_STATS: gl.constexpr,
    FIRST_MAXIMA: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One of the groups of four warps; each computes one part of every tile."""
    M: gl.constexpr = PART[0] * PART[1] * PART[2] * PACK
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = product_layout(N)
    PARTS: gl.constexpr = product_layout(8)
    length, kernel, stride, _tiles, blocks, _registers = plan
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    position, head = part_rows(PART, PACK, gl.SliceLayout(1, SCORES))
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_batch, i_head, tile_origin, walk = tile_walk(tile_id, plan, CAUSAL, TILE, CHUNK, Windows)
        origin = part_of(tile_origin, GROUP, GROUPS, PART)
        row_lo, row_hi = keys_of(shifted(position, origin), plan, CAUSAL, Windows)
        row_m, part_l = initial_stats(Sink, i_head * PACK + head, sink, SINK, M, gl.SliceLayout(1, SCORES), PARTS)
        sums = new_sums(M, sum_widths(DV))
        WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, sums[0].type.layout, 2)
        if SKIP:
            lo, hi, _, _ = union_of_windows(origin, length, kernel, stride, CAUSAL, PART)
            reach, row_size = reach_of(lo, hi, is_empty(origin, length), CHUNK), row_sizes(row_lo, row_hi)
            await_load(q_ring, i_tile, True, TILES)
            b_q = loaded(q_ring, GROUP, i_tile, M, TILES)
            pending = True
            for i_chunk in range(chunk_count(walk)):
                await_load(k_ring, n, True, STAGES)
                corner = read_note(notes, n, STAGES)
                if meets(corner, reach) | (i_chunk < register_chunks(walk)):
                    b_hidden = hidden_keys(i_chunk, walk, corner, row_lo, row_size, inner, M, N, RANK, SCORES)
                    sums, row_m, part_l, pending = attend_alone(
                        b_q, b_hidden, sums, row_m, part_l, pending, k_ring, v_ring, n, factor, D, DV, STAGES,
                        FIRST_MAXIMA,
                    )  # fmt: skip
                release(k_ring, n, STAGES)
                n += 1
        else:
            last = n + chunk_count(walk) - 1
            i_walk = first_walk_index(walk)
            b_hidden = chunk_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, SCORES)
            await_load(q_ring, i_tile, True, TILES)
            b_q = loaded(q_ring, GROUP, i_tile, M, TILES)
            b_p, row_m, part_l = attend_first(
                b_q, b_hidden, row_m, part_l, k_ring, n, factor, D, STAGES, WEIGHTS, FIRST_MAXIMA
            )
            n += 1
            await_load(k_ring, n, n <= last, STAGES)
            for _ in range(1, chunk_count(walk)):
                i_walk, _wraps = next_walk_index(i_walk, walk)
                b_hidden = chunk_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, SCORES, False)
                b_p, sums, row_m, part_l = attend_next(
                    b_q, b_hidden, b_p, sums, row_m, part_l, k_ring, v_ring, n, last, factor, D, DV, STAGES,
                    FIRST_MAXIMA,
                )  # fmt: skip
                n += 1
            sums = attend_last(b_p, sums, v_ring, n - 1, DV, STAGES)

        row_l = gl.sum(part_l, 1)
        results = normalized(sums, row_l, b_q.dtype)
        if b_q.shape[1] == v_ring[0][0].shape[-1]:
            # Results pass through the buffer of the queries, so that a warp writes whole rows.
            results = (through_buffer(b_q, results, DV),)
            fence_async_shared()
        else:
            results = by_rows(results)
        release(q_ring, i_tile, TILES)
        i_tile += 1

        store_part_rows(results, Out, i_head, i_batch, origin, length, blocks * PACK, PART, PACK, DV)
        m_rows, o_row = output_rows(position, i_head * PACK + head, i_batch, origin, length, blocks * PACK)
        if WITH_STATS:
            gl.store(RowMax + o_row, row_m * LN2, mask=m_rows)
            gl.store(RowSum + o_row, gl.convert_layout(row_l, gl.SliceLayout(1, SCORES)), mask=m_rows)
        # Mark the part if a result is not finite, or if the reference of a row is far from its largest score.
        row_rest = rests_of_rows(sums)
        row_usable = are_usable(gl.convert_layout(row_l, row_rest.type.layout), LEAST_SUM if FIRST_MAXIMA else 0.5)
        row_rest = gl.where(row_usable > 0.0, row_rest, float("nan"))
        flag_nan(Nonfinite + flag_of(i_batch, i_head, origin, parts, blocks, PART), row_rest, m_rows)
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def forward_worker(
    q_ring, k_ring, v_ring, notes, schedule, q_desc, k_desc, v_desc, regk_desc, regv_desc, Out, RowMax, RowSum,
    Nonfinite, Sink, Windows, plan, parts, group, num_tiles, flags, sink, scale,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr, SKIP: gl.constexpr,
    CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, TILES: gl.constexpr, SINK: gl.constexpr, WITH_STATS: gl.constexpr,
    FIRST_MAXIMA: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """What a group of warps does: the first ones compute, the others load queries, and keys and values."""
    COUNT: gl.constexpr = GROUPS[0] * GROUPS[1] * GROUPS[2]
    if WORKER < COUNT:
        q_consumer(
            q_ring, k_ring, v_ring, notes, schedule, Out, RowMax, RowSum, Nonfinite, Sink, Windows, plan, parts,
            num_tiles, sink, scale * LOG2E, CAUSAL, TILE, PART, GROUPS, SKIP, CHUNK, PACK, RANK, D, DV,
            STAGES, TILES, SINK, WITH_STATS, FIRST_MAXIMA, WORKER,
        )  # fmt: skip
    elif WORKER == COUNT:
        query_tile_producer(
            q_ring, schedule, Nonfinite + flags, (q_desc,), plan, num_tiles,
            CAUSAL, TILE, PART, GROUPS, CHUNK, PACK, TILES, Windows,
        )  # fmt: skip
    elif SKIP:
        both = (k_ring[0][0], v_ring[0][0]), k_ring[1], k_ring[2]
        key_chunk_producer(
            both, notes, schedule, (k_desc, v_desc), (regk_desc, regv_desc), plan, num_tiles, group,
            CAUSAL, TILE, CHUNK, PACK, SKIP, STAGES, Windows,
        )  # fmt: skip
    elif WORKER == COUNT + 1:
        key_chunk_producer(
            k_ring, notes, schedule, (k_desc,), (regk_desc,), plan, num_tiles, group,
            CAUSAL, TILE, CHUNK, PACK, SKIP, STAGES, Windows,
        )  # fmt: skip
    else:
        key_chunk_producer(
            v_ring, notes, schedule, (v_desc,), (regv_desc,), plan, num_tiles, group,
            CAUSAL, TILE, CHUNK, PACK, SKIP, STAGES, Windows,
        )  # fmt: skip


@gluon.jit
def large_forward_kernel(
    Out, RowMax, RowSum, Nonfinite, Sink, Windows, q_desc, k_desc, v_desc, regk_desc, regv_desc,
    length, kernel, stride, tiles, parts, group, blocks, registers, num_tiles, flags, sink, scale,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr, SKIP: gl.constexpr,
    CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    SINK: gl.constexpr, WITH_STATS: gl.constexpr, FIRST_MAXIMA: gl.constexpr, STAGES: gl.constexpr,
    TILES: gl.constexpr, WARPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of all tiles.

    ``Nonfinite`` has a flag for each part of a tile, set where its results are not to be used, and behind the ``flags``
    the tile counter. Heads have ``D`` and ``DV`` channels, and more columns in shared memory, which TMA fills with
    zeros. ``WARPS`` and ``REGISTERS``, those of a thread, are given for all but the first group of warps, which
    has ``num_warps``. ``Windows`` is None except in packed batches (``on_line``). ``FIRST_MAXIMA``: whether rows keep
    the references of their first chunk (``online_softmax.py``).
    """
    COUNT: gl.constexpr = GROUPS[0] * GROUPS[1] * GROUPS[2]
    q_ring = new_ring(repeated((q_desc,), COUNT), TILES, COUNT)
    if SKIP:
        # Keys and values arrive together, which takes half as many barriers.
        ring = new_ring((k_desc, v_desc), STAGES, COUNT)
        k_ring, v_ring = ((ring[0][0],), ring[1], ring[2]), ((ring[0][1],), ring[1], ring[2])
    else:
        k_ring, v_ring = new_ring((k_desc,), STAGES, COUNT), new_ring((v_desc,), STAGES, COUNT)
    notes, schedule = new_notes(STAGES), new_schedule(COUNT + (1 if SKIP else 2))
    plan = (length, kernel, stride, tiles, blocks, registers)
    gl.warp_specialize(
        [
            (forward_worker, (q_ring, k_ring, v_ring, notes, schedule, q_desc, k_desc, v_desc, regk_desc, regv_desc,
                              Out, RowMax, RowSum, Nonfinite, Sink, Windows, plan, parts, group, num_tiles, flags, sink,
                              scale, CAUSAL, TILE, PART, GROUPS, SKIP, CHUNK, PACK, RANK, D, DV, STAGES, TILES,
                              SINK, WITH_STATS, FIRST_MAXIMA, WORKER))
            for WORKER in (0, 1, 2, 3, 4, 5, 6)[: COUNT + (2 if SKIP else 3)]
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


def query_buffers(problem: Problem) -> int:
    """Buffers for tiles of queries. With two the queries of the next tile arrive in time; wide heads leave room for
    one.
    """
    return 1 if head_width(problem.query.shape[-1]) > 128 else 2


def forward(
    config: LargeTileConfig, problem: Problem, inputs: Inputs, options: Options, with_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ``portable.forward.forward`` computes, for calls that ``dispatch`` sends here.

    Allocates its results, and four bytes for every part of a tile.
    """
    query, key, value, reg_keys, reg_values, sink, *_ = inputs
    call, flags = prepare(config, problem, with_stats)
    results = new_results(query, value.shape[-1], with_stats)
    nonfinite = query.new_zeros(flags + 1, dtype=torch.int32)
    tensors = *results, nonfinite, sink, problem.window_table()
    call(tensors, (query, key, value, reg_keys, reg_values), (options.sink_value, options.scale))
    repair(config, problem, inputs, options, nonfinite, results)
    return results


@lru_cache(maxsize=1024)
def prepare(config: LargeTileConfig, p: Problem, with_stats: bool) -> tuple[Call, int]:
    """What all calls of a problem share, and the number of parts of tiles."""
    lengths, kernel_size, stride, _ = p.geometry
    blocks = p.query.shape[-2] // config.pack
    programs, flags = (large_tiling.tile_count(p, tile) * blocks for tile in (config.tile, config.part))
    call = call_of(
        large_forward_kernel,
        (min(programs, multiprocessors(p.device)),),
        (
            lengths, kernel_size, stride, p.tiles(config.tile), p.tiles(config.part), p.group,
            blocks, p.registers or None, programs, flags,
        ),
        (
            query_boxes(p.query, config.part, config.pack),
            key_boxes(p.key, config.chunk),
            key_boxes(p.value, config.chunk),
            *boxes_of_registers(p, prod(config.chunk)),
        ),
        CAUSAL=three_axes(p.is_causal, False), CHUNK=config.chunk, RANK=p.rank, PACK=config.pack,
        D=p.query.shape[-1], DV=p.value.shape[-1],
        SINK=p.sink, WITH_STATS=with_stats, FIRST_MAXIMA=config.first_maxima, PART=config.part,
        GROUPS=config.groups, SKIP=config.skip,
        TILE=config.tile, STAGES=config.stages, TILES=query_buffers(p), **config.work(2 if config.skip else 3),
    )  # fmt: skip
    return call, flags
