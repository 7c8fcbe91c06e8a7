"""The kernels of dQ, and of dK and dV, of fp32 tensors whose products are those of fp16 pairs, and their launchers.

They compute what ``dq.py`` and ``dkv.py`` do without a key mask, and walk as these do. Scores' gradients are multiplied
by a power of two for each row of a tile, so that fp16 holds them: it follows from a bound, which is the sum of a row's
magnitudes times the largest magnitude of the columns, plus ``|delta|``.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import launcher
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
from ..host.tiling import TileConfig
from .dq import QueryRows, register_query_gradient, row_deltas
from .forward import query_tile
from .pair_forward import PairPlan
from .pairs import (
    TINY,
    WEIGHT_EXPONENT,
    WEIGHT_UNIT,
    exponent,
    load_pair,
    pair_layout,
    pair_product,
    pair_spec,
    register_tile,
    rows_to_pair,
    scale_of,
    split_of,
    to_pair,
    transposed,
    unit_of,
)
from .parameters import Axes, Chunk, Corners, ResidueClass, Strides, View, warps_of
from .primitives import (
    LOG2E,
    in_elements,
    load_columns,
    load_lse,
    load_queries,
    register_view,
    store_columns,
    times,
    zero_columns,
)
from .windows import (
    contiguous_row,
    contiguous_strides,
    corner_offset,
    hidden,
    inner_indices,
    inner_offsets,
    inside_axes,
    inside_box,
    is_empty,
    next_chunk,
    next_of_group,
    of_head,
    on_ring,
    queries_of,
    shifted,
    spatial_tile,
    steps_over,
    token_offset,
    tokens_of,
    union_of_queries,
    walk_over_windows,
)


class PairQueryTensors(NamedTuple):
    """What the kernel of dQ reads and writes. Results and statistics are contiguous."""

    query: Any
    key_pair: Any
    value_pair: Any
    units: Any
    additional_keys: Any
    additional_values: Any
    out: Any
    grad_out: Any
    grad_lse: Any
    row_max: Any
    row_sum: Any
    grad_query: Any
    delta: Any
    lse: Any


class PairKeyTensors(NamedTuple):
    """What the kernel of dK and dV reads and writes. Results and statistics are contiguous."""

    query_pair: Any
    key: Any
    value: Any
    grad_out_pair: Any
    units: Any
    delta: Any
    lse: Any
    grad_key: Any
    grad_value: Any


class PairRows(NamedTuple):
    """A tile's rows and how what is computed from them is scaled."""

    b_scored: Any
    """queries or keys, a pair"""
    b_weighed: Any
    """gradients of the output, or values, a pair"""
    row_factor: Any
    """turns products of ``b_scored`` into base-2 logits"""
    row_dp: Any
    """turns products of ``b_weighed`` into gradients of weights, times ``row_scale``"""
    row_scale: Any
    """by which scores' gradients are multiplied"""


@triton.jit
def gradient_exponent(b_weighed, largest, row_delta):
    """Exponent, for each row, of a bound of the scores' gradients. ``largest`` is that of the columns' magnitudes."""
    return exponent(tl.sum(tl.abs(b_weighed), 1) * largest + row_delta)


@triton.jit
def window_query_gradient_in_pairs(rows, row_lse, row_shift, keys, values, tile, axes, SPEC: tl.constexpr):
    """dQ of a tile, to be multiplied by the units of keys and of the rows' scores' gradients."""
    CHUNK: tl.constexpr = SPEC.chunk
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    walk = walk_over_windows(tile, axes, None, SPEC)
    lo, hi = walk.union
    inner = inner_indices(CHUNK)
    o_k = inner_offsets(inner, axes.dilation, keys.strides, SPEC)
    o_v = inner_offsets(inner, axes.dilation, values.strides, SPEC)
    b_dq = zero_columns(SPEC.rows, BD)[0]
    corner = lo
    for _ in tl.range(0, walk.chunks, num_stages=SPEC.stages):
        chunk = Chunk(corner, inner)
        m_keys = inside_box(inner, corner, hi, SPEC.rank)
        b_k = load_pair(keys, o_k, m_keys, chunk, walk.ring, SPEC, SPEC.head_dim, BD)
        b_v = load_pair(values, o_v, m_keys, chunk, walk.ring, SPEC, SPEC.value_dim, BDV)
        b_s = pair_product(
            rows.b_scored, transposed(b_k), hidden(walk.boxes.lo, walk.boxes.hi, corner, inner, SPEC.rank)
        )
        b_p = tl.exp2(b_s * rows.row_factor[:, None] - row_lse[:, None])
        b_dp = pair_product(rows.b_weighed, transposed(b_v), None)
        b_ds = b_p * (b_dp * rows.row_dp[:, None] - row_shift[:, None])
        b_dq = b_dq + pair_product(to_pair(b_ds), b_k, None)
        corner = next_chunk(corner, lo, hi, CHUNK, SPEC.rank)
    return b_dq


@triton.jit
def pair_query_kernel(tensors, strides, pair_strides, axes, group, kv_heads, registers, scale, SPEC: tl.constexpr):
    """dQ, delta and the base-2 log-sum-exp of one query tile. ``tensors`` are :class:`PairQueryTensors`."""
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    UNIT: tl.constexpr = SPEC.unit
    tile = query_tile(tl.program_id(0), axes, group, kv_heads, SPEC)
    if is_empty(tile.origin, tile.class_length):
        return
    query = View(tensors.query, in_elements(strides.query, UNIT))
    grad_out = View(tensors.grad_out, in_elements(strides.grad_out, UNIT))
    key_pair = View(tensors.key_pair, in_elements(pair_strides.key, UNIT))
    value_pair = View(tensors.value_pair, in_elements(pair_strides.value, UNIT))
    token = tokens_of(tile.row_index, tile.residue, tile.class_length, axes.dilation)
    b_q = load_queries(query, tile, token, SPEC.head_dim, BD)
    b_do = load_queries(grad_out, tile, token, SPEC.value_dim, BDV)
    o_row = contiguous_row(tile.i_batch, token, axes.length) * (kv_heads * group) + tile.row_head
    grad_lse = None
    if tensors.grad_lse is not None:
        grad_lse = View(tensors.grad_lse, strides.grad_lse)
    row_delta = row_deltas(tensors.out, grad_lse, b_do, tile, token, o_row, SPEC)
    row_lse, _ = load_lse(tensors.row_max, tensors.row_sum, o_row, tile.m_rows, False)
    tl.store(tensors.delta + o_row, row_delta, mask=tile.m_rows)
    tl.store(tensors.lse + o_row, row_lse, mask=tile.m_rows)

    p_units = tensors.units + (tile.i_batch * kv_heads + tile.i_kv) * 4
    k_unit, v_unit = tl.load(p_units), tl.load(p_units + 1)
    row_e = gradient_exponent(b_do[0], tl.load(p_units + 2), tl.abs(row_delta))
    row_scale = scale_of(row_e)
    b_q_pair, row_q_unit = rows_to_pair(b_q[0])
    b_do_pair, row_do_unit = rows_to_pair(b_do[0])
    row_factor = tl.maximum(row_q_unit * (scale * LOG2E) * k_unit, TINY)
    rows = PairRows(b_q_pair, b_do_pair, row_factor, row_do_unit * row_scale * v_unit, row_scale)
    b_dq = window_query_gradient_in_pairs(
        rows, row_lse, row_delta * row_scale, of_head(key_pair, tile.i_batch, tile.i_kv),
        of_head(value_pair, tile.i_batch, tile.i_kv), tile, axes, SPEC,
    )  # fmt: skip
    b_dq = (b_dq * (unit_of(row_e) * k_unit)[:, None],)
    if SPEC.register_tile > 0:
        reg_keys = register_view(tensors.additional_keys, strides.additional_keys, tile.i_batch, tile.i_kv, SPEC)
        reg_values = register_view(tensors.additional_values, strides.additional_values, tile.i_batch, tile.i_kv, SPEC)
        # Rows are loaded anew, as keeping them would take registers from the walk over the window.
        b_q = load_queries(query, tile, token, SPEC.head_dim, BD)
        b_do = load_queries(grad_out, tile, token, SPEC.value_dim, BDV)
        plain_rows = QueryRows(b_q, b_do, row_lse, row_delta)
        score_scale = scale * LOG2E
        b_dq = register_query_gradient(
            b_dq, plain_rows, reg_keys, reg_values, registers, score_scale, score_scale, SPEC
        )
    store_columns(tensors.grad_query, o_row * SPEC.head_dim, tile.m_rows, times(b_dq, scale), SPEC.head_dim, BD)


@triton.jit
def window_key_gradients_in_pairs(
    rows, boxes, union, query, grad_out, statistics, ring, axes, i_batch, i_kv, group, kv_heads, SPEC: tl.constexpr
):  # fmt: skip
    """dK and dV of a tile of keys; the arguments are like those of ``window_key_gradients``.

    dK is to be multiplied by the units of queries and of the rows' scores' gradients, dV by those of weights and of
    the gradients of the output. ``rows.row_scale`` and ``rows.row_dp`` take the units of weights away.
    """
    CHUNK: tl.constexpr = SPEC.chunk
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    WIDE: tl.constexpr = SPEC.wide
    Lse, Delta = statistics
    lo, hi = union
    b_dk = zero_columns(SPEC.rows, BD)[0]
    b_dv = zero_columns(SPEC.rows, BDV)[0]
    steps = steps_over(lo, hi, CHUNK)
    inner = inner_indices(CHUNK)
    stat_strides = contiguous_strides(axes.length, kv_heads * group, WIDE)
    o_q = inner_offsets(inner, axes.dilation, query.strides, SPEC)
    o_do = inner_offsets(inner, axes.dilation, grad_out.strides, SPEC)
    o_stat = inner_offsets(inner, axes.dilation, stat_strides, SPEC)
    corner = lo
    i_head = i_kv * group
    steps_per_head = steps[0] * steps[1] * steps[2]
    step = 0
    for _ in tl.range(0, group * steps_per_head, num_stages=SPEC.stages):
        chunk = Chunk(corner, inner)
        m_queries = inside_box(inner, corner, hi, SPEC.rank)
        o_head = i_batch * stat_strides[0] + i_head + corner_offset(corner, ring, stat_strides, SPEC)
        b_q = load_pair(of_head(query, i_batch, i_head), o_q, m_queries, chunk, ring, SPEC, SPEC.head_dim, BD)
        b_do = load_pair(of_head(grad_out, i_batch, i_head), o_do, m_queries, chunk, ring, SPEC, SPEC.value_dim, BDV)
        o_m = on_ring(o_stat, chunk, ring, stat_strides, SPEC)
        col_lse = tl.load(Lse + o_head + o_m, mask=m_queries, other=0.0)
        col_delta = tl.load(Delta + o_head + o_m, mask=m_queries, other=0.0)
        b_s = pair_product(rows.b_scored, transposed(b_q), hidden(boxes.lo, boxes.hi, corner, inner, SPEC.rank))
        b_dp = pair_product(rows.b_weighed, transposed(b_do), None)
        b_p = tl.exp2(b_s * rows.row_factor[:, None] - (col_lse - WEIGHT_EXPONENT)[None, :])
        b_ds = b_p * (b_dp * rows.row_dp[:, None] - rows.row_scale[:, None] * col_delta[None, :])
        b_dv = b_dv + pair_product(to_pair(b_p), b_do, None)
        b_dk = b_dk + pair_product(to_pair(b_ds), b_q, None)
        corner, i_head, step = next_of_group(corner, i_head, step, steps_per_head, lo, hi, CHUNK, SPEC.rank)
    return b_dk, b_dv


@triton.jit
def pair_key_kernel(tensors, strides, pair_strides, axes, group, kv_heads, scale, SPEC: tl.constexpr):
    """dK and dV of one tile of keys. ``tensors`` are :class:`PairKeyTensors`."""
    CAUSAL: tl.constexpr = SPEC.causal
    PERIODIC: tl.constexpr = SPEC.periodic
    TILE: tl.constexpr = SPEC.tile
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    UNIT: tl.constexpr = SPEC.unit
    i_kv = (tl.program_id(0) % kv_heads).to(tl.int64)
    i_batch, residue, count, origin = spatial_tile(
        tl.program_id(0) // kv_heads, axes.length, axes.dilation, axes.tiles, TILE
    )
    if is_empty(origin, count):
        return
    query_pair = View(tensors.query_pair, in_elements(pair_strides.query, UNIT))
    grad_out_pair = View(tensors.grad_out_pair, in_elements(pair_strides.grad_out, UNIT))
    key_strides, value_strides = in_elements(strides.key, UNIT), in_elements(strides.value, UNIT)
    index = shifted(inner_indices(TILE), origin)
    m_keys = inside_axes(index, count)
    token = tokens_of(index, residue, count, axes.dilation)
    o_k = i_batch * key_strides[0] + i_kv * key_strides[4] + token_offset(token, key_strides)
    o_v = i_batch * value_strides[0] + i_kv * value_strides[4] + token_offset(token, value_strides)
    b_k = load_columns(tensors.key, o_k, m_keys, SPEC.head_dim, BD)
    b_v = load_columns(tensors.value, o_v, m_keys, SPEC.value_dim, BDV)

    p_units = tensors.units + (i_batch * kv_heads + i_kv) * 4
    q_unit, do_unit = tl.load(p_units), tl.load(p_units + 1)
    row_e = gradient_exponent(b_v[0], tl.load(p_units + 2), tl.load(p_units + 3))
    row_scale = scale_of(row_e) * WEIGHT_UNIT
    b_k_pair, row_k_unit = rows_to_pair(b_k[0])
    b_v_pair, row_v_unit = rows_to_pair(b_v[0])
    row_factor = tl.maximum(row_k_unit * (scale * LOG2E) * q_unit, TINY)
    rows = PairRows(b_k_pair, b_v_pair, row_factor, row_v_unit * row_scale * do_unit, row_scale)
    boxes = queries_of(index, count, axes.kernel, axes.stride, CAUSAL, PERIODIC)
    lo, hi, _, _ = union_of_queries(origin, count, axes.kernel, axes.stride, CAUSAL, TILE, PERIODIC)
    b_dk, b_dv = window_key_gradients_in_pairs(
        rows, Corners(boxes[0], boxes[1]), (lo, hi), query_pair, grad_out_pair, (tensors.lse, tensors.delta),
        ResidueClass(residue, count, axes.dilation), axes, i_batch, i_kv, group, kv_heads, SPEC,
    )  # fmt: skip
    b_dk = b_dk * (unit_of(row_e) * (scale * q_unit))[:, None]
    b_dv = b_dv * (do_unit * WEIGHT_UNIT)
    o_row = contiguous_row(i_batch, token, axes.length) * kv_heads + i_kv
    store_columns(tensors.grad_key, o_row * SPEC.head_dim, m_keys, (b_dk,), SPEC.head_dim, BD)
    store_columns(tensors.grad_value, o_row * SPEC.value_dim, m_keys, (b_dv,), SPEC.value_dim, BDV)


def query_plan(p: Problem, config: TileConfig, grad_out: Layout, grad_lse: Layout | None) -> PairPlan:
    tensor_strides = *p.input_strides(), p.strides_of(grad_out)
    key_pair, value_pair = pair_layout(p.key), pair_layout(p.value)
    pair_strides = p.strides_of(key_pair), p.strides_of(value_pair)
    unit = stride_unit((*tensor_strides, *pair_strides))
    grad_strides = (0,) * 5 if grad_lse is None else p.strides_of(grad_lse)
    tensors = p.query, grad_out, grad_lse, p.out, p.statistics, contiguous(p.query.shape), key_pair, value_pair
    launch = launcher(
        pair_query_kernel,
        (p.programs(config),),
        (
            Strides(*in_units(tensor_strides, unit), grad_lse=grad_strides),
            Strides(None, *in_units(pair_strides, unit)),
            Axes(*p.extents(config.tile)), p.group, p.kv_heads, p.registers,
        ),
        SPEC=pair_spec(p, config, tensors, pack=config.pack, register_tile=register_tile(p), unit=unit),
        **warps_of(config),
    )  # fmt: skip
    return PairPlan(config, launch, split_of(p, p.key, p.value))


def query_gradient(
    plan: PairPlan, problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, RowStatistics]:
    """dQ, delta and the base-2 log-sum-exp. Allocates copies of keys and values beside these."""
    out, row_max, row_sum, grad_out, grad_lse = cotangents
    key_pair, value_pair, units = plan.split(problem, inputs.key, inputs.value)
    grad_query = new_like(inputs.query)
    delta, lse = torch.empty_like(row_max), torch.empty_like(row_max)
    tensors = PairQueryTensors(
        inputs.query, key_pair, value_pair, units, inputs.additional_keys, inputs.additional_values, out, grad_out,
        grad_lse, row_max, row_sum, grad_query, delta, lse,
    )  # fmt: skip
    plan.launch((tensors,), (options.scale,))
    return grad_query, RowStatistics(delta, lse)


def key_plan(p: Problem, config: TileConfig, grad_out: Layout) -> PairPlan:
    tensor_strides = p.strides_of(p.key), p.strides_of(p.value)
    query_pair, grad_out_pair = pair_layout(p.query), pair_layout(grad_out)
    pair_strides = p.strides_of(query_pair), p.strides_of(grad_out_pair)
    unit = stride_unit((*tensor_strides, *pair_strides))
    k_strides, v_strides, q_strides, do_strides = in_units((*tensor_strides, *pair_strides), unit)
    tensors = (
        p.key,
        p.value,
        p.statistics,
        query_pair,
        grad_out_pair,
        contiguous(p.key.shape),
        contiguous(p.value.shape),
    )
    launch = launcher(
        pair_key_kernel,
        (p.tile_count_of_keys(config.tile) * p.kv_heads,),
        (
            Strides(None, k_strides, v_strides), Strides(q_strides, grad_out=do_strides),
            Axes(*p.extents(config.tile)), p.group, p.kv_heads,
        ),
        SPEC=pair_spec(p, config, tensors, unit=unit),
        **warps_of(config),
    )  # fmt: skip
    return PairPlan(config, launch, split_of(p, p.query, grad_out, with_delta=True))


def key_gradients(
    plan: PairPlan, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor, statistics: RowStatistics
) -> tuple[Tensor, Tensor]:
    """dK and dV. Allocates copies of queries and of the gradients of the output beside these."""
    delta, lse, _ = statistics
    query_pair, grad_out_pair, units = plan.split(problem, inputs.query, grad_out, delta)
    grad_key, grad_value = new_like(inputs.key), new_like(inputs.value)
    tensors = PairKeyTensors(
        query_pair, inputs.key, inputs.value, grad_out_pair, units, delta, lse, grad_key, grad_value
    )
    plan.launch((tensors,), (options.scale,))
    return grad_key, grad_value
