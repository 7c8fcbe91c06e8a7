"""Which launch a problem gets: an override, what ``python -m natten_layers.tune`` found on this machine, or the rule.

Nothing is searched on a user's call. The file of tuned launches is read once, when the first kernel is launched.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from ...io.files import read_json, replacing
from ...io.schema import build, shorten
from .tiling import Kind, Launch, ProblemClass, rule

__all__ = [
    "cache_file",
    "explicit_launch",
    "forget",
    "launch_for",
    "override",
    "override_pack",
    "read_tuned",
    "remembered",
    "write_tuned",
]

FORMAT = 1
MOST_SIDES = 1024
"""rows of a tile, or columns of a chunk, that a file may ask for: more than any multiprocessor holds"""

P = ParamSpec("P")
R = TypeVar("R")

Tuned = dict[tuple[Kind, ProblemClass], Launch]


class Overrides(NamedTuple):
    launches: Mapping[Kind, Launch] = MappingProxyType({})
    pack: int | None = None


NO_OVERRIDES = Overrides()
_overrides: ContextVar[Overrides] = ContextVar("natten_layers_launch_overrides", default=NO_OVERRIDES)
_forgetters: list[Callable[[], None]] = []


@contextmanager
def override(launches: Mapping[Kind, Launch] | None = None, *, pack: int | None = None) -> Iterator[None]:
    """Replace the choice in this thread, for measurements: whole launches, or ``pack`` heads a program."""
    token = _overrides.set(Overrides(launches or {}, pack))
    try:
        yield
    finally:
        _overrides.reset(token)


def launch_for(kind: Kind, problem: ProblemClass) -> Launch:
    """The launch of one kernel for a problem class."""
    return explicit_launch(kind, problem) or rule(kind, problem, override_pack())


def explicit_launch(kind: Kind, problem: ProblemClass) -> Launch | None:
    """The launch that an override or the file of tuned launches names, if one does."""
    overrides = _overrides.get()
    if kind in overrides.launches:
        return overrides.launches[kind]
    return _tuned().get((kind, problem)) if overrides.pack is None else None


def override_pack() -> int | None:
    """Heads a program that an override asks for."""
    return _overrides.get().pack


def remembered(choose: Callable[P, R]) -> Callable[P, R]:
    """Cache what a function makes of its arguments and :func:`launch_for`, until :func:`forget`.

    Under :func:`override` the function is called each time.
    """
    known = lru_cache(maxsize=1024)(choose)
    _forgetters.append(known.cache_clear)

    @wraps(choose)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (known if _overrides.get() is NO_OVERRIDES else choose)(*args, **kwargs)

    return run


def forget() -> None:
    """Read the file of tuned launches again, on the next launch."""
    _tuned.cache_clear()
    for clear in _forgetters:
        clear()


def cache_file() -> Path:
    """``launches.json`` in ``$NATTEN_LAYERS_CACHE``, or in ``natten_layers`` under the user's cache folder."""
    if own := os.environ.get("NATTEN_LAYERS_CACHE"):
        return Path(own) / "launches.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "natten_layers" / "launches.json"


@cache
def _tuned() -> Tuned:
    try:
        return read_tuned(cache_file())
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: no home directory
        warnings.warn(f"tuned launches are not used: {error}", stacklevel=2)
        return {}


class _Entry(NamedTuple):
    """One launch in the file. What a launch means to the kernels is checked in :func:`_check_launch`."""

    kind: Kind
    problem: Mapping[str, Any]
    launch: Mapping[str, Any]


def read_tuned(path: Path) -> Tuned:
    """What :func:`write_tuned` wrote; nothing if there is no such file.

    Raises:
        ValueError: a damaged file, or one of another format.
    """
    try:
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise ValueError(f"format {shorten(content.get('format'))}, expected {FORMAT}")
        entries = content.get("launches")
        if not isinstance(entries, list):
            raise ValueError(f"launches must be a list, got {shorten(entries)}")
        return dict(_launch_of(entry, f"launches[{i}]") for i, entry in enumerate(entries))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged or of another version ({error}); delete it and tune again") from error


def _launch_of(entry: object, where: str) -> tuple[tuple[Kind, ProblemClass], Launch]:
    kind, problem, launch = build(_Entry, entry, where)
    checked = build(Launch, launch, f"{where}.launch")
    _check_launch(checked, where)
    return (kind, build(ProblemClass, problem, f"{where}.problem")), checked


def _check_launch(launch: Launch, where: str) -> None:
    """Refuse what no GPU runs."""
    sides = (*launch.tile, *launch.chunk, launch.pack, launch.num_warps)
    if any(n < 1 or n & (n - 1) for n in sides):
        raise ValueError(f"{where} has sides that are no powers of two: {shorten(launch)}")
    rows, columns = math.prod(launch.tile) * launch.pack, math.prod(launch.chunk)
    counts = (launch.num_warps, 32), (launch.stages, 8), (launch.max_registers or 255, 255)
    if max(rows, columns) > MOST_SIDES or any(not 1 <= n <= most for n, most in counts):
        raise ValueError(f"{where}: no GPU runs such a launch: {shorten(launch)}")


def write_tuned(path: Path, launches: Mapping[tuple[Kind, ProblemClass], Launch]) -> None:
    """Add launches to the file, in place of those of the same problems; the next call uses them.

    Raises:
        ValueError: what is there is damaged; it is not touched.
    """
    entries = [
        {"kind": kind, "problem": problem._asdict(), "launch": vars(launch)}
        for (kind, problem), launch in (read_tuned(path) | dict(launches)).items()
    ]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, "launches": entries}, indent=1) + "\n")
    forget()
