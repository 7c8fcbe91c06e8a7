"""Neighborhood attention layers for image, video and language transformers.

Every token attends to a window of its neighbors, on 1, 2 or 3 axes; query heads share KV heads without a copy. Tensors
are ``[batch, *spatial, heads, head_dim]`` for operations and ``[batch, *spatial, channels]`` for layers.

Operations
    neighborhood_attention    attention of every token over its window, differentiable in every tensor
    neighborhood_attention_varlen
                              the same of samples of different shapes, packed one after the other
    attention_state           attention over windows, with the softmax statistics that a merge needs
    merge_attention           attention over the union of sets of keys, from their states; gives an AttentionState
    cached_attention          new tokens over a cache, by position
    na1d, na2d, na3d          NATTEN's operations, with their arguments
    attention, merge_attentions
                              NATTEN's dense attention, and the merge of results by their log-sum-exp
    explain                   which kernels a call takes, here or on another GPU, with what tiles, and why not others:
                              an Explanation, which holds a Kernel for each direction
    compile_ahead             a context in which the kernels of all calls are compiled at once, and not launched
    default_impl              a context that chooses PyTorch or the fused kernels for calls inside of layers

Layers
    NeighborhoodGQA           self-attention: projections, windows, registers, sinks, RoPE, q/k norm
    NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
                              NATTEN's modules, with their arguments and state dicts
    AxialRoPE, RoPE           rotary embeddings of real-valued coordinates, and of token indices
    make_axial_pos            coordinates of an image's tokens, for AxialRoPE
    Positions                 coordinates on their way through a model, which sharding does not cast
    RMSNorm, AdaRMSNorm       norms, the second one driven by a condition
    GEGLU, GatedFeedForward   feed-forward layers
    MixtureOfExperts          several of them, of which each token takes a few

Models
    HDiT                      the image diffusion transformer of k-diffusion: HDiTConfig, LevelConfig
    Denoiser                  preconditioning and loss around it
    MeanFlow                  the loss that has it sample in one step
    DecoderLM                 a language model with sliding windows: DecoderLMConfig, Cache

NATTEN's switches and lists, which change no result
    use_deterministic_algorithms, are_deterministic_algorithms_enabled
    use_kv_parallelism_in_fused_na, is_kv_parallelism_in_fused_na_enabled
    set_memory_usage_preference, get_memory_usage_preference, is_memory_usage_default, is_memory_usage_strict,
    is_memory_usage_unrestricted
    allow_flex_compile, allow_flex_compile_backprop, disable_flex_compile, disable_flex_compile_backprop,
    is_flex_compile_allowed, is_flex_compile_backprop_allowed
    get_configs_for_cutlass_fna, get_configs_for_cutlass_fmha, get_configs_for_cutlass_hopper_fna,
    get_configs_for_cutlass_hopper_fmha, get_configs_for_cutlass_blackwell_fna, get_configs_for_cutlass_blackwell_fmha,
    get_configs_for_flex_fna, get_configs_for_flex_fmha, get_bwd_configs_for_cutlass_fna,
    get_bwd_configs_for_cutlass_fmha, get_bwd_configs_for_cutlass_hopper_fna, get_bwd_configs_for_cutlass_hopper_fmha,
    get_bwd_configs_for_cutlass_blackwell_fna, get_bwd_configs_for_cutlass_blackwell_fmha
    HAS_LIBNATTEN             True: what asks for NATTEN's compiled library runs without it
    __version__               the version of this library

Modules
    natten_layers.functional                   the operations, this library's and NATTEN's, as in natten.functional
    natten_layers.utils.varlen                 lengths of packed sequences for attention, as in natten.utils.varlen
    natten_layers.convert                      multi-head checkpoints to grouped-query ones
    natten_layers.integrations.diffusers       LTX-2's video decoder, and windows for transformers, in diffusers
    natten_layers.integrations.transformers    attn_implementation="natten_layers" in Hugging Face transformers,
                                               and its DiNAT models

Commands, each with --help
    natten-layers-train-hdit, natten-layers-sample-hdit
                              k-diffusion's training script, with its configs; pictures from a checkpoint
    natten-layers-train-lm, natten-layers-generate
                              a language model on bytes; text from it, or from a Hugging Face directory
    natten-layers-convert     multi-head checkpoints to grouped-query ones
    natten-layers-tune        a search for the fastest kernels and tiles of a problem on this machine's GPU

These names, modules and commands are the public interface: docs/stable.md says what a release may change. All other
modules are internal.
"""

from . import functional as functional
from . import utils as utils
from .cached import cached_attention
from .explanation import Explanation, Kernel, explain
from .kernels.host.ahead import compile_ahead
from .modules import (
    GEGLU,
    AdaRMSNorm,
    AxialRoPE,
    Cache,
    DecoderLM,
    DecoderLMConfig,
    Denoiser,
    GatedFeedForward,
    HDiT,
    HDiTConfig,
    LevelConfig,
    MeanFlow,
    MixtureOfExperts,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodGQA,
    Positions,
    RMSNorm,
    RoPE,
    make_axial_pos,
)
from .natten import context as context
from .natten.configs import (
    get_bwd_configs_for_cutlass_blackwell_fmha,
    get_bwd_configs_for_cutlass_blackwell_fna,
    get_bwd_configs_for_cutlass_fmha,
    get_bwd_configs_for_cutlass_fna,
    get_bwd_configs_for_cutlass_hopper_fmha,
    get_bwd_configs_for_cutlass_hopper_fna,
    get_configs_for_cutlass_blackwell_fmha,
    get_configs_for_cutlass_blackwell_fna,
    get_configs_for_cutlass_fmha,
    get_configs_for_cutlass_fna,
    get_configs_for_cutlass_hopper_fmha,
    get_configs_for_cutlass_hopper_fna,
    get_configs_for_flex_fmha,
    get_configs_for_flex_fna,
)
from .natten.context import (
    allow_flex_compile,
    allow_flex_compile_backprop,
    are_deterministic_algorithms_enabled,
    disable_flex_compile,
    disable_flex_compile_backprop,
    get_memory_usage_preference,
    is_flex_compile_allowed,
    is_flex_compile_backprop_allowed,
    is_kv_parallelism_in_fused_na_enabled,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    set_memory_usage_preference,
    use_deterministic_algorithms,
    use_kv_parallelism_in_fused_na,
)
from .natten.dense import attention, merge_attentions
from .natten.neighborhood import na1d, na2d, na3d
from .operations import AttentionState, attention_state, default_impl, merge_attention, neighborhood_attention
from .varlen import neighborhood_attention_varlen

__version__ = "0.1.0"
HAS_LIBNATTEN = True
"""Programs ask it before they call NATTEN's fused operations; all of them run here."""

__all__ = [
    "GEGLU",
    "HAS_LIBNATTEN",
    "AdaRMSNorm",
    "AttentionState",
    "AxialRoPE",
    "Cache",
    "DecoderLM",
    "DecoderLMConfig",
    "Denoiser",
    "Explanation",
    "GatedFeedForward",
    "HDiT",
    "HDiTConfig",
    "Kernel",
    "LevelConfig",
    "MeanFlow",
    "MixtureOfExperts",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodGQA",
    "Positions",
    "RMSNorm",
    "RoPE",
    "__version__",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "attention_state",
    "cached_attention",
    "compile_ahead",
    "default_impl",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "explain",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
    "get_memory_usage_preference",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "make_axial_pos",
    "merge_attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_attention_varlen",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]
