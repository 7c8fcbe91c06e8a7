"""Normalisation and RoPE of heads that lie in shared memory; ``portable/qk_prep.py`` does the same in its own launch.

Angles are computed from positions and frequencies, as there. A head is split into parts of ``PAIRS`` elements, and RoPE
rotates the first part with the second; without RoPE the parts are quarters. A thread holds the same elements of every
part. ``NORM``, ``AXES`` and ``PAIRS`` are explained at ``QKPrepKind``.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportFunctionMemberAccess=false, reportAttributeAccessIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..portable.windows import inside_axes
from .small_softmax import WARPS


@gluon.constexpr_function
def _bases(rows, part):
    """The ``(row, column)`` for which each bit stands: of a thread's vector, of its lane, of its warp, and of its other
    elements.

    Columns are counted within a part. A thread loads up to eight elements at once, 16 bytes. The rows that a quarter of
    a warp reads are so far apart that the swizzle of shared memory puts them into different banks.
    """
    vector = min(8, part, rows * part // (32 * WARPS))
    columns = [1 << i for i in range(part.bit_length() - 1)]
    bits = [1 << i for i in range(rows.bit_length() - 1)]
    chunks = part // 8  # of 16 bytes in one row of a part
    bits = sorted(bits, key=lambda bit: (bit >= 8, bit < chunks, bit))
    others = [(0, column) for column in columns if column >= vector] + [(bit, 0) for bit in bits]
    return [(0, column) for column in columns if column < vector], others[:5], others[5:7], others[7:]


@gluon.constexpr_function
def heads_layout(N, D, PAIRS):
    """Layout of heads ``[N, D]``."""
    part = PAIRS if PAIRS else D // 4
    own, lanes, warps, more = _bases(N, part)
    parts = [(0, part << i) for i in range((D // part).bit_length() - 1)]
    bases = [[list(b) for b in group] for group in (own + parts + more, lanes, warps)]
    return gl.DistributedLinearLayout(*bases, [], [N, D])


@gluon.constexpr_function
def angles_layout(N, AXES, PAIRS):
    """Layout of the angles of heads, ``[N, AXES, PAIRS / AXES]``."""
    own, lanes, warps, more = _bases(N, PAIRS)
    each = PAIRS // AXES
    bases = [[[row, column // each, column % each] for row, column in group] for group in (own + more, lanes, warps)]
    return gl.DistributedLinearLayout(*bases, [], [N, AXES, each])


@gluon.jit
def sine(x):
    return gl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def cosine(x):
    return gl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def cos_sin(angle):
    """Cosine and sine in fp32, accurate to 2e-6 for angles up to millions of radians: less than half precision shows.

    The approximate instructions are accurate within one revolution only. Whole revolutions are therefore subtracted
    first, with ``2 pi`` as the sum of two floats.
    """
    revolutions = (angle * 0.15915494309189535 + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to an integer
    within = gl.fma(revolutions, 1.7484555e-7, gl.fma(revolutions, -6.2831854820251465, angle))
    return cosine(within), sine(within)


@gluon.jit
def token_index(N: gl.constexpr, AXES: gl.constexpr, PAIRS: gl.constexpr):
    """``0 .. N - 1``, from which the tokens are computed whose positions are loaded; None without RoPE."""
    n = None
    if PAIRS > 0:
        n = gl.arange(0, N, gl.SliceLayout(1, gl.SliceLayout(2, angles_layout(N, AXES, PAIRS))))
    return n


@gluon.jit
def load_positions(Positions, token, length, AXES: gl.constexpr):
    """Positions ``[N, AXES]`` of tokens ``t, h, w``; 0 for tokens outside of the image."""
    t, h, w = token
    LAYOUT: gl.constexpr = t.type.layout.parent
    m_token = inside_axes(token, length) & (t >= 0) & (h >= 0) & (w >= 0)
    o_token = ((t * length[1] + h) * length[2] + w) * AXES
    axis = gl.arange(0, AXES, gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(Positions + (o_token[:, None] + axis), mask=m_token[:, None], other=0).to(gl.float32)


@gluon.jit
def load_freqs(Freqs, N: gl.constexpr, AXES: gl.constexpr, PAIRS: gl.constexpr):
    """Frequencies ``[PAIRS / AXES]``, in the layout of the angles of ``N`` tokens; None without RoPE."""
    b_freq = None
    if PAIRS > 0:
        LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, angles_layout(N, AXES, PAIRS)))
        b_freq = gl.load(Freqs + gl.arange(0, PAIRS // AXES, LAYOUT))
    return b_freq


@gluon.jit
def rotation_of(b_position, b_freq, factor):
    """cos and sin ``[N, PAIRS]``; None without positions."""
    rotation = None
    if b_position is not None:
        cos, sin = cos_sin(b_position[:, :, None] * b_freq[None, :][None, :, :])
        if factor is not None:
            cos, sin = cos * factor, sin * factor
        N: gl.constexpr = cos.shape[0]
        PAIRS: gl.constexpr = cos.shape[1] * cos.shape[2]
        rotation = cos.reshape([N, PAIRS]), sin.reshape([N, PAIRS])
    return rotation


@gluon.jit
def halves(x):
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def joined(first, second):
    second = gl.convert_layout(second, first.type.layout)  # same layout, other type; no data moves
    return gl.join(first, second).permute((0, 2, 1)).reshape([first.shape[0], 2 * first.shape[1]])


@gluon.jit
def rotate_pairs(x, rotation):
    first, second = halves(x)
    cos, sin = rotation
    cos, sin = gl.convert_layout(cos, first.type.layout), gl.convert_layout(sin, first.type.layout)
    return joined(first * cos - second * sin, second * cos + first * sin)


@gluon.jit
def apply_rope(x, rotation):
    """Rotate heads ``[N, D]``: all of their elements, or the first half."""
    if rotation[0].shape[1] * 2 == x.shape[1]:
        x = rotate_pairs(x, rotation)
    else:
        head, tail = halves(x)
        x = joined(rotate_pairs(head, rotation), tail)
    return x


@gluon.jit
def inverse_norm(square, eps, D: gl.constexpr, NORM: gl.constexpr):
    """Factor that normalises heads with these sums of squares."""
    if NORM == "rms":
        square /= D
    return gl.rsqrt(square + eps)


@gluon.jit
def head_gains(Gain, first_head, N: gl.constexpr, PACK: gl.constexpr, HEADS: gl.constexpr, NORM: gl.constexpr):
    """Gains of a cosine norm, one a row; None without. Row ``n`` is of head ``first_head + n % PACK``."""
    row_gain = None
    if NORM == "cosine" and Gain is not None:
        row_gain = gl.load(Gain + first_head + gl.arange(0, N, gl.SliceLayout(1, HEADS)) % PACK).to(gl.float32)
    return row_gain


@gluon.jit
def prepare_heads(b_x, rotation, row_gain, Gain, eps, NORM: gl.constexpr):
    """Heads ``[N, D]``, in ``heads_layout``, normalised and rotated.

    Args:
        rotation: what ``rotation_of`` returns.
        row_gain: what ``head_gains`` returns.
        Gain: pointer to the gains of elements, for RMS norms.
    """
    HEADS: gl.constexpr = b_x.type.layout
    D: gl.constexpr = b_x.shape[1]
    x = b_x.to(gl.float32)
    if NORM != "none":
        row_scale = inverse_norm(gl.sum(x * x, 1), eps, D, NORM)
        if row_gain is not None:
            row_scale *= row_gain
        if NORM == "rms":
            x *= gl.load(Gain + gl.arange(0, D, gl.SliceLayout(0, HEADS))).to(gl.float32)[None, :]
        x *= row_scale[:, None]
    if rotation is not None:
        x = gl.convert_layout(apply_rope(x, rotation), HEADS)
    return x.to(b_x.dtype)


@gluon.jit
def load_prepared(
    X, o_x, token, m_token, col, gain, Gain, Positions, Freqs, length, factor, eps,
    D: gl.constexpr, NORM: gl.constexpr, AXES: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Heads ``[R, N, BD]`` at ``o_x [R, N]``, normalised and rotated, in fp32. Works in any layout, and slowly.

    Args:
        token: ``t, h, w`` of each head, from which its position is loaded.
        col: indices of channels, ``[1, 1, BD]``; channels from ``D`` on read as zero.
        gain: gain of a cosine norm, a scalar or ``[R, N, 1]``, or None.
        Gain: as ``prepare_heads`` takes it.
        Positions, Freqs: pointers to the positions of the image and to the frequencies of the head.
    """
    m_token = m_token[:, :, None] & (col < D)
    x = gl.load(X + (o_x[:, :, None] + col), mask=m_token, other=0.0).to(gl.float32)
    b_scale = 1.0
    if NORM != "none":
        b_scale = inverse_norm(gl.sum(x * x, 2), eps, D, NORM)[:, :, None]
        if gain is not None:
            b_scale *= gain
        if NORM == "rms":
            x *= gl.load(Gain + col, mask=col < D, other=0.0).to(gl.float32)
    if PAIRS > 0:
        EACH: gl.constexpr = PAIRS // AXES
        partner = gl.where(col < PAIRS, col + PAIRS, col - PAIRS)
        m_rotary = m_token & (col < 2 * PAIRS)
        y = gl.load(X + (o_x[:, :, None] + partner), mask=m_rotary, other=0.0).to(gl.float32)
        if NORM == "rms":
            y *= gl.load(Gain + partner, mask=col < 2 * PAIRS, other=0.0).to(gl.float32)
        t, h, w = token
        o_token = ((t * length[1] + h) * length[2] + w)[:, :, None].to(gl.int64) * AXES
        b_position = gl.load(Positions + (o_token + col % PAIRS // EACH), mask=m_rotary, other=0).to(gl.float32)
        cos, sin = cos_sin(b_position * gl.load(Freqs + col % EACH))
        if factor is not None:
            cos, sin = cos * factor, sin * factor
        x = gl.where(col < 2 * PAIRS, x * cos + gl.where(col < PAIRS, -y, y) * sin, x)
    return x * b_scale
