"""The weights that a run starts from, made by another run, maybe for other classes or with fewer KV heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from natten_layers import HDiTConfig
from natten_layers.io.checkpoints import hdit_name, load_tensors

CLASSES = "class_emb.weight"
"""the embedding of classes, in the model and in files"""


def kv_heads(plan: HDiTConfig) -> list[int]:
    return [level.num_kv_heads or level.num_heads for level in plan.levels]


def with_kv_heads(plan: HDiTConfig, stored: HDiTConfig, path: Path) -> HDiTConfig:
    """The model's config with the KV heads of the weights in ``path``, where ``natten_layers.convert`` has pooled them.

    Where more differs than those, the weights do not fit, and loading them says so.

    Raises:
        ValueError: weights with more KV heads than the config asks for, which are to be pooled first.
    """
    own = plan.levels
    if [(level.width, level.d_head) for level in own] != [(level.width, level.d_head) for level in stored.levels]:
        return plan
    here, there = kv_heads(plan), kv_heads(stored)
    if any(theirs > ours for ours, theirs in zip(here, there, strict=True)):
        raise ValueError(
            f"{path} has {there} KV heads on its levels, and the config asks for {here}: "
            "pool them with natten-layers-convert, or change num_kv_heads"
        )
    if here == there:
        return plan
    levels = zip(own, stored.levels, strict=True)
    return replace(plan, levels=[replace(level, num_kv_heads=other.num_kv_heads) for level, other in levels])


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, reset: Sequence[str]) -> None:
    """Give the model the tensors of ``path``, but for what ``reset`` names.

    Raises:
        ValueError: they do not fit.
    """
    own = model.state_dict()
    tensors = with_own(model, tensors, reset)
    try:
        load_tensors(model, tensors, path, torch.float32)
    except ValueError as error:
        shapes = {state[CLASSES].shape if CLASSES in state else None for state in (own, tensors)}
        if len(shapes) == 1:
            raise
        raise ValueError(f"{error} To train on other classes, or on none, give --reset class_emb.") from error


def with_own(model: nn.Module, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """A file's tensors, but for those called ``names`` or ``NAME.anything``, which are the model's own.

    Raises:
        ValueError: neither the model nor the file has one of a name.
    """
    own = {hdit_name(key): tensor for key, tensor in model.state_dict().items()}

    def named(key: str, name: str) -> bool:
        return key == name or key.startswith(f"{name}.")

    for name in names:
        if not any(named(key, name) for key in (*own, *tensors)):
            heads = sorted({key.partition(".")[0] for key in own})
            raise ValueError(f"--reset {name}: the model has no tensors of that name; it has {', '.join(heads)}")
    kept = {key: tensor for key, tensor in tensors.items() if not any(named(key, name) for name in names)}
    return kept | {key: tensor for key, tensor in own.items() if any(named(key, name) for name in names)}
