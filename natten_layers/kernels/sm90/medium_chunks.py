"""The chunks of keys or queries that a tile of a medium window sees, in the order in which its program takes them.

Chunks of register tokens come first. Their corners lie before the window on the last axis. Then comes the box of the
window in raster order.

On a periodic axis a box is unwrapped (``portable/windows.py``), and TMA loads no box that wraps around. So a chunk ends
where the ring does, and the next one begins with token 0 again. What a chunk holds behind that end is hidden.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..portable.primitives import LOG2E
from ..portable.windows import bias_middle, bias_offset, bias_size
from .walk import hidden, on_ring, register_hidden


@gluon.jit
def step_at(index, count, STEP: gl.constexpr, PERIODIC: gl.constexpr):
    """How far the chunk after the one at ``index`` is on one axis."""
    step = STEP
    if PERIODIC:
        step = gl.minimum(count - on_ring(index, count, True), STEP)
    return step


@gluon.jit
def chunks_on_axis(lo, hi, count, STEP: gl.constexpr, PERIODIC: gl.constexpr):
    """How many chunks cover ``lo`` to ``hi`` on one axis; none if that is empty."""
    size = gl.maximum(hi - lo + 1, 0)
    if PERIODIC:
        first = gl.minimum(size, count - on_ring(lo, count, True))
        rest = size - first
        chunks = (first + STEP - 1) // STEP + (rest % count + STEP - 1) // STEP
        chunks += rest // count * ((count + STEP - 1) // STEP)
    else:
        chunks = (size + STEP - 1) // STEP
    return chunks


@gluon.jit
def chunks_over(lo, hi, count, CHUNK: gl.constexpr, PERIODIC: gl.constexpr):
    """How many chunks cover the box ``[lo, hi]`` of a residue class with ``count`` tokens an axis."""
    t = chunks_on_axis(lo[0], hi[0], count[0], CHUNK[0], PERIODIC[0])
    h = chunks_on_axis(lo[1], hi[1], count[1], CHUNK[1], PERIODIC[1])
    w = chunks_on_axis(lo[2], hi[2], count[2], CHUNK[2], PERIODIC[2])
    return t * h * w


@gluon.jit
def next_chunk(corner, lo, hi, count, CHUNK: gl.constexpr, RANK: gl.constexpr, PERIODIC: gl.constexpr):
    """Corner of the chunk that follows.

    It is advanced from chunk to chunk, as dividing the chunk's number by the counts per axis would cost more.
    """
    t, h, w = corner
    step = step_at(w, count[2], CHUNK[2], PERIODIC[2])
    if PERIODIC[2]:
        step = gl.where(w < lo[2], CHUNK[2], step)  # chunks of register tokens are whole
    w += step
    if RANK > 1:
        wraps = w > hi[2]
        w = gl.where(wraps, lo[2], w)
        h += gl.where(wraps, step_at(h, count[1], CHUNK[1], PERIODIC[1]), 0)
        if RANK > 2:
            wraps = h > hi[1]
            h = gl.where(wraps, lo[1], h)
            t += gl.where(wraps, step_at(t, count[0], CHUNK[0], PERIODIC[0]), 0)
    return t, h, w


@gluon.jit
def register_chunk_count(registers, CHUNK: gl.constexpr):
    """How many chunks hold the register tokens; ``registers`` is None without any."""
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    chunks = 0
    if registers is not None:
        chunks = (registers + N - 1) // N
    return chunks


@gluon.jit
def first_chunk(lo, registers, CHUNK: gl.constexpr):
    """Corner of the first chunk that a tile sees, whose window starts at ``lo``."""
    return lo[0], lo[1], lo[2] - register_chunk_count(registers, CHUNK) * CHUNK[2]


@gluon.jit
def first_register_at(corner, lo, registers, CHUNK: gl.constexpr):
    """First register token of the chunk at ``corner``. The last chunk ends with the last token, so that only the first
    one may start before token 0, where TMA reads zeros.
    """
    return registers + (corner[2] - lo[2]) * (CHUNK[0] * CHUNK[1])


@gluon.jit
def size_before_end(corner, row_lo, row_size, count, PERIODIC: gl.constexpr):
    """``row_size`` on one axis, without what lies behind the end of the ring after the chunk at ``corner``."""
    if PERIODIC:
        end = corner + count - on_ring(corner, count, True)
        row_size = gl.minimum(row_size, gl.maximum(end - row_lo, 0))
    return row_size


@gluon.jit
def seen_by_all(inner_lo, inner_hi, SPEC: gl.constexpr):
    """The box of positions that all rows of a tile see, or None where chunks are not compared with it."""
    box = None
    if SPEC.skip_mask:
        box = inner_lo, inner_hi
    return box


@gluon.jit
def lies_inside(corner, box, CHUNK: gl.constexpr):
    """Whether all positions of the chunk at ``corner`` lie in a box."""
    lo, hi = box
    m_t = (corner[0] >= lo[0]) & (corner[0] + CHUNK[0] - 1 <= hi[0])
    m_h = (corner[1] >= lo[1]) & (corner[1] + CHUNK[1] - 1 <= hi[1])
    m_w = (corner[2] >= lo[2]) & (corner[2] + CHUNK[2] - 1 <= hi[2])
    return m_t & m_h & m_w


@gluon.jit
def hidden_positions(
    corner, common, row_lo, row_size, inner, count, CHUNK: gl.constexpr, RANK: gl.constexpr, PERIODIC: gl.constexpr
):  # fmt: skip
    """0 and -inf ``[M, N]``: which positions of the chunk at ``corner`` each row sees. ``common`` is what
    :func:`seen_by_all` returned.
    """
    if common is None:
        b_hidden = hidden_by_windows(corner, row_lo, row_size, inner, count, RANK, PERIODIC)
    elif lies_inside(corner, common, CHUNK):
        SCORES: gl.constexpr = row_lo[2].type.layout.parent
        b_hidden = gl.zeros([row_lo[2].shape[0], inner[2].shape[0]], gl.float32, SCORES)
    else:
        b_hidden = hidden_by_windows(corner, row_lo, row_size, inner, count, RANK, PERIODIC)
    return b_hidden


@gluon.jit
def hidden_by_windows(
    corner, row_lo, row_size, inner, count, RANK: gl.constexpr, PERIODIC: gl.constexpr
):  # fmt: skip
    """:func:`hidden_positions`, computed from the box that each row sees."""
    row_size = (
        size_before_end(corner[0], row_lo[0], row_size[0], count[0], PERIODIC[0]),
        size_before_end(corner[1], row_lo[1], row_size[1], count[1], PERIODIC[1]),
        size_before_end(corner[2], row_lo[2], row_size[2], count[2], PERIODIC[2]),
    )
    return hidden(corner, row_lo, row_size, inner, RANK)


@gluon.jit
def hidden_chunk(
    corner, common, lo, registers, row_lo, row_size, inner, count, CHUNK: gl.constexpr, RANK: gl.constexpr,
    PERIODIC: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """0 and -inf ``[M, N]``: what each row sees of a chunk of its window, or of register tokens before it."""
    M: gl.constexpr = row_lo[2].shape[0]
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    if registers is None:
        b_hidden = hidden_positions(corner, common, row_lo, row_size, inner, count, CHUNK, RANK, PERIODIC)
    elif corner[2] < lo[2]:
        b_hidden = register_hidden(first_register_at(corner, lo, registers, CHUNK), M, N, LAYOUT)
    else:
        b_hidden = hidden_positions(corner, common, row_lo, row_size, inner, count, CHUNK, RANK, PERIODIC)
    return b_hidden


@gluon.jit
def key_biases(Rpb, index, head, kernel):
    """For keys at ``index``, pointers at the biases that a query of this head at the origin has of them, or None."""
    p_rows = None
    if Rpb is not None:
        p_rows = Rpb + head * bias_size(kernel) + bias_middle(kernel) + bias_offset(index, kernel)
    return p_rows


@gluon.jit
def with_biases(b_hidden, p_rows, o_columns, m_window=True):
    """``b_hidden [M, N]`` with biases in units of base-2 logits in place of zeros; unchanged if ``p_rows`` is None.

    Args:
        p_rows: ``[M]``, pointers at what rows have for a column with offset 0.
        o_columns: ``[N]``.
        m_window: whether it is a chunk of the window, since register tokens have no bias.
    """
    if p_rows is not None:
        m_visible = (b_hidden == 0.0) & m_window
        b_bias = gl.load(p_rows[:, None] + o_columns[None, :], mask=m_visible, other=0.0)
        b_hidden += b_bias.to(gl.float32) * LOG2E
    return b_hidden
