"""The operators of attention and its gradient: schemas, fakes and autograd. Triton is imported on the first launch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from ...geometry import Window, visible_pairs
from ..host.problem import Inputs, problem_of
from .define import (
    NO_FORWARD_MODE,
    NOT_FUSED,
    WAY_OUT,
    call,
    call_in_backward,
    call_untracked,
    eager_form,
    is_tracked,
    is_transformed,
    last_contiguous,
    library,
    module,
    on_device,
    register,
)

__all__ = ["Arguments", "attention", "attention_state", "unsupported"]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | float | None, Window, float]
"""of :func:`attention`, in their order"""
MAX_HEAD_DIM = 256
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: a search takes longer than a launch


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _compiler_gap(device: torch.device) -> str | None:
    import triton

    return compiler_gap(torch.cuda.get_device_capability(device), triton.__version__)


def compiler_gap(capability: tuple[int, int], version: str) -> str | None:
    """Why this release of Triton cannot compile the kernels for a device, or None if it can."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if capability[0] == 10 and release < (3, 8):  # its compiler crashes while it lays out tensor memory
        return f"Triton {version} cannot compile it for compute capability {capability[0]}.{capability[1]}; 3.8 can"
    return None


def unsupported(query: Tensor, value: Tensor) -> str | None:
    """Why the fused kernels cannot run on these tensors, or None if they can."""
    if query.device.type != "cuda" and not _interpreted():
        return f"the tensors are on {query.device}, the kernels run on CUDA devices"
    if not HAS_TRITON:
        return "Triton is not installed"
    # A compiled graph takes what it finds: nothing here may ask for the device while it is traced.
    if query.device.type == "cuda" and not torch.compiler.is_compiling():
        gap = _compiler_gap(query.device)
        if gap is not None:
            return gap
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {query.dtype} is not one of float16, bfloat16, float32"
    # Asked of the device, as to look into the environment takes the host as long as everything else here.
    if query.dtype == torch.bfloat16 and query.device.type != "cuda":
        return "Triton's interpreter does not multiply bfloat16 matrices"
    for name, size in (("head_dim", query.shape[-1]), ("value head_dim", value.shape[-1])):
        if size % 8 or not 8 <= size <= MAX_HEAD_DIM:
            return f"{name} {size} is not a multiple of 8 between 8 and {MAX_HEAD_DIM}"
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: Tensor | float | None,
    window: Window,
    scale: float,
) -> Tensor:
    """``out`` alone; without gradients no statistics are written."""
    inputs = readable(query, key, value, additional_keys, additional_values, sink)
    if is_tracked(inputs):
        return _function().apply(*inputs, window, scale)[0]
    return call_untracked("forward", *inputs, *flat(window), scale, False)[0]


def attention_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: Tensor | float | None,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, row_max, row_sum)``; no gradient flows through ``row_max``, which is a reference point."""
    inputs = readable(query, key, value, additional_keys, additional_values, sink)
    return _function().apply(*inputs, window, scale)  # pyright: ignore[reportReturnType]


def readable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: Tensor | float | None,
) -> tuple[Any, ...]:
    """The tensors of the operators' schemas: last axes contiguous, a sink either a tensor or a number."""
    tensors = query, key, value, additional_keys, additional_values
    for x in tensors:  # most calls copy nothing, and are done with a look at each
        if x is not None and x.stride(-1) != 1:
            tensors = [x if x is None else last_contiguous(x) for x in tensors]
            break
    if torch.compiler.is_compiling():
        # The compiler refuses an `autograd.Function` that is given one tensor twice, as in attention of x over x.
        tensors = [x if x is None else x.view_as(x) for x in tensors]
    return (*tensors, last_contiguous(sink), None) if isinstance(sink, Tensor) else (*tensors, None, sink)


def flat(window: Window) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool]]:
    return window.kernel_size, window.stride, window.dilation, window.is_causal


class _Attention(Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, window, scale = args
        return call("forward", *inputs, *flat(window), scale, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, sink_value, window, scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.sink_value, ctx.window, ctx.scale = sink_value, window, scale
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, _, grad_sum = grads
        *tensors, out, row_max, row_sum = ctx.saved_tensors
        # lse = row_max + log(row_sum) with row_max held fixed, so dL/dlse = dL/drow_sum * row_sum.
        grad_lse = None if grad_sum is None else grad_sum * row_sum
        grad_out = torch.zeros_like(out) if grad_out is None else last_contiguous(grad_out)
        window = (*flat(ctx.window), ctx.scale)
        results = call_in_backward(
            "backward", *tensors, ctx.sink_value, *window, out, row_max, row_sum, grad_out, grad_lse
        )
        needed = (r if x is not None else None for r, x in zip(results, tensors, strict=True))
        return *needed, None, None, None


class _Transformable(_Attention):
    """:class:`_Attention` under the transforms of ``torch.func``, whose rules ``torch.compile`` does not trace."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise NotImplementedError(NO_FORWARD_MODE)


_Eager = eager_form(_Transformable)


def _function() -> type[Function]:
    if torch.compiler.is_compiling():
        return _Attention
    return _Transformable if is_transformed() else _Eager


def _forward(*args: Any) -> tuple[Tensor | None, ...]:
    inputs, (sink_value, *window, scale, with_state) = Inputs(*args[:6]), args[6:]
    with on_device(inputs.query):
        return module("portable.forward").forward(
            problem_of(inputs, sink_value, window, scale), inputs, sink_value, scale, with_state
        )


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, value, with_state = args[0], args[2], args[-1]
    shape, dtype = (query.shape[:-1], torch.float32) if with_state else ((0,), query.dtype)
    row_max, row_sum = (query.new_empty(shape, dtype=dtype) for _ in range(2))
    return query.new_empty(*query.shape[:-1], value.shape[-1]), row_max, row_sum


def _forward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for all samples: the mapped axis becomes a part of the batch."""
    if in_dims[5] is not None:
        raise NotImplementedError(f"{NOT_FUSED} torch.func.vmap over sinks{WAY_OUT}")
    folded = [_fold(x, dim, info.batch_size) for x, dim in zip(args[:5], in_dims, strict=False)]
    results = torch.ops.natten_layers.forward(*folded, *args[5:])
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0, 0)


def _fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Make a mapped axis a part of the batch; what is not mapped is expanded."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _backward(*args: Any) -> tuple[Tensor | None, ...]:
    inputs, (sink_value, *window, scale, out, row_max, row_sum, grad_out, grad_lse) = Inputs(*args[:6]), args[6:]
    with on_device(out):
        problem = problem_of(inputs, sink_value, window, scale)
        *grads, delta = module("portable.backward").backward(
            problem, inputs, scale, out, row_max, row_sum, grad_out, grad_lse
        )
        return *grads, _sink_gradient(inputs.sink, row_max, row_sum, delta)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(args[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:6])


def _sink_gradient(sink: Tensor | None, row_max: Tensor, row_sum: Tensor, delta: Tensor) -> Tensor | None:
    """``dsink[h] = -sum exp(sink[h] - lse) * delta`` over batch and tokens, in fp32."""
    if sink is None:
        return None
    weight = torch.exp(sink.float() - row_max) / row_sum
    return -(weight * delta).flatten(0, -2).sum(0).to(sink.dtype)


def forward_flop(
    query: Tensor, key: Tensor, value: Tensor, additional_keys: Tensor | None, *args: Any, **_: Any
) -> int:
    """Useful FLOP: ``2 (D + Dv)`` for every pair of a query and a key that it sees, registers included."""
    kernel_size, stride, dilation, is_causal = args[3:7]
    spatial = query.shape[1:-2]
    pairs = visible_pairs(spatial, Window(*map(tuple, (kernel_size, stride, dilation, is_causal))))
    if additional_keys is not None:
        pairs += prod(spatial) * additional_keys.shape[1]
    return 2 * pairs * query.shape[0] * query.shape[-2] * (query.shape[-1] + value.shape[-1])


def _backward_flop(*args: Any, **kwargs: Any) -> int:
    """The convention of published benchmarks: five matrix products where the forward has two."""
    return forward_flop(*args, **kwargs) * 5 // 2


WINDOW = "SymInt[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"
INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values, "
    "Tensor? sink, float? sink_value, " + WINDOW
)
register(f"forward({INPUTS}, bool with_state) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
register(
    f"backward({INPUTS}, Tensor out, Tensor row_max, Tensor row_sum, Tensor grad_out, Tensor? grad_lse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register_flop_formula(torch.ops.natten_layers.forward, get_raw=True)(forward_flop)
register_flop_formula(torch.ops.natten_layers.backward, get_raw=True)(_backward_flop)
# The backward operator has no rule: vmap calls it once for each sample, as gradients of each are asked for.
torch.library.register_vmap("natten_layers::forward", _forward_vmap, lib=library)
