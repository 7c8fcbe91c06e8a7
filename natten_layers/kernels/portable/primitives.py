"""Device functions of the portable kernels: loads and stores of tiles, products, one step of the online softmax.

Names in these kernels: ``b_`` is a tile of values, ``o_`` are element offsets, ``i_`` is an index that belongs to the
program, ``m_`` is a mask of a load or store, ``row_`` is a vector with an entry per query of a tile, ``col_`` one with
an entry per key. Shapes: ``[M]`` queries of a tile times packed heads, ``[N]`` keys of a chunk, ``[D]`` head dim.

The sides of a Triton tensor are powers of two. A tile that has a head dim is therefore a tuple: one tensor with padded
columns or, where padding would waste much, two tensors with a part of the columns each (80 = 64 + 16).
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from .parameters import Chunk, View
from .windows import (
    chunk_inside,
    corner_offset,
    hidden,
    inner_indices,
    inner_offsets,
    inside_box,
    next_chunk,
    of_head,
    of_sample,
    on_ring,
    steps_over,
    token_offset,
    visibility,
)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Start of the running maximum: the lowest finite fp32 number. It is finite so that a row whose first chunk is fully
# masked does not compute inf - inf.
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
# Boxes in which ``shows_all`` reads a mask of one, two and three axes. Windows on one axis are the longest.
MASK_BOXES: tl.constexpr = tl.constexpr(((1, 1, 2048), (1, 16, 32), (4, 8, 16)))


@triton.jit
def load_chunk(view, o_inner, m_chunk, chunk, ring, SPEC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """``load_columns`` of the elements of a chunk; ``view`` is that of the image and head."""
    o_ring = on_ring(o_inner, chunk, ring, view.strides, SPEC)
    corner_pointer = view.pointer + corner_offset(chunk.corner, ring, view.strides, SPEC)
    return load_columns(corner_pointer, o_ring, m_chunk, D, BD)


@triton.jit
def load_unmasked(key_mask, o_inner, m_keys, chunk, ring, SPEC: tl.constexpr):
    """``[N]``: whether the mask, a view of an image, shows the keys of a chunk; False where ``m_keys`` is."""
    o_ring = on_ring(o_inner, chunk, ring, key_mask.strides, SPEC)
    p_mask = key_mask.pointer + corner_offset(chunk.corner, ring, key_mask.strides, SPEC) + o_ring
    return tl.load(p_mask, mask=m_keys, other=0).to(tl.int1)


@triton.jit
def shows_all(key_mask, walk, SPEC: tl.constexpr):
    """Whether the mask, a view of an image, shows every key that some row of a tile sees.

    A program asks once, in boxes of many keys, as waiting for single bytes chunk by chunk takes longer.
    """
    RANK: tl.constexpr = SPEC.rank
    BOX: tl.constexpr = MASK_BOXES[RANK - 1]
    lo, hi = walk.union
    inner = inner_indices(BOX)
    o_mask = inner_offsets(inner, walk.ring.dilation, key_mask.strides, SPEC)
    steps = steps_over(lo, hi, BOX)
    masked = tl.zeros([BOX[0] * BOX[1] * BOX[2]], tl.int1)
    corner = lo
    for _ in range(steps[0] * steps[1] * steps[2]):
        m_keys = inside_box(inner, corner, hi, RANK)
        masked |= m_keys & ~load_unmasked(key_mask, o_mask, m_keys, Chunk(corner, inner), walk.ring, SPEC)
        corner = next_chunk(corner, lo, hi, BOX, RANK)
    return tl.max(masked.to(tl.int32), 0) == 0


@triton.jit
def without_masked(b_s, key_mask, unmasked, o_inner, m_keys, chunk, ring, SPEC: tl.constexpr):
    """The scores ``[M, N]`` of a chunk, -inf for masked keys. ``unmasked`` is what ``shows_all`` says of the tile.

    Single bytes are not loaded ahead, so chunks wait for their part of the mask: only those of tiles with masked keys.
    """
    if not unmasked:
        col_seen = load_unmasked(key_mask, o_inner, m_keys, chunk, ring, SPEC)
        b_s = tl.where(col_seen[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def masked_product(b_rows, b_columns, boxes, chunk, inside, score_scale, SPEC: tl.constexpr, p_bias=None):
    """Masked scores ``[M, N]`` of a chunk, multiplied by ``score_scale`` if ``SPEC.scale_first``.

    ``boxes`` are the :class:`Corners` of what the rows see, and ``inside`` those of what all rows see. ``p_bias``
    points at what is added to scores that are scaled, in units of the natural logarithm; where a pair is invisible, it
    points anywhere.

    ``SPEC.mask`` is the way in which invisible pairs get -inf. With "add" the matrix product accumulates onto an
    additive mask, which takes half the instructions of a selection per axis. With "select" scores are replaced, so that
    NaN in an invisible one does not survive. "border" does the same, but skips chunks that lie inside the boxes of all
    rows.
    """
    CHUNK: tl.constexpr = SPEC.chunk
    MASK: tl.constexpr = SPEC.mask
    PRECISION: tl.constexpr = SPEC.precision
    if MASK == "add":
        b_hidden = hidden(boxes.lo, boxes.hi, chunk.corner, chunk.inner, SPEC.rank)
        b_s = products(b_rows, b_columns, b_hidden, PRECISION)
    else:
        b_s = products(b_rows, b_columns, None, PRECISION)
        if SPEC.scale_first:
            b_s = b_s * score_scale
        if p_bias is not None:
            b_visible = visibility(boxes.lo, boxes.hi, chunk.corner, chunk.inner, SPEC.rank)
            b_s = tl.where(
                b_visible, b_s + tl.load(p_bias, mask=b_visible, other=0.0).to(tl.float32) * LOG2E, float("-inf")
            )
        elif MASK == "select" or not chunk_inside(chunk.corner, inside.lo, inside.hi, CHUNK):
            b_s = tl.where(visibility(boxes.lo, boxes.hi, chunk.corner, chunk.inner, SPEC.rank), b_s, float("-inf"))
    return b_s


@triton.jit
def load_rows(pointer, o_rows, m_rows, D: tl.constexpr, BD: tl.constexpr):
    """Load ``[rows, BD]`` from element offsets ``o_rows``, with zeros in masked rows and from column ``D`` on.

    ``m_rows`` is None if no row is masked.
    """
    col = tl.arange(0, BD)
    p_tile = pointer + o_rows[:, None] + col[None, :]
    if m_rows is None:
        b_tile = tl.load(p_tile) if BD == D else tl.load(p_tile, mask=(col < D)[None, :], other=0.0)
    elif BD == D:
        b_tile = tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    else:
        b_tile = tl.load(p_tile, mask=m_rows[:, None] & (col < D)[None, :], other=0.0)
    return b_tile


@triton.jit
def store_rows(pointer, o_rows, m_rows, b_tile, D: tl.constexpr, BD: tl.constexpr):
    col = tl.arange(0, BD)
    mask = m_rows[:, None]
    if BD != D:
        mask = mask & (col < D)[None, :]
    tl.store(pointer + o_rows[:, None] + col[None, :], b_tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def in_elements(strides, UNIT: tl.constexpr):
    """Strides in elements, from strides that the host passes in units of ``UNIT`` elements.

    The multiplication tells Triton that ``UNIT`` divides them; by itself it only checks divisibility by 16. Strides of
    head dims 40, 72 and 88 are multiples of 8: if Triton did not know, it would load single elements, and no tile
    asynchronously.
    """
    return [stride * UNIT for stride in strides]


@triton.jit
def token_view(Tensor, strides, first, axes, SPEC: tl.constexpr):
    """The view of a tensor with tokens, in a packed batch of those of one sample: see ``of_sample``."""
    return of_sample(View(Tensor, in_elements(strides, SPEC.unit)), first, axes, SPEC)


@triton.jit
def register_view(Tensor, strides, i_image, i_kv, SPEC: tl.constexpr):
    """The view of the register keys or values of one image and KV head."""
    return of_head(View(Tensor, in_elements(strides, SPEC.unit)), i_image, i_kv)


@triton.jit
def load_columns(pointer, o_rows, m_rows, D: tl.constexpr, BD: tl.constexpr):
    """:func:`load_rows` of a tile whose columns are split into parts of sizes ``BD``."""
    if len(BD) == 1:
        b_tile = (load_rows(pointer, o_rows, m_rows, D, BD[0]),)
    else:
        b_last = load_rows(pointer + BD[0], o_rows, m_rows, D - BD[0], BD[1])
        b_tile = load_rows(pointer, o_rows, m_rows, BD[0], BD[0]), b_last
    return b_tile


@triton.jit
def load_queries(view, tile, token, D: tl.constexpr, BD: tl.constexpr):
    """The rows of a :class:`QueryTile` from a tensor with query heads; ``token`` are the tokens of the rows."""
    o_rows = token_offset(token, view.strides) + tile.row_head * view.strides[4]
    return load_columns(view.pointer + tile.i_batch * view.strides[0], o_rows, tile.m_rows, D, BD)


@triton.jit
def store_columns(pointer, o_rows, m_rows, b_tile, D: tl.constexpr, BD: tl.constexpr):
    if len(BD) == 1:
        store_rows(pointer, o_rows, m_rows, b_tile[0], D, BD[0])
    else:
        store_rows(pointer, o_rows, m_rows, b_tile[0], BD[0], BD[0])
        store_rows(pointer + BD[0], o_rows, m_rows, b_tile[1], D - BD[0], BD[1])


@triton.jit
def accumulator(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def zero_columns(ROWS: tl.constexpr, BD: tl.constexpr):
    """Accumulators for a tile whose columns are split into parts of sizes ``BD``."""
    b_tile = (accumulator(ROWS, BD[0]),)
    if len(BD) == 2:
        b_tile = (b_tile[0], accumulator(ROWS, BD[1]))
    return b_tile


@triton.jit
def products(b_rows, b_columns, b_onto, PRECISION: tl.constexpr):
    """``b_rows [M, D] @ b_columns [N, D].T``, added to ``b_onto [M, N]`` unless that is None."""
    b_s = tl.dot(b_rows[0], tl.trans(b_columns[0]), b_onto, input_precision=PRECISION)
    if len(b_rows) == 2:
        b_s = tl.dot(b_rows[1], tl.trans(b_columns[1]), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def add_weighted(b_acc, b_weight, b_rows, PRECISION: tl.constexpr):
    """``b_acc [M, D] + b_weight [M, N] @ b_rows [N, D]``."""
    b_weight = b_weight.to(b_rows[0].dtype)
    b_tile = (tl.dot(b_weight, b_rows[0], b_acc[0], input_precision=PRECISION),)
    if len(b_acc) == 2:
        b_tile = (b_tile[0], tl.dot(b_weight, b_rows[1], b_acc[1], input_precision=PRECISION))
    return b_tile


@triton.jit
def scale_rows(b_tile, row_factor):
    """Multiply each row by its factor, in fp32."""
    b_scaled = (b_tile[0].to(tl.float32) * row_factor[:, None],)
    if len(b_tile) == 2:
        b_scaled = (b_scaled[0], b_tile[1].to(tl.float32) * row_factor[:, None])
    return b_scaled


@triton.jit
def times(b_tile, factor):
    b_scaled = (b_tile[0] * factor,)
    if len(b_tile) == 2:
        b_scaled = (b_scaled[0], b_tile[1] * factor)
    return b_scaled


@triton.jit
def subtract_scaled(b_acc, b_tile, row_factor):
    """``b_acc`` minus ``b_tile`` with each row multiplied by its factor, in fp32."""
    b_scaled = scale_rows(b_tile, row_factor)
    b_difference = (b_acc[0] - b_scaled[0],)
    if len(b_acc) == 2:
        b_difference = (b_difference[0], b_acc[1] - b_scaled[1])
    return b_difference


@triton.jit
def row_products(b_left, b_right):
    """``[M]``: the scalar product of each row of one tile with the same row of another, in fp32."""
    row = tl.sum(b_left[0].to(tl.float32) * b_right[0].to(tl.float32), 1)
    if len(b_left) == 2:
        row += tl.sum(b_left[1].to(tl.float32) * b_right[1].to(tl.float32), 1)
    return row


@triton.jit
def row_zeros(b_tile):
    """``[M]``: NaN where a row holds NaN or inf, else 0."""
    row = tl.sum(b_tile[0] * 0.0, 1)
    if len(b_tile) == 2:
        row += tl.sum(b_tile[1] * 0.0, 1)
    return row


@triton.jit
def nonfinite_to_rows(b_acc, b_v, b_visible):
    """``b_acc`` with NaN in the elements that a visible nonfinite value reaches, and ``b_v`` with that value zeroed."""
    b_finite = tl.abs(b_v.to(tl.float32)) < float("inf")
    b_nonfinite = tl.dot(b_visible.to(b_v.dtype), tl.where(b_finite, 0.0, 1.0).to(b_v.dtype))
    return tl.where(b_nonfinite > 0, float("nan"), b_acc), tl.where(b_finite, b_v, 0.0)


@triton.jit
def where_rows(row_kept, b_tile):
    """The tile with zeros in place of the rows that are not kept, whatever they hold."""
    b_kept = (tl.where(row_kept[:, None], b_tile[0], 0.0),)
    if len(b_tile) == 2:
        b_kept = (b_kept[0], tl.where(row_kept[:, None], b_tile[1], 0.0))
    return b_kept


@triton.jit
def are_sound(b_acc, row_m, row_l):
    """``[M]``: whether the fast softmax of a row is correct; a tile with a row where it is not is computed again.

    A correct row holds no NaN or inf, and its sum of weights contains the largest weight, which is about one. The
    latter fails for scores from about 2^30 on: ``score * factor - maximum`` may be one instruction that rounds once,
    while the maximum is a rounded product, and the difference makes all weights overflow or vanish.
    """
    return (tl.abs(row_zeros(b_acc)) >= 0.0) & ((row_l >= 0.5) | (row_m == LOWEST))


@triton.jit
def load_lse(RowMax, RowSum, o_row, m_rows, MASKED: tl.constexpr):
    """``[M]``: the base-2 log-sum-exp of rows, from the statistics that the forward kernel saved, and which rows see
    something.

    ``MASKED`` is whether there are rows that do not. Their sum is zero, and their weights are zero for every finite
    log-sum-exp.
    """
    row_sum = tl.load(RowSum + o_row, mask=m_rows, other=1.0)
    row_max = tl.load(RowMax + o_row, mask=m_rows, other=0.0)
    row_sees = row_sum != 0.0
    if MASKED:
        row_sum, row_max = tl.where(row_sees, row_sum, 1.0), tl.where(row_sees, row_max, 0.0)
    return row_max * LOG2E + tl.log2(row_sum), row_sees


@triton.jit
def softmax_step(b_acc, row_m, row_l, b_s, b_v, b_visible, factor, NONFINITE: tl.constexpr, PRECISION: tl.constexpr):
    """Fold the masked scores ``b_s [M, N]`` and values ``b_v [N, D]`` into the state of the online softmax.

    ``factor >= 0`` turns scores into base-2 logits. A weight of zero times NaN is NaN; so with ``NONFINITE`` a
    nonfinite value counts as zero for the queries that do not see it, and as NaN for those that do.
    """
    row_m_new = tl.maximum(row_m, tl.max(b_s, 1) * factor)
    row_alpha = tl.exp2(row_m - row_m_new)
    b_p = tl.exp2(b_s * factor - row_m_new[:, None])
    row_l = row_l * row_alpha + tl.sum(b_p, 1)
    b_acc = scale_rows(b_acc, row_alpha)
    if NONFINITE:
        b_acc0, b_v0 = nonfinite_to_rows(b_acc[0], b_v[0], b_visible)
        if len(b_acc) == 1:
            b_acc, b_v = (b_acc0,), (b_v0,)
        else:
            b_acc1, b_v1 = nonfinite_to_rows(b_acc[1], b_v[1], b_visible)
            b_acc, b_v = (b_acc0, b_acc1), (b_v0, b_v1)
    return add_weighted(b_acc, b_p, b_v, PRECISION), row_m_new, row_l
