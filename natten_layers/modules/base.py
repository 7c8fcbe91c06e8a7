"""Helpers shared by the modules: constant buffers, initialisation, and the test whether a module may be fused.

Type checkers take the result of a call of one of torch's modules for Any. So public modules declare their ``__call__``.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..checks import is_finite_number, no_tensor
from ..wording import shorten

__all__ = [
    "Constants",
    "Embedding",
    "allocate",
    "at_least_fp32",
    "check_count",
    "check_last_axis",
    "check_probability",
    "computed",
    "default_dtype",
    "is_plain",
    "reset_children",
]


def check_count(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {shorten(value)}")


def check_last_axis(x: object, dim: int) -> None:
    """Raise a ValueError unless the layer's input ``x`` is a tensor ``[..., dim]``."""
    if not isinstance(x, Tensor):
        raise no_tensor("x", x)
    if x.shape[-1:] != (dim,):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., {dim}]")


def check_probability(name: str, value: object) -> float:
    if not is_finite_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {shorten(value)}")
    return float(value)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for angles, time embeddings and norm statistics: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def default_dtype() -> torch.dtype:
    """The dtype of constants for which none is given: torch's default dtype, but at least float32."""
    return at_least_fp32(torch.get_default_dtype())


class Constants(nn.Module):
    """A module whose own buffers are constants: they stay in fp32 or better, whatever dtype a model is cast to.

    In half precision, frequencies would be so inexact that distant positions move. Calls that change a module's
    tensors (``to``, ``half``, ``to_empty``) therefore change the buffers' device and may widen them to fp64, but they
    neither narrow nor lose their values.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            moved = self._buffers[name]
            assert moved is not None
            # A buffer on the meta device has no values that could be kept.
            source = moved if values.is_meta else values
            self._buffers[name] = source.to(moved.device, at_least_fp32(moved.dtype))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name, buffer in self._buffers.items():
            if buffer is not None:  # with assign=True the state dict's own tensor, in whatever dtype
                self._buffers[name] = buffer.to(at_least_fp32(buffer.dtype))


def computed(make: Callable[[torch.device | str | None], Tensor], device: torch.device | str | None) -> Tensor:
    """``make(device)``; for the meta device made on the CPU, as torch imports its compiler for arithmetic there.

    That takes seconds, and models that are loaded from files are built on the meta device.
    """
    chosen = torch.get_default_device() if device is None else torch.device(device)
    return make("cpu").to(chosen) if chosen.type == "meta" else make(device)


class Embedding(nn.Embedding):
    """Draws no numbers on the meta device, for which torch imports its compiler, too."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def reset_children(module: nn.Module) -> None:
    """Call ``reset_parameters`` of the modules inside ``module``, in the order in which they were made.

    From the same seed, this draws the same random numbers as the constructors did.
    """
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            reset_children(child)


def allocate(module: nn.Module, device: torch.device) -> None:
    """Replace all tensors of a module on the meta device by new ones on ``device``, whose values are arbitrary.

    ``nn.Module.to_empty`` does so too, but fails under ``FakeTensorMode``, where it exchanges the contents of tensors.
    """
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device=device)
            setattr(child, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, torch.empty_like(buffer, device=device))


def is_plain(module: nn.Module, forward: Callable[..., object]) -> bool:
    """Whether a call of ``module`` runs exactly ``forward`` and nothing else.

    Only then may the caller compute the same in a fused kernel without calling the module. Hooks must see the call, and
    offloading and sharding make the module's tensors available only while it lasts.
    """
    return (
        type(module).forward is forward
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and not _has_any_global_hook()
    )
