"""Sample an image with FLUX whose image tokens attend to their neighborhood and all of the text.

python examples/sample_flux_neighborhood.py --tiny
python examples/sample_flux_neighborhood.py path/to/FLUX.1-dev --prompt 'a lighthouse in fog' --height 4096 --width 4096
    --kernel-size 80 --stride 16 --layers 8-56 --device cuda --bf16 --save image.png

The path is a directory that ``FluxPipeline.from_pretrained`` takes. ``--tiny`` makes a tiny pipeline with random
weights and random embeddings in the place of a prompt, which runs anywhere; what it draws is noise. ``--compare``
samples without windows too, from the same noise, and says how far the images are apart. FLUX was not trained with
windows: choose layers with care, or fine-tune. ``--layers`` counts FLUX's 19 double blocks first, then its 38 single
ones. Needs diffusers and transformers (``pip install '.[diffusers]'``).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from natten_layers.integrations.diffusers import neighborhood, unpatch
from natten_layers.io.files import replacing
from natten_layers_cli.outputs import check_output
from natten_layers_cli.running import Parser, check_device, run_command, seed

TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
TINY_VAE: dict[str, Any] = {"latent_channels": 4, "block_out_channels": (8,), "norm_num_groups": 4, "shift_factor": 0.0}
TINY_SIZE, TINY_WINDOW, TINY_STEPS = 48, 7, 2
TEXT_TOKENS = 12


def parse_layers(text: str) -> list[int]:
    """Indices such as ``0,3,8-56``; the last one of a range is in it."""
    found: list[int] = []
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        indices = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1) if numbers else ()
        if not indices:
            raise argparse.ArgumentTypeError(f"must be indices and ranges such as 0,3,8-56, got {text}")
        found += indices
    return found


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    counts = ("height", "width", "steps", "stride", "kernel_size")
    parser = Parser(description=__doc__, least=dict.fromkeys(counts, 1))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("weights", nargs="?", type=Path, help="directory of a FLUX pipeline")
    source.add_argument("--tiny", action="store_true", help="a tiny pipeline with random weights, for any machine")
    parser.add_argument("--prompt", default="a lighthouse in fog", help="not with --tiny")
    for name in ("height", "width"):
        parser.add_argument(f"--{name}", type=int, help=f"of the image, default 1024, with --tiny {TINY_SIZE}")
    parser.add_argument("--steps", type=int, help=f"of the sampler, default 28, with --tiny {TINY_STEPS}")
    parser.add_argument(
        "--kernel-size",
        type=int,
        nargs="+",
        help="window in tokens of 16x16 pixels (with --tiny 2x2), one number or rows and columns; default 25, with "
        f"--tiny {TINY_WINDOW}",
    )
    parser.add_argument("--stride", type=int, default=1, help="tokens on an axis that share a window, default 1")
    parser.add_argument("--layers", type=parse_layers, help="which layers get windows, as 0,3,8-56; default all")
    parser.add_argument("--compare", action="store_true", help="sample without windows too")
    parser.add_argument("--seed", type=seed, default=0, help="of what is random")
    parser.add_argument("--device", default="cpu", help="to run on")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16")
    parser.add_argument("--save", type=Path, help="write the image: a name with .png, .jpg, .jpeg or .webp")
    arguments = parser.parse(argv)
    tiny = arguments.tiny
    defaults = {
        "height": TINY_SIZE if tiny else 1024,
        "width": TINY_SIZE if tiny else 1024,
        "steps": TINY_STEPS if tiny else 28,
        "kernel_size": [TINY_WINDOW if tiny else 25],
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if len(arguments.kernel_size) > 2:
        parser.error(f"--kernel-size takes one number or two, got {arguments.kernel_size}")
    check_device(parser, arguments.device)
    if arguments.save is not None:
        check_output(parser, "--save", arguments.save, (".png", ".jpg", ".jpeg", ".webp"))
    return arguments


def load_pipeline(arguments: argparse.Namespace) -> Any:
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    if not arguments.tiny:
        return FluxPipeline.from_pretrained(str(arguments.weights), torch_dtype=dtype).to(arguments.device)
    torch.manual_seed(arguments.seed)
    nothing: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        AutoencoderKL(**TINY_VAE),
        transformer=FluxTransformer2DModel(**TINY_TRANSFORMER),
        **nothing,
    )
    return pipeline.to(arguments.device, dtype)


def conditions(pipeline: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.tiny:
        return {"prompt": arguments.prompt}
    generator = torch.Generator().manual_seed(arguments.seed)
    shapes = {"prompt_embeds": (1, TEXT_TOKENS, 32), "pooled_prompt_embeds": (1, 32)}
    return {
        name: torch.randn(shape, generator=generator).to(arguments.device, pipeline.transformer.dtype)
        for name, shape in shapes.items()
    }


def sample(pipeline: Any, arguments: argparse.Namespace) -> tuple[Tensor, float]:
    """An image ``[3, height, width]`` between 0 and 1, and the seconds that it took."""
    start = time.perf_counter()
    images = pipeline(
        **conditions(pipeline, arguments),
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.steps,
        generator=torch.Generator(arguments.device).manual_seed(arguments.seed),
        output_type="pt",
    ).images
    image: Tensor = images[0].float().cpu()
    return image, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if not (arguments.tiny or arguments.weights.is_dir()):  # of which the library would say that it is no hub's name
        raise ValueError(f"{arguments.weights} is not a directory of a FLUX pipeline")
    pipeline = load_pipeline(arguments)
    pipeline.set_progress_bar_config(disable=arguments.tiny)
    plain = None
    if arguments.compare:
        plain, seconds = sample(pipeline, arguments)
        print(f"without windows  {seconds:.2f} s")
    window = arguments.kernel_size * (2 // len(arguments.kernel_size))
    layers = neighborhood(pipeline.transformer, window, arguments.stride, arguments.layers)
    image, seconds = sample(pipeline, arguments)
    print(f"with windows     {seconds:.2f} s, {layers} layers, windows {window}, image {tuple(image.shape)}")
    if plain is not None:
        print(f"largest difference {(image - plain).abs().max().item():.1e} of values between 0 and 1")
    unpatch(pipeline)
    if arguments.save is not None:
        with replacing(arguments.save) as temporary:
            pipeline.image_processor.numpy_to_pil(image.movedim(0, -1)[None].numpy())[0].save(temporary)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
