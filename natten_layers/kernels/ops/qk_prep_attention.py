"""The operator of attention on heads as they are projected: normalised and rotated first, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..host.problem import Inputs, problem_of
from . import attention as attention_ops
from .define import call_untracked, module, on_device, register
from .qk_prep import OPTIONS, Options

__all__ = ["attention"]


def attention(arguments: attention_ops.Arguments, rotation: Options) -> Tensor:
    """``out`` of ``attention_ops.attention``'s arguments, whose query and key ``rotate_ops.rotate`` would prepare."""
    inputs, window, scale = attention_ops.readable(*arguments[:6]), arguments[6], arguments[7]
    return call_untracked("projected", *inputs, *attention_ops.flat(window), scale, *rotation)


def _projected(*args: Any) -> Tensor:
    inputs, (sink_value, *window, scale), options = Inputs(*args[:6]), args[6:12], args[12:]
    with on_device(inputs.query):
        rotate = module("portable.qk_prep")
        rotation = rotate.Rotation(inputs.query, inputs.key, *options)
        problem = problem_of(inputs, sink_value, window, scale)
        launch, kernels = dispatch.projected_launch(problem, rotation.kind), dispatch.kernels()
        if launch is not None and kernels is not None and dispatch.are_aligned(*inputs[:5]):
            return kernels.strip_forward.forward(launch, problem, inputs, sink_value, scale, False, rotation)[0]
        query, key = rotate.rotate(rotation)
        inputs = inputs._replace(query=query, key=key)
        problem = problem_of(inputs, sink_value, window, scale)
        return module("portable.forward").forward(problem, inputs, sink_value, scale, False)[0]


def _projected_fake(*args: Any) -> Tensor:
    query, value = args[0], args[2]
    return query.new_empty(*query.shape[:-1], value.shape[-1])


register(f"projected({attention_ops.INPUTS}, {OPTIONS}) -> Tensor", _projected, _projected_fake)
register_flop_formula(torch.ops.natten_layers.projected, get_raw=True)(attention_ops.forward_flop)
