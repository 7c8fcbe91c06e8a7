"""Gradients of keys and values for small windows on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/dkv.py`` computes, with the methods of ``small_forward.py``: TMA loads at once all queries
that see a tile. Scores are computed some at a time, because their gradients take as many registers again.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from functools import lru_cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import commit_group
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    async_copy_global_to_shared,
    async_copy_shared_to_global,
    store_wait,
)

from ..host.problem import (
    Inputs,
    Layout,
    Options,
    Problem,
    RowStatistics,
    contiguous,
    layout,
    new_like,
)
from ..portable.primitives import LOG2E
from ..portable.windows import (
    contiguous_row,
    inside_axes,
    queries_of,
    shifted,
    union_of_queries,
    unravel,
)
from .descriptors import Call, call_of, key_boxes
from .masked_keys import (
    image_mask,
    is_masked,
    load_box,
    load_seen,
)
from .packed_images import (
    await_copies,
    copy_part,
    first_row,
    not_before,
    own_packed_tile,
    packed_strides,
    packed_tensors,
    rows_layout,
    shifted_key_tile,
    start_key_tile,
    store_tile,
)
from .packed_repair import new_flag, repair_key
from .primitives import copy_layout, opaque_i32, part_keys, shifted_along, spread, thread_barrier
from .rings import new_barriers
from .small_softmax import WARPS, part_mask
from .small_tiles import (
    boxes_of_parts,
    described,
    first_frame,
    grid_of,
    image_sizes,
    inside_frames,
    own_tile,
    present_descriptors,
    start_load,
)
from .small_tiling import PARTS, SmallTileConfig, spec_of
from .walk import load_of_token


@gluon.jit
def load_statistics(
    Stat, buffer, corner, i_batch, residue, count, dilation, head, length, heads, BOXES: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """Load a statistic ``[B, T, H, W, heads]`` of the queries of a part; 0 beyond the end of an axis."""
    BOX: gl.constexpr = BOXES[PART]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    index = shifted(unravel(gl.arange(0, BOX[0] * BOX[1] * BOX[2], LAYOUT), BOX[1], BOX[2]), corner)
    o_row = contiguous_row(i_batch.to(gl.int64), spread(index, residue, dilation), length)
    buffer.store(gl.load(Stat + o_row * heads + head, mask=inside_axes(index, count), other=0.0))


@gluon.jit
def add_queries(
    b_dk, b_dv, b_k, b_v, b_q, b_do, lse, delta, corner, row_lo, row_hi, factor, BOXES: gl.constexpr,
    PART: gl.constexpr, FIRST: gl.constexpr, N: gl.constexpr, RANK: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Start to add the contribution of some queries of a part to dK and dV."""
    M: gl.constexpr = b_k.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    b_hidden = part_mask(corner, row_lo, row_hi, BOXES, PART, FIRST, N, M, RANK)
    b_queries, b_grads = b_q.slice(FIRST, N), b_do.slice(FIRST, N)
    b_s = warpgroup_mma(b_k, b_queries.permute((1, 0)), b_hidden, is_async=True)
    b_zero = gl.zeros([M, N], gl.float32, LAYOUT)
    b_dp = warpgroup_mma(b_v, b_grads.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    col_lse, col_delta = lse.slice(FIRST, N).load(COLUMN), delta.slice(FIRST, N).load(COLUMN)
    b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
    b_p = gl.exp2(b_s * factor - col_lse[None, :])
    b_ds = b_p * (b_dp - col_delta[None, :])
    b_dv = warpgroup_mma(gl.convert_layout(b_p.to(b_q.dtype), gl.DotOperandLayout(0, OUT, 2)), b_grads, b_dv,
                         is_async=True)  # fmt: skip
    b_dk = warpgroup_mma(gl.convert_layout(b_ds.to(b_q.dtype), gl.DotOperandLayout(0, OUT, 2)), b_queries, b_dk,
                         is_async=True)  # fmt: skip
    return b_dk, b_dv


@gluon.jit
def add_query_part(
    b_dk, b_dv, b_k, b_v, b_q, b_do, lse, delta, corner, row_lo, row_hi, factor,
    BOXES: gl.constexpr, PART: gl.constexpr, RANK: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Add the contribution of a part, 32 queries at a time."""
    ALL: gl.constexpr = b_q.shape[0]
    N: gl.constexpr = min(ALL, 32)
    for I_SLICE in gl.static_range(ALL // N):
        b_dk, b_dv = add_queries(
            b_dk, b_dv, b_k, b_v, b_q, b_do, lse, delta, corner, row_lo, row_hi, factor, BOXES, PART, I_SLICE * N, N,
            RANK, OUT,
        )  # fmt: skip
    return b_dk, b_dv


@gluon.jit
def new_buffer(desc):
    return gl.allocate_shared_memory(desc.dtype, [1] + desc.block_type.shape, desc.layout)  # noqa: RUF005


@gluon.jit
def new_buffers(descs):
    buffers = ()
    for PART in gl.static_range(len(descs)):
        buffers = buffers + (new_buffer(descs[PART]),)  # noqa: RUF005
    return buffers


@gluon.jit
def new_part_rows(X, BOXES: gl.constexpr, BD: gl.constexpr):
    """The same for a packed image."""
    buffers = ()
    for PART in gl.static_range(len(BOXES)):
        rows = gl.allocate_shared_memory(X.dtype.element_ty, [1, part_keys(BOXES, PART), BD], rows_layout(BD))
        buffers = buffers + (rows,)  # noqa: RUF005
    return buffers


@gluon.jit
def new_statistics_buffer(ROWS: gl.constexpr):
    """Shared memory for a statistic of the queries of a part."""
    return gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def new_statistics_buffers(BOXES: gl.constexpr):
    buffers = ()
    for PART in gl.static_range(len(BOXES)):
        buffers = buffers + (new_statistics_buffer(part_keys(BOXES, PART)),)  # noqa: RUF005
    return buffers


@gluon.jit
def load_part(desc, buffer, i_head, i_bt, corner, ready):
    async_copy_global_to_shared(desc, [i_head, i_bt + corner[0], corner[1], corner[2], 0], ready, buffer)


@gluon.jit
def matrix_of(buffer, ROWS: gl.constexpr):
    return buffer.reshape([ROWS, buffer.shape[-1]])


@gluon.jit
def load_head(
    q_descs, do_descs, queries, grads, ready, corner, i_bt, head, AXIS: gl.constexpr, BOXES: gl.constexpr
):  # fmt: skip
    """Start to load all queries of a head that see the tile, and their gradients.

    The bytes have been announced at the barrier ``ready``.
    """
    for PART in gl.static_range(len(BOXES)):
        load_part(q_descs[PART], queries[PART].index(0), head, i_bt, corner, ready)
        load_part(do_descs[PART], grads[PART].index(0), head, i_bt, corner, ready)
        corner = shifted_along(corner, BOXES[PART][AXIS], AXIS)


@gluon.jit
def copy_head(
    Q, DOut, q_strides, do_strides, queries, grads, sample, corner, head, AXIS: gl.constexpr, BOXES: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """The same for a packed image, without TMA and barrier."""
    for PART in gl.static_range(len(BOXES)):
        copy_part(queries[PART].index(0), Q, q_strides, sample, head, corner, BOXES, PART, D)
        copy_part(grads[PART].index(0), DOut, do_strides, sample, head, corner, BOXES, PART, D)
        corner = shifted_along(corner, BOXES[PART][AXIS], AXIS)
    commit_group()


@gluon.jit
def load_head_statistics(
    lses, deltas, Lse, Delta, corner, i_batch, head, heads, classes, length, AXIS: gl.constexpr, BOXES: gl.constexpr
):  # fmt: skip
    """Load the statistics of all queries of a head that see the tile. ``classes`` is as in ``attend_rows``."""
    residue, count, dilation = classes
    for PART in gl.static_range(len(BOXES)):
        load_statistics(Lse, lses[PART], corner, i_batch, residue, count, dilation, head, length, heads, BOXES, PART)
        load_statistics(
            Delta, deltas[PART], corner, i_batch, residue, count, dilation, head, length, heads, BOXES, PART
        )
        corner = shifted_along(corner, BOXES[PART][AXIS], AXIS)


@gluon.jit
def opaque_position(position):
    return opaque_i32(position[0]), opaque_i32(position[1]), opaque_i32(position[2])


@gluon.jit
def store_gradients(b_dk, b_dv, b_k, b_v, dk_desc, dv_desc, k_buffer, v_buffer, k_corner):
    """Start to store dK and dV, which pass through the buffers of keys and values, ``b_k`` and ``b_v`` as matrices."""
    b_k.store(b_dk.to(dk_desc.dtype))
    b_v.store(b_dv.to(dk_desc.dtype))
    # One thread starts both copies, and every thread has to make its writes visible to them first: the barrier that
    # the compiler sets between the two stores is not enough.
    fence_async_shared()
    thread_barrier()
    async_copy_shared_to_global(dk_desc, k_corner, k_buffer)
    async_copy_shared_to_global(dv_desc, k_corner, v_buffer)


@gluon.jit
def small_dkv_kernel(
    Delta, Lse, Ends, Nonfinite, KeyMask, Tiles, packed, k_desc, v_desc, dk_desc, dv_desc,
    q0_desc, q1_desc, q2_desc, do0_desc, do1_desc, do2_desc,
    strides, mask_strides, axes, tiles, frames, group, kv_heads, scale,
    SPEC: gl.constexpr, BOXES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys; the grid is (tiles * KV heads, batch).

    The queries of one head come in up to three parts, ``BOXES`` along ``SPEC.axis``, ``QUERIES`` in all, then those of
    the next head. In packed texts ``Ends`` is the last token of the sample of each token, and ``Nonfinite`` becomes 1
    where a result is not finite. ``KeyMask`` and ``mask_strides`` are None without a mask. ``packed`` and ``strides``
    are as in :func:`small_dq_kernel`.
    """
    length, kernel, stride, dilation = axes
    CAUSAL: gl.constexpr = SPEC.causal
    TILE: gl.constexpr = SPEC.tile
    AXIS: gl.constexpr = SPEC.axis
    BD: gl.constexpr = SPEC.columns
    M: gl.constexpr = SPEC.rows
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BD, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)

    i_batch, i_kv, residue, count, origin = own_tile(length, dilation, tiles, kv_heads, TILE)
    sample = None
    if Tiles is not None:
        sample, kernel, origin = own_packed_tile(Tiles, kv_heads, TILE, SPEC.rank)
        _, _, length = sample
        count = length
        origin = shifted_key_tile(origin, sample, kernel, TILE, SPEC.rank)
        first_query = first_row(sample, kv_heads * group)
        Delta, Lse = Delta + first_query, Lse + first_query
    first, _, _, _ = union_of_queries(origin, count, kernel, stride, CAUSAL, TILE)
    if sample is None:
        q_descs = present_descriptors(q0_desc, q1_desc, q2_desc)
        do_descs = present_descriptors(do0_desc, do1_desc, do2_desc)
        first = inside_frames(first, count, q_descs, AXIS)
        i_bt = first_frame(i_batch, residue, length, frames)
        ready = new_barriers(2, 1)
        mbarrier.expect(ready.index(0), 2 * M * BD * 2)
        k_corner = [i_kv, i_bt + origin[0], origin[1], origin[2], 0]
        k_buffer, v_buffer = start_load(k_desc, k_corner, ready.index(0)), start_load(v_desc, k_corner, ready.index(0))
        queries, grads = new_buffers(q_descs), new_buffers(do_descs)
    else:
        first = not_before(first)
        q_strides, k_strides, v_strides, do_strides, _, _ = strides
        k_buffer = start_key_tile(packed.key, k_strides, sample, i_kv, origin, SPEC)
        v_buffer = start_key_tile(packed.value, v_strides, sample, i_kv, origin, SPEC)
        queries, grads = new_part_rows(packed.query, BOXES, BD), new_part_rows(packed.grad_out, BOXES, BD)
    lses, deltas = new_statistics_buffers(BOXES), new_statistics_buffers(BOXES)
    b_k, b_v = k_buffer.reshape([M, BD]), v_buffer.reshape([M, BD])

    row = gl.arange(0, M, ROW)
    key = shifted(unravel(row, TILE[1], TILE[2]), origin)
    row_lo, row_hi = queries_of(key, count, kernel, stride, CAUSAL)
    if Ends is not None:
        row_hi = row_hi[0], row_hi[1], gl.minimum(row_hi[2], load_of_token(Ends, key[2], length))
    if KeyMask is not None:
        mask = image_mask(KeyMask, mask_strides, i_batch, residue, count, dilation)
        masked, hidden = is_masked(load_box(mask, origin, TILE, SPEC.rank))
    factor = scale * LOG2E
    b_dk, b_dv = gl.zeros([M, BD], gl.float32, OUT), gl.zeros([M, BD], gl.float32, OUT)
    if sample is None:
        mbarrier.wait(ready.index(0), 0)
    if KeyMask is not None:  # noqa: SIM102 - the outer condition is known at compile time
        if hidden:
            store_gradients(b_dk, b_dv, b_k, b_v, dk_desc, dv_desc, k_buffer, v_buffer, k_corner)
            store_wait(0)
            return
    for i_group in range(group):
        zero = opaque_i32(i_group) - i_group
        head = i_kv * group + i_group
        thread_barrier()  # the queries of the previous head have been read
        if sample is None:
            mbarrier.expect(ready.index(1), 2 * QUERIES * BD * 2)
            load_head(q_descs, do_descs, queries, grads, ready.index(1), first, i_bt, head, AXIS, BOXES)
        else:
            copy_head(
                packed.query, packed.grad_out, q_strides, do_strides, queries, grads, sample, opaque_position(first),
                head, AXIS, BOXES, SPEC.head_dim,
            )  # fmt: skip
        load_head_statistics(
            lses, deltas, Lse, Delta, first, i_batch, head, kv_heads * group, (residue, count, dilation), length, AXIS,
            BOXES,
        )  # fmt: skip
        if sample is None:
            mbarrier.wait(ready.index(1), i_group & 1)
        else:
            await_copies(0)
        corner = first
        lo, hi = opaque_position(row_lo), opaque_position(row_hi)
        for PART in gl.static_range(len(BOXES)):
            b_q = matrix_of(queries[PART].index(zero), part_keys(BOXES, PART))
            b_do = matrix_of(grads[PART].index(zero), part_keys(BOXES, PART))
            b_dk, b_dv = add_query_part(
                b_dk, b_dv, b_k, b_v, b_q, b_do, lses[PART], deltas[PART], corner, lo, hi, factor, BOXES,
                PART, SPEC.rank, OUT,
            )  # fmt: skip
            corner = shifted_along(corner, BOXES[PART][AXIS], AXIS)
        b_dk, b_dv = warpgroup_mma_wait(0, deps=(b_dk, b_dv))

    if KeyMask is not None:  # noqa: SIM102 - the outer condition is known at compile time
        if masked:  # zeros whatever NaN there is in masked keys, in queries and in the gradient of the output
            key = shifted(unravel(row, TILE[1], TILE[2]), opaque_position(origin))
            row_seen = load_seen(mask, key, SPEC.rank)
            b_dk, b_dv = gl.where(row_seen[:, None], b_dk, 0.0), gl.where(row_seen[:, None], b_dv, 0.0)
    if sample is None:
        store_gradients(b_dk * scale, b_dv, b_k, b_v, dk_desc, dv_desc, k_buffer, v_buffer, k_corner)
    else:
        store_tile(b_k, b_dk * scale, packed.grad_key, i_kv, origin, sample, kv_heads, SPEC)
        store_tile(b_v, b_dv, packed.grad_value, i_kv, origin, sample, kv_heads, SPEC)
    if Nonfinite is not None:
        LOAD: gl.constexpr = copy_layout(BD, gl.num_warps())
        row_rest = gl.sum(b_k.load(LOAD).to(gl.float32) * 0.0 + b_v.load(LOAD).to(gl.float32) * 0.0, 1)
        flag = gl.full([M], 0, gl.int32, row_rest.type.layout)
        gl.store(Nonfinite + flag, 1, mask=~(gl.abs(row_rest) >= 0.0))
    if sample is None:
        store_wait(0)


def key_gradients(
    config: SmallTileConfig,
    problem: Problem,
    inputs: Inputs,
    options: Options,
    grad_out: Tensor,
    statistics: RowStatistics,
) -> tuple[Tensor, Tensor]:
    """dK and dV of the window keys, as ``portable.dkv`` returns them; gradients of register tokens are computed
    elsewhere. Allocates only these.
    """
    query, key, value, *_ = inputs
    grad_key, grad_value = new_like(key), new_like(value)
    call = key_call(config, problem, layout(grad_out))
    tensors = (key, value, grad_key, grad_value, *(query,) * PARTS, *(grad_out,) * PARTS)
    delta, lse, _ = statistics
    (_, ends), nonfinite = problem.sample_bounds(), new_flag(problem)
    packed = packed_tensors(config.tile, problem, inputs, grad_out, grad_key=grad_key, grad_value=grad_value)
    call((delta, lse, ends, nonfinite, inputs.key_mask, *packed), tensors, (options.scale,))
    if nonfinite is not None:
        repair_key(problem, inputs, options, grad_out, statistics, (grad_key, grad_value), nonfinite)
    return grad_key, grad_value


@lru_cache(maxsize=1024)
def key_call(config: SmallTileConfig, p: Problem, grad_out: Layout) -> Call:
    *_, dilation = p.geometry
    out = contiguous(p.key.shape)
    tile = [key_boxes(x, config.tile, dilation) for x in (p.key, p.value, out, out)]
    spec = spec_of(config, p)
    if not p.packs_images:
        # The kernel does not use the head dim: all that are padded to the same columns share one compiled kernel.
        spec = spec._replace(head_dim=spec.columns)
    return call_of(
        small_dkv_kernel,
        grid_of(config, p, p.kv_heads),
        (packed_strides(p, grad_out), p.mask_strides, *image_sizes(config, p), p.group, p.kv_heads),
        described(p, [*tile, *boxes_of_parts(config, p, p.query, grad_out)]),
        SPEC=spec, BOXES=config.parts, QUERIES=config.keys, num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
