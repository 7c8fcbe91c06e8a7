"""The portable backward kernels and their launchers.

They gather: every element of a gradient is summed by one program in a fixed order, without atomics. The query kernel
walks over keys as the forward kernel does, and also writes delta. A program of the key kernel owns a tile of keys and
walks over the queries that see it, which form intervals too, for one query head of the group after the other; so
grouped heads are not repeated. Registers are seen by all queries: each program of their kernel sums over a slice of the
tokens, and the slices are added in order.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from math import ceil, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Plan, launcher
from ..host.problem import (
    Cotangents,
    Inputs,
    Layout,
    Options,
    Problem,
    RowStatistics,
    contiguous,
    in_units,
    new_like,
    stride_unit,
)
from ..host.tiling import register_block
from ..host.tuned import tile_config_for
from .forward import bias_rows, query_tile
from .primitives import (
    LOG2E,
    add_weighted,
    in_elements,
    load_chunk,
    load_columns,
    masked_product,
    products,
    row_products,
    row_zeros,
    store_columns,
    times,
    unmasked_columns,
    where_rows,
    zero_columns,
)
from .windows import (
    FAR,
    SAMPLE_FIELDS,
    bias_middle,
    bias_offset,
    bias_size,
    clamped,
    contiguous_row,
    contiguous_strides,
    corner_offset,
    inner_indices,
    inner_offsets,
    inside_axes,
    inside_box,
    is_empty,
    next_chunk,
    of_sample,
    on_ring,
    packed_sample,
    queries_of,
    shifted,
    spatial_tile,
    steps_over,
    token_offset,
    tokens_of,
    union_of_queries,
    union_of_windows,
    unravel,
    windows_of,
)


@triton.jit
def key_gradients(
    b_dk, b_dv, b_s, b_q, b_v, b_do, col_lse, col_delta, factor, PRECISION: tl.constexpr
):  # fmt: skip
    """Add the contribution of queries ``[M]`` to dK and dV of keys ``[N]``, from masked scores ``b_s [N, M]``.

    The caller multiplies dK by ``scale`` in the end.
    """
    b_dp = products(b_v, b_do, None, PRECISION)
    b_p = tl.exp2(b_s * factor - col_lse[None, :])
    b_ds = b_p * (b_dp - col_delta[None, :])
    b_dv = add_weighted(b_dv, b_p, b_do, PRECISION)
    return add_weighted(b_dk, b_ds, b_q, PRECISION), b_dv


@triton.jit
def query_gradient(b_dq, b_s, b_k, b_v, b_do, row_lse, row_delta, factor, PRECISION: tl.constexpr):
    """Add the contribution of keys ``[N]`` to dQ of queries ``[M]``, from masked scores ``b_s [M, N]``.

    The caller multiplies dQ by ``scale`` in the end.
    """
    b_p = tl.exp2(b_s * factor - row_lse[:, None])
    b_dp = products(b_do, b_v, None, PRECISION)
    b_ds = b_p * (b_dp - row_delta[:, None])
    return add_weighted(b_dq, b_ds, b_k, PRECISION)


@triton.jit
def register_query_gradient(
    b_dq, b_q, b_do, row_lse, row_delta, RegK, RegV, regk_strides, regv_strides, registers, factor, score_scale,
    BR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of registers to dQ. ``RegK`` and ``RegV`` point at the image and KV head."""
    n = tl.arange(0, BR)
    for start in tl.range(0, registers, BR, num_stages=1):
        m_r = start + n < registers
        o_r = (start + n).to(tl.int64)
        b_k = load_columns(RegK, o_r * regk_strides[1], m_r, D, BD)
        b_v = load_columns(RegV, o_r * regv_strides[1], m_r, DV, BDV)
        b_s = products(b_q, b_k, None, PRECISION)
        if SCALE_FIRST:
            b_s = b_s * score_scale
        b_s = tl.where(m_r[None, :], b_s, float("-inf"))
        b_dq = query_gradient(b_dq, b_s, b_k, b_v, b_do, row_lse, row_delta, factor, PRECISION)
    return b_dq


@triton.jit
def window_query_gradient(
    b_dq, b_q, b_do, row_lse, row_delta, K, V, KeyMask, k_strides, v_strides, mask_strides,
    residue, count, origin, index, kernel, stride, dilation, factor, score_scale,
    CAUSAL: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    MASK: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PERIODIC: tl.constexpr, key_count, MASKED: tl.constexpr, SKIP: tl.constexpr, row_bias=None,
):  # fmt: skip
    """Add the contribution of the union of the tile's windows to dQ. Pointers are those of the image and KV head.

    With ``SKIP`` masked keys are zeros, so that NaN in them is harmless. Otherwise they are loaded like all others, as
    loads that wait for the mask cannot be made ahead.
    """
    row_lo, row_hi = windows_of(index, count, kernel, stride, CAUSAL, PERIODIC, key_count)
    lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC, key_count)
    ring = count if key_count is None else key_count
    steps = steps_over(lo, hi, CHUNK)
    inner = inner_indices(CHUNK)
    o_k = inner_offsets(inner, dilation, k_strides, RANK, WIDE)
    o_v = inner_offsets(inner, dilation, v_strides, RANK, WIDE)
    o_mask = inner_offsets(inner, dilation, mask_strides, RANK, WIDE) if MASKED else None
    corner = lo
    for _ in tl.range(0, steps[0] * steps[1] * steps[2], num_stages=STAGES):
        m_keys = inside_box(inner, corner, hi, RANK)
        col, inside_hi = inner, inner_hi
        if MASKED:
            col_seen, col, inside_hi = unmasked_columns(
                KeyMask, o_mask, inner, corner, m_keys, inner_hi, residue, ring, dilation, mask_strides,
                PERIODIC, RANK, WIDE,
            )  # fmt: skip
            if SKIP:
                m_keys = m_keys & col_seen
        b_k = load_chunk(K, o_k, inner, corner, m_keys, residue, ring, dilation, k_strides, PERIODIC, RANK, WIDE, D, BD)
        b_v = load_chunk(
            V, o_v, inner, corner, m_keys, residue, ring, dilation, v_strides, PERIODIC, RANK, WIDE, DV, BDV
        )
        p_bias = None
        if row_bias is not None:
            p_bias = row_bias[:, None] + bias_offset(shifted(inner, corner), kernel)[None, :]
        b_s = masked_product(
            b_q, b_k, row_lo, row_hi, corner, col, inner_lo, inside_hi, score_scale,
            CHUNK, RANK, MASK, SCALE_FIRST, PRECISION, p_bias,
        )  # fmt: skip
        b_dq = query_gradient(b_dq, b_s, b_k, b_v, b_do, row_lse, row_delta, factor, PRECISION)
        corner = next_chunk(corner, lo, hi, CHUNK, RANK)
    return b_dq


@triton.jit
def backward_query_kernel(
    Q, K, V, RegK, RegV, Out, DOut, DLse, RowMax, RowSum, DQ, Delta, Lse, KeyMask, Tiles, RPB,
    q_strides, k_strides, v_strides, regk_strides, regv_strides, do_strides, dl_strides, mask_strides,
    length, kernel, stride, dilation, tiles, group, kv_heads, registers, key_length, scale,
    CAUSAL: tl.constexpr, PERIODIC: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    PACK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    WITH_DLSE: tl.constexpr, MASK: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dQ, ``delta = rowsum(dOut * Out) - dLse`` and the base-2 log-sum-exp of one query tile, all contiguous."""
    BM: tl.constexpr = TILE[0] * TILE[1] * TILE[2] * PACK
    q_strides, k_strides, v_strides = (
        in_elements(q_strides, UNIT),
        in_elements(k_strides, UNIT),
        in_elements(v_strides, UNIT),
    )
    regk_strides, regv_strides = in_elements(regk_strides, UNIT), in_elements(regv_strides, UNIT)
    do_strides = in_elements(do_strides, UNIT)
    i_program = tl.program_id(0)
    if PACKED:
        i_sample, first, i_program, length, kernel, stride, dilation, tiles = packed_sample(
            i_program, Tiles, kv_heads * ((group + PACK - 1) // PACK), length, kernel, stride, dilation, tiles
        )
        Q, q_strides = of_sample(Q, q_strides, first, length, WIDE)
        K, k_strides = of_sample(K, k_strides, first, length, WIDE)
        V, v_strides = of_sample(V, v_strides, first, length, WIDE)
        DOut, do_strides = of_sample(DOut, do_strides, first, length, WIDE)
        if MASKED:
            KeyMask, mask_strides = of_sample(KeyMask, mask_strides, first, length, WIDE)
        if WITH_DLSE:
            DLse, dl_strides = of_sample(DLse, dl_strides, first, length, WIDE)
        first *= kv_heads * group
        Out, DQ = Out + first * DV, DQ + first * D
        RowMax, RowSum, Delta, Lse = RowMax + first, RowSum + first, Delta + first, Lse + first
    i_batch, i_kv, row_head, m_rows, residue, count, origin, index = query_tile(
        i_program, length, dilation, tiles, group, kv_heads, TILE, PACK
    )
    if is_empty(origin, count):
        return
    token = tokens_of(index, residue, count, dilation)
    o_q = token_offset(token, q_strides) + row_head * q_strides[4]
    o_do = token_offset(token, do_strides) + row_head * do_strides[4]
    o_row = contiguous_row(i_batch, token, length) * (kv_heads * group) + row_head
    b_q = load_columns(Q + i_batch * q_strides[0], o_q, m_rows, D, BD)
    b_do = load_columns(DOut + i_batch * do_strides[0], o_do, m_rows, DV, BDV)
    b_out = load_columns(Out, o_row * DV, m_rows, DV, BDV)
    row_delta = row_products(b_out, b_do)
    if WITH_DLSE:
        o_dl = token_offset(token, dl_strides) + row_head * dl_strides[4]
        row_delta -= tl.load(DLse + i_batch * dl_strides[0] + o_dl, mask=m_rows, other=0.0)
    row_sum = tl.load(RowSum + o_row, mask=m_rows, other=1.0)
    row_max = tl.load(RowMax + o_row, mask=m_rows, other=0.0)
    if MASKED:  # rows that see nothing, whose weights are zero for every finite lse
        row_sees = row_sum != 0.0
        row_sum, row_max = tl.where(row_sees, row_sum, 1.0), tl.where(row_sees, row_max, 0.0)
        row_delta = tl.where(row_sees, row_delta, 0.0)
    row_lse = row_max * LOG2E + tl.log2(row_sum)
    tl.store(Delta + o_row, row_delta, mask=m_rows)
    tl.store(Lse + o_row, row_lse, mask=m_rows)

    score_scale = scale * LOG2E
    # As in the forward kernel: scores that are scaled before the mask are not scaled again.
    factor = 1.0 if SCALE_FIRST else score_scale
    row_bias = bias_rows(RPB, row_head, index, count, kernel) if RPB is not None else None
    b_dq = zero_columns(BM, BD)
    if BR > 0:
        i_image = i_sample.to(tl.int64) if PACKED else i_batch
        RegK += i_image * regk_strides[0] + i_kv * regk_strides[2]
        RegV += i_image * regv_strides[0] + i_kv * regv_strides[2]
        b_dq = register_query_gradient(
            b_dq, b_q, b_do, row_lse, row_delta, RegK, RegV, regk_strides, regv_strides, registers, factor, score_scale,
            BR, D, BD, DV, BDV, SCALE_FIRST, PRECISION,
        )  # fmt: skip
    K += i_batch * k_strides[0] + i_kv * k_strides[4]
    V += i_batch * v_strides[0] + i_kv * v_strides[4]
    if MASKED:
        KeyMask += i_batch * mask_strides[0]
    b_dq = window_query_gradient(
        b_dq, b_q, b_do, row_lse, row_delta, K, V, KeyMask, k_strides, v_strides, mask_strides,
        residue, count, origin, index, kernel, stride, dilation, factor, score_scale,
        CAUSAL, TILE, CHUNK, RANK, WIDE, D, BD, DV, BDV, MASK, SCALE_FIRST, PRECISION, STAGES,
        PERIODIC, key_length, MASKED, False, row_bias,
    )  # fmt: skip
    if MASKED:
        # NaN or inf in a masked key times a weight of zero: so rare that a slower second pass repairs it. It loads its
        # rows anew, as keeping them would take registers and shared memory from the first.
        if tl.max(tl.where(tl.abs(row_zeros(b_dq)) >= 0.0, 0, 1), 0) > 0:
            b_q = load_columns(Q + i_batch * q_strides[0], o_q, m_rows, D, BD)
            b_do = load_columns(DOut + i_batch * do_strides[0], o_do, m_rows, DV, BDV)
            b_dq = zero_columns(BM, BD)
            if BR > 0:
                b_dq = register_query_gradient(
                    b_dq, b_q, b_do, row_lse, row_delta, RegK, RegV, regk_strides, regv_strides, registers, factor,
                    score_scale, BR, D, BD, DV, BDV, SCALE_FIRST, PRECISION,
                )  # fmt: skip
            b_dq = window_query_gradient(
                b_dq, b_q, b_do, row_lse, row_delta, K, V, KeyMask, k_strides, v_strides, mask_strides,
                residue, count, origin, index, kernel, stride, dilation, factor, score_scale,
                CAUSAL, TILE, (1, 1, 16), RANK, WIDE, D, BD, DV, BDV, MASK, SCALE_FIRST, PRECISION, 1,
                PERIODIC, key_length, MASKED, True, row_bias,
            )  # fmt: skip
        b_dq = where_rows(row_sees, b_dq)
    store_columns(DQ, o_row * D, m_rows, times(b_dq, scale), D, BD)


@triton.jit
def backward_key_kernel(
    Q, K, V, DOut, Delta, Lse, DK, DV_, KeyMask, Tiles, RPB,
    q_strides, k_strides, v_strides, do_strides, mask_strides,
    length, kernel, stride, dilation, tiles, group, kv_heads, key_length, scale,
    CAUSAL: tl.constexpr, PERIODIC: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    MASK: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, contiguous. Rows of its matrices are keys; a chunk holds queries, the columns."""
    q_strides, k_strides, v_strides = (
        in_elements(q_strides, UNIT),
        in_elements(k_strides, UNIT),
        in_elements(v_strides, UNIT),
    )
    do_strides = in_elements(do_strides, UNIT)
    i_program = tl.program_id(0)
    if PACKED:
        _, first, i_program, length, kernel, stride, dilation, tiles = packed_sample(
            i_program, Tiles, kv_heads, length, kernel, stride, dilation, tiles
        )
        Q, q_strides = of_sample(Q, q_strides, first, length, WIDE)
        K, k_strides = of_sample(K, k_strides, first, length, WIDE)
        V, v_strides = of_sample(V, v_strides, first, length, WIDE)
        DOut, do_strides = of_sample(DOut, do_strides, first, length, WIDE)
        if MASKED:
            KeyMask, mask_strides = of_sample(KeyMask, mask_strides, first, length, WIDE)
        Delta, Lse = Delta + first * kv_heads * group, Lse + first * kv_heads * group
        DK, DV_ = DK + first * kv_heads * D, DV_ + first * kv_heads * DV
    i_kv = (i_program % kv_heads).to(tl.int64)
    keys = length if key_length is None else key_length
    i_batch, residue, key_count, origin = spatial_tile(i_program // kv_heads, keys, dilation, tiles, TILE)
    if is_empty(origin, key_count):
        return
    key = shifted(inner_indices(TILE), origin)
    m_keys = inside_axes(key, key_count)
    token = tokens_of(key, residue, key_count, dilation)
    # On another grid there is no dilation, so the only residue class is the whole axis.
    count = key_count if key_length is None else length
    o_k = i_batch * k_strides[0] + i_kv * k_strides[4] + token_offset(token, k_strides)
    o_v = i_batch * v_strides[0] + i_kv * v_strides[4] + token_offset(token, v_strides)
    m_loaded = m_keys
    if MASKED:
        p_mask = KeyMask + i_batch * mask_strides[0] + token_offset(token, mask_strides)
        row_seen = tl.load(p_mask, mask=m_keys, other=1).to(tl.int1)
        m_loaded = m_keys & row_seen
    b_k = load_columns(K, o_k, m_loaded, D, BD)
    b_v = load_columns(V, o_v, m_loaded, DV, BDV)
    b_dk = zero_columns(TILE[0] * TILE[1] * TILE[2], BD)
    b_dv = zero_columns(TILE[0] * TILE[1] * TILE[2], BDV)
    score_scale = scale * LOG2E
    factor = 1.0 if SCALE_FIRST else score_scale

    row_lo, row_hi = queries_of(key, count, kernel, stride, CAUSAL, PERIODIC, key_length)
    lo, hi, inner_lo, inner_hi = union_of_queries(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC, key_length)
    steps = steps_over(lo, hi, CHUNK)
    if MASKED:  # no query sees a masked key, so its box is empty, and a tile of such keys has nothing to do
        row_hi = (row_hi[0], row_hi[1], tl.where(row_seen, row_hi[2], row_lo[2] - 1))
        all_seen = tl.min(row_seen.to(tl.int32), 0) > 0
        inner_hi = (inner_hi[0], inner_hi[1], tl.where(all_seen, inner_hi[2], -FAR))
        steps = (steps[0], steps[1], tl.where(tl.max(m_loaded.to(tl.int32), 0) > 0, steps[2], 0))
    inner = inner_indices(CHUNK)
    stat_strides = contiguous_strides(length, kv_heads * group, WIDE)
    o_q = inner_offsets(inner, dilation, q_strides, RANK, WIDE)
    o_do = inner_offsets(inner, dilation, do_strides, RANK, WIDE)
    o_stat = inner_offsets(inner, dilation, stat_strides, RANK, WIDE)
    # For every key, the offset of its bias for a query at the origin.
    row_bias = bias_middle(kernel) + bias_offset(clamped(key, key_count), kernel) if RPB is not None else None
    corner = lo
    i_head = i_kv * group
    steps_per_head = steps[0] * steps[1] * steps[2]
    step = 0
    # A single loop over all heads of the group, so that its software pipeline also loads ahead from head to head.
    for _ in tl.range(0, group * steps_per_head, num_stages=STAGES):
        m_queries = inside_box(inner, corner, hi, RANK)
        p_q = Q + i_batch * q_strides[0] + i_head * q_strides[4]
        p_do = DOut + i_batch * do_strides[0] + i_head * do_strides[4]
        o_head = i_batch * stat_strides[0] + i_head + corner_offset(corner, residue, dilation, stat_strides, RANK, WIDE)
        b_q = load_chunk(
            p_q, o_q, inner, corner, m_queries, residue, count, dilation, q_strides, PERIODIC, RANK, WIDE, D, BD
        )
        b_do = load_chunk(
            p_do, o_do, inner, corner, m_queries, residue, count, dilation, do_strides, PERIODIC, RANK, WIDE, DV, BDV
        )
        o_m = on_ring(o_stat, inner, corner, count, dilation, stat_strides, PERIODIC, RANK, WIDE)
        col_lse = tl.load(Lse + o_head + o_m, mask=m_queries, other=0.0)
        col_delta = tl.load(Delta + o_head + o_m, mask=m_queries, other=0.0)
        p_bias = None
        if RPB is not None:
            o_bias = row_bias[:, None] - bias_offset(shifted(inner, corner), kernel)[None, :]
            p_bias = RPB + i_head * bias_size(kernel) + o_bias
        b_s = masked_product(
            b_k, b_q, row_lo, row_hi, corner, inner, inner_lo, inner_hi, score_scale,
            CHUNK, RANK, MASK, SCALE_FIRST, PRECISION, p_bias,
        )  # fmt: skip
        b_dk, b_dv = key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, col_lse, col_delta, factor, PRECISION)
        corner = next_chunk(corner, lo, hi, CHUNK, RANK)
        step += 1
        ends = step == steps_per_head
        step = tl.where(ends, 0, step)
        i_head += tl.where(ends, 1, 0)
        corner = (tl.where(ends, lo[0], corner[0]), tl.where(ends, lo[1], corner[1]), tl.where(ends, lo[2], corner[2]))

    if MASKED:  # zeros whatever NaN there is in queries and in the gradient of the output
        b_dk, b_dv = where_rows(row_seen, b_dk), where_rows(row_seen, b_dv)
    o_row = contiguous_row(i_batch, token, keys) * kv_heads + i_kv
    store_columns(DK, o_row * D, m_keys, times(b_dk, scale), D, BD)
    store_columns(DV_, o_row * DV, m_keys, b_dv, DV, BDV)


@triton.jit
def backward_register_kernel(
    Q, RegK, RegV, DOut, Delta, Lse, DK, DV_, Samples,
    q_strides, regk_strides, regv_strides, do_strides,
    length, tokens, slices, group, kv_heads, registers, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
    SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dK and dV of ``BR`` registers, summed over one slice of the tokens, into ``[slices, B, R, Hkv, D]`` in fp32."""
    i_program = tl.program_id(0)
    i_slice = i_program % slices
    i_kv = (i_program // slices % kv_heads).to(tl.int64)
    i_batch = (i_program // (slices * kv_heads)).to(tl.int64)
    n = tl.program_id(1) * BR + tl.arange(0, BR)
    m_r = n < registers
    n = n.to(tl.int64)
    RegK += i_batch * regk_strides[0] + i_kv * regk_strides[2]
    RegV += i_batch * regv_strides[0] + i_kv * regv_strides[2]
    b_k = load_columns(RegK, n * regk_strides[1], m_r, D, BD)  # [R, D]
    b_v = load_columns(RegV, n * regv_strides[1], m_r, DV, BDV)
    b_dk = zero_columns(BR, BD)
    b_dv = zero_columns(BR, BDV)
    score_scale = scale * LOG2E
    factor = 1.0 if SCALE_FIRST else score_scale
    i_image, i_first = i_batch, i_batch * tokens
    if PACKED:
        # The batch is one axis of tokens, of which the sample has a part.
        p_sample = Samples + i_batch * SAMPLE_FIELDS
        tokens = tl.load(p_sample + 3) * tl.load(p_sample + 4) * tl.load(p_sample + 5)
        length = (1, 1, tokens)
        i_first = tl.load(p_sample + 2).to(tl.int64)
        Q, DOut = Q + i_first * q_strides[3], DOut + i_first * do_strides[3]
        i_image = tl.zeros_like(i_batch)
    # Rows are (token, head of the group) pairs, which are neighbors in memory.
    rows = tokens * group
    share = tl.cdiv(tl.cdiv(rows, BM), slices) * BM
    for start in tl.range(i_slice * share, tl.minimum((i_slice + 1) * share, rows), BM):
        row = start + tl.arange(0, BM)
        m_rows = row < rows
        row = tl.minimum(row, rows - 1)
        i_head = i_kv * group + row % group
        token = (row // group).to(tl.int64)
        position = unravel(token, length[1], length[2])
        o_q = i_image * q_strides[0] + i_head * q_strides[4] + token_offset(position, q_strides)
        o_do = i_image * do_strides[0] + i_head * do_strides[4] + token_offset(position, do_strides)
        o_row = (i_first + token) * (kv_heads * group) + i_head
        b_q = load_columns(Q, o_q, None, D, BD)
        b_do = load_columns(DOut, o_do, None, DV, BDV)
        col_lse = tl.load(Lse + o_row, mask=m_rows, other=0.0)
        col_delta = tl.load(Delta + o_row, mask=m_rows, other=0.0)
        b_s = products(b_k, b_q, None, PRECISION)  # [R, M]
        if SCALE_FIRST:
            b_s = b_s * score_scale
        b_s = tl.where(m_rows[None, :], b_s, float("-inf"))
        b_dk, b_dv = key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, col_lse, col_delta, factor, PRECISION)
    batches = tl.num_programs(0) // (slices * kv_heads)
    o_r = ((i_slice * batches + i_batch) * registers + n) * kv_heads + i_kv
    store_columns(DK, o_r * D, m_r, times(b_dk, scale), D, BD)
    store_columns(DV_, o_r * DV, m_r, b_dv, DV, BDV)


def query_plan(p: Problem, grad_out: Layout, grad_lse: Layout | None) -> Plan:
    config = tile_config_for("backward_query", p.problem_class)
    unit = stride_unit((*p.input_strides(), p.strides_of(grad_out)))
    grad_strides = (0,) * 5 if grad_lse is None else p.strides_of(grad_lse)
    tensors = p.query, p.key, p.value, grad_out, grad_lse, p.out, p.statistics, contiguous(p.query.shape)
    launch = launcher(
        backward_query_kernel,
        (p.programs(config),),
        (
            *in_units((*p.input_strides(), p.strides_of(grad_out)), unit), grad_strides, p.mask_strides,
            *p.extents(config.tile), p.group, p.kv_heads, p.registers, p.key_lengths,
        ),
        **p.program(config, tensors), **p.constants(),
        PACK=config.pack, BR=p.register_tile, WITH_DLSE=grad_lse is not None, UNIT=unit,
    )  # fmt: skip
    return Plan(config, launch)


def backward_query(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, RowStatistics]:
    """dQ, delta and the base-2 log-sum-exp. Allocates only these."""
    query, key, value, additional_keys, additional_values, _, key_mask, _, rpb = inputs
    out, row_max, row_sum, grad_out, grad_lse = cotangents
    grad_query = new_like(query)
    delta, lse = torch.empty_like(row_max), torch.empty_like(row_max)
    tensors = (
        query, key, value, additional_keys, additional_values, out, grad_out, grad_lse, row_max, row_sum,
        grad_query, delta, lse, key_mask, problem.tile_table(plan.config.tile), rpb,
    )  # fmt: skip
    plan.launch(tensors, (options.scale,))
    return grad_query, RowStatistics(delta, lse)


def key_plan(p: Problem, grad_out: Layout) -> Plan:
    config = tile_config_for("backward_key", p.key_problem_class)
    results = contiguous(p.key.shape), contiguous(p.value.shape)
    tensor_strides = *p.input_strides()[:3], p.strides_of(grad_out)
    unit = stride_unit(tensor_strides)
    launch = launcher(
        backward_key_kernel,
        (p.tile_count_of_keys(config.tile) * p.kv_heads,),
        (
            *in_units(tensor_strides, unit), p.mask_strides, *p.key_extents(config.tile),
            p.group, p.kv_heads, p.key_lengths,
        ),
        **p.program(config, (p.query, p.key, p.value, grad_out, p.statistics, *results)), **p.constants(), UNIT=unit,
    )  # fmt: skip
    return Plan(config, launch)


def backward_key(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor, statistics: RowStatistics
) -> tuple[Tensor, Tensor]:
    """dK and dV of the tokens, without those of registers. Allocates only these."""
    grad_key, grad_value = new_like(inputs.key), new_like(inputs.value)
    delta, lse, _ = statistics
    tensors = *inputs[:3], grad_out, delta, lse, grad_key, grad_value, inputs.key_mask
    plan.launch((*tensors, problem.tile_table(plan.config.tile), inputs.rpb), (options.scale,))
    return grad_key, grad_value


class RegisterTokensConfig(NamedTuple):
    registers: int
    """Registers that a program takes at a time."""
    rows: int
    """Queries that a program takes at a time."""
    slices: int
    """Number of parts of the tokens, whose sums are added in order."""


def register_plan(p: Problem, grad_out: Layout) -> Plan:
    q_strides, _, _, *register_strides = p.input_strides()
    registers, rows = register_block(p.problem_class, p.register_tile)
    # Enough programs to fill a large GPU, each with several blocks of rows. The number depends on shapes alone, so that
    # results do not differ between devices.
    tokens = prod(p.lengths) if p.packing is None else max(p.packing.sizes)
    slices = max(1, min(ceil(512 / (p.samples * p.kv_heads)), tokens * p.group // (4 * rows)))
    lengths, tokens = (p.lengths, tokens) if p.packing is None else ((1, 1, 1), 1)  # the kernel reads each sample's
    launch = launcher(
        backward_register_kernel,
        (p.samples * p.kv_heads * slices, ceil(p.registers / registers)),
        (
            q_strides, *register_strides, p.strides_of(grad_out),
            lengths, tokens, slices, p.group, p.kv_heads, p.registers,
        ),
        **p.constants(), BR=registers, BM=rows, PACKED=p.packing is not None, num_warps=4,
    )  # fmt: skip
    return Plan(RegisterTokensConfig(registers, rows, slices), launch)


def backward_registers(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor, statistics: RowStatistics
) -> tuple[Tensor, Tensor]:
    """dK and dV of the registers.

    Allocates ``slices`` times the size of the registers in fp32 for partial sums, under 1 MiB for usual sizes.
    """
    query, keys, values = inputs.query, inputs.additional_keys, inputs.additional_values
    assert keys is not None
    assert values is not None
    slices = plan.config.slices
    sums_k, sums_v = (torch.empty((slices, *x.shape), dtype=torch.float32, device=x.device) for x in (keys, values))
    delta, lse, _ = statistics
    # The part of the table that this kernel reads is equal for all tiles, and there is one for the dQ kernel's.
    samples = problem.sample_table(tile_config_for("backward_query", problem.problem_class).tile)
    plan.launch((query, keys, values, grad_out, delta, lse, sums_k, sums_v, samples), (options.scale,))
    return sums_k.sum(0).to(keys.dtype), sums_v.sum(0).to(values.dtype)
