"""Text generation: prefill in chunks, then one token at a time over the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import check_flags, is_finite_number
from ..wording import shorten, with_type
from .base import check_count
from .cache import Cache

if TYPE_CHECKING:
    from .llm import DecoderLM

__all__ = ["generate", "longest_of", "sample", "text_first"]


@torch.no_grad()
def generate(
    model: DecoderLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: int | torch.Generator | None = None,
    stop_tokens: int | Sequence[int] | None = None,
    callback: Callable[[Tensor], None] | None = None,
    prefill_chunk: int = 4096,
    cuda_graph: bool = True,
) -> Tensor:
    """Continue the prompts ``input_ids [B, L]``.

    Args:
        input_ids: token indices ``[B, L]``, int64 or int32.
        max_new_tokens: largest number of tokens to add.
        attention_mask: ``[B, L]`` as in :meth:`DecoderLM.forward`, for prompts of different lengths.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the ``k`` likeliest tokens.
        top_p: sample among the likeliest tokens that together reach this probability.
        generator: a seed, or a generator on the model's device; None uses torch's global generator.
        stop_tokens: token or tokens after which a text ends, default the config's ``eos_token_id``. An ended text is
            padded with ``pad_token_id``, or by repeating its stop token if the config has none.
        callback: called with the new tokens ``[B]`` after each step.
        prefill_chunk: number of prompt tokens that are read at a time; it bounds memory. Where dynamic RoPE or LongRoPE
            stretches a prompt, each part has the frequencies of the whole. Later tokens stretch dynamic RoPE further,
            while those in the cache keep their rotation, as in transformers.
        cuda_graph: on a GPU, record the second step as a CUDA graph and replay it for the later ones. Pass False for a
            model that cannot be recorded, such as one with hooks or layers that read values on the host. A model with
            experts is never recorded, as the host calls those that tokens choose.

    Returns:
        ``[B, L + new]``, each row the prompt and then the new tokens. ``new`` is smaller than ``max_new_tokens`` if all
        texts ended.

    Raises:
        ValueError: arguments that :meth:`DecoderLM.forward` refuses, sampling options out of range, a ``generator``,
            ``stop_tokens`` or ``callback`` of another type. All before the prompts are read.
        RuntimeError: the model cannot be recorded as a CUDA graph, or gives NaN or infinity after the prompt.
    """
    model.check(input_ids, attention_mask, None)
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        check_count(name, value)
    check_flags(cuda_graph=cuda_graph)
    longest = input_ids.shape[1] if attention_mask is None else longest_of((attention_mask != 0).sum(1))
    model.model.check_length(longest + max_new_tokens)
    _check_sampling(temperature, top_k, top_p)
    generator = _generator(generator, input_ids.device)
    if callback is not None and not callable(callback):
        raise ValueError(f"callback must be None or a function of the new tokens, got {with_type(callback)}")
    stops = input_ids.new_tensor(model.config.stop_tokens if stop_tokens is None else _tokens(stop_tokens))
    pad = _padding(model, several=len(input_ids) > 1 and len(stops) > 0)
    short = model.config.longest_short_text
    capacity = input_ids.shape[1] + max_new_tokens
    cache = model.make_cache(len(input_ids), max_length=capacity, device=input_ids.device)
    cache.expect(longest)
    logits = _prefill(model, input_ids, attention_mask, cache, prefill_chunk)
    cuda_graph = cuda_graph and model.config.num_experts is None
    step = one_token(model, cache, cuda_graph=cuda_graph)
    ended = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    tokens: list[Tensor] = []
    while True:
        token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if tokens:
            token = torch.where(ended, tokens[-1] if pad is None else pad, token)
        tokens.append(token)
        if callback is not None:
            callback(token)
        if len(stops):
            ended = ended | torch.isin(token, stops)
        if len(tokens) == max_new_tokens or (len(stops) and bool(ended.all())):
            return torch.cat((input_ids, torch.stack(tokens, 1)), 1)
        if short is None or longest + len(tokens) - 1 != short:
            logits = step(token)
            continue
        # LongRoPE's other factors from here on: all keys are made anew.
        text, mask = torch.cat((input_ids, torch.stack(tokens, 1)), 1), attention_mask
        if mask is not None:
            mask = torch.cat((mask != 0, mask.new_ones(len(mask), len(tokens), dtype=torch.bool)), 1)
        cache = model.make_cache(len(input_ids), max_length=capacity, device=input_ids.device)
        cache.expect(short + 1)
        logits = _prefill(model, text, mask, cache, prefill_chunk)
        step = one_token(model, cache, cuda_graph=cuda_graph)


def one_token(model: DecoderLM, cache: Cache, *, cuda_graph: bool = True) -> Callable[[Tensor], Tensor]:
    """A function that appends a token ``[B]`` to each text in the cache and returns the logits ``[B, V]`` after it."""
    return Recorded(model, cache) if cuda_graph and cache.lengths.is_cuda else partial(_next, model, cache)


def _next(model: DecoderLM, cache: Cache, token: Tensor) -> Tensor:
    return model(token[:, None], cache=cache)[:, -1]


class Recorded:
    """:func:`_next` as a CUDA graph, because launching one step's kernels takes the host longer than the GPU needs.

    The first call runs without a graph, which compiles the kernels; the second call records the graph.
    """

    def __init__(self, model: DecoderLM, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.token: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        for layer in cache.layers:
            layer.whole = True

    def __call__(self, token: Tensor) -> Tensor:
        if self.token is None:
            self.token = token.clone()
            return _next(self.model, self.cache, self.token)
        self.token.copy_(token)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may allocate
                    self.logits = _next(self.model, self.cache, self.token)
            except RuntimeError as error:
                raise RuntimeError(f"the model cannot be recorded, pass cuda_graph=False: {error}") from error
        else:  # a replay runs no host code, so the cache's host state is updated as the model would
            past = self.cache.rope_length
            self.cache.longest += 1
            self.model.model.check_length(self.cache.longest, past=past)
        self.graph.replay()
        assert self.logits is not None
        return self.logits.clone()


def _prefill(model: DecoderLM, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache, chunk: int) -> Tensor:
    """Read the prompts into the cache in chunks and return the logits ``[B, V]`` after each prompt's last token."""
    mask = None
    last = torch.full_like(input_ids[:, 0], input_ids.shape[1] - 1)
    if attention_mask is not None:
        order, mask = text_first(attention_mask)
        last = mask.sum(1) - 1
        if bool((last < 0).any()):
            raise ValueError("attention_mask has a row without any text")
        longest = longest_of(last) + 1
        input_ids, mask = input_ids.gather(1, order)[:, :longest], mask[:, :longest]
    end: Tensor | None = None
    for start in range(0, input_ids.shape[1], chunk):
        stop = start + chunk
        part = input_ids[:, start:stop]
        index = (last - start).clamp(0, part.shape[1] - 1)
        text = None if mask is None else mask[:, start:stop]
        candidate = model(part, attention_mask=text, cache=cache, logits_at=index)
        # A text whose prompt ended in an earlier chunk keeps the logits of that chunk.
        end = candidate if end is None else torch.where((last >= start)[:, None], candidate, end)
    assert end is not None
    if not bool(end.amax(-1).isfinite().all()):  # argmax would take NaN for a token
        raise RuntimeError(
            "the logits after the prompt are not finite: the weights hold NaN or infinity, or the model computes "
            "numbers beyond those of its dtype; from fp16, go to bf16 or fp32"
        )
    return end


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one index per row from ``softmax(logits / temperature)``, in fp32.

    Args:
        logits: ``[B, V]``.
        temperature: divides the logits; 0 takes the largest logit.
        top_k: draw among the ``k`` largest logits only.
        top_p: draw among the likeliest tokens that together just reach this probability (Holtzman et al. 2020,
            https://arxiv.org/abs/1904.09751); applied after ``top_k``.
        generator: a generator on the logits' device; None uses torch's global generator.

    Returns:
        Token indices ``[B]``, int64.

    Raises:
        ValueError: an option is out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    # Differences first, as quotients of low temperatures overflow; and no division by what is zero in fp32.
    below = logits - logits.amax(-1, keepdim=True)
    scores, tokens = (below / max(temperature, torch.finfo(torch.float32).tiny)).sort(-1, descending=True)
    if top_k is not None:
        scores, tokens = scores[:, :top_k], tokens[:, :top_k]
    probabilities = scores.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        least = max(top_p, torch.finfo(torch.float32).tiny)  # never drops the likeliest: its `before` is 0
        probabilities = probabilities.masked_fill(before >= least, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, drawn)[:, 0]


def _check_sampling(temperature: object, top_k: object, top_p: object) -> None:
    if not is_finite_number(temperature) or temperature < 0:
        raise ValueError(f"temperature must be a finite number of at least 0, got {shorten(temperature)}")
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and not (is_finite_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be None or lie in (0, 1], got {shorten(top_p)}")


def _generator(generator: object, device: torch.device) -> torch.Generator | None:
    """A generator of a seed, or the given one."""
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        if generator.device.type != device.type:
            raise ValueError(f"generator must be on the model's device {device}, but is on {generator.device}")
        return generator
    if not isinstance(generator, Integral) or isinstance(generator, bool) or not -(2**63) <= int(generator) < 2**64:
        raise ValueError(f"generator must be a seed of 64 bits or a torch.Generator, got {with_type(generator)}")
    return torch.Generator(device).manual_seed(int(generator))


def _padding(model: DecoderLM, *, several: bool) -> int | None:
    """The token behind texts that end early, which there are where ``several`` are continued at once."""
    pad, size = model.config.pad_token_id, model.config.vocab_size
    if pad is None or pad < 0:  # old configs write -1 for no padding token
        return None
    if several and pad >= size:
        raise ValueError(
            f"texts of a batch that end early are padded with pad_token_id={pad}, which is no token of "
            f"vocab_size={size}: make the config with pad_token_id=None, or give stop_tokens=[]"
        )
    return pad


def _tokens(stop_tokens: object) -> list[int]:
    """One token or several as a list."""
    tokens = stop_tokens.tolist() if isinstance(stop_tokens, Tensor) else stop_tokens
    tokens = [tokens] if isinstance(tokens, Integral) else tokens
    if not isinstance(tokens, Iterable) or isinstance(tokens, str | bytes):
        raise ValueError(f"stop_tokens must be a token or several, got {with_type(stop_tokens)}")
    tokens = list(tokens)
    for token in tokens:
        check_count("stop_tokens", token, least=0)
    return [int(token) for token in tokens]


def longest_of(lengths: Tensor) -> int:
    """The largest of ``lengths [B]``, or 0 for an empty batch. This waits for the device."""
    return int(lengths.max()) if len(lengths) else 0


def text_first(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """A permutation ``[B, L]`` that moves padding behind each text, and the mask in that order.

    Causal attention never sees what comes later, so padding behind the text needs no mask.
    """
    order = torch.argsort((attention_mask == 0).to(torch.uint8), dim=1, stable=True)
    return order, (attention_mask != 0).gather(1, order)
