"""The options of :class:`~natten_layers.modules.llm.DecoderLM`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from ..io.schema import Count, Layers, Natural, NotNegative, Positive, check_mapping, check_types
from .feed_forward import Activation

__all__ = ["DecoderLMConfig", "rotary_dim"]


class RopeOptions(TypedDict, total=False):
    """The keys that ``rope`` and ``windowed_rope`` may have."""

    rope_theta: Positive
    rope_type: Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"]
    partial_rotary_factor: Positive
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
    short_factor: tuple[Positive, ...]
    long_factor: tuple[Positive, ...]
    llama_4_scaling_beta: float


def rotary_dim(head_dim: int, rope: Mapping[str, Any]) -> int:
    """Elements of a head that RoPE rotates."""
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


@dataclass(frozen=True, kw_only=True)
class DecoderLMConfig:
    """A Llama-shaped decoder, whose options are the parts in which the families on the Hugging Face hub differ.

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
            ``partial_rotary_factor`` is the share of a head, from its start, that is rotated (Phi-4-mini, GLM-4).
            ``llama_4_scaling_beta`` multiplies queries by ``1 + beta * log(1 + position //
            original_max_position_embeddings)`` (Ministral 3).
        windowed_rope: the same for layers with a window; None is ``rope``.
        rope_layers: one entry per layer, or one for all: whether it has RoPE (SmolLM3, Exaone 4, Cohere 2).
        rope_interleaved: neighboring elements are rotated together (GLM-4, Cohere 2).
        norm: "rms", or "layer" for layer norm without a bias (Cohere 2).
        norm_eps: added to the mean square, or the variance, in every norm.
        zero_centered_norm: norm gains are ``1 + weight`` (Gemma).
        pre_norms: norm the inputs of attention and feed-forward (all but OLMo and Exaone 4).
        post_norms: norm the outputs of attention and feed-forward (Gemma, OLMo, Exaone 4, GLM-4).
        parallel_blocks: attention and feed-forward read the same norm's result and are added together (Cohere 2).
        qk_norm: RMS norm of every query and key head before RoPE (Qwen3, Gemma, Exaone 4); "all heads" is one norm over
            all heads of the queries, and one over those of the keys (OLMo).
        qkv_bias, out_bias, mlp_bias: biases of those projections.
        activation: of the feed-forward gate; see :class:`~natten_layers.modules.feed_forward.GatedFeedForward`.
        swiglu_alpha, swiglu_limit: of the activation "clamped_swiglu" (gpt-oss).
        num_experts: number of feed-forward layers of which each token takes a few, or None for a single one (Mixtral,
            Qwen3-MoE, OLMoE, gpt-oss).
        experts_per_token: how many a token takes.
        expert_size: channels inside an expert, default ``intermediate_size``.
        expert_layers: one entry per layer, or one for all: whether it has experts (Qwen3-MoE).
        normalize_experts: the weights of a token's experts add up to 1.
        router_bias: whether the projection that chooses experts has a bias (gpt-oss).
        attention_scale: factor on attention scores, default ``head_dim ** -0.5``.
        embedding_scale: factor on embeddings (Gemma: ``hidden_size ** 0.5``; Granite).
        residual_scale: factor on what attention and feed-forward add to the stream (Granite).
        logit_scale: factor on logits (Cohere 2, Granite).
        attention_softcap: scores become ``cap * tanh(score / cap)`` (Gemma 2). The kernels do not have it: attention is
            then computed in PyTorch on every device, in time that grows with the square of the text's length.
        logit_softcap: the same of logits (Gemma 2).
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
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}, hash=False)
    windowed_rope: Mapping[str, Any] | None = field(default=None, hash=False)
    rope_layers: tuple[bool, ...] = (True,)
    rope_interleaved: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: NotNegative = 1e-6
    zero_centered_norm: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    parallel_blocks: bool = False
    qk_norm: bool | Literal["all heads"] = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    swiglu_alpha: Positive = 1.702
    swiglu_limit: Positive = 7.0
    num_experts: Count | None = None
    experts_per_token: Count = 1
    expert_size: Count | None = None
    expert_layers: tuple[bool, ...] = (True,)
    normalize_experts: bool = True
    router_bias: bool = False
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: Positive | None = None
    logit_softcap: Positive | None = None
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
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if len(self.windows) == 1:
            object.__setattr__(self, "windows", self.windows * self.num_layers)
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.kv_heads}")
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.dim}")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for num_layers={self.num_layers}")
        for name in ("rope_layers", "expert_layers"):
            of_layers = getattr(self, name)
            if len(of_layers) not in (1, self.num_layers):
                raise ValueError(f"{name} has {len(of_layers)} entries for num_layers={self.num_layers}")
            if len(set(of_layers)) == 1:
                object.__setattr__(self, name, of_layers[:1])
        self._check_experts()
        for name, rope in (("rope", self.rope), ("windowed_rope", self.windowed_rope)):
            if rope is not None:
                object.__setattr__(self, name, self._checked_rope(name, rope))
        if self.parallel_blocks and (self.post_norms or not self.pre_norms):
            raise ValueError("parallel_blocks have one norm before them: pre_norms must be true and post_norms false")
        if not self.pre_norms and not self.post_norms:
            raise ValueError("pre_norms and post_norms are both false: a block needs norms")
        if self.norm == "layer" and self.zero_centered_norm:
            raise ValueError('norm="layer" has no zero_centered_norm')

    def _check_experts(self) -> None:
        if self.num_experts is None:
            if self.experts_per_token != 1 or self.expert_size is not None or self.expert_layers != (True,):
                raise ValueError("experts_per_token, expert_size and expert_layers are given without num_experts")
            return
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must not exceed num_experts={self.num_experts}"
            )
        if self.expert_size is None:
            object.__setattr__(self, "expert_size", self.intermediate_size)

    def _checked_rope(self, name: str, rope: Mapping[str, Any]) -> dict[str, Any]:
        rope = check_mapping(rope, RopeOptions, name)
        if "rope_theta" not in rope:
            raise ValueError(f'{name} must have a positive "rope_theta", got {rope!r}')
        turning = rotary_dim(self.dim, rope)
        if not 2 <= turning <= self.dim or turning % 2:
            raise ValueError(
                f"{name}: partial_rotary_factor={rope.get('partial_rotary_factor')} of head_dim={self.dim} elements is "
                f"{turning}; expected an even number from 2 to head_dim"
            )
        if "llama_4_scaling_beta" in rope and (self.qk_norm or "original_max_position_embeddings" not in rope):
            raise ValueError(
                f"{name}: llama_4_scaling_beta needs original_max_position_embeddings, and qk_norm to be false"
            )
        return rope

    def has_rope(self, layer: int) -> bool:
        """What ``rope_layers`` says of a layer."""
        return self.rope_layers[layer if len(self.rope_layers) > 1 else 0]

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.num_experts is not None and self.expert_layers[layer if len(self.expert_layers) > 1 else 0]

    @property
    def longest_short_text(self) -> int | None:
        """The length up to which LongRoPE takes its short factors, None without LongRoPE."""
        ropes = [rope for rope in (self.rope, self.windowed_rope) if rope and rope.get("rope_type") == "longrope"]
        return min((rope["original_max_position_embeddings"] for rope in ropes), default=None)

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
    def projection_rows(self) -> dict[str, int]:
        """Rows of the projections that some families' files hold as one, and the number of experts."""
        kv_rows = self.kv_heads * self.dim
        heads = {"q_proj": self.num_heads * self.dim, "k_proj": kv_rows, "v_proj": kv_rows}
        feed_forward = {"gate_proj": self.intermediate_size, "up_proj": self.intermediate_size}
        return {**heads, **feed_forward, "experts": self.num_experts or 0}

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """``eos_token_id`` as a tuple."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
