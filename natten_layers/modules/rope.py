"""Rotary position embeddings, in two forms, of the ``2 n`` elements of a head that are rotated.

Half-split (Llama, HDiT, most others): element ``i`` is rotated with element ``i + n``. Interleaved (GPT-J, GLM, Cohere,
LTX): element ``2 i`` is rotated with element ``2 i + 1``.

A module of this file is called as ``rope(query, key, positions)`` with ``query [B, *spatial, Hq, D]`` and
``key [B, *spatial, Hkv, D]``, and returns both rotated, in their own dtypes. Query head ``h`` is rotated with KV head
``h // (Hq // Hkv)``. Angles are computed in fp32, or in fp64 for fp64 activations, never in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_flags, check_tensors, is_finite_number
from ..wording import count_or_one, shorten
from .base import Constants, at_least_fp32, computed, is_plain
from .rope_scaling import STRETCHING, attention_factor, rope_type, scaled_frequencies, stretched_frequencies

__all__ = [
    "Angles",
    "Positions",
    "RoPE",
    "Rotary",
    "angle_dtype",
    "angles_of",
    "check_positions",
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
        cos, sin = self.table(angle_dtype(query))
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


def check_positions(positions: Tensor, batch: int, shape: tuple[int, ...]) -> None:
    """Positions of tokens ``shape``, with an axis for the batch or not."""
    check_tensors(positions=positions)
    given = tuple(positions.shape)
    # Not `in`: the compiler cannot trace it for a `torch.Size` of symbols.
    if given != shape and given != (1, *shape) and given != (batch, *shape):
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"positions has shape {given}; expected [{sizes}] or [{count_or_one(batch)}, {sizes}]")
    _check_precision(positions)


def angle_dtype(query: Tensor) -> torch.dtype:
    return at_least_fp32(query.dtype)


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
        check_positions(positions, batch, (length,))
        exact = angle_dtype(query) == torch.float32  # otherwise those that are held are rounded
        freqs = self.set_freqs(query.device) if exact else self.default_freqs(torch.float64, query.device)
        if self.stretches:
            last = positions.max() if positions.numel() else positions.new_full((), -1)
            last = last.clamp(min=text_length - 1)  # on the device, which nobody then waits for
            if freqs.ndim == 2:
                freqs = torch.where(last >= self.scaling["original_max_position_embeddings"], freqs[1], freqs[0])
            else:
                freqs = stretched_frequencies(freqs, self.theta, self.scaling, last)
        return Angles(positions[..., None], freqs[None], self.attention_factor, interleaved=self.interleaved)
