"""Cases of the attention operation, and the fp64 oracle with which every implementation is compared."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
from torch import Tensor, nn

from natten_layers import neighborhood_attention, neighborhood_attention_varlen
from natten_layers.eager import dense_attention_state
from natten_layers.geometry import Window, fitted, longest_axis, make_window
from natten_layers.operations import Impl

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Inputs = dict[str, Tensor]
"""Differentiable inputs by argument name: query, key, value and, where the case has them, additional_keys,
additional_values, sink and rpb."""


@dataclass(frozen=True)
class Case:
    """Arguments of one call. Arguments per axis are a single value for all axes, or one entry per axis."""

    name: str
    spatial: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    registers: int = 0
    sink: Literal["none", "zero", "learned"] = "none"
    scale: float | None = None
    batch: int = 2
    dtype: torch.dtype = torch.float32
    seen: float | None = None
    """The share of keys that a key mask lets be seen, or None without one."""
    is_periodic: bool | tuple[bool, ...] = False
    key_spatial: tuple[int, ...] | None = None
    """axes of keys, if queries lie on another grid"""
    has_bias: bool = False
    """Whether there are biases by the distance of query and key. The oracle does not know them, the eager path does."""
    shapes: tuple[tuple[int, ...], ...] | None = None
    """The samples of a packed batch. ``spatial`` is then empty, and ``batch`` counts for nothing."""

    @property
    def window(self) -> Window:
        if self.shapes is None:
            spatial = self.key_spatial or self.spatial
        else:
            spatial = (longest_axis(self.dilation),) * len(self.shapes[0])
        return make_window(
            spatial,
            self.kernel_size,
            self.stride,
            self.dilation,
            self.is_causal,
            self.is_periodic,
        )

    @property
    def tokens(self) -> tuple[int, ...]:
        """The shape of queries without heads and channels: batch and axes, or the length of all samples."""
        return (self.batch, *self.spatial) if self.shapes is None else (sum(map(math.prod, self.shapes)),)

    @property
    def key_tokens(self) -> tuple[int, ...]:
        return self.tokens if self.key_spatial is None else (self.batch, *self.key_spatial)

    def __str__(self) -> str:  # pytest's id
        return self.name


@dataclass(frozen=True)
class Result:
    """The outputs of one call, and the gradient of every input for fixed random cotangents of out and lse."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"out": self.out, "lse": self.lse} | {f"grad of {name}": g for name, g in self.grads.items()}

    def cpu(self) -> Result:
        return Result(self.out.cpu(), self.lse.cpu(), {name: g.cpu() for name, g in self.grads.items()})


CASES: Sequence[Case] = (
    Case("1d", (19,), 5),
    Case("1d-causal", (21,), 6, is_causal=True),
    Case("1d-causal-gqa-sink", (40,), 9, is_causal=True, heads=4, kv_heads=1, sink="learned"),
    Case("1d-causal-stride", (23,), 7, 3, is_causal=True, registers=2),
    Case("1d-full", (17,), 17),
    Case("1d-full-causal", (24,), 24, is_causal=True, heads=4),
    Case("1d-dilated-ragged", (23,), 4, 2, 5, heads=4, kv_heads=2),
    Case("1d-kernel-one", (9,), 1, registers=1),
    Case("2d", (9, 11), (3, 5)),
    Case("2d-even-kernel", (8, 7), (4, 6), head_dim=8, value_dim=8),
    Case("2d-gqa", (10, 9), 5, heads=6, kv_heads=2, head_dim=24, value_dim=24),
    Case("2d-gqa-registers-zero-sink", (9, 8), 5, heads=4, kv_heads=2, registers=3, sink="zero"),
    Case("2d-stride", (11, 12), (5, 4), (2, 3), sink="learned"),
    Case("2d-dilated", (13, 14), (3, 4), 1, (3, 2), heads=4, kv_heads=2, registers=5),
    Case("2d-causal-mixed", (9, 10), (4, 3), (2, 1), (1, 2), (True, False), heads=3, kv_heads=3, sink="zero"),
    Case("2d-full-axis", (6, 9), (6, 3), value_dim=8),
    Case("2d-value-dim", (9, 9), 3, head_dim=16, value_dim=40, kv_heads=1),
    Case("2d-scale", (8, 8), 3, scale=0.7, sink="learned", batch=1),
    Case("2d-scale-zero", (8, 8), 3, scale=0.0),
    Case("2d-everything", (12, 10), (4, 3), (2, 2), (2, 3), (True, False), 4, 2, 16, 24, 4, "learned", 0.3),
    Case("3d", (5, 6, 7), 3, head_dim=8, value_dim=8),
    Case("3d-causal-gqa", (4, 6, 5), (2, 3, 3), 1, (2, 1, 1), (True, False, False), 4, 2, sink="learned"),
    Case("3d-everything", (6, 5, 7), (3, 2, 3), (2, 1, 2), (1, 2, 2), (False, True, False), 2, 1, 8, 16, 3, "learned"),
    Case("1d-mask", (19,), 5, heads=4, sink="learned", seen=0.5),
    Case("2d-mask-everything", (12, 10), (4, 3), (2, 2), (2, 3), (True, False), 4, 2, 16, 24, 4, "learned", seen=0.6),
    Case("3d-mask-scale", (3, 5, 4), 3, head_dim=8, value_dim=8, scale=-0.3, seen=0.1),
    Case("2d-mask-nothing", (5, 4), 3, seen=0.0),
    Case("ring", (13,), 5, is_periodic=True, heads=4, head_dim=24, value_dim=24, registers=1, sink="learned"),
    Case("ring-short-of-a-turn", (12,), 11, 4, is_periodic=True, batch=1),
    Case("ring-whole", (9,), 9, 2, is_periodic=True, batch=1),
    Case("ring-stride-dilated", (22,), 6, 4, 2, is_periodic=True, heads=4, kv_heads=1, sink="zero"),
    Case(
        "ring-by-line",
        (7, 10),
        (3, 4),
        (2, 3),
        (1, 2),
        heads=4,
        registers=2,
        scale=-0.3,
        batch=1,
        is_periodic=(False, True),
    ),
    Case("torus", (5, 6), (4, 5), (3, 1), head_dim=8, value_dim=8, is_periodic=True),
    Case(
        "torus-causal",
        (4, 6, 5),
        (3, 2, 3),
        2,
        (1, 2, 1),
        (True, False, False),
        4,
        2,
        8,
        8,
        sink="learned",
        is_periodic=(False, True, True),
    ),
    Case("torus-3d", (3, 4, 5), (2, 3, 4), (1, 3, 2), head_dim=8, value_dim=8, heads=2, kv_heads=1, is_periodic=True),
    Case("finer", (23,), 3, heads=4, kv_heads=2, registers=2, sink="learned", key_spatial=(7,)),
    Case("coarser", (3, 4), (2, 3), head_dim=24, value_dim=8, key_spatial=(10, 9)),
    Case(
        "finer-and-coarser", (9, 2), (3, 4), heads=4, kv_heads=1, scale=-0.3, sink="zero", batch=1, key_spatial=(4, 11)
    ),
    Case("finer-on-a-ring", (9, 8), (2, 5), heads=4, is_periodic=(False, True), batch=1, key_spatial=(9, 6)),
    Case(
        "coarser-torus",
        (2, 3, 5),
        (2, 3, 2),
        head_dim=8,
        value_dim=8,
        is_periodic=(False, True, True),
        key_spatial=(3, 4, 2),
    ),
    Case("one-query", (1,), 4, key_spatial=(9,)),
    Case("2d-bf16", (9, 11), 5, heads=4, kv_heads=2, registers=2, sink="learned", dtype=torch.bfloat16),
    Case("2d-fp16", (9, 11), 5, heads=4, kv_heads=2, registers=2, sink="learned", dtype=torch.float16),
    Case("1d-causal-bf16", (40,), 16, is_causal=True, heads=4, kv_heads=1, dtype=torch.bfloat16),
    Case("1d-fp64", (15,), 4, 2, is_causal=True, registers=2, sink="learned", dtype=torch.float64),
)


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Random leaf tensors in the case's dtype. They are drawn on the CPU, so they are equal on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(case.dtype).to(device).requires_grad_()

    inputs = {
        "query": draw(*case.tokens, case.heads, case.head_dim),
        "key": draw(*case.key_tokens, case.kv_heads, case.head_dim),
        "value": draw(*case.key_tokens, case.kv_heads, case.value_dim),
    }
    if case.registers:
        samples = case.batch if case.shapes is None else len(case.shapes)
        inputs["additional_keys"] = draw(samples, case.registers, case.kv_heads, case.head_dim)
        inputs["additional_values"] = draw(samples, case.registers, case.kv_heads, case.value_dim)
    if case.sink == "learned":
        # Logits near the lse of a few keys give the sink a visible share of the softmax. As a parameter it is in fp32.
        dtype = torch.promote_types(case.dtype, torch.float32)
        inputs["sink"] = (draw(case.heads).detach().to(dtype) + 2.0).requires_grad_()
    if case.has_bias:
        dtype = torch.promote_types(case.dtype, torch.float32)
        sizes = (2 * k - 1 for k in case.window.kernel_size)
        inputs["rpb"] = draw(case.heads, *sizes).detach().to(dtype).requires_grad_()
    return inputs


def assert_nan_stays(case: Case, inputs: Inputs, impl: Impl = "fused") -> None:
    """Check that NaN in one head of one image does not reach other images or heads.

    Each input and the output's gradient in turn has a head full of NaN. NaN in a query head must not reach the other
    query heads of its group either.
    """
    assert case.batch > 1
    generator = torch.Generator().manual_seed(3)
    clean = {name: t.detach() for name, t in inputs.items()}
    shape = *inputs["query"].shape[:-1], case.value_dim
    clean["grad_out"] = torch.randn(shape, generator=generator).to(inputs["query"])

    def results(tensors: Inputs) -> Inputs:
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items() if name != "grad_out"}
        out, lse = neighborhood_attention(**arguments(case, leaves), return_lse=True, impl=impl)
        grads = torch.autograd.grad((out, lse), tuple(leaves.values()), (tensors["grad_out"], torch.ones_like(lse)))
        return {"out": out.detach(), "lse": lse.detach()[..., None]} | dict(zip(leaves, grads, strict=True))

    expected = results(clean)
    assert all(t.isfinite().all() for t in expected.values())
    limit = 4 * FLOOR[case.dtype]
    for name in clean:
        if name == "sink":
            continue
        dirty = dict(clean)
        dirty[name] = clean[name].clone()
        dirty[name][1, ..., 0, :] = math.nan
        own = 1 if name in ("query", "grad_out") else case.heads // case.kv_heads
        found = results(dirty)
        assert any(not t.isfinite().all() for t in found.values()), name
        for result, tensor in found.items():
            wanted = expected[result]
            if result == "sink":
                assert error(tensor[own:], wanted[own:]) < limit, (name, result)
                continue
            count = own if result in ("query", "out", "lse") else 1
            others = [i for i in range(case.batch) if i != 1]
            assert error(tensor[others], wanted[others]) < limit, (name, result, "other images")
            assert error(tensor[1, ..., count:, :], wanted[1, ..., count:, :]) < limit, (name, result, "other heads")


def enlarge(inputs: Inputs, exponent: int) -> Inputs:
    """Replace queries and keys by ones whose products are 1, 2 or 4 times ``2**exponent``, with a sign per head.

    A row's scores are so far apart that the largest one has all the weight, and equal largest ones have equal shares,
    exactly. Scores of one head are all far above zero, those of the next all far below.
    """
    half = 2.0 ** (exponent // 2)
    large = dict(inputs)
    for name, tensor in inputs.items():
        if name not in ("query", "key", "additional_keys"):
            continue
        *_, heads, _ = tensor.shape
        values = torch.zeros_like(tensor)
        if name == "query":
            values[..., 0] = half * (1 - 2 * (torch.arange(heads) % 2)).to(tensor)
        else:
            count = values[..., 0].numel() // heads
            values[..., 0] = half * (2.0 ** (torch.arange(count) * 7 % 5 % 3)).to(tensor).view(*tensor.shape[:-2], 1)
        large[name] = values
    return large


def key_mask(case: Case, device: torch.device | str = "cpu") -> Tensor | None:
    """The key mask of a case, drawn on the CPU: ``[batch, *axes of keys]``, or ``[N]`` of packed samples."""
    if case.seen is None:
        return None
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(case.key_tokens, generator=generator) < case.seen).to(device)


def arguments(case: Case, inputs: Inputs) -> dict[str, Any]:
    """The keyword arguments with which a case calls the public operation, ``operation(case)``."""
    return (
        {
            "query": inputs["query"],
            "key": inputs["key"],
            "value": inputs["value"],
            "kernel_size": case.kernel_size,
            "stride": case.stride,
            "dilation": case.dilation,
            "is_causal": case.is_causal,
            "is_periodic": case.is_periodic,
            "scale": case.scale,
            "additional_keys": inputs.get("additional_keys"),
            "additional_values": inputs.get("additional_values"),
            "sink": 0.0 if case.sink == "zero" else inputs.get("sink"),
            "key_mask": key_mask(case, inputs["query"].device),
        }
        | ({"rpb": inputs["rpb"]} if "rpb" in inputs else {})
        | ({} if case.shapes is None else {"shapes": case.shapes})
    )


def operation(case: Case) -> Callable[..., Any]:
    return neighborhood_attention if case.shapes is None else neighborhood_attention_varlen


def run(case: Case, inputs: Inputs, impl: Impl, stored: Tensor | None = None) -> Result:
    """Run the public operation with one implementation, and compute the gradient of every input.

    With ``stored`` they are the gradients that a backward pass finds which reads the output as this one.
    """
    out, lse = operation(case)(**arguments(case, inputs), return_lse=True, impl=impl)
    return _with_grads(out, lse, inputs, stored)


def oracle(case: Case, inputs: Inputs) -> Result:
    """The definition with a dense mask, computed in fp64 from the same (rounded) input values, as tensors of the CPU.

    It is computed where the inputs are, as a core of a CPU takes most of a minute for all pairs of 9000 tokens. Of a
    packed batch it computes each sample alone.
    """
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    mask = key_mask(case, inputs["query"].device)
    if case.shapes is None:
        state = _defined(case, wide, case.window, mask)
    else:
        state = _defined_alone(case, wide, case.shapes, mask)
    result = _with_grads(*state, wide).cpu()
    if inputs["query"].is_cuda:
        torch.cuda.empty_cache()  # other tests run on the same GPU, in processes that could not take what is kept
    return result


def _defined_alone(
    case: Case, wide: Inputs, shapes: Sequence[tuple[int, ...]], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same of a packed batch, of every sample by itself."""
    parts, start = [], 0
    for i, shape in enumerate(shapes):
        own = slice(start, start := start + math.prod(shape))
        if own.start == own.stop:
            continue
        alone = {n: t[own].unflatten(0, shape)[None] for n, t in wide.items() if n in ("query", "key", "value")}
        alone |= {n: t[i : i + 1] for n, t in wide.items() if n.startswith("additional")}
        alone |= {n: t for n, t in wide.items() if n == "sink"}
        visible = None if mask is None else mask[own].reshape(1, *shape)
        state = _defined(case, alone, fitted(shape, case.window), visible)
        parts.append([x.flatten(0, len(shape)) for x in state])
    out, lse = map(torch.cat, zip(*parts, strict=True))
    return out, lse


def _defined(case: Case, wide: Inputs, window: Window, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result and the log-sum-exp of attention, dense."""
    out, row_max, row_sum = dense_attention_state(
        wide["query"],
        wide["key"],
        wide["value"],
        wide.get("additional_keys"),
        wide.get("additional_values"),
        0.0 if case.sink == "zero" else wide.get("sink"),
        window,
        case.head_dim**-0.5 if case.scale is None else case.scale,
        key_mask=mask,
    )
    nothing = row_sum == 0  # where a query sees nothing, lse is -inf and has no gradient
    return out, (row_max + row_sum.masked_fill(nothing, 1.0).log()).masked_fill(nothing, -math.inf)


def _with_grads(out: Tensor, lse: Tensor, inputs: Inputs, stored: Tensor | None = None) -> Result:
    generator = torch.Generator().manual_seed(1)
    # Every dtype represents these cotangents exactly, so implementations and oracle compute the same gradient.
    grad_out, grad_lse = (torch.randint(-8, 9, t.shape, generator=generator).to(t) / 4 for t in (out, lse))
    if stored is not None:
        # Kernels keep the output rounded, and read it for delta = rowsum(dOut * Out) - dLse. So an error of the output
        # acts as one of dLse, which is large beside dP - delta where one key has nearly all of the weight.
        grad_lse = grad_lse - (grad_out * (stored.to(out) - out.detach())).sum(-1)
    grads = torch.autograd.grad((out, lse), tuple(inputs.values()), (grad_out, grad_lse))
    return Result(out.detach(), lse.detach(), dict(zip(inputs, grads, strict=True)))


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm, measured in fp64; inf if any element of ``actual`` is unexpectedly not finite."""
    actual, expected = (t.detach().cpu().double() for t in (actual, expected))
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    nothing = (actual == -math.inf) & (expected == -math.inf)  # lse of queries that see nothing
    actual, expected = (t.masked_fill(nothing, 0.0) for t in (actual, expected))
    if not actual.isfinite().all():
        return math.inf
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def randomize(module: ModuleT, std: float = 0.2) -> ModuleT:
    """Add noise to every parameter, because most branches of a new model have an output of zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


def coordinates(*shape: int) -> Tensor:
    """Positions between the tokens of a grid."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def far(*shape: int) -> Tensor:
    """Positions of tokens in a long text."""
    return torch.randint(0, 100_000, shape, generator=torch.Generator().manual_seed(7))


FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative errors that are always allowed: a few roundings of the dtype, summed over a window."""


def assert_close(case: Case, actual: Result, expected: Result, peer: Result | None = None) -> None:
    """Check every tensor against the oracle.

    Its error may be twice that of ``peer``, the eager result in the same precision, or ``FLOOR``.
    """
    wide = expected.tensors()
    peers = {} if peer is None else peer.tensors()
    for name, tensor in actual.tensors().items():
        if case.scale == 0.0 and name in ("grad of query", "grad of key"):
            assert not tensor.any(), f"{case}: {name} must be zero at scale 0"
            continue
        # Gradients depend on sums over the rounded output, so even a fp32 sink's gradient has the activations' error.
        limit = FLOOR[case.dtype if name.startswith("grad") else tensor.dtype]
        if name in peers:
            limit = max(limit, 2 * error(peers[name], wide[name]))
        found = error(tensor, wide[name])
        assert found <= limit, f"{case}: {name} has relative error {found:.2e}, allowed {limit:.2e}"


@contextmanager
def raises_naming(*words: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """Expect an error whose message contains all of ``words``."""
    with pytest.raises(error) as caught:
        yield
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail, rather than hang, where the main thread waits for longer, as for the writer of a pipe."""

    def stop(*_: object) -> None:
        pytest.fail(f"still waiting after {seconds} s")  # no Exception, which what waits might answer

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_memory() -> int:
    """The bytes of memory that this process has held at most, on Linux. ``ru_maxrss`` would be its parent's, too."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget_peak_memory() -> None:
    """Let :func:`peak_memory` begin with what this process holds now; skips the test where that cannot be had."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of this process' memory cannot be reset: {error}")
