""":func:`explain`: which implementation and which kernels compute a call, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor, nn

from .arguments import Axes, Call, prepare, with_bias
from .checks import check_flags
from .kernels.host.card import card_of
from .kernels.host.qk_prep import QKPrepKind
from .kernels.ops import attention as attention_ops
from .kernels.ops.transforms import is_forward_mode, is_tracked
from .operations import Impl, why_eager
from .varlen import Shapes, prepare_samples

__all__ = ["Explanation", "Kernel", "explain", "explain_call"]

P = ParamSpec("P")


@dataclass(frozen=True)
class Kernel:
    """The kernel that computes one direction of a call: a part of an :class:`Explanation`."""

    direction: str
    """forward, jvp (tangents of forward mode), forward + jvp (both in one launch), backward_query (dQ), backward_key
    (dK and dV), backward_registers (of additional keys) or backward_bias (of rpb); of a layer also qk_prep + forward,
    which first normalises and rotates queries and keys."""
    name: str
    settings: tuple[tuple[str, Any], ...]
    """Tiles and options by name. Sizes are ``t, h, w`` in tokens; ``pack`` is the number of heads a program. Empty for
    queries and keys that are prepared in a launch of its own, before the forward kernel that comes next."""
    passed_over: tuple[tuple[str, str], ...]
    """Kernels that were considered before this one, each with the reason why it does not compute the call."""

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings)
        lines = [f"{self.direction}: {self.name}", *([f"  {settings}"] if settings else [])]
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


def _without_modules(explain: Callable[P, Explanation]) -> Callable[P, Explanation]:
    """The function, with an error of its own for a layer in the place of tensors."""

    @wraps(explain)
    def run(*args: P.args, **kwargs: P.kwargs) -> Explanation:
        for given in (*args, *kwargs.values()):
            if isinstance(given, nn.Module):
                raise TypeError(
                    f"explain takes the tensors query, key and value, got the module {type(given).__name__}; a "
                    "NeighborhoodGQA explains its own calls: layer.explain(x)"
                )
        return explain(*args, **kwargs)

    return run


@_without_modules
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
    device: str | None = None,
) -> Explanation:
    """Which kernels compute :func:`neighborhood_attention` of these arguments, with which tiles, and why not others.

    Nothing is computed or compiled. ``print(explain(...))`` shows quickly why a call is slower than expected. With
    ``shapes`` or ``cu_seqlens``, or with nested tensors, it is about :func:`neighborhood_attention_varlen`.

    It is about attention to heads that are normalised and rotated already. For a layer, which makes views of one
    projection, and may normalise and rotate them, there is :meth:`NeighborhoodGQA.explain`.

    With ``device``, the answer is that for another GPU, which this machine need not have. Tensors may then be on any
    device, such as "meta", where they take no memory::

        query = torch.empty(8, 128, 128, 8, 64, dtype=torch.bfloat16, device="meta")
        print(explain(query, query, query, 7, device="H200"))

    :func:`cached_attention` has one kernel for every call, so there is nothing to ask for. With ``impl="fused"`` it
    says itself why that cannot run.

    Args:
        shapes, cu_seqlens: the samples of a packed batch, as :func:`neighborhood_attention_varlen` takes them.
        query, key, value, kernel_size, stride, dilation, is_causal, is_periodic, scale, additional_keys,
            additional_values, sink, rpb, key_mask, return_lse, impl: the arguments of :func:`neighborhood_attention`,
            which are checked in the same way. Of tensors only shape, strides, dtype, device and alignment of the
            address matter.
        needs_grad: whether gradients are needed; None if they are whenever an input requires one. The gradient of the
            output is assumed to be contiguous. In forward mode, one launch for output and tangents is for calls under
            ``torch.no_grad()``, which False stands for as well.
        forward_mode: whether derivatives in forward mode are needed; None if they are inside of ``torch.func.jvp`` or
            ``torch.autograd.forward_ad.dual_level``. All inputs are assumed to have tangents, which are contiguous.
        device: another GPU, with the versions of PyTorch and Triton that are installed here: "A100", "A100 40GB",
            "A100 PCIe", "A10", "RTX 3090", "L4", "L40S", "RTX 4090", "H20", "H100", "H100 NVL", "H100 PCIe", "H200",
            "H200 NVL", "GH200", "B200" or "RTX 5090", in upper or lower case, or as PyTorch names it. None for the
            device of the tensors. Triton must be installed.

    Returns:
        An :class:`Explanation`, to be printed or read field by field.

    Raises:
        TypeError: a layer was given.
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
            raise ValueError("packed samples take no rpb; leave it out, or call once for each sample")
        call, _ = prepare_samples(
            query, key, value, shapes, cu_seqlens, kernel_size, stride, dilation, is_causal, scale, additional_keys,
            additional_values, sink, is_periodic, key_mask,
        )  # fmt: skip
    return explain_call(
        with_bias(call, rpb), return_lse=return_lse, impl=impl, needs_grad=needs_grad, forward_mode=forward_mode,
        device=device,
    )  # fmt: skip


def explain_call(
    call: Call,
    *,
    return_lse: bool = False,
    impl: Impl = "auto",
    needs_grad: bool | None,
    forward_mode: bool | None,
    device: str | None,
    prep: QKPrepKind | None = None,
) -> Explanation:
    """:func:`explain` for prepared arguments, whose queries and keys are normalised and rotated as ``prep`` says."""
    optional = {"needs_grad": needs_grad, "forward_mode": forward_mode}
    check_flags(return_lse=return_lse, **{name: flag for name, flag in optional.items() if flag is not None})
    card = card_of(device)
    forward_mode = is_forward_mode() if forward_mode is None else forward_mode
    reason = why_eager(impl, call.inputs.query, partial(call.why_not_fused, forward_mode, card), card)
    if reason is not None:
        return Explanation("eager", reason)
    choices = attention_ops.choices(
        call.inputs,
        call.options,
        with_stats=return_lse,
        with_gradients=is_tracked(call.inputs) if needs_grad is None else needs_grad,
        with_tangents=forward_mode,
        in_one_launch=not (torch.is_grad_enabled() if needs_grad is None else needs_grad),
        prep=prep,
        card=card,
    )
    kernels = (
        Kernel(direction, x.variant.name, tuple(x.settings.items()), tuple(map(tuple, x.passed_over)))
        for direction, x in choices.items()
    )
    return Explanation("fused", None, tuple(kernels))
