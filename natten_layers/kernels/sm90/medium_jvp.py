"""Forward-mode derivatives on compute capability 9.0 (H100, H200), in Gluon, with the methods of ``medium_forward.py``.

With ``SAVED`` the kernel computes what ``portable/jvp.py`` does, from the output and the statistics of a forward pass.
Without, one pass over the keys computes the output, its statistics and the tangents: the sums of weighted values and
those of their tangents shrink together when a row finds a new maximum. Tangents of scores are taken relative to that of
the key at the query's own place (``portable.jvp.reference_tangent`` says why).
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
from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared, store_wait

from ..host.problem import (
    Inputs,
    Layout,
    Options,
    Problem,
    SavedResults,
    Tangents,
    contiguous,
    layout,
    new_like,
    new_results,
)
from ..portable.primitives import LOG2E
from ..portable.windows import shifted, token_offset, tokens_of, union_of_windows, unravel, windows_of
from .descriptors import Call, call_of
from .masked_keys import (
    divisors,
    has_masked,
    image_mask,
    load_lse_or_zero,
    load_seen,
    saved_maxima,
    unmasked_keys,
    without_masked,
    without_masked_rows,
)
from .medium_backward import scaled_sums
from .medium_chunks import chunks_over, first_chunk, hidden_chunk, next_chunk, register_chunk_count, seen_by_all
from .medium_forward import divided_sums, hidden_scores, sums_flags
from .medium_parts import (
    both_frames,
    boxes_of_chunks,
    boxes_of_register_chunks,
    boxes_of_rows,
    by_parts,
    bytes_of,
    chunks_of,
    products_of_rows,
    rows_of,
    start_first_chunks,
    start_products,
    start_rows,
    start_seen_chunk,
    start_store,
    start_sums,
)
from .medium_tiling import MediumTileConfig, spec_of
from .online_softmax import added_by_eighths, initial_stats, row_maximum, unrounded_weights
from .primitives import class_rows, load_lse, row_sinks, thread_barrier
from .products import finished, first_column, new_sums, product_layout, split_sums
from .rings import new_barriers, new_stages, stage_of
from .small_forward import NO_PREP
from .small_nonfinite import attend_rows
from .small_softmax import WARPS, all_finite
from .small_tiles import first_frame, own_tile, present_descriptors
from .walk import row_sizes


@gluon.jit
def reference_tangents(
    K, KDot, k_strides, dot_strides, mask, i_batch, i_kv, index, residue, key_count, dilation, queries,
    query_dots, scale, D: gl.constexpr, COLUMNS: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """For each row, the tangent of the query's score with the key at its own place, or on another grid with some key;
    zero where that key is masked.
    """
    ROW: gl.constexpr = index[2].type.layout
    own = tokens_of(index, residue, key_count, dilation)
    o_k = i_batch.to(gl.int64) * k_strides[0] + i_kv.to(gl.int64) * k_strides[4] + token_offset(own, k_strides)
    o_dot = i_batch.to(gl.int64) * dot_strides[0] + i_kv.to(gl.int64) * dot_strides[4] + token_offset(own, dot_strides)
    m_rows = gl.full(o_k.shape, 1, gl.int1, ROW)  # behind the end of an axis stands its last token
    row_product = products_of_rows(K, o_k, m_rows, query_dots, D, COLUMNS, ROW)
    row_product += products_of_rows(KDot, o_dot, m_rows, queries, D, COLUMNS, ROW)
    if mask is not None:
        row_product = gl.where(load_seen(mask, index, RANK), row_product, 0.0)
    return row_product * scale


@gluon.jit
def start_score_tangents(queries, query_dots, keys, key_dots, i_stage, N: gl.constexpr):
    """Start to compute the tangents of scores, without the scale."""
    b_s_dot = start_products(query_dots, keys, i_stage, None, N)
    return start_products(queries, key_dots, i_stage, b_s_dot, N)


@gluon.jit
def loaded_rows(buffers):
    """The rows of a tile, from shared memory, in the layout of sums."""
    results = ()
    for PART in gl.static_range(len(buffers)):
        rows = rows_of(buffers[PART])
        results = results + (rows.load(product_layout(rows.shape[1])).to(gl.float32),)  # noqa: RUF005
    return results


@gluon.jit
def less_multiples(sums, row_mu, outs):
    """``sums - row_mu * outs``."""
    results = ()
    for PART in gl.static_range(len(sums)):
        row_factor = gl.convert_layout(row_mu, gl.SliceLayout(1, sums[PART].type.layout))
        results = results + (sums[PART] - row_factor[:, None] * outs[PART],)  # noqa: RUF005
    return results


@gluon.jit
def medium_jvp_kernel(
    Q, K, V, KDot, Out, RowMax, RowSum, LseDot, RegK, RegV, Sink, SinkDot, KeyMask,
    q0_desc, q1_desc, q2_desc, qdot0_desc, qdot1_desc, qdot2_desc, out0_desc, out1_desc, out2_desc,
    outdot0_desc, outdot1_desc, outdot2_desc, k0_desc, k1_desc, k2_desc, v0_desc, v1_desc, v2_desc,
    kdot0_desc, kdot1_desc, kdot2_desc, vdot0_desc, vdot1_desc, vdot2_desc,
    regk0_desc, regk1_desc, regk2_desc, regv0_desc, regv1_desc, regv2_desc,
    regkdot0_desc, regkdot1_desc, regkdot2_desc, regvdot0_desc, regvdot1_desc, regvdot2_desc,
    strides, kdot_strides, mask_strides, axes, key_length, tiles, frames, group, blocks, registers, sink, scale,
    SPEC: gl.constexpr, CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SIDE: gl.constexpr,
    SAVED: gl.constexpr,
):  # fmt: skip
    """Tangents of one tile, and without ``SAVED`` its output and statistics; arguments as in ``medium_forward.py``.

    Names with ``dot`` are tangents. ``regkdot`` and ``regvdot`` are None where register tokens have none.
    """
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    PERIODIC: gl.constexpr = SPEC.periodic
    M: gl.constexpr = SPEC.rows
    TILE: gl.constexpr = SPEC.tile
    PACK: gl.constexpr = SPEC.pack
    RANK: gl.constexpr = SPEC.rank
    SINK: gl.constexpr = SPEC.sink
    D: gl.constexpr = SPEC.head_dim
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    EIGHTHS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 8, 16])
    PARTS: gl.constexpr = len(COLUMNS)
    q_descs = present_descriptors(q0_desc, q1_desc, q2_desc)
    qdot_descs = present_descriptors(qdot0_desc, qdot1_desc, qdot2_desc)
    out_descs = present_descriptors(out0_desc, out1_desc, out2_desc)
    outdot_descs = present_descriptors(outdot0_desc, outdot1_desc, outdot2_desc)
    k_descs, v_descs = present_descriptors(k0_desc, k1_desc, k2_desc), present_descriptors(v0_desc, v1_desc, v2_desc)
    kdot_descs = present_descriptors(kdot0_desc, kdot1_desc, kdot2_desc)
    vdot_descs = present_descriptors(vdot0_desc, vdot1_desc, vdot2_desc)
    register_descs = None
    if registers is not None:
        regv_descs = present_descriptors(regv0_desc, regv1_desc, regv2_desc)
        register_descs = present_descriptors(regk0_desc, regk1_desc, regk2_desc) + regv_descs
        if regkdot0_desc is not None:
            regvdot_descs = present_descriptors(regvdot0_desc, regvdot1_desc, regvdot2_desc)
            regkdot_descs = present_descriptors(regkdot0_desc, regkdot1_desc, regkdot2_desc)
            register_descs = register_descs + regkdot_descs + regvdot_descs

    i_batch, i_block, residue, count, origin = own_tile(length, dilation, tiles, blocks, TILE, SIDE)
    key_count = count if key_length is None else key_length
    lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC, key_length)
    common = seen_by_all(inner_lo, inner_hi, SPEC)
    chunks = register_chunk_count(registers, CHUNK) + chunks_over(lo, hi, key_count, CHUNK, PERIODIC)
    heads = blocks * PACK
    i_kv, i_frame = i_block * PACK // group, first_frame(i_batch, residue, length, frames[1])
    # For the stages of the ring, for the tile, and for its output.
    ready = new_barriers(STAGES + 2, 1)
    mbarrier.expect(ready.index(STAGES), bytes_of(2 * M, COLUMNS))
    q_corner = first_frame(i_batch, residue, length, frames[0]) + origin[0], origin[1], origin[2], i_block * PACK
    queries = start_rows(q_descs, q_corner, ready.index(STAGES), COLUMNS)
    query_dots = start_rows(qdot_descs, q_corner, ready.index(STAGES), COLUMNS)
    keys, values = new_stages(k_descs, STAGES), new_stages(v_descs, STAGES)
    key_dots, value_dots = new_stages(kdot_descs, STAGES), new_stages(vdot_descs, STAGES)
    descs, rings = k_descs + v_descs + kdot_descs + vdot_descs, keys + values + key_dots + value_dots
    ahead = start_first_chunks(
        descs, register_descs, rings, ready, 0, chunks, i_kv, i_batch, i_frame, lo, hi, registers, key_count, CHUNK,
        COLUMNS, STAGES, RANK, PERIODIC,
    )  # fmt: skip

    row = gl.arange(0, M, ROW)
    position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
    index = shifted(position, origin)
    row_lo, row_hi = windows_of(index, count, kernel, stride, CAUSAL, PERIODIC, key_length)
    row_size = row_sizes(row_lo, row_hi)
    mask, may_see_nothing = None, None
    if KeyMask is not None:
        mask, may_see_nothing = image_mask(KeyMask, mask_strides, i_batch, residue, key_count, dilation), True
    mbarrier.wait(ready.index(STAGES), 0)
    row_reference = reference_tangents(
        K, KDot, strides[1], kdot_strides, mask, i_batch, i_kv, index, residue, key_count, dilation, queries,
        query_dots, scale, D, COLUMNS, RANK,
    )  # fmt: skip
    row_sink_dot = -row_reference
    if SinkDot is not None:
        row_sink_dot += gl.load(SinkDot + head).to(gl.float32)
    row_m, part_l = initial_stats(Sink, head, sink, SINK, M, ROW, EIGHTHS)
    if SAVED:
        m_rows, o_row = class_rows(position, head, i_batch, origin, residue, count, dilation, length, heads)
        if KeyMask is not None:
            row_m, row_sees = load_lse_or_zero(RowMax, RowSum, o_row, m_rows)
        else:
            row_m = load_lse(RowMax, RowSum, o_row, m_rows)
        row_of_sink = gl.exp2(row_sinks(Sink, head, sink, SINK) - row_m)
        part_mu = (
            gl.zeros([M, 8], gl.float32, EIGHTHS)
            + gl.convert_layout(0.125 * row_of_sink * row_sink_dot, gl.SliceLayout(1, EIGHTHS))[:, None]
        )
    else:
        part_mu = part_l * gl.convert_layout(row_sink_dot, gl.SliceLayout(1, EIGHTHS))[:, None]

    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    sums, dots, corner = new_sums(M, COLUMNS), new_sums(M, COLUMNS), first_chunk(lo, registers, CHUNK)
    seen = unmasked_keys(
        KeyMask, mask_strides, i_batch, corner, lo, residue, key_count, dilation, CHUNK, RANK, PERIODIC
    )  # fmt: skip
    for n in range(chunks):
        i_stage, phase = stage_of(n, STAGES)
        b_hidden = hidden_chunk(
            corner, common, lo, registers, row_lo, row_size, inner, key_count, CHUNK, RANK, PERIODIC, SCORES
        )  # fmt: skip
        masked = has_masked(seen)
        mbarrier.wait(ready.index(i_stage), phase)
        b_hidden = without_masked(b_hidden, masked, seen, chunks_of(rings, i_stage, N))
        b_s = hidden_scores(queries, keys, i_stage, b_hidden, False)
        b_s_dot = start_score_tangents(queries, query_dots, keys, key_dots, i_stage, N)
        b_s = warpgroup_mma_wait(2 * PARTS, deps=[b_s])
        if SAVED:
            row_alpha = None
            b_p = gl.exp2(b_s * (scale * LOG2E) - row_m[:, None])
        else:
            row_max = gl.convert_layout(row_maximum(b_s), ROW)
            b_p, row_m, part_l, row_alpha = unrounded_weights(b_s, row_max, row_m, part_l, scale * LOG2E)
        b_s_dot = warpgroup_mma_wait(0, deps=[b_s_dot])
        b_moving = b_p * (b_s_dot * scale - row_reference[:, None])
        part_mu = added_by_eighths(part_mu, row_alpha, b_moving)
        b_weights = b_p.to(queries[0].dtype)
        dots = start_sums(b_weights, value_dots, i_stage, dots, row_alpha)
        dots = start_sums(b_moving.to(queries[0].dtype), values, i_stage, dots, None)
        if not SAVED:
            sums = start_sums(b_weights, values, i_stage, sums, row_alpha)
        corner = next_chunk(corner, lo, hi, key_count, CHUNK, RANK, PERIODIC)
        seen = unmasked_keys(
            KeyMask, mask_strides, i_batch, corner, lo, residue, key_count, dilation, CHUNK, RANK, PERIODIC
        )  # fmt: skip
        if SAVED:
            dots = finished(dots)
        else:
            sums, dots = split_sums(finished(sums + dots), len(sums))
        thread_barrier()  # the stage has been read
        if n + STAGES < chunks:
            start_seen_chunk(
                descs, register_descs, rings, ready, n + STAGES, i_kv, i_batch, i_frame, ahead, lo, registers,
                key_count, CHUNK, COLUMNS, STAGES, PERIODIC,
            )  # fmt: skip
        ahead = next_chunk(ahead, lo, hi, key_count, CHUNK, RANK, PERIODIC)

    row_mu = gl.convert_layout(gl.sum(part_mu, 1), ROW)
    m_rows, o_row = class_rows(position, head, i_batch, origin, residue, count, dilation, length, heads)
    if SAVED:
        mbarrier.expect(ready.index(STAGES + 1), bytes_of(M, COLUMNS))
        for PART in gl.static_range(PARTS):
            at = [q_corner[0], q_corner[1], q_corner[2], q_corner[3], first_column(COLUMNS, PART)]
            async_copy_global_to_shared(out_descs[PART], at, ready.index(STAGES + 1), queries[PART])
        mbarrier.wait(ready.index(STAGES + 1), 0)
        sums = loaded_rows(queries)
    else:
        row_l = gl.convert_layout(gl.sum(part_l, 1), ROW)
        row_weight = divisors(row_m, row_l, may_see_nothing)
        sound = all_finite(sums_flags(sums, row_weight))
        sums, dots = divided_sums(sums, row_weight, gl.float32), divided_sums(dots, row_weight, gl.float32)
        row_mu /= row_weight
        row_sees = row_l != 0.0
    dots, row_mu = less_multiples(dots, row_mu, sums), row_mu + row_reference
    if KeyMask is not None:
        dots, row_mu = without_masked_rows(dots, row_sees.to(gl.int32)), gl.where(row_sees, row_mu, 0.0)
    gl.store(LseDot + o_row, row_mu, mask=m_rows)
    start_store(scaled_sums(dots, 1.0, queries[0].dtype), query_dots, outdot_descs, q_corner, COLUMNS)
    if not SAVED:
        if sound:
            start_store(scaled_sums(sums, 1.0, queries[0].dtype), queries, out_descs, q_corner, COLUMNS)
            gl.store(RowMax + o_row, saved_maxima(row_m, row_l, may_see_nothing), mask=m_rows)
            gl.store(RowSum + o_row, row_l, mask=m_rows)
        else:
            store_wait(0)  # attend_rows may take the shared memory of what is being stored
            thread_barrier()
            attend_rows(
                (Q, K, V, RegK, RegV, Sink, Out, None, KeyMask, None), (RowMax, RowSum), (strides, mask_strides),
                i_batch, i_block, origin,
                (length, kernel, stride, heads), (residue, count, dilation, key_length), group, registers, sink,
                scale * LOG2E,
                (None, None, None, None, None, None), SPEC, NO_PREP,
            )  # fmt: skip
    store_wait(0)


def forward_with_tangents(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``dispatch.forward_with_tangents`` returns. Allocates its results."""
    out, row_max, row_sum = new_results(inputs.query, inputs.query.shape[-1], True)
    assert row_max is not None
    assert row_sum is not None
    results = out, row_max, row_sum
    return *results, *_launch(config, problem, inputs, options, results, tangents, saved=False)


def jvp(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options, saved: SavedResults,
    tangents: Tangents,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What ``portable.jvp.jvp`` computes, for calls that ``dispatch`` sends here. Allocates its results."""
    return _launch(config, problem, inputs, options, saved, tangents, saved=True)


def _launch(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options,
    results: tuple[Tensor, Tensor, Tensor], tangents: Tangents, *, saved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, key, value, reg_keys, reg_values, sink, *_ = inputs
    out, row_max, row_sum = results
    out_tangent, lse_tangent = new_like(out), new_like(row_max)
    query_dot, key_dot, value_dot, reg_keys_dot, reg_values_dot, sink_dot = tangents
    pointers = (
        query, key, value, key_dot, out, row_max, row_sum, lse_tangent, reg_keys, reg_values, sink, sink_dot,
        inputs.key_mask,
    )  # fmt: skip
    described = by_parts(
        query, query_dot, out, out_tangent, key, value, key_dot, value_dot, reg_keys, reg_values, reg_keys_dot,
        reg_values_dot,
    )  # fmt: skip
    layouts = tuple(None if x is None else layout(x) for x in tangents.addressed)
    prepare(config, problem, layouts, saved)(pointers, described, (options.sink_value, options.scale))
    return out_tangent, lse_tangent


@lru_cache(maxsize=1024)
def prepare(config: MediumTileConfig, p: Problem, tangents: tuple[Layout | None, ...], saved: bool) -> Call:
    """What all calls of a problem with tangents of these layouts share."""
    query, key, value, *registers = tangents
    assert query is not None
    assert key is not None
    assert value is not None
    blocks, tiles, out = p.query.shape[-2] // config.pack, p.tiles(config.tile), contiguous(p.query.shape)
    return call_of(
        medium_jvp_kernel,
        (prod(tiles) * blocks, p.query.shape[0]),
        (
            p.input_strides(), p.strides_of(key), p.mask_strides, p.geometry, p.key_lengths, tiles, both_frames(p),
            p.group, blocks, p.registers or None,
        ),
        [
            *boxes_of_rows(config, p, p.query, query, out, out),
            *boxes_of_chunks(config, p, p.key, p.value, key, value),
            *boxes_of_register_chunks(config, p.additional_keys, p.additional_values, *registers),
        ],
        SPEC=spec_of(config, p, with_stats=True), CHUNK=config.chunk, COLUMNS=config.columns, STAGES=config.stages,
        SIDE=config.side, SAVED=saved, num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
