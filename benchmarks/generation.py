"""Time one generated token of a whole language model over full caches: ``python -m benchmarks.generation --help``.

A decoder of Mistral-7B's shape with random weights in bf16 generates one token for each of a batch of texts, whose
caches hold a whole window. The floor is the time to read every weight and every cached key and value once at the copy
bandwidth. Times are of the call as a user makes it, host time included. First, a model of two such layers is compared
with fp64; if its error exceeds twice that of the eager path in bf16, there is no time.
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from natten_layers import DecoderLM, DecoderLMConfig, cached_attention
from natten_layers.modules.cache import Cache
from natten_layers.modules.generation import one_token

from . import runner, timing
from .check import ERROR_FACTOR, wrong_result
from .models import calling

MISTRAL_7B = DecoderLMConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    windows=(4096,),
)  # fmt: skip
SMOKE = replace(
    MISTRAL_7B, vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=16, windows=(12,),
)  # fmt: skip
GOAL = 0.7
"""The fraction of the copy bandwidth that a row should reach."""


@dataclass
class Row(timing.Timed):
    """One generated token for every text of a batch. Times are None if ``failure`` gives a reason."""

    batch: int
    floor_ms: float
    error: float
    allowed: float
    tokens_per_s: float | None = None
    of_copy: float | None = None
    """Achieved fraction of the copy bandwidth."""


def make_model(config: DecoderLMConfig, device: torch.device) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(config, device=device, dtype=torch.bfloat16).eval().requires_grad_(False)


def full_cache(model: DecoderLM, batch: int, dtype: torch.dtype) -> Cache:
    """A cache of random keys and values in the state that it has after ``window`` tokens."""
    config, device = model.config, model.model.embed_tokens.weight.device
    cache = model.make_cache(batch)
    generator = torch.Generator(device).manual_seed(1)
    for layer, window in zip(cache.layers, config.windows, strict=True):
        assert window is not None
        shape = (batch, window, config.kv_heads, config.dim)
        key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(2))
        layer.extend(key.to(dtype), value.to(dtype), torch.arange(window, device=device).expand(batch, -1), window)
        cache.longest = window
    cache.lengths += cache.longest
    return cache


def draw_ids(model: DecoderLM, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(model.config.vocab_size, (batch, 1), generator=generator)
    return ids.to(model.model.embed_tokens.weight.device)


@torch.inference_mode()
def check(config: DecoderLMConfig, device: torch.device) -> tuple[float, float]:
    """Relative error of the logits in bf16 against fp64, and the allowed error, for two layers of the model."""
    small = replace(config, num_layers=2, windows=config.windows[:2])
    model = make_model(small, device)
    ids = draw_ids(model, 2)

    def eager(*args: Any, **options: Any) -> Tensor:
        return cached_attention(*args, **options, impl="eager")

    actual = model(ids, cache=full_cache(model, 2, torch.bfloat16))
    with calling("cached_attention", eager, ("natten_layers.modules.decoder_attention",)):
        twin = model(ids, cache=full_cache(model, 2, torch.bfloat16))
        wide = copy.deepcopy(model).double()
        exact = wide(ids, cache=full_cache(wide, 2, torch.float64))
    error, allowed = (((t.double() - exact).norm() / exact.norm()).item() for t in (actual, twin))
    return error, ERROR_FACTOR * allowed


@torch.inference_mode()
def measure(model: DecoderLM, batch: int, row: Row, budget_s: float, device: torch.device) -> None:
    """Fill in the times of ``row``. The caches roll, so every call reads the same number of bytes."""
    cache, ids = full_cache(model, batch, torch.bfloat16), draw_ids(model, batch)[:, 0]
    next_token = one_token(model, cache)

    def step() -> float:
        start = time.perf_counter()
        next_token(ids)
        timing.synchronize(device)
        return time.perf_counter() - start

    first = [step() for _ in range(3)]
    times = sorted(step() for _ in range(max(5, min(200, int(budget_s / min(first))))))
    row.median_ms, row.p10_ms, row.p90_ms = (1e3 * times[int(p * (len(times) - 1))] for p in (0.5, 0.1, 0.9))
    row.tokens_per_s = 1e3 * batch / row.median_ms
    row.of_copy = row.floor_ms / row.median_ms


def floor_bytes(model: DecoderLM, batch: int) -> int:
    """Bytes in bf16 of the weights (of the embedding, one row per text) and of the cached keys and values."""
    config = model.config
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    cached = sum(4 * batch * (window or 0) * config.kv_heads * config.dim for window in config.windows)
    return weights + 2 * batch * config.hidden_size + cached


def table(rows: list[Row]) -> list[str]:
    lines = [
        f"| batch | ms | p10 - p90 | floor ms | tokens/s | of copy bandwidth (goal {GOAL:.0%}) | note |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        cells = ["", "", f"{row.floor_ms:.3g}", "", ""]
        if row.median_ms is not None:
            cells = [f"{row.median_ms:.3g}", row.spread, f"{row.floor_ms:.3g}"]
            cells += [f"{row.tokens_per_s:.0f}", f"{row.of_copy:.0%}"]
        lines.append(f"| {' | '.join([str(row.batch), *cells, row.failure or ''])} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a result was wrong."""
    parser = runner.make_parser("generation", __doc__, budget_s=2.0, timed="each batch size")
    parser.add_argument(
        "--batch-sizes", type=runner.at_least(1), nargs="+", default=[1, 16, 64], help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    device, config = torch.device(args.device), SMOKE if args.smoke else MISTRAL_7B
    if device.type == "cpu" and not args.smoke:
        parser.error("7 billion weights and full caches need a GPU; --smoke tests the benchmark on a CPU")
    report = runner.Report(args, device)
    error, allowed = check(config, device)
    failure = wrong_result(error, allowed)
    model = make_model(config, device)
    rows: list[Row] = []
    for batch in args.batch_sizes:
        row = Row(batch, 1e3 * floor_bytes(model, batch) / report.rates.copy, error, allowed, failure=failure)
        rows.append(row)
        if failure is None:
            measure(model, batch, row, args.budget_s, device)
        report.keep(rows=rows)
    print(report.text(table(rows)))
    return int(failure is not None)


if __name__ == "__main__":
    sys.exit(runner.command(main))
