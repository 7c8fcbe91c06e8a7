"""Windows in image and video transformers against dense attention: ``python -m benchmarks.diffusers_attention --help``.

What is timed is what ``neighborhood(transformer, ...)`` puts in the place of ``scaled_dot_product_attention``: image
tokens attend to their window and to all of the text, text tokens to everything, in one sequence. Dense attention over
the same sequence is cuDNN's. A result that is wrong gets no time: outputs of image tokens are compared with fp64 at
sampled positions, and those of text tokens with fp64 for one head, in the error budget of the other benchmarks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from natten_layers.integrations.diffusers import transformers

from . import runner, timing
from .check import ERROR_FACTOR, Reference
from .workloads import DTYPE, Inputs, Workload, smoke

DENSE, WINDOWS = "dense (cuDNN)", "windows"


@dataclass(frozen=True)
class Problem:
    """The image tokens of a transformer with their windows, and its text tokens as registers."""

    family: str
    workload: Workload

    @property
    def name(self) -> str:
        return self.workload.name

    @property
    def text(self) -> int:
        return self.workload.registers

    @property
    def tokens(self) -> int:
        return prod(self.workload.spatial) + self.text

    @property
    def share(self) -> float:
        """Share of the pairs of tokens that are computed."""
        return (self.workload.visible_pairs() + self.text * self.tokens) / self.tokens**2


FLUX, WAN = "FluxTransformer2DModel", "WanTransformer3DModel"
PROBLEMS = {
    problem.name: problem
    for problem in (
        # 4096x4096 pixels and 512 text tokens; the windows are those of NATTEN's paper on strides.
        Problem(FLUX, Workload("flux-4k", 1, (256, 256), 24, 24, 128, (80, 80), registers=512)),
        Problem(FLUX, Workload("flux-4k, stride 16", 1, (256, 256), 24, 24, 128, (80, 80), stride=16, registers=512)),
        # 81 frames of 720x1280 pixels. Text is in an attention of its own, which windows leave alone.
        Problem(WAN, Workload("wan-720p", 1, (21, 45, 80), 40, 40, 128, (12, 24, 24))),
        Problem(WAN, Workload("wan-720p, stride 4x8x8", 1, (21, 45, 80), 40, 40, 128, (12, 24, 24), stride=(4, 8, 8))),
    )
}


@dataclass
class Row(timing.Timed):
    problem: str
    implementation: str
    tokens: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    share_of_pairs: float
    errors: dict[str, tuple[float, float]]
    """Relative error and the error allowed, of image and of text."""
    first_call_s: float | None = None
    peak_mib: float | None = None


def make_sequence(problem: Problem, device: torch.device) -> list[Tensor]:
    """Query, key and value ``[B, H, tokens, D]`` as a processor has them: heads last in memory, text beside image."""
    w = problem.workload
    generator = torch.Generator(device).manual_seed(0)
    shape = (w.batch, problem.tokens, w.heads, w.head_dim)
    return [torch.randn(shape, device=device, dtype=DTYPE, generator=generator).transpose(1, 2) for _ in range(3)]


def windows(problem: Problem) -> Callable[[list[Tensor]], Tensor]:
    """What a replaced layer computes in the place of ``scaled_dot_product_attention``."""
    w = problem.workload
    tokens: Any = SimpleNamespace(call=transformers._Call(w.spatial), family=transformers.FAMILIES[problem.family])
    window = transformers._Window(w.window.kernel_size, w.window.stride)
    return lambda sequence: transformers._attention(tokens, window, sequence[0], sequence[1], sequence[2])


def dense(sequence: list[Tensor]) -> Tensor:
    query, key, value = sequence
    context: AbstractContextManager[object] = nullcontext()
    if query.is_cuda:
        context = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    with context:
        return F.scaled_dot_product_attention(query, key, value)


def check(problem: Problem, sequence: list[Tensor], out: Tensor) -> dict[str, tuple[float, float]]:
    """Relative errors and those allowed, of image tokens and of text tokens, from ``out [B, H, tokens, D]``."""
    w, text = problem.workload, problem.text
    heads = [x.transpose(1, 2) for x in (*sequence, out)]  # heads last
    image = [x[:, text:].unflatten(1, w.spatial) for x in heads]
    inputs = Inputs(
        *image[:3], grad_out=image[3], additional_keys=heads[1][:, :text], additional_values=heads[2][:, :text]
    )
    if not text:
        inputs = replace(inputs, additional_keys=None, additional_values=None)
    errors = {"image": Reference(w, inputs, "fwd").errors({"out": image[3]})["out"]}
    if text:
        query, key, value, found = (x[0, :, -1].double() for x in heads)
        weights = (query[:text] @ key.T * w.scale).softmax(-1)
        exact = weights @ value
        rounded = (weights.to(DTYPE).double() @ value).to(DTYPE).double()
        errors["text"] = (_error(found[:text], exact), ERROR_FACTOR * _error(rounded, exact))
    return errors


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@torch.no_grad()
def measure(problem: Problem, device: torch.device, budget_s: float, with_dense: bool) -> list[Row]:
    sequence = make_sequence(problem, device)
    ways: dict[str, Callable[[list[Tensor]], Tensor]] = {WINDOWS: windows(problem)}
    if with_dense:
        ways[DENSE] = dense
    calls: dict[str, timing.Call] = {name: lambda i, way=way: way(sequence) for name, way in ways.items()}
    window, rows = problem.workload.window, {}
    for name in ways:
        size, stride = (window.kernel_size, window.stride) if name == WINDOWS else (problem.workload.spatial, (1,))
        rows[name] = Row(
            problem.name, name, problem.tokens, size, stride, problem.share if name == WINDOWS else 1.0, {}
        )
        rows[name].first_call_s = timing.host_seconds(calls[name], device, 1)
    row = rows[WINDOWS]
    row.errors = check(problem, sequence, ways[WINDOWS](sequence))
    wrong = {part: error for part, (error, allowed) in row.errors.items() if not error <= allowed}
    if wrong:
        row.failure = f"wrong result, relative errors {wrong} of {row.errors}"
        del calls[WINDOWS]
    for name in calls:
        peak = timing.peak_bytes(calls[name], device)
        rows[name].peak_mib = None if peak is None else peak / 2**20
    for name, sample in timing.measure(calls, device, budget_s).items():
        row = rows[name]
        row.take(sample)
    return list(rows.values())


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| problem | attention | tokens | window | share of pairs | ms | p10 - p90 | peak MiB | first call s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.problem, row.implementation, str(row.tokens), "x".join(map(str, row.window))]
        cells.append(f"{row.share_of_pairs:.1%}")
        if row.median_ms is None:
            cells += ["-", row.failure or "", "-", "-"]
        else:
            cells += [f"{row.median_ms:.3g}", row.spread]
            cells += ["-" if row.peak_mib is None else f"{row.peak_mib:.0f}", f"{row.first_call_s:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a result was wrong."""
    parser = runner.make_parser("diffusers_attention", __doc__, budget_s=1.0, timed="each problem")
    runner.add_names(parser, "--problems", PROBLEMS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    report = runner.Report(args, device)
    rows: list[Row] = []
    models: set[str] = set()
    for name in args.problems:
        problem = PROBLEMS[name]
        if args.smoke:
            problem = replace(problem, workload=smoke(replace(problem.workload, kv_heads=problem.workload.heads // 2)))
            problem = replace(problem, workload=replace(problem.workload, kv_heads=problem.workload.heads))
        # Dense attention is the same for all windows of a model.
        rows += measure(problem, device, args.budget_s, with_dense=problem.family not in models)
        models.add(problem.family)
        report.keep(rows=rows)
        print(
            f"{name}: {'; '.join(row.failure or f'{row.implementation} {row.median_ms:.3g} ms' for row in rows[-2:])}"
        )
    print(report.text(table(rows)))
    return int(any(row.failure for row in rows))


if __name__ == "__main__":
    sys.exit(runner.command(main))
