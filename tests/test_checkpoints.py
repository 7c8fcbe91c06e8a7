"""HDiT's files: reading, writing, refusal of bad files, and conversion to grouped queries."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raises_naming
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from natten_layers import (
    AxialRoPE,
    DecoderLMConfig,
    HDiT,
    HDiTConfig,
    LevelConfig,
    NeighborhoodAttention1D,
    NeighborhoodGQA,
)
from natten_layers.convert import convert, convert_file, mha_to_gqa
from natten_layers.io import checkpoints, hf, tensors
from natten_layers_cli.convert import main

GOLDEN = Path(__file__).parent / "data" / "hdit"
CASES = sorted(p for p in GOLDEN.glob("*.safetensors") if ".expected" not in p.name)
SOURCE = GOLDEN / "neighborhood_classes.safetensors"


def tiny_model(**options: Any) -> HDiT:
    fine = LevelConfig(1, 16, d_head=8, kernel_size=3, num_kv_heads=1, num_registers=2, sink="learned")
    return HDiT(HDiTConfig((fine, LevelConfig(1, 16, "global", d_head=8)), mapping_width=8, sigma_data=0.5, **options))


def states_equal(a: HDiT, b: HDiT) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    """Write a copy of ``SOURCE`` with changed contents."""
    text = metadata(SOURCE)["config"] if config is None else json.dumps(config)
    save_file(tensors, path, metadata={"config": text})
    return path


# --- good files


def test_own_files_round_trip(tmp_path: Path) -> None:
    model = tiny_model(num_classes=2)
    model.save_pretrained(tmp_path / "model.safetensors")
    loaded = HDiT.from_pretrained(tmp_path / "model.safetensors")
    assert states_equal(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_directory_stands_for_its_model_file(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "run" / "best-0.5")
    assert (tmp_path / "run" / "best-0.5" / "model.safetensors").exists()
    assert states_equal(model, HDiT.from_pretrained(tmp_path / "run" / "best-0.5"))


def test_what_is_no_path_or_config_of_an_hdit_is_refused(tmp_path: Path) -> None:
    """A directory of the name model.pth would be taken for a training checkpoint, and a dict for a config."""
    model = tiny_model()
    with raises_naming("model.pth must be the name of a directory", "end with .safetensors"):
        model.save_pretrained(tmp_path / "model.pth")
    with raises_naming("model.JSON must be the name of a directory", "without .JSON"):
        model.save_pretrained(tmp_path / "model.JSON")
    config = DecoderLMConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    with raises_naming("lm.safetensors must be the name of a directory"):
        hf.save(config, {}, tmp_path / "lm.safetensors")
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path)
    with raises_naming("config must be an HDiTConfig", "HDiTConfig.from_json"):
        HDiT.from_pretrained(tmp_path, config=model.config.to_json())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("source", CASES, ids=lambda p: p.stem)
def test_k_diffusion_files_are_written_as_they_were_read(source: Path, tmp_path: Path) -> None:
    dtype = load_file(source)["patch_in.proj.weight"].dtype
    HDiT.from_pretrained(source).save_pretrained(tmp_path / "copy.safetensors", dtype=dtype)
    original, copy = load_file(source), load_file(tmp_path / "copy.safetensors")
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[key].to(copy[key].dtype), copy[key]) for key in original)
    before, after = (json.loads(metadata(path)["config"]) for path in (source, tmp_path / "copy.safetensors"))
    assert before == {key: after[key] for key in before}


def test_half_precision_is_for_parameters_only(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["patch_in.proj.weight"].dtype == torch.float16
    assert stored["time_emb.weight"].dtype == stored["mid_level.0.self_attn.pos_emb.freqs"].dtype == torch.float32
    half = HDiT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} == {torch.float32}


def test_training_checkpoints_give_their_ema_weights(tmp_path: Path) -> None:
    ema = load_file(SOURCE)
    content = {
        "config": json.loads(metadata(SOURCE)["config"]),
        "model": {key: tensor + 1 for key, tensor in ema.items()},
        "model_ema": ema,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "step": 7,
    }
    expected = HDiT.from_pretrained(SOURCE)
    for name, legacy in (("new.pth", False), ("old.pth", True)):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        assert states_equal(HDiT.from_pretrained(tmp_path / name), expected)
    del content["config"]
    torch.save(content, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare\.pth holds no config; give .* this HDiT's .* or by --config$"):
        HDiT.from_pretrained(tmp_path / "bare.pth")
    assert states_equal(HDiT.from_pretrained(tmp_path / "bare.pth", config=expected.config), expected)


# --- bad files


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = SOURCE.read_bytes()
    torch.save({"model_ema": Bomb()}, "pickled.pth")
    Path("system.pth").write_bytes(b"\x80\x02cposix\nsystem\nX\x0e\x00\x00\x00touch explodedq\x00\x85R.")
    torch.save({"weights": torch.ones(1)}, "foreign.pth")
    Path("truncated.safetensors").write_bytes(data[: len(data) // 2])
    Path("header.safetensors").write_bytes(data[:100])
    Path("empty.safetensors").write_bytes(b"")
    Path("picture.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    Path("truncated.pth").write_bytes(Path("foreign.pth").read_bytes()[:200])
    messages = {
        "truncated.safetensors": "is damaged, truncated or no safetensors file",
        "header.safetensors": "is damaged, truncated or no safetensors file",
        "empty.safetensors": "is damaged, truncated or no safetensors file",
        "picture.safetensors": "is damaged, truncated or no safetensors file",
        "pickled.pth": "is damaged, or holds objects that are not plain tensors",
        "system.pth": "is damaged, or holds objects that are not plain tensors: .*posix.system",
        "truncated.pth": "is damaged",
        "foreign.pth": 'no k-diffusion training checkpoint: it has no entry "model_ema"',
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=f"{name} .*{message}|{name} {message}") as error:
            HDiT.from_pretrained(name)
        assert "weights_only" not in str(error.value)  # torch's advice to trust the file
    assert not Path("exploded").exists()
    with pytest.raises(FileNotFoundError):
        HDiT.from_pretrained("nowhere.safetensors")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    tensors, path = load_file(SOURCE), tmp_path / "bad.safetensors"
    key = "down_levels.0.0.self_attn.qkv_proj.weight"
    cases = {
        rf'"{key}" has shape \(3, 4\), but the config asks for \(96, 32\)': tensors | {key: torch.ones(3, 4)},
        'it lacks "out_norm.scale"': {k: t for k, t in tensors.items() if k != "out_norm.scale"},
        'it has an unknown "extra.weight"': tensors | {"extra.weight": torch.ones(1)},
        r"and \d+ more": {"extra.weight": torch.ones(1)},
        r'"module\..*is there a prefix before them': {f"module.{k}": t for k, t in tensors.items()},
    }
    for message, content in cases.items():
        with pytest.raises(ValueError, match=rf"bad\.safetensors does not fit its config: .*{message}"):
            HDiT.from_pretrained(rewrite(path, content))
    config = json.loads(metadata(SOURCE)["config"])
    for text, message in (("[1]", r"is no JSON object, but \[1\]"), ("{", "is no JSON: ")):
        save_file(tensors, path, metadata={"config": text})
        with pytest.raises(ValueError, match=rf"bad\.safetensors: the config in its metadata {message}"):
            HDiT.from_pretrained(path)
    config["model"]["self_attns"][0]["type"] = "axial"
    with pytest.raises(ValueError, match=r"bad\.safetensors: .*\[0\]: attention must be one of .* got 'axial'"):
        HDiT.from_pretrained(rewrite(path, tensors, config))


def test_nothing_is_half_loaded() -> None:
    model, tensors = HDiT.from_pretrained(SOURCE), load_file(SOURCE)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    changed = {key: tensor + 1 for key, tensor in tensors.items()} | {"patch_out.proj.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"patch_out\.proj\.weight"):
        checkpoints.load_tensors(model, changed, SOURCE, torch.float32)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    tiny_model().save_pretrained(path)
    before = path.read_bytes()

    def fail(tensors: dict[str, torch.Tensor], filename: Path, metadata: dict[str, str]) -> None:
        filename.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(tensors, "save_file", fail)
    with pytest.raises(OSError, match=r"cannot write .*model\.safetensors: disk full"):
        tiny_model().save_pretrained(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_safetensors_own_temporary_file_is_not_named(tmp_path: Path) -> None:
    final = tmp_path / "nowhere" / "model.safetensors"
    with pytest.raises(OSError, match=f"^cannot write {final}: No such file or directory$"):
        tensors.write_safetensors({"weight": torch.ones(1)}, final.with_name(".model.tmp"), {}, final=final)


def test_saved_weights_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        tiny_model().save_pretrained(tmp_path)
    finally:
        os.umask(umask)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


# --- conversion


def tie_groups(layer: NeighborhoodGQA, group: int) -> None:
    """Make the KV heads of each group equal, including their frequencies, so that grouping them changes nothing."""
    with torch.no_grad():
        for tensor in (layer.qkv.weight, layer.qkv.bias):
            if tensor is not None:
                heads = tensor.view(3, layer.num_heads // group, group, layer.head_dim, -1)
                heads[1:] = heads[1:, :, :1]
        if isinstance(layer.rope, AxialRoPE):
            freqs = layer.rope.freqs.view(-1, group, layer.rope.freqs.shape[1])
            freqs.copy_(freqs[:, :1].clone().expand_as(freqs))


def test_pooling_equal_heads_changes_nothing() -> None:
    old = NeighborhoodGQA(24, 6, 3, rope=AxialRoPE(8, 6), head_dim=8, qk_norm="cosine", sink="learned").double()
    tie_groups(old, 3)
    options: dict[str, Any] = {"head_dim": 8, "qk_norm": "cosine", "sink": "learned", "num_kv_heads": 2}
    new = NeighborhoodGQA(24, 6, 3, rope=AxialRoPE(8, 6, num_kv_heads=2), **options).double()
    new.load_state_dict(mha_to_gqa(old.state_dict(), 6, 2))
    x = torch.randn(1, 5, 4, 24, dtype=torch.float64)
    torch.testing.assert_close(new(x), old(x))


def test_pooling_takes_means_in_steps() -> None:
    state = NeighborhoodAttention1D(16, 4, 3).double().state_dict()
    bias = torch.arange(48, dtype=torch.float64)
    state["qkv.bias"] = bias
    pooled = mha_to_gqa(state, 4, 2)
    assert torch.equal(pooled["qkv.bias"][:16], bias[:16])
    assert pooled["qkv.bias"][16:].tolist() == [18, 19, 20, 21, 26, 27, 28, 29, 34, 35, 36, 37, 42, 43, 44, 45]
    assert torch.equal(state["qkv.bias"], bias)
    twice, once = mha_to_gqa(pooled, 4, 1), mha_to_gqa(state, 4, 1)
    assert all(torch.allclose(twice[key], once[key], rtol=1e-12) for key in once)
    NeighborhoodGQA(16, 4, 3, num_kv_heads=1).load_state_dict(once)
    with pytest.raises(ValueError, match="must divide the 2 KV heads of the state dict, got 4"):
        mha_to_gqa(pooled, 4, 4)
    with pytest.raises(ValueError, match="16 columns, not a multiple of num_heads 3"):
        mha_to_gqa(state, 3, 1)
    for wrong in (0, -4, "4", 4.0, True):
        with pytest.raises(ValueError, match=r"^num_heads must be an int of at least 1"):
            mha_to_gqa(state, wrong, 1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^num_kv_heads must be an int of at least 1"):
            mha_to_gqa(state, 4, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads must be the 4 query heads that sink in state has, got 8"):
        mha_to_gqa({**state, "sink": torch.zeros(4)}, 8, 1)
    with pytest.raises(ValueError, match=r"num_heads 8 gives 8 KV heads, but rope\.freqs in state has 4"):
        mha_to_gqa({**state, "rope.freqs": torch.zeros(4, 1)}, 8, 1)
    with pytest.raises(ValueError, match=r"qkv\.weight has 24 rows, which are no keys and values of whole heads"):
        mha_to_gqa(once, 2, 1)
    with pytest.raises(ValueError, match=r"state has no qkv\.weight; it holds proj"):
        mha_to_gqa({name: tensor for name, tensor in state.items() if "qkv" not in name}, 4, 2)


def test_converted_models_compute_the_same_where_heads_agree() -> None:
    model = HDiT.from_pretrained(SOURCE, dtype=torch.float64)
    name = "mid_level.1.self_attn.attn.rope.freqs"
    assert torch.equal(convert(model, 2).state_dict()[name], model.state_dict()[name][::2])
    for layer in model.modules():
        if isinstance(layer, NeighborhoodGQA):
            tie_groups(layer, 2)
    grouped = convert(model, 2)
    assert [level.num_kv_heads for level in grouped.config.levels] == [1, 2]
    x, classes = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.tensor([2])
    arguments = {"sigma": torch.ones(1), "class_cond": classes}
    with torch.no_grad():
        expected = model(x, **arguments)
        torch.testing.assert_close(grouped(x, **arguments), expected)
        grouped.patch_in.proj.weight.zero_()
        assert torch.equal(model(x, **arguments), expected)  # nothing is shared


def test_command_refuses_another_format_before_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "no-such-source"), str(tmp_path / "out.pth"), "--group-size", "2"])
    assert "out.pth must be the name of a directory, without .pth; files" in capsys.readouterr().err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = GOLDEN / "three_levels_nonsquare_aug.safetensors", tmp_path / "gqa.safetensors"
    main([str(source), str(target), "--group-size", "1", "2", "1"])
    assert "KV heads by level: [1, 1, 1]" in capsys.readouterr().out
    assert [level.num_kv_heads for level in HDiT.from_pretrained(target).config.levels] == [None, 1, None]
    before = target.read_bytes()
    assert main([str(source), str(target), "--group-size", "2"]) == 2
    assert "level 0 has 1 KV heads, which group_size 2 does not divide; give a divisor" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), str(target), "--group-size", "1"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: No such file or directory\n"
    assert target.read_bytes() == before
    bare, config = tmp_path / "bare.safetensors", tmp_path / "config.json"
    save_file(load_file(source), bare)
    config.write_text(json.dumps(HDiT.from_pretrained(source).config.to_json()))
    main([str(bare), str(target), "--group-size", "1", "2", "1", "--config", str(config)])
    assert target.read_bytes() == before
    with pytest.raises(ValueError, match=r"group_size has 2 entries \[1, 1\], but the model has 3 levels"):
        convert_file(source, target, [1, 1])


def test_a_model_is_not_replaced_by_its_own_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, link = tmp_path / "model", tmp_path / "link.safetensors"
    folder.mkdir()
    file = folder / "model.safetensors"
    link.symlink_to(shutil.copy(CASES[0], file))
    for source, target in ((file, file), (folder, file), (folder, folder), (file, link)):
        with pytest.raises(SystemExit, match="2"):
            main([str(source), str(target), "--group-size", "2"])
        error = f"error: TARGET {target} is SOURCE, whose heads would be lost: name another\n"
        assert capsys.readouterr().err.endswith(error)
    assert file.read_bytes() == CASES[0].read_bytes()


@pytest.mark.parametrize("source", CASES, ids=lambda p: p.stem)
def test_group_size_one_is_the_identity(source: Path, tmp_path: Path) -> None:
    model, same = convert_file(source, tmp_path / "same.safetensors", 1)
    assert same.config == model.config
    before, after = load_file(source), load_file(tmp_path / "same.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].to(after[key].dtype), after[key]) for key in before)
    assert after["patch_in.proj.weight"].dtype == before["patch_in.proj.weight"].dtype
