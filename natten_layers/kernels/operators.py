"""How the operators over the Triton kernels are registered and called. Torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "NOT_FUSED",
    "NO_FORWARD_MODE",
    "WAY_OUT",
    "call",
    "call_in_backward",
    "is_tracked",
    "last_contiguous",
    "library",
    "register",
]

NOT_FUSED = "the fused kernels do not have"
WAY_OUT = '; use impl="eager"'
NO_FORWARD_MODE = f"{NOT_FUSED} forward-mode derivatives{WAY_OUT}"

library = torch.library.Library("natten_layers", "DEF")
_kernels: dict[str, Callable[..., Any]] = {}
_PLAIN = (Tensor, nn.Parameter)


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the operator ``natten_layers::name`` of a schema ``name(...) -> ...``, without a derivative.

    The operators are opaque to the compiler; derivatives are ``autograd.Function`` outside of them, so that eager and
    compiled code take the same backward.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, kernel, "CUDA")
    library.impl(name, kernel, "CPU")  # Triton's interpreter
    library.impl(name, _below_autograd(name), "Autograd")
    torch.library.register_fake(f"natten_layers::{name}", fake, lib=library)
    _kernels[name] = kernel


def call(name: str, *args: Any) -> Any:
    """Run an operator, without the dispatcher where that adds nothing: it costs the host as much as the launch."""
    if _needs_dispatcher(args):
        return getattr(torch.ops.natten_layers, name)(*args)
    return _kernels[name](*args)


def _needs_dispatcher(args: tuple[Any, ...]) -> bool:
    """Whether a compiler, a transform, a mode, a derivative or a tensor's own class may want to see the operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode()
        or forward_ad._current_level >= 0
        or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in args)
        or needs_gradient(args)
    )


def call_in_backward(name: str, *args: Any) -> Any:
    """:func:`call` for a derivative that has none itself: asking for one fails."""
    # Grad mode is on where a second derivative may be asked for.
    once = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _Once.apply(name, *args) if once else call(name, *args)


class _Once(torch.autograd.Function):
    """Fails when it is differentiated. ``once_differentiable`` gives ``torch.func`` zeros instead."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *args: Any) -> Any:
        return call(name, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept for a derivative that is not there."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(f"{NOT_FUSED} second derivatives{WAY_OUT}")


def is_tracked(args: tuple[Any, ...]) -> bool:
    """Whether a derivative may be asked for."""
    # Inside torch.func's transforms a tensor does not tell whether it is differentiated further out.
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return transformed or needs_gradient(args)


def needs_gradient(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def last_contiguous(tensor: Tensor) -> Tensor:
    """What the kernels can read: any strides, but neighbors on the last axis."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _below_autograd(name: str) -> Callable[..., Any]:
    """The operator as autograd calls it. It would drop derivatives that nobody wrote in silence; this says so."""

    def run(*args: Any) -> Any:
        if any(forward_ad.unpack_dual(x).tangent is not None for x in args if isinstance(x, Tensor)):
            raise NotImplementedError(NO_FORWARD_MODE)
        if needs_gradient(args):
            raise NotImplementedError(
                f"natten_layers::{name} has no derivative; call the library's functions instead, such as "
                "neighborhood_attention"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.natten_layers, name).default(*args)

    return run
