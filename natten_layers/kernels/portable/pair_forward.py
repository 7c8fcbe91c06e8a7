"""The forward kernel of fp32 tensors whose products are those of fp16 pairs, for any GPU, and its launcher.

It computes what ``forward.py`` does without a key mask, and walks as that does. Registers, which are few, are folded in
as there.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Launcher, launcher
from ..host.problem import Inputs, Options, Problem, in_units, new_results, stride_unit
from ..host.tiling import TileConfig
from .forward import attend_registers, attend_window, initial_stats, query_tile, store_results
from .pairs import (
    TINY,
    WEIGHT_EXPONENT,
    WEIGHT_UNIT,
    Split,
    load_pair,
    pair_layout,
    pair_product,
    pair_spec,
    register_tile,
    rows_to_pair,
    split_of,
    to_pair,
    transposed,
)
from .parameters import Axes, Chunk, Strides, View, warps_of
from .primitives import LOG2E, are_sound, in_elements, load_queries, register_view
from .windows import (
    contiguous_row,
    hidden,
    inner_indices,
    inner_offsets,
    inside_box,
    is_empty,
    next_chunk,
    of_head,
    tokens_of,
    walk_over_windows,
)


class PairForwardTensors(NamedTuple):
    """What the kernel reads and writes. Results are contiguous."""

    query: Any
    key: Any
    value: Any
    key_pair: Any
    value_pair: Any
    units: Any
    out: Any
    row_max: Any
    row_sum: Any
    sink: Any
    additional_keys: Any
    additional_values: Any


@triton.jit
def attend_window_in_pairs(b_q, b_acc, row_m, row_l, keys, values, tile, axes, row_factor, SPEC: tl.constexpr):
    """Fold the union of the tile's windows into the softmax state, whose sums are in units of ``WEIGHT_UNIT``.

    ``row_factor > 0`` turns products of pairs into base-2 logits.
    """
    CHUNK: tl.constexpr = SPEC.chunk
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    walk = walk_over_windows(tile, axes, None, SPEC)
    lo, hi = walk.union
    inner = inner_indices(CHUNK)
    o_k = inner_offsets(inner, axes.dilation, keys.strides, SPEC)
    o_v = inner_offsets(inner, axes.dilation, values.strides, SPEC)
    corner = lo
    for _ in tl.range(0, walk.chunks, num_stages=SPEC.stages):
        chunk = Chunk(corner, inner)
        m_keys = inside_box(inner, corner, hi, SPEC.rank)
        b_k = load_pair(keys, o_k, m_keys, chunk, walk.ring, SPEC, SPEC.head_dim, BD)
        b_v = load_pair(values, o_v, m_keys, chunk, walk.ring, SPEC, SPEC.value_dim, BDV)
        b_s = pair_product(b_q, transposed(b_k), hidden(walk.boxes.lo, walk.boxes.hi, corner, inner, SPEC.rank))
        row_m_new = tl.maximum(row_m, tl.max(b_s, 1) * row_factor)
        row_alpha = tl.exp2(row_m - row_m_new)
        b_p = tl.exp2(b_s * row_factor[:, None] - (row_m_new - WEIGHT_EXPONENT)[:, None])
        row_l = row_l * row_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * row_alpha[:, None] + pair_product(to_pair(b_p), b_v, None)
        row_m = row_m_new
        corner = next_chunk(corner, lo, hi, CHUNK, SPEC.rank)
    return b_acc, row_m, row_l


@triton.jit
def pair_forward_kernel(
    tensors, strides, pair_strides, axes, group, kv_heads, registers, sink, scale, SPEC: tl.constexpr
):  # fmt: skip
    """Each program computes one tile. ``tensors`` are :class:`PairForwardTensors`."""
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    UNIT: tl.constexpr = SPEC.unit
    tile = query_tile(tl.program_id(0), axes, group, kv_heads, SPEC)
    if is_empty(tile.origin, tile.class_length):
        return
    query = View(tensors.query, in_elements(strides.query, UNIT))
    key_pair = View(tensors.key_pair, in_elements(pair_strides.key, UNIT))
    value_pair = View(tensors.value_pair, in_elements(pair_strides.value, UNIT))
    token = tokens_of(tile.row_index, tile.residue, tile.class_length, axes.dilation)
    p_units = tensors.units + (tile.i_batch * kv_heads + tile.i_kv) * 4
    k_unit, v_unit = tl.load(p_units), tl.load(p_units + 1)
    b_q_pair, row_unit = rows_to_pair(load_queries(query, tile, token, SPEC.head_dim, BD)[0])
    score_scale = scale * LOG2E
    row_factor = tl.maximum(row_unit * score_scale * k_unit, TINY)
    keys, values = of_head(key_pair, tile.i_batch, tile.i_kv), of_head(value_pair, tile.i_batch, tile.i_kv)
    if SPEC.register_tile > 0:
        reg_keys = register_view(tensors.additional_keys, strides.additional_keys, tile.i_batch, tile.i_kv, SPEC)
        reg_values = register_view(tensors.additional_values, strides.additional_values, tile.i_batch, tile.i_kv, SPEC)
    b_acc, row_m, row_l = initial_stats(tensors.sink, tile.row_head, sink, SPEC.rows, BDV)
    b_sum, row_m, row_l = attend_window_in_pairs(
        b_q_pair, b_acc[0], row_m, row_l / WEIGHT_UNIT, keys, values, tile, axes, row_factor, SPEC
    )
    b_acc, row_l = (b_sum * (v_unit * WEIGHT_UNIT),), row_l * WEIGHT_UNIT
    if SPEC.register_tile > 0:
        # Queries are loaded anew, here and below, as keeping them would take registers from the walk over the window.
        b_q = load_queries(query, tile, token, SPEC.head_dim, BD)
        b_acc, row_m, row_l = attend_registers(
            b_q, b_acc, row_m, row_l, reg_keys, reg_values, registers, score_scale, score_scale, SPEC
        )
    # Nonfinite values and scores that are too large, as in the forward kernel of other tensors.
    if tl.max(tl.where(are_sound(b_acc, row_m, row_l), 0, 1), 0) > 0:
        REPAIR: tl.constexpr = SPEC.repair
        b_q = load_queries(query, tile, token, SPEC.head_dim, BD)
        plain_keys = of_head(View(tensors.key, in_elements(strides.key, UNIT)), tile.i_batch, tile.i_kv)
        plain_values = of_head(View(tensors.value, in_elements(strides.value, UNIT)), tile.i_batch, tile.i_kv)
        b_acc, row_m, row_l = initial_stats(tensors.sink, tile.row_head, sink, SPEC.rows, BDV)
        if SPEC.register_tile > 0:
            b_acc, row_m, row_l = attend_registers(
                b_q, b_acc, row_m, row_l, reg_keys, reg_values, registers, 1.0, score_scale, REPAIR
            )
        b_acc, row_m, row_l = attend_window(
            b_q, b_acc, row_m, row_l, plain_keys, plain_values, None, None, tile, axes, None, 1.0, score_scale, REPAIR
        )
    o_row = contiguous_row(tile.i_batch, token, axes.length) * (kv_heads * group) + tile.row_head
    store_results(
        tensors.out, tensors.row_max, tensors.row_sum, b_acc, row_m, row_l, o_row, tile.m_rows, False, SPEC
    )  # fmt: skip


class PairPlan(NamedTuple):
    """The tile configuration of a kernel that reads pairs, its launcher, and that of the split before."""

    config: TileConfig
    launch: Launcher
    split: Split


def plan(p: Problem, config: TileConfig, with_stats: bool) -> PairPlan:
    tensor_strides = p.input_strides()
    key_pair, value_pair = pair_layout(p.key), pair_layout(p.value)
    pair_strides = p.strides_of(key_pair), p.strides_of(value_pair)
    unit = stride_unit((*tensor_strides, *pair_strides))
    launch = launcher(
        pair_forward_kernel,
        (p.programs(config),),
        (
            Strides(*in_units(tensor_strides, unit)), Strides(None, *in_units(pair_strides, unit)),
            Axes(*p.extents(config.tile)), p.group, p.kv_heads, p.registers,
        ),
        SPEC=pair_spec(
            p, config, (p.query, p.key, p.value, p.out, key_pair, value_pair),
            pack=config.pack, register_tile=register_tile(p), with_stats=with_stats, unit=unit,
        ),
        **warps_of(config),
    )  # fmt: skip
    return PairPlan(config, launch, split_of(p, p.key, p.value))


def forward(
    plan: PairPlan, problem: Problem, inputs: Inputs, options: Options, with_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ``portable.forward.forward`` computes. Allocates copies of keys and values beside its results."""
    query, key, value = inputs.query, inputs.key, inputs.value
    key_pair, value_pair, units = plan.split(problem, key, value)
    out, row_max, row_sum = new_results(query, value.shape[-1], with_stats)
    tensors = PairForwardTensors(
        query, key, value, key_pair, value_pair, units, out, row_max, row_sum, inputs.sink, inputs.additional_keys,
        inputs.additional_values,
    )  # fmt: skip
    plan.launch((tensors,), (options.sink_value, options.scale))
    return out, row_max, row_sum
