"""Repair of the gradients of packed samples.

Kernels for compute capability 9.0 compute packed texts like one text, some of whose keys are hidden. So a tile reads
tokens of other samples than its own, and a weight of zero times their NaN is NaN. These kernels raise a flag where a
result is not finite, and then the gradient is computed once more, by the portable kernel, whose tiles read tokens of
one sample only. It is launched in any case, and does nothing if the flag is not raised.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Launcher, Plan, launcher
from ..host.problem import Cotangents, Inputs, Layout, Options, Problem, RowStatistics, layout
from ..host.tuned import remembered
from ..portable import dkv, dq

TILES: tl.constexpr = tl.constexpr(64)  # tiles of one program


@triton.jit
def repair_query_kernel(
    Nonfinite, tensors, programs, strides, axes, group, kv_heads, registers, key_length, scale, SPEC: tl.constexpr
):  # fmt: skip
    """dQ if ``Nonfinite`` is raised. The other arguments are those of ``backward_query_kernel`` and its programs."""
    if tl.load(Nonfinite) == 0:
        return
    for i_program in range(tl.program_id(0) * TILES, tl.minimum(tl.program_id(0) * TILES + TILES, programs)):
        dq.query_gradient_of_tile(
            i_program, tensors, strides, axes, group, kv_heads, registers, key_length, scale, SPEC
        )  # fmt: skip


@triton.jit
def repair_key_kernel(
    Nonfinite, tensors, programs, strides, axes, group, kv_heads, key_length, scale, SPEC: tl.constexpr
):  # fmt: skip
    """dK and dV if ``Nonfinite`` is raised. The other arguments are those of ``backward_key_kernel`` and its
    programs.
    """
    if tl.load(Nonfinite) == 0:
        return
    for i_program in range(tl.program_id(0) * TILES, tl.minimum(tl.program_id(0) * TILES + TILES, programs)):
        dkv.key_gradients_of_tile(i_program, tensors, strides, axes, group, kv_heads, key_length, scale, SPEC)


def new_flag(problem: Problem) -> Tensor | None:
    """A flag that is not raised yet, ``[1]``; None for images, packed or not, whose tiles read nothing of others."""
    if problem.packing is None or problem.packs_images:
        return None
    return torch.zeros(1, dtype=torch.int32, device=problem.device)


def repair_query(
    problem: Problem, inputs: Inputs, options: Options, cotangents: Cotangents, grad_query: Tensor,
    statistics: RowStatistics, nonfinite: Tensor,
) -> None:  # fmt: skip
    """Compute dQ and its statistics once more if ``nonfinite`` is raised, in place."""
    grad_lse = cotangents.grad_lse
    grad_lse_layout = None if grad_lse is None else layout(grad_lse[..., None])
    plan, launch = query_repair(problem, layout(cotangents.grad_out), grad_lse_layout)
    tensors = dq.query_tensors(plan, problem, inputs, cotangents, grad_query, statistics)
    launch((nonfinite, tensors), (options.scale,))


def repair_key(
    problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor, statistics: RowStatistics,
    results: tuple[Tensor, Tensor], nonfinite: Tensor,
) -> None:  # fmt: skip
    """Compute dK and dV once more if ``nonfinite`` is raised, in place."""
    plan, launch = key_repair(problem, layout(grad_out))
    tensors = dkv.key_tensors(plan, problem, inputs, grad_out, statistics, results)
    launch((nonfinite, tensors), (options.scale,))


@remembered
def query_repair(p: Problem, grad_out: Layout, grad_lse: Layout | None) -> tuple[Plan, Launcher]:
    plan = dq.query_plan(p, grad_out, grad_lse)
    return plan, guarded(repair_query_kernel, plan.launch)


@remembered
def key_repair(p: Problem, grad_out: Layout) -> tuple[Plan, Launcher]:
    plan = dkv.key_plan(p, grad_out)
    return plan, guarded(repair_key_kernel, plan.launch)


def guarded(kernel: Any, launch: Launcher) -> Launcher:
    """The launcher of a kernel that does under a condition what another does."""
    programs, *_ = launch.grid
    return launcher(kernel, (triton.cdiv(programs, TILES.value),), (programs, *launch.sizes), **launch.options)
