"""The backward pass of windows in fp32 on compute capability 9.0, in Gluon, whose products are those of fp16 pairs.

It computes what ``portable/pair_gradients.py`` computes, which says how scores' gradients are scaled, with the methods
of ``medium_pairs.py``.
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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ..host.problem import Cotangents, Inputs, Layout, Options, Problem, RowStatistics, layout, new_like, strides
from ..portable.pairs import TINY, WEIGHT_EXPONENT, WEIGHT_UNIT, exponent, scale_of, split_of, unit_of
from ..portable.primitives import LOG2E
from ..portable.windows import (
    contiguous_row,
    inside_axes,
    queries_of,
    shifted,
    union_of_queries,
    union_of_windows,
    unravel,
    windows_of,
)
from .descriptors import call_of, frames_of
from .medium_backward import chunk_statistics, in_layout, next_of_group
from .medium_chunks import chunks_over, hidden_positions, next_chunk, seen_by_all
from .medium_pairs import (
    PairCall,
    end_tiles,
    held_pair,
    load_tile,
    pair_boxes,
    shared_pair,
    start_pair_scores,
    start_pair_sum,
    token_rows,
)
from .medium_parts import start_chunk
from .medium_tiling import MediumTileConfig, spec_of
from .primitives import class_rows, load_grad_lse, load_lse, spread, store_rows, thread_barrier
from .products import new_sum
from .rings import new_barriers, new_stages, stage_of
from .small_softmax import WARPS
from .small_tiles import first_frame, own_tile
from .walk import on_rings, row_sizes


@gluon.jit
def row_sum(b_x, ROW: gl.constexpr):
    return gl.convert_layout(gl.sum(b_x, 1), ROW)


@gluon.jit
def store_scaled(Out, o_row, m_rows, b_rows, row_scale, D: gl.constexpr):
    """Store rows of a contiguous ``[rows, D]`` times ``row_scale``."""
    LAYOUT: gl.constexpr = b_rows.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    b_rows = b_rows * gl.convert_layout(row_scale, ROW)[:, None]
    store_rows(Out, gl.convert_layout(o_row, ROW), gl.convert_layout(m_rows, ROW), b_rows, D, LAYOUT)


@gluon.jit
def medium_pair_dq_kernel(
    Q, DO, Units, Out, DLse, RowMax, RowSum, DQ, Delta, Lse, k_desc, v_desc,
    q_strides, do_strides, dl_strides, axes, tiles, frames, group, blocks, scale,
    SPEC: gl.constexpr, CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SIDE: gl.constexpr,
    WITH_DLSE: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """dQ, ``delta = rowsum(dOut * Out) - dLse`` and base-2 lse of one tile; arguments as in ``medium_pairs.py``."""
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    PERIODIC: gl.constexpr = SPEC.periodic
    M: gl.constexpr = SPEC.rows
    D: gl.constexpr = SPEC.head_dim
    TILE: gl.constexpr = SPEC.tile
    PACK: gl.constexpr = SPEC.pack
    RANK: gl.constexpr = SPEC.rank
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    i_batch, i_block, residue, count, origin = own_tile(length, dilation, tiles, blocks, TILE, SIDE)
    heads, i_kv = blocks * PACK, i_block * PACK // group
    lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC)
    common = seen_by_all(inner_lo, inner_hi, SPEC)
    chunks, i_frame = chunks_over(lo, hi, count, CHUNK, PERIODIC), first_frame(i_batch, residue, length, frames)
    descs = k_desc, k_desc, v_desc, v_desc
    rings, ready = new_stages(descs, STAGES), new_barriers(STAGES, 1)
    keys, values = (rings[0], rings[1]), (rings[2], rings[3])
    ahead = lo
    for n in gl.static_range(STAGES):
        if n < chunks:
            first = on_rings(ahead, count, PERIODIC)
            start_chunk(descs, rings, ready, n, i_kv, i_frame, first, CHUNK, COLUMNS, STAGES)
        ahead = next_chunk(ahead, lo, hi, count, CHUNK, RANK, PERIODIC)

    row = gl.arange(0, M, ROW)
    position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
    index = shifted(position, origin)
    token = spread(index, residue, dilation)
    m_rows, o_row = class_rows(position, head, i_batch, origin, residue, count, dilation, length, heads)
    b_do = load_tile(DO, token_rows(do_strides, i_batch, token, head), m_rows, D)
    row_delta = row_sum(b_do * load_tile(Out, o_row * D, m_rows, D), ROW)
    if WITH_DLSE:
        row_delta -= load_grad_lse(DLse, dl_strides, i_batch, token, head, m_rows)
    row_lse = load_lse(RowMax, RowSum, o_row, m_rows)
    gl.store(Delta + o_row, row_delta, mask=m_rows)
    gl.store(Lse + o_row, row_lse, mask=m_rows)
    p_units = Units + (i_batch.to(gl.int64) * (heads // group) + i_kv) * 4
    k_unit, v_unit = gl.load(p_units), gl.load(p_units + 1)
    row_e = exponent(row_sum(gl.abs(b_do), ROW) * gl.load(p_units + 2) + gl.abs(row_delta))
    grads, row_do_e = shared_pair(b_do)
    queries, row_q_e = shared_pair(load_tile(Q, token_rows(q_strides, i_batch, token, head), m_rows, D))
    end_tiles()
    if HELD:
        queries, grads = held_pair(queries, N), held_pair(grads, N)
    row_factor = gl.maximum(unit_of(gl.convert_layout(row_q_e, ROW)) * (scale * LOG2E) * k_unit, TINY)
    row_dp = unit_of(gl.convert_layout(row_do_e, ROW)) * scale_of(row_e) * v_unit
    row_shift = row_delta * scale_of(row_e)
    row_lo, row_hi = windows_of(index, count, kernel, stride, CAUSAL, PERIODIC)
    row_size = row_sizes(row_lo, row_hi)
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    b_dq, corner = new_sum(M, D), lo
    for n in range(chunks):
        i_stage, phase = stage_of(n, STAGES)
        b_hidden = hidden_positions(corner, common, row_lo, row_size, inner, count, CHUNK, RANK, PERIODIC)
        mbarrier.wait(ready.index(i_stage), phase)
        b_s = start_pair_scores(queries, keys, i_stage, b_hidden, N)
        b_dp = start_pair_scores(grads, values, i_stage, None, N)
        b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
        b_p = gl.exp2(b_s * row_factor[:, None] - row_lse[:, None])
        b_ds = b_p * (b_dp * row_dp[:, None] - row_shift[:, None])
        b_dq += warpgroup_mma_wait(0, deps=[start_pair_sum(b_ds, keys, i_stage)])
        corner = next_chunk(corner, lo, hi, count, CHUNK, RANK, PERIODIC)
        thread_barrier()  # the stage has been read
        if n + STAGES < chunks:
            first = on_rings(ahead, count, PERIODIC)
            start_chunk(descs, rings, ready, n + STAGES, i_kv, i_frame, first, CHUNK, COLUMNS, STAGES)
        ahead = next_chunk(ahead, lo, hi, count, CHUNK, RANK, PERIODIC)
    store_scaled(DQ, o_row, m_rows, b_dq, unit_of(row_e) * (scale * k_unit), D)


@gluon.jit
def add_pair_queries(
    b_dk, b_dv, keys, values, queries, grads, i_stage, lses, deltas, corner, common, row_lo, row_size, count,
    row_factor, row_dp, row_scale, FIRST: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr,
    RANK: gl.constexpr, PERIODIC: gl.constexpr,
):  # fmt: skip
    """Add the contribution of ``N`` queries of a chunk, from ``FIRST`` on, to dK and dV."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    inner = unravel((FIRST + gl.arange(0, N, COLUMN)) // PACK, CHUNK[1], CHUNK[2])
    b_hidden = hidden_positions(
        corner, common, in_layout(row_lo, ROW), in_layout(row_size, ROW), inner, count, CHUNK, RANK, PERIODIC
    )  # fmt: skip
    b_s = start_pair_scores(keys, queries, i_stage, b_hidden, N, FIRST)
    b_dp = start_pair_scores(values, grads, i_stage, None, N, FIRST)
    col_lse, col_delta = lses.slice(FIRST, N).load(COLUMN), deltas.slice(FIRST, N).load(COLUMN)
    b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
    b_p = gl.exp2(b_s * row_factor[:, None] - (col_lse - WEIGHT_EXPONENT)[None, :])
    b_ds = b_p * (b_dp * row_dp[:, None] - row_scale[:, None] * col_delta[None, :])
    b_dv_chunk = start_pair_sum(b_p, grads, i_stage, FIRST)
    b_dk_chunk = start_pair_sum(b_ds, queries, i_stage, FIRST)
    b_dv_chunk, b_dk_chunk = warpgroup_mma_wait(0, deps=(b_dv_chunk, b_dk_chunk))
    return b_dk + b_dk_chunk, b_dv + b_dv_chunk


@gluon.jit
def medium_pair_dkv_kernel(
    K, V, Units, Delta, Lse, DK, DV, q_desc, do_desc, k_strides, v_strides, axes, tiles, frames, group, kv_heads, scale,
    SPEC: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr, SLICE: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, SIDE: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys; grid and chunks are those of ``medium_dkv_kernel``."""
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    PERIODIC: gl.constexpr = SPEC.periodic
    M: gl.constexpr = SPEC.rows
    D: gl.constexpr = SPEC.head_dim
    TILE: gl.constexpr = SPEC.tile
    RANK: gl.constexpr = SPEC.rank
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2] * PACK
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, SLICE, 16]))
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    i_batch, i_kv, residue, count, origin = own_tile(length, dilation, tiles, kv_heads, TILE, SIDE)
    lo, hi, inner_lo, inner_hi = union_of_queries(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC)
    common = seen_by_all(inner_lo, inner_hi, SPEC)
    chunks, i_frame = chunks_over(lo, hi, count, CHUNK, PERIODIC), first_frame(i_batch, residue, length, frames)
    every, heads = chunks * (group // PACK), kv_heads * group
    descs = q_desc, q_desc, do_desc, do_desc
    rings, ready = new_stages(descs, STAGES), new_barriers(STAGES, 1)
    queries, grads = (rings[0], rings[1]), (rings[2], rings[3])
    lses, deltas = gl.allocate_shared_memory(gl.float32, [N], FLAT), gl.allocate_shared_memory(gl.float32, [N], FLAT)
    ahead, ahead_head, ahead_left = lo, i_kv * group, chunks
    for n in gl.static_range(STAGES):
        if n < every:
            first = on_rings(ahead, count, PERIODIC)
            start_chunk(descs, rings, ready, n, ahead_head, i_frame, first, CHUNK, COLUMNS, STAGES, PACK)
        ahead, ahead_head, ahead_left = next_of_group(
            ahead, ahead_head, ahead_left, chunks, lo, hi, count, CHUNK, PACK, RANK, PERIODIC
        )

    index = shifted(unravel(gl.arange(0, M, ROW), TILE[1], TILE[2]), origin)
    token, m_rows = spread(index, residue, dilation), inside_axes(index, count)
    o_row = contiguous_row(i_batch.to(gl.int64), token, length) * kv_heads + i_kv
    b_v = load_tile(V, token_rows(v_strides, i_batch, token, i_kv), m_rows, D)
    p_units = Units + (i_batch.to(gl.int64) * kv_heads + i_kv) * 4
    q_unit, do_unit = gl.load(p_units), gl.load(p_units + 1)
    row_e = exponent(row_sum(gl.abs(b_v), ROW) * gl.load(p_units + 2) + gl.load(p_units + 3))
    values, row_v_e = shared_pair(b_v)
    keys, row_k_e = shared_pair(load_tile(K, token_rows(k_strides, i_batch, token, i_kv), m_rows, D))
    end_tiles()
    if HELD:
        keys, values = held_pair(keys, SLICE), held_pair(values, SLICE)
    row_scale = scale_of(row_e) * WEIGHT_UNIT
    row_factor = gl.maximum(unit_of(gl.convert_layout(row_k_e, ROW)) * (scale * LOG2E) * q_unit, TINY)
    row_dp = unit_of(gl.convert_layout(row_v_e, ROW)) * row_scale * do_unit
    row_lo, row_hi = queries_of(index, count, kernel, stride, CAUSAL, PERIODIC)
    row_size = row_sizes(row_lo, row_hi)
    b_dk, b_dv = new_sum(M, D), new_sum(M, D)
    corner, head, left = lo, i_kv * group, chunks
    lse, delta = chunk_statistics(
        Lse, Delta, corner, head, i_batch, residue, count, dilation, length, heads, CHUNK, PACK, PERIODIC
    )  # fmt: skip
    for n in range(every):
        i_stage, phase = stage_of(n, STAGES)
        lses.store(lse)
        deltas.store(delta)
        chunk = corner
        corner, head, left = next_of_group(corner, head, left, chunks, lo, hi, count, CHUNK, PACK, RANK, PERIODIC)
        head = gl.minimum(head, i_kv * group + group - PACK)  # behind the last chunk
        lse, delta = chunk_statistics(
            Lse, Delta, corner, head, i_batch, residue, count, dilation, length, heads, CHUNK, PACK, PERIODIC
        )  # fmt: skip
        mbarrier.wait(ready.index(i_stage), phase)
        for I_SLICE in gl.static_range(N // SLICE):
            b_dk, b_dv = add_pair_queries(
                b_dk, b_dv, keys, values, queries, grads, i_stage, lses, deltas, chunk, common, row_lo, row_size, count,
                row_factor, row_dp, row_scale, I_SLICE * SLICE, SLICE, CHUNK, PACK, RANK, PERIODIC,
            )  # fmt: skip
        thread_barrier()  # stage and statistics have been read
        if n + STAGES < every:
            first = on_rings(ahead, count, PERIODIC)
            start_chunk(descs, rings, ready, n + STAGES, ahead_head, i_frame, first, CHUNK, COLUMNS, STAGES, PACK)
        ahead, ahead_head, ahead_left = next_of_group(
            ahead, ahead_head, ahead_left, chunks, lo, hi, count, CHUNK, PACK, RANK, PERIODIC
        )
    store_scaled(DK, o_row, m_rows, b_dk, unit_of(row_e) * (scale * q_unit), D)
    store_scaled(DV, o_row, m_rows, b_dv, gl.full([M], do_unit * WEIGHT_UNIT, gl.float32, ROW), D)


# --- On the host


def query_gradient(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, RowStatistics]:
    """dQ, delta and the base-2 log-sum-exp. Allocates copies of keys and values beside these."""
    out, row_max, row_sum, grad_out, grad_lse = cotangents
    call = query_call(config, problem, layout(grad_out), None if grad_lse is None else layout(grad_lse[..., None]))
    key_pair, value_pair, units = call.split(problem, inputs.key, inputs.value)
    grad_query = new_like(inputs.query)
    delta, lse = torch.empty_like(row_max), torch.empty_like(row_max)
    pointers = inputs.query, grad_out, units, out, grad_lse, row_max, row_sum, grad_query, delta, lse
    call.launch(pointers, (key_pair, value_pair), (options.scale,))
    return grad_query, RowStatistics(delta, lse)


@lru_cache(maxsize=1024)
def query_call(config: MediumTileConfig, p: Problem, grad_out: Layout, grad_lse: Layout | None) -> PairCall:
    tiles, blocks = p.tiles(config.tile), p.query.shape[-2] // config.pack
    dl_strides = (0,) * 5 if grad_lse is None else strides(grad_lse)
    launch = call_of(
        medium_pair_dq_kernel,
        (prod(tiles) * blocks, p.query.shape[0]),
        (
            p.strides_of(p.query), p.strides_of(grad_out), dl_strides, p.geometry, tiles, frames_of(p), p.group, blocks,
        ),
        pair_boxes(config, p, p.key, p.value),
        SPEC=spec_of(config, p), CHUNK=config.chunk, COLUMNS=config.columns, STAGES=config.stages, SIDE=config.side,
        WITH_DLSE=grad_lse is not None, HELD=config.held, num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
    return PairCall(split_of(p, p.key, p.value), launch)


def key_gradients(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor,
    statistics: RowStatistics,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV. Allocates copies of queries and of the gradients of the output beside these."""
    delta, lse, _ = statistics
    call = key_call(config, problem, layout(grad_out))
    query_pair, grad_out_pair, units = call.split(problem, inputs.query, grad_out, delta)
    grad_key, grad_value = new_like(inputs.key), new_like(inputs.value)
    pointers = inputs.key, inputs.value, units, delta, lse, grad_key, grad_value
    call.launch(pointers, (query_pair, grad_out_pair), (options.scale,))
    return grad_key, grad_value


@lru_cache(maxsize=1024)
def key_call(config: MediumTileConfig, p: Problem, grad_out: Layout) -> PairCall:
    tiles = p.tiles(config.tile)
    launch = call_of(
        medium_pair_dkv_kernel,
        (prod(tiles) * p.kv_heads, p.query.shape[0]),
        (p.strides_of(p.key), p.strides_of(p.value), p.geometry, tiles, frames_of(p), p.group, p.kv_heads),
        pair_boxes(config, p, p.query, grad_out),
        SPEC=spec_of(config, p), CHUNK=config.chunk, PACK=config.chunk_pack, SLICE=config.slice, COLUMNS=config.columns,
        STAGES=config.stages, SIDE=config.side, HELD=config.held, num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
    return PairCall(split_of(p, p.query, grad_out, with_delta=True), launch)
