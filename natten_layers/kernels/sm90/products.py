"""Products of matrices by groups of four warps, whose columns are slices with widths that are powers of two.

Heads of 80, 96, 112 and 192 channels have 128 or 256 columns in shared memory, as TMA fills a box of a power of two.
The columns behind the channels are zeros. They add nothing to a score, and nobody reads the sums in them, so that
products leave them out.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ..host.tiling import channel_parts


@gluon.constexpr_function
def product_layout(columns):
    """Of an accumulator with this many columns and 64 rows, or a multiple of them."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


channel_widths = gluon.constexpr_function(channel_parts)


@gluon.constexpr_function
def sum_widths(dim):
    """Widths of the accumulators of ``dim`` channels: those of ``column_parts``, which Triton cannot call. Three (of
    112 channels: 64, 32 and 16) take longer than one over all columns.
    """
    widths = channel_widths(dim)
    if len(widths) > 2:
        widths = (widths[0], 2 * widths[1]) if 4 * widths[1] <= widths[0] else (2 * widths[0],)
    return widths


@gluon.constexpr_function
def product_count(dim):
    """How many products :func:`start_product` starts."""
    return len(channel_widths(dim))


@gluon.constexpr_function
def sum_count(dim):
    """How many products :func:`start_channel_sums` starts."""
    return len(sum_widths(dim))


@gluon.constexpr_function
def first_column(widths, i):
    return sum(widths[:i])


@gluon.constexpr_function
def width_of(widths, i):
    return widths[i]


@gluon.jit
def column_slice(matrix, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """``WIDTH`` columns of a matrix, from ``FIRST`` on; the whole matrix, which may be in registers, as it is."""
    columns = matrix
    if matrix.shape[1] != WIDTH:
        columns = matrix.slice(FIRST, WIDTH, 1)
    return columns


@gluon.jit
def start_product(b_rows, b_columns, b_acc, DIM: gl.constexpr = None):
    """Start ``[M, D]``, in shared memory or in registers, times the transpose of ``[N, D]``, in shared memory, added to
    ``b_acc`` if it is given.

    With ``DIM`` only its channels are multiplied; both matrices are in shared memory then.
    """
    M: gl.constexpr = b_rows.shape[0]
    N: gl.constexpr = b_columns.shape[0]
    LAYOUT: gl.constexpr = product_layout(N)
    WIDTHS: gl.constexpr = channel_widths(b_rows.shape[1] if DIM is None else DIM)
    b_product = b_acc
    for i in gl.static_range(len(WIDTHS)):
        b_left = column_slice(b_rows, first_column(WIDTHS, i), width_of(WIDTHS, i))
        b_right = column_slice(b_columns, first_column(WIDTHS, i), width_of(WIDTHS, i)).permute((1, 0))
        if b_product is None:
            b_zero = gl.zeros([M, N], gl.float32, LAYOUT)
            b_product = warpgroup_mma(b_left, b_right, b_zero, use_acc=False, is_async=True)
        else:
            b_product = warpgroup_mma(b_left, b_right, b_product, is_async=True)
    return b_product


@gluon.jit
def new_sum(M: gl.constexpr, WIDTH: gl.constexpr):
    LAYOUT: gl.constexpr = product_layout(WIDTH)
    return gl.zeros([M, WIDTH], gl.float32, LAYOUT)


@gluon.jit
def new_sums(M: gl.constexpr, WIDTHS: gl.constexpr):
    """Accumulators ``[M, width]`` of zeros."""
    sums = ()
    for i in gl.static_range(len(WIDTHS)):
        sums = sums + (new_sum(M, width_of(WIDTHS, i)),)  # noqa: RUF005
    return sums


@gluon.jit
def start_sum(b_weights, b_chunk, b_sum):
    """Start to add the rows of ``b_chunk [N, width]``, in shared memory, weighted by ``b_weights [M, N]``."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(b_chunk.shape[1]), 2)
    return warpgroup_mma(gl.convert_layout(b_weights, LEFT), b_chunk, b_sum, is_async=True)


@gluon.jit
def start_channel_sums(b_weights, b_chunk, sums, DIM: gl.constexpr):
    """The same for all slices of ``DIM`` channels, which are the first columns of ``b_chunk``."""
    WIDTHS: gl.constexpr = sum_widths(DIM)
    started = ()
    for i in gl.static_range(len(WIDTHS)):
        b_columns = column_slice(b_chunk, first_column(WIDTHS, i), width_of(WIDTHS, i))
        started = started + (start_sum(b_weights, b_columns, sums[i]),)  # noqa: RUF005
    return started


@gluon.jit
def finished(sums):
    """Sums, once all products that have been started are done."""
    done = warpgroup_mma_wait(0, deps=sums)
    if len(sums) == 1:
        done = (done,)
    return done


@gluon.jit
def split_sums(sums, COUNT: gl.constexpr):
    """The first ``COUNT`` of a tuple, and the others."""
    first = ()
    others = ()
    for i in gl.static_range(len(sums)):
        if i < COUNT:
            first = first + (sums[i],)  # noqa: RUF005
        else:
            others = others + (sums[i],)  # noqa: RUF005
    return first, others


@gluon.jit
def scaled_sum(b_sum, row_alpha):
    """A sum times ``row_alpha [M]``, in any layout."""
    return b_sum * gl.convert_layout(row_alpha, gl.SliceLayout(1, b_sum.type.layout))[:, None]


@gluon.jit
def scaled_sums(sums, row_alpha):
    scaled = ()
    for i in gl.static_range(len(sums)):
        scaled = scaled + (scaled_sum(sums[i], row_alpha),)  # noqa: RUF005
    return scaled


@gluon.jit
def rests_of_rows(sums):
    """For each row, zero if all of its sums are finite, else NaN."""
    row_rest = gl.sum(sums[0] * 0.0, 1)
    for i in gl.static_range(1, len(sums)):
        row_rest += gl.convert_layout(gl.sum(sums[i] * 0.0, 1), row_rest.type.layout)
    return row_rest
