"""What an installation brings: commands, their extras, and the page that a package index shows."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import natten_layers
from natten_layers_cli.flag_names import OTHER_NAMES
from natten_layers_cli.launch import launch
from natten_layers_cli.running import MOST_TEXT, Parser, one_line, run_command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STUB = "natten_layers_command_stub"


def stub(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Make an importable module that runs ``code``."""
    (folder / f"{STUB}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, STUB, raising=False)


def test_every_command_leads_to_a_function() -> None:
    assert len(PROJECT["scripts"]) == 7
    for command, target in PROJECT["scripts"].items():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function)), command


def test_commands_begin_without_pytorch() -> None:
    """Ctrl-C in the seconds that PyTorch takes to load ends a command without a traceback."""
    script = "import sys, natten_layers_cli.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0


def test_ctrl_c_during_imports_is_quiet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer in ("raise", "raise RuntimeError('the import failed')", "main = lambda: 0  # swallowed"):
        code = f"import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt: {answer}"
        stub(monkeypatch, tmp_path, code)
        assert launch(STUB) == 130
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_becomes_another_error_is_still_a_signal(
    number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch.frombuffer does: "could not determine the shape of object type"."""

    def body() -> int:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise RuntimeError("could not determine the shape") from None
        return 0

    before = signal.getsignal(number)
    assert run_command(body, when_interrupted="nothing was written") == status
    assert capsys.readouterr().err == "nothing was written\n"
    assert signal.getsignal(number) is before


def test_what_a_shell_ignores_is_ignored() -> None:
    """As nohup does with SIGHUP, and a script with Ctrl-C in what it starts with "&"."""

    def body() -> int:
        signal.raise_signal(signal.SIGHUP)
        return 0

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(body) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_system_may_lack_sighup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")  # as Windows
    assert run_command(lambda: 0) == 0


def test_a_terminated_command_leaves_no_unfinished_file(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from natten_layers.io.files import replacing
from natten_layers_cli.running import run_command

def body():
    with replacing(Path({str(tmp_path)!r}) / "model.safetensors") as path:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError
raise SystemExit(run_command(body))
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (143, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", ["import no_such_package", "def main(): import no_such_package"])
def test_a_missing_package_names_the_extra(
    code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, tmp_path, code)
    assert launch(STUB, extra="hdit") == 2
    assert capsys.readouterr().err == (
        "error: Python finds no no_such_package: pip install 'natten-layers[hdit]' brings it\n"
    )


def test_a_module_of_ours_that_is_missing_is_a_bug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(monkeypatch, tmp_path, "import natten_layers_cli.no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        launch(STUB)


def test_extras_that_commands_name_exist() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "natten_layers_cli").glob("*.py"))
    named = set(re.findall(r'extra="(\w+)"', code)) | set(re.findall(r"natten-layers\[(\w+)\]", code))
    assert named
    assert named <= set(PROJECT["optional-dependencies"])


def test_one_extra_brings_what_pipelines_of_diffusers_need() -> None:
    """Without transformers diffusers has no FluxPipeline, and without accelerate it loads no WanTransformer3DModel."""
    brought = {re.split("[>=<]", package)[0] for package in PROJECT["optional-dependencies"]["diffusers"]}
    assert brought >= {"diffusers", "transformers", "accelerate"}
    for path in ("docs/diffusers.md", "examples/sample_flux_neighborhood.py", "examples/decode_ltx.py"):
        commands = re.findall(r"pip install ([^`]+)`", (ROOT / path).read_text())
        assert commands == ["'.[diffusers]'"], path


def test_examples_start_the_commands() -> None:
    for name in ("train_hdit", "sample_hdit", "train_lm", "generate"):
        code = (ROOT / "examples" / f"{name}.py").read_text()
        assert f"natten_layers_cli.launch import {name}\n" in code
        assert f"natten-layers-{name.replace('_', '-')}" in code


def test_every_file_names_the_same_version() -> None:
    released = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.findall(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert released[0] == natten_layers.__version__
    assert cited == [natten_layers.__version__]


def test_every_file_names_the_same_repository() -> None:
    repository = PROJECT["urls"]["Repository"]
    assert all(url.startswith(repository) for url in PROJECT["urls"].values())
    assert f"repository-code: {repository}\n" in (ROOT / "CITATION.cff").read_text()


COMMANDS = {
    "train_hdit": [], "sample_hdit": ["model"], "train_lm": [], "generate": ["model"], "convert": ["a", "b"],
    "tune": ["16"], "evaluate": ["a", "b"],
}  # fmt: skip
"""commands by their module, with the arguments that they must have"""
SEEDED = ("train_hdit", "sample_hdit", "evaluate", "train_lm", "generate")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_is_explained_with_its_default(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[Parser] = []
    monkeypatch.setattr(Parser, "format_help", lambda self: parsers.append(self) or "")
    with pytest.raises(SystemExit, match="0"):
        import_module(f"natten_layers_cli.{command}").main(["--help"])
    monkeypatch.undo()
    formatter = parsers[0]._get_formatter()
    for action in parsers[0]._actions:
        assert action.help, action.dest
        if type(action.default) in (int, float, str) and action.default not in ("", argparse.SUPPRESS):
            assert "default" in formatter._expand_help(action), action.dest


@pytest.mark.parametrize(
    ("command", "flag", "value", "message"),
    [
        *((name, "--seed", seed, "must be from 0 to") for name in SEEDED for seed in (str(2**70), "-1")),
        ("train_hdit", "--batch-size", "9" * 5000, "is no whole number"),
        ("train_hdit", "--end-step", str(2**63), "must be from"),
        ("train_lm", "--end-step", str(10**30), "must be from"),
        ("generate", "--tokens", str(10**30), "must be from"),
        ("convert", "--group-size", str(10**30), "must be from"),
        ("tune", "--heads", str(10**30), "must be from"),
        ("train_hdit", "--lr", "nan", "no finite number"),
        ("train_lm", "--weight-decay", "inf", "no finite number"),
        ("sample_hdit", "--guidance", "nan", "no finite number"),
        ("generate", "--temperature", "nan", "no finite number"),
        ("train_hdit", "--config", "", "'' is no path"),
        ("train_lm", "--name", "", "'' is no path"),
        ("train_lm", "--data", "", "'' is no path"),
        ("sample_hdit", "--output", "", "'' is no path"),
        ("convert", "--config", "", "'' is no path"),
    ],
)  # fmt: skip
def test_a_value_that_no_flag_takes_is_named_with_its_flag(
    command: str, flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module(f"natten_layers_cli.{command}").main
    with pytest.raises(SystemExit, match="2"):
        main([*COMMANDS[command], flag, value])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {flag}" in error
    assert message in error
    assert len(error) < 300


@pytest.mark.parametrize(
    ("command", "flag", "hint"),
    [
        ("generate", "--max-new-tokens=3", " (did you mean --tokens?)"),
        ("generate", "--max_new_tokens=3", " (did you mean --tokens?)"),
        ("generate", "--promt", " (did you mean --prompt?)"),
        ("train_lm", "--block-size", " (did you mean --context?)"),
        ("train_hdit", "--block-size", ""),  # which has no --context
        ("train_hdit", "--end_step", " (did you mean --end-step?)"),
        ("train_hdit", "--xyz", ""),
    ],
)
def test_an_unknown_flag_is_named_with_the_one_that_was_meant(
    command: str, flag: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module(f"natten_layers_cli.{command}").main
    with pytest.raises(SystemExit, match="2"):
        main([*COMMANDS[command], flag])
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {flag}{hint}\n")


def test_the_value_of_a_mistyped_flag_is_not_what_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        import_module("natten_layers_cli.tune").main(["--modle", "gpu-demo"])
    error = capsys.readouterr().err
    assert error.endswith("error: unrecognized arguments: --modle (did you mean --model?)\n")


def test_values_may_look_like_flags_where_they_have_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    """As a comment of SQL, which argparse takes for a value; and help is given beside a mistyped flag."""
    parser = Parser(description=None)
    parser.add_argument("--prompt")
    parser.add_argument("words", nargs="*")
    assert parser.parse(["--prompt", "-- select all users"]).prompt == "-- select all users"
    assert parser.parse(["--prompt=--x", "--", "--promt"]).words == ["--promt"]
    with pytest.raises(SystemExit, match="0"):
        parser.parse(["--promt", "--help"])
    assert capsys.readouterr().out.startswith("usage: ")


def test_other_names_of_flags_lead_to_flags() -> None:
    flags: set[str] = set()
    for command in COMMANDS:
        flags |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / f"natten_layers_cli/{command}.py").read_text()))
    assert set(OTHER_NAMES.values()) <= flags
    assert not flags & OTHER_NAMES.keys()


def test_closed_streams_are_no_files(tmp_path: Path) -> None:
    """What is said to a standard error that the shell has closed, as by 2>&-, does not land in a run's file."""
    code = (
        "import os, sys; from natten_layers_cli.launch import open_streams; open_streams(); file = open('run', 'w'); "
        "print('said'); print('said', file=sys.stderr); os.write(2, b'said'); file.write(sys.stdin.read() + 'whole')"
    )
    command = ["sh", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-']
    assert subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
    assert (tmp_path / "run").read_text() == "whole"


@pytest.mark.parametrize("arguments", [["", "b"], ["a", ""]])
def test_an_empty_path_is_not_the_working_folder(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        import_module("natten_layers_cli.convert").main([*arguments, "--group-size", "1"])
    assert "'' is no path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["tune", "convert"])
def test_commands_of_library_modules_run_as_modules(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"natten_layers.{module}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: natten-layers-{module}" in done.stdout


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train_hdit", ["--config", "FILE"]),
        ("train_lm", ["--config", "FILE"]),
        ("sample_hdit", ["FILE"]),
        ("convert", ["FILE", "b", "--group-size", "1"]),
        ("convert", ["a", "b", "--group-size", "1", "--config", "FILE"]),
    ],
)
def test_a_file_that_is_missing_is_named_in_words(
    command: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "nowhere")
    main = import_module(f"natten_layers_cli.{command}").main
    try:
        status = main([path if argument == "FILE" else argument for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"{path}: No such file or directory")
    assert error.count(path) == 1


def test_the_line_of_an_error_has_both_ends_of_a_long_text() -> None:
    said = one_line(RuntimeError("compile error\n" + 100_000 * "warning\n" + "killed"))
    assert len(said) < MOST_TEXT + 50
    assert said.startswith("compile error warning")
    assert said.endswith("warning killed")
    assert one_line(RuntimeError(MOST_TEXT * "x")) == MOST_TEXT * "x"
