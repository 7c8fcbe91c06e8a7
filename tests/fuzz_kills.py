"""Kill the commands that write at random moments, and check what they leave: ``python tests/fuzz_kills.py --rounds 9``.

A file under its final name is whole at every moment, whatever was killed. The same command then goes on, and ends with
the same files as a run that nobody disturbed. SIGTERM and Ctrl-C are answered without a traceback.

Processes are forked from one that has loaded PyTorch, so that a round takes less than the seconds of an import.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from distribution import MODEL

from natten_layers import DecoderLM, HDiT, HDiTConfig
from natten_layers.io.checkpoints import load_plain
from natten_layers.io.files import read_json
from natten_layers.kernels.host.tuned import read_tuned
from natten_layers_cli import convert, sample_hdit, train_hdit, train_lm, tune
from natten_layers_cli.checkpointing import RunFiles
from natten_layers_cli.pictures import read_record

CPU = ("--device", "cpu")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HDIT = (
    "--config", "config.json", "--name", "out/run", "--end-step", "6", "--batch-size", "2", "--save-every", "2",
    "--demo-every", "3", "--sample-n", "1", "--sample-steps", "1", "--num-workers", "0", *CPU,
)  # fmt: skip
LM = (
    "--data", "text", "--pattern", "*.txt", "--name", "out", "--layers", "1", "--hidden", "16", "--heads", "2",
    "--kv-heads", "1", "--context", "16", "--batch-size", "2", "--end-step", "6", "--eval-every", "2", "--eval-tokens",
    "32", "--sample-tokens", "0", "--held-out-bytes", "100", *CPU,
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    name: str
    start: Callable[[], int]
    """runs the command in the working folder, writing to out/"""
    check: Callable[[], object]
    """raises unless all files in out/ are whole"""
    result: Callable[[], object]
    """of a finished run: equal for equal runs"""


def start_tune() -> int:
    clock = iter(range(10**6, 0, -1))  # every try is faster than the one before
    flags = "9x9 --kernel-size 3 --heads 1 --head-dim 16 --dtype fp32 --trials 4 --kernels forward --device cpu"
    return tune.main(flags.split(), timer=lambda run: float(next(clock)) ** 8)


def check_hdit() -> None:
    files = RunFiles("out/run")
    for path in Path("out").glob("run_0*.pth"):
        load_plain(path)
    for path in Path("out").glob("*.safetensors"):
        HDiT.from_pretrained(path)
    for path in Path("out").glob("*_samples.png"):
        read_record(path)
    if files.state.exists():
        named = read_json(files.state)["latest_checkpoint"]
        assert (files.state.parent / named).exists(), f"{files.state} names {named}, which does not exist"
    files.losses(10**6)


def check_lm() -> None:
    if Path("out/checkpoint.pt").exists():
        load_plain(Path("out/checkpoint.pt"))
    if Path("out/model/config.json").exists() and Path("out/model/model.safetensors").exists():
        DecoderLM.from_pretrained("out/model")


def check_model() -> None:
    if Path("out/grouped.safetensors").exists():
        HDiT.from_pretrained("out/grouped.safetensors")


def check_grid() -> None:
    if Path("out/grid.png").exists():
        read_record(Path("out/grid.png"))


COMMANDS = (
    Command(
        "train-hdit", lambda: train_hdit.main(HDIT), check_hdit,
        lambda: (Path("out/run_metrics.csv").read_text(), Path("out/run.safetensors").read_bytes()),
    ),
    Command("train-lm", lambda: train_lm.main(LM), check_lm, lambda: Path("out/model/model.safetensors").read_bytes()),
    Command(
        "sample-hdit",
        lambda: sample_hdit.main(["model.safetensors", "-n", "1", "--steps", "2", "--output", "out/grid.png", *CPU]),
        check_grid, lambda: Path("out/grid.png").read_bytes(),
    ),
    Command(
        "convert", lambda: convert.main(["model.safetensors", "out/grouped.safetensors", "--group-size", "2"]),
        check_model, lambda: Path("out/grouped.safetensors").read_bytes(),
    ),
    Command(
        "tune", start_tune, lambda: read_tuned(Path("out/configs.json")), lambda: Path("out/configs.json").read_text()
    ),
)  # fmt: skip


def prepare(folder: Path) -> None:
    """The inputs of all commands."""
    os.chdir(folder)
    Path("config.json").write_text(json.dumps(MODEL))
    HDiT(HDiTConfig.from_json("config.json")).save_pretrained("model.safetensors")
    Path("text").mkdir()
    for number in range(40):
        (Path("text") / f"{number}.txt").write_text(f"{number} is a number. " * 30)


def forked(body: Callable[[], int], log: Path) -> int:
    """The id of a new process that runs ``body`` and ends with its status; what it prints goes to ``log``."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.environ["NATTEN_LAYERS_CACHE"] = str(Path("out").absolute())
        status = body()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def undisturbed(command: Command, log: Path) -> tuple[float, object]:
    """Run a command to its end; returns its seconds and its result."""
    start = time.monotonic()
    _, wait = os.waitpid(forked(command.start, log), 0)
    status = os.waitstatus_to_exitcode(wait)
    assert status == 0, f"exit status {status}: {log.read_text()}"
    return time.monotonic() - start, command.result()


def disturbed(command: Command, random: Random, seconds: float, log: Path) -> None:
    """Send a signal at a random moment, and check the files and the answer."""
    number, moment = random.choice(SIGNALS), random.uniform(0.02, 1.1) * seconds
    child = forked(command.start, log)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    _, wait = os.waitpid(child, 0)
    status, said = os.waitstatus_to_exitcode(wait), log.read_text()
    where = f"{signal.Signals(number).name} after {moment:.3f} s"
    assert status in (0, -number, 128 + number), f"{where}: exit status {status}: {said}"
    assert "Traceback" not in said, f"{where}: {said}"
    try:
        command.check()
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


def fuzz(command: Command, rounds: int, random: Random, log: Path) -> list[str]:
    """What was wrong, in words."""
    shutil.rmtree("out", ignore_errors=True)
    seconds, expected = undisturbed(command, log)
    found = []
    for number in range(rounds):
        if number % 2 == 0:  # every other round begins where the one before was killed
            shutil.rmtree("out", ignore_errors=True)
        try:
            disturbed(command, random, seconds, log)
            if number % 2:
                _, result = undisturbed(command, log)
                assert result == expected, "the run that went on has another result than one that nobody disturbed"
                left = sorted(path.name for path in Path("out").rglob(".*.tmp*"))
                assert not left or command.name not in ("train-hdit", "train-lm"), f"left behind: {left}"
        except AssertionError as error:
            found.append(f"{command.name}, round {number}: {error}")
    print(f"{command.name}: {rounds} rounds of up to {seconds:.1f} s, {len(found)} faults", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=[c.name for c in COMMANDS], default=[c.name for c in COMMANDS])
    args = parser.parse_args()
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if settings.items() - os.environ.items():  # they are read by imports
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        log = Path(folder) / "log"
        chosen = [command for command in COMMANDS if command.name in args.commands]
        found = [fault for c in chosen for fault in fuzz(c, args.rounds, Random(f"{args.seed} {c.name}"), log)]
    print("\n\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
