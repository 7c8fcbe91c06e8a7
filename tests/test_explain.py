"""``explain`` names the kernels that compute a call."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import raises_naming
from torch import Tensor
from torch.autograd import forward_ad

from natten_layers import (
    AxialRoPE,
    Explanation,
    NeighborhoodGQA,
    explain,
    neighborhood_attention,
    neighborhood_attention_varlen,
)

pytest.importorskip("triton.experimental.gluon")

import triton
from problems import (
    problem_of_image,
    problem_of_packed_images,
    problem_of_packed_texts,
    problem_of_projected_image,
    problem_of_text,
)

from natten_layers.kernels import dispatch
from natten_layers.kernels.host.card import CARDS, card_of
from natten_layers.kernels.host.launcher import Launcher
from natten_layers.kernels.host.packing import Packing
from natten_layers.kernels.host.problem import Inputs, Layout, Problem, contiguous, precision
from natten_layers.kernels.host.qk_prep import QKPrepKind
from natten_layers.kernels.host.tiling import TileConfig
from natten_layers.kernels.host.tuned import forget, override
from natten_layers.kernels.host.variant import Choice, Direction
from natten_layers.kernels.ops.attention import compiler_gap
from natten_layers.kernels.portable.pair_variants import PAIRS
from natten_layers.kernels.sm90.available import gluon_gap
from natten_layers.modules import attention, query_key
from natten_layers.modules.hdit_layers import ShiftedWindowGQA

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SM90 = {"sm90 large window", "sm90 small window, rolling", "sm90 small window", "sm90 medium window"}


def draw(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, device=DEVICE, **options)


def test_on_a_cpu_it_is_eager_and_says_why() -> None:
    q = torch.randn(1, 8, 2, 16)
    said = explain(q, q, q, 3)
    assert said == Explanation("eager", "the tensors are on cpu, the kernels run on CUDA devices")
    assert str(said) == "eager (PyTorch), not fused: the tensors are on cpu, the kernels run on CUDA devices"
    assert "asks for it" in str(explain(q, q, q, 3, impl="eager"))
    with raises_naming("kernel_size", "9", "8"):
        explain(q, q, q, 9)
    odd = torch.randn(1, 8, 2, 12)
    with raises_naming("impl", "head_dim 12", error=RuntimeError):
        explain(odd, odd, odd, 3, impl="fused")


ROPE = {"rope": AxialRoPE(16, 4, num_kv_heads=2)}
LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"sink": "learned", "is_causal": (True, False)}, {}),
    "mask, registers": ({"num_registers": 3}, {"mask": torch.arange(42).reshape(1, 6, 7) % 5 > 0}),
    "cosine, RoPE": ({**ROPE, "qk_norm": "cosine"}, {}),
    "rms": ({"qk_norm": "rms"}, {}),
    "RoPE, bias": ({**ROPE, "rel_pos_bias": True}, {}),
    "RoPE, registers attend": ({**ROPE, "num_registers": 3, "registers_attend": True}, {}),
    "packed": ({"is_periodic": (False, True)}, {"shapes": [(6, 5), (3, 4)]}),
    "packed, rms": ({"qk_norm": "rms", "num_registers": 3}, {"shapes": [(6, 5), (3, 4)]}),
}
PREPARED = {"cosine, RoPE", "rms", "packed, rms"}
"""Layers that normalise and rotate in one operation with attention, if they need no gradient"""


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_explains_its_calls(kind: str, needs_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the choices that a call makes, with the same tiles and the same reasons."""
    options, arguments = LAYERS[kind]
    arguments = {name: x.to(DEVICE) if name == "mask" else x for name, x in arguments.items()}
    layer = NeighborhoodGQA(64, 4, (3, 3), num_kv_heads=2, **options).to(DEVICE)
    x = draw(*((42,) if "shapes" in arguments else (1, 6, 7)), 64)
    monkeypatch.setattr(attention, "attend_with_qk_prep", partial(query_key.attend_with_qk_prep, impl="fused"))
    monkeypatch.setattr(query_key, "explain_call", partial(query_key.explain_call, impl="fused"))
    made: dict[str, Choice] = {}
    choose = dispatch.choose

    def spy(direction: dispatch.Direction, question: Any) -> Choice:
        return made.setdefault(direction, choose(direction, question))

    with torch.set_grad_enabled(needs_grad):
        said = layer.explain(x, **arguments)
        assert said == layer.explain(x, **arguments, needs_grad=needs_grad)
        monkeypatch.setattr(dispatch, "choose", spy)
        forget()  # choices for the backward pass are kept together
        monkeypatch.setattr(layer, "_attend_from_registers", lambda heads, extra, mask: extra.query)
        out = layer(x, **arguments)
        if needs_grad:
            (out[0] if layer.registers_attend else out).sum().backward()
    found = [(kernel.direction, kernel.name, dict(kernel.settings), kernel.passed_over) for kernel in said.kernels]
    assert found == [(name, x.variant.name, dict(x.settings), x.passed_over) for name, x in made.items()]
    assert (said.kernels[0].direction == "qk_prep + forward") == (kind in PREPARED and not needs_grad)


def test_a_launch_of_its_own_for_queries_and_keys_is_one_line() -> None:
    layer = NeighborhoodGQA(256, 4, 7, qk_norm="cosine", device="meta", dtype=torch.bfloat16)
    x = torch.empty(8, 128, 128, 256, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        prepared, attended = layer.explain(x, device="A100").kernels
    assert prepared.direction == "qk_prep + forward"
    assert str(prepared).splitlines()[0] == "qk_prep + forward: qk_prep, then forward"
    assert str(prepared).splitlines()[1].startswith("  not sm90 small window, rolling: ")
    assert (attended.direction, attended.name) == ("forward", "portable")


def test_layers_are_checked_and_explained_by_themselves() -> None:
    layer, x = NeighborhoodGQA(32, 4, 3), torch.randn(1, 6, 7, 32)
    with raises_naming("NeighborhoodGQA", "layer.explain(x)", error=TypeError):
        explain(layer, x)  # pyright: ignore[reportCallIssue, reportArgumentType]
    with raises_naming("Identity", "layer.explain(x)", error=TypeError):
        explain(query=torch.nn.Identity(), key=x, value=x, kernel_size=3)  # pyright: ignore[reportArgumentType]
    wrong: dict[str, Any] = {"positions": x, "mask": x, "device": "K80"}
    for name, argument in wrong.items():
        with raises_naming(name):
            layer.explain(x, **{name: argument})
    with raises_naming("shifted windows", "several calls"):
        ShiftedWindowGQA(32, 4, 4, 2).explain(x)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
def test_it_names_the_kernels_that_are_launched(
    needs_grad: bool, registers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles it reports are those of the launches, too."""
    q, k = draw(1, 6, 7, 4, 16, requires_grad=needs_grad), draw(1, 6, 7, 2, 16)
    extras = dict.fromkeys(("additional_keys", "additional_values"), draw(1, registers, 2, 16)) if registers else {}
    launched: list[Launcher] = []
    launch = Launcher.__call__
    monkeypatch.setattr(Launcher, "__call__", lambda self, *args: launched.append(self) or launch(self, *args))
    said = explain(q, k, k, 3, **extras, impl="fused")
    assert not launched
    out = neighborhood_attention(q, k, k, 3, **extras, impl="fused")
    if needs_grad:
        out.sum().backward()
    directions = ["forward", "backward_query", "backward_key", *(["backward_registers"] if registers else [])]
    assert [kernel.direction for kernel in said.kernels] == directions[: None if needs_grad else 1]
    assert len(launched) == len(said.kernels)
    for kernel, one in zip(said.kernels, launched, strict=True):
        assert kernel.name == "portable"
        settings = dict(kernel.settings)
        if kernel.direction == "backward_registers":
            assert one.options["SPEC"].register_tile == settings["registers"]
        else:
            assert (one.options["SPEC"].tile, one.options["SPEC"].chunk) == (settings["tile"], settings["chunk"])
            assert f"tile={settings['tile']}, chunk={settings['chunk']}" in str(kernel)
            assert {name for name, _ in kernel.passed_over} <= SM90 | {PAIRS, f"sm90 medium window, {PAIRS}"}
            assert all(reason for _, reason in kernel.passed_over)
    assert explain(q, k, k, 3, **extras, impl="fused", needs_grad=True).kernels[1].direction == "backward_query"
    if not ON_GPU:
        assert "not sm90 large window: it is for CUDA devices, the tensors are on cpu" in str(said)


def test_it_names_the_kernel_of_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a level of forward mode is open, and where it is asked for; with a bias the eager path takes its place."""
    q, k = draw(1, 6, 7, 4, 16), draw(1, 6, 7, 2, 16)
    launched: list[Launcher] = []
    launch = Launcher.__call__
    monkeypatch.setattr(Launcher, "__call__", lambda self, *args: launched.append(self) or launch(self, *args))
    with forward_ad.dual_level():
        said = explain(q, k, k, 3, impl="fused")
        neighborhood_attention(forward_ad.make_dual(q, q), k, k, 3, impl="fused")
        assert len(explain(q, k, k, 3, impl="fused", forward_mode=False).kernels) == 1
    assert [kernel.direction for kernel in said.kernels] == ["forward", "jvp"]
    assert said == explain(q, k, k, 3, impl="fused", forward_mode=True)
    assert len(explain(q, k, k, 3, impl="fused").kernels) == 1
    for kernel, one in zip(said.kernels, launched, strict=True):
        settings = dict(kernel.settings)
        assert kernel.name == "portable"
        assert (one.options["SPEC"].tile, one.options["SPEC"].chunk) == (settings["tile"], settings["chunk"])
    rpb = torch.zeros(4, 5, 5, device=DEVICE)
    with raises_naming("takes no rpb", error=RuntimeError):
        explain(q, k, k, 3, rpb=rpb, impl="fused", forward_mode=True)


def test_one_launch_computes_output_and_tangents_where_no_gradient_is_needed() -> None:
    query = torch.empty(1, 64, 64, 8, 64, dtype=torch.bfloat16, device="meta")
    said = explain(query, query, query, 7, needs_grad=False, forward_mode=True, device="H200")
    assert [(kernel.direction, kernel.name) for kernel in said.kernels] == [("forward + jvp", "sm90 medium window")]
    said = explain(query, query, query, 7, needs_grad=True, forward_mode=True, device="H200")
    assert [kernel.direction for kernel in said.kernels] == ["forward", "jvp", "backward_query", "backward_key"]
    assert said.kernels[1].name == "sm90 medium window"
    with torch.no_grad():
        assert len(explain(query, query, query, 7, forward_mode=True, device="H200").kernels) == 1
    said = explain(query, query, query, 7, forward_mode=True, device="H200")  # as torch may be asked for gradients
    assert [kernel.direction for kernel in said.kernels] == ["forward", "jvp"]
    wide = query.float()
    said = explain(wide, wide, wide, 7, needs_grad=False, forward_mode=True, device="H200")
    assert [(kernel.direction, kernel.name) for kernel in said.kernels][1:] == [("jvp", "portable")]


@pytest.mark.parametrize(
    ("moving", "reason"),
    [
        ("qk", "it takes tangents of query, key and value, not of some of them"),
        ("qkvr", "it takes tangents of additional keys and additional values, or of neither"),
        ("qkvrs", None),
        ("qkv", None),
    ],
)
def test_tangents_that_a_kernel_takes(moving: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    registers = contiguous((8, 5, 2, 64))
    problem = problem_of_image(monkeypatch, additional_keys=registers, additional_values=registers)
    tensors = problem.query, problem.key, problem.value, registers, registers
    tangents = tuple(x if name in moving else None for name, x in zip("qkvrs", tensors, strict=True))
    otherwise: dict[Direction, str] = {"jvp": "portable", "forward + jvp": dispatch.FORWARD_THEN_JVP.name}
    for direction, name in otherwise.items():
        choice = dispatch.choose(direction, dispatch.Question(problem, True, tangents=tangents))
        assert choice.variant.name == (name if reason else "sm90 medium window")
        assert [why for _, why in choice.passed_over] == ([reason] if reason else [])


def test_tangents_that_tma_cannot_address(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_image(monkeypatch)
    one_for_all_images = Layout(problem.key.shape, (0, *problem.key.stride[1:]))
    for key_tangent, aligned in ((one_for_all_images, True), (problem.key, False)):
        tangents = problem.query, key_tangent, problem.value, None, None
        question = dispatch.Question(problem, True, tangents=tangents, aligned=aligned)
        ((_, reason),) = dispatch.choose("jvp", question).passed_over
        assert reason.startswith("TMA cannot address")
        assert ("the tangent of key" in reason) == aligned


KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "periodic": ((1, 6, 7), (1, 6, 7), {"is_periodic": (False, True)}),
    "masked": ((1, 6, 7), (1, 6, 7), {"key_mask": torch.arange(42).reshape(1, 6, 7) % 5 > 0}),
    "another grid": ((1, 6, 7), (1, 3, 9), {}),
    "packed": ((42,), (42,), {"shapes": [(6, 5), (3, 4)]}),
    "packed, masked": ((42,), (42,), {"shapes": torch.tensor([(7, 6)]), "key_mask": torch.arange(42) % 5 > 0}),
    "packed, periodic": ((42,), (42,), {"shapes": [(6, 5), (3, 4)], "is_periodic": (False, True)}),
    "texts": ((42,), (42,), {"cu_seqlens": torch.tensor([0, 12, 42])}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_the_arguments_of_every_operation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And names the kernels that these launch, with their tiles."""
    tokens, key_tokens, options = KINDS[kind]
    options = {name: x.to(DEVICE) if name == "key_mask" else x for name, x in options.items()}
    kernel_size = (3,) * (1 if "cu_seqlens" in options else 2)
    q, k = draw(*tokens, 4, 16, requires_grad=True), draw(*key_tokens, 2, 16)
    launched: list[Launcher] = []
    launch = Launcher.__call__
    monkeypatch.setattr(Launcher, "__call__", lambda self, *args: launched.append(self) or launch(self, *args))
    said = explain(q, k, k, kernel_size, **options, impl="fused")
    assert not launched
    if len(tokens) == 1:
        shapes = options.pop("shapes", None)
        out = neighborhood_attention_varlen(q, k, k, shapes, kernel_size, **options, impl="fused")
    else:
        out = neighborhood_attention(q, k, k, kernel_size, **options, impl="fused")
    out.sum().backward()
    assert [kernel.direction for kernel in said.kernels] == ["forward", "backward_query", "backward_key"]
    for kernel, one in zip(said.kernels, launched, strict=True):
        settings = dict(kernel.settings)
        assert (one.options["SPEC"].tile, one.options["SPEC"].chunk) == (settings["tile"], settings["chunk"])
        assert kernel.passed_over


def test_nested_tensors_are_explained_as_packed_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    nested = torch.nested.nested_tensor([draw(5, 2, 16), draw(9, 2, 16)], layout=torch.jagged)
    flat, ends = nested.values(), nested.offsets()  # pyright: ignore[reportAttributeAccessIssue]
    expected = explain(flat, flat, flat, 3, cu_seqlens=ends, impl="fused")
    assert explain(nested, nested, nested, 3, impl="fused") == expected


def test_packed_samples_are_checked_like_those_of_the_operation() -> None:
    q = draw(42, 2, 16)
    for options, names in (
        ({"shapes": [(6, 5)]}, ("shapes", "30", "42")),
        ({"shapes": [(6, 7)], "is_periodic": (False, True), "dilation": (1, 2)}, ("dilation 2", "sample 0", "width")),
        ({"shapes": [(6, 7)], "rpb": draw(2, 5, 5)}, ("rpb",)),
        ({"shapes": [(6, 7)], "cu_seqlens": torch.tensor([0, 42])}, ("shapes", "cu_seqlens")),
        ({"shapes": [(6, 7)], "key_mask": torch.ones(41, dtype=torch.bool)}, ("key_mask", "41", "42")),
    ):
        with raises_naming(*names):
            explain(q, q, q, (3, 3), **options)  # pyright: ignore[reportArgumentType]
    assert "asks for it" in str(explain(q, q, q, (3, 3), shapes=[(6, 7)], impl="eager"))
    empty = explain(q[:0], q[:0], q[:0], (3, 3), shapes=[], impl="fused")
    assert empty.why_eager == "the batch is empty: there is nothing to launch"


def test_tensors_without_data_will_do() -> None:
    q = torch.empty(2, 64, 64, 8, 64, device="meta", dtype=torch.float16)
    if ON_GPU:
        assert "on meta" in str(explain(q, q, q, 7))
    else:
        assert explain(q, q, q, 7, impl="fused").kernels[0].name == "portable"


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_device_is_explained_as_on_that_device(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is kept of it is not taken for the tensors' own device, nor the other way around."""
    query, key = (torch.empty(8, 128, 128, h, 64, device="meta", dtype=dtype) for h in (8, 2))
    ask = partial(explain, query, key, key, 7, needs_grad=True, forward_mode=True)
    # Triton's interpreter computes without bfloat16.
    own: dict[str, Any] = {} if ON_GPU or dtype != torch.float32 else {"impl": "fused"}
    forget()
    here, said = ask(**own), ask(device=name)
    assert here != said
    assert (ask(**own), ask(device=name)) == (here, said)
    card = CARDS[name]
    gap = compiler_gap(card.capability, triton.__version__)
    if gap is not None:
        assert said == Explanation("eager", gap)
        return
    problem = problem_of_image(monkeypatch, capability=card.capability, dtype=dtype, precision=precision(dtype))
    monkeypatch.setattr("natten_layers.kernels.host.problem.device_traits", lambda device: (card.name, card[2]))
    wanted = {"with_stats": False, "with_gradients": True, "with_tangents": True}
    choices = dispatch.choices(problem, Inputs(query, key, key), **wanted)
    found = [(kernel.direction, kernel.name, dict(kernel.settings), kernel.passed_over) for kernel in said.kernels]
    assert found == [(each, x.variant.name, dict(x.settings), x.passed_over) for each, x in choices.items()]
    if gluon_gap() is None:
        assert said.kernels[0].name.startswith("sm90") == (card.capability == (9, 0))


def test_its_docstring_asks_for_another_device() -> None:
    said = list[Explanation]()
    lines = [line.strip() for line in (explain.__doc__ or "").splitlines() if line.startswith(" " * 8)][:2]
    exec("\n".join(lines), {"explain": explain, "print": said.append, "torch": torch})
    assert all(f'"{name}"' in (explain.__doc__ or "") for name in CARDS)
    if gluon_gap() is None:
        assert said[0].kernels[0].name == "sm90 small window, rolling"


def test_another_device_has_a_name_that_is_known() -> None:
    q = torch.empty(1, 8, 2, 12, device="meta", dtype=torch.bfloat16)
    with raises_naming("device", "'H800'", *map(repr, CARDS)):
        explain(q, q, q, 3, device="H800")
    assert "head_dim 12" in str(explain(q, q, q, 3, device="H200"))
    assert "asks for it" in str(explain(q, q, q, 3, device="H200", impl="eager"))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("a100", "A100"),
        ("A100-SXM4-80GB", "A100"),
        ("A100 80GB", "A100"),
        ("A100-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("rtx4090", "RTX 4090"),
        ("GeForce RTX 5090", "RTX 5090"),
        ("l40s", "L40S"),
        ("h100 sxm5", "H100"),
        ("H100-80GB", "H100"),
        ("h200", "H200"),
        ("H200 SXM", "H200"),
    ],
)
def test_another_device_is_known_by_each_of_its_names(given: str, name: str) -> None:
    assert card_of(given) is CARDS[name]


def test_cards_have_names_of_their_own() -> None:
    assert all(card_of(name) is card and card_of(card.name) is card for name, card in CARDS.items())


@pytest.mark.parametrize("registers", [None, 40])
def test_videos_whose_frames_are_so_small_that_tiles_reach_into_the_next_one(registers: int | None) -> None:
    def names(videos: int) -> dict[str, str]:
        video = torch.empty(videos, 4999, 2, 8, 16, 64, dtype=torch.bfloat16, device="meta")
        more = None if registers is None else torch.empty(videos, registers, 16, 64, dtype=video.dtype, device="meta")
        said = explain(
            video, video, video, (401, 2, 8), additional_keys=more, additional_values=more, needs_grad=True,
            device="H200",
        )  # fmt: skip
        assert ("chunks of them would reach into the next video" in str(said)) == (videos > 1)
        return {kernel.direction: kernel.name for kernel in said.kernels}

    one, two = names(1), names(2)
    assert set(one.values()) == {"sm90 large window"}
    assert set(two.values()) == {"portable"}


def test_a_choice_of_the_caller_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of_text(monkeypatch)
    assert dispatch.choose("forward", dispatch.Question(problem)).variant.name == "sm90 large window"
    with override({"forward": TileConfig((1, 1, 64), (1, 1, 64), 2, 4, 2)}):
        choice = dispatch.choose("forward", dispatch.Question(problem))
    assert choice.is_portable
    assert choice.passed_over[0].reason == "tuning or an override asks for portable"


@pytest.mark.parametrize("direction", ["forward", "backward_query", "backward_key", "qk_prep + forward"])
def test_portable_kernels_alone_may_be_asked_for(
    direction: dispatch.Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of_projected_image(monkeypatch)
    kind = QKPrepKind("cosine", split=(8, 8), by_head=True, batched=False)
    question = dispatch.Question(problem, grad_out=contiguous(problem.query.shape), prep=kind)
    taken = dispatch.choose(direction, question)
    general = dispatch.VARIANTS[direction][-1]
    assert taken.variant.name in SM90
    with override(portable_only=True):
        choice = dispatch.choose(direction, question)
        assert choice.variant is general
        reasons = {reason for name, reason in choice.passed_over if name != PAIRS}
        assert reasons == {"an override asks for portable kernels alone"}
        assert len(choice.passed_over) == len(dispatch.VARIANTS[direction]) - 1
    assert dispatch.choose(direction, question) == taken


@pytest.mark.parametrize(
    ("make", "changes", "question", "names"),
    [
        (problem_of_text, {}, {"aligned": False}, ["16 bytes"] * 4),
        (problem_of_text, {"dilation": (2,)}, {}, ["dilation is (2,)", "is large"]),
        (problem_of_image, {"is_periodic": (False, True)}, {}, ["is_periodic is (False, True)"] * 2),
        (problem_of_image, {"query": contiguous((8, 64, 64, 8, 64))}, {}, ["another grid"] * 2),
        (problem_of_image, {"key_mask": contiguous((8, 128, 128, 1, 1))}, {}, ["no key_mask"]),
        (problem_of_image, {"has_bias": True, "scale_first": True}, {}, ["no rpb"] * 2),
        (problem_of_packed_texts, {}, {}, ["the window is large"] * 2 + ["no packed batch"]),
        (
            problem_of_packed_texts,
            {"packing": Packing(((128,),) * 256, 1)},
            {},
            ["is large"] * 2 + ["no packed batch", "is small: 128 keys"],
        ),
        (problem_of_packed_texts, {"kernel_size": (128,)}, {}, []),
        (
            problem_of_packed_texts,
            {"kernel_size": (128,), "is_causal": (False,)},
            {},
            ["only if they are causal"] * 2 + ["no packed batch", "the window is small"],
        ),
        (problem_of_packed_images, {}, {}, ["one axis only"]),
        (
            problem_of_packed_images,
            {"stride": (1, 2)},
            {},
            ["one axis only", "without stride", "no packed batch", "one axis only"],
        ),
        (
            problem_of_packed_images,
            {"shapes": ((16, 16),)},
            {},
            ["one axis only", "the call is small", "no packed batch", "one axis only"],
        ),
        (
            problem_of_packed_images,
            {"is_periodic": (False, True)},
            {},
            ["one axis only", "is_periodic is (False, True)", "no packed batch", "one axis only"],
        ),
        (
            problem_of_packed_texts,
            {"is_periodic": (True,), "is_causal": (False,)},
            {},
            ["only if they are causal"] * 2 + ["no packed batch", "is_periodic is (True,)"],
        ),
        (problem_of_text, {"capability": (8, 0)}, {}, ["the device has 8.0"] * 4),
        (problem_of_text, {"kernel_size": (1024,)}, {}, ["the window is large"] * 2),
        (
            problem_of_text,
            {"kernel_size": (64,), **dict.fromkeys(("query", "key", "value"), contiguous((1, 128, 8, 256)))},
            {},
            ["heads of up to 128 channels, not 256"] * 3 + ["the call is small"],
        ),
        (problem_of_image, {}, {}, []),
        (problem_of_image, {"kernel_size": (3, 3)}, {}, ["tiles alone are faster"]),
        (problem_of_image, {"stride": (2, 1)}, {}, ["no tiles"]),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_kernels_that_are_passed_over_have_a_reason(
    make: Any, changes: dict[str, Any], question: dict[str, Any], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem: Problem = make(monkeypatch, **changes)
    choice = dispatch.choose("forward", dispatch.Question(problem, **question))
    reasons = [reason for name, reason in choice.passed_over if not name.endswith(PAIRS)]
    assert len(reasons) == len(names)
    for reason, word in zip(reasons, names, strict=True):
        assert word in reason
