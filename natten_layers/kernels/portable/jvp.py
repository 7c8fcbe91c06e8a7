"""The portable kernel of forward-mode derivatives (Jacobian-vector products, jvp), for 1, 2 and 3 axes.

It runs after a forward kernel, with the softmax statistics that this one saved, and walks over keys as that one does.
With scores ``S``, their tangents ``Sdot = scale * (Qdot K + Q Kdot)`` and weights ``P``, the tangents of the results
are::

    mu     = sum P * Sdot + P_sink * sinkdot
    Outdot = (P * Sdot) V + P Vdot - mu * Out
    Lsedot = mu

Both products are added in the same accumulator. Tangents that are missing are None: they are neither loaded nor
computed with.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Plan, launcher
from ..host.problem import (
    Inputs,
    Layout,
    Options,
    Problem,
    SavedResults,
    Tangents,
    in_units,
    new_like,
    register_strides,
    stride_unit,
    strides,
)
from ..host.tiling import register_tile
from ..host.tuned import tile_config_for
from .forward import query_tile
from .primitives import (
    LOG2E,
    add_weighted,
    in_elements,
    load_chunk,
    load_columns,
    masked_product,
    products,
    row_products,
    store_columns,
    subtract_scaled,
    unmasked_columns,
    where_rows,
    zero_columns,
)
from .windows import (
    contiguous_row,
    inner_indices,
    inner_offsets,
    inside_box,
    is_empty,
    next_chunk,
    of_sample,
    packed_sample,
    steps_over,
    token_offset,
    tokens_of,
    union_of_windows,
    windows_of,
)


@triton.jit
def tangent_step(
    b_acc, row_mu, b_s, b_q, b_q_dot, b_k, b_k_dot, b_v, b_v_dot, row_lse, row_reference, factor, scale,
    MOVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of keys ``[N]`` to the accumulators, from masked scores ``b_s [M, N]``.

    Tangents that are missing are None. ``MOVES`` is whether scores have tangents, or tokens a reference.
    """
    b_p = tl.exp2(b_s * factor - row_lse[:, None])
    if b_v_dot is not None:
        b_acc = add_weighted(b_acc, b_p, b_v_dot, PRECISION)
    if MOVES:
        b_s_dot = None
        if b_q_dot is not None:
            b_s_dot = products(b_q_dot, b_k, None, PRECISION)
        if b_k_dot is not None:
            b_s_dot = products(b_q, b_k_dot, b_s_dot, PRECISION)
        b_relative = -row_reference[:, None] if b_s_dot is None else b_s_dot * scale - row_reference[:, None]
        b_p = b_p * b_relative
        row_mu += tl.sum(b_p, 1)
        b_acc = add_weighted(b_acc, b_p, b_v, PRECISION)
    return b_acc, row_mu


@triton.jit
def jvp_kernel(
    Q, K, V, RegK, RegV, Sink, KeyMask, QDot, KDot, VDot, RegKDot, RegVDot, SinkDot,
    Out, RowMax, RowSum, OutDot, LseDot, Tiles,
    q_strides, k_strides, v_strides, regk_strides, regv_strides,
    q_dot_strides, k_dot_strides, v_dot_strides, regk_dot_strides, regv_dot_strides, mask_strides,
    length, kernel, stride, dilation, tiles, group, kv_heads, registers, key_length, sink, scale,
    CAUSAL: tl.constexpr, PERIODIC: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    PACK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    SINK: tl.constexpr, MASK: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
):  # fmt: skip
    """Tangents of the output and of its log-sum-exp of one query tile, contiguous. Names in ``Dot`` are tangents.

    Masked keys are loaded as zeros, so that NaN in them is harmless.
    """
    BM: tl.constexpr = TILE[0] * TILE[1] * TILE[2] * PACK
    q_strides, k_strides, v_strides = (
        in_elements(q_strides, UNIT),
        in_elements(k_strides, UNIT),
        in_elements(v_strides, UNIT),
    )
    q_dot_strides, k_dot_strides, v_dot_strides = (
        in_elements(q_dot_strides, UNIT),
        in_elements(k_dot_strides, UNIT),
        in_elements(v_dot_strides, UNIT),
    )
    regk_strides, regv_strides = in_elements(regk_strides, UNIT), in_elements(regv_strides, UNIT)
    regk_dot_strides, regv_dot_strides = in_elements(regk_dot_strides, UNIT), in_elements(regv_dot_strides, UNIT)
    if SAME_STRIDES:  # offsets of tangents are then those of their tensors, and take no hardware registers of their own
        q_dot_strides, k_dot_strides, v_dot_strides = q_strides, k_strides, v_strides
    i_program = tl.program_id(0)
    if PACKED:
        i_sample, first, i_program, length, kernel, stride, dilation, tiles = packed_sample(
            i_program, Tiles, kv_heads * ((group + PACK - 1) // PACK), length, kernel, stride, dilation, tiles
        )
        Q, q_strides = of_sample(Q, q_strides, first, length, WIDE)
        K, k_strides = of_sample(K, k_strides, first, length, WIDE)
        V, v_strides = of_sample(V, v_strides, first, length, WIDE)
        if QDot is not None:
            QDot, q_dot_strides = of_sample(QDot, q_dot_strides, first, length, WIDE)
        if KDot is not None:
            KDot, k_dot_strides = of_sample(KDot, k_dot_strides, first, length, WIDE)
        if VDot is not None:
            VDot, v_dot_strides = of_sample(VDot, v_dot_strides, first, length, WIDE)
        if MASKED:
            KeyMask, mask_strides = of_sample(KeyMask, mask_strides, first, length, WIDE)
        first *= kv_heads * group
        Out, OutDot = Out + first * DV, OutDot + first * DV
        RowMax, RowSum, LseDot = RowMax + first, RowSum + first, LseDot + first
    i_batch, i_kv, row_head, m_rows, residue, count, origin, index = query_tile(
        i_program, length, dilation, tiles, group, kv_heads, TILE, PACK
    )
    if is_empty(origin, count):
        return
    token = tokens_of(index, residue, count, dilation)
    o_row = contiguous_row(i_batch, token, length) * (kv_heads * group) + row_head
    o_q = token_offset(token, q_strides) + row_head * q_strides[4]
    o_q_dot = token_offset(token, q_dot_strides) + row_head * q_dot_strides[4]
    b_q = load_columns(Q + i_batch * q_strides[0], o_q, m_rows, D, BD)
    b_q_dot = None
    if QDot is not None:
        b_q_dot = load_columns(QDot + i_batch * q_dot_strides[0], o_q_dot, m_rows, D, BD)
    row_sum = tl.load(RowSum + o_row, mask=m_rows, other=1.0)
    row_max = tl.load(RowMax + o_row, mask=m_rows, other=0.0)
    if MASKED:  # rows that see nothing, whose weights are zero for every finite lse
        row_sees = row_sum != 0.0
        row_sum, row_max = tl.where(row_sees, row_sum, 1.0), tl.where(row_sees, row_max, 0.0)
        KeyMask += i_batch * mask_strides[0]
    row_lse = row_max * LOG2E + tl.log2(row_sum)
    K += i_batch * k_strides[0] + i_kv * k_strides[4]
    V += i_batch * v_strides[0] + i_kv * v_strides[4]
    o_k_dot_head = i_batch * k_dot_strides[0] + i_kv * k_dot_strides[4]
    o_v_dot_head = i_batch * v_dot_strides[0] + i_kv * v_dot_strides[4]
    score_scale = scale * LOG2E
    # As in the forward kernel: scores that are scaled before the mask are not scaled again.
    factor = 1.0 if SCALE_FIRST else score_scale

    # The softmax does not change if all scores of a row change by the same amount. So their tangents are taken relative
    # to that of the query with the key at its own place, or on another grid with some key: what all keys have in common
    # would be rounded in products with values, and only then cancel.
    row_reference = tl.zeros([BM], tl.float32)
    ring = count if key_length is None else key_length
    own = tokens_of(index, residue, ring, dilation)
    if QDot is not None:
        b_own = load_columns(K, token_offset(own, k_strides), m_rows, D, BD)
        row_reference += row_products(b_q_dot, b_own) * scale
    if KDot is not None:
        b_own = load_columns(KDot + o_k_dot_head, token_offset(own, k_dot_strides), m_rows, D, BD)
        row_reference += row_products(b_q, b_own) * scale

    if MASKED:
        row_own = tl.load(KeyMask + token_offset(own, mask_strides), mask=m_rows, other=0).to(tl.int1)
        row_reference = tl.where(row_own, row_reference, 0.0)

    b_acc = zero_columns(BM, BDV)
    row_mu = tl.zeros([BM], tl.float32)
    MOVES: tl.constexpr = QDot is not None or KDot is not None
    if MOVES or VDot is not None:
        row_lo, row_hi = windows_of(index, count, kernel, stride, CAUSAL, PERIODIC, key_length)
        lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC, key_length)
        steps = steps_over(lo, hi, CHUNK)
        inner = inner_indices(CHUNK)
        o_k = inner_offsets(inner, dilation, k_strides, RANK, WIDE)
        o_v = inner_offsets(inner, dilation, v_strides, RANK, WIDE)
        o_k_dot = inner_offsets(inner, dilation, k_dot_strides, RANK, WIDE)
        o_v_dot = inner_offsets(inner, dilation, v_dot_strides, RANK, WIDE)
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
                m_keys = m_keys & col_seen
            b_k = load_chunk(
                K, o_k, inner, corner, m_keys, residue, ring, dilation, k_strides, PERIODIC, RANK, WIDE, D, BD
            )
            b_k_dot = None
            if KDot is not None:
                b_k_dot = load_chunk(
                    KDot + o_k_dot_head, o_k_dot, inner, corner, m_keys, residue, ring, dilation, k_dot_strides,
                    PERIODIC, RANK, WIDE, D, BD,
                )  # fmt: skip
            b_v = None
            if MOVES:
                b_v = load_chunk(
                    V, o_v, inner, corner, m_keys, residue, ring, dilation, v_strides, PERIODIC, RANK, WIDE, DV, BDV
                )
            b_v_dot = None
            if VDot is not None:
                b_v_dot = load_chunk(
                    VDot + o_v_dot_head, o_v_dot, inner, corner, m_keys, residue, ring, dilation, v_dot_strides,
                    PERIODIC, RANK, WIDE, DV, BDV,
                )  # fmt: skip
            b_s = masked_product(
                b_q, b_k, row_lo, row_hi, corner, col, inner_lo, inside_hi, score_scale,
                CHUNK, RANK, MASK, SCALE_FIRST, PRECISION,
            )  # fmt: skip
            b_acc, row_mu = tangent_step(
                b_acc, row_mu, b_s, b_q, b_q_dot, b_k, b_k_dot, b_v, b_v_dot, row_lse, row_reference, factor, scale,
                MOVES, PRECISION,
            )  # fmt: skip
            corner = next_chunk(corner, lo, hi, CHUNK, RANK)

    if BR > 0:
        i_image = i_sample.to(tl.int64) if PACKED else i_batch
        RegK += i_image * regk_strides[0] + i_kv * regk_strides[2]
        RegV += i_image * regv_strides[0] + i_kv * regv_strides[2]
        o_regk_dot_head = i_image * regk_dot_strides[0] + i_kv * regk_dot_strides[2]
        o_regv_dot_head = i_image * regv_dot_strides[0] + i_kv * regv_dot_strides[2]
        n = tl.arange(0, BR)
        for start in tl.range(0, registers, BR, num_stages=1):
            m_r = start + n < registers
            o_r = (start + n).to(tl.int64)
            b_k = load_columns(RegK, o_r * regk_strides[1], m_r, D, BD)
            b_v = load_columns(RegV, o_r * regv_strides[1], m_r, DV, BDV)
            b_k_dot = None
            if RegKDot is not None:
                b_k_dot = load_columns(RegKDot + o_regk_dot_head, o_r * regk_dot_strides[1], m_r, D, BD)
            b_v_dot = None
            if RegVDot is not None:
                b_v_dot = load_columns(RegVDot + o_regv_dot_head, o_r * regv_dot_strides[1], m_r, DV, BDV)
            b_s = products(b_q, b_k, None, PRECISION)
            if SCALE_FIRST:
                b_s = b_s * score_scale
            b_s = tl.where(m_r[None, :], b_s, float("-inf"))
            b_acc, row_mu = tangent_step(
                b_acc, row_mu, b_s, b_q, b_q_dot, b_k, b_k_dot, b_v, b_v_dot, row_lse, row_reference, factor, scale,
                MOVES or RegKDot is not None, PRECISION,
            )  # fmt: skip

    if SINK != "none":
        row_sink = tl.load(Sink + row_head).to(tl.float32) if SINK == "tensor" else sink
        row_sink_dot = tl.zeros([BM], tl.float32)
        if SinkDot is not None:
            row_sink_dot = tl.load(SinkDot + row_head).to(tl.float32)
        row_mu += tl.exp2(row_sink * LOG2E - row_lse) * (row_sink_dot - row_reference)

    b_out = load_columns(Out, o_row * DV, m_rows, DV, BDV)
    b_acc = subtract_scaled(b_acc, b_out, row_mu)
    row_mu += row_reference
    if MASKED:
        b_acc, row_mu = where_rows(row_sees, b_acc), tl.where(row_sees, row_mu, 0.0)
    store_columns(OutDot, o_row * DV, m_rows, b_acc, DV, BDV)
    tl.store(LseDot + o_row, row_mu, mask=m_rows)


def plan(p: Problem, tangents: tuple[Layout | None, ...]) -> Plan:
    """The plan of a call with tangents of query, key, value, additional keys and additional values, in this order."""
    config = tile_config_for("jvp", p.problem_class)
    query, key, value, *registers = tangents
    tensor_strides = (
        *p.input_strides(),
        *((0,) * 5 if x is None else p.strides_of(x) for x in (query, key, value)),
        *map(register_strides, registers),
    )
    unit = stride_unit(tensor_strides)
    pairs = zip((query, key, value), (p.query, p.key, p.value), strict=True)
    launch = launcher(
        jvp_kernel,
        (p.programs(config),),
        (
            *in_units(tensor_strides, unit), p.mask_strides, *p.extents(config.tile),
            p.group, p.kv_heads, p.registers, p.key_lengths,
        ),
        **p.program(config, (p.query, p.key, p.value, p.out, query, key, value)), **p.constants(),
        PACK=config.pack, SINK=p.sink, UNIT=unit,
        BR=register_tile(p.problem_class, p.registers, "jvp") if p.registers else 0,
        SAME_STRIDES=all(tangent is None or strides(tangent) == strides(tensor) for tangent, tensor in pairs),
    )  # fmt: skip
    return Plan(config, launch)


def jvp(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, saved: SavedResults, tangents: Tangents
) -> tuple[Tensor, Tensor]:
    """Tangents of ``out [B, *spatial, Hq, Dv]`` and, in fp32, of ``lse [B, *spatial, Hq]``. Allocates only these."""
    out_tangent, lse_tangent = new_like(saved.out), new_like(saved.row_max)
    *readable, _, _ = inputs  # neither shapes nor a bias
    tensors = *readable, *tangents, *saved, out_tangent, lse_tangent
    plan.launch((*tensors, problem.tile_table(plan.config.tile)), (options.sink_value, options.scale))
    return out_tangent, lse_tangent
