"""Compare the launches of repeated calls, one by one, with those that Triton makes for the same arguments.

Nothing is compiled and nothing runs: a driver and a compiler that only record calls replace Triton's. If a call reused
a kernel that was compiled for other arguments, it would differ from the one that Triton chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import offline  # first: it keeps Triton from interpreting
import torch
import triton.compiler
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from natten_layers import attention_state, cached_attention, neighborhood_attention
from natten_layers.kernels.host import problem, tuned
from natten_layers.kernels.host.launcher import Launcher
from natten_layers.kernels.host.tiling import TileConfig
from natten_layers.kernels.ops import attention as attention_ops
from natten_layers.kernels.ops import decode as decode_ops
from natten_layers.modules import AxialRoPE
from natten_layers.modules.query_key import HeadNorm, normalize_and_rotate
from natten_layers.modules.rope import angles_of

METADATA = 7
"""Index of the metadata for launch hooks in the arguments of a launch."""
launched: list[tuple[Any, ...]] = []
"""Every launch: the kernel and its arguments."""
chosen_by_triton: list[str] = []
"""Names of the kernels that a call launched through Triton."""


class Noted(CompiledKernel):
    """A compiled kernel that only records what it is called with."""

    def __init__(self, source: Any) -> None:
        self.src, self.name, self.metadata = source, source.name, None
        self.module, self.function, self.packed_metadata = 1, 1, None
        self._run = lambda *arguments: launched.append((self, *arguments))


def same(ours: Sequence[object], theirs: Sequence[object]) -> bool:
    def equal(a: object, b: object) -> bool:
        if isinstance(a, int) and (b is None or isinstance(b, Tensor)):  # an address
            return a == (0 if b is None else b.data_ptr())
        if isinstance(a, tuple) and isinstance(b, tuple):
            return all(map(equal, a, b)) and len(a) == len(b)
        return a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b)

    pairs = enumerate(zip(ours, theirs, strict=True))
    return all(i == METADATA or equal(*pair) for i, pair in pairs)  # metadata is a new object for every launch


@contextmanager
def compared() -> Iterator[None]:
    """Within the context, make every launch through Triton as well, and compare the two."""
    run, launch = JITFunction.run, Launcher.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> object:
        chosen_by_triton.append(self.__name__)
        return run(self, *args, **kwargs)

    def comparing(self: Launcher, tensors: Sequence[Tensor | None], floats: Sequence[float | None] = ()) -> None:
        launch(self, tensors, floats)
        run(self.kernel, *tensors, *self.sizes, *floats, grid=self.grid, warmup=False, **self.options)
        assert same(launched[-2], launched[-1]), self.kernel

    JITFunction.run, Launcher.__call__ = counting, comparing
    yield
    JITFunction.run, Launcher.__call__ = run, launch


def repeat(call: Callable[[], object], *, kept: bool = True) -> int:
    """Make a call three times, and return how many launches of the first were made by Triton itself."""
    counts, total = [], 0
    for _ in range(3):
        chosen_by_triton.clear()
        before = len(launched)
        call()
        counts.append(len(chosen_by_triton))
        total = (len(launched) - before) // 2
        assert total
    assert counts[1:] == ([0, 0] if kept else [total] * 2), counts
    return counts[0]


def misaligned(tensor: Tensor) -> Tensor:
    """An equal tensor at an address that is not a multiple of 16."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return storage[1:].view(tensor.shape)


def main() -> None:
    driver.set_active(offline.Driver(90))  # pyright: ignore[reportArgumentType]
    triton.compiler.compile = lambda src, **_: Noted(src)
    problem.device_traits = lambda device: ("stub", 227 * 1024)
    for module in (attention_ops, decode_ops):
        setattr(module, "unsupported", lambda *_: None)  # noqa: B010
    with compared(), torch.no_grad():
        forward_calls()
        decode_calls()
        qk_prep_calls()
        with torch.enable_grad():
            backward_calls()


def forward_calls() -> None:
    q, k, v = (torch.zeros(1, 16, 16, 4, 16) for _ in range(3))
    registers, sink = torch.zeros(1, 3, 4, 16), torch.zeros(4)

    def attend(*tensors: Tensor, kernel_size: int = 5, **options: Any) -> Callable[[], Any]:
        return lambda: neighborhood_attention(*(tensors or (q, k, v)), kernel_size=kernel_size, **options, impl="fused")

    def with_registers(keys: Tensor, **options: Any) -> Callable[[], Any]:
        return attend(additional_keys=keys, additional_values=registers, **options)

    packed = torch.zeros(1, 16, 16, 12, 16).split(4, -2)
    longer = torch.zeros(1, 17, 16, 4, 16)
    new = [
        attend(), attend(misaligned(q), k, v), attend(q, misaligned(k), v), attend(*map(misaligned, (q, k, v))),
        attend(*packed), attend(q, *torch.zeros(2, 1, 16, 16, 2, 16)), attend(q.half(), k.half(), v.half()),
        attend(longer, longer, longer), attend(kernel_size=6), attend(dilation=2), attend(stride=2),
        attend(is_causal=True), attend(scale=-1.0), attend(sink=0.5), attend(sink=sink), attend(sink=sink.half()),
        attend(sink=misaligned(sink)), with_registers(registers), with_registers(misaligned(registers)),
        with_registers(registers, sink=sink), lambda: attention_state(q, k, v, 5, impl="fused"),
    ]  # fmt: skip
    for i, call in enumerate(new):
        assert repeat(call) == 1, i
    for call in (attend(), attend(scale=0.5), attend(scale=0.25), attend(q.clone(), k, v), attend(scale=-2.0)):
        assert repeat(call) == 0
    for i, call in enumerate((attend(sink=0.75), attend(sink=1), attend(sink=2))):
        assert repeat(call) == 0, i

    # A kernel is loaded on one device, so tensors of another device (without memory in this test) need a new launch.
    assert repeat(attend(*(x.to("meta") for x in (q, k, v)))) == 1
    assert repeat(attend()) == 0

    for precision in ("tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = precision
        assert repeat(attend()) == 1
    torch.backends.cuda.matmul.fp32_precision = "none"
    assert repeat(attend()) == 0

    with tuned.override({"forward": TileConfig((1, 4, 8), (1, 4, 8), 1, 2, 1)}):
        assert repeat(attend()) == 1
    assert repeat(attend()) == 0

    metadata, enter = launched[-2][METADATA : METADATA + 2]  # for profilers
    assert metadata.get()["name"] == "forward_kernel"
    assert enter is knobs.runtime.launch_enter_hook
    knobs.runtime.debug = True
    assert repeat(attend(), kept=False) == 1
    knobs.runtime.debug = False
    assert repeat(attend()) == 0


def backward_calls() -> None:
    q, k, v = (torch.zeros(1, 16, 16, 4, 16, requires_grad=True) for _ in range(3))
    registers, sink = torch.zeros(1, 3, 4, 16, requires_grad=True), torch.zeros(4, requires_grad=True)
    extras = {"additional_keys": registers, "additional_values": registers, "sink": sink}

    def differentiate(grad: Tensor, *more: Tensor, **options: Any) -> Callable[[], Any]:
        def call() -> None:
            out = neighborhood_attention(q, k, v, 5, **options, impl="fused")
            torch.autograd.grad(out, (q, k, v, *more), grad)

        return call

    def differentiate_lse() -> None:
        out, lse = neighborhood_attention(q, k, v, 5, return_lse=True, impl="fused")
        torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))

    grad = torch.zeros_like(q)
    with torch.autograd.set_multithreading_enabled(False):
        # Every forward is that of `attention_state`.
        assert repeat(differentiate(grad)) == 2
        assert repeat(differentiate(misaligned(grad))) == 2
        assert repeat(differentiate(torch.zeros(1, 16, 16, 4, 32)[..., :16])) == 2
        assert repeat(differentiate_lse) == 1
        assert repeat(differentiate(grad, registers, sink, **extras)) == 3  # dK and dV as without registers
        assert repeat(differentiate(grad, registers, sink, scale=0.1, **extras)) == 0


def decode_calls() -> None:
    cache, positions = torch.zeros(2, 4096, 2, 64), torch.arange(4096)[None]
    query, registers = torch.zeros(2, 1, 8, 64), torch.zeros(1, 3, 2, 64)

    def decode(query: Tensor = query, cache: Tensor = cache, **options: Any) -> Callable[[], Any]:
        arguments = positions[:, -1:], positions
        return lambda: cached_attention(query, cache, cache, *arguments, **options, impl="fused")

    assert repeat(decode()) == 2
    assert repeat(decode(misaligned(query))) == 1
    assert repeat(decode(cache=misaligned(cache))) == 1
    assert repeat(decode(window=64)) == 1
    assert repeat(decode(window=65)) == 1
    assert repeat(decode(return_lse=True)) == 2
    assert repeat(decode(additional_keys=registers, additional_values=registers, sink=0.5)) == 1
    assert repeat(decode(scale=0.5)) == 0


def qk_prep_calls() -> None:
    q, k, gain = torch.zeros(1, 16, 16, 4, 64), torch.zeros(1, 16, 16, 2, 64), torch.ones(4)
    angles = angles_of(AxialRoPE(64, 4, num_kv_heads=2), q, k, None)

    def turn(q: Tensor, norm: HeadNorm | None) -> Callable[[], Any]:
        return lambda: normalize_and_rotate(q, k, norm, angles, impl="fused")

    assert repeat(turn(q, None)) == 1
    assert repeat(turn(misaligned(q), None)) == 1
    assert repeat(turn(q, HeadNorm("cosine", gain, None))) == 1


if __name__ == "__main__":
    main()
