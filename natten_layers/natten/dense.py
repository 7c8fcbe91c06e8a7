"""Attention of queries over all keys, over sequences packed behind each other, and over sets of keys apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_flags, check_tensors, no_tensor
from ..operations import merge_attention, neighborhood_attention

__all__ = ["attention", "generate_varlen_parameters", "merge_attentions"]


class _Options(TypedDict, total=False):
    """Lengths of packed sequences, and what chooses among NATTEN's kernels and never changes a result."""

    seqlens_Q: Tensor | None
    seqlens_KV: Tensor | None
    cumulative_seqlen_Q: Tensor | None
    cumulative_seqlen_KV: Tensor | None
    max_seqlen_Q: int | None
    max_seqlen_KV: int | None
    backend: str | None
    q_tile_size: int | None
    kv_tile_size: int | None
    backward_q_tile_size: int | None
    backward_kv_tile_size: int | None
    backward_kv_splits: int | None
    backward_use_pt_reduction: bool
    run_persistent_kernel: bool
    kernel_schedule: Any
    torch_compile: bool


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    *,
    return_lse: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """NATTEN's dense attention: every query over all keys, or over those of its own sequence.

    Packed sequences have batch 1 and follow each other along the tokens. They are computed one by one, for which their
    lengths are read from the device: meant for tests and for few, long sequences.

    Args:
        query: ``[B, Lq, Hq, D]``.
        key: ``[B, Lk, Hkv, D]``, ``Hq % Hkv == 0``.
        value: ``[B, Lk, Hkv, Dv]``.
        is_causal: query ``i`` sees keys ``0 .. i`` of its sequence, whatever the two lengths.
        scale: factor on the scores, default ``D ** -0.5``. 0.0 counts, where NATTEN takes its default instead.
        seqlens_Q, seqlens_KV: lengths of packed sequences, int32 ``[S]``.
        cumulative_seqlen_Q, cumulative_seqlen_KV: where they begin, and the end of the last one, int32 ``[S + 1]``.
        max_seqlen_Q, max_seqlen_KV: upper bounds of the lengths, which are only checked.
        return_lse: also return the log-sum-exp of the scores.

    The arguments from ``backend`` to ``torch_compile`` choose among NATTEN's kernels. They have no effect here.

    Returns:
        ``out [B, Lq, Hq, Dv]`` in the query's dtype, or ``(out, lse)`` with ``lse [B, Lq, Hq]`` in fp32 (fp64 for fp64
        inputs), natural log. Queries of a sequence without keys get 0 and -inf.

    Raises:
        ValueError: an argument does not fit; the message names it and the values.
    """
    check_flags(is_causal=is_causal, return_lse=return_lse)
    _check_tokens(query, key, value)
    if seqlens_Q is not None or seqlens_KV is not None:
        cumulative_seqlen_Q, cumulative_seqlen_KV, *_ = generate_varlen_parameters(
            query, key, value, seqlens_Q, seqlens_KV
        )
    if cumulative_seqlen_Q is None and cumulative_seqlen_KV is None:
        out, lse = _attend(query, key, value, is_causal, scale)
        return (out, lse) if return_lse else out
    if query.shape[0] != 1:
        raise ValueError(f"packed sequences have batch 1, got a query {tuple(query.shape)}")
    q_spans = _spans("Q", cumulative_seqlen_Q, max_seqlen_Q, query.shape[1])
    kv_spans = _spans("KV", cumulative_seqlen_KV, max_seqlen_KV, key.shape[1])
    if len(q_spans) != len(kv_spans):
        raise ValueError(
            f"cumulative_seqlen_Q is of {len(q_spans)} sequences, but cumulative_seqlen_KV of {len(kv_spans)}"
        )
    parts = [
        _attend(query[:, q_span], key[:, kv_span], value[:, kv_span], is_causal, scale)
        for q_span, kv_span in zip(q_spans, kv_spans, strict=True)
    ]
    out, lse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_tensors(query=query, key=key, value=value)
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"attention takes [B, tokens, heads, head_dim], got {shapes}")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"batches differ: {shapes}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key and value differ in tokens: {shapes}")


def _spans(name: str, cumulative: Tensor | None, longest: int | None, tokens: int) -> list[slice]:
    """Where every sequence lies."""
    if cumulative is None:
        raise ValueError(f"cumulative_seqlen_{name} is None; packed sequences need it for queries and keys")
    if not isinstance(cumulative, Tensor):
        raise no_tensor(f"cumulative_seqlen_{name}", cumulative)
    if cumulative.ndim != 1 or cumulative.is_floating_point():
        raise ValueError(f"cumulative_seqlen_{name} must be integers [S + 1], got {cumulative}")
    ends = cumulative.tolist()
    spans = [slice(*pair) for pair in pairwise(ends)]
    lengths = [span.stop - span.start for span in spans]
    if not spans or ends[0] != 0 or ends[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"cumulative_seqlen_{name} must rise from 0 to {tokens}, the number of tokens, got {ends}")
    if longest is not None and longest < max(lengths):
        raise ValueError(f"max_seqlen_{name} is {longest}, but the longest sequence has {max(lengths)} tokens")
    return spans


def generate_varlen_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
) -> tuple[Tensor, Tensor, int, int] | tuple[None, None, int, int]:
    """``(cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)`` of packed sequences, for
    :func:`attention`.

    Args:
        query, key, value: ``[1, tokens, heads, head_dim]``, the sequences behind each other.
        seqlens_Q, seqlens_KV: their lengths, int32 ``[S]``. With neither, ``(None, None, 0, 0)`` says that nothing is
            packed.

    Raises:
        ValueError: only one is given, or they do not fit each other or the tensors.
    """
    _check_tokens(query, key, value)
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    if seqlens_Q is None or seqlens_KV is None:
        raise ValueError(f"seqlens_Q and seqlens_KV come together, got {seqlens_Q} and {seqlens_KV}")
    for name, lengths, tokens in (("seqlens_Q", seqlens_Q, query.shape[1]), ("seqlens_KV", seqlens_KV, key.shape[1])):
        if not isinstance(lengths, Tensor):
            raise no_tensor(name, lengths)
        if lengths.dtype != torch.int32 or lengths.ndim != 1 or len(lengths) != len(seqlens_Q) or not len(lengths):
            raise ValueError(
                f"{name} must be int32 [{len(seqlens_Q) or 'S'}], got {lengths.dtype} {tuple(lengths.shape)}; "
                f"{name}.int() makes int32"
            )
        if query.shape[0] != 1 or lengths.sum().item() != tokens:
            raise ValueError(
                f"{name} {lengths.tolist()} must add up to the tokens of a batch of 1, got [{query.shape[0]}, {tokens}]"
            )
    q_ends, kv_ends = (pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)) for lengths in (seqlens_Q, seqlens_KV))
    return q_ends, kv_ends, int(seqlens_Q.max()), int(seqlens_KV.max())


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of the same queries over the union of disjoint sets of keys: NATTEN's form of :func:`merge_attention`.

    Args:
        outputs: two or more of equal shape, ``[B, *tokens, heads, head_dim]``.
        lse_tensors: the log-sum-exp of each, ``[B, *tokens, heads]``.
        torch_compile, use_autograd_fix: without effect. Gradients are exact in either case, for outputs of any origin,
            and no tensor is changed in place.

    Returns:
        ``(output, lse)``, in the dtypes of the first output and of the statistics.

    Raises:
        ValueError: fewer than two, other numbers of both, or shapes or devices that differ.
    """
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(
            f"merge_attentions takes two or more outputs and as many lse_tensors, got {len(outputs)} and "
            f"{len(lse_tensors)}"
        )
    check_tensors(**{f"outputs[{i}]": out for i, out in enumerate(outputs)})
    check_tensors(**{f"lse_tensors[{i}]": lse for i, lse in enumerate(lse_tensors)})
    wide = [lse.to(torch.promote_types(lse.dtype, torch.float32)) for lse in lse_tensors]
    merged = merge_attention(*((out, lse, torch.ones_like(lse)) for out, lse in zip(outputs, wide, strict=True)))
    return merged.out, merged.lse


def _attend(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """One sequence. Windows need as many keys as queries: where there are more, the rest are registers."""
    queries, keys = query.shape[1], key.shape[1]
    if queries == 0 or keys == 0:
        shape, dtype = query.shape[:-1], torch.promote_types(query.dtype, torch.float32)
        return query.new_zeros(*shape, value.shape[-1]), query.new_full(shape, -math.inf, dtype=dtype)
    if is_causal and queries > keys:  # those behind the last key see all of them
        parts = (
            _attend(query[:, :keys], key, value, True, scale),
            _attend(query[:, keys:], key, value, False, scale),
        )
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
    if queries > keys:  # the first key is the window of every query
        split, window = 1, 1
        first_key, first_value = (t[:, :1].expand(-1, queries, -1, -1) for t in (key, value))
    else:
        split, window = queries, queries
        first_key, first_value = key[:, :queries], value[:, :queries]
    return neighborhood_attention(
        query,
        first_key,
        first_value,
        (window,),
        is_causal=is_causal,
        scale=scale,
        additional_keys=None if is_causal else key[:, split:],
        additional_values=None if is_causal else value[:, split:],
        return_lse=True,
    )
