"""Grouped-query neighborhood attention as a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ..arguments import prepare, prepare_packed
from ..cached import cached_attention
from ..checks import check_dense, check_flags, check_key_mask, check_scale
from ..explanation import Explanation
from ..geometry import AXES, longest_axis, normalise_axes
from ..operations import neighborhood_attention
from ..varlen import Shapes, packed_shapes
from ..wording import shorten
from .base import check_count, check_probability
from .norm import RMSNorm
from .query_key import (
    HeadNorm,
    Heads,
    Prepared,
    Projected,
    attend_with_qk_prep,
    call_watched,
    explain_with_qk_prep,
)
from .rings import check_packed_ring_positions, check_ring_positions, check_rings
from .rope import Positions, RoPE, Rotary
from .rope_scaling import check_packed
from .window_options import all_one, check_ranks, check_window, plain

__all__ = ["NeighborhoodGQA"]


class NeighborhoodGQA(nn.Module):
    """Self-attention of every token over its neighborhood, with grouped query heads, on 1, 2 or 3 axes.

    The layer takes tokens ``[B, *spatial, embed_dim]`` and returns the same shape; it needs nothing else of the model
    around it. With ``num_kv_heads == num_heads`` and defaults otherwise it loads the state dict of NATTEN's modules.

    Args:
        embed_dim: length of a token.
        num_heads: number of query heads, ``Hq``.
        kernel_size: keys in the window, one int or one per axis. One per axis fixes how many axes tokens have; with
            an int, an image that was left flat is a sequence with windows of 1-D. None means that every token sees
            every axis whole (global attention). On a causal axis without stride and dilation, the window may be longer
            than the axis and then covers the whole past. Any other window that does not fit its axis raises when the
            layer is called.
        num_kv_heads: number of key and value heads, ``Hkv``. It must divide ``num_heads``, which is its default.
        head_dim: elements of a head, default ``embed_dim // num_heads``.
        stride, dilation, is_causal, is_periodic: options of the window, each one value or one per axis.
        num_registers: number of register tokens that the layer owns, as the parameter ``registers [R, embed_dim]``.
            They pass through the same ``qkv``, carry no position, and are seen by every token, whatever its window.
        registers_attend: registers attend as well, to all tokens and all registers even if an axis is causal, and
            :meth:`forward` returns them.
        sink: an extra logit per query head that takes a share of the softmax but adds no value: "zero" is zero
            attention (softmax1), "learned" is the parameter ``sink [num_heads]``, which starts at 0.
        rope: module that is called as ``rope(query [B, *spatial, Hq, D], key [B, *spatial, Hkv, D], positions)`` and
            returns query and key rotated. Beside a periodic axis, one of this library must know the length of the ring:
            ``AxialRoPE(..., periods=...)``.
        qk_norm: "cosine" makes the scores cosines times the parameter ``qk_scale [num_heads]``, which starts at 10;
            "rms" gives query and key heads RMS norms with weights (``q_norm``, ``k_norm``). Both come before ``rope``.
        rel_pos_bias: add a learned bias to every score, which depends on the distance of query and key, as NATTEN's
            modules did before 0.20. It is the parameter ``rpb [num_heads, 2 * kernel_size - 1 per axis]``.
            ``kernel_size`` must then have one entry per axis. A layer without it loads state dicts in which the table
            is zero. Any other table is an error, with ``strict=False`` as well: outputs would differ.
        dropout: probability with which an element of the attention's output is dropped before ``proj`` in training.
        qkv_bias, out_bias: whether ``qkv`` and ``proj`` have a bias.
        scale: factor on the scores, default ``head_dim ** -0.5``, or 1 with cosine normalisation.

    ``qkv`` and ``proj`` are ``Linear`` layers. The rows of ``qkv`` are ``num_heads * head_dim`` for queries, then
    ``num_kv_heads * head_dim`` for keys and as many for values.

    Raises:
        ValueError: sizes do not divide, window options contradict each other, ``rope`` is one of this library for
            other heads or without the period of a periodic axis, or an option is unknown or of another type.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] | None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        is_periodic: bool | Sequence[bool] = False,
        num_registers: int = 0,
        registers_attend: bool = False,
        sink: Literal["zero", "learned"] | None = None,
        rope: nn.Module | None = None,
        qk_norm: Literal["cosine", "rms"] | None = None,
        rel_pos_bias: bool = False,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            check_count(name, size)
        if head_dim is not None:
            check_count("head_dim", head_dim)
        check_count("num_registers", num_registers, least=0)
        check_flags(registers_attend=registers_attend, rel_pos_bias=rel_pos_bias, qkv_bias=qkv_bias, out_bias=out_bias)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}; give head_dim")
        self._ranks = check_ranks(kernel_size, stride, dilation, is_causal, is_periodic)
        kernel_size = None if kernel_size is None else plain("kernel_size", kernel_size, int)
        stride, dilation = plain("stride", stride, int), plain("dilation", dilation, int)
        is_causal, is_periodic = plain("is_causal", is_causal, bool), plain("is_periodic", is_periodic, bool)
        if kernel_size is None and not (all_one(stride) and all_one(dilation)):
            raise ValueError(f"kernel_size=None takes no stride or dilation, got stride={stride}, dilation={dilation}")
        check_window(kernel_size, stride, dilation, is_causal, is_periodic)
        if sink not in (None, "zero", "learned"):
            raise ValueError(f'sink must be None, "zero" or "learned", got {shorten(sink)}')
        if qk_norm not in (None, "cosine", "rms"):
            raise ValueError(f'qk_norm must be None, "cosine" or "rms", got {shorten(qk_norm)}')
        if rope is not None and (not callable(rope) or isinstance(rope, type)):
            raise ValueError(f"rope must be a module called as rope(query, key, positions), got {shorten(rope)}")

        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.is_causal, self.is_periodic = is_causal, is_periodic
        self.registers_attend, self.qk_norm = registers_attend, qk_norm
        if isinstance(rope, Rotary):
            rope.check_heads(num_heads, num_kv_heads, self.head_dim)
        if len(self._ranks) == 1:
            check_rings(rope, is_periodic, self._ranks[0])
        self.scale = self._default_scale() if scale is None else check_scale(scale, torch.float64)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if rel_pos_bias and not isinstance(self.kernel_size, tuple):
            raise ValueError(f"rel_pos_bias needs a kernel_size with one entry per axis, got {kernel_size}")
        rows = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(embed_dim, rows, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=out_bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(check_probability("dropout", dropout))
        self.rope = rope
        self.registers = parameter(num_registers, embed_dim) if num_registers else None
        self.sink = parameter(num_heads) if sink == "learned" else 0.0 if sink == "zero" else None
        self.qk_scale = parameter(num_heads) if qk_norm == "cosine" else None
        entries = [2 * k - 1 for k in self.kernel_size] if isinstance(self.kernel_size, tuple) else []
        self.rpb = parameter(num_heads, *entries) if rel_pos_bias else None
        self.q_norm = RMSNorm(self.head_dim, device=device, dtype=dtype) if qk_norm == "rms" else None
        self.k_norm = RMSNorm(self.head_dim, device=device, dtype=dtype) if qk_norm == "rms" else None
        self.register_load_state_dict_pre_hook(_judge_bias)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Set parameters and constant buffers as the constructor does.

        A ``rope`` from another package is left as it is, since several layers may share it.
        """
        for layer in (self.qkv, self.proj, self.q_norm, self.k_norm):
            if layer is not None:
                layer.reset_parameters()
        if isinstance(self.rope, Rotary):
            self.rope.reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        if self.registers is not None and not self.registers.is_meta:  # as Embedding
            nn.init.normal_(self.registers, std=0.02)
        if isinstance(self.sink, nn.Parameter):
            nn.init.zeros_(self.sink)
        if self.qk_scale is not None:
            nn.init.constant_(self.qk_scale, 10.0)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def _default_scale(self) -> float:
        return 1.0 if self.qk_norm == "cosine" else self.head_dim**-0.5

    def extra_repr(self) -> str:
        sink = "learned" if isinstance(self.sink, nn.Parameter) else "zero" if self.sink is not None else None
        options = {
            "num_kv_heads": (self.num_kv_heads, self.num_heads),
            "head_dim": (self.head_dim, self.embed_dim // self.num_heads),
            "stride": (self.stride, 1),
            "dilation": (self.dilation, 1),
            "is_causal": (self.is_causal, False),
            "is_periodic": (self.is_periodic, False),
            "num_registers": (0 if self.registers is None else len(self.registers), 0),
            "registers_attend": (self.registers_attend, False),
            "sink": (sink, None),
            "qk_norm": (self.qk_norm, None),
            "rel_pos_bias": (self.rpb is not None, False),
            "scale": (self.scale, self._default_scale()),
        }
        chosen = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([str(self.embed_dim), str(self.num_heads), f"kernel_size={self.kernel_size}", *chosen])

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | Positions | None = None,
        registers: Tensor | None = None,
        mask: Tensor | None = None,
        shapes: Shapes | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from every token.

        Args:
            x: ``[B, *spatial, embed_dim]``.
            positions: passed to ``rope`` in the form that it takes. Wrapped in :class:`Positions`, they are not cast by
                the mixed-precision policies of FSDP. Along a periodic axis they go around the period of an
                :class:`AxialRoPE` once, in steps that are alike; that is checked where they are on a CPU.
            registers: register tokens ``[B, R, embed_dim]`` that the model carries from layer to layer. They follow
                the layer's own, if it has any.
            mask: ``[B or 1, *spatial]``, bool, False where a token counts for no other one, such as padding or land.
                Windows do not move because of it, and masked tokens attend like all others. So NaN in them makes
                gradients NaN: fill them before you train, as with ``torch.where``.
            shapes: lengths of the axes of samples that are packed into ``x [N, embed_dim]``, see
                :func:`natten_layers.neighborhood_attention_varlen`. ``mask`` is then ``[N]``, ``registers`` are
                ``[samples, R, embed_dim]``, and a ``rope`` needs ``positions [N, ...]``. Not together with
                ``registers_attend`` and ``rel_pos_bias``, nor for texts of lengths at which a ``rope`` that long texts
                stretch has different frequencies.
            cu_seqlens: instead of ``shapes`` on one axis, cumulative lengths ``[samples + 1]`` that begin with 0. A
                jagged nested tensor is ``layer(nested.values(), cu_seqlens=nested.offsets())``.

        Returns:
            ``[B, *spatial, embed_dim]``, or ``[N, embed_dim]`` of packed samples. With ``registers_attend`` also the
            registers ``[B, R, embed_dim]``, the layer's own and then the passed ones.

        Raises:
            ValueError: an argument does not fit; the message names it and the values.
        """
        tokens, registers = self.attend(
            x, positions=positions, registers=registers, mask=mask, shapes=shapes, cu_seqlens=cu_seqlens
        )
        tokens = self.proj(self.dropout(tokens))
        return tokens if registers is None else (tokens, self.proj(self.dropout(registers)))

    # Any is the pair that `registers_attend` brings: as a tuple, it would have to be ruled out in every other call.
    __call__: Callable[..., Tensor | Any]

    def attend(
        self,
        x: Tensor,
        *,
        positions: Tensor | Positions | None = None,
        registers: Tensor | None = None,
        mask: Tensor | None = None,
        shapes: Shapes | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward` up to ``dropout`` and ``proj``: ``[B, *spatial, Hq * D]``, and ``[B, R, Hq * D]`` or None."""
        if (sizes := self._sizes(x, shapes, cu_seqlens)) is not None:
            return attend_with_qk_prep(*self._prepare_packed(x, sizes, positions, registers, mask)).flatten(-2), None
        projected, extra = self._checked(x, positions, registers, mask)
        tokens = self._attention(projected, extra, mask).flatten(-2)
        if not self.registers_attend:
            return tokens, None
        return tokens, self._attend_from_registers(projected.heads, extra, mask).flatten(-2)

    def explain(
        self,
        x: Tensor,
        *,
        positions: Tensor | Positions | None = None,
        registers: Tensor | None = None,
        mask: Tensor | None = None,
        shapes: Shapes | None = None,
        cu_seqlens: Tensor | None = None,
        needs_grad: bool | None = None,
        forward_mode: bool | None = None,
        device: str | None = None,
    ) -> Explanation:
        """Which kernels attend from the tokens in a call of the layer with these arguments, and why not others.

        The layer projects the tokens and makes all else that attention is given, but does not attend. ``needs_grad``,
        ``forward_mode`` and ``device`` are those of :func:`natten_layers.explain`. Where derivatives are needed, norms
        and RoPE are a launch of their own, which is not listed. Nor is attention from registers.
        """
        if (sizes := self._sizes(x, shapes, cu_seqlens)) is not None:
            prepared = self._prepare_packed(x, sizes, positions, registers, mask)
        else:
            prepared = self._prepare(*self._checked(x, positions, registers, mask), mask)
        return explain_with_qk_prep(prepared, needs_grad, forward_mode, device)

    def _sizes(self, x: Tensor, shapes: Shapes | None, cu_seqlens: Tensor | None) -> Tensor | None:
        """Lengths of the axes of packed samples, or None if ``x`` is a batch."""
        check_dense("x", x)
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}; expected tokens in the dtype of the layer's parameters")
        if shapes is None and cu_seqlens is None:
            return None
        return packed_shapes(shapes, cu_seqlens, self._ranks[0], x.shape[0] if x.ndim == 2 else None, "x")

    def _checked(
        self, x: Tensor, positions: Tensor | Positions | None, registers: Tensor | None, mask: Tensor | None
    ) -> tuple[Projected, Heads | None]:
        """The heads of a batch's tokens and of registers, from arguments that are checked."""
        if x.ndim - 2 not in self._ranks or x.shape[-1] != self.embed_dim:
            raise self._wrong_shape(x)
        if positions is not None and self.rope is None:
            raise ValueError("positions were given, but the layer has no rope to use them")
        positions = positions.tensor if isinstance(positions, Positions) else positions
        if positions is not None:
            check_dense("positions", positions)
        if mask is not None:
            check_key_mask(mask, x.shape[:-1], x.device, "mask")
        projected = self._project(x, self.rope, positions)
        check_ring_positions(self.rope, self.is_periodic, projected.heads.query, positions)
        extra = self._register_heads(x, registers)
        return Projected(projected.prepared()) if self.registers_attend else projected, extra

    def _wrong_shape(self, x: Tensor) -> ValueError:
        size, ranks = self.embed_dim, self._ranks
        axes = f"{ranks[0]} spatial axes" if len(ranks) == 1 else "1 to 3 spatial axes"
        way_out = ""
        if x.ndim - 2 in ranks and x.shape[1] == size:
            way_out = "; channels come last: pass x.movedim(1, -1)"
        elif x.ndim == 3 and x.shape[-1] == size:
            way_out = f"; give tokens their grid back: x.unflatten(1, ({', '.join(AXES[ranks[0]])}))"
        return ValueError(f"x has shape {tuple(x.shape)}; expected [B, *spatial, {size}] with {axes}{way_out}")

    def _prepare_packed(
        self,
        x: Tensor,
        sizes: Tensor,
        positions: Tensor | Positions | None,
        registers: Tensor | None,
        mask: Tensor | None,
    ) -> Prepared:
        """The arguments of attention from the tokens of packed samples."""
        if x.ndim != 2 or x.shape[-1] != self.embed_dim:
            expected = f"[N, {self.embed_dim}] beside shapes or cu_seqlens"
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {expected}")
        if self.registers_attend or self.rpb is not None:
            name = "registers_attend" if self.registers_attend else "rel_pos_bias"
            raise ValueError(f"packed samples do not go with {name}=True; call the layer once for each sample")
        positions = positions.tensor if isinstance(positions, Positions) else positions
        if (self.rope is None) != (positions is None):
            raise ValueError(
                "packed samples need positions [N, ...], those of each sample after another, if the layer has a rope, "
                "and only then"
            )
        check_rings(self.rope, self.is_periodic, sizes.shape[1])
        if isinstance(self.rope, RoPE) and self.rope.stretches:
            check_packed(self.rope.scaling, sizes.prod(1))
        if mask is not None:
            check_key_mask(mask, x.shape[:-1], x.device, "mask")
        heads, norm, angles = self._project(x[None], self.rope, positions)
        extra = self._register_heads(x.new_empty(len(sizes), 0, 0), registers)
        call = prepare_packed(
            heads.query[0], heads.key[0], heads.value[0], sizes,
            longest_axis(1) if self.kernel_size is None else self.kernel_size,
            self.stride, self.dilation, self.is_causal, self.scale,
            None if extra is None else extra.key, None if extra is None else extra.value,
            self.sink, self.is_periodic, mask, of="x",
        )  # fmt: skip
        if positions is not None:
            check_packed_ring_positions(self.rope, self.is_periodic, sizes, positions)
        return Prepared(call, norm, angles)

    def _project(self, tokens: Tensor, rope: nn.Module | None = None, positions: Tensor | None = None) -> Projected:
        """Query, key and value as views of one projection.

        Query and key are new tensors where norms or ``rope`` cannot be fused and are called as modules.
        """
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = self.qkv(tokens).unflatten(-1, (-1, self.head_dim)).split(counts, -2)
        query, key, norm, angles = call_watched(query, key, self._head_norm(), rope, positions)
        return Projected(Heads(query, key, value), norm, angles)

    def _head_norm(self) -> HeadNorm | tuple[nn.Module, nn.Module] | None:
        if self.qk_scale is not None:
            # The query takes the whole temperature: a key is shared by a group of query heads with a scale each.
            return HeadNorm("cosine", self.qk_scale, None)
        return None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)

    def _register_heads(self, x: Tensor, registers: Tensor | None) -> Heads | None:
        if registers is not None:
            check_dense("registers", registers)
        if registers is not None and (registers.ndim != 3 or registers.shape[::2] != (x.shape[0], self.embed_dim)):
            raise ValueError(
                f"registers has shape {tuple(registers.shape)}; expected [{x.shape[0]}, R, {self.embed_dim}]"
            )
        tokens = [] if self.registers is None else [self.registers[None]]
        if registers is not None:
            tokens = [own.expand(x.shape[0], -1, -1) for own in tokens] + [registers]
        # torch.cat makes an aligned copy: results must not depend on the address at which a parameter was loaded.
        return self._project(torch.cat(tokens, 1)).prepared() if tokens else None

    def _attention(self, projected: Projected, registers: Heads | None, mask: Tensor | None) -> Tensor:
        """Attention of the tokens, ``[B, *spatial, Hq, D]``."""
        return attend_with_qk_prep(*self._prepare(projected, registers, mask))

    def _prepare(self, projected: Projected, registers: Heads | None, mask: Tensor | None) -> Prepared:
        """The arguments of attention from the tokens."""
        kernel_size = self._fitted_kernel_size(projected.heads.query.shape[1:-2])
        call = prepare(
            *projected.heads, kernel_size, self.stride, self.dilation, self.is_causal, self.scale,
            None if registers is None else registers.key, None if registers is None else registers.value,
            self.sink, self.is_periodic, mask,
        )  # fmt: skip
        return Prepared(call, projected.norm, projected.angles, self._fitted_bias(kernel_size))

    def _attend_from_registers(self, heads: Heads, registers: Heads | None, mask: Tensor | None) -> Tensor:
        """Attention of the registers to all registers and all tokens that are not masked, ``[B, R, Hq, D]``.

        Registers form the sequence, with a window over all of it, and the tokens are its additional keys. These have no
        mask; so where tokens have one, they are the entries of a cache, those that are masked being empty.
        """
        if registers is None or registers.query.shape[1] == 0:
            raise ValueError("registers_attend needs registers: set num_registers or pass registers")
        query, key, value = (t.expand(heads.query.shape[0], -1, -1, -1) for t in registers)
        keys, values = (rearrange(t, "b ... heads dim -> b (...) heads dim") for t in heads[1:])
        if mask is None:
            return neighborhood_attention(
                query,
                key,
                value,
                (query.shape[1],),
                scale=self.scale,
                additional_keys=keys,
                additional_values=values,
                sink=self.sink,
            )
        return cached_attention(
            query,
            keys,
            values,
            torch.zeros(1, query.shape[1], dtype=torch.int32, device=query.device),
            mask.flatten(1).int() - 1,
            scale=self.scale,
            additional_keys=key,
            additional_values=value,
            sink=self.sink,
        )

    def _fitted_kernel_size(self, spatial: Sequence[int]) -> int | Sequence[int]:
        """The window for axes of these lengths; only a causal window may be longer than its axis."""
        if self.kernel_size is None:
            return tuple(spatial)
        if self.is_causal is False:
            return self.kernel_size
        rank = len(spatial)
        return tuple(
            min(k, length) if causal and s == d == 1 else k
            for length, k, s, d, causal in zip(
                spatial,
                normalise_axes("kernel_size", self.kernel_size, rank, int),
                normalise_axes("stride", self.stride, rank, int),
                normalise_axes("dilation", self.dilation, rank, int),
                normalise_axes("is_causal", self.is_causal, rank, bool),
                strict=True,
            )
        )

    def _fitted_bias(self, kernel_size: int | Sequence[int]) -> Tensor | None:
        """The part of the table that is about distances in windows of this size."""
        if self.rpb is None or kernel_size == self.kernel_size:
            return self.rpb
        assert isinstance(self.kernel_size, tuple)
        assert isinstance(kernel_size, tuple)
        pairs = zip(self.kernel_size, kernel_size, strict=True)
        return self.rpb[:, *(slice(own - fitted, own + fitted - 1) for own, fitted in pairs)]


def _judge_bias(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Checkpoints from before NATTEN 0.20 may hold a bias table on relative positions; a zero one says nothing."""
    assert isinstance(module, NeighborhoodGQA)
    if module.rpb is not None:
        return
    table = state_dict.pop(f"{prefix}rpb", None)
    if table is not None and table.any():
        error_msgs.append(
            f'"{prefix}rpb" {tuple(table.shape)} is a relative positional bias, which this {type(module).__name__} '
            "does not have: make it with rel_pos_bias=True. Without the key the rest loads, and outputs will differ."
        )
