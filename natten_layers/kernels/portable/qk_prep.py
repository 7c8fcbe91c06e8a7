"""Normalisation and rotary embedding (RoPE) of query and key heads: a forward and a backward kernel.

Both are bound by memory: every head is read once, with any strides, computed on in fp32 and written once. Angles are
computed from positions and frequencies, as a table of angles would be as large as the heads. A program computes the
angles of its tokens once, and uses them for all heads or images that share them.

Names are those of ``primitives.py``. A head is handled in four parts with equal layouts: the first elements of the
``PAIRS`` pairs that RoPE rotates, their second elements, and the two halves of the ``REST`` that is not rotated; ``BP``
is the larger of their sizes, padded to a power of two. In memory all second elements follow all first ones, or with
``INTERLEAVED`` each follows its own. ``SPLIT`` is how many pairs are rotated by each axis of a position, and ``FREQS``
the length of a row of frequencies, which are those of one axis or of all. ``outer`` and ``item`` are the batch and the
head axis, or the other way round: a program computes one ``outer`` and several consecutive ``items``, so that these
share its angles.
"""

# A call of one jit function from another is typed as a call from the host, which never returns.
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import launcher
from ..host.problem import QKPrep, new_like
from ..host.tiling import next_power_of_2

ELEMENTS = 4096  # elements of a tile of tokens: four 16-byte loads a thread in half precision
PROGRAMS = 8192  # enough programs to fill any device several times; a larger problem gives each more items instead


@triton.jit
def load_parts(X, o_row, m_row, PAIRS: tl.constexpr, REST: tl.constexpr, BP: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The four parts of the heads that start at ``o_row [T, 1]``, each ``[T, BP]`` in fp32."""
    HALF: tl.constexpr = REST // 2
    p = tl.arange(0, BP)[None, :]
    m_rest = m_row & (p < HALF)
    if INTERLEAVED:
        e = tl.arange(0, 2 * BP)[None, :]  # one load and a split, as strided loads would not be vectorised
        b_pairs = tl.load(X + (o_row + e), mask=m_row & (e < 2 * PAIRS), other=0.0).to(tl.float32)
        b_first, b_second = tl.split(tl.reshape(b_pairs, (b_pairs.shape[0], BP, 2)))
    else:
        m_pairs = m_row & (p < PAIRS)
        b_first = tl.load(X + (o_row + p), mask=m_pairs, other=0.0).to(tl.float32)
        b_second = tl.load(X + (o_row + p + PAIRS), mask=m_pairs, other=0.0).to(tl.float32)
    if REST > 0:
        b_third = tl.load(X + (o_row + p + 2 * PAIRS), mask=m_rest, other=0.0).to(tl.float32)
        b_fourth = tl.load(X + (o_row + p + (2 * PAIRS + HALF)), mask=m_rest, other=0.0).to(tl.float32)
    else:
        b_third, b_fourth = tl.zeros_like(b_first), tl.zeros_like(b_first)
    return b_first, b_second, b_third, b_fourth


@triton.jit
def store_parts(
    X, o_row, m_row, parts, PAIRS: tl.constexpr, REST: tl.constexpr, BP: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    HALF: tl.constexpr = REST // 2
    p = tl.arange(0, BP)[None, :]
    m_rest = m_row & (p < HALF)
    if INTERLEAVED:
        e = tl.arange(0, 2 * BP)[None, :]
        b_pairs = tl.reshape(tl.join(parts[0], parts[1]), (parts[0].shape[0], 2 * BP))
        tl.store(X + (o_row + e), b_pairs, mask=m_row & (e < 2 * PAIRS))
    elif PAIRS > 0:
        m_pairs = m_row & (p < PAIRS)
        tl.store(X + (o_row + p), parts[0], mask=m_pairs)
        tl.store(X + (o_row + p + PAIRS), parts[1], mask=m_pairs)
    if REST > 0:
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
def rotation_of(
    Positions, Freqs, o_token, m_token, i_freq, factor,
    SPLIT: tl.constexpr, FREQS: tl.constexpr, PAIRS: tl.constexpr, T: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Cosine and sine ``[T, BP]`` of the angles ``positions[token, axis] * freqs[i_freq, j]``, ``j`` varying fastest.

    Both are multiplied by ``factor``.
    """
    if PAIRS == 0:
        cos, sin = tl.full([T, BP], 1.0, tl.float32), tl.zeros([T, BP], tl.float32)
    else:
        p = tl.arange(0, BP)[None, :]
        m_pairs = p < PAIRS
        axis = tl.zeros([1, BP], tl.int32)
        FIRST = 0
        for AXIS in tl.static_range(len(SPLIT) - 1):
            FIRST += SPLIT[AXIS]
            axis += (p >= FIRST).to(tl.int32)
        b_position = tl.load(Positions + o_token * len(SPLIT) + axis, mask=m_token & m_pairs, other=0).to(tl.float32)
        cos, sin = cos_sin(b_position * tl.load(Freqs + i_freq * FREQS + p % FREQS, mask=m_pairs, other=0.0))
        cos, sin = cos * factor, sin * factor
    return cos, sin


@triton.jit
def program_share(tokens, outers, items, run, T: tl.constexpr):
    """The tile of tokens and the run of consecutive items that this program computes.

    A block is a pair of a run and a tile. ``outer`` varies faster than the block, as the heads of a token are neighbors
    in memory.
    """
    i_block = (tl.program_id(0) // outers).to(tl.int64)
    tiles = tl.cdiv(tokens, T)
    i_tile = i_block % tiles
    o_token = i_tile * T + tl.arange(0, T)[:, None]
    first = i_block // tiles * run
    return i_tile, i_block, o_token, o_token < tokens, first, tl.minimum(run, items - first).to(tl.int32)


@triton.jit
def element_gains(Gain, PAIRS: tl.constexpr, REST: tl.constexpr, BP: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The gains of an RMS norm, one per element of a head, in four parts ``[1, BP]``."""
    row = tl.zeros([1, 1], tl.int32)
    return load_parts(Gain, row, row == 0, PAIRS, REST, BP, INTERLEAVED)


@triton.jit
def prepare_tile(
    X, Out, Gain, Positions, Freqs, x_strides, out_strides,
    i_outer, tokens, outers, items, run, group, factor, eps,
    SPLIT: tl.constexpr, FREQS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BP: tl.constexpr,
    T: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate a tile of tokens of one ``outer``, for a run of its items."""
    _, _, o_token, m_token, i_item, count = program_share(tokens, outers, items, run, T)
    i_freq = i_outer // group if BY_HEAD else 0
    cos, sin = rotation_of(Positions, Freqs, o_token, m_token, i_freq, factor, SPLIT, FREQS, PAIRS, T, BP)
    if NORM == "rms":
        gains = element_gains(Gain, PAIRS, REST, BP, INTERLEAVED)
    X += i_outer * x_strides[0]
    Out += i_outer * out_strides[0]
    for _ in tl.range(0, count, num_stages=1):
        x = load_parts(X, o_token * x_strides[1] + i_item * x_strides[2], m_token, PAIRS, REST, BP, INTERLEAVED)
        if NORM != "none":
            b_scale = inverse_norm(x, eps, 2 * PAIRS + REST, NORM)
            if NORM == "rms":
                x = times(x, gains)
            elif Gain is not None:
                b_scale *= tl.load(Gain + (i_outer if BY_HEAD else i_item)).to(tl.float32)
            x = scaled(x, b_scale)
        x = (x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin, x[2], x[3])
        store_parts(Out, o_token * out_strides[1] + i_item * out_strides[2], m_token, x, PAIRS, REST, BP, INTERLEAVED)
        i_item += 1


@triton.jit
def prepare_tile_jvp(
    X, XDot, OutDot, Gain, GainDot, Positions, Freqs, x_strides, x_dot_strides, out_strides,
    i_outer, tokens, outers, items, run, group, factor, eps,
    SPLIT: tl.constexpr, FREQS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BP: tl.constexpr,
    T: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Tangent of ``prepare_tile``. ``XDot`` or ``GainDot`` is None where it is zero.

    With ``n = x * scale`` the tangent of the normalised head is ``scale * (xdot - n * (n . xdot)) * gain +
    n * gaindot``, where the scalar product is a mean for RMS norms. It is rotated as the head is.
    """
    D: tl.constexpr = 2 * PAIRS + REST
    _, _, o_token, m_token, i_item, count = program_share(tokens, outers, items, run, T)
    i_freq = i_outer // group if BY_HEAD else 0
    cos, sin = rotation_of(Positions, Freqs, o_token, m_token, i_freq, factor, SPLIT, FREQS, PAIRS, T, BP)
    if NORM == "rms":
        gains = element_gains(Gain, PAIRS, REST, BP, INTERLEAVED)
        if GainDot is not None:
            gain_dots = element_gains(GainDot, PAIRS, REST, BP, INTERLEAVED)
    X += i_outer * x_strides[0]
    if XDot is not None:
        XDot += i_outer * x_dot_strides[0]
    OutDot += i_outer * out_strides[0]
    for _ in tl.range(0, count, num_stages=1):
        zeros = tl.zeros([T, BP], tl.float32)
        u = (zeros, zeros, zeros, zeros)
        if XDot is not None:
            o_dot = o_token * x_dot_strides[1] + i_item * x_dot_strides[2]
            u = load_parts(XDot, o_dot, m_token, PAIRS, REST, BP, INTERLEAVED)
        if NORM != "none":
            x = load_parts(X, o_token * x_strides[1] + i_item * x_strides[2], m_token, PAIRS, REST, BP, INTERLEAVED)
            b_scale = inverse_norm(x, eps, D, NORM)
            n = scaled(x, b_scale)
            if XDot is not None:
                b_along = product(n, u) / D if NORM == "rms" else product(n, u)
                u = scaled(plus(u, scaled(n, -b_along)), b_scale)
            if NORM == "rms":
                u = times(u, gains)
                if GainDot is not None:
                    u = plus(u, times(n, gain_dots))
            elif Gain is not None:
                i_gain = i_outer if BY_HEAD else i_item
                u = scaled(u, tl.load(Gain + i_gain).to(tl.float32))
                if GainDot is not None:
                    u = plus(u, scaled(n, tl.load(GainDot + i_gain).to(tl.float32)))
        u = (u[0] * cos - u[1] * sin, u[1] * cos + u[0] * sin, u[2], u[3])
        o_out = o_token * out_strides[1] + i_item * out_strides[2]
        store_parts(OutDot, o_out, m_token, u, PAIRS, REST, BP, INTERLEAVED)
        i_item += 1


@triton.jit
def prepare_tile_backward(
    X, Grad, GradX, Partial, Gain, Positions, Freqs, x_strides, grad_strides, out_strides,
    i_outer, tokens, outers, own_outers, items, run, group, factor, eps,
    SPLIT: tl.constexpr, FREQS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BP: tl.constexpr,
    T: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Gradient of ``prepare_tile``.

    The gradient of the result is rotated back to ``u``. With ``n = x * scale`` and ``h = u * gain`` the gradients are
    ``dgain = sum u * n`` and ``dx = scale * (h - n * (h . n))``, where the scalar product is a mean for RMS norms.

    The gradient of gains is written as partial sums, which the caller adds in a fixed order: ``[tiles, outer, item]``
    for cosine, and ``[blocks, outer, D]``, a row per program, for RMS norms.
    """
    D: tl.constexpr = 2 * PAIRS + REST
    i_tile, i_block, o_token, m_token, i_item, count = program_share(tokens, outers, items, run, T)
    i_freq = i_outer // group if BY_HEAD else 0
    cos, sin = rotation_of(Positions, Freqs, o_token, m_token, i_freq, factor, SPLIT, FREQS, PAIRS, T, BP)
    if NORM == "rms":
        gains = element_gains(Gain, PAIRS, REST, BP, INTERLEAVED)
        zeros = tl.zeros([T, BP], tl.float32)
        sums = (zeros, zeros, zeros, zeros)
    X += i_outer * x_strides[0]
    Grad += i_outer * grad_strides[0]
    GradX += i_outer * out_strides[0]
    for _ in tl.range(0, count, num_stages=1):
        d = load_parts(
            Grad, o_token * grad_strides[1] + i_item * grad_strides[2], m_token, PAIRS, REST, BP, INTERLEAVED
        )
        u = (d[0] * cos + d[1] * sin, d[1] * cos - d[0] * sin, d[2], d[3])
        if NORM != "none":
            x = load_parts(X, o_token * x_strides[1] + i_item * x_strides[2], m_token, PAIRS, REST, BP, INTERLEAVED)
            b_scale = inverse_norm(x, eps, D, NORM)
            n = scaled(x, b_scale)
            if NORM == "rms":
                sums = plus(sums, times(u, n))
                u = times(u, gains)
                b_along = product(u, n) / D
            else:
                b_along = product(u, n)
                if Gain is not None:
                    o_partial = (i_tile * own_outers + i_outer) * items + i_item
                    tl.store(Partial + o_partial, tl.sum(tl.where(m_token, b_along, 0.0)))
                    b_scale *= tl.load(Gain + (i_outer if BY_HEAD else i_item)).to(tl.float32)
            u = scaled(plus(u, scaled(n, -b_along)), b_scale)
        store_parts(GradX, o_token * out_strides[1] + i_item * out_strides[2], m_token, u, PAIRS, REST, BP, INTERLEAVED)
        i_item += 1
    if NORM == "rms":
        row = tl.zeros([1, 1], tl.int64) + (i_block * own_outers + i_outer) * D
        store_parts(Partial, row, row >= 0, column_sums(sums), PAIRS, REST, BP, INTERLEAVED)


@triton.jit
def qk_prep_kernel(
    Q, K, OutQ, OutK, GainQ, GainK, Positions, Freqs, q_strides, k_strides, outq_strides, outk_strides,
    tokens, outers, items, group, run, factor, eps,
    SPLIT: tl.constexpr, FREQS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BP: tl.constexpr,
    T: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate queries and keys in one launch.

    Tensors are ``[outer, token, item, D]`` with contiguous last axes. ``outers``, ``items`` and ``group`` are pairs,
    for queries and for keys; ``group`` is the number of outers that share a row of ``Freqs``.
    """
    total = outers[0] + outers[1]
    i_outer = (tl.program_id(0) % total).to(tl.int64)
    if i_outer < outers[0]:
        prepare_tile(
            Q, OutQ, GainQ, Positions, Freqs, q_strides, outq_strides,
            i_outer, tokens, total, items[0], run, group[0], factor, eps,
            SPLIT, FREQS, PAIRS, REST, BP, T, INTERLEAVED, NORM, BY_HEAD,
        )  # fmt: skip
    else:
        prepare_tile(
            K, OutK, GainK, Positions, Freqs, k_strides, outk_strides,
            i_outer - outers[0], tokens, total, items[1], run, group[1], factor, eps,
            SPLIT, FREQS, PAIRS, REST, BP, T, INTERLEAVED, NORM, BY_HEAD,
        )  # fmt: skip


@triton.jit
def qk_prep_jvp_kernel(
    Q, K, QDot, KDot, OutQDot, OutKDot, GainQDot, GainKDot, GainQ, GainK, Positions, Freqs,
    q_strides, k_strides, q_dot_strides, k_dot_strides, outq_strides, outk_strides,
    tokens, outers, items, group, run, factor, eps,
    SPLIT: tl.constexpr, FREQS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BP: tl.constexpr,
    T: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Tangents of ``qk_prep_kernel``; the result of a side is None if it has no tangent."""
    total = outers[0] + outers[1]
    i_outer = (tl.program_id(0) % total).to(tl.int64)
    if i_outer < outers[0]:
        if OutQDot is not None:
            prepare_tile_jvp(
                Q, QDot, OutQDot, GainQ, GainQDot, Positions, Freqs, q_strides, q_dot_strides, outq_strides,
                i_outer, tokens, total, items[0], run, group[0], factor, eps,
                SPLIT, FREQS, PAIRS, REST, BP, T, INTERLEAVED, NORM, BY_HEAD,
            )  # fmt: skip
    else:
        if OutKDot is not None:
            prepare_tile_jvp(
                K, KDot, OutKDot, GainK, GainKDot, Positions, Freqs, k_strides, k_dot_strides, outk_strides,
                i_outer - outers[0], tokens, total, items[1], run, group[1], factor, eps,
                SPLIT, FREQS, PAIRS, REST, BP, T, INTERLEAVED, NORM, BY_HEAD,
            )  # fmt: skip


@triton.jit
def qk_prep_backward_kernel(
    Q, K, DOutQ, DOutK, DQ, DK, PartialQ, PartialK, GainQ, GainK, Positions, Freqs,
    q_strides, k_strides, doutq_strides, doutk_strides, dq_strides, dk_strides,
    tokens, outers, items, group, run, factor, eps,
    SPLIT: tl.constexpr, FREQS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BP: tl.constexpr,
    T: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Gradients of ``qk_prep_kernel``: ``DQ``, ``DK``, and partial sums of the gradients of gains."""
    total = outers[0] + outers[1]
    i_outer = (tl.program_id(0) % total).to(tl.int64)
    if i_outer < outers[0]:
        prepare_tile_backward(
            Q, DOutQ, DQ, PartialQ, GainQ, Positions, Freqs, q_strides, doutq_strides, dq_strides,
            i_outer, tokens, total, outers[0], items[0], run, group[0], factor, eps,
            SPLIT, FREQS, PAIRS, REST, BP, T, INTERLEAVED, NORM, BY_HEAD,
        )  # fmt: skip
    else:
        prepare_tile_backward(
            K, DOutK, DK, PartialK, GainK, Positions, Freqs, k_strides, doutk_strides, dk_strides,
            i_outer - outers[0], tokens, total, outers[1], items[1], run, group[1], factor, eps,
            SPLIT, FREQS, PAIRS, REST, BP, T, INTERLEAVED, NORM, BY_HEAD,
        )  # fmt: skip


def _view(prep: QKPrep, x: Tensor) -> Tensor:
    """A tensor as ``[outer, token, item, D]``.

    It is copied only if its spatial axes cannot be merged, which never happens to the output of a projection.
    """
    x = x.flatten(1, -3)
    if prep.positions is not None and prep.positions.shape[0] > 1:
        x = x.flatten(0, 1)[None]
    return x.transpose(0, 2) if prep.by_head else x


def _launch(
    prep: QKPrep, kernel: Any, tensors: Sequence[Tensor | None], of_gains: Sequence[Tensor | None] = ()
) -> None:
    """Launch ``kernel`` on ``tensors [outer, token, item, D]``, of which the first two are query and key.

    ``of_gains`` belong to the derivatives with respect to gains: partial sums of gradients, or tangents.
    """
    query, key = tensors[:2]
    assert query is not None
    assert key is not None
    kind = prep.kind
    rest = query.shape[3] - 2 * kind.pairs
    tiles, runs, run = blocks(query, key)
    outers = len(query), len(key)
    launch = launcher(
        kernel,
        (sum(outers) * tiles * runs,),
        (
            *((0, 0, 0) if t is None else t.stride()[:3] for t in tensors),
            query.shape[1], outers, (query.shape[2], key.shape[2]),
            tuple(n // len(prep.freqs) if prep.freqs is not None and kind.by_head else 1 for n in outers), run,
        ),
        SPLIT=kind.split, FREQS=1 if prep.freqs is None else prep.freqs.shape[1], PAIRS=kind.pairs, REST=rest,
        BP=next_power_of_2(max(kind.pairs, rest // 2)), T=tile_size(query.shape[3]),
        INTERLEAVED=kind.interleaved, NORM=kind.norm, BY_HEAD=kind.by_head, num_warps=4,
    )  # fmt: skip
    inputs = (*tensors, *of_gains, prep.query_gain, prep.key_gain, prep.positions, prep.freqs)
    launch(inputs, (prep.factor, prep.eps))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def tile_size(head_dim: int) -> int:
    return min(128, ELEMENTS // next_power_of_2(head_dim))


def blocks(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Number of tiles of tokens, number of runs of items, items of a run; inputs are ``[outer, token, item, D]``."""
    tiles = _ceil(query.shape[1], tile_size(query.shape[3]))
    items = max(query.shape[2], key.shape[2])
    run = _ceil(items, _ceil(PROGRAMS, tiles * (len(query) + len(key))))
    return tiles, _ceil(items, run), run


def qk_prep(query: Tensor, key: Tensor, prep: QKPrep) -> tuple[Tensor, Tensor]:
    """``query [B, *spatial, Hq, D]`` and ``key [B, *spatial, Hkv, D]`` normalised and rotated, contiguous."""
    out_query, out_key = new_like(query), new_like(key)
    _launch(prep, qk_prep_kernel, [_view(prep, x) for x in (query, key, out_query, out_key)])
    return out_query, out_key


def qk_prep_jvp(
    query: Tensor,
    key: Tensor,
    prep: QKPrep,
    query_tangent: Tensor | None,
    key_tangent: Tensor | None,
    query_gain_tangent: Tensor | None,
    key_gain_tangent: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Tangents of the results of :func:`qk_prep`, contiguous; None where neither the head nor its gain has one."""
    has_query = query_tangent is not None or query_gain_tangent is not None
    has_key = key_tangent is not None or key_gain_tangent is not None
    results = new_like(query) if has_query else None, new_like(key) if has_key else None
    tensors = query, key, query_tangent, key_tangent, *results
    views = [None if x is None else _view(prep, x) for x in tensors]
    _launch(prep, qk_prep_jvp_kernel, views, (query_gain_tangent, key_gain_tangent))
    return results


def qk_prep_backward(
    query: Tensor, key: Tensor, prep: QKPrep, grad_query: Tensor, grad_key: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query and key, contiguous, and of their gains."""
    gains = prep.query_gain, prep.key_gain
    d_query, d_key = new_like(query), new_like(key)
    views = [_view(prep, x) for x in (query, key, grad_query, grad_key, d_query, d_key)]
    tiles, runs, _ = blocks(*views[:2])
    partials: list[Tensor | None] = []
    for gain, view in zip(gains, views[:2], strict=True):
        outers, _, items, head_dim = view.shape
        shape = (tiles * runs, outers, head_dim) if prep.norm == "rms" else (tiles, outers, items)
        partials.append(None if gain is None else view.new_empty(shape, dtype=torch.float32))
    _launch(prep, qk_prep_backward_kernel, views, partials)
    # The gain of an RMS norm has an entry per element of a head, that of cosine an entry per head: the rest is summed.
    summed = (0, 2) if prep.norm == "cosine" and prep.by_head else (0, 1)
    d_gains = [
        None if gain is None or sums is None else sums.sum(summed).to(gain.dtype)
        for gain, sums in zip(gains, partials, strict=True)
    ]
    return d_query, d_key, d_gains[0], d_gains[1]
