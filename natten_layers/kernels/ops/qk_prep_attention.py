"""The operator that normalises query and key heads, applies RoPE and attends, for inference: it has no derivative."""

from __future__ import annotations

from torch import Tensor

from ..host.problem import Inputs, Options, problem_of
from ..host.qk_prep import QKPrep
from . import attention as attention_ops
from .define import call, define_op, module, on_device

__all__ = ["attention"]


def attention(inputs: Inputs, options: Options, prep: QKPrep) -> Tensor:
    """``out`` of attention over a query and key that are normalised and rotated first, as ``prep`` says."""
    return call("attention_with_qk_prep", attention_ops.readable(inputs), options, prep)


def _attention_with_qk_prep(inputs: Inputs, options: Options, prep: QKPrep) -> Tensor:
    with on_device(inputs.query):
        return module("dispatch").prepare_and_attend(problem_of(inputs, options), inputs, options, prep)


def _attention_with_qk_prep_fake(inputs: Inputs, options: Options, prep: QKPrep) -> Tensor:
    query, value = inputs.query, inputs.value
    return query.new_empty(*query.shape[:-1], value.shape[-1])


define_op(
    "attention_with_qk_prep",
    (Inputs, Options, QKPrep),
    "Tensor",
    _attention_with_qk_prep,
    _attention_with_qk_prep_fake,
    attention_ops.forward_flop,
)
