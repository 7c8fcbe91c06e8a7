"""Rotary position embeddings, in two forms, of the ``2 n`` elements of a head that are rotated.

Half-split (Llama, HDiT, most others): element ``i`` is rotated with element ``i + n``. Interleaved (GPT-J, GLM, Cohere,
LTX): element ``2 i`` is rotated with element ``2 i + 1``.

A module of this file is called as ``rope(query, key, positions)`` with ``query [B, *spatial, Hq, D]`` and
``key [B, *spatial, Hkv, D]``, and returns both rotated, in their own dtypes. Query head ``h`` is rotated with KV head
``h // (Hq // Hkv)``. Angles are computed in fp32, or in fp64 for fp64 activations, never in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_flags, check_tensors, is_finite_number
from ..geometry import is_per_axis
from ..kernels.ops.define import is_watched
from ..wording import count_or_one, shorten
from .base import Constants, at_least_fp32, check_count, computed, default_dtype, is_plain
from .rope_scaling import STRETCHING, attention_factor, rope_type, scaled_frequencies, stretched_frequencies

__all__ = [
    "Angles",
    "AxialRoPE",
    "Positions",
    "RoPE",
    "angles_of",
    "axial_bounds",
    "make_axial_pos",
    "rotate_half_split",
    "rotate_interleaved",
]


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x[..., i], x[..., i + n])``; elements from ``2 n`` on pass unchanged.

    Args:
        x: ``[..., D]``.
        cos, sin: ``[..., n]`` with ``2 n <= D``, broadcastable to ``x``'s leading axes. The rotation is computed in
            their dtype.

    Returns:
        ``[..., D]`` in ``x``'s dtype.
    """
    n = cos.shape[-1]
    first, second, rest = x[..., :n].to(cos.dtype), x[..., n : 2 * n].to(cos.dtype), x[..., 2 * n :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`rotate_half_split` of the pairs ``(x[..., 2 i], x[..., 2 i + 1])``."""
    n = cos.shape[-1]
    pairs, rest = x[..., : 2 * n].unflatten(-1, (n, 2)).to(cos.dtype), x[..., 2 * n :]
    first, second = pairs.unbind(-1)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2).to(x.dtype)
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


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
        if not isinstance(size, Integral | torch.SymInt) or size < 1:
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


class Positions:
    """Positions that arrive as they are where they are an argument of a module: ``layer(x, positions=Positions(p))``.

    A mixed-precision policy casts the tensors among a sharded module's arguments (FSDP2's ``cast_forward_inputs``), and
    bf16 tells neither distant tokens nor close pixels apart.

    Args:
        tensor: in the form that the layer's ``rope`` takes.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def to(self, *args: Any, **kwargs: Any) -> Positions:
        """On another device, as ``torch.Tensor.to``, for those who move a module's arguments to it."""
        return Positions(self.tensor.to(*args, **kwargs))


def _even_steps(bound: float, steps: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """``linspace(-bound, bound, steps + 1)``."""
    if not torch.compiler.is_compiling():
        return torch.linspace(-bound, bound, steps + 1, dtype=dtype, device=device)
    # The same formula in operations that take a symbol for the size: `linspace` ties a graph to one.
    index, step = torch.arange(steps + 1, device=device).to(dtype), 2 * bound / steps
    return torch.where(index < (steps + 1) / 2, index * step - bound, bound - (steps - index) * step)


class Angles(NamedTuple):
    """Angles ``positions[..., axis] * freqs[head, j]`` of every token, KV head and pair, ``j`` running fastest."""

    positions: Tensor  # [..., *spatial, axes]
    freqs: Tensor  # [Hkv, n], or [1, n] for all heads
    factor: float = 1.0
    """on cos and sin"""
    split: tuple[int, ...] = ()
    """How many of the ``n`` frequencies belong to each axis, in their order; empty where every axis has all of them."""
    interleaved: bool = False
    """Pairs are neighbors, see :func:`rotate_interleaved`."""

    def table(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin ``[..., *spatial, Hkv or 1, pairs]``."""
        freqs = self.freqs.to(dtype)
        positions = self.positions.to(dtype).unbind(-1)
        of_axes = freqs.split(self.split, -1) if self.split else (freqs,) * len(positions)
        # [..., *spatial, 1, 1] * [Hkv, n] for each axis
        theta = torch.cat([p[..., None, None] * f for p, f in zip(positions, of_axes, strict=True)], -1)
        cos, sin = theta.cos(), theta.sin()
        return (cos, sin) if self.factor == 1.0 else (cos * self.factor, sin * self.factor)

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        rotate = rotate_interleaved if self.interleaved else rotate_half_split
        cos, sin = self.table(_angle_dtype(query))
        key = rotate(key, cos, sin)
        if cos.shape[-2] > 1:
            group = query.shape[-2] // cos.shape[-2]
            cos, sin = cos.repeat_interleave(group, -2), sin.repeat_interleave(group, -2)
        return rotate(query, cos, sin), key


class Rotary(Constants):
    """Holds ``freqs``, which follow from the constructor's arguments and are made anew where they were never set."""

    freqs: Tensor

    def default_freqs(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Write the frequencies of the constructor's arguments."""
        self.freqs.copy_(self.default_freqs(self.freqs.dtype, self.freqs.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        unset = self.freqs.is_meta
        super()._apply(fn, recurse)
        if unset and not self.freqs.is_meta:
            self.reset_parameters()
        return self

    def set_freqs(self, device: torch.device) -> Tensor:
        """``freqs``. Loading a file into a model on the meta device may have left them there."""
        if self.freqs.is_meta and device.type != "meta":
            self.freqs = self.default_freqs(self.freqs.dtype, device)
        return self.freqs

    def check_heads(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Raise a ValueError for heads that this cannot rotate."""

    angles: Callable[..., Angles]
    """of query, key, positions and options of each class"""

    def forward(
        self, query: Tensor, key: Tensor, positions: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Query and key rotated by :meth:`angles`, which says what it takes."""
        check_tensors(query=query, key=key)
        return self.angles(query, key, positions, **options).rotate(query, key)

    __call__: Callable[..., tuple[Tensor, Tensor]]


def angles_of(rope: nn.Module, query: Tensor, key: Tensor, positions: Tensor | None, **options: Any) -> Angles | None:
    """By what ``rope(query, key, positions, **options)`` rotates its arguments, or None where it has to be called."""
    if isinstance(rope, Rotary) and is_plain(rope, Rotary.forward):
        return rope.angles(query, key, positions, **options)
    return None


def _check_precision(positions: Tensor) -> None:
    if positions.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"positions are {positions.dtype}, which is too coarse: give float32, float64 or integers. Where a "
            "mixed-precision policy casts the arguments of modules, give positions=natten_layers.Positions(tensor)"
        )
    if positions.dtype == torch.bool or positions.is_complex():
        raise ValueError(f"positions are {positions.dtype}: give float32, float64 or integers")


def _check_positions(positions: Tensor, batch: int, shape: tuple[int, ...]) -> None:
    """Positions of tokens ``shape``, with an axis for the batch or not."""
    check_tensors(positions=positions)
    given = tuple(positions.shape)
    # Not `in`: the compiler cannot trace it for a `torch.Size` of symbols.
    if given != shape and given != (1, *shape) and given != (batch, *shape):
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"positions has shape {given}; expected [{sizes}] or [{count_or_one(batch)}, {sizes}]")
    _check_precision(positions)


def _angle_dtype(query: Tensor) -> torch.dtype:
    return at_least_fp32(query.dtype)


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
            positions = make_axial_pos(*spatial, dtype=_angle_dtype(query), device=query.device)
        _check_positions(positions, query.shape[0], (*spatial, self.axes))
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


class RoPE(Rotary):
    """Rotary embedding over token indices, as language models use it.

    Args:
        head_dim: elements of a head that are rotated, an even number; a longer head keeps its last elements.
        theta: base of the frequencies ``theta ** (-2 i / head_dim)``.
        scaling: None, or a dictionary as ``rope_scaling`` / ``rope_parameters`` in Hugging Face configs. ``rope_type``
            (or ``type``) is "default", "linear", "llama3", "yarn", "longrope" or "dynamic"; the other keys are those of
            that type. The attention factor of YaRN and LongRoPE multiplies cos and sin. LongRoPE divides the
            frequencies by ``short_factor`` in calls whose positions all lie below ``original_max_position_embeddings``,
            and by ``long_factor`` in others. Dynamic scaling, by ``factor``, begins at that length: the farther a
            call's last position lies behind it, the lower are the call's frequencies.
        interleaved: element ``2 i`` is rotated with ``2 i + 1``, as in GPT-J, GLM and Cohere, instead of ``i`` with
            ``i + head_dim / 2``.

    The frequencies are the buffer ``freqs [head_dim / 2]``, for LongRoPE ``[2, head_dim / 2]``, short and long. It is
    outside the state dict; ``reset_parameters`` writes it again, e.g. after ``to_empty``.

    Sources: Su et al. 2021 (https://arxiv.org/abs/2104.09864), Peng et al. 2023 (YaRN, https://arxiv.org/abs/2309.00071),
    Ding et al. 2024 (LongRoPE, https://arxiv.org/abs/2402.13753), Llama 3.1's published configuration.

    Raises:
        ValueError: an odd ``head_dim``, a ``theta`` that is not positive, an unknown ``rope_type``, a key that the type
            needs and does not have, or one that is no positive number.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head_dim, Integral) or head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be an even number of at least 2, got {shorten(head_dim)}")
        if not is_finite_number(theta) or theta <= 0:
            raise ValueError(f"theta must be a positive number, got {shorten(theta)}")
        check_flags(interleaved=interleaved)
        if scaling is not None and not isinstance(scaling, Mapping):
            raise ValueError(f"scaling must be None or a dictionary, got {shorten(scaling)}")
        self.head_dim, self.theta, self.scaling = head_dim, theta, dict(scaling or {})
        self.attention_factor, self.interleaved = attention_factor(self.scaling), interleaved
        self.stretches = rope_type(self.scaling) in STRETCHING
        """whether frequencies depend on the length of the text"""
        if rope_type(self.scaling) == "dynamic" and head_dim == 2:
            raise ValueError('rope_type "dynamic" needs a head_dim of at least 4, got 2')
        self.register_buffer("freqs", self.default_freqs(torch.float32, device), persistent=False)

    def default_freqs(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        # The same operations in the same order as the models were trained with: at position 1e5 the last bit of an fp32
        # frequency rotates a pair by a hundredth of a radian.
        def make(device: torch.device | str | None) -> Tensor:
            exponents = torch.arange(0, self.head_dim, 2, device=device).to(dtype) / self.head_dim
            return scaled_frequencies(self.theta**exponents, self.theta, self.scaling)

        return computed(make, device)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, theta={self.theta}"
            + (f", scaling={self.scaling}" if self.scaling else "")
            + (", interleaved=True" if self.interleaved else "")
        )

    def check_heads(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        if head_dim < self.head_dim:
            raise ValueError(
                f"query has heads of {head_dim} elements; this RoPE rotates {self.head_dim}: make RoPE({head_dim})"
            )

    def angles(self, query: Tensor, key: Tensor, positions: Tensor | None, *, text_length: int = 0) -> Angles:
        """Of ``query [B, L, Hq, D]`` and ``key [B, L, Hkv, D]``, ``D >= head_dim``.

        Args:
            positions: token indices ``[L]`` or ``[B or 1, L]``; None is ``0 .. L - 1``.
            text_length: of a text that goes on behind these tokens: LongRoPE and dynamic scaling then have the
                frequencies of so long a text.

        Raises:
            ValueError: positions or heads that do not fit.
        """
        batch, length = query.shape[:2]
        if query.ndim != 4:
            raise ValueError(
                f"query has shape {tuple(query.shape)}; expected [B, L, heads, head_dim], as RoPE is for one spatial "
                "axis: AxialRoPE rotates by coordinates"
            )
        self.check_heads(query.shape[-2], key.shape[-2], query.shape[-1])
        if positions is None:
            positions = torch.arange(length, device=query.device)
        _check_positions(positions, batch, (length,))
        exact = _angle_dtype(query) == torch.float32  # otherwise those that are held are rounded
        freqs = self.set_freqs(query.device) if exact else self.default_freqs(torch.float64, query.device)
        if self.stretches:
            last = positions.max() if positions.numel() else positions.new_full((), -1)
            last = last.clamp(min=text_length - 1)  # on the device, which nobody then waits for
            if freqs.ndim == 2:
                freqs = torch.where(last >= self.scaling["original_max_position_embeddings"], freqs[1], freqs[0])
            else:
                freqs = stretched_frequencies(freqs, self.theta, self.scaling, last)
        return Angles(positions[..., None], freqs[None], self.attention_factor, interleaved=self.interleaved)
