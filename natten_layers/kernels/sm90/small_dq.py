"""Gradients of queries for small windows on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/dq.py`` computes, with the methods of ``small_forward.py``: TMA loads at once all that a
tile sees. Scores are computed some at a time, because their gradients take as many registers again.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import commit_group
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    store_wait,
)

from ..host.problem import (
    Cotangents,
    Inputs,
    Layout,
    Options,
    Problem,
    RowStatistics,
    contiguous,
    layout,
    new_like,
    strides,
)
from ..portable.primitives import LOG2E
from ..portable.windows import (
    shifted,
    tokens_of,
    windows_of,
)
from .descriptors import Call, boxes_of_registers, call_of, query_boxes
from .masked_keys import (
    hide_columns,
    image_mask,
    is_masked,
    load_box,
    load_lse_or_zero,
    new_flags,
    range_of,
    store_flags,
)
from .packed_images import (
    await_copies,
    first_row,
    own_packed_tile,
    packed_strides,
    packed_tensors,
    sample_view,
    start_keys,
    start_tile,
    store_tile,
)
from .packed_repair import new_flag, repair_query
from .primitives import class_rows, copy_layout, flag_nonfinite, load_grad_lse, load_lse, part_rows, shifted_along
from .rings import new_barriers
from .small_forward import (
    clear_masked,
    part_flags,
    start_store,
    union_box,
)
from .small_softmax import WARPS, cut_windows, part_mask, register_mask
from .small_tiles import (
    batches_of_registers,
    boxes_of_parts,
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
from .small_tiling import PARTS, SmallTileConfig, spec_of


@gluon.jit
def add_gradient(
    b_dq, b_q, b_do, b_k, b_v, b_hidden, masked, flags, row_lse, row_delta, factor, OUT: gl.constexpr
):  # fmt: skip
    """Start to add the contribution of some keys to dQ; without those that ``flags`` hide if some key is ``masked``."""
    M: gl.constexpr = b_hidden.shape[0]
    N: gl.constexpr = b_hidden.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), b_hidden, is_async=True)
    b_zero = gl.zeros([M, N], gl.float32, LAYOUT)
    b_dp = warpgroup_mma(b_do, b_v.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
    b_p = gl.exp2(b_s * factor - gl.convert_layout(row_lse, ROW)[:, None])
    b_ds = b_p * (b_dp - gl.convert_layout(row_delta, ROW)[:, None])
    if flags is not None:  # noqa: SIM102 - the outer condition is known at compile time
        if masked:
            b_ds = hide_columns(b_ds, flags, 0.0)
    b_ds = gl.convert_layout(b_ds.to(b_q.dtype), gl.DotOperandLayout(0, OUT, 2))
    return warpgroup_mma(b_ds, b_k, b_dq, is_async=True)


@gluon.jit
def add_part(
    b_dq, b_q, b_do, b_k, b_v, corner, row_lo, row_hi, registers, masked, flags, row_lse, row_delta, factor,
    BOXES: gl.constexpr, PART: gl.constexpr, RANK: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Add the contribution of a part, 64 keys at a time; of the register tokens where ``PART`` is None.

    ``flags`` are those of the part, None without a key mask, and ``masked`` is whether they hide some key of the tile.
    """
    M: gl.constexpr = b_q.shape[0]
    ALL: gl.constexpr = b_k.shape[0]
    N: gl.constexpr = min(ALL, 64)
    for I_SLICE in gl.static_range(ALL // N):
        if PART is None:
            b_hidden = register_mask(registers, I_SLICE * N, N, M)
        else:
            b_hidden = part_mask(corner, row_lo, row_hi, BOXES, PART, I_SLICE * N, N, M, RANK, flags is not None)
        slice_flags = None
        if flags is not None:
            slice_flags = range_of(flags, I_SLICE * N, N)
        b_dq = add_gradient(
            b_dq, b_q, b_do, b_k.slice(I_SLICE * N, N), b_v.slice(I_SLICE * N, N), b_hidden, masked, slice_flags,
            row_lse, row_delta, factor, OUT,
        )  # fmt: skip
    return b_dq


@gluon.jit
def small_dq_kernel(
    Delta, Lse, RowMax, RowSum, Out, DLse, Begins, Nonfinite, KeyMask, Tiles, packed, q_desc, do_desc, dq_desc,
    k0_desc, k1_desc, k2_desc, v0_desc, v1_desc, v2_desc, regk_desc, regv_desc,
    strides, dl_strides, mask_strides, axes, tiles, frames, group, blocks, registers, reg_batch, scale,
    SPEC: gl.constexpr, BOXES: gl.constexpr, KEYS: gl.constexpr, WITH_DLSE: gl.constexpr,
):  # fmt: skip
    """dQ, ``delta = rowsum(dOut * Out) - dLse`` and base-2 lse of one tile; arguments as in ``small_forward.py``.

    In packed texts ``Nonfinite`` becomes 1 where a result is not finite. In packed images, ``packed`` are
    :class:`PackedTensors`, and ``strides`` those of the tensors that it begins with.
    """
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    TILE: gl.constexpr = SPEC.tile
    PACK: gl.constexpr = SPEC.pack
    AXIS: gl.constexpr = SPEC.axis
    D: gl.constexpr = SPEC.head_dim
    BD: gl.constexpr = SPEC.columns
    M: gl.constexpr = SPEC.rows
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    LOAD: gl.constexpr = copy_layout(BD, gl.num_warps())

    i_batch, i_block, residue, count, origin = own_tile(length, dilation, tiles, blocks, TILE)
    sample = None
    if Tiles is not None:
        sample, kernel, origin = own_packed_tile(Tiles, blocks, TILE, SPEC.rank)
        _, _, length = sample
        count = length
        first = first_row(sample, blocks * PACK)
        Delta, Lse, RowMax, RowSum, Out = Delta + first, Lse + first, RowMax + first, RowSum + first, Out + first * D
        if WITH_DLSE:
            DLse, dl_strides = sample_view(DLse, dl_strides, sample)
    corner, _ = windows_of(origin, count, kernel, stride, CAUSAL)
    kv_offset = i_block * PACK // group, first_frame(i_batch, residue, length, frames), i_batch * reg_batch
    q_corner = [kv_offset[1] + origin[0], origin[1], origin[2], i_block * PACK, 0]
    if sample is None:
        k_descs = present_descriptors(k0_desc, k1_desc, k2_desc)
        v_descs = present_descriptors(v0_desc, v1_desc, v2_desc)
        corner = inside_frames(corner, count, k_descs, AXIS)
        ready = new_barriers(2, 1)
        mbarrier.expect(ready.index(0), (M + KEYS) * BD * 2)
        mbarrier.expect(ready.index(1), (M + KEYS) * BD * 2)
        buffer = start_load(q_desc, q_corner, ready.index(0))
        keys = start_parts(k_descs, regk_desc, kv_offset, corner, ready.index(0), AXIS)
        b_do = start_load(do_desc, q_corner, ready.index(1)).reshape([M, BD])
        values = start_parts(v_descs, regv_desc, kv_offset, corner, ready.index(1), AXIS)
    else:
        q_strides, k_strides, v_strides, do_strides, regk_strides, regv_strides = strides
        buffer = start_tile(packed.query, q_strides, sample, i_block * PACK, origin, SPEC)
        keys = start_keys(
            packed.key, packed.additional_keys, k_strides, regk_strides, sample, kv_offset[0], corner, registers, SPEC,
            BOXES, KEYS,
        )  # fmt: skip
        b_do = start_tile(packed.grad_out, do_strides, sample, i_block * PACK, origin, SPEC)
        values = start_keys(
            packed.value, packed.additional_values, v_strides, regv_strides, sample, kv_offset[0], corner, registers,
            SPEC, BOXES, KEYS,
        )  # fmt: skip
        commit_group()

    out_position, out_head = part_rows(TILE, PACK, gl.SliceLayout(1, LOAD))
    m_out, o_out = class_rows(
        out_position, i_block * PACK + out_head, i_batch, origin, residue, count, dilation, length, blocks * PACK
    )  # fmt: skip
    col = gl.arange(0, BD, gl.SliceLayout(0, LOAD))[None, :]
    b_out = gl.load(Out + (o_out * D)[:, None] + col, mask=m_out[:, None] & (col < D), other=0.0)

    position, head = part_rows(TILE, PACK, ROW)
    head += i_block * PACK
    m_rows, o_row = class_rows(position, head, i_batch, origin, residue, count, dilation, length, blocks * PACK)
    row_lo, row_hi = windows_of(shifted(position, origin), count, kernel, stride, CAUSAL)
    row_lo = cut_windows(row_lo, Begins, shifted(position, origin), length)
    flags, masked = None, False
    if KeyMask is None:
        row_lse = load_lse(RowMax, RowSum, o_row, m_rows)
    else:
        row_lse, row_sees = load_lse_or_zero(RowMax, RowSum, o_row, m_rows)
        UNION: gl.constexpr = union_box(BOXES, AXIS)
        flags = new_flags(UNION)
        seen = load_box(image_mask(KeyMask, mask_strides, i_batch, residue, count, dilation), corner, UNION, SPEC.rank)
        masked, hidden = is_masked(seen)
        store_flags(flags, seen)
    gl.store(Lse + o_row, row_lse, mask=m_rows)

    if sample is None:
        mbarrier.wait(ready.index(0), 0)
        mbarrier.wait(ready.index(1), 0)
    else:
        await_copies(0)
    row_delta = gl.convert_layout(gl.sum(b_out.to(gl.float32) * b_do.load(LOAD).to(gl.float32), 1), ROW)
    if WITH_DLSE:
        token = tokens_of(shifted(position, origin), residue, count, dilation)
        row_delta -= load_grad_lse(DLse, dl_strides, i_batch, token, head, m_rows)
    if KeyMask is not None:
        row_delta = gl.where(row_sees, row_delta, 0.0)
        if masked:
            clear_masked(flags, keys, AXIS, BOXES)
    gl.store(Delta + o_row, row_delta, mask=m_rows)

    b_q = buffer.reshape([M, BD])
    factor = scale * LOG2E
    b_dq = gl.zeros([M, BD], gl.float32, OUT)
    if KeyMask is not None and regk_desc is None:  # noqa: SIM102 - known at compile time
        if hidden:
            start_store(b_dq.to(dq_desc.dtype), buffer, dq_desc, q_corner)
            store_wait(0)
            return
    for PART in gl.static_range(len(BOXES)):
        part = None
        if flags is not None:
            part = part_flags(flags, PART, AXIS, BOXES)
        b_dq = add_part(
            b_dq, b_q, b_do, keys[PART], values[PART], corner, row_lo, row_hi, registers, masked, part, row_lse,
            row_delta, factor, BOXES, PART, SPEC.rank, OUT,
        )  # fmt: skip
        corner = shifted_along(corner, BOXES[PART][AXIS], AXIS)
    if len(keys) > len(BOXES):
        I_REG: gl.constexpr = len(BOXES)
        b_dq = add_part(
            b_dq, b_q, b_do, keys[I_REG], values[I_REG], corner, row_lo, row_hi, registers, False, None, row_lse,
            row_delta, factor, BOXES, None, SPEC.rank, OUT,
        )  # fmt: skip
    b_dq = warpgroup_mma_wait(0, deps=[b_dq])
    if KeyMask is not None:  # noqa: SIM102
        if masked:
            b_dq = gl.where(row_sees[:, None], b_dq, 0.0)
    if Nonfinite is not None:
        flag_nonfinite(Nonfinite, (b_dq,), m_rows)
    if sample is None:
        start_store((b_dq * scale).to(q_desc.dtype), buffer, dq_desc, q_corner)
        store_wait(0)
    else:
        store_tile(b_q, b_dq * scale, packed.grad_query, i_block, origin, sample, blocks * PACK, SPEC)


def query_gradient(
    config: SmallTileConfig, problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, RowStatistics]:
    """dQ, delta and the base-2 lse, as ``portable.dq`` returns them. Allocates only these."""
    query, key, value, reg_keys, reg_values, *_ = inputs
    out, row_max, row_sum, grad_out, grad_lse = cotangents
    grad_query = new_like(query)
    delta, lse = torch.empty_like(row_max), torch.empty_like(row_max)
    call = query_call(config, problem, layout(grad_out), None if grad_lse is None else layout(grad_lse[..., None]))
    tensors = (query, grad_out, grad_query, *(key,) * PARTS, *(value,) * PARTS, reg_keys, reg_values)
    (begins, _), nonfinite = problem.sample_bounds(), new_flag(problem)
    packed = packed_tensors(config.tile, problem, inputs, grad_out, grad_query=grad_query)
    pointers = delta, lse, row_max, row_sum, out, grad_lse, begins, nonfinite, inputs.key_mask, *packed
    call(pointers, tensors, (options.scale,))
    statistics = RowStatistics(delta, lse)
    if nonfinite is not None:
        repair_query(problem, inputs, options, cotangents, grad_query, statistics, nonfinite)
    return grad_query, statistics


@lru_cache(maxsize=1024)
def query_call(config: SmallTileConfig, p: Problem, grad_out: Layout, grad_lse: Layout | None) -> Call:
    """What all calls of a problem share."""
    blocks = p.query.shape[-2] // config.pack
    *_, dilation = p.geometry
    rows = p.query, grad_out, contiguous(p.query.shape)
    boxes = [
        *(query_boxes(x, config.tile, config.pack, dilation) for x in rows),
        *boxes_of_parts(config, p, p.key, p.value), *boxes_of_registers(p, config.registers),
    ]  # fmt: skip
    return call_of(
        small_dq_kernel,
        grid_of(config, p, blocks),
        (
            packed_strides(p, grad_out), (0,) * 5 if grad_lse is None else strides(grad_lse), p.mask_strides,
            *image_sizes(config, p), p.group, blocks, p.registers, batches_of_registers(p),
        ),
        described(p, boxes),
        SPEC=spec_of(config, p), BOXES=config.parts, KEYS=config.keys, WITH_DLSE=grad_lse is not None,
        num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
