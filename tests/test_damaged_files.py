"""Commands on files with flipped bits, cut ends and odd values: they end with one line of error, or do their work.

``--examples 1000`` draws that many for each file; ``make fuzz`` does so. test_drawn_damage.py does the same to the
library.
"""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distribution import MODEL
from hdit_runs import cut
from hypothesis import given
from hypothesis import strategies as st
from odd_files import JSON, drawn, places_in
from torch import Tensor

from natten_layers import DecoderLM, DecoderLMConfig

pytest.importorskip("PIL")
pytest.importorskip("skimage")
pytest.importorskip("tensorboard")

from natten_layers_cli import convert, generate, sample_hdit, train_hdit, train_lm

CPU = ("--device", "cpu")
SHORT = ("--batch-size", "1", "--demo-every", "0", "--num-workers", "0", "--sample-steps", "1", "--sample-n", "1")
LM = (
    "--pattern", "*.txt", "--layers", "1", "--hidden", "8", "--heads", "2", "--kv-heads", "1", "--context", "8",
    "--batch-size", "1", "--eval-every", "9", "--eval-tokens", "16", "--sample-tokens", "0", "--held-out-bytes", "50",
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """A command and the file that is damaged before it runs. ``HERE/`` in an argument is the folder of all files."""

    file: str
    main: Callable[[Sequence[str]], int]
    arguments: Sequence[str]

    def __str__(self) -> str:
        return f"{self.main.__module__.rpartition('.')[2]} {self.file}"


HDIT = ("--config", "HERE/config.json", "--name", "HERE/run", "--end-step", "2", *SHORT, *CPU)
DAMAGES = (
    Damage("config.json", train_hdit.main, HDIT),
    Damage("run_state.json", train_hdit.main, HDIT),
    Damage("run_metrics.csv", train_hdit.main, HDIT),
    Damage("run_00000001.pth", train_hdit.main, HDIT),
    Damage("run.safetensors", train_hdit.main, (*HDIT[:2], "--name", "HERE/new", "--end-step", "1", *SHORT, *CPU,
        "--resume-inference", "HERE/run.safetensors")),
    Damage("run.safetensors", sample_hdit.main, ("HERE/run.safetensors", "-n", "1", "--steps", "1", "--output",
        "HERE/new.png", *CPU)),
    Damage("run_00000001.pth", sample_hdit.main, ("HERE/run_00000001.pth", "-n", "1", "--steps", "1", "--output",
        "HERE/new.png", *CPU)),
    Damage("run_samples.png", sample_hdit.main, ("HERE/run.safetensors", "--reproduce", "HERE/run_samples.png", *CPU)),
    Damage("run.safetensors", convert.main, ("HERE/run.safetensors", "HERE/new.safetensors", "--group-size", "2")),
    Damage("flags.toml", train_lm.main, ("--config", "HERE/flags.toml", "--name", "HERE/lm-toml", *CPU)),
    Damage("lm/checkpoint.pt", train_lm.main, ("--data", "HERE/text", "--name", "HERE/lm", "--end-step", "2",
        *LM, *CPU)),
    Damage("bytes/config.json", generate.main, ("HERE/bytes", "--tokens", "2", *CPU)),
    Damage("bytes/generation_config.json", generate.main, ("HERE/bytes", "--tokens", "2", *CPU)),
    Damage("bytes/tokenizer_config.json", generate.main, ("HERE/bytes", "--chat", "--tokens", "2", *CPU)),
    Damage("bytes/model.safetensors", generate.main, ("HERE/bytes", "--tokens", "2", *CPU)),
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every command reads, whole."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "config.json").write_text(json.dumps(MODEL))
    name = str(folder / "run")
    flags = ("--config", str(folder / "config.json"), "--name", name, "--save-every", "1", *SHORT, *CPU)
    assert train_hdit.main([*flags, "--end-step", "1"]) == 0
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(f"{number} is a number. " * 50)
    flags = ("--data", str(folder / "text"), "--name", str(folder / "lm"), *LM, *CPU)
    assert train_lm.main([*flags, "--end-step", "1"]) == 0
    (folder / "flags.toml").write_text(
        f'data = "{folder / "text"}"\npattern = "*.txt"\nlayers = 1\nhidden = 8\nheads = 2\nkv_heads = 1\ncontext = 8\n'
        'end_step = 1\nlr = 1e-3\nsink = "zero"\nsample_tokens = 0\nheld_out_bytes = 50\neval_tokens = 16\n'
        "compile = false\n"
    )
    config = DecoderLMConfig(
        vocab_size=256, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, max_positions=64
    )
    DecoderLM(config).save_pretrained(folder / "bytes")
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "eos_token_id": [3], "min_p": 0.1}
    (folder / "bytes" / "generation_config.json").write_text(json.dumps(settings))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    chat = {
        "bos_token": {"content": "<"},
        "eos_token": ">",
        "chat_template": [{"name": "default", "template": template}],
    }
    (folder / "bytes" / "tokenizer_config.json").write_text(json.dumps(chat))
    return folder


def turned_bits(content: bytes, data: st.DataObject) -> bytes:
    """With up to four bits turned, and maybe without its end."""
    turned = bytearray(content)
    near = st.integers(0, min(len(turned), 2000) - 1)  # a file's structure is at its beginning and at its end
    places = near | near.map(lambda i: len(turned) - 1 - i) | st.integers(0, len(turned) - 1)
    for place in data.draw(st.lists(places, max_size=4)):
        turned[place] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(turned[: data.draw(places)] if data.draw(st.booleans()) else turned)


def other_value(content: Any, data: st.DataObject) -> Any:
    """A structure of mappings and lists with one value replaced or left out, in place."""
    places = places_in(content)
    if not places:
        return content
    *keys, last = data.draw(st.sampled_from(places))
    inner = content
    for key in keys:
        inner = inner[key]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        del inner[last]
    elif isinstance(inner[last], Tensor):
        tensor = inner[last]
        others = [tensor[None], tensor.flatten()[:1], tensor.to(torch.complex64), tensor * torch.nan, {}, [tensor]]
        inner[last] = data.draw(st.sampled_from([*others, tensor.to("meta"), tensor.to_sparse(), torch.tensor(3)]))
    else:
        near = st.sampled_from([str(inner[last]), [inner[last]], {"a": inner[last]}, {}, [], None, -1, 0, 2**40])
        inner[last] = data.draw(near | JSON)
    return content


def restructured(path: Path, data: st.DataObject) -> None:
    """Give a file that stays whole another content."""
    if path.suffix == ".json":
        path.write_text(json.dumps(other_value(json.loads(path.read_text()), data)))
    elif path.suffix in (".pth", ".pt"):
        torch.save(other_value(torch.load(path, weights_only=True), data), path)
    elif path.suffix == ".safetensors":
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        if data.draw(st.booleans()) and "config" in header.get("__metadata__", {}):
            config = other_value(json.loads(header["__metadata__"]["config"]), data)
            header["__metadata__"]["config"] = json.dumps(config)
        else:
            header = other_value(header, data)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    elif path.suffix == ".toml":
        lines = path.read_text().splitlines()
        place = data.draw(st.integers(0, len(lines) - 1))
        values = st.sampled_from(["-1", "nan", "1e400", '""', "[]", "{}", "true", "9" * 50, '"a\\u0000"', "1979-05-27"])
        lines[place] = f"{lines[place].partition(' = ')[0]} = {data.draw(values)}"
        path.write_text("\n".join(lines))


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
@drawn(1)
@given(data=st.data())
def test_a_command_answers_in_one_line(
    damage: Damage, data: st.DataObject, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "files"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    path = folder / damage.file
    if data.draw(st.booleans()):
        path.write_bytes(turned_bits(path.read_bytes(), data))
    else:
        restructured(path, data)
    answers_in_one_line(damage, folder, capsys)


def answers_in_one_line(damage: Damage, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line, or nothing where the command did its work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about unusual pickles before it fails
        try:
            status = damage.main([argument.replace("HERE", str(folder)) for argument in damage.arguments])
        except SystemExit as stop:
            status = stop.code
    error = capsys.readouterr().err
    assert status in (0, 1, 2), error  # 1: --reproduce finds another picture
    if status == 2:
        lines = [line for line in error.splitlines() if "error: " in line]
        assert len(lines) == 1, error
        assert "step/s]" not in lines[0], "it stands behind a progress bar"
        assert lines[0] == error.splitlines()[-1]
        assert len(lines[0]) < 3000
        assert lines[0].count(str(folder / damage.file)) <= 1, lines[0]
        return lines[0]
    return ""


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d.file.endswith((".pth", ".pt", ".safetensors"))], ids=str)
def test_a_file_that_was_cut_is_named_once(
    damage: Damage, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "files"))
    cut(folder / damage.file)
    assert answers_in_one_line(damage, folder, capsys).count(str(folder / damage.file)) == 1


@pytest.mark.parametrize("key", ["exp_avg", "step"])
@pytest.mark.parametrize("damage", [d for d in DAMAGES if d.file in ("run_00000001.pth", "lm/checkpoint.pt")], ids=str)
def test_a_checkpoint_without_a_moment_is_refused(
    damage: Damage, key: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "files"))
    content = torch.load(folder / damage.file, weights_only=True)
    states = content["opt" if "opt" in content else "optimizer"]["state"]
    del next(iter(states.values()))[key]
    torch.save(content, folder / damage.file)
    said = answers_in_one_line(damage, folder, capsys)
    if damage.main is not sample_hdit.main:  # which reads the weights alone
        assert damage.file in said


def test_an_error_of_the_metrics_does_not_stand_behind_a_progress_bar(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "files"))
    (folder / "run_metrics.csv").write_text("odd\n1,2\n")
    damage = next(one for one in DAMAGES if one.file == "run_metrics.csv")
    assert answers_in_one_line(damage, folder, capsys).startswith("error: ")
