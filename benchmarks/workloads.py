"""The anchor workloads, their inputs, and the time below which no implementation can go."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from natten_layers.geometry import window_bounds

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
class Workload:
    """One attention problem, stride and dilation 1."""

    name: str
    batch: int
    spatial: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    causal: bool = False
    learned_sink: bool = False

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def query_elements(self) -> int:
        return self.batch * math.prod(self.spatial) * self.heads * self.head_dim

    def kv_elements(self) -> int:
        return self.query_elements() // self.heads * self.kv_heads

    def visible_pairs(self) -> int:
        """Query-key pairs inside the windows of one image and one head, exactly."""
        pairs = 1
        for length, kernel in zip(self.spatial, self.kernel_size, strict=True):
            first, last = window_bounds(torch.arange(length), length, kernel, 1, self.causal)
            pairs *= int((last - first + 1).sum())
        return pairs


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
    """The same problem in miniature, so that every line of a benchmark runs on a CPU in a moment."""
    spatial = {1: (96,), 2: (16, 16), 3: (4, 8, 8)}[len(workload.spatial)]
    kernel = tuple(min(k, length // 2 + 1) for k, length in zip(workload.kernel_size, spatial, strict=True))
    heads = 2 * workload.heads // workload.kv_heads
    return replace(workload, batch=1, spatial=spatial, heads=heads, kv_heads=2, head_dim=16, kernel_size=kernel)


@dataclass(frozen=True)
class Variant:
    """What a workload is run with beyond its windows."""

    registers: int = 0
    sink: Literal["zero", "learned"] | None = None

    @property
    def label(self) -> str:
        parts = [f"{self.registers} registers"] if self.registers else []
        return " + ".join([*parts, *([f"{self.sink} sink"] if self.sink else [])])


@dataclass(frozen=True)
class Inputs:
    """Random tensors in raster order, heads last."""

    query: Tensor  # [B, *spatial, Hq, D]
    key: Tensor  # [B, *spatial, Hkv, D]
    value: Tensor  # [B, *spatial, Hkv, D]
    grad_out: Tensor  # [B, *spatial, Hq, D]
    additional_keys: Tensor | None = None  # [B, R, Hkv, D]
    additional_values: Tensor | None = None  # [B, R, Hkv, D]
    sink: Tensor | float | None = None  # [Hq] fp32, or one logit


def make_inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
    """Normal data, never zeros: the chip's clock, and so the time, depends on how many bits flip."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(length: tuple[int, ...], heads: int) -> Tensor:
        shape = (workload.batch, *length, heads, workload.head_dim)
        return torch.randn(shape, device=device, dtype=DTYPE, generator=generator)

    query, grad_out = (normal(workload.spatial, workload.heads) for _ in range(2))
    key, value = (normal(workload.spatial, workload.kv_heads) for _ in range(2))
    return Inputs(query, key, value, grad_out)


def add_variant(inputs: Inputs, variant: Variant, seed: int) -> Inputs:
    """``inputs`` with registers and sink; query, key and value are shared, not copied."""
    query, key = inputs.query, inputs.key
    generator = torch.Generator(query.device).manual_seed(seed)
    if variant.registers:
        shape = (key.shape[0], variant.registers, *key.shape[-2:])
        keys, values = (torch.randn(shape, device=key.device, dtype=key.dtype, generator=generator) for _ in range(2))
        inputs = replace(inputs, additional_keys=keys, additional_values=values)
    if variant.sink == "learned":
        # Large enough that a forgotten sink changes every result by far more than rounding does.
        # Exact in bf16, which some peers take it in.
        sink = 3 + torch.randn(query.shape[-2], device=query.device, generator=generator)
        inputs = replace(inputs, sink=sink.bfloat16().float())
    elif variant.sink == "zero":
        inputs = replace(inputs, sink=0.0)
    return inputs


@dataclass(frozen=True)
class Floor:
    """Lower bounds of one call."""

    flop: int
    """useful floating point operations: matrix products over visible pairs only"""
    bytes: int
    """every tensor read or written once"""

    def seconds(self, copy_rate: float, matmul_rate: float) -> float:
        """With rates in bytes/s and FLOP/s."""
        return max(self.flop / matmul_rate, self.bytes / copy_rate)


def floor(workload: Workload, mode: Mode) -> Floor:
    """The floor of a forward, or of a forward and backward.

    Forward: two matrix products; q, k, v are read, out written. Backward: five matrix products; q, k, v, out and its
    gradient are read, three gradients written. Row statistics, registers and sinks are small and left out.
    """
    product = 2 * workload.batch * workload.heads * workload.head_dim * workload.visible_pairs()
    width = DTYPE.itemsize
    q, kv = width * workload.query_elements(), width * workload.kv_elements()
    if mode == "fwd":
        return Floor(2 * product, 2 * q + 2 * kv)
    return Floor(7 * product, 6 * q + 6 * kv)
