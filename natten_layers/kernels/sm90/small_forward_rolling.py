"""The forward pass of small windows on compute capability 9.0 with a rolling K/V buffer.

Windows of neighbouring tiles overlap. A program computes a run of tiles one after the other along one axis, and keeps
what they see in a ring buffer in shared memory, whose stages are as long as a tile. A tile finds all stages but one as
the tile before has left them. The new stage, and the queries of the next tile, are loaded while a tile is computed.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from functools import lru_cache
from math import prod

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
    options_of,
    shifted_along,
    start_registers,
)
from .small_nonfinite import attend_rows
from .small_softmax import (
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
from .small_tiling import RollingTileConfig, cut

NO_QK_PREP = QKPrepKind("none", split=(0,), by_head=False, batched=False)


@gluon.jit
def own_run(tiles, batches, blocks, long, short, shift, TILE: gl.constexpr, AXIS: gl.constexpr):
    """Batch, block of heads, first position, and number of tiles of the run of this program.

    ``long`` is the number of long runs along an axis and their length; the runs behind them, which start last, have
    ``short`` tiles. Heads vary fastest, as in memory, then rows of tiles beside each other.
    """
    across = tiles[0] * tiles[1] * tiles[2] // tiles[AXIS]
    i_across, i_rest = gl.program_id(0) // blocks % across, gl.program_id(0) // blocks // across
    i_run = i_rest // batches
    is_long = i_run < long[0]
    first = gl.where(is_long, i_run * long[1], long[0] * long[1] + (i_run - long[0]) * short)
    steps = gl.minimum(gl.where(is_long, long[1], short), tiles[AXIS] - first)
    if AXIS == 0:
        t, h, w = first, i_across // tiles[2], i_across % tiles[2]
    elif AXIS == 1:
        t, h, w = i_across // tiles[2], first, i_across % tiles[2]
    else:
        t, h, w = i_across // tiles[1], i_across % tiles[1], first
    origin = shifted_along((t * TILE[0], h * TILE[1], w * TILE[2]), -shift, AXIS)
    return i_rest % batches, gl.program_id(0) % blocks, origin, steps


@gluon.jit
def load_queries(desc, buffer, kv_offset, origin, head, ready):
    async_copy_global_to_shared(
        desc, [kv_offset[1] + origin[0], origin[1], origin[2], head, 0], ready, buffer.index(0)
    )  # fmt: skip


@gluon.jit
def load_stage(desc, ring, kv_offset, corner, first, i_stage, ready, AXIS: gl.constexpr):
    """Start to load the keys or values from ``first`` on, along the axis of the run, into a stage of the ring."""
    if AXIS == 0:
        at = [kv_offset[0], kv_offset[1] + first, corner[1], corner[2], 0]
    elif AXIS == 1:
        at = [kv_offset[0], first, kv_offset[1] + corner[0], corner[2], 0]
    else:
        at = [kv_offset[0], first, kv_offset[1] + corner[0], corner[1], 0]
    async_copy_global_to_shared(desc, at, ready, ring.index(i_stage))


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
def rolling_masks(
    corner, row_lo, row_hi, PARTS: gl.constexpr, BOX: gl.constexpr, AXIS: gl.constexpr, M: gl.constexpr,
    RANK: gl.constexpr, SEEN: gl.constexpr = None,
):  # fmt: skip
    """Masks of all parts; ``SEEN`` as in ``key_mask``."""
    masks = ()
    for PART in gl.static_range(len(PARTS)):
        inner = stage_positions(key_columns(PARTS[PART][2], PARTS[PART][1]), BOX, AXIS)
        inner = shifted_along(inner, PARTS[PART][0] * BOX[1], AXIS)
        masks = masks + (key_mask(inner, corner, row_lo, row_hi, M, RANK, SEEN),)  # noqa: RUF005
    return masks


@gluon.jit
def ring_parts(ring, i_stage, extra, PARTS: gl.constexpr, STAGES: gl.constexpr):
    """Views ``[keys, D]`` of the parts, of which the first is in ``i_stage``, and of the register tokens, if any."""
    KEYS: gl.constexpr = ring.shape[2] * ring.shape[3] * ring.shape[4]
    views = ()
    for PART in gl.static_range(len(PARTS)):
        view = ring.index((i_stage + PARTS[PART][0]) % STAGES).reshape([KEYS, ring.shape[5]])
        if PARTS[PART][2] < KEYS:
            view = view.slice(PARTS[PART][1], PARTS[PART][2])
        views = views + (view,)  # noqa: RUF005
    if extra is not None:
        views = views + (extra,)  # noqa: RUF005
    return views


@gluon.jit
def stage_coordinates(Positions, n, corner, first, length, BOX: gl.constexpr, AXIS: gl.constexpr, AXES: gl.constexpr):
    """Coordinates of keys ``n`` of the stage that starts at ``first``; None where ``n`` is None."""
    b_position = None
    if n is not None:
        token = shifted(shifted_along(stage_positions(n, BOX, AXIS), first - corner[AXIS], AXIS), corner)
        b_position = load_positions(Positions, token, length, AXES)
    return b_position


@gluon.jit
def query_coordinates(Positions, row, origin, length, TILE: gl.constexpr, PACK: gl.constexpr, AXES: gl.constexpr):
    """Coordinates of the rows of a tile; None where ``row`` is None."""
    b_position = None
    if row is not None:
        token = shifted(unravel(row // PACK, TILE[1], TILE[2]), origin)
        b_position = load_positions(Positions, token, length, AXES)
    return b_position


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
def small_forward_rolling_kernel(
    Q, K, V, Out, RowMax, RowSum, RegK, RegV, Sink, GainQ, GainK, Positions, Freqs,
    q_desc, out_desc, k_desc, v_desc, regk_desc, regv_desc,
    q_strides, k_strides, v_strides, regk_strides, regv_strides,
    length, kernel, stride, tiles, batches, long, short, shift, phase, group, blocks, registers, reg_batch,
    position_step, freq_step, sink, scale, factor, eps,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, AXIS: gl.constexpr, STAGES: gl.constexpr, REST: gl.constexpr,
    PACK: gl.constexpr, RANK: gl.constexpr, WINDOW: gl.constexpr, REGISTERS: gl.constexpr, D: gl.constexpr,
    BD: gl.constexpr, SINK: gl.constexpr, WITH_STATS: gl.constexpr, IN_RING: gl.constexpr, NORM: gl.constexpr,
    AXES: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Attention of a run of tiles; the grid is runs * batch * rows of tiles * blocks of heads.

    Load ``i`` starts at ``i * TILE[AXIS] + phase`` on the axis and fills stage ``i % STAGES``. A tile sees ``STAGES``
    stages, of the last one ``REST`` keys, in parts. ``long`` and ``short`` are explained at ``own_run``; ``shift`` is
    how far before the image the first tile starts. ``IN_RING``: results pass through the stage of values that no tile
    needs any more, which saves memory, but the next values have to wait for it. With ``NORM`` or ``PAIRS``, queries and
    keys are normalised and rotated in shared memory; ``position_step`` and ``freq_step`` lead from the positions of one
    image, and from the frequencies of one head, to the next, or are 0. The other arguments are those of
    ``small_forward_kernel``.
    """
    M: gl.constexpr = TILE[0] * TILE[1] * TILE[2] * PACK
    STEP: gl.constexpr = TILE[AXIS]
    BOX: gl.constexpr = k_desc.block_type.shape
    WITH_QK_PREP: gl.constexpr = NORM != "none" or PAIRS > 0
    KEYS: gl.constexpr = BOX[1] * BOX[2] * BOX[3]
    PARTS: gl.constexpr = parts_of(STAGES, KEYS, REST)
    KEY_HEADS: gl.constexpr = heads_layout(KEYS, BD, PAIRS)
    QUERY_HEADS: gl.constexpr = heads_layout(M, BD, PAIRS)
    EIGHTHS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 8, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, EIGHTHS)

    i_batch, i_block, origin, steps = own_run(tiles, batches, blocks, long, short, shift, TILE, AXIS)
    # Where loads start: KV head, index on the axis of batch and t, and batch of the register tokens.
    kv_offset = i_block * PACK // group, i_batch * length[0], i_batch * reg_batch
    corner, _ = windows_of(origin, length, kernel, stride, CAUSAL)
    i_load = (corner[AXIS] - phase) // STEP
    ready = new_barriers(2, 1)
    queries = gl.allocate_shared_memory(q_desc.dtype, [1] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    keys = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + BOX, k_desc.layout)  # noqa: RUF005
    values = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + BOX, v_desc.layout)  # noqa: RUF005
    if not IN_RING:
        results = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    reg_keys = None
    reg_values = None
    mbarrier.expect(ready.index(0), (M + STAGES * KEYS + REGISTERS) * BD * 2)
    load_queries(q_desc, queries, kv_offset, origin, i_block * PACK, ready.index(0))
    for i in gl.static_range(STAGES):
        load_stage(
            k_desc, keys, kv_offset, corner, (i_load + i) * STEP + phase, (i_load + i) % STAGES, ready.index(0), AXIS
        )  # fmt: skip
    mbarrier.expect(ready.index(1), (STAGES * KEYS + REGISTERS) * BD * 2)
    for i in gl.static_range(STAGES):
        load_stage(
            v_desc, values, kv_offset, corner, (i_load + i) * STEP + phase, (i_load + i) % STAGES, ready.index(1), AXIS
        )  # fmt: skip
    if regk_desc is not None:
        reg_keys = start_registers(regk_desc, kv_offset, ready.index(0))
        reg_values = start_registers(regv_desc, kv_offset, ready.index(1))
    i_free, i_fresh = i_load % STAGES, i_load + (STAGES - 1)
    if PAIRS > 0:
        Positions += i_batch.to(gl.int64) * position_step
        Freqs += kv_offset[0] * freq_step
    k_index = token_index(KEYS, AXES, PAIRS)
    q_index = token_index(M, AXES, PAIRS)
    k_freqs = load_freqs(Freqs, KEYS, AXES, PAIRS)
    q_freqs = load_freqs(Freqs, M, AXES, PAIRS)
    k_position = stage_coordinates(Positions, k_index, corner, i_fresh * STEP + phase, length, BOX, AXIS, AXES)
    q_position = query_coordinates(Positions, q_index, origin, length, TILE, PACK, AXES)
    if WITH_QK_PREP:
        k_gain = head_gains(GainK, kv_offset[0], KEYS, 1, KEY_HEADS, NORM)
        q_gain = head_gains(GainQ, i_block * PACK, M, PACK, QUERY_HEADS, NORM)
        mbarrier.wait(ready.index(0), 0)
        for i in range(i_load, i_fresh):
            b_position = stage_coordinates(Positions, k_index, corner, i * STEP + phase, length, BOX, AXIS, AXES)
            stage = keys.index(i % STAGES).reshape([KEYS, BD])
            stage.store(
                prepare_heads(stage.load(KEY_HEADS), rotation_of(b_position, k_freqs, factor), k_gain, GainK, eps, NORM)
            )
    nonfinite = no_nonfinite_flags(M)  # NaN where a result of the run is not finite

    for i_step in range(steps):
        zero = opaque_i32(0)
        row = gl.arange(0, M, ROW) + zero
        position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
        row_lo, row_hi = windows_of(shifted(position, origin), length, kernel, stride, CAUSAL)
        row_sink = row_sinks(Sink, head, sink, SINK)
        if WITH_QK_PREP:
            k_rotation = rotation_of(k_position, k_freqs, factor)
            q_rotation = rotation_of(q_position, q_freqs, factor)
            mbarrier.wait(ready.index(0), i_step & 1)
            stage, own = keys.index(i_fresh % STAGES).reshape([KEYS, BD]), queries.index(zero).reshape([M, BD])
            # Both are read before either is written: threads wait for each other once, in between.
            b_k, b_q = stage.load(KEY_HEADS), own.load(QUERY_HEADS)
            stage.store(prepare_heads(b_k, k_rotation, k_gain, GainK, eps, NORM))
            own.store(prepare_heads(b_q, q_rotation, q_gain, GainQ, eps, NORM))
            fence_async_shared()
        low = shifted_along(corner, i_load * STEP + phase - corner[AXIS], AXIS)
        if WINDOW is None:
            masks = rolling_masks(low, row_lo, row_hi, PARTS, BOX, AXIS, M, RANK)
        elif is_inside(origin, length, TILE, WINDOW, CAUSAL):
            masks = rolling_masks(low, row_lo, row_hi, PARTS, BOX, AXIS, M, RANK, (TILE[2] - 1, WINDOW - 1))
        else:
            masks = rolling_masks(low, row_lo, row_hi, PARTS, BOX, AXIS, M, RANK)
        if regk_desc is not None:
            masks = masks + (register_mask(registers, 0, REGISTERS, M),)  # noqa: RUF005
        if IN_RING:  # noqa: SIM102 - the outer condition is known at compile time
            if i_step > 0:
                store_wait(0)  # results that this overwrites have been read
                mbarrier.expect(ready.index(1), KEYS * BD * 2)
                load_stage(v_desc, values, kv_offset, corner, i_fresh * STEP + phase, i_free, ready.index(1), AXIS)

        if not WITH_QK_PREP:
            mbarrier.wait(ready.index(0), i_step & 1)
        i_free = i_load % STAGES
        scores = scores_of(
            queries.index(zero).reshape([M, BD]), ring_parts(keys, i_free, reg_keys, PARTS, STAGES), masks
        )  # fmt: skip
        written = origin
        origin = shifted_along(origin, STEP, AXIS)
        ahead, _ = windows_of(origin, length, kernel, stride, CAUSAL)
        i_next = (ahead[AXIS] - phase) // STEP
        # At a border two tiles may need the same stages: then the first stage is loaded again.
        i_fresh = i_load + (i_next - i_load) * STAGES
        if i_step + 1 < steps:
            mbarrier.expect(ready.index(0), (M + KEYS) * BD * 2)
            load_queries(q_desc, queries, kv_offset, origin, i_block * PACK, ready.index(0))
            load_stage(k_desc, keys, kv_offset, corner, i_fresh * STEP + phase, i_free, ready.index(0), AXIS)
        i_load = i_next
        if PAIRS > 0:
            k_position = stage_coordinates(Positions, k_index, corner, i_fresh * STEP + phase, length, BOX, AXIS, AXES)
            q_position = query_coordinates(Positions, q_index + zero, origin, length, TILE, PACK, AXES)

        b_acc, row_m, row_l = weighted_sum(
            scores, ring_parts(values, i_free, reg_values, PARTS, STAGES), ready.index(1), i_step & 1, row_sink, scale,
            SINK, BD, EIGHTHS,
        )  # fmt: skip
        if not IN_RING:  # noqa: SIM102
            if i_step + 1 < steps:
                mbarrier.expect(ready.index(1), KEYS * BD * 2)
                load_stage(v_desc, values, kv_offset, corner, i_fresh * STEP + phase, i_free, ready.index(1), AXIS)
        # Always true; the branch stops ptxas from moving the epilogue above the last product, and from serializing all
        # products where registers are scarce.
        if length[2] > 0:
            nonfinite += nonfinite_flags(b_acc, row_l)
            if IN_RING:
                staged = values.index(i_free)._reinterpret(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
            else:
                staged = results
                store_wait(0)  # the last results have been read
            staged.reshape([M, BD]).store(divided(b_acc, row_l, q_desc.dtype))
            fence_async_shared()
            async_copy_shared_to_global(
                out_desc, [kv_offset[1] + written[0], written[1], written[2], i_block * PACK, 0], staged
            )
            if WITH_STATS:
                m_rows, o_row = output_rows(position, head, i_batch, written, length, blocks * PACK)
                gl.store(RowMax + o_row, row_m * LN2, mask=m_rows)
                gl.store(RowSum + o_row, row_l, mask=m_rows)
    store_wait(0)

    if not all_finite(nonfinite):
        await_writes()
        for i_step in range(steps):
            attend_rows(
                (Q, K, V, RegK, RegV, Sink, Out), (RowMax, RowSum),
                (q_strides, k_strides, v_strides, regk_strides, regv_strides), i_batch, i_block,
                shifted_along(origin, (i_step - steps) * STEP, AXIS),
                (length, kernel, stride, blocks * PACK), ((0, 0, 0), length, (1, 1, 1)), group, registers, sink,
                scale * LOG2E, GainQ, GainK, Positions, Freqs, factor, eps,
                CAUSAL, TILE, PACK, D, BD, SINK, WITH_STATS, NORM, AXES, PAIRS,
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
    runs = long[0] + -(-(tiles[axis] - prod(long)) // short)
    per_head = kind.pairs // kind.axes
    return call_of(
        small_forward_rolling_kernel,
        (runs * tile_rows,),
        (
            *p.input_strides(), lengths, kernel_size, stride, tiles, batches, long, short, config.shift, config.phase,
            p.group, blocks, p.registers, batches_of_registers(p),
            prod(lengths) * kind.axes if kind.batched else 0, per_head if kind.by_head else 0,
        ),
        [
            *boxes_of_rows(config, p),
            *(stage_boxes(x, config.box, axis) for x in (p.key, p.value)),
            *boxes_of_registers(config, p),
        ],
        STAGES=config.stages, REST=config.rest, REGISTERS=config.registers, IN_RING=config.in_ring,
        NORM=kind.norm, AXES=kind.axes, PAIRS=kind.pairs, **options_of(config, p, with_stats),
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
