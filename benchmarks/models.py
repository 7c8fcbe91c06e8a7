"""Whole models whose steps are timed, and the replacement of this library's operation in them by FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from natten_layers import DecoderLMConfig, Denoiser, HDiT, HDiTConfig, LevelConfig
from natten_layers.arguments import Call
from natten_layers.modules.llm import DecoderBlock
from natten_layers.modules.query_key import HeadNorm, normalize_and_rotate
from natten_layers.modules.rope import Angles

from .implementations import HeadsFirst, UnsupportedError, check_scores, flex_mask
from .workloads import Workload

__all__ = ["SMOKE", "Attend", "Sizes", "Subject", "attention", "calling", "flex_attend", "make_subjects"]

Attend = Callable[..., Tensor]

CALLERS = ("natten_layers.modules.attention", "natten_layers.modules.decoder_attention")
"""Modules that import operations by name, in which :func:`calling` replaces them."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the HDiT in k-diffusion's config for Oxford flowers, and of a decoder block of Mistral's shape."""

    image: int = 256
    batch: int = 32
    widths: tuple[int, ...] = (128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 4)
    tokens: int = 32768
    checked_tokens: int = 8192
    """Number of tokens for which the decoder block is compared with fp64."""
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    window: int = 4096


SMOKE = Sizes(64, 2, (64, 64, 64), (1, 1, 1), 96, 48, 64, 96, 4, 2, 16)


@dataclass(frozen=True)
class Subject:
    """A model and functions that run it. They take the model as an argument, so that it may be a copy."""

    model: nn.Module
    output: Callable[[nn.Module, torch.dtype], Tensor]
    """The output for a part of the batch, computed in the given dtype, for the comparison with fp64."""
    loss: Callable[[nn.Module], Tensor]
    sample: Callable[[nn.Module], Tensor] | None
    """One call of the denoiser on the whole batch."""
    parameters: list[dict[str, Any]]
    """Parameter groups for the optimizer."""


def make_subjects(sizes: Sizes, device: torch.device) -> dict[str, dict[str, Callable[[], Subject]]]:
    """Functions that make each model, by the model's name and by the options of its attention."""
    hdit, block = partial(_hdit, sizes, device), partial(_decoder_block, sizes, device)
    return {
        "hdit-flowers": {
            "multi-head": partial(hdit, group=1, registers=0),
            "GQA 4": partial(hdit, group=4, registers=0),
            "GQA 4, 8 registers": partial(hdit, group=4, registers=8),
        },
        "mistral-block": {
            "GQA 4": partial(block, registers=0),
            "GQA 4, 8 registers": partial(block, registers=8),
        },
    }


def _hdit(sizes: Sizes, device: torch.device, *, group: int, registers: int) -> Subject:
    """HDiT under bf16 autocast. Levels with fewer heads than ``group`` have one KV head."""
    shapes = list(zip(sizes.depths, sizes.widths, strict=True))
    outer = [
        LevelConfig(depth, width, num_kv_heads=max(1, width // 64 // group), num_registers=registers)
        for depth, width in shapes[:-1]
    ]
    size = (sizes.image, sizes.image)
    torch.manual_seed(0)
    network = HDiT(HDiTConfig([*outer, LevelConfig(*shapes[-1], "global")], input_size=size, sigma_data=0.5))
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # else branches start with an output of zero, which hides errors
    generator = torch.Generator(device).manual_seed(0)
    shape = (sizes.batch, 3, *size)
    images, noise = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
    sigma = torch.rand(sizes.batch, device=device, generator=generator) * 4 + 0.1

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return model(images, sigma)

    def output(model: nn.Module, dtype: torch.dtype) -> Tensor:
        if dtype == torch.bfloat16:
            return run(model)[:2]
        return model(images[:2].to(dtype), sigma[:2].to(dtype))

    def loss(model: nn.Module) -> Tensor:
        assert isinstance(model, Denoiser)
        with torch.autocast(device.type, torch.bfloat16):
            return model.loss(images, noise, sigma).mean()

    return Subject(Denoiser(network.to(device)), output, loss, run, network.param_groups(5e-4, 1e-3))


def _decoder_block(sizes: Sizes, device: torch.device, *, registers: int) -> Subject:
    """A decoder block of Mistral's shape, with parameters and activations in bf16."""
    config = DecoderLMConfig(
        vocab_size=1, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_layers=1,
        num_heads=sizes.heads, num_kv_heads=sizes.kv_heads, windows=(sizes.window,), num_registers=registers,
    )  # fmt: skip
    torch.manual_seed(0)
    block = DecoderBlock(config, 0, device=device, dtype=torch.bfloat16)
    if block.self_attn.registers is not None:
        nn.init.normal_(block.self_attn.registers)
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(1, sizes.tokens, sizes.hidden, device=device, dtype=torch.bfloat16, generator=generator)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=device)[None]
        return model(x, positions, None, x.shape[1])

    def output(model: nn.Module, dtype: torch.dtype) -> Tensor:
        return run(model, tokens[:, : sizes.checked_tokens].to(dtype))

    def loss(model: nn.Module) -> Tensor:
        return run(model, tokens).float().square().mean()

    return Subject(block, output, loss, None, [{"params": list(block.parameters()), "lr": 1e-5}])


# ---- attention by something else -----------------------------------------------------------------------------------


@contextmanager
def calling(name: str, function: Callable[..., Any] | None, callers: Sequence[str]) -> Iterator[None]:
    """Within the context, replace the function that modules call by ``name``; None replaces nothing."""
    with ExitStack() as stack:
        if function is not None:
            for caller in callers:
                stack.enter_context(patch(f"{caller}.{name}", function))
        yield


@contextmanager
def attention(attend: Attend | None) -> Iterator[None]:
    """Within the context, replace attention in the models by another function, after normalisation and RoPE."""
    projected = None if attend is None else _behind_rotation(attend)
    with calling("neighborhood_attention", attend, CALLERS), calling("attend_with_qk_prep", projected, CALLERS):
        yield


@lru_cache
def _behind_rotation(attend: Attend) -> Callable[..., Tensor]:
    """The same function object for the same replacement, because a compiled model recompiles for another object."""

    def attend_with_qk_prep(
        call: Call, norm: HeadNorm | None, angles: Angles | None, rpb: Tensor | None = None
    ) -> Tensor:
        assert rpb is None, "the models of the benchmarks have no bias"
        inputs, w = call.inputs, call.window
        sink = call.options.sink_value if inputs.sink is None else inputs.sink
        query, key = normalize_and_rotate(inputs.query, inputs.key, norm, angles)
        return attend(
            query, key, inputs.value, w.kernel_size, stride=w.stride, dilation=w.dilation, is_causal=w.is_causal,
            scale=call.options.scale, additional_keys=inputs.additional_keys,
            additional_values=inputs.additional_values,
            sink=sink,
        )  # fmt: skip

    return attend_with_qk_prep


def flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, ...],
    *,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    additional_keys: None = None,
    additional_values: None = None,
    sink: None = None,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Tensor:
    """Attention as these models need it: FlexAttention, or torch's dense attention if the window covers everything.

    Raises:
        UnsupportedError: registers or a sink, or too many pairs of tokens for a CPU.
    """
    del additional_values, stride, dilation
    if additional_keys is not None or sink is not None:
        raise UnsupportedError("FlexAttention has no registers and no sink")
    spatial, causal = tuple(query.shape[1:-2]), is_causal in (True, (True,))
    kernel = (kernel_size,) * len(spatial) if isinstance(kernel_size, int) else tuple(kernel_size)
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
    gqa = q.shape[1] != k.shape[1]
    if kernel == spatial:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal, enable_gqa=gqa)
    else:
        check_scores(q.shape[0] * q.shape[1], q.shape[2], q.device)
        mask = _mask((spatial, kernel, causal, query.device))
        out = _compiled_flex(query.device.type)(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).unflatten(1, spatial)


_masks: dict[tuple[tuple[int, ...], tuple[int, ...], bool, torch.device], BlockMask] = {}


def _mask(key: tuple[tuple[int, ...], tuple[int, ...], bool, torch.device]) -> BlockMask:
    """FlexAttention's mask, made once by an uncompiled call; compiled calls look it up."""
    if key not in _masks:
        spatial, kernel_size, causal, device = key
        _masks[key] = flex_mask(Workload("step", 1, spatial, 1, 1, 64, kernel_size, causal), HeadsFirst(), device)
    return _masks[key]


@lru_cache
def _compiled_flex(device_type: str) -> Callable[..., Any]:
    """Compiled FlexAttention, since uncompiled it stores all scores; on a CPU uncompiled, of few tokens."""
    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention
