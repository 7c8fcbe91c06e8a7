"""What the choice of a kernel is made of: the question, the variants that may answer it, and the answer.

``dispatch`` makes the choice. The variants stand beside their kernels, in ``portable.variants`` and ``sm90.variants``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .problem import Layout, Problem
from .qk_prep import QKPrepKind

PORTABLE = "portable"
"""The name of the variants that support every call."""

Direction = Literal[
    "forward",
    "qk_prep + forward",
    "jvp",
    "forward + jvp",
    "backward_query",
    "backward_key",
    "backward_registers",
    "backward_bias",
    "decode",
]


Option = Literal["registers", "packing", "key_mask", "bias", "any scale", "periodic", "other grid"]
"""What only some kernels take."""


class Question(NamedTuple):
    """Everything that the choice of a kernel depends on."""

    problem: Problem
    with_stats: bool = False
    """Whether the caller wants ``row_max`` and ``row_sum``."""
    grad_out: Layout | None = None
    grad_lse: Layout | None = None
    prep: QKPrepKind | None = None
    tangents: tuple[Layout | None, ...] = ()
    """Layouts of :class:`Tangents`, without the sink's."""
    aligned: bool = True
    """Whether addresses are multiples of 16, as TMA needs them. They are not part of a problem."""


def option_gap(question: Question, *takes: Option) -> str | None:
    """Why a kernel that takes no options but these cannot compute a call, or None."""
    p = question.problem
    reasons: dict[Option, str | None] = {
        "registers": "it takes no additional keys" if p.registers else None,
        "packing": "it takes no packed batch" if p.packing is not None else None,
        "key_mask": "it takes no key_mask" if p.key_mask is not None else None,
        "bias": "it takes no rpb, the bias on relative positions" if p.has_bias else None,
        "any scale": "scale is not positive" if p.scale_first and not p.has_bias else None,
        "periodic": f"it takes no periodic axes, but is_periodic is {p.is_periodic}" if p.is_periodic else None,
        "other grid": "it takes no queries on another grid than keys" if p.key_lengths is not None else None,
    }
    return next((reason for option, reason in reasons.items() if reason and option not in takes), None)


@dataclass(frozen=True)
class Variant:
    """One way to compute a direction.

    ``supports``, ``pays`` and ``plan`` take a :class:`Question`, or a :class:`CacheProblem` for decode.
    """

    name: str
    plan: Callable[[Any], Any]
    """Returns tiles and whatever else a launch needs, or the reason why no tiles fit."""
    run: Callable[..., Any]
    """Launches the kernel. All variants of a direction take the same arguments, of which the plan is the first."""
    supports: Callable[[Any], str | None] = lambda question: None
    """Returns the reason why the variant cannot compute a call, or None if it can."""
    pays: Callable[[Any], str | None] = lambda question: None
    """Returns the reason why another variant is expected to be faster, or None."""
    uses_tma: bool = False
    """Whether it is a kernel for one compute capability, which reads tensors by TMA: their addresses must be multiples
    of 16 bytes, and ``override(portable_only=True)`` leaves it out."""


class PassedOver(NamedTuple):
    kernel: str
    reason: str


class Choice(NamedTuple):
    variant: Variant
    plan: Any
    passed_over: tuple[PassedOver, ...]

    @property
    def is_portable(self) -> bool:
        return self.variant.name == PORTABLE

    @property
    def settings(self) -> Mapping[str, Any]:
        """Tiles and options of the plan by name. A plan that is a problem has another choice for these."""
        if isinstance(self.plan, Problem):
            return {}
        config = getattr(self.plan, "config", self.plan)
        return config if isinstance(config, dict) else getattr(config, "_asdict", lambda: vars(config))()
