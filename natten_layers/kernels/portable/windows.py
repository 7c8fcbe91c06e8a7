"""Device functions on the windows of queries and their inverse, on tiles, and on the chunks that walks over them take.

There are always three axes, ``t h w``; a missing one has length 1. Window arithmetic is that of ``geometry.py``, on
class indices: token ``i`` belongs to residue class ``i % dilation`` and has index ``i // dilation`` in it. Names are as
in ``primitives.py``.

On a periodic axis (``PERIODIC``) boxes are unwrapped: an index below 0 or behind the last one stands for the token one
turn further, and only the addresses that a chunk loads from are wrapped. Where queries lie on another grid than keys,
``length`` and ``count`` are the queries', and those of keys are given as ``key_length``; else that is None.

``parameters.py`` explains ``axes``, ``ring`` (the residue class whose tokens a walk loads), ``chunk`` and ``SPEC``.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from ..host.packing import FIELDS
from .parameters import Axes, Corners, KeyWalk, ResidueClass, View

NO_AXIS: tl.constexpr = tl.constexpr((False, False, False))
SAMPLE_FIELDS: tl.constexpr = tl.constexpr(FIELDS)
FAR: tl.constexpr = tl.constexpr(1 << 30)  # an index that lies in no window


@triton.jit
def window_bounds(
    index, length, kernel, stride, CAUSAL: tl.constexpr, PERIODIC: tl.constexpr = False, key_length=None,
):  # fmt: skip
    """First and last key that query ``index`` sees; the device version of ``geometry.window_bounds``."""
    group = index // stride * stride
    if CAUSAL:
        first = tl.maximum(tl.minimum(group + stride - 1, length - 1) - kernel + 1, 0)
        last = index
    else:
        if key_length is not None:  # the product may exceed 32 bits
            leader = ((2 * index.to(tl.int64) + 1) * key_length // (2 * length)).to(tl.int32)
            first = leader - kernel // 2
            if not PERIODIC:
                first = tl.minimum(tl.maximum(first, 0), key_length - kernel)
        elif PERIODIC:
            first = tl.minimum(group + stride // 2, length - 1) - kernel // 2
        else:
            first = tl.minimum(tl.maximum(group + stride // 2 - kernel // 2, 0), length - kernel)
        last = first + kernel - 1
    return first, last


@triton.jit
def first_query(leader, length, stride, key_length):
    """First query whose leader does not come before a key, both unwrapped; the key is at least ``-key_length``."""
    keys = length if key_length is None else key_length
    turns = (leader + keys) // keys - 1
    leader -= turns * keys
    if key_length is None:  # the last group may be a part of one
        first = tl.minimum((tl.maximum(leader - stride // 2, 0) + stride - 1) // stride * stride, length)
    else:
        wide = tl.maximum(2 * leader.to(tl.int64) * length - keys, 0)
        first = ((wide + 2 * keys - 1) // (2 * keys)).to(tl.int32)
    return first + turns * length


@triton.jit
def query_bounds(
    index, length, kernel, stride, CAUSAL: tl.constexpr, PERIODIC: tl.constexpr = False, key_length=None,
):  # fmt: skip
    """First and last query that see key ``index``; the device version of ``geometry.query_bounds``."""
    if PERIODIC or key_length is not None:
        first = first_query(index + kernel // 2 - kernel + 1, length, stride, key_length)
        last = first_query(index + kernel // 2 + 1, length, stride, key_length) - 1
        if not PERIODIC:
            first = tl.where(index < kernel, 0, tl.maximum(first, 0))
            last = tl.where(index >= key_length - kernel, length - 1, tl.minimum(last, length - 1))
    else:
        if CAUSAL:
            first = index
            last = (index + kernel - stride) // stride * stride + stride - 1
        else:
            half = kernel // 2 - stride // 2
            first = (tl.maximum(index - kernel + 1 + half, 0) + stride - 1) // stride * stride
            first = tl.where(index < kernel, 0, first)
            last = (index + half) // stride * stride + stride - 1
        last = tl.where(index >= length - kernel, length - 1, tl.minimum(last, length - 1))
    return first, last


@triton.jit
def unravel(n, H: tl.constexpr, W: tl.constexpr):
    """Position ``n`` of a box ``[., H, W]`` as ``t, h, w``."""
    return n // (H * W), n // W % H, n % W


@triton.jit
def spatial_tile(i_tile, length, dilation, tiles, TILE: tl.constexpr):
    """Batch index, and per axis the residue class, its length and the first class index of tile ``i_tile``."""
    i_w = i_tile % tiles[2]
    i_h = i_tile // tiles[2] % tiles[1]
    i_t = i_tile // (tiles[2] * tiles[1]) % tiles[0]
    i_batch = (i_tile // (tiles[2] * tiles[1] * tiles[0])).to(tl.int64)
    residue, count, origin = tile_on_axes((i_t, i_h, i_w), length, dilation, TILE)
    return i_batch, residue, count, origin


@triton.jit
def tile_on_axes(i, length, dilation, TILE: tl.constexpr):
    """Per axis the residue class, its length and the first class index of the tile with the numbers ``i``.

    Along an axis, consecutive tiles belong to different residue classes: the class varies fastest.
    """
    residue = (i[0] % dilation[0], i[1] % dilation[1], i[2] % dilation[2])
    count = (
        (length[0] - residue[0] + dilation[0] - 1) // dilation[0],
        (length[1] - residue[1] + dilation[1] - 1) // dilation[1],
        (length[2] - residue[2] + dilation[2] - 1) // dilation[2],
    )
    origin = (i[0] // dilation[0] * TILE[0], i[1] // dilation[1] * TILE[1], i[2] // dilation[2] * TILE[2])
    return residue, count, origin


@triton.jit
def entry(known, p):
    """A number of a sample: ``known`` if it is 1, which the compiler then knows, else the one that ``p`` points at."""
    n = known
    if known != 1:
        n = tl.load(p)
    return n


@triton.jit
def entries(known, p):
    return entry(known[0], p), entry(known[1], p + 1), entry(known[2], p + 2)


@triton.jit
def packed_sample(i_program, Tiles, HEADS, axes):
    """The sample of a program of a packed batch, of which each tile has ``HEADS`` programs.

    Returns the sample, its first token, the program's number in the sample, and the sample's axes. Of these, the given
    ones hold what is 1 in every sample. ``host/packing.py`` lays the table out.
    """
    p = Tiles + i_program // HEADS * SAMPLE_FIELDS
    i_sample, first_tile, first = tl.load(p), tl.load(p + 1), tl.load(p + 2).to(tl.int64)
    own = Axes(
        entries(axes.length, p + 3),
        entries(axes.kernel, p + 6),
        entries(axes.stride, p + 9),
        entries(axes.dilation, p + 12),
        entries(axes.tiles, p + 15),
    )
    return i_sample, first, i_program - first_tile * HEADS, own


@triton.jit
def of_sample(view, first, axes, SPEC: tl.constexpr):
    """The part of a packed tensor, which has one axis of tokens, that belongs to the sample with first token ``first``.

    Its strides are ``(batch, t, h, w, head)`` too. Without packing, ``first`` is None, and the view remains as it is.
    """
    if first is not None:
        strides, length = view.strides, axes.length
        w = strides[3]
        pointer = view.pointer + first * w
        if SPEC.wide:
            w = tl.cast(w, tl.int64)
        view = View(pointer, (strides[0], w * length[1] * length[2], w * length[2], w, strides[4]))
    return view


@triton.jit
def of_head(view, i_batch, i_head):
    """One head of one image. The first and the last stride are those of the batch and of heads."""
    strides = view.strides
    return View(view.pointer + i_batch * strides[0] + i_head * strides[len(strides) - 1], strides)


@triton.jit
def is_empty(origin, count):
    """Whether a tile holds no token, as may the last of a residue class that is shorter by one than others."""
    return (origin[0] >= count[0]) | (origin[1] >= count[1]) | (origin[2] >= count[2])


@triton.jit
def inside_axes(index, count):
    return (index[0] < count[0]) & (index[1] < count[1]) & (index[2] < count[2])


@triton.jit
def steps_over(lo, hi, CHUNK: tl.constexpr):
    """How many chunks cover the box ``[lo, hi]`` on each axis; none on an axis without keys."""
    t = tl.maximum(hi[0] - lo[0] + CHUNK[0], 0) // CHUNK[0]
    h = tl.maximum(hi[1] - lo[1] + CHUNK[1], 0) // CHUNK[1]
    w = tl.maximum(hi[2] - lo[2] + CHUNK[2], 0) // CHUNK[2]
    return t, h, w


@triton.jit
def next_chunk(corner, lo, hi, CHUNK: tl.constexpr, RANK: tl.constexpr):
    """Class index of the chunk that follows the one at ``corner`` in raster order.

    It is advanced from chunk to chunk, as dividing the chunk's number by the counts per axis would cost more.
    """
    t, h, w = corner
    w += CHUNK[2]
    if RANK > 1:
        wraps = w > hi[2]
        w = tl.where(wraps, lo[2], w)
        h += tl.where(wraps, CHUNK[1], 0)
        if RANK > 2:
            wraps = h > hi[1]
            h = tl.where(wraps, lo[1], h)
            t += tl.where(wraps, CHUNK[0], 0)
    return t, h, w


@triton.jit
def next_of_group(corner, i_head, step, steps, lo, hi, CHUNK: tl.constexpr, RANK: tl.constexpr):
    """The corner after ``corner``, its head, and its number among the ``steps`` corners of a head.

    Behind the last corner of a head comes the first one of the next head.
    """
    corner = next_chunk(corner, lo, hi, CHUNK, RANK)
    step += 1
    ends = step == steps
    step = tl.where(ends, 0, step)
    i_head += tl.where(ends, 1, 0)
    corner = (tl.where(ends, lo[0], corner[0]), tl.where(ends, lo[1], corner[1]), tl.where(ends, lo[2], corner[2]))
    return corner, i_head, step


@triton.jit
def corner_offset(corner, ring, strides, SPEC: tl.constexpr):
    """Scalar element offset of class index ``corner``; 64-bit only if ``SPEC.wide``."""
    residue, dilation = ring.residue, ring.dilation
    t, h, w = (
        residue[0] + corner[0] * dilation[0],
        residue[1] + corner[1] * dilation[1],
        residue[2] + corner[2] * dilation[2],
    )
    if SPEC.wide:
        t, h, w = t.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    o = w * strides[3]
    if SPEC.rank > 1:
        o += h * strides[2]
    if SPEC.rank > 2:
        o += t * strides[1]
    return o


@triton.jit
def inner_offsets(inner, dilation, strides, SPEC: tl.constexpr):
    """Element offsets of a chunk's positions from its corner, equal for all chunks; 64-bit only if ``SPEC.wide``."""
    t, h, w = inner
    if SPEC.wide:
        t, h, w = t.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    o = w * dilation[2] * strides[3]
    if SPEC.rank > 1:
        o += h * dilation[1] * strides[2]
    if SPEC.rank > 2:
        o += t * dilation[0] * strides[1]
    return o


@triton.jit
def on_ring(o_inner, chunk, ring, strides, SPEC: tl.constexpr):
    """Element offsets ``o_inner`` of a chunk's positions, those outside of periodic axes moved by a turn onto them."""
    corner, inner = chunk
    PERIODIC: tl.constexpr = SPEC.periodic
    WIDE: tl.constexpr = SPEC.wide
    o = o_inner
    if PERIODIC[2]:
        o += turn_offset(inner[2] + corner[2], ring.length[2], ring.dilation[2], strides[3], WIDE)
    if PERIODIC[1] and SPEC.rank > 1:
        o += turn_offset(inner[1] + corner[1], ring.length[1], ring.dilation[1], strides[2], WIDE)
    if PERIODIC[0] and SPEC.rank > 2:
        o += turn_offset(inner[0] + corner[0], ring.length[0], ring.dilation[0], strides[1], WIDE)
    return o


@triton.jit
def turn_offset(index, count, dilation, step, WIDE: tl.constexpr):
    """Element offset from an unwrapped index, at most a turn away, to the token that it stands for."""
    turn = count * dilation
    if WIDE:
        turn = turn.to(tl.int64)
    turn *= step
    return tl.where(index < 0, turn, tl.where(index >= count, -turn, 0))


@triton.jit
def inside_box(inner, corner, hi, RANK: tl.constexpr):
    """Load mask of the chunk at ``corner``: whether its positions ``inner`` lie in the box that ends at ``hi``."""
    m = inner[2] <= hi[2] - corner[2]
    if RANK > 1:
        m = m & (inner[1] <= hi[1] - corner[1])
    if RANK > 2:
        m = m & (inner[0] <= hi[0] - corner[0])
    return m


@triton.jit
def inner_indices(BOX: tl.constexpr):
    """Positions ``t, h, w`` of all elements of a box, in raster order."""
    return unravel(tl.arange(0, BOX[0] * BOX[1] * BOX[2]), BOX[1], BOX[2])


@triton.jit
def shifted(inner, corner):
    return inner[0] + corner[0], inner[1] + corner[1], inner[2] + corner[2]


@triton.jit
def tokens_of(index, residue, count, dilation):
    """Token coordinates ``t, h, w`` in int64 of class indices, clamped so that loads stay inside the tensor."""
    t = (residue[0] + tl.minimum(index[0], count[0] - 1) * dilation[0]).to(tl.int64)
    h = (residue[1] + tl.minimum(index[1], count[1] - 1) * dilation[1]).to(tl.int64)
    w = (residue[2] + tl.minimum(index[2], count[2] - 1) * dilation[2]).to(tl.int64)
    return t, h, w


@triton.jit
def token_offset(token, strides):
    return token[0] * strides[1] + token[1] * strides[2] + token[2] * strides[3]


@triton.jit
def windows_of(
    index, count, kernel, stride, CAUSAL: tl.constexpr, PERIODIC: tl.constexpr = NO_AXIS, key_count=None,
):  # fmt: skip
    """Corners ``lo, hi`` of the boxes of keys that the queries at ``index`` see.

    An index past the end of the class is taken for its last one.
    """
    # No function may return None to older Triton, so the lengths of axes are chosen here.
    keys = (None, None, None) if key_count is None else key_count
    t, h, w = (
        tl.minimum(index[0], count[0] - 1),
        tl.minimum(index[1], count[1] - 1),
        tl.minimum(index[2], count[2] - 1),
    )
    lo_t, hi_t = window_bounds(t, count[0], kernel[0], stride[0], CAUSAL[0], PERIODIC[0], keys[0])
    lo_h, hi_h = window_bounds(h, count[1], kernel[1], stride[1], CAUSAL[1], PERIODIC[1], keys[1])
    lo_w, hi_w = window_bounds(w, count[2], kernel[2], stride[2], CAUSAL[2], PERIODIC[2], keys[2])
    return (lo_t, lo_h, lo_w), (hi_t, hi_h, hi_w)


@triton.jit
def queries_of(
    index, count, kernel, stride, CAUSAL: tl.constexpr, PERIODIC: tl.constexpr = NO_AXIS, key_count=None,
):  # fmt: skip
    """Corners ``lo, hi`` of the boxes of queries that see the keys at ``index``: the inverse of ``windows_of``."""
    ends = count if key_count is None else key_count
    keys = (None, None, None) if key_count is None else key_count
    t, h, w = tl.minimum(index[0], ends[0] - 1), tl.minimum(index[1], ends[1] - 1), tl.minimum(index[2], ends[2] - 1)
    lo_t, hi_t = query_bounds(t, count[0], kernel[0], stride[0], CAUSAL[0], PERIODIC[0], keys[0])
    lo_h, hi_h = query_bounds(h, count[1], kernel[1], stride[1], CAUSAL[1], PERIODIC[1], keys[1])
    lo_w, hi_w = query_bounds(w, count[2], kernel[2], stride[2], CAUSAL[2], PERIODIC[2], keys[2])
    return (lo_t, lo_h, lo_w), (hi_t, hi_h, hi_w)


@triton.jit
def last_of(origin, TILE: tl.constexpr):
    return origin[0] + TILE[0] - 1, origin[1] + TILE[1] - 1, origin[2] + TILE[2] - 1


@triton.jit
def union_of_windows(
    origin, count, kernel, stride, CAUSAL: tl.constexpr, TILE: tl.constexpr, PERIODIC: tl.constexpr = NO_AXIS,
    key_count=None,
):  # fmt: skip
    """The box ``lo, hi`` of keys that some query of a tile sees, and ``inner_lo, inner_hi`` of those that all see.

    Neither end of a window decreases with the query, so the windows of the tile's first and last query suffice.
    """
    lo, inner_hi = windows_of(origin, count, kernel, stride, CAUSAL, PERIODIC, key_count)
    inner_lo, hi = windows_of(last_of(origin, TILE), count, kernel, stride, CAUSAL, PERIODIC, key_count)
    return lo, hi, inner_lo, inner_hi


@triton.jit
def union_of_queries(
    origin, count, kernel, stride, CAUSAL: tl.constexpr, TILE: tl.constexpr, PERIODIC: tl.constexpr = NO_AXIS,
    key_count=None,
):  # fmt: skip
    """The box ``lo, hi`` of queries that see some key of a tile, and ``inner_lo, inner_hi`` of those that see all."""
    lo, inner_hi = queries_of(origin, count, kernel, stride, CAUSAL, PERIODIC, key_count)
    inner_lo, hi = queries_of(last_of(origin, TILE), count, kernel, stride, CAUSAL, PERIODIC, key_count)
    return lo, hi, inner_lo, inner_hi


@triton.jit
def walk_over_windows(tile, axes, key_length, SPEC: tl.constexpr):
    """The :class:`KeyWalk` of a tile of queries. ``key_length`` is that of keys on another grid, or None."""
    CAUSAL: tl.constexpr = SPEC.causal
    PERIODIC: tl.constexpr = SPEC.periodic
    TILE: tl.constexpr = SPEC.tile
    CHUNK: tl.constexpr = SPEC.chunk
    count = tile.class_length
    row_lo, row_hi = windows_of(tile.row_index, count, axes.kernel, axes.stride, CAUSAL, PERIODIC, key_length)
    lo, hi, inner_lo, inner_hi = union_of_windows(
        tile.origin, count, axes.kernel, axes.stride, CAUSAL, TILE, PERIODIC, key_length
    )
    ring = ResidueClass(tile.residue, count if key_length is None else key_length, axes.dilation)
    steps = steps_over(lo, hi, CHUNK)
    return KeyWalk(
        Corners(row_lo, row_hi), Corners(lo, hi), Corners(inner_lo, inner_hi), ring, steps[0] * steps[1] * steps[2]
    )


@triton.jit
def between(row_lo, row_hi, col):
    """``[M, N]``: whether ``row_lo <= col <= row_hi``, with one subtraction and one unsigned comparison an element.

    An empty interval (``row_lo > row_hi``) contains nothing.
    """
    return (col[None, :] - row_lo[:, None]).to(tl.uint32) < tl.maximum(row_hi - row_lo + 1, 0)[:, None].to(tl.uint32)


@triton.jit
def visibility(row_lo, row_hi, corner, inner, RANK: tl.constexpr):
    """``[M, N]``: whether the column at ``inner`` of the chunk at ``corner`` lies inside the row's box."""
    b_visible = between(row_lo[2] - corner[2], row_hi[2] - corner[2], inner[2])
    if RANK > 1:
        b_visible = b_visible & between(row_lo[1] - corner[1], row_hi[1] - corner[1], inner[1])
    if RANK > 2:
        b_visible = b_visible & between(row_lo[0] - corner[0], row_hi[0] - corner[0], inner[0])
    return b_visible


@triton.jit
def hidden(row_lo, row_hi, corner, inner, RANK: tl.constexpr):
    """``[M, N]``: ``visibility`` as an additive mask: 0 where the row sees the column, else -inf."""
    b_hidden = tl.where(between(row_lo[2] - corner[2], row_hi[2] - corner[2], inner[2]), 0.0, float("-inf"))
    if RANK > 1:
        b_hidden += tl.where(between(row_lo[1] - corner[1], row_hi[1] - corner[1], inner[1]), 0.0, float("-inf"))
    if RANK > 2:
        b_hidden += tl.where(between(row_lo[0] - corner[0], row_hi[0] - corner[0], inner[0]), 0.0, float("-inf"))
    return b_hidden


@triton.jit
def chunk_inside(origin, inner_lo, inner_hi, CHUNK: tl.constexpr):
    """Whether every query of the tile sees every key of the chunk at ``origin``, which then needs no mask."""
    t = (origin[0] >= inner_lo[0]) & (origin[0] + CHUNK[0] - 1 <= inner_hi[0])
    h = (origin[1] >= inner_lo[1]) & (origin[1] + CHUNK[1] - 1 <= inner_hi[1])
    w = (origin[2] >= inner_lo[2]) & (origin[2] + CHUNK[2] - 1 <= inner_hi[2])
    return t & h & w


@triton.jit
def contiguous_row(i_batch, token, length):
    """Index of ``token`` in a contiguous ``[B, T, H, W]``."""
    return ((i_batch * length[0] + token[0]) * length[1] + token[1]) * length[2] + token[2]


@triton.jit
def contiguous_strides(length, heads, WIDE: tl.constexpr):
    """Strides ``(batch, t, h, w)`` of a contiguous ``[B, T, H, W, heads]``.

    The batch's is always 64-bit, the others only if ``WIDE``.
    """
    w = heads
    if WIDE:
        w = w.to(tl.int64)
    t = w * length[1] * length[2]
    return t.to(tl.int64) * length[0], t, w * length[2], w


@triton.jit
def bias_offset(index, kernel):
    """Offset of a position in a head's table of relative positions, which has ``2 kernel - 1`` entries on each axis."""
    return (index[0] * (2 * kernel[1] - 1) + index[1]) * (2 * kernel[2] - 1) + index[2]


@triton.jit
def bias_size(kernel):
    return (2 * kernel[0] - 1) * (2 * kernel[1] - 1) * (2 * kernel[2] - 1)


@triton.jit
def bias_middle(kernel):
    """Offset of the entry for a query's own token. That of a pair adds the key's offset and subtracts the query's."""
    return bias_offset((kernel[0] - 1, kernel[1] - 1, kernel[2] - 1), kernel)


@triton.jit
def clamped(index, count):
    return (
        tl.minimum(index[0], count[0] - 1),
        tl.minimum(index[1], count[1] - 1),
        tl.minimum(index[2], count[2] - 1),
    )
