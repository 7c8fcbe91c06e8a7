"""Registration and calls of the operators over the Triton kernels. Importing this module needs no Triton."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from importlib import import_module
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple, TypeVar, TypeVarTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from ..host.ahead import STATE, zeroed
from .transforms import is_forward_mode, is_only_forward_mode, is_transformed, is_vectorized, needs_gradient, tangent_of

__all__ = [
    "NOT_FUSED",
    "NO_SECOND",
    "WAY_OUT",
    "Forms",
    "Sealed",
    "apply",
    "by_sample",
    "call",
    "call_derivative",
    "call_uncompiled",
    "check_duals",
    "define_op",
    "eager_form",
    "flattened",
    "grouped",
    "in_one_batch",
    "is_watched",
    "known_tangents",
    "last_contiguous",
    "library",
    "module",
    "on_device",
    "save_for_jvp",
]

NOT_FUSED = "the fused kernels do not have"
WAY_OUT = '; give the forward pass impl="eager", or layers the context natten_layers.default_impl("eager")'
NO_SECOND = f"{NOT_FUSED} second derivatives, which are those of gradients and of forward-mode tangents{WAY_OUT}"

R = TypeVar("R")
Ts = TypeVarTuple("Ts")
Results = Tensor | tuple[Tensor | None, ...]
Mapped = tuple[tuple[Tensor, ...], tuple[int, ...]]
"""What a rule of ``vmap`` returns: results, and the positions of their mapped axes"""

library = torch.library.Library("natten_layers", "DEF")
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), int, float, bool, str, tuple, list))
"""Types without torch-dispatch hooks: arguments of these types cannot intercept an operator."""
NO_DEVICE_GUARD = nullcontext()


class _Operator(NamedTuple):
    kernel: Callable[..., Results]
    spans: tuple[tuple[type[Any], int, int], ...]
    """Each group's class, and where the group begins and ends in the flat arguments."""


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


def define_op(
    name: str,
    groups: tuple[type[Any], ...],
    results: str,
    kernel: Callable[..., Results],
    fake: Callable[..., Any],
    flop: Callable[..., int] | None = None,
) -> None:
    """Define the operator ``natten_layers::name``, without a derivative.

    The arguments of an operator are a flat list, in which only the position tells them apart. So they are written down
    once, as fields of named tuples: the schema is made from these, and ``kernel``, ``fake`` and ``flop`` take one tuple
    of each group. A field that is added to a group becomes an argument of every operator with that group.

    Operators must return tensors: where a kernel returns None, the operator returns an empty tensor with the dtype of
    its first argument. Operators are opaque to the compiler, and their derivatives are in ``autograd.Function`` around
    them, so that eager and compiled code have the same backward pass.

    Args:
        groups: classes of named tuples.
        results: the part of the schema behind the arrow.
        flop: counts the floating-point operations of a call.
    """
    ends = list(accumulate((len(group._fields) for group in groups), initial=0))
    _operators[name] = _Operator(kernel, tuple(zip(groups, ends, ends[1:], strict=False)))
    library.define(f"{name}({_schema(groups)}) -> {results}")
    for device in ("CUDA", "CPU"):  # on CPU tensors Triton's interpreter runs the kernels
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
    """Group an operator's flat arguments into named tuples."""
    return [group._make(args[start:end]) for group, start, end in _operators[name].spans]


def flattened(groups: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
    """Flatten named tuples into an operator's arguments."""
    return tuple([x for group in groups for x in group])


def _returning_tensors(name: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    kernel = _operators[name].kernel

    def run(*args: Any) -> Tensor | tuple[Tensor, ...]:
        results = _launched(kernel, grouped(name, args))
        if isinstance(results, Tensor):
            return results
        return tuple(args[0].new_empty(0) if x is None else x for x in results)

    return run


def call(name: str, *groups: tuple[Any, ...]) -> Any:
    """Run an operator on arguments that need no derivative at this level.

    PyTorch's dispatcher costs the host as much as the launch, so it is skipped where it has nothing to do. A result
    that the caller did not ask for is an empty tensor, or None if the dispatcher was skipped.
    """
    if is_watched(chain.from_iterable(groups)):
        return getattr(torch.ops.natten_layers, name)(*flattened(groups))
    return _launched(_operators[name].kernel, groups)


def _launched(kernel: Callable[..., Results], groups: Iterable[tuple[Any, ...]]) -> Results:
    results = kernel(*groups)
    return zeroed(results) if STATE.is_on else results


def is_watched(args: Iterable[Any]) -> bool:
    """Whether a compiler, a transform, a dispatch mode or a tensor subclass may intercept an operator on arguments."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode()
        # Torch switches forward mode off inside of an `autograd.Function`, which has rules for tangents of its own.
        or (is_forward_mode() and torch._C._is_fwd_grad_enabled())
        or not _PLAIN.issuperset(map(type, args))
    )


def call_derivative(name: str, *groups: tuple[Any, ...]) -> Any:
    """:func:`call` of an operator that computes a derivative, so that differentiating it again raises an error.

    The error comes in the backward pass of the derivative, if there is one. So tangents may be computed where reverse
    mode is on, as in a loss whose target has them.
    """
    # Grad mode is on in a backward pass only if a second derivative may be needed; forward mode does not need it.
    once = (torch.is_grad_enabled() or is_transformed()) and not torch.compiler.is_compiling()
    if once and not is_only_forward_mode():
        return _apply_once(_Once, name, flattened(groups))
    return getattr(torch.ops.natten_layers, name)(*flattened(groups)) if is_vectorized() else call(name, *groups)


def _apply_once(function: type[Function], name: str, args: Sequence[Any]) -> Any:
    """Call the operator through :class:`_Once`, or a class made from it."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    return function.apply(Sealed((name, [None if isinstance(x, Tensor) else Sealed(x) for x in args])), *tensors)


class Sealed:
    """An argument without tensors of an ``autograd.Function``, which ``torch.func`` does not look into.

    It takes all tuples and lists among the arguments apart and puts them together again, several times a call.
    """

    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


class _Once(Function):
    """A call that raises an error when it is differentiated.

    Torch's ``once_differentiable`` would not do: under ``torch.func`` it gives zeros instead of an error. The arguments
    are the name of an operator with its arguments, in which None stands for each tensor and others are sealed, and then
    the tensors.
    """

    @staticmethod
    def forward(call: Sealed, *tensors: Tensor) -> Any:
        name, args = call.content
        rest = iter(tensors)
        return getattr(torch.ops.natten_layers, name)(*(next(rest) if x is None else x.content for x in args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing, as there is no derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(NO_SECOND)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise NotImplementedError(NO_SECOND)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Mapped:
        return by_sample(_Once.apply, info, in_dims, args)


class _Underivable(_Once):
    """:class:`_Once` for an operator that is called by itself: by a user, or in a graph that torch has traced."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0].content[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise _no_derivative(ctx.name)


def _no_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"natten_layers::{name} has no derivative; call the library's functions instead, such as "
        f"neighborhood_attention. In a function that torch.func.linearize returned: {NO_SECOND}"
    )


# --- Rules of vmap
# Torch can generate them for an ``autograd.Function``, but they then fail in forward mode, as they take every item of a
# tuple among the arguments for one that has a tangent. A rule that calls the function again has all derivatives.


def by_sample(function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Mapped:
    """A rule of ``vmap``: one call of ``function`` for each sample."""

    def sample(i: int) -> Any:
        pairs = zip(args, in_dims, strict=True)
        return function(*(x.select(d, i) if isinstance(x, Tensor) and d is not None else x for x, d in pairs))

    samples = map(sample, range(info.batch_size))
    results = tuple(map(torch.stack, zip(*samples, strict=True)))
    return results, (0,) * len(results)


def in_one_batch(
    function: Callable[..., Any], shared: Collection[int], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> Mapped:
    """A rule of ``vmap``: the mapped axis becomes a part of the batch, so that one call computes all samples.

    Args:
        shared: positions of arguments that all of a batch shares. If one of these is mapped, the rule is that of
            :func:`by_sample`. The first axis of all other tensors is the batch.
    """
    if any(in_dims[i] is not None for i in shared):
        return by_sample(function, info, in_dims, args)
    folded = [
        _fold(x, d, info.batch_size) if isinstance(x, Tensor) and i not in shared else x
        for i, (x, d) in enumerate(zip(args, in_dims, strict=True))
    ]
    results = tuple(x.unflatten(0, (info.batch_size, -1)) for x in function(*folded))
    return results, (0,) * len(results)


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Make a mapped axis a part of the batch; a tensor that is not mapped is expanded."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


# --- Forward mode


def save_for_jvp(ctx: Any, *tensors: Tensor | None) -> None:
    """Save the inputs and outputs that the ``jvp`` of an ``autograd.Function`` takes, where it may be called."""
    if is_forward_mode():
        ctx.save_for_forward(*tensors)


def known_tangents(names: Iterable[str], tensors: Iterable[Any], tangents: Iterable[Any]) -> list[Tensor | None]:
    """Tangents that kernels can read; None where one is known to be zero, as it then costs neither loads nor products.

    Raises:
        ValueError: a tangent has another dtype than its tensor, or is on another device.
    """
    known: list[Tensor | None] = []
    for name, tensor, tangent in zip(names, tensors, tangents, strict=False):
        check_tangent(name, tensor, tangent)
        known.append(None if tangent is None or tangent._is_zerotensor() else last_contiguous(tangent))
    return known


def check_tangent(name: str, tensor: Tensor, tangent: Tensor | None) -> None:
    """Raise a ``ValueError`` for a tangent of another dtype or device than its tensor. Torch compares only shapes."""
    if tangent is None:
        return
    if tangent.dtype != tensor.dtype:
        raise ValueError(
            f"the tangent of {name} has dtype {tangent.dtype}, but {name} has {tensor.dtype}: convert the tangent"
        )
    if tangent.device != tensor.device:
        raise ValueError(
            f"the tangent of {name} is on {tangent.device}, but {name} is on {tensor.device}: move the tangent"
        )


def check_duals(**tensors: Tensor | float | None) -> None:
    """:func:`check_tangent` of arguments, where they may have tangents."""
    for name, x in tensors.items():
        if isinstance(x, Tensor):
            check_tangent(name, x, tangent_of(x))


def eager_form(function: type[Function]) -> type[Function]:
    """The faster form of an ``autograd.Function`` with ``setup_context``, for use outside of compilers and transforms.

    Those need a separate ``setup_context``. For a function that has one, however, torch binds arguments by name, which
    takes the host as long as a whole call without gradients.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    own = {"forward": staticmethod(forward), "setup_context": staticmethod(Function.setup_context)}
    return type(function.__name__, (function,), own)


class Forms(NamedTuple):
    """The forms of one ``autograd.Function``: each caller takes another."""

    traced: type[Function]
    """For ``torch.compile``, which refuses rules for vmap and forward mode"""
    transformable: type[Function]
    """For the transforms of ``torch.func``"""
    eager: type[Function]
    """For all others: :func:`eager_form` of the transformable one"""


def apply(forms: Forms, *args: Any) -> Any:
    """Apply an ``autograd.Function`` in the form that suits the caller."""
    if is_forward_mode():
        return call_uncompiled("forward_mode", _apply_uncompiled, forms, args)
    if torch.compiler.is_compiling():
        return forms.traced.apply(*args)
    return (forms.transformable if is_transformed() else forms.eager).apply(*args)


def _apply_uncompiled(forms: Forms, args: tuple[Any, ...]) -> Any:
    if is_only_forward_mode():
        return _apply_with_tangents(forms.transformable, args)
    return (forms.transformable if is_transformed() else forms.eager).apply(*args)


class _Context:
    """The context of an ``autograd.Function`` whose tangents are computed at once, and which has no backward pass."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def _ignore(self, *_: Any) -> None:
        pass

    save_for_backward = mark_non_differentiable = set_materialize_grads = _ignore


def _apply_with_tangents(function: type[Function], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What ``function.apply`` gives in forward mode alone.

    Inside of ``torch.func.jvp`` torch makes a class for every call, and takes the host longer than all else that a call
    is made of. A function with a ``forward_with_tangents`` computes results and tangents at once.
    """
    duals = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) and x.is_floating_point() else (x, None) for x in args]
    primals, tangents = zip(*duals, strict=True)
    if all(tangent is None for tangent in tangents):
        return function.forward(*primals)
    at_once = getattr(function, "forward_with_tangents", partial(_in_two_steps, function))
    results, moved = at_once(primals, tangents)
    pairs = zip(results, moved, strict=True)
    return tuple([x if tangent is None else forward_ad.make_dual(x, tangent) for x, tangent in pairs])


def _in_two_steps(
    function: type[Function], primals: tuple[Any, ...], tangents: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    results, context = function.forward(*primals), _Context()
    function.setup_context(context, primals, results)
    return results, function.jvp(context, *tangents)


def call_uncompiled(kind: Literal["forward_mode", "packed"], function: Callable[[*Ts], R], *args: *Ts) -> R:
    """Call a function for which compiled code leaves its graph; :mod:`.uncompiled` has the reason of every kind."""
    if "torch._dynamo" not in sys.modules:  # as long as it is not loaded, nothing is compiled
        return function(*args)
    from . import uncompiled

    return getattr(uncompiled, kind)(function, *args)


@cache
def module(name: str) -> Any:
    """Import a module of ``kernels`` that needs Triton, on the first launch.

    This import is not at the top of the file, as importing the library must not need Triton. It hides no import cycle:
    the modules that it loads import no operators.
    """
    return import_module(f"natten_layers.kernels.{name}")


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which the tensor's device is the current one, on which Triton launches."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return NO_DEVICE_GUARD
    return torch.cuda.device_of(tensor)


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its last axis is not contiguous. Kernels can read any strides of the other axes."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _below_autograd(name: str) -> Callable[..., Any]:
    """The operator's implementation for autograd, which raises an error where a derivative is taken.

    Without it autograd would silently drop the derivative that the operator does not have. In reverse mode the error
    comes in the backward pass: graphs that ``torch.func.linearize`` has traced call operators on tensors made of
    parameters, and nobody may ever ask for gradients.
    """

    def run(*args: Any) -> Any:
        if any(forward_ad.unpack_dual(x).tangent is not None for x in args if isinstance(x, Tensor)):
            raise NotImplementedError(f"{NOT_FUSED} a forward-mode derivative of natten_layers::{name}{WAY_OUT}")
        if needs_gradient(args):
            if is_transformed():  # torch knows no functions inside of `grad` here
                raise _no_derivative(name)
            return _apply_once(_Underivable, name, args)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.natten_layers, name).default(*args)

    return run
