"""NATTEN's lists of tiles for its kernels. None of these kernels is here, so all lists are empty, as NATTEN's own are
on devices that its kernels do not run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .context import warn_no_effect

Lister = Callable[..., list[Any]]


def _lister(name: str) -> Lister:
    def configs(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False) -> list[Any]:
        """No tile sizes, and one warning: NATTEN's kernels are not in this library, which chooses tiles by itself."""
        warn_no_effect(name, "it chooses tiles by itself; natten-layers-tune searches for faster ones")
        return []

    configs.__name__ = configs.__qualname__ = name
    return configs


get_configs_for_cutlass_fna = _lister("get_configs_for_cutlass_fna")
get_configs_for_cutlass_fmha = _lister("get_configs_for_cutlass_fmha")
get_configs_for_cutlass_hopper_fna = _lister("get_configs_for_cutlass_hopper_fna")
get_configs_for_cutlass_hopper_fmha = _lister("get_configs_for_cutlass_hopper_fmha")
get_configs_for_cutlass_blackwell_fna = _lister("get_configs_for_cutlass_blackwell_fna")
get_configs_for_cutlass_blackwell_fmha = _lister("get_configs_for_cutlass_blackwell_fmha")
get_configs_for_flex_fna = _lister("get_configs_for_flex_fna")
get_configs_for_flex_fmha = _lister("get_configs_for_flex_fmha")
get_bwd_configs_for_cutlass_fna = _lister("get_bwd_configs_for_cutlass_fna")
get_bwd_configs_for_cutlass_fmha = _lister("get_bwd_configs_for_cutlass_fmha")
get_bwd_configs_for_cutlass_hopper_fna = _lister("get_bwd_configs_for_cutlass_hopper_fna")
get_bwd_configs_for_cutlass_hopper_fmha = _lister("get_bwd_configs_for_cutlass_hopper_fmha")
get_bwd_configs_for_cutlass_blackwell_fna = _lister("get_bwd_configs_for_cutlass_blackwell_fna")
get_bwd_configs_for_cutlass_blackwell_fmha = _lister("get_bwd_configs_for_cutlass_blackwell_fmha")
