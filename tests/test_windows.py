"""The kernels' computation of windows against the host's, for every short axis, per token and per tile."""

# Triton's language is Python only in syntax, so type checks do not apply to kernels.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from itertools import product
from math import ceil

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from natten_layers.geometry import class_length, query_bounds, window_bounds
from natten_layers.kernels.portable import bias_gradient, windows

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# These tests run interpreted without a GPU. With one, they run compiled and have the mark "gpu".
pytestmark = [pytest.mark.gpu] if ON_GPU else []
LONGEST = 15


@triton.jit
def bounds_kernel(Index, Length, Kernel, Stride, First, Last, INVERSE: tl.constexpr, CAUSAL: tl.constexpr,
                  PERIODIC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Compute the bounds of many windows, one element each."""
    n = tl.arange(0, BLOCK)
    index, length, kernel, stride = tl.load(Index + n), tl.load(Length + n), tl.load(Kernel + n), tl.load(Stride + n)
    if INVERSE:
        first, last = windows.query_bounds(index, length, kernel, stride, CAUSAL, PERIODIC)
    else:
        first, last = windows.window_bounds(index, length, kernel, stride, CAUSAL, PERIODIC)
    tl.store(First + n, first)
    tl.store(Last + n, last)


def on_device(columns: Tensor, inverse: bool, causal: bool, periodic: bool) -> tuple[Tensor, Tensor]:
    """The first and last key for ``(index, length, kernel, stride)``, the rows of ``columns``."""
    size = triton.next_power_of_2(len(columns))
    padded = torch.ones(4, size, dtype=torch.int32)
    padded[:, : len(columns)] = columns.t()
    first, last = torch.empty(2, size, dtype=torch.int32, device=DEVICE)
    bounds_kernel[(1,)](*padded.to(DEVICE), first, last, INVERSE=inverse, CAUSAL=causal, PERIODIC=periodic, BLOCK=size)
    return first[: len(columns)].cpu().long(), last[: len(columns)].cpu().long()


@pytest.mark.parametrize(("causal", "periodic"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("inverse", [False, True])
def test_bounds_on_the_device_are_those_of_the_host(inverse: bool, causal: bool, periodic: bool) -> None:
    """Bounds agree for every token of every axis up to a length; residue classes of dilated axes are such axes too."""
    bounds = query_bounds if inverse else window_bounds
    axes = [(n, k, s) for n in range(1, LONGEST + 1) for k in range(1, n + 1) for s in range(1, k + 1)]
    rows = [(i, *axis) for axis in axes for i in range(axis[0])]
    first, last = on_device(torch.tensor(rows), inverse, causal, periodic)
    host = [bounds(torch.arange(n), n, k, s, causal, periodic) for n, k, s in axes]
    expected_first, expected_last = (torch.cat(ends) for ends in zip(*host, strict=True))
    assert torch.equal(first, expected_first)
    assert torch.equal(last, expected_last)


@triton.jit
def grid_kernel(Index, Length, KeyLength, Kernel, First, Last, INVERSE: tl.constexpr, PERIODIC: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """As ``bounds_kernel``, of queries on another grid than keys."""
    n = tl.arange(0, BLOCK)
    index, length, keys, kernel = tl.load(Index + n), tl.load(Length + n), tl.load(KeyLength + n), tl.load(Kernel + n)
    if INVERSE:
        first, last = windows.query_bounds(index, length, kernel, 1, False, PERIODIC, keys)
    else:
        first, last = windows.window_bounds(index, length, kernel, 1, False, PERIODIC, keys)
    tl.store(First + n, first)
    tl.store(Last + n, last)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_bounds_on_another_grid_are_those_of_the_host(inverse: bool, periodic: bool) -> None:
    """On short axes, and on long ones, whose lengths have a product beyond 32 bits."""
    bounds = query_bounds if inverse else window_bounds
    axes = [(n, keys, k) for n in range(1, 9) for keys in range(1, 9) for k in range(1, keys + 1)]
    indices = [torch.arange(keys if inverse else n) for n, keys, _ in axes]
    for n, keys in ((100_000, 70_000), (3, 1 << 20), (1 << 20, 3)):
        axes.append((n, keys, min(keys, 1000)))
        index = torch.linspace(0, 1, 50, dtype=torch.float64) * ((keys if inverse else n) - 1)
        indices.append(index.long())
    host = [bounds(index, n, k, 1, False, periodic, keys) for index, (n, keys, k) in zip(indices, axes, strict=True)]
    rows = torch.cat(
        [torch.stack([i, *(torch.full_like(i, x) for x in axis)]) for i, axis in zip(indices, axes, strict=True)], 1
    )
    size = triton.next_power_of_2(rows.shape[1])
    padded = torch.ones(4, size, dtype=torch.int32)
    padded[:, : rows.shape[1]] = rows
    first, last = torch.empty(2, size, dtype=torch.int32, device=DEVICE)
    grid_kernel[(1,)](*padded.to(DEVICE), first, last, INVERSE=inverse, PERIODIC=periodic, BLOCK=size)
    for found, ends in zip((first, last), zip(*host, strict=True), strict=True):
        assert torch.equal(found[: rows.shape[1]].cpu().long(), torch.cat(ends))


@triton.jit
def tiles_kernel(Residue, Count, Origin, length, dilation, tiles, TILE: tl.constexpr):
    _, residue, count, origin = windows.spatial_tile(tl.program_id(0), length, dilation, tiles, TILE)
    for AXIS in tl.static_range(3):
        tl.store(Residue + tl.program_id(0) * 3 + AXIS, residue[AXIS])
        tl.store(Count + tl.program_id(0) * 3 + AXIS, count[AXIS])
        tl.store(Origin + tl.program_id(0) * 3 + AXIS, origin[AXIS])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
def test_tiles_have_every_token_of_every_residue_class_once(dilation: int, axis: int) -> None:
    length, tile = 11, 2
    classes = [class_length(length, dilation, r) for r in range(dilation)]
    tiles = dilation * -(-max(classes) // tile)
    residue, count, origin = torch.empty(3, tiles, 3, dtype=torch.int32, device=DEVICE)
    on_axis = [tuple(n if i == axis else 1 for i in range(3)) for n in (length, dilation, tiles, tile)]
    tiles_kernel[(tiles,)](residue, count, origin, *on_axis[:3], TILE=on_axis[3])
    found = [
        r + index * dilation
        for r, n, start in zip(*(x[:, axis].tolist() for x in (residue, count, origin)), strict=True)
        for index in range(start, min(start + tile, n))
    ]
    assert sorted(found) == list(range(length))
    assert count[:, axis].tolist() == [classes[r] for r in residue[:, axis].tolist()]


@triton.jit
def inside_kernel(Origin, Lo, Hi, Out, AXIS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    origin, lo, hi = tl.load(Origin + n), tl.load(Lo + n), tl.load(Hi + n)
    zero = origin * 0
    if AXIS == 0:
        inside = windows.chunk_inside((origin, zero, zero), (lo, zero, zero), (hi, zero, zero), CHUNK)
    elif AXIS == 1:
        inside = windows.chunk_inside((zero, origin, zero), (zero, lo, zero), (zero, hi, zero), CHUNK)
    else:
        inside = windows.chunk_inside((zero, zero, origin), (zero, zero, lo), (zero, zero, hi), CHUNK)
    tl.store(Out + n, inside.to(tl.int32))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_chunk_needs_no_mask_if_and_only_if_every_query_sees_all_of_it(axis: int) -> None:
    side = 4
    rows = list(product(range(8), range(8), range(8)))  # first key of a chunk, first and last key that all queries see
    origin, lo, hi = torch.tensor(rows, dtype=torch.int32).t().contiguous().to(DEVICE)
    out = torch.empty_like(origin)
    chunk = tuple(side if i == axis else 1 for i in range(3))
    inside_kernel[(1,)](origin, lo, hi, out, AXIS=axis, CHUNK=chunk, BLOCK=len(rows))
    expected = [all(first <= key <= last for key in range(start, start + side)) for start, first, last in rows]
    assert out.bool().tolist() == expected


@triton.jit
def around_kernel(
    Axis, First, Count, TILE: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr, PERIODIC: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, SIZE)
    near, inner_lo, inner_hi = tl.load(Axis + row), tl.load(Axis + SIZE + row), tl.load(Axis + 2 * SIZE + row)
    length, kernel = tl.load(Axis + 3 * SIZE + row), tl.load(Axis + 4 * SIZE + row)
    dilation, tiles = tl.load(Axis + 5 * SIZE + row), tl.load(Axis + 6 * SIZE + row)
    first, count = bias_gradient.tiles_around(
        near, near + CHUNK - 1, inner_lo, inner_hi, length, kernel, dilation, tiles, TILE, CAUSAL, PERIODIC
    )
    tl.store(First + row, first)
    tl.store(Count + row, count)


@pytest.mark.parametrize(("tile", "chunk"), [(1, 4), (4, 2), (8, 16)])
@pytest.mark.parametrize(("causal", "periodic"), [(False, False), (True, False), (False, True)])
def test_every_key_lies_in_a_chunk_of_which_the_tile_is_visited(
    tile: int, chunk: int, causal: bool, periodic: bool
) -> None:
    """On all short axes. On plain ones hardly any other tile is visited."""
    chunks, seen = [], []
    for n, d in product((*range(1, 14), 21, 30), (1, 2, 3)):
        if periodic and n % d:
            continue
        for k, s in product(range(1, n // d + 1), (1, 2, 3)):
            axis = n // d, k, min(s, k), causal
            start, steps, lo, hi = bias_gradient.surroundings_on_axis(n, axis, d, periodic, tile, chunk)
            tiles = d * ceil(ceil(n / d) / tile)
            wanted = [[False] * tiles for _ in range(steps)]
            for i in range(n):
                first, last = window_bounds(i // d, class_length(n, d, i % d), k, axis[2], causal, periodic)
                number = i // d // tile * d + i % d
                for key in range(first, last + 1):
                    wanted[(key - i // d // tile * tile - start) // chunk][number] = True
            chunks += [(start + step * chunk, lo, hi, n, k, d, tiles) for step in range(steps)]
            seen += [(w, s == d == 1) for w in wanted]
    size = triton.next_power_of_2(len(chunks))
    rows = torch.ones(7, size, dtype=torch.int32)
    rows[:, : len(chunks)] = torch.tensor(chunks).T
    first, count = torch.empty(2, size, dtype=torch.int32, device=DEVICE)
    around_kernel[(1,)](rows.to(DEVICE), first, count, tile, chunk, causal, periodic, size)
    others = total = 0
    for i, n, (wanted, is_plain) in zip(first.tolist(), count.tolist(), seen, strict=False):
        visited = [i <= number < i + n for number in range(len(wanted))]
        assert all(v or not w for v, w in zip(visited, wanted, strict=True))
        others, total = others + is_plain * (n - sum(wanted)), total + is_plain * sum(wanted)
    assert others < total / 6, (others, total)
