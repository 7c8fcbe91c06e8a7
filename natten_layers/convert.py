"""Convert multi-head to grouped-query checkpoints; the command ``natten-layers-convert`` does so with files,
and so does ``python -m natten_layers.convert``.

Each new KV head is the mean of the heads that it replaces, from which Ainslie et al. 2023 start uptraining
(https://arxiv.org/abs/2305.13245). Train the result for a few per cent of the original steps.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor

from .modules.attention import NeighborhoodGQA
from .modules.base import check_count
from .modules.hdit import HDiT
from .modules.hdit_config import HDiTConfig, LevelConfig

__all__ = ["convert", "convert_file", "mha_to_gqa"]


def mha_to_gqa(state: Mapping[str, Tensor], num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
    """The state dict of a :class:`NeighborhoodGQA` with fewer KV heads, each the mean of several in ``state``.

    Args:
        state: state dict of a :class:`NeighborhoodGQA` or a NATTEN module, multi-head or grouped. It is not changed.
        num_heads: number of query heads in ``state``.
        num_kv_heads: number of KV heads of the result, a divisor of the number in ``state``.

    Returns:
        A state dict in which ``qkv`` has pooled rows of keys and values. Of axial RoPE frequencies per head
        (``rope.freqs``) those of the first head of each group remain, as a key must be rotated like all query heads
        that read it. All other tensors are those of ``state``.

    Raises:
        ValueError: a number of heads does not divide another, or ``state`` belongs to another module.
    """
    if missing := [name for name in ("qkv.weight", "proj.weight") if name not in state]:
        raise ValueError(
            f"state has no {' and no '.join(missing)}; it holds {', '.join(sorted(state)[:8]) or 'nothing'}"
        )
    check_count("num_heads", num_heads)
    check_count("num_kv_heads", num_kv_heads)
    width, rows = state["proj.weight"].shape[1], state["qkv.weight"].shape[0]
    if width % num_heads:
        raise ValueError(f"proj.weight has {width} columns, not a multiple of num_heads {num_heads}")
    for name in ("sink", "qk_scale", "rpb"):
        if name in state and (heads := len(state[name])) != num_heads:
            raise ValueError(f"num_heads must be the {heads} query heads that {name} in state has, got {num_heads}")
    head_dim = width // num_heads
    old_kv_heads, rest = divmod(rows - width, 2 * head_dim)
    if rest or old_kv_heads < 1:
        raise ValueError(
            f"qkv.weight has {rows} rows, which are no keys and values of whole heads beside {width} of queries with "
            f"num_heads {num_heads}; give the number of query heads in state"
        )
    if "rope.freqs" in state and (heads := len(state["rope.freqs"])) not in (1, old_kv_heads):
        raise ValueError(
            f"num_heads {num_heads} gives {old_kv_heads} KV heads, but rope.freqs in state has {heads}; give the "
            "number of query heads in state"
        )
    if old_kv_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide the {old_kv_heads} KV heads of the state dict, got {num_kv_heads}")

    def pool(part: Tensor) -> Tensor:
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        return wide.unflatten(0, (num_kv_heads, -1, head_dim)).mean(1).flatten(0, 1).to(part.dtype)

    converted = dict(state)
    for name in ("qkv.weight", "qkv.bias"):
        if name in state:
            query, key, value = state[name].split([width, old_kv_heads * head_dim, old_kv_heads * head_dim])
            converted[name] = torch.cat([query, pool(key), pool(value)])
    if "rope.freqs" in state:
        converted["rope.freqs"] = state["rope.freqs"][:: old_kv_heads // num_kv_heads]
    return converted


def convert(model: HDiT, group_size: int | Sequence[int]) -> HDiT:
    """A copy of an HDiT in which each ``group_size`` KV heads have become one.

    Args:
        model: the model to copy; it is not changed.
        group_size: one int for all levels with attention, or one per level; 1 leaves a level as it is.

    Raises:
        ValueError: the group size does not divide the KV heads of a level.
    """
    levels = model.config.levels
    sizes = list(group_size) if isinstance(group_size, Sequence) else [group_size] * len(levels)
    for size in sizes:
        check_count("group_size", size)
    if len(sizes) != len(levels):
        raise ValueError(f"group_size has {len(sizes)} entries {sizes}, but the model has {len(levels)} levels")
    grouped = [_group(level, size, index) for index, (level, size) in enumerate(zip(levels, sizes, strict=True))]
    with torch.device("meta"):
        converted = HDiT(dataclasses.replace(model.config, levels=grouped), checkpointing=model.checkpointing)
    state = model.state_dict()
    for name, layer in converted.named_modules():
        if isinstance(layer, NeighborhoodGQA):
            own = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}
            own = mha_to_gqa(own, layer.num_heads, layer.num_kv_heads)
            state.update({f"{name}.{key}": tensor for key, tensor in own.items()})
    converted.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
    return converted.train(model.training)


def _group(level: LevelConfig, size: int, index: int) -> LevelConfig:
    if level.attention == "none":
        return level
    kv_heads = level.num_kv_heads or level.num_heads
    if kv_heads % size:
        raise ValueError(
            f"level {index} has {kv_heads} KV heads, which group_size {size} does not divide; give a divisor, one for "
            "all levels or one each"
        )
    return level if size == 1 else dataclasses.replace(level, num_kv_heads=kv_heads // size)


def convert_file(
    source: str | PathLike[str],
    target: str | PathLike[str],
    group_size: int | Sequence[int],
    config: HDiTConfig | None = None,
) -> tuple[HDiT, HDiT]:
    """:func:`convert` a file, in its precision, to another file; returns the model before and after.

    Args:
        config: the configuration, if the source file holds none.

    Raises:
        ValueError: as for :func:`convert` and :meth:`HDiT.from_pretrained`; the target is then not written.
    """
    model = HDiT.from_pretrained(source, config=config, dtype=None)
    converted = convert(model, group_size)
    converted.save_pretrained(target)
    return model, converted


if __name__ == "__main__":  # the commands stand above the library, which knows them here only, by name
    from natten_layers_cli.launch import convert as command

    sys.exit(command())
