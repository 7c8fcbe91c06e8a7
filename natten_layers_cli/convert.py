"""Convert an HDiT with multi-head attention to one with grouped queries.

natten-layers-convert runs/flowers.safetensors runs/grouped.safetensors --group-size 4

Each new KV head is the mean of the heads that it replaces, from which Ainslie et al. 2023 start uptraining
(https://arxiv.org/abs/2305.13245). Train the result for a few per cent of the original steps, from
natten-layers-train-hdit --resume-inference runs/grouped.safetensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from natten_layers.convert import convert_file
from natten_layers.io.checkpoints import WEIGHTS, hdit_file
from natten_layers.modules.hdit_config import HDiTConfig

from .outputs import check_output, check_output_folder
from .running import Parser, run_command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="natten-layers-convert", description=__doc__, least={"group_size": 1})
    parser.add_argument("source", type=Path, help="an HDiT: safetensors, k-diffusion training checkpoint, or directory")
    parser.add_argument("target", type=Path, help="safetensors file, or directory to hold model.safetensors")
    parser.add_argument(
        "--group-size",
        type=int,
        nargs="+",
        required=True,
        metavar="G",
        help="KV heads to pool: one for all levels or one each",
    )
    parser.add_argument("--config", type=Path, help="JSON config, in place of the source's, or where it holds none")
    args = parser.parse(argv)
    try:
        target = hdit_file(args.target)
    except ValueError as error:
        parser.error(f"TARGET {error}")
    if target != args.target:
        check_output_folder(parser, "TARGET", args.target, "a file that ends with .safetensors")
    check_output(parser, "TARGET", target)
    source = args.source / WEIGHTS if args.source.is_dir() else args.source
    if target.exists() and source.exists() and source.samefile(target):
        parser.error(f"TARGET {args.target} is SOURCE, whose heads would be lost: name another")
    return args


def run(args: argparse.Namespace) -> int:
    sizes = args.group_size[0] if len(args.group_size) == 1 else args.group_size
    config = HDiTConfig.from_json(args.config) if args.config else None
    models = convert_file(args.source, args.target, sizes, config)
    before, after = (sum(p.numel() for p in model.parameters()) for model in models)
    heads = [level.num_kv_heads or level.num_heads for level in models[1].config.levels if level.attention != "none"]
    print(f"{args.target}: {after:,} parameters, from {before:,}; KV heads by level: {heads}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: run(parse_arguments(argv)), when_interrupted="interrupted; TARGET is as it was")


if __name__ == "__main__":
    sys.exit(main())
