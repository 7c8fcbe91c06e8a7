"""The forward pass of windows between small and large on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/forward.py`` computes. As in ``small_forward.py`` a program computes one tile, and several
programs share a multiprocessor. What the tile sees does not fit into its share of shared memory, so TMA loads it chunk
by chunk into a ring: first the register tokens, then the window. A head whose width is no power of two is stored as two
or three boxes of columns side by side, which are parts of the columns here.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    async_copy_global_to_shared,
    async_copy_shared_to_global,
    store_wait,
)

from ..host.problem import Inputs, Layout, Options, Problem, contiguous, new_results
from ..portable.primitives import LOG2E
from ..portable.windows import bias_offset, clamped, shifted, union_of_windows, unravel, windows_of
from .descriptors import Boxes, Call, boxes_of, boxes_of_registers, call_of, frames_of, key_boxes, query_boxes
from .large_forward import initial_stats, row_maximum, softmax_weights
from .masked_keys import divisors, has_masked, saved_maxima, unmasked_keys, without_masked
from .medium_chunks import (
    chunks_over,
    first_chunk,
    first_register_at,
    hidden_chunk,
    next_chunk,
    register_chunk_count,
    with_biases,
)
from .medium_tiling import COLUMN_PARTS, MediumTileConfig, spec_of
from .primitives import class_rows, opaque_i32, row_biases, start_product, thread_barrier
from .rings import new_barriers, new_stages, stage_of
from .small_forward import (
    NO_PREP,
)
from .small_nonfinite import attend_rows
from .small_softmax import WARPS, all_finite, divided, nonfinite_flags
from .small_tiles import (
    first_frame,
    own_tile,
    present_descriptors,
    start_load,
)
from .walk import on_rings, row_sizes


@gluon.constexpr_function
def first_column(columns, part):
    return sum(columns[:part])


@gluon.constexpr_function
def width_of(columns, part):
    return columns[part]


@gluon.constexpr_function
def bytes_of(rows, columns):
    """Bytes of rows of a tensor with elements of two bytes."""
    return 2 * rows * sum(columns)


@gluon.jit
def start_rows(descs, corner, ready, COLUMNS: gl.constexpr):
    """Start to load all columns of the rows of a tile; returns a buffer for each part of the columns."""
    buffers = ()
    for PART in gl.static_range(len(descs)):
        at = [corner[0], corner[1], corner[2], corner[3], first_column(COLUMNS, PART)]
        buffers = buffers + (start_load(descs[PART], at, ready),)  # noqa: RUF005
    return buffers


@gluon.jit
def start_chunk(
    descs, rings, ready, n, i_head, i_frame, corner, CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Start to load the ``n``-th chunk of one head of two tensors, all columns, into its stage of the rings."""
    i_stage, _ = stage_of(n, STAGES)
    PARTS: gl.constexpr = len(COLUMNS)
    mbarrier.expect(ready.index(i_stage), bytes_of(2 * CHUNK[0] * CHUNK[1] * CHUNK[2], COLUMNS))
    for i in gl.static_range(2 * PARTS):
        at = [i_head, i_frame + corner[0], corner[1], corner[2], first_column(COLUMNS, i % PARTS)]
        async_copy_global_to_shared(descs[i], at, ready.index(i_stage), rings[i].index(i_stage))


@gluon.jit
def start_register_chunk(
    descs, rings, ready, n, i_head, i_batch, first, COLUMNS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The same for a chunk of register tokens, from ``first`` on. Tokens that all images share have a batch of one."""
    i_stage, _ = stage_of(n, STAGES)
    PARTS: gl.constexpr = len(COLUMNS)
    mbarrier.expect(ready.index(i_stage), bytes_of(2 * descs[0].block_type.shape[1], COLUMNS))
    for i in gl.static_range(2 * PARTS):
        # Opaque, as LLVM would otherwise keep a number for each descriptor during the whole loop.
        i_own = gl.minimum(opaque_i32(i_batch), descs[i].shape[0] - 1)
        at = [i_own, first, i_head, first_column(COLUMNS, i % PARTS)]
        buffer = rings[i].index(i_stage).reshape(descs[i].block_type.shape)
        async_copy_global_to_shared(descs[i], at, ready.index(i_stage), buffer)


@gluon.jit
def start_seen_chunk(
    descs, register_descs, rings, ready, n, i_head, i_batch, i_frame, corner, lo, registers, count,
    CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, PERIODIC: gl.constexpr,
):  # fmt: skip
    """Start to load the ``n``-th chunk that a tile of queries sees: of its window, or of register tokens before it."""
    first_key = on_rings(corner, count, PERIODIC)
    if registers is None:
        start_chunk(descs, rings, ready, n, i_head, i_frame, first_key, CHUNK, COLUMNS, STAGES)
    elif corner[2] < lo[2]:
        first = first_register_at(corner, lo, registers, CHUNK)
        start_register_chunk(register_descs, rings, ready, n, i_head, i_batch, first, COLUMNS, STAGES)
    else:
        start_chunk(descs, rings, ready, n, i_head, i_frame, first_key, CHUNK, COLUMNS, STAGES)


@gluon.jit
def rows_of(buffer):
    """A box of rows of a tile as a matrix."""
    BOX: gl.constexpr = buffer.shape
    return buffer.reshape([BOX[0] * BOX[1] * BOX[2] * BOX[3], BOX[4]])


@gluon.jit
def chunk_of(ring, i_stage, FIRST: gl.constexpr, N: gl.constexpr):
    """Rows ``FIRST`` to ``FIRST + N - 1`` of the chunk in a stage, ``[N, columns]``."""
    ALL: gl.constexpr = ring.shape[2] * ring.shape[3] * ring.shape[4]
    COLUMNS: gl.constexpr = ring.shape[5]
    matrix = ring.index(i_stage).reshape([ALL, COLUMNS])
    if ALL != N:
        matrix = matrix.slice(FIRST, N)
    return matrix


@gluon.jit
def chunks_of(rings, i_stage, N: gl.constexpr):
    """:func:`chunk_of` for all rings, and all rows of the chunk."""
    matrices = ()
    for i in gl.static_range(len(rings)):
        matrices = matrices + (chunk_of(rings[i], i_stage, 0, N),)  # noqa: RUF005
    return matrices


@gluon.jit
def start_products(buffers, rings, i_stage, b_acc, N: gl.constexpr, FIRST: gl.constexpr = 0):
    """Start the product of a tile with the transpose of ``N`` rows of a chunk, from ``FIRST`` on, added to ``b_acc``
    unless that is None.
    """
    for PART in gl.static_range(len(buffers)):
        b_acc = start_product(rows_of(buffers[PART]), chunk_of(rings[PART], i_stage, FIRST, N), b_acc)
    return b_acc


@gluon.constexpr_function
def sums_layout(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def new_sum(M: gl.constexpr, N: gl.constexpr):
    LAYOUT: gl.constexpr = sums_layout(N)
    return gl.zeros([M, N], gl.float32, LAYOUT)


@gluon.jit
def new_sums(M: gl.constexpr, COLUMNS: gl.constexpr):
    sums = ()
    for PART in gl.static_range(len(COLUMNS)):
        sums = sums + (new_sum(M, width_of(COLUMNS, PART)),)  # noqa: RUF005
    return sums


@gluon.jit
def start_sum(b_weights, b_chunk, b_sum, row_alpha):
    LAYOUT: gl.constexpr = sums_layout(b_chunk.shape[1])
    if row_alpha is not None:
        b_sum = b_sum * gl.convert_layout(row_alpha, gl.SliceLayout(1, LAYOUT))[:, None]
    b_weights = gl.convert_layout(b_weights, gl.DotOperandLayout(0, LAYOUT, 2))
    return warpgroup_mma(b_weights, b_chunk, b_sum, is_async=True)


@gluon.jit
def start_sums(b_weights, rings, i_stage, sums, row_alpha, FIRST: gl.constexpr = 0):
    """Start to add rows of a chunk, from ``FIRST`` on, weighted by ``b_weights [M, N]``, to sums. These are multiplied
    by ``row_alpha [M]`` first, unless that is None.
    """
    started = ()
    for PART in gl.static_range(len(sums)):
        b_chunk = chunk_of(rings[PART], i_stage, FIRST, b_weights.shape[1])
        started = started + (start_sum(b_weights, b_chunk, sums[PART], row_alpha),)  # noqa: RUF005
    return started


@gluon.jit
def finished(sums):
    """Sums, once all products that have been started are done."""
    done = warpgroup_mma_wait(0, deps=sums)
    if len(sums) == 1:
        done = (done,)
    return done


@gluon.jit
def start_store(results, buffers, descs, corner, COLUMNS: gl.constexpr):
    """Start to store the rows of a tile by way of buffers of a tile that nothing reads any more."""
    for PART in gl.static_range(len(results)):
        rows_of(buffers[PART]).store(results[PART])
    # One thread starts all copies, and every thread has to make its writes visible to them first.
    fence_async_shared()
    thread_barrier()
    for PART in gl.static_range(len(results)):
        at = [corner[0], corner[1], corner[2], corner[3], first_column(COLUMNS, PART)]
        async_copy_shared_to_global(descs[PART], at, buffers[PART])


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
    queries, keys, values, i_stage, b_hidden, sums, row_m, part_l, factor, BIASED: gl.constexpr = False
):  # fmt: skip
    """Start to add a chunk, which has arrived, to the sums of weighted values; returns new maxima and sums of weights,
    as ``softmax_weights`` does.
    """
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, sums[0].type.layout, 2)
    b_s = hidden_scores(queries, keys, i_stage, b_hidden, BIASED)
    b_s = scaled_scores(warpgroup_mma_wait(0, deps=[b_s]), b_hidden, factor, BIASED)
    factor = 1.0 if BIASED else factor
    row_max = gl.convert_layout(row_maximum(b_s), row_m.type.layout)
    b_p, row_m, part_l, row_alpha = softmax_weights(b_s, row_max, row_m, part_l, factor, queries[0].dtype, WEIGHTS)
    return start_sums(b_p, values, i_stage, sums, row_alpha), row_m, part_l


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
):  # fmt: skip
    """Attention of one tile; the grid is (tiles * blocks of heads, batch).

    Arguments are as in ``small_forward.py``, but a tensor has a descriptor for each part of its ``COLUMNS``, and
    ``registers`` is None if there are no register tokens. ``KeyMask`` is None if no key is masked, and
    ``Rpb`` if there are no biases. ``frames`` are those of queries and of keys. ``key_length`` is that of the keys'
    axes if they are on another grid, else None.
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
    lo, hi, _, _ = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE, PERIODIC, key_length)
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
    ahead = first_chunk(lo, registers, CHUNK)
    for n in gl.static_range(STAGES):
        if n < chunks:
            start_seen_chunk(
                descs, register_descs, rings, ready, n, i_kv, i_batch, i_frame, ahead, lo, registers, key_count,
                CHUNK, COLUMNS, STAGES, PERIODIC,
            )  # fmt: skip
        ahead = next_chunk(ahead, lo, hi, key_count, CHUNK, RANK, PERIODIC)

    row = gl.arange(0, M, ROW)
    position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
    index = shifted(position, origin)
    row_lo, row_hi = windows_of(index, count, kernel, stride, CAUSAL, PERIODIC, key_length)
    p_biases = row_biases(Rpb, clamped(index, count), head, kernel)
    row_size = row_sizes(row_lo, row_hi)
    row_m, part_l = initial_stats(Sink, head, sink, SINK, M, ROW, PARTS)
    inner = unravel(gl.arange(0, N, gl.SliceLayout(0, SCORES)), CHUNK[1], CHUNK[2])
    sums, corner = new_sums(M, COLUMNS), first_chunk(lo, registers, CHUNK)
    seen = unmasked_keys(
        KeyMask, mask_strides, i_batch, corner, lo, residue, key_count, dilation, CHUNK, RANK, PERIODIC
    )  # fmt: skip
    mbarrier.wait(ready.index(STAGES), 0)
    for n in range(chunks):
        i_stage, phase = stage_of(n, STAGES)
        b_hidden = hidden_chunk(
            corner, lo, registers, row_lo, row_size, inner, key_count, CHUNK, RANK, PERIODIC, SCORES
        )  # fmt: skip
        b_hidden = with_biases(b_hidden, p_biases, bias_offset(shifted(inner, corner), kernel), corner[2] >= lo[2])
        masked = has_masked(seen)
        mbarrier.wait(ready.index(i_stage), phase)
        b_hidden = without_masked(b_hidden, masked, seen, chunks_of(rings, i_stage, N))
        sums, row_m, part_l = attend_chunk(
            queries, keys, values, i_stage, b_hidden, sums, row_m, part_l, scale * LOG2E, BIASED
        )  # fmt: skip
        corner = next_chunk(corner, lo, hi, key_count, CHUNK, RANK, PERIODIC)
        seen = unmasked_keys(
            KeyMask, mask_strides, i_batch, corner, lo, residue, key_count, dilation, CHUNK, RANK, PERIODIC
        )  # fmt: skip
        sums = finished(sums)
        thread_barrier()  # the stage has been read
        if n + STAGES < chunks:
            start_seen_chunk(
                descs, register_descs, rings, ready, n + STAGES, i_kv, i_batch, i_frame, ahead, lo, registers,
                key_count, CHUNK, COLUMNS, STAGES, PERIODIC,
            )  # fmt: skip
        ahead = next_chunk(ahead, lo, hi, key_count, CHUNK, RANK, PERIODIC)

    row_l = gl.sum(part_l, 1)
    may_see_nothing = True if KeyMask is not None or BIASED else None
    row_weight = divisors(gl.convert_layout(row_m, row_l.type.layout), row_l, may_see_nothing)
    if all_finite(sums_flags(sums, row_weight)):
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


def columns_boxes(boxes: Boxes | None, columns: tuple[int, ...]) -> list[Boxes | None]:
    """A descriptor for each part of the columns of boxes, or None without boxes."""
    if boxes is None:
        return [None] * COLUMN_PARTS
    rows = boxes["block_shape"][:-1]
    parts = [boxes_of(boxes["shape"], boxes["strides"], [*rows, n]) for n in columns]
    return [*parts, *[None] * (COLUMN_PARTS - len(columns))]


def both_frames(problem: Problem) -> tuple[int, int]:
    """Frames of an image of queries, and of one of keys."""
    keys = problem.key_lengths
    return frames_of(problem), frames_of(problem) if keys is None else keys[0]


def boxes_of_rows(config: MediumTileConfig, problem: Problem, *tensors: Layout) -> list[Boxes | None]:
    """Descriptors of the parts of tiles, one tensor after the other."""
    *_, dilation = problem.geometry
    every = [query_boxes(x, config.tile, config.pack, dilation) for x in tensors]
    return [part for boxes in every for part in columns_boxes(boxes, config.columns)]


def boxes_of_chunks(config: MediumTileConfig, problem: Problem, *tensors: Layout) -> list[Boxes | None]:
    """Descriptors of the parts of chunks of one head, one tensor after the other."""
    *_, dilation = problem.geometry
    every = [key_boxes(x, config.chunk, dilation) for x in tensors]
    return [part for boxes in every for part in columns_boxes(boxes, config.columns)]


def boxes_of_seen(config: MediumTileConfig, problem: Problem) -> list[Boxes | None]:
    """Descriptors of the parts of what queries see: keys, values, and keys and values of register tokens."""
    registers = boxes_of_registers(problem, prod(config.chunk))
    parts = [part for boxes in registers for part in columns_boxes(boxes, config.columns)]
    return [*boxes_of_chunks(config, problem, problem.key, problem.value), *parts]


def by_parts(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """Each tensor as often as it has descriptors."""
    return [x for x in tensors for _ in range(COLUMN_PARTS)]


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
        SIDE=config.side, num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
