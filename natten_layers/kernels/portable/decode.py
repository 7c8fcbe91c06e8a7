"""The decode kernel, which attends from a few query tokens per sequence to a cache, and its launcher.

The cache is split into slices (split-K). A program computes all query tokens and all query heads of one KV head over
one slice, so that every key and value is read once; more than ``MAX_ROWS`` such rows take further programs. Visibility
follows positions, not memory order, and a slice is first trimmed to what its rows see. Registers and the sink belong to
the first slice. If there are several slices, each writes its softmax state in fp32, and a second kernel merges them.

Names are those of ``primitives.py``. ``[M]`` rows are (token, head of the group) pairs, ``[N]`` are entries of the
cache.
"""

# Triton's language shares the syntax of Python, but not its types.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host.cache_problem import CacheInputs, CacheOptions, CacheProblem
from ..host.launcher import Launcher, launcher
from ..host.problem import device_traits, register_strides
from ..host.tiling import next_power_of_2, padded_head_dim, tile_copies
from .forward import attend_registers, initial_stats
from .parameters import View
from .primitives import (
    LN2,
    LOG2E,
    LOWEST,
    are_sound,
    load_columns,
    load_rows,
    products,
    scale_rows,
    softmax_step,
    store_columns,
)
from .windows import of_head

MAX_ROWS = 64
TILE_BYTES = 2**14
"""Bytes of keys that a program loads at a time. With as many of values and three stages, three programs share an SM."""
PROGRAMS = 2048
"""Programs to aim at: many times the SMs of any device, so that the last wave is short beside the rest."""
MAX_SPLITS = 128
NO_WINDOW = 2**63 - 1
TRIM_FROM = 512
"""Entries of a slice from which on it pays to read all its positions first, and to skip the keys that no row sees."""
STAGES = 3


@triton.jit
def load_positions(KeyPositions, start, stride, end, BN: tl.constexpr):
    """Positions of ``BN`` cache entries from ``start`` on; from ``end`` on they are -1, as for an empty entry.

    They are 64-bit whatever their dtype is, since a caller may give any integer dtype.
    """
    n = tl.arange(0, BN)
    p_slots = KeyPositions + tl.cast(start, tl.int64) * stride + n.to(tl.int64) * stride
    return tl.load(p_slots, mask=n < end - start, other=-1).to(tl.int64)


@triton.jit
def seen_slots(KeyPositions, stride, begin, end, row_lo, row_hi, BLOCK: tl.constexpr):
    """First cache entry of a slice that a row sees, and the one after the last; ``end`` and 0 if no row sees any."""
    lo = tl.min(tl.where(row_lo <= row_hi, row_lo, 9223372036854775807), 0)
    hi = tl.max(row_hi, 0)
    first = tl.zeros([BLOCK], tl.int32) + end
    last = tl.full([BLOCK], -1, tl.int32)
    for start in tl.range(begin, end, BLOCK):
        col = load_positions(KeyPositions, start, stride, end, BLOCK)
        slot = start + tl.arange(0, BLOCK)
        m_seen = (col >= lo) & (col <= hi)
        first = tl.minimum(first, tl.where(m_seen, slot, end))
        last = tl.maximum(last, tl.where(m_seen, slot, -1))
    return tl.min(first, 0), tl.max(last, 0) + 1


@triton.jit
def first_chunk(begin, seen, BN: tl.constexpr):
    """Start of the chunk that holds cache entry ``seen``, where chunks of ``BN`` entries begin at ``begin``."""
    # The slice does not simply begin at ``seen``: that comes from a reduction, so Triton would not know its alignment,
    # and would load single elements.
    while begin + BN <= seen:
        begin += BN
    return begin


class DecodeSpec(NamedTuple):
    """What the kernel is compiled for: its compile-time argument ``SPEC``. Names are those of ``Spec``."""

    rows: int
    """rows that a program computes"""
    keys: int
    """cache entries that a program loads at a time"""
    head_dim: int
    columns: tuple[int, ...]
    value_dim: int
    value_columns: tuple[int, ...]
    register_tile: int
    trim: bool
    """whether a slice is trimmed to what its rows see"""
    scale_first: bool
    precision: str
    stages: int
    nonfinite: bool = False

    @property
    def repair(self) -> "DecodeSpec":
        """For the second pass, in which everything is exact."""
        return self._replace(keys=16, stages=1, scale_first=True, nonfinite=True)


class DecodeTensors(NamedTuple):
    """What the kernel reads and writes. Either results or parts of them are written, and the others are None."""

    query: Any
    key: Any
    value: Any
    query_positions: Any
    key_positions: Any
    additional_keys: Any
    additional_values: Any
    sink: Any
    out: Any
    lse: Any
    part_out: Any
    part_max: Any
    part_sum: Any


class DecodeStrides(NamedTuple):
    """Strides ``(batch, token, head)``, and of positions ``(batch, token)``."""

    query: Any
    key: Any
    value: Any
    query_positions: Any
    key_positions: Any
    additional_keys: Any
    additional_values: Any


class DecodeSizes(NamedTuple):
    tokens: Any
    """query tokens of a sequence"""
    length: Any
    """entries of the cache"""
    group: Any
    kv_heads: Any
    blocks: Any
    """programs that the rows of a KV head take"""
    splits: Any
    """slices of the cache"""
    share: Any
    """cache entries of a slice"""
    total: Any
    """rows of the output"""
    registers: Any
    window: Any


class DecodeRows(NamedTuple):
    """Rows of a program, and first and last position that each sees."""

    b_q: Any
    row_head: Any
    row_lo: Any
    row_hi: Any


@triton.jit
def attend_cache(
    rows, b_acc, row_m, row_l, keys, values, positions, begin, end, factor, score_scale, SPEC: tl.constexpr
):  # fmt: skip
    """Fold the cache entries ``begin`` to ``end``, of which a row sees positions ``row_lo`` to ``row_hi``.

    Loads do not depend on positions, so that they can run ahead of the arithmetic.
    """
    BN: tl.constexpr = SPEC.keys
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    NONFINITE: tl.constexpr = SPEC.nonfinite
    PRECISION: tl.constexpr = SPEC.precision
    k_stride, v_stride = keys.strides[1], values.strides[1]
    n = tl.arange(0, BN)
    o_k = n.to(tl.int64) * k_stride
    o_v = n.to(tl.int64) * v_stride
    for start in tl.range(begin, end, BN, num_stages=SPEC.stages):  # pyright: ignore[reportGeneralTypeIssues]
        m_keys = n < end - start
        col = load_positions(positions.pointer, start, positions.strides[1], end, BN)
        b_k = load_columns(keys.pointer + tl.cast(start, tl.int64) * k_stride, o_k, m_keys, SPEC.head_dim, BD)
        b_v = load_columns(values.pointer + tl.cast(start, tl.int64) * v_stride, o_v, m_keys, SPEC.value_dim, BDV)
        b_s = products(rows.b_q, b_k, None, PRECISION)  # [M, N]
        if SPEC.scale_first:
            b_s = b_s * score_scale
        b_visible = (col[None, :] >= rows.row_lo[:, None]) & (col[None, :] <= rows.row_hi[:, None])
        b_s = tl.where(b_visible, b_s, float("-inf"))
        b_acc, row_m, row_l = softmax_step(b_acc, row_m, row_l, b_s, b_v, b_visible, factor, NONFINITE, PRECISION)
    return b_acc, row_m, row_l


@triton.jit
def attend_slice(
    rows, keys, values, positions, reg_keys, reg_values, registers, Sink, sink, with_sink, begin, end, scale,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Softmax state of the rows over the sink (if ``with_sink``), ``registers`` and one slice of the cache."""
    BDV: tl.constexpr = SPEC.value_columns
    score_scale = scale * LOG2E
    # A scale that is not positive does not commute with the maximum, so scores are then scaled before it is taken.
    factor = 1.0 if SPEC.scale_first else score_scale
    b_acc, row_m, row_l = initial_stats(Sink, rows.row_head, sink, SPEC.rows, BDV)  # pyright: ignore[reportGeneralTypeIssues]
    if Sink is not None or sink is not None:
        row_m = tl.where(with_sink, row_m, LOWEST)
        row_l = tl.where(with_sink, row_l, 0.0)
    if SPEC.register_tile > 0:
        b_acc, row_m, row_l = attend_registers(
            rows.b_q, b_acc, row_m, row_l, reg_keys, reg_values, registers, factor, score_scale, SPEC
        )
    return attend_cache(rows, b_acc, row_m, row_l, keys, values, positions, begin, end, factor, score_scale, SPEC)


@triton.jit
def store_result(Out, Lse, o_row, m_rows, b_acc, row_m, row_l, DV: tl.constexpr, BDV: tl.constexpr):
    """Divide by the row sum and store. A row that saw no key gets output 0 and a log-sum-exp of -inf."""
    row_nothing = row_l == 0.0
    row_d = tl.where(row_nothing, 1.0, row_l)
    store_columns(Out, o_row * DV, m_rows, scale_rows(b_acc, 1.0 / row_d), DV, BDV)
    if Lse is not None:
        row_lse = tl.where(row_nothing, float("-inf"), (row_m + tl.log2(row_d)) * LN2)
        tl.store(Lse + o_row, row_lse, mask=m_rows)


@triton.jit
def decode_kernel(tensors, strides, sizes, sink, scale, SPEC: tl.constexpr):
    """Attention of the rows of one KV head over a slice of the cache.

    Writes the softmax state to ``part_out``, ``part_max`` and ``part_sum`` if they are given, else the result to
    ``out`` and ``lse``. The groups of arguments are :class:`DecodeTensors`, :class:`DecodeStrides` and
    :class:`DecodeSizes`.
    """
    BM: tl.constexpr = SPEC.rows
    BD: tl.constexpr = SPEC.columns
    BDV: tl.constexpr = SPEC.value_columns
    kv_heads, blocks, splits, group = sizes.kv_heads, sizes.blocks, sizes.splits, sizes.group
    # KV heads vary fastest, as they are neighbors in memory in a cache [B, S, Hkv, D].
    i_kv = (tl.program_id(0) % kv_heads).to(tl.int64)
    i_block = tl.program_id(0) // kv_heads % blocks
    i_split = tl.program_id(0) // (kv_heads * blocks) % splits
    i_batch = (tl.program_id(0) // (kv_heads * blocks * splits)).to(tl.int64)
    row = i_block * BM + tl.arange(0, BM)
    m_rows = row < sizes.tokens * group
    row_token = tl.minimum(row // group, sizes.tokens - 1).to(tl.int64)
    row_head = i_kv * group + row % group
    q_strides, qp_strides = strides.query, strides.query_positions
    p_q = tensors.query + i_batch * q_strides[0]
    b_q = load_columns(p_q, row_token * q_strides[1] + row_head * q_strides[2], m_rows, SPEC.head_dim, BD)
    p_positions = tensors.query_positions + i_batch * qp_strides[0]
    row_p = tl.load(p_positions + row_token * qp_strides[1], mask=m_rows, other=-1).to(tl.int64)
    row_hi = tl.maximum(row_p, -1)
    row_lo = tl.maximum(row_hi - sizes.window + 1, 0)
    rows = DecodeRows(b_q, row_head, row_lo, row_hi)

    keys = of_head(View(tensors.key, strides.key), i_batch, i_kv)
    values = of_head(View(tensors.value, strides.value), i_batch, i_kv)
    positions = View(tensors.key_positions + i_batch * strides.key_positions[0], strides.key_positions)
    reg_keys, reg_values = None, None
    if SPEC.register_tile > 0:
        reg_keys = of_head(View(tensors.additional_keys, strides.additional_keys), i_batch, i_kv)
        reg_values = of_head(View(tensors.additional_values, strides.additional_values), i_batch, i_kv)
    begin = i_split * sizes.share
    end = tl.minimum(begin + sizes.share, sizes.length)
    if SPEC.trim:
        seen, end = seen_slots(positions.pointer, positions.strides[1], begin, end, row_lo, row_hi, 512)
        begin = first_chunk(begin, seen, SPEC.keys)
    with_sink = i_split == 0
    registers = tl.where(i_split == 0, sizes.registers, 0)
    b_acc, row_m, row_l = attend_slice(
        rows, keys, values, positions, reg_keys, reg_values, registers, tensors.sink, sink, with_sink, begin, end,
        scale, SPEC,
    )  # fmt: skip
    # If the fast softmax of a row is not correct, which is rare, all are computed again as in the forward kernel.
    if tl.max(tl.where(are_sound(b_acc, row_m, row_l), 0, 1), 0) > 0:
        REPAIR: tl.constexpr = SPEC.repair
        b_acc, row_m, row_l = attend_slice(
            rows, keys, values, positions, reg_keys, reg_values, registers, tensors.sink, sink, with_sink, begin, end,
            scale, REPAIR,
        )  # fmt: skip

    o_row = (i_batch * sizes.tokens + row_token) * (kv_heads * group) + row_head
    if tensors.part_out is None:
        store_result(tensors.out, tensors.lse, o_row, m_rows, b_acc, row_m, row_l, SPEC.value_dim, BDV)
    else:
        o_part = i_split.to(tl.int64) * sizes.total + o_row
        store_columns(tensors.part_out, o_part * SPEC.value_dim, m_rows, b_acc, SPEC.value_dim, BDV)
        tl.store(tensors.part_max + o_part, row_m, mask=m_rows)
        tl.store(tensors.part_sum + o_part, row_l, mask=m_rows)


@triton.jit
def merge_kernel(
    PartOut, PartMax, PartSum, Out, Lse, splits, total,
    DV: tl.constexpr, BDV: tl.constexpr, BS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the states ``[splits, total, ...]`` of one row, ``BLOCK`` splits at a time; ``BS >= splits``."""
    i_row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BS)
    row_m = tl.max(tl.load(PartMax + s.to(tl.int64) * total + i_row, mask=s < splits, other=LOWEST), 0)
    b_acc = tl.zeros([1, BDV], tl.float32)
    row_l = tl.zeros([1], tl.float32)
    for start in tl.range(0, splits, BLOCK):
        i_split = start + tl.arange(0, BLOCK)
        m_split = i_split < splits
        o_part = i_split.to(tl.int64) * total + i_row
        part_m = tl.load(PartMax + o_part, mask=m_split, other=LOWEST)
        part_l = tl.load(PartSum + o_part, mask=m_split, other=0.0)
        weight = tl.exp2(part_m - row_m)
        row_l += tl.sum(part_l * weight, 0)
        b_acc += tl.sum(load_rows(PartOut, o_part * DV, m_split, DV, BDV) * weight[:, None], 0, keep_dims=True)
    o_row = i_row + tl.zeros([1], tl.int64)
    store_result(Out, Lse, o_row, o_row >= 0, (b_acc,), row_m, row_l, DV, (BDV,))


def split(programs: int, length: int, chunk: int) -> tuple[int, int]:
    """Number of slices of a cache of ``length`` entries, and entries of a slice, a multiple of ``chunk``.

    Args:
        programs: programs that there would be with a single slice.

    A slice has at least two chunks, so that loads run ahead of the arithmetic. The result depends on shapes alone, so
    that sums are always added in the same order.
    """
    chunks = ceil(length / chunk)
    splits = min(ceil(PROGRAMS / programs), ceil(chunks / 2), MAX_SPLITS)
    share = ceil(chunks / splits)
    return ceil(chunks / share), share * chunk


@lru_cache(maxsize=1024)
def block(rows: int, width: int, element_size: int, limit: int) -> tuple[int, int]:
    """Rows and cache entries that a program takes at a time, within ``limit`` bytes of shared memory."""
    slots = min(max(16, TILE_BYTES // (width * element_size)), 128)
    most = min(max(16, next_power_of_2(rows)), MAX_ROWS)
    # Shared memory holds queries and weights beside two stages of keys and values, and less than 2 KiB of other data,
    # as compiled kernels report.
    columns = tile_copies(element_size) * width + slots
    while most > 16 and most * columns * element_size + 4 * TILE_BYTES + 2048 > limit:
        most //= 2
    return most, slots


class DecodePlan(NamedTuple):
    config: dict[str, int]
    """Rows, keys, splits and warps, for :func:`natten_layers.explain`."""
    attend: Launcher
    merge: Launcher | None
    """Launcher of the kernel that merges the slices; None if there is only one."""
    splits: int


def plan(p: CacheProblem) -> DecodePlan:
    batch, tokens, heads, head_dim = p.query.shape
    length, kv_heads, value_dim = p.value.shape[1:]
    group = heads // kv_heads
    BD, BDV = padded_head_dim(head_dim), padded_head_dim(value_dim)
    BM, BN = block(group * tokens, max(BD, BDV), p.dtype.itemsize, device_traits(p.device)[1])
    blocks = ceil(group * tokens / BM)
    splits, share = split(batch * kv_heads * blocks, length, BN)
    registers = 0 if p.additional_keys is None else p.additional_keys.shape[1]
    total = batch * tokens * heads
    num_warps = 4 if BM * BDV <= 8192 else 8
    attend = launcher(
        decode_kernel,
        (batch * splits * blocks * kv_heads,),
        (
            DecodeStrides(
                *(x.stride[:3] for x in (p.query, p.key, p.value)), p.query_positions.stride, p.key_positions.stride,
                *map(register_strides, (p.additional_keys, p.additional_values)),
            ),
            DecodeSizes(
                tokens, length, group, kv_heads, blocks, splits, share, total, registers,
                NO_WINDOW if p.window is None else min(p.window, NO_WINDOW),
            ),
        ),
        SPEC=DecodeSpec(
            BM, BN, head_dim, (BD,), value_dim, (BDV,), 16 if registers else 0, share > TRIM_FROM,
            p.scale_first, p.precision, STAGES,
        ),
        num_warps=num_warps,
    )  # fmt: skip
    merge = None
    if splits > 1:
        merge = launcher(
            merge_kernel, (total,), (splits, total),
            DV=value_dim, BDV=BDV, BS=next_power_of_2(splits), BLOCK=16, num_warps=2,
        )  # fmt: skip
    return DecodePlan({"rows": BM, "keys": BN, "splits": splits, "num_warps": num_warps}, attend, merge, splits)


def decode(
    plan: DecodePlan, inputs: CacheInputs, options: CacheOptions, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """``out [B, Lq, Hq, Dv]`` and, if ``with_lse``, the log-sum-exp ``[B, Lq, Hq]`` in fp32.

    If there are several slices, it also allocates ``slices * (Dv + 2)`` fp32 numbers for each row of the result.
    """
    query, value_dim, splits = inputs.query, inputs.value.shape[-1], plan.splits
    batch, tokens, heads, _ = query.shape
    total = batch * tokens * heads
    out = query.new_empty(batch, tokens, heads, value_dim)
    lse = query.new_empty(batch, tokens, heads, dtype=torch.float32) if with_lse else None
    parts = None, None, None
    if splits > 1:
        part_out = query.new_empty(splits, total, value_dim, dtype=torch.float32)
        parts = part_out, *query.new_empty(2, splits, total, dtype=torch.float32)
    plan.attend((DecodeTensors(*inputs, out, lse, *parts),), (options.sink_value, options.scale))
    if plan.merge is not None:
        plan.merge((*parts, out, lse))
    return out, lse
