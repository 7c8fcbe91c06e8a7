"""The layers against explicit formulas in fp64, their options, their gradients and their errors."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomize
from torch import Tensor, nn
from torch.nn import functional as F

import natten_layers
from natten_layers import (
    Cache,
    DecoderLM,
    DecoderLMConfig,
    Denoiser,
    HDiT,
    HDiTConfig,
    LevelConfig,
    NeighborhoodGQA,
    neighborhood_attention,
)
from natten_layers.arguments import Call
from natten_layers.geometry import make_window, window_mask
from natten_layers.modules import (
    GEGLU,
    AdaRMSNorm,
    AxialRoPE,
    GatedFeedForward,
    MixtureOfExperts,
    RMSNorm,
    RoPE,
    attention,
    make_axial_pos,
)
from natten_layers.modules.natten import NeighborhoodAttention2D
from natten_layers.modules.rope import Rotary, rotate_half_split, rotate_interleaved

F64 = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- norms and feed-forward


def test_rms_norms() -> None:
    x, cond = randn(2, 3, 4, 8), randn(2, 5)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    plain, centred, ada = RMSNorm(8).double(), RMSNorm(8, zero_centered=True).double(), AdaRMSNorm(8, 5).double()
    for norm, args in ((plain, ()), (centred, ()), (ada, (cond,))):
        torch.testing.assert_close(norm(x, *args), normed, rtol=1e-12, atol=0)
        randomize(norm)
    torch.testing.assert_close(plain(x), normed * plain.weight)
    torch.testing.assert_close(centred(x), normed * (1 + centred.weight))
    torch.testing.assert_close(ada(x, cond), normed * (1 + cond @ ada.linear.weight.T)[:, None, None])
    assert isinstance(plain, nn.RMSNorm)


def test_norm_statistics_are_fp32() -> None:
    x = torch.full((2, 64), 300.0, dtype=torch.float16)  # its square overflows fp16
    torch.testing.assert_close(RMSNorm(64, dtype=torch.float16)(x), torch.ones_like(x))


def test_geglu() -> None:
    layer, x = GEGLU(6, 10).double(), randn(2, 6)
    up, down = layer.up_proj.weight, layer.down_proj.weight
    torch.testing.assert_close(layer(x), (x @ up[:10].T * F.gelu(x @ up[10:].T)) @ down.T)


@pytest.mark.parametrize("normalize", [False, True])
def test_mixture_of_experts(normalize: bool) -> None:
    make = lambda: GatedFeedForward(8, 6, activation="clamped_swiglu", bias=True, swiglu_limit=0.4)  # noqa: E731
    layer = MixtureOfExperts(make, 5, 2, 8, normalize=normalize, bias=True).double()
    randomize(layer)
    with torch.no_grad():
        layer.router.bias[3] = -100.0  # an expert that no token chooses
    x = randn(2, 7, 8)
    scores = layer.router(x)
    weights, chosen = scores.softmax(-1).topk(2)
    expected = torch.zeros_like(x)
    for b, i, k in torch.cartesian_prod(torch.arange(2), torch.arange(7), torch.arange(2)).tolist():
        expert: Any = layer.experts[int(chosen[b, i, k])]
        gate, up = expert.gate_proj(x[b, i]).clamp(max=0.4), expert.up_proj(x[b, i]).clamp(-0.4, 0.4)
        out = expert.down_proj((up + 1) * gate / (1 + torch.exp(-1.702 * gate)))
        expected[b, i] += out * (weights[b, i, k] / (weights[b, i].sum() if normalize else 1))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    layer(x).sum().backward()
    unused = [parameter.grad for parameter in layer.experts[3].parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in unused)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        assert layer(x[:0]).shape == (0, 7, 8)


# --- rotary embeddings


def test_rotation_pairs_are_half_split() -> None:
    x, angle = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    y = rotate_half_split(x, angle.cos(), angle.sin())
    pairs = torch.view_as_real(torch.complex(x[:2], x[2:4]) * torch.polar(torch.ones(2, dtype=F64), angle))
    torch.testing.assert_close(y, torch.tensor([*pairs[:, 0], *pairs[:, 1], 5.0], dtype=F64))


def test_interleaved_pairs_are_complex_numbers() -> None:
    x, angle = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    y = rotate_interleaved(x, angle.cos(), angle.sin())
    turned = torch.view_as_complex(x[:4].view(2, 2)) * torch.polar(torch.ones(2, dtype=F64), angle)
    torch.testing.assert_close(y, torch.cat([torch.view_as_real(turned).flatten(), x[4:]]))


@pytest.mark.parametrize("rope", [lambda **kw: RoPE(8, **kw), lambda **kw: AxialRoPE(24, 2, axes=1, **kw)])
def test_interleaved_modules_are_half_split_ones_of_sorted_elements(rope: Callable[..., Rotary]) -> None:
    x, positions = randn(2, 5, 2, 24), torch.arange(5.0)
    half_split, interleaved = rope(), rope(interleaved=True)
    positions = positions if isinstance(half_split, RoPE) else positions[:, None]
    turning = 8 if isinstance(half_split, RoPE) else 12
    order = torch.cat([torch.arange(0, turning, 2), torch.arange(1, turning, 2), torch.arange(turning, 24)])
    expected, _ = half_split(x[..., order], x, positions)
    actual, _ = interleaved(x, x, positions)
    torch.testing.assert_close(actual[..., order], expected, rtol=0, atol=0)
    assert "interleaved=True" in repr(interleaved)


def test_axes_may_have_unequal_parts() -> None:
    freqs, x, positions = randn(1, 6), randn(1, 3, 4, 2, 16), randn(3, 4, 2)
    rope = AxialRoPE(16, 2, axes=2, freqs=freqs, split=(2, 4))
    theta = torch.cat([positions[..., :1] * freqs[0, :2], positions[..., 1:] * freqs[0, 2:]], -1)[..., None, :]
    torch.testing.assert_close(rope(x, x, positions)[1], rotate_half_split(x, theta.cos(), theta.sin()))


def test_axial_scores_depend_on_the_distance_along_a_ring() -> None:
    """Degrees of longitude: positions a whole turn apart turn alike, and near by across the seam is near."""
    rope = AxialRoPE(16, 2, axes=2, freqs=randn(1, 4) / 10, periods=(None, 360)).double()
    q, k, pos = randn(1, 3, 4, 2, 16), randn(1, 3, 4, 2, 16), randn(3, 4, 2) * 50
    turned = rope(q, k, pos + torch.tensor([0.0, 360.0]))
    for actual, expected in zip(turned, rope(q, k, pos), strict=True):
        torch.testing.assert_close(actual, expected)
    assert not torch.allclose(rope(q, k, pos + torch.tensor([360.0, 0.0]))[0], turned[0])
    turns = rope.freqs[:, 4:] * 360 / (2 * torch.pi)
    torch.testing.assert_close(turns, turns.round())
    assert (turns.abs() >= 1).all()
    assert "periods=(None, 360)" in repr(rope)


def test_rounding_to_whole_turns_keeps_what_is_whole_already() -> None:
    plain, rounded = AxialRoPE(32, 4, num_kv_heads=2), AxialRoPE(32, 4, num_kv_heads=2, periods=(None, 2.0))
    assert rounded.split == (4, 4)
    torch.testing.assert_close(rounded.freqs[:, :4], plain.freqs, rtol=0, atol=0)
    assert rounded.freqs[0, 4].item() == pytest.approx(torch.pi, rel=1e-6)  # the lowest turns once over an image
    assert ((rounded.freqs[:, 4:] - plain.freqs).abs() <= torch.pi / 2 + 1e-5).all()
    split = AxialRoPE(16, 2, axes=2, freqs=torch.tensor([[0.0, 1.0, 2.0]]), split=(1, 2), periods=(2.0, None))
    assert split.freqs.tolist() == [[0.0, 1.0, 2.0]]  # no turn is a whole number of turns
    assert AxialRoPE(16, 2, periods=(None, None)).split == ()


def test_axial_positions() -> None:
    pos = make_axial_pos(2, 4, dtype=F64)
    torch.testing.assert_close(pos[:, 0, 0], torch.tensor([-0.25, 0.25], dtype=F64))
    torch.testing.assert_close(pos[0, :, 1], torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=F64))
    torch.testing.assert_close(make_axial_pos(4, 2, dtype=F64), pos.flip(-1).transpose(0, 1))


def test_axial_rope_frequencies_and_angles() -> None:
    heads, dim, per_axis = 3, 16, 2
    rope = AxialRoPE(dim, heads).double()
    q, k, pos = randn(1, 2, 4, heads, dim), randn(1, 2, 4, heads, dim), make_axial_pos(2, 4, dtype=F64)
    every = torch.pi * 10.0 ** (torch.arange(heads * per_axis, dtype=F64) / (heads * per_axis))
    # Made in fp32: the last bits differ between processors.
    torch.testing.assert_close(rope.freqs, every.view(per_axis, heads).T, rtol=1e-6, atol=0)
    for out, x in zip(rope(q, k), (q, k), strict=True):
        for h, freqs in enumerate(rope.freqs):
            theta = torch.cat([pos[..., :1] * freqs, pos[..., 1:] * freqs], -1)
            a, b, rest = x[0, :, :, h].split([4, 4, 8], -1)
            expected = torch.cat([a * theta.cos() - b * theta.sin(), b * theta.cos() + a * theta.sin(), rest], -1)
            torch.testing.assert_close(out[0, :, :, h], expected, rtol=1e-12, atol=1e-12)


def test_axial_rope_groups_turn_with_their_first_query_head() -> None:
    full, grouped = AxialRoPE(16, 4), AxialRoPE(16, 4, num_kv_heads=2)
    torch.testing.assert_close(grouped.freqs, full.freqs[::2], rtol=0, atol=0)
    q = torch.randn(1, 3, 3, 4, 16)
    k = torch.randn(1, 3, 3, 2, 16)
    repeated = AxialRoPE(16, 4, freqs=full.freqs[::2].repeat_interleave(2, 0))
    expected_q, expected_k = repeated(q, k.repeat_interleave(2, -2))
    actual_q, actual_k = grouped(q, k)
    assert torch.equal(actual_q, expected_q)
    assert torch.equal(actual_k, expected_k[..., ::2, :])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_axial_scores_depend_on_differences_of_position(axes: int) -> None:
    rope = AxialRoPE(24, 2, axes=axes).double()
    spatial = (2,) * axes
    q, k, pos = randn(1, *spatial, 2, 24), randn(1, *spatial, 2, 24), randn(*spatial, axes)
    near, far = rope(q, k, pos), rope(q, k, pos[None] + 3.0)
    scores = [torch.einsum("bqhd,bkhd->bhqk", *(t.flatten(1, -3) for t in pair)) for pair in (near, far)]
    torch.testing.assert_close(*scores)
    assert not torch.allclose(near[0], far[0])


def test_rope_angles() -> None:
    rope, x = RoPE(8, theta=100.0), randn(2, 5, 1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 1000, 1001]])
    angle = positions[..., None, None] * 100.0 ** (-torch.arange(0, 8, 2, dtype=F64) / 8)
    out, _ = rope(x, x, positions)
    torch.testing.assert_close(out, rotate_half_split(x, angle.cos(), angle.sin()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rope(x, x)[0][0], out[0])
    torch.testing.assert_close(out[..., 8:], x[..., 8:], rtol=0, atol=0)


def test_rope_linear_and_yarn_scaling() -> None:
    plain = RoPE(64)
    assert torch.equal(RoPE(64, scaling={"type": "linear", "factor": 4.0}).freqs, plain.freqs / 4)
    scaling = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    yarn = RoPE(64, theta=150000.0, scaling=scaling)
    assert yarn.attention_factor == pytest.approx(1.3466, abs=1e-4)
    base = RoPE(64, theta=150000.0).freqs
    assert torch.equal(yarn.freqs[:5], base[:5])
    torch.testing.assert_close(yarn.freqs[-8:], base[-8:] / 32)
    x = torch.randn(1, 3, 1, 64)
    torch.testing.assert_close(yarn(x, x)[0][:, 0], x[:, 0] * yarn.attention_factor)


def test_rope_llama3_scaling() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, scaled = RoPE(128, theta=500000.0).freqs, RoPE(128, theta=500000.0, scaling=scaling).freqs
    turns = 8192 * plain / (2 * torch.pi)  # in the original text
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    assert torch.equal(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize("rope", [AxialRoPE(16, 2), RoPE(16)])
def test_frequencies_survive_half_precision(rope: AxialRoPE | RoPE) -> None:
    cast = copy.deepcopy(rope)
    nn.Sequential(cast).to(torch.bfloat16)
    assert torch.equal(cast.freqs, rope.freqs)
    assert cast.freqs.dtype == torch.float32
    assert cast.double().freqs.dtype == F64
    blank = copy.deepcopy(rope).to("meta").to_empty(device="cpu")
    blank.reset_parameters()
    assert torch.equal(blank.freqs, rope.freqs)


def scaled_rope(theta: float = 1e4, **scaling: Any) -> RoPE:
    """A RoPE that every ``rope_type`` can be made with, but for what ``scaling`` replaces."""
    sizes = {"factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "mscale_all_dim": 1.0}
    return RoPE(8, theta=theta, scaling={**sizes, **factors, **scaling})


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn", "longrope", "dynamic"])
def test_scaled_frequencies_are_positive(rope_type: str) -> None:
    for absent in ({}, {"beta_fast": None, "beta_slow": 0, "mscale": None}):
        rope = scaled_rope(rope_type=rope_type, **absent)
        assert rope.freqs.isfinite().all()
        assert (rope.freqs > 0).all()


@pytest.mark.parametrize("norm", [RMSNorm, partial(AdaRMSNorm, cond_dim=4)])
@pytest.mark.parametrize("eps", [None, "a", math.nan, -1.0])
def test_norms_check_eps(norm: Callable[..., nn.Module], eps: Any) -> None:
    with pytest.raises(ValueError, match=f"eps must be a finite number of at least 0, got {eps!r}"):
        norm(8, eps=eps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoPE(7), "head_dim .* 7"),
        (lambda: RoPE(8, scaling={"rope_type": "longrope"}), 'longrope.*needs the key "factor"'),
        (lambda: RoPE(8, scaling={"rope_type": "ntk"}), "ntk.*not implemented"),
        (lambda: RoPE(8, scaling={"rope_type": "linear"}), 'linear.*needs the key "factor"'),
        (lambda: RoPE(8, scaling=5), "scaling must be None or a dictionary, got 5"),  # type: ignore[arg-type]
        *(
            (partial(scaled_rope, **options), f'"{key}" .*"{kind}" must be a positive finite number, got {shown}')
            for kind, key, value, shown in (
                ("linear", "factor", 0.0, "0.0"),
                ("linear", "factor", math.nan, "nan"),
                ("linear", "factor", [2], r"\[2\]"),
                ("dynamic", "factor", -3, "-3"),
                ("llama3", "factor", 0, "0"),
                ("llama3", "low_freq_factor", 0, "0"),
                ("yarn", "factor", "a", "'a'"),
                ("yarn", "original_max_position_embeddings", 0, "0"),
                ("yarn", "beta_fast", -1, "-1"),
                ("yarn", "beta_slow", [], r"\[\]"),
                ("yarn", "attention_factor", math.inf, "inf"),
                ("yarn", "mscale", "2", "'2'"),
                ("longrope", "factor", True, "True"),
            )
            for options in ({"rope_type": kind, key: value},)
        ),
        (
            lambda: scaled_rope(rope_type="longrope", original_max_position_embeddings=1),
            "of 2 or more, got 1",
        ),
        (
            lambda: scaled_rope(rope_type="longrope", short_factor=1.0),
            'needs 4 positive numbers "short_factor", got 1.0',
        ),
        (lambda: scaled_rope(rope_type="longrope", long_factor=[1, 2, 0, 1]), 'needs 4 positive numbers "long_factor"'),
        (
            lambda: scaled_rope(rope_type="longrope", attention_factor=1.0, original_max_position_embeddings="a"),
            "\"original_max_position_embeddings\" .* got 'a'",
        ),
        (
            lambda: scaled_rope(rope_type="llama3", high_freq_factor=1.0),
            'more than "low_freq_factor", got 1 and',
        ),
        (lambda: make_axial_pos(True, 4), "got True and 4"),
        (lambda: scaled_rope(theta=1.0, rope_type="yarn"), "needs another theta than 1"),
        (lambda: AxialRoPE(7, 2), "head_dim must be at least 4 \\* axes = 8, got 7"),
        (lambda: AxialRoPE(8, 3, num_kv_heads=2), "multiple of num_kv_heads, got 3 and 2"),
        (lambda: AxialRoPE(8, 2, freqs=torch.ones(3, 1)), r"freqs has shape \(3, 1\); expected \[2 or 1, n\]"),
        (lambda: AxialRoPE(8, 2, freqs=torch.ones(1, 3)), "rotate 6 pairs; a head of 8 elements has 1 to 4"),
        (lambda: AxialRoPE(8, 2, freqs=torch.ones(1, 3), split=(1, 3)), r"split=\(1, 3\) .* add up to 3"),
        (lambda: AxialRoPE(8, 2, freqs=torch.ones(1, 3), split=(1, 1, 1)), r"split=\(1, 1, 1\) must be 2 numbers"),
        (lambda: AxialRoPE(8, 2, freqs=torch.ones(1, 3), split=3), "split=3 must be 2 numbers"),  # type: ignore[arg-type]
        (lambda: AxialRoPE(8, 2, freqs=torch.ones(1, 3), split=("a", "b")), "split=.* must be 2 numbers"),  # type: ignore[arg-type]
        (lambda: AxialRoPE(8, 2, split=2), "split=2 .* give freqs too"),  # type: ignore[arg-type]
        (lambda: AxialRoPE(8, 2, freqs=torch.full((1, 2), math.nan)), "freqs must be real and finite"),
        (lambda: AxialRoPE(8, 2, freqs=torch.ones(1, 2) * 1j), "freqs must be real and finite"),
        (lambda: make_axial_pos(4, 4, dtype=torch.float16), "dtype must be .*, got torch.float16"),
        (lambda: make_axial_pos(4, 4, dtype="float32"), "dtype must be .*, got 'float32'"),  # type: ignore[arg-type]
        (lambda: RoPE(8)(randn(1, 4, 2, 8), randn(1, 4, 2, 8), torch.ones(4).bool()), "positions are torch.bool: give"),
        (lambda: RoPE(8)(randn(1, 4, 2, 8), randn(1, 4, 2, 8), torch.arange(4) * 1j), "positions are torch.complex64"),
        (lambda: AxialRoPE(16, 2, periods=(1.0,)), r"periods=\(1.0,\) must be 2 entries"),
        (lambda: AxialRoPE(16, 2, periods=(None, -1.0)), r"periods=\(None, -1.0\) .* above 0 or None"),
        (lambda: AxialRoPE(8, 2, split=(1, 1)), r"split=\(1, 1\) .* give freqs too"),
        (
            lambda: AxialRoPE(8, 2)(randn(1, 4, 2, 8), randn(1, 4, 2, 8)),
            r"given, of shape \(4, 2\): .* spatial axes \(4,\) and axes=2",
        ),
        (lambda: AxialRoPE(8, 2)(randn(1, 4, 4, 4, 8), randn(1, 4, 4, 4, 8)), "made for 2 and 2 of 8"),
        (lambda: AxialRoPE(8, 2)(randn(1, 4, 4, 2, 8), randn(1, 4, 4, 2, 8), randn(4, 3, 2)), "positions has shape"),
        (lambda: RoPE(8)(randn(1, 4, 2, 8), randn(1, 4, 2, 8), torch.arange(3)), r"positions has shape \(3,\)"),
        (lambda: RoPE(8)(randn(1, 4, 4, 2, 8), randn(1, 4, 4, 2, 8)), "one spatial axis: AxialRoPE rotates by coord"),
    ],
)
def test_rope_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- NeighborhoodGQA


def reference(
    layer: NeighborhoodGQA, x: Tensor, positions: Tensor | None, registers: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Reference for tokens and registers: a dense mask, one softmax and explicitly repeated heads."""
    batch, spatial = x.shape[0], x.shape[1:-1]
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    group = heads // kv_heads

    def project(tokens: Tensor) -> list[Tensor]:
        q, k, v = layer.qkv(tokens).unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], -2)
        k, v = k.repeat_interleave(group, -2), v.repeat_interleave(group, -2)
        if layer.qk_scale is not None:
            root = layer.qk_scale.sqrt()[:, None]
            q, k = (t * root * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
        if layer.q_norm is not None and layer.k_norm is not None:
            rms = [(t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k)]
            q, k = q * rms[0] * layer.q_norm.weight, k * rms[1] * layer.k_norm.weight
        return [q, k, v]

    q, k, v = project(x)
    if layer.rope is not None:
        q, k = (layer.rope(t, t[..., ::group, :], positions)[0] for t in (q, k))
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    own = x.new_zeros(0, layer.embed_dim) if layer.registers is None else layer.registers
    stream = x.new_zeros(batch, 0, layer.embed_dim) if registers is None else registers
    extra = project(torch.cat([own.expand(batch, -1, -1), stream], 1))
    q, k, v = (torch.cat(pair, 1) for pair in zip(extra, (q, k, v), strict=True))

    count = extra[0].shape[1]
    kernel = tuple(spatial) if layer.kernel_size is None else layer.kernel_size
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
    window = make_window(spatial, kernel, layer.stride, layer.dilation, layer.is_causal, layer.is_periodic)
    mask[count:, count:] = window_mask(spatial, window)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (dim**-0.5 if layer.scale is None else layer.scale)
    scores = scores.masked_fill(~mask, -torch.inf)
    if layer.sink is not None:
        logit = torch.as_tensor(layer.sink, dtype=F64).expand(heads).view(1, heads, 1, 1)
        scores = torch.cat([scores, logit.expand(*scores.shape[:-1], 1)], -1)
    weight = scores.softmax(-1)[..., : q.shape[1]]
    out = layer.proj(torch.einsum("bhqk,bkhd->bqhd", weight, v).flatten(-2))
    return out[:, count:].reshape(x.shape), out[:, :count]


OPTIONS = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "mqa_head_dim": {"num_kv_heads": 1, "head_dim": 8, "qkv_bias": False, "out_bias": False},
    "window": {"num_kv_heads": 2, "stride": (1, 2), "dilation": (2, 1), "is_causal": (True, False)},
    "ring": {"num_kv_heads": 2, "stride": (1, 2), "is_causal": (True, False), "is_periodic": (False, True)},
    "zero_sink": {"sink": "zero", "scale": 0.3},
    "learned_sink": {"sink": "learned", "num_kv_heads": 2},
    "registers": {"num_registers": 3, "num_kv_heads": 2},
    "attending": {"num_registers": 3, "registers_attend": True, "sink": "learned", "num_kv_heads": 2},
    "cosine": {"qk_norm": "cosine", "num_kv_heads": 2, "rope": True},
    "rms": {"qk_norm": "rms", "num_kv_heads": 2, "rope": True},
    "all": {
        "qk_norm": "cosine",
        "num_kv_heads": 2,
        "rope": True,
        "num_registers": 2,
        "registers_attend": True,
        "sink": "zero",
        "is_causal": (False, True),
    },
    "global": {"kernel_size": None, "num_kv_heads": 2},
}


def make_layer(options: dict) -> NeighborhoodGQA:
    options = {"kernel_size": 3} | options
    if options.pop("rope", False):
        options["rope"] = AxialRoPE(8, 4, num_kv_heads=options.get("num_kv_heads"))
        options["head_dim"] = 8
    layer = NeighborhoodGQA(16, 4, options.pop("kernel_size"), **options).double()
    randomize(layer)
    return layer


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("passed", [0, 2])
def test_gqa_against_the_definition(name: str, passed: int) -> None:
    layer = make_layer(OPTIONS[name])
    x = randn(2, 6, 7, 16).requires_grad_()
    stream = randn(2, passed, 16).requires_grad_() if passed else None
    positions = randn(6, 7, 2) if layer.rope is not None else None
    out = layer(x, positions=positions, registers=stream)
    expected, expected_registers = reference(layer, x, positions, stream)
    inputs = [*layer.parameters(), x] + ([stream] if stream is not None else [])
    if layer.registers_attend:
        torch.testing.assert_close(out[1], expected_registers)
        out, expected = (
            torch.cat([out[0].flatten(1, 2), out[1]], 1),
            torch.cat([expected.flatten(1, 2), expected_registers], 1),
        )
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    actual_grads = torch.autograd.grad(out, inputs, weight)
    for actual, wanted in zip(actual_grads, torch.autograd.grad(expected, inputs, weight), strict=True):
        torch.testing.assert_close(actual, wanted)
        assert actual.abs().max() > 1e-6


@pytest.mark.parametrize("spatial", [(9,), (5, 4), (4, 3, 5)])
def test_gqa_ranks(spatial: tuple[int, ...]) -> None:
    layer = NeighborhoodGQA(8, 2, 3, num_kv_heads=1).double()
    x = randn(2, *spatial, 8)
    expected, _ = reference(layer, x, None, None)
    torch.testing.assert_close(layer(x), expected)


def test_qkv_output_reaches_the_operation_as_views(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = AxialRoPE(8, 4, num_kv_heads=2)
    layer, seen = NeighborhoodGQA(32, 4, 3, num_kv_heads=2, qk_norm="cosine", rope=rope), []
    attend_with_qk_prep = attention.attend_with_qk_prep

    def spy(call: Call, *args: Any) -> Tensor:
        seen.extend((call.inputs.query, call.inputs.key, call.inputs.value))
        return attend_with_qk_prep(call, *args)

    monkeypatch.setattr(attention, "attend_with_qk_prep", spy)
    layer(torch.randn(1, 4, 4, 32))
    assert len({t.untyped_storage().data_ptr() for t in seen}) == 1
    assert [t.shape[-2:] for t in seen] == [(4, 8), (2, 8), (2, 8)]
    assert all(t.stride(2) == layer.qkv.out_features for t in seen)


def test_a_causal_window_longer_than_the_text_sees_the_whole_past() -> None:
    long, exact = NeighborhoodGQA(8, 2, 64, is_causal=True), NeighborhoodGQA(8, 2, 5, is_causal=True)
    exact.load_state_dict(long.state_dict())
    x = torch.randn(1, 5, 8)
    assert torch.equal(long(x), exact(x))
    mixed = NeighborhoodGQA(8, 2, (64, 3), is_causal=(True, False))
    assert mixed(torch.randn(1, 4, 3, 8)).shape == (1, 4, 3, 8)
    with pytest.raises(ValueError, match="width axis of length 4"):
        NeighborhoodGQA(8, 2, 64, is_causal=(True, False))(torch.randn(1, 4, 4, 8))
    with pytest.raises(ValueError, match="exceeds"):
        NeighborhoodGQA(8, 2, 64, is_causal=True, dilation=2)(x)


def test_gqa_survives_copies_and_files() -> None:
    layer = make_layer(OPTIONS["all"])
    x = randn(1, 4, 4, 16)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = make_layer(OPTIONS["all"])
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        for actual, wanted in zip(twin(x), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_gqa_compiles_to_one_graph() -> None:
    layer = make_layer(OPTIONS["all"]).float()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 4, 4, 16, requires_grad=True)
    grads = []
    for function in (layer, compiled):
        tokens, registers = function(x)
        grads.append(torch.autograd.grad(tokens.square().sum() + registers.sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gqa_factory_arguments_and_initial_values() -> None:
    options = {"num_registers": 2, "sink": "learned", "qk_norm": "cosine", "num_kv_heads": 2}
    layer = NeighborhoodGQA(16, 4, 3, device="meta", dtype=torch.bfloat16, **options)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert (layer.qk_scale == 10).all()
    assert isinstance(layer.sink, nn.Parameter)
    assert (layer.sink == 0).all()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert layer(torch.randn(1, 4, 4, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gqa_repr_names_what_was_chosen() -> None:
    assert repr(NeighborhoodGQA(16, 4, 7)).startswith("NeighborhoodGQA(\n  16, 4, kernel_size=7\n")
    text = repr(NeighborhoodGQA(16, 4, 7, num_kv_heads=2, sink="zero", num_registers=3, is_causal=True))
    assert "16, 4, kernel_size=7, num_kv_heads=2, is_causal=True, num_registers=3, sink='zero'" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeighborhoodGQA(16, 4, 3, num_kv_heads=3), "num_heads must be a multiple .* 4 and 3"),
        (lambda: NeighborhoodGQA(16, 0, 3), "num_heads must be an int of at least 1, got 0"),
        (lambda: NeighborhoodGQA(16, 4, 3, num_kv_heads=-2), "num_kv_heads must be an int of at least 1, got -2"),
        (lambda: NeighborhoodGQA(16, 4, 3, head_dim=0), "head_dim must be an int of at least 1, got 0"),
        (lambda: NeighborhoodGQA(16.0, 4, 3), "embed_dim must be an int of at least 1, got 16.0"),  # pyright: ignore
        (lambda: NeighborhoodGQA(16, 4, 0), "kernel_size must be at least 1, got 0"),
        (lambda: NeighborhoodGQA(16, 4, 3.0), "kernel_size must be int .* got 3.0"),  # pyright: ignore
        (lambda: NeighborhoodGQA(16, 4, (3, 3), stride=(1, 4)), "stride .* 1..3, got 4 on the width axis"),
        (lambda: NeighborhoodGQA(16, 4, (3, 3), dilation=(1,)), "must agree on 1 to 3 spatial axes"),
        (lambda: NeighborhoodGQA(16, 4, (3,) * 4), "must agree on 1 to 3 spatial axes"),
        (lambda: NeighborhoodGQA(16, 4, (3, 3), is_periodic=(True,)), "must agree on 1 to 3 spatial axes"),
        (lambda: NeighborhoodGQA(16, 4, 3, is_causal=True, is_periodic=True), "is_causal and is_periodic are both"),
        (lambda: NeighborhoodGQA(16, 4, 3, rope="axial"), "rope must be a module"),  # pyright: ignore
        (lambda: NeighborhoodGQA(18, 4, 3), "embed_dim 18 is not divisible by num_heads 4"),
        (lambda: NeighborhoodGQA(16, 4, None, stride=2), "kernel_size=None takes no stride"),
        (lambda: NeighborhoodGQA(16, 4, 3, num_registers=-1), "num_registers must be an int of at least 0, got -1"),
        (lambda: NeighborhoodGQA(16, 4, 3, sink="one"), "sink must be .* 'one'"),  # pyright: ignore
        (lambda: NeighborhoodGQA(16, 4, 3, qk_norm="l2"), "qk_norm must be .* 'l2'"),  # pyright: ignore
        (lambda: NeighborhoodGQA(16, 4, 3, scale="x"), "scale must be .* 'x'"),  # pyright: ignore
        (lambda: NeighborhoodGQA(16, 4, 3, scale=math.inf), "scale must be a finite number .* inf"),
        (lambda: NeighborhoodGQA(16, 4, 3, dropout=1.5), "dropout must be a number from 0 to 1, got 1.5"),
        (lambda: NeighborhoodGQA(16, 4, np.array([3, 3])), r"kernel_size must be .* pass kernel_size.tolist\(\)"),  # pyright: ignore
        (lambda: NeighborhoodGQA(16, 4, "33"), "kernel_size must be int .* '33' of type str"),  # pyright: ignore
        (lambda: NeighborhoodGQA(16, 4, 3)(torch.ones(2, 4, 16, dtype=torch.long)), "x has dtype torch.int64"),
        (lambda: NeighborhoodGQA(16, 4, 3)(torch.randn(2, 16)), r"x has shape \(2, 16\)"),
        (lambda: NeighborhoodGQA(16, 4, 3)(torch.randn(2, 16, 5, 6)), r"channels come last: pass x.movedim\(1, -1\)"),
        (
            lambda: NeighborhoodGQA(16, 4, 3)(torch.randn(2, 5, 6, 16), mask=torch.ones(2, 30).bool()),
            r"^mask has shape \(2, 30\); expected \[2 or 1, 5, 6\]",
        ),
        (
            lambda: NeighborhoodGQA(16, 4, 3)(torch.randn(30, 16), shapes=[(5, 6)], mask=torch.ones(5, 6).bool()),
            r"^mask has shape \(5, 6\); expected \[30\]",
        ),
        (lambda: NeighborhoodGQA(16, 4, 3)(torch.randn(2, 4, 4, 8)), r"expected \[B, \*spatial, 16\]"),
        (lambda: NeighborhoodGQA(16, 4, 5)(torch.randn(2, 4, 4, 16)), "kernel_size \\* dilation = 5"),
        (
            lambda: NeighborhoodGQA(16, 4, (3, 3))(torch.randn(2, 4, 16)),
            r"expected \[B, \*spatial, 16\] with 2 spatial axes; .* x.unflatten\(1, \(height, width\)\)",
        ),
        (lambda: NeighborhoodGQA(16, 4, 3)(torch.randn(2, 4, 16), positions=torch.arange(4)), "no rope"),
        (lambda: NeighborhoodGQA(16, 4, 3)(torch.randn(2, 4, 16), registers=torch.randn(1, 2, 16)), "registers has"),
        (lambda: NeighborhoodGQA(16, 4, 3, registers_attend=True)(torch.randn(2, 4, 16)), "needs registers"),
    ],
)
def test_gqa_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("wrong", ["false", "no", 1, None])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        *(
            (lambda **flag: NeighborhoodGQA(16, 4, (3,), num_registers=1, **flag), name)
            for name in ("registers_attend", "rel_pos_bias", "qkv_bias", "out_bias")
        ),
        (lambda **flag: NeighborhoodAttention2D(16, 4, 3, **flag), "qkv_bias"),
        (lambda **flag: RMSNorm(16, **flag), "zero_centered"),
        (lambda **flag: GEGLU(16, 32, **flag), "bias"),
        (lambda **flag: GatedFeedForward(16, 32, **flag), "bias"),
        (lambda **flag: MixtureOfExperts(nn.Identity, 2, 1, 16, **flag), "bias"),
        (lambda **flag: MixtureOfExperts(nn.Identity, 2, 1, 16, **flag), "normalize"),
        (lambda **flag: AxialRoPE(8, 2, **flag), "interleaved"),
        (lambda **flag: RoPE(8, **flag), "interleaved"),
        (lambda **flag: HDiT(HDiTConfig((LevelConfig(1, 16, "global", d_head=8),)), **flag), "checkpointing"),
    ],
)
def test_what_is_no_bool_is_not_taken_for_one(make: Callable[..., object], name: str, wrong: object) -> None:
    """A config may hold the text "false", which counts as true in an if."""
    with pytest.raises(ValueError, match=f"^{name} must be True or False, got {wrong!r} of type"):
        make(**{name: wrong})
    make(**{name: np.True_})


@pytest.mark.parametrize("result", [lambda q, k: q, lambda q, k: (q, k, q), lambda q, k: (q, k.mT), lambda q, k: None])
def test_a_rope_that_does_not_return_query_and_key_is_named(result: Callable[[Tensor, Tensor], object]) -> None:
    class Turn(nn.Module):
        def forward(self, query: Tensor, key: Tensor, positions: Tensor | None) -> object:
            return result(query, key)

    layer = NeighborhoodGQA(16, 4, 3, num_kv_heads=2, rope=Turn())
    # Two images: a single tensor of them could be taken for the pair.
    with pytest.raises(ValueError, match=r"Turn as rope must return query and key rotated, .*\(2, 5, 4, 4\)"):
        layer(torch.randn(2, 5, 16))


@pytest.mark.parametrize(
    "options",
    [
        {"rope": AxialRoPE(8, 4, num_kv_heads=2)},
        {"num_registers": 2, "registers_attend": True, "sink": "learned", "qk_norm": "rms"},
        {"qk_norm": "cosine"},
    ],
    ids=lambda options: "-".join(options),
)
def test_an_empty_batch_passes_through(options: dict[str, Any]) -> None:
    layer, x = NeighborhoodGQA(32, 4, 3, num_kv_heads=2, **options), torch.randn(0, 4, 5, 32, requires_grad=True)
    out = layer(x)
    out, *registers = out if isinstance(out, tuple) else (out,)
    assert out.shape == x.shape
    assert [r.shape for r in registers] == [(0, 2, 32)] * ("num_registers" in options)
    torch.autograd.backward([t.sum() for t in (out, *registers)])
    assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)
    assert x.grad is not None
    assert layer.qkv.weight.grad is not None


def test_an_empty_batch_passes_through_models() -> None:
    levels = (LevelConfig(1, 16, "neighborhood", d_head=8, kernel_size=3), LevelConfig(1, 16, "global", d_head=8))
    images = torch.randn(0, 3, 8, 8, requires_grad=True)
    for denoise in (model := HDiT(HDiTConfig(levels, patch_size=(2, 2), mapping_width=8)), Denoiser(model)):
        denoise(images, torch.ones(0)).sum().backward()
        assert images.grad is not None
    config = DecoderLMConfig(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=2, windows=(3, None)
    )
    lm, ids = DecoderLM(config), torch.zeros(0, 5, dtype=torch.long)
    mask = torch.ones_like(ids)
    lm(ids).sum().backward()
    with torch.no_grad():
        cache = lm.make_cache(0)
        assert lm(ids, attention_mask=mask, cache=cache).shape == lm(ids, cache=cache).shape == (0, 5, 31)
        assert lm.generate(ids, max_new_tokens=2, attention_mask=mask).shape[0] == 0


# --- NATTEN's names


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_natten_operation(rank: int) -> None:
    operation = getattr(natten_layers, f"na{rank}d")
    q, kv = randn(1, *(4,) * rank, 4, 8), randn(2, 1, *(4,) * rank, 2, 8)
    extra = randn(2, 1, 3, 2, 8)
    arguments: dict[str, Any] = {"is_causal": True, "scale": 0.2}
    arguments |= {"additional_keys": extra[0], "additional_values": extra[1]}
    expected = neighborhood_attention(q, kv[0], kv[1], 3, **arguments, return_lse=True)
    tuning = {"backend": "cutlass-fna", "q_tile_shape": (8,) * rank, "torch_compile": True, "attention_kwargs": {}}
    actual = operation(q, *kv, (3,) * rank, **arguments, **tuning, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(
        operation(q, *kv, 3, 2, 1, (False,) * rank), neighborhood_attention(q, kv[0], kv[1], 3, stride=2)
    )
    with pytest.raises(ValueError, match=f"na{rank}d takes"):
        operation(q[..., None], kv[0], kv[1], 3)
    with pytest.raises(ValueError, match="query must be a tensor"):
        operation(None, kv[0], kv[1], 3)


@pytest.mark.parametrize("rank", [2, 3])
def test_natten_tuples_have_an_entry_per_axis(rank: int) -> None:
    q = randn(1, *(4,) * rank, 4, 8)
    with pytest.raises(ValueError, match=f"kernel_size has {rank - 1} entries"):
        getattr(natten_layers, f"na{rank}d")(q, q, q, (3,) * (rank - 1))
    with pytest.raises(ValueError, match=f"dilation has {rank - 1} entries"):
        getattr(natten_layers, f"NeighborhoodAttention{rank}D")(16, 4, 3, dilation=(1,) * (rank - 1))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_natten_module_shares_its_state_dict_with_gqa(rank: int) -> None:
    cls = getattr(natten_layers, f"NeighborhoodAttention{rank}D")
    layer = cls(16, 4, 3, qk_scale=0.4, proj_drop=0.5).eval().double()
    assert set(layer.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    twin = NeighborhoodGQA(16, 4, 3, scale=0.4).double()
    twin.load_state_dict(layer.state_dict())
    x = randn(1, *(4,) * rank, 16)
    assert torch.equal(layer(x), twin(x))
    dropped = (layer.train()(x) == 0).double().mean()
    assert 0.2 < dropped < 0.8
    with pytest.raises(ValueError, match=f"NeighborhoodAttention{rank}D takes"):
        layer(x[None])


@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")  # this and the next from natten itself
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_natten_modules_compute_what_the_package_computes(rank: int) -> None:
    natten, name = pytest.importorskip("natten"), f"NeighborhoodAttention{rank}D"
    options: dict[str, Any] = {"stride": 2, "dilation": (2,) + (1,) * (rank - 1), "is_causal": True, "qk_scale": 0.3}
    theirs, ours = (getattr(package, name)(32, 4, 3, **options) for package in (natten, natten_layers))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        x = torch.randn(1, *(6,) * rank, 32)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [natten_layers.NeighborhoodAttention2D, NeighborhoodGQA])
def test_natten_relative_positional_bias(make: Callable[..., NeighborhoodGQA], strict: bool) -> None:
    layer = make(16, 4, (3, 3))
    state = {f"0.{name}": tensor for name, tensor in layer.state_dict().items()}
    model = nn.Sequential(layer)
    keys = model.load_state_dict(state | {"0.rpb": torch.zeros(4, 5, 5)}, strict=strict)
    assert keys == model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0\.rpb\" \(4, 5, 5\) is a relative positional bias"):
        model.load_state_dict(state | {"0.rpb": torch.ones(4, 5, 5)}, strict=strict)
    biased = nn.Sequential(make(16, 4, (3, 3), rel_pos_bias=True))
    assert biased.load_state_dict(state, strict=False) == (["0.rpb"], [])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AxialRoPE(32, 4, axes=0), "axes must be an int of at least 1"),
        (lambda: make_axial_pos(0, 3), "height and width"),
        (lambda: RMSNorm(8)(torch.randn(2, 4)), "length 8"),
        (lambda: GEGLU(8, 16, dropout=math.nan), "dropout must be a number from 0 to 1, got nan"),
        (lambda: GatedFeedForward(8, 16, activation="relu"), "activation must be one of .* got 'relu'"),  # pyright: ignore
        (lambda: GatedFeedForward(0, 8), "dim must be an int of at least 1, got 0"),
        (lambda: GEGLU("8", 8), "dim must be an int of at least 1, got '8'"),  # pyright: ignore
        (lambda: AdaRMSNorm(8, 0), "cond_dim must be an int of at least 1, got 0"),
        (lambda: MixtureOfExperts(nn.Identity, 4, 2, 0), "dim must be an int of at least 1, got 0"),
        (lambda: GatedFeedForward(8, 0), "hidden_dim must be an int of at least 1, got 0"),
        (lambda: AdaRMSNorm(8, 4)(torch.ones(2, 3, 8), torch.ones(2, 5)), r"cond \(2, 5\); expected .* \[B, 4\]"),
        (lambda: NeighborhoodGQA(16, 4, 3, rope=AxialRoPE), "rope must be a module"),  # pyright: ignore
        (lambda: AxialRoPE(16, 2.0), "num_heads must be an int of at least 1, got 2.0"),  # pyright: ignore
        (lambda: AxialRoPE(16, 2, periods="ab"), "periods='ab' must be 2 entries"),  # pyright: ignore
        (lambda: AxialRoPE(16, 2, freqs=[[1.0]]), "freqs must be a tensor"),  # pyright: ignore
        (lambda: RoPE(16, theta=-1.0), "theta must be a positive number, got -1.0"),
        (lambda: RoPE("16"), "head_dim must be an even number .* '16'"),  # pyright: ignore
        (lambda: make_axial_pos(2.5, 3), "height and width must be integers .* 2.5"),  # pyright: ignore
        (lambda: HDiT({"a": 1}), "HDiTConfig, got {'a': 1} of type dict; HDiTConfig.from_json"),  # pyright: ignore
        (lambda: DecoderLM(None), "config must be a DecoderLMConfig, got None"),  # pyright: ignore
        (lambda: Cache(1.5, [4]), "batch_size must be an int of at least 0, got 1.5"),  # pyright: ignore
        (lambda: Cache(1, [None, 0]), "window of layer 1 must be an int of at least 1, got 0"),
        (lambda: Denoiser(nn.Identity(), sigma_data=1.0)(torch.ones(1), [1.0]), "sigma must be a tensor"),  # pyright: ignore
        (
            lambda: Denoiser(nn.Identity(), sigma_data=1.0)(torch.ones(2, 1), torch.ones(2, 1)),
            r"sigma has shape \(2, 1\)",
        ),
        (lambda: MixtureOfExperts(8, 4, 2, 16), "make_expert must be a function"),  # pyright: ignore
        (lambda: MixtureOfExperts(nn.Identity, 2, 3, 16), "num_experts must be an int of at least 3, got 2"),
    ],
)
def test_parts_name_bad_sizes(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["GEGLU", "GatedFeedForward", "MixtureOfExperts"])
def test_feed_forward_layers_name_what_does_not_fit_and_take_any_axes_before(name: str) -> None:
    made = {
        "GEGLU": lambda: GEGLU(8, 12),
        "GatedFeedForward": lambda: GatedFeedForward(8, 12),
        "MixtureOfExperts": lambda: MixtureOfExperts(lambda: GatedFeedForward(8, 12), 4, 2, 8),
    }
    layer, x = made[name](), randn(2, 3, 8).float()
    for given in (randn(2, 9).float(), torch.ones(())):
        with pytest.raises(ValueError, match=r"x has shape \(.*\); expected \[\.\.\., 8\]"):
            layer(given)
    with pytest.raises(ValueError, match="x must be a tensor, got 'text' of type str"):
        layer("text")
    torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0])


def test_a_rope_for_other_heads_says_which_one_to_make() -> None:
    """The layer does not wait for the first call."""
    with pytest.raises(ValueError, match=r"make AxialRoPE\(16, 4, num_kv_heads=2\)"):
        NeighborhoodGQA(64, 4, 3, num_kv_heads=2, rope=AxialRoPE(16, 4))
    with pytest.raises(ValueError, match=r"heads of 16 elements; this RoPE rotates 32: make RoPE\(16\)"):
        NeighborhoodGQA(64, 4, 3, rope=RoPE(32))
