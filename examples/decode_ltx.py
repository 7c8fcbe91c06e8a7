"""Decode latents with LTX-2's diffusion decoder, by the library's own attention and by this one's, and compare them.

python examples/decode_ltx.py --tiny
python examples/decode_ltx.py --random --frames 121 --height 512 --width 768 --device cuda --bf16 --patched-only
python examples/decode_ltx.py path/to/decoder --latents latents.pt --save video.pt --device cuda --bf16 --patched-only

The path is a directory that ``LTX2VideoDiffusionDecoderModel.from_pretrained`` takes. Without ``--latents`` they are
random, as are the weights with ``--tiny`` and ``--random``. Needs diffusers (``pip install '.[diffusers]'``).
At the sizes of real videos FlexAttention's block mask fits no device (167 GiB for 69x64x96 tokens): there, leave it out
by ``--patched-only``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoderModel
from torch import Tensor

from natten_layers.integrations.diffusers import patch, unpatch
from natten_layers.io.checkpoints import load_plain, save_plain
from natten_layers_cli.outputs import check_output
from natten_layers_cli.running import Parser, check_device, run_command, seed, take_out_flags_that_are_on

TINY = {
    "latent_channels": 8,
    "patch_size": 1,
    "decoder_head_dim": 16,
    "decoder_stage_channels": (64, 32, 32, 32, 32),
    "decoder_stage_depths": (1, 1, 1, 1, 2),
    "decoder_stage_kernels": ((3, 3, 3), (3, 5, 5), (3, 5, 5), (3, 5, 5)),
    "decoder_upsample_strides": ((1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 1, 1)),
    "decoder_upsample_channel_reductions": (2, 1, 1, 1),
    "decoder_stage5_kernel": (3, 5, 5),
    "decoder_t_emb_dim": 32,
    "spatial_compression_ratio": 2,
    "temporal_compression_ratio": 2,
}
TINY_VIDEO = {"frames": 7, "height": 12, "width": 10}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, least=dict.fromkeys(("frames", "height", "width", "repeat"), 1))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("weights", nargs="?", type=Path, help="directory of a decoder")
    source.add_argument("--tiny", action="store_true", help="a tiny decoder with random weights, for any machine")
    source.add_argument("--random", action="store_true", help="a decoder of LTX-2.5's size with random weights")
    parser.add_argument("--latents", type=Path, help="tensor [1, C, T, H, W] that torch.save wrote; default random")
    for name, size in (("frames", 121), ("height", 512), ("width", 768)):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"of the video, default {size}; not with --tiny")
    parser.add_argument("--tiled", action="store_true", help="decode the last stages in overlapping tiles")
    parser.add_argument("--patched-only", action="store_true", help="leave the library's own attention out")
    parser.add_argument("--repeat", type=int, default=3, help="calls of which the shortest counts")
    parser.add_argument("--seed", type=seed, default=0, help="of what is random")
    parser.add_argument("--device", default="cpu", help="to run on")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16")
    parser.add_argument(
        "--save",
        type=Path,
        help="write the video [1, 3, frames, height, width] by torch.save: a name with .pt, .pth or no suffix",
    )
    arguments = parser.parse(argv)
    if arguments.tiny:
        vars(arguments).update(TINY_VIDEO)
    check_device(parser, arguments.device)
    if arguments.save is not None:
        check_output(parser, "--save", arguments.save, [".pt", ".pth"], needed=False)
    return arguments


def load_decoder(arguments: argparse.Namespace) -> Any:
    torch.manual_seed(arguments.seed)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    if arguments.weights is not None:
        model = LTX2VideoDiffusionDecoderModel.from_pretrained(arguments.weights, torch_dtype=dtype)
    else:
        with torch.device(arguments.device):
            model = LTX2VideoDiffusionDecoderModel(**(TINY if arguments.tiny else {}))
    return model.to(arguments.device, dtype).eval()


def load_latents(arguments: argparse.Namespace, model: Any) -> Tensor:
    if arguments.latents is not None:
        latents = load_plain(arguments.latents)
    else:
        in_time, in_space = model.temporal_compression_ratio, model.spatial_compression_ratio
        frames = (arguments.frames - 1) // in_time + 1
        size = arguments.height // in_space, arguments.width // in_space
        generator = torch.Generator().manual_seed(arguments.seed)
        latents = torch.randn(1, model.config.latent_channels, frames, *size, generator=generator)
    return latents.to(arguments.device, model.dtype)


def decode(model: Any, latents: Tensor, arguments: argparse.Namespace) -> tuple[Tensor, str]:
    """The video, and what it took: seconds of the first call and of the shortest one, and on a GPU the peak memory."""
    if latents.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, video = [], latents
    for _ in range(arguments.repeat):
        generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
        start = time.perf_counter()
        with torch.inference_mode():
            video = model.decode(latents, generator=generator, return_dict=False)[0]
        if latents.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    took = f"first call {seconds[0]:.3f} s, shortest {min(seconds):.3f} s"
    if latents.is_cuda:
        took += f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return video, took


def run(arguments: argparse.Namespace) -> int:
    model = load_decoder(arguments)
    latents = load_latents(arguments, model)
    if arguments.tiled:
        tile = {"tile_sample_min_height": 10, "tile_sample_min_width": 10, "tile_sample_min_num_frames": 6}
        stride = {"tile_sample_stride_height": 6, "tile_sample_stride_width": 6, "tile_sample_stride_num_frames": 4}
        model.enable_tiling(**(tile | stride if arguments.tiny else {}))
    expected = None
    if not arguments.patched_only:
        expected, took = decode(model, latents, arguments)
        print(f"unpatched  {took}")
    layers = patch(model)
    video, took = decode(model, latents, arguments)
    print(f"patched    {took}, {layers} layers, video {tuple(video.shape)}")
    if expected is not None:
        difference, largest = (video - expected).abs().max().item(), expected.abs().max().item()
        print(f"largest difference {difference:.1e} of values up to {largest:.1f}")
    unpatch(model)
    if arguments.save is not None:
        save_plain(video.cpu(), arguments.save)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    less_memory = ["--patched-only", "--bf16", "--tiled", "a smaller video"]

    def body() -> int:
        arguments = parse_arguments(argv)
        take_out_flags_that_are_on(less_memory, arguments)
        return run(arguments)

    return run_command(body, less_memory=less_memory)


if __name__ == "__main__":
    sys.exit(main())
