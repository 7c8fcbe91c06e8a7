"""Normalisation and rotary embedding (RoPE) of query and key heads: a forward and a backward kernel.

Both are bound by memory: every head is read once, with any strides, computed on in fp32 and written once. Angles are
computed from positions and frequencies, as a table of angles would be as large as the heads. A program computes the
angles of its tokens once, and uses them for all heads or images that share them.

Names are those of ``primitives.py``. ``outer`` and ``item`` are the batch and the head axis, or the other way round: a
program computes one ``outer`` and several consecutive ``items``, so that these share its angles, and, where there are
many tiles of tokens, some of these one after the other. Strides are ``(outer, token, item)``.
"""

# A call of one jit function from another is typed as a call from the host, which never returns.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import launcher
from ..host.problem import new_like
from ..host.qk_prep import QKPrep
from ..host.tiling import next_power_of_2
from .gain_sums import sum_rows
from .parameters import View
from .qk_prep_parts import (
    ALIGNED,
    QKPrepSpec,
    Rope,
    Work,
    column_sums,
    element_gains,
    freqs_row,
    inverse_norm,
    items_of,
    load_parts,
    plus,
    product,
    rotated,
    rotation_of,
    scaled,
    share_of_keys,
    share_of_program,
    store_parts,
    tile_of,
    times,
    zero_parts,
)

ELEMENTS = 1024
"""The fewest elements of a tile of tokens, with the empty ones of its parts: two 16-byte loads a thread in half
precision."""
WARPS = 2
MOST_PARTS = 6
"""of a head's elements that RoPE does not rotate"""
PROGRAMS = {"none": 65536, "cosine": 32768, "rms": 32768}
"""About how many programs a launch has, by normalisation, if there is so much to do; more of it gives each more items,
then more tiles. ``docs/profiles.md`` has the times."""
PROGRAMS_WITH_SUMS = 16384
"""where each program writes sums for all elements of a head"""


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
def prepare_tiles(x_view, out, Gain, rope, share, eps, SIDE: tl.constexpr, SPEC: tl.constexpr):
    """Normalise and rotate a span of tiles of tokens of one ``outer``, for a run of its items."""
    NORM: tl.constexpr = SPEC.norm
    first, count = items_of(share, SIDE)
    if NORM == "rms":
        gains = element_gains(Gain, SPEC)
    x_strides, out_strides = x_view.strides, out.strides
    X = x_view.pointer + share.i_outer * x_strides[0]
    Out = out.pointer + share.i_outer * out_strides[0]
    for i in tl.range(0, share.work.span, num_stages=1):
        _, o_token, m_token = tile_of(share, i, SPEC)
        cos, sin = rotation_of(rope, o_token, m_token, freqs_row(share, SIDE, SPEC), SPEC)
        i_item = first
        for _ in tl.range(0, count, num_stages=1):
            x = load_parts(X, o_token * x_strides[1] + i_item * x_strides[2], m_token, SPEC)
            if NORM != "none":
                b_scale = inverse_norm(x, m_token, eps, SPEC.head_dim, NORM)
                if NORM == "rms":
                    x = times(x, gains)
                elif Gain is not None:
                    b_scale *= tl.load(Gain + (share.i_outer if SPEC.by_head else i_item)).to(tl.float32)
                x = scaled(x, b_scale)
            out_rows = o_token * out_strides[1] + i_item * out_strides[2]
            store_parts(Out, out_rows, m_token, rotated(x, cos, sin, SPEC), SPEC)
            i_item += 1


@triton.jit
def prepare_tiles_jvp(x_view, x_dot, out_dot, Gain, GainDot, rope, share, eps, SIDE: tl.constexpr, SPEC: tl.constexpr):
    """Tangent of ``prepare_tiles``. ``x_dot`` or ``GainDot`` is None where it is zero.

    With ``n = x * scale`` the tangent of the normalised head is ``scale * (xdot - n * (n . xdot)) * gain +
    n * gaindot``, where the scalar product is a mean for RMS norms. It is rotated as the head is.
    """
    NORM: tl.constexpr = SPEC.norm
    first, count = items_of(share, SIDE)
    i_outer = share.i_outer
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
    for i in tl.range(0, share.work.span, num_stages=1):
        _, o_token, m_token = tile_of(share, i, SPEC)
        cos, sin = rotation_of(rope, o_token, m_token, freqs_row(share, SIDE, SPEC), SPEC)
        i_item = first
        for _ in tl.range(0, count, num_stages=1):
            u = zero_parts(SPEC)
            if x_dot is not None:
                u = load_parts(XDot, o_token * x_dot_strides[1] + i_item * x_dot_strides[2], m_token, SPEC)
            if NORM != "none":
                x = load_parts(X, o_token * x_strides[1] + i_item * x_strides[2], m_token, SPEC)
                b_scale = inverse_norm(x, m_token, eps, SPEC.head_dim, NORM)
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
            out_rows = o_token * out_strides[1] + i_item * out_strides[2]
            store_parts(OutDot, out_rows, m_token, rotated(u, cos, sin, SPEC), SPEC)
            i_item += 1


@triton.jit
def prepare_tiles_backward(
    x_view, grad, grad_x, Partial, Gain, rope, share, eps, SIDE: tl.constexpr, SPEC: tl.constexpr
):
    """Gradient of ``prepare_tiles``.

    The gradient of the result is rotated back to ``u``. With ``n = x * scale`` and ``h = u * gain`` the gradients are
    ``dgain = sum u * n`` and ``dx = scale * (h - n * (h . n))``, where the scalar product is a mean for RMS norms.

    The gradient of gains is written as rows of partial sums, which the caller adds in a fixed order: for cosine
    ``[spans * span, outer, item]``, or ``[spans * span, item, outer]`` where outers are heads, and for RMS norms
    ``[spans * runs, outer, D]``, a row per program.
    """
    NORM: tl.constexpr = SPEC.norm
    D: tl.constexpr = SPEC.head_dim
    i_outer, work = share.i_outer, share.work
    first, count = items_of(share, SIDE)
    if NORM == "rms":
        gains = element_gains(Gain, SPEC)
        sums = zero_parts(SPEC)
    x_strides, grad_strides, out_strides = x_view.strides, grad.strides, grad_x.strides
    X = x_view.pointer + i_outer * x_strides[0]
    Grad = grad.pointer + i_outer * grad_strides[0]
    GradX = grad_x.pointer + i_outer * out_strides[0]
    for i in tl.range(0, work.span, num_stages=1):
        i_tile, o_token, m_token = tile_of(share, i, SPEC)
        cos, sin = rotation_of(rope, o_token, m_token, freqs_row(share, SIDE, SPEC), SPEC)
        i_item = first
        for _ in tl.range(0, count, num_stages=1):
            d = load_parts(Grad, o_token * grad_strides[1] + i_item * grad_strides[2], m_token, SPEC)
            u = rotated(d, cos, -sin, SPEC)
            if NORM != "none":
                x = load_parts(X, o_token * x_strides[1] + i_item * x_strides[2], m_token, SPEC)
                b_scale = inverse_norm(x, m_token, eps, D, NORM)
                n = scaled(x, b_scale)
                if NORM == "rms":
                    sums = plus(sums, times(u, n))
                    u = times(u, gains)
                    b_along = product(u, n) / D
                else:
                    b_along = product(u, n)
                    if Gain is not None:
                        o_partial = (i_tile * work.outers[SIDE] + i_outer) * work.items[SIDE] + i_item
                        if SPEC.by_head:
                            o_partial = (i_tile * work.items[SIDE] + i_item) * work.outers[SIDE] + i_outer
                        tl.store(Partial + o_partial, tl.sum(b_along))
                        b_scale *= tl.load(Gain + (i_outer if SPEC.by_head else i_item)).to(tl.float32)
                u = scaled(plus(u, scaled(n, -b_along)), b_scale)
            store_parts(GradX, o_token * out_strides[1] + i_item * out_strides[2], m_token, u, SPEC)
            i_item += 1
    if NORM == "rms":
        i_row = share.i_span * work.runs + share.i_run
        row = tl.zeros([1, 1], tl.int64) + (i_row * work.outers[SIDE] + i_outer) * D
        store_parts(Partial, row, row >= 0, column_sums(sums), SPEC)


@triton.jit
def qk_prep_kernel(tensors, strides, work, factor, eps, SPEC: tl.constexpr):
    """Normalise and rotate queries and keys in one launch.

    Tensors are ``[outer, token, item, D]`` with contiguous last axes. ``tensors`` are :class:`PrepTensors`,
    ``strides`` those of the first of them, and ``work`` is a :class:`Work`.
    """
    q_strides, k_strides, outq_strides, outk_strides = strides
    share = share_of_program(work, SPEC)
    rope = Rope(tensors.positions, tensors.freqs, factor)
    if share.i_outer < work.outers[0]:
        prepare_tiles(
            View(tensors.query, q_strides), View(tensors.out_query, outq_strides), tensors.query_gain,
            rope, share, eps, 0, SPEC,
        )  # fmt: skip
    else:
        prepare_tiles(
            View(tensors.key, k_strides), View(tensors.out_key, outk_strides), tensors.key_gain,
            rope, share_of_keys(share), eps, 1, SPEC,
        )  # fmt: skip


@triton.jit
def qk_prep_jvp_kernel(tensors, strides, work, factor, eps, SPEC: tl.constexpr):
    """Tangents of ``qk_prep_kernel``; the result of a side is None if it has no tangent.

    ``tensors`` are :class:`PrepTangents`, and ``strides`` those of the first six.
    """
    q_strides, k_strides, q_dot_strides, k_dot_strides, outq_strides, outk_strides = strides
    share = share_of_program(work, SPEC)
    rope = Rope(tensors.positions, tensors.freqs, factor)
    q_dot, k_dot = None, None
    if tensors.query_dot is not None:
        q_dot = View(tensors.query_dot, q_dot_strides)
    if tensors.key_dot is not None:
        k_dot = View(tensors.key_dot, k_dot_strides)
    if share.i_outer < work.outers[0]:
        if tensors.out_query_dot is not None:
            prepare_tiles_jvp(
                View(tensors.query, q_strides), q_dot, View(tensors.out_query_dot, outq_strides),
                tensors.query_gain, tensors.query_gain_dot, rope, share, eps, 0, SPEC,
            )  # fmt: skip
    else:
        if tensors.out_key_dot is not None:
            prepare_tiles_jvp(
                View(tensors.key, k_strides), k_dot, View(tensors.out_key_dot, outk_strides),
                tensors.key_gain, tensors.key_gain_dot, rope, share_of_keys(share), eps, 1, SPEC,
            )  # fmt: skip


@triton.jit
def qk_prep_backward_kernel(tensors, strides, work, factor, eps, SPEC: tl.constexpr):
    """Gradients of ``qk_prep_kernel``: those of its inputs, and partial sums of those of gains.

    ``tensors`` are :class:`PrepGradients`, and ``strides`` those of the first six.
    """
    q_strides, k_strides, doutq_strides, doutk_strides, dq_strides, dk_strides = strides
    share = share_of_program(work, SPEC)
    rope = Rope(tensors.positions, tensors.freqs, factor)
    if share.i_outer < work.outers[0]:
        prepare_tiles_backward(
            View(tensors.query, q_strides), View(tensors.grad_out_query, doutq_strides),
            View(tensors.grad_query, dq_strides), tensors.query_partial, tensors.query_gain,
            rope, share, eps, 0, SPEC,
        )  # fmt: skip
    else:
        prepare_tiles_backward(
            View(tensors.key, k_strides), View(tensors.grad_out_key, doutk_strides),
            View(tensors.grad_key, dk_strides), tensors.key_partial, tensors.key_gain,
            rope, share_of_keys(share), eps, 1, SPEC,
        )  # fmt: skip


def _view(prep: QKPrep, x: Tensor) -> Tensor:
    """A tensor as ``[outer, token, item, D]``.

    It is copied only if its spatial axes cannot be merged, which never happens to the output of a projection.
    """
    x = x.flatten(1, -3)
    if prep.positions is not None and prep.positions.shape[0] > 1:
        x = x.flatten(0, 1)[None]
    return x.transpose(0, 2) if prep.by_head else x


class Blocks(NamedTuple):
    """How a launch is divided into programs, see :class:`Work`."""

    tokens: int
    """of a tile"""
    columns: int
    """of a part of a head"""
    span: int
    spans: int
    run: int
    runs: int


def _blocks(prep: QKPrep, query: Tensor, key: Tensor, *, sums_elements: bool = False) -> Blocks:
    """Of ``query`` and ``key [outer, token, item, D]``. With ``sums_elements``, programs add up gradients of gains that
    each element of a head has by itself.
    """
    pairs = prep.kind.pairs
    rest = query.shape[3] - 2 * pairs
    rest += 2 * pairs % ALIGNED if rest else 0  # rotated elements in the first part of the rest
    columns = part_columns(pairs, rest)
    tokens = next_power_of_2(_ceil(ELEMENTS, _slots(pairs, rest, columns)))
    tiles, outers, items = _ceil(query.shape[1], tokens), len(query) + len(key), max(query.shape[2], key.shape[2])
    programs = PROGRAMS_WITH_SUMS if sums_elements else PROGRAMS[prep.norm]
    run = _ceil(items, _ceil(programs, tiles * outers))
    runs = _ceil(items, run)
    spans = _ceil(tiles, max(1, tiles * outers * runs // programs))
    return Blocks(tokens, columns, _ceil(tiles, max(1, spans)), spans, run, runs)


@cache
def part_columns(pairs: int, rest: int) -> int:
    """Columns of the parts of a head: those with the fewest empty ones, and of these the most."""
    least = max(16, next_power_of_2(pairs), next_power_of_2(_ceil(rest, MOST_PARTS)))
    most = max(least, next_power_of_2(rest))
    choices = [1 << i for i in range(least.bit_length() - 1, most.bit_length())]
    return min(choices, key=lambda columns: (_slots(pairs, rest, columns), -columns))


def _slots(pairs: int, rest: int, columns: int) -> int:
    """Elements of the parts of a head, with empty ones."""
    return columns * (2 * (pairs > 0) + _ceil(rest, columns))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _launch(
    prep: QKPrep, kernel: Any, group: Callable[..., Any], blocks: Blocks, views: Sequence[Tensor | None],
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
    kind, outers = prep.kind, (len(query), len(key))
    rows = 1 if prep.freqs is None else len(prep.freqs)
    work = Work(
        query.shape[1], outers, (query.shape[2], key.shape[2]),
        tuple(n // rows if kind.by_head else 1 for n in outers), blocks.run, blocks.runs, blocks.span, blocks.spans,
    )  # fmt: skip
    launch = launcher(
        kernel,
        (sum(outers) * blocks.spans * blocks.runs,),
        (tuple((0, 0, 0) if t is None else t.stride()[:3] for t in views), work),
        SPEC=QKPrepSpec(
            kind.split, 1 if prep.freqs is None else prep.freqs.shape[1], kind.pairs, query.shape[3] - 2 * kind.pairs,
            blocks.columns, blocks.tokens, kind.interleaved and kind.pairs > 0, kind.norm, kind.by_head,
        ),
        num_warps=WARPS,
    )  # fmt: skip
    tensors = group(*views, *of_gains, prep.query_gain, prep.key_gain, prep.positions, prep.freqs)
    launch((tensors,), (prep.factor, prep.eps))


def qk_prep(query: Tensor, key: Tensor, prep: QKPrep) -> tuple[Tensor, Tensor]:
    """``query [B, *spatial, Hq, D]`` and ``key [B, *spatial, Hkv, D]`` normalised and rotated, contiguous."""
    out_query, out_key = new_like(query), new_like(key)
    views = [_view(prep, x) for x in (query, key, out_query, out_key)]
    _launch(prep, qk_prep_kernel, PrepTensors, _blocks(prep, *views[:2]), views)
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
    heads = _view(prep, query), _view(prep, key)
    others = [None if x is None else _view(prep, x) for x in (query_tangent, key_tangent, *results)]
    gain_tangents = query_gain_tangent, key_gain_tangent
    _launch(prep, qk_prep_jvp_kernel, PrepTangents, _blocks(prep, *heads), (*heads, *others), gain_tangents)
    return results


def qk_prep_backward(
    query: Tensor, key: Tensor, prep: QKPrep, grad_query: Tensor, grad_key: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query and key, contiguous, and of their gains."""
    gains = prep.query_gain, prep.key_gain
    d_query, d_key = new_like(query), new_like(key)
    views = [_view(prep, x) for x in (query, key, grad_query, grad_key, d_query, d_key)]
    blocks = _blocks(prep, *views[:2], sums_elements=prep.norm == "rms")
    partials = [
        None if gain is None else _rows_of_sums(prep, blocks, view) for gain, view in zip(gains, views[:2], strict=True)
    ]
    _launch(prep, qk_prep_backward_kernel, PrepGradients, blocks, views, partials)
    d_query_gain, d_key_gain = sum_rows(partials, gains)
    return d_query, d_key, d_query_gain, d_key_gain


def _rows_of_sums(prep: QKPrep, blocks: Blocks, view: Tensor) -> Tensor:
    """For the sums ``[rows, gains]`` that programs write, of ``view [outer, token, item, D]``."""
    outers, _, items, head_dim = view.shape
    if prep.norm == "rms":
        shape = blocks.spans * blocks.runs * outers, head_dim
    else:
        tiles = blocks.spans * blocks.span
        shape = (tiles * items, outers) if prep.by_head else (tiles * outers, items)
    return view.new_empty(shape, dtype=torch.float32)
