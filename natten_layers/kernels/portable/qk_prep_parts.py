"""Heads in parts, their arithmetic, and the angles of RoPE: what the kernels of ``qk_prep.py`` are made of.

The parts of a head are a tuple of tiles of equal layouts ``[T, BP]``: the first elements of the pairs that RoPE
rotates, their second elements, and as many of the rest, which is not rotated, as it takes. In memory all second
elements follow all first ones, or each follows its own if they are interleaved.
"""

# A call of one jit function from another is typed as a call from the host, which never returns.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false

from typing import Any, NamedTuple

import triton
import triton.language as tl

ALIGNED = 4
"""Elements that a thread loads at once, as tiles have so many for each"""


class QKPrepSpec(NamedTuple):
    """What the kernels are compiled for: their compile-time argument ``SPEC``."""

    split: tuple[int, ...]
    """how many pairs are rotated by each axis of a position"""
    freqs: int
    """length of a row of frequencies, which are those of one axis or of all"""
    pairs: int
    """pairs of elements that RoPE rotates"""
    rest: int
    """elements of a head that it does not rotate"""
    columns: int
    """of each part of a head, a power of two"""
    tokens: int
    """of a tile"""
    interleaved: bool
    norm: str
    by_head: bool
    """whether frequencies differ by outer; then outers are heads"""

    @property
    def head_dim(self) -> int:
        return 2 * self.pairs + self.rest

    @property
    def rest_start(self) -> int:
        """The element at which the parts of the rest begin: a multiple of 16 bytes of half precision, so that threads
        load and store as many at once. Rotated elements from there on are no part of the rest.
        """
        return 2 * self.pairs // ALIGNED * ALIGNED

    @property
    def rest_parts(self) -> int:
        return -(-(self.head_dim - self.rest_start) // self.columns) if self.rest else 0

    @property
    def parts(self) -> int:
        return (2 if self.pairs else 0) + self.rest_parts


class Rope(NamedTuple):
    """What angles are made of, or None."""

    Positions: Any
    Freqs: Any
    factor: Any
    """on the cosine and sine of all angles"""


class Work(NamedTuple):
    """What the programs of queries, and those of keys, divide among themselves."""

    tokens: Any
    outers: Any
    """of queries and of keys"""
    items: Any
    """of queries and of keys"""
    group: Any
    """outers of queries, and of keys, that share a row of frequencies"""
    run: Any
    """consecutive items of a program"""
    runs: Any
    """of all items"""
    span: Any
    """tiles of tokens of a program"""
    spans: Any
    """of all tiles"""


class Share(NamedTuple):
    """What one program computes."""

    i_outer: Any
    i_span: Any
    i_run: Any
    work: Any


@triton.jit
def share_of_program(work, SPEC: tl.constexpr):
    """The program's :class:`Share`. Outers are counted from those of queries on to those of keys.

    Programs that run together are neighbors in memory: heads vary fastest, then tokens, then images.
    """
    pid, spans = tl.program_id(0), work.spans
    if SPEC.by_head:
        total = work.outers[0] + work.outers[1]
        i_outer = pid % total
        i_span = pid // total % spans
        i_run = pid // total // spans
    else:
        i_run = pid % work.runs
        i_side = pid // work.runs % 2
        i_span = pid // work.runs // 2 % spans
        i_outer = pid // work.runs // 2 // spans + i_side * work.outers[0]
    return Share(i_outer.to(tl.int64), i_span.to(tl.int64), i_run.to(tl.int64), work)


@triton.jit
def share_of_keys(share):
    """The share of a program that computes keys, with outers counted from those of keys on."""
    return Share(share.i_outer - share.work.outers[0], share.i_span, share.i_run, share.work)


@triton.jit
def load_parts(X, o_row, m_row, SPEC: tl.constexpr):
    """The parts of the heads that start at ``o_row [T, 1]``, each ``[T, BP]`` in fp32."""
    BP: tl.constexpr = SPEC.columns
    PAIRS: tl.constexpr = SPEC.pairs
    REST_PARTS: tl.constexpr = SPEC.rest_parts
    p = tl.arange(0, BP)[None, :]
    parts = ()
    if SPEC.interleaved:
        e = tl.arange(0, 2 * BP)[None, :]  # one load and a split, as strided loads would not be vectorised
        b_pairs = tl.load(X + (o_row + e), mask=m_row & (e < 2 * PAIRS), other=0.0).to(tl.float32)
        b_first, b_second = tl.split(tl.reshape(b_pairs, (b_pairs.shape[0], BP, 2)))
        parts += (b_first, b_second)
    elif PAIRS > 0:
        m_pairs = m_row & (p < PAIRS)
        b_first = tl.load(X + (o_row + p), mask=m_row & (p < SPEC.head_dim), other=0.0).to(tl.float32)
        if BP > PAIRS:
            b_first = tl.where(p < PAIRS, b_first, 0.0)
        b_second = tl.load(X + (o_row + p + PAIRS), mask=m_pairs, other=0.0).to(tl.float32)
        parts += (b_first, b_second)
    for PART in tl.static_range(REST_PARTS):
        e = p + (SPEC.rest_start + PART * BP)
        b_part = tl.load(X + (o_row + e), mask=m_row & (e < SPEC.head_dim), other=0.0).to(tl.float32)
        if PART == 0 and SPEC.rest_start < 2 * PAIRS:
            b_part = tl.where(e >= 2 * PAIRS, b_part, 0.0)  # not in the mask, which would forbid loads of several
        parts += (b_part,)
    return parts


@triton.jit
def store_parts(X, o_row, m_row, parts, SPEC: tl.constexpr):
    BP: tl.constexpr = SPEC.columns
    PAIRS: tl.constexpr = SPEC.pairs
    REST_PARTS: tl.constexpr = SPEC.rest_parts
    ROTATED: tl.constexpr = SPEC.parts - SPEC.rest_parts
    p = tl.arange(0, BP)[None, :]
    if SPEC.interleaved:
        e = tl.arange(0, 2 * BP)[None, :]
        b_pairs = tl.reshape(tl.join(parts[0], parts[1]), (parts[0].shape[0], 2 * BP))
        tl.store(X + (o_row + e), b_pairs, mask=m_row & (e < 2 * PAIRS))
    elif PAIRS > 0:
        m_pairs = m_row & (p < PAIRS)
        tl.store(X + (o_row + p), parts[0], mask=m_pairs)
        tl.store(X + (o_row + p + PAIRS), parts[1], mask=m_pairs)
    for PART in tl.static_range(REST_PARTS):
        e = p + (SPEC.rest_start + PART * BP)
        m_part = m_row & (e < SPEC.head_dim)
        if PART == 0 and SPEC.rest_start < 2 * PAIRS:
            m_part &= e >= 2 * PAIRS
        tl.store(X + (o_row + e), parts[ROTATED + PART], mask=m_part)


@triton.jit
def rotated(x, cos, sin, SPEC: tl.constexpr):
    """The parts of heads with the pairs rotated by angles of these cosines and sines; ``-sin`` rotates them back."""
    REST_PARTS: tl.constexpr = SPEC.rest_parts
    result = x
    if SPEC.pairs > 0:
        result = (x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin)
        for PART in tl.static_range(REST_PARTS):
            result += (x[2 + PART],)
    return result


@triton.jit
def times(a, b):
    result = ()
    for PART in tl.static_range(len(a)):
        result += (a[PART] * b[PART],)
    return result


@triton.jit
def plus(a, b):
    result = ()
    for PART in tl.static_range(len(a)):
        result += (a[PART] + b[PART],)
    return result


@triton.jit
def scaled(a, b):
    result = ()
    for PART in tl.static_range(len(a)):
        result += (a[PART] * b,)
    return result


@triton.jit
def zero_parts(SPEC: tl.constexpr):
    T: tl.constexpr = SPEC.tokens
    BP: tl.constexpr = SPEC.columns
    PARTS: tl.constexpr = SPEC.parts
    result = ()
    for _ in tl.static_range(PARTS):
        result += (tl.zeros([T, BP], tl.float32),)
    return result


@triton.jit
def product(a, b):
    """Scalar products ``[T, 1]`` of the rows of two tiles."""
    sums = a[0] * b[0]
    for PART in tl.static_range(1, len(a)):
        sums += a[PART] * b[PART]
    return tl.sum(sums, 1, keep_dims=True)


@triton.jit
def column_sums(a):
    """Sum of all rows, in parts ``[1, BP]``."""
    result = ()
    for PART in tl.static_range(len(a)):
        result += (tl.sum(a[PART], 0, keep_dims=True),)
    return result


@triton.jit
def inverse_norm(x, m_row, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Factor ``[T, 1]`` that normalises each head: the reciprocal of its RMS, or of its 2-norm for cosine.

    It is 1 where ``m_row`` is False: the rows there are zeros, and ``eps`` may be 0.
    """
    square = product(x, x)
    return tl.rsqrt(tl.where(m_row, (square / D if NORM == "rms" else square) + eps, 1.0))


@triton.jit
def cos_sin(angle):
    """Cosine and sine in fp32, accurate to about two roundings for angles up to a million radians.

    Farther ones lose accuracy, as the nearest multiple of pi / 2 comes from one product: 3e-6 at four million, 1e-4 at
    ten, and beyond a hundred million the results are no cosines.

    CUDA's functions have a branch for huge angles, whose tables take more hardware registers than the rest of the
    kernel. So multiples of pi / 2, as the sum of three floats, are subtracted with one rounding each, none of which is
    larger than that of what is left. The polynomials for the rest, ``|r| <= pi / 4``, are those of Moshier's Cephes
    library.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = tl.fma(quarter, -1.5707963705062866, angle)
    r = tl.fma(quarter, 4.371138828673793e-8, r)
    r = tl.fma(quarter, 1.7151245100058819e-15, r)
    r2 = r * r
    sin = r + r * r2 * (-1.6666654611e-1 + r2 * (8.3321608736e-3 - r2 * 1.9515295891e-4))
    cos = 1.0 - 0.5 * r2 + r2 * r2 * (4.166664568298827e-2 + r2 * (-1.388731625493765e-3 + r2 * 2.443315711809948e-5))
    quadrant = quarter.to(tl.int32)
    odd = (quadrant & 1) == 1
    a, b = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quadrant + 1) & 2) == 2, -a, a), tl.where((quadrant & 2) == 2, -b, b)


@triton.jit
def rotation_of(rope, o_token, m_token, i_freq, SPEC: tl.constexpr):
    """Cosine and sine ``[T, BP]`` of the angles ``positions[token, axis] * freqs[i_freq, j]``, ``j`` varying fastest.

    Both are multiplied by the factor of ``rope``.
    """
    BP: tl.constexpr = SPEC.columns
    SPLIT: tl.constexpr = SPEC.split
    FREQS: tl.constexpr = SPEC.freqs
    cos, sin = 1.0, 0.0
    if SPEC.pairs > 0:
        p = tl.arange(0, BP)[None, :]
        # One position for each token and axis: so few that the compiler loads them in the layout of the heads' tiles.
        # With one for each element it would load them in another, and copy the angles through shared memory.
        b_position = tl.load(rope.Positions + o_token * len(SPLIT), mask=m_token, other=0).to(tl.float32)
        FIRST = 0
        for AXIS in tl.static_range(1, len(SPLIT)):
            FIRST += SPLIT[AXIS - 1]
            b_next = tl.load(rope.Positions + o_token * len(SPLIT) + AXIS, mask=m_token, other=0).to(tl.float32)
            b_position = tl.where(p >= FIRST, b_next, b_position)
        b_freq = tl.load(rope.Freqs + i_freq * FREQS + p % FREQS, mask=p < SPEC.pairs, other=0.0)
        cos, sin = cos_sin(b_position * b_freq)
        cos, sin = cos * rope.factor, sin * rope.factor
    return cos, sin


@triton.jit
def tile_of(share, i, SPEC: tl.constexpr):
    """Index, tokens ``[T, 1]`` and mask of the program's tile number ``i``.

    What programs compute at the same time are neighboring tiles.
    """
    i_tile = share.i_span + i * share.work.spans
    o_token = i_tile * SPEC.tokens + tl.arange(0, SPEC.tokens)[:, None]
    return i_tile, o_token, o_token < share.work.tokens


@triton.jit
def items_of(share, SIDE: tl.constexpr):
    """The first of the program's items, and their number."""
    first = share.i_run * share.work.run
    return first, tl.minimum(share.work.run, share.work.items[SIDE] - first).to(tl.int32)


@triton.jit
def freqs_row(share, SIDE: tl.constexpr, SPEC: tl.constexpr):
    """Index of the row of frequencies of the program's heads."""
    return share.i_outer // share.work.group[SIDE] if SPEC.by_head else 0


@triton.jit
def element_gains(Gain, SPEC: tl.constexpr):
    """The gains of an RMS norm, one per element of a head, in parts ``[1, BP]``."""
    row = tl.zeros([1, 1], tl.int32)
    return load_parts(Gain, row, row == 0, SPEC)
