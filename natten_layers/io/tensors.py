"""Tensors in files, and their comparison with a model's before any of them is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = [
    "Info",
    "SafeTensors",
    "check_fit",
    "check_writable",
    "info_of",
    "make_on_meta",
    "open_safetensors",
    "write_safetensors",
]

M = TypeVar("M", bound=nn.Module)

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""The dtypes that weights may have: safetensors' names and torch's."""

FLOAT_DTYPES = tuple(getattr(torch, name) for name in FLOATS.values())

KNOWN = {**FLOATS, "U8": "uint8"}
"""Those that are read: bytes may hold quantised weights."""

FEW_LAYERS = 1000
"""Up to this many layers are always built, since that is quick and lets the message name the missing tensors."""


class Info(NamedTuple):
    """Shape and dtype of a tensor, known before its data is read."""

    shape: tuple[int, ...]
    kind: str
    """A value of ``FLOATS`` for a tensor that can be a weight, otherwise a description of what it is."""


def info_of(tensor: Tensor) -> Info:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided:
        kind = f"{kind} in the layout {tensor.layout}"
    return Info(tuple(tensor.shape), f"{kind} without data (on meta)" if tensor.is_meta else kind)


class SafeTensors:
    """An open safetensors file. Tensors that are read on the CPU are memory-mapped views of it."""

    def __init__(self, path: os.PathLike[str], file: Any) -> None:
        self.path, self._file = path, file
        self.metadata: Mapping[str, str] = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        self.infos = {
            name: Info(tuple(one.get_shape()), KNOWN.get(dtype := str(one.get_dtype()), dtype))
            for name, one in slices.items()
        }

    def read(self, name: str) -> Tensor:
        if (kind := self.infos[name].kind) not in KNOWN.values():
            raise ValueError(f'{self.path}: "{name}" is of dtype {kind}; weights are {_floats()}')
        return self._file.get_tensor(name)


@contextmanager
def open_safetensors(path: os.PathLike[str]) -> Iterator[SafeTensors]:
    """Open a safetensors file for the duration of the context.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or not in the safetensors format; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield SafeTensors(path, file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, truncated or no safetensors file: {error}") from error


def check_writable(tensors: Mapping[str, Tensor], path: object) -> None:
    """Raise a ValueError for tensors whose values this process does not have: sharded ones, and those on meta.

    To be called before anything is done with them, as operations on sharded tensors wait for the other processes.
    """
    for name, tensor in tensors.items():
        if type(tensor).__name__ == "DTensor":  # by name, as importing the class would load all of torch.distributed
            raise ValueError(
                f'cannot write {path}: "{name}" is a DTensor, of which this process holds a part. In all processes '
                "call torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True, cpu_offload=True)); in the first, load what it "
                "returns into a model that is not sharded, by load_state_dict(..., assign=True), and save that"
            )
        if tensor.is_meta:
            raise ValueError(f'cannot write {path}: "{name}" is on the meta device and has no values; load weights')


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str], *, final: Path) -> None:
    """Write a safetensors file. Of tensors that share memory, which the format does not know, each is written.

    Args:
        tensors: contiguous tensors by name.
        path: the file to write, usually a temporary one.
        metadata: strings to store in the header.
        final: the name of the file in error messages.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        save_file(_apart(tensors), path, metadata=metadata)
    except SafetensorError as error:  # it wraps what the system says in words, and names a temporary file of its own
        said = re.search(r"I/O error: (.+) \(os error \d+\)", str(error))
        raise OSError(f"cannot write {final}: {said[1] if said else error}") from error
    except OSError as error:
        raise OSError(error.errno, f"cannot write {final}: {error.strerror or error}") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with copies in place of those whose memory an earlier one uses, too."""
    used: set[tuple[torch.device, int]] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = tensor.device, tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in used else tensor
        used.add(memory)
    return apart


def make_on_meta(make: Callable[[], M], path: object, *, layers: int, tensors: int) -> M:
    """The module that ``make`` builds, on the meta device, so that its tensors take no memory.

    Even so, modules take memory and time. Since every layer has at least one tensor, a config that asks for very many
    layers, and for more than its file has tensors, is refused before any layer is built.

    Args:
        make: builds the module.
        path: the file or directory to name in error messages.
        layers: number of layers that the config asks for.
        tensors: number of tensors in the file.

    Raises:
        ValueError: such a config, or sizes for which no tensor can be made; the message names the file.
    """
    if layers > max(tensors, FEW_LAYERS):
        raise ValueError(f"{path} does not fit its config, which asks for {layers} layers: it holds {tensors} tensors")
    try:
        with torch.device("meta"):
            return make()
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path}: no model can be built of its config: {error}") from error


def check_dtype(dtype: object) -> None:
    """Raise a ValueError unless ``dtype`` is None or one of torch's that weights may have; its name is none."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of torch's {_floats()}, got {dtype!r}")


def check_fit(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Info],
    path: object,
    *,
    dtype: torch.dtype | None,
    parameters: Collection[str],
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raise unless a file holds exactly the tensors that a model expects.

    Args:
        expected: the model's tensors by their names in the file; they may be on the meta device.
        found: shapes and dtypes of the file's tensors.
        path: the file or directory to name in the message.
        dtype: the dtype to which parameters will be converted. None keeps the file's dtype, which must then be the same
            for all parameters.
        parameters: the names in ``expected`` that are parameters, not buffers.
        ignored: tells which tensors a file may hold although ``expected`` does not have them.

    Raises:
        ValueError: tensors are missing, unknown, of another shape, or of a dtype that weights cannot have; the message
            names the file, the tensors, the shapes and the dtypes.
    """
    check_dtype(dtype)
    both = [name for name in expected if name in found]
    missing = [f'it lacks "{name}"' for name in expected if name not in found]
    unknown = [f'it has an unknown "{name}"' for name in sorted(found.keys() - expected) if not ignored(name)]
    misshapen = [
        f'"{name}" has shape {found[name].shape}, but the config asks for {tuple(expected[name].shape)}'
        for name in both
        if found[name].shape != tuple(expected[name].shape)
    ]
    mistyped = [
        f'"{name}" is of dtype {found[name].kind}; weights are {_floats()}'
        for name in both
        if found[name].kind not in FLOATS.values()
    ]
    mixed = (
        [] if dtype is not None or mistyped else _mixed({name: found[name].kind for name in both if name in parameters})
    )
    groups = missing, unknown, misshapen, mistyped, mixed
    count = sum(map(len, groups))
    if not count:
        return
    shown = [problem for group in groups for problem in group[:2]]
    rest = f"; and {count - len(shown)} more" if count > len(shown) else ""
    way_out = "Use the config that it was trained with."
    if not missing and not unknown and not misshapen:
        way_out = "Convert it to one floating-point dtype" + (", or give dtype=." if mixed else ".")
    elif not both:
        way_out = "No tensor has a name that the model knows: is there a prefix before them?"
    raise ValueError(f"{path} does not fit its config: {'; '.join(shown)}{rest}. {way_out}")


def _mixed(kinds: dict[str, str]) -> list[str]:
    """A message that names one tensor of each dtype, if there are several dtypes."""
    firsts = {kind: name for name, kind in reversed(kinds.items())}
    if len(firsts) < 2:
        return []
    return ["its parameters have several dtypes: " + ", ".join(f'"{name}" is {kind}' for kind, name in firsts.items())]


def _floats() -> str:
    *others, last = FLOATS.values()
    return f"{', '.join(others)} or {last}"
