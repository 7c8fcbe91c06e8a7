"""Neighborhood attention layers for image and language transformers."""

from .cached import cached_attention
from .functional import AttentionState, attention_state, merge_attention, neighborhood_attention
from .modules import (
    AxialRoPE,
    DecoderLM,
    DecoderLMConfig,
    Denoiser,
    HDiT,
    HDiTConfig,
    LevelConfig,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodGQA,
    Positions,
    RoPE,
    na1d,
    na2d,
    na3d,
)

__all__ = [
    "AttentionState",
    "AxialRoPE",
    "DecoderLM",
    "DecoderLMConfig",
    "Denoiser",
    "HDiT",
    "HDiTConfig",
    "LevelConfig",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodGQA",
    "Positions",
    "RoPE",
    "attention_state",
    "cached_attention",
    "merge_attention",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
]
