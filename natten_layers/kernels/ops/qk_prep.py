"""Operators that normalise and rotate query and key heads: schemas, fakes, autograd. Triton is imported on launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host.problem import QKPrep
from .define import (
    call,
    call_in_backward,
    eager_form,
    grouped,
    is_tracked,
    is_transformed,
    last_contiguous,
    module,
    on_device,
    register,
)

__all__ = ["rotate"]


class Heads(NamedTuple):
    query: Tensor
    key: Tensor


class HeadGradients(NamedTuple):
    grad_query: Tensor
    grad_key: Tensor


def rotate(query: Tensor, key: Tensor, prep: QKPrep) -> tuple[Tensor, Tensor]:
    """Both prepared, contiguous. No gradient reaches positions and frequencies."""
    heads = Heads(last_contiguous(query), last_contiguous(key))
    if is_tracked((query, key, prep.query_gain, prep.key_gain)):
        plain = not torch.compiler.is_compiling() and not is_transformed()
        return (_Eager if plain else _Rotate).apply(*heads, *prep)  # pyright: ignore[reportReturnType]
    return call("rotate", heads, prep)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return call("rotate", *grouped("rotate", args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        heads, prep = grouped("rotate", inputs)
        ctx.save_for_backward(*heads, prep.query_gain, prep.key_gain, prep.positions, prep.freqs)
        ctx.numbers = prep.factor, prep.norm, prep.eps, prep.split, prep.interleaved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, *tensors = ctx.saved_tensors
        prep, gradients = QKPrep._make((*tensors, *ctx.numbers)), HeadGradients(*map(last_contiguous, grads))
        d_query, d_key, d_query_gain, d_key_gain = call_in_backward(
            "rotate_backward", Heads(query, key), prep, gradients
        )
        d_gains = (
            None if prep.query_gain is None else d_query_gain,
            None if prep.key_gain is None else d_key_gain,
        )
        return d_query, d_key, *d_gains, *(None,) * (len(prep) - len(d_gains))


_Eager = eager_form(_Rotate)


def _rotate(heads: Heads, prep: QKPrep) -> tuple[Tensor, Tensor]:
    with on_device(heads.query):
        return module("portable.qk_prep").rotate(*heads, prep)


def _rotate_fake(heads: Heads, prep: QKPrep) -> tuple[Tensor, Tensor]:
    query, key = heads
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _rotate_backward(heads: Heads, prep: QKPrep, gradients: HeadGradients) -> tuple[Tensor | None, ...]:
    with on_device(heads.query):
        return module("portable.qk_prep").rotate_backward(*heads, prep, *gradients)


def _rotate_backward_fake(heads: Heads, prep: QKPrep, gradients: HeadGradients) -> tuple[Tensor, ...]:
    tensors = *heads, prep.query_gain, prep.key_gain
    return tuple(heads.query.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


register("rotate", (Heads, QKPrep), "(Tensor, Tensor)", _rotate, _rotate_fake)
register(
    "rotate_backward", (Heads, QKPrep, HeadGradients), "(Tensor, Tensor, Tensor, Tensor)",
    _rotate_backward, _rotate_backward_fake,
)  # fmt: skip
