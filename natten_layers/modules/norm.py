"""Root-mean-square norms and the cosine normalisation of queries and keys.

Statistics are computed in fp32, or in fp64 for inputs in fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_flags, is_finite_number, no_tensor
from ..eager import autocasts
from ..wording import shorten
from .base import at_least_fp32, check_count

__all__ = ["AdaRMSNorm", "RMSNorm", "cosine_normalize", "rms_normalize"]


def _check_eps(eps: object) -> None:
    if not is_finite_number(eps) or eps < 0:
        raise ValueError(f"eps must be a finite number of at least 0, got {shorten(eps)}")


def _statistics(x: Tensor) -> Tensor:
    return x.to(at_least_fp32(x.dtype))


def rms_normalize(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    """``x * gain * rsqrt(mean(x ** 2) + eps)`` over the last axis, computed in fp32 or better.

    Source: Zhang and Sennrich 2019 (https://arxiv.org/abs/1910.07467).

    Args:
        x: ``[..., C]``.
        gain: ``[..., C]``, broadcastable to ``x``.
        eps: added to the mean square.

    Returns:
        ``[..., C]`` in ``x``'s dtype.
    """
    wide = _statistics(x)
    return (wide * (_statistics(gain) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))).to(x.dtype)


def cosine_normalize(x: Tensor, gain: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``x * gain * rsqrt(sum(x ** 2) + eps)`` over the last axis, computed in fp32 or better.

    Args:
        x: ``[..., heads, D]``.
        gain: ``[heads]``, or None for 1.
        eps: added to the sum of squares.

    Returns:
        ``[..., heads, D]`` in ``x``'s dtype.
    """
    wide = _statistics(x)
    factor = torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    if gain is not None:
        factor = factor * _statistics(gain)[:, None]
    return (wide * factor).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the last axis, with an optional zero-centered gain.

    Args:
        dim: length of the last axis.
        eps: added to the mean square.
        zero_centered: if true, the gain is ``1 + weight`` and ``weight`` starts at 0 (Gemma), so that weight decay
            pulls the gain to 1. Otherwise the gain is ``weight``, which starts at 1.

    Raises:
        ValueError: ``dim`` is below 1, ``eps`` no finite number from 0 on, or ``zero_centered`` no bool. The call:
            ``x`` is no tensor that ends in ``dim``.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        zero_centered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("dim", dim)
        _check_eps(eps)
        check_flags(zero_centered=zero_centered)
        self.zero_centered = zero_centered  # set before super().__init__, which calls reset_parameters
        super().__init__(dim, eps, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", zero_centered=True" if self.zero_centered else "")

    def gain(self) -> Tensor:
        return 1 + _statistics(self.weight) if self.zero_centered else self.weight

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        if not isinstance(x, Tensor):
            raise no_tensor("x", x)
        if x.shape[-1:] != self.weight.shape:
            raise ValueError(f"x {tuple(x.shape)} must end in the normalised axis of length {self.weight.shape[0]}")
        gain = self.gain()
        # torch's fused kernel requires a gain of x's dtype, and autocast does not cast for it.
        if gain.dtype == x.dtype and not autocasts(x.device.type):
            return F.rms_norm(x, gain.shape, gain, self.eps)
        return rms_normalize(x, gain, self.eps)

    __call__: Callable[..., Tensor]


class AdaRMSNorm(nn.Module):
    """RMS norm whose gain ``1 + linear(cond)`` depends on a condition. The gain is 1 at initialisation.

    Source: the adaptive norm of HDiT (Crowson et al. 2024, https://arxiv.org/abs/2401.11605).

    Args:
        dim: length of the last axis of ``x``.
        cond_dim: length of the last axis of ``cond``.
        eps: added to the mean square.

    Raises:
        ValueError: ``dim`` or ``cond_dim`` is below 1, or ``eps`` no finite number from 0 on.
    """

    def __init__(
        self,
        dim: int,
        cond_dim: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("cond_dim", cond_dim)
        _check_eps(eps)
        self.dim, self.cond_dim, self.eps = dim, cond_dim, eps
        self.linear = nn.Linear(cond_dim, dim, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.linear.weight)

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()  # keeps the random generator in step with the constructor, which draws them too
        nn.init.zeros_(self.linear.weight)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

    def forward(self, x: Tensor, cond: Tensor, sample: Tensor | None = None) -> Tensor:
        """Normalise ``x [B, *spatial, dim]`` with the gain that ``cond [B, cond_dim]`` determines.

        ``x [N, dim]`` of packed samples has its row of ``cond`` at ``sample [N]``.

        Raises:
            ValueError: an argument is no tensor, or shapes do not fit.
        """
        for name, tensor in (("x", x), ("cond", cond)):
            if not isinstance(tensor, Tensor):
                raise no_tensor(name, tensor)
        if cond.ndim != 2 or cond.shape[1] != self.cond_dim or x.shape[-1] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and cond {tuple(cond.shape)}; expected [B, *spatial, "
                f"{self.dim}] and [B, {self.cond_dim}]"
            )
        gain = 1 + _statistics(self.linear(cond))
        if sample is not None:
            return rms_normalize(x, gain.index_select(0, sample), self.eps)
        return rms_normalize(x, gain.view(gain.shape[0], *(1,) * (x.ndim - 2), gain.shape[1]), self.eps)

    __call__: Callable[..., Tensor]
