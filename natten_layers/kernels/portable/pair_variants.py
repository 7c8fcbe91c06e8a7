"""When calls in fp32 take the kernels whose products are those of fp16 pairs, and with which tiles."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from ..host.problem import Problem
from ..host.tiling import (
    MIDDLE_WINDOW,
    Kind,
    TileConfig,
    best_boxes,
    fit,
    has_operands_in_registers,
    packed_heads,
    padded_head_dim,
    room,
)
from ..host.tuned import override_pack
from ..host.variant import Question, Variant, option_gap
from . import pair_forward, pair_gradients

PAIRS = "fp16 pairs"

# Least (query, key) pairs of all heads, and least keys of a window: with fewer, the launches before should take
# longer than the kernel itself. Neither was measured; 7x7 windows of 8 x 128x128 tokens pay with
# gradients, and break even without (``docs/profiles.md``).
LEAST_PAIRS = 2**22
LEAST_WINDOW = 25
# Heads of more channels are too wide for the portable kernels in fp32, which then spill up to 2 KiB a thread: all their
# calls take pairs. 18 causal keys of 160 channels, 9 x 2728 tokens: forward 0.52 ms (portable 1.32), dQ 0.53 (21.3), dK
# and dV 1.0 (27.5), the launches before 0.46; 518 keys of 256 with values of 64, 5 x 7195 tokens: forward 2.8 (157).
WIDE = 128
MOST_COLUMNS = 256


def pair_gap(question: Question) -> str | None:
    """Why products of fp16 pairs cannot compute a call, or None."""
    p = question.problem
    if p.dtype != torch.float32:
        return f"it takes float32, not {p.dtype}"
    if p.precision != "tf32x3":
        return f"torch asks for {p.precision} products"
    dim = max(p.query.shape[-1], p.value.shape[-1])
    if dim > MOST_COLUMNS:
        return f"it takes heads of up to {MOST_COLUMNS} channels, not of {dim}"
    return option_gap(question, "periodic", "registers")


def pair_pays(question: Question) -> str | None:
    p = question.problem
    window, queries = prod(p.kernel_size), prod(p.query.shape[:-1])
    if max(p.query.shape[-1], p.value.shape[-1]) > WIDE:
        return None
    if window < LEAST_WINDOW:
        return f"the window is small: {window} keys are fewer than {LEAST_WINDOW}"
    if queries * window < LEAST_PAIRS:
        return f"the call is small: {queries} queries of {window} keys are fewer than {LEAST_PAIRS} pairs"
    return None


class Size(NamedTuple):
    """Size of a program, before the boxes of its tile and chunk are chosen."""

    rows: int
    keys: int
    num_warps: int
    stages: int
    maxnreg: int | None = None


def size_of(kind: Kind, width: int, window: int) -> Size:
    """The size that was fastest for problems like this one (H200, Triton 3.6).

    Comments give examples: a problem, the milliseconds that its kernel takes with this size, and in parentheses those
    with the best size of another kind.
    """
    if width > WIDE:
        # 518 keys of 256 channels: dQ 0.90 (16 keys a chunk 0.93), dK and dV 1.47 (16 queries a chunk 1.68); 9x9: 0.43
        # (0.52) and 1.0 (0.77).
        if kind == "forward":
            return Size(32, 32, 4, 2)
        return Size(32, 16, 4, 2) if kind == "backward_key" and window < MIDDLE_WINDOW else Size(32, 32, 4, 1)
    if width > 64:  # 9x9 of 128 channels: forward 0.24 (32 rows 0.25), dQ 0.32 (0.36 with four warps), dK and dV 0.46
        if kind == "forward":
            return Size(64, 32, 4, 2)
        return Size(32, 32, 4, 2) if kind == "backward_key" else Size(32, 32, 2, 2)
    if window < MIDDLE_WINDOW:
        return _size_of_small_window(kind, width)
    # 3x7x13 of 64 channels: forward 2.7, dQ 4.0, dK and dV 5.9 (32 rows 6.8)
    if kind == "backward_key":
        return Size(64, 32, 4, 3)
    return Size(64, 64, 4, 3) if kind == "forward" else Size(64, 64, 4, 2)


def _size_of_small_window(kind: Kind, width: int) -> Size:
    if kind == "forward":  # 7x7 of 64 channels: 0.48 (32 rows 0.54); 7x11 of 32 channels: 1.17 (32 rows 1.25)
        return Size(64, 32, 4, 3, 168) if width > 32 else Size(64, 64, 4, 3, 168)
    if kind == "backward_query":  # 7x7 of 64: 0.57 (64 rows 0.61); 7x11 of 32: 1.36 (1.40)
        return Size(32, 32, 2, 3)
    # 7x11 of 32: 1.96 (32 rows 2.01); 7x7 of 64: 0.73 (64 rows 0.79)
    return Size(64, 32, 4, 3, 168) if width <= 32 else Size(32, 32, 2, 2)


def tile_config(kind: Kind, p: Problem) -> TileConfig:
    """The tile configuration of a kernel that reads pairs."""
    problem = p.problem_class
    width = padded_head_dim(max(problem.head_dim, problem.value_dim))
    size = size_of(kind, width, prod(problem.kernel))
    if kind == "forward" and 64 < width <= WIDE and has_operands_in_registers(problem.shared_memory):
        size = size._replace(rows=32)  # 256 causal keys of 128 on an A100 spill 1644 bytes a thread with 64 rows
    space = room(problem)._replace(width=2 * width)
    rows, keys, stages = fit(kind, size.rows, size.keys, size.stages, space)
    pack = 1 if kind == "backward_key" else min(override_pack() or packed_heads(p.group, rows), rows)
    tile, chunk = best_boxes(rows // pack, keys, problem.lengths, problem.kernel, kind == "backward_key")
    warps = min(size.num_warps, max(1, rows // 8))
    return TileConfig(tile, chunk, pack, warps, stages, size.maxnreg)


FORWARD = Variant(
    PAIRS,
    supports=pair_gap,
    pays=pair_pays,
    plan=lambda q: pair_forward.plan(q.problem, tile_config("forward", q.problem), q.with_stats),
    run=pair_forward.forward,
)
QUERY_GRADIENT = Variant(
    PAIRS,
    supports=pair_gap,
    pays=pair_pays,
    plan=lambda q: pair_gradients.query_plan(
        q.problem, tile_config("backward_query", q.problem), q.grad_out, q.grad_lse
    ),
    run=pair_gradients.query_gradient,
)
KEY_GRADIENTS = Variant(
    PAIRS,
    supports=pair_gap,
    pays=pair_pays,
    plan=lambda q: pair_gradients.key_plan(q.problem, tile_config("backward_key", q.problem), q.grad_out),
    run=pair_gradients.key_gradients,
)
