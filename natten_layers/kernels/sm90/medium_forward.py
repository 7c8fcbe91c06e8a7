"""The forward pass of windows between small and large on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/forward.py`` computes. As in ``small_forward.py`` a program computes one tile, and several
programs share a multiprocessor. What the tile sees does not fit into its share of shared memory, so TMA loads it chunk
by chunk into a ring: first the register tokens, then the window. A head whose width is no power of two is stored as two
or three boxes of columns side by side, which are parts of the columns here.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from functools import lru_cache
from math import prod

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.language.nvidia.hopper.tma import store_wait

from ..host.problem import Inputs, Options, Problem, contiguous, new_results
from ..portable.primitives import LOG2E
from ..portable.windows import bias_offset, clamped, shifted, union_of_windows, unravel, windows_of
from .descriptors import Call, call_of
from .masked_keys import divisors, has_masked, saved_maxima, unmasked_keys, without_masked
from .medium_chunks import (
    chunks_over,
    first_chunk,
    hidden_chunk,
    next_chunk,
    register_chunk_count,
    seen_by_all,
    with_biases,
)
from .medium_parts import (
    both_frames,
    boxes_of_rows,
    boxes_of_seen,
    by_parts,
    bytes_of,
    chunks_of,
    start_first_chunks,
    start_products,
    start_rows,
    start_seen_chunk,
    start_store,
    start_sums,
)
from .medium_tiling import MediumTileConfig, spec_of
from .online_softmax import (
    LEAST_SUM,
    are_usable,
    initial_stats,
    references_of_tile,
    row_maximum,
    softmax_weights,
    weights,
)
from .primitives import class_rows, row_biases, thread_barrier
from .products import finished, new_sums, scaled_sums
from .rings import new_barriers, new_stages, stage_of
from .small_forward import NO_PREP
from .small_nonfinite import attend_rows
from .small_softmax import WARPS, all_finite, divided, nonfinite_flags
from .small_tiles import first_frame, own_tile, present_descriptors
from .walk import row_sizes


@gluon.jit
def hidden_scores(rows, columns, i_stage, b_hidden, BIASED: gl.constexpr, FIRST: gl.constexpr = 0):
    """Start to compute scores of rows and of a chunk from ``FIRST`` on, -inf where they are hidden; with biases, which
    are added to scores that are scaled, only the products.
    """
    if BIASED:
        b_s = start_products(rows, columns, i_stage, None, b_hidden.shape[1], FIRST)
    else:
        b_s = start_products(rows, columns, i_stage, b_hidden, b_hidden.shape[1], FIRST)
    return b_s


@gluon.jit
def scaled_scores(b_s, b_hidden, factor, BIASED: gl.constexpr):
    """With biases the base-2 logits of scores, else the scores themselves, which are scaled later."""
    if BIASED:
        b_s = b_s * factor + b_hidden
    return b_s


@gluon.jit
def attend_chunk(
    queries, keys, values, i_stage, b_hidden, sums, row_m, part_l, pending, exact, factor, BIASED: gl.constexpr,
    FIRST_MAXIMA: gl.constexpr,
):  # fmt: skip
    """Start to add a chunk, which has arrived, to the sums of weighted values; returns these, new references and sums
    of weights, and whether references are still ``pending``.
    """
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, sums[0].type.layout, 2)
    b_s = hidden_scores(queries, keys, i_stage, b_hidden, BIASED)
    b_s = scaled_scores(warpgroup_mma_wait(0, deps=[b_s]), b_hidden, factor, BIASED)
    factor = 1.0 if BIASED else factor
    row_alpha = None
    if FIRST_MAXIMA:
        if pending:
            row_m, part_l, row_shrink, pending = references_of_tile(b_s, row_m, part_l, factor, exact)
            sums = scaled_sums(sums, row_shrink)
        b_p, part_l = weights(b_s, row_m, part_l, factor, queries[0].dtype, WEIGHTS)
    else:
        row_max = gl.convert_layout(row_maximum(b_s), row_m.type.layout)
        b_p, row_m, part_l, row_alpha = softmax_weights(b_s, row_max, row_m, part_l, factor, queries[0].dtype, WEIGHTS)
    return start_sums(b_p, values, i_stage, sums, row_alpha), row_m, part_l, pending


@gluon.jit
def sums_flags(sums, row_l):
    """``nonfinite_flags`` of all parts of the columns."""
    flags = nonfinite_flags(sums[0], row_l)
    for PART in gl.static_range(1, len(sums)):
        flags += nonfinite_flags(sums[PART], row_l)
    return flags


@gluon.jit
def divided_sums(sums, row_l, DTYPE: gl.constexpr):
    results = ()
    for PART in gl.static_range(len(sums)):
        results = results + (divided(sums[PART], row_l, DTYPE),)  # noqa: RUF005
    return results


@gluon.jit
def medium_forward_kernel(
    Q, K, V, Out, RowMax, RowSum, RegK, RegV, Sink, KeyMask, Rpb,
    q0_desc, q1_desc, q2_desc, out0_desc, out1_desc, out2_desc,
    k0_desc, k1_desc, k2_desc, v0_desc, v1_desc, v2_desc,
    regk0_desc, regk1_desc, regk2_desc, regv0_desc, regv1_desc, regv2_desc,
    strides, mask_strides, axes, key_length, tiles, frames, group, blocks, registers, sink, scale,
    SPEC: gl.constexpr, CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SIDE: gl.constexpr,
    FIRST_MAXIMA: gl.constexpr,
):  # fmt: skip
    """Attention of one tile; the grid is (tiles * blocks of heads, batch).

    Arguments are as in ``small_forward.py``, but a tensor has a descriptor for each part of its ``COLUMNS``, and
    ``registers`` is None if there are no register tokens. ``KeyMask`` is None if no key is masked, and
    ``Rpb`` if there are no biases. ``frames`` are those of queries and of keys. ``key_length`` is that of the keys'
    axes if they are on another grid, else None. ``FIRST_MAXIMA``: whether rows keep the references of the first chunk
    (``online_softmax.py``); a tile for which these are too far off is computed once more, with maxima.
    """
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    PERIODIC: gl.constexpr = SPEC.periodic
    BIASED: gl.constexpr = Rpb is not None
    M: gl.constexpr = SPEC.rows
    TILE: gl.constexpr = SPEC.tile
    PACK: gl.constexpr = SPEC.pack
    RANK: gl.constexpr = SPEC.rank
    SINK: gl.constexpr = SPEC.sink
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    PARTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 8, 16])
    q_descs = present_descriptors(q0_desc, q1_desc, q2_desc)
    out_descs = present_descriptors(out0_desc, out1_desc, out2_desc)
    k_descs, v_descs = present_descriptors(k0_desc, k1_desc, k2_desc), present_descriptors(v0_desc, v1_desc, v2_desc)
    register_descs = None
    if registers is not None:
        regv_descs = present_descriptors(regv0_desc, regv1_desc, regv2_desc)
        register_descs = present_descriptors(regk0_desc, regk1_desc, regk2_desc) + regv_descs

    i_batch, i_block, residue, count, origin = own_tile(length, dilation, tiles, blocks, TILE, SIDE)
    key_count = count if key_length is None else key_length
    lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC, key_length)
    common = seen_by_all(inner_lo, inner_hi, SPEC)
    chunks, heads = (
        register_chunk_count(registers, CHUNK) + chunks_over(lo, hi, key_count, CHUNK, PERIODIC),
        blocks * PACK,
    )
    i_kv, i_frame = i_block * PACK // group, first_frame(i_batch, residue, length, frames[1])
    ready = new_barriers(STAGES + 1, 1)  # for the stages of the ring, and for the tile
    mbarrier.expect(ready.index(STAGES), bytes_of(M, COLUMNS))
    q_corner = first_frame(i_batch, residue, length, frames[0]) + origin[0], origin[1], origin[2], i_block * PACK
    queries = start_rows(q_descs, q_corner, ready.index(STAGES), COLUMNS)
    keys, values = new_stages(k_descs, STAGES), new_stages(v_descs, STAGES)
    descs, rings = k_descs + v_descs, keys + values
    ahead = start_first_chunks(
        descs, register_descs, rings, ready, 0, chunks, i_kv, i_batch, i_frame, lo, hi, registers, key_count, CHUNK,
        COLUMNS, STAGES, RANK, PERIODIC,
    )  # fmt: skip

    row = gl.arange(0, M, ROW)
    position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
    index = shifted(position, origin)
    row_lo, row_hi = windows_of(index, count, kernel, stride, CAUSAL, PERIODIC, key_length)
    p_biases = row_biases(Rpb, clamped(index, count), head, kernel)
    row_size = row_sizes(row_lo, row_hi)
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    may_see_nothing = True if KeyMask is not None or BIASED else None
    row_m, part_l = initial_stats(Sink, head, sink, SINK, M, ROW, PARTS)
    row_l, sums = gl.sum(part_l, 1), new_sums(M, COLUMNS)
    first = 0  # chunks that earlier attempts have loaded
    sound = False
    exact = False
    ended = False
    mbarrier.wait(ready.index(STAGES), 0)
    while not ended:
        pending, corner = True, first_chunk(lo, registers, CHUNK)
        seen = unmasked_keys(
            KeyMask, mask_strides, i_batch, corner, lo, residue, key_count, dilation, CHUNK, RANK, PERIODIC
        )  # fmt: skip
        for n in range(first, first + chunks):
            i_stage, phase = stage_of(n, STAGES)
            b_hidden = hidden_chunk(
                corner, common, lo, registers, row_lo, row_size, inner, key_count, CHUNK, RANK, PERIODIC, SCORES
            )  # fmt: skip
            b_hidden = with_biases(b_hidden, p_biases, bias_offset(shifted(inner, corner), kernel), corner[2] >= lo[2])
            masked = has_masked(seen)
            mbarrier.wait(ready.index(i_stage), phase)
            b_hidden = without_masked(b_hidden, masked, seen, chunks_of(rings, i_stage, N))
            sums, row_m, part_l, pending = attend_chunk(
                queries, keys, values, i_stage, b_hidden, sums, row_m, part_l, pending, exact, scale * LOG2E, BIASED,
                FIRST_MAXIMA,
            )  # fmt: skip
            corner = next_chunk(corner, lo, hi, key_count, CHUNK, RANK, PERIODIC)
            seen = unmasked_keys(
                KeyMask, mask_strides, i_batch, corner, lo, residue, key_count, dilation, CHUNK, RANK, PERIODIC
            )  # fmt: skip
            sums = finished(sums)
            thread_barrier()  # the stage has been read
            if n + STAGES < first + chunks:
                start_seen_chunk(
                    descs, register_descs, rings, ready, n + STAGES, i_kv, i_batch, i_frame, ahead, lo, registers,
                    key_count, CHUNK, COLUMNS, STAGES, PERIODIC,
                )  # fmt: skip
            ahead = next_chunk(ahead, lo, hi, key_count, CHUNK, RANK, PERIODIC)

        row_l = gl.sum(part_l, 1)
        row_sound = divisors(gl.convert_layout(row_m, row_l.type.layout), row_l, may_see_nothing)
        if FIRST_MAXIMA:
            row_sound = are_usable(row_l, gl.where(exact, 0.5, LEAST_SUM))
        sound = all_finite(sums_flags(sums, row_sound))
        ended = True
        if FIRST_MAXIMA:
            ended = sound | exact
            if not ended:
                exact = True
                first += chunks
                row_m, part_l = initial_stats(Sink, head, sink, SINK, M, ROW, PARTS)
                sums = new_sums(M, COLUMNS)
                ahead = start_first_chunks(
                    descs, register_descs, rings, ready, first, chunks, i_kv, i_batch, i_frame, lo, hi, registers,
                    key_count, CHUNK, COLUMNS, STAGES, RANK, PERIODIC,
                )  # fmt: skip

    row_weight = divisors(gl.convert_layout(row_m, row_l.type.layout), row_l, may_see_nothing)
    if sound:
        start_store(divided_sums(sums, row_weight, queries[0].dtype), queries, out_descs, q_corner, COLUMNS)
        if SPEC.with_stats:
            m_rows, o_row = class_rows(position, head, i_batch, origin, residue, count, dilation, length, heads)
            row_sum = gl.convert_layout(row_l, ROW)
            gl.store(RowMax + o_row, saved_maxima(row_m, row_sum, may_see_nothing), mask=m_rows)
            gl.store(RowSum + o_row, row_sum, mask=m_rows)
        store_wait(0)
    else:
        attend_rows(
            (Q, K, V, RegK, RegV, Sink, Out, None, KeyMask, Rpb), (RowMax, RowSum), (strides, mask_strides),
            i_batch, i_block, origin,
            (length, kernel, stride, heads), (residue, count, dilation, key_length), group, registers, sink,
            scale * LOG2E,
            (None, None, None, None, None, None), SPEC, NO_PREP,
        )  # fmt: skip


def forward(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options, with_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ``portable.forward.forward`` computes, for calls that ``dispatch`` sends here. Allocates its results."""
    query, key, value, reg_keys, reg_values, sink, *_ = inputs
    out, row_max, row_sum = new_results(query, query.shape[-1], with_stats)
    pointers = query, key, value, out, row_max, row_sum, reg_keys, reg_values, sink, inputs.key_mask, inputs.rpb
    call = prepare(config, problem, with_stats)
    call(pointers, by_parts(query, out, key, value, reg_keys, reg_values), (options.sink_value, options.scale))
    return out, row_max, row_sum


@lru_cache(maxsize=1024)
def prepare(config: MediumTileConfig, p: Problem, with_stats: bool) -> Call:
    """What all calls of a problem share."""
    blocks, tiles = p.query.shape[-2] // config.pack, p.tiles(config.tile)
    return call_of(
        medium_forward_kernel,
        (prod(tiles) * blocks, p.query.shape[0]),
        (
            p.input_strides(), p.mask_strides, p.geometry, p.key_lengths, tiles, both_frames(p), p.group, blocks,
            p.registers or None,
        ),
        [*boxes_of_rows(config, p, p.query, contiguous(p.query.shape)), *boxes_of_seen(config, p)],
        SPEC=spec_of(config, p, with_stats), CHUNK=config.chunk, COLUMNS=config.columns, STAGES=config.stages,
        SIDE=config.side, FIRST_MAXIMA=config.first_maxima, num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
