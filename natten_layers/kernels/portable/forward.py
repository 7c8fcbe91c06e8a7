"""The portable forward kernel, one for 1, 2 and 3 axes, and its launcher.

A program computes a box of query positions times ``PACK`` query heads of one KV head. It walks in chunks over the union
of their windows, which may start at any key: keys need not be aligned to tiles, and K and V are neither copied nor
permuted. The sink is the initial state of the softmax; registers are folded last, as more keys of the same softmax.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Plan, launcher
from ..host.problem import Inputs, Options, Problem, in_units, new_results, stride_unit
from ..host.tuned import tile_config_for
from .parameters import Axes, Chunk, QueryTile, Strides, View, spec_of, warps_of
from .primitives import (
    LN2,
    LOG2E,
    LOWEST,
    are_sound,
    load_chunk,
    load_columns,
    load_queries,
    load_unmasked,
    masked_product,
    products,
    register_view,
    scale_rows,
    shows_all,
    softmax_step,
    store_columns,
    token_view,
    without_masked,
    zero_columns,
)
from .windows import (
    bias_middle,
    bias_offset,
    bias_size,
    clamped,
    contiguous_row,
    inner_indices,
    inner_offsets,
    inside_axes,
    inside_box,
    is_empty,
    next_chunk,
    of_head,
    of_sample,
    packed_sample,
    shifted,
    spatial_tile,
    tokens_of,
    unravel,
    visibility,
    walk_over_windows,
)


class ForwardTensors(NamedTuple):
    """What the kernel reads and writes. Results are contiguous."""

    query: Any
    key: Any
    value: Any
    out: Any
    row_max: Any
    row_sum: Any
    additional_keys: Any
    additional_values: Any
    sink: Any
    key_mask: Any
    tiles: Any = None
    """the table of a packed batch's tiles, or None"""
    rpb: Any = None


@triton.jit
def query_tile(i_program, axes, group, kv_heads, SPEC: tl.constexpr):
    """The queries of a program."""
    PACK: tl.constexpr = SPEC.pack
    TILE: tl.constexpr = SPEC.tile
    blocks = (group + PACK - 1) // PACK
    i_head = i_program % (kv_heads * blocks)
    i_tile = i_program // (kv_heads * blocks)
    i_batch, residue, count, origin = spatial_tile(i_tile, axes.length, axes.dilation, axes.tiles, TILE)
    row = tl.arange(0, SPEC.rows)
    t, h, w = unravel(row // PACK, TILE[1], TILE[2])
    index = (origin[0] + t, origin[1] + h, origin[2] + w)
    row_group = i_head % blocks * PACK + row % PACK
    m_rows = inside_axes(index, count) & (row_group < group)
    i_kv = (i_head // blocks).to(tl.int64)
    row_head = i_kv * group + tl.minimum(row_group, group - 1)
    return QueryTile(i_batch, i_kv, row_head, m_rows, residue, count, origin, index)


@triton.jit
def attend_window(
    b_q, b_acc, row_m, row_l, keys, values, key_mask, row_bias, tile, axes, key_length, factor, score_scale,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Fold the union of the tile's windows into the softmax state.

    ``keys``, ``values`` and ``key_mask`` (or None) are views of the image and KV head. ``row_bias`` points, for every
    row, at the bias of a key at the origin, or is None.
    """
    CHUNK: tl.constexpr = SPEC.chunk
    RANK: tl.constexpr = SPEC.rank
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    NONFINITE: tl.constexpr = SPEC.nonfinite
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
        b_k = load_chunk(keys, o_k, m_keys, chunk, walk.ring, SPEC, SPEC.head_dim, BD)
        b_v = load_chunk(values, o_v, m_keys, chunk, walk.ring, SPEC, SPEC.value_dim, BDV)
        p_bias = None
        if row_bias is not None:
            p_bias = row_bias[:, None] + bias_offset(shifted(inner, corner), axes.kernel)[None, :]
        b_s = masked_product(b_q, b_k, walk.boxes, chunk, walk.inside, score_scale, SPEC, p_bias)
        if key_mask is not None:
            b_s = without_masked(b_s, key_mask, unmasked, o_mask, m_keys, chunk, walk.ring, SPEC)
        b_visible = None
        if NONFINITE:
            b_visible = visibility(walk.boxes.lo, walk.boxes.hi, corner, inner, RANK)
            if key_mask is not None:
                b_visible &= load_unmasked(key_mask, o_mask, m_keys, chunk, walk.ring, SPEC)[None, :]
        b_acc, row_m, row_l = softmax_step(b_acc, row_m, row_l, b_s, b_v, b_visible, factor, NONFINITE, PRECISION)
        corner = next_chunk(corner, lo, hi, CHUNK, RANK)
    return b_acc, row_m, row_l


@triton.jit
def bias_rows(RPB, tile, kernel):
    """For every query row, a pointer at its bias of a key at the origin."""
    o_query = bias_offset(clamped(tile.row_index, tile.class_length), kernel)
    return RPB + tile.row_head * bias_size(kernel) + bias_middle(kernel) - o_query


@triton.jit
def attend_registers(b_q, b_acc, row_m, row_l, keys, values, registers, factor, score_scale, SPEC: tl.constexpr):
    """Fold the registers, which every query sees, into the softmax state. Their views are those of image and head."""
    BR: tl.constexpr = SPEC.register_tile
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    NONFINITE: tl.constexpr = SPEC.nonfinite
    PRECISION: tl.constexpr = SPEC.precision
    n = tl.arange(0, BR)
    for start in tl.range(0, registers, BR, num_stages=1):
        m_r = start + n < registers
        o_r = (start + n).to(tl.int64)
        b_k = load_columns(keys.pointer, o_r * keys.strides[1], m_r, SPEC.head_dim, BD)  # [R, D]
        b_v = load_columns(values.pointer, o_r * values.strides[1], m_r, SPEC.value_dim, BDV)
        b_s = products(b_q, b_k, None, PRECISION)  # [M, R]
        if SPEC.scale_first:
            b_s = b_s * score_scale
        b_visible = tl.broadcast_to(m_r[None, :], b_s.shape)
        b_s = tl.where(b_visible, b_s, float("-inf"))
        b_acc, row_m, row_l = softmax_step(b_acc, row_m, row_l, b_s, b_v, b_visible, factor, NONFINITE, PRECISION)
    return b_acc, row_m, row_l


@triton.jit
def initial_stats(Sink, row_head, sink, BM: tl.constexpr, BDV: tl.constexpr):
    """Softmax state without keys: empty, or with the sink folded in (``m = sink, l = 1, acc = 0``).

    The sink is a logit per head (``Sink``), or else one for all heads (``sink``), unless that is None too.
    """
    if Sink is None and sink is None:
        row_m = tl.full([BM], LOWEST, tl.float32)
        row_l = tl.zeros([BM], tl.float32)
    else:
        if Sink is not None:
            row_sink = tl.load(Sink + row_head).to(tl.float32) * LOG2E
        else:
            row_sink = tl.full([BM], sink * LOG2E, tl.float32)
        row_m = tl.maximum(row_sink, LOWEST)
        row_l = tl.where(row_sink > LOWEST, 1.0, 0.0)
    return zero_columns(BM, BDV), row_m, row_l


@triton.jit
def store_results(Out, RowMax, RowSum, b_acc, row_m, row_l, o_row, m_rows, MASKED: tl.constexpr, SPEC: tl.constexpr):
    """Store the output and the statistics of a softmax state. ``MASKED`` is whether rows may have seen nothing."""
    BDV: tl.constexpr = SPEC.value_columns
    row_weight, row_max = row_l, row_m * LN2
    if MASKED:  # rows that see nothing have a sum of zero
        row_weight = tl.where(row_l == 0.0, 1.0, row_l)
        row_max = tl.where(row_l == 0.0, float("-inf"), row_max)
    b_out = scale_rows(b_acc, 1.0 / row_weight)
    store_columns(Out, o_row * SPEC.value_dim, m_rows, b_out, SPEC.value_dim, BDV)
    if SPEC.with_stats:
        tl.store(RowMax + o_row, row_max, mask=m_rows)
        tl.store(RowSum + o_row, row_l, mask=m_rows)


@triton.jit
def attend_tile(
    i_program, tensors, strides, axes, group, kv_heads, registers, key_length, sink, scale, SPEC: tl.constexpr
):  # fmt: skip
    """Attention of one query tile.

    The last axis of every tensor is contiguous. On another grid (``key_length``) there is no dilation, so the only
    residue class of keys is the whole axis. In a packed batch, the batch is one axis of tokens, and ``axes`` are the
    sample's.
    """
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    MASKED: tl.constexpr = tensors.key_mask is not None or tensors.rpb is not None
    Out, RowMax, RowSum = tensors.out, tensors.row_max, tensors.row_sum
    first = None
    if tensors.tiles is not None:
        i_sample, first, i_program, axes = packed_sample(
            i_program, tensors.tiles, kv_heads * ((group + SPEC.pack - 1) // SPEC.pack), axes
        )
        first_row = first * (kv_heads * group)
        Out += first_row * SPEC.value_dim
        if SPEC.with_stats:
            RowMax, RowSum = RowMax + first_row, RowSum + first_row
    query = token_view(tensors.query, strides.query, first, axes, SPEC)
    key = token_view(tensors.key, strides.key, first, axes, SPEC)
    value = token_view(tensors.value, strides.value, first, axes, SPEC)
    key_mask = None
    if tensors.key_mask is not None:
        key_mask = of_sample(View(tensors.key_mask, strides.key_mask), first, axes, SPEC)
    tile = query_tile(i_program, axes, group, kv_heads, SPEC)
    if is_empty(tile.origin, tile.class_length):
        return
    token = tokens_of(tile.row_index, tile.residue, tile.class_length, axes.dilation)
    b_q = load_queries(query, tile, token, SPEC.head_dim, BD)  # [M, D]
    keys, values = of_head(key, tile.i_batch, tile.i_kv), of_head(value, tile.i_batch, tile.i_kv)
    if key_mask is not None:
        key_mask = of_head(key_mask, tile.i_batch, 0)
    score_scale = scale * LOG2E
    # A scale that is not positive does not commute with the maximum, so scores are then scaled before it is taken.
    factor = 1.0 if SPEC.scale_first else score_scale

    if SPEC.register_tile > 0:
        i_image = i_sample.to(tl.int64) if tensors.tiles is not None else tile.i_batch
        reg_keys = register_view(tensors.additional_keys, strides.additional_keys, i_image, tile.i_kv, SPEC)
        reg_values = register_view(tensors.additional_values, strides.additional_values, i_image, tile.i_kv, SPEC)
    row_bias = bias_rows(tensors.rpb, tile, axes.kernel) if tensors.rpb is not None else None
    b_acc, row_m, row_l = initial_stats(tensors.sink, tile.row_head, sink, SPEC.rows, BDV)
    b_acc, row_m, row_l = attend_window(
        b_q, b_acc, row_m, row_l, keys, values, key_mask, row_bias, tile, axes, key_length, factor, score_scale, SPEC
    )
    if SPEC.register_tile > 0:
        # Registers come after the window, so that the window's first chunks load at the same time as the query. They
        # are not loaded ahead, as the window's stages need the shared memory.
        b_acc, row_m, row_l = attend_registers(
            b_q, b_acc, row_m, row_l, reg_keys, reg_values, registers, factor, score_scale, SPEC
        )
    # A nonfinite value times a weight of zero, or scores too large to be scaled in the instruction that subtracts the
    # maximum: both are so rare that a slower second pass repairs them, which runs only then.
    if tl.max(tl.where(are_sound(b_acc, row_m, row_l), 0, 1), 0) > 0:
        REPAIR: tl.constexpr = SPEC.repair
        b_acc, row_m, row_l = initial_stats(tensors.sink, tile.row_head, sink, SPEC.rows, BDV)
        if SPEC.register_tile > 0:
            b_acc, row_m, row_l = attend_registers(
                b_q, b_acc, row_m, row_l, reg_keys, reg_values, registers, 1.0, score_scale, REPAIR
            )
        b_acc, row_m, row_l = attend_window(
            b_q, b_acc, row_m, row_l, keys, values, key_mask, row_bias, tile, axes, key_length, 1.0, score_scale, REPAIR
        )

    o_row = contiguous_row(tile.i_batch, token, axes.length) * (kv_heads * group) + tile.row_head
    store_results(Out, RowMax, RowSum, b_acc, row_m, row_l, o_row, tile.m_rows, MASKED, SPEC)


@triton.jit
def forward_kernel(tensors, strides, axes, group, kv_heads, registers, key_length, sink, scale, SPEC: tl.constexpr):
    """Each program computes one tile. ``tensors`` are :class:`ForwardTensors`."""
    attend_tile(
        tl.program_id(0), tensors, strides, axes, group, kv_heads, registers, key_length, sink, scale, SPEC
    )  # fmt: skip


def plan(p: Problem, with_stats: bool) -> Plan:
    config, unit = tile_config_for("forward", p.problem_class), stride_unit(p.input_strides())
    launch = launcher(
        forward_kernel,
        (p.programs(config),),
        (
            Strides(*in_units(p.input_strides(), unit), key_mask=p.mask_strides), Axes(*p.extents(config.tile)),
            p.group, p.kv_heads, p.registers, p.key_lengths,
        ),
        SPEC=spec_of(
            p, config, (p.query, p.key, p.value, p.out),
            pack=config.pack, register_tile=p.register_tile, with_stats=with_stats, unit=unit,
        ),
        **warps_of(config),
    )  # fmt: skip
    return Plan(config, launch)


def forward(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, with_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``out [B, *spatial, Hq, Dv]`` and, if ``with_stats``, ``row_max`` and ``row_sum [B, *spatial, Hq]`` in fp32."""
    query, key, value, additional_keys, additional_values, sink, key_mask, _, rpb = inputs
    out, row_max, row_sum = new_results(query, problem.value.shape[-1], with_stats)
    tensors = ForwardTensors(
        query, key, value, out, row_max, row_sum, additional_keys, additional_values, sink, key_mask,
        problem.tile_table(plan.config.tile), rpb,
    )  # fmt: skip
    plan.launch((tensors,), (options.sink_value, options.scale))
    return out, row_max, row_sum
