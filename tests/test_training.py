"""Training with autocast, activation checkpointing and mixed dtypes, and the memory that a call may allocate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import Case, error, make_inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from natten_layers import NeighborhoodGQA, neighborhood_attention

MIB = 1 << 20


def make_layer(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return NeighborhoodGQA(32, 4, 3, num_kv_heads=2, num_registers=2, sink="learned", qk_norm="cosine").to(device)


def gradients(layer: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    out = function(x)
    inputs = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(out.float().square().sum(), tuple(inputs.values()))
    return {"out": out, **dict(zip(inputs, grads, strict=True))}


def check_autocast(device: str) -> None:
    """Parameters stay fp32, registers are fp32 until they are projected; the result is that of single precision."""
    layer = make_layer(device)
    x = torch.randn(2, 6, 7, 32, device=device, requires_grad=True)
    single = gradients(layer, layer, x)
    with torch.autocast(device, torch.bfloat16):
        mixed = gradients(layer, layer, x)
    assert mixed["out"].dtype == torch.bfloat16
    for name, tensor in mixed.items():
        assert name == "out" or tensor.dtype == torch.float32, name
        assert 0.0 < error(tensor, single[name]) < 3e-2, name  # a few roundings of 2^-9


def test_autocast() -> None:
    check_autocast("cpu")


@pytest.mark.gpu
def test_autocast_on_a_gpu() -> None:
    check_autocast("cuda")


def check_checkpointing(device: str, use_reentrant: bool) -> None:
    layer = make_layer(device)
    x = torch.randn(2, 6, 7, 32, device=device, requires_grad=True)

    def through_backward(function: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        layer.zero_grad()
        x.grad = None
        function(x).square().sum().backward()  # reentrant checkpoints do not serve autograd.grad
        return [t.grad for t in (x, *layer.parameters())]

    def recomputing(x: Tensor) -> Tensor:
        out = checkpoint(layer, x, use_reentrant=use_reentrant)
        assert isinstance(out, Tensor)
        return out

    for plain, actual in zip(through_backward(layer), through_backward(recomputing), strict=True):
        assert plain is not None
        assert actual is not None
        assert torch.equal(plain, actual)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    check_checkpointing("cpu", use_reentrant)


@pytest.mark.gpu
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_on_a_gpu(use_reentrant: bool) -> None:
    check_checkpointing("cuda", use_reentrant)


@pytest.mark.gpu
def test_gradients_repeat_bitwise_at_a_real_size() -> None:
    case = Case("repeat", (48, 40), 7, heads=8, kv_heads=2, head_dim=64, value_dim=64, registers=16, sink="learned",
                dtype=torch.bfloat16)  # fmt: skip
    inputs = make_inputs(case, "cuda")
    q, k, v, registers, values, sink = inputs.values()
    runs = []
    for _ in range(3):
        out = neighborhood_attention(
            q, k, v, 7, additional_keys=registers, additional_values=values, sink=sink, impl="fused"
        )
        runs.append(torch.autograd.grad(out.float().square().sum(), tuple(inputs.values())))
    for again in runs[1:]:
        for name, first, other in zip(inputs, runs[0], again, strict=True):
            assert torch.equal(first, other), name


def draw_tokens(side: int, requires_grad: bool) -> list[Tensor]:
    """Query, key and value of 8 and 2 heads of 64 channels, over ``side * side`` tokens."""
    return [
        torch.randn(2, side, side, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=requires_grad)
        for heads in (8, 2, 2)
    ]


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_over(function: Callable[[], object]) -> int:
    """Peak of allocated bytes during a call, beyond what was allocated before it."""
    function()  # compiles the kernels
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


@pytest.mark.gpu
@pytest.mark.parametrize("return_lse", [False, True])
def test_inference_allocates_its_results(return_lse: bool) -> None:
    """Inference allocates its output, row statistics and lse if requested, and at most 1 MiB more."""
    q, k, v = draw_tokens(128, requires_grad=False)
    statistics = 4 * q.numel() // q.shape[-1]

    def infer() -> Tensor | tuple[Tensor, Tensor]:
        if return_lse:
            return neighborhood_attention(q, k, v, 13, return_lse=True, impl="fused")
        return neighborhood_attention(q, k, v, 13, impl="fused")

    # row_max and row_sum, log(row_sum) and their sum
    assert peak_over(infer) <= size(q) + (4 * statistics if return_lse else 0) + MIB


@pytest.mark.gpu
@pytest.mark.parametrize("side", [96, 192])
def test_training_allocates_no_workspace(side: int) -> None:
    """Training holds inputs, results, gradients, row statistics and delta, plus 5 %: nothing of tokens x window."""
    q, k, v = draw_tokens(side, requires_grad=True)
    grad_out = torch.randn_like(q)
    statistics = 4 * q.numel() // q.shape[-1]

    def train() -> tuple[Tensor, ...]:
        out = neighborhood_attention(q, k, v, 13, impl="fused")
        return torch.autograd.grad(out, (q, k, v), grad_out)

    held = size(q, k, v, grad_out)  # before the call
    allowed = held + size(q) + size(q, k, v) + 4 * statistics  # row_max, row_sum, the lse of both, delta
    assert held + peak_over(train) <= 1.05 * allowed
