"""Neighborhood attention inside Hugging Face transformers 5, as ``attn_implementation="natten_layers"``.

    from natten_layers.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="natten_layers")

It works with every model that calls its attention through ``AttentionInterface``: causal and sliding-window layers,
sinks, grouped KV heads (which are not repeated), left and right padding, dynamic, static and sliding-window caches, and
bidirectional encoders without windows. Everything else raises ``ValueError``: softcap, dropout, paged caches, 4-D masks
made by the caller, packed sequences, chunked or otherwise customised masks, bidirectional windows and position biases.
Outputs at padded tokens are unspecified, and attention weights are not returned.

A mask function is registered too. Without one, transformers passes ``attention_mask=None`` to every layer, and padding,
the offset of the cache and causality would be ignored silently. What the mask function returns must pass through
``generate`` and the model unchanged, which holds for None and for 4-D tensors. It therefore returns positions in a 4-D
tensor instead of a mask of ``Lq x S`` elements: int64 ``[N, 1, R, Lq + S]``, where

- ``N`` is the batch size, or 0 if the queries are the first ``Lq`` keys and no token sees padding;
- ``R`` is 1 for a causal layer and 2 for one with a sliding window; both rows are equal;
- the last axis holds the positions of the queries, then those of the cache slots, with -1 for padding.

Everything that the attention function must branch on is in the shape, so that no layer waits for the device. The mask
function itself is not traced: compiling a whole model breaks the graph there, while ``generate`` calls it before the
compiled step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sliding_window_overlay

from ..cached import cached_attention
from ..operations import neighborhood_attention
from .dinat import register_dinat

__all__ = ["NAME", "register", "register_dinat"]

NAME = "natten_layers"

_CAUSAL, _WINDOWED = 1, 2  # R, the number of rows by which a mask marks its kind of layer

# Arguments that models or caches pass and that would change the result. None, False or a missing argument is fine.
_UNSUPPORTED = {
    "softcap": "soft-capped scores",
    "cache": "paged caches",
    "block_table": "paged caches",
    "cu_seq_lens_q": "packed sequences; pad them instead",
    "cu_seq_lens_k": "packed sequences; pad them instead",
    "position_bias": "position biases",
    "sinks": "sinks that depend on the token",
    "indices": "sparse attention",
    "topk_indices": "sparse attention",
    "block_indices": "sparse attention",
    "output_attentions": "returning attention weights",
}


def register() -> None:
    """Register ``attn_implementation="natten_layers"`` with transformers. Calling it again has no further effect.

    Models then raise ``ValueError`` at a call that asks for something unsupported; the module's documentation lists it.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _positions_mask)


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, Lq, D]
    key: Tensor,  # [B, Hkv, S, D]
    value: Tensor,  # [B, Hkv, S, Dv]
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """One layer's attention: ``(out [B, Lq, Hq, Dv], None)``, where None stands for the attention weights."""
    _refuse(dropout, kwargs)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # heads last, as views
    length, slots = query.shape[1], key.shape[1]
    causal, window, positions = True, sliding_window, None
    if attention_mask is not None:
        _check_mask(attention_mask, query.shape[0], length, slots)
        window = _window(module, sliding_window) if attention_mask.shape[2] == _WINDOWED else None
        positions = attention_mask[:, 0, 0] if attention_mask.shape[0] else None
    else:
        # The mask function returns None only for full bidirectional attention, but some models do not call it at all.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and length != slots:
            raise ValueError(
                f"{length} causal queries over {slots} keys came with attention_mask=None: positions unknown"
            )
        if not causal and window is not None:
            raise ValueError(f"bidirectional sliding windows are not supported, got sliding_window={window}")
        if length != slots:
            positions = _bidirectional_positions(length, slots, query.device)[None]
    if positions is None:
        kernel_size = length if window is None else min(window, length)
        key, value = key[:, :length], value[:, :length]  # a static cache has empty slots behind these
        out = neighborhood_attention(query, key, value, (kernel_size,), is_causal=causal, scale=scaling, sink=s_aux)
    else:
        out = cached_attention(
            query, key, value, positions[:, :length], positions[:, length:], window=window, scale=scaling, sink=s_aux
        )
    return out, None


@torch.compiler.disable  # it reads values of the padding mask and inspects closures, once per model call
def _positions_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., object] = causal_mask_function,
    attention_mask: Tensor | None = None,  # bool [B, tokens], False at padding
    device: torch.device | str = "cpu",
    **_: object,  # options that only dense masks need
) -> Tensor | None:
    """The ``attention_mask`` of all layers of one kind, in the form that this module's docstring describes."""
    if attention_mask is not None:  # extend it to all slots of the cache; those behind the last token are empty
        attention_mask = F.pad(attention_mask, (0, max(0, kv_offset + kv_length - attention_mask.shape[-1])))
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if mask_function is bidirectional_mask_function:
        if attention_mask is None or bool(attention_mask.all()):
            return None
        rows, positions = _CAUSAL, _bidirectional_positions(q_length, kv_length, device)
    else:
        rows = _WINDOWED if _is_windowed(mask_function) else _CAUSAL
        if _is_aligned(q_length, kv_length, q_offset, attention_mask):
            return torch.empty(0, 1, rows, q_length + kv_length, dtype=torch.long, device=device)
        queries = torch.arange(q_length, device=device) + q_offset
        positions = torch.cat([queries, torch.arange(kv_length, device=device) + kv_offset])
    positions = positions.repeat(batch_size, 1, rows, 1)
    if attention_mask is not None:
        positions[..., q_length:].masked_fill_(~attention_mask[:, None, None], -1)
    return positions


def _bidirectional_positions(length: int, slots: int, device: torch.device | str) -> Tensor:
    """Positions ``[Lq + S]`` with which causal queries see every key: each query has the position of the last key."""
    keys = torch.arange(slots, device=device)
    return torch.cat([keys[-1:].expand(length), keys])


def _is_windowed(mask_function: Callable[..., object]) -> bool:
    """Whether a mask function of transformers is causal with a sliding window (true) or plain causal (false).

    Any other mask function raises a ValueError.
    """
    if mask_function is causal_mask_function:
        return False
    parts = ()
    if inspect.isfunction(mask_function):  # transformers builds it as and_masks(sliding_window_overlay(window), causal)
        parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    code = sliding_window_overlay(1).__code__
    if len(parts) == 2 and getattr(parts[0], "__code__", None) is code and parts[1] is causal_mask_function:
        return True
    raise ValueError(
        f"{NAME} supports causal, causal sliding-window and full bidirectional masks, but this model asks for another: "
        "chunked attention, a bidirectional window, tokens that see their whole block, or packed sequences "
        "(position_ids that restart; torch.compile assumes them unless attention_mask is given)"
    )


def _is_aligned(q_length: int, kv_length: int, q_offset: int | Tensor, attention_mask: Tensor | None) -> bool:
    """Whether the queries are the first keys and no token sees padding, as when all padding follows the tokens."""
    if q_length > kv_length or bool(q_offset != 0):
        return False
    if attention_mask is None:
        return True
    real = attention_mask[:, :q_length]
    return bool((real[:, :-1] | ~real[:, 1:]).all())  # padding is never followed by a token


def _check_mask(mask: Tensor, batch: int, length: int, slots: int) -> None:
    if (
        mask.dtype != torch.long
        or mask.ndim != 4
        or mask.shape[0] not in (0, batch)
        or mask.shape[1] != 1
        or mask.shape[2] not in (_CAUSAL, _WINDOWED)
        or mask.shape[3] != length + slots
    ):
        raise ValueError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}, not what {NAME}'s mask function made for {length} "
            f"queries and {slots} keys; pass the model a 2-D padding mask [batch, tokens]"
        )


def _window(module: nn.Module, sliding_window: int | None) -> int:
    """The window of a layer whose mask is windowed: the layer's own, or else the config's, which the mask uses too."""
    config: Any = module.config
    return config.sliding_window if sliding_window is None else sliding_window


def _refuse(dropout: float, kwargs: dict[str, object]) -> None:
    if dropout > 0:
        raise ValueError(
            f"{NAME} has no attention dropout, got dropout={dropout}; set attention_dropout=0.0 or model.eval()"
        )
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{NAME} does not support {meaning} ({name} was given)")
