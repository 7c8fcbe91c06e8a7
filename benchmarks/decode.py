"""Time new tokens that attend over a cache, against the copy bandwidth: ``python -m benchmarks.decode --help``.

Every result is checked against fp64 before it is timed. Calls alternate with ``scaled_dot_product_attention`` over the
same cache, and rotate over copies of the cache that together exceed the L2 cache. Prints a Markdown table and writes
JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from natten_layers import cached_attention
from natten_layers.operations import Impl

from . import runner, timing
from .check import wrong_result

Attend = Callable[["Inputs"], Tensor]


@dataclass(frozen=True)
class Workload:
    """``tokens`` new tokens per sequence over a rolling cache of ``window`` slots, all of them filled."""

    name: str
    batch: int
    window: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int = 1
    sinks: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of query, key, value and output in bf16."""
        rows = 2 * self.tokens * self.heads + 2 * self.window * self.kv_heads
        return 2 * self.batch * rows * self.head_dim


WORKLOADS = (
    Workload("mistral", 64, 4096, 32, 8, 128),
    Workload("mistral, 4 tokens", 64, 4096, 32, 8, 128, tokens=4),
    Workload("mistral, batch 1", 1, 4096, 32, 8, 128),
    Workload("128k, batch 1", 1, 2**17, 32, 8, 128),
    Workload("gpt-oss", 64, 128, 64, 8, 64, sinks=True),
)


@dataclass(frozen=True)
class Inputs:
    query: Tensor  # [B, L, Hq, D]
    key: Tensor  # [B, S, Hkv, D]
    value: Tensor
    query_positions: Tensor  # [1, L]
    key_positions: Tensor  # [1, S]
    window: int
    sink: Tensor | None  # [Hq]

    def double(self) -> Inputs:
        return replace(self, query=self.query.double(), key=self.key.double(), value=self.value.double())


@dataclass
class Row(timing.Timed):
    """One implementation on one workload; times are None where ``failure`` says why."""

    workload: str
    implementation: str
    floor_ms: float
    note: str | None = None
    error: float | None = None
    of_copy: float | None = None
    """Achieved fraction of the copy bandwidth."""


def make_inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    w = workload
    cache = (w.batch, w.window, w.kv_heads, w.head_dim)
    slots = torch.arange(w.window, device=device)
    return Inputs(
        draw(w.batch, w.tokens, w.heads, w.head_dim),
        draw(*cache),
        draw(*cache),
        (w.window - w.tokens + slots[: w.tokens])[None],
        ((slots + w.window // 3) % w.window)[None],
        w.window,
        draw(w.heads) if w.sinks else None,
    )


def ours(inputs: Inputs) -> Tensor:
    """This library's operation. On a GPU it must use the kernel, never the eager path."""
    return _cached(inputs, "fused" if inputs.query.is_cuda else "auto")


def exact(inputs: Inputs) -> Tensor:
    return _cached(inputs.double(), "eager")


def _cached(inputs: Inputs, impl: Impl) -> Tensor:
    i = inputs
    positions = i.query_positions, i.key_positions
    return cached_attention(i.query, i.key, i.value, *positions, window=i.window, sink=i.sink, impl=impl)


def sdpa(inputs: Inputs) -> Tensor:
    """torch's ``scaled_dot_product_attention``, which has no sinks. A single new token needs no mask."""
    mask = None
    if inputs.query.shape[1] > 1:
        mask = inputs.key_positions <= inputs.query_positions.mT  # [L, S]
    q, k, v = (t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def run(workload: Workload, copy_rate: float, budget_s: float, device: torch.device) -> list[Row]:
    copies = 1 + ceil((2 * timing.L2_BYTES if device.type == "cuda" else 1) / workload.bytes)
    inputs = [make_inputs(workload, device, seed) for seed in range(copies)]
    floor_s = workload.bytes / copy_rate
    rows, calls = {}, {}
    for name, attend, given in (
        ("natten_layers", ours, inputs),
        ("sdpa", sdpa, [replace(each, sink=None) for each in inputs]),
    ):
        row = rows[name] = Row(workload.name, name, 1e3 * floor_s)
        row.note = "without sinks" if workload.sinks and given[0].sink is None else None
        try:
            row.error = _error(attend(given[0]), exact(given[0]))
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        limit = torch.finfo(torch.bfloat16).eps  # two roundings at most, of the weights and of the result
        row.failure = wrong_result(row.error, limit)
        if row.failure is not None:
            continue
        calls[name] = _rotating(attend, given)
    for name, sample in timing.measure(calls, device, budget_s).items():
        rows[name].take(sample)
        rows[name].of_copy = floor_s / sample.median
    return list(rows.values())


def _rotating(attend: Attend, inputs: list[Inputs]) -> timing.Call:
    def call(i: int) -> Tensor:
        with torch.no_grad():
            return attend(inputs[i % len(inputs)])

    return call


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def table(rows: list[Row]) -> list[str]:
    lines = ["| workload | implementation | ms | p10 - p90 | floor ms | of copy bandwidth | note |", "|---" * 7 + "|"]
    for row in rows:
        cells = ["", "", f"{row.floor_ms:.3g}", ""]
        if row.median_ms is not None:
            cells = [f"{row.median_ms:.3g}", row.spread, f"{row.floor_ms:.3g}", f"{row.of_copy:.0%}"]
        lines.append(f"| {' | '.join([row.workload, row.implementation, *cells, row.failure or row.note or ''])} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if this library failed anywhere."""
    parser = runner.make_parser("decode", __doc__, budget_s=0.5, timed="each workload")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    report = runner.Report(args, device)
    rows: list[Row] = []
    for workload in WORKLOADS:
        if args.smoke:
            workload = replace(workload, batch=2, window=24, head_dim=16)
        rows += run(workload, report.rates.copy, args.budget_s, device)
        report.keep(rows=rows)
    print(report.text(table(rows)))
    return int(any(row.failure for row in rows if row.implementation == "natten_layers"))


if __name__ == "__main__":
    sys.exit(runner.command(main))
