"""Files with flipped bits and moved JSON values, drawn at random: they load, or raise an error that names the file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from odd_files import JSON, copied, drawn, places_in
from odd_files import good as good

from natten_layers import DecoderLM, HDiT, HDiTConfig
from natten_layers.kernels.host import tuned


def load_checked(path: Path) -> None:
    """Load a checkpoint. If its checksums are right, it must have the content that was written."""
    model, expected = HDiT.from_pretrained(path), HDiT.from_pretrained(path.parent / "hdit.safetensors")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


LOADS: dict[str, Callable[[Path], object]] = {
    "hdit.safetensors": HDiT.from_pretrained,
    "hdit.pth": load_checked,
    "hdit.json": HDiTConfig.from_json,
    "llama/config.json": lambda path: DecoderLM.from_pretrained(path.parent),
    "llama/model.safetensors": lambda path: DecoderLM.from_pretrained(path.parent),
    "own/config.json": lambda path: DecoderLM.from_pretrained(path.parent),
    "sharded/model.safetensors.index.json": lambda path: DecoderLM.from_pretrained(path.parent),
    "configs.json": tuned.read_tuned,
}


def loads_or_names_itself(load: Callable[[Path], object], path: Path) -> None:
    """Check that a damaged file either loads, as a valid file of other content, or raises an error that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about unusual pickles before it fails
            load(path)
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        return
    assert path.name in message or str(path.parent) in message, message
    assert message.count(str(path)) <= 1, message
    assert len(message) < 3000
    message.encode()  # can be printed


@pytest.mark.parametrize("name", LOADS)
@drawn(12)
@given(data=st.data())
def test_turned_bits(name: str, data: st.DataObject, good: Path, tmp_path: Path) -> None:
    copied(good, tmp_path, name.split("/")[0])
    copied(good, tmp_path, "hdit.safetensors")
    path = tmp_path / name
    content = bytearray((good / name).read_bytes())
    # A file's structure is at its beginning and, in a zip archive, at its end.
    near = st.integers(0, min(len(content), 3000) - 1)
    places = near | near.map(lambda i: len(content) - 1 - i) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(places) :]
    path.write_bytes(content)
    loads_or_names_itself(LOADS[name], path)


@pytest.mark.parametrize("name", [name for name in LOADS if name.endswith(".json")])
@drawn(12)
@given(data=st.data())
def test_other_values_in_json(name: str, data: st.DataObject, good: Path, tmp_path: Path) -> None:
    copied(good, tmp_path, name.split("/")[0])
    path = tmp_path / name
    content = json.loads(path.read_text())
    *keys, last = data.draw(st.sampled_from(places_in(content)))
    inner = content
    for key in keys:
        inner = inner[key]
    # Values that are almost valid get past more checks than arbitrary ones.
    near = st.sampled_from([str(inner[last]), [inner[last]], {"a": inner[last]}, {}, [], None])
    inner[last] = data.draw(near | JSON)
    path.write_text(json.dumps(content))
    loads_or_names_itself(LOADS[name], path)
