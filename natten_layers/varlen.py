"""Attention over samples of different shapes that follow each other in one tensor, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .arguments import Axes, Call, prepare_packed
from .checks import check_flags
from .geometry import is_per_axis
from .operations import Impl, attend, attend_with_lse
from .wording import shorten, with_type

__all__ = ["Shapes", "neighborhood_attention_varlen", "packed_shapes", "prepare_samples"]

Shapes = Tensor | Sequence[Sequence[int]]

_host_copies = WeakTensorKeyDictionary()
"""Tensors on a device, and for each its version and its copy in the host's memory."""


@overload
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shapes: Shapes | None,
    kernel_size: Axes,
    *,
    cu_seqlens: Tensor | None = None,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    is_periodic: bool | Sequence[bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shapes: Shapes | None,
    kernel_size: Axes,
    *,
    cu_seqlens: Tensor | None = None,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    is_periodic: bool | Sequence[bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shapes: Shapes | None,
    kernel_size: Axes,
    *,
    cu_seqlens: Tensor | None = None,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    is_periodic: bool | Sequence[bool] = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    sink: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`neighborhood_attention` of samples of different shapes, packed without padding and in one launch.

    Sample ``i`` has ``prod(shapes[i])`` tokens, in raster order, right behind those of sample ``i - 1``. It is computed
    as if it were alone, with windows cut to it: on an axis of length ``L`` the kernel size is
    ``min(kernel_size, L // dilation)``, but at least 1, and the stride at most that. Samples may be empty. A periodic
    axis wraps at each sample's own length, which ``dilation`` must divide.

    The kernels need the shapes in the host's memory, where the number of programs is worked out. A list or a tensor on
    the CPU is there. One on a GPU is copied, which waits for the device, once for each tensor that is not changed in
    place. Kernels read tables of the samples, which are made or copied there once for each packing.

    In compiled functions give a tensor, whose values and number of samples may then change: for another list, graphs
    would be compiled anew. Kernels are part of the graph. PyTorch's computation is not: the graph breaks around it, so
    on the eager path ``fullgraph=True`` raises.

    Args:
        query: ``[N, Hq, D]``, the tokens of all samples; or, on one axis, a nested tensor ``[samples, j, Hq, D]`` with
            ``layout=torch.jagged`` like key and value, and ``shapes=None``.
        key: ``[N, Hkv, D]``, ``Hq % Hkv == 0``.
        value: ``[N, Hkv, Dv]``.
        shapes: lengths of each sample's 1, 2 or 3 axes: a list of tuples, or an integer tensor ``[samples, axes]``.
        kernel_size, stride, dilation, is_causal, is_periodic, scale, sink, return_lse, impl: see
            :func:`neighborhood_attention`.
        cu_seqlens: instead of ``shapes`` on one axis, cumulative lengths: an integer tensor ``[samples + 1]`` that
            begins with 0, as other libraries have it.
        additional_keys: registers, ``[samples or 1, R, Hkv, D]``, visible to every query of their sample.
        additional_values: ``[samples or 1, R, Hkv, Dv]``; given exactly when ``additional_keys`` is.
        key_mask: ``[N]``, bool, True where a key may be seen.

    Returns:
        ``out [N, Hq, Dv]``, or ``(out, lse)`` with ``lse [N, Hq]``; nested tensors if query is one.

    Raises:
        ValueError: an argument does not fit, as shapes that do not add up to ``N`` tokens.
        RuntimeError: ``impl="fused"``, but the fused kernels cannot run.
    """
    check_flags(return_lse=return_lse)
    call, offsets = prepare_samples(
        query, key, value, shapes, cu_seqlens, kernel_size, stride, dilation, is_causal, scale, additional_keys,
        additional_values, sink, is_periodic, key_mask,
    )  # fmt: skip
    results = attend_with_lse(call, impl) if return_lse else (attend(call, impl),)
    if offsets is not None:
        results = tuple(torch.nested.nested_tensor_from_jagged(x, offsets) for x in results)
    return cast("tuple[Tensor, Tensor]", results) if return_lse else results[0]


def prepare_samples(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shapes: Shapes | None,
    cu_seqlens: Tensor | None,
    kernel_size: Axes,
    *options: Any,
) -> tuple[Call, Tensor | None]:
    """The checked call, with the offsets of the samples if query, key and value are nested tensors.

    ``options`` are those of :func:`natten_layers.arguments.prepare_packed`, from ``stride`` on.
    """
    offsets = None
    if any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
        offsets = cu_seqlens = _offsets(query, key, value, shapes, cu_seqlens)
        query, key, value = (t.values() for t in (query, key, value))
    tokens = query.shape[0] if isinstance(query, Tensor) and query.ndim == 3 else None
    axes = kernel_size, *options
    rank = next((len(option) for option in axes if is_per_axis(option)), 1)
    sizes = packed_shapes(shapes, cu_seqlens, rank, tokens)
    return prepare_packed(query, key, value, sizes, kernel_size, *options), offsets


def packed_shapes(
    shapes: Shapes | None,
    cu_seqlens: Tensor | None,
    rank: int,
    tokens: int | None = None,
    of: str = "query",
    name: str = "cu_seqlens",
) -> Tensor:
    """``[samples, axes]``, int64 in the host's memory, from what a user gave.

    Args:
        rank: the number of axes if ``shapes`` is a list without a sample.
        tokens: how many the argument ``of`` has, with which ``cu_seqlens`` must end; None if that is not known.
        name: what the user calls ``cu_seqlens``.
    """
    if (shapes is None) == (cu_seqlens is None):
        got = "neither" if shapes is None else "both"
        raise ValueError(f"give either shapes or, on one axis, cu_seqlens; got {got}")
    if cu_seqlens is not None:
        _check_integers(name, cu_seqlens, 1, "[samples + 1], beginning with 0")
        ends = _on_host(cu_seqlens)
        if not torch.compiler.is_compiling():  # a compiled graph does not know the values
            if len(ends) == 0 or ends[0] != 0 or (ends.diff() < 0).any():
                raise ValueError(f"{name} must begin with 0 and not decrease, got {shorten(ends.tolist(), 200)}")
            if tokens is not None and ends[-1] != tokens:
                raise ValueError(f"{name} ends with {int(ends[-1])}, but {of} has {tokens} tokens")
        return ends.diff()[:, None]
    if isinstance(shapes, Tensor):
        _check_integers("shapes", shapes, 2, "[samples, axes] (cumulative lengths are given as cu_seqlens)")
        found = _on_host(shapes)
    else:
        found = _from_list(shapes, rank)
    if not 1 <= found.shape[1] <= 3:
        raise ValueError(f"shapes are of {found.shape[1]} axes; expected 1 to 3")
    return found


def _from_list(shapes: object, rank: int) -> Tensor:
    """``rank`` is the number of axes if there is no sample."""
    # An iterator would be empty for the second layer that it is given to.
    if not is_per_axis(shapes):
        raise ValueError(
            "shapes must be a list with a tuple for each sample or an integer tensor [samples, axes], "
            f"got {with_type(shapes)}" + ("; pass torch.as_tensor(shapes)" if hasattr(shapes, "__array__") else "")
        )
    # Batches may have hundreds of samples, for which the host would take longer than a launch does.
    entries = [shape if type(shape) is tuple else tuple(shape) if is_per_axis(shape) else shape for shape in shapes]
    ranks = {len(shape) if isinstance(shape, tuple) else -1 for shape in entries} or {rank}
    if len(ranks) != 1 or -1 in ranks or not all(_is_length(n) for shape in entries for n in shape):
        raise _bad_sample(entries)
    return torch.tensor(entries, dtype=torch.int64).reshape(len(entries), ranks.pop())


def _bad_sample(entries: Sequence[Any]) -> ValueError:
    """The error for the first sample that is no tuple of lengths, or has another number of axes than the one before."""
    for i, shape in enumerate(entries):
        if not isinstance(shape, tuple):
            return ValueError(
                "shapes must have a tuple for each sample, the lengths of its axes, "
                f"but that of sample {i} is {with_type(shape)}"
            )
        for length in shape:
            if not _is_length(length):
                return ValueError(
                    f"shapes must be the lengths of axes, but that of sample {i}, {shorten(shape)}, has "
                    f"{with_type(length)}"
                )
        if i and len(shape) != len(entries[i - 1]):
            return ValueError(
                f"shapes must have equally many axes, but that of sample {i} is {shape} and that of sample {i - 1} "
                f"{entries[i - 1]}"
            )
    raise AssertionError(entries)


def _is_length(value: object) -> bool:
    """Whether a value is an integer of 64 bits; one of a graph is a symbol."""
    if isinstance(value, torch.SymInt):
        return True
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        return False
    return -(1 << 63) <= int(value) < 1 << 63


def _check_integers(name: str, tensor: object, ndim: int, expected: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name} must be an integer tensor {expected}, got {with_type(tensor)}; pass torch.as_tensor({name})"
        )
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must be an integer tensor {expected}, got one of shape {tuple(tensor.shape)}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be an integer tensor {expected}, got dtype {tensor.dtype}")


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor as int64 in the host's memory. Copying it from a device waits for that, so copies are kept."""
    if tensor.device.type == "cpu" or torch.compiler.is_compiling() or tensor.is_inference():
        return tensor.cpu().long().contiguous()
    known = _host_copies.get(tensor)
    if known is None or known[0] != tensor._version:
        known = _host_copies[tensor] = tensor._version, tensor.cpu().long().contiguous()
    return known[1]


def _offsets(query: Tensor, key: Tensor, value: Tensor, shapes: Shapes | None, cu_seqlens: Tensor | None) -> Tensor:
    """Cumulative lengths of jagged tensors, which must have one structure."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or not tensor.is_nested or tensor.layout != torch.jagged:
            raise ValueError(f"{name} must be a nested tensor with layout=torch.jagged, as all of query, key and value")
        if tensor.ndim != 4 or _ragged(tensor)._ragged_idx != 1 or _ragged(tensor).lengths() is not None:
            raise ValueError(f"{name} must be [samples, j, heads, head_dim] without holes between its samples")
    if shapes is not None or cu_seqlens is not None:
        raise ValueError("query is a nested tensor, which has lengths of its own: give neither shapes nor cu_seqlens")
    offsets, *others = (_ragged(tensor).offsets() for tensor in (query, key, value))
    for name, own in zip(("key", "value"), others, strict=True):
        if own is not offsets and not torch.equal(own, offsets):
            raise ValueError(f"{name} and query have samples of different lengths")
    return offsets


def _ragged(tensor: Tensor) -> Any:
    """A nested tensor, whose methods the stubs of :class:`Tensor` do not know."""
    return tensor
