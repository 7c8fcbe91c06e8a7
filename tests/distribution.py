"""Try built distributions as a stranger gets them: ``python tests/distribution.py dist`` (``make dist`` builds them).

The wheel is installed into an empty environment, first alone and then with the extras of the commands; every command
runs. The source distribution is unpacked elsewhere, and tests run from there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = tuple(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
QUICK_TESTS = ("tests/test_package.py", "tests/test_readme.py", "tests/test_imports.py", "tests/test_geometry.py")
MODEL = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [16, 16],
        "patch_size": 4,
        "depths": [1, 1],
        "widths": [32, 32],
        "self_attns": [{"type": "neighborhood", "d_head": 8, "kernel_size": 3}, {"type": "global", "d_head": 16}],
        "mapping_width": 16,
        "sigma_sample_density": {"type": "lognormal", "mean": 0.0, "std": 1.0},
    },
    "dataset": {"type": "photographs", "short_side": 32, "files": {"cat": "chelsea.png"}},
}


class Environment:
    """A new virtual environment, in which nothing of the caller's is found."""

    def __init__(self, folder: Path, pip_options: Sequence[str]) -> None:
        venv.create(folder, with_pip=True)
        self.bin, self.pip_options = folder / "bin", pip_options
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.variables = {key: value for key, value in os.environ.items() if key not in hidden}

    def install(self, *what: str) -> None:
        command = (str(self.bin / "python"), "-m", "pip", "install", "--quiet", *self.pip_options, *what)
        subprocess.run(command, check=True, env=self.variables)

    def run(self, *command: str, folder: Path, status: int = 0) -> str:
        """The output of a command, which must end with ``status`` and without a traceback."""
        start = time.monotonic()
        done = subprocess.run(
            (str(self.bin / command[0]), *command[1:]), cwd=folder, env=self.variables, capture_output=True, text=True
        )
        output = done.stdout + done.stderr
        if done.returncode != status or "Traceback" in output:
            sys.exit(f"{' '.join(command)}: exit status {done.returncode}, expected {status}\n{output}")
        print(f"ok, {time.monotonic() - start:.0f} s: {' '.join(command)[:100]}", flush=True)
        return output


def check_library(python: Environment, folder: Path) -> None:
    """What works without any extra."""
    python.run("python", "-c", "import natten_layers; print(natten_layers.__version__)", folder=folder)
    code = "from natten_layers import *; HDiT(HDiTConfig((LevelConfig(1, 64),))).save_pretrained('model.safetensors')"
    python.run("python", "-c", code, folder=folder)
    python.run("natten-layers-convert", "model.safetensors", "same.safetensors", "--group-size", "1", folder=folder)
    for command in ("natten-layers-tune", "natten-layers-generate"):
        python.run(command, "--help", folder=folder)
    for command, extra in (("train-hdit", "hdit"), ("sample-hdit", "hdit"), ("evaluate", "hdit"), ("train-lm", "lm")):
        assert f"natten-layers[{extra}]" in python.run(f"natten-layers-{command}", "--help", folder=folder, status=2)


def check_commands(python: Environment, folder: Path) -> None:
    """A tiny run of every command, each on what an earlier one wrote."""
    said = {command: python.run(command, "--help", folder=folder) for command in COMMANDS}
    assert all(text.startswith("usage: natten-layers-") for text in said.values())
    assert "{cpu-demo,gpu-demo}" in said["natten-layers-train-hdit"]  # the wheel holds the presets
    (folder / "config.json").write_text(json.dumps(MODEL))
    cpu = ("--device", "cpu")
    python.run(
        "natten-layers-train-hdit", "--config", "config.json", "--name", "run", "--end-step", "2", "--batch-size", "2",
        "--sample-n", "1", "--sample-steps", "2", "--num-workers", "0", *cpu, folder=folder,
    )  # fmt: skip
    python.run("natten-layers-sample-hdit", "run.safetensors", "--reproduce", "run_samples.png", *cpu, folder=folder)
    python.run("natten-layers-convert", "run.safetensors", "grouped.safetensors", "--group-size", "2", folder=folder)
    python.run(
        "natten-layers-sample-hdit", "grouped.safetensors", "-n", "1", "--steps", "2", "--output", "grouped.png", *cpu,
        folder=folder,
    )  # fmt: skip
    python.run(
        "natten-layers-sample-hdit", "grouped.safetensors", "-n", "2", "--steps", "1", "--out", "images", *cpu,
        folder=folder,
    )  # fmt: skip
    assert "no FID and no KID" in python.run("natten-layers-evaluate", "images", "images", *cpu, folder=folder)
    (folder / "text").mkdir()
    for name in map(str, range(40)):
        (folder / "text" / f"{name}.txt").write_text(f"{name} is a letter. " * 100)
    python.run(
        "natten-layers-train-lm", "--data", "text", "--pattern", "*.txt", "--name", "lm", "--layers", "2", "--hidden",
        "32", "--heads", "2", "--kv-heads", "1", "--context", "32", "--end-step", "2", "--eval-every", "2",
        "--eval-tokens", "64", "--sample-tokens", "8", *cpu, folder=folder,
    )  # fmt: skip
    prompt = ("--prompt", "a is", "--tokens", "8")
    assert python.run("natten-layers-generate", "lm/model", *prompt, *cpu, folder=folder).startswith("a is")
    flags = ("16x16", "--kernel-size", "3", "--heads", "2", "--head-dim", "16", "--trials", "2")
    has_gpu = "True" in python.run("python", "-c", "import torch; print(torch.cuda.is_available())", folder=folder)
    python.run("natten-layers-tune", *flags, folder=folder, status=0 if has_gpu else 2)


def check_source(python: Environment, archive: Path, folder: Path) -> None:
    """All tests of the source distribution can be collected, and those that take seconds pass."""
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    python.variables["PYTHONPATH"] = str(source)
    python.run("python", "-m", "pytest", "--quiet", "--collect-only", folder=source)
    python.run("python", "-m", "pytest", "--quiet", *QUICK_TESTS, folder=source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one wheel and one source distribution")
    parser.add_argument("pip_options", nargs="*", help="options of pip install, after --")
    args = parser.parse_args()
    (wheel,), (archive,) = (list(args.dist.resolve().glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in ("environment", "work", "source")]
        for folder in folders:
            folder.mkdir()
        python = Environment(folders[0], args.pip_options)
        python.install(str(wheel))
        check_library(python, folders[1])
        python.install(f"{wheel}[hdit,lm]")
        check_commands(python, folders[1])
        python.install(f"{wheel}[test,transformers,diffusers]", "mkdocs-material")
        check_source(python, archive, folders[2])
    print("the distributions work")


if __name__ == "__main__":
    main()
