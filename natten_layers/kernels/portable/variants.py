"""The portable kernels as variants, each the last of its direction: they support every call that the operators take."""

from ..host.variant import PORTABLE, Variant
from . import backward, decode, forward, jvp

FORWARD = Variant(PORTABLE, plan=lambda q: forward.plan(q.problem, q.with_stats), run=forward.forward)
JVP = Variant(PORTABLE, plan=lambda q: jvp.plan(q.problem, q.tangents), run=jvp.jvp)
QUERY_GRADIENT = Variant(
    PORTABLE, plan=lambda q: backward.query_plan(q.problem, q.grad_out, q.grad_lse), run=backward.backward_query
)
KEY_GRADIENTS = Variant(PORTABLE, plan=lambda q: backward.key_plan(q.problem, q.grad_out), run=backward.backward_key)
REGISTER_GRADIENTS = Variant(
    PORTABLE, plan=lambda q: backward.register_plan(q.problem, q.grad_out), run=backward.backward_registers
)
DECODE = Variant(PORTABLE, plan=decode.plan, run=decode.decode)
