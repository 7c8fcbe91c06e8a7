"""Windows for image and video transformers: an image token sees its neighborhood and all of the text.

A processor of diffusers projects, normalises and rotates tokens, calls ``scaled_dot_product_attention`` once, and
projects the result. All of that stays the library's: a replaced layer runs its own processor, in which that one call is
computed here. What the call does not say, how tokens lie in the image, comes from the arguments of the model, which a
hook reads; ``FAMILIES`` says how, for each class of model.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from math import prod
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ...functional import neighborhood_attention
from .families import FAMILIES, Arguments, Family, Grid
from .replacement import HAS_WINDOW, VERSION, ModelHook, Replacement

__all__ = ["FAMILIES", "neighborhood"]


# --- What users call


def neighborhood(
    model: nn.Module,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    layers: Iterable[int] | None = None,
) -> int:
    """Let the image or video tokens of a transformer see their neighborhood and all text tokens, nothing else.

    Text tokens go on seeing everything. Windows as long as the axes leave the result as it was. Calls for different
    layers add up; one for a layer that has a window already changes it. ``unpatch`` undoes all.

    Args:
        model: a transformer of diffusers, such as ``pipeline.transformer``, of a class in ``FAMILIES``.
        kernel_size: window in tokens, one int or one per axis, (rows, columns) or (frames, rows, columns). Where an
            axis is shorter than its window, the window is the axis.
        stride: tokens per shared window, likewise.
        layers: indices of layers, in the order in which the model runs them, negative ones from the end; None is all.

    Returns:
        How many layers have a window now.

    Raises:
        ValueError: a model, a window or a layer that does not fit, or a processor that cannot be replaced.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    family = _family_of(model)
    window = _Window(
        *(_per_axis(name, n, family.rank) for name, n in (("kernel_size", kernel_size), ("stride", stride)))
    )
    if any(s > k for k, s in zip(*window, strict=True)):
        raise ValueError(f"stride {window.stride} must not exceed kernel_size {window.kernel_size} on any axis")
    attentions = _attentions(model, family)
    chosen = _chosen(layers, attentions)
    for attn in chosen:
        _check(attn)
    tokens = ModelHook.of(model)
    tokens = tokens if isinstance(tokens, _Tokens) else _Tokens(model, family)
    for attn in chosen:
        attn.set_processor(_replacement(attn.processor, window))
    for block, _ in _blocks(model, family):
        tokens.watch(block)
    count = 0
    for attn in attentions:
        has_window = isinstance(attn.processor, Replacement)
        setattr(attn, HAS_WINDOW, has_window)
        if has_window:  # all of them: a part that was unpatched took the last hook with it, and copies have another one
            attn.processor.tokens = tokens
            count += 1
    return count


class _Window(NamedTuple):
    kernel_size: Grid
    stride: Grid


def _family_of(model: nn.Module) -> Family:
    for kind in type(model).__mro__:
        if kind.__name__ in FAMILIES and kind.__module__.startswith("diffusers."):
            return FAMILIES[kind.__name__]
    raise ValueError(
        f"{type(model).__name__} is not supported; supported are {', '.join(FAMILIES)}. Of a pipeline, give the "
        "transformer"
    )


def _per_axis(name: str, value: int | Sequence[int], rank: int) -> Grid:
    found = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(found) != rank or not all(isinstance(one, int) and type(one) is not bool and one >= 1 for one in found):
        raise ValueError(f"{name} must be a positive int or {rank} of them, one per axis, got {value!r}")
    return found


def _blocks(model: nn.Module, family: Family) -> list[tuple[Any, list[str]]]:
    """Blocks in the order in which the model runs them, each with the names of its layers."""
    lists: dict[str, list[str]] = {}
    for blocks, name in (path.split(".") for path in family.layers):
        lists.setdefault(blocks, []).append(name)
    return [(block, names) for blocks, names in lists.items() for block in getattr(model, blocks, ())]


def _attentions(model: nn.Module, family: Family) -> list[Any]:
    """Layers in the order in which the model runs them."""
    of_blocks = (getattr(block, name, None) for block, names in _blocks(model, family) for name in names)
    found = [attention for attention in of_blocks if attention is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} of {VERSION} has no layers {', '.join(family.layers)}")
    return found


def _chosen(layers: Iterable[int] | None, attentions: list[Any]) -> list[Any]:
    count = len(attentions)
    layers = range(count) if layers is None else layers
    indices: list[Any] = list(layers) if isinstance(layers, Iterable) else [None]
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in indices):
        raise ValueError(
            f"layers must be indices of layers, such as [0, 2] or range(8, 32), or None for all, got {layers!r}"
        )
    outside = [i for i in indices if not -count <= i < count]
    if outside:
        raise ValueError(f"layers {_few(outside)} are not among the {count} of the model, 0 to {count - 1}")
    return [attentions[i] for i in indices]


def _few(layers: list[int]) -> str:
    return f"{str(layers[:4])[:-1]}, ...]" if len(layers) > 4 else str(layers)


def _check(attn: Any) -> None:
    processor = attn.processor
    if isinstance(processor, nn.Module):
        raise ValueError(f"{type(processor).__name__} has attention of its own (an adapter); unload it first")
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError("context parallelism splits images between devices: windows cannot be told there")


# --- The call of a model


def _no_ids() -> None:
    """Stands for a reference to positions that are gone."""


class _Call:
    """What is known of one call of a model."""

    def __init__(self, grid: Grid = ()) -> None:
        self.grid = grid
        self.mask: tuple[Tensor | None, list[Tensor]] = None, []


class _Tokens(ModelHook):
    """How the tokens of the call that a model is in lie. Belongs to one model, whose hook it is.

    Each thread has a call of its own. Layers that checkpoints compute again run when it is over and, on a GPU, in a
    thread of autograd's: they find the call by the tokens that their block is given. Not so where the block is
    compiled, where reentrant checkpoints or hooks that copy saved tensors give it other ones, and where it was in a
    ``checkpoint_wrapper`` before the hooks came, which then stand outside of the checkpoint. There they take the last
    call with gradients: of their thread or, as autograd's has none that outlasts a block, of whichever thread.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.family = family
        self.thread = threading.local()
        self.calls = WeakTensorKeyDictionary()
        """those with gradients, by the tokens that each block was given"""
        self.recorded = _Call()
        """the last one with gradients"""
        self.signature = inspect.signature(type(model).forward)
        self.ids: tuple[Callable[[], Any], int, Grid] = _no_ids, 0, ()
        """the positions of the last call that had some, how often they had changed, and their grid"""
        # Bound methods, so that a deep copy of the model has hooks of its own.
        self.handles = [
            model.register_forward_pre_hook(self.read, with_kwargs=True),  # pyright: ignore
            model.register_forward_hook(self.forget),  # pyright: ignore
        ]

    def watch(self, block: nn.Module) -> None:
        if self not in self.all_of(block):
            self.handles += [
                block.register_forward_pre_hook(self.follow, with_kwargs=True),  # pyright: ignore
                # Checkpoints raise an exception once they have computed again what they need.
                block.register_forward_hook(self.leave, always_call=True),  # pyright: ignore
            ]

    def __getstate__(self) -> dict[str, Any]:
        known = {"ids": (_no_ids, 0, ()), "recorded": _Call()}  # of one call's tensors alone
        return {name: value for name, value in (self.__dict__ | known).items() if name not in ("thread", "calls")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, thread=threading.local(), calls=WeakTensorKeyDictionary())

    @property
    def call(self) -> _Call:
        return getattr(self.thread, "call", self.recorded)

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.thread, self.recorded = threading.local(), _Call()

    @torch.compiler.disable
    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            arguments = self.signature.bind(model, *args, **kwargs).arguments
        except TypeError:
            return  # the model will say so
        self.check_layers(model)
        self.thread.call = _Call(self.grid_of(model, arguments))
        self.thread.entered = []  # blocks that the thread is in, each with the call that it had before
        if torch.is_grad_enabled():
            self.recorded = self.thread.call

    def follow(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take up the call in which a block was first given these tokens, if a checkpoint computes it again."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        tokens = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if tokens is not None:
            known = vars(self.thread)  # which autograd's threads have not filled
            known.setdefault("entered", []).append((block, known.get("call")))
            self.thread.call = self.calls.setdefault(tokens, self.call)

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Give the thread its own call back, if it has one: autograd's, which lasts from step to step, has none."""
        if torch.compiler.is_compiling():
            return
        known = vars(self.thread)
        entered = known.get("entered")
        if entered and entered[-1][0] is block:  # else follow had nothing to do
            _, before = entered.pop()
            if before is None:
                known.pop("call", None)
            else:
                known["call"] = before

    def grid_of(self, model: nn.Module, arguments: Arguments) -> Grid:
        ids = arguments.get("img_ids")
        # Tensors of inference mode do not count changes in place, so they are read in every step.
        version = ids._version if isinstance(ids, Tensor) and not ids.is_inference() else None
        last, version_then, grid_then = self.ids
        if version is not None and ids is last() and version == version_then:
            return grid_then  # As in the last step: reading them would wait for the device.
        try:
            grid = self.family.grid(model, arguments)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"how the tokens of {type(model).__name__} of {VERSION} lie cannot be told from its arguments "
                f"{[*arguments][1:]}: {error!r}"
            ) from error
        if version is not None:
            self.ids = weakref.ref(ids), version, grid
        return grid

    @torch.compiler.disable
    def forget(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Let no layer compute with the grid of a call that is over, but for layers that checkpoints compute again."""
        if not torch.is_grad_enabled():
            vars(self.thread).pop("call", None)

    def check_layers(self, model: nn.Module) -> None:
        """Raise if somebody else took the place of a processor, which would leave its layer without a window."""
        lost = {
            i: type(attn.processor).__name__
            for i, attn in enumerate(_attentions(model, self.family))
            if getattr(attn, HAS_WINDOW, False) and not isinstance(attn.processor, Replacement)
        }
        if lost:
            kinds = ", ".join(sorted({*lost.values()}))
            raise ValueError(
                f"layers {_few(list(lost))} lost their windows, as {kinds} took the place of their "
                "processors; call neighborhood after whatever sets processors (fuse_qkv_projections, "
                "unfuse_qkv_projections, adapters), or unpatch"
            )

    def visible_text(self, mask: Tensor, text: slice, batch: int) -> list[Tensor]:
        """Indices of the text tokens of each sample that a mask ``[B or 1, 1, 1 or L, L]`` lets image tokens see."""
        call = self.call
        if call.mask[0] is not mask:  # which layers share, as a rule: to find the indices waits for the device
            length = mask.shape[-1]
            of_queries = length if self.family.masks_pairs else 1
            if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, of_queries, length):
                raise ValueError(
                    f"attention mask {mask.dtype} {tuple(mask.shape)} is not one of padding, bool "
                    f"[B, 1, {of_queries}, {length}]"
                )
            pixel = text.stop % length if self.family.masks_pairs else 0  # text is the first or the last part
            rows = mask[:, 0, pixel].expand(batch, -1)
            if not bool(torch.cat([rows[:, : text.start], rows[:, text.stop :]], 1).all()):
                raise ValueError("the attention mask hides image tokens, which windows cannot honour")
            call.mask = mask, [row.nonzero()[:, 0] for row in rows[:, text]]
        return call.mask[1]


class _Interception(TorchFunctionMode):
    """Computes ``scaled_dot_product_attention`` by ``attend``."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = self.attend
        elif getattr(Tensor, name := getattr(func, "__name__", ""), None) is func:
            # The compiler knows methods of tensors by name, not the Python code that some of them are.
            return getattr(args[0], name)(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _replacement(processor: Any, window: _Window) -> Any:
    """A copy of a processor, of a class of its own, as layers and their library ask for a processor's class."""
    replaced = processor.replaced if isinstance(processor, Replacement) else processor
    new = copy.copy(replaced)
    new.__class__ = _windowed(type(replaced))
    new.replaced, new.window = replaced, window
    if hasattr(new, "_attention_backend"):
        new._attention_backend = "native"  # the one that calls PyTorch's function
    return new


@cache
def _windowed(kind: Any) -> Any:
    """A subclass of a processor's class whose attention has windows."""

    @wraps(kind.__call__)  # layers pass the keyword arguments that the signature names
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        outputs: list[Tensor] = []

        def attend(*args: Any, **kwargs: Any) -> Tensor:
            outputs.append(_attention(self.tokens, self.window, *args, **kwargs))
            return outputs[-1]

        with _Interception(attend):
            result = kind.__call__(self, attn, *args, **kwargs)
        # LTX-2's guidance by perturbation leaves attention out, of some samples or of all.
        skips = kwargs.get("all_perturbed") or kwargs.get("perturbation_mask") is not None
        if len(outputs) != 1 and not (skips and not outputs):
            raise RuntimeError(
                f"{kind.__name__} of {VERSION} calls scaled_dot_product_attention {len(outputs)} times; "
                "windows need one call. Set attention backends before calling neighborhood, not after"
            )
        return result

    def release(self: Any) -> None:
        self.tokens.release()

    def reduce(self: Any) -> tuple[Any, ...]:  # pickle finds no class that a function made
        return _windowless, (kind,), self.__dict__

    methods = {"__call__": call, "release": release, "__reduce__": reduce}
    return type(f"Neighborhood{kind.__name__}", (kind,), methods)


def _windowless(kind: Any) -> Any:
    """A processor of :func:`_windowed` without its attributes, which pickle sets."""
    return object.__new__(_windowed(kind))


def _attention(
    tokens: _Tokens,
    window: _Window,
    query: Tensor,  # [B, Hq, L, D]
    key: Tensor,  # [B, Hkv, L, D]
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """What ``scaled_dot_product_attention`` takes and returns."""
    grid = tokens.call.grid
    length, image, where = query.shape[2], prod(grid), tokens.family.text
    if is_causal or dropout_p or key.shape[2] != length:
        raise ValueError(
            f"attention of {length} queries over {key.shape[2]} keys, is_causal={is_causal}, dropout_p={dropout_p}, "
            "has no neighborhoods here"
        )
    if not grid or length < image or (length > image and where == "elsewhere"):
        raise ValueError(
            f"attention of {length} tokens does not fit a grid of {grid}: call the whole model, on one device; "
            "call neighborhood again, if a block was copied or processors were put back after unpatch; or unpatch it"
        )
    pixels = slice(length - image, length) if where == "first" else slice(0, image)
    text = slice(0, length - image) if where == "first" else slice(image, length)
    heads = [x.transpose(1, 2) for x in (query, key, value)]  # heads last, as views
    of_image = [x[:, pixels].unflatten(1, grid) for x in heads]
    of_text = [x[:, text] for x in heads[1:]]
    if attn_mask is None:
        parts = [_image_attention(window, of_image, of_text, options.get("scale"))]
    else:  # each sample has a number of text tokens of its own
        seen = tokens.visible_text(attn_mask, text, len(query))
        samples = [
            _image_attention(
                window, [x[i : i + 1] for x in of_image], [x[i : i + 1, rows] for x in of_text], options.get("scale")
            )
            for i, rows in enumerate(seen)
        ]
        parts = [torch.cat(samples)]
    if length > image:
        if attn_mask is not None and attn_mask.shape[2] > 1:
            attn_mask = attn_mask[:, :, text]
        out = F.scaled_dot_product_attention(query[:, :, text], key, value, attn_mask=attn_mask, **options)
        parts.insert(0 if where == "first" else 1, out.transpose(1, 2))
    return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).transpose(1, 2)


def _image_attention(window: _Window, image: list[Tensor], text: list[Tensor], scale: float | None) -> Tensor:
    """``[B, tokens, Hq, D]`` of query, key and value ``[B, *grid, H, D]``, and key and value ``[B, R, H, D]``."""
    query, key, value = image
    has_text = text[0].shape[1] > 0
    kernel_size = tuple(map(min, window.kernel_size, query.shape[1:-2]))
    out = neighborhood_attention(
        query, key, value, kernel_size,
        stride=tuple(map(min, window.stride, kernel_size)),
        scale=scale,
        additional_keys=text[0] if has_text else None,
        additional_values=text[1] if has_text else None,
    )  # fmt: skip
    return out.flatten(1, -3)
