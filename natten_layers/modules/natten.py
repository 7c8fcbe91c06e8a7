"""NATTEN's modules (https://natten.org, 0.21): call sites and checkpoints move over unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ..checks import check_dense
from ..geometry import normalise_axes
from ..varlen import Shapes
from .attention import NeighborhoodGQA
from .base import check_probability
from .rope import Positions

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
]

Axes = int | Sequence[int]
Causal = bool | Sequence[bool]


class _NeighborhoodAttention(NeighborhoodGQA):
    """Multi-head neighborhood attention with the arguments and the state dict of NATTEN's module of this name.

    The :class:`NeighborhoodGQA` of as many KV heads as query heads, for inputs of one rank, with dropout at its end.

    Args:
        embed_dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias: as there. None for ``stride``,
            ``dilation`` or ``is_causal`` is the default, as in NATTEN.
        qk_scale: factor on the scores, default ``head_dim ** -0.5``.
        proj_drop: probability with which an element of the output is dropped in training.
        rel_pos_bias: have the table on relative positions of NATTEN's modules before 0.20, the parameter ``rpb``. The
            others load state dicts in which it is zero or missing.
        is_periodic: close axes to rings, on which windows wrap; one value or one per axis. NATTEN has no such option.

    Raises:
        ValueError: ``embed_dim`` not a multiple of ``num_heads``, a tuple of another rank, or ``proj_drop`` no number
            from 0 to 1.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Axes,
        stride: Axes | None = 1,
        dilation: Axes | None = 1,
        is_causal: Causal | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
        is_periodic: bool | Sequence[bool] = False,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            normalise_axes("kernel_size", kernel_size, self.rank, int),
            stride=normalise_axes("stride", 1 if stride is None else stride, self.rank, int),
            dilation=normalise_axes("dilation", 1 if dilation is None else dilation, self.rank, int),
            is_causal=normalise_axes("is_causal", False if is_causal is None else is_causal, self.rank, bool),
            qkv_bias=qkv_bias,
            scale=qk_scale,
            rel_pos_bias=rel_pos_bias,
            is_periodic=is_periodic,
        )
        self.na_dim, self.expected_input_tensor_rank = self.rank, self.rank + 2
        self.proj_drop = nn.Dropout(check_probability("proj_drop", proj_drop))

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | Positions | None = None,
        registers: Tensor | None = None,
        mask: Tensor | None = None,
        shapes: Shapes | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        check_dense("x", x)
        if shapes is None and cu_seqlens is None and x.ndim != self.rank + 2:
            raise ValueError(
                f"{type(self).__name__} takes [B, {self.rank} spatial axes, {self.embed_dim}], got {tuple(x.shape)}"
            )
        packing = {"shapes": shapes, "cu_seqlens": cu_seqlens}
        out = super().forward(x, positions=positions, registers=registers, mask=mask, **packing)
        assert isinstance(out, Tensor)
        return self.proj_drop(out)

    __call__: Callable[..., Tensor]


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 3
