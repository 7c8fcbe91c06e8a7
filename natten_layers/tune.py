"""Search the fastest launches of the fused kernels for a problem on this machine's GPU, and keep them for later calls.

    python -m natten_layers.tune 128x128 --kernel-size 7x7 --heads 8 --kv-heads 2 --head-dim 64 --batch 8

The library never searches on a call: without this command a rule chooses. What is found goes to ``launches.json`` in
``$NATTEN_LAYERS_CACHE`` or the user's cache folder, and serves every call with these lengths, window, heads a KV head,
head dim and dtype on this kind of GPU, in processes that start afterwards. A launch is kept only if its results agree
with the rule's. Delete the file to forget it all.
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
from .kernels.host.tiling import Kind, Launch, ProblemClass, best_boxes, boxes, rule
from .kernels.host.tuned import cache_file, override, write_tuned
from .operations import neighborhood_attention

__all__ = ["Found", "main", "neighbors", "search", "tune"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REGISTERS = (None, 96, 128, 168)
GAIN = 0.02
"""part of the time that a change must save, or it is noise"""

Timer = Callable[[Callable[[], object]], float]
Measure = Callable[[Launch], float]
"""Seconds of a launch; infinite if it cannot run or its results are wrong."""


@dataclass(frozen=True)
class Found:
    """The best launch of one kernel, and its seconds beside those of the rule's."""

    launch: Launch
    seconds: float
    rule_seconds: float

    @property
    def gains(self) -> bool:
        return self.seconds < (1 - GAIN) * self.rule_seconds


def neighbors(kind: Kind, problem: ProblemClass, launch: Launch) -> Iterator[Launch]:
    """Launches that differ in one respect."""
    for warps in (launch.num_warps * 2, launch.num_warps // 2):
        if 1 <= warps <= 16:
            yield replace(launch, num_warps=warps)
    for stages in (launch.stages + 1, launch.stages - 1):
        if 1 <= stages <= 5:
            yield replace(launch, stages=stages)
    yield from (replace(launch, max_registers=n) for n in REGISTERS if n != launch.max_registers)
    yield replace(launch, skip_mask=not launch.skip_mask)
    positions, keys = math.prod(launch.tile), math.prod(launch.chunk)
    rows = positions * launch.pack
    packs = (launch.pack,) if kind == "backward_key" else (launch.pack, launch.pack * 2, launch.pack // 2)
    for other_rows, other_keys, pack in (
        *((r, keys, launch.pack) for r in (rows * 2, rows // 2)),
        *((rows, k, launch.pack) for k in (keys * 2, keys // 2)),
        *((rows, keys, p) for p in packs if p != launch.pack),
    ):
        if 16 <= other_rows <= 256 and 16 <= other_keys <= 256 and 1 <= pack <= min(16, other_rows):
            tile, chunk = best_boxes(other_rows // pack, other_keys, problem.lengths, problem.kernel)
            yield replace(launch, tile=tile, chunk=chunk, pack=pack)
    unions = [min(n, t + k - 1) for n, t, k in zip(problem.lengths, launch.tile, problem.kernel, strict=True)]
    yield from (replace(launch, tile=tile) for tile in boxes(positions, problem.lengths) if tile != launch.tile)
    yield from (replace(launch, chunk=chunk) for chunk in boxes(keys, unions) if chunk != launch.chunk)


def search(
    kind: Kind,
    problem: ProblemClass,
    measure: Measure,
    *,
    trials: int,
    report: Callable[[Launch, float], None] = lambda launch, seconds: None,
) -> Iterator[Found]:
    """Go from the rule's launch to the best neighbor, as long as that gains and ``trials`` last.

    Yields the best so far after every trial, so that a search that is cut off still found something.
    """
    best = rule(kind, problem)
    seconds = rule_seconds = measure(best)
    report(best, seconds)
    yield Found(best, seconds, rule_seconds)
    seen, left, moved = {best}, trials, True
    while moved:
        moved = False
        origin, at_least = best, (1 - GAIN) * seconds
        for launch in neighbors(kind, problem, origin):
            if left == 0:
                return
            if launch in seen:
                continue
            seen.add(launch)
            left -= 1
            time = measure(launch)
            report(launch, time)
            if time < min(seconds, at_least):
                best, seconds, moved = launch, time, True
            yield Found(best, seconds, rule_seconds)


def tune(
    problem: ProblemClass,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: Sequence[Tensor],
    *,
    kinds: Sequence[Kind],
    trials: int,
    timer: Timer,
    report: Callable[[Kind, Launch, float], None],
) -> Iterator[tuple[Kind, Found]]:
    """:func:`search` for several kernels, on a call of the operation.

    Args:
        attend: the operation on query, key and value.
        inputs: query, key, value, and the gradient of the output.
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

    else:
        leaves = [t.requires_grad_() for t in leaves]
        out = attend(*leaves)

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    expected = run()
    limit = 4 * torch.finfo(grad_out.dtype).eps  # another order of sums, and a rounding of weights and result each

    def seconds(launch: Launch) -> float:
        # Overrides hold in one thread: the backward pass must not move to another.
        with override({kind: launch}), torch.autograd.set_multithreading_enabled(False):
            try:
                results = run()
            except Exception:  # Triton fails in many ways where a launch asks for more than the device has
                return math.inf
            right = all(_error(a, b) <= limit for a, b in zip(results, expected, strict=True))
            return timer(run) if right else math.inf

    return seconds


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def _device_seconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    median = do_bench(run, warmup=10, rep=60, return_mode="median")
    assert isinstance(median, float)
    return median * 1e-3


def _describe(launch: Launch) -> str:
    tile, chunk = ("x".join(map(str, box)) for box in (launch.tile, launch.chunk))
    parts = [f"tile {tile}", f"chunk {chunk}"]
    parts += [
        f"{n} {what}" for n, what in ((launch.pack, "heads"), (launch.num_warps, "warps"), (launch.stages, "stages"))
    ]
    parts += [] if launch.max_registers is None else [f"{launch.max_registers} registers"]
    return ", ".join([*parts, *(["branch around the mask"] if launch.skip_mask else [])])


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
    parser.add_argument("--kernels", nargs="+", choices=get_args(Kind), default=list(get_args(Kind)))
    parser.add_argument("--trials", type=int, default=60, help="launches to try for each kernel, default %(default)s")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    if args.trials < 1:
        parser.error(f"--trials must be at least 1, got {args.trials}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here, and the fused kernels run on no other")
    return parser, args


def _draw(args: argparse.Namespace, kv_heads: int) -> list[Tensor]:
    """Query, key, value and the output's gradient."""
    generator = torch.Generator(args.device).manual_seed(0)
    shapes = (
        (args.batch, *args.tokens, heads, args.head_dim) for heads in (args.heads, kv_heads, kv_heads, args.heads)
    )
    dtype = DTYPES[args.dtype]
    return [torch.randn(shape, generator=generator, device=args.device).to(dtype) for shape in shapes]


def _problem_class(args: argparse.Namespace, query: Tensor, kv_heads: int) -> ProblemClass:
    """As a call with these tensors looks it up."""
    dilation, kernel_size = (_spread(v, len(args.tokens)) for v in (args.dilation, args.kernel_size))
    classes = [math.ceil(n / d) for n, d in zip(args.tokens, dilation, strict=True)]
    return ProblemClass(
        *device_traits(query.device), three_axes(classes, 1), three_axes(kernel_size, 1), args.heads // kv_heads,
        args.head_dim, args.head_dim, query.element_size(),
    )  # fmt: skip


def _kinds(args: argparse.Namespace, heads: Sequence[Tensor]) -> list[Kind]:
    """The kernels to search: not those whose places others take, which have nothing to search."""
    from .kernels.dispatch import Question, choose  # Triton is there: a call has run

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


def _report(kind: Kind, launch: Launch, seconds: float) -> None:
    time = "does not run" if seconds == math.inf else f"{seconds * 1e3:.4g} ms"
    print(f"{kind:14} {time:>12}  {_describe(launch)}", flush=True)


def main(argv: Sequence[str] | None = None, *, timer: Timer = _device_seconds) -> int:
    """Returns the exit status. What a search found before Ctrl-C is kept."""
    parser, args = _parse(argv)
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    found: dict[Kind, Found] = {}
    status = 0
    try:
        *heads, grad_out = _draw(args, kv_heads)

        kernel_size, dilation = (_spread(v, len(args.tokens)) for v in (args.kernel_size, args.dilation))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return neighborhood_attention(q, k, v, kernel_size, dilation=dilation, is_causal=args.causal, impl="fused")

        attend(*heads)  # what does not fit is an error here
        write_tuned(cache_file(), {})  # and a file that is damaged or cannot be written, not after the search
        problem = _problem_class(args, heads[0], kv_heads)
        try:
            for kind, best in tune(
                problem, attend, (*heads, grad_out),
                kinds=_kinds(args, heads), trials=args.trials, timer=timer, report=_report,
            ):  # fmt: skip
                found[kind] = best
        except KeyboardInterrupt:
            status = 130
        gains: dict[tuple[Kind, ProblemClass], Launch] = {}
        for kind, best in found.items():
            if best.gains:
                gains[kind, problem] = best.launch
            gain = (
                f"{best.rule_seconds / best.seconds:.2f}x with {_describe(best.launch)}" if best.gains else "the rule's"
            )
            print(f"{kind}: {gain}")
        if gains:
            write_tuned(cache_file(), gains)
            print(f"written to {cache_file()}")
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        parser.exit(1, f"{parser.prog}: error: {' '.join(str(error).split()) or type(error).__name__}\n")
    except KeyboardInterrupt:  # before or after the search
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
