"""Neighborhood attention layers for image, video and language transformers.

Every token attends to a window of its neighbors, on 1, 2 or 3 axes; query heads share KV heads without a copy. Tensors
are ``[batch, *spatial, heads, head_dim]`` for operations and ``[batch, *spatial, channels]`` for layers.

Operations
    neighborhood_attention    attention of every token over its window, differentiable in every tensor
    attention_state           the same, with the softmax statistics that a merge needs
    merge_attention           attention over the union of sets of keys, from their states; gives an AttentionState
    cached_attention          new tokens over a cache, by position
    na1d, na2d, na3d          NATTEN's operations, with their arguments
    explain                   which kernels a call takes, with what tiles, and why not others: an Explanation

Layers
    NeighborhoodGQA           self-attention: projections, windows, registers, sinks, RoPE, q/k norm
    NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
                              NATTEN's modules, with their arguments and state dicts
    AxialRoPE, RoPE           rotary embeddings of real-valued coordinates, and of token indices
    make_axial_pos            coordinates of an image's tokens, for AxialRoPE
    Positions                 coordinates on their way through a model, which sharding does not cast
    RMSNorm, AdaRMSNorm       norms, the second one driven by a condition
    GEGLU, GatedFeedForward   feed-forward layers

Models
    HDiT                      the image diffusion transformer of k-diffusion: HDiTConfig, LevelConfig
    Denoiser                  preconditioning and loss around it
    DecoderLM                 a language model with sliding windows: DecoderLMConfig, Cache

Modules
    natten_layers.convert                      multi-head checkpoints to grouped-query ones, also a command
    natten_layers.tune                         a search for the fastest tiles of one problem, also a command
    natten_layers.integrations.diffusers       LTX-2's video decoder, and windows for transformers, in diffusers
    natten_layers.integrations.transformers    attn_implementation="natten_layers" in Hugging Face transformers

These names and modules are the public interface. All other modules are internal and may change in any release.
"""

from .cached import cached_attention
from .explanation import Explanation, explain
from .functional import AttentionState, attention_state, merge_attention, neighborhood_attention
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
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodGQA,
    Positions,
    RMSNorm,
    RoPE,
    make_axial_pos,
    na1d,
    na2d,
    na3d,
)

__all__ = [
    "GEGLU",
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
    "LevelConfig",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodGQA",
    "Positions",
    "RMSNorm",
    "RoPE",
    "attention_state",
    "cached_attention",
    "explain",
    "make_axial_pos",
    "merge_attention",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
]
