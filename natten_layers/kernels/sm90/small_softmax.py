"""Attention of one tile of small windows, whose keys and values lie in shared memory: masks, softmax, weighted sum.

All scores of a tile are held in hardware registers at once, so that one maximum and one sum a row are enough and
nothing is rescaled. Scores and masks come in parts, because matrix instructions take powers of two.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportUnboundVariable=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..portable.primitives import LOG2E, LOWEST
from ..portable.windows import unravel
from .masked_keys import range_sides, range_start
from .packed_images import await_copies
from .products import finished
from .walk import load_of_token

WARPS = 4


@gluon.jit
def key_columns(N: gl.constexpr, FIRST: gl.constexpr = 0):
    """``FIRST`` to ``FIRST + N - 1``, in the layout of the columns of ``N`` scores a row."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    return FIRST + gl.arange(0, N, gl.SliceLayout(0, LAYOUT))


@gluon.jit
def box_columns(BOX: gl.constexpr):
    """Positions of the keys of a box in it, whose sides are powers of two, in the layout of ``key_columns``.

    They are those of ``unravel``, but made of one vector for each axis: where a key mask is read, LLVM does not find
    out by itself which keys share a position, and compares each of them with the limits of the rows.
    """
    T: gl.constexpr = BOX[0]
    H: gl.constexpr = BOX[1]
    W: gl.constexpr = BOX[2]
    N: gl.constexpr = T * H * W
    COLUMN: gl.constexpr = gl.SliceLayout(0, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16]))
    zero = gl.zeros([N], gl.int32, COLUMN).reshape([T, H, W])
    ALL: gl.constexpr = zero.type.layout
    t = gl.arange(0, T, gl.SliceLayout(1, gl.SliceLayout(2, ALL)))[:, None][:, :, None] + zero
    h = gl.arange(0, H, gl.SliceLayout(0, gl.SliceLayout(2, ALL)))[None, :][:, :, None] + zero
    w = gl.arange(0, W, gl.SliceLayout(0, gl.SliceLayout(1, ALL)))[None, :][:, None, :] + zero
    return (
        gl.convert_layout(t.reshape([N]), COLUMN),
        gl.convert_layout(h.reshape([N]), COLUMN),
        gl.convert_layout(w.reshape([N]), COLUMN),
    )


@gluon.jit
def range_columns(BOX: gl.constexpr, FIRST: gl.constexpr, N: gl.constexpr):
    """``box_columns`` of the keys ``FIRST`` to ``FIRST + N - 1`` of a box only."""
    START: gl.constexpr = range_start(BOX, FIRST)
    SIDES: gl.constexpr = range_sides(BOX, N)
    t, h, w = box_columns(SIDES)
    return t + START[0], h + START[1], w + START[2]


@gluon.jit
def key_mask(inner, corner, row_lo, row_hi, M: gl.constexpr, RANK: gl.constexpr, SEEN: gl.constexpr = None):
    """0 and -inf ``[M, N]``: which of the keys at ``inner``, counted from ``corner``, each row sees.

    ``SEEN`` names the first and the last key of a 1-D tile that all its rows see, if that is known; these keys are not
    compared with the limits of the rows.
    """
    N: gl.constexpr = inner[2].shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    b_hidden = gl.zeros([M, N], gl.float32, LAYOUT)
    for BACK in gl.static_range(RANK):
        n = inner[2 - BACK][None, :]
        first = gl.convert_layout(row_lo[2 - BACK] - corner[2 - BACK], gl.SliceLayout(1, LAYOUT))
        last = gl.convert_layout(row_hi[2 - BACK] - corner[2 - BACK], gl.SliceLayout(1, LAYOUT))
        m_first, m_last = n >= first[:, None], n <= last[:, None]
        if SEEN is not None:
            m_first, m_last = m_first | (n >= SEEN[0]), m_last | (n <= SEEN[1])
        # Two selections take fewer instructions here than one comparison of unsigned differences.
        b_hidden = gl.where(m_first, b_hidden, float("-inf"))
        b_hidden = gl.where(m_last, b_hidden, float("-inf"))
    return b_hidden


@gluon.jit
def part_mask(
    corner, row_lo, row_hi, BOXES: gl.constexpr, PART: gl.constexpr, FIRST: gl.constexpr, N: gl.constexpr,
    M: gl.constexpr, RANK: gl.constexpr, BY_AXIS: gl.constexpr = False,
):  # fmt: skip
    """0 and -inf ``[M, N]``: which of the keys ``FIRST`` to ``FIRST + N - 1`` of a part each row sees.

    ``BY_AXIS`` is as in ``box_columns``.
    """
    BOX: gl.constexpr = BOXES[PART]
    inner = range_columns(BOX, FIRST, N) if BY_AXIS else unravel(key_columns(N, FIRST), BOX[1], BOX[2])
    return key_mask(inner, corner, row_lo, row_hi, M, RANK)


@gluon.jit
def register_mask(registers, FIRST: gl.constexpr, N: gl.constexpr, M: gl.constexpr):
    """0 and -inf ``[M, N]``: which of the tokens ``FIRST`` to ``FIRST + N - 1`` exist, of ``registers`` in all."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    m_there = key_columns(N, FIRST) < registers
    return gl.where(m_there[None, :], gl.zeros([M, N], gl.float32, LAYOUT), float("-inf"))


@gluon.constexpr_function
def keys_before(window, causal):
    return window - 1 if causal else window // 2


@gluon.jit
def is_inside(origin, length, Begins, SPEC: gl.constexpr):
    """Whether no window of a row of a 1-D tile is cut off or shifted at an end of the sequence, or of its sample."""
    BEFORE: gl.constexpr = keys_before(SPEC.window, SPEC.causal[2])
    inside = (origin[2] >= BEFORE) & (origin[2] - BEFORE + SPEC.tile[2] + SPEC.window - 2 < length[2])
    if Begins is not None:
        inside = inside & (load_of_token(Begins, origin[2] + SPEC.tile[2] - 1, length) <= origin[2] - BEFORE)
    return inside


@gluon.jit
def cut_windows(row_lo, Begins, index, length):
    """First keys of the windows at ``index``, cut off at the beginning of their packed sample; unchanged in images.

    Packed texts are computed like one text, whose windows reach back into earlier samples.
    """
    t, h, w = row_lo
    if Begins is not None:
        w = gl.maximum(w, load_of_token(Begins, index[2], length))
    return t, h, w


@gluon.jit
def scores_of(b_q, keys, masks):
    """Scores ``[M, N]`` of every part; those of hidden keys are -inf."""
    scores = ()
    for PART in gl.static_range(len(keys)):
        scores = scores + (warpgroup_mma(b_q, keys[PART].permute((1, 0)), masks[PART], is_async=True),)  # noqa: RUF005
    return finished(scores)


@gluon.jit
def part_top(b_s, EIGHTHS: gl.constexpr):
    """Maxima ``[M, 8]`` over every eighth column, which one thread holds, so that threads exchange nothing."""
    return gl.convert_layout(gl.max(b_s.reshape([b_s.shape[0], b_s.shape[1] // 8, 8]), 1), EIGHTHS)


@gluon.jit
def row_maxima(scores, row_sink, factor, EIGHTHS: gl.constexpr):
    """Maxima of rows over all parts and the sink."""
    part_m = part_top(scores[0], EIGHTHS)
    for PART in gl.static_range(1, len(scores)):
        part_m = gl.maximum(part_m, part_top(scores[PART], EIGHTHS))
    return gl.maximum(row_sink, gl.max(part_m, 1) * factor)


@gluon.jit
def part_weights(b_s, row_m, factor, DTYPE: gl.constexpr, WEIGHTS: gl.constexpr, EIGHTHS: gl.constexpr):
    """Weights of one part as a left operand, and their sums over every eighth column."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, b_s.shape[1], 16])
    b_p = gl.exp2(b_s * factor - gl.convert_layout(row_m, gl.SliceLayout(1, LAYOUT))[:, None])
    part_l = gl.convert_layout(gl.sum(b_p.reshape([b_s.shape[0], b_s.shape[1] // 8, 8]), 1), EIGHTHS)
    return gl.convert_layout(b_p.to(DTYPE), WEIGHTS), part_l


@gluon.jit
def weighted_sum(
    scores, values, ready, phase, row_sink, scale, SINK: gl.constexpr, D: gl.constexpr, EIGHTHS: gl.constexpr
):
    """Sums ``[M, D]`` of values by weights, and the maxima (base-2 logits) and sums of rows.

    The weights are not divided by their sums yet. Values are read once barrier ``ready`` has left ``phase``,
    or if it is None once the copies that the threads have started are there.
    """
    M: gl.constexpr = scores[0].shape[0]
    DTYPE: gl.constexpr = values[0].dtype
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    row_m = row_maxima(scores, row_sink, scale * LOG2E, EIGHTHS)
    b_acc = gl.zeros([M, D], gl.float32, OUT)
    part_l = gl.zeros([M, 8], gl.float32, EIGHTHS)
    for PART in gl.static_range(len(scores)):
        b_p, part = part_weights(scores[PART], row_m, scale * LOG2E, DTYPE, gl.DotOperandLayout(0, OUT, 2), EIGHTHS)
        part_l += part
        # Sums end before the last product starts, and no weights of a part are kept for later: both save registers.
        if len(scores) == PART + 1:
            row_l = gl.sum(part_l, 1)
            if SINK != "none":
                row_l += gl.where(row_sink > LOWEST, gl.exp2(row_sink - row_m), 0.0)
        if PART == 0:
            if ready is None:
                await_copies(0)
            else:
                mbarrier.wait(ready, phase)
        b_acc = warpgroup_mma(b_p, values[PART], b_acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[b_acc]), row_m, row_l


@gluon.jit
def no_nonfinite_flags(M: gl.constexpr):
    """What ``nonfinite_flags`` returns for finite rows: ``[M / 16, 8, 4]`` zeros, one for each thread."""
    OWN: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [gl.num_warps(), 1, 1], [2, 1, 0])
    return gl.zeros([M // 16, 8, 4], gl.float32, OWN)


@gluon.jit
def nonfinite_flags(b_acc, row_l):
    """One flag for each thread: NaN where a value of ``b_acc`` that the thread holds is not finite, else 0.

    It is also NaN where no weight in the sum of a row is about one (``are_sound`` explains when that happens).
    """
    M: gl.constexpr = b_acc.shape[0]
    D: gl.constexpr = b_acc.shape[1]
    row_zero = gl.where(gl.convert_layout(row_l, gl.SliceLayout(1, b_acc.type.layout)) >= 0.5, 0.0, float("nan"))
    b_rest = (b_acc * row_zero[:, None]).reshape([M // 16, 2, 8, D // 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(gl.sum(b_rest, 5), 3), 1), no_nonfinite_flags(M).type.layout)


@gluon.jit
def all_finite(flags):
    """Whether none of the flags that ``nonfinite_flags`` returned is NaN."""
    return gl.max(gl.max(gl.max(gl.where(gl.abs(flags) >= 0.0, 0, 1), 2), 1), 0) == 0


@gluon.jit
def divided(b_acc, row_l, DTYPE: gl.constexpr):
    return (b_acc * (1.0 / gl.convert_layout(row_l, gl.SliceLayout(1, b_acc.type.layout)))[:, None]).to(DTYPE)
