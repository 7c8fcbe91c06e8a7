"""Hugging Face model directories: ``config.json`` and weights, read and written without transformers."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..wording import shorten
from .checkpoints import load_plain
from .files import check_directory_name, read_json, replacing
from .hf_config import CONFIG, config_from_hf, config_to_hf, read_config
from .hf_families import FAMILIES, Family, text_config
from .hf_layout import VISION, File, Stored, our_tensors, to_family_names
from .tensors import Info, check_fit, check_writable, info_of, open_safetensors, write_safetensors

__all__ = [
    "CONFIG",
    "EMBEDDING",
    "HEAD",
    "INDEX",
    "TORCH_INDEX",
    "TORCH_WEIGHTS",
    "WEIGHTS",
    "Weights",
    "config_from_hf",
    "config_to_hf",
    "open_weights",
    "read_config",
    "save",
    "to_family_names",
]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TorchFile:
    """The tensors of a file that ``torch.save`` wrote, as ``SafeTensors`` has them.

    Raises:
        ValueError: damaged, or with anything but tensors; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        tensors = load_plain(path)
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
        ):
            raise ValueError(f"{path} is no file of weights: it holds other objects than tensors by name")
        # A few stored elements can stand for any number of tensors of any size, by strides of 0. Tied tensors are one.
        distinct = {
            (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape): tensor.nbytes
            for tensor in tensors.values()
            if tensor.layout is torch.strided and not tensor.is_meta
        }
        if sum(distinct.values()) > path.stat().st_size:
            raise ValueError(f"{path}: its tensors are {sum(distinct.values())} bytes long, more than the file")
        self.path, self._tensors = path, tensors
        self.infos = {name: info_of(tensor) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class Weights:
    """The open weight files of a directory, whose tensors are looked at before they are read.

    Args:
        directory: the directory to name in error messages.
        files: the open files.
        tied: whether the config says that the output projection is the embedding.
        rows: of projections that the family's files may hold as one, and the number of experts.
        family: decides on names.
    """

    def __init__(
        self,
        directory: Path,
        files: Sequence[File],
        *,
        tied: bool,
        rows: Mapping[str, int],
        family: Family | None,
    ) -> None:
        self.directory = directory
        self._files: dict[str, Stored] = {}
        for name, stored in our_tensors(files, rows, family):
            if (other := self._files.get(name)) is not None:
                raise ValueError(f'{directory} holds "{name}" twice: in {other.file.path} and {stored.file.path}')
            self._files[name] = stored
        self.tied = tied and not self._differ(EMBEDDING, HEAD)
        """Whether the output projection is the embedding: the config says so, and the files do not hold two that
        differ."""

    @property
    def infos(self) -> dict[str, Info]:
        return {name: stored.info() for name, stored in self._files.items()}

    def _differ(self, first: str, second: str) -> bool:
        if first not in self._files or second not in self._files:
            return False
        if self._files[first].info() != self._files[second].info():
            return True
        return not torch.equal(self._files[first].read(), self._files[second].read())

    def fill(self, model: nn.Module, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Replace ``model``'s tensors, which may be on the meta device, by those of the files.

        The names, shapes and dtypes of all tensors are checked before the first one is read. Each is read once. On the
        CPU, tensors that need no conversion are memory-mapped.

        Args:
            model: the module to fill.
            device: device of the tensors.
            dtype: dtype of the tensors. None keeps the files' dtype, which must be the same for all parameters.

        Raises:
            ValueError: the tensors are refused by :func:`~natten_layers.io.tensors.check_fit`.
        """
        expected = model.state_dict()
        # Some tools store a tied tensor under the name of the projection instead of the embedding.
        source = {name: name for name in expected}
        if self.tied and EMBEDDING in expected and EMBEDDING not in self._files and HEAD in self._files:
            source[EMBEDDING] = HEAD
        check_fit(
            {source[name]: tensor for name, tensor in expected.items()},
            self.infos,
            self.directory,
            dtype=dtype,
            parameters={source[name] for name, _ in model.named_parameters()},
            # A tied projection may be stored all the same, and old Llama files hold RoPE's frequencies.
            ignored=lambda name: name == HEAD or name.endswith("rotary_emb.inv_freq") or name.startswith(VISION),
        )
        tensors = {name: self._files[stored].read().to(device, dtype) for name, stored in source.items()}
        model.load_state_dict(tensors, assign=True)


@contextmanager
def open_weights(directory: str | os.PathLike[str], *, tied: bool, rows: Mapping[str, int]) -> Iterator[Weights]:
    """Open the weights of a directory for as long as the context lasts.

    Args:
        tied: whether the config says that the output projection is the embedding. As in transformers, the files decide:
            a projection of their own that differs from the embedding is used, and one alone is the embedding too.
        rows: of the projections that files may hold as one, and the number of experts.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a damaged file, an odd index, or a tensor that is there twice.
    """
    directory = Path(directory)
    family = FAMILIES.get(str(text_config(read_json(directory / CONFIG)).get("model_type")))
    with contextlib.ExitStack() as stack:
        files = [
            TorchFile(path) if path.suffix == ".bin" else stack.enter_context(open_safetensors(path))
            for path in _weight_files(directory)
        ]
        yield Weights(directory, files, tied=tied, rows=rows, family=family)


def _weight_files(directory: Path) -> list[Path]:
    """Safetensors files before those of ``torch.save``, and one file before shards."""
    for whole, index in ((WEIGHTS, INDEX), (TORCH_WEIGHTS, TORCH_INDEX)):
        if (directory / whole).is_file():
            return [directory / whole]
        if (directory / index).is_file():
            return _shards(directory / index, Path(whole).suffix)
    raise FileNotFoundError(
        f"{directory} holds none of {WEIGHTS}, {INDEX}, {TORCH_WEIGHTS} and {TORCH_INDEX}; other formats are not read"
    )


def _shards(index: Path, suffix: str) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f'{index} is no index of {suffix} files: "weight_map" is {shorten(shards)}')
    for tensor, name in shards.items():
        # On any system: no folders, no drives, nothing that leads out of the directory.
        if not isinstance(name, str) or not re.fullmatch(rf"[\w.,=+ -]*\{suffix}", name):
            raise ValueError(
                f"{index}: the shard of {shorten(tensor)} is {shorten(name)}; expected the name of a {suffix} file "
                "beside the index"
            )
    directory, names = index.parent, sorted(set(shards.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of the {len(names)} shards in {index.name}: {missing}"
        )
    return [directory / name for name in names]


def save(
    config: DataclassInstance,
    weights: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write ``config.json`` and safetensors files, in several shards if larger than ``max_shard_bytes``.

    All files are first written under temporary names, so that earlier files stay unchanged if writing fails, for
    example because the disk is full. Earlier weight files (``model.safetensors``, ``model-00001-of-00002.safetensors``
    and so on, and their index) that are not overwritten are removed.

    Raises:
        OSError: a file cannot be written; the message names it.
        ValueError: ``directory`` ends like a file, or a tensor is sharded or on the meta device.
    """
    directory = Path(directory)
    check_directory_name(directory)
    check_writable(weights, directory)
    raw = config_to_hf(config)
    weights = to_family_names(weights, raw["model_type"])
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        size = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.detach().contiguous()
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    texts = {CONFIG: json.dumps({**raw, "dtype": dtype}, indent=2) + "\n"}
    if len(shards) > 1:
        size = sum(t.nbytes for t in weights.values())
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        texts[INDEX] = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n"
    with contextlib.ExitStack() as stack:  # whose last file is the first to appear: the weights, and then the texts
        for name, text in texts.items():
            stack.enter_context(replacing(directory / name)).write_text(text, encoding="utf-8")
        for name, shard in zip(names, shards, strict=True):
            temporary = stack.enter_context(replacing(directory / name))
            write_safetensors(shard, temporary, {"format": "pt"}, final=directory / name)
    earlier = {path for path in directory.iterdir() if WEIGHT_FILE.fullmatch(path.name)}
    for stale in {*earlier, directory / INDEX} - {directory / name for name in [*names, *texts]}:
        stale.unlink(missing_ok=True)
