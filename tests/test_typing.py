"""What type checkers are told of calls. Pyright reads this file with all others; that it runs shows less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

import torch
from torch import Tensor

from natten_layers import (
    GEGLU,
    AdaRMSNorm,
    AxialRoPE,
    DecoderLM,
    Denoiser,
    GatedFeedForward,
    HDiT,
    MeanFlow,
    MixtureOfExperts,
    NeighborhoodAttention2D,
    NeighborhoodGQA,
    RMSNorm,
    RoPE,
)


def test_layers_return_tensors() -> None:
    x = torch.zeros(1, 4, 4, 8)
    assert_type(NeighborhoodAttention2D(8, 2, 3)(x), Tensor)
    assert_type(NeighborhoodGQA(8, 2, 3)(x), Tensor | Any)
    assert_type(RMSNorm(8)(x), Tensor)
    assert_type(GEGLU(8, 16)(x), Tensor)
    query, key = RoPE(4)(x, x)
    assert_type(query, Tensor)
    assert_type(key, Tensor)


if TYPE_CHECKING:

    def models_return_tensors(
        x: Tensor,
        norm: AdaRMSNorm,
        feed_forward: GatedFeedForward,
        experts: MixtureOfExperts,
        rope: AxialRoPE,
        hdit: HDiT,
        denoiser: Denoiser,
        flow: MeanFlow,
        lm: DecoderLM,
    ) -> None:
        assert_type(norm(x, x), Tensor)
        assert_type(feed_forward(x), Tensor)
        assert_type(experts(x), Tensor)
        assert_type(rope(x, x), tuple[Tensor, Tensor])
        assert_type(hdit(x, x), Tensor)
        assert_type(denoiser(x, x), Tensor)
        assert_type(flow(x, x, x), Tensor)
        assert_type(lm(x), Tensor)
