"""How the operators over the Triton kernels are registered and called. Torch only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "NOT_FUSED",
    "NO_FORWARD_MODE",
    "WAY_OUT",
    "call",
    "call_in_backward",
    "call_untracked",
    "eager_form",
    "is_differentiated",
    "is_tracked",
    "is_transformed",
    "is_watched",
    "last_contiguous",
    "library",
    "module",
    "on_device",
    "register",
]

NOT_FUSED = "the fused kernels do not have"
WAY_OUT = '; use impl="eager"'
NO_FORWARD_MODE = f"{NOT_FUSED} forward-mode derivatives{WAY_OUT}"

Results = Tensor | tuple[Tensor | None, ...]

library = torch.library.Library("natten_layers", "DEF")
_kernels: dict[str, Callable[..., Results]] = {}
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), int, float, bool, str, tuple, list))
"""types of arguments that do not want to see an operator"""
_HERE = nullcontext()


def register(schema: str, kernel: Callable[..., Results], fake: Callable[..., Any]) -> None:
    """Define the operator ``natten_layers::name`` of a schema ``name(...) -> ...``, without a derivative.

    Operators return tensors: where a kernel's result is None, the operator's is empty, in its first argument's dtype.
    They are opaque to the compiler; derivatives are ``autograd.Function`` outside of them, so that eager and compiled
    code take the same backward.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    for device in ("CUDA", "CPU"):  # on the latter under Triton's interpreter
        library.impl(name, _returning_tensors(kernel), device)
    library.impl(name, _below_autograd(name), "Autograd")
    torch.library.register_fake(f"natten_layers::{name}", fake, lib=library)
    _kernels[name] = kernel


def _returning_tensors(kernel: Callable[..., Results]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    def run(*args: Any) -> Tensor | tuple[Tensor, ...]:
        results = kernel(*args)
        if isinstance(results, Tensor):
            return results
        return tuple(args[0].new_empty(0) if x is None else x for x in results)

    return run


def call(name: str, *args: Any) -> Any:
    """Run an operator, without the dispatcher where that adds nothing: it costs the host as much as the launch.

    A result that is not asked for is an empty tensor, or None without the dispatcher.
    """
    if needs_gradient(args):
        return getattr(torch.ops.natten_layers, name)(*args)
    return call_untracked(name, *args)


def call_untracked(name: str, *args: Any) -> Any:
    """:func:`call` of arguments for which nobody asks derivatives: looking at all of them again takes the host time."""
    if is_watched(args):
        return getattr(torch.ops.natten_layers, name)(*args)
    return _kernels[name](*args)


def is_watched(args: tuple[Any, ...]) -> bool:
    """Whether a compiler, a transform, a mode or a tensor's own class may want to see what is done with arguments."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode()
        or forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, args))
    )


def call_in_backward(name: str, *args: Any) -> Any:
    """:func:`call` for a derivative that has none itself: asking for one fails."""
    # Grad mode is on where a second derivative may be asked for.
    once = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _Once.apply(name, *args) if once else call(name, *args)


class _Once(Function):
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


def eager_form(function: type[Function]) -> type[Function]:
    """A function with a ``setup_context`` as it runs outside of compilers and transforms, which need that.

    Torch binds arguments by name where there is one, which takes the host as long as a whole call without gradients.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    own = {"forward": staticmethod(forward), "setup_context": staticmethod(Function.setup_context)}
    return type(function.__name__, (function,), own)


def is_tracked(args: tuple[Any, ...]) -> bool:
    """Whether a derivative may be asked for."""
    # Inside torch.func's transforms a tensor does not tell whether it is differentiated further out.
    return is_transformed() or needs_gradient(args)


def is_differentiated(args: tuple[Any, ...]) -> bool:
    """:func:`is_tracked`, or whether a forward-mode derivative may be asked for. A compiled graph has none."""
    return is_tracked(args) or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


def is_transformed() -> bool:
    """Whether a transform of torch.func is active. A compiled graph does not ask."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def needs_gradient(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for x in args:  # any() over a generator takes three times as long, twice in every call
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


@cache
def module(name: str) -> Any:
    """A module of kernels, which imports Triton, on the first launch: an import statement is work on each one."""
    return import_module(f"natten_layers.kernels.{name}")


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(tensor)


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
