"""Images in blocks of tokens: those of a batch of one shape, or images of many shapes packed one after the other."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .axial_rope import make_axial_pos

__all__ = ["PackedImages", "join_blocks", "split_blocks"]

Block = tuple[int, int]


class PackedImages:
    """Images of many shapes in one tensor ``[N, C]``, each in raster order, and where their tokens are.

    Args:
        shapes: heights and widths, ``[images, 2]``, integers on the CPU.
        device: of the tokens.
    """

    def __init__(self, shapes: Tensor, device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        counts, width = torch.stack([shapes.prod(1), shapes[:, 1]]).to(device)  # one copy, as each waits
        tokens = int(shapes.prod(1).sum())
        self.image = torch.arange(len(shapes), device=device).repeat_interleave(counts, output_size=tokens)
        """``[N]``, the image that each token belongs to"""
        self.first = counts.cumsum(0) - counts
        """``[images]``, the index of each one's first token"""
        self.width = width
        """``[images]``"""
        self.orders: dict[Block, Tensor] = {}

    def coarser(self, block: Block) -> PackedImages:
        """The same images with a token for each block."""
        return PackedImages(self.shapes // torch.tensor(block), self.device)

    def positions(self, dtype: torch.dtype) -> Tensor:
        """:func:`make_axial_pos` of every image, ``[N, 2]``."""
        shapes = list(map(tuple, self.shapes.tolist()))
        known = {shape: make_axial_pos(*shape, dtype=dtype, device=self.device).flatten(0, 1) for shape in set(shapes)}
        nothing = torch.empty(0, 2, dtype=dtype, device=self.device)
        return torch.cat([nothing, *(known[shape] for shape in shapes)])

    def block_order(self, block: Block) -> Tensor:
        """``[N]``: the index of each token once blocks, in raster order, follow each other, in which tokens do.

        It is computed once, for tokens, positions and the way back.
        """
        if block not in self.orders:
            h, w = block
            width, first = (x.index_select(0, self.image) for x in (self.width, self.first))
            token = torch.arange(len(self.image), device=self.device) - first
            y, x = token // width, token % width
            self.orders[block] = first + (y // h * (width // w) + x // w) * (h * w) + y % h * w + x % w
        return self.orders[block]


def join_blocks(x: Tensor, block: Block, images: PackedImages | None = None) -> Tensor:
    """Tokens of a block side by side: ``[B, H, W, C]`` to ``[B, H / h, W / w, h * w * C]``.

    Of packed images, ``[N, C]`` to ``[N / (h * w), h * w * C]``.
    """
    h, w = block
    if images is None:
        return rearrange(x, "b (rows h) (columns w) c -> b rows columns (h w c)", h=h, w=w)
    return rearrange(x.index_select(0, images.block_order(block).argsort()), "(n p) c -> n (p c)", p=h * w)


def split_blocks(x: Tensor, block: Block, images: PackedImages | None = None) -> Tensor:
    """The inverse of :func:`join_blocks`; ``images`` are those of the single tokens."""
    h, w = block
    if images is None:
        return rearrange(x, "b rows columns (h w c) -> b (rows h) (columns w) c", h=h, w=w)
    return rearrange(x, "n (p c) -> (n p) c", p=h * w).index_select(0, images.block_order(block))
