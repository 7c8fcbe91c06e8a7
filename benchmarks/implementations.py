"""This library and its peers behind one interface, each with inputs in the layout that suits it best."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from natten_layers import (
    AttentionState,
    attention_state,
    merge_attention,
    neighborhood_attention,
    neighborhood_attention_varlen,
)

from .workloads import Inputs, Variant, Workload

__all__ = [
    "FLEX_ORDERS",
    "OURS",
    "PEERS",
    "HeadsFirst",
    "Implementation",
    "Layout",
    "UnsupportedError",
    "check_scores",
    "flex_mask",
    "implementations",
    "ours",
    "overridden",
    "stores_many_scores",
    "varlen",
]

OURS = "natten_layers"
PEERS = ("flex", "fa2", "cudnn", "natten", "fa4", "registers")
FLEX_ORDERS = ("raster", "tiled")

MOST_SCORES = 2**26
"""Most scores of all pairs of tokens that are stored, 256 MiB in fp32, of which there are several copies"""
BLOCK = 128  # FlexAttention's block of tokens
TILES = {2: (8, 16), 3: (2, 8, 8)}  # by rank, blocks of 128 tokens that are close to each other


class UnsupportedError(Exception):
    """An implementation cannot run a problem; the message says why."""


class Layout:
    """How an implementation stores ``[B, *spatial, H, D]``. Conversions are not part of the timed call."""

    name = "raster"

    def pack(self, tensor: Tensor) -> Tensor:
        return tensor

    def unpack(self, tensor: Tensor, spatial: tuple[int, ...]) -> Tensor:
        del spatial
        return tensor


class HeadsFirst(Layout):
    """``[B, H, tokens, D]``, contiguous, tokens in raster order or tile by tile."""

    def __init__(self, tile: tuple[int, ...] | None = None) -> None:
        self.tile = tile
        self.name = f"heads first, tiles of {tile}" if tile else "heads first"

    def pack(self, tensor: Tensor) -> Tensor:
        spatial = tensor.shape[1:-2]
        flat = tensor.flatten(1, -3).transpose(1, 2)
        return (flat[:, :, self._raster_index(spatial, tensor.device)] if self.tile else flat).contiguous()

    def unpack(self, tensor: Tensor, spatial: tuple[int, ...]) -> Tensor:
        if self.tile:
            tensor = tensor[:, :, self._raster_index(spatial, tensor.device).argsort()]
        return tensor.transpose(1, 2).unflatten(1, spatial)

    def coordinates(self, index: Tensor, spatial: tuple[int, ...]) -> list[Tensor]:
        """The position on each axis of a token, from its index in memory."""
        if self.tile is None:
            return _unravel(index, spatial)
        size = math.prod(self.tile)
        tiles = _unravel(index // size, tuple(n // t for n, t in zip(spatial, self.tile, strict=True)))
        inner = _unravel(index % size, self.tile)
        return [outer * t + i for outer, t, i in zip(tiles, self.tile, inner, strict=True)]

    def _raster_index(self, spatial: tuple[int, ...], device: torch.device) -> Tensor:
        index = torch.zeros((), dtype=torch.long, device=device)
        for position, length in zip(
            self.coordinates(torch.arange(math.prod(spatial), device=device), spatial), spatial, strict=True
        ):
            index = index * length + position
        return index


def _unravel(index: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    positions = []
    for length in reversed(lengths):
        positions.append(index % length)
        index = index // length
    return positions[::-1]


@dataclass(frozen=True)
class Implementation:
    """``forward`` takes and returns tensors in ``layout``."""

    name: str
    peer: str
    """Library that is compared. Several implementations of one peer are alternatives, and the best one counts."""
    variant: Variant
    workload: Workload
    """The problem that is computed. For dense attention it differs from the problem with which it is compared."""
    forward: Callable[[Inputs], Tensor]
    layout: Layout
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes the context in which every call runs."""

    def pack(self, inputs: Inputs) -> Inputs:
        names = ("query", "key", "value", "grad_out")
        return replace(inputs, **{name: self.layout.pack(getattr(inputs, name)) for name in names})

    def unpack(self, name: str, tensor: Tensor) -> Tensor:
        local = name in ("out", "d_query", "d_key", "d_value")
        return self.layout.unpack(tensor, self.workload.spatial) if local else tensor

    def differentiated(self, inputs: Inputs) -> dict[str, Tensor]:
        """The inputs that get a gradient, by field name."""
        named = {f.name: getattr(inputs, f.name) for f in fields(inputs) if f.name not in ("grad_out", "key_mask")}
        return {name: t for name, t in named.items() if isinstance(t, Tensor)}


def implementations(
    workload: Workload, variants: list[Variant], peers: list[str], flex_orders: list[str], device: torch.device
) -> Iterator[Implementation | tuple[str, str]]:
    """All implementations that can run ``workload``; for those that cannot, the name and the reason.

    This library runs every variant. A peer runs a variant only if it supports its registers and sink, except that the
    plain workload runs without its sink on a peer that has none.
    """
    base, *extra = variants
    plain = Variant(workload.registers)
    for variant in variants:
        yield Implementation(_label(OURS, variant), OURS, variant, workload, ours(workload), Layout())
    makers: dict[str, Callable[[], Iterator[Implementation]]] = {
        "flex": lambda: _flex(workload, flex_orders, device),
        "fa2": lambda: _fa2(workload, device),
        "cudnn": lambda: _cudnn(workload),
        "natten": lambda: _natten(workload, [plain, *(v for v in extra if v.registers and not v.sink)], device),
        "fa4": lambda: _fa4(workload, [base, *(v for v in extra if v.sink == "learned" and not v.registers)]),
        "registers": lambda: _registers(workload, [v for v in variants if v.registers]),
    }
    for peer in peers:
        try:
            _check_peer(peer, workload)
            yield from makers[peer]()
        except Exception as error:  # a peer whose setup fails must not keep the others from running
            yield peer, str(error) if isinstance(error, (UnsupportedError, ImportError)) else repr(error)


def _check_peer(peer: str, workload: Workload) -> None:
    """No peer has windows on a ring, masks of keys or keys on a grid of their own, only torch's packs samples, and only
    FlexAttention has a bias on relative positions."""
    if any(workload.window.is_periodic) or workload.land or workload.key_spatial:
        raise UnsupportedError("it has no rings, masks of keys, or keys on another grid")
    if workload.shapes and peer != "fa2":
        raise UnsupportedError("it takes no packed samples here")
    if workload.bias and peer != "flex":
        raise UnsupportedError("it has no bias on relative positions")


def stores_many_scores(sequences: int, tokens: int, device: torch.device) -> bool:
    """Whether FlexAttention, which compiles on a GPU only, would store the scores of too many pairs of tokens.

    Args:
        sequences: batch times query heads.
    """
    return device.type == "cpu" and sequences * tokens**2 > MOST_SCORES


def check_scores(sequences: int, tokens: int, device: torch.device) -> None:
    """Raise an UnsupportedError where FlexAttention :func:`stores_many_scores`."""
    if stores_many_scores(sequences, tokens, device):
        size = sequences * tokens**2 / 2**28
        raise UnsupportedError(f"on a CPU it stores the scores of all pairs of tokens, here {size:.1f} GiB")


def _label(name: str, variant: Variant) -> str:
    return f"{name} ({variant.label})" if variant.label else name


def ours(workload: Workload) -> Callable[[Inputs], Tensor]:
    """This library's operation."""
    window = {"stride": workload.stride, "dilation": workload.dilation, "is_causal": workload.causal}
    shapes = torch.tensor(workload.shapes)

    def forward(inputs: Inputs) -> Tensor:
        qkv, kernel_size = (inputs.query, inputs.key, inputs.value), workload.kernel_size
        options: dict[str, Any] = {
            **window,
            "additional_keys": inputs.additional_keys,
            "additional_values": inputs.additional_values,
            "sink": inputs.sink,
            "key_mask": inputs.key_mask,
            "impl": "fused" if inputs.query.is_cuda else "auto",  # on a GPU, never time the eager path
        }
        if workload.shapes:
            return neighborhood_attention_varlen(*qkv, shapes, kernel_size, **options)
        return neighborhood_attention(*qkv, kernel_size, **options, is_periodic=workload.periodic, rpb=inputs.rpb)

    return forward


@contextmanager
def overridden(*configs: Any, **options: Any) -> Iterator[None]:
    """What calls of this library take, replaced as by ``natten_layers.kernels.host.tuned.override``."""
    from natten_layers.kernels.host.tuned import override

    with override(*configs, **options):
        yield


def _registers(workload: Workload, variants: list[Variant]) -> Iterator[Implementation]:
    """Another way to compute registers, forward only: a branch of its own that is merged with the window's."""
    if not variants:
        raise UnsupportedError("needs --registers")

    def call(inputs: Inputs) -> Tensor:
        if torch.is_grad_enabled():
            raise UnsupportedError("forward only")
        qkv = inputs.query, inputs.key, inputs.value
        w = workload
        options = {"stride": w.stride, "dilation": w.dilation, "is_causal": w.causal, "sink": inputs.sink}
        state = attention_state(*qkv, w.kernel_size, **options, impl="fused" if qkv[0].is_cuda else "auto")
        return _merged(workload, inputs, state)

    for variant in variants:
        yield Implementation(f"merged branch ({variant.label})", "registers", variant, workload, call, Layout())


def _merged(workload: Workload, inputs: Inputs, state: AttentionState) -> Tensor:
    """Attention to the registers by torch's flash kernel, merged with the window's by :func:`merge_attention`."""
    assert inputs.additional_keys is not None
    assert inputs.additional_values is not None
    query = inputs.query.flatten(1, -3).transpose(1, 2)
    group = workload.heads // workload.kv_heads
    keys, values = (
        t.transpose(1, 2).repeat_interleave(group, 1) for t in (inputs.additional_keys, inputs.additional_values)
    )
    aten = torch.ops.aten
    flash = (
        aten._scaled_dot_product_flash_attention if query.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    )
    out, lse = flash(query, keys, values, scale=workload.scale)[:2]
    out = out.transpose(1, 2).unflatten(1, workload.spatial)
    lse = lse[..., : query.shape[2]].transpose(1, 2).unflatten(1, workload.spatial)
    return merge_attention(state, (out, lse, torch.ones_like(lse))).out


def _flex(workload: Workload, orders: list[str], device: torch.device) -> Iterator[Implementation]:
    if workload.registers:
        raise UnsupportedError("it has no registers")
    check_scores(workload.batch * workload.heads, math.prod(workload.spatial), device)
    torch.compiler.reset()  # else several workloads exceed torch's limit on recompilations of one function
    for order in orders:
        tile = TILES.get(len(workload.spatial)) if order == "tiled" else None
        if order == "tiled" and (tile is None or any(n % t for n, t in zip(workload.spatial, tile, strict=True))):
            continue
        layout = HeadsFirst(tile)
        yield Implementation(
            f"flex, {order}",
            "flex",
            Variant(bias=workload.variant.bias),
            workload,
            _flex_forward(workload, layout, device),
            layout,
        )


def flex_mask(workload: Workload, layout: HeadsFirst, device: torch.device) -> BlockMask:
    """FlexAttention's mask of the exact neighborhoods, for the order in which the layout stores tokens."""
    window = workload.window

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        inside = query >= 0  # true for every token
        for q, k, length, kernel, stride, dilation, causal in zip(
            layout.coordinates(query, workload.spatial), layout.coordinates(key, workload.spatial), workload.spatial,
            window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True,
        ):  # fmt: skip
            inside = inside & _sees(q, k, length, kernel, stride, dilation, causal)
        return inside

    return _block_mask(visible, math.prod(workload.spatial), device)


def _sees(query: Tensor, key: Tensor, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Whether ``query`` sees ``key`` on one axis."""
    residue, i, j = query % dilation, query // dilation, key // dilation
    end = (length - residue + dilation - 1) // dilation  # of the residue class
    group = i // stride * stride
    if causal:
        first, last = torch.minimum(group + stride, end) - kernel, i
    else:
        first = torch.minimum((group + stride // 2 - kernel // 2).clamp(min=0), end - kernel)
        last = first + kernel - 1
    inside = (j >= first) & (j <= last)
    return inside & (residue == key % dilation) if dilation > 1 else inside


def _flex_forward(workload: Workload, layout: HeadsFirst, device: torch.device) -> Callable[[Inputs], Tensor]:
    mask, window = flex_mask(workload, layout, device), workload.window

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None) -> Tensor:
        def biased(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            del batch
            assert table is not None
            places: list[Tensor] = [head]
            for i, j, kernel, dilation in zip(
                layout.coordinates(q, workload.spatial), layout.coordinates(k, workload.spatial),
                window.kernel_size, window.dilation, strict=True,
            ):  # fmt: skip
                places.append(((j - i) // dilation + kernel - 1).clamp(0, 2 * kernel - 2))
            return score + table[tuple(places)]

        out = flex_attention(
            query, key, value, None if table is None else biased, mask, workload.scale,
            enable_gqa=workload.heads != workload.kv_heads,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(attend, dynamic=False) if device.type == "cuda" else attend
    return lambda inputs: compiled(inputs.query, inputs.key, inputs.value, inputs.rpb)


def _block_mask(
    visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], tokens: int, device: torch.device
) -> BlockMask:
    """``create_block_mask`` for one block of queries at a time, so that no tokens x tokens mask is in memory."""
    blocks = -(-tokens // BLOCK)
    zero = torch.zeros((), dtype=torch.long, device=device)
    key = torch.arange(blocks * BLOCK, device=device)
    some, every = (torch.zeros(blocks, blocks, dtype=torch.bool, device=device) for _ in range(2))
    for i, query in enumerate(key.split(BLOCK)):
        inside = visible(zero, zero, query[:, None], key[None, :])
        inside &= (query[:, None] < tokens) & (key < tokens)
        inside = inside.view(BLOCK, blocks, BLOCK)
        some[i], every[i] = inside.any(2).any(0), inside.all(2).all(0)

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        count = blocks.sum(-1, dtype=torch.int32)
        index = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
        return count[None, None].contiguous(), index[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *ordered(some & ~every),
        *ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )


def _fa2(workload: Workload, device: torch.device) -> Iterator[Implementation]:
    """torch's flash kernel with its window, an option that ``scaled_dot_product_attention`` does not expose."""
    if not _is_sliding(workload) or workload.registers:
        raise UnsupportedError("its window is causal and one-dimensional")
    if workload.head_dims[0] != workload.head_dims[1] or workload.dtype == torch.float32:
        raise UnsupportedError("values must be as wide as queries, and of two bytes")
    if workload.shapes:
        yield Implementation("fa2, varlen", "fa2", Variant(), workload, varlen(workload, device), Layout())
        return
    tokens = workload.spatial[0]

    def forward(inputs: Inputs) -> Tensor:
        flash = torch.ops.aten._flash_attention_forward.default
        lengths, dropout, causal, debug = (None, None, tokens, tokens), 0.0, True, False
        window = {"window_size_left": workload.kernel_size[0] - 1, "window_size_right": 0}
        qkv = (inputs.query, inputs.key, inputs.value)
        return flash(*qkv, *lengths, dropout, causal, debug, scale=workload.scale, **window)[0]

    yield Implementation("fa2", "fa2", Variant(), workload, forward, Layout())


def varlen(workload: Workload, device: torch.device) -> Callable[[Inputs], Tensor]:
    """torch's ``varlen_attn`` of packed texts, or the operator beneath it where that function has no window yet."""
    lengths = [length for (length,) in workload.shapes]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    packing, left, scale = (ends, ends, max(lengths), max(lengths)), workload.kernel_size[0] - 1, workload.scale
    public = None if find_spec("torch.nn.attention.varlen") is None else import_module("torch.nn.attention.varlen")
    if public and {"window_size", "enable_gqa"} <= inspect.signature(public.varlen_attn).parameters.keys():
        options = {"scale": scale, "window_size": (left, 0), "enable_gqa": True}
        return lambda inputs: public.varlen_attn(inputs.query, inputs.key, inputs.value, *packing, **options)
    flash = torch.ops.aten._flash_attention_forward.default
    options = {"scale": scale, "window_size_left": left, "window_size_right": 0}
    return lambda inputs: flash(inputs.query, inputs.key, inputs.value, *packing, 0.0, True, False, **options)[0]


def _is_sliding(workload: Workload) -> bool:
    """Whether the workload is causal attention in a sliding window over text."""
    window = workload.window
    return window.is_causal == (True,) and window.stride == window.dilation == (1,)


def _cudnn(workload: Workload) -> Iterator[Implementation]:
    """Dense attention over the same tokens, which is what a user without neighborhood attention would run."""
    if any(workload.window.is_causal):
        raise UnsupportedError("dense attention is compared on images and videos only")
    dense = replace(workload, kernel_size=workload.spatial, stride=1, dilation=1)

    def forward(inputs: Inputs) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            gqa = workload.heads != workload.kv_heads
            return F.scaled_dot_product_attention(
                inputs.query, inputs.key, inputs.value, scale=workload.scale, enable_gqa=gqa
            )

    yield Implementation("cudnn, dense", "cudnn", Variant(), dense, forward, HeadsFirst())


def _natten(workload: Workload, variants: list[Variant], device: torch.device) -> Iterator[Implementation]:
    import natten

    # On a CPU it calls FlexAttention.
    check_scores(workload.batch * workload.heads, math.prod(workload.spatial), device)
    attend = getattr(natten, f"na{len(workload.spatial)}d")
    backends = ("hopper-fna", "cutlass-fna") if device.type == "cuda" else (None,)

    def forward(backend: str | None) -> Callable[[Inputs], Tensor]:
        def call(inputs: Inputs) -> Tensor:
            registers = {}
            if inputs.additional_keys is not None:
                registers = {"additional_keys": inputs.additional_keys, "additional_values": inputs.additional_values}
            return attend(
                inputs.query,
                inputs.key,
                inputs.value,
                kernel_size=workload.kernel_size,
                stride=workload.stride,
                dilation=workload.dilation,
                is_causal=workload.causal,
                scale=workload.scale,
                backend=backend,
                **registers,
            )

        return call

    for backend, variant in itertools.product(backends, variants):
        name = _label(f"natten, {backend}" if backend else "natten", variant)
        yield Implementation(name, "natten", variant, workload, forward(backend), Layout())


def _fa4(workload: Workload, variants: list[Variant]) -> Iterator[Implementation]:
    from flash_attn.cute.interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    if not _is_sliding(workload) or workload.registers or workload.dtype == torch.float32:
        raise UnsupportedError("its window is one-dimensional and its elements have two bytes")
    left = workload.kernel_size[0] - 1

    def forward(inputs: Inputs) -> Tensor:
        sink = inputs.sink.to(inputs.query.dtype) if isinstance(inputs.sink, Tensor) else None
        out = flash_attn_func(
            inputs.query,
            inputs.key,
            inputs.value,
            softmax_scale=workload.scale,
            causal=True,
            window_size=(left, 0),
            learnable_sink=sink,
        )
        return out[0] if isinstance(out, tuple) else out

    for variant in variants:
        name = _label("fa4", variant)
        yield Implementation(name, "fa4", variant, workload, forward, Layout())
