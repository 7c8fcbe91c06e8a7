"""Keys that do not count: by hand, with NaN behind the mask, in modules and under transforms.

The mask also belongs to cases of ``helpers.py``, with which both paths are compared with the definition.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Case, arguments, error, key_mask, make_inputs, raises_naming, run
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from natten_layers import NeighborhoodGQA, attention_state, explain, merge_attention, neighborhood_attention
from natten_layers.modules.hdit_layers import ShiftedWindowGQA
from natten_layers.operations import Impl

pytest.importorskip("triton")

from natten_layers.kernels.host.problem import Inputs, Options

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
IMPLS = ("eager", "fused")
RING = Case("ring", (12, 3), (5, 2), (2, 1), (2, 1), is_periodic=(True, False), batch=1, seen=0.5)
ALL = Case("all", (4, 5), 3, heads=4, kv_heads=2, registers=2, sink="learned", seen=0.5)


def with_mask(options: dict[str, Any], mask: Tensor | None) -> dict[str, Any]:
    return {**options, "key_mask": mask}


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl: Impl) -> None:
    """Five tokens, windows of 3, token 1 and then also 0 and 2 masked: equal scores make means of visible values."""
    zero = torch.zeros(1, 5, 1, 8, device=DEVICE)
    value = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0], device=DEVICE).reshape(1, 5, 1, 1).expand(-1, -1, -1, 8)
    mask = torch.tensor([[True, False, True, True, True]], device=DEVICE)

    def means(mask: Tensor) -> tuple[list[float], list[float]]:
        out, lse = neighborhood_attention(zero, zero, value, (3,), key_mask=mask, return_lse=True, impl=impl)
        return out[0, :, 0, 0].tolist(), lse.flatten().exp().tolist()

    out, counts = means(mask)  # windows 0-2, 0-2, 1-3, 2-4, 2-4
    assert out == pytest.approx([50.5, 50.5, 550.0, 3700.0, 3700.0])
    assert counts == pytest.approx([2.0, 2.0, 2.0, 3.0, 3.0])
    mask[0, :3] = False
    out, counts = means(mask)
    assert out == pytest.approx([0.0, 0.0, 1000.0, 5500.0, 5500.0])
    assert counts == pytest.approx([0.0, 0.0, 1.0, 2.0, 2.0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dirty", [math.nan, math.inf])
@pytest.mark.parametrize("case", [ALL, RING, Case("1d", (40,), 33, value_dim=8, batch=1, seen=0.6)], ids=str)
def test_what_is_masked_reaches_nothing(case: Case, dirty: float, impl: Impl) -> None:
    inputs = make_inputs(case, DEVICE)
    mask = key_mask(case, DEVICE)
    assert mask is not None
    expected = run(case, inputs, impl)
    hidden = {n: t.detach().clone() if n in ("key", "value") else t for n, t in inputs.items()}
    for name in ("key", "value"):
        hidden[name][~mask] = dirty
        hidden[name].requires_grad_()
    found = run(case, hidden, impl)
    for name, tensor in found.tensors().items():
        assert error(tensor, expected.tensors()[name]) < 2e-6, name
    for name in ("key", "value"):
        assert not found.grads[name][~mask].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_masked_key_has_no_gradient_whatever_the_cotangents_are(impl: Impl) -> None:
    case = Case("nan", (6, 5), 3, heads=2, kv_heads=1, seen=0.5)
    inputs, mask = make_inputs(case, DEVICE), key_mask(case, DEVICE)
    assert mask is not None
    out = neighborhood_attention(**arguments(case, inputs), impl=impl)
    grads = torch.autograd.grad(out, tuple(inputs.values()), torch.full_like(out, math.nan))
    assert grads[0].isnan().any()
    for grad in grads[1:]:
        assert not grad[~mask].any()
        assert grad[mask].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sink", [None, -math.inf], ids=["no sink", "empty sink"])
def test_a_query_that_sees_nothing(impl: Impl, sink: float | None) -> None:
    case = Case("nothing", (7,), 3, heads=2, kv_heads=1)
    inputs = make_inputs(case, DEVICE)
    if sink is not None:
        inputs["sink"] = torch.full((2,), sink, device=DEVICE, requires_grad=True)
    mask = torch.zeros(1, 7, dtype=torch.bool, device=DEVICE)
    mask[:, 6] = True  # queries 0 to 4 see nothing
    state = attention_state(**with_mask(arguments(case, inputs), mask), impl=impl)
    assert not state.out[:, :5].any()
    assert (state.row_max[:, :5] == -math.inf).all()
    assert not state.row_sum[:, :5].any()
    cotangents = [torch.ones_like(state.out), torch.ones_like(state.lse)]
    cotangents[0][:, :5] = math.nan
    grads = torch.autograd.grad((state.out, state.lse), tuple(inputs.values()), cotangents)
    assert not grads[0][:, :5].any()
    assert all(grad.isfinite().all() for grad in grads[3:])
    for grad in grads[1:3]:  # NaN in the gradient of an output may reach the image's keys that are not masked
        assert not grad[:, :6].any()
    # A merge with nothing changes nothing.
    state = attention_state(**with_mask(arguments(case, inputs), mask), impl=impl)
    other = attention_state(**arguments(replace(case, sink="zero"), inputs), impl=impl)
    merged = merge_attention(state, other)
    torch.testing.assert_close(merged.lse[:, :5], other.lse[:, :5])
    for grad in torch.autograd.grad(merged.out.sum() + merged.lse.sum(), tuple(inputs.values())):
        assert grad.isfinite().all()


def test_gradcheck() -> None:
    case = Case("fp64", (4, 3), (3, 2), (2, 1), heads=2, kv_heads=1, head_dim=3, value_dim=2, batch=1, seen=0.15,
                dtype=torch.float64)  # fmt: skip
    inputs, mask = make_inputs(case, DEVICE), key_mask(case, DEVICE)

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        state = attention_state(query, key, value, (3, 2), stride=(2, 1), key_mask=mask, impl="eager")
        return state.out, state.lse.masked_fill(state.row_sum == 0, 7.0)

    assert (function(*inputs.values())[1] == 7).any()
    assert gradcheck(function, tuple(inputs.values()), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_of_ones_changes_nothing(impl: Impl) -> None:
    case = Case("ones", (9, 10), (5, 4), heads=2, kv_heads=1, seen=None)
    inputs = make_inputs(case, DEVICE)
    plain = run(case, inputs, impl)
    ones = torch.ones(1, 9, 10, dtype=torch.bool, device=DEVICE).expand(2, -1, -1)  # stride 0
    out = neighborhood_attention(**with_mask(arguments(case, inputs), ones), impl=impl)
    rounding = (
        1e-6 if ON_GPU and impl == "fused" else 0.0
    )  # two compiled kernels, each with its own fused multiply-adds
    assert error(out, plain.out) <= rounding


def test_a_mask_of_any_strides_on_windows_much_larger_than_tiles() -> None:
    """Chunks inside of all windows skip the mask of borders, but not that of keys."""
    case = Case("large", (200,), 160, heads=1, kv_heads=1, head_dim=8, value_dim=8, batch=1)
    inputs = make_inputs(case, DEVICE)
    mask = torch.ones(200, 2, dtype=torch.bool, device=DEVICE)
    mask[5:150:40] = False
    options = with_mask(arguments(case, inputs), mask[None, :, 0])
    assert dict(explain(**options, impl="fused").kernels[0].settings)["skip_mask"]
    with torch.no_grad():
        expected = neighborhood_attention(**options, impl="eager")
        assert error(neighborhood_attention(**options, impl="fused"), expected) < 1e-6
        assert error(neighborhood_attention(**with_mask(options, None), impl="fused"), expected) > 1e-3


def test_operators_keep_their_schemas_and_vmap_maps_masks() -> None:
    q, k, v = (torch.randn(3, 1, 6, 2, 8, device=DEVICE) for _ in range(3))
    masks = torch.rand(3, 1, 6, device=DEVICE) < 0.6

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, impl: Impl = "fused") -> Tensor:
        return neighborhood_attention(q, k, v, (3,), key_mask=mask, sink=1.0, impl=impl)

    expected = torch.stack([attend(q[i], k[i], v[i], masks[i], impl="eager") for i in range(3)])
    for impl in IMPLS:
        mapped = torch.func.vmap(partial(attend, impl=impl))(q, k, v, masks)
        torch.testing.assert_close(mapped, expected)
    inputs = Inputs(q[0], k[0], v[0], key_mask=masks[0])
    args = (*inputs, *Options(1.0, (3,), (1,), (1,), (False,), 0.5))
    forward, backward = torch.ops.natten_layers.forward, torch.ops.natten_layers.backward
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward.default, (*args, True), test_utils=utils)
    out, row_max, row_sum = forward(*args, True)
    torch.library.opcheck(backward.default, (*args, out, row_max, row_sum, out, None), test_utils=utils)


def test_a_compiled_call_takes_masks() -> None:
    inputs, mask = make_inputs(ALL, DEVICE), key_mask(ALL, DEVICE)
    options = arguments(ALL, inputs)
    torch.compiler.reset()
    for impl in IMPLS:

        def loss(mask: Tensor | None, impl: Impl = impl) -> Tensor:
            out = neighborhood_attention(**with_mask(options, mask), impl=impl)
            return out.square().sum()

        compiled = torch.compile(loss, backend="aot_eager" if impl == "fused" else "eager", fullgraph=True)
        found, expected = (torch.autograd.grad(f(mask), tuple(inputs.values())) for f in (compiled, loss))
        for grad, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("options", [{}, {"num_registers": 2, "registers_attend": True, "sink": "zero"}], ids=str)
def test_a_layer_equals_one_on_the_tokens_that_count(options: dict[str, Any]) -> None:
    """A global layer on padded tokens gives those that count the results that they have alone."""
    torch.manual_seed(0)
    layer = NeighborhoodGQA(16, 4, None, num_kv_heads=2, **options).to(DEVICE)
    x = torch.randn(2, 7, 16, device=DEVICE)
    x[:, 5:] = math.nan
    mask = torch.arange(7, device=DEVICE)[None] < 5
    padded, alone = layer(x, mask=mask), layer(x[:, :5])
    padded, alone = ((t,) if isinstance(t, Tensor) else t for t in (padded, alone))
    torch.testing.assert_close((padded[0][:, :5], *padded[1:]), tuple(alone))


def test_shifted_windows_have_masks() -> None:
    torch.manual_seed(0)
    layer = ShiftedWindowGQA(8, 2, 3, 1).to(DEVICE)
    x, mask = torch.randn(1, 6, 6, 8, device=DEVICE), torch.ones(1, 6, 6, dtype=torch.bool, device=DEVICE)
    mask[0, 2, 3] = False
    torch.testing.assert_close(layer(x, mask=torch.ones_like(mask)), layer(x))
    out = layer(x, mask=mask)
    x[0, 2, 3] += 5.0
    torch.testing.assert_close(layer(x, mask=mask)[mask], out[mask])


def test_bad_masks() -> None:
    q = torch.zeros(2, 4, 5, 2, 8, device=DEVICE)

    def attend(mask: Any) -> Tensor:
        return neighborhood_attention(q, q, q, 3, key_mask=mask)

    good = torch.ones(2, 4, 5, dtype=torch.bool, device=DEVICE)
    for bad in (good[0], good.expand(3, 2, 4, 5), good[:, :, :4], good.repeat(2, 1, 1)):
        with raises_naming("key_mask", str(tuple(bad.shape)), "[2 or 1, 4, 5]"):
            attend(bad)
    with raises_naming("key_mask", "torch.float32", "torch.bool"):
        attend(good.float())
    with raises_naming("key_mask", "meta"):
        attend(good.to("meta"))
    with raises_naming("key_mask must be a tensor, got True of type bool"):
        attend(True)
    with raises_naming(
        "key_mask must be a tensor, got ndarray (2, 4, 5) of dtype bool; pass torch.as_tensor(key_mask)"
    ):
        attend(good.cpu().numpy())
    q = q[:1]
    with raises_naming("key_mask", "(1, 4, 4)", "expected [1, 4, 5]"):  # not "[1 or 1, 4, 5]"
        attend(good[:1, :, :4])


def test_explain_knows_masks() -> None:
    q = torch.zeros(1, 4, 5, 2, 8, device=DEVICE)
    mask = torch.ones(1, 4, 5, dtype=torch.bool, device=DEVICE)
    found = explain(q, q, q, 3, key_mask=mask, impl="fused", needs_grad=True)
    assert {kernel.name for kernel in found.kernels} == {"portable"}
