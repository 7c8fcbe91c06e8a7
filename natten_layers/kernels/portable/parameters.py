"""What the portable attention kernels take, in groups: named tuples that kernels and their launchers share.

A kernel's parameters are a named tuple of pointers of its own, ``strides``, ``axes``, a few numbers, and ``SPEC``. To
Triton a named tuple of run-time values is one argument per field, and a field that is None is none; ``SPEC`` is a
constant.

Triton 3.6 takes a field of ``SPEC`` as the argument of a device function only if it is an integer. A tuple, string or
bool is first assigned to a ``constexpr`` of the caller. Neither may a device function return a tuple with None in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

from ..host.problem import Layout, Problem, need_wide_offsets
from ..host.tiling import Box, TileConfig, column_parts

__all__ = ["Axes", "Chunk", "Corners", "KeyWalk", "QueryTile", "ResidueClass", "Spec", "Strides", "View", "spec_of"]


class Spec(NamedTuple):
    """What a kernel is compiled for: its compile-time argument ``SPEC``."""

    head_dim: int
    columns: tuple[int, ...]
    """of the tensors that hold a head's channels, padded: see ``column_parts``"""
    value_dim: int
    value_columns: tuple[int, ...]
    precision: str
    """``input_precision`` of matrix products"""
    scale_first: bool
    """whether scores are scaled before they are masked: see ``scales_first``"""
    causal: tuple[bool, bool, bool] = (False, False, False)
    periodic: tuple[bool, bool, bool] = (False, False, False)
    tile: Box = (1, 1, 1)
    """positions of a program"""
    pack: int = 1
    """query heads of a program"""
    chunk: Box = (1, 1, 1)
    """positions that the walk of a program takes at a time"""
    stages: int = 1
    """chunks that are loaded at the same time"""
    mask: str = "select"
    """the way in which invisible pairs are masked: see ``masked_product``"""
    rank: int = 3
    wide: bool = False
    """whether element offsets inside one image need 64 bits"""
    unit: int = 1
    """elements that are the unit of strides: see ``in_elements``"""
    register_tile: int = 0
    """register tokens that a program takes at a time; 0 without any"""
    with_stats: bool = False
    """whether the forward kernel stores the softmax statistics"""
    nonfinite: bool = False
    """whether values that are not finite are kept away from queries that do not see them"""

    @property
    def rows(self) -> int:
        """Rows of a tile: positions times packed heads."""
        return prod(self.tile) * self.pack

    @property
    def in_small_chunks(self) -> Spec:
        """For a second pass, which is rare: with little hardware to itself, however slow."""
        return self._replace(chunk=(1, 1, 16), stages=1)

    @property
    def repair(self) -> Spec:
        """For the second pass of the forward kernel, in which everything is exact."""
        tile = min(self.register_tile, 16)
        return self.in_small_chunks._replace(mask="select", scale_first=True, nonfinite=True, register_tile=tile)


class Strides(NamedTuple):
    """Strides of tensors, in units of ``SPEC.unit`` elements; those of ``grad_lse`` and ``key_mask`` in elements.

    They are ``(batch, t, h, w, head)``, of register tokens ``(batch, register, head)``, and None for tensors that a
    kernel does not read.
    """

    query: Any
    key: Any = None
    value: Any = None
    additional_keys: Any = None
    additional_values: Any = None
    grad_out: Any = None
    grad_lse: Any = None
    key_mask: Any = None


class Axes(NamedTuple):
    """The axes ``t, h, w`` of queries: in each field a number for each. A missing axis has length 1."""

    length: Any
    kernel: Any
    stride: Any
    dilation: Any
    tiles: Any = None
    """number of tiles, over all residue classes; None for kernels without tiles"""


class View(NamedTuple):
    """A tensor, or the part of it that belongs to an image, a sample or a head. Strides are in elements."""

    pointer: Any
    strides: Any


class QueryTile(NamedTuple):
    """The queries of a program: a box of positions of one residue class times ``SPEC.pack`` heads of one KV head.

    Rows are in (position, head) order.
    """

    i_batch: Any
    i_kv: Any
    row_head: Any
    m_rows: Any
    residue: Any
    class_length: Any
    """tokens of the residue class, on each axis"""
    origin: Any
    """class index of the first position"""
    row_index: Any
    """class index of every row"""


class ResidueClass(NamedTuple):
    """The tokens ``residue + i * dilation`` of each axis, with ``i < length``."""

    residue: Any
    length: Any
    dilation: Any


class Chunk(NamedTuple):
    """A chunk of a walk: class index of its corner, and positions of its elements from there on."""

    corner: Any
    inner: Any


class Corners(NamedTuple):
    """First and last class index of boxes; those of several boxes are vectors."""

    lo: Any
    hi: Any


class KeyWalk(NamedTuple):
    """What a program that owns queries walks over: the keys of the union of their windows."""

    boxes: Any
    """:class:`Corners` of the keys that each row sees"""
    union: Any
    """:class:`Corners` of the keys that some row sees"""
    inside: Any
    """:class:`Corners` of the keys that all rows see"""
    ring: Any
    """:class:`ResidueClass` of the keys"""
    chunks: Any
    """number of chunks"""


def head_fields(p: Problem) -> dict[str, Any]:
    """The fields of :class:`Spec` that have no default."""
    head_dim, value_dim = p.query.shape[-1], p.value.shape[-1]
    return {
        "head_dim": head_dim,
        "columns": column_parts(head_dim),
        "value_dim": value_dim,
        "value_columns": column_parts(value_dim),
        "precision": p.precision,
        "scale_first": p.scale_first,
    }


def spec_of(p: Problem, config: TileConfig, tensors: Iterable[Layout | None], **fields: Any) -> Spec:
    """What the kernel of a tile configuration is compiled for.

    Args:
        tensors: all tensors with tokens that the kernel reads or writes. They decide whether offsets need 64 bits.
        fields: further fields, which only some kernels read.
    """
    return Spec(
        **head_fields(p),
        causal=p.causal_axes,
        periodic=p.periodic_axes,
        tile=config.tile,
        chunk=config.chunk,
        # The biases of a chunk are loaded ahead too, and take about as much shared memory as its keys and values.
        stages=max(1, config.stages - p.has_bias),
        # An additive mask is applied before scores are scaled, so -inf stays -inf only if the scale is positive.
        mask="border" if config.skip_mask else "select" if p.scale_first else "add",
        rank=p.rank,
        wide=need_wide_offsets((*tensors, p.key_mask)),
        **fields,
    )


def warps_of(config: TileConfig) -> dict[str, Any]:
    """Triton's options that follow from a tile configuration."""
    return {"num_warps": config.num_warps, "maxnreg": config.maxnreg}
