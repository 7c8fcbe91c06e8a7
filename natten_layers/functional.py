"""The public operations: defaults, validation of user arguments, and the one dispatch between eager and fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from numbers import Real
from typing import Literal, NamedTuple, TypeGuard, overload

import torch
from torch import Tensor

from . import eager
from .geometry import AXES, Window, make_window
from .kernels import ops

__all__ = ["AttentionState", "attention_state", "merge_attention", "neighborhood_attention"]

Impl = Literal["auto", "fused", "eager"]
Axes = int | Sequence[int]

_Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
_AxisOptions = tuple[Axes, Axes, Axes, bool | Sequence[bool]]
_Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | float | None, Window, float]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionState(NamedTuple):
    """Softmax attention over some set of keys, in the form that can be merged with another set's.

    ``lse = row_max + row_sum.log()``. ``row_max`` is a reference point, any value near the largest score; only the lse
    is meaningful, and gradients are exact for every function that depends on the state through ``out`` and the lse.
    """

    out: Tensor
    """``[B, *spatial, Hq, Dv]``, dtype of the query"""
    row_max: Tensor
    """``[B, *spatial, Hq]``, fp32 (fp64 for fp64 inputs), natural log units"""
    row_sum: Tensor
    """``[B, *spatial, Hq]``, sum over keys of ``exp(score - row_max)``"""

    @property
    def lse(self) -> Tensor:
        return self.row_max + self.row_sum.log()


class _Call(NamedTuple):
    """Validated, canonical arguments: heads last, KV heads unrepeated, one entry per axis."""

    query: Tensor  # [B, *spatial, Hq, D]
    key: Tensor  # [B, *spatial, Hkv, D]
    value: Tensor  # [B, *spatial, Hkv, Dv]
    additional_keys: Tensor | None  # [B, R, Hkv, D]
    additional_values: Tensor | None  # [B, R, Hkv, Dv]
    sink: Tensor | float | None  # [Hq] or one logit for all heads
    window: Window
    scale: float
    head_shape: torch.Size  # the caller's head axes: (Hq,) or (Hkv, G)

    @property
    def arguments(self) -> _Arguments:
        """What both implementations take, in their order."""
        return self[:8]

    def why_not_fused(self) -> str | None:
        return ops.unsupported(self.query, self.value)

    def restore(self, out: Tensor) -> Tensor:
        """Give a result the caller's head axes back; ``out`` is ``[B, *spatial, Hq, ...]``."""
        return out if len(self.head_shape) == 1 else out.unflatten(self.window.rank + 1, self.head_shape)


@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes,
    *,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes,
    *,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes,
    *,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Grouped-query neighborhood attention over 1, 2 or 3 spatial axes.

    Query head ``h`` reads KV head ``h // (Hq // Hkv)``. KV heads that were expanded with stride 0, either on a group
    axis (``[B, *spatial, Hkv, G, D]``, all three tensors; ``kernel_size`` must then be a tuple unless there are three
    spatial axes) or from a single head (``[B, *spatial, Hq, D]``), are read without a copy.

    Args:
        query: ``[B, *spatial, Hq, D]``, fp16, bf16, fp32 or (eager only) fp64.
        key: ``[B, *spatial, Hkv, D]``, ``Hq % Hkv == 0``.
        value: ``[B, *spatial, Hkv, Dv]``.
        kernel_size: window size in keys, one int or one per axis. Windows shift inwards at borders.
        stride: queries per shared window, ``1 <= stride <= kernel_size``.
        dilation: distance in tokens between neighboring keys of a window; ``kernel_size * dilation <= length``.
        is_causal: mask keys after the query, per axis.
        scale: factor on the scores, default ``D ** -0.5``.
        additional_keys: registers, ``[B or 1, R, Hkv, D]``, visible to every query.
        additional_values: ``[B or 1, R, Hkv, Dv]``; given exactly when ``additional_keys`` is.
        sink: one extra logit per query head with a zero value vector: a float (``0.0`` is zero attention, also called
            softmax1), a tensor ``[Hq]``, or None. Not multiplied by ``scale``.
        return_lse: also return the log-sum-exp over every key the softmax saw: neighborhood, registers and sink.
        impl: "auto" takes the fused kernels where Triton can run on the tensors' device and dtype, else eager;
            "fused" and "eager" never fall back.

    Returns:
        ``out [B, *spatial, Hq, Dv]`` in the query's dtype, or ``(out, lse)`` with ``lse [B, *spatial, Hq]`` in fp32
        (fp64 for fp64 inputs), natural log. A token that is not finite makes the outputs whose windows hold it NaN, and
        no others; in the backward pass NaN spreads further, to gradients of the same image and head.

    Raises:
        ValueError: an argument does not fit; the message names it, the axis and the values.
        RuntimeError: ``impl="fused"`` where the fused kernels cannot run.
    """
    call = _prepare(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values, sink
    )
    if return_lse:
        state = _run(call, impl)
        return call.restore(state.out), call.restore(state.lse)
    if takes_fused(impl, call.query, call.why_not_fused):
        return call.restore(ops.attention(*call.arguments))
    return call.restore(_run(call, "eager").out)


def attention_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes,
    *,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    impl: Impl = "auto",
) -> AttentionState:
    """:func:`neighborhood_attention` that also returns what :func:`merge_attention` needs.

    Takes and checks the same arguments. Give the sink to exactly one of the states to be merged.

    Returns:
        ``(out, row_max, row_sum)``, see :class:`AttentionState`.
    """
    call = _prepare(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values, sink
    )
    return AttentionState(*map(call.restore, _run(call, impl)))


def merge_attention(*states: tuple[Tensor, Tensor, Tensor]) -> AttentionState:
    """Attention over the union of disjoint sets of keys, from the states of the same queries over each set.

    Args:
        states: one or more ``(out [..., Dv], row_max [...], row_sum [...])`` of equal shapes.

    Returns:
        The merged state; ``out`` in the first state's dtype, statistics in theirs. Associative, and differentiable in
        every input. The merge of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

    Raises:
        ValueError: no state, something else than a state, or shapes or devices that differ.
    """
    if not states:
        raise ValueError("merge_attention needs at least one state, got none")
    for i, state in enumerate(states):
        if not isinstance(state, Sequence) or len(state) != 3 or not all(isinstance(t, Tensor) for t in state):
            raise ValueError(f"state {i} must be three tensors (out, row_max, row_sum), got {type(state).__name__}")
    first = states[0][0]
    for i, (out, row_max, row_sum) in enumerate(states):
        for name, tensor in (("out", out), ("row_max", row_max), ("row_sum", row_sum)):
            if tensor.device != first.device:
                raise ValueError(f"{name} of state {i} is on {tensor.device}, but out of state 0 is on {first.device}")
        if out.shape != first.shape or not out.shape[:-1] == row_max.shape == row_sum.shape:
            raise ValueError(
                f"state {i} has out {tuple(out.shape)}, row_max {tuple(row_max.shape)} and "
                f"row_sum {tuple(row_sum.shape)}; expected out {tuple(first.shape)} as in state 0, and the statistics "
                "without its last axis"
            )
    return AttentionState(*eager.merge_states(*states))


def _run(call: _Call, impl: Impl) -> AttentionState:
    run = ops.attention_state if takes_fused(impl, call.query, call.why_not_fused) else eager.attention_state
    return AttentionState(*run(*call.arguments))


def takes_fused(impl: Impl, query: Tensor, why_not: Callable[[], str | None]) -> bool:
    """The one dispatch: whether ``impl`` on tensors like ``query`` means the fused kernels.

    Args:
        why_not: why they cannot run, or None; only asked where they would.

    Raises:
        ValueError: an unknown ``impl``.
        RuntimeError: an explicit "fused" that cannot run, and why.
    """
    if impl not in ("auto", "fused", "eager"):
        raise ValueError(f'impl must be "auto", "fused" or "eager", got {impl!r}')
    if impl == "eager" or (impl == "auto" and query.device.type != "cuda"):
        return False  # Triton's interpreter is for tests: only on request
    reason = why_not()
    if reason is not None and impl == "fused":
        raise RuntimeError(f'impl="fused" cannot run: {reason}; use impl="auto" or "eager"')
    return reason is None


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes,
    stride: Axes,
    dilation: Axes,
    is_causal: bool | Sequence[bool],
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: float | Tensor | None,
) -> _Call:
    """Check every user argument and bring them into the one form that the implementations take.

    What shapes, strides, dtypes, devices and axes decide is checked on the first call that has them.
    """
    tensors = query, key, value, additional_keys, additional_values
    axes = kernel_size, stride, dilation, is_causal
    signature, window = (None, None) if torch.compiler.is_compiling() else _recall(tensors, axes)
    rank = _check_user_form(tensors, axes) if window is None else window.rank
    head_shape = query.shape[rank + 1 : -1]
    tensors = query, key, value, additional_keys, additional_values = _canonical_heads(tensors, head_shape)
    if window is None:
        window = _check_canonical_form(tensors, axes)
        _accept(signature, window)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if not _is_finite_number(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}; multiply a learned scale into the query")
    registers = _expand_registers(additional_keys, additional_values, query.shape[0])
    return _Call(query, key, value, *registers, _check_sink(sink, query), window, float(scale), head_shape)


_accepted: dict[Hashable, Window] = {}
"""by the signatures of calls that passed the checks"""
MAX_ACCEPTED = 1024


def _accept(signature: Hashable, window: Window) -> None:
    if signature is not None:
        if len(_accepted) >= MAX_ACCEPTED:
            _accepted.clear()
        _accepted[signature] = window


def _recall(tensors: Sequence[object], axes: Sequence[object]) -> tuple[Hashable, Window | None]:
    """What the checks look at, and the window if they have passed.

    The former is None where it has something that cannot be hashed, such as a list or a symbolic size.
    """
    layouts: list[Hashable] = []
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            layouts.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
        elif tensor is None:
            layouts.append(None)
        else:
            return None, None
    # Equal is not enough: True == 1, but one is no kernel size and the other does not say what is causal.
    types = [tuple(map(type, axis)) if isinstance(axis, tuple) else type(axis) for axis in axes]
    signature = (*layouts, *axes, *types)
    try:
        return signature, _accepted.get(signature)
    except TypeError:
        return None, None


def _check_user_form(tensors: _Tensors, axes: _AxisOptions) -> int:
    """Check arguments as the user has them up to the head axes; returns the number of spatial axes."""
    query, key, value, additional_keys, additional_values = tensors
    kernel_size, stride, dilation, is_causal = axes
    _check_tensors(query=query, key=key, value=value)
    _check_pair(additional_keys, additional_values)
    rank = _spatial_rank(query, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal)
    _check_qkv(query, key, value, rank)
    head_shape = query.shape[rank + 1 : -1]
    for name, tensor in (("key", key), ("value", value)) if len(head_shape) == 2 else ():
        if tensor.shape[-3] != head_shape[0] or tensor.shape[-2] not in (1, head_shape[1]):
            raise ValueError(
                f"{name} has head axes {tuple(tensor.shape[-3:-1])}; "
                f"expected {tuple(head_shape)} as query [B, *spatial, Hkv, G, D] has with {rank} spatial axes, "
                "or G = 1"
            )
    return rank


def _canonical_heads(tensors: _Tensors, head_shape: torch.Size) -> _Tensors:
    """One axis of heads, KV heads unrepeated."""
    query, key, value, additional_keys, additional_values = tensors
    if len(head_shape) == 1:
        return query, *_collapse_heads(key, value, additional_keys, additional_values)
    return query.flatten(-3, -2), *_collapse_group(key, value, additional_keys, additional_values, head_shape[1])


def _check_canonical_form(tensors: _Tensors, axes: _AxisOptions) -> Window:
    """Check what is left to check once there is one axis of heads."""
    query, key, value, additional_keys, additional_values = tensors
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads % kv_heads or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"query heads must be a multiple of KV heads: query has {heads}, key {kv_heads}, value {value.shape[-2]}"
        )
    window = make_window(query.shape[1:-2], *axes)
    _check_additional(additional_keys, additional_values, query, key, value)
    return window


def _check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is None and name.startswith("additional"):
            raise ValueError(f"additional_keys and additional_values come together, but {name} is None")
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {value!r:.100} of type {type(value).__name__}")


def _check_pair(additional_keys: object, additional_values: object) -> None:
    """Registers have keys and values, or there are none."""
    if additional_keys is not None or additional_values is not None:
        _check_tensors(additional_keys=additional_keys, additional_values=additional_values)


def _spatial_rank(query: Tensor, **axis_arguments: object) -> int:
    """Number of spatial axes: what the tuples say, else ``query [B, *spatial, H, D]``."""
    entries = {name: len(a) for name, a in axis_arguments.items() if isinstance(a, Sequence)}
    if len(set(entries.values())) > 1:
        raise ValueError(f"kernel_size, stride, dilation and is_causal disagree on the number of axes: {entries}")
    rank = next(iter(entries.values()), min(query.ndim - 3, 3))
    if not 1 <= rank <= 3 or query.ndim not in (rank + 3, rank + 4):
        given = "".join(f"; {name} has {count} entries" for name, count in entries.items())
        raise ValueError(
            f"query has {query.ndim} axes {tuple(query.shape)}; expected [B, *spatial, heads, head_dim] with 1 to 3 "
            f"spatial axes{given}"
        )
    return rank


def _check_qkv(query: Tensor, key: Tensor, value: Tensor, rank: int) -> None:
    for name, tensor in (("key", key), ("value", value)):
        if tensor.ndim != query.ndim or tensor.shape[: rank + 1] != query.shape[: rank + 1]:
            sizes = zip(("batch", *AXES[rank]), tensor.shape, query.shape, strict=False)
            differing = [f"on the {axis} axis ({a} and {b})" for axis, a, b in sizes if a != b]
            raise ValueError(
                f"{name} {tuple(tensor.shape)} and query {tuple(query.shape)} differ "
                + ("in rank" if tensor.ndim != query.ndim else ", ".join(differing))
            )
        _check_like(name, tensor, query)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key head_dim {key.shape[-1]} differs from query head_dim {query.shape[-1]}")
    if query.dtype not in DTYPES:
        raise ValueError(f"query dtype {query.dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("query", query), ("value", value)):
        for axis, size in enumerate(tensor.shape):
            if size == 0:
                raise ValueError(f"{name} {tuple(tensor.shape)} is empty on axis {axis}")


def _check_like(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}")
    if tensor.dtype != query.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, but query has {query.dtype}")


def _collapse_heads(
    key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One KV head expanded with stride 0 (MQA) becomes that head, unless registers differ from head to head."""
    registers = additional_keys, additional_values
    if key.shape[-2] != value.shape[-2] or not all(map(_is_one_head, (key, value, *registers))):
        return key, value, *registers
    register_keys, register_values = (None if t is None else _first_head(t) for t in registers)
    return _first_head(key), _first_head(value), register_keys, register_values


def _is_one_head(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.ndim > 1 and (tensor.shape[-2] == 1 or tensor.stride(-2) == 0))


def _first_head(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-2] == 1 else tensor[..., :1, :]


def _collapse_group(
    key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``[..., Hkv, G, D]`` to ``[..., Hkv, D]`` where the group axis is expanded, else to ``[..., Hkv * G, D]``.

    Registers of ``Hkv`` heads are taken either way; those of ``Hkv * G`` make every query head have its own.
    """
    kv_heads = key.shape[-3]

    def has_heads(t: Tensor | None, heads: int) -> bool:
        return t is not None and t.ndim == 4 and t.shape[-2] == heads

    if all(map(_is_one_head, (key, value))) and (group == 1 or not has_heads(additional_keys, kv_heads * group)):
        return key.select(-2, 0), value.select(-2, 0), additional_keys, additional_values
    register_keys, register_values = (
        t.repeat_interleave(group, -2) if t is not None and has_heads(t, kv_heads) else t
        for t in (additional_keys, additional_values)
    )
    key, value = (t.expand(*t.shape[:-2], group, -1).flatten(-3, -2) for t in (key, value))
    return key, value, register_keys, register_values


def _check_additional(
    keys: Tensor | None, values: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if keys is None or values is None:  # both: `_check_pair` came first
        return None, None
    batch, kv_heads = query.shape[0], key.shape[-2]
    for name, tensor, like in (("additional_keys", keys, key), ("additional_values", values, value)):
        _check_like(name, tensor, query)
        expected = (kv_heads, like.shape[-1])
        if tensor.ndim != 4 or tensor.shape[0] not in (1, batch) or tuple(tensor.shape[2:]) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected [{batch} or 1, R, {expected[0]}, {expected[1]}]"
            )
    if keys.shape[1] != values.shape[1]:
        raise ValueError(f"additional_keys has {keys.shape[1]} registers, but additional_values {values.shape[1]}")
    return _expand_registers(keys, values, batch)


def _expand_registers(keys: Tensor | None, values: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """A set for each image, or None if there are none."""
    if keys is None or values is None or keys.shape[1] == 0:
        return None, None
    return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)


def _check_sink(sink: float | Tensor | None, query: Tensor) -> Tensor | float | None:
    heads = query.shape[-2]
    if sink is None or (isinstance(sink, float) and sink == -math.inf):
        return None
    if not isinstance(sink, Tensor):
        if not _is_finite_number(sink):
            raise ValueError(f"sink must be None, a finite number or a tensor [{heads}], got {sink!r}")
        return float(sink)
    if sink.shape != (heads,):
        raise ValueError(f"sink has shape {tuple(sink.shape)}; expected [{heads}], one logit per query head")
    if sink.device != query.device:
        raise ValueError(f"sink is on {sink.device}, but query is on {query.device}")
    if not sink.is_floating_point():
        raise ValueError(f"sink has dtype {sink.dtype}; expected a floating point dtype")
    return sink


def _is_finite_number(value: object) -> TypeGuard[float]:
    """Compared rather than asked ``math.isfinite``, which cannot be traced for a number that a graph takes as input."""
    if isinstance(value, float):  # asked first: an abstract class takes its time
        return -math.inf < value < math.inf
    return isinstance(value, Real) and not isinstance(value, bool) and -math.inf < float(value) < math.inf
