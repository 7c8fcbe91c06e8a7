"""natten-layers-train-hdit: presets, configs and flags, the steps of training, and processes that share them."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hdit_runs import CONFIG, ENVIRONMENT, TRAIN, draw, make_trainer, metrics, train, write_config
from torch import Tensor

from natten_layers import HDiT, HDiTConfig
from natten_layers_cli import convert, sample_hdit, train_hdit
from natten_layers_cli.batches import Examples, Keys, default_workers, load_batches
from natten_layers_cli.hdit_trainer import Trainer
from natten_layers_cli.presets import PRESETS
from natten_layers_cli.training_config import complete_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_build_with_everything_on(preset: Path) -> None:
    config = complete_config(json.loads(preset.read_text()), preset, None)
    with torch.device("meta"):
        model = HDiT(HDiTConfig.from_json(config))
    *neighborhoods, last = model.config.levels
    assert last.attention == "global"
    for level in neighborhoods:
        assert level.attention == "neighborhood"
        assert level.num_kv_heads is not None
        assert level.num_kv_heads < level.num_heads
        assert level.num_registers > 0
        assert level.sink == "zero"
    arguments = train_hdit.parse_arguments(["--preset", preset.stem, "--batch-size", "3"])
    assert arguments.batch_size == 3
    assert arguments.end_step == json.loads(preset.read_text())["run"]["end-step"]


def take_steps(trainer: Trainer, count: int) -> list[Tensor]:
    """The parameters after each step, as one vector."""
    keys = Keys(len(trainer.source), 4, seed=0, first_step=trainer.step, accumulate=1, rank=0, world=1)
    taken = []
    with load_batches(Examples(trainer.source, 0.0), keys, workers=0, pin_memory=False) as batches:
        for _ in range(count):
            trainer._train_step([next(batches)], keys.global_batch)
            taken.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    return taken


def test_the_average_of_weights_is_that_of_k_diffusion(config: Path) -> None:
    """Its decay is 1 - (1 + n)^(-2/3) at the n-th update, counted from 0: the first one keeps nothing of the start."""
    trainer = make_trainer(config, "--lr", "0.01")
    first, second, third = take_steps(trainer, 3)
    average = torch.cat([p.flatten() for p in trainer.ema.parameters()])
    expected = torch.lerp(torch.lerp(first, second, 2**-0.6667), third, 3**-0.6667)
    assert (third - first).abs().max() > 1e-3
    torch.testing.assert_close(average, expected, rtol=0, atol=1e-6)


def test_the_gradient_scale_survives_a_resume(config: Path) -> None:
    trainer = make_trainer(config, "--mixed-precision", "fp16")
    take_steps(trainer, 1)
    trainer.scaler.update(1024.0)
    trainer.save()
    again = make_trainer(config, "--mixed-precision", "fp16")
    assert again.step == 1
    assert again.scaler.get_scale() == 1024.0
    assert again.scaler.state_dict() == trainer.scaler.state_dict()


@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_training_stops_before_it_saves_nan(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loss: float
) -> None:
    """In the loss, or in the weights alone, as an update may leave them."""
    assert train(config, "a", "--end-step", "2") == 0
    before = {path: path.read_bytes() for path in config.parent.glob("a*.[pjs]*")}

    def spoil(self: Trainer, *_: object) -> Tensor:
        next(self.model.parameters()).data.fill_(math.nan)
        self.step += 1
        return torch.tensor(loss)

    monkeypatch.setattr(Trainer, "_train_step", spoil)
    assert train(config, "a", "--end-step", "4") == 2
    assert "try a lower --lr" in capsys.readouterr().err.splitlines()[-1]
    assert len(before) == 5  # checkpoint, state, weights and two pictures
    assert {path: path.read_bytes() for path in config.parent.glob("a*.[pjs]*")} == before


def test_training_goes_on_from_converted_weights(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = copy.deepcopy(CONFIG)
    wide["model"]["self_attns"][0]["num_kv_heads"] = 2
    config.write_text(json.dumps(wide))
    assert train(config, "wide", "--end-step", "2") == 0
    pooled = config.parent / "pooled.safetensors"
    convert.main([str(config.parent / "wide.safetensors"), str(pooled), "--group-size", "2", "1"])
    config.write_text(json.dumps(CONFIG))
    assert train(config, "grouped", "--resume-inference", str(pooled), "--end-step", "1", "--lr", "1e-30") == 0
    before, after = (
        HDiT.from_pretrained(path).state_dict() for path in (pooled, config.parent / "grouped.safetensors")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-7)
    assert train(config, "other", "--resume-inference", str(config.parent / "wide.safetensors"), "--end-step", "1") == 2
    assert "has [2, 2] KV heads on its levels, and the config asks for [1, 2]" in capsys.readouterr().err
    config.write_text(json.dumps(wide))  # the config that the weights were pooled from serves, too
    flags = ("--resume-inference", str(pooled), "--end-step", "1", "--lr", "1e-30")
    assert train(config, "same", *flags) == 0
    assert "the levels have [1, 2] KV heads" in capsys.readouterr().out
    assert (config.parent / "same.safetensors").read_bytes() == (config.parent / "grouped.safetensors").read_bytes()
    assert train(config, "same", *flags) == 0


def torchrun(config: Path, name: str, *flags: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [*TRAIN, "--config", str(config), "--name", str(config.parent / name)]
    command += ["--device", "cpu", *flags]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def losses(config: Path, name: str) -> Tensor:
    return torch.tensor([float(line.split(",")[1]) for line in metrics(config, name).splitlines()[1:]])


def test_two_processes_train_as_one(config: Path) -> None:
    """DDP, FSDP2, and FSDP2 resumed from a sharded checkpoint match one process with the whole batch."""
    plain = {**CONFIG, "model": {**CONFIG["model"], "dropout_rate": 0.0}}  # each process draws its own dropout
    config.write_text(json.dumps(plain))
    assert train(config, "one", "--end-step", "4", "--lr", "0.01") == 0
    flags = ("--batch-size", "2", "--lr", "0.01")
    torchrun(config, "ddp", *flags, "--end-step", "4")
    sharded = (*flags, "--fsdp", "--demo-every", "1")  # which must leave the averages as they are: sharded
    torchrun(config, "fsdp", *sharded, "--end-step", "2")
    torchrun(config, "fsdp", *sharded, "--end-step", "4")
    expected = losses(config, "one")
    assert (expected.diff().abs() > 1e-3).all()
    for name in ("ddp", "fsdp"):
        torch.testing.assert_close(losses(config, name), expected, rtol=1e-5, atol=0)
        assert (
            sample_hdit.main(
                [str(config.parent / f"{name}.safetensors"), "--steps", "1", "--output", str(config.parent / "x.png")]
            )
            == 0
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": None}, "has no dataset"),
        ({"dataset": {"type": "mnist"}}, "dataset.type is 'mnist'; known are"),
        ({"dataset": {"type": "imagefolder"}}, "dataset of type imagefolder lacks location"),
        ({"dataset": {"type": "imagefolder", "location": "/nowhere"}}, "/nowhere is not a folder of images"),
        (
            {"dataset": {**CONFIG["dataset"], "location": "x"}},
            "dataset of type photographs has unknown keys 'location'",
        ),
        ({"dataset": {**CONFIG["dataset"], "files": {}}}, "dataset.files names no photographs"),
        ({"dataset": {**CONFIG["dataset"], "num_classes": 3}}, "dataset.num_classes is 3, but the data has 2 classes"),
        ({"dataset": {**CONFIG["dataset"], "class_names": ["a", "b"]}}, "dataset.class_names is ['a', 'b'], but"),
        (
            {"model": {"sigma_sample_density": {"type": "lognormal"}}},
            "model.sigma_sample_density of type lognormal lacks",
        ),
        (
            {"model": {"sigma_min": 0}},
            "model.sigma_sample_density of type cosine-interpolated: min_value must be above 0",
        ),
        ({"model": {"sigma_min": 100}}, 'config["model"]: sigma_min is 100, but must be less than sigma_max, 80'),
        ({"model": {"loss_weighting": "min-snr"}}, "model.loss_weighting is 'min-snr'; known are karras"),
        ({"model": {"loss_config": "min-snr"}}, "model.loss_config is 'min-snr'"),
        ({"model": {"objective": "flow"}}, "config[\"model\"]: objective must be one of 'diffusion', 'meanflow'"),
        ({"model": {"input_size": 17}}, "image height 17 is not a multiple of 2"),
        ({"model": {"mapping_width": 17}}, "mapping_width must be even, got 17"),
        (
            {"model": {"self_attns": [{"type": "global", "d_head": 8, "num_kv_heads": 3}] * 2}},
            "level 0: num_heads must be",
        ),
        ({"model": {"mapping_cond_dim": 4}}, "model.mapping_cond_dim: no data of this command has"),
        ({"lr_sched": {"type": "exponential"}}, "lr_sched of type exponential lacks num_steps"),
        ({"lr_sched": {"type": "linear"}}, "lr_sched.type is 'linear'; known are constant"),
        ({"lr_sched": {"num_steps": 9}}, "lr_sched of type constant has unknown keys 'num_steps'"),
        ({"lr_sched": {"warmup": 1.0}}, 'config["lr_sched"]["warmup"] must be a finite number below 1'),
        ({"optimizer": {"type": "sgd"}}, "optimizer.type is 'sgd'; only 'adamw' is supported"),
        ({"optimizer": {"momentum": 0.9}}, "optimizer of type adamw has unknown keys 'momentum'"),
        ({"optimizer": {"betas": [0.9, 1]}}, 'config["optimizer"]["betas"][1] must be a finite number below 1, got 1'),
        ({"optimizer": {"eps": 0}}, 'config["optimizer"]["eps"] must be a finite number above 0, got 0'),
        ({"run": {"batch-size": 0}}, 'config["run"]["batch-size"]: must be at least 1, got 0'),
        ({"run": {"end_step": "many"}}, 'config["run"]["end_step"]: \'many\' is no whole number'),
        ({"run": {"end_step": [1]}}, 'config["run"]["end_step"]: must be one value, a number or a string, got [1]'),
        ({"run": {"mixed_precision": "fp8"}}, 'config["run"]["mixed_precision"]: invalid choice: \'fp8\''),
        ({"run": {"compile": "yes"}}, 'config["run"]["compile"]: must be true or false, got \'yes\''),
        ({"run": {"reset": []}}, 'config["run"]["reset"]: must be a list of values, got []'),
        ({"run": {"lr": 0}}, 'config["run"]["lr"]: must be above 0, got 0.0'),
        ({"run": {"end": 3}}, "config[\"run\"] has unknown keys 'end'; known are batch_size"),
        ({"run": {"config": "x"}}, "config[\"run\"] has unknown keys 'config'"),
        ({"run": {"keep": 1, "save-every": 1, "save_every": 2}}, "has a key twice, with _ and with -: save-every"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_with_a_config_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    """In one line, with the file's name and the section's, and before anything is written."""
    model = {"model": {**CONFIG["model"], **change["model"]}} if "model" in change else {}
    config.write_text(json.dumps({**CONFIG, **change, **model}))
    assert train(config, "a", "--end-step", "1") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {config}")
    assert message in error
    assert not list(config.parent.glob("a_*"))


def test_classes_of_a_type_that_has_none(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = config.parent / "images"
    (images / "cat").mkdir(parents=True)
    draw(images / "cat" / "a.png")
    dataset = {"type": "imagefolder", "location": str(images), "num_classes": 1}
    config.write_text(json.dumps({**CONFIG, "dataset": dataset}))
    assert train(config, "a", "--end-step", "1") == 2
    assert 'has 0 classes: []; leave it out, or name the type "imagefolder-class"' in capsys.readouterr().err
    config.write_text(json.dumps({**CONFIG, "dataset": {**dataset, "type": "imagefolder-class"}}))
    assert make_trainer(config).config["dataset"]["class_names"] == ["cat"]


def test_flags_that_others_would_hide(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*flags: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            train(config, "a", *flags)
        return capsys.readouterr().err.splitlines()[-1]

    assert "--config and --preset both name a config" in says("--preset", "cpu-demo")
    assert "--eval-every needs --held-out" in says("--eval-every", "5")
    assert "--eval-features needs --eval-samples" in says("--eval-features", "inception")
    assert "unrecognized arguments: --end" in says("--end", "5")  # it could be another flag in a later release
    run = {"run": {"eval-every": 7, "num_workers": None}}  # of a section, which flags complete, that is no error
    config.write_text(json.dumps({**CONFIG, **run}))
    arguments = train_hdit.parse_arguments(["--config", str(config), "--seed", "3"])
    assert (arguments.eval_every, arguments.seed, arguments.num_workers) == (7, 3, default_workers(8))


def test_a_config_may_come_from_a_pipe(config: Path) -> None:
    """As of --config <(jq ... config.json), which can be read once."""
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        file.write(config.read_bytes())
    pipe = Path(f"/dev/fd/{reader}")
    name = str(config.parent / "a")
    assert train_hdit.main(["--config", str(pipe), "--name", name, "--device", "cpu", "--end-step", "1"]) == 0
    os.close(reader)
    assert train(config, "a", "--end-step", "1") == 0  # the run has the file's config


def test_bad_input_to_training(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(name: str, *flags: str) -> str:
        assert train(config, name, "--end-step", "2", *flags) == 2
        return capsys.readouterr().err

    assert train(config, "run", "--end-step", "1") == 0
    nowhere = config.parent / "nowhere"
    assert says("other", "--data", str(nowhere)) == f"error: {nowhere} is not a folder of images\n"
    nowhere.mkdir()
    assert says("other", "--data", str(nowhere)).startswith(f"error: {nowhere} holds no images")  # not the config
    assert "start them with torchrun" in says("other", "--fsdp")
    other = {**CONFIG, "model": {**CONFIG["model"], "depths": [1, 2]}}
    config.write_text(json.dumps(other))
    assert "model.depths is [1, 1] there and [1, 2] here" in says("run")
    (config.parent / "run_00000001.pth").write_bytes(b"PK")
    assert "run_00000001.pth is damaged" in says("run")
    config.write_text("{")
    assert "config.json is no JSON" in says("run")
    config.write_text("[" * 100_000)
    assert "config.json is no JSON" in says("run")
    config.unlink()
    assert says("run").splitlines() == [f"error: {config}: No such file or directory"]
    for section in ("run", "dataset", "optimizer", "lr_sched", "ema_sched"):
        for odd in ([], ["end-step"], False, 0, "", "x"):  # also such as Python takes for nothing
            config.write_text(json.dumps({**CONFIG, section: odd}))
            assert says("odd") == f'error: {config}: "{section}" is no JSON object, but {odd!r}\n'
    config.write_text(json.dumps(CONFIG))
    with pytest.raises(SystemExit, match="2"):
        says("run", "--device", "foo")
    assert "--device foo: " in capsys.readouterr().err.splitlines()[-1]
