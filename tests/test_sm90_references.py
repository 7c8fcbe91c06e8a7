"""References of rows that stay what the first chunk gives, in the kernels for compute capability 9.0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Case, Inputs, error, make_inputs
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from problems import problem_of_image, problem_of_text
from test_sm90_large import CASES as LARGE
from test_sm90_large import SKIPPING, assert_oracle, call_of, needs_device, wherever_possible  # noqa: F401
from test_sm90_medium import CASES as MEDIUM
from test_sm90_medium import INSIDE, REGISTERS, RINGS

from natten_layers import attention_state, neighborhood_attention_varlen
from natten_layers.kernels.host.problem import contiguous
from natten_layers.kernels.host.variant import Question
from natten_layers.kernels.sm90 import (
    large_forward,
    large_repair,
    large_tiling,
    medium_forward,
    medium_tiling,
    variants,
)

# How the scores of a row change from key to key: up to 600 from the first to the last key of an image, or one in 37
# stands out. Weights that are relative to the first scores overflow, or vanish.
ORDERS = "rising", "falling", "standing out"


def with_far_scores(case: Case, inputs: Inputs, order: str) -> Inputs:
    """The same inputs, but for a channel of queries and keys that adds to scores."""
    far = {name: t.detach().clone() for name, t in inputs.items()}
    count = far["key"][0, ..., 0, 0].numel()
    ramp = torch.linspace(0, 600, count)
    added = {"rising": ramp, "falling": -ramp, "standing out": 150.0 * (torch.arange(count) % 37 == 29)}[order]
    far["query"][..., 0] = 8.0
    far["key"][..., 0] = (added * case.head_dim**0.5 / 8).reshape(*far["key"].shape[1:-2], 1).to(far["key"])
    return {name: t.requires_grad_() for name, t in far.items()}


def far_call(case: Case, order: str) -> tuple[Inputs, Any, Any]:
    leaves = with_far_scores(case, make_inputs(case, "cuda"), order)
    return leaves, *call_of(case, {name: t.detach() for name, t in leaves.items()})


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "case", [MEDIUM[0], MEDIUM[1], MEDIUM[4], REGISTERS[0], REGISTERS[3], RINGS[0], INSIDE[0], INSIDE[5]], ids=str
)
def test_medium_windows_compute_a_tile_again_where_scores_are_far_from_the_first(case: Case, order: str) -> None:
    case = replace(case, dtype=torch.bfloat16)
    leaves, problem, arguments = far_call(case, order)
    config = medium_tiling.forward_tile_config(problem)
    assert config is not None
    state = medium_forward.forward(config._replace(first_maxima=True), *arguments[:-1], with_stats=False)
    assert_oracle(case, leaves, state, with_stats=False)


def marks_of_parts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What calls from now on hand to the launch that computes parts once more: a mark for each part."""
    marks: list[Tensor] = []
    repair = large_repair.repair
    # Behind the marks is the tile counter.
    monkeypatch.setattr(large_forward, "repair", lambda *args: (marks.append(args[4][:-1].clone()), repair(*args)))
    return marks


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", [LARGE[1], LARGE[4], LARGE[6], LARGE[7], LARGE[9], *SKIPPING[:4]], ids=str)
def test_large_windows_compute_a_tile_again_where_scores_are_far_from_the_first(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(case, dtype=torch.bfloat16)
    marks = marks_of_parts(monkeypatch)
    for order in ORDERS:
        leaves, problem, arguments = far_call(case, order)
        config = large_tiling.forward_tile_config(problem)
        assert config.first_maxima
        assert_oracle(case, leaves, large_forward.forward(config, *arguments[:-1], with_stats=False), with_stats=False)
    assert len(marks) == len(ORDERS)
    assert torch.cat(marks).any()


@pytest.mark.gpu
@needs_device
def test_usual_scores_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(LARGE[4], dtype=torch.bfloat16)
    marks = marks_of_parts(monkeypatch)
    leaves = {name: t.detach() for name, t in make_inputs(case, "cuda").items()}
    added = 20 * torch.rand(leaves["key"].shape[:-1], generator=torch.Generator().manual_seed(4))
    leaves["query"][..., 0] = 8.0
    leaves["key"][..., 0] = (added * case.head_dim**0.5 / 8).to(leaves["key"])
    problem, arguments = call_of(case, leaves)
    config = large_tiling.forward_tile_config(problem)
    kept, found = (large_forward.forward(replace(config, first_maxima=keeps), *arguments) for keeps in (True, False))
    assert not torch.cat(marks).any()
    assert kept[1] is not None
    assert found[1] is not None
    assert not torch.equal(kept[1], found[1])
    assert_oracle(case, {name: t.requires_grad_() for name, t in leaves.items()}, kept)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", [MEDIUM[0], MEDIUM[4], REGISTERS[0], RINGS[0], INSIDE[0]], ids=str)
def test_medium_windows_keep_references(case: Case) -> None:
    case = replace(case, dtype=torch.bfloat16)
    leaves = make_inputs(case, "cuda")
    problem, arguments = call_of(case, {name: t.detach() for name, t in leaves.items()})
    config = medium_tiling.forward_tile_config(problem)
    assert config is not None
    kept, found = (medium_forward.forward(config._replace(first_maxima=keeps), *arguments) for keeps in (True, False))
    assert kept[1] is not None
    assert found[1] is not None
    assert not torch.equal(kept[1], found[1])
    assert_oracle(case, leaves, kept)


@pytest.mark.gpu
@needs_device
@pytest.mark.usefixtures("wherever_possible")
@pytest.mark.parametrize("window", [600, 1500])
def test_packed_texts_compute_a_tile_again_where_scores_are_far_from_the_first(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = marks_of_parts(monkeypatch)
    lengths = [1900, 7, 2500]
    draw = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(sum(lengths), h, 128, generator=draw).cuda().bfloat16() for h in (8, 2, 2))
    q[..., 0] = 8.0
    k[..., 0] = (torch.linspace(0, 600, sum(lengths)) * 128**0.5 / 8)[:, None].to(k)
    packed = neighborhood_attention_varlen(q, k, v, [(n,) for n in lengths], window, is_causal=True, impl="fused")
    first = 0
    for n in lengths:
        own = [x[None, first : first + n].double() for x in (q, k, v)]
        alone = attention_state(*own, min(window, n), is_causal=True, impl="eager").out[0]
        assert ((packed[first : first + n] - alone).norm() / alone.norm()).item() < 4e-3
        first += n
    assert len(marks) == 1
    assert marks[0].any()


def gradient_of_queries(q: Tensor, k: Tensor, v: Tensor, keys_of_reference: int | None) -> Tensor:
    """dQ of 256 queries, where the gradient of the output is the output, as kernels for bf16 round it: weights relative
    to the maximum over the first keys, and the output that the backward pass reads. Exact if ``keys_of_reference`` is
    None.
    """
    scores = q @ k.T
    row_m = scores[:, :keys_of_reference].amax(1, keepdim=True)
    weights = (scores - row_m).exp()
    rounded = weights if keys_of_reference is None else weights.bfloat16().to(weights)
    out = rounded @ v / weights.sum(1, keepdim=True)
    grad_out = (scores.double().softmax(1) @ v.double()).bfloat16().to(out)
    out = out if keys_of_reference is None else out.bfloat16().to(out)
    row_delta = (grad_out * out).sum(1, keepdim=True)
    return scores.softmax(1) * (grad_out @ v.T - row_delta) @ k


@pytest.mark.parametrize("spread", [3.0, 16.0])
def test_gradients_of_peaked_rows_err_more_with_references_than_with_maxima(spread: float) -> None:
    """Why calls whose output a backward pass reads find maxima. ``spread`` is the standard deviation of scores."""
    draw = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(256, 64, generator=draw).bfloat16().float() for _ in range(3))
    q *= spread / 8
    exact = gradient_of_queries(q.double(), k.double(), v.double(), None)
    with_maxima, with_references = (error(gradient_of_queries(q, k, v, keys), exact) for keys in (256, 64))
    assert with_maxima < 6e-3
    assert with_references > 2 * with_maxima


def test_rows_keep_references_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, whose exponents are those of fp32; for no backward pass, which would err by more; where each row sees a
    key; and where a tile has several chunks.
    """

    def keeps(dtype: torch.dtype, kernel_size: int, with_stats: bool = False, **changes: Any) -> bool:
        layout = contiguous((8, 128, 128, 8, 64))
        image = {"query": layout, "key": layout, "value": layout, "kernel_size": (kernel_size,) * 2, "dtype": dtype}
        question = Question(problem_of_image(monkeypatch, **{**image, **changes}), with_stats)
        plan = variants.MEDIUM_FORWARD.plan(question)
        assert isinstance(plan, medium_tiling.MediumTileConfig)
        return plan.first_maxima

    assert keeps(torch.bfloat16, 21)
    assert not keeps(torch.float16, 21)
    assert not keeps(torch.bfloat16, 21, key_mask=contiguous((8, 128, 128, 1, 1)))
    assert not keeps(torch.bfloat16, 21, has_bias=True)
    assert not keeps(torch.bfloat16, 1)
    assert not keeps(torch.bfloat16, 21, with_stats=True)
    text = problem_of_text(monkeypatch)
    assert variants.LARGE_FORWARD.plan(Question(text)).first_maxima
    assert not variants.LARGE_FORWARD.plan(Question(text, with_stats=True)).first_maxima
    assert not variants.LARGE_FORWARD.plan(Question(text._replace(dtype=torch.float16))).first_maxima
