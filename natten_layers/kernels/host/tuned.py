"""What a problem takes: tiles, and which kernel, from an override, from ``natten-layers-tune``, or by rule.

A user's call never searches. The file with what was tuned on this machine is read once, on the first launch.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from ...io.files import parse_json, read_short, replacing
from ...io.schema import build
from ...wording import shorten
from .tiling import Kind, ProblemClass, TileConfig, rule
from .variant import PORTABLE

__all__ = [
    "Tuned",
    "cache_file",
    "explicit_tile_config",
    "forget",
    "is_portable_only",
    "override",
    "override_pack",
    "read_tuned",
    "remembered",
    "tile_config_for",
    "variant_for",
    "write_tuned",
]

FORMAT = 2
MOST_SIDES = 1024
"""Most rows of a tile, or columns of a chunk, that a file may ask for. It is more than any multiprocessor holds."""

P = ParamSpec("P")
R = TypeVar("R")

Configs = Mapping[tuple[Kind, ProblemClass], TileConfig]
Variants = Mapping[tuple[Kind, ProblemClass], str]


class Tuned(NamedTuple):
    """What ``natten-layers-tune`` has found on this machine."""

    configs: Configs = MappingProxyType({})
    """Tiles of portable kernels"""
    variants: Variants = MappingProxyType({})
    """Names of the variants that are fastest"""


class Overrides(NamedTuple):
    """What :func:`override` replaces."""

    configs: Mapping[Kind, TileConfig] = MappingProxyType({})
    pack: int | None = None
    portable_only: bool = False
    variants: Mapping[Kind, str] = MappingProxyType({})
    results: dict[Any, Any] = {}  # noqa: RUF012 - that of no overrides is never used
    """What :func:`remembered` functions have returned under this override"""


NO_OVERRIDES = Overrides()
_overrides = [NO_OVERRIDES]
_forgetters: list[Callable[[], None]] = []


@contextmanager
def override(
    configs: Mapping[Kind, TileConfig] | None = None,
    *,
    pack: int | None = None,
    portable_only: bool = False,
    variants: Mapping[Kind, str] | None = None,
) -> Iterator[None]:
    """Replace what calls take by themselves, to measure: in all threads, as autograd computes gradients in its own.

    No other call may run at its beginning or end, whose choice could be kept for the wrong side of it. The latest of
    several overrides holds.

    Args:
        configs: whole tile configurations of portable kernels.
        pack: the number of heads a program; for dK and dV of medium windows of a chunk, if it can have as many.
        portable_only: take portable kernels alone, as on a device that no other kernel is for.
        variants: take the variants of these names where they support a call, whether they are expected to pay or not.

    Raises:
        ValueError: ``pack`` is no number of heads.
    """
    if pack is not None and pack < 1:
        raise ValueError(f"pack must be a number of heads, one or more, got {pack}")
    own = Overrides(configs or {}, pack, portable_only, variants or {}, {})
    _overrides.append(own)
    try:
        yield
    finally:
        # Others may have begun in another thread since, with equal contents even, so this one is found by identity.
        _overrides[:] = [each for each in _overrides if each is not own]


def tile_config_for(kind: Kind, problem: ProblemClass) -> TileConfig:
    """The tile configuration of one kernel for a problem class."""
    return explicit_tile_config(kind, problem) or rule(kind, problem, override_pack())


def explicit_tile_config(kind: Kind, problem: ProblemClass) -> TileConfig | None:
    """The tile configuration from an override or from the file of tuned ones, or None if neither has one."""
    overrides = _overrides[-1]
    if kind in overrides.configs:
        return overrides.configs[kind]
    return _tuned().configs.get((kind, problem)) if overrides.pack is None else None


def variant_for(kind: Kind, problem: ProblemClass) -> str | None:
    """The name of the variant from an override or from the file, or None if neither asks for one.

    Tiles of the portable kernel ask for that kernel.
    """
    overrides = _overrides[-1]
    if kind in overrides.variants:
        return overrides.variants[kind]
    if kind in overrides.configs:
        return PORTABLE
    if overrides.pack is not None:
        return None
    tuned = _tuned()
    return tuned.variants.get((kind, problem)) or (PORTABLE if (kind, problem) in tuned.configs else None)


def override_pack() -> int | None:
    """Number of heads a program that an override asks for, or None."""
    return _overrides[-1].pack


def is_portable_only() -> bool:
    """Whether an override asks for portable kernels alone."""
    return _overrides[-1].portable_only


def remembered(choose: Callable[P, R]) -> Callable[P, R]:
    """Cache the results of a function that depends on its arguments, :func:`tile_config_for` and :func:`variant_for`.

    They are kept until :func:`forget`, and under :func:`override` until this ends.
    """
    known = lru_cache(maxsize=1024)(choose)
    _forgetters.append(known.cache_clear)

    @wraps(choose)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        overrides = _overrides[-1]
        if overrides is NO_OVERRIDES:
            return known(*args, **kwargs)
        call = choose, args, tuple(kwargs.items())
        if call not in overrides.results:
            overrides.results[call] = choose(*args, **kwargs)
        return overrides.results[call]

    return run


def forget() -> None:
    """Make the next launch read the file of tuned configurations again."""
    _tuned.cache_clear()
    for clear in _forgetters:
        clear()


def cache_file() -> Path:
    """``configs.json`` in ``$NATTEN_LAYERS_CACHE``, or in ``natten_layers`` under the user's cache folder."""
    if own := os.environ.get("NATTEN_LAYERS_CACHE"):
        return Path(own) / "configs.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "natten_layers" / "configs.json"


@cache
def _tuned() -> Tuned:
    try:
        return read_tuned(cache_file())
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: no home directory
        warnings.warn(f"tuned tiles are not used: {error}", stacklevel=2)
        return Tuned()


class _Entry(NamedTuple):
    """One tile configuration in the file. :func:`_check_tile_config` checks whether a kernel could run it."""

    kind: Kind
    problem: Mapping[str, Any]
    config: Mapping[str, Any]


class _Choice(NamedTuple):
    """The variant that is fastest for one problem, in the file."""

    kind: Kind
    problem: Mapping[str, Any]
    variant: str


def read_tuned(path: Path) -> Tuned:
    """Read what :func:`write_tuned` wrote; nothing if there is no such file. Files of old have no variants.

    Raises:
        ValueError: the file is damaged or has another format.
    """
    try:
        written = read_short(path)
    except FileNotFoundError:
        return Tuned()
    try:
        content = parse_json(written, "it")
        if content.get("format") != FORMAT:
            raise ValueError(f"format {shorten(content.get('format'))}, expected {FORMAT}")
        configs = dict(_parse_entry(*entry) for entry in _entries("configs", content.get("configs")))
        variants = dict(_parse_choice(*entry) for entry in _entries("variants", content.get("variants", [])))
        return Tuned(configs, variants)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or of another version ({error}); delete it and tune again") from error


def _entries(name: str, part: object) -> Iterator[tuple[object, str]]:
    """The entries of a list in the file, and where each stands."""
    if not isinstance(part, list):
        raise ValueError(f"{name} must be a list, got {shorten(part)}")
    yield from ((entry, f"{name}[{i}]") for i, entry in enumerate(part))


def _parse_entry(entry: object, where: str) -> tuple[tuple[Kind, ProblemClass], TileConfig]:
    kind, problem, config = build(_Entry, entry, where)
    checked = build(TileConfig, config, f"{where}.config")
    _check_tile_config(checked, where)
    return (kind, build(ProblemClass, problem, f"{where}.problem")), checked


def _parse_choice(choice: object, where: str) -> tuple[tuple[Kind, ProblemClass], str]:
    kind, problem, variant = build(_Choice, choice, where)
    return (kind, build(ProblemClass, problem, f"{where}.problem")), variant


def _check_tile_config(config: TileConfig, where: str) -> None:
    """Raise a ValueError for a tile configuration that no GPU can run."""
    sides = (*config.tile, *config.chunk, config.pack, config.num_warps)
    if any(n < 1 or n & (n - 1) for n in sides):
        raise ValueError(f"{where} has sides that are no powers of two: {shorten(config)}")
    rows, columns = math.prod(config.tile) * config.pack, math.prod(config.chunk)
    counts = (config.num_warps, 32), (config.stages, 8), (config.maxnreg or 255, 255)
    if max(rows, columns) > MOST_SIDES or any(not 1 <= n <= most for n, most in counts):
        raise ValueError(f"{where}: no GPU runs such tiles: {shorten(config)}")


def write_tuned(path: Path, configs: Configs | None = None, variants: Variants | None = None) -> None:
    """Add tile configurations and variants to the file, replacing those of the same problems; the next call uses them.

    Raises:
        ValueError: the existing file is damaged, and is not touched.
    """
    known = read_tuned(path)
    everything: Variants = {**known.variants, **(variants or {})}
    entries = [
        {"kind": kind, "problem": problem._asdict(), "config": vars(config)}
        for (kind, problem), config in {**known.configs, **(configs or {})}.items()
    ]
    choices = [
        {"kind": kind, "problem": problem._asdict(), "variant": name} for (kind, problem), name in everything.items()
    ]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, "configs": entries, "variants": choices}, indent=1) + "\n")
    forget()
