"""The portable kernel of dQ and its launcher. It also writes delta and the base-2 log-sum-exp, which ``dkv.py`` reads.

It gathers, as the kernels of ``dkv.py`` do: every element of a gradient is summed by one program in a fixed order,
without atomics. A program walks over keys as the forward kernel does.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from typing import Any, NamedTuple

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
from ..host.tuned import tile_config_for
from .forward import bias_rows, query_tile
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
    row_zeros,
    shows_all,
    store_columns,
    times,
    token_view,
    where_rows,
    without_masked,
    zero_columns,
)
from .windows import (
    bias_offset,
    contiguous_row,
    inner_indices,
    inner_offsets,
    inside_box,
    is_empty,
    next_chunk,
    of_head,
    of_sample,
    packed_sample,
    shifted,
    token_offset,
    tokens_of,
    walk_over_windows,
)


class QueryGradientTensors(NamedTuple):
    """What the kernel reads and writes. Results and statistics are contiguous."""

    query: Any
    key: Any
    value: Any
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
    key_mask: Any
    tiles: Any
    """the table of a packed batch's tiles, or None"""
    rpb: Any


class QueryRows(NamedTuple):
    """What the scores' gradients are made of beside keys and values."""

    b_q: Any
    b_do: Any
    row_lse: Any
    row_delta: Any


@triton.jit
def add_query_gradient(b_dq, b_s, b_k, b_v, rows, factor, PRECISION: tl.constexpr):
    """Add the contribution of keys ``[N]`` to dQ of queries ``[M]``, from masked scores ``b_s [M, N]``.

    The caller multiplies dQ by ``scale`` in the end.
    """
    b_p = tl.exp2(b_s * factor - rows.row_lse[:, None])
    b_dp = products(rows.b_do, b_v, None, PRECISION)
    b_ds = b_p * (b_dp - rows.row_delta[:, None])
    return add_weighted(b_dq, b_ds, b_k, PRECISION)


@triton.jit
def register_query_gradient(b_dq, rows, keys, values, registers, factor, score_scale, SPEC: tl.constexpr):
    """Add the contribution of registers to dQ. Their views are those of image and KV head."""
    BR: tl.constexpr = SPEC.register_tile
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    PRECISION: tl.constexpr = SPEC.precision
    n = tl.arange(0, BR)
    for start in tl.range(0, registers, BR, num_stages=1):
        m_r = start + n < registers
        o_r = (start + n).to(tl.int64)
        b_k = load_columns(keys.pointer, o_r * keys.strides[1], m_r, SPEC.head_dim, BD)
        b_v = load_columns(values.pointer, o_r * values.strides[1], m_r, SPEC.value_dim, BDV)
        b_s = products(rows.b_q, b_k, None, PRECISION)
        if SPEC.scale_first:
            b_s = b_s * score_scale
        b_s = tl.where(m_r[None, :], b_s, float("-inf"))
        b_dq = add_query_gradient(b_dq, b_s, b_k, b_v, rows, factor, PRECISION)
    return b_dq


@triton.jit
def window_query_gradient(
    b_dq, rows, keys, values, key_mask, row_bias, tile, axes, key_length, factor, score_scale,
    SPEC: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the union of the tile's windows to dQ. The arguments are those of ``attend_window``.

    With ``SKIP`` masked keys are zeros, so that NaN in them is harmless. Otherwise they are loaded like all others, as
    loads that wait for the mask cannot be made ahead.
    """
    CHUNK: tl.constexpr = SPEC.chunk
    RANK: tl.constexpr = SPEC.rank
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    PRECISION: tl.constexpr = SPEC.precision
    walk = walk_over_windows(tile, axes, key_length, SPEC)
    lo, hi = walk.union
    inner = inner_indices(CHUNK)
    o_k = inner_offsets(inner, axes.dilation, keys.strides, SPEC)
    o_v = inner_offsets(inner, axes.dilation, values.strides, SPEC)
    if key_mask is not None:
        o_mask = inner_offsets(inner, axes.dilation, key_mask.strides, SPEC)
        unmasked = shows_all(key_mask, walk, SPEC)
    corner = lo
    for _ in tl.range(0, walk.chunks, num_stages=SPEC.stages):
        chunk = Chunk(corner, inner)
        m_keys = inside_box(inner, corner, hi, RANK)
        if SKIP:
            m_keys = m_keys & load_unmasked(key_mask, o_mask, m_keys, chunk, walk.ring, SPEC)
        b_k = load_chunk(keys, o_k, m_keys, chunk, walk.ring, SPEC, SPEC.head_dim, BD)
        b_v = load_chunk(values, o_v, m_keys, chunk, walk.ring, SPEC, SPEC.value_dim, BDV)
        p_bias = None
        if row_bias is not None:
            p_bias = row_bias[:, None] + bias_offset(shifted(inner, corner), axes.kernel)[None, :]
        b_s = masked_product(rows.b_q, b_k, walk.boxes, chunk, walk.inside, score_scale, SPEC, p_bias)
        if key_mask is not None:
            b_s = without_masked(b_s, key_mask, unmasked, o_mask, m_keys, chunk, walk.ring, SPEC)
        b_dq = add_query_gradient(b_dq, b_s, b_k, b_v, rows, factor, PRECISION)
        corner = next_chunk(corner, lo, hi, CHUNK, RANK)
    return b_dq


@triton.jit
def row_deltas(Out, grad_lse, b_do, tile, token, o_row, SPEC: tl.constexpr):
    """``delta = rowsum(dOut * Out) - dLse`` of the rows. ``grad_lse`` is a view, or None."""
    BDV: tl.constexpr = SPEC.value_columns
    b_out = load_columns(Out, o_row * SPEC.value_dim, tile.m_rows, SPEC.value_dim, BDV)
    row_delta = row_products(b_out, b_do)
    if grad_lse is not None:
        o_dl = token_offset(token, grad_lse.strides) + tile.row_head * grad_lse.strides[4]
        p_dl = grad_lse.pointer + tile.i_batch * grad_lse.strides[0]
        row_delta -= tl.load(p_dl + o_dl, mask=tile.m_rows, other=0.0)
    return row_delta


@triton.jit
def query_gradient(
    rows, key, value, reg_keys, reg_values, key_mask, row_bias, tile, axes, registers, key_length, scale,
    SPEC: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """dQ of a tile, from its window and from registers; it is not multiplied by ``scale`` yet.

    Views of registers and of the mask are those of the image and KV head.
    """
    BD: tl.constexpr = SPEC.columns
    score_scale = scale * LOG2E
    # As in the forward kernel: scores that are scaled before the mask are not scaled again.
    factor = 1.0 if SPEC.scale_first else score_scale
    b_dq = zero_columns(SPEC.rows, BD)
    if SPEC.register_tile > 0:
        b_dq = register_query_gradient(b_dq, rows, reg_keys, reg_values, registers, factor, score_scale, SPEC)
    keys, values = of_head(key, tile.i_batch, tile.i_kv), of_head(value, tile.i_batch, tile.i_kv)
    return window_query_gradient(
        b_dq, rows, keys, values, key_mask, row_bias, tile, axes, key_length, factor, score_scale, SPEC, SKIP
    )


@triton.jit
def query_gradient_of_tile(
    i_program, tensors, strides, axes, group, kv_heads, registers, key_length, scale, SPEC: tl.constexpr
):  # fmt: skip
    """dQ, ``delta = rowsum(dOut * Out) - dLse`` and the base-2 log-sum-exp of one query tile.

    ``tensors`` are :class:`QueryGradientTensors`.
    """
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    MASKED: tl.constexpr = tensors.key_mask is not None or tensors.rpb is not None
    Out, RowMax, RowSum = tensors.out, tensors.row_max, tensors.row_sum
    DQ, Delta, Lse = tensors.grad_query, tensors.delta, tensors.lse
    first = None
    if tensors.tiles is not None:
        i_sample, first, i_program, axes = packed_sample(
            i_program, tensors.tiles, kv_heads * ((group + SPEC.pack - 1) // SPEC.pack), axes
        )
        first_row = first * (kv_heads * group)
        Out, DQ = Out + first_row * SPEC.value_dim, DQ + first_row * SPEC.head_dim
        RowMax, RowSum, Delta, Lse = RowMax + first_row, RowSum + first_row, Delta + first_row, Lse + first_row
    query = token_view(tensors.query, strides.query, first, axes, SPEC)
    key = token_view(tensors.key, strides.key, first, axes, SPEC)
    value = token_view(tensors.value, strides.value, first, axes, SPEC)
    grad_out = token_view(tensors.grad_out, strides.grad_out, first, axes, SPEC)
    key_mask, grad_lse = None, None
    if tensors.key_mask is not None:
        key_mask = of_sample(View(tensors.key_mask, strides.key_mask), first, axes, SPEC)
    if tensors.grad_lse is not None:
        grad_lse = of_sample(View(tensors.grad_lse, strides.grad_lse), first, axes, SPEC)
    tile = query_tile(i_program, axes, group, kv_heads, SPEC)
    if is_empty(tile.origin, tile.class_length):
        return
    token = tokens_of(tile.row_index, tile.residue, tile.class_length, axes.dilation)
    o_row = contiguous_row(tile.i_batch, token, axes.length) * (kv_heads * group) + tile.row_head
    b_q = load_queries(query, tile, token, SPEC.head_dim, BD)
    b_do = load_queries(grad_out, tile, token, SPEC.value_dim, BDV)
    row_delta = row_deltas(Out, grad_lse, b_do, tile, token, o_row, SPEC)
    row_lse, row_sees = load_lse(RowMax, RowSum, o_row, tile.m_rows, MASKED)
    if MASKED:
        row_delta = tl.where(row_sees, row_delta, 0.0)
    tl.store(Delta + o_row, row_delta, mask=tile.m_rows)
    tl.store(Lse + o_row, row_lse, mask=tile.m_rows)

    row_bias = bias_rows(tensors.rpb, tile, axes.kernel) if tensors.rpb is not None else None
    reg_keys, reg_values = None, None
    if SPEC.register_tile > 0:
        i_image = i_sample.to(tl.int64) if tensors.tiles is not None else tile.i_batch
        reg_keys = register_view(tensors.additional_keys, strides.additional_keys, i_image, tile.i_kv, SPEC)
        reg_values = register_view(tensors.additional_values, strides.additional_values, i_image, tile.i_kv, SPEC)
    if key_mask is not None:
        key_mask = of_head(key_mask, tile.i_batch, 0)
    rows = QueryRows(b_q, b_do, row_lse, row_delta)
    b_dq = query_gradient(
        rows, key, value, reg_keys, reg_values, key_mask, row_bias, tile, axes, registers, key_length, scale,
        SPEC, False,
    )  # fmt: skip
    if key_mask is not None:  # noqa: SIM102 - the compiler decides this condition, the device the next one
        # NaN or inf in a masked key times a weight of zero: so rare that a slower second pass repairs it. It loads its
        # rows anew, as keeping them would take registers and shared memory from the first.
        if tl.max(tl.where(tl.abs(row_zeros(b_dq)) >= 0.0, 0, 1), 0) > 0:
            SMALL: tl.constexpr = SPEC.in_small_chunks
            b_q = load_queries(query, tile, token, SPEC.head_dim, BD)
            b_do = load_queries(grad_out, tile, token, SPEC.value_dim, BDV)
            rows = QueryRows(b_q, b_do, row_lse, row_delta)
            b_dq = query_gradient(
                rows, key, value, reg_keys, reg_values, key_mask, row_bias, tile, axes, registers, key_length, scale,
                SMALL, True,
            )  # fmt: skip
    if MASKED:
        b_dq = where_rows(row_sees, b_dq)
    store_columns(DQ, o_row * SPEC.head_dim, tile.m_rows, times(b_dq, scale), SPEC.head_dim, BD)


@triton.jit
def backward_query_kernel(
    tensors, strides, axes, group, kv_heads, registers, key_length, scale, SPEC: tl.constexpr
):  # fmt: skip
    """Each program computes one tile. The arguments are those of ``query_gradient_of_tile``."""
    query_gradient_of_tile(
        tl.program_id(0), tensors, strides, axes, group, kv_heads, registers, key_length, scale, SPEC
    )  # fmt: skip


def query_plan(p: Problem, grad_out: Layout, grad_lse: Layout | None) -> Plan:
    config = tile_config_for("backward_query", p.problem_class)
    tensor_strides = *p.input_strides(), p.strides_of(grad_out)
    unit = stride_unit(tensor_strides)
    grad_strides = (0,) * 5 if grad_lse is None else p.strides_of(grad_lse)
    tensors = p.query, p.key, p.value, grad_out, grad_lse, p.out, p.statistics, contiguous(p.query.shape)
    launch = launcher(
        backward_query_kernel,
        (p.programs(config),),
        (
            Strides(*in_units(tensor_strides, unit), grad_lse=grad_strides, key_mask=p.mask_strides),
            Axes(*p.extents(config.tile)), p.group, p.kv_heads, p.registers, p.key_lengths,
        ),
        SPEC=spec_of(p, config, tensors, pack=config.pack, register_tile=p.register_tile, unit=unit),
        **warps_of(config),
    )  # fmt: skip
    return Plan(config, launch)


def backward_query(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, RowStatistics]:
    """dQ, delta and the base-2 log-sum-exp. Allocates only these."""
    grad_query = new_like(inputs.query)
    statistics = RowStatistics(torch.empty_like(cotangents.row_max), torch.empty_like(cotangents.row_max))
    plan.launch((query_tensors(plan, problem, inputs, cotangents, grad_query, statistics),), (options.scale,))
    return grad_query, statistics


def query_tensors(
    plan: Plan, problem: Problem, inputs: Inputs, cotangents: Cotangents, grad_query: Tensor, statistics: RowStatistics
) -> QueryGradientTensors:
    query, key, value, additional_keys, additional_values, _, key_mask, _, rpb = inputs
    out, row_max, row_sum, grad_out, grad_lse = cotangents
    return QueryGradientTensors(
        query, key, value, additional_keys, additional_values, out, grad_out, grad_lse, row_max, row_sum,
        grad_query, statistics.delta, statistics.lse, key_mask, problem.tile_table(plan.config.tile), rpb,
    )  # fmt: skip
