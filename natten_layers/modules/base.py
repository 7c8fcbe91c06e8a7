"""What modules of this package share: buffers that are constants, initialisation, and calls that may be fused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["Constants", "at_least_fp32", "default_dtype", "is_plain", "reset_children"]


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Of angles, embeddings of time and statistics: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def default_dtype() -> torch.dtype:
    """Of constants that are made where no dtype is given: torch's default, but never half precision."""
    return at_least_fp32(torch.get_default_dtype())


class Constants(nn.Module):
    """A module whose own buffers are constants: they stay in fp32 or better, whatever dtype a model is cast to.

    A cast to half precision would move every far position. What changes a module's tensors (``to``, ``half``,
    ``to_empty``) therefore decides on the buffers' device and on fp64 alone, and the values stay.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            moved = self._buffers[name]
            assert moved is not None
            # On the meta device there are no values to keep.
            source = moved if values.is_meta else values
            self._buffers[name] = source.to(moved.device, at_least_fp32(moved.dtype))
        return self


def reset_children(module: nn.Module) -> None:
    """Initialise what the modules inside ``module`` own, in the order in which they were made.

    So it draws the random numbers that making them drew.
    """
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            reset_children(child)


def is_plain(module: nn.Module, forward: Callable[..., object]) -> bool:
    """Whether a call of ``module`` runs its class's ``forward`` and nothing else.

    Only then may its caller do the same in another way, fused with what follows. Hooks want to see the call; offloading
    and sharding put the module's tensors in place for no longer than it lasts.
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
