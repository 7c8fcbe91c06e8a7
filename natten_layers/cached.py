"""Causal attention of new tokens over a cache, by token position: decoding, chunked prefill, padding."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .arguments import as_autocast
from .checks import (
    DTYPES,
    check_additional,
    check_flags,
    check_like,
    check_pair,
    check_scale,
    check_sink,
    check_tensors,
    is_finite_number,
)
from .eager import without_autocast
from .kernels.ops import decode as decode_ops
from .kernels.ops.define import check_duals
from .operations import Impl, takes_fused
from .wording import count_or_one, shorten

__all__ = ["cached_attention"]

MAX_POSITION = 1 << 31
NO_SOFTCAP = "the kernels have no softcap"
"""Why they do not compute a call that has one"""
CHUNK_SCORES = 1 << 24
"""Most scores that the eager path holds at a time: 64 MiB in fp32."""


@overload
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    window: int | None = None,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    window: int | None = None,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    window: int | None = None,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention, windowed if wanted, in which visibility follows token positions instead of memory order.

    Key ``j`` is visible to query ``i`` if ``0 <= key_positions[j] <= query_positions[i]`` and, with a window,
    ``key_positions[j] > query_positions[i] - window``. Empty cache entries and padding have position -1. This covers
    rolling buffers, partly filled buffers, padding on either side and several new tokens at once. Over a whole sequence
    it equals causal :func:`neighborhood_attention` with ``kernel_size=window``.

    A query that sees no key at all, such as padding, gets ``out`` 0 and ``lse`` -inf, with zero gradients.

    The fused path is for inference. Its kernel reads every visible key and value once, with any strides and without a
    copy; a second kernel merges the results if the cache is split into several slices. It is made for few query tokens.
    With more it is correct, but reads the cache once for each 64 rows (query tokens times grouped heads). It never
    waits for the device, and can be captured in a CUDA graph.

    The eager path holds at most ``CHUNK_SCORES`` scores at a time (but at least those of one query), even when it
    records gradients, and fp32 copies of ``key`` and ``value`` if they have lower precision.

    Args:
        query: ``[B, Lq, Hq, D]``, fp16, bf16, fp32 or (eager only) fp64. Head ``h`` reads KV head
            ``h // (Hq // Hkv)``.
        key: ``[B, S, Hkv, D]``, ``Hq % Hkv == 0``.
        value: ``[B, S, Hkv, Dv]``.
        query_positions: ``[B or 1, Lq]``, an integer dtype, below 2^31; negative for padding.
        key_positions: ``[B or 1, S]``, an integer dtype, below 2^31; negative for empty entries and padding.
        window: number of positions that a query sees, its own included; None for all of them.
        scale: factor on the scores, default ``D ** -0.5``.
        additional_keys: registers, ``[B or 1, R, Hkv, D]``, visible to every query.
        additional_values: ``[B or 1, R, Hkv, Dv]``; given exactly when ``additional_keys`` is.
        sink: one extra logit per query head with a zero value vector: a float, a tensor ``[Hq]``, or None.
        softcap: scores of cache and registers become ``softcap * tanh(score / softcap)`` (Gemma 2); in PyTorch only.
        return_lse: also return the log-sum-exp of all scores in the softmax: cache, registers and sink.
        impl: "auto" uses the fused path if it can run on the tensors' device and dtype and no derivative is needed,
            else PyTorch ("eager"); "fused" and "eager" never fall back.

    Returns:
        ``out [B, Lq, Hq, Dv]`` in the query's dtype, or ``(out, lse)`` with ``lse [B, Lq, Hq]`` in fp32 (fp64 for fp64
        inputs), natural log; under autocast as of :func:`neighborhood_attention`. Contiguous; empty for an empty batch.

    Raises:
        ValueError: an argument does not fit; the message names it and the values.
        RuntimeError: ``impl="fused"``, but the fused kernel cannot run.
    """
    check_flags(return_lse=return_lse)
    query, key, value, additional_keys, additional_values = as_autocast(
        query, key, value, additional_keys, additional_values
    )
    _check(query, key, value, query_positions, key_positions, window)
    check_pair(additional_keys, additional_values)
    registers = check_additional(additional_keys, additional_values, query, key, value)
    sink = check_sink(sink, query)
    factor = query.shape[-1] ** -0.5 if scale is None else check_scale(scale, query.dtype)
    arguments = (query, key, value, query_positions, key_positions, *registers, sink, window, factor)
    if softcap is not None and not (is_finite_number(softcap, query.dtype) and softcap > 0):
        raise ValueError(f"softcap must be None or a positive number, got {shorten(softcap)}")
    softcap = None if softcap is None else float(softcap)
    if takes_fused(
        impl, query, lambda: NO_SOFTCAP if softcap else decode_ops.why_not(query, value, key, *registers, sink)
    ):
        out, lse = decode_ops.decode(*arguments, with_lse=return_lse)
    else:
        out, lse = (t.contiguous() for t in _eager(*arguments, softcap))
    return (out, lse) if return_lse else out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
) -> None:
    check_tensors(query=query, key=key, value=value, query_positions=query_positions, key_positions=key_positions)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or 0 in tensor.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected [B, L, heads, head_dim], none but B 0")
        check_like(name, tensor, query)
    if query.dtype not in DTYPES:
        raise ValueError(f"query dtype {query.dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
    if key.shape[0] != query.shape[0] or key.shape[-1] != query.shape[-1] or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit; expected "
            f"[B, Lq, Hq, D], [B, S, Hkv, D] and [B, S, Hkv, Dv]"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query heads must be a multiple of KV heads: query has {query.shape[2]}, key and value {key.shape[2]}"
        )
    for name, positions, tensor in (("query_positions", query_positions, query), ("key_positions", key_positions, key)):
        batch, length = tensor.shape[:2]
        if positions.shape not in ((1, length), (batch, length)):
            raise ValueError(f"{name} has shape {tuple(positions.shape)}; expected [{count_or_one(batch)}, {length}]")
        if positions.is_floating_point() or positions.dtype == torch.bool or positions.is_complex():
            raise ValueError(f"{name} has dtype {positions.dtype}; expected an integer dtype")
        if positions.device != query.device:
            raise ValueError(f"{name} is on {positions.device}, but query is on {query.device}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, Integral) or window < 1):
        raise ValueError(f"window must be None or an int of at least 1, got {shorten(window)}")


@without_autocast
def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    register_keys: Tensor | None,
    register_values: Tensor | None,
    sink: Tensor | float | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of validated arguments, computed a chunk of queries at a time."""
    check_duals(
        query=query, key=key, value=value, additional_keys=register_keys, additional_values=register_values, sink=sink
    )
    query_positions, key_positions = query_positions.long(), key_positions.long()  # narrow dtypes would overflow
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, length, heads = query.shape[:3]
    if sink is not None:
        sink = sink.to(accumulate) if isinstance(sink, Tensor) else query.new_full((heads,), sink, dtype=accumulate)
    keys, values = [t.to(accumulate) for t in (key, value)]
    if torch.is_grad_enabled():  # a score that is masked has a gradient of zero, of which zero times NaN would be NaN
        keys = torch.where((key_positions >= 0)[..., None, None], keys, 0.0)
    # A weight of zero times NaN is NaN, but a nonfinite value must reach only the queries that see it.
    finite = values.isfinite()
    nonfinite = ~finite.all(-1)  # [B, S, Hkv]
    values = torch.where(finite, values, 0.0)
    registers = None
    if register_keys is not None and register_values is not None:
        registers = register_keys.to(accumulate), register_values.to(accumulate)

    def attend(q: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        visible = (key_positions >= 0)[:, None] & (key_positions[:, None] <= positions[..., None])
        if window is not None:
            visible = visible & (key_positions[:, None] > positions[..., None] - min(window, MAX_POSITION))
        return _attend(q.to(accumulate) * scale, keys, values, nonfinite, visible, registers, sink, softcap)

    step = max(1, CHUNK_SCORES // (max(1, batch) * heads * key.shape[1]))
    if step >= length:
        out, lse = attend(query, query_positions)
        return out.to(query.dtype), lse
    outs, lses = [], []
    for q, p in zip(query.split(step, 1), query_positions.split(step, 1), strict=True):
        # A chunk is recomputed in the backward pass, so that its scores need not be saved.
        out, lse = checkpoint(attend, q, p, use_reentrant=False, preserve_rng_state=False)
        outs.append(out.to(query.dtype))
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _attend(
    query: Tensor,  # [B, L, Hq, D], scaled
    key: Tensor,  # [B, S, Hkv, D]
    value: Tensor,  # [B, S, Hkv, Dv], finite
    nonfinite: Tensor,  # [B, S, Hkv], True where the value was nonfinite
    visible: Tensor,  # [B or 1, L, S]
    registers: tuple[Tensor, Tensor] | None,
    sink: Tensor | None,  # [Hq]
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    kv_heads = key.shape[2]
    q = query.unflatten(2, (kv_heads, -1))  # [B, L, Hkv, G, D]
    scores = _capped(torch.einsum("blhgd,bshd->bhgls", q, key), softcap)
    scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    if registers is not None:
        scores = torch.cat((_capped(torch.einsum("blhgd,brhd->bhglr", q, registers[0]), softcap), scores), -1)
    # The reference point of the exponentials needs no gradient, as the result does not depend on it.
    row_max = scores.detach().amax(-1)  # [B, Hkv, G, L]
    logit = None if sink is None else sink.view(kv_heads, -1, 1)  # [Hkv, G, 1]
    if logit is not None:
        row_max = torch.maximum(row_max, logit.detach())
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    weights = torch.exp(scores - row_max[..., None])
    row_sum = weights.sum(-1)
    if logit is not None:
        row_sum = row_sum + torch.exp(logit - row_max)
    nothing = row_sum == 0  # queries without any key, register or sink, such as padding
    row_sum = row_sum.masked_fill(nothing, 1.0)
    lse = (row_max + row_sum.log()).masked_fill(nothing, -math.inf)
    count = 0 if registers is None else registers[0].shape[1]
    out = torch.einsum("bhgls,bshd->blhgd", weights[..., count:], value)
    if registers is not None:
        out = out + torch.einsum("bhglr,brhd->blhgd", weights[..., :count], registers[1])
    out = out / row_sum.permute(0, 3, 1, 2)[..., None]
    sees_nonfinite = torch.einsum(
        "bls,bsh->blh", visible.to(query.dtype).expand(key.shape[0], -1, -1), nonfinite.to(query.dtype)
    )
    out = out.masked_fill((sees_nonfinite > 0)[..., None, None], math.nan)
    return out.flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
