"""Calls for which compiled code leaves its graph.

Importing this module loads ``torch.compile``, which takes longer than all the rest of the library and sets variables of
the environment. So :func:`natten_layers.kernels.ops.define.call_uncompiled` imports it only where somebody compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import torch

__all__ = ["forward_mode", "packed"]

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


@torch.compiler.disable(reason="torch.compile drops the forward-mode derivative of the fused kernels, or fails")
def forward_mode(function: Callable[[*Ts], R], *args: *Ts) -> R:
    return function(*args)


@torch.compiler.disable(reason="PyTorch computes a packed batch shape by shape, which would be a graph for each batch")
def packed(function: Callable[[*Ts], R], *args: *Ts) -> R:
    return function(*args)
