"""Periodic axes: windows that wrap around a ring, in PyTorch and in the fused kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import Case, arguments, error, make_inputs, raises_naming, run
from torch import Tensor

from natten_layers import (
    AxialRoPE,
    NeighborhoodAttention2D,
    NeighborhoodGQA,
    explain,
    neighborhood_attention,
    neighborhood_attention_varlen,
)

pytest.importorskip("triton")

from natten_layers.kernels.host.problem import Inputs, Options, problem_of
from natten_layers.kernels.host.tiling import executed_on_ring
from natten_layers.kernels.sm90 import medium_tiling

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# These tests run interpreted without a GPU. With one, they run compiled and have the mark "gpu".
pytestmark = [pytest.mark.gpu] if ON_GPU else []
IMPLS = pytest.mark.parametrize("impl", ["eager", "fused"])


def means(length: int, *, impl: str, **window: object) -> list[float]:
    """The sums of the keys ``2 ** j`` that every token sees, from their mean: all scores are zero."""
    zero = torch.zeros(1, length, 1, 16, device=DEVICE)
    value = (2.0 ** torch.arange(length, device=DEVICE)).reshape(1, length, 1, 1).expand(-1, -1, -1, 16)
    out = neighborhood_attention(zero, zero, value, is_periodic=True, impl=impl, **window)  # type: ignore[arg-type]
    return (out[0, :, 0, 0] * window["kernel_size"]).round().tolist()  # type: ignore[operator]


def bits(*keys: int) -> float:
    return float(sum(2**key for key in keys))


@IMPLS
def test_five_tokens_on_a_ring(impl: str) -> None:
    expected = [bits(4, 0, 1), bits(0, 1, 2), bits(1, 2, 3), bits(2, 3, 4), bits(3, 4, 0)]
    assert means(5, kernel_size=3, impl=impl) == expected


@IMPLS
def test_a_ring_with_dilation(impl: str) -> None:
    seen = means(8, kernel_size=2, dilation=2, impl=impl)
    assert seen == [bits(i, (i - 2) % 8) for i in range(8)]
    assert means(6, kernel_size=3, dilation=2, impl=impl) == [bits(i % 2, i % 2 + 2, i % 2 + 4) for i in range(6)]


@IMPLS
def test_an_even_window_has_one_key_more_on_the_left(impl: str) -> None:
    assert means(6, kernel_size=4, impl=impl)[0] == bits(4, 5, 0, 1)


@IMPLS
def test_a_last_group_that_is_shorter_than_the_stride(impl: str) -> None:
    assert means(6, kernel_size=4, stride=4, impl=impl) == [bits(0, 1, 2, 3)] * 4 + [bits(3, 4, 5, 0)] * 2


SPATIAL = ("query", "key", "value", "out", "lse")
"""Inputs and results that have tokens. Gradients have the names of the inputs."""


def rolled(case: Case, shifts: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results of the fused kernels, rolled, and their results from rolled inputs."""
    axes = tuple(range(1, 1 + len(case.spatial)))

    def roll(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.detach().roll(shifts, axes) if name in SPATIAL else x for name, x in tensors.items()}

    def results(inputs: dict[str, Tensor], cotangents: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        out, lse = neighborhood_attention(**arguments(case, leaves), return_lse=True, impl="fused")
        grads = torch.autograd.grad((out, lse), tuple(leaves.values()), (cotangents["out"], cotangents["lse"]))
        return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, grads, strict=True))

    inputs = make_inputs(case, DEVICE)
    out = torch.randn_like(inputs["query"])
    cotangents = {"out": out, "lse": out[..., 0]}
    return roll(results(inputs, cotangents)), results(roll(inputs), roll(cotangents))


def test_rolling_by_whole_tiles_rolls_results_and_gradients_bit_for_bit() -> None:
    case = Case("ring", (128,), 7, heads=2, kv_heads=1, batch=1, is_periodic=True)
    expected, found = rolled(case, (64,))
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_rolling_by_any_number_of_groups_rolls_results_and_gradients() -> None:
    case = Case("torus", (6, 12), (3, 5), (1, 3), (1, 2), heads=2, kv_heads=1, registers=1, sink="learned", batch=1,
                is_periodic=True)  # fmt: skip
    expected, found = rolled(case, (1, 6))
    for name, tensor in found.items():
        assert error(tensor, expected[name]) < 1e-5, name  # the gradient of a sink is a sum that cancels in part
    expected, found = rolled(replace(case, is_periodic=(False, True)), (1, 0))
    assert error(found["out"], expected["out"]) > 0.05  # an axis that is no ring does not roll


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@IMPLS
def test_what_is_not_finite_stays_in_windows_that_wrap(impl: str) -> None:
    q, k, v = (t.detach() for t in make_inputs(Case("nan", (7, 12), 3, batch=1), DEVICE).values())
    options = {"is_periodic": (False, True), "impl": impl}
    clean = neighborhood_attention(q, k, v, 3, **options)  # type: ignore[arg-type]
    v[0, 3, 0] = float("nan")
    dirty = neighborhood_attention(q, k, v, 3, **options)  # type: ignore[arg-type]
    seen = torch.zeros(1, 7, 12, dtype=torch.bool)
    seen[0, 2:5, [11, 0, 1]] = True
    assert not dirty[seen].isfinite().any()
    torch.testing.assert_close(dirty[~seen], clean[~seen], rtol=1e-5, atol=1e-6)


def test_a_window_of_the_whole_ring_is_that_of_the_whole_axis() -> None:
    """The kernels then compute it as an axis that is no ring, for which there are more of them."""
    whole = Case("whole", (6, 5), (6, 3), is_periodic=(True, False))
    inputs = make_inputs(whole, DEVICE)
    plain = run(Case("plain", (6, 5), (6, 3)), inputs, "fused").tensors()
    for name, tensor in run(whole, inputs, "fused").tensors().items():
        assert torch.equal(tensor, plain[name]), name
    tensors = Inputs(*(inputs[name] for name in ("query", "key", "value")))
    window = (6, 3), (1, 1), (1, 1), (False, False)
    assert problem_of(tensors, Options(None, *window, 1.0, (True, False))) == problem_of(
        tensors, Options(None, *window, 1.0)
    )
    assert problem_of(tensors, Options(None, *window, 1.0, (True, True))).is_periodic == (False, True)


RINGS = [(5,), (0,), (8,), (2,)]
"""Three rings in one packed batch, and a sample without tokens."""


@IMPLS
def test_packed_rings_by_hand(impl: str) -> None:
    """Each wraps at its own length, and on a ring of two tokens a window of three is cut to both."""
    zero = torch.zeros(15, 1, 16, device=DEVICE)
    own = torch.cat([torch.arange(n, device=DEVICE) for (n,) in RINGS])
    value = (2.0**own)[:, None, None].expand(-1, 1, 16)
    out = neighborhood_attention_varlen(zero, zero, value, RINGS, 3, is_periodic=True, impl=impl)  # type: ignore[arg-type]
    counts = torch.tensor([3.0] * 13 + [2.0] * 2, device=DEVICE)
    five = [bits(4, 0, 1), bits(0, 1, 2), bits(1, 2, 3), bits(2, 3, 4), bits(3, 4, 0)]
    eight = [bits((i - 1) % 8, i, (i + 1) % 8) for i in range(8)]
    assert (out[:, 0, 0] * counts).round().tolist() == five + eight + [bits(0, 1)] * 2


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a loss for which all tokens matter differently."""
    weights = torch.arange(out.numel(), device=DEVICE).reshape(out.shape) % 7 - 3.0
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def test_packed_rings_are_separate_calls_bit_for_bit() -> None:
    """On the eager path, where they are these calls."""
    torch.manual_seed(0)
    shapes, options = [(4, 6), (3, 10)], {"stride": (1, 2), "dilation": (1, 2), "is_periodic": (False, True)}
    leaves = [torch.randn(54, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    packed = gradients(neighborhood_attention_varlen(*leaves, shapes, (3, 3), **options, impl="eager"), leaves)  # type: ignore[call-overload]
    parts = []
    for shape, *qkv in zip(shapes, *(x.split([24, 30]) for x in leaves), strict=True):
        parts.append(neighborhood_attention(*(x.view(1, *shape, 2, 16) for x in qkv), (3, 3), **options, impl="eager"))  # type: ignore[call-overload]
    alone = gradients(torch.cat([x.flatten(0, 2) for x in parts]), leaves)
    for found, expected in zip(packed, alone, strict=True):
        assert torch.equal(found, expected)


def test_rolling_every_packed_ring_rolls_results_and_gradients() -> None:
    """Each ring by another number of groups of queries."""
    torch.manual_seed(0)
    shapes, shifts = [(3, 8), (2, 12)], (4, 8)
    leaves = [torch.randn(48, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    weights = torch.randn(48, 2, 16, device=DEVICE)

    def roll(x: Tensor, axis: int = 1) -> Tensor:
        parts = zip(x.detach().split([24, 24]), shapes, shifts, strict=True)
        return torch.cat([part.unflatten(0, shape).roll(n, axis).flatten(0, 1) for part, shape, n in parts])

    def results(tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in tensors]
        options = {"stride": (1, 2), "dilation": (1, 2), "is_periodic": (False, True), "impl": "fused"}
        out = neighborhood_attention_varlen(*inputs, shapes, (2, 3), **options)  # type: ignore[call-overload]
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]

    plain = results(leaves, weights)
    for found, expected in zip(results([roll(x) for x in leaves], roll(weights)), plain, strict=True):
        assert error(found, roll(expected)) < 2e-6
    lines = results([roll(x, 0) for x in leaves], roll(weights, 0))  # an axis that is no ring
    assert error(lines[0], roll(plain[0], 0)) > 0.05


def test_bad_packed_rings_are_named() -> None:
    x = torch.randn(38, 2, 16, device=DEVICE)
    shapes = [(4, 6), (0, 3), (2, 7)]
    for impl in ("eager", "fused"):
        with raises_naming("dilation 2", "length 7", "width axis of sample 2", "(2, 7)"):
            neighborhood_attention_varlen(x, x, x, shapes, (1, 3), dilation=2, is_periodic=(False, True), impl=impl)  # type: ignore[arg-type]
    with raises_naming("is_causal", "is_periodic", "width"):
        neighborhood_attention_varlen(x, x, x, shapes, 3, is_causal=(False, True), is_periodic=True)
    with raises_naming("is_periodic", "1 spatial axis"):
        neighborhood_attention_varlen(x, x, x, [(38,)], 3, is_periodic=(False, True))


def test_bad_rings_are_named() -> None:
    x = torch.randn(1, 8, 9, 2, 16, device=DEVICE)
    with raises_naming("is_causal", "is_periodic", "width"):
        neighborhood_attention(x, x, x, 3, is_causal=(False, True), is_periodic=True)
    with raises_naming("dilation 2", "length 9", "width"):
        neighborhood_attention(x, x, x, 3, dilation=2, is_periodic=True)
    with raises_naming("is_periodic", "3", "2"):
        explain(x, x, x, (3, 3), is_periodic=(True, True, True))


def test_modules_with_nattens_names_have_rings() -> None:
    x = torch.randn(1, 6, 8, 32, device=DEVICE)
    layer = NeighborhoodAttention2D(32, 2, 3, is_periodic=(False, True)).to(DEVICE)
    alike = NeighborhoodGQA(32, 2, (3, 3), is_periodic=(False, True)).to(DEVICE)
    alike.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), alike(x))
    torch.testing.assert_close(layer(x.roll(3, 2)), layer(x).roll(3, 2))
    for flags, message in (((True,), "is_periodic=(True,)"), ("no", "'no' of type str")):
        with raises_naming("is_periodic", message):
            NeighborhoodAttention2D(32, 2, 3, is_periodic=flags)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kernel", "stride"), [(6, 1), (9, 4), (16, 2)])
@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_a_walk_over_a_ring_is_counted_as_it_goes(kernel: int, stride: int, tile: int, chunk: int) -> None:
    """Token by token: a chunk ends where the ring does, and a tile of the whole ring sees parts of it twice."""
    length = 19
    for bounds in (medium_tiling.ring_windows, medium_tiling.ring_queries):
        chunks = 0
        for first in range(0, length, tile):
            rows = torch.arange(first, min(first + tile, length))
            low, high = bounds(rows, length, kernel, stride, False)
            corner, end = int(low.min()), int(high.max())
            while corner <= end:
                chunks += 1
                corner += min(chunk, length - corner % length)
        assert executed_on_ring((length, kernel, stride, False), tile, chunk, bounds) == chunks * tile * chunk


def test_tiles_suit_windows_that_wrap_around_a_ring() -> None:
    """4x6x6 windows of a video of 16x16 tokens a frame: a tile of a whole ring of 16 tokens would walk over 21."""
    query, key = (torch.zeros(13, 40, 16, 16, heads, 32, dtype=torch.float16, device="meta") for heads in (24, 4))
    options = Options(None, (4, 6, 6), (1, 1, 1), (1, 1, 1), (False,) * 3, 1.0)
    flat = problem_of(Inputs(query, key, key), options)
    ring = flat._replace(is_periodic=(False, False, True))
    config = medium_tiling.forward_tile_config(ring)
    assert config is not None
    assert config.tile[2] + 6 - 1 < 16
    flat_config = medium_tiling.forward_tile_config(flat)
    assert flat_config is not None
    assert flat_config.tile[2] == 16  # whose windows end at the border


def layer_on_a_ring(period: float | None) -> NeighborhoodGQA:
    rope = AxialRoPE(8, 4, periods=(None, period))
    return NeighborhoodGQA(32, 4, (3, 3), is_periodic=(False, True), rope=rope)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_keeps_whole_turns_with_the_weights_of_another_ring(dtype: torch.dtype, assign: bool) -> None:
    other, layer = layer_on_a_ring(1.7), layer_on_a_ring(1.0)
    weights = {name: x.to(dtype) for name, x in other.state_dict().items()}
    given = {name: x.clone() for name, x in weights.items()}
    layer.load_state_dict(weights, assign=assign)
    freqs = layer.rope.freqs  # type: ignore[union-attr]
    assert freqs.dtype == torch.float32  # type: ignore[union-attr]
    turns = freqs[:, 1:].double() / (2 * torch.pi)  # type: ignore[index]
    torch.testing.assert_close(turns, turns.round(), rtol=0, atol=1e-6)
    assert turns.min() > 0.9
    assert all(torch.equal(weights[name], given[name]) for name in given)
    x = torch.randn(1, 8, 4, 32, dtype=torch.float64)
    layer = layer.double()
    torch.testing.assert_close(layer(x.roll(1, 2)), layer(x).roll(1, 2), rtol=0, atol=1e-6)


def test_rope_has_the_turns_that_were_saved() -> None:
    saved = layer_on_a_ring(1.7).state_dict()
    layer = layer_on_a_ring(1.7)
    held = layer.rope.freqs  # type: ignore[union-attr]
    held.zero_()  # type: ignore[operator]
    layer.load_state_dict(saved)
    assert layer.rope.freqs is held  # type: ignore[union-attr]
    assert torch.equal(held, saved["rope.freqs"])  # type: ignore[arg-type]
