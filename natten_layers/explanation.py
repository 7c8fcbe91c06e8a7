""":func:`explain`: which implementation and which kernels compute a call, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from .arguments import Axes, prepare, with_bias
from .kernels.ops import attention as attention_ops
from .kernels.ops.transforms import is_forward_mode, is_tracked
from .operations import Impl, why_eager
from .varlen import Shapes, prepare_samples

__all__ = ["Explanation", "Kernel", "explain"]


@dataclass(frozen=True)
class Kernel:
    """The kernel that computes one direction of a call: a part of an :class:`Explanation`."""

    direction: str
    """forward, jvp (tangents of forward mode), backward_query (dQ), backward_key (dK and dV), backward_registers (of
    additional keys) or backward_bias (of rpb)."""
    name: str
    settings: tuple[tuple[str, Any], ...]
    """Tiles and options by name. Sizes are ``t, h, w`` in tokens; ``pack`` is the number of heads a program."""
    passed_over: tuple[tuple[str, str], ...]
    """Kernels that were considered before this one, each with the reason why it does not compute the call."""

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings)
        lines = [f"{self.direction}: {self.name}", f"  {settings}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.passed_over])


@dataclass(frozen=True)
class Explanation:
    """The implementation and the kernels that compute a call. Its text is for people to read, and may change."""

    impl: Literal["fused", "eager"]
    why_eager: str | None
    """Why the fused kernels do not compute the call; None if they do."""
    kernels: tuple[Kernel, ...] = ()

    def __str__(self) -> str:
        if self.why_eager is not None:
            return f"eager (PyTorch), not fused: {self.why_eager}"
        return "\n".join(["fused", *map(str, self.kernels)])


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes,
    *,
    shapes: Shapes | None = None,
    cu_seqlens: Tensor | None = None,
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
    needs_grad: bool | None = None,
    forward_mode: bool | None = None,
) -> Explanation:
    """Which kernels compute :func:`neighborhood_attention` of these arguments, with which tiles, and why not others.

    Nothing is computed or compiled. ``print(explain(...))`` shows quickly why a call is slower than expected. With
    ``shapes`` or ``cu_seqlens``, or with nested tensors, it is about :func:`neighborhood_attention_varlen`.

    For a layer, give tensors as it makes them, views of one projection, and its options. ``layer`` here is a
    :class:`NeighborhoodGQA`, ``x`` are its tokens::

        counts = layer.num_heads, layer.num_kv_heads, layer.num_kv_heads
        query, key, value = layer.qkv(x).unflatten(-1, (-1, layer.head_dim)).split(counts, -2)
        print(explain(query, key, value, layer.kernel_size, is_causal=layer.is_causal, sink=layer.sink))

    It is about attention to heads that are normalised and rotated already. A layer that does so has one more launch
    before it, for which there is one kernel. Without gradients, and on compute capability 9.0 only, the rolling kernel
    of small windows does it itself, with tiles of its own, where heads have 64 or 128 channels, of which RoPE rotates
    half, all or none, element ``i`` with one of the other half, and all axes alike.

    :func:`cached_attention` has one kernel for every call, so there is nothing to ask for. With ``impl="fused"`` it
    says itself why that cannot run.

    Args:
        shapes, cu_seqlens: the samples of a packed batch, as :func:`neighborhood_attention_varlen` takes them.
        query, key, value, kernel_size, stride, dilation, is_causal, is_periodic, scale, additional_keys,
            additional_values, sink, rpb, key_mask, return_lse, impl: the arguments of :func:`neighborhood_attention`,
            which are checked in the same way. Of tensors only shape, strides, dtype, device and alignment of the
            address matter.
        needs_grad: whether gradients are needed; None if they are whenever an input requires one. The gradient of the
            output is assumed to be contiguous.
        forward_mode: whether derivatives in forward mode are needed; None if they are inside of ``torch.func.jvp`` or
            ``torch.autograd.forward_ad.dual_level``. All inputs are assumed to have tangents, which are contiguous.

    Returns:
        An :class:`Explanation`, to be printed or read field by field.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: ``impl="fused"``, but the fused kernels cannot run.
    """
    if shapes is None and cu_seqlens is None and not (isinstance(query, Tensor) and query.is_nested):
        call = prepare(
            query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values,
            sink, is_periodic, key_mask,
        )  # fmt: skip
    else:
        if rpb is not None:
            raise ValueError("packed samples take no rpb")
        call, _ = prepare_samples(
            query, key, value, shapes, cu_seqlens, kernel_size, stride, dilation, is_causal, scale, additional_keys,
            additional_values, sink, is_periodic, key_mask,
        )  # fmt: skip
    call = with_bias(call, rpb)
    forward_mode = is_forward_mode() if forward_mode is None else forward_mode
    reason = why_eager(impl, call.inputs.query, partial(call.why_not_fused, forward_mode))
    if reason is not None:
        return Explanation("eager", reason)
    with_gradients = is_tracked(call.inputs) if needs_grad is None else needs_grad
    choices = attention_ops.choices(
        call.inputs, call.options, with_stats=return_lse, with_gradients=with_gradients, with_tangents=forward_mode
    )
    kernels = (
        Kernel(direction, x.variant.name, tuple(x.settings.items()), tuple(map(tuple, x.passed_over)))
        for direction, x in choices.items()
    )
    return Explanation("fused", None, tuple(kernels))
