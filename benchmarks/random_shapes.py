"""Random attention problems such as models for images, videos, texts and weather have, for which no kernel was tuned.

Problem ``number`` of a seed is the same however many are drawn. Its floor on an H200 lies in ``FLOOR_MS`` and its
tensors take at most ``MOST_BYTES``, so that a forward pass, which takes a few times its floor, takes 0.05 to 5 ms.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch

from .workloads import Workload, floor

__all__ = ["FLOOR_MS", "MOST_BYTES", "draw"]

H200 = 4.27e12, 736e12
"""Bytes copied, and FLOP of bf16 matrix products, per second"""
FLOOR_MS = 0.02, 1.0
MOST_BYTES = 2**30
"""Of queries, keys, values and outputs together"""

HEAD_DIMS = {64: 10, 128: 8, 32: 3, 80: 2, 96: 2, 256: 2, 40: 1, 48: 1, 56: 1, 72: 1, 88: 1, 112: 1, 160: 1, 192: 1}
GROUPS = {1: 10, 2: 3, 4: 4, 8: 3, 3: 1, 5: 1, 6: 1, 7: 1, 12: 1, 16: 1}
KV_HEADS = {1: 2, 2: 2, 4: 3, 8: 4, 3: 1, 6: 1, 12: 1, 16: 2, 20: 1, 24: 1}
DTYPES = {torch.bfloat16: 7, torch.float16: 2, torch.float32: 2}
RANKS = {1: 3, 2: 4, 3: 3}
"""Weights by value, as in the tables above"""
WINDOWS = {1: ((3, 4096),), 2: ((3, 64), (3, 64)), 3: ((3, 16), (3, 24), (3, 24))}
LENGTHS = {1: ((256, 65536),), 2: ((14, 512), (14, 512)), 3: ((4, 64), (12, 192), (12, 192))}
"""By rank the least and most of each axis"""
MOST_HEADS = 64
MOST_SUMMED = 2**17
"""Most tokens of a problem with sinks: the check of a sink's gradient sums over all of them, class by class"""


def draw(seed: int, number: int) -> Workload:
    """A problem by its seed and its number."""
    random = Random(f"{seed} {number}")
    rank = _weighted(random, RANKS)  # once, as more problems of some ranks than of others are too large
    while True:
        workload = _draw(random, rank, f"{seed}-{number}")
        if workload.dtype.itemsize * workload.elements() > MOST_BYTES:
            continue
        if FLOOR_MS[0] <= 1e3 * floor(workload, "fwd").seconds(*H200) <= FLOOR_MS[1]:
            return workload


def _draw(random: Random, rank: int, name: str) -> Workload:
    """A valid problem of any size."""
    kernel_size = [_scaled(random, *bounds) for bounds in WINDOWS[rank]]
    if rank > 1 and random.random() < 0.6:  # as high as wide
        kernel_size[-2] = kernel_size[-1]
    lengths = [_length(random, max(k, low), high) for k, (low, high) in zip(kernel_size, LENGTHS[rank], strict=True)]
    if rank > 1:  # no picture is far longer than wide
        shortest = max(kernel_size[-2], lengths[-1] // 2)
        lengths[-2] = _length(random, shortest, max(shortest, 2 * lengths[-1]))
    dilated, strided, ring = (random.random() < share for share in (0.15, 0.15, 0.1))
    widest = (min(8, n // k) if dilated else 1 for n, k in zip(lengths, kernel_size, strict=True))
    dilation = tuple(random.randint(1, most) for most in widest)
    stride = tuple(random.choice([s for s in (1, 2, 4, 8, 16) if s <= k]) if strided else 1 for k in kernel_size)
    causal, periodic = [False] * rank, [False] * rank
    if ring:  # such as longitude
        periodic[-1] = True
        lengths[-1] = lengths[-1] // dilation[-1] * dilation[-1]
    elif random.random() < (0.6, 0.1, 0.3)[rank - 1]:  # a text, or the time of a video
        causal[0] = True
        causal[1:] = [random.random() < 0.2] * (rank - 1)
    head_dim, group = _weighted(random, HEAD_DIMS), _weighted(random, GROUPS)
    kv_heads = min(_weighted(random, KV_HEADS), MOST_HEADS // group)
    batch = _scaled(random, 1, 64)
    return Workload(
        name,
        batch,
        tuple(lengths),
        kv_heads * group,
        kv_heads,
        head_dim,
        tuple(kernel_size),
        causal=tuple(causal),
        learned_sink=random.random() < 0.2 and batch * math.prod(lengths) <= MOST_SUMMED and not dilated,
        stride=stride,
        dilation=dilation,
        value_dim=random.choice([dim for dim in (64, 128) if dim != head_dim]) if random.random() < 0.1 else None,
        registers=random.choice((1, 4, 16, 77, 256)) if random.random() < 0.15 else 0,
        dtype=_weighted(random, DTYPES),
        periodic=tuple(periodic),
        land=rank > 1 and random.random() < 0.1,
    )


def _weighted(random: Random, weights: dict[Any, int]) -> Any:
    return random.choices(list(weights), list(weights.values()))[0]


def _scaled(random: Random, low: int, high: int) -> int:
    """An integer whose order of magnitude is uniform."""
    return round(2 ** random.uniform(math.log2(low), math.log2(high)))


def _length(random: Random, low: int, high: int) -> int:
    """Half of the lengths are multiples of 8, as most models have them, where such a one is not too small."""
    length = _scaled(random, low, high)
    return length // 8 * 8 if length // 8 * 8 >= low and random.random() < 0.5 else length
