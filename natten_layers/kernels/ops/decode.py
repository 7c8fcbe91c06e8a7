"""The operator that attends over a cache: schema and fake, as ``ops.py`` has for neighborhoods. No autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import unsupported
from .define import call, last_contiguous, module, on_device, register

__all__ = ["decode", "why_not"]


def why_not(query: Tensor, value: Tensor, *others: Tensor | float | None) -> str | None:
    """Why the kernel cannot run on these tensors, or None if it can."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (query, value, *others)):
        return "the decode kernel has no backward, and an input requires a gradient"
    return unsupported(query, value)


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
    """``(out, lse)`` of validated arguments; without ``with_lse`` the latter is nothing to read."""
    tensors = (last_contiguous(t) for t in (query, key, value))
    registers = (t if t is None else last_contiguous(t) for t in (additional_keys, additional_values))
    positions = (p.expand(query.shape[0], -1) for p in (query_positions, key_positions))
    sinks = (last_contiguous(sink), None) if isinstance(sink, Tensor) else (None, sink)
    return call("decode", *tensors, *positions, *registers, *sinks, window, scale, with_lse)


def _decode(*args: Any) -> tuple[Tensor, Tensor | None]:
    with on_device(args[0]):
        return module("portable.decode").decode(*args)


def _decode_fake(*args: Any) -> tuple[Tensor, Tensor]:
    query, value, with_lse = args[0], args[2], args[-1]
    shape, dtype = (query.shape[:-1], torch.float32) if with_lse else ((0,), query.dtype)
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(shape, dtype=dtype)


register(
    "decode(Tensor query, Tensor key, Tensor value, Tensor query_positions, Tensor key_positions, "
    "Tensor? additional_keys, Tensor? additional_values, Tensor? sink, float? sink_value, "
    "SymInt? window, float scale, bool with_lse) -> (Tensor, Tensor)",
    _decode,
    _decode_fake,
)
