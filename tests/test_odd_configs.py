"""Damaged and hostile JSON and configs, chosen by hand: every fault raises a ValueError that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from odd_files import DEEP, DIFFUSION, LANGUAGE, LONG, Edit, copied, edit_json, refused
from odd_files import good as good
from safetensors.torch import load_file, save_file

from natten_layers import DecoderLM, DecoderLMConfig, HDiT, HDiTConfig, LevelConfig
from natten_layers.io import hf
from natten_layers.io.files import read_json
from natten_layers.io.schema import check_keys

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
