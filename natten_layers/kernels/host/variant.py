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
    "backward_query",
    "backward_key",
    "backward_registers",
    "backward_bias",
    "decode",
]


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
        """Tiles and options of the plan by name."""
        config = getattr(self.plan, "config", self.plan)
        return config if isinstance(config, dict) else getattr(config, "_asdict", lambda: vars(config))()
