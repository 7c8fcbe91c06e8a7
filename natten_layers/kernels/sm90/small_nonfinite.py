"""Attention of a tile row by row: what the kernels of small windows compute where a result is not finite.

A query must not be changed by a token that it does not see, but a weight of zero times NaN is NaN. Here each warp takes
one row of the tile and reads the tokens of its window and no others. This is rare and may be slow, but it must not slow
down the kernels that contain it. It is a function that is really called (``noinline``), so that nothing of it is
computed, or kept in registers, before the call.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..portable.primitives import LN2, LOG2E, LOWEST
from ..portable.windows import bias_offset, clamped, shifted, unravel, windows_of
from .primitives import class_rows, row_biases, row_sinks, spread, wide_token_offset
from .qk_prep import load_prepared
from .small_softmax import cut_windows
from .walk import on_rings


@gluon.jit
def channel_indices(BD: gl.constexpr, ALL: gl.constexpr):
    return gl.arange(0, BD, gl.SliceLayout(0, gl.SliceLayout(1, ALL)))[None, :][:, None, :]


@gluon.jit
def load_heads(X, o_x, m_tokens, D: gl.constexpr, BD: gl.constexpr, ALL: gl.constexpr):
    """Heads ``[R, N, BD]`` at ``o_x [R, N]``, in fp32; channels from ``D`` on are zero."""
    col = channel_indices(BD, ALL)
    return gl.load(X + (o_x[:, :, None] + col), mask=m_tokens[:, :, None] & (col < D), other=0.0).to(gl.float32)


@gluon.jit
def fold_tokens(
    b_q, b_acc, row_m, row_l, b_k, V, o_v, m_tokens, factor, D: gl.constexpr, ALL: gl.constexpr, b_bias=None
):  # fmt: skip
    """Fold tokens, with keys ``b_k`` and values at ``o_v [R, N]``, into the softmax of rows ``[R]``.

    ``b_q`` and ``b_acc`` are ``[R, BD]``; ``ALL`` is the layout of ``[R, N, BD]``, of which the others have slices.
    """
    OUT: gl.constexpr = gl.SliceLayout(1, ALL)
    b_s = gl.sum(b_q[:, None, :] * b_k, 2) * factor
    if b_bias is not None:
        b_s += b_bias.to(gl.float32) * LOG2E
    b_s = gl.where(m_tokens, b_s, float("-inf"))
    row_new = gl.maximum(row_m, gl.max(b_s, 1))
    b_p, row_alpha = gl.exp2(b_s - row_new[:, None]), gl.exp2(row_m - row_new)
    b_v = load_heads(V, o_v, m_tokens, D, b_q.shape[1], ALL)
    b_acc = b_acc * gl.convert_layout(row_alpha, gl.SliceLayout(1, OUT))[:, None] + gl.sum(b_p[:, :, None] * b_v, 1)
    return b_acc, row_new, row_l * row_alpha + gl.sum(b_p, 1)


@gluon.jit
def window_tokens(n, lo, hi, kernel):
    """The ``n``-th tokens of windows, and whether they exist: at the start of a causal axis windows have fewer."""
    t, h, w = n // (kernel[1] * kernel[2]), n // kernel[2] % kernel[1], n % kernel[2]
    token = lo[0][:, None] + t[None, :], lo[1][:, None] + h[None, :], lo[2][:, None] + w[None, :]
    m_t, m_h, m_w = token[0] <= hi[0][:, None], token[1] <= hi[1][:, None], token[2] <= hi[2][:, None]
    return token, m_t & m_h & m_w


@gluon.jit
def prepared_heads(
    X, o_x, token, m_tokens, gain, Gain, prep, length, ALL: gl.constexpr, SPEC: gl.constexpr, PREP: gl.constexpr
):  # fmt: skip
    """What ``load_prepared`` returns, with ``prep`` as in ``attend_rows``."""
    _GainQ, _GainK, Positions, Freqs, rope_factor, eps = prep
    NORM: gl.constexpr = PREP.norm
    return load_prepared(
        X, o_x, token, m_tokens, channel_indices(SPEC.columns, ALL), gain, Gain, Positions, Freqs, length, rope_factor,
        eps, SPEC.head_dim, NORM, PREP.axes, PREP.pairs,
    )  # fmt: skip


@gluon.jit
def fold_window(
    state, b_q, K, V, k_strides, v_strides, row_lo, row_hi, m_rows, n, plan, classes, k_gain, prep, factor,
    KeyMask, mask_strides, p_biases, ALL: gl.constexpr, SPEC: gl.constexpr, PREP: gl.constexpr,
):  # fmt: skip
    """Fold the windows of rows into ``state``, which is ``b_acc``, ``row_m`` and ``row_l`` of ``fold_tokens``."""
    length, kernel, _stride, _heads = plan
    residue, count, dilation, key_length = classes
    key_count = count if key_length is None else key_length
    PERIODIC: gl.constexpr = SPEC.periodic
    b_acc, row_m, row_l = state
    N: gl.constexpr = n.shape[0]
    for start in range(0, kernel[0] * kernel[1] * kernel[2], N):
        token, m_tokens = window_tokens(start + n, row_lo, row_hi, kernel)
        b_bias = None
        if p_biases is not None:
            b_bias = gl.load(p_biases[:, None] + bias_offset(token, kernel), mask=m_tokens & m_rows[:, None], other=0.0)
        token = spread(on_rings(token, key_count, PERIODIC), residue, dilation)
        o_k, o_v = wide_token_offset(token, k_strides), wide_token_offset(token, v_strides)
        m_tokens &= m_rows[:, None]
        if KeyMask is not None:
            m_tokens &= gl.load(KeyMask + wide_token_offset(token, mask_strides), mask=m_tokens, other=0).to(gl.int1)
        b_k = prepared_heads(K, o_k, token, m_tokens, k_gain, prep[1], prep, length, ALL, SPEC, PREP)
        b_acc, row_m, row_l = fold_tokens(
            b_q, b_acc, row_m, row_l, b_k, V, o_v, m_tokens, factor, SPEC.head_dim, ALL, b_bias
        )  # fmt: skip
    return b_acc, row_m, row_l


@gluon.jit
def fold_registers(
    state, b_q, RegK, RegV, regk_strides, regv_strides, m_rows, n, i_batch, i_kv, registers, factor,
    ALL: gl.constexpr, SPEC: gl.constexpr,
):  # fmt: skip
    """Fold the register tokens into ``state``, as ``fold_window`` does with windows; nothing if ``RegK`` is None."""
    b_acc, row_m, row_l = state
    if RegK is not None:
        N: gl.constexpr = n.shape[0]
        D: gl.constexpr = SPEC.head_dim
        RegK = RegK + i_batch * regk_strides[0] + i_kv * regk_strides[2]
        RegV = RegV + i_batch * regv_strides[0] + i_kv * regv_strides[2]
        for start in range(0, registers, N):
            i_register = (start + n).to(gl.int64)[None, :]
            o_k, o_v = i_register * regk_strides[1], i_register * regv_strides[1]
            m_tokens = m_rows[:, None] & (i_register < registers)
            b_k = load_heads(RegK, o_k, m_tokens, D, b_q.shape[1], ALL)
            b_acc, row_m, row_l = fold_tokens(b_q, b_acc, row_m, row_l, b_k, RegV, o_v, m_tokens, factor, D, ALL)
    return b_acc, row_m, row_l


@gluon.jit(noinline=True)
def attend_rows(
    tensors, states, strides, i_batch, i_block, origin, plan, classes, group, registers, sink, factor, prep,
    SPEC: gl.constexpr, PREP: gl.constexpr,
):  # fmt: skip
    """Output and statistics of a tile.

    Args:
        tensors: queries, keys, values, keys and values of register tokens (None without), sink, output, and where the
            packed sample of each token begins (None in images), the mask of keys and the biases (None without).
        states: maximum and sum of rows.
        strides: a tuple of those of the first five tensors, and those of the mask: ``(batch, t, h, w, head)``, of
            register tokens ``(batch, token, head)``.
        plan: length, kernel and stride of the axes, and the number of query heads.
        classes: the tile's residue class, its length, dilation, and the length of keys on another grid (else None).
        prep: how queries and keys are prepared: pointers to gains of queries and of keys, to the positions of the image
            and to the frequencies of the head, the factor of RoPE, and ``eps`` of the norm.
    """
    Q, K, V, RegK, RegV, Sink, Out, Begins, KeyMask, Rpb = tensors
    q_strides, k_strides, v_strides, regk_strides, regv_strides = strides[0]
    mask_strides = strides[1]
    length, kernel, stride, heads = plan
    residue, count, dilation, key_length = classes
    GainQ, GainK, _Positions, _Freqs, _rope_factor, _eps = prep
    CAUSAL: gl.constexpr = SPEC.causal
    PERIODIC: gl.constexpr = SPEC.periodic
    TILE: gl.constexpr = SPEC.tile
    PACK: gl.constexpr = SPEC.pack
    SINK: gl.constexpr = SPEC.sink
    D: gl.constexpr = SPEC.head_dim
    BD: gl.constexpr = SPEC.columns
    ROWS: gl.constexpr = gl.num_warps()
    ALL: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // BD, BD // 8], [ROWS, 1, 1], [2, 1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, ALL))
    OUT: gl.constexpr = gl.SliceLayout(1, ALL)
    i_batch, i_kv = i_batch.to(gl.int64), (i_block * PACK // group).to(gl.int64)
    Q += i_batch * q_strides[0]
    K += i_batch * k_strides[0] + i_kv * k_strides[4]
    V += i_batch * v_strides[0] + i_kv * v_strides[4]
    if KeyMask is not None:
        KeyMask += i_batch * mask_strides[0]
    k_gain = None
    if PREP.norm == "cosine" and GainK is not None:
        k_gain = gl.load(GainK + i_kv).to(gl.float32)
    n = gl.arange(0, 512 // BD, gl.SliceLayout(0, gl.SliceLayout(2, ALL)))
    col = gl.arange(0, BD, gl.SliceLayout(0, OUT))[None, :]
    for first in range(0, SPEC.rows, ROWS):
        row = first + gl.arange(0, ROWS, ROW)
        position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
        m_rows, o_row = class_rows(position, head, i_batch, origin, residue, count, dilation, length, heads)
        row_lo, row_hi = windows_of(shifted(position, origin), count, kernel, stride, CAUSAL, PERIODIC, key_length)
        row_lo = cut_windows(row_lo, Begins, shifted(position, origin), length)
        own = spread(shifted(position, origin), residue, dilation)
        p_biases = row_biases(Rpb, clamped(shifted(position, origin), count), head, kernel)

        m_out = gl.convert_layout(m_rows, gl.SliceLayout(1, OUT))[:, None] & (col < D)
        o_q = (wide_token_offset(own, q_strides) + head.to(gl.int64) * q_strides[4])[:, None]
        q_gain = None
        if PREP.norm == "cosine" and GainQ is not None:
            q_gain = gl.load(GainQ + head).to(gl.float32)[:, None][:, :, None]
        own_token = own[0][:, None], own[1][:, None], own[2][:, None]
        b_q = prepared_heads(Q, o_q, own_token, m_rows[:, None], q_gain, GainQ, prep, length, ALL, SPEC, PREP)
        b_q = gl.sum(b_q, 1)
        b_acc = gl.zeros([ROWS, BD], gl.float32, OUT)
        row_m = row_sinks(Sink, head, sink, SINK)
        row_l = gl.where(row_m > LOWEST, 1.0, 0.0)
        state = fold_window(
            (b_acc, row_m, row_l), b_q, K, V, k_strides, v_strides, row_lo, row_hi, m_rows, n, plan, classes, k_gain,
            prep, factor, KeyMask, mask_strides, p_biases, ALL, SPEC, PREP,
        )  # fmt: skip
        b_acc, row_m, row_l = fold_registers(
            state, b_q, RegK, RegV, regk_strides, regv_strides, m_rows, n, i_batch, i_kv, registers, factor, ALL, SPEC
        )

        row_weight, row_max = row_l, row_m * LN2
        if KeyMask is not None or Rpb is not None:  # rows that see nothing have a sum of zero
            row_weight = gl.where(row_l == 0.0, 1.0, row_l)
            row_max = gl.where(row_l == 0.0, float("-inf"), row_max)
        b_out = b_acc * gl.convert_layout(1.0 / row_weight, gl.SliceLayout(1, OUT))[:, None]
        o_out = gl.convert_layout(o_row * D, gl.SliceLayout(1, OUT))[:, None] + col
        gl.store(Out + o_out, b_out.to(Out.dtype.element_ty), mask=m_out)
        if SPEC.with_stats:
            RowMax, RowSum = states
            gl.store(RowMax + o_row, row_max, mask=m_rows)
            gl.store(RowSum + o_row, row_l, mask=m_rows)
