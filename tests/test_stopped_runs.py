"""Runs that are stopped or killed, or whose disk is full, lose nothing that was learned and go on as if nothing was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hdit_runs import ENVIRONMENT, TRAIN, cut, draw, metrics, small_disk, temporaries, train, write_config
from torch import Tensor

from natten_layers import HDiT
from natten_layers_cli import convert, hdit_trainer, running, sampled
from natten_layers_cli.checkpointing import RunFiles, save_sharded
from natten_layers_cli.hdit_trainer import Trainer
from natten_layers_cli.parallel import Processes


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_a_killed_run_resumes_to_the_same_loss_curve(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(config, "whole", "--end-step", "5") == 0

    step = Trainer._train_step

    def killed(self: Trainer, *arguments) -> Tensor:
        if self.step == 3:
            raise SystemExit(9)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", killed)
        with pytest.raises(SystemExit):
            train(config, "killed", "--end-step", "5")
    assert len(metrics(config, "killed").splitlines()) == 4  # a header, and a step more than the checkpoint knows of
    assert json.loads((config.parent / "killed_state.json").read_text()) == {"latest_checkpoint": "killed_00000002.pth"}
    assert train(config, "killed", "--end-step", "5") == 0
    assert metrics(config, "killed") == metrics(config, "whole")
    for suffix in (".safetensors", "_samples.png"):
        assert (config.parent / f"killed{suffix}").read_bytes() == (config.parent / f"whole{suffix}").read_bytes()


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_save_and_the_run_goes_on(config: Path, monkeypatch: pytest.MonkeyPatch, signal_name: str) -> None:
    number = signal.Signals[signal_name]
    flags = ["--end-step", "4", "--grad-accum-steps", "2", "--batch-size", "2"]
    assert train(config, "whole", *flags) == 0
    step = Trainer._train_step

    def interrupted(self: Trainer, *arguments) -> Tensor:
        if self.step == 2:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "isatty", lambda descriptor: False)  # SIGHUP must not silence a terminal under the tests
        patch.setattr(Trainer, "_train_step", interrupted)
        assert train(config, "stopped", *flags) == {"SIGINT": 130, "SIGHUP": 129, "SIGUSR1": 0}[signal_name]
    assert (config.parent / "stopped_00000003.pth").exists()
    assert train(config, "stopped", *flags) == 0
    assert metrics(config, "stopped") == metrics(config, "whole")


@pytest.mark.parametrize("where", ["demo", "save", "step"])
def test_a_second_ctrl_c_loses_no_state_that_is_whole(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    """While a grid is sampled, or a checkpoint written, the state is whole; within a step it is not."""

    def twice(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return function(*arguments, **options)

        return run

    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    if where == "demo":
        monkeypatch.setattr(sampled, "sample_batches", twice(sampled.sample_batches))
    elif where == "save":
        monkeypatch.setattr(hdit_trainer, "save_checkpoint", twice(hdit_trainer.save_checkpoint))
    else:
        monkeypatch.setattr(Trainer, "_losses", twice(Trainer._losses))
    assert train(config, "a", "--end-step", "5", "--demo-every", "1", "--save-every", "1000") == 130
    error = capfd.readouterr().err
    if where == "save":  # the last one, of a run that needs no other
        assert "saving what there is" in error
        assert (config.parent / "a_00000005.pth").exists()
    else:
        assert (config.parent / "a_00000001.pth").exists() == (where == "demo")
        assert ("stopped at once" in error) == (where == "step")


def test_a_terminal_that_is_gone_is_not_written_to(tmp_path: Path) -> None:
    """After SIGHUP, writing to it is an error, and a progress bar writes before the state is saved."""
    with (tmp_path / "terminal").open("wb", buffering=0) as terminal, running.Signals() as signals:
        signals.terminals = [terminal.fileno()]
        terminal.write(b"before")
        signal.raise_signal(signal.SIGHUP)
        terminal.write(b"after")
        assert signals.status == 129
    assert (tmp_path / "terminal").read_bytes() == b"before"


def test_a_log_on_a_full_disk() -> None:
    """It ends no progress bar, and the exit status still says that the command failed."""
    code = (
        "import sys; from natten_layers_cli import progress, running; progress.SECONDS = 0\n"
        "def shows():\n    with progress.progress(2) as bar: bar.update(2)\n    return 5\n"
        "def fails():\n    raise ValueError('wrong')\n"
        "running.os._exit(10 * running.run_command(shows) + running.run_command(fails))"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, stderr=full, timeout=120)
    assert done.returncode == 52


@pytest.mark.parametrize("where", ["save_checkpoint", "save_pretrained", "record"])
def test_a_kill_during_the_last_save_loses_nothing(config: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Before each of the files that a save writes, and with what is half written left behind."""
    assert train(config, "whole", "--end-step", "4") == 0
    owner = {"save_checkpoint": hdit_trainer, "save_pretrained": HDiT, "record": RunFiles}[where]
    original, calls = getattr(owner, where), iter(range(9))

    def killed(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise SystemExit(9)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, killed)
        with pytest.raises(SystemExit):
            train(config, "killed", "--end-step", "4")
    state = json.loads((config.parent / "killed_state.json").read_text())
    assert state == {"latest_checkpoint": "killed_00000002.pth"}  # until all that belongs to the newer one is there
    left = [config.parent / name for name in (".killed_00000004.0123abcd.tmp.pth", ".killed.89abcdef.tmp.safetensors")]
    others = [
        config.parent / name for name in (".killed_2_00000004.0123abcd.tmp.pth", ".kill.89abcdef.tmp.safetensors")
    ]
    for path in (*left, *others):
        path.write_bytes(b"half")
    assert train(config, "killed", "--end-step", "4") == 0
    for suffix in (".safetensors", "_samples.png", "_metrics.csv"):
        assert (config.parent / f"killed{suffix}").read_bytes() == (config.parent / f"whole{suffix}").read_bytes()
    assert temporaries(config.parent) == others or temporaries(config.parent) == others[::-1]


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a process that still runs after a test has failed, and those that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_sigterm_to_all_processes_saves(config: Path) -> None:
    """Schedulers and ``timeout`` signal all processes: those that load images must run until the step is finished."""
    flags = ["--config", str(config), "--name", str(config.parent / "a"), "--device", "cpu", "--num-workers", "2"]
    command = [sys.executable, *TRAIN, *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, start_new_session=True, text=True, env=ENVIRONMENT, stdout=pipe, stderr=pipe)
    try:
        path = config.parent / "a_metrics.csv"
        deadline = time.monotonic() + 120
        while not path.exists() or len(path.read_text().splitlines()) < 4:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=60)
    finally:
        kill_group(process)
    assert process.returncode == 143, output
    saved = json.loads((config.parent / "a_state.json").read_text())["latest_checkpoint"]
    assert int(saved.removeprefix("a_").removesuffix(".pth")) >= 3


def test_a_run_with_workers_skips_an_image_that_breaks_and_ends_when_all_do(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the way there: signals to the workers themselves change nothing, and the name is taken."""
    folder = config.parent / "images"
    for i in range(3):
        draw(folder / f"{i}.jpg", size=(32, 32))
    flags = ["--config", str(config), "--name", str(config.parent / "a"), "--device", "cpu", "--num-workers", "2"]
    command = [sys.executable, *TRAIN, *flags, "--data", str(folder), "--save-every", "100000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, start_new_session=True, text=True, env=ENVIRONMENT, stdout=pipe, stderr=pipe)
    try:
        check_a_run_with_workers(config, process, folder)
    finally:
        kill_group(process)
    assert "another process is training" in capsys.readouterr().err


def check_a_run_with_workers(config: Path, process: subprocess.Popen[str], folder: Path) -> None:
    path, deadline = config.parent / "a_metrics.csv", time.monotonic() + 120

    def wait_for_steps(count: int) -> None:
        start = len(path.read_text().splitlines()) if path.exists() else 0
        while not path.exists() or len(path.read_text().splitlines()) < start + count:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)

    wait_for_steps(3)
    assert train(config, "a", "--end-step", "1") == 2
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(int(worker), number)
    process.send_signal(signal.SIGUSR1)
    wait_for_steps(5)
    assert list(config.parent.glob("a_*.pth"))
    cut(folder / "1.jpg")
    wait_for_steps(5)  # of one to seven batches that were loaded ahead; each has every image of the three
    for name in ("0.jpg", "2.jpg"):
        cut(folder / name)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 2, (output, error)
    assert f"warning: {folder / '1.jpg'} cannot be read as an image" in error
    assert "error: 3 images in a row cannot be read; the last one: " in error.splitlines()[-1]
    saved = json.loads((config.parent / "a_state.json").read_text())["latest_checkpoint"]
    steps = path.read_text().splitlines()[-1].split(",")[0]
    assert saved == f"a_{int(steps):08}.pth"  # nothing that was learned is lost
    assert "stopping" not in error  # as a worker would say that answers for the run
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_convert_answers_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tmp_path / "nowhere.safetensors"), str(tmp_path / "x.safetensors"), "--group-size", "2"]
    assert convert.main(command) == 2
    assert "nowhere.safetensors" in capsys.readouterr().err

    def fail(error: BaseException) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert_file", lambda *_: fail(RuntimeError("no\nmemory\n")))
        assert convert.main(command) == 2
        assert capsys.readouterr().err.endswith("error: no memory\n")
        patch.setattr(convert, "convert_file", lambda *_: fail(KeyboardInterrupt()))
        assert convert.main(command) == 130
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, "run", "--end-step", "2") == 0
    before = {path: path.read_bytes() for path in config.parent.glob("run*") if path.suffix in (".pth", ".safetensors")}
    with small_disk(1000):
        assert train(config, "log", "--end-step", "99", "--save-every", "1000") == 2
        (error,) = re.findall(r"error: cannot write (.*): File too large", capsys.readouterr().err)
        assert Path(error) in (config.parent / "log_tensorboard", config.parent / "log_metrics.csv")
    with small_disk(20_000):
        assert train(config, "run", "--end-step", "4") == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.endswith(f"error: cannot write {config.parent / 'run_00000004.pth'}: File too large")
        source, target = config.parent / "run.safetensors", config.parent / "other.safetensors"
        assert convert.main([str(source), str(target), "--group-size", "1"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].count(f"cannot write {target}: ") == 1
    assert {path: path.read_bytes() for path in before} == before
    assert not temporaries(config.parent)
    assert train(config, "run", "--end-step", "4") == 0


def test_sharded_checkpoints_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "file").touch()

    def save(path: Path, processes: Processes) -> None:
        model = torch.nn.Linear(100, 100)
        processes.shard(model)
        save_sharded(path, model, model, torch.optim.AdamW(model.parameters()), {}, processes)

    def says(path: Path, reason: str) -> Any:
        return pytest.raises(OSError, match=f"^cannot write {path}: {reason}$")

    path, under_a_file = tmp_path / "run_00000001", tmp_path / "file" / "run_00000001"
    with Processes("cpu", fsdp=True) as processes:
        with small_disk(1000), says(path, "File too large"):
            save(path, processes)
        with says(under_a_file, "Not a directory"):
            save(under_a_file, processes)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
