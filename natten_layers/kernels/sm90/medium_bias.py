"""The gradient of a bias on relative positions on compute capability 9.0 (H100, H200), in Gluon.

It computes what ``portable/bias_gradient.py`` computes, in the same way: a program owns a chunk of keys that lies at
one place relative to every tile of queries, and adds up the gradients of the scores of a share of the tiles. What these
read comes by TMA into two stages, as chunks do in ``medium_backward.py``.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared

from ..host.launcher import Launcher
from ..host.problem import Inputs, Layout, Options, Problem, RowStatistics, layout
from ..portable.bias_gradient import new_matrices, slices_of, sum_launcher, surroundings, tiles_around
from ..portable.primitives import LOG2E
from ..portable.windows import bias_middle, bias_offset, bias_size, inside_axes, shifted, unravel, windows_of
from .descriptors import Call, call_of, frames_of, key_boxes
from .medium_parts import by_parts, bytes_of, columns_boxes, start_products
from .medium_tiling import MediumTileConfig, spec_of
from .primitives import class_rows, thread_barrier
from .products import first_column, new_sums
from .rings import new_barriers, new_stages, stage_of
from .small_softmax import WARPS
from .small_tiles import first_frame, present_descriptors
from .walk import hidden, row_sizes


@gluon.jit
def tile_number(i, counts):
    """Batch, and number on each axis, of the ``i``-th of so many tiles an axis."""
    t, h, w = i // (counts[2] * counts[1]) % counts[0], i // counts[2] % counts[1], i % counts[2]
    return i // (counts[2] * counts[1] * counts[0]), t, h, w


@gluon.jit
def next_tile(number, counts):
    """:func:`tile_number` of the tile that follows, without a division."""
    batch, t, h, w = number
    w += 1
    wraps = w == counts[2]
    w = gl.where(wraps, 0, w)
    h += wraps.to(gl.int32)
    wraps = h == counts[1]
    h = gl.where(wraps, 0, h)
    t += wraps.to(gl.int32)
    wraps = t == counts[0]
    return batch + wraps.to(gl.int32), gl.where(wraps, 0, t), h, w


@gluon.jit
def tile_at(number, first, dilation, TILE: gl.constexpr):
    """Batch of a tile, its residue class, and its origin; ``first`` is of ``tiles_around``.

    Dilation divides the lengths, and is 1 along ``t``.
    """
    batch, t, h, w = number
    h, w = first[1] + h, first[2] + w
    residue = 0, h % dilation[1], w % dilation[2]
    return batch, residue, ((first[0] + t) * TILE[0], h // dilation[1] * TILE[1], w // dilation[2] * TILE[2])


@gluon.jit
def first_seen(kernel, CAUSAL: gl.constexpr):
    """The first key that a query sees far from borders, as a distance from it, on one axis without stride."""
    first = 0 - kernel // 2
    if CAUSAL:
        first = 1 - kernel
    return first


@gluon.jit
def is_far(origin, first, kernel, count, TILE: gl.constexpr):
    """Whether no border moves or cuts a window of a tile, nor the tile itself, on one axis.

    ``first`` is :func:`first_seen`. A window ends with its query or behind it.
    """
    return (origin + first >= 0) & (origin + TILE - 1 + first + kernel - 1 < count)


@gluon.jit
def start_tile(
    n, tile, descs, rings, ready, near, i_head, i_kv, length, frames, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Start to load the ``n``-th tile of a program, and the chunk of keys that is ``near`` from it.

    ``descs`` and ``rings`` are those of queries and of the output's gradient, then those of keys and values.
    """
    i_batch, residue, origin = tile
    i_stage, _ = stage_of(n, STAGES)
    PARTS: gl.constexpr = len(COLUMNS)
    mbarrier.expect(ready.index(i_stage), bytes_of(2 * ROWS, COLUMNS))
    i_frame = first_frame(i_batch, residue, length, frames)
    for i in gl.static_range(len(descs)):
        head, corner = i_head, origin
        if i >= len(descs) // 2:
            head, corner = i_kv, shifted(near, origin)
        at = [head, i_frame + corner[0], corner[1], corner[2], first_column(COLUMNS, i % PARTS)]
        async_copy_global_to_shared(descs[i], at, ready.index(i_stage), rings[i].index(i_stage))


@gluon.jit
def tile_statistics(Lse, Delta, i_batch, residue, origin, position, i_head, heads, count, length, dilation):
    """Base-2 lse and delta of a tile's queries, zero outside of the image."""
    m_rows, o_row = class_rows(position, i_head, i_batch, origin, residue, count, dilation, length, heads)
    return gl.load(Lse + o_row, mask=m_rows, other=0.0), gl.load(Delta + o_row, mask=m_rows, other=0.0)


@gluon.jit
def rows_in(rings, i_stage):
    """The rows of a tile that lie in a stage, a box for each part of the columns."""
    buffers = ()
    for PART in gl.static_range(len(rings)):
        buffers = buffers + (rings[PART].index(i_stage),)  # noqa: RUF005
    return buffers


@gluon.jit
def biases_of_places(Rpb, position, near, inner, kernel, RANK: gl.constexpr):
    """Biases ``[M, N]`` of a head, in units of base-2 logits, of keys that start ``near`` from a tile's first query.

    They are zero at distances that no pair of a query and a key that it sees has.
    """
    row_lo = position[0] - kernel[0] + 1, position[1] - kernel[1] + 1, position[2] - kernel[2] + 1
    row_hi = position[0] + kernel[0] - 1, position[1] + kernel[1] - 1, position[2] + kernel[2] - 1
    m_entry = hidden(near, row_lo, row_sizes(row_lo, row_hi), inner, RANK) == 0.0
    o_entry = bias_offset(shifted(inner, near), kernel)[None, :] - bias_offset(position, kernel)[:, None]
    return gl.load(Rpb + bias_middle(kernel) + o_entry, mask=m_entry, other=0.0).to(gl.float32) * LOG2E


@gluon.jit
def hidden_far_from_borders(position, near, inner, first, kernel, RANK: gl.constexpr):
    """0 and -inf ``[M, N]``: which of these keys each query of a tile sees that :func:`is_far`."""
    row_lo = shifted(position, first)
    row_hi = row_lo[0] + kernel[0] - 1, row_lo[1] + kernel[1] - 1, row_lo[2] + kernel[2] - 1
    return hidden(near, row_lo, row_sizes(row_lo, row_hi), inner, RANK)


@gluon.jit
def hidden_of_tile(origin, count, position, near, inner, kernel, stride, CAUSAL: gl.constexpr, RANK: gl.constexpr):
    """0 and -inf ``[M, N]``: which keys of the chunk each query of a tile sees; none what is outside of the image."""
    index = shifted(position, origin)
    row_lo, row_hi = windows_of(index, count, kernel, stride, CAUSAL)
    size_t, size_h, size_w = row_sizes(row_lo, row_hi)
    row_size = size_t, size_h, gl.where(inside_axes(index, count), size_w, 0)
    return hidden(shifted(near, origin), row_lo, row_size, inner, RANK)


@gluon.jit
def are_all_finite(sums):
    """Whether all elements of all sums are finite, as a scalar."""
    other = 0
    for i in gl.static_range(len(sums)):
        other += gl.max(gl.max(gl.where(sums[i] - sums[i] == 0.0, 0, 1), 1), 0)
    return other == 0


@gluon.constexpr_function
def slices_of_chunk(keys, width):
    """Widths of the slices of a chunk."""
    return (width,) * (keys // width)


@gluon.jit
def keys_of_slice(I_SLICE: gl.constexpr, SLICE: gl.constexpr, CHUNK: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the keys of a slice lie in a chunk."""
    return unravel(I_SLICE * SLICE + gl.arange(0, SLICE, gl.SliceLayout(0, LAYOUT)), CHUNK[1], CHUNK[2])


@gluon.jit
def medium_bias_kernel(
    Delta, Lse, Rpb, Sums,
    q0_desc, q1_desc, q2_desc, do0_desc, do1_desc, do2_desc, k0_desc, k1_desc, k2_desc, v0_desc, v1_desc, v2_desc,
    axes, tiles, around, frames, batches, shares, group, heads, scale,
    SPEC: gl.constexpr, CHUNK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    SLICE: gl.constexpr,
):  # fmt: skip
    """Sums of the scores' gradients over one share of the tiles that see a chunk, for one head.

    The sums are ``[shares, heads, chunks, rows of a tile, keys of a chunk]`` in fp32, and ``around`` is
    ``Surroundings``. What a query does not see may be NaN, which its weight of zero does not hide. So where a sum is
    not finite, all of them are computed once more, without what is not seen.
    """
    length, kernel, stride, dilation = axes
    start, chunks, inner_lo, inner_hi = around
    CAUSAL: gl.constexpr = SPEC.causal
    M: gl.constexpr = SPEC.rows
    TILE: gl.constexpr = SPEC.tile
    RANK: gl.constexpr = SPEC.rank
    N: gl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    SLICES: gl.constexpr = slices_of_chunk(N, SLICE)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, SLICE, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    q_descs = present_descriptors(q0_desc, q1_desc, q2_desc)
    do_descs = present_descriptors(do0_desc, do1_desc, do2_desc)
    k_descs, v_descs = present_descriptors(k0_desc, k1_desc, k2_desc), present_descriptors(v0_desc, v1_desc, v2_desc)

    i_program = gl.program_id(0)
    places = chunks[0] * chunks[1] * chunks[2]
    i_place, i_head, i_share = i_program % places, i_program // places % heads, i_program // places // heads
    near = (
        start[0] + i_place // (chunks[2] * chunks[1]) * CHUNK[0],
        start[1] + i_place // chunks[2] % chunks[1] * CHUNK[1],
        start[2] + i_place % chunks[2] * CHUNK[2],
    )
    first_t, tiles_t = tiles_around(
        near[0], near[0] + CHUNK[0] - 1, inner_lo[0], inner_hi[0], length[0], kernel[0], dilation[0], tiles[0], TILE[0],
        CAUSAL[0], False,
    )  # fmt: skip
    first_h, tiles_h = tiles_around(
        near[1], near[1] + CHUNK[1] - 1, inner_lo[1], inner_hi[1], length[1], kernel[1], dilation[1], tiles[1], TILE[1],
        CAUSAL[1], False,
    )  # fmt: skip
    first_w, tiles_w = tiles_around(
        near[2], near[2] + CHUNK[2] - 1, inner_lo[2], inner_hi[2], length[2], kernel[2], dilation[2], tiles[2], TILE[2],
        CAUSAL[2], False,
    )  # fmt: skip
    total = batches * tiles_t * tiles_h * tiles_w
    most = (total + shares - 1) // shares
    begin = gl.minimum(i_share * most, total)
    own = gl.minimum(most, total - begin)
    # A program without tiles reads the statistics of some tile, which has to exist.
    first, last = (first_t, first_h, first_w), gl.maximum(total - 1, 0)
    counts = gl.maximum(tiles_t, 1), gl.maximum(tiles_h, 1), gl.maximum(tiles_w, 1)

    count = length[0], length[1] // dilation[1], length[2] // dilation[2]
    queries, grads = new_stages(q_descs, STAGES), new_stages(do_descs, STAGES)
    keys, values = new_stages(k_descs, STAGES), new_stages(v_descs, STAGES)
    descs, rings = q_descs + do_descs + k_descs + v_descs, queries + grads + keys + values
    ready = new_barriers(STAGES, 1)
    position = unravel(gl.arange(0, M, ROW), TILE[1], TILE[2])
    # Biases lie in shared memory, as sums and two products take most registers, and beside them what they are with -inf
    # where queries far from borders see no key. The layout spreads eight rows of an accumulator over all banks.
    BIASES: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    biases = gl.allocate_shared_memory(gl.float32, [N // SLICE, M, SLICE], BIASES)
    far_biases = gl.allocate_shared_memory(gl.float32, [N // SLICE, M, SLICE], BIASES)
    seen_from = (
        first_seen(kernel[0], CAUSAL[0]), first_seen(kernel[1], CAUSAL[1]), first_seen(kernel[2], CAUSAL[2])
    )  # fmt: skip
    for I_SLICE in gl.static_range(N // SLICE):
        inner = keys_of_slice(I_SLICE, SLICE, CHUNK, SCORES)
        b_bias = biases_of_places(Rpb + i_head * bias_size(kernel), position, near, inner, kernel, RANK)
        biases.index(I_SLICE).store(b_bias)
        b_hidden = hidden_far_from_borders(position, near, inner, seen_from, kernel, RANK)
        far_biases.index(I_SLICE).store(b_bias + b_hidden)
    strided = stride[0] * stride[1] * stride[2] > 1
    sums = new_sums(M, SLICES)
    loaded = 0  # tiles that an earlier attempt has loaded
    careful = False
    ended = False
    while not ended:
        ahead = tile_number(gl.minimum(begin, last), counts)
        number = ahead
        for n in gl.static_range(STAGES):
            if n < own:
                start_tile(
                    loaded + n, tile_at(ahead, first, dilation, TILE), descs, rings, ready, near, i_head,
                    i_head // group, length, frames, M + N, COLUMNS, STAGES,
                )  # fmt: skip
            ahead = next_tile(ahead, counts)
        i_batch, residue, origin = tile_at(number, first, dilation, TILE)
        statistics = tile_statistics(
            Lse, Delta, i_batch, residue, origin, position, i_head, heads, count, length, dilation
        )  # fmt: skip
        for n in range(own):
            i_stage, phase = stage_of(loaded + n, STAGES)
            row_lse, row_delta = statistics
            far = is_far(origin[0], seen_from[0], kernel[0], count[0], TILE[0])
            far = far & is_far(origin[1], seen_from[1], kernel[1], count[1], TILE[1])
            far = far & is_far(origin[2], seen_from[2], kernel[2], count[2], TILE[2])
            near_border = strided | careful | (far == 0)
            own_origin = origin
            if n + 1 < own:
                number = next_tile(number, counts)
            i_batch, residue, origin = tile_at(number, first, dilation, TILE)
            statistics = tile_statistics(
                Lse, Delta, i_batch, residue, origin, position, i_head, heads, count, length, dilation
            )  # fmt: skip
            mbarrier.wait(ready.index(i_stage), phase)
            added = ()
            for I_SLICE in gl.static_range(N // SLICE):
                inner = keys_of_slice(I_SLICE, SLICE, CHUNK, SCORES)
                b_s = start_products(rows_in(queries, i_stage), keys, i_stage, None, SLICE, I_SLICE * SLICE)
                b_dp = start_products(rows_in(grads, i_stage), values, i_stage, None, SLICE, I_SLICE * SLICE)
                if near_border:
                    b_hidden = hidden_of_tile(
                        own_origin, count, position, near, inner, kernel, stride, CAUSAL, RANK
                    )  # fmt: skip
                    b_hidden += biases.index(I_SLICE).load(SCORES)
                else:
                    b_hidden = far_biases.index(I_SLICE).load(SCORES)
                b_s, b_dp = warpgroup_mma_wait(0, deps=(b_s, b_dp))
                b_p = gl.exp2(b_s * (scale * LOG2E) + (b_hidden - row_lse[:, None]))
                b_ds = b_p * (b_dp - row_delta[:, None])
                if careful:  # computed again, as it would take registers until here
                    b_hidden = hidden_of_tile(
                        own_origin, count, position, near, inner, kernel, stride, CAUSAL, RANK
                    )  # fmt: skip
                    b_ds = gl.where(b_hidden == 0.0, b_ds, 0.0)
                added = added + (sums[I_SLICE] + b_ds,)  # noqa: RUF005
            sums = added
            thread_barrier()  # the stage has been read
            if n + STAGES < own:
                start_tile(
                    loaded + n + STAGES, tile_at(ahead, first, dilation, TILE), descs, rings, ready, near,
                    i_head, i_head // group, length, frames, M + N, COLUMNS, STAGES,
                )  # fmt: skip
            ahead = next_tile(ahead, counts)
        ended = are_all_finite(sums) | careful
        if not ended:
            careful = True
            loaded += own
            sums = new_sums(M, SLICES)

    row, column = gl.arange(0, M, ROW), gl.arange(0, SLICE, gl.SliceLayout(0, SCORES))
    p_rows = Sums + i_program.to(gl.int64) * (M * N) + row * N
    for I_SLICE in gl.static_range(N // SLICE):
        gl.store(p_rows[:, None] + (I_SLICE * SLICE + column)[None, :], sums[I_SLICE])


class BiasPlan(NamedTuple):
    """What all calls of a problem share."""

    call: Call
    launch_sum: Launcher

    @property
    def programs(self) -> int:
        return self.call.launch.grid[0]


PROGRAMS = 1584
"""Programs that fill a large GPU: twelve a multiprocessor. The number of shares follows from it and from shapes alone,
so that results do so, too."""


@lru_cache(maxsize=1024)
def prepare(config: MediumTileConfig, p: Problem, grad_out: Layout) -> BiasPlan:
    around = surroundings(p, config.tile, config.chunk)
    heads = p.query.shape[-2]
    owners = heads * prod(around.chunks)
    shares = slices_of(p, config.tile, owners, PROGRAMS)
    *_, dilation = p.geometry
    rows = [key_boxes(x, config.tile, dilation) for x in (p.query, grad_out)]
    seen = [key_boxes(x, config.chunk, dilation) for x in (p.key, p.value)]
    call = call_of(
        medium_bias_kernel,
        (owners * shares,),
        (
            p.geometry, p.tiles(config.tile), tuple(around), frames_of(p), p.query.shape[0], shares, p.group, heads,
        ),
        [part for boxes in (*rows, *seen) for part in columns_boxes(boxes, config.columns)],
        SPEC=spec_of(config, p), CHUNK=config.chunk, COLUMNS=config.columns, STAGES=config.stages, SLICE=config.slice,
        num_warps=WARPS, maxnreg=config.maxnreg,
    )  # fmt: skip
    return BiasPlan(call, sum_launcher(p, config.tile, config.chunk, around, shares))


def bias_gradient(
    config: MediumTileConfig, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor,
    statistics: RowStatistics,
) -> Tensor:  # fmt: skip
    """The gradient of the table, as ``portable.bias_gradient`` returns it. Allocates what that allocates."""
    rpb = inputs.rpb
    assert rpb is not None
    plan = prepare(config, problem, layout(grad_out))
    sums = new_matrices(config.tile, config.chunk, plan.programs, rpb.device)
    described = by_parts(inputs.query, grad_out, inputs.key, inputs.value)
    plan.call((statistics.delta, statistics.lse, rpb, sums), described, (options.scale,))
    grad = torch.empty_like(rpb)
    plan.launch_sum((sums, grad))
    return grad
