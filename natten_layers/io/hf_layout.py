"""How the files of a family name and lay out a model's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .hf_families import FAMILIES, Family
from .mxfp4 import dequantize
from .tensors import Info

__all__ = ["VISION", "File", "Stored", "our_tensors", "to_family_names"]

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""parts of names that say how a model was trained: in parallel, compiled, sharded, with checkpointing"""
VISION = ("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector.")
LANGUAGE = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.lm_head.": "lm_head."}
"""where composite models keep the language model, today and in older files"""
BODY = "embed_tokens", "layers", "norm"
"""what ``model`` is made of, which stands alone in files of models without a projection to tokens, of embeddings say"""
KINDS = {"": "weight", "_bias": "bias", "_blocks": "weight"}
"""what the names of stacked tensors end in; ``_blocks`` are in MXFP4 and have ``_scales`` beside them"""
SCALES = "_scales"


class File(Protocol):
    """An open file of tensors."""

    @property
    def path(self) -> object: ...
    @property
    def infos(self) -> Mapping[str, Info]: ...
    def read(self, name: str) -> Tensor: ...


class Stored(NamedTuple):
    """Where a tensor is: all of one in a file, or a part of it."""

    file: File
    name: str
    part: tuple[int | slice, ...] = ()
    """index of what is meant of it"""
    transposed: bool = False
    scales: Stored | None = None
    """those of a tensor in MXFP4"""

    def info(self) -> Info:
        info = self.file.infos[self.name]
        shape = tuple(self._part(torch.empty(info.shape, device="meta")).shape)
        if self.scales is None:
            return info._replace(shape=shape)
        if info.kind != "uint8" or self.scales.info() != Info(shape[:-1], "uint8") or shape[-1] != 16:
            raise ValueError(
                f'{self.file.path}: "{self.name}" is {info.kind} {info.shape} and its scales are '
                f"{self.scales.info().kind} {self.scales.info().shape}; expected uint8 [..., G, 16] and [..., G]"
            )
        return Info((*shape[:-2], 2 * prod(shape[-2:])), "bfloat16")

    def read(self) -> Tensor:
        """The tensor, contiguous. It is a view of the file where all of it or rows of it are wanted."""
        tensor = self._part(self.file.read(self.name))
        return (tensor if self.scales is None else dequantize(tensor, self.scales.read())).contiguous()

    def _part(self, tensor: Tensor) -> Tensor:
        tensor = tensor[self.part] if self.part else tensor
        return tensor.mT if self.transposed else tensor


def our_tensors(files: Sequence[File], rows: Mapping[str, int], family: Family | None) -> Iterator[tuple[str, Stored]]:
    """The model's names of all that files hold, and where it is.

    Args:
        files: the open files.
        rows: of projections that the family's files may hold as one, by name, and the number of experts.
        family: decides on names; None leaves them as they are.

    Raises:
        ValueError: tensors that stand for several have other sizes than those; the message names file and tensor.
    """
    everything = {name: Stored(file, name) for file in files for name in file.infos}
    for file in files:
        for name in file.infos:
            ours = _our_name(name, family)
            if family is None:
                yield ours, Stored(file, name)
            elif (match := _stacked(ours, family)) is not None:
                yield from _of_experts(match, Stored(file, name), everything, rows["experts"], family)
            else:
                yield from _rows(ours, Stored(file, name), rows, family)


def _our_name(name: str, family: Family | None) -> str:
    """What a tensor of a file is called in the model."""
    ours = {theirs: ours for ours, theirs in family.names.items()} if family is not None else {}
    name = ".".join(ours.get(part, part) for part in name.split(".") if part not in WRAPPERS)
    for prefix, own in LANGUAGE.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return f"model.{name}" if family is not None and name.split(".")[0] in BODY else name


def _rows(name: str, stored: Stored, rows: Mapping[str, int], family: Family) -> Iterator[tuple[str, Stored]]:
    """The tensors whose rows one in a file has."""
    fused = next((part for part in name.split(".") if part in family.fused), None)
    if fused is None:
        yield name, stored
        return
    parts = family.fused[fused]
    _check_length(stored, sum(rows[part] for part in parts), "rows")
    start = 0
    for part in parts:
        yield name.replace(fused, part), stored._replace(part=(slice(start, start + rows[part]),))
        start += rows[part]


def _stacked(name: str, family: Family) -> re.Match[str] | None:
    """Prefix, name and ending of a tensor that holds a projection of all experts."""
    names, endings = "|".join(family.stacked), "|".join([*KINDS, SCALES])
    return re.fullmatch(rf"(.*\.experts)\.({names})({endings})", name) if names else None


def _of_experts(
    match: re.Match[str], stored: Stored, everything: Mapping[str, Stored], experts: int, family: Family
) -> Iterator[tuple[str, Stored]]:
    """The projections of single experts in a tensor of all of them.

    Weights are stacked as ``[experts, out, in]``, several projections one after the other. Where channels take turns
    (``Family.in_turn``), weights are ``[experts, in, out]``, biases ``[experts, out]`` and what is in MXFP4 ``[experts,
    out, in / 32, 16]``.
    """
    prefix, name, ending = match.groups()
    if ending == SCALES:  # read with their blocks
        return
    _check_length(stored, experts, "experts")
    scales = None
    if ending == "_blocks":
        scales = everything.get(stored.name.removesuffix(ending) + SCALES)
        if scales is None:
            raise ValueError(f'{stored.file.path}: "{stored.name}" has no "{name}{SCALES}" beside it')
        _check_length(scales, experts, "experts")
    parts, transposed = family.stacked[name], family.in_turn and ending == ""
    rows = stored.file.infos[stored.name].shape[1] // len(parts)
    for expert in range(experts):
        for turn, part in enumerate(parts):
            channels = slice(turn, None, len(parts)) if family.in_turn else slice(turn * rows, (turn + 1) * rows)
            index = (expert, slice(None), channels) if transposed else (expert, channels)
            yield (
                f"{prefix}.{expert}.{part}.{KINDS[ending]}",
                stored._replace(
                    part=index,
                    transposed=transposed,
                    scales=None if scales is None else scales._replace(part=index),
                ),
            )


def _check_length(stored: Stored, expected: int, of: str) -> None:
    shape = stored.file.infos[stored.name].shape
    if shape[:1] != (expected,):
        raise ValueError(
            f'{stored.file.path} does not fit its config: "{stored.name}" has shape {shape}, but the config asks for '
            f"{expected} {of}"
        )


def to_family_names(weights: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """A model's tensors as the files of a family hold them."""
    family = FAMILIES.get(model_type)
    if family is None:
        return dict(weights)
    first = {parts[0]: fused for fused, parts in family.fused.items()}
    others = {part for parts in family.fused.values() for part in parts[1:]}
    stored = {}
    for name, tensor in _stack_experts(weights, family).items():
        *path, module, kind = name.split(".")
        if module in others:
            continue
        if module in first:
            parts = family.fused[first[module]]
            tensor = torch.cat([weights[name.replace(f"{module}.{kind}", f"{part}.{kind}")] for part in parts])
        path = [family.names.get(part, part) for part in (*path, first.get(module, module))]
        stored[".".join((*path, kind))] = tensor
    return stored


def _stack_experts(weights: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors with the projections of experts in those that hold them all, as :func:`_of_experts` reads them."""
    first = {parts[0]: name for name, parts in family.stacked.items()}
    stacked = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|bias)", name) if family.stacked else None
        if match is None:
            stacked[name] = tensor
            continue
        prefix, expert, module, kind = match.groups()
        if int(expert) or module not in first:
            continue
        experts = []
        while (own := f"{prefix}.{len(experts)}") + f".{module}.{kind}" in weights:
            parts = [weights[f"{own}.{part}.{kind}"] for part in family.stacked[first[module]]]
            in_turn = torch.stack([part.mT if kind == "weight" else part for part in parts], -1).flatten(-2)
            experts.append(in_turn if family.in_turn else torch.cat(parts))
        ending = next(ending for ending, of in KINDS.items() if of == kind)
        stacked[f"{prefix}.{first[module]}{ending}"] = torch.stack(experts)
    return stacked
