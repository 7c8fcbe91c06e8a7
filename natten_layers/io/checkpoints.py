"""Files of HDiT: k-diffusion's safetensors format and training checkpoints in, safetensors out.

This module knows file formats and names of tensors, not models, so that models can import it.
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

from .files import parse_json, replacing
from .schema import shorten
from .tensors import check_fit, info_of, open_safetensors, write_safetensors

__all__ = ["hdit_name", "load_plain", "load_tensors", "read_hdit", "write_hdit"]

WEIGHTS = "model.safetensors"

# Where this library's names differ from k-diffusion's; applied in order to every key.
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
    """The name in k-diffusion's files of a tensor in an HDiT's state dict."""
    for pattern, name in RENAMES:
        key = re.sub(pattern, name, key)
    return key


def read_hdit(path: str | os.PathLike[str]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The JSON config, if the file holds one, and the tensors of a checkpoint, by their names in the file.

    Args:
        path: a safetensors file, a k-diffusion training checkpoint, of which the EMA weights are taken, or a directory
            with a ``model.safetensors``. The content decides, not the suffix, and nothing in it is executed.

    Raises:
        ValueError: neither format, damaged, or without what it should hold; the message names the file.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    with path.open("rb") as file:
        start = file.read(4)
    # torch.save writes a zip archive, long ago a bare pickle
    return _read_training(path) if start[:2] in (b"PK", b"\x80\x02") else _read_safetensors(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    with open_safetensors(path) as file:
        text = file.metadata.get("config")
        config = None if text is None else parse_json(text, f"{path}: the config in its metadata")
        return config, {name: file.read(name) for name in file.infos}


def load_plain(path: Path) -> Any:
    """What ``torch.save`` wrote of tensors and plain objects. Nothing in the file is executed.

    The checksums of its entries are verified first, which files from before PyTorch 1.6 do not have.

    Raises:
        ValueError: damaged, or with other objects; the message names the file.
    """
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
        if is_archive:
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # bytes that are missing or changed surface as almost any type
        # torch surrounds its reason by the advice to load the file with the right to execute what it holds.
        lines = map(str.strip, str(error).rpartition("WeightsUnpickler error:")[2].splitlines())
        reason = next((line for line in lines if line and "weights_only" not in line), type(error).__name__)
        raise ValueError(f"{path} is damaged, or holds objects that are not plain tensors: {reason}") from error


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that is not as ``torch.save`` writes it: plain entries, each with its checksum.

    torch neither looks at the checksums nor at how much memory compressed entries will take.
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
    # A few stored elements can stand for any number of tensors of any size, by strides of 0.
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
    """Give an HDiT all of its tensors, by k-diffusion's names, or change nothing.

    The model may be on the meta device: its tensors are replaced. Parameters become ``dtype``, whatever mix of dtypes
    the file has, or keep the file's for None, which must then be one; buffers, which are constants of the model, are
    kept in fp32 or better.

    Raises:
        ValueError: what :func:`~natten_layers.io.tensors.check_fit` refuses.
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


def write_hdit(
    path: str | os.PathLike[str], model: nn.Module, config: Mapping[str, Any], dtype: torch.dtype | None
) -> Path:
    """Write an HDiT's tensors under k-diffusion's names, with the config in the metadata; returns the file.

    Args:
        path: the file, or a directory (anything not ending in ".safetensors") to hold ``model.safetensors``.
        dtype: of the parameters in the file, None for the model's.

    Raises:
        OSError: it cannot be written; the message names the file, and what was there is untouched.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / WEIGHTS
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        hdit_name(key): tensor.detach().to(dtype if key in parameters else None).cpu().contiguous()
        for key, tensor in model.state_dict().items()
    }
    # One entry: safetensors writes several in any order, and equal models shall make equal files.
    metadata = {"config": json.dumps(config)}
    with replacing(path) as temporary:
        write_safetensors(tensors, temporary, metadata, final=path)
    return path
