"""Tensors of files, compared with what a model expects before any is put in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["Info", "SafeTensors", "check_fit", "info_of", "make_on_meta", "open_safetensors", "write_safetensors"]

M = TypeVar("M", bound=nn.Module)

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""dtypes of weights, as safetensors and as torch call them"""

FEW_LAYERS = 1000
"""that are built in no time, so that the message can say which tensors are missing"""


class Info(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    kind: str
    """``float32`` and the like where it can be a weight; other dtypes, layouts and devices are no kinds of weights"""


def info_of(tensor: Tensor) -> Info:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided:
        kind = f"{kind} in the layout {tensor.layout}"
    return Info(tuple(tensor.shape), f"{kind} without data (on meta)" if tensor.is_meta else kind)


class SafeTensors:
    """An open safetensors file. On the CPU a tensor that is read stays mapped to it."""

    def __init__(self, path: os.PathLike[str], file: Any) -> None:
        self.path, self._file = path, file
        self.metadata: Mapping[str, str] = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        self.infos = {
            name: Info(tuple(one.get_shape()), FLOATS.get(dtype := str(one.get_dtype()), dtype))
            for name, one in slices.items()
        }

    def read(self, name: str) -> Tensor:
        if (kind := self.infos[name].kind) not in FLOATS.values():
            raise ValueError(f'{self.path}: "{name}" is of dtype {kind}; weights are {_floats()}')
        return self._file.get_tensor(name)


@contextmanager
def open_safetensors(path: os.PathLike[str]) -> Iterator[SafeTensors]:
    """Open a file for as long as the context lasts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or no safetensors file; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield SafeTensors(path, file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, truncated or no safetensors file: {error}") from error


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str], *, final: Path) -> None:
    """Write a file.

    Args:
        final: the name under which the user knows the file, if ``path`` is a temporary one.

    Raises:
        OSError: it cannot be written, for example as the disk is full.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {final}: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"cannot write {final}: {error.strerror or error}") from error


def make_on_meta(make: Callable[[], M], path: object, *, layers: int, tensors: int) -> M:
    """What ``make`` builds, without memory for its tensors.

    Modules themselves take memory and time. As every layer has at least one tensor, a config that asks for a great many
    layers, and for more than its file has tensors, is refused before the first one is built.

    Raises:
        ValueError: such a config, or sizes of which no tensor can be made; the message names the file.
    """
    if layers > max(tensors, FEW_LAYERS):
        raise ValueError(f"{path} does not fit its config, which asks for {layers} layers: it holds {tensors} tensors")
    try:
        with torch.device("meta"):
            return make()
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path}: no model can be built of its config: {error}") from error


def check_fit(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Info],
    path: object,
    *,
    dtype: torch.dtype | None,
    parameters: Collection[str],
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Refuse tensors that are not exactly the model's.

    Args:
        expected: the model's, by their names in the file; they may be on meta.
        found: the file's.
        dtype: what parameters will become. None keeps the file's dtype, which must then be one.
        parameters: the names in ``expected`` that are parameters, not buffers.
        ignored: names in the file that are not looked at, where ``expected`` has none of them.

    Raises:
        ValueError: missing, unknown or misshapen tensors, or such as can be no weights; the message names the file, the
            tensors, the shapes and the dtypes.
    """
    if dtype is not None and info_of(torch.empty(0, dtype=dtype)).kind not in FLOATS.values():
        raise ValueError(f"dtype must be one of {_floats()}, got {dtype}")
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
    """One tensor of each dtype, if there are several."""
    firsts = {kind: name for name, kind in reversed(kinds.items())}
    if len(firsts) < 2:
        return []
    return ["its parameters have several dtypes: " + ", ".join(f'"{name}" is {kind}' for kind, name in firsts.items())]


def _floats() -> str:
    *others, last = FLOATS.values()
    return f"{', '.join(others)} or {last}"
