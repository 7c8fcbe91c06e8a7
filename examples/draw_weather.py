"""The README's picture of a forecast beside the truth, from examples/weather.py.

python examples/draw_weather.py docs/images/weather.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from natten_layers.io.files import replacing
from natten_layers_cli.outputs import check_output
from natten_layers_cli.running import Parser, run_command
from weather import Forecast, train, winds

SHOWN = (0, 2, 4, 8)
"""hours after the start"""


@torch.no_grad()
def draw(model: Forecast) -> Figure:
    """A forecast that the model goes on from again and again, below the truth."""
    truth = winds(1, max(SHOWN))[0]
    forecasts = [truth[:1]]
    for _ in range(max(SHOWN)):
        forecasts.append(model(forecasts[-1]))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for column, hour in enumerate(SHOWN):
        for row, (name, wind) in enumerate({"truth": truth[hour], "forecast": forecasts[hour][0]}.items()):
            axes = figure.add_subplot(2, len(SHOWN), row * len(SHOWN) + column + 1)
            east, north = wind.unbind(-1)
            axes.imshow(torch.hypot(east, north).numpy(), origin="lower", vmin=0, vmax=0.8)
            axes.quiver(east.numpy(), north.numpy(), color="white", scale=12)
            axes.set(title=f"{name}, hour {hour}" if hour else "start", xticks=[], yticks=[])
            if row:
                axes.set_xlabel("longitude")
            if not column:
                axes.set_ylabel("latitude")
    return figure


def run(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, least={"steps": 0})
    parser.add_argument(
        "output", type=Path, help="the picture, in a format of matplotlib's: .png, .svg, .pdf or others"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    arguments = parser.parse(argv)
    check_output(
        parser, "output", arguments.output, [f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()]
    )
    figure = draw(train(arguments.steps))
    with replacing(arguments.output) as temporary:
        figure.savefig(temporary, dpi=100)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
