"""The kernel for large windows on compute capability 9.0 against the fp64 oracle and the portable kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any, Literal

import pytest
import torch
from helpers import (
    FLOOR,
    Case,
    Result,
    arguments,
    assert_close,
    assert_nan_stays,
    enlarge,
    error,
    key_mask,
    make_inputs,
    oracle,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem_of_image, problem_of_text
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from natten_layers import attention_state, explain, neighborhood_attention, neighborhood_attention_varlen
from natten_layers.geometry import make_window, query_bounds, window_bounds
from natten_layers.kernels.dispatch import VARIANTS, Direction, Question, choose, choose_backward
from natten_layers.kernels.host.problem import (
    Cotangents,
    Inputs,
    Layout,
    Options,
    Problem,
    contiguous,
    layout,
    problem_of,
)
from natten_layers.kernels.host.tiling import Box, Kind, TileConfig, column_parts
from natten_layers.kernels.host.tuned import forget, override
from natten_layers.kernels.portable import dkv, dq, forward
from natten_layers.kernels.sm90 import (
    large_dkv,
    large_dq,
    large_forward,
    large_registers,
    large_repair,
    large_statistics,
    large_tiling,
    packed_repair,
    support,
    thresholds,
    variants,
)
from natten_layers.kernels.sm90.large_tiling import LargeTileConfig, Plan
from natten_layers.kernels.sm90.medium_tiling import MediumTileConfig
from natten_layers.kernels.sm90.products import sum_widths
from natten_layers.operations import Impl

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = large_forward, large_dq, large_dkv, large_registers
HAS_DEVICE = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_device = pytest.mark.skipif(not HAS_DEVICE, reason="compute capability 9.0 only")

CASES = (
    Case("2d", (40, 48), (24, 32), head_dim=128, value_dim=128),
    Case("2d-odd-gqa-sink", (37, 53), (23, 31), heads=4, kv_heads=2, head_dim=128, value_dim=128, sink="learned"),
    Case(
        "2d-stride-zero-sink", (41, 50), (24, 32), (8, 16), heads=3, kv_heads=3, head_dim=64, value_dim=64, sink="zero"
    ),
    Case("2d-full-causal-axis", (40, 48), (40, 48), 1, 1, (False, True), head_dim=128, value_dim=128),
    Case(
        "1d-causal-gqa-sink",
        (1000,),
        600,
        is_causal=True,
        heads=8,
        kv_heads=2,
        head_dim=128,
        value_dim=128,
        sink="learned",
    ),
    Case("1d-group-3", (1500,), 700, heads=6, kv_heads=2, head_dim=64, value_dim=64),
    Case(
        "1d-registers",
        (1100,),
        600,
        is_causal=True,
        heads=6,
        kv_heads=2,
        head_dim=128,
        value_dim=128,
        registers=70,
        sink="zero",
    ),
    Case("3d-gqa", (10, 17, 19), (6, 10, 12), heads=2, kv_heads=1, head_dim=128, value_dim=128, batch=1),
    Case("3d-causal", (12, 16, 18), (7, 9, 10), 1, 1, (True, False, False), 4, 1, head_dim=128, value_dim=128),
    Case(
        "1d-wide-causal-gqa-sink",
        (700,),
        300,
        is_causal=True,
        heads=8,
        kv_heads=2,
        head_dim=256,
        value_dim=256,
        sink="learned",
    ),
    Case("2d-wide-registers", (37, 41), (15, 17), heads=3, kv_heads=3, head_dim=256, value_dim=256, registers=5),
    Case("3d-wide-padded", (9, 12, 18), (5, 7, 8), heads=2, kv_heads=1, head_dim=192, value_dim=192),
    Case("1d-values-narrower", (900,), 257, is_causal=True, heads=4, kv_heads=2, head_dim=192, value_dim=128),
    Case("2d-values-wider", (30, 41), (17, 15), heads=2, kv_heads=2, head_dim=64, value_dim=128),
    Case("2d-padded-80-sink", (37, 41), 21, heads=4, kv_heads=2, head_dim=80, value_dim=80, sink="zero"),
    Case("1d-padded-96-gqa", (1000,), 400, is_causal=True, heads=4, kv_heads=1, head_dim=96, value_dim=96),
    Case("1d-padded-112-gqa", (1000,), 400, is_causal=True, heads=4, kv_heads=1, head_dim=112, value_dim=112),
    Case("2d-padded-72-values-112", (37, 41), 21, heads=2, kv_heads=2, head_dim=72, value_dim=112),
    Case("1d-wide-padded-176", (900,), 257, heads=2, kv_heads=1, head_dim=176, value_dim=160),
    Case("3d-padded-40", (9, 12, 18), (5, 7, 8), heads=2, kv_heads=2, head_dim=40, value_dim=40),
    Case("2d-narrow", (40, 48), (24, 20), heads=2, kv_heads=2, head_dim=32, value_dim=32),
    Case(
        "2d-many-registers",
        (37, 53),
        (23, 31),
        heads=4,
        kv_heads=2,
        head_dim=128,
        value_dim=128,
        registers=300,
        sink="learned",
    ),
    Case("2d-full-registers", (40, 48), (40, 48), head_dim=128, value_dim=128, registers=128),
    Case("3d-registers", (10, 17, 19), (6, 10, 12), heads=2, kv_heads=1, head_dim=128, value_dim=128, registers=200),
    Case(
        "1d-values-narrower-registers",
        (900,),
        257,
        is_causal=True,
        heads=4,
        kv_heads=2,
        head_dim=192,
        value_dim=128,
        registers=70,
    ),
)
# Groups of warps skip the chunks that their own part of a tile does not see; parts lie beyond the end of some axis.
SKIPPING = (
    Case("3d-skip", (13, 27, 25), 5, heads=2, kv_heads=2, head_dim=64, value_dim=64, batch=1),
    Case("3d-skip-causal-gqa-sink", (9, 18, 30), (4, 7, 7), 1, 1, (True, False, False), 4, 1, head_dim=64, value_dim=64,
         sink="learned"),
    Case("3d-skip-stride", (12, 20, 33), (5, 7, 9), (1, 2, 3), heads=2, kv_heads=1, head_dim=64, value_dim=64,
         batch=1),
    Case("2d-skip-gqa", (45, 70), (13, 11), heads=6, kv_heads=3, head_dim=64, value_dim=64, sink="zero"),
    Case("2d-skip-128", (45, 50), 13, heads=2, kv_heads=2, head_dim=128, value_dim=128),
    Case("2d-skip-80", (37, 41), 11, heads=2, kv_heads=2, head_dim=80, value_dim=80),
    Case("2d-skip-40", (53, 39), (9, 17), heads=2, kv_heads=2, head_dim=40, value_dim=40),
    Case("2d-skip-registers", (45, 70), (13, 11), heads=6, kv_heads=3, head_dim=64, value_dim=64, registers=129,
         sink="zero"),
    Case("2d-skip-80-one-register", (37, 41), 11, heads=2, kv_heads=2, head_dim=80, value_dim=80, registers=1),
    Case("3d-skip-registers", (9, 18, 30), (4, 7, 7), 1, 1, (True, False, False), 4, 1, head_dim=64, value_dim=64,
         registers=33, sink="learned"),
)  # fmt: skip

REGISTERS = tuple(case for case in (*CASES, *SKIPPING) if case.registers > 128)


def call_of(case: Case, tensors: dict[str, Tensor]) -> tuple[Problem, tuple[Any, ...]]:
    """The problem of a case, and the arguments of both kernels' launchers."""
    registers = tensors.get("additional_keys"), tensors.get("additional_values")
    mask = key_mask(case, tensors["query"].device)
    inputs = Inputs(tensors["query"], tensors["key"], tensors["value"], *registers, tensors.get("sink"), mask)
    w = case.window
    sink, scale = 0.0 if case.sink == "zero" else None, case.head_dim**-0.5
    options = Options(sink, w.kernel_size, w.stride, w.dilation, w.is_causal, scale, w.is_periodic)
    problem = problem_of(inputs, options)
    return problem, (problem, inputs, options, True)


def planned(direction: Direction, problem: Problem, **question: Any) -> Any:
    """The plan of the sm_90 kernel that computes a call, or None if the portable kernel computes it."""
    choice = choose(direction, Question(problem, **question))
    return None if choice.variant is VARIANTS[direction][-1] else choice.plan


State = tuple[Tensor, Tensor | None, Tensor | None]


def assert_oracle(case: Case, leaves: dict[str, Tensor], state: State, with_stats: bool = True) -> None:
    """Compare an output and its statistics, if it has them, with fp64."""
    assert_near(case, oracle(case, leaves), state, with_stats)


def assert_near(case: Case, wide: Result, state: State, with_stats: bool) -> None:
    out, row_max, row_sum = state
    assert (row_max is not None) == (row_sum is not None) == with_stats
    assert error(out, wide.out) < (4e-3 if case.dtype == torch.bfloat16 else 5e-4)
    if row_max is not None and row_sum is not None:
        assert error(row_max + row_sum.log(), wide.lse) < 2e-6


def attend_large(problem: Problem, arguments: tuple[Any, ...], with_stats: bool) -> State:
    """The forward pass of large windows, as calls have it that ask for statistics and others."""
    config = large_tiling.forward_tile_config(problem, with_stats=with_stats)
    return large_forward.forward(config, *arguments[:-1], with_stats=with_stats)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES + SKIPPING, ids=str)
def test_matches_the_oracle(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    leaves = make_inputs(case, "cuda")
    problem, arguments = call_of(case, {name: t.detach() for name, t in leaves.items()})
    assert variants.LARGE_FORWARD.supports(Question(problem)) is None
    wide = oracle(case, leaves)
    for with_stats in (True, False) if dtype == torch.bfloat16 else (True,):
        assert_near(case, wide, attend_large(problem, arguments, with_stats), with_stats)


THRESHOLDS = (
    "LARGE_KEY_ELEMENTS", "LARGE_KEY_ELEMENTS_WITH_REGISTERS", "LARGE_KEY_ELEMENTS_OF_NARROW_DQ", "PAIRS",
    "WIDE_WINDOW", "WIDE_PAIRS", "WIDE_WINDOW_BESIDE_DQ", "WIDE_PAIRS_BESIDE_DQ", "REGISTER_ELEMENTS",
    "REGISTER_PRODUCTS",
)  # fmt: skip


@pytest.fixture
def wherever_possible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the kernels for windows of any size, and those for medium windows for none."""
    with monkeypatch.context() as patch:
        for name in THRESHOLDS:
            patch.setattr(thresholds, name, 0)
        patch.setattr(thresholds, "MEDIUM_WINDOW", math.inf)
        forget()
        yield
    forget()


def test_the_thresholds_exist(wherever_possible: None) -> None:
    """The fixture sets them in tests that only a GPU runs; here it fails when one of them is renamed."""
    assert {getattr(thresholds, name) for name in THRESHOLDS} == {0}


@pytest.mark.usefixtures("wherever_possible")
@pytest.mark.parametrize("case", CASES + SKIPPING, ids=str)
def test_cases_take_these_kernels(case: Case) -> None:
    """What tests that only a GPU runs rely on: no other kernel computes dK and dV, whatever the thresholds are."""
    leaves = make_inputs(replace(case, dtype=torch.bfloat16), "meta")
    said = explain(**arguments(case, leaves), device="H200")
    assert {kernel.direction: kernel.name for kernel in said.kernels}["backward_key"] == variants.LARGE


@pytest.mark.gpu
@needs_device
@pytest.mark.usefixtures("wherever_possible")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES + SKIPPING, ids=str)
def test_gradients_match_the_oracle(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients match, also where all chunks of an axis or none need a mask, and two runs are equal bit by bit."""
    case = replace(case, dtype=dtype)
    leaves = make_inputs(case, "cuda")
    taken: list[TileConfig] = []
    compute = large_dkv.key_gradients
    monkeypatch.setattr(large_dkv, "key_gradients", lambda *args: taken.append(args[0]) or compute(*args))
    first, second = (run(case, leaves, "fused") for _ in range(2))
    assert len(taken) == 2
    assert_close(case, first, oracle(case, leaves), run(case, leaves, "eager"))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


@pytest.mark.gpu
@needs_device
@pytest.mark.usefixtures("wherever_possible")
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7], SKIPPING[0], SKIPPING[3], *REGISTERS], ids=str)
def test_any_number_of_programs_computes_every_tile(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs take tiles from an atomic counter, which must be reset in each replay of a CUDA graph too."""
    case = replace(case, dtype=torch.bfloat16)
    expected = run(case, make_inputs(case, "cuda"), "fused").tensors()
    leaves = make_inputs(case, "cuda")
    for programs in (1, 5):
        with monkeypatch.context() as patch:
            for module in KERNELS:
                patch.setattr(module, "multiprocessors", lambda device, count=programs: count)
                module.prepare.cache_clear()
            for name, tensor in run(case, leaves, "fused").tensors().items():
                assert torch.equal(tensor, expected[name]), (programs, name)
            problem, arguments = call_of(case, {name: t.detach() for name, t in leaves.items()})
            config = large_tiling.forward_tile_config(problem, with_stats=True)  # as where gradients are asked for
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = large_forward.forward(config, *arguments)[0]
        for _ in range(2):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected["out"]), programs
    for module in KERNELS:
        module.prepare.cache_clear()


@pytest.mark.gpu
@needs_device
def test_reads_views_of_a_fused_projection() -> None:
    case = replace(CASES[1], dtype=torch.bfloat16, sink="none")
    qkv = torch.randn(2, *case.spatial, 8, 128, device="cuda", dtype=torch.bfloat16)
    views: dict[str, Tensor] = dict(zip(("query", "key", "value"), qkv.split((4, 2, 2), -2), strict=True))
    problem, arguments = call_of(case, views)
    assert variants.LARGE_FORWARD.supports(Question(problem)) is None
    config = large_tiling.forward_tile_config(problem)
    copies = call_of(case, {name: t.contiguous() for name, t in views.items()})[1]
    for ours, expected in zip(
        large_forward.forward(config, *arguments), large_forward.forward(config, *copies), strict=True
    ):
        assert torch.equal(ours, expected)  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("with_stats", [False, True])
def test_nan_and_inf_reach_only_the_queries_that_see_them(with_stats: bool) -> None:
    case = replace(CASES[0], dtype=torch.bfloat16)
    tensors = {name: t.detach() for name, t in make_inputs(case, "cuda").items()}
    tensors["value"][0, 3, 4, 1, 7] = float("nan")
    tensors["key"][1, 39, 47, 0, 5] = float("inf")
    problem, arguments = call_of(case, tensors)
    ours = attend_large(problem, arguments, with_stats)[0]
    expected = forward.forward(forward.plan(problem, True), *arguments)[0]
    assert expected.isnan().any()
    assert torch.equal(ours.isnan(), expected.isnan())
    assert error(ours.nan_to_num(), expected.nan_to_num()) < 4e-3


VIDEOS = (
    Case("causal", (6, 12, 12), (6, 9, 9), is_causal=True, head_dim=128, value_dim=128, batch=3),
    Case("gqa-sink", (10, 17, 19), (6, 10, 12), heads=4, kv_heads=2, head_dim=128, value_dim=128, batch=3,
         sink="learned"),
    Case("odd", (9, 16, 18), (5, 9, 10), 1, 1, (False, True, False), head_dim=64, value_dim=64, batch=2),
    Case("image", (40, 48), (24, 32), head_dim=64, value_dim=64),
    Case("registers", (6, 12, 12), (6, 9, 9), heads=4, head_dim=64, value_dim=64, registers=70, batch=3),
)  # fmt: skip


@pytest.mark.gpu
@needs_device
@pytest.mark.usefixtures("wherever_possible")
@pytest.mark.parametrize("case", VIDEOS, ids=str)
def test_nan_reaches_no_other_image_and_no_other_head(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """For TMA, batch and time are one axis, so a video's last frame is followed by the next video's first."""
    case = replace(case, dtype=torch.bfloat16)
    taken: list[TileConfig] = []
    compute = large_dkv.key_gradients
    monkeypatch.setattr(large_dkv, "key_gradients", lambda *args: taken.append(args[0]) or compute(*args))
    assert_nan_stays(case, make_inputs(case, "cuda"))
    assert taken


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_of_a_batch_end_with_the_last_frame(causal: bool, skip: bool) -> None:
    """With a batch of one, chunks may extend beyond the last frame, which allows better shapes."""
    reached = []
    for frames, window in ((6, 6), (6, 3), (9, 5), (10, 6), (12, 7)):
        axes = tuple(zip((frames, 12, 18), (window, 9, 9), (1, 1, 1), (causal, False, True), strict=True))
        for columns, bounds, least in ((128, window_bounds, 1), (64, query_bounds, 4)):
            for batch in (1, 3):
                plans = (Plan(2, columns, 1.0, skip),)
                _, part, groups, chunk = large_tiling.best_boxes(axes, plans, 64, bounds, least, batch)
                assert chunk[2] >= least
                tile, ends = part[0] * groups[0], []
                for origin in range(0, frames, tile):
                    own = torch.arange(origin, min(origin + tile, frames))
                    low, high = bounds(own, frames, window, 1, causal)
                    count = -(-(int(high.max()) - int(low.min()) + 1) // chunk[0])
                    ends.append(int(low.min()) + count * chunk[0])
                assert batch == 1 or max(ends) <= frames, (axes, tile, chunk)
                reached.append(max(ends) > frames)
    assert any(reached)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_work_along_an_axis_is_what_groups_do(data: st.DataObject) -> None:
    """Chunks of a tile that a part sees, counted one by one, also where parts lie beyond the end of the axis."""
    draw = data.draw
    length = draw(st.integers(1, 40))
    window = draw(st.integers(1, length))
    stride, causal = draw(st.integers(1, window)), draw(st.booleans())
    part, count, chunk = (
        draw(st.sampled_from((1, 2, 4, 8))),
        draw(st.integers(1, 4)),
        draw(st.sampled_from((1, 2, 4, 16))),
    )
    bounds = draw(st.sampled_from((window_bounds, query_bounds)))
    axis = length, window, stride, causal
    low, high = bounds(torch.arange(length), *axis)
    alignment = draw(st.sampled_from((1, 4)))
    offset = large_tiling.statistics_offset((axis, axis, axis)) if alignment > 1 else 0
    visited = computed = 0
    for origin in range(0, length, part * count):
        tile = slice(origin, origin + part * count)
        start = (int(low[tile].min()) + offset) // alignment * alignment - offset
        corners = range(start, int(high[tile].max()) + 1, chunk)
        visited += len(corners)
        for first in range(origin, min(origin + part * count, length), part):
            own = slice(first, first + part)
            reach = int(low[own].min()), int(high[own].max())
            computed += sum(corner <= reach[1] and corner + chunk > reach[0] for corner in corners)
    start = alignment, offset
    assert large_tiling.work(axis, part, count, chunk, True, bounds, start) == (computed, visited)
    assert large_tiling.work(axis, part, count, chunk, False, bounds, start) == (visited * count, visited)


@pytest.mark.parametrize(("window", "causal", "tile"), [(11, False, 4), (8, False, 8), (7, True, 4), (6, False, 16)])
def test_queries_of_a_tile_start_where_statistics_can_be_loaded_from(window: int, causal: bool, tile: int) -> None:
    """Away from the borders, that costs no chunk."""
    axis = 240, window, 1, causal
    low, _ = query_bounds(torch.arange(32, 200, tile), *axis)
    assert not ((low + large_tiling.statistics_offset((axis, axis, axis))) % large_tiling.ALIGNMENT).any()


def test_sums_have_the_columns_of_all_kernels() -> None:
    """Triton cannot call ``column_parts`` itself."""
    dims = range(16, 257)
    assert [tuple(sum_widths(dim)) for dim in dims] == [column_parts(dim) for dim in dims]


@pytest.mark.parametrize("case", [*CASES, *SKIPPING], ids=str)
def test_tiles_fit(case: Case) -> None:
    """Parts have the rows of a matrix product, and tiles and chunks fit into shared memory and registers."""
    case = replace(case, dtype=torch.bfloat16)
    problem, _ = call_of(case, {name: t.detach() for name, t in make_inputs(case).items()})
    width = large_tiling.width_of(problem)
    for config, tensors in (
        *((large_tiling.forward_tile_config(problem, None, stats), 1 if width > 128 else 2) for stats in (False, True)),
        (large_tiling.dq_tile_config(problem), 2),
        (large_tiling.dkv_tile_config(problem), 2 * large_tiling.buffered_tiles(problem)),
    ):
        assert math.prod(config.part) * config.pack == 64
        taken = math.prod(config.tile) * config.pack * width * 2 * tensors
        taken += config.stages * math.prod(config.chunk) * (width * 4 + 8)
        assert taken < 226 * 1024
        assert config.skip or case not in SKIPPING
        assert config.stages >= 2
        if width <= 128:
            own, most = large_tiling.REGISTERS[math.prod(config.groups)]
            groups = math.prod(config.groups) + 1
            assert most * 128 * groups <= 2**16
            assert own * 128 * (groups - 1) + 24 * 128 <= most * 128 * groups


@pytest.mark.parametrize("case", [*CASES, *SKIPPING, *VIDEOS], ids=str)
def test_tiles_of_register_tokens_see_every_query_once(case: Case) -> None:
    """Chunks cover the queries of an image and none of the next one; slices cover the chunks of all heads."""
    case = replace(case, dtype=torch.bfloat16, registers=case.registers or 1)
    problem, _ = call_of(case, {name: t.detach() for name, t in make_inputs(case).items()})
    config = large_tiling.register_tile_config(problem)
    steps = large_tiling.query_steps(problem, config.chunk)
    offset = large_tiling.statistics_offset(problem.axes)
    for length, count, side, first in zip(problem.lengths, steps, config.chunk, (0, 0, offset), strict=True):
        assert count * side >= length + first > (count - 1) * side
    assert case.batch == 1 or problem.lengths[0] % config.chunk[0] == 0
    assert config.chunk[2] % large_tiling.ALIGNMENT == 0
    assert math.prod(config.chunk) == 64
    width, parts = large_tiling.width_of(problem), math.prod(config.groups)
    assert config.tile == (1, 1, 64 * parts)
    assert parts == (1 if width > 128 or case.registers <= 64 else 2)
    assert 1 <= config.slices <= math.prod(steps) * problem.group
    taken = parts * 64 * width * 4 + config.stages * 64 * (width * 4 + 8)
    assert config.stages >= 2
    assert taken < 226 * 1024


def test_slices_fill_the_multiprocessors() -> None:
    """Of 96 tiles with 256 chunks: in one slice 36 multiprocessors idle, in four 384 tiles are 2.9 for each."""
    assert large_tiling.slice_count(96, 256) == 4
    assert large_tiling.slice_count(64, 64) == 2
    assert large_tiling.slice_count(132, 256) == 1
    assert large_tiling.slice_count(1, 7) == 1


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("sink", ["none", "zero"])
@pytest.mark.parametrize("exponent", [32, 40, 112])
@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7], *REGISTERS], ids=str)
def test_scores_may_be_as_large_as_fp32_holds(
    case: Case, with_stats: bool, exponent: int, sink: Literal["none", "zero"]
) -> None:
    case = replace(case, dtype=torch.bfloat16, sink=sink)
    inputs = enlarge({name: t.detach() for name, t in make_inputs(case, "cuda").items()}, exponent)
    problem, arguments = call_of(case, inputs)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    assert_oracle(case, leaves, attend_large(problem, arguments, with_stats), with_stats)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs of the launch that repairs look for marks of as many tiles as they can."""
    monkeypatch.setattr(large_repair, "PROGRAMS", 1)
    large_repair.prepare_repair.cache_clear()
    yield
    large_repair.prepare_repair.cache_clear()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize(("marked", "with_stats"), [
    ([0, 9, 11, 63, 64, 74, 75], True),  # the last tile is only partly filled
    ([0, 9, 11, 63, 64, 74, 75], False),
    ([1], True),
    ([64], True),
    ([75], True),
])  # fmt: skip
@pytest.mark.usefixtures("few_programs")
def test_tiles_that_are_marked_are_computed_once_more(marked: list[int], with_stats: bool) -> None:
    """Only marked tiles are computed again, by programs that search for marks; NaN stays in its windows.

    ``marked`` are indices over tiles and blocks of heads.
    """
    case = Case("marked", (300,), 20, heads=4, head_dim=64, value_dim=64, sink="learned", batch=1, dtype=torch.float16)
    tensors = {name: t.detach() for name, t in make_inputs(case, DEVICE).items()}
    tensors["value"][0, 40, 1, 7] = float("nan")
    problem, (_, inputs, options, _) = call_of(case, tensors)
    config = LargeTileConfig((1, 1, 16), (1, 1, 16), pack=2, num_warps=4, stages=1, groups=(1, 1, 2))
    blocks, programs = 2, problem.programs(replace(config, tile=config.part))
    assert programs == 38 * blocks
    assert programs > large_repair.FLAGS.value
    nonfinite_tiles = torch.zeros(programs + 1, dtype=torch.int32, device=DEVICE)
    nonfinite_tiles[[*marked, programs]] = 1  # the element after the marks is the tile counter
    expected = attention_state(inputs.query, inputs.key, inputs.value, 20, sink=inputs.sink, impl="fused")
    expected = expected.out, expected.row_max, expected.row_sum
    untouched = -3.0
    results = [torch.full_like(x, untouched) for x in expected]
    state = results[1:] if with_stats else (None, None)
    large_repair.repair(config, problem, inputs, options, nonfinite_tiles, (results[0], state[0], state[1]))
    rows = torch.zeros(1, 300, 4, dtype=torch.bool, device=DEVICE)
    for i in marked:
        first, head = i // blocks * 8, i % blocks * 2
        rows[:, first : first + 8, head : head + 2] = True
    for found, wanted in zip(results[: 3 if with_stats else 1], expected, strict=False):
        assert (found[~rows] == untouched).all()
        torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-3, atol=1e-3, equal_nan=True)
    assert results[0][rows].isnan().any() == (5 in {i // blocks for i in marked})  # token 40 is in tile 5


@pytest.mark.parametrize("with_grad_lse", [False, True])
def test_statistics_of_the_backward_pass_are_what_they_are_called(with_grad_lse: bool) -> None:
    case = Case("statistics", (3, 5, 9), 3, heads=3, kv_heads=1, head_dim=64, value_dim=64, dtype=torch.float16)
    tensors = {name: t.detach() for name, t in make_inputs(case, DEVICE).items()}
    problem, _ = call_of(case, tensors)
    draw = torch.Generator().manual_seed(2)
    out, wide = (torch.randn(2, 3, 5, 9, n, 64, generator=draw).half().to(DEVICE) for n in (3, 5))
    grad_out = wide[..., 1:4, :]  # a view of a wider tensor
    row_max, row_sum, grad_lse = torch.rand(3, 2, 3, 5, 9, 3, generator=draw).to(DEVICE) + 0.5
    grad_lse = grad_lse.transpose(1, 2).contiguous().transpose(1, 2) if with_grad_lse else None
    found = large_statistics.statistics_of(problem, Cotangents(out, row_max, row_sum, grad_out, grad_lse))
    statistics, delta = found.head_major, found.delta
    expected = (out.double() * grad_out.double()).sum(-1) - (0 if grad_lse is None else grad_lse.double())
    assert error(delta, expected) < 1e-6
    head_major = [x.permute(4, 0, 1, 2, 3).reshape(3, 6, 5, 9) for x in (row_max + row_sum.log(), expected)]
    offset = large_tiling.statistics_offset(problem.axes)
    assert offset == 1  # query 3 is the first to see key 4, and stands in column 4
    assert error(statistics.lse[..., offset : offset + 9] * math.log(2), head_major[0]) < 1e-6
    assert error(statistics.delta[..., offset : offset + 9], head_major[1]) < 1e-6
    assert error(found.lse * math.log(2), row_max + row_sum.log()) < 1e-6
    assert not torch.stack(statistics)[..., :offset].any()
    copies = large_statistics.head_major_of(problem, found._replace(head_major=None))
    for own, copy in zip(statistics, copies, strict=True):
        assert own.stride() == copy.stride()
        assert torch.equal(own[..., : offset + 9], copy[..., : offset + 9])
    assert statistics.lse.stride(-2) % large_tiling.ALIGNMENT == 0


@pytest.mark.gpu
@needs_device
def test_a_call_takes_it_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.randn(1, 16384, 8, 136, device="cuda", dtype=torch.bfloat16)
    aligned, shifted = buffer[..., :128].contiguous(), buffer[..., 1:129]
    configs = []
    compute = large_forward.forward
    monkeypatch.setattr(large_forward, "forward", lambda *args: configs.append(args[0]) or compute(*args))
    neighborhood_attention(aligned, aligned, aligned, 2048, is_causal=True)
    assert len(configs) == 1
    out = neighborhood_attention(shifted, shifted, shifted, 2048, is_causal=True)
    assert len(configs) == 1  # TMA requires addresses of another alignment
    whole = shifted.contiguous()
    assert error(out, neighborhood_attention(whole, whole, whole, 2048, is_causal=True)) < 4e-3
    assert len(configs) == 2


def test_large_windows_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_text(monkeypatch)
    config = planned("forward", problem)
    assert config is not None
    assert (config.tile, config.pack) == ((1, 1, 32), 4)
    with override(pack=1):
        unpacked = planned("forward", problem)
    assert unpacked is not None
    assert (unpacked.tile, unpacked.pack) == ((1, 1, 128), 1)
    # Of 17 and 34 chunks that hold what rows see, smaller ones compute fewer scores for packed heads alone.
    query, key = (contiguous((1, 8192, heads, 128)) for heads in (32, 8))
    shorter = planned("forward", problem_of_text(monkeypatch, query=query, key=key, value=key, kernel_size=(1024,)))
    assert (shorter.tile, shorter.chunk) == ((1, 1, 48), (1, 1, 64))


@pytest.mark.parametrize(
    ("dim", "window", "registers", "is_large"),
    [
        (128, 512, 0, True),
        (128, 511, 0, False),
        (64, 5120, 0, True),
        (64, 5119, 0, False),
        (128, 508, 4, True),
        (128, 507, 4, False),
        (64, 16, 624, True),
    ],
)
def test_large_is_what_the_keys_of_a_window_take(
    monkeypatch: pytest.MonkeyPatch, dim: int, window: int, registers: int, is_large: bool
) -> None:
    query, key = (Layout((4, 16384, h, dim), (16384 * h * dim, h * dim, dim, 1)) for h in (32, 8))
    extra = Layout((4, registers, 8, dim), (registers * 8 * dim, 8 * dim, dim, 1)) if registers else None
    problem = problem_of_text(
        monkeypatch, query=query, key=key, value=key, additional_keys=extra, additional_values=extra,
        kernel_size=(window,),
    )  # fmt: skip
    assert isinstance(planned("forward", problem), TileConfig) == is_large


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"scale_first": True},
        {"capability": (8, 0)},
        {"capability": (12, 0)},
        {"device": torch.device("cpu")},
        {"key": Layout((1, 8192, 2, 128), (8192 * 257, 257, 128, 1))},
        {"query": Layout((1, 8192, 8, 264), (8192 * 8 * 264, 8 * 264, 264, 1))},  # more channels than registers hold
    ],
    ids=str,
)
def test_other_calls_do_not(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    assert planned("forward", problem_of_text(monkeypatch, **changes)) is None


@pytest.mark.parametrize(
    "changes",
    [{"kernel_size": (1024,)}, {"query": Layout((1, 8192, 2, 128), (8192 * 256, 256, 128, 1))}],
    ids=str,
)
def test_calls_with_too_few_pairs_to_hide_the_host_time_take_others(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    assert isinstance(planned("forward", problem_of_text(monkeypatch, **changes)), MediumTileConfig)


def test_tiles_that_somebody_chose_win(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_text(monkeypatch)
    with override({"forward": TileConfig((1, 1, 64), (1, 1, 64), 2, 4, 2)}):
        assert planned("forward", problem) is None
    with override(pack=8):  # more heads than a group has
        assert planned("forward", problem) is None


@pytest.mark.parametrize(
    ("lengths", "kernel", "causal", "group", "part", "groups", "chunk"),
    [
        ((1, 256, 256), (1, 80, 80), (False, False, False), 1, (1, 4, 16), (1, 2, 1), (1, 8, 16)),
        ((30, 48, 80), (18, 24, 24), (False, False, False), 1, (1, 8, 8), (2, 1, 1), (1, 4, 32)),
        ((1, 1, 32768), (1, 1, 4096), (False, False, True), 4, (1, 1, 16), (1, 1, 2), (1, 1, 128)),
    ],
)
def test_boxes_execute_few_scores(
    lengths: Box, kernel: Box, causal: tuple[bool, bool, bool], group: int, part: Box, groups: Box, chunk: Box
) -> None:
    axes = tuple(zip(lengths, kernel, (1, 1, 1), causal, strict=True))
    plans = (Plan(2, 128, 1.0, False),)
    assert large_tiling.best_boxes(axes, plans, 64 // group, window_bounds)[1:] == (part, groups, chunk)


@pytest.mark.parametrize(("dim", "value_dim"), [(256, 256), (64, 256), (256, 64)])
@pytest.mark.parametrize(("window", "forward", "query"), [(5, False, False), (6, True, False), (8, True, True)])
def test_wide_heads_take_large_ones_for_dq_later(
    monkeypatch: pytest.MonkeyPatch, window: int, forward: bool, query: bool, dim: int, value_dim: int
) -> None:
    """Of keys and of values, whichever are wide."""
    tokens, values = (contiguous((2, 137, 173, 8, d)) for d in (dim, value_dim))
    problem = problem_of_image(monkeypatch, query=tokens, key=tokens, value=values, kernel_size=(window, window))
    large = [
        isinstance(planned(kind, problem, grad_out=problem.out), TileConfig)
        for kind in ("forward", "backward_query", "backward_key")
    ]
    assert large == [forward, query, forward]


@pytest.mark.parametrize(("stride", "groups", "skips"), [(16, 4, False), (1, 3, True)])
def test_where_no_chunk_needs_a_mask_all_groups_compute_all_chunks(
    monkeypatch: pytest.MonkeyPatch, stride: int, groups: int, skips: bool
) -> None:
    tokens = dict.fromkeys(("query", "key", "value"), contiguous((2, 128, 128, 16, 64)))
    problem = problem_of_image(monkeypatch, **tokens, kernel_size=(64, 64), stride=(stride, stride))
    config = large_tiling.forward_tile_config(problem)
    assert (prod(config.groups), config.skip) == (groups, skips)


def test_parts_near_to_cubes_see_least() -> None:
    axes = ((61, 11, 1, False), (136, 11, 1, False), (240, 11, 1, False))
    _, part, _, chunk = large_tiling.best_boxes(axes, (Plan(4, 64, 1.0, True),), 64, window_bounds)
    assert (part, chunk) == ((4, 4, 4), (2, 2, 16))


@pytest.mark.parametrize(("window", "dim", "taken"), [
    ((45, 45), 64, False),
    ((45, 46), 64, True),
    ((22, 23), 128, False),
    ((23, 23), 128, True),
])  # fmt: skip
def test_smaller_windows_are_left_to_others(
    monkeypatch: pytest.MonkeyPatch, window: tuple[int, int], dim: int, taken: bool
) -> None:
    tokens = contiguous((8, 128, 128, 8, dim))
    problem = problem_of_text(
        monkeypatch, query=tokens, key=tokens, value=tokens, kernel_size=window, stride=(1, 1), dilation=(1, 1),
        is_causal=(False, False),
    )  # fmt: skip
    for direction in ("forward", "backward_query", "backward_key"):
        plan = planned(direction, problem, grad_out=tokens)
        assert type(plan) is (LargeTileConfig if taken else MediumTileConfig)


@pytest.mark.parametrize(("registers", "dim", "images", "taken"), [
    (16, 64, 8, False), (24, 64, 8, True), (16, 96, 8, True), (128, 64, 2, True), (128, 64, 1, False),
])  # fmt: skip
def test_gradients_of_register_tokens_take_it_beside_any_kernel(
    monkeypatch: pytest.MonkeyPatch, registers: int, dim: int, images: int, taken: bool
) -> None:
    tokens, extra = contiguous((images, 64, 64, 12, dim)), contiguous((images, registers, 12, dim))
    problem = problem_of_text(
        monkeypatch, query=tokens, key=tokens, value=tokens, additional_keys=extra, additional_values=extra,
        kernel_size=(9, 9), stride=(1, 1), dilation=(1, 1), is_causal=(False, False),
    )  # fmt: skip
    assert isinstance(planned("backward_registers", problem, grad_out=tokens), LargeTileConfig) == taken
    assert not isinstance(planned("backward_query", problem, grad_out=tokens), LargeTileConfig)


def test_wide_values_with_register_tokens_take_it_from_fewer_keys_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for smaller windows take queries and values of equally many channels."""
    for registers, taken in ((63, False), (64, True)):
        tokens, values = (contiguous((16, 64, 64, 8, dim)) for dim in (64, 128))
        extra = [contiguous((16, registers, 8, dim)) for dim in (64, 128)]
        problem = problem_of_text(
            monkeypatch, query=tokens, key=tokens, value=values, additional_keys=extra[0], additional_values=extra[1],
            kernel_size=(16, 16), stride=(1, 1), dilation=(1, 1), is_causal=(False, False),
        )  # fmt: skip
        assert isinstance(planned("forward", problem), LargeTileConfig) == taken


def test_register_tokens_take_it_with_their_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register tokens that TMA cannot address leave the window to portable kernels too."""
    registers = Layout((1, 512, 2, 128), (0, 256, 128, 1))  # which all images share
    gradients: tuple[Direction, ...] = ("backward_query", "backward_key", "backward_registers")
    for tokens, is_large in ((registers, True), (registers._replace(stride=(0, 257, 128, 1)), False)):
        problem = problem_of_text(monkeypatch, additional_keys=tokens, additional_values=tokens)
        assert isinstance(planned("forward", problem), LargeTileConfig) == is_large
        for direction in gradients:
            assert isinstance(planned(direction, problem, grad_out=problem.query), LargeTileConfig) == is_large


@pytest.mark.parametrize("key", [variants.LARGE, "portable"])
@pytest.mark.parametrize("query", [variants.LARGE, "portable"])
def test_register_tokens_take_it_where_keys_are_asked_to(
    monkeypatch: pytest.MonkeyPatch, query: str, key: str
) -> None:  # fmt: skip
    registers = contiguous((1, 5, 2, 128))
    problem = problem_of_text(monkeypatch, additional_keys=registers, additional_values=registers)
    with override(variants={"backward_query": query, "backward_key": key}):
        chosen = choose_backward(Question(problem, True, problem.query))
    assert chosen.registers is not None
    assert [choice.variant.name for choice in chosen[:3] if choice is not None] == [query, key, key]
    assert chosen.uses_tma == (variants.LARGE in (query, key))


def test_register_tokens_keep_their_kernel_where_keys_take_one_that_has_none_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registers = contiguous((8, 128, 2, 64))
    problem = problem_of_image(monkeypatch, additional_keys=registers, additional_values=registers)
    question = Question(problem, True, problem.query)
    with override(variants={"backward_query": variants.MEDIUM, "backward_key": variants.MEDIUM}):
        chosen = choose_backward(question)
    assert chosen.registers is not None
    found = [choice.variant.name for choice in (chosen.query, chosen.key, chosen.registers)]
    assert found == [variants.MEDIUM, variants.MEDIUM, variants.LARGE]


def test_gradients_of_large_windows_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_text(monkeypatch)

    def both(grad_out: Layout) -> list[Any]:
        chosen = choose_backward(Question(problem, grad_out=grad_out))
        return [choice.plan if choice.variant.name == variants.LARGE else None for choice in chosen[:2]]

    query, key = both(problem.query)
    assert (query.tile, query.pack) == ((1, 1, 48), 4)
    assert (key.tile, key.chunk) == ((1, 1, 128), (1, 1, 64))
    expanded = problem.query._replace(stride=(0, 0, 0, 0))  # like the gradient of a sum
    assert both(expanded) == [None, None]
    with override({"backward_key": key}):  # a tile configuration asks for the portable kernel of this gradient
        assert both(problem.query) == [query, None]


def test_strides_that_tma_does_not_take_are_refused() -> None:
    case = Case("3d", (10, 17, 19), (6, 10, 12), heads=2, kv_heads=1, head_dim=128, value_dim=128, dtype=torch.bfloat16)
    tensors = {name: t.detach() for name, t in make_inputs(case).items()}
    problem, _ = call_of(case, tensors)
    assert all(map(support.is_addressable, (problem.query, problem.key, problem.value)))
    batch, t, *rest = problem.key.stride
    assert not support.is_addressable(problem.key._replace(stride=(batch + 8, t, *rest)))  # a gap between images
    tensors["key"] = tensors["key"].expand(-1, -1, -1, -1, 2, -1)  # stride 0
    tensors["value"] = tensors["value"][:, :5]  # batch and t have no common stride
    problem, _ = call_of(case, tensors)
    assert not support.is_addressable(problem.key)
    assert not support.is_addressable(problem.value)


# --- Packed samples of one axis

TEXTS = [700, 0, 1, 3, 129, 1, 1100, 64, 64, 400]
PACKED = (
    Case("causal-gqa-sink", (), 256, is_causal=True, heads=8, kv_heads=2, head_dim=128, value_dim=128, sink="learned"),
    Case("causal-longer-than-all", (), 4096, is_causal=True, heads=2, kv_heads=2, head_dim=128, value_dim=128),
    Case("centred", (), 333, heads=2, kv_heads=1, head_dim=128, value_dim=64),
    Case("stride-zero-sink", (), 200, 8, heads=3, kv_heads=3, head_dim=64, value_dim=64, sink="zero"),
    Case("causal-stride", (), 90, 7, is_causal=True, heads=6, kv_heads=2, head_dim=80, value_dim=64),
    Case("wide-gqa", (), 100, is_causal=True, heads=4, kv_heads=1, head_dim=256, value_dim=256),
)


def packed_inputs(case: Case, lengths: list[int], device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    heads = {"query": case.heads, "key": case.kv_heads, "value": case.kv_heads, "grad_out": case.heads}
    dims = {"query": case.head_dim, "key": case.head_dim, "value": case.value_dim, "grad_out": case.value_dim}
    made = {n: torch.randn(sum(lengths), heads[n], dims[n], device=device).to(case.dtype) for n in heads}
    return made | ({"sink": torch.randn(case.heads, device=device)} if case.sink == "learned" else {})


def packed_results(case: Case, tensors: dict[str, Tensor], lengths: list[int], impl: Impl) -> dict[str, Tensor]:
    """Output, lse, and the gradients of all inputs."""
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items() if n != "grad_out"}
    zero_sink = 0.0 if case.sink == "zero" else None
    out, lse = neighborhood_attention_varlen(
        leaves["query"], leaves["key"], leaves["value"], torch.tensor(lengths)[:, None], case.kernel_size,
        stride=case.stride, is_causal=case.is_causal, sink=leaves.get("sink", zero_sink), return_lse=True, impl=impl,
    )  # fmt: skip
    grads = torch.autograd.grad((out, lse), tuple(leaves.values()), (tensors["grad_out"].to(out), lse.detach().cos()))
    return {"out": out.detach(), "lse": lse.detach()} | {f"grad of {n}": g for n, g in zip(leaves, grads, strict=True)}


def assert_packed_oracle(case: Case) -> None:
    """Compare packed texts with fp64, and two runs bit by bit."""
    tensors = packed_inputs(case, TEXTS, "cuda")
    expected = packed_results(case, {n: x.double() for n, x in tensors.items()}, TEXTS, "eager")
    eager = packed_results(case, tensors, TEXTS, "eager")
    first, second = (packed_results(case, tensors, TEXTS, "fused") for _ in range(2))
    for name, tensor in first.items():
        limit = max(2 * error(eager[name], expected[name]), FLOOR[case.dtype if name != "lse" else torch.float32])
        assert error(tensor, expected[name]) <= limit, name
        assert torch.equal(tensor, second[name]), name


def assert_texts_are_apart(case: Case, name: str, value: float) -> None:
    """What is not finite in one text reaches no other text, nor with chunks and tiles that lie in two of them."""
    lengths = [300, 1, 70, 130, 5, 64, 200]
    tensors = packed_inputs(case, lengths, "cuda")
    clean = packed_results(case, tensors, lengths, "fused")
    for i in (1, 3, 6):
        own = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
        others = torch.ones(sum(lengths), dtype=torch.bool, device="cuda")
        others[own] = False
        dirty = tensors | {name: tensors[name].clone()}
        dirty[name][own][lengths[i] // 2] = value
        found = packed_results(case, dirty, lengths, "fused")
        assert not all(tensor[own].isfinite().all() for n, tensor in found.items() if n != "grad of sink")
        for n in clean:
            if n != "grad of sink":
                assert error(found[n][others], clean[n][others]) < 4 * FLOOR[case.dtype], (i, n)


@pytest.fixture
def taken(wherever_possible: None, monkeypatch: pytest.MonkeyPatch) -> list[TileConfig]:
    """Tiles of dK and dV in these kernels, which are used for windows of any size. They imply those of dQ."""
    configs: list[TileConfig] = []
    compute = large_dkv.key_gradients
    monkeypatch.setattr(large_dkv, "key_gradients", lambda *args: configs.append(args[0]) or compute(*args))
    return configs


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_texts_match_the_oracle(case: Case, dtype: torch.dtype, taken: list[TileConfig]) -> None:
    assert_packed_oracle(replace(case, dtype=dtype))
    assert len(taken) == 2


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_out"])
def test_what_is_not_finite_reaches_no_other_packed_text(name: str, value: float, taken: list[TileConfig]) -> None:
    assert_texts_are_apart(replace(PACKED[0], dtype=torch.bfloat16), name, value)
    assert len(taken) == 4


def packed_call(
    case: Case, lengths: list[int], device: str
) -> tuple[Problem, tuple[Problem, Inputs, Options, bool], Cotangents]:
    """The problem of packed texts, the arguments of the launchers of the forward pass, and the cotangents."""
    tensors = packed_inputs(case, lengths, device)
    query, key, value, grad_out = (tensors[n][None] for n in ("query", "key", "value", "grad_out"))
    inputs = Inputs(query, key, value, sink=tensors.get("sink"), shapes=torch.tensor(lengths)[:, None])
    window = make_window((10**6,), case.kernel_size, case.stride, 1, case.is_causal)
    sink, scale = 0.0 if case.sink == "zero" else None, case.head_dim**-0.5
    options = Options(sink, window.kernel_size, window.stride, window.dilation, window.is_causal, scale)
    problem = problem_of(inputs, options)
    rows = torch.ones(query.shape[:-1], device=device)
    return problem, (problem, inputs, options, True), Cotangents(query, rows, rows, grad_out, None)


def test_packed_repairs_follow_overrides() -> None:
    """What a repair took under an override is not kept for calls after it."""
    case = Case("repair", (), 6, is_causal=True, heads=4, kv_heads=1, head_dim=16, value_dim=16, dtype=torch.float16)
    problem, _, cotangents = packed_call(case, [40, 0, 1, 23, 30], DEVICE)
    grad_out = layout(cotangents.grad_out)

    def tiles() -> list[TileConfig]:
        query = packed_repair.query_repair(problem, grad_out, None)
        key = packed_repair.key_repair(problem, grad_out)
        return [plan.config for plan, _ in (query, key)]

    before = tiles()
    asked: dict[Kind, TileConfig] = {"backward_query": replace(before[0], stages=5)}
    asked["backward_key"] = replace(before[1], stages=5)
    with override(asked):
        assert tiles() == list(asked.values())
    assert tiles() == before


def test_packed_tiles_that_overlap_flagged_parts_are_repaired() -> None:
    """Parts lie on the line of all tokens, tiles of the portable kernel inside a sample."""
    case = Case("repair", (), 6, is_causal=True, heads=4, kv_heads=1, head_dim=16, value_dim=16, dtype=torch.float16)
    problem, arguments, _ = packed_call(case, [40, 0, 1, 23, 30], DEVICE)
    config = large_tiling.forward_tile_config(problem)
    assert config.part == (1, 1, 16)
    expected = forward.forward(forward.plan(problem, True), *arguments)
    results = tuple(torch.full_like(x, 7.0) for x in expected if x is not None)
    parts = -(-94 // 16)
    flags = torch.zeros(parts + 1, dtype=torch.int32, device=DEVICE)  # one block of four heads
    flags[2], flags[parts] = 1, 1  # tokens 32 to 47, and the counter of tiles, which is no flag
    large_repair.repair(config, problem, arguments[1], arguments[2], flags, results)  # pyright: ignore[reportArgumentType]
    for found, right in zip(results, expected, strict=True):
        assert right is not None
        # Tiles of samples begin at tokens 0, 16, 32; 40; 41, 57; 64, 80.
        assert error(found[0, 32:57], right[0, 32:57]) < 1e-3
        assert bool((found[0, :32] == 7).all() & (found[0, 57:] == 7).all())


def test_packed_gradients_are_repaired_where_a_flag_is_raised() -> None:
    case = Case("repair", (), 6, is_causal=True, heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float16)
    problem, (_, inputs, options, _), cotangents = packed_call(case, [20, 0, 1, 13], DEVICE)
    grad_out = cotangents.grad_out
    plan, key_plan = dq.query_plan(problem, layout(grad_out), None), dkv.key_plan(problem, layout(grad_out))
    grad_query, statistics = dq.backward_query(plan, problem, inputs, options, cotangents)
    expected = grad_query, *dkv.backward_key(key_plan, problem, inputs, options, grad_out, statistics)
    for raised in (False, True):
        flag = packed_repair.new_flag(problem)
        assert flag is not None
        flag += raised
        query, key, value = results = [torch.full_like(x, 7.0) for x in expected]
        packed_repair.repair_query(problem, inputs, options, cotangents, query, statistics, flag)
        packed_repair.repair_key(problem, inputs, options, grad_out, statistics, (key, value), flag)
        for found, right in zip(results, expected, strict=True):
            assert torch.equal(found, right) if raised else (found == 7.0).all()


def test_packed_calls_that_large_windows_do_not_take() -> None:
    case = replace(PACKED[1], dtype=torch.bfloat16)
    problem, (_, inputs, options, _), _ = packed_call(case, [100] * 10, DEVICE)
    assert "100 keys" in (variants.LARGE_FORWARD.pays(Question(problem)) or ""), "windows are cut to samples"
    registers = torch.zeros(10, 3, 2, 128, device=DEVICE, dtype=torch.bfloat16)
    tensors = inputs._replace(additional_keys=registers, additional_values=registers)
    flat = problem._replace(kernel_size=(3, 3), stride=(1, 1), dilation=(1, 1), is_causal=(False, False))
    for variant in (variants.LARGE_FORWARD, variants.LARGE_QUERY_GRADIENT, variants.LARGE_KEY_GRADIENTS):
        assert "additional keys" in (variant.supports(Question(problem_of(tensors, options))) or "")
        assert "one axis" in (variant.supports(Question(flat)) or "")
