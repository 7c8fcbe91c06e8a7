"""The public operations, and the only place that chooses between PyTorch ("eager") and the fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import eager
from .arguments import Axes, Call, prepare, with_bias
from .checks import check_dense, check_flags
from .kernels.host.card import Card
from .kernels.ops import attention as attention_ops
from .kernels.ops.define import call_uncompiled, check_tangent
from .kernels.ops.transforms import is_forward_mode, tangent_of
from .wording import shorten

__all__ = ["AttentionState", "attention_state", "default_impl", "merge_attention", "neighborhood_attention"]

Impl = Literal["auto", "fused", "eager"]


class _Default:
    """What ``impl="auto"`` stands for in a context."""

    def __init__(self, impl: Impl) -> None:
        self.impl: Impl = impl


_defaults: list[_Default] = []
"""Of all contexts, the latest last. They are of all threads, as a backward pass computes checkpoints again in others;
so they need not end in the order in which they began."""


@contextmanager
def default_impl(impl: Impl) -> Iterator[None]:
    """A context in which calls with ``impl="auto"`` take ``impl`` instead, those inside of layers and models too.

    Layers have no ``impl`` of their own. In ``default_impl("eager")`` they are computed in PyTorch, which has second
    derivatives on a GPU as well; in ``default_impl("fused")`` they raise where the kernels cannot run. A backward pass
    is of the kind that its forward pass was, wherever it runs; but one that computes the forward pass again, for
    activation checkpointing, belongs into the context. The context is of all threads of the process.

    Args:
        impl: "fused", "eager" or, inside of another such context, "auto".

    Raises:
        ValueError: ``impl`` is unknown.
    """
    _check_impl(impl)
    default = _Default(impl)
    _defaults.append(default)
    try:
        yield
    finally:
        _defaults.remove(default)


class AttentionState(NamedTuple):
    """Softmax attention over a set of keys, in a form that can be merged with attention over other sets.

    ``lse = row_max + row_sum.log()``. ``row_max`` is only a reference point and may be any value near the largest
    score. Gradients are exact for every function of ``out`` and ``lse``.
    """

    out: Tensor
    """``[B, *spatial, Hq, Dv]``, dtype of the query"""
    row_max: Tensor
    """``[B, *spatial, Hq]``, fp32 (fp64 for fp64 inputs), natural log units"""
    row_sum: Tensor
    """``[B, *spatial, Hq]``, sum over keys of ``exp(score - row_max)``"""

    @property
    def lse(self) -> Tensor:
        lse = self.row_max + self.row_sum.log()
        # The lse of a query that sees nothing is -inf, a constant, but the logarithm of zero has no tangent.
        return torch.where(self.row_sum == 0, self.row_max, lse) if is_forward_mode() else lse


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
    is_periodic: bool | Sequence[bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    rpb: Tensor | None = None,
    key_mask: Tensor | None = None,
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
    is_periodic: bool | Sequence[bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    rpb: Tensor | None = None,
    key_mask: Tensor | None = None,
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
    is_periodic: bool | Sequence[bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    rpb: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Grouped-query neighborhood attention over 1, 2 or 3 spatial axes.

    Query head ``h`` reads KV head ``h // (Hq // Hkv)``. How many spatial axes there are is told by the number of axes
    alone if ``kernel_size`` is an int: an image ``[B, H, W, C]`` without an axis of heads is then a sequence of ``H``
    tokens with ``W`` heads. With one entry per axis in ``kernel_size``, such as ``(7, 7)``, it is an error.

    KV heads may also be expanded with stride 0: on a group axis (``[B, *spatial, Hkv, G, D]`` for all three tensors;
    ``kernel_size`` must then be a tuple unless there are three spatial axes), or from a single head
    (``[B, *spatial, Hq, D]``). If no gradient is needed for them, they are read without a copy. If one is, every
    expanded head gets its own gradient at the cost of multi-head attention, and a group axis that was expanded from
    several KV heads is copied. To train at the cost of grouped-query attention, do not expand the heads: give ``Hkv``
    heads, or a group axis of length 1.

    Under autocast it runs in lower precision, as PyTorch's attention does: ``query``, ``key``, ``value`` and registers
    are cast to autocast's dtype, which ``out`` has too, unless they are fp64. Scores, sums and ``lse`` stay fp32, and
    ``sink`` and ``rpb`` keep their dtypes. Casting copies expanded KV heads if a gradient is needed for them.

    Args:
        query: ``[B, *spatial, Hq, D]``, fp16, bf16, fp32 or (eager only) fp64. It may lie on another grid than keys,
            finer or coarser: its axes then have other lengths but the same extents, and a query sees the
            ``kernel_size`` keys around the one that its centre falls on. Stride and dilation must be 1, and no axis
            causal.
        key: ``[B, *key_spatial, Hkv, D]``, ``Hq % Hkv == 0``.
        value: ``[B, *key_spatial, Hkv, Dv]``.
        kernel_size: window size in keys, one int or one per axis. Windows shift inwards at borders.
        stride: queries per shared window, ``1 <= stride <= kernel_size``.
        dilation: distance in tokens between neighboring keys of a window; ``kernel_size * dilation <= length``.
        is_causal: mask keys after the query, per axis.
        is_periodic: per axis, whether it is a ring, such as longitude: windows wrap around its ends instead of shifting
            inwards. Such an axis is not causal, and ``dilation`` divides its length.
        scale: factor on the scores, a number or a tensor of one that needs no gradient, default ``D ** -0.5``.
        additional_keys: registers, ``[B or 1, R, Hkv, D]``, visible to every query.
        additional_values: ``[B or 1, R, Hkv, Dv]``; given exactly when ``additional_keys`` is.
        sink: one extra logit per query head with a zero value vector: a float (``0.0`` is zero attention, also called
            softmax1), a tensor ``[Hq]``, or None. It is not multiplied by ``scale``.
        rpb: a relative position bias ``[Hq, 2 * kernel_size - 1 per axis]`` of any floating point dtype, as in old
            versions of NATTEN: entry ``(j - i) / dilation + kernel_size - 1`` on every axis is added to the scaled
            score of query ``i`` and key ``j``, ``j - i`` along the ring on a periodic axis. An entry of -inf, or below
            -2.3e38 as float32's lowest number, hides its keys as ``key_mask`` does. Registers and the sink have none.
            Its gradient is deterministic. In forward mode, only the eager path takes it.
        key_mask: ``[B or 1, *key_spatial]``, bool, True where a key may be seen. Windows do not move because of it. A
            key that is masked has no weight, its gradient and that of its value are zero, and its NaN or inf reaches
            nothing. Queries at masked places are computed like all others. A query that sees no key, register or sink
            gets 0, and an lse of -inf.
        return_lse: also return the log-sum-exp of all scores in the softmax: neighborhood, registers and sink.
        impl: "auto" uses the fused kernels if they can run on the tensors' device and dtype, else PyTorch ("eager");
            "fused" and "eager" never fall back.

    Returns:
        ``out [B, *spatial, Hq, Dv]`` in the query's dtype, or ``(out, lse)`` with ``lse [B, *spatial, Hq]`` in fp32
        (fp64 for fp64 inputs), natural log. Both are contiguous, and empty for an empty batch. A nonfinite token makes
        the outputs whose windows hold it NaN or inf, and no others. In the backward pass NaN spreads further, but only
        to gradients of the same image and head.

    Raises:
        ValueError: an argument does not fit; the message names it, the axis and the values.
        RuntimeError: ``impl="fused"``, but the fused kernels cannot run.
    """
    check_flags(return_lse=return_lse)
    call = prepare(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values, sink,
        is_periodic, key_mask,
    )  # fmt: skip
    return attend_with_lse(call, impl, rpb) if return_lse else attend(call, impl, rpb)


def attend(call: Call, impl: Impl, rpb: Tensor | None = None) -> Tensor:
    """``out`` of the attention that the prepared arguments describe; ``rpb`` is in the user's form."""
    call = with_bias(call, rpb)
    if takes_fused(impl, call.inputs.query, call.why_not_fused):
        return call.restore(attention_ops.attention(call.inputs, call.options))
    if rpb is not None or call.inputs.shapes is not None:
        return call.restore(_run(call, "eager").out)
    return call.restore(eager.attention(*call.for_eager, key_mask=call.inputs.key_mask))


def attend_with_lse(call: Call, impl: Impl, rpb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`attend`, and the log-sum-exp of all scores."""
    state = _run(with_bias(call, rpb), impl)
    return call.restore(state.out), call.restore(state.lse)


def attention_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes,
    *,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    is_periodic: bool | Sequence[bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    rpb: Tensor | None = None,
    key_mask: Tensor | None = None,
    impl: Impl = "auto",
) -> AttentionState:
    """:func:`neighborhood_attention` that returns its softmax statistics too, as :func:`merge_attention` needs them.

    It takes and checks the same arguments. Give the sink to exactly one of the states to be merged.

    Returns:
        ``(out, row_max, row_sum)``, contiguous; see :class:`AttentionState`.
    """
    call = prepare(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values, sink,
        is_periodic, key_mask,
    )  # fmt: skip
    return AttentionState(*map(call.restore, _run(with_bias(call, rpb), impl)))


def merge_attention(*states: tuple[Tensor, Tensor, Tensor]) -> AttentionState:
    """Attention over the union of disjoint sets of keys, from the states of the same queries over each of the sets.

    Args:
        states: one or more ``(out [..., Dv], row_max [...], row_sum [...])`` of equal shapes.

    Returns:
        The merged state; ``out`` in the first state's dtype, statistics in theirs. Merging is associative, and
        differentiable in every input. A row without keys in any state (``row_max`` -inf) stays one, with ``out`` 0.
        The formula is that of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

    Raises:
        ValueError: there is no state, an argument is no state, shapes or devices differ, or a tangent's dtype does.
    """
    if not states:
        raise ValueError("merge_attention needs at least one state, got none")
    for i, state in enumerate(states):
        if not isinstance(state, Sequence) or len(state) != 3 or not all(isinstance(t, Tensor) for t in state):
            raise ValueError(f"state {i} must be three tensors (out, row_max, row_sum), got {type(state).__name__}")
    first = states[0][0]
    for i, (out, row_max, row_sum) in enumerate(states):
        for name, tensor in (("out", out), ("row_max", row_max), ("row_sum", row_sum)):
            check_dense(f"{name} of state {i}", tensor)
            if tensor.device != first.device:
                raise ValueError(f"{name} of state {i} is on {tensor.device}, but out of state 0 is on {first.device}")
            check_tangent(f"{name} of state {i}", tensor, tangent_of(tensor))
        if out.shape != first.shape or not out.shape[:-1] == row_max.shape == row_sum.shape:
            raise ValueError(
                f"state {i} has out {tuple(out.shape)}, row_max {tuple(row_max.shape)} and "
                f"row_sum {tuple(row_sum.shape)}; expected out {tuple(first.shape)} as in state 0, and the statistics "
                "without its last axis"
            )
    return AttentionState(*eager.merge_states(*states))


def _run(call: Call, impl: Impl) -> AttentionState:
    key_mask, rpb = call.inputs.key_mask, call.inputs.rpb
    if takes_fused(impl, call.inputs.query, call.why_not_fused):
        return AttentionState(*attention_ops.attention_state(call.inputs, call.options))
    if call.inputs.shapes is not None:
        if torch.compiler.is_exporting():
            raise ValueError(
                "shapes or cu_seqlens: PyTorch computes packed samples one shape after the other, which torch.export "
                "has no graph for; export it for a CUDA device, where kernels compute them, or without shapes and "
                "cu_seqlens"
            )
        return AttentionState(*call_uncompiled("packed", _run_packed_eagerly, call))
    return AttentionState(*eager.attention_state(*call.for_eager, rpb=rpb, key_mask=key_mask))


def _run_packed_eagerly(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    packing = call.packing
    assert packing is not None
    return eager.packed_attention_state(*call.for_eager, packing=packing, key_mask=call.inputs.key_mask)


def takes_fused(impl: Impl, query: Tensor, why_not: Callable[[], str | None]) -> bool:
    """Whether ``impl`` selects the fused kernels for tensors like ``query``; arguments as in :func:`why_eager`."""
    return why_eager(impl, query, why_not) is None


def why_eager(impl: Impl, query: Tensor, why_not: Callable[[], str | None], card: Card | None = None) -> str | None:
    """Why ``impl`` selects PyTorch for tensors like ``query``, or None if it selects the fused kernels.

    An empty batch is always left to PyTorch, which gives the same results and gradients, so that kernels need not
    handle it.

    Args:
        why_not: returns why the kernels cannot run on tensors like ``query``, or None. It is called only if needed.
        card: the GPU to answer for, if that is not the one with the tensors.

    Raises:
        ValueError: ``impl`` is unknown.
        RuntimeError: ``impl`` is "fused", but the kernels cannot run; the message says why.
    """
    _check_impl(impl)
    asks = f'impl="{impl}"'
    if impl == "auto" and _defaults:
        impl = _defaults[-1].impl
        asks = f'default_impl("{impl}")'
    if impl == "eager":
        return f"{asks} asks for it"
    # Triton's interpreter is for tests, so it runs on request only.
    if impl == "auto" and card is None and query.device.type != "cuda":
        return f"the tensors are on {query.device.type}, the kernels run on CUDA devices"
    reason = why_not()
    if reason is not None and impl == "fused":
        raise RuntimeError(f'{asks} cannot run: {reason}; use "auto" or "eager"')
    # An axis of tokens is empty only in a packed batch without tokens.
    empty = 0 in query.shape[:2]
    return "the batch is empty: there is nothing to launch" if reason is None and empty else reason


def _check_impl(impl: object) -> None:
    if impl not in ("auto", "fused", "eager"):
        raise ValueError(f'impl must be "auto", "fused" or "eager", got {shorten(impl)}')
