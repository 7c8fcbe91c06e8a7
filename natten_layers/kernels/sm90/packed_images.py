"""Packed images in the kernels for small windows: how a tile finds its sample, and loads and stores without TMA.

A TMA descriptor has one width for all images of a batch, so it cannot describe images of many shapes. Here threads copy
the boxes that a tile sees, 16 bytes at a time, into the same buffers to which TMA would copy them. Tokens outside of
the tile's own image become zeros, so that nothing of another image is read.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import (
    async_copy_global_to_shared,
    wait_group,
)
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..host.problem import Inputs, Layout, Problem
from ..host.tiling import Box
from ..portable.windows import SAMPLE_FIELDS, inside_axes, shifted, unravel
from .primitives import copy_layout, opaque_i32, part_keys, shifted_along, thread_barrier


class PackedTensors(NamedTuple):
    """What the kernels of gradients read and write of packed images through pointers."""

    query: Any
    key: Any
    value: Any
    grad_out: Any
    additional_keys: Any = None
    additional_values: Any = None
    grad_query: Any = None
    grad_key: Any = None
    grad_value: Any = None


@gluon.jit
def last_axes(p, RANK: gl.constexpr):
    """Numbers of the axes ``t, h, w`` at ``p``, of which the last ``RANK`` are loaded and others are known to be 1."""
    t, h = 1, 1
    if RANK > 2:
        t = gl.load(p)
    if RANK > 1:
        h = gl.load(p + 1)
    return t, h, gl.load(p + 2)


@gluon.jit
def own_packed_tile(Tiles, blocks, TILE: gl.constexpr, RANK: gl.constexpr):
    """Of the tile of this program: its sample (index, first token, length), kernel size, and first position.

    A tile has ``blocks`` programs. ``host/packing.py`` lays the table out. There is neither stride nor dilation.
    """
    i_tile = gl.program_id(0) // blocks
    p = Tiles + i_tile * SAMPLE_FIELDS
    i_sample, first_tile, first = gl.load(p), gl.load(p + 1), gl.load(p + 2)
    length, kernel, tiles = last_axes(p + 3, RANK), last_axes(p + 6, RANK), last_axes(p + 15, RANK)
    i_tile -= first_tile
    t, h, w = i_tile * 0, i_tile // tiles[2], i_tile % tiles[2]
    if RANK > 2:
        t, h = h // tiles[1], h % tiles[1]
    return (i_sample, first, length), kernel, (t * TILE[0], h * TILE[1], w * TILE[2])


@gluon.jit
def key_tile_shift(length, kernel, SIDE: gl.constexpr):
    """The device version of ``small_tiling.key_tile_shift``."""
    rest = length % SIDE
    return gl.where((rest == (kernel - 1) % SIDE) & (rest > 0), 1, 0)


@gluon.jit
def shifted_key_tile(origin, sample, kernel, TILE: gl.constexpr, RANK: gl.constexpr):
    """First position of a tile of keys, which may lie before the image."""
    _i_sample, _first, length = sample
    t, h, w = origin
    if RANK > 2:
        t -= key_tile_shift(length[0], kernel[0], TILE[0])
    if RANK > 1:
        h -= key_tile_shift(length[1], kernel[1], TILE[1])
    return t, h, w - key_tile_shift(length[2], kernel[2], TILE[2])


@gluon.jit
def not_before(position):
    """A position, or where it lies before the image the image's first one."""
    return gl.maximum(position[0], 0), gl.maximum(position[1], 0), gl.maximum(position[2], 0)


@gluon.jit
def first_row(sample, heads):
    """Index of the first row of a sample in a contiguous ``[tokens, heads]``."""
    return sample[1].to(gl.int64) * heads


@gluon.jit
def sample_view(X, strides, sample):
    """A tensor from a sample on, and its strides ``(batch, t, h, w, head)`` as one image.

    A packed tensor has one axis of tokens, ``w``.
    """
    _i_sample, first, length = sample
    w = strides[3]
    h = length[2].to(gl.int64) * w
    return X + first.to(gl.int64) * w, (strides[0], h * length[1], h, w, strides[4])


@gluon.constexpr_function
def rows_layout(columns):
    """How rows ``[N, columns]`` of 16 bits lie in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


@gluon.jit
def new_rows(X, ROWS: gl.constexpr, BD: gl.constexpr):
    """A buffer for rows ``[ROWS, BD]`` of a tensor."""
    LAYOUT: gl.constexpr = rows_layout(BD)
    return gl.allocate_shared_memory(X.dtype.element_ty, [ROWS, BD], LAYOUT)


@gluon.jit
def copy_rows(rows, X, o_rows, m_rows, D: gl.constexpr):
    """Start to copy the rows at ``o_rows`` of a tensor, in units of 8 elements, into ``rows [N, BD]``; zeros elsewhere.

    All strides of tensors are multiples of 8 elements, which Triton would not know of strides in elements.
    """
    BD: gl.constexpr = rows.shape[1]
    LAYOUT: gl.constexpr = copy_layout(BD, gl.num_warps())
    col = gl.arange(0, BD, gl.SliceLayout(0, LAYOUT))[None, :]
    mask = m_rows[:, None]
    if BD != D:
        mask = mask & (col < D)
    async_copy_global_to_shared(rows, X + ((o_rows * 8)[:, None] + col), mask=mask)


@gluon.jit
def box_rows(N: gl.constexpr, corner, length, BOX: gl.constexpr, PACK: gl.constexpr, LAYOUT: gl.constexpr):
    """For the rows of a box: their tokens in the image, their heads in the block of heads, and whether they exist.

    Tokens before the image are for the caller to find.
    """
    row = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    t, h, w = shifted(unravel(row // PACK, BOX[1], BOX[2]), corner)
    return (t * length[1] + h) * length[2] + w, row % PACK, inside_axes((t, h, w), length)


@gluon.jit
def copy_box(
    rows, X, strides, sample, i_head, corner, m_rows, BOX: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Start to copy ``PACK`` heads of the box at ``corner`` into ``rows [positions * PACK, BD]``.

    Only those that ``m_rows`` names are copied, unless it is None. Offsets in a sample have 32 bits
    (``support.images_gap``).
    """
    LAYOUT: gl.constexpr = copy_layout(rows.shape[1], gl.num_warps())
    _i_sample, first, length = sample
    by_token, by_head = strides[3] // 8, strides[4] // 8
    X += (first.to(gl.int64) * by_token + i_head.to(gl.int64) * by_head) * 8
    token, head, m_inside = box_rows(rows.shape[0], corner, length, BOX, PACK, LAYOUT)
    if m_rows is not None:
        m_inside = m_inside & m_rows
    copy_rows(rows, X, token * by_token + head * by_head, m_inside, D)


@gluon.jit
def copy_part(rows, X, strides, sample, i_head, corner, BOXES: gl.constexpr, PART: gl.constexpr, D: gl.constexpr):
    """:func:`copy_box` of one head and of one of the boxes that a tile sees."""
    BOX: gl.constexpr = BOXES[PART]
    copy_box(rows, X, strides, sample, i_head, corner, None, BOX, 1, D)


@gluon.jit
def start_tile(X, strides, sample, i_head, origin, SPEC: gl.constexpr):
    """Start to copy a tile; returns its buffer ``[SPEC.rows, BD]``."""
    TILE: gl.constexpr = SPEC.tile
    rows = new_rows(X, SPEC.rows, SPEC.columns)
    copy_box(rows, X, strides, sample, i_head, origin, None, TILE, SPEC.pack, SPEC.head_dim)
    return rows


@gluon.jit
def start_key_tile(X, strides, sample, i_head, origin, SPEC: gl.constexpr):
    """The same for a tile of keys, which may start before the image."""
    TILE: gl.constexpr = SPEC.tile
    rows = new_rows(X, SPEC.rows, SPEC.columns)
    row = gl.arange(0, SPEC.rows, gl.SliceLayout(1, copy_layout(SPEC.columns, gl.num_warps())))
    t, h, w = shifted(unravel(row, TILE[1], TILE[2]), origin)
    copy_box(rows, X, strides, sample, i_head, origin, (t >= 0) & (h >= 0) & (w >= 0), TILE, 1, SPEC.head_dim)
    return rows


@gluon.constexpr_function
def register_keys(boxes, keys):
    """How many of the ``keys`` that a tile loads are register tokens, and not keys of its boxes."""
    return keys - sum(t * h * w for t, h, w in boxes)


@gluon.jit
def start_registers(X, strides, i_sample, i_kv, registers, N: gl.constexpr, SPEC: gl.constexpr):
    """Start to copy the register tokens ``[samples, tokens, heads, D]`` of a head; returns their buffer ``[N, BD]``."""
    LAYOUT: gl.constexpr = copy_layout(SPEC.columns, gl.num_warps())
    rows = new_rows(X, N, SPEC.columns)
    row = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    X += (i_sample.to(gl.int64) * (strides[0] // 8) + i_kv.to(gl.int64) * (strides[2] // 8)) * 8
    copy_rows(rows, X, row * (strides[1] // 8), row < registers, SPEC.head_dim)
    return rows


@gluon.jit
def start_keys(
    X, RegX, strides, reg_strides, sample, i_kv, corner, registers,
    SPEC: gl.constexpr, BOXES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Start to copy all keys or values that a tile sees, and the register tokens; returns their buffers."""
    buffers = ()
    for PART in gl.static_range(len(BOXES)):
        rows = new_rows(X, part_keys(BOXES, PART), SPEC.columns)
        copy_part(rows, X, strides, sample, i_kv, corner, BOXES, PART, SPEC.head_dim)
        buffers = buffers + (rows,)  # noqa: RUF005
        corner = shifted_along(corner, BOXES[PART][SPEC.axis], SPEC.axis)
    if RegX is not None:
        rows = start_registers(RegX, reg_strides, sample[0], i_kv, registers, register_keys(BOXES, KEYS), SPEC)
        buffers = buffers + (rows,)  # noqa: RUF005
    return buffers


@gluon.jit
def await_copies(PENDING: gl.constexpr):
    """Wait until all groups of copies but the last ``PENDING`` are visible to the matrix instructions of all warps."""
    wait_group(PENDING)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def store_tile(buffer, b_rows, Out, i_head, origin, sample, heads, SPEC: gl.constexpr):
    """Store the rows of a result ``[tokens, heads, D]`` through the pointer ``Out``.

    They pass through ``buffer``, so that a warp writes whole rows.
    """
    TILE: gl.constexpr = SPEC.tile
    D: gl.constexpr = SPEC.head_dim
    BD: gl.constexpr = SPEC.columns
    LAYOUT: gl.constexpr = copy_layout(BD, gl.num_warps())
    _i_sample, first, length = sample
    buffer.store(b_rows.to(Out.dtype.element_ty))
    # Where rows lie is computed here once more, so that no hardware registers hold it in the meantime.
    own = opaque_i32(origin[0]), opaque_i32(origin[1]), opaque_i32(origin[2])
    token, head, m_rows = box_rows(SPEC.rows, own, length, TILE, SPEC.pack, LAYOUT)
    t, h, w = shifted(unravel(gl.arange(0, SPEC.rows, gl.SliceLayout(1, LAYOUT)) // SPEC.pack, TILE[1], TILE[2]), own)
    m_rows = (m_rows & (t >= 0) & (h >= 0) & (w >= 0))[:, None]
    col = gl.arange(0, BD, gl.SliceLayout(0, LAYOUT))[None, :]
    if BD != D:
        m_rows = m_rows & (col < D)
    Out += (first.to(gl.int64) * heads + i_head * SPEC.pack) * D
    gl.store(Out + (((token * heads + head) * D)[:, None] + col), buffer.load(LAYOUT), mask=m_rows)


def packed_tensors(
    tile: Box, problem: Problem, inputs: Inputs, grad_out: Tensor, **results: Tensor
) -> tuple[Tensor | None, PackedTensors | None]:
    """``Tiles`` and ``packed`` of the kernels."""
    if not problem.packs_images:
        return None, None
    query, key, value, reg_keys, reg_values, *_ = inputs
    tensors = PackedTensors(query, key, value, grad_out, reg_keys, reg_values, **results)
    return problem.tile_table(tile), tensors


def packed_strides(p: Problem, grad_out: Layout) -> tuple[tuple[int, ...], ...] | None:
    """``strides`` of the kernels: those of the tensors that :class:`PackedTensors` begin with."""
    query, key, value, *registers = p.input_strides()
    return (query, key, value, p.strides_of(grad_out), *registers) if p.packs_images else None
