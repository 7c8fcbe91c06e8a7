"""Distances between sets of images: formulas by hand, and the command."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from natten_layers_cli import evaluate
from natten_layers_cli.distances import frechet_distance, kernel_distance, random_convolutions

COUNT = 40


def with_moments(mean: Tensor, root: Tensor, seed: int) -> Tensor:
    """Features ``[COUNT, D]`` whose sample mean is ``mean`` and whose sample covariance ``root root^T``, exactly."""
    draws = torch.randn(COUNT, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    draws -= draws.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(draws.T)), draws.T, upper=False).T
    return white @ root.T + mean


def rotation(dim: int, seed: int) -> Tensor:
    draws = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draws)[0]


def test_frechet_distance_of_known_normal_distributions() -> None:
    """Covariances with the same axes and deviations a, b: ``|m1 - m2|^2 + sum (a - b)^2``."""
    axes = rotation(5, 0)
    a, b = torch.tensor([[1.0, 2.0, 0.5, 3.0, 0.0], [2.0, 2.0, 0.25, 0.0, 0.0]], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0, 4.0], dtype=torch.float64)
    first, second = with_moments(shift, axes * a, 1), with_moments(0 * shift, axes * b, 2)
    expected = 21.25 + 1.0 + 0.0 + 0.0625 + 9.0
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    one = torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [10.0], [10.0]])  # deviations sqrt(2) and 0
    assert frechet_distance(*one) == pytest.approx(64 + 2, rel=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """The square root that the formula is written with, by SciPy."""
    linalg = pytest.importorskip("scipy.linalg")
    mean, roots = torch.zeros(4, dtype=torch.float64), [rotation(4, s) * torch.arange(1.0, 5) for s in (3, 4)]
    first, second = (with_moments(mean, root, seed) for seed, root in enumerate(roots))
    c1, c2 = ((root @ root.T).numpy() for root in roots)
    expected = np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert expected > 1
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_fewer_images_than_features() -> None:
    """Two images each, in 9 dimensions: covariances ``d d^T / 2`` of their differences, whose roots are known."""
    first, second = torch.randn(2, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    d, e = first[0] - first[1], second[0] - second[1]
    expected = (first.mean(0) - second.mean(0)).square().sum() + (d @ d + e @ e) / 2 - (d @ e).abs()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-6)


def mmd(x: list[list[float]], y: list[list[float]]) -> float:
    """As the definition says, pair by pair."""

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def own(rows: list[list[float]]) -> float:
        pairs = [kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(pairs) / len(pairs)

    return own(x) + own(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kernel_distance_by_the_definition() -> None:
    generator = torch.Generator().manual_seed(6)
    first, second = (torch.randn(n, 3, generator=generator, dtype=torch.float64) + n / 9 for n in (7, 5))
    expected = mmd(first.tolist(), second.tolist())
    mean, std = kernel_distance(first, second)
    assert (mean, std) == (pytest.approx(expected, rel=1e-10), 0.0)
    # Of all pairs of subsets the mean is that of all images: the estimate has no bias.
    mean, std = kernel_distance(first, second, subset=3, subsets=6000)
    assert mean == pytest.approx(expected, abs=4 * std / math.sqrt(6000))
    assert std > 0
    assert kernel_distance(first, second, subset=3, subsets=5) == kernel_distance(first, second, subset=3, subsets=5)


def test_what_has_no_distance() -> None:
    good = torch.ones(3, 2)
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="two images of each set are needed at least, got 3 and 1"):
            distance(good, good[:1])
        with pytest.raises(ValueError, match="not finite"):
            distance(good, good * math.nan)


def test_random_convolutions_are_always_the_same() -> None:
    images = torch.arange(2 * 3 * 9 * 10).remainder(251).to(torch.uint8).view(2, 3, 9, 10)
    found = random_convolutions("cpu")(images)
    assert found.shape == (2, 224)
    assert torch.equal(found, random_convolutions("cpu")(images))
    torch.testing.assert_close(found[1:], random_convolutions("cpu")(images[1:]))
    first = torch.tensor(RECORDED)
    torch.testing.assert_close(found[0, ::29], first, rtol=1e-4, atol=1e-6)  # numbers of last year stay comparable


RECORDED = [0.017429, 0.245077, 0.442567, 0.0, 0.191454, 0.291112, 0.137511, 0.049382]


def write_images(folder: Path, noise: float, count: int = 4, size: tuple[int, int] = (8, 8)) -> Path:
    """Grey images under noise; every second one in a folder below."""
    draws = np.random.default_rng(round(noise))
    for i in range(count):
        path = folder / ("a" if i % 2 else ".") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = 128 + noise * draws.standard_normal((*size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def run(*flags: object) -> int:
    return evaluate.main([*map(str, flags), "--device", "cpu", "--num-workers", "0", "--batch-size", "3"])


def test_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evaluate, "usual_features", lambda: "random-convolutions")
    reference = write_images(tmp_path / "reference", 20, 5, (12, 16))  # which is cropped
    found = []
    for noise in (21, 40, 80):
        images = write_images(tmp_path / str(noise), noise)
        assert run(images, reference, "--output", tmp_path / "numbers.json") == 0
        numbers = json.loads((tmp_path / "numbers.json").read_text())
        found.append((numbers["frechet_distance"], numbers["kernel_distance"]["mean"]))
    assert found == sorted(found)
    assert (numbers["images"], numbers["reference_images"], numbers["size"]) == (4, 5, [8, 8])
    said = capsys.readouterr().out
    assert "images: 4 images, no classes\nreference: 5 images" in said
    assert f"Fréchet distance: {found[-1][0]:.6g}\nkernel distance: {found[-1][1]:.6g}\n" in said
    assert "by 224 features of random-convolutions, 4 images against 5, at 8x8\nno FID and no KID" in said
    assert "note: of no more images than features" in said

    def full(path: Path) -> None:
        raise OSError(f"cannot write {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "replacing", full)
        assert run(images, images, "--output", tmp_path / "numbers.json") == 2  # which loses no numbers
    assert 0 <= float(capsys.readouterr().out.split("Fréchet distance: ")[1].split()[0]) < 1e-6
    assert run(images, reference, "--subset", 3, "--subsets", 5) == 0
    assert re.search(r"kernel distance: \S+ ± 0?\.\d", capsys.readouterr().out)


def test_what_cannot_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*flags: object) -> str:
        assert run(*flags, "--features", "random-convolutions") == 2
        return capsys.readouterr().err.splitlines()[-1]

    images = write_images(tmp_path / "images", 20)
    assert says(tmp_path / "nowhere", images) == f"error: {tmp_path / 'nowhere'} is not a folder of images"
    assert says(images, tmp_path / "nowhere") == f"error: {tmp_path / 'nowhere'} is not a folder of images"
    assert "two images of each set are needed" in says(images, write_images(tmp_path / "one", 20, 1))
    write_images(tmp_path / "mixed", 20, 3)
    write_images(tmp_path / "mixed" / "b", 20, 1, (9, 8))
    assert "has 8x8 pixels and " in says(tmp_path / "mixed", images)
    assert run(tmp_path / "mixed", images, "--features", "random-convolutions", "--size", 8, 8) == 0
    (tmp_path / "mixed" / "0.png").write_bytes(b"")
    assert "1 of 4 images cannot be used" in says(tmp_path / "mixed", images)
    with pytest.raises(SystemExit, match="2"):
        says(images, images, "--weights", "x.pth")
    assert "--weights are of --features inception" in capsys.readouterr().err


def test_features_of_inception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", 20)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    assert run(images, images, "--features", "inception") == 2
    assert "pip install 'natten-layers[fid]' brings what is needed" in capsys.readouterr().err
    made: list[Any] = []

    class Extractor(torch.nn.Module):
        """As torch-fidelity's: of images of 8 bits, in a tuple."""

        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None) -> None:
            super().__init__()
            made.append((name, features_list, feature_extractor_weights_path))

        def forward(self, images: Tensor) -> tuple[Tensor]:
            assert images.dtype == torch.uint8
            return (images.float().mean((2, 3)),)

    module = ModuleType("feature_extractor_inceptionv3")
    vars(module)["FeatureExtractorInceptionV3"] = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    weights = tmp_path / "weights.pth"
    torch.save({"conv.weight": torch.zeros(1)}, weights)
    assert run(images, images, "--weights", weights) == 0
    assert made == [("inception-v3-compat", ["2048"], str(weights))]
    said = capsys.readouterr().out
    assert "\nFID: " in said
    assert "\nKID: " in said
    assert "no FID" not in said
    torch.save(tmp_path, weights)  # what only code that the file names could read
    assert run(images, images, "--weights", weights) == 2
    assert f"{weights} is no file of weights" in capsys.readouterr().err
    assert run(images, images, "--weights", tmp_path / "none.pth") == 2
    assert "none.pth: No such file" in capsys.readouterr().err
