"""The example of a forecast on a globe."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import weather


def test_the_weather_example_trains_and_draws(tmp_path: Path) -> None:
    model = weather.train(2)
    weather.draw(model, str(tmp_path / "weather.png"), shown=(0, 1))
    with Image.open(tmp_path / "weather.png") as picture:
        assert picture.width == 1200


def test_forecasts_do_not_know_where_the_map_is_cut() -> None:
    torch.manual_seed(0)
    model, wind = weather.Forecast(), weather.winds(torch.Generator().manual_seed(0), 1, 0)[:, 0]
    for parameter in model.parameters():  # the last weights of a new network would hide the rest
        torch.nn.init.normal_(parameter, std=0.2)
    forecast = model(wind)
    torch.testing.assert_close(model(wind.roll(5, 2)), forecast.roll(5, 2), rtol=1e-4, atol=1e-5)
    assert (model(wind.roll(5, 1)) - forecast.roll(5, 1)).abs().max() > 0.1  # poles are where they are


def test_vortices_turn_and_come_around() -> None:
    """A wind around each vortex has no sources: what flows east out of a box comes in from the north or south."""
    wind = weather.winds(torch.Generator().manual_seed(0), 4, 3, vortices=1)
    assert wind.shape == (4, 4, weather.LATITUDES, weather.LONGITUDES, 2)
    torch.testing.assert_close(wind.sum(3)[..., 1], torch.zeros(4, 4, weather.LATITUDES), rtol=0, atol=2e-2)
    assert wind.abs().amax((2, 3, 4)).min() > 0.2  # at every step somewhere on the map
