"""One call of the kernels on the host: its tensors, and apart from them all that its launches depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from math import ceil
from operator import mul
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .tiling import Axis, Box, Launch, ProblemClass, column_parts, register_tile

T = TypeVar("T", int, bool)


def three_axes(values: Sequence[T], fill: T) -> tuple[T, T, T]:
    """``t, h, w`` from one to three axes."""
    t, h, w = (fill,) * (3 - len(values)) + tuple(values)
    return t, h, w


class Layout(NamedTuple):
    """Of a tensor ``[B, *spatial, H, D]``, or of registers ``[B, R, H, D]``."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


def contiguous(shape: Sequence[int]) -> Layout:
    """Of a new tensor."""
    steps = accumulate(reversed(shape[1:]), mul, initial=1)
    return Layout(tuple(shape), tuple(steps)[::-1])


def layout(tensor: Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride())


def strides(tensor: Layout) -> tuple[int, ...]:
    """``(batch, t, h, w, head)`` of ``[B, *spatial, H, D]``."""
    return tensor.stride[0], *three_axes(tensor.stride[1:-2], 0), tensor.stride[-2]


def need_wide_offsets(tensors: Iterable[Layout | None]) -> bool:
    """Whether offsets inside one image need 64 bits. Offsets of images and heads always have them."""
    spans = (sum(map(mul, x.shape[1:-2], x.stride[1:-2])) for x in tensors if x is not None)
    # Chunks may reach past the end of an axis by less than their own size.
    return 2 * max(spans) >= 2**31


def stride_unit(strides: Iterable[Sequence[int]]) -> int:
    """``UNIT`` of the kernels: 8 if that divides all these strides, else 1."""
    return 1 if any(step % 8 for each in strides for step in each) else 8


def in_units(strides: Iterable[Sequence[int]], unit: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(step // unit for step in each) for each in strides)


def register_strides(tensor: Layout | None) -> tuple[int, ...]:
    """``(batch, register, head)`` of ``[B, R, H, D]``."""
    return (0, 0, 0) if tensor is None else tensor.stride[:3]


def sink_kind(sink: Tensor | None, value: float | None) -> str:
    """``SINK`` of the kernels."""
    return "tensor" if sink is not None else "none" if value is None else "value"


def scales_first(scale: float) -> bool:
    """``SCALE_FIRST`` of the kernels: whether scores are scaled before their maximum is taken, and before a mask.

    A scale that is not positive does not commute with the maximum; and what is zero in fp32, or is taken for zero as
    it is not normal there, makes NaN of a mask of -inf.
    """
    return scale < torch.finfo(torch.float32).tiny


def precision(dtype: torch.dtype) -> str:
    """``PRECISION`` of the kernels' matrix products, as Triton calls it; it matters for fp32 only.

    TF32 where torch's switches ask for it, IEEE where they ask for that: ``torch.backends.cuda.matmul.fp32_precision``,
    which also tells what ``allow_tf32`` and ``torch.set_float32_matmul_precision`` were set to. If nobody has set any,
    three products in TF32, whose errors are those of IEEE's (3e-7) and which run on tensor cores.
    """
    if dtype != torch.float32:
        return "ieee"
    asked = torch.backends.cuda.matmul.fp32_precision
    return asked if asked in ("tf32", "ieee") else "tf32x3"


SHARED_MEMORY = 227 * 1024
"""of an H100 or H200: where a device does not tell"""


@lru_cache
def device_traits(device: torch.device) -> tuple[str, int]:
    """Its name, and the bytes of shared memory that a program can have on it."""
    if device.type != "cuda":
        return device.type, SHARED_MEMORY  # Triton's interpreter has no limit
    properties = torch.cuda.get_device_properties(device)
    return properties.name, getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY)


class Inputs(NamedTuple):
    """The tensors of a call as ``operations`` validated them, last axes contiguous."""

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    sink: Tensor | None = None


class Options(NamedTuple):
    """What a call is beside its tensors; windows have one entry per axis."""

    sink_value: float | None
    """One logit for all heads. A sink that differs by head is a tensor of :class:`Inputs`."""
    kernel_size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    scale: float


class Cotangents(NamedTuple):
    """What the backward pass takes beside the arguments of the forward: its results, and the gradients of them."""

    out: Tensor
    row_max: Tensor
    row_sum: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


class RowStatistics(NamedTuple):
    """What the query kernel of a backward pass leaves for those of keys and registers."""

    delta: Tensor
    """``[B, *spatial, Hq]`` in fp32"""
    lse: Tensor | None
    """log-sum-exp in base 2, likewise; None if only the head-major form was written"""
    head_major: Any = None
    """both once more in the order that the kernels for large windows load by TMA, if one of them wrote it"""


class Problem(NamedTuple):
    """What a call is apart from its data: everything that launches depend on. Hashable; axes as the caller has them."""

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
    """how it is given: none, value or tensor"""
    scale_first: bool
    """of :func:`scales_first`"""
    precision: str
    """of matrix products, as Triton calls it"""

    @property
    def rank(self) -> int:
        return len(self.query.shape) - 3

    @property
    def lengths(self) -> Box:
        return three_axes(self.query.shape[1:-2], 1)

    @property
    def geometry(self) -> tuple[Box, Box, Box, Box]:
        """Lengths, kernel size, stride and dilation of three axes."""
        kernel_size, stride, dilation = (three_axes(x, 1) for x in (self.kernel_size, self.stride, self.dilation))
        return self.lengths, kernel_size, stride, dilation

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Length, kernel size, stride and whether it is causal, of three axes."""
        lengths, kernel_size, stride, _ = self.geometry
        return tuple(zip(lengths, kernel_size, stride, three_axes(self.is_causal, False), strict=True))

    @property
    def out(self) -> Layout:
        """Of the output ``[B, *spatial, Hq, Dv]``, which is new."""
        return contiguous((*self.query.shape[:-1], self.value.shape[-1]))

    @property
    def statistics(self) -> Layout:
        """Of one number for every query and head, ``[B, *spatial, Hq, 1]``, new."""
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
        """Registers that a program over queries takes at a time; 0 without registers."""
        return register_tile(self.problem_class, self.registers) if self.registers else 0

    @property
    def problem_class(self) -> ProblemClass:
        """What the choice of tiles depends on."""
        lengths, kernel_size, _, dilation = self.geometry
        t, h, w = (ceil(n / d) for n, d in zip(lengths, dilation, strict=True))
        return ProblemClass(
            *device_traits(self.device), (t, h, w), kernel_size, self.group,
            self.query.shape[-1], self.value.shape[-1], self.dtype.itemsize,
        )  # fmt: skip

    def tiles(self, tile: Box) -> Box:
        """Tiles per axis, over all its residue classes."""
        lengths, _, _, dilation = self.geometry
        t, h, w = (d * ceil(ceil(n / d) / b) for n, d, b in zip(lengths, dilation, tile, strict=True))
        return t, h, w

    def programs(self, launch: Launch) -> int:
        t, h, w = self.tiles(launch.tile)
        return self.query.shape[0] * t * h * w * self.kv_heads * -(-self.group // launch.pack)

    def input_strides(self) -> tuple[tuple[int, ...], ...]:
        return (
            strides(self.query), strides(self.key), strides(self.value),
            register_strides(self.additional_keys), register_strides(self.additional_values),
        )  # fmt: skip

    def program(self, launch: Launch, tensors: Iterable[Layout | None]) -> dict[str, Any]:
        """Compile-time arguments and options that follow from a launch.

        Args:
            tensors: all that have tokens and that the kernel reads or writes: its offsets are as wide as they need.
        """
        # A score of -inf that is scaled later needs a positive scale.
        mask = "border" if launch.skip_mask else "select" if self.scale_first else "add"
        return {
            "CAUSAL": three_axes(self.is_causal, False),
            "TILE": launch.tile,
            "CHUNK": launch.chunk,
            "MASK": mask,
            "RANK": self.rank,
            "WIDE": need_wide_offsets(tensors),
            "STAGES": launch.stages,
            "num_warps": launch.num_warps,
            "maxnreg": launch.max_registers,
        }

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that every kernel takes."""
        head_dim, value_dim = self.query.shape[-1], self.value.shape[-1]
        return {
            "D": head_dim,
            "BD": column_parts(head_dim),
            "DV": value_dim,
            "BDV": column_parts(value_dim),
            "SCALE_FIRST": self.scale_first,
            "PRECISION": self.precision,
        }


def new_like(tensor: Tensor) -> Tensor:
    """An empty contiguous tensor of the same shape: half the host's time of ``new_empty``."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def new_results(query: Tensor, value_dim: int, with_state: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Unset ``out [B, *spatial, Hq, Dv]`` and, ``with_state``, ``row_max`` and ``row_sum [B, *spatial, Hq]``, fp32."""
    out = new_like(query) if query.shape[-1] == value_dim else query.new_empty(*query.shape[:-1], value_dim)
    if not with_state:
        return out, None, None
    row_max, row_sum = (query.new_empty(query.shape[:-1], dtype=torch.float32) for _ in range(2))
    return out, row_max, row_sum


class RotationKind(NamedTuple):
    """What the preparation of queries and keys is apart from its data."""

    norm: str
    split: tuple[int, ...]
    """how many pairs of elements turn by each coordinate of a position"""
    by_head: bool
    """whether frequencies differ by head"""
    batched: bool
    """whether positions differ by image"""
    interleaved: bool = False
    """Element ``2 i`` turns with ``2 i + 1``; otherwise ``i`` with ``i + pairs``."""

    @property
    def axes(self) -> int:
        """coordinates of a position"""
        return len(self.split)

    @property
    def pairs(self) -> int:
        """all axes together"""
        return sum(self.split)


class QKPrep(NamedTuple):
    """What is done to queries and keys before attention: normalisation of every head, then RoPE."""

    query_gain: Tensor | None
    """cosine: ``[Hq]`` or None; rms: ``[D]``"""
    key_gain: Tensor | None
    """cosine: ``[Hkv]`` or None; rms: ``[D]``"""
    positions: Tensor | None
    """``[B or 1, *spatial, axes]``"""
    freqs: Tensor | None
    """``[heads that differ, n]``, fp32: of every axis, or with ``split`` of all axes one after the other"""
    factor: float
    norm: str
    """none, cosine or rms"""
    eps: float
    split: Sequence[int] = ()
    """how many pairs turn by each axis; empty where all axes have the same frequencies"""
    interleaved: bool = False

    @property
    def kind(self) -> RotationKind:
        if self.positions is None or self.freqs is None:
            return RotationKind(self.norm, (0,), False, False)
        batch, *_, axes = self.positions.shape
        heads, each = self.freqs.shape
        split = tuple(self.split) or (each,) * axes
        return RotationKind(self.norm, split, heads > 1, batch > 1, self.interleaved)

    @property
    def by_head(self) -> bool:
        """Angles differ by head: a program then takes images that share them; otherwise it takes heads."""
        return self.freqs is not None and len(self.freqs) > 1


def problem_of(inputs: Inputs, options: Options) -> Problem:
    query, key, value, additional_keys, additional_values, sink = inputs
    sink_value, kernel_size, stride, dilation, is_causal, scale = options
    return Problem(  # a call of a function for each layout would take as long as the rest
        Layout(query.shape, query.stride()), Layout(key.shape, key.stride()), Layout(value.shape, value.stride()),
        None if additional_keys is None else layout(additional_keys),
        None if additional_values is None else layout(additional_values),
        query.device, query.dtype, tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal),
        sink_kind(sink, sink_value), scales_first(scale), precision(query.dtype),
    )  # fmt: skip
