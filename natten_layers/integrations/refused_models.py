"""The plug-in's name in transformers, and the models there that it refuses as a whole."""

from __future__ import annotations

__all__ = ["NAME", "REFUSED"]

NAME = "natten_layers"

_ARITHMETIC = f"it does arithmetic on its masks, and {NAME} hands positions to the layers instead of a mask"
_INDEXED = "its tokens see keys that an indexer chooses (sparse attention), not windows"
_COMPRESSED = "besides a window, its tokens see compressed keys, which a bias of its own masks"
# benchmarks/transformers_support.py finds those that a release of transformers adds.
REFUSED = {
    **dict.fromkeys(["axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"], _INDEXED),
    "deepseek_v4": _COMPRESSED,
    "big_bird": _ARITHMETIC,
    "bloom": _ARITHMETIC,
    "codegen": _ARITHMETIC,
    "convbert": _ARITHMETIC,
    "doge": _ARITHMETIC,
    "gpt_neox_japanese": _ARITHMETIC,
    "ibert": _ARITHMETIC,
    "longformer": _ARITHMETIC,
    "luke": _ARITHMETIC,
    "megatron-bert": _ARITHMETIC,
    "mpt": _ARITHMETIC,
    "mpnet": _ARITHMETIC,
    "mvp": _ARITHMETIC,
    "nystromformer": _ARITHMETIC,
    "rembert": _ARITHMETIC,
    "roformer": _ARITHMETIC,
    "squeezebert": _ARITHMETIC,
    "tapas": _ARITHMETIC,
    "trocr": _ARITHMETIC,
    "xglm": _ARITHMETIC,
}
"""``model_type`` of models that are refused as a whole, and why"""
