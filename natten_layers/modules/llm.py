"""A decoder language model with causal neighborhood attention: block and model.

Parameters have the names that Hugging Face's files use, so weights are read and written without renaming.
Shapes: B sequences, L tokens, C channels, Hq query heads and Hkv KV heads of D elements, V tokens in the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_dense
from ..io import hf
from ..io.tensors import make_on_meta
from ..kernels.ops.transforms import is_transformed
from ..varlen import packed_shapes
from ..wording import listed, with_type
from .base import Embedding, allocate, check_count
from .cache import Cache, LayerCache
from .decoder_attention import DecoderAttention, Device, make_norm
from .feed_forward import GatedFeedForward, MixtureOfExperts
from .generation import generate, longest_of, text_first
from .llm_config import DecoderLMConfig
from .norm import RMSNorm
from .rope import RoPE
from .rope_scaling import check_packed

__all__ = ["DecoderAttention", "DecoderBlock", "DecoderLM", "DecoderLMConfig"]


def _stream_norm(config: DecoderLMConfig, device: Device, dtype: torch.dtype | None) -> RMSNorm | nn.LayerNorm:
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=False, device=device, dtype=dtype)
    return make_norm(config.hidden_size, config, device, dtype)


class TokenEmbedding(Embedding):
    """Embed token indices with ``weight [V, C]``, or compute the logits ``[..., V]`` of hidden states ``[..., C]``.

    Models with tied embeddings use both. Since the logits too are a call of this module, offloading and sharding, which
    load a module's weight for the time of its call, work for both.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_floating_point():
            return F.linear(input, self.weight)
        try:
            return super().forward(input)
        except IndexError as error:  # only the CPU's embedding checks the indices
            wrong = (input < 0) | (input >= self.num_embeddings)
            outside = "" if is_transformed() else f" {listed(input[wrong].tolist())}"
            raise ValueError(f"input_ids holds{outside}; tokens are 0 to {self.num_embeddings - 1}") from error


def _feed_forward(
    config: DecoderLMConfig, layer: int, device: Device, dtype: torch.dtype | None
) -> GatedFeedForward | MixtureOfExperts:
    def make(hidden_dim: int) -> GatedFeedForward:
        return GatedFeedForward(
            config.hidden_size,
            hidden_dim,
            activation=config.activation,
            bias=config.mlp_bias,
            swiglu_alpha=config.swiglu_alpha,
            swiglu_limit=config.swiglu_limit,
            device=device,
            dtype=dtype,
        )

    if not config.has_experts(layer):
        return make(config.intermediate_size)
    assert config.num_experts is not None
    assert config.expert_size is not None
    return MixtureOfExperts(
        partial(make, config.expert_size),
        config.num_experts,
        config.experts_per_token,
        config.hidden_size,
        normalize=config.normalize_experts,
        bias=config.router_bias,
        device=device,
        dtype=dtype,
    )


class DecoderBlock(nn.Module):
    """Attention and feed-forward, added to the stream, with norms before or after each.

    The names of the norms are those of Llama where there are norms before only, and else those of Gemma and OLMo:
    ``post_attention_layernorm`` is the feed-forward's input norm in the one and attention's output norm in the others.
    """

    def __init__(
        self, config: DecoderLMConfig, layer: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.self_attn = DecoderAttention(config, layer, device=device, dtype=dtype)
        self.mlp = _feed_forward(config, layer, device, dtype)
        self.order = _norm_order(config)
        for name in dict.fromkeys(name for name in self.order if name is not None):
            self.add_module(name, _stream_norm(config, device, dtype))
        self.parallel = config.parallel_blocks

    def forward(
        self, x: Tensor, positions: Tensor, cache: LayerCache | None, longest: int, shapes: Tensor | None = None
    ) -> Tensor:
        before_attention, after_attention, before_mlp, after_mlp = map(self._norm, self.order)
        normed = before_attention(x)
        attended = after_attention(self.self_attn(normed, positions, cache, longest, shapes))
        if self.parallel:
            return self._add(self._add(x, attended), self.mlp(normed))
        x = self._add(x, attended)
        return self._add(x, after_mlp(self.mlp(before_mlp(x))))

    def _norm(self, name: str | None) -> Callable[[Tensor], Tensor]:
        return _unchanged if name is None else self.get_submodule(name)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + (branch if self.residual_scale == 1.0 else branch * self.residual_scale)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _norm_order(config: DecoderLMConfig) -> tuple[str | None, str | None, str | None, str | None]:
    """Names of the norms before and after attention, and before and after feed-forward."""
    if config.parallel_blocks:
        return "input_layernorm", None, None, None
    if not config.post_norms:
        return "input_layernorm", None, "post_attention_layernorm", None
    before = ("input_layernorm", "pre_feedforward_layernorm") if config.pre_norms else (None, None)
    return before[0], "post_attention_layernorm", before[1], "post_feedforward_layernorm"


class DecoderStack(nn.Module):
    """Embedding, blocks and final norm: all that Hugging Face's files name ``model.*``, without the output head."""

    def __init__(self, config: DecoderLMConfig, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.longest_short_text = config, config.longest_short_text
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderBlock(config, layer, device=device, dtype=dtype) for layer in range(config.num_layers)
        )
        self.norm = _stream_norm(config, device, dtype)

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The stream after the last norm, ``[B, L, C]``, of ``input_ids [B, L]``.

        With a ``mask [B, L]``, true for text, padding must come last. With ``cu_seqlens``, ``B`` is 1.
        """
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)[None]
        longest, shapes = length, None
        if cu_seqlens is not None:
            shapes = packed_shapes(None, cu_seqlens, 1, length, "input_ids")
            if not torch.compiler.is_compiling():  # a compiled graph does not know the lengths
                longest = int(shapes.max()) if len(shapes) else 0
                for rope in (self.config.rope, self.config.windowed_rope):
                    check_packed(rope or {}, shapes[:, 0])
            starts = (shapes.cumsum(0) - shapes)[:, 0].repeat_interleave(shapes[:, 0], output_size=length)
            positions = positions - starts.to(positions.device)
        if cache is not None:
            positions = positions + cache.lengths[:, None]
            longest = length + cache.longest if mask is None else longest_of(cache.lengths + mask.sum(1))
        elif mask is not None and length > self.config.max_positions:  # only then, as longest_of waits for the device
            longest = longest_of(mask.sum(1))
        if cache is None:
            self.check_length(longest)
        else:
            self.check_length(max(longest, cache.expected_length), past=cache.rope_length)
        if mask is not None:
            positions = torch.where(mask, positions, -1)
        x = self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1.0:
            # The factor is rounded to the stream's dtype, as in Gemma's training, and created on the device, so that
            # nothing waits for a copy.
            x = x * x.new_full((), self.config.embedding_scale)
        for i, block in enumerate(self.layers):
            x = block(x, positions, None if cache is None else cache.layers[i], longest, shapes)
        if cache is not None:
            cache.lengths += length if mask is None else mask.sum(1)
            cache.longest = longest
        return self.norm(x)

    def check_length(self, length: int, *, past: int = 0) -> None:
        """Refuse texts longer than the positions allow, of which a cache holds keys as of ``past`` tokens."""
        short = self.longest_short_text
        if short is not None and 0 < past <= short < length:
            raise ValueError(
                f"a cached text of {past} tokens grows to {length}, but its keys have LongRoPE's factors for up to "
                f"original_max_position_embeddings={short}. Read the whole text into a new cache, at once or, after "
                "cache.expect(length), in parts"
            )
        if length > self.config.max_positions:
            raise ValueError(
                f"a text of {length} tokens is longer than the model's max_positions={self.config.max_positions}"
            )


def _check_index(logits_at: object, batch: int) -> None:
    if not isinstance(logits_at, Tensor) or logits_at.shape != (batch,) or logits_at.dtype != torch.int64:
        found = (
            f"shape {tuple(logits_at.shape)} and dtype {logits_at.dtype}"
            if isinstance(logits_at, Tensor)
            else logits_at
        )
        raise ValueError(f"logits_at must be a tensor [{batch}], int64, an index for each text, got {found}")


class DecoderLM(nn.Module):
    """A decoder language model: Llama and the families that differ from it in parts, and our sinks and registers.

    :meth:`from_pretrained` reads Llama, Mistral, Mixtral, Ministral 3, Qwen2, Qwen3 and its MoE, Gemma 2 and 3 (text),
    Phi-3 and Phi-4, SmolLM3, OLMo 2 and 3, OLMoE, Granite (with windows and sinks too), Exaone 4, GLM-4, Cohere 2 and
    gpt-oss, whose experts in MXFP4 become bf16.

    Attention uses the fused kernels where they support the tensors, otherwise the eager path, as always with
    ``attention_softcap``.

    Args:
        config: sizes and options.
        device: device of the parameters; None is torch's default device.
        dtype: dtype of the parameters; None is torch's default dtype.
    """

    def __init__(self, config: DecoderLMConfig, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(config, DecoderLMConfig):
            raise ValueError(f"config must be a DecoderLMConfig, got {with_type(config)}")
        self.config = config
        # Modules are made on the meta device, so that parameters are initialised once, by reset_parameters.
        self.model = DecoderStack(config, device="meta", dtype=dtype)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta", dtype=dtype)
        device = torch.empty(0, device=device).device
        if device.type != "meta":
            allocate(self, device)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from a normal distribution with standard deviation ``initializer_range``; biases are zero.

        Projections that add to the residual stream are scaled by ``(2 * num_layers) ** -0.5``, as in GPT-2.
        """
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                adds = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std / (2 * self.config.num_layers) ** 0.5 if adds else std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm | nn.LayerNorm | RoPE | DecoderAttention):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_at: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits for the token that follows each of ``input_ids``, which continue the texts in ``cache``.

        Args:
            input_ids: token indices ``[B, L]``, int64 or int32.
            attention_mask: ``[B, L]``, true or non-zero for text, false or 0 for padding, which may be anywhere. It
                covers only ``input_ids``, not the tokens in the cache. Logits at padding have no meaning.
            cache: the earlier tokens of each text, made by :meth:`make_cache`. ``input_ids`` are added to it in place,
                so it works only while no gradients are recorded. Texts that LongRoPE or dynamic RoPE stretches can be
                read in parts after ``cache.expect(length)``.
            logits_at: ``[B]`` int64, for each text the index of the only token whose logits are computed.
            cu_seqlens: ``[texts + 1]``, integers that begin with 0: where texts begin that are packed into a single
                row of ``input_ids [1, N]``, and at last where they end. Each is computed as if it were alone: its
                positions begin with 0, and it sees no other. Not together with a mask, a cache or ``logits_at``.

        Returns:
            ``[B, L, V]``, or ``[B, V]`` with ``logits_at``, in the parameters' dtype.

        Raises:
            ValueError: shapes or dtypes that do not fit, a token out of range (on a GPU that is torch's device-side
                assertion, because a check would have to wait for the GPU), a text longer than ``max_positions``, a
                cache of another batch size or number of layers, or a cache while gradients are recorded.
        """
        self.check(input_ids, attention_mask, cache)
        if cu_seqlens is not None:
            beside = {"attention_mask": attention_mask, "cache": cache, "logits_at": logits_at}
            given = [name for name, value in beside.items() if value is not None]
            if given or len(input_ids) != 1:
                raise ValueError(
                    "cu_seqlens goes with one row of input_ids and without attention_mask, cache and logits_at; "
                    f"got {', '.join(given) or f'{len(input_ids)} rows, pass input_ids.reshape(1, -1)'}"
                )
        if logits_at is not None:
            _check_index(logits_at, len(input_ids))
        if attention_mask is None:
            hidden = self.model(input_ids, None, cache, cu_seqlens)
        else:
            order, mask = text_first(attention_mask)
            hidden = self.model(input_ids.gather(1, order), mask, cache)
            hidden = hidden.gather(1, order.argsort(1)[..., None].expand_as(hidden))
        if logits_at is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), logits_at]
        logits = self.model.embed_tokens(hidden) if self.lm_head is None else self.lm_head(hidden)
        logits = logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    __call__: Callable[..., Tensor]

    def make_cache(self, batch_size: int, *, max_length: int | None = None, device: Device = None) -> Cache:
        """An empty cache for ``batch_size`` texts.

        A layer with a window holds ``window`` tokens (and the registers), however long the text. Other layers grow with
        the text.

        Args:
            batch_size: number of texts.
            max_length: tokens for which layers without a window allocate memory at once, instead of growing; of more
                than the config's ``max_positions``, for as many, as no text is longer.
            device: device of the texts, default that of the embedding. Give it if the parameters are offloaded.

        Raises:
            ValueError: ``batch_size`` is negative, or ``max_length`` is not at least 1.
        """
        device = self.model.embed_tokens.weight.device if device is None else device
        if max_length is not None:
            check_count("max_length", max_length)
            max_length = min(max_length, self.config.max_positions)
        return Cache(batch_size, self.config.windows, max_length=max_length, device=device)

    generate = generate

    def check(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> None:
        """Raise a ValueError for arguments of :meth:`forward` that do not fit the model or each other."""
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
        """Read a Hugging Face directory of a supported family, or one that :meth:`save_pretrained` wrote.

        Each file is read once, straight into the parameters, without a second copy of the model in memory. If the
        config ties the output projection to the embedding, but the files hold a different projection, that one is
        used, as in transformers.

        Args:
            directory: holds ``config.json`` and safetensors files.
            device: device of the model, default the CPU.
            dtype: dtype of the parameters. None keeps the files' dtype, which must be the same for all parameters.

        Returns:
            The model, in eval mode.

        Raises:
            FileNotFoundError: there is no config or no weights, or a shard is missing.
            ValueError: an architecture or option is not implemented (the message names its config key), or the weights
                are not exactly the model's (it names tensors, shapes and dtypes and the file or directory).
        """
        config = hf.read_config(directory, DecoderLMConfig)
        with hf.open_weights(directory, tied=config.tie_embeddings, rows=config.projection_rows) as weights:
            config = dataclasses.replace(config, tie_embeddings=weights.tied)
            make = partial(cls, config, device="meta")
            model = make_on_meta(make, directory, layers=config.num_layers, tensors=len(weights.infos))
            weights.fill(model, device=device or "cpu", dtype=dtype)
        for module in model.modules():
            if isinstance(module, RoPE):  # its constants are not in the files
                module.to_empty(device=device or "cpu")
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write ``config.json`` and safetensors files that :meth:`from_pretrained` reads.

        transformers loads them too, unless the model has options that none of its families has (a sink, registers, a
        mix of windows): then ``model_type`` is "natten_layers". If writing fails, earlier files stay unchanged.

        Args:
            directory: created if it does not exist. Weight files of an earlier save in it are removed, that is
                ``model.safetensors``, shards such as ``model-00001-of-00002.safetensors``, and their index.
            max_shard_bytes: larger models are split into several files of at most about this size.

        Raises:
            OSError: a file cannot be written; the message names it.
            ValueError: ``directory`` ends like a file, such as .safetensors, ``max_shard_bytes`` is no count, or the
                model is sharded (the message says how to gather it) or on the meta device.
        """
        check_count("max_shard_bytes", max_shard_bytes)
        hf.save(self.config, self.state_dict(), directory, max_shard_bytes=max_shard_bytes)
