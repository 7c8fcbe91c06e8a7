"""HDiT's files: reading k-diffusion's safetensors files and training checkpoints, and writing safetensors files.

This module handles file formats and names of tensors and imports no model, so that models can import it.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..wording import shorten
from .files import check_directory_name, check_regular, parse_json, replacing
from .tensors import check_dtype, check_fit, check_writable, info_of, open_safetensors, write_safetensors

__all__ = ["hdit_name", "load_plain", "load_tensors", "read_hdit", "save_plain", "write_hdit"]

WEIGHTS = "model.safetensors"

# Patterns that turn this library's parameter names into k-diffusion's. All are applied to every key, in this order.
RENAMES = [
    (r"\.self_attn\.attn\.qkv\.", ".self_attn.qkv_proj."),
    (r"\.self_attn\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.self_attn\.attn\.qk_scale$", ".self_attn.scale"),
    (r"\.self_attn\.attn\.rope\.", ".self_attn.pos_emb."),
    (r"\.self_attn\.attn\.", ".self_attn."),
    (r"\.mlp\.", "."),
    (r"norm\.weight$", "norm.scale"),
]


def hdit_name(key: str) -> str:
    """The name that a tensor of an HDiT's state dict has in k-diffusion's files."""
    for pattern, name in RENAMES:
        key = re.sub(pattern, name, key)
    return key


def read_hdit(path: str | os.PathLike[str]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read a checkpoint.

    Args:
        path: a safetensors file, a k-diffusion training checkpoint, of which the EMA weights are read, or a directory
            with a ``model.safetensors``. The format is recognised by the content, not by the suffix, and no code in a
            file is executed.

    Returns:
        The JSON config, or None if the file holds none, and the tensors by their names in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has neither format, is damaged, or lacks a required entry; the message names the file.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(4)
    # torch.save writes a zip archive; before PyTorch 1.6 it wrote a bare pickle.
    return _read_training(path) if start[:2] in (b"PK", b"\x80\x02") else _read_safetensors(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    with open_safetensors(path) as file:
        text = file.metadata.get("config")
        config = None if text is None else parse_json(text, f"{path}: the config in its metadata")
        return config, {name: file.read(name) for name in file.infos}


def load_plain(path: Path) -> Any:
    """Load a file of tensors and plain Python objects that ``torch.save`` wrote, without executing code from it.

    The checksums of its entries are verified first; files from before PyTorch 1.6 have none.

    Raises:
        ValueError: the file is damaged or holds other objects; the message names it.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
        if is_archive:
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # missing or changed bytes raise exceptions of almost any type
        # Keep torch's reason only: around it, torch advises to load the file in a way that executes its code.
        lines = map(str.strip, str(error).rpartition("WeightsUnpickler error:")[2].splitlines())
        reason = next((line for line in lines if line and "weights_only" not in line), type(error).__name__)
        raise ValueError(f"{path} is damaged, or holds objects that are not plain tensors: {reason}") from error


def save_plain(content: Any, path: Path) -> None:
    """Write tensors and plain Python objects to a file for :func:`load_plain`; it appears whole or not at all.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; the message names it.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:  # opened here, so that its errors are the system's
        torch.save(content, file)


def _check_archive(path: Path) -> None:
    """Raise unless a zip archive has uncompressed entries and correct checksums, as ``torch.save`` writes it.

    torch checks neither the checksums nor how much memory compressed entries would take.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"its entry {shorten(packed[0])} is compressed, which torch.save never does")
        declared, size = sum(entry.file_size for entry in entries), path.stat().st_size
        if declared > size:
            raise ValueError(f"its entries are {declared} bytes long together, more than the file's {size}")
        if (wrong := archive.testzip()) is not None:
            raise ValueError(f"the content of its entry {shorten(wrong)} does not have the checksum written there")


def _read_training(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    content = load_plain(path)
    tensors = content.get("model_ema") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f'{path} is no k-diffusion training checkpoint: it has no entry "model_ema" of tensors')
    # With strides of 0, a few stored elements can claim to be tensors of any size.
    nbytes, size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), path.stat().st_size
    if nbytes > size:
        raise ValueError(f"{path}: its tensors are {nbytes} bytes long together, more than the file's {size}")
    config = content.get("config")
    if not isinstance(config, dict | None):
        raise ValueError(f"{path}: its config is no JSON object, but {shorten(config)}")
    return config, tensors


def load_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str], dtype: torch.dtype | None
) -> None:
    """Replace all tensors of an HDiT by those of a file; the model is unchanged if they do not fit.

    The model may be on the meta device.

    Args:
        model: the HDiT.
        tensors: the file's tensors, by k-diffusion's names.
        path: the file to name in error messages.
        dtype: dtype of the parameters. None keeps the file's dtype, which must be the same for all parameters. Buffers,
            which are constants of the model, stay in fp32 or better.

    Raises:
        ValueError: the tensors are refused by :func:`~natten_layers.io.tensors.check_fit`.
    """
    own = model.state_dict()
    names = {key: hdit_name(key) for key in own}
    buffers = {name for name, _ in model.named_buffers()}
    check_fit(
        {names[key]: tensor for key, tensor in own.items()},
        {name: info_of(tensor) for name, tensor in tensors.items()},
        path,
        dtype=dtype,
        parameters={name for key, name in names.items() if key not in buffers},
    )
    state = {}
    for key, name in names.items():
        wanted = tensors[name].dtype if dtype is None else dtype
        state[key] = tensors[name].to(torch.promote_types(wanted, torch.float32) if key in buffers else wanted)
    model.load_state_dict(state, assign=True)


def hdit_file(path: Path) -> Path:
    """The file that :func:`write_hdit` writes.

    Raises:
        ValueError: ``path`` ends like a file of another format.
    """
    if path.suffix == ".safetensors":
        return path
    check_directory_name(path, "; files that are written end with .safetensors")
    return path / WEIGHTS


def write_hdit(
    path: str | os.PathLike[str], model: nn.Module, config: Mapping[str, Any], dtype: torch.dtype | None
) -> Path:
    """Write an HDiT's tensors under k-diffusion's names, with the config in the metadata.

    Args:
        path: the file, or a directory (any path that does not end in ".safetensors") for ``model.safetensors``.
        model: the HDiT.
        config: its JSON form.
        dtype: dtype of the parameters in the file; None keeps the model's.

    Returns:
        The path of the file.

    Raises:
        OSError: the file cannot be written; the message names it, and an existing file stays unchanged.
        ValueError: ``path`` ends like a file of another format, a tensor is sharded or on the meta device, or ``dtype``
            is none that weights may have.
    """
    check_dtype(dtype)
    path = hdit_file(Path(path))
    state = model.state_dict()
    check_writable(state, path)
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        hdit_name(key): tensor.detach().to(dtype if key in parameters else None).cpu().contiguous()
        for key, tensor in state.items()
    }
    # A single entry, because safetensors writes several in any order, and equal models must give equal files.
    metadata = {"config": json.dumps(config)}
    with replacing(path) as temporary:
        write_safetensors(tensors, temporary, metadata, final=path)
    return path
