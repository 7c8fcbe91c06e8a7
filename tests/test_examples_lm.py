"""The training and generating commands of language models, at sizes that run in seconds."""

from __future__ import annotations

import errno
import io
import lzma
import math
import os
import re
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from natten_layers.modules.llm import DecoderLM, DecoderLMConfig
from natten_layers_cli import convert, evaluate, generate, lm_trainer, sample_hdit, train_hdit, train_lm, tune
from natten_layers_cli.lm_trainer import Trainer
from natten_layers_cli.parallel import Processes
from natten_layers_cli.running import run_command
from natten_layers_cli.text import random_windows, read_corpus

ROOT = Path(__file__).parents[1]
# New processes find the package without an installation, and leave the cores to the tests that run beside them.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty small text files, a file of bytes that are not text, and a file of another type."""
    path = tmp_path_factory.mktemp("text")
    for i in range(40):
        (path / f"{i}.txt").write_text("".join(f"line {n} of file {i}\n" for n in range(20)))
    (path / "picture.txt").write_bytes(b"\xff\xfe\x00" * 50)
    (path / "notes.md").write_text("other\n" * 100)
    return path


@pytest.fixture
def flags(folder: Path, tmp_path: Path) -> list[str]:
    sizes = {"layers": 2, "hidden": 16, "heads": 2, "kv-heads": 1, "window": 8, "full-every": 2, "context": 16}
    run = {"end-step": 6, "batch-size": 4, "warmup": 2, "eval-every": 3, "eval-tokens": 64, "sample-tokens": 8}
    where = {"data": folder, "pattern": "*.txt", "name": tmp_path / "run", "device": "cpu", "registers": 1}
    return [word for key, value in (sizes | run | where).items() for word in (f"--{key}", str(value))]


def trainer(flags: list[str], *more: str) -> Trainer:
    args = train_lm.parse_arguments([*flags, *more])
    return Trainer(args, Processes("cpu", fsdp=False))


def after_training(flags: list[str], name: Path) -> Path:
    assert trainer(flags, "--name", str(name)).train() == 0
    return name


def saved(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_a_run_trains_reports_and_saves(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_lm.main([*flags, "--end-step", "40", "--eval-every", "20", "--lr", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "step 20:" in printed
    before, after = (float(line.split(":")[1].split()[0]) for line in printed.splitlines() if "held out" in line)
    assert after < before < 8
    assert "; xz -9: " in printed
    out = tmp_path / "run"
    model = DecoderLM.from_pretrained(out / "model")
    assert all(torch.equal(tensor, saved(out)["model"][name]) for name, tensor in model.state_dict().items())
    assert list((out / "tensorboard").iterdir())


@pytest.mark.parametrize(("signal_name", "status"), [("SIGINT", 130), ("SIGHUP", 129), ("SIGUSR1", 0)])
def test_resuming_equals_not_stopping(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_name: str, status: int
) -> None:
    whole = trainer(flags, "--name", str(tmp_path / "whole"))
    whole.train()
    train_step, save, saves = Trainer.train_step, Trainer.save, []

    def interrupted(self: Trainer) -> torch.Tensor:
        if self.step == 3:
            signal.raise_signal(signal.Signals[signal_name])
        return train_step(self)

    def noted(self: Trainer) -> None:
        save(self)
        saves.append(saved(self.args.name)["step"])

    with monkeypatch.context() as patch:
        patch.setattr(os, "isatty", lambda descriptor: False)  # SIGHUP must not silence a terminal under the tests
        patch.setattr(Trainer, "train_step", interrupted)
        patch.setattr(Trainer, "save", noted)
        assert train_lm.main(flags) == status
    assert saves == [3, 4, 6][: 3 if status == 0 else 2]
    assert train_lm.main([*flags]) == 0
    expected, got = saved(tmp_path / "whole"), saved(tmp_path / "run")
    assert got["step"] == 6
    assert expected["model"].keys() == got["model"].keys()
    assert all(torch.equal(got["model"][name], expected["model"][name]) for name in expected["model"])


def files(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (out / "checkpoint.pt", *(out / "model").iterdir())}


def test_nan_is_not_saved(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_lm.main(flags) == 0
    before = files(tmp_path / "run")
    capsys.readouterr()
    assert train_lm.main([*flags, "--end-step", "9", "--lr", "1e30"]) == 2
    assert "the weights are no longer finite" in capsys.readouterr().err.splitlines()[-1]
    assert files(tmp_path / "run") == before

    def spoil(self: Trainer) -> torch.Tensor:
        self.step += 1
        return torch.tensor(math.nan)

    monkeypatch.setattr(Trainer, "train_step", spoil)
    assert train_lm.main([*flags, "--end-step", "12", "--eval-every", "100"]) == 2
    assert "error: the loss of step 10 is nan; try a lower --lr" in capsys.readouterr().err.splitlines()[-1]
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize(("owner", "name", "file"), [(os, "replace", "config.json"), (torch, "save", "checkpoint")])
def test_a_kill_while_the_last_model_is_written(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, file: str
) -> None:
    """The same command writes it again, and removes what was left half written."""
    out, calls, original = tmp_path / "run", iter(range(99)), getattr(owner, name)

    def killed(*arguments: Any) -> None:
        if file in str(arguments[1]) and next(calls) == 1:
            sys.exit(9)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(SystemExit):
            train_lm.main(flags)
    assert saved(out)["step"] == 3
    left = [out / ".checkpoint.0123abcd.tmp.pt", out / "model" / ".model.0123abcd.tmp.safetensors"]
    for path in left:
        path.write_bytes(b"half")
    assert train_lm.main([*flags]) == 0
    assert not any(path.exists() for path in left)
    model = DecoderLM.from_pretrained(out / "model")
    assert saved(out)["step"] == 6
    assert all(torch.equal(tensor, saved(out)["model"][name]) for name, tensor in model.state_dict().items())
    assert not (out / "lock").exists()


def test_what_cannot_be_shown_costs_nothing_that_was_learned(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("cannot write curves")

    monkeypatch.setattr("natten_layers_cli.boards.Boards.scalars", fail)
    assert train_lm.main([*flags, "--end-step", "99", "--eval-every", "50"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: cannot write curves"
    assert saved(tmp_path / "run")["step"] == 10
    assert train_lm.main([*flags, "--end-step", "5"]) == 2  # only the losses at the end are left
    captured = capsys.readouterr()
    assert "bits per byte held out" in captured.out
    assert captured.err.splitlines()[-1] == "error: cannot write curves"


def test_one_run_at_a_time(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lock file that a killed run left behind keeps nobody away: what counts is who holds it."""
    lock = tmp_path / "run" / "lock"
    lock.parent.mkdir()
    hold = f"import fcntl, sys; file = open({str(lock)!r}, 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True)"
    command = [sys.executable, "-c", f"{hold}; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert train_lm.main(flags) == 2
        assert f"another process is training {lock.parent} (it holds {lock})" in capsys.readouterr().err
        other.kill()
    assert lock.exists()
    assert train_lm.main([*flags, "--end-step", "1"]) == 0
    assert "nothing is left" not in capsys.readouterr().out
    assert train_lm.main([*flags, "--end-step", "1"]) == 0
    assert "nothing is left to train: step 1 is reached, and --end-step is 1" in capsys.readouterr().out
    assert generate.main([str(lock.parent), "--device", "cpu", "--prompt", "a"]) == 2
    assert f"config.json and weights: {lock.parent / 'model'} has them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [lambda state: [], lambda state: {}, *(lambda state, key=key: state | {key: "odd"} for key in
     ("model", "optimizer", "step", "config"))],
)  # fmt: skip
def test_checkpoints_of_odd_content(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], Any]
) -> None:
    run = trainer(flags)
    run.save()
    torch.save(change(saved(tmp_path / "run")), run.checkpoint)
    assert train_lm.main([*flags]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: {run.checkpoint} ")


@pytest.mark.parametrize("mode", ["--no-fsdp", "--fsdp"])
def test_two_processes_learn_what_one_does(flags: list[str], tmp_path: Path, mode: str) -> None:
    """As do two steps of accumulation: what is learned depends on the number of examples of a step."""
    expected = saved(after_training(flags, tmp_path / "one"))["model"]
    halves = ["--batch-size", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "natten_layers_cli.train_lm", *flags, *halves, mode]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "held out" in result.stdout
    after_training([*flags, *halves, "--grad-accum-steps", "2"], tmp_path / "accumulated")
    for run in ("run", "accumulated"):
        got = saved(tmp_path / run)["model"]
        for name, tensor in expected.items():
            torch.testing.assert_close(
                got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    DecoderLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize(("context", "batch"), [(16, 4), (15, 3), (2, 64)])
def test_every_held_out_byte_counts_once(flags: list[str], context: int, batch: int) -> None:
    run = trainer(flags, "--context", str(context), "--batch-size", str(batch))
    assert run.model.lm_head is not None
    torch.nn.init.zeros_(run.model.lm_head.weight)  # every byte gets probability 1 / 256
    assert run.bits_per_byte(100) == pytest.approx(8, rel=1e-6)
    targets = len(run.corpus.held_out) - 1
    assert run.bits_per_byte() == pytest.approx(8 * targets / run.corpus.held_out_bytes, rel=1e-6)


def test_a_sample_moves_no_cursor_and_ends_with_all_it_has(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.tensor([[0, *b"a\x1b\xc3\xa9\n", *"😀".encode()[:3]]])
    run = trainer(flags)
    monkeypatch.setattr(run.model, "generate", lambda *_, **__: tokens)
    assert run.sample() == "a\N{REPLACEMENT CHARACTER}é\n\N{REPLACEMENT CHARACTER}"
    assert run.sample() == run.sample()


def test_corpus(folder: Path, tmp_path: Path) -> None:
    corpus = read_corpus(folder, "*.txt")
    files = {path.read_bytes() for path in folder.glob("[0-9]*.txt")}
    train, held_out = (bytes(part.tolist()).split(b"\0")[1:] for part in (corpus.train, corpus.held_out))
    assert set(train) | set(held_out) == files
    assert not set(train) & set(held_out)
    assert corpus.held_out_bytes == sum(map(len, held_out))
    assert corpus.xz_bits_per_byte == 8 * len(lzma.compress(b"".join(held_out), preset=9)) / corpus.held_out_bytes
    fewer = read_corpus(folder, "*.txt", most_held_out=1000)
    assert fewer.held_out_bytes <= 1000
    assert torch.equal(fewer.train, corpus.train)
    assert read_corpus(folder, None).train.numel() + read_corpus(folder, None).held_out.numel() > sum(map(len, files))
    with pytest.raises(ValueError, match="nor a folder"):
        read_corpus(tmp_path / "nowhere", None)
    with pytest.raises(ValueError, match=r'match "\*\.md"'):
        read_corpus(folder, "*.md")

    def refuse(path: str) -> Any:  # permissions do not stop a test that root runs
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(PermissionError):
            read_corpus(folder, "*.txt")


def test_random_windows_depend_on_the_seed_alone() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    windows = random_windows(text, 9, 5, seed=3)
    assert windows.shape == (5, 10)
    assert (windows.diff(dim=1) == 1).all()
    assert torch.equal(windows, random_windows(text, 9, 5, seed=3))
    assert not torch.equal(windows, random_windows(text, 9, 5, seed=4))


def test_separate_documents_do_not_see_each_other(flags: list[str]) -> None:
    rows = torch.tensor([[5, 6, 0, 7], [0, 8, 9, 0]])
    assert lm_trainer.document_bounds(rows, 0).tolist() == [0, 2, 4, 7, 8]
    flags += ["--context", "200"]
    one, other = trainer(flags, "--separate-documents"), trainer(flags)
    for parameter in one.model.parameters():  # so large that what a token sees decides what it predicts
        torch.nn.init.normal_(parameter.detach(), std=0.4)
    other.model.load_state_dict(one.model.state_dict())
    batch = random_windows(one.corpus.train, 200, 4, 0)
    bounds = lm_trainer.document_bounds(batch[:, :-1], one.separator)
    documents = [part[None] for part in batch[:, :-1].flatten().tensor_split(bounds[1:-1])]
    with torch.no_grad():
        logits = torch.cat([one.model(document)[0] for document in documents])
    expected = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
    assert len(documents) > 4
    assert float(one.train_step()) == pytest.approx(float(expected), rel=1e-5)
    assert float(other.train_step()) != pytest.approx(float(expected), rel=1e-4)


def test_validation_separates_documents_too(flags: list[str]) -> None:
    """With a context as long as the text, every byte is predicted once and from all of its file before it."""
    one, other = (trainer([*flags, *more], "--context", "500") for more in (["--separate-documents"], []))
    for parameter in one.model.parameters():  # so large that what a token sees decides what it predicts
        torch.nn.init.normal_(parameter.detach(), std=0.4)
    other.model.load_state_dict(one.model.state_dict())
    text = one.corpus.held_out[:501].long()
    documents = text[:-1].tensor_split((text[1:-1] == 0).nonzero()[:, 0] + 1)
    with torch.no_grad():
        logits = torch.cat([one.model(document[None])[0] for document in documents])
    expected = torch.nn.functional.cross_entropy(logits, text[1:]) / math.log(2)
    assert len(documents) > 1
    assert one.bits_per_byte(500) == pytest.approx(float(expected), rel=1e-5)
    assert other.bits_per_byte(500) != pytest.approx(float(expected), rel=1e-4)


def test_learning_rate(flags: list[str]) -> None:
    args = train_lm.parse_arguments([*flags, "--end-step", "102", "--warmup", "2", "--lr", "1"])
    rates = [lm_trainer.learning_rate(step, args) for step in (0, 1, 2, 52, 101)]
    assert rates[:4] == pytest.approx([0.5, 1, 1, 0.55])
    assert rates[4] == pytest.approx(0.1, abs=1e-3)


def test_config_file_and_flags(flags: list[str], tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('lr = 1e-2\nsink = "learned"\nwindow = 5\ncompile = true\n')
    args = train_lm.parse_arguments(["--config", str(config), "--window", "7"])
    assert (args.lr, args.sink, args.window, args.compile) == (0.01, "learned", 7, True)
    assert lm_trainer.model_config(args).windows == (7, 7, 7, None)
    for path in (ROOT / "examples" / "configs").glob("lm-*.toml"):
        lm_trainer.model_config(train_lm.parse_arguments(["--config", str(path)]))
    for text, message in (
        ("speed = 3\n", " has unknown keys 'speed'"),
        ("lr = \n", ": Invalid value"),
        ("lr = " + "[" * 9999, ": maximum recursion depth exceeded"),
        ("lr = 0\n", '["lr"]: must be above 0, got 0.0'),
        ('window = "wide"\n', "[\"window\"]: 'wide' is no whole number"),
        ("window = 0\n", '["window"]: must be at least 1, got 0'),
        ("compile = 1\n", '["compile"]: must be true or false, got 1'),
        ("registers = true\n", '["registers"]: must be one value, a number or a string, got True'),
        ('sink = "big"\n', "[\"sink\"]: invalid choice: 'big'"),
        ('config = "other.toml"\n', " has unknown keys 'config'"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(str(config) + message)}"):
            train_lm.parse_arguments(["--config", str(config)])


def test_a_config_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natten_layers.io.files.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"^/dev/zero is longer than 1000 bytes, too long for JSON or a config$"):
        train_lm.parse_arguments(["--config", "/dev/zero"])


def test_a_checkpoint_of_something_else(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {}, "step": 3}, tmp_path / "other.pth")
    assert train_lm.main([*flags, "--resume", str(tmp_path / "other.pth")]) == 2
    assert "no checkpoint of this command: it lacks optimizer, config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "/nowhere"], "neither a text file nor a folder"),
        (["--heads", "4", "--kv-heads", "3"], "multiple of num_kv_heads"),
        (["--context", "100000"], "longer than the text"),
        (["--sample-tokens", "4096"], "--sample-tokens 4096: a model of this context knows 4096 positions"),
        (["--resume", "/nowhere/checkpoint.pt"], "does not exist"),
        (["--pattern", "/etc/*"], "--pattern /etc/* is no glob of files in a folder: "),
        (["--fsdp"], "torchrun"),
    ],
)
def test_bad_flags(flags: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_lm.main([*flags, *change]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        ["--full-every", "1"],
        ["--lr", "nan"],
        ["--grad-clip", "0"],
        ["--registers", "-1"],
        ["--weight-decay", "-1"],
        ["--device", "foo"],
    ],
)
def test_flags_out_of_range(flags: list[str], change: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_lm.main([*flags, *change])
    assert change[0] in capsys.readouterr().err.splitlines()[-1]


def test_what_is_there_is_kept(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_lm.main(flags) == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    assert train_lm.main([*flags, "--sink", "none"]) == 2
    assert "sink is zero there, None here" in capsys.readouterr().err

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # the model, a third of it, can be written
    try:
        assert train_lm.main([*flags, "--end-step", "7"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: cannot write {checkpoint}: File too large")
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob(".*"))
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(before)
    flipped[largest.header_offset + largest.file_size // 2] ^= 0x40
    for damaged in (before[:1000], flipped):
        checkpoint.write_bytes(damaged)
        assert train_lm.main([*flags]) == 2
        assert "is damaged" in capsys.readouterr().err


TINY = DecoderLMConfig(
    vocab_size=256, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, windows=(4,), max_positions=64
)


def test_generate_prints_the_prompt_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    DecoderLM(TINY).save_pretrained(tmp_path)
    model = DecoderLM.from_pretrained(tmp_path)
    prompt = "é = "
    ids = torch.tensor([[0, *prompt.encode()]])
    expected = bytes(model.generate(ids, 30, temperature=1.5, generator=5)[0, 1:].tolist())
    command = [str(tmp_path), "--prompt", prompt, "--tokens", "30", "--temperature", "1.5", "--seed", "5"]
    assert generate.main([*command, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed == expected.decode(errors="replace") + "\n"
    assert printed.startswith(prompt)


def test_generate_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["a", "b", "c"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    DecoderLM(DecoderLMConfig(**{**vars(TINY), "vocab_size": 3})).save_pretrained(tmp_path)
    assert generate.main([str(tmp_path), "--prompt", "a b"]) == 2
    assert "tokenizer.json does not exist" in capsys.readouterr().err
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert generate.main([str(tmp_path), "--prompt", "a b", "--tokens", "4", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.split()) >= 5
    assert generate.main([str(tmp_path), "--prompt", ""]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "99"], "--tokens 99: the prompt has 6 tokens, which leave 58 of the model's 64 positions"),
        (["--prompt", "a" * 63], "error: the prompt has 64 tokens, which leave 0 of the model's 64 positions"),
        (["--prompt", "a\udcff"], "the prompt must be UTF-8 text, but byte 1 of it is 0xff"),
    ],
)
def test_generate_refuses(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, and before anything is printed of a text."""
    prompt = ["--prompt", "hello"]
    assert generate.main([str(tmp_path), "--device", "cpu", *prompt]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
    DecoderLM(TINY).save_pretrained(tmp_path)
    assert generate.main([str(tmp_path), "--device", "cpu", *prompt, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    (tmp_path / "tokenizer.json").write_text("{")
    assert generate.main([str(tmp_path), "--device", "cpu", *prompt]) == 2
    assert f"{tmp_path / 'tokenizer.json'} is no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--tokens", "0", "must be at least 1, got 0"),
        ("--temperature", "-1", "must be at least 0, got -1.0"),
        ("--top-k", "-1", "must be at least 0, got -1"),
        ("--top-p", "0", "must be above 0 and at most 1, got 0.0"),
        ("--top-p", "1.5", "must be above 0 and at most 1, got 1.5"),
        ("--device", "foo", ""),
    ],
)
def test_generate_names_flags(flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate.main(["nowhere", "--device", "cpu", flag, value])
    assert f"{flag}{f' {value}:' if flag == '--device' else ''} {message}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (convert.main, "a b --group-size 2 0", "--group-size must be at least 1, got 2 0"),
        (tune.main, "16 --kernel-size 3 --heads 0", "--heads must be at least 1, got 0"),
        *(
            (tune.main, f"{tokens} --kernel-size {size} --heads 2", f"argument {name}: expected 1 to 3 numbers above 0")
            for name, tokens, size in (
                ("--kernel-size", "16x16", "3x0"),
                ("tokens", "-16", "3"),
                ("tokens", "9" * 30, "3"),
            )
        ),
        (sample_hdit.main, "a --size 0 8 --device cpu", "--size must be at least 1, got 0 8"),
        (train_hdit.main, "--keep -1 --device cpu", "--keep must be at least 0, got -1"),
        *(
            (main, f"{before} {flag} {2**40}", f"argument {flag}: must be at most 1000000, got {2**40}")
            for main, before, flag in (
                (train_lm.main, "", "--layers"),
                (train_lm.main, "", "--grad-accum-steps"),
                (train_lm.main, "", "--batch-size"),
                (train_hdit.main, "", "--grad-accum-steps"),
                (train_hdit.main, "", "--sample-steps"),
                (train_hdit.main, "", "--batch-size"),
                (train_hdit.main, "", "--sample-n"),
                (sample_hdit.main, "a", "--steps"),
                (evaluate.main, "a b", "--subsets"),
            )
        ),
        (sample_hdit.main, f"a -n {2**40}", f"argument -n/--count: must be at most 1000000, got {2**40}"),
        *(
            (main, f"{before} --size 8 {2**40}", f"argument --size: must be at most 16384, got {2**40}")
            for main, before in ((evaluate.main, "a b"), (sample_hdit.main, "a"))
        ),
        *(
            (main, f"{before} --num-workers {n}", f"argument --num-workers: must be from 0 to 256, got {n}")
            for main, before in ((train_hdit.main, ""), (evaluate.main, "a b"))
            for n in (-1, 257, 10**15)
        ),
    ],
)
def test_counts_name_their_flags(
    main: Callable[[list[str]], int], arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_what_commands_answer(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Errors are one line; a reader that is gone and Ctrl-C are no errors of the command."""

    def status(error: BaseException) -> tuple[int, str]:
        def body() -> int:
            raise error

        return run_command(body, when_interrupted="interrupted"), capfd.readouterr().err

    assert status(RuntimeError("two\n  lines\n")) == (2, "error: two lines\n")
    assert status(FileNotFoundError(2, "No such file or directory", "x.json")) == (
        2, "error: x.json: No such file or directory\n"
    )  # fmt: skip
    assert status(KeyboardInterrupt()) == (130, "interrupted\n")
    with Path(os.devnull).open("w") as nowhere, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", nowhere)
        assert status(BrokenPipeError(32, "Broken pipe")) == (141, "")
    with pytest.raises(KeyError):  # a mistake of the program's own keeps its traceback
        status(KeyError("x"))


ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 1.50 GiB memory in use. See documentation"
)


def test_too_little_memory_is_told_with_the_way_out(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        raise error

    def said(body: Callable[[], object], **options: Any) -> str:
        assert run_command(lambda: bool(body()), **options) == 2
        return capfd.readouterr().err

    less = ["fewer tokens"]
    on_a_cpu = said(lambda: torch.empty(2**45), less_memory=less)
    assert on_a_cpu.startswith("error: out of memory: try fewer tokens (")
    assert f"you tried to allocate {2**47} bytes" in on_a_cpu
    assert said(lambda: fail(torch.OutOfMemoryError(ON_A_GPU)), less_memory=less) == (
        "error: out of memory: try fewer tokens (CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total "
        "capacity of 15.77 GiB of which 1.06 GiB is free)\n"
    )
    assert said(lambda: fail(OSError(errno.ENOMEM, "Cannot allocate memory")), less_memory=less) == (
        "error: out of memory: try fewer tokens (Cannot allocate memory)\n"
    )
    assert said(lambda: fail(FileNotFoundError(errno.ENOENT, "No such file")), less_memory=less) == (
        "error: No such file\n"
    )
    assert said(lambda: bytearray(2**62)) == "error: out of memory (MemoryError)\n"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (sample_hdit, ["model"]),
        (evaluate, ["a", "b"]),
        (train_hdit, []),
        (train_lm, []),
        (generate, ["model"]),
        (tune, ["16", "--kernel-size", "3", "--heads", "1"]),
    ],
)
def test_commands_know_what_takes_less_memory(
    module: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "run", lambda *_: torch.empty(2**45))
    assert module.main([*arguments, "--device", "cpu"]) == 2
    tried = re.findall(r"--[a-z0-9-]+", capsys.readouterr().err)
    assert tried
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert set(tried) <= set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))


@pytest.mark.parametrize(
    ("module", "arguments", "ways"),
    [
        (train_hdit, ["--checkpointing"], "a smaller --batch-size with more --grad-accum-steps"),
        (train_hdit, [], "a smaller --batch-size with more --grad-accum-steps, or --checkpointing"),
        (generate, ["model", "--bf16"], "fewer --tokens"),
        (generate, ["model"], "--bf16, or fewer --tokens"),
    ],
)
def test_what_takes_less_memory_is_not_on_already(
    module: Any, arguments: list[str], ways: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "run", lambda *_: torch.empty(2**45))
    assert module.main([*arguments, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.partition(" (")[0] == f"error: out of memory: try {ways}"


def test_what_a_stream_cannot_show(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        print("caf\N{LATIN SMALL LETTER E WITH ACUTE}", flush=True)
        tqdm.write("\N{REPLACEMENT CHARACTER}")
        return 0

    with Path(os.devnull).open("w") as nowhere, monkeypatch.context() as patch:
        for stream in (open(1, "w", encoding="ascii", closefd=False), io.StringIO(), None, nowhere):  # noqa: SIM115
            patch.setattr(sys, "stdout", stream)
            assert run_command(body) == 0
            if stream is None:
                sys.stdout.close()  # what the command opened in its place
    assert capfd.readouterr() == ("caf?\n?\n", "")


def test_xz_is_the_bar() -> None:
    """The number to compare the model's with is the size of ``xz -9``'s output for the same bytes, in bits per byte."""
    corpus = read_corpus(None, "t*.py", most_held_out=50000)
    assert 1 < corpus.xz_bits_per_byte < 3
    assert math.isclose(corpus.held_out_bytes, 50000, rel_tol=0.9)
