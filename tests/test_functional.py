"""The public operations: arguments, stride-0 forms, sinks, registers, merging, errors and the dispatch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Case, make_inputs, oracle, raises_naming, run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from natten_layers import (
    NeighborhoodGQA,
    attention_state,
    cached_attention,
    eager,
    explain,
    merge_attention,
    neighborhood_attention,
    neighborhood_attention_varlen,
)
from natten_layers.functional import attention, na1d
from natten_layers.kernels.ops import attention as attention_ops
from natten_layers.operations import Impl

FP64 = torch.float64


def qkv(spatial: tuple[int, ...] = (8, 9), heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, *spatial, h, 8, generator=generator, dtype=FP64) for h in (heads, kv_heads, kv_heads)
    )
    return query, key, value


def attend(*tensors: Tensor, **arguments: Any) -> Any:
    query, key, value = tensors
    options: Any = {"kernel_size": 3} | arguments
    return neighborhood_attention(query, key, value, impl="eager", **options)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


# ---- Heads ----------------------------------------------------------------------------------------------------------


def test_query_head_h_reads_kv_head_h_div_group():
    query, key, value = qkv(heads=6, kv_heads=2)
    out = attend(query, key, value)
    for head in range(6):
        q, k, v = query[..., [head], :], key[..., [head // 3], :], value[..., [head // 3], :]
        close(out[..., [head], :], attend(q, k, v))


def test_three_stride_0_forms_are_equal():
    query, key, value = qkv(heads=4, kv_heads=1)
    expected = attend(query, key, value)
    expanded = (t.expand(-1, -1, -1, 4, -1) for t in (key, value))
    close(attend(query, *expanded), expected)
    grouped = (t[..., None, :].expand(-1, -1, -1, 1, 4, -1) for t in (key, value))
    out = attend(query.unflatten(-2, (1, 4)), *grouped, kernel_size=(3, 3))
    assert out.shape == (2, 8, 9, 1, 4, 8)
    close(out.flatten(-3, -2), expected)
    repeated = (t.repeat(1, 1, 1, 4, 1) for t in (key, value))
    close(attend(query, *repeated), expected)


def test_group_axis_form_with_several_kv_heads_and_lse():
    query, key, value = qkv(heads=4, kv_heads=2)
    expected, expected_lse = attend(query, key, value, return_lse=True)
    k, v = (t[..., None, :].expand(-1, -1, -1, 2, 2, -1) for t in (key, value))
    out, lse = attend(query.unflatten(-2, (2, 2)), k, v, kernel_size=(3, 3), return_lse=True)
    close(out.flatten(-3, -2), expected)
    close(lse.flatten(-2), expected_lse)
    dense = attend(query.unflatten(-2, (2, 2)), k.contiguous(), v.contiguous(), kernel_size=(3, 3))
    close(dense.flatten(-3, -2), expected)


def test_group_axis_form_takes_registers_whatever_the_strides():
    query, key, value = qkv((9,), heads=6)
    registers = qkv((3,))[1:]
    expected = attend(query, key, value, additional_keys=registers[0], additional_values=registers[1])
    one = [t[..., None, :] for t in (key, value)]
    expanded = [t.expand(-1, -1, -1, 3, -1) for t in one]
    repeated = [t.contiguous() for t in expanded]
    per_query_head = [t.repeat_interleave(3, -2) for t in registers]
    for k, v in (one, expanded, repeated, (one[0], repeated[1]), (repeated[0], expanded[1])):
        for rk, rv in (registers, per_query_head):
            out = attend(query.unflatten(2, (2, 3)), k, v, kernel_size=(3,), additional_keys=rk, additional_values=rv)
            close(out.flatten(2, 3), expected)


def test_expanded_kv_is_not_copied_per_head(monkeypatch: pytest.MonkeyPatch):
    query, key, value = qkv(heads=4, kv_heads=1)
    seen = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments[1].shape[-2], arguments[2].shape[-2]))
        return original(*arguments, **options)

    original = eager.attention_state
    monkeypatch.setattr(eager, "attention_state", spy)
    attend(query, *(t.expand(-1, -1, -1, 4, -1) for t in (key, value)))
    grouped = (t[..., None, :].expand(-1, -1, -1, 1, 4, -1) for t in (key, value))
    attend(query.unflatten(-2, (1, 4)), *grouped, kernel_size=(3, 3))
    query, key, value = (t.float() for t in (query, key, value))
    with torch.autocast("cpu", torch.bfloat16):
        attend(query, *(t.expand(-1, -1, -1, 4, -1) for t in (key, value)))
        leaf = key.clone().requires_grad_()
        out = attend(query, *(leaf.expand(-1, -1, -1, 4, -1),) * 2)
    assert seen == [(1, 1)] * 3 + [(4, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        copied = attend(query, *(leaf.repeat(1, 1, 1, 4, 1),) * 2)
    close(*(torch.autograd.grad(x.float().square().sum(), leaf)[0] for x in (out, copied)))


def test_registers_beside_expanded_kv_may_differ_from_head_to_head():
    query, key, value = qkv(heads=2, kv_heads=1)
    registers = [torch.randn(2, 3, 2, 8, dtype=FP64) for _ in range(2)]
    named = dict(zip(("additional_keys", "additional_values"), registers, strict=True))
    out = attend(query, *(t.expand(-1, -1, -1, 2, -1) for t in (key, value)), **named)
    close(out, attend(query, *(t.repeat(1, 1, 1, 2, 1) for t in (key, value)), **named))


# ---- Scale ----------------------------------------------------------------------------------------------------------


def test_scale_zero_is_a_value_and_averages_the_window():
    query, key, value = qkv((9,), heads=2)
    padded = torch.cat([value[:, :1], value, value[:, -1:]], 1)
    out = attend(query, key, value, scale=0.0)
    inner = (padded[:, 1:8] + padded[:, 2:9] + padded[:, 3:10]) / 3
    close(out[:, 1:-1], inner)
    assert not torch.allclose(out, attend(query, key, value))


def test_default_scale_is_the_root_of_head_dim():
    tensors = qkv()
    close(attend(*tensors), attend(*tensors, scale=8**-0.5))
    assert not torch.allclose(attend(*tensors), attend(*tensors, scale=8**-0.4))


# ---- Sink -----------------------------------------------------------------------------------------------------------


def test_sink_identity_holds_and_its_effect_is_far_above_the_tolerance():
    query, key, value = qkv()
    plain, lse = attend(query, key, value, return_lse=True)
    sink = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=FP64)
    out, lse_with = attend(query, key, value, sink=sink, return_lse=True)
    close(out, plain * torch.sigmoid(lse - sink)[..., None])
    close(lse_with, torch.logaddexp(lse, sink.expand_as(lse)))
    for head in range(4):  # leaving out a sink would exceed rtol 1e-12 by far
        assert ((out - plain)[..., head, :].norm() / plain[..., head, :].norm()) > 0.01
    assert ((lse_with - lse) > 1e-3).all()


def test_zero_attention_is_softmax_with_one_more_in_the_denominator():
    query, key, value = qkv((5,), heads=1, kv_heads=1)
    out = attend(query, key, value, kernel_size=1, sink=0.0)
    weight = torch.exp((query * key).sum(-1, keepdim=True) * 8**-0.5)
    close(out, value * weight / (1 + weight))


def test_float_sink_equals_tensor_sink_and_minus_infinity_is_none():
    tensors = qkv()
    close(attend(*tensors, sink=1.5), attend(*tensors, sink=torch.full((4,), 1.5)))
    close(attend(*tensors, sink=-math.inf), attend(*tensors))
    close(attend(*tensors, sink=torch.full((4,), -math.inf)), attend(*tensors))


def test_sink_is_not_multiplied_by_scale():
    query, key, value = qkv()
    plain, lse = attend(query, key, value, scale=0.0, return_lse=True)
    close(lse, torch.full_like(lse, math.log(9)))
    close(attend(query, key, value, scale=0.0, sink=2.0), plain * 9 / (9 + math.exp(2.0)))


# ---- Registers ------------------------------------------------------------------------------------------------------


def test_every_query_sees_registers_whatever_its_window():
    query, key, value = qkv((10,), heads=2, kv_heads=1)
    k, v = torch.randn(2, 1, 1, 8, dtype=FP64), torch.zeros(2, 1, 1, 8, dtype=FP64)
    v[..., 0] = 1e6
    out = attend(query, key, value, is_causal=True, additional_keys=k, additional_values=v)
    assert (out[..., 0] > 100).all()


def test_registers_broadcast_over_the_batch():
    tensors = qkv()
    registers = {name: torch.randn(1, 3, 2, 8, dtype=FP64) for name in ("additional_keys", "additional_values")}
    expanded = {name: t.expand(2, -1, -1, -1).clone() for name, t in registers.items()}
    close(attend(*tensors, **registers), attend(*tensors, **expanded))


def test_no_registers_are_like_none():
    tensors = qkv()
    empty = {name: torch.zeros(2, 0, 2, 8, dtype=FP64) for name in ("additional_keys", "additional_values")}
    close(attend(*tensors, **empty), attend(*tensors))


# ---- Causal axes, and arguments in general --------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_causal_axis_hides_later_keys_and_the_other_does_not(axis: int):
    query, key, value = qkv()
    is_causal = (axis == 0, axis == 1)
    out = attend(query, key, value, is_causal=is_causal)
    moved = value.clone()
    moved[:, 4, 4] += 1.0
    changed = (attend(query, key, moved, is_causal=is_causal) != out).any(-1).any(-1).any(0)
    expected = torch.zeros(8, 9, dtype=torch.bool)
    expected[(slice(4, 7), slice(3, 6)) if axis == 0 else (slice(3, 6), slice(4, 7))] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", (9, 10), (3, 4), heads=4, kv_heads=2, dtype=FP64),
        Case("causal", (9, 10), (3, 4), is_causal=(True, False), heads=4, kv_heads=2, dtype=FP64),
        Case("stride", (9, 10), (3, 4), (2, 3), heads=4, kv_heads=2, dtype=FP64),
        Case("dilation", (9, 10), (3, 4), 1, (2, 2), heads=4, kv_heads=2, dtype=FP64),
        Case("registers", (9, 10), (3, 4), registers=2, heads=4, kv_heads=2, dtype=FP64),
        Case("sink", (9, 10), (3, 4), sink="learned", heads=4, kv_heads=2, dtype=FP64),
        Case("scale", (9, 10), (3, 4), scale=0.9, heads=4, kv_heads=2, dtype=FP64),
    ],
    ids=str,
)
def test_each_argument_changes_the_result_as_the_oracle_says(case: Case):
    inputs = make_inputs(case)
    actual = run(case, inputs, "eager")
    close(actual.out, oracle(case, inputs).out)
    if case.name != "plain":
        base = {name: inputs[name] for name in ("query", "key", "value")}
        plain = oracle(Case("plain", (9, 10), (3, 4), heads=4, kv_heads=2, dtype=FP64), base).out
        assert (actual.out - plain).norm() / plain.norm() > 0.05


def test_results_are_in_the_query_dtype_and_statistics_in_fp32():
    for dtype, statistics in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        tensors = [t.to(dtype) for t in qkv()]
        out, lse = attend(*tensors, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, statistics)
        assert out.shape == (2, 8, 9, 4, 8)
        assert lse.shape == (2, 8, 9, 4)


# ---- Merging --------------------------------------------------------------------------------------------------------


def test_merge_of_split_keys_equals_the_whole():
    query, key, value = qkv(heads=4, kv_heads=2)
    k, v = torch.randn(2, 5, 2, 8, dtype=FP64), torch.randn(2, 5, 2, 8, dtype=FP64)
    whole = attention_state(query, key, value, 3, additional_keys=k, additional_values=v, sink=0.7, impl="eager")
    # Every window holds at least the token itself, so attention to registers alone is not possible: split them instead.
    window = attention_state(query, key, value, 3, sink=0.7, impl="eager")
    scores = torch.einsum("bxyhd,brhd->bxyhr", query, k.repeat_interleave(2, 2)) * 8**-0.5
    parts = []
    for some in (slice(0, 2), slice(2, 5)):
        row_max = scores[..., some].amax(-1)
        weights = torch.exp(scores[..., some] - row_max[..., None])
        row_sum = weights.sum(-1)
        out = torch.einsum("bxyhr,brhd->bxyhd", weights, v[:, some].repeat_interleave(2, 2)) / row_sum[..., None]
        parts.append((out, row_max, row_sum))
    for merged in (merge_attention(window, *parts), merge_attention(parts[0], merge_attention(parts[1], window))):
        close(merged.out, whole.out)
        close(merged.lse, whole.lse)
    close(merge_attention(whole).out, whole.out)
    assert not torch.allclose(merge_attention(window, parts[0]).out, whole.out, rtol=1e-3)


def test_merge_does_not_depend_on_the_reference_point():
    tensors = qkv()
    a, b = (attention_state(*tensors, k, impl="eager") for k in (3, 1))
    shifted = (a.out, a.row_max + 3.0, a.row_sum * math.exp(-3.0))
    merged, expected = merge_attention(shifted, b), merge_attention(a, b)
    close(merged.out, expected.out)
    close(merged.lse, expected.lse)


def test_merge_of_far_apart_states_is_stable():
    out = torch.ones(1, 2, 1, 4)
    far = [(out * i, torch.full((1, 2, 1), m), torch.ones(1, 2, 1)) for i, m in ((1, -1e4), (2, 1e4))]
    merged = merge_attention(*far)
    assert torch.equal(merged.out, out * 2)
    assert torch.equal(merged.lse, torch.full((1, 2, 1), 1e4))


def test_tensors_without_an_axis_of_heads_are_an_error_where_their_rank_tells():
    image, sequence = torch.randn(1, 6, 7, 16), torch.randn(1, 6, 16)
    way_out = "query.unflatten(-1, (heads, head_dim))"
    with raises_naming("query has 4 axes (1, 6, 7, 16)", "kernel_size has 2 entries", way_out):
        neighborhood_attention(image, image, image, (3, 3))
    with raises_naming("query has 3 axes (1, 6, 16)", way_out):
        neighborhood_attention(sequence, sequence, sequence, 3)
    assert neighborhood_attention(image, image, image, 3).shape == (1, 6, 7, 16)  # six tokens with seven heads


def test_merge_errors():
    state = attention_state(*qkv(), 3, impl="eager")
    other = attention_state(*qkv((8, 8)), 3, impl="eager")
    with raises_naming("at least one state"):
        merge_attention()
    with raises_naming("state 1", "(2, 8, 8, 4, 8)", "(2, 8, 9, 4, 8)"):
        merge_attention(state, other)
    with raises_naming("state 0", "row_sum (2, 8, 9, 4, 1)"):
        merge_attention((state.out, state.row_max, state.row_sum[..., None]))
    with raises_naming("state 1", "three tensors", "Tensor"):
        merge_attention(state, state.out)  # pyright: ignore[reportArgumentType]
    with raises_naming("state 1", "meta", "cpu"):
        merge_attention(state, (state.out.to("meta"), state.row_max, state.row_sum))


# ---- Bad input ------------------------------------------------------------------------------------------------------

Q, KV = (2, 8, 9, 4, 8), (2, 8, 9, 2, 8)


def blank() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(Q), torch.zeros(KV), torch.zeros(KV)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ((Q, KV[1:], KV), ["key", "(8, 9, 2, 8)", "query", "rank"]),
        ((Q, KV, (3, *KV[1:])), ["value", "(3, 8, 9, 2, 8)", "batch"]),
        ((Q, (2, 8, 10, 2, 8), KV), ["value", "key (2, 8, 10, 2, 8)", "width axis (9 and 10)"]),
        ((Q, (2, 8, 9, 3, 8), (2, 8, 9, 3, 8)), ["multiple", "query has 4", "key 3"]),
        ((Q, KV, (2, 8, 9, 4, 8)), ["key 2", "value 4"]),
        ((Q, (2, 8, 9, 2, 7), KV), ["key head_dim 7", "8"]),
        (((2, 0, *Q[2:]), (2, 0, *KV[2:]), (2, 0, *KV[2:])), ["query", "empty", "axis 1"]),
        ((Q, KV, (2, 8, 9, 2, 0)), ["value", "empty", "axis 4"]),
        (((2, 8, 9), (2, 8, 9), (2, 8, 9)), ["query", "3 axes", "(2, 8, 9)"]),
        (((1,) * 8, (1,) * 8, (1,) * 8), ["query", "8 axes", "1 to 3"]),
    ],
)
def test_bad_shapes(shapes: tuple[tuple[int, ...], ...], words: list[str]):
    with raises_naming(*words):
        attend(*map(torch.zeros, shapes))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel_size": 10}, ["kernel_size", "10", "height", "length 8"]),
        ({"kernel_size": (3, 5), "dilation": (1, 2)}, ["kernel_size * dilation", "5 * 2", "width", "length 9"]),
        ({"stride": (1, 4)}, ["stride", "1..3", "4", "width"]),
        ({"stride": 0}, ["stride", "0", "height"]),
        ({"kernel_size": 0}, ["kernel_size", "0", "height"]),
        ({"kernel_size": (3, -3)}, ["kernel_size", "-3", "width"]),
        ({"kernel_size": 3.0}, ["kernel_size", "3.0", "float"]),
        ({"dilation": (1, 2.0)}, ["dilation", "2.0", "float", "width"]),
        ({"dilation": -1}, ["dilation", "-1", "height"]),
        ({"is_causal": 1}, ["is_causal", "1", "int"]),
        ({"kernel_size": (3, 3, 3)}, ["query", "5 axes", "kernel_size has 3 entries"]),
        ({"kernel_size": ()}, ["query", "5 axes", "kernel_size has 0 entries"]),
        ({"kernel_size": None}, ["kernel_size", "None"]),
        ({"kernel_size": (3, 3), "stride": (1, 1, 1)}, ["disagree", "'kernel_size': 2", "'stride': 3"]),
        ({"scale": math.nan}, ["scale", "nan"]),
        ({"scale": 1e39}, ["scale", "1e+39"]),
        ({"scale": True}, ["scale", "True"]),
        ({"scale": torch.tensor([0.3, 0.2])}, ["scale", "Tensor (2,) of dtype torch.float32", "query"]),
        ({"scale": "0.3"}, ["scale", "'0.3'"]),
        ({"kernel_size": np.array([3, 3])}, ["kernel_size", "ndarray", "pass kernel_size.tolist()"]),
        ({"kernel_size": torch.tensor(3)}, ["kernel_size", "Tensor", "pass kernel_size.tolist()"]),
        ({"kernel_size": "33"}, ["kernel_size", "'33' of type str"]),
        ({"kernel_size": b"33"}, ["kernel_size", "b'33' of type bytes"]),
        ({"stride": iter((1, 1))}, ["stride", "tuple_iterator"]),
        ({"is_causal": np.array([True, False])}, ["is_causal", "ndarray", "pass is_causal.tolist()"]),
        ({"is_causal": np.int64(1)}, ["is_causal", "int64"]),
        ({"kernel_size": np.True_}, ["kernel_size", "np.True_"]),
        ({"scale": torch.tensor(0.3, requires_grad=True)}, ["scale", "tensor(0.3", "query"]),
        ({"impl": "flash"}, ["impl", "flash", "auto"]),
        ({"sink": math.nan}, ["sink", "nan"]),
        ({"sink": math.inf}, ["sink", "inf"]),
        ({"sink": -1e39}, ["sink", "-1e+39"]),
        ({"sink": True}, ["sink", "True"]),
        ({"sink": np.zeros(4)}, ["sink", "got ndarray (4,) of dtype float64", "[4]"]),
        ({"sink": "zero"}, ["sink", "zero", "[4]"]),
        ({"sink": torch.zeros(2)}, ["sink", "(2,)", "[4]"]),
        ({"sink": torch.zeros(4, dtype=torch.int64)}, ["sink", "int64"]),
        ({"sink": torch.zeros(4, device="meta")}, ["sink", "meta", "cpu"]),
        ({"additional_keys": torch.zeros(2, 3, 2, 8)}, ["additional_values is None"]),
        ({"additional_values": torch.zeros(2, 3, 2, 8)}, ["additional_keys is None"]),
        ({"additional_keys": [0.0], "additional_values": [0.0]}, ["additional_keys must be a tensor", "list"]),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: list[str]):
    options: Any = {"impl": "eager", "kernel_size": 3} | arguments
    with raises_naming(*words):
        neighborhood_attention(*blank(), **options)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_tensor_is_named(name: str):
    query, key, value = blank()
    arguments: Any = {"query": query, "key": key, "value": value}
    with raises_naming(f"{name} must be a tensor", "None"):
        attention_state(**arguments | {name: None}, kernel_size=3)


IMAGES = torch.zeros(1, 8, 2, 8)
TOKENS, PLACES = IMAGES[0], torch.arange(8)[None]
"""eight tokens in a batch of one, and packed"""


@pytest.mark.parametrize("wrong", ["no", 1, 0, torch.tensor(True)], ids=str)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda **flag: neighborhood_attention(IMAGES, IMAGES, IMAGES, 3, **flag), "return_lse"),
        (lambda **flag: neighborhood_attention_varlen(TOKENS, TOKENS, TOKENS, [(8,)], 3, **flag), "return_lse"),
        (lambda **flag: cached_attention(IMAGES, IMAGES, IMAGES, PLACES, PLACES, **flag), "return_lse"),
        (lambda **flag: na1d(IMAGES, IMAGES, IMAGES, 3, **flag), "return_lse"),
        *((lambda **flag: attention(IMAGES, IMAGES, IMAGES, **flag), name) for name in ("is_causal", "return_lse")),
        *(
            (lambda **flag: explain(IMAGES, IMAGES, IMAGES, 3, **flag), name)
            for name in ("return_lse", "needs_grad", "forward_mode")
        ),
        *(
            (lambda **flag: NeighborhoodGQA(16, 2, (3,)).explain(torch.zeros(1, 8, 16), **flag), name)
            for name in ("needs_grad", "forward_mode")
        ),
    ],
)
def test_what_is_no_bool_is_not_taken_for_one(call: Callable[..., object], name: str, wrong: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be True or False, got "):
        call(**{name: wrong})
    call(**{name: np.bool_(True)})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda **flag: na1d(IMAGES, IMAGES, IMAGES, 3, **flag), "return_lse"),
        *((lambda **flag: attention(IMAGES, IMAGES, IMAGES, **flag), name) for name in ("is_causal", "return_lse")),
    ],
)
def test_none_is_no_bool(call: Callable[..., object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be True or False, got None"):
        call(**{name: None})


def test_numbers_of_numpy_are_numbers():
    inputs = qkv()
    expected = attend(*inputs, dilation=2, scale=0.5, sink=1.0)
    assert torch.equal(attend(*inputs, dilation=np.int64(2), scale=np.float32(0.5), sink=np.float64(1.0)), expected)
    assert torch.equal(attend(*inputs, dilation=2, scale=torch.tensor([0.5]), sink=1.0), expected)
    expected = attend(*inputs, is_causal=(True, False))
    assert torch.equal(attend(*inputs, is_causal=(np.True_, np.False_)), expected)


def test_errors_under_autocast_say_what_it_casts() -> None:
    query, key, value = blank()
    with torch.autocast("cpu", torch.bfloat16), raises_naming("float64", "autocast casts to torch.bfloat16"):
        attend(query, key.double(), value)


def test_a_scale_that_changes_compiles_to_one_graph():
    query, key, value = qkv()
    torch.compiler.reset()
    compiled = torch.compile(lambda scale: attend(query, key, value, scale=scale), backend="eager", fullgraph=True)
    for scale in (0.5, 0.25, 0.125):
        torch.testing.assert_close(compiled(scale), attend(query, key, value, scale=scale))


def test_errors_propose_no_length_twice():
    query, key, value = (x[:1] for x in blank())
    register = torch.zeros(1, 3, 2, 9)
    with raises_naming("additional_keys", "expected [1, R, 2, 8]"):
        attend(query, key, value, additional_keys=register, additional_values=register)
    query, key = query.unflatten(-2, (4, 1)), key.unflatten(-2, (1, 2))
    with pytest.raises(ValueError, match=r"head axes .*; expected \(4, 1\) as .* kernel_size=\(3, 3\) has entries$"):
        attend(query, key, key, kernel_size=(3, 3))


def test_a_tuple_for_too_few_axes_is_named():
    """With one entry the second axis of an image would be one of KV heads."""
    for name in ("kernel_size", "stride", "dilation"):
        with raises_naming("with 1 spatial axis", f"as many as {name}=(1,) has entries"):
            attend(*qkv(), **{name: (1,)})


@pytest.mark.parametrize(
    ("keys", "values", "words"),
    [
        ((3, 3, 2, 8), (2, 3, 2, 8), ["additional_keys", "(3, 3, 2, 8)", "[2 or 1, R, 2, 8]"]),
        ((2, 3, 4, 8), (2, 3, 4, 8), ["additional_keys", "(2, 3, 4, 8)", "[2 or 1, R, 2, 8]"]),
        ((2, 3, 2, 8), (2, 3, 2, 9), ["additional_values", "(2, 3, 2, 9)", "[2 or 1, R, 2, 8]"]),
        ((2, 3, 2, 8), (2, 4, 2, 8), ["additional_keys has 3", "additional_values 4"]),
        ((3, 2, 8), (3, 2, 8), ["additional_keys", "(3, 2, 8)"]),
    ],
)
def test_bad_registers(keys: tuple[int, ...], values: tuple[int, ...], words: list[str]):
    k, v = torch.zeros(keys), torch.zeros(values)
    with raises_naming(*words):
        attend(*blank(), additional_keys=k, additional_values=v)


def test_mixed_dtypes_and_devices():
    query, key, value = blank()
    with raises_naming("key", "float16", "float32"):
        attend(query, key.half(), value)
    with raises_naming("value", "float64", "float32"):
        attend(query, key, value.double())
    with raises_naming("key", "meta", "cpu"):
        attend(query, key.to("meta"), value)
    registers = torch.zeros(2, 3, 2, 8)
    with raises_naming("additional_values", "bfloat16", "float32"):
        attend(query, key, value, additional_keys=registers, additional_values=registers.bfloat16())
    with raises_naming("query", "int64", "float32"):
        attend(*(t.long() for t in (query, key, value)))


def test_group_axis_form_must_match_the_query():
    query, key = torch.zeros(2, 8, 9, 2, 2, 8), torch.zeros(2, 8, 9, 2, 3, 8)
    with raises_naming("key", "(2, 3)", "(2, 2)"):
        attend(query, key, query, kernel_size=(3, 3))


# ---- Dispatch -------------------------------------------------------------------------------------------------------


def test_explicit_fused_never_falls_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_ops, "unsupported", lambda *_: "there is no device for it")
    with raises_naming("there is no device for it", "eager", error=RuntimeError):
        neighborhood_attention(*blank(), 3, impl="fused")
    with raises_naming("there is no device for it", error=RuntimeError):
        attention_state(*blank(), 3, impl="fused")
    assert neighborhood_attention(*blank(), 3, impl="auto").shape == Q


def test_explicit_eager_never_runs_fused(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("fused")

    monkeypatch.setattr(attention_ops, "unsupported", lambda *_: None)
    monkeypatch.setattr(attention_ops, "attention", refuse)
    monkeypatch.setattr(attention_ops, "attention_state", refuse)
    assert attend(*blank()).shape == Q
    attention_state(*blank(), 3, impl="eager")
    with raises_naming("fused", error=AssertionError):
        neighborhood_attention(*blank(), 3, impl="fused")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as on macOS and Windows
import torch
import natten_layers as nl
rope = nl.AxialRoPE(8, 2, num_kv_heads=1)
layer = nl.NeighborhoodGQA(16, 2, 3, num_kv_heads=1, num_registers=1, sink="zero", qk_norm="rms", rope=rope)
x = torch.randn(1, 4, 5, 16, requires_grad=True)
layer(x).sum().backward()
q = torch.randn(1, 2, 1, 8)
positions = torch.arange(2)[None]
nl.cached_attention(q, q, q, positions, positions)
for call in (lambda: nl.neighborhood_attention(q, q, q, 1, impl="fused"),
             lambda: nl.cached_attention(q, q, q, positions, positions, impl="fused")):
    try:
        call()
    except RuntimeError as error:
        assert "Triton is not installed" in str(error), error
    else:
        raise AssertionError("fused without Triton")
assert not [name for name in sys.modules if name.startswith("triton.")]
"""


def test_everything_runs_without_triton() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TRITON]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("asked", ["leaf", "view", "func.grad", "vmap"])
@pytest.mark.parametrize("form", ["heads", "group", "registers"])
def test_expanded_heads_that_are_asked_for_get_a_gradient_each(form: str, asked: str) -> None:
    """The gradient of the tensor before expansion is the sum over its copies, that of the expanded one is not."""
    torch.manual_seed(0)
    shape = (1, 12, 2, 2, 8) if form == "group" else (1, 12, 4, 8)
    q, base = torch.randn(shape, dtype=torch.float64), torch.randn(1, 12, 1, 8, dtype=torch.float64)
    base = base.unsqueeze(-2).expand(1, 12, 2, 1, 8) if form == "group" else base
    inputs = {"key": base.expand(shape), "value": base.expand(shape)}
    if form == "registers":
        register = torch.randn(1, 3, 1, 8, dtype=torch.float64)
        inputs |= {f"additional_{name}": register.expand(-1, -1, 4, -1) for name in ("keys", "values")}

    def loss(*tensors: Tensor) -> Tensor:
        named: Any = dict(zip(inputs, tensors, strict=True))
        return neighborhood_attention(q, **named, kernel_size=(5,)).square().sum()

    def mapped(*tensors: Tensor) -> Tensor:
        return torch.func.vmap(lambda factor: factor * loss(*tensors))(torch.ones(1, dtype=FP64)).sum()

    leaves = [t.contiguous().requires_grad_() for t in inputs.values()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    expanded, everything = tuple(inputs.values()), tuple(range(len(inputs)))
    if asked == "func.grad":
        found = torch.func.grad(loss, everything)(*expanded)
    elif asked == "vmap":  # inside which a tensor does not tell that it is differentiated
        found = torch.func.grad(mapped, everything)(*expanded)
    else:
        sources = [t.detach().requires_grad_() for t in expanded]
        tensors = sources if asked == "leaf" else [t.expand(t.shape) for t in sources]
        assert [t.stride() for t in tensors] == [t.stride() for t in expanded]
        found = torch.autograd.grad(loss(*tensors), tensors)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(expected[0][..., :1, :], expected[0])


def test_a_base_of_expanded_heads_gets_the_sum_of_their_gradients() -> None:
    q, k = torch.randn(1, 12, 4, 8, dtype=FP64), torch.randn(1, 12, 1, 8, dtype=FP64, requires_grad=True)
    view = k.expand(-1, -1, 4, -1)
    of_base, of_view = torch.autograd.grad(attend(q, view, view, kernel_size=5).square().sum(), (k, view))
    close(of_base, of_view.sum(-2, keepdim=True))
    close(of_base, torch.autograd.grad(attend(q, k, k, kernel_size=5).square().sum(), k)[0])


def test_registers_expanded_over_the_batch_get_a_gradient_for_every_image() -> None:
    query, key, value = qkv((9,), heads=4)
    registers = torch.randn(1, 2, 2, 8, dtype=FP64).expand(2, -1, -1, -1)
    grads = []
    for r in (registers.detach().requires_grad_(), registers.contiguous().requires_grad_()):
        for asked in (r, r.view_as(r)):
            out = attend(query, key, value, kernel_size=(3,), additional_keys=asked, additional_values=asked)
            grads.append(torch.autograd.grad(out.square().sum(), asked)[0])
    for grad in grads[1:]:
        close(grad, grads[0])
    assert not torch.allclose(grads[0][:1], grads[0])


def test_expanded_heads_must_fit_whether_differentiated_or_not() -> None:
    query, key = torch.zeros(1, 9, 4, 8), torch.zeros(1, 9, 1, 8).expand(-1, -1, 3, -1)
    for k in (key, key.detach().requires_grad_()):
        with raises_naming("query has 4", "key 3"):
            attend(query, k, k, kernel_size=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_leaves_scores_and_statistics_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = (8 * torch.randn(1, 16, 2, 16).to(dtype) for _ in range(2))
    v, positions = torch.randn(1, 16, 2, 16).to(dtype), torch.arange(16)[None]
    extra: dict[str, Any] = {"additional_keys": k[:, :3], "additional_values": v[:, :3], "sink": 1.0}

    def results() -> tuple[Tensor, ...]:
        window = neighborhood_attention(q, k, v, 5, **extra, return_lse=True)
        return *window, *cached_attention(q, k, v, positions, positions, window=5, **extra, return_lse=True)

    expected = results()
    with torch.autocast("cpu", dtype):
        for ours, theirs in zip(results(), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", ["eager", "fused"])
def test_autocast_casts_as_for_attention_of_torch(impl: Impl) -> None:
    """Whatever the dtypes are, as models whose RoPE is fp32 have queries and keys of another one than values."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 8, 4, 16), torch.randn(1, 8, 2, 16).half(), torch.randn(1, 8, 2, 16)
    extra: dict[str, Tensor] = {"additional_keys": k[:, :3].float(), "additional_values": v[:, :3].half()}
    options: dict[str, Any] = {"impl": impl, "sink": torch.randn(4)}  # the sink keeps its dtype

    def results(q: Tensor, k: Tensor, v: Tensor, **registers: Any) -> list[Tensor]:
        row, more = torch.arange(8)[None], {**options, **registers}
        packed = neighborhood_attention_varlen(q[0], k[0], v[0], [(5,), (3,)], 3, **more, return_lse=True)
        cached = cached_attention(q, k, v, row, row, **more, return_lse=True)
        return [neighborhood_attention(q, k, v, 3, **more), *attention_state(q, k, v, 3, **more), *packed, *cached]

    expected = results(q.half(), k, v.half(), **{name: t.half() for name, t in extra.items()})
    with raises_naming("key has dtype torch.float16", "query has torch.float32"):
        results(q, k, v, **extra)
    with torch.autocast("cpu", torch.float16):
        found = results(q, k, v, **extra)
        assert neighborhood_attention(q.double(), k.double(), v.double(), 3).dtype == FP64
        with raises_naming("key has dtype torch.float16", "query has torch.float64"):
            neighborhood_attention(q.double(), k, v, 3)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_autocast_casts_differentiably() -> None:
    q, k = torch.randn(1, 8, 4, 16, requires_grad=True), torch.randn(1, 8, 2, 16)

    def attend(x: Tensor) -> Tensor:
        return neighborhood_attention(x, k, k.bfloat16(), 3)

    compiled = torch.compile(lambda x: attend(x).float().square().sum(), backend="aot_eager", fullgraph=True)
    (exact,) = torch.autograd.grad(neighborhood_attention(q, k, k, 3).square().sum(), q)
    exact_tangent = torch.func.jvp(lambda x: neighborhood_attention(x, k, k, 3), (q,), (k.repeat(1, 1, 2, 1),))[1]
    with torch.autocast("cpu", torch.bfloat16):
        (grad,) = torch.autograd.grad(compiled(q), q)
        tangent = torch.func.jvp(attend, (q,), (k.repeat(1, 1, 2, 1),))[1]
    assert (grad.dtype, tangent.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(grad, exact, rtol=0, atol=0.02 * exact.abs().max().item())
    torch.testing.assert_close(tangent.float(), exact_tangent, rtol=0, atol=0.02 * exact_tangent.abs().max().item())


def test_states_without_keys_merge() -> None:
    """States with ``out`` 0 and lse -inf, as :func:`cached_attention` returns for padding, can be merged."""
    out, lse = torch.randn(1, 3, 2, 4, dtype=torch.float64), torch.randn(1, 3, 2, dtype=torch.float64)
    ones = torch.ones_like(lse)
    empty = torch.zeros_like(out), torch.full_like(lse, -math.inf), ones
    for states in ((empty, empty), (empty, (empty[0], empty[1], 0 * ones))):
        merged = merge_attention(*states)
        assert not merged.out.any()
        assert (merged.lse == -math.inf).all()
    full = out.requires_grad_(), lse.requires_grad_(), ones
    merged = merge_attention(empty, full, empty)
    torch.testing.assert_close(merged.out, out)
    torch.testing.assert_close(merged.lse, lse)
    gradients = torch.autograd.grad(merged.out.sum() + merged.lse.sum(), (out, lse))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.ones_like(gradient))


# ---- One contract on every path -------------------------------------------------------------------------------------

PATHS = [
    pytest.param((9,), 4, "eager", id="tiles-1d"),
    pytest.param((9,), 9, "eager", id="dense"),
    pytest.param((5, 6), 3, "eager", id="tiles-2d"),
    pytest.param((3, 2, 3), 2, "eager", id="tiles-3d"),
    pytest.param((2, 3), 2, "fused", id="fused"),
]


def fp32(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def results(spatial: tuple[int, ...], kernel_size: int, impl: Any, batch: int, heads: int) -> Iterator[Tensor]:
    """Results of every operation, with and without gradients, registers and sinks, and with a group axis."""
    if impl == "fused":
        pytest.importorskip("triton")
    query, key, extra = fp32(batch, *spatial, 2 * heads, 8), fp32(batch, *spatial, heads, 8), fp32(1, 2, heads, 8)
    grouped = query.unflatten(-2, (heads, 2)), key[..., None, :], key[..., None, :]
    window = (kernel_size,) * len(spatial)
    registers = {"additional_keys": extra, "additional_values": extra}
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            every: list[dict[str, Any]] = [{}, {"sink": 0.0}, registers, {"is_causal": True}]
            for options in every:
                yield neighborhood_attention(query, key, key, window, impl=impl, **options)
                yield from neighborhood_attention(query, key, key, window, impl=impl, return_lse=True, **options)
            state = attention_state(query, key, key, window, impl=impl)
            yield from (*state, *merge_attention(state, state))
            yield from neighborhood_attention(*grouped, window, impl=impl, return_lse=True)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("spatial", "kernel_size", "impl"), PATHS)
def test_results_are_contiguous_and_can_be_viewed(
    spatial: tuple[int, ...], kernel_size: int, impl: str, heads: int
) -> None:
    for result in results(spatial, kernel_size, impl, 2, heads):
        assert result.is_contiguous(), result.stride()
        result.view(2, -1)


@pytest.mark.parametrize(("spatial", "kernel_size", "impl"), PATHS)
def test_an_empty_batch_gives_empty_results(spatial: tuple[int, ...], kernel_size: int, impl: str) -> None:
    pairs = zip(results(spatial, kernel_size, impl, 0, 2), results(spatial, kernel_size, "eager", 2, 2), strict=True)
    for result, of_two in pairs:
        assert (result.shape, result.dtype) == ((0, *of_two.shape[1:]), of_two.dtype)
        assert result.is_contiguous()
        assert result.requires_grad == of_two.requires_grad


@pytest.mark.parametrize(("spatial", "kernel_size", "impl"), PATHS)
def test_an_empty_batch_gives_gradients_of_zero(spatial: tuple[int, ...], kernel_size: int, impl: Any) -> None:
    """Gradients of registers and sinks, which the batch shares, are zero too."""
    query, key, value = inputs = [fp32(0, *spatial, heads, 8) for heads in (4, 2, 2)]
    shared = [fp32(1, 3, 2, 8), fp32(1, 3, 2, 8), fp32(4)]
    named: Any = dict(zip(("additional_keys", "additional_values", "sink"), shared, strict=True))
    out, lse = neighborhood_attention(query, key, value, kernel_size, return_lse=True, impl=impl, **named)
    leaves = inputs + shared
    for gradient, tensor in zip(torch.autograd.grad((out.sum(), lse.sum()), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def draw_unsupported(kind: str) -> Tensor:
    dense = torch.randn(2, 9, 4, 8)
    if kind == "DTensor":
        tensor = pytest.importorskip("torch.distributed.tensor")
        with FakeProcessGroup():
            mesh = init_device_mesh("cpu", (1,))
            return tensor.DTensor.from_local(dense, mesh, [tensor.Replicate()])
    return {
        "nested": lambda: torch.nested.nested_tensor([*dense]),
        "jagged": lambda: torch.nested.nested_tensor([dense[0], dense[1, :5]], layout=torch.jagged),
        "sparse": dense.to_sparse,
    }[kind]()


class FakeProcessGroup:
    """A group of this process alone, in which nothing is sent."""

    def __enter__(self) -> None:
        import_module("torch.testing._internal.distributed.fake_pg")  # which makes the backend known
        torch.distributed.init_process_group("fake", rank=0, world_size=1, store=torch.distributed.HashStore())  # pyright: ignore[reportPrivateImportUsage]

    def __exit__(self, *_: object) -> None:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nested", ["nested tensor", "to_padded_tensor"]),
        ("jagged", ["nested tensor", "to_padded_tensor"]),
        ("sparse", ["torch.sparse_coo", "to_dense()"]),
        ("DTensor", ["DTensor", "to_local()"]),
    ],
)
def test_tensors_without_one_dense_form_are_named(kind: str, words: list[str]) -> None:
    dense, other = torch.randn(2, 9, 4, 8), draw_unsupported(kind)
    attend(dense, dense, dense)  # a call of the same shape passed the checks before
    positions = torch.arange(9)[None]
    with raises_naming("query", *words):
        attend(other, other, other)
    with raises_naming("value", *words):
        attend(dense, dense, other)
    with raises_naming("additional_keys", *words):
        attend(dense, dense, dense, additional_keys=other, additional_values=other)
    with raises_naming("sink", *words):
        attend(dense, dense, dense, sink=other)
    with raises_naming("key", *words):
        cached_attention(dense, other, other, positions, positions)
    if kind != "DTensor":
        with raises_naming("out of state 0", *words):
            merge_attention((other, other, other))
        with raises_naming("x ", *words):
            NeighborhoodGQA(8, 2, 3)(other)


def test_tensors_of_a_subclass_and_parameters_are_taken() -> None:
    class Subclass(Tensor):
        pass

    query, key, value = qkv()
    expected = attend(query, key, value)
    assert torch.equal(attend(query.as_subclass(Subclass), key, value).as_subclass(Tensor), expected)
    assert torch.equal(attend(torch.nn.Parameter(query), key, value), expected)
