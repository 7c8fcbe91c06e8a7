"""Chunks of several query heads, from which medium windows' gradients of keys and values come on compute capability
9.0: the gradients against the fp64 oracle, and how many heads a chunk has.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil, prod
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Case, assert_close, make_inputs, oracle, run
from problems import problem_of_image, problem_of_text

pytest.importorskip("triton.experimental.gluon")

from test_sm90_large import needs_device

from natten_layers.geometry import window_bounds
from natten_layers.kernels import dispatch
from natten_layers.kernels.dispatch import Question
from natten_layers.kernels.host.problem import Problem, contiguous, layout
from natten_layers.kernels.host.tiling import Axis, Box
from natten_layers.kernels.host.tuned import override
from natten_layers.kernels.sm90 import medium_backward, medium_pair_gradients, medium_tiling, variants
from natten_layers.kernels.sm90.descriptors import chunk_boxes
from natten_layers.kernels.sm90.medium_tiling import MediumTileConfig


def with_channels(dim: int, case: Case) -> Case:
    return replace(case, head_dim=dim, value_dim=dim)


# Cases that kernels of fp32 compute, too.
PLAIN = (
    with_channels(64, Case("2d-group-2", (20, 27), (9, 7), heads=4, kv_heads=2)),
    with_channels(32, Case("2d-group-3", (20, 27), (9, 7), heads=6, kv_heads=2)),
    with_channels(64, Case("3d-causal-group-4", (6, 19, 21), (4, 7, 7), 1, 1, (True, False, False), 4, 1)),
    with_channels(64, Case("2d-causal-strides-group-6", (33, 40), (21, 20), (2, 3), 1, (True, False), 6, 1, batch=3)),
    with_channels(32, Case("3d-frames-that-no-tile-divides-group-8", (7, 18, 19), 5, heads=8, kv_heads=1, batch=1)),
    with_channels(64, Case("1d-causal-group-16", (700,), 101, is_causal=True, heads=16, kv_heads=1)),
    with_channels(64, Case("2d-dilated-group-4", (30, 33), (5, 11), 1, (2, 3), heads=12, kv_heads=3)),
    with_channels(64, Case("2d-ring-group-4", (19, 40), (7, 11), heads=8, kv_heads=2, is_periodic=(False, True))),
    with_channels(32, Case("3d-torus-group-8", (9, 11, 13), (3, 5, 7), heads=8, kv_heads=1, batch=1, is_periodic=True)),
    with_channels(32, Case("2d-window-of-the-whole-image-group-8", (7, 9), (7, 9), heads=8, kv_heads=1)),
)
MORE = (
    with_channels(80, Case("3d-strides-group-8", (5, 17, 18), (3, 5, 5), (1, 2, 1), heads=8, kv_heads=1)),
    with_channels(96, Case("2d-group-6", (33, 40), (13, 9), heads=6, kv_heads=1)),
    with_channels(112, Case("2d-dilated-sink-group-2", (30, 33), (5, 11), 1, (2, 3), heads=6, sink="zero", kv_heads=3)),
    with_channels(128, Case("1d-causal-group-4", (700,), 101, is_causal=True, heads=8, kv_heads=2, batch=1)),
    with_channels(128, Case("2d-group-16", (20, 27), (9, 7), heads=16, kv_heads=1, sink="learned")),
    with_channels(72, Case("2d-torus-stride-registers-group-2", (22, 25), (9, 8), (2, 3), heads=4, kv_heads=2,
                           is_periodic=True, registers=20)),
    with_channels(64, Case("3d-causal-100-registers-group-4", (6, 19, 21), (4, 7, 7), 1, 1, (True, False, False), 4, 1,
                           registers=100)),
    with_channels(64, Case("2d-mask-group-4", (20, 27), (9, 7), heads=8, kv_heads=2, seen=0.5)),
    with_channels(32, Case("2d-nothing-seen-group-2", (9, 14), (5, 7), heads=2, kv_heads=1, seen=0.0)),
    with_channels(96, Case("3d-masked-torus-group-2", (9, 11, 13), (3, 5, 7), heads=4, kv_heads=2, is_periodic=True,
                           batch=1, seen=0.6)),
    with_channels(64, Case("2d-finer-group-4", (22, 41), (5, 7), heads=8, kv_heads=2, key_spatial=(11, 20))),
    with_channels(80, Case("2d-coarser-group-8", (9, 14), (8, 5), heads=8, kv_heads=1, key_spatial=(36, 45))),
    with_channels(128, Case("3d-both-group-16", (4, 18, 9), (3, 5, 5), heads=16, kv_heads=1, batch=1,
                            key_spatial=(7, 9, 19))),
)  # fmt: skip
HALVES = [torch.bfloat16, torch.float16]


def powers_that_divide(group: int) -> list[int]:
    return [pack for pack in (1, 2, 4, 8, 16) if group % pack == 0]


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*product(PLAIN + MORE, HALVES), *product(PLAIN, [torch.float32])],
    ids=str,
)
def test_gradients_match_the_oracle_with_any_heads_a_chunk(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(case, dtype=dtype)
    leaves = make_inputs(case, "cuda")
    expected, peer = oracle(case, leaves), run(case, leaves, "eager")
    wide = dtype == torch.float32
    module, name = (medium_pair_gradients, variants.MEDIUM_PAIRS) if wide else (medium_backward, variants.MEDIUM)
    packs = powers_that_divide(case.heads // case.kv_heads)
    for pack in packs:
        taken = take_chunks_of(pack, module, monkeypatch)
        with override(variants=dict.fromkeys(("forward", "backward_query", "backward_key"), name)):
            assert_close(case, run(case, leaves, "fused"), expected, peer)
        assert [config.chunk_pack for config in taken] == [pack]


def take_chunks_of(pack: int, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[MediumTileConfig]:
    """Make calls take chunks of so many heads, whatever is best for them; returns a list of what they take."""
    taken: list[MediumTileConfig] = []
    compute = key_gradients[module]

    def run_with(_: MediumTileConfig, problem: Problem, *arguments: Any) -> Any:
        config = medium_tiling.dkv_tile_config(problem, pack)
        assert config is not None
        taken.append(config)
        return compute(config, problem, *arguments)

    monkeypatch.setattr(module, "key_gradients", run_with)
    return taken


key_gradients = {module: module.key_gradients for module in (medium_backward, medium_pair_gradients)}


# --- Plans, without a GPU


def grouped(monkeypatch: pytest.MonkeyPatch, group: int, dim: int = 64, **changes: Any) -> Problem:
    """A 13x13 window over eight images of 128x128 with so many query heads for one KV head."""
    query, key = (contiguous((8, 128, 128, h, dim)) for h in (group, 1))
    image = {"query": query, "key": key, "value": key, "kernel_size": (13, 13)}
    return problem_of_image(monkeypatch, **{**image, **changes})


def video_of(monkeypatch: pytest.MonkeyPatch, group: int) -> Problem:
    """A video of 16x32x32 tokens with a window of 4x7x7, causal in time."""
    query, key = (contiguous((1, 16, 32, 32, h, 64)) for h in (group, 1))
    axes = {"kernel_size": (4, 7, 7), "stride": (1,) * 3, "dilation": (1,) * 3, "is_causal": (True, False, False)}
    return problem_of_text(monkeypatch, query=query, key=key, value=key, **axes)


def key_plan(problem: Problem) -> MediumTileConfig:
    with override(variants={"backward_key": variants.MEDIUM}):
        return dispatch.choose("backward_key", Question(problem, True, contiguous(problem.query.shape))).plan


@pytest.mark.parametrize(
    ("group", "tile", "chunk", "pack"),
    [
        (1, (1, 4, 16), (1, 16, 4), 1),
        (2, (1, 4, 16), (1, 8, 4), 2),
        (3, (1, 4, 16), (1, 16, 4), 1),
        # 20x20 queries see 8x8 keys of the middle: 25 chunks of 4x4 hold them and no others, nine of 8x8 half as many
        # more.
        (4, (1, 8, 8), (1, 4, 4), 4),
        (6, (1, 4, 16), (1, 8, 4), 2),
        (12, (1, 8, 8), (1, 4, 4), 4),
    ],
)
def test_chunks_have_the_heads_with_which_the_fewest_scores_are_computed(
    monkeypatch: pytest.MonkeyPatch, group: int, tile: Box, chunk: Box, pack: int
) -> None:
    for dim, slice_ in ((64, 32), (96, 64)):
        config = key_plan(grouped(monkeypatch, group, dim))
        assert (config.tile, config.pack, config.chunk, config.chunk_pack) == (tile, 1, chunk, pack)
        assert config.slice == slice_


def test_heads_that_save_nothing_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """319 queries see 64 keys of a causal window of 256: 320 in five chunks of 64, and in 80 of 4 for 16 heads."""
    query, key = (contiguous((16, 2048, h, 64)) for h in (16, 1))
    problem = problem_of_text(monkeypatch, query=query, key=key, value=key, kernel_size=(256,))
    assert key_plan(problem).chunk_pack == 1


def test_biases_keep_heads_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_plan(grouped(monkeypatch, 4, has_bias=True)).chunk_pack == 1
    assert key_plan(grouped(monkeypatch, 4, key_mask=contiguous((8, 128, 128, 1, 1)))).chunk_pack == 4


def test_overrides_choose_the_heads_of_chunks_where_these_can_have_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = grouped(monkeypatch, 4)
    for pack, expected in ((1, 1), (2, 2), (4, 4), (8, 4)):
        with override(pack=pack, variants={"backward_key": variants.MEDIUM}):
            plan = dispatch.choose("backward_key", Question(problem, True, contiguous(problem.query.shape))).plan
        assert plan.chunk_pack == expected


def test_heads_of_tiles_of_queries_are_chosen_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = grouped(monkeypatch, 4)
    for find in (medium_tiling.forward_tile_config, medium_tiling.dq_tile_config, medium_tiling.jvp_tile_config):
        for pack in (1, 4):
            config = find(problem, pack)
            assert config is not None
            assert (config.pack, config.chunk_pack) == (pack, 1)


def computed(axis: Axis, tile: int, chunk: int) -> int:
    """Scores along an axis, counted query by query."""
    length, kernel, stride, causal = axis
    low, high = window_bounds(torch.arange(length), length, kernel, stride, causal)
    count = 0
    for first in range(0, length, tile):
        sees = (low < first + tile) & (high >= first)
        seen = sees.nonzero().flatten()
        count += tile * chunk * ceil(int(seen[-1] - seen[0] + 1) / chunk)
    return count


def boxes_of(size: int, limits: Box) -> list[Box]:
    sides = [2**i for i in range(size.bit_length())]
    return [x for x in product(sides, repeat=3) if prod(x) == size and all(map(int.__le__, x, limits))]


@pytest.mark.parametrize(("pack", "corner"), [(1, (3, 1, 2, 5, 0)), (4, (1, 2, 5, 4, 0))])
def test_rows_of_a_chunk_are_those_of_a_tile_of_queries(pack: int, corner: tuple[int, ...]) -> None:
    """What TMA loads of the second image, from position (2, 5) on: head by head of one position after the other."""
    query, chunk = torch.randn(2, 16, 16, 8, 32), (1, 4, 8 // pack)
    boxes = chunk_boxes(layout(query), chunk, pack)
    start = sum(i * step for i, step in zip(corner, boxes["strides"], strict=True))
    rows = query.as_strided(boxes["block_shape"], boxes["strides"], start).reshape(-1, 32)
    first_head = 3 if pack == 1 else 4
    for row, found in enumerate(rows):
        position = row // pack
        h, w = 2 + position // chunk[2], 5 + position % chunk[2]
        assert torch.equal(found, query[1, h, w, first_head + row % pack])
    assert len(rows) == 32


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8])
def test_no_other_chunks_have_fewer_scores(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    problem = video_of(monkeypatch, group)
    config = medium_tiling.dkv_tile_config(problem)
    assert config is not None

    def scores(tile: Box, chunk: Box) -> int:
        return prod(computed(*sides) for sides in zip(problem.axes, tile, chunk, strict=True))

    sizes = {pack: (boxes_of(64, problem.lengths), boxes_of(64 // pack, problem.lengths))
             for pack in powers_that_divide(group)}  # fmt: skip
    axes = [{(t, c): computed(axis, t, c) for t, c in product([2**i for i in range(7)], repeat=2)}
            for axis in problem.axes]  # fmt: skip
    fewest = {
        pack: min(prod(x[t, c] for x, t, c in zip(axes, tile, chunk, strict=True)) for tile, chunk in product(*boxes))
        for pack, boxes in sizes.items()
    }
    assert scores(config.tile, config.chunk) == min(fewest.values())
    assert config.chunk_pack == min(pack for pack, least in fewest.items() if least == min(fewest.values()))
    assert prod(config.chunk) * config.chunk_pack == 64
