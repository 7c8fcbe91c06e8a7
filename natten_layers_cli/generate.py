"""Continue text with a model that natten-layers-train-lm made, or a Hugging Face directory of a known family.

natten-layers-generate runs/lm/model --prompt 'def read_' --temperature 0.8
natten-layers-generate ~/models/Qwen3-0.6B --prompt 'The capital of France is' --device cuda --bf16

A model of 256 tokens without a tokenizer.json reads and writes bytes. Others need the tokenizers package.
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from natten_layers.modules.llm import DecoderLM

from .running import Parser, check_device, run_command, seed


class Codec(Protocol):
    """Text to tokens and, piece by piece, back."""

    def encode(self, text: str) -> list[int]: ...

    def add(self, token: int) -> str:
        """The text that ``token`` completes."""
        ...


class Bytes:
    """A token is a byte. Byte 0 stands before every file that natten-layers-train-lm reads."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def encode(self, text: str) -> list[int]:
        return [0, *text.encode()]

    def add(self, token: int) -> str:
        return self.decoder.decode(bytes([token]))


class HubTokenizer:
    """A ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError(f"{path} needs the tokenizers package: pip install 'natten-layers[lm]'") from error
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no narrower type
            raise ValueError(f"{path} is no tokenizer that can be read: {error}") from error
        self.tokens: list[int] = []
        self.text = ""

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def add(self, token: int) -> str:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character is not whole yet
            return ""
        new, self.text = text[len(self.text) :], text
        return new


def open_codec(directory: Path, vocab_size: int) -> Codec:
    """The codec of the model in ``directory``.

    Raises:
        ValueError: no tokenizer, or no package that reads it.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        return HubTokenizer(path)
    if vocab_size == 256:
        return Bytes()
    raise ValueError(f"{path} does not exist, and a model of {vocab_size} tokens is not one of bytes")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path, help="directory with config.json and safetensors files")
    parser.add_argument("--prompt", default="", help='text to continue; "-" reads standard input')
    parser.add_argument("--tokens", type=int, default=512, help="most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="convert the weights to bfloat16")
    args = parser.parse_args(argv)
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


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args.prompt)
    dtype = torch.bfloat16 if args.bf16 else None
    model = DecoderLM.from_pretrained(args.model, device=args.device, dtype=dtype)
    codec = open_codec(args.model, model.config.vocab_size)
    ids = codec.encode(prompt)
    if not ids:
        raise ValueError("this model's tokenizer makes no token of an empty prompt: give one with --prompt")
    if max(ids) >= model.config.vocab_size:
        size = model.config.vocab_size
        raise ValueError(f"{args.model}/tokenizer.json makes token {max(ids)}, but the model knows {size} tokens")
    text = prompt

    def show(token: Tensor) -> None:
        nonlocal text  # the prompt comes with the first token: not before all has been checked
        print(text + codec.add(int(token)), end="", flush=True)
        text = ""

    model.generate(
        torch.tensor([ids], device=args.device),
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=args.seed,
        callback=show,
    )
    print()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: run(parse_arguments(argv)), when_interrupted="")


if __name__ == "__main__":
    sys.exit(main())
