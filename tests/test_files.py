"""Damaged and hostile files: every fault raises a ValueError or an OSError that names the file.

Tests first apply faults of each kind that were chosen by hand, then random ones: flipped bits and moved JSON values.
"""

from __future__ import annotations

import ast
import json
import os
import resource
import shutil
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
import torch
from helpers import within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from natten_layers import DecoderLM, DecoderLMConfig, HDiT, HDiTConfig, LevelConfig
from natten_layers.io import checkpoints, hf
from natten_layers.io.files import make_folder, parse_json, read_json, read_short, replacing
from natten_layers.io.schema import check_keys
from natten_layers.kernels.host import tuned
from natten_layers.kernels.host.tiling import ProblemClass, TileConfig

DIFFUSION = HDiTConfig(
    (LevelConfig(1, 16, d_head=8, kernel_size=3), LevelConfig(1, 16, "global", d_head=8)), mapping_width=8
)
LANGUAGE = DecoderLMConfig(
    vocab_size=5, hidden_size=8, intermediate_size=4, num_layers=2, num_heads=2, head_dim=4, max_positions=64
)
PROBLEM = ProblemClass("some GPU", 227 * 1024, (1, 64, 64), (1, 7, 7), 4, 64, 64, 2)
DEEP = "[" * 10**5
LONG = "9" * 5000

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good file of every format."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = HDiT(DIFFUSION)
    model.save_pretrained(folder / "hdit.safetensors")
    tensors = load_file(folder / "hdit.safetensors")
    torch.save({"model_ema": tensors, "config": DIFFUSION.to_json(), "step": 3}, folder / "hdit.pth")
    (folder / "hdit.json").write_text(json.dumps(DIFFUSION.to_json()))
    DecoderLM(LANGUAGE).save_pretrained(folder / "llama")
    DecoderLM(LANGUAGE).save_pretrained(folder / "sharded", max_shard_bytes=500)
    DecoderLM(DecoderLMConfig(**{**vars(LANGUAGE), "sink": "learned", "num_registers": 1})).save_pretrained(
        folder / "own"
    )
    tuned.write_tuned(folder / "configs.json", {("forward", PROBLEM): TileConfig((1, 4, 4), (1, 4, 8), 4, 2, 1)})
    return folder


def copied(good: Path, folder: Path, name: str) -> Path:
    target = folder / name
    if (good / name).is_dir():
        return Path(shutil.copytree(good / name, target, dirs_exist_ok=True))
    return Path(shutil.copy(good / name, target))


def refused(load: Callable[[], object], *words: str) -> None:
    """Check that ``load`` raises a ValueError whose message contains ``words`` and is short enough to read."""
    with pytest.raises(ValueError, match=r".") as error:
        load()
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message) < 2000


def edit_json(path: Path, edit: Edit) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


# --- JSON


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (DEEP, "nested too deep"),
        ('{"a":' * 10**5, "nested too deep"),
        (f'{{"a": {LONG}}}', "integer of 5000 digits"),
        (f'{{"a": -{LONG[:50]}}}', "integer of 51 digits"),
        ("[]", "no JSON object, but []"),
        ("null", "no JSON object, but None"),
        ("", "no JSON"),
        ("{", "no JSON"),
        (b"\xff{}", "no JSON"),
        (b'{"a": "\x00"}', "no JSON"),
        ('{"model": {"a": 1, "b": 2, "a": 3}}', "the key 'a' is there twice, with different values"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_json_that_is_none(text: str | bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: read_json(path), "odd.json", word)
    if text != "":
        refused(lambda: HDiTConfig.from_json(path), "odd.json", word)


def test_json_may_say_the_same_twice(tmp_path: Path) -> None:
    """It is clear what is meant; and NaN, which is no value of JSON but which Python writes, is unequal to itself."""
    (tmp_path / "twice.json").write_text('{"a": 1, "b": NaN, "a": 1}')
    assert read_json(tmp_path / "twice.json").keys() == {"a", "b"}


def test_json_files_have_a_longest_length(tmp_path: Path) -> None:
    with (tmp_path / "long.json").open("wb") as file:
        file.truncate(2**26 + 1)  # a sparse file, which takes no disk space
    refused(lambda: read_json(tmp_path / "long.json"), "long.json is longer than")


@pytest.mark.parametrize("text", [DEEP, f'{{"model": {LONG}}}', "[1]"], ids=["deep", "long", "list"])
def test_configs_in_metadata_are_read_with_the_same_care(text: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(load_file(good / "hdit.safetensors"), path, metadata={"config": text})
    refused(lambda: HDiT.from_pretrained(path), "odd.safetensors: the config in its metadata is no JSON")


# --- configs


def set_in(*keys: Any, to: Any) -> Edit:
    def edit(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return edit


LANGUAGE_EDITS: list[tuple[str, Edit, str]] = [
    ("own", set_in("num_kv_heads", to="1"), '"num_kv_heads"'),
    ("own", set_in("sink", to={}), '"sink"'),
    ("own", set_in("windows", to=[3, "4"]), '"windows"][1]'),
    ("own", set_in("qk_norm", to="yes"), '"qk_norm"'),
    ("own", set_in("norm_eps", to=float("nan")), '"norm_eps"'),
    ("own", set_in("embedding_scale", to=10**39), '"embedding_scale"'),
    ("own", set_in("rope", to={"rope_theta": True}), 'rope["rope_theta"]'),
    ("own", set_in("rope", to={"rope_theta": 1e4, "rope_tipe": "yarn"}), "did you mean 'rope_type'?"),
    ("own", set_in("num_rigisters", to=4), "'num_rigisters' (did you mean 'num_registers'?)"),
    ("own", lambda raw: raw.pop("vocab_size"), "lacks vocab_size"),
    ("own", set_in("vocab_size", to=10**30), '"vocab_size"'),
    ("own", set_in("num_layers", to=10**9), '"num_layers"'),
    ("llama", set_in("num_hidden_layers", to=10**9), '"num_hidden_layers"'),
    ("llama", set_in("num_hidden_layers", to=4000), "asks for 4000 layers"),
    ("llama", set_in("hidden_size", to=2**31 - 1), "does not fit its config"),
    ("llama", lambda raw: raw.update(hidden_size=2**31 - 1, vocab_size=2**31 - 1), "no model can be built"),
    ("llama", set_in("num_key_value_heads", to="1"), '"num_key_value_heads"'),
    ("llama", set_in("hidden_size", to="8"), '"hidden_size"'),
    ("llama", set_in("model_type", to=["llama"]), "model_type"),
    ("llama", set_in("hidden_act", to={}), '"hidden_act"'),
    ("llama", set_in("rope_parameters", to=[1]), '"rope_parameters"'),
    ("llama", set_in("rope_parameters", to={"full_attention": 3}), '"rope_parameters"'),
    ("llama", set_in("rope_parameters", to={"rope_type": {}}), '"rope_type"'),
    ("llama", set_in("rope_parameters", to={"rope_type": "yarn", "rope_theta": 1, "factor": 2.0}), "built"),
    ("llama", set_in("layer_types", to=[[], []]), '"layer_types"'),
    ("llama", set_in("layer_types", to=5), '"layer_types"'),
    ("llama", set_in("eos_token_id", to=["a"]), '"eos_token_id"'),
    ("llama", set_in("attention_bias", to="false"), '"attention_bias"'),
    ("llama", set_in("is_causal", to=False), "is_causal=False"),
]


@pytest.mark.parametrize(
    ("name", "edit", "word"), LANGUAGE_EDITS, ids=lambda value: value if type(value) is str else ""
)
def test_odd_language_configs(name: str, edit: Edit, word: str, good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path, name)
    edit_json(folder / hf.CONFIG, edit)
    refused(lambda: DecoderLM.from_pretrained(folder), str(folder), word)


DIFFUSION_EDITS: list[tuple[Edit, str]] = [
    (
        set_in("model", "maping_depth", to=3),
        """config["model"] has unknown keys 'maping_depth' (did you mean 'mapping_depth'?)""",
    ),
    (set_in("model", "sigma_sample_density", to={"type": "lognormal", "men": 1.0}), "did you mean 'mean'?"),
    (set_in("optimizer", to={"wd": 1e-3}), """config["optimizer"] has unknown keys 'wd'"""),
    (set_in("optimizer", to={"weigth_decay": 1e-3}), "did you mean 'weight_decay'?"),
    (set_in("ema_sched", to={"pwer": 0.75}), "did you mean 'power'?"),
    (set_in("lr_sched", to={"warm_up": 0.75}), "did you mean 'warmup'?"),
    (set_in("dataset", to={"num_clases": 3}), "did you mean 'num_classes'?"),
    (set_in("optimiser", to={"lr": 1e-3}), "the config has unknown keys 'optimiser' (did you mean 'optimizer'?)"),
    (set_in("model", "self_attns", 0, "kernelsize", to=3), "did you mean 'kernel_size'?"),
    (set_in("optimizer", to={"lr": "1e-3"}), 'config["optimizer"]["lr"] must be a finite number above 0'),
    (set_in("optimizer", to={"betas": [0.9]}), 'config["optimizer"]["betas"] must be a list of 2'),
    (set_in("model", "augment_prob", to="0.1"), '"augment_prob"'),
    (set_in("model", "sigma_sample_density", to="cosine"), '"sigma_sample_density"] must be an object'),
    (set_in("model", "type", to={}), '"type"'),
    (set_in("model", to=[]), '"type"'),
    (set_in("dataset", to=[]), 'config["dataset"]'),
    (set_in("model", "widths", to="ab"), '"widths"'),
    (set_in("model", "widths", to=[16, "16"]), '"widths"][1]'),
    (set_in("model", "depths", to=[1, True]), '"depths"][1]'),
    (set_in("model", "input_size", to={"h": 3}), '"input_size"'),
    (set_in("model", "self_attns", 0, "sink", to={}), "sink must be"),
    (set_in("model", "self_attns", 0, "type", to=["global"]), "attention must be"),
    (set_in("model", "self_attns", 0, to=3), '"self_attns"][0]'),
    (set_in("model", "dropout_rate", to=[0.0, "0"]), '"dropout_rate"][1]'),
    (set_in("model", "mapping_depth", to=10**30), '"mapping_depth"'),
    (set_in("dataset", "num_classes", to=-1), '"num_classes"'),
]


@pytest.mark.parametrize(("edit", "word"), DIFFUSION_EDITS)
def test_odd_diffusion_configs(edit: Edit, word: str, good: Path, tmp_path: Path) -> None:
    path = edit_json(copied(good, tmp_path, "hdit.json"), edit)
    refused(lambda: HDiTConfig.from_json(path), "hdit.json: ", word)
    refused(lambda: HDiTConfig.from_json(json.loads(path.read_text())), word)  # from Python as well
    odd = tmp_path / "odd.safetensors"
    save_file(load_file(good / "hdit.safetensors"), odd, metadata={"config": path.read_text()})
    refused(lambda: HDiT.from_pretrained(odd), "odd.safetensors: ", word)


def test_what_python_hands_over_is_checked_too() -> None:
    levels = (LevelConfig(1, 16, d_head=8),)
    refused(lambda: HDiTConfig(levels, other={"optimizer": {"wd": 1.0}}), "'wd'")
    refused(lambda: HDiTConfig(levels, patch_size=(4, 0)), "patch_size[1]")
    refused(lambda: HDiTConfig(({"depth": 1},)), "levels[0]")  # pyright: ignore[reportArgumentType]
    refused(lambda: LevelConfig(1, 16, num_kv_heads="1"), "num_kv_heads must be")  # pyright: ignore[reportArgumentType]
    refused(
        lambda: check_keys(["a" * 1000, 3, "b", "c", "d", "e", "f"], ["known"], "it"), "and 2 more", "known are known"
    )


@pytest.mark.parametrize(("section", "key"), [("model", "maping_depth"), ("optimizer", "wd"), ("ema_sched", "pwer")])
def test_training_does_not_start_with_a_misspelt_key(
    section: str, key: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_hdit = pytest.importorskip("natten_layers_cli.train_hdit")
    content = json.loads((good / "hdit.json").read_text())
    content["dataset"] = {"type": "imagefolder", "location": str(tmp_path)}
    content.setdefault(section, {})[key] = 1
    path = tmp_path / "misspelt.json"
    path.write_text(json.dumps(content))
    assert train_hdit.main(["--config", str(path), "--name", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert f"has unknown keys '{key}'" in capsys.readouterr().err


K_DIFFUSION = {
    "model": {
        "type": "image_transformer_v2", "input_channels": 3, "input_size": [256, 256], "patch_size": [4, 4],
        "depths": [2, 2], "widths": [128, 256], "d_ffs": None, "self_attns": None, "dropout_rate": 0.05,
        "mapping_width": 256, "mapping_depth": 2, "mapping_d_ff": None, "mapping_cond_dim": 0,
        "mapping_dropout_rate": 0.0, "augment_wrapper": False, "augment_prob": 0.12, "skip_stages": 0,
        "has_variance": False, "loss_config": "karras", "loss_weighting": "soft-min-snr", "loss_scales": 1,
        "sigma_data": 0.5, "sigma_min": 1e-2, "sigma_max": 160,
        "sigma_sample_density": {"type": "cosine-interpolated", "image_d": 256, "noise_d_low": 32, "noise_d_high": 256},
    },
    "dataset": {
        "type": "custom", "location": "mine.py", "get_dataset": "make", "config": {"anything": [1]}, "image_key": 0,
        "class_key": "label", "num_classes": 0, "cond_dropout_rate": 0.1,
    },
    "optimizer": {"type": "sgd", "lr": 1, "momentum": 0.9, "nesterov": True, "weight_decay": 0, "eps": 1e-8},
    "lr_sched": {"type": "inverse", "inv_gamma": 20000.0, "power": 1.0, "warmup": 0.99, "num_steps": 5, "decay": 0.5},
    "ema_sched": {"type": "inverse", "power": 0.6667, "max_value": 0.9999},
}  # fmt: skip


def test_every_key_that_k_diffusion_reads_is_known() -> None:
    config = HDiTConfig.from_json(K_DIFFUSION)
    assert HDiTConfig.from_json(config.to_json()) == config
    for section in ("dataset", "optimizer", "lr_sched", "ema_sched"):
        assert config.to_json()[section] == K_DIFFUSION[section]


def test_keys_of_other_tools_in_a_language_models_config_change_nothing(good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path, "llama")
    edit_json(folder / hf.CONFIG, set_in("transformers_weights", to={"a": [1]}))
    assert DecoderLM.from_pretrained(folder).config == LANGUAGE


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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: HDiT.from_pretrained(path), "deep.safetensors", word)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024  # KiB on Linux, less elsewhere


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


# --- the room


def test_files_know_no_models() -> None:
    """``io`` imports no model: models import ``io`` and pass it the classes to build and the modules to fill."""
    for path in Path(hf.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2 or node.module == "wording", (path, node.module)  # which knows nothing of models
                assert not (node.module or "").startswith("natten_layers"), (path, node.module)


def test_threads_that_save_one_file_do_not_meet(tmp_path: Path) -> None:
    path, barrier = tmp_path / "one.json", Barrier(4)

    def write(number: int) -> None:
        with replacing(path) as temporary:
            temporary.write_text(str(number) * 1000)
            barrier.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert path.read_text() in {str(number) * 1000 for number in range(4)}
    assert [one.name for one in tmp_path.iterdir()] == ["one.json"]


# --- drawn damage


def load_checked(path: Path) -> None:
    """Load a checkpoint. If its checksums are right, it must have the content that was written."""
    model, expected = HDiT.from_pretrained(path), HDiT.from_pretrained(path.parent / "hdit.safetensors")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


LOADS: dict[str, Callable[[Path], object]] = {
    "hdit.safetensors": HDiT.from_pretrained,
    "hdit.pth": load_checked,
    "hdit.json": HDiTConfig.from_json,
    "llama/config.json": lambda path: DecoderLM.from_pretrained(path.parent),
    "llama/model.safetensors": lambda path: DecoderLM.from_pretrained(path.parent),
    "own/config.json": lambda path: DecoderLM.from_pretrained(path.parent),
    "sharded/model.safetensors.index.json": lambda path: DecoderLM.from_pretrained(path.parent),
    "configs.json": tuned.read_tuned,
}


def drawn(examples: int) -> settings:
    """So many examples, unless ``--examples`` asks for others."""
    asked = settings.get_current_profile_name() == "fuzz"
    return settings(
        max_examples=settings().max_examples if asked else examples, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


def loads_or_names_itself(load: Callable[[Path], object], path: Path) -> None:
    """Check that a damaged file either loads, as a valid file of other content, or raises an error that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about unusual pickles before it fails
            load(path)
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        return
    assert path.name in message or str(path.parent) in message, message
    assert message.count(str(path)) <= 1, message
    assert len(message) < 3000
    message.encode()  # can be printed


@pytest.mark.parametrize("name", LOADS)
@drawn(12)
@given(data=st.data())
def test_turned_bits(name: str, data: st.DataObject, good: Path, tmp_path: Path) -> None:
    copied(good, tmp_path, name.split("/")[0])
    copied(good, tmp_path, "hdit.safetensors")
    path = tmp_path / name
    content = bytearray((good / name).read_bytes())
    # A file's structure is at its beginning and, in a zip archive, at its end.
    near = st.integers(0, min(len(content), 3000) - 1)
    places = near | near.map(lambda i: len(content) - 1 - i) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(places) :]
    path.write_bytes(content)
    loads_or_names_itself(LOADS[name], path)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["yarn", "llama3", "shifted-window", "sliding_attention", "../x", LONG, "\ud800"])
)
JSON = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=4), LEAVES, max_size=2)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(*path, key), *places_in(inner, (*path, key))]]


@pytest.mark.parametrize("name", [name for name in LOADS if name.endswith(".json")])
@drawn(12)
@given(data=st.data())
def test_other_values_in_json(name: str, data: st.DataObject, good: Path, tmp_path: Path) -> None:
    copied(good, tmp_path, name.split("/")[0])
    path = tmp_path / name
    content = json.loads(path.read_text())
    *keys, last = data.draw(st.sampled_from(places_in(content)))
    inner = content
    for key in keys:
        inner = inner[key]
    # Values that are almost valid get past more checks than arbitrary ones.
    near = st.sampled_from([str(inner[last]), [inner[last]], {"a": inner[last]}, {}, [], None])
    inner[last] = data.draw(near | JSON)
    path.write_text(json.dumps(content))
    loads_or_names_itself(LOADS[name], path)


@pytest.mark.parametrize(
    "change",
    [
        {"depths": [10**7, 1]},
        {"depths": [2000, 1000]},
        {"mapping_depth": 10**7},
        {"depths": [0] * 5000, "widths": [16] * 5000},
    ],
)
def test_a_config_of_countless_layers_is_refused_before_one_is_built(change: dict[str, Any]) -> None:
    """In the configs of users too, whose models come from no file whose size would tell."""
    config = DIFFUSION.to_json()
    model = {key: value for key, value in config["model"].items() if key not in ("d_ffs", "dropout_rate")}
    if "widths" not in change:
        change = {"widths": [16, 16]} | change
    model["self_attns"] = [{"type": "none"}] * len(change["widths"])
    with pytest.raises(ValueError, match="4096"):
        HDiTConfig.from_json({**config, "model": model | change})
    with pytest.raises(ValueError, match="num_layers must be an int of at most 4096"):
        DecoderLMConfig(**{**vars(LANGUAGE), "num_layers": 10**7})


def read_from_writer(pipe: Path, early: bytes, late: bytes, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Read a pipe to which ``early`` was written before it was opened, and ``late`` is written afterwards."""
    set_blocking, is_open = os.set_blocking, Event()
    monkeypatch.setattr(os, "set_blocking", lambda *arguments: (set_blocking(*arguments), is_open.set()))
    with ThreadPoolExecutor(1) as pool:
        with open(os.open(pipe, os.O_RDWR), "wb", buffering=0) as first:  # for writing only, it would wait for a reader
            first.write(early)
            found = pool.submit(read_short, pipe)
            assert is_open.wait(60)
            writer = os.open(pipe, os.O_WRONLY)
        # The reader alone holds the other end now: where it has failed, this is a broken pipe and waits for nobody.
        with open(writer, "wb", buffering=0) as second, suppress(BrokenPipeError):
            second.write(late)
        return found.result(60)


@pytest.mark.parametrize("early", [0, 1, 9], ids=lambda count: f"{count} bytes are there")
def test_a_config_is_read_from_a_pipe_that_somebody_writes_to(
    early: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"a": "x" * 200_000}  # more than a pipe holds
    text, pipe = json.dumps(content).encode(), tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr("natten_layers.io.files.MOST_BYTES", len(text))
    assert read_from_writer(pipe, text[:early], text[early:], monkeypatch) == text
    assert parse_json(text, pipe) == content
    with pytest.raises(ValueError, match=f"^{pipe} is longer than {len(text)} bytes, too long for JSON or a config$"):
        read_from_writer(pipe, text[:early], text[early:] + b" ", monkeypatch)


def test_an_empty_pipe_is_no_empty_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    said = f"^{pipe} is an empty pipe: nothing was written to it, or nobody writes to it yet; start what writes"
    with within(60), pytest.raises(ValueError, match=said):
        read_short(pipe)
    with pytest.raises(ValueError, match=said):
        read_from_writer(pipe, b"", b"", monkeypatch)


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """Nor a device: as root, a model saved to /dev/null would be in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"cannot write .*pipe: it is a device or a pipe"), replacing(pipe) as temporary:
        temporary.write_text("x")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("read", [checkpoints.read_hdit, checkpoints.load_plain])
def test_no_command_waits_for_the_writer_of_a_pipe(read: Callable[[Path], object], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with within(60), pytest.raises(ValueError, match=r"pipe\.safetensors is a pipe or a device"):
        read(pipe)


def test_a_file_in_place_of_a_folder_is_called_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(NotADirectoryError, match=r"Not a directory: '.*file'"):
        make_folder(file)
    with pytest.raises(OSError, match=r"cannot write .*weights: Not a directory"), replacing(file / "weights"):
        pass
    assert file.read_text() == "x"
