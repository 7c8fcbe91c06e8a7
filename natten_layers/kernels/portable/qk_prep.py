"""Normalisation and rotary embedding (RoPE) of query and key heads: a forward and a backward kernel.

Both are bound by memory: every head is read once, with any strides, computed on in fp32 and written once. Angles are
computed from positions and frequencies, as a table of angles would be as large as the heads. A program computes the
angles of its tokens once, and uses them for all heads or images that share them.

Names are those of ``primitives.py``. ``outer`` and ``item`` are the batch and the head axis, or the other way round: a
program computes one ``outer`` and several consecutive ``items``, so that these share its angles. Strides are
``(outer, token, item)``.
"""

# A call of one jit function from another is typed as a call from the host, which never returns.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import launcher
from ..host.problem import new_like
from ..host.qk_prep import QKPrep
from ..host.tiling import next_power_of_2
from .parameters import View
from .qk_prep_parts import (
    QKPrepSpec,
    Rope,
    Share,
    column_sums,
    element_gains,
    inverse_norm,
    load_parts,
    plus,
    product,
    program_share,
    rotation_of,
    scaled,
    store_parts,
    times,
)

ELEMENTS = 4096  # elements of a tile of tokens: four 16-byte loads a thread in half precision
PROGRAMS = 8192  # enough programs to fill any device several times; a larger problem gives each more items instead


class PrepTensors(NamedTuple):
    """What :func:`qk_prep_kernel` reads and writes."""

    query: Any
    key: Any
    out_query: Any
    out_key: Any
    query_gain: Any
    key_gain: Any
    positions: Any
    freqs: Any


class PrepTangents(NamedTuple):
    """What :func:`qk_prep_jvp_kernel` reads and writes. Names in ``dot`` are tangents, or None."""

    query: Any
    key: Any
    query_dot: Any
    key_dot: Any
    out_query_dot: Any
    out_key_dot: Any
    query_gain_dot: Any
    key_gain_dot: Any
    query_gain: Any
    key_gain: Any
    positions: Any
    freqs: Any


class PrepGradients(NamedTuple):
    """What :func:`qk_prep_backward_kernel` reads and writes."""

    query: Any
    key: Any
    grad_out_query: Any
    grad_out_key: Any
    grad_query: Any
    grad_key: Any
    query_partial: Any
    """partial sums of the gradient of a gain, or None"""
    key_partial: Any
    query_gain: Any
    key_gain: Any
    positions: Any
    freqs: Any


@triton.jit
def prepare_tile(x_view, out, Gain, rope, share, eps, SPEC: tl.constexpr):
    """Normalise and rotate a tile of tokens of one ``outer``, for a run of its items."""
    NORM: tl.constexpr = SPEC.norm
    _, _, o_token, m_token, i_item, count = program_share(share, SPEC.tokens)
    i_freq = share.i_outer // share.group if SPEC.by_head else 0
    cos, sin = rotation_of(rope, o_token, m_token, i_freq, SPEC)
    if NORM == "rms":
        gains = element_gains(Gain, SPEC)
    x_strides, out_strides = x_view.strides, out.strides
    X = x_view.pointer + share.i_outer * x_strides[0]
    Out = out.pointer + share.i_outer * out_strides[0]
    for _ in tl.range(0, count, num_stages=1):
        x = load_parts(X, o_token * x_strides[1] + i_item * x_strides[2], m_token, SPEC)
        if NORM != "none":
            b_scale = inverse_norm(x, eps, SPEC.head_dim, NORM)
            if NORM == "rms":
                x = times(x, gains)
            elif Gain is not None:
                b_scale *= tl.load(Gain + (share.i_outer if SPEC.by_head else i_item)).to(tl.float32)
            x = scaled(x, b_scale)
        x = (x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin, x[2], x[3])
        store_parts(Out, o_token * out_strides[1] + i_item * out_strides[2], m_token, x, SPEC)
        i_item += 1


@triton.jit
def prepare_tile_jvp(x_view, x_dot, out_dot, Gain, GainDot, rope, share, eps, SPEC: tl.constexpr):
    """Tangent of ``prepare_tile``. ``x_dot`` or ``GainDot`` is None where it is zero.

    With ``n = x * scale`` the tangent of the normalised head is ``scale * (xdot - n * (n . xdot)) * gain +
    n * gaindot``, where the scalar product is a mean for RMS norms. It is rotated as the head is.
    """
    NORM: tl.constexpr = SPEC.norm
    T: tl.constexpr = SPEC.tokens
    BP: tl.constexpr = SPEC.columns
    _, _, o_token, m_token, i_item, count = program_share(share, T)
    i_outer = share.i_outer
    i_freq = i_outer // share.group if SPEC.by_head else 0
    cos, sin = rotation_of(rope, o_token, m_token, i_freq, SPEC)
    if NORM == "rms":
        gains = element_gains(Gain, SPEC)
        if GainDot is not None:
            gain_dots = element_gains(GainDot, SPEC)
    x_strides, out_strides = x_view.strides, out_dot.strides
    X = x_view.pointer + i_outer * x_strides[0]
    if x_dot is not None:
        x_dot_strides = x_dot.strides
        XDot = x_dot.pointer + i_outer * x_dot_strides[0]
    OutDot = out_dot.pointer + i_outer * out_strides[0]
    for _ in tl.range(0, count, num_stages=1):
        zeros = tl.zeros([T, BP], tl.float32)
        u = (zeros, zeros, zeros, zeros)
        if x_dot is not None:
            u = load_parts(XDot, o_token * x_dot_strides[1] + i_item * x_dot_strides[2], m_token, SPEC)
        if NORM != "none":
            x = load_parts(X, o_token * x_strides[1] + i_item * x_strides[2], m_token, SPEC)
            b_scale = inverse_norm(x, eps, SPEC.head_dim, NORM)
            n = scaled(x, b_scale)
            if x_dot is not None:
                b_along = product(n, u) / SPEC.head_dim if NORM == "rms" else product(n, u)
                u = scaled(plus(u, scaled(n, -b_along)), b_scale)
            if NORM == "rms":
                u = times(u, gains)
                if GainDot is not None:
                    u = plus(u, times(n, gain_dots))
            elif Gain is not None:
                i_gain = i_outer if SPEC.by_head else i_item
                u = scaled(u, tl.load(Gain + i_gain).to(tl.float32))
                if GainDot is not None:
                    u = plus(u, scaled(n, tl.load(GainDot + i_gain).to(tl.float32)))
        u = (u[0] * cos - u[1] * sin, u[1] * cos + u[0] * sin, u[2], u[3])
        store_parts(OutDot, o_token * out_strides[1] + i_item * out_strides[2], m_token, u, SPEC)
        i_item += 1


@triton.jit
def prepare_tile_backward(x_view, grad, grad_x, Partial, Gain, rope, share, eps, SPEC: tl.constexpr):
    """Gradient of ``prepare_tile``.

    The gradient of the result is rotated back to ``u``. With ``n = x * scale`` and ``h = u * gain`` the gradients are
    ``dgain = sum u * n`` and ``dx = scale * (h - n * (h . n))``, where the scalar product is a mean for RMS norms.

    The gradient of gains is written as partial sums, which the caller adds in a fixed order: ``[tiles, outer, item]``
    for cosine, and ``[blocks, outer, D]``, a row per program, for RMS norms.
    """
    NORM: tl.constexpr = SPEC.norm
    T: tl.constexpr = SPEC.tokens
    BP: tl.constexpr = SPEC.columns
    D: tl.constexpr = SPEC.head_dim
    i_tile, i_block, o_token, m_token, i_item, count = program_share(share, T)
    i_outer = share.i_outer
    i_freq = i_outer // share.group if SPEC.by_head else 0
    cos, sin = rotation_of(rope, o_token, m_token, i_freq, SPEC)
    if NORM == "rms":
        gains = element_gains(Gain, SPEC)
        zeros = tl.zeros([T, BP], tl.float32)
        sums = (zeros, zeros, zeros, zeros)
    x_strides, grad_strides, out_strides = x_view.strides, grad.strides, grad_x.strides
    X = x_view.pointer + i_outer * x_strides[0]
    Grad = grad.pointer + i_outer * grad_strides[0]
    GradX = grad_x.pointer + i_outer * out_strides[0]
    for _ in tl.range(0, count, num_stages=1):
        d = load_parts(Grad, o_token * grad_strides[1] + i_item * grad_strides[2], m_token, SPEC)
        u = (d[0] * cos + d[1] * sin, d[1] * cos - d[0] * sin, d[2], d[3])
        if NORM != "none":
            x = load_parts(X, o_token * x_strides[1] + i_item * x_strides[2], m_token, SPEC)
            b_scale = inverse_norm(x, eps, D, NORM)
            n = scaled(x, b_scale)
            if NORM == "rms":
                sums = plus(sums, times(u, n))
                u = times(u, gains)
                b_along = product(u, n) / D
            else:
                b_along = product(u, n)
                if Gain is not None:
                    o_partial = (i_tile * share.outers + i_outer) * share.items + i_item
                    tl.store(Partial + o_partial, tl.sum(tl.where(m_token, b_along, 0.0)))
                    b_scale *= tl.load(Gain + (i_outer if SPEC.by_head else i_item)).to(tl.float32)
            u = scaled(plus(u, scaled(n, -b_along)), b_scale)
        store_parts(GradX, o_token * out_strides[1] + i_item * out_strides[2], m_token, u, SPEC)
        i_item += 1
    if NORM == "rms":
        row = tl.zeros([1, 1], tl.int64) + (i_block * share.outers + i_outer) * D
        store_parts(Partial, row, row >= 0, column_sums(sums), SPEC)


@triton.jit
def qk_prep_kernel(tensors, strides, tokens, outers, items, group, run, factor, eps, SPEC: tl.constexpr):
    """Normalise and rotate queries and keys in one launch.

    Tensors are ``[outer, token, item, D]`` with contiguous last axes. ``outers``, ``items`` and ``group`` (see
    :class:`Share`) are pairs, for queries and for keys. ``tensors`` are :class:`PrepTensors`, and ``strides`` those of
    the first of them.
    """
    q_strides, k_strides, outq_strides, outk_strides = strides
    total = outers[0] + outers[1]
    i_outer = (tl.program_id(0) % total).to(tl.int64)
    rope = Rope(tensors.positions, tensors.freqs, factor)
    if i_outer < outers[0]:
        share = Share(i_outer, tokens, total, outers[0], items[0], run, group[0])
        prepare_tile(
            View(tensors.query, q_strides), View(tensors.out_query, outq_strides), tensors.query_gain,
            rope, share, eps, SPEC,
        )  # fmt: skip
    else:
        share = Share(i_outer - outers[0], tokens, total, outers[1], items[1], run, group[1])
        prepare_tile(
            View(tensors.key, k_strides), View(tensors.out_key, outk_strides), tensors.key_gain,
            rope, share, eps, SPEC,
        )  # fmt: skip


@triton.jit
def qk_prep_jvp_kernel(tensors, strides, tokens, outers, items, group, run, factor, eps, SPEC: tl.constexpr):
    """Tangents of ``qk_prep_kernel``; the result of a side is None if it has no tangent.

    ``tensors`` are :class:`PrepTangents`, and ``strides`` those of the first six.
    """
    q_strides, k_strides, q_dot_strides, k_dot_strides, outq_strides, outk_strides = strides
    total = outers[0] + outers[1]
    i_outer = (tl.program_id(0) % total).to(tl.int64)
    rope = Rope(tensors.positions, tensors.freqs, factor)
    q_dot, k_dot = None, None
    if tensors.query_dot is not None:
        q_dot = View(tensors.query_dot, q_dot_strides)
    if tensors.key_dot is not None:
        k_dot = View(tensors.key_dot, k_dot_strides)
    if i_outer < outers[0]:
        if tensors.out_query_dot is not None:
            share = Share(i_outer, tokens, total, outers[0], items[0], run, group[0])
            prepare_tile_jvp(
                View(tensors.query, q_strides), q_dot, View(tensors.out_query_dot, outq_strides),
                tensors.query_gain, tensors.query_gain_dot, rope, share, eps, SPEC,
            )  # fmt: skip
    else:
        if tensors.out_key_dot is not None:
            share = Share(i_outer - outers[0], tokens, total, outers[1], items[1], run, group[1])
            prepare_tile_jvp(
                View(tensors.key, k_strides), k_dot, View(tensors.out_key_dot, outk_strides),
                tensors.key_gain, tensors.key_gain_dot, rope, share, eps, SPEC,
            )  # fmt: skip


@triton.jit
def qk_prep_backward_kernel(tensors, strides, tokens, outers, items, group, run, factor, eps, SPEC: tl.constexpr):
    """Gradients of ``qk_prep_kernel``: those of its inputs, and partial sums of those of gains.

    ``tensors`` are :class:`PrepGradients`, and ``strides`` those of the first six.
    """
    q_strides, k_strides, doutq_strides, doutk_strides, dq_strides, dk_strides = strides
    total = outers[0] + outers[1]
    i_outer = (tl.program_id(0) % total).to(tl.int64)
    rope = Rope(tensors.positions, tensors.freqs, factor)
    if i_outer < outers[0]:
        share = Share(i_outer, tokens, total, outers[0], items[0], run, group[0])
        prepare_tile_backward(
            View(tensors.query, q_strides), View(tensors.grad_out_query, doutq_strides),
            View(tensors.grad_query, dq_strides), tensors.query_partial, tensors.query_gain, rope, share, eps, SPEC,
        )  # fmt: skip
    else:
        share = Share(i_outer - outers[0], tokens, total, outers[1], items[1], run, group[1])
        prepare_tile_backward(
            View(tensors.key, k_strides), View(tensors.grad_out_key, doutk_strides),
            View(tensors.grad_key, dk_strides), tensors.key_partial, tensors.key_gain, rope, share, eps, SPEC,
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
    prep: QKPrep, kernel: Any, group: Callable[..., Any], views: Sequence[Tensor | None],
    of_gains: Sequence[Tensor | None] = (),
) -> None:  # fmt: skip
    """Launch ``kernel`` on ``views [outer, token, item, D]``, of which the first two are query and key.

    Args:
        group: the named tuple that the kernel takes.
        of_gains: what belongs to the derivatives with respect to gains: partial sums of gradients, or tangents.
    """
    query, key = views[:2]
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
            tuple((0, 0, 0) if t is None else t.stride()[:3] for t in views),
            query.shape[1], outers, (query.shape[2], key.shape[2]),
            tuple(n // len(prep.freqs) if prep.freqs is not None and kind.by_head else 1 for n in outers), run,
        ),
        SPEC=QKPrepSpec(
            kind.split, 1 if prep.freqs is None else prep.freqs.shape[1], kind.pairs, rest,
            next_power_of_2(max(kind.pairs, rest // 2)), tile_size(query.shape[3]),
            kind.interleaved, kind.norm, kind.by_head,
        ),
        num_warps=4,
    )  # fmt: skip
    tensors = group(*views, *of_gains, prep.query_gain, prep.key_gain, prep.positions, prep.freqs)
    launch((tensors,), (prep.factor, prep.eps))


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
    _launch(prep, qk_prep_kernel, PrepTensors, [_view(prep, x) for x in (query, key, out_query, out_key)])
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
    _launch(prep, qk_prep_jvp_kernel, PrepTangents, views, (query_gain_tangent, key_gain_tangent))
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
    _launch(prep, qk_prep_backward_kernel, PrepGradients, views, partials)
    # The gain of an RMS norm has an entry per element of a head, that of cosine an entry per head: the rest is summed.
    summed = (0, 2) if prep.norm == "cosine" and prep.by_head else (0, 1)
    d_gains = [
        None if gain is None or sums is None else sums.sum(summed).to(gain.dtype)
        for gain, sums in zip(gains, partials, strict=True)
    ]
    return d_query, d_key, d_gains[0], d_gains[1]
