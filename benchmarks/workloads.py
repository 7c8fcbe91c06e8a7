"""The anchor workloads, their inputs, and the floor: a time that no implementation can beat."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from natten_layers.geometry import Window, make_window, visible_pairs

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

Mode = Literal["fwd", "fwdbwd"]
MODES: tuple[Mode, ...] = ("fwd", "fwdbwd")

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Variant:
    """Registers and sink with which a workload runs."""

    registers: int = 0
    sink: Literal["zero", "learned"] | None = None

    @property
    def label(self) -> str:
        parts = [f"{self.registers} registers"] if self.registers else []
        return " + ".join([*parts, *([f"{self.sink} sink"] if self.sink else [])])


@dataclass(frozen=True)
class Workload:
    """One attention problem. ``causal``, ``stride`` and ``dilation`` are one value for all axes or one per axis."""

    name: str
    batch: int
    spatial: tuple[int, ...]
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

    @property
    def window(self) -> Window:
        return make_window(self.spatial, self.kernel_size, self.stride, self.dilation, self.causal)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def head_dims(self) -> tuple[int, int]:
        """Head dims of queries and keys, and of values."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def variant(self) -> Variant:
        """The registers and sink that the model itself has."""
        return Variant(self.registers, "learned" if self.learned_sink else None)

    def tokens(self) -> int:
        return self.batch * math.prod(self.spatial)

    def elements(self) -> int:
        """Number of elements of query, key, value and output together."""
        return self.tokens() * (self.heads + self.kv_heads) * sum(self.head_dims)

    def visible_pairs(self) -> int:
        """Exact number of query-key pairs of one image and one head, those with registers included."""
        return visible_pairs(self.spatial, self.window) + math.prod(self.spatial) * self.registers


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
    spatial = {1: (96,), 2: (16, 16), 3: (4, 8, 8)}[len(workload.spatial)]
    window = workload.window
    dilation = tuple(min(d, 2) for d in window.dilation)
    kernel = tuple(
        max(1, min(k, length // 2 + 1, length // d))
        for k, length, d in zip(workload.kernel_size, spatial, dilation, strict=True)
    )
    heads = 2 * workload.heads // workload.kv_heads
    head_dim, value_dim = (16 if dim == workload.head_dim else 8 for dim in workload.head_dims)
    return replace(
        workload, batch=1, spatial=spatial, heads=heads, kv_heads=2, head_dim=head_dim, value_dim=value_dim,
        kernel_size=kernel, stride=tuple(map(min, window.stride, kernel)), dilation=dilation,
        registers=min(workload.registers, 3),
    )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Random tensors in raster order, heads last."""

    query: Tensor  # [B, *spatial, Hq, D]
    key: Tensor  # [B, *spatial, Hkv, D]
    value: Tensor  # [B, *spatial, Hkv, Dv]
    grad_out: Tensor  # [B, *spatial, Hq, Dv]
    additional_keys: Tensor | None = None  # [B, R, Hkv, D]
    additional_values: Tensor | None = None  # [B, R, Hkv, Dv]
    sink: Tensor | float | None = None  # [Hq] fp32, or one logit


def make_inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
    """Normally distributed data. Zeros would be timed too fast: a chip's power, and so its clock, depends on data."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, dim: int) -> Tensor:
        shape = (workload.batch, *workload.spatial, heads, dim)
        return torch.randn(shape, device=device, dtype=workload.dtype, generator=generator)

    head_dim, value_dim = workload.head_dims
    query, grad_out = (normal(workload.heads, dim) for dim in workload.head_dims)
    return Inputs(query, normal(workload.kv_heads, head_dim), normal(workload.kv_heads, value_dim), grad_out)


def add_variant(inputs: Inputs, variant: Variant, seed: int) -> Inputs:
    """``inputs`` with registers and sink; query, key and value are shared, not copied."""
    query, key = inputs.query, inputs.key
    generator = torch.Generator(query.device).manual_seed(seed)
    if variant.registers:
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
    """The floor of a forward, or of a forward and backward.

    Forward: two matrix products; q, k, v are read, out written. Backward: five matrix products, three of them as wide
    as queries and two as wide as values; q, k, v, out and its gradient are read, three gradients written. Row
    statistics and sinks are small and left out, and so are the bytes of registers.
    """
    pairs = 2 * workload.batch * workload.heads * workload.visible_pairs()
    head_dim, value_dim = workload.head_dims
    width = workload.dtype.itemsize
    size = width * workload.elements()
    if mode == "fwd":
        return Floor(pairs * (head_dim + value_dim), size, width)
    return Floor(pairs * (4 * head_dim + 3 * value_dim), 3 * size, width)
