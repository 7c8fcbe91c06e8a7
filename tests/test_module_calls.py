"""The modules under hooks, offloading, sharding, casts, the meta device, quantisation and function transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ModuleT, randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call, grad, vmap

import natten_layers
from natten_layers import (
    AxialRoPE,
    DecoderLM,
    DecoderLMConfig,
    Denoiser,
    HDiT,
    HDiTConfig,
    LevelConfig,
    NeighborhoodAttention1D,
    NeighborhoodGQA,
    Positions,
    RoPE,
)
from natten_layers.modules import GEGLU, AdaRMSNorm, RMSNorm, make_axial_pos
from natten_layers.modules.hdit_layers import FourierFeatures, TransformerLayer

F64 = torch.float64
HALVES = (torch.bfloat16, torch.float16)


def randomized(module: ModuleT) -> ModuleT:
    """In evaluation mode, with the same noise in each of its parameters at every call."""
    torch.manual_seed(1)
    return randomize(module, 0.3).eval()


def hdit() -> HDiT:
    fine = LevelConfig(1, 16, d_head=8, kernel_size=3, num_kv_heads=1, num_registers=2, sink="learned")
    coarse = LevelConfig(1, 16, "shifted-window", d_head=8, window_size=2)
    options: dict[str, Any] = {"patch_size": (2, 2), "mapping_width": 16, "mapping_depth": 1, "mapping_cond_dim": 4}
    return HDiT(HDiTConfig((fine, coarse), num_classes=3, **options))


def decoder(**options: Any) -> DecoderLM:
    sizes: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2}
    return DecoderLM(DecoderLMConfig(**sizes, num_layers=2, num_kv_heads=1, head_dim=8, windows=(3, None), **options))


def gemma() -> DecoderLM:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    norms: dict[str, Any] = {"qk_norm": True, "post_norms": True, "zero_centered_norm": True}
    return decoder(tie_embeddings=True, embedding_scale=4.1, windowed_rope=rope, **norms)


def layer(qk_norm: Any = "rms") -> NeighborhoodGQA:
    rope = AxialRoPE(8, 2, num_kv_heads=1)
    options: dict[str, Any] = {"num_registers": 2, "registers_attend": True, "sink": "learned", "num_kv_heads": 1}
    return NeighborhoodGQA(16, 2, 3, qk_norm=qk_norm, rope=rope, **options)


def draw(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(2)).to(dtype)


def denoise(model: nn.Module, dtype: torch.dtype = F64) -> Tensor:
    conditions = {"class_cond": torch.tensor([0, 3]), "mapping_cond": draw(2, 4, dtype=dtype)}
    sigma = torch.tensor([0.02, 9.0], dtype=torch.promote_types(dtype, torch.float32))
    return model(draw(2, 3, 16, 8, dtype=dtype), sigma, **conditions, aug_cond=draw(2, 9, dtype=dtype))


IDS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))


def attend(model: nn.Module, dtype: torch.dtype = F64) -> Tensor:
    # Distant positions that bf16 cannot represent.
    positions = 20 / 7 * make_axial_pos(5, 4, dtype=torch.promote_types(dtype, torch.float32))
    tokens, registers = model(draw(2, 5, 4, 16, dtype=dtype), positions=Positions(positions))
    return torch.cat((tokens.flatten(1, 2), registers), 1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "HDiT": (hdit, denoise),
    "gemma": (gemma, lambda model, dtype=None: model(IDS)),
    "decoder with registers and sinks": (
        lambda: decoder(num_registers=2, sink="learned", qkv_bias=True),
        lambda model, dtype=None: model(IDS, attention_mask=torch.tensor([[0] * 3 + [1] * 4, [1] * 7])),
    ),
    "rms": (layer, attend),
    "cosine": (lambda: layer("cosine"), attend),
    "natten": (
        lambda: natten_layers.NeighborhoodAttention2D(16, 2, 3),
        lambda model, dtype=F64: model(draw(2, 5, 4, 16, dtype=dtype)),
    ),
}
BY_NAME = pytest.mark.parametrize("name", MODELS)


# --- Hooks and offloading


@BY_NAME
def test_hooks_on_every_module_fire(name: str) -> None:
    make, run = MODELS[name]
    model = randomized(make()).double()
    expected, calls = run(model), {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):  # has no forward
            calls[path] = 0
            # The registered function is this one, so the default binds this path.
            module.register_forward_hook(lambda *_, path=path: calls.update({path: calls[path] + 1}))
    torch.testing.assert_close(run(model), expected, rtol=1e-12, atol=1e-12)
    assert [path for path, count in calls.items() if not count] == []


def offload(module: nn.Module, *, wrap: bool) -> None:
    """Keep each module's own tensors on the meta device except during its forward, by hooks or like accelerate."""
    owners: list[dict[str, Any]] = [module._parameters, module._buffers]
    held = [(owner, key, value) for owner in owners for key, value in owner.items() if value is not None]
    blank = [nn.Parameter(v.to("meta")) if isinstance(v, nn.Parameter) else v.to("meta") for _, _, v in held]

    def put(*_: object) -> None:
        for owner, key, value in held:
            owner[key] = value

    def take(*_: object) -> None:
        for (owner, key, _), nothing in zip(held, blank, strict=True):
            owner[key] = nothing

    take()
    if not wrap:
        module.register_forward_pre_hook(put)
        module.register_forward_hook(take)
        return
    forward = module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        put()
        try:
            return forward(*args, **kwargs)
        finally:
            take()

    module.forward = wrapped


@BY_NAME
@pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrapped forward"])
def test_tensors_are_needed_only_during_their_modules_forward(name: str, wrap: bool) -> None:
    make, run = MODELS[name]
    model = randomized(make()).double()
    expected = run(model)
    for module in list(model.modules()):
        offload(module, wrap=wrap)
    torch.testing.assert_close(run(model), expected, rtol=1e-12, atol=1e-12)


def test_offloaded_text_models_generate() -> None:
    model = randomized(gemma())
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    expected = [model.generate(IDS, 5, attention_mask=m) for m in (None, mask)]  # pyright: ignore[reportCallIssue]
    for module in list(model.modules()):
        offload(module, wrap=True)
    for m, wanted in zip((None, mask), expected, strict=True):
        assert torch.equal(model.generate(IDS, 5, attention_mask=m), wanted)  # pyright: ignore[reportCallIssue]


def test_attention_is_checkpointed_where_it_is_wrapped() -> None:
    model, calls = randomized(hdit()), []
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, NeighborhoodGQA))
    model.down_levels[0][0].self_attn.attn.qkv.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    out = denoise(model, torch.float32)
    before = len(calls)
    out.square().sum().backward()
    assert len(calls) == 2 * before > 0


def test_another_norm_in_the_place_of_ours_is_called() -> None:
    model = randomized(layer()).double()
    for name in ("q_norm", "k_norm"):
        own = getattr(model, name)
        theirs = nn.RMSNorm(8, own.eps, dtype=F64)
        theirs.load_state_dict(own.state_dict())
        expected = attend(model)
        model.register_module(name, theirs)
        torch.testing.assert_close(attend(model), expected, rtol=1e-12, atol=1e-12)


# --- Sharding with mixed precision


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")  # a projection comes last
@pytest.mark.parametrize("name", ["HDiT", "gemma", "rms", "cosine"])
def test_sharding_in_half_precision_casts_no_position(name: str, one_process: None) -> None:
    """Sharded modules, whose inputs FSDP casts, compute the same as the model in half precision."""
    make, run = MODELS[name]
    model = randomized(make())
    expected = run(copy.deepcopy(model).bfloat16(), torch.bfloat16)
    mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    blocks = [m for m in model.modules() if isinstance(m, TransformerLayer | NeighborhoodGQA) or "layers" in vars(m)]
    blocks = [*blocks, *(model.model.layers if isinstance(model, DecoderLM) else [])]
    for block in reversed(blocks):
        if block is not model:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    # The noise level is an argument of the whole model.
    root = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=name != "HDiT")
    fully_shard(model, mesh=mesh, mp_policy=root)
    actual = run(model, torch.bfloat16)
    assert torch.equal(actual, expected)
    actual.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if isinstance(model, DecoderLM):
        assert model.generate(IDS, 3).shape == (2, 10)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu:UserWarning")
@pytest.mark.parametrize("name", ["HDiT", "gemma", "rms"])
def test_sharded_models_are_initialised_off_the_meta_device(name: str, one_process: None, empty_is_nan: None) -> None:
    make, run = MODELS[name]
    model, expected = on_meta(make), on_cpu(make)
    mesh = init_device_mesh("cpu", (1,))
    for module in model.modules():
        if isinstance(module, NeighborhoodGQA) and module is not model:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()  # pyright: ignore[reportCallIssue]
    for own, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(own.full_tensor(), wanted)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(run(model, torch.float32), run(expected, torch.float32))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
@pytest.mark.parametrize("name", ["HDiT", "gemma"])
def test_sharded_models_are_gathered_before_they_are_saved(name: str, one_process: None, tmp_path: Path) -> None:
    """The way out that the error names works."""
    make, _ = MODELS[name]
    expected = make()
    sharded, whole = copy.deepcopy(expected), on_meta(make)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    for model, word in ((sharded, "get_model_state_dict"), (whole, "has no values")):
        with pytest.raises(ValueError, match=word):
            model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    assert not list(tmp_path.iterdir())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole.load_state_dict(get_model_state_dict(sharded, options=options), assign=True)
    whole.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    found = type(expected).from_pretrained(tmp_path)  # pyright: ignore[reportAttributeAccessIssue]
    assert all(torch.equal(own, wanted) for own, wanted in zip(found.parameters(), expected.parameters(), strict=True))


def test_positions_in_half_precision_are_an_error() -> None:
    x = torch.randn(1, 5, 4, 16)
    for dtype in HALVES:
        with pytest.raises(ValueError, match=rf"positions are {dtype}, .*Positions\(tensor\)"):
            layer()(x, positions=make_axial_pos(5, 4).to(dtype))
        with pytest.raises(ValueError, match=f"positions are {dtype}"):
            RoPE(8)(x, x, torch.arange(5).to(dtype))
    assert Positions(x).to("meta").tensor.is_meta  # like libraries that move arguments between devices


# --- Constants in half precision


@pytest.fixture
def default_bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


CONSTANTS: dict[str, Callable[[], nn.Module]] = {
    "AxialRoPE": lambda: AxialRoPE(16, 2),
    "own frequencies": lambda: AxialRoPE(8, 2, freqs=torch.tensor([[1.001], [2.002]], dtype=torch.float32)),
    "RoPE": lambda: RoPE(16),
    "HDiT": hdit,
    "gemma": gemma,
}
EXPECTED = {name: dict(make().named_buffers()) for name, make in CONSTANTS.items()}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_ignore_a_half_precision_default(name: str, default_bfloat16: None) -> None:
    for path, buffer in CONSTANTS[name]().named_buffers():
        assert buffer.dtype == torch.float32, path
        if "emb" not in path:  # those of embeddings are random
            assert torch.equal(buffer, EXPECTED[name][path]), path


def test_positions_ignore_a_half_precision_default(default_bfloat16: None) -> None:
    assert make_axial_pos(3, 4).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_survive_casts(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(CONSTANTS[name]())
    expected = {path: buffer.clone() for path, buffer in model.named_buffers()}
    for cast in (model.to(dtype), model.to("cpu", dtype), model.double().to(dtype)):
        for path, buffer in cast.named_buffers():
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, expected[path]), path
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(buffer.dtype == F64 for buffer in model.double().buffers())


@pytest.mark.parametrize("in_features", [1, 9])
def test_fourier_features_are_computed_in_single_precision(in_features: int) -> None:
    features, x = FourierFeatures(in_features, 64), draw(5, in_features, dtype=torch.float32)
    angle = 2 * torch.pi * x.double() @ features.weight.double().T
    expected = features(x)
    torch.testing.assert_close(expected.double(), torch.cat((angle.cos(), angle.sin()), -1), rtol=0, atol=3e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(x), expected)
    for dtype in HALVES:
        assert torch.equal(features.to(dtype)(x), expected)
        assert torch.equal(features(x.to(dtype)), features(x.to(dtype).float()))


# --- The meta device

PUBLIC: dict[str, Callable[[], nn.Module]] = {
    **{name: make for name, (make, _) in MODELS.items()},
    "AdaRMSNorm": lambda: AdaRMSNorm(8, 4),
    "AxialRoPE": CONSTANTS["AxialRoPE"],
    "Denoiser": lambda: Denoiser(hdit()),
    "GEGLU": lambda: GEGLU(8, 12),
    "NeighborhoodAttention1D": lambda: natten_layers.NeighborhoodAttention1D(16, 2, 3),
    "NeighborhoodAttention3D": lambda: natten_layers.NeighborhoodAttention3D(16, 2, 3),
    "RMSNorm": lambda: RMSNorm(8, zero_centered=True),
    "RoPE": CONSTANTS["RoPE"],
}


@pytest.fixture
def empty_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make new tensors NaN, so that any that ``reset_parameters`` leaves out is found."""
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: torch.full_like(t, torch.nan, **options))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        model = make()
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    return model.eval()


def on_cpu(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return make().eval()


@pytest.mark.parametrize("name", PUBLIC)
def test_resetting_is_making_anew(name: str, empty_is_nan: None) -> None:
    """``reset_parameters`` gives the constructor's parameters and constants, drawing the same random numbers."""
    torch.manual_seed(3)
    expected = PUBLIC[name]()
    after = torch.rand(1)
    model = on_meta(PUBLIC[name]).to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()  # pyright: ignore[reportCallIssue]
    assert torch.equal(torch.rand(1), after)
    for tensors in ("named_parameters", "named_buffers"):
        wanted = dict(getattr(expected, tensors)())
        found = dict(getattr(model, tensors)())
        assert found.keys() == wanted.keys()
        for path, tensor in found.items():
            assert tensor.dtype == wanted[path].dtype, path
            assert torch.equal(tensor, wanted[path]), path


@BY_NAME
def test_every_module_can_reset_what_it_owns(name: str) -> None:
    for module in MODELS[name][0]().modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            assert callable(getattr(module, "reset_parameters", None)), type(module)


@BY_NAME
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_a_model_off_the_meta_device(name: str, assign: bool, empty_is_nan: None) -> None:
    make, run = MODELS[name]
    expected, model = randomized(make()), on_meta(make)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict(), assign=assign)
    assert torch.equal(run(model, torch.float32), run(expected, torch.float32))


def test_models_run_on_the_meta_device() -> None:
    """As those do who count operations or ask for shapes: nothing there may be asked for autocast."""
    x, sigma, classes = torch.empty(2, 3, 16, 8), torch.empty(2), torch.empty(2, dtype=torch.int64)
    conditions = {"class_cond": classes.to("meta"), "mapping_cond": torch.empty(2, 4, device="meta")}
    assert on_meta(hdit)(x.to("meta"), sigma.to("meta"), **conditions).shape == x.shape
    assert on_meta(gemma)(IDS.to("meta")).shape == (2, 7, 31)
    assert on_meta(layer)(torch.empty(2, 5, 4, 16, device="meta"))[0].is_meta
    assert on_meta(lambda: RMSNorm(8))(torch.empty(3, 8, device="meta")).is_meta


def test_models_are_made_and_run_without_memory() -> None:
    """Under ``FakeTensorMode`` tensors have devices, but no values."""
    with FakeTensorMode():
        ids, classes = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        text, image = gemma(), hdit()
        outs = [
            text(ids),
            image(torch.ones(2, 3, 16, 8), torch.ones(2), class_cond=classes, mapping_cond=torch.ones(2, 4)),
        ]
        torch.autograd.backward([out.sum() for out in outs])
    assert [out.shape for out in outs] == [(2, 7, 31), (2, 3, 16, 8)]
    assert all(isinstance(p.grad, FakeTensor) for model in (text, image) for p in model.parameters())


def test_own_frequencies_come_back(empty_is_nan: None) -> None:
    rope = CONSTANTS["own frequencies"]()
    for blank in (copy.deepcopy(rope).to_empty(device="cpu"), copy.deepcopy(rope).to("meta").to_empty(device="cpu")):
        assert torch.equal(blank.freqs, rope.freqs)  # pyright: ignore[reportArgumentType]


# --- Quantisation, transforms, default devices


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.* are deprecated:UserWarning")
@BY_NAME
def test_linear_layers_can_be_quantized(name: str) -> None:
    make, run = MODELS[name]
    model = randomized(make())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        expected, actual = run(model, torch.float32), run(quantized, torch.float32)
    assert not torch.equal(actual, expected)
    assert (actual - expected).norm() < 0.5 * expected.norm()  # else the quantised model would compute something else


def test_gradients_of_each_image() -> None:
    model = randomized(hdit()).double()
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    x, sigma, cond = draw(2, 3, 16, 8), torch.tensor([0.02, 9.0], dtype=F64), draw(2, 4)
    classes = torch.tensor([0, 3])

    def loss(parameters: dict[str, Tensor], x: Tensor, sigma: Tensor, classes: Tensor, cond: Tensor) -> Tensor:
        conditions = {"class_cond": classes[None], "mapping_cond": cond[None]}
        return functional_call(model, parameters, (x[None], sigma[None]), conditions).square().sum()

    each = vmap(grad(loss), (None, 0, 0, 0, 0))(parameters, x, sigma, classes, cond)
    for i in range(2):
        for name, wanted in grad(loss)(parameters, x[i], sigma[i], classes[i], cond[i]).items():
            torch.testing.assert_close(each[name][i], wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="class_cond holds; classes are 0 to 2, and 3 is unconditional"):
        vmap(grad(loss), (None, 0, 0, 0, 0))(parameters, x, sigma, classes + 2, cond)


def test_embeddings_are_scaled_on_their_own_device() -> None:
    """The factor is rounded to the embeddings' dtype, as in Gemma's training, and ignores torch's default device."""
    model = randomized(gemma()).bfloat16()
    expected, seen = model(IDS), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # pyright: ignore
    with torch.device("meta"):
        assert torch.equal(model(IDS), expected)
    factor = torch.tensor(4.1).bfloat16()
    assert torch.equal(seen[0], model.model.embed_tokens(IDS) * factor)  # pyright: ignore
    assert not torch.equal(seen[0], model.model.embed_tokens(IDS) * 4.1)  # pyright: ignore


@pytest.mark.parametrize("given", [[[1, 2]], np.zeros((2, 4)), None, "text"], ids=lambda given: type(given).__name__)
def test_what_is_no_tensor_is_named(given: Any) -> None:
    x, sigma, model, attention = torch.ones(2, 3, 16, 8), torch.ones(2), hdit(), layer()
    calls: dict[str, Callable[[], object]] = {
        "x": lambda: attention(given),
        "input_ids": lambda: gemma()(given),
        "sigma": lambda: model(x, given, class_cond=torch.tensor([0, 3])),
        "query": lambda: AxialRoPE(16, 2)(given, x),
    }
    if given is not None:
        calls["class_cond"] = lambda: model(x, sigma, class_cond=given, mapping_cond=torch.ones(2, 4))
        calls["registers"] = lambda: attention(torch.ones(2, 5, 4, 16), registers=given)
        calls["positions"] = lambda: attention(torch.ones(2, 5, 4, 16), positions=given)
    calls |= {"x ": lambda: RMSNorm(8)(given), "x  ": lambda: NeighborhoodAttention1D(16, 2, 3)(given)}
    for name, call in calls.items():
        with pytest.raises(
            ValueError, match=rf"{name.strip()} must be a tensor, got (.* of type )?{type(given).__name__}"
        ):
            call()  # in one line: without (?s), a dot is no line break


def test_equal_configs_have_one_hash() -> None:
    """So that they are keys of dictionaries and caches, although options of RoPE are a mapping."""
    for config in (hdit().config, gemma().config):
        assert hash(config) == hash(copy.deepcopy(config))


def test_indices_out_of_range_and_of_other_dtypes_are_named() -> None:
    x, sigma, model, cond = torch.ones(2, 3, 16, 8), torch.ones(2), hdit(), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"input_ids holds \[-1, 999\]; tokens are 0 to"):
        gemma()(torch.tensor([[1, -1, 999]]))
    with pytest.raises(ValueError, match=r"input_ids holds \[\d{5}, (\d{5}, ){7}\.\.\.\], 60 in all; tokens are 0 to"):
        gemma()(torch.arange(10000, 10060).view(2, 30))
    with pytest.raises(ValueError, match=r"class_cond holds \[7, (7, ){7}\.\.\.\], 40 in all; classes are 0 to"):
        model(
            x[:1].expand(40, 3, 16, 8), torch.ones(40), class_cond=torch.full((40,), 7), mapping_cond=torch.ones(40, 4)
        )
    with pytest.raises(ValueError, match=r"class_cond has dtype torch\.float32; expected int64 or int32"):
        model(x, sigma, class_cond=torch.tensor([0.0, 1.0]), mapping_cond=cond)
    with pytest.raises(ValueError, match=r"x has dtype torch\.uint8; expected a floating point dtype"):
        model(x.byte(), sigma, class_cond=torch.tensor([0, 3]), mapping_cond=cond)


def test_nested_tensors_are_named() -> None:
    """By models and layers too, wherever a tensor goes in."""
    jagged = torch.nested.nested_tensor([torch.ones(4, 16), torch.ones(6, 16)], layout=torch.jagged)
    ids = torch.nested.nested_tensor([torch.arange(4), torch.arange(6)], layout=torch.jagged)
    x, sigma, classes = torch.ones(2, 3, 16, 8), torch.ones(2), torch.tensor([0, 3])
    attention, model, lm, cond = layer(), hdit(), gemma(), torch.ones(2, 4)
    calls: dict[str, Callable[[], object]] = {
        "registers": lambda: attention(torch.ones(2, 5, 4, 16), registers=jagged),
        "positions": lambda: attention(torch.ones(2, 5, 4, 16), positions=Positions(jagged)),
        "input_ids": lambda: lm(ids),
        "attention_mask": lambda: lm(IDS, attention_mask=ids),
        "x": lambda: model(jagged, sigma, class_cond=classes),
        "sigma": lambda: model(x, jagged, class_cond=classes),
        "aug_cond": lambda: model(x, sigma, aug_cond=jagged, class_cond=classes),
        "class_cond": lambda: model(x, sigma, class_cond=ids, mapping_cond=cond),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name} is a nested tensor.*pack .*\({name}.values\(\), with shapes"):
            call()
