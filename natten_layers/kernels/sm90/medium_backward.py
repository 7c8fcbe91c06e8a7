"""The backward pass of windows between small and large on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/dq.py`` and ``portable/dkv.py`` compute, with the methods of ``medium_forward.py``.
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
from triton.experimental.gluon.language.nvidia.hopper.tma import store_wait

from ..host.problem import (
    Cotangents,
    Inputs,
    Layout,
    Options,
    Problem,
    RowStatistics,
    contiguous,
    layout,
    new_like,
    strides,
)
from ..portable.primitives import LOG2E
from ..portable.windows import (
    bias_offset,
    clamped,
    contiguous_row,
    inside_axes,
    queries_of,
    shifted,
    tokens_of,
    union_of_queries,
    union_of_windows,
    unravel,
    windows_of,
)
from .descriptors import Call, call_of
from .masked_keys import has_masked, load_lse_or_zero, load_unmasked, unmasked_keys, without_masked, without_masked_rows
from .medium_chunks import (
    chunks_over,
    first_chunk,
    hidden_chunk,
    hidden_positions,
    key_biases,
    next_chunk,
    register_chunk_count,
    seen_by_all,
    with_biases,
)
from .medium_forward import hidden_scores
from .medium_parts import (
    both_frames,
    boxes_of_chunks,
    boxes_of_rows,
    boxes_of_seen,
    by_parts,
    bytes_of,
    chunks_of,
    products_of_rows,
    start_chunk,
    start_first_chunks,
    start_products,
    start_rows,
    start_seen_chunk,
    start_store,
    start_sums,
)
from .medium_tiling import MediumTileConfig, spec_of
from .primitives import class_rows, load_grad_lse, load_lse, row_biases, spread, thread_barrier
from .products import finished, new_sums, split_sums
from .rings import new_barriers, new_stages, stage_of
from .small_softmax import WARPS
from .small_tiles import first_frame, own_tile, present_descriptors
from .walk import on_rings, row_sizes


@gluon.jit
def scaled_sums(sums, scale, DTYPE: gl.constexpr):
    results = ()
    for PART in gl.static_range(len(sums)):
        results = results + ((sums[PART] * scale).to(DTYPE),)  # noqa: RUF005
    return results


@gluon.jit
def logits(b_s, b_hidden, factor, BIASED: gl.constexpr):
    """Base-2 logits of the scores that ``hidden_scores`` starts to compute."""
    b_s = b_s * factor
    if BIASED:
        b_s += b_hidden
    return b_s


@gluon.jit
def add_keys(sums, queries, grads, keys, values, i_stage, b_hidden, row_lse, row_delta, factor, BIASED: gl.constexpr):
    """Start to add the contribution of a chunk, which has arrived, to dQ."""
    b_s = hidden_scores(queries, keys, i_stage, b_hidden, BIASED)
    b_dp = start_products(grads, values, i_stage, None, b_hidden.shape[1])
    b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
    b_p = gl.exp2(logits(b_s, b_hidden, factor, BIASED) - row_lse[:, None])
    b_ds = (b_p * (b_dp - row_delta[:, None])).to(queries[0].dtype)
    return start_sums(b_ds, keys, i_stage, sums, None)


@gluon.jit
def medium_dq_kernel(
    Delta, Lse, RowMax, RowSum, Out, DLse, KeyMask, Rpb,
    q0_desc, q1_desc, q2_desc, do0_desc, do1_desc, do2_desc, dq0_desc, dq1_desc, dq2_desc,
    k0_desc, k1_desc, k2_desc, v0_desc, v1_desc, v2_desc,
    regk0_desc, regk1_desc, regk2_desc, regv0_desc, regv1_desc, regv2_desc,
    dl_strides, mask_strides, axes, key_length, tiles, frames, group, blocks, registers, scale,
    SPEC: gl.constexpr, CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SIDE: gl.constexpr,
    WITH_DLSE: gl.constexpr,
):  # fmt: skip
    """dQ, ``delta = rowsum(dOut * Out) - dLse`` and base-2 lse of one tile; arguments as in ``medium_forward.py``."""
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    PERIODIC: gl.constexpr = SPEC.periodic
    BIASED: gl.constexpr = Rpb is not None
    M: gl.constexpr = SPEC.rows
    TILE: gl.constexpr = SPEC.tile
    PACK: gl.constexpr = SPEC.pack
    RANK: gl.constexpr = SPEC.rank
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    q_descs = present_descriptors(q0_desc, q1_desc, q2_desc)
    do_descs = present_descriptors(do0_desc, do1_desc, do2_desc)
    dq_descs = present_descriptors(dq0_desc, dq1_desc, dq2_desc)
    k_descs, v_descs = present_descriptors(k0_desc, k1_desc, k2_desc), present_descriptors(v0_desc, v1_desc, v2_desc)
    register_descs = None
    if registers is not None:
        regv_descs = present_descriptors(regv0_desc, regv1_desc, regv2_desc)
        register_descs = present_descriptors(regk0_desc, regk1_desc, regk2_desc) + regv_descs

    i_batch, i_block, residue, count, origin = own_tile(length, dilation, tiles, blocks, TILE, SIDE)
    key_count = count if key_length is None else key_length
    lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC, key_length)
    common = seen_by_all(inner_lo, inner_hi, SPEC)
    chunks = register_chunk_count(registers, CHUNK) + chunks_over(lo, hi, key_count, CHUNK, PERIODIC)
    i_kv, i_frame = i_block * PACK // group, first_frame(i_batch, residue, length, frames[1])
    ready = new_barriers(STAGES + 1, 1)  # for the stages of the ring, and for the tile
    mbarrier.expect(ready.index(STAGES), bytes_of(2 * M, COLUMNS))
    q_corner = first_frame(i_batch, residue, length, frames[0]) + origin[0], origin[1], origin[2], i_block * PACK
    queries = start_rows(q_descs, q_corner, ready.index(STAGES), COLUMNS)
    grads = start_rows(do_descs, q_corner, ready.index(STAGES), COLUMNS)
    keys, values = new_stages(k_descs, STAGES), new_stages(v_descs, STAGES)
    descs, rings = k_descs + v_descs, keys + values
    ahead = start_first_chunks(
        descs, register_descs, rings, ready, 0, chunks, i_kv, i_batch, i_frame, lo, hi, registers, key_count, CHUNK,
        COLUMNS, STAGES, RANK, PERIODIC,
    )  # fmt: skip

    row = gl.arange(0, M, ROW)
    position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
    m_rows, o_row = class_rows(position, head, i_batch, origin, residue, count, dilation, length, blocks * PACK)
    index = shifted(position, origin)
    row_lo, row_hi = windows_of(index, count, kernel, stride, CAUSAL, PERIODIC, key_length)
    p_biases = row_biases(Rpb, clamped(index, count), head, kernel)
    row_size = row_sizes(row_lo, row_hi)
    MAY_SEE_NOTHING: gl.constexpr = KeyMask is not None or BIASED
    if MAY_SEE_NOTHING:
        row_lse, row_sees = load_lse_or_zero(RowMax, RowSum, o_row, m_rows)
    else:
        row_lse = load_lse(RowMax, RowSum, o_row, m_rows)
    gl.store(Lse + o_row, row_lse, mask=m_rows)
    mbarrier.wait(ready.index(STAGES), 0)
    row_delta = products_of_rows(Out, o_row * SPEC.head_dim, m_rows, grads, SPEC.head_dim, COLUMNS, ROW)
    if WITH_DLSE:
        token = tokens_of(shifted(position, origin), residue, count, dilation)
        row_delta -= load_grad_lse(DLse, dl_strides, i_batch, token, head, m_rows)
    if MAY_SEE_NOTHING:
        row_delta = gl.where(row_sees, row_delta, 0.0)
    gl.store(Delta + o_row, row_delta, mask=m_rows)

    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    sums, corner = new_sums(M, COLUMNS), first_chunk(lo, registers, CHUNK)
    seen = unmasked_keys(
        KeyMask, mask_strides, i_batch, corner, lo, residue, key_count, dilation, CHUNK, RANK, PERIODIC
    )  # fmt: skip
    for n in range(chunks):
        i_stage, phase = stage_of(n, STAGES)
        b_hidden = hidden_chunk(
            corner, common, lo, registers, row_lo, row_size, inner, key_count, CHUNK, RANK, PERIODIC, SCORES
        )  # fmt: skip
        b_hidden = with_biases(b_hidden, p_biases, bias_offset(shifted(inner, corner), kernel), corner[2] >= lo[2])
        masked = has_masked(seen)
        mbarrier.wait(ready.index(i_stage), phase)
        b_hidden = without_masked(b_hidden, masked, seen, chunks_of(rings, i_stage, N))
        sums = add_keys(
            sums, queries, grads, keys, values, i_stage, b_hidden, row_lse, row_delta, scale * LOG2E, BIASED
        )  # fmt: skip
        corner = next_chunk(corner, lo, hi, key_count, CHUNK, RANK, PERIODIC)
        seen = unmasked_keys(
            KeyMask, mask_strides, i_batch, corner, lo, residue, key_count, dilation, CHUNK, RANK, PERIODIC
        )  # fmt: skip
        sums = finished(sums)
        thread_barrier()  # the stage has been read
        if n + STAGES < chunks:
            start_seen_chunk(
                descs, register_descs, rings, ready, n + STAGES, i_kv, i_batch, i_frame, ahead, lo, registers,
                key_count, CHUNK, COLUMNS, STAGES, PERIODIC,
            )  # fmt: skip
        ahead = next_chunk(ahead, lo, hi, key_count, CHUNK, RANK, PERIODIC)
    start_store(scaled_sums(sums, scale, queries[0].dtype), queries, dq_descs, q_corner, COLUMNS)
    store_wait(0)


@gluon.jit
def next_of_group(
    corner, head, left, chunks, lo, hi, count, CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr,
    PERIODIC: gl.constexpr,
):  # fmt: skip
    """The chunk that follows: of the same ``PACK`` heads, of which ``left`` are left, or the first of the next."""
    left -= 1
    ends = left == 0
    t, h, w = next_chunk(corner, lo, hi, count, CHUNK, RANK, PERIODIC)
    corner = gl.where(ends, lo[0], t), gl.where(ends, lo[1], h), gl.where(ends, lo[2], w)
    return corner, head + gl.where(ends, PACK, 0), gl.where(ends, chunks, left)


@gluon.jit
def chunk_statistics(
    Lse, Delta, corner, head, i_batch, residue, count, dilation, length, heads, CHUNK: gl.constexpr,
    PACK: gl.constexpr, PERIODIC: gl.constexpr,
):  # fmt: skip
    """Statistics of the queries of a chunk of ``PACK`` heads, the first of which is ``head``; 0 beyond the end of an
    axis.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2] * PACK
    column = gl.arange(0, N, LAYOUT)
    index = shifted(unravel(column // PACK, CHUNK[1], CHUNK[2]), on_rings(corner, count, PERIODIC))
    first_row = contiguous_row(i_batch.to(gl.int64), spread(index, residue, dilation), length) * heads
    o_row = first_row + (head + column % PACK)
    m_inside = inside_axes(index, count)
    return gl.load(Lse + o_row, mask=m_inside, other=0.0), gl.load(Delta + o_row, mask=m_inside, other=0.0)


@gluon.jit
def in_layout(position, LAYOUT: gl.constexpr):
    return (
        gl.convert_layout(position[0], LAYOUT),
        gl.convert_layout(position[1], LAYOUT),
        gl.convert_layout(position[2], LAYOUT),
    )


@gluon.jit
def add_queries(
    dks, dvs, keys, values, queries, grads, i_stage, lses, deltas, corner, common, row_lo, row_size, count, p_biases,
    kernel, factor, FIRST: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr, RANK: gl.constexpr,
    PERIODIC: gl.constexpr,
):  # fmt: skip
    """Start to add the contribution of ``N`` queries of a chunk, from ``FIRST`` on, to dK and dV."""
    BIASED: gl.constexpr = p_biases is not None
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    inner = unravel((FIRST + gl.arange(0, N, COLUMN)) // PACK, CHUNK[1], CHUNK[2])
    b_hidden = hidden_positions(
        corner, common, in_layout(row_lo, ROW), in_layout(row_size, ROW), inner, count, CHUNK, RANK, PERIODIC
    )  # fmt: skip
    b_hidden = with_biases(b_hidden, p_biases, -bias_offset(shifted(inner, corner), kernel))
    b_s = hidden_scores(keys, queries, i_stage, b_hidden, BIASED, FIRST)
    b_dp = start_products(values, grads, i_stage, None, N, FIRST)
    col_lse, col_delta = lses.slice(FIRST, N).load(COLUMN), deltas.slice(FIRST, N).load(COLUMN)
    b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
    b_p = gl.exp2(logits(b_s, b_hidden, factor, BIASED) - col_lse[None, :])
    b_ds = (b_p * (b_dp - col_delta[None, :])).to(keys[0].dtype)
    dvs = start_sums(b_p.to(keys[0].dtype), grads, i_stage, dvs, None, FIRST)
    return start_sums(b_ds, queries, i_stage, dks, None, FIRST), dvs


@gluon.jit
def medium_dkv_kernel(
    Delta, Lse, KeyMask, Rpb, k0_desc, k1_desc, k2_desc, v0_desc, v1_desc, v2_desc, dk0_desc, dk1_desc, dk2_desc,
    dv0_desc, dv1_desc, dv2_desc, q0_desc, q1_desc, q2_desc, do0_desc, do1_desc, do2_desc,
    mask_strides, axes, key_length, tiles, frames, group, kv_heads, scale,
    SPEC: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr, SLICE: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys; the grid is (tiles * KV heads, batch).

    The queries of ``PACK`` heads that see it come chunk by chunk, then those of the next heads. In a chunk, as in a
    tile of queries, the heads of a position follow each other; ``SLICE`` of its queries are computed at a time.
    """
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    PERIODIC: gl.constexpr = SPEC.periodic
    M: gl.constexpr = SPEC.rows
    TILE: gl.constexpr = SPEC.tile
    RANK: gl.constexpr = SPEC.rank
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2] * PACK
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, SLICE, 16]))
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_descs, v_descs = present_descriptors(k0_desc, k1_desc, k2_desc), present_descriptors(v0_desc, v1_desc, v2_desc)
    dk_descs = present_descriptors(dk0_desc, dk1_desc, dk2_desc)
    dv_descs = present_descriptors(dv0_desc, dv1_desc, dv2_desc)
    q_descs = present_descriptors(q0_desc, q1_desc, q2_desc)
    do_descs = present_descriptors(do0_desc, do1_desc, do2_desc)

    lengths = length if key_length is None else key_length
    i_batch, i_kv, residue, key_count, origin = own_tile(lengths, dilation, tiles, kv_heads, TILE, SIDE)
    count = key_count if key_length is None else length
    lo, hi, inner_lo, inner_hi = union_of_queries(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC, key_length)
    common = seen_by_all(inner_lo, inner_hi, SPEC)
    chunks = chunks_over(lo, hi, count, CHUNK, PERIODIC)
    every, heads = chunks * (group // PACK), kv_heads * group
    row, row_seen = unravel(gl.arange(0, M, ROW), TILE[1], TILE[2]), None
    if KeyMask is not None:
        m_keys = inside_axes(shifted(row, origin), key_count)
        row_seen = load_unmasked(
            KeyMask, mask_strides, i_batch, origin, row, m_keys, residue, key_count, dilation, RANK
        )  # fmt: skip
        every = gl.where(gl.max(gl.where(m_keys, row_seen, 0), 0) == 0, 0, every)  # masked keys have no gradient
    i_frame = first_frame(i_batch, residue, length, frames[0])
    ready = new_barriers(STAGES + 1, 1)  # for the stages of the ring, and for the tile
    mbarrier.expect(ready.index(STAGES), bytes_of(2 * M, COLUMNS))
    k_corner = first_frame(i_batch, residue, length, frames[1]) + origin[0], origin[1], origin[2], i_kv
    keys = start_rows(k_descs, k_corner, ready.index(STAGES), COLUMNS)
    values = start_rows(v_descs, k_corner, ready.index(STAGES), COLUMNS)
    queries, grads = new_stages(q_descs, STAGES), new_stages(do_descs, STAGES)
    descs, rings = q_descs + do_descs, queries + grads
    lses, deltas = gl.allocate_shared_memory(gl.float32, [N], FLAT), gl.allocate_shared_memory(gl.float32, [N], FLAT)
    ahead, ahead_head, ahead_left = lo, i_kv * group, chunks
    for n in gl.static_range(STAGES):
        if n < every:
            start_chunk(
                descs, rings, ready, n, ahead_head, i_frame, on_rings(ahead, count, PERIODIC),
                CHUNK, COLUMNS, STAGES, PACK,
            )  # fmt: skip
        ahead, ahead_head, ahead_left = next_of_group(
            ahead, ahead_head, ahead_left, chunks, lo, hi, count, CHUNK, PACK, RANK, PERIODIC
        )

    row_lo, row_hi = queries_of(shifted(row, origin), count, kernel, stride, CAUSAL, PERIODIC, key_length)
    row_size = row_sizes(row_lo, row_hi)
    dks, dvs = new_sums(M, COLUMNS), new_sums(M, COLUMNS)
    corner, head, left = lo, i_kv * group, chunks
    lse, delta = chunk_statistics(
        Lse, Delta, corner, head, i_batch, residue, count, dilation, length, heads, CHUNK, PACK, PERIODIC
    )  # fmt: skip
    mbarrier.wait(ready.index(STAGES), 0)
    for n in range(every):
        i_stage, phase = stage_of(n, STAGES)
        lses.store(lse)
        deltas.store(delta)
        chunk, own_head = corner, head
        corner, head, left = next_of_group(corner, head, left, chunks, lo, hi, count, CHUNK, PACK, RANK, PERIODIC)
        head = gl.minimum(head, i_kv * group + group - PACK)  # behind the last chunk
        lse, delta = chunk_statistics(
            Lse, Delta, corner, head, i_batch, residue, count, dilation, length, heads, CHUNK, PACK, PERIODIC
        )  # fmt: skip
        mbarrier.wait(ready.index(i_stage), phase)
        p_biases = key_biases(Rpb, clamped(shifted(row, origin), key_count), own_head, kernel)
        for I_SLICE in gl.static_range(N // SLICE):
            dks, dvs = add_queries(
                dks, dvs, keys, values, queries, grads, i_stage, lses, deltas, chunk, common, row_lo, row_size, count,
                p_biases, kernel, scale * LOG2E, I_SLICE * SLICE, SLICE, CHUNK, PACK, RANK, PERIODIC,
            )  # fmt: skip
        dks, dvs = split_sums(finished(dks + dvs), len(dks))
        thread_barrier()  # stage and statistics have been read
        if n + STAGES < every:
            start_chunk(
                descs, rings, ready, n + STAGES, ahead_head, i_frame, on_rings(ahead, count, PERIODIC),
                CHUNK, COLUMNS, STAGES, PACK,
            )  # fmt: skip
        ahead, ahead_head, ahead_left = next_of_group(
            ahead, ahead_head, ahead_left, chunks, lo, hi, count, CHUNK, PACK, RANK, PERIODIC
        )
    dks, dvs = without_masked_rows(dks, row_seen), without_masked_rows(dvs, row_seen)
    start_store(scaled_sums(dks, scale, keys[0].dtype), keys, dk_descs, k_corner, COLUMNS)
    start_store(scaled_sums(dvs, 1.0, keys[0].dtype), values, dv_descs, k_corner, COLUMNS)
    store_wait(0)


def query_gradient(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, RowStatistics]:
    """dQ, delta and the base-2 lse, as ``portable.dq`` returns them. Allocates only these."""
    query, *seen = inputs.addressed
    out, row_max, row_sum, grad_out, grad_lse = cotangents
    grad_query = new_like(query)
    delta, lse = torch.empty_like(row_max), torch.empty_like(row_max)
    call = query_call(config, problem, layout(grad_out), None if grad_lse is None else layout(grad_lse[..., None]))
    described = by_parts(query, grad_out, grad_query, *seen)
    call((delta, lse, row_max, row_sum, out, grad_lse, inputs.key_mask, inputs.rpb), described, (options.scale,))
    return grad_query, RowStatistics(delta, lse)


@lru_cache(maxsize=1024)
def query_call(config: MediumTileConfig, p: Problem, grad_out: Layout, grad_lse: Layout | None) -> Call:
    tiles, blocks = p.tiles(config.tile), p.query.shape[-2] // config.pack
    return call_of(
        medium_dq_kernel,
        (prod(tiles) * blocks, p.query.shape[0]),
        (
            (0,) * 5 if grad_lse is None else strides(grad_lse), p.mask_strides, p.geometry, p.key_lengths, tiles,
            both_frames(p), p.group, blocks, p.registers or None,
        ),
        [*boxes_of_rows(config, p, p.query, grad_out, contiguous(p.query.shape)), *boxes_of_seen(config, p)],
        SPEC=spec_of(config, p), CHUNK=config.chunk, COLUMNS=config.columns, STAGES=config.stages, SIDE=config.side,
        WITH_DLSE=grad_lse is not None, num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip


def key_gradients(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor,
    statistics: RowStatistics,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV, as ``portable.dkv`` returns them. Allocates only these."""
    query, key, value, *_ = inputs
    grad_key, grad_value = new_like(key), new_like(value)
    call = key_call(config, problem, layout(grad_out))
    delta, lse, _ = statistics
    described = by_parts(key, value, grad_key, grad_value, query, grad_out)
    call((delta, lse, inputs.key_mask, inputs.rpb), described, (options.scale,))
    return grad_key, grad_value


@lru_cache(maxsize=1024)
def key_call(config: MediumTileConfig, p: Problem, grad_out: Layout) -> Call:
    tiles, out = p.tiles(config.tile, p.key_lengths), contiguous(p.key.shape)
    return call_of(
        medium_dkv_kernel,
        (prod(tiles) * p.kv_heads, p.query.shape[0]),
        (p.mask_strides, p.geometry, p.key_lengths, tiles, both_frames(p), p.group, p.kv_heads),
        [
            *boxes_of_rows(config, p, p.key, p.value, out, out),
            *boxes_of_chunks(config, p, p.query, grad_out),
        ],
        SPEC=spec_of(config, p), CHUNK=config.chunk, PACK=config.chunk_pack, SLICE=config.slice, COLUMNS=config.columns,
        STAGES=config.stages, SIDE=config.side, num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
