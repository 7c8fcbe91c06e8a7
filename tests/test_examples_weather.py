"""The example of a forecast on a globe."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import draw_weather
import weather


def test_the_weather_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """After few steps it is better than at the start, and not yet than a forecast that nothing changes."""
    weather.train(6)
    errors = re.findall(r"^step (\d+): squared error ([\d.e-]+), and ([\d.e-]+) if", capsys.readouterr().out, re.M)
    (first, start, unchanged), (last, end, _) = ((int(step), float(a), float(b)) for step, a, b in errors)
    assert (first, last) == (0, 6)
    assert end < start / 2
    assert 0.01 < unchanged < 0.1


def test_the_weather_example_is_short() -> None:
    code = Path(weather.__file__).read_text().splitlines()
    assert len([line for line in code if line]) <= 48


@pytest.mark.parametrize(
    ("flag", "status", "said"),
    [
        ("--help", 0, "--steps"),
        ("--steps=-1", 2, "weather.py: error: --steps must be at least 0, got -1"),
        ("--steps=1e9", 2, "'1e9' is no whole number"),
    ],
)
def test_the_weather_example_explains_itself_and_refuses_absurd_steps(
    flag: str, status: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [weather.__file__, flag])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(weather.__file__, run_name="__main__")
    assert ended.value.code == status
    assert said in "".join(capsys.readouterr())


def test_the_readme_s_picture_of_the_weather_is_drawn(tmp_path: Path) -> None:
    assert draw_weather.run([str(tmp_path / "weather.png"), "--steps", "0"]) == 0
    with Image.open(tmp_path / "weather.png") as picture:
        assert picture.width == 1200


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("weather.xyz", "output must end with .eps or "),
        ("weather", "output must end with .eps or "),
        ("folder.png", "folder.png is a folder: name a file in it"),
        ("file/weather.png", "file/weather.png: nothing can be written to "),
    ],
)
def test_pictures_that_cannot_be_written_are_refused_before_the_work(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(draw_weather, "train", lambda steps: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="2"):
        draw_weather.run([str(tmp_path / name)])
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_forecasts_do_not_know_where_the_map_is_cut() -> None:
    torch.manual_seed(0)
    model, wind = weather.Forecast(), weather.winds(1)[:, 0]
    for parameter in model.parameters():  # the last weights of a new network would hide the rest
        torch.nn.init.normal_(parameter, std=0.2)
    forecast = model(wind)
    torch.testing.assert_close(model(wind.roll(5, 2)), forecast.roll(5, 2), rtol=1e-4, atol=1e-5)
    assert (model(wind.roll(5, 1)) - forecast.roll(5, 1)).abs().max() > 0.1  # poles are where they are


def test_vortices_turn_and_come_around() -> None:
    """A wind around each vortex has no sources: what flows east out of a box comes in from the north or south."""
    torch.manual_seed(0)
    wind = weather.winds(4, 3, vortices=1)
    assert wind.shape == (4, 4, 16, 32, 2)
    torch.testing.assert_close(wind.sum(3)[..., 1], torch.zeros(4, 4, 16), rtol=0, atol=2e-2)
    assert wind.abs().amax((2, 3, 4)).min() > 0.2  # at every step somewhere on the map
