"""Draw the README's picture of 2-D windows: for one query each, which keys it sees.

python examples/draw_windows.py docs/images/windows.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from natten_layers.geometry import make_window, window_mask
from natten_layers.io.files import replacing
from natten_layers_cli.outputs import check_output
from natten_layers_cli.running import Parser, run_command

SPATIAL = (12, 12)
COLOURS, QUERY = ListedColormap(["#eef1f5", "#7fb2e5"]), "#d1495b"  # a key not seen and a key seen, the query


class Panel(NamedTuple):
    title: str
    query: tuple[int, int]
    arguments: dict[str, Any]
    grid: tuple[int, int] = SPATIAL
    """that of queries"""


PANELS = (
    Panel("interior\nkernel 5", (6, 5), {"kernel_size": 5}),
    Panel("border: shifted inwards\nkernel 5", (0, 11), {"kernel_size": 5}),
    Panel("periodic width\nkernel 5", (6, 11), {"kernel_size": 5, "is_periodic": (False, True)}),
    Panel("causal height\nkernel 5", (6, 5), {"kernel_size": 5, "is_causal": (True, False)}),
    Panel("causal, both axes\nkernel 5", (6, 5), {"kernel_size": 5, "is_causal": True}),
    Panel("dilated\nkernel 5, dilation 2", (6, 5), {"kernel_size": 5, "dilation": 2}),
    Panel("strided\nkernel 6, stride 3", (6, 5), {"kernel_size": 6, "stride": 3}),
    Panel("finer grid of queries\nkernel 5", (13, 11), {"kernel_size": 5}, (24, 24)),
)


def draw_panel(axes: Axes, panel: Panel) -> None:
    other = None if panel.grid == SPATIAL else SPATIAL
    mask = window_mask(panel.grid, make_window(SPATIAL, **panel.arguments), key_spatial=other)  # in raster order
    axes.imshow(mask.view(*panel.grid, *SPATIAL)[panel.query].int().numpy(), cmap=COLOURS, vmin=0, vmax=1)
    height, width = (keys / queries for keys, queries in zip(SPATIAL, panel.grid, strict=True))
    y, x = panel.query
    axes.add_patch(Rectangle((x * width - 0.5, y * height - 0.5), width, height, color=QUERY, linewidth=0))
    axes.set_title(panel.title, fontsize=10)
    axes.set_xticks(np.arange(0.5, SPATIAL[1] - 1), minor=True)
    axes.set_yticks(np.arange(0.5, SPATIAL[0] - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)


def run(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "output", type=Path, help="the picture, in a format of matplotlib's: .png, .svg, .pdf or others"
    )
    output = parser.parse(argv).output
    check_output(parser, "output", output, [f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()])
    figure = Figure(figsize=(2.1 * len(PANELS), 2.7), layout=ConstrainedLayoutEngine(w_pad=0.12))
    for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw_panel(axes, panel)
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=100)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
