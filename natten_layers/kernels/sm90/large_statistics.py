"""Delta and lse of query rows by head, in the order in which the backward pass of large windows loads them."""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from ..host.launcher import Launcher, launcher
from ..host.problem import Cotangents, Layout, Problem, RowStatistics, layout, strides
from ..host.tiling import Box, head_width
from ..portable.primitives import LOG2E, load_rows
from ..portable.windows import token_offset
from . import large_tiling
from .descriptors import Boxes

PLAIN = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)


@triton.jit
def statistics_kernel(
    Out, DOut, DLse, RowMax, RowSum, Delta, Lse, LseHeadMajor, DeltaHeadMajor,
    do_strides, dl_strides, length, rows, heads, images, width, offset,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(dOut * Out) - dLse`` and the base-2 lse, both in the order of the output and in head-major
    order, ``[heads, B T H, width]``, behind ``offset`` columns.
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
    o_stat = (head * (images * length[0] * length[1]) + image_row) * width + w + offset
    tl.store(Delta + row, row_delta, mask=m_rows)
    tl.store(DeltaHeadMajor + o_stat, row_delta, mask=m_rows)
    tl.store(LseHeadMajor + o_stat, row_lse, mask=m_rows)
    tl.store(Lse + row, row_lse, mask=m_rows)


class Statistics(NamedTuple):
    """Base-2 lse and delta of every query and head in head-major order, from which TMA can load them: fp32 ``[Hq, B T,
    H, offset + W + padding]``, where ``offset`` is that of :func:`large_tiling.offset_of`.
    """

    lse: Tensor
    delta: Tensor


def statistics_boxes(head_major: Layout, columns: int, box: Box) -> Boxes:
    """The descriptor of head-major statistics: boxes of one head. TMA reads zeros beyond the ``columns``."""
    shape, strides = [*head_major.shape[:-1], columns], list(head_major.stride)
    return {"shape": shape, "strides": strides, "block_shape": [1, *box], "layout": PLAIN, "padding": "zero"}


def new_statistics(problem: Problem) -> Statistics:
    t, h, w = problem.lengths
    offset = large_tiling.offset_of(problem)
    padded = triton.cdiv(offset + w, large_tiling.ALIGNMENT) * large_tiling.ALIGNMENT
    shape = 2, problem.query.shape[-2], problem.query.shape[0] * t, h, padded
    # Columns in front of the first query belong to no query, but are loaded, and weights of NaN would be NaN.
    new = torch.zeros if offset else torch.empty
    return Statistics(*new(shape, dtype=torch.float32, device=problem.device))


def statistics_of(problem: Problem, cotangents: Cotangents) -> RowStatistics:
    """Statistics of all queries and heads in both orders."""
    out, row_max, row_sum, grad_out, grad_lse = cotangents
    statistics, delta, lse = new_statistics(problem), torch.empty_like(row_max), torch.empty_like(row_max)
    launch = prepare(
        problem, layout(grad_out), None if grad_lse is None else layout(grad_lse[..., None]), statistics.lse.shape[-1]
    )
    launch((out, grad_out, grad_lse, row_max, row_sum, delta, lse, *statistics))
    return RowStatistics(delta, lse, statistics)


def head_major_of(problem: Problem, statistics: RowStatistics) -> Statistics:
    """Statistics in head-major order, of which a copy is made if another kernel computed dQ."""
    if statistics.head_major is not None:
        return statistics.head_major
    new = new_statistics(problem)
    offset, width = large_tiling.offset_of(problem), problem.lengths[2]
    for copy, plain in ((new.lse, statistics.lse), (new.delta, statistics.delta)):
        heads_first = plain.movedim(-1, 0)
        copy[..., offset : offset + width] = heads_first.reshape(plain.shape[-1], *copy.shape[1:-1], width)
    return new


@lru_cache(maxsize=1024)
def prepare(p: Problem, grad_out: Layout, grad_lse: Layout | None, width: int) -> Launcher:
    """What all calls of a problem share."""
    rows, dim = prod(p.query.shape[:-1]), p.value.shape[-1]
    dl_strides = (0,) * 5 if grad_lse is None else strides(grad_lse)
    return launcher(
        statistics_kernel,
        (triton.cdiv(rows, 64),),
        (
            strides(grad_out), dl_strides, p.lengths, rows, p.query.shape[-2], p.query.shape[0], width,
            large_tiling.offset_of(p),
        ),
        DV=dim, BDV=head_width(dim), BM=64, WITH_DLSE=grad_lse is not None, num_warps=4,
    )  # fmt: skip
