"""What text generation takes from a model's directory and from flags: chat templates, settings, texts to stop at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from natten_layers import DecoderLM, DecoderLMConfig
from natten_layers_cli import generate
from natten_layers_cli.tokens import StopStrings, apply_chat_template, generation_settings

CONFIG = DecoderLMConfig(
    vocab_size=256, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, max_positions=128
)


@pytest.mark.parametrize(
    ("strings", "pieces", "shown", "held"),
    [
        ([], ["ab", "c"], ["ab", "c"], ""),
        (["bc"], ["ab", "d", "xb", "cz"], ["a", "bd", "x", ""], ""),  # a start is held until it is none, or all there
        (["abac"], ["aba", "bac"], ["", "ab"], ""),  # the end of what is held may be a start again
        (["END", "\n\n"], ["x\n", "y E"], ["x", "\ny "], "E"),
        (["b", "ab"], ["xab"], ["x"], ""),  # the first place counts
    ],
)
def test_stop_strings(strings: list[str], pieces: list[str], shown: list[str], held: str) -> None:
    stop = StopStrings(strings)
    assert [stop.add(piece) for piece in pieces] == shown
    assert stop.held == held


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))


TEMPLATE = """{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_chat_templates(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " hi "}]
    expected = "<s><system>be brief</s>\n<user>hi</s>\n<assistant>"
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    with pytest.raises(ValueError, match=r"has neither chat_template\.jinja nor a chat_template in"):
        apply_chat_template(tmp_path, messages)
    write(tmp_path, "tokenizer_config.json", tokens | {"chat_template": TEMPLATE})
    assert apply_chat_template(tmp_path, messages) == expected
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    write(tmp_path, "tokenizer_config.json", tokens | {"chat_template": named})
    assert apply_chat_template(tmp_path, messages) == expected
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    with pytest.raises(ValueError, match=r"the chat template of .* says: no system message"):
        apply_chat_template(tmp_path, messages)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="unsafe"):
        apply_chat_template(tmp_path, messages)


def test_chat_templates_are_those_of_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE + "{{ messages | tojson }}{% for x in [1, 2] %}{% break %}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "é <b>"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert apply_chat_template(tmp_path, messages) == expected


def test_generation_settings(tmp_path: Path) -> None:
    assert generation_settings(tmp_path) == ({}, [])
    for content, settings in (
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [5, 7]},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "stop_tokens": [5, 7]}),
        ({"do_sample": False, "temperature": 0.6, "eos_token_id": 5}, {"temperature": 0.0, "stop_tokens": [5]}),
        ({"top_k": 0, "top_p": None, "transformers_version": "5.0"}, {}),
    ):  # fmt: skip
        write(tmp_path, "generation_config.json", content)
        assert generation_settings(tmp_path) == (settings, [])
    write(tmp_path, "generation_config.json", {"repetition_penalty": 1.1, "min_p": 0.0, "num_beams": 4})
    assert generation_settings(tmp_path) == ({}, ["repetition_penalty = 1.1", "num_beams = 4"])
    write(tmp_path, "generation_config.json", {"top_p": "high"})
    with pytest.raises(ValueError, match=r"generation_config\.json.*top_p"):
        generation_settings(tmp_path)


def test_generate_stops_and_takes_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    DecoderLM(CONFIG).save_pretrained(tmp_path)
    command = [str(tmp_path), "--prompt", "ab", "--tokens", "40", "--device", "cpu"]

    def text(*flags: str) -> str:
        assert generate.main([*command, *flags]) == 0
        return capsys.readouterr().out

    greedy = text("--temperature", "0")
    assert text() != greedy
    whole = text("--seed", "3", "--temperature", "1")
    cut = next(whole[i : i + 2] for i in range(8, 30) if whole[i : i + 2].isascii() and "\n" not in whole[i : i + 2])
    assert text("--seed", "3", "--temperature", "1", "--stop", "never", "--stop", cut) == (
        "ab" + whole[2 : whole.index(cut, 2)] + "\n"
    )

    write(tmp_path, "generation_config.json", {"do_sample": False, "num_beams": 2})
    assert generate.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == greedy
    assert captured.err == f"note: {tmp_path}/generation_config.json asks for num_beams = 2, which is not applied\n"
    assert text("--temperature", "1", "--seed", "3") == whole  # flags win


def test_generate_answers_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    DecoderLM(CONFIG).save_pretrained(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"chat_template": TEMPLATE, "bos_token": "[", "eos_token": "]"})
    seen = []

    def fake(self: DecoderLM, ids: torch.Tensor, *_: Any, callback: Any, **__: Any) -> None:
        seen.append(bytes(ids[0].tolist()).decode())
        for byte in b"Paris":
            callback(torch.tensor([byte]))

    monkeypatch.setattr(DecoderLM, "generate", fake)
    command = [str(tmp_path), "--prompt", "capital?", "--chat", "--device", "cpu"]
    assert generate.main([*command, "--system", "be brief"]) == 0
    assert seen == ["[<system>be brief]\n<user>capital?]\n<assistant>"]
    assert capsys.readouterr().out == "Paris\n"  # without the prompt
    with pytest.raises(SystemExit):
        generate.main([str(tmp_path), "--system", "x"])
    assert "--system needs --chat" in capsys.readouterr().err
