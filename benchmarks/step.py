"""Time a step of a whole model, and the share of attention in it: ``python -m benchmarks.step --help``.

There are two models: the HDiT of k-diffusion's config for Oxford flowers (256x256, batch 32, bf16 autocast), and a
decoder block of Mistral's shape over one text of 32768 tokens in bf16. A step is a training step (loss, backward,
AdamW) or one call of the sampler's denoiser. Each model runs with this library, plain and with grouped heads and
registers, and with FlexAttention instead, compiled or not. A model whose error against fp64 exceeds twice that of the
eager path in its precision gets no time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config

from natten_layers import neighborhood_attention
from natten_layers_cli.progress import progress

from . import runner, timing
from .check import ERROR_FACTOR, wrong_result
from .implementations import OURS, UnsupportedError
from .models import SMOKE, Attend, Sizes, Subject, attention, flex_attend, make_subjects

OUR_KERNELS = (
    "forward_kernel", "backward_query_kernel", "backward_key_kernel", "backward_register_kernel",
    "large_forward_kernel", "large_dq_kernel", "large_dkv_kernel", "large_registers_kernel", "repair_kernel",
    "statistics_kernel",
    "small_forward_kernel", "small_forward_rolling_kernel", "small_dq_kernel", "small_dkv_kernel",
    "qk_prep_kernel", "qk_prep_backward_kernel", "jvp_kernel", "qk_prep_jvp_kernel",
    "bias_gradient_kernel", "bias_sum_kernel",
)  # fmt: skip
"""Prefixes of the names of this library's kernels: attention, normalisation and RoPE."""
PEERS = ("flex",)


@dataclass
class Row(timing.Timed):
    """One step of one model. Times are None if ``failure`` gives a reason, or if the run was interrupted."""

    model: str
    step: str
    attention: str
    compiled: bool
    error: float | None = None
    allowed: float | None = None
    peak_mib: float | None = None
    device_ms: float | None = None
    """Time for which the device is busy in one step; for the rest of ``median_ms`` it waits for the host."""
    attention_share: float | None = None
    """Share of this library's kernels in the device's busy time; None for peers."""


def run(
    name: str, variants: dict[str, Callable[[], Subject]], compiled: bool, device: torch.device, budget_s: float,
    *, peers: Sequence[str] = PEERS, report: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:  # fmt: skip
    """Time every step of every variant of one model, in alternation.

    ``report`` is called with the rows after each variant is checked, still without times, and again with times.
    """
    rows: list[Row] = []
    calls: dict[str, timing.Call] = {}
    torch.compiler.reset()
    pairs = list(_pairs(variants, peers))
    bar = progress(len(pairs), f"checks of {name}, {'compiled' if compiled else 'not compiled'}")
    for (variant, make), (peer, attend) in pairs:
        label = f"{peer}, {variant}"
        subject = make()
        steps = _steps(subject, attend)
        failure, error, allowed = _check(subject, attend, steps if compiled else {})
        for step, call in steps.items():
            row = Row(name, step, label, compiled, error, allowed, failure=failure)
            rows.append(row)
            try:
                if row.failure is None:
                    call(0)
                    peak = timing.peak_bytes(call, device)
                    row.peak_mib = None if peak is None else peak / 2**20
                    row.device_ms, share = _busy(call, device)
                    row.attention_share = share if attend is None else None
                    calls[str(len(rows) - 1)] = call
            except Exception as error_of_step:  # one step's error must not stop the others
                row.failure = _first_line(error_of_step)
            busy = "" if row.device_ms is None else f", device busy for {row.device_ms:.3g} ms"
            with bar.external_write_mode():
                print(f"{name} {step} {label}: {row.failure or 'checked'}{busy}", flush=True)
        report(rows)
        bar.update()
    bar.close()
    for index, sample in timing.measure(calls, device, budget_s).items():
        row = rows[int(index)]
        row.take(sample)
    report(rows)
    return rows


def _pairs(
    variants: dict[str, Callable[[], Subject]], peers: Sequence[str]
) -> Iterator[tuple[tuple[str, Callable[[], Subject]], tuple[str, Attend | None]]]:
    for variant in variants.items():
        yield variant, (OURS, None)
        if "flex" in peers and "registers" not in variant[0]:  # FlexAttention has no registers
            yield variant, ("flex", flex_attend)


def _steps(subject: Subject, attend: Attend | None) -> dict[str, timing.Call]:
    optimizer = torch.optim.AdamW(subject.parameters, fused=next(subject.model.parameters()).is_cuda)

    def train(_: int) -> Tensor:
        with attention(attend):
            loss = subject.loss(subject.model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def sample(_: int) -> Tensor:
        assert subject.sample is not None
        with attention(attend):
            return subject.sample(subject.model)

    return {"train": train} if subject.sample is None else {"train": train, "sample": sample}


def _check(
    subject: Subject, attend: Attend | None, to_compile: dict[str, timing.Call]
) -> tuple[str | None, float | None, float | None]:
    """Compile the model if it has steps to run compiled, then compare it with fp64.

    Returns:
        A description of what is wrong, or None; the relative error of the output; and the allowed error.
    """

    def eager_attend(*args: Any, **options: Any) -> Tensor:
        return neighborhood_attention(*args, **options, impl="eager")

    try:
        plain = copy.deepcopy(subject.model)
        if to_compile:
            for call in to_compile.values():
                call(0)  # a peer's preparations in its first call must not become part of the graph
            plain.load_state_dict(subject.model.state_dict())
            subject.model.compile()
        with torch.no_grad(), attention(eager_attend):
            twin = subject.output(plain, torch.bfloat16)
            exact = subject.output(plain.double(), torch.float64)
        with torch.no_grad(), attention(attend):
            actual = subject.output(subject.model, torch.bfloat16)
    except Exception as error:
        return _first_line(error), None, None
    error, allowed = (((t.double() - exact).norm() / exact.norm()).item() for t in (actual, twin))
    allowed *= ERROR_FACTOR
    return wrong_result(error, allowed), error, allowed


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {text}"


def _busy(call: timing.Call, device: torch.device) -> tuple[float | None, float | None]:
    """Milliseconds for which the device is busy in one call, and the share of this library's kernels in them."""
    if device.type != "cuda":
        return None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call(0)
        torch.cuda.synchronize(device)
    busy = [
        (event.name, event.time_range.elapsed_us())
        for event in profile.events() or []
        if "CUDA" in str(event.device_type)
    ]
    total = sum(us for _, us in busy)
    return total / 1e3, sum(us for name, us in busy if name.startswith(OUR_KERNELS)) / total


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| model | step | attention | compiled | ms | p10 - p90 | device, ms | attention's share | peak MiB | note |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        cells = [row.model, row.step, row.attention, "yes" if row.compiled else "no"]
        cells += ["", ""] if row.median_ms is None else [f"{row.median_ms:.3g}", row.spread]
        cells += ["" if row.device_ms is None else f"{row.device_ms:.3g}"]
        cells += ["" if row.attention_share is None else f"{row.attention_share:.0%}"]
        cells += ["" if row.peak_mib is None else f"{row.peak_mib:.0f}", row.failure or ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if this library failed anywhere."""
    parser = runner.make_parser("step", __doc__, budget_s=3.0, timed="each model")
    runner.add_names(parser, "--models", ("hdit-flowers", "mistral-block"))
    parser.add_argument("--compile", choices=("yes", "no", "both"), help="default: both; with --smoke no")
    runner.add_names(parser, "--peers", PEERS, none=True)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    report = runner.Report(args, device)
    rows: list[Row] = []
    compiled_or_not = {"yes": (True,), "no": (False,), "both": (False, True)}
    wanted = compiled_or_not[args.compile or ("no" if args.smoke else "both")]

    def save(more: list[Row]) -> None:
        report.keep(rows=rows + more)

    for name, variants in make_subjects(SMOKE if args.smoke else Sizes(), device).items():
        for compiled in wanted:
            if name in args.models:
                # Beyond torch's usual limit, further variants of one function would silently run uncompiled.
                with dynamo_config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
                    rows += run(name, variants, compiled, device, args.budget_s, peers=args.peers, report=save)
    print(report.text(table(rows)))
    return int(any(row.failure for row in rows if row.attention.startswith(OURS)))


if __name__ == "__main__":
    sys.exit(runner.command(main))
