"""Search the fastest tile configurations of the fused kernels on this machine's GPU, and save them for later calls.

    natten-layers-tune 128x128 --kernel-size 7x7 --heads 8 --kv-heads 2 --head-dim 64 --batch 8

A call never searches; without this command tiles are chosen by rule. Results are saved in ``configs.json`` in
``$NATTEN_LAYERS_CACHE`` or the user's cache folder. Processes that start afterwards use them for every call with these
lengths, window, query heads per KV head, head dim and dtype on this kind of GPU. A tile configuration is saved only if
the kernel's results agree with those of the rule's. Delete the file to go back to the rule.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor

from natten_layers.kernels.host.problem import Inputs, Options, device_traits, problem_of, three_axes
from natten_layers.kernels.host.tiling import Kind, ProblemClass, TileConfig
from natten_layers.kernels.host.tuned import cache_file, write_tuned
from natten_layers.operations import neighborhood_attention
from natten_layers.tune import Found, Timer, tune

from .running import Parser, run_command

TRAINED: tuple[Kind, ...] = ("forward", "backward_query", "backward_key")
"""Kernels of calls that are trained"""

__all__ = ["main"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="natten-layers-tune", description=__doc__)
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
    return args


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
    from natten_layers.kernels.dispatch import Question, choose  # imports Triton, which is installed, as a call has run

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


def run(args: argparse.Namespace, timer: Timer) -> int:
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    *heads, grad_out = _draw(args, kv_heads)
    kernel_size, dilation = (_spread(v, len(args.tokens)) for v in (args.kernel_size, args.dilation))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, kernel_size, dilation=dilation, is_causal=args.causal, impl="fused")

    # Arguments that do not fit, and a file that is damaged or cannot be written, must fail before the search.
    attend(*heads)
    write_tuned(cache_file(), {})
    problem = _problem_class(args, heads[0], kv_heads)
    found: dict[Kind, Found] = {}
    status = 0
    try:
        for kind, best in tune(
            problem, attend, (*heads, grad_out),
            kinds=_kinds(args, heads), trials=args.trials, timer=timer, report=_report,
        ):  # fmt: skip
            found[kind] = best
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    gains: dict[tuple[Kind, ProblemClass], TileConfig] = {}
    for kind, best in found.items():
        if best.gains:
            gains[kind, problem] = best.config
        gain = f"{best.rule_seconds / best.seconds:.2f}x with {_describe(best.config)}" if best.gains else "the rule's"
        print(f"{kind}: {gain}")
    if gains:
        write_tuned(cache_file(), gains)
        print(f"written to {cache_file()}")
    return status


def main(argv: Sequence[str] | None = None, *, timer: Timer = _device_seconds) -> int:
    """Run the command; returns the exit status. Results that were found before Ctrl-C are saved."""
    return run_command(lambda: run(_parse(argv), timer), when_interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
