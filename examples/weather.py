"""A forecast on a globe, with windows that wrap around in longitude and stop at the poles.

python examples/weather.py        about a minute on a CPU; weather.png shows a forecast beside the truth

Vortices drift eastwards, faster near the equator than near the poles. A small network learns the next wind from this
one, and is then applied again and again to its own forecasts.
"""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from natten_layers import GEGLU, AxialRoPE, NeighborhoodGQA, make_axial_pos

LATITUDES, LONGITUDES, WIDTH = 16, 32, 32


def winds(generator: torch.Generator, count: int, steps: int, vortices: int = 6) -> Tensor:
    """``[count, steps + 1, latitude, longitude, 2]``: eastwards and northwards."""
    rows = (torch.arange(LATITUDES).view(-1, 1, 1) + 0.5) / LATITUDES
    columns = (torch.arange(LONGITUDES).view(-1, 1) + 0.5) / LONGITUDES
    latitude, longitude, sign = torch.rand(3, count, 1, 1, 1, vortices, generator=generator)
    drift = 0.01 + 0.05 * torch.sin(math.pi * latitude)  # turns of the globe a step
    north = rows - latitude
    east = (columns - longitude - drift * torch.arange(steps + 1).view(-1, 1, 1, 1) + 0.5) % 1 - 0.5  # the short way
    strength = 10 * (sign - 0.5).sign() * torch.exp(-50 * north**2 - 200 * east**2)
    return torch.stack([(strength * north).sum(-1), (-2 * strength * east).sum(-1)], -1)


class Forecast(nn.Module):
    """The next wind, from windows of 5 latitudes and 9 longitudes around each place."""

    def __init__(self) -> None:
        super().__init__()
        # From the west end of the map to its east end, positions run from -1 to 1: a period of 2.
        rope = AxialRoPE(WIDTH // 2, 2, periods=(None, 2.0))
        window = {"kernel_size": (5, 9), "is_periodic": (False, True), "rope": rope}
        self.start, self.end = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.layers = nn.ModuleList(NeighborhoodGQA(WIDTH, 2, **window) for _ in range(2))
        self.feed_forward = nn.ModuleList(GEGLU(WIDTH, 2 * WIDTH) for _ in range(2))

    def forward(self, wind: Tensor) -> Tensor:
        latitude = make_axial_pos(LATITUDES, LONGITUDES)[..., :1].expand(len(wind), -1, -1, -1)
        x = self.start(torch.cat([wind, latitude], -1))
        for attention, feed_forward in zip(self.layers, self.feed_forward, strict=True):
            x = x + attention(x)
            x = x + feed_forward(x)
        return wind + self.end(x)


def train(steps: int) -> Forecast:
    torch.manual_seed(0)
    model, generator = Forecast(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(1, steps + 1):
        now, truth = winds(generator, 8, 1).unbind(1)
        loss = (model(now) - truth).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: error {(loss / (now - truth).square().mean()).sqrt():.1%} of the change in the wind")
    return model


@torch.no_grad()
def draw(model: Forecast, path: str, shown: tuple[int, ...] = (0, 2, 4, 8)) -> None:
    truth = winds(torch.Generator().manual_seed(1), 1, max(shown))[0]
    forecasts = [truth[:1]]
    for _ in range(max(shown)):
        forecasts.append(model(forecasts[-1]))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for column, step in enumerate(shown):
        for row, (name, wind) in enumerate({"truth": truth[step], "forecast": forecasts[step][0]}.items()):
            axes = figure.add_subplot(2, len(shown), row * len(shown) + column + 1)
            east, north = wind.unbind(-1)
            axes.imshow(torch.hypot(east, north).numpy(), origin="lower", vmin=0, vmax=0.8)
            axes.quiver(east.numpy(), north.numpy(), color="white", scale=12)
            axes.set(title=f"{name}, step {step}" if step else "start", xticks=[], yticks=[])
            if row:
                axes.set_xlabel("longitude")
            if not column:
                axes.set_ylabel("latitude")
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


if __name__ == "__main__":
    draw(train(1000), "weather.png")
