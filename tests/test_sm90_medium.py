"""The kernels for windows between small and large on compute capability 9.0 against the fp64 oracle."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import test_forward_mode
import test_fused_bias
import torch
from helpers import Case, arguments, assert_close, assert_nan_stays, error, key_mask, make_inputs, oracle, run
from hypothesis import given, settings
from problems import problem_of_image, problem_of_text
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from test_sm90_large import assert_oracle, call_of, needs_device
from test_sm90_small import problems

from natten_layers import neighborhood_attention
from natten_layers.geometry import query_bounds, window_bounds
from natten_layers.kernels import dispatch
from natten_layers.kernels.dispatch import Question
from natten_layers.kernels.host.problem import Layout, Problem, contiguous
from natten_layers.kernels.host.tiling import Kind
from natten_layers.kernels.host.tuned import override
from natten_layers.kernels.portable import forward
from natten_layers.kernels.sm90 import (
    large_tiling,
    medium_backward,
    medium_forward,
    medium_jvp,
    medium_tiling,
    variants,
)
from natten_layers.kernels.sm90.medium_tiling import MediumTileConfig

CASES = (
    Case("2d-72-gqa", (20, 27), (9, 7), heads=4, kv_heads=2, head_dim=72, value_dim=72),
    Case("3d-causal-gqa-sink", (6, 19, 21), (4, 7, 7), 1, 1, (True, False, False), 4, 1, head_dim=64, value_dim=64,
         sink="learned"),
    Case("3d-96-stride", (5, 17, 18), (3, 5, 5), (1, 2, 1), heads=2, kv_heads=2, head_dim=96, value_dim=96),
    Case("2d-112-dilated-zero-sink", (30, 33), (5, 11), 1, (2, 3), heads=3, kv_heads=3, head_dim=112, value_dim=112,
         sink="zero"),
    Case("1d-128-causal-gqa", (700,), 101, is_causal=True, heads=4, kv_heads=2, head_dim=128, value_dim=128, batch=1),
    Case("2d-80-group-3-strides", (33, 40), (21, 20), (2, 3), 1, (True, False), 6, 2, head_dim=80, value_dim=80,
         batch=3),
    Case("2d-40-short-axis", (9, 40), 9, heads=2, kv_heads=2, head_dim=40, value_dim=40),
    Case("3d-frames-that-no-tile-divides", (7, 18, 19), (5, 5, 5), heads=2, kv_heads=1, head_dim=64, value_dim=64,
         batch=1),
    Case("2d-window-of-the-whole-image", (7, 9), (7, 9), heads=2, kv_heads=1, head_dim=16, value_dim=16, sink="zero"),
)  # fmt: skip
# Register tokens: some of a chunk, whole chunks, and both.
REGISTERS = (
    Case("2d-64-gqa-16-registers", (20, 27), (9, 7), heads=4, kv_heads=2, head_dim=64, value_dim=64, registers=16),
    Case("2d-72-128-registers-sink", (33, 21), (13, 9), heads=2, kv_heads=2, head_dim=72, value_dim=72, registers=128,
         sink="learned"),
    Case("2d-96-group-3-strides-4-registers", (33, 40), (21, 20), (2, 3), 1, (True, False), 6, 2, head_dim=96,
         value_dim=96, registers=4),
    Case("3d-causal-gqa-100-registers", (6, 19, 21), (4, 7, 7), 1, 1, (True, False, False), 4, 1, head_dim=64,
         value_dim=64, registers=100, sink="learned"),
    Case("2d-112-dilated-one-register", (30, 33), (5, 11), 1, (2, 3), heads=3, kv_heads=3, head_dim=112, value_dim=112,
         registers=1, sink="zero"),
    Case("1d-128-causal-gqa-300-registers", (700,), 101, is_causal=True, heads=4, kv_heads=2, head_dim=128,
         value_dim=128, registers=300, batch=1),
)  # fmt: skip
# Rings that tiles and chunks divide and others, windows of almost a whole ring, and all axes of a video.
RINGS = (
    Case("2d-64-gqa-ring", (19, 40), (7, 11), heads=4, kv_heads=2, head_dim=64, value_dim=64,
         is_periodic=(False, True)),
    Case("2d-32-ring-of-13", (40, 13), (5, 12), heads=2, kv_heads=2, head_dim=32, value_dim=32,
         is_periodic=(False, True), sink="learned"),
    Case("2d-72-torus-stride-registers", (22, 25), (9, 8), (2, 3), heads=2, kv_heads=1, head_dim=72, value_dim=72,
         is_periodic=True, registers=20),
    Case("2d-128-dilated-torus", (30, 33), (5, 9), 1, (2, 3), heads=2, kv_heads=2, head_dim=128, value_dim=128,
         is_periodic=True, sink="zero"),
    Case("3d-64-causal-torus", (6, 19, 21), (4, 7, 7), 1, 1, (True, False, False), 4, 1, head_dim=64, value_dim=64,
         is_periodic=(False, True, True)),
    Case("3d-96-torus", (9, 11, 13), (3, 5, 7), heads=2, kv_heads=1, head_dim=96, value_dim=96, is_periodic=True,
         batch=1),
    Case("1d-64-ring", (700,), 301, heads=2, kv_heads=2, head_dim=64, value_dim=64, is_periodic=True, registers=70),
)  # fmt: skip
MASKED = (
    Case("2d-64-gqa-mask", (20, 27), (9, 7), heads=4, kv_heads=2, head_dim=64, value_dim=64, seen=0.5),
    Case("2d-64-hardly-masked", (20, 27), (9, 7), heads=4, kv_heads=1, head_dim=64, value_dim=64, seen=0.995),
    Case("2d-32-nothing-seen", (9, 14), (5, 7), head_dim=32, value_dim=32, seen=0.0),
    Case("2d-72-mask-sink-registers", (33, 21), (13, 9), head_dim=72, value_dim=72, registers=20, sink="learned",
         seen=0.02),
    Case("2d-112-dilated-mask", (30, 33), (5, 11), 1, (2, 3), heads=3, kv_heads=3, head_dim=112, value_dim=112,
         seen=0.1),
    Case("3d-causal-mask", (6, 19, 21), (4, 7, 7), 1, 1, (True, False, False), 4, 1, head_dim=64, value_dim=64,
         sink="zero", seen=0.7),
    Case("1d-128-causal-mask", (700,), 101, is_causal=True, heads=4, kv_heads=2, head_dim=128, value_dim=128, seen=0.3),
    Case("2d-64-masked-ring", (19, 40), (7, 11), heads=4, kv_heads=2, head_dim=64, value_dim=64, seen=0.01,
         is_periodic=(False, True)),
    Case("3d-96-masked-torus", (9, 11, 13), (3, 5, 7), kv_heads=1, head_dim=96, value_dim=96, is_periodic=True,
         batch=1, seen=0.6),
)  # fmt: skip
OTHER_GRIDS = (
    Case("2d-64-finer", (22, 41), (5, 7), heads=4, kv_heads=2, head_dim=64, value_dim=64, key_spatial=(11, 20),
         sink="learned"),
    Case("2d-72-coarser-registers", (9, 14), (8, 5), heads=2, kv_heads=2, head_dim=72, value_dim=72, registers=20,
         key_spatial=(36, 45)),
    Case("2d-32-finer-masked-ring", (30, 40), (7, 6), head_dim=32, value_dim=32, key_spatial=(13, 17), seen=0.6,
         is_periodic=(False, True)),
    Case("3d-128-both", (4, 18, 9), (3, 5, 5), heads=4, kv_heads=1, head_dim=128, value_dim=128, batch=1,
         key_spatial=(7, 9, 19)),
    Case("1d-64-finer", (700,), 101, kv_heads=1, head_dim=64, value_dim=64, key_spatial=(333,), registers=70),
)  # fmt: skip
# Most chunks lie inside the windows of all rows of a tile, and need no mask.
INSIDE = (
    Case("1d-64", (900,), 401, heads=2, kv_heads=2, head_dim=64, value_dim=64, sink="learned"),
    Case("1d-32-causal-gqa-70-registers", (900,), 300, is_causal=True, heads=4, kv_heads=1, head_dim=32, value_dim=32,
         registers=70),
    Case("1d-80-dilated", (903,), 285, 1, 3, heads=2, kv_heads=1, head_dim=80, value_dim=80),
    Case("1d-64-mask", (700,), 401, heads=2, kv_heads=1, head_dim=64, value_dim=64, seen=0.6),
    Case("1d-64-inside-a-finer-grid", (1400,), 301, kv_heads=1, head_dim=64, value_dim=64, key_spatial=(700,)),
    Case("2d-64-strides", (64, 72), (32, 40), 8, heads=2, kv_heads=1, head_dim=64, value_dim=64, registers=20),
    Case("3d-64-strides", (16, 32, 40), (8, 16, 16), (4, 8, 8), heads=2, kv_heads=2, head_dim=64, value_dim=64,
         batch=1),
)  # fmt: skip
ALL = CASES + REGISTERS + RINGS + MASKED + OTHER_GRIDS + INSIDE
MEDIUM: dict[Kind, str] = {
    "forward": variants.MEDIUM,
    "backward_query": variants.MEDIUM,
    "backward_key": variants.MEDIUM,
}


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_matches_the_oracle(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    leaves = make_inputs(case, "cuda")
    problem, arguments = call_of(case, {name: t.detach() for name, t in leaves.items()})
    assert variants.MEDIUM_FORWARD.supports(Question(problem)) is None
    config = medium_tiling.forward_tile_config(problem)
    assert config is not None
    assert_oracle(case, leaves, medium_forward.forward(config, *arguments))


def spy(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """The functions of ``medium_jvp`` that are called from now on, by name."""
    taken: list[str] = []
    for name in names:
        compute = getattr(medium_jvp, name)
        monkeypatch.setattr(medium_jvp, name, lambda *args, run=compute, name=name: taken.append(name) or run(*args))
    return taken


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("name", ["forward_with_tangents", "jvp"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_tangents_match_the_definition(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch with the output, and after a forward pass that keeps gradients; two runs are equal bit by bit."""
    case = replace(case, dtype=torch.bfloat16)
    inputs = {n: t.detach() for n, t in make_inputs(case, "cuda").items()}
    taken = spy(monkeypatch, name)
    with override(variants={"jvp": variants.MEDIUM}), torch.set_grad_enabled(name == "jvp"):
        first, second = (test_forward_mode.check(case, inputs, test_forward_mode.tangents_of(inputs)) for _ in "ab")
    assert taken == [name, name]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("without", ["additional_keys", "sink"])
def test_register_tokens_and_sinks_need_not_move(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register tokens without tangents, as those of a layer, which are parameters."""
    case = replace(REGISTERS[1], dtype=torch.bfloat16)
    inputs = {n: t.detach() for n, t in make_inputs(case, "cuda").items()}
    constant = (without,) if without == "sink" else ("additional_keys", "additional_values")
    tangents = {n: t for n, t in test_forward_mode.tangents_of(inputs).items() if n not in constant}
    taken = spy(monkeypatch, "jvp", "forward_with_tangents")
    for with_gradients in (True, False):
        with override(variants={"jvp": variants.MEDIUM}), torch.set_grad_enabled(with_gradients):
            test_forward_mode.check(case, inputs, tangents)
    assert taken == ["jvp", "forward_with_tangents"]


@pytest.mark.gpu
@needs_device
@torch.no_grad()
def test_nan_leaves_the_outputs_beside_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in one key reaches the outputs of the queries that see it and of no others."""
    query, key, value = (torch.randn(1, 24, 40, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    tangents = query.cos(), key.cos(), value.cos()
    key[0, 3, 5, 1] = torch.nan
    expected = neighborhood_attention(query, key, value, 9)
    taken = spy(monkeypatch, "forward_with_tangents")
    with override(variants={"jvp": variants.MEDIUM}):
        out, _, *_ = torch.func.jvp(lambda q, k, v: neighborhood_attention(q, k, v, 9), (query, key, value), tangents)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any()
    assert taken == ["forward_with_tangents"]


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradients_match_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public operation; two runs are equal bit by bit."""
    case = replace(case, dtype=torch.bfloat16)
    leaves = make_inputs(case, "cuda")
    taken: list[str] = []
    for module, name in (
        (medium_forward, "forward"), (medium_backward, "query_gradient"), (medium_backward, "key_gradients"),
    ):  # fmt: skip
        compute = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, run=compute, name=name: taken.append(name) or run(*args))
    with override(variants=MEDIUM):
        first, second = (run(case, leaves, "fused") for _ in range(2))
    assert taken == ["forward", "query_gradient", "key_gradients"] * 2
    assert_close(case, first, oracle(case, leaves), run(case, leaves, "eager"))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", [CASES[1], CASES[3], REGISTERS[3]], ids=str)
@pytest.mark.parametrize("medium", [("backward_query",), ("backward_key",), ("forward",)], ids=str)
def test_each_direction_may_take_it_alone(case: Case, medium: tuple[str, ...]) -> None:
    """Statistics have one order in these kernels and in portable ones, so that directions may be mixed."""
    case = replace(case, dtype=torch.bfloat16)
    leaves = make_inputs(case, "cuda")
    with override(variants={kind: variants.MEDIUM if kind in medium else "portable" for kind in MEDIUM}):
        assert_close(case, run(case, leaves, "fused"), oracle(case, leaves), run(case, leaves, "eager"))


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", CASES[:6] + REGISTERS + RINGS[:5] + MASKED[:1] + OTHER_GRIDS[:3], ids=str)
def test_nan_reaches_no_other_image_and_no_other_head(case: Case) -> None:
    case = replace(case, dtype=torch.bfloat16, batch=2)
    with override(variants=MEDIUM):
        assert_nan_stays(case, make_inputs(case, "cuda"))


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", CASES[:6] + REGISTERS + RINGS[:5] + (MASKED[0], MASKED[3]) + INSIDE[:4], ids=str)
def test_nan_and_inf_reach_only_the_queries_that_see_them(case: Case) -> None:
    case = replace(case, dtype=torch.bfloat16, batch=2)
    tensors = {name: t.detach().clone() for name, t in make_inputs(case, "cuda").items()}
    middle, rank = tuple(n // 2 for n in case.spatial), len(case.spatial)
    tensors["value"][(0, *middle, case.kv_heads - 1, 7)] = float("nan")
    tensors["value"][(0, *middle, 0, 8)] = float("inf")
    tensors["key"][(1, *(-1,) * rank, 0, 5)] = float("nan")
    tensors["query"][(1, *(0,) * rank, 0, 3)] = float("nan")
    problem, arguments = call_of(case, tensors)
    config = medium_tiling.forward_tile_config(problem)
    assert config is not None
    mine, row_max, row_sum = medium_forward.forward(config, *arguments)
    expected, other_max, other_sum = forward.forward(forward.plan(problem, True), *arguments)
    for own, other, allowed in (
        (mine, expected, 4e-3),
        (row_max + row_sum.log(), other_max + other_sum.log(), 1e-5),  # pyright: ignore[reportOptionalMemberAccess, reportOptionalOperand]
    ):
        broken = ~other.isfinite()
        assert broken.any()
        assert not broken.all()
        assert torch.equal(~own.isfinite(), broken)
        assert error(own[~broken], other[~broken]) < allowed


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", MASKED, ids=str)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 3e38], ids=str)
def test_what_a_masked_key_holds_does_not_matter(case: Case, junk: float) -> None:
    """Not a bit of outputs and gradients changes, and the gradients of masked keys are zero."""
    case = replace(case, dtype=torch.bfloat16)
    leaves, mask = make_inputs(case, "cuda"), key_mask(case, "cuda")
    assert mask is not None
    hidden = ~mask[..., None, None]
    dirty = {
        name: t.detach().masked_fill(hidden, junk).requires_grad_() if name in ("key", "value") else t
        for name, t in leaves.items()
    }
    with override(variants=MEDIUM):
        clean, other = run(case, leaves, "fused").tensors(), run(case, dirty, "fused").tensors()
    for name, tensor in clean.items():
        assert torch.equal(tensor, other[name]), name
    for name in ("grad of key", "grad of value"):
        assert not clean[name].masked_select(hidden).any()


BIASED = (
    CASES[0], CASES[1], CASES[3], CASES[4], CASES[5], REGISTERS[0], REGISTERS[3], *RINGS, MASKED[3], MASKED[7],
    INSIDE[1], INSIDE[3],
)  # fmt: skip


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", BIASED, ids=str)
def test_biases_and_their_gradients_match_the_oracle(case: Case, dtype: torch.dtype) -> None:
    with override(variants=MEDIUM):
        test_fused_bias.check(replace(case, dtype=dtype))


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_with_biases_any_scale_will_do(scale: float) -> None:
    with override(variants=MEDIUM):
        test_fused_bias.check(replace(CASES[0], dtype=torch.bfloat16, scale=scale))


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", [CASES[0], CASES[1], RINGS[0]], ids=str)
def test_biases_of_minus_infinity_hide_keys(case: Case) -> None:
    """Some hide all that a query sees: its output and gradient are zero."""
    case = replace(case, dtype=torch.bfloat16)
    table = test_fused_bias.make_table(case)
    table[0] = float("-inf")
    table[1].masked_fill_(table[1] < 1.0, float("-inf"))
    with override(variants=MEDIUM):
        found = test_fused_bias.results(case, torch.bfloat16, table, "fused")
    expected = test_fused_bias.results(case, torch.float64, table, "eager")
    for name, tensor in found.items():
        finite = expected[name].isfinite()
        assert torch.equal(tensor.isfinite(), finite), name
        assert error(tensor[finite], expected[name][finite]) < 1e-2, name
    if case.sink == "none":
        assert not found["out"][..., 0, :].any()
        assert not found["query"][..., 0, :].any()


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", [CASES[0], RINGS[0], RINGS[3], REGISTERS[1]], ids=str)
def test_nan_reaches_only_the_queries_that_see_it_with_biases_too(case: Case) -> None:
    case = replace(case, dtype=torch.bfloat16)
    tensors = {name: t.detach().clone() for name, t in make_inputs(case, "cuda").items()}
    tensors["value"][(0, *(n // 2 for n in case.spatial), 0, 7)] = float("nan")
    table, outs = test_fused_bias.make_table(case), []
    for names in (MEDIUM, dict.fromkeys(MEDIUM, "portable")):
        with override(variants=names):
            outs.append(neighborhood_attention(**arguments(case, tensors), rpb=table, impl="fused"))
    broken = ~outs[1].isfinite()
    assert broken.any()
    assert torch.equal(~outs[0].isfinite(), broken)
    assert error(outs[0][~broken], outs[1][~broken]) < 4e-3


@pytest.mark.gpu
@needs_device
def test_reads_views_of_a_fused_projection() -> None:
    case = replace(CASES[0], dtype=torch.bfloat16)
    qkv = torch.randn(2, *case.spatial, 8, 72, device="cuda", dtype=torch.bfloat16)
    views: dict[str, Tensor] = dict(zip(("query", "key", "value"), qkv.split((4, 2, 2), -2), strict=True))
    copies = {name: t.contiguous() for name, t in views.items()}
    with override(variants=MEDIUM):
        results = [run(case, {name: t.detach().requires_grad_() for name, t in x.items()}, "fused").tensors()
                   for x in (views, copies)]  # fmt: skip
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("shared", [("additional_keys",), ("additional_keys", "additional_values")], ids=str)
def test_images_may_share_register_tokens(shared: tuple[str, ...]) -> None:
    """TMA then reads those of one image for all."""
    case = replace(REGISTERS[0], dtype=torch.bfloat16, batch=3)
    tensors = {name: t.detach() for name, t in make_inputs(case, "cuda").items()}
    tensors |= {name: tensors[name][:1].expand(3, -1, -1, -1) for name in shared}
    copies = {name: t.contiguous() for name, t in tensors.items()}
    assert tensors["additional_keys"].stride(0) == 0
    with override(variants=MEDIUM):
        results = [run(case, {name: t.detach().requires_grad_() for name, t in x.items()}, "fused").tensors()
                   for x in (tensors, copies)]  # fmt: skip
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


# --- Plans, without a GPU


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


def lumina(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Problem:
    """Four images of 64x64 with 24 heads of 96 channels and windows of 17x17: 27744 key elements."""
    query, key = (contiguous((4, 64, 64, h, 96)) for h in (24, 8))
    image = {"query": query, "key": key, "value": key, "kernel_size": (17, 17)}
    return problem_of_image(monkeypatch, **{**image, **changes})


def names(problem: Problem) -> list[str]:
    """The kernels of the forward pass, of dQ and of dK and dV."""
    query, key, *_ = dispatch.choose_backward(Question(problem, True, contiguous(problem.query.shape)))
    return [dispatch.choose("forward", Question(problem)).variant.name, query.variant.name, key.variant.name]


def test_windows_between_small_and_large_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = lumina(monkeypatch)
    assert names(problem) == [variants.MEDIUM] * 3
    choice = dispatch.choose("forward", Question(problem))
    assert choice.plan == MediumTileConfig((1, 8, 8), (1, 8, 8), 64, 1, 1, (64, 32), 2, 168, False, 0, False)
    assert [name for name, _ in choice.passed_over] == [variants.ROLLING, variants.TILES]


def test_chunks_are_longer_where_that_adds_hardly_any_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kernel_size: int, **changes: Any) -> int:
        layout = contiguous((8, 128, 128, 8, 64))
        image = {"query": layout, "key": layout, "value": layout, "kernel_size": (kernel_size,) * 2}
        config = medium_tiling.forward_tile_config(problem_of_image(monkeypatch, **{**image, **changes}))
        assert config is not None
        return prod(config.chunk)

    assert chunk(21) == 128
    assert chunk(15) == 64  # a fifth more scores
    assert chunk(21, key_mask=contiguous((8, 128, 128, 1, 1))) == 64


def with_registers(registers: int, heads: int, dim: int, images: int = 8) -> dict[str, Layout]:
    """Images of 64x64 tokens, and register tokens."""
    tokens, extra = contiguous((images, 64, 64, heads, dim)), contiguous((images, registers, heads, dim))
    names = "query", "key", "value", "additional_keys", "additional_values"
    return dict(zip(names, (tokens,) * 3 + (extra,) * 2, strict=True))


@pytest.mark.parametrize(
    ("window", "registers", "dim", "images", "dilation", "expected"),
    [
        (13, 16, 64, 8, 1, [variants.MEDIUM] * 3),
        (21, 16, 64, 8, 1, [variants.MEDIUM] * 3),
        (21, 128, 64, 8, 1, [variants.MEDIUM] * 3),
        (13, 128, 64, 8, 2, [variants.MEDIUM] * 3),
        (43, 199, 64, 8, 1, [variants.LARGE, variants.LARGE, variants.MEDIUM]),  # which does not see register tokens
        (43, 198, 64, 8, 1, [variants.MEDIUM] * 3),
    ],
)
def test_register_tokens_count_as_keys(
    monkeypatch: pytest.MonkeyPatch, window: int, registers: int, dim: int, images: int, dilation: int,
    expected: list[str],
) -> None:  # fmt: skip
    tensors = with_registers(registers, 8, dim, images)
    problem = problem_of_image(monkeypatch, **tensors, kernel_size=(window,) * 2, dilation=(dilation,) * 2)
    assert names(problem) == expected


def test_programs_with_register_tokens_leave_room_for_as_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 65536 hardware registers of a multiprocessor, four programs of four warps have 128 a thread, five 96."""
    finders = medium_tiling.forward_tile_config, medium_tiling.dq_tile_config
    for dim, most in ((64, (96, 128)), (72, (168, 168))):
        problem = problem_of_image(monkeypatch, **with_registers(16, 8, dim), kernel_size=(13, 13))
        for find, most_registers in zip(finders, most, strict=True):
            config = find(problem)
            assert config is not None
            assert config.maxnreg == most_registers


@pytest.mark.parametrize(
    ("dim", "window", "expected"),
    [
        (80, 819, [variants.MEDIUM] * 3),
        (80, 820, [variants.LARGE, variants.LARGE, variants.MEDIUM]),
        (80, 1639, [variants.LARGE] * 3),
        (128, 63, [variants.TILES] * 3),
        (128, 65, [variants.TILES, variants.TILES, variants.MEDIUM]),
        (128, 128, [variants.TILES, variants.MEDIUM, variants.MEDIUM]),
        (128, 383, [variants.MEDIUM] * 3),
        (128, 384, [variants.LARGE, variants.MEDIUM, variants.MEDIUM]),
        (128, 512, [variants.LARGE] * 3),
        (64, 63, [variants.TILES] * 3),
        (64, 129, [variants.TILES, variants.TILES, variants.MEDIUM]),
        (64, 255, [variants.TILES, variants.MEDIUM, variants.MEDIUM]),
        (64, 256, [variants.MEDIUM] * 3),
        (64, 2559, [variants.MEDIUM] * 3),
        (64, 2560, [variants.LARGE] * 3),
        (48, 511, [variants.MEDIUM] * 3),
        (40, 511, [variants.MEDIUM, "portable", variants.MEDIUM]),
        (40, 820, [variants.LARGE, "portable", variants.MEDIUM]),
        (32, 5119, [variants.MEDIUM, variants.LARGE, variants.MEDIUM]),
    ],
)
def test_windows_of_one_axis_take_what_was_fastest(
    monkeypatch: pytest.MonkeyPatch, dim: int, window: int, expected: list[str]
) -> None:
    tokens = contiguous((4, 16384, 8, dim))
    problem = problem_of_text(monkeypatch, kernel_size=(window,), **dict.fromkeys(("query", "key", "value"), tokens))
    assert names(problem) == expected


@pytest.mark.parametrize(("tokens", "dilation", "window"), [(16384, 2, 400), (16384, 2, 1000), (8192, 1, 400)], ids=str)
def test_what_large_windows_do_not_take_stays(
    monkeypatch: pytest.MonkeyPatch, tokens: int, dilation: int, window: int
) -> None:
    """Dilation, and calls that are too small for them."""
    heads = dict.fromkeys(("query", "key", "value"), contiguous((1, tokens, 16, 128)))
    problem = problem_of_text(monkeypatch, **heads, kernel_size=(window,), dilation=(dilation,))
    assert names(problem) == [variants.MEDIUM] * 3


def test_small_windows_keep_what_medium_ones_have_no_tiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three frames of 3x8 tokens, of which no tile has 64 rows."""
    query, keys = (contiguous((2048, 3, 3, 8, heads, 64)) for heads in (8, 2))
    axes = {"kernel_size": (3,) * 3, "stride": (1,) * 3, "dilation": (1,) * 3, "is_causal": (True, False, False)}
    problem = problem_of_text(monkeypatch, query=query, key=keys, value=keys, **axes)
    assert medium_tiling.dq_tile_config(problem) is None
    assert names(problem)[:2] == [variants.TILES] * 2


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (1, [variants.MEDIUM, variants.MEDIUM, variants.MEDIUM]),
        (4, [variants.ROLLING, variants.MEDIUM, variants.MEDIUM]),
    ],
)
def test_heads_that_share_keys_stay_in_tiles_for_small_windows(
    monkeypatch: pytest.MonkeyPatch, group: int, expected: list[str]
) -> None:
    query, keys = contiguous((1, 16384, 32, 64)), contiguous((1, 16384, 32 // group, 64))
    problem = problem_of_text(
        monkeypatch, kernel_size=(256,), is_causal=(True,), query=query, key=keys, value=keys
    )  # fmt: skip
    assert names(problem) == expected


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"window": 9, "dim": 56}, [variants.ROLLING, variants.MEDIUM, variants.MEDIUM]),
        ({"window": 8, "dim": 64, "stride": 4}, [variants.TILES, variants.TILES, variants.MEDIUM]),
        ({"window": 8, "dim": 32, "stride": 4}, [variants.TILES] * 3),
        ({"window": 9, "dim": 32}, [variants.ROLLING, variants.TILES, variants.MEDIUM]),
        ({"window": 7, "dim": 64}, [variants.ROLLING, variants.TILES, variants.TILES]),
        ({"window": 7, "dim": 80}, [variants.MEDIUM] * 3),
        ({"window": 11, "dim": 40}, ["portable", "portable", variants.MEDIUM]),
        ({"window": 13, "dim": 32}, [variants.MEDIUM] * 3),
    ],
    ids=str,
)
def test_windows_of_two_axes_take_what_was_fastest(
    monkeypatch: pytest.MonkeyPatch, image: dict[str, int], expected: list[str]
) -> None:
    tokens, stride = contiguous((8, 96, 96, 8, image["dim"])), image.get("stride", 1)
    window = {"kernel_size": (image["window"],) * 2, "stride": (stride,) * 2}
    problem = problem_of_image(monkeypatch, **window, **dict.fromkeys(("query", "key", "value"), tokens))
    assert names(problem) == expected


@pytest.mark.parametrize(("width", "expected", "side"), [(120, variants.MEDIUM, 0), (240, variants.LARGE, 8)])
def test_where_lines_of_keys_exceed_the_l2_cache(
    monkeypatch: pytest.MonkeyPatch, width: int, expected: str, side: int
) -> None:
    """Tiles are taken in columns, and larger ones are faster for dK and dV."""
    video = contiguous((1, 61, 136, width, 4, 64))
    axes = {"kernel_size": (11,) * 3, "stride": (1,) * 3, "dilation": (1,) * 3, "is_causal": (False,) * 3}
    problem = problem_of_text(monkeypatch, query=video, key=video, value=video, **axes)
    assert names(problem) == [variants.MEDIUM, variants.MEDIUM, expected]
    assert dispatch.choose("forward", Question(problem)).plan.side == side


def test_tuning_and_overrides_win(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = lumina(monkeypatch)
    with override(portable_only=True):
        assert names(problem) == ["portable"] * 3
    with override({"backward_query": forward.tile_config_for("backward_query", problem.problem_class)}):
        assert names(problem) == [variants.MEDIUM, "portable", variants.MEDIUM]
    with override(variants=dict.fromkeys(MEDIUM, variants.LARGE)):
        assert names(problem) == [variants.LARGE] * 3
    small = problem_of_image(monkeypatch)
    with override(variants=MEDIUM):
        assert names(small) == [variants.MEDIUM] * 3
    grouped = lumina(monkeypatch, query=contiguous((4, 64, 64, 16, 96)))
    with override(pack=2):
        choice = dispatch.choose("forward", Question(grouped))
    assert (choice.variant.name, choice.plan.pack) == (variants.MEDIUM, 2)
    with override(pack=4):  # more heads than there are in a group
        assert dispatch.choose("forward", Question(grouped)).is_portable
    with override(pack=3):  # of which no number fills 64 rows
        assert dispatch.choose("forward", Question(lumina(monkeypatch))).is_portable


WIDE = contiguous((4, 64, 64, 8, 64))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value": WIDE}, "equally many channels, not 96 and 64"),
        (
            {"kernel_size": (5, 7), **dict.fromkeys(("query", "key", "value"), contiguous((4, 64, 64, 24, 136)))},
            "heads of up to 128 channels, not 136",
        ),
        (
            dict.fromkeys(("additional_keys", "additional_values"), Layout((4, 5, 8, 96), (5 * 772, 772, 96, 1))),
            "TMA cannot address additional_keys",
        ),
        (
            {
                **dict.fromkeys(("query", "key", "value"), contiguous((1, 64, 64, 8, 96))),
                **dict.fromkeys(("additional_keys", "additional_values"), contiguous((1, 50, 8, 96))),
            },
            f"339 keys, additional keys included, of 96 elements are fewer than {2**30 * 3 // 2} products",
        ),
        (
            {"kernel_size": (6, 4), **dict.fromkeys(("query", "key", "value"), contiguous((1, 64, 64, 24, 80)))},
            "24 keys are fewer than",
        ),
        (
            {"kernel_size": (11, 11), **dict.fromkeys(("query", "key", "value"), contiguous((4, 64, 64, 24, 40)))},
            "the portable kernel is faster for heads of 40 channels on 2 axes",
        ),
        (dict.fromkeys(("query", "key", "value"), contiguous((1, 64, 64, 8, 96))), "the call is small"),
        (
            {"kernel_size": (31, 31), **dict.fromkeys(("query", "key", "value"), contiguous((1, 64, 64, 8, 96)))},
            "the window is large",
        ),
        ({"dilation": (1, 3)}, "does not divide"),
    ],
    ids=str,
)
def test_why_it_is_passed_over(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str) -> None:
    choice = dispatch.choose("forward", Question(lumina(monkeypatch, **changes)))
    assert choice.is_portable
    assert reason in {passed.kernel: passed.reason for passed in choice.passed_over}[variants.MEDIUM]


@pytest.mark.parametrize(
    "changes",
    [{"is_causal": (False,), "is_periodic": (True,)}, {"key_mask": contiguous((1, 8192, 1, 1))}, {"has_bias": True}],
    ids=str,
)
def test_what_kernels_for_large_windows_lack_takes_it_at_any_size(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    assert names(problem_of_text(monkeypatch)) == [variants.LARGE] * 3
    assert names(problem_of_text(monkeypatch, **changes)) == [variants.MEDIUM] * 3


def test_biases_take_it_in_calls_that_are_small_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for images, expected in ((64, variants.MEDIUM), (16, "portable")):
        tokens = dict.fromkeys(("query", "key", "value"), contiguous((images, 56, 56, 4, 32)))
        assert names(problem_of_image(monkeypatch, **tokens, has_bias=True, scale_first=True)) == [expected] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"is_periodic": (False, True)},
        {"key_mask": contiguous((4, 64, 64, 1, 1))},
        {"has_bias": True, "scale_first": True},
        {"query": contiguous((4, 128, 128, 24, 96))},
        {"is_periodic": (True, True), "key_mask": contiguous((4, 64, 64, 1, 1)), "has_bias": True},
    ],
    ids=str,
)
def test_rings_masks_biases_and_other_grids_take_it(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    assert names(lumina(monkeypatch, **changes)) == [variants.MEDIUM] * 3


@pytest.mark.parametrize(("images", "expected"), [(1, variants.MEDIUM), (2, "portable")])
@pytest.mark.parametrize(("frames", "is_periodic"), [(16, (True, False, False)), (32, ())])
def test_only_a_single_video_may_be_periodic_in_time_or_have_other_frames(
    monkeypatch: pytest.MonkeyPatch, images: int, expected: str, frames: int, is_periodic: tuple[bool, ...]
) -> None:
    """Where TMA reads past its last frame, the next video begins."""
    query, video = (contiguous((images, n, 32, 32, 8, 64)) for n in (frames, 16))
    axes = {"kernel_size": (5, 7, 7), "stride": (1,) * 3, "dilation": (1,) * 3, "is_causal": (False,) * 3}
    problem = problem_of_text(monkeypatch, query=query, key=video, value=video, **axes, is_periodic=is_periodic)
    assert names(problem) == [expected] * 3


def test_videos_whose_frames_no_tile_divides_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three frames of 4x4 take tiles of four frames, which TMA would write into the next video."""
    video = Layout((2**13, 3, 4, 4, 1, 64), contiguous((2**13, 3, 4, 4, 1, 64)).stride)
    axes = {"kernel_size": (3, 3, 3), "stride": (1,) * 3, "dilation": (1,) * 3, "is_causal": (False,) * 3}
    problem = problem_of_text(monkeypatch, query=video, key=video, value=video, **axes)
    assert medium_tiling.forward_tile_config(problem) is None
    with override(variants=MEDIUM):
        assert names(problem) == ["portable"] * 3
