"""The portable kernels as variants, each the last of its direction: they support every call that the operators take."""

from __future__ import annotations

from ..host.variant import PORTABLE, Question, Variant
from . import bias_gradient, decode, dkv, dq, forward, jvp


def _jvp_gap(question: Question) -> str | None:
    """Operations take the eager path in forward mode with a bias, so that it keeps its tangent."""
    return "it takes no rpb, the bias on relative positions" if question.problem.has_bias else None


FORWARD = Variant(PORTABLE, plan=lambda q: forward.plan(q.problem, q.with_stats), run=forward.forward)
JVP = Variant(PORTABLE, supports=_jvp_gap, plan=lambda q: jvp.plan(q.problem, q.tangents), run=jvp.jvp)
QUERY_GRADIENT = Variant(
    PORTABLE, plan=lambda q: dq.query_plan(q.problem, q.grad_out, q.grad_lse), run=dq.backward_query
)
KEY_GRADIENTS = Variant(PORTABLE, plan=lambda q: dkv.key_plan(q.problem, q.grad_out), run=dkv.backward_key)
REGISTER_GRADIENTS = Variant(
    PORTABLE, plan=lambda q: dkv.register_plan(q.problem, q.grad_out), run=dkv.backward_registers
)
BIAS_GRADIENT = Variant(
    PORTABLE, plan=lambda q: bias_gradient.bias_plan(q.problem, q.grad_out), run=bias_gradient.bias_gradient
)
DECODE = Variant(PORTABLE, plan=decode.plan, run=decode.decode)
