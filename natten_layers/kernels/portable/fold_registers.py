"""Attention over register tokens as a second launch, for kernels that attend to the windows only.

It continues the online softmax from the state that the first launch stored. Reading queries and output once more costs
little beside a large window; kernels for other windows fold the registers themselves.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from functools import lru_cache
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Launcher, launcher
from ..host.problem import Inputs, Problem
from .forward import attend_registers
from .primitives import LN2, LOG2E, load_columns, scale_rows, store_columns
from .windows import token_offset, unravel

ROWS = 64  # (token, head) pairs that a program computes


@triton.jit
def fold_registers_kernel(
    Q, RegK, RegV, Out, RowMax, RowSum,
    q_strides, regk_strides, regv_strides, length, tokens, blocks, group, kv_heads, registers, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the registers into ``Out [B, T, H, W, heads, DV]`` and its softmax statistics in place; all contiguous."""
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
    b_q = load_columns(Q, o_q, m_rows, D, BD)  # [M, D]
    row_m = tl.load(RowMax + o_row, mask=m_rows, other=0.0) * LOG2E
    row_l = tl.load(RowSum + o_row, mask=m_rows, other=1.0)
    b_acc = scale_rows(load_columns(Out, o_row * DV, m_rows, DV, BDV), row_l)
    # Scores are always scaled before the maximum is taken. With so few keys that costs nothing, and it makes a second
    # pass for very large scores unnecessary.
    b_acc, row_m, row_l = attend_registers(
        b_q, b_acc, row_m, row_l, RegK + i_batch * regk_strides[0] + i_kv * regk_strides[2],
        RegV + i_batch * regv_strides[0] + i_kv * regv_strides[2], regk_strides, regv_strides, registers, 1.0,
        scale * LOG2E, BR, D, BD, DV, BDV, False, True, PRECISION,
    )  # fmt: skip
    store_columns(Out, o_row * DV, m_rows, scale_rows(b_acc, 1.0 / row_l), DV, BDV)
    tl.store(RowMax + o_row, row_m * LN2, mask=m_rows)
    tl.store(RowSum + o_row, row_l, mask=m_rows)


def fold_registers(
    problem: Problem, inputs: Inputs, scale: float, out: Tensor, row_max: Tensor, row_sum: Tensor
) -> None:
    """Fold the registers into the results of attention over windows and sink, in place."""
    launch = fold_launcher(problem)
    launch((inputs.query, inputs.additional_keys, inputs.additional_values, out, row_max, row_sum), (scale,))


@lru_cache(maxsize=1024)
def fold_launcher(p: Problem) -> Launcher:
    q_strides, _, _, *register_strides = p.input_strides()
    tokens = prod(p.lengths)
    blocks = triton.cdiv(tokens * p.group, ROWS)
    constants = p.constants()
    del constants["SCALE_FIRST"]
    return launcher(
        fold_registers_kernel,
        (p.query.shape[0] * p.kv_heads * blocks,),
        (q_strides, *register_strides, p.lengths, tokens, blocks, p.group, p.kv_heads, p.registers),
        **constants, BR=p.register_tile, BM=ROWS, num_warps=4,
    )  # fmt: skip
