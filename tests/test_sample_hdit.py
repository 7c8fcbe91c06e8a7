"""natten-layers-sample-hdit: grids that are reproduced, and what it refuses."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hdit_runs import ENVIRONMENT, small_disk, temporaries, train, write_config
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from natten_layers import HDiT, HDiTConfig, LevelConfig
from natten_layers_cli import sample_hdit
from natten_layers_cli.diffusion import SAMPLERS
from natten_layers_cli.pictures import read_record, save_png, to_image


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training run, with run.safetensors and run_samples.png."""
    config = write_config(tmp_path_factory.mktemp("trained"))
    assert train(config, "run", "--end-step", "2") == 0
    return config.parent


def test_a_new_process_gives_the_same_images(trained: Path) -> None:
    command = [sys.executable, "-m", "natten_layers_cli.sample_hdit", str(trained / "run.safetensors")]
    command += ["--device", "cpu", "--reproduce", str(trained / "run_samples.png")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gives the same images" in done.stdout


def test_other_weights_do_not_reproduce(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "grid.png"
    model = str(trained / "run.safetensors")
    assert (
        sample_hdit.main([model, "--steps", "2", "-n", "2", "--seed", "1", "--output", str(output), "--device", "cpu"])
        == 0
    )
    assert sample_hdit.main([model, "--reproduce", str(output), "--device", "cpu"]) == 0
    assert read_record(output)["sha256"] != read_record(trained / "run_samples.png")["sha256"]
    checkpoint = str(trained / "run_00000002.pth")
    assert sample_hdit.main([checkpoint, "--reproduce", str(output), "--device", "cpu"]) == 0


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_samplers_guidance_classes_and_size(trained: Path, tmp_path: Path, sampler: str) -> None:
    output = tmp_path / "grid.png"
    flags = ["--sampler", sampler, "--steps", "2", "-n", "3", "--classes", "brick", "0", "--guidance", "2"]
    flags += ["--size", "20", "32", "--batch-size", "4", "--output", str(output), "--device", "cpu"]
    assert sample_hdit.main([str(trained / "run.safetensors"), *flags]) == 0
    record = read_record(output)
    assert (record["classes"], record["size"], record["guidance"]) == ([1, 0], [20, 32], 2.0)
    with Image.open(output) as grid:
        assert grid.height == 2 * (20 * 3 + 2)


def test_bad_input_to_sampling(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "grid.png"
    output.write_bytes(b"precious")

    def says(path: Path, *flags: str) -> str:
        grid = [] if "--reproduce" in flags else ["--steps", "1", "--output", str(output)]
        assert sample_hdit.main([str(path), *grid, "--device", "cpu", *flags]) == 2
        return capsys.readouterr().err

    model = trained / "run.safetensors"
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(model.read_bytes()[:5000])
    assert "truncated.safetensors" in says(truncated)
    assert "nowhere.safetensors" in says(tmp_path / "nowhere.safetensors")
    with pytest.raises(SystemExit):
        says(model, "--output", str(tmp_path / "grid.jpg"))
    assert "--output must end with .png" in capsys.readouterr().err
    assert "--classes dog 7: this model has classes 0 to 1: cat, brick" in says(model, "--classes", "dog", "cat", "7")
    # Level 0 sees tokens of 2 pixels and windows of 3, level 1 tokens of 4.
    assert "height 17 is not a multiple of 2, the pixels of a token of level 0; use 16 or 20 pixels" in says(
        model, "--size", "17", "16"
    )
    assert "height 18" in says(model, "--size", "18", "16")
    assert "height 5 is not a multiple of 2, the pixels of a token of level 0; use at least 8 pixels" in says(
        model, "--size", "5", "16"
    )
    changes: list[dict[str, Any]] = [
        {"steps": "2"},
        {"steps": 2**40},
        {"size": [16, 2**40]},
        {"count": 2**40},
        {"size": 5},
        {"sampler": "magic"},
        {"classes": [7]},
        {"count": 0},
        {"seed": 2**70},
    ]
    for record in [*(read_record(trained / "run_samples.png") | change for change in changes), {}]:
        save_png(Image.new("RGB", (4, 4)), tmp_path / "odd.png", record)
        assert f"error: {tmp_path / 'odd.png'} " in says(model, "--reproduce", str(tmp_path / "odd.png"))
    for flag, *values in (["--device", "foo"], ["--guidance", "nan"], ["--guidance", "inf"], ["--size", "-8", "16"]):
        with pytest.raises(SystemExit, match="2"):
            says(model, flag, *values)
        assert re.search(rf"error: (argument )?{flag}:? ", capsys.readouterr().err.splitlines()[-1])
    named = HDiT.from_pretrained(model)
    named.config.other["dataset"]["class_names"].pop()
    named.save_pretrained(tmp_path / "named.safetensors")
    assert "has 2 classes, but names 1: ['cat']" in says(tmp_path / "named.safetensors")
    assert "does not say how it was made" in says(model, "--reproduce", _plain_png(tmp_path))
    with Image.open(_plain_png(tmp_path)) as plain, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", plain.width * plain.height // 3)
        assert "does not say how it was made" in says(model, "--reproduce", _plain_png(tmp_path))
    text = PngImagePlugin.PngInfo()
    text.add_text("natten_layers", "x" * 2**21, zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "packed.png", pnginfo=text)
    assert "packed.png cannot be read as a picture: Decompressed" in says(
        model, "--reproduce", f"{tmp_path}/packed.png"
    )
    absent = str(tmp_path / "nowhere.png")
    assert "nowhere.png cannot be read as a picture: No such" in says(model, "--reproduce", absent)
    with small_disk(100):
        says(model)
    assert output.read_bytes() == b"precious"
    assert not temporaries(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        "--output x.png",
        "--out x",
        "--classes 1",
        "-n 2",
        "--size 8 8",
        "--sampler heun",
        "--steps 3",
        "--guidance 2",
        "--seed 4",
    ],
)
def test_reproduce_makes_what_the_grid_says(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    command = [str(trained / "run.safetensors"), "--reproduce", str(trained / "run_samples.png")]
    with pytest.raises(SystemExit, match="2"):
        sample_hdit.main([*command, *flags.split()])
    flag = "--count" if flags.startswith("-n") else flags.split()[0]
    assert f"--reproduce makes what its grid says: leave {flag} away" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        sample_hdit.main([*command[:1], "--output", str(tmp_path / "a.png"), "--out", str(tmp_path / "a")])
    assert "leave one of them away" in capsys.readouterr().err


def _plain_png(folder: Path) -> str:
    Image.new("RGB", (4, 4)).save(folder / "plain.png")
    return str(folder / "plain.png")


def test_names_of_classes_come_before_numbers() -> None:
    config = HDiTConfig(
        (LevelConfig(1, 16, "global", d_head=8),),
        num_classes=4,
        other={"dataset": {"class_names": ["1", "10", "2", "a"]}},
    )
    assert sample_hdit.parse_classes(["1", "2", "a"], config) == (0, 2, 3)
    assert sample_hdit.parse_classes(["3", "10"], config) == (3, 1)
    with pytest.raises(ValueError, match="names a class twice"):
        sample_hdit.parse_classes(["a", "3"], config)


def test_every_class_has_files_of_its_own() -> None:
    assert sample_hdit.file_starts(["cat", "a b", "1-c"]) == ["cat_", "a b_", "1-c_"]
    names = ["a/b", "a-b", ".hidden", "x" * 300, "0-a-b", "", "", "\0", "\ud800"]
    starts = sample_hdit.file_starts(names)
    assert starts[:2] == ["0-a-b-_", "1-a-b_"]
    assert starts[2:] == ["2-.hidden_", f"3-{'x' * 200}_", "0-a-b_", "5-_", "6-_", "-_", "?_"]


@pytest.mark.parametrize("flags", [("--output", "out.png"), ("--out", "out")])
def test_no_picture_is_made_of_nan(
    trained: Path, tmp_path: Path, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = HDiT.from_pretrained(trained / "run.safetensors")
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    model.save_pretrained(tmp_path / "nan.safetensors")
    command = [str(tmp_path / "nan.safetensors"), "-n", "1", "--steps", "1", "--device", "cpu"]
    flag, name = flags
    assert sample_hdit.main([*command, flag, str(tmp_path / name)]) == 2
    assert "error: the model's images hold NaN or infinity" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_single_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(trained / "run.safetensors"), "-n", "3", "--steps", "1", "--device", "cpu", "--batch-size", "2"]
    assert sample_hdit.main([*command, "--out", str(tmp_path / "out")]) == 0
    names = [f"{name}_{i:05}.png" for name in ("cat", "brick") for i in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert read_record(tmp_path / "out" / names[0])["count"] == 3

    model = sample_hdit.HDiT.from_pretrained(trained / "run.safetensors")
    request = sample_hdit.Request(classes=(0, 1), count=3, steps=1, batch_size=2)
    images: Tensor = sample_hdit.sample(model, model.config, request)
    for name, image in zip(names, images, strict=True):
        with Image.open(tmp_path / "out" / name) as written:
            assert written.tobytes() == to_image(image).tobytes()
    assert sample_hdit.main([*command, "-n", "1", "--out", str(tmp_path / "out")]) == 2
    assert "out holds images already, with which these would be mixed" in capsys.readouterr().err
    save_png = sample_hdit.save_png

    def save_first(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
        if any(path.parent.glob("*.png")):
            raise KeyboardInterrupt
        save_png(image, path, record)

    with monkeypatch.context() as patch:
        patch.setattr(sample_hdit, "save_png", save_first)
        assert sample_hdit.main([*command, "--out", str(tmp_path / "interrupted")]) == 130
    assert [path.name for path in (tmp_path / "interrupted").iterdir()] == ["cat_00000.png"]
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; images that were written are whole"
    (tmp_path / "taken").mkdir()
    lock = tmp_path / "taken" / ".lock"
    hold = f"import fcntl, sys; file = open({str(lock)!r}, 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True)"
    hold = [sys.executable, "-c", f"{hold}; sys.stdin.read()"]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert sample_hdit.main([*command, "--out", str(tmp_path / "taken")]) == 2  # not images of both, mixed
        assert f"another process is writing images to {tmp_path / 'taken'}" in capsys.readouterr().err
        other.kill()
    names = ["a/b", "a-b"]  # which no file's name tells apart
    model.config.other["dataset"]["class_names"] = names
    assert sample_hdit.write_images(model, model.config, request, tmp_path / "slashes") == 6
    assert len(list((tmp_path / "slashes").iterdir())) == 6
    with pytest.raises(SystemExit):
        sample_hdit.main([*command, "--out", str(tmp_path), "--reproduce", str(trained / "run_samples.png")])
