"""Operators that normalise and rotate query and key heads: schemas, fakes, autograd. Triton is imported on launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["rotate"]

_INPUTS = (
    "Tensor query, Tensor key, Tensor? query_gain, Tensor? key_gain, Tensor? positions, Tensor? freqs, "
    "float factor, str norm, float eps"
)
_library = torch.library.Library("natten_layers", "FRAGMENT")
_library.define(f"rotate({_INPUTS}) -> (Tensor, Tensor)")
_library.define(f"rotate_backward({_INPUTS}, Tensor grad_query, Tensor grad_key) -> (Tensor, Tensor, Tensor, Tensor)")


def rotate(
    query: Tensor,
    key: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    positions: Tensor | None,
    freqs: Tensor | None,
    factor: float,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Both contiguous. Arguments as ``rotate.Rotation`` has them; no gradient reaches positions and frequencies."""
    inputs = *map(_last_contiguous, (query, key)), query_gain, key_gain, positions, freqs, factor, norm, eps
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, query_gain, key_gain)):
        return _Rotate.apply(*inputs)  # pyright: ignore[reportReturnType]
    return torch.ops.natten_layers.rotate(*inputs)


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.natten_layers.rotate(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        results = torch.ops.natten_layers.rotate_backward(*tensors, *ctx.options, *map(_last_contiguous, grads))
        return *(g if x is not None else None for g, x in zip(results, tensors[:4], strict=True)), *(None,) * 5


def _rotate(*args: Any) -> tuple[Tensor, Tensor]:
    from .rotate import Rotation, rotate

    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        return rotate(Rotation(*args))


def _rotate_fake(*args: Any) -> tuple[Tensor, Tensor]:
    query, key = args[:2]
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _rotate_backward(*args: Any) -> tuple[Tensor, ...]:
    from .rotate import Rotation, rotate_backward

    *inputs, grad_query, grad_key = args
    with torch.cuda.device_of(grad_query):
        grads = rotate_backward(Rotation(*inputs), grad_query, grad_key)
    # Operators return tensors; an absent gradient is an empty one.
    return tuple(grad_query.new_empty(0) if g is None else g for g in grads)


def _rotate_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(args[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:4])


for _name, _kernel, _fake in (
    ("rotate", _rotate, _rotate_fake),
    ("rotate_backward", _rotate_backward, _rotate_backward_fake),
):
    _library.impl(_name, _kernel, "CUDA")
    _library.impl(_name, _kernel, "CPU")  # Triton's interpreter
    torch.library.register_fake(f"natten_layers::{_name}", _fake, lib=_library)
