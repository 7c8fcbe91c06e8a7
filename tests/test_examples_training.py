"""What training shows, keeps and starts from: curves, held-out losses, checkpoints, weights for other classes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hdit_runs import make_trainer, train
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from natten_layers_cli import evaluate, hdit_trainer, sample_hdit, sampled, train_hdit
from natten_layers_cli.batches import Examples, Key, by_shape
from natten_layers_cli.boards import Boards
from natten_layers_cli.checkpointing import RunFiles
from natten_layers_cli.folders import Folder
from natten_layers_cli.hdit_trainer import Trainer
from natten_layers_cli.held_out import Part, held_out_batches, hold_out, level_names, means, sums_by_level
from natten_layers_cli.parallel import Processes
from natten_layers_cli.progress import progress
from natten_layers_cli.sampled import SampleDistances, SamplingStoppedError, three_channels

MODEL: dict[str, Any] = {
    "type": "image_transformer_v2",
    "input_channels": 3,
    "input_size": [8, 8],
    "patch_size": [2, 2],
    "depths": [1],
    "widths": [16],
    "self_attns": [{"type": "neighborhood", "d_head": 8, "kernel_size": 3}],
    "mapping_width": 16,
    "mapping_depth": 1,
    "sigma_data": 0.5,
    "sigma_sample_density": {"type": "cosine-interpolated"},
}


def write_config(folder: Path, classes: int = 2, images: int = 3, **dataset: Any) -> Path:
    """A config of a folder of images of one colour each."""
    for label in range(classes):
        (folder / "data" / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(images):
            Image.new("RGB", (8, 8), (40 * i, 80 * label, 99)).save(folder / "data" / f"class{label}" / f"{i}.png")
    run = {"batch_size": 4, "demo_every": 0, "save_every": 1, "sample_n": 1, "sample_steps": 1, "num_workers": 0}
    content = {"model": MODEL, "dataset": {"type": "imagefolder-class", "location": str(folder / "data")}, "run": run}
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


def curves(folder: Path) -> dict[str, dict[int, float]]:
    board = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


def test_losses_by_level_by_hand() -> None:
    losses, levels = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.05, 3.0, 0.2, 0.1])
    sums = sums_by_level(losses, levels, (0.1, 1.0))
    assert sums.tolist() == [[9.0, 4.0, 2.0], [2.0, 1.0, 1.0]]
    names = level_names("sigma", (0.1, 1.0))
    assert names == ["sigma below 0.1", "sigma 0.1 to 1", "sigma above 1"]
    assert means(torch.tensor([[9.0, 0.0, 2.0], [2.0, 0.0, 1.0]]), names) == {names[0]: 4.5, names[2]: 2.0}


def test_boards_show_learning_rate_gradient_and_losses(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert train(config, "a", "--end-step", "2", "--lr", "0.25", "--held-out", "2", "--eval-every", "2") == 0
    shown = curves(tmp_path / "a_tensorboard")
    assert shown["learning rate"] == {1: 0.25, 2: 0.25}
    assert all(value > 0 for value in shown["gradient norm"].values())
    assert set(shown["loss"]) == {1, 2}
    by_level = {tag: steps for tag, steps in shown.items() if tag.startswith("loss by sigma/")}
    values = [steps[1] for steps in by_level.values() if 1 in steps]
    assert min(values) <= shown["loss"][1] <= max(values)
    assert set(shown["held-out loss"]) == {2}
    assert any(tag.startswith("held-out loss by sigma/") for tag in shown)


def test_held_out_images_are_not_trained_on(tmp_path: Path) -> None:
    trainer = make_trainer(write_config(tmp_path), "--held-out", "2")
    assert isinstance(trainer.source, Part)
    assert not set(trainer.source.indices) & set(trainer.held_out.indices)
    assert sorted([*trainer.source.indices, *trainer.held_out.indices]) == list(range(6))
    losses = trainer.evaluate()
    trainer.arguments.batch_size = 1  # the same images under the same noise, whatever the size of a batch
    again = trainer.evaluate()
    assert losses.keys() == again.keys()
    for name, loss in losses.items():
        assert again[name] == pytest.approx(loss, rel=1e-5)
    for parameter in trainer.ema.parameters():
        parameter.data.add_(0.1)
    assert trainer.evaluate()["held-out loss"] != pytest.approx(losses["held-out loss"], rel=1e-3)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_held_out_image_counts_once(tmp_path: Path, world: int) -> None:
    write_config(tmp_path)
    _, part = hold_out(Folder(tmp_path / "data", (8, 8), 3, classes=True), 5)
    counted: Counter[int] = Counter()
    numbers = set()
    for rank in range(world):
        batches = list(held_out_batches(part, 2, rank, world))
        numbers.add(tuple(len(batch.place) for (batch,) in batches))
        counted.update(place for (batch,) in batches for place in batch.place.tolist() if place < 5)
    assert counted == dict.fromkeys(range(5), 1)
    assert len(numbers) == 1  # processes of a sharded model run in step


def test_what_cannot_be_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    assert train(config, "a", "--held-out", "6") == 2
    assert "--held-out 6 leaves none of the 6 images" in capsys.readouterr().err
    assert train_hdit.main(["--held-out", "1", "--name", str(tmp_path / "a"), "--device", "cpu"]) == 2
    assert "each is the only one of its class" in capsys.readouterr().err


def test_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    other = tmp_path / "a_b_00000001.pth"  # of a run called a_b
    other.touch()
    assert train(config, "a", "--end-step", "4", "--keep", "2") == 0
    assert sorted(path.name for path in tmp_path.glob("a_*.pth")) == ["a_00000003.pth", "a_00000004.pth", other.name]
    assert train(config, "a", "--end-step", "5", "--keep", "1") == 0
    assert sorted(path.name for path in tmp_path.glob("a_0*.pth")) == ["a_00000005.pth"]
    assert json.loads((tmp_path / "a_state.json").read_text()) == {"latest_checkpoint": "a_00000005.pth"}


def test_folders_of_shards_are_deleted_and_newer_ones_are_not(tmp_path: Path) -> None:
    files = RunFiles(str(tmp_path / "a"))
    for step in (1, 2, 3, 9):  # 9: of a run that went on from step 2 with --resume
        (tmp_path / f"a_{step:08}").mkdir()
    files.record(tmp_path / "a_00000003")
    files.prune(0)
    assert len(list(tmp_path.glob("a_0*"))) == 4
    files.prune(2)
    assert sorted(path.name for path in tmp_path.glob("a_0*")) == ["a_00000002", "a_00000003", "a_00000009"]


def test_weights_for_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    assert train(config, "two", "--end-step", "1", "--lr", "0.1") == 0
    assert "nothing is left" not in capsys.readouterr().out
    assert train(config, "two", "--end-step", "1", "--lr", "0.1") == 0
    assert "nothing is left to train: step 1 is reached, and --end-step is 1" in capsys.readouterr().out
    (tmp_path / "more").mkdir()
    three = write_config(tmp_path / "more", classes=3)
    start = ["--resume-inference", str(tmp_path / "two.safetensors")]
    assert train(three, "three", *start, "--end-step", "1") == 2
    assert "To train on other classes, or on none, give --reset class_emb." in capsys.readouterr().err
    trainer = make_trainer(three, *start, "--reset", "class_emb")
    assert train(three, "none", *start, "--end-step", "1", "--no-classes") == 2
    assert "or on none, give --reset class_emb." in capsys.readouterr().err
    without = make_trainer(three, *start, "--no-classes", "--reset", "class_emb").model.state_dict()
    assert without.keys() == trainer.model.state_dict().keys() - {"class_emb.weight"}
    fresh = make_trainer(three)
    old = make_trainer(config, *start)
    for name, tensor in trainer.model.state_dict().items():
        source = fresh if name.startswith("class_emb") else old
        assert torch.equal(tensor, source.model.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"--reset clas: the model has no tensors of that name; it has .*class_emb"):
        make_trainer(three, *start, "--reset", "clas")
    with pytest.raises(SystemExit):
        make_trainer(three, "--reset", "class_emb")


def test_weights_with_an_odd_config_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"config": json.dumps({"model": {"type": "image_transformer_v2"}})})
    assert train(write_config(tmp_path), "a", "--resume-inference", str(path)) == 2
    assert f'error: {path}: config["model"] lacks the key "widths"' in capsys.readouterr().err


def test_weights_for_another_resolution(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert train(config, "small", "--end-step", "1", "--lr", "0.1") == 0
    larger = tmp_path / "larger.json"
    larger.write_text(json.dumps(json.loads(config.read_text()) | {"model": MODEL | {"input_size": [16, 12]}}))
    start = ["--resume-inference", str(tmp_path / "small.safetensors")]
    trainer, old = make_trainer(larger, *start), make_trainer(config, *start)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, old.model.state_dict()[name]), name
    assert train(larger, "large", *start, "--end-step", "1") == 0
    assert sample_hdit.HDiT.from_pretrained(tmp_path / "large.safetensors").config.input_size == (16, 12)


def break_pixels(path: Path) -> None:
    """Make ``path`` a JPEG that is cut within its pixels, and has a mark of the end in its last bytes, of a comment."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, comment=b"\xff\xd9")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert b"\xff\xd9" in content[-1024:-100]


def test_an_image_with_broken_pixels_is_skipped_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether it is to train on, held out or compared with; the next one takes its place, as if asked for."""
    config = write_config(tmp_path, images=2)
    broken = [tmp_path / "data" / f"class{label}" / "broken.jpg" for label in range(2)]
    for path in broken:
        break_pixels(path)
    flags = ["--end-step", "2", "--held-out", "2", "--eval-samples", "3", "--eval-every", "1"]
    flags += ["--eval-features", "random-convolutions"]
    trainer = make_trainer(config, *flags)
    assert trainer.train()
    error = capfd.readouterr().err
    for path in broken:
        assert f"warning: {path} cannot be read as an image: image file is truncated" in error
    assert error.count(str(broken[0])) <= 3  # once for each of the three uses, not for every time

    folder = Folder(tmp_path / "data", (8, 8), 3, classes=True)
    index = [path for path, _ in folder.images].index(broken[0])
    skipped, following = (Examples(folder, 0.5)[Key(i, 5, 0)] for i in (index, index + 1))
    assert all(torch.equal(a, b) for a, b in zip(skipped, following, strict=True))


@pytest.mark.parametrize("held_out", [False, True])
def test_images_that_cannot_be_had_during_a_run_lose_nothing(tmp_path: Path, held_out: bool) -> None:
    flags = ["--held-out", "2", "--eval-every", "3"] if held_out else []
    trainer = make_trainer(write_config(tmp_path), "--end-step", "9", "--save-every", "99", *flags)

    class Breaking(Part):
        def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
            if trainer.step >= 2:
                raise OSError("the disk is gone")
            return super().load(index, generator)

    name = "held_out" if held_out else "source"
    source = getattr(trainer, name)
    setattr(trainer, name, Breaking(source, range(len(source))))
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    assert trainer.saved_step == trainer.step == (3 if held_out else 2)
    assert (tmp_path / f"a_{trainer.step:08}.pth").exists()
    assert make_trainer(tmp_path / "config.json", *flags).step == trainer.step


@pytest.mark.parametrize(
    ("owner", "name", "step", "says"),
    [
        (Boards, "scalars", 2, "curves: No space left on device"),  # after step 1
        (hdit_trainer.tqdm, "write", 3, "cannot write standard output: No space left on device"),  # after step 2
        (hdit_trainer, "save_png", 3, "cannot write a_demo.png"),
        (sampled, "sample_batches", 2, "no memory for samples"),  # which is after no other step
    ],
)
def test_what_cannot_be_shown_costs_nothing_that_was_learned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    step: int,
    says: str,
) -> None:
    errors = {
        "scalars": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "curves"),
        "write": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "save_png": OSError("cannot write a_demo.png"),
        "sample_batches": RuntimeError("no memory for samples"),
    }
    original = getattr(owner, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        if name == "write" and not str(arguments[0]).startswith("step 2: held-out loss"):
            return original(*arguments, **options)
        raise errors[name]

    monkeypatch.setattr(owner, name, fail)
    flags = ["--end-step", "9", "--save-every", "99", "--held-out", "1", "--eval-every", "2", "--demo-every", "2"]
    assert train(write_config(tmp_path), "a", *flags) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {says}"
    assert [path.name for path in tmp_path.glob("a_*.pth")] == [f"a_{step:08}.pth"]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_in_logs(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("natten_layers_cli.progress.SECONDS", 0.01)
    for steps in (3, 0):
        with progress(3, "sampling", unit="step", leave=not terminal) as bar:
            for _ in range(steps):
                time.sleep(0.02)
                bar.set_postfix_str("loss 0.5", refresh=False)
                bar.update()
    text = stream.getvalue()
    assert ("\r" in text) == terminal
    if not terminal:
        counts = [re.fullmatch(r"sampling: (\d)/3 \[.*step.*, loss 0.5\]", line) for line in text.splitlines()]
        assert [match and match[1] for match in counts] == ["1", "2", "3"]
    monkeypatch.setattr("natten_layers_cli.progress.SECONDS", 30.0)
    stream.truncate(0)
    with progress(3, "short", disable=terminal) as bar:
        bar.update(3)
    assert stream.getvalue().strip("\0") == ""


def test_samples_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    flags = ["--eval-samples", "4", "--eval-every", "2", "--eval-features", "random-convolutions"]
    assert train(config, "a", "--end-step", "3", "--lr", "0.01", *flags) == 0
    said = capsys.readouterr().out
    assert "samples are measured by Fréchet distance and kernel distance, of the features random-convolutions" in said
    shown = curves(tmp_path / "a_tensorboard")
    trainer = make_trainer(config, *flags)  # of step 3
    found = trainer.measure_samples()
    assert found == trainer.measure_samples()
    assert list(found) == ["Fréchet distance", "kernel distance"]
    for name, value in found.items():
        assert list(shown[name]) == [2]
        assert f"{name} {shown[name][2]:.4g}" in said
        assert value != pytest.approx(shown[name][2], rel=1e-6)  # the weights are others

    # By hand: four samples, two of each class, and four of the six images, through files.
    command = [str(tmp_path / "a.safetensors"), "-n", "2", "--steps", "1", "--device", "cpu"]
    assert sample_hdit.main([*command, "--out", str(tmp_path / "samples")]) == 0
    assert trainer.distances is not None
    (tmp_path / "reference").mkdir()
    for index in trainer.distances.part.indices:
        path, label = Folder(tmp_path / "data", (8, 8), 3, classes=True).images[index]
        shutil.copyfile(path, tmp_path / "reference" / f"{label}{path.name}")
    folders = [str(tmp_path / name) for name in ("samples", "reference")]
    features = ["--features", "random-convolutions", "--num-workers", "0", "--device", "cpu"]
    assert evaluate.main([*folders, *features, "--output", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    expected = [numbers["frechet_distance"], numbers["kernel_distance"]["mean"]]
    assert list(found.values()) == pytest.approx(expected, rel=1e-4)


def test_processes_share_the_images_that_samples_are_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None waits for another that computes the features of all; together they have those of one process."""
    write_config(tmp_path)
    source = Folder(tmp_path / "data", (8, 8), 3, classes=True)

    def made(rank: int, world: int) -> SampleDistances:
        processes = Processes("cpu", fsdp=False)
        processes.rank, processes.world = rank, world
        distances = SampleDistances(source, 5, features="random-convolutions", processes=processes, workers=0)
        distances.load()
        return distances

    def features(distances: SampleDistances) -> Tensor:
        samples = torch.linspace(-1, 1, 3 * 8 * 8 * 2).view(2, 3, 8, 8)
        assert bool(distances([samples])) == distances.processes.first
        assert distances.reference is not None
        return distances.reference

    alone, shared = made(0, 1), [made(rank, 3) for rank in range(3)]
    parts = [distances.own for distances in shared if distances.own is not None]
    assert [len(part) for part in parts] == [2] * 3
    monkeypatch.setattr("natten_layers_cli.sampled.GATHERED", 1)
    for distances in shared:
        rows = zip(*(part.split(1) for part in parts), strict=True)
        monkeypatch.setattr(distances.processes, "gather", lambda _, rows=rows: torch.stack(next(rows)))
        assert torch.equal(features(distances), features(alone))


def test_samples_that_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    for flags, message in (
        (["7"], "--eval-samples 7 needs as many images to compare with, and there are 6"),
        (["4", "--buckets", "none"], "--eval-samples needs images of one size"),
    ):
        assert train(config, "a", "--eval-samples", *flags) == 2
        assert message in capsys.readouterr().err
    assert train_hdit.main(["--eval-samples", "4", "--name", str(tmp_path / "a"), "--device", "cpu"]) == 2
    assert "of the photographs, every crop is another one" in capsys.readouterr().err


def test_a_stop_while_samples_are_measured(tmp_path: Path) -> None:
    trainer = make_trainer(write_config(tmp_path), "--eval-samples", "4", "--eval-every", "1", "--save-every", "99")
    trainer.measure_samples()
    trainer.signals.number = signal.SIGTERM
    with pytest.raises(SamplingStoppedError):
        trainer.measure_samples()


def test_channels_of_samples() -> None:
    grey = torch.tensor([7, 200], dtype=torch.uint8).view(2, 1, 1, 1)
    assert three_channels(grey).flatten().tolist() == [7] * 3 + [200] * 3
    clear = torch.tensor([10, 20, 30, 51], dtype=torch.uint8).view(1, 4, 1, 1)  # a fifth of the colour, the rest white
    assert three_channels(clear).flatten().tolist() == [206, 208, 210]


@pytest.mark.parametrize("objective", ["diffusion", "meanflow"])
def test_images_of_several_shapes_train_together(tmp_path: Path, objective: str) -> None:
    config = write_config(tmp_path)
    for i, size in enumerate([(16, 8), (8, 16), (16, 8)]):
        Image.new("RGB", size, (90, 20 * i, 0)).save(tmp_path / "data" / "class0" / f"wide{i}.png")
    flags = ["--buckets", "none", "--objective", objective]
    trainer = make_trainer(config, *flags)
    for parameter in trainer.model.parameters():  # a new model's output is 0, whatever it sees
        torch.nn.init.normal_(parameter, std=0.2)
    examples = Examples(trainer.source, 0.0)
    batch = [examples[Key(item, item, place)] for place, item in enumerate([0, 3, 1, 4, 5, 2, 6, 7])]
    groups = by_shape(batch)
    assert [tuple(group.image.shape) for group in groups] == [(5, 3, 8, 8), (2, 3, 6, 12), (1, 3, 12, 6)]
    calls: list[int] = []
    handle = trainer.model.patch_out.register_forward_hook(lambda *_: calls.append(1))
    losses, levels = trainer._losses(trainer.learner, groups, 8, drop_classes=True)
    handle.remove()
    assert (len(calls) == 1) == (objective == "diffusion")
    places = torch.cat([group.place for group in groups]).tolist()
    for loss, level, place in zip(losses, levels, places, strict=True):
        alone = trainer._losses(trainer.learner, by_shape([batch[place]]), 8, drop_classes=True)
        torch.testing.assert_close((loss[None], level[None]), alone, rtol=1e-4, atol=1e-6)
    assert train(config, "mixed", *flags, "--end-step", "3", "--held-out", "3", "--eval-every", "1") == 0


def test_what_does_not_keep_its_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_hdit.main(["--buckets", "none", "--name", str(tmp_path / "a"), "--device", "cpu"]) == 2
    assert "of the photographs, crops are trained on" in capsys.readouterr().err
    arguments = train_hdit.parse_arguments(["--config", str(write_config(tmp_path)), "--buckets", "none"])
    processes = Processes("cpu", fsdp=False)
    processes.fsdp = True
    with pytest.raises(ValueError, match="--buckets none does not go with --fsdp"):
        Trainer(arguments, processes, RunFiles(str(tmp_path / "a")))
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace('"d_head": 8', '"d_head": 8, "is_periodic": [false, true]'))
    assert train(config, "a", "--buckets", "none") == 2
    assert "--buckets none does not go with is_periodic" in capsys.readouterr().err


def test_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(config, "a", "--end-step", "1", "--wandb", "flowers") == 2
    assert "--wandb flowers needs the wandb package: pip install 'natten-layers[wandb]'" in capsys.readouterr().err
    logged: list[tuple[int, dict[str, Any]]] = []
    begun: list[dict[str, Any]] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: begun.append({}))

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda image: image.size))
    assert train(config, "a", "--end-step", "2", "--wandb", "flowers", "--demo-every", "2") == 0
    assert (begun[0]["project"], begun[0]["resume"], begun[1:]) == ("flowers", "allow", [{}])
    assert begun[0]["config"]["model"]["widths"] == [16]
    assert {step for step, values in logged if "loss" in values} == {1, 2}
    assert [step for step, values in logged if "samples" in values] == [2]

    begun.clear()
    for name in ("猫", "犬"):
        Boards(tmp_path / name, 0, project="flowers", name=f"runs/{name}", config={}).close()
    assert [options["id"] for options in begun if options] == ["runs-732b", "runs-72ac"]

    def fail(**options: Any) -> SimpleNamespace:
        raise type("UsageError", (Exception,), {})("no\nkey")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail, Image=None))
    assert train(config, "b", "--end-step", "1", "--wandb", "flowers") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --wandb flowers: no key"
