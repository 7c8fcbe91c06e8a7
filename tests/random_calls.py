"""The random calls of test_random.py and test_stress.py: small ones for the interpreter, realistic ones on a GPU.

On a GPU nearly all the time of a call is the compiler's, so ``GROUP`` consecutive seeds share kernels. One random
stream for all of them draws what kernels are compiled for (``draw_group``): axes, windows, dilation, causal and
periodic axes, heads, channels, dtype, whether there are strides, register tokens, a sink, a mask, a bias or a scale
that is negative, the kind of layout, and which inputs have tangents. Each seed's own stream draws the rest
(``drawn_anew``): values, batch, samples of a packed batch, length of a text, strides, number of register tokens, scale,
share of visible keys, which layout of its kind, and whether tangents are those of lse, too. The interpreter compiles
nothing, so there every seed is a group of its own.

Of calls with any options nearly all take the portable kernels, which alone support all of them. So most groups on a GPU
are of a ``Kind`` that suits the kernels of one family.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import Random
from typing import Literal, NamedTuple

import pytest
import torch
from helpers import Case, Inputs

from natten_layers.kernels.portable import pair_variants
from natten_layers.kernels.sm90 import medium_tiling, thresholds

ON_GPU = torch.cuda.is_available()

Option = Literal[
    "stride", "dilation", "periodic", "other grid", "values", "registers", "negative scale", "mask", "bias",
    "offset",
]  # fmt: skip
"""What only some kernels take: ``values`` of another width than keys, ``offset``, which is a layout, and the like"""

LENGTHS = {1: 700, 2: 48, 3: 14} if ON_GPU else {1: 40, 2: 9, 3: 4}
HEAD_DIMS = (64, 64, 64, 128, 128, 16, 32, 40, 72, 80, 96, 112, 192, 256) if ON_GPU else (8, 16, 24)
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float16, torch.float32)
LAYOUTS = (("plain", "projected"), ("plain", "projected"), ("heads first",), ("offset",))
"""kinds of layouts, with those that most kernels cannot tell apart"""
REGISTERS = ((0,), (1,), (5, 7, 13), (17, 19, 31), (40,))
"""numbers of register tokens, with those that most kernels cannot tell apart"""
SEEN = (0.9, 0.5, 0.02)
MOVING = 0.3 if ON_GPU else 0.03
"""The share of groups whose calls are made in forward mode, too, for which the interpreter takes far longer"""
GROUP = 5 if ON_GPU else 1
"""Consecutive seeds whose calls share kernels"""


LOWERED = {
    thresholds: dict.fromkeys(
        (
            "LEAST_ROWS", "LEAST_FILLED", "PAIRS", "WIDE_PAIRS", "WIDE_PAIRS_BESIDE_DQ", "MEDIUM_WINDOW",
            "MEDIUM_PRODUCTS", "MEDIUM_PRODUCTS_WITH_BIASES", "MEDIUM_PRODUCTS_OF_GRADIENTS",
            "MEDIUM_PRODUCTS_OF_KEY_GRADIENTS", "MEDIUM_CHANNELS",
            "LEAST_MEDIUM_CHANNELS", "MEDIUM_KEYS_OF_NARROW_DQ", "REGISTER_ELEMENTS", "REGISTER_PRODUCTS",
            "LARGE_KEY_ELEMENTS", "LARGE_KEY_ELEMENTS_WITH_REGISTERS", "LARGE_KEY_ELEMENTS_OF_NARROW_DQ",
        ), 0,
    ) | dict.fromkeys(
        (
            "MEDIUM_KEY_ELEMENTS_ON_ONE_AXIS", "MEDIUM_KEY_ELEMENTS_OF_NARROW_HEADS",
            "MEDIUM_KEY_ELEMENTS_OF_WIDE_FORWARD", "MEDIUM_KEY_ELEMENTS_OF_80_CHANNELS",
            "MEDIUM_KEY_ELEMENTS_OF_UNFILLED_COLUMNS", "MEDIUM_KEY_ELEMENTS_OF_NARROW_HEADS_WITHOUT_MAXIMA",
            "MEDIUM_KEY_ELEMENTS_WITHOUT_MAXIMA", "MEDIUM_KEY_ELEMENTS_OF_WIDE_HEADS_WITHOUT_MAXIMA",
        ), 2**15,
    ) | {"MEDIUM_KEYS_TIMES_SQUARED_CHANNELS": 2**21},
    medium_tiling: {"INSIDE": 0.0, "INSIDE_ON_ONE_AXIS": 0.0},
    pair_variants: {"LEAST_PAIRS": 0, "LEAST_WINDOW": 0},
}  # fmt: skip
"""Sizes from which on kernels pay, by module: none, but for large windows one where those of medium size end. Of medium
windows, all chunks are asked whether they need a mask."""


def lower_thresholds(patch: pytest.MonkeyPatch) -> None:
    """Let small problems take the kernels of large ones."""
    for module, values in LOWERED.items():
        for name, value in values.items():
            patch.setattr(module, name, value)


class Sides(NamedTuple):
    """Of windows, and with them of the tokens on an axis."""

    shortest: int
    longest: int


@dataclass(frozen=True)
class Kind:
    """What the calls of a group are drawn from."""

    share: int
    """of all groups, in percent on a GPU"""
    sides: Mapping[int, tuple[Sides, ...]]
    """by the number of axes"""
    lengths: Mapping[int, int] = field(default_factory=lambda: LENGTHS)
    """the longest axis, by their number"""
    head_dims: tuple[int, ...] = HEAD_DIMS
    dtypes: tuple[torch.dtype, ...] = DTYPES
    packed: float = 0.0
    """the share of packed batches"""
    never: tuple[Option, ...] = ()
    """options that its kernels do not take"""
    often: tuple[Option, ...] = ()
    """options that are drawn twice as often as elsewhere"""
    divides: bool = True
    """whether a dilation divides its axes, of which there are two at most: few kernels take others"""


HALF = (torch.bfloat16, torch.float16)
ANYTHING = Kind(
    share=30,
    sides={
        1: (*[Sides(1, 128)] * 3, Sides(1, 400)),
        2: (*[Sides(1, 9)] * 3, Sides(1, 20)),
        3: (*[Sides(1, 4)] * 3, Sides(1, 10)),
    },
    packed=0.25,
    divides=False,
)
SMALL = Kind(
    share=7,
    sides={1: (Sides(8, 200),), 2: (Sides(3, 9),), 3: (Sides(1, 4),)},
    head_dims=(64, 64, 64, 32, 32, 128, 96, 48),
    dtypes=HALF,
    never=("periodic", "other grid", "values", "negative scale", "bias", "offset"),
    often=("stride", "dilation"),
)
RUNS = replace(
    SMALL,
    share=8,
    sides={1: (Sides(64, 200),), 2: (Sides(6, 9),)},
    head_dims=(64, 64, 64, 32, 48),
    never=(*SMALL.never, "stride", "dilation", "mask"),
)
IMAGES = replace(SMALL, share=7, sides={2: (Sides(3, 9),), 3: (Sides(1, 4),)}, packed=1.0, never=RUNS.never)
TEXTS = replace(
    SMALL,
    share=7,
    sides={1: (Sides(8, 150), Sides(150, 500))},
    packed=1.0,
    never=(*SMALL.never, "dilation", "mask", "registers"),
)
MEDIUM = Kind(
    share=14,
    sides={1: (Sides(200, 400),), 2: (Sides(9, 21),), 3: (Sides(4, 8),)},
    head_dims=(64, 64, 32, 40, 80, 96, 112, 128),
    dtypes=HALF,
    never=("values", "negative scale", "offset"),
    often=("dilation", "bias", "other grid"),
)
REFERENCES = replace(
    MEDIUM, share=6, dtypes=(torch.bfloat16,), never=(*MEDIUM.never, "mask", "bias"), often=("dilation", "other grid")
)
"""Medium windows of which calls without gradients keep the references of the first chunk."""
LARGE = Kind(
    share=9,
    sides={1: (Sides(500, 800),), 2: (Sides(20, 32),), 3: (Sides(8, 11),)},
    lengths={1: 1100, 2: 40, 3: 13},
    head_dims=(64, 64, 128, 128, 80, 112, 192, 256),
    dtypes=HALF,
    never=("dilation", "periodic", "other grid", "negative scale", "mask", "bias", "offset"),
)
PAIRS = Kind(
    share=8,
    sides={1: (Sides(25, 128),), 2: (Sides(5, 13),), 3: (Sides(2, 6),)},
    head_dims=(32, 32, 64, 64, 128),
    dtypes=(torch.float32,),
    never=("other grid", "values", "registers", "negative scale", "mask", "bias"),
)
PORTABLE_PAIRS = replace(
    PAIRS,
    share=4,
    sides={1: (Sides(25, 64),), 2: (Sides(5, 8),), 3: (Sides(2, 4),)},
    head_dims=(40, 48, 64, 96, 160),
    never=("other grid", "negative scale", "mask", "bias"),
)
KINDS = (ANYTHING, SMALL, RUNS, IMAGES, TEXTS, MEDIUM, REFERENCES, LARGE, PAIRS, PORTABLE_PAIRS)


class Call(NamedTuple):
    case: Case
    layout: str
    moving: tuple[str, ...] = ()
    """Names of the inputs with tangents, if the call is made in forward mode, too"""
    moves_lse: bool = False
    """Whether it returns lse in forward mode"""


def groups(seeds: range) -> list[range]:
    """Seeds in groups that share kernels. The first one begins a group."""
    return [seeds[i : i + GROUP] for i in range(0, len(seeds), GROUP)]


def first_of(seeds: range) -> str:
    return str(seeds[0])


def draw_shapes(random: Random, longest: tuple[int, ...], steps: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Draw samples of a packed batch: one as long as the window was drawn for, others shorter, and some empty.

    Their lengths are multiples of ``steps``. On one axis a last one, of less than 16 of them, leaves the sum of all
    lengths what it was for the longest alone modulo 16.
    """
    shapes = [
        tuple(
            random.randint(0 if random.random() < 0.1 else 1, length // step) * step
            for length, step in zip(longest, steps, strict=True)
        )
        for _ in range(random.randint(0, 3))
    ]
    shapes.insert(random.randint(0, len(shapes)), longest)
    if len(longest) == 1:
        rest = longest[0] - sum(length for (length,) in shapes)
        shapes.append((rest % (16 * steps[0]) // steps[0] * steps[0],))
    return tuple(shapes)


def kind_of(group: int) -> Kind:
    """The kind of a group: of every hundred as many as its share. A CPU has kernels for anything alone."""
    shares = list(accumulate(kind.share for kind in KINDS))
    return KINDS[bisect(shares, 37 * group % 100)] if ON_GPU else ANYTHING


def draw_case(random: Random, kind: Kind) -> Case:
    """Draw a case of one to three axes with any options that the kernels of a kind take."""

    def has(option: Option, share: float) -> bool:
        return random.random() < share * (1 + (option in kind.often)) and option not in kind.never

    packed = random.random() < kind.packed
    rank = random.choice([rank for rank in (1, 2, 2, 3) if rank in kind.sides])
    shortest, longest = random.choice(kind.sides[rank])
    spatial = tuple(random.randint(shortest, kind.lengths[rank]) for _ in range(rank))
    strided = has("stride", 0.2)
    dilated = has("dilation", 0.2) and not (kind.divides and rank == 3)
    widest = [n // 2 if dilated and kind.divides else n for n in spatial]
    kernel_size = tuple(random.randint(shortest, max(shortest, min(n, longest))) for n in widest)
    least = 2 if kind.divides else 1
    most = [n // k if dilated else 1 for n, k in zip(spatial, kernel_size, strict=True)]
    dilation = tuple(random.randint(min(least, n), n) for n in most)
    if kind.divides:
        spatial = tuple(n // d * d for n, d in zip(spatial, dilation, strict=True))
    is_causal = tuple(random.random() < (0.5 if rank == 1 else 0.15) for _ in spatial)
    axes = zip(spatial, dilation, is_causal, strict=True)
    is_periodic = tuple(has("periodic", 0.25) and n % d == 0 and not causal for n, d, causal in axes)
    kv_heads, dim = random.choice((1, 2, 3)), random.choice(kind.head_dims)
    other = not packed and not any(is_causal) and set(dilation) == {1} and not strided and has("other grid", 0.3)
    queries = tuple(random.randint(1, kind.lengths[rank]) for _ in spatial) if other else spatial
    return Case(
        name="random",
        spatial=() if packed else queries,
        key_spatial=None if packed else spatial,
        shapes=(spatial,) if packed else None,
        kernel_size=kernel_size,
        stride=tuple(random.randint(1, k) if strided else 1 for k in kernel_size),
        dilation=dilation,
        is_causal=is_causal,
        is_periodic=is_periodic,
        heads=kv_heads * random.choice((1, 2, 3, 4, 8)),
        kv_heads=kv_heads,
        head_dim=dim,
        value_dim=random.choice(kind.head_dims) if has("values", 0.1) else dim,
        registers=random.choice(REGISTERS[1:])[0] if has("registers", 0.65) else 0,
        sink=random.choice(("none", "zero", "learned")),
        scale=-0.2 if has("negative scale", 0.25) else random.choice((None, None, 0.3)),
        batch=random.choice((1, 2, 3)),
        dtype=random.choice(kind.dtypes),
        seen=random.choice(SEEN) if has("mask", 0.6) else None,
        has_bias=not packed and not other and has("bias", 0.2),
    )


def drawn_anew(case: Case, random: Random, kind: Kind) -> Case:
    """Draw those arguments of a case anew that hardly any kernel is compiled for.

    A stride of 1 stays, and so do a batch of 1 and the sign of the scale, as there are other kernels for these. Lengths
    of texts stay what they were modulo 16, and of images they stay altogether: tiles and the divisors of strides depend
    on them. Tiles of the kernels for anything depend on no other strides, those of ``kind`` may.
    """
    window = case.window
    sides = zip(window.stride, window.kernel_size, strict=True)
    strides = tuple(step if step == 1 else random.randint(2, kernel) for step, kernel in sides)
    changed = replace(
        case,
        stride=strides if kind is ANYTHING else window.stride,
        registers=random.choice(next(counts for counts in REGISTERS if case.registers in counts)),
        scale=random.choice((None, None, 0.3)) if case.scale != -0.2 else random.choice((-0.2, -0.05)),
        batch=1 if case.batch == 1 else random.choice((2, 3)),
        seen=None if case.seen is None else random.choice(SEEN),
    )
    if case.shapes is not None:
        axes = zip(window.dilation, window.is_periodic, strict=True)
        steps = tuple(dilation if periodic else 1 for dilation, periodic in axes)
        return replace(changed, shapes=draw_shapes(random, case.shapes[0], steps))
    if len(case.spatial) == 1 and case.spatial == case.key_spatial:
        (length,), (kernel,), (dilation,) = case.spatial, window.kernel_size, window.dilation
        step = 16 * dilation
        shorter = (length - random.randint(0, (length - kernel * dilation) // step) * step,)
        return replace(changed, spatial=shorter, key_spatial=shorter)
    return changed


def draw_moving(random: Random, case: Case) -> tuple[str, ...]:
    """Draw which inputs of a case have tangents: all, which the kernels for half precision want, or some of them.

    Only the eager path takes biases in forward mode.
    """
    names = ["query", "key", "value"]
    names += ["additional_keys", "additional_values"] if case.registers else []
    names += ["sink"] if case.sink == "learned" else []
    some = random.sample(names, random.choice((len(names), random.randint(1, len(names)))))
    return tuple(some) if random.random() < MOVING and not case.has_bias else ()


def draw_call(seed: int) -> Call:
    """The call of a seed."""
    common, own = Random(f"group {seed // GROUP}"), Random(seed)
    kind = kind_of(seed // GROUP)
    case = draw_case(common, kind)
    layouts = common.choice([names for names in LAYOUTS if names[0] not in kind.never])
    moving = draw_moving(common, case)
    return Call(drawn_anew(case, own, kind), own.choice(layouts), moving, own.random() < 0.5)


def laid_out(inputs: Inputs, layout: str) -> Inputs:
    """The same values with another layout in memory."""
    moved = {name: tensor.detach() for name, tensor in inputs.items()}
    heads = {name: moved[name] for name in ("query", "key", "value")}
    if (
        layout == "projected"
        and heads["query"].shape[:-2] == heads["key"].shape[:-2]
        and (heads["key"].shape == heads["value"].shape)
    ):
        parts = torch.cat([*heads.values()], -2).split([x.shape[-2] for x in heads.values()], -2)
        moved |= zip(heads, parts, strict=True)
    elif layout == "heads first":
        first = 0 if heads["query"].ndim == 3 else 1  # a packed batch has no axis of images
        moved |= {name: x.movedim(-2, first).contiguous().movedim(first, -2) for name, x in heads.items()}
    elif layout == "offset":  # addresses are not multiples of 16
        moved |= {name: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for name, x in heads.items()}
    return {name: x.requires_grad_() for name, x in moved.items()}
