"""The operator of attention over a cache: schema and fake implementation. It has no derivative."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..host.cache_problem import CacheInputs, CacheOptions
from .attention import unsupported
from .define import call, define_op, last_contiguous, module, on_device
from .transforms import is_forward_mode, is_in_grad, needs_gradient

__all__ = ["decode", "why_not"]


def why_not(query: Tensor, value: Tensor, *others: Tensor | float | None) -> str | None:
    """Why the kernel cannot run on these tensors, or None if it can."""
    if is_forward_mode():
        return "the decode kernel has no forward-mode derivative"
    # Inside of torch.func.grad a tensor does not tell whether an outer level differentiates it.
    if is_in_grad() or needs_gradient((query, value, *others)):
        return "the decode kernel has no backward, and an input requires a gradient"
    return unsupported(query, value)


class WithLse(NamedTuple):
    with_lse: bool


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: Tensor | float | None,
    window: int | None,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of validated arguments. Unless ``with_lse``, do not read ``lse``: it is empty or None."""
    tensors = (last_contiguous(t) for t in (query, key, value))
    registers = (t if t is None else last_contiguous(t) for t in (additional_keys, additional_values))
    positions = (p.expand(query.shape[0], -1) for p in (query_positions, key_positions))
    sink, sink_value = (last_contiguous(sink), None) if isinstance(sink, Tensor) else (None, sink)
    inputs = CacheInputs._make((*tensors, *positions, *registers, sink))
    return call("decode", inputs, CacheOptions(sink_value, window, scale), WithLse(with_lse))


def _decode(inputs: CacheInputs, options: CacheOptions, wanted: WithLse) -> tuple[Tensor, Tensor | None]:
    with on_device(inputs.query):
        return module("dispatch").decode(inputs, options, wanted.with_lse)


def _decode_fake(inputs: CacheInputs, options: CacheOptions, wanted: WithLse) -> tuple[Tensor, Tensor]:
    query, value = inputs.query, inputs.value
    shape, dtype = (query.shape[:-1], torch.float32) if wanted.with_lse else ((0,), query.dtype)
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(shape, dtype=dtype)


define_op("decode", (CacheInputs, CacheOptions, WithLse), "(Tensor, Tensor)", _decode, _decode_fake)
