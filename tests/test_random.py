"""Random calls against the fp64 eager path: small ones interpreted, realistic ones on a GPU.

``--seeds 1000`` draws that many calls.

Kernels for large problems are used for small ones as well, with sizes that are not multiples of tile sizes.

On a GPU nearly all the time of a call is the compiler's, so ``GROUP`` consecutive seeds share kernels. One random
stream for all of them draws what kernels are compiled for (``draw_case``): axes, windows, dilation, causal and periodic
axes, heads, channels, dtype, whether there are strides, register tokens, a sink, a mask, a bias or a scale that is
negative, and the kind of layout. Each seed's own stream draws the rest (``drawn_anew``): values, batch, samples of a
packed batch, length of a text, strides, number of register tokens, scale, share of visible keys, and which layout of
its kind. The interpreter compiles nothing, so there every seed is a group of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
import torch
from helpers import FLOOR, Case, Inputs, Result, arguments, error, make_inputs, operation, run

pytest.importorskip("triton")

from natten_layers.kernels.host.tuned import forget
from natten_layers.kernels.sm90 import thresholds

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []

LENGTHS = {1: 700, 2: 48, 3: 14} if ON_GPU else {1: 40, 2: 9, 3: 4}
"""the longest axis, by their number"""
WINDOWS = {1: (128, 400), 2: (9, 20), 3: (4, 10)}
"""the longest side of most windows, and of large ones"""
HEAD_DIMS = (64, 64, 64, 128, 128, 16, 32, 40, 72, 80, 96, 112, 192, 256) if ON_GPU else (8, 16, 24)
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float16, torch.float32)
LAYOUTS = (("plain", "projected"), ("plain", "projected"), ("heads first",), ("offset",))
"""kinds of layouts, with those that most kernels cannot tell apart"""
REGISTERS = ((0,), (0,), (1,), (5, 7, 13), (17, 19, 31), (40,))
"""numbers of register tokens, with those that most kernels cannot tell apart"""
SEEN = (0.9, 0.5, 0.02)
GROUP = 5 if ON_GPU else 1
"""Consecutive seeds whose calls share kernels"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        count = metafunc.config.getoption("--seeds") or (200 if ON_GPU else 12)
        metafunc.parametrize("seeds", groups(range(count)), ids=first_of)


def groups(seeds: range) -> list[range]:
    """Seeds in groups that share kernels. The first one begins a group."""
    return [seeds[i : i + GROUP] for i in range(0, len(seeds), GROUP)]


def first_of(seeds: range) -> str:
    return str(seeds[0])


def draw_shapes(random: Random, longest: tuple[int, ...], steps: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Draw samples of a packed batch: one as long as the window was drawn for, others shorter, and some empty.

    Their lengths are multiples of ``steps``.
    """
    shapes = [
        tuple(
            random.randint(0 if random.random() < 0.1 else 1, length // step) * step
            for length, step in zip(longest, steps, strict=True)
        )
        for _ in range(random.randint(0, 3))
    ]
    shapes.insert(random.randint(0, len(shapes)), longest)
    return tuple(shapes)


def draw_case(random: Random, packed: bool = False) -> Case:
    """Draw a case of one to three axes with any options that a call may have."""
    rank = random.choice((1, 2, 2, 3))
    side = random.choices(WINDOWS[rank], (3, 1))[0]
    spatial = tuple(random.randint(1, LENGTHS[rank]) for _ in range(rank))
    kernel_size = tuple(random.randint(1, min(length, side)) for length in spatial)
    strided, dilated = (random.random() < 0.2 for _ in range(2))
    dilation = tuple(random.randint(1, n // k) if dilated else 1 for n, k in zip(spatial, kernel_size, strict=True))
    is_causal = tuple(random.random() < (0.5 if rank == 1 else 0.15) for _ in spatial)
    axes = zip(spatial, dilation, is_causal, strict=True)
    is_periodic = tuple(random.random() < 0.25 and n % d == 0 and not causal for n, d, causal in axes)
    kv_heads, dim = random.choice((1, 2, 3)), random.choice(HEAD_DIMS)
    other = not packed and not any(is_causal) and set(dilation) == {1} and not strided and random.random() < 0.3
    queries = tuple(random.randint(1, LENGTHS[rank]) for _ in spatial) if other else spatial
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
        value_dim=dim if random.random() < 0.9 else random.choice(HEAD_DIMS),
        registers=random.choice(REGISTERS)[0],
        sink=random.choice(("none", "zero", "learned")),
        scale=random.choice((None, None, 0.3, -0.2)),
        batch=random.choice((1, 2, 3)),
        dtype=random.choice(DTYPES),
        seen=random.choice((None, None, *SEEN)),
        has_bias=not packed and not other and random.random() < 0.2,
    )


def drawn_anew(case: Case, random: Random) -> Case:
    """Draw those arguments of a case anew that hardly any kernel is compiled for.

    A stride of 1 stays, and so does the sign of the scale, as there are other kernels for these. Lengths of texts stay
    what they were modulo 16, and of images they stay altogether: tiles and the divisors of strides depend on them.
    """
    window = case.window
    sides = zip(window.stride, window.kernel_size, strict=True)
    changed = replace(
        case,
        stride=tuple(step if step == 1 else random.randint(2, kernel) for step, kernel in sides),
        registers=random.choice(next(counts for counts in REGISTERS if case.registers in counts)),
        scale=random.choice((None, None, 0.3)) if case.scale != -0.2 else random.choice((-0.2, -0.05)),
        batch=random.choice((1, 2, 3)),
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


def draw_call(seed: int) -> tuple[Case, str]:
    """The case of a seed and its layout."""
    common, own = Random(f"group {seed // GROUP}"), Random(seed)
    case, layouts = draw_case(common, packed=seed // GROUP % 4 == 3), common.choice(LAYOUTS)
    return drawn_anew(case, own), own.choice(layouts)


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


@pytest.fixture(autouse=True)
def small_problems_take_kernels_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (
        "LEAST_ROWS", "LEAST_FILLED", "PAIRS", "WIDE_PAIRS", "MEDIUM_WINDOW", "MEDIUM_PRODUCTS", "MEDIUM_CHANNELS",
        "MEDIUM_PRODUCTS_WITH_BIASES", "MEDIUM_KEYS_ON_ONE_AXIS", "REGISTER_ELEMENTS", "REGISTER_PRODUCTS",
    ):  # fmt: skip
        monkeypatch.setattr(thresholds, name, 0)
    forget()
    yield
    forget()


def check(case: Case, layout: str, seed: int = 0) -> Result:
    """Check the fused path, and return what it gave.

    Gradients are compared with those of the output as it was rounded, which is judged by itself.
    """
    inputs = laid_out(make_inputs(case, DEVICE, seed), layout)
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    exact, peer = run(case, wide, "eager").tensors(), run(case, inputs, "eager").tensors()
    with torch.no_grad():
        alone = operation(case)(**arguments(case, inputs), impl="fused")
    fused = run(case, inputs, "fused")
    expected = exact | {f"grad of {name}": x for name, x in run(case, wide, "eager", fused.out).grads.items()}
    for name, tensor in (item for tensors in ({"out": alone}, fused.tensors()) for item in tensors.items()):
        if name in ("grad of sink", "grad of rpb"):  # sums over all tokens that may cancel; other tests check them
            continue
        limit = 2 * FLOOR[case.dtype if name.startswith("grad") else tensor.dtype]
        limit, found = max(limit, 3 * error(peer[name], exact[name])), error(tensor, expected[name])
        assert found <= limit, (
            f"{name} has relative error {found:.2e}, allowed {limit:.2e}: seed {seed}, {case!r}, {layout}"
        )
    return fused


def check_call(seed: int) -> None:
    check(*draw_call(seed), seed)


def test_a_random_call(seeds: range) -> None:
    for seed in seeds:
        check_call(seed)


def test_gradients_of_few_scores_far_apart() -> None:
    """They are differences of numbers that are nearly equal, of which one comes from the rounded output.

    So they are far from those of the exact output, in any kernel that reads a rounded one.
    """
    dtype = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter cannot multiply bfloat16 matrices
    case = Case("far apart", (2,), 1, heads=4, head_dim=128, value_dim=128, registers=1, scale=-0.4, dtype=dtype)
    fused = check(case, "plain")
    wide = {name: x.detach().double().requires_grad_() for name, x in make_inputs(case, DEVICE).items()}
    assert error(fused.grads["key"], run(case, wide, "eager").grads["key"]) > 2 * FLOOR[dtype]
