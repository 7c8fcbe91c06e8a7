"""Rings of buffers in shared memory, the barriers and notes beside them, and the warps that fill them by TMA."""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared

from .primitives import thread_barrier
from .walk import chunk_count, corner_at, first_register, first_walk_index, next_walk_index, part_of, tile_walk


@gluon.jit
def stage_of(n, STAGES: gl.constexpr):
    """Stage of the ring that the ``n``-th load fills, and the phase of its barriers."""
    return n % STAGES, n // STAGES & 1


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
def loaded(ring, PART: gl.constexpr, n, ROWS: gl.constexpr, STAGES: gl.constexpr):
    """One of the boxes of the ``n``-th load, which has arrived, as a matrix ``[ROWS, channels]``."""
    i, _ = stage_of(n, STAGES)
    box = ring[0][PART].index(i)
    return box.reshape([ROWS, box.shape[-1]])


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
