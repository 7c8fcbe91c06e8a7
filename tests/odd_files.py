"""Good files of every format, and what tests do to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from natten_layers import DecoderLM, DecoderLMConfig, HDiT, HDiTConfig, LevelConfig
from natten_layers.kernels.host import tuned
from natten_layers.kernels.host.tiling import ProblemClass, TileConfig

DIFFUSION = HDiTConfig(
    (LevelConfig(1, 16, d_head=8, kernel_size=3), LevelConfig(1, 16, "global", d_head=8)), mapping_width=8
)
LANGUAGE = DecoderLMConfig(
    vocab_size=5, hidden_size=8, intermediate_size=4, num_layers=2, num_heads=2, head_dim=4, max_positions=64
)
PROBLEM = ProblemClass("some GPU", 227 * 1024, (1, 64, 64), (1, 7, 7), 4, 64, 64, 2)
DEEP = "[" * 10**5
LONG = "9" * 5000

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good file of every format."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = HDiT(DIFFUSION)
    model.save_pretrained(folder / "hdit.safetensors")
    tensors = load_file(folder / "hdit.safetensors")
    torch.save({"model_ema": tensors, "config": DIFFUSION.to_json(), "step": 3}, folder / "hdit.pth")
    (folder / "hdit.json").write_text(json.dumps(DIFFUSION.to_json()))
    DecoderLM(LANGUAGE).save_pretrained(folder / "llama")
    DecoderLM(LANGUAGE).save_pretrained(folder / "sharded", max_shard_bytes=500)
    DecoderLM(DecoderLMConfig(**{**vars(LANGUAGE), "sink": "learned", "num_registers": 1})).save_pretrained(
        folder / "own"
    )
    tuned.write_tuned(folder / "configs.json", {("forward", PROBLEM): TileConfig((1, 4, 4), (1, 4, 8), 4, 2, 1)})
    return folder


def copied(good: Path, folder: Path, name: str) -> Path:
    target = folder / name
    if (good / name).is_dir():
        return Path(shutil.copytree(good / name, target, dirs_exist_ok=True))
    return Path(shutil.copy(good / name, target))


def refused(load: Callable[[], object], *words: str) -> None:
    """Check that ``load`` raises a ValueError whose message contains ``words`` and is short enough to read."""
    with pytest.raises(ValueError, match=r".") as error:
        load()
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message) < 2000


def edit_json(path: Path, edit: Edit) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def drawn(examples: int) -> settings:
    """So many examples, unless ``--examples`` asks for others."""
    asked = settings.get_current_profile_name() == "fuzz"
    return settings(
        max_examples=settings().max_examples if asked else examples, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["yarn", "llama3", "shifted-window", "sliding_attention", "../x", LONG, "\ud800"])
)
JSON = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=4), LEAVES, max_size=2)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(*path, key), *places_in(inner, (*path, key))]]
