"""Compile the kernels for a GPU without having one, as calls on it would: ``python tests/offline.py 90``.

``python tests/offline.py 90 sm90-medium`` compiles a part of them: those of the folder ``portable``, or those of
``sm90`` for large, medium or small windows. ``python tests/offline.py 80,86 portable`` compiles for 8.0, and then for
8.6 what has other tiles there; a line of names is printed for each.

A driver that loads and launches nothing replaces CUDA's. Everything before the launch is real: the choice of tiles,
Triton's argument handling, compilation to machine code, and the check that shared memory suffices.
"""

from __future__ import annotations

import gc
import os
import sys
from functools import cache
from math import prod
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import fast_language
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import driver
from triton.runtime.jit import JITCallable

from benchmarks.compile_only import SHARED_MEMORY, Driver
from natten_layers import cached_attention, neighborhood_attention, neighborhood_attention_varlen
from natten_layers.kernels.host import problem
from natten_layers.kernels.host.qk_prep import QKPrep
from natten_layers.kernels.host.tuned import forget
from natten_layers.kernels.ops import attention as attention_ops
from natten_layers.kernels.ops import decode as decode_ops
from natten_layers.kernels.portable import decode
from natten_layers.kernels.portable.dkv import backward_key_kernel, backward_register_kernel
from natten_layers.kernels.portable.dq import backward_query_kernel
from natten_layers.kernels.portable.forward import forward_kernel
from natten_layers.kernels.sm90 import small_tiling
from natten_layers.kernels.sm90.available import gluon_gap
from natten_layers.modules import AxialRoPE, RoPE
from natten_layers.modules.query_key import HeadNorm, normalize_and_rotate
from natten_layers.modules.rope import angles_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def attend(
    spatial: tuple[int, ...], kernel_size: int, heads: int, dim: int, registers: int,
    dtype: torch.dtype = torch.bfloat16, has_bias: bool = False, **options: Any,
) -> None:  # fmt: skip
    q, k, v = (draw(1, *spatial, h, dim, dtype=dtype) for h in (heads, 2, 2))
    inputs = [q, k, v]
    if has_bias:
        options["rpb"] = draw(heads, *(2 * kernel_size - 1,) * len(spatial), dtype=torch.float32)
        inputs.append(options["rpb"])
    if registers:
        extra, sink = draw(1, registers, 2, dim, dtype=dtype), torch.zeros(heads, requires_grad=True)
        inputs += [extra, sink]
        options |= {"additional_keys": extra, "additional_values": extra, "sink": sink}
    out = neighborhood_attention(q, k, v, kernel_size, **options, impl="fused")
    torch.autograd.grad(out.float().sum(), inputs)


def attend_packed(
    shapes: list[tuple[int, ...]], kernel_size: int, heads: int, dim: int, registers: int,
    dtype: torch.dtype = torch.bfloat16, **options: Any,
) -> None:  # fmt: skip
    tokens = sum(map(prod, shapes))
    q, k, v = (draw(tokens, h, dim, dtype=dtype) for h in (heads, 2, 2))
    extra = draw(len(shapes), registers, 2, dim, dtype=dtype) if registers else None
    out = neighborhood_attention_varlen(
        q, k, v, shapes, kernel_size, additional_keys=extra, additional_values=extra, impl="fused", **options
    )
    torch.autograd.grad(out.float().sum(), [q, k, v] if extra is None else [q, k, v, extra])


def attend_forward_mode(
    spatial: tuple[int, ...], kernel_size: int, heads: int, dim: int, registers: int, **options: Any
) -> None:
    """A call with tangents of all tensors, registers and sinks included."""
    tensors = *(draw(1, *spatial, h, dim) for h in (heads, 2, 2)), draw(1, registers, 2, dim), torch.zeros(heads)

    def call(q: Tensor, k: Tensor, v: Tensor, register: Tensor, sink: Tensor) -> Tensor:
        return neighborhood_attention(
            q, k, v, kernel_size, **options, additional_keys=register, additional_values=register, sink=sink,
            impl="fused",
        )  # fmt: skip

    with torch.no_grad():
        torch.func.jvp(call, tensors, tensors)


def options_of(rank: int, kernel_size: int, sink: float | None, stride: int = 1, dilation: int = 1) -> problem.Options:
    sizes = (kernel_size,) * rank, (stride,) * rank, (dilation,) * rank
    return problem.Options(sink, *sizes, (rank == 1,) * rank, 1.0)


def attend_large_on_sm90(
    spatial: tuple[int, ...], kernel_size: int, heads: int, *, sink: float | None, dim: int = 128,
    value_dim: int | None = None, registers: int = 0, packed: bool = False,
) -> None:  # fmt: skip
    from natten_layers.kernels.sm90 import large_dkv, large_dq, large_forward, large_registers, large_tiling

    sizes = (heads, dim), (2, dim), (2, value_dim or dim), (heads, value_dim or dim)
    query, key, value, out = (torch.zeros(1, *spatial, *size, dtype=torch.bfloat16) for size in sizes)
    extra = torch.zeros(1, registers, 2, dim, dtype=torch.bfloat16) if registers else None
    shapes = torch.tensor([[1000], [0], [spatial[0] - 1000]]) if packed else None
    tensors = problem.Inputs(query, key, value, extra, extra, shapes=shapes)
    options = options_of(len(spatial), kernel_size, sink)
    one = problem.problem_of(tensors, options)
    config = large_tiling.forward_tile_config(one, with_stats=sink is None)
    large_forward.forward(config, one, tensors, options, with_stats=sink is None)
    rows = torch.ones(1, *spatial, heads)
    cotangents = problem.Cotangents(out, rows, rows, out, None)
    config = large_tiling.dq_tile_config(one)
    _, statistics = large_dq.query_gradient(config, one, tensors, options, cotangents)
    large_dkv.key_gradients(large_tiling.dkv_tile_config(one), one, tensors, options, out, statistics)
    if registers:
        config = large_tiling.register_tile_config(one)
        large_registers.register_gradients(config, one, tensors, options, out, statistics)


def attend_small_on_sm90(
    spatial: tuple[int, ...], kernel_size: int, heads: int, *, registers: int, dim: int = 64, stride: int = 1,
    dilation: int = 1, packed: bool = False, masked: bool = False,
) -> None:  # fmt: skip
    query, key = (torch.zeros(1, *spatial, h, dim, dtype=torch.bfloat16) for h in (heads, 2))
    extra = torch.zeros(1, registers, 2, dim, dtype=torch.bfloat16) if registers else None
    mask = torch.ones(1, *spatial, dtype=torch.bool) if masked else None
    shapes = torch.tensor([[1000], [0], [spatial[0] - 1000]]) if packed else None
    tensors = problem.Inputs(query, key, key, extra, extra, torch.zeros(heads), mask, shapes)
    launch_small_on_sm90(tensors, options_of(len(spatial), kernel_size, None, stride, dilation))


def attend_packed_images_on_sm90(
    shapes: list[tuple[int, ...]], kernel_size: int, heads: int, *, registers: int
) -> None:
    query, key = (torch.zeros(1, sum(map(prod, shapes)), h, 64, dtype=torch.bfloat16) for h in (heads, 2))
    extra = torch.zeros(len(shapes), registers, 2, 64, dtype=torch.bfloat16)
    tensors = problem.Inputs(query, key, key, extra, extra, torch.zeros(heads), shapes=torch.tensor(shapes))
    launch_small_on_sm90(tensors, options_of(len(shapes[0]), kernel_size, None))


def launch_small_on_sm90(tensors: problem.Inputs, options: problem.Options) -> None:
    from natten_layers.kernels.sm90 import small_dkv, small_dq, small_forward, small_forward_rolling

    query, rank = tensors.query, len(options.kernel_size)
    one = problem.problem_of(tensors, options)
    config = small_tiling.small_tile_config(one)
    assert config is not None
    small_forward.forward(config, one, tensors, options, with_stats=rank > 1)
    runs = tensors.key_mask is None and not one.packs_images
    if runs and prod(options.stride) == prod(options.dilation) == 1:
        config = small_tiling.rolling_tile_config(one)
        assert config is not None
        small_forward_rolling.forward(config, one, tensors, options, with_stats=rank > 1)
    config = small_tiling.small_dq_tile_config(one)
    assert config is not None
    rows = torch.ones(query.shape[:-1])
    cotangents = problem.Cotangents(query, rows, rows, query, rows)
    _, statistics = small_dq.query_gradient(config, one, tensors, options, cotangents)
    config = small_tiling.small_dkv_tile_config(one)
    assert config is not None
    small_dkv.key_gradients(config, one, tensors, options, query, statistics)


def attend_medium_on_sm90(
    spatial: tuple[int, ...], kernel_size: int, heads: int, *, dim: int, sink: bool = False, stride: int = 1,
    dilation: int = 1, registers: int = 0, is_periodic: bool = False, masked: bool = False, has_bias: bool = False,
) -> None:  # fmt: skip
    from natten_layers.kernels.sm90 import medium_backward, medium_bias, medium_forward, medium_tiling

    query, key = (torch.zeros(1, *spatial, h, dim, dtype=torch.bfloat16) for h in (heads, 2))
    extra = torch.zeros(1, registers, 2, dim, dtype=torch.bfloat16) if registers else None
    tensors = problem.Inputs(
        query, key, key, extra, extra, torch.zeros(heads) if sink else None,
        torch.ones(1, *spatial, dtype=torch.bool) if masked else None,
        rpb=torch.zeros(heads, *(2 * kernel_size - 1,) * len(spatial)) if has_bias else None,
    )  # fmt: skip
    options = options_of(len(spatial), kernel_size, None, stride, dilation)
    if is_periodic:
        options = options._replace(is_causal=(False,) * len(spatial), is_periodic=(True,) * len(spatial))
    one = problem.problem_of(tensors, options)
    configs = (
        medium_tiling.forward_tile_config(one, with_stats=not sink),
        medium_tiling.dq_tile_config(one),
        medium_tiling.dkv_tile_config(one),
    )
    forward, query_config, key_config = (config for config in configs if config is not None)
    medium_forward.forward(forward, one, tensors, options, with_stats=not sink)
    rows = torch.ones(query.shape[:-1])
    cotangents = problem.Cotangents(query, rows, rows, query, rows if sink else None)
    _, statistics = medium_backward.query_gradient(query_config, one, tensors, options, cotangents)
    medium_backward.key_gradients(key_config, one, tensors, options, query, statistics)
    if has_bias and not (masked or is_periodic):
        medium_bias.bias_gradient(medium_tiling.bias_tile_config(one), one, tensors, options, query, statistics)


def attend_with_tangents_on_sm90(
    spatial: tuple[int, ...], kernel_size: int, heads: int, *, dim: int, registers: int = 0, masked: bool = False
) -> None:
    """Output and tangents, in one launch and in two."""
    from natten_layers.kernels.sm90 import medium_jvp, medium_tiling

    query, key = (torch.zeros(1, *spatial, h, dim, dtype=torch.bfloat16) for h in (heads, 2))
    extra = torch.zeros(1, registers, 2, dim, dtype=torch.bfloat16) if registers else None
    mask = torch.ones(1, *spatial, dtype=torch.bool) if masked else None
    sink, rows = torch.zeros(heads), torch.ones(1, *spatial, heads)
    tensors = problem.Inputs(query, key, key, extra, extra, sink, mask)
    options = options_of(len(spatial), kernel_size, None)
    one = problem.problem_of(tensors, options)
    config = medium_tiling.jvp_tile_config(one)
    assert config is not None
    tangents = problem.Tangents(query, key, key, extra, extra, sink)
    medium_jvp.forward_with_tangents(config, one, tensors, options, tangents)
    saved = problem.SavedResults(query, rows, rows)
    medium_jvp.jvp(
        config,
        one,
        tensors,
        options,
        saved,
        tangents._replace(additional_keys_tangent=None, additional_values_tangent=None),
    )


def attend_pairs_on_sm90(spatial: tuple[int, ...], kernel_size: int, dim: int, *, is_periodic: bool = False) -> None:
    from natten_layers.kernels.sm90 import medium_pair_gradients, medium_pairs, medium_tiling

    query, key = (torch.zeros(1, *spatial, heads, dim) for heads in (4, 2))
    tensors = problem.Inputs(query, key, key, sink=torch.zeros(4))
    options = options_of(len(spatial), kernel_size, None)
    if is_periodic:
        options = options._replace(is_periodic=(True,) * len(spatial))
    one = problem.problem_of(tensors, options)
    configs = (
        medium_tiling.forward_tile_config(one),
        medium_tiling.dq_tile_config(one),
        medium_tiling.dkv_tile_config(one),
    )
    forward, query_config, key_config = (config for config in configs if config is not None)
    medium_pairs.forward(forward, one, tensors, options, with_stats=True)
    rows = torch.ones(query.shape[:-1])
    cotangents = problem.Cotangents(query, rows, rows, query, rows)
    _, statistics = medium_pair_gradients.query_gradient(query_config, one, tensors, options, cotangents)
    medium_pair_gradients.key_gradients(key_config, one, tensors, options, query, statistics)


def attend_with_qk_prep_on_sm90(spatial: tuple[int, ...], kernel_size: int, rope: AxialRoPE | RoPE, norm: str) -> None:
    from natten_layers.kernels.sm90 import small_forward_rolling

    qkv = torch.zeros(1, *spatial, 12, 64, dtype=torch.bfloat16)
    query, key, value = qkv.split((8, 2, 2), -2)
    angles = rope.angles(query, key, None)
    gain = torch.zeros(64, dtype=torch.bfloat16)
    prep = QKPrep(gain, gain, angles.positions[None], angles.freqs, angles.factor, norm, 1e-6)
    tensors, options = problem.Inputs(query, key, value), options_of(len(spatial), kernel_size, None)
    one = problem.problem_of(tensors, options)
    config = small_tiling.rolling_tile_config(one, with_qk_prep=True)
    assert config is not None
    small_forward_rolling.forward(config, one, tensors, options, False, prep)


def check_loads() -> None:
    """Check that no kernel loads two bytes at a time, as Triton does if it does not know that head dims are aligned."""
    for kernel in (forward_kernel, backward_query_kernel, backward_key_kernel, backward_register_kernel):
        for kernels, *_ in kernel.device_caches.values():
            for compiled in kernels.values():
                assert "ld.global.b16" not in compiled.asm["ptx"], f"{compiled.name} loads elements one by one"


def compile_portable(capability: int) -> None:
    attend((32, 32), 7, 8, 64, 5)
    attend((12, 12, 20), 5, 2, 40, 5, dilation=2, stride=3)
    attend((2048,), 1024, 8, 128, 40, is_causal=True)
    attend((32, 32), 7, 4, 256, 40)
    attend_forward_mode((32, 32), 7, 8, 64, 5)
    attend_forward_mode((2048,), 1024, 8, 128, 40, is_causal=True)
    attend((2048,), 1024, 8, 128, 5, key_mask=torch.ones(1, 2048, dtype=torch.bool), is_causal=True)
    attend_packed([(32, 32), (20, 48)], 7, 8, 64, 5, dilation=(1, 2), is_periodic=(False, True))
    attend((56, 56), 7, 4, 32, 0, has_bias=True, key_mask=torch.ones(1, 56, 56, dtype=torch.bool))
    check_loads()
    attend((128, 128), 7, 8, 64, 0, torch.float32)  # products of fp16 pairs
    attend((32768,), 128, 8, 64, 0, torch.float32)  # axes of length 1 are constants
    attend((4096,), 256, 8, 64, 0, is_causal=True)
    with torch.no_grad():
        positions = torch.arange(4096)[None]
        for tokens, dim in ((1, 64), (16, 256)):
            query, cache = draw(2, tokens, 8, dim), draw(2, 4096, 2, dim)
            cached_attention(query, cache, cache, positions[:, -tokens:], positions, window=4096, impl="fused")
    q, k, gain = draw(1, 16, 16, 4, 64), draw(1, 16, 16, 2, 64), torch.ones(4, requires_grad=True)
    angles = angles_of(AxialRoPE(64, 4, num_kv_heads=2), q, k, None)
    prepared = normalize_and_rotate(q, k, HeadNorm("cosine", gain, None), angles, impl="fused")
    norm = HeadNorm("cosine", gain.detach(), None)
    with torch.no_grad():
        torch.func.jvp(lambda q, k: normalize_and_rotate(q, k, norm, angles, impl="fused"), (q, k), (q, k))
    torch.autograd.grad([t.float().sum() for t in prepared], [q, k, gain])
    gains = torch.ones(64, requires_grad=True), torch.ones(64, requires_grad=True)
    video = AxialRoPE(64, 4, num_kv_heads=2, axes=3).angles(q[None], k[None], torch.zeros(1, 16, 16, 3))
    for angles in (None, video):
        prepared = normalize_and_rotate(q[None], k[None], HeadNorm("rms", *gains), angles, impl="fused")
        torch.autograd.grad([t.float().sum() for t in prepared], [q, k, *gains])
    rope = AxialRoPE(64, 4, num_kv_heads=2, axes=3, freqs=torch.ones(1, 32), split=(8, 12, 12), interleaved=True)
    angles = rope.angles(q[None], k[None], torch.zeros(1, 16, 16, 3))
    normalize_and_rotate(q[None], k[None], None, angles, impl="fused")
    if capability == 90:
        print("kernels that spill:")  # no tiles are small enough for these
        attend((32, 32), 7, 8, 256, 40, torch.float32)
        attend((32, 32), 7, 8, 256, 0, torch.float32, key_mask=torch.ones(1, 32, 32, dtype=torch.bool))


def compile_sm90(parts: str) -> None:
    from natten_layers.kernels.sm90 import (
        large_dkv,
        large_dq,
        large_forward,
        large_registers,
        small_forward_rolling,
    )

    for module in (large_forward, large_dq, large_dkv, large_registers, small_forward_rolling):
        setattr(module, "multiprocessors", lambda device: 132)  # noqa: B010
    if "sm90-large" in parts:
        compile_for_large_windows()
    if "sm90-small" in parts:
        compile_for_small_windows()
    if "sm90-medium" in parts:
        compile_for_medium_windows()


def compile_for_large_windows() -> None:
    attend_large_on_sm90((4096,), 2048, 8, sink=0.0, registers=5)
    attend_large_on_sm90((4096,), 2048, 8, sink=0.0, packed=True)
    attend_large_on_sm90((64, 80), 48, 2, sink=None, registers=300)
    attend_large_on_sm90((16, 32, 40), 7, 4, sink=None, dim=80, registers=5)
    attend_large_on_sm90((4096,), 1024, 8, sink=0.0, dim=256, registers=5)
    attend_large_on_sm90((64, 80), 13, 2, sink=None, dim=64)
    attend_large_on_sm90((4096,), 1024, 8, sink=0.0, dim=64, value_dim=32)


def compile_for_small_windows() -> None:
    attend_small_on_sm90((64, 64), 7, 8, registers=5)
    attend_small_on_sm90((64, 64), 7, 8, registers=5, dim=40, masked=True)
    attend_small_on_sm90((4096,), 128, 16, registers=0, packed=True)
    attend_packed_images_on_sm90([(40, 30), (0, 4), (1, 1)], 7, 8, registers=5)
    attend_small_on_sm90((4096,), 8, 8, registers=0, dim=128)
    attend_small_on_sm90((56, 56), 7, 2, registers=0, dim=32, stride=3, dilation=2)
    attend_small_on_sm90((4096,), 128, 8, registers=5, dim=64, stride=32, dilation=4)
    attend_with_qk_prep_on_sm90((64, 64), 7, AxialRoPE(64, 8, num_kv_heads=2), "cosine")
    attend_with_qk_prep_on_sm90((4096,), 128, RoPE(64, scaling=YARN), "rms")


def compile_for_medium_windows() -> None:
    attend_medium_on_sm90((16, 32, 40), 7, 8, dim=64, sink=True)
    attend_medium_on_sm90((66, 66), 17, 6, dim=96, stride=2, dilation=3)
    attend_medium_on_sm90((4096,), 200, 2, dim=128, registers=70)
    attend_medium_on_sm90((64, 64), 13, 2, dim=112, dilation=2, registers=5, is_periodic=True)
    attend_medium_on_sm90((16, 32, 40), 5, 4, dim=64, is_periodic=True, masked=True, has_bias=True)
    attend_medium_on_sm90((56, 56), 7, 4, dim=72, dilation=2, has_bias=True)
    attend_medium_on_sm90((16, 32, 40), 5, 4, dim=64, has_bias=True)
    attend_with_tangents_on_sm90((64, 64), 7, 8, dim=80, registers=5, masked=True)
    attend_with_tangents_on_sm90((4096,), 200, 2, dim=128)
    attend_pairs_on_sm90((4, 36, 72), 3, 64)
    attend_pairs_on_sm90((36, 72), 7, 32, is_periodic=True)


def speed_up_compiler() -> None:
    """Spare Python's part of the compiler what it repeats: a parse of each function for every call with other types,
    a description of each value's shape, and the collector's walks through all of PyTorch's objects.
    """
    fast_language.speed_up(core, TritonSemantic)
    JITCallable.parse = cache(JITCallable.parse)
    gc.freeze()
    gc.disable()


def check_targets_share_code(first: int, second: int) -> None:
    """Check that kernels with the same arguments are the same for both targets, but for the target's name."""
    for kernel in (forward_kernel, backward_key_kernel, decode.decode_kernel):
        kernels, *_ = kernel.device_caches[first]
        one = next(iter(kernels.values()))
        options = {
            name: getattr(one.metadata, name) for name in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
        }
        two = triton.compile(one.src, target=GPUTarget("cuda", second, 32), options=options)
        assert one.asm["ptx"].replace(f"sm_{first}", f"sm_{second}") == two.asm["ptx"], one.name


def check_room(metadata: Any) -> None:
    """Check on a launch what Triton checks when it loads a kernel, as launches for another capability may share one."""
    room = SHARED_MEMORY[driver.active.get_current_device()]  # pyright: ignore[reportAttributeAccessIssue]
    assert metadata.shared <= room, f"{metadata.name} needs {metadata.shared} bytes of shared memory, has {room}"


def switch_to(capability: int) -> Driver:
    """From now on, kernels are planned and compiled for this capability."""
    stub = Driver(capability)
    stub.launcher_cls = lambda source, metadata: lambda *arguments: check_room(metadata)
    driver.set_active(stub)  # pyright: ignore[reportArgumentType]
    for module in (problem, decode):
        setattr(module, "device_traits", lambda device: ("stub", SHARED_MEMORY[capability]))  # noqa: B010
    forget()
    return stub


def main(capabilities: str, parts: str = "portable sm90-large sm90-medium sm90-small") -> None:
    """Compile these parts of the kernels; those of ``sm90`` only for compute capability 9.0, and where Gluon is.

    Launchers keep what they compiled, so that after the first capability only kernels with other tiles are compiled.
    """
    speed_up_compiler()
    for module in (attention_ops, decode_ops):
        setattr(module, "unsupported", lambda *_: None)  # noqa: B010
    first, *others = map(int, capabilities.split(","))
    for capability in (first, *others):
        stub = switch_to(capability)
        if "portable" in parts:
            compile_portable(capability)
        if "sm90" in parts and capability == 90 and gluon_gap() is None:
            compile_sm90(parts)
        print("kernels:", *stub.utils.loaded)
    for other in others:
        check_targets_share_code(first, other)


if __name__ == "__main__":
    main(*sys.argv[1:])
