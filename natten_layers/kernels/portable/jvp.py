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
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from typing import Any, NamedTuple

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
from .parameters import Axes, Chunk, Strides, View, spec_of, warps_of
from .primitives import (
    LOG2E,
    add_weighted,
    load_chunk,
    load_columns,
    load_lse,
    load_queries,
    load_unmasked,
    masked_product,
    products,
    register_view,
    row_products,
    store_columns,
    subtract_scaled,
    token_view,
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
    of_head,
    of_sample,
    packed_sample,
    token_offset,
    tokens_of,
    walk_over_windows,
)


class JvpTensors(NamedTuple):
    """What the kernel reads and writes. Names in ``dot`` are tangents, or None. All but inputs are contiguous."""

    query: Any
    key: Any
    value: Any
    additional_keys: Any
    additional_values: Any
    sink: Any
    key_mask: Any
    query_dot: Any
    key_dot: Any
    value_dot: Any
    additional_keys_dot: Any
    additional_values_dot: Any
    sink_dot: Any
    out: Any
    row_max: Any
    row_sum: Any
    out_dot: Any
    lse_dot: Any
    tiles: Any
    """the table of a packed batch's tiles, or None"""


class TangentRows(NamedTuple):
    """What belongs to the queries of a tile."""

    b_q: Any
    b_q_dot: Any
    row_lse: Any
    row_reference: Any
    """what ``reference_tangent`` returns"""


@triton.jit
def tangent_step(
    b_acc, row_mu, b_s, rows, b_k, b_k_dot, b_v, b_v_dot, factor, scale, MOVES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add the contribution of keys ``[N]`` to the accumulators, from masked scores ``b_s [M, N]``.

    Tangents that are missing are None. ``MOVES`` is whether scores have tangents, or tokens a reference.
    """
    b_p = tl.exp2(b_s * factor - rows.row_lse[:, None])
    if b_v_dot is not None:
        b_acc = add_weighted(b_acc, b_p, b_v_dot, PRECISION)
    if MOVES:
        row_reference = rows.row_reference
        b_s_dot = None
        if rows.b_q_dot is not None:
            b_s_dot = products(rows.b_q_dot, b_k, None, PRECISION)
        if b_k_dot is not None:
            b_s_dot = products(rows.b_q, b_k_dot, b_s_dot, PRECISION)
        b_relative = -row_reference[:, None] if b_s_dot is None else b_s_dot * scale - row_reference[:, None]
        b_p = b_p * b_relative
        row_mu += tl.sum(b_p, 1)
        b_acc = add_weighted(b_acc, b_p, b_v, PRECISION)
    return b_acc, row_mu


@triton.jit
def add_window_tangents(
    b_acc, row_mu, rows, keys, values, key_dots, value_dots, key_mask, tile, axes, key_length, scale, SPEC: tl.constexpr
):  # fmt: skip
    """Add the contribution of the union of the tile's windows. Views are those of the image and KV head, or None."""
    CHUNK: tl.constexpr = SPEC.chunk
    RANK: tl.constexpr = SPEC.rank
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    PRECISION: tl.constexpr = SPEC.precision
    MOVES: tl.constexpr = rows.b_q_dot is not None or key_dots is not None
    score_scale = scale * LOG2E
    factor = 1.0 if SPEC.scale_first else score_scale
    walk = walk_over_windows(tile, axes, key_length, SPEC)
    lo, hi = walk.union
    inner = inner_indices(CHUNK)
    o_k = inner_offsets(inner, axes.dilation, keys.strides, SPEC)
    o_v = inner_offsets(inner, axes.dilation, values.strides, SPEC)
    o_k_dot = inner_offsets(inner, axes.dilation, key_dots.strides, SPEC) if key_dots is not None else None
    o_v_dot = inner_offsets(inner, axes.dilation, value_dots.strides, SPEC) if value_dots is not None else None
    o_mask = inner_offsets(inner, axes.dilation, key_mask.strides, SPEC) if key_mask is not None else None
    corner = lo
    for _ in tl.range(0, walk.chunks, num_stages=SPEC.stages):
        chunk = Chunk(corner, inner)
        m_keys = inside_box(inner, corner, hi, RANK)
        if key_mask is not None:
            m_keys = m_keys & load_unmasked(key_mask, o_mask, m_keys, chunk, walk.ring, SPEC)
        b_k = load_chunk(keys, o_k, m_keys, chunk, walk.ring, SPEC, SPEC.head_dim, BD)
        b_k_dot = None
        if key_dots is not None:
            b_k_dot = load_chunk(key_dots, o_k_dot, m_keys, chunk, walk.ring, SPEC, SPEC.head_dim, BD)
        b_v = None
        if MOVES:
            b_v = load_chunk(values, o_v, m_keys, chunk, walk.ring, SPEC, SPEC.value_dim, BDV)
        b_v_dot = None
        if value_dots is not None:
            b_v_dot = load_chunk(value_dots, o_v_dot, m_keys, chunk, walk.ring, SPEC, SPEC.value_dim, BDV)
        b_s = masked_product(rows.b_q, b_k, walk.boxes, chunk, walk.inside, score_scale, SPEC)
        if key_mask is not None:
            b_s = tl.where(m_keys[None, :], b_s, float("-inf"))
        b_acc, row_mu = tangent_step(
            b_acc, row_mu, b_s, rows, b_k, b_k_dot, b_v, b_v_dot, factor, scale, MOVES, PRECISION
        )
        corner = next_chunk(corner, lo, hi, CHUNK, RANK)
    return b_acc, row_mu


@triton.jit
def add_register_tangents(
    b_acc, row_mu, rows, tensors, strides, dot_strides, i_image, i_kv, registers, scale,
    SPEC: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the registers. ``MOVES`` is whether queries or keys have tangents."""
    keys = register_view(tensors.additional_keys, strides.additional_keys, i_image, i_kv, SPEC)
    values = register_view(tensors.additional_values, strides.additional_values, i_image, i_kv, SPEC)
    key_dots, value_dots = None, None
    if tensors.additional_keys_dot is not None:
        key_dots = register_view(tensors.additional_keys_dot, dot_strides.additional_keys, i_image, i_kv, SPEC)
    if tensors.additional_values_dot is not None:
        value_dots = register_view(tensors.additional_values_dot, dot_strides.additional_values, i_image, i_kv, SPEC)
    BR: tl.constexpr = SPEC.register_tile
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    PRECISION: tl.constexpr = SPEC.precision
    score_scale = scale * LOG2E
    factor = 1.0 if SPEC.scale_first else score_scale
    n = tl.arange(0, BR)
    for start in tl.range(0, registers, BR, num_stages=1):
        m_r = start + n < registers
        o_r = (start + n).to(tl.int64)
        b_k = load_columns(keys.pointer, o_r * keys.strides[1], m_r, SPEC.head_dim, BD)
        b_v = load_columns(values.pointer, o_r * values.strides[1], m_r, SPEC.value_dim, BDV)
        b_k_dot = None
        if key_dots is not None:
            b_k_dot = load_columns(key_dots.pointer, o_r * key_dots.strides[1], m_r, SPEC.head_dim, BD)
        b_v_dot = None
        if value_dots is not None:
            b_v_dot = load_columns(value_dots.pointer, o_r * value_dots.strides[1], m_r, SPEC.value_dim, BDV)
        b_s = products(rows.b_q, b_k, None, PRECISION)
        if SPEC.scale_first:
            b_s = b_s * score_scale
        b_s = tl.where(m_r[None, :], b_s, float("-inf"))
        b_acc, row_mu = tangent_step(
            b_acc, row_mu, b_s, rows, b_k, b_k_dot, b_v, b_v_dot, factor, scale, MOVES or key_dots is not None,
            PRECISION,
        )  # fmt: skip
    return b_acc, row_mu


@triton.jit
def reference_tangent(b_q, b_q_dot, keys, key_dots, key_mask, tile, axes, key_length, scale, SPEC: tl.constexpr):
    """The tangent that the tangents of a row's scores are taken relative to.

    The softmax does not change if all scores of a row change by the same amount. What all keys have in common would be
    rounded in products with values, and only then cancel. So the reference is the tangent of the query's score with the
    key at its own place, or on another grid with some key.
    """
    BM: tl.constexpr = SPEC.rows
    BD: tl.constexpr = SPEC.columns
    m_rows = tile.m_rows
    row_reference = tl.zeros([BM], tl.float32)
    key_count = tile.class_length if key_length is None else key_length
    own = tokens_of(tile.row_index, tile.residue, key_count, axes.dilation)
    if b_q_dot is not None:
        b_own = load_columns(keys.pointer, token_offset(own, keys.strides), m_rows, SPEC.head_dim, BD)
        row_reference += row_products(b_q_dot, b_own) * scale
    if key_dots is not None:
        b_own = load_columns(key_dots.pointer, token_offset(own, key_dots.strides), m_rows, SPEC.head_dim, BD)
        row_reference += row_products(b_q, b_own) * scale
    if key_mask is not None:
        row_own = tl.load(key_mask.pointer + token_offset(own, key_mask.strides), mask=m_rows, other=0).to(tl.int1)
        row_reference = tl.where(row_own, row_reference, 0.0)
    return row_reference


@triton.jit
def sink_tangent(Sink, SinkDot, sink, row_head, rows):
    """What the sink adds to ``mu``. It is a logit per head (``Sink``), or else one for all heads (``sink``), whose
    tangent is zero, as it is without ``SinkDot``.
    """
    row_sink = tl.load(Sink + row_head).to(tl.float32) if Sink is not None else sink
    row_sink_dot = tl.load(SinkDot + row_head).to(tl.float32) if SinkDot is not None else 0.0
    return tl.exp2(row_sink * LOG2E - rows.row_lse) * (row_sink_dot - rows.row_reference)


@triton.jit
def jvp_kernel(
    tensors, strides, dot_strides, axes, group, kv_heads, registers, key_length, sink, scale,
    SPEC: tl.constexpr, SAME_STRIDES: tl.constexpr,
):  # fmt: skip
    """Tangents of the output and of its log-sum-exp of one query tile, contiguous. ``tensors`` are :class:`JvpTensors`.

    ``dot_strides`` are those of tangents. Masked keys are loaded as zeros, so that NaN in them is harmless.
    """
    BM: tl.constexpr = SPEC.rows
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    DV: tl.constexpr = SPEC.value_dim
    MOVES: tl.constexpr = tensors.query_dot is not None or tensors.key_dot is not None
    MASKED: tl.constexpr = tensors.key_mask is not None
    Out, RowMax, RowSum = tensors.out, tensors.row_max, tensors.row_sum
    OutDot, LseDot = tensors.out_dot, tensors.lse_dot
    i_program, first = tl.program_id(0), None
    if tensors.tiles is not None:
        i_sample, first, i_program, axes = packed_sample(
            i_program, tensors.tiles, kv_heads * ((group + SPEC.pack - 1) // SPEC.pack), axes
        )
        first_row = first * (kv_heads * group)
        Out, OutDot = Out + first_row * DV, OutDot + first_row * DV
        RowMax, RowSum, LseDot = RowMax + first_row, RowSum + first_row, LseDot + first_row
    query = token_view(tensors.query, strides.query, first, axes, SPEC)
    key = token_view(tensors.key, strides.key, first, axes, SPEC)
    value = token_view(tensors.value, strides.value, first, axes, SPEC)
    query_dot, key_dot, value_dot, key_mask = None, None, None, None
    # With equal strides, offsets of tangents are those of their tensors, and take no hardware registers of their own.
    token_strides = strides if SAME_STRIDES else dot_strides
    if tensors.query_dot is not None:
        query_dot = token_view(tensors.query_dot, token_strides.query, first, axes, SPEC)
    if tensors.key_dot is not None:
        key_dot = token_view(tensors.key_dot, token_strides.key, first, axes, SPEC)
    if tensors.value_dot is not None:
        value_dot = token_view(tensors.value_dot, token_strides.value, first, axes, SPEC)
    if tensors.key_mask is not None:
        key_mask = of_sample(View(tensors.key_mask, strides.key_mask), first, axes, SPEC)
    tile = query_tile(i_program, axes, group, kv_heads, SPEC)
    if is_empty(tile.origin, tile.class_length):
        return
    i_batch, i_kv, m_rows, row_head = tile.i_batch, tile.i_kv, tile.m_rows, tile.row_head
    token = tokens_of(tile.row_index, tile.residue, tile.class_length, axes.dilation)
    o_row = contiguous_row(i_batch, token, axes.length) * (kv_heads * group) + row_head
    b_q = load_queries(query, tile, token, SPEC.head_dim, BD)
    b_q_dot = None
    if query_dot is not None:
        b_q_dot = load_queries(query_dot, tile, token, SPEC.head_dim, BD)
    row_lse, row_sees = load_lse(RowMax, RowSum, o_row, m_rows, MASKED)
    keys, values = of_head(key, i_batch, i_kv), of_head(value, i_batch, i_kv)
    if key_dot is not None:
        key_dot = of_head(key_dot, i_batch, i_kv)
    if value_dot is not None:
        value_dot = of_head(value_dot, i_batch, i_kv)
    if key_mask is not None:
        key_mask = of_head(key_mask, i_batch, 0)

    row_reference = reference_tangent(b_q, b_q_dot, keys, key_dot, key_mask, tile, axes, key_length, scale, SPEC)
    rows = TangentRows(b_q, b_q_dot, row_lse, row_reference)
    b_acc = zero_columns(BM, BDV)
    row_mu = tl.zeros([BM], tl.float32)
    if MOVES or value_dot is not None:
        b_acc, row_mu = add_window_tangents(
            b_acc, row_mu, rows, keys, values, key_dot, value_dot, key_mask, tile, axes, key_length, scale, SPEC
        )
    if SPEC.register_tile > 0:
        i_image = i_sample.to(tl.int64) if tensors.tiles is not None else i_batch
        b_acc, row_mu = add_register_tangents(
            b_acc, row_mu, rows, tensors, strides, dot_strides, i_image, i_kv, registers, scale, SPEC, MOVES
        )
    if tensors.sink is not None or sink is not None:
        row_mu += sink_tangent(tensors.sink, tensors.sink_dot, sink, row_head, rows)

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
    steps = in_units(tensor_strides, unit)
    pairs = zip((query, key, value), (p.query, p.key, p.value), strict=True)
    launch = launcher(
        jvp_kernel,
        (p.programs(config),),
        (
            Strides(*steps[:5], key_mask=p.mask_strides), Strides(*steps[5:]), Axes(*p.extents(config.tile)),
            p.group, p.kv_heads, p.registers, p.key_lengths,
        ),
        SPEC=spec_of(
            p, config, (p.query, p.key, p.value, p.out, query, key, value), pack=config.pack, unit=unit,
            register_tile=register_tile(p.problem_class, p.registers, "jvp") if p.registers else 0,
        ),
        **warps_of(config),
        SAME_STRIDES=all(tangent is None or strides(tangent) == strides(tensor) for tangent, tensor in pairs),
    )  # fmt: skip
    return Plan(config, launch)


def jvp(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, saved: SavedResults, tangents: Tangents
) -> tuple[Tensor, Tensor]:
    """Tangents of ``out [B, *spatial, Hq, Dv]`` and, in fp32, of ``lse [B, *spatial, Hq]``. Allocates only these."""
    out_tangent, lse_tangent = new_like(saved.out), new_like(saved.row_max)
    tensors = JvpTensors(
        *inputs.addressed, inputs.sink, inputs.key_mask, *tangents, *saved, out_tangent, lse_tangent,
        problem.tile_table(plan.config.tile),
    )  # fmt: skip
    plan.launch((tensors,), (options.sink_value, options.scale))
    return out_tangent, lse_tangent
