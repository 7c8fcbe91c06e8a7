"""A call of the decode kernel as the host sees it: its tensors, and the description that its launches depend on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Layout, layout, precision, scales_first, sink_kind


class CacheInputs(NamedTuple):
    """The tensors of a call after validation by ``cached``. The last axes of all but positions are contiguous."""

    query: Tensor
    """``[B, Lq, Hq, D]``"""
    key: Tensor
    """``[B, S, Hkv, D]``"""
    value: Tensor
    """``[B, S, Hkv, Dv]``"""
    query_positions: Tensor
    """``[B, Lq]``, any integer dtype"""
    key_positions: Tensor
    """``[B, S]``, any integer dtype"""
    additional_keys: Tensor | None
    additional_values: Tensor | None
    sink: Tensor | None


class CacheOptions(NamedTuple):
    sink_value: float | None
    """One logit for all heads. A sink with a logit per head is a tensor of :class:`CacheInputs`."""
    window: int | None
    scale: float


class CacheProblem(NamedTuple):
    """Everything that the launches of a call over a cache depend on: all of it but the data. Hashable."""

    query: Layout
    key: Layout
    value: Layout
    query_positions: Layout
    key_positions: Layout
    additional_keys: Layout | None
    additional_values: Layout | None
    device: torch.device
    dtype: torch.dtype
    window: int | None
    sink: str
    """How the sink is given: none, value or tensor."""
    scale_first: bool
    """See :func:`scales_first`."""
    precision: str
    """``input_precision`` of Triton's matrix products."""


def cache_problem_of(inputs: CacheInputs, options: CacheOptions) -> CacheProblem:
    query, key, value, query_positions, key_positions, additional_keys, additional_values, sink = inputs
    return CacheProblem(
        layout(query), layout(key), layout(value), layout(query_positions), layout(key_positions),
        None if additional_keys is None else layout(additional_keys),
        None if additional_values is None else layout(additional_values),
        query.device, query.dtype, options.window, sink_kind(sink, options.sink_value), scales_first(options.scale),
        precision(query.dtype),
    )  # fmt: skip
