"""The processes of a run: this one alone, or those that torchrun started."""

from __future__ import annotations

import gc
import inspect
import os
import traceback
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class Processes(AbstractContextManager["Processes"]):
    """Each process trains on its share of the batch: DistributedDataParallel, or FSDP2 with ``fsdp``.

    Leaving the context ends the process group; train in a function of its own, so that no model outlives it.

    Raises:
        ValueError: ``fsdp`` without torchrun.
    """

    def __init__(self, device: str, *, fsdp: bool) -> None:
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        if fsdp and not self.distributed:
            raise ValueError("--fsdp shards over processes: start them with torchrun --nproc-per-node N")
        self.fsdp, self.device, self.rank, self.world = fsdp, torch.device(device), 0, 1
        if self.distributed:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
                dist.init_process_group("nccl", device_id=self.device)  # else torch warns that a barrier guesses it
            else:
                dist.init_process_group("gloo")
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.distributed:
            return
        # Wrapped models hold the group, some of them in cycles, and a traceback holds the models. They must go first:
        # gloo's threads take the GIL as they end. Under a destructor of a model, which has it, they would wait for each
        # other for ever, and once the interpreter shuts down the process would abort.
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        gc.collect()
        dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """True in the process that writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """Over processes."""
        if self.distributed:
            dist.all_reduce(values)
        return values / self.world

    def gather(self, values: Tensor) -> Tensor:
        """``[world, ...]``: the values of every process, all of one shape."""
        if not self.distributed:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process; every process must call it."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0) if self.distributed else flag

    def shard(self, model: nn.Module, *, reshard: bool | None = None) -> None:
        """Split the model's parameters over the processes, in place; it gathers a layer at a time to compute.

        Args:
            reshard: True splits all parameters again after a forward pass. By default those that are in no layer stay
                whole, as a backward pass needs them next.
        """
        mesh = init_device_mesh(self.device.type, (self.world,))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for layer in (layer for layers in lists for layer in layers if not isinstance(layer, nn.ModuleList)):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call so that gradients are averaged over the processes."""
        if self.fsdp:
            self.shard(model)
            return model
        if self.distributed:
            devices = [self.device] if self.device.type == "cuda" else None
            # Buffers are constants: processes need not wait for each other in every forward pass to send them.
            # Newer versions of torch have another name for it.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            options: dict[str, Any] = {name: False}
            return DistributedDataParallel(model, device_ids=devices, **options)
        return model

    def accumulation(self, wrapped: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around a backward pass: gradients travel only in the ``last`` one before the optimiser's step."""
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(last)
        elif isinstance(wrapped, DistributedDataParallel) and not last:
            return wrapped.no_sync()
        return nullcontext()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
