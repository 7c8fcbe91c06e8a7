"""The diffusers plug-in: tiny random models of the real library, computed by its own attention and by ours."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import runpy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import error, raises_naming, randomize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

diffusers = pytest.importorskip("diffusers")

import decode_ltx  # noqa: E402
import sample_flux_neighborhood  # noqa: E402
from natten_layers import neighborhood_attention  # noqa: E402
from natten_layers.geometry import make_window, window_mask  # noqa: E402
from natten_layers.integrations.diffusers import ltx_decoder, neighborhood, patch, transformers, unpatch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


# --- LTX-2's diffusion decoder


def tiny_decoder(head_dim: int = 16, **options: Any) -> Any:
    """Three latent frames and 3x3 latents are enough for every window, with little upsampling behind them."""
    torch.manual_seed(0)
    model = diffusers.LTX2VideoDiffusionDecoderModel(
        **decode_ltx.TINY
        | {
            "decoder_head_dim": head_dim,
            "decoder_stage_channels": tuple(n * head_dim for n in (4, 2, 2, 2, 2)),
            "decoder_stage_kernels": ((3, 3, 3), (3, 5, 5), (3, 5, 3), (5, 3, 3)),
        }
        | options
    )
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def decoded() -> tuple[Any, dict[bool, Tensor]]:
    """A decoder and what it decodes with the library's FlexAttention, whole and in tiles."""
    return (model := tiny_decoder()), {tiled: decode(model, tiled) for tiled in (False, True)}


def decode(model: Any, tiled: bool) -> Tensor:
    model.disable_tiling()
    if tiled:
        sizes = {"tile_sample_min_height": 8, "tile_sample_min_width": 8, "tile_sample_min_num_frames": 6}
        model.enable_tiling(
            **sizes, tile_sample_stride_height=6, tile_sample_stride_width=6, tile_sample_stride_num_frames=4
        )
    latents = torch.randn(1, 8, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.decode(latents, generator=torch.Generator().manual_seed(2)).sample


@pytest.mark.parametrize("tiled", [False, True])
def test_a_patched_decoder_decodes_the_same(decoded: tuple[Any, dict[bool, Tensor]], tiled: bool) -> None:
    model, expected = decoded
    before = [m.processor for m in model.modules() if hasattr(m, "processor")]
    assert patch(model) == len(before) == 6
    assert patch(model) == 6  # once more changes nothing
    actual = decode(model, tiled)
    torch.testing.assert_close(actual, expected[tiled], rtol=1e-5, atol=1e-5 * float(expected[tiled].abs().max()))
    assert unpatch(model) == 6
    assert [m.processor for m in model.modules() if hasattr(m, "processor")] == before
    assert unpatch(model) == 0


def test_patch_finds_the_decoder_of_a_pipeline(decoded: tuple[Any, dict[bool, Tensor]]) -> None:
    decoder, scheduler = decoded[0], diffusers.FlowMatchEulerDiscreteScheduler()
    decoder.disable_tiling()
    pipeline = diffusers.LTX2VideoDiffusionDecodePipeline(decoder, scheduler)
    latents = torch.randn(1, 8, 2, 3, 3, generator=torch.Generator().manual_seed(1))

    def video() -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return pipeline(latents, generator=generator, output_type="pt", denormalize=False).frames

    expected = video()
    assert patch(pipeline) == 6
    torch.testing.assert_close(video(), expected, rtol=1e-5, atol=1e-5)
    assert unpatch(pipeline) == 6


def ltx_layer(head_dim: int, kernel_size: tuple[int, int, int] = (3, 3, 3)) -> Any:
    torch.manual_seed(0)
    layer = ltx_decoder._attention_class()(2 * head_dim, kernel_size, head_dim=head_dim)
    randomize(layer)
    return layer


@pytest.mark.parametrize("kernel_size", [(3, 7, 7), (3, 5, 5), (11, 11, 11)], ids=str)
def test_windows_of_ltx_are_ours(kernel_size: tuple[int, int, int]) -> None:
    layer = ltx_layer(8, kernel_size)
    tokens = torch.randn(1, *(n + 1 for n in kernel_size), 16)
    with torch.no_grad():
        expected = layer(tokens)
        patch(layer)
        torch.testing.assert_close(layer(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 72, 128])
def test_ltx_splits_every_head_dim_as_we_do(head_dim: int) -> None:
    layer, tokens = ltx_layer(head_dim), torch.randn(1, 3, 4, 5, 2 * head_dim)
    query, key, _ = layer.project_qkv(tokens)
    rope, positions = ltx_decoder._rope_of(layer, tokens.device), ltx_decoder._TokenIndices()
    heads = (norm(to(tokens).unflatten(-1, (2, head_dim))) for to, norm in
             ((layer.to_q, layer.norm_q), (layer.to_k, layer.norm_k)))  # fmt: skip
    turned = rope(*heads, positions.of(tokens.shape[1:-1], tokens.device))
    torch.testing.assert_close(turned[0] * layer.scale, query)
    torch.testing.assert_close(turned[1], key)


def test_positions_are_those_of_the_grid_asked_for() -> None:
    """Though another thread has asked for those of another grid meanwhile."""

    class Shared(ltx_decoder._TokenIndices):
        def __setattr__(self, name: str, value: Tensor) -> None:
            object.__setattr__(self, name, value[1:])

    assert Shared().of(torch.Size([4, 3, 2]), torch.device("cpu")).shape == (4, 3, 2, 3)


def test_a_patched_layer_rounds_less_in_half_precision() -> None:
    layer, tokens = ltx_layer(16), torch.randn(1, 4, 5, 6, 32)
    layer, tokens = layer.bfloat16(), tokens.bfloat16()
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(tokens.double())
        before = error(layer(tokens), exact)
        patch(layer)
        assert error(layer(tokens), exact) <= 1.1 * before


def test_a_patched_layer_trains_after_inference() -> None:
    layer, tokens = ltx_layer(16), torch.randn(1, 3, 4, 5, 32)
    query, key, value = layer.project_qkv(tokens)  # FlexAttention has no gradient on a CPU
    dense = neighborhood_attention(query, key, value, layer.kernel_size, scale=1.0, impl="eager")
    out = layer.to_out[0](dense.flatten(-2))
    (expected,) = torch.autograd.grad(out.square().sum(), layer.norm_q.weight)
    patch(layer)
    with torch.inference_mode():
        layer(tokens)
    (actual,) = torch.autograd.grad(layer(tokens).square().sum(), layer.norm_q.weight)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_heads_reach_the_prologue_as_they_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, scale and rotation are left to the kernels, which read the projections where they lie."""
    layer, tokens, projected = ltx_layer(16), torch.randn(1, 3, 4, 5, 32), list[int]()
    patch(layer)
    for to in (layer.to_q, layer.to_k, layer.to_v):
        to.register_forward_hook(lambda module, args, out: projected.append(out.data_ptr()))
    attend, calls = ltx_decoder.attend_with_qk_prep, list[Any]()

    def spy(call: Any, norm: Any, angles: Any) -> Tensor:
        calls.append((call, norm, angles))
        return attend(call, norm, angles)

    monkeypatch.setattr(ltx_decoder, "attend_with_qk_prep", spy)
    with torch.inference_mode():
        layer(tokens)
    ((call, norm, angles),) = calls
    assert [x.data_ptr() for x in call.inputs[:3]] == projected
    assert norm.kind == "rms"
    assert angles.interleaved
    assert sum(angles.split) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("kernel_size", [(3, 7, 7), (3, 5, 5), (11, 11, 11)], ids=str)
def test_a_patched_layer_prepares_heads_in_one_launch_and_copies_nothing(kernel_size: tuple[int, int, int]) -> None:
    layer, tokens = ltx_layer(64).cuda().bfloat16(), torch.randn(1, 12, 64, 96, 128, device="cuda").bfloat16()
    layer.kernel_size = kernel_size
    patch(layer)

    def kernels(call: Callable[[], object]) -> list[str]:
        with torch.inference_mode():
            call()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
                call()
                torch.cuda.synchronize()
        return [e.name for e in profile.events() or [] if "CUDA" in str(e.device_type)]

    projections = (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0])
    apart = kernels(lambda: [to(tokens) for to in projections])
    own = [name for name in kernels(lambda: layer(tokens)) if name not in apart]
    assert "qk_prep_kernel" in own[0], own
    others = [name for name in own[1:] if "FillFunctor" not in name]  # flags and counters of kernels, set to zero
    assert not [name for name in others if re.search("qk_prep|elementwise|copy|cat", name, re.IGNORECASE)], own


def test_watched_norms_are_called() -> None:
    layer, seen = ltx_layer(16), list[torch.Size]()
    patch(layer)
    layer.norm_k.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer(torch.randn(1, 3, 3, 3, 32))
    assert seen == [(1, 3, 3, 3, 2, 16)]


class Adapted(nn.Module):
    """A projection with an adapter of low rank beside it, like those of peft: to read its weight misses the adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merge(self) -> None:
        self.base.weight += self.up.weight @ self.down.weight
        self.up.weight.zero_()


def adapt(model: nn.Module) -> list[Adapted]:
    """Give all projections of all attention layers an adapter."""
    found = list[Adapted]()
    for layer in [m for m in model.modules() if hasattr(m, "processor")]:
        for name, linear in [*layer.named_modules()]:
            if isinstance(linear, nn.Linear):
                found.append(Adapted(linear))
                layer.set_submodule(name, found[-1])
    return found


def test_a_patched_layer_has_its_adapters() -> None:
    layer, tokens = ltx_layer(16), torch.randn(1, 3, 4, 5, 32)
    patch(layer)
    with torch.no_grad():
        plain = layer(tokens)
        adapters = adapt(layer)
        assert len(adapters) == 4
        adapted = layer(tokens)
        for adapter in adapters:
            adapter.merge()
        assert error(adapted, plain) > 1e-2
        torch.testing.assert_close(layer(tokens), adapted, rtol=1e-5, atol=1e-5)


def test_patch_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_naming("Linear", "LTX2VideoVaeNeighborhoodAttention", "LTX2VideoDiffusionDecoderModel", "neighborhood"):
        patch(nn.Linear(2, 2))
    with raises_naming("a model or a pipeline", "str"):
        patch("name")
    layer = ltx_layer(16)
    del layer.norm_k
    layer.rope = nn.Identity()
    with raises_naming(diffusers.__version__, "norm_k, rope.rope_dim_split, rope.base", error=AttributeError):
        patch(layer)
    monkeypatch.delattr("diffusers.models.autoencoders.ltx2_diffusion_decoder.LTX2VideoVaeNeighborhoodAttention")
    with raises_naming(diffusers.__version__, "0.42.1", error=ImportError):
        patch(layer)


def test_the_example_compares_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_ltx.main(["--tiny", "--repeat", "1"]) == 0
    printed = capsys.readouterr().out
    assert "6 layers" in printed
    assert float(re.findall(r"largest difference (\S+)", printed)[0]) < 1e-5


def test_the_example_gives_each_decoder_its_own_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a peak stands until it is reset."""
    peak = 0

    def decoder(gibibytes: int) -> Any:
        def decode(*_: Any, **__: Any) -> list[None]:
            nonlocal peak
            peak = max(peak, gibibytes * 2**30)
            return [None]

        return SimpleNamespace(decode=decode)

    def reset() -> None:
        nonlocal peak
        peak = 0

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    latents: Any = SimpleNamespace(is_cuda=True)
    arguments = decode_ltx.parse_arguments(["--tiny"])
    for gibibytes in (167, 2):
        took = decode_ltx.decode(decoder(gibibytes), latents, arguments)[1]
        assert took.endswith(f"peak memory {gibibytes}.0 GiB")


def test_the_example_knows_what_takes_less_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode_ltx, "decode", lambda *_: torch.empty(2**45))
    for flags, ways in (([], "--patched-only, or --bf16, or --tiled"), (["--bf16", "--patched-only"], "--tiled")):
        assert decode_ltx.main(["--tiny", *flags]) == 2
        assert capsys.readouterr().err.startswith(f"error: out of memory: try {ways}, or a smaller video (")


# --- Image and video transformers


def test_the_example_of_flux_samples(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Windows of the whole image change nothing, and windows of 5 of its 8 rows and columns do."""

    def difference(*options: str) -> float:
        size = ("--height", "16", "--width", "16", "--save", str(tmp_path / "image.png"))
        assert sample_flux_neighborhood.main(["--tiny", "--compare", *size, *options]) == 0
        return float(re.findall(r"largest difference (\S+)", capsys.readouterr().out)[0])

    assert difference("--kernel-size", "8") < 1e-5
    assert (tmp_path / "image.png").is_file()
    assert difference("--kernel-size", "5", "8", "--layers", "0,2-3") > 1e-4
    with pytest.raises(SystemExit):
        sample_flux_neighborhood.main(["--tiny", "--kernel-size", "5", "5", "5"])


@pytest.mark.parametrize(
    ("example", "flags", "says"),
    [
        ("decode_ltx", ["--tiny", "--latents", "nowhere.pt"], "error: nowhere.pt: No such file or directory"),
        ("decode_ltx", ["--tiny", "--latents", __file__], f"error: {__file__} is damaged, or holds objects"),
        ("sample_flux_neighborhood", ["--tiny", "--steps", "0"], "error: --steps must be at least 1, got 0"),
        ("decode_ltx", ["--tiny", "--device", "nosuch"], "error: --device nosuch: Expected one of cpu, cuda"),
        ("sample_flux_neighborhood", ["--tiny", "--device", "cuda:77"], "error: --device cuda:77: this PyTorch finds"),
        ("sample_flux_neighborhood", ["--tiny", "--layers", "x"], "error: argument --layers: must be indices and "),
        ("sample_flux_neighborhood", ["--tiny", "--layers", "3-1"], "such as 0,3,8-56, got 3-1"),
        ("sample_flux_neighborhood", ["nowhere"], "error: nowhere is not a directory of a FLUX pipeline"),
        ("decode_ltx", ["--tiny", "--frames", "-1"], "error: --frames must be at least 1, got -1"),
        ("decode_ltx", ["--tiny", "--seed", "-1"], "error: argument --seed: must be from 0 to 4294967295, got -1"),
        ("decode_ltx", ["nowhere", "--save", "/dev/null/x.pt"], "error: --save /dev/null/x.pt: nothing can be written"),
        ("sample_flux_neighborhood", ["nowhere", "--save", "x.xyz"], "error: --save must end with .png or .jpg or "),
        ("decode_ltx", ["nowhere", "--save", "x.mp4"], "error: --save must end with .pt or .pth, got x.mp4"),
        ("draw_windows", ["/dev/null/x.png"], "error: output /dev/null/x.png: nothing can be written to /dev/null"),
    ],
)
def test_examples_say_in_one_line_what_is_wrong(
    example: str, flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(decode_ltx.__file__).with_name(f"{example}.py")
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(path), run_name="__main__")
    assert says in capsys.readouterr().err.splitlines()[-1]


class ModelCase(NamedTuple):
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    grid: tuple[int, ...]
    layers: int


def image_ids(height: int, width: int, columns: int) -> Tensor:
    ids = torch.zeros(height, width, columns)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.flatten(0, 1)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
CHANNELS = {"in_channels": 4, "out_channels": 4}
JOINT = HEADS | {"in_channels": 4, "joint_attention_dim": 8}
WAN = CHANNELS | {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "num_layers": 2,
    "rope_max_seq_len": 32,
}  # fmt: skip
LTX = HEADS | CHANNELS | {"cross_attention_dim": 32, "num_layers": 2, "caption_channels": 8}
STEP, HALF = torch.tensor([500]), torch.tensor([0.5])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
IMAGE, VIDEO = (5, 6), (3, 4, 5)
LENGTHS = dict(zip(("num_frames", "height", "width"), VIDEO, strict=True))


def text(batch: int = 1) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(batch, 7, 8)}


def video(batch: int = 1) -> dict[str, Tensor]:
    latents = torch.randn(batch, 4, 3, 8, 10)
    return text(batch) | {"hidden_states": latents, "timestep": STEP.repeat(batch)}


CASES = {
    "FluxTransformer2DModel": ModelCase(
        JOINT | {"num_layers": 1, "num_single_layers": 2, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)},
        lambda: text() | {
            "hidden_states": torch.randn(1, 30, 4), "pooled_projections": torch.randn(1, 8), "timestep": HALF,
            "img_ids": image_ids(*IMAGE, 3), "txt_ids": torch.zeros(7, 3),
        },
        IMAGE, 3,
    ),
    "Flux2Transformer2DModel": ModelCase(
        JOINT | {
            "num_layers": 1, "num_single_layers": 2, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8
        },
        lambda: text() | {
            "hidden_states": torch.randn(1, 30, 4), "timestep": HALF, "guidance": HALF,
            "img_ids": image_ids(*IMAGE, 4)[None], "txt_ids": torch.zeros(1, 7, 4),
        },
        IMAGE, 3,
    ),
    "QwenImageTransformer2DModel": ModelCase(
        JOINT | {"out_channels": 1, "num_layers": 2, "axes_dims_rope": (4, 6, 6)},
        lambda: text(2) | {
            "hidden_states": torch.randn(2, 30, 4), "encoder_hidden_states_mask": PADDED, "timestep": HALF.repeat(2),
            "img_shapes": [[(1, *IMAGE)]] * 2,
        },
        IMAGE, 2,
    ),
    "SD3Transformer2DModel": ModelCase(
        JOINT | {
            "sample_size": 12, "out_channels": 4, "num_layers": 2, "caption_projection_dim": 32,
            "pooled_projection_dim": 8, "pos_embed_max_size": 12, "dual_attention_layers": (0,),
        },
        lambda: text() | {
            "hidden_states": torch.randn(1, 4, 10, 12), "pooled_projections": torch.randn(1, 8), "timestep": STEP
        },
        IMAGE, 3,
    ),
    "WanTransformer3DModel": ModelCase(WAN, video, VIDEO, 2),
    "WanVACETransformer3DModel": ModelCase(
        WAN | {"vace_layers": [0], "vace_in_channels": 6},
        lambda: video() | {"control_hidden_states": torch.randn(1, 6, 3, 8, 10)},
        VIDEO, 3,
    ),
    "SkyReelsV2Transformer3DModel": ModelCase(WAN, video, VIDEO, 2),
    "HunyuanVideoTransformer3DModel": ModelCase(
        HEADS | CHANNELS | {
            "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 8,
            "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
        },
        lambda: video(2) | {
            "encoder_attention_mask": PADDED, "pooled_projections": torch.randn(2, 8), "guidance": STEP.repeat(2)
        },
        VIDEO, 2,
    ),
    "HunyuanVideo15Transformer3DModel": ModelCase(
        HEADS | CHANNELS | {
            "num_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 8, "text_embed_2_dim": 8,
            "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6),
        },
        lambda: video(2) | {
            "timestep": STEP.float().repeat(2), "encoder_attention_mask": PADDED.float(),
            "encoder_hidden_states_2": torch.randn(2, 7, 8),
            "encoder_attention_mask_2": PADDED.float().flip(0), "image_embeds": torch.zeros(2, 3, 8),
        },
        VIDEO, 2,
    ),
    "CogVideoXTransformer3DModel": ModelCase(
        HEADS | CHANNELS | {
            "time_embed_dim": 4, "text_embed_dim": 8, "num_layers": 2, "sample_width": 10, "sample_height": 8,
            "sample_frames": 9, "max_text_seq_length": 7,
        },
        lambda: video() | {"hidden_states": torch.randn(1, 3, 4, 8, 10)},
        VIDEO, 2,
    ),
    "LTXVideoTransformer3DModel": ModelCase(
        LTX,
        lambda: text() | LENGTHS | {
            "hidden_states": torch.randn(1, 60, 4), "timestep": STEP, "encoder_attention_mask": torch.ones(1, 7)
        },
        VIDEO, 2,
    ),
    "LTX2VideoTransformer3DModel": ModelCase(
        LTX | {
            "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
        },
        lambda: text() | LENGTHS | {
            "hidden_states": torch.randn(1, 60, 4), "audio_hidden_states": torch.randn(1, 6, 4), "timestep": HALF,
            "audio_encoder_hidden_states": torch.randn(1, 7, 8), "audio_num_frames": 6,
        },
        VIDEO, 2,
    ),
    "CosmosTransformer3DModel": ModelCase(
        HEADS | CHANNELS | {
            "num_layers": 2, "text_embed_dim": 8, "adaln_lora_dim": 4, "max_size": (16, 16, 16),
            "encoder_hidden_states_channels": 8, "concat_padding_mask": False, "extra_pos_embed_type": None,
        },
        video, VIDEO, 2,
    ),
}  # fmt: skip


def tiny(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**CASES[name].config | options)
    randomize(model)
    return model.eval(), CASES[name].inputs()


@torch.no_grad()
def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def processors(model: Any) -> list[Any]:
    return [m.processor for m in model.modules() if hasattr(m, "processor")]


def test_every_family_is_tried() -> None:
    assert CASES.keys() == transformers.FAMILIES.keys()


@pytest.mark.parametrize("name", CASES)
def test_whole_windows_are_the_unpatched_model(name: str) -> None:
    (model, inputs), case = tiny(name), CASES[name]
    before, expected = processors(model), output(model, inputs)
    assert neighborhood(model, 99, 99) == case.layers
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert neighborhood(model, 3) == case.layers  # replaces the windows
    tokens = {p.tokens for p in processors(model) if hasattr(p, "tokens")}
    model(**inputs)  # with gradients, for which checkpoints may compute layers again
    assert [t.call.grid for t in tokens] == [case.grid]
    assert error(output(model, inputs), expected) > 1e-2
    assert unpatch(model) == case.layers
    assert processors(model) == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_token_reaches_those_whose_window_holds_it(name: str) -> None:
    """In the first layer, what the last token is reaches the last two rows and columns of the last frame."""
    (model, inputs), grid = tiny(name), CASES[name].grid
    neighborhood(model, (1, 3, 3)[-len(grid) :])
    results: list[Any] = []
    first = transformers._attentions(model, transformers.FAMILIES[name])[0]
    first.register_forward_hook(lambda module, args, result: results.append(result))
    output(model, inputs)
    changed = inputs["hidden_states"].clone()
    changed.view(-1)[-1] += 1  # the last token of the last sample, whatever the order of axes
    output(model, inputs | {"hidden_states": changed})
    before, after = (result[0] if isinstance(result, tuple) else result for result in results)
    expected = torch.zeros(grid, dtype=torch.bool)
    (expected if len(grid) == 2 else expected[-1])[-2:, -2:] = True
    assert torch.equal((before != after)[-1].any(-1), expected.flatten())


@pytest.mark.parametrize("where", ["first", "last", "elsewhere"])
@pytest.mark.parametrize("padded", [False, True])
def test_image_tokens_see_their_window_and_the_text(where: Any, padded: bool) -> None:
    grid, registers, kernel_size, stride = (4, 5), 3 if where != "elsewhere" else 0, (3, 4), (2, 1)
    tokens = transformers._Tokens(nn.Module(), transformers.Family(2, lambda *_: grid, (), where))
    tokens.thread.call, length = transformers._Call(grid), 20 + registers
    pixels = torch.arange(20) + (registers if where == "first" else 0)
    allowed = torch.ones(length, length, dtype=torch.bool)
    allowed[pixels[:, None], pixels] = window_mask(grid, make_window(grid, kernel_size, stride))
    query, key, value = torch.randn(3, 2, 2, length, 8).unbind()
    mask = None
    if padded:
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
        if registers:
            mask[1, :, :, 1 if where == "first" else -1] = False
    expected = F.scaled_dot_product_attention(query, key, value, allowed if mask is None else allowed & mask, scale=0.7)
    window = transformers._Window(kernel_size, stride)
    actual = transformers._attention(tokens, window, query, key, value, mask, scale=0.7)
    torch.testing.assert_close(actual, expected)


def stable_diffusion_3() -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0)
    model, inputs = tiny("SD3Transformer2DModel")
    texts = {"prompt_embeds": inputs["encoder_hidden_states"], "pooled_prompt_embeds": inputs["pooled_projections"]}
    pipeline = diffusers.StableDiffusion3Pipeline(model, diffusers.FlowMatchEulerDiscreteScheduler(), vae, *[None] * 6)
    return pipeline, {**texts, "height": 10, "width": 12}


def wan() -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    model, inputs = tiny("WanTransformer3DModel")
    pipeline = diffusers.WanPipeline(None, None, vae, diffusers.FlowMatchEulerDiscreteScheduler(), model)
    return pipeline, {"prompt_embeds": inputs["encoder_hidden_states"], "height": 64, "width": 80, "num_frames": 9}


@pytest.mark.parametrize("make", [stable_diffusion_3, wan])
def test_pipelines_sample_with_windows(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    """With guidance, so that each step calls the transformer twice, or for two samples."""
    torch.manual_seed(0)
    pipeline, options = make()
    pipeline.set_progress_bar_config(disable=True)
    options |= {f"negative_{name}": -x for name, x in options.items() if isinstance(x, Tensor)}

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        result = pipeline(**options, num_inference_steps=2, generator=generator, output_type="pt")
        return result[0]

    expected = sample()
    count = neighborhood(pipeline.transformer, 99)
    torch.testing.assert_close(sample(), expected, rtol=1e-5, atol=1e-5)
    assert neighborhood(pipeline.transformer, 3) == count
    assert error(sample(), expected) > 1e-2
    with raises_naming(type(pipeline).__name__, "give the transformer"):
        neighborhood(pipeline, 3)
    assert unpatch(pipeline) == count
    assert torch.equal(sample(), expected)


def test_layers_have_their_own_windows() -> None:
    model, inputs = tiny("WanTransformer3DModel")
    assert neighborhood(model, 3, layers=[0]) == 1
    first = output(model, inputs)
    assert neighborhood(model, (1, 3, 3), layers=[-1]) == 2
    assert error(output(model, inputs), first) > 1e-3
    kinds = [model.blocks[i].attn1.processor.window.kernel_size for i in (0, 1)]
    assert kinds == [(3, 3, 3), (1, 3, 3)]


def test_the_grid_follows_the_call() -> None:
    model, inputs = tiny("FluxTransformer2DModel")
    expected = output(model, turned := inputs | {"img_ids": image_ids(6, 5, 3)})
    neighborhood(model, 99)
    output(model, inputs)
    torch.testing.assert_close(output(model, turned), expected, rtol=1e-5, atol=1e-5)
    neighborhood(model, 3)
    assert error(output(model, inputs), output(model, turned)) > 1e-3
    ids = inputs["img_ids"]
    output(model, inputs)
    ids.copy_(image_ids(6, 5, 3))  # the same tensor with another image in it
    assert torch.equal(output(model, inputs), output(model, turned))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_positions_may_change_in_inference_mode(name: str) -> None:
    """Where tensors do not count changes in place."""
    model, inputs = tiny(name)
    neighborhood(model, 3)
    turned = image_ids(IMAGE[1], IMAGE[0], inputs["img_ids"].shape[-1])
    expected = output(model, inputs | {"img_ids": turned})
    output(model, inputs)
    inputs["img_ids"].copy_(turned)
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_a_copy_is_a_model_of_its_own(name: str, twin_of: Callable[[Any], Any]) -> None:
    model, inputs = tiny(name)
    neighborhood(model, 3)
    windowed = output(model, inputs)
    twin = twin_of(model)
    unpatch(model)
    assert torch.equal(output(twin, inputs), windowed)
    unpatch(twin)
    assert not twin._forward_pre_hooks
    assert not twin._forward_hooks


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_of_a_block_takes_no_other_layers_with_it(twin_of: Callable[[Any], Any]) -> None:
    model, inputs = tiny("WanTransformer3DModel")
    neighborhood(model, 3)
    expected = output(model, inputs)
    gc.collect()
    before = len(modules_alive())
    twin = twin_of(model.blocks[0])
    gc.collect()
    assert len(modules_alive()) - before == len([*twin.modules()])
    assert unpatch(twin) == 1
    assert not twin._forward_pre_hooks
    assert not twin._forward_hooks
    assert torch.equal(output(model, inputs), expected)


def modules_alive() -> list[nn.Module]:
    return [x for x in gc.get_objects() if isinstance(x, nn.Module)]


def test_a_copy_of_a_block_has_the_windows_of_the_model_that_it_is_in() -> None:
    """As soon as neighborhood knows of it, and also where checkpoints compute it again."""
    model, inputs = tiny("WanTransformer3DModel")
    neighborhood(model, 3)
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    with raises_naming("60 tokens", "neighborhood again, if a block was copied"):
        output(model, inputs)
    assert neighborhood(model, 3) == 3
    grads = []
    for checkpoints in (False, True):
        (model.enable_gradient_checkpointing if checkpoints else model.disable_gradient_checkpointing)()
        loss = model.train()(**inputs, return_dict=False)[0].square().mean()
        model(**turn(inputs))  # the last call with gradients, at another size
        grads.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(grads[1], grads[0])
    assert unpatch(model) == 3
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_block_without_its_windows_may_stand_in_a_model_with_windows() -> None:
    """Once they were taken from it, it has none that it could have lost."""
    model, inputs = tiny("WanTransformer3DModel")
    neighborhood(model, 3)
    expected = output(model, inputs)
    twin = copy.deepcopy(model.blocks[0])
    unpatch(twin)
    model.blocks.append(twin)
    output(model, inputs)
    del model.blocks[-1]
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"])
def test_checkpoints_compute_layers_again(name: str) -> None:
    model, inputs = tiny(name)
    neighborhood(model, 3)
    grads = []
    for checkpoints in (False, True):
        (model.enable_gradient_checkpointing if checkpoints else model.disable_gradient_checkpointing)()
        loss = model.train()(**inputs, return_dict=False)[0].square().mean()
        output(copy.deepcopy(model).eval(), inputs)  # samples of a copy, such as an average, disturb nothing
        grads.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(grads[1], grads[0])


def turn(inputs: dict[str, Any]) -> dict[str, Any]:
    """A portrait for a landscape, of as many tokens, and another text."""
    texts = {name: x.flip(0) for name, x in inputs.items() if name.startswith("encoder_attention")}
    return inputs | texts | {"hidden_states": inputs["hidden_states"].transpose(-1, -2)}


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "HunyuanVideoTransformer3DModel"])
def test_threads_may_sample_at_several_sizes(name: str) -> None:
    model, inputs = tiny(name)
    neighborhood(model, 3)
    expected = output(model, inputs), output(model, turn(inputs))
    first = transformers._attentions(model, transformers.FAMILIES[name])[0]
    began, may_go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            began.set()
            assert may_go_on.wait(60)

    first.register_forward_pre_hook(wait)  # the model's own hook has read the grid then
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(output, model, inputs)
        assert began.wait(60)
        assert torch.equal(output(model, turn(inputs)), expected[1])
        may_go_on.set()
        assert torch.equal(other.result(), expected[0])


@pytest.mark.parametrize("another_thread", [False, True], ids=["CPU", "GPU"])
def test_checkpoints_compute_layers_again_after_a_sample_at_another_size(another_thread: bool) -> None:
    """On a GPU, autograd does so in a thread of its own."""
    model, inputs = tiny("HunyuanVideoTransformer3DModel")
    neighborhood(model, 3)
    parameters = list(model.parameters())
    grads = []
    for checkpoints in (False, True):
        (model.enable_gradient_checkpointing if checkpoints else model.disable_gradient_checkpointing)()
        loss = model.train()(**inputs, return_dict=False)[0].square().mean()
        output(model.eval(), turn(inputs))
        differentiate = partial(torch.autograd.grad, loss, parameters, allow_unused=True)
        with ThreadPoolExecutor(1) as pool:
            grads.append(pool.submit(differentiate).result() if another_thread else differentiate())
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("another_thread", [False, True], ids=["CPU", "GPU"])
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "SD3Transformer2DModel"])
def test_checkpoints_compute_each_layer_again_as_in_its_own_call(name: str, another_thread: bool) -> None:
    """As of two threads that train one model at two sizes, or one that adds their losses."""
    model, inputs = tiny(name)
    neighborhood(model, 3)
    parameters = list(model.train().parameters())
    grads = []
    for checkpoints in (False, True):
        (model.enable_gradient_checkpointing if checkpoints else model.disable_gradient_checkpointing)()
        losses = [model(**call, return_dict=False)[0].square().mean() for call in (inputs, turn(inputs))]
        differentiate = partial(torch.autograd.grad, torch.stack(losses).sum(), parameters, allow_unused=True)
        with ThreadPoolExecutor(1) as pool:
            grads.append(pool.submit(differentiate).result() if another_thread else differentiate())
    torch.testing.assert_close(grads[1], grads[0])
    hook = transformers.ModelHook.of(model)
    assert isinstance(hook, transformers._Tokens)
    del losses, differentiate
    gc.collect()
    assert not len(hook.calls)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
@pytest.mark.parametrize("way", ["ordinary", "reentrant", "compiled", "copies"])
def test_a_thread_of_autograd_computes_layers_again_in_every_step(way: str) -> None:
    """At the size of that step: autograd's thread on a GPU lasts, as the only one of the pool does here."""
    model, inputs = tiny("WanTransformer3DModel")
    neighborhood(model, 3)
    hook = transformers.ModelHook.of(model.train())
    assert isinstance(hook, transformers._Tokens)

    def gradients(pool: ThreadPoolExecutor, call: dict[str, Any]) -> list[Tensor]:
        model.zero_grad()
        with torch.autograd.graph.save_on_cpu() if way == "copies" else nullcontext():
            loss = model(**call, return_dict=False)[0].square().mean()
        pool.submit(loss.backward).result()
        return [x.grad for x in model.parameters() if x.grad is not None]

    with ThreadPoolExecutor(1) as pool:
        steps = [inputs, turn(inputs)]
        expected = [gradients(pool, call) for call in steps]
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=way == "reentrant"))
        torch.testing.assert_close(gradients(pool, steps[0]), expected[0])
        if way == "compiled":
            model.blocks[-1].compile(backend="eager")  # no sooner, as it takes seconds for each size
        torch.testing.assert_close(gradients(pool, steps[1]), expected[1])
        assert "call" not in pool.submit(vars, hook.thread).result()  # whose mask would take memory


def test_a_block_without_tokens_says_what_it_misses() -> None:
    model, _ = tiny("WanTransformer3DModel")
    neighborhood(model, 3)
    with pytest.raises(TypeError, match="hidden_states"):
        model.blocks[0]()


def test_a_compiled_block_has_the_windows_of_each_threads_call() -> None:
    model, inputs = tiny("WanTransformer3DModel")
    neighborhood(model, 3)
    calls = [inputs, turn(inputs)] * 2
    expected = [output(model, call) for call in calls]
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    with ThreadPoolExecutor(1) as pool:
        for call, result in zip(calls, expected, strict=True):
            torch.testing.assert_close(output(model, call), result)
            torch.testing.assert_close(pool.submit(output, model, call).result(), result)


def test_layers_do_not_compute_with_the_grid_of_a_call_that_is_over() -> None:
    """Such as that of a landscape for a portrait, whose tokens are as many."""
    model, inputs = tiny("WanTransformer3DModel")
    neighborhood(model, 3)
    output(model, inputs)
    other, _ = tiny("WanTransformer3DModel")
    other.set_attn_processor(model.attn_processors)
    for call in (model.forward, other):  # neither of which runs the hook that reads the grid
        with raises_naming("60 tokens", "call the whole model", "neighborhood"):
            output(call, turn(inputs))


def test_a_part_that_is_left_alone_says_so() -> None:
    model, inputs = tiny("WanTransformer3DModel")
    neighborhood(model, 3)
    expected = output(model, inputs)
    unpatch(model.blocks[0])
    with raises_naming("does not fit a grid", "unpatch"):
        output(model, inputs)
    assert neighborhood(model, 3, layers=[0]) == 2  # the layer that was left alone, too
    assert torch.equal(output(model, inputs), expected)


def test_a_part_without_windows_takes_none_from_the_model() -> None:
    model, inputs = tiny("WanTransformer3DModel")
    neighborhood(model, 3, layers=[0])
    expected = output(model, inputs)
    assert unpatch(model.blocks[1]) == 0
    assert torch.equal(output(model, inputs), expected)
    assert unpatch(model) == 1
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_layers_with_windows_have_their_adapters(name: str) -> None:
    model, inputs = tiny(name)
    neighborhood(model, 3)
    plain = output(model, inputs)
    adapters = adapt(model)
    adapted = output(model, inputs)
    for adapter in adapters:
        adapter.merge()
    assert error(adapted, plain) > 1e-2
    torch.testing.assert_close(output(model, inputs), adapted, rtol=1e-4, atol=1e-4 * float(adapted.abs().max()))


# diffusers itself cannot fuse LTX-2's projections, nor SD3's with dual attention, and Cosmos has no such method.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"LTX2VideoTransformer3DModel", "CosmosTransformer3DModel"}))
def test_fused_projections_have_windows(name: str) -> None:
    model, inputs = tiny(name, **({"dual_attention_layers": ()} if name.startswith("SD3") else {}))
    whole = output(model, inputs)
    count = neighborhood(model, 3)
    expected = output(model, inputs)
    unpatch(model)
    model.fuse_qkv_projections()
    fused = processors(model)
    assert neighborhood(model, 3) == count
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert unpatch(model) == count
    assert processors(model) == fused
    torch.testing.assert_close(output(model, inputs), whole, rtol=1e-5, atol=1e-5)


def test_windows_that_are_lost_are_missed() -> None:
    """Fusing the projections of SD3 and CogVideoX sets processors, and so does undoing it."""
    model, inputs = tiny("CogVideoXTransformer3DModel")
    whole = output(model, inputs)
    neighborhood(model, 3)
    expected = output(model, inputs)
    model.fuse_qkv_projections()
    with raises_naming("layers [0, 1]", "FusedCogVideoXAttnProcessor2_0", "fuse_qkv_projections", "unpatch"):
        output(model, inputs)
    assert unpatch(model) == 0
    assert not model._forward_pre_hooks
    torch.testing.assert_close(output(model, inputs), whole, rtol=1e-5, atol=1e-5)
    assert neighborhood(model, 3) == 2
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-5, atol=1e-5)

    model, inputs = tiny("CogVideoXTransformer3DModel")
    model.fuse_qkv_projections()
    neighborhood(model, 3, layers=[1])
    model.unfuse_qkv_projections()
    with raises_naming("layers [1]", "CogVideoXAttnProcessor2_0"):
        output(model, inputs)
    assert neighborhood(model, 3) == 2
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-5, atol=1e-5)


def test_layers_that_were_taken_out_need_no_windows() -> None:
    model, inputs = tiny("FluxTransformer2DModel")
    neighborhood(model, 3)
    gone = model.single_transformer_blocks[0]
    del model.single_transformer_blocks[0]
    assert output(model, inputs).isfinite().all()
    gone.attn.set_processor(type(gone.attn.processor).__bases__[0]())
    assert output(model, inputs).isfinite().all()


def test_a_compiled_block_has_windows() -> None:
    model, inputs = tiny("FluxTransformer2DModel")
    neighborhood(model, 3)
    expected = output(model, inputs)
    model.single_transformer_blocks[0].compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(output(model, inputs), expected)


def test_refusals_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("FluxTransformer2DModel")
    with raises_naming("Linear", "FluxTransformer2DModel", "WanTransformer3DModel", "the transformer"):
        neighborhood(nn.Linear(2, 2), 3)
    sana = diffusers.SanaVideoTransformer3DModel(
        **CHANNELS, num_attention_heads=2, attention_head_dim=12, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8, num_layers=1,
    )  # fmt: skip
    linear = processors(sana)
    with raises_naming("SanaVideoTransformer3DModel is not supported"):
        neighborhood(sana, 3)
    assert processors(sana) == linear
    with raises_naming("kernel_size", "2 of them", "(3, 3, 3)"):
        neighborhood(model, (3, 3, 3))
    for wrong in (3.0, "3", "33", (3, 3.0), None, True):
        with raises_naming("kernel_size", "2 of them", repr(wrong)):
            neighborhood(model, wrong)  # pyright: ignore[reportArgumentType]
    with raises_naming("stride (4, 4)", "kernel_size (3, 3)"):
        neighborhood(model, 3, stride=4)
    with raises_naming("layers [3, -4]", "the 3 of the model"):
        neighborhood(model, 3, layers=[0, 3, -4])
    for wrong in (1, slice(0, 2), [0.0], ["single_transformer_blocks.0"], "01", [True, False, True]):
        with raises_naming("layers must be indices", "range(8, 32)", repr(wrong)):
            neighborhood(model, 3, layers=wrong)  # pyright: ignore[reportArgumentType]
    with raises_naming("layers [3, 4, 5, 6, ...]", "0 to 2"):
        neighborhood(model, 3, layers=range(32))
    assert not model._forward_pre_hooks
    neighborhood(model, 3)
    two = torch.cat([inputs["img_ids"]] * 2)
    with raises_naming("60 tokens", "reference images"):
        output(model, inputs | {"img_ids": two, "hidden_states": torch.randn(1, 60, 4)})
    with raises_naming("FluxTransformer2DModel", diffusers.__version__, "img_ids"):
        output(model, {name: x for name, x in inputs.items() if name != "img_ids"})
    original = diffusers.models.transformers.transformer_flux.FluxAttnProcessor.__call__
    monkeypatch.setattr(
        "diffusers.models.transformers.transformer_flux.FluxAttnProcessor.__call__",
        lambda *args, **kwargs: (original(*args, **kwargs), original(*args, **kwargs))[0],
    )
    with raises_naming("FluxAttnProcessor", diffusers.__version__, "attention backends", error=RuntimeError):
        output(model, inputs)
    with raises_naming("does not fit a grid", "the whole model"):
        video, _ = tiny("WanTransformer3DModel")
        neighborhood(video, 3)
        video.blocks[0].attn1(torch.randn(1, 60, 24))
    qwen, inputs = tiny("QwenImageTransformer2DModel")
    neighborhood(qwen, 3)
    with raises_naming("img_shapes", "more than one image"):
        output(qwen, inputs | {"img_shapes": [[(1, 5, 3), (1, 5, 3)]] * 2})
