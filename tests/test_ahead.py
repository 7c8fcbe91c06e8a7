"""Compilation of kernels before they are launched."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import raises_naming
from torch.utils.flop_counter import FlopCounterMode

from natten_layers import compile_ahead, neighborhood_attention
from natten_layers.operations import Impl

pytest.importorskip("triton")


def test_kernels_are_compiled_by_threads_and_loaded_before_the_context_ends(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(root / "tests" / "ahead.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of CPU tensors run in the interpreter only")
@pytest.mark.parametrize("impl", ["fused", "eager"])
@pytest.mark.parametrize("watched", [False, True])
def test_operations_return_zeros_in_the_context_unless_they_are_eager(impl: Impl, watched: bool) -> None:
    query = torch.randn(1, 6, 2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def call() -> list[torch.Tensor]:
        out = neighborhood_attention(query, query, query, 3, impl=impl)
        return [out.detach(), *torch.autograd.grad(out.square().sum() + out.sum(), query)]

    with compile_ahead(), FlopCounterMode(display=False) if watched else nullcontext():
        found = call()
    expected = call()
    for x, exact in zip(found, expected, strict=True):
        assert torch.equal(x, exact if impl == "eager" else torch.zeros_like(exact))
        assert exact.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of CPU tensors run in the interpreter only")
def test_graphs_are_not_captured_in_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 6, 2, 16)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with raises_naming("CUDA graph", "compile_ahead", error=RuntimeError), compile_ahead():
            neighborhood_attention(query, query, query, 3, impl="fused")
    assert neighborhood_attention(query, query, query, 3, impl="fused").any()  # the context has ended
