"""The gradient of a bias on relative positions, in a fixed order and without atomics.

A program owns some entries of a head's table: those of one distance on all axes but the last, and of a block of
distances on the last. It walks over a slice of all runs of ``BLOCK`` queries along the last axis. The scores' gradients
of a run and of the keys at those distances are a matrix of which every entry is a diagonal; a gather turns diagonals
into columns, whose sums are added up in registers. Slices are added in order.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false

from math import ceil, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Plan, launcher
from ..host.problem import Inputs, Layout, Options, Problem, RowStatistics, in_units, stride_unit, strides
from ..host.tiling import next_power_of_2
from .parameters import Axes, Spec, Strides, head_fields
from .primitives import LOG2E, in_elements, load_columns, products
from .windows import between, contiguous_row, token_offset, window_bounds


@triton.jit
def key_index(index, distance, length, kernel, stride, dilation, CAUSAL: tl.constexpr, PERIODIC: tl.constexpr):
    """The token at a distance (in keys of a window) from token ``index`` of one axis, and whether that one sees it."""
    residue = index % dilation
    count = (length - residue + dilation - 1) // dilation
    lo, hi = window_bounds(index // dilation, count, kernel, stride, CAUSAL, PERIODIC)
    key = index // dilation + distance
    is_seen = (key >= lo) & (key <= hi)
    return residue + on_axis(key, count, PERIODIC) * dilation, is_seen


@triton.jit
def on_axis(index, count, PERIODIC: tl.constexpr):
    """An unwrapped index on its ring. On other axes, and more than a turn away, clamped so that loads stay inside."""
    if PERIODIC:
        index += tl.where(index < 0, count, tl.where(index >= count, -count, 0))
    return tl.minimum(tl.maximum(index, 0), count - 1)


class BiasGradientTensors(NamedTuple):
    """What the kernel reads and writes. All but the first four are contiguous."""

    query: Any
    key: Any
    value: Any
    grad_out: Any
    delta: Any
    lse: Any
    rpb: Any
    grad_rpb: Any
    """``[slices, heads, 2 kernel - 1 per axis]`` in fp32"""
    key_mask: Any


@triton.jit
def bias_gradient_kernel(
    tensors, strides, axes, runs, blocks, slices, batches, group, heads, scale, SPEC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of a slice. ``runs`` is their number along a line, and ``tensors`` are :class:`BiasGradientTensors`."""
    CAUSAL: tl.constexpr = SPEC.causal
    PERIODIC: tl.constexpr = SPEC.periodic
    D: tl.constexpr = SPEC.head_dim
    BD: tl.constexpr = SPEC.columns
    DV: tl.constexpr = SPEC.value_dim
    BDV: tl.constexpr = SPEC.value_columns
    PRECISION: tl.constexpr = SPEC.precision
    UNIT: tl.constexpr = SPEC.unit
    Q, K, V, DOut = tensors.query, tensors.key, tensors.value, tensors.grad_out
    q_strides, k_strides, v_strides = (
        in_elements(strides.query, UNIT),
        in_elements(strides.key, UNIT),
        in_elements(strides.value, UNIT),
    )
    do_strides, mask_strides = in_elements(strides.grad_out, UNIT), strides.key_mask
    length, kernel, stride, dilation = axes.length, axes.kernel, axes.stride, axes.dilation
    i_slice = tl.program_id(0) % slices
    first = tl.program_id(0) // slices % blocks * BLOCK  # of the entries on the last axis
    row = tl.program_id(0) // (slices * blocks)
    rows = (2 * kernel[0] - 1) * (2 * kernel[1] - 1)
    i_head = (row // rows).to(tl.int64)
    distance_t = row % rows // (2 * kernel[1] - 1) - kernel[0] + 1
    distance_h = row % (2 * kernel[1] - 1) - kernel[1] + 1
    width = 2 * kernel[2] - 1
    Q += i_head * q_strides[4]
    K += i_head // group * k_strides[4]
    V += i_head // group * v_strides[4]
    DOut += i_head * do_strides[4]
    m = tl.arange(0, BLOCK)
    n = tl.arange(0, 2 * BLOCK)
    o_row = row.to(tl.int64) * width
    entry = first + n[None, :] - m[:, None]
    diagonal = m[:, None] + m[None, :]
    acc = tl.zeros([BLOCK], tl.float32)
    total = batches * length[0] * length[1] * runs
    share = tl.cdiv(total, slices)
    for run in tl.range(i_slice * share, tl.minimum((i_slice + 1) * share, total), num_stages=1):
        i_batch = (run // (runs * length[1] * length[0])).to(tl.int64)
        t = run // (runs * length[1]) % length[0]
        h = run // runs % length[1]
        residue = run % runs % dilation[2]
        count = (length[2] - residue + dilation[2] - 1) // dilation[2]
        start = run % runs // dilation[2] * BLOCK
        key_t, seen_t = key_index(t, distance_t, length[0], kernel[0], stride[0], dilation[0], CAUSAL[0], PERIODIC[0])
        key_h, seen_h = key_index(h, distance_h, length[1], kernel[1], stride[1], dilation[1], CAUSAL[1], PERIODIC[1])
        if seen_t & seen_h & (start < count):
            index, col = start + m, start + first - kernel[2] + 1 + n
            m_rows = index < count
            index = tl.minimum(index, count - 1)
            query = (t.to(tl.int64), h.to(tl.int64), (residue + index * dilation[2]).to(tl.int64))
            w = residue + on_axis(col, count, PERIODIC[2]) * dilation[2]
            key = (key_t.to(tl.int64), key_h.to(tl.int64), w.to(tl.int64))
            lo, hi = window_bounds(index, count, kernel[2], stride[2], CAUSAL[2], PERIODIC[2])
            b_visible = between(lo, hi, col) & m_rows[:, None] & (entry >= 0) & (entry < width)
            m_keys = (col >= tl.min(lo, 0)) & (col <= tl.max(hi, 0))
            if tensors.key_mask is not None:
                p_mask = tensors.key_mask + i_batch * mask_strides[0] + token_offset(key, mask_strides)
                m_keys = m_keys & tl.load(p_mask).to(tl.int1)
                b_visible = b_visible & m_keys[None, :]
            b_q = load_columns(Q + i_batch * q_strides[0], token_offset(query, q_strides), m_rows, D, BD)
            b_do = load_columns(DOut + i_batch * do_strides[0], token_offset(query, do_strides), m_rows, DV, BDV)
            b_k = load_columns(K + i_batch * k_strides[0], token_offset(key, k_strides), m_keys, D, BD)
            b_v = load_columns(V + i_batch * v_strides[0], token_offset(key, v_strides), m_keys, DV, BDV)
            o_stat = contiguous_row(i_batch, query, length) * heads + i_head
            row_lse = tl.load(tensors.lse + o_stat, mask=m_rows, other=0.0)
            row_delta = tl.load(tensors.delta + o_stat, mask=m_rows, other=0.0)
            b_bias = tl.load(tensors.rpb + o_row + entry, mask=b_visible, other=0.0).to(tl.float32)
            b_s = products(b_q, b_k, None, PRECISION) * (scale * LOG2E) + b_bias * LOG2E
            b_p = tl.exp2(tl.where(b_visible, b_s, float("-inf")) - row_lse[:, None])
            b_ds = b_p * (products(b_do, b_v, None, PRECISION) - row_delta[:, None])
            b_ds = tl.where(b_visible, b_ds, 0.0)
            acc += tl.sum(tl.gather(b_ds, diagonal, 1), 0)  # entry e of query m is column m + e
    o_entry = (i_slice * (heads * rows)).to(tl.int64) * width + o_row + first + m
    tl.store(tensors.grad_rpb + o_entry, acc, mask=first + m < width)


class BiasConfig(NamedTuple):
    block: int
    """Queries, and distances on the last axis, that a program takes at a time."""
    slices: int
    """Number of parts of the queries, whose sums are added in order."""


def bias_plan(p: Problem, grad_out: Layout) -> Plan:
    lengths, kernel_size, _, dilation = p.geometry
    *others, width = (2 * k - 1 for k in kernel_size)
    block = min(max(16, next_power_of_2(width)), 32)
    runs, blocks = dilation[2] * ceil(ceil(lengths[2] / dilation[2]) / block), ceil(width / block)
    batches, heads = p.query.shape[0], p.query.shape[-2]
    # Enough programs to fill a large GPU. The number depends on shapes alone, as for registers.
    programs, total = heads * prod(others) * blocks, batches * lengths[0] * lengths[1] * runs
    slices = max(1, min(ceil(2048 / programs), total // 8))
    tensor_strides = *p.input_strides()[:3], strides(grad_out)
    unit = stride_unit(tensor_strides)
    query, key, value, grad = in_units(tensor_strides, unit)
    launch = launcher(
        bias_gradient_kernel,
        (programs * slices,),
        (
            Strides(query, key, value, grad_out=grad, key_mask=p.mask_strides), Axes(*p.geometry),
            runs, blocks, slices, batches, p.group, heads,
        ),
        SPEC=Spec(**head_fields(p), causal=p.causal_axes, periodic=p.periodic_axes, unit=unit), BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return Plan(BiasConfig(block, slices), launch)


def bias_gradient(
    plan: Plan, problem: Problem, inputs: Inputs, options: Options, grad_out: Tensor, statistics: RowStatistics
) -> Tensor:
    """The gradient of the table. Allocates ``slices`` times its size in fp32 for partial sums."""
    query, key, value, *_, rpb = inputs
    assert rpb is not None
    sums = torch.empty((plan.config.slices, *rpb.shape), dtype=torch.float32, device=rpb.device)
    delta, lse, _ = statistics
    tensors = BiasGradientTensors(query, key, value, grad_out, delta, lse, rpb, sums, inputs.key_mask)
    plan.launch((tensors,), (options.scale,))
    return sums.sum(0).to(rpb.dtype)
