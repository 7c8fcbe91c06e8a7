"""Gated feed-forward layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GEGLU", "GatedFeedForward"]


class GEGLU(nn.Module):
    """``down_proj(dropout(value * gelu(gate)))`` with ``value, gate = up_proj(x)`` and the exact gelu.

    It maps ``[..., dim]`` to ``[..., dim]``. Source: Shazeer 2020 (https://arxiv.org/abs/2002.05202).

    Args:
        dim: length of the last axis of input and output.
        hidden_dim: length between the projections; ``up_proj`` has ``2 * hidden_dim`` rows, those of values first.
        dropout: probability with which a hidden element is dropped in training.
        bias: whether both projections have a bias.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, 2 * hidden_dim, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.up_proj.reset_parameters()
        self.down_proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up_proj(x).chunk(2, -1)
        return self.down_proj(self.dropout(value * F.gelu(gate)))


class GatedFeedForward(nn.Module):
    """``down_proj(activation(gate_proj(x)) * up_proj(x))``, with the parameter names of Llama's checkpoints.

    It maps ``[..., dim]`` to ``[..., dim]``. Source: Shazeer 2020 (https://arxiv.org/abs/2002.05202).

    Args:
        dim: length of the last axis of input and output.
        hidden_dim: length between the projections.
        activation: applied to the gate; "gelu_tanh" is the tanh approximation of gelu.
        bias: whether the projections have a bias.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: Literal["silu", "gelu_tanh"] = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))
