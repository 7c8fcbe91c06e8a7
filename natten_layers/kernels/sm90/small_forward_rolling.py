"""The forward pass of small windows on compute capability 9.0 with a rolling K/V buffer.

Windows of neighbouring tiles overlap. A program computes a run of tiles one after the other along one axis, and keeps
what they see in a ring buffer in shared memory, whose stages are as long as a tile. A tile finds all stages but one as
the tile before has left them. The new stage, and the queries of the next tile, are loaded while a tile is computed.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    async_copy_global_to_shared,
    async_copy_shared_to_global,
    store_wait,
)

from ..host.problem import Inputs, Layout, Options, Problem, QKPrep, QKPrepKind
from ..host.tiling import Box, head_width
from ..portable.primitives import LN2, LOG2E
from ..portable.windows import shifted, unravel, windows_of
from .primitives import (
    Boxes,
    axes_of,
    boxes_of,
    multiprocessors,
    new_barriers,
    opaque_i32,
    output_rows,
    row_sinks,
    thread_barrier,
)
from .qk_prep import (
    head_gains,
    heads_layout,
    load_freqs,
    load_positions,
    prepare_heads,
    rotation_of,
    token_index,
)
from .small_forward import (
    Call,
    attend,
    batches_of_registers,
    boxes_of_registers,
    boxes_of_rows,
    call_of,
    shifted_along,
    start_registers,
)
from .small_nonfinite import attend_rows
from .small_softmax import (
    WARPS,
    all_finite,
    divided,
    is_inside,
    key_columns,
    key_mask,
    no_nonfinite_flags,
    nonfinite_flags,
    register_mask,
    scores_of,
    weighted_sum,
)
from .small_tiling import PrepSpec, RollingTileConfig, cut, forward_spec

NO_QK_PREP = QKPrepKind("none", split=(0,), by_head=False, batched=False)


class Runs(NamedTuple):
    """How the tiles of an image are cut into runs along the axis ``SPEC.axis``. An argument of the kernel."""

    tiles: Box
    """of each axis"""
    batches: int
    long: tuple[int, int]
    """number of long runs of a row of tiles, and tiles of each; the runs behind them are shorter, and start last"""
    short: int
    """tiles of the other runs"""
    shift: int
    """positions by which the first tile starts before the image"""
    phase: int
    """load ``i`` starts at the position ``i * SPEC.step + phase``"""


class RingSpec(NamedTuple):
    """The ring buffers of keys and values: the compile-time argument ``RING`` of the kernel."""

    stages: int
    """stages that a tile sees; load ``i`` fills stage ``i % stages``"""
    rest: tuple[int, ...]
    """keys of the last stage that a tile sees, in parts"""
    registers: int
    """keys of the box that holds the register tokens, or 0"""
    in_ring: bool
    """whether results pass through the stage of values that no tile needs any more: this saves memory, but the next
    values have to wait for it"""


class Ring(NamedTuple):
    """A ring buffer of keys or of values."""

    desc: Any
    """descriptor of the tensor"""
    buffer: Any
    """``[stages, 1, *box, D]`` in shared memory"""
    ready: Any
    """barrier that loads arrive at"""


class Run(NamedTuple):
    """Where the run of a program lies, and what it loads."""

    i_batch: Any
    i_block: Any
    """index of the block of query heads"""
    kv_offset: Any
    """where loads start: KV head, index on the axis of batch and t, and batch of the register tokens"""
    corner: Any
    """first key of the window of the first tile; later tiles differ from it along the axis of the run only"""
    steps: Any
    """number of tiles"""


class Buffers(NamedTuple):
    """Shared memory of a program."""

    queries: Any
    """``[1, *tile, pack, D]`` of one tile; they arrive at the barrier of the keys"""
    key_ring: Any
    """a :class:`Ring`"""
    value_ring: Any
    """a :class:`Ring`"""
    reg_keys: Any
    """``[registers, D]``, or None"""
    reg_values: Any
    results: Any
    """as large as the queries; None if results pass through the ring of values"""


class Rope(NamedTuple):
    """What RoPE needs for the keys of a stage and for the queries of a tile."""

    Positions: Any
    """pointer to the positions of the image"""
    k_index: Any
    """what ``token_index`` returns for keys"""
    q_index: Any
    k_freqs: Any
    """what ``load_freqs`` returns for keys"""
    q_freqs: Any


class Preparation(NamedTuple):
    """How queries and keys are normalised and rotated.

    The kernel makes it, and :class:`Buffers`, itself: device functions of Triton 3.6 cannot return tuples with
    None in them.
    """

    GainQ: Any
    """pointer to the gains of queries, or None"""
    GainK: Any
    q_gain: Any
    """what ``head_gains`` returns for queries"""
    k_gain: Any
    rope: Any
    """:class:`Rope`, or None"""
    factor: Any
    """by which cos and sin are multiplied, or None"""
    eps: Any
    """of the norm"""


@gluon.jit
def own_run(runs, blocks, SPEC: gl.constexpr):
    """Batch, block of heads, first position, and number of tiles of the run of this program.

    Heads vary fastest, as in memory, then rows of tiles beside each other.
    """
    tiles, long = runs.tiles, runs.long
    across = tiles[0] * tiles[1] * tiles[2] // tiles[SPEC.axis]
    i_across, i_rest = gl.program_id(0) // blocks % across, gl.program_id(0) // blocks // across
    i_run = i_rest // runs.batches
    is_long = i_run < long[0]
    first = gl.where(is_long, i_run * long[1], long[0] * long[1] + (i_run - long[0]) * runs.short)
    steps = gl.minimum(gl.where(is_long, long[1], runs.short), tiles[SPEC.axis] - first)
    if SPEC.axis == 0:
        t, h, w = first, i_across // tiles[2], i_across % tiles[2]
    elif SPEC.axis == 1:
        t, h, w = i_across // tiles[2], first, i_across % tiles[2]
    else:
        t, h, w = i_across // tiles[1], i_across % tiles[1], first
    origin = shifted_along((t * SPEC.tile[0], h * SPEC.tile[1], w * SPEC.tile[2]), -runs.shift, SPEC.axis)
    return i_rest % runs.batches, gl.program_id(0) % blocks, origin, steps


@gluon.jit
def load_start(i_load, runs, SPEC: gl.constexpr):
    """Position on the axis of the run at which a load starts."""
    return i_load * SPEC.step + runs.phase


@gluon.jit
def load_of(corner, runs, SPEC: gl.constexpr):
    """The load that fills the first stage of a tile, whose window starts at ``corner``."""
    return (corner[SPEC.axis] - runs.phase) // SPEC.step


@gluon.jit
def load_queries(desc, buffer, kv_offset, origin, head, ready):
    async_copy_global_to_shared(
        desc, [kv_offset[1] + origin[0], origin[1], origin[2], head, 0], ready, buffer.index(0)
    )  # fmt: skip


@gluon.jit
def load_stage(ring, kv_offset, corner, first, i_stage, AXIS: gl.constexpr):
    """Start to load the keys or values from ``first`` on, along the axis of the run, into a stage of the ring."""
    if AXIS == 0:
        at = [kv_offset[0], kv_offset[1] + first, corner[1], corner[2], 0]
    elif AXIS == 1:
        at = [kv_offset[0], first, kv_offset[1] + corner[0], corner[2], 0]
    else:
        at = [kv_offset[0], first, kv_offset[1] + corner[0], corner[1], 0]
    async_copy_global_to_shared(ring.desc, at, ring.ready, ring.buffer.index(i_stage))


@gluon.jit
def load_stages(ring, kv_offset, corner, i_load, runs, SPEC: gl.constexpr, RING: gl.constexpr):
    """Start to load all stages that the first tile sees."""
    STAGES: gl.constexpr = RING.stages
    for i in gl.static_range(STAGES):
        load_stage(ring, kv_offset, corner, load_start(i_load + i, runs, SPEC), (i_load + i) % STAGES, SPEC.axis)


@gluon.jit
def stage_positions(n, BOX: gl.constexpr, AXIS: gl.constexpr):
    """Positions ``t, h, w`` of keys ``n`` of a stage."""
    along, first, second = unravel(n, BOX[2], BOX[3])
    if AXIS == 0:
        t, h, w = along, first, second
    elif AXIS == 1:
        t, h, w = first, along, second
    else:
        t, h, w = first, second, along
    return t, h, w


@gluon.constexpr_function
def parts_of(stages, keys, rest):
    """Stage, first key and number of keys of every part: whole stages, and of the last one what is needed."""
    return [(i, 0, keys) for i in range(stages - 1)] + [
        (stages - 1, sum(rest[:i]), count) for i, count in enumerate(rest)
    ]


@gluon.jit
def ring_masks(
    corner, row_lo, row_hi, PARTS: gl.constexpr, BOX: gl.constexpr, SPEC: gl.constexpr, SEEN: gl.constexpr = None
):  # fmt: skip
    """Masks of all parts; ``SEEN`` as in ``key_mask``."""
    masks = ()
    for PART in gl.static_range(len(PARTS)):
        inner = stage_positions(key_columns(PARTS[PART][2], PARTS[PART][1]), BOX, SPEC.axis)
        inner = shifted_along(inner, PARTS[PART][0] * BOX[1], SPEC.axis)
        masks = masks + (key_mask(inner, corner, row_lo, row_hi, SPEC.rows, SPEC.rank, SEEN),)  # noqa: RUF005
    return masks


@gluon.jit
def rolling_masks(
    corner, origin, length, row_lo, row_hi, registers,
    PARTS: gl.constexpr, BOX: gl.constexpr, SPEC: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Masks of all keys that a tile sees: of the parts of its stages, and of the register tokens, if there are any."""
    if SPEC.window is None:
        masks = ring_masks(corner, row_lo, row_hi, PARTS, BOX, SPEC)
    elif is_inside(origin, length, SPEC):
        masks = ring_masks(corner, row_lo, row_hi, PARTS, BOX, SPEC, (SPEC.tile[2] - 1, SPEC.window - 1))
    else:
        masks = ring_masks(corner, row_lo, row_hi, PARTS, BOX, SPEC)
    if REGISTERS > 0:
        masks = masks + (register_mask(registers, 0, REGISTERS, SPEC.rows),)  # noqa: RUF005
    return masks


@gluon.jit
def ring_parts(ring, i_stage, extra, PARTS: gl.constexpr, STAGES: gl.constexpr):
    """Views ``[keys, D]`` of the parts, of which the first is in ``i_stage``, and of the register tokens, if any."""
    BOX: gl.constexpr = ring.desc.block_type.shape
    KEYS: gl.constexpr = BOX[1] * BOX[2] * BOX[3]
    views = ()
    for PART in gl.static_range(len(PARTS)):
        view = ring.buffer.index((i_stage + PARTS[PART][0]) % STAGES).reshape([KEYS, BOX[4]])
        if PARTS[PART][2] < KEYS:
            view = view.slice(PARTS[PART][1], PARTS[PART][2])
        views = views + (view,)  # noqa: RUF005
    if extra is not None:
        views = views + (extra,)  # noqa: RUF005
    return views


@gluon.jit
def load_rope(Positions, Freqs, KEYS: gl.constexpr, SPEC: gl.constexpr, PREP: gl.constexpr):
    """:class:`Rope` of an image and a head; None without RoPE."""
    rope = None
    if PREP.pairs > 0:
        k_index = token_index(KEYS, PREP.axes, PREP.pairs)
        q_index = token_index(SPEC.rows, PREP.axes, PREP.pairs)
        k_freqs = load_freqs(Freqs, KEYS, PREP.axes, PREP.pairs)
        q_freqs = load_freqs(Freqs, SPEC.rows, PREP.axes, PREP.pairs)
        rope = Rope(Positions, k_index, q_index, k_freqs, q_freqs)
    return rope


@gluon.jit
def stage_coordinates(rope, corner, first, length, BOX: gl.constexpr, AXIS: gl.constexpr, AXES: gl.constexpr):
    """Coordinates of the keys of the stage that starts at ``first``; None without RoPE."""
    b_position = None
    if rope is not None:
        token = shifted(shifted_along(stage_positions(rope.k_index, BOX, AXIS), first - corner[AXIS], AXIS), corner)
        b_position = load_positions(rope.Positions, token, length, AXES)
    return b_position


@gluon.jit
def query_coordinates(rope, zero, origin, length, SPEC: gl.constexpr, AXES: gl.constexpr):
    """Coordinates of the rows of a tile; None without RoPE.

    In a loop ``zero`` is an opaque zero, so that what is computed from it stays there.
    """
    b_position = None
    if rope is not None:
        row = rope.q_index + zero
        token = shifted(unravel(row // SPEC.pack, SPEC.tile[1], SPEC.tile[2]), origin)
        b_position = load_positions(rope.Positions, token, length, AXES)
    return b_position


@gluon.jit
def prepare_stages(
    prep, keys, corner, i_load, i_fresh, runs, length, SPEC: gl.constexpr, RING: gl.constexpr, PREP: gl.constexpr
):  # fmt: skip
    """Normalise and rotate the keys of the loads ``i_load`` to ``i_fresh - 1``, in shared memory."""
    BOX: gl.constexpr = keys.desc.block_type.shape
    KEYS: gl.constexpr = BOX[1] * BOX[2] * BOX[3]
    NORM: gl.constexpr = PREP.norm
    for i in range(i_load, i_fresh):
        first = load_start(i, runs, SPEC)
        b_position = stage_coordinates(prep.rope, corner, first, length, BOX, SPEC.axis, PREP.axes)
        b_stage = keys.buffer.index(i % RING.stages).reshape([KEYS, SPEC.columns])
        b_k = b_stage.load(heads_layout(KEYS, SPEC.columns, PREP.pairs))
        k_rotation = None
        if prep.rope is not None:
            k_rotation = rotation_of(b_position, prep.rope.k_freqs, prep.factor)
        b_stage.store(prepare_heads(b_k, k_rotation, prep.k_gain, prep.GainK, prep.eps, NORM))


@gluon.jit
def prepare_tile(
    prep, k_position, q_position, buffers, i_stage, zero, phase, SPEC: gl.constexpr, PREP: gl.constexpr
):  # fmt: skip
    """Normalise and rotate the queries of a tile and the stage that is new to it, when they have arrived.

    Both are read before either is written: threads wait for each other once, in between.
    """
    keys, queries = buffers.key_ring, buffers.queries
    BOX: gl.constexpr = keys.desc.block_type.shape
    KEYS: gl.constexpr = BOX[1] * BOX[2] * BOX[3]
    NORM: gl.constexpr = PREP.norm
    M: gl.constexpr = SPEC.rows
    k_rotation = None
    q_rotation = None
    if prep.rope is not None:
        k_rotation = rotation_of(k_position, prep.rope.k_freqs, prep.factor)
        q_rotation = rotation_of(q_position, prep.rope.q_freqs, prep.factor)
    mbarrier.wait(keys.ready, phase)
    b_stage = keys.buffer.index(i_stage).reshape([KEYS, SPEC.columns])
    b_queries = queries.index(zero).reshape([M, SPEC.columns])
    b_k = b_stage.load(heads_layout(KEYS, SPEC.columns, PREP.pairs))
    b_q = b_queries.load(heads_layout(M, SPEC.columns, PREP.pairs))
    b_stage.store(prepare_heads(b_k, k_rotation, prep.k_gain, prep.GainK, prep.eps, NORM))
    b_queries.store(prepare_heads(b_q, q_rotation, prep.q_gain, prep.GainQ, prep.eps, NORM))
    fence_async_shared()


@gluon.jit
def await_writes():
    """Wait until the writes of this program are complete, so that later ones come after them.

    ``store_wait`` waits only until their source has been read.
    """
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip
    thread_barrier()


@gluon.jit
def new_buffers(q_desc, k_desc, v_desc, STAGES: gl.constexpr):
    """Shared memory for the queries of a tile and the rings of keys and values.

    Queries arrive at the barrier of the keys.
    """
    ready = new_barriers(2, 1)
    queries = gl.allocate_shared_memory(q_desc.dtype, [1] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    keys = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)  # noqa: RUF005
    values = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)  # noqa: RUF005
    return queries, Ring(k_desc, keys, ready.index(0)), Ring(v_desc, values, ready.index(1))


@gluon.jit
def load_first_tile(
    q_desc, queries, keys, values, kv_offset, q_head, origin, corner, i_load, runs,
    SPEC: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Start to load what the first tile needs, and announce the bytes of register tokens too."""
    BOX: gl.constexpr = keys.desc.block_type.shape
    KEYS: gl.constexpr = RING.stages * BOX[1] * BOX[2] * BOX[3] + RING.registers
    mbarrier.expect(keys.ready, (SPEC.rows + KEYS) * SPEC.columns * 2)
    load_queries(q_desc, queries, kv_offset, origin, q_head, keys.ready)
    load_stages(keys, kv_offset, corner, i_load, runs, SPEC, RING)
    mbarrier.expect(values.ready, KEYS * SPEC.columns * 2)
    load_stages(values, kv_offset, corner, i_load, runs, SPEC, RING)


@gluon.jit
def store_tile(
    b_acc, row_m, row_l, buffer, out_desc, RowMax, RowSum, position, head, run, origin, length, blocks,
    SPEC: gl.constexpr,
):  # fmt: skip
    """Start to store the results of a tile, which pass through ``buffer``, and store its statistics."""
    buffer.reshape([SPEC.rows, SPEC.columns]).store(divided(b_acc, row_l, out_desc.dtype))
    fence_async_shared()
    async_copy_shared_to_global(
        out_desc, [run.kv_offset[1] + origin[0], origin[1], origin[2], run.i_block * SPEC.pack, 0], buffer
    )  # fmt: skip
    if SPEC.with_stats:
        m_rows, o_row = output_rows(position, head, run.i_batch, origin, length, blocks * SPEC.pack)
        gl.store(RowMax + o_row, row_m * LN2, mask=m_rows)
        gl.store(RowSum + o_row, row_l, mask=m_rows)


@gluon.jit
def load_next(ring, kv_offset, corner, i_load, i_stage, runs, SPEC: gl.constexpr):
    """Announce and start a load of one stage."""
    mbarrier.expect(ring.ready, ring.desc.block_type.nbytes)
    load_stage(ring, kv_offset, corner, load_start(i_load, runs, SPEC), i_stage, SPEC.axis)


@gluon.jit
def attend_run(
    Sink, RowMax, RowSum, q_desc, out_desc, buffers, prep, k_position, q_position, run, origin, i_load,
    axes, runs, blocks, registers, sink, scale, SPEC: gl.constexpr, RING: gl.constexpr, PREP: gl.constexpr,
):  # fmt: skip
    """Attention of the tiles of a run, from ``origin`` on; returns flags of ``nonfinite_flags`` and the run's end.

    The first tile sees the loads from ``i_load`` on. ``k_position`` and ``q_position`` are coordinates of its last
    stage and of its queries.
    """
    length, kernel, stride = axes
    queries, keys, values, reg_keys, reg_values, results = buffers
    CAUSAL: gl.constexpr = SPEC.causal
    M: gl.constexpr = SPEC.rows
    TILE: gl.constexpr = SPEC.tile
    PACK: gl.constexpr = SPEC.pack
    BD: gl.constexpr = SPEC.columns
    AXIS: gl.constexpr = SPEC.axis
    SINK: gl.constexpr = SPEC.sink
    STAGES: gl.constexpr = RING.stages
    IN_RING: gl.constexpr = RING.in_ring
    WITH_PREP: gl.constexpr = PREP.is_needed
    BOX: gl.constexpr = keys.desc.block_type.shape
    KEYS: gl.constexpr = BOX[1] * BOX[2] * BOX[3]
    PARTS: gl.constexpr = parts_of(STAGES, KEYS, RING.rest)
    EIGHTHS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 8, 16])
    q_head = run.i_block * PACK
    i_free, i_fresh = i_load % STAGES, i_load + (STAGES - 1)
    nonfinite = no_nonfinite_flags(M)  # NaN where a result of the run is not finite

    for i_step in range(run.steps):
        zero = opaque_i32(0)
        row = gl.arange(0, M, gl.SliceLayout(1, EIGHTHS)) + zero
        position, head = unravel(row // PACK, TILE[1], TILE[2]), q_head + row % PACK
        row_lo, row_hi = windows_of(shifted(position, origin), length, kernel, stride, CAUSAL)
        row_sink = row_sinks(Sink, head, sink, SINK)
        if WITH_PREP:
            prepare_tile(prep, k_position, q_position, buffers, i_fresh % STAGES, zero, i_step & 1, SPEC, PREP)
        low = shifted_along(run.corner, load_start(i_load, runs, SPEC) - run.corner[AXIS], AXIS)
        masks = rolling_masks(low, origin, length, row_lo, row_hi, registers, PARTS, BOX, SPEC, RING.registers)
        if IN_RING:  # noqa: SIM102 - the outer condition is known at compile time
            if i_step > 0:
                store_wait(0)  # results that this overwrites have been read
                load_next(values, run.kv_offset, run.corner, i_fresh, i_free, runs, SPEC)

        if not WITH_PREP:
            mbarrier.wait(keys.ready, i_step & 1)
        i_free = i_load % STAGES
        b_q = queries.index(zero).reshape([M, BD])
        scores = scores_of(b_q, ring_parts(keys, i_free, reg_keys, PARTS, STAGES), masks)
        written = origin
        origin = shifted_along(origin, SPEC.step, AXIS)
        ahead, _ = windows_of(origin, length, kernel, stride, CAUSAL)
        i_next = load_of(ahead, runs, SPEC)
        # At a border two tiles may need the same stages: then the first stage is loaded again.
        i_fresh = i_load + (i_next - i_load) * STAGES
        if i_step + 1 < run.steps:
            mbarrier.expect(keys.ready, (M + KEYS) * BD * 2)
            load_queries(q_desc, queries, run.kv_offset, origin, q_head, keys.ready)
            load_stage(keys, run.kv_offset, run.corner, load_start(i_fresh, runs, SPEC), i_free, AXIS)
        i_load = i_next
        if PREP.pairs > 0:
            first = load_start(i_fresh, runs, SPEC)
            k_position = stage_coordinates(prep.rope, run.corner, first, length, BOX, AXIS, PREP.axes)
            q_position = query_coordinates(prep.rope, zero, origin, length, SPEC, PREP.axes)

        v_parts = ring_parts(values, i_free, reg_values, PARTS, STAGES)
        b_acc, row_m, row_l = weighted_sum(
            scores, v_parts, values.ready, i_step & 1, row_sink, scale, SINK, BD, EIGHTHS
        )  # fmt: skip
        if not IN_RING:  # noqa: SIM102
            if i_step + 1 < run.steps:
                load_next(values, run.kv_offset, run.corner, i_fresh, i_free, runs, SPEC)
        # Always true; the branch stops ptxas from moving the epilogue above the last product, and from serializing all
        # products where registers are scarce.
        if length[2] > 0:
            nonfinite += nonfinite_flags(b_acc, row_l)
            if IN_RING:
                staged = values.buffer.index(i_free)._reinterpret(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
            else:
                staged = results
                store_wait(0)  # the last results have been read
            store_tile(
                b_acc, row_m, row_l, staged, out_desc, RowMax, RowSum, position, head, run, written, length, blocks,
                SPEC,
            )  # fmt: skip
    return nonfinite, origin


@gluon.jit
def small_forward_rolling_kernel(
    Q, K, V, Out, RowMax, RowSum, RegK, RegV, Sink, GainQ, GainK, Positions, Freqs,
    q_desc, out_desc, k_desc, v_desc, regk_desc, regv_desc,
    strides, axes, runs, group, blocks, registers, reg_batch, rope_steps, sink, scale, factor, eps,
    SPEC: gl.constexpr, RING: gl.constexpr, PREP: gl.constexpr,
):  # fmt: skip
    """Attention of a run of tiles; the grid is runs * batch * rows of tiles * blocks of heads.

    ``axes`` is length, kernel size and stride of each axis. With ``PREP``, queries and keys are normalised and rotated
    in shared memory; ``rope_steps`` lead from the positions of one image, and from the frequencies of one head, to the
    next, or are 0. The other arguments are those of ``small_forward_kernel``.
    """
    length, kernel, stride = axes
    CAUSAL: gl.constexpr = SPEC.causal
    M: gl.constexpr = SPEC.rows
    PACK: gl.constexpr = SPEC.pack
    BD: gl.constexpr = SPEC.columns
    AXIS: gl.constexpr = SPEC.axis
    STAGES: gl.constexpr = RING.stages
    IN_RING: gl.constexpr = RING.in_ring
    WITH_PREP: gl.constexpr = PREP.is_needed
    NORM: gl.constexpr = PREP.norm
    BOX: gl.constexpr = k_desc.block_type.shape
    KEYS: gl.constexpr = BOX[1] * BOX[2] * BOX[3]

    i_batch, i_block, origin, steps = own_run(runs, blocks, SPEC)
    kv_offset = i_block * PACK // group, i_batch * length[0], i_batch * reg_batch
    corner, _ = windows_of(origin, length, kernel, stride, CAUSAL)
    i_load = load_of(corner, runs, SPEC)
    queries, keys, values = new_buffers(q_desc, k_desc, v_desc, STAGES)
    results = None
    if not IN_RING:
        results = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    load_first_tile(
        q_desc, queries, keys, values, kv_offset, i_block * PACK, origin, corner, i_load, runs, SPEC, RING
    )  # fmt: skip
    reg_keys = None
    reg_values = None
    if regk_desc is not None:
        reg_keys = start_registers(regk_desc, kv_offset, keys.ready)
        reg_values = start_registers(regv_desc, kv_offset, values.ready)
    i_fresh = i_load + (STAGES - 1)
    if PREP.pairs > 0:
        Positions += i_batch.to(gl.int64) * rope_steps[0]
        Freqs += kv_offset[0] * rope_steps[1]
    rope = load_rope(Positions, Freqs, KEYS, SPEC, PREP)
    k_position = stage_coordinates(rope, corner, load_start(i_fresh, runs, SPEC), length, BOX, AXIS, PREP.axes)
    q_position = query_coordinates(rope, 0, origin, length, SPEC, PREP.axes)
    k_gain = head_gains(GainK, kv_offset[0], KEYS, 1, heads_layout(KEYS, BD, PREP.pairs), NORM)
    q_gain = head_gains(GainQ, i_block * PACK, M, PACK, heads_layout(M, BD, PREP.pairs), NORM)
    prep = Preparation(GainQ, GainK, q_gain, k_gain, rope, factor, eps)
    if WITH_PREP:
        mbarrier.wait(keys.ready, 0)
        prepare_stages(prep, keys, corner, i_load, i_fresh, runs, length, SPEC, RING, PREP)
    nonfinite, end = attend_run(
        Sink, RowMax, RowSum, q_desc, out_desc, Buffers(queries, keys, values, reg_keys, reg_values, results), prep,
        k_position, q_position, Run(i_batch, i_block, kv_offset, corner, steps), origin, i_load,
        axes, runs, blocks, registers, sink, scale, SPEC, RING, PREP,
    )  # fmt: skip
    store_wait(0)
    if not all_finite(nonfinite):
        await_writes()
        for i_step in range(steps):
            attend_rows(
                (Q, K, V, RegK, RegV, Sink, Out), (RowMax, RowSum), strides, i_batch, i_block,
                shifted_along(end, (i_step - steps) * SPEC.step, AXIS), (length, kernel, stride, blocks * PACK),
                ((0, 0, 0), length, (1, 1, 1)), group, registers, sink, scale * LOG2E,
                (GainQ, GainK, Positions, Freqs, factor, eps), SPEC, PREP,
            )  # fmt: skip


def forward(
    config: RollingTileConfig, problem: Problem, inputs: Inputs, options: Options, with_stats: bool,
    prep: QKPrep | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """What ``small_forward.forward`` computes; with ``prep``, of queries and keys that the kernel prepares first."""
    kind, tensors, floats = NO_QK_PREP, (None,) * 4, (None,) * 2
    if prep is not None:
        kind = prep.kind
        tensors = prep.query_gain, prep.key_gain, prep.positions, prep.freqs
        floats = None if prep.factor == 1.0 else prep.factor, prep.eps
    call = prepare(config, problem, with_stats, kind)
    return attend(call, 1, inputs, options, with_stats, tensors, floats)


@lru_cache(maxsize=1024)
def prepare(config: RollingTileConfig, p: Problem, with_stats: bool, kind: QKPrepKind) -> Call:
    axis, blocks = config.axis, p.query.shape[-2] // config.pack
    lengths, kernel_size, stride, _ = p.geometry
    tiles = config.tiles(p)
    batches, tile_rows = p.query.shape[0], prod(tiles) // tiles[axis] * p.query.shape[0] * blocks
    long, short = cut(tiles[axis], tile_rows, config.programs * multiprocessors(p.device))
    runs = Runs(tiles, batches, long, short, config.shift, config.phase)
    runs_of_row = long[0] + -(-(tiles[axis] - prod(long)) // short)
    rope_steps = prod(lengths) * kind.axes if kind.batched else 0, kind.pairs // kind.axes if kind.by_head else 0
    return call_of(
        small_forward_rolling_kernel,
        (runs_of_row * tile_rows,),
        (
            p.input_strides(), (lengths, kernel_size, stride), runs, p.group, blocks, p.registers,
            batches_of_registers(p), rope_steps,
        ),
        [
            *boxes_of_rows(config, p),
            *(stage_boxes(x, config.box, axis) for x in (p.key, p.value)),
            *boxes_of_registers(config, p),
        ],
        SPEC=forward_spec(config, p, with_stats),
        RING=RingSpec(config.stages, config.rest, config.registers, config.in_ring),
        PREP=PrepSpec(kind.norm, kind.axes, kind.pairs), num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip


def stage_boxes(tensor: Layout, box: Box, axis: int) -> Boxes:
    """The descriptor of keys or values: boxes of positions of one head, with the axis of the run first, so that the
    part of a stage that a tile does not see is contiguous.
    """
    (*sizes, heads), (*steps, head) = axes_of(tensor)
    order = [axis, *(i for i in range(3) if i != axis)]
    dim = tensor.shape[-1]
    return boxes_of(
        [heads, *(sizes[i] for i in order), dim], [head, *(steps[i] for i in order), 1],
        [1, *(box[i] for i in order), head_width(dim)],
    )  # fmt: skip
