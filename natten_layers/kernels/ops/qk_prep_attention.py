"""The operator of attention on heads as they are projected: normalised and rotated first, without gradients."""

from __future__ import annotations

from torch import Tensor

from ..host.problem import Inputs, Options, QKPrep, problem_of
from . import attention as attention_ops
from .define import call, module, on_device, register

__all__ = ["attention"]


def attention(inputs: Inputs, options: Options, prep: QKPrep) -> Tensor:
    """``out`` of ``attention_ops.attention``'s arguments, whose query and key ``qk_prep_ops.rotate`` would prepare."""
    return call("projected", attention_ops.readable(inputs), options, prep)


def _projected(inputs: Inputs, options: Options, prep: QKPrep) -> Tensor:
    with on_device(inputs.query):
        return module("dispatch").prepare_and_attend(problem_of(inputs, options), inputs, options, prep)


def _projected_fake(inputs: Inputs, options: Options, prep: QKPrep) -> Tensor:
    query, value = inputs.query, inputs.value
    return query.new_empty(*query.shape[:-1], value.shape[-1])


register("projected", (Inputs, Options, QKPrep), "Tensor", _projected, _projected_fake, attention_ops.forward_flop)
