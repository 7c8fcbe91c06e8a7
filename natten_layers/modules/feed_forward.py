"""Gated feed-forward layers, and a mixture of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_flags
from ..wording import shorten
from .base import at_least_fp32, check_count, check_last_axis, check_probability

__all__ = ["GEGLU", "Activation", "GatedFeedForward", "MixtureOfExperts"]

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]


class GEGLU(nn.Module):
    """``down_proj(dropout(value * gelu(gate)))`` with ``value, gate = up_proj(x)`` and the exact gelu.

    It maps ``[..., dim]`` to ``[..., dim]``. Source: Shazeer 2020 (https://arxiv.org/abs/2002.05202).

    Args:
        dim: length of the last axis of input and output.
        hidden_dim: length between the projections; ``up_proj`` has ``2 * hidden_dim`` rows, those of values first.
        dropout: probability with which a hidden element is dropped in training.
        bias: whether both projections have a bias.

    Raises:
        ValueError: ``dim`` or ``hidden_dim`` is below 1, ``dropout`` no number from 0 to 1, or ``bias`` no bool. The
            call: ``x`` is no tensor that ends in ``dim``.
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
        check_count("dim", dim)
        check_count("hidden_dim", hidden_dim)
        check_flags(bias=bias)
        self.dim = dim
        self.up_proj = nn.Linear(dim, 2 * hidden_dim, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(check_probability("dropout", dropout))
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.up_proj.reset_parameters()
        self.down_proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_last_axis(x, self.dim)
        value, gate = self.up_proj(x).chunk(2, -1)
        return self.down_proj(self.dropout(value * F.gelu(gate)))

    __call__: Callable[..., Tensor]


class GatedFeedForward(nn.Module):
    """``down_proj(activation(gate_proj(x)) * up_proj(x))``, with the parameter names of Llama's checkpoints.

    It maps ``[..., dim]`` to ``[..., dim]``. Source: Shazeer 2020 (https://arxiv.org/abs/2002.05202).

    Args:
        dim: length of the last axis of input and output.
        hidden_dim: length between the projections.
        activation: applied to the gate; "gelu_tanh" is the tanh approximation of gelu. "clamped_swiglu" is gpt-oss's:
            ``(up + 1) * gate * sigmoid(swiglu_alpha * gate)`` of a gate that is at most ``swiglu_limit`` and an ``up``
            between ``-swiglu_limit`` and ``swiglu_limit``.
        bias: whether the projections have a bias.
        swiglu_alpha, swiglu_limit: of "clamped_swiglu".

    Raises:
        ValueError: ``dim`` or ``hidden_dim`` is below 1, ``activation`` unknown, or ``bias`` no bool. The call: ``x``
            is no tensor that ends in ``dim``.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "silu",
        bias: bool = False,
        swiglu_alpha: float = 1.702,
        swiglu_limit: float = 7.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("hidden_dim", hidden_dim)
        check_flags(bias=bias)
        if activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {get_args(Activation)}, got {shorten(activation)}")
        self.dim, self.activation = dim, activation
        self.swiglu_alpha, self.swiglu_limit = swiglu_alpha, swiglu_limit
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    def forward(self, x: Tensor) -> Tensor:
        check_last_axis(x, self.dim)
        return self.down_proj(self._gated(self.gate_proj(x), self.up_proj(x)))

    __call__: Callable[..., Tensor]

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.activation == "clamped_swiglu":
            gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
            return (up + 1) * (gate * torch.sigmoid(gate * self.swiglu_alpha))
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return gate * up


class MixtureOfExperts(nn.Module):
    """The sum of a few of many feed-forward layers, chosen and weighted for each token by a linear router.

    It maps ``[..., dim]`` to ``[..., dim]``. Experts run one after the other, each on its tokens; the host waits once a
    call, for their numbers. There is no loss that balances experts. Source: Shazeer et al. 2017
    (https://arxiv.org/abs/1701.06538), in the form of Mixtral (Jiang et al. 2024, https://arxiv.org/abs/2401.04088).

    Args:
        make_expert: makes an expert, which maps ``[N, dim]`` to ``[N, dim]``.
        num_experts: how many.
        experts_per_token: of them, those with the highest scores.
        dim: length of the last axis of input and output.
        normalize: the chosen experts' weights are the softmax of their own scores, so they add up to 1. Otherwise they
            are what the softmax of all scores gives them.
        bias: whether the router has a bias.

    Raises:
        ValueError: ``make_expert`` cannot be called, ``dim`` is below 1, there are fewer experts than a token takes, or
            ``normalize`` or ``bias`` is no bool. The call: ``x`` is no tensor that ends in ``dim``.
    """

    def __init__(
        self,
        make_expert: Callable[[], nn.Module],
        num_experts: int,
        experts_per_token: int,
        dim: int,
        *,
        normalize: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not callable(make_expert):
            raise ValueError(f"make_expert must be a function that makes an expert, got {shorten(make_expert)}")
        check_count("dim", dim)
        check_count("experts_per_token", experts_per_token)
        check_count("num_experts", num_experts, least=experts_per_token)
        check_flags(normalize=normalize, bias=bias)
        self.dim, self.experts_per_token, self.normalize = dim, experts_per_token, normalize
        self.router = nn.Linear(dim, num_experts, bias=bias, device=device, dtype=dtype)
        self.experts = nn.ModuleList(make_expert() for _ in range(num_experts))

    def extra_repr(self) -> str:
        return f"experts_per_token={self.experts_per_token}, normalize={self.normalize}"

    def forward(self, x: Tensor) -> Tensor:
        check_last_axis(x, self.dim)
        tokens = x.reshape(-1, self.dim)  # [N, dim]
        weights, chosen = self._route(tokens)  # [N, K]
        by_expert = chosen.flatten().argsort(stable=True)  # [N * K]
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        results = [
            expert(tokens[part // self.experts_per_token])
            for expert, part in zip(self.experts, by_expert.split(counts), strict=True)
            # With gradients, an expert without tokens runs too: its gradient is then 0 instead of missing, for which
            # data-parallel training would have to search. So do all where there are no tokens at all.
            if len(part) or torch.is_grad_enabled() or not len(tokens)
        ]
        results = torch.cat(results)[by_expert.argsort()].unflatten(0, chosen.shape)  # [N, K, dim]
        return (results * weights[..., None].to(results.dtype)).sum(1).view_as(x)

    __call__: Callable[..., Tensor]

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weights ``[N, K]``, in fp32 or better, and the indices ``[N, K]`` of each token's experts."""
        scores = self.router(tokens)
        scores = scores.to(at_least_fp32(scores.dtype))
        if not self.normalize:
            return scores.softmax(-1).topk(self.experts_per_token)
        chosen, indices = scores.topk(self.experts_per_token)
        return chosen.softmax(-1), indices
