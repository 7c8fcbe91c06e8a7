"""Continue text with a model that natten-layers-train-lm made, or a Hugging Face directory of a known family.

natten-layers-generate runs/lm/model --prompt 'def read_' --temperature 0.8
natten-layers-generate ~/models/Qwen3-0.6B --prompt 'The capital of France is' --device cuda --bf16
natten-layers-generate ~/models/Qwen3-0.6B --chat --prompt 'What is the capital of France?'

What flags do not say about sampling, and the tokens to stop at, is read from the directory's generation_config.json.
A model of 256 tokens without a tokenizer.json reads and writes bytes. Others need the tokenizers package.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natten_layers.modules.llm import DecoderLM

from .running import Parser, check_device, run_command, seed, take_out_flags_that_are_on
from .tokens import StopStrings, apply_chat_template, generation_settings, open_codec


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, least={"tokens": 1, "temperature": 0, "top_k": 0})
    parser.add_argument("model", type=Path, help="directory with config.json and safetensors files")
    parser.add_argument("--prompt", default="", help='text to continue; "-" reads standard input')
    parser.add_argument(
        "--tokens", type=int, help="most tokens to add; default: 512, or what the model has positions for"
    )
    parser.add_argument("--chat", action="store_true", help="answer the prompt, by the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--temperature", type=float, help="0: always the likeliest token; default: the model's, or 0.8")
    parser.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens only; 0: from all")
    parser.add_argument(
        "--top-p", type=float, help="draw from the likeliest tokens that reach this probability; 1: all"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of what is drawn at a temperature above 0")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to run on")
    parser.add_argument("--bf16", action="store_true", help="convert the weights to bfloat16")
    args = parser.parse(argv)
    if args.system is not None and not args.chat:
        parser.error("--system needs --chat")
    if "" in args.stop:
        parser.error("--stop takes no empty text")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    check_device(parser, args.device)
    return args


def read_prompt(value: str) -> str:
    """The prompt that a flag gives, from standard input for "-".

    Raises:
        ValueError: bytes that are no UTF-8.
    """
    data = sys.stdin.buffer.read() if value == "-" else os.fsencode(value)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = f"byte {error.start} of it is {data[error.start]:#04x}"
        raise ValueError(f"the prompt must be UTF-8 text, but {at}") from error


class _StopTextError(Exception):
    """A text to stop at has come."""


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args.prompt)
    dtype = torch.bfloat16 if args.bf16 else None
    model = DecoderLM.from_pretrained(args.model, device=args.device, dtype=dtype)
    codec = open_codec(args.model, model.config.vocab_size)
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        chat = apply_chat_template(args.model, [*system, {"role": "user", "content": prompt}])
        ids, text = codec.encode(chat, special=False), ""  # the template writes special tokens itself
        stream = codec.stream()  # an answer is a text of its own
    else:
        ids, text = codec.encode(prompt), prompt
        stream = codec.stream(ids)
    if not ids:
        raise ValueError("this model's tokenizer makes no token of an empty prompt: give one with --prompt")
    if max(ids) >= model.config.vocab_size:
        size = model.config.vocab_size
        raise ValueError(f"{args.model}/tokenizer.json makes token {max(ids)}, but the model knows {size} tokens")
    left = model.config.max_positions - len(ids)
    if left < (args.tokens or 1):
        flag = "" if args.tokens is None else f"--tokens {args.tokens}: "
        raise ValueError(
            f"{flag}the prompt has {len(ids)} tokens, which leave {max(left, 0)} of the model's "
            f"{model.config.max_positions} positions"
        )
    settings, ignored = generation_settings(args.model)
    for name in ignored:
        print(f"note: {args.model}/generation_config.json asks for {name}, which is not applied", file=sys.stderr)
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    options: dict[str, Any] = (
        {"temperature": 0.8} | settings | {name: value for name, value in given.items() if value is not None}
    )
    options["top_k"] = options.get("top_k") or None  # 0 is none
    asked = [name for name, none in (("top_k", 0), ("top_p", 1)) if given[name] not in (None, none)]
    if options["temperature"] == 0 and asked:
        flag = f"--{asked[0].replace('_', '-')} {given[asked[0]]}"
        why = "--temperature 0" if given["temperature"] == 0 else f"{args.model}/generation_config.json"
        raise ValueError(f"{flag}: {why} takes the likeliest token always; give another --temperature")
    stop = StopStrings(args.stop)

    def show(token: Tensor) -> None:
        nonlocal text  # the prompt comes with the first token: not before all has been checked
        print(text + stop.add(stream.add(int(token))), end="", flush=True)
        text = ""
        if stop.found:
            raise _StopTextError

    with suppress(_StopTextError):
        start = torch.tensor([ids], device=args.device)
        model.generate(start, args.tokens or min(512, left), generator=args.seed, callback=show, **options)
    print(stop.add(stream.end()) + stop.held)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    less_memory = ["--bf16", "fewer --tokens"]

    def body() -> int:
        args = parse_arguments(argv)
        take_out_flags_that_are_on(less_memory, args)
        return run(args)

    return run_command(body, when_interrupted="", less_memory=less_memory)


if __name__ == "__main__":
    sys.exit(main())
