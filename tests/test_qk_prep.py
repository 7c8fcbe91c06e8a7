"""Normalised and rotated heads: the fused kernels against PyTorch in fp64, interpreted or on a GPU; the dispatch."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import coordinates, error, far, raises_naming
from torch import Tensor, nn

from benchmarks import module, rotation
from natten_layers.arguments import Call
from natten_layers.kernels.sm90 import support
from natten_layers.modules import AxialRoPE, NeighborhoodGQA, RoPE, attention, make_axial_pos, query_key
from natten_layers.modules.query_key import HeadNorm, attend_with_qk_prep, normalize_and_rotate
from natten_layers.modules.rope import Angles, angles_of
from natten_layers.operations import Impl

pytest.importorskip("triton")

from natten_layers.kernels.host.qk_prep import QKPrep
from natten_layers.kernels.portable import gain_sums
from natten_layers.kernels.portable import qk_prep as kernels

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class PrepCase:
    name: str
    spatial: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    norm: str | None = None
    rope: nn.Module | None = None
    positions: Tensor | None = None
    batch: int = 2

    def __str__(self) -> str:  # pytest's id
        return self.name


def video_rope(*, interleaved: bool) -> AxialRoPE:
    """Axes of unequal parts, with the same frequencies for all heads or with those of each KV head."""
    freqs = torch.rand(1 if interleaved else 2, 32, generator=torch.Generator().manual_seed(7))
    return AxialRoPE(
        64, 4, num_kv_heads=4 if interleaved else 2, axes=3, freqs=freqs, split=(8, 12, 12), interleaved=interleaved
    )


CASES = (
    PrepCase("cosine-axial", (6, 7), 4, 4, 16, "cosine", AxialRoPE(16, 4)),
    PrepCase("cosine-axial-gqa", (9, 17), 4, 2, 64, "cosine", AxialRoPE(64, 4, num_kv_heads=2)),
    PrepCase("cosine-axial-batched", (6, 7), 4, 2, 16, "cosine", AxialRoPE(16, 4, num_kv_heads=2),
             coordinates(2, 6, 7, 2)),
    PrepCase("cosine-axial-one-kv-head", (6, 7), 4, 1, 16, "cosine", AxialRoPE(16, 4, num_kv_heads=1)),
    PrepCase("rms-axial-3d", (3, 4, 5), 3, 3, 24, "rms", AxialRoPE(24, 3, axes=3), coordinates(3, 4, 5, 3)),
    PrepCase("axial-odd-pairs", (5, 4), 2, 2, 40, "cosine", AxialRoPE(40, 2)),
    PrepCase("rms-text", (41,), 6, 2, 32, "rms", RoPE(32)),
    PrepCase("rms-text-partly-batched", (37,), 4, 2, 24, "rms", RoPE(16), far(2, 37)),
    PrepCase("cosine-text-yarn", (140,), 4, 2, 16, "cosine", RoPE(16, scaling=YARN), far(140)),
    PrepCase("text", (33,), 4, 1, 8, None, RoPE(8), far(1, 33)),
    PrepCase("cosine", (5, 6), 4, 2, 40, "cosine"),
    PrepCase("rms", (33,), 4, 2, 16, "rms"),
    PrepCase("rms-text-interleaved", (37,), 4, 2, 24, "rms", RoPE(16, interleaved=True), far(2, 37)),
    PrepCase("axial-interleaved", (5, 4), 2, 2, 40, "cosine", AxialRoPE(40, 2, interleaved=True)),
    PrepCase("rms-video", (3, 4, 5), 4, 4, 64, "rms", video_rope(interleaved=True), coordinates(3, 4, 5, 3)),
    PrepCase("video-half-split", (3, 4, 5), 4, 2, 64, "cosine", video_rope(interleaved=False), coordinates(3, 4, 5, 3)),
)  # fmt: skip


def evaluate(case: PrepCase, dtype: torch.dtype, impl: str, source: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients computed in ``dtype`` from inputs and cotangents that ``source`` represents exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(source).to(DEVICE, dtype)

    d = case.head_dim
    counts = case.heads, case.kv_heads, case.kv_heads
    qkv = draw(case.batch, *case.spatial, sum(counts) * d).requires_grad_()
    query, key, _ = qkv.unflatten(-1, (-1, d)).split(counts, -2)
    leaves, norm = {"qkv": qkv}, None
    if case.norm == "cosine":
        leaves["query_gain"] = (2 + draw(case.heads)).detach().requires_grad_()
        norm = HeadNorm("cosine", leaves["query_gain"], None)
    elif case.norm == "rms":
        leaves |= {name: (2 + draw(d)).detach().requires_grad_() for name in ("query_gain", "key_gain")}
        norm = HeadNorm("rms", leaves["query_gain"], leaves["key_gain"])
    positions = None if case.positions is None else case.positions.to(DEVICE)
    angles = None
    if case.rope is not None:
        angles = angles_of(case.rope.to(DEVICE), query, key, positions)
    results = normalize_and_rotate(query, key, norm, angles, impl=impl)  # pyright: ignore[reportArgumentType]
    grads = torch.autograd.grad(results, list(leaves.values()), [draw(*r.shape) for r in results])
    named = dict(zip(("query", "key"), results, strict=True))
    return {n: t.detach() for n, t in (named | dict(zip(leaves, grads, strict=True))).items()}


ROUNDING = {torch.float32: 4e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_matches_pytorch_in_double(case: PrepCase, dtype: torch.dtype) -> None:
    """The error is at most twice that of PyTorch in the same precision, or about one rounding. Of gains, whose few
    gradients are sums over all tokens, it is luck how much of it cancels: three times that of PyTorch.
    """
    exact = evaluate(case, torch.float64, "eager", dtype)
    eager, fused = (evaluate(case, dtype, impl, dtype) for impl in ("eager", "fused"))
    for name, expected in exact.items():
        factor = 3 if name.endswith("gain") else 2
        allowed = max(factor * error(eager[name], expected), ROUNDING[dtype])
        assert error(fused[name], expected) <= allowed, f"{name}: {error(fused[name], expected):.2e} > {allowed:.2e}"


IN_TURN = (
    PrepCase("cosine-images", (6, 7), 4, 2, 16, "cosine", AxialRoPE(16, 4, num_kv_heads=2), batch=5),
    PrepCase("rms-heads", (41,), 10, 2, 32, "rms", RoPE(32)),
    PrepCase("rms-video", (3, 4, 5), 4, 4, 64, "rms", video_rope(interleaved=True), coordinates(3, 4, 5, 3)),
)


def tangents(case: PrepCase) -> tuple[Tensor, Tensor]:
    """Those of the results, of random tangents of both heads."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(case.batch, *case.spatial, heads, case.head_dim) for heads in (case.heads, case.kv_heads)]
    heads, moves = ([torch.randn(x, generator=generator).to(DEVICE) for x in shapes] for _ in range(2))
    gains = [torch.full((case.heads if case.norm == "cosine" else case.head_dim,), 2.0, device=DEVICE)] * 2
    norm = HeadNorm("cosine", gains[0], None) if case.norm == "cosine" else HeadNorm("rms", gains[0], gains[1])
    assert case.rope is not None
    positions = None if case.positions is None else case.positions.to(DEVICE)
    angles = angles_of(case.rope.to(DEVICE), heads[0], heads[1], positions)
    with torch.no_grad():
        return torch.func.jvp(
            lambda q, k: normalize_and_rotate(q, k, norm, angles, impl="fused"), tuple(heads), tuple(moves)
        )[1]


@pytest.mark.parametrize(
    ("case", "programs", "shares"),
    [
        (IN_TURN[0], 72, (3, 2, 1, 6)),
        (IN_TURN[0], 1, (5, 1, 6, 1)),
        (IN_TURN[1], 72, (4, 3, 1, 6)),
        (IN_TURN[1], 10, (10, 1, 2, 3)),
        (IN_TURN[2], 14, (4, 1, 4, 4)),
    ],
)
def test_few_programs_compute_much(
    case: PrepCase, programs: int, shares: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs take several heads or images, the last ones of a run fewer, or all of them and several tiles, of which
    the last ones may lie behind the tokens. ``shares`` are items of a run, runs, tiles of a program, and spans of
    these.
    """
    many, moved = evaluate(case, torch.float32, "fused", torch.float32), tangents(case)
    monkeypatch.setattr(kernels, "PROGRAMS", dict.fromkeys(kernels.PROGRAMS, programs))
    monkeypatch.setattr(kernels, "PROGRAMS_WITH_SUMS", programs)
    monkeypatch.setattr(kernels, "ELEMENTS", 256)
    blocks: list[kernels.Blocks] = []
    divide = kernels._blocks
    monkeypatch.setattr(kernels, "_blocks", lambda *a, **k: blocks.append(divide(*a, **k)) or blocks[-1])
    few = evaluate(case, torch.float32, "fused", torch.float32)
    torch.testing.assert_close(tangents(case), moved)
    assert [(b.run, b.runs, b.span, b.spans) for b in blocks] == [shares] * 4  # one call, then one with tangents
    for name, expected in many.items():
        assert error(few[name], expected) < 1e-6, name


@pytest.mark.parametrize(("images", "tokens", "heads"), [(16384, 49, 4), (200000, 16, 8), (3, 1000, 2), (1, 1, 1)])
def test_programs_take_no_tiles_in_vain(images: int, tokens: int, heads: int) -> None:
    """Of more images than there are programs, each has programs of its own, with as many tiles as there are."""
    prep = QKPrep(None, None, torch.empty(1, tokens, 1), torch.empty(1, 16), 1.0, "rms", 1e-6)
    view = torch.empty(images, tokens, heads, 64, device="meta")
    blocks = kernels._blocks(prep, view, view, sums_elements=True)
    tiles = -(-tokens // blocks.tokens)
    assert tiles <= blocks.span * blocks.spans < tiles + blocks.spans


def test_pairs_may_be_none_where_neighbors_would_be_rotated() -> None:
    query = torch.randn(1, 5, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    angles = Angles(torch.zeros(5, 1, device=DEVICE), torch.zeros(1, 0, device=DEVICE), interleaved=True)
    rotated = normalize_and_rotate(query, query, None, angles, impl="fused")
    torch.testing.assert_close(rotated, (query, query), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(0, 1), (1, 130), (1999, 77), (None, 700)], ids=str)
def test_rows_of_sums_are_added(
    rows: tuple[int | None, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer rows than chunks, chunks of several blocks, numbers of gains that fill no power of two, one side alone."""
    monkeypatch.setattr(gain_sums, "ELEMENTS", 32)
    generator = torch.Generator().manual_seed(0)
    sides = zip(rows, (3, 12), strict=True)
    matrices = [None if n is None else torch.randn(n, gains, generator=generator).to(DEVICE) for n, gains in sides]
    like = [None if x is None else torch.empty(x.shape[1], dtype=dtype, device=DEVICE) for x in matrices]
    for found, matrix in zip(gain_sums.sum_rows(matrices, like), matrices, strict=True):
        if matrix is None:
            assert found is None
        else:
            exact = matrix.double().sum(0)
            torch.testing.assert_close(found, exact.to(dtype), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5)


def test_parts_of_heads_have_few_empty_columns() -> None:
    """Pairs, and what is not rotated: none, half, all; 8 of 24 channels; three axes of 24 to 128; hardly any."""
    heads = [(0, 64), (16, 32), (64, 0), (32, 64), (8, 8), (6, 12), (15, 34), (24, 48), (30, 68), (1, 254)]
    columns = [64, 16, 64, 32, 16, 16, 16, 32, 32, 64]
    assert [kernels.part_columns(*head) for head in heads] == columns


@pytest.mark.parametrize("kind", ["rms", "cosine"])
def test_gains_have_gradients_without_eps(kind: Literal["rms", "cosine"]) -> None:
    """Rows behind the last token are zeros, of which nothing is normalised."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 33, 2, 16, generator=generator).to(DEVICE).requires_grad_() for _ in range(2))
    gains = [torch.ones(16 if kind == "rms" else 2, device=DEVICE, requires_grad=True) for _ in range(2)]
    grads = []
    for impl in ("eager", "fused"):
        norm = HeadNorm(kind, gains[0], gains[1] if kind == "rms" else None, eps=0.0)
        results = normalize_and_rotate(query, key, norm, None, impl=impl)  # pyright: ignore[reportArgumentType]
        leaves = [query, key, *gains[: 2 if kind == "rms" else 1]]
        grads.append(torch.autograd.grad([x.square().sum() for x in results], leaves))
    torch.testing.assert_close(*grads)


def evaluate_far(impl: str) -> Tensor:
    query = torch.ones(1, 64, 1, 8, device=DEVICE, dtype=torch.float64 if impl == "eager" else torch.float32)
    positions = torch.linspace(-2e6, 2e6, 64, dtype=torch.float64).round().to(DEVICE)
    angles = Angles(positions[:, None], torch.tensor([[1.0, 0.5, 0.25, 0.125]], device=DEVICE))
    return normalize_and_rotate(query, query, None, angles, impl=impl)[0]  # pyright: ignore[reportArgumentType]


def test_far_angles_keep_their_accuracy() -> None:
    """The angles are exact in fp32, so errors come only from range reduction and the polynomials of cosine and sine."""
    assert (evaluate_far("fused").double() - evaluate_far("eager")).abs().max() < 3e-7


class Doubling(nn.Module):
    def forward(self, query: Tensor, key: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        return 2 * query, key


class Backwards(AxialRoPE):
    def forward(
        self, query: Tensor, key: Tensor, positions: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return super().forward(query.flip(-1), key, positions, **options)


@pytest.mark.parametrize(
    "rope", [AxialRoPE(8, 4, num_kv_heads=2), Doubling(), Backwards(8, 4, num_kv_heads=2)], ids=str
)
def test_layers_keep_their_meaning(rope: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rope module is supported: one that cannot be fused is called, after a fused normalisation."""

    def fused_in_fp32(query: Tensor, *args: Any, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
        del impl  # "auto" never means the interpreter
        return normalize_and_rotate(query, *args, impl="fused" if query.dtype == torch.float32 else "eager")

    def attend_fused_in_fp32(call: Call, *args: Any) -> Tensor:
        return attend_with_qk_prep(call, *args, impl="fused" if call.inputs.query.dtype == torch.float32 else "eager")

    monkeypatch.setattr(query_key, "normalize_and_rotate", fused_in_fp32)
    monkeypatch.setattr(attention, "attend_with_qk_prep", attend_fused_in_fp32)
    torch.manual_seed(0)
    layer = NeighborhoodGQA(32, 4, 3, num_kv_heads=2, num_registers=2, qk_norm="cosine", rope=rope).to(DEVICE)
    x = torch.randn(2, 5, 6, 32, device=DEVICE)
    grads = {}
    for dtype in (torch.float32, torch.float64):
        y = layer.to(dtype)(x.to(dtype))
        grads[dtype] = [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]
    for fused, eager in zip(*grads.values(), strict=True):
        assert error(fused, eager) < 3e-6


@pytest.mark.parametrize("impl", ["eager", "fused"])
@pytest.mark.parametrize("kind", ["cosine", "rms"])
def test_no_gain_is_a_gain_of_one(kind: Literal["cosine", "rms"], impl: Impl) -> None:
    heads, dim = 2, 16
    x = torch.randn(2, 1, 5, heads, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    gain = torch.full((heads if kind == "cosine" else dim,), 3.0, device=DEVICE)

    def results(key_gain: Tensor | None) -> list[Tensor]:
        query, key = x.clone().requires_grad_()
        prepared = normalize_and_rotate(query, key, HeadNorm(kind, gain, key_gain), None, impl=impl)
        return [*prepared, *torch.autograd.grad(prepared, (query, key), (x[1], x[0]))]

    for found, expected in zip(results(None), results(torch.ones_like(gain)), strict=True):
        torch.testing.assert_close(found, expected)


def test_auto_on_a_cpu_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``impl="auto"``, a CPU uses the eager path; Triton's interpreter must be asked for, as in attention."""

    def fail(*args: object) -> None:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(query_key.qk_prep_ops, "qk_prep", fail)
    x = torch.randn(1, 4, 1, 8)
    normalize_and_rotate(x, x, HeadNorm("cosine", None, None), None)


def test_refuses_rather_than_falls_back() -> None:
    x = torch.randn(1, 4, 1, 8, device=DEVICE)
    angles = Angles(torch.arange(4.0, device=DEVICE)[:, None], torch.ones(1, 4, device=DEVICE))
    with pytest.raises(RuntimeError, match="float64"):
        normalize_and_rotate(x.double(), x.double(), None, angles, impl="fused")
    learned = angles._replace(freqs=angles.freqs.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="require a gradient"):
        normalize_and_rotate(x, x, None, learned, impl="fused")
    (gradient,) = torch.autograd.grad(normalize_and_rotate(x, x, None, learned)[0].sum(), learned.freqs)
    assert gradient.any()


def test_second_derivatives_say_that_they_are_missing() -> None:
    x = torch.randn(1, 4, 1, 8, device=DEVICE, requires_grad=True)
    norm = HeadNorm("cosine", None, None)

    def loss(x: Tensor) -> Tensor:
        query, key = normalize_and_rotate(x, x.detach(), norm, None, impl="fused")
        return (query[..., 0] + key[..., 1]).sum()

    (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with raises_naming("second derivatives", 'impl="eager"', error=NotImplementedError):
        torch.autograd.grad(slope.square().sum(), x)
    prepared, _ = torch.ops.natten_layers.qk_prep(x, x, None, None, None, None, 1.0, "cosine", 1e-6, [], False)
    with raises_naming("natten_layers::qk_prep has no derivative", error=NotImplementedError):
        prepared.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["cosine", "rms"])
def test_gradients_are_bitwise_reproducible(norm: str) -> None:
    rope = AxialRoPE(16, 4, num_kv_heads=2) if norm == "cosine" else None
    case = PrepCase(norm, (100, 101), 4, 2, 16, norm, rope)
    first, second = (evaluate(case, torch.float32, "fused", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [CASES[0], CASES[8], CASES[10], CASES[-1]], ids=str)
def test_operators_keep_their_schemas(case: PrepCase) -> None:
    heads = [torch.randn(2, *case.spatial, h, case.head_dim, device=DEVICE) for h in (case.heads, case.kv_heads)]
    positions = None if case.positions is None else case.positions.to(DEVICE)
    angles = None if case.rope is None else angles_of(case.rope.to(DEVICE), heads[0], heads[1], positions)
    gains = [torch.rand(case.heads, device=DEVICE), None] if case.norm == "cosine" else [None, None]
    batched = None if angles is None else angles.positions.contiguous().expand(1, *case.spatial, -1)
    of_angles = () if angles is None else angles.split, angles is not None and angles.interleaved
    inputs = (*heads, *gains, batched, None if angles is None else angles.freqs, 1.0, case.norm, 1e-6, *of_angles)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.natten_layers.qk_prep.default, inputs, test_utils=checks)
    backward = torch.ops.natten_layers.qk_prep_backward.default
    torch.library.opcheck(backward, (*inputs, *heads), test_utils=checks)


@pytest.mark.parametrize("broken", [False, True])
def test_benchmark_times_only_what_is_right(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if broken:
        monkeypatch.setattr(AxialRoPE, "forward", lambda self, query, key, positions: (key, query))
    path = tmp_path / "results" / "module.json"
    flags = ["--smoke", "--device", DEVICE, "--workloads", "hdit-l1", "--budget-s", "0", "--out", str(path)]
    assert module.main(flags) == broken
    rows = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    assert (rows["layer"]["median_ms"] is None) == broken
    assert ("wrong result" in capsys.readouterr().out) == broken


def test_a_layer_of_a_video_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "module.json"
    flags = ["--smoke", "--device", DEVICE, "--workloads", "hunyuan", "--budget-s", "0", "--out", str(path)]
    assert module.main(flags) == 0
    times = [row["times_bare"] for row in json.loads(path.read_text())["rows"]]
    assert len(times) == 3
    assert min(times) > 0
    corners = module.positions_of((2, 3, 4), torch.device("cpu")).reshape(-1, 3)[[0, -1]]
    assert corners.tolist() == [[-1, -1, -1], [1, 1, 1]]


@pytest.mark.parametrize(("name", "heads"), [("mistral", 96 * (8 + 2) * 16), ("hunyuan", 4 * 8 * 8 * (2 + 2) * 16)])
@pytest.mark.parametrize("broken", [False, True])
def test_rotations_are_a_share_of_the_copy_bandwidth(
    broken: bool,
    name: str,
    heads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``heads`` are the elements of queries and keys: tokens, heads of both, channels."""
    if broken:  # only what is timed, not what it is compared with
        right = rotation.normalize_and_rotate

        def wrong(*heads: Any, impl: Impl = "auto") -> tuple[Tensor, ...]:
            return tuple(1.5 * x if impl == "auto" else x for x in right(*heads, impl=impl))

        monkeypatch.setattr(rotation, "normalize_and_rotate", wrong)
    path = tmp_path / "rotation.json"
    flags = ["--smoke", "--device", DEVICE, "--workloads", name, "--budget-s", "0", "--out", str(path)]
    assert rotation.main(flags) == broken
    report = json.loads(path.read_text())
    rows = report["rows"]
    norms = "none", "cosine", "rms"
    passes = "forward", "backward"
    assert [(row["norm"], row["direction"]) for row in rows] == list(itertools.product(norms, passes))
    assert [row["bytes"] for row in rows] == [n * 2 * heads for n in (2, 2, 2, 3, 2, 3)]  # bf16
    for row in rows:
        rate = None if broken else row["bytes"] / (1e-3 * row["median_ms"])
        assert row["of_copy"] == (None if rate is None else pytest.approx(rate / report["rates"]["copy"]))
    assert ("wrong result" in capsys.readouterr().out) == broken


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 32, 32), (8, 160, 160)], ids=str)  # the latter has a kernel of its own on 9.0
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_a_layer_takes_two_launches_at_most(num_kv_heads: int, shape: tuple[int, int, int]) -> None:
    """A layer makes at most two launches between its projections, and no other copy of query, key or value."""
    rope = AxialRoPE(64, 4, num_kv_heads=num_kv_heads)
    rows = (4 + 2 * num_kv_heads) * 64
    options = {"num_kv_heads": num_kv_heads, "head_dim": 64, "qk_norm": "cosine", "rope": rope, "sink": "zero"}
    layer = NeighborhoodGQA(rows, 4, 7, **options).to(DEVICE, torch.bfloat16).eval()
    layer.register_module("qkv", torch.nn.Identity())  # its output is the input
    qkv = torch.randn(*shape, rows, device=DEVICE, dtype=torch.bfloat16)
    positions = make_axial_pos(*shape[1:], device=DEVICE)

    def kernels() -> list[str]:
        layer.attend(qkv, positions=positions)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            layer.attend(qkv, positions=positions)
            torch.cuda.synchronize()
        return [e.name for e in profile.events() or [] if "CUDA" in str(e.device_type)]

    names = kernels()
    assert len(names) == 2, names
    assert "qk_prep_kernel" in names[0]
    with torch.no_grad():
        names = kernels()
    is_sm90 = torch.cuda.get_device_capability() == (9, 0) and support.GLUON_GAP is None
    assert len(names) == (1 if is_sm90 else 2), names
