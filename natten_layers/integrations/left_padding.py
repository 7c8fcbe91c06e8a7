"""Rows of a batch whose padding comes before their tokens, in an order in which it comes behind them.

No causal query sees what is behind it, so that order needs no mask, and kernels with a backward pass compute it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["is_one_stretch", "move", "tokens_first"]


def is_one_stretch(real: Tensor) -> bool:
    """Whether no row of ``real [B, T]``, False at padding, has padding between its tokens. Waits for the device."""
    begins = real & ~F.pad(real, (1, 0))[:, :-1]
    return bool((begins.sum(1) <= 1).all())


def tokens_first(real: Tensor) -> tuple[Tensor, Tensor]:
    """Where each element of a row goes when the row is turned so that its tokens come first, and where each comes from.

    A stretch of tokens keeps its order, and with it which tokens a window holds.

    Args:
        real: ``[B, T]``, False at padding; each row is one stretch of tokens, or padding alone.

    Returns:
        ``(places, sources)``, int64 ``[B, T]``; each undoes the other.
    """
    length = real.shape[1]
    index, first = torch.arange(length, device=real.device), real.int().argmax(1, keepdim=True)
    return (index - first) % length, (index + first) % length


def move(x: Tensor, places: Tensor) -> Tensor:
    """``x [B, T, H, D]`` with the element ``t`` of a row at ``places[b, t]``, of which no two are equal.

    It scatters because the gradient is gathered then; that of a gather would be summed with atomics.
    """
    return x.new_empty(x.shape).scatter_(1, places[..., None, None].expand_as(x), x)
