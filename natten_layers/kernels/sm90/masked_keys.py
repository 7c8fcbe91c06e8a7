"""Keys that do not count (``key_mask``), for kernels on compute capability 9.0 whose keys lie in shared memory.

A kernel asks once whether the mask shows all keys of a tile, while TMA loads them. Only where it does not, masked keys
and values become zeros in shared memory, so that their NaN reaches no product, and masked scores become -inf.

Kernels for small windows have all keys of a tile in shared memory at once and read them in parts and slices, so that
they keep the flags of the whole box there, too, to be sliced alike (``load_box``, ``new_flags``, ``hide_columns``,
``clear_rows``). Kernels for windows between small and large walk over chunks, and every warp holds the flags of the
chunk that comes next in registers (``unmasked_keys``, ``without_masked``), as in shared memory they would cost a
barrier for every chunk.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..portable.primitives import LN2, LOG2E, LOWEST
from ..portable.windows import clamped, shifted, unravel
from .primitives import copy_layout, spread, thread_barrier, wide_token_offset
from .walk import on_rings


class ImageMask(NamedTuple):
    """The mask of an image, and the residue class of the keys that a tile sees: its first token, length, and steps."""

    pointer: Any
    strides: Any
    """``(batch, t, h, w, head)``"""
    residue: Any
    count: Any
    dilation: Any


@gluon.jit
def image_mask(KeyMask, strides, i_batch, residue, count, dilation):
    return ImageMask(KeyMask + i_batch.to(gl.int64) * strides[0], strides, residue, count, dilation)


@gluon.jit
def load_seen(mask, index, RANK: gl.constexpr):
    """Whether the mask shows the keys at ``index`` of the residue class; behind its end, whether it shows the last."""
    t, h, w = spread(clamped(index, mask.count), mask.residue, mask.dilation)
    p_mask = mask.pointer + w.to(gl.int64) * mask.strides[3]
    if RANK > 1:
        p_mask += h.to(gl.int64) * mask.strides[2]
    if RANK > 2:
        p_mask += t.to(gl.int64) * mask.strides[1]
    return gl.load(p_mask) != 0


@gluon.constexpr_function
def padded(box):
    """A box whose sides are powers of two."""
    t, h, w = (1 << (side - 1).bit_length() for side in box)
    return t, h, w


@gluon.jit
def load_box(mask, corner, BOX: gl.constexpr, RANK: gl.constexpr):
    """Whether the mask shows the keys of the box at ``corner``, in raster order.

    Sides are padded to powers of two with copies of the last key.
    """
    PADDED: gl.constexpr = padded(BOX)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    t, h, w = unravel(gl.arange(0, PADDED[0] * PADDED[1] * PADDED[2], LAYOUT), PADDED[1], PADDED[2])
    inner = gl.minimum(t, BOX[0] - 1), gl.minimum(h, BOX[1] - 1), gl.minimum(w, BOX[2] - 1)
    return load_seen(mask, shifted(inner, corner), RANK)


@gluon.jit
def is_masked(seen):
    """Whether the mask hides some of the keys that ``load_box`` has loaded, and whether it hides all of them."""
    count = gl.sum(seen.to(gl.int32), 0)
    return count < seen.shape[0], count == 0


@gluon.jit
def new_flags(BOX: gl.constexpr):
    """Shared memory for what ``load_box`` loads, ``[T, H, W]``."""
    PADDED: gl.constexpr = padded(BOX)
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    return gl.allocate_shared_memory(gl.int8, [PADDED[0], PADDED[1], PADDED[2]], LAYOUT)


@gluon.jit
def store_flags(flags, seen):
    flags.store(seen.to(gl.int8).reshape(flags.shape))


@gluon.constexpr_function
def range_start(box, first):
    """Where the keys from ``first`` on start in a box, in raster order."""
    _, h, w = box
    return first // (h * w), first // w % h, first % w


@gluon.constexpr_function
def range_sides(box, n):
    """The sides of the box of ``n`` keys that follow each other in raster order; all sides are powers of two."""
    _, h, w = box
    return max(n // (h * w), 1), min(max(n // w, 1), h), min(n, w)


@gluon.jit
def range_of(flags, FIRST: gl.constexpr, N: gl.constexpr):
    """Flags of the keys ``FIRST`` to ``FIRST + N - 1`` of a box, in raster order, as those of a box."""
    START: gl.constexpr = range_start(flags.shape, FIRST)
    SIDES: gl.constexpr = range_sides(flags.shape, N)
    for AXIS in gl.static_range(3):
        if SIDES[AXIS] != flags.shape[AXIS]:
            flags = flags.slice(START[AXIS], SIDES[AXIS], AXIS)
    return flags


@gluon.jit
def load_flags(flags, LAYOUT: gl.constexpr):
    """Flags ``[N]`` of a box, in raster order."""
    N: gl.constexpr = flags.shape[0] * flags.shape[1] * flags.shape[2]
    ALL: gl.constexpr = gl.zeros([N], gl.int8, LAYOUT).reshape(flags.shape).type.layout
    return gl.convert_layout(flags.load(ALL).reshape([N]), LAYOUT) != 0


@gluon.jit
def hide_columns(b_s, flags, HIDDEN: gl.constexpr):
    """``b_s [M, N]`` with ``HIDDEN`` in the columns of masked keys."""
    col_seen = load_flags(flags, gl.SliceLayout(0, b_s.type.layout))
    return gl.where(col_seen[None, :], b_s, HIDDEN)


@gluon.jit
def clear_rows(buffer, flags):
    """Write zeros into the rows of masked keys of ``buffer [N, D]`` in shared memory, some at a time.

    Products may read it behind ``end_writes``.
    """
    N: gl.constexpr = buffer.shape[0]
    D: gl.constexpr = buffer.shape[1]
    ROWS: gl.constexpr = min(N, 2048 // D)
    LAYOUT: gl.constexpr = copy_layout(D, gl.num_warps())
    b_zero = gl.zeros([ROWS, D], buffer.dtype, LAYOUT)
    for I_SLICE in gl.static_range(N // ROWS):
        rows = buffer.slice(I_SLICE * ROWS, ROWS)
        row_seen = load_flags(range_of(flags, I_SLICE * ROWS, ROWS), gl.SliceLayout(1, LAYOUT))
        rows.store(gl.where(row_seen[:, None], rows.load(LAYOUT), b_zero))


@gluon.jit
def end_writes():
    """Let the products of all warps see what all warps have written into shared memory."""
    fence_async_shared()
    thread_barrier()


@gluon.jit
def empty_rows(row_m, row_l):
    """Whether rows see neither a key nor a sink, from their maxima and sums."""
    return (row_m == LOWEST) & (row_l == 0.0)


@gluon.jit
def divisors(row_m, row_l, mask):
    """What sums of values are divided by: the sums of rows, but 1 where a row sees nothing; if ``mask`` is None, none
    does.
    """
    if mask is not None:
        row_l = gl.where(empty_rows(row_m, row_l), 1.0, row_l)
    return row_l


@gluon.jit
def saved_maxima(row_m, row_l, mask):
    """Maxima of base-2 logits as statistics: those of logits, and -inf where ``mask`` lets a row see nothing."""
    row_max = row_m * LN2
    if mask is not None:
        row_max = gl.where(empty_rows(row_m, row_l), float("-inf"), row_max)
    return row_max


@gluon.jit
def load_lse_or_zero(RowMax, RowSum, o_row, m_rows):
    """The base-2 log-sum-exp of rows, and which rows see something; it is zero for those that do not.

    The weights of such a row are zero for every finite log-sum-exp.
    """
    row_sum = gl.load(RowSum + o_row, mask=m_rows, other=1.0)
    row_max = gl.load(RowMax + o_row, mask=m_rows, other=0.0)
    row_sees = row_sum != 0.0
    row_lse = gl.where(row_sees, row_max * LOG2E + gl.log2(row_sum), 0.0)
    return row_lse, row_sees


@gluon.jit
def load_unmasked(
    KeyMask, strides, i_batch, corner, inner, m_inner, residue, count, dilation, RANK: gl.constexpr
):  # fmt: skip
    """1 for the keys at ``inner`` from ``corner`` on that may be seen, and 1 where there is no key; else 0.

    ``m_inner`` may exclude more of them. Offsets from the corner do not change from chunk to chunk.
    """
    t, h, w = inner
    o_corner = i_batch.to(gl.int64) * strides[0] + wide_token_offset(spread(corner, residue, dilation), strides)
    o_inner = w * dilation[2] * strides[3]
    m_keys = m_inner & (w < count[2] - corner[2])
    if RANK > 1:
        o_inner += h * dilation[1] * strides[2]
        m_keys &= h < count[1] - corner[1]
    if RANK > 2:
        o_inner += t * dilation[0] * strides[1]
        m_keys &= t < count[0] - corner[0]
    return gl.load(KeyMask + o_corner + o_inner, mask=m_keys, other=1).to(gl.int32)


@gluon.jit
def unmasked_keys(
    KeyMask, strides, i_batch, corner, lo, residue, count, dilation, CHUNK: gl.constexpr, RANK: gl.constexpr,
    PERIODIC: gl.constexpr,
):  # fmt: skip
    """``[N]``: 1 for the keys of the chunk at ``corner`` that may be seen, 0 for masked ones.

    In a tuple, which is empty without a mask, as loops carry no None. Positions without a key, and register tokens, are
    not masked. Every warp holds all of it, so that warps exchange nothing to find out whether a key is masked.
    """
    seen = ()
    if KeyMask is not None:
        N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
        LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, N // 32], [1, 32], [gl.num_warps(), 1], [1, 0]))
        first, inner = on_rings(corner, count, PERIODIC), unravel(gl.arange(0, N, LAYOUT), CHUNK[1], CHUNK[2])
        m_window = gl.full([N], 1, gl.int1, LAYOUT) & (corner[2] >= lo[2])
        seen = (
            load_unmasked(KeyMask, strides, i_batch, first, inner, m_window, residue, count, dilation, RANK),
        )  # fmt: skip
    return seen


@gluon.jit
def has_masked(seen):
    """Whether a key of a chunk is masked."""
    masked = False
    if len(seen) == 1:
        masked = gl.min(seen[0], 0) == 0
    return masked


@gluon.jit
def without_masked(b_hidden, masked, seen, matrices):
    """``b_hidden [M, N]`` with -inf for masked keys; ``masked`` is whether there are any.

    ``matrices`` are parts of the chunk's keys and values in shared memory, ``[N, columns]``. Rows of masked keys become
    zeros, as a weight of zero times NaN is NaN.
    """
    if len(seen) == 1:
        COLUMN: gl.constexpr = gl.SliceLayout(0, b_hidden.type.layout)
        if masked:
            b_hidden += gl.where(gl.convert_layout(seen[0], COLUMN) == 0, float("-inf"), 0.0)[None, :]
            for i in gl.static_range(len(matrices)):
                zero_rows(matrices[i], seen[0])
            end_writes()
    return b_hidden


@gluon.constexpr_function
def layout_of_words(layout):
    return gl.NVMMASharedLayout(layout.swizzle_byte_width, 32, rank=2)


@gluon.jit
def zero_rows(matrix, seen):
    """Zero the rows of a matrix in shared memory for which ``seen`` is 0. Two elements are one word here."""
    N: gl.constexpr = matrix.shape[0]
    WORDS: gl.constexpr = matrix.shape[1] // 2
    SHARED: gl.constexpr = layout_of_words(matrix.layout)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [gl.num_warps(), 1], [1, 0])
    words = matrix._reinterpret(gl.int32, [N, WORDS], SHARED)
    m_seen = gl.convert_layout(seen, gl.SliceLayout(1, LAYOUT)) != 0
    words.store(gl.where(m_seen[:, None], words.load(LAYOUT), 0))


@gluon.jit
def without_masked_rows(sums, row_seen):
    """Sums with zeros in the rows for which ``row_seen`` is 0, whatever they hold; unchanged if that is None."""
    kept = sums
    if row_seen is not None:
        kept = ()
        for i in gl.static_range(len(sums)):
            m_seen = gl.convert_layout(row_seen, gl.SliceLayout(1, sums[i].type.layout)) != 0
            kept = kept + (gl.where(m_seen[:, None], sums[i], 0.0),)  # noqa: RUF005
    return kept
