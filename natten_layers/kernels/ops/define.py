"""How the operators over the Triton kernels are registered and called. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from itertools import accumulate, chain
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

__all__ = [
    "NOT_FUSED",
    "NO_FORWARD_MODE",
    "WAY_OUT",
    "call",
    "call_in_backward",
    "eager_form",
    "flattened",
    "grouped",
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
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), int, float, bool, str, tuple, list))
"""types of arguments that do not want to see an operator"""
_HERE = nullcontext()


class _Operator(NamedTuple):
    kernel: Callable[..., Results]
    spans: tuple[tuple[type[Any], int, int], ...]
    """Each group, and where it begins and ends in the flat arguments."""


_operators: dict[str, _Operator] = {}
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    str: "str",
    float: "float",
    float | None: "float?",
    int | None: "SymInt?",
    Sequence[int]: "SymInt[]",
    Sequence[bool]: "bool[]",
}


def register(
    name: str,
    groups: tuple[type[Any], ...],
    results: str,
    kernel: Callable[..., Results],
    fake: Callable[..., Any],
    flop: Callable[..., int] | None = None,
) -> None:
    """Define the operator ``natten_layers::name``, without a derivative.

    An operator's arguments are a flat list, in which a position is all that tells one from the other. They are written
    down once, as fields of named tuples: the schema is made of these, and ``kernel``, ``fake`` and ``flop`` take one
    of each. A field that is added to a group is an argument of every operator that has it.

    Operators return tensors: where a kernel's result is None, the operator's is empty, in its first argument's dtype.
    They are opaque to the compiler; derivatives are ``autograd.Function`` outside of them, so that eager and compiled
    code take the same backward.

    Args:
        groups: classes of named tuples.
        results: the schema's part behind the arrow.
        flop: counts floating-point operations.
    """
    ends = list(accumulate((len(group._fields) for group in groups), initial=0))
    _operators[name] = _Operator(kernel, tuple(zip(groups, ends, ends[1:], strict=False)))
    library.define(f"{name}({_schema(groups)}) -> {results}")
    for device in ("CUDA", "CPU"):  # on the latter under Triton's interpreter
        library.impl(name, _returning_tensors(name), device)
    library.impl(name, _below_autograd(name), "Autograd")
    torch.library.register_fake(f"natten_layers::{name}", lambda *args: fake(*grouped(name, args)), lib=library)
    if flop is not None:
        register_flop_formula(getattr(torch.ops.natten_layers, name), get_raw=True)(
            lambda *args, **_: flop(*grouped(name, args))
        )


def _schema(groups: tuple[type[Any], ...]) -> str:
    hints = [hint for group in groups for hint in get_type_hints(group).items()]
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {field}" for field, kind in hints)


def grouped(name: str, args: Sequence[Any]) -> list[Any]:
    """An operator's flat arguments as named tuples."""
    return [group._make(args[start:end]) for group, start, end in _operators[name].spans]


def flattened(groups: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
    """Named tuples as an operator's flat arguments."""
    return tuple([x for group in groups for x in group])


def _returning_tensors(name: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    kernel = _operators[name].kernel

    def run(*args: Any) -> Tensor | tuple[Tensor, ...]:
        results = kernel(*grouped(name, args))
        if isinstance(results, Tensor):
            return results
        return tuple(args[0].new_empty(0) if x is None else x for x in results)

    return run


def call(name: str, *groups: tuple[Any, ...]) -> Any:
    """Run an operator on arguments of which nobody asks derivatives here.

    Without the dispatcher where that adds nothing: it costs the host as much as the launch. A result that is not asked
    for is an empty tensor, or None without the dispatcher.
    """
    if is_watched(chain.from_iterable(groups)):
        return getattr(torch.ops.natten_layers, name)(*flattened(groups))
    return _operators[name].kernel(*groups)


def is_watched(args: Iterable[Any]) -> bool:
    """Whether a compiler, a transform, a mode or a tensor's own class may want to see what is done with arguments."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode()
        or forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, args))
    )


def call_in_backward(name: str, *groups: tuple[Any, ...]) -> Any:
    """:func:`call` for a derivative that has none itself: asking for one fails."""
    # Grad mode is on where a second derivative may be asked for.
    once = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _Once.apply(name, *flattened(groups)) if once else call(name, *groups)


class _Once(Function):
    """Fails when it is differentiated. ``once_differentiable`` gives ``torch.func`` zeros instead."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *args: Any) -> Any:
        return getattr(torch.ops.natten_layers, name)(*args)

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
    """A module of ``kernels`` that imports Triton, on the first launch.

    The one import that is not at the top of a file: importing the library must need no Triton. It hides no circle, as
    what is loaded imports no operator.
    """
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
