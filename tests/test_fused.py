"""The fused kernels against the fp64 oracle: small cases in Triton's interpreter, all cases on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import CASES, Case, arguments, assert_close, assert_nan_stays, enlarge, error, make_inputs, oracle, run
from torch import Tensor

from natten_layers import attention_state, merge_attention, neighborhood_attention

pytest.importorskip("triton")

from natten_layers.kernels.host.problem import Inputs, Layout, Options, contiguous, problem_of
from natten_layers.kernels.portable import dkv, dq, forward

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# These tests run interpreted without a GPU. With one, they run compiled and have the mark "gpu".
pytestmark = [pytest.mark.gpu] if ON_GPU else []

RUNS_HERE = [case for case in CASES if case.dtype != torch.float64]
if not ON_GPU:  # the interpreter cannot multiply bfloat16 matrices, and it is slow
    RUNS_HERE = [
        replace(case, batch=1) if len(case.spatial) == 3 else case for case in RUNS_HERE if case.dtype != torch.bfloat16
    ]


def check(case: Case) -> None:
    inputs = make_inputs(case, DEVICE)
    wide = oracle(case, inputs)
    assert_close(case, run(case, inputs, "fused"), wide, run(case, inputs, "eager"))


@pytest.mark.parametrize("case", RUNS_HERE, ids=str)
def test_matches_the_oracle_forward_and_backward(case: Case) -> None:
    check(case)


SHAPES = (
    Case("mha-2d", (30, 37), 7, head_dim=64, value_dim=64),
    Case("gqa-2d", (33, 20), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, registers=16, sink="learned"),
    Case("group-3", (19, 23), (5, 7), heads=6, kv_heads=2, head_dim=64, value_dim=64),
    Case("group-16", (19, 23), 5, heads=16, kv_heads=1, head_dim=64, value_dim=64, registers=70),
    Case("13x13", (32, 32), 13, heads=6, kv_heads=3, head_dim=64, value_dim=64),
    Case("large-2d", (40, 48), (24, 32), head_dim=128, value_dim=128, batch=1),
    Case("large-2d-stride", (41, 50), (24, 32), (8, 16), head_dim=64, value_dim=64, batch=1, sink="zero"),
    Case("large-3d", (10, 16, 18), (6, 10, 12), head_dim=64, value_dim=64, batch=1),
    Case("large-3d-causal", (12, 16, 18), (7, 9, 10), 1, 1, (True, False, False), head_dim=128, value_dim=128, batch=1),
    Case("sliding-window", (1000,), 600, is_causal=True, heads=8, kv_heads=2, head_dim=128, value_dim=128, batch=1),
    Case("sliding-window-sinks", (777,), 128, is_causal=True, heads=16, kv_heads=2, head_dim=64, value_dim=64,
         sink="learned", registers=4),
    Case("dilated", (64, 70), (7, 9), (2, 1), (3, 4), head_dim=32, value_dim=32),
    Case("full-causal", (300,), 300, is_causal=True, heads=4, kv_heads=4, head_dim=64, value_dim=64),
    *(Case(f"head-dim-{d}", (17, 19), 5, heads=4, kv_heads=2, head_dim=d, value_dim=d, registers=3, sink="zero")
      for d in (8, 32, 40, 80, 96, 128, 192, 256)),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_matches_the_oracle_at_real_shapes(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


def qkv_views(case: Case, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = case.heads + 2 * case.kv_heads
    q, k, v = qkv.unflatten(-1, (heads, case.head_dim)).split((case.heads, case.kv_heads, case.kv_heads), -2)
    return q, k, v


def test_reads_views_of_a_fused_projection() -> None:
    case = Case("views", (9, 10), 3, heads=4, kv_heads=2)
    qkv = torch.randn(2, 9, 10, 8 * 16, device=DEVICE)
    q, k, v = qkv_views(case, qkv)
    assert not q.is_contiguous()
    fused = neighborhood_attention(q, k, v, 3, impl="fused")
    copied = neighborhood_attention(q.contiguous(), k.contiguous(), v.contiguous(), 3, impl="fused")
    assert torch.equal(fused, copied)
    assert error(fused, neighborhood_attention(q.double(), k.double(), v.double(), 3, impl="eager")) < 1e-6


def test_grouped_heads_equal_repeated_heads() -> None:
    """Grouped heads, which are read unrepeated, give the same outputs and gradients as repeated ones."""
    case = Case("group", (7, 8), 5, heads=4, kv_heads=2, registers=2, sink="learned")
    inputs = make_inputs(case, DEVICE)
    grouped = run(case, inputs, "fused")
    names = ("key", "value", "additional_keys", "additional_values")
    repeated = run(case, {n: t.repeat_interleave(2, -2) if n in names else t for n, t in inputs.items()}, "fused")
    assert error(grouped.out, repeated.out) < 1e-6
    for name, grad in grouped.grads.items():
        other = repeated.grads[name]
        if name in names:
            other = other.unflatten(-2, (2, 2)).sum(-2)
        assert error(grad, other) < 2e-6, name


def test_stride_zero_forms_agree() -> None:
    case = Case("forms", (8, 9), 3, heads=4, kv_heads=2)
    q, k, v = (t.detach() for t in make_inputs(case, DEVICE).values())
    expected = neighborhood_attention(q, k, v, 3, impl="fused")
    expand = (-1, -1, -1, -1, 2, -1)
    grouped = neighborhood_attention(
        q.unflatten(-2, (2, 2)), k[..., None, :].expand(expand), v[..., None, :].expand(expand), (3, 3), impl="fused"
    )
    assert torch.equal(grouped.flatten(-3, -2), expected)
    one_k, one_v = k[..., :1, :], v[..., :1, :]
    multi_query = neighborhood_attention(q, one_k.expand_as(q), one_v.expand_as(q), 3, impl="fused")
    assert torch.equal(multi_query, neighborhood_attention(q, one_k, one_v, 3, impl="fused"))


def test_an_expanded_sink_is_read_as_such() -> None:
    q, k, v = make_inputs(Case("expanded", (5, 6), 3, heads=4), DEVICE).values()
    sink = torch.full((1,), 2.0, device=DEVICE)
    expected = neighborhood_attention(q, k, v, 3, sink=2.0, impl="fused")
    assert torch.equal(neighborhood_attention(q, k, v, 3, sink=sink.expand(4), impl="fused"), expected)


def test_merging_a_register_branch_equals_registers_in_the_kernel() -> None:
    """The states of both branches merge exactly, and so do the gradients through the merge."""
    case = Case("merge", (7, 9), 3, heads=4, kv_heads=2, registers=3, sink="learned")
    inputs = make_inputs(case, DEVICE)
    q, k, v, rk, rv, sink = inputs.values()
    whole = neighborhood_attention(
        q, k, v, 3, additional_keys=rk, additional_values=rv, sink=sink, return_lse=True, impl="fused"
    )
    window = attention_state(q, k, v, 3, sink=sink, impl="fused")
    scores = torch.einsum("bhwngd,brnd->bhwngr", q.unflatten(-2, (2, 2)), rk).flatten(3, 4) * 16**-0.5
    row_max = scores.amax(-1).detach()
    weights = torch.exp(scores - row_max[..., None])
    row_sum = weights.sum(-1)
    registers = torch.einsum("bhwngr,brnd->bhwngd", weights.unflatten(3, (2, 2)), rv).flatten(3, 4) / row_sum[..., None]
    merged = merge_attention(window, (registers, row_max, row_sum))
    assert error(merged.out, whole[0]) < 1e-6
    assert error(merged.lse, whole[1]) < 1e-6
    cotangents = [torch.randn_like(t) for t in whole]
    expected = torch.autograd.grad(whole, tuple(inputs.values()), cotangents)
    actual = torch.autograd.grad((merged.out, merged.lse), tuple(inputs.values()), cotangents)
    for name, a, e in zip(inputs, actual, expected, strict=True):
        assert error(a, e) < 3e-6, name


EXTREMES = (
    Case("2d", (5, 6), 3, heads=4),
    Case("1d-causal-registers", (9,), 4, is_causal=True, heads=4, registers=3),
    Case("2d-border", (20, 33), (16, 32), heads=2, kv_heads=1, batch=1),
)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to -inf, whose weight is 0
@pytest.mark.parametrize("exponent", [32, 112])
@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_scores_may_be_as_large_as_fp32_holds(case: Case, exponent: int) -> None:
    """A GPU fuses the scaling with the subtraction of the maximum, which is too inexact for scores from 2^30 on."""
    inputs = enlarge({name: t.detach() for name, t in make_inputs(case, DEVICE).items()}, exponent)
    expected = oracle(case, {name: t.requires_grad_() for name, t in inputs.items()})
    with torch.no_grad():
        out, lse = neighborhood_attention(**arguments(case, inputs), return_lse=True, impl="fused")
    assert expected.lse.abs().min() > 1e8
    assert error(out, expected.out) < 1e-6
    assert error(lse, expected.lse) < 1e-6


@pytest.mark.parametrize("scale", [1e-50, 1e-40, 5e-39])
def test_a_scale_that_fp32_does_not_hold_gives_every_key_the_same_weight(scale: float) -> None:
    case = Case("tiny", (5, 6), 3, heads=4, kv_heads=2, registers=2, sink="learned", scale=scale)
    inputs = make_inputs(case, DEVICE)
    actual, expected = run(case, inputs, "fused").tensors(), oracle(case, inputs).tensors()
    for name in ("out", "lse", "grad of value", "grad of additional_values", "grad of sink"):
        assert error(actual[name], expected[name]) < 2e-6, name
    for name in ("grad of query", "grad of key", "grad of additional_keys"):
        assert actual[name].abs().max() < 1e-36, name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["key", "value"])
def test_what_is_not_finite_stays_in_its_windows(name: str, value: float) -> None:
    case = Case("nan", (9, 12), 3)
    inputs = {n: t.detach() for n, t in make_inputs(case, DEVICE).items()}
    q, k, v = inputs.values()
    clean = neighborhood_attention(q, k, v, 3, impl="fused")
    inputs[name][0, 4, 5] = value
    dirty = neighborhood_attention(q, k, v, 3, impl="fused")
    seen = torch.zeros(2, 9, 12, dtype=torch.bool)
    seen[0, 3:6, 4:7] = True
    assert not dirty[seen].isfinite().all(-1).any()
    torch.testing.assert_close(dirty[~seen], clean[~seen], rtol=1e-5, atol=1e-6)


def test_takes_gradients_whose_last_axis_is_not_contiguous() -> None:
    case = Case("transposed", (5, 6), 3, heads=4, kv_heads=2, registers=2)
    inputs = make_inputs(case, DEVICE)
    out = neighborhood_attention(**arguments(case, inputs), impl="fused")
    grad = torch.randn(*out.shape[:-2], out.shape[-1], out.shape[-2], device=DEVICE).transpose(-1, -2)
    assert grad.stride(-1) != 1
    leaves = tuple(inputs.values())
    expected = torch.autograd.grad(out, leaves, grad.contiguous(), retain_graph=True)
    for name, actual, wanted in zip(inputs, torch.autograd.grad(out, leaves, grad), expected, strict=True):
        assert torch.equal(actual, wanted), name


FAR = 2**30 + 8
"""Elements between two tokens: the third token starts beyond what a 32-bit offset reaches."""


def far(tensor: Tensor) -> Tensor:
    """A copy of ``[1, L, H, D]`` with its tokens far apart. Memory between them is untouched, so it costs nothing."""
    _, length, heads, dim = tensor.shape
    storage = torch.empty((length - 1) * FAR + heads * dim, dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided((1, length, heads, dim), (length * FAR, FAR, dim, 1)).copy_(tensor)


@pytest.mark.parametrize("name", ["query", "key", "value", "grad_out", "out"])
@pytest.mark.parametrize("kernel", ["query", "key"])
def test_every_tensor_of_a_gradient_decides_how_wide_offsets_are(name: str, kernel: str) -> None:
    shape = (1, 4, 2, 16)
    near, away = contiguous(shape), Layout(shape, (4 * FAR, FAR, 16, 1))
    inputs = Inputs(*(torch.empty(shape) for _ in range(3)))
    problem = problem_of(inputs, Options(None, (3,), (1,), (1,), (False,), 1.0))

    def is_wide(grad_out: Layout) -> bool:
        plan = dkv.key_plan(problem, grad_out) if kernel == "key" else dq.query_plan(problem, grad_out, None)
        return plan.launch.options["SPEC"].wide

    assert not is_wide(near)
    if name == "out":  # only a new result can be large here: an image of 2^30 values of one head
        shape = (1, 2**20, 1, 2**10)
        narrow = Layout(shape, (0, 0, 0, 1))
        problem = problem._replace(query=narrow, key=narrow, value=narrow)
        away = narrow
    elif name != "grad_out":
        problem, away = problem._replace(**{name: away}), near
    assert is_wide(away)
    if name != "grad_out":
        assert forward.plan(problem, True).launch.options["SPEC"].wide


@pytest.mark.parametrize("periodic", [False, True])
def test_reads_tensors_whose_tokens_lie_far_apart(periodic: bool) -> None:
    """Inputs and the output's gradient may be views of much larger tensors, with offsets beyond 32 bits."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 3, 2, 16, generator=draw).half().to(DEVICE) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = neighborhood_attention(q, k, v, 2, is_periodic=periodic, impl="fused")
    expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    for actual, wanted in zip(torch.autograd.grad(out, leaves, far(grad)), expected, strict=True):
        assert torch.equal(actual, wanted)
    with torch.no_grad():
        for inputs in ((far(q), k, v), (q, far(k), v), (q, k, far(v))):
            assert torch.equal(neighborhood_attention(*inputs, 2, is_periodic=periodic, impl="fused"), out)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize(
    "case",
    [
        Case("video", (2, 2, 4), (2, 1, 3), 1, 1, (True, False, False)),
        Case("text", (9,), 3, heads=4, sink="learned", registers=1),
    ],
    ids=str,
)
def test_nan_reaches_no_other_image_and_no_other_head(case: Case) -> None:
    assert_nan_stays(case, make_inputs(case, DEVICE))


def test_gradients_are_bitwise_reproducible() -> None:
    case = Case("again", (7, 8), 5, heads=4, kv_heads=2, registers=3, sink="learned")
    inputs = make_inputs(case, DEVICE)
    first, second = (run(case, inputs, "fused") for _ in range(2))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_saved_tensors_may_come_back_with_other_strides() -> None:
    """``torch.autograd.graph.save_on_cpu`` changes strides, so the backward pass must read them again."""

    def gradient() -> tuple[Tensor, ...]:
        qkv = torch.linspace(-1, 1, 2 * 9 * 6 * 16, device=DEVICE).view(2, 9, 6, 16).sin().requires_grad_()
        query, key, value = qkv.split((2, 2, 2), -2)
        out = neighborhood_attention(query, key, value, 3, impl="fused")
        return torch.autograd.grad(out.square().sum(), qkv)

    def copied(saved: Tensor) -> Tensor:
        return saved.clone(memory_format=torch.contiguous_format)

    expected = gradient()
    with torch.autograd.graph.saved_tensors_hooks(copied, lambda saved: saved):
        assert torch.equal(gradient()[0], expected[0])


def test_double_backward_says_that_it_is_missing() -> None:
    q, k, v = make_inputs(Case("twice", (6, 6), 3), DEVICE).values()
    out = neighborhood_attention(q, k, v, 3, impl="fused")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_runs_under_deterministic_algorithms() -> None:
    check(replace(SHAPES[1], dtype=torch.bfloat16))


@pytest.mark.gpu
def test_replays_in_a_graph_forward_and_backward() -> None:
    inputs = make_inputs(replace(SHAPES[0], dtype=torch.bfloat16), DEVICE)
    recorded = [inputs[name] for name in ("query", "key", "value")]

    def step(leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        query, key, value = leaves
        out = neighborhood_attention(query, key, value, SHAPES[0].kernel_size, impl="fused")
        return out, *torch.autograd.grad(out, leaves, out.detach())

    def leaves() -> list[torch.Tensor]:  # new ones each step: torch warns about gradients from two streams
        return [t.detach().clone().requires_grad_() for t in recorded]

    step(leaves())  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(recorded)
    with torch.no_grad():
        for t in recorded:
            t.copy_(torch.randn_like(t))
    expected = step(leaves())
    graph.replay()
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", SHAPES[:2], ids=str)
def test_tensors_need_not_be_on_the_current_device(case: Case) -> None:
    here, there = (run(case, make_inputs(case, f"cuda:{i}"), "fused").tensors() for i in range(2))
    assert torch.cuda.current_device() == 0
    for name, tensor in here.items():
        assert torch.equal(tensor.cpu(), there[name].cpu()), name


@pytest.mark.gpu
def test_tensors_beyond_two_to_the_31_elements() -> None:
    """Offsets are 64-bit: a single image of 2.2e9 elements, checked on its last rows, which 32 bits cannot reach."""
    height, width, dim = 1056, 8192, 256
    qkv = torch.randn(1, height, width, 1, dim, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    out = neighborhood_attention(qkv, qkv, qkv, 3, impl="fused")
    tail = qkv[:, -8:, -64:]
    expected = neighborhood_attention(tail.double(), tail.double(), tail.double(), 3, impl="eager")
    assert error(out[:, -4:, -32:], expected[:, -4:, -32:]) < 1e-2
