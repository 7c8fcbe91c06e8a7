"""The portable forward kernel, one for 1, 2 and 3 axes, and its launcher.

A program computes a box of query positions times ``PACK`` query heads of one KV head. It walks in chunks over the union
of their windows, which may start at any key: keys need not be aligned to tiles, and K and V are neither copied nor
permuted. The sink is the initial state of the softmax; registers are folded last, as more keys of the same softmax.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Plan, launcher
from ..host.problem import Inputs, Options, Problem, in_units, new_results, stride_unit
from ..host.tuned import tile_config_for
from .primitives import (
    LN2,
    LOG2E,
    LOWEST,
    NO,
    are_sound,
    in_elements,
    load_chunk,
    load_columns,
    masked_product,
    products,
    scale_rows,
    softmax_step,
    store_columns,
    unmasked_columns,
    zero_columns,
)
from .windows import (
    NO_AXIS,
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
    of_sample,
    packed_sample,
    shifted,
    spatial_tile,
    steps_over,
    token_offset,
    tokens_of,
    union_of_windows,
    unravel,
    visibility,
    windows_of,
)


@triton.jit
def query_tile(
    i_program, length, dilation, tiles, group, kv_heads, TILE: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """The queries of a program: a box of positions times ``PACK`` heads, rows in (position, head) order."""
    blocks = (group + PACK - 1) // PACK
    i_head = i_program % (kv_heads * blocks)
    i_tile = i_program // (kv_heads * blocks)
    i_batch, residue, count, origin = spatial_tile(i_tile, length, dilation, tiles, TILE)
    row = tl.arange(0, TILE[0] * TILE[1] * TILE[2] * PACK)
    t, h, w = unravel(row // PACK, TILE[1], TILE[2])
    index = (origin[0] + t, origin[1] + h, origin[2] + w)
    row_group = i_head % blocks * PACK + row % PACK
    m_rows = inside_axes(index, count) & (row_group < group)
    i_kv = (i_head // blocks).to(tl.int64)
    row_head = i_kv * group + tl.minimum(row_group, group - 1)
    return i_batch, i_kv, row_head, m_rows, residue, count, origin, index


@triton.jit
def attend_window(
    b_q, b_acc, row_m, row_l, K, V, k_strides, v_strides, residue, count, origin, index,
    kernel, stride, dilation, factor, score_scale,
    CAUSAL: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    MASK: tl.constexpr, NONFINITE: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PERIODIC: tl.constexpr, key_count,
    KeyMask=None, mask_strides=None, MASKED: tl.constexpr = NO, row_bias=None,
):  # fmt: skip
    """Fold the union of the tile's windows into the softmax state.

    ``K``, ``V`` and, if ``MASKED``, ``KeyMask`` point at the image and KV head. ``row_bias`` points, for every row, at
    the bias of a key at the origin.
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
        b_k = load_chunk(K, o_k, inner, corner, m_keys, residue, ring, dilation, k_strides, PERIODIC, RANK, WIDE, D, BD)
        b_v = load_chunk(
            V, o_v, inner, corner, m_keys, residue, ring, dilation, v_strides, PERIODIC, RANK, WIDE, DV, BDV
        )
        col, inside_hi = inner, inner_hi
        if MASKED:
            _, col, inside_hi = unmasked_columns(
                KeyMask, o_mask, inner, corner, m_keys, inner_hi, residue, ring, dilation, mask_strides,
                PERIODIC, RANK, WIDE,
            )  # fmt: skip
        p_bias = None
        if row_bias is not None:
            p_bias = row_bias[:, None] + bias_offset(shifted(inner, corner), kernel)[None, :]
        b_s = masked_product(
            b_q, b_k, row_lo, row_hi, corner, col, inner_lo, inside_hi, score_scale,
            CHUNK, RANK, MASK, SCALE_FIRST, PRECISION, p_bias,
        )  # fmt: skip
        b_visible = None
        if NONFINITE:
            b_visible = visibility(row_lo, row_hi, corner, col, RANK)
        b_acc, row_m, row_l = softmax_step(b_acc, row_m, row_l, b_s, b_v, b_visible, factor, NONFINITE, PRECISION)
        corner = next_chunk(corner, lo, hi, CHUNK, RANK)
    return b_acc, row_m, row_l


@triton.jit
def bias_rows(RPB, row_head, index, count, kernel):
    """For every query row, a pointer at its bias of a key at the origin."""
    return RPB + row_head * bias_size(kernel) + bias_middle(kernel) - bias_offset(clamped(index, count), kernel)


@triton.jit
def attend_registers(
    b_q, b_acc, row_m, row_l, RegK, RegV, regk_strides, regv_strides, registers, factor, score_scale,
    BR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    NONFINITE: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the registers, which every query sees, into the softmax state."""
    n = tl.arange(0, BR)
    for start in tl.range(0, registers, BR, num_stages=1):
        m_r = start + n < registers
        o_r = (start + n).to(tl.int64)
        b_k = load_columns(RegK, o_r * regk_strides[1], m_r, D, BD)  # [R, D]
        b_v = load_columns(RegV, o_r * regv_strides[1], m_r, DV, BDV)
        b_s = products(b_q, b_k, None, PRECISION)  # [M, R]
        if SCALE_FIRST:
            b_s = b_s * score_scale
        b_visible = tl.broadcast_to(m_r[None, :], b_s.shape)
        b_s = tl.where(b_visible, b_s, float("-inf"))
        b_acc, row_m, row_l = softmax_step(b_acc, row_m, row_l, b_s, b_v, b_visible, factor, NONFINITE, PRECISION)
    return b_acc, row_m, row_l


@triton.jit
def initial_stats(Sink, row_head, sink, SINK: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr):
    """Softmax state without keys: empty, or with the sink folded in (``m = sink, l = 1, acc = 0``)."""
    if SINK == "none":
        row_m = tl.full([BM], LOWEST, tl.float32)
        row_l = tl.zeros([BM], tl.float32)
    else:
        if SINK == "tensor":
            row_sink = tl.load(Sink + row_head).to(tl.float32) * LOG2E
        else:
            row_sink = tl.full([BM], sink * LOG2E, tl.float32)
        row_m = tl.maximum(row_sink, LOWEST)
        row_l = tl.where(row_sink > LOWEST, 1.0, 0.0)
    return zero_columns(BM, BDV), row_m, row_l


@triton.jit
def attend_tile(
    i_program, Q, K, V, Out, RowMax, RowSum, RegK, RegV, Sink,
    q_strides, k_strides, v_strides, regk_strides, regv_strides,
    length, kernel, stride, dilation, tiles, group, kv_heads, registers, sink, scale,
    CAUSAL: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    PACK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    SINK: tl.constexpr, WITH_STATS: tl.constexpr, MASK: tl.constexpr, SCALE_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, PERIODIC: tl.constexpr = NO_AXIS,
    key_length=None, KeyMask=None, mask_strides=None, MASKED: tl.constexpr = NO,
    Tiles=None, PACKED: tl.constexpr = NO, RPB=None,
):  # fmt: skip
    """Attention of one query tile. ``Out [B, T, H, W, heads, DV]`` and the softmax statistics are contiguous.

    Strides are ``(batch, t, h, w, head)``, those of registers ``(batch, register, head)``, both in units of
    ``UNIT`` elements. The last axis of every tensor is contiguous. On another grid (``key_length``) there is no
    dilation, so the only residue class of keys is the whole axis. ``KeyMask`` has strides like
    ``K``, in elements. With ``PACKED`` the batch is one axis of tokens, and lengths and windows are the sample's.
    """
    BM: tl.constexpr = TILE[0] * TILE[1] * TILE[2] * PACK
    q_strides, k_strides, v_strides = (
        in_elements(q_strides, UNIT),
        in_elements(k_strides, UNIT),
        in_elements(v_strides, UNIT),
    )
    regk_strides, regv_strides = in_elements(regk_strides, UNIT), in_elements(regv_strides, UNIT)
    if PACKED:
        i_sample, first, i_program, length, kernel, stride, dilation, tiles = packed_sample(
            i_program, Tiles, kv_heads * ((group + PACK - 1) // PACK), length, kernel, stride, dilation, tiles
        )
        Q, q_strides = of_sample(Q, q_strides, first, length, WIDE)
        K, k_strides = of_sample(K, k_strides, first, length, WIDE)
        V, v_strides = of_sample(V, v_strides, first, length, WIDE)
        if MASKED:
            KeyMask, mask_strides = of_sample(KeyMask, mask_strides, first, length, WIDE)
        first *= kv_heads * group
        Out += first * DV
        if WITH_STATS:
            RowMax += first
            RowSum += first
    i_batch, i_kv, row_head, m_rows, residue, count, origin, index = query_tile(
        i_program, length, dilation, tiles, group, kv_heads, TILE, PACK
    )
    if is_empty(origin, count):
        return
    token = tokens_of(index, residue, count, dilation)
    o_q = token_offset(token, q_strides) + row_head * q_strides[4]
    b_q = load_columns(Q + i_batch * q_strides[0], o_q, m_rows, D, BD)  # [M, D]
    K += i_batch * k_strides[0] + i_kv * k_strides[4]
    V += i_batch * v_strides[0] + i_kv * v_strides[4]
    if MASKED:
        KeyMask += i_batch * mask_strides[0]
    score_scale = scale * LOG2E
    # A scale that is not positive does not commute with the maximum, so scores are then scaled before it is taken.
    factor = 1.0 if SCALE_FIRST else score_scale

    if BR > 0:
        i_image = i_sample.to(tl.int64) if PACKED else i_batch
        RegK += i_image * regk_strides[0] + i_kv * regk_strides[2]
        RegV += i_image * regv_strides[0] + i_kv * regv_strides[2]
    row_bias = bias_rows(RPB, row_head, index, count, kernel) if RPB is not None else None
    b_acc, row_m, row_l = initial_stats(Sink, row_head, sink, SINK, BM, BDV)
    b_acc, row_m, row_l = attend_window(
        b_q, b_acc, row_m, row_l, K, V, k_strides, v_strides, residue, count, origin, index,
        kernel, stride, dilation, factor, score_scale, CAUSAL, TILE, CHUNK, RANK, WIDE, D, BD, DV, BDV,
        MASK, False, SCALE_FIRST, PRECISION, STAGES, PERIODIC, key_length,
        KeyMask, mask_strides, MASKED, row_bias,
    )  # fmt: skip
    if BR > 0:
        # Registers come after the window, so that the window's first chunks load at the same time as the query. They
        # are not loaded ahead, as the window's stages need the shared memory.
        b_acc, row_m, row_l = attend_registers(
            b_q, b_acc, row_m, row_l, RegK, RegV, regk_strides, regv_strides, registers, factor, score_scale,
            BR, D, BD, DV, BDV, False, SCALE_FIRST, PRECISION,
        )  # fmt: skip
    # A nonfinite value times a weight of zero, or scores too large to be scaled in the instruction that subtracts the
    # maximum: both are so rare that a slower second pass repairs them, which runs only then.
    if tl.max(tl.where(are_sound(b_acc, row_m, row_l), 0, 1), 0) > 0:
        b_acc, row_m, row_l = initial_stats(Sink, row_head, sink, SINK, BM, BDV)
        if BR > 0:
            b_acc, row_m, row_l = attend_registers(
                b_q, b_acc, row_m, row_l, RegK, RegV, regk_strides, regv_strides, registers, 1.0, score_scale,
                16, D, BD, DV, BDV, True, True, PRECISION,
            )  # fmt: skip
        b_acc, row_m, row_l = attend_window(
            b_q, b_acc, row_m, row_l, K, V, k_strides, v_strides, residue, count, origin, index,
            kernel, stride, dilation, 1.0, score_scale, CAUSAL, TILE, (1, 1, 16), RANK, WIDE, D, BD, DV, BDV,
            "select", True, True, PRECISION, 1, PERIODIC, key_length,
            KeyMask, mask_strides, MASKED, row_bias,
        )  # fmt: skip

    row_weight, row_max = row_l, row_m * LN2
    if MASKED:  # rows that see nothing have a sum of zero
        row_weight = tl.where(row_l == 0.0, 1.0, row_l)
        row_max = tl.where(row_l == 0.0, float("-inf"), row_max)
    o_row = contiguous_row(i_batch, token, length) * (kv_heads * group) + row_head
    store_columns(Out, o_row * DV, m_rows, scale_rows(b_acc, 1.0 / row_weight), DV, BDV)
    if WITH_STATS:
        tl.store(RowMax + o_row, row_max, mask=m_rows)
        tl.store(RowSum + o_row, row_l, mask=m_rows)


@triton.jit
def forward_kernel(
    Q, K, V, Out, RowMax, RowSum, RegK, RegV, Sink, KeyMask, Tiles, RPB,
    q_strides, k_strides, v_strides, regk_strides, regv_strides, mask_strides,
    length, kernel, stride, dilation, tiles, group, kv_heads, registers, key_length, sink, scale,
    CAUSAL: tl.constexpr, PERIODIC: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr,
    WIDE: tl.constexpr,
    PACK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    SINK: tl.constexpr, WITH_STATS: tl.constexpr, MASK: tl.constexpr, SCALE_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Each program computes one tile. The arguments are those of ``attend_tile``."""
    attend_tile(
        tl.program_id(0), Q, K, V, Out, RowMax, RowSum, RegK, RegV, Sink,
        q_strides, k_strides, v_strides, regk_strides, regv_strides,
        length, kernel, stride, dilation, tiles, group, kv_heads, registers, sink, scale,
        CAUSAL, TILE, CHUNK, RANK, WIDE, PACK, D, BD, DV, BDV, BR, SINK, WITH_STATS, MASK, SCALE_FIRST, PRECISION,
        STAGES, UNIT, PERIODIC, key_length, KeyMask, mask_strides, MASKED, Tiles, PACKED, RPB,
    )  # fmt: skip


def plan(p: Problem, with_stats: bool) -> Plan:
    config, unit = tile_config_for("forward", p.problem_class), stride_unit(p.input_strides())
    launch = launcher(
        forward_kernel,
        (p.programs(config),),
        (
            *in_units(p.input_strides(), unit), p.mask_strides,
            *p.extents(config.tile), p.group, p.kv_heads, p.registers, p.key_lengths,
        ),
        **p.program(config, (p.query, p.key, p.value, p.out)), **p.constants(),
        PACK=config.pack, BR=p.register_tile, SINK=p.sink, WITH_STATS=with_stats, UNIT=unit,
    )  # fmt: skip
    return Plan(config, launch)


def forward(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, with_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``out [B, *spatial, Hq, Dv]`` and, if ``with_stats``, ``row_max`` and ``row_sum [B, *spatial, Hq]`` in fp32."""
    query, key, value, additional_keys, additional_values, sink, key_mask, _, rpb = inputs
    out, row_max, row_sum = new_results(query, problem.value.shape[-1], with_stats)
    tensors = query, key, value, out, row_max, row_sum, additional_keys, additional_values, sink, key_mask
    plan.launch((*tensors, problem.tile_table(plan.config.tile), rpb), (options.sink_value, options.scale))
    return out, row_max, row_sum
