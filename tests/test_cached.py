"""Cached attention against a per-query definition in fp64, and against the causal neighborhood op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import raises_naming
from torch import Tensor

from natten_layers import cached
from natten_layers.cached import cached_attention
from natten_layers.operations import neighborhood_attention


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def definition(q, k, v, qp, kp, window, scale, registers, sink, softcap=None):
    """One softmax per query over the keys that it may see, in plain loops."""
    out, lse = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                p = int(qp[b % len(qp), i])
                seen = [
                    j
                    for j, n in enumerate(kp[b % len(kp)].tolist())
                    if 0 <= n <= p and (window is None or p - n < window)
                ]
                keys, values = k[b, seen, g], v[b, seen, g]
                if registers is not None:
                    keys, values = torch.cat((keys, registers[0][b, :, g])), torch.cat((values, registers[1][b, :, g]))
                logits = keys @ q[b, i, h] * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sink is not None:
                    logits = torch.cat((logits, sink[h : h + 1]))
                    values = torch.cat((values, values.new_zeros(1, values.shape[1])))
                if len(logits):
                    out[b, i, h] = logits.softmax(0) @ values
                    lse[b, i, h] = logits.logsumexp(0)
    return out, lse


QUERY_POSITIONS = torch.tensor([[5, 6, 7], [-1, 2, 3]])
KEY_POSITIONS = torch.tensor([[4, 5, 6, 7, 0, 1, 2, 3, -1], [-1, -1, 0, 1, 2, 3, 9, -1, -1]])  # rolled; padded, stale


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("with_registers", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.9])
def test_matches_the_definition(
    window: int | None, with_registers: bool, with_sink: bool, softcap: float | None
) -> None:
    q, k, v = randn(2, 3, 4, 6), randn(2, 9, 2, 6), randn(2, 9, 2, 5)
    registers = (randn(2, 2, 2, 6, seed=1), randn(2, 2, 2, 5, seed=2)) if with_registers else None
    sink = torch.tensor([3.0, -1.0, 0.0, 5.0], dtype=torch.float64) if with_sink else None
    expected = definition(q, k, v, QUERY_POSITIONS, KEY_POSITIONS, window, 0.7, registers, sink, softcap)
    got = cached_attention(
        q,
        k,
        v,
        QUERY_POSITIONS,
        KEY_POSITIONS,
        window=window,
        scale=0.7,
        additional_keys=registers and registers[0],
        additional_values=registers and registers[1],
        sink=sink,
        softcap=softcap,
        return_lse=True,
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_kernels_have_no_softcap() -> None:
    q, k = randn(1, 1, 2, 8).float(), randn(1, 3, 2, 8).float()
    positions = torch.tensor([[2]]), torch.arange(3)[None]
    with pytest.raises(RuntimeError, match="the kernels have no softcap"):
        cached_attention(q, k, k, *positions, softcap=5.0, impl="fused")
    for softcap in (True, "5", 0, float("nan")):
        with pytest.raises(ValueError, match=f"softcap must be None or a positive number, got {softcap!r}"):
            cached_attention(q, k, k, *positions, softcap=softcap)  # pyright: ignore
    with pytest.raises(ValueError, match=r"softcap must be None or a positive number, got 0\.0"):
        cached_attention(q, k, k, *positions, softcap=0.0)


@pytest.mark.parametrize("window", [1, 4, 11])
def test_equals_causal_neighborhood_attention(window: int) -> None:
    q, k, v = randn(2, 11, 4, 8), randn(2, 11, 2, 8, seed=1), randn(2, 11, 2, 8, seed=2)
    positions = torch.arange(11)[None]
    got = cached_attention(q, k, v, positions, positions, window=window, sink=0.0)
    torch.testing.assert_close(
        got, neighborhood_attention(q, k, v, window, is_causal=True, sink=0.0, impl="eager"), rtol=1e-12, atol=1e-12
    )


def test_order_of_slots_does_not_matter() -> None:
    q, k, v = randn(1, 2, 2, 4), randn(1, 6, 1, 4), randn(1, 6, 1, 4, seed=1)
    positions, order = torch.arange(6)[None], torch.tensor([3, 5, 0, 1, 4, 2])
    new = torch.tensor([[4, 5]])
    expected = cached_attention(q, k, v, new, positions, window=3)
    got = cached_attention(q, k[:, order], v[:, order], new, positions[:, order], window=3)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_padding_queries_get_nothing() -> None:
    q, k, v = randn(1, 2, 2, 4, grad=True), randn(1, 3, 1, 4, grad=True), randn(1, 3, 1, 4, seed=1, grad=True)
    out, lse = cached_attention(q, k, v, torch.tensor([[-1, 2]]), torch.tensor([[0, 1, 2]]), return_lse=True)
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0] == -math.inf).all()
    (out.sum() + lse[:, 1].sum()).backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert q.grad is not None
    assert (q.grad[:, 0] == 0).all()


def test_registers_and_sink_reach_padding() -> None:
    q, k, v = randn(1, 1, 2, 4), randn(1, 3, 1, 4), randn(1, 3, 1, 4, seed=1)
    nowhere, keys = torch.tensor([[-1]]), torch.tensor([[0, 1, 2]])
    rk, rv = randn(1, 1, 1, 4, seed=3), randn(1, 1, 1, 4, seed=4)
    out = cached_attention(q, k, v, nowhere, keys, additional_keys=rk, additional_values=rv)
    torch.testing.assert_close(out, rv.expand(1, 1, 2, 4), rtol=1e-13, atol=1e-13)
    out, lse = cached_attention(q, k, v, nowhere, keys, sink=2.5, return_lse=True)
    assert (out == 0).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 2.5))


@pytest.mark.parametrize("chunked", [False, True])
def test_gradients(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        monkeypatch.setattr(cached, "CHUNK_SCORES", 1)
    q, k, v = randn(2, 3, 2, 3, grad=True), randn(2, 4, 1, 3, grad=True), randn(2, 4, 1, 2, grad=True)
    rk, rv = randn(2, 1, 1, 3, seed=5, grad=True), randn(2, 1, 1, 2, seed=6, grad=True)
    sink = torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True)
    qp, kp = torch.tensor([[2, 3, -1], [0, 1, 2]]), torch.tensor([[3, 0, 1, 2], [0, 1, -1, -1]])

    def f(q, k, v, rk, rv, sink):
        return cached_attention(
            q, k, v, qp, kp, window=2, additional_keys=rk, additional_values=rv, sink=sink, return_lse=True
        )

    assert torch.autograd.gradcheck(f, (q, k, v, rk, rv, sink))


def test_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = randn(2, 9, 4, 4), randn(2, 20, 2, 4), randn(2, 20, 2, 4, seed=1)
    qp, kp = torch.arange(11, 20)[None], torch.arange(20)[None]
    whole = cached_attention(q, k, v, qp, kp, window=6, return_lse=True)
    monkeypatch.setattr(cached, "CHUNK_SCORES", 4 * 2 * 20 * 2)
    torch.testing.assert_close(cached_attention(q, k, v, qp, kp, window=6, return_lse=True), whole)


@pytest.mark.parametrize("tensor", ["key", "value"])
def test_unseen_nan_changes_nothing(tensor: str) -> None:
    tensors = {"key": randn(1, 5, 1, 4), "value": randn(1, 5, 1, 4, seed=1)}
    q, qp, kp = randn(1, 2, 2, 4), torch.tensor([[2, 4]]), torch.tensor([[0, 1, 2, 3, -1]])
    tensors[tensor][:, 0] = math.nan
    tensors[tensor][:, 4] = math.nan
    out = cached_attention(q, tensors["key"], tensors["value"], qp, kp, window=3)
    assert out[:, 0].isnan().all()  # sees 0, 1, 2
    assert out[:, 1].isfinite().all()  # sees 3 and the empty slot


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_its_inputs_and_its_output(dtype: torch.dtype) -> None:
    q, k, v = (randn(2, n, h, 16, seed=n).to(dtype) for n, h in ((3, 4), (40, 2), (40, 2)))
    qp, kp = torch.arange(37, 40)[None], torch.arange(40)[None]
    out, lse = cached_attention(q, k, v, qp, kp, return_lse=True)
    exact = cached_attention(q.double(), k.double(), v.double(), qp, kp)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be None or an int of at least 1, got 0"),
        ({"window": 2.0}, "window must be"),
        ({"scale": math.inf}, "scale must be a finite number"),
        ({"query": torch.zeros(2, 3, 3, 4)}, "query has 3, key and value 2"),
        ({"query": torch.zeros(1, 3, 4, 4)}, "do not fit"),
        ({"query": torch.zeros(2, 0, 4, 4)}, "none but B 0"),
        ({"key": torch.zeros(2, 5, 2, 4, dtype=torch.float16)}, "key has dtype torch.float16"),
        ({"value": torch.zeros(2, 4, 2, 4)}, "do not fit"),
        ({"query_positions": torch.zeros(2, 4, dtype=torch.int64)}, r"query_positions has shape \(2, 4\)"),
        ({"key_positions": torch.zeros(2, 5)}, "key_positions has dtype torch.float32"),
        ({"additional_keys": torch.zeros(1, 1, 2, 4)}, "additional_values is None"),
        ({"sink": torch.zeros(2)}, "sink has shape"),
        ({"impl": "fast"}, "impl must be"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments: dict = {
        "query": torch.zeros(2, 3, 4, 4),
        "key": torch.zeros(2, 5, 2, 4),
        "value": torch.zeros(2, 5, 2, 4),
        "query_positions": torch.zeros(1, 3, dtype=torch.int64),
        "key_positions": torch.zeros(2, 5, dtype=torch.int32),
    }
    cached_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        cached_attention(**{**arguments, **change})


def test_fused_never_falls_back() -> None:
    q, p = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="fused"):
        cached_attention(q, q, q, p, p, impl="fused")


@pytest.mark.parametrize(("dtype", "window"), [("uint8", 5), ("int8", 200), ("int32", 2**32), ("int64", 2**70)])
def test_positions_of_any_integer_dtype_mean_the_same(dtype: str, window: int) -> None:
    q, positions = torch.randn(1, 64, 1, 8), torch.arange(64)[None]
    narrow = positions.to(getattr(torch, dtype))
    expected = cached_attention(q, q, q, positions, positions, window=min(window, 1000))
    torch.testing.assert_close(cached_attention(q, q, q, narrow, narrow, window=window), expected)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"key": None}, ("key", "None")),
        ({"query_positions": [[0]]}, ("query_positions", "list")),
        ({"scale": True}, ("scale", "True")),
        ({"scale": torch.tensor(0.5, requires_grad=True)}, ("scale", "multiply a learned scale into the query")),
        ({"scale": 10**400}, ("scale", "finite")),
        ({"window": True}, ("window", "True")),
    ],
)
def test_arguments_of_other_types_are_errors(change: dict[str, Any], names: tuple[str, ...]) -> None:
    q, positions = torch.randn(1, 4, 1, 8), torch.arange(4)[None]
    arguments: dict[str, Any] = {
        "query": q,
        "key": q,
        "value": q,
        "query_positions": positions,
        "key_positions": positions,
    }
    with raises_naming(*names):
        cached_attention(**{**arguments, **change})


@pytest.mark.parametrize("impl", ["eager", "fused"])
def test_results_are_contiguous_and_empty_for_an_empty_batch(impl: Any) -> None:
    if impl == "fused":
        pytest.importorskip("triton")
    positions = torch.arange(9)[None]
    for batch in (0, 2):
        q, kv = torch.randn(batch, 3, 4, 8), torch.randn(batch, 9, 2, 8)
        out, lse = cached_attention(q, kv, kv, positions[:, 6:], positions, return_lse=True, impl=impl)
        assert (out.shape, lse.shape) == ((batch, 3, 4, 8), (batch, 3, 4))
        assert out.is_contiguous()
        assert lse.is_contiguous()


def test_an_empty_batch_gives_gradients_of_zero() -> None:
    positions, sink = torch.arange(9)[None], randn(4, grad=True)
    q, kv = randn(0, 3, 4, 8, grad=True), randn(0, 9, 2, 8, grad=True)
    out, lse = cached_attention(q, kv, kv, positions[:, 6:], positions, sink=sink, return_lse=True)
    for grad, x in zip(torch.autograd.grad((out.sum(), lse.sum()), (q, kv, sink)), (q, kv, sink), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_an_empty_entry_holds_reaches_no_gradient(bad: float) -> None:
    query, key, value = randn(1, 2, 2, 8, grad=True), randn(1, 4, 2, 8), randn(1, 4, 2, 8)
    key[0, 3], value[0, 3] = bad, bad
    positions = torch.tensor([[1, 2]]), torch.tensor([[0, 1, 2, -1]])
    found = cached_attention(query, key, value, *positions)
    expected = cached_attention(query, key[:, :3], value[:, :3], positions[0], positions[1][:, :3])
    for one, other in zip(
        (found, *torch.autograd.grad(found.sum(), query)), (expected, *torch.autograd.grad(expected.sum(), query)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)
