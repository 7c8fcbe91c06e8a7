"""Rows of a tile and chunks of what it sees, by parts of their columns: loads, products, sums and stores.

For the kernels of medium windows. A head whose width is no power of two is stored as two or three boxes of columns side
by side, so that a tensor has a descriptor, a buffer and an accumulator for each of these parts.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from collections.abc import Sequence
from math import prod

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    async_copy_global_to_shared,
    async_copy_shared_to_global,
)

from ..host.problem import Layout, Problem
from .descriptors import Boxes, boxes_of, chunk_boxes, frames_of, query_boxes, register_boxes
from .medium_chunks import first_chunk, first_register_at, next_chunk
from .medium_tiling import COLUMN_PARTS, MediumTileConfig
from .primitives import copy_layout, opaque_i32, thread_barrier
from .products import first_column, scaled_sum, start_product, start_sum
from .rings import stage_of
from .small_tiles import start_load
from .walk import on_rings


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
    descs, rings, ready, n, i_head, i_frame, corner, CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    PACK: gl.constexpr = 1,
):  # fmt: skip
    """Start to load the ``n``-th chunk of ``PACK`` heads of all tensors, all columns, into its stage of the rings."""
    i_stage, _ = stage_of(n, STAGES)
    PARTS: gl.constexpr = len(COLUMNS)
    ROWS: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2] * PACK
    mbarrier.expect(ready.index(i_stage), bytes_of(len(descs) // PARTS * ROWS, COLUMNS))
    for i in gl.static_range(len(descs)):
        if PACK == 1:
            at = [i_head, i_frame + corner[0], corner[1], corner[2], first_column(COLUMNS, i % PARTS)]
        else:
            at = [i_frame + corner[0], corner[1], corner[2], i_head, first_column(COLUMNS, i % PARTS)]
        async_copy_global_to_shared(descs[i], at, ready.index(i_stage), rings[i].index(i_stage))


@gluon.jit
def start_register_chunk(
    descs, rings, ready, n, i_head, i_batch, first, COLUMNS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The same for a chunk of register tokens, from ``first`` on. Tokens that all images share have a batch of one.

    Tensors without a descriptor, which come last, are zeros.
    """
    i_stage, _ = stage_of(n, STAGES)
    PARTS: gl.constexpr = len(COLUMNS)
    mbarrier.expect(ready.index(i_stage), bytes_of(len(rings) // PARTS * descs[0].block_type.shape[1], COLUMNS))
    for i in gl.static_range(len(rings)):
        desc = descs[i % len(descs)]
        # Opaque, as LLVM would otherwise keep a number for each descriptor during the whole loop.
        i_own = gl.minimum(opaque_i32(i_batch), desc.shape[0] - 1)
        # Behind the last token TMA reads zeros.
        at = [i_own, first if i < len(descs) else desc.shape[1], i_head, first_column(COLUMNS, i % PARTS)]
        buffer = rings[i].index(i_stage).reshape(desc.block_type.shape)
        async_copy_global_to_shared(desc, at, ready.index(i_stage), buffer)


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
def start_first_chunks(
    descs, register_descs, rings, ready, first, chunks, i_kv, i_batch, i_frame, lo, hi, registers, count,
    CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, RANK: gl.constexpr, PERIODIC: gl.constexpr,
):  # fmt: skip
    """Start to load the first chunks that a tile of queries sees, as many as there are stages, behind ``first`` chunks
    that the ring had before. Returns where the next one begins.
    """
    ahead = first_chunk(lo, registers, CHUNK)
    for n in gl.static_range(STAGES):
        if n < chunks:
            start_seen_chunk(
                descs, register_descs, rings, ready, first + n, i_kv, i_batch, i_frame, ahead, lo, registers, count,
                CHUNK, COLUMNS, STAGES, PERIODIC,
            )  # fmt: skip
        ahead = next_chunk(ahead, lo, hi, count, CHUNK, RANK, PERIODIC)
    return ahead


@gluon.jit
def rows_of(buffer):
    """A box of rows of a tile as a matrix."""
    BOX: gl.constexpr = buffer.shape
    return buffer.reshape([BOX[0] * BOX[1] * BOX[2] * BOX[3], BOX[4]])


@gluon.jit
def products_of_columns(X, o_rows, m_rows, buffer, FIRST: gl.constexpr, D: gl.constexpr, ROW: gl.constexpr):
    """``products_of_rows`` of some columns, from ``FIRST`` on, which lie in one buffer."""
    COLUMNS: gl.constexpr = buffer.shape[4]
    LOAD: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    col = FIRST + gl.arange(0, COLUMNS, gl.SliceLayout(0, LOAD))[None, :]
    o_rows = gl.convert_layout(o_rows, gl.SliceLayout(1, LOAD))[:, None]
    m_rows = gl.convert_layout(m_rows, gl.SliceLayout(1, LOAD))[:, None]
    b_x = gl.load(X + o_rows + col, mask=m_rows & (col < D), other=0.0)
    b_rows = rows_of(buffer).load(LOAD)
    return gl.convert_layout(gl.sum(b_x.to(gl.float32) * b_rows.to(gl.float32), 1), ROW)


@gluon.jit
def products_of_rows(X, o_rows, m_rows, buffers, D: gl.constexpr, COLUMNS: gl.constexpr, ROW: gl.constexpr):
    """Products of rows of ``D`` elements in global memory, which start at ``o_rows``, with those of a tile in shared
    memory, each with its own.
    """
    row_product = products_of_columns(X, o_rows, m_rows, buffers[0], 0, D, ROW)
    for PART in gl.static_range(1, len(buffers)):
        row_product += products_of_columns(X, o_rows, m_rows, buffers[PART], first_column(COLUMNS, PART), D, ROW)
    return row_product


@gluon.jit
def chunk_of(ring, i_stage, FIRST: gl.constexpr, N: gl.constexpr):
    """Rows ``FIRST`` to ``FIRST + N - 1`` of the chunk in a stage, ``[N, columns]``."""
    ALL: gl.constexpr = ring.shape[1] * ring.shape[2] * ring.shape[3] * ring.shape[4]
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


@gluon.jit
def start_sums(b_weights, rings, i_stage, sums, row_alpha, FIRST: gl.constexpr = 0):
    """Start to add rows of a chunk, from ``FIRST`` on, weighted by ``b_weights [M, N]``, to sums. These are multiplied
    by ``row_alpha [M]`` first, unless that is None.
    """
    started = ()
    for PART in gl.static_range(len(sums)):
        b_chunk, b_sum = chunk_of(rings[PART], i_stage, FIRST, b_weights.shape[1]), sums[PART]
        if row_alpha is not None:
            b_sum = scaled_sum(b_sum, row_alpha)
        started = started + (start_sum(b_weights, b_chunk, b_sum),)  # noqa: RUF005
    return started


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


# --- On the host


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
    """Descriptors of the parts of chunks, one tensor after the other."""
    *_, dilation = problem.geometry
    every = [chunk_boxes(x, config.chunk, config.chunk_pack, dilation) for x in tensors]
    return [part for boxes in every for part in columns_boxes(boxes, config.columns)]


def boxes_of_seen(config: MediumTileConfig, problem: Problem) -> list[Boxes | None]:
    """Descriptors of the parts of what queries see: keys, values, and keys and values of register tokens."""
    return [
        *boxes_of_chunks(config, problem, problem.key, problem.value),
        *boxes_of_register_chunks(config, problem.additional_keys, problem.additional_values),
    ]


def boxes_of_register_chunks(config: MediumTileConfig, *tensors: Layout | None) -> list[Boxes | None]:
    """Descriptors of the parts of chunks of register tokens, one tensor after the other; None for those without any."""
    every = [None if x is None else register_boxes(x, prod(config.chunk)) for x in tensors]
    return [part for boxes in every for part in columns_boxes(boxes, config.columns)]


def by_parts(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """Each tensor as often as it has descriptors."""
    return [x for x in tensors for _ in range(COLUMN_PARTS)]
