"""Language models that go on from a Hugging Face directory, in its tokens, and text in one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from natten_layers import DecoderLM, DecoderLMConfig
from natten_layers_cli import lm_trainer, train_lm
from natten_layers_cli.parallel import Processes
from natten_layers_cli.text import read_corpus
from natten_layers_cli.tokens import open_codec

WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model whose tokens are words, as Hugging Face's transformers writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["</s>", *WORDS])}
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "llama" / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": 0}))
    (tmp_path / "text.txt").write_text("".join(f"w{i % 30} w{i * 7 % 30}\n" for i in range(2000)))
    return tmp_path / "llama"


def flags(directory: Path, *more: str) -> list[str]:
    name = directory.parent / "run"
    steps = ["--end-step", "20", "--eval-every", "10", "--eval-tokens", "64", "--sample-tokens", "4", "--warmup", "1"]
    where = ["--model", str(directory), "--data", str(directory.parent / "text.txt"), "--name", str(name)]
    return [*where, *steps, "--context", "16", "--batch-size", "4", "--device", "cpu", *more]


def test_finetuning_starts_from_the_weights_and_writes_what_transformers_reads(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    args = train_lm.parse_arguments(flags(directory))
    assert args.lr == 2e-5
    trainer = lm_trainer.Trainer(args, Processes("cpu", fsdp=False))
    tokens = trainer.corpus.train[None, :16].long()
    assert tokens[0, :5].tolist() == [0, 1, 1, 2, 8]  # the end of a text, then w0 w0 w1 w7
    reference = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(tokens), reference(tokens).logits, rtol=1e-4, atol=1e-5)

    assert train_lm.main(flags(directory, "--lr", "0.03")) == 0
    printed = capsys.readouterr().out
    before, after = (float(line.split(":")[1].split()[0]) for line in printed.splitlines() if "held out" in line)
    assert after < before
    board = EventAccumulator(str(directory.parent / "run" / "tensorboard")).Reload()
    for tag, steps in {"bits per token/train": [10, 20], "learning rate": [10, 20], "gradient norm": [10, 20]}.items():
        assert [event.step for event in board.Scalars(tag) if event.value > 0] == steps
    assert [event.step for event in board.Scalars("bits per byte/held out")] == [10, 20]
    model = directory.parent / "run" / "model"
    assert AutoModelForCausalLM.from_pretrained(model).config.model_type == "llama"
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(tokens).logits
        torch.testing.assert_close(DecoderLM.from_pretrained(model)(tokens), logits, rtol=1e-4, atol=1e-5)
    assert PreTrainedTokenizerFast.from_pretrained(model).encode("w1 w2") == [2, 3]
    assert (model / "generation_config.json").read_bytes() == (directory / "generation_config.json").read_bytes()

    assert train_lm.main(flags(directory, "--end-step", "21")) == 0  # the same command goes on
    assert f"resuming from {directory.parent / 'run' / 'checkpoint.pt'} at step 20" in capsys.readouterr().out


def test_held_out_bits_count_bytes_whatever_the_tokens(directory: Path) -> None:
    """A model that knows nothing needs log2(31) bits a token: 2000 lines of two words, 5 to 8 bytes with the end."""
    trainer = lm_trainer.Trainer(train_lm.parse_arguments(flags(directory)), Processes("cpu", fsdp=False))
    for parameter in trainer.model.parameters():
        torch.nn.init.zeros_(parameter)
    corpus = trainer.corpus
    expected = torch.tensor(31.0).log2().item() * (len(corpus.held_out) - 1) / corpus.held_out_bytes
    assert trainer.bits_per_byte() == pytest.approx(expected, rel=1e-5)
    ratio = len(corpus.held_out) / corpus.held_out_bytes
    assert trainer.bits_per_byte(64) == pytest.approx(torch.tensor(31.0).log2().item() * ratio, rel=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "2"], "--model brings its own sizes: leave --layers away"),
        (["--registers", "0"], "--model brings its own sizes: leave --registers away"),
        (["--context", "65"], "--context 65: "),
    ],
)
def test_what_does_not_go_with_a_model(
    directory: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sys.exit(train_lm.main(flags(directory, *more)))  # some are usage errors, which exit by themselves
    assert message in capsys.readouterr().err


def test_two_files_of_which_none_is_held_out(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words\n" * 2000)
    with pytest.raises(ValueError, match=r"has 2 files to train on .* give more of them, or a single file"):
        read_corpus(tmp_path, None)


def test_one_file_of_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"é line {i}\n" for i in range(1200)))
    corpus = read_corpus(path, None)
    train, held_out = bytes(corpus.train), bytes(corpus.held_out)
    assert train[1:] + held_out[1:] == path.read_bytes()
    assert held_out[1:].startswith("é".encode())
    assert len(held_out) == pytest.approx(path.stat().st_size / 12, rel=0.02)
    assert corpus.held_out_bytes == len(held_out) - 1
    assert bytes(read_corpus(path, None, 100).held_out) == held_out[:101]
    assert bytes(read_corpus(path, None, 1).held_out) == b"\0\xc3\xa9"  # a character at least
    for arguments, message in (
        ((path, "*.py"), "--pattern"),
        ((tmp_path / "x", None), "neither a text file nor a folder of them at"),
    ):
        with pytest.raises(ValueError, match=message):
            read_corpus(*arguments)
    path.write_bytes(b"\xff" * 20000)
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_corpus(path, None)
    path.write_text("short")
    with pytest.raises(ValueError, match="has 5 bytes; at least 10000 are needed"):
        read_corpus(path, None)


def test_a_model_without_an_end_of_text(tmp_path: Path) -> None:
    config = DecoderLMConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, max_positions=9
    )
    with pytest.raises(ValueError, match="names no eos_token_id"):
        lm_trainer.separator(config, object())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        open_codec(tmp_path, 9)
