"""The options of :class:`~natten_layers.modules.llm.DecoderLM`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

from ..io.schema import Between, Count, Natural, NotNegative, Positive, check_mapping, check_types

__all__ = ["DecoderLMConfig"]

Layers = Annotated[int, Between(1, 2**16)]


class RopeOptions(TypedDict, total=False):
    """The keys that ``rope`` and ``windowed_rope`` may have."""

    rope_theta: Positive
    rope_type: Literal["default", "linear", "llama3", "yarn"]
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count
    attention_factor: Positive
    beta_fast: Positive
    beta_slow: Positive
    mscale: NotNegative
    mscale_all_dim: NotNegative
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class DecoderLMConfig:
    """Options of a Llama-shaped decoder. They cover Llama, Mistral, Qwen2, Qwen3 and Gemma 3 (text).

    Args:
        vocab_size: number of rows of the embedding.
        hidden_size: channels of the residual stream.
        intermediate_size: channels inside the gated feed-forward layer.
        num_layers: number of decoder blocks.
        num_heads: number of query heads.
        num_kv_heads: number of KV heads, a divisor of ``num_heads``, which is the default.
        head_dim: elements of a head, default ``hidden_size // num_heads``.
        windows: one entry per layer: the number of tokens that a token sees, itself included, or None for all before
            it. A single entry applies to every layer.
        max_positions: length of the longest text, prompt and generated tokens together.
        rope: ``rope_theta``, ``rope_type`` and the keys of that type, see :class:`~natten_layers.modules.rope.RoPE`.
        windowed_rope: RoPE options of layers with a window, default ``rope``.
        norm_eps: added to the mean square in every norm.
        zero_centered_norm: the gain of a norm is ``1 + weight`` (Gemma) instead of ``weight``.
        post_norms: also normalise the outputs of attention and feed-forward (Gemma).
        qk_norm: apply an RMS norm to every query and key head before RoPE (Qwen3, Gemma).
        qkv_bias, out_bias, mlp_bias: whether those projections have a bias.
        activation: applied to the feed-forward gate; "gelu_tanh" is the tanh approximation of gelu.
        attention_scale: factor on attention scores, default ``head_dim ** -0.5``.
        embedding_scale: factor on embeddings (Gemma: ``hidden_size ** 0.5``).
        tie_embeddings: use the embedding as output projection.
        sink: an extra logit in the softmax, without a value: None for none, "zero" for zero attention (softmax1), or
            "learned" for one logit per query head and layer.
        num_registers: number of learned tokens per layer that every token sees, whatever its window.
        initializer_range: standard deviation of initial weights.
        bos_token_id, eos_token_id, pad_token_id: special tokens; ``generate`` stops after any ``eos_token_id``.

    Raises:
        ValueError: a value of another type or out of bounds, or options that do not fit together; the message names
            them.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Layers
    num_heads: Count
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    windows: tuple[Count | None, ...] = (None,)
    max_positions: Count = 131072
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    windowed_rope: Mapping[str, Any] | None = None
    norm_eps: NotNegative = 1e-6
    zero_centered_norm: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    tie_embeddings: bool = False
    sink: Literal["zero", "learned"] | None = None
    num_registers: Natural = 0
    initializer_range: NotNegative = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        # Defaults are filled in, so that configs of equal models are equal.
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if len(self.windows) == 1:
            object.__setattr__(self, "windows", self.windows * self.num_layers)
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.kv_heads}")
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.dim}")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for num_layers={self.num_layers}")
        for name, rope in (("rope", self.rope), ("windowed_rope", self.windowed_rope)):
            if rope is not None:
                check_mapping(rope, RopeOptions, name)
                if "rope_theta" not in rope:
                    raise ValueError(f'{name} must have a positive "rope_theta", got {rope!r}')

    @property
    def kv_heads(self) -> int:
        """``num_kv_heads``, which is never None after construction."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def dim(self) -> int:
        """``head_dim``, which is never None after construction."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """``eos_token_id`` as a tuple."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
