"""A kernel that writes down what windows the device works out, for ``test_geometry.py``."""

# Triton's language is Python to the parser only.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from natten_layers.kernels.portable.primitives import query_bounds, window_bounds

BLOCK = 16


@triton.jit
def _kernel(out, length, kernel, stride, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    inside = index < length
    first, last = window_bounds(index, length, kernel, stride, CAUSAL)
    tl.store(out + index, first, mask=inside)
    tl.store(out + length + index, last, mask=inside)
    first, last = query_bounds(index, length, kernel, stride, CAUSAL)
    tl.store(out + 2 * length + index, first, mask=inside)
    tl.store(out + 3 * length + index, last, mask=inside)


def bounds(index: Tensor, kernel: int, stride: int, causal: bool) -> Tensor:
    """First and last key of each query of one class, then first and last query of each key: ``[4, length]``."""
    length = index.shape[0]
    assert length <= BLOCK
    out = index.new_empty(4, length, dtype=torch.int64)
    _kernel[(1,)](out, length, kernel, stride, CAUSAL=causal, BLOCK=BLOCK)
    return out
