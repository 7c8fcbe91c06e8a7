"""The decode kernel against the fp64 eager path: small sizes in Triton's interpreter, realistic ones on a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import FLOOR, enlarge, error, raises_naming
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks import decode as benchmark
from natten_layers import cached, cached_attention, operations

pytest.importorskip("triton")

import triton
import triton.language as tl

from natten_layers.kernels.portable import decode

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# These tests run interpreted without a GPU. With one, they run compiled and have the mark "gpu".
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@dataclass(frozen=True)
class CacheCase:
    """A cache of ``slots`` in which the last ``tokens`` of a text are the queries."""

    name: str
    slots: int
    tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    window: int | None = None
    registers: int = 0
    sink: Literal["none", "zero", "learned"] = "none"
    scale: float | None = None
    batch: int = 2
    fill: Literal["all", "half", "rolled", "shuffled"] = "all"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:  # pytest's id
        return self.name


def make_arguments(case: CacheCase) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype).to(DEVICE)

    slots = torch.arange(case.slots)
    positions = {
        "all": slots,
        "half": torch.where(slots <= case.slots // 2, slots, -1),
        "rolled": (slots + case.slots // 3) % case.slots + 5,
        "shuffled": torch.randperm(case.slots, generator=generator) - 2,
    }[case.fill]
    key_positions = positions.repeat(case.batch, 1)
    key_positions[-1, ::7] = -1  # empty slots between the tokens of one sequence
    query_positions = torch.arange(case.tokens)[None] + positions.max() - case.tokens + 1
    arguments: dict[str, Any] = {
        "query": draw(case.batch, case.tokens, case.heads, case.head_dim),
        "key": draw(case.batch, case.slots, case.kv_heads, case.head_dim),
        "value": draw(case.batch, case.slots, case.kv_heads, case.value_dim),
        "query_positions": query_positions.to(DEVICE),
        "key_positions": key_positions.to(DEVICE),
        "window": case.window,
        "scale": case.scale,
    }
    if case.registers:
        arguments["additional_keys"] = draw(1, case.registers, case.kv_heads, case.head_dim)
        arguments["additional_values"] = draw(1, case.registers, case.kv_heads, case.value_dim)
    if case.sink != "none":
        # Sinks near the lse of a few keys: leaving one out, or counting it twice, changes the result visibly.
        arguments["sink"] = 0.0 if case.sink == "zero" else draw(case.heads).float() + 3.0
    return arguments


def attend(arguments: dict[str, Any], impl: Literal["fused", "eager"]) -> tuple[Tensor, Tensor]:
    return cached_attention(**arguments, return_lse=True, impl=impl)


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in arguments.items()}


def check(case: CacheCase) -> None:
    """The error may be twice that of the eager path in the same precision, or a rounding."""
    arguments = make_arguments(case)
    exact, peer = attend(widened(arguments), "eager"), attend(arguments, "eager")
    for name, got, near, true in zip(("out", "lse"), attend(arguments, "fused"), peer, exact, strict=True):
        # The weights of the values are rounded to their dtype; eager keeps them in fp32.
        limit = max(2 * error(near, true), FLOOR[got.dtype])
        assert error(got, true) <= limit, f"{case}: {name} has relative error {error(got, true):.2e} > {limit:.2e}"


CASES = (
    CacheCase("one-token", 70),
    CacheCase("multi-head", 40, heads=3, kv_heads=3, head_dim=8, value_dim=24),
    CacheCase("multi-query", 40, heads=20, kv_heads=1, sink="learned", registers=1),
    CacheCase("window", 200, window=17, fill="rolled"),
    CacheCase("window-of-one", 40, tokens=2, window=1, sink="zero"),
    CacheCase("tokens", 70, tokens=5, window=30, fill="shuffled", sink="learned"),
    CacheCase("rows-in-blocks", 60, tokens=40, window=25, registers=2, batch=1),
    CacheCase("half-full", 300, fill="half", registers=20, sink="learned"),
    CacheCase("scale", 40, scale=-0.3, sink="zero"),
    CacheCase("scale-zero", 40, scale=0.0),
    CacheCase("one-slot", 1, registers=3),
    CacheCase("head-dims", 60, tokens=3, head_dim=40, value_dim=72, window=30, fill="rolled"),
    CacheCase("fp16", 150, tokens=2, head_dim=64, value_dim=64, registers=2, sink="learned", dtype=torch.float16),
    CacheCase("everything", 130, 3, 6, 3, 24, 40, 60, 5, "learned", 0.4, 3, "shuffled"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case: CacheCase) -> None:
    check(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle_in_trimmed_slices(case: CacheCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many slices of small caches, sink and registers count once, and slices may see no key at all."""
    monkeypatch.setattr(decode, "TILE_BYTES", 1)
    monkeypatch.setattr(decode, "TRIM_FROM", 0)
    assert case.slots <= 32 or decode.split(1, case.slots, 16)[0] > 1
    check(case)


@triton.jit
def first_chunks_kernel(Out, begin, BN: tl.constexpr):
    seen = begin + tl.program_id(0)
    tl.store(Out + tl.program_id(0), decode.first_chunk(begin, seen, BN))


def test_a_trimmed_slice_begins_with_the_chunk_of_the_first_slot_that_is_seen() -> None:
    starts = torch.zeros(50, dtype=torch.int32, device=DEVICE)
    first_chunks_kernel[(50,)](starts, 64, BN=16)  # pyright: ignore[reportArgumentType]
    assert starts.tolist() == [64 + i // 16 * 16 for i in range(50)]


@pytest.mark.parametrize("programs", [1, 3, 100, 5000])
@pytest.mark.parametrize("length", [1, 64, 65, 1000, 10**6])
def test_slices_cover_the_cache(programs: int, length: int) -> None:
    splits, share = decode.split(programs, length, 64)
    assert share % 64 == 0
    assert (splits - 1) * share < length <= splits * share
    assert splits == 1 or splits <= decode.MAX_SPLITS


SHAPES = (
    CacheCase("mistral", 4096, heads=32, kv_heads=8, head_dim=128, value_dim=128, window=4096, batch=8, fill="rolled"),
    CacheCase("one-sequence", 4096, heads=32, kv_heads=8, head_dim=128, value_dim=128, batch=1),
    CacheCase("speculative", 2000, tokens=8, heads=32, kv_heads=8, head_dim=128, value_dim=128, window=1000,
              registers=4),
    CacheCase("gpt-oss", 128, heads=64, kv_heads=8, head_dim=64, value_dim=64, window=128, sink="learned", batch=16),
    CacheCase("gpt-oss-unrolled", 3000, heads=64, kv_heads=8, head_dim=64, value_dim=64, window=128, sink="learned"),
    CacheCase("prefill", 700, tokens=300, heads=8, kv_heads=2, head_dim=64, value_dim=64, window=200, sink="zero"),
    CacheCase("padding", 5000, heads=4, kv_heads=4, head_dim=64, value_dim=64, fill="half", registers=70),
    *(CacheCase(f"head-dim-{d}", 1111, tokens=2, head_dim=d, value_dim=d, registers=3, sink="zero")
      for d in (8, 32, 40, 80, 96, 128, 192, 256)),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_matches_the_oracle_at_real_shapes(case: CacheCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


def test_a_token_that_sees_nothing_gets_nothing() -> None:
    arguments = make_arguments(CacheCase("nothing", 40, tokens=2))
    arguments["query_positions"] = torch.tensor([[-1, 3], [-100, 3]], device=DEVICE)
    out, lse = attend(arguments, "fused")
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0] == -math.inf).all()
    assert error(out[:, 1], attend(widened(arguments), "eager")[0][:, 1]) < 1e-6
    _, lse = attend(arguments | {"sink": 2.5}, "fused")
    torch.testing.assert_close(lse[:, 0], torch.full_like(lse[:, 0], 2.5))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to -inf, whose weight is 0
@pytest.mark.parametrize("tile_bytes", [1, decode.TILE_BYTES])
@pytest.mark.parametrize("exponent", [32, 112])
def test_scores_may_be_as_large_as_fp32_holds(exponent: int, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TILE_BYTES", tile_bytes)
    arguments = make_arguments(CacheCase("large", 70, tokens=2, window=40, registers=2))
    arguments |= enlarge({name: arguments[name] for name in ("query", "key", "additional_keys")}, exponent)
    expected = attend(widened(arguments), "eager")
    for got, wanted in zip(attend(arguments, "fused"), expected, strict=True):
        assert error(got, wanted) < 1e-6


@pytest.mark.parametrize("scale", [1e-50, 1e-40])
def test_a_scale_that_fp32_does_not_hold_gives_every_key_the_same_weight(scale: float) -> None:
    check(CacheCase("tiny", 70, tokens=2, window=40, registers=2, sink="learned", scale=scale))


@pytest.mark.parametrize("trim_from", [0, decode.TRIM_FROM])
@pytest.mark.parametrize("hole", [-(2**63), -(2**63) + 30, -(2**32) + 30, -(2**31) - 1])
def test_padding_may_have_any_negative_position(hole: int, trim_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of these positions are not negative if cut to 32 bits."""
    monkeypatch.setattr(decode, "TRIM_FROM", trim_from)
    arguments = make_arguments(CacheCase("padding", 40, tokens=2, window=25))
    expected = attend(arguments, "fused")
    keys, queries = arguments["key_positions"], arguments["query_positions"]
    assert (keys == -1).any()
    arguments["key_positions"] = torch.where(keys == -1, hole, keys)
    for got, wanted in zip(attend(arguments, "fused"), expected, strict=True):
        assert torch.equal(got, wanted)
    arguments["query_positions"] = torch.cat((queries[:, :1], torch.full_like(queries[:, :1], hole)), 1)
    out, lse = attend(arguments, "fused")
    assert torch.equal(out[:, 0], expected[0][:, 0])
    assert (out[:, 1] == 0).all()
    assert (lse[:, 1] == -math.inf).all()


@pytest.mark.parametrize("trim_from", [0, decode.TRIM_FROM])
@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize("by", [2**31 - 20, 2**32, 2**62])
def test_positions_have_64_bits(by: int, window: int | None, trim_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding the same large number to all positions does not change which keys are seen."""
    monkeypatch.setattr(decode, "TRIM_FROM", trim_from)
    arguments = make_arguments(CacheCase("further", 40, tokens=2, window=window, fill="rolled"))
    expected = attend(arguments, "fused")
    keys = arguments["key_positions"]
    arguments["key_positions"] = torch.where(keys >= 0, keys + by, keys)
    arguments["query_positions"] = arguments["query_positions"] + by
    for got, wanted in zip(attend(arguments, "fused"), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
def test_what_is_not_seen_changes_nothing(name: str, value: float, registers: int) -> None:
    arguments = make_arguments(CacheCase("nan", 40, tokens=2, window=10, registers=registers, batch=1))
    clean, _ = attend(arguments, "fused")
    arguments[name][:, 29] = value  # in the first token's window, before the second's
    arguments[name][:, 7] = value  # an empty slot
    arguments["key_positions"][:, 36] = -1
    arguments[name][:, 36] = value
    expected, _ = attend(widened(arguments), "eager")
    out, _ = attend(arguments, "fused")
    assert not out[:, 0].isfinite().all(-1).any()
    assert error(out[:, 1], expected[:, 1]) < 1e-6
    assert error(clean[:, 1], expected[:, 1]) > 1e-3  # the clean call does see slot 36


def test_reads_caches_of_any_strides() -> None:
    """Caches with heads before slots, spare slots or strided positions give the bits that a contiguous cache gives."""
    case = CacheCase("strides", 60, tokens=2, registers=3)
    arguments = make_arguments(case)
    expected = attend(arguments, "fused")
    for name in ("key", "value"):
        room = torch.full((2, 2, 80, 16), math.nan, device=DEVICE).transpose(1, 2)
        room[:, :60] = arguments[name]
        arguments[name] = room[:, :60]
    arguments["query"] = torch.stack([arguments["query"]] * 2, -2)[..., 0, :]
    arguments["key_positions"] = torch.stack([arguments["key_positions"].int()] * 2, -1)[..., 0]
    for got, wanted in zip(attend(arguments, "fused"), expected, strict=True):
        assert torch.equal(got, wanted)


def test_sink_of_any_stride() -> None:
    arguments = make_arguments(CacheCase("sink", 20))
    got = attend(arguments | {"sink": torch.tensor([2.0], device=DEVICE).expand(4)}, "fused")
    assert torch.equal(got[0], attend(arguments | {"sink": 2.0}, "fused")[0])


def test_without_lse_the_result_is_the_same() -> None:
    arguments = make_arguments(CASES[-1])
    assert torch.equal(cached_attention(**arguments, impl="fused"), attend(arguments, "fused")[0])


def test_inference_only() -> None:
    arguments = make_arguments(CacheCase("gradients", 9))
    arguments["value"].requires_grad_()
    with raises_naming("fused", "no backward", error=RuntimeError):
        attend(arguments, "fused")
    out = cached_attention(**arguments)
    assert out.requires_grad
    with torch.no_grad():
        assert error(attend(arguments, "fused")[0], out) < 1e-6


def test_unsupported_head_dim_is_an_error() -> None:
    with raises_naming("fused", "head_dim 12", error=RuntimeError):
        attend(make_arguments(CacheCase("head-dim", 9, head_dim=12)), "fused")


@pytest.mark.parametrize("with_lse", [False, True])
def test_operator_is_well_formed(with_lse: bool) -> None:
    a = make_arguments(CacheCase("opcheck", 20, registers=2, sink="learned"))
    positions = a["query_positions"].expand(2, -1), a["key_positions"]
    registers = (a[name].expand(2, -1, -1, -1) for name in ("additional_keys", "additional_values"))
    arguments = (a["query"], a["key"], a["value"], *positions, *registers, a["sink"], None, 5, 0.3, with_lse)
    torch.library.opcheck(torch.ops.natten_layers.decode.default, arguments)


def smoke(out: Path) -> tuple[int, list[dict[str, Any]]]:
    status = benchmark.main(["--smoke", "--device", DEVICE, "--budget-s", "0.01", "--out", str(out)])
    return status, json.loads(out.read_text())["rows"]


def test_benchmark_runs_in_miniature(tmp_path: Path) -> None:
    status, rows = smoke(tmp_path / "decode.json")
    assert status == 0
    assert len(rows) == 2 * len(benchmark.WORKLOADS)
    assert all(row["failure"] is None and row["median_ms"] > 0 for row in rows)


def test_benchmark_times_no_wrong_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmark.ours
    monkeypatch.setattr(benchmark, "ours", lambda inputs: right(replace(inputs, window=inputs.window - 5)))
    status, rows = smoke(tmp_path / "decode.json")
    assert status == 1
    assert all(
        "wrong result" in row["failure"] and row["median_ms"] is None
        for row in rows
        if row["implementation"] == "natten_layers"
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_auto_takes_the_kernel_and_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_arguments(replace(SHAPES[0], dtype=torch.bfloat16, registers=2, sink="learned"))
    expected = cached_attention(**arguments, impl="fused")
    monkeypatch.setattr(cached, "_eager", None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = cached_attention(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_replays_in_a_graph_with_new_positions() -> None:
    arguments = make_arguments(replace(SHAPES[0], dtype=torch.bfloat16, sink="learned"))
    cached_attention(**arguments, impl="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cached_attention(**arguments, impl="fused")
    arguments["query_positions"] -= 1000
    graph.replay()
    assert torch.equal(out, cached_attention(**arguments, impl="fused"))


@pytest.mark.gpu
def test_allocates_a_fraction_of_the_cache() -> None:
    arguments = make_arguments(replace(SHAPES[0], dtype=torch.bfloat16))
    arguments["key"] = arguments["key"].transpose(1, 2).contiguous().transpose(1, 2)
    cached_attention(**arguments, impl="fused")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cached_attention(**arguments, impl="fused")
    cache = 2 * arguments["key"].nbytes
    assert torch.cuda.max_memory_allocated() - before < cache / 16


@pytest.mark.gpu
def test_caches_beyond_two_to_the_31_elements() -> None:
    slots = 2**20 + 5000
    cache = torch.randn(1, slots, 8, 256, device="cuda", dtype=torch.bfloat16)
    assert cache.numel() > 2**31
    query = torch.randn(1, 1, 16, 256, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(slots, device="cuda")[None]
    last = positions[:, -1:]
    out = cached_attention(query, cache, cache, last, positions, window=100, impl="fused")
    tail = cache[:, -100:].double()
    expected = cached_attention(query.double(), tail, tail, last, positions[:, -100:], impl="eager")
    assert error(out, expected) < 1e-2


@pytest.mark.parametrize("transform", ["jvp", "dual", "grad(vmap)"])
def test_derivatives_are_left_to_pytorch(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no tensor says that it needs a gradient. If asked for, the kernel says what it does not have."""
    why = operations.why_eager

    def as_on_gpu(impl: operations.Impl, query: Tensor, why_not: Callable[[], str | None]) -> str | None:
        return why_not() if impl == "auto" else why(impl, query, why_not)

    monkeypatch.setattr(operations, "why_eager", as_on_gpu)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((1, 2, 4, 8), (1, 7, 2, 8)))
    places = torch.arange(7, device=DEVICE)[None]

    def slope(impl: operations.Impl) -> Tensor:
        def run(q: Tensor) -> Tensor:
            return cached_attention(q, key, key.cos(), places[:, 5:], places, impl=impl)

        if transform == "grad(vmap)":
            return torch.func.grad(lambda q: torch.func.vmap(run)(q).square().sum())(query[None])
        with torch.no_grad():
            if transform == "jvp":
                return torch.func.jvp(run, (query,), (query.cos(),))[1]
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(query, query.cos()))).tangent
                assert tangent is not None
                return tangent

    assert torch.equal(slope("auto"), slope("eager"))
    with raises_naming("fused", "the decode kernel has no", error=RuntimeError):
        slope("fused")
