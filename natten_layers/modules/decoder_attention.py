"""The attention of a decoder language model: causal, windowed or full, with registers, a sink and a cache.

Shapes are those of ``llm.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import prepare, prepare_packed
from ..cached import cached_attention
from ..operations import neighborhood_attention
from .cache import LayerCache
from .llm_config import DecoderLMConfig, rotary_dim
from .norm import RMSNorm
from .query_key import HeadNorm, attend_with_qk_prep, call_watched, normalize_and_rotate
from .rope import Angles, RoPE

__all__ = ["DecoderAttention"]

Device = torch.device | str | None


def make_norm(dim: int, config: DecoderLMConfig, device: Device, dtype: torch.dtype | None) -> RMSNorm:
    return RMSNorm(dim, config.norm_eps, zero_centered=config.zero_centered_norm, device=device, dtype=dtype)


class DecoderAttention(nn.Module):
    """Causal grouped-query attention, windowed or full, with optional registers, sink and cache.

    It is separate from :class:`~natten_layers.modules.attention.NeighborhoodGQA` because Hugging Face's files hold the
    projections of query, key and value as separate tensors, and because it has a cache.

    Args:
        config: the model's options.
        layer: which of the config's layers this is, for its window and whether it has RoPE.
    """

    def __init__(
        self, config: DecoderLMConfig, layer: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        channels, heads, kv_heads, dim = config.hidden_size, config.num_heads, config.kv_heads, config.dim
        window = config.windows[layer]
        self.head_dim, self.window, self.scale = dim, window, config.attention_scale
        self.softcap = config.attention_softcap
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(channels, heads * dim, config.qkv_bias, **factory)
        self.k_proj = nn.Linear(channels, kv_heads * dim, config.qkv_bias, **factory)
        self.v_proj = nn.Linear(channels, kv_heads * dim, config.qkv_bias, **factory)
        self.o_proj = nn.Linear(heads * dim, channels, config.out_bias, **factory)
        self.norms_all_heads = config.qk_norm == "all heads"
        q_dim, k_dim = (heads * dim, kv_heads * dim) if self.norms_all_heads else (dim, dim)
        self.q_norm = make_norm(q_dim, config, device, dtype) if config.qk_norm else None
        self.k_norm = make_norm(k_dim, config, device, dtype) if config.qk_norm else None
        embedding = config.rope if window is None or config.windowed_rope is None else config.windowed_rope
        self.rope = None
        if config.has_rope(layer):
            self.rope = RoPE(
                rotary_dim(dim, embedding),
                theta=embedding["rope_theta"],
                scaling=embedding,
                interleaved=config.rope_interleaved,
                device=device,
            )
        self.stretches = self.rope is not None and self.rope.stretches
        self.query_growth = embedding.get("llama_4_scaling_beta", 0.0)
        self.query_growth_length = embedding.get("original_max_position_embeddings", 1)
        self.sinks = nn.Parameter(torch.zeros(heads, **factory)) if config.sink == "learned" else None
        self.zero_sink = 0.0 if config.sink == "zero" else None
        registers = torch.zeros(config.num_registers, channels, **factory)
        self.registers = nn.Parameter(registers) if config.num_registers else None
        self.initializer_range = config.initializer_range

    def reset_parameters(self) -> None:
        """Initialise the sinks and registers that this module owns, but not the parameters of its submodules."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=self.initializer_range)

    def extra_repr(self) -> str:
        return f"window={self.window}" + (", sink=zero" if self.zero_sink is not None else "")

    def forward(
        self, x: Tensor, positions: Tensor, cache: LayerCache | None, longest: int, shapes: Tensor | None = None
    ) -> Tensor:
        """Attend from every token of ``x``.

        Args:
            x: ``[B, L, C]``.
            positions: int64 ``[B or 1, L]``, with a cache ``[B, L]``. Padding must come last and has position -1; its
                output has no meaning.
            cache: keys and values of earlier tokens, to which those of ``x`` are added.
            longest: upper bound on the cached tokens of a sequence, those of ``x`` included.
            shapes: ``[texts, 1]`` int64 on the CPU, lengths of texts that are packed into ``x [1, N, C]`` and do not
                see each other. There is no cache then.

        Returns:
            ``[B, L, C]``.
        """
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        if norms is not None and self.norms_all_heads:
            query, key, norms = norms[0](query), norms[1](key), None
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.query_growth:
            query = query * self._query_factor(positions).to(query.dtype)
        of_text: dict[str, int] = {}
        if self.stretches and cache is not None and cache.expected_length:
            of_text["text_length"] = cache.expected_length
        query, key, norm, angles = call_watched(query, key, norms, self.rope, positions, **of_text)
        registers = (None, None) if self.registers is None else self._register_key_value(self.registers, cache)
        sink = self.zero_sink if self.sinks is None else self.sinks
        # Padding comes last, so no token sees it, and without earlier tokens this is plain causal attention.
        length = x.shape[1]
        if shapes is not None:
            return self._attend_packed(query, key, value, norm, angles, shapes, registers, sink)
        window = length if self.window is None else min(self.window, length)
        if cache is None and self.softcap is None:
            call = prepare(query, key, value, window, 1, 1, True, self.scale, *registers, sink)
            return self.o_proj(attend_with_qk_prep(call, norm, angles).flatten(-2))
        query, key = normalize_and_rotate(query, key, norm, angles)
        empty = cache is None or not cache.used
        keys, values, key_positions = key, value, positions
        if cache is not None:
            seen = cache.extend(key, value, positions, longest)
            if not empty:  # a new one may have no slot at all, after texts that begin with padding
                keys, values, key_positions = seen
        options = {
            "scale": self.scale, "sink": sink, "additional_keys": registers[0], "additional_values": registers[1]
        }  # fmt: skip
        if empty and self.softcap is None:
            out = neighborhood_attention(query, key, value, window, is_causal=True, **options)
        else:
            options |= {"window": self.window, "softcap": self.softcap}
            out = cached_attention(query, keys, values, positions, key_positions, **options)
        return self.o_proj(out.flatten(-2))

    def _attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        norm: HeadNorm | None,
        angles: Angles | None,
        shapes: Tensor,
        registers: tuple[Tensor, Tensor] | tuple[None, None],
        sink: Tensor | float | None,
    ) -> Tensor:
        """Attention of each packed text over itself."""
        window = query.shape[1] if self.window is None else self.window
        if self.softcap is None:
            packed = query[0], key[0], value[0], shapes
            call = prepare_packed(*packed, window, 1, 1, True, self.scale, *registers, sink)
            return self.o_proj(attend_with_qk_prep(call, norm, angles).flatten(-2)[None])
        # Positions at which each text stands so far behind the one before that no window reaches back.
        query, key = normalize_and_rotate(query, key, norm, angles)
        apart = torch.arange(len(shapes)).repeat_interleave(shapes[:, 0]).to(query.device) * window
        apart = (apart + torch.arange(query.shape[1], device=query.device))[None]
        out = cached_attention(
            query, key, value, apart, apart, window=window, softcap=self.softcap, scale=self.scale, sink=sink,
            additional_keys=registers[0], additional_values=registers[1],
        )  # fmt: skip
        return self.o_proj(out.flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _query_factor(self, positions: Tensor) -> Tensor:
        """``[B or 1, L, 1, 1]``, which grows with the position as in Llama 4."""
        spans = torch.div(positions.clamp(min=0), self.query_growth_length, rounding_mode="floor")
        return (1 + self.query_growth * torch.log1p(spans.float()))[..., None, None]

    def _register_key_value(self, registers: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.registers is not None:
            return cache.registers
        key, value = self.k_proj(registers[None]), self._heads(self.v_proj(registers[None]))
        if self.k_norm is None:
            key = self._heads(key)
        else:
            key = self._heads(self.k_norm(key)) if self.norms_all_heads else self.k_norm(self._heads(key))
        if cache is not None:
            cache.registers = key, value
        return key, value
