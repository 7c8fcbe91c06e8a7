"""What the commands share: errors in one line, answers to signals, and one run of a name at a time."""

from __future__ import annotations

import argparse
import errno
import fcntl
import io
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from natten_layers.io.files import make_folder
from natten_layers.io.schema import check_keys
from natten_layers.wording import shorten

from .flag_names import meant
from .launch import FAILED, noted_stops, open_streams

EXPECTED = (OSError, RuntimeError, ValueError, ArithmeticError, MemoryError)
"""Errors that users and machines cause. PyTorch raises no narrower ones."""

SIGNALS_HELP = """
Signals: after Ctrl-C, SIGTERM or SIGHUP the step is taken to its end, everything is saved, and the exit status is 130,
143 or 129. A second Ctrl-C while a step is computed ends the run at once. SIGUSR1 saves and goes on: under SLURM,
"#SBATCH --signal=USR1@300" saves five minutes before the time is up (torchrun does not pass it on: send it to the
training processes).
"""


MOST_TEXT = 4000
"""characters of an error: a C++ compiler's, which torch.compile passes on, are hundreds of thousands"""
MOST_INT = 2**63 - 1  # that of PyTorch's sizes and numbers
MOST_LENGTH = 10**6
"""A list of Python has no more entries here: a longer one fills memory before anybody says that it is too long."""
MOST_SIDE = 2**14
"""pixels of an image's height or width: Pillow opens no square of as many, of which a batch needs 50 GB"""
MOST_WORKERS = 256
"""processes that load images, of one that trains: more of them than a machine can start end the machine's work"""
MOST_SEED = 2**32 - 1
"""A seed and the number of a step, side by side, are the seed of the step, of which PyTorch reads 64 bits."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Ends the help of each flag with its default, where its text does not have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        # Switches are off, lists and texts empty: that says nothing, and some are on by a name of their own.
        silent = isinstance(default, bool | list | None) or default in ("", argparse.SUPPRESS)
        return text if not text or silent or "default" in text else f"{text}; default: %(default)s"


class Parser(argparse.ArgumentParser):
    """A parser whose flags of type int, float and Path take no value that PyTorch or the file system misunderstands.

    Args:
        least: the least value of flags, by their names in what is parsed.
    """

    def __init__(self, *, description: str | None, least: Mapping[str, float] | None = None, **options: Any) -> None:
        # Without abbreviations: those of today are ambiguous, or mean another flag, in a later release.
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False, **options)
        self.least = least or {}
        self.key: tuple[str, str] | None = None
        """how errors name the key of a file that is parsed, and the flag that it stands for"""
        for kind, convert in ((int, _integer), (float, _finite), (Path, _path)):
            self.register("type", kind, convert)

    def parse(self, argv: Sequence[str] | None, defaults: argparse.Namespace | None = None) -> argparse.Namespace:
        """What the flags say, or where they say nothing ``defaults``; ends with a usage error where they do not fit."""
        values = argparse.Namespace(**({} if defaults is None else vars(defaults)))
        return self._check_least(self._parse_known(argv, values))

    def parse_section(
        self, section: Mapping[str, Any], where: str, *, without: Collection[str] = ()
    ) -> argparse.Namespace:
        """What flags would say whose names are the keys of ``section``, with _ or - in them; null is no flag.

        Args:
            section: of a file.
            where: how error messages name the section.
            without: flags that have no sense in it.

        Raises:
            ValueError: an unknown key, or a value that its flag does not take.
        """
        actions = {a.dest: a for a in self._actions if a.option_strings and a.dest not in ("help", *without)}
        named = {key: key.replace("-", "_") for key in section}
        check_keys([key for key, name in named.items() if name not in actions], actions, where)
        if twice := [key for key in named if "-" in key and named[key] in named]:
            raise ValueError(f"{where} has a key twice, with _ and with -: {', '.join(twice)}")
        found = argparse.Namespace()
        for key, name in named.items():
            if section[key] is not None:
                self.key = f'{where}["{key}"]', f"--{name.replace('_', '-')}"
                try:
                    flags = self._as_flags(actions[name], section[key])
                    setattr(found, name, getattr(self._check_least(self._parse_only(flags)), name))
                finally:
                    self.key = None
        return found

    def given(self, argv: Sequence[str] | None) -> set[str]:
        """The names of the flags and arguments that are in ``argv``."""
        return {name for name, value in vars(self._parse_only(argv)).items() if value is not None}

    def error(self, message: str) -> NoReturn:
        if self.key is None:
            super().error(message)
        where, flag = self.key
        said = message.removeprefix("argument ").removeprefix(flag).removeprefix(":").strip()
        raise ValueError(f"{where}: {said}")

    def _parse_only(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Without defaults: None is what ``argv`` does not say."""
        return self._parse_known(argv, argparse.Namespace(**dict.fromkeys(action.dest for action in self._actions)))

    def _parse_known(self, argv: Sequence[str] | None, values: argparse.Namespace) -> argparse.Namespace:
        """``parse_args``, but an unknown flag is named with the one that was probably meant."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        words = list(itertools.takewhile(lambda word: word != "--", sys.argv[1:] if argv is None else argv))
        # Asked first, as the value of a mistyped flag would be taken for an argument without one, and refused as that.
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in flags]
        unknown = [word for word in unknown if " " not in word]  # which argparse takes for a value
        if not unknown or not {"-h", "--help"}.isdisjoint(words):
            values, unknown = self.parse_known_args(argv, values)
        if unknown:
            likely = meant(unknown[0], flags) if unknown[0].startswith("-") else None
            hint = f" (did you mean {likely}?)" if likely else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return values

    def _as_flags(self, action: argparse.Action, value: object) -> list[str]:
        flag = action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                self.error(f"must be true or false, got {shorten(value)}")
            return [flag if value else action.option_strings[1]]
        values = value if action.nargs == "+" and isinstance(value, list) else [value]
        if not values or any(isinstance(one, bool | list | dict) for one in values):
            expected = "a list of values" if action.nargs == "+" else "one value, a number or a string"
            self.error(f"must be {expected}, got {shorten(value)}")
        return [flag, *map(str, values)] if action.nargs == "+" else [f"{flag}={value}"]

    def _check_least(self, args: argparse.Namespace) -> argparse.Namespace:
        for name, minimum in self.least.items():
            value = getattr(args, name)
            values = value if isinstance(value, Sequence) else [value]
            if any(one is not None and one < minimum for one in values):
                flag, got = name.replace("_", "-"), " ".join(map(str, values))
                self.error(f"--{flag} must be at least {minimum}, got {got}")
        return args


def positive(text: str) -> float:
    """The type of a flag for a number above 0."""
    value = _finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def seed(text: str) -> int:
    """The type of ``--seed``."""
    return _integer(text, 0, MOST_SEED)


def list_length(text: str) -> int:
    """The type of a flag that says how many things are in a list, as of layers, or of steps of a sampler."""
    return _at_most(text, MOST_LENGTH)


def side(text: str) -> int:
    """The type of a flag for an image's height or width."""
    return _at_most(text, MOST_SIDE)


def worker_count(text: str) -> int:
    """The type of ``--num-workers``."""
    return _integer(text, 0, MOST_WORKERS)


def _at_most(text: str, most: int) -> int:
    value = _integer(text)
    if value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
    return value


def _integer(text: str, least: int = -MOST_INT, most: int = MOST_INT) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is no whole number") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be from {least} to {most}, got {shorten(value)}")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shorten(text)} is no finite number")
    return value


def _path(text: str) -> Path:
    if not text or "\0" in text:  # Path("") is the working folder, which nobody means by an empty variable
        raise argparse.ArgumentTypeError(f"{shorten(text)} is no path")
    return Path(text)


def run_command(
    body: Callable[[], int],
    *,
    when_interrupted: str = "interrupted",
    less_memory: list[str] | None = None,
) -> int:
    """The exit status of a command. What users, files and machines do wrong becomes one line on standard error.

    Args:
        body: the command; returns its exit status.
        when_interrupted: what to say after Ctrl-C and other signals.
        less_memory: what to ask the command for where a machine's or a GPU's memory is too small, such as
            "fewer --tokens". It is read when ``body`` has failed, which may :func:`take_out_flags_that_are_on`.
    """
    open_streams()
    threading.excepthook, hook = _quiet_about_files, threading.excepthook
    if isinstance(sys.stdout, io.TextIOWrapper):  # a text must not end a run because a terminal or log is of ASCII
        sys.stdout.reconfigure(errors="replace")  # standard error never fails: it escapes
    with noted_stops() as stops:
        try:
            status = body()
            print(end="", flush=True)  # while a reader that is gone can still be answered; without any output, nothing
            return status
        except BrokenPipeError:  # "| head" has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except EXPECTED as error:
            if not stops:
                with suppress(OSError):  # a log on a full disk, too
                    said = _out_of_memory(error, less_memory) if _is_out_of_memory(error) else one_line(error)
                    print(f"error: {said}", file=sys.stderr)
                return FAILED
        except KeyboardInterrupt:
            pass
        except BaseException:
            if not stops:
                raise
        finally:
            threading.excepthook = hook
    with suppress(OSError):  # after SIGHUP there is no terminal
        print(when_interrupted, file=sys.stderr)
    return 128 + (stops[0] if stops else signal.SIGINT)


def _quiet_about_files(error: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises what it cannot write at its next call, too, where it is reported in one line."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def fail(error: OSError) -> NoReturn:
    """Let ``os.walk`` raise what it would leave out."""
    raise error


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks, and of a long text both ends; its type, if it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    cut = len(text) - MOST_TEXT
    return text if cut <= 0 else f"{text[: MOST_TEXT // 2]} ... ({cut} characters) ... {text[-MOST_TEXT // 2 :]}"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small, of a GPU or of the machine, for which PyTorch has no type of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):  # of a process that cannot be started, or a file that cannot be mapped
        return error.errno == errno.ENOMEM
    texts = "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED"
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def take_out_flags_that_are_on(ways: list[str], args: argparse.Namespace) -> None:
    """Leave only what a command does not do already in the ways in which it may take less memory."""
    on = {f"--{name.replace('_', '-')}" for name, value in vars(args).items() if value is True}
    ways[:] = [way for way in ways if way not in on]


def _out_of_memory(error: BaseException, less: list[str] | None) -> str:
    # How much was asked for and is there; the rest is advice for programmers, about settings of PyTorch.
    asked = ". ".join(one_line(error).split(". ")[:3])
    advice = f": try {', or '.join(less)}" if less else ""
    return f"out of memory{advice} ({asked})"


def reason(error: BaseException) -> str:
    """:func:`one_line` for a message that names the file already."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of an error that names no file, as a full disk's under a file that is open, that it is of ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None or isinstance(error, BrokenPipeError):
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End with a usage error where nothing can be computed on ``device``."""
    try:
        kind = torch.device(device)
        if kind.type == "cuda":  # asked without taking memory of it: under torchrun another one may be meant
            count = torch.cuda.device_count()
            if (kind.index or 0) >= count:
                parser.error(
                    f"--device {device}: this PyTorch finds {count or 'no'} CUDA device{'' if count < 2 else 's'}"
                )
        elif kind.type == "meta":
            parser.error(f"--device {device}: tensors have no values there")
        else:
            torch.ones((), device=kind).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one type for it
        parser.error(f"--device {device}: {one_line(error).split('. ')[0]}")


class Signals:
    """While it lasts, signals are wishes that a training loop reads between two steps.

    SIGINT, SIGTERM and SIGHUP ask it to save and stop, SIGUSR1 to save and go on. Inside :meth:`interruptible` a second
    wish to stop raises KeyboardInterrupt; everywhere else, as in the middle of a save, it changes nothing. Both hold
    only from a second after the first wish on, since a Ctrl-C under torchrun comes twice: from the terminal, and from
    torchrun, which passes on what it got itself.
    """

    STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = 0.0
        self.save_wanted = False
        self.may_raise = False

    @property
    def stop_wanted(self) -> bool:
        return self.number is not None

    @property
    def status(self) -> int:
        """The exit status to stop with: that of the signal, or of SIGTERM where another process of the run got one."""
        return 128 + (signal.SIGTERM if self.number is None else self.number)

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        wanted, self.save_wanted = self.save_wanted, False
        return wanted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        before, self.may_raise = self.may_raise, True
        try:
            yield
        finally:
            self.may_raise = before

    def __enter__(self) -> Signals:
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        handlers = dict.fromkeys(self.STOPPING, self._stop) | {signal.SIGUSR1: self._save}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
            del handlers[signal.SIGHUP]
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save_wanted = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # the terminal is gone: a progress bar that writes to it would end the run
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self.terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)
        now = time.monotonic()
        if self.number is None:
            self.number, self.since = number, now
            tell("stopping after this step; a second Ctrl-C does not wait for it, and loses what is not saved")
        elif now - self.since >= 1:
            if self.may_raise:
                raise KeyboardInterrupt
            tell("saving what there is, please wait")


class Showing:
    """Around what a run shows: what cannot be shown, as where a log's disk is full, must not cost what it has learned.

    It is the first process that shows. After the next step all of them know that it failed, save what there is and end.
    """

    def __init__(self) -> None:
        self.problem: OSError | None = None

    @property
    def failed(self) -> bool:
        return self.problem is not None

    def check(self) -> None:
        """Raise the first error that there was."""
        if self.problem is not None:
            raise self.problem

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, OSError):
            self.problem = self.problem or error
        return isinstance(error, OSError)


def tell(text: str) -> None:
    """To standard error, below a progress bar, where its buffer may be in use or the terminal gone."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


@contextmanager
def running_alone(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file ``path`` for as long as a run lasts. The kernel releases it, however the run ends.

    A POSIX lock, as flock(2)'s would outlive a killed run in the processes that it started.

    Raises:
        ValueError: another process holds it.
    """
    make_folder(path.parent)
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            file.close()
            raise ValueError(f"another process is {doing} (it holds {path}); choose another name") from None
        except OSError as error:  # not every network file system has locks
            print(
                f"{path} cannot be locked ({one_line(error)}): start no second process that is {doing}", file=sys.stderr
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its holder removed it while this process waited to open it
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        file.close()
