"""Queries on another grid than keys: upsampling, pooling, cross-neighborhoods."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, arguments, error, make_inputs, raises_naming

from natten_layers import attention_state, explain, merge_attention, neighborhood_attention

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# These tests run interpreted without a GPU. With one, they run compiled and have the mark "gpu".
pytestmark = [pytest.mark.gpu] if ON_GPU else []
IMPLS = pytest.mark.parametrize("impl", ["eager", "fused"])


def seen(queries: int, keys: int, kernel: int, impl: str, **options: object) -> list[list[int]]:
    """The keys that every query sees, from their mean: all scores are zero, and key ``j`` has the value ``2 ** j``."""
    query, key = (torch.zeros(1, n, 1, 16, device=DEVICE) for n in (queries, keys))
    value = (2.0 ** torch.arange(keys, device=DEVICE)).reshape(1, keys, 1, 1).expand(-1, -1, -1, 16)
    out = neighborhood_attention(query, key, value, kernel, impl=impl, **options)  # type: ignore[call-overload]
    sums = (out[0, :, 0, 0] * kernel).round().int().tolist()
    return [[j for j in range(keys) if bits >> j & 1] for bits in sums]


@IMPLS
def test_four_keys_upsampled_to_eight(impl: str) -> None:
    assert seen(8, 4, 3, impl) == [[0, 1, 2]] * 4 + [[1, 2, 3]] * 4


@IMPLS
def test_eight_keys_pooled_to_four(impl: str) -> None:
    assert seen(4, 8, 2, impl) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@IMPLS
def test_a_ring_of_four_keys_upsampled_to_eight(impl: str) -> None:
    expected = [[0, 1, 3]] * 2 + [[0, 1, 2]] * 2 + [[1, 2, 3]] * 2 + [[0, 2, 3]] * 2
    assert seen(8, 4, 3, impl, is_periodic=True) == expected


@IMPLS
def test_results_have_the_shape_of_the_query_and_gradients_those_of_the_inputs(impl: str) -> None:
    case = Case("shapes", (4, 6), 3, heads=4, kv_heads=2, value_dim=24, key_spatial=(3, 9))
    inputs = make_inputs(case, DEVICE)
    out, lse = neighborhood_attention(**arguments(case, inputs), return_lse=True, impl=impl)  # type: ignore[call-overload]
    assert out.shape == (2, 4, 6, 4, 24)
    assert lse.shape == (2, 4, 6, 4)
    grads = torch.autograd.grad((out.sum(), lse.sum()), tuple(inputs.values()))
    assert [g.shape for g in grads] == [x.shape for x in inputs.values()]


@IMPLS
def test_keys_that_no_query_sees_get_no_gradient(impl: str) -> None:
    case = Case("coarse", (2,), 2, key_spatial=(12,))  # leaders 3 and 9 see keys 2, 3, 8 and 9
    inputs = make_inputs(case, DEVICE)
    out = neighborhood_attention(**arguments(case, inputs), impl=impl)  # type: ignore[call-overload]
    for grad in torch.autograd.grad(out.square().sum(), (inputs["key"], inputs["value"])):
        assert grad.abs().amax((0, 2, 3)).nonzero().flatten().tolist() == [2, 3, 8, 9]


@IMPLS
def test_windows_of_the_whole_grid_are_cross_attention(impl: str) -> None:
    case = Case("whole", (3, 5), (2, 4), heads=4, kv_heads=2, batch=2, key_spatial=(2, 4), sink="learned")
    query, key, value, sink = (x.detach() for x in make_inputs(case, DEVICE).values())
    out = neighborhood_attention(query, key, value, (2, 4), sink=sink, impl=impl)  # type: ignore[call-overload]
    q, k, v = (x.flatten(1, 2).transpose(1, 2).double() for x in (query, key, value))
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    logits = torch.cat([scores, sink.double()[None, :, None, None].expand(2, -1, 15, 1)], -1)
    expected = logits.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    assert error(out, expected.transpose(1, 2).unflatten(1, (3, 5))) < 1e-6


def test_states_over_several_grids_merge() -> None:
    """Queries that see their own grid and a coarser one in one softmax, as a pyramid of features has it."""
    fine, coarse = Case("fine", (8,), 3), Case("coarse", (8,), 2, key_spatial=(4,))
    query, near, near_value = make_inputs(fine, DEVICE).values()
    _, far, far_value = make_inputs(coarse, DEVICE, seed=1).values()
    states = [
        attention_state(query, near, near_value, 3, impl="fused"),
        attention_state(query, far, far_value, 2, impl="fused"),
    ]
    merged = merge_attention(*states)
    assert error(merged.lse, torch.logaddexp(states[0].lse, states[1].lse)) < 1e-6


def test_bad_grids_are_named() -> None:
    query, key = torch.randn(1, 8, 9, 2, 16, device=DEVICE), torch.randn(1, 4, 9, 2, 16, device=DEVICE)
    for name, value in (("stride", 2), ("dilation", (1, 2)), ("is_causal", (False, True))):
        with raises_naming(name, "(8, 9)", "(4, 9)", "another grid"):
            neighborhood_attention(query, key, key, 3, **{name: value})  # type: ignore[call-overload]
    with raises_naming("kernel_size", "5", "height", "length 4"):
        neighborhood_attention(query, key, key, 5)
    with raises_naming("value", "key", "height", "8 and 4"):
        explain(query, key, query, 3)
    with raises_naming("rpb", "another grid", "(8, 9)", "(4, 9)"):
        neighborhood_attention(query, key, key, (3, 3), rpb=torch.zeros(2, 5, 5, device=DEVICE))
    with raises_naming("key", "empty", "axis 1"):
        neighborhood_attention(query, key[:, :0], key[:, :0], 1)
