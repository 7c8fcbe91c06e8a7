"""Text to tokens and back, and what else a Hugging Face directory says of text: chat templates and how to generate."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol, TypedDict, get_type_hints

from natten_layers.io.files import naming, read_json
from natten_layers.io.schema import Between, Natural, NotNegative, check_mapping


class Codec(Protocol):
    """Text to tokens and, piece by piece, back."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of ``text``, with what the tokenizer puts around a text if ``special``."""
        ...

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        """Makes text of the tokens that follow ``before``, or that begin a text."""
        ...


class TextStream(Protocol):
    """Tokens to text, as they come."""

    def add(self, token: int) -> str:
        """The text that ``token`` completes."""
        ...

    def end(self) -> str:
        """What stands for a character that the last tokens began, and no other completed."""
        ...


class Bytes:
    """A token is a byte. Byte 0 stands before every file that natten-layers-train-lm reads."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [*([0] if special else []), *text.encode()]

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        return _ByteStream(before)


class _ByteStream:
    def __init__(self, before: Sequence[int]) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.decoder.decode(bytes(before))

    def add(self, token: int) -> str:
        return self.decoder.decode(bytes([token]))

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)


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
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {index for index, token in added.items() if token.special}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        return _HubStream(self, before)

    def shows(self, token: int) -> bool:
        """Whether a token has text: not a special one, nor a row of the embedding without a token."""
        return token not in self.special and self.tokenizer.id_to_token(token) is not None


class _HubStream:
    """Decodes the last tokens only, and with them those that were shown before, which decide on spaces between.

    The package's own DecodeStream raises an error where bytes turn out to be no character after a part of them was.
    """

    MOST_HELD = 16
    """Tokens to wait for a character to be whole. It has four bytes at most, but a model may write no characters."""

    def __init__(self, codec: HubTokenizer, before: Sequence[int]) -> None:
        self.codec = codec
        self._begin([token for token in before if codec.shows(token)])

    def _begin(self, shown: list[int]) -> None:
        """Wait for what follows the tokens ``shown``."""
        self.shown, self.held, self.length = shown, [], len(self.codec.tokenizer.decode(shown))

    def add(self, token: int) -> str:
        if not self.codec.shows(token):
            return ""
        self.held.append(token)
        text = self.codec.tokenizer.decode(self.shown + self.held)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.held) < self.MOST_HELD:
            return ""
        new = text[self.length :]
        if new:
            self._begin(self.held)
        return new

    def end(self) -> str:
        text = self.codec.tokenizer.decode(self.shown + self.held)
        return text[self.length :]


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


def apply_chat_template(directory: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that stands for a conversation up to where the model answers, as transformers makes it.

    The template is ``chat_template.jinja``, or the ``chat_template`` of ``tokenizer_config.json``. It runs in Jinja's
    sandbox, as any directory may bring one.

    Raises:
        ValueError: no template, one that is not UTF-8 text, or one that refuses these messages.
    """
    from jinja2 import TemplateError  # PyTorch requires this package
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path, config = directory / "chat_template.jinja", _optional_json(directory / "tokenizer_config.json")
    with naming(path):
        template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    if not isinstance(template, str):
        raise ValueError(f"--chat: {directory} has neither {path.name} nor a chat_template in tokenizer_config.json")

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    special = {key: _content(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except Exception as error:  # a template computes: it can raise anything
        raise ValueError(f"the chat template of {directory} says: {error}") from error


class _Generation(TypedDict, total=False):
    do_sample: bool
    temperature: NotNegative
    top_k: Natural
    """0 is none"""
    top_p: Annotated[float, Between(0, 1, open=True)]
    eos_token_id: Natural | Sequence[Natural]


def generation_settings(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """What ``generation_config.json`` says, as arguments of ``generate``, and what it asks for that is not there.

    Raises:
        ValueError: a damaged file, or values of another type.
    """
    path = directory / "generation_config.json"
    raw = _optional_json(path)
    known = {key: raw[key] for key in get_type_hints(_Generation) if raw.get(key) is not None}
    check_mapping(known, _Generation, str(path))
    stops, sampled = known.pop("eos_token_id", None), known.pop("do_sample", True)
    settings: dict[str, Any] = known if sampled else {"temperature": 0.0}
    if stops is not None:
        settings["stop_tokens"] = stops if isinstance(stops, list) else [stops]
    neutral = {"repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0}
    ignored = [f"{key} = {raw[key]}" for key, value in neutral.items() if raw.get(key) not in (None, value)]
    return settings, ignored


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str:
    """Of a special token, which is a string or an object with one."""
    return token.get("content", "") if isinstance(token, dict) else token or ""


class StopStrings:
    """Cuts a text that comes piece by piece where one of some strings begins."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings, self.held, self.found = strings, "", False

    def add(self, text: str) -> str:
        """What may be shown now: not what could be the start of a string to stop at."""
        self.held += text
        places = [place for string in self.strings if (place := self.held.find(string)) >= 0]
        if places:
            self.found, shown = True, self.held[: min(places)]
            self.held = ""
            return shown
        starts = (string[:length] for string in self.strings for length in range(len(string) - 1, 0, -1))
        kept = max((len(start) for start in starts if self.held.endswith(start)), default=0)
        shown, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return shown
