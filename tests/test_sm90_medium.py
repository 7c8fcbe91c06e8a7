"""The kernels for windows between small and large on compute capability 9.0 against the fp64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_forward_mode
import test_fused_bias
import torch
from helpers import Case, arguments, assert_close, assert_nan_stays, error, key_mask, make_inputs, oracle, run
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from test_sm90_large import State, assert_near, call_of, needs_device

from natten_layers import neighborhood_attention
from natten_layers.kernels.dispatch import Question
from natten_layers.kernels.host.problem import Problem
from natten_layers.kernels.host.tiling import Kind
from natten_layers.kernels.host.tuned import override
from natten_layers.kernels.portable import forward
from natten_layers.kernels.sm90 import medium_backward, medium_forward, medium_jvp, medium_tiling, variants

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
    Case("3d-64-strides", (12, 24, 32), (8, 16, 16), (4, 8, 8), heads=2, kv_heads=2, head_dim=64, value_dim=64,
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
    wide = oracle(case, leaves)
    for with_stats in (True, False) if dtype == torch.bfloat16 else (True,):
        assert_near(case, wide, attend_medium(problem, arguments, with_stats), with_stats)


def attend_medium(problem: Problem, arguments: tuple[Any, ...], with_stats: bool) -> State:
    """The forward pass of medium windows, as calls have it that ask for statistics and others."""
    config = medium_tiling.forward_tile_config(problem, with_stats=with_stats)
    assert config is not None
    return medium_forward.forward(config, *arguments[:-1], with_stats=with_stats)


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
@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("case", CASES[:6] + REGISTERS + RINGS[:5] + (MASKED[0], MASKED[3]) + INSIDE[:4], ids=str)
def test_nan_and_inf_reach_only_the_queries_that_see_them(case: Case, with_stats: bool) -> None:
    case = replace(case, dtype=torch.bfloat16, batch=2)
    tensors = {name: t.detach().clone() for name, t in make_inputs(case, "cuda").items()}
    middle, rank = tuple(n // 2 for n in case.spatial), len(case.spatial)
    tensors["value"][(0, *middle, case.kv_heads - 1, 7)] = float("nan")
    tensors["value"][(0, *middle, 0, 8)] = float("inf")
    tensors["key"][(1, *(-1,) * rank, 0, 5)] = float("nan")
    tensors["query"][(1, *(0,) * rank, 0, 3)] = float("nan")
    problem, arguments = call_of(case, tensors)
    mine, row_max, row_sum = attend_medium(problem, arguments, with_stats)
    expected, other_max, other_sum = forward.forward(forward.plan(problem, True), *arguments)
    assert other_max is not None
    assert other_sum is not None
    pairs = [(mine, expected, 4e-3)]
    if row_max is not None and row_sum is not None:
        pairs.append((row_max + row_sum.log(), other_max + other_sum.log(), 1e-5))
    assert len(pairs) == 1 + with_stats
    for own, other, allowed in pairs:
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
