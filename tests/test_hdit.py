"""HDiT against outputs of the original implementation, its configs, its options and its errors."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import error, raises_naming, randomize
from safetensors.torch import load_file
from torch import Tensor, nn

from natten_layers import Denoiser, HDiT, HDiTConfig, LevelConfig
from natten_layers.modules.attention import NeighborhoodGQA
from natten_layers.modules.hdit_config import axis_grid, check_axis
from natten_layers.modules.hdit_layers import ShiftedWindowGQA

GOLDEN = Path(__file__).parent / "data" / "hdit"
CASES = sorted(p.stem for p in GOLDEN.glob("*.safetensors") if ".expected" not in p.name)
CONDITIONS = ("class_cond", "mapping_cond", "aug_cond")
F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_config(**options: Any) -> HDiTConfig:
    fine = LevelConfig(1, 32, d_head=8, kernel_size=3, num_kv_heads=2, num_registers=3, sink="learned", dilation=2)
    coarse = LevelConfig(1, 32, "global", d_head=16, num_kv_heads=1, num_registers=2, sink="zero")
    defaults: dict[str, Any] = {"patch_size": (2, 2), "mapping_width": 16, "mapping_depth": 1, "num_classes": 3}
    return HDiTConfig((fine, coarse), **defaults | options)


# --- the original's outputs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "suffix", "budget"), [(torch.float32, "fp32", 1e-5), (F64, "fp64", 1e-10)])
def test_golden_files(name: str, dtype: torch.dtype, suffix: str, budget: float) -> None:
    expected = load_file(GOLDEN / f"{name}.expected.safetensors")
    model = HDiT.from_pretrained(GOLDEN / f"{name}.safetensors", dtype=dtype)
    inputs = {key: t.to(dtype) if t.is_floating_point() else t for key, t in expected.items()}
    conditions = {key: inputs[key] for key in CONDITIONS if key in inputs}
    with torch.no_grad():
        bare = model(inputs["x"], inputs["sigma"], **conditions)
        denoised = Denoiser(model)(inputs["x"], inputs["sigma"], **conditions)
    assert error(bare, expected[f"model_{suffix}"]) < budget
    assert error(denoised, expected[f"denoised_{suffix}"]) < budget


def test_golden_files_cover_what_they_should() -> None:
    models = [HDiT.from_pretrained(GOLDEN / f"{name}.safetensors") for name in CASES]
    assert {level.attention for model in models for level in model.config.levels} == {
        "neighborhood",
        "global",
        "shifted-window",
        "none",
    }


def dense_shifted_windows(layer: ShiftedWindowGQA, x: Tensor) -> Tensor:
    """Reference: two tokens see each other if they are in the same block of the shifted grid on both axes."""
    height, width = x.shape[1:3]
    blocks = [(torch.arange(n) + layer.shift) // layer.window_size for n in (height, width)]
    block = blocks[0][:, None] * (width + 1) + blocks[1]
    mask = block.flatten()[:, None] == block.flatten()
    assert layer.registers is not None
    tokens = torch.cat([layer.registers.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    q, k, v = layer.qkv(tokens).unflatten(-1, (-1, layer.head_dim)).split([heads, kv_heads, kv_heads], -2)
    k, v = (t.repeat_interleave(heads // kv_heads, -2) for t in (k, v))
    count = len(layer.registers)
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, count:], k) * layer.head_dim**-0.5
    scores = scores.masked_fill(~torch.cat([mask.new_ones(mask.shape[0], count), mask], 1), -torch.inf)
    weights = scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))  # zero attention
    return layer.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2)).view_as(x)


@pytest.mark.parametrize(("window", "shift"), [(4, 0), (4, 2), (3, 1), (2, 1)])
@pytest.mark.parametrize("blocks", [(2, 3), (1, 2)])
def test_shifted_windows(window: int, shift: int, blocks: tuple[int, int]) -> None:
    layer = ShiftedWindowGQA(16, 4, window, shift, num_kv_heads=2, num_registers=3, sink="zero").double()
    x = torch.randn(2, blocks[0] * window, blocks[1] * window, 16, dtype=F64)
    torch.testing.assert_close(layer(x), dense_shifted_windows(layer, x))


# --- configs

MODEL = {
    "type": "image_transformer_v2",
    "input_channels": 3,
    "input_size": [256, 256],
    "patch_size": [4, 4],
    "depths": [2, 2, 4],
    "widths": [128, 256, 512],
    "loss_config": "karras",
    "loss_weighting": "soft-min-snr",
    "augment_prob": 0.12,
    "sigma_data": 0.5,
    "sigma_min": 1e-2,
    "sigma_max": 160,
    "sigma_sample_density": {"type": "cosine-interpolated"},
}


def test_json_defaults() -> None:
    config = HDiTConfig.from_json({"model": MODEL})
    assert [level.attention for level in config.levels] == ["neighborhood", "neighborhood", "global"]
    assert [level.d_ff for level in config.levels] == [384, 768, 1536]
    assert {(level.d_head, level.kernel_size, level.dropout) for level in config.levels} == {(64, 7, 0.0)}
    assert (config.mapping_width, config.mapping_depth, config.mapping_d_ff) == (256, 2, 768)
    assert (config.num_classes, config.mapping_cond_dim, config.sigma_data, config.sigma_max) == (0, 0, 0.5, 160)
    assert HDiTConfig.from_json({"model": {k: v for k, v in MODEL.items() if k != "sigma_data"}}).sigma_data == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout_rate": 0.05},
        {"dropout_rate": [0.0, 0.0, 0.1], "mapping_dropout_rate": 0.1, "has_variance": True, "skip_stages": 1},
        {"dropout_rate": None, "d_ffs": None, "self_attns": None, "mapping_d_ff": None, "augment_wrapper": False},
        {"self_attns": [{"type": "global"}, {"type": "none"}, {"type": "shifted-window", "window_size": 8}]},
        {"self_attns": [{"type": "global", "num_kv_heads": 1}, {"type": "none"}, {"type": "global", "sink": "zero"}]},
        {
            "self_attns": [
                {"type": "neighborhood", "is_periodic": [False, True]},
                *[{"type": "global", "is_periodic": True}] * 2,
            ]
        },
        {"depths": [8], "widths": [256], "input_channels": 1, "input_size": [28, 28], "mapping_cond_dim": 7},
    ],
)
def test_json_builds_and_returns_whole(changes: dict[str, Any], tmp_path: Path) -> None:
    source = {"model": MODEL | changes, "dataset": {"type": "mnist", "num_classes": 10}, "optimizer": {"lr": 5e-4}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(source))
    config = HDiTConfig.from_json(path)
    with torch.device("meta"):
        model = HDiT(config)
    assert model.class_emb is not None
    assert model.class_emb.num_embeddings == 11
    out = config.to_json()
    assert HDiTConfig.from_json(json.loads(json.dumps(out))) == config
    assert out["optimizer"] == source["optimizer"]
    assert out["dataset"] == source["dataset"]
    kept = ("loss_weighting", "sigma_sample_density", "augment_prob", "has_variance", "skip_stages", "depths", "type")
    for key in kept:
        assert out["model"].get(key) == source["model"].get(key)


def test_json_of_an_original_model_holds_only_original_keys() -> None:
    out = HDiTConfig.from_json({"model": MODEL}).to_json()
    assert out["model"]["self_attns"][0] == {"type": "neighborhood", "d_head": 64, "kernel_size": 7}
    assert out["model"]["self_attns"][2] == {"type": "global", "d_head": 64}


def test_json_of_rings() -> None:
    levels = [
        {"type": "neighborhood", "is_periodic": [False, True]},
        {"type": "neighborhood", "is_periodic": True},
        {"type": "global", "is_periodic": [False, False]},
    ]
    config = HDiTConfig.from_json({"model": MODEL | {"self_attns": levels}})
    assert [level.is_periodic for level in config.levels] == [(False, True), True, (False, False)]
    assert [level.wraps("height") for level in config.levels] == [False, True, False]
    assert [level.wraps("width") for level in config.levels] == [True, True, False]
    out = config.to_json()["model"]["self_attns"]
    assert [entry["is_periodic"] for entry in out] == [[False, True], True, [False, False]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "image_v1"}, r"\[\"type\"\] must be \"image_transformer_v2\", got 'image_v1'"),
        ({"self_attns": [{"type": "axial"}] * 3}, r"self_attns\"\]\[0\]: attention must be one of .* got 'axial'"),
        ({"self_attns": [{"type": "global", "heads": 2}] * 3}, r"unknown keys 'heads' .*; known are"),
        ({"self_attns": [{"type": "global"}] * 2}, r"\"self_attns\"\] has 2 entries, but \"widths\" has 3"),
        ({"self_attns": [{"type": "shifted-window"}] * 3}, "needs window_size"),
        ({"widths": None}, r'"widths"\] must be a list, each entry an int of at least 1, got None'),
        ({"widths": [100, 256, 512]}, "width 100 is not a multiple of d_head 64"),
        ({"self_attns": [{"type": "neighborhood", "kernel_size": 7.5}] * 3}, "kernel_size must be an int .* got 7.5"),
        ({"depths": [2, -1, 4]}, r'"depths"\]\[1\] must be an int of at least 0, got -1'),
        ({"patch_size": [4]}, r'"patch_size"\] must be an int of at least 1 or a list of 2, .* got \[4\]'),
        ({"mapping_width": 0}, r'"mapping_width"\] must be an int of at least 2, got 0'),
        ({"self_attns": [{"type": "global", "dilation": 2}] * 3}, "dilation 2 applies to neighborhood attention"),
        (
            {"self_attns": [{"type": "global", "is_periodic": [True]}] * 3},
            "is_periodic.* must be true or false or a list",
        ),
        (
            {"self_attns": [{"type": "shifted-window", "window_size": 4, "is_periodic": True}] * 3},
            "is_periodic True applies to neighborhood and global attention, not to shifted-window",
        ),
    ],
)
def test_json_errors(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"model": MODEL | changes}))
    with pytest.raises(ValueError, match=message) as error:
        HDiTConfig.from_json(path)
    assert str(path) in str(error.value)


# --- the model


def test_a_new_model_is_zero_and_every_parameter_learns() -> None:
    model = HDiT(small_config(mapping_cond_dim=4))
    x, sigma = torch.randn(2, 3, 24, 16), torch.tensor([0.1, 3.0])
    conditions = {"class_cond": torch.tensor([0, 3]), "mapping_cond": torch.randn(2, 4), "aug_cond": torch.randn(2, 9)}
    assert (model(x, sigma, **conditions) == 0).all()
    randomize(model)
    model(x, sigma, **conditions).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_levels_hold_the_options_asked_for() -> None:
    model = HDiT(small_config())
    layers = [m for m in model.modules() if isinstance(m, NeighborhoodGQA)]
    assert [(m.num_heads, m.num_kv_heads, m.kernel_size, m.dilation) for m in layers] == [
        (4, 2, 3, 2),
        (2, 1, None, 1),
        (4, 2, 3, 2),
    ]
    assert [m.registers.shape[0] for m in layers if m.registers is not None] == [3, 2, 3]


def ring_config(is_periodic: bool | tuple[bool, bool], **options: Any) -> HDiTConfig:
    fine = LevelConfig(2, 32, d_head=16, kernel_size=3, dilation=2, is_periodic=is_periodic)
    coarse = LevelConfig(1, 32, d_head=16, kernel_size=3, sink="zero", is_periodic=is_periodic)
    middle = LevelConfig(1, 32, "global", d_head=16, is_periodic=is_periodic)
    defaults: dict[str, Any] = {"patch_size": (1, 2), "input_size": (24, 96), "mapping_width": 16, "mapping_depth": 1}
    return HDiTConfig((fine, coarse, middle), **defaults | options)


@pytest.mark.parametrize("is_periodic", [False, True, (False, True), (True, False)])
@pytest.mark.parametrize("packed", [False, True])
def test_an_image_that_is_rolled_around_a_ring_is_denoised_alike(
    is_periodic: bool | tuple[bool, bool], packed: bool
) -> None:
    """By whole tokens of the coarsest level, which are 4 x 8 pixels; around an axis that is no ring, it is not."""
    config = ring_config(is_periodic)
    model = randomize(HDiT(config)).double().eval()
    x, sigma = torch.randn(1, 3, 24, 96, dtype=F64), torch.tensor([0.5], dtype=F64)

    def denoise(x: Tensor) -> Tensor:
        if not packed:
            return model(x, sigma)
        return model(x[0].flatten(1).T, sigma, shapes=[(24, 96)]).T.unflatten(1, (24, 96))[None]

    for axis, pixels, rolls in ((2, 4, config.levels[0].wraps("height")), (3, 8, config.levels[0].wraps("width"))):
        difference = (denoise(x.roll(pixels, axis)) - denoise(x).roll(pixels, axis)).abs().max()
        assert difference < 1e-4 if rolls else difference > 1  # whole turns are rounded to fp32


def test_rings_come_back_from_files(tmp_path: Path) -> None:
    model = randomize(HDiT(ring_config((False, True))))
    model.save_pretrained(tmp_path)
    loaded = HDiT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    x, sigma = torch.randn(1, 3, 24, 96), torch.tensor([0.5])
    torch.testing.assert_close(loaded(x, sigma), model.eval()(x, sigma), rtol=1e-4, atol=1e-4)
    layers = [m for m in loaded.modules() if isinstance(m, NeighborhoodGQA)]
    assert [m.is_periodic for m in layers] == [(False, True)] * 3 + [False] + [(False, True)] * 3


def test_images_that_rings_do_not_fit() -> None:
    model, sigma = HDiT(ring_config((False, True))), torch.tensor([0.5])
    model(torch.randn(1, 3, 48, 192), sigma)
    model(torch.randn(1, 3, 24, 192), sigma)  # the width is the long side still
    with raises_naming("width", "48x48", "1 long", "ring of 2", "input_size 24x96"):
        model(torch.randn(1, 3, 48, 48), sigma)
    model = HDiT(ring_config(True))
    with raises_naming("height", "24x192", "0.5 long", "ring of 1", "input_size 24x96"):
        model(torch.randn(1, 3, 24, 192), sigma)
    odd = dataclasses.replace(ring_config(True).levels[0], dilation=3, kernel_size=2)
    assert axis_grid("width", 2, [odd]) == (6, 12)
    assert axis_grid("width", 2, [dataclasses.replace(odd, is_periodic=(True, False))]) == (2, 12)
    with raises_naming("image width 32 has 16 tokens on level 0, a ring that dilation 3 does not divide", "30 or 36"):
        check_axis("width", 32, 2, [odd])


def test_shift_alternates_over_the_layers_of_a_level() -> None:
    fine = LevelConfig(3, 16, "shifted-window", d_head=8, window_size=4)
    model = HDiT(HDiTConfig((fine, LevelConfig(2, 16, "shifted-window", d_head=8, window_size=2)), mapping_width=8))
    shifts = [m.shift for m in model.modules() if isinstance(m, ShiftedWindowGQA)]
    assert shifts == [0, 2, 0, 0, 1, 2, 0, 2]  # down, middle, up: layers 3, 4, 5 of the fine level


def test_any_resolution_that_fits() -> None:
    model = HDiT(small_config(num_classes=0))
    randomize(model)
    for size in ((24, 24), (12, 40)):
        out = model(torch.randn(1, 3, *size), torch.ones(1))
        assert out.shape == (1, 3, *size)
        assert out.std() > 0


def test_patches_and_positions_keep_their_places() -> None:
    """Without attention on any level, a pixel affects only its own patch of the coarsest level."""
    levels = (LevelConfig(1, 16, "none"), LevelConfig(1, 16, "none"))
    model = HDiT(HDiTConfig(levels, patch_size=(2, 3), mapping_width=8)).double()
    randomize(model)
    x = torch.randn(1, 3, 8, 12, dtype=F64)
    changed = x.clone()
    changed[0, 0, 5, 7] += 1
    difference = (model(changed, torch.ones(1)) - model(x, torch.ones(1))).abs().amax((0, 1)) > 0
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[4:8, 6:12] = True
    assert torch.equal(difference, expected)


def test_dropout_only_in_training() -> None:
    levels = (LevelConfig(1, 16, "global", d_head=8, dropout=0.5),)
    model = HDiT(HDiTConfig(levels, mapping_width=8, mapping_dropout_rate=0.5))
    randomize(model)
    x, sigma = torch.randn(1, 3, 8, 8), torch.ones(1)
    assert not torch.equal(model(x, sigma), model(x, sigma))
    model.eval()
    assert torch.equal(model(x, sigma), model(x, sigma))
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.5 for m in model.modules()) == 4


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    plain = HDiT(small_config(num_classes=0))
    randomize(plain)
    recomputing = HDiT(plain.config, checkpointing=True)
    recomputing.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 24, 24)
    for model in (plain, recomputing):
        model(x, torch.ones(1)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def round_results_of_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Register hooks that round every layer's result to ``dtype``; everything else keeps the model's wider dtype."""

    def rounded(_module: nn.Module, _args: Any, result: Any) -> Any:
        return result.to(dtype).to(result.dtype) if isinstance(result, Tensor) else result

    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(rounded)


@pytest.mark.parametrize(
    ("dtype", "autocast"), list(itertools.product((torch.bfloat16, torch.float16), (False, True))), ids=str
)
@torch.no_grad()
def test_half_precision_is_as_exact_as_its_roundings_allow(dtype: torch.dtype, autocast: bool) -> None:
    """The error may be twice that of fp64 with rounded layer results, which is far below that of a missing sink."""
    model = HDiT(small_config())
    randomize(model)
    for layer in model.modules():
        if isinstance(layer, NeighborhoodGQA) and isinstance(layer.sink, Tensor):
            layer.sink.add_(3)
    x, sigma, classes = torch.randn(2, 3, 24, 24).to(dtype), torch.tensor([0.02, 70.0]), torch.tensor([0, 1])
    model.to(dtype)  # all later models hold the same numbers

    def in_fp64(change: Callable[[nn.Module], None] = lambda _: None) -> Tensor:
        wide = copy.deepcopy(model).double()
        change(wide)
        return wide(x.double(), sigma.double(), class_cond=classes)

    def lose_sinks(wide: nn.Module) -> None:
        for layer in wide.modules():
            if isinstance(layer, NeighborhoodGQA) and isinstance(layer.sink, Tensor):
                layer.register_parameter("sink", None)

    expected = in_fp64()
    budget = 2 * error(in_fp64(lambda wide: round_results_of_layers(wide, dtype)), expected)
    assert 4 * budget < error(in_fp64(lose_sinks), expected)
    if autocast:
        with torch.autocast("cpu", dtype):
            actual = model.float()(x.float(), sigma, class_cond=classes)
    else:
        actual = model(x, sigma, class_cond=classes)
        assert actual.dtype == dtype
    assert error(actual, expected) < budget


def test_parameter_groups() -> None:
    model = HDiT(small_config(mapping_cond_dim=4))
    groups = model.param_groups(3e-4, 1e-2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert by_name.keys() == set(names.values())
    assert sum(len(g["params"]) for g in groups) == len(by_name)
    attention, slow = "down_levels.0.0.self_attn.", 3e-4 * (1 / 3)
    assert by_name[attention + "attn.qkv.weight"] == (3e-4, 1e-2)
    assert by_name["merges.0.proj.weight"] == by_name["patch_out.proj.weight"] == (3e-4, 1e-2)
    for name in ("attn.qk_scale", "attn.registers", "attn.sink"):
        assert by_name[attention + name] == (3e-4, 0.0)
    embeddings = ("time_in_proj.weight", "aug_in_proj.weight", "class_emb.weight", "mapping_cond_in_proj.weight")
    assert {by_name[name] for name in (*embeddings, "splits.0.fac", "out_norm.weight")} == {(3e-4, 0.0)}
    assert by_name[attention + "norm.linear.weight"] == by_name["mapping.blocks.0.mlp.up_proj.weight"] == (slow, 1e-2)
    assert by_name["mapping.in_norm.weight"] == (slow, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "level 1: num_heads must be a multiple of num_kv_heads, got 2 and 3"),
        ({"d_head": 4, "num_kv_heads": 4}, r"level 1: head_dim must be at least 4 \* axes = 8, got 4"),
    ],
)
def test_level_errors(options: dict[str, Any], message: str) -> None:
    changed: dict[str, Any] = {"d_head": 8} | options
    levels = (LevelConfig(1, 16, "global", d_head=8), LevelConfig(1, 16, "global", **changed))
    with pytest.raises(ValueError, match=message):
        HDiT(HDiTConfig(levels, mapping_width=8))


X = torch.randn(1, 3, 24, 24)
ONE = torch.ones(1)
C0 = {"class_cond": torch.tensor([0])}


@pytest.mark.parametrize(
    ("x", "sigma", "conditions", "message"),
    [
        (X[0], ONE, C0, r"x has shape \(3, 24, 24\); expected \[B, 3, height, width\]"),
        (X, torch.ones(2), C0, r"sigma has shape \(2,\); expected \[1\]"),
        (X[..., :22], ONE, C0, "image width 22 is not a multiple of 4, .* level 1; use 20 or 24"),
        (X[..., :8, :], ONE, C0, r"height 8 has 4 tokens on level 0, .* 3 \* 2; use at least 12 pixels"),
        (X, ONE, {}, "needs class_cond"),
        (X, ONE, {"class_cond": torch.tensor([4])}, r"class_cond holds \[4\]; classes are 0 to 2, and 3 is uncond"),
        (X, ONE, {"class_cond": torch.tensor([-1])}, r"class_cond holds \[-1\]"),
        (X, ONE, {"class_cond": torch.tensor([0, 1])}, r"class_cond has shape \(2,\); expected \[1\]"),
        (
            X,
            ONE,
            C0 | {"mapping_cond": torch.ones(1, 4)},
            "has no use for mapping_cond, as its config has mapping_cond_dim=0",
        ),
        (X, ONE, C0 | {"aug_cond": torch.ones(1, 4)}, r"aug_cond has shape \(1, 4\); expected \[1, 9\]"),
    ],
)
def test_input_errors(x: Tensor, sigma: Tensor, conditions: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HDiT(small_config())(x, sigma, **conditions)


def test_window_size_error() -> None:
    model = HDiT(HDiTConfig((LevelConfig(1, 16, "shifted-window", d_head=8, window_size=4),), mapping_width=8))
    with pytest.raises(ValueError, match=r"height 24 has 6 tokens on level 0, not a multiple of window_size 4; .* 16 "):
        model(torch.randn(1, 3, 24, 16), ONE)


# --- packed images


def packed_config() -> HDiTConfig:
    """Every kind of level that is computed on packed images, and patches that are not square."""
    options: dict[str, Any] = {"d_head": 8, "num_kv_heads": 2}
    levels = (
        LevelConfig(2, 32, kernel_size=3, num_registers=3, sink="learned", **options),
        LevelConfig(1, 16, kernel_size=2, dilation=1, **options),
        LevelConfig(1, 24, "none"),
        LevelConfig(1, 16, "global", sink="zero", **options),
    )
    return HDiTConfig(levels, patch_size=(1, 2), mapping_width=16, mapping_depth=1, num_classes=3)


def packed(images: list[Tensor]) -> Tensor:
    """``[C, H, W]`` each to pixels ``[N, C]``."""
    return torch.cat([image.flatten(1).T for image in images])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_packed_images_are_computed_as_if_each_were_alone(as_tensor: bool, checkpointing: bool) -> None:
    """Losses, denoised images and all gradients, with conditions of each image's own."""
    shapes = [(8 * h, 8 * w) for h, w in ((2, 2), (3, 2), (2, 2), (2, 4))]
    model = HDiT(packed_config(), checkpointing=checkpointing).double()
    randomize(model)
    denoiser = Denoiser(model)
    images, noise = ([torch.randn(3, *shape, dtype=F64) for shape in shapes] for _ in range(2))
    sigma, classes = torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=F64), torch.tensor([0, 3, 1, 2])
    aug, weights = torch.randn(4, 9, dtype=F64), torch.randn(4, dtype=F64)

    alone = [
        denoiser.loss(image[None], own[None], sigma[i : i + 1], class_cond=classes[i : i + 1], aug_cond=aug[i : i + 1])
        for i, (image, own) in enumerate(zip(images, noise, strict=True))
    ]
    expected = torch.cat(alone)
    gradients = torch.autograd.grad(expected @ weights, list(model.parameters()))
    conditions: dict[str, Any] = {"class_cond": classes, "aug_cond": aug}
    conditions["shapes"] = torch.tensor(shapes) if as_tensor else shapes
    losses = denoiser.loss(packed(images), packed(noise), sigma, **conditions)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(losses @ weights, list(model.parameters()))
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    denoised = denoiser(packed(images), sigma, **conditions)
    last = denoiser(images[-1][None], sigma[-1:], class_cond=classes[-1:], aug_cond=aug[-1:])
    torch.testing.assert_close(denoised[-16 * 32 :], packed([last[0]]), rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
def test_packed_images_on_a_gpu() -> None:
    """Fused kernels in fp32, forward and gradients, against each image alone."""
    shapes = [(64, 96), (128, 64), (64, 64)]
    model = HDiT(packed_config()).cuda()
    randomize(model)
    images = [torch.randn(3, *shape, device="cuda") for shape in shapes]
    sigma, classes = torch.tensor([0.1, 1.0, 9.0], device="cuda"), torch.tensor([0, 3, 1], device="cuda")
    alone = [model(image[None], sigma[i : i + 1], class_cond=classes[i : i + 1])[0] for i, image in enumerate(images)]
    expected, out = packed(alone), model(packed(images), sigma, class_cond=classes, shapes=shapes)
    weights = torch.randn_like(out)
    found, wanted = (torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (out, expected))
    assert error(out, expected) < 1e-5
    assert max(error(one, other) for one, other in zip(found, wanted, strict=True) if other.norm() > 0) < 1e-4


def test_packed_images_take_no_nan_from_others() -> None:
    shapes = [(16, 16), (16, 32)]
    model = HDiT(packed_config()).eval()
    randomize(model)
    x = torch.randn(sum(h * w for h, w in shapes), 3)
    x[:256] = torch.nan
    out = model(x, torch.ones(2), class_cond=torch.tensor([0, 1]), shapes=shapes)
    assert out[:256].isnan().any()
    assert out[256:].isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        (
            [(16, 16), (16, 16)],
            {},
            r"shapes must be heights and widths of 768 pixels in all, .* \[\[16, 16\], \[16, 16\]\]",
        ),
        ([(768,)], {}, "shapes must be heights and widths of 768 pixels"),
        ([(12, 32), (24, 16)], {}, "image height 12 is not a multiple of 8, the pixels of a token of level 3"),
        ([(16, 48)], {}, r"sigma has shape \(2,\); expected \[1\], one per image"),
        ([(16, 16), (16, 32)], {"x": torch.zeros(2, 3, 16, 16)}, r"expected \[pixels, 3\] beside shapes"),
        ([(16, 16), (16, 32)], {"class_cond": torch.zeros(3).long()}, r"class_cond has shape \(3,\); expected \[2\]"),
    ],
)
def test_packed_images_that_do_not_fit(shapes: Any, changes: dict[str, Tensor], message: str) -> None:
    inputs = {"x": torch.zeros(768, 3), "sigma": torch.ones(2), "class_cond": torch.zeros(2).long()} | changes
    with pytest.raises(ValueError, match=message):
        HDiT(packed_config())(**inputs, shapes=shapes)


@pytest.mark.parametrize(
    ("pixels", "shapes"), [(255, [(16, 16)]), (512, [(16, 16)] * 2), ((1, 3, 16, 16), [(16, 16)])], ids=str
)
def test_a_denoiser_checks_packed_images_first(pixels: Any, shapes: Any) -> None:
    x = torch.zeros(pixels, 3) if isinstance(pixels, int) else torch.zeros(pixels)
    denoiser = Denoiser(HDiT(packed_config()))
    with pytest.raises(ValueError, match="shapes must be those of the 1 images of sigma"):
        denoiser(x, ONE, shapes=shapes, class_cond=torch.zeros(1).long())


def test_noise_has_the_shape_of_images() -> None:
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 1, 1\), but x has"):
        Denoiser(HDiT(packed_config())).loss(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 1, 1), ONE)


def test_no_packed_images() -> None:
    denoiser = Denoiser(HDiT(packed_config()))
    x, sigma, classes = torch.zeros(0, 3), torch.zeros(0), torch.zeros(0).long()
    assert denoiser(x, sigma, shapes=[], class_cond=classes).shape == (0, 3)
    assert denoiser.loss(x, x, sigma, shapes=torch.zeros(0, 2).long(), class_cond=classes).shape == (0,)


def test_shifted_windows_of_packed_images_are_refused() -> None:
    model = HDiT(HDiTConfig((LevelConfig(1, 16, "shifted-window", d_head=8, window_size=4),), mapping_width=8))
    with pytest.raises(ValueError, match="shifted windows are not computed on packed samples"):
        model(torch.zeros(256, 3), ONE, shapes=[(16, 16)])


# --- Denoiser


class Scale(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [
        ("karras", lambda s: torch.ones_like(s)),
        ("snr", lambda s: 0.25 / (s**2 + 0.25)),
        ("soft-min-snr", lambda s: (s / 2) ** 2 / (s**2 + 0.25) ** 2),
    ],
)
def test_loss_is_the_weighted_error_of_the_denoised_image(weighting: Any, weight: Any) -> None:
    denoiser = Denoiser(Scale(), sigma_data=0.5, weighting=weighting)
    x, noise, sigma = torch.randn(2, 3, 4, 4, dtype=F64), torch.randn(2, 3, 4, 4, dtype=F64), torch.tensor([0.1, 9.0])
    sigma = sigma.double()
    noised = x + noise * sigma.view(-1, 1, 1, 1)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    error = (denoiser(noised, sigma) - x).square().mean((1, 2, 3)) / c_out**2
    torch.testing.assert_close(denoiser.loss(x, noise, sigma), error * weight(sigma))


def test_compiling_a_denoiser_compiles_its_loss_too() -> None:
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append("network")
        return graph

    denoiser = Denoiser(Scale(), sigma_data=0.5)
    x, noise, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.1, 9.0])
    expected = denoiser.loss(x, noise, sigma), denoiser(x, sigma)
    denoiser.compile(backend=backend)
    torch.testing.assert_close(denoiser.loss(x, noise, sigma), expected[0])
    assert compiled == ["network"]
    torch.testing.assert_close(denoiser(x, sigma), expected[1])
    assert compiled == ["network"]


def test_denoiser_limits() -> None:
    x = torch.randn(1, 3, 4, 4, dtype=F64)
    clean = Denoiser(Scale(), sigma_data=0.5)(x, torch.tensor([1e-9], dtype=F64))
    torch.testing.assert_close(clean, x)
    with pytest.raises(ValueError, match="Scale has no config with a sigma_data"):
        Denoiser(Scale())
    with pytest.raises(ValueError, match="weighting must be"):
        Denoiser(Scale(), sigma_data=1.0, weighting="min-snr")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"widths": 16}, '"widths"'),
        ("model", {"widths": []}, '"widths"'),
        ("model", {"depths": 2}, '"depths"'),
        ("model", {"self_attns": [None, None]}, '"self_attns"'),
        ("model", {"self_attns": ["neighborhood", "global"]}, '"self_attns"'),
        ("model", {"dropout_rate": [0.1, None]}, "dropout"),
        ("model", {"mapping_dropout_rate": "x"}, "mapping_dropout_rate"),
        ("model", {"input_size": 16.0}, "input_size"),
        ("model", {"sigma_data": 0}, "sigma_data"),
        ("model", {"sigma_max": None}, "sigma_max"),
        (None, {"dataset": None}, '"dataset"'),
    ],
)
def test_values_of_other_types_name_their_key(section: str | None, change: dict[str, Any], message: str) -> None:
    model = {"type": "image_transformer_v2", "widths": [64, 64], "depths": [1, 1], "patch_size": 2, "input_size": 16}
    config: dict[str, Any] = {"model": {**model, "input_channels": 3}}
    HDiTConfig.from_json(config)
    if section is None:
        config |= change
    else:
        config[section] |= change
    with pytest.raises(ValueError, match=re.escape(message)):
        HDiTConfig.from_json(config)


def test_noise_levels_of_a_config_are_in_order() -> None:
    with pytest.raises(ValueError, match=r"sigma_min is 100.0, but must be less than sigma_max, 80.0"):
        HDiTConfig((LevelConfig(1, 16, "global", d_head=8),), sigma_min=100.0)


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"type": "neighborhood", "d_head": 16, "window_size": 5}, "window_size"),
        ({"type": "global", "d_head": 16, "kernel_size": 7}, "kernel_size"),
        ({"type": "none", "num_kv_heads": 5}, "num_kv_heads"),
    ],
)
def test_keys_that_this_type_of_attention_does_not_read(entry: dict[str, Any], key: str) -> None:
    model = {"type": "image_transformer_v2", "input_channels": 3, "input_size": 32, "patch_size": 4}
    model |= {"widths": [32], "depths": [1], "self_attns": [entry]}
    with pytest.raises(ValueError, match=rf"self_attns.*\[0\].*{key}"):
        HDiTConfig.from_json({"model": model})
