"""Work that is done once for many calls: checks of arguments, and the preparation of launches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import error, raises_naming
from torch import Tensor

from natten_layers import arguments, neighborhood_attention


def draw(heads: int = 4, length: int = 12) -> Tensor:
    return torch.randn(2, length, heads, 8)


@pytest.fixture(autouse=True)
def accepted(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """The cache of argument signatures that passed the checks, emptied for the test."""
    empty: dict[Any, Any] = {}
    monkeypatch.setattr(arguments, "_accepted", empty)
    return empty


def test_what_has_passed_is_not_checked_again(accepted: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(), draw(2), draw(2)
    expected = neighborhood_attention(*tensors, 3, is_causal=True)
    assert len(accepted) == 1
    monkeypatch.setattr(arguments, "_check_user_form", None)
    monkeypatch.setattr(arguments, "_check_canonical_form", None)
    assert torch.equal(neighborhood_attention(*tensors, 3, is_causal=True), expected)
    scaled = neighborhood_attention(*tensors, 3, is_causal=True, scale=0.1, sink=0.0)
    assert not torch.equal(scaled, expected)
    with raises_naming("scale", "nan"):
        neighborhood_attention(*tensors, 3, is_causal=True, scale=float("nan"))
    with raises_naming("sink", "inf"):
        neighborhood_attention(*tensors, 3, is_causal=True, sink=float("inf"))
    assert len(accepted) == 1


def test_equal_arguments_of_other_types_are_checked() -> None:
    q = draw()
    neighborhood_attention(q, q, q, 1, is_causal=False)
    with raises_naming("kernel_size", "bool"):
        neighborhood_attention(q, q, q, True, is_causal=False)
    with raises_naming("is_causal", "int"):
        neighborhood_attention(q, q, q, 1, is_causal=0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    neighborhood_attention(q, q, q, (1,), is_causal=(False,))
    with raises_naming("kernel_size", "bool"):
        neighborhood_attention(q, q, q, (True,), is_causal=(False,))


def test_equal_shapes_of_other_strides_are_checked() -> None:
    """Registers with one head fit KV heads that are one expanded head, but no others of the same shape."""
    q, registers = draw(), torch.randn(1, 3, 1, 8)
    one = draw(1).expand(-1, -1, 4, -1)
    extras: dict[str, Any] = {"additional_keys": registers, "additional_values": registers}
    expected = neighborhood_attention(q, one, one, 3, **extras)
    assert torch.equal(neighborhood_attention(q, one, one, 3, **extras), expected)
    with raises_naming("additional_keys"):
        neighborhood_attention(q, one.contiguous(), one.contiguous(), 3, **extras)


def test_other_dtypes_shapes_and_axes_are_checked() -> None:
    q = draw()
    neighborhood_attention(q, q, q, 3)
    with raises_naming("key", "dtype"):
        neighborhood_attention(q, q.double(), q, 3)
    with raises_naming("sequence", "13", "12"):
        neighborhood_attention(q, draw(length=13), q, 3)
    with raises_naming("dilation"):
        neighborhood_attention(q, q, q, 3, dilation=5)
    with raises_naming("value"):
        neighborhood_attention(q, q, None, 3)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_lists_are_taken_and_what_is_kept_is_bounded(accepted: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "MAX_ACCEPTED", 3)
    q = draw()
    expected = neighborhood_attention(q, q, q, (3,))
    assert torch.equal(neighborhood_attention(q, q, q, [3]), expected)
    assert len(accepted) == 1
    for kernel_size in range(4, 12):
        neighborhood_attention(q, q, q, kernel_size)
        assert len(accepted) <= 3


@pytest.fixture
def default_precision() -> Iterator[None]:
    """Reset torch's precision settings to their defaults before and after the test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "none"
    yield
    torch.set_float32_matmul_precision("highest")  # what the old switch tells must fit to the new one
    matmul.fp32_precision = before


@pytest.mark.usefixtures("default_precision")
def test_products_of_fp32_follow_the_switches_of_torch() -> None:
    problem = pytest.importorskip("natten_layers.kernels.host.problem")
    matmul = torch.backends.cuda.matmul
    assert problem.precision(torch.float32) == "tf32x3"
    assert problem.precision(torch.bfloat16) == "ieee"
    for asked in ("tf32", "ieee"):  # the new switch: the old getter raises after it
        matmul.fp32_precision = asked
        assert problem.precision(torch.float32) == asked
    matmul.fp32_precision = "none"
    for allowed, expected in ((True, "tf32"), (False, "ieee")):
        matmul.allow_tf32 = allowed
        assert problem.precision(torch.float32) == expected
    for asked, expected in (("high", "tf32"), ("highest", "ieee"), ("medium", "tf32")):
        torch.set_float32_matmul_precision(asked)
        assert problem.precision(torch.float32) == expected


@pytest.mark.usefixtures("default_precision")
def test_calls_follow_the_new_switch_of_precision() -> None:
    pytest.importorskip("triton")
    q = torch.randn(1, 9, 2, 16, device="cuda" if torch.cuda.is_available() else "cpu")
    expected = neighborhood_attention(q, q, q, 3, impl="eager")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert error(neighborhood_attention(q, q, q, 3, impl="fused"), expected) < 2e-3


def test_kept_kernels_are_those_that_triton_chooses() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("relaunch.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_launch_asks_for_fused_products_and_sums() -> None:
    """Triton 3.9 warns where a launch does not, and 3.10 makes slower kernels of it."""
    launcher = pytest.importorskip("natten_layers.kernels.host.launcher")
    assert launcher.Launcher(SimpleNamespace(arg_names=()), (1,), (), {}).options["enable_fp_fusion"]
    for path in Path(launcher.__file__).parents[1].rglob("*.py"):
        past_launchers = re.findall(r"^ +\w+_kernel\[", path.read_text(), re.MULTILINE)
        assert not past_launchers, f"{path} launches kernels itself"
