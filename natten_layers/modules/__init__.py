"""Layers and models built on neighborhood attention."""

from .attention import NeighborhoodGQA
from .axial_rope import AxialRoPE, make_axial_pos
from .cache import Cache
from .denoiser import Denoiser
from .feed_forward import GEGLU, GatedFeedForward, MixtureOfExperts
from .hdit import HDiT
from .hdit_config import HDiTConfig, LevelConfig
from .llm import DecoderLM
from .llm_config import DecoderLMConfig
from .meanflow import MeanFlow
from .natten import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from .norm import AdaRMSNorm, RMSNorm
from .rope import Positions, RoPE

__all__ = [
    "GEGLU",
    "AdaRMSNorm",
    "AxialRoPE",
    "Cache",
    "DecoderLM",
    "DecoderLMConfig",
    "Denoiser",
    "GatedFeedForward",
    "HDiT",
    "HDiTConfig",
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
    "make_axial_pos",
]
