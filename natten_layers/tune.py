"""Search the fastest tile configurations of the fused kernels on this machine's GPU, and save them for later calls.

    python -m natten_layers.tune 128x128 --kernel-size 7x7 --heads 8 --kv-heads 2 --head-dim 64 --batch 8

A call never searches; without this command tiles are chosen by rule. Results are saved in ``configs.json`` in
``$NATTEN_LAYERS_CACHE`` or the user's cache folder. Processes that start afterwards use them for every call with these
lengths, window, query heads per KV head, head dim and dtype on this kind of GPU. A tile configuration is saved only if
the kernel's results agree with those of the rule's. Delete the file to go back to the rule.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from .kernels.host.problem import Inputs, Options, device_traits, problem_of, three_axes
from .kernels.host.tiling import Kind, ProblemClass, TileConfig, best_boxes, boxes, rule
from .kernels.host.tuned import cache_file, override, write_tuned
from .operations import neighborhood_attention

__all__ = ["Found", "main", "neighbors", "search", "tune"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAXNREGS = (None, 96, 128, 168)
TRAINED: tuple[Kind, ...] = ("forward", "backward_query", "backward_key")
GAIN = 0.02
"""Part of the time that a change must save to be more than noise."""

Timer = Callable[[Callable[[], object]], float]
Measure = Callable[[TileConfig], float]
"""Returns the seconds that a tile configuration takes; infinite if it cannot run or its results are wrong."""


@dataclass(frozen=True)
class Found:
    """The best tile configuration of one kernel, its seconds, and those of the rule's tile configuration."""

    config: TileConfig
    seconds: float
    rule_seconds: float

    @property
    def gains(self) -> bool:
        return self.seconds < (1 - GAIN) * self.rule_seconds


def neighbors(kind: Kind, problem: ProblemClass, config: TileConfig) -> Iterator[TileConfig]:
    """Tile configurations that differ from ``config`` in one respect."""
    for warps in (config.num_warps * 2, config.num_warps // 2):
        if 1 <= warps <= 16:
            yield replace(config, num_warps=warps)
    for stages in (config.stages + 1, config.stages - 1):
        if 1 <= stages <= 5:
            yield replace(config, stages=stages)
    yield from (replace(config, maxnreg=n) for n in MAXNREGS if n != config.maxnreg)
    yield replace(config, skip_mask=not config.skip_mask)
    positions, keys = math.prod(config.tile), math.prod(config.chunk)
    rows = positions * config.pack
    packs = (config.pack,) if kind == "backward_key" else (config.pack, config.pack * 2, config.pack // 2)
    for other_rows, other_keys, pack in (
        *((r, keys, config.pack) for r in (rows * 2, rows // 2)),
        *((rows, k, config.pack) for k in (keys * 2, keys // 2)),
        *((rows, keys, p) for p in packs if p != config.pack),
    ):
        if 16 <= other_rows <= 256 and 16 <= other_keys <= 256 and 1 <= pack <= min(16, other_rows):
            tile, chunk = best_boxes(other_rows // pack, other_keys, problem.lengths, problem.kernel)
            yield replace(config, tile=tile, chunk=chunk, pack=pack)
    unions = [min(n, t + k - 1) for n, t, k in zip(problem.lengths, config.tile, problem.kernel, strict=True)]
    yield from (replace(config, tile=tile) for tile in boxes(positions, problem.lengths) if tile != config.tile)
    yield from (replace(config, chunk=chunk) for chunk in boxes(keys, unions) if chunk != config.chunk)


def search(
    kind: Kind,
    problem: ProblemClass,
    measure: Measure,
    *,
    trials: int,
    report: Callable[[TileConfig, float], None] = lambda config, seconds: None,
) -> Iterator[Found]:
    """Hill climbing: from the rule's tile configuration to the best neighbor, until none gains or ``trials`` are used.

    Yields the best so far after every trial, so that an interrupted search has a result.
    """
    best = rule(kind, problem)
    seconds = rule_seconds = measure(best)
    report(best, seconds)
    yield Found(best, seconds, rule_seconds)
    seen, left, improved = {best}, trials, True
    while improved:
        improved = False
        origin, at_least = best, (1 - GAIN) * seconds
        for config in neighbors(kind, problem, origin):
            if left == 0:
                return
            if config in seen:
                continue
            seen.add(config)
            left -= 1
            time = measure(config)
            report(config, time)
            if time < min(seconds, at_least):
                best, seconds, improved = config, time, True
            yield Found(best, seconds, rule_seconds)


def tune(
    problem: ProblemClass,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: Sequence[Tensor],
    *,
    kinds: Sequence[Kind],
    trials: int,
    timer: Timer,
    report: Callable[[Kind, TileConfig, float], None],
) -> Iterator[tuple[Kind, Found]]:
    """:func:`search` for several kernels, timing calls of the operation.

    Args:
        attend: the operation, a function of query, key and value.
        inputs: query, key, value and the gradient of the output.
    """
    for kind in kinds:
        measure = _measure(kind, attend, inputs, timer)
        for found in search(kind, problem, measure, trials=trials, report=partial(report, kind)):
            yield kind, found


def _measure(
    kind: Kind, attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Sequence[Tensor], timer: Timer
) -> Measure:
    *leaves, grad_out = (t.detach() for t in inputs)
    if kind == "forward":

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(*leaves),)

    elif kind == "jvp":

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return torch.func.jvp(attend, tuple(leaves), tuple(leaves))[1:]

    else:
        leaves = [t.requires_grad_() for t in leaves]
        out = attend(*leaves)

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    expected = run()
    # Results may differ by the order of sums, and by the rounding of weights and of the result.
    limit = 4 * torch.finfo(grad_out.dtype).eps

    def seconds(config: TileConfig) -> float:
        # Overrides hold in one thread only, so the backward pass must stay in this one.
        with override({kind: config}), torch.autograd.set_multithreading_enabled(False):
            try:
                results = run()
            except Exception:  # Triton raises many kinds of errors if a launch needs more than the device has
                return math.inf
            right = all(_error(a, b) <= limit for a, b in zip(results, expected, strict=True))
            return timer(run) if right else math.inf

    return seconds


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def _device_seconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    median = do_bench(run, warmup=10, rep=60, return_mode="median")
    assert isinstance(median, float)
    return median * 1e-3


def _describe(config: TileConfig) -> str:
    tile, chunk = ("x".join(map(str, box)) for box in (config.tile, config.chunk))
    parts = [f"tile {tile}", f"chunk {chunk}"]
    parts += [
        f"{n} {what}" for n, what in ((config.pack, "heads"), (config.num_warps, "warps"), (config.stages, "stages"))
    ]
    parts += [] if config.maxnreg is None else [f"{config.maxnreg} registers"]
    return ", ".join([*parts, *(["branch around the mask"] if config.skip_mask else [])])


def _axes(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split("x"))
    except ValueError:
        values = ()
    if not 1 <= len(values) <= 3:
        raise argparse.ArgumentTypeError(f"expected 1 to 3 numbers such as 128x128, got {text!r}")
    return values


def _parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m natten_layers.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens", type=_axes, help="length of every axis: 4096, 128x128, 30x48x80")
    parser.add_argument("--kernel-size", type=_axes, required=True, metavar="K", help="one for all axes or one each")
    parser.add_argument("--dilation", type=_axes, default=(1,), metavar="D")
    parser.add_argument("--causal", action="store_true", help="on all axes")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, required=True, help="query heads")
    parser.add_argument("--kv-heads", type=int, help="default: as many")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    # The kernel of forward mode is tuned on request, as few calls take it.
    parser.add_argument("--kernels", nargs="+", choices=get_args(Kind), default=list(TRAINED))
    parser.add_argument("--trials", type=int, default=60, help="launches to try for each kernel, default %(default)s")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    if args.trials < 1:
        parser.error(f"--trials must be at least 1, got {args.trials}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here, and the fused kernels run on no other")
    return parser, args


def _draw(args: argparse.Namespace, kv_heads: int) -> list[Tensor]:
    """Random query, key, value and gradient of the output."""
    generator = torch.Generator(args.device).manual_seed(0)
    shapes = (
        (args.batch, *args.tokens, heads, args.head_dim) for heads in (args.heads, kv_heads, kv_heads, args.heads)
    )
    dtype = DTYPES[args.dtype]
    return [torch.randn(shape, generator=generator, device=args.device).to(dtype) for shape in shapes]


def _problem_class(args: argparse.Namespace, query: Tensor, kv_heads: int) -> ProblemClass:
    """The problem class under which a call with these tensors looks up its tile configuration."""
    dilation, kernel_size = (_spread(v, len(args.tokens)) for v in (args.dilation, args.kernel_size))
    classes = [math.ceil(n / d) for n, d in zip(args.tokens, dilation, strict=True)]
    return ProblemClass(
        *device_traits(query.device), three_axes(classes, 1), three_axes(kernel_size, 1), args.heads // kv_heads,
        args.head_dim, args.head_dim, query.element_size(),
    )  # fmt: skip


def _kinds(args: argparse.Namespace, heads: Sequence[Tensor]) -> list[Kind]:
    """The kernels to search: without those that this call does not use, as kernels without tuned tiles replace them."""
    from .kernels.dispatch import Question, choose  # imports Triton, which is installed, as a call has run

    query, key, value = heads
    rank = len(args.tokens)
    options = Options(
        None, _spread(args.kernel_size, rank), (1,) * rank, _spread(args.dilation, rank), (args.causal,) * rank, 1.0
    )
    problem = problem_of(Inputs(query, key, value), options)
    questions: dict[Kind, Question] = {
        "forward": Question(problem),
        **dict.fromkeys(("backward_query", "backward_key"), Question(problem, True, problem.query)),
    }
    taken = [kind for kind, question in questions.items() if not choose(kind, question).is_portable]
    if taken:
        print(f"{', '.join(taken)}: windows of this size have kernels of their own on this GPU")
    return [kind for kind in args.kernels if kind not in taken]


def _spread(values: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return values * rank if len(values) == 1 else values


def _report(kind: Kind, config: TileConfig, seconds: float) -> None:
    time = "does not run" if seconds == math.inf else f"{seconds * 1e3:.4g} ms"
    print(f"{kind:14} {time:>12}  {_describe(config)}", flush=True)


def main(argv: Sequence[str] | None = None, *, timer: Timer = _device_seconds) -> int:
    """Run the command; returns the exit status. Results that were found before Ctrl-C are saved."""
    parser, args = _parse(argv)
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    found: dict[Kind, Found] = {}
    status = 0
    try:
        *heads, grad_out = _draw(args, kv_heads)

        kernel_size, dilation = (_spread(v, len(args.tokens)) for v in (args.kernel_size, args.dilation))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return neighborhood_attention(q, k, v, kernel_size, dilation=dilation, is_causal=args.causal, impl="fused")

        # Arguments that do not fit, and a file that is damaged or cannot be written, must fail before the search.
        attend(*heads)
        write_tuned(cache_file(), {})
        problem = _problem_class(args, heads[0], kv_heads)
        try:
            for kind, best in tune(
                problem, attend, (*heads, grad_out),
                kinds=_kinds(args, heads), trials=args.trials, timer=timer, report=_report,
            ):  # fmt: skip
                found[kind] = best
        except KeyboardInterrupt:
            status = 130
        gains: dict[tuple[Kind, ProblemClass], TileConfig] = {}
        for kind, best in found.items():
            if best.gains:
                gains[kind, problem] = best.config
            gain = (
                f"{best.rule_seconds / best.seconds:.2f}x with {_describe(best.config)}" if best.gains else "the rule's"
            )
            print(f"{kind}: {gain}")
        if gains:
            write_tuned(cache_file(), gains)
            print(f"written to {cache_file()}")
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        parser.exit(1, f"{parser.prog}: error: {' '.join(str(error).split()) or type(error).__name__}\n")
    except KeyboardInterrupt:  # pressed before or after the search
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
