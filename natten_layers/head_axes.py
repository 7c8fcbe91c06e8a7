"""Tensors with one axis of heads, and KV heads not repeated, from those that users give.

Users may expand KV heads with stride 0 over all query heads, or over a group axis of their own. Attention takes one
copy of each, unless a gradient is needed that differs from copy to copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.ops.transforms import is_tracked

__all__ = ["Tensors", "canonical_heads", "expand_registers", "has_one_head"]

Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Query, key, value, additional keys and additional values."""


def canonical_heads(tensors: Tensors, head_shape: torch.Size) -> Tensors:
    """Tensors with one axis of heads, and KV heads not repeated where they were expanded."""
    query, key, value, additional_keys, additional_values = tensors
    if len(head_shape) == 1:
        return query, *_collapse_heads(query, key, value, additional_keys, additional_values)
    return query.flatten(-3, -2), *_collapse_group(key, value, additional_keys, additional_values, head_shape[1])


def _collapse_heads(
    query: Tensor, key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Reduce a single KV head that was expanded with stride 0 (MQA) to one head, unless registers differ by head."""
    registers = additional_keys, additional_values
    if not has_one_head((query, key, value, *registers)):
        return key, value, *registers
    if any(map(_has_own_gradient, (key, value, *registers))):
        register_keys, register_values = (
            None if t is None else t.expand(*t.shape[:-2], key.shape[-2], -1) for t in registers
        )
        return key, value, register_keys, register_values
    register_keys, register_values = (None if t is None else _first_head(t) for t in registers)
    return _first_head(key), _first_head(value), register_keys, register_values


def has_one_head(tensors: Tensors) -> bool:
    """Whether keys, values and registers each have a single head, which may be expanded."""
    _, key, value, *registers = tensors
    return key.shape[-2] == value.shape[-2] and all(map(_is_one_head, (key, value, *registers)))


def _is_one_head(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.ndim > 1 and (tensor.shape[-2] == 1 or tensor.stride(-2) == 0))


def _has_own_gradient(tensor: Tensor | None) -> bool:
    """Whether the gradient of an expanded tensor may be needed, which differs from head to head.

    The forward pass cannot know whether it will be that gradient, or only that of the tensor that was expanded.
    """
    if tensor is None or tensor.shape[-2] == 1:
        return False
    # While a transform of torch.func is compiled, its tensors do not tell whether they are differentiated.
    return torch.is_grad_enabled() if torch.compiler.is_compiling() else is_tracked((tensor,))


def _first_head(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-2] == 1 else tensor[..., :1, :]


def _collapse_group(
    key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``[..., Hkv, G, D]`` to ``[..., Hkv, D]`` if the group axis is expanded, else to ``[..., Hkv * G, D]``.

    Registers may have ``Hkv`` heads in either case. If they have ``Hkv * G``, keys and values get as many.
    """
    kv_heads = key.shape[-3]

    def has_heads(t: Tensor | None, heads: int) -> bool:
        return t is not None and t.ndim == 4 and t.shape[-2] == heads

    expanded = all(map(_is_one_head, (key, value))) and not any(map(_has_own_gradient, (key, value)))
    if expanded and (group == 1 or not has_heads(additional_keys, kv_heads * group)):
        return key.select(-2, 0), value.select(-2, 0), additional_keys, additional_values
    register_keys, register_values = (
        t.repeat_interleave(group, -2) if t is not None and has_heads(t, kv_heads) else t
        for t in (additional_keys, additional_values)
    )
    key, value = (t.expand(*t.shape[:-2], group, -1).flatten(-3, -2) for t in (key, value))
    return key, value, register_keys, register_values


def expand_registers(keys: Tensor | None, values: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Registers expanded to the batch, or None if there are none."""
    if keys is None or values is None or keys.shape[1] == 0:
        return None, None
    return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
