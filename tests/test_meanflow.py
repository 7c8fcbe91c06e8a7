"""MeanFlow: its loss against hand-written derivatives, its sampler, and training with it."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import raises_naming
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import compare_steps
from natten_layers import HDiT, HDiTConfig, LevelConfig, MeanFlow, operations
from natten_layers_cli import sample_hdit, train_hdit
from natten_layers_cli.batches import Batch
from natten_layers_cli.diffusion import sample_meanflow
from natten_layers_cli.objectives import MEANFLOW, AverageVelocity
from natten_layers_cli.pictures import draw_grid

LEVELS = (
    LevelConfig(1, 16, d_head=8, kernel_size=3, num_kv_heads=1, num_registers=2, sink="zero"),
    LevelConfig(1, 16, "global", d_head=8),
)
CONFIG = HDiTConfig(
    levels=LEVELS, patch_size=(2, 2), input_size=(12, 12), num_classes=2, mapping_width=16, objective="meanflow"
)


def make_model(dtype: torch.dtype = torch.float64) -> HDiT:
    torch.manual_seed(0)
    model = HDiT(CONFIG).to(dtype)
    for parameter in model.parameters():  # as they begin, residual branches are zero
        nn.init.normal_(parameter, std=0.2)
    return model


def make_example(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, count, 3, 12, 12, generator=generator, dtype=dtype)
    return x, noise


class Linear(nn.Module):
    """u = a z + b t + c (t - r), whose derivative along a path of the velocity v is a v + b + c."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([0.5, -0.25, 0.75], dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor, *, interval: Tensor, shift: Tensor) -> Tensor:
        a, b, c = self.factors
        return a * z + (b * t + c * interval + shift)[:, None, None, None]


class LossOf(nn.Module):
    """The loss as a module's call, for ``torch.func.functional_call``."""

    def __init__(self, flow: MeanFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, *arguments: Tensor, **conditions: Tensor) -> Tensor:
        x, noise, t, r = arguments
        return self.flow.loss(x, noise, t, r, **conditions)


def test_the_target_is_that_of_finite_differences() -> None:
    """By hand: v - (t - r) (u at z + h v, t + h minus u at z - h v, t - h) / 2 h, with r where it is."""
    flow = MeanFlow(make_model())
    z, velocity = make_example(2)
    t, r, labels = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.2, 0.4]).double(), torch.tensor([0, 2])
    h = 1e-5
    with torch.no_grad():
        after, before = (flow(z + s * velocity, t + s, r, class_cond=labels) for s in (h, -h))
    expected = velocity - (t - r)[:, None, None, None] * (after - before) / (2 * h)
    found = flow.target(z, velocity, t, r, class_cond=labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert (found - velocity).abs().max() > 0.01  # or the derivative would not be seen
    assert not found.requires_grad


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_the_loss_of_a_linear_network_by_hand(power: float) -> None:
    network = Linear()
    flow = MeanFlow(network, sigma_data=0.5, power=power)
    x, noise = make_example(3)
    t, r = torch.tensor([0.8, 0.6, 0.3]).double(), torch.tensor([0.1, 0.5]).double()
    shift = torch.tensor([0.0, 1.0, 2.0]).double()
    losses = flow.loss(x, noise, t, r, shift=shift)

    a, b, c = network.factors
    interval = torch.tensor([0.7, 0.1, 0.0]).double()
    z = (1 - t)[:, None, None, None] * x / 0.5 + t[:, None, None, None] * noise
    velocity = noise - x / 0.5
    target = (velocity - interval[:, None, None, None] * (a * velocity + b + c)).detach()
    output = a * z + (b * t + c * interval + shift)[:, None, None, None]
    errors = (output - target).square().mean((1, 2, 3))
    expected = errors / (errors + 1e-3).detach() ** power
    torch.testing.assert_close(losses, expected)
    # Gradients too: neither the target nor the weight passes any on.
    gradients = [torch.autograd.grad(loss.sum(), network.factors)[0] for loss in (losses, expected)]
    torch.testing.assert_close(*gradients)


def test_a_model_in_half_precision_learns_from_images_of_its_dtype() -> None:
    """Times, and what the loss adds and subtracts, are in fp32."""
    x, noise = make_example(4, torch.bfloat16)
    t, r, labels = torch.tensor([0.9, 0.6, 0.4, 0.2]), torch.tensor([0.3, 0.5]), torch.tensor([0, 1, 2, 0])

    def step(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model = make_model(torch.float32).bfloat16().to(dtype)  # of the same weights
        flow = MeanFlow(model, power=0)
        loss = flow.loss(x.to(dtype), noise.to(dtype), t, r, class_cond=labels)
        gradients = torch.autograd.grad(loss.sum(), list(flow.parameters()))
        return loss.detach(), torch.cat([g.flatten() for g in gradients])

    for found, right in zip(step(torch.bfloat16), step(torch.float64), strict=True):
        assert (found - right).norm() < 0.05 * right.norm()
    assert step(torch.bfloat16)[0].dtype == torch.float32
    target = MeanFlow(make_model(torch.float32).bfloat16()).target(x[:2], noise[:2], t[:2], r, class_cond=labels[:2])
    assert target.dtype == torch.bfloat16


@pytest.mark.parametrize("where", ["inference mode", "reentrant checkpoint"])
def test_the_derivative_is_taken_where_torch_has_switched_forward_mode_off(where: str) -> None:
    flow = MeanFlow(make_model())
    x, noise = make_example(2)
    t, r, labels = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.2]).double(), torch.tensor([0, 2])

    def loss(x: Tensor) -> Tensor:
        return flow.loss(x, noise, t, r, class_cond=labels)

    expected = loss(x)
    if where == "inference mode":
        with torch.inference_mode():
            assert torch.equal(loss(x.clone()), expected)
        return
    found = checkpoint(loss, x.requires_grad_(), use_reentrant=True)
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)
    parameters = list(flow.parameters())
    gradients = torch.autograd.grad(expected.sum(), parameters)
    found.sum().backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_tensors_may_be_expanded() -> None:
    """Torch has no tangent of such a tensor."""
    flow = MeanFlow(make_model())
    x, noise = make_example(2)
    t, r, labels = torch.tensor([0.9]).double(), torch.tensor([0.2]).double(), torch.tensor([0, 2])
    expected = flow.loss(x, noise, t.repeat(2), r.repeat(2), class_cond=labels)
    assert torch.equal(flow.loss(x, noise, t.expand(2), r.expand(2), class_cond=labels), expected)
    one, copies = x[:1].expand_as(x), x[:1].repeat(2, 1, 1, 1)
    found, expected = (flow.target(z, noise, t.repeat(2), r.repeat(2), class_cond=labels) for z in (one, copies))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("where", ["jvp", "jacfwd", "dual level", "vmap", "grad of vmap", "vmap over parameters"])
def test_a_derivative_that_torch_does_not_have_is_named(where: str) -> None:
    flow = MeanFlow(Linear(), sigma_data=1.0)
    x, noise = make_example(4)
    times = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.2]).double()
    options = {"shift": torch.zeros(2).double()}
    parameters = {name: torch.stack([p.detach()] * 2) for name, p in LossOf(flow).named_parameters()}

    def loss(x: Tensor, noise: Tensor) -> Tensor:
        return flow.loss(x, noise, *times, **options)

    def mapped(scale: Tensor) -> Tensor:
        return torch.func.vmap(loss)(scale * x.unflatten(0, (2, 2)), noise.unflatten(0, (2, 2))).sum()

    def with_parameters(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(LossOf(flow), parameters, (x[:2], noise[:2], *times), options)

    calls: dict[str, Callable[[], object]] = {
        "jvp": lambda: torch.func.jvp(loss, (x[:2], noise[:2]), (x[2:], noise[2:])),
        "jacfwd": lambda: torch.func.jacfwd(loss)(x[:2], noise[:2]),
        "dual level": lambda: loss(x[:2], noise[:2]),
        "vmap": lambda: mapped(torch.ones(())),
        "grad of vmap": lambda: torch.func.grad(mapped)(torch.ones(()).double()),
        "vmap over parameters": lambda: torch.func.vmap(with_parameters)(parameters),
    }
    way_out = "make the mapped axis a part of the batch" if "vmap" in where else "call it outside of torch.func.jvp"
    with (
        forward_ad.dual_level() if where == "dual level" else nullcontext(),
        raises_naming(way_out, error=NotImplementedError),
    ):
        calls[where]()


def test_gradients_of_samples() -> None:
    """By ``vmap(grad(loss))``, of images that each learn an average velocity."""
    flow = MeanFlow(Linear(), sigma_data=1.0)
    x, noise = make_example(3)
    t, r = torch.tensor([0.9, 0.5, 0.3]).double(), torch.tensor([0.2, 0.1, 0.3]).double()
    parameters = {name: p.detach() for name, p in LossOf(flow).named_parameters()}

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        batch, shift = tuple(part[None] for part in sample), torch.zeros(1).double()
        return torch.func.functional_call(LossOf(flow), parameters, batch, {"shift": shift}).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, x, noise, t, r)
    for i, of_sample in enumerate(found["flow.model.factors"]):
        expected = torch.func.grad(loss)(parameters, x[i], noise[i], t[i], r[i])
        torch.testing.assert_close(of_sample, expected["flow.model.factors"])


def test_ddp_takes_the_derivative_without_its_buffers(tmp_path: Path) -> None:
    x, noise = make_example(2)
    t, r = torch.tensor([0.8, 0.6]).double(), torch.tensor([0.1]).double()
    labels = torch.tensor([0, 1])
    plain = MeanFlow(make_model()).loss(x, noise, t, r, class_cond=labels)

    def parallel() -> Tensor:
        flow = MeanFlow(DistributedDataParallel(make_model()), sigma_data=1.0)
        loss = flow.loss(x, noise, t, r, class_cond=labels)
        loss.sum().backward()
        return loss.detach()

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loss = parallel()
    finally:
        gc.collect()  # a model that outlives its group has gloo's threads and its destructor wait for each other
        dist.destroy_process_group()
    torch.testing.assert_close(loss, plain.detach())


@pytest.mark.parametrize("whole", [False, True])
def test_a_network_stays_compiled_beside_its_derivative(whole: bool) -> None:
    """Dynamo cannot compile a function under jvp, and after having tried it never compiles it again."""
    runs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        return lambda *inputs: runs.append(graph) or graph(*inputs)

    network = Linear()
    flow = MeanFlow(network, sigma_data=1.0)
    x, noise = make_example(2)
    t, r, shift = (torch.tensor(pair).double() for pair in ([0.8, 0.6], [0.1, 0.5], [0.0, 1.0]))
    plain = flow.loss(x, noise, t, r, shift=shift)
    loss = torch.compile(flow.loss, backend=backend) if whole else flow.loss
    if not whole:
        flow.compile(backend=backend)
    for count in (1, 2):
        assert torch.equal(loss(x, noise, t, r, shift=shift), plain)
        assert len(runs) == count * len(set(runs)) > 0


def test_fused_kernels_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative of an HDiT, taken without a graph, and the backward pass beside it, interpreted."""
    x, noise = make_example(2)
    t, r, labels = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.2]).double(), torch.tensor([0, 1])

    def step(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        flow = MeanFlow(make_model(torch.float32).to(dtype), power=0)
        loss = flow.loss(*(tensor.to(dtype) for tensor in (x, noise, t, r)), class_cond=labels).sum()
        return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow.parameters()))])

    expected = step(torch.float64)
    why, asked = operations.why_eager, []

    def fused(impl: operations.Impl, *arguments: Any) -> Any:
        asked.append(impl)
        return why("fused" if impl == "auto" else impl, *arguments)

    monkeypatch.setattr(operations, "why_eager", fused)
    for found, right in zip(step(torch.float32), expected, strict=True):
        assert (found - right).norm() < 1e-4 * right.norm()
    assert asked


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_computes_the_same_derivative_and_gradients(compiled: bool) -> None:
    """By the fused kernels, with a network that is compiled but for its derivative, and in half precision nearly so."""
    x, noise = make_example(4, torch.float32)
    t, r, labels = torch.tensor([0.9, 0.6, 0.4, 0.2]), torch.tensor([0.3, 0.5]), torch.tensor([0, 1, 2, 0])

    def step(device: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        flow = MeanFlow(make_model(torch.float32).to(device))
        if compiled and device == "cuda":
            flow.compile()
        arguments = [tensor.to(device) for tensor in (x, noise, t, r)]
        with torch.autocast(device, dtype, enabled=dtype is not None):
            flow.loss(*arguments, class_cond=labels.to(device)).sum().backward()
            z, velocity, late, early = (tensor[:2] for tensor in arguments)
            change = flow.target(z, velocity, late, early, class_cond=labels[:2].to(device)) - velocity
        gradients = [p.grad.flatten().cpu() for p in flow.parameters() if p.grad is not None]
        return change.cpu(), torch.cat(gradients)

    expected = step("cpu")
    for dtype, most in ((None, 1e-3), (torch.bfloat16, 5e-2)):
        for found, right in zip(step("cuda", dtype), expected, strict=True):
            assert (found - right).norm() < most * right.norm()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"power must be a number from 0 to 1, got 2"):
        MeanFlow(Linear(), sigma_data=1.0, power=2)
    with pytest.raises(ValueError, match=r"Linear has no config with a sigma_data"):
        MeanFlow(Linear())
    x, noise = make_example(1)
    with pytest.raises(ValueError, match=r"r has 2 times, more than the 1 of t"):
        MeanFlow(make_model()).loss(x, noise, torch.ones(1), torch.zeros(2))
    for r in (torch.tensor(0.0), torch.zeros(1, 1)):
        with pytest.raises(ValueError, match=rf"r has shape {re.escape(str(tuple(r.shape)))}; expected \[A\]"):
            MeanFlow(make_model()).loss(x, noise, torch.ones(1), r)
    x, noise = make_example(2)  # what would broadcast: one noise or one time for all images
    for n, t in ((noise[:1], torch.ones(2)), (noise, torch.ones(1))):
        with pytest.raises(ValueError, match=r"noise has shape .* but x has \(2, 3, 12, 12\)"):
            MeanFlow(Linear(), sigma_data=1.0).loss(x, n, t, torch.zeros(1), shift=torch.zeros(2))

    with pytest.raises(ValueError, match=r"class_cond must be a tensor, got 3 of type int"):
        MeanFlow(make_model()).loss(x, noise, torch.ones(2), torch.zeros(1), class_cond=3)  # pyright: ignore

    class Constant(nn.Module):
        def forward(self, z: Tensor, t: Tensor, *, interval: Tensor) -> Tensor:
            return torch.ones(2, 3, 12, 12)

    with pytest.raises(ValueError, match=r"model's output has no derivative in forward mode"):
        MeanFlow(Constant(), sigma_data=1.0).loss(x, noise, torch.ones(2), torch.zeros(2))


def test_the_second_time_is_of_this_objective_alone(tmp_path: Path) -> None:
    plain = HDiTConfig(levels=LEVELS, patch_size=(2, 2), mapping_width=16)
    assert "objective" not in plain.to_json()["model"]
    assert not any("interval" in key for key in HDiT(plain).state_dict())
    x, t = torch.zeros(1, 3, 12, 12), torch.ones(1)
    with pytest.raises(ValueError, match="has no use for interval, as its config has objective='diffusion'"):
        HDiT(plain)(x, t, interval=t)
    model = make_model(torch.float32)
    with pytest.raises(ValueError, match="needs interval"):
        model(x, t, class_cond=torch.tensor([0]))
    model.save_pretrained(tmp_path / "a.safetensors")
    again = HDiT.from_pretrained(tmp_path / "a.safetensors")
    assert again.config.objective == "meanflow"
    inputs = {"class_cond": torch.tensor([0]), "interval": t / 2}
    torch.testing.assert_close(again(x, 0 * t, **inputs), model(x, 0 * t, **inputs))
    assert not torch.equal(again(x, t, **inputs), again(x, t, class_cond=inputs["class_cond"], interval=t))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_average_velocities_lead_to_the_image_in_any_number_of_steps(steps: int) -> None:
    """All noise flows straight to one image c: the velocity is (z - c) / t over any stretch of time."""
    noise, image = make_example(2)
    seen = []

    def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        seen.append((t[0].item(), r[0].item()))
        return (z - image) / t[:, None, None, None]

    counted = []
    torch.testing.assert_close(sample_meanflow(velocity, noise, steps, counted.append), image)
    assert seen == [(i / steps, (i - 1) / steps) for i in range(steps, 0, -1)]
    assert counted == [1] * steps


def test_which_images_learn_averages_follows_from_their_place() -> None:
    """A quarter of twelve, in one batch of a process, and in the parts that three processes take of it."""
    objective = AverageVelocity(MEANFLOW)
    fields = {name: torch.zeros(12, 1) for name in Batch._fields}
    whole = Batch(**fields)._replace(
        place=torch.arange(12), uniform=torch.rand(12, 3), image=torch.arange(12.0)[:, None]
    )
    seen = []

    class Recorder(MeanFlow):
        def loss(self, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, **conditions: Tensor | None) -> Tensor:
            assert conditions["label"] is not None
            assert torch.equal(conditions["label"], x)
            seen.extend(x[: len(r), 0].tolist())
            return t

    for batches in ([whole], [Batch(*parts) for parts in zip(*(f.chunk(3) for f in whole), strict=True)]):
        seen.clear()
        for batch in batches:
            objective.losses(Recorder(Linear(), sigma_data=1.0), batch, 12, {"label": batch.image})
        assert sorted(seen) == [3, 7, 11]


def test_times_are_ordered_and_logit_normal() -> None:
    times = AverageVelocity(MEANFLOW | {"loc": 1.0, "scale": 2.0}).times(torch.tensor([[0.5, 0.975], [0.025, 0.5]]))
    expected = torch.tensor([[1 + 2 * 1.959964, 1.0], [1.0, 1 - 2 * 1.959964]]).sigmoid()
    torch.testing.assert_close(torch.stack(times), expected)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    content: dict[str, Any] = CONFIG.to_json()
    del content["model"]["objective"]
    content["model"]["sigma_data"] = 0.5
    content["model"]["sigma_sample_density"] = {"type": "cosine-interpolated"}
    content["dataset"] = {
        "type": "photographs",
        "short_side": 16,
        "files": {"cat": "chelsea.png", "brick": "brick.png"},
    }
    content["run"] = {"batch_size": 4, "demo_every": 0, "save_every": 1, "sample_n": 2, "num_workers": 0}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return path


def test_rows_of_a_grid_have_labels_and_columns_have_heads() -> None:
    images, heads = torch.ones(6, 3, 8, 8), ["cat", "a name that is far too long for its column"]
    picture, plain = draw_grid(images, 2, ["one", "two", ""], heads), draw_grid(images, 2)
    assert plain.size == (2 * (8 * 12 + 2), 3 * (8 * 12 + 2))  # small images are shown larger
    left, top = picture.width - plain.width, picture.height - plain.height

    def is_written(left: int, top: int, right: int, bottom: int) -> bool:
        return picture.crop((left, top, right, bottom)).convert("L").getextrema()[0] != 255

    assert [is_written(left + n * 98, 0, left + n * 98 + 98, top) for n in range(2)] == [True, True]
    assert [is_written(0, top + n * 98, left, top + n * 98 + 98) for n in range(3)] == [True, True, False]
    assert not is_written(left, top, picture.width, picture.height)  # over images
    assert not is_written(left + 97, 0, left + 99, top)  # each in its column


def test_training_resumes_bit_for_bit_and_samples_in_one_step(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, steps: int, *flags: str) -> int:
        arguments = ["--config", str(config), "--name", str(config.parent / name), "--end-step", str(steps), *flags]
        return train_hdit.main([*arguments, "--device", "cpu"])

    objective = ("--objective", "meanflow")
    assert train("whole", 3, *objective) == train("parts", 1, *objective) == train("parts", 3, *objective) == 0
    for suffix in ("_metrics.csv", ".safetensors", "_samples.png"):
        whole, parts = ((config.parent / f"{name}{suffix}").read_bytes() for name in ("whole", "parts"))
        assert whole == parts

    capsys.readouterr()
    assert train("parts", 4) == 2  # as a diffusion model, which the config says
    assert "model.objective is 'meanflow' there and None here" in capsys.readouterr().err

    checkpoint, output = str(config.parent / "whole.safetensors"), str(config.parent / "grid.png")
    grid = ["-n", "2", "--output", output, "--device", "cpu"]
    assert sample_hdit.main([checkpoint, *grid]) == 0
    record = sample_hdit.read_record(Path(output))
    assert (record["sampler"], record["steps"]) == ("meanflow", 1)
    assert record == sample_hdit.read_record(config.parent / "whole_samples.png")
    assert sample_hdit.main([checkpoint, "--reproduce", output, "--device", "cpu"]) == 0
    assert sample_hdit.main([checkpoint, *grid, "--steps", "4"]) == 0
    assert sample_hdit.read_record(Path(output))["sha256"] != record["sha256"]
    for flags, message in (
        (["--sampler", "heun"], "--sampler heun: this model's objective is meanflow; use meanflow"),
        (["--guidance", "2"], "--guidance 2.0 does not apply to average velocities"),
    ):
        assert sample_hdit.main([checkpoint, *grid, *flags]) == 2
        assert message in capsys.readouterr().err

    steps = config.parent / "steps.png"
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(compare_steps, "draw_grid", lambda *args: drawn.append(args) or draw_grid(*args))
    assert compare_steps.run([f"{checkpoint}:1,2", "--count", "3", "--output", str(steps), "--device", "cpu"]) == 0
    ((_, columns, *texts),) = drawn
    assert (columns, texts) == (3, [["meanflow, 1 step", "meanflow, 2 steps"], ["cat", "brick", "cat"]])
    renamed = HDiT.from_pretrained(checkpoint)
    renamed.config.other["dataset"]["class_names"] = ["dog", "brick"]
    renamed.save_pretrained(config.parent / "renamed.safetensors")
    with raises_naming("'cat', 'brick', 'cat'", "'dog', 'brick', 'dog'"):
        compare_steps.run([f"{checkpoint}:1", f"{config.parent / 'renamed.safetensors'}:1", "--count", "3"])
    for steps_missing in (checkpoint, f"{checkpoint}:", f"{checkpoint}:0,1"):
        with pytest.raises(SystemExit):
            compare_steps.run([steps_missing])
        assert "such as FILE:1,2,4" in capsys.readouterr().err
    for flag, value in (("--count", "0"), ("--device", "foo")):
        with pytest.raises(SystemExit, match="2"):
            compare_steps.run([f"{checkpoint}:1", flag, value])
        assert f"error: {flag}" in capsys.readouterr().err.splitlines()[-1]
