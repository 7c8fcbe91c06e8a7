"""The gradient of a bias on relative positions, in a fixed order and without atomics.

An entry's gradient is the sum of the scores' gradients over all pairs at its distance. A pair's distance follows from
where its query lies in a tile and where its key lies relative to the tile's first query; for both, all tiles are alike.
So a program owns one chunk of keys, which lies at the same place relative to every tile, and walks over a slice of the
tiles that see some of it. It adds up the scores' gradients as they are, a matrix of a tile's queries and a chunk's
keys. A second kernel adds up what belongs to an entry: an element of each row of the matrices, of all slices.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false

from functools import partial
from math import ceil, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import window_bounds
from ..host.launcher import Launcher, launcher
from ..host.problem import (
    Inputs,
    Layout,
    Options,
    Problem,
    RowStatistics,
    in_units,
    need_wide_offsets,
    stride_unit,
    strides,
)
from ..host.tiling import Box, ProblemClass, Room, Size, best_boxes, next_power_of_2, room, spans
from .parameters import Axes, Chunk, QueryTile, Spec, Strides, View, head_fields
from .primitives import LOG2E, load_chunk, load_queries, load_unmasked, products, token_view
from .windows import (
    bias_middle,
    bias_offset,
    bias_size,
    contiguous_row,
    inner_indices,
    inner_offsets,
    inside_axes,
    inside_box,
    of_head,
    shifted,
    tile_on_axes,
    tokens_of,
    unravel,
    visibility,
    walk_over_windows,
)


class BiasGradientTensors(NamedTuple):
    """What the kernel reads and writes. All but the first four are contiguous."""

    query: Any
    key: Any
    value: Any
    grad_out: Any
    delta: Any
    lse: Any
    rpb: Any
    sums: Any
    """``[slices, heads, chunks, rows of a tile, keys of a chunk]`` in fp32"""
    key_mask: Any


class Surroundings(NamedTuple):
    """The keys that tiles of queries see, as distances from a tile's first query: in each field a number per axis."""

    start: Any
    """the first key of the first chunk"""
    chunks: Any
    """number of chunks"""
    inner_lo: Any
    """the first key that tiles see which are not at a border"""
    inner_hi: Any
    """the last one"""


@triton.jit
def tiles_around(
    near, far, inner_lo, inner_hi, length, kernel, dilation, tiles, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    PERIODIC: tl.constexpr,
):  # fmt: skip
    """First tile and number of tiles of an axis among which are all that see some key from ``near`` to ``far``.

    The keys are given by distances from a tile's first query. Keys outside of an axis are seen by no tile, and those
    outside of ``inner_lo .. inner_hi`` only where the border moves a window: by tiles near the end, which see the last
    ``kernel`` keys, or near the beginning, which see the first.
    """
    count = (length + dilation - 1) // dilation
    first, last = 0, count - 1
    if not PERIODIC:
        first, last = tl.maximum(-far, 0), count - 1 - near
        if not CAUSAL:
            first = tl.where(far < inner_lo, tl.maximum(length // dilation - kernel - far, first), first)
            last = tl.where(near > inner_hi, tl.minimum(kernel - 1 - near, last), last)
    i_first = first // TILE * dilation
    i_end = tl.minimum((tl.maximum(last, -1) + TILE) // TILE * dilation, tiles)
    return i_first, tl.maximum(i_end - i_first, 0)


@triton.jit
def inside_corners(inner, corner, box, RANK: tl.constexpr):
    """:func:`inside_box` with both ends of a box, for a chunk that may begin before it."""
    m = (inner[2] >= box.lo[2] - corner[2]) & inside_box(inner, corner, box.hi, RANK)
    if RANK > 1:
        m = m & (inner[1] >= box.lo[1] - corner[1])
    if RANK > 2:
        m = m & (inner[0] >= box.lo[0] - corner[0])
    return m


@triton.jit
def score_gradients(
    i_batch, i, near, inner, b_bias, views, statistics, key_mask, axes, i_head, group, heads, scale, SPEC: tl.constexpr
):  # fmt: skip
    """Gradients ``[M, N]`` of the scores of tile ``i`` and a chunk of keys that starts ``near`` from its first query.

    ``i`` has the tile's number on each axis, and ``near`` a distance.
    """
    TILE: tl.constexpr = SPEC.tile
    RANK: tl.constexpr = SPEC.rank
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    PRECISION: tl.constexpr = SPEC.precision
    query, grad_out, key, value = views
    residue, count, origin = tile_on_axes(i, axes.length, axes.dilation, TILE)
    index = shifted(inner_indices(TILE), origin)
    m_rows = inside_axes(index, count)
    tile = QueryTile(i_batch, i_head // group, i_head, m_rows, residue, count, origin, index)
    walk = walk_over_windows(tile, axes, None, SPEC)
    chunk = Chunk(shifted(near, origin), inner)
    m_keys = inside_corners(inner, chunk.corner, walk.union, RANK)
    keys, values = of_head(key, i_batch, tile.i_kv), of_head(value, i_batch, tile.i_kv)
    b_k = load_chunk(
        keys, inner_offsets(inner, axes.dilation, keys.strides, SPEC), m_keys, chunk, walk.ring, SPEC, SPEC.head_dim, BD
    )
    b_v = load_chunk(
        values, inner_offsets(inner, axes.dilation, values.strides, SPEC), m_keys, chunk, walk.ring, SPEC,
        SPEC.value_dim, BDV,
    )  # fmt: skip
    token = tokens_of(index, residue, count, axes.dilation)
    b_q = load_queries(query, tile, token, SPEC.head_dim, BD)
    b_do = load_queries(grad_out, tile, token, SPEC.value_dim, BDV)
    o_row = contiguous_row(i_batch, token, axes.length) * heads + i_head
    row_delta = tl.load(statistics[0] + o_row, mask=m_rows, other=0.0)
    row_lse = tl.load(statistics[1] + o_row, mask=m_rows, other=0.0)
    row_lo, row_hi = walk.boxes
    row_hi = (row_hi[0], row_hi[1], tl.where(m_rows, row_hi[2], row_lo[2] - 1))
    b_visible = visibility(row_lo, row_hi, chunk.corner, inner, RANK)
    if key_mask is not None:
        seen = of_head(key_mask, i_batch, 0)
        o_mask = inner_offsets(inner, axes.dilation, seen.strides, SPEC)
        b_visible = b_visible & load_unmasked(seen, o_mask, m_keys, chunk, walk.ring, SPEC)[None, :]
    b_s = products(b_q, b_k, None, PRECISION) * (scale * LOG2E) + b_bias
    b_ds = tl.exp2(b_s - row_lse[:, None]) * (products(b_do, b_v, None, PRECISION) - row_delta[:, None])
    return tl.where(b_visible, b_ds, 0.0)  # also where NaN is in a key that the query does not see


@triton.jit
def biases_near(RPB, near, inner, kernel, SPEC: tl.constexpr):
    """Biases ``[M, N]`` of a head, in units of base-2 logits, of keys that start ``near`` from a tile's first query.

    They are zero at distances that no pair of a query and a key that it sees has.
    """
    TILE: tl.constexpr = SPEC.tile
    row = inner_indices(TILE)
    row_lo = (row[0] - kernel[0] + 1, row[1] - kernel[1] + 1, row[2] - kernel[2] + 1)
    row_hi = (row[0] + kernel[0] - 1, row[1] + kernel[1] - 1, row[2] + kernel[2] - 1)
    m_entry = visibility(row_lo, row_hi, near, inner, SPEC.rank)
    o_entry = bias_offset(shifted(inner, near), kernel)[None, :] - bias_offset(row, kernel)[:, None]
    return tl.load(RPB + bias_middle(kernel) + o_entry, mask=m_entry, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def bias_gradient_kernel(
    tensors, strides, axes, around, batches, slices, group, heads, scale, SPEC: tl.constexpr
):  # fmt: skip
    """Sums of the scores' gradients over one slice of the tiles that see a chunk, for one head.

    ``tensors`` are :class:`BiasGradientTensors`, and ``around`` is :class:`Surroundings`.
    """
    CAUSAL: tl.constexpr = SPEC.causal
    PERIODIC: tl.constexpr = SPEC.periodic
    TILE: tl.constexpr = SPEC.tile
    CHUNK: tl.constexpr = SPEC.chunk
    chunks = around.chunks
    i_program = tl.program_id(0)
    i_chunk = i_program % (chunks[0] * chunks[1] * chunks[2])
    i_head = (i_program // (chunks[0] * chunks[1] * chunks[2]) % heads).to(tl.int64)
    i_slice = i_program // (chunks[0] * chunks[1] * chunks[2]) // heads
    near = (
        around.start[0] + i_chunk // (chunks[2] * chunks[1]) * CHUNK[0],
        around.start[1] + i_chunk // chunks[2] % chunks[1] * CHUNK[1],
        around.start[2] + i_chunk % chunks[2] * CHUNK[2],
    )
    first_t, tiles_t = tiles_around(
        near[0], near[0] + CHUNK[0] - 1, around.inner_lo[0], around.inner_hi[0],
        axes.length[0], axes.kernel[0], axes.dilation[0], axes.tiles[0], TILE[0], CAUSAL[0], PERIODIC[0],
    )  # fmt: skip
    first_h, tiles_h = tiles_around(
        near[1], near[1] + CHUNK[1] - 1, around.inner_lo[1], around.inner_hi[1],
        axes.length[1], axes.kernel[1], axes.dilation[1], axes.tiles[1], TILE[1], CAUSAL[1], PERIODIC[1],
    )  # fmt: skip
    first_w, tiles_w = tiles_around(
        near[2], near[2] + CHUNK[2] - 1, around.inner_lo[2], around.inner_hi[2],
        axes.length[2], axes.kernel[2], axes.dilation[2], axes.tiles[2], TILE[2], CAUSAL[2], PERIODIC[2],
    )  # fmt: skip
    views = (
        token_view(tensors.query, strides.query, None, axes, SPEC),
        token_view(tensors.grad_out, strides.grad_out, None, axes, SPEC),
        token_view(tensors.key, strides.key, None, axes, SPEC),
        token_view(tensors.value, strides.value, None, axes, SPEC),
    )
    key_mask = None
    if tensors.key_mask is not None:
        key_mask = View(tensors.key_mask, strides.key_mask)
    inner = inner_indices(CHUNK)
    b_bias = biases_near(tensors.rpb + i_head * bias_size(axes.kernel), near, inner, axes.kernel, SPEC)
    b_sum = tl.zeros(b_bias.shape, tl.float32)
    total = batches * tiles_t * tiles_h * tiles_w
    share = tl.cdiv(total, slices)
    for i in tl.range(i_slice * share, tl.minimum((i_slice + 1) * share, total), num_stages=SPEC.stages):
        i_batch = (i // (tiles_w * tiles_h * tiles_t)).to(tl.int64)
        i_tile = (
            first_t + i // (tiles_w * tiles_h) % tiles_t,
            first_h + i // tiles_w % tiles_h,
            first_w + i % tiles_w,
        )
        b_sum += score_gradients(
            i_batch, i_tile, near, inner, b_bias, views, (tensors.delta, tensors.lse), key_mask, axes, i_head, group,
            heads, scale, SPEC,
        )  # fmt: skip
    n = tl.arange(0, CHUNK[0] * CHUNK[1] * CHUNK[2])
    o_sum = tl.arange(0, SPEC.rows)[:, None] * (CHUNK[0] * CHUNK[1] * CHUNK[2]) + n[None, :]
    tl.store(tensors.sums + i_program.to(tl.int64) * (SPEC.rows * CHUNK[0] * CHUNK[1] * CHUNK[2]) + o_sum, b_sum)


@triton.jit
def bias_sum_kernel(
    Sums, DRPB, kernel, around, slices, heads, SPEC: tl.constexpr, ENTRIES: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Gradients of ``ENTRIES`` entries of a head's table, from the sums of all slices, ``PARTS`` of them at a time."""
    TILE: tl.constexpr = SPEC.tile
    CHUNK: tl.constexpr = SPEC.chunk
    ROWS: tl.constexpr = SPEC.rows
    KEYS: tl.constexpr = CHUNK[0] * CHUNK[1] * CHUNK[2]
    chunks = around.chunks
    size = bias_size(kernel)
    blocks = tl.cdiv(size, ENTRIES)
    i_head = tl.program_id(0) // blocks
    entry = tl.program_id(0) % blocks * ENTRIES + tl.arange(0, ENTRIES)
    width, height = 2 * kernel[2] - 1, 2 * kernel[1] - 1
    part = tl.arange(0, PARTS * ROWS)
    row = unravel(part % ROWS, TILE[1], TILE[2])
    # Where the key at an entry's distance from a row's query lies, from the first key of the first chunk.
    t = (entry // (width * height) - kernel[0] + 1 - around.start[0])[None, :] + row[0][:, None]
    h = (entry // width % height - kernel[1] + 1 - around.start[1])[None, :] + row[1][:, None]
    w = (entry % width - kernel[2] + 1 - around.start[2])[None, :] + row[2][:, None]
    m_sum = (t >= 0) & (h >= 0) & (w >= 0) & (entry < size)[None, :]
    m_sum &= (t < chunks[0] * CHUNK[0]) & (h < chunks[1] * CHUNK[1]) & (w < chunks[2] * CHUNK[2])
    i_chunk = (t // CHUNK[0] * chunks[1] + h // CHUNK[1]) * chunks[2] + w // CHUNK[2]
    i_key = (t % CHUNK[0] * CHUNK[1] + h % CHUNK[1]) * CHUNK[2] + w % CHUNK[2]
    total = chunks[0] * chunks[1] * chunks[2]
    o_sum = ((i_head * total + i_chunk).to(tl.int64) * ROWS + (part % ROWS)[:, None]) * KEYS + i_key
    acc = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, slices, PARTS):
        i_slice = start + part // ROWS
        o_slice = i_slice.to(tl.int64) * heads * total * (ROWS * KEYS)
        b_sum = tl.load(Sums + o_slice[:, None] + o_sum, mask=m_sum & (i_slice < slices)[:, None], other=0.0)
        acc += tl.sum(b_sum, 0)
    tl.store(DRPB + i_head * size + entry, acc.to(DRPB.dtype.element_ty), mask=entry < size)


class BiasConfig(NamedTuple):
    tile: Box
    """Queries that a program takes at a time."""
    chunk: Box
    """Keys that it takes, relative to them."""
    num_warps: int
    stages: int
    """Tiles that are loaded at the same time."""
    maxnreg: int | None
    slices: int
    """Number of parts of the tiles, whose sums are added in order."""


PROGRAMS = 1024
"""Programs that fill a large GPU. The number of slices depends on shapes alone, so that results do so, too."""
LEAST_TILES = 8
"""Tiles of a slice from which on another slice pays"""
SUM_ROWS = 512
"""Rows of matrices, of all slices, of which a program of the second kernel takes elements at a time"""


def bias_memory(size: Size, space: Room) -> int:
    """Most bytes of shared memory that a program takes: in each stage a tile and a chunk, of two tensors each."""
    return size.stages * (size.rows + size.keys) * space.width * 4 + 1024


def program_size(problem: ProblemClass) -> Size:
    """Queries and keys of a program, reduced to what fits on devices with little shared memory.

    64 images of 56x56 tokens, 4 heads of 32 channels, 7x7 windows take 0.27 ms on an H200 with 32 queries and keys, and
    0.31 with 64; 8 of 64x64, 8 heads of 64, 13x13 windows 0.29 with 64. With at most 168 hardware registers they take
    0.34.
    """
    space = room(problem)
    if space.element_size == 4 or space.width > 64:
        size = Size(64, 32, 4, 2)
    else:
        size = Size(32, 32, 2, 2) if space.width <= 32 else Size(64, 64, 4, 2)
    while bias_memory(size, space) > space.limit and (size.rows, size.keys, size.stages) != (16, 16, 1):
        if size.stages > 1:
            size = size._replace(stages=1)
        elif size.keys > 16:
            size = size._replace(keys=size.keys // 2)
        else:
            size = size._replace(rows=size.rows // 2)
    return size


def surroundings(p: Problem, tile: Box, chunk: Box) -> Surroundings:
    """The chunks of keys that the tiles of a problem see."""
    axes = zip(p.lengths, p.axes, p.geometry[3], p.periodic_axes, tile, chunk, strict=True)
    return Surroundings(*zip(*(surroundings_on_axis(*axis) for axis in axes), strict=True))


def surroundings_on_axis(
    length: int, axis: tuple[int, int, int, bool], dilation: int, periodic: bool, tile: int, chunk: int
) -> tuple[int, int, int, int]:
    _, kernel, stride, causal = axis
    bounds, seen = partial(window_bounds, periodic=periodic), []
    for count in {length // dilation, ceil(length / dilation)}:
        low, high = spans((count, kernel, stride, causal), tile, bounds)
        first = torch.arange(0, count, tile)
        seen += (low - first).tolist() + (high - first).tolist()
    inner_lo, inner_hi = min(seen), max(seen)
    if not causal and not periodic:
        leader = stride // 2 - kernel // 2
        inner_lo, inner_hi = max(inner_lo, leader - stride + 1), min(inner_hi, leader + tile - 1 + kernel - 1)
    # A chunk begins at the first key that all tiles see some of, so that as few chunks as possible are seen by all.
    start = inner_lo - ceil((inner_lo - min(seen)) / chunk) * chunk
    return start, (max(seen) - start) // chunk + 1, inner_lo, inner_hi


class BiasPlan(NamedTuple):
    """Like :class:`Plan`, with the launchers of both kernels."""

    config: BiasConfig
    launch: Launcher
    launch_sum: Launcher

    @property
    def programs(self) -> int:
        return self.launch.grid[0]


def slices_of(p: Problem, tile: Box, owners: int, programs: int) -> int:
    """How many slices the tiles are divided into.

    Args:
        owners: programs of one slice, one for each chunk and head.
        programs: how many there should be at least.
    """
    return max(1, min(ceil(programs / owners), p.tile_count(tile) // LEAST_TILES))


def sum_launcher(p: Problem, tile: Box, chunk: Box, around: Surroundings, slices: int) -> Launcher:
    """The launcher of :func:`bias_sum_kernel`."""
    _, kernel, _, _ = p.geometry
    heads, rows = p.query.shape[-2], prod(tile)
    parts = min(next_power_of_2(slices), SUM_ROWS // rows)
    entries = 4096 // (parts * rows)
    return launcher(
        bias_sum_kernel,
        (heads * ceil(prod(2 * k - 1 for k in kernel) / entries),),
        (kernel, around, slices, heads),
        SPEC=Spec(**head_fields(p), tile=tile, chunk=chunk), ENTRIES=entries, PARTS=parts, num_warps=8,
    )  # fmt: skip


def bias_plan(p: Problem, grad_out: Layout, size: Size | None = None, programs: int = PROGRAMS) -> BiasPlan:
    """The plan of both kernels; ``size`` and ``programs`` are for experiments."""
    size = size or program_size(p.problem_class)
    _, kernel, _, _ = p.geometry
    tile, chunk = best_boxes(size.rows, size.keys, p.class_lengths, kernel)
    around, heads = surroundings(p, tile, chunk), p.query.shape[-2]
    owners = heads * prod(around.chunks)
    slices = slices_of(p, tile, owners, programs)
    tensor_strides = *p.token_strides, strides(grad_out)
    unit = stride_unit(tensor_strides)
    query, key, value, grad = in_units(tensor_strides, unit)
    spec = Spec(
        **head_fields(p), causal=p.causal_axes, periodic=p.periodic_axes, tile=tile, chunk=chunk, stages=size.stages,
        rank=p.rank, wide=need_wide_offsets((p.query, p.key, p.value, grad_out, p.key_mask)), unit=unit,
    )  # fmt: skip
    launch = launcher(
        bias_gradient_kernel,
        (owners * slices,),
        (
            Strides(query, key, value, grad_out=grad, key_mask=p.mask_strides), Axes(*p.extents(tile)), around,
            p.query.shape[0], slices, p.group, heads,
        ),
        SPEC=spec, num_warps=size.num_warps, maxnreg=size.maxnreg,
    )  # fmt: skip
    launch_sum = sum_launcher(p, tile, chunk, around, slices)
    return BiasPlan(BiasConfig(tile, chunk, *size[2:], slices), launch, launch_sum)


def new_matrices(tile: Box, chunk: Box, programs: int, device: torch.device) -> Tensor:
    """The matrices of all programs: of a tile's queries and a chunk's keys."""
    return torch.empty(programs * prod(tile) * prod(chunk), dtype=torch.float32, device=device)


def bias_gradient(
    plan: BiasPlan, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor, statistics: RowStatistics
) -> Tensor:
    """The gradient of the table. Allocates a matrix of a tile's queries and a chunk's keys in fp32 for each program."""
    rpb = inputs.rpb
    assert rpb is not None
    sums = new_matrices(plan.config.tile, plan.config.chunk, plan.programs, rpb.device)
    tensors = BiasGradientTensors(
        inputs.query, inputs.key, inputs.value, grad_out, statistics.delta, statistics.lse, rpb, sums, inputs.key_mask
    )  # fmt: skip
    plan.launch((tensors,), (options.scale,))
    grad = torch.empty_like(rpb)
    plan.launch_sum((sums, grad))
    return grad
