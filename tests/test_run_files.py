"""The files of a run: checkpoints that are damaged, old or of another run, state and metrics files, and names."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hdit_runs import CONFIG, cut, metrics, train, write_config

from natten_layers import HDiT
from natten_layers_cli.checkpointing import DamagedError, RunFiles, check_rest
from natten_layers_cli.presets import PRESETS


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_weights_that_are_missing_at_the_end_are_written_again(config: Path) -> None:
    assert train(config, "a", "--end-step", "2") == 0
    weights = config.parent / "a.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(b"stale")
    assert train(config, "a", "--end-step", "2") == 0
    assert weights.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "deleted", "state deleted", "state odd"])
def test_an_older_checkpoint_takes_the_place_of_a_damaged_one(
    config: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    assert train(config, "a", "--end-step", "4") == 0
    whole = {path: path.read_bytes() for path in config.parent.glob("a[._]*") if path.suffix in (".pth", ".csv")}
    newest, state = config.parent / "a_00000004.pth", config.parent / "a_state.json"
    if damage == "cut":
        cut(newest)
    elif damage == "deleted":
        newest.unlink()
    elif damage == "state deleted":
        state.unlink()
    else:
        state.write_text('{"latest_checkpoint": ["a_00000004.pth"]}')
    capsys.readouterr()
    assert train(config, "a", "--end-step", "4") == 0
    printed = capsys.readouterr().out
    assert f"warning: {state if 'state' in damage else newest}" in printed
    assert f"resuming from {newest if 'state' in damage else config.parent / 'a_00000002.pth'}" in printed
    metrics_file = config.parent / "a_metrics.csv"
    assert metrics_file.read_bytes() == whole[metrics_file]
    assert json.loads(state.read_text()) == {"latest_checkpoint": "a_00000004.pth"}
    assert torch.load(newest, weights_only=True)["step"] == 4


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named(config: Path, capsys: pytest.CaptureFixture[str], share: float) -> None:
    assert train(config, "a", "--end-step", "2") == 0
    whole, cut = config.parent / "a_00000002.pth", config.parent / "cut.pth"
    content = whole.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    assert train(config, "b", "--resume", str(cut)) == 2
    assert f"{cut} is damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"cut\.pth is damaged"):
        HDiT.from_pretrained(cut)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"latest_checkpoint": 5}',
        '{"latest_checkpoint": "../b.pth"}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_state_files_of_odd_content(config: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    state = config.parent / "a_state.json"
    state.write_bytes(content.encode("latin-1"))
    assert train(config, "a", "--end-step", "1") == 2
    error = capsys.readouterr().err.splitlines()
    assert error == [f"error: {state} is damaged: it names no checkpoint; no older checkpoint is whole: "
                     f"delete {state} to start anew"]  # fmt: skip


def test_metrics_files_of_odd_content(tmp_path: Path) -> None:
    """A line without an end is where a run was killed; zeros are what a power cut may leave of the last one."""
    files = RunFiles(str(tmp_path / "a"))
    path = files.path("_metrics.csv")
    assert files.losses(9) == {}
    for tail in (b"", b"2,0.2", b"2", b"\0\0\0", b"\0\0\0\n", b"2,\n"):
        path.write_bytes(b"step,loss\n1,0.5\n" + tail)
        assert files.losses(9) == {1: 0.5}, tail
    path.write_bytes(b"")
    assert files.losses(9) == {}
    for content in (b"\xff\n", b"step\n1\n", b"step,loss\n1,\0\n2,0.5\n", b"step,loss\n1,2,3\n2,0.5\n", b"{}\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a_metrics\.csv is damaged"):
            files.losses(9)


def test_a_folder_to_resume_from_is_not_said_to_be_a_checkpoint(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, "b", "--resume", str(config.parent)) == 2
    error = f"error: {config.parent} is a folder, as --fsdp saves: name a checkpoint of a run like this one\n"
    assert capsys.readouterr().err == error


def test_checkpoints_of_odd_content(tmp_path: Path) -> None:
    whole = {"config": {"model": {}}, "step": 1, "scaler": {}}
    check_rest(tmp_path, whole)
    for change in ({"config": None}, {"config": {}}, {"step": "1"}, {"step": -1}, {"scaler": []}):
        with pytest.raises(DamagedError, match="is no training checkpoint"):
            check_rest(tmp_path, whole | change)
    for content in ([], None, {"step": 1}):
        with pytest.raises(DamagedError, match="is no training checkpoint"):
            check_rest(tmp_path, content)


def test_metrics_keep_their_steps_under_a_new_name(config: Path) -> None:
    assert train(config, "a", "--end-step", "4") == 0
    assert train(config, "b", "--resume", str(config.parent / "a_00000002.pth"), "--end-step", "3") == 0
    assert train(config, "b", "--end-step", "4") == 0
    whole = metrics(config, "a").splitlines()
    assert metrics(config, "b").splitlines() == [whole[0], *whole[3:]]
    assert train(config, "c", "--resume", str(config.parent / "a_00000004.pth"), "--end-step", "4") == 0


def test_a_run_may_change_its_precision_and_its_optimizer_but_not_its_classes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, "a", "--end-step", "2") == 0
    optimizer = {"weight_decay": 0.5, "betas": [0.5, 0.6], "eps": 1e-3}
    config.write_text(json.dumps({**CONFIG, "optimizer": optimizer}))
    assert train(config, "a", "--end-step", "4", "--mixed-precision", "fp16") == 0
    state = torch.load(config.parent / "a_00000004.pth", weights_only=True)["opt"]
    group = max(state["param_groups"], key=lambda group: group["weight_decay"])
    assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.5, (0.5, 0.6), 1e-3)
    files = {"cat": "chelsea.png", "wall": "brick.png"}
    config.write_text(json.dumps({**CONFIG, "dataset": {**CONFIG["dataset"], "files": files}}))
    assert train(config, "a", "--end-step", "6") == 2
    assert "dataset.class_names is ['cat', 'brick'] there and ['cat', 'wall'] here" in capsys.readouterr().err
    assert train(PRESETS["cpu-demo"], str(config.parent / "a")) == 2
    said = capsys.readouterr().err
    assert len(said) < 600
    assert "model.d_ffs is" in said  # the first of them
    assert re.search(r"; and \d+ more\. Use its config", said)


@pytest.mark.parametrize("name", ["runs/", "", ".", "runs/..", "runs/.hidden"])
def test_names_that_would_hide_files_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"use, for example, .*run"):
        RunFiles(name)


@pytest.mark.parametrize("name", ["runs/" + "n" * 201, "runs/" + "é" * 101, "a\0b"])
def test_names_that_no_file_can_have_are_refused_at_once(name: str, config: Path) -> None:
    """Not when the first checkpoint is written."""
    with pytest.raises(ValueError, match="such as no file can have"):
        RunFiles(name)
    assert train(config, "n" * 200, "--end-step", "1") == 0


def test_names_that_are_no_text_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, os.fsdecode(b"\xff"), "--end-step", "1") == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("is no UTF-8, which TensorBoard needs")
