"""Data-parallel and fully sharded training: two processes with half the batch each match one process with all of it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessContext, start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from natten_layers import AxialRoPE, MeanFlow, NeighborhoodGQA
from natten_layers_cli.parallel import Processes

Kind = Literal["single", "ddp", "fsdp"]
Objective = Literal["plain", "duals", "jvp", "two passes"]
"""A loss without or with a tangent of the model in its target, and how the tangent is taken."""

SHARDED: tuple[Kind, ...] = ("ddp", "fsdp")
OBJECTIVES: tuple[Objective, ...] = ("plain", "duals", "jvp", "two passes")
UNSUPPORTED = {("ddp", "jvp")}
"""Under a transform of torch.func, DDP cannot rebuild its buckets, which it does in the second step."""
if TorchVersion(torch.__version__) < "2.13":  # FSDP2 has no rule for tangents where gradients are recorded
    UNSUPPORTED |= {("fsdp", "jvp"), ("fsdp", "duals")}
STEPS = 4
WORLD = 2


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [NeighborhoodGQA(16, 2, 3, num_kv_heads=1, num_registers=2, sink="learned", qk_norm="rms") for _ in "ab"]
    return nn.Sequential(*layers)


def loss_of(model: nn.Module, batch: Tensor, objective: Objective) -> Tensor:
    """The squared distance from a target, through which no gradient flows."""
    target = batch.roll(1, -1)
    out, tangent = torch.empty(0), torch.zeros_like(batch)
    if objective == "duals":
        with forward_ad.dual_level():
            out, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(batch, target)))
    elif objective == "jvp":
        out, tangent, *_ = torch.func.jvp(model, (batch,), (target,))
    elif objective == "two passes":
        with torch.no_grad(), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(batch, target))).tangent
    if objective in ("plain", "two passes"):
        out = model(batch)
    assert tangent is not None
    return (out - (target - 0.3 * tangent).detach()).square().mean()


def losses(kind: Kind, objective: Objective, rank: int, world: int, device: torch.device) -> Tensor:
    """``[STEPS]`` losses over the whole batch, every process seeing its own part of it."""
    model: nn.Module = make_model().to(device)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        mesh = init_device_mesh(device.type, (world,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    results = []
    for _ in range(STEPS):
        x = torch.randn(2 * WORLD, 4, 5, 16, generator=generator)
        batch = x.chunk(world)[rank].to(device)
        loss = loss_of(model, batch, objective)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        results.append(total.cpu() / world)
    return torch.stack(results)


def as_torchrun_sets(rank: int, world: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def worker(rank: int, device_type: str, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= as_torchrun_sets(rank, WORLD, port)
    warnings.filterwarnings("error", message="barrier")
    with Processes(device_type, fsdp=False) as processes:
        processes.barrier()
        values = torch.tensor([[rank, 5.0]], device=processes.device)
        assert processes.gather(values.T).tolist() == [[[float(r)], [5.0]] for r in range(WORLD)]
        results = {
            (kind, objective): losses(kind, objective, rank, WORLD, processes.device)
            for kind, objective in product(SHARDED, OBJECTIVES)
            if (kind, objective) not in UNSUPPORTED
        }
        if processes.first:
            torch.save(results, Path(folder) / "losses.pt")


def start(worker: Callable[..., None], arguments: tuple[Any, ...], device_type: str) -> ProcessContext:
    """Start the processes, on CPUs from one that has imported what takes longest; CUDA does not survive a fork."""
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "natten_layers_cli.parallel"])
    method = "spawn" if device_type == "cuda" else "forkserver"
    context = start_processes(worker, arguments, nprocs=WORLD, join=False, start_method=method)
    assert context is not None
    return context


def check(device: torch.device, folder: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = start(worker, (device.type, port, str(folder)), device.type)
    ends = time.monotonic() + 240
    while not context.join(timeout=5, grace_period=5):
        if time.monotonic() > ends:
            for process in context.processes:
                assert process is not None
                process.kill()
            pytest.fail("two processes did not end within 240 seconds")
    results = torch.load(folder / "losses.pt")
    for objective in OBJECTIVES:
        expected = losses("single", objective, 0, 1, device)
        assert expected[-1] < 0.99 * expected[0]  # the loss falls, so a wrong gradient is visible
        for kind in SHARDED:
            if (kind, objective) not in UNSUPPORTED:
                named = f"{kind}, {objective}: "
                torch.testing.assert_close(
                    results[kind, objective], expected, rtol=1e-6, atol=0.0, msg=lambda m, n=named: n + m
                )


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    check(torch.device("cpu"), tmp_path)


class AverageVelocity(nn.Module):
    """A network of an image and two times, with a buffer, which DDP copies from the first process to the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.times, self.attention = nn.Linear(2, 16), NeighborhoodGQA(16, 2, 3, rope=AxialRoPE(8, 2))

    def forward(self, z: Tensor, t: Tensor, interval: Tensor) -> Tensor:
        x = z.movedim(1, -1) + self.times(torch.stack([t, interval], -1))[:, None, None]
        return (x + self.attention(x)).movedim(-1, 1)


def meanflow_gradients(flow: MeanFlow, part: slice) -> list[Tensor]:
    """Of one image that learns an average and one that does not, or of a part of them."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, WORLD, 16, 4, 5, generator=generator)
    t, r = torch.tensor([0.9, 0.6]), torch.tensor([0.2])
    flow.loss(x[part], noise[part], t[part], r[part]).mean().backward()
    return [p.grad for p in flow.parameters() if p.grad is not None]


def meanflow_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=40))
    expected = meanflow_gradients(MeanFlow(AverageVelocity(), sigma_data=0.5), slice(None))
    compiled = partial(torch.compile, backend="eager")

    def check_step(wrap: Callable[[nn.Module], Any]) -> None:
        flow = MeanFlow(wrap(AverageVelocity()), sigma_data=0.5)
        for _ in range(2):  # DDP makes its buckets in the first step
            flow.zero_grad()
            found = meanflow_gradients(flow, slice(rank, rank + 1))
            torch.testing.assert_close(found, expected)

    try:
        check_step(DistributedDataParallel)
        check_step(lambda model: compiled(DistributedDataParallel(model)))
        check_step(lambda model: DistributedDataParallel(compiled(model)))
    finally:
        gc.collect()  # a model that outlives its group has gloo's threads and its destructor wait for each other
        dist.destroy_process_group()


def test_meanflow_in_compiled_ddp_has_the_gradients_of_one_process(tmp_path: Path) -> None:
    """Only one of the processes takes a derivative in forward mode."""
    context = start(meanflow_worker, (str(tmp_path),), "cpu")
    while not context.join():
        pass


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")  # a projection comes last
def test_models_end_before_their_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are deleted before their process group, else the process sometimes deadlocks or aborts at exit."""
    for name, value in as_torchrun_sets(rank=0, world=1, port=0).items():
        monkeypatch.setenv(name, value)
    models: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []
    destroy = dist.destroy_process_group

    def watched() -> None:
        alive.append(models[-1]() is not None)
        destroy()

    monkeypatch.setattr(dist, "destroy_process_group", watched)

    def train(processes: Processes, *, fails: bool) -> None:
        model = processes.wrap(make_model())
        models.append(weakref.ref(model))
        model(torch.randn(2, 4, 5, 16)).sum().backward()
        if fails:
            raise ValueError("as bad data does")

    for fsdp in (True, False):  # in this order: torch 2.14 keeps a sharded model where one was replicated before
        for fails in (False, True):
            with suppress(ValueError), Processes("cpu", fsdp=fsdp) as processes:
                train(processes, fails=fails)
    assert alive == [False] * 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    check(torch.device("cuda:0"), tmp_path)
