"""Which derivatives and transforms may ask something of a call: questions to torch, for all layers of the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, get_unwrapped, is_batchedtensor
from torch.autograd import forward_ad

__all__ = [
    "is_differentiated",
    "is_forward_mode",
    "is_in_grad",
    "is_mapped",
    "is_only_forward_mode",
    "is_tracked",
    "is_transformed",
    "is_vectorized",
    "needs_gradient",
    "tangent_of",
]

_VMAP_OF_AUTOGRAD = torch._C._dispatch_key_parse("VmapMode")  # that of torch.func has other keys


def is_tracked(args: tuple[Any, ...]) -> bool:
    """Whether somebody may ask for a derivative in reverse mode, or under a transform of ``torch.func``."""
    # Inside such a transform a tensor does not tell whether an outer transform differentiates it.
    return is_transformed() or needs_gradient(args)


def is_differentiated(args: tuple[Any, ...]) -> bool:
    """Whether somebody may ask for a derivative in reverse or forward mode."""
    return is_tracked(args) or is_forward_mode()


def is_forward_mode() -> bool:
    """Whether a level of forward mode is open: of ``torch.autograd.forward_ad``, or of ``torch.func.jvp``."""
    return forward_ad._current_level >= 0


def tangent_of(x: Tensor) -> Tensor | None:
    """The tangent of a tensor in forward mode; None in a compiled graph, which cannot ask."""
    if torch.compiler.is_compiling() or not is_forward_mode():
        return None
    while is_batchedtensor(x):  # vmap has no rule for the question
        x = get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is active; False in a compiled graph, which cannot ask."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_in_grad() -> bool:
    """Whether ``torch.func.grad`` or one made of it may differentiate what is computed, at any level."""
    stack = get_interpreter_stack() if is_transformed() else None
    return stack is not None and any(level.key() == TransformType.Grad for level in stack)


def is_mapped(x: Tensor) -> bool:
    """Whether ``torch.func.vmap`` maps a tensor, and is the innermost transform that is active."""
    stack = get_interpreter_stack() if is_transformed() else None
    return bool(stack) and stack[-1].key() == TransformType.Vmap and is_batchedtensor(x)


def is_only_forward_mode() -> bool:
    """Whether ``torch.func.jvp`` or dual numbers are all that is active, and autograd records nothing."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not is_forward_mode() or is_vectorized():
        return False
    stack = get_interpreter_stack() or []
    return not stack or (len(stack) == 1 and stack[0].key() == TransformType.Jvp)


def is_vectorized() -> bool:
    """Whether the vmap of ``torch.autograd`` is active; False in a compiled graph, which cannot ask.

    It is older than that of ``torch.func``, and used by ``grad(is_grads_batched=True)`` and by ``jacobian`` and
    ``hessian`` with ``vectorize=True``. It computes operators sample by sample, but it does not know most views.
    """
    compiling = torch.compiler.is_compiling()
    return not compiling and torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_OF_AUTOGRAD)


def needs_gradient(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for x in args:  # any() over a generator would take three times as long, and every call asks twice
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False
