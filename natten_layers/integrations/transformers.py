"""Neighborhood attention inside Hugging Face transformers (5.4 or newer), as ``attn_implementation="natten_layers"``.

    from natten_layers.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="natten_layers")

Works with every model that calls its attention through ``AttentionInterface``: causal, sliding-window (also
bidirectional) and chunked layers, full encoders and cross attention, sinks, grouped KV heads (read unrepeated), scales
that are tensors, soft-capped scores (in PyTorch, as the kernels do not have them), left and right padding, blocks of
tokens that see each other in both directions (the images of Gemma 3 and PaliGemma's prefixes), packed sequences,
dynamic, static and sliding-window caches. Everything else raises ``ValueError``: dropout, paged caches, masks of 3 or 4
axes made by the caller, customised masks, position biases, models that do arithmetic on their masks. Outputs at padded
tokens are unspecified, and attention weights are not returned. The documentation has a table of the architectures.

Texts that are packed into the rows of a batch do not see each other, in full layers too. ``position_ids`` that begin
anew (0, 1, 2, 0, 1, ...) say where each begins, or ``cu_seq_lens_q`` and ``cu_seq_lens_k`` do for a single row, as
``DataCollatorWithFlattening`` makes either. Positions that leave a gap separate texts only where transformers makes
masks of packed texts, with ``use_cache=False`` and without an ``attention_mask``. Layers look at the positions, once
for all of them in a forward pass, as most architectures hand them on; the documentation's table says which do not, and
what keeps texts apart there. Not known to the layers are texts in a cache: decoding after packed texts sees all of
them. Compiled layers cannot look, and raise if positions begin anew; they know packed texts from ``cu_seq_lens_q``, or
from transformers' masks.

A mask function is registered too. Without one, transformers passes ``attention_mask=None`` to every layer, and padding,
the offset of the cache and causality would be ignored silently. What the mask function returns must pass through
``generate`` and the model unchanged, which holds for None and for 4-D tensors. It therefore returns positions in a 4-D
tensor instead of a mask of ``Lq x S`` elements: int64 ``[N, 1, R, Lq + S]``, where

- ``N`` is the batch size; or 0, which says that the queries are the first ``Lq`` keys and no token sees padding. Masks
  of packed texts have one entry more than there are texts in the batch, on the CPU: their cumulative lengths;
- ``R`` names the pattern, and with it the layer's window: ``_ROWS`` and :func:`_window`. Rows are equal but for the
  second one of patterns with blocks;
- the last axis holds the positions of the queries, then those of the cache's slots, -1 where a slot is padding.

Layers see the keys whose positions are at most the query's and less than a window behind it, so the other patterns are
choices of positions. In a bidirectional window of ``w`` keys on each side, queries stand ``w`` positions further right
and see ``2 w + 1``. In chunks, each stands a window's length further right than it would, and no window reaches back
over that gap; so do packed texts where there is padding or a cache. Elsewhere these are computed as samples of their
own.

A token of a block sees, besides what it sees in any case, those tokens of its block that follow it. That is causal
attention of another order of tokens, in which each block runs backwards, far from the others; a second call computes it
and the results are merged. Its positions are the second row.

Where rows begin with padding and a derivative is needed, which the kernel of positions does not have, layers move the
padding behind the text (:func:`_padding_last`). Patterns of their own say that each row is one stretch of tokens. Of
the positions of packed texts each kind of layers then asks once.

What the attention function must branch on is in the shape, so that no layer waits for the device. The mask function
itself is not traced: a model that is compiled whole breaks its graph there; ``generate`` calls it before the compiled
step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

from ..cached import cached_attention
from ..kernels.ops.transforms import is_differentiated
from ..operations import AttentionState, merge_attention, neighborhood_attention
from .dinat import register_dinat
from .left_padding import is_one_stretch, move, tokens_first
from .nat import register_nat
from .packed_texts import (
    attend_to_own_text,
    check_cu_seq_lens,
    cumulative_lengths,
    ends_beside_padding,
    forget,
    keep_apart,
    says_texts,
)
from .refused_models import NAME, REFUSED

__all__ = ["NAME", "register", "register_dinat", "register_nat"]

if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
    raise ImportError(
        "the natten_layers plug-in needs transformers 5.4 or newer, whose mask functions take the length of the query; "
        f"this is {transformers.__version__}: pip install -U transformers"
    )
# Older versions of transformers 5 do not have these.
blockwise_overlay = getattr(masking_utils, "blockwise_overlay", None)
sliding_window_bidirectional_overlay = getattr(masking_utils, "sliding_window_bidirectional_overlay", None)
remap_positions_for_packed_sequence = getattr(masking_utils, "remap_positions_for_packed_sequence", None)

# The row counts of a mask, see the head of this file.
_CAUSAL, _WINDOWED, _PADDED, _PADDED_WINDOWED, _BLOCKS, _BLOCKS_WINDOWED = range(1, 7)
_BIDIRECTIONAL, _BIDIRECTIONAL_BELOW, _CHUNKED, _TEXTS, _TEXTS_WINDOWED = range(7, 12)
_ROWS = range(1, 12)
_FULL = 0
"""A pattern for which :func:`_positions_mask` needs no rows of its own"""

# Arguments that models or caches pass and that would change the result. None, False or a missing argument is fine.
_UNSUPPORTED = {
    "cache": "paged caches",
    "block_table": "paged caches",
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
    scaling: float | Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """One layer's attention: ``(out [B, Lq, Hq, Dv], None)``, where None stands for the attention weights."""
    _refuse(dropout, kwargs)
    if isinstance(scaling, Tensor):
        query, scaling = _scaled(query, scaling), 1.0
    # Values are as projected; norms and RoPE may leave queries and keys in fp32. Under autocast it casts all of them.
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # heads last, as views
    length, slots = query.shape[1], key.shape[1]
    causal, window, positions, blocks, texts, rows = True, sliding_window, None, None, cu_seq_lens_q, _FULL
    itself = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None:
        _check_mask(module, attention_mask, query.shape[0], length, slots)
        rows = attention_mask.shape[2]
        window = _window(module, sliding_window, rows)
        if rows in (_TEXTS, _TEXTS_WINDOWED):
            texts = attention_mask[:, 0, 0, 0] if texts is None else texts
        elif attention_mask.shape[0]:
            positions = attention_mask[:, 0, 0]
            blocks = attention_mask[:, 0, 1] if rows in (_BLOCKS, _BLOCKS_WINDOWED) else None
    else:
        # The mask function returns None only for full bidirectional attention, but some models do not call it at all.
        causal = itself
        if causal and length != slots:
            raise ValueError(
                f"{length} causal queries over {slots} keys came with attention_mask=None: positions unknown"
            )
        if not causal and window is not None:
            raise ValueError(
                f"a bidirectional layer with sliding_window={window} came with attention_mask=None: models do not "
                "agree on what the number counts, so it must come with a mask"
            )
        if length != slots:
            positions = _bidirectional_positions(length, slots, query.device)[None]
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        plain = rows in (_FULL, _CAUSAL, _WINDOWED, _TEXTS, _TEXTS_WINDOWED) and positions is None
        check_cu_seq_lens(cu_seq_lens_q, cu_seq_lens_k, query, key, plain)
    # No model with chunks hands positions to its layers.
    elif texts is None and rows != _CHUNKED:
        said = position_ids if says_texts(module, position_ids, query, slots, itself) else None
        # A compiled layer cannot look at positions that say texts, and keeps these apart by positions alone.
        looks = said is None or not torch.compiler.is_compiling()
        movable = rows in (_PADDED, _PADDED_WINDOWED) and looks and softcap is None
        if attention_mask is not None and movable and is_differentiated((query, key, value, s_aux)):
            options = {"scaling": scaling, "sliding_window": sliding_window, "s_aux": s_aux}
            return _padding_last(module, query, key, value, attention_mask, said, options), None
        if said is not None:
            texts, positions, blocks, window = keep_apart(said, query, positions, blocks, window)
    if positions is None:
        key, value = key[:, :length], value[:, :length]  # a static cache has empty slots behind these
        options: dict[str, Any] = {"is_causal": causal, "scale": scaling, "sink": s_aux}
        if texts is not None:
            return attend_to_own_text(query, key, value, texts, window, options, softcap), None
        if softcap is None:
            kernel_size = length if window is None else min(window, length)
            return neighborhood_attention(query, key, value, (kernel_size,), **options), None
        row = torch.arange(length, device=query.device)
        positions = (torch.cat([row, row]) if causal else _bidirectional_positions(length, length, query.device))[None]
    options = {"scale": scaling, "softcap": softcap}
    sees = positions[:, :length], positions[:, length:]
    if blocks is None:
        return cached_attention(query, key, value, *sees, window=window, sink=s_aux, **options), None
    before = cached_attention(query, key, value, *sees, window=window, sink=s_aux, return_lse=True, **options)
    sees = blocks[:, :length], blocks[:, length:]
    behind = cached_attention(query, key, value, *sees, window=slots, return_lse=True, **options)
    return merge_attention(*(AttentionState(out, lse, torch.ones_like(lse)) for out, lse in (before, behind))).out, None


def _padding_last(
    module: nn.Module,
    query: Tensor,  # [B, L, Hq, D]
    key: Tensor,  # [B, L, Hkv, D]
    value: Tensor,  # [B, L, Hkv, Dv]
    attention_mask: Tensor,
    position_ids: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """A layer's attention ``[B, L, Hq, Dv]`` over rows with padding in front: that of rows which end with it."""
    length, full = query.shape[1], attention_mask.shape[2] == _PADDED
    real = attention_mask[:, 0, 0, length:] >= 0
    places, sources = tokens_first(real)
    texts = None if position_ids is None else ends_beside_padding(attention_mask, position_ids, real, sources)
    if texts is None:
        mask = attention_mask[:0, :, : _CAUSAL if full else _WINDOWED]
    else:
        mask = _texts_mask(texts, _TEXTS if full else _TEXTS_WINDOWED, 2 * length)
    query, key, value = (move(x, places).transpose(1, 2) for x in (query, key, value))
    return move(_attention(module, query, key, value, mask, **options)[0], sources)


def _texts_mask(texts: Tensor, rows: int, elements: int) -> Tensor:
    return texts[:, None, None, None].expand(-1, 1, rows, elements)


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
    config: Any = None,
    **_: object,  # hints for the makers of dense masks
) -> Tensor | None:
    """What the layers of one kind get as their ``attention_mask``, see the head of this file."""
    forget()
    if reason := REFUSED.get(getattr(config, "model_type", "")):
        raise ValueError(
            f'{NAME} does not support {config.model_type}: {reason}; use attn_implementation="eager" for it'
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"{NAME} supports a padding mask [batch, tokens], got attention_mask {tuple(attention_mask.shape)}; texts "
            "that are packed into rows are told apart by position_ids that begin anew, or by cu_seq_lens_q"
        )
    if attention_mask is not None:  # as long as the cache's slots: those after the last token are empty
        attention_mask = F.pad(attention_mask, (0, max(0, kv_offset + kv_length - attention_mask.shape[-1])))
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    queries = torch.arange(q_length, device=device)[None] + q_offset
    slots = torch.arange(kv_length, device=device)[None] + kv_offset
    rows, overlay = _FULL, {}
    if mask_function is not bidirectional_mask_function:
        rows, overlay = _pattern(mask_function, queries, slots)
    if rows == _FULL:
        if attention_mask is None or bool(attention_mask.all()):
            return None
        rows, positions = _CAUSAL, _bidirectional_positions(q_length, kv_length, device)[None]
    else:
        blocks = overlay.get("block_sequence_ids")
        if blocks is not None and not bool((blocks >= 0).any()):  # a text without images
            rows = _CAUSAL if rows == _BLOCKS else _WINDOWED
        if rows in (_TEXTS, _TEXTS_WINDOWED):
            numbers = overlay["packed_sequence_mask"].expand(batch_size, -1)
            texts = cumulative_lengths(F.pad(numbers.diff(dim=-1) != 0, (1, 0)))
            if len(texts) > batch_size + 1:
                return _texts_mask(texts, rows, q_length + kv_length)
            rows = _CAUSAL if rows == _TEXTS else _WINDOWED  # when compiled, transformers takes all rows for packed
        if rows in (_CAUSAL, _WINDOWED) and _is_aligned(q_length, kv_length, q_offset, attention_mask):
            return torch.empty(0, 1, rows, q_length + kv_length, dtype=torch.long, device=device)
        positions = torch.cat(_moved(rows, overlay, queries, slots), dim=-1)
        of_slots = rows in (_CAUSAL, _WINDOWED) and q_length == kv_length and bool(q_offset == kv_offset)
        if of_slots and attention_mask is not None and is_one_stretch(attention_mask):
            rows = _PADDED if rows == _CAUSAL else _PADDED_WINDOWED
    positions = positions.expand(batch_size, -1)[:, None, None].repeat(1, 1, rows, 1)
    if rows in (_BLOCKS, _BLOCKS_WINDOWED):
        positions[:, 0, 1] = torch.cat(_backwards(overlay["block_sequence_ids"], queries, slots), dim=-1)
    if attention_mask is not None:
        positions[..., q_length:].masked_fill_(~attention_mask[:, None, None], -1)
    return positions


def _moved(rows: int, overlay: dict[str, Any], queries: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of queries and slots under the pattern that :func:`_pattern` found, see the head of this file."""
    if rows == _BIDIRECTIONAL:
        return queries + overlay["sliding_window"], slots
    if rows == _BIDIRECTIONAL_BELOW:
        return queries + overlay["sliding_window"] - 1, slots
    if rows == _CHUNKED:
        size, padding = overlay["chunk_size"], overlay["left_padding"][:, None].to(slots.device)
        moved = [p + (p - padding) // size * size for p in (queries, slots)]
        # A chunk before the text's start is a negative number of chunks away; what is there is padding.
        return moved[0], torch.where(slots < padding, -1, moved[1])
    return queries, slots


def _backwards(blocks: Tensor, queries: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Positions with which causal queries see the keys of their block (of the same number, not -1) that follow them.

    Windows must have as many positions as there are slots.
    """
    last, far = slots[:, -1:], 2 * slots.shape[1]
    of_queries, of_slots = (blocks.to(slots.device)[:, each[0]] for each in (queries, slots))
    moved_queries = far * of_queries + last - queries - 1  # one less than its own key's, which it sees already
    return torch.where(of_queries < 0, -1, moved_queries), torch.where(of_slots < 0, -1, far * of_slots + last - slots)


def _bidirectional_positions(length: int, slots: int, device: torch.device | str) -> Tensor:
    """Positions ``[Lq + S]`` with which causal queries see every key: each query has the position of the last key."""
    keys = torch.arange(slots, device=device)
    return torch.cat([keys[-1:].expand(length), keys])


def _pattern(mask_function: Callable[..., object], queries: Tensor, slots: Tensor) -> tuple[int, dict[str, Any]]:
    """Which of transformers' mask functions this is, as a number of rows, and the variables of its overlay.

    Args:
        queries, slots: the indices ``[1, Lq]`` and ``[1, S]`` that the function is asked about.
    """
    if mask_function is causal_mask_function:
        return _CAUSAL, {}
    parts = _variables(mask_function).get("mask_functions", ())
    if len(parts) == 2 and _is_made_by(and_masks, mask_function):
        overlay, base = parts
        variables = _variables(overlay)
        if base is causal_mask_function and _is_made_by(sliding_window_overlay, overlay):
            return _WINDOWED, variables
        if base is causal_mask_function and _is_made_by(chunked_overlay, overlay):
            return _CHUNKED, variables
        if base is bidirectional_mask_function and _is_made_by(sliding_window_bidirectional_overlay, overlay):
            return _BIDIRECTIONAL, variables
        if _is_made_by(packed_sequence_mask_function, overlay) and _is_made_by(
            remap_positions_for_packed_sequence, base
        ):
            return _packed(*_pattern(_variables(base)["mask_function"], queries, slots), variables)
        if _is_made_by(packed_sequence_mask_function, base):  # in versions that do not remap positions
            return _packed(*_pattern(overlay, queries, slots), _variables(base))
        if _is_made_by(sliding_window_overlay, base) and _is_made_by(or_masks, overlay):
            rows, variables = _pattern(overlay, queries, slots)
            if rows == _BLOCKS:
                return _BLOCKS_WINDOWED, variables
    if len(parts) == 2 and _is_made_by(or_masks, mask_function):
        base, more = parts
        if base is causal_mask_function and _is_made_by(blockwise_overlay, more):
            return _BLOCKS, _variables(more)
        if _sees(more, queries, slots):
            return _FULL, {}
        rows, variables = _pattern(base, queries, slots)
        if rows == _WINDOWED and _is_made_by(blockwise_overlay, more):
            # Here no window limits what a token sees of its block, which only makes a difference to longer blocks.
            _check_span(_variables(more)["block_sequence_ids"], variables["sliding_window"])
            return _BLOCKS_WINDOWED, _variables(more)
        if rows == _WINDOWED and _sees(more, queries, slots, below=variables["sliding_window"]):
            return _BIDIRECTIONAL_BELOW, variables
    raise ValueError(
        f"{NAME} supports causal, sliding-window, chunked and full masks and blocks of tokens that see each other, but "
        'this model asks for another mask; use attn_implementation="sdpa" for it'
    )


def _check_span(blocks: Tensor, window: int) -> None:
    """Raise unless the tokens of each block ``[B, tokens]`` (of the same number, not -1) lie within a window."""
    index = torch.arange(blocks.shape[1], device=blocks.device).expand_as(blocks)
    ids, nothing = blocks.long() + 1, index.new_zeros(len(blocks), blocks.shape[1] + 1)
    first, last = (nothing.scatter_reduce(1, ids, index, kind, include_self=False) for kind in ("amin", "amax"))
    span = torch.where(blocks >= 0, (last - first).gather(1, ids) + 1, 0)
    if bool((span > window).any()):
        raise ValueError(
            f"{NAME} does not support a block of {int(span.max())} tokens that see each other in a layer with "
            f'sliding_window={window}, which does not limit them; use attn_implementation="sdpa" for it'
        )


def _sees(mask_function: Callable[..., object], queries: Tensor, slots: Tensor, below: int | None = None) -> bool:
    """Whether every query sees all keys, or those less than ``below`` away and no others, found by asking for each.

    For functions of models' own, such as those of Gemma 3 as an encoder (EmbeddingGemma).
    """
    query, key = queries[0, :, None], slots
    expected = torch.ones((), dtype=torch.bool) if below is None else (query - key).abs() < below
    zero = torch.zeros((), dtype=torch.long, device=slots.device)
    try:
        found = mask_function(zero, zero, query, key)
    except Exception:  # whatever a function that is made for something else does
        return False
    return isinstance(found, Tensor) and bool((found.to(expected.device) == expected).all())


def _packed(rows: int, overlay: dict[str, Any], packed: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    if rows not in (_CAUSAL, _WINDOWED):
        raise ValueError(
            f"{NAME} supports packed sequences (position_ids that do not always grow by one) in causal and "
            "sliding-window layers only; give each text a row of its own, or, if rows are one text, pass attention_mask"
        )
    return (_TEXTS, packed) if rows == _CAUSAL else (_TEXTS_WINDOWED, packed)


def _variables(function: Callable[..., object]) -> dict[str, Any]:
    """What the closure of a function holds."""
    return dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}


def _is_made_by(maker: Any, function: Callable[..., object]) -> bool:
    """Whether transformers' ``maker`` returned this function: each of them returns the one function inside itself."""
    return maker is not None and getattr(function, "__code__", None) in maker.__code__.co_consts


def _is_aligned(q_length: int, kv_length: int, q_offset: int | Tensor, attention_mask: Tensor | None) -> bool:
    """Whether the queries are the first keys and no token sees padding, as when all padding follows the tokens."""
    if q_length > kv_length or bool(q_offset != 0):
        return False
    if attention_mask is None:
        return True
    real = attention_mask[:, :q_length]
    return bool((real[:, :-1] | ~real[:, 1:]).all())  # padding is never followed by a token


def _check_mask(module: nn.Module, mask: Tensor, batch: int, length: int, slots: int) -> None:
    if (
        mask.dtype != torch.long
        or mask.ndim != 4
        or mask.shape[1] != 1
        or not _ROWS.start <= mask.shape[2] < _ROWS.stop  # compiled graphs have symbols for sizes, which `in` refuses
        or mask.shape[3] != length + slots
        or (mask.shape[2] not in (_TEXTS, _TEXTS_WINDOWED) and mask.shape[0] not in (0, batch))
    ):
        way_out = (
            "pass the model a 2-D padding mask [batch, tokens]; if it got one or none, the model does arithmetic on "
            "its masks and cannot be supported"
        )
        for option in ("sliding_window", "attention_chunk_size"):
            if getattr(getattr(module, "config", None), option, None) == 1 and length < slots:
                way_out = (
                    f"transformers' dynamic cache does not forget tokens where {option}=1: pass use_cache=False, or "
                    'generate with cache_implementation="static"'
                )
        raise ValueError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}, not what {NAME}'s mask function made for {length} "
            f"queries and {slots} keys; {way_out}"
        )


def _window(module: nn.Module, sliding_window: int | None, rows: int) -> int | None:
    """How many positions a layer's queries see. Some layers do not say; the masks take it from the configuration."""
    config: Any = module.config
    if rows in (_CAUSAL, _BLOCKS, _TEXTS, _PADDED):
        return None
    layer = getattr(module, "layer_idx", None)
    if layer is not None and getattr(config, "per_layer_config", None):  # sizes that vary by layer
        config = config.per_layer_config[layer]
    if rows == _CHUNKED:
        return config.attention_chunk_size
    if rows == _BIDIRECTIONAL:  # the argument counts one side, both or the query too, as each model likes
        return 2 * config.sliding_window + 1
    if rows == _BIDIRECTIONAL_BELOW:
        return 2 * config.sliding_window - 1
    return config.sliding_window if sliding_window is None else sliding_window


def _scaled(query: Tensor, scaling: Tensor) -> Tensor:
    """The query times a scale that is a tensor, so that gradients reach it and no device is waited for."""
    if scaling.ndim and scaling.shape[-1] != 1:
        raise ValueError(f"scaling must not depend on the key, got a tensor of shape {tuple(scaling.shape)}")
    return query * scaling.to(query.dtype)


def _refuse(dropout: float, kwargs: dict[str, object]) -> None:
    if dropout > 0:
        raise ValueError(
            f"{NAME} has no attention dropout, got dropout={dropout}; build the model with attention_dropout=0.0, "
            "set it in each layer of a model that is built, or call model.eval()"
        )
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{NAME} does not support {meaning} ({name} was given)")
