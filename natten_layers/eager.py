"""PyTorch implementations: a dense reference for tests, and the blocked attention that runs on CPU and MPS.

``tile_attention.py`` computes the blocked attention over windows, and ``tiles.py`` explains the letters of its shapes;
this module adds registers and the sink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .geometry import Window, fitted, window_bounds, window_mask
from .kernels.host.packing import Packing
from .kernels.ops.define import check_duals, is_watched
from .kernels.ops.transforms import is_differentiated
from .tile_attention import State, attend_tiles, nonfinite_mask
from .tiles import heads_first, plan, tile_queries, untile

__all__ = ["attention", "attention_state", "autocasts", "dense_attention_state", "merge_states", "without_autocast"]

LOWEST_BIAS = torch.finfo(torch.float32).min * math.log(2)
"""Lower biases hide their keys, as -inf does: kernels take logarithms to the base 2, in fp32, where they overflow."""

P = ParamSpec("P")
R = TypeVar("R")

# Asked at import, as torch.compile of torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(device)
)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device. Some, such as meta, have none, and torch raises if it is asked."""
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def without_autocast(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Switch autocast off in a function that casts by itself: it would compute fp32 products in half precision."""

    @wraps(function)
    def run(tensor: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        device = tensor.device.type
        if not autocasts(device):
            return function(tensor, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(tensor, *args, **kwargs)

    return run


@without_autocast
def dense_attention_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: Tensor | float | None,
    window: Window,
    scale: float,
    rpb: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> State:
    """The definition of the operation, literally: all scores, one mask, one softmax. For tests.

    Takes arguments validated by ``operations`` and returns ``(out, row_max, row_sum)``. Scores, softmax and statistics
    are fp32, or fp64 for fp64 inputs. ``rpb [Hq, 2 k_1 - 1, ...]`` is added to the scores of tokens, for query ``i``
    and key ``j`` its entry ``(j - i) / d + k - 1`` on each axis. ``key_mask [B, *spatial]`` is True where a key may be
    seen. Allocates several times tokens x tokens.
    """
    batch, heads, kv_heads = query.shape[0], query.shape[-2], key.shape[-2]
    spatial = query.shape[1:-2]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (t.flatten(1, -3).to(accumulate) for t in (query, key, value))  # [B, N, H, D]
    key_spatial = key.shape[1:-2] if key.shape[1:-2] != spatial else None
    mask = window_mask(spatial, window, query.device, key_spatial)[None]  # [1 or B, N, N]
    if key_mask is not None:
        mask = mask & key_mask.flatten(1)[:, None, :]
        k, v = (t.masked_fill(~key_mask.flatten(1)[..., None, None], 0.0) for t in (k, v))
    bias = None if rpb is None else _dense_bias(_hiding(rpb.to(accumulate)), spatial, window)  # [N, Hq, N]
    if additional_keys is not None and additional_values is not None:
        k = torch.cat([additional_keys.to(accumulate), k], 1)
        v = torch.cat([additional_values.to(accumulate), v], 1)
        mask = torch.cat([mask.new_ones(*mask.shape[:2], additional_keys.shape[1]), mask], 2)
        bias = None if bias is None else pad(bias, (additional_keys.shape[1], 0))
    k, v = (t.repeat_interleave(heads // kv_heads, -2) for t in (k, v))
    scores = scale * torch.einsum("bqhd,bkhd->bqhk", q, k)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~mask[:, :, None, :], -torch.inf)
    row_max = scores.amax(-1)
    if sink is not None:
        sink = torch.as_tensor(sink, dtype=accumulate, device=query.device).expand(heads)
        row_max = torch.maximum(row_max, sink)
    reference = row_max.masked_fill(row_max == -torch.inf, 0.0)  # of a query that sees nothing
    weights = torch.exp(scores - reference[..., None])
    row_sum = weights.sum(-1)
    if sink is not None:
        row_sum = row_sum + torch.exp(sink - reference)
    # A weight of zero times NaN is NaN, but a nonfinite value must reach only the queries that see it.
    finite = v.isfinite()
    out = torch.einsum("bqhk,bkhd->bqhd", weights, torch.where(finite, v, 0.0))
    seen = mask.expand(batch, -1, -1).to(accumulate)
    sees_nonfinite = torch.einsum("bqk,bkhd->bqhd", seen, (~finite).to(accumulate)) > 0
    out = torch.where(sees_nonfinite, torch.nan, out / row_sum.masked_fill(row_sum == 0, 1.0)[..., None])
    shape = (batch, *spatial, heads)
    return out.to(query.dtype).reshape(*shape, -1), row_max.reshape(shape), row_sum.reshape(shape)


def _hiding(rpb: Tensor) -> Tensor:
    """A bias on relative positions with -inf where it hides keys."""
    return rpb.masked_fill(rpb < LOWEST_BIAS, -math.inf)


def _dense_bias(rpb: Tensor, spatial: Sequence[int], window: Window) -> Tensor:
    """``[N, Hq, N]``: the bias of every pair of tokens; where the query does not see the key it is arbitrary."""
    entries = []
    axes = zip(spatial, window.kernel_size, window.stride, window.dilation, window.is_periodic, strict=True)
    for axis, (length, k, s, d, periodic) in enumerate(axes):
        shape = [1] * len(spatial)
        shape[axis] = length
        place = torch.arange(length, device=rpb.device).reshape(shape).expand(*spatial).flatten()
        distance = torch.div(place - place[:, None], d, rounding_mode="floor")
        if periodic:  # the way along the ring from the query to the key, which leads through the window
            index = place[:, None] // d
            first, _ = window_bounds(index, length // d, k, s, False, True)
            distance = first - index + (distance + index - first) % (length // d)
        entries.append((distance + k - 1).clamp(0, 2 * k - 2))
    return rpb[:, *entries].movedim(0, 1)


@without_autocast
def attention_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: Tensor | float | None,
    window: Window,
    scale: float,
    rpb: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> State:
    """:func:`dense_attention_state` by tiles of queries, in time and memory linear in the number of tokens.

    Differentiable to any order and in forward mode; the backward pass recomputes the scores. Beside its results, which
    are contiguous, it allocates a copy of query, key and value in the accumulation dtype, the scores and keys of one
    chunk of ``CHUNK_SCORES`` scores (or of one tile, if that has more) and, with registers, tokens x registers scores.
    A nonfinite key or value turns the whole rows of the queries that see it into NaN, and no others.
    """
    check_duals(
        query=query, key=key, value=value, additional_keys=additional_keys, additional_values=additional_values,
        sink=sink, rpb=rpb,
    )  # fmt: skip
    group = query.shape[-2] // key.shape[-2]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    axes = plan(query.shape[1:-2], window, group, key.shape[1:-2])
    tiles = tile_queries(query.to(accumulate) * scale, axes, group)
    hidden = None
    if key_mask is not None:
        masked = ~key_mask[..., None, None]
        key, value = (t.masked_fill(masked, 0.0) for t in (key, value))
        hidden = tiles.new_zeros(()).masked_fill(masked, -math.inf).expand(*key.shape[:-1], 1)
        hidden = heads_first(hidden, axes)
    k, v = (heads_first(t.to(accumulate), axes) for t in (key, value))
    # A masked weight is exactly zero, but zero times NaN is NaN. So tiles compute with zeros in place of nonfinite keys
    # and values, and rows that see one are set to NaN afterwards.
    nonfinite = None
    if not _are_known_finite(k, v):
        nonfinite = torch.cat([nonfinite_mask(k), nonfinite_mask(v)], -1)
        k, v = (t.nan_to_num(0.0, 0.0, 0.0) for t in (k, v))
    table = None if rpb is None else _hiding(rpb.to(accumulate))
    out, row_max, log_sum = attend_tiles(tiles, k, v, table, nonfinite, hidden, axes)
    state = out, row_max, log_sum.exp()
    if additional_keys is not None and additional_values is not None:
        registers = (t.to(accumulate).movedim(1, 2).flatten(0, 1) for t in (additional_keys, additional_values))
        state = merge_states(state, _attend_registers(tiles, *registers))
    if sink is not None:
        state = _add_sink(state, torch.as_tensor(sink, dtype=accumulate, device=query.device), tiles)
    out, row_max, row_sum = (untile(t, axes, query) for t in (state[0], *(s[..., None] for s in state[1:])))
    return out.to(query.dtype).contiguous(), row_max[..., 0].contiguous(), row_sum[..., 0].contiguous()


@without_autocast
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: Tensor | float | None,
    window: Window,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """``out`` of :func:`attention_state`, contiguous.

    Plain and plain causal attention on a CPU is left to PyTorch's, unless derivatives may be needed, of which PyTorch's
    does not have all.
    """
    inputs = query, key, value, additional_keys, additional_values, sink
    spatial, extras = key.shape[1:-2], inputs[3:]
    is_plain = query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and key_mask is None
    is_plain = is_plain and not is_differentiated(inputs)
    past = is_plain and window.is_past(spatial) and all(x is None for x in extras)
    past = past and _are_known_finite(key, value)  # PyTorch would multiply masked NaN by a weight of zero
    if not past and not (is_plain and window.is_full(spatial)):
        return attention_state(*inputs, window, scale, key_mask=key_mask)[0]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (t.flatten(1, -3).to(accumulate).transpose(1, 2) for t in (query, key, value))  # [B, H, N, D]
    if additional_keys is not None and additional_values is not None:
        registers = (t.to(accumulate).transpose(1, 2) for t in (additional_keys, additional_values))
        k, v = (torch.cat(parts, 2) for parts in zip((k, v), registers, strict=True))
    mask = None
    if sink is not None:
        # The sink is one more key and value of zeros. The mask adds its logit to the score, which is zero.
        k, v = (pad(t, (0, 0, 0, 1)) for t in (k, v))
        mask = k.new_zeros(1, q.shape[1], 1, k.shape[2])
        mask[..., -1] = torch.as_tensor(sink, dtype=accumulate).reshape(1, -1, 1)
    # In a graph with symbolic sizes the comparison is symbolic, and PyTorch does not take it as ``enable_gqa``.
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=past, scale=scale, **grouped)
    return out.transpose(1, 2).reshape(query.shape).to(query.dtype).contiguous()


def packed_attention_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: Tensor | float | None,
    window: Window,
    scale: float,
    *,
    packing: Packing,
    key_mask: Tensor | None = None,
) -> State:
    """:func:`attention_state` of the samples of a packed batch ``[1, N, ...]``, those of equal shapes in one call.

    It gathers them, so it allocates a copy of its tensors unless all samples have one shape.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for sample, shape in enumerate(packing.shapes):
        if math.prod(shape):
            groups.setdefault(shape, []).append(sample)
    if not groups:  # an empty batch, of which results and gradients are empty
        groups[(1,) * packing.rank] = []
    parts: dict[int, tuple[Tensor, ...]] = {}
    for shape, samples in groups.items():
        q, k, v = (_batch(x, packing, samples, shape) for x in (query, key, value))
        mask = None if key_mask is None else _batch(key_mask, packing, samples, shape)
        keys, values = (None if x is None else x[samples] for x in (additional_keys, additional_values))
        state = attention_state(q, k, v, keys, values, sink, fitted(shape, window), scale, key_mask=mask)
        out, row_max, row_sum = (x.flatten(1, packing.rank) for x in state)
        if len(groups) == 1:
            return out.flatten(0, 1)[None], row_max.flatten(0, 1)[None], row_sum.flatten(0, 1)[None]
        parts |= {sample: (out[i], row_max[i], row_sum[i]) for i, sample in enumerate(samples)}
    out, row_max, row_sum = (torch.cat(x)[None] for x in zip(*(parts[i] for i in sorted(parts)), strict=True))
    return out, row_max, row_sum


def _batch(x: Tensor, packing: Packing, samples: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """``[samples, *shape, ...]``: some samples of a packed tensor ``[1, N, ...]``, which all have one shape."""
    if len(samples) * math.prod(shape) == packing.tokens:
        whole = x[0]  # no other sample has tokens, so these follow each other
    else:
        parts = x[0].split(packing.sizes)
        whole = torch.cat([parts[sample] for sample in samples])
    return whole.reshape(len(samples), *shape, *x.shape[2:])


def _are_known_finite(*tensors: Tensor) -> bool:
    """Whether all elements are finite; False also where checking is expensive or impossible.

    On a GPU the check would wait for the device, and a compiled graph cannot branch on data.
    """
    if any(t.device.type != "cpu" for t in tensors) or is_watched(tensors):
        return False
    return all(math.isfinite(t.detach().sum().item()) for t in tensors)


def merge_states(*states: State) -> State:
    """Attention of the same queries over the union of disjoint sets of keys: ``(out, row_max, row_sum)``."""
    outs, maxima, sums = zip(*states, strict=True)
    row_max = torch.stack(maxima).amax(0)
    reference = row_max.masked_fill(row_max == -math.inf, 0.0)  # a row without keys in any state must not become NaN
    weights = [row_sum * torch.exp(m - reference) for m, row_sum in zip(maxima, sums, strict=True)]
    row_sum = torch.stack(weights).sum(0)
    total = row_sum.masked_fill(row_sum == 0, 1.0)
    merged = [out.to(row_sum.dtype) * (w / total)[..., None] for out, w in zip(outs, weights, strict=True)]
    return torch.stack(merged).sum(0).to(outs[0].dtype), row_max, row_sum


def _attend_registers(query: Tensor, key: Tensor, value: Tensor) -> State:
    """Attention of scaled queries ``[Z, ..., D]`` over registers ``[Z, R, D]``, which all queries see."""
    rows = query.flatten(1, -2)
    scores = rows @ key.mT
    row_max = scores.amax(-1).detach()
    weights = torch.exp(scores - row_max[..., None])
    row_sum = weights.sum(-1)
    out = (weights @ value) / row_sum[..., None]
    shape = query.shape[:-1]
    return out.reshape(*shape, value.shape[-1]), row_max.reshape(shape), row_sum.reshape(shape)


def _add_sink(state: State, sink: Tensor, tiles: Tensor) -> State:
    """Add a key with score ``sink`` (``[Hq]``, or one for all heads) and value zero. It does not overflow."""
    out, row_max, row_sum = state
    group = tiles.shape[-3]
    if sink.ndim:
        kv_heads = sink.shape[0] // group
        sink = sink.reshape(kv_heads, group).repeat(tiles.shape[0] // kv_heads, 1)  # [Z, G]
        sink = sink.reshape(tiles.shape[0], *(1,) * (tiles.ndim - 4), group, 1)
    merged_max = torch.maximum(row_max, sink.detach())
    sees_nothing = merged_max == -math.inf
    reference = merged_max.masked_fill(sees_nothing, 0.0)
    window_sum = row_sum * torch.exp(row_max - reference)
    row_sum = (window_sum + torch.exp(sink - reference)).masked_fill(sees_nothing, 0.0)
    return out * (window_sum / row_sum.masked_fill(sees_nothing, 1.0))[..., None], merged_max, row_sum
