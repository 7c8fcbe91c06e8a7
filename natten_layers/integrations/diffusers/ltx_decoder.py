"""LTX-2's diffusion decoder of videos, whose attention is 3-D neighborhood attention, on this library's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import prepare
from ...modules.axial_rope import AxialRoPE
from ...modules.query_key import attend_with_qk_prep, call_watched
from .replacement import VERSION, Replacement, modules_of

__all__ = ["patch"]

_USED = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "rope", "heads", "head_dim", "kernel_size", "scale")


def patch(model: Any) -> int:
    """Compute the neighborhood attention of LTX-2's diffusion decoder by this library. ``unpatch`` undoes it.

    The result stays the same up to rounding. Queries and keys are normalised and rotated in one launch, or in that of
    attention where the window is small; there is no block mask and no copy of heads. Projections stay the layer's
    own, and so do norms that somebody watches by hooks; the layer's ``rope`` is read, not called.

    Args:
        model: an ``LTX2VideoDiffusionDecoderModel``, a part of it, or a pipeline that has one.

    Returns:
        How many layers it found, those that were patched before included.

    Raises:
        ValueError: no such layer.
        ImportError, AttributeError: this release of diffusers is not as the integration knows it.
    """
    attention, indices, count = _attention_class(), _TokenIndices(), 0
    for module in modules_of(model):
        if isinstance(module, attention):
            _check(module)
            if not isinstance(module.processor, Replacement):
                module.set_processor(_Processor(module.processor, indices))  # pyright: ignore[reportCallIssue]
            count += 1
    if not count:
        raise ValueError(
            f"{type(model).__name__} has no {attention.__name__}, the only attention that patch replaces; an "
            "LTX2VideoDiffusionDecoderModel has it. Transformers get windows by neighborhood"
        )
    return count


def _attention_class() -> Any:
    try:
        from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoVaeNeighborhoodAttention
    except ImportError as error:
        raise ImportError(f"{VERSION} has no LTX2VideoVaeNeighborhoodAttention; 0.42.1 does") from error
    return LTX2VideoVaeNeighborhoodAttention


def _check(attn: Any) -> None:
    missing = [name for name in _USED if not hasattr(attn, name)]
    missing += [f"rope.{name}" for name in ("rope_dim_split", "base") if not hasattr(attn.rope, name)]
    if missing:
        raise AttributeError(
            f"{type(attn).__name__} of {VERSION} has no {', '.join(missing)}; this integration is written for 0.42.1"
        )


class _TokenIndices:
    """Positions of a grid's tokens, shared by layers: those of the last grid, as a stage has one for all its layers."""

    def __init__(self) -> None:
        self.positions = torch.empty(0)

    def of(self, spatial: torch.Size, device: torch.device) -> Tensor:
        """``[*spatial, 3]``, int32."""
        positions = self.positions  # another thread may replace them by those of another grid
        if positions.shape[:-1] != spatial or positions.device != device:
            with torch.inference_mode(False):  # what is kept must serve in training too
                axes = [torch.arange(length, dtype=torch.int32, device=device) for length in spatial]
                positions = self.positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        return positions


class _Processor:
    """Stands in for an attention processor of LTX-2's decoder."""

    def __init__(self, replaced: Any, indices: _TokenIndices) -> None:
        self.replaced, self.indices, self.rope = replaced, indices, None

    def release(self) -> None:
        self.indices.positions = torch.empty(0)

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: Any = None) -> Tensor:
        """``[B, T, H, W, C]`` to the same. ``block_mask`` is FlexAttention's: our kernels know their windows."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, attn.head_dim))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if self.rope is None or self.rope.freqs.device != query.device:
            self.rope = _rope_of(attn, query.device)
        positions = self.indices.of(query.shape[1:-2], query.device)
        query, key, norm, angles = call_watched(query, key, (attn.norm_q, attn.norm_k), self.rope, positions)
        # The layer scales the query before it rotates it, which is the same as to scale the scores.
        call = prepare(query, key, value, attn.kernel_size, 1, 1, False, attn.scale, None, None, None)
        return attn.to_out[0](attend_with_qk_prep(call, norm, angles).flatten(-2))


def _rope_of(attn: Any, device: torch.device) -> AxialRoPE:
    """Rotation by token indices with frequencies ``base ** -(2 i / d)``, ``d`` being the elements of an axis' part."""
    sizes = attn.rope.rope_dim_split
    with torch.inference_mode(False):
        exponents = torch.cat([torch.arange(0, size, 2, dtype=torch.float64) / size for size in sizes])
        freqs = (1.0 / attn.rope.base**exponents).float()[None]
        split = [size // 2 for size in sizes]
        return AxialRoPE(
            attn.head_dim, attn.heads, axes=len(sizes), freqs=freqs, split=split, interleaved=True, device=device
        )
