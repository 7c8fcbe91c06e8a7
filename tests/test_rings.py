"""Rotary embeddings in layers with periodic axes: both must agree on the ring."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from natten_layers import AxialRoPE, NeighborhoodGQA, RoPE, make_axial_pos

HEIGHT, WIDTH = 4, 8


def globe(*periods: float | None, **options: Any) -> NeighborhoodGQA:
    """A layer of heights and widths whose width is a ring."""
    torch.manual_seed(0)
    rope = AxialRoPE(16, 2, periods=periods or None)
    return NeighborhoodGQA(32, 2, **{"kernel_size": 3, "is_periodic": (False, True), "rope": rope} | options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "without a period on the width axis, which is_periodic=(False, True) makes a ring"),
        ({"is_periodic": (False, True), "kernel_size": None}, "Make AxialRoPE(..., periods=(None, length))"),
        ({"is_periodic": (True, True)}, "without a period on the height axis"),
        ({"is_periodic": (True,), "rope": AxialRoPE(16, 2, axes=1)}, "periods=(length,)"),
        ({"is_periodic": (True,), "rope": RoPE(16)}, "rope is a RoPE, which counts tokens along a line"),
    ],
    ids=str,
)
def test_a_rope_that_takes_a_ring_for_a_line_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        globe(**options)
    globe(**options | {"is_periodic": False})


def test_a_layer_of_any_rank_refuses_it_at_the_first_call() -> None:
    layer = globe(is_periodic=True)
    with pytest.raises(ValueError, match=re.escape("periods=(length, length)")):
        layer(torch.randn(1, HEIGHT, WIDTH, 32))
    with pytest.raises(ValueError, match="rope is a RoPE"):
        globe(is_periodic=True, rope=RoPE(16))(torch.randn(1, WIDTH, 32))


class Shift(nn.Module):
    """A rope of another package."""

    def forward(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return query + positions[..., None, :1], key


def test_what_cannot_be_judged_is_accepted() -> None:
    x = torch.randn(1, HEIGHT, WIDTH, 32)
    sphere = nn.functional.normalize(torch.randn(HEIGHT, WIDTH, 3), dim=-1)
    assert globe(rope=AxialRoPE(16, 2, axes=3))(x, positions=sphere).shape == x.shape
    assert globe(rope=Shift())(x, positions=make_axial_pos(HEIGHT, WIDTH)).shape == x.shape


def test_an_infinite_period_says_that_frequencies_are_meant_as_they_are() -> None:
    x, layer = torch.randn(1, WIDTH, HEIGHT, 32), globe(None, math.inf)
    assert isinstance(layer.rope, AxialRoPE)
    assert torch.equal(layer.rope.freqs, AxialRoPE(16, 2).freqs)
    assert (layer(x.roll(1, 2)) - layer(x).roll(1, 2)).abs().max() > 1e-3
    mixed = AxialRoPE(16, 2, periods=(math.inf, 2.0))
    assert torch.equal(mixed.freqs, AxialRoPE(16, 2, periods=(None, 2.0)).freqs)


def test_a_layer_with_the_period_of_its_ring_does_not_know_where_it_is_cut() -> None:
    x, layer = torch.randn(1, HEIGHT, WIDTH, 32), globe(None, 2.0)
    torch.testing.assert_close(layer(x.roll(3, 2)), layer(x).roll(3, 2))


def test_the_length_of_an_image_is_compared_with_the_period() -> None:
    globe(None, 1.0)(torch.randn(1, 8, 4, 32))
    globe(None, 2 * 5 / 7)(torch.randn(1, 7, 5, 32))
    globe(1.0, 2.0, is_periodic=True)(torch.randn(1, 4, 8, 32))
    with pytest.raises(ValueError, match=re.escape("periods=(None, 2.0), but the width axis")) as caught:
        globe(None, 2.0)(torch.randn(1, 8, 4, 32))
    assert "is 1.0 long in the positions that an image of (8, 4) has" in str(caught.value)
    with pytest.raises(ValueError, match="the height axis"):
        globe(2.0, 2.0, is_periodic=True)(torch.randn(1, 4, 8, 32))


def longitudes(*places: float) -> Tensor:
    """Positions ``[3, n, 2]`` of as many longitudes on three latitudes."""
    return torch.stack(torch.meshgrid(torch.tensor([-60.0, 0, 60]), torch.tensor(places).float(), indexing="ij"), -1)


@pytest.mark.parametrize(
    "places",
    [
        (0, 60, 120, 180, 240, 300),
        (180, 240, 300, 0, 60, 120),
        (300, 240, 180, 120, 60, 0),
        (-149, -90, -31, 30, 91, 150),
        (0, 20, 60, 140, 280, 320),
        (0, 120, 240),
    ],
    ids=str,
)
def test_positions_that_go_around_once_are_taken(places: tuple[float, ...]) -> None:
    positions = longitudes(*places)
    x = torch.randn(1, *positions.shape[:2], 32)
    for given in (positions, positions[None], positions.double(), positions.long()):
        assert globe(None, 360)(x, positions=given).shape == x.shape


@pytest.mark.parametrize(
    "places",
    [
        (0, 72, 144, 216, 288, 360),  # the end is the beginning again
        (-1, -0.6, -0.2, 0.2, 0.6, 1),  # in other units
        (0, 1, 2, 3, 4, 5),
        (0, 120, 240, 360, 480, 600),  # twice around
        (0, 58, 116, 174, 232, 290),  # the last step is longer
        (0, math.nan, 120, 180, 240, 300),
    ],
    ids=str,
)
def test_positions_of_another_period_are_refused(places: tuple[float, ...]) -> None:
    positions = longitudes(*places)
    positions[0, :, 1] = torch.arange(6) * 60  # only in some rows
    match = re.escape(f"periods=(None, 360), but positions on the width axis, which is_periodic=(False, True) makes a "
                      f"ring, are {places[0]:g}, {places[1]:g}, ..., {places[-1]:g}")  # fmt: skip
    with pytest.raises(ValueError, match=match):
        globe(None, 360)(torch.randn(1, 3, 6, 32), positions=positions)
    with pytest.raises(ValueError, match="positions on the width axis"):
        globe(None, 360)(torch.randn(2, 3, 6, 32), positions=torch.stack([longitudes(*range(0, 360, 60)), positions]))


def test_positions_of_packed_samples_are_judged_for_each_sample() -> None:
    shapes, layer = [(4, 8), (0, 3), (8, 4)], globe(None, 2.0)
    places = [make_axial_pos(4, 8), torch.empty(0, 3, 2), make_axial_pos(8, 4)]
    x, positions = torch.randn(64, 32), torch.cat([place.flatten(0, 1) for place in places])
    match = "periods=(None, 2.0), but positions on the width axis of sample 2 with the shape (8, 4), which"
    for given in (positions, positions[None]):
        with pytest.raises(ValueError, match=re.escape(match)):
            layer(x, shapes=shapes, positions=given)
    positions[32:, 1] *= 2
    assert layer(x, shapes=shapes, positions=positions).shape == x.shape
    assert globe(None, math.inf)(x, shapes=shapes, positions=torch.zeros(64, 2)).shape == x.shape


def test_one_compiled_graph_has_images_of_many_sizes() -> None:
    layer = globe(None, 2.0, kernel_size=None).eval()
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="eager")
        for size in ((4, 8), (3, 9), (5, 5)):
            x = torch.randn(1, *size, 32)
            with torch.compiler.set_stance("fail_on_recompile" if size != (4, 8) else "default"):
                torch.testing.assert_close(compiled(x), layer(x))
