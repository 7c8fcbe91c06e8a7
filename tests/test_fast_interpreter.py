"""What the suite changes in Triton's interpreter saves time, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
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
from test_fast_interpreter import computed, descriptions, results
torch.save((results(), descriptions(), computed()), sys.argv[1])
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
    """Outputs and their gradients, of kernels with many device functions."""
    torch.manual_seed(0)
    found: list[Tensor] = []
    for dtype in (torch.float16, torch.float32):
        query, key, value = (torch.randn(1, 5, 6, 2, 16, dtype=dtype, requires_grad=True) for _ in range(3))
        sink = torch.randn(2, requires_grad=True)
        mask = torch.rand(1, 5, 6) < 0.8
        out = neighborhood_attention(
            query, key, value, 3, is_causal=(True, False), sink=sink, key_mask=mask, impl="fused"
        )
        found += [out.detach(), *torch.autograd.grad(out.float().square().sum(), (query, key, value, sink))]
    return found


def descriptions() -> list[str]:
    """What types, values and errors of Triton's language say of shapes, each of them twice."""
    core, said = tl.core, []
    shapes = [[4, 2], (4, 2), core.tuple([8]), [core.constexpr(4), 2], [3], [4.0, 2], [True], [1], [2**21], []]
    for shape in shapes * 2:
        for element in (tl.float16, core.pointer_type(tl.int32)):
            try:
                kind = core.block_type(element, shape)
            except (AssertionError, TypeError, ValueError) as error:
                said.append(f"{type(error).__name__}: {error}")
                continue
            value = core.tensor("handle", kind)
            said.append(f"{kind} {kind.mangle()} {kind.shape} {kind.numel} {value} {value.numel} {value.shape.type}")
            said.append(f"{core.tensor('handle', core.block_type(tl.int8, value.shape))}")
            said.append(f"{[kind == core.block_type(other, shape) for other in (tl.float16, tl.int32)]}")
    for kind in (tl.int1, tl.uint8, tl.int64, tl.float32, tl.void, core.block_type(tl.int32, [4])):
        said.append(f"{kind.is_int()} {[kind == other for other in (tl.int1, tl.uint8, tl.dtype('int64'), None)]}")
        said.append(f"{core.tensor('handle', kind)} {core.tensor('handle', kind).shape.type}")
    return said


@np.errstate(all="ignore")
def computed() -> list[str]:
    """Types and values, or errors, of operations on scalars of all pairs of types, and on blocks of them."""
    semantic, handle = interpreter.interpreter_semantic, interpreter.TensorHandle
    types = (tl.int1, tl.int32, tl.uint32, tl.int64, tl.float16, tl.float32)
    scalars = [tl.tensor(handle(np.array([3], interpreter._get_np_dtype(kind)), kind), kind) for kind in types]
    blocks = [
        tl.tensor(handle(np.full(2, 5, x.handle.data.dtype), x.dtype), tl.block_type(x.dtype, [2])) for x in scalars
    ]
    found = []
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "less_than"):
        options = (False,) if name in ("add", "sub", "mul") else ()
        for operands in product([*scalars, *blocks], [*scalars, *blocks, 2, -1, 2.5, True, 0, 0.0, -0.0]):
            try:
                value = getattr(semantic, name)(*operands, *options)
            except (TypeError, ValueError) as error:
                found.append(f"{type(error).__name__}: {error}")
            else:
                found.append(f"{value} {value.handle.data.dtype} {value.handle.data.tolist()}")
    return found


def test_results_are_those_of_the_interpreter_as_it_is(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", UNCHANGED, str(tmp_path / "results.pt")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    expected, *said = torch.load(tmp_path / "results.pt")
    for found, one in zip(results(), expected, strict=True):
        assert torch.equal(found, one)
    assert [descriptions(), computed()] == said


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
