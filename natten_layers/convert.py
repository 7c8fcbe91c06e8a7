"""Multi-head checkpoints to grouped-query ones: ``python -m natten_layers.convert SOURCE TARGET --group-size 4``.

Each new KV head is the mean of the heads that it replaces, the start for uptraining of Ainslie et al. 2023
(https://arxiv.org/abs/2305.13245). The result is meant to be trained on for a few per cent of the original steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor

from .modules.attention import NeighborhoodGQA
from .modules.hdit import HDiT
from .modules.hdit_config import HDiTConfig, LevelConfig

__all__ = ["convert", "convert_file", "mha_to_gqa"]


def mha_to_gqa(state: Mapping[str, Tensor], num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
    """The state dict of a :class:`NeighborhoodGQA` with fewer KV heads, by mean-pooling those that it has.

    Args:
        state: of a :class:`NeighborhoodGQA` or a NATTEN module, multi-head or grouped. Not changed.
        num_heads: its query heads.
        num_kv_heads: KV heads of the result, a divisor of those in ``state``.

    Returns:
        ``qkv`` with pooled rows of keys and values. Of per-head axial frequencies (``rope.freqs``) the first of each
        group remain, since a key turns with all query heads that it meets. The rest is ``state``'s own.

    Raises:
        ValueError: heads that do not divide, or no state dict of such a module.
    """
    if missing := [name for name in ("qkv.weight", "proj.weight") if name not in state]:
        raise ValueError(
            f"state has no {' and no '.join(missing)}; it holds {', '.join(sorted(state)[:8]) or 'nothing'}"
        )
    width, rows = state["proj.weight"].shape[1], state["qkv.weight"].shape[0]
    if width % num_heads:
        raise ValueError(f"proj.weight has {width} columns, not a multiple of num_heads {num_heads}")
    head_dim = width // num_heads
    old_kv_heads = (rows - width) // (2 * head_dim)
    if num_kv_heads < 1 or old_kv_heads % num_kv_heads:
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
    """A copy of an HDiT in which ``group_size`` KV heads have become one.

    Args:
        model: not changed.
        group_size: one for all levels with attention, or one per level; 1 leaves a level as it is.

    Raises:
        ValueError: a level whose KV heads the group size does not divide.
    """
    levels = model.config.levels
    sizes = [group_size] * len(levels) if isinstance(group_size, int) else list(group_size)
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
    if size < 1 or kv_heads % size:
        raise ValueError(f"level {index} has {kv_heads} KV heads, which group_size {size} does not divide")
    return level if size == 1 else dataclasses.replace(level, num_kv_heads=kv_heads // size)


def convert_file(
    source: str | PathLike[str],
    target: str | PathLike[str],
    group_size: int | Sequence[int],
    config: HDiTConfig | None = None,
) -> tuple[HDiT, HDiT]:
    """:func:`convert` from file to file, in the source's precision; returns both models.

    Args:
        config: for a source that holds none.

    Raises:
        ValueError: as :func:`convert` and :meth:`HDiT.from_pretrained`; the target is then untouched.
    """
    model = HDiT.from_pretrained(source, config=config, dtype=None)
    converted = convert(model, group_size)
    converted.save_pretrained(target)
    return model, converted


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m natten_layers.convert", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("source", help="an HDiT: safetensors, k-diffusion training checkpoint, or directory")
    parser.add_argument("target", help="safetensors file, or directory to hold model.safetensors")
    parser.add_argument(
        "--group-size",
        type=int,
        nargs="+",
        required=True,
        metavar="G",
        help="KV heads to pool: one for all levels or one each",
    )
    parser.add_argument("--config", help="JSON config, for a source that holds none")
    options = parser.parse_args(arguments)
    sizes = options.group_size[0] if len(options.group_size) == 1 else options.group_size
    try:
        config = HDiTConfig.from_json(options.config) if options.config else None
        models = convert_file(options.source, options.target, sizes, config)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        parser.exit(1, f"{parser.prog}: error: {' '.join(str(error).split()) or type(error).__name__}\n")
    except KeyboardInterrupt:
        print(f"interrupted; {options.target} is as it was", file=sys.stderr)
        return 130
    before, after = (sum(p.numel() for p in model.parameters()) for model in models)
    heads = [level.num_kv_heads or level.num_heads for level in models[1].config.levels if level.attention != "none"]
    print(f"{options.target}: {after:,} parameters, from {before:,}; KV heads by level: {heads}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
