"""What text generation takes from a model's directory and from flags: chat templates, settings, texts to stop at."""

from __future__ import annotations

import copy
import dataclasses
import json
import locale
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from natten_layers import DecoderLM, DecoderLMConfig
from natten_layers_cli import generate, train_lm
from natten_layers_cli.tokens import Bytes, Codec, StopStrings, apply_chat_template, generation_settings, open_codec

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


BYTES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


def write_llama_tokenizer(folder: Path) -> Tokenizer:
    """As Llama 2, Mistral, Mixtral and Phi-3 bring it: the decoder takes the space away that begins a text."""
    words = {word: 259 + i for i, word in enumerate(["▁", "▁Paris", "▁is", "x", "é", "."])}
    pieces = ["▁", *"Parisxé."]
    vocabulary = SPECIAL | BYTES | words | {c: 300 + i for i, c in enumerate(pieces) if c not in words}
    merges = [("▁", "P"), ("▁P", "a"), ("▁Pa", "r"), ("▁Par", "i"), ("▁Pari", "s"), ("▁", "i"), ("▁i", "s")]
    vocabulary |= {"".join(pair): 320 + i for i, pair in enumerate(merges) if "".join(pair) not in vocabulary}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_byte_level_tokenizer(folder: Path) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen bring it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> list[Codec]:
    found: list[Codec] = [Bytes()]
    for write_tokenizer in (write_llama_tokenizer, write_byte_level_tokenizer):
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folder)
        found.append(open_codec(folder, 400))
    return found


def shown(codec: Codec, before: Sequence[int], tokens: Sequence[int]) -> str:
    stream = codec.stream(before)
    return "".join(map(stream.add, tokens)) + stream.end()


@given(prompt=st.text(" Parisxé.😀\n", max_size=8), text=st.text(" Parisxé.😀\n", max_size=12), which=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_a_stream_shows_what_decoding_all_tokens_adds(codecs: list[Codec], prompt: str, text: str, which: int) -> None:
    codec = codecs[which]
    before, tokens = codec.encode(prompt, special=False), codec.encode(f" {text}", special=False)
    added = f" {text}"
    if which == 1 and tokens:  # this tokenizer begins each text that it encodes with a space, and shows none there
        added = f" {added}" if before else added
    assert shown(codec, before, tokens) == added
    assert shown(codec, [], tokens) == f" {text}"


@given(tokens=st.lists(st.sampled_from([0, 1, 2, 3 + 0xC3, 3 + 0xA9, 3 + 0xFF, 260, 262, 350]), max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_stream_takes_any_tokens(codecs: list[Codec], tokens: list[int]) -> None:
    """Bytes that are no character do not hide the text around them."""
    words = "".join({260: " Paris", 262: "x"}.get(token, "") for token in tokens)
    text = re.sub("[\N{REPLACEMENT CHARACTER}é]", "", shown(codecs[1], [], tokens))
    assert text.removeprefix(" ") == words.removeprefix(" ")  # a byte before the first word keeps its space


def test_a_character_that_does_not_end(codecs: list[Codec]) -> None:
    for codec, offset in zip(codecs, (0, 3, None), strict=True):
        whole = codec.encode("é😀", special=False) if offset is None else [offset + byte for byte in "é😀".encode()]
        stream = codec.stream()
        assert "".join(map(stream.add, whole[:-1])) == "é"
        assert set(stream.end()) == {"\N{REPLACEMENT CHARACTER}"}


def test_a_stream_decodes_few_tokens_a_step(codecs: list[Codec]) -> None:
    codec: Any = codecs[1]
    lengths = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(codec.tokenizer, name)

        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return codec.tokenizer.decode(ids)

    counted = copy.copy(codec)
    counted.tokenizer = Counted()
    stream = counted.stream([260, 261])
    for token in [260, *[3 + 0xFF] * 100, *[1] * 100, *[350] * 100, *[261] * 100]:
        stream.add(token)
    assert max(lengths) <= 32


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


def test_files_are_utf8_in_any_locale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template, config = tmp_path / "chat_template.jinja", tmp_path / "config.toml"
    template.write_bytes("{# é #}hi".encode())
    config.write_bytes('name = "é"'.encode())
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        assert apply_chat_template(tmp_path, []) == "hi"
        assert train_lm.parse_arguments(["--config", str(config), "--device", "cpu"]).name == Path("é")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    for path in (template, config):
        path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=f"^{template}: .* byte 0xe9 in position 3"):
        apply_chat_template(tmp_path, [])
    assert train_lm.main(["--config", str(config)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {config}: 'utf-8' codec can't decode byte 0xe9 in position 3")


def test_chat_templates_are_those_of_transformers(tmp_path: Path) -> None:
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
    for content, expected in (
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [5, 7]},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "stop_tokens": [5, 7]}),
        ({"do_sample": False, "temperature": 0.6, "eos_token_id": 5}, {"temperature": 0.0, "stop_tokens": [5]}),
        ({"top_k": 0, "top_p": None, "transformers_version": "5.0"}, {"top_k": 0}),
    ):  # fmt: skip
        write(tmp_path, "generation_config.json", content)
        assert generation_settings(tmp_path) == (expected, [])
    write(tmp_path, "generation_config.json", {"repetition_penalty": 1.1, "min_p": 0.0, "num_beams": 4})
    assert generation_settings(tmp_path) == ({}, ["repetition_penalty = 1.1", "num_beams = 4"])
    for top_p in ("high", 0):
        write(tmp_path, "generation_config.json", {"top_p": top_p})
        with pytest.raises(ValueError, match=r"generation_config\.json.*top_p.*must be a finite number"):
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
    for flags, why in (([], f"{tmp_path}/generation_config.json"), (["--temperature", "0"], "--temperature 0")):
        assert generate.main([*command, *flags, "--top-p", "0.5"]) == 2
        assert f"--top-p 0.5: {why} takes the likeliest token always" in capsys.readouterr().err
    assert text("--top-p", "1", "--top-k", "0") == greedy
    write(tmp_path, "generation_config.json", {"top_k": 1, "temperature": 1.0})
    assert text("--seed", "3") == greedy
    assert text("--seed", "3", "--top-k", "0") == whole
    write(tmp_path, "generation_config.json", {"top_k": 0, "temperature": 1.0})
    assert text("--seed", "3") == whole


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


def test_generate_keeps_the_space_after_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llama_tokenizer(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"chat_template": TEMPLATE})
    DecoderLM(dataclasses.replace(CONFIG, vocab_size=400)).save_pretrained(tmp_path)

    def fake(*_: Any, callback: Any, **__: Any) -> None:
        for token in (260, 261, 260, 3 + 0xC3):
            callback(torch.tensor([token]))

    monkeypatch.setattr(DecoderLM, "generate", fake)

    def text(*flags: str) -> str:
        assert generate.main([str(tmp_path), "--prompt", "x is", "--device", "cpu", *flags]) == 0
        return capsys.readouterr().out

    assert text() == "x is Paris is Paris\N{REPLACEMENT CHARACTER}\n"
    assert text("--stop", " Paris") == "x is\n"
    assert text("--chat") == "Paris is Paris\N{REPLACEMENT CHARACTER}\n"  # an answer is a text of its own
