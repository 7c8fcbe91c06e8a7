"""Walks over chunks and their masks, for kernels for large and for medium windows on compute capability 9.0.

Some groups of four warps compute the rows of a tile, each those of a box of it, its part of the tile. A walk visits a
box of keys (or of queries), all that the tile sees, chunk by chunk; a walk index ``(t, h, w)`` counts its chunks per
axis. Walks go along an axis in one of two orders:
- Where all groups compute all chunks, a walk starts behind the chunks that every row of the tile sees in full, and
  wraps around, so that the chunks that need no mask on that axis come last.
- Where groups skip chunks (``SKIP``), a walk goes from both ends to the middle. Chunks that only the first or only the
  last group sees come in turn, so that no group waits long for the others, with which it shares the stages of a ring.
Register tokens, which all rows see, come before either: chunks whose walk index is negative on the last axis. The last
of them ends with the last token, so that the first one only may start before token 0, where TMA reads zeros, and
need a mask.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..portable.windows import (
    between,
    last_of,
    spatial_tile,
    union_of_windows,
    windows_of,
)

ANY: gl.constexpr = gl.constexpr(True)


@gluon.jit
def on_ring(index, count, PERIODIC: gl.constexpr):
    """The token of an index on one axis, which is at most a turn away from those of the ring."""
    if PERIODIC:
        index = gl.where(index < 0, index + count, gl.where(index >= count, index - count, index))
    return index


@gluon.jit
def on_rings(corner, count, PERIODIC: gl.constexpr):
    t, h, w = corner
    return on_ring(t, count[0], PERIODIC[0]), on_ring(h, count[1], PERIODIC[1]), on_ring(w, count[2], PERIODIC[2])


@gluon.jit
def axis_walk(lo, hi, inner_lo, inner_hi, STEP: gl.constexpr):
    """For one axis: number of chunks, how many of them reach past the box of some row, and which comes first."""
    steps = (hi - lo + STEP) // STEP
    first = (inner_lo - lo + STEP - 1) // STEP
    end = (inner_hi - lo + 1) // STEP
    inside = gl.maximum(end - first, 0)
    return steps, steps - inside, gl.where(inside > 0, end, 0)


@gluon.jit
def walk_over(lo, hi, inner_lo, inner_hi, CHUNK: gl.constexpr, registers=None):
    """The walk over a box: its first position; for each axis the number of chunks, how many of them need a mask, and
    the index of the first; and, if there are any, the numbers of register tokens before it and of their chunks.
    """
    t, border_t, start_t = axis_walk(lo[0], hi[0], inner_lo[0], inner_hi[0], CHUNK[0])
    h, border_h, start_h = axis_walk(lo[1], hi[1], inner_lo[1], inner_hi[1], CHUNK[1])
    w, border_w, start_w = axis_walk(lo[2], hi[2], inner_lo[2], inner_hi[2], CHUNK[2])
    before = ()
    if registers is not None:
        before = registers, (registers + CHUNK[0] * CHUNK[1] * CHUNK[2] - 1) // (CHUNK[0] * CHUNK[1] * CHUNK[2])
    return lo, (t, h, w), (border_t, border_h, border_w), (start_t, start_h, start_w), before


@gluon.jit
def tile_of(tile_id, plan, TILE: gl.constexpr):
    """Batch, index in the last count of ``plan``, lengths and first position of a tile.

    Neighbouring tiles have neighbouring numbers, so that programs that run together share what they load.
    """
    length, tiles, heads = plan[0], plan[3], plan[4]
    space = tiles[0] * tiles[1] * tiles[2]
    i_head = tile_id // space % heads
    i_tile = tile_id // (space * heads) * space + tile_id % space
    i_batch, _, count, origin = spatial_tile(i_tile, length, (1, 1, 1), tiles, TILE)
    return i_batch.to(gl.int32), i_head, count, origin


@gluon.jit
def on_line(Bounds, index, count):
    """First and last position that the tokens at ``index`` of a packed batch see, or are seen by, as boxes.

    ``Bounds [2, tokens]`` has them for every token. There is one axis, the line of all tokens.
    """
    p = Bounds + gl.minimum(index[2], count[2] - 1)
    return (index[0], index[1], gl.load(p)), (index[0], index[1], gl.load(p + count[2]))


@gluon.jit
def union_on_line(Bounds, origin, count, TILE: gl.constexpr):
    """What ``union_of_windows`` and ``union_of_queries`` return, for a tile on the line of a packed batch's tokens.

    Neither bound decreases from one sample to the next, so a tile may hold the end of one and the beginning of others.
    """
    lo, inner_hi = on_line(Bounds, origin, count)
    inner_lo, hi = on_line(Bounds, last_of(origin, TILE), count)
    return lo, hi, inner_lo, inner_hi


@gluon.jit
def load_of_token(Table, index, count):
    """The entry of ``Table [tokens]`` for each position on the line of a packed batch's tokens."""
    return gl.load(Table + gl.minimum(gl.maximum(index, 0), count[2] - 1))


@gluon.jit
def tile_walk(tile_id, plan, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, Windows=None):
    """Of a tile of queries: batch, block of heads, first position, and the walk over its keys."""
    _length, kernel, stride, _tiles, _blocks, registers = plan
    i_batch, i_head, count, origin = tile_of(tile_id, plan, TILE)
    if Windows is None:
        lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE)
    else:
        lo, hi, inner_lo, inner_hi = union_on_line(Windows, origin, count, TILE)
    return i_batch, i_head, origin, walk_over(lo, hi, inner_lo, inner_hi, CHUNK, registers)


@gluon.jit
def keys_of(index, plan, CAUSAL: gl.constexpr, Windows):
    """Corners of the boxes of keys that the queries at ``index`` see."""
    if Windows is None:
        row_lo, row_hi = windows_of(index, plan[0], plan[1], plan[2], CAUSAL)
    else:
        row_lo, row_hi = on_line(Windows, index, plan[0])
    return row_lo, row_hi


@gluon.jit
def part_of(origin, GROUP: gl.constexpr, GROUPS: gl.constexpr, PART: gl.constexpr):
    """First position of the part of a tile that one of its groups of warps computes."""
    return (
        origin[0] + GROUP // (GROUPS[1] * GROUPS[2]) * PART[0],
        origin[1] + GROUP // GROUPS[2] % GROUPS[1] * PART[1],
        origin[2] + GROUP % GROUPS[2] * PART[2],
    )


@gluon.jit
def chunk_count(walk):
    """Number of chunks of a walk, with those of register tokens."""
    return walk[1][0] * walk[1][1] * walk[1][2] + register_chunks(walk)


@gluon.jit
def register_chunks(walk):
    return walk[4][1] if len(walk[4]) == 2 else 0


@gluon.jit
def first_walk_index(walk):
    return 0, 0, -register_chunks(walk)


@gluon.jit
def next_walk_index(i_walk, walk):
    """The walk index that follows, and whether the walk is back at its first chunk."""
    t, h, w = i_walk
    w += 1
    wraps = w >= walk[1][2]
    w = gl.where(wraps, 0, w)
    h += gl.where(wraps, 1, 0)
    wraps = h >= walk[1][1]
    h = gl.where(wraps, 0, h)
    t += gl.where(wraps, 1, 0)
    wraps = t >= walk[1][0]
    return (gl.where(wraps, 0, t), h, w), wraps


@gluon.jit
def in_order(i, start, steps, SKIP: gl.constexpr):
    """Index along an axis of the ``i``-th chunk that a walk visits."""
    if SKIP:
        index = gl.where(i % 2 == 0, i // 2, steps - 1 - i // 2)
    else:
        index = gl.where(start + i >= steps, start + i - steps, start + i)
    return index


@gluon.jit
def corner_at(i_walk, walk, CHUNK: gl.constexpr, SKIP: gl.constexpr):
    """First position of the chunk at a walk index."""
    lo, steps, _, start, _ = walk
    return (
        lo[0] + in_order(i_walk[0], start[0], steps[0], SKIP) * CHUNK[0],
        lo[1] + in_order(i_walk[1], start[1], steps[1], SKIP) * CHUNK[1],
        lo[2] + in_order(i_walk[2], start[2], steps[2], SKIP) * CHUNK[2],
    )


@gluon.jit
def chunk_mask(
    i_walk, walk, row_lo, row_hi, inner, M: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
    LAYOUT: gl.constexpr, FIRST: gl.constexpr = ANY,
):  # fmt: skip
    """0 and -inf ``[M, N]``: which keys of the chunk each row sees. Computed only if some row does not see all of it.

    There is one loop over all chunks with this branch in it, at a point where no product is under way, instead of one
    loop for each kind of chunk: behind a loop that may be skipped, ptxas 12.8 uses descriptors of shared memory that it
    computes inside that loop only. There is one branch and not one for each axis because a branch copies the mask that
    it leaves unchanged. Unless it may be the ``FIRST`` chunk of a walk, one of register tokens needs no mask.
    """
    REGISTERS: gl.constexpr = len(walk[4]) == 2
    b_hidden = gl.zeros([M, N], gl.float32, LAYOUT)
    m_border = (i_walk[0] < walk[2][0]) | (i_walk[1] < walk[2][1]) | (i_walk[2] < walk[2][2])
    if REGISTERS:
        m_border = m_border & (i_walk[2] >= 0)
        if FIRST:
            m_border = m_border | (i_walk[2] == -register_chunks(walk))
    if m_border:
        if REGISTERS and FIRST:
            if i_walk[2] < 0:
                b_hidden = register_hidden(first_register(i_walk[2], walk, N), M, N, LAYOUT)
            else:
                b_hidden = border_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, LAYOUT)
        else:
            b_hidden = border_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, LAYOUT)
    return b_hidden


@gluon.jit
def border_mask(
    i_walk, walk, row_lo, row_hi, inner, M: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """0 and -inf ``[M, N]``: which keys of a chunk of the window each row sees."""
    b_hidden = gl.zeros([M, N], gl.float32, LAYOUT)
    corner = corner_at(i_walk, walk, CHUNK, False)
    for AXIS in gl.static_range(3 - RANK, 3):
        m_seen = between(row_lo[AXIS] - corner[AXIS], row_hi[AXIS] - corner[AXIS], inner[AXIS])
        b_hidden = gl.where(m_seen, b_hidden, float("-inf"))
    return b_hidden


@gluon.jit
def first_register(w, walk, N: gl.constexpr):
    """First register token of the chunk with walk index ``w < 0`` on the last axis."""
    return walk[4][0] + w * N


@gluon.jit
def register_hidden(first, M: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """0 and -inf ``[M, N]``: which register tokens of the chunk that starts with ``first`` there are."""
    m_there = gl.arange(0, N, gl.SliceLayout(0, LAYOUT)) + first >= 0
    return gl.where(m_there[None, :], gl.zeros([M, N], gl.float32, LAYOUT), float("-inf"))


@gluon.jit
def reach_of(lo, hi, empty, CHUNK: gl.constexpr):
    """The corners of chunks that meet a box ``lo, hi``: the first of them on each axis, and how many follow it. None do
    if the part of the tile that sees the box is ``empty``.
    """
    first = gl.where(empty, 2**30, lo[0] - CHUNK[0] + 1), lo[1] - CHUNK[1] + 1, lo[2] - CHUNK[2] + 1
    return first, (hi[0] - lo[0] + CHUNK[0] - 1, hi[1] - lo[1] + CHUNK[1] - 1, hi[2] - lo[2] + CHUNK[2] - 1)


@gluon.jit
def meets(corner, reach):
    """Whether the chunk at ``corner`` meets the box of :func:`reach_of`."""
    first, more = reach
    m_t = (corner[0] - first[0]).to(gl.uint32) <= more[0].to(gl.uint32)
    m_h = (corner[1] - first[1]).to(gl.uint32) <= more[1].to(gl.uint32)
    m_w = (corner[2] - first[2]).to(gl.uint32) <= more[2].to(gl.uint32)
    return m_t & m_h & m_w


@gluon.jit
def row_sizes(row_lo, row_hi):
    """Number of positions that each row sees, on each axis."""
    return (
        gl.maximum(row_hi[0] - row_lo[0] + 1, 0),
        gl.maximum(row_hi[1] - row_lo[1] + 1, 0),
        gl.maximum(row_hi[2] - row_lo[2] + 1, 0),
    )


@gluon.jit
def sees(corner, row_lo, row_size, inner, AXIS: gl.constexpr):
    """``[M, N]``: which positions of the chunk at ``corner`` each row sees on one axis."""
    offset = inner[AXIS][None, :] - (row_lo[AXIS] - corner[AXIS])[:, None]
    return offset.to(gl.uint32) < row_size[AXIS][:, None].to(gl.uint32)


@gluon.jit
def hidden(corner, row_lo, row_size, inner, RANK: gl.constexpr):
    """0 and -inf ``[M, N]``: which positions of the chunk at ``corner`` each row sees.

    The last axis is added to the others, which all positions of a line of the chunk share: additions have twice the
    rate of selections.
    """
    b_hidden = gl.where(sees(corner, row_lo, row_size, inner, 2), 0.0, float("-inf"))
    if RANK > 1:
        m_line = sees(corner, row_lo, row_size, inner, 1)
        if RANK > 2:
            m_line = m_line & sees(corner, row_lo, row_size, inner, 0)
        b_hidden = b_hidden + gl.where(m_line, 0.0, float("-inf"))
    return b_hidden


@gluon.jit
def hidden_keys(
    i_chunk, walk, corner, row_lo, row_size, inner, M: gl.constexpr, N: gl.constexpr, RANK: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """:func:`hidden` for chunk ``i_chunk`` of a walk, which may be one of register tokens."""
    if len(walk[4]) == 0:
        b_hidden = hidden(corner, row_lo, row_size, inner, RANK)
    elif i_chunk < register_chunks(walk):
        b_hidden = register_hidden(first_register(i_chunk - register_chunks(walk), walk, N), M, N, LAYOUT)
    else:
        b_hidden = hidden(corner, row_lo, row_size, inner, RANK)
    return b_hidden
