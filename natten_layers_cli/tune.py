"""Search the fastest kernels and tiles for calls on this machine's GPU, and save them for later calls.

    natten-layers-tune 128x128 --kernel-size 7x7 --heads 8 --kv-heads 2 --head-dim 64 --batch 8
    natten-layers-tune --model config_oxford_flowers.json --batch 32         an HDiT, each of its levels
    natten-layers-tune --model gpu-demo                                      a preset of natten-layers-train-hdit
    natten-layers-tune 8192 --model mistralai/                               a directory of Hugging Face's, each window

First all kernels that can compute a call are timed, each with its own tiles: for the forward pass without gradients,
for the gradient of queries, for that of keys and values, and with ``--kernels jvp`` for forward mode. Gradients of
registers and of a bias take the kernel that those of keys and values take, if it computes them. Where a portable kernel
is the fastest, its tiles are searched. A call never searches; without this command kernels and tiles are chosen by
rule. Results are saved in ``configs.json`` in ``$NATTEN_LAYERS_CACHE`` or the user's cache folder. Processes that start
afterwards use them for every call with these lengths, window, query heads per KV head, head dim and dtype on this kind
of GPU. Kernels and tiles are saved only if their results agree with those of the rule's. Delete the file to go back to
the rule.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from natten_layers.arguments import prepare
from natten_layers.io.files import naming, read_json
from natten_layers.io.hf_config import config_from_hf
from natten_layers.kernels.host.problem import Inputs, Options, contiguous, device_traits, problem_of, three_axes
from natten_layers.kernels.host.tiling import Kind, ProblemClass, TileConfig
from natten_layers.kernels.host.tuned import cache_file, read_tuned, write_tuned
from natten_layers.kernels.host.variant import Question
from natten_layers.modules.hdit_config import IMAGE_AXES, HDiTConfig, check_axis
from natten_layers.modules.llm_config import DecoderLMConfig
from natten_layers.operations import neighborhood_attention
from natten_layers.tune import Found, Timer, tune, tune_variants
from natten_layers.wording import shorten

from .presets import PRESETS
from .running import MOST_INT, Parser, check_device, run_command

TRAINED: tuple[Kind, ...] = ("forward", "backward_query", "backward_key")
"""Kernels of calls that are trained"""

__all__ = ["DTYPES", "add_flags_of_call", "axes", "check_axes", "main", "spread"]

LONGEST_TEXT = 4
"""Lengths of the largest window that a text of a model has, if its length is not given and the model allows it"""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Call:
    """What tiles depend on in a call of the operation."""

    tokens: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: bool
    heads: int
    kv_heads: int
    head_dim: int
    is_periodic: tuple[bool, ...] = ()
    """Empty if no axis is periodic."""

    def __str__(self) -> str:
        tokens, kernel_size = ("x".join(map(str, axes)) for axes in (self.tokens, self.kernel_size))
        dilation = "" if set(self.dilation) == {1} else f", dilation {'x'.join(map(str, self.dilation))}"
        heads = f"{self.heads} heads" + (f" over {self.kv_heads}" if self.kv_heads != self.heads else "")
        causal = ", causal" if self.is_causal else ""
        rings = [axis for axis, flag in zip(IMAGE_AXES, self.is_periodic, strict=False) if flag]
        causal += f", periodic {' and '.join(rings)}" if rings else ""
        return f"{tokens} tokens, window {kernel_size}{dilation}{causal}, {heads} of {self.head_dim}"


def calls_of_model(path: Path, size: tuple[int, ...] | None) -> list[Call]:
    """The calls that layers with windows of a model make, each once.

    Args:
        path: the JSON configuration of an HDiT, or the directory of a Hugging Face model or its ``config.json``; if
            there is neither, the name of a preset.
        size: height and width of an HDiT's images in pixels, or the length of a decoder's text.

    Raises:
        FileNotFoundError: no such file in a directory.
        ValueError: there is nothing of that name, or the configuration is refused, or has no layer with windows, or the
            size has other axes.
    """
    if not path.exists():
        if str(path) not in PRESETS:
            raise ValueError(f"--model {path} is no file, no directory and no preset: {', '.join(PRESETS)}")
        path = PRESETS[str(path)]
    file = path / "config.json" if path.is_dir() else path
    raw = read_json(file)
    with naming(file):
        if "model_type" in raw:
            calls = _calls_of_decoder(config_from_hf(raw, DecoderLMConfig), size)
        elif path.is_dir():
            raise ValueError("a model's directory needs a config.json with model_type, as Hugging Face's have")
        else:
            calls = _calls_of_hdit(HDiTConfig.from_json(raw), size)
        if not calls:
            raise ValueError(
                "there is nothing to tune: no layer of the model has windows, or none smaller than "
                + ("the images or texts that it is made for" if size is None else f"{'x'.join(map(str, size))}")
            )
    return list(dict.fromkeys(calls))


def _calls_of_hdit(config: HDiTConfig, size: tuple[int, ...] | None) -> list[Call]:
    size = config.input_size if size is None else size
    if len(size) != 2:
        raise ValueError(f"an image has a height and a width, such as 256x256, got {'x'.join(map(str, size))}")
    for axis, length, patch in zip(IMAGE_AXES, size, config.patch_size, strict=True):
        check_axis(axis, length, patch, config.levels)
    calls = []
    for i, level in enumerate(config.levels):
        if level.attention == "neighborhood":
            grid = tuple(n // (patch << i) for n, patch in zip(size, config.patch_size, strict=True))
            kernel_size, dilation = (level.kernel_size,) * 2, (level.dilation,) * 2
            kv_heads = level.num_kv_heads or level.num_heads
            heads = level.num_heads, kv_heads, level.d_head
            rings = tuple(map(level.wraps, IMAGE_AXES))
            calls.append(Call(grid, kernel_size, dilation, False, *heads, rings if any(rings) else ()))
    return calls


def _calls_of_decoder(config: DecoderLMConfig, size: tuple[int, ...] | None) -> list[Call]:
    windows = sorted({window for window in config.windows if window is not None})
    if size is not None and len(size) != 1:
        raise ValueError(f"a text has one length, got {'x'.join(map(str, size))}")
    length = min(LONGEST_TEXT * max(windows, default=1), config.max_positions) if size is None else size[0]
    heads = config.num_heads, config.kv_heads, config.dim
    return [Call((length,), (window,), (1,), True, *heads) for window in windows if window < length]


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


def axes(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split("x"))
    except ValueError:
        values = ()
    if not 1 <= len(values) <= 3 or not all(1 <= value <= MOST_INT for value in values):
        raise argparse.ArgumentTypeError(f"expected 1 to 3 numbers above 0 such as 128x128, got {shorten(text)}")
    return values


def add_flags_of_call(parser: argparse.ArgumentParser) -> None:
    """Flags for all that a call has beside the length of every axis."""
    parser.add_argument("--kernel-size", type=axes, metavar="K", help="one for all axes or one each")
    parser.add_argument("--dilation", type=axes, metavar="D", help="default: 1")
    parser.add_argument("--batch", type=int, default=1, help="images or texts in a call")
    parser.add_argument("--heads", type=int, help="query heads")
    parser.add_argument("--kv-heads", type=int, help="default: as many")
    parser.add_argument("--head-dim", type=int, help="default: 64")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the tensors")


def check_axes(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse flags that have neither one value for all axes of tokens nor one for each."""
    for name in names:
        values = getattr(args, name)
        if values is not None and len(values) not in (1, len(args.tokens)):
            given, tokens = ("x".join(map(str, numbers)) for numbers in (values, args.tokens))
            parser.error(f"--{name.replace('_', '-')} {given} has another number of axes than tokens, {tokens}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    counts = ("batch", "heads", "kv_heads", "head_dim", "trials")
    parser = Parser(prog="natten-layers-tune", description=__doc__, least=dict.fromkeys(counts, 1))
    parser.add_argument(
        "tokens", type=axes, nargs="?",
        help="length of every axis: 4096, 128x128, 30x48x80; with --model the size of images in pixels (default: the "
        f"configuration's) or the length of texts (default: {LONGEST_TEXT} of the largest windows)",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, metavar="CONFIG",
        help="tune what a model calls: the JSON of an HDiT, a directory of Hugging Face's or its config.json, or a "
        f"preset of natten-layers-train-hdit ({', '.join(PRESETS)})",
    )  # fmt: skip
    add_flags_of_call(parser)
    parser.add_argument("--causal", action="store_true", help="on all axes")
    # The kernel of forward mode is tuned on request, as few calls take it.
    parser.add_argument(
        "--kernels", nargs="+", choices=get_args(Kind), default=list(TRAINED), help=f"default: {' '.join(TRAINED)}"
    )
    parser.add_argument("--trials", type=int, default=60, help="launches to try for each kernel, default %(default)s")
    parser.add_argument("--device", default="cuda", help="to tune for")
    args = parser.parse(argv)
    if not args.device.startswith("cuda"):  # a model is read, and refused, on a machine without a GPU too
        check_device(parser, args.device)
    own = ("kernel_size", "dilation", "causal", "heads", "kv_heads", "head_dim")
    given = [f"--{name.replace('_', '-')}" for name in own if getattr(args, name)]
    if args.model is not None and given:
        parser.error(f"the model of --model says {', '.join(given)}; leave it out")
    if args.model is None and not (args.tokens and args.kernel_size and args.heads):
        parser.error("the length of every axis, --kernel-size and --heads are needed, or --model")
    check_axes(parser, args, "kernel_size", "dilation")
    return args


def _calls(args: argparse.Namespace) -> list[Call]:
    if args.model is not None:
        return calls_of_model(args.model, args.tokens)
    kernel_size, dilation = (spread(v, len(args.tokens)) for v in (args.kernel_size, args.dilation or (1,)))
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    head_dim = 64 if args.head_dim is None else args.head_dim
    return [Call(args.tokens, kernel_size, dilation, args.causal, args.heads, kv_heads, head_dim)]


def _draw(args: argparse.Namespace, call: Call) -> list[Tensor]:
    """Random query, key, value and gradient of the output."""
    generator = torch.Generator(args.device).manual_seed(0)
    heads = (call.heads, call.kv_heads, call.kv_heads, call.heads)
    shapes = ((args.batch, *call.tokens, n, call.head_dim) for n in heads)
    dtype = DTYPES[args.dtype]
    return [torch.randn(shape, generator=generator, device=args.device).to(dtype) for shape in shapes]


def _problem_class(call: Call, query: Tensor) -> ProblemClass:
    """The problem class under which a call with these tensors looks up its tile configuration."""
    classes = [math.ceil(n / d) for n, d in zip(call.tokens, call.dilation, strict=True)]
    return ProblemClass(
        *device_traits(query.device), three_axes(classes, 1), three_axes(call.kernel_size, 1),
        call.heads // call.kv_heads, call.head_dim, call.head_dim, query.element_size(),
    )  # fmt: skip


def _questions(call: Call, heads: Sequence[Tensor]) -> dict[Kind, Question]:
    """What is asked about each kernel of a call."""
    query, key, value = heads
    rank = len(call.tokens)
    options = Options(
        None, call.kernel_size, (1,) * rank, call.dilation, (call.is_causal,) * rank, 1.0, call.is_periodic
    )
    inputs = Inputs(query, key, value)
    problem = problem_of(inputs, options)
    tangents = tuple(None if x is None else contiguous(x.shape) for x in inputs.addressed)
    return {
        "forward": Question(problem),
        "jvp": Question(problem, True, tangents=tangents),
        **dict.fromkeys(("backward_query", "backward_key"), Question(problem, True, problem.query)),
    }


def _kinds(args: argparse.Namespace, questions: Mapping[Kind, Question]) -> list[Kind]:
    """The kernels to search: without those that this call does not use, as kernels without tuned tiles replace them."""
    from natten_layers.kernels.dispatch import choose  # imports Triton, which is installed, as a call has run

    asked = ((kind, questions[kind]) for kind in args.kernels)
    taken = [kind for kind, question in asked if not choose(kind, question).is_portable]
    if taken:
        print(f"{', '.join(taken)}: windows of this size have kernels of their own on this GPU")
    return [kind for kind in args.kernels if kind not in taken]


def spread(values: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return values * rank if len(values) == 1 else values


def _report(kind: Kind, config: TileConfig, seconds: float) -> None:
    time = "does not run" if seconds == math.inf else f"{seconds * 1e3:.4g} ms"
    print(f"{kind:14} {time:>12}  {_describe(config)}", flush=True)


def _report_variant(kind: Kind, name: str, seconds: float) -> None:
    time = "does not run" if seconds == math.inf else f"{seconds * 1e3:.4g} ms"
    print(f"{kind:14} {time:>12}  {name}", flush=True)


def run(args: argparse.Namespace, timer: Timer) -> int:
    calls = _calls(args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here, and the fused kernels run on no other")
    read_tuned(cache_file())  # a damaged file ends the command here, once; a call would warn of it and go on
    for call in calls:
        if args.model is not None:
            print(f"{call}:", flush=True)
        _tune_call(args, call, timer)
    return 0


def _tune_call(args: argparse.Namespace, call: Call, timer: Timer) -> None:
    *heads, grad_out = _draw(args, call)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(
            q,
            k,
            v,
            call.kernel_size,
            dilation=call.dilation,
            is_causal=call.is_causal,
            is_periodic=call.is_periodic or False,
            impl="fused",
        )

    # Arguments that do not fit, and a file that cannot be written, must fail before the search.
    prepared = prepare(
        heads[0], heads[1], heads[2], call.kernel_size, 1, call.dilation, call.is_causal, scale=None,
        additional_keys=None, additional_values=None, sink=None,
    )  # fmt: skip
    if (reason := prepared.why_not_fused()) is not None:
        raise ValueError(f"there are no kernels to tune for {call}: {reason}")
    attend(*heads)
    write_tuned(cache_file(), {})
    problem = _problem_class(call, heads[0])
    questions = _questions(call, heads)
    found: dict[Kind, Found] = {}
    interrupted: KeyboardInterrupt | None = None
    try:
        for kind, question in questions.items():
            if kind not in args.kernels:
                continue
            report = partial(_report_variant, kind)
            best = tune_variants(kind, question, attend, (*heads, grad_out), timer=timer, report=report)
            if best is not None and best.gains:
                chosen: dict[tuple[Kind, ProblemClass], str] = {(kind, problem): best.name}
                write_tuned(cache_file(), variants=chosen)
                print(f"{kind}: {best.own_seconds / best.seconds:.2f}x with {best.name}")
                print(f"written to {cache_file()}")
        for kind, best in tune(
            problem, attend, (*heads, grad_out),
            kinds=_kinds(args, questions), trials=args.trials, timer=timer, report=_report,
        ):  # fmt: skip
            found[kind] = best
    except KeyboardInterrupt as stop:
        interrupted = stop
    gains: dict[tuple[Kind, ProblemClass], TileConfig] = {}
    for kind, best in found.items():
        if best.gains:
            gains[kind, problem] = best.config
        gain = f"{best.rule_seconds / best.seconds:.2f}x with {_describe(best.config)}" if best.gains else "the rule's"
        print(f"{kind}: {gain}")
    if gains:
        write_tuned(cache_file(), gains)
        print(f"written to {cache_file()}")
    if interrupted is not None:
        raise interrupted


def main(argv: Sequence[str] | None = None, *, timer: Timer = _device_seconds) -> int:
    """Run the command; returns the exit status. Results that were found before Ctrl-C are saved."""
    return run_command(
        lambda: run(_parse(argv), timer),
        when_interrupted="interrupted; results that were written before are kept",
        less_memory=["a smaller --batch", "fewer tokens"],
    )


if __name__ == "__main__":
    sys.exit(main())
