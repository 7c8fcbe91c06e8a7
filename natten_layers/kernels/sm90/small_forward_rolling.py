"""The forward pass of small windows on compute capability 9.0, a strip of tiles at a time.

Windows of neighboring tiles overlap. A program computes the tiles of a strip one after the other, along one axis, and
keeps what they see in a ring of slabs, each as long as a tile: the next tile takes all slabs but one from the one
before. The slab that is new, and the next queries, are on their way while a tile is computed.
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

from ..host.problem import Inputs, Layout, Options, Problem, QKPrep, RotationKind
from ..host.tiling import Box, head_width
from ..portable.primitives import LN2, LOG2E, shifted, unravel, windows_of
from .primitives import (
    Boxes,
    axes_of,
    boxes_of,
    multiprocessors,
    new_barriers,
    output_rows,
    row_sinks,
    thread_barrier,
)
from .qk_prep import (
    head_gains,
    heads_layout,
    load_freqs,
    load_positions,
    rotation_of,
    token_index,
    turn_heads,
)
from .small_forward import (
    Call,
    attend,
    batches_of_registers,
    boxes_of_registers,
    boxes_of_rows,
    call_of,
    moved,
    options_of,
    start_registers,
)
from .small_nonfinite import attend_rows
from .small_softmax import (
    columns,
    divided,
    is_inside,
    is_zero,
    key_mask,
    no_rest,
    register_mask,
    scores_of,
    unfinite,
    weighted_sum,
)
from .small_tiling import StripLaunch, cut

AS_THEY_ARE = RotationKind("none", split=(0,), by_head=False, batched=False)


@gluon.jit
def own_strip(tiles, batches, blocks, long, short, shift, TILE: gl.constexpr, AXIS: gl.constexpr):
    """Batch, block of heads, first position, and number of tiles of a program's strip.

    ``long`` is how many strips along an axis are of how many tiles; those behind them, which start last, are of
    ``short``. Heads vary fastest, as in memory, then what is beside each other.
    """
    across = tiles[0] * tiles[1] * tiles[2] // tiles[AXIS]
    i_line, i_rest = gl.program_id(0) // blocks % across, gl.program_id(0) // blocks // across
    i_strip = i_rest // batches
    is_long = i_strip < long[0]
    first = gl.where(is_long, i_strip * long[1], long[0] * long[1] + (i_strip - long[0]) * short)
    steps = gl.minimum(gl.where(is_long, long[1], short), tiles[AXIS] - first)
    if AXIS == 0:
        t, h, w = first, i_line // tiles[2], i_line % tiles[2]
    elif AXIS == 1:
        t, h, w = i_line // tiles[2], first, i_line % tiles[2]
    else:
        t, h, w = i_line // tiles[1], i_line % tiles[1], first
    origin = moved((t * TILE[0], h * TILE[1], w * TILE[2]), -shift, AXIS)
    return i_rest % batches, gl.program_id(0) % blocks, origin, steps


@gluon.jit
def load_queries(desc, buffer, place, origin, head, ready):
    async_copy_global_to_shared(
        desc, [place[1] + origin[0], origin[1], origin[2], head, 0], ready, buffer.index(0)
    )  # fmt: skip


@gluon.jit
def load_slab(desc, ring, place, corner, first, i_slot, ready, AXIS: gl.constexpr):
    """Start to load the slab that begins at ``first``, on the axis of the strip, into a slot of the ring."""
    if AXIS == 0:
        at = [place[0], place[1] + first, corner[1], corner[2], 0]
    elif AXIS == 1:
        at = [place[0], first, place[1] + corner[0], corner[2], 0]
    else:
        at = [place[0], first, place[1] + corner[0], corner[1], 0]
    async_copy_global_to_shared(desc, at, ready, ring.index(i_slot))


@gluon.jit
def slab_positions(n, BOX: gl.constexpr, AXIS: gl.constexpr):
    """Keys ``n`` of a slab as ``t, h, w``."""
    along, first, second = unravel(n, BOX[2], BOX[3])
    if AXIS == 0:
        t, h, w = along, first, second
    elif AXIS == 1:
        t, h, w = first, along, second
    else:
        t, h, w = first, second, along
    return t, h, w


@gluon.constexpr_function
def parts_of(slots, keys, rest):
    """Slot, first key and number of keys of every part: slots of ``keys``, and of the last one what is needed."""
    return [(i, 0, keys) for i in range(slots - 1)] + [
        (slots - 1, sum(rest[:i]), count) for i, count in enumerate(rest)
    ]


@gluon.jit
def strip_masks(
    corner, row_lo, row_hi, PARTS: gl.constexpr, BOX: gl.constexpr, AXIS: gl.constexpr, M: gl.constexpr,
    RANK: gl.constexpr, SEEN: gl.constexpr = None,
):  # fmt: skip
    """Masks of all parts; ``SEEN`` as in ``key_mask``."""
    masks = ()
    for PART in gl.static_range(len(PARTS)):
        inner = slab_positions(columns(PARTS[PART][2], PARTS[PART][1]), BOX, AXIS)
        inner = moved(inner, PARTS[PART][0] * BOX[1], AXIS)
        masks = masks + (key_mask(inner, corner, row_lo, row_hi, M, RANK, SEEN),)  # noqa: RUF005
    return masks


@gluon.jit
def ring_parts(ring, i_slot, extra, PARTS: gl.constexpr, SLOTS: gl.constexpr):
    """Views ``[keys, D]`` of the parts, of which the first is in slot ``i_slot``, and of registers if there are."""
    KEYS: gl.constexpr = ring.shape[2] * ring.shape[3] * ring.shape[4]
    views = ()
    for PART in gl.static_range(len(PARTS)):
        view = ring.index((i_slot + PARTS[PART][0]) % SLOTS).reshape([KEYS, ring.shape[5]])
        if PARTS[PART][2] < KEYS:
            view = view.slice(PARTS[PART][1], PARTS[PART][2])
        views = views + (view,)  # noqa: RUF005
    if extra is not None:
        views = views + (extra,)  # noqa: RUF005
    return views


@gluon.jit
def slab_coordinates(Positions, n, corner, first, length, BOX: gl.constexpr, AXIS: gl.constexpr, AXES: gl.constexpr):
    """Coordinates of keys ``n`` of the slab that begins at ``first``; None where ``n`` is."""
    b_position = None
    if n is not None:
        token = shifted(moved(slab_positions(n, BOX, AXIS), first - corner[AXIS], AXIS), corner)
        b_position = load_positions(Positions, token, length, AXES)
    return b_position


@gluon.jit
def query_coordinates(Positions, row, origin, length, TILE: gl.constexpr, PACK: gl.constexpr, AXES: gl.constexpr):
    """The same of rows of a tile."""
    b_position = None
    if row is not None:
        token = shifted(unravel(row // PACK, TILE[1], TILE[2]), origin)
        b_position = load_positions(Positions, token, length, AXES)
    return b_position


@gluon.jit
def hidden_zero():
    """Zero, unknown to LLVM: what is worked out from it in a loop is not kept, and spilled, over its turns."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_writes():
    """Until what this program wrote is where the next write will find it; ``store_wait`` waits for reads only."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip
    thread_barrier()


@gluon.jit
def hopper_strip_kernel(
    Q, K, V, Out, RowMax, RowSum, RegK, RegV, Sink, GainQ, GainK, Positions, Freqs,
    q_desc, out_desc, k_desc, v_desc, regk_desc, regv_desc,
    q_strides, k_strides, v_strides, regk_strides, regv_strides,
    length, kernel, stride, tiles, batches, long, short, shift, phase, group, blocks, registers, reg_batch,
    position_step, freq_step, sink, scale, factor, eps,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, AXIS: gl.constexpr, SLOTS: gl.constexpr, REST: gl.constexpr,
    PACK: gl.constexpr, RANK: gl.constexpr, WINDOW: gl.constexpr, REGISTERS: gl.constexpr, D: gl.constexpr,
    BD: gl.constexpr, SINK: gl.constexpr, WITH_STATE: gl.constexpr, IN_RING: gl.constexpr, NORM: gl.constexpr,
    AXES: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Attention of the tiles of one strip; the grid is strips * batch * lines of tiles * blocks of heads.

    Slab ``i`` begins at ``i * TILE[AXIS] + phase`` of the axis, and lies in slot ``i % SLOTS``. A tile sees ``SLOTS``
    of them, of the last one ``REST`` keys, in parts. ``long`` and ``short`` are explained at ``own_strip``, ``shift``
    is how far the first tile begins before the image. ``IN_RING``: results are staged where the values were that no
    tile needs any more, which saves memory, but the next values wait for it. With ``NORM`` or ``PAIRS``, queries and
    keys are normalised and rotated where they have arrived; ``position_step`` and ``freq_step`` are from one image's
    positions, and from one head's frequencies, to the next, or 0. The other arguments are those of
    ``hopper_small_kernel``.
    """
    M: gl.constexpr = TILE[0] * TILE[1] * TILE[2] * PACK
    STEP: gl.constexpr = TILE[AXIS]
    BOX: gl.constexpr = k_desc.block_type.shape
    TURNS: gl.constexpr = NORM != "none" or PAIRS > 0
    KEYS: gl.constexpr = BOX[1] * BOX[2] * BOX[3]
    PARTS: gl.constexpr = parts_of(SLOTS, KEYS, REST)
    KEY_HEADS: gl.constexpr = heads_layout(KEYS, BD, PAIRS)
    QUERY_HEADS: gl.constexpr = heads_layout(M, BD, PAIRS)
    EIGHTHS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 8, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, EIGHTHS)

    i_batch, i_block, origin, steps = own_strip(tiles, batches, blocks, long, short, shift, TILE, AXIS)
    # Of what it loads: KV head, first place on the axis of batch and t, and batch of registers.
    place = i_block * PACK // group, i_batch * length[0], i_batch * reg_batch
    corner, _ = windows_of(origin, length, kernel, stride, CAUSAL)
    i_slab = (corner[AXIS] - phase) // STEP
    ready = new_barriers(2, 1)
    queries = gl.allocate_shared_memory(q_desc.dtype, [1] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    keys = gl.allocate_shared_memory(k_desc.dtype, [SLOTS] + BOX, k_desc.layout)  # noqa: RUF005
    values = gl.allocate_shared_memory(v_desc.dtype, [SLOTS] + BOX, v_desc.layout)  # noqa: RUF005
    if not IN_RING:
        results = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    reg_keys = None
    reg_values = None
    mbarrier.expect(ready.index(0), (M + SLOTS * KEYS + REGISTERS) * BD * 2)
    load_queries(q_desc, queries, place, origin, i_block * PACK, ready.index(0))
    for i in gl.static_range(SLOTS):
        load_slab(
            k_desc, keys, place, corner, (i_slab + i) * STEP + phase, (i_slab + i) % SLOTS, ready.index(0), AXIS
        )  # fmt: skip
    mbarrier.expect(ready.index(1), (SLOTS * KEYS + REGISTERS) * BD * 2)
    for i in gl.static_range(SLOTS):
        load_slab(
            v_desc, values, place, corner, (i_slab + i) * STEP + phase, (i_slab + i) % SLOTS, ready.index(1), AXIS
        )  # fmt: skip
    if regk_desc is not None:
        reg_keys = start_registers(regk_desc, place, ready.index(0))
        reg_values = start_registers(regv_desc, place, ready.index(1))
    i_free, i_fresh = i_slab % SLOTS, i_slab + (SLOTS - 1)
    if PAIRS > 0:
        Positions += i_batch.to(gl.int64) * position_step
        Freqs += place[0] * freq_step
    k_index = token_index(KEYS, AXES, PAIRS)
    q_index = token_index(M, AXES, PAIRS)
    k_freqs = load_freqs(Freqs, KEYS, AXES, PAIRS)
    q_freqs = load_freqs(Freqs, M, AXES, PAIRS)
    k_place = slab_coordinates(Positions, k_index, corner, i_fresh * STEP + phase, length, BOX, AXIS, AXES)
    q_place = query_coordinates(Positions, q_index, origin, length, TILE, PACK, AXES)
    if TURNS:
        k_gain = head_gains(GainK, place[0], KEYS, 1, KEY_HEADS, NORM)
        q_gain = head_gains(GainQ, i_block * PACK, M, PACK, QUERY_HEADS, NORM)
        mbarrier.wait(ready.index(0), 0)
        for i in range(i_slab, i_fresh):
            b_place = slab_coordinates(Positions, k_index, corner, i * STEP + phase, length, BOX, AXIS, AXES)
            slab = keys.index(i % SLOTS).reshape([KEYS, BD])
            slab.store(
                turn_heads(slab.load(KEY_HEADS), rotation_of(b_place, k_freqs, factor), k_gain, GainK, eps, NORM)
            )
    rest = no_rest(M)  # NaN where a result of the strip is not finite

    for i_step in range(steps):
        zero = hidden_zero()
        row = gl.arange(0, M, ROW) + zero
        position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
        row_lo, row_hi = windows_of(shifted(position, origin), length, kernel, stride, CAUSAL)
        row_sink = row_sinks(Sink, head, sink, SINK)
        if TURNS:
            k_turn = rotation_of(k_place, k_freqs, factor)
            q_turn = rotation_of(q_place, q_freqs, factor)
            mbarrier.wait(ready.index(0), i_step & 1)
            slab, own = keys.index(i_fresh % SLOTS).reshape([KEYS, BD]), queries.index(zero).reshape([M, BD])
            # Both are read before either is written, as threads wait for each other between.
            b_k, b_q = slab.load(KEY_HEADS), own.load(QUERY_HEADS)
            slab.store(turn_heads(b_k, k_turn, k_gain, GainK, eps, NORM))
            own.store(turn_heads(b_q, q_turn, q_gain, GainQ, eps, NORM))
            fence_async_shared()
        low = moved(corner, i_slab * STEP + phase - corner[AXIS], AXIS)
        if WINDOW is None:
            masks = strip_masks(low, row_lo, row_hi, PARTS, BOX, AXIS, M, RANK)
        elif is_inside(origin, length, TILE, WINDOW, CAUSAL):
            masks = strip_masks(low, row_lo, row_hi, PARTS, BOX, AXIS, M, RANK, (TILE[2] - 1, WINDOW - 1))
        else:
            masks = strip_masks(low, row_lo, row_hi, PARTS, BOX, AXIS, M, RANK)
        if regk_desc is not None:
            masks = masks + (register_mask(registers, 0, REGISTERS, M),)  # noqa: RUF005
        if IN_RING:  # noqa: SIM102 - the one is known when this is compiled
            if i_step > 0:
                store_wait(0)  # has read what this overwrites
                mbarrier.expect(ready.index(1), KEYS * BD * 2)
                load_slab(v_desc, values, place, corner, i_fresh * STEP + phase, i_free, ready.index(1), AXIS)

        if not TURNS:
            mbarrier.wait(ready.index(0), i_step & 1)
        i_free = i_slab % SLOTS
        scores = scores_of(
            queries.index(zero).reshape([M, BD]), ring_parts(keys, i_free, reg_keys, PARTS, SLOTS), masks
        )  # fmt: skip
        here = origin
        origin = moved(origin, STEP, AXIS)
        ahead, _ = windows_of(origin, length, kernel, stride, CAUSAL)
        i_next = (ahead[AXIS] - phase) // STEP
        # At a border two tiles may need the same slabs: then the first one is loaded again.
        i_fresh = i_slab + (i_next - i_slab) * SLOTS
        if i_step + 1 < steps:
            mbarrier.expect(ready.index(0), (M + KEYS) * BD * 2)
            load_queries(q_desc, queries, place, origin, i_block * PACK, ready.index(0))
            load_slab(k_desc, keys, place, corner, i_fresh * STEP + phase, i_free, ready.index(0), AXIS)
        i_slab = i_next
        if PAIRS > 0:
            k_place = slab_coordinates(Positions, k_index, corner, i_fresh * STEP + phase, length, BOX, AXIS, AXES)
            q_place = query_coordinates(Positions, q_index + zero, origin, length, TILE, PACK, AXES)

        b_acc, row_m, row_l = weighted_sum(
            scores, ring_parts(values, i_free, reg_values, PARTS, SLOTS), ready.index(1), i_step & 1, row_sink, scale,
            SINK, BD, EIGHTHS,
        )  # fmt: skip
        if not IN_RING:  # noqa: SIM102
            if i_step + 1 < steps:
                mbarrier.expect(ready.index(1), KEYS * BD * 2)
                load_slab(v_desc, values, place, corner, i_fresh * STEP + phase, i_free, ready.index(1), AXIS)
        # Always so, which ptxas does not know: it would start on this while the last product is under way, and where
        # registers are few, wait for every product instead.
        if length[2] > 0:
            rest += unfinite(b_acc, row_l)
            if IN_RING:
                staged = values.index(i_free)._reinterpret(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
            else:
                staged = results
                store_wait(0)  # has read the last ones
            staged.reshape([M, BD]).store(divided(b_acc, row_l, q_desc.dtype))
            fence_async_shared()
            async_copy_shared_to_global(out_desc, [place[1] + here[0], here[1], here[2], i_block * PACK, 0], staged)
            if WITH_STATE:
                m_rows, o_row = output_rows(position, head, i_batch, here, length, blocks * PACK)
                gl.store(RowMax + o_row, row_m * LN2, mask=m_rows)
                gl.store(RowSum + o_row, row_l, mask=m_rows)
    store_wait(0)

    if not is_zero(rest):
        await_writes()
        for i_step in range(steps):
            attend_rows(
                (Q, K, V, RegK, RegV, Sink, Out), (RowMax, RowSum),
                (q_strides, k_strides, v_strides, regk_strides, regv_strides), i_batch, i_block,
                moved(origin, (i_step - steps) * STEP, AXIS),
                (length, kernel, stride, blocks * PACK), group, registers, sink, scale * LOG2E,
                GainQ, GainK, Positions, Freqs, factor, eps,
                CAUSAL, TILE, PACK, D, BD, SINK, WITH_STATE, NORM, AXES, PAIRS,
            )  # fmt: skip


def forward(
    launch: StripLaunch, problem: Problem, inputs: Inputs, options: Options, with_state: bool,
    prep: QKPrep | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """What ``small_forward.forward`` computes, with ``prep`` of queries and keys that are prepared by it first."""
    kind, tensors, floats = AS_THEY_ARE, (None,) * 4, (None,) * 2
    if prep is not None:
        kind = prep.kind
        tensors = prep.query_gain, prep.key_gain, prep.positions, prep.freqs
        floats = None if prep.factor == 1.0 else prep.factor, prep.eps
    call = prepare(launch, problem, with_state, kind)
    return attend(call, 1, inputs, options, with_state, tensors, floats)


@lru_cache(maxsize=1024)
def prepare(launch: StripLaunch, p: Problem, with_state: bool, kind: RotationKind) -> Call:
    axis, blocks = launch.axis, p.query.shape[-2] // launch.pack
    lengths, kernel_size, stride, _ = p.geometry
    tiles = launch.tiles(p)
    batches, lines = p.query.shape[0], prod(tiles) // tiles[axis] * p.query.shape[0] * blocks
    long, short = cut(tiles[axis], lines, launch.programs * multiprocessors(p.device))
    strips = long[0] + -(-(tiles[axis] - prod(long)) // short)
    per_head = kind.pairs // kind.axes
    return call_of(
        hopper_strip_kernel,
        (strips * lines,),
        (
            *p.input_strides(), lengths, kernel_size, stride, tiles, batches, long, short, launch.shift, launch.phase,
            p.group, blocks, p.registers, batches_of_registers(p),
            prod(lengths) * kind.axes if kind.batched else 0, per_head if kind.by_head else 0,
        ),
        [
            *boxes_of_rows(launch, p),
            *(slab_boxes(x, launch.box, axis) for x in (p.key, p.value)),
            *boxes_of_registers(launch, p),
        ],
        SLOTS=launch.slots, REST=launch.rest, REGISTERS=launch.registers, IN_RING=launch.in_ring,
        NORM=kind.norm, AXES=kind.axes, PAIRS=kind.pairs, **options_of(launch, p, with_state),
    )  # fmt: skip


def slab_boxes(tensor: Layout, box: Box, axis: int) -> Boxes:
    """Boxes of positions of one head, the axis of the strip first: what is cut off a slab there is contiguous."""
    (*sizes, heads), (*steps, head) = axes_of(tensor)
    order = [axis, *(i for i in range(3) if i != axis)]
    dim = tensor.shape[-1]
    return boxes_of(
        [heads, *(sizes[i] for i in order), dim], [head, *(steps[i] for i in order), 1],
        [1, *(box[i] for i in order), head_width(dim)],
    )  # fmt: skip
