"""Texts that follow each other in a row of a batch: where they begin, and attention of each over itself alone.

transformers' models say it by ``cu_seq_lens_q``, cumulative lengths, or by ``position_ids`` that begin anew with each
text. The latter are numbers on the device. To branch on them is to wait for it, which is done once for all layers of a
forward pass; compiled layers cannot branch on them at all.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..cached import cached_attention
from ..checks import no_tensor
from ..varlen import neighborhood_attention_varlen, packed_shapes

_CANNOT_LOOK = (
    "position_ids begin anew in a row, where a compiled layer cannot look at them to keep the texts apart: pass "
    "cu_seq_lens_q and cu_seq_lens_k; or, if the model's masks are told the positions, use_cache=False and no "
    "attention_mask"
)
_latest: tuple[weakref.ref[Tensor], int, int, Tensor | None] | None = None
"""What :func:`ends_of_texts` last found: of which tensor, its version, for how many rows, and the result."""
_beside_padding: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What :func:`ends_beside_padding` found with a mask, of which each kind of layers has one."""


def text_begins(position_ids: Tensor, real: Tensor | None = None) -> Tensor:
    """Which tokens begin another text than the token before: bool ``[B, T]``, False in the first column.

    A text begins where a position is not larger than the last one: at the same one again if texts have a single token.
    Positions of several axes, of images' tokens, go back on some axes within a text, and those of video frames stay
    where they are. A text begins where all of them go back, or where all are zero once more.

    Args:
        position_ids: ``[B, T]`` or ``[axes, B, T]``.
        real: ``[B, T]``, False at padding, whose positions mean nothing and which begins no text; None without any.
    """
    axes = position_ids if position_ids.ndim == 3 else position_ids[None]
    before, here = axes[..., :-1], axes[..., 1:]
    counts = None
    if real is not None:
        index = torch.arange(axes.shape[-1], device=axes.device)
        last = torch.where(real, index, -1).cummax(-1).values[:, :-1]  # the last real token before each token
        counts = real[:, 1:] & (last >= 0)
        axes = axes.expand(-1, real.shape[0], -1)
        before, here = axes.gather(-1, last.clamp_min(0).expand(axes.shape[0], -1, -1)), axes[..., 1:]
    again = here <= before if axes.shape[0] == 1 else (here < before) | ((here == 0) & (before == 0))
    begins = again.all(0)
    return F.pad(begins if counts is None else begins & counts, (1, 0))


def cumulative_lengths(begins: Tensor) -> Tensor:
    """int64 ``[texts + 1]`` in the host's memory, over all rows of ``begins [B, T]``; a row's end is a text's end."""
    begins = begins.cpu()
    begins[:, 0] = True
    return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=begins.numel())


def forget() -> None:
    """Look at positions again, as they may have changed in place, which inference tensors do not count."""
    global _latest
    _latest = None
    _beside_padding.clear()


def _version(position_ids: Tensor) -> int:
    return -1 if position_ids.is_inference() else position_ids._version


def ends_of_texts(position_ids: Tensor, batch: int) -> Tensor | None:
    """The cumulative lengths of the texts in ``batch`` rows, None if each row is one text. Waits for the device once.

    All layers of a forward pass get the same tensor, so the last result is kept.
    """
    global _latest
    version, known = _version(position_ids), _latest
    if known is not None and known[0]() is position_ids and known[1:3] == (version, batch):
        return known[3]
    begins = text_begins(position_ids).cpu()
    found = cumulative_lengths(begins.expand(batch, -1).clone()) if bool(begins.any()) else None
    _latest = weakref.ref(position_ids), version, batch, found
    return found


def ends_beside_padding(mask: Tensor, position_ids: Tensor, real: Tensor, sources: Tensor) -> Tensor | None:
    """:func:`ends_of_texts` of rows whose tokens are moved; padding begins no text.

    Waits for the device once a mask: once for all layers of a kind, unless hooks give each a mask of its own.

    Args:
        mask: what all layers of a kind are given, which holds ``real``.
        real: ``[B, T]``, False at padding.
        sources: ``[B, T]``, the index that each token is moved from.
    """
    version, known = _version(position_ids), _beside_padding.get(mask)
    if known is not None and known[0]() is position_ids and known[1] == version:
        return known[2]
    begins = text_begins(position_ids, real).gather(1, sources).cpu()
    found = cumulative_lengths(begins) if bool(begins.any()) else None
    _beside_padding[mask] = weakref.ref(position_ids), version, found
    return found


def says_texts(module: nn.Module, position_ids: Tensor | None, query: Tensor, slots: int, causal: bool) -> bool:
    """Whether ``position_ids`` can say which of a layer's queries ``[B, Lq, Hq, D]`` and keys belong to one text."""
    batch, length = query.shape[:2]
    if position_ids is None or length == 1:  # a decoding step
        return False
    fits = position_ids.ndim in (2, 3) and position_ids.shape[-1] == length and position_ids.shape[-2] in (1, batch)
    if causal:
        return fits
    # Cross attention may be handed the positions of its queries too, which say nothing about its keys.
    cross = getattr(module, "is_decoder", False) or "Cross" in type(module).__name__
    return fits and length == slots and not cross


def keep_apart(
    position_ids: Tensor | None, query: Tensor, positions: Tensor | None, blocks: Tensor | None, window: int | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int | None]:
    """What a layer computes with, so that texts do not see each other: their ends, or positions, blocks and the window.

    Texts stand so much further right than those before that no window reaches back over the gap.

    Args:
        positions: ``[B, Lq + S]``, of queries and keys, -1 at padding; None if the queries are the keys, and there is
            no padding.
        blocks: the same of tokens that see each other, -1 at others; windows are as long as there are keys.
        window: None for one without an end.
    """
    assert position_ids is not None
    batch, length = query.shape[:2]
    compiling = torch.compiler.is_compiling()
    ends = None if compiling else ends_of_texts(position_ids, batch)
    if positions is None:
        if compiling:
            assert_one_text(position_ids)
        return ends, None, None, window
    if ends is None and not compiling:
        return None, positions, blocks, window
    texts, slots = number_texts(positions, length, position_ids), positions.shape[1] - length
    window = slots if window is None else window
    positions = torch.where(positions < 0, -1, positions + texts * max(window, slots))
    if blocks is not None:
        blocks = torch.where(blocks < 0, -1, blocks + texts * (blocks.amax() + slots + 1))
    return None, positions, blocks, window


def check_cu_seq_lens(
    of_queries: Tensor | None, of_keys: Tensor | None, query: Tensor, key: Tensor, plain: bool
) -> None:
    """Raise unless cumulative lengths are those of texts that attend to themselves, in one row and without a cache.

    Args:
        plain: whether the layer is causal, a sliding window or full, and without padding.
    """
    for name, lengths in (("cu_seq_lens_q", of_queries), ("cu_seq_lens_k", of_keys)):
        if lengths is not None and not isinstance(lengths, Tensor):
            raise no_tensor(name, lengths)
    if of_queries is None:
        raise ValueError(f"cu_seq_lens_k={of_keys} came without cu_seq_lens_q; pass both, or position_ids alone")
    same = of_keys is None or of_keys is of_queries or torch.equal(of_keys, of_queries)
    if not same or query.shape[0] != 1 or query.shape[1] != key.shape[1]:
        raise ValueError(
            "natten_layers supports cu_seq_lens_q for texts that attend to themselves, packed in one row without a "
            f"cache; got query {tuple(query.shape)}, key {tuple(key.shape)} and cu_seq_lens_k {of_keys}"
        )
    if not plain:
        raise ValueError(
            "natten_layers supports cu_seq_lens_q in causal, sliding-window and full layers, and without an "
            "attention_mask: it says which tokens there are"
        )
    if not torch.compiler.is_compiling():  # a compiled layer does not know the values
        packed_shapes(None, of_queries, 1, query.shape[1], "a row", "cu_seq_lens_q")


def assert_one_text(position_ids: Tensor) -> None:
    """Raise on the device, without waiting for it, unless rows have one text each.

    Tokens that begin anew and that none goes on from are taken for padding on the right.
    """
    axes = position_ids if position_ids.ndim == 3 else position_ids[None]
    goes_on = (axes[..., 1:] > axes[..., :-1]).all(0)
    torch.ops.aten._assert_async.msg(~(text_begins(position_ids)[:, :-1] & goes_on).any(), _CANNOT_LOOK)


def number_texts(positions: Tensor, length: int, position_ids: Tensor) -> Tensor:
    """The number of the text, of those in its row, that each query and each key belongs to: ``[B, Lq + S]``.

    Keys that were in the cache before belong to the text of the first query, as prefixes that were learned do.

    Args:
        positions: ``[B, Lq + S]``, of queries and keys, -1 at padding. Queries are among the keys.
        length: ``Lq``.
        position_ids: ``[B or 1, Lq]`` or ``[axes, B or 1, Lq]``.
    """
    queries, slots = positions[:, :length], positions[:, length:]
    index = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    of_queries = index  # the slots of the queries' own keys
    if length != slots.shape[1]:
        of_queries = (queries - (slots - index).amax(1, keepdim=True)).clamp(0, slots.shape[1] - 1)
    texts = text_begins(position_ids, real=slots.gather(1, of_queries) >= 0).cumsum(1)
    of_slots = texts.gather(1, (index - of_queries[:, :1]).clamp(0, length - 1))
    return torch.cat([texts, of_slots], 1)


def attend_to_own_text(
    query: Tensor,  # [B, T, Hq, D]
    key: Tensor,  # [B, T, Hkv, D]
    value: Tensor,  # [B, T, Hkv, Dv]
    cu_seqlens: Tensor,
    window: int | None,
    options: dict[str, Any],
    softcap: float | None,
) -> Tensor:
    """Attention ``[B, T, Hq, Dv]`` of every text over itself."""
    batch, length = query.shape[:2]
    kernel_size = length if window is None else min(window, length)
    if softcap is None:
        packed = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        out = neighborhood_attention_varlen(*packed, None, (kernel_size,), cu_seqlens=cu_seqlens, **options)
        return out.unflatten(0, (batch, length))
    row = torch.arange(length, device=query.device)
    token = torch.arange(batch * length, device=query.device)
    texts = torch.bucketize(token, cu_seqlens.to(token), right=True).view(batch, length) * length
    sees = row if options["is_causal"] else row[-1:].expand(length)
    of_text = {"scale": options["scale"], "sink": options["sink"], "softcap": softcap}
    return cached_attention(query, key, value, sees + texts, row + texts, window=kernel_size, **of_text)
