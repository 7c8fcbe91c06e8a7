"""Forward-mode derivatives: the fused kernels against forward mode of the definition in fp64, and training steps.

The kernels run under Triton's interpreter where there is no GPU, as in ``test_fused.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import CASES, Case, Inputs, arguments, error, key_mask, make_inputs, raises_naming
from tangents import assert_moves_like, attend, detached, directional, jvp, peer_of, tangents_of
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from natten_layers import (
    DecoderLM,
    DecoderLMConfig,
    HDiT,
    HDiTConfig,
    LevelConfig,
    NeighborhoodGQA,
    attention_state,
    cached_attention,
    merge_attention,
    neighborhood_attention,
    neighborhood_attention_varlen,
    operations,
)
from natten_layers.eager import dense_attention_state
from natten_layers.kernels.ops import attention as attention_ops
from natten_layers.kernels.ops import qk_prep as qk_prep_ops
from natten_layers.modules import AxialRoPE, RoPE
from natten_layers.modules.query_key import HeadNorm, normalize_and_rotate
from natten_layers.modules.rope import angles_of
from natten_layers.operations import Impl

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []

EVERYTHING = Case("everything", (7,), 4, 2, 1, True, 4, 2, 16, 8, 3, "learned", 0.3, batch=1)
SMALL = (
    Case("1d-causal-gqa-sink", (11,), 4, is_causal=True, heads=4, kv_heads=1, sink="learned", batch=1),
    Case("1d-dilated-ragged", (7,), 2, 2, 3, batch=1),
    Case("2d-registers-zero-sink", (4, 5), 3, kv_heads=1, registers=3, sink="zero", batch=1),
    Case("2d-scale-zero", (3, 4), 3, scale=0.0),
    Case("2d-value-dim", (3, 4), 2, value_dim=40),
    Case("3d", (2, 3, 4), 2, (1, 2, 1), 1, (True, False, False), 2, 1, 8, 16, sink="learned", batch=1),
    Case("2d-ring", (6, 5), (3, 4), (2, 1), (2, 1), batch=1, is_periodic=(True, True)),
    Case("2d-masked", (4, 5), 2, registers=1, batch=1, seen=0.5),
    Case("1d-masked-alone", (9,), 2, batch=1, seen=0.4),
    Case("finer-grid", (7,), 3, heads=4, registers=2, sink="learned", batch=1, key_spatial=(4,)),
    Case("2d-fp16", (4, 5), 3, kv_heads=1, registers=2, sink="learned", batch=1, dtype=torch.float16),
    EVERYTHING,
)
RUNS_HERE = [case for case in CASES if case.dtype != torch.float64] if ON_GPU else SMALL
SHAPES = (
    Case("gqa-2d", (33, 20), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, registers=16, sink="learned"),
    Case("13x13", (32, 32), 13, heads=6, kv_heads=3, head_dim=64, value_dim=64),
    Case("large-2d", (40, 48), (24, 32), head_dim=128, value_dim=128, batch=1),
    Case("large-3d-causal", (12, 16, 18), (7, 9, 10), 1, 1, (True, False, False), head_dim=128, value_dim=128, batch=1),
    Case("sliding-window", (1000,), 600, is_causal=True, heads=8, kv_heads=2, head_dim=64, value_dim=64, batch=1,
         registers=70),
    *(Case(f"head-dim-{d}", (17, 19), 5, heads=4, kv_heads=2, head_dim=d, value_dim=d, registers=3, sink="zero")
      for d in (8, 40, 80, 128, 256)),
    Case("large-head-dim-256", (700,), 600, heads=4, kv_heads=2, head_dim=256, value_dim=256, batch=1),
)  # fmt: skip


def tangent_in(dual: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(dual).tangent
    assert tangent is not None
    return tangent


def definition(case: Case) -> Callable[..., tuple[Tensor, Tensor]]:
    """The definition with a dense mask, of whose plain operations torch knows the derivatives."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale

    def run(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        given = arguments(case, inputs)
        names = "query", "key", "value", "additional_keys", "additional_values", "sink"
        q, k, v, register_k, register_v, sink = (given[name] for name in names)
        out, row_max, row_sum = dense_attention_state(
            q, k, v, register_k, register_v, sink, case.window, scale, key_mask=key_mask(case, q.device)
        )
        nothing = row_sum == 0  # where a query sees nothing, lse is -inf, a constant
        lse = (row_max + row_sum.masked_fill(nothing, 1.0).log()).masked_fill(nothing, -math.inf)
        return out, lse

    return run


def check(case: Case, inputs: Inputs, tangents: Inputs) -> tuple[Tensor, ...]:
    """Check results and tangents against the definition in fp64."""
    wide, wide_tangents = ({n: t.double() for n, t in x.items()} for x in (inputs, tangents))
    exact = directional(definition(case), wide, wide_tangents)
    found = directional(attend(case, "fused"), inputs, tangents)
    assert_moves_like(case, found, exact, peer_of(case, inputs, tangents))
    return found.tangents


@pytest.mark.parametrize("case", RUNS_HERE, ids=str)
def test_tangents_match_the_definition(case: Case) -> None:
    inputs = detached(make_inputs(case, DEVICE))
    check(case, inputs, tangents_of(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_tangents_match_the_definition_at_real_shapes(case: Case, dtype: torch.dtype) -> None:
    test_tangents_match_the_definition(replace(case, dtype=dtype))


def test_every_argument_alone_and_all_of_them_together() -> None:
    """A derivative is linear: the tangents of single arguments add up to that of all."""
    inputs = detached(make_inputs(EVERYTHING, DEVICE))
    tangents = tangents_of(inputs)
    together = check(EVERYTHING, inputs, tangents)
    alone = [check(EVERYTHING, inputs, {name: tangents[name]}) for name in tangents]
    for whole, *parts in zip(together, *alone, strict=True):
        assert error(torch.stack(parts).sum(0), whole) < 2e-6
    check(EVERYTHING, inputs, {name: tangents[name] for name in ("key", "sink")})  # registers see a moving reference


def three_tokens(q: float, k: list[float], v: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values of three tokens that see each other; all but the first channel is zero."""
    columns = ([q] * 3, k, v)
    query, key, value = (torch.zeros(1, 3, 1, 8, device=DEVICE) for _ in columns)
    for tensor, column in zip((query, key, value), columns, strict=True):
        tensor[0, :, 0, 0] = torch.tensor(column)
    return query, key, value


@pytest.mark.parametrize("moves", ["query", "key"])
def test_three_tokens_by_hand(moves: str) -> None:
    """Equal scores, so weights are 1/3. Scores move by 0, 3 and 6, on average 3; values 1, 2 and 6 are 3 on average."""
    columns = three_tokens(0, [0, 3, 6], [1, 2, 6]) if moves == "query" else three_tokens(1, [0, 0, 0], [1, 2, 6])
    inputs: Inputs = dict(zip(("query", "key", "value"), columns, strict=True))
    of_query, of_key, of_value = three_tokens(1, [0, 3, 6], [3, 0, 0])
    first: Inputs = {"query": of_query} if moves == "query" else {"key": of_key}
    sink = torch.full((1,), math.log(3), device=DEVICE)

    def tangents(inputs: Inputs, given: Inputs, sink: float | None = None) -> list[float]:
        def call(**tensors: Any) -> tuple[Tensor, Tensor]:
            options: dict[str, Any] = {"sink": sink} | tensors
            return neighborhood_attention(**options, kernel_size=3, scale=1.0, return_lse=True, impl="fused")

        _, (out, lse) = directional(call, inputs, given)
        assert not out[..., 1:].any()
        return torch.cat([out[0, :, 0, 0], lse[0, :, 0]]).tolist()

    # (0 * 1 + 3 * 2 + 6 * 6) / 3 - 3 * 3 = 5
    assert tangents(inputs, first) == pytest.approx([5.0] * 3 + [3.0] * 3, rel=1e-6)
    # The first value moves by 3, a third of which arrives.
    assert tangents(inputs, first | {"value": of_value}) == pytest.approx([6.0] * 3 + [3.0] * 3, rel=1e-6)
    # A sink takes half of the weight, and its value is 0: 42 / 6 - 9 / 6 * 9 / 6 = 4.75.
    assert tangents(inputs, first, math.log(3)) == pytest.approx([4.75] * 3 + [1.5] * 3, rel=1e-6)
    assert tangents(inputs | {"sink": sink}, first) == pytest.approx([4.75] * 3 + [1.5] * 3, rel=1e-6)
    # If its logit moves by 1, the average moves by 1/2: 42 / 6 - 2 * 9 / 6 = 4.
    moved = tangents(inputs | {"sink": sink}, first | {"sink": torch.ones_like(sink)})
    assert moved == pytest.approx([4.0] * 3 + [2.0] * 3, rel=1e-6)


def test_what_all_keys_have_in_common_is_not_rounded() -> None:
    """Keys and their tangents have a large common part, which moves all scores alike, and so no weight."""
    case = Case("common", (6, 7), 5, head_dim=16, value_dim=16, scale=0.05, batch=1, dtype=torch.float16)
    inputs = detached(make_inputs(case, DEVICE))
    tangents = tangents_of(inputs)
    inputs["key"], tangents["key"] = inputs["key"] + 32, tangents["key"] + 32
    check(case, inputs, tangents)


def test_repeats_are_equal_bit_by_bit() -> None:
    inputs = detached(make_inputs(EVERYTHING, DEVICE))
    first, second = (directional(attend(EVERYTHING, "fused"), inputs, tangents_of(inputs))[1] for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_primals_are_those_of_a_plain_call() -> None:
    inputs = detached(make_inputs(EVERYTHING, DEVICE))
    results, _ = directional(attend(EVERYTHING, "fused"), inputs, tangents_of(inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, attend(EVERYTHING, "fused")(**inputs), strict=True))


@pytest.mark.parametrize("moving", [("query", "key", "value", "additional_keys", "sink"), ("value",), ()], ids=str)
def test_without_gradients_torch_makes_no_function(moving: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of ``torch.func.jvp`` alone it would take the host longer than all else. Results are the same bits."""
    inputs = detached(make_inputs(EVERYTHING, DEVICE))
    tangents = {name: t for name, t in tangents_of(inputs).items() if name in moving}
    rest = {name: t for name, t in inputs.items() if name not in moving}

    def call(x: Tensor, moved: Inputs) -> tuple[Tensor, ...]:  # x moves if nothing else does
        return *attention_state(**arguments(EVERYTHING, {**moved, **rest}), impl="fused"), x

    primals = torch.ones(1), {name: inputs[name] for name in tangents}
    expected = jvp(call, primals, (torch.ones(1), tangents))
    monkeypatch.setattr(attention_ops._Transformable, "apply", None)
    with torch.no_grad():
        found = jvp(call, primals, (torch.ones(1), tangents))
    for results, others in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def test_prepared_heads_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, gain = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16), torch.rand(4)
    query, key, gain = (x.to(DEVICE) for x in (query, key, gain))
    angles = angles_of(RoPE(16).to(DEVICE), query, key, None)

    def run(query: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        return normalize_and_rotate(query, key, HeadNorm("cosine", gain, None), angles, impl="fused")

    expected = jvp(run, (query, gain), (query.cos(), gain.cos()))
    monkeypatch.setattr(qk_prep_ops._Transformable, "apply", None)
    with torch.no_grad():
        found = jvp(run, (query, gain), (query.cos(), gain.cos()))
    for results, others in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def test_other_transforms_and_errors_without_gradients() -> None:
    run, query, tangent = of_query(replace(PLAIN, batch=2), requires_grad=False)
    expected = jvp(run, (query,), (tangent,))[1]
    with torch.no_grad():
        several = vmap(lambda t: jvp(run, (query,), (t,))[1])(torch.stack([tangent, 2 * tangent]))
        (mapped,) = jvp(vmap(run), (query[None],), (tangent[None],))[1]
        with raises_naming("tangent of query", "torch.float64"):
            jvp(run, (query,), (tangent.double(),))
        run, query, tangent = of_query(FEW, requires_grad=False)
        for second in (jacfwd(jacfwd(run)), lambda q: jvp(lambda p: jvp(run, (p,), (tangent,))[1], (q,), (tangent,))):
            with raises_naming("second derivatives", error=NotImplementedError):
                second(query)
    assert error(several, torch.stack([expected, 2 * expected])) < 1e-6
    assert torch.equal(mapped, expected)


def test_tangents_may_have_strides_of_their_own() -> None:
    case = Case("strides", (4, 5), 3, heads=4, kv_heads=2, batch=1)
    inputs = detached(make_inputs(case, DEVICE))
    tangents = tangents_of(inputs)
    call = attend(case, "fused")
    expected = directional(call, inputs, tangents)[1]
    for axes in ((1, 2), (-1, -2)):
        other = {n: t.transpose(*axes).contiguous().transpose(*axes) for n, t in tangents.items()}
        found = directional(call, inputs, other)[1]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def shifted(row: Tensor) -> tuple[Tensor, Tensor]:  # one tangent for all tokens, which has strides of zero
        return call(**inputs | {"value": inputs["value"] + row})

    row = torch.randn(2, 16, device=DEVICE)
    out, _ = jvp(shifted, (row,), (row,))[1]
    assert error(out, row.repeat_interleave(2, 0).expand_as(out)) < 1e-6


def test_one_head_that_was_expanded() -> None:
    q, k, v = (t.detach() for t in make_inputs(Case("mqa", (7,), 3, heads=4, kv_heads=1, batch=1), DEVICE).values())

    def call(k: Tensor, v: Tensor, impl: Impl = "fused") -> Tensor:
        return neighborhood_attention(q.to(k), k.expand_as(q), v.expand_as(q), 3, impl=impl)

    tangents = torch.randn_like(k), torch.randn_like(v)
    wide = [tuple(t.double() for t in x) for x in ((k, v), tangents)]
    _, expected = jvp(lambda k, v: call(k, v, "eager"), *wide)
    with forward_ad.dual_level():
        duals = call(*(forward_ad.make_dual(x, t) for x, t in zip((k, v), tangents, strict=True)), impl="fused")
        assert error(tangent_in(duals), expected) < 1e-6
    assert error(jvp(call, (k, v), tangents)[1], expected) < 1e-6


def test_merged_states_have_tangents() -> None:
    case = replace(EVERYTHING, registers=0)
    inputs = detached(make_inputs(case, DEVICE))
    other = {name: t.roll(1, 1) for name, t in inputs.items() if name != "sink"}

    def merged(impl: Impl) -> Callable[..., tuple[Tensor, ...]]:
        def run(shift: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
            moved: dict[str, Any] = {name: t.to(shift) + shift for name, t in other.items() if name != "value"}
            first = attention_state(**arguments(case, given), impl=impl)
            second = attention_state(
                **moved, value=other["value"].to(shift), kernel_size=2, additional_keys=given["key"][:, :3],
                additional_values=given["value"][:, :3], impl=impl,
            )  # fmt: skip
            state = merge_attention(first, second)
            return state.out, state.lse

        return run

    inputs["shift"] = torch.randn(16, device=DEVICE)
    tangents = tangents_of(inputs)
    wide, wide_tangents = ({n: t.double() for n, t in x.items()} for x in (inputs, tangents))
    exact = directional(merged("eager"), wide, wide_tangents)[1]
    for found, expected in zip(directional(merged("fused"), inputs, tangents)[1], exact, strict=True):
        assert error(found, expected) < 2e-6


def test_samples_of_a_packed_batch_move_as_if_alone() -> None:
    shapes, kernel_size = [(3, 4), (0, 2), (2, 3)], (2, 3)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    names = "query", "key", "value", "additional_keys", "additional_values"
    inputs = {name: draw(18, 4 if name == "query" else 2, 16) for name in names[:3]}
    inputs |= {name: draw(3, 2, 2, 16) for name in names[3:]} | {"sink": draw(4)}
    tangents = tangents_of(inputs)

    def packed(**tensors: Any) -> tuple[Tensor, Tensor]:
        return neighborhood_attention_varlen(
            **tensors, shapes=shapes, kernel_size=kernel_size, return_lse=True, impl="fused"
        )

    found = directional(packed, inputs, tangents)[1]
    first = 0
    for i, shape in enumerate(shapes):
        end = first + math.prod(shape)
        if end > first:

            def alone(x: Inputs, i: int = i, shape: tuple[int, int] = shape, part: slice = slice(first, end)) -> Inputs:
                tokens = {n: x[n][part].unflatten(0, shape)[None].double() for n in names[:3]}
                registers = {n: x[n][i : i + 1].double() for n in names[3:]}
                return {**tokens, **registers, "sink": x["sink"].double()}

            def one(**tensors: Any) -> tuple[Tensor, Tensor]:
                return neighborhood_attention(**tensors, kernel_size=kernel_size, return_lse=True, impl="eager")

            expected = directional(one, alone(inputs), alone(tangents))[1]
            for x, y in zip(found, expected, strict=True):
                assert error(x[first:end], y[0].flatten(0, 1)) < 2e-6
        first = end


# --- Normalisation and rotation of heads

PREPARATIONS = {
    "cosine-axial-gqa": ("cosine", AxialRoPE(16, 4, num_kv_heads=2), (3, 4), 16),
    "rms-text-partly": ("rms", RoPE(16), (9,), 24),
    "text-interleaved": (None, RoPE(16, interleaved=True), (9,), 16),
    "cosine": ("cosine", None, (3, 4), 40),
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_prepared_heads_have_tangents(name: str) -> None:
    """Of heads and gains together, of one head alone, and of one gain alone."""
    kind, rope, spatial, dim = PREPARATIONS[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    inputs = {"query": draw(2, *spatial, 4, dim), "key": draw(2, *spatial, 2, dim)}
    if kind is not None:
        inputs |= {f"{n}_gain": 2 + draw(h if kind == "cosine" else dim) for n, h in (("query", 4), ("key", 2))}
    angles = None if rope is None else angles_of(rope.to(DEVICE), inputs["query"], inputs["key"], None)

    def run(impl: Impl) -> Callable[..., tuple[Tensor, Tensor]]:
        def prepare(query: Tensor, key: Tensor, **gains: Tensor) -> tuple[Tensor, Tensor]:
            norm = None if kind is None else HeadNorm(kind, gains["query_gain"], gains["key_gain"])
            return normalize_and_rotate(query, key, norm, angles, impl=impl)

        return prepare

    tangents = tangents_of(inputs)
    for chosen in (tuple(inputs), ("key",), ("query_gain",)):
        given = {n: tangents[n] for n in chosen if n in tangents}
        if not given:
            continue
        wide = ({n: t.double() for n, t in x.items()} for x in (inputs, given))
        exact = directional(run("eager"), *wide)[1]
        peers = directional(run("eager"), inputs, given)[1]
        for found, expected, peer in zip(directional(run("fused"), inputs, given)[1], exact, peers, strict=True):
            assert error(found, expected) <= max(2 * error(peer, expected), 4e-7)


# --- What is not computed, and errors


def of_query(
    case: Case, impl: Impl = "fused", *, requires_grad: bool = True
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The output as a function of the query alone, a query, and a tangent. The key may need a gradient."""
    query, *rest = (t.detach() for t in make_inputs(case, DEVICE).values())
    rest[0].requires_grad_(requires_grad)
    names = list(make_inputs(case))[1:]
    call = attend(case, impl)
    return lambda q: call(query=q, **dict(zip(names, rest, strict=True)))[0], query, torch.ones_like(query)


PLAIN = Case("plain", (7,), 3, heads=2, kv_heads=1, head_dim=8, value_dim=8, batch=1)
FEW = replace(PLAIN, spatial=(4,))
"""for transforms that launch a kernel for each number of the query"""


def test_second_derivatives_say_that_they_are_missing() -> None:
    run, query, tangent = of_query(PLAIN)

    def slope(q: Tensor) -> Tensor:
        return jvp(run, (q,), (tangent,))[1]

    def gradient(q: Tensor) -> Tensor:
        return torch.func.grad(lambda x: run(x).square().sum())(q)

    for second in (
        lambda: slope(query).sum().backward(),
        lambda: jvp(slope, (query,), (tangent,)),
        lambda: torch.func.grad(lambda q: slope(q).sum())(query),
        lambda: jvp(gradient, (query,), (tangent,)),
    ):
        with raises_naming("second derivatives", 'impl="eager"', error=NotImplementedError):
            second()


def test_second_derivatives_on_the_eager_path() -> None:
    """The gradient of a squared tangent, against finite differences."""
    run, query, tangent = of_query(replace(PLAIN, dtype=torch.float64), "eager")
    query.requires_grad_()

    def loss(q: Tensor) -> Tensor:
        return jvp(run, (q,), (tangent.cos(),))[1].square().sum()

    assert torch.autograd.gradcheck(loss, query, fast_mode=True)


def test_tangents_of_tangents_on_the_eager_path() -> None:
    """Forward mode over forward mode, along the query and along the tangent, of which the first tangent is linear."""
    run, query, tangent = of_query(replace(PLAIN, dtype=torch.float64), "eager", requires_grad=False)
    along, step = tangent.cumsum(1).cos(), 1e-5

    def slope(q: Tensor, t: Tensor) -> Tensor:
        return jvp(run, (q,), (t,))[1]

    difference = (slope(query + step * along, tangent) - slope(query - step * along, tangent)) / (2 * step)
    assert error(jvp(slope, (query, tangent), (along, torch.zeros_like(tangent)))[1], difference) < 1e-7
    assert error(jvp(slope, (query, tangent), (torch.zeros_like(query), along))[1], slope(query, along)) < 1e-12


@pytest.mark.filterwarnings("ignore")  # torch's own, about what it traces
def test_linearized_functions_give_the_tangent() -> None:
    run, query, tangent = of_query(replace(PLAIN, dtype=torch.float64), "eager", requires_grad=False)
    assert error(torch.func.linearize(run, query)[1](tangent), jvp(run, (query,), (tangent,))[1]) < 1e-12


@pytest.mark.parametrize("impl", ["fused", "eager"])
def test_tangents_of_another_shape_dtype_or_device(impl: Impl) -> None:
    run, query, tangent = of_query(PLAIN, impl)
    with raises_naming("size", str(list(query.shape)), error=RuntimeError):  # torch's own message
        jvp(run, (query,), (tangent[:, 1:],))
    with raises_naming("tangent of query", "float64", "float32"):
        jvp(run, (query,), (tangent.double(),))
    with raises_naming("tangent of query", "meta", query.device.type):  # kernels would read what is not there
        jvp(run, (query,), (tangent.to("meta"),))


@pytest.mark.parametrize("name", ["query", "additional_keys", "additional_values", "sink", "rpb"])
def test_tangents_of_another_dtype_on_the_eager_path(name: str) -> None:
    """They would be converted in silence, or multiplied with tensors of another dtype."""
    case = replace(PLAIN, registers=2, sink="learned", dtype=torch.float16)
    inputs = {n: t.half() for n, t in detached(make_inputs(case)).items()} | {"rpb": torch.zeros(2, 5).half()}

    def call(**tensors: Any) -> tuple[Tensor, Tensor]:
        return neighborhood_attention(**tensors, kernel_size=3, return_lse=True, impl="eager")

    with raises_naming(f"tangent of {name}", "float32", "float16"):
        directional(call, inputs, {name: torch.ones_like(inputs[name], dtype=torch.float32)})


@pytest.mark.parametrize("number", [0, 1, 2])
def test_tangents_of_another_dtype_in_merged_states(number: int) -> None:
    """They would give the merged state tangents of that dtype, or be converted in silence."""
    names = "out", "row_max", "row_sum"
    inputs: dict[str, Any] = detached(make_inputs(PLAIN, DEVICE))
    first, second = (attention_state(**inputs, kernel_size=size) for size in (3, 2))

    def merged(moved: Tensor) -> Tensor:
        return merge_attention(first, second._replace(**{names[number]: moved})).out

    with raises_naming(f"tangent of {names[number]} of state 1", "float64", "float32"):
        jvp(merged, (second[number],), (second[number].double(),))


@pytest.mark.parametrize("name", ["query", "key", "value", "additional_keys", "additional_values", "sink"])
def test_tangents_of_another_dtype_over_a_cache(name: str) -> None:
    case = replace(PLAIN, registers=2, sink="learned")
    inputs = {n: t.half() for n, t in detached(make_inputs(case)).items()}
    positions = torch.arange(7)[None]

    def call(**tensors: Any) -> tuple[Tensor, Tensor]:
        return cached_attention(**tensors, query_positions=positions, key_positions=positions, return_lse=True)

    assert directional(call, inputs, {name: inputs[name]}).tangents[0].any()
    with raises_naming(f"tangent of {name}", "float32", "float16"):
        directional(call, inputs, {name: inputs[name].float()})


def test_a_scale_that_moves_is_refused() -> None:
    """It is read as a number, which would lose its tangent."""
    given: dict[str, Any] = detached(make_inputs(PLAIN, DEVICE)) | {"kernel_size": 3}
    scale = torch.tensor(0.5, device=DEVICE)
    with raises_naming("scale", "multiply a learned scale into the query"):
        jvp(lambda s: neighborhood_attention(**given, scale=s), (scale,), (torch.ones_like(scale),))


def test_tangents_that_are_known_to_be_zero() -> None:
    run, query, _ = of_query(PLAIN)
    zero = torch._C._VariableFunctions._efficientzerotensor(query.shape, device=DEVICE)  # pyright: ignore
    with forward_ad.dual_level():
        out = run(forward_ad.make_dual(query, zero))
        assert not tangent_in(out).any()


# --- Compositions of transforms

Of = Callable[[Tensor], Tensor]
Transform = Callable[[Of, Tensor], Tensor]
TINY = Case("tiny", (3,), 2, heads=2, kv_heads=1, head_dim=8, value_dim=8, sink="learned", batch=2)
FACTORS = [0.5, 1.5]


def slope(f: Of, x: Tensor) -> Tensor:
    return jvp(f, (x,), (torch.ones_like(x).cumsum(0) if x.ndim else torch.ones_like(x),))[1]


def squares(f: Of) -> Of:
    return lambda x: f(x).square().sum()


def dual_slope(f: Of, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return tangent_in(f(forward_ad.make_dual(x, torch.ones_like(x))))


def rows_of_jacobian(f: Of, x: Tensor) -> Tensor:
    """By the vmap of ``torch.autograd``, which is not that of ``torch.func``."""
    y = f(x.requires_grad_())
    return torch.autograd.grad(y, x, torch.eye(len(y), device=y.device, dtype=y.dtype)[:3], is_grads_batched=True)[0]


FIRST: dict[str, Transform] = {  # of a function of one number, on several
    "vmap": lambda f, xs: vmap(f)(xs),
    "vmap(jvp)": lambda f, xs: vmap(lambda x: slope(f, x))(xs),
    "jvp(vmap)": lambda f, xs: slope(vmap(f), xs),
    "dual(vmap)": lambda f, xs: dual_slope(vmap(f), xs),
    "jvp(vmap(vmap))": lambda f, xs: slope(vmap(vmap(f)), xs[:, None]),
    "linearize(vmap)": lambda f, xs: torch.func.linearize(vmap(f), xs)[1](xs.cos()),
    "jacfwd(vmap)": lambda f, xs: jacfwd(vmap(lambda x: f(x)[:2]))(xs),
    "grad(vmap)": lambda f, xs: grad(lambda xs: vmap(squares(f))(xs).sum())(xs),
    "vmap(grad)": lambda f, xs: vmap(grad(squares(f)))(xs),
}
SECOND: dict[str, Transform] = {
    "jvp(jvp)": lambda f, xs: slope(lambda x: slope(f, x), xs[0]),
    "jvp(grad)": lambda f, xs: slope(grad(squares(f)), xs[0]),
    "dual(grad)": lambda f, xs: dual_slope(grad(squares(f)), xs[0]),
    "grad(jvp)": lambda f, xs: grad(squares(lambda x: slope(f, x)))(xs[0]),
    "grad(grad)": lambda f, xs: grad(squares(grad(squares(f))))(xs[0]),
    "jacfwd(jacfwd)": lambda f, xs: jacfwd(jacfwd(f))(xs[0]),
    "hessian": lambda f, xs: hessian(squares(f))(xs[0]),
    "jacrev(jacrev)": lambda f, xs: jacrev(jacrev(squares(f)))(xs[0]),
    "linearize(grad)": lambda f, xs: torch.func.linearize(lambda x: grad(squares(f))(x).square(), xs[0])[1](xs[1]),
    "vmap(jvp(grad))": lambda f, xs: vmap(lambda x: slope(grad(squares(f)), x))(xs),
}


def of_factor(run: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, moves: tuple[str, ...]) -> Of:
    """Output and log-sum-exp as a function of a factor of some inputs."""
    return lambda x: torch.cat([t.flatten() for t in run(**inputs | {name: inputs[name] * x for name in moves})])


def factored(impl: Impl, moves: tuple[str, ...]) -> tuple[Of, Tensor]:
    """:func:`of_factor` in fp32, and factors."""
    inputs = detached(make_inputs(TINY, DEVICE))
    return of_factor(attend(TINY, impl), inputs, moves), torch.tensor(FACTORS, device=DEVICE)


def exact_of_factor(transform: Transform, moves: tuple[str, ...]) -> Tensor:
    wide = {name: t.double() for name, t in detached(make_inputs(TINY)).items()}
    return transform(of_factor(definition(TINY), wide, moves), torch.tensor(FACTORS, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")  # torch's own, about its loops over samples and what it traces
@pytest.mark.parametrize("impl", ["fused", "eager"])
@pytest.mark.parametrize("name", [*FIRST, "jvp(vmap), sink", "grad(vmap), sink"])
def test_transforms_over_samples(name: str, impl: Impl) -> None:
    """A mapped axis becomes a part of the batch, which cannot be for a sink."""
    name, *others = name.split(", ")
    moves = ("key", "value", *others)
    assert error(FIRST[name](*factored(impl, moves)), exact_of_factor(FIRST[name], moves)) < 3e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_by_every_transform(name: str) -> None:
    moves = ("key",)
    assert error(SECOND[name](*factored("eager", moves)), exact_of_factor(SECOND[name], moves)) < 1e-5
    with raises_naming("the fused kernels do not have", 'impl="eager"', error=NotImplementedError):
        SECOND[name](*factored("fused", moves))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_jacobians_that_autograd_vectorizes() -> None:
    moves = ("query", "key")
    run, factors = factored("fused", moves)
    expected = exact_of_factor(lambda f, xs: jacrev(lambda x: f(x)[:3])(xs[0]), moves)
    assert error(rows_of_jacobian(run, factors[0]), expected) < 3e-6
    with raises_naming("vectorize=True", "torch.func.jacrev", error=NotImplementedError):
        rows_of_jacobian(factored("eager", moves)[0], factors[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_jacobians_that_autograd_vectorizes_in_forward_mode() -> None:
    run, query, _ = of_query(FEW, requires_grad=False)

    def jacobian() -> Any:
        return torch.autograd.functional.jacobian(run, query, vectorize=True, strategy="forward-mode")

    expected = jacfwd(run)(query)
    assert error(jacobian(), expected) < 1e-6
    with torch.no_grad():
        assert error(jacobian(), expected) < 1e-6


@pytest.mark.parametrize("moves", ["query", "gains"])
@pytest.mark.parametrize("positions", ["shared", "of-each-image"])
def test_prepared_heads_of_samples(moves: str, positions: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, gain = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((2, 3, 2, 8), (2, 3, 1, 8), 8))
    places = torch.arange(3, device=DEVICE) if positions == "shared" else torch.arange(6, device=DEVICE).view(2, 3)
    angles = angles_of(RoPE(8).to(DEVICE), query, key, places)

    def run(x: Tensor) -> Tensor:
        factors = (x, 1.0) if moves == "query" else (1.0, x)
        norm = HeadNorm("rms", gain * factors[1], gain)
        prepared = normalize_and_rotate(query + factors[0], key, norm, angles, impl="fused")
        return torch.cat([t.flatten() for t in prepared])

    xs = torch.tensor(FACTORS, device=DEVICE)
    steps = torch.ones_like(xs).cumsum(0)
    assert error(vmap(run)(xs), torch.stack([run(x) for x in xs])) < 1e-6
    each = [jvp(run, (x,), (step,))[1] for x, step in zip(xs, steps, strict=True)]
    assert error(jvp(vmap(run), (xs,), (steps,))[1], torch.stack(each)) < 1e-6


def test_samples_of_packed_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 5, 1, 8, generator=generator).to(DEVICE) for _ in "qkv")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = neighborhood_attention_varlen(q, k, v, shapes=[(2,), (3,)], kernel_size=2, impl="fused")
        assert isinstance(out, Tensor)
        return out

    each = torch.stack([run(*sample) for sample in zip(query, key, value, strict=True)])
    assert error(vmap(run)(query, key, value), each) < 1e-6
    tangents = query.cos(), key.cos(), value.cos()
    moved = jvp(vmap(run), (query, key, value), tangents)[1]
    for i, tangent in enumerate(moved):
        assert error(tangent, jvp(run, (query[i], key[i], value[i]), tuple(t[i] for t in tangents))[1]) < 1e-6


# --- What is not finite


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, which interprets the kernels
@pytest.mark.parametrize("impl", ["eager", "fused"])
@pytest.mark.parametrize(
    ("where", "value"),
    [("key", math.nan), ("key", math.inf), ("value", math.nan), ("key tangent", math.inf), ("value tangent", math.nan)],
)
def test_nonfinite_tokens_reach_the_tangents_of_those_that_see_them(where: str, value: float, impl: Impl) -> None:
    """On the eager path they reach no others; on the fused one no other image or head."""
    case = Case("nonfinite", (9,), 3, heads=2, kv_heads=2, head_dim=8, value_dim=8, batch=2)
    inputs = detached(make_inputs(case, DEVICE))
    tangents = tangents_of(inputs)
    name, *of_tangent = where.split()
    broken = inputs[name].clone(), tangents[name].clone()
    broken[len(of_tangent)][0, 4, 0, 3] = value
    given = inputs | {name: broken[0]}, tangents | {name: broken[1]}
    seeing, same_head = torch.zeros(2, 2, 9, 2, dtype=torch.bool, device=DEVICE)
    seeing[0, 3:6, 0] = True
    same_head[0, :, 0] = True
    clean, found = (directional(attend(case, impl), *x)[1] for x in ((inputs, tangents), given))
    spared = ~(seeing if impl == "eager" else same_head)
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[spared], y[spared])
    assert not found[0][seeing].isfinite().all(-1).any()
    assert found[1].isfinite().all() if name == "value" else not found[1][seeing].isfinite().any()


# --- The compiler


keeps_dual_levels = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13",
    reason="compiled code leaves the dual level where its graph breaks: no tangent, or None",
)


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def tangent_of(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda q, t: jvp(run, (q,), (t,))[1]


def dual_tangent_of(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def tangent(q: Tensor, t: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return tangent_in(run(forward_ad.make_dual(q, t)))

    return tangent


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's look
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "transform", [tangent_of, pytest.param(dual_tangent_of, marks=keeps_dual_levels)], ids=["jvp", "dual"]
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_tangents_are_the_uncompiled_ones(backend: str, transform: Callable[..., Any]) -> None:
    """Whether a function that takes the tangent is compiled, or the one that it differentiates."""
    run, query, tangent = of_query(PLAIN, requires_grad=transform is tangent_of)
    expected = transform(run)(query, tangent.cos())
    assert expected.abs().max() > 0.1
    for compiled in (torch.compile(transform(run), backend=backend), transform(torch.compile(run, backend=backend))):
        assert error(compiled(query, tangent.cos()), expected) < 1e-6


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_duals_that_need_gradients_raise() -> None:
    """Torch's compiled graphs have no forward mode if they have gradients, and say so."""
    run, query, tangent = of_query(PLAIN)
    with raises_naming("forward mode", error=NotImplementedError):
        torch.compile(dual_tangent_of(run), backend="aot_eager")(query, tangent)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_with_fused_tangents_says_why_there_is_none() -> None:
    run, query, tangent = of_query(PLAIN)
    with raises_naming("forward-mode derivative of the fused kernels", error=Unsupported):
        torch.compile(tangent_of(run), backend="eager", fullgraph=True)(query, tangent)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_the_eager_path_compiles_into_one_graph() -> None:
    run, query, tangent = of_query(PLAIN, "eager")
    found = torch.compile(tangent_of(run), backend="eager", fullgraph=True)(query, tangent)
    assert error(found, tangent_of(run)(query, tangent)) < 1e-6


# --- Training steps: the loss has a tangent in its target, through which no gradient flows

Run = Callable[[Tensor], Tensor]
Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def one_pass(run: Run, x: Tensor, v: Tensor) -> Tensor:
    out, tangent = jvp(run, (x,), (v,))
    return (out - (v - 0.3 * tangent).detach()).square().mean()


def two_passes(run: Run, x: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        tangent = jvp(run, (x,), (v,))[1]
    return (run(x) - (v - 0.3 * tangent)).square().mean()


def as_functional_call(run: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    parameters: dict[str, Tensor] = dict(run.named_parameters())

    def with_aux(x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.func.functional_call(run, parameters, (x,))
        return out, out.detach()

    results: tuple[Any, ...] = torch.func.jvp(with_aux, (x,), (v,), has_aux=True)
    out, tangent, aux = results
    assert torch.equal(aux, out)
    return (out - (v - 0.3 * tangent).detach()).square().mean()


@pytest.fixture
def fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take the fused kernels on any device. Otherwise they do so on CUDA devices only."""
    why = operations.why_eager
    monkeypatch.setattr(operations, "why_eager", lambda impl, *args: why("fused" if impl == "auto" else impl, *args))


class Block(nn.Module):
    """A layer with the options that forward mode meets on its way, behind a projection."""

    def __init__(self, *, checkpoints: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpoints, self.inner = checkpoints, nn.Linear(16, 16)
        self.attention = NeighborhoodGQA(16, 2, 3, num_kv_heads=1, num_registers=2, sink="learned", qk_norm="rms")

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        saves = self.checkpoints and torch.is_grad_enabled()  # without gradients, torch 2.12 has no rule for tangents
        return checkpoint(self.attention, x, use_reentrant=False) if saves else self.attention(x)


def gradients(step: Step, dtype: torch.dtype = torch.float32, **options: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    model = Block(**options).to(DEVICE, dtype)
    x, v = (torch.randn(1, 4, 5, 16, generator=generator).to(DEVICE, dtype) for _ in "xv")
    return list(torch.autograd.grad(step(model, x, v), list(model.parameters())))


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def exact() -> list[Tensor]:
    """Gradients in fp64, on the eager path."""
    return gradients(one_pass, torch.float64)


def checkpointed(run: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    loss = checkpoint(lambda x, v: one_pass(run, x, v), x, v, use_reentrant=False)
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.usefixtures("fused_layers")
@pytest.mark.parametrize("step", [one_pass, two_passes, as_functional_call, checkpointed])
def test_training_steps_have_the_gradients_of_the_eager_path(step: Step, exact: list[Tensor]) -> None:
    assert largest(gradients(step), exact) < 1e-5


@pytest.mark.usefixtures("fused_layers")
def test_checkpointed_layers_take_two_passes(exact: list[Tensor]) -> None:
    assert largest(gradients(two_passes, checkpoints=True), exact) < 1e-5


@pytest.mark.filterwarnings("ignore")  # torch's own, about what it traces
@pytest.mark.parametrize("impl", ["fused", "eager"])
def test_linearized_layers_have_parameters(impl: Impl, request: pytest.FixtureRequest) -> None:
    """Torch traces their tangents as operations on what parameters give, which autograd watches."""
    model, (x, v) = Block().to(DEVICE), torch.randn(2, 1, 4, 5, 16, device=DEVICE)
    expected = jvp(model, (x,), (v,))[1]
    if impl == "fused":
        request.getfixturevalue("fused_layers")
    tangent = torch.func.linearize(model, x)[1](v)
    assert error(tangent, expected) < 2e-6
    if impl == "fused":
        with raises_naming("second derivatives", 'impl="eager"', error=NotImplementedError):
            tangent.sum().backward()


def test_a_target_without_its_tangent_would_be_noticed(exact: list[Tensor]) -> None:
    assert largest(gradients(lambda run, x, v: (run(x) - v).square().mean()), exact) > 0.01


def test_training_steps_under_autocast(exact: list[Tensor]) -> None:
    """On a CPU the eager path computes them, as bf16 is not interpreted."""
    for step in (one_pass, two_passes):
        with torch.autocast(DEVICE, torch.bfloat16):
            found = gradients(step)
        assert largest(found, exact) < 0.05


# --- Models, whose tangents are compared with finite differences


def differs_from_slope(run: Run, x: Tensor) -> float:
    """Relative error of a tangent against a central difference, both in fp64."""
    v, step = torch.randn_like(x), 1e-5
    tangent = jvp(run, (x,), (v,))[1]
    assert tangent.norm() > 0.1
    with torch.no_grad():
        return error(tangent, (run(x + step * v) - run(x - step * v)) / (2 * step))


def randomized(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval().to(DEVICE)


def test_tangents_of_an_image_model() -> None:
    torch.manual_seed(0)
    fine = LevelConfig(1, 32, d_head=8, kernel_size=3, num_kv_heads=2, num_registers=2, sink="learned")
    coarse = LevelConfig(1, 32, "global", d_head=16, num_kv_heads=1, sink="zero")
    model = randomized(HDiT(HDiTConfig((fine, coarse), patch_size=(2, 2), mapping_width=16, mapping_depth=1)))
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64, device=DEVICE)
    sigma = torch.tensor([0.7], dtype=torch.float64, device=DEVICE)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    assert differs_from_slope(lambda x: model(x, sigma), x) < 1e-7
    assert differs_from_slope(lambda s: torch.func.functional_call(model, parameters, (x, s)), sigma) < 1e-7


def test_tangents_of_a_language_model() -> None:
    torch.manual_seed(0)
    config = DecoderLMConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        windows=(3, None), num_registers=2, sink="learned", qk_norm=True,
    )  # fmt: skip
    model = randomized(DecoderLM(config))
    tokens = torch.arange(9, device=DEVICE)[None]
    name = "model.embed_tokens.weight"
    table = model.get_parameter(name).detach()

    def run(weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: weight}, (tokens,))

    assert differs_from_slope(run, table) < 1e-7


@pytest.mark.gpu
def test_memory_beyond_the_results_is_that_of_statistics() -> None:
    q, k, v = (torch.randn(1, 128, 128, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    call = attend(Case("memory", (128, 128), 13), "fused")
    inputs = {"query": q, "key": k, "value": v}
    directional(call, inputs, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = directional(call, inputs, inputs)
    held = torch.cuda.max_memory_allocated() - before
    statistics = q[..., 0].numel() * 4
    # Output and tangent, row_max, row_sum, both lse, and temporaries of their size.
    assert held <= 2 * q.numel() * 2 + 8 * statistics
    assert len(results) == 2
