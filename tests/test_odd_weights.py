"""Damaged and hostile files of weights, chosen by hand: every fault raises a ValueError that names the file."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import forget_peak_memory, peak_memory
from odd_files import DEEP, DIFFUSION, LONG, copied, edit_json, refused
from odd_files import good as good
from safetensors.torch import load_file, save_file
from torch import Tensor

from natten_layers import DecoderLM, HDiT
from natten_layers.io import checkpoints, hf

# --- tensors


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


ODD = [torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
NAME = {"hdit": "mid_level.0.self_attn.out_proj.weight", "llama": "model.layers.1.self_attn.o_proj.weight"}


@pytest.mark.parametrize("dtype", ODD, ids=str)
@pytest.mark.parametrize("target", [None, torch.float32])
def test_weights_are_floating_point(dtype: torch.dtype, target: torch.dtype | None, good: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "odd.safetensors", json.dumps(DIFFUSION.to_json())
    tensors = load_file(good / "hdit.safetensors")
    tensors[NAME["hdit"]] = tensors[NAME["hdit"]].to(dtype)
    if not dtype.is_complex:
        save_file(tensors, path, metadata={"config": config})
        refused(lambda: HDiT.from_pretrained(path, dtype=target), "odd.safetensors", NAME["hdit"], "dtype")
        folder = copied(good, tmp_path, "llama")
        own = load_file(folder / hf.WEIGHTS)
        save_file({**own, NAME["llama"]: own[NAME["llama"]].to(dtype)}, folder / hf.WEIGHTS)
        refused(lambda: DecoderLM.from_pretrained(folder, dtype=target), str(folder), NAME["llama"], "dtype")
    torch.save({"model_ema": tensors, "config": DIFFUSION.to_json()}, tmp_path / "odd.pth")
    refused(lambda: HDiT.from_pretrained(tmp_path / "odd.pth", dtype=target), "odd.pth", NAME["hdit"], "dtype")


def test_a_mix_of_dtypes_needs_to_be_told_which(good: Path, tmp_path: Path) -> None:
    path, tensors = tmp_path / "mixed.safetensors", load_file(good / "hdit.safetensors")
    tensors[NAME["hdit"]] = tensors[NAME["hdit"]].half()
    save_file(tensors, path, metadata={"config": json.dumps(DIFFUSION.to_json())})
    refused(lambda: HDiT.from_pretrained(path, dtype=None), "mixed.safetensors", NAME["hdit"], "float16", "give dtype=")
    assert {p.dtype for p in HDiT.from_pretrained(path, dtype=torch.float64).parameters()} == {torch.float64}
    folder = copied(good, tmp_path, "llama")
    own = load_file(folder / hf.WEIGHTS)
    save_file({**own, NAME["llama"]: own[NAME["llama"]].half()}, folder / hf.WEIGHTS)
    refused(lambda: DecoderLM.from_pretrained(folder), str(folder), NAME["llama"], "give dtype=")
    assert {p.dtype for p in DecoderLM.from_pretrained(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    wrong: list[Any] = [torch.int8, "bfloat16", "cpu"]
    for dtype in wrong:
        refused(lambda dtype=dtype: DecoderLM.from_pretrained(folder, dtype=dtype), "dtype must be one of", repr(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "bfloat16", "cpu"])
def test_no_file_is_written_in_a_dtype_that_none_is_read_in(good: Path, tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "cast.safetensors"
    model = HDiT.from_pretrained(good / "hdit.safetensors")
    refused(lambda: model.save_pretrained(path, dtype=dtype), "dtype must be one of", repr(dtype))
    assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: torch.zeros(1).expand(tensor.shape[0], 2**40),
        lambda tensor: 3,
        lambda tensor: None,
    ],
    ids=["meta", "sparse", "expanded", "a number", "null"],
)
def test_odd_tensors_in_training_checkpoints(change: Callable[[Tensor], object], good: Path, tmp_path: Path) -> None:
    content, path = torch.load(good / "hdit.pth"), tmp_path / "odd.pth"
    content["model_ema"][NAME["hdit"]] = change(content["model_ema"][NAME["hdit"]])
    torch.save(content, path)
    refused(lambda: HDiT.from_pretrained(path), "odd.pth")


@pytest.mark.parametrize(
    "config", [3, [DIFFUSION.to_json()], {1: 2}, {"model": 10**5000}, {"model": {}}], ids=lambda c: str(type(c))
)
def test_odd_configs_in_training_checkpoints(config: Any, good: Path, tmp_path: Path) -> None:
    content, path = torch.load(good / "hdit.pth"), tmp_path / "odd.pth"
    torch.save({**content, "config": config}, path)
    refused(lambda: HDiT.from_pretrained(path), "odd.pth")


def test_tensors_in_memory_are_checked_too() -> None:
    model = HDiT(DIFFUSION)
    tensors = {checkpoints.hdit_name(name): tensor.to("meta") for name, tensor in model.state_dict().items()}
    refused(lambda: checkpoints.load_tensors(model, tensors, "memory", torch.float32), "memory", "on meta")


@pytest.mark.parametrize(("depth", "word"), [(10**9, "of at most 4096"), (4000, "asks for 4004 layers")])
def test_modules_are_not_built_for_layers_that_the_file_cannot_have(
    depth: int, word: str, good: Path, tmp_path: Path
) -> None:
    path, config = tmp_path / "deep.safetensors", DIFFUSION.to_json()
    config["model"]["depths"] = [1, depth]
    save_file(load_file(good / "hdit.safetensors"), path, metadata={"config": json.dumps(config)})
    forget_peak_memory()
    before = peak_memory()
    refused(lambda: HDiT.from_pretrained(path), "deep.safetensors", word)
    assert peak_memory() - before < 20 * 2**20


@pytest.mark.parametrize("width", [2**20, 2**31 - 1])
def test_wide_models_are_compared_before_they_take_memory(width: int, good: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "wide.safetensors", DIFFUSION.to_json()
    config["model"] |= {"widths": [width, 16], "self_attns": [{"type": "none"}] * 2}
    save_file(load_file(good / "hdit.safetensors"), path, metadata={"config": json.dumps(config)})
    refused(lambda: HDiT.from_pretrained(path), "wide.safetensors")


# --- archives


def rezip(source: Path, target: Path, *, compression: int = zipfile.ZIP_STORED, content: bytes | None = None) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) if content is None or not name.endswith("data/0") else content)
    return target


def test_training_checkpoints_that_inflate(good: Path, tmp_path: Path) -> None:
    path = rezip(good / "hdit.pth", tmp_path / "same.pth")
    HDiT.from_pretrained(path)  # an unchanged archive that is written again still loads
    bomb = rezip(good / "hdit.pth", tmp_path / "bomb.pth", compression=zipfile.ZIP_DEFLATED, content=bytes(10**7))
    assert bomb.stat().st_size < 200000
    refused(lambda: HDiT.from_pretrained(bomb), "bomb.pth", "is compressed")
    refused(lambda: checkpoints.load_plain(bomb), "bomb.pth", "is compressed")


def test_turned_bits_in_a_training_checkpoint_are_seen(good: Path, tmp_path: Path) -> None:
    """In the middle of a tensor, only the checksum can reveal flipped bits."""
    path = copied(good, tmp_path, "hdit.pth")
    data = bytearray(path.read_bytes())
    tensor = torch.load(path)["model_ema"][NAME["hdit"]]
    place = bytes(data).index(tensor.numpy().tobytes()) if tensor.any() else len(data) // 2
    data[place + 5] ^= 1
    path.write_bytes(data)
    refused(lambda: HDiT.from_pretrained(path), "hdit.pth", "checksum")


# --- shards


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "{absolute}", "folder/../../outside.safetensors", "..\\outside.safetensors",
     "C:outside.safetensors", "", ".", "..", "a\x00.safetensors", "\ud800.safetensors", "x.bin", 3, None, [], {}],
    ids=repr,
)  # fmt: skip
def test_shards_lie_beside_their_index(name: Any, good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path, "sharded")
    shard = sorted(folder.glob("*.safetensors"))[0]
    outside = Path(shutil.copy(shard, tmp_path / "outside.safetensors"))
    (folder / "folder").mkdir()
    name = str(outside) if name == "{absolute}" else name

    def edit(index: dict[str, Any]) -> None:
        where = index["weight_map"]
        index["weight_map"] = {tensor: name if file == shard.name else file for tensor, file in where.items()}

    edit_json(folder / hf.INDEX, edit)
    refused(lambda: DecoderLM.from_pretrained(folder), hf.INDEX, "beside the index")


@pytest.mark.parametrize(
    "content",
    ['{"weight_map": []}', '{"weight_map": {}}', "{}", "[]", DEEP, f'{{"a": {LONG}}}'],
    ids=lambda text: text[:20],
)
def test_odd_indexes(content: str, good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path, "sharded")
    (folder / hf.INDEX).write_text(content)
    refused(lambda: DecoderLM.from_pretrained(folder), hf.INDEX)


def test_a_tensor_in_two_shards_is_refused(good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path, "sharded")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    refused(lambda: DecoderLM.from_pretrained(folder), "twice", first.name, second.name)
