"""The public operations, and the one choice between eager and fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

from torch import Tensor

from . import eager
from .arguments import Axes, Call, check_bias, check_dense, prepare
from .kernels.ops import attention as attention_ops

__all__ = ["AttentionState", "attention_state", "merge_attention", "neighborhood_attention"]

Impl = Literal["auto", "fused", "eager"]

NO_BIAS = "the kernels have no rpb, the bias on relative positions"
"""Why they do not compute a call that has one"""


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
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    rpb: Tensor | None = None,
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
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    rpb: Tensor | None = None,
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
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Grouped-query neighborhood attention over 1, 2 or 3 spatial axes.

    Query head ``h`` reads KV head ``h // (Hq // Hkv)``. KV heads that were expanded with stride 0, either on a group
    axis (``[B, *spatial, Hkv, G, D]``, all three tensors; ``kernel_size`` must then be a tuple unless there are three
    spatial axes) or from a single head (``[B, *spatial, Hq, D]``), are read without a copy where no gradient
    is asked for them. Where one may be, every head of the expanded tensor gets its own, at the price of multi-head
    attention, and a group axis that was expanded from several KV heads is copied. To train at the price of grouped
    queries, leave the heads unexpanded: ``Hkv`` of them, or a group axis of length 1.

    Args:
        query: ``[B, *spatial, Hq, D]``, fp16, bf16, fp32 or (eager only) fp64.
        key: ``[B, *spatial, Hkv, D]``, ``Hq % Hkv == 0``.
        value: ``[B, *spatial, Hkv, Dv]``.
        kernel_size: window size in keys, one int or one per axis. Windows shift inwards at borders.
        stride: queries per shared window, ``1 <= stride <= kernel_size``.
        dilation: distance in tokens between neighboring keys of a window; ``kernel_size * dilation <= length``.
        is_causal: mask keys after the query, per axis.
        scale: factor on the scores, a number or a tensor of one that needs no gradient, default ``D ** -0.5``.
        additional_keys: registers, ``[B or 1, R, Hkv, D]``, visible to every query.
        additional_values: ``[B or 1, R, Hkv, Dv]``; given exactly when ``additional_keys`` is.
        sink: one extra logit per query head with a zero value vector: a float (``0.0`` is zero attention, also called
            softmax1), a tensor ``[Hq]``, or None. Not multiplied by ``scale``.
        rpb: a bias on relative positions, ``[Hq, 2 * kernel_size - 1 per axis]`` of any floating point dtype, as old
            NATTEN has it: entry ``(j - i) / dilation + kernel_size - 1`` on every axis is added to the scaled score of
            query ``i`` and key ``j``. Registers and the sink have none. Its gradient has the same bits in every run.
            Computed in PyTorch only, on GPUs too.
        return_lse: also return the log-sum-exp over every key the softmax saw: neighborhood, registers and sink.
        impl: "auto" takes the fused kernels where Triton can run on the tensors' device and dtype, else eager;
            "fused" and "eager" never fall back.

    Returns:
        ``out [B, *spatial, Hq, Dv]`` in the query's dtype, or ``(out, lse)`` with ``lse [B, *spatial, Hq]`` in fp32
        (fp64 for fp64 inputs), natural log. Both are contiguous on every path, and empty for an empty batch. A token
        that is not finite makes outputs whose windows hold it NaN or inf, and no others; in the backward pass NaN
        spreads further, to gradients of the same image and head.

    Raises:
        ValueError: an argument does not fit; the message names it, the axis and the values.
        RuntimeError: ``impl="fused"`` where the fused kernels cannot run.
    """
    call = prepare(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values, sink
    )
    if return_lse:
        state = _run(call, impl, rpb)
        return call.restore(state.out), call.restore(state.lse)
    return attend(call, impl, rpb)


def attend(call: Call, impl: Impl, rpb: Tensor | None = None) -> Tensor:
    """``out`` of prepared arguments, ``rpb`` as the user gave it."""
    if rpb is not None:
        return call.restore(_run(call, impl, rpb).out)
    if takes_fused(impl, call.inputs.query, call.why_not_fused):
        return call.restore(attention_ops.attention(call.inputs, call.options))
    return call.restore(eager.attention(*call.for_eager))


def attention_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes,
    *,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    rpb: Tensor | None = None,
    impl: Impl = "auto",
) -> AttentionState:
    """:func:`neighborhood_attention` that also returns what :func:`merge_attention` needs.

    Takes and checks the same arguments. Give the sink to exactly one of the states to be merged.

    Returns:
        ``(out, row_max, row_sum)``, contiguous, see :class:`AttentionState`.
    """
    call = prepare(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values, sink
    )
    return AttentionState(*map(call.restore, _run(call, impl, rpb)))


def merge_attention(*states: tuple[Tensor, Tensor, Tensor]) -> AttentionState:
    """Attention over the union of disjoint sets of keys, from the states of the same queries over each set.

    Args:
        states: one or more ``(out [..., Dv], row_max [...], row_sum [...])`` of equal shapes.

    Returns:
        The merged state; ``out`` in the first state's dtype, statistics in theirs. Associative, and differentiable in
        every input. Rows that no state has a key for (``row_max`` -inf) stay so, with ``out`` 0. The merge of Milakov
        and Gimelshein, "Online normalizer calculation for softmax" (2018).

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
            check_dense(f"{name} of state {i}", tensor)
            if tensor.device != first.device:
                raise ValueError(f"{name} of state {i} is on {tensor.device}, but out of state 0 is on {first.device}")
        if out.shape != first.shape or not out.shape[:-1] == row_max.shape == row_sum.shape:
            raise ValueError(
                f"state {i} has out {tuple(out.shape)}, row_max {tuple(row_max.shape)} and "
                f"row_sum {tuple(row_sum.shape)}; expected out {tuple(first.shape)} as in state 0, and the statistics "
                "without its last axis"
            )
    return AttentionState(*eager.merge_states(*states))


def _run(call: Call, impl: Impl, rpb: Tensor | None) -> AttentionState:
    query = call.inputs.query
    if rpb is not None:
        check_bias(rpb, call)
        takes_fused(impl, query, lambda: NO_BIAS)  # raises if they are insisted on
        return AttentionState(*eager.attention_state(*call.for_eager, rpb=rpb))
    if takes_fused(impl, query, call.why_not_fused):
        return AttentionState(*attention_ops.attention_state(call.inputs, call.options))
    return AttentionState(*eager.attention_state(*call.for_eager))


def takes_fused(impl: Impl, query: Tensor, why_not: Callable[[], str | None]) -> bool:
    """Whether ``impl`` on tensors like ``query`` means the fused kernels; arguments as those of :func:`why_eager`."""
    return why_eager(impl, query, why_not) is None


def why_eager(impl: Impl, query: Tensor, why_not: Callable[[], str | None]) -> str | None:
    """The one choice between PyTorch and the fused kernels: why ``impl`` means the former, or None.

    Never for an empty batch: in PyTorch its results and gradients are the same, and kernels need not know of it.

    Args:
        why_not: why the kernels cannot run on tensors like ``query``, or None; only asked where they would.

    Raises:
        ValueError: an unknown ``impl``.
        RuntimeError: an explicit "fused" that cannot run, and why.
    """
    if impl not in ("auto", "fused", "eager"):
        raise ValueError(f'impl must be "auto", "fused" or "eager", got {impl!r}')
    if impl == "eager":
        return 'impl="eager" asks for it'
    if impl == "auto" and query.device.type != "cuda":  # Triton's interpreter is for tests: only on request
        return f"the tensors are on {query.device.type}, the kernels run on CUDA devices"
    reason = why_not()
    if reason is not None and impl == "fused":
        raise RuntimeError(f'impl="fused" cannot run: {reason}; use impl="auto" or "eager"')
    return "the batch is empty: there is nothing to launch" if reason is None and query.shape[0] == 0 else reason
