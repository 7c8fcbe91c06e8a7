"""Heads in four parts, their arithmetic, and the angles of RoPE: what the kernels of ``qk_prep.py`` are made of.

The parts have equal layouts ``[T, BP]``: the first elements of the pairs that RoPE rotates, their second elements, and
the two halves of the rest, which is not rotated. In memory all second elements follow all first ones, or each follows
its own if they are interleaved.
"""

# A call of one jit function from another is typed as a call from the host, which never returns.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from typing import Any, NamedTuple

import triton
import triton.language as tl


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
    """of each of the four parts of a head: the larger of their sizes, padded to a power of two"""
    tokens: int
    """of a tile"""
    interleaved: bool
    norm: str
    by_head: bool
    """whether frequencies differ by outer; then outers are heads"""

    @property
    def head_dim(self) -> int:
        return 2 * self.pairs + self.rest


class Rope(NamedTuple):
    """What angles are made of, or None."""

    Positions: Any
    Freqs: Any
    factor: Any
    """on the cosine and sine of all angles"""


class Share(NamedTuple):
    """What the programs of queries, or those of keys, divide among themselves."""

    i_outer: Any
    """of this program"""
    tokens: Any
    programs: Any
    """of one block, for queries and keys together: a program for each outer of either"""
    outers: Any
    items: Any
    run: Any
    """consecutive items of a program"""
    group: Any
    """outers that share a row of frequencies"""


@triton.jit
def load_parts(X, o_row, m_row, SPEC: tl.constexpr):
    """The four parts of the heads that start at ``o_row [T, 1]``, each ``[T, BP]`` in fp32."""
    BP: tl.constexpr = SPEC.columns
    PAIRS: tl.constexpr = SPEC.pairs
    HALF: tl.constexpr = SPEC.rest // 2
    p = tl.arange(0, BP)[None, :]
    m_rest = m_row & (p < HALF)
    if SPEC.interleaved:
        e = tl.arange(0, 2 * BP)[None, :]  # one load and a split, as strided loads would not be vectorised
        b_pairs = tl.load(X + (o_row + e), mask=m_row & (e < 2 * PAIRS), other=0.0).to(tl.float32)
        b_first, b_second = tl.split(tl.reshape(b_pairs, (b_pairs.shape[0], BP, 2)))
    else:
        m_pairs = m_row & (p < PAIRS)
        b_first = tl.load(X + (o_row + p), mask=m_pairs, other=0.0).to(tl.float32)
        b_second = tl.load(X + (o_row + p + PAIRS), mask=m_pairs, other=0.0).to(tl.float32)
    if HALF > 0:
        b_third = tl.load(X + (o_row + p + 2 * PAIRS), mask=m_rest, other=0.0).to(tl.float32)
        b_fourth = tl.load(X + (o_row + p + (2 * PAIRS + HALF)), mask=m_rest, other=0.0).to(tl.float32)
    else:
        b_third, b_fourth = tl.zeros_like(b_first), tl.zeros_like(b_first)
    return b_first, b_second, b_third, b_fourth


@triton.jit
def store_parts(X, o_row, m_row, parts, SPEC: tl.constexpr):
    BP: tl.constexpr = SPEC.columns
    PAIRS: tl.constexpr = SPEC.pairs
    HALF: tl.constexpr = SPEC.rest // 2
    p = tl.arange(0, BP)[None, :]
    m_rest = m_row & (p < HALF)
    if SPEC.interleaved:
        e = tl.arange(0, 2 * BP)[None, :]
        b_pairs = tl.reshape(tl.join(parts[0], parts[1]), (parts[0].shape[0], 2 * BP))
        tl.store(X + (o_row + e), b_pairs, mask=m_row & (e < 2 * PAIRS))
    elif PAIRS > 0:
        m_pairs = m_row & (p < PAIRS)
        tl.store(X + (o_row + p), parts[0], mask=m_pairs)
        tl.store(X + (o_row + p + PAIRS), parts[1], mask=m_pairs)
    if HALF > 0:
        tl.store(X + (o_row + p + 2 * PAIRS), parts[2], mask=m_rest)
        tl.store(X + (o_row + p + (2 * PAIRS + HALF)), parts[3], mask=m_rest)


@triton.jit
def times(a, b):
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]


@triton.jit
def plus(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@triton.jit
def scaled(a, b):
    return a[0] * b, a[1] * b, a[2] * b, a[3] * b


@triton.jit
def product(a, b):
    """Scalar products ``[T, 1]`` of the rows of two tiles."""
    return tl.sum(a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3], 1, keep_dims=True)


@triton.jit
def column_sums(a):
    """Sum of all rows, in four parts ``[1, BP]``."""
    return (
        tl.sum(a[0], 0, keep_dims=True),
        tl.sum(a[1], 0, keep_dims=True),
        tl.sum(a[2], 0, keep_dims=True),
        tl.sum(a[3], 0, keep_dims=True),
    )


@triton.jit
def inverse_norm(x, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Factor ``[T, 1]`` that normalises each head: the reciprocal of its RMS, or of its 2-norm for cosine."""
    square = product(x, x)
    return tl.rsqrt((square / D if NORM == "rms" else square) + eps)


@triton.jit
def cos_sin(angle):
    """Cosine and sine in fp32, accurate to about two roundings for angles up to millions of radians.

    CUDA's functions have a branch for huge angles, whose tables take more hardware registers than the rest of the
    kernel. So multiples of pi / 2 are subtracted in fp64 instead; the polynomials for the rest, ``|r| <= pi / 4``, are
    those of Moshier's Cephes library.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = (angle.to(tl.float64) - quarter.to(tl.float64) * 1.5707963267948966).to(tl.float32)
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
    T: tl.constexpr = SPEC.tokens
    SPLIT: tl.constexpr = SPEC.split
    FREQS: tl.constexpr = SPEC.freqs
    if SPEC.pairs == 0:
        cos, sin = tl.full([T, BP], 1.0, tl.float32), tl.zeros([T, BP], tl.float32)
    else:
        p = tl.arange(0, BP)[None, :]
        m_pairs = p < SPEC.pairs
        axis = tl.zeros([1, BP], tl.int32)
        FIRST = 0
        for AXIS in tl.static_range(len(SPLIT) - 1):
            FIRST += SPLIT[AXIS]
            axis += (p >= FIRST).to(tl.int32)
        p_position = rope.Positions + o_token * len(SPLIT) + axis
        b_position = tl.load(p_position, mask=m_token & m_pairs, other=0).to(tl.float32)
        cos, sin = cos_sin(b_position * tl.load(rope.Freqs + i_freq * FREQS + p % FREQS, mask=m_pairs, other=0.0))
        cos, sin = cos * rope.factor, sin * rope.factor
    return cos, sin


@triton.jit
def program_share(share, T: tl.constexpr):
    """The tile of tokens and the run of consecutive items that this program computes.

    A block is a pair of a run and a tile. ``outer`` varies faster than the block, as the heads of a token are neighbors
    in memory.
    """
    i_block = (tl.program_id(0) // share.programs).to(tl.int64)
    tiles = tl.cdiv(share.tokens, T)
    i_tile = i_block % tiles
    o_token = i_tile * T + tl.arange(0, T)[:, None]
    first = i_block // tiles * share.run
    return (
        i_tile,
        i_block,
        o_token,
        o_token < share.tokens,
        first,
        tl.minimum(share.run, share.items - first).to(tl.int32),
    )


@triton.jit
def element_gains(Gain, SPEC: tl.constexpr):
    """The gains of an RMS norm, one per element of a head, in four parts ``[1, BP]``."""
    row = tl.zeros([1, 1], tl.int32)
    return load_parts(Gain, row, row == 0, SPEC)
