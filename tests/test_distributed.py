"""Data-parallel and fully sharded training of the layer: two processes with half the batch each train as one does."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from natten_layers import NeighborhoodGQA

Kind = Literal["single", "ddp", "fsdp"]

SHARDED: tuple[Kind, ...] = ("ddp", "fsdp")
STEPS = 4
WORLD = 2


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [NeighborhoodGQA(16, 2, 3, num_kv_heads=1, num_registers=2, sink="learned", qk_norm="rms") for _ in "ab"]
    return nn.Sequential(*layers)


def losses(kind: Kind, rank: int, world: int, device: torch.device) -> Tensor:
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
        loss = (model(batch) - batch.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        results.append(total.cpu() / world)
    return torch.stack(results)


def worker(rank: int, backend: str, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cpu" if backend == "gloo" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=rank, world_size=WORLD)
    try:
        results = {kind: losses(kind, rank, WORLD, device) for kind in SHARDED}
        if rank == 0:
            torch.save(results, Path(folder) / "losses.pt")
    finally:
        dist.destroy_process_group()


def check(backend: str, device: torch.device, folder: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    spawn(worker, (backend, port, str(folder)), nprocs=WORLD)
    expected = losses("single", 0, 1, device)
    assert expected[-1] < 0.99 * expected[0]  # it learns, so a wrong gradient shows
    results = torch.load(folder / "losses.pt")
    for kind in SHARDED:
        torch.testing.assert_close(results[kind], expected, rtol=1e-6, atol=0.0, msg=lambda m, k=kind: f"{k}: {m}")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    check("gloo", torch.device("cpu"), tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    check("nccl", torch.device("cuda:0"), tmp_path)
