"""Small runs of the HDiT commands, and what goes wrong with their files, disks and images."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from natten_layers_cli import train_hdit
from natten_layers_cli.checkpointing import RunFiles
from natten_layers_cli.hdit_trainer import Trainer
from natten_layers_cli.parallel import Processes

ROOT = Path(__file__).parents[1]
TRAIN = ["-m", "natten_layers_cli.train_hdit"]
# New processes find the package without an installation, and leave the cores to the tests that run beside them.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CONFIG: dict[str, Any] = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [16, 16],
        "patch_size": [2, 2],
        "depths": [1, 1],
        "widths": [16, 16],
        "self_attns": [
            {
                "type": "neighborhood",
                "d_head": 8,
                "kernel_size": 3,
                "num_kv_heads": 1,
                "num_registers": 2,
                "sink": "zero",
            },
            {"type": "global", "d_head": 8},
        ],
        "dropout_rate": 0.1,
        "mapping_width": 16,
        "mapping_depth": 1,
        "loss_weighting": "soft-min-snr",
        "sigma_data": 0.5,
        "sigma_min": 1e-2,
        "sigma_max": 80,
        "sigma_sample_density": {"type": "cosine-interpolated"},
    },
    "dataset": {"type": "photographs", "short_side": 24, "files": {"cat": "chelsea.png", "brick": "brick.png"}},
    "run": {"batch_size": 4, "demo_every": 0, "save_every": 2, "sample_n": 2, "sample_steps": 2, "num_workers": 0},
}


def write_config(folder: Path) -> Path:
    """``CONFIG`` as a file."""
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def train(config: Path, name: str, *flags: str) -> int:
    return train_hdit.main(["--config", str(config), "--name", str(config.parent / name), "--device", "cpu", *flags])


def make_trainer(config: Path, *flags: str) -> Trainer:
    arguments = train_hdit.parse_arguments(
        ["--config", str(config), "--name", str(config.parent / "a"), "--device", "cpu", *flags]
    )
    return Trainer(arguments, Processes("cpu", fsdp=False), RunFiles(arguments.name))


def metrics(config: Path, name: str) -> str:
    return (config.parent / f"{name}_metrics.csv").read_text()


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def draw(path: Path, mode: str = "RGB", color: Any = "red", size: tuple[int, int] = (8, 8), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def cut(path: Path) -> None:
    """As a copy that was broken off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Within the context, no file can grow beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
