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

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    store_wait,
)

from ..host.problem import Inputs, Layout, Options, Problem
from ..host.qk_prep import QKPrep, QKPrepKind
from ..host.tiling import Box, head_width
from ..portable.primitives import LOG2E
from ..portable.windows import shifted, unravel, windows_of
from .descriptors import Boxes, Call, axes_of, boxes_of, boxes_of_registers, call_of, multiprocessors
from .primitives import opaque_i32, row_sinks, shifted_along
from .qk_prep import (
    head_gains,
    heads_layout,
)
from .small_forward import (
    attend,
)
from .small_nonfinite import attend_rows
from .small_rolling_steps import (
    Buffers,
    Preparation,
    RingSpec,
    Run,
    Runs,
    await_writes,
    load_first_tile,
    load_next,
    load_of,
    load_queries,
    load_rope,
    load_stage,
    load_start,
    new_buffers,
    next_tile,
    own_run,
    parts_of,
    prepare_stages,
    prepare_tile,
    query_coordinates,
    results_buffer,
    ring_parts,
    rolling_masks,
    stage_coordinates,
    store_tile,
)
from .small_softmax import (
    WARPS,
    all_finite,
    cut_windows,
    no_nonfinite_flags,
    nonfinite_flags,
    scores_of,
    weighted_sum,
)
from .small_tiles import (
    batches_of_registers,
    boxes_of_rows,
    start_registers,
)
from .small_tiling import PrepSpec, RollingTileConfig, cut, forward_spec

NO_QK_PREP = QKPrepKind("none", split=(0,), by_head=False, batched=False)


@gluon.jit
def attend_run(
    Sink, Begins, RowMax, RowSum, q_desc, out_desc, buffers, prep, k_position, q_position, run, origin, i_load,
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
        row_lo = cut_windows(row_lo, Begins, shifted(position, origin), length)
        row_sink = row_sinks(Sink, head, sink, SINK)
        if WITH_PREP:
            prepare_tile(prep, k_position, q_position, buffers, i_fresh % STAGES, zero, i_step & 1, SPEC, PREP)
        low = shifted_along(run.corner, load_start(i_load, runs, SPEC) - run.corner[AXIS], AXIS)
        masks = rolling_masks(low, origin, length, row_lo, row_hi, registers, Begins, PARTS, BOX, SPEC, RING.registers)
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
        origin, i_load, i_fresh = next_tile(origin, i_load, axes, runs, SPEC, STAGES)
        if i_step + 1 < run.steps:
            mbarrier.expect(keys.ready, (M + KEYS) * BD * 2)
            load_queries(q_desc, queries, run.kv_offset, origin, q_head, keys.ready)
            load_stage(keys, run.kv_offset, run.corner, load_start(i_fresh, runs, SPEC), i_free, AXIS)
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
            buffer = results_buffer(values, results, i_free, q_desc, IN_RING)
            store_tile(
                b_acc, row_m, row_l, buffer, out_desc, RowMax, RowSum, position, head, run, written, length, blocks,
                SPEC,
            )  # fmt: skip
    return nonfinite, origin


@gluon.jit
def small_forward_rolling_kernel(
    Q, K, V, Out, RowMax, RowSum, RegK, RegV, Sink, GainQ, GainK, Positions, Freqs, Begins,
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
        Sink, Begins, RowMax, RowSum, q_desc, out_desc, Buffers(queries, keys, values, reg_keys, reg_values, results),
        prep, k_position, q_position, Run(i_batch, i_block, kv_offset, corner, steps), origin, i_load,
        axes, runs, blocks, registers, sink, scale, SPEC, RING, PREP,
    )  # fmt: skip
    store_wait(0)
    if not all_finite(nonfinite):
        await_writes()
        for i_step in range(steps):
            attend_rows(
                (Q, K, V, RegK, RegV, Sink, Out, Begins, None, None), (RowMax, RowSum), (strides, None),
                i_batch, i_block,
                shifted_along(end, (i_step - steps) * SPEC.step, AXIS), (length, kernel, stride, blocks * PACK),
                ((0, 0, 0), length, (1, 1, 1), None), group, registers, sink, scale * LOG2E,
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
    return attend(call, 1, inputs, options, with_stats, (*tensors, problem.sample_bounds()[0]), floats)


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
            *boxes_of_registers(p, config.registers),
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
