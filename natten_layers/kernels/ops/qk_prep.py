"""Operators that normalise and rotate query and key heads: schemas, fakes, autograd. Triton is imported on launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .define import (
    call,
    call_in_backward,
    eager_form,
    is_tracked,
    is_transformed,
    last_contiguous,
    module,
    on_device,
    register,
)

__all__ = ["OPTIONS", "Options", "rotate"]

Options = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, str, float]
"""What is done to queries and keys, as ``rotate.Rotation`` has it: gains, positions, frequencies, factor, norm, eps."""
OPTIONS = "Tensor? query_gain, Tensor? key_gain, Tensor? positions, Tensor? freqs, float factor, str norm, float eps"


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
    inputs = *map(last_contiguous, (query, key)), query_gain, key_gain, positions, freqs, factor, norm, eps
    if is_tracked((query, key, query_gain, key_gain)):
        plain = not torch.compiler.is_compiling() and not is_transformed()
        return (_Eager if plain else _Rotate).apply(*inputs)  # pyright: ignore[reportReturnType]
    return call("rotate", *inputs)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return call("rotate", *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        results = call_in_backward("rotate_backward", *tensors, *ctx.options, *map(last_contiguous, grads))
        return *(g if x is not None else None for g, x in zip(results, tensors[:4], strict=True)), *(None,) * 5


_Eager = eager_form(_Rotate)


def _rotate(*args: Any) -> tuple[Tensor, Tensor]:
    rotate = module("portable.qk_prep")
    with on_device(args[0]):
        return rotate.rotate(rotate.Rotation(*args))


def _rotate_fake(*args: Any) -> tuple[Tensor, Tensor]:
    query, key = args[:2]
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _rotate_backward(*args: Any) -> tuple[Tensor | None, ...]:
    rotate = module("portable.qk_prep")
    *inputs, grad_query, grad_key = args
    with on_device(grad_query):
        return rotate.rotate_backward(rotate.Rotation(*inputs), grad_query, grad_key)


def _rotate_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(args[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:4])


_INPUTS = f"Tensor query, Tensor key, {OPTIONS}"
register(f"rotate({_INPUTS}) -> (Tensor, Tensor)", _rotate, _rotate_fake)
register(
    f"rotate_backward({_INPUTS}, Tensor grad_query, Tensor grad_key) -> (Tensor, Tensor, Tensor, Tensor)",
    _rotate_backward,
    _rotate_backward_fake,
)
