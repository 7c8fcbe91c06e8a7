"""LTX-2.5's decoder of videos by this library's attention, in random weights: ``python -m benchmarks.ltx --help``.

Three things in one run:

- whether it is right: layers of each window against the library's own FlexAttention in fp64, and a small decoder as a
  whole against the unpatched one in fp32,
- where the time of a layer goes, at each stage's size: projections, norm and RoPE, attention; and what the steps in
  PyTorch take (the library's own projection of query, key and value), dense attention, and the library's own processor
  where its block mask is small enough,
- the whole ``decode``: first call, median, peak memory; by the patched decoder, and by a processor that takes the steps
  in PyTorch and this library's attention.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from diffusers.models.autoencoders import ltx2_diffusion_decoder as library
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from natten_layers import compile_ahead, neighborhood_attention
from natten_layers.integrations.diffusers import patch, unpatch
from natten_layers.modules.query_key import call_watched, normalize_and_rotate

from . import runner, timing
from .check import ERROR_FACTOR
from .implementations import stores_many_scores

SMALL: dict[str, Any] = {
    "latent_channels": 8,
    "patch_size": 1,
    "decoder_head_dim": 64,
    "decoder_stage_channels": (256, 128, 128, 128, 128),
    "decoder_stage_depths": (1, 1, 1, 1, 2),
    "decoder_stage_kernels": ((3, 3, 3), (3, 5, 5), (3, 5, 5), (3, 5, 5)),
    "decoder_upsample_strides": ((1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 1, 1)),
    "decoder_upsample_channel_reductions": (2, 1, 1, 1),
    "decoder_stage5_kernel": (3, 5, 5),
    "decoder_t_emb_dim": 32,
    "spatial_compression_ratio": 2,
    "temporal_compression_ratio": 2,
}
SMALL_VIDEO = 7, 12, 10
WINDOWS = {(3, 7, 7): (6, 12, 16), (3, 5, 5): (6, 12, 16), (11, 11, 11): (12, 14, 16)}
"""LTX's windows, with grids on which FlexAttention computes them without compilation"""
FLEX_TOKENS = 8192  # the library's own processor makes its block mask from all pairs of tokens
DENSE_FLOP = 1e13


@dataclass
class Check:
    what: str
    error: float
    allowed: float

    @property
    def failure(self) -> str | None:
        return None if self.error <= self.allowed else f"{self.what}: error {self.error:.2g} > {self.allowed:.2g}"


@dataclass
class Stage:
    """The attention layers of one stage, all alike. Times are of one layer, in ms."""

    grid: tuple[int, int, int]
    heads: int
    window: tuple[int, int, int]
    layers: int
    ms: dict[str, float] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    """Launches of a layer, in their order; none without a GPU."""


@dataclass
class Decode:
    processor: str
    first_call_s: float
    median_s: float
    peak_gib: float | None


class Unfused:
    """Steps in PyTorch, then this library's attention: the six lines that one would write without ``patch``."""

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: Any = None) -> Tensor:
        del block_mask
        query, key, value = attn.project_qkv(hidden_states)
        out = neighborhood_attention(query, key, value, attn.kernel_size, scale=1.0)
        return attn.to_out[0](out.flatten(-2))


def make_layer(window: tuple[int, int, int], heads: int, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:
        layer = library.LTX2VideoVaeNeighborhoodAttention(64 * heads, window)
        for norm in (layer.norm_q, layer.norm_k):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return layer.eval()


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@torch.no_grad()
def check_layers(device: torch.device) -> Iterator[Check]:
    """In bf16, as far from fp64 as the library's own layer, or at most twice as far."""
    for window, grid in WINDOWS.items():
        layer = make_layer(window, 2, device).bfloat16()
        tokens = torch.randn(1, *grid, 128, device=device, dtype=torch.bfloat16)
        exact = copy.deepcopy(layer).double()(tokens.double())
        allowed = ERROR_FACTOR * relative(layer(tokens), exact)
        patch(layer)
        yield Check(f"layer of {window} in bf16", relative(layer(tokens), exact), allowed)


@torch.no_grad()
def check_decoder(device: torch.device) -> Check:
    model, latents = make_decoder(SMALL, device, torch.float32), make_latents(SMALL_VIDEO, SMALL, device, torch.float32)
    expected = decode(model, latents)
    patch(model)
    return Check("small decoder in fp32", relative(decode(model, latents), expected), 1e-5)


def make_decoder(options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with device:
        model: Any = library.LTX2VideoDiffusionDecoderModel(**options)
    return model.to(dtype).eval()


def make_latents(video: tuple[int, ...], options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of a video of so many frames, rows and columns."""
    in_time, in_space = (options.get(f"{axis}_compression_ratio", n) for axis, n in (("temporal", 8), ("spatial", 32)))
    shape = (1, options.get("latent_channels", 128), (video[0] - 1) // in_time + 1, *(n // in_space for n in video[1:]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def decode(model: Any, latents: Tensor) -> Tensor:
    generator = torch.Generator(latents.device).manual_seed(0)
    with torch.inference_mode():
        return model.decode(latents, generator=generator, return_dict=False)[0]


def time_decode(name: str, model: Any, latents: Tensor, repeats: int, ahead: bool = False) -> Decode:
    """With ``ahead``, the first call includes one in which kernels are compiled at once, and none is launched."""
    device, seconds = latents.device, []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(1 + repeats):
        start = time.perf_counter()
        if ahead and not seconds:
            with compile_ahead():
                decode(model, latents)
        decode(model, latents)
        timing.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    one = Decode(name, seconds[0], statistics.median(seconds[1:]), peak)
    memory = "" if peak is None else f", peak {peak:.1f} GiB"
    print(f"decode, {name}: {one.median_s:.3f} s, first call {one.first_call_s:.1f} s{memory}", flush=True)
    return one


@contextmanager
def processors(model: Any, processor: Any) -> Iterator[None]:
    """Another attention processor while the context lasts."""
    layers = [m for m in model.modules() if isinstance(m, library.LTX2VideoVaeNeighborhoodAttention)]
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.set_processor(processor)
    yield
    for layer, processor in zip(layers, before, strict=True):
        layer.set_processor(processor)


def stages(model: Any, latents: Tensor) -> list[Stage]:
    """The grids and windows of a decoder's attention layers, seen in one call."""
    found: dict[tuple[Any, ...], Stage] = {}

    def see(layer: Any, args: tuple[Tensor, ...]) -> None:
        frames, height, width = args[0].shape[1:-1]
        grid = frames, height, width
        stage = found.setdefault((grid, layer.heads, layer.kernel_size), Stage(grid, layer.heads, layer.kernel_size, 0))
        stage.layers += 1

    layers = [m for m in model.modules() if isinstance(m, library.LTX2VideoVaeNeighborhoodAttention)]
    handles = [layer.register_forward_pre_hook(see) for layer in layers]
    decode(model, latents)
    for handle in handles:
        handle.remove()
    return list(found.values())


@torch.no_grad()
def measure(stage: Stage, device: torch.device, dtype: torch.dtype, budget_s: float, flex_tokens: int) -> None:
    """Time one layer of a stage and its parts."""
    layer = make_layer(stage.window, stage.heads, device).to(dtype)
    x = torch.randn(1, *stage.grid, 64 * stage.heads, device=device, dtype=dtype)
    patch(layer)
    ours = layer.processor
    ours(layer, x)  # which makes the frequencies
    query, key, value = (to(x).unflatten(-1, (-1, 64)) for to in (layer.to_q, layer.to_k, layer.to_v))
    positions = ours.indices.of(x.shape[1:-1], device)
    pending = call_watched(query, key, (layer.norm_q, layer.norm_k), ours.rope, positions)
    turned = normalize_and_rotate(*pending)
    window = {"kernel_size": stage.window, "scale": layer.scale}

    def projections(_: int) -> None:
        for to in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]):
            to(x)

    calls: dict[str, timing.Call] = {
        "layer": lambda i: ours(layer, x),
        "projections": projections,
        "norm and RoPE": lambda i: normalize_and_rotate(*pending),
        "attention": lambda i: neighborhood_attention(*turned, value, **window),
        "layer, steps in PyTorch": lambda i: Unfused()(layer, x),
    }
    tokens = prod(stage.grid)
    if 4 * tokens**2 * stage.heads * 64 <= DENSE_FLOP:
        q, k, v = (t.flatten(1, 3).transpose(1, 2) for t in (*turned, value))
        calls["dense attention"] = lambda i: F.scaled_dot_product_attention(q, k, v, scale=layer.scale)
    stage.ms = {name: 1e3 * s.median for name, s in timing.measure(calls, device, budget_s).items()}
    stage.kernels = kernels_of(lambda: ours(layer, x), device)
    if tokens <= flex_tokens and not stores_many_scores(stage.heads, tokens, device):
        unpatch(layer)
        with compiled_flex(device):
            mask = layer.build_block_mask(x)
            sample = timing.measure({"flex": lambda i: layer(x, mask)}, device, budget_s / 4)["flex"]
        stage.ms["layer, its own processor"] = 1e3 * sample.median


@contextmanager
def compiled_flex(device: torch.device) -> Iterator[None]:
    """FlexAttention as one runs it on a GPU; the library calls it uncompiled."""
    from torch.nn.attention import flex_attention as module

    before = module.flex_attention
    if device.type == "cuda":
        module.flex_attention = torch.compile(flex_attention)  # pyright: ignore[reportAttributeAccessIssue]
    yield
    module.flex_attention = before


def kernels_of(call: Callable[[], object], device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize(device)
    return [event.name[:60] for event in profile.events() or [] if "CUDA" in str(event.device_type)]


COLUMNS = (
    "projections", "norm and RoPE", "attention", "layer", "layer, steps in PyTorch", "layer, its own processor",
    "dense attention",
)  # fmt: skip


def table(rows: list[Stage]) -> list[str]:
    lines = [
        f"| layers | grid | heads | window | {' | '.join(f'{name}, ms' for name in COLUMNS)} | launches |",
        "|---" * (len(COLUMNS) + 5) + "|",
    ]
    for row in rows:
        sizes = [str(row.layers), "x".join(map(str, row.grid)), str(row.heads), "x".join(map(str, row.window))]
        times = [f"{row.ms[name]:.3g}" if name in row.ms else "-" for name in COLUMNS]
        lines.append(f"| {' | '.join([*sizes, *times, str(len(row.kernels) or '-')])} |")
    total = {name: sum(row.layers * row.ms.get(name, 0.0) for row in rows) for name in COLUMNS[:5]}
    return [*lines, f"all layers, ms: {', '.join(f'{name} {ms:.4g}' for name, ms in total.items())}"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a result was wrong."""
    parser = runner.make_parser("ltx", __doc__, budget_s=0.5, timed="each stage")
    parser.add_argument(
        "--video", type=int, nargs=3, default=[121, 512, 768], help="frames, height and width, default %(default)s"
    )
    parser.add_argument(
        "--flex-tokens",
        type=int,
        default=FLEX_TOKENS,
        help="most tokens of a grid for which the library's own processor is timed, which takes long to compile; "
        "default %(default)s",
    )
    parser.add_argument(
        "--repeats", type=runner.at_least(1), default=3, help="timed calls of decode, default %(default)s"
    )
    parser.add_argument("--compile-ahead", action="store_true", help="begin the first call by compile_ahead")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = torch.float32 if args.smoke else torch.bfloat16
    report = runner.Report(args, device)
    checks = [*check_layers(device), check_decoder(device)]
    for check in checks:
        print(check.failure or f"{check.what}: error {check.error:.2g} of {check.allowed:.2g} allowed", flush=True)
    options, video = (SMALL, SMALL_VIDEO) if args.smoke else ({}, tuple(args.video))
    model, latents = make_decoder(options, device, dtype), make_latents(video, options, device, dtype)
    patch(model)
    decodes = [time_decode("natten_layers", model, latents, args.repeats, args.compile_ahead)]
    report.keep(video=video, checks=checks, decode=decodes)
    rows = stages(model, latents)
    with processors(model, Unfused()):
        decodes.append(time_decode("steps in PyTorch", model, latents, args.repeats))
    del model
    for stage in rows:
        measure(stage, device, dtype, args.budget_s, args.flex_tokens)
        print(f"{stage.grid}: {stage.ms}", flush=True)
        report.keep(decode=decodes, stages=rows)
    launches = [f"launches of a layer: {row.kernels}" for row in rows[-1:]]
    print(report.text([f"video {'x'.join(map(str, video))}, {dtype}\n", *table(rows), *launches]))
    return int(any(check.failure for check in checks))


if __name__ == "__main__":
    sys.exit(runner.command(main))
