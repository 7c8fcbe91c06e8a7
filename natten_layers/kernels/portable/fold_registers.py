"""Attention over register tokens as a second launch, for kernels that attend to the windows only.

It continues the online softmax from the state that the first launch stored. Reading queries and output once more costs
little beside a large window; kernels for other windows fold the registers themselves.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Launcher, launcher
from ..host.problem import Inputs, Problem
from .forward import attend_registers
from .parameters import Spec, Strides, View, head_fields
from .primitives import LN2, LOG2E, load_columns, scale_rows, store_columns
from .windows import of_head, token_offset, unravel

ROWS = 64  # (token, head) pairs that a program computes


class FoldTensors(NamedTuple):
    """What the kernel reads and writes. ``out [B, T, H, W, heads, DV]`` and its softmax statistics are contiguous."""

    query: Any
    additional_keys: Any
    additional_values: Any
    out: Any
    row_max: Any
    row_sum: Any


@triton.jit
def fold_registers_kernel(
    tensors, strides, length, tokens, blocks, group, kv_heads, registers, scale, SPEC: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Fold the registers into ``out`` and its softmax statistics in place. ``tensors`` are :class:`FoldTensors`."""
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    DV: tl.constexpr = SPEC.value_dim
    Out, RowMax, RowSum = tensors.out, tensors.row_max, tensors.row_sum
    q_strides = strides.query
    i_program = tl.program_id(0)
    i_kv = (i_program // blocks % kv_heads).to(tl.int64)
    i_batch = (i_program // (blocks * kv_heads)).to(tl.int64)
    # Rows are (token, head of the group) pairs, which are neighbors in memory.
    row = i_program % blocks * BM + tl.arange(0, BM)
    m_rows = row < tokens * group
    token = (tl.minimum(row // group, tokens - 1)).to(tl.int64)
    i_head = i_kv * group + row % group
    o_q = i_batch * q_strides[0] + i_head * q_strides[4] + token_offset(unravel(token, length[1], length[2]), q_strides)
    o_row = (i_batch * tokens + token) * (kv_heads * group) + i_head
    b_q = load_columns(tensors.query, o_q, m_rows, SPEC.head_dim, BD)  # [M, D]
    row_m = tl.load(RowMax + o_row, mask=m_rows, other=0.0) * LOG2E
    row_l = tl.load(RowSum + o_row, mask=m_rows, other=1.0)
    b_acc = scale_rows(load_columns(Out, o_row * DV, m_rows, DV, BDV), row_l)
    # Scores are always scaled before the maximum is taken. With so few keys that costs nothing, and it makes a second
    # pass for very large scores unnecessary.
    keys = of_head(View(tensors.additional_keys, strides.additional_keys), i_batch, i_kv)
    values = of_head(View(tensors.additional_values, strides.additional_values), i_batch, i_kv)
    b_acc, row_m, row_l = attend_registers(b_q, b_acc, row_m, row_l, keys, values, registers, 1.0, scale * LOG2E, SPEC)
    store_columns(Out, o_row * DV, m_rows, scale_rows(b_acc, 1.0 / row_l), DV, BDV)
    tl.store(RowMax + o_row, row_m * LN2, mask=m_rows)
    tl.store(RowSum + o_row, row_l, mask=m_rows)


def fold_registers(
    problem: Problem, inputs: Inputs, scale: float, out: Tensor, row_max: Tensor, row_sum: Tensor
) -> None:
    """Fold the registers into the results of attention over windows and sink, in place."""
    launch = fold_launcher(problem)
    tensors = FoldTensors(inputs.query, inputs.additional_keys, inputs.additional_values, out, row_max, row_sum)
    launch((tensors,), (scale,))


@lru_cache(maxsize=1024)
def fold_launcher(p: Problem) -> Launcher:
    q_strides, _, _, *register_strides = p.input_strides()
    tokens = prod(p.lengths)
    blocks = triton.cdiv(tokens * p.group, ROWS)
    spec = Spec(**head_fields(p), register_tile=p.register_tile)._replace(scale_first=True)
    return launcher(
        fold_registers_kernel,
        (p.query.shape[0] * p.kv_heads * blocks,),
        (
            Strides(q_strides, None, None, *register_strides),
            p.lengths, tokens, blocks, p.group, p.kv_heads, p.registers,
        ),
        SPEC=spec, BM=ROWS, num_warps=4,
    )  # fmt: skip
