"""A call of the attention kernels as the host sees it: its tensors, and the description its launches depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from math import ceil, prod
from operator import mul
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...geometry import Window
from .card import Card
from .packing import Packing, line_tables, packing_of, sample_bounds, sample_tables, tile_count
from .tiling import Axis, Box, ProblemClass, TileConfig, next_power_of_2, register_tile

T = TypeVar("T", int, bool)


def three_axes(values: Sequence[T], fill: T) -> tuple[T, T, T]:
    """Values of the axes ``t, h, w``, from those of one to three axes; missing axes get ``fill``."""
    t, h, w = (fill,) * (3 - len(values)) + tuple(values)
    return t, h, w


def ones(values: Sequence[int]) -> Box:
    """1 for the axes ``t, h, w`` of which the value is 1, and for missing ones; 0 for others."""
    t, h, w = (int(n == 1) for n in three_axes(values, 1))
    return t, h, w


class Layout(NamedTuple):
    """Shape and strides of a tensor ``[B, *spatial, H, D]``, or of registers ``[B, R, H, D]``."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


def contiguous(shape: Sequence[int]) -> Layout:
    """Layout of a contiguous tensor."""
    steps = accumulate(reversed(shape[1:]), mul, initial=1)
    return Layout(tuple(shape), tuple(steps)[::-1])


def layout(tensor: Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride())


def strides(tensor: Layout) -> tuple[int, ...]:
    """Strides ``(batch, t, h, w, head)`` of a tensor ``[B, *spatial, H, D]``."""
    return tensor.stride[0], *three_axes(tensor.stride[1:-2], 0), tensor.stride[-2]


def need_wide_offsets(tensors: Iterable[Layout | None]) -> bool:
    """Whether element offsets inside one image need 64 bits. Those of images and heads always have 64 bits."""
    spans = (sum(map(mul, x.shape[1:-2], x.stride[1:-2])) for x in tensors if x is not None)
    # Chunks may reach past the end of an axis by less than their own size.
    return 2 * max(spans) >= 2**31


def stride_unit(strides: Iterable[Sequence[int]]) -> int:
    """The unit in which strides are passed to kernels, their ``UNIT``: 8 if that divides all strides, else 1."""
    return 1 if any(step % 8 for each in strides for step in each) else 8


def in_units(strides: Iterable[Sequence[int]], unit: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(step // unit for step in each) for each in strides)


def register_strides(tensor: Layout | None) -> tuple[int, ...]:
    """Strides ``(batch, register, head)`` of registers ``[B, R, H, D]``; zeros if there are none."""
    return (0, 0, 0) if tensor is None else tensor.stride[:3]


def sink_kind(sink: Tensor | None, value: float | None) -> str:
    """How a sink is given, ``SINK`` of the kernels: none, value or tensor."""
    return "tensor" if sink is not None else "none" if value is None else "value"


def scales_first(scale: float) -> bool:
    """``SCALE_FIRST`` of the kernels: whether scores are scaled before they are masked and their maximum is taken.

    A scale that is not positive does not commute with the maximum. A scale that is zero in fp32, or subnormal and
    therefore flushed to zero, would turn a mask of -inf into NaN.
    """
    return scale < torch.finfo(torch.float32).tiny


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of Triton's matrix products, ``PRECISION`` of the kernels. It matters for fp32 only.

    It follows ``torch.backends.cuda.matmul.fp32_precision``, which also reflects ``allow_tf32`` and
    ``torch.set_float32_matmul_precision``: TF32 or IEEE where one of these is set. If none is, a product is computed as
    three products in TF32 (``tf32x3``), which run on tensor cores with errors like those of IEEE products (3e-7), or as
    three in fp16 with the same errors by the kernels of ``portable.pairs``.
    """
    if dtype != torch.float32:
        return "ieee"
    asked = torch.backends.cuda.matmul.fp32_precision
    return asked if asked in ("tf32", "ieee") else "tf32x3"


SHARED_MEMORY = 227 * 1024
"""Bytes that a program can have on an H100 or H200, assumed where a device does not report it."""


@lru_cache
def device_traits(device: torch.device) -> tuple[str, int]:
    """Name of a device, and the bytes of shared memory that a program can have on it."""
    if device.type != "cuda":
        return device.type, SHARED_MEMORY  # Triton's interpreter has no limit
    properties = torch.cuda.get_device_properties(device)
    return properties.name, getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY)


class Inputs(NamedTuple):
    """The tensors of a call after validation by ``operations``. Their last axes are contiguous."""

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    sink: Tensor | None = None
    key_mask: Tensor | None = None
    """``[B, *spatial]``, bool: False where a key counts for no query. It has no gradient."""
    shapes: Tensor | None = None
    """``[samples, rank]``, integers on the CPU, if the batch is packed.

    Tensors with tokens are then ``[1, N, ...]``, registers ``[samples, R, ...]``.
    """
    rpb: Tensor | None = None
    """``[Hq, 2 * kernel_size - 1 per axis]``, contiguous: biases of scaled scores by the distance of query and key."""

    @property
    def addressed(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The tensors that some kernels read by TMA."""
        return self.query, self.key, self.value, self.additional_keys, self.additional_values


class Options(NamedTuple):
    """The arguments of a call that are no tensors. Those of the window have one entry per axis."""

    sink_value: float | None
    """One logit for all heads. A sink with a logit per head is a tensor of :class:`Inputs`."""
    kernel_size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    scale: float
    is_periodic: Sequence[bool] = ()
    """Empty if no axis is periodic."""

    @property
    def window(self) -> Window:
        kernel_size, stride, dilation = map(tuple, (self.kernel_size, self.stride, self.dilation))
        is_periodic = tuple(self.is_periodic) or (False,) * len(kernel_size)
        return Window(kernel_size, stride, dilation, tuple(self.is_causal), is_periodic)


class Cotangents(NamedTuple):
    """What the backward pass takes beside the forward pass's arguments: its results, and their gradients."""

    out: Tensor
    row_max: Tensor
    row_sum: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


class SavedResults(NamedTuple):
    """Results of the forward pass that its derivative in forward mode takes."""

    out: Tensor
    row_max: Tensor
    row_sum: Tensor


class Tangents(NamedTuple):
    """The direction of a derivative in forward mode: a tangent for each of :class:`Inputs`, or None for zero.

    Their last axes are contiguous.
    """

    query_tangent: Tensor | None = None
    key_tangent: Tensor | None = None
    value_tangent: Tensor | None = None
    additional_keys_tangent: Tensor | None = None
    additional_values_tangent: Tensor | None = None
    sink_tangent: Tensor | None = None

    @property
    def addressed(self) -> tuple[Tensor | None, ...]:
        """Those of :attr:`Inputs.addressed`."""
        return (
            self.query_tangent, self.key_tangent, self.value_tangent, self.additional_keys_tangent,
            self.additional_values_tangent,
        )  # fmt: skip


class RowStatistics(NamedTuple):
    """Statistics of query rows that the dQ kernel writes, and the kernels of dK and dV read."""

    delta: Tensor
    """``[B, *spatial, Hq]`` in fp32"""
    lse: Tensor
    """Log-sum-exp in base 2, shaped like delta."""
    head_major: Any = None
    """Both in the order in which kernels for large windows load them by TMA, if such a kernel wrote them."""


class Problem(NamedTuple):
    """Everything that the launches of a call depend on: all of it but the data. Hashable; it has the caller's axes."""

    query: Layout
    key: Layout
    value: Layout
    additional_keys: Layout | None
    additional_values: Layout | None
    device: torch.device
    dtype: torch.dtype
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    sink: str
    """How the sink is given: none, value or tensor."""
    scale_first: bool
    """See :func:`scales_first`; always with a bias, which is added to scaled scores."""
    precision: str
    """``input_precision`` of Triton's matrix products."""
    is_periodic: tuple[bool, ...] = ()
    """Empty if no axis is. Without a bias, an axis whose windows hold all of it is not periodic here, as it makes no
    difference to it."""
    key_mask: Layout | None = None
    """With the axes of tokens; those of heads and channels have length 1."""
    packing: Packing | None = None
    """The samples of a packed batch. Layouts then have the batch's single axis of tokens."""
    has_bias: bool = False
    """Whether there is a bias on relative positions."""
    card: Card | None = None
    """The GPU that kernels are chosen for, if that is not the one with the tensors. Such a problem is not launched."""

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    @property
    def lengths(self) -> Box:
        return three_axes(self.query.shape[1:-2], 1)

    @property
    def causal_axes(self) -> tuple[bool, bool, bool]:
        return three_axes(self.is_causal, False)

    @property
    def periodic_axes(self) -> tuple[bool, bool, bool]:
        return three_axes(self.is_periodic, False)

    @property
    def key_lengths(self) -> Box | None:
        """Lengths of the keys' axes, or None if queries lie on the same grid."""
        if self.query.shape[1:-2] == self.key.shape[1:-2]:
            return None
        return three_axes(self.key.shape[1:-2], 1)

    @property
    def geometry(self) -> tuple[Box, Box, Box, Box]:
        """Lengths, kernel sizes, strides and dilations of three axes."""
        kernel_size, stride, dilation = (three_axes(x, 1) for x in (self.kernel_size, self.stride, self.dilation))
        return self.lengths, kernel_size, stride, dilation

    @property
    def class_lengths(self) -> Box:
        """Tokens of the longest residue class, per axis."""
        lengths, _, _, dilation = self.geometry
        t, h, w = (ceil(n / d) for n, d in zip(lengths, dilation, strict=True))
        return t, h, w

    @property
    def axes(self) -> tuple[Axis, ...]:
        """For each of three axes the length of its longest class, kernel size, stride, and whether it is causal."""
        _, kernel_size, stride, _ = self.geometry
        return tuple(zip(self.class_lengths, kernel_size, stride, three_axes(self.is_causal, False), strict=True))

    @property
    def out(self) -> Layout:
        """Layout of the output ``[B, *spatial, Hq, Dv]``, which is contiguous."""
        return contiguous((*self.query.shape[:-1], self.value.shape[-1]))

    @property
    def statistics(self) -> Layout:
        """Layout of one number for every query and head, ``[B, *spatial, Hq, 1]``, contiguous."""
        return contiguous((*self.query.shape[:-1], 1))

    @property
    def kv_heads(self) -> int:
        return self.key.shape[-2]

    @property
    def group(self) -> int:
        return self.query.shape[-2] // self.key.shape[-2]

    @property
    def registers(self) -> int:
        return 0 if self.additional_keys is None else self.additional_keys.shape[1]

    @property
    def register_tile(self) -> int:
        """Registers that a program of the forward and dQ kernels takes at a time; 0 without registers."""
        return register_tile(self.problem_class, self.registers) if self.registers else 0

    @property
    def window(self) -> Window:
        rings = self.is_periodic or (False,) * self.rank
        return Window(self.kernel_size, self.stride, self.dilation, self.is_causal, rings)

    @property
    def samples(self) -> int:
        """Number of images, or of a packed batch's samples: that of which each has register tokens of its own."""
        return self.query.shape[0] if self.packing is None else len(self.packing.shapes)

    @property
    def problem_class(self) -> ProblemClass:
        """The properties that the choice of tiles depends on.

        Those of a packed batch are its longest axes', as powers of two: so most batches have the same compiled kernels.
        """
        _, kernel_size, _, dilation = self.geometry
        classes = self.class_lengths
        if self.packing is not None:
            lengths = three_axes(tuple(next_power_of_2(n) for n in self.packing.longest), 1)
            t, h, w = (ceil(n / d) for n, d in zip(lengths, dilation, strict=True))
            classes = t, h, w
            t, h, w = (max(1, min(k, n // d)) for k, n, d in zip(kernel_size, lengths, dilation, strict=True))
            kernel_size = t, h, w
        card = self.card
        return ProblemClass(
            *(device_traits(self.device) if card is None else (card.name, card.shared_memory)), classes, kernel_size,
            self.group, self.query.shape[-1], self.value.shape[-1], self.dtype.itemsize,
        )  # fmt: skip

    @property
    def key_problem_class(self) -> ProblemClass:
        """:attr:`problem_class` for tiles of keys: their lengths, and about as many queries as see a key."""
        one, keys = self.problem_class, self.key_lengths
        if keys is None:
            return one
        t, h, w = (ceil(k * n / m) for k, n, m in zip(one.kernel, one.lengths, keys, strict=True))
        return one._replace(lengths=keys, kernel=(t, h, w))

    def tiles(self, tile: Box, lengths: Box | None = None) -> Box:
        """Number of tiles of size ``tile`` on each axis, over all its residue classes; of queries by default."""
        _, _, _, dilation = self.geometry
        axes = zip(self.lengths if lengths is None else lengths, dilation, tile, strict=True)
        t, h, w = (d * ceil(ceil(n / d) / b) for n, d, b in axes)
        return t, h, w

    def tile_count(self, tile: Box) -> int:
        """Number of tiles of queries, over all images or samples."""
        if self.packing is not None:
            return tile_count(self.packing, self.window, tile)
        return self.query.shape[0] * prod(self.tiles(tile))

    def tile_count_of_keys(self, tile: Box) -> int:
        if self.packing is not None:
            return tile_count(self.packing, self.window, tile)
        return self.query.shape[0] * prod(self.tiles(tile, self.key_lengths))

    def programs(self, config: TileConfig) -> int:
        return self.tile_count(config.tile) * self.kv_heads * -(-self.group // config.pack)

    def tile_table(self, tile: Box) -> Tensor | None:
        """The table that tells kernels of each tile's sample in a packed batch; None for images."""
        return None if self.packing is None else sample_tables(self.packing, self.window, tile, self.device).tiles

    def sample_table(self, tile: Box) -> Tensor | None:
        """The table of a packed batch's samples; None for images."""
        return None if self.packing is None else sample_tables(self.packing, self.window, tile, self.device).samples

    def window_table(self) -> Tensor | None:
        """The windows of a packed batch with one axis (:class:`~.packing.LineTables`); None for images."""
        return None if self.packing is None else line_tables(self.packing, self.window, self.device).windows

    def query_table(self) -> Tensor | None:
        """The inverse of :meth:`window_table`."""
        return None if self.packing is None else line_tables(self.packing, self.window, self.device).queries

    @property
    def packs_images(self) -> bool:
        """Whether the samples of a packed batch have more than one axis."""
        return self.packing is not None and self.rank > 1

    def sample_bounds(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """First and last token of the sample of each token of packed texts; None for images, packed or not."""
        if self.packing is None or self.packs_images:
            return None, None
        return sample_bounds(self.packing, self.device)

    def extents(self, tile: Box) -> tuple[Box, Box, Box, Box, Box]:
        """Lengths, kernel sizes, strides, dilations and numbers of tiles, or :attr:`extents_of_samples`."""
        return self.extents_of_samples if self.packing is not None else (*self.geometry, self.tiles(tile))

    def key_extents(self, tile: Box) -> tuple[Box, Box, Box, Box, Box]:
        """:meth:`extents` with tiles of keys."""
        if self.packing is not None:
            return self.extents_of_samples
        return *self.geometry, self.tiles(tile, self.key_lengths)

    @property
    def extents_of_samples(self) -> tuple[Box, Box, Box, Box, Box]:
        """:meth:`extents` of a packed batch: 1 where it is 1 in every sample, and 0 where kernels read a table.

        What is 1 for the whole batch is 1 in every sample, as none has a larger window, stride or dilation. So kernels
        do not divide by strides and dilations that nobody asked for.
        """
        flat, window = ones((0,) * self.rank), self.window
        return flat, ones(window.kernel_size), ones(window.stride), ones(window.dilation), flat

    def strides_of(self, tensor: Layout) -> tuple[int, ...]:
        """:func:`strides`, whose first is 0 in a packed batch, so that kernels are not compiled for its size."""
        batch, *others = strides(tensor)
        return (batch if self.packing is None else 0), *others

    def input_strides(self) -> tuple[tuple[int, ...], ...]:
        """Those of query, key, value, additional keys and additional values."""
        return *self.token_strides, register_strides(self.additional_keys), register_strides(self.additional_values)

    @property
    def token_strides(self) -> tuple[tuple[int, ...], ...]:
        """Those of query, key and value."""
        return self.strides_of(self.query), self.strides_of(self.key), self.strides_of(self.value)

    @property
    def mask_strides(self) -> tuple[int, ...] | None:
        return None if self.key_mask is None else self.strides_of(self.key_mask)


def new_like(tensor: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the same shape. It takes the host half the time of ``new_empty``."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def new_results(query: Tensor, value_dim: int, with_stats: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Uninitialised ``out [B, *spatial, Hq, Dv]`` and statistics ``row_max`` and ``row_sum [B, *spatial, Hq]``.

    The statistics are fp32, and None unless ``with_stats``.
    """
    out = new_like(query) if query.shape[-1] == value_dim else query.new_empty(*query.shape[:-1], value_dim)
    if not with_stats:
        return out, None, None
    row_max, row_sum = (query.new_empty(query.shape[:-1], dtype=torch.float32) for _ in range(2))
    return out, row_max, row_sum


def problem_of(inputs: Inputs, options: Options) -> Problem:
    query, key, value, additional_keys, additional_values, sink, key_mask, shapes, rpb = inputs
    sink_value, kernel_size, stride, dilation, is_causal, scale, is_periodic = options
    rings: tuple[bool, ...] = ()
    if is_periodic and shapes is not None:
        rings = tuple(is_periodic)
    elif is_periodic:
        axes = zip(is_periodic, kernel_size, dilation, key.shape[1:-2], strict=True)
        # With a bias the way around a whole ring matters.
        rings = tuple([periodic and (k * d != length or rpb is not None) for periodic, k, d, length in axes])
    return Problem(  # layouts are made without `layout`, whose calls would take as long as everything else
        Layout(query.shape, query.stride()), Layout(key.shape, key.stride()), Layout(value.shape, value.stride()),
        None if additional_keys is None else layout(additional_keys),
        None if additional_values is None else layout(additional_values),
        query.device, query.dtype, tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal),
        sink_kind(sink, sink_value), rpb is not None or scales_first(scale), precision(query.dtype),
        rings if any(rings) else (),
        None if key_mask is None else layout(key_mask[..., None, None]),
        None if shapes is None else packing_of(shapes, query.shape[1], options.window),
        rpb is not None,
    )  # fmt: skip
