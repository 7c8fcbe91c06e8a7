"""Attention processors that stand in for others, and how those come back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import diffusers
from torch import nn

__all__ = ["VERSION", "ModelHook", "Replacement", "modules_of", "unpatch"]

VERSION = f"diffusers {diffusers.__version__}"
"""for errors about something that is not as this integration knows it"""


@runtime_checkable
class Replacement(Protocol):
    """An attention processor of ours."""

    replaced: Any
    """the processor that it stands in for"""

    def release(self) -> None:
        """Undo what was done to the model for this processor's sake."""


HAS_WINDOW = "_natten_layers_has_window"
"""What layers know of themselves. A hook that knew them would take them all into copies and pickles of one block."""


class ModelHook:
    """Base class of objects whose methods are hooks of a model and of its parts."""

    read: Any
    """the method that is a forward pre-hook of the model itself"""

    def release(self) -> None:
        """Remove the hook."""
        raise NotImplementedError

    @staticmethod
    def all_of(module: nn.Module) -> list[ModelHook]:
        """Those of which a model or a part of it has hooks."""
        owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
        return [owner for owner in owners if isinstance(owner, ModelHook)]

    @staticmethod
    def of(model: nn.Module) -> ModelHook | None:
        """The one of a model; parts of it, which have hooks of the same object, have none of their own."""
        hooks = model._forward_pre_hooks.values()
        return next((owner for owner in ModelHook.all_of(model) if owner.read in hooks), None)


def modules_of(model: Any) -> Iterator[nn.Module]:
    """All modules of a model, or of a pipeline's models."""
    if isinstance(model, nn.Module):
        yield from model.modules()
    elif isinstance(components := getattr(model, "components", None), dict):
        for component in components.values():
            if isinstance(component, nn.Module):
                yield from component.modules()
    else:
        raise ValueError(f"expected a model or a pipeline of diffusers, got {type(model).__name__}")


def unpatch(model: Any) -> int:
    """Put back the attention processors that ``patch`` and ``neighborhood`` replaced.

    Args:
        model: a model or a pipeline of diffusers.

    Returns:
        In how many layers.
    """
    count = 0
    for module in modules_of(model):
        if ModelHook.of(module):  # which outlives processors that somebody else replaced
            for part in module.modules():  # blocks that were copied have another one
                for hook in ModelHook.all_of(part):
                    hook.release()
        processor: Any = getattr(module, "processor", None)
        if isinstance(processor, Replacement):
            processor.release()
            module.set_processor(processor.replaced)  # pyright: ignore[reportCallIssue]
            module.__dict__.pop(HAS_WINDOW, None)
            count += 1
    return count
