"""The forward pass of windows in fp32 on compute capability 9.0, in Gluon, whose products are those of fp16 pairs.

``portable/pairs.py`` says what pairs are. Tiles, chunks and the walk over them are those of ``medium_forward.py``. Keys
and values are split before, and TMA loads both numbers of a pair. A program splits its own tile, which it loads itself.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from functools import lru_cache
from math import prod
from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..host.problem import Inputs, Layout, Options, Problem, new_results
from ..portable.pairs import (
    TINY,
    WEIGHT_EXPONENT,
    WEIGHT_UNIT,
    Split,
    exponent,
    pair_layout,
    scale_of,
    split_of,
    to_pair,
    unit_of,
)
from ..portable.primitives import LOG2E
from ..portable.windows import shifted, union_of_windows, unravel, windows_of
from .descriptors import Boxes, Call, boxes_of, call_of, chunk_boxes, frames_of
from .masked_keys import saved_maxima
from .medium_chunks import chunks_over, hidden_positions, next_chunk, seen_by_all
from .medium_parts import chunk_of, start_chunk
from .medium_tiling import MediumTileConfig, spec_of
from .online_softmax import initial_stats, row_maximum
from .primitives import class_rows, spread, store_rows, thread_barrier, wide_token_offset
from .products import product_layout, start_product
from .rings import new_barriers, new_stages, stage_of
from .small_forward import NO_PREP
from .small_nonfinite import attend_rows
from .small_softmax import WARPS, all_finite, divided, nonfinite_flags
from .small_tiles import first_frame, own_tile
from .walk import on_rings, row_sizes

# --- Tiles that a program keeps


@gluon.jit
def token_rows(strides, i_batch, token, head):
    """Offsets of rows in a tensor whose strides are ``(batch, t, h, w, head)``."""
    return i_batch.to(gl.int64) * strides[0] + wide_token_offset(token, strides) + head.to(gl.int64) * strides[4]


@gluon.jit
def load_tile(X, o_rows, m_rows, D: gl.constexpr):
    """Rows ``[M, D]`` at ``o_rows``, zeros where ``m_rows`` is False. Threads side by side load a row."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [gl.num_warps(), 1], [1, 0])
    o_rows = gl.convert_layout(o_rows, gl.SliceLayout(1, LOAD))[:, None]
    m_rows = gl.convert_layout(m_rows, gl.SliceLayout(1, LOAD))[:, None]
    return gl.load(X + o_rows + gl.arange(0, D, gl.SliceLayout(0, LOAD))[None, :], mask=m_rows, other=0.0)


@gluon.jit
def shared_pair(b_rows):
    """The pair of a tile in shared memory, two ``[M, D]``, and the exponent of each row, in the layout of its rows.

    Products may read it after :func:`end_tiles`.
    """
    D: gl.constexpr = b_rows.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * D), 16, rank=2)
    row_e = exponent(gl.max(gl.abs(b_rows), 1))
    b_hi, b_lo = to_pair(b_rows * scale_of(row_e)[:, None])
    hi = gl.allocate_shared_memory(gl.float16, b_rows.shape, LAYOUT, b_hi)
    lo = gl.allocate_shared_memory(gl.float16, b_rows.shape, LAYOUT, b_lo)
    return (hi, lo), row_e


@gluon.jit
def end_tiles():
    """Let products and TMA come after what all warps have written to tiles, and read of them."""
    fence_async_shared()
    thread_barrier()


@gluon.jit
def held_pair(pair, N: gl.constexpr):
    """A pair in shared memory as the left side of products with ``N`` columns, in registers.

    Products that read both sides from shared memory are bound by its bandwidth, and without the tile in it three
    programs share a multiprocessor.
    """
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, product_layout(N), 2)
    return pair[0].load(LAYOUT), pair[1].load(LAYOUT)


# --- Products


@gluon.jit
def start_pair_scores(pair, rings, i_stage, b_onto, N: gl.constexpr, FIRST: gl.constexpr = 0):
    """Start the product of a tile with the transpose of ``N`` rows of a chunk, from ``FIRST`` on, added to ``b_onto``
    unless that is None. Small terms come first.
    """
    b_hi, b_lo = chunk_of(rings[0], i_stage, FIRST, N), chunk_of(rings[1], i_stage, FIRST, N)
    b_sum = start_product(pair[1], b_hi, b_onto)
    b_sum = start_product(pair[0], b_lo, b_sum)
    return start_product(pair[0], b_hi, b_sum)


@gluon.jit
def start_pair_sum(b_weights, rings, i_stage, FIRST: gl.constexpr = 0):
    """Start the sum over rows of a chunk, from ``FIRST`` on, weighted by ``b_weights [M, N]``."""
    M: gl.constexpr = b_weights.shape[0]
    N: gl.constexpr = b_weights.shape[1]
    b_hi, b_lo = chunk_of(rings[0], i_stage, FIRST, N), chunk_of(rings[1], i_stage, FIRST, N)
    D: gl.constexpr = b_hi.shape[1]
    LAYOUT: gl.constexpr = product_layout(D)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    w_hi, w_lo = to_pair(b_weights)
    w_hi, w_lo = gl.convert_layout(w_hi, WEIGHTS), gl.convert_layout(w_lo, WEIGHTS)
    b_zero = gl.zeros([M, D], gl.float32, LAYOUT)
    b_sum = warpgroup_mma(w_lo, b_hi, b_zero, use_acc=False, is_async=True)
    b_sum = warpgroup_mma(w_hi, b_lo, b_sum, is_async=True)
    return warpgroup_mma(w_hi, b_hi, b_sum, is_async=True)


@gluon.jit
def pair_weights(b_s, row_m, part_l, row_factor):
    """Weights of a chunk times 2^14, new maxima, new sums of weights, and by what earlier sums shrink, as
    ``online_softmax.softmax_weights`` returns them.
    """
    PARTS: gl.constexpr = part_l.type.layout
    row_max = gl.convert_layout(row_maximum(b_s), row_m.type.layout)
    row_new = gl.maximum(row_m, row_max * row_factor)
    row_alpha = gl.exp2(row_m - row_new)
    b_p = gl.exp2(b_s * row_factor[:, None] - (row_new - WEIGHT_EXPONENT)[:, None])
    part = gl.convert_layout(gl.sum(b_p.reshape([b_p.shape[0], b_p.shape[1] // 8, 8]), 1), PARTS)
    part_l = part_l * gl.convert_layout(row_alpha, gl.SliceLayout(1, PARTS))[:, None] + part
    return b_p, row_new, part_l, row_alpha


@gluon.jit
def medium_pair_forward_kernel(
    Q, K, V, Units, Out, RowMax, RowSum, Sink, k_desc, v_desc, strides, axes, tiles, frames, group, blocks, sink, scale,
    SPEC: gl.constexpr, CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """Attention of one tile; the grid is (tiles * blocks of heads, batch).

    Descriptors are those of pairs, whose first columns are ``hi`` and whose last are ``lo``; ``COLUMNS`` are both.
    """
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    PERIODIC: gl.constexpr = SPEC.periodic
    M: gl.constexpr = SPEC.rows
    D: gl.constexpr = SPEC.head_dim
    TILE: gl.constexpr = SPEC.tile
    PACK: gl.constexpr = SPEC.pack
    RANK: gl.constexpr = SPEC.rank
    SINK: gl.constexpr = SPEC.sink
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    PARTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 8, 16])
    SUMS: gl.constexpr = product_layout(D)

    i_batch, i_block, residue, count, origin = own_tile(length, dilation, tiles, blocks, TILE, SIDE)
    heads, i_kv = blocks * PACK, i_block * PACK // group
    lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC)
    common = seen_by_all(inner_lo, inner_hi, SPEC)
    chunks, i_frame = chunks_over(lo, hi, count, CHUNK, PERIODIC), first_frame(i_batch, residue, length, frames)
    row = gl.arange(0, M, ROW)
    position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
    index = shifted(position, origin)
    m_rows, o_row = class_rows(position, head, i_batch, origin, residue, count, dilation, length, heads)
    o_q = token_rows(strides[0], i_batch, spread(index, residue, dilation), head)
    queries, row_e = shared_pair(load_tile(Q, o_q, m_rows, D))
    end_tiles()
    queries = held_pair(queries, N)
    end_tiles()  # the ring takes their shared memory
    descs = k_desc, k_desc, v_desc, v_desc
    rings, ready = new_stages(descs, STAGES), new_barriers(STAGES, 1)
    keys, values = (rings[0], rings[1]), (rings[2], rings[3])
    ahead = lo
    for n in gl.static_range(STAGES):
        if n < chunks:
            first = on_rings(ahead, count, PERIODIC)
            start_chunk(descs, rings, ready, n, i_kv, i_frame, first, CHUNK, COLUMNS, STAGES)
        ahead = next_chunk(ahead, lo, hi, count, CHUNK, RANK, PERIODIC)

    p_units = Units + (i_batch.to(gl.int64) * (heads // group) + i_kv) * 4
    row_factor = gl.maximum(unit_of(gl.convert_layout(row_e, ROW)) * (scale * LOG2E) * gl.load(p_units), TINY)
    row_lo, row_hi = windows_of(index, count, kernel, stride, CAUSAL, PERIODIC)
    row_size = row_sizes(row_lo, row_hi)
    row_m, part_l = initial_stats(Sink, head, sink, SINK, M, ROW, PARTS)
    part_l /= WEIGHT_UNIT
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    b_acc, corner = gl.zeros([M, D], gl.float32, SUMS), lo
    for n in range(chunks):
        i_stage, phase = stage_of(n, STAGES)
        b_hidden = hidden_positions(corner, common, row_lo, row_size, inner, count, CHUNK, RANK, PERIODIC)
        mbarrier.wait(ready.index(i_stage), phase)
        b_s = warpgroup_mma_wait(0, deps=[start_pair_scores(queries, keys, i_stage, b_hidden, N)])
        b_p, row_m, part_l, row_alpha = pair_weights(b_s, row_m, part_l, row_factor)
        # Tensor cores round sums towards zero, so those of chunks are added outside of them.
        b_sum = start_pair_sum(b_p, values, i_stage)
        b_acc = b_acc * gl.convert_layout(row_alpha, gl.SliceLayout(1, SUMS))[:, None]
        b_acc += warpgroup_mma_wait(0, deps=[b_sum])
        corner = next_chunk(corner, lo, hi, count, CHUNK, RANK, PERIODIC)
        thread_barrier()  # the stage has been read
        if n + STAGES < chunks:
            first = on_rings(ahead, count, PERIODIC)
            start_chunk(descs, rings, ready, n + STAGES, i_kv, i_frame, first, CHUNK, COLUMNS, STAGES)
        ahead = next_chunk(ahead, lo, hi, count, CHUNK, RANK, PERIODIC)

    row_l = gl.sum(part_l, 1) * WEIGHT_UNIT
    if all_finite(nonfinite_flags(b_acc, row_l)):
        b_out = divided(b_acc * (gl.load(p_units + 1) * WEIGHT_UNIT), row_l, gl.float32)
        o_out, m_out = (
            gl.convert_layout(o_row, gl.SliceLayout(1, SUMS)),
            gl.convert_layout(m_rows, gl.SliceLayout(1, SUMS)),
        )
        store_rows(Out, o_out, m_out, b_out, D, SUMS)
        if SPEC.with_stats:
            row_sum = gl.convert_layout(row_l, ROW)
            gl.store(RowMax + o_row, saved_maxima(row_m, row_sum, None), mask=m_rows)
            gl.store(RowSum + o_row, row_sum, mask=m_rows)
    else:
        attend_rows(
            (Q, K, V, None, None, Sink, Out, None, None, None), (RowMax, RowSum), (strides, None),
            i_batch, i_block, origin,
            (length, kernel, stride, heads), (residue, count, dilation, None), group, None, sink, scale * LOG2E,
            (None, None, None, None, None, None), SPEC, NO_PREP,
        )  # fmt: skip


# --- On the host


class PairCall(NamedTuple):
    """What all calls of a problem share: the launches that split two tensors, and the kernel's."""

    split: Split
    launch: Call


def pair_boxes(config: MediumTileConfig, problem: Problem, *tensors: Layout) -> list[Boxes]:
    """The descriptors of pairs, each for chunks of half of the columns."""
    *_, dilation = problem.geometry
    every = [chunk_boxes(pair_layout(x), config.chunk, config.chunk_pack, dilation) for x in tensors]
    return [boxes_of(x["shape"], x["strides"], [*x["block_shape"][:-1], config.columns[0]]) for x in every]


def forward(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options, with_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ``portable.forward.forward`` computes. Allocates copies of keys and values beside its results."""
    query, key, value = inputs.query, inputs.key, inputs.value
    call = prepare(config, problem, with_stats)
    key_pair, value_pair, units = call.split(problem, key, value)
    out, row_max, row_sum = new_results(query, value.shape[-1], with_stats)
    pointers = query, key, value, units, out, row_max, row_sum, inputs.sink
    call.launch(pointers, (key_pair, value_pair), (options.sink_value, options.scale))
    return out, row_max, row_sum


@lru_cache(maxsize=1024)
def prepare(config: MediumTileConfig, p: Problem, with_stats: bool) -> PairCall:
    blocks, tiles = p.query.shape[-2] // config.pack, p.tiles(config.tile)
    launch = call_of(
        medium_pair_forward_kernel,
        (prod(tiles) * blocks, p.query.shape[0]),
        (p.input_strides(), p.geometry, tiles, frames_of(p), p.group, blocks),
        pair_boxes(config, p, p.key, p.value),
        SPEC=spec_of(config, p, with_stats), CHUNK=config.chunk, COLUMNS=config.columns, STAGES=config.stages,
        SIDE=config.side, num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
    return PairCall(split_of(p, p.key, p.value), launch)
