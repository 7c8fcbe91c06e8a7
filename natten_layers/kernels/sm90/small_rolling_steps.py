"""The steps of a run of tiles with a rolling K/V buffer: its place, stages, masks, preparation, loads and stores.

``small_forward_rolling.py`` puts the steps together.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    async_copy_global_to_shared,
    async_copy_shared_to_global,
    store_wait,
)

from ..host.tiling import Box
from ..portable.primitives import LN2
from ..portable.windows import shifted, unravel, windows_of
from .primitives import output_rows, shifted_along, thread_barrier
from .qk_prep import (
    heads_layout,
    load_freqs,
    load_positions,
    prepare_heads,
    rotation_of,
    token_index,
)
from .rings import new_barriers
from .small_softmax import (
    divided,
    is_inside,
    key_columns,
    key_mask,
    register_mask,
)


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
def next_tile(origin, i_load, axes, runs, SPEC: gl.constexpr, STAGES: gl.constexpr):
    """The next tile of a run: its first position, the load that fills its first stage, and the load to start for it.

    ``origin`` and ``i_load`` are those of the tile before.
    """
    length, kernel, stride = axes
    CAUSAL: gl.constexpr = SPEC.causal
    origin = shifted_along(origin, SPEC.step, SPEC.axis)
    corner, _ = windows_of(origin, length, kernel, stride, CAUSAL)
    i_next = load_of(corner, runs, SPEC)
    # At a border two tiles may need the same stages: then the first stage is loaded again.
    return origin, i_next, i_load + (i_next - i_load) * STAGES


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
    corner, origin, length, row_lo, row_hi, registers, Begins,
    PARTS: gl.constexpr, BOX: gl.constexpr, SPEC: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Masks of all keys that a tile sees: of the parts of its stages, and of the register tokens, if there are any."""
    if SPEC.window is None:
        masks = ring_masks(corner, row_lo, row_hi, PARTS, BOX, SPEC)
    elif is_inside(origin, length, Begins, SPEC):
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
def results_buffer(values, results, i_free, q_desc, IN_RING: gl.constexpr):
    """The buffer through which the results of a tile pass: with ``IN_RING`` the stage of values that no tile needs any
    more, otherwise ``results``, once those of the tile before have been read.
    """
    if IN_RING:
        buffer = values.buffer.index(i_free)._reinterpret(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    else:
        buffer = results
        store_wait(0)
    return buffer


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
