"""How files are written and read: as a whole or not at all, by threads at once, through pipes, and by no model."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Event

import pytest
from helpers import within

from natten_layers.io import checkpoints, hf
from natten_layers.io.files import make_folder, parse_json, read_short, replacing


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
