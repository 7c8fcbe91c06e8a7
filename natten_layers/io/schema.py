"""Validation of configs: known keys, and values of the types that the fields of a class declare.

Types are the annotations of a dataclass, a named tuple or a ``TypedDict``, with bounds written as
``Annotated[int, Between(1, 9)]``. Every error is a ValueError that names the key, the value and what is expected.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..wording import shorten

__all__ = [
    "MOST_LAYERS",
    "Between",
    "Count",
    "Decay",
    "Layers",
    "Natural",
    "NotNegative",
    "Positive",
    "Rate",
    "build",
    "check_keys",
    "check_mapping",
    "check_types",
]

T = TypeVar("T")

SCALARS: dict[type, str] = {int: "an int", float: "a finite number", bool: "true or false", str: "a string"}


@dataclass(frozen=True)
class Between:
    """Bounds of a number, both inclusive; with ``open`` the lower bound is exclusive, with ``below`` the upper one."""

    least: float
    most: float = math.inf
    open: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        return (self.least < value if self.open else self.least <= value) and not self._exceeds(value)

    def _exceeds(self, value: float) -> bool:
        return value >= self.most if self.below else value > self.most

    def describe(self, value: object) -> str:
        """The bound that ``value`` violates, or the lower bound if it is within both."""
        if isinstance(value, int | float) and self._exceeds(value):
            return f"{'below' if self.below else 'of at most'} {self.most}"
        return f"{'above' if self.open else 'of at least'} {self.least}"


# For sizes of tensors. The upper bound is the largest int32, within which sizes on a GPU must stay.
Count = Annotated[int, Between(1, 2**31 - 1)]
Natural = Annotated[int, Between(0, 2**31 - 1)]
MOST_LAYERS = 2**12
"""Most layers of a model. Building one takes a millisecond, so without a bound a config could keep a program busy."""
Layers = Annotated[int, Between(1, MOST_LAYERS)]
Rate = Annotated[float, Between(0, 1)]
Decay = Annotated[float, Between(0, 1, below=True)]
"""What is left of an average in a step: with 1, nothing new would ever count."""
Positive = Annotated[float, Between(0, open=True)]
NotNegative = Annotated[float, Between(0)]


def check_keys(found: Collection[object], known: Collection[str], where: str) -> None:
    """Raise for unknown keys, since a misspelt option would otherwise be ignored silently.

    Raises:
        ValueError: some keys are unknown; the message names them, each with the known key that it resembles most.
    """
    unknown = [key for key in found if key not in known]
    if not unknown:
        return
    hints = []
    for key in unknown[:5]:
        near = difflib.get_close_matches(str(key), known, n=1)
        hints.append(f"{shorten(key)} (did you mean {near[0]!r}?)" if near else shorten(key))
    rest = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise ValueError(
        f"{where} has unknown keys {', '.join(hints)}{rest}; known are {', '.join(sorted(known)) or 'none'}"
    )


@lru_cache(maxsize=64)
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


def check_types(config: object) -> None:
    """Check every field of a dataclass's instance against its annotation; lists become tuples where these are declared.

    Called from ``__post_init__``, it holds for configs from files and from Python alike.

    Raises:
        ValueError: a value has another type or is out of bounds; the message names the field.
    """
    for name, hint in _hints(type(config)).items():
        object.__setattr__(config, name, _conform(getattr(config, name), hint, name))


def check_mapping(found: object, kind: type, where: str, *, closed: bool = True) -> dict[str, Any]:
    """A dictionary of the items of ``found``, whose values are checked against the annotations of ``kind``.

    Args:
        found: the mapping.
        kind: a class with annotations.
        where: how error messages name the mapping.
        closed: whether keys without an annotation in ``kind`` are an error. Otherwise they are kept unchecked.

    Raises:
        ValueError: ``found`` is not a mapping, a key is unknown, or a value has another type or is out of bounds.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} must be an object, got {shorten(found)}")
    hints = _hints(kind)
    if closed:
        check_keys(found, hints.keys(), where)
    return {
        key: _conform(value, hints[key], f'{where}["{key}"]') if key in hints else value for key, value in found.items()
    }


def build(kind: type[T], found: object, where: str) -> T:
    """Make an instance of a dataclass or named tuple from a mapping, which may leave out fields with defaults.

    Raises:
        ValueError: a key is missing or unknown, or a value has another type or is out of bounds.
    """
    checked = check_mapping(found, kind, where)
    if missing := [name for name in _required(kind) if name not in checked]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return kind(**checked)


def _required(kind: type) -> list[str]:
    if is_dataclass(kind):
        return [f.name for f in fields(kind) if f.init and f.default is MISSING and f.default_factory is MISSING]
    return [name for name in _hints(kind) if name not in getattr(kind, "_field_defaults", {})]


def _conform(value: Any, hint: Any, where: str) -> Any:
    """Check ``value`` against an annotation and return it, with lists converted to tuples where these are declared."""
    for alternative in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        fits, conformed = _match(value, alternative, where)
        if fits:
            return conformed
    raise ValueError(f"{where} must be {_describe(hint, value)}, got {shorten(value)}")


def _match(value: Any, hint: Any, where: str) -> tuple[bool, Any]:
    """Whether ``value`` matches a type that is not a union, and the converted value.

    A wrong value inside a container raises at once.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True, value
    if hint is None or hint is type(None):
        return value is None, value
    if origin is Annotated:
        fits, value = _match(value, arguments[0], where)
        return fits and all(bound.holds(value) for bound in arguments[1:]), value
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments), value
    if hint is float:
        # A large int is not converted to float to test it, because that overflows.
        return (type(value) is int and abs(value) < 2**63) or (isinstance(value, float) and math.isfinite(value)), value
    if hint in SCALARS:
        return type(value) is hint, value
    if origin is tuple or origin is Sequence:
        return _match_sequence(value, arguments, where)
    if is_typeddict(hint):
        return isinstance(value, Mapping), check_mapping(value, hint, where) if isinstance(value, Mapping) else value
    if isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        if not isinstance(value, Mapping):
            return False, value
        key, of = arguments or (Any, Any)
        return True, {
            _conform(k, key, f"a key of {where}"): _conform(v, of, f'{where}["{k}"]') for k, v in value.items()
        }
    assert isinstance(hint, type), f"{where}: no rule for the annotation {hint}"
    return isinstance(value, hint), value


def _match_sequence(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, value
    if len(arguments) == 1 or arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        return False, value
    return True, tuple(
        _conform(one, hint, f"{where}[{i}]") for i, (one, hint) in enumerate(zip(value, arguments, strict=True))
    )


def _describe(hint: Any, value: object) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(one, value) for one in arguments)
    if hint is None or hint is type(None):
        return "null"
    if origin is Annotated:
        return " ".join([_describe(arguments[0], value), *(bound.describe(value) for bound in arguments[1:])])
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (tuple, Sequence):
        number = "" if len(arguments) == 1 or arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"a list{number}, each entry {_describe(arguments[0], None)}"
    if is_typeddict(hint) or (isinstance(origin or hint, type) and issubclass(origin or hint, Mapping)):
        return "an object"
    return SCALARS.get(hint) or str(getattr(hint, "__name__", hint))
