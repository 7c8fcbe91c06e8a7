"""The eager path against dense ``scaled_dot_product_attention`` with a boolean mask, fp32 on the CPU.

``python -m benchmarks.cpu [--repeats N] [--only NAME]`` prints medians of calls in alternation. A result that disagrees
with the dense one is reported as an error and gets no time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from natten_layers import neighborhood_attention
from natten_layers.geometry import make_window, window_mask

from .runner import at_least, command


@dataclass(frozen=True)
class Workload:
    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    is_causal: bool = False
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64


WORKLOADS = {
    "image": Workload((64, 64), (7, 7)),
    "image-gqa": Workload((64, 64), (7, 7), kv_heads=1),
    "volume": Workload((16, 16, 16), (3, 3, 3)),
    "text": Workload((4096,), (256,), is_causal=True),
    "full": Workload((2048,), (2048,)),
    "full-causal": Workload((2048,), (2048,), is_causal=True),
}


def dense(workload: Workload) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # A window over all of every axis needs no mask. Leaving it out makes the baseline faster, as a user would.
    full = workload.spatial == workload.kernel_size
    window = make_window(workload.spatial, workload.kernel_size, is_causal=workload.is_causal)
    mask = None if full else window_mask(workload.spatial, window)
    is_causal = full and workload.is_causal

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(query.shape)

    return attend


def blocked(workload: Workload) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return neighborhood_attention(
            query, key, value, workload.kernel_size, is_causal=workload.is_causal, impl="eager"
        )

    return attend


def run(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor, train: bool) -> list[Tensor]:
    with torch.set_grad_enabled(train):
        out = attend(*inputs)
    return [out.detach(), *(torch.autograd.grad(out, inputs, cotangent) if train else ())]


def measure(workload: Workload, train: bool, repeats: int) -> tuple[float, float]:
    """Median seconds of the dense and the blocked path."""
    torch.manual_seed(0)
    shapes = [(1, *workload.spatial, h, workload.head_dim) for h in (workload.heads, *(workload.kv_heads,) * 2)]
    inputs = tuple(torch.randn(shape, requires_grad=train) for shape in shapes)
    cotangent = torch.randn(shapes[0])
    paths = dense(workload), blocked(workload)
    for expected, actual in zip(*(run(path, inputs, cotangent, train) for path in paths), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for path, seconds in zip(paths, times, strict=True):
            start = time.perf_counter()
            run(path, inputs, cotangent, train)
            seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--repeats", type=at_least(1), default=9, help="calls, default %(default)s")
    parser.add_argument("--only", choices=WORKLOADS, help="default: all")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds, median of {arguments.repeats}")
    for name in [arguments.only] if arguments.only else WORKLOADS:
        for train in (False, True):
            slow, fast = measure(WORKLOADS[name], train, arguments.repeats)
            kind = "forward + backward" if train else "forward"
            print(f"{name:12} {kind:18} dense {slow * 1e3:8.1f}  blocked {fast * 1e3:8.1f}  {slow / fast:5.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
