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
from natten_layers_cli import convert, evaluate, sample_hdit


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
        (convert.main, "nowhere NEW.png --group-size 2", "TARGET NEW.png would be a folder: leave .png away, make it"),
        (convert.main, "nowhere NEW.SafeTensors --group-size 2", "or name a file that ends with .safetensors"),
        (convert.main, "nowhere FILE --group-size 2", "TARGET FILE is no folder: name another, or a file that ends"),
        (
            convert.main,
            "nowhere PIPE.safetensors --group-size 2",
            "TARGET PIPE.safetensors is a device or a pipe, which",
        ),
        (convert.main, "nowhere FOLDER.safetensors --group-size 2", "TARGET FOLDER.safetensors is a folder: name a"),
        (sample_hdit.main, "nowhere --out NEW.png", "--out NEW.png would be a folder: leave .png away, make it first"),
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


def test_a_folder_may_end_in_a_version(tmp_path: Path) -> None:
    (tmp_path / "best.final").mkdir()
    for name in ("best-0.5", "best.final"):
        convert.parse_arguments(["nowhere", str(tmp_path / name), "--group-size", "2"])
