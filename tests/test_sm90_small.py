"""The kernels for small windows on compute capability 9.0 against the fp64 oracle and the portable kernel."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import Case, arguments, assert_close, assert_nan_stays, enlarge, error, key_mask, make_inputs, oracle, run
from hypothesis import given, settings
from problems import problem_of_image, problem_of_packed_images, problem_of_packed_texts
from test_sm90_large import (
    assert_oracle,
    assert_packed_oracle,
    assert_texts_are_apart,
    call_of,
    needs_device,
    planned,
)
from test_varlen import check
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from natten_layers import neighborhood_attention
from natten_layers.geometry import query_bounds, window_bounds
from natten_layers.kernels import dispatch
from natten_layers.kernels.dispatch import Question
from natten_layers.kernels.host.problem import (
    Inputs,
    Layout,
    Options,
    Problem,
    contiguous,
    layout,
    problem_of,
    three_axes,
)
from natten_layers.kernels.host.tiling import extent
from natten_layers.kernels.host.tuned import forget, override
from natten_layers.kernels.portable import forward
from natten_layers.kernels.sm90 import (
    masked_keys,
    small_dkv,
    small_dq,
    small_forward,
    small_forward_rolling,
    support,
    thresholds,
    variants,
)
from natten_layers.kernels.sm90.descriptors import descriptor, key_boxes, query_boxes, register_boxes
from natten_layers.kernels.sm90.medium_tiling import MediumTileConfig
from natten_layers.kernels.sm90.small_tiling import (
    START,
    RollingTileConfig,
    SmallTileConfig,
    binary_parts,
    cut,
    key_tile_shift,
    no_small_tiles,
    rolling_tile_config,
    small_dkv_tile_config,
    small_dq_tile_config,
    small_tile_config,
)

CASES = (
    Case("2d", (32, 40), 7, head_dim=64, value_dim=64),
    Case("2d-ragged-gqa-sink-registers", (37, 45), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, registers=5,
         sink="learned"),
    Case("2d-registers-zero-sink", (33, 40), (7, 5), head_dim=64, value_dim=64, registers=20, sink="zero"),
    Case("2d-group-3-causal-axis", (20, 41), (5, 9), 1, 1, (True, False), 6, 2, head_dim=64, value_dim=64),
    Case("2d-wide-heads", (33, 40), 7, heads=8, kv_heads=2, head_dim=128, value_dim=128, registers=1),
    Case("2d-window-of-the-whole-axis", (9, 50), (9, 4), heads=4, kv_heads=1, head_dim=64, value_dim=64),
    Case("1d-causal-gqa-sink", (1000,), 128, is_causal=True, heads=16, kv_heads=2, head_dim=64, value_dim=64,
         sink="learned"),
    Case("1d-too-many-scores-for-gradients", (700,), 256, is_causal=True, heads=8, kv_heads=2, head_dim=64,
         value_dim=64, sink="learned"),
    Case("2d-too-many-scores-for-gradients", (21, 40), 13, heads=6, kv_heads=3, head_dim=64, value_dim=64),
    Case("2d-padded-40", (32, 40), 7, heads=4, kv_heads=4, head_dim=40, value_dim=40),
    Case("2d-narrow-gqa-sink", (28, 41), 7, heads=8, kv_heads=2, head_dim=32, value_dim=32, sink="zero"),
    Case("3d-padded-24", (8, 12, 18), 3, heads=4, kv_heads=4, head_dim=24, value_dim=24),
    Case("1d-padded-96-registers", (1000,), 128, is_causal=True, heads=8, kv_heads=2, head_dim=96, value_dim=96,
         registers=5, sink="learned"),
    Case("1d-even-window", (333,), 32, heads=4, kv_heads=4, head_dim=64, value_dim=64, sink="zero"),
    Case("1d-even-window-gqa", (333,), 64, heads=8, kv_heads=2, head_dim=64, value_dim=64),
    Case("3d", (8, 12, 18), 3, heads=4, kv_heads=4, head_dim=64, value_dim=64),
    Case("3d-causal-gqa-registers", (8, 9, 10), 3, 1, 1, (True, False, False), 4, 2, head_dim=64, value_dim=64,
         registers=3),
)  # fmt: skip

# Only the kernel that takes a tile alone takes strides and dilation.
SPREAD_CASES = (
    Case("2d-dilated-gqa-registers-sink", (32, 48), (7, 5), 1, (2, 3), heads=8, kv_heads=2, head_dim=64, value_dim=64,
         registers=5, sink="learned"),
    Case("2d-dilated-narrow", (28, 28), 7, 1, 4, heads=4, kv_heads=4, head_dim=32, value_dim=32),
    Case("2d-dilated-rows-only", (36, 40), 7, 1, (3, 1), (True, False), 2, 2, head_dim=64, value_dim=64),
    Case("1d-dilated-causal-gqa", (960,), 32, 1, 3, True, 8, 2, head_dim=64, value_dim=64, sink="zero"),
    Case("2d-strided", (33, 40), 9, (4, 3), heads=4, kv_heads=2, head_dim=64, value_dim=64, registers=3),
    Case("1d-strided-dilated-causal", (1024,), 64, 16, 2, True, 4, 4, head_dim=32, value_dim=32, sink="learned"),
    Case("3d-strided-causal", (8, 12, 18), 3, (2, 1, 3), 1, (True, False, False), 4, 2, head_dim=64, value_dim=64),
)  # fmt: skip

KERNELS = {
    "tiles": (small_forward, small_tile_config, CASES + SPREAD_CASES),
    "runs": (small_forward_rolling, rolling_tile_config, CASES),
}
each_kernel = pytest.mark.parametrize(("module", "find"), [x[:2] for x in KERNELS.values()], ids=list(KERNELS))
each_kernel_and_case = pytest.mark.parametrize(
    ("module", "find", "case"),
    [
        pytest.param(module, find, case, id=f"{case}-{name}")
        for name, (module, find, cases) in KERNELS.items()
        for case in cases
    ],
)
Find = Callable[[Problem], Any]


@pytest.mark.gpu
@needs_device
@each_kernel_and_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_the_oracle(case: Case, dtype: torch.dtype, module: ModuleType, find: Find) -> None:
    case = replace(case, dtype=dtype)
    leaves = make_inputs(case, "cuda")
    problem, arguments = call_of(case, {name: t.detach() for name, t in leaves.items()})
    assert support.tiles_gap(Question(problem)) is None
    config = find(problem)
    assert config is not None
    assert_oracle(case, leaves, module.forward(config, *arguments))


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_where_runs_are_cut_changes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(case, dtype=torch.bfloat16)
    problem, arguments = call_of(case, {name: t.detach() for name, t in make_inputs(case, "cuda").items()})
    config = rolling_tile_config(problem)
    assert config is not None
    tiles = config.tiles(problem)[config.axis]
    results = []
    for runs in (((0, 1), 1), ((0, 1), 3), ((1, min(tiles, 2)), 1), ((0, 1), tiles)):
        monkeypatch.setattr(small_forward_rolling, "cut", lambda *args, runs=runs: runs)
        small_forward_rolling.prepare.cache_clear()
        results.append(small_forward_rolling.forward(config, *arguments))
    small_forward_rolling.prepare.cache_clear()
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            assert torch.equal(mine, first)


@pytest.fixture
def wherever_possible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the kernels for problems of any size."""
    with monkeypatch.context() as patch:
        patch.setattr(thresholds, "LEAST_ROWS", 0)
        patch.setattr(thresholds, "LEAST_FILLED", 0)
        patch.setattr(thresholds, "PACKED_PROGRAMS", 0)
        forget()
        yield
    forget()


@pytest.mark.gpu
@needs_device
@pytest.mark.usefixtures("wherever_possible")
@pytest.mark.parametrize("case", CASES + SPREAD_CASES, ids=str)
def test_gradients_match_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(case, dtype=torch.bfloat16)
    leaves = make_inputs(case, "cuda")
    taken: list[str] = []

    def note(module: ModuleType, name: str) -> None:
        compute = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: taken.append(name) or compute(*args))

    note(small_forward, "forward")
    note(small_forward_rolling, "forward")
    note(small_dq, "query_gradient")
    note(small_dkv, "key_gradients")
    first, second = (run(case, leaves, "fused") for _ in range(2))
    expected = ["forward", "query_gradient", "key_gradients"]
    problem, _ = call_of(case, {name: t.detach() for name, t in leaves.items()})
    if small_dq_tile_config(problem) is None:  # not enough registers or shared memory
        expected.remove("query_gradient")
    if small_dkv_tile_config(problem) is None:
        expected.remove("key_gradients")
    assert taken == expected * 2
    assert_close(case, first, oracle(case, leaves), run(case, leaves, "eager"))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


@pytest.mark.gpu
@needs_device
@pytest.mark.usefixtures("wherever_possible")
@pytest.mark.parametrize(
    "case",
    [
        *(case for case in CASES if len(case.spatial) == 3 or case.registers),
        *SPREAD_CASES[:3],
        Case("3d-gqa", (16, 12, 12), 3, heads=8, kv_heads=2, head_dim=64, value_dim=64, batch=3),
        Case("3d-thin", (6, 16, 20), (1, 5, 5), heads=4, kv_heads=2, head_dim=64, value_dim=64, sink="zero"),
        Case("3d-causal", (4, 12, 12), (2, 3, 3), 1, 1, True, 4, 1, head_dim=64, value_dim=64, batch=3),
    ],
    ids=str,
)
def test_nan_reaches_no_other_image_and_no_other_head(case: Case) -> None:
    case = replace(case, dtype=torch.bfloat16)
    assert_nan_stays(case, make_inputs(case, "cuda"))


@pytest.mark.gpu
@needs_device
@each_kernel
@pytest.mark.parametrize("exponent", [32, 40, 112])
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[6], CASES[9]], ids=str)
def test_scores_may_be_as_large_as_fp32_holds(case: Case, exponent: int, module: ModuleType, find: Find) -> None:
    case = replace(case, dtype=torch.bfloat16)
    inputs = enlarge({name: t.detach() for name, t in make_inputs(case, "cuda").items()}, exponent)
    problem, arguments = call_of(case, inputs)
    config = find(problem)
    assert config is not None
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    assert_oracle(case, leaves, module.forward(config, *arguments))


@pytest.mark.gpu
@needs_device
@each_kernel
def test_reads_views_of_a_fused_projection(module: ModuleType, find: Find) -> None:
    case = replace(CASES[0], dtype=torch.bfloat16, heads=4)
    qkv = torch.randn(2, *case.spatial, 8, 64, device="cuda", dtype=torch.bfloat16)
    views: dict[str, Tensor] = dict(zip(("query", "key", "value"), qkv.split((4, 2, 2), -2), strict=True))
    # All images share the registers: stride 0.
    registers = torch.randn(9, 2, 64, device="cuda", dtype=torch.bfloat16).expand(2, -1, -1, -1)
    views |= {"additional_keys": registers, "additional_values": registers}
    problem, arguments = call_of(case, views)
    config = find(problem)
    assert config is not None
    copies = call_of(case, {name: t.contiguous() for name, t in views.items()})[1]
    pairs = zip(module.forward(config, *arguments), module.forward(config, *copies), strict=True)
    for ours, expected in pairs:
        assert torch.equal(ours, expected)  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@needs_device
@each_kernel_and_case
def test_nan_and_inf_reach_only_the_queries_that_see_them(case: Case, module: ModuleType, find: Find) -> None:
    case = replace(case, dtype=torch.bfloat16)
    rank = len(case.spatial)
    # Views of wider tensors, as those of a fused projection are.
    tensors = {
        name: torch.cat([t, t], -2)[..., : t.shape[-2], :] if t.ndim > 1 else t
        for name, t in ((name, t.detach()) for name, t in make_inputs(case, "cuda").items())
    }

    def outputs(forward: Callable[..., Any], *plan: Any) -> tuple[Tensor, Tensor]:
        out, row_max, row_sum = forward(*plan, *call_of(case, tensors)[1])
        return out, row_max + row_sum.log()

    config = find(call_of(case, tensors)[0])
    assert config is not None
    middle = tuple(n // 2 for n in case.spatial)
    tensors["value"][(0, *middle, case.kv_heads - 1, 7)] = float("nan")
    tensors["value"][(0, *middle, 0, 8)] = float("inf")
    tensors["key"][(1, *(-1,) * rank, 0, 5)] = float("nan")
    tensors["query"][(1, *(0,) * rank, 0, 3)] = float("nan")
    if case.registers:
        tensors["additional_values"][0, 0, 0, 9] = float("-inf")
    ours, portable = (
        outputs(module.forward, config),
        outputs(forward.forward, forward.plan(call_of(case, tensors)[0], True)),
    )
    # In the portable kernel, inf becomes NaN in the windows that see it.
    assert ours[0][(0, *middle, 0, 8)] == float("inf")
    for mine, expected, allowed in zip(ours, portable, (4e-3, 1e-5), strict=True):
        broken = ~expected.isfinite()
        assert broken.any()
        assert not broken.all()
        assert torch.equal(~mine.isfinite(), broken)
        assert error(mine[~broken], expected[~broken]) < allowed


@pytest.mark.gpu
@needs_device
def test_a_call_takes_it_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.randn(6, 160, 160, 4, 72, device="cuda", dtype=torch.bfloat16)
    aligned, shifted = buffer[..., :64].contiguous(), buffer[..., 1:65]
    configs = []
    compute = small_forward_rolling.forward
    monkeypatch.setattr(small_forward_rolling, "forward", lambda *args: configs.append(args[0]) or compute(*args))
    neighborhood_attention(aligned, aligned, aligned, 7)
    assert len(configs) == 1
    out = neighborhood_attention(shifted, shifted, shifted, 7)
    assert len(configs) == 1  # addresses that TMA does not take
    whole = shifted.contiguous()
    assert error(out, neighborhood_attention(whole, whole, whole, 7)) < 4e-3
    assert len(configs) == 2
    neighborhood_attention(aligned[:1], aligned[:1], aligned[:1], 7)
    assert len(configs) == 2  # the GPU would finish before the host has prepared the launch


@pytest.mark.parametrize(
    ("dim", "pays"), [(16, False), (32, True), (40, False), (48, True), (64, True), (80, False), (96, True)]
)
def test_gradients_take_it_where_heads_fill_their_columns(
    monkeypatch: pytest.MonkeyPatch, dim: int, pays: bool
) -> None:
    heads = Layout((8, 128, 128, 8, dim), (2**14 * 8 * dim, 2**7 * 8 * dim, 8 * dim, dim, 1))
    problem = problem_of_image(monkeypatch, query=heads, key=heads, value=heads, kernel_size=(3, 3))
    choice = dispatch.choose("backward_query", dispatch.Question(problem, True, heads))
    assert (choice.variant.name == variants.TILES) == pays
    reasons = {name: reason for name, reason in choice.passed_over if name == variants.TILES}
    assert ("fill less" in reasons.get(variants.TILES, "")) == (not pays)


def test_small_windows_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_image(monkeypatch)
    alone, config = small_tile_config(problem), planned("forward", problem)
    assert alone is not None
    # Tiles see 8 x 14 keys; the parts load no key that no query sees.
    assert (alone.tile, alone.pack, alone.parts) == ((1, 2, 8), 4, ((1, 8, 8), (1, 8, 4), (1, 8, 2)))
    assert isinstance(config, RollingTileConfig)
    assert (config.tile, config.pack, config.keys) == (alone.tile, alone.pack, alone.keys)
    # A tile loads one new box of 8 x 8 keys in the direction of the walk, of which its queries see 8 x 6.
    assert (config.axis, config.box, config.stages, config.rest) == (2, (1, 8, 8), 2, (32, 16))
    with override(pack=1):
        unpacked = planned("forward", problem)
    assert isinstance(unpacked, RollingTileConfig)
    assert (unpacked.tile, unpacked.pack, unpacked.keys) == ((1, 8, 8), 1, 14 * 16)


def test_results_leave_through_the_ring_where_that_leaves_room_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many keys as queries, outputs have a buffer of their own, so that values can be loaded earlier."""
    grouped = rolling_tile_config(problem_of_image(monkeypatch))
    query = Layout((8, 128, 128, 4, 64), (2**22, 2**15, 256, 64, 1))
    alone = rolling_tile_config(problem_of_image(monkeypatch, query=query, key=query, value=query))
    assert grouped is not None
    assert alone is not None
    assert (grouped.in_ring, grouped.programs) == (True, 4)
    assert (alone.in_ring, alone.programs) == (False, 2)


def test_runs_have_room_for_registers_beside_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 x 8 queries with two heads see 320 keys under windows of 13 x 13, and 16 registers still fit."""
    query, key = (Layout((8, 128, 128, h, 64), (2**20 * h, 2**13 * h, 64 * h, 64, 1)) for h in (6, 3))
    extra = Layout((8, 16, 3, 64), (3072, 192, 64, 1))
    image = {"query": query, "key": key, "value": key, "kernel_size": (13, 13)}
    problem = problem_of_image(monkeypatch, **image, additional_keys=extra, additional_values=extra)
    rolling = planned("forward", problem)
    assert small_tile_config(problem) is None
    assert isinstance(rolling, RollingTileConfig)
    assert (rolling.keys, rolling.programs) == (336, 2)
    more = extra._replace(shape=(8, 17, 3, 64))
    wider = planned("forward", problem._replace(additional_keys=more, additional_values=more))
    assert isinstance(wider, MediumTileConfig)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"kernel_size": (13, 13)}, RollingTileConfig),
        ({"kernel_size": (3, 3)}, SmallTileConfig),  # a tile shares few keys with the one before
        ({"kernel_size": (1, 5)}, SmallTileConfig),
    ],
    ids=str,
)
def test_runs_are_taken_where_windows_overlap_much(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], taken: type
) -> None:
    query, key = (Layout((8, 128, 128, h, 64), (2**20 * h, 2**13 * h, 64 * h, 64, 1)) for h in (6, 3))
    problem = problem_of_image(monkeypatch, query=query, key=key, value=key, **changes)
    assert type(planned("forward", problem)) is taken


def test_statistics_take_registers_of_the_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 128 keys, five programs fit on a multiprocessor, but only four that also write statistics."""
    extra = Layout((8, 16, 2, 64), (2**11, 128, 64, 1))
    problem = problem_of_image(monkeypatch, additional_keys=extra, additional_values=extra)
    configs = [small_tile_config(problem, None, with_stats) for with_stats in (False, True)]
    assert [(x.maxnreg, x.programs) for x in configs if x is not None] == [(96, 5), (128, 4)]


def test_masks_take_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_image(monkeypatch, key_mask=contiguous((8, 128, 128, 1, 1)))
    choice = dispatch.choose("forward", Question(problem))
    assert choice.variant.name == variants.TILES
    assert (variants.ROLLING, "it takes no key_mask") in choice.passed_over
    alone = problem_of_image(monkeypatch, key_mask=problem.key_mask, key=problem.query, value=problem.query)
    assert [type(plan) for plan in gradients(alone, alone.query)] == [SmallTileConfig] * 2


@pytest.mark.parametrize("box", [(1, 1, 64), (1, 8, 4), (4, 2, 8), (2, 16, 1)], ids=str)
def test_keys_that_follow_each_other_are_a_box(box: tuple[int, int, int]) -> None:
    keys = torch.arange(prod(box)).reshape(box)
    for count in (1, 2, 16):
        for first in range(0, prod(box), count):
            start, sides = masked_keys.range_start(box, first), masked_keys.range_sides(box, count)
            part = keys[tuple(slice(i, i + side) for i, side in zip(start, sides, strict=True))]
            assert part.flatten().tolist() == list(range(first, first + count))


IMAGES = (8, 128, 128, 8, 64), (2**23, 2**16, 512, 64, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {name: Layout((1, *IMAGES[0][1:]), IMAGES[1]) for name in ("query", "key", "value")},
        {"kernel_size": (15, 15)},
        {"is_periodic": (False, True)},
        {"query": contiguous((8, 256, 256, 8, 64))},
        {"dilation": (1, 3)},  # classes of 43 and of 42 columns
        {"dilation": (1, 2), "key": Layout((8, 128, 128, 2, 64), (2**24, 2**15, 128, 64, 1))},  # every other row
        {"dtype": torch.float32},
        {"scale_first": True},
        {"capability": (8, 0)},
        {"query": Layout(IMAGES[0], (2**23, 2**16, 516, 64, 1))},
        {"additional_keys": Layout((8, 4, 2, 64), (516, 128, 64, 1))},
        {
            "additional_keys": Layout((8, 4, 2, 64), (0, 128, 64, 1)),
            "additional_values": Layout((8, 4, 2, 64), (512, 128, 64, 1)),
        },  # keys that all images share beside values that each has for itself
    ],
    ids=str,
)
def test_other_calls_do_not(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    finer = changes.get("query") == contiguous((8, 256, 256, 8, 64))
    medium = finer or changes.get("kernel_size") == (15, 15) or {"additional_values", "is_periodic"} & changes.keys()
    if "additional_keys" in changes:
        changes = {"additional_values": changes["additional_keys"], **changes}
    choice = dispatch.choose("forward", Question(problem_of_image(monkeypatch, **changes)))
    assert choice.variant.name == (variants.MEDIUM if medium else "portable")


def gradients(problem: Problem, grad_out: Layout) -> list[Any]:
    """Plans for the gradients of queries and for those of keys and values."""
    return [planned(kind, problem, grad_out=grad_out) for kind in ("backward_query", "backward_key")]


@pytest.mark.parametrize(
    "changes", [{"stride": (2, 3)}, {"dilation": (4, 1)}, {"dilation": (2, 8), "stride": (1, 2)}], ids=str
)
def test_strides_and_dilation_take_tiles(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    problem = problem_of_image(monkeypatch, **changes)
    assert isinstance(planned("forward", problem), SmallTileConfig)
    assert None not in gradients(problem, problem.query)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dilation": (1, 3)}, "dilation (1, 3) does not divide the image of (128, 128) tokens"),
        (
            {"dilation": (1, 2), "key": Layout((8, 128, 128, 2, 64), (2**24, 2**15, 128, 64, 1))},
            "tokens of key with strides (16777216, 32768, 128, 64, 1) are not at equal distances in memory",
        ),
    ],
    ids=str,
)
def test_why_a_residue_class_is_no_image_of_its_own(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    problem = problem_of_image(monkeypatch, **changes)
    assert (variants.TILES, reason) in dispatch.choose("forward", Question(problem)).passed_over


@pytest.mark.parametrize("dilation", [(1, 2, 3), (1, 4, 1), (1, 1, 2)], ids=str)
def test_descriptors_find_the_tokens_of_a_residue_class(dilation: tuple[int, int, int]) -> None:
    """The first axis counts tokens: from the first token of a class on, h and w count those of the class."""
    tokens = torch.arange(2 * 8 * 12).reshape(2, 8, 12)
    wide = torch.zeros(2, 8, 12, 5, 8)  # heads of a fused projection
    wide[..., 2, 0] = tokens
    boxes = key_boxes(layout(wide[..., 2:4, :]), (1, 4, 4), dilation)
    _, by_h, by_w = dilation
    for batch, r_h, r_w in ((0, 0, 0), (1, by_h - 1, by_w - 1)):
        first = wide[..., 2:4, :].storage_offset() + ((batch * 8 + r_h) * 12 + r_w) * boxes["strides"][1]
        view = torch.as_strided(wide, boxes["shape"][2:], boxes["strides"][2:], first)
        assert torch.equal(view[..., 0].long(), tokens[batch, r_h::by_h, r_w::by_w])


def test_gradients_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_image(monkeypatch, **dict.fromkeys(("key", "value"), contiguous((8, 128, 128, 8, 64))))
    query, key = gradients(problem, problem.query)
    assert (key.tile, key.keys) == ((1, 8, 8), 14 * 16)
    expanded = problem.query._replace(stride=(0, 0, 0, 0, 0))  # as the gradient of a sum is
    assert gradients(problem, expanded) == [None, None]
    chosen = forward.tile_config_for("forward", problem.problem_class)
    with override({"backward_query": chosen}):
        assert gradients(problem, problem.query) == [None, key]
    with override({"backward_key": chosen}):
        assert gradients(problem, problem.query) == [query, None]


def test_heads_that_share_keys_leave_gradients_of_keys_to_chunks_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_image(monkeypatch)
    query, key = gradients(problem, problem.query)
    assert (query.pack, query.parts) == (4, ((1, 8, 8), (1, 8, 4), (1, 8, 2)))
    assert isinstance(key, MediumTileConfig)
    assert key.chunk_pack == 4
    with override(pack=1):
        query, key = gradients(problem, problem.query)
    assert (query.pack, key.chunk_pack) == (1, 1)


def test_wide_heads_leave_gradients_of_keys_to_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one program that holds all queries of its keys would fit on a multiprocessor."""
    query, key = (Layout((8, 128, 128, h, 128), (2**21 * h, 2**14 * h, 128 * h, 128, 1)) for h in (8, 2))
    problem = problem_of_image(monkeypatch, query=query, key=key, value=key)
    of_query, of_key = gradients(problem, query)
    assert isinstance(of_query, SmallTileConfig)
    assert isinstance(of_key, MediumTileConfig)


def test_scores_in_registers_are_fewer_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 x 8 queries with two heads see 16 x 20 keys under windows of 13 x 13: too many for the backward."""
    query, key = (Layout((8, 128, 128, h, 64), (2**20 * h, 2**13 * h, 64 * h, 64, 1)) for h in (6, 3))
    problem = problem_of_image(monkeypatch, query=query, key=key, value=key, kernel_size=(13, 13))
    config = small_tile_config(problem)
    assert config is not None
    assert (config.tile, config.pack, config.parts) == ((1, 4, 8), 2, ((1, 16, 16), (1, 16, 4)))
    assert (small_dq_tile_config(problem), small_dkv_tile_config(problem)) == (None, None)
    assert all(isinstance(plan, MediumTileConfig) for plan in gradients(problem, query))


def test_queries_of_a_border_are_more_than_those_of_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window of 7, queries 0 to 10 see keys 4 to 7, but only queries 5 to 14 see keys 8 to 11."""
    axis = (128, 7, 1, False)
    assert extent(axis, 4, query_bounds) == 11
    assert extent(axis, 8, query_bounds) == 14
    assert extent(axis, 4, window_bounds) == 10


def test_tiles_that_somebody_chose_win(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_image(monkeypatch)
    with override({"forward": forward.tile_config_for("forward", problem.problem_class)}):
        assert planned("forward", problem) is None
    with override(pack=8):  # more heads than there are in a group
        assert planned("forward", problem) is None


def test_tiles_end_with_the_frames_of_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that extends beyond the last frame would be written by TMA into the next video."""

    def tile_config_for(frames: int) -> SmallTileConfig | None:
        layout = Layout((8, frames, 16, 16, 2, 64), (frames * 2**15, 2**15, 2**11, 128, 64, 1))
        ones, causal = (1, 1, 1), (False, False, False)
        tensors = {"query": layout, "key": layout, "value": layout}
        axes = {"kernel_size": (3, 3, 3), "stride": ones, "dilation": ones, "is_causal": causal}
        return small_tile_config(problem_of_image(monkeypatch, **tensors, **axes))

    even = tile_config_for(10)
    assert even is not None
    assert even.tile[0] == 2
    assert tile_config_for(9) is None  # 9 frames allow only tiles of one frame, which do not fit


def test_why_there_are_no_tiles_says_how_many_keys_would_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """2x8 queries of four heads see 22x28 keys of 21x21 windows, in boxes of 32 columns."""
    wide = problem_of_image(monkeypatch, kernel_size=(21, 21))
    assert small_tile_config(wide) is None
    assert no_small_tiles(wide) == f"no tiles: 64 query rows see at least {22 * 32} keys, whose scores do not fit"


def test_descriptors_are_what_their_constructor_makes() -> None:
    """Calls make descriptors without TensorDescriptor's checks; the constructor accepts the same fields."""
    query, key = (torch.empty(2, 12, 20, h, 64, dtype=torch.bfloat16) for h in (8, 2))
    registers = torch.empty(5, 2, 64, dtype=torch.bfloat16).expand(2, -1, -1, -1)
    for tensor, boxes in (
        (query, query_boxes(layout(query), (1, 2, 8), 4)),
        (key, key_boxes(layout(key), (1, 8, 2))),
        (key[:1, :1, ..., :1, :], key_boxes(layout(key[:1, :1, ..., :1, :]), (1, 8, 2))),  # axes of length one
        (registers, register_boxes(layout(registers), 16)),
    ):
        assert descriptor(tensor, boxes) == TensorDescriptor(tensor, **boxes)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 5, 7), (1, 4, 1, 8)])
def test_layout_of_a_new_tensor(shape: tuple[int, ...]) -> None:
    assert contiguous(shape) == layout(torch.empty(shape))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Problems of one to three axes, made from meta tensors."""
    rank = draw(st.integers(1, 3))
    lengths = [draw(st.integers(1, 40 if rank < 3 else 12)) for _ in range(rank)]
    kernel = tuple(draw(st.integers(1, min(n, 20))) for n in lengths)
    causal = tuple(draw(st.booleans()) for _ in lengths)
    group, dim = draw(st.sampled_from((1, 2, 3, 4, 6, 8, 20))), draw(st.sampled_from((64, 128)))
    registers = draw(st.sampled_from((0, 1, 16, 40)))
    stride = tuple(draw(st.integers(1, n)) if draw(st.booleans()) else 1 for n in kernel)
    dilation = tuple(draw(st.sampled_from((1, 2, 3))) if rank < 3 else 1 for _ in lengths)
    lengths = [n * d for n, d in zip(lengths, dilation, strict=True)]
    query, key = (torch.empty(2, *lengths, h, dim, dtype=torch.bfloat16, device="meta") for h in (2 * group, 2))
    extra = torch.empty(2, registers, 2, dim, dtype=torch.bfloat16, device="meta") if registers else None
    return problem_of(Inputs(query, key, key, extra, extra), Options(None, kernel, stride, dilation, causal, 1.0))


@settings(deadline=None)
@given(problems())
def test_parts_cover_what_a_tile_sees(problem: Problem) -> None:
    """Parts respect the limits of TMA and cover all that tiles see, also at borders, where that may be more."""
    configs = (
        (small_tile_config(problem), window_bounds),
        (small_dq_tile_config(problem), window_bounds),
        (small_dkv_tile_config(problem), query_bounds),
    )
    for config, bounds in configs:
        if config is None:
            continue
        assert prod(config.tile) * config.pack == 64
        assert problem.group % config.pack == 0
        assert problem.lengths[0] % config.tile[0] == 0
        assert (94 if problem.query.shape[-1] == 128 else 64) <= config.maxnreg <= 255  # ptxas asks for as many
        assert all(side <= 256 for box in config.parts for side in box)
        assert all(prod(box) >= 16 for box in config.parts)
        assert config.registers >= problem.registers or bounds is query_bounds
        for axis, (length, kernel, stride, causal) in enumerate(problem.axes):
            sides = [box[axis] for box in config.parts]
            covered = sum(sides) if axis == config.axis else sides[0]
            first = torch.arange(0, length, config.tile[axis])
            last = (first + config.tile[axis] - 1).clamp(max=length - 1)
            corner, _ = bounds(first, length, kernel, stride, causal)
            _, end = bounds(last, length, kernel, stride, causal)
            if axis == 0:  # like the kernels: the last frame is followed by the next image of the batch
                corner = corner.clamp(max=length - covered).clamp(min=0)
                assert int(corner.max()) + covered <= length
            assert int((end - corner).max()) < covered


@settings(deadline=None)
@given(problems())
def test_the_ring_of_a_run_has_what_each_tile_sees(problem: Problem) -> None:
    config = rolling_tile_config(problem)
    if config is None:
        return
    assert prod(config.tile) * config.pack == 64
    assert problem.group % config.pack == 0
    assert problem.lengths[0] % config.tile[0] == 0
    assert config.axis or not config.shift  # else it would write into the image before
    assert config.registers >= problem.registers
    assert all(side <= 256 for side in config.box)
    assert all(n % 16 == 0 for n in (prod(config.box), *config.rest))
    assert prod(config.box) >= 64 or not config.in_ring
    assert 2 <= config.programs <= (5 if problem.query.shape[-1] == 128 else 6)  # 94 registers, as above
    for axis, (length, kernel, stride, causal) in enumerate(problem.axes):
        shift = config.shift if axis == config.axis else 0
        first = torch.arange(-shift, length, config.tile[axis])
        assert len(first) == config.tiles(problem)[axis]
        last = (first + config.tile[axis] - 1).clamp(max=length - 1)
        # Like the kernel, start at the first position's window; with a shift that position may be before the image.
        corner, _ = window_bounds(first.clamp(min=0), length, kernel, stride, causal)
        _, end = window_bounds(last, length, kernel, stride, causal)
        if axis != config.axis:
            assert int((end - corner).max()) < config.box[axis]
            continue
        step = config.box[axis]
        assert step == config.tile[axis]
        first_stage = (corner - config.phase).div(step, rounding_mode="floor")
        seen = (config.stages - 1) * step + sum(config.rest) // (prod(config.box) // step)
        assert sum(config.rest) <= prod(config.box)
        assert bool((end < first_stage * step + config.phase + seen).all())
        assert bool((first_stage >= 0).all())
        assert set(first_stage.diff().tolist()) <= {0, 1}


def end_of(runs: list[int], tile_rows: int, programs: int) -> float:
    """Time at which the last program ends, in tiles, if each run goes to the program that is free first."""
    free = [0.0] * programs
    for length in runs:
        for _ in range(tile_rows):
            heapq.heapreplace(free, free[0] + length + START)
    return max(free)


def runs_of(tiles: int, count: int, long: int, short: int) -> list[int]:
    """Lengths of the rows of tiles that the kernel walks: ``count`` long ones, then short ones; the last is cut."""
    first = [i * long for i in range(count)] + list(range(count * long, tiles, short))
    return [end - start for start, end in zip(first, [*first[1:], tiles], strict=True)]


@pytest.mark.parametrize(
    ("tiles", "tile_rows", "programs"),
    [(32, 512, 396), (32, 512, 264), (16, 768, 264), (16, 1024, 528), (1024, 16, 528), (3, 700, 396), (16, 1, 132)],
)
def test_a_cut_ends_as_early_as_runs_of_one_length(tiles: int, tile_rows: int, programs: int) -> None:
    (count, long), short = cut(tiles, tile_rows, programs)
    own = end_of(runs_of(tiles, count, long, short), tile_rows, programs)
    others = [end_of(runs_of(tiles, 0, 1, n), tile_rows, programs) for n in range(1, min(tiles, 32) + 1)]
    assert own <= 1.02 * min(others)
    if len(set(others)) > 1:
        assert own < 0.95 * max(others)


@pytest.mark.parametrize(
    ("tiles", "tile_rows", "programs", "expected"),
    [
        (32, 512, 396, ((3, 10), 1)),  # long runs alone would end after 44 tiles; short ones fill the gaps
        (16, 1, 132, ((0, 1), 1)),  # a single row is cut into single tiles
        (16, 132, 132, ((1, 16), 1)),
    ],
)
def test_long_runs_come_first(tiles: int, tile_rows: int, programs: int, expected: tuple[tuple[int, int], int]) -> None:
    assert cut(tiles, tile_rows, programs) == expected


@pytest.mark.parametrize(("count", "parts"), [(14, [8, 4, 2]), (15, [8, 4, 4]), (8, [8]), (1, [1]), (9, [8, 1])])
def test_parts_are_powers_of_two_that_cover_an_axis(count: int, parts: list[int]) -> None:
    assert binary_parts(count, 3) == parts


# --- Packed samples of one axis

PACKED = (
    Case("gqa-sink", (), 128, is_causal=True, heads=16, kv_heads=2, head_dim=64, value_dim=64, sink="learned"),
    Case("tiles-zero-sink", (), 16, is_causal=True, heads=2, kv_heads=2, head_dim=64, value_dim=64, sink="zero"),
    Case("wide-gqa", (), 40, is_causal=True, heads=8, kv_heads=2, head_dim=128, value_dim=128),
    Case("three-keys", (), 3, is_causal=True, heads=4, kv_heads=4, head_dim=32, value_dim=32),
)


@pytest.fixture
def taken(wherever_possible: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels were used; they are for calls of any size."""
    names: list[str] = []
    functions = (
        (small_forward, "forward"), (small_forward_rolling, "forward"), (small_dq, "query_gradient"),
        (small_dkv, "key_gradients"),
    )  # fmt: skip
    for module, name in functions:
        compute = getattr(module, name)
        label = f"{module.__name__.rpartition('.')[2]}.{name}"
        call = partial(lambda compute, label, *args: names.append(label) or compute(*args), compute, label)
        monkeypatch.setattr(module, name, call)
    return names


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_texts_match_the_oracle(case: Case, dtype: torch.dtype, taken: list[str]) -> None:
    assert_packed_oracle(replace(case, dtype=dtype))
    forward = "small_forward_rolling" if case.kernel_size == 128 else "small_forward"
    assert taken == [f"{forward}.forward", "small_dq.query_gradient", "small_dkv.key_gradients"] * 2


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_out"])
@pytest.mark.parametrize("case", PACKED[:2], ids=str)
def test_what_is_not_finite_reaches_no_other_packed_text(case: Case, name: str, value: float, taken: list[str]) -> None:
    assert_texts_are_apart(replace(case, dtype=torch.bfloat16), name, value)
    assert len(taken) == 12


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_causal": (False,)}, "only if they are causal"),
        ({"stride": (2,)}, "without stride"),
        ({"dilation": (2,)}, "and dilation"),
        ({"key_mask": contiguous((1, 32768, 1, 1))}, "key_mask"),
        (
            {"additional_keys": contiguous((3, 4, 2, 128)), "additional_values": contiguous((3, 4, 2, 128))},
            "additional",
        ),
    ],
)
def test_packed_texts_that_are_not_cut_from_one_text(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = problem_of_packed_texts(monkeypatch, kernel_size=(64,))
    problem = small._replace(**changes)
    for variant in (variants.ROLLING_FORWARD, variants.TILES_FORWARD, variants.TILES_QUERY_GRADIENT,
                    variants.TILES_KEY_GRADIENTS):  # fmt: skip
        assert variant.supports(Question(small)) is None
        assert reason in (variant.supports(Question(problem)) or "")


# --- Key masks

MASKED = (
    Case("2d", (32, 40), 7, head_dim=64, value_dim=64, seen=0.5),
    Case("2d-ragged-gqa-sink-registers", (37, 45), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, registers=5,
         sink="learned", seen=0.3),
    Case("2d-gqa-most-hidden", (33, 41), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, seen=0.03),
    Case("2d-gqa-few-hidden", (33, 41), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, seen=0.99),
    Case("2d-nothing", (32, 40), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, seen=0.0),
    Case("2d-everything", (32, 40), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, seen=1.0),
    Case("2d-registers-only", (33, 40), (7, 5), head_dim=64, value_dim=64, registers=20, sink="zero", seen=0.0),
    Case("2d-wide-heads", (33, 40), 7, heads=8, kv_heads=2, head_dim=128, value_dim=128, seen=0.5),
    Case("2d-padded-40-causal-axis", (20, 41), (5, 9), 1, 1, (True, False), 6, 2, head_dim=40, value_dim=40, seen=0.2),
    Case("2d-many-keys", (21, 40), 13, heads=6, kv_heads=3, head_dim=64, value_dim=64, seen=0.4),
    Case("2d-dilated-gqa", (32, 48), (7, 5), 1, (2, 3), heads=8, kv_heads=2, head_dim=64, value_dim=64, seen=0.5),
    Case("2d-strided", (33, 40), 9, (4, 3), heads=4, kv_heads=2, head_dim=64, value_dim=64, registers=3, seen=0.3),
    Case("1d-causal-gqa-sink", (1000,), 128, is_causal=True, heads=16, kv_heads=2, head_dim=64, value_dim=64,
         sink="learned", seen=0.5),
    Case("1d-dilated-causal", (960,), 32, 1, 3, True, 8, 2, head_dim=32, value_dim=32, seen=0.1),
    Case("3d", (8, 12, 18), 3, heads=4, kv_heads=4, head_dim=64, value_dim=64, seen=0.1),
    Case("3d-strided-causal", (8, 12, 18), 3, (2, 1, 3), 1, (True, False, False), 4, 2, head_dim=64, value_dim=64,
         seen=0.3),
)  # fmt: skip


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masked_keys_match_the_oracle(case: Case, dtype: torch.dtype, taken: list[str]) -> None:
    case = replace(case, dtype=dtype)
    leaves, mask = make_inputs(case, "cuda"), key_mask(case, "cuda")
    assert mask is not None
    first, second = (run(case, leaves, "fused") for _ in range(2))
    expected = ["small_forward.forward"]
    problem, _ = call_of(case, {name: t.detach() for name, t in leaves.items()})
    if small_dq_tile_config(problem) is not None:
        expected.append("small_dq.query_gradient")
    if small_dkv_tile_config(problem) is not None:
        expected.append("small_dkv.key_gradients")
    assert taken == expected * 2
    assert_close(case, first, oracle(case, leaves), run(case, leaves, "eager"))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    for name in ("key", "value"):
        assert not first.grads[name][~mask].any()
    for dirty in (math.nan, math.inf):
        hidden = {name: t.detach().clone() for name, t in leaves.items()}
        for name in ("key", "value"):
            hidden[name][~mask] = dirty
        found = run(case, {name: t.requires_grad_() for name, t in hidden.items()}, "fused")
        for name, tensor in found.tensors().items():
            assert torch.equal(tensor, first.tensors()[name]), (name, dirty)


@pytest.mark.gpu
@needs_device
@pytest.mark.usefixtures("wherever_possible")
@pytest.mark.parametrize("case", [MASKED[0], MASKED[1], MASKED[10], MASKED[12], MASKED[14]], ids=str)
def test_nan_beside_masked_keys_reaches_only_the_queries_that_see_it(case: Case) -> None:
    case = replace(case, dtype=torch.bfloat16)
    tensors, mask = {name: t.detach() for name, t in make_inputs(case, "cuda").items()}, key_mask(case, "cuda")
    assert mask is not None
    seen = mask.nonzero().tolist()
    tensors["value"][(*seen[len(seen) // 2], 0, 3)] = math.nan
    tensors["key"][(*seen[len(seen) // 3], 0, 5)] = math.nan
    ours = neighborhood_attention(**arguments(case, tensors), return_lse=True, impl="fused")
    with override(portable_only=True):
        portable = neighborhood_attention(**arguments(case, tensors), return_lse=True, impl="fused")
    for mine, expected, allowed in zip(ours, portable, (4e-3, 1e-5), strict=True):
        finite = expected.isfinite()
        assert not finite.all()
        assert torch.equal(mine.isfinite(), finite)
        assert error(mine[finite], expected[finite]) < allowed


# --- Packed images

RAGGED = ((37, 45), (1, 1), (3, 2), (64, 5), (0, 4), (1, 30), (20, 20), (6, 22))
"""Some are smaller than the window, and 22 and 30 are the lengths at which tiles of 8 keys start before the image."""
PACKED_IMAGES = (
    Case("gqa-sink", (), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, sink="learned", shapes=RAGGED),
    Case("narrow-registers", (), (7, 5), heads=4, kv_heads=4, head_dim=32, value_dim=32, registers=5, sink="zero",
         shapes=RAGGED),
    Case("padded-causal-axis", (), (7, 5), 1, 1, (False, True), 4, 4, 40, 40, shapes=RAGGED),
    Case("group-3-causal-axis", (), (5, 9), 1, 1, (True, False), 6, 2, 64, 64, shapes=((33, 40), (9, 9), (2, 100))),
    Case("wide-registers", (), 7, heads=8, kv_heads=2, head_dim=128, value_dim=128, registers=4, sink="learned",
         shapes=((40, 30), (1, 1), (6, 50))),
    Case("13x13", (), 13, heads=6, kv_heads=3, head_dim=64, value_dim=64, shapes=((40, 48), (13, 13), (5, 60))),
    Case("3d", (), 3, heads=4, kv_heads=2, head_dim=32, value_dim=32, shapes=((8, 20, 20), (3, 2, 9), (1, 1, 1))),
    Case("3d-causal", (), 3, 1, 1, (True, False, False), 4, 2, 64, 64, shapes=((8, 9, 10), (1, 12, 12))),
)  # fmt: skip


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PACKED_IMAGES, ids=str)
def test_packed_images_match_each_image_alone(case: Case, dtype: torch.dtype, taken: list[str]) -> None:
    check(replace(case, dtype=dtype), "fused")
    assert "small_forward.forward" in taken
    if case.name in ("gqa-sink", "narrow-registers"):
        assert taken == ["small_forward.forward", "small_dq.query_gradient", "small_dkv.key_gradients"]


@pytest.mark.gpu
@needs_device
def test_packed_images_are_read_from_views_of_a_fused_projection(taken: list[str]) -> None:
    case = replace(PACKED_IMAGES[0], dtype=torch.bfloat16, sink="none")
    inputs = make_inputs(case, "cuda")
    joined = torch.cat([x.detach() for x in inputs.values()], 1)
    views = joined.split((8, 2, 2), 1)
    strided = {name: x.requires_grad_() for name, x in zip(inputs, views, strict=True)}
    expected, found = (run(case, x, "fused").tensors() for x in (inputs, strided))
    assert len(taken) == 6
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_not_finite_reaches_no_other_packed_image(name: str, value: float, taken: list[str]) -> None:
    """Nothing of other images changes, and of its own image only what sees it."""
    case = replace(PACKED_IMAGES[0], dtype=torch.bfloat16)
    inputs = make_inputs(case, "cuda")
    clean = run(case, inputs, "fused").tensors()
    start = sum(map(prod, RAGGED[:6]))
    own = torch.zeros(sum(map(prod, RAGGED)), dtype=torch.bool, device="cuda")
    own[start : start + 400] = True
    dirty = {n: x.detach().clone() for n, x in inputs.items()}
    dirty[name][start + 20 * 10 + 19] = value
    dirty = {n: x.requires_grad_() for n, x in dirty.items()}
    found = run(case, dirty, "fused").tensors()
    for n in clean:
        if "sink" not in n:
            assert torch.equal(found[n][~own], clean[n][~own]), n
    sees = torch.zeros(20, 20, dtype=torch.bool, device="cuda")
    sees[10, 19] = True
    if name != "query":
        sees[7:14, 13:] = True
    out, before = (x["out"][own].unflatten(0, (20, 20)) for x in (found, clean))
    assert error(out[~sees], before[~sees]) < 4e-3
    assert not out[sees].isfinite().all()
    assert len(taken) == 6


@st.composite
def packed_problems(draw: st.DrawFn) -> Problem:
    rank = draw(st.sampled_from((2, 3)))
    longest = 40 if rank == 2 else 12
    shapes = draw(st.lists(st.tuples(*[st.integers(0, longest)] * rank), min_size=1, max_size=4))
    kernel = tuple(draw(st.integers(1, 13 if rank == 2 else 5)) for _ in range(rank))
    causal = tuple(draw(st.booleans()) for _ in range(rank))
    group, tokens = draw(st.sampled_from((1, 2, 3, 4))), sum(map(prod, shapes))
    query, key = (torch.empty(1, tokens, h, 64, dtype=torch.bfloat16, device="meta") for h in (2 * group, 2))
    options = Options(None, kernel, (1,) * rank, (1,) * rank, causal, 1.0)
    return problem_of(Inputs(query, key, key, shapes=torch.tensor(shapes)), options)


@settings(deadline=None)
@given(packed_problems())
def test_parts_cover_what_a_tile_of_any_packed_image_sees(problem: Problem) -> None:
    configs = (
        (small_tile_config(problem), window_bounds),
        (small_dq_tile_config(problem), window_bounds),
        (small_dkv_tile_config(problem), query_bounds),
    )
    assert problem.packing is not None
    shapes = [three_axes(shape, 1) for shape in problem.packing.shapes if prod(shape)]
    for config, bounds in configs:
        if config is None:
            continue
        for axis, (_, kernel, stride, causal) in enumerate(problem.axes):
            sides = [box[axis] for box in config.parts]
            covered = sum(sides) if axis == config.axis else sides[0]
            for length in {shape[axis] for shape in shapes}:
                own, side = min(kernel, length), config.tile[axis]
                shift = key_tile_shift(length, own, side) if bounds is query_bounds else 0
                # As many tiles as ``sample_tables`` counts, with every token in one of them.
                first = torch.arange(-(-length // side)) * side - shift
                assert int(first[-1]) + side >= length
                low, _ = bounds(first.clamp(min=0), length, own, stride, causal)
                _, high = bounds((first + side - 1).clamp(max=length - 1), length, own, stride, causal)
                assert int((high - low).max()) < covered


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stride": (1, 2)}, "without stride and dilation, not with (1, 2) and (1, 1)"),
        ({"dilation": (2, 1)}, "without stride and dilation, not with (1, 1) and (2, 1)"),
        ({"query": Layout((1, 100, 8, 20), (192, 192, 24, 1))}, "multiple of 8 channels, not 20"),
        ({"value": Layout((1, 32744, 2, 64), (2**31, 2**17, 64, 1))}, "a packed image of 16384 tokens takes more than"),
        ({"is_causal": (True, False)}, None),
        ({"additional_keys": contiguous((4, 3, 2, 64)), "additional_values": contiguous((4, 3, 2, 64))}, None),
    ],
)
def test_packed_images_that_tiles_take(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    problem = problem_of_packed_images(monkeypatch, **changes)
    for variant in (variants.TILES_FORWARD, variants.TILES_QUERY_GRADIENT, variants.TILES_KEY_GRADIENTS):
        found = variant.supports(Question(problem))
        assert (found is None) if reason is None else (reason in (found or ""))
    assert "one axis only" in (variants.ROLLING_FORWARD.supports(Question(problem)) or "")


def test_packed_images_leave_the_forward_pass_of_many_keys_to_portable_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two programs on a multiprocessor are too few, which in images of one shape they are not."""
    many = {"kernel_size": (13, 13), "value": None}
    for make, fits in ((problem_of_packed_images, False), (problem_of_image, True)):
        problem = make(monkeypatch)
        key = contiguous((*problem.key.shape[:-2], 3, 64))
        many |= {"query": contiguous((*problem.query.shape[:-2], 6, 64)), "key": key, "value": key}
        plan = variants.TILES_FORWARD.plan(Question(problem._replace(**many)))
        assert isinstance(plan, SmallTileConfig) is fits
        assert fits or "2 programs share a multiprocessor" in plan


def test_gradients_of_packed_images_of_any_size_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8x8 keys see 17x17 queries at some borders, too many, if they do not start before the image."""
    shapes = tuple((n, n + 3) for n in range(112, 128))
    problem = problem_of_packed_images(monkeypatch, shapes)
    config = small_dkv_tile_config(problem)
    assert config is not None
    assert (config.tile, config.keys) == ((1, 8, 8), 256)
    assert gradients(problem, problem.out) == [small_dq_tile_config(problem), config]
