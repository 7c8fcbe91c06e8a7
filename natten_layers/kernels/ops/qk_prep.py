"""The operators that normalise query and key heads and apply RoPE: schemas, fake implementations and autograd.

Importing this module needs no Triton, which is imported on the first launch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host.qk_prep import QKPrep
from .define import (
    NOT_FUSED,
    WAY_OUT,
    Forms,
    Mapped,
    apply,
    by_sample,
    call,
    call_derivative,
    define_op,
    eager_form,
    grouped,
    in_one_batch,
    known_tangents,
    last_contiguous,
    module,
    on_device,
    save_for_jvp,
)
from .transforms import is_differentiated

__all__ = ["qk_prep"]


class Heads(NamedTuple):
    query: Tensor
    key: Tensor


class HeadTangents(NamedTuple):
    query_tangent: Tensor | None
    key_tangent: Tensor | None
    query_gain_tangent: Tensor | None
    key_gain_tangent: Tensor | None

    @property
    def of_results(self) -> tuple[bool, bool]:
        """Whether the prepared query and key have a tangent."""
        query, key, query_gain, key_gain = (x is not None for x in self)
        return query or query_gain, key or key_gain


class HeadGradients(NamedTuple):
    grad_query: Tensor
    grad_key: Tensor


def qk_prep(query: Tensor, key: Tensor, prep: QKPrep) -> tuple[Tensor, Tensor]:
    """Query and key, normalised and rotated, contiguous. Positions and frequencies get no gradient."""
    heads = Heads(last_contiguous(query), last_contiguous(key))
    if is_differentiated((query, key, prep.query_gain, prep.key_gain)):
        return apply(_FORMS, *heads, *prep)
    return call("qk_prep", heads, prep)


def _tensors_of(heads: Heads, prep: QKPrep) -> tuple[Tensor | None, ...]:
    return *heads, prep.query_gain, prep.key_gain, prep.positions, prep.freqs


class _QKPrep(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return call("qk_prep", *grouped("qk_prep", args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        heads, prep = grouped("qk_prep", inputs)
        ctx.save_for_backward(*_tensors_of(heads, prep))
        ctx.numbers = prep.factor, prep.norm, prep.eps, prep.split, prep.interleaved
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, *tensors = ctx.saved_tensors
        prep = QKPrep._make((*tensors, *ctx.numbers))
        gradients = HeadGradients(
            *(
                torch.zeros_like(x) if g is None else last_contiguous(g)
                for x, g in zip((query, key), grads, strict=True)
            )
        )
        d_query, d_key, d_query_gain, d_key_gain = call_derivative(
            "qk_prep_backward", Heads(query, key), prep, gradients
        )
        d_gains = (
            None if prep.query_gain is None else d_query_gain,
            None if prep.key_gain is None else d_key_gain,
        )
        return d_query, d_key, *d_gains, *(None,) * (len(prep) - len(d_gains))


class _Transformable(_QKPrep):
    """:class:`_QKPrep` with the rules for vmap and forward mode, which ``torch.compile`` cannot trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _QKPrep.setup_context(ctx, inputs, output)
        save_for_jvp(ctx, *_tensors_of(*grouped("qk_prep", inputs)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key, *tensors = ctx.saved_tensors
        heads, prep = Heads(query, key), QKPrep._make((*tensors, *ctx.numbers))
        names = *Heads._fields, *QKPrep._fields
        *of_heads, positions, freqs = known_tangents(names, (*heads, *tensors), tangents)
        if positions is not None or freqs is not None:
            raise NotImplementedError(f"{NOT_FUSED} tangents of positions or frequencies{WAY_OUT}")
        known = HeadTangents(*of_heads)
        results = call_derivative("qk_prep_jvp", heads, prep, known)
        # Torch takes no None for the tangent of a result.
        sides = zip(results, known.of_results, heads, strict=True)
        d_query, d_key = (x if has else torch.zeros_like(head) for x, has, head in sides)
        return d_query, d_key

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Mapped:
        positions = grouped("qk_prep", args)[1].positions
        if positions is not None and len(positions) > 1:  # images have their own
            return by_sample(_Transformable.apply, info, in_dims, args)
        return in_one_batch(_Transformable.apply, range(len(Heads._fields), len(args)), info, in_dims, args)


_FORMS = Forms(_QKPrep, _Transformable, eager_form(_Transformable))


def _qk_prep(heads: Heads, prep: QKPrep) -> tuple[Tensor, Tensor]:
    with on_device(heads.query):
        return module("portable.qk_prep").qk_prep(*heads, prep)


def _qk_prep_fake(heads: Heads, prep: QKPrep) -> tuple[Tensor, Tensor]:
    query, key = heads
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _qk_prep_jvp(heads: Heads, prep: QKPrep, tangents: HeadTangents) -> tuple[Tensor | None, Tensor | None]:
    with on_device(heads.query):
        return module("portable.qk_prep").qk_prep_jvp(*heads, prep, *tangents)


def _qk_prep_jvp_fake(heads: Heads, prep: QKPrep, tangents: HeadTangents) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape if has else 0) for x, has in zip(heads, tangents.of_results, strict=True))


def _qk_prep_backward(heads: Heads, prep: QKPrep, gradients: HeadGradients) -> tuple[Tensor | None, ...]:
    with on_device(heads.query):
        return module("portable.qk_prep").qk_prep_backward(*heads, prep, *gradients)


def _qk_prep_backward_fake(heads: Heads, prep: QKPrep, gradients: HeadGradients) -> tuple[Tensor, ...]:
    tensors = *heads, prep.query_gain, prep.key_gain
    return tuple(heads.query.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


define_op("qk_prep", (Heads, QKPrep), "(Tensor, Tensor)", _qk_prep, _qk_prep_fake)
define_op("qk_prep_jvp", (Heads, QKPrep, HeadTangents), "(Tensor, Tensor)", _qk_prep_jvp, _qk_prep_jvp_fake)
define_op(
    "qk_prep_backward", (Heads, QKPrep, HeadGradients), "(Tensor, Tensor, Tensor, Tensor)",
    _qk_prep_backward, _qk_prep_backward_fake,
)  # fmt: skip
