"""Delta and lse of query rows by head, in the order in which the backward pass of large windows loads them."""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..host.launcher import TRITON_OPTIONS
from ..host.problem import Cotangents, Problem, layout, strides
from ..host.tiling import Box, head_width
from ..portable.primitives import LOG2E, load_rows
from ..portable.windows import token_offset
from . import large_tiling

PLAIN = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)


@triton.jit
def statistics_kernel(
    Out, DOut, DLse, RowMax, RowSum, Delta, Lse, DeltaHeadMajor,
    do_strides, dl_strides, length, rows, heads, images, width,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(dOut * Out) - dLse`` in the order of the output, and delta and the base-2 lse in head-major
    order, ``[heads, B T H, W]``.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_rows = row < rows
    head, token = row % heads, row // heads
    w, image_row = token % length[2], token // length[2]
    h, t, i_batch = image_row % length[1], image_row // length[1] % length[0], image_row // (length[1] * length[0])
    o_do = i_batch * do_strides[0] + token_offset((t, h, w), do_strides) + head * do_strides[4]
    b_out, b_do = load_rows(Out, row * DV, m_rows, DV, BDV), load_rows(DOut, o_do, m_rows, DV, BDV)
    row_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    if WITH_DLSE:
        o_dl = i_batch * dl_strides[0] + token_offset((t, h, w), dl_strides) + head * dl_strides[4]
        row_delta -= tl.load(DLse + o_dl, mask=m_rows, other=0.0)
    row_lse = tl.load(RowMax + row, mask=m_rows, other=0.0) * LOG2E
    row_lse += tl.log2(tl.load(RowSum + row, mask=m_rows, other=1.0))
    o_stat = (head * (images * length[0] * length[1]) + image_row) * width + w
    tl.store(Delta + row, row_delta, mask=m_rows)
    tl.store(DeltaHeadMajor + o_stat, row_delta, mask=m_rows)
    tl.store(Lse + o_stat, row_lse, mask=m_rows)


class Statistics(NamedTuple):
    """Base-2 lse and delta of every query and head in head-major order, from which TMA can load them: fp32 ``[Hq, B T,
    H, W + padding]``.
    """

    lse: Tensor
    delta: Tensor


def statistics_descriptor(head_major: Tensor, width: int, box: Box) -> TensorDescriptor:
    """The descriptor of head-major statistics: boxes of one head. TMA reads zeros outside of the image."""
    return TensorDescriptor(head_major, [*head_major.shape[:-1], width], list(head_major.stride()), [1, *box], PLAIN)


def new_statistics(problem: Problem) -> Statistics:
    t, h, w = problem.lengths
    padded = triton.cdiv(w, large_tiling.ALIGNMENT) * large_tiling.ALIGNMENT
    shape = 2, problem.query.shape[-2], problem.query.shape[0] * t, h, padded
    return Statistics(*torch.empty(shape, dtype=torch.float32, device=problem.device))


def to_head_major(problem: Problem, lse: Tensor, delta: Tensor) -> Statistics:
    """Statistics in head-major order from those that another query kernel wrote, ``[B, *spatial, Hq]``."""
    statistics, width = new_statistics(problem), problem.lengths[2]
    for head_major, rows in zip(statistics, (lse, delta), strict=True):
        heads = rows.shape[-1]
        head_major[..., :width] = rows.reshape(-1, heads).t().view(heads, *head_major.shape[1:-1], width)
    return statistics


def statistics_of(problem: Problem, cotangents: Cotangents) -> tuple[Statistics, Tensor]:
    """Statistics in head-major order, and delta ``[B, *spatial, Hq]``."""
    out, row_max, row_sum, grad_out, grad_lse = cotangents
    statistics, delta = new_statistics(problem), torch.empty_like(row_max)
    dl_strides = (0,) * 5 if grad_lse is None else strides(layout(grad_lse[..., None]))
    rows = row_max.numel()
    statistics_kernel[(triton.cdiv(rows, 64),)](
        out, grad_out, grad_lse, row_max, row_sum, delta, statistics.lse, statistics.delta,
        strides(layout(grad_out)), dl_strides, problem.lengths, rows, row_max.shape[-1], row_max.shape[0],
        statistics.lse.shape[-1],
        DV=out.shape[-1], BDV=head_width(out.shape[-1]), BM=64, WITH_DLSE=grad_lse is not None,
        **TRITON_OPTIONS, num_warps=4,
    )  # fmt: skip
    return statistics, delta
