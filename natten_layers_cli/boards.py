"""Where a run's curves are drawn: TensorBoard always, and Weights & Biases where it is asked for."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .checkpointing import RunFiles
from .progress import progress
from .running import one_line, writing


class Boards:
    """The boards of a run, which the first process of it opens.

    Args:
        folder: of TensorBoard's files.
        step: the last one that is done: what an earlier process of the run drew of later ones is taken back.
        project: of Weights & Biases; None draws nothing there.
        name: of the run. A run that goes on draws where it drew before.
        config: shown beside the curves there.

    Raises:
        ValueError: ``project`` without the ``wandb`` package, or a ``folder`` that TensorBoard cannot name.
    """

    def __init__(self, folder: Path, step: int, *, project: str | None, name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.folder, self.wandb = folder, None
        if project is not None:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                message = f"--wandb {project} needs the wandb package: pip install 'natten-layers[wandb]'"
                raise ValueError(message) from error
            self.images = wandb.Image
            identity = re.sub(r"[^A-Za-z0-9_-]", lambda match: _in_identity(match[0]), name)
            try:
                self.wandb = wandb.init(project=project, name=name, id=identity, resume="allow", config=dict(config))
            except Exception as error:  # of types of the package's own
                raise ValueError(f"--wandb {project}: {one_line(error)}") from error
        try:
            str(folder).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--name {name!r} is no UTF-8, which TensorBoard needs") from error
        with writing(folder):
            self.board = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name; a name before a slash groups those behind it."""
        with writing(self.folder):
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        with writing(self.folder):
            self.board.add_image(name, np.asarray(image), step, dataformats="HWC")
        if self.wandb is not None:
            self.wandb.log({name: self.images(image)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        with writing(self.folder):
            self.board.add_text(name, f"```\n{text}\n```", step)

    def close(self) -> None:
        with writing(self.folder):
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _in_identity(character: str) -> str:
    """A number for what is not ASCII: names in another script would all be the same run."""
    return "-" if character.isascii() else f"{ord(character):x}"


class Log:
    """Progress bar, metrics file and boards of the first process; silent with ``files=None``."""

    def __init__(self, files: RunFiles | None, step: int, end_step: int | None, boards: Boards | None = None) -> None:
        self.files, self.boards, self.mean, self.before = files, boards, None, time.perf_counter()
        if files is not None:
            files.rewrite_metrics(files.losses(step))  # the steps after the checkpoint are run again
            self.metrics = files.path("_metrics.csv").open("ab", buffering=0)  # a line is there before the next step
        # Last, as an error of what comes before it would stand behind the bar.
        self.bar = progress(end_step, initial=step, unit="step", disable=files is None)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.files is not None:
            self.metrics.close()
        if self.boards is not None:
            self.boards.close()

    def write(self, step: int, loss: float, images: int) -> None:
        now = time.perf_counter()
        rate, self.before = images / (now - self.before), now
        self.mean = loss if self.mean is None else self.mean + 0.05 * (loss - self.mean)
        if self.files is not None:
            with writing(self.files.path("_metrics.csv")):
                self.metrics.write(f"{step},{loss!r}\n".encode())
            self.show(step, {"loss": loss, "images per second": rate})
            self.bar.set_postfix_str(f"loss {self.mean:.4f}, {rate:.0f} images/s", refresh=False)
            self.bar.update()

    def show(self, step: int, curves: Mapping[str, float]) -> None:
        if self.boards is not None:
            self.boards.scalars(step, curves)

    def picture(self, step: int, grid: Image.Image) -> None:
        self.before = time.perf_counter()  # the time that sampling takes is not the training's
        if self.boards is not None:
            self.boards.picture(step, "samples", grid)
