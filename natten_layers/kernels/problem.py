"""One call of the kernels on the host: canonical tensors, three axes, and the arguments that all launchers pass on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, prod
from operator import mul
from typing import TypeVar

import torch
from torch import Tensor

from .configs import Box, Launch, ProblemClass, next_power_of_2, padded_head_dim

T = TypeVar("T", int, bool)


def three_axes(values: Sequence[T], fill: T) -> tuple[T, T, T]:
    """``t, h, w`` from one to three axes."""
    t, h, w = (fill,) * (3 - len(values)) + tuple(values)
    return t, h, w


def strides(tensor: Tensor) -> tuple[int, ...]:
    """``(batch, t, h, w, head)`` of ``[B, *spatial, H, D]``."""
    return tensor.stride(0), *three_axes(tensor.stride()[1:-2], 0), tensor.stride(-2)


def register_strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """``(batch, register, head)`` of ``[B, R, H, D]``."""
    return (tensor.stride(0), tensor.stride(1), tensor.stride(2)) if tensor is not None else (0, 0, 0)


SHARED_MEMORY = 227 * 1024
"""of an H100 or H200: where a device does not tell"""


@lru_cache
def device_traits(device: torch.device) -> tuple[str, int]:
    """Its name, and the bytes of shared memory that a program can have on it."""
    if device.type != "cuda":
        return device.type, SHARED_MEMORY  # Triton's interpreter has no limit
    properties = torch.cuda.get_device_properties(device)
    return properties.name, getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY)


@dataclass(frozen=True)
class Problem:
    """Tensors as ``functional`` validated them, last axes contiguous; the rest is derived."""

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None
    additional_values: Tensor | None
    sink: Tensor | None
    sink_value: float | None
    kernel_size: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    is_causal: tuple[bool, bool, bool]
    scale: float

    @cached_property
    def rank(self) -> int:
        return self.query.ndim - 3

    @cached_property
    def lengths(self) -> Box:
        return three_axes(self.query.shape[1:-2], 1)

    @cached_property
    def wide(self) -> bool:
        """Whether offsets inside one image need 64 bits. Offsets of images and heads always have them."""
        spans = [sum(map(mul, x.shape[1:-2], x.stride()[1:-2])) for x in (self.query, self.key, self.value)]
        out = prod(self.lengths) * self.query.shape[-2] * self.value.shape[-1]
        # Chunks may reach past the end of an axis by less than their own size.
        return 2 * max(out, *spans) >= 2**31

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
        """Registers that a program takes at a time; 0 without registers."""
        return min(max(16, next_power_of_2(self.registers)), 64) if self.registers else 0

    @property
    def sink_kind(self) -> str:
        return "tensor" if self.sink is not None else "none" if self.sink_value is None else "value"

    @cached_property
    def problem_class(self) -> ProblemClass:
        """What the choice of tiles depends on."""
        t, h, w = (ceil(n / d) for n, d in zip(self.lengths, self.dilation, strict=True))
        return ProblemClass(
            *device_traits(self.query.device), (t, h, w), self.kernel_size, self.group,
            self.query.shape[-1], self.value.shape[-1], self.query.element_size(),
        )  # fmt: skip

    def tiles(self, tile: Box) -> Box:
        """Tiles per axis, over all its residue classes."""
        t, h, w = (d * ceil(ceil(n / d) / b) for n, d, b in zip(self.lengths, self.dilation, tile, strict=True))
        return t, h, w

    def programs(self, launch: Launch) -> int:
        t, h, w = self.tiles(launch.tile)
        return self.query.shape[0] * t * h * w * self.kv_heads * -(-self.group // launch.pack)

    def input_strides(self) -> tuple[tuple[int, ...], ...]:
        return (
            strides(self.query), strides(self.key), strides(self.value),
            register_strides(self.additional_keys), register_strides(self.additional_values),
        )  # fmt: skip

    def mask(self, launch: Launch) -> str:
        """How the kernels mask: a score of -inf that is scaled later needs a positive scale."""
        return "border" if launch.skip_mask else "add" if self.scale > 0 else "select"

    def constants(self) -> dict[str, object]:
        """Compile-time arguments that every kernel takes."""
        head_dim, value_dim = self.query.shape[-1], self.value.shape[-1]
        tf32 = self.query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        return {
            "D": head_dim,
            "BD": padded_head_dim(head_dim),
            "DV": value_dim,
            "BDV": padded_head_dim(value_dim),
            "BR": self.register_tile,
            "PRECISION": "tf32" if tf32 else "ieee",
            "RANK": self.rank,
            "WIDE": self.wide,
            "SCALE_FIRST": self.scale <= 0,
        }
