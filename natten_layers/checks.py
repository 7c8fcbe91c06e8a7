"""Checks of single arguments that users give: tensors, and numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

from .eager import autocasts
from .geometry import AXES, without_numpy
from .head_axes import expand_registers
from .kernels.ops.transforms import tangent_of
from .wording import count_or_one, shorten, with_type

__all__ = [
    "DTYPES",
    "check_additional",
    "check_dense",
    "check_flags",
    "check_key_mask",
    "check_kind",
    "check_like",
    "check_pair",
    "check_qkv",
    "check_scale",
    "check_sink",
    "check_tensors",
    "is_finite_number",
    "no_tensor",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_FP32, LARGEST_FP64 = torch.finfo(torch.float32).max, torch.finfo(torch.float64).max


def check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is None and name.startswith("additional"):
            raise ValueError(f"additional_keys and additional_values come together, but {name} is None")
        check_kind(name, value)


def check_kind(name: str, tensor: object) -> None:
    """Raise a ValueError for tensors that the operations cannot compute on."""
    check_dense(name, tensor)
    if type(tensor).__name__ == "DTensor":  # by name, as importing the class would load all of torch.distributed
        raise ValueError(f"{name} is a DTensor, which is not supported; pass each device's part, {name}.to_local()")


def no_tensor(name: str, value: object) -> ValueError:
    """The error for an argument that is no tensor."""
    way_out = f"; pass torch.as_tensor({name})" if hasattr(value, "__array__") else ""
    return ValueError(f"{name} must be a tensor, got {with_type(value)}{way_out}")


def check_dense(name: str, tensor: object) -> None:
    """Raise a ValueError for what is no tensor, or one without one shape and strides, as nested and sparse ones are."""
    if not isinstance(tensor, Tensor):
        raise no_tensor(name, tensor)
    if tensor.is_nested:
        raise ValueError(
            f"{name} is a nested tensor, which only neighborhood_attention_varlen takes; pack the samples "
            f"({name}.values(), with shapes or cu_seqlens), pad them (torch.nested.to_padded_tensor) or call once for "
            "each"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}, which is not supported; pass {name}.to_dense()")


def check_flags(**flags: object) -> None:
    """Raise a ValueError for what is no bool: a text, such as the "false" of a config, would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool) and without_numpy(value, bool) is value:
            raise ValueError(f"{name} must be True or False, got {with_type(value)}")


def check_pair(additional_keys: object, additional_values: object) -> None:
    """Check that registers have both keys and values, or neither."""
    if additional_keys is not None or additional_values is not None:
        check_tensors(additional_keys=additional_keys, additional_values=additional_values)


def check_qkv(query: Tensor, key: Tensor, value: Tensor, rank: int, may_be_empty: int = 1) -> None:
    """Check that three tensors fit. The first ``may_be_empty`` axes may have length 0, as that of the batch."""
    # Queries may lie on another grid, but keys and values on the same.
    for name, tensor, other, like, axes in (("key", key, "query", query, 1), ("value", value, "key", key, rank + 1)):
        if tensor.ndim != like.ndim or tensor.shape[:axes] != like.shape[:axes]:
            sizes = zip(("batch", *AXES[rank]), tensor.shape[:axes], like.shape, strict=False)
            differing = [f"on the {axis} axis ({a} and {b})" for axis, a, b in sizes if a != b]
            raise ValueError(
                f"{name} {tuple(tensor.shape)} and {other} {tuple(like.shape)} differ "
                + ("in rank" if tensor.ndim != like.ndim else ", ".join(differing))
            )
        check_like(name, tensor, query)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key head_dim {key.shape[-1]} differs from query head_dim {query.shape[-1]}")
    if query.dtype not in DTYPES:
        raise ValueError(f"query dtype {query.dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        for axis, size in enumerate(tensor.shape):
            if axis >= may_be_empty and size == 0:
                raise ValueError(f"{name} {tuple(tensor.shape)} is empty on axis {axis}")


def check_like(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}")
    if tensor.dtype != query.dtype:
        cast = ""
        if autocasts(query.device.type):
            cast = f"; autocast casts to {torch.get_autocast_dtype(query.device.type)}, but leaves fp64 as it is"
        raise ValueError(f"{name} has dtype {tensor.dtype}, but query has {query.dtype}{cast}")


def check_additional(
    keys: Tensor | None, values: Tensor | None, query: Tensor, key: Tensor, value: Tensor, batch: int | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Check registers; returns them expanded to the batch, which may be the number of packed samples."""
    if keys is None or values is None:  # both are None, as `check_pair` has been called
        return None, None
    batch, kv_heads = query.shape[0] if batch is None else batch, key.shape[-2]
    for name, tensor, like in (("additional_keys", keys, key), ("additional_values", values, value)):
        check_like(name, tensor, query)
        expected = (kv_heads, like.shape[-1])
        # Not by `in`, which Dynamo answers wrongly where the batch is a symbol and the length of `tensor` a number.
        fits = tensor.ndim == 4 and (tensor.shape[0] == 1 or tensor.shape[0] == batch)
        if not fits or tuple(tensor.shape[2:]) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected [{count_or_one(batch)}, R, {expected[0]}, "
                f"{expected[1]}]"
            )
    if keys.shape[1] != values.shape[1]:
        raise ValueError(f"additional_keys has {keys.shape[1]} registers, but additional_values {values.shape[1]}")
    return expand_registers(keys, values, batch)


def check_scale(scale: object, dtype: torch.dtype) -> float:
    """The factor on the scores of queries of ``dtype``."""
    if isinstance(scale, Tensor) and scale.numel() == 1 and not scale.requires_grad and tangent_of(scale) is None:
        scale = scale.item()  # this waits if the tensor is on a GPU
    if not is_finite_number(scale, dtype):
        raise ValueError(
            f"scale must be a finite number of the scores' precision, got {shorten(scale)}; multiply a learned scale "
            "into the query"
        )
    return float(scale)


def check_sink(sink: float | Tensor | None, query: Tensor) -> Tensor | float | None:
    heads = query.shape[-2]
    if sink is None or (isinstance(sink, float) and sink == -math.inf):
        return None
    if not isinstance(sink, Tensor):
        if not is_finite_number(sink, query.dtype):
            raise ValueError(
                f"sink must be None, a finite number of the scores' precision or a tensor [{heads}], got "
                f"{with_type(sink)}"
            )
        return float(sink)
    check_kind("sink", sink)
    if sink.shape != (heads,):
        raise ValueError(f"sink has shape {tuple(sink.shape)}; expected [{heads}], one logit per query head")
    if sink.device != query.device:
        raise ValueError(f"sink is on {sink.device}, but query is on {query.device}")
    if not sink.is_floating_point():
        raise ValueError(f"sink has dtype {sink.dtype}; expected a floating point dtype")
    return sink


def check_key_mask(mask: Tensor, sizes: Sequence[int], device: torch.device, name: str = "key_mask") -> Tensor:
    """Check the mask of keys: of ``sizes``, batch and axes, or the length of packed samples. Returns it expanded."""
    check_tensors(**{name: mask})
    first, *spatial = sizes
    may_be_one = bool(spatial)  # the first axis is a batch
    fits = mask.ndim == len(sizes) and (mask.shape[0] == first or (may_be_one and mask.shape[0] == 1))
    if not fits or list(mask.shape[1:]) != spatial:
        expected = ", ".join([count_or_one(first) if may_be_one else f"{first}", *map(str, spatial)])
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected [{expected}], a bool for each key")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{name} has dtype {mask.dtype}; expected torch.bool, True where a key may be seen. Pass {name} != 0"
        )
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device}, but what it masks is on {device}")
    return mask.expand(first, *spatial)


def is_finite_number(value: object, dtype: torch.dtype = torch.float64) -> TypeGuard[float]:
    """Whether a value is a real number, finite in the precision of the scores of queries of ``dtype``.

    ``math.isfinite`` would not do: it cannot be traced for a number that is an input of a graph.
    """
    most = LARGEST_FP64 if dtype == torch.float64 else LARGEST_FP32
    if isinstance(value, float):  # first, as a check against the abstract class Real is slow
        return -most <= value <= most
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and -most <= float(value) <= most
    except OverflowError:  # an integer of hundreds of digits
        return False
