"""The anchor workloads, their inputs, and the floor: a time that no implementation can beat."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from natten_layers.geometry import Window, axis_mask, fitted, make_window, visible_pairs

__all__ = [
    "MODES",
    "WORKLOADS",
    "Floor",
    "Inputs",
    "Mode",
    "Variant",
    "Workload",
    "add_variant",
    "floor",
    "make_inputs",
    "smoke",
]

Mode = Literal["fwd", "bwd", "fwdbwd"]
MODES: tuple[Mode, ...] = ("fwd", "fwdbwd")
"""The passes that users wait for. A backward pass by itself is for comparisons of kernels."""

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Variant:
    """Registers, sink and bias with which a workload runs."""

    registers: int = 0
    sink: Literal["zero", "learned"] | None = None
    bias: tuple[int, ...] = ()
    """``[heads, 2 * kernel_size - 1 per axis]``, the shape of a table of biases on relative positions; () for none"""

    @property
    def label(self) -> str:
        parts = [f"{self.registers} registers"] if self.registers else []
        parts += [f"{self.sink} sink"] if self.sink else []
        return " + ".join([*parts, *(["bias"] if self.bias else [])])


@dataclass(frozen=True)
class Workload:
    """One attention problem. ``causal``, ``periodic``, ``stride`` and ``dilation`` are one value, or one per axis."""

    name: str
    batch: int
    """1 if samples are packed"""
    spatial: tuple[int, ...]
    """Lengths of the axes; () if samples are packed, as each has its own"""
    heads: int
    kv_heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    causal: bool | tuple[bool, ...] = False
    learned_sink: bool = False
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    value_dim: int | None = None
    """Elements of a value head, default ``head_dim``."""
    registers: int = 0
    dtype: torch.dtype = DTYPE
    periodic: bool | tuple[bool, ...] = False
    land: bool = False
    """Keys on land, about a third of the grid and the same in all images, are masked."""
    key_spatial: tuple[int, ...] = ()
    """Lengths of the axes of keys, if they lie on another grid than queries"""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Lengths of the axes of samples that are packed one after the other"""
    bias: bool = False
    """Scores have a learned bias on the relative position of query and key."""

    @property
    def window(self) -> Window:
        """The window as the model has it: samples that are packed see it cut to them."""
        lengths = self.key_spatial or self.spatial or tuple(max(axis) for axis in zip(*self.shapes, strict=True))
        return make_window(lengths, self.kernel_size, self.stride, self.dilation, self.causal, self.periodic)

    @property
    def images(self) -> list[Workload]:
        """Each image or packed sample as a workload of its own."""
        if not self.shapes:
            return [replace(self, batch=1)] * self.batch
        cut = [fitted(shape, self.window) for shape in self.shapes]
        return [
            replace(self, shapes=(), spatial=shape, kernel_size=w.kernel_size, stride=w.stride, dilation=w.dilation)
            for shape, w in zip(self.shapes, cut, strict=True)
        ]

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def head_dims(self) -> tuple[int, int]:
        """Head dims of queries and keys, and of values."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def variant(self) -> Variant:
        """The registers, sink and bias that the model itself has."""
        table = (self.heads, *(2 * k - 1 for k in self.kernel_size)) if self.bias else ()
        return Variant(self.registers, "learned" if self.learned_sink else None, table)

    @property
    def query_axes(self) -> tuple[int, ...]:
        """The axes of queries that come before heads: batch and spatial axes, or one axis of packed tokens."""
        return (sum(map(math.prod, self.shapes)),) if self.shapes else (self.batch, *self.spatial)

    @property
    def key_axes(self) -> tuple[int, ...]:
        return (self.batch, *self.key_spatial) if self.key_spatial else self.query_axes

    def elements(self) -> int:
        """Number of elements of query, key, value and output together."""
        queries, keys = math.prod(self.query_axes), math.prod(self.key_axes)
        return (queries * self.heads + keys * self.kv_heads) * sum(self.head_dims)

    def key_mask(self, device: torch.device | str = "cpu") -> Tensor | None:
        """``[1, *key_spatial]``, False on land: where waves along the axes, a few per axis, have crests in common."""
        if not self.land:
            return None
        height = torch.zeros((), device=device)
        for axis, length in enumerate(self.key_axes[1:]):
            position = (torch.arange(length, device=device) + 0.5) / length
            height = height[..., None] + torch.sin(2 * math.pi * (axis + 2) * position + 1)
        return height[None] < 0.5

    def visible_pairs(self) -> int:
        """Exact number of query-key pairs of one image, or of all packed samples, and one head; with registers."""
        if self.shapes:
            return sum(image.visible_pairs() for image in self.images)
        return self._local_pairs() + math.prod(self.spatial) * self.registers

    def _local_pairs(self) -> int:
        mask = self.key_mask()
        if mask is None:
            return visible_pairs(self.spatial, self.window)
        # Axes are independent: a key is seen by as many queries as the product of their numbers on each axis.
        w, letters, seen = self.window, string.ascii_letters[: len(self.spatial)], []
        for length, keys, k, s, d, causal, periodic in zip(
            self.spatial, self.key_spatial or [None] * w.rank,
            w.kernel_size, w.stride, w.dilation, w.is_causal, w.is_periodic,
            strict=True,
        ):  # fmt: skip
            seen.append(axis_mask(length, k, s, d, causal, periodic=periodic, key_length=keys).double().sum(0))
        return int(torch.einsum(f"{letters},{','.join(letters)}->", mask[0].double(), *seen))


WORKLOADS = {
    w.name: w
    for w in (
        Workload("hdit-l0", 8, (256, 256), 2, 2, 64, (7, 7)),
        Workload("hdit-l1", 8, (128, 128), 4, 4, 64, (7, 7)),
        Workload("hdit-gqa", 8, (128, 128), 8, 2, 64, (7, 7)),
        Workload("seed", 8, (128, 128), 6, 3, 64, (13, 13)),
        Workload("flux-4k", 1, (256, 256), 24, 24, 128, (80, 80)),
        Workload("hunyuan", 1, (30, 48, 80), 24, 24, 128, (18, 24, 24)),
        Workload("mistral", 1, (32768,), 32, 8, 128, (4096,), causal=True),
        Workload("gpt-oss", 1, (16384,), 64, 8, 64, (128,), causal=True, learned_sink=True),
    )
}


def smoke(workload: Workload) -> Workload:
    """The same problem at a size that a CPU computes quickly, to test the benchmark itself."""
    spatial = {1: (96,), 2: (16, 16), 3: (4, 8, 8)}[len(workload.kernel_size)]
    shapes, key_spatial = (), ()
    if workload.shapes:
        few = {1: ((53,), (5,), (38,)), 2: ((12, 9), (3, 20), (9, 11)), 3: ((2, 8, 5), (3, 3, 12))}
        spatial, shapes = (), few[len(workload.kernel_size)]
    elif workload.key_spatial:
        both = zip(spatial, workload.spatial, workload.key_spatial, strict=True)
        key_spatial = tuple(max(1, n * keys // queries) for n, queries, keys in both)
    window = workload.window
    dilation = tuple(min(d, 2) for d in window.dilation)
    lengths = key_spatial or spatial or tuple(max(axis) for axis in zip(*shapes, strict=True))
    kernel = tuple(
        max(1, min(k, length // 2 + 1, length // d))
        for k, length, d in zip(workload.kernel_size, lengths, dilation, strict=True)
    )
    heads = 2 * workload.heads // workload.kv_heads
    head_dim, value_dim = (16 if dim == workload.head_dim else 8 for dim in workload.head_dims)
    return replace(
        workload, batch=1, spatial=spatial, heads=heads, kv_heads=2, head_dim=head_dim, value_dim=value_dim,
        kernel_size=kernel, stride=tuple(map(min, window.stride, kernel)), dilation=dilation,
        registers=min(workload.registers, 3), shapes=shapes, key_spatial=key_spatial,
    )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Random tensors in raster order, heads last; ``[N, heads, dim]`` if samples are packed."""

    query: Tensor  # [B, *spatial, Hq, D]
    key: Tensor  # [B, *key_spatial, Hkv, D]
    value: Tensor  # [B, *key_spatial, Hkv, Dv]
    grad_out: Tensor  # [B, *spatial, Hq, Dv]
    additional_keys: Tensor | None = None  # [B, R, Hkv, D]
    additional_values: Tensor | None = None  # [B, R, Hkv, Dv]
    sink: Tensor | float | None = None  # [Hq] fp32, or one logit
    key_mask: Tensor | None = None  # [1, *key_spatial] bool
    rpb: Tensor | None = None  # [Hq, 2 * kernel_size - 1 per axis] fp32


def make_inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
    """Normally distributed data. Zeros would be timed too fast: a chip's power, and so its clock, depends on data."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=workload.dtype, generator=generator)

    query, grad_out = (normal(*workload.query_axes, workload.heads, dim) for dim in workload.head_dims)
    key, value = (normal(*workload.key_axes, workload.kv_heads, dim) for dim in workload.head_dims)
    return Inputs(query, key, value, grad_out, key_mask=workload.key_mask(device))


def add_variant(inputs: Inputs, variant: Variant, seed: int) -> Inputs:
    """``inputs`` with registers, sink and bias; query, key and value are shared, not copied."""
    query, key = inputs.query, inputs.key
    generator = torch.Generator(query.device).manual_seed(seed)
    if variant.registers:
        if query.ndim == 3:
            raise ValueError(f"packed samples are measured without registers, got {variant.registers}")
        keys, values = (
            torch.randn(
                x.shape[0], variant.registers, *x.shape[-2:], device=x.device, dtype=x.dtype, generator=generator
            )
            for x in (key, inputs.value)
        )
        inputs = replace(inputs, additional_keys=keys, additional_values=values)
    if variant.sink == "learned":
        # The sink is so large that leaving it out changes every result by far more than rounding does, and it is exact
        # in bf16, the dtype in which some peers take it.
        sink = 3 + torch.randn(query.shape[-2], device=query.device, generator=generator)
        inputs = replace(inputs, sink=sink.bfloat16().float())
    elif variant.sink == "zero":
        inputs = replace(inputs, sink=0.0)
    if variant.bias:
        inputs = replace(inputs, rpb=torch.randn(variant.bias, device=query.device, generator=generator))
    return inputs


@dataclass(frozen=True)
class Floor:
    """Lower bounds on the work of one call."""

    flop: int
    """Floating point operations of the matrix products over visible pairs."""
    bytes: int
    """Bytes to read or write every tensor once."""

    element_size: int = 2

    def seconds(self, copy_rate: float, matmul_rate: float) -> float:
        """Time at rates in bytes/s and bf16 FLOP/s; with four-byte elements, matrix units reach half of the latter."""
        return max(self.flop / (matmul_rate * 2 / self.element_size), self.bytes / copy_rate)


def floor(workload: Workload, mode: Mode) -> Floor:
    """The floor of a forward, a backward, or both.

    Forward: two matrix products; q, k, v are read, out written. Backward: five matrix products, three of them as wide
    as queries and two as wide as values; q, k, v, out and its gradient are read, three gradients written. Row
    statistics, sinks and biases are small and left out, and so are the bytes of registers.
    """
    pairs = 2 * workload.batch * workload.heads * workload.visible_pairs()
    head_dim, value_dim = workload.head_dims
    width = workload.dtype.itemsize
    size = width * workload.elements()
    forward, backward = head_dim + value_dim, 3 * head_dim + 2 * value_dim
    return {
        "fwd": Floor(pairs * forward, size, width),
        "bwd": Floor(pairs * backward, 2 * size, width),
        "fwdbwd": Floor(pairs * (forward + backward), 3 * size, width),
    }[mode]
