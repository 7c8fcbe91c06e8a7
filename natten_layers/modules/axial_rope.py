"""Rotary position embeddings over coordinates of images and videos, and those coordinates.

Modules and angles are those of :mod:`natten_layers.modules.rope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..checks import check_flags, check_tensors, is_finite_number
from ..geometry import is_per_axis
from ..kernels.ops.define import is_watched
from ..wording import count_or_one, shorten
from .base import at_least_fp32, check_count, computed, default_dtype
from .rope import Angles, Rotary, angle_dtype, check_positions

__all__ = ["AxialRoPE", "axial_bounds", "make_axial_pos"]


def make_axial_pos(
    height: int, width: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Cell centres of an image whose long side spans [-1, 1] and whose short side is scaled by the aspect ratio.

    Args:
        dtype: torch.float32 or torch.float64; None is torch's default dtype, and float32 where that is half precision.

    Returns:
        ``[height, width, 2]``, (y, x).

    Raises:
        ValueError: a height or width below 1, or another dtype.
    """
    for size in (height, width):  # of a compiled graph they may be symbols
        if not isinstance(size, Integral | torch.SymInt) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"height and width must be integers of at least 1, got {shorten(height)} and {shorten(width)}"
            )
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32, torch.float64 or None, got {shorten(dtype)}")
    dtype = default_dtype() if dtype is None else dtype
    centres = []
    for bound, length in zip(axial_bounds(height, width), (height, width), strict=True):
        edges = _even_steps(bound, length, dtype or torch.get_default_dtype(), device)
        centres.append((edges[:-1] + edges[1:]) / 2)
    return torch.stack(torch.meshgrid(*centres, indexing="ij"), -1)


def axial_bounds(height: int, width: int) -> tuple[float, float]:
    """Where the axes end in :func:`make_axial_pos`; they begin at minus that."""
    aspect = width / height
    return torch.sym_min(1.0, 1 / aspect), torch.sym_min(1.0, aspect)  # not height / width: k-diffusion's last bit


def _even_steps(bound: float, steps: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """``linspace(-bound, bound, steps + 1)``."""
    if not torch.compiler.is_compiling():
        return torch.linspace(-bound, bound, steps + 1, dtype=dtype, device=device)
    # The same formula in operations that take a symbol for the size: `linspace` ties a graph to one.
    index, step = torch.arange(steps + 1, device=device).to(dtype), 2 * bound / steps
    return torch.where(index < (steps + 1) / 2, index * step - bound, bound - (steps - index) * step)


class AxialRoPE(Rotary):
    """Rotary embedding over real-valued coordinates, with its own frequencies for every head.

    With ``n = head_dim // (4 * axes)`` frequencies per head and axis, the first ``2 * axes * n`` elements of a head are
    rotated (half of it, or somewhat less where ``4 * axes`` does not divide it). All frequencies are ``exp(linspace(ln
    pi, ln 10 pi, num_heads * n + 1)[:-1])``; head ``h`` takes elements ``j * num_heads + h``. A group of query heads
    that shares a KV head has the group's first query head's frequencies. Two axes are HDiT's embedding (Crowson et al.
    2024, https://arxiv.org/abs/2401.11605).
    The frequencies are for coordinates from about -1 to 1: divide degrees of longitude by 180, or give ``freqs``.

    Args:
        head_dim: elements of a head, at least ``4 * axes``.
        num_heads: query heads, ``Hq``.
        num_kv_heads: KV heads, default ``num_heads``.
        axes: coordinates of a position.
        freqs: the caller's own frequencies in radians per unit of position, ``[num_kv_heads or 1, n]`` with one row
            for all heads if it is one, and any ``n`` for which ``2 * axes * n`` elements, or with ``split``
            ``2 * n``, fit into a head.
        split: how many of the ``n`` own frequencies belong to each axis, in their order, where axes differ. Without it
            each axis has all of them.
        periods: of every coordinate, the length in units of position after which it comes back to the same place, such
            as 2 for longitudes from -1 to 1, or None where it does not. Frequencies are rounded to whole turns a
            period, at least one, so that scores depend on the distance along the ring, as windows do with
            ``is_periodic``. In :func:`make_axial_pos` the long side of an image is 2.0 long. ``math.inf`` leaves the
            frequencies as they are, as None does, and says that this is meant where an axis is periodic: layers refuse
            None there.
        interleaved: element ``2 i`` is rotated with ``2 i + 1``, as in LTX's video models, instead of ``i`` with
            ``i + pairs``.

    The frequencies are the buffer ``freqs``. It is in fp32 or better, whatever torch's default dtype, and stays so
    under ``half()``; ``reset_parameters`` writes it again. Frequencies that are loaded are rounded to whole turns of
    ``periods``, too.

    Raises:
        ValueError: heads that do not group, a head too small, or ``freqs``, ``split`` or ``periods`` that do not fit.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        axes: int = 2,
        freqs: Tensor | None = None,
        split: Sequence[int] | None = None,
        periods: Sequence[float | None] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        counts = {"head_dim": head_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "axes": axes}
        for name, count in counts.items():
            check_count(name, count)
        check_flags(interleaved=interleaved)
        if freqs is None and head_dim < 4 * axes:
            raise ValueError(f"head_dim must be at least 4 * axes = {4 * axes}, got {head_dim}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        _check_freqs(freqs, split, head_dim, num_kv_heads, axes)
        _check_periods(periods, axes)
        self.head_dim, self.num_heads, self.num_kv_heads, self.axes = head_dim, num_heads, num_kv_heads, axes
        self.split, self.interleaved = () if split is None else tuple(split), interleaved
        self.periods = () if periods is None or not any(periods) else tuple(periods)
        if self._has_turns() and not self.split:  # every axis has all frequencies, but rounds them by itself
            self.split = (head_dim // (4 * axes) if freqs is None else freqs.shape[1],) * axes
        self.own_freqs = None if freqs is None else freqs.detach().clone()
        dtype = default_dtype() if freqs is None else at_least_fp32(freqs.dtype)
        self.register_buffer("freqs", self.default_freqs(dtype, device))

    def default_freqs(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        if self.own_freqs is None:
            return computed(lambda device: self._in_turns(self._spread_freqs(dtype, device)), device)
        return self._in_turns(self.own_freqs.to(device, dtype, copy=True))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """Round what is loaded as what is made: it may come from a model with another period, or without any."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.freqs.is_meta or not self._has_turns():
            return
        if local_metadata.get("assign_to_params_buffers", False):
            self.freqs = self._in_turns(self.freqs)  # not in place, as it is the state dict's own tensor
        else:
            self.freqs.copy_(self._in_turns(self.freqs))

    def _in_turns(self, freqs: Tensor) -> Tensor:
        """Frequencies, rounded to whole turns of the axes that have a period."""
        if not self._has_turns():
            return freqs
        of_axes = freqs.split(self.split, -1) if freqs.shape[-1] == sum(self.split) else (freqs,) * self.axes
        return torch.cat([_whole_turns(f, period) for f, period in zip(of_axes, self.periods, strict=True)], -1)

    def _has_turns(self) -> bool:
        return any(period is not None and math.isfinite(period) for period in self.periods)

    def _spread_freqs(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        n = self.head_dim // (4 * self.axes)
        ends = math.log(math.pi), math.log(10 * math.pi)
        ramp = torch.linspace(*ends, self.num_heads * n + 1, dtype=dtype, device=device)
        per_query_head = ramp[:-1].exp().view(n, self.num_heads).T
        # `contiguous` would keep the strides of one frequency a head, which DDP cannot copy between processes.
        return per_query_head[:: self.num_heads // self.num_kv_heads].clone(memory_format=torch.contiguous_format)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, axes={self.axes}"
            + (f", split={self.split}" if self.split else "")
            + (f", periods={self.periods}" if self.periods else "")
            + (", interleaved=True" if self.interleaved else "")
        )

    def check_heads(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        if (num_heads, num_kv_heads, head_dim) != (self.num_heads, self.num_kv_heads, self.head_dim):
            raise ValueError(
                f"query has {num_heads} and key {num_kv_heads} heads of {head_dim} elements; "
                f"this AxialRoPE was made for {self.num_heads} and {self.num_kv_heads} of {self.head_dim}; "
                f"make AxialRoPE({head_dim}, {num_heads}, num_kv_heads={num_kv_heads})"
            )

    def angles(self, query: Tensor, key: Tensor, positions: Tensor | None) -> Angles:
        """Of ``query [B, *spatial, Hq, D]`` and ``key [B, *spatial, Hkv, D]``.

        Args:
            positions: ``[*spatial, axes]`` or ``[B or 1, *spatial, axes]``. None, with two spatial axes, is
                :func:`make_axial_pos`.

        Raises:
            ValueError: head counts or positions that do not fit.
        """
        spatial = query.shape[1:-2]
        self.check_heads(query.shape[-2], key.shape[-2], query.shape[-1])
        if positions is None:
            if len(spatial) != 2 or self.axes != 2:
                raise ValueError(
                    f"positions must be given, of shape {(*spatial, self.axes)}: the default is for images and "
                    f"axes=2, not for spatial axes {tuple(spatial)} and axes={self.axes}"
                )
            positions = make_axial_pos(*spatial, dtype=angle_dtype(query), device=query.device)
        check_positions(positions, query.shape[0], (*spatial, self.axes))
        return Angles(positions, self.set_freqs(query.device), split=self.split, interleaved=self.interleaved)


def _whole_turns(freqs: Tensor, period: float | None) -> Tensor:
    """Frequencies rounded to whole turns in a period; one of zero stays so."""
    if period is None or math.isinf(period):
        return freqs
    turns = (freqs.abs() * (period / (2 * math.pi))).round().clamp(min=1) * freqs.sign()
    return turns * (2 * math.pi / period)


def _check_periods(periods: Sequence[float | None] | None, axes: int) -> None:
    if periods is None:
        return
    fit = is_per_axis(periods) and len(periods) == axes
    if not fit or not all(p is None or ((is_finite_number(p) or p == math.inf) and p > 0) for p in periods):
        raise ValueError(
            f"periods={shorten(periods)} must be {axes} entries, one a coordinate: a length above 0 or None"
        )


def _check_freqs(
    freqs: Tensor | None, split: Sequence[int] | None, head_dim: int, num_kv_heads: int, axes: int
) -> None:
    if freqs is None:
        if split is not None:
            raise ValueError(f"split={shorten(split)} says which axis freqs belong to; give freqs too")
        return
    check_tensors(freqs=freqs)
    if freqs.is_complex() or not (freqs.is_meta or is_watched((freqs,)) or freqs.isfinite().all()):
        raise ValueError(f"freqs must be real and finite numbers, got {shorten(freqs)}")
    if freqs.ndim != 2 or len(freqs) not in (1, num_kv_heads):
        raise ValueError(f"freqs has shape {tuple(freqs.shape)}; expected [{count_or_one(num_kv_heads)}, n]")
    n = freqs.shape[1]
    if split is not None and not (
        is_per_axis(split)
        and len(split) == axes
        and all(isinstance(part, Integral) and int(part) >= 0 for part in split)
        and sum(split) == n
    ):
        raise ValueError(f"split={shorten(split)} must be {axes} numbers, one an axis, that add up to {n} frequencies")
    pairs = n if split is not None else axes * n
    if not 1 <= pairs <= head_dim // 2:
        raise ValueError(
            f"freqs of shape {tuple(freqs.shape)} rotate {pairs} pairs; a head of {head_dim} elements has 1 "
            f"to {head_dim // 2}"
        )
