"""Tiles and chunks of the kernels for windows between small and large on compute capability 9.0; none needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from helpers import Case, make_inputs
from hypothesis import given, settings
from problems import problem_of_image, with_registers

pytest.importorskip("triton.experimental.gluon")

from test_sm90_large import call_of
from test_sm90_medium import INSIDE
from test_sm90_small import problems

from natten_layers.geometry import query_bounds, window_bounds
from natten_layers.kernels.host.problem import Problem, contiguous
from natten_layers.kernels.sm90 import large_tiling, medium_tiling


@settings(deadline=None)
@given(problems())
def test_tiles_and_chunks_stay_inside_an_image(problem: Problem) -> None:
    """Tiles have 64 rows, chunks as many rows as a matrix instruction needs, and none reaches into the next image."""
    configs = (
        (medium_tiling.forward_tile_config(problem), window_bounds),
        (medium_tiling.dq_tile_config(problem), window_bounds),
        (medium_tiling.dkv_tile_config(problem), query_bounds),
    )
    for config, bounds in configs:
        if config is None:
            assert problem.rank == 3
            continue
        assert prod(config.tile) * config.pack == 64
        assert problem.group % config.pack == problem.group % config.chunk_pack == 0
        assert 1 in (config.pack, config.chunk_pack)
        if problem.query.shape[0] == 1:
            continue  # TMA neither reads nor writes behind the last frame of the only image
        assert problem.lengths[0] % config.tile[0] == 0
        assert prod(config.chunk) * config.chunk_pack in (32, 64, 128)
        assert prod(config.chunk) * config.chunk_pack % config.slice == 0
        assert sum(config.columns) >= problem.query.shape[-1]
        length, kernel, stride, causal = problem.axes[0]
        first = torch.arange(0, length, config.tile[0])
        low, _ = bounds(first, length, kernel, stride, causal)
        _, high = bounds(first + config.tile[0] - 1, length, kernel, stride, causal)
        chunks = (high - low + config.chunk[0]) // config.chunk[0]
        assert int((low + chunks * config.chunk[0]).max()) <= length


@pytest.mark.parametrize("case", INSIDE, ids=str)
def test_chunks_inside_all_windows_are_told_from_others(case: Case) -> None:
    case = replace(case, dtype=torch.bfloat16)
    problem, _ = call_of(case, {name: t.detach() for name, t in make_inputs(case, "cpu").items()})
    narrow = case.head_dim <= 64
    for find, expected in (
        (medium_tiling.forward_tile_config, True),
        (medium_tiling.dq_tile_config, narrow),
        (medium_tiling.jvp_tile_config, narrow and problem.rank == 1),
    ):
        config = find(problem)
        assert config is not None
        assert config.skip_mask == expected


@pytest.mark.parametrize(
    ("kernel_size", "stride", "causal", "chunk", "expected"),
    [
        # Two tiles see keys 0 to 12 and 3 to 15; all of their rows see 2 to 10 and 5 to 13: one chunk of four in each.
        (11, 1, False, 4, 1 / 4),
        # Causal, they see 0 to 7 and 0 to 15, and all rows only 0, and 5 to 8: one chunk of two in four and eight.
        (11, 1, True, 2, 1 / 12),
        # With a stride of 8 all rows of a tile see the same 8 keys.
        (8, 8, False, 4, 1.0),
    ],
)
def test_share_of_chunks_inside_all_windows(
    kernel_size: int, stride: int, causal: bool, chunk: int, expected: float
) -> None:
    axes = ((1, 1, 1, False), (1, 1, 1, False), (16, kernel_size, stride, causal))
    share = large_tiling.inside_share(axes, (1, 1, 8), (1, 1, chunk), (window_bounds,) * 3)
    assert share == pytest.approx(expected)


@pytest.mark.parametrize(
    ("dim", "columns"), [(8, (16,)), (40, (32, 16)), (64, (64,)), (72, (64, 16)), (104, (64, 32, 16)), (120, (128,))]
)
def test_columns_are_divided_into_powers_of_two(
    monkeypatch: pytest.MonkeyPatch, dim: int, columns: tuple[int, ...]
) -> None:
    heads = contiguous((2, 64, 64, 4, dim))
    assert medium_tiling.columns_of(problem_of_image(monkeypatch, query=heads, key=heads, value=heads)) == columns


def test_chunks_are_longer_where_that_adds_hardly_any_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kernel_size: int, **changes: Any) -> int:
        layout = contiguous((8, 128, 128, 8, 64))
        image = {"query": layout, "key": layout, "value": layout, "kernel_size": (kernel_size,) * 2}
        config = medium_tiling.forward_tile_config(problem_of_image(monkeypatch, **{**image, **changes}))
        assert config is not None
        return prod(config.chunk)

    half = {"dtype": torch.float16}
    assert chunk(21, **half) == 128
    assert chunk(15, **half) == 64  # a fifth more scores
    assert chunk(21, **half, key_mask=contiguous((8, 128, 128, 1, 1))) == 64
    assert chunk(21) == 64  # bfloat16, where no maxima are found


def test_programs_with_register_tokens_leave_room_for_as_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 65536 hardware registers of a multiprocessor, four programs of four warps have 128 a thread, five 96."""
    finders = medium_tiling.forward_tile_config, medium_tiling.dq_tile_config
    for dim, most in ((64, (96, 128)), (72, (168, 168))):
        problem = problem_of_image(monkeypatch, **with_registers(16, 8, dim), kernel_size=(13, 13))
        for find, most_registers in zip(finders, most, strict=True):
            config = find(problem)
            assert config is not None
            assert config.maxnreg == most_registers
