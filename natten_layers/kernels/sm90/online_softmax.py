"""The softmax of rows whose scores come chunk by chunk, for kernels on compute capability 9.0.

Weights are taken relative to a reference of each row, so that they neither overflow nor vanish. Usually that is the
largest score so far (:func:`softmax_weights`): each chunk's maxima are found, and earlier sums shrink where there is a
larger one, which takes up to a third of the instructions. In bf16 it may be any score near the largest, as weights have
the exponents of fp32. So where nothing is kept for a backward pass (``large_tiling.keeps_references``), the kernels for
large windows, and those for medium ones of several chunks, keep what the first chunk gives (:func:`first_references`,
:func:`weights`), and look at the sums of weights at the end (:func:`are_usable`). Where a later score is larger by
about 44, or all scores of a row are about 30 smaller than what it took from others, the tile is computed once more,
with maxima. Both are rare.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..portable.primitives import LOG2E, LOWEST

# Between which sums of weights a row's reference is near enough. Sums of weighted values then neither overflow nor
# vanish in fp32, which holds 2^-126 to 2^127, as long as values lie between 2^-80 and 2^60.
LEAST_SUM: gl.constexpr = gl.constexpr(2.0**-44)
LARGEST_SUM: gl.constexpr = gl.constexpr(2.0**64)


@gluon.jit
def initial_stats(Sink, row_head, sink, SINK: gl.constexpr, M: gl.constexpr, ROW: gl.constexpr, PARTS: gl.constexpr):
    """Maximum and sums of an empty softmax, or of one that has seen the sink.

    The weight of the sink is one; each of the eight partial sums of a row starts with an eighth, which is exact.
    """
    if SINK == "none":
        row_m = gl.full([M], LOWEST, gl.float32, ROW)
        row_l = gl.zeros([M], gl.float32, ROW)
    else:
        if SINK == "tensor":
            row_sink = gl.load(Sink + row_head).to(gl.float32) * LOG2E
        else:
            row_sink = gl.full([M], sink * LOG2E, gl.float32, ROW)
        row_m = gl.maximum(row_sink, LOWEST)
        row_l = gl.where(row_sink > LOWEST, 0.125, 0.0)
    return row_m, gl.zeros([M, 8], gl.float32, PARTS) + gl.convert_layout(row_l, gl.SliceLayout(1, PARTS))[:, None]


@gluon.jit
def row_maximum(b_s):
    """Maximum of each row. Halves of rows are compared with each other first, as a thread would otherwise compare the
    elements that it has one after the other, each time waiting for the result. (Where a product is under way, this
    gained nothing.)
    """
    for _ in gl.static_range(2):
        halves = b_s.reshape([b_s.shape[0], 2, b_s.shape[1] // 2]).permute((0, 2, 1))
        b_left, b_right = gl.split(halves)
        b_s = gl.maximum(b_left, b_right)
    return gl.max(b_s, 1)


@gluon.jit
def added_by_eighths(part_sum, row_alpha, b_x):
    """``part_sum [M, 8]`` times ``row_alpha [M]``, if given, plus sums over every eighth column of ``b_x [M, N]``."""
    PARTS: gl.constexpr = part_sum.type.layout
    part = gl.convert_layout(gl.sum(b_x.reshape([b_x.shape[0], b_x.shape[1] // 8, 8]), 1), PARTS)
    if row_alpha is not None:
        part_sum = part_sum * gl.convert_layout(row_alpha, gl.SliceLayout(1, PARTS))[:, None]
    return part_sum + part


@gluon.jit
def unrounded_weights(b_s, row_max, row_m, part_l, factor):
    """Weights of a chunk, whose maximum in each row is ``row_max``, the new maximum, the new sums, and the factor by
    which all earlier sums shrink.

    ``part_l [M, 8]`` holds a sum over every eighth key of a row. These are the keys that one thread has, so that no
    values are exchanged between threads before the end of the tile.
    """
    row_m_new = gl.maximum(row_m, row_max * factor)
    row_alpha = gl.exp2(row_m - row_m_new)
    b_p = gl.exp2(b_s * factor - row_m_new[:, None])
    return b_p, row_m_new, added_by_eighths(part_l, row_alpha, b_p), row_alpha


@gluon.jit
def softmax_weights(b_s, row_max, row_m, part_l, factor, DTYPE: gl.constexpr, WEIGHTS: gl.constexpr):
    """:func:`unrounded_weights` as a left operand."""
    b_p, row_m, part_l, row_alpha = unrounded_weights(b_s, row_max, row_m, part_l, factor)
    return gl.convert_layout(b_p.to(DTYPE), WEIGHTS), row_m, part_l, row_alpha


@gluon.jit
def weights(b_s, row_m, part_l, factor, DTYPE: gl.constexpr, WEIGHTS: gl.constexpr):
    """Weights of a chunk as a left operand, relative to references that stay, and the new sums."""
    b_p = gl.exp2(b_s * factor - row_m[:, None])
    return gl.convert_layout(b_p.to(DTYPE), WEIGHTS), added_by_eighths(part_l, None, b_p)


@gluon.jit
def first_references(row_m, part_l, row_max, row_other):
    """References of rows, of which ``row_max`` are the maxima in their first chunk, sums, and by what these shrink.

    A row that sees nothing of the chunk takes ``row_other``, which should be like the scores that it will see. The
    logit of the sink, ``row_m``, is the least reference.
    """
    PARTS: gl.constexpr = part_l.type.layout
    row_new = gl.maximum(row_m, gl.where(row_max > LOWEST, row_max, row_other))
    row_alpha = gl.exp2(row_m - row_new)
    return row_new, part_l * gl.convert_layout(row_alpha, gl.SliceLayout(1, PARTS))[:, None], row_alpha


@gluon.jit
def references_of_tile(b_s, row_m, part_l, factor, exact=False):
    """The same, where rows that see nothing of the chunk take the maximum of those that do, and whether the next chunk
    must be asked again, as no row sees any of this one.

    With ``exact`` references are the maxima so far instead, as those of :func:`softmax_weights`, for which every chunk
    is asked.
    """
    row_max = gl.convert_layout(row_maximum(b_s), row_m.type.layout) * factor
    largest = gl.max(row_max, 0)
    row_m, part_l, row_alpha = first_references(row_m, part_l, row_max, gl.where(exact, LOWEST, largest))
    return row_m, part_l, row_alpha, (largest <= LOWEST) | exact


@gluon.jit
def are_usable(row_l, least):
    """1 for rows whose references are near enough to their largest scores, else 0.

    ``least`` is ``LEAST_SUM``, or 0.5 where references are maxima: sums then contain the weight of the largest score,
    which is about one (``portable.primitives.are_sound`` explains when it is not).
    """
    return gl.where((row_l >= least) & (row_l <= LARGEST_SUM), 1.0, 0.0)
