"""What the kernels for compute capability 9.0 share: walks over chunks, masks, rings of buffers and TMA descriptors.

Some groups of four warps compute the rows of a tile, each those of a box of it, its part of the tile. A walk visits a
box of keys (or of queries), all that the tile sees, chunk by chunk; a walk index ``(t, h, w)`` counts its chunks per
axis. Walks go along an axis in one of two orders:
- Where all groups compute all chunks, a walk starts behind the chunks that every row of the tile sees in full, and
  wraps around, so that the chunks that need no mask on that axis come last.
- Where groups skip chunks (``SKIP``), a walk goes from both ends to the middle. Chunks that only the first or only the
  last group sees come in turn, so that no group waits long for the others, with which it shares the stages of a ring.
Register tokens, which all rows see, come before either: chunks whose walk index is negative on the last axis. The last
of them ends with the last token, so that the first one only may start before token 0, where TMA reads zeros, and
need a mask.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma
from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..host.problem import Layout, Problem, strides, three_axes
from ..host.tiling import Box, head_width
from ..portable.primitives import LOG2E, LOWEST
from ..portable.windows import (
    between,
    contiguous_row,
    inside_axes,
    last_of,
    shifted,
    spatial_tile,
    tokens_of,
    union_of_windows,
    unravel,
)

thread_barrier = getattr(
    gl, "barrier" if hasattr(gl, "barrier") else "thread_barrier"
)  # the name changed in Triton 3.7


ANY: gl.constexpr = gl.constexpr(True)


@gluon.jit
def axis_walk(lo, hi, inner_lo, inner_hi, STEP: gl.constexpr):
    """For one axis: number of chunks, how many of them reach past the box of some row, and which comes first."""
    steps = (hi - lo + STEP) // STEP
    first = (inner_lo - lo + STEP - 1) // STEP
    end = (inner_hi - lo + 1) // STEP
    inside = gl.maximum(end - first, 0)
    return steps, steps - inside, gl.where(inside > 0, end, 0)


@gluon.jit
def walk_over(lo, hi, inner_lo, inner_hi, CHUNK: gl.constexpr, registers=None):
    """The walk over a box: its first position; for each axis the number of chunks, how many of them need a mask, and
    the index of the first; and, if there are any, the numbers of register tokens before it and of their chunks.
    """
    t, border_t, start_t = axis_walk(lo[0], hi[0], inner_lo[0], inner_hi[0], CHUNK[0])
    h, border_h, start_h = axis_walk(lo[1], hi[1], inner_lo[1], inner_hi[1], CHUNK[1])
    w, border_w, start_w = axis_walk(lo[2], hi[2], inner_lo[2], inner_hi[2], CHUNK[2])
    before = ()
    if registers is not None:
        before = registers, (registers + CHUNK[0] * CHUNK[1] * CHUNK[2] - 1) // (CHUNK[0] * CHUNK[1] * CHUNK[2])
    return lo, (t, h, w), (border_t, border_h, border_w), (start_t, start_h, start_w), before


@gluon.jit
def tile_of(tile_id, plan, TILE: gl.constexpr):
    """Batch, index in the last count of ``plan``, lengths and first position of a tile.

    Neighbouring tiles have neighbouring numbers, so that programs that run together share what they load.
    """
    length, tiles, heads = plan[0], plan[3], plan[4]
    space = tiles[0] * tiles[1] * tiles[2]
    i_head = tile_id // space % heads
    i_tile = tile_id // (space * heads) * space + tile_id % space
    i_batch, _, count, origin = spatial_tile(i_tile, length, (1, 1, 1), tiles, TILE)
    return i_batch.to(gl.int32), i_head, count, origin


@gluon.jit
def on_line(Bounds, index, count):
    """First and last position that the tokens at ``index`` of a packed batch see, or are seen by, as boxes.

    ``Bounds [2, tokens]`` has them for every token. There is one axis, the line of all tokens.
    """
    p = Bounds + gl.minimum(index[2], count[2] - 1)
    return (index[0], index[1], gl.load(p)), (index[0], index[1], gl.load(p + count[2]))


@gluon.jit
def union_on_line(Bounds, origin, count, TILE: gl.constexpr):
    """What ``union_of_windows`` and ``union_of_queries`` return, for a tile on the line of a packed batch's tokens.

    Neither bound decreases from one sample to the next, so a tile may hold the end of one and the beginning of others.
    """
    lo, inner_hi = on_line(Bounds, origin, count)
    inner_lo, hi = on_line(Bounds, last_of(origin, TILE), count)
    return lo, hi, inner_lo, inner_hi


@gluon.jit
def load_of_token(Table, index, count):
    """The entry of ``Table [tokens]`` for each position on the line of a packed batch's tokens."""
    return gl.load(Table + gl.minimum(gl.maximum(index, 0), count[2] - 1))


@gluon.jit
def tile_walk(tile_id, plan, CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, Windows=None):
    """Of a tile of queries: batch, block of heads, first position, and the walk over its keys."""
    _length, kernel, stride, _tiles, _blocks, registers = plan
    i_batch, i_head, count, origin = tile_of(tile_id, plan, TILE)
    if Windows is None:
        lo, hi, inner_lo, inner_hi = union_of_windows(origin, count, kernel, stride, CAUSAL, TILE)
    else:
        lo, hi, inner_lo, inner_hi = union_on_line(Windows, origin, count, TILE)
    return i_batch, i_head, origin, walk_over(lo, hi, inner_lo, inner_hi, CHUNK, registers)


@gluon.jit
def part_of(origin, GROUP: gl.constexpr, GROUPS: gl.constexpr, PART: gl.constexpr):
    """First position of the part of a tile that one of its groups of warps computes."""
    return (
        origin[0] + GROUP // (GROUPS[1] * GROUPS[2]) * PART[0],
        origin[1] + GROUP // GROUPS[2] % GROUPS[1] * PART[1],
        origin[2] + GROUP % GROUPS[2] * PART[2],
    )


@gluon.jit
def chunk_count(walk):
    """Number of chunks of a walk, with those of register tokens."""
    return walk[1][0] * walk[1][1] * walk[1][2] + register_chunks(walk)


@gluon.jit
def register_chunks(walk):
    return walk[4][1] if len(walk[4]) == 2 else 0


@gluon.jit
def first_walk_index(walk):
    return 0, 0, -register_chunks(walk)


@gluon.jit
def next_walk_index(i_walk, walk):
    """The walk index that follows, and whether the walk is back at its first chunk."""
    t, h, w = i_walk
    w += 1
    wraps = w >= walk[1][2]
    w = gl.where(wraps, 0, w)
    h += gl.where(wraps, 1, 0)
    wraps = h >= walk[1][1]
    h = gl.where(wraps, 0, h)
    t += gl.where(wraps, 1, 0)
    wraps = t >= walk[1][0]
    return (gl.where(wraps, 0, t), h, w), wraps


@gluon.jit
def in_order(i, start, steps, SKIP: gl.constexpr):
    """Index along an axis of the ``i``-th chunk that a walk visits."""
    if SKIP:
        index = gl.where(i % 2 == 0, i // 2, steps - 1 - i // 2)
    else:
        index = gl.where(start + i >= steps, start + i - steps, start + i)
    return index


@gluon.jit
def corner_at(i_walk, walk, CHUNK: gl.constexpr, SKIP: gl.constexpr):
    """First position of the chunk at a walk index."""
    lo, steps, _, start, _ = walk
    return (
        lo[0] + in_order(i_walk[0], start[0], steps[0], SKIP) * CHUNK[0],
        lo[1] + in_order(i_walk[1], start[1], steps[1], SKIP) * CHUNK[1],
        lo[2] + in_order(i_walk[2], start[2], steps[2], SKIP) * CHUNK[2],
    )


@gluon.jit
def chunk_mask(
    i_walk, walk, row_lo, row_hi, inner, M: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
    LAYOUT: gl.constexpr, FIRST: gl.constexpr = ANY,
):  # fmt: skip
    """0 and -inf ``[M, N]``: which keys of the chunk each row sees. Computed only if some row does not see all of it.

    There is one loop over all chunks with this branch in it, at a point where no product is under way, instead of one
    loop for each kind of chunk: behind a loop that may be skipped, ptxas 12.8 uses descriptors of shared memory that it
    computes inside that loop only. There is one branch and not one for each axis because a branch copies the mask that
    it leaves unchanged. Unless it may be the ``FIRST`` chunk of a walk, one of register tokens needs no mask.
    """
    REGISTERS: gl.constexpr = len(walk[4]) == 2
    b_hidden = gl.zeros([M, N], gl.float32, LAYOUT)
    m_border = (i_walk[0] < walk[2][0]) | (i_walk[1] < walk[2][1]) | (i_walk[2] < walk[2][2])
    if REGISTERS:
        m_border = m_border & (i_walk[2] >= 0)
        if FIRST:
            m_border = m_border | (i_walk[2] == -register_chunks(walk))
    if m_border:
        if REGISTERS and FIRST:
            if i_walk[2] < 0:
                b_hidden = register_hidden(first_register(i_walk[2], walk, N), M, N, LAYOUT)
            else:
                b_hidden = border_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, LAYOUT)
        else:
            b_hidden = border_mask(i_walk, walk, row_lo, row_hi, inner, M, N, CHUNK, RANK, LAYOUT)
    return b_hidden


@gluon.jit
def border_mask(
    i_walk, walk, row_lo, row_hi, inner, M: gl.constexpr, N: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """0 and -inf ``[M, N]``: which keys of a chunk of the window each row sees."""
    b_hidden = gl.zeros([M, N], gl.float32, LAYOUT)
    corner = corner_at(i_walk, walk, CHUNK, False)
    for AXIS in gl.static_range(3 - RANK, 3):
        m_seen = between(row_lo[AXIS] - corner[AXIS], row_hi[AXIS] - corner[AXIS], inner[AXIS])
        b_hidden = gl.where(m_seen, b_hidden, float("-inf"))
    return b_hidden


@gluon.jit
def first_register(w, walk, N: gl.constexpr):
    """First register token of the chunk with walk index ``w < 0`` on the last axis."""
    return walk[4][0] + w * N


@gluon.jit
def register_hidden(first, M: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """0 and -inf ``[M, N]``: which register tokens of the chunk that starts with ``first`` there are."""
    m_there = gl.arange(0, N, gl.SliceLayout(0, LAYOUT)) + first >= 0
    return gl.where(m_there[None, :], gl.zeros([M, N], gl.float32, LAYOUT), float("-inf"))


@gluon.jit
def reach_of(lo, hi, empty, CHUNK: gl.constexpr):
    """The corners of chunks that meet a box ``lo, hi``: the first of them on each axis, and how many follow it. None do
    if the part of the tile that sees the box is ``empty``.
    """
    first = gl.where(empty, 2**30, lo[0] - CHUNK[0] + 1), lo[1] - CHUNK[1] + 1, lo[2] - CHUNK[2] + 1
    return first, (hi[0] - lo[0] + CHUNK[0] - 1, hi[1] - lo[1] + CHUNK[1] - 1, hi[2] - lo[2] + CHUNK[2] - 1)


@gluon.jit
def meets(corner, reach):
    """Whether the chunk at ``corner`` meets the box of :func:`reach_of`."""
    first, more = reach
    m_t = (corner[0] - first[0]).to(gl.uint32) <= more[0].to(gl.uint32)
    m_h = (corner[1] - first[1]).to(gl.uint32) <= more[1].to(gl.uint32)
    m_w = (corner[2] - first[2]).to(gl.uint32) <= more[2].to(gl.uint32)
    return m_t & m_h & m_w


@gluon.jit
def row_sizes(row_lo, row_hi):
    """Number of positions that each row sees, on each axis."""
    return (
        gl.maximum(row_hi[0] - row_lo[0] + 1, 0),
        gl.maximum(row_hi[1] - row_lo[1] + 1, 0),
        gl.maximum(row_hi[2] - row_lo[2] + 1, 0),
    )


@gluon.jit
def sees(corner, row_lo, row_size, inner, AXIS: gl.constexpr):
    """``[M, N]``: which positions of the chunk at ``corner`` each row sees on one axis."""
    offset = inner[AXIS][None, :] - (row_lo[AXIS] - corner[AXIS])[:, None]
    return offset.to(gl.uint32) < row_size[AXIS][:, None].to(gl.uint32)


@gluon.jit
def hidden(corner, row_lo, row_size, inner, RANK: gl.constexpr):
    """0 and -inf ``[M, N]``: which positions of the chunk at ``corner`` each row sees.

    The last axis is added to the others, which all positions of a line of the chunk share: additions have twice the
    rate of selections.
    """
    b_hidden = gl.where(sees(corner, row_lo, row_size, inner, 2), 0.0, float("-inf"))
    if RANK > 1:
        m_line = sees(corner, row_lo, row_size, inner, 1)
        if RANK > 2:
            m_line = m_line & sees(corner, row_lo, row_size, inner, 0)
        b_hidden = b_hidden + gl.where(m_line, 0.0, float("-inf"))
    return b_hidden


@gluon.jit
def hidden_keys(
    i_chunk, walk, corner, row_lo, row_size, inner, M: gl.constexpr, N: gl.constexpr, RANK: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """:func:`hidden` for chunk ``i_chunk`` of a walk, which may be one of register tokens."""
    if len(walk[4]) == 0:
        b_hidden = hidden(corner, row_lo, row_size, inner, RANK)
    elif i_chunk < register_chunks(walk):
        b_hidden = register_hidden(first_register(i_chunk - register_chunks(walk), walk, N), M, N, LAYOUT)
    else:
        b_hidden = hidden(corner, row_lo, row_size, inner, RANK)
    return b_hidden


@gluon.jit
def stage_of(n, STAGES: gl.constexpr):
    """Stage of the ring that the ``n``-th load fills, and the phase of its barriers."""
    return n % STAGES, n // STAGES & 1


@gluon.jit
def opaque_i32(x):
    """``x``, through a move that LLVM cannot see through.

    LLVM hoists out of a loop whatever does not change in it. Masks and descriptors of shared memory would then be kept
    for the whole loop and spilled, because the hardware registers cannot hold them all. What is computed from an opaque
    integer stays inside the loop.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def new_barriers(SIZE: gl.constexpr, arrivals):
    barriers = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def new_stages(descs, STAGES: gl.constexpr):
    """Buffers of ``STAGES`` stages for boxes that arrive together."""
    buffers = ()
    for i in gl.static_range(len(descs)):
        buffer = gl.allocate_shared_memory(descs[i].dtype, [STAGES] + descs[i].block_type.shape, descs[i].layout)  # noqa: RUF005
        buffers = buffers + (buffer,)  # noqa: RUF005
    return buffers


@gluon.jit
def new_ring(descs, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Buffers of ``STAGES`` stages for boxes that arrive together, with two barriers for each stage.

    The first tells that the loads have arrived, the second that all ``READERS`` groups of warps have read them.
    """
    return new_stages(descs, STAGES), new_barriers(STAGES, 1), new_barriers(STAGES, READERS)


@gluon.jit
def expect_load(ring, n, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """Wait until all groups have read what the ``n``-th load overwrites, then announce its bytes."""
    i, phase = stage_of(n, STAGES)
    mbarrier.wait(ring[2].index(i), phase ^ 1)
    mbarrier.expect(ring[1].index(i), BYTES)


@gluon.jit
def load_box(ring, desc, corner, n, PART: gl.constexpr, STAGES: gl.constexpr):
    """Load one of the boxes of the ``n``-th load, which :func:`expect_load` has announced."""
    i, _ = stage_of(n, STAGES)
    async_copy_global_to_shared(desc, corner, ring[1].index(i), ring[0][PART].index(i))


@gluon.jit
def await_load(ring, n, expected, STAGES: gl.constexpr):
    i, phase = stage_of(n, STAGES)
    mbarrier.wait(ring[1].index(i), phase, pred=expected)


@gluon.jit
def release(ring, n, STAGES: gl.constexpr):
    i, _ = stage_of(n, STAGES)
    mbarrier.arrive(ring[2].index(i), count=1)


@gluon.jit
def new_notes(STAGES: gl.constexpr):
    """For each stage of a ring, where its chunk is, so that groups that skip chunks need not walk themselves."""
    return gl.allocate_shared_memory(gl.int32, [STAGES, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def write_note(notes, ring, n, corner, STAGES: gl.constexpr):
    """Publish the corner of the ``n``-th chunk. To be called before ``expect_load``, which makes it visible."""
    i, phase = stage_of(n, STAGES)
    mbarrier.wait(ring[2].index(i), phase ^ 1)
    field = gl.arange(0, 4, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    notes.index(i).store(gl.where(field == 0, corner[0], gl.where(field == 1, corner[1], corner[2])))
    thread_barrier()


@gluon.jit
def read_note(notes, n, STAGES: gl.constexpr):
    """The corner of the ``n``-th chunk, once it has arrived."""
    i, _ = stage_of(n, STAGES)
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    note, field = notes.index(i).load(LAYOUT), gl.arange(0, 4, LAYOUT)
    # A thread holds all fields, so that the compiler sees through these sums.
    return (
        gl.sum(gl.where(field == 0, note, 0), 0),
        gl.sum(gl.where(field == 1, note, 0), 0),
        gl.sum(gl.where(field == 2, note, 0), 0),
    )


@gluon.jit
def new_schedule(READERS: gl.constexpr):
    """A ring of two tile numbers, with barriers that tell when a number is there and when all warps have read it.

    Tiles differ in the number of chunks that they see. Dealt out beforehand they would leave multiprocessors idle at
    the end, so programs take them from a counter in global memory.
    """
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return numbers, new_barriers(2, 1), new_barriers(2, READERS)


@gluon.jit
def take_tile(schedule, n, TileCounter):
    """Take the next tile off the counter, and publish its number to the other warps as the ``n``-th of this program."""
    i, phase = stage_of(n, 2)
    tile_id = gl.atomic_add(TileCounter, 1)
    mbarrier.wait(schedule[2].index(i), phase ^ 1)
    schedule[0].index(i).store(gl.full([1], tile_id, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
    mbarrier.arrive(schedule[1].index(i), count=1)
    return tile_id


@gluon.jit
def await_tile(schedule, n):
    """Number of the ``n``-th tile of this program; a number past the last tile if there are no more."""
    i, phase = stage_of(n, 2)
    mbarrier.wait(schedule[1].index(i), phase)
    tile_id = gl.max(schedule[0].index(i).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(schedule[2].index(i), count=1)
    return tile_id


@gluon.jit
def repeated(descs, COUNT: gl.constexpr):
    """``COUNT`` times each descriptor: boxes of the parts of a tile, one after the other."""
    boxes = ()
    for i in gl.static_range(len(descs)):
        for _ in gl.static_range(COUNT):
            boxes = boxes + (descs[i],)  # noqa: RUF005
    return boxes


@gluon.jit
def query_tile_producer(
    ring, schedule, TileCounter, descs, plan, num_tiles,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr, CHUNK: gl.constexpr,
    PACK: gl.constexpr, TILES: gl.constexpr, Windows=None,
):  # fmt: skip
    """The warp that takes tiles of queries off the counter and loads them, part by part."""
    COUNT: gl.constexpr = GROUPS[0] * GROUPS[1] * GROUPS[2]
    BYTES: gl.constexpr = descs[0].block_type.nbytes + (descs[1].block_type.nbytes if len(descs) == 2 else 0)
    n = 0
    tile_id = take_tile(schedule, 0, TileCounter)
    while tile_id < num_tiles:
        i_batch, i_head, origin, _walk = tile_walk(tile_id, plan, CAUSAL, TILE, CHUNK, Windows)
        expect_load(ring, n, BYTES * COUNT, TILES)
        for GROUP in gl.static_range(COUNT):
            t, h, w = part_of(origin, GROUP, GROUPS, PART)
            for i in gl.static_range(len(descs)):
                corner = [i_batch * plan[0][0] + t, h, w, i_head * PACK, 0]
                load_box(ring, descs[i], corner, n, i * COUNT + GROUP, TILES)
        n += 1
        tile_id = take_tile(schedule, n, TileCounter)


@gluon.jit
def load_keys(ring, descs, i_kv, corner, n, STAGES: gl.constexpr):
    for i in gl.static_range(len(descs)):
        load_box(ring, descs[i], [i_kv, corner[0], corner[1], corner[2], 0], n, i, STAGES)


@gluon.jit
def load_registers(ring, descs, i_batch, i_kv, first, n, STAGES: gl.constexpr):
    """Load register tokens from ``first`` on. Descriptors of tokens that all images share have a batch of one."""
    stage, _ = stage_of(n, STAGES)
    for i in gl.static_range(len(descs)):
        buffer = ring[0][i].index(stage).reshape(descs[i].block_type.shape)
        i_own = gl.minimum(i_batch, descs[i].shape[0] - 1)
        async_copy_global_to_shared(descs[i], [i_own, first, i_kv, 0], ring[1].index(stage), buffer)


@gluon.jit
def key_chunk_producer(
    ring, notes, schedule, descs, register_descs, plan, num_tiles, group,
    CAUSAL: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, PACK: gl.constexpr, SKIP: gl.constexpr,
    STAGES: gl.constexpr, Windows=None,
):  # fmt: skip
    """The warp that loads chunks of keys, of values, or of both: first of register tokens, then of the window."""
    BYTES: gl.constexpr = descs[0].block_type.nbytes + (descs[1].block_type.nbytes if len(descs) == 2 else 0)
    n = 0
    i_tile = 0
    tile_id = await_tile(schedule, 0)
    while tile_id < num_tiles:
        i_batch, i_head, _origin, walk = tile_walk(tile_id, plan, CAUSAL, TILE, CHUNK, Windows)
        i_walk, i_kv = first_walk_index(walk), i_head * PACK // group
        for _ in range(chunk_count(walk)):
            t, h, w = corner_at(i_walk, walk, CHUNK, SKIP)
            if SKIP:
                write_note(notes, ring, n, (t, h, w), STAGES)
            expect_load(ring, n, BYTES, STAGES)
            if len(walk[4]) == 0:
                load_keys(ring, descs, i_kv, (i_batch * plan[0][0] + t, h, w), n, STAGES)
            elif i_walk[2] < 0:
                first = first_register(i_walk[2], walk, CHUNK[0] * CHUNK[1] * CHUNK[2])
                load_registers(ring, register_descs, i_batch, i_kv, first, n, STAGES)
            else:
                load_keys(ring, descs, i_kv, (i_batch * plan[0][0] + t, h, w), n, STAGES)
            i_walk, _wraps = next_walk_index(i_walk, walk)
            n += 1
        i_tile += 1
        tile_id = await_tile(schedule, i_tile)


@gluon.jit
def part_rows(PART: gl.constexpr, PACK: gl.constexpr, ROW: gl.constexpr):
    """For the rows of a part of a tile: their positions in it, and their heads in the block of heads."""
    row = gl.arange(0, PART[0] * PART[1] * PART[2] * PACK, ROW)
    return unravel(row // PACK, PART[1], PART[2]), row % PACK


@gluon.jit
def output_rows(position, head, i_batch, origin, length, heads):
    """Which rows lie inside the image, and their row numbers in a contiguous ``[B, T, H, W, heads]``."""
    return class_rows(position, head, i_batch, origin, (0, 0, 0), length, (1, 1, 1), length, heads)


@gluon.jit
def class_rows(position, head, i_batch, origin, residue, count, dilation, length, heads):
    """The same for a tile of a residue class with ``count`` tokens per axis."""
    index = shifted(position, origin)
    token = tokens_of(index, residue, count, dilation)
    m_inside = inside_axes(index, count) & (index[0] >= 0) & (index[1] >= 0) & (index[2] >= 0)
    return m_inside, contiguous_row(i_batch.to(gl.int64), token, length) * heads + head


@gluon.jit
def store_rows(Out, o_row, m_rows, b_rows, D: gl.constexpr, BD: gl.constexpr, STORE: gl.constexpr):
    """Store the first ``D`` of the ``BD`` channels of rows in a contiguous ``[rows, D]``."""
    col = gl.arange(0, BD, gl.SliceLayout(0, STORE))[None, :]
    mask = m_rows[:, None]
    if BD != D:
        mask = mask & (col < D)
    gl.store(Out + (o_row * D)[:, None] + col, b_rows, mask=mask)


@gluon.jit
def row_sinks(Sink, head, sink, SINK: gl.constexpr):
    """The sink of each row as a base-2 logit; ``LOWEST`` where there is none."""
    row_sink = gl.full(head.shape, LOWEST, gl.float32, head.type.layout)
    if SINK == "tensor":
        row_sink = gl.maximum(gl.load(Sink + head).to(gl.float32) * LOG2E, row_sink)
    if SINK == "value":
        row_sink = gl.maximum(sink * LOG2E, row_sink)
    return row_sink


@gluon.jit
def start_product(b_rows, b_columns, b_acc):
    """Start ``[M, D]`` times the transpose of ``[N, D]``, both in shared memory, added to ``b_acc`` if it is given."""
    M: gl.constexpr = b_rows.shape[0]
    N: gl.constexpr = b_columns.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    if b_acc is None:
        b_zero = gl.zeros([M, N], gl.float32, SCORES)
        b_product = warpgroup_mma(b_rows, b_columns.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    else:
        b_product = warpgroup_mma(b_rows, b_columns.permute((1, 0)), b_acc, is_async=True)
    return b_product


@gluon.jit
def flag_nonfinite(Nonfinite, b_rows, m_rows):
    """Set ``Nonfinite`` to 1 if a result of some row is not finite."""
    row_rest = gl.convert_layout(gl.sum(b_rows * 0.0, 1), m_rows.type.layout)
    gl.store(Nonfinite + m_rows.to(gl.int32) * 0, 1, mask=m_rows & ~(gl.abs(row_rest) >= 0.0))


@gluon.jit
def store_part(buffer, b_rows, Out, i_head, i_batch, origin, length, heads, PART: gl.constexpr, PACK: gl.constexpr,
               D: gl.constexpr):  # fmt: skip
    """Store the rows of a result for the part of a tile at ``origin``.

    They pass through ``buffer``, shared memory that nothing needs any more, so that a warp writes whole rows; if it is
    None they are stored from registers.
    """
    BD: gl.constexpr = b_rows.shape[1]
    b_rows = b_rows.to(Out.dtype.element_ty)
    if buffer is None:
        STORE: gl.constexpr = b_rows.type.layout
    else:
        STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [4, 1], [1, 0])
        buffer.store(b_rows)
        b_rows = buffer.load(STORE)
    position, head = part_rows(PART, PACK, gl.SliceLayout(1, STORE))
    m_rows, o_row = output_rows(position, i_head * PACK + head, i_batch, origin, length, heads)
    store_rows(Out, o_row, m_rows, b_rows, D, BD, STORE)


Boxes = dict[str, Any]
"""All fields of a ``TensorDescriptor`` except ``base``, the tensor: they are the same for every call of a problem."""


def boxes_of(shape: list[int], strides: list[int], block_shape: list[int]) -> Boxes:
    swizzle = min(128, 2 * block_shape[-1])
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=len(shape))
    return {"shape": shape, "strides": strides, "block_shape": block_shape, "layout": layout, "padding": "zero"}


def axes_of(tensor: Layout, dilation: Box = (1, 1, 1)) -> tuple[list[int], list[int]]:
    """Sizes and strides of the axes ``batch and t, h, w, head`` of a tensor.

    A TMA descriptor has five axes, of which channels take one, so batch and t share one. With dilation, h and w are
    those of a residue class, and the first axis counts tokens, of which the first of an image and class is chosen.
    """
    batch, t, h, w, head = strides(tensor)
    size_t, size_h, size_w = three_axes(tensor.shape[1:-2], 1)
    if prod(dilation) > 1:
        _, by_h, by_w = dilation
        sizes = [tensor.shape[0] * size_h * size_w, size_h // by_h, size_w // by_w, tensor.shape[-2]]
        steps = [w, h * by_h, w * by_w, head]
    else:
        sizes = [tensor.shape[0] * size_t, size_h, size_w, tensor.shape[-2]]
        steps = [batch if size_t == 1 else t, h, w, head]
    # The stride of an axis of size one has no effect, but may be one that TMA refuses.
    return sizes, [8 if size == 1 else step for size, step in zip(sizes, steps, strict=True)]


def query_boxes(query: Layout, tile: Box, pack: int, dilation: Box = (1, 1, 1)) -> Boxes:
    """The descriptor of queries: boxes of positions times heads."""
    sizes, steps = axes_of(query, dilation)
    dim = query.shape[-1]
    return boxes_of([*sizes, dim], [*steps, 1], [*tile, pack, head_width(dim)])


def key_boxes(tensor: Layout, box: Box, dilation: Box = (1, 1, 1)) -> Boxes:
    """The descriptor of keys or values: boxes of positions of one head."""
    (*sizes, heads), (*steps, head) = axes_of(tensor, dilation)
    dim = tensor.shape[-1]
    return boxes_of([heads, *sizes, dim], [head, *steps, 1], [1, *box, head_width(dim)])


def register_boxes(registers: Layout, rows: int) -> Boxes:
    """The descriptor of register tokens: boxes of one head. Tokens that all images share are stored once."""
    batch, *counts, dim = registers.shape
    steps = [step if size > 1 else 8 for size, step in zip(registers.shape, registers.stride, strict=True)][:3]
    if registers.stride[0] == 0:
        batch, steps[0] = 1, 8
    return boxes_of([batch, *counts, dim], [*steps, 1], [1, rows, 1, head_width(dim)])


def chunks_of_registers(problem: Problem, chunk: Box) -> list[Boxes | None]:
    """The descriptors of the register tokens' keys and values; None without any."""
    registers = problem.additional_keys, problem.additional_values
    return [None if x is None else register_boxes(x, prod(chunk)) for x in registers]


def descriptor(tensor: Tensor, boxes: Boxes) -> TensorDescriptor:
    """A ``TensorDescriptor`` made without the checks of its constructor.

    The checks take the host longer than a launch does, and every problem is checked once (``variants.is_addressable``).
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**boxes, "base": tensor}
    return made


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
