"""The context that chooses between PyTorch and the kernels for calls inside of layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import raises_naming
from torch import Tensor, nn

from natten_layers import (
    DecoderLM,
    DecoderLMConfig,
    HDiT,
    HDiTConfig,
    LevelConfig,
    NeighborhoodGQA,
    default_impl,
    explain,
)
from natten_layers.operations import Impl

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = [pytest.mark.gpu] if ON_GPU else []


def a_layer() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = NeighborhoodGQA(16, 2, 3, num_kv_heads=1, qk_norm="rms", num_registers=2, registers_attend=True)
    return layer, lambda x: torch.cat([out.flatten(1) for out in layer(x.view(1, 4, 4, 16))], 1)


def an_image_model() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    levels = LevelConfig(1, 16, d_head=8, kernel_size=3, num_kv_heads=1), LevelConfig(1, 16, "global", d_head=8)
    model = HDiT(HDiTConfig(levels=levels, patch_size=(2, 2), input_size=(8, 8), mapping_width=16, input_channels=4))
    return model, lambda x: model(x.view(1, 4, 8, 8), torch.ones(1, device=x.device))


def a_language_model() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    config = DecoderLMConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, windows=(3, None), sink="zero"
    )
    model = DecoderLM(config)
    tokens = torch.arange(16, device=DEVICE)[None]
    return model, lambda x: torch.func.functional_call(model, {"model.embed_tokens.weight": x.view(16, 16)}, (tokens,))


@pytest.mark.parametrize("make", [a_layer, an_image_model, a_language_model])
def test_layers_have_second_derivatives_in_pytorch(make: Callable[[], Any]) -> None:
    """The error of the kernels names the context in which they have."""
    torch.manual_seed(0)
    model, run = make()
    model.to(DEVICE)
    for parameter in model.parameters():  # as models begin, residual branches are zero
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(256, device=DEVICE, requires_grad=True)

    def second(impl: Impl) -> Tensor:
        with default_impl(impl):
            (slope,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]  # as the forward pass was, outside of the context too

    with raises_naming("second derivatives", 'default_impl("eager")', error=NotImplementedError):
        second("fused")
    found = second("eager")
    if not ON_GPU:
        assert torch.equal(found, second("auto"))
    assert found.isfinite().all()
    assert found.norm() > 0


def test_explain_names_what_asks() -> None:
    query = torch.randn(1, 8, 2, 8, device=DEVICE)
    with default_impl("eager"):
        assert explain(query, query, query, 3).why_eager == 'default_impl("eager") asks for it'
        assert explain(query, query, query, 3, impl="eager").why_eager == 'impl="eager" asks for it'


def chosen() -> str:
    query = torch.randn(1, 8, 2, 8, device=DEVICE)
    return explain(query, query, query, 3).impl


def test_contexts_end_as_they_began() -> None:
    usual = chosen()
    with default_impl("fused"):
        assert chosen() == "fused"
        with default_impl("eager"):
            assert chosen() == "eager"
            with default_impl("auto"):
                assert chosen() == usual
        with pytest.raises(ValueError, match="kernel_size"), default_impl("eager"):
            NeighborhoodGQA(16, 2, 0)
        assert chosen() == "fused"
        with raises_naming('default_impl("fused") cannot run', "float64", error=RuntimeError):  # it never falls back
            NeighborhoodGQA(16, 2, 3, dtype=torch.float64, device=DEVICE)(
                torch.randn(1, 8, 16, dtype=torch.float64, device=DEVICE)
            )
    assert chosen() == usual
    with raises_naming("impl", "'Eager'"), default_impl("Eager"):  # pyright: ignore[reportArgumentType]
        pass
    assert chosen() == usual


def test_contexts_of_threads_end_in_any_order() -> None:
    usual = chosen()
    first, second = default_impl("eager"), default_impl("fused")
    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        assert chosen() == "fused"
    assert chosen() == usual


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_layers_know_the_context(inside: bool) -> None:
    torch.manual_seed(0)
    layer = NeighborhoodGQA(16, 2, 3, num_kv_heads=1).to(DEVICE)
    counted: list[str] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        counted.append("fused" if "ops.natten_layers" in graph.print_readable(print_output=False) else "eager")
        return graph.forward

    def run(x: Tensor, impl: Impl) -> Tensor:
        with default_impl(impl):
            return layer(x)

    x = torch.randn(1, 5, 6, 16, device=DEVICE)
    compiled: Any = torch.compile(run if inside else layer, backend=count, fullgraph=True)
    found = []
    for impl in ("fused", "eager", "fused"):
        with nullcontext() if inside else default_impl(impl):
            found.append(compiled(x, impl) if inside else compiled(x))
    assert counted == ["fused", "eager"]
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(found[0], found[2])
