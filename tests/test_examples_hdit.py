"""The training and sampling commands of HDiT, at sizes that run in seconds."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from natten_layers import HDiT, HDiTConfig, LevelConfig
from natten_layers_cli import convert, hdit_trainer, running, sample_hdit, sampled, train_hdit
from natten_layers_cli.augmentation import augment
from natten_layers_cli.batches import Examples, Keys, default_workers, load_batches
from natten_layers_cli.checkpointing import DamagedError, RunFiles, check_rest, save_sharded
from natten_layers_cli.diffusion import (
    SAMPLERS,
    guided,
    karras_sigmas,
    learning_rate_factor,
    make_sigma_quantile,
    stratified,
)
from natten_layers_cli.folders import Folder
from natten_layers_cli.hdit_trainer import Trainer
from natten_layers_cli.parallel import Processes
from natten_layers_cli.pictures import read_record, save_png
from natten_layers_cli.sources import Photographs, describe, open_source, parse_data_flag
from natten_layers_cli.training_config import read_config

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


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def train(config: Path, name: str, *flags: str) -> int:
    return train_hdit.main(["--config", str(config), "--name", str(config.parent / name), "--device", "cpu", *flags])


def metrics(config: Path, name: str) -> str:
    return (config.parent / f"{name}_metrics.csv").read_text()


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


# --- Noise levels, schedules, samplers


@pytest.mark.parametrize(
    ("density", "median"),
    [
        ({"type": "lognormal", "mean": -1.2, "std": 1.2}, math.exp(-1.2)),
        ({"type": "split-lognormal", "loc": -1.0, "scale_1": 2.0, "scale_2": 2.0}, math.exp(-1.0)),
        ({"type": "loglogistic", "loc": -0.5}, math.exp(-0.5)),
        ({"type": "loguniform"}, math.sqrt(0.01 * 80)),
        ({"type": "v-diffusion"}, 0.5),
        ({"type": "cosine-interpolated", "image_d": 32}, 0.5),
    ],
)
def test_sigma_quantile(density: dict, median: float) -> None:
    model = {"sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80.0, "input_size": [32, 32]}
    quantile = make_sigma_quantile({**model, "sigma_sample_density": density})
    u = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    sigma = quantile(u)
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(sigma[50].item(), median, rtol=2e-3, atol=0)


def test_cosine_interpolated_shifts_high_noise_up_with_resolution() -> None:
    """By hand: ``sigma_data tan(u pi / 2) (size / noise_d_low) ** u (size / noise_d_high) ** (1 - u)``.

    That is the schedule with ends at 0 and infinity; from 1e-3 to 1e3 it differs by 2 % at u = 0.9.
    """
    model = {"sigma_data": 0.5, "sigma_min": 1e-3, "sigma_max": 1e3, "input_size": [256, 256]}
    quantile = make_sigma_quantile({**model, "sigma_sample_density": {"type": "cosine-interpolated"}})
    u = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    expected = 0.5 * torch.tan(u * math.pi / 2) * (256 / 32) ** u
    torch.testing.assert_close(quantile(u), expected, rtol=3e-2, atol=0)


def test_split_lognormal_has_its_mass_where_its_scales_say() -> None:
    density = {"type": "split-lognormal", "loc": 0.0, "scale_1": 3.0, "scale_2": 1.0}
    model = {"sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80.0, "input_size": [32, 32]}
    quantile = make_sigma_quantile({**model, "sigma_sample_density": density})
    u = torch.tensor([0.375, 0.75, 0.875], dtype=torch.float64)  # quartile of the lower half, loc, median of the upper
    expected = torch.tensor([-3.0, 0.0, 1.0], dtype=torch.float64) * torch.special.ndtri(torch.tensor(0.75))
    torch.testing.assert_close(quantile(u).log(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("density", "message"),
    [
        ({"type": "cauchy"}, "type is 'cauchy'; known are lognormal"),
        ({}, "type is None; known are lognormal"),
        *(
            ({"type": kind, "min_value": 2, "max_value": 1}, r"min_value must be .*max_value 1, got 2$")
            for kind in ("loguniform", "loglogistic", "v-diffusion", "cosine", "cosine-interpolated")
        ),
        ({"type": "loguniform", "min_value": 100}, "max_value 80, got 100$"),
        ({"type": "loguniform", "min_value": 0}, "must be above 0 and at most max_value 80, got 0$"),
        ({"type": "cosine-interpolated", "max_value": 1e-5}, "max_value 1e-05, got 0.001 by default"),
        ({"type": "lognormal", "std": 1}, r"lacks mean \(or loc\)"),
        ({"type": "lognormal", "mean": 1, "loc": 2, "std": 1}, r"has both of mean \(or loc\)"),
        ({"type": "split-lognormal", "loc": 1, "scale_1": 1}, r"lacks std_2 \(or scale_2\)"),
        ({"type": "lognormal", "mean": 1, "std": 1, "max_value": 3}, "has unknown keys 'max_value'"),
        ({"type": "lognormal", "mean": 90, "std": 1}, "gives noise levels from .* to inf"),
        ({"type": "lognormal", "mean": -90, "std": 9}, "gives noise levels from 0 to"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_densities_without_noise_levels(density: dict[str, Any], message: str) -> None:
    model = {"sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80.0, "input_size": [32, 32]}
    with pytest.raises(ValueError, match=rf"^model.sigma_sample_density.*{message}"):
        make_sigma_quantile({**model, "sigma_sample_density": density})


@pytest.mark.parametrize("kind", ["loguniform", "cosine-interpolated"])
def test_a_density_down_to_no_noise(kind: str) -> None:
    model = {"sigma_data": 0.5, "sigma_min": 0, "sigma_max": 80.0, "input_size": [32, 32]}
    with pytest.raises(ValueError, match=r"min_value must be above 0 and .*, got 0 by default"):
        make_sigma_quantile({**model, "sigma_sample_density": {"type": kind}})
    make_sigma_quantile({**model, "sigma_sample_density": {"type": kind, "min_value": 0.01}})


def test_stratified_covers_every_stratum() -> None:
    places = torch.randperm(16)
    u = stratified(places, 16, torch.rand(16))
    assert torch.equal((u * 16).long(), places)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp-2m", 2)])
def test_samplers_converge_at_their_order(name: str, order: int) -> None:
    """Data ``N(0, c^2)``: the flow scales ``x`` by ``sqrt((s'^2 + c^2) / (s^2 + c^2))``, so the end is known."""
    c, x = 0.5, torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (c**2 / (sigma**2 + c**2)).view(-1, 1, 1, 1)

    def error(steps: int) -> float:
        sigmas = karras_sigmas(steps, 0.5, 80.0)[:-1]  # to sigma_min: the last step, to 0, is Euler's in all of them
        end = SAMPLERS[name](denoiser, x, sigmas, lambda _: None).item()
        return abs(end - 80.0 * math.sqrt((0.25 + c**2) / (6400 + c**2)))

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.25)


def test_guidance_extrapolates() -> None:
    def denoiser(x: Tensor, sigma: Tensor, class_cond: Tensor) -> Tensor:
        return x * class_cond.view(-1, 1, 1, 1)

    x, sigma, label = torch.ones(2, 1, 1, 1), torch.ones(2), torch.tensor([1, 3])
    for scale, expected in ((0.0, [7.0, 7.0]), (1.0, [1.0, 3.0]), (2.0, [-5.0, -1.0])):
        assert guided(denoiser, label, 7, scale)(x, sigma).flatten().tolist() == expected


def test_learning_rates() -> None:
    assert learning_rate_factor({"type": "constant", "warmup": 0.5}, 1) == 0.75
    assert learning_rate_factor({"type": "inverse", "inv_gamma": 10, "power": 0.5}, 30) == 0.5
    assert learning_rate_factor({"type": "exponential", "num_steps": 10, "decay": 0.5}, 20) == 0.25
    assert learning_rate_factor({"type": "cosine", "num_steps": 10}, 20) == pytest.approx(0.1)


# --- Data


def test_keys_do_not_depend_on_how_the_work_is_split() -> None:
    def take(steps: int, batch_size: int, accumulate: int = 1, rank: int = 0, world: int = 1, first: int = 0) -> list:
        keys = Keys(5, batch_size, seed=3, first_step=first, accumulate=accumulate, rank=rank, world=world)
        return list(islice(keys, steps * accumulate))

    whole = [key for batch in take(3, 4) for key in batch]
    assert [key for batch in take(2, 4, first=1) for key in batch] == whole[4:]
    assert [key for batch in take(3, 2, accumulate=2) for key in batch] == whole
    ranks = [take(3, 2, rank=rank, world=2) for rank in (0, 1)]
    assert [key for pair in zip(*ranks, strict=True) for batch in pair for key in batch] == whole
    assert sorted(key.item for key in whole[:5]) == list(range(5))
    assert len({key.seed for key in whole}) == len(whole)


def test_photographs_are_crops_of_their_class() -> None:
    photographs = Photographs({"cat": "chelsea.png", "rocket": "rocket.jpg"}, (16, 24), 3, short_side=32)
    image, label = photographs.load(1, torch.Generator().manual_seed(0))
    assert (image.shape, image.dtype, label) == ((3, 16, 24), torch.uint8, 1)
    windows = photographs.photographs[1].unfold(1, 16, 1).unfold(2, 24, 1)  # [3, H, W, 16, 24]
    found = [(windows == view[:, None, None]).all(-1).all(-1).all(0).any() for view in (image, image.flip(-1))]
    assert any(found)


def test_examples_depend_on_their_seed_alone() -> None:
    examples = Examples(Photographs({"cat": "chelsea.png"}, (16, 16), 3, short_side=32), 0.5)
    keys = Keys(1, 2, seed=0, first_step=0, accumulate=1, rank=0, world=1)
    first, second = next(iter(keys))
    torch.manual_seed(1)
    one, again, other = examples[first], examples[first], examples[second]
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.image, other.image)
    assert not torch.equal(one.noise, other.noise)


def test_augment_only_mirrors_at_probability_zero() -> None:
    image = torch.rand(3, 8, 12)
    seen = set()
    for seed in range(8):
        result, condition = augment(image, 0.0, torch.Generator().manual_seed(seed))
        assert condition[1:].abs().max() == 0
        seen.add(condition[0].item())
        torch.testing.assert_close(result, image.flip(-1) if condition[0] else image, rtol=0, atol=1e-5)
    assert seen == {0.0, 1.0}


def test_augment_moves_a_spot_to_where_it_reports() -> None:
    image = torch.zeros(1, 33, 33)
    image[0, 14:19, 24:29] = 1  # 10 right of the centre, (16, 16)
    inside = 0
    for seed in range(20):
        result, condition = augment(image, 1.0, torch.Generator().manual_seed(seed))
        # The nine numbers do not tell a stretch from a squeeze along the same axis: k-diffusion's do not either.
        places = [_moved(10.0, 0.0, 33 / 8, condition.tolist(), sign) for sign in (1, -1)]
        if all(max(abs(x), abs(y)) < 13 for x, y in places):
            inside += 1
            assert any(result[0, round(16 + y), round(16 + x)] > 0.8 for x, y in places)
    assert inside > 5


def _moved(x: float, y: float, shift: float, condition: list[float], sign: int) -> tuple[float, float]:
    """A point after the reported operations in their order: shift, stretch, rotation, scale, flips."""
    mirror, flip, scale, cos, sin, stretch_x, stretch_y, shift_x, shift_y = condition
    x, y, cos = x + shift * shift_x, y + shift * shift_y, cos + 1
    stretch, angle = math.hypot(stretch_x, stretch_y), math.atan2(stretch_y, stretch_x)
    along = (math.cos(angle) * x + math.sin(angle) * y) * 2 ** (0.2 * sign * stretch)
    across = (math.cos(angle) * y - math.sin(angle) * x) * 2 ** (-0.2 * sign * stretch)
    x, y = math.cos(angle) * along - math.sin(angle) * across, math.sin(angle) * along + math.cos(angle) * across
    x, y = (cos * x + sin * y) * 2 ** (0.2 * scale), (cos * y - sin * x) * 2 ** (0.2 * scale)
    return x * (1 - 2 * mirror), y * (1 - 2 * flip)


def test_folders(tmp_path: Path) -> None:
    for name in ("b/1.png", "a/2.PNG", "a/deeper/3.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 40), "red").save(path)
    assert parse_data_flag(str(tmp_path)) == {"type": "imagefolder-class", "location": str(tmp_path)}
    folder = open_source(parse_data_flag(str(tmp_path)), (8, 8), 3)
    assert (folder.class_names, len(folder)) == (("a", "b"), 3)
    generator = torch.Generator()
    assert [folder.load(i, generator)[1] for i in range(3)] == [0, 0, 1]
    image, _ = folder.load(2, generator)
    assert torch.equal(image, torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))
    assert parse_data_flag(str(tmp_path / "b"))["type"] == "imagefolder"
    with pytest.raises(ValueError, match="empty text"):  # not the images of the working folder
        parse_data_flag("")


def loaded(folder: Path, index: int = 0, channels: int = 3) -> Tensor:
    return Folder(folder, (8, 8), channels, classes=False).load(index, torch.Generator())[0]


def draw(path: Path, mode: str = "RGB", color: Any = "red", size: tuple[int, int] = (8, 8), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def cut(path: Path) -> None:
    """As a copy that was broken off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_litter_and_empty_folders_are_no_images_and_no_classes(tmp_path: Path) -> None:
    for name in ("dogs/1.png", "cats/2.png", "cats/3.gif", "dogs/._1.png", ".ipynb_checkpoints/1.png"):
        draw(tmp_path / name)
    draw(tmp_path / "__MACOSX/cats/2.png")
    draw(tmp_path / "._4.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cats/x.png").mkdir()
    for name in ("notes.txt", "cats/b.heic", "cats/c.heic"):
        (tmp_path / name).write_text("?")
    outside = draw(tmp_path.parent / f"{tmp_path.name}-outside/5.png").parent
    (tmp_path / "elsewhere").symlink_to(outside)
    (tmp_path / "cats/round").symlink_to(tmp_path / "cats")
    section = parse_data_flag(str(tmp_path))
    assert section["type"] == "imagefolder-class"
    folder = open_source(section, (8, 8), 3)
    assert isinstance(folder, Folder)
    assert [(path.name, label) for path, label in folder.images] == [
        ("2.png", 0), ("3.gif", 0), ("1.png", 1), ("5.png", 2)
    ]  # fmt: skip
    assert describe(folder) == "4 images, 3 classes: cats, dogs, elsewhere; skipped 3 other files: 2 .heic, 1 .txt"
    assert describe(Folder(tmp_path, (8, 8), 3, classes=False)).startswith("4 images, no classes; skipped 3")


def test_images_beside_class_folders_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.parent / "mixed"
    draw(folder / "cats/1.png")
    draw(folder / "stray.png")
    assert train(config, "a", "--end-step", "1", "--data", str(folder)) == 2
    error = capsys.readouterr().err
    assert f"{folder} holds stray.png beside class folders (cats)" in error
    assert "with --no-classes" in error
    assert train(config, "a", "--end-step", "1", "--data", str(folder), "--no-classes") == 0
    assert "2 images, no classes\n" in capsys.readouterr().out
    assert HDiT.from_pretrained(config.parent / "a.safetensors").config.num_classes == 0
    config.write_text(json.dumps(CONFIG | {"run": CONFIG["run"] | {"classes": False}}))
    assert train(config, "b", "--end-step", "1") == 0  # photographs, which have classes
    assert HDiT.from_pretrained(config.parent / "b.safetensors").config.num_classes == 0


def write_half_png(path: Path) -> None:
    """All checksums are right, and half of the pixels are there, as from a program that was stopped."""
    rows = b"".join(b"\0" + os.urandom(96) for _ in range(32))
    header = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)[: len(rows) // 2]), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def test_broken_images_are_named_at_the_start(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut files that begin well, a flipped bit, no picture at all, and pixels that could only be clipped."""
    monkeypatch.setattr("natten_layers_cli.folders.LOOKED_AT", 4)
    folder = config.parent / "images"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    draw(folder / "good.png")
    for name in ("cut.jpg", "cut.tif", "cut.webp", "flipped.png"):
        noise.save(folder / name)
        if name.startswith("cut"):
            cut(folder / name)
    content = bytearray((folder / "flipped.png").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "flipped.png").write_bytes(content)
    (folder / "text.png").write_bytes(b"no picture")
    draw(folder / "float.tif", "F", 0.5)
    draw(folder / "wide.tif", "I", 70000)
    os.mkfifo(folder / "pipe.png")
    write_half_png(folder / "half.png")
    assert train(config, "a", "--end-step", "1", "--data", str(folder)) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("10 images, no classes")
    message = captured.err.splitlines()[-1]
    assert "error: 9 of 10 images cannot be used" in message
    for name in ("cut.jpg", "cut.tif", "cut.webp", "flipped.png", "text.png", "half.png"):
        assert str(folder / name) in message
    assert f"{folder / 'float.tif'} (its pixels are floating-point numbers" in message
    assert f"{folder / 'wide.tif'} (its pixels are 32-bit" in message
    assert f"{folder / 'pipe.png'} (it is no regular file)" in message
    assert not list(config.parent.glob("a_*"))
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        Folder(folder / "empty", (8, 8), 3, classes=False)


def test_folders_that_cannot_be_listed_are_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "cats/1.png")
    (tmp_path / "lost+found").mkdir()  # which file systems keep to themselves
    draw(tmp_path / "dogs/1.png")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name in ("dogs", "lost+found"):  # permissions do not stop a test that root runs
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"dogs"):
        parse_data_flag(str(tmp_path))
    (tmp_path / "dogs").rename(tmp_path / "wolves")
    assert parse_data_flag(str(tmp_path))["type"] == "imagefolder-class"


def test_images_look_as_their_files_say(tmp_path: Path) -> None:
    """Upright, on white where they are transparent, and of animations the first picture."""
    turned = Image.Exif()
    turned[0x0112] = 6  # the first row is the right side
    half = Image.new("RGB", (8, 8), "black")
    half.paste("white", (0, 0, 8, 4))
    half.save(tmp_path / "exif.png", exif=turned)
    upright = loaded(tmp_path)
    assert (upright[:, :, 4:] == 255).all()
    assert (upright[:, :, :4] == 0).all()
    for i, (mode, color) in enumerate((("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("PA", (0, 0)))):
        draw(tmp_path / f"{mode}/hidden.tif" if mode == "PA" else tmp_path / f"{mode}/hidden.png", mode, color)
        assert (loaded(tmp_path / mode) == 255).all(), i
    draw(tmp_path / "P/hidden.gif", "P", 0, transparency=0)
    assert (loaded(tmp_path / "P") == 255).all()
    draw(tmp_path / "half/half.png", "RGBA", (255, 0, 0, 51))
    assert loaded(tmp_path / "half")[:, 0, 0].tolist() == [255, 204, 204]
    assert loaded(tmp_path / "half", channels=4)[:, 0, 0].tolist() == [255, 0, 0, 51]
    frames = [Image.new("RGB", (8, 8), color) for color in ("lime", "blue")]
    (tmp_path / "gif").mkdir()
    frames[0].save(tmp_path / "gif/a.gif", save_all=True, append_images=frames[1:])
    assert loaded(tmp_path / "gif")[:, 0, 0].tolist() == [0, 255, 0]


def test_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"natten-layers\[hub\]"):
        open_source(parse_data_flag("hf:owner/name"), (8, 8), 3)


def test_images_of_16_bits_keep_their_greys(tmp_path: Path) -> None:
    """Pillow's own conversion would clip all values above 255 (of 65535) to white."""
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("grey.png", "grey.pgm", "grey.tif"):
        Image.fromarray(grey).save(tmp_path / name)
    for index in range(3):
        image = loaded(tmp_path, index)
        assert torch.equal(image, torch.tensor(np.rint(grey / 257), dtype=torch.uint8).expand(3, -1, -1))


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[int | None] = [1, 0]

    class Rows(list):
        features: ClassVar = {"image": None, "kind": SimpleNamespace(names=["day", "night"])}

        def unique(self, column: str) -> list[int | None]:
            return list(dict.fromkeys(row[column] for row in self))

    def load_dataset(name: str, split: str) -> Rows:
        if (name, split) != ("owner/name", "train"):
            raise Exception(f"no\n{name}")  # the package has exceptions of its own, of no narrower type
        return Rows([{"image": Image.new("L", (10, 8), 200), "kind": kind} for kind in kinds])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    section = {"type": "huggingface", "location": "owner/name", "num_classes": 2, "class_key": "kind"}
    source = open_source(section, (8, 8), 3)
    image, label = source.load(0, torch.Generator())
    assert (source.class_names, len(source), label) == (("day", "night"), 2, 1)
    assert torch.equal(image, torch.full((3, 8, 8), 200, dtype=torch.uint8))
    kinds += [-1, None, 2, -1]
    message = "^dataset 'owner/name' has images without a class, of which 'kind' is -1, 2, None: .*--no-classes"
    with pytest.raises(ValueError, match=message):
        open_source(section, (8, 8), 3)
    assert len(open_source({**section, "num_classes": 0}, (8, 8), 3)) == 6
    with pytest.raises(ValueError, match=r"^dataset 'owner/other' cannot be loaded: no owner/other$"):
        open_source({**section, "location": "owner/other"}, (8, 8), 3)
    with pytest.raises(ValueError, match="no column 'label'; it has image, kind"):
        open_source({**section, "class_key": "label"}, (8, 8), 3)


# --- Training


@pytest.mark.parametrize("preset", sorted(train_hdit.PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_presets_build_with_everything_on(preset: Path) -> None:
    config = read_config(preset, None)
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


def test_checkpoints_of_odd_content(tmp_path: Path) -> None:
    whole = {"config": {"model": {}}, "step": 1, "scaler": {}}
    check_rest(tmp_path, whole)
    for change in ({"config": None}, {"config": {}}, {"step": "1"}, {"step": -1}, {"scaler": []}):
        with pytest.raises(DamagedError, match="is no training checkpoint"):
            check_rest(tmp_path, whole | change)
    for content in ([], None, {"step": 1}):
        with pytest.raises(DamagedError, match="is no training checkpoint"):
            check_rest(tmp_path, content)


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


def make_trainer(config: Path, *flags: str) -> Trainer:
    arguments = train_hdit.parse_arguments(
        ["--config", str(config), "--name", str(config.parent / "a"), "--device", "cpu", *flags]
    )
    return Trainer(arguments, Processes("cpu", fsdp=False), RunFiles(arguments.name))


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


def test_metrics_keep_their_steps_under_a_new_name(config: Path) -> None:
    assert train(config, "a", "--end-step", "4") == 0
    assert train(config, "b", "--resume", str(config.parent / "a_00000002.pth"), "--end-step", "3") == 0
    assert train(config, "b", "--end-step", "4") == 0
    whole = metrics(config, "a").splitlines()
    assert metrics(config, "b").splitlines() == [whole[0], *whole[3:]]
    assert train(config, "c", "--resume", str(config.parent / "a_00000004.pth"), "--end-step", "4") == 0


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
    assert train(train_hdit.PRESETS / "cpu-demo.json", str(config.parent / "a")) == 2
    said = capsys.readouterr().err
    assert len(said) < 600
    assert "model.d_ffs is" in said  # the first of them
    assert re.search(r"; and \d+ more\. Use its config", said)


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


def test_sigterm_to_all_processes_saves(config: Path) -> None:
    """Schedulers and ``timeout`` signal all processes: those that load images must run until the step is finished."""
    flags = ["--config", str(config), "--name", str(config.parent / "a"), "--device", "cpu", "--num-workers", "2"]
    command = [sys.executable, *TRAIN, *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, start_new_session=True, text=True, env=ENVIRONMENT, stdout=pipe, stderr=pipe)
    path = config.parent / "a_metrics.csv"
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)
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
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
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


def test_flags_that_others_would_hide(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*flags: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            train(config, "a", *flags)
        return capsys.readouterr().err.splitlines()[-1]

    assert "--config and --preset both name a config" in says("--preset", "cpu-demo")
    assert "--eval-every needs --held-out" in says("--eval-every", "5")
    assert "--eval-features needs --eval-samples" in says("--eval-features", "inception")
    assert "unrecognized arguments: --end 5" in says("--end", "5")  # it could be another flag in a later release
    run = {"run": {"eval-every": 7, "num_workers": None}}  # of a section, which flags complete, that is no error
    config.write_text(json.dumps({**CONFIG, **run}))
    arguments = train_hdit.parse_arguments(["--config", str(config), "--seed", "3"])
    assert (arguments.eval_every, arguments.seed, arguments.num_workers) == (7, 3, default_workers(8))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are counted in another way")
def test_no_more_processes_load_images_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert [default_workers(most) for most in (1, 2, 8)] == [1, 2, 2]


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


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Within the context, no file can grow beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def test_a_full_disk_under_a_sharded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "run_00000001"

    def save(processes: Processes) -> None:
        model = torch.nn.Linear(100, 100)
        processes.shard(model)
        save_sharded(path, model, model, torch.optim.AdamW(model.parameters()), {}, processes)

    says = pytest.raises(OSError, match=f"^cannot write {path}: File too large$")
    with Processes("cpu", fsdp=True) as processes, small_disk(1000), says:
        save(processes)
    assert not list(tmp_path.iterdir())


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


# --- Sampling


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training run, with run.safetensors and run_samples.png."""
    config = tmp_path_factory.mktemp("trained") / "config.json"
    config.write_text(json.dumps(CONFIG))
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
