"""Users' arguments, checked together, and their conversion to the canonical form that the implementations take."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_additional,
    check_key_mask,
    check_pair,
    check_qkv,
    check_scale,
    check_sink,
    check_tensors,
)
from .eager import autocasts
from .geometry import Window, is_per_axis, longest_axis, make_window
from .head_axes import Tensors, canonical_heads, expand_registers, has_one_head
from .kernels.host.card import Card
from .kernels.host.packing import Packing, packing_of
from .kernels.host.problem import Inputs, Options
from .kernels.ops import attention as attention_ops
from .kernels.ops.transforms import is_forward_mode, is_tracked
from .wording import shorten

__all__ = [
    "Axes",
    "Call",
    "as_autocast",
    "prepare",
    "prepare_packed",
    "with_bias",
]

Axes = int | Sequence[int]

_AxisOptions = tuple[Axes, Axes, Axes, bool | Sequence[bool], bool | Sequence[bool]]


class Call(NamedTuple):
    """Validated arguments in canonical form: one axis of heads, KV heads not repeated, registers for every image."""

    inputs: Inputs
    options: Options
    window: Window
    head_shape: torch.Size
    """The caller's head axes: ``(Hq,)`` or ``(Hkv, G)``."""

    @property
    def for_eager(self) -> tuple[Any, ...]:
        """The arguments of the functions of :mod:`eager`, in their order, up to ``scale``."""
        *tensors, sink, _, _, _ = self.inputs
        return *tensors, self.options.sink_value if sink is None else sink, self.window, self.options.scale

    @property
    def packing(self) -> Packing | None:
        """The samples of a packed batch. Their shapes are read from the host's memory."""
        shapes = self.inputs.shapes
        return None if shapes is None else packing_of(shapes, self.inputs.query.shape[1], self.window)

    def why_not_fused(self, forward_mode: bool | None = None, card: Card | None = None) -> str | None:
        """Why the fused kernels cannot compute the call; by default with tangents where a level of them is open, and
        on the tensors' device."""
        if self.inputs.rpb is not None and (is_forward_mode() if forward_mode is None else forward_mode):
            return "the kernel of forward-mode derivatives takes no rpb, the bias on relative positions"
        return attention_ops.unsupported(self.inputs.query, self.inputs.value, card)

    def restore(self, out: Tensor) -> Tensor:
        """Give a result ``[B, *spatial, Hq, ...]`` the head axes that the caller's query has, or ``[1, N, ...]`` of a
        packed batch its own."""
        if self.inputs.shapes is not None:
            return out.squeeze(0)
        return out if len(self.head_shape) == 1 else out.unflatten(self.window.rank + 1, self.head_shape)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes,
    stride: Axes,
    dilation: Axes,
    is_causal: bool | Sequence[bool],
    scale: float | Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: float | Tensor | None,
    is_periodic: bool | Sequence[bool] = False,
    key_mask: Tensor | None = None,
) -> Call:
    """Check all arguments of a user and convert them to the canonical form that the implementations take.

    Checks that depend only on shapes, strides, dtypes, devices and options of axes are made once for each combination.
    Under autocast, query, key, value and registers get its dtype.
    """
    query, key, value, additional_keys, additional_values = tensors = as_autocast(
        query, key, value, additional_keys, additional_values
    )
    axes = kernel_size, stride, dilation, is_causal, is_periodic
    signature, accepted = (None, None) if torch.compiler.is_compiling() else _recall(tensors, axes)
    rank = _check_user_form(tensors, axes) if accepted is None else accepted.window.rank
    head_shape = query.shape[rank + 1 : -1]
    if accepted is None or not accepted.has_plain_heads:
        plain = len(head_shape) == 1 and not has_one_head(tensors)
        tensors = query, key, value, additional_keys, additional_values = canonical_heads(tensors, head_shape)
        accepted = accepted or _accept(signature, Accepted(_check_canonical_form(tensors, axes), plain))
    register_keys, register_values = expand_registers(additional_keys, additional_values, query.shape[0])
    factor, sink, sink_value = _scalars(query, scale, sink)
    mask = None if key_mask is None else check_key_mask(key_mask, key.shape[:-2], key.device)
    inputs = Inputs(query, key, value, register_keys, register_values, sink, mask)
    return Call(inputs, _options(sink_value, accepted.window, factor), accepted.window, head_shape)


def prepare_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shapes: Tensor,
    kernel_size: Axes,
    stride: Axes,
    dilation: Axes,
    is_causal: bool | Sequence[bool],
    scale: float | Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    sink: float | Tensor | None,
    is_periodic: bool | Sequence[bool] = False,
    key_mask: Tensor | None = None,
    *,
    of: str = "query",
) -> Call:
    """:func:`prepare` for a packed batch: ``query [N, Hq, D]`` and ``shapes [samples, rank]`` on the CPU.

    ``of`` is the argument of the user that has the tokens.
    """
    query, key, value, additional_keys, additional_values = as_autocast(
        query, key, value, additional_keys, additional_values
    )
    check_tensors(query=query, key=key, value=value)
    check_pair(additional_keys, additional_values)
    if query.ndim != 3:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; expected [N, heads, head_dim], the tokens of all samples"
        )
    samples, rank = shapes.shape
    window = make_window((longest_axis(dilation),) * rank, kernel_size, stride, dilation, is_causal, is_periodic)
    query, key, value = (t[None] for t in (query, key, value))
    check_qkv(query, key, value, 1, may_be_empty=2)
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key has {key.shape[1]} tokens, but query {query.shape[1]}: both hold those of all samples")
    _check_groups(query, key, value)
    tensors = query, key, value, additional_keys, additional_values
    query, key, value, additional_keys, additional_values = canonical_heads(tensors, query.shape[2:3])
    registers = check_additional(additional_keys, additional_values, query, key, value, samples)
    factor, sink, sink_value = _scalars(query, scale, sink)
    if key_mask is not None:
        key_mask = check_key_mask(key_mask, key.shape[1:2], key.device)[None]
    inputs = Inputs(query, key, value, *registers, sink, key_mask, shapes)
    call = Call(inputs, _options(sink_value, window, factor), window, query.shape[-2:-1])
    if not torch.compiler.is_compiling():  # in a compiled graph the operator checks what the shapes are
        packing_of(shapes, query.shape[1], window, "shapes", of)
    return call


def _options(sink_value: float | None, window: Window, scale: float) -> Options:
    w = window
    periodic = w.is_periodic if any(w.is_periodic) else ()
    return Options(sink_value, w.kernel_size, w.stride, w.dilation, w.is_causal, scale, periodic)


def as_autocast(
    query: Tensor, key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None
) -> Tensors:
    """The tensors as PyTorch's attention gets them under autocast: in its dtype, but for those in fp64."""
    tensors = query, key, value, additional_keys, additional_values
    if not isinstance(query, Tensor) or not autocasts(query.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value, *registers = (_cast(x, dtype) for x in tensors)
    return query, key, value, registers[0], registers[1]


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (torch.float64, dtype):
        return x  # what is no tensor is refused later
    if torch.compiler.is_compiling() or x.is_nested or x.layout != torch.strided or 0 not in x.stride():
        return x.to(dtype)
    if is_tracked((x,)):  # every entry of what was expanded gets its own gradient
        return x.to(dtype)
    # `to` would copy every expanded head.
    return (
        x[tuple(slice(n if stride else 1) for n, stride in zip(x.shape, x.stride(), strict=True))]
        .to(dtype)
        .expand_as(x)
    )


def _scalars(
    query: Tensor, scale: float | Tensor | None, sink: float | Tensor | None
) -> tuple[float, Tensor | None, float | None]:
    """The factor on scores, and the sink as a tensor with a logit a head or as one number."""
    factor = query.shape[-1] ** -0.5 if scale is None else check_scale(scale, query.dtype)
    checked = check_sink(sink, query)
    return (factor, checked, None) if isinstance(checked, Tensor) else (factor, None, checked)


class Accepted(NamedTuple):
    """What is known of a call whose signature passed the checks."""

    window: Window
    has_plain_heads: bool
    """Whether there is one axis of heads, and its KV heads are not a single one that was expanded."""


_accepted: dict[Hashable, Accepted] = {}
"""Keys are the signatures of calls."""
MAX_ACCEPTED = 1024


def _accept(signature: Hashable, accepted: Accepted) -> Accepted:
    if signature is not None:
        if len(_accepted) >= MAX_ACCEPTED:
            _accepted.clear()
        _accepted[signature] = accepted
    return accepted


def _recall(tensors: Sequence[object], axes: Sequence[object]) -> tuple[Hashable, Accepted | None]:
    """The signature of a call, which is all that the checks depend on, and what is known if it has passed them.

    The signature is None if it would hold something that cannot be hashed, such as a list or a symbolic size, or if a
    tensor does not have one shape and strides, as nested and sparse tensors do not.
    """
    layouts: list[Hashable] = []
    try:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                layouts.append((type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
            elif tensor is None:
                layouts.append(None)
            else:
                return None, None
        # The types belong to the signature, as True == 1, but True is no kernel size and 1 is no value of is_causal.
        types = [tuple(map(type, axis)) if isinstance(axis, tuple) else type(axis) for axis in axes]
        signature = (*layouts, *axes, *types)
        return signature, _accepted.get(signature)
    except (TypeError, RuntimeError):
        return None, None


def _check_user_form(tensors: Tensors, axes: _AxisOptions) -> int:
    """Check the arguments in the form in which the user gives them; returns the number of spatial axes."""
    query, key, value, additional_keys, additional_values = tensors
    names = "kernel_size", "stride", "dilation", "is_causal", "is_periodic"
    check_tensors(query=query, key=key, value=value)
    check_pair(additional_keys, additional_values)
    by_name: dict[str, object] = dict(zip(names, axes, strict=True))
    rank = _spatial_rank(query, **by_name)
    check_qkv(query, key, value, rank)
    head_shape = query.shape[rank + 1 : -1]
    if len(head_shape) == 1:
        _check_groups(query, key, value)
        return rank
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[-3] != head_shape[0] or tensor.shape[-2] not in (1, head_shape[1]):
            raise ValueError(
                f"{name} has head axes {tuple(tensor.shape[-3:-1])}; "
                f"expected {tuple(head_shape)} as query [B, *spatial, Hkv, G, D] has{_told_rank(rank, by_name)}"
                + (", or G = 1" if head_shape[1] != 1 else "")
            )
    return rank


def _told_rank(rank: int, axis_arguments: Mapping[str, object]) -> str:
    """How many spatial axes a query has, and which argument says so."""
    count = f" with {rank} spatial ax{'i' if rank == 1 else 'e'}s"
    for name, value in axis_arguments.items():
        if is_per_axis(value):
            return f"{count}, as many as {name}={shorten(value)} has entries"
    return count


def _check_canonical_form(tensors: Tensors, axes: _AxisOptions) -> Window:
    """Make the checks that need tensors with one axis of heads."""
    query, key, value, additional_keys, additional_values = tensors
    window = make_window(key.shape[1:-2], *axes)
    _check_grids(query.shape[1:-2], key.shape[1:-2], window)
    check_additional(additional_keys, additional_values, query, key, value)
    return window


def _check_grids(spatial: torch.Size, key_spatial: torch.Size, window: Window) -> None:
    """Check what a window may be if queries lie on another grid than keys."""
    if spatial == key_spatial:
        return
    for name, values, default in (
        ("stride", window.stride, 1),
        ("dilation", window.dilation, 1),
        ("is_causal", window.is_causal, False),
    ):
        if any(value != default for value in values):
            raise ValueError(
                f"query has the spatial axes {tuple(spatial)} and key {tuple(key_spatial)}: queries on another grid "
                f"than keys take no {name}, got {values}; leave it out, or give tensors with equal axes"
            )


def _check_groups(query: Tensor, key: Tensor, value: Tensor) -> None:
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads % kv_heads or kv_heads != value.shape[-2]:
        raise ValueError(
            f"query heads must be a multiple of KV heads: query has {heads}, key {kv_heads}, value {value.shape[-2]}"
        )


def _spatial_rank(query: Tensor, **axis_arguments: object) -> int:
    """Number of spatial axes: the length of the tuples, else that of ``query [B, *spatial, H, D]``."""
    entries = {name: len(a) for name, a in axis_arguments.items() if is_per_axis(a)}
    if len(set(entries.values())) > 1:
        raise ValueError(f"{', '.join(entries)} disagree on the number of axes: {entries}")
    rank = next(iter(entries.values()), min(query.ndim - 3, 3))
    if not 1 <= rank <= 3 or query.ndim not in (rank + 3, rank + 4):
        given = "".join(f"; {name} has {count} entries" for name, count in entries.items())
        if query.ndim == max(rank, 1) + 2:
            given += "; if the last axis holds all heads, give each its own: query.unflatten(-1, (heads, head_dim))"
        raise ValueError(
            f"query has {query.ndim} axes {tuple(query.shape)}; expected [B, *spatial, heads, head_dim] with 1 to 3 "
            f"spatial axes{given}"
        )
    return rank


def with_bias(call: Call, rpb: Tensor | None) -> Call:
    """The call with a checked relative position bias, a table for the heads that the caller gave."""
    if rpb is None:
        return call
    check_tensors(rpb=rpb)
    query, key = call.inputs.query, call.inputs.key
    if query.shape[1:-2] != key.shape[1:-2]:
        raise ValueError(
            f"rpb is a bias on distances in keys, but query lies on another grid: its axes are "
            f"{tuple(query.shape[1:-2])}, those of key {tuple(key.shape[1:-2])}; leave rpb out"
        )
    expected = (query.shape[-2], *(2 * k - 1 for k in call.window.kernel_size))
    if rpb.shape != expected:
        raise ValueError(
            f"rpb has shape {tuple(rpb.shape)}; expected {expected}, [heads, 2 * kernel_size - 1 on every axis]"
        )
    if rpb.device != query.device:
        raise ValueError(f"rpb is on {rpb.device}, but query is on {query.device}")
    if not rpb.is_floating_point():
        raise ValueError(f"rpb has dtype {rpb.dtype}; expected a floating point dtype")
    return call._replace(inputs=call.inputs._replace(rpb=rpb))
