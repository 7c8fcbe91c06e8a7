"""What the kernels for compute capability 9.0 share beside walks, rings and descriptors: rows, products, stores."""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..portable.primitives import LOG2E, LOWEST
from ..portable.windows import (
    bias_middle,
    bias_offset,
    bias_size,
    contiguous_row,
    inside_axes,
    shifted,
    token_offset,
    tokens_of,
    unravel,
)
from .products import column_slice, first_column, rests_of_rows, sum_widths, width_of

thread_barrier = getattr(
    gl, "barrier" if hasattr(gl, "barrier") else "thread_barrier"
)  # the name changed in Triton 3.7


@gluon.jit
def opaque_i32(x):
    """``x``, through a move that LLVM cannot see through.

    LLVM hoists out of a loop whatever does not change in it. Masks and descriptors of shared memory would then be kept
    for the whole loop and spilled, because the hardware registers cannot hold them all. What is computed from an opaque
    integer stays inside the loop.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def shifted_along(position, by, AXIS: gl.constexpr):
    """A position ``by`` further along one axis."""
    t, h, w = position
    return t + (by if AXIS == 0 else 0), h + (by if AXIS == 1 else 0), w + (by if AXIS == 2 else 0)


@gluon.constexpr_function
def part_keys(boxes, part):
    """Positions of one of several boxes."""
    t, h, w = boxes[part]
    return t * h * w


@gluon.jit
def part_rows(PART: gl.constexpr, PACK: gl.constexpr, ROW: gl.constexpr):
    """For the rows of a part of a tile: their positions in it, and their heads in the block of heads."""
    row = gl.arange(0, PART[0] * PART[1] * PART[2] * PACK, ROW)
    return unravel(row // PACK, PART[1], PART[2]), row % PACK


@gluon.jit
def output_rows(position, head, i_batch, origin, length, heads):
    """Which rows lie inside the image, and their row numbers in a contiguous ``[B, T, H, W, heads]``."""
    return class_rows(position, head, i_batch, origin, (0, 0, 0), length, (1, 1, 1), length, heads)


@gluon.jit
def class_rows(position, head, i_batch, origin, residue, count, dilation, length, heads):
    """The same for a tile of a residue class with ``count`` tokens per axis."""
    index = shifted(position, origin)
    token = tokens_of(index, residue, count, dilation)
    m_inside = inside_axes(index, count) & (index[0] >= 0) & (index[1] >= 0) & (index[2] >= 0)
    return m_inside, contiguous_row(i_batch.to(gl.int64), token, length) * heads + head


@gluon.jit
def spread(index, residue, dilation):
    """Tokens with class indices ``index``."""
    t, h, w = index
    return residue[0] + t * dilation[0], residue[1] + h * dilation[1], residue[2] + w * dilation[2]


@gluon.jit
def wide_token_offset(token, strides):
    """Offset of a token in 64 bits."""
    t, h, w = token
    return t.to(gl.int64) * strides[1] + h.to(gl.int64) * strides[2] + w.to(gl.int64) * strides[3]


@gluon.jit
def load_lse(RowMax, RowSum, o_row, m_rows):
    """The base-2 log-sum-exp of rows, from the statistics that the forward kernel saved."""
    row_lse = gl.load(RowMax + o_row, mask=m_rows, other=0.0) * LOG2E
    return row_lse + gl.log2(gl.load(RowSum + o_row, mask=m_rows, other=1.0))


@gluon.jit
def load_grad_lse(DLse, strides, i_batch, token, head, m_rows):
    """The gradient of the log-sum-exp of rows. Strides are ``(batch, t, h, w, head)``."""
    o_rows = i_batch.to(gl.int64) * strides[0] + token_offset(token, strides) + head * strides[4]
    return gl.load(DLse + o_rows, mask=m_rows, other=0.0)


@gluon.jit
def row_biases(Rpb, index, head, kernel):
    """For queries at ``index``, pointers at their biases of a key at the origin; None without biases."""
    p_rows = None
    if Rpb is not None:
        p_rows = Rpb + head * bias_size(kernel) + bias_middle(kernel) - bias_offset(index, kernel)
    return p_rows


@gluon.jit
def store_rows(Out, o_row, m_rows, b_rows, D: gl.constexpr, STORE: gl.constexpr, FIRST: gl.constexpr = 0):
    """Store columns of a contiguous ``[rows, D]``, from ``FIRST`` on; what is beyond the last is left out."""
    COLUMNS: gl.constexpr = b_rows.shape[1]
    col = FIRST + gl.arange(0, COLUMNS, gl.SliceLayout(0, STORE))[None, :]
    mask = m_rows[:, None]
    if FIRST + COLUMNS > D:
        mask = mask & (col < D)
    gl.store(Out + (o_row * D)[:, None] + col, b_rows, mask=mask)


@gluon.jit
def row_sinks(Sink, head, sink, SINK: gl.constexpr):
    """The sink of each row as a base-2 logit; ``LOWEST`` where there is none."""
    row_sink = gl.full(head.shape, LOWEST, gl.float32, head.type.layout)
    if SINK == "tensor":
        row_sink = gl.maximum(gl.load(Sink + head).to(gl.float32) * LOG2E, row_sink)
    if SINK == "value":
        row_sink = gl.maximum(sink * LOG2E, row_sink)
    return row_sink


@gluon.jit
def flag_nonfinite(Nonfinite, sums, m_rows):
    """Set ``Nonfinite`` to 1 if a result of some row is not finite."""
    flag_nan(Nonfinite, rests_of_rows(sums), m_rows)


@gluon.jit
def flag_nan(Nonfinite, row_rest, m_rows):
    """Set ``Nonfinite`` to 1 if ``row_rest``, else 0, is NaN for some row."""
    row_rest = gl.convert_layout(row_rest, m_rows.type.layout)
    gl.store(Nonfinite + m_rows.to(gl.int32) * 0, 1, mask=m_rows & ~(gl.abs(row_rest) >= 0.0))


@gluon.constexpr_function
def copy_layout(columns, warps):
    """Of rows of elements of two bytes that warps load or store: each thread takes 16 bytes at a time."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [warps, 1], [1, 0])


@gluon.jit
def by_rows(results):
    """Results as a warp stores them fastest. (``through_buffer`` takes no shared memory of its own.)"""
    converted = ()
    for i in gl.static_range(len(results)):
        converted = converted + (gl.convert_layout(results[i], copy_layout(results[i].shape[1], 4)),)  # noqa: RUF005
    return converted


@gluon.jit
def through_buffer(buffer, results, D: gl.constexpr):
    """Slices of ``D`` channels as one matrix, as a warp stores it fastest, by way of shared memory that nothing needs
    any more.
    """
    WIDTHS: gl.constexpr = sum_widths(D)
    for i in gl.static_range(len(WIDTHS)):
        column_slice(buffer, first_column(WIDTHS, i), width_of(WIDTHS, i)).store(results[i])
    return buffer.load(copy_layout(buffer.shape[1], 4))


@gluon.jit
def store_part(buffer, sums, scale, Out, i_head, i_batch, origin, length, heads, PART: gl.constexpr, PACK: gl.constexpr,
               D: gl.constexpr):  # fmt: skip
    """Store sums, times ``scale`` unless that is None, for the part of a tile at ``origin``.

    They pass through ``buffer``; if it is None they are stored from registers.
    """
    results = ()
    for i in gl.static_range(len(sums)):
        b_rows = sums[i]
        if scale is not None:
            b_rows = b_rows * scale
        results = results + (b_rows.to(Out.dtype.element_ty),)  # noqa: RUF005
    if buffer is not None:
        results = (through_buffer(buffer, results, D),)
    store_part_rows(results, Out, i_head, i_batch, origin, length, heads, PART, PACK, D)


@gluon.jit
def store_part_rows(results, Out, i_head, i_batch, origin, length, heads, PART: gl.constexpr, PACK: gl.constexpr,
                    D: gl.constexpr):  # fmt: skip
    """Store slices of results for the part of a tile at ``origin`` from registers, in the layouts that they have."""
    WIDTHS: gl.constexpr = sum_widths(D)
    for i in gl.static_range(len(results)):
        store_slice(results[i], Out, i_head, i_batch, origin, length, heads, PART, PACK, D, first_column(WIDTHS, i))


@gluon.jit
def store_slice(b_rows, Out, i_head, i_batch, origin, length, heads, PART: gl.constexpr, PACK: gl.constexpr,
                D: gl.constexpr, FIRST: gl.constexpr):  # fmt: skip
    """Store the columns of a result from ``FIRST`` on."""
    STORE: gl.constexpr = b_rows.type.layout
    position, head = part_rows(PART, PACK, gl.SliceLayout(1, STORE))
    m_rows, o_row = output_rows(position, i_head * PACK + head, i_batch, origin, length, heads)
    store_rows(Out, o_row, m_rows, b_rows, D, STORE, FIRST)
