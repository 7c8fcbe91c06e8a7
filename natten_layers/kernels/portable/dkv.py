"""The portable kernels of dK and dV, of keys and of registers, and their launchers.

They gather: every element of a gradient is summed by one program in a fixed order, without atomics. A program of the
key kernel owns a tile of keys and walks over the queries that see it, which form intervals too, for one query head of
the group after the other; so grouped heads are not repeated. Registers are seen by all queries: each program of their
kernel sums over a slice of the tokens, and the slices are added in order. Both read what ``dq.py`` writes: delta and
the base-2 log-sum-exp of every row.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false

from math import ceil, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Plan, launcher
from ..host.problem import (
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
from .parameters import Axes, Chunk, Corners, ResidueClass, Spec, Strides, View, head_fields, spec_of, warps_of
from .primitives import (
    LOG2E,
    add_weighted,
    in_elements,
    load_chunk,
    load_columns,
    masked_product,
    products,
    register_view,
    store_columns,
    times,
    token_view,
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
    next_of_group,
    of_head,
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
    unravel,
)


class KeyGradientTensors(NamedTuple):
    """What the kernel of keys reads and writes. Results and statistics are contiguous."""

    query: Any
    key: Any
    value: Any
    grad_out: Any
    delta: Any
    lse: Any
    grad_key: Any
    grad_value: Any
    key_mask: Any
    tiles: Any
    """the table of a packed batch's tiles, or None"""
    rpb: Any


class RegisterGradientTensors(NamedTuple):
    """What the kernel of registers reads and writes. The gradients are ``[slices, B, R, Hkv, D]`` in fp32."""

    query: Any
    additional_keys: Any
    additional_values: Any
    grad_out: Any
    delta: Any
    lse: Any
    grad_keys: Any
    grad_values: Any
    samples: Any
    """the table of a packed batch's samples, or None"""


class KeyTile(NamedTuple):
    """Keys and values of a program, their gradients so far, and which queries see them."""

    b_k: Any
    b_v: Any
    boxes: Any
    """:class:`Corners` of the queries that see each key"""
    union: Any
    """:class:`Corners` of the queries that see some key"""
    inside: Any
    """:class:`Corners` of the queries that see all keys"""
    row_bias: Any
    """for every key, the offset of its bias for a query at the origin, or None"""


@triton.jit
def add_key_gradients(
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
def window_key_gradients(
    tile, query, grad_out, statistics, RPB, steps, ring, axes, i_batch, i_kv, group, kv_heads, factor, score_scale,
    SPEC: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, from the queries that see it. dK is not multiplied by ``scale`` yet.

    ``statistics`` are the pointers to the log-sum-exp and to delta. ``ring`` is the residue class of the queries, and
    ``steps`` how many chunks of them there are on each axis.
    """
    CHUNK: tl.constexpr = SPEC.chunk
    TILE: tl.constexpr = SPEC.tile
    RANK: tl.constexpr = SPEC.rank
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    PRECISION: tl.constexpr = SPEC.precision
    WIDE: tl.constexpr = SPEC.wide
    Lse, Delta = statistics
    lo, hi = tile.union
    b_dk = zero_columns(TILE[0] * TILE[1] * TILE[2], BD)
    b_dv = zero_columns(TILE[0] * TILE[1] * TILE[2], BDV)
    inner = inner_indices(CHUNK)
    stat_strides = contiguous_strides(axes.length, kv_heads * group, WIDE)
    o_q = inner_offsets(inner, axes.dilation, query.strides, SPEC)
    o_do = inner_offsets(inner, axes.dilation, grad_out.strides, SPEC)
    o_stat = inner_offsets(inner, axes.dilation, stat_strides, SPEC)
    corner = lo
    i_head = i_kv * group
    steps_per_head = steps[0] * steps[1] * steps[2]
    step = 0
    # A single loop over all heads of the group, so that its software pipeline also loads ahead from head to head.
    for _ in tl.range(0, group * steps_per_head, num_stages=SPEC.stages):
        chunk = Chunk(corner, inner)
        m_queries = inside_box(inner, corner, hi, RANK)
        o_head = i_batch * stat_strides[0] + i_head + corner_offset(corner, ring, stat_strides, SPEC)
        b_q = load_chunk(of_head(query, i_batch, i_head), o_q, m_queries, chunk, ring, SPEC, SPEC.head_dim, BD)
        b_do = load_chunk(of_head(grad_out, i_batch, i_head), o_do, m_queries, chunk, ring, SPEC, SPEC.value_dim, BDV)
        o_m = on_ring(o_stat, chunk, ring, stat_strides, SPEC)
        col_lse = tl.load(Lse + o_head + o_m, mask=m_queries, other=0.0)
        col_delta = tl.load(Delta + o_head + o_m, mask=m_queries, other=0.0)
        p_bias = None
        if RPB is not None:
            o_bias = tile.row_bias[:, None] - bias_offset(shifted(inner, corner), axes.kernel)[None, :]
            p_bias = RPB + i_head * bias_size(axes.kernel) + o_bias
        b_s = masked_product(tile.b_k, b_q, tile.boxes, chunk, tile.inside, score_scale, SPEC, p_bias)
        b_dk, b_dv = add_key_gradients(b_dk, b_dv, b_s, b_q, tile.b_v, b_do, col_lse, col_delta, factor, PRECISION)
        corner, i_head, step = next_of_group(corner, i_head, step, steps_per_head, lo, hi, CHUNK, RANK)
    return b_dk, b_dv


@triton.jit
def key_gradients_of_tile(
    i_program, tensors, strides, axes, group, kv_heads, key_length, scale, SPEC: tl.constexpr
):  # fmt: skip
    """dK and dV of one tile of keys. Rows of its matrices are keys; a chunk holds queries, the columns.

    ``tensors`` are :class:`KeyGradientTensors`, and ``axes.tiles`` counts tiles of keys.
    """
    CAUSAL: tl.constexpr = SPEC.causal
    PERIODIC: tl.constexpr = SPEC.periodic
    TILE: tl.constexpr = SPEC.tile
    CHUNK: tl.constexpr = SPEC.chunk
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    Delta, Lse, DK, DV = tensors.delta, tensors.lse, tensors.grad_key, tensors.grad_value
    first = None
    if tensors.tiles is not None:
        _, first, i_program, axes = packed_sample(i_program, tensors.tiles, kv_heads, axes)
        Delta, Lse = Delta + first * kv_heads * group, Lse + first * kv_heads * group
        DK, DV = DK + first * kv_heads * SPEC.head_dim, DV + first * kv_heads * SPEC.value_dim
    query = token_view(tensors.query, strides.query, first, axes, SPEC)
    key = token_view(tensors.key, strides.key, first, axes, SPEC)
    value = token_view(tensors.value, strides.value, first, axes, SPEC)
    grad_out = token_view(tensors.grad_out, strides.grad_out, first, axes, SPEC)
    if tensors.key_mask is not None:
        key_mask = of_sample(View(tensors.key_mask, strides.key_mask), first, axes, SPEC)
    kernel, stride, dilation = axes.kernel, axes.stride, axes.dilation
    i_kv = (i_program % kv_heads).to(tl.int64)
    lengths = axes.length if key_length is None else key_length
    i_batch, residue, key_count, origin = spatial_tile(i_program // kv_heads, lengths, dilation, axes.tiles, TILE)
    if is_empty(origin, key_count):
        return
    index = shifted(inner_indices(TILE), origin)
    m_keys = inside_axes(index, key_count)
    token = tokens_of(index, residue, key_count, dilation)
    # On another grid there is no dilation, so the only residue class is the whole axis.
    count = key_count if key_length is None else axes.length
    o_k = i_batch * key.strides[0] + i_kv * key.strides[4] + token_offset(token, key.strides)
    o_v = i_batch * value.strides[0] + i_kv * value.strides[4] + token_offset(token, value.strides)
    m_loaded = m_keys
    if tensors.key_mask is not None:
        p_mask = key_mask.pointer + i_batch * key_mask.strides[0] + token_offset(token, key_mask.strides)
        row_seen = tl.load(p_mask, mask=m_keys, other=1).to(tl.int1)
        m_loaded = m_keys & row_seen
    b_k = load_columns(key.pointer, o_k, m_loaded, SPEC.head_dim, BD)
    b_v = load_columns(value.pointer, o_v, m_loaded, SPEC.value_dim, BDV)
    score_scale = scale * LOG2E
    factor = 1.0 if SPEC.scale_first else score_scale

    row_lo, row_hi = queries_of(index, count, kernel, stride, CAUSAL, PERIODIC, key_length)
    lo, hi, inner_lo, inner_hi = union_of_queries(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC, key_length)
    steps = steps_over(lo, hi, CHUNK)
    if tensors.key_mask is not None:  # no query sees a masked key, and a tile of such keys has nothing to do
        row_hi = (row_hi[0], row_hi[1], tl.where(row_seen, row_hi[2], row_lo[2] - 1))
        all_seen = tl.min(row_seen.to(tl.int32), 0) > 0
        inner_hi = (inner_hi[0], inner_hi[1], tl.where(all_seen, inner_hi[2], -FAR))
        steps = (steps[0], steps[1], tl.where(tl.max(m_loaded.to(tl.int32), 0) > 0, steps[2], 0))
    row_bias = bias_middle(kernel) + bias_offset(clamped(index, key_count), kernel) if tensors.rpb is not None else None
    tile = KeyTile(b_k, b_v, Corners(row_lo, row_hi), Corners(lo, hi), Corners(inner_lo, inner_hi), row_bias)
    b_dk, b_dv = window_key_gradients(
        tile, query, grad_out, (Lse, Delta), tensors.rpb, steps, ResidueClass(residue, count, dilation), axes,
        i_batch, i_kv, group, kv_heads, factor, score_scale, SPEC,
    )  # fmt: skip
    if tensors.key_mask is not None:  # zeros whatever NaN there is in queries and in the gradient of the output
        b_dk, b_dv = where_rows(row_seen, b_dk), where_rows(row_seen, b_dv)
    o_row = contiguous_row(i_batch, token, lengths) * kv_heads + i_kv
    store_columns(DK, o_row * SPEC.head_dim, m_keys, times(b_dk, scale), SPEC.head_dim, BD)
    store_columns(DV, o_row * SPEC.value_dim, m_keys, b_dv, SPEC.value_dim, BDV)


@triton.jit
def backward_key_kernel(tensors, strides, axes, group, kv_heads, key_length, scale, SPEC: tl.constexpr):
    """Each program computes one tile. The arguments are those of ``key_gradients_of_tile``."""
    key_gradients_of_tile(tl.program_id(0), tensors, strides, axes, group, kv_heads, key_length, scale, SPEC)


@triton.jit
def backward_register_kernel(
    tensors, strides, length, tokens, slices, group, kv_heads, registers, scale, SPEC: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """dK and dV of registers, summed over one slice of the tokens, of which a program takes ``BM`` rows at a time.

    ``tensors`` are :class:`RegisterGradientTensors`.
    """
    BR: tl.constexpr = SPEC.register_tile
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    D: tl.constexpr = SPEC.head_dim
    DV: tl.constexpr = SPEC.value_dim
    PRECISION: tl.constexpr = SPEC.precision
    UNIT: tl.constexpr = SPEC.unit
    Q, DOut = tensors.query, tensors.grad_out
    q_strides, do_strides = in_elements(strides.query, UNIT), in_elements(strides.grad_out, UNIT)
    i_program = tl.program_id(0)
    i_slice = i_program % slices
    i_kv = (i_program // slices % kv_heads).to(tl.int64)
    i_batch = (i_program // (slices * kv_heads)).to(tl.int64)
    n = tl.program_id(1) * BR + tl.arange(0, BR)
    m_r = n < registers
    n = n.to(tl.int64)
    keys = register_view(tensors.additional_keys, strides.additional_keys, i_batch, i_kv, SPEC)
    values = register_view(tensors.additional_values, strides.additional_values, i_batch, i_kv, SPEC)
    b_k = load_columns(keys.pointer, n * keys.strides[1], m_r, D, BD)  # [R, D]
    b_v = load_columns(values.pointer, n * values.strides[1], m_r, DV, BDV)
    b_dk = zero_columns(BR, BD)
    b_dv = zero_columns(BR, BDV)
    score_scale = scale * LOG2E
    factor = 1.0 if SPEC.scale_first else score_scale
    i_image, i_first = i_batch, i_batch * tokens
    if tensors.samples is not None:
        # The batch is one axis of tokens, of which the sample has a part.
        p_sample = tensors.samples + i_batch * SAMPLE_FIELDS
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
        col_lse = tl.load(tensors.lse + o_row, mask=m_rows, other=0.0)
        col_delta = tl.load(tensors.delta + o_row, mask=m_rows, other=0.0)
        b_s = products(b_k, b_q, None, PRECISION)  # [R, M]
        if SPEC.scale_first:
            b_s = b_s * score_scale
        b_s = tl.where(m_rows[None, :], b_s, float("-inf"))
        b_dk, b_dv = add_key_gradients(b_dk, b_dv, b_s, b_q, b_v, b_do, col_lse, col_delta, factor, PRECISION)
    batches = tl.num_programs(0) // (slices * kv_heads)
    o_r = ((i_slice * batches + i_batch) * registers + n) * kv_heads + i_kv
    store_columns(tensors.grad_keys, o_r * D, m_r, times(b_dk, scale), D, BD)
    store_columns(tensors.grad_values, o_r * DV, m_r, b_dv, DV, BDV)


def key_plan(p: Problem, grad_out: Layout) -> Plan:
    config = tile_config_for("backward_key", p.key_problem_class)
    results = contiguous(p.key.shape), contiguous(p.value.shape)
    tensor_strides = *p.token_strides, p.strides_of(grad_out)
    unit = stride_unit(tensor_strides)
    query, key, value, grad = in_units(tensor_strides, unit)
    launch = launcher(
        backward_key_kernel,
        (p.tile_count_of_keys(config.tile) * p.kv_heads,),
        (
            Strides(query, key, value, grad_out=grad, key_mask=p.mask_strides), Axes(*p.key_extents(config.tile)),
            p.group, p.kv_heads, p.key_lengths,
        ),
        SPEC=spec_of(p, config, (p.query, p.key, p.value, grad_out, p.statistics, *results), unit=unit),
        **warps_of(config),
    )  # fmt: skip
    return Plan(config, launch)


def backward_key(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor, statistics: RowStatistics
) -> tuple[Tensor, Tensor]:
    """dK and dV of the tokens, without those of registers. Allocates only these."""
    results = new_like(inputs.key), new_like(inputs.value)
    plan.launch((key_tensors(plan, problem, inputs, grad_out, statistics, results),), (options.scale,))
    return results


def key_tensors(
    plan: Plan, problem: Problem, inputs: Inputs, grad_out: Tensor, statistics: RowStatistics,
    results: tuple[Tensor, Tensor],
) -> KeyGradientTensors:  # fmt: skip
    delta, lse, _ = statistics
    return KeyGradientTensors(
        inputs.query, inputs.key, inputs.value, grad_out, delta, lse, *results, inputs.key_mask,
        problem.tile_table(plan.config.tile), inputs.rpb,
    )  # fmt: skip


class RegisterTokensConfig(NamedTuple):
    registers: int
    """Registers that a program takes at a time."""
    rows: int
    """Queries that a program takes at a time."""
    slices: int
    """Number of parts of the tokens, whose sums are added in order."""


def register_plan(p: Problem, grad_out: Layout) -> Plan:
    tensor_strides = p.strides_of(p.query), *p.input_strides()[3:], p.strides_of(grad_out)
    unit = stride_unit(tensor_strides)
    q_strides, k_strides, v_strides, do_strides = in_units(tensor_strides, unit)
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
            Strides(q_strides, None, None, k_strides, v_strides, do_strides),
            lengths, tokens, slices, p.group, p.kv_heads, p.registers,
        ),
        SPEC=Spec(**head_fields(p), register_tile=registers, unit=unit), BM=rows, num_warps=4,
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
    tensors = RegisterGradientTensors(query, keys, values, grad_out, delta, lse, sums_k, sums_v, samples)
    plan.launch((tensors,), (options.scale,))
    return sums_k.sum(0).to(keys.dtype), sums_v.sum(0).to(values.dtype)
