"""The forward pass of small windows on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/forward.py`` computes. A program computes one tile: TMA loads all that the tile sees at
once, so that hardly any address is computed (in packed images threads copy it: ``packed_images.py``). Several programs
share a multiprocessor, and some compute while others wait for their loads.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import commit_group
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    async_copy_shared_to_global,
    store_wait,
)

from ..host.problem import Inputs, Options, Problem, new_results
from ..portable.primitives import LOG2E
from ..portable.windows import shifted, unravel, windows_of
from .descriptors import Call, boxes_of_registers, call_of
from .masked_keys import (
    clear_rows,
    divisors,
    end_writes,
    hide_columns,
    image_mask,
    is_masked,
    load_box,
    new_flags,
    saved_maxima,
    store_flags,
)
from .packed_images import (
    await_copies,
    first_row,
    own_packed_tile,
    sample_view,
    start_keys,
    start_tile,
    store_tile,
)
from .primitives import class_rows, copy_layout, part_keys, row_sinks, shifted_along
from .rings import new_barriers
from .small_nonfinite import attend_rows
from .small_softmax import (
    WARPS,
    all_finite,
    box_columns,
    cut_windows,
    divided,
    is_inside,
    key_columns,
    key_mask,
    nonfinite_flags,
    register_mask,
    scores_of,
    weighted_sum,
)
from .small_tiles import (
    batches_of_registers,
    boxes_of_parts,
    boxes_of_rows,
    described,
    first_frame,
    grid_of,
    image_sizes,
    inside_frames,
    own_tile,
    present_descriptors,
    start_load,
    start_parts,
)
from .small_tiling import PARTS, PrepSpec, SmallTileConfig, forward_spec

NO_PREP: gl.constexpr = gl.constexpr(PrepSpec())


@gluon.constexpr_function
def part_start(boxes, part, axis):
    """Keys along the axis of parts that come before a part."""
    return sum(box[axis] for box in boxes[:part])


@gluon.jit
def part_columns(PART: gl.constexpr, BOXES: gl.constexpr, BY_AXIS: gl.constexpr):
    """Positions of the keys of a part in its box, in the layout of the columns of their scores."""
    BOX: gl.constexpr = BOXES[PART]
    return box_columns(BOX) if BY_AXIS else unravel(key_columns(part_keys(BOXES, PART)), BOX[1], BOX[2])


@gluon.jit
def part_masks(
    corner, row_lo, row_hi, BOXES: gl.constexpr, SPEC: gl.constexpr, BY_AXIS: gl.constexpr, SEEN: gl.constexpr = None
):  # fmt: skip
    """Masks of all parts; ``SEEN`` as in ``key_mask``, ``BY_AXIS`` as in ``part_columns``."""
    masks = ()
    for PART in gl.static_range(len(BOXES)):
        inner = part_columns(PART, BOXES, BY_AXIS)
        inner = shifted_along(inner, part_start(BOXES, PART, SPEC.axis), SPEC.axis)
        masks = masks + (key_mask(inner, corner, row_lo, row_hi, SPEC.rows, SPEC.rank, SEEN),)  # noqa: RUF005
    return masks


@gluon.jit
def tile_masks(
    corner, origin, length, row_lo, row_hi, reg_keys, registers, Begins, BOXES: gl.constexpr, SPEC: gl.constexpr,
    BY_AXIS: gl.constexpr,
):  # fmt: skip
    """Masks of all keys that a tile loads: of the parts of its window and, unless ``reg_keys`` is None, of the register
    tokens.
    """
    if SPEC.window is None:
        masks = part_masks(corner, row_lo, row_hi, BOXES, SPEC, BY_AXIS)
    elif is_inside(origin, length, Begins, SPEC):
        masks = part_masks(corner, row_lo, row_hi, BOXES, SPEC, BY_AXIS, (SPEC.tile[2] - 1, SPEC.window - 1))
    else:
        masks = part_masks(corner, row_lo, row_hi, BOXES, SPEC, BY_AXIS)
    if reg_keys is not None:
        masks = masks + (register_mask(registers, 0, reg_keys.shape[0], SPEC.rows),)  # noqa: RUF005
    return masks


@gluon.constexpr_function
def union_box(boxes, axis):
    """The box of all parts."""
    t, h, w = (sum(box[i] for box in boxes) if i == axis else boxes[0][i] for i in range(3))
    return t, h, w


@gluon.jit
def part_flags(flags, PART: gl.constexpr, AXIS: gl.constexpr, BOXES: gl.constexpr):
    """The flags of a part, from those of ``union_box``."""
    return flags.slice(part_start(BOXES, PART, AXIS), BOXES[PART][AXIS], AXIS)


@gluon.jit
def clear_masked(flags, buffers, AXIS: gl.constexpr, BOXES: gl.constexpr):
    """Write zeros over the masked keys or values of all parts."""
    for PART in gl.static_range(len(BOXES)):
        clear_rows(buffers[PART], part_flags(flags, PART, AXIS, BOXES))
    end_writes()


@gluon.jit
def hide_masked(flags, scores, values, AXIS: gl.constexpr, BOXES: gl.constexpr):
    """Scores of all parts with -inf for masked keys, whose values in shared memory become zeros.

    ``flags`` are those of ``union_box``.
    """
    hidden = ()
    for PART in gl.static_range(len(scores)):
        b_s = scores[PART]
        if len(BOXES) > PART:  # register tokens come behind
            b_s = hide_columns(b_s, part_flags(flags, PART, AXIS, BOXES), float("-inf"))
        hidden = hidden + (b_s,)  # noqa: RUF005
    clear_masked(flags, values, AXIS, BOXES)
    return hidden


@gluon.jit
def start_store(b_rows, buffer, desc, corner):
    """Start to store the rows of a tile that lie inside the image. They pass through the buffer of the queries."""
    buffer.reshape(b_rows.shape).store(b_rows)
    fence_async_shared()
    async_copy_shared_to_global(desc, corner, buffer)


@gluon.jit
def attend_packed_rows(
    tensors, states, strides, sample, i_batch, i_block, origin, plan, classes, group, registers, sink, factor,
    SPEC: gl.constexpr,
):  # fmt: skip
    """``attend_rows`` of a tile of a packed image."""
    Q, K, V, RegK, RegV, Sink, Out = tensors
    q_strides, k_strides, v_strides, regk_strides, regv_strides = strides
    Q, q_strides = sample_view(Q, q_strides, sample)
    K, k_strides = sample_view(K, k_strides, sample)
    V, v_strides = sample_view(V, v_strides, sample)
    first = first_row(sample, plan[3])
    Out += first * SPEC.head_dim
    if SPEC.with_stats:
        states = states[0] + first, states[1] + first
    if RegK is not None:
        RegK += sample[0].to(gl.int64) * regk_strides[0]
        RegV += sample[0].to(gl.int64) * regv_strides[0]
    residue, count, dilation = classes
    strides = q_strides, k_strides, v_strides, regk_strides, regv_strides
    attend_rows(
        (Q, K, V, RegK, RegV, Sink, Out, None, None, None), states, (strides, None), i_batch, i_block, origin, plan,
        (residue, count, dilation, None), group, registers, sink, factor, (None, None, None, None, None, None), SPEC,
        NO_PREP,
    )  # fmt: skip


@gluon.jit
def small_forward_kernel(
    Q, K, V, Out, RowMax, RowSum, RegK, RegV, Sink, Begins, Tiles, KeyMask,
    q_desc, out_desc, k0_desc, k1_desc, k2_desc, v0_desc, v1_desc, v2_desc, regk_desc, regv_desc,
    strides, mask_strides, axes, tiles, frames, group, blocks, registers, reg_batch, sink, scale,
    SPEC: gl.constexpr, BOXES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Attention of one tile; the grid is (tiles * blocks of heads, batch).

    ``axes`` is length, kernel size, stride and dilation of each axis. Keys come in up to three parts, ``BOXES`` along
    ``SPEC.axis``, ``KEYS`` keys with the register tokens. ``frames`` is explained at ``first_frame``. ``reg_batch`` is
    0 where all images share the register tokens, else 1. Only ``attend_rows`` reads the tensors themselves, with
    ``strides``; everything else goes through their descriptors. ``Begins`` is None except in packed texts
    (``cut_windows``), ``Tiles`` except in packed images, which have no descriptors (``packed_images.py``), and
    ``KeyMask`` and ``mask_strides`` without a mask.
    """
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    M: gl.constexpr = SPEC.rows
    TILE: gl.constexpr = SPEC.tile
    PACK: gl.constexpr = SPEC.pack
    BD: gl.constexpr = SPEC.columns
    SINK: gl.constexpr = SPEC.sink
    EIGHTHS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 8, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, EIGHTHS)
    ZERO: gl.constexpr = copy_layout(BD, gl.num_warps())

    i_batch, i_block, residue, count, origin = own_tile(length, dilation, tiles, blocks, TILE)
    sample = None
    if Tiles is not None:
        sample, kernel, origin = own_packed_tile(Tiles, blocks, TILE, SPEC.rank)
        _, _, length = sample
        count = length
    corner, _ = windows_of(origin, count, kernel, stride, CAUSAL)
    # Where loads start: KV head, index on the axis of batch and t, and batch of the register tokens.
    kv_offset = i_block * PACK // group, first_frame(i_batch, residue, length, frames), i_batch * reg_batch
    q_corner = [kv_offset[1] + origin[0], origin[1], origin[2], i_block * PACK, 0]
    if sample is None:
        k_descs = present_descriptors(k0_desc, k1_desc, k2_desc)
        v_descs = present_descriptors(v0_desc, v1_desc, v2_desc)
        corner = inside_frames(corner, count, k_descs, SPEC.axis)
        ready = new_barriers(2, 1)
        mbarrier.expect(ready.index(0), (M + KEYS) * BD * 2)
        mbarrier.expect(ready.index(1), KEYS * BD * 2)
        values_ready = ready.index(1)
        buffer = start_load(q_desc, q_corner, ready.index(0))
        keys = start_parts(k_descs, regk_desc, kv_offset, corner, ready.index(0), SPEC.axis)
        values = start_parts(v_descs, regv_desc, kv_offset, corner, values_ready, SPEC.axis)
    else:
        values_ready = None
        q_strides, k_strides, v_strides, regk_strides, regv_strides = strides
        buffer = start_tile(Q, q_strides, sample, i_block * PACK, origin, SPEC)
        keys = start_keys(K, RegK, k_strides, regk_strides, sample, kv_offset[0], corner, registers, SPEC, BOXES, KEYS)
        commit_group()
        values = start_keys(
            V, RegV, v_strides, regv_strides, sample, kv_offset[0], corner, registers, SPEC, BOXES, KEYS
        )
        commit_group()

    row = gl.arange(0, M, ROW)
    position, head = unravel(row // PACK, TILE[1], TILE[2]), i_block * PACK + row % PACK
    row_lo, row_hi = windows_of(shifted(position, origin), count, kernel, stride, CAUSAL)
    row_lo = cut_windows(row_lo, Begins, shifted(position, origin), length)
    row_sink = row_sinks(Sink, head, sink, SINK)

    reg_keys = None
    if RegK is not None:
        reg_keys = keys[len(BOXES)]
    HAS_MASK: gl.constexpr = KeyMask is not None
    masks = tile_masks(corner, origin, count, row_lo, row_hi, reg_keys, registers, Begins, BOXES, SPEC, HAS_MASK)
    mask = None
    if KeyMask is not None:
        mask = image_mask(KeyMask, mask_strides, i_batch, residue, count, dilation)
        UNION: gl.constexpr = union_box(BOXES, SPEC.axis)
        seen = load_box(mask, corner, UNION, SPEC.rank)
        masked, hidden = is_masked(seen)
        flags = new_flags(UNION)
        store_flags(flags, seen)
    b_q = buffer.reshape([M, BD])
    if sample is None:
        mbarrier.wait(ready.index(0), 0)
    else:
        await_copies(1)
    # Rows that see nothing have statistics, too, which are not worth the hardware registers of a second way to store.
    if mask is not None and regk_desc is None and SINK == "none" and not SPEC.with_stats:  # noqa: SIM102
        if hidden:
            mbarrier.wait(ready.index(1), 0)
            start_store(gl.zeros([M, BD], q_desc.dtype, ZERO), buffer, out_desc, q_corner)
            store_wait(0)
            return
    scores = scores_of(b_q, keys, masks)
    if mask is not None:  # noqa: SIM102 - the outer condition is known at compile time
        if masked:
            mbarrier.wait(ready.index(1), 0)
            scores = hide_masked(flags, scores, values, SPEC.axis, BOXES)
    b_acc, row_m, row_l = weighted_sum(scores, values, values_ready, 0, row_sink, scale, SINK, BD, EIGHTHS)
    row_weight = divisors(row_m, row_l, mask)
    if all_finite(nonfinite_flags(b_acc, row_weight)):
        if sample is None:
            start_store(divided(b_acc, row_weight, q_desc.dtype), buffer, out_desc, q_corner)
        else:
            b_out = divided(b_acc, row_weight, Out.dtype.element_ty)
            store_tile(b_q, b_out, Out, i_block, origin, sample, blocks * PACK, SPEC)
        if SPEC.with_stats:
            m_rows, o_row = class_rows(
                position, head, i_batch, origin, residue, count, dilation, length, blocks * PACK
            )  # fmt: skip
            if sample is not None:
                o_row += first_row(sample, blocks * PACK)
            gl.store(RowMax + o_row, saved_maxima(row_m, row_l, mask), mask=m_rows)
            gl.store(RowSum + o_row, row_l, mask=m_rows)
        if sample is None:
            store_wait(0)
    else:
        plan = length, kernel, stride, blocks * PACK
        if sample is None:
            attend_rows(
                (Q, K, V, RegK, RegV, Sink, Out, Begins, KeyMask, None), (RowMax, RowSum), (strides, mask_strides),
                i_batch, i_block, origin, plan, (residue, count, dilation, None), group, registers, sink, scale * LOG2E,
                (None, None, None, None, None, None), SPEC, NO_PREP,
            )  # fmt: skip
        else:
            attend_packed_rows(
                (Q, K, V, RegK, RegV, Sink, Out), (RowMax, RowSum), strides, sample, i_batch, i_block, origin, plan,
                (residue, count, dilation), group, registers, sink, scale * LOG2E, SPEC,
            )  # fmt: skip


def forward(
    config: SmallTileConfig, problem: Problem, inputs: Inputs, options: Options, with_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ``portable.forward.forward`` computes, for calls that ``dispatch`` sends here. Allocates its results."""
    call, begins = prepare(config, problem, with_stats), problem.sample_bounds()[0]
    tiles = problem.tile_table(config.tile) if problem.packs_images else None
    return attend(call, PARTS, inputs, options, with_stats, (begins, tiles, inputs.key_mask))


def attend(
    call: Call, parts: int, inputs: Inputs, options: Options, with_stats: bool,
    tensors: Sequence[Tensor | None] = (), floats: Sequence[float | None] = (),
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Call a kernel with descriptors of queries, results, ``parts`` times keys and values, and register tokens.

    ``tensors`` and ``floats`` are further arguments, behind those that all these kernels take.
    """
    query, key, value, reg_keys, reg_values, sink, *_ = inputs
    out, row_max, row_sum = new_results(query, query.shape[-1], with_stats)
    with_boxes = query, out, *(key,) * parts, *(value,) * parts, reg_keys, reg_values
    pointers = query, key, value, out, row_max, row_sum, reg_keys, reg_values, sink, *tensors
    call(pointers, with_boxes, (options.sink_value, options.scale, *floats))
    return out, row_max, row_sum


@lru_cache(maxsize=1024)
def prepare(config: SmallTileConfig, p: Problem, with_stats: bool) -> Call:
    blocks = p.query.shape[-2] // config.pack
    boxes = [
        *boxes_of_rows(config, p), *boxes_of_parts(config, p, p.key, p.value),
        *boxes_of_registers(p, config.registers),
    ]  # fmt: skip
    return call_of(
        small_forward_kernel,
        grid_of(config, p, blocks),
        (
            p.input_strides(), p.mask_strides, *image_sizes(config, p), p.group, blocks, p.registers,
            batches_of_registers(p),
        ),
        described(p, boxes),
        SPEC=forward_spec(config, p, with_stats), BOXES=config.parts, KEYS=config.keys,
        num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
