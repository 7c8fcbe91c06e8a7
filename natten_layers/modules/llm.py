"""A decoder language model on causal neighborhood attention: block, model, generation.

Parameter names are those of Hugging Face's files, so that weights are read and written without a mapping.
Shapes: B sequences, L tokens, C channels, Hq and Hkv query and KV heads of D elements, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_dense, prepare
from ..cached import cached_attention
from ..io import hf
from ..io.tensors import make_on_meta
from ..operations import neighborhood_attention
from .cache import Cache, LayerCache
from .feed_forward import GatedFeedForward
from .generation import generate, longest_of, text_first
from .llm_config import DecoderLMConfig
from .norm import RMSNorm
from .query_key import attend_projected, call_watched, normalize_and_rotate
from .rope import RoPE

__all__ = ["DecoderAttention", "DecoderBlock", "DecoderLM", "DecoderLMConfig"]

Device = torch.device | str | None


def _norm(dim: int, config: DecoderLMConfig, device: Device, dtype: torch.dtype | None) -> RMSNorm:
    return RMSNorm(dim, config.norm_eps, zero_centered=config.zero_centered_norm, device=device, dtype=dtype)


class TokenEmbedding(nn.Embedding):
    """Of token indices, their rows of ``weight [V, C]``; of hidden states ``[..., C]``, their products with all rows.

    The latter are the logits of a model whose embeddings are tied. As both are calls of one module, whoever puts its
    weight in place for a call (offloading, sharding) does so for both.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class DecoderAttention(nn.Module):
    """Causal grouped-query attention, windowed or full, with registers, a sink and a cache as its options.

    Not :class:`~natten_layers.modules.attention.NeighborhoodGQA`: files on the hub hold q, k and v apart, and a cache
    makes keys outlive their call.

    Args:
        config: the model's options.
        window: number of tokens that a token sees, itself included, or None.
    """

    def __init__(
        self, config: DecoderLMConfig, window: int | None, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        channels, heads, kv_heads, dim = config.hidden_size, config.num_heads, config.kv_heads, config.dim
        self.head_dim, self.window, self.scale = dim, window, config.attention_scale
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(channels, heads * dim, config.qkv_bias, **factory)
        self.k_proj = nn.Linear(channels, kv_heads * dim, config.qkv_bias, **factory)
        self.v_proj = nn.Linear(channels, kv_heads * dim, config.qkv_bias, **factory)
        self.o_proj = nn.Linear(heads * dim, channels, config.out_bias, **factory)
        self.q_norm = _norm(dim, config, device, dtype) if config.qk_norm else None
        self.k_norm = _norm(dim, config, device, dtype) if config.qk_norm else None
        embedding = config.rope if window is None or config.windowed_rope is None else config.windowed_rope
        self.rope = RoPE(dim, theta=embedding["rope_theta"], scaling=embedding, device=device)
        self.sinks = nn.Parameter(torch.zeros(heads, **factory)) if config.sink == "learned" else None
        self.zero_sink = 0.0 if config.sink == "zero" else None
        registers = torch.zeros(config.num_registers, channels, **factory)
        self.registers = nn.Parameter(registers) if config.num_registers else None
        self.initializer_range = config.initializer_range

    def reset_parameters(self) -> None:
        """Initialise the parameters that are its own, not those of its modules."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=self.initializer_range)

    def extra_repr(self) -> str:
        return f"window={self.window}" + (", sink=zero" if self.zero_sink is not None else "")

    def forward(self, x: Tensor, positions: Tensor, cache: LayerCache | None, longest: int) -> Tensor:
        """Attend from ``x [B, L, C]``.

        Args:
            positions: ``[B or 1, L]``, with a cache ``[B, L]``; where there is padding it comes last, with position
                -1, and its result is of no meaning.
            cache: earlier keys and values; ``x``'s are added.
            longest: upper bound on the cached tokens of a sequence, ``x`` included.
        """
        query, key, value = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        query, key, norm, angles = call_watched(query, key, norms, self.rope, positions)
        registers = (None, None) if self.registers is None else self._register_key_value(self.registers, cache)
        sink = self.zero_sink if self.sinks is None else self.sinks
        # Padding comes last, so no token sees it: a text without a past is plain causal attention.
        length = x.shape[1]
        window = length if self.window is None else min(self.window, length)
        if cache is None:
            call = prepare(query, key, value, window, 1, 1, True, self.scale, *registers, sink)
            return self.o_proj(attend_projected(call, norm, angles).flatten(-2))
        query, key = normalize_and_rotate(query, key, norm, angles)
        empty = not cache.used
        keys, values, key_positions = cache.extend(key, value, positions, longest)
        options = {
            "scale": self.scale, "sink": sink, "additional_keys": registers[0], "additional_values": registers[1]
        }  # fmt: skip
        if empty:
            out = neighborhood_attention(query, key, value, window, is_causal=True, **options)
        else:
            out = cached_attention(query, keys, values, positions, key_positions, window=self.window, **options)
        return self.o_proj(out.flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _register_key_value(self, registers: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.registers is not None:
            return cache.registers
        key, value = (self._heads(project(registers[None])) for project in (self.k_proj, self.v_proj))
        key = key if self.k_norm is None else self.k_norm(key)
        if cache is not None:
            cache.registers = key, value
        return key, value


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to the stream; arguments as DecoderAttention's."""

    def __init__(
        self, config: DecoderLMConfig, window: int | None, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.post_norms = config.post_norms
        self.self_attn = DecoderAttention(config, window, device=device, dtype=dtype)
        self.mlp = GatedFeedForward(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            device=device,
            dtype=dtype,
        )
        self.input_layernorm = _norm(config.hidden_size, config, device, dtype)
        # Hugging Face's name: the feed-forward's input norm in Llama, attention's output norm in Gemma.
        self.post_attention_layernorm = _norm(config.hidden_size, config, device, dtype)
        if config.post_norms:
            self.pre_feedforward_layernorm = _norm(config.hidden_size, config, device, dtype)
            self.post_feedforward_layernorm = _norm(config.hidden_size, config, device, dtype)

    def forward(self, x: Tensor, positions: Tensor, cache: LayerCache | None, longest: int) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), positions, cache, longest)
        if self.post_norms:
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderStack(nn.Module):
    """What Hugging Face's files hold under the name ``model``: all of it but the output head."""

    def __init__(self, config: DecoderLMConfig, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(DecoderBlock(config, w, device=device, dtype=dtype) for w in config.windows)
        self.norm = _norm(config.hidden_size, config, device, dtype)

    def forward(self, input_ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """The stream after the last norm, ``[B, L, C]``; with a mask, padding comes last."""
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)[None]
        longest = length
        if cache is not None:
            positions = positions + cache.lengths[:, None]
            longest = length + cache.longest if mask is None else longest_of(cache.lengths + mask.sum(1))
        elif mask is not None and length > self.config.max_positions:  # asks the device, which a graph can not
            longest = longest_of(mask.sum(1))
        self.check_length(longest)
        if mask is not None:
            positions = torch.where(mask, positions, -1)
        x = self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1.0:
            # Rounded to the stream's dtype first, as Gemma was trained; made where it is used, so nobody waits for it.
            x = x * x.new_full((), self.config.embedding_scale)
        for i, block in enumerate(self.layers):
            x = block(x, positions, None if cache is None else cache.layers[i], longest)
        if cache is not None:
            cache.lengths += length if mask is None else mask.sum(1)
            cache.longest = longest
        return self.norm(x)

    def check_length(self, length: int) -> None:
        """Refuse texts longer than the positions allow."""
        if length > self.config.max_positions:
            raise ValueError(
                f"a text of {length} tokens is longer than the model's max_positions={self.config.max_positions}"
            )


class DecoderLM(nn.Module):
    """A decoder language model: Llama, Mistral, Qwen2, Qwen3, Gemma 3 text, and this library's sinks and registers.

    ``impl`` of the attention follows the tensors' device: fused kernels where they run, otherwise eager.

    Args:
        config: the options.
    """

    def __init__(self, config: DecoderLMConfig, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        # On the meta device first: every parameter is drawn once, by reset_parameters.
        self.model = DecoderStack(config, device="meta", dtype=dtype)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta", dtype=dtype)
        device = torch.empty(0, device=device).device
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of ``initializer_range``, scaled down where a layer adds to the stream (GPT-2)."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                adds = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std / (2 * self.config.num_layers) ** 0.5 if adds else std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm | RoPE | DecoderAttention):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each of ``input_ids [B, L]``, continuing the texts in ``cache``.

        Args:
            input_ids: token indices, an integer dtype.
            attention_mask: ``[B, L]``, true or non-zero for text, false or 0 for padding, which may be anywhere. It is
                about ``input_ids`` alone: the cache knows its own. Logits of padding have no meaning.
            cache: what the model has read before, from :meth:`make_cache`. It takes ``input_ids`` in, and only works
                without gradients.
            logits_at: ``[B]`` int64, the index of the one token of each text whose logits are wanted.

        Returns:
            ``[B, L, V]``, or ``[B, V]`` with ``logits_at``, in the parameters' dtype.

        Raises:
            ValueError: shapes that do not fit, a text longer than ``max_positions``, a cache of another batch size,
                or a cache while gradients are recorded.
        """
        self.check(input_ids, attention_mask, cache)
        if attention_mask is None:
            hidden = self.model(input_ids, None, cache)
        else:
            order, mask = text_first(attention_mask)
            hidden = self.model(input_ids.gather(1, order), mask, cache)
            hidden = hidden.gather(1, order.argsort(1)[..., None].expand_as(hidden))
        if logits_at is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), logits_at]
        return self.model.embed_tokens(hidden) if self.lm_head is None else self.lm_head(hidden)

    def make_cache(self, batch_size: int, *, max_length: int | None = None, device: Device = None) -> Cache:
        """An empty cache for ``batch_size`` texts.

        Layers with a window hold ``window`` tokens (and the registers), however long the text. Other layers grow; with
        ``max_length`` they take that many tokens at once.

        Args:
            device: of the texts, default the parameters', which does not hold where they are offloaded.
        """
        device = self.model.embed_tokens.weight.device if device is None else device
        return Cache(batch_size, self.config.windows, max_length=max_length, device=device)

    generate = generate

    def check(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> None:
        """Refuse arguments that do not fit the model or each other; see :meth:`forward`."""
        check_dense("input_ids", input_ids)
        if attention_mask is not None:
            check_dense("attention_mask", attention_mask)
        if input_ids.ndim != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; expected [B, L], int64 or "
                "int32, L at least 1"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}"
            )
        if cache is None:
            return
        if cache.batch_size != len(input_ids) or len(cache.layers) != self.config.num_layers:
            raise ValueError(
                f"the cache is for {cache.batch_size} texts and {len(cache.layers)} layers, but input_ids has "
                f"{len(input_ids)} texts and the model {self.config.num_layers} layers"
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ValueError("a cache is overwritten in place: use it under torch.no_grad() or torch.inference_mode()")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> DecoderLM:
        """Read a Hugging Face directory of a known family, or one that :meth:`save_pretrained` wrote.

        Memory is the model's own: parameters are made from the files, each of which is read once. Where the config says
        that the output projection is the embedding, but the files hold another one, the model has that one, as in
        transformers.

        Args:
            device: where to put the model, default the CPU.
            dtype: of the parameters, default the one that the files hold; they must then hold one.

        Raises:
            FileNotFoundError: no config, no weights or a missing shard.
            ValueError: an architecture or option that is not implemented, with its config key; or weights that are not
                exactly the model's, with names, shapes and dtypes. The message names the file or directory.
        """
        config = hf.read_config(directory, DecoderLMConfig)
        with hf.open_weights(directory, tied=config.tie_embeddings) as weights:
            config = dataclasses.replace(config, tie_embeddings=weights.tied)
            make = partial(cls, config, device="meta")
            model = make_on_meta(make, directory, layers=config.num_layers, tensors=len(weights.infos))
            weights.fill(model, device=device or "cpu", dtype=dtype)
        for module in model.modules():
            if isinstance(module, RoPE):  # no file holds its constants
                module.to_empty(device=device or "cpu")
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write ``config.json`` and safetensors, in shards if larger than ``max_shard_bytes``.

        transformers loads the files, unless the model has options that none of its families has (a sink, registers, a
        mix of windows): such files have ``model_type`` "natten_layers". A failure leaves what was there.
        """
        hf.save(self.config, self.state_dict(), directory, max_shard_bytes=max_shard_bytes)
