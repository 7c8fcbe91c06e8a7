"""How tokens lie in images and videos, by class of model of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Arguments", "Family", "Grid"]

Grid = tuple[int, ...]
Arguments = Mapping[str, Any]


def _image_ids(model: Any, arguments: Arguments) -> Grid:
    """From the positions ``img_ids [L, 3 or 4]`` of FLUX, of which columns 1 and 2 are the row and the column."""
    ids: Tensor = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    height, width = (int(n) + 1 for n in (ids[:, 1:3].amax(0) - ids[:, 1:3].amin(0)).tolist())
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=ids.dtype, device=ids.device) for n in (height, width)), indexing="ij"
    )
    expected = torch.stack([rows, columns], -1).flatten(0, 1) + ids[:1, 1:3]
    if len(ids) != height * width or not torch.equal(ids[:, 1:3], expected):
        raise ValueError(
            f"img_ids of {len(ids)} tokens are not one image of {height} rows and {width} columns in their order: "
            "reference images (Kontext, editing) have no neighborhoods here"
        )
    return height, width


def _image_shapes(model: Any, arguments: Arguments) -> Grid:
    """From ``img_shapes`` of Qwen-Image, for each sample one ``(1, height, width)``, or a list of that one."""
    shapes = {tuple(map(tuple, s)) if len(s) != 3 else (tuple(s),) for s in arguments["img_shapes"]}
    images = [image for sample in shapes for image in sample]
    if len(images) != 1 or images[0][0] != 1:
        raise ValueError(
            f"img_shapes {arguments['img_shapes']} is more than one image a sample, or images of several sizes, "
            "which have no neighborhoods here"
        )
    _, height, width = images[0]
    return height, width


def _image(model: Any, arguments: Arguments) -> Grid:
    """From latents ``[B, C, H, W]``."""
    return tuple(n // model.config.patch_size for n in arguments["hidden_states"].shape[2:])


def _video(model: Any, arguments: Arguments) -> Grid:
    """From latents ``[B, C, T, H, W]``."""
    patch = model.config.patch_size
    patch = (model.config.patch_size_t, patch, patch) if isinstance(patch, int) else patch
    return tuple(n // p for n, p in zip(arguments["hidden_states"].shape[2:], patch, strict=True))


def _video_frames_first(model: Any, arguments: Arguments) -> Grid:
    """From latents ``[B, T, C, H, W]``."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    patch = model.config.patch_size
    return -(-frames // (model.config.patch_size_t or 1)), height // patch, width // patch


def _video_numbers(model: Any, arguments: Arguments) -> Grid:
    """From the numbers that the model is given, where the latents are flat: of frames, rows and columns."""
    found = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    if None in found:
        raise ValueError(f"give the model num_frames, height and width, from which windows are known; got {found}")
    return tuple(map(int, found))  # pyright: ignore[reportArgumentType]


class Family(NamedTuple):
    """What has to be known of a class of models."""

    rank: int
    """axes of a grid"""
    grid: Callable[[Any, Arguments], Grid]
    """of a call's arguments"""
    layers: tuple[str, ...]
    """the attention of tokens with each other, as lists of blocks and names in a block, in the order of a call"""
    text: Literal["first", "last", "elsewhere"]
    """where text lies in the sequence; elsewhere: image tokens see it in an attention of its own, which stays"""
    masks_pairs: bool = False
    """whether a mask of padding comes as one of all pairs of tokens, ``m[i] & m[j]``"""


_JOINT = "transformer_blocks.attn", "single_transformer_blocks.attn"
FAMILIES = {
    "FluxTransformer2DModel": Family(2, _image_ids, _JOINT, "first"),
    "Flux2Transformer2DModel": Family(2, _image_ids, _JOINT, "first"),
    "QwenImageTransformer2DModel": Family(2, _image_shapes, ("transformer_blocks.attn",), "first"),
    "SD3Transformer2DModel": Family(2, _image, ("transformer_blocks.attn", "transformer_blocks.attn2"), "last"),
    "WanTransformer3DModel": Family(3, _video, ("blocks.attn1",), "elsewhere"),
    "WanVACETransformer3DModel": Family(3, _video, ("vace_blocks.attn1", "blocks.attn1"), "elsewhere"),
    "SkyReelsV2Transformer3DModel": Family(3, _video, ("blocks.attn1",), "elsewhere"),
    "HunyuanVideoTransformer3DModel": Family(3, _video, _JOINT, "last"),
    "HunyuanVideo15Transformer3DModel": Family(3, _video, ("transformer_blocks.attn",), "last", masks_pairs=True),
    "CogVideoXTransformer3DModel": Family(3, _video_frames_first, ("transformer_blocks.attn1",), "first"),
    "LTXVideoTransformer3DModel": Family(3, _video_numbers, ("transformer_blocks.attn1",), "elsewhere"),
    "LTX2VideoTransformer3DModel": Family(3, _video_numbers, ("transformer_blocks.attn1",), "elsewhere"),
    "CosmosTransformer3DModel": Family(3, _video, ("transformer_blocks.attn1",), "elsewhere"),
}
