"""Tuning of tiles: the search, its file, and the use of its results by calls. Kernels run as in test_fused.py."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import pytest
import torch
from helpers import Case, error, make_inputs, oracle
from torch import Tensor

from natten_layers import explain, neighborhood_attention, tune
from natten_layers.kernels.host import tuned
from natten_layers.kernels.host.problem import contiguous, device_traits
from natten_layers.kernels.host.qk_prep import QKPrepKind
from natten_layers.kernels.host.tiling import Kind, ProblemClass, TileConfig, rule
from natten_layers.kernels.host.variant import Question
from natten_layers_cli import tune as command
from natten_layers_cli.presets import PRESETS

pytest.importorskip("triton")

from problems import problem_of_image, problem_of_projected_image, problem_of_text

from natten_layers.kernels import dispatch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []

PROBLEM = ProblemClass("some GPU", 227 * 1024, (1, 64, 64), (1, 7, 7), 4, 64, 64, 2)
SMALL = Case("small", (9, 11), 3, heads=4, kv_heads=2, head_dim=16, value_dim=16)
TINY = Case("tiny", (4, 5), 3, heads=1, kv_heads=1, head_dim=16, value_dim=16, batch=1)
TINY_FLAGS = f"4x5 --kernel-size 3 --heads 1 --head-dim 16 --dtype fp32 --device {DEVICE}".split()
FLAGS = f"9x11 --kernel-size 3 --heads 4 --kv-heads 2 --head-dim 16 --dtype fp32 --device {DEVICE}".split()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NATTEN_LAYERS_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    yield tuned.cache_file()
    tuned.forget()


@pytest.mark.parametrize("kind", ["forward", "backward_query", "backward_key"])
@pytest.mark.parametrize("group", [1, 4])
def test_neighbors_differ_in_one_respect(kind: Kind, group: int) -> None:
    problem = PROBLEM._replace(group=group)
    origin = rule(kind, problem)
    near = list(tune.neighbors(kind, problem, origin))
    assert len(near) > 10
    assert origin not in near
    assert any(config.pack != origin.pack for config in near) == (kind != "backward_key")
    for config in near:
        changed = {name for name, value in vars(config).items() if value != getattr(origin, name)}
        assert len(changed - {"tile", "chunk", "pack"}) == (0 if changed & {"tile", "chunk", "pack"} else 1)
        rows, keys = math.prod(config.tile) * config.pack, math.prod(config.chunk)
        assert all(16 <= n <= 256 and n & (n - 1) == 0 for n in (rows, keys))


def test_the_search_walks_downhill_and_ends() -> None:
    def seconds(config: TileConfig) -> float:
        return 1 + abs(math.log2(config.num_warps)) + (config.maxnreg is not None) + abs(config.stages - 1)

    steps = list(tune.search("forward", PROBLEM, seconds, trials=1000))
    best = steps[-1]
    assert (best.config.num_warps, best.config.maxnreg, best.config.stages, best.seconds) == (1, None, 1, 1)
    assert best.rule_seconds == seconds(rule("forward", PROBLEM))
    assert best.gains
    assert len(list(tune.search("forward", PROBLEM, seconds, trials=5))) == 6
    flat = list(tune.search("forward", PROBLEM, lambda config: 1.0, trials=1000))
    assert flat[-1].config == rule("forward", PROBLEM)
    assert not flat[-1].gains


def test_noise_and_tiles_that_do_not_run_are_no_gain() -> None:
    rules = rule("forward", PROBLEM)
    for others in (0.99, math.inf):
        found = list(tune.search("forward", PROBLEM, lambda x, t=others: 1.0 if x == rules else t, trials=100))
        assert found[-1].config == rules


def test_a_wrong_result_has_no_time() -> None:
    inputs = make_inputs(SMALL, DEVICE)
    tensors = [t.detach() for t in inputs.values()]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wrong = "forward" in tuned._overrides[-1].configs
        return neighborhood_attention(q, k, v, 3, impl="fused") * (1.001 if wrong else 1.0)

    timed: list[object] = []
    measure = tune._measure("forward", attend, (*tensors, tensors[0]), lambda run: float(bool(timed.append(run))))
    assert measure({"forward": TileConfig((1, 1, 16), (1, 1, 16), 2, 4, 1)}) == math.inf
    assert not timed


def first_neighbor_wins(kind: Kind) -> Callable[[Callable[[], object]], float]:
    """A stub for timing, according to which one configuration of ``kind`` is faster than all others."""
    seen: list[TileConfig] = []

    def timer(run: Callable[[], object]) -> float:
        config = tuned._overrides[-1].configs.get(kind)
        if config is not None:
            seen.append(config)
        return 0.5 if config is not None and config == seen[min(1, len(seen) - 1)] and len(seen) > 1 else 1.0

    return timer


def test_calls_use_what_was_found(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--trials", "3", "--kernels", "forward"]
    assert command.main(flags, timer=first_neighbor_wins("forward")) == 0
    printed = capsys.readouterr().out
    assert "forward: 2.00x with tile" in printed
    assert f"written to {cache}" in printed
    traits = device_traits(torch.empty(0, device=DEVICE).device)
    problem = ProblemClass(*traits, (1, 9, 11), (1, 3, 3), 2, 16, 16, 4)
    by_rule = rule("forward", problem)
    found = tuned.tile_config_for("forward", problem)
    assert found == next(tune.neighbors("forward", problem, by_rule))
    assert tuned.tile_config_for("backward_key", problem) == rule("backward_key", problem)
    assert tuned.tile_config_for("forward", problem._replace(device="other")) == by_rule

    asked: list[tuple[Kind, ProblemClass]] = []
    tile_config_for = tuned.tile_config_for
    with pytest.MonkeyPatch.context() as patch:
        from natten_layers.kernels.portable import forward

        patch.setattr(forward, "tile_config_for", lambda *key: asked.append(key) or tile_config_for(*key))
        inputs = make_inputs(SMALL, DEVICE)
        q, k, v = (inputs[name] for name in ("query", "key", "value"))
        out = neighborhood_attention(q, k, v, 3, impl="fused")
    assert asked == [("forward", problem)]
    assert error(out, oracle(SMALL, inputs).out) < 2e-6


def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants that are expected not to pay, with the portable kernels' launches, for calls without registers."""
    changes: dict[str, Any] = {
        "name": "made up",
        "pays": lambda question: "the next is expected to be faster",
        "supports": lambda question: "it takes no additional keys" if question.problem.registers else None,
    }
    for direction in get_args(Kind):
        (*others, general) = dispatch.VARIANTS[direction]
        monkeypatch.setitem(dispatch.VARIANTS, direction, (*others, replace(general, **changes), general))  # pyright: ignore[reportArgumentType]
    tuned.forget()


def prefers(name: str) -> Callable[[Callable[[], object]], float]:
    """A stub for timing, according to which a pass is twice as fast if all its kernels are variants of this name."""

    def timer(run: Callable[[], object]) -> float:
        asked = tuned._overrides[-1].variants
        return 0.5 if set(asked.values()) == {name} else 1.0

    return timer


def kernels_of(registers: int = 0) -> dict[str, str]:
    """The name of each kernel that computes the tiny case."""
    inputs = make_inputs(TINY, DEVICE)
    q, k, v = (inputs[name] for name in ("query", "key", "value"))
    extra = torch.zeros(q.shape[0], registers, *k.shape[-2:], device=DEVICE) if registers else None
    said = explain(q, k, v, 3, additional_keys=extra, additional_values=extra, needs_grad=True, impl="fused")
    return {kernel.direction: kernel.name for kernel in said.kernels}


def test_the_fastest_variants_are_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(monkeypatch)
    assert set(kernels_of().values()) == {"portable"}
    assert command.main([*TINY_FLAGS, "--trials", "1"], timer=prefers("made up")) == 0
    printed = capsys.readouterr().out
    assert "forward: 2.00x with made up" in printed
    assert "backward_query: 2.00x with made up" in printed
    assert "backward_key: 2.00x with made up" in printed
    found = tuned.read_tuned(cache)
    assert {kind: name for (kind, _), name in found.variants.items()} == dict.fromkeys(command.TRAINED, "made up")
    assert not found.configs  # nothing to search, where portable kernels are not the fastest
    assert set(kernels_of().values()) == {"made up"}
    assert set(kernels_of(registers=2).values()) == {"portable"}  # which the other one cannot compute
    inputs = make_inputs(TINY, DEVICE)
    q, k, v = (inputs[name] for name in ("query", "key", "value"))
    assert error(neighborhood_attention(q, k, v, 3, impl="fused"), oracle(TINY, inputs).out) < 2e-6

    # What is tuned later replaces it, also for tiles of the portable kernel that stand beside it in the file.
    assert command.main([*TINY_FLAGS, "--kernels", "forward", "--trials", "1"], timer=prefers("portable")) == 0
    assert kernels_of() == dict.fromkeys(command.TRAINED, "made up") | {"forward": "portable"}
    monkeypatch.undo()
    monkeypatch.setenv("NATTEN_LAYERS_CACHE", str(cache.parent))
    tuned.forget()
    assert set(kernels_of().values()) == {"portable"}  # a variant that this version does not have


def test_the_fastest_variant_of_forward_mode_is_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(monkeypatch)
    launched: list[str] = []
    (*others, wanted, general) = dispatch.VARIANTS["jvp"]

    def run(*args: Any) -> Any:
        launched.append(wanted.name)
        return wanted.run(*args)

    variants = (*others, replace(wanted, run=run), general)
    monkeypatch.setitem(dispatch.VARIANTS, "jvp", variants)  # pyright: ignore[reportArgumentType]
    assert command.main([*TINY_FLAGS, "--kernels", "jvp", "--trials", "1"], timer=prefers("made up")) == 0
    assert "jvp: 2.00x with made up" in capsys.readouterr().out
    assert {kind: name for (kind, _), name in tuned.read_tuned(cache).variants.items()} == {"jvp": "made up"}
    launched.clear()
    inputs = make_inputs(TINY, DEVICE)
    qkv = tuple(inputs[name] for name in ("query", "key", "value"))
    torch.func.jvp(lambda q, k, v: neighborhood_attention(q, k, v, 3, impl="fused"), qkv, qkv)
    assert launched == ["made up"]


def test_a_variant_with_wrong_results_is_not_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch)
    (*_, wrong, general) = dispatch.VARIANTS["forward"]

    def run(*args: Any) -> Any:
        out, *statistics = general.run(*args)
        return (out * 1.001, *statistics)

    monkeypatch.setitem(dispatch.VARIANTS, "forward", (replace(wrong, run=run), general))  # pyright: ignore[reportArgumentType]
    assert command.main([*TINY_FLAGS, "--kernels", "forward", "--trials", "1"], timer=prefers("made up")) == 0
    assert not tuned.read_tuned(cache).variants


def test_variants_that_can_compute_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """First comes what calls take, then the others in the order in which they are considered."""
    large, tiles, medium = "sm90 large window", "sm90 small window", "sm90 medium window"
    pytest.importorskip("triton.experimental.gluon")
    text, image = problem_of_text(monkeypatch), problem_of_image(monkeypatch)
    assert tune.rivals("forward", Question(image)) == [f"{tiles}, rolling", tiles, medium, large, "portable"]
    first: dict[Kind, list[str]] = {"backward_query": [tiles, medium], "backward_key": [medium, tiles]}
    for kind, chosen_first in first.items():
        assert tune.rivals(kind, Question(image, True, image.query)) == [*chosen_first, large, "portable"]
        assert tune.rivals(kind, Question(text, True, text.query)) == [large, medium, "portable"]
    moving = *(contiguous(x.shape) for x in (image.query, image.key, image.value)), None, None
    assert tune.rivals("jvp", Question(image, True, tangents=moving)) == [medium, "portable"]
    for query, key in product(tune.rivals("backward_query", Question(image, True, image.query)), repeat=2):
        with tuned.override(variants={"backward_query": query, "backward_key": key}):
            chosen = dispatch.choose_backward(Question(image, True, image.query))
        assert (chosen.query.variant.name, chosen.key.variant.name) == (query, key)


def test_tuned_variants_decide_in_a_prologue_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    problem = problem_of_projected_image(monkeypatch)
    prep = QKPrepKind("cosine", split=(8, 8), by_head=True, batched=False)
    last = dispatch.VARIANTS["qk_prep + forward"][-1].name
    for name, expected in (("portable", last), ("sm90 small window, rolling", "sm90 small window, rolling")):
        with tuned.override(variants={"forward": name}):
            choice = dispatch.choose("qk_prep + forward", Question(problem, prep=prep))
        assert choice.variant.name == expected


def test_files_of_old_have_tiles_alone(cache: Path) -> None:
    tuned.write_tuned(cache, {("forward", PROBLEM): TileConfig((1, 4, 4), (1, 4, 8), 4, 2, 1)})
    content = json.loads(cache.read_text())
    del content["variants"]
    cache.write_text(json.dumps(content))
    tuned.forget()
    assert tuned.variant_for("forward", PROBLEM) == "portable"
    assert tuned.variant_for("backward_key", PROBLEM) is None


def test_an_override_remembers_what_was_chosen_under_it() -> None:
    """Choosing anew in every call would cost the host more than a small kernel takes the device."""
    asked: list[int] = []

    @tuned.remembered
    def square(n: int) -> int:
        asked.append(n)
        return n * n

    for _ in range(2):
        with tuned.override(pack=1):
            assert [square(3), square(3), square(4)] == [9, 9, 16]
    assert asked == [3, 4] * 2
    assert square(3) == 9
    assert len(asked) == 5


def test_the_file_keeps_other_problems(cache: Path) -> None:
    config = TileConfig((1, 4, 4), (1, 4, 8), 4, 2, 1)
    others = {("forward", PROBLEM): config}
    tuned.write_tuned(cache, others)  # pyright: ignore[reportArgumentType]
    better = TileConfig((1, 4, 4), (1, 4, 8), 4, 4, 2, 96, True)
    tuned.write_tuned(cache, {("backward_query", PROBLEM): better})
    assert tuned.read_tuned(cache).configs == {**others, ("backward_query", PROBLEM): better}
    assert tuned.tile_config_for("forward", PROBLEM) == config
    with tuned.override(pack=1):
        assert tuned.tile_config_for("forward", PROBLEM).pack == 1


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a tile of three": lambda entry: entry["config"].update(tile=[1, 3, 4]),
    "a tile of text": lambda entry: entry["config"].update(tile="124"),
    "two sides": lambda entry: entry["config"].update(tile=[4, 4]),
    "a huge pack": lambda entry: entry["config"].update(pack=4096),
    "stages of text": lambda entry: entry["config"].update(stages="x"),
    "stages true": lambda entry: entry["config"].update(stages=True),
    "registers of text": lambda entry: entry["config"].update(maxnreg="96"),
    "a mask of text": lambda entry: entry["config"].update(skip_mask="no"),
    "an unknown option": lambda entry: entry["config"].update(cluster=2),
    "no pack": lambda entry: entry["config"].pop("pack"),
    "tiles that are a list": lambda entry: entry.update(config=[1]),
    "no tiles": lambda entry: entry.pop("config"),
    "a problem that is null": lambda entry: entry.update(problem=None),
    "lengths of text": lambda entry: entry["problem"].update(lengths=["1", 2, 3]),
    "nested lengths": lambda entry: entry["problem"].update(lengths=[[1], 2, 3]),
    "an unknown kernel": lambda entry: entry.update(kind="sideways"),
    "a kernel that is a list": lambda entry: entry.update(kind=["forward"]),
}
TEXTS = [
    "{", "[]", "null", '{"format": 3, "configs": []}', '{"format": 2}', '{"format": 2, "configs": {}}',
    '{"format": 2, "configs": [7]}', "[" * 10**5, f'{{"format": {"9" * 5000}}}', "\udcff",
    '{"format": 2, "configs": [], "variants": {}}', '{"format": 2, "configs": [], "variants": [7]}',
    '{"format": 2, "configs": [], "variants": [{"kind": "forward", "problem": {}, "variant": "portable"}]}',
]  # fmt: skip


@pytest.mark.parametrize("damage", [*DAMAGE, *TEXTS], ids=lambda text: text[:30])
def test_a_damaged_file_is_named_and_kept(cache: Path, damage: str) -> None:
    tuned.write_tuned(cache, {("forward", PROBLEM): TileConfig((1, 4, 4), (1, 4, 8), 4, 2, 1)})
    if damage in DAMAGE:
        content = json.loads(cache.read_text())
        DAMAGE[damage](content["configs"][0])
        damage = json.dumps(content)
    cache.write_bytes(damage.encode(errors="surrogateescape"))
    tuned._tuned.cache_clear()
    with pytest.warns(UserWarning, match=r"configs\.json is damaged"):
        assert tuned.tile_config_for("forward", PROBLEM) == rule("forward", PROBLEM)
    with pytest.raises(ValueError, match="delete it"):
        tuned.write_tuned(cache, {})
    assert cache.read_bytes() == damage.encode(errors="surrogateescape")


def test_ctrl_c_keeps_what_was_found(cache: Path) -> None:
    clock = first_neighbor_wins("forward")
    calls = iter(range(100))

    def timer(run: Callable[[], object]) -> float:
        if next(calls) == 4:  # two variants, the tiles of the rule, and a neighbor come first
            raise KeyboardInterrupt
        return clock(run)

    assert command.main([*FLAGS, "--kernels", "forward"], timer=timer) == 130
    assert len(tuned.read_tuned(cache).configs) == 1


def test_what_has_no_kernels_is_refused_in_the_commands_own_words(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY_FLAGS, "--head-dim", "12"]
    assert command.main(flags, timer=lambda run: pytest.fail("a search began")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there are no kernels to tune for 4x5 tokens")
    assert "12" in error
    assert "impl" not in error
    assert not cache.exists()
    for device in ("gpu", "meta"):
        with pytest.raises(SystemExit):
            command.main([*TINY_FLAGS, "--device", device])
        assert f"--device {device}: " in capsys.readouterr().err


def test_a_damaged_file_ends_the_command_before_the_search(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("{")
    assert command.main(FLAGS, timer=lambda run: pytest.fail("a search began")) == 2
    error = capsys.readouterr().err
    assert "delete it and tune again" in error
    assert error.count(str(cache)) == 1
    assert cache.read_text() == "{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--kernel-size", "12"], "exceeds the height axis"),
        (["--kv-heads", "3"], "multiple of KV heads"),
        (["--head-dim", "12"], "not a multiple of 8"),
    ],
)
def test_bad_flags(change: list[str], message: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*FLAGS, *change]) == 2
    assert message in capsys.readouterr().err
    assert not cache.exists()


@pytest.mark.parametrize("flag", ["--kernel-size", "--dilation"])
def test_flags_have_one_value_or_one_for_each_axis(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["64", *FLAGS[1:], flag, "3x3"])
    assert f"{flag} 3x3 has another number of axes than tokens, 64" in capsys.readouterr().err


HDIT = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [64, 96],
        "patch_size": [4, 4],
        "depths": [1, 1, 1],
        "widths": [32, 64, 64],
        "self_attns": [
            {"type": "neighborhood", "d_head": 16, "kernel_size": 5},
            {"type": "neighborhood", "d_head": 16, "kernel_size": 3, "num_kv_heads": 2},
            {"type": "global", "d_head": 32},
        ],
    }
}
MISTRAL = {
    "model_type": "mistral", "vocab_size": 16, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def as_file(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_calls_of_models(tmp_path: Path) -> None:
    hdit = as_file(tmp_path, HDIT)
    levels = [
        command.Call((16, 24), (5, 5), (1, 1), False, 2, 2, 16),
        command.Call((8, 12), (3, 3), (1, 1), False, 4, 2, 16),
    ]
    assert command.calls_of_model(hdit, None) == levels
    assert [call.tokens for call in command.calls_of_model(hdit, (32, 32))] == [(8, 8), (4, 4)]
    fine, *others = HDIT["model"]["self_attns"]
    panorama = HDIT["model"] | {"self_attns": [fine | {"is_periodic": [False, True]}, *others]}
    ring, line = command.calls_of_model(as_file(tmp_path, {"model": panorama}), None)
    assert (ring, line) == (dataclasses.replace(levels[0], is_periodic=(False, True)), levels[1])
    assert str(ring).startswith("16x24 tokens, window 5x5, periodic width, 2 heads")
    decoder = as_file(tmp_path, MISTRAL)
    windows = command.Call((32,), (8,), (1,), True, 4, 2, 8)  # four windows long
    assert command.calls_of_model(tmp_path, None) == command.calls_of_model(decoder, None) == [windows]
    assert command.calls_of_model(tmp_path, (48,)) == [command.Call((48,), (8,), (1,), True, 4, 2, 8)]


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (HDIT, ["9"], "a height and a width"),
        (
            HDIT,
            ["40x64"],
            "a multiple of 16, the pixels of a token of level 2; use 32 or 48 pixels",
        ),
        (HDIT, ["16x16"], "image height 16 has 4 tokens on level 0, fewer than kernel_size * dilation = 5 * 1"),
        (MISTRAL, ["9x9"], "one length"),
        (MISTRAL, ["8"], "no layer of the model has windows, or none smaller than 8"),
        (MISTRAL | {"sliding_window": None}, [], "no layer of the model has windows, or none smaller than the images"),
        ({"model_type": "mistral"}, [], "config.json"),
    ],
)
def test_models_that_cannot_be_tuned(
    config: dict[str, Any], flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--model", str(as_file(tmp_path, config)), "--device", DEVICE]
    assert command.main(flags) == 2
    assert message in capsys.readouterr().err


def test_a_directory_is_one_of_hugging_faces(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HDIT))
    with pytest.raises(ValueError, match="with model_type, as Hugging Face"):
        command.calls_of_model(tmp_path, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--model", "m", "--heads", "4", "--causal"], "--causal, --heads"), (["9x9", "--heads", "4"], "or --model")],
)
def test_flags_say_one_call_or_a_model(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(flags)
    assert message in capsys.readouterr().err


def test_a_preset_is_a_model_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless a file has that name."""
    for name, path in PRESETS.items():
        assert command.calls_of_model(Path(name), None) == command.calls_of_model(path, None)
    monkeypatch.chdir(tmp_path)
    as_file(tmp_path, HDIT).rename("gpu-demo")
    assert [call.tokens for call in command.calls_of_model(Path("gpu-demo"), None)] == [(16, 24), (8, 12)]
    assert command.main(["--model", "tpu-demo", "--device", DEVICE]) == 2
    error = capsys.readouterr().err
    assert error == f"error: --model tpu-demo is no file, no directory and no preset: {', '.join(PRESETS)}\n"
    assert ", gpu-demo, " in error


def test_each_call_of_a_model_is_tuned(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["16x24", "--model", str(as_file(tmp_path, HDIT | {"model": HDIT["model"] | {"patch_size": [2, 2]}}))]
    flags += ["--trials", "1", "--kernels", "forward", "--dtype", "fp32", "--device", DEVICE]
    assert command.main(flags, timer=first_neighbor_wins("forward")) == 0
    printed = capsys.readouterr().out
    assert "8x12 tokens, window 5x5, 2 heads of 16:" in printed
    assert "4x6 tokens, window 3x3, 4 heads over 2 of 16:" in printed
    assert "forward: 2.00x" in printed
    assert cache.exists()


def test_results_are_yielded_after_every_trial() -> None:
    found = islice(tune.search("forward", PROBLEM, lambda config: 1.0 / config.num_warps, trials=1), 2)
    assert [one.seconds for one in found] == [1 / 4, 1 / 8]


def test_overrides_hold_in_all_threads() -> None:
    """Autograd computes gradients on a GPU in a thread of its own."""
    found: list[bool] = []
    with tuned.override(portable_only=True):
        thread = Thread(target=lambda: found.append(tuned.is_portable_only()))
        thread.start()
        thread.join()
    assert found == [True]
    assert not tuned.is_portable_only()


@pytest.mark.parametrize("pack", [0, -2])
def test_an_override_asks_for_a_number_of_heads(pack: int) -> None:
    with (
        pytest.raises(ValueError, match=f"pack must be a number of heads, one or more, got {pack}"),
        tuned.override(pack=pack),
    ):
        pass


def test_an_override_that_ends_first_leaves_the_later_one() -> None:
    """Two threads may end theirs in any order, and two overrides may ask for the same."""
    first, second = tuned.override(pack=2), tuned.override(pack=2)
    first.__enter__()
    second.__enter__()
    inner = tuned._overrides[-1]
    first.__exit__(None, None, None)
    assert tuned._overrides[-1] is inner
    second.__exit__(None, None, None)
    assert tuned._overrides == [tuned.NO_OVERRIDES]


def test_ctrl_c_between_two_calls_does_not_say_that_nothing_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_tune_call", interrupted)
    assert command.main(TINY_FLAGS, timer=prefers("made up")) == 130
    assert capsys.readouterr().err == "interrupted; results that were written before are kept\n"
