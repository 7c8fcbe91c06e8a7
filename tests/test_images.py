"""Images to train on: files and folders, Hugging Face datasets, augmentation and batches."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hdit_runs import CONFIG, cut, draw, train, write_config
from helpers import within
from PIL import Image
from torch import Tensor

from natten_layers import HDiT
from natten_layers_cli.augmentation import augment
from natten_layers_cli.batches import Examples, Key, Keys, default_workers
from natten_layers_cli.folders import Folder
from natten_layers_cli.images import KeepShape, UnreadableError
from natten_layers_cli.jpeg import MARKER
from natten_layers_cli.sources import MOST_UNREADABLE, Photographs, describe, open_source, parse_data_flag


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_keys_do_not_depend_on_how_the_work_is_split() -> None:
    def take(steps: int, batch_size: int, accumulate: int = 1, rank: int = 0, world: int = 1, first: int = 0) -> list:
        keys = Keys(5, batch_size, seed=3, first_step=first, accumulate=accumulate, rank=rank, world=world)
        return list(islice(keys, steps * accumulate))

    whole = [key for batch in take(3, 4) for key in batch]
    assert [key for batch in take(2, 4, first=1) for key in batch] == whole[4:]
    assert [key for batch in take(3, 2, accumulate=2) for key in batch] == whole
    ranks = [take(3, 2, rank=rank, world=2) for rank in (0, 1)]
    assert [key for pair in zip(*ranks, strict=True) for batch in pair for key in batch] == whole
    assert sorted(key.item for key in whole[:5]) == list(range(5))
    assert len({key.seed for key in whole}) == len(whole)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are counted in another way")
def test_no_more_processes_load_images_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert [default_workers(most) for most in (1, 2, 8)] == [1, 2, 2]


def test_photographs_are_crops_of_their_class() -> None:
    photographs = Photographs({"cat": "chelsea.png", "rocket": "rocket.jpg"}, (16, 24), 3, short_side=32)
    image, label = photographs.load(1, torch.Generator().manual_seed(0))
    assert (image.shape, image.dtype, label) == ((3, 16, 24), torch.uint8, 1)
    windows = photographs.photographs[1].unfold(1, 16, 1).unfold(2, 24, 1)  # [3, H, W, 16, 24]
    found = [(windows == view[:, None, None]).all(-1).all(-1).all(0).any() for view in (image, image.flip(-1))]
    assert any(found)


def test_examples_depend_on_their_seed_alone() -> None:
    examples = Examples(Photographs({"cat": "chelsea.png"}, (16, 16), 3, short_side=32), 0.5)
    keys = Keys(1, 2, seed=0, first_step=0, accumulate=1, rank=0, world=1)
    first, second = next(iter(keys))
    torch.manual_seed(1)
    one, again, other = examples[first], examples[first], examples[second]
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.image, other.image)
    assert not torch.equal(one.noise, other.noise)


def test_augment_only_mirrors_at_probability_zero() -> None:
    image = torch.rand(3, 8, 12)
    seen = set()
    for seed in range(8):
        result, condition = augment(image, 0.0, torch.Generator().manual_seed(seed))
        assert condition[1:].abs().max() == 0
        seen.add(condition[0].item())
        torch.testing.assert_close(result, image.flip(-1) if condition[0] else image, rtol=0, atol=1e-5)
    assert seen == {0.0, 1.0}


def test_augment_moves_a_spot_to_where_it_reports() -> None:
    image = torch.zeros(1, 33, 33)
    image[0, 14:19, 24:29] = 1  # 10 right of the centre, (16, 16)
    inside = 0
    for seed in range(20):
        result, condition = augment(image, 1.0, torch.Generator().manual_seed(seed))
        # The nine numbers do not tell a stretch from a squeeze along the same axis: k-diffusion's do not either.
        places = [_moved(10.0, 0.0, 33 / 8, condition.tolist(), sign) for sign in (1, -1)]
        if all(max(abs(x), abs(y)) < 13 for x, y in places):
            inside += 1
            assert any(result[0, round(16 + y), round(16 + x)] > 0.8 for x, y in places)
    assert inside > 5


def _moved(x: float, y: float, shift: float, condition: list[float], sign: int) -> tuple[float, float]:
    """A point after the reported operations in their order: shift, stretch, rotation, scale, flips."""
    mirror, flip, scale, cos, sin, stretch_x, stretch_y, shift_x, shift_y = condition
    x, y, cos = x + shift * shift_x, y + shift * shift_y, cos + 1
    stretch, angle = math.hypot(stretch_x, stretch_y), math.atan2(stretch_y, stretch_x)
    along = (math.cos(angle) * x + math.sin(angle) * y) * 2 ** (0.2 * sign * stretch)
    across = (math.cos(angle) * y - math.sin(angle) * x) * 2 ** (-0.2 * sign * stretch)
    x, y = math.cos(angle) * along - math.sin(angle) * across, math.sin(angle) * along + math.cos(angle) * across
    x, y = (cos * x + sin * y) * 2 ** (0.2 * scale), (cos * y - sin * x) * 2 ** (0.2 * scale)
    return x * (1 - 2 * mirror), y * (1 - 2 * flip)


def test_folders(tmp_path: Path) -> None:
    for name in ("b/1.png", "a/2.PNG", "a/deeper/3.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 40), "red").save(path)
    assert parse_data_flag(str(tmp_path)) == {"type": "imagefolder-class", "location": str(tmp_path)}
    folder = open_source(parse_data_flag(str(tmp_path)), (8, 8), 3)
    assert (folder.class_names, len(folder)) == (("a", "b"), 3)
    generator = torch.Generator()
    assert [folder.load(i, generator)[1] for i in range(3)] == [0, 0, 1]
    image, _ = folder.load(2, generator)
    assert torch.equal(image, torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))
    assert parse_data_flag(str(tmp_path / "b"))["type"] == "imagefolder"
    with pytest.raises(ValueError, match="empty text"):  # not the images of the working folder
        parse_data_flag("")


def loaded(folder: Path, index: int = 0, channels: int = 3) -> Tensor:
    return Folder(folder, (8, 8), channels, classes=False).load(index, torch.Generator())[0]


def test_litter_and_empty_folders_are_no_images_and_no_classes(tmp_path: Path) -> None:
    for name in ("dogs/1.png", "cats/2.png", "cats/3.gif", "dogs/._1.png", ".ipynb_checkpoints/1.png"):
        draw(tmp_path / name)
    draw(tmp_path / "__MACOSX/cats/2.png")
    draw(tmp_path / "._4.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cats/x.png").mkdir()
    for name in ("notes.txt", "cats/b.heic", "cats/c.heic"):
        (tmp_path / name).write_text("?")
    outside = draw(tmp_path.parent / f"{tmp_path.name}-outside/5.png").parent
    (tmp_path / "elsewhere").symlink_to(outside)
    (tmp_path / "cats/round").symlink_to(tmp_path / "cats")
    section = parse_data_flag(str(tmp_path))
    assert section["type"] == "imagefolder-class"
    folder = open_source(section, (8, 8), 3)
    assert isinstance(folder, Folder)
    assert [(path.name, label) for path, label in folder.images] == [
        ("2.png", 0), ("3.gif", 0), ("1.png", 1), ("5.png", 2)
    ]  # fmt: skip
    assert describe(folder) == "4 images, 3 classes: cats, dogs, elsewhere; skipped 3 other files: 2 .heic, 1 .txt"
    assert describe(Folder(tmp_path, (8, 8), 3, classes=False)).startswith("4 images, no classes; skipped 3")


def test_images_beside_class_folders_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.parent / "mixed"
    draw(folder / "cats/1.png")
    draw(folder / "stray.png")
    assert train(config, "a", "--end-step", "1", "--data", str(folder)) == 2
    error = capsys.readouterr().err
    assert f"{folder} holds stray.png beside class folders (cats)" in error
    assert "with --no-classes" in error
    assert train(config, "a", "--end-step", "1", "--data", str(folder), "--no-classes") == 0
    assert "2 images, no classes\n" in capsys.readouterr().out
    assert HDiT.from_pretrained(config.parent / "a.safetensors").config.num_classes == 0
    config.write_text(json.dumps(CONFIG | {"run": CONFIG["run"] | {"classes": False}}))
    assert train(config, "b", "--end-step", "1") == 0  # photographs, which have classes
    assert HDiT.from_pretrained(config.parent / "b.safetensors").config.num_classes == 0


def write_half_png(path: Path) -> None:
    """All checksums are right, and half of the pixels are there, as from a program that was stopped."""
    rows = b"".join(b"\0" + os.urandom(96) for _ in range(32))
    header = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)[: len(rows) // 2]), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def test_broken_images_are_named_at_the_start(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut files that begin well, a flipped bit, no picture at all, and pixels that could only be clipped."""
    monkeypatch.setattr("natten_layers_cli.folders.LOOKED_AT", 4)
    folder = config.parent / "images"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    draw(folder / "good.png")
    for name in ("cut.jpg", "cut.tif", "cut.webp", "flipped.png"):
        noise.save(folder / name)
        if name.startswith("cut"):
            cut(folder / name)
    content = bytearray((folder / "flipped.png").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "flipped.png").write_bytes(content)
    (folder / "text.png").write_bytes(b"no picture")
    draw(folder / "float.tif", "F", 0.5)
    draw(folder / "wide.tif", "I", 70000)
    os.mkfifo(folder / "pipe.png")
    write_half_png(folder / "half.png")
    with within(120):  # the pipe has no writer
        assert train(config, "a", "--end-step", "1", "--data", str(folder)) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("10 images, no classes")
    message = captured.err.splitlines()[-1]
    assert "error: 9 of 10 images cannot be used" in message
    for name in ("cut.jpg", "cut.tif", "cut.webp", "flipped.png", "text.png", "half.png"):
        assert message.count(str(folder / name)) == 1
    assert f"{folder / 'text.png'} (it begins like no image that Pillow knows)" in message
    assert f"{folder / 'float.tif'} (its pixels are floating-point numbers" in message
    assert f"{folder / 'wide.tif'} (its pixels are 32-bit" in message
    assert f"{folder / 'pipe.png'} (it is no regular file)" in message
    assert not list(config.parent.glob("a_*"))
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        Folder(folder / "empty", (8, 8), 3, classes=False)


def test_folders_that_cannot_be_listed_are_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "cats/1.png")
    (tmp_path / "lost+found").mkdir()  # which file systems keep to themselves
    draw(tmp_path / "dogs/1.png")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name in ("dogs", "lost+found"):  # permissions do not stop a test that root runs
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"dogs"):
        parse_data_flag(str(tmp_path))
    (tmp_path / "dogs").rename(tmp_path / "wolves")
    assert parse_data_flag(str(tmp_path))["type"] == "imagefolder-class"


def test_images_look_as_their_files_say(tmp_path: Path) -> None:
    """Upright, on white where they are transparent, and of animations the first picture."""
    turned = Image.Exif()
    turned[0x0112] = 6  # the first row is the right side
    half = Image.new("RGB", (8, 8), "black")
    half.paste("white", (0, 0, 8, 4))
    half.save(tmp_path / "exif.png", exif=turned)
    upright = loaded(tmp_path)
    assert (upright[:, :, 4:] == 255).all()
    assert (upright[:, :, :4] == 0).all()
    for i, (mode, color) in enumerate((("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("PA", (0, 0)))):
        draw(tmp_path / f"{mode}/hidden.tif" if mode == "PA" else tmp_path / f"{mode}/hidden.png", mode, color)
        assert (loaded(tmp_path / mode) == 255).all(), i
    draw(tmp_path / "P/hidden.gif", "P", 0, transparency=0)
    assert (loaded(tmp_path / "P") == 255).all()
    draw(tmp_path / "half/half.png", "RGBA", (255, 0, 0, 51))
    assert loaded(tmp_path / "half")[:, 0, 0].tolist() == [255, 204, 204]
    assert loaded(tmp_path / "half", channels=4)[:, 0, 0].tolist() == [255, 0, 0, 51]
    frames = [Image.new("RGB", (8, 8), color) for color in ("lime", "blue")]
    (tmp_path / "gif").mkdir()
    frames[0].save(tmp_path / "gif/a.gif", save_all=True, append_images=frames[1:])
    assert loaded(tmp_path / "gif")[:, 0, 0].tolist() == [0, 255, 0]


def test_images_of_16_bits_keep_their_greys(tmp_path: Path) -> None:
    """Pillow's own conversion would clip all values above 255 (of 65535) to white."""
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("grey.png", "grey.pgm", "grey.tif"):
        Image.fromarray(grey).save(tmp_path / name)
    for index in range(3):
        image = loaded(tmp_path, index)
        assert torch.equal(image, torch.tensor(np.rint(grey / 257), dtype=torch.uint8).expand(3, -1, -1))


def test_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"natten-layers\[hub\]"):
        open_source(parse_data_flag("hf:owner/name"), (8, 8), 3)


class HubImage:
    """The feature of a column of images, which ``datasets`` decodes, or leaves as they are stored."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class HubRows:
    """A dataset of the hub: images are stored as bytes, or as a path, and classes by number."""

    def __init__(self, images: Sequence[bytes | Path], kinds: Sequence[int | None], feature: HubImage) -> None:
        self.images, self.kinds, self.feature = images, kinds, feature
        self.features = {"image": feature, "kind": SimpleNamespace(names=["day", "night"])}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.images[index]
        stored = {"bytes": file, "path": None} if isinstance(file, bytes) else {"bytes": None, "path": str(file)}
        if self.feature.decode:
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
            image.load()
            return {"image": image, "kind": self.kinds[index]}
        return {"image": stored, "kind": self.kinds[index]}

    def cast_column(self, column: str, feature: HubImage) -> HubRows:
        assert column == "image"
        return HubRows(self.images, self.kinds, feature)

    def unique(self, column: str) -> list[int | None]:
        assert column == "kind"
        return list(dict.fromkeys(self.kinds))


HUB = {"type": "huggingface", "location": "owner/name", "num_classes": 2, "class_key": "kind"}


def fill_hub(monkeypatch: pytest.MonkeyPatch, images: Sequence[bytes | Path], kinds: Sequence[int | None]) -> None:
    """Let ``datasets`` have one, owner/name."""

    def load_dataset(name: str, split: str) -> HubRows:
        if (name, split) != ("owner/name", "train"):
            raise Exception(f"no\n{name}")  # the package has exceptions of its own, of no narrower type
        return HubRows(images, kinds, HubImage())

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, Image=HubImage))


def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draw(tmp_path / "grey.png", "L", 200, (10, 8))
    images, kinds = [path.read_bytes(), path], [1, 0]
    fill_hub(monkeypatch, images, kinds)
    source = open_source(HUB, (8, 8), 3)
    assert (source.class_names, len(source)) == (("day", "night"), 2)
    for index, kind in enumerate(kinds):
        image, label = source.load(index, torch.Generator())
        assert label == kind
        assert torch.equal(image, torch.full((3, 8, 8), 200, dtype=torch.uint8))
    fill_hub(monkeypatch, images * 3, [*kinds, -1, None, 2, -1])
    message = "^dataset 'owner/name' has images without a class, of which 'kind' is -1, 2, None: .*--no-classes"
    with pytest.raises(ValueError, match=message):
        open_source(HUB, (8, 8), 3)
    assert len(open_source({**HUB, "num_classes": 0}, (8, 8), 3)) == 6
    with pytest.raises(ValueError, match=r"^dataset 'owner/other' cannot be loaded: no owner/other$"):
        open_source({**HUB, "location": "owner/other"}, (8, 8), 3)
    with pytest.raises(ValueError, match="no column 'label'; it has image, kind"):
        open_source({**HUB, "class_key": "label"}, (8, 8), 3)
    with pytest.raises(ValueError, match="column 'kind' of dataset 'owner/name' holds no images; name another"):
        open_source({**HUB, "image_key": "kind"}, (8, 8), 3)


def test_images_of_the_hub_are_looked_at_as_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG file that was cut and closed, of which decoders make grey, as bytes and as a file; and one of no range."""
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2].rstrip(b"\xff") + b"\xff\xd9")
    wide = draw(tmp_path / "wide.tif", "I", 70000)
    fill_hub(monkeypatch, [path.read_bytes(), path, wide, whole, b"no picture"], [0] * 5)
    source, generator = open_source(HUB, (48, 64), 3), torch.Generator()
    for index in range(2):
        message = f"^image {index} of owner/name cannot be read: its last pixels are missing: the file was cut$"
        with pytest.raises(UnreadableError, match=message):
            source.load(index, generator)
    with pytest.raises(UnreadableError, match=r"^image 2 of owner/name cannot be read: its pixels are 32-bit"):
        source.load(2, generator)
    assert source.load(3, generator)[0].float().std() > 20
    with pytest.raises(UnreadableError, match=r"^image 4 of owner/name cannot be read: it begins like no image that"):
        source.load(4, generator)


@pytest.mark.parametrize(
    ("given", "made"),
    [
        *(((40, 20), (12, 6)), ((20, 40), (6, 12)), ((30, 30), (8, 8)), ((50, 40), (8, 8))),
        # The shorter side would be less than 6: both are longer, up to 4 * 64 pixels, and what is longer is cut.
        *(((60, 20), (18, 6)), ((20, 100), (6, 30)), ((300, 20), (42, 6)), ((20, 300), (6, 42))),
    ],
)
def test_images_keep_their_shapes(given: tuple[int, int], made: tuple[int, int]) -> None:
    """64 pixels, (height, width), in even sides of at least 6: sqrt(64 * 2) = 11.3 and half of that."""
    height, width = given
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, height // 2, width, height))  # a quarter, which a crop would make more or less of
    disc = max(2, min(given) // 3)
    image.paste("lime", (width // 2 - disc, height // 2 - disc, width // 2 + disc, height // 2 + disc))
    fitted = KeepShape((2, 2), (6, 6))(image, (8, 8))
    assert (fitted.height, fitted.width) == made
    green = np.asarray(fitted)[..., 1].astype(float)
    rows, columns = green[:, made[1] // 2].sum(), green[made[0] // 2].sum()
    assert 0.7 < rows / columns < 1.4  # a square stays one, to a pixel of so few
    for (x, y), blue in {(0.1, 0.1): False, (0.9, 0.1): False, (0.1, 0.9): False, (0.9, 0.9): True}.items():
        pixel = fitted.getpixel((int(x * fitted.width), int(y * fitted.height)))
        assert isinstance(pixel, tuple)
        assert (pixel[2] > 200, pixel[0] > 200) == (blue, not blue)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_a_jpeg_that_is_cut_before_its_end_is_no_grey_image(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    noise[-16:] = noise[:, -16:] = 128
    path = tmp_path / "a.jpg"
    Image.fromarray(noise).convert(mode).save(path, **options)
    folder, generator = Folder(tmp_path, (48, 64), 3, classes=False), torch.Generator()
    pixels, _ = folder.load(0, generator)  # one that ends in grey is whole
    assert pixels.float().std() > 20
    whole = path.read_bytes()
    start = whole.index(b"\xff\xda") + 14
    end = MARKER.search(whole, start)  # in a progressive file, of the first scan: later ones only make pixels finer
    assert end is not None
    for part in (0.3, 0.6):
        path.write_bytes(whole[: start + int(part * (end.start() - start))].rstrip(b"\xff") + b"\xff\xd9")
        with pytest.raises(UnreadableError, match=r"a\.jpg cannot be read as an image: its last pixels are missing"):
            folder.load(0, generator)


@pytest.mark.parametrize("images", [3, MOST_UNREADABLE + 10])
def test_images_that_break_all_together_end_the_run(images: int, capfd: pytest.CaptureFixture[str]) -> None:
    class Gone:
        class_names = ()

        def __len__(self) -> int:
            return images

        def load(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
            raise UnreadableError(f"{index}.png cannot be read")

    most = min(images, MOST_UNREADABLE)
    with pytest.raises(UnreadableError, match=rf"^{most} images in a row cannot be read; the last one: 0.png cannot"):
        Examples(Gone(), 0.0)[Key((1 - most) % images, 0, 0)]
    assert capfd.readouterr().err.count("warning") == most - 1
