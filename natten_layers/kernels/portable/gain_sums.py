"""Gradients of gains: the sums of the rows that the programs of ``qk_prep_backward_kernel`` have written.

Rows of queries and of keys are added in the same two launches: first in chunks, each by a program, then the sums of
the chunks. The order depends on shapes alone, so gradients are reproducible.
"""

# A call of one jit function from another is typed as a call from the host, which never returns.
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import launcher
from ..host.tiling import next_power_of_2

CHUNKS = 128
"""Programs of the first launch for each side, of which each adds up one chunk of rows."""
ELEMENTS = 4096
"""of the rows that a program loads at once"""


@triton.jit
def sum_chunk(Rows, Out, rows, gains, i_chunk, chunks, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Add up chunk ``i_chunk`` of ``Rows [rows, gains]`` into a row of ``Out [chunks, gains]``."""
    each = tl.cdiv(rows, chunks)
    column = tl.arange(0, COLUMNS)[None, :]
    begin, end = i_chunk * each, tl.minimum(i_chunk * each + each, rows)
    acc = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in tl.range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)[:, None]
        acc += tl.load(Rows + (row.to(tl.int64) * gains + column), mask=(row < end) & (column < gains), other=0.0)
    b_sum = tl.sum(acc, 0, keep_dims=True)
    tl.store(Out + (i_chunk * gains + column), b_sum.to(Out.dtype.element_ty), mask=column < gains)


@triton.jit
def row_sums_kernel(
    Rows, Others, Out, OutOfOthers, rows, gains, chunks, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The sums of two matrices' chunks, ``rows`` and ``gains`` of each; ``Others`` may be None."""
    pid = tl.program_id(0)
    if pid < chunks:
        sum_chunk(Rows, Out, rows[0], gains[0], pid, chunks, BLOCK, COLUMNS)
    else:
        if Others is not None:
            sum_chunk(Others, OutOfOthers, rows[1], gains[1], pid - chunks, chunks, BLOCK, COLUMNS)


def sum_rows(matrices: Sequence[Tensor | None], gains: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums of the rows of one or two matrices ``[rows, gains]`` in fp32, each of the shape and dtype of its gain.

    Where there is no gain there is no matrix, and the result is None. Allocates ``CHUNKS`` rows a matrix.
    """
    sums = [None if gain is None else torch.empty_like(gain) for gain in gains]
    found = [(x, y) for x, y in zip(matrices, sums, strict=True) if x is not None and y is not None]
    if found:
        parts = [x.new_empty(CHUNKS, x.shape[1]) for x, _ in found]
        _launch([x for x, _ in found], parts, CHUNKS)
        _launch(parts, [y for _, y in found], 1)
    return sums


def _launch(matrices: Sequence[Tensor], results: Sequence[Tensor], chunks: int) -> None:
    columns = next_power_of_2(max(x.shape[1] for x in matrices))
    sides = (*matrices, *results) if len(matrices) == 2 else (*matrices, None, *results, None)
    rows, gains = zip(matrices[0].shape, matrices[-1].shape, strict=True)
    launch = launcher(
        row_sums_kernel,
        (len(matrices) * chunks,),
        (rows, gains, chunks),
        BLOCK=max(1, ELEMENTS // columns), COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    launch(sides)
