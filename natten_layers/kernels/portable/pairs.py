"""fp32 matrix products as three products of fp16 pairs: the representation, and the launches that write it.

A tensor is multiplied by a power of two, so that fp16 holds its numbers, and each number is then written as a sum of
two in fp16, ``hi + lo``. That keeps 22 bits of a number, and at least 2^-37 of the largest one. A product is
``lo @ hi + hi @ lo + hi @ hi``, which tensor cores compute in half the time of three products in TF32; its error is
about that of fp32 products.

Tiles that a program keeps are split by the program, with a factor for each row. Tensors that programs walk over are
split once, before, with a factor for each image and KV head: a copy as large as the tensor. The factor follows from a
sample of the tokens and leaves room for numbers four times as large. The split finds the largest number on its way; a
last launch, which has nothing to do otherwise, splits anew where fp16 does not hold it.

Sums of products of one chunk are accumulated in tensor cores, which round towards zero; sums of chunks are added
outside of them, or their error would grow with the number of keys.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Iterable
from math import ceil, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Launcher, launcher
from ..host.problem import Layout, Problem, contiguous
from ..host.tiling import TileConfig, next_power_of_2, padded_head_dim
from .parameters import Spec, View, spec_of
from .primitives import load_chunk, load_rows, store_rows
from .windows import token_offset

# Weights of the softmax, which are at most 1, are multiplied by 2^14.
WEIGHT_EXPONENT: tl.constexpr = tl.constexpr(14)
WEIGHT_UNIT: tl.constexpr = tl.constexpr(2.0**-14)
TINY: tl.constexpr = tl.constexpr(2.0**-126)
ROOM: tl.constexpr = tl.constexpr(2)  # powers of two that there is room for above the largest number of a sample

# --- On the device


@triton.jit
def exponent(x):
    """Biased exponent of ``x >= 0``, kept in a range in which ``scale_of`` and ``unit_of`` are normal numbers."""
    return tl.minimum(tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 15), 254)


@triton.jit
def scale_of(e):
    """The power of two that brings a number with exponent ``e`` between 2^14 and 2^15."""
    return ((268 - e) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unit_of(e):
    """``1 / scale_of(e)``"""
    return ((e - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_pair(b_tile):
    b_hi = b_tile.to(tl.float16)
    return b_hi, (b_tile - b_hi.to(tl.float32)).to(tl.float16)


@triton.jit
def rows_to_pair(b_tile):
    """The pair of a tile, and the unit of each row."""
    row_e = exponent(tl.max(tl.abs(b_tile), 1))
    return to_pair(b_tile * scale_of(row_e)[:, None]), unit_of(row_e)


@triton.jit
def transposed(b_pair):
    return tl.trans(b_pair[0]), tl.trans(b_pair[1])


@triton.jit
def pair_product(b_left, b_right, b_onto):
    """``b_left [M, K] @ b_right [K, N]``, added to ``b_onto [M, N]`` unless that is None. Small terms come first."""
    b_sum = tl.dot(b_left[1], b_right[0], b_onto)
    b_sum = tl.dot(b_left[0], b_right[1], b_sum)
    return tl.dot(b_left[0], b_right[0], b_sum)


@triton.jit
def load_pair(view, o_inner, m_chunk, chunk, ring, SPEC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The pair of a chunk; ``view`` is that of the image and head, whose rows are ``hi`` and then ``lo``."""
    b_hi = load_chunk(view, o_inner, m_chunk, chunk, ring, SPEC, D, BD)
    b_lo = load_chunk(View(view.pointer + D, view.strides), o_inner, m_chunk, chunk, ring, SPEC, D, BD)
    return b_hi[0], b_lo[0]


class SplitTensors(NamedTuple):
    """Two tensors that are split together, and what is computed."""

    first: Any
    second: Any
    delta: Any
    """``[B, *spatial, H]`` or None: of this only the largest magnitude is found"""
    first_pair: Any
    second_pair: Any
    samples: Any
    """``[3, B, H, parts]``: largest magnitude of a sample of the tokens; of delta, of all"""
    maxima: Any
    """``[2, B, H, parts]``: largest finite magnitude of each part of the tokens"""
    units: Any
    """see :class:`Pairs`"""


class SplitShape(NamedTuple):
    """What programs of a split need to know of a tensor ``[B, T, height, width, heads, D]``. Flat, as Triton 3.6 loses
    its place behind the length of an axis that is 1 in a tuple within a tuple.
    """

    height: Any
    width: Any
    tokens: Any
    heads: Any
    group: Any
    parts: Any
    """of the tokens, each of which is a program's"""


@triton.jit
def own_head(shape):
    """Image, head and part of a program. Heads vary fastest, as in memory."""
    i_part = tl.program_id(0) // shape.heads
    return (i_part // shape.parts).to(tl.int64), tl.program_id(0) % shape.heads, i_part % shape.parts


@triton.jit
def load_tokens(X, strides, shape, n, D: tl.constexpr, BD: tl.constexpr):
    """Rows ``[BLOCK, BD]`` of tokens ``n`` of a program's head, with zeros behind the last token."""
    i_batch, i_head, _ = own_head(shape)
    h = n // shape.width
    token = ((h // shape.height).to(tl.int64), (h % shape.height).to(tl.int64), (n % shape.width).to(tl.int64))
    o_rows = token_offset(token, strides)
    return load_rows(X + i_batch * strides[0] + i_head * strides[4], o_rows, n < shape.tokens, D, BD)


@triton.jit
def finite_magnitudes(b_x):
    b_x = tl.abs(b_x)
    return tl.where(b_x < float("inf"), b_x, 0.0)


@triton.jit
def own_maximum(Maxima, shape):
    """Where a program stores the largest magnitude that it has found."""
    i_batch, i_head, i_part = own_head(shape)
    return Maxima + (i_batch * shape.heads + i_head) * shape.parts + i_part


@triton.jit
def head_maximum(Maxima, shape, MAXIMA: tl.constexpr):
    """Largest magnitude of all heads that share the KV head of a program."""
    i_batch, i_head, _ = own_head(shape)
    i, count = tl.arange(0, MAXIMA), shape.group * shape.parts
    p_maxima = Maxima + (i_batch * shape.heads + i_head // shape.group * shape.group) * shape.parts + i
    return tl.max(tl.load(p_maxima, mask=i < count, other=0.0), 0)


@triton.jit
def sample(X, Samples, strides, shape, steps, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    """Store the largest magnitude of the first ``steps`` blocks of a program's part of the tokens."""
    _, _, i_part = own_head(shape)
    first = (i_part * (shape.tokens.to(tl.int64)) // shape.parts).to(tl.int32)
    b_max = tl.zeros([BLOCK, BD], tl.float32)
    for i_step in tl.range(0, steps):
        n = first + i_step * BLOCK + tl.arange(0, BLOCK)
        b_max = tl.maximum(b_max, finite_magnitudes(load_tokens(X, strides, shape, n, D, BD)))
    tl.store(own_maximum(Samples, shape), tl.max(tl.max(b_max, 1), 0))


@triton.jit
def sample_kernel(
    tensors, strides, shape, delta_steps, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """The grid is (images * parts * heads, tensors), like those of the next two kernels."""
    each = tl.num_programs(0)
    if tl.program_id(1) == 0:
        sample(tensors.first, tensors.samples, strides[0], shape, 1, D, BD, BLOCK)
    elif tl.program_id(1) == 1:
        sample(tensors.second, tensors.samples + each, strides[1], shape, 1, DV, BDV, BLOCK)
    else:
        if tensors.delta is not None:
            sample(tensors.delta, tensors.samples + 2 * each, strides[2], shape, delta_steps, 1, 1, BLOCK)


@triton.jit
def split_part(X, Pair, strides, shape, e, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    """Split a program's part of the tokens. Returns the largest magnitude, before it is scaled."""
    i_batch, i_head, i_part = own_head(shape)
    b_max = tl.zeros([BLOCK, BD], tl.float32)
    for start in tl.range(i_part * BLOCK, shape.tokens, shape.parts * BLOCK):
        n = start + tl.arange(0, BLOCK)
        b_x = load_tokens(X, strides, shape, n, D, BD)
        b_max = tl.maximum(b_max, finite_magnitudes(b_x))
        b_hi, b_lo = to_pair(b_x * scale_of(e))
        o_pair = ((i_batch * shape.tokens + n) * shape.heads + i_head) * (2 * D)
        store_rows(Pair, o_pair, n < shape.tokens, b_hi, D, BD)
        store_rows(Pair + D, o_pair, n < shape.tokens, b_lo, D, BD)
    return tl.max(tl.max(b_max, 1), 0)


@triton.jit
def split_kernel(
    tensors, strides, shape, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    each = tl.num_programs(0)
    if tl.program_id(1) == 0:
        e = exponent(head_maximum(tensors.samples, shape, MAXIMA)) + ROOM
        largest = split_part(tensors.first, tensors.first_pair, strides[0], shape, e, D, BD, BLOCK)
        tl.store(own_maximum(tensors.maxima, shape), largest)
    else:
        e = exponent(head_maximum(tensors.samples + each, shape, MAXIMA)) + ROOM
        largest = split_part(tensors.second, tensors.second_pair, strides[1], shape, e, DV, BDV, BLOCK)
        tl.store(own_maximum(tensors.maxima + each, shape), largest)


@triton.jit
def settled(sampled, largest):
    """The exponent with which a head is split in the end, and whether that is not the one of the sample."""
    sampled_e, e = exponent(sampled) + ROOM, exponent(largest)
    return tl.where(e > sampled_e, e, sampled_e), e > sampled_e


@triton.jit
def settle_kernel(
    tensors, strides, shape, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """Split heads anew that have numbers which the first split did not expect, and store what pairs are units of."""
    each = tl.num_programs(0)
    i_batch, i_head, i_part = own_head(shape)
    p_units = tensors.units + (i_batch * shape.heads + i_head) // shape.group * 4
    m_first = i_part == 0
    if tl.program_id(1) == 0:
        largest = head_maximum(tensors.maxima, shape, MAXIMA)
        e, is_new = settled(head_maximum(tensors.samples, shape, MAXIMA), largest)
        if is_new:
            split_part(tensors.first, tensors.first_pair, strides[0], shape, e, D, BD, BLOCK)
        tl.store(p_units, unit_of(e), mask=m_first)
        if tensors.delta is not None:
            tl.store(p_units + 3, head_maximum(tensors.samples + 2 * each, shape, MAXIMA), mask=m_first)
    else:
        largest = head_maximum(tensors.maxima + each, shape, MAXIMA)
        e, is_new = settled(head_maximum(tensors.samples + each, shape, MAXIMA), largest)
        if is_new:
            split_part(tensors.second, tensors.second_pair, strides[1], shape, e, DV, BDV, BLOCK)
        tl.store(p_units + 1, unit_of(e), mask=m_first)
        tl.store(p_units + 2, largest, mask=m_first)


# --- On the host

BLOCK_ELEMENTS = 4096
"""Elements of a tensor that a program of a split has in registers."""
PROGRAMS = 2048
"""Programs of a split, about, for each tensor: enough to keep the memory of a large GPU busy."""
MOST_PARTS = 256
"""Parts of the tokens of a head, so that each program can look at all their maxima."""


class Pairs(NamedTuple):
    """Two tensors as pairs."""

    first: Tensor
    """``[B, *spatial, H, 2 D]`` in fp16, contiguous"""
    second: Tensor
    units: Tensor
    """``[B, Hkv, 4]``: what pairs of the first and of the second are multiples of, and the largest finite magnitudes
    of the second tensor and of delta"""


class Split(NamedTuple):
    """The launches that split two tensors with the same tokens and heads."""

    launches: tuple[Launcher, ...]
    numbers: int
    """maxima of each tensor"""

    def __call__(self, p: Problem, first: Tensor, second: Tensor, delta: Tensor | None = None) -> Pairs:
        """Split two tensors. Allocates as much as they have."""
        pairs = [x.new_empty((*x.shape[:-1], 2 * x.shape[-1]), dtype=torch.float16) for x in (first, second)]
        units = p.query.shape[0] * p.kv_heads * 4
        numbers = first.new_empty(5 * self.numbers + units)
        samples, maxima, units = numbers.split((3 * self.numbers, 2 * self.numbers, units))
        tensors = SplitTensors(first, second, delta, *pairs, samples, maxima, units)
        for launch in self.launches:
            launch((tensors,))
        return Pairs(*pairs, units)


def pair_spec(p: Problem, config: TileConfig, tensors: Iterable[Layout | None], **fields: Any) -> Spec:
    """:func:`spec_of` of a kernel that reads pairs, whose tiles hold a head in one part."""
    columns, value_columns = (padded_head_dim(x.shape[-1]) for x in (p.query, p.value))
    return spec_of(p, config, tensors, **fields)._replace(columns=(columns,), value_columns=(value_columns,))


def register_tile(p: Problem) -> int:
    """Register tokens that a kernel takes at a time, in TF32, when it has done with the window; 0 without any."""
    return min(p.register_tile, 16)


def pair_layout(x: Layout) -> Layout:
    return contiguous((*x.shape[:-1], 2 * x.shape[-1]))


def split_of(p: Problem, first: Layout, second: Layout, *, with_delta: bool = False) -> Split:
    """The launches that split ``first [B, *spatial, H, D]`` and ``second [B, *spatial, H, Dv]``."""
    samples, heads, dims = first.shape[0], first.shape[-2], (first.shape[-1], second.shape[-1])
    tokens, group = prod(p.lengths), heads // p.kv_heads
    columns = [padded_head_dim(dim) for dim in dims]
    block = BLOCK_ELEMENTS // max(columns)
    parts = max(1, min(ceil(tokens / block), PROGRAMS // (samples * heads), MOST_PARTS // group))
    shape = SplitShape(*p.lengths[1:], tokens, heads, group, parts)
    strides = p.strides_of(first), p.strides_of(second), p.strides_of(contiguous((*first.shape[:-1], 1)))
    options = {
        "D": dims[0], "DV": dims[1], "BD": columns[0], "BDV": columns[1], "BLOCK": block,
        "MAXIMA": next_power_of_2(group * parts), "num_warps": 4,
    }  # fmt: skip
    steps, programs = ceil(ceil(tokens / parts) / block), samples * parts * heads
    launches = (
        launcher(sample_kernel, (programs, 2 + with_delta), (strides, shape, steps), **options),
        launcher(split_kernel, (programs, 2), (strides, shape), **options),
        launcher(settle_kernel, (programs, 2), (strides, shape), **options),
    )
    return Split(launches, programs)
