"""Where commands write: what cannot be written, or would be of another kind than its name says, is refused at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("PIL")
pytest.importorskip("skimage")

import compare_steps
from natten_layers.io.files import FILE_SUFFIXES
from natten_layers_cli import convert, evaluate, sample_hdit
from natten_layers_cli.folders import IMAGE_SUFFIXES


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (compare_steps.run, "nowhere:1 --device cpu --output FILE.png", "--output"),
        (convert.main, "nowhere FILE.safetensors --group-size 2", "TARGET"),
        (convert.main, "nowhere FILE --group-size 2", "TARGET"),
        (evaluate.main, "nowhere nowhere --device cpu --output FILE.json", "--output"),
        (sample_hdit.main, "nowhere --device cpu --output FILE.png", "--output"),
        (sample_hdit.main, "nowhere --device cpu --out FILE", "--out"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_anything_is_read(
    main: Callable[[list[str]], int], arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(arguments.replace("FILE", f"{tmp_path}/file/x").split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {said} {tmp_path}/file/x" in error
    assert error.endswith(f": nothing can be written to {tmp_path}/file")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (
            convert.main,
            "nowhere NEW.png --group-size 2",
            "TARGET NEW.png must be the name of a directory, without .png",
        ),
        (
            convert.main,
            "nowhere NEW.SafeTensors --group-size 2",
            "without .SafeTensors; files that are written end with .safetensors",
        ),
        (convert.main, "nowhere FILE --group-size 2", "TARGET FILE is no folder: name another, or a file that ends"),
        (
            convert.main,
            "nowhere PIPE.safetensors --group-size 2",
            "TARGET PIPE.safetensors is a device or a pipe, which",
        ),
        (convert.main, "nowhere FOLDER.safetensors --group-size 2", "TARGET FOLDER.safetensors is a folder: name a"),
        (
            sample_hdit.main,
            "nowhere --out NEW.png",
            "--out NEW.png must be the name of a directory, without .png: make it first, or",
        ),
        (sample_hdit.main, "nowhere --out FILE", "--out FILE is no folder: name another, or a grid with --output"),
        (sample_hdit.main, "nowhere --output NEW", "--output must end with .png, got NEW"),
        (evaluate.main, "nowhere nowhere --output NEW.png", "--output must end with .json, got NEW.png"),
    ],
)
def test_no_file_is_made_of_the_name_of_another_kind(
    main: Callable[[list[str]], int], arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").touch()
    (tmp_path / "FOLDER.safetensors").mkdir()
    os.mkfifo(tmp_path / "PIPE.safetensors")

    def there(text: str) -> str:
        return re.sub("NEW|FILE|FOLDER|PIPE", lambda match: str(tmp_path / match[0]), text)

    with pytest.raises(SystemExit, match="2"):
        main(there(arguments).split())
    assert there(message) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["best-0.5", "runs.v2", "model.bf16", "samples.ema", "there.png"])
def test_a_folder_may_end_in_what_is_no_suffix_of_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "there.png").mkdir()
    convert.parse_arguments(["nowhere", str(tmp_path / name), "--group-size", "2"])
    sample_hdit.parse_arguments(["nowhere", "--device", "cpu", "--out", str(tmp_path / name)])


@pytest.mark.parametrize("name", ["fid", "fid.json", "fid.JSON", "fid-0.5", "fid.v2"])
def test_json_needs_no_suffix(name: str, tmp_path: Path) -> None:
    evaluate.parse_arguments(["nowhere", "nowhere", "--device", "cpu", "--output", str(tmp_path / name)])


def test_tensors_need_no_suffix(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import decode_ltx

    for name in ("video", "video.pt", "video-0.5"):
        decode_ltx.parse_arguments(["--tiny", "--save", str(tmp_path / name)])


def test_images_are_files() -> None:
    assert IMAGE_SUFFIXES <= FILE_SUFFIXES
