"""NATTEN's switches. Their getters say what was set; what a switch cannot change here it says once.

They take bools alone, as the operations do: the text "false" of a config would count as true.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from functools import cache

from ..checks import check_flags

__all__ = [
    "MemoryUsagePreference",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "get_memory_usage_preference",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
    "warn_no_effect",
]


class MemoryUsagePreference(Enum):
    Default = "default"
    Strict = "strict"
    Unrestricted = "unrestricted"


@dataclass
class _Switches:
    deterministic: bool = False
    kv_parallelism: bool = True
    memory_usage: MemoryUsagePreference = MemoryUsagePreference.Default
    flex_compile: bool = False
    flex_compile_backprop: bool = False


_switches = _Switches()


@cache
def warn_no_effect(name: str, why: str) -> None:
    """Once in a process: programs call some of these in every step."""
    warnings.warn(f"{name} has no effect in natten_layers: {why}", stacklevel=3)


_NO_ATOMICS = "its backward pass adds in a fixed order and needs no memory for partial sums"
_NO_FLEX = "it does not use FlexAttention"


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Accepted in silence: gradients have the same bits in every run, whatever the mode."""
    check_flags(mode=mode)
    _switches.deterministic = mode


def are_deterministic_algorithms_enabled() -> bool:
    """What :func:`use_deterministic_algorithms` was last given; False at first, as in NATTEN."""
    return _switches.deterministic


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Accepted, without effect but one warning."""
    check_flags(mode=mode)
    warn_no_effect("use_kv_parallelism_in_fused_na", _NO_ATOMICS)
    _switches.kv_parallelism = mode


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """What :func:`use_kv_parallelism_in_fused_na` was last given; True at first, as in NATTEN."""
    return _switches.kv_parallelism


def set_memory_usage_preference(pref: str = "default") -> None:
    """Accepted, without effect but one warning.

    Raises:
        ValueError: something else than "default", "strict" or "unrestricted".
    """
    known = [preference.value for preference in MemoryUsagePreference]
    if pref not in known:
        raise ValueError(f"pref must be one of {known}, got {pref!r}")
    warn_no_effect("set_memory_usage_preference", _NO_ATOMICS)
    _switches.memory_usage = MemoryUsagePreference(pref)


def get_memory_usage_preference() -> MemoryUsagePreference:
    """What :func:`set_memory_usage_preference` was last given."""
    return _switches.memory_usage


def is_memory_usage_default() -> bool:
    """Whether :func:`set_memory_usage_preference` was last given "default", as at first."""
    return _switches.memory_usage is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    """Whether :func:`set_memory_usage_preference` was last given "strict"."""
    return _switches.memory_usage is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    """Whether :func:`set_memory_usage_preference` was last given "unrestricted"."""
    return _switches.memory_usage is MemoryUsagePreference.Unrestricted


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Accepted, without effect but one warning."""
    check_flags(mode=mode, backprop=backprop)
    warn_no_effect("allow_flex_compile", _NO_FLEX)
    _switches.flex_compile, _switches.flex_compile_backprop = mode, mode and backprop


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """Accepted, without effect but one warning. Holds only where :func:`allow_flex_compile` allows the forward pass."""
    check_flags(mode=mode)
    allow_flex_compile(_switches.flex_compile, mode)


def disable_flex_compile() -> None:
    """Accepted in silence: FlexAttention is not used."""
    _switches.flex_compile = _switches.flex_compile_backprop = False


def disable_flex_compile_backprop() -> None:
    """Accepted in silence: FlexAttention is not used."""
    _switches.flex_compile_backprop = False


def is_flex_compile_allowed() -> bool:
    """What :func:`allow_flex_compile` was last given; False at first, as in NATTEN."""
    return _switches.flex_compile


def is_flex_compile_backprop_allowed() -> bool:
    """What :func:`allow_flex_compile` was last given for the backward pass; False at first, as in NATTEN."""
    return _switches.flex_compile_backprop
