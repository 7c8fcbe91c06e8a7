"""From which sizes on the variants for compute capability 9.0 pay: the reasons why a call is slower in one.

Thresholds were measured on an H200. Reasons why a variant cannot compute a call at all are in ``support``.
"""

from math import prod

from ..host.problem import Problem
from ..host.tiling import Kind, head_width
from ..host.tuned import override_pack
from ..host.variant import Question
from . import large_tiling, medium_tiling, small_tiling
from .support import LARGE, MEDIUM, large_backward_gap, large_gap, medium_gap

# A window is large from this many key elements (keys times head dim) on: 256 keys of head dim 128, or 512 of 64. The
# wider ones of keys and values count: 24x17 keys of 64 channels with values of 128, 32 heads over two, take 0.259 ms
# forward in portable kernels and 0.224 in these, all gradients 1.25 and 0.99 with dK and dV in these (1.32 with dQ).
LARGE_KEY_ELEMENTS = 2**15
# Register tokens count as keys of the window. The forward computes their chunks whole, however few they are, and so
# pays from more elements on. On an H200, portable kernels against these: 441 keys and 128 register tokens of head dim
# 64, 0.208 ms against 0.234; 256 keys and 16 of head dim 128, 0.228 against 0.232; 169 and 256 of 128, 0.312 against
# 0.232.
LARGE_KEY_ELEMENTS_WITH_REGISTERS = 320 * 128
# dQ of heads of up to 64 channels on one axis pays from more elements on: with 1024 causal keys, 16 heads of 64 and
# 16384 tokens portable kernels take 0.224 ms on an H200, these 0.259.
LARGE_KEY_ELEMENTS_OF_NARROW_DQ = 2**17
# Tangents in a launch of their own pay up to fewer elements than this. On an H200, portable kernels against these: 441
# keys of head dim 64, 0.248 ms and 0.221; 512 causal ones, 0.227 and 0.202; 4096, 1.36 and 1.42. Together with the
# output they pay for all windows.
LARGE_KEY_ELEMENTS_OF_JVP = 2**17
# Gradients of register tokens pay from this many elements of theirs, and products of a channel of a query and of a
# register token, on. On an H200, portable kernels against these, with 2**18 queries: 16 register tokens of head dim 64,
# 0.049 ms and 0.048; 16 of 128, 0.106 and 0.057; 128 of 64, 0.152 and 0.064; with 3 * 2**17, 16 of 96, 0.134 and 0.084.
REGISTER_ELEMENTS, REGISTER_PRODUCTS = 16 * 96, 2**29
# A call with a small window is large enough to hide launch overhead from this many query rows on. With 200704 rows of
# 32 channels these kernels take 26 to 40 us on an H200, and portable kernels 41 to 52 us.
LEAST_ROWS = 3 * 2**16
# Gradients with small windows take these kernels where a head fills at least this share of its columns in shared
# memory. On an H200, portable against these kernels: 32 channels in 32 columns, 7x7 windows, dQ 0.178 ms against 0.145,
# dK and dV 0.306 against 0.172; 40 channels in 64 columns, 9x9 windows, dQ 0.090 against 0.108.
LEAST_FILLED = 0.75
# The forward pass of packed images pays where at least this many programs share a multiprocessor: on an H200, 13x13
# windows of 64 channels and two heads a program, of which two share one, take 0.282 ms and 0.251 in portable kernels,
# and 7x7 of four heads, five, 0.147 and 0.216.
PACKED_PROGRAMS = 3
# With head dims above 128 portable kernels are slow, and kernels for large windows pay from this many keys of a window
# and this many (query, key) pairs on.
WIDE_WINDOW, WIDE_PAIRS = 64, 2**24
# For all but dQ they pay from fewer: 6x6 windows of 8 heads of 256 over 2 x 137x173 tokens take 0.538 ms forward in
# portable kernels and 0.375 in these, gradients 1.33 and, with dK and dV in these, 1.19.
WIDE_WINDOW_BESIDE_DQ, WIDE_PAIRS_BESIDE_DQ = 36, 3 * 2**22
# Windows between small and large have at least this many keys: those for small windows, which are asked before, take
# 7x7 windows of 64 channels, but have no tiles for 80, where portable kernels against these take 0.232 ms and 0.157 on
# an H200, dQ 0.307 and 0.260, dK and dV 0.402 and 0.294 (``docs/profiles.md`` has the tables).
MEDIUM_WINDOW = 25
# On one axis they are faster than those for large windows up to this many key elements (``_most_on_one_axis`` has the
# exceptions; narrow heads were measured up to 2049 keys). In milliseconds on an H200, large against these: 1024
# causal keys, 32 heads of 64 over eight, forward 0.355 and 0.324, 2048 0.608 and 0.580, all gradients with it 2.61 and
# 2.53; 769 keys of 96 0.205 and 0.203, 1025 0.250 and 0.255; dK and dV of 80 with what is before them, 1025 keys 1.023
# and 0.981, 1537 1.387 and 1.341; 512 causal keys, 32 heads of 112 over eight, 0.332 and 0.365.
MEDIUM_KEY_ELEMENTS_ON_ONE_AXIS = 2**16
MEDIUM_KEY_ELEMENTS_OF_NARROW_HEADS = 5 * 2**15
# Forward of more than 96 channels, with maxima: 257 keys of 128 0.129 and 0.122, 385 of 112 0.154 and 0.156, 385 of 128
# 0.149 and 0.154, 513 of 112 0.173 and 0.186.
MEDIUM_KEY_ELEMENTS_OF_WIDE_FORWARD = 3 * 2**14
MEDIUM_KEY_ELEMENTS_OF_80_CHANNELS = 2**17
# Forward where rows keep the references of the first chunk (``large_tiling.keeps_references``): up to 64 channels
# (measured up to 4096 keys), up to 96, and of 128; 16 heads, 16384 tokens, causal. 64 channels, 2048 keys 0.274 and
# 0.251, 4096 0.473 and 0.442; 96 channels, 1024 keys 0.259 and 0.233, 2048 0.403 and 0.401, of four heads a group 1024
# 0.226 and 0.232; 80 channels, 1024 0.241 and 0.222, 2048 0.379 and 0.381; 128 channels, 384 keys 0.154 and 0.143, 512
# 0.174 and 0.171, 768 0.213 and 0.225, four heads a group, 384 0.136 and 0.130, 512 0.155 and 0.159; but 112 channels,
# three parts of columns, 512 keys 0.155 and 0.176.
MEDIUM_KEY_ELEMENTS_OF_NARROW_HEADS_WITHOUT_MAXIMA = 5 * 2**16
MEDIUM_KEY_ELEMENTS_WITHOUT_MAXIMA = 2**17
MEDIUM_KEY_ELEMENTS_OF_WIDE_HEADS_WITHOUT_MAXIMA = 2**16
# Forward where a narrow head leaves some of its columns in shared memory empty: 1025 keys of 40 channels 0.209 and
# 0.249, of 56 0.212 and 0.224, but 513 keys of 56 0.138 and 0.129.
MEDIUM_KEY_ELEMENTS_OF_UNFILLED_COLUMNS = 2**15
# On two and three axes they are faster up to this many keys times channels squared, as the tiles of those for large
# windows see the more keys that some of their rows do not see, the smaller a window is. Large against these: 19x19 of
# 128 channels 0.405 and 0.347, 23x23 of 128 0.545 and 0.576; 9x9x9 of 80 channels 1.57 and 1.20, 11x11x11 of 64 2.19
# and 1.93, 41x41 of 64 0.80 and 0.73. Gradients of 23x23 are as fast with both, and of the others with these.
MEDIUM_KEYS_TIMES_SQUARED_CHANNELS = 2**23
# Where a call is too small for those, these are faster than portable kernels: 1740 keys of 72 channels, 8 heads of 2 x
# 3469 tokens, forward 0.144 in portable kernels and 0.124 in these, all gradients 0.314 and, with dQ in these, 0.296.
# They load each chunk for 64 rows, those for large windows for up to 256, which matters where what is loaded exceeds
# L2. Then those are faster for dK and dV: 11x11x11 windows of 61x136x240 tokens with 4 heads of 64 channels, large
# against these, forward 17.3 and 16.7, dQ 21.0 and 18.6, dK and dV 28.2 and 32.7; 21x21 of 256x4096 with 8 heads 5.3
# and 5.1, 6.9 and 6.7, 8.4 and 8.9.
# dQ of up to 64 channels on one axis pays from this many keys on: 193 keys of 64, with all other kernels of a call,
# 0.258 with portable kernels for dQ and 0.244 with these, 129 keys 0.251 and 0.253. Wider heads pay from fewer on.
MEDIUM_KEYS_OF_NARROW_DQ = 192
# On one axis they are faster than those for small windows forward from this many keys on, where each query head has
# keys of its own: 257 keys of 64 channels 0.078 and 0.065, with dilation 2 0.156 and 0.127, 193 keys 0.054 and 0.056.
# Of heads that share keys those take a tile of fewer positions: 256 causal keys, four heads a group, 0.112 and 0.123.
MEDIUM_KEYS_ON_ONE_AXIS = 256
# For dK and dV that is from this many on: with all other kernels of a call, 65 keys of 64 channels 0.188 and 0.174, 129
# keys 0.251 and 0.209, 65 keys of 128 0.364 and 0.311. Where heads share keys, wide ones are faster, too (128 causal
# keys of 128, four heads a group, 0.619 and 0.557), but narrow ones are not (64 channels 0.327 and 0.336).
MEDIUM_KEYS_OF_KEY_GRADIENTS = 64
# Up to this many channels heads are narrow, to the rules for dQ and for one axis.
MEDIUM_CHANNELS = 64
# Heads with fewer than this many channels take portable kernels on two and three axes, forward and for dQ, where
# columns in shared memory come in two parts: 11x11 of 40 0.226 and 0.250, dQ 0.252 and 0.286; but 13x13 of 32 0.310 and
# 0.288, dQ 0.341 and 0.300, and 3x20x5 of 48 0.248 and 0.218, gradients with this dQ 0.615 and 0.606. On one axis they
# do for dQ alone: with all other kernels of a call, 513 keys of 40 channels 0.497 and 0.505, of 48 0.439 and 0.426; 257
# keys of 32 0.215 and 0.218.
LEAST_MEDIUM_CHANNELS = 48
# Of two kernels that compute one tile a program, those for small windows are slower for gradients on two and three axes
# from this many keys on: dQ of 9x9 of 56 channels 0.193 and 0.172, of 13x13 of 64 with four heads a group 0.643 and
# 0.524; with all other kernels of a call, dK and dV of 9x9 of 32 0.474 and 0.377. dQ of up to 32 channels is the
# exception (9x9, four heads a group, 0.478 and 0.514).
MEDIUM_WINDOW_OF_GRADIENTS, MEDIUM_CHANNELS_OF_DQ = 80, 33
# However few the keys that these take, they are slower for gradients on causal axes (9x9 of 64 channels, dQ 0.276 and
# 0.256, dK and dV 0.275 and 0.244; 3x3x3 0.815 and 0.740, 0.812 and 0.713), and for dK and dV of heads that share keys
# (3x3x3 of 64, four heads a group, 0.435 and 0.336, 5x5 0.485 and 0.444, 7x7 0.562 and 0.560, and 0.987 and 0.908 with
# sixteen), with strides unless heads are narrow (8x8 with a stride of 4x4, 64 channels 0.886 and 0.782, 32 channels
# 0.543 and 0.566), and with dilations (all gradients of 7x7 of 64 channels, dilation 4x4, 0.160 and 0.146, of 32
# channels, 4x4 0.141 and 0.132, 2x2 0.400 and 0.390, of 5x5 of 64, 2x2, 0.303 and 0.295).
# A call with such a window is large enough to hide launch overhead, which the descriptors of up to three parts of each
# tensor double, from this many (query, key) pairs times channels on. Call after call, 24 heads of 96 channels with
# 17x17 windows on 64x64 tokens (2.7e9) take 69, 101 and 128 us in forward, dQ, and dK and dV, and 85, 99 and 208 us in
# portable kernels; 32 heads of 112 with 11x11 windows (1.8e9) take 83, 115 and 149 us against 108, 139 and 193; 16
# heads of 80 with 9x9 windows (0.4e9) take 100 us each, which is the host's time, against 52, 45 and 63.
MEDIUM_PRODUCTS = 3 * 2**29
# Gradients take longer, and need fewer where each tensor has one part: those of causal 9x9 windows of 8 heads of 64 on
# 8 x 64x64 tokens (1.4e9) take some 0.1 ms each.
MEDIUM_PRODUCTS_OF_GRADIENTS = 2**30
# dK and dV take twice as long as dQ in portable kernels, and pay from fewer. All gradients with portable kernels, and
# with these for dK and dV, on the GPU and then call after call, where the host may take longer: 9x9 windows on 8 x
# 64x64 tokens, 8 heads of 40 channels (0.85e9) 0.262 and 0.223, 0.258 and 0.220; on 4 x 64x64, 10 of 80 (1.1e9) 0.241
# and 0.204, 0.239 and 0.204, 8 of 96 (1.0e9) 0.216 and 0.176, 0.214 and 0.208, 8 of 72 (0.76e9) 0.203 and 0.176, but
# 0.201 and 0.209.
MEDIUM_PRODUCTS_OF_KEY_GRADIENTS = 3 * 2**28
# With biases portable kernels take twice as long as these, however large a call is: 64 images of 56x56 with 4 heads of
# 32 and 7x7 windows (1.3e9) 0.403, 0.400 and 0.577 ms, and these 0.221, 0.225 and 0.263.
MEDIUM_PRODUCTS_WITH_BIASES = 2**29
# A call with a large window is large enough to hide launch overhead from this many (query, key) pairs on. With windows
# of 1024 keys and 8 heads of 128 channels, 2**27 pairs take 152 us, and 181 us in portable kernels; 2**26 pairs take
# 101 us, which is the host's time, and 91 us in portable kernels.
PAIRS = 2**27


# --- Large windows


def _large_thresholds(question: Question, kind: Kind) -> tuple[int, int]:
    """From how many elements of keys, register tokens included, and (query, key) pairs on these kernels pay."""
    p = question.problem
    if large_tiling.is_wide(p):
        if kind == "backward_query":
            return WIDE_WINDOW * _widest(p), WIDE_PAIRS
        return WIDE_WINDOW_BESIDE_DQ * _widest(p), WIDE_PAIRS_BESIDE_DQ
    if kind == "backward_query" and p.rank == 1 and large_tiling.width_of(p) <= 64:
        return LARGE_KEY_ELEMENTS_OF_NARROW_DQ, PAIRS
    if p.registers and kind == "forward":
        return LARGE_KEY_ELEMENTS_WITH_REGISTERS, PAIRS
    return LARGE_KEY_ELEMENTS, PAIRS


def large_pays(question: Question, kind: Kind = "forward") -> str | None:
    p = question.problem
    dim = _widest(p)
    window, queries = prod(p.kernel_size), prod(p.query.shape[:-1])
    if p.packing is not None:  # on average, as windows are cut to samples
        window = sum(n * min(n, window) for n in p.packing.sizes) // max(p.packing.tokens, 1)
    keys = window + p.registers
    least, pairs = _large_thresholds(question, kind)
    if keys * dim < least:
        beside = ", additional keys included," if p.registers else ""
        return f"the window is small: {keys} keys{beside} of {dim} elements are fewer than {least} elements"
    if queries * keys < pairs:
        return f"the call is small: {queries} queries of {keys} keys are fewer than {pairs} pairs"
    return None


def _widest(p: Problem) -> int:
    """Channels of keys or of values, of which there are more."""
    return max(p.query.shape[-1], p.value.shape[-1])


def large_registers_pay(question: Question) -> str | None:
    p = question.problem
    elements, queries = p.registers * p.query.shape[-1], prod(p.query.shape[:-1])
    if elements < REGISTER_ELEMENTS:
        return f"additional keys are few: {elements} elements, fewer than {REGISTER_ELEMENTS}"
    if queries * elements < REGISTER_PRODUCTS:
        least = REGISTER_PRODUCTS
        return f"the call is small: {queries} queries times {elements} elements are fewer than {least} products"
    return None


# --- Small windows


def small_pays(question: Question, kind: Kind) -> str | None:
    window, queries = prod(question.problem.kernel_size), prod(question.problem.query.shape[:-1])
    if _medium_is_faster(question, kind):
        return f"the {MEDIUM} kernel is faster for such windows of {window} keys"
    if window >= small_tiling.SCORES:
        return f"the window is large: {window} keys, {small_tiling.SCORES} or more"
    if queries < LEAST_ROWS:
        return f"the call is small: {queries} query rows are fewer than {LEAST_ROWS}"
    return None


def small_backward_pays(question: Question, kind: Kind) -> str | None:
    dim = question.problem.query.shape[-1]
    columns = head_width(dim)
    if dim < LEAST_FILLED * columns:
        return f"the portable kernel is faster where heads of {dim} channels fill less of {columns} columns"
    return small_pays(question, kind)


def packed_images_pay(programs: int) -> str | None:
    if programs < PACKED_PROGRAMS:
        return (
            f"{programs} programs share a multiprocessor, too few to hide how packed images are copied: "
            f"{PACKED_PROGRAMS} or more do"
        )
    return None


# --- Windows between small and large


def medium_pays(question: Question, kind: Kind) -> str | None:
    p = question.problem
    # Of two grids, the finer one has most of the work: a coarse tile sees many keys that none of its rows sees alone.
    tokens = max(prod(p.query.shape[:-2]), prod(p.key.shape[:-2]))
    window, queries, dim = prod(p.kernel_size), tokens * p.query.shape[-2], p.query.shape[-1]
    if window < MEDIUM_WINDOW:
        return f"the window is small: {window} keys are fewer than {MEDIUM_WINDOW}"
    least = MEDIUM_KEYS_OF_NARROW_DQ
    if kind == "backward_query" and p.rank == 1 and dim <= MEDIUM_CHANNELS and window < least:
        return f"the window is small: {window} keys of {dim} channels on one axis are fewer than {least}"
    if kind != "backward_key" and _is_narrow(p, kind):
        return f"the portable kernel is faster for heads of {dim} channels on {p.rank} axes"
    keys = window if kind == "backward_key" else window + p.registers
    # Kernels for large windows take none of these, and portable ones are slower.
    lacking = p.key_mask, p.key_lengths, p.is_periodic or None, p.has_bias or None, prod(p.dilation) > 1 or None
    if lacking == (None,) * 5 and (reason := _beyond_medium(question, keys, kind)) is not None:
        return reason
    least = _least_products(p, kind)
    if queries * keys * dim < least:
        beside = ", additional keys included," if keys > window else ""
        work = f"{queries} queries of {keys} keys{beside} of {dim} elements"
        return f"the call is small: {work} are fewer than {least} products"
    return None


def _least_products(p: Problem, kind: Kind) -> int:
    if p.has_bias:
        return MEDIUM_PRODUCTS_WITH_BIASES
    if kind == "backward_key":
        return MEDIUM_PRODUCTS_OF_KEY_GRADIENTS
    if kind != "forward" and len(medium_tiling.columns_of(p)) == 1:
        return MEDIUM_PRODUCTS_OF_GRADIENTS
    return MEDIUM_PRODUCTS


def medium_jvp_pays(question: Question) -> str | None:
    p = question.problem
    elements = (prod(p.kernel_size) + p.registers) * p.query.shape[-1]
    if elements >= LARGE_KEY_ELEMENTS_OF_JVP:
        return f"the window is large: {elements} elements of keys are {LARGE_KEY_ELEMENTS_OF_JVP} or more"
    return None


def _beyond_medium(question: Question, keys: int, kind: Kind) -> str | None:
    """Why so many keys are too many, or None."""
    p = question.problem
    dim = p.query.shape[-1]
    large_takes = _large_takes(question, kind)
    if dim >= MEDIUM_CHANNELS and not large_takes:
        return None
    if p.rank == 1 and keys * dim >= (most := _most_on_one_axis(question, kind)):
        return f"the window is large: {keys} keys of {dim} elements are {most} or more"
    if p.rank > 1 and keys * dim**2 >= MEDIUM_KEYS_TIMES_SQUARED_CHANNELS:
        most = MEDIUM_KEYS_TIMES_SQUARED_CHANNELS
        return f"the window is large: {keys} keys times the square of {dim} channels are {most} or more"
    lines, most = medium_tiling.bytes_of_lines(p), medium_tiling.LINES_BYTES
    if kind == "backward_key" and p.rank > 1 and lines > most and large_takes:
        return f"keys and values of the lines that a line sees, {lines} bytes, exceed {most}"
    return None


def _large_takes(question: Question, kind: Kind) -> bool:
    """Whether a call that kernels for medium windows leave takes those for large ones, not the slower portable ones."""
    gap = large_gap if kind == "forward" else large_backward_gap
    return gap(question) is None and large_pays(question, kind) is None


def _most_on_one_axis(question: Question, kind: Kind) -> int:
    """From how many key elements on those for large windows, or portable ones, are faster on one axis.

    Heads of ``MEDIUM_CHANNELS`` or more are asked about only where those for large windows take the call.
    """
    p = question.problem
    dim = p.query.shape[-1]
    if kind == "forward" and dim < MEDIUM_CHANNELS and dim < sum(medium_tiling.columns_of(p)):
        return MEDIUM_KEY_ELEMENTS_OF_UNFILLED_COLUMNS
    if kind == "forward" and medium_tiling.keeps_references(p, question.with_stats):
        if dim <= MEDIUM_CHANNELS:
            return MEDIUM_KEY_ELEMENTS_OF_NARROW_HEADS_WITHOUT_MAXIMA
        if len(medium_tiling.columns_of(p)) < 3:
            return MEDIUM_KEY_ELEMENTS_WITHOUT_MAXIMA if dim <= 96 else MEDIUM_KEY_ELEMENTS_OF_WIDE_HEADS_WITHOUT_MAXIMA
    if dim <= MEDIUM_CHANNELS:
        return MEDIUM_KEY_ELEMENTS_OF_NARROW_HEADS
    if kind == "forward" and dim > 96:
        return MEDIUM_KEY_ELEMENTS_OF_WIDE_FORWARD
    if kind == "backward_key" and dim <= 80:
        return MEDIUM_KEY_ELEMENTS_OF_80_CHANNELS
    return MEDIUM_KEY_ELEMENTS_ON_ONE_AXIS


def _is_narrow(p: Problem, kind: Kind) -> bool:
    """Whether heads have so few channels that the portable kernel is faster, forward and for dQ."""
    dim = p.query.shape[-1]
    if p.rank == 1:
        return kind == "backward_query" and dim < LEAST_MEDIUM_CHANNELS
    return dim < LEAST_MEDIUM_CHANNELS and len(medium_tiling.columns_of(p)) > 1


def _medium_is_faster(question: Question, kind: Kind) -> bool:
    """Whether what kernels for small windows could compute takes longer there."""
    p = question.problem
    suits = _suits_medium_on_one_axis(p, kind) if p.rank == 1 else _suits_medium_on_axes(p, kind)
    if not suits or medium_gap(question) is not None or medium_pays(question, kind) is not None:
        return False
    return medium_tiling.TILES_OF[kind](p, override_pack()) is not None


def _suits_medium_on_one_axis(p: Problem, kind: Kind) -> bool:
    window, shares = prod(p.kernel_size), p.group > 1
    if kind == "forward":
        return not shares and window >= MEDIUM_KEYS_ON_ONE_AXIS
    if kind == "backward_query":
        return False
    return window >= MEDIUM_KEYS_OF_KEY_GRADIENTS and not (shares and p.query.shape[-1] <= MEDIUM_CHANNELS)


def _suits_medium_on_axes(p: Problem, kind: Kind) -> bool:
    """On two or three axes."""
    if kind == "forward":
        return False
    is_wide, is_causal = p.query.shape[-1] >= MEDIUM_CHANNELS_OF_DQ, any(p.is_causal)
    has_many_keys = prod(p.kernel_size) >= MEDIUM_WINDOW_OF_GRADIENTS
    if kind == "backward_query":
        return is_causal or (has_many_keys and is_wide)
    is_dilated = prod(p.dilation) > 1
    return is_causal or is_dilated or has_many_keys or p.group > 1 or (prod(p.stride) > 1 and is_wide)


# --- Preparation of queries and keys, and attention


def fused_prep_pays(question: Question) -> str | None:
    """Why two launches are expected to be faster than the fused kernel, or None.

    The fused kernel pays however small the call is, as one launch costs the host less than two.
    """
    window = prod(question.problem.kernel_size)
    if window >= small_tiling.SCORES:
        return f"the window is large: {window} keys, {small_tiling.SCORES} or more"
    if large_pays(question) is None:
        return f"the {LARGE} kernel pays, which takes heads that are prepared"
    return None
