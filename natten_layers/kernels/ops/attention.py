"""The operators of attention and of its gradient: schemas, fake implementations and autograd.

Importing this module needs no Triton, which is imported on the first launch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ...geometry import fitted, visible_pairs
from ..host.card import Card
from ..host.packing import packing_of
from ..host.problem import Cotangents, Inputs, Options, SavedResults, Tangents, problem_of
from ..host.qk_prep import QKPrepKind
from .define import (
    Forms,
    Mapped,
    Sealed,
    apply,
    by_sample,
    call,
    call_derivative,
    define_op,
    eager_form,
    in_one_batch,
    known_tangents,
    last_contiguous,
    library,
    module,
    on_device,
    save_for_jvp,
)
from .transforms import is_differentiated

__all__ = ["attention", "attention_state", "choices", "readable", "unsupported"]


class WithStats(NamedTuple):
    with_stats: bool


WITH_STATS, WITHOUT_STATS = WithStats(True), WithStats(False)

MAX_HEAD_DIM = 256
DIFFERENTIABLE = Inputs._fields[: len(Tangents._fields)]
"""Names of the inputs that may have tangents"""
SHARED = "sink", "rpb"
"""Names of the inputs that a batch shares"""
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once, as the search takes longer than a launch


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _compiler_gap(device: torch.device | Card) -> str | None:
    import triton

    capability = device.capability if isinstance(device, Card) else torch.cuda.get_device_capability(device)
    return compiler_gap(capability, triton.__version__)


def compiler_gap(capability: tuple[int, int], version: str) -> str | None:
    """Why this release of Triton cannot compile the kernels for a device, or None if it can."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if capability[0] == 10 and release < (3, 8):  # older compilers crash while they lay out tensor memory
        return f"Triton {version} cannot compile it for compute capability {capability[0]}.{capability[1]}; 3.8 can"
    return None


def unsupported(query: Tensor, value: Tensor, card: Card | None = None) -> str | None:
    """Why the fused kernels cannot run on these tensors, or could not if they were on ``card``; None if they can."""
    on_cuda = card is not None or query.device.type == "cuda"
    if not on_cuda and not _interpreted():
        return f"the tensors are on {query.device}, the kernels run on CUDA devices"
    if not HAS_TRITON:
        return "Triton is not installed"
    # torch.compile cannot trace the question for the device's capability, so compiled graphs skip this check.
    if on_cuda and not torch.compiler.is_compiling():
        gap = _compiler_gap(query.device if card is None else card)
        if gap is not None:
            return gap
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {query.dtype} is not one of float16, bfloat16, float32"
    # The device tells whether kernels are interpreted. Reading the environment would take as long as this function.
    if query.dtype == torch.bfloat16 and not on_cuda:
        return "Triton's interpreter does not multiply bfloat16 matrices"
    for name, size in (("head_dim", query.shape[-1]), ("value head_dim", value.shape[-1])):
        if size % 8 or not 8 <= size <= MAX_HEAD_DIM:
            return f"{name} {size} is not a multiple of 8 between 8 and {MAX_HEAD_DIM}"
    return None


def attention(inputs: Inputs, options: Options) -> Tensor:
    """``out`` without statistics, which are not even written if no gradient is needed."""
    inputs = readable(inputs)
    if is_differentiated(inputs):
        return apply(_FORMS, *_sealed(inputs, options))[0]
    return call("forward", inputs, options, WITHOUT_STATS)[0]


def attention_state(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, row_max, row_sum)``. No gradient flows through ``row_max``, which is only a reference point."""
    return apply(_FORMS, *_sealed(readable(inputs), options))


def choices(
    inputs: Inputs,
    options: Options,
    *,
    with_stats: bool,
    with_gradients: bool,
    with_tangents: bool = False,
    in_one_launch: bool = False,
    prep: QKPrepKind | None = None,
    card: Card | None = None,
) -> dict[str, Any]:
    """The kernels that compute a call: a ``dispatch.Choice`` per direction. Nothing is launched.

    With ``in_one_launch``, tangents may be computed together with the output.
    With ``prep``, which goes without statistics and derivatives, queries and keys are normalised and rotated first.
    With ``card``, kernels are chosen as if the tensors were on that GPU.
    """
    inputs = readable(inputs)
    problem = problem_of(inputs, options)._replace(card=card)
    if prep is not None:
        return module("dispatch").choices_with_qk_prep(problem, inputs, prep)
    return module("dispatch").choices(
        problem,
        inputs,
        with_stats=with_stats,
        with_gradients=with_gradients,
        with_tangents=with_tangents,
        in_one_launch=in_one_launch,
    )


def readable(inputs: Inputs) -> Inputs:
    """Tensors that the kernels can read: those whose last axis is not contiguous are copied."""
    if inputs.rpb is not None:  # the kernels take its entries as those of a contiguous table
        inputs = inputs._replace(rpb=inputs.rpb.contiguous())
    if torch.compiler.is_compiling():
        # torch.compile refuses to give an `autograd.Function` the same tensor twice, as in attention of x over x.
        return Inputs._make([None if x is None else last_contiguous(x.view_as(x)) for x in inputs])
    for x in inputs:  # most calls copy nothing, so this check comes first
        if x is not None and x.stride(-1) != 1:
            return Inputs._make([None if x is None else last_contiguous(x) for x in inputs])
    return inputs


def _sealed(inputs: Inputs, options: Options) -> tuple[Any, ...]:
    """The tensors of a call, and then all else that there is to know of it: the arguments of :class:`_Attention`.

    ``torch.func`` goes through all arguments several times a call, so that those that are missing cost time, too.
    """
    given = tuple([x is not None for x in inputs])
    return *(x for x in inputs if x is not None), Sealed((given, options))


def _opened(args: Sequence[Any]) -> tuple[Inputs, Options]:
    """What :func:`_sealed` has made arguments of."""
    *tensors, call = args
    given, options = call.content
    rest = iter(tensors)
    return Inputs._make([next(rest) if has else None for has in given]), options


class _Attention(Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return call("forward", *_opened(args), WITH_STATS)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, _, grad_sum = grads
        *tensors, out, row_max, row_sum = ctx.saved_tensors
        inputs, options = _opened((*tensors, ctx.call))
        # lse = row_max + log(row_sum) with row_max held fixed, so dL/dlse = dL/drow_sum * row_sum.
        grad_lse = None if grad_sum is None else grad_sum * row_sum
        if grad_lse is not None and inputs.key_mask is not None:
            # The derivative of log(row_sum) is infinite for a query that sees nothing, whose lse is constant.
            grad_lse = torch.where(row_sum == 0, 0.0, grad_lse)
        grad_out = torch.zeros_like(out) if grad_out is None else last_contiguous(grad_out)
        cotangents = Cotangents(out, row_max, row_sum, grad_out, grad_lse)
        results = call_derivative("backward", inputs, options, cotangents)
        pairs = zip(results, inputs, strict=True)
        return *(r if x.is_floating_point() else None for r, x in pairs if x is not None), None


class _Transformable(_Attention):
    """:class:`_Attention` with the rules for vmap and forward mode, which ``torch.compile`` cannot trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _Attention.setup_context(ctx, inputs, output)
        save_for_jvp(ctx, *inputs[:-1], *output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, Tensor]:
        *tensors, out, row_max, row_sum = ctx.saved_tensors
        inputs, options = _opened((*tensors, ctx.call))
        known = _known(inputs, (*tangents[:-1], ctx.call))
        saved = SavedResults(out, row_max, row_sum)
        out_tangent, lse_tangent = call_derivative("jvp", inputs, options, saved, known)
        # As in the backward pass, row_max is held fixed.
        return out_tangent, None, lse_tangent * row_sum

    @staticmethod
    def forward_with_tangents(
        primals: tuple[Any, ...], tangents: tuple[Tensor | None, ...]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, None, Tensor]]:
        inputs, options = _opened(primals)
        known = _known(inputs, (*tangents[:-1], primals[-1]))
        *results, out_tangent, lse_tangent = call("forward_with_tangents", inputs, options, known)
        out, row_max, row_sum = results
        return (out, row_max, row_sum), (out_tangent, None, lse_tangent * row_sum)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Mapped:
        given, _ = args[-1].content
        names = list(compress(Inputs._fields, given))
        return _vmap(_Transformable.apply, info, in_dims, args, names)


def _known(inputs: Inputs, tangents: Sequence[Any]) -> Tangents:
    """Tangents that kernels can read, from those of all arguments, sealed like these."""
    return Tangents._make(known_tangents(DIFFERENTIABLE, inputs, _opened(tangents)[0]))


_FORMS = Forms(_Attention, _Transformable, eager_form(_Transformable))


def _forward(inputs: Inputs, options: Options, state: WithStats) -> tuple[Tensor | None, ...]:
    with on_device(inputs.query):
        return module("dispatch").forward(problem_of(inputs, options), inputs, options, state.with_stats)


def _forward_fake(inputs: Inputs, options: Options, state: WithStats) -> tuple[Tensor, Tensor, Tensor]:
    query, value = inputs.query, inputs.value
    shape, dtype = (query.shape[:-1], torch.float32) if state.with_stats else ((0,), query.dtype)
    row_max, row_sum = (query.new_empty(shape, dtype=dtype) for _ in range(2))
    return query.new_empty(*query.shape[:-1], value.shape[-1]), row_max, row_sum


def _vmap(
    function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...],
    names: Sequence[str] = Inputs._fields,
) -> Mapped:  # fmt: skip
    """The rule of ``vmap`` for a function whose first arguments are ``Inputs``, with ``names`` if some are missing."""
    if "shapes" in names and args[names.index("shapes")] is not None:  # a packed batch
        return by_sample(function, info, in_dims, args)
    return in_one_batch(function, [i for i, name in enumerate(names) if name in SHARED], info, in_dims, args)


def _backward(inputs: Inputs, options: Options, cotangents: Cotangents) -> tuple[Tensor | None, ...]:
    with on_device(inputs.query):
        problem = problem_of(inputs, options)
        *grads, grad_bias, delta = module("dispatch").backward(problem, inputs, options, cotangents)
        grad_sink = _sink_gradient(inputs, cotangents.row_max, cotangents.row_sum, delta)
        return *grads, grad_sink, None, None, grad_bias


def _backward_fake(inputs: Inputs, options: Options, cotangents: Cotangents) -> tuple[Tensor, ...]:
    tensors = inputs._replace(key_mask=None, shapes=None)  # which have no gradient
    return tuple(inputs.query.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def _sink_gradient(inputs: Inputs, row_max: Tensor, row_sum: Tensor, delta: Tensor) -> Tensor | None:
    """``dsink[h] = -sum exp(sink[h] - lse) * delta``, summed over batch and tokens in fp32."""
    sink = inputs.sink
    if sink is None:
        return None
    weight = torch.exp(sink.float() - row_max) / row_sum
    if inputs.key_mask is not None:  # a sink of -inf may be all that a query sees
        weight = torch.where(row_sum == 0, 0.0, weight)
    return -(weight * delta).flatten(0, -2).sum(0).to(sink.dtype)


def _jvp(inputs: Inputs, options: Options, saved: SavedResults, tangents: Tangents) -> tuple[Tensor, Tensor]:
    with on_device(inputs.query):
        return module("dispatch").jvp(problem_of(inputs, options), inputs, options, saved, tangents)


def _jvp_fake(inputs: Inputs, options: Options, saved: SavedResults, tangents: Tangents) -> tuple[Tensor, Tensor]:
    return saved.out.new_empty(saved.out.shape), saved.row_max.new_empty(saved.row_max.shape)


def _forward_with_tangents(inputs: Inputs, options: Options, tangents: Tangents) -> tuple[Tensor, ...]:
    with on_device(inputs.query):
        return module("dispatch").forward_with_tangents(problem_of(inputs, options), inputs, options, tangents)


def _forward_with_tangents_fake(inputs: Inputs, options: Options, tangents: Tangents) -> tuple[Tensor, ...]:
    out, row_max, row_sum = _forward_fake(inputs, options, WITH_STATS)
    return out, row_max, row_sum, torch.empty_like(out), torch.empty_like(row_max)


def forward_flop(inputs: Inputs, options: Options, *_: Any) -> int:
    """Useful floating-point operations: ``2 (D + Dv)`` per visible pair of a query and a key or register."""
    query, value = inputs.query, inputs.value
    spatial = query.shape[1:-2]
    window = options.window
    if inputs.shapes is None:
        pairs = visible_pairs(spatial, window)
    else:
        samples = packing_of(inputs.shapes, query.shape[1], window).shapes
        pairs = sum(visible_pairs(shape, fitted(shape, window)) for shape in samples)
    if inputs.additional_keys is not None:
        pairs += prod(spatial) * inputs.additional_keys.shape[1]
    return 2 * pairs * query.shape[0] * query.shape[-2] * (query.shape[-1] + value.shape[-1])


def _backward_flop(*groups: Any) -> int:
    """By the convention of published benchmarks: five matrix products, where the forward pass has two."""
    return forward_flop(*groups) * 5 // 2


def _forward_with_tangents_flop(inputs: Inputs, options: Options, tangents: Tangents) -> int:
    """Those of a forward pass and of its tangents. One pass for both computes scores once, so it has six products."""
    return forward_flop(inputs, options) + _jvp_flop(inputs, options, None, tangents)


def _jvp_flop(inputs: Inputs, options: Options, saved: SavedResults | None, tangents: Tangents) -> int:
    """Five matrix products if all tangents are given: scores, two for their tangents, two for those of the output."""
    head_dim, value_dim = inputs.query.shape[-1], inputs.value.shape[-1]
    of_scores = [x is not None for x in (tangents.query_tangent, tangents.key_tangent)]
    columns = head_dim * (1 + sum(of_scores)) + value_dim * (any(of_scores) + (tangents.value_tangent is not None))
    return forward_flop(inputs, options) * columns // (head_dim + value_dim)


define_op("forward", (Inputs, Options, WithStats), "(Tensor, Tensor, Tensor)", _forward, _forward_fake, forward_flop)
define_op(
    "backward", (Inputs, Options, Cotangents), f"({', '.join(['Tensor'] * len(Inputs._fields))})",
    _backward, _backward_fake, _backward_flop,
)  # fmt: skip
define_op("jvp", (Inputs, Options, SavedResults, Tangents), "(Tensor, Tensor)", _jvp, _jvp_fake, _jvp_flop)
define_op(
    "forward_with_tangents", (Inputs, Options, Tangents), f"({', '.join(['Tensor'] * 5)})",
    _forward_with_tangents, _forward_with_tangents_fake, _forward_with_tangents_flop,
)  # fmt: skip
# The backward operator has no such rule, as gradients are wanted for each sample: vmap calls it once for each. That of
# tangents is called once for each too, as samples often share their inputs, as in ``torch.func.jacfwd``, and as a batch
# they would need a copy each.
torch.library.register_vmap(
    "natten_layers::forward", lambda info, in_dims, *args: _vmap(torch.ops.natten_layers.forward, info, in_dims, args),
    lib=library,
)  # fmt: skip
torch.library.register_vmap(
    "natten_layers::jvp", lambda info, in_dims, *args: by_sample(torch.ops.natten_layers.jvp, info, in_dims, args),
    lib=library,
)  # fmt: skip
