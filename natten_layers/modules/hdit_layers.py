"""What HDiT is made of: embeddings of the conditions, changes of resolution, and the layers of a level.

Shapes are those of ``hdit.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..explanation import Explanation
from ..operations import neighborhood_attention
from .attention import NeighborhoodGQA
from .axial_rope import AxialRoPE, axial_bounds
from .base import Constants, at_least_fp32, default_dtype
from .feed_forward import GEGLU
from .hdit_config import IMAGE_AXES, HDiTConfig, LevelConfig
from .norm import AdaRMSNorm, RMSNorm
from .packed_images import PackedImages, join_blocks, split_blocks
from .query_key import Heads, Prepared, Projected
from .rope import Positions

__all__ = [
    "MERGED",
    "FourierFeatures",
    "MappingNetwork",
    "PatchOut",
    "TokenMerge",
    "TokenSplit",
    "TransformerLayer",
    "check_rings",
    "make_level",
]

MERGED = (2, 2)  # tokens that become one on the next level


class FourierFeatures(Constants):
    """``cat(cos, sin)(2 pi x W^T)`` with fixed random frequencies ``weight [out_features / 2, in_features]``.

    Everything is computed in fp32 or better: angles may exceed a full circle several times, and bf16 would be off by a
    tenth of a radian.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        if out_features % 2:
            raise ValueError(f"mapping_width must be even, got {out_features}")
        self.register_buffer("weight", torch.randn(out_features // 2, in_features, dtype=default_dtype()))

    def reset_parameters(self) -> None:
        self.weight.normal_()

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x.dtype)
        phases = 2 * math.pi * x.to(wide)[..., None, :] * self.weight.to(wide)  # [..., out_features / 2, in_features]
        # A sum instead of a matrix product, which autocast would compute in half precision, and torch perhaps in TF32.
        angle = phases.sum(-1)
        return torch.cat((angle.cos(), angle.sin()), -1)


class TokenMerge(nn.Module):
    """Join ``h`` x ``w`` tokens into one, then Linear: ``[B, H, W, in]`` to ``[B, H / h, W / w, out]``.

    ``images``, in this and the other modules, are those of packed tokens ``[N, in]`` before they are joined.
    """

    def __init__(self, in_features: int, out_features: int, patch_size: tuple[int, int] = MERGED) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_features * math.prod(patch_size), out_features, bias=False)

    def forward(self, x: Tensor, images: PackedImages | None = None) -> Tensor:
        return self.proj(join_blocks(x, self.patch_size, images))


class TokenSplit(nn.Module):
    """Linear, then split each token into 2 x 2, then ``lerp(skip, x, fac)``.

    Maps ``x [B, H, W, in]`` and ``skip [B, 2 H, 2 W, out]`` to ``[B, 2 H, 2 W, out]``.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, 4 * out_features, bias=False)
        self.fac = nn.Parameter(torch.full([1], 0.5))

    def reset_parameters(self) -> None:
        self.proj.reset_parameters()
        nn.init.constant_(self.fac, 0.5)

    def forward(self, x: Tensor, skip: Tensor, images: PackedImages | None = None) -> Tensor:
        x = split_blocks(self.proj(x), MERGED, images)
        return torch.lerp(skip, x, self.fac.to(x.dtype))


class PatchOut(nn.Module):
    """Linear, then split each token into ``h`` x ``w`` pixels: ``[B, H, W, in]`` to ``[B, H h, W w, out]``."""

    def __init__(self, in_features: int, out_features: int, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_features, out_features * math.prod(patch_size), bias=False)

    def forward(self, x: Tensor, images: PackedImages | None = None) -> Tensor:
        return split_blocks(self.proj(x), self.patch_size, images)


class MappingBlock(nn.Module):
    def __init__(self, width: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mlp = GEGLU(width, d_ff, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class MappingNetwork(nn.Module):
    """Turn the sum of all embeddings into the condition of every layer: ``[B, width]`` to ``[B, width]``."""

    def __init__(self, width: int, depth: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.in_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(MappingBlock(width, d_ff, dropout) for _ in range(depth))
        self.out_norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


# --- Layers


class ShiftedWindowGQA(NeighborhoodGQA):
    """Attention inside the square windows of a shifted grid (Swin, Liu et al. 2021, https://arxiv.org/abs/2103.14030).

    Windows that are cut off at the two ends of an axis are not joined, as in Swin with its mask: a shifted axis has a
    first window of ``window_size - shift`` tokens, then whole windows, and a last one of ``shift`` tokens.
    """

    def __init__(self, embed_dim: int, num_heads: int, window_size: int, shift: int, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, window_size, stride=window_size, **options)
        self.window_size, self.shift = window_size, shift

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift={self.shift}"

    def _attention(self, projected: Projected, registers: Heads | None, mask: Tensor | None) -> Tensor:
        heads = projected.prepared()
        # Each pair of row and column ranges has windows of one size: one blocked call on a view, without mask or copy.
        rows, columns = (self._stretches(length) for length in heads.query.shape[1:3])
        lines = ([self._block(heads, registers, mask, r, c) for c in columns] for r in rows)
        return torch.cat([torch.cat(line, 2) for line in lines], 1)

    def explain(self, *args: Any, **options: Any) -> Explanation:
        raise ValueError("shifted windows are several calls of attention; ask natten_layers.explain for one of them")

    def _prepare_packed(self, *args: Any, **options: Any) -> Prepared:
        raise ValueError("shifted windows are not computed on packed samples; pass images [B, height, width, channels]")

    def _stretches(self, length: int) -> list[tuple[int, int, int]]:
        """Ranges of an axis with windows of equal size, each as (start, stop, window size)."""
        size, shift = self.window_size, self.shift
        if shift == 0:
            return [(0, length, size)]
        first, last = size - shift, length - shift
        return [(0, first, first), *([(first, last, size)] if first < last else []), (last, length, shift)]

    def _block(
        self,
        heads: Heads,
        registers: Heads | None,
        mask: Tensor | None,
        rows: tuple[int, int, int],
        columns: tuple[int, int, int],
    ) -> Tensor:
        query, key, value = (t[:, rows[0] : rows[1], columns[0] : columns[1]] for t in heads)
        return neighborhood_attention(
            query,
            key,
            value,
            (rows[2], columns[2]),
            stride=(rows[2], columns[2]),
            scale=self.scale,
            additional_keys=None if registers is None else registers.key,
            additional_values=None if registers is None else registers.value,
            sink=self.sink,
            key_mask=None if mask is None else mask[:, rows[0] : rows[1], columns[0] : columns[1]],
        )


def _ring_lengths(size: Sequence[int], patch_size: Sequence[int]) -> tuple[float, float]:
    """How long the axes of an image are in the positions of its tokens, which do not differ between levels."""
    height, width = (pixels // patch for pixels, patch in zip(size, patch_size, strict=True))
    bounds = axial_bounds(height, width)
    return 2 * bounds[0], 2 * bounds[1]


def check_rings(size: Sequence[int], config: HDiTConfig) -> None:
    """Raise if a periodic axis of an image is not as long, in positions, as the ring that the model has learned."""
    lengths, expected = (_ring_lengths(one, config.patch_size) for one in (size, config.input_size))
    for axis, length, period in zip(IMAGE_AXES, lengths, expected, strict=True):
        if any(level.wraps(axis) for level in config.levels) and abs(length - period) > 1e-6 * period:
            raise ValueError(
                f"the {axis} of an image {size[0]}x{size[1]} is {length:g} long in RoPE's positions, where the long "
                f"side is 2, but is_periodic makes it a ring of {period:g}, as in images of input_size "
                f"{config.input_size[0]}x{config.input_size[1]}; give images of that aspect ratio"
            )


def _make_attention(level: LevelConfig, config: HDiTConfig, index: int) -> NeighborhoodGQA:
    """The attention of a layer; ``index`` counts the layers of the level, first those down and then those up."""
    lengths = _ring_lengths(config.input_size, config.patch_size)
    periods = [n if level.wraps(axis) else None for axis, n in zip(IMAGE_AXES, lengths, strict=True)]
    rope = AxialRoPE(level.d_head, level.num_heads, num_kv_heads=level.num_kv_heads, periods=periods)
    options: dict[str, Any] = {
        "num_kv_heads": level.num_kv_heads,
        "num_registers": level.num_registers,
        "sink": level.sink,
        "rope": rope,
        "qk_norm": "cosine",
        "dropout": level.dropout,
        "qkv_bias": False,
        "out_bias": False,
    }
    if level.attention == "shifted-window":
        assert level.window_size is not None
        shift = level.window_size // 2 if index % 2 else 0
        return ShiftedWindowGQA(level.width, level.num_heads, level.window_size, shift, **options)
    if level.attention == "global":  # sees the whole ring without windows
        return NeighborhoodGQA(level.width, level.num_heads, None, **options)
    options |= {"dilation": level.dilation, "is_periodic": level.is_periodic}
    return NeighborhoodGQA(level.width, level.num_heads, level.kernel_size, **options)


class SelfAttention(nn.Module):
    def __init__(self, level: LevelConfig, config: HDiTConfig, index: int) -> None:
        super().__init__()
        self.norm = AdaRMSNorm(level.width, config.mapping_width)
        self.attn = _make_attention(level, config, index)

    def forward(self, x: Tensor, pos: Positions, cond: Tensor, images: PackedImages | None = None) -> Tensor:
        if images is None:
            return x + self.attn(self.norm(x, cond), positions=pos)
        return x + self.attn(self.norm(x, cond, images.image), positions=pos, shapes=images.shapes)


class FeedForward(nn.Module):
    def __init__(self, level: LevelConfig, cond_dim: int) -> None:
        super().__init__()
        assert level.d_ff is not None
        self.norm = AdaRMSNorm(level.width, cond_dim)
        self.mlp = GEGLU(level.width, level.d_ff, dropout=level.dropout)

    def forward(self, x: Tensor, cond: Tensor, images: PackedImages | None = None) -> Tensor:
        return x + self.mlp(self.norm(x, cond, None if images is None else images.image))


class TransformerLayer(nn.Module):
    def __init__(self, level: LevelConfig, config: HDiTConfig, index: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(level, config, index) if level.attention != "none" else None
        self.ff = FeedForward(level, config.mapping_width)

    def forward(self, x: Tensor, pos: Positions, cond: Tensor, images: PackedImages | None = None) -> Tensor:
        if self.self_attn is not None:
            x = self.self_attn(x, pos, cond, images)
        return self.ff(x, cond, images)


def make_level(config: HDiTConfig, level_index: int, *, up: bool = False) -> nn.ModuleList:
    """The layers of a level on the way down, or with ``up`` those on the way up, whose indices follow."""
    level = config.levels[level_index]
    first = level.depth if up else 0
    try:
        return nn.ModuleList(TransformerLayer(level, config, first + i) for i in range(level.depth))
    except ValueError as error:
        raise ValueError(f"level {level_index}: {error}") from error
