"""Attention of a tile row by row, for the kernel of small windows: what it computes where a result is not finite.

A weight of zero times NaN is NaN, and a query must not be changed by a token that it does not see. Here each warp
takes a row of the tile and reads the tokens of its window, and no others. It is rare, so it may be slow, but must not
slow down what it is part of: it is a function that is called, so that nothing of it is computed or kept before.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..portable.primitives import LN2, LOWEST, shifted, unravel, windows_of
from .primitives import output_rows, row_sinks
from .qk_prep import load_turned


@gluon.jit
def columns_of(BD: gl.constexpr, ALL: gl.constexpr):
    return gl.arange(0, BD, gl.SliceLayout(0, gl.SliceLayout(1, ALL)))[None, :][:, None, :]


@gluon.jit
def load_heads(X, o_x, m_tokens, D: gl.constexpr, BD: gl.constexpr, ALL: gl.constexpr):
    """``[R, N, BD]`` at ``o_x [R, N]``, in fp32; zero from channel ``D`` on."""
    col = columns_of(BD, ALL)
    return gl.load(X + (o_x[:, :, None] + col), mask=m_tokens[:, :, None] & (col < D), other=0.0).to(gl.float32)


@gluon.jit
def fold_tokens(b_q, b_acc, row_m, row_l, b_k, V, o_v, m_tokens, factor, D: gl.constexpr, ALL: gl.constexpr):
    """Fold tokens, with keys ``b_k`` and values at ``o_v [R, N]``, into the softmax state of rows ``[R]``.

    ``b_q``, ``b_acc`` are ``[R, BD]``; ``ALL`` is the layout of ``[R, N, BD]``, of which the others have slices.
    """
    OUT: gl.constexpr = gl.SliceLayout(1, ALL)
    b_s = gl.where(m_tokens, gl.sum(b_q[:, None, :] * b_k, 2) * factor, float("-inf"))
    row_new = gl.maximum(row_m, gl.max(b_s, 1))
    b_p, row_alpha = gl.exp2(b_s - row_new[:, None]), gl.exp2(row_m - row_new)
    b_v = load_heads(V, o_v, m_tokens, D, b_q.shape[1], ALL)
    b_acc = b_acc * gl.convert_layout(row_alpha, gl.SliceLayout(1, OUT))[:, None] + gl.sum(b_p[:, :, None] * b_v, 1)
    return b_acc, row_new, row_l * row_alpha + gl.sum(b_p, 1)


@gluon.jit
def place_of(token, strides):
    """Offset of a token, in 64 bits."""
    t, h, w = token
    return t.to(gl.int64) * strides[1] + h.to(gl.int64) * strides[2] + w.to(gl.int64) * strides[3]


@gluon.jit
def window_tokens(n, lo, hi, kernel):
    """The ``n``-th tokens of windows, and whether there are as many: at a causal axis's start there are fewer."""
    t, h, w = n // (kernel[1] * kernel[2]), n // kernel[2] % kernel[1], n % kernel[2]
    token = lo[0][:, None] + t[None, :], lo[1][:, None] + h[None, :], lo[2][:, None] + w[None, :]
    m_t, m_h, m_w = token[0] <= hi[0][:, None], token[1] <= hi[1][:, None], token[2] <= hi[2][:, None]
    return token, m_t & m_h & m_w


@gluon.jit(noinline=True)
def attend_rows(
    tensors, states, strides, i_batch, i_block, origin, plan, group, registers, sink, factor,
    GainQ, GainK, Positions, Freqs, turn_factor, eps,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, BD: gl.constexpr,
    SINK: gl.constexpr, WITH_STATE: gl.constexpr, NORM: gl.constexpr, AXES: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Output and state of a tile.

    Args:
        tensors: queries, keys, values, keys and values of registers (None without), sink, output.
        states: maximum and sum of rows.
        strides: of the first five tensors: ``(batch, t, h, w, head)``, of registers ``(batch, register, head)``.
        plan: length, kernel and stride of axes, and query heads.
        GainQ, GainK, Positions, Freqs, turn_factor, eps, NORM, AXES, PAIRS: what is done to queries and keys first, as
            ``load_turned`` takes it.
    """
    Q, K, V, RegK, RegV, Sink, Out = tensors
    q_strides, k_strides, v_strides, regk_strides, regv_strides = strides
    length, kernel, stride, heads = plan
    ROWS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = 512 // BD
    ALL: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // BD, BD // 8], [ROWS, 1, 1], [2, 1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, ALL))
    OUT: gl.constexpr = gl.SliceLayout(1, ALL)
    i_batch, i_kv = i_batch.to(gl.int64), (i_block * PACK // group).to(gl.int64)
    Q += i_batch * q_strides[0]
    K += i_batch * k_strides[0] + i_kv * k_strides[4]
    V += i_batch * v_strides[0] + i_kv * v_strides[4]
    k_gain = None
    if NORM == "cosine" and GainK is not None:
        k_gain = gl.load(GainK + i_kv).to(gl.float32)
    n = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, ALL)))
    col = gl.arange(0, BD, gl.SliceLayout(0, OUT))[None, :]
    for first in range(0, TILE[0] * TILE[1] * TILE[2] * PACK, ROWS):
        row = first + gl.arange(0, ROWS, ROW)
        position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
        m_rows, o_row = output_rows(position, head, i_batch, origin, length, heads)
        own = shifted(position, origin)
        lo, hi = windows_of(own, length, kernel, stride, CAUSAL)

        m_out = gl.convert_layout(m_rows, gl.SliceLayout(1, OUT))[:, None] & (col < D)
        o_q = (place_of(own, q_strides) + head.to(gl.int64) * q_strides[4])[:, None]
        q_gain = None
        if NORM == "cosine" and GainQ is not None:
            q_gain = gl.load(GainQ + head).to(gl.float32)[:, None][:, :, None]
        place = own[0][:, None], own[1][:, None], own[2][:, None]
        b_q = gl.sum(load_turned(
            Q, o_q, place, m_rows[:, None], columns_of(BD, ALL), q_gain, GainQ, Positions, Freqs, length,
            turn_factor, eps, D, NORM, AXES, PAIRS,
        ), 1)  # fmt: skip
        b_acc = gl.zeros([ROWS, BD], gl.float32, OUT)
        row_m = row_sinks(Sink, head, sink, SINK)
        row_l = gl.where(row_m > LOWEST, 1.0, 0.0)
        for start in range(0, kernel[0] * kernel[1] * kernel[2], N):
            token, m_tokens = window_tokens(start + n, lo, hi, kernel)
            o_k, o_v = place_of(token, k_strides), place_of(token, v_strides)
            m_tokens &= m_rows[:, None]
            b_k = load_turned(
                K, o_k, token, m_tokens, columns_of(BD, ALL), k_gain, GainK, Positions, Freqs, length,
                turn_factor, eps, D, NORM, AXES, PAIRS,
            )  # fmt: skip
            b_acc, row_m, row_l = fold_tokens(b_q, b_acc, row_m, row_l, b_k, V, o_v, m_tokens, factor, D, ALL)
        if RegK is not None:
            RowK = RegK + i_batch * regk_strides[0] + i_kv * regk_strides[2]
            RowV = RegV + i_batch * regv_strides[0] + i_kv * regv_strides[2]
            for start in range(0, registers, N):
                i_register = (start + n).to(gl.int64)[None, :]
                o_k, o_v = i_register * regk_strides[1], i_register * regv_strides[1]
                m_tokens = m_rows[:, None] & (i_register < registers)
                b_k = load_heads(RowK, o_k, m_tokens, D, BD, ALL)
                b_acc, row_m, row_l = fold_tokens(b_q, b_acc, row_m, row_l, b_k, RowV, o_v, m_tokens, factor, D, ALL)

        b_out = b_acc * gl.convert_layout(1.0 / row_l, gl.SliceLayout(1, OUT))[:, None]
        o_out = gl.convert_layout(o_row * D, gl.SliceLayout(1, OUT))[:, None] + col
        gl.store(Out + o_out, b_out.to(Out.dtype.element_ty), mask=m_out)
        if WITH_STATE:
            RowMax, RowSum = states
            gl.store(RowMax + o_row, row_m * LN2, mask=m_rows)
            gl.store(RowSum + o_row, row_l, mask=m_rows)
