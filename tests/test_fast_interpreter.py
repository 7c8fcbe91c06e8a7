"""What the suite changes in Triton's interpreter saves time, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from natten_layers import neighborhood_attention  # noqa: E402

ROOT = Path(__file__).parents[1]
UNCHANGED = """
import sys, torch
from test_fast_interpreter import results
torch.save(results(), sys.argv[1])
"""


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def sum_kernel(x, out):
    value = tl.load(x)
    for _ in range(4):
        value = add(value, value)
    tl.store(out, value)


def doubled_four_times(value: int) -> int:
    x = torch.tensor([value], dtype=torch.int32)
    out = torch.empty_like(x)
    sum_kernel[(1,)](x, out)
    return int(out)


def results() -> list[Tensor]:
    """An output and its gradients, in fp16, of kernels with many device functions."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 5, 6, 2, 16, dtype=torch.float16, requires_grad=True) for _ in range(3))
    out = neighborhood_attention(query, key, value, 3, impl="fused")
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (query, key, value))]


def test_results_are_those_of_the_interpreter_as_it_is(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", UNCHANGED, str(tmp_path / "results.pt")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    for found, expected in zip(results(), torch.load(tmp_path / "results.pt"), strict=True):
        assert torch.equal(found, expected)


def test_the_language_is_patched_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    patched, patch = [], interpreter._patch_lang_tensor

    def spy(tensor: type, scope: Any) -> None:
        patched.append(tensor)
        patch(tensor, scope)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", spy)
    assert doubled_four_times(1) == 16
    assert len(patched) == 1
    assert doubled_four_times(2) == 32
    assert len(patched) == 2
    assert isinstance(tl.range, type)  # restored
