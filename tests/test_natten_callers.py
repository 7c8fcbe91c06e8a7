"""Programs written for NATTEN 0.20 and 0.21, with ``import natten_layers as natten`` on top.

The cases are those of NATTEN's own tests of ``na1d``, ``na2d``, ``na3d``, dense attention, packed sequences and
merging: problems drawn at random, gradients included. Expected values come from PyTorch's attention in fp64 under a
mask.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, assert_type

import pytest
import torch
from helpers import error, raises_naming
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import natten_layers as natten
from natten_layers.functional import (
    attention,
    merge_attentions,
    neighborhood_attention,
    neighborhood_attention_generic,
)
from natten_layers.geometry import make_window, window_mask
from natten_layers.natten.context import warn_no_effect
from natten_layers.utils.varlen import generate_varlen_parameters

Tensors = tuple[Tensor, ...]


def draw(*shapes: Sequence[int]) -> list[Tensor]:
    return [torch.randn(*shape).requires_grad_() for shape in shapes]


def reference(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of tokens ``[B, N, heads, head_dim]`` over all the keys together, in fp64."""
    q = query.double().transpose(1, 2)
    k, v = (
        torch.cat([t.double() for t in parts], 1).transpose(1, 2).repeat_interleave(q.shape[1] // parts[0].shape[2], 1)
        for parts in (keys, values)
    )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * q @ k.mT
    lse = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).logsumexp(-1)
    return scaled_dot_product_attention(q, k, v, mask, scale=factor).transpose(1, 2), lse.transpose(1, 2)


def assert_equal(actual: Tensors, expected: Tensors, inputs: Sequence[Tensor]) -> None:
    """Results, and the gradients of a random function of all of them."""
    weights = [torch.randn_like(t) for t in actual]
    grads = [
        torch.autograd.grad(results, inputs, [w.to(t) for w, t in zip(weights, results, strict=True)], True)
        for results in (actual, expected)
    ]
    for found, wanted in zip((*actual, *grads[0]), (*expected, *grads[1]), strict=True):
        assert error(found, wanted) <= 2e-6


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_neighborhood_attention(rank: int, seed: int) -> None:
    rng = random.Random(10 * rank + seed)
    torch.manual_seed(seed)
    kernel = tuple(rng.randint(2, 4) for _ in range(rank))
    dilation = tuple(rng.randint(1, 2) for _ in range(rank))
    stride = tuple(rng.randint(1, k) for k in kernel)
    causal = tuple(rng.random() < 0.4 for _ in range(rank))
    spatial = tuple(k * d + rng.randint(0, 3) for k, d in zip(kernel, dilation, strict=True))
    kv_heads, group, extra, head_dim, value_dim = rng.choice([(2, 1, 0, 8, 8), (1, 3, 2, 8, 16), (2, 2, 5, 16, 8)])
    heads = kv_heads * group
    inputs = draw(
        (2, *spatial, heads, head_dim),
        (2, *spatial, kv_heads, head_dim),
        (2, *spatial, kv_heads, value_dim),
        *[(2, extra, kv_heads, dim) for dim in (head_dim, value_dim) if extra],
    )
    query, key, value, *more = inputs
    mask = window_mask(spatial, make_window(spatial, kernel, stride, dilation, causal), query.device)
    mask = torch.cat([mask, mask.new_ones(len(mask), extra)], 1)
    expected = reference(
        query.flatten(1, rank), [key.flatten(1, rank), *more[:1]], [value.flatten(1, rank), *more[1:]], mask
    )
    for operation in (neighborhood_attention_generic, getattr(natten.functional, f"na{rank}d")):
        out, lse = operation(
            query,
            key,
            value,
            kernel_size=kernel,
            stride=stride,
            dilation=dilation,
            is_causal=causal,
            additional_keys=more[0] if extra else None,
            additional_values=more[1] if extra else None,
            backend="cutlass-fna",
            backward_use_pt_reduction=True,
            attention_kwargs={"backend": "cutlass-fmha"},
            return_lse=True,
        )
        assert_equal((out.flatten(1, rank), lse.flatten(1, rank)), expected, inputs)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 9), (9, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_over_other_numbers_of_keys(queries: int, keys: int, is_causal: bool) -> None:
    """A causal query ``i`` sees keys ``0 .. i``, as in PyTorch, which NATTEN's tests compare with."""
    torch.manual_seed(0)
    inputs = query, key, value = draw((2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 16))
    mask = torch.ones(queries, keys, dtype=torch.bool).tril() if is_causal else None
    actual = attention(query, key, value, is_causal, torch.tensor(0.3), backend="cutlass-fmha", return_lse=True)
    assert_equal(actual, reference(query, [key], [value], mask, 0.3), inputs)


@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5)])
def test_attention_over_other_numbers_of_keys_in_the_kernels(
    queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are more queries than keys, the tokens of the first key have stride 0."""
    fused = partial(neighborhood_attention, impl="fused")
    monkeypatch.setattr("natten_layers.natten.dense.neighborhood_attention", fused)
    torch.manual_seed(0)
    inputs = query, key, value = draw((1, queries, 2, 16), (1, keys, 1, 16), (1, keys, 1, 16))
    assert_equal(attention(query, key, value, return_lse=True), reference(query, [key], [value], None), inputs)


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(is_causal: bool) -> None:
    torch.manual_seed(0)
    q_lengths, kv_lengths = [3, 1, 0, 6, 2], [4, 5, 2, 3, 0]
    inputs = query, key, value = draw((1, sum(q_lengths), 2, 8), (1, sum(kv_lengths), 1, 8), (1, sum(kv_lengths), 1, 8))
    lengths = torch.tensor(q_lengths, dtype=torch.int32), torch.tensor(kv_lengths, dtype=torch.int32)
    q_ends, kv_ends, q_most, kv_most = generate_varlen_parameters(query, key, value, *lengths)
    assert q_ends is not None
    assert kv_ends is not None
    assert (q_ends.tolist(), kv_ends.tolist(), q_most, kv_most) == ([0, 3, 4, 4, 10, 12], [0, 4, 9, 11, 14, 14], 6, 5)
    parts = [
        reference(q, [k], [v], torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril() if is_causal else None)
        for q, k, v in zip(query.split(q_lengths, 1), key.split(kv_lengths, 1), value.split(kv_lengths, 1), strict=True)
    ]
    out, lse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    by_ends = attention(
        query,
        key,
        value,
        is_causal,
        cumulative_seqlen_Q=q_ends,
        cumulative_seqlen_KV=kv_ends,
        max_seqlen_Q=q_most,
        max_seqlen_KV=kv_most,
        return_lse=True,
    )
    by_lengths = attention(query, key, value, is_causal, seqlens_Q=lengths[0], seqlens_KV=lengths[1], return_lse=True)
    for actual in (by_ends, by_lengths):
        assert (actual[0][:, 10:] == 0).all()
        assert (actual[1][:, 10:] == -torch.inf).all()
        assert_equal((actual[0][:, :10], actual[1][:, :10]), (out[:, :10], lse[:, :10]), inputs)
    assert generate_varlen_parameters(query, key, value) == (None, None, 0, 0)


def test_packed_sequences_that_do_not_fit() -> None:
    query = torch.randn(1, 6, 1, 8)
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("cumulative_seqlen_KV", {"cumulative_seqlen_Q": ends}),
        ("cumulative_seqlen_Q", {"cumulative_seqlen_Q": ends[:2], "cumulative_seqlen_KV": ends}),
        ("cumulative_seqlen_KV", {"cumulative_seqlen_Q": ends, "cumulative_seqlen_KV": torch.tensor([0, 6])}),
        ("max_seqlen_Q", {"cumulative_seqlen_Q": ends, "cumulative_seqlen_KV": ends, "max_seqlen_Q": 3}),
        ("seqlens_KV", {"seqlens_Q": ends}),
        ("seqlens_KV", {"seqlens_Q": ends[1:] - ends[:1] - 1, "seqlens_KV": ends[1:]}),
        ("seqlens_Q must be a tensor, got [2, 4]", {"seqlens_Q": [2, 4], "seqlens_KV": [2, 4]}),
        ("seqlens_Q.int()", {"seqlens_Q": torch.tensor([2, 4]), "seqlens_KV": torch.tensor([2, 4])}),
        ("cumulative_seqlen_Q must be a tensor", {"cumulative_seqlen_Q": [0, 2, 6], "cumulative_seqlen_KV": ends}),
    )
    for name, arguments in cases:
        with raises_naming(name):
            attention(query, query, query, **arguments)
    with raises_naming("batch 1"):
        two = query.expand(2, -1, -1, -1)
        attention(two, two, two, cumulative_seqlen_Q=ends, cumulative_seqlen_KV=ends)
    with raises_naming("[B, tokens, heads, head_dim]"):
        natten.attention(query[0], query, query)


@pytest.mark.parametrize("lengths", [(4, 9), (3, 8, 1, 5)])
@pytest.mark.parametrize("use_autograd_fix", [True, False])
def test_merge_attentions(lengths: Sequence[int], use_autograd_fix: bool) -> None:
    torch.manual_seed(0)
    inputs = query, *pairs = draw((2, 6, 2, 8), *[(2, n, 2, 8) for n in lengths for _ in range(2)])
    keys, values = pairs[::2], pairs[1::2]
    before = [t.detach().clone() for t in inputs]
    outputs, lse_tensors = zip(
        *(attention(query, k, v, return_lse=True) for k, v in zip(keys, values, strict=True)), strict=True
    )
    actual = merge_attentions(outputs, lse_tensors, torch_compile=False, use_autograd_fix=use_autograd_fix)
    assert_equal(actual, reference(query, keys, values, None), inputs)
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))
    with raises_naming("merge_attentions", "1 and 1"):
        merge_attentions(outputs[:1], lse_tensors[:1])
    with raises_naming("outputs[1]"):
        merge_attentions([outputs[0], None], list(lse_tensors[:2]))  # pyright: ignore[reportArgumentType]


def test_merge_keeps_half_precision_and_fp64() -> None:
    out, lse = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2)
    for dtype, statistics in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        outputs, lse_tensors = [out.to(dtype), -out.to(dtype)], [lse.to(dtype), lse.to(dtype)]
        merged, total = merge_attentions(outputs, lse_tensors)
        assert (merged.dtype, total.dtype) == (dtype, statistics)
        assert (merged == 0).all()
        torch.testing.assert_close(total, lse_tensors[0].to(statistics) + torch.tensor(2.0, dtype=statistics).log())


def test_a_tensor_of_one_number_is_a_scale() -> None:
    query = torch.randn(1, 6, 2, 8)
    assert torch.equal(
        natten.na1d(query, query, query, 3, scale=torch.tensor(0.5)), natten.na1d(query, query, query, 3, scale=0.5)
    )
    positions = torch.arange(6)[None]
    assert torch.equal(
        natten.cached_attention(query, query, query, positions, positions, scale=torch.tensor(0.5)),
        natten.cached_attention(query, query, query, positions, positions, scale=0.5),
    )
    for scale in (torch.tensor([0.5, 0.5]), torch.tensor(0.5, requires_grad=True), torch.tensor(torch.nan)):
        with raises_naming("scale"):
            natten.na1d(query, query, query, 3, scale=scale)


def test_none_is_the_default() -> None:
    """NATTEN takes None for these, as wrappers that hand options on pass it."""
    query, tokens = torch.randn(1, 5, 6, 2, 8), torch.randn(1, 5, 6, 16)
    none: dict[str, Any] = {"stride": None, "dilation": None, "is_causal": None}
    assert torch.equal(natten.na2d(query, query, query, 3, **none), natten.na2d(query, query, query, 3))
    layer, other = natten.NeighborhoodAttention2D(16, 2, 3, **none), natten.NeighborhoodAttention2D(16, 2, 3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(tokens), other(tokens))


def test_type_checkers_know_what_comes_back() -> None:
    """The types are those that pyright, which runs over the tests, reads."""
    q = torch.randn(1, 4, 4, 2, 8)
    assert_type(natten.na2d(q, q, q, 3), Tensor)
    assert_type(natten.na2d(q, q, q, kernel_size=(3, 3), backend="flex-fna", torch_compile=True), Tensor)
    assert_type(natten.na2d(q, q, q, 3, return_lse=True), tuple[Tensor, Tensor])
    assert_type(natten.functional.na1d(q[0], q[0], q[0], 3), Tensor)
    assert_type(neighborhood_attention_generic(q, q, q, 3, return_lse=False), Tensor)
    assert_type(attention(q[0], q[0], q[0]), Tensor)
    assert_type(attention(q[0], q[0], q[0], return_lse=True), tuple[Tensor, Tensor])
    for result in (natten.na2d(q, q, q, 3), attention(q[0], q[0], q[0])):
        assert isinstance(result, Tensor)


def test_switches_are_kept_and_warn_once() -> None:
    warn_no_effect.cache_clear()
    assert not natten.are_deterministic_algorithms_enabled()
    assert natten.is_kv_parallelism_in_fused_na_enabled()
    assert natten.is_memory_usage_default()
    natten.use_deterministic_algorithms(True)  # which they are: no warning
    natten.disable_flex_compile()
    with pytest.warns(UserWarning, match="use_kv_parallelism_in_fused_na has no effect") as caught:
        natten.use_kv_parallelism_in_fused_na(False)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="set_memory_usage_preference has no effect"):
        natten.set_memory_usage_preference("strict")
    with pytest.warns(UserWarning, match="allow_flex_compile has no effect"):
        natten.allow_flex_compile(True, backprop=True)
    assert natten.are_deterministic_algorithms_enabled()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    assert natten.is_memory_usage_strict()
    assert natten.get_memory_usage_preference() is natten.context.MemoryUsagePreference.Strict
    assert natten.is_flex_compile_allowed()
    assert natten.is_flex_compile_backprop_allowed()
    with raises_naming("pref", "'lavish'"):
        natten.set_memory_usage_preference("lavish")
    with warnings.catch_warnings():  # warnings are errors: none comes again
        natten.use_deterministic_algorithms(False)
        natten.use_kv_parallelism_in_fused_na()
        natten.set_memory_usage_preference("unrestricted")
        assert natten.is_memory_usage_unrestricted()
        natten.set_memory_usage_preference()
        natten.disable_flex_compile_backprop()
        assert natten.is_flex_compile_allowed()
        assert not natten.is_flex_compile_backprop_allowed()
        natten.allow_flex_compile_backprop()
        assert natten.is_flex_compile_backprop_allowed()
        natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed()


@pytest.mark.parametrize("wrong", ["false", None, 1])
def test_switches_take_bools_alone(wrong: Any) -> None:
    for switch in (
        natten.use_deterministic_algorithms,
        natten.use_kv_parallelism_in_fused_na,
        natten.allow_flex_compile,
        natten.allow_flex_compile_backprop,
    ):
        with raises_naming("mode must be True or False", repr(wrong)):
            switch(wrong)
    with raises_naming("backprop must be True or False", repr(wrong)):
        natten.allow_flex_compile(backprop=wrong)
    assert not natten.are_deterministic_algorithms_enabled()
    assert natten.is_kv_parallelism_in_fused_na_enabled()
    assert not natten.is_flex_compile_allowed()
    assert not natten.is_flex_compile_backprop_allowed()


def test_modules_have_natten_s_attributes() -> None:
    for rank in (1, 2, 3):
        layer = getattr(natten, f"NeighborhoodAttention{rank}D")(32, 2, kernel_size=3)
        assert (layer.na_dim, layer.expected_input_tensor_rank, layer.embed_dim, layer.num_heads) == (
            rank,
            rank + 2,
            32,
            2,
        )
        assert (layer.head_dim, layer.scale, layer.kernel_size) == (16, 0.25, (3,) * rank)
        assert (layer.stride, layer.dilation, layer.is_causal) == ((1,) * rank, (1,) * rank, (False,) * rank)


def test_every_public_name_of_natten_is_here() -> None:
    """With its arguments, in its order. The lists of tiles are empty, and say so once."""
    peer = pytest.importorskip("natten")
    peer_functional, peer_varlen = (pytest.importorskip(f"natten.{name}") for name in ("functional", "utils.varlen"))
    assert natten.HAS_LIBNATTEN
    functions: list[tuple[Any, Any]] = [(getattr(peer, name), getattr(natten, name)) for name in peer.__all__]
    functions += [
        (getattr(peer_functional, name), getattr(natten.functional, name))
        for name in ("attention", "merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention_generic")
    ]
    functions.append((peer_varlen.generate_varlen_parameters, generate_varlen_parameters))
    for theirs, ours in functions:
        if callable(theirs) and not ours.__name__.startswith("get_"):
            names = list(inspect.signature(theirs).parameters)
            assert list(inspect.signature(ours).parameters)[: len(names)] == names
    query = torch.randn(1, 4, 2, 8)
    for name in peer.__all__:
        if "_configs_" in name:
            warn_no_effect.cache_clear()
            with pytest.warns(UserWarning, match=f"{name} has no effect"):
                assert getattr(natten, name)(query, query, query) == []
