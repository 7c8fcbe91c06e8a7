"""Tiles of small and medium windows on compute capability 9.0: which one a program computes, and how TMA loads it.

A program computes one tile. Positions are those of a residue class of dilation, and batch and ``t`` share an axis of
descriptors (``descriptors.axes_of``).
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from collections.abc import Iterable
from math import prod

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    async_copy_global_to_shared,
)

from ..host.problem import Layout, Problem, contiguous
from ..host.tiling import Box
from .descriptors import Boxes, frames_of, key_boxes, query_boxes
from .primitives import shifted_along
from .small_tiling import PARTS, RollingTileConfig, SmallTileConfig


@gluon.jit
def present_descriptors(first, second, third):
    """Those of three descriptors that are not None."""
    descs = (first,)
    if second is not None:
        descs = descs + (second,)  # noqa: RUF005
    if third is not None:
        descs = descs + (third,)  # noqa: RUF005
    return descs


@gluon.jit
def own_tile(length, dilation, tiles, blocks, TILE: gl.constexpr, SIDE: gl.constexpr = 0):
    """Batch, block of heads, and of the tile of this program its residue class, length of the class, first position.

    Heads vary fastest, as in memory, then classes along an axis, so that programs that run together read and write
    whole rows of it; with ``SIDE``, tiles of a :func:`tile_of_column`. Dilation divides the lengths, and is 1 along
    ``t``.
    """
    i_tile = gl.program_id(0) // blocks
    if SIDE:
        t, h, w = tile_of_column(i_tile, tiles, SIDE)
    else:
        t, h, w = i_tile // (tiles[1] * tiles[2]), i_tile // tiles[2] % tiles[1], i_tile % tiles[2]
    residue = 0, h % dilation[1], w % dilation[2]
    count = length[0], length[1] // dilation[1], length[2] // dilation[2]
    origin = t * TILE[0], h // dilation[1] * TILE[1], w // dilation[2] * TILE[2]
    return gl.program_id(1), gl.program_id(0) % blocks, residue, count, origin


@gluon.jit
def tile_of_column(i_tile, tiles, SIDE: gl.constexpr):
    """Tile ``t, h, w`` in an order in which programs that run together see much the same keys.

    Tiles are taken column by column. A column is ``SIDE`` tiles high and wide, or what is left at the end of an axis,
    and goes through all frames. Line by line, the keys that whole lines see may exceed the L2 cache.
    """
    rows = SIDE * tiles[2] * tiles[0]
    column_h = i_tile // rows
    i_tile -= column_h * rows
    high = gl.minimum(tiles[1] - column_h * SIDE, SIDE)
    column_w = i_tile // (SIDE * high * tiles[0])
    i_tile -= column_w * (SIDE * high * tiles[0])
    wide = gl.minimum(tiles[2] - column_w * SIDE, SIDE)
    return i_tile // (high * wide), column_h * SIDE + i_tile // wide % high, column_w * SIDE + i_tile % wide


@gluon.jit
def first_frame(i_batch, residue, length, frames):
    """Where a residue class of an image starts on the first axis of descriptors; see ``descriptors.axes_of``.

    ``frames`` is the size of an image on that axis.
    """
    return i_batch * frames + residue[1] * length[2] + residue[2]


@gluon.jit
def next_corner(corner, desc, AXIS: gl.constexpr):
    """First key of the part that follows the one at ``corner``."""
    return shifted_along(corner, desc.block_type.shape[AXIS + 1], AXIS)


@gluon.jit
def inside_frames(corner, length, descs, AXIS: gl.constexpr):
    """``corner``, moved towards the first frame as far as the parts from there on would reach past the last one.

    Behind the last frame TMA finds the first frame of the next image, as batch and t share an axis. A mask is not
    enough against what lies there, because zero times NaN is NaN.
    """
    frames = 0
    for PART in gl.static_range(len(descs) if AXIS == 0 else 1):
        frames += descs[PART].block_type.shape[1]
    return gl.maximum(gl.minimum(corner[0], length[0] - frames), 0), corner[1], corner[2]


@gluon.jit
def start_load(desc, corner, ready):
    """Start to load a box; returns its buffer."""
    buffer = gl.allocate_shared_memory(desc.dtype, desc.block_type.shape, desc.layout)
    async_copy_global_to_shared(desc, corner, ready, buffer)
    return buffer


@gluon.jit
def start_part(desc, kv_offset, corner, ready):
    """Start to load the keys or values of one part; returns its buffer ``[keys, D]``."""
    BOX: gl.constexpr = desc.block_type.shape
    buffer = start_load(desc, [kv_offset[0], kv_offset[1] + corner[0], corner[1], corner[2], 0], ready)
    return buffer.reshape([BOX[1] * BOX[2] * BOX[3], BOX[4]])


@gluon.jit
def start_registers(desc, kv_offset, ready):
    BOX: gl.constexpr = desc.block_type.shape
    return start_load(desc, [kv_offset[2], 0, kv_offset[0], 0], ready).reshape([BOX[1], BOX[3]])


@gluon.jit
def start_parts(descs, reg_desc, kv_offset, corner, ready, AXIS: gl.constexpr):
    """Start to load all keys or values that a tile sees, and the register tokens; returns their buffers."""
    buffers = ()
    for PART in gl.static_range(len(descs)):
        buffers = buffers + (start_part(descs[PART], kv_offset, corner, ready),)  # noqa: RUF005
        corner = next_corner(corner, descs[PART], AXIS)
    if reg_desc is not None:
        buffers = buffers + (start_registers(reg_desc, kv_offset, ready),)  # noqa: RUF005
    return buffers


def grid_of(config: SmallTileConfig, p: Problem, blocks: int) -> tuple[int, int]:
    """Programs of all tiles of an image, of which each has ``blocks``, and images; all of a packed batch are one."""
    tiles = p.tile_count(config.tile) if p.packs_images else prod(p.tiles(config.tile))
    return tiles * blocks, p.query.shape[0]


def image_sizes(config: SmallTileConfig, p: Problem) -> tuple[tuple[Box, ...], Box, int]:
    """``axes``, ``tiles`` and ``frames`` of the kernels; ones for packed images, of which kernels read a table."""
    return (((1, 1, 1),) * 4, (1, 1, 1), 1) if p.packs_images else (p.geometry, p.tiles(config.tile), frames_of(p))


def described(p: Problem, boxes: Iterable[Boxes | None]) -> list[Boxes | None]:
    """The descriptors of a call; none for packed images."""
    return [None if p.packs_images else x for x in boxes]


def batches_of_registers(p: Problem) -> int:
    """``reg_batch`` of the kernels: 0 where all images share the register tokens, else 1."""
    return 0 if p.additional_keys is not None and p.additional_keys.stride[0] == 0 else 1


def boxes_of_rows(config: SmallTileConfig | RollingTileConfig, p: Problem) -> list[Boxes]:
    """Descriptors of queries and results."""
    *_, dilation = p.geometry
    return [query_boxes(x, config.tile, config.pack, dilation) for x in (p.query, contiguous(p.query.shape))]


def boxes_of_parts(config: SmallTileConfig, p: Problem, *tensors: Layout) -> list[Boxes | None]:
    """Descriptors of the parts of each tensor, one tensor after the other."""
    *_, dilation = p.geometry
    rest = [None] * (PARTS - len(config.parts))
    return [boxes for x in tensors for boxes in [*(key_boxes(x, box, dilation) for box in config.parts), *rest]]
