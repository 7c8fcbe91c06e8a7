"""The choice of kernels, which is made in this module only.

Each direction of a call has an ordered list of variants, ``VARIANTS``. The first variant that supports the call, pays
off and has a plan for it computes it. The last one is the portable kernel, which supports every call of an operator.
What a variant supports and when it pays stands beside its kernels, in ``portable.variants``, ``portable.pair_variants``
and ``sm90.variants``.

Importing this module imports the kernels, and so Triton; operators import it on their first launch (``ops.define``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .host.cache_problem import CacheInputs, CacheOptions, CacheProblem, cache_problem_of
from .host.problem import (
    Cotangents,
    Inputs,
    Options,
    Problem,
    SavedResults,
    Tangents,
    contiguous,
    layout,
)
from .host.qk_prep import QKPrep, QKPrepKind
from .host.tiling import Kind
from .host.tuned import is_portable_only, override_pack, remembered, variant_for
from .host.variant import Choice, Direction, PassedOver, Question, Variant
from .portable import pair_variants as pairs
from .portable import qk_prep
from .portable import variants as portable
from .sm90 import variants as sm90


@remembered
def choose(direction: Direction, question: Question | CacheProblem) -> Choice:
    """The variant that computes a call, with the reasons why those before it in the list do not."""
    return _asked_for(direction, question) or _first_that_pays(direction, question)


def _asked_for(direction: Direction, question: Question | CacheProblem) -> Choice | None:
    """The variant that an override or tuning asks for, or None if neither does or it cannot compute the call.

    Directions that are not tuned by themselves follow another one (``TUNED_AS``), if they have a variant of that name.
    A variant that makes two launches is kept whatever kernel is tuned for one of them.
    """
    tuned_as = TUNED_AS.get(direction)
    if tuned_as is None or not isinstance(question, Question) or is_portable_only():
        return None
    variants = list(VARIANTS[direction])
    name = variant_for(tuned_as, question.problem.problem_class)
    if name not in [variant.name for variant in VARIANTS[tuned_as]]:
        return None
    variant = next((variant for variant in variants if variant.name in (name, *IN_TWO_LAUNCHES)), None)
    if variant is None or _left_out(variant, direction, question):
        return None
    plan = plan_of(variant, question)
    reason = f"tuning or an override asks for {name}"
    passed = [PassedOver(other.name, reason) for other in variants[: variants.index(variant)]]
    return None if isinstance(plan, str) else Choice(variant, plan, tuple(passed))


def plan_of(variant: Variant, question: Question | CacheProblem) -> Any:
    """The plan of a variant for a call, or the reason why it cannot compute it, fast or not."""
    reason = variant.supports(question)
    return variant.plan(question) if reason is None else reason


def _first_that_pays(direction: Direction, question: Question | CacheProblem) -> Choice:
    passed: list[PassedOver] = []
    for variant in VARIANTS[direction]:
        reason = _left_out(variant, direction, question) or variant.supports(question) or variant.pays(question)
        if reason is None:
            plan = variant.plan(question)
            if not isinstance(plan, str):
                return Choice(variant, plan, tuple(passed))
            reason = plan
        passed.append(PassedOver(variant.name, reason))
    raise AssertionError(f"no kernel computes {question}")


def _left_out(variant: Variant, direction: Direction, question: Question | CacheProblem) -> str | None:
    """Why an override leaves a variant out, or None. Kernels that use TMA are those for one compute capability."""
    if not variant.uses_tma:
        return None
    return "an override asks for portable kernels alone" if is_portable_only() else _pack_gap(direction, question)


def _pack_gap(direction: Direction, question: Question | CacheProblem) -> str | None:
    """Why no kernel that uses TMA has as many heads a program as an override asks for, or None."""
    pack = override_pack()
    # Programs of gradients of keys compute all heads that share them.
    if not pack or not isinstance(question, Question) or TUNED_AS.get(direction) == "backward_key":
        return None
    group = question.problem.group
    if group % pack:
        return f"an override asks for {pack} heads a program, which do not divide the group of {group}"
    if pack & (pack - 1):
        return f"an override asks for {pack} heads a program, which are no power of two"
    return None


class BackwardChoices(NamedTuple):
    query: Choice
    key: Choice
    registers: Choice | None
    bias: Choice | None
    uses_tma: bool


@remembered
def choose_backward(question: Question) -> BackwardChoices:
    query, key = choose("backward_query", question), choose("backward_key", question)
    registers = choose("backward_registers", question) if question.problem.registers else None
    bias = choose("backward_bias", question) if question.problem.has_bias else None
    uses_tma = any(choice.variant.uses_tma for choice in (query, key, registers, bias) if choice is not None)
    return BackwardChoices(query, key, registers, bias, uses_tma)


def choices(
    problem: Problem,
    inputs: Inputs,
    *,
    with_stats: bool,
    with_gradients: bool,
    with_tangents: bool = False,
    in_one_launch: bool = False,
) -> dict[Direction, Choice]:
    """The choice for each direction of a call.

    The gradient of the output is assumed to be contiguous, and so are the tangents, which all inputs have.
    """
    with_stats = with_stats or with_gradients or with_tangents
    question = Question(problem, with_stats, aligned=are_aligned(*inputs.addressed))
    found: dict[Direction, Choice] = {"forward": choose("forward", question)}
    if with_tangents:
        tangents = tuple(None if x is None else contiguous(x.shape) for x in inputs.addressed)
        moving = question._replace(tangents=tangents)
        together = choose("forward + jvp", moving) if in_one_launch else None
        if together is not None and together.variant is not FORWARD_THEN_JVP:
            return {"forward + jvp": together}
        found["jvp"] = choose("jvp", moving)
    if with_gradients:
        out = contiguous((*problem.query.shape[:-1], problem.value.shape[-1]))
        query, key, registers, bias, _ = choose_backward(question._replace(grad_out=out))
        found |= {"backward_query": query, "backward_key": key}
        found |= {} if registers is None else {"backward_registers": registers}
        found |= {} if bias is None else {"backward_bias": bias}
    return found


def choices_with_qk_prep(problem: Problem, inputs: Inputs, prep: QKPrepKind) -> dict[Direction, Choice]:
    """The choice for :func:`prepare_and_attend`, and that for the attention after a preparation of its own launch."""
    choice = choose("qk_prep + forward", Question(problem, prep=prep, aligned=are_aligned(*inputs.addressed)))
    found: dict[Direction, Choice] = {"qk_prep + forward": choice}
    if choice.variant is PREPARE_THEN_ATTEND:
        aligned = are_aligned(inputs.value, inputs.additional_keys, inputs.additional_values)
        found["forward"] = choose("forward", Question(choice.plan, aligned=aligned))
    return found


# --- Functions that the operators call


def forward(
    problem: Problem, inputs: Inputs, options: Options, with_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``out [B, *spatial, Hq, Dv]`` and, if ``with_stats``, ``row_max`` and ``row_sum [B, *spatial, Hq]`` in fp32."""
    question = Question(problem, with_stats)
    variant, plan, _ = choose("forward", question)
    if variant.uses_tma and not are_aligned(*inputs.addressed):
        variant, plan, _ = choose("forward", question._replace(aligned=False))
    return variant.run(plan, problem, inputs, options, with_stats)


def prepare_and_attend(problem: Problem, inputs: Inputs, options: Options, prep: QKPrep) -> Tensor:
    """``out`` of attention over queries and keys that are normalised and rotated first."""
    question = Question(problem, prep=prep.kind)
    variant, plan, _ = choose("qk_prep + forward", question)
    if variant.uses_tma and not are_aligned(*inputs.addressed):
        variant, plan, _ = choose("qk_prep + forward", question._replace(aligned=False))
    return variant.run(plan, problem, inputs, options, prep)


def jvp(
    problem: Problem, inputs: Inputs, options: Options, saved: SavedResults, tangents: Tangents
) -> tuple[Tensor, Tensor]:
    """Tangents of ``out [B, *spatial, Hq, Dv]`` and, in fp32, of the log-sum-exp ``[B, *spatial, Hq]``."""
    variant, plan, _ = _choose_for_tangents("jvp", problem, inputs, tangents)
    return variant.run(plan, problem, inputs, options, saved, tangents)


def forward_with_tangents(
    problem: Problem, inputs: Inputs, options: Options, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`forward` returns with statistics, and then what :func:`jvp` returns."""
    variant, plan, _ = _choose_for_tangents("forward + jvp", problem, inputs, tangents)
    return variant.run(plan, problem, inputs, options, tangents)


def _choose_for_tangents(direction: Direction, problem: Problem, inputs: Inputs, tangents: Tangents) -> Choice:
    layouts = tuple(None if x is None else layout(x) for x in tangents.addressed)
    question = Question(problem, True, tangents=layouts)
    choice = choose(direction, question)
    if choice.variant.uses_tma and not are_aligned(*inputs.addressed, *tangents.addressed):
        choice = choose(direction, question._replace(aligned=False))
    return choice


def backward(
    problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """dQ, dK, dV, gradients of the registers and of the bias, and delta ``[B, *spatial, Hq]`` in fp32.

    Allocates the gradients, delta and the base-2 log-sum-exp, which both may exist in a second, head-major order for
    large windows. For partial sums it also allocates ``slices`` fp32 copies of registers' gradients, under 1 MiB for
    usual sizes, and with a bias 4 to 50 MiB, more for many heads and chunks of keys. Kernels of fp16 pairs allocate
    copies of two of their inputs at a time.
    """
    grad_out, grad_lse = cotangents.grad_out, cotangents.grad_lse
    question = Question(problem, True, layout(grad_out), None if grad_lse is None else layout(grad_lse[..., None]))
    choices = choose_backward(question)
    if choices.uses_tma and not are_aligned(*inputs.addressed, grad_out):
        choices = choose_backward(question._replace(aligned=False))
    query, key, registers, bias, _ = choices
    grad_query, statistics = query.variant.run(query.plan, problem, inputs, options, cotangents)
    arguments = problem, inputs, options, grad_out, statistics
    grad_key, grad_value = key.variant.run(key.plan, *arguments)
    grad_keys = grad_values = None
    if registers is not None:
        grad_keys, grad_values = registers.variant.run(registers.plan, *arguments)
    grad_bias = None if bias is None else bias.variant.run(bias.plan, *arguments)
    return grad_query, grad_key, grad_value, grad_keys, grad_values, grad_bias, statistics.delta


def decode(inputs: CacheInputs, options: CacheOptions, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """``out [B, Lq, Hq, Dv]`` and, if ``with_lse``, the log-sum-exp ``[B, Lq, Hq]`` in fp32."""
    variant, plan, _ = choose("decode", cache_problem_of(inputs, options))
    return variant.run(plan, inputs, options, with_lse)


def are_aligned(*tensors: Tensor | None) -> bool:
    """Whether the tensors' addresses are multiples of 16 bytes, as TMA needs them."""
    for x in tensors:  # noqa: SIM110 - all() over a generator would take twice as long, in every call
        if x is not None and x.data_ptr() % 16:
            return False
    return True


# --- Preparation of queries and keys in a launch of its own, before attention


def _prepared(question: Question) -> Problem:
    """The attention problem over normalised and rotated queries and keys, which are new contiguous tensors."""
    p = question.problem
    return p._replace(query=contiguous(p.query.shape), key=contiguous(p.key.shape))


def _prepare_then_attend(prepared: Problem, problem: Problem, inputs: Inputs, options: Options, prep: QKPrep) -> Tensor:
    query, key = qk_prep.qk_prep(inputs.query, inputs.key, prep)
    return forward(prepared, inputs._replace(query=query, key=key), options, False)[0]


PREPARE_THEN_ATTEND = Variant("qk_prep, then forward", plan=_prepared, run=_prepare_then_attend)

# --- Tangents in a launch of their own, after attention


def _forward_then_jvp(
    same: Problem, problem: Problem, inputs: Inputs, options: Options, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del same
    out, row_max, row_sum = forward(problem, inputs, options, True)
    assert row_max is not None
    assert row_sum is not None
    saved = SavedResults(out, row_max, row_sum)
    return out, row_max, row_sum, *jvp(problem, inputs, options, saved, tangents)


FORWARD_THEN_JVP = Variant("forward, then jvp", plan=lambda question: question.problem, run=_forward_then_jvp)
IN_TWO_LAUNCHES = PREPARE_THEN_ATTEND.name, FORWARD_THEN_JVP.name
"""Variants that go with every kernel of the launch that is tuned"""

# --- The variants of each direction, in the order in which they are considered

VARIANTS: Mapping[Direction, Sequence[Variant]] = {
    "forward": (
        sm90.ROLLING_FORWARD,
        sm90.TILES_FORWARD,
        sm90.MEDIUM_FORWARD,
        sm90.LARGE_FORWARD,
        sm90.MEDIUM_PAIR_FORWARD,
        pairs.FORWARD,
        portable.FORWARD,
    ),
    "qk_prep + forward": (sm90.ROLLING_PREP_FORWARD, PREPARE_THEN_ATTEND),
    "jvp": (sm90.MEDIUM_JVP, portable.JVP),
    "forward + jvp": (sm90.MEDIUM_FORWARD_JVP, FORWARD_THEN_JVP),
    "backward_query": (
        sm90.TILES_QUERY_GRADIENT,
        sm90.MEDIUM_QUERY_GRADIENT,
        sm90.LARGE_QUERY_GRADIENT,
        sm90.MEDIUM_PAIR_QUERY_GRADIENT,
        pairs.QUERY_GRADIENT,
        portable.QUERY_GRADIENT,
    ),
    "backward_key": (
        sm90.TILES_KEY_GRADIENTS,
        sm90.MEDIUM_KEY_GRADIENTS,
        sm90.LARGE_KEY_GRADIENTS,
        sm90.MEDIUM_PAIR_KEY_GRADIENTS,
        pairs.KEY_GRADIENTS,
        portable.KEY_GRADIENTS,
    ),
    "backward_registers": (sm90.LARGE_REGISTER_GRADIENTS, portable.REGISTER_GRADIENTS),
    "backward_bias": (sm90.MEDIUM_BIAS_GRADIENT, portable.BIAS_GRADIENT),
    "decode": (portable.DECODE,),
}

TUNED_AS: Mapping[Direction, Kind] = {
    "forward": "forward",
    "qk_prep + forward": "forward",
    "jvp": "jvp",
    "forward + jvp": "jvp",
    "backward_query": "backward_query",
    "backward_key": "backward_key",
    "backward_registers": "backward_key",
    "backward_bias": "backward_key",
}
"""The direction whose tuning decides; others have one variant."""
