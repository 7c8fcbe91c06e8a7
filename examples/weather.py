"""Learns to forecast vortices that drift around a globe, by windows that wrap in longitude: a minute on a CPU."""

import torch
from torch import Tensor, nn

from natten_layers import GEGLU, AxialRoPE, NeighborhoodGQA
from natten_layers_cli.running import Parser, run_command


def winds(count: int, hours: int = 1, vortices: int = 6) -> Tensor:
    """``[count, hours + 1, 16 latitudes, 32 longitudes, 2]``: to the east and to the north."""
    row, column = torch.arange(16).view(-1, 1, 1), torch.arange(32).view(-1, 1)
    latitude, longitude, sign = torch.rand(3, count, 1, 1, 1, vortices)
    drift = (0.01 + 0.05 * torch.sin(torch.pi * latitude)) * torch.arange(hours + 1).view(-1, 1, 1, 1)  # in turns
    north, east = (row + 0.5) / 16 - latitude, (column + 0.5) / 32 - longitude - drift
    east = (east + 0.5) % 1 - 0.5  # the short way around
    strength = 10 * (sign - 0.5).sign() * torch.exp(-50 * north**2 - 200 * east**2)
    return torch.stack([(strength * north).sum(-1), (-2 * strength * east).sum(-1)], -1)


class Forecast(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        rope = AxialRoPE(width // 2, 2, periods=(None, 2.0))  # from west to east, positions run from -1 to 1
        window = {"kernel_size": (5, 9), "is_periodic": (False, True), "rope": rope}
        layers = [layer for _ in range(2) for layer in (NeighborhoodGQA(width, 2, **window), GEGLU(width, 2 * width))]
        self.start, self.layers, self.end = nn.Linear(2, width), nn.ModuleList(layers), nn.Linear(width, 2)
        self.latitude = nn.Parameter(torch.zeros(16, 1, width))

    def forward(self, wind: Tensor) -> Tensor:
        x = self.start(wind) + self.latitude
        for layer in self.layers:
            x = x + layer(x)
        return wind + self.end(x)


def train(steps: int) -> Forecast:
    torch.manual_seed(0)
    model = Forecast()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps + 1):
        now, later = winds(8).unbind(1)
        loss, unchanged = ((forecast - later).square().mean() for forecast in (model(now), now))
        if step % 100 == 0 or step == steps:
            print(f"step {step}: squared error {loss:.2g}, and {unchanged:.2g} if the wind stayed as it is")
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def run() -> int:
    parser = Parser(description=__doc__, least={"steps": 0})
    parser.add_argument("--steps", type=int, default=500, help="of training, each on 8 new winds")
    train(parser.parse(None).steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(run))
