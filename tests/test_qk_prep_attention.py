"""Attention that normalises and rotates heads itself, against separate steps in fp64, interpreted or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from helpers import FLOOR, coordinates, error, far
from problems import problem_of_projected_image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from natten_layers.arguments import Call, prepare
from natten_layers.kernels.host.problem import Layout, problem_of
from natten_layers.kernels.host.qk_prep import QKPrepKind
from natten_layers.kernels.host.tuned import override
from natten_layers.kernels.ops import attention as attention_ops
from natten_layers.kernels.ops import qk_prep_attention as qk_prep_attention_ops
from natten_layers.kernels.ops.define import flattened, grouped
from natten_layers.modules import AxialRoPE, NeighborhoodGQA, RoPE, query_key
from natten_layers.modules.query_key import HeadNorm, attend_with_qk_prep
from natten_layers.modules.rope import Angles, angles_of
from natten_layers.operations import Impl

pytest.importorskip("triton.experimental.gluon")

from test_sm90_large import needs_device, planned

from natten_layers.kernels.sm90 import small_forward_rolling

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class LayerCase:
    name: str
    spatial: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    norm: str | None = None
    rope: nn.Module | None = None
    positions: Tensor | None = None
    is_causal: bool = False
    registers: int = 0
    sink: str | None = None
    batch: int = 2

    def __str__(self) -> str:  # pytest's id
        return self.name


CASES = (
    LayerCase("image", (32, 40), 7, 2, 2, norm="cosine", rope=AxialRoPE(64, 2)),
    LayerCase("image-gqa-registers-sink", (37, 45), 7, 8, 2, norm="cosine", rope=AxialRoPE(64, 8, num_kv_heads=2),
         registers=5, sink="learned"),
    LayerCase("image-of-own-positions", (20, 41), (5, 9), 6, 2, norm="cosine", rope=AxialRoPE(64, 6, num_kv_heads=2),
         positions=coordinates(2, 20, 41, 2)),
    LayerCase("image-wide-heads", (33, 40), 7, 8, 2, 128, "cosine", AxialRoPE(128, 8, num_kv_heads=2), sink="zero"),
    LayerCase("image-one-kv-head", (24, 24), 5, 4, 1, norm="cosine", rope=AxialRoPE(64, 4, num_kv_heads=1)),
    LayerCase("image-large-window", (21, 40), 13, 6, 3, norm="rms", rope=AxialRoPE(64, 6, num_kv_heads=3)),
    LayerCase("image-cosine-only", (32, 40), 7, norm="cosine"),
    LayerCase("image-rms-only", (32, 40), 7, norm="rms", registers=3),
    LayerCase("text", (1000,), 128, 16, 2, rope=RoPE(64), is_causal=True, sink="learned"),
    LayerCase("text-rms-yarn", (333,), 64, 8, 2, norm="rms", rope=RoPE(64, scaling=YARN), positions=far(2, 333)),
    LayerCase("text-half-of-a-head", (500,), 32, 4, 4, norm="rms", rope=RoPE(32), is_causal=True),
    LayerCase("text-wide-heads", (400,), 64, 8, 2, 128, "rms", RoPE(128), positions=far(1, 400), is_causal=True),
    LayerCase("video", (8, 12, 18), 3, 4, 4, norm="cosine", rope=AxialRoPE(64, 4, axes=4),
         positions=coordinates(8, 12, 18, 4)),
    LayerCase("video-gqa", (8, 9, 10), (3, 5, 5), 8, 2, norm="rms", rope=AxialRoPE(64, 8, num_kv_heads=2),
         positions=coordinates(2, 8, 9, 10, 2)),
)  # fmt: skip


def draw(case: LayerCase) -> dict[str, Tensor]:
    """Random inputs in fp64 that half precision represents exactly."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).to(torch.float16).double()

    c = case
    tensors = {"qkv": normal(c.batch, *c.spatial, c.heads + 2 * c.kv_heads, c.head_dim)}
    if c.registers:
        tensors |= {name: normal(c.batch, c.registers, c.kv_heads, c.head_dim) for name in ("keys", "values")}
    if c.sink == "learned":
        tensors["sink"] = normal(c.heads)
    if c.norm == "cosine":
        tensors["query_gain"] = (10 + normal(c.heads)).to(torch.bfloat16).double()
    if c.norm == "rms":
        tensors |= {name: (2 + normal(c.head_dim)).to(torch.bfloat16).double() for name in ("query_gain", "key_gain")}
    return tensors


def arguments_of(case: LayerCase, tensors: dict[str, Tensor]) -> tuple[Call, HeadNorm | None, Angles | None]:
    t = tensors
    query, key, value = t["qkv"].split((case.heads, case.kv_heads, case.kv_heads), -2)
    norm = None
    if case.norm is not None:
        norm = HeadNorm(case.norm, t["query_gain"], t.get("key_gain"))  # pyright: ignore[reportArgumentType]
    angles = None
    if case.rope is not None:
        positions = None if case.positions is None else case.positions.to(query.device)
        angles = angles_of(case.rope.to(query.device), query, key, positions)
    scale = 1.0 if case.norm == "cosine" else None
    call = prepare(
        query, key, value, case.kernel_size, 1, 1, case.is_causal, scale, t.get("keys"), t.get("values"),
        0.0 if case.sink == "zero" else t.get("sink"),
    )  # fmt: skip
    return call, norm, angles


def on(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(DEVICE, dtype) for name, t in tensors.items()}


def attend(case: LayerCase, tensors: dict[str, Tensor], impl: Impl) -> Tensor:
    return attend_with_qk_prep(*arguments_of(case, tensors), impl=impl)


SMALL = (
    *(
        replace(case, spatial=tuple(min(n, 9) for n in case.spatial), kernel_size=3, positions=None)
        for case in CASES
        if case.positions is None
    ),
    LayerCase("ring", (4, 9), 3, 4, 2, norm="cosine", rope=AxialRoPE(64, 4, num_kv_heads=2, periods=(None, 2.0))),
)
"""The last one has frequencies of its own for every axis, which no kernel for all steps takes."""


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_is_its_steps_one_after_the_other(case: LayerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel for all steps (interpreted, or on a GPU for few tokens), the operator equals separate steps."""
    taken: list[str] = []
    attention = qk_prep_attention_ops.attention
    monkeypatch.setattr(qk_prep_attention_ops, "attention", lambda *args: taken.append("one") or attention(*args))
    tensors = draw(case)
    expected = attend(case, on(tensors, torch.float64), "eager")
    assert not taken
    assert error(attend(case, on(tensors, torch.float32), "fused"), expected) < FLOOR[torch.float32]
    assert taken == ["one"]
    tracked = {name: t.requires_grad_() for name, t in on(tensors, torch.float32).items()}
    out = attend(case, tracked, "fused")
    assert taken == ["one"]
    assert error(out, expected) < FLOOR[torch.float32]
    grads = torch.autograd.grad(out.sum(), list(tracked.values()), allow_unused=case.sink == "zero")
    assert all(g is not None and g.any() for g in grads)


def test_auto_on_a_cpu_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qk_prep_attention_ops, "attention", None)
    tensors = {name: t.float() for name, t in draw(SMALL[0]).items()}
    call, norm, angles = arguments_of(SMALL[0], tensors)
    ours = attend_with_qk_prep(call, norm, angles)
    assert torch.equal(ours, attend_with_qk_prep(call, norm, angles, impl="eager"))


def operands(case: LayerCase, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """Of ``natten_layers::attention_with_qk_prep``."""
    call, norm, angles = arguments_of(case, tensors)
    prep = query_key._rotation(call.inputs.query, norm, angles)
    return flattened((attention_ops.readable(call.inputs), call.options, prep))


@pytest.mark.parametrize("case", SMALL[:3], ids=str)
def test_the_operator_keeps_its_schema_and_counts_flop(case: LayerCase) -> None:
    inputs = operands(case, on(draw(case), torch.float32))
    operator = torch.ops.natten_layers.attention_with_qk_prep
    torch.library.opcheck(operator.default, inputs, test_utils=("test_schema", "test_faketensor"))
    counts = []
    alone = flattened(tuple(grouped("attention_with_qk_prep", inputs)[:2]))  # without the preparation
    for run in (lambda: operator(*inputs), lambda: torch.ops.natten_layers.forward(*alone, False)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with pytest.raises(NotImplementedError, match="natten_layers::attention_with_qk_prep has no derivative"):
        operator(inputs[0].requires_grad_(), *inputs[1:]).sum().backward()


@pytest.mark.parametrize("options", [{}, {"num_registers": 2, "registers_attend": True}], ids=["plain", "registers"])
def test_a_compiled_layer_computes_the_same(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rope = AxialRoPE(16, 4, num_kv_heads=2)
    layer = NeighborhoodGQA(64, 4, 3, num_kv_heads=2, qk_norm="cosine", rope=rope, **options).to(DEVICE)
    x = torch.randn(2, 6, 7, 64, device=DEVICE)
    compiled = torch.compile(lambda x: layer.attend(x)[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(x), layer.attend(x)[0]) < FLOOR[torch.float32]
    assert error(compiled(x), layer.attend(x)[0]) < FLOOR[torch.float32]


# --- One launch on compute capability 9.0


def one_launch(case: LayerCase, tensors: dict[str, Tensor]) -> Tensor:
    inputs, options, prep = grouped("attention_with_qk_prep", operands(case, tensors))
    problem = problem_of(inputs, options)
    plan = planned("qk_prep + forward", problem, prep=prep.kind)
    assert plan is not None
    return small_forward_rolling.forward(plan, problem, inputs, options, False, prep)[0]


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_launch_matches_its_steps_in_double(case: LayerCase, dtype: torch.dtype) -> None:
    tensors = draw(case)
    exact = attend(case, on(tensors, torch.float64), "eager")
    ours = one_launch(case, on(tensors, dtype))
    assert ours.dtype == dtype
    allowed = max(1.1 * error(attend(case, on(tensors, dtype), "eager"), exact), FLOOR[dtype])
    assert error(ours, exact) <= allowed
    assert torch.equal(attend(case, on(tensors, dtype), "fused"), ours)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_and_inf_reach_only_the_queries_that_see_them(case: LayerCase) -> None:
    tensors = on(draw(case), torch.bfloat16)
    rank, middle = len(case.spatial), tuple(n // 2 for n in case.spatial)
    query, key, value = tensors["qkv"].split((case.heads, case.kv_heads, case.kv_heads), -2)
    value[(0, *middle, case.kv_heads - 1, 7)] = float("nan")
    value[(0, *middle, 0, 8)] = float("inf")
    key[(1, *(-1,) * rank, 0, 5)] = float("nan")
    query[(1, *(0,) * rank, 0, 3)] = float("nan")
    ours, steps = one_launch(case, tensors), attend(case, tensors, "eager")
    broken = ~steps.isfinite().all(-1)  # of a row, the eager path breaks all elements
    assert broken.any()
    assert not broken.all()
    assert torch.equal(~ours.isfinite().all(-1), broken)
    assert ours[(0, *middle, 0, 8)] == float("inf")
    exact = attend(case, {name: t.double() for name, t in tensors.items()}, "eager")
    allowed = max(1.1 * error(steps[~broken], exact[~broken]), FLOOR[torch.bfloat16])
    assert error(ours[~broken], exact[~broken]) <= allowed


KIND = QKPrepKind("cosine", split=(8, 8), by_head=True, batched=False)


def test_small_windows_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    problem = problem_of_projected_image(monkeypatch)
    config = planned("qk_prep + forward", problem, prep=KIND)
    assert config is not None
    assert (config.in_ring, config.programs) == (True, 4)
    few = Layout((1, 32, 32, 8, 64), (2**10 * 768, 2**5 * 768, 768, 64, 1))
    few_keys = few._replace(shape=(1, 32, 32, 2, 64))
    assert (
        planned("qk_prep + forward", problem._replace(query=few, key=few_keys, value=few_keys), prep=KIND) is not None
    )
    kinds = (KIND._replace(split=split) for split in ((16, 16), (0,), (1,) * 16))
    assert all(planned("qk_prep + forward", problem, prep=kind) is not None for kind in kinds)
    # A head for itself: another program is worth more than loads that start early.
    alone = problem_of_projected_image(monkeypatch, key=problem.query, value=problem.query)
    one, bare = planned("qk_prep + forward", alone, prep=KIND), planned("forward", alone)
    assert one is not None
    assert bare is not None
    assert (one.programs, one.in_ring) == (3, True)
    assert (getattr(bare, "programs"), getattr(bare, "in_ring")) == (2, False)  # noqa: B009


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (KIND._replace(split=(5, 5, 5)), {}),
        (KIND._replace(split=(4, 4)), {}),
        (KIND._replace(split=(4, 6, 6)), {}),
        (KIND._replace(interleaved=True), {}),
        (KIND._replace(by_axis=True), {}),
        (KIND, {"dtype": torch.float32}),
        (KIND, {"dilation": (2, 2)}),
        (KIND, {"stride": (2, 1)}),
        (KIND, {"is_periodic": (False, True)}),
        (KIND, {"kernel_size": (64, 64)}),
        (KIND, {"scale_first": True}),
    ],
    ids=str,
)
def test_others_take_two(kind: QKPrepKind, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned("qk_prep + forward", problem_of_projected_image(monkeypatch, **changes), prep=kind) is None


def test_tiles_that_somebody_chose_win(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = pytest.importorskip("natten_layers.kernels.portable.forward")
    problem = problem_of_projected_image(monkeypatch)
    with override({"forward": forward.tile_config_for("forward", problem.problem_class)}):
        assert planned("qk_prep + forward", problem, prep=KIND) is None
    with override(pack=8):  # more heads than a group has
        assert planned("qk_prep + forward", problem, prep=KIND) is None


@pytest.mark.parametrize(
    ("rows", "dim", "pairs"),
    [
        (rows, dim, pairs)
        for rows, dim in product((16, 32, 64, 128), (64, 128))
        for pairs in (0, dim // 4, dim // 2)
    ],
)  # fmt: skip
def test_threads_hold_whole_pairs(rows: int, dim: int, pairs: int) -> None:
    """Every element of ``[rows, dim]`` is in one thread, with the one that it turns with; angles lie as pairs do."""
    qk_prep = pytest.importorskip("natten_layers.kernels.sm90.qk_prep")

    def places(layout: Any) -> list[list[tuple[int, ...]]]:
        """Of each thread, what it holds."""

        def span(bases: list[list[int]], start: tuple[int, ...]) -> list[tuple[int, ...]]:
            found = [start]
            for base in bases:
                found += [tuple(a ^ b for a, b in zip(place, base, strict=True)) for place in found]
            return found

        threads = span([*layout.lane_bases, *layout.warp_bases], (0,) * len(layout.shape))
        return [span(layout.reg_bases, thread) for thread in threads]

    heads = places(qk_prep.heads_layout(rows, dim, pairs))
    assert len(heads) == 128
    assert sorted(place for own in heads for place in own) == list(product(range(rows), range(dim)))
    for axes in (1, 2) if pairs else ():
        angles = places(qk_prep.angles_layout(rows, axes, pairs))
        for own, pairs_of_thread in zip(heads, angles, strict=True):
            assert {(n, col % pairs) for n, col in own if col < 2 * pairs} == {
                (n, axis * (pairs // axes) + j) for n, axis, j in pairs_of_thread
            }
            assert all((n, col ^ pairs) in own for n, col in own if col < 2 * pairs)
