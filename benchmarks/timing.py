"""Timing of calls in alternation, peak memory, host time, and the rates that the machine reaches."""

from __future__ import annotations

import datetime
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = [
    "L2_BYTES",
    "Call",
    "Sample",
    "Timed",
    "copy_rate",
    "environment",
    "host_seconds",
    "matmul_rate",
    "measure",
    "peak_bytes",
    "synchronize",
]

Call = Callable[[int], object]
"""Runs once; the argument counts calls, so that a call can rotate over copies of its inputs."""

L2_BYTES = 60 * 2**20  # H200
WARM_UP = 3
SLOW = 0.1  # seconds; a call that takes longer needs only one warm-up
MIN_SAMPLES, MAX_SAMPLES = 4, 200
LONGEST_WAIT = 0.2  # most seconds that the device waits while the host enqueues a call: enough for a training step


@dataclass(frozen=True)
class Sample:
    """Times of one implementation in seconds."""

    median: float
    p10: float
    p90: float
    count: int


@dataclass(kw_only=True)
class Timed:
    """What rows of all reports have: times in ms, which are None where ``failure`` says why there are none."""

    failure: str | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None

    def take(self, sample: Sample) -> None:
        self.median_ms, self.p10_ms, self.p90_ms = (1e3 * t for t in (sample.median, sample.p10, sample.p90))

    @property
    def spread(self) -> str:
        """The 10th and the 90th percentile of a row that has times."""
        return f"{self.p10_ms:.3g} - {self.p90_ms:.3g}"


def measure(calls: Mapping[str, Call], device: torch.device, budget_s: float) -> dict[str, Sample]:
    """Median and spread of every call. Calls alternate, so that drifts of clock and temperature affect all equally.

    ``budget_s`` is the time for all calls together, but every call gets at least ``MIN_SAMPLES``; when the slow ones
    have theirs, only faster ones are called again.
    """
    timer = _time_on_device if device.type == "cuda" else _time_on_host
    counts, delays = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        delays[name] = host_seconds(call, device, 1)
        estimate = time.perf_counter() - start
        if estimate < SLOW:
            for i in range(WARM_UP):
                call(i)
            delays[name] = host_seconds(call, device, 3)
            estimate = sorted(read() for read in [timer(call, i, delays[name]) for i in range(3)])[1]
        count = int(budget_s / len(calls) / (estimate + 2 * delays[name]))
        counts[name] = max(MIN_SAMPLES, min(MAX_SAMPLES, count))
    rounds = max(counts.values(), default=0)
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0)
    for i in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            if i * counts[name] // rounds != (i + 1) * counts[name] // rounds:
                pending[name].append(timer(calls[name], i, delays[name]))
    synchronize(device)
    return {name: _summary([read() for read in reads]) for name, reads in pending.items()}


def _time_on_device(call: Call, i: int, delay: float) -> Callable[[], float]:
    """Enqueue one timed call. The device first waits until the host has enqueued it, so that no launch gap is timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(min(2 * delay, LONGEST_WAIT) * 2e9))  # cycles, at about 2 GHz
    start.record()
    call(i)
    end.record()

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return read


def _time_on_host(call: Call, i: int, delay: float) -> Callable[[], float]:
    del delay  # calls on the CPU are not asynchronous
    start = time.perf_counter()
    call(i)
    seconds = time.perf_counter() - start
    return lambda: seconds


def _summary(seconds: list[float]) -> Sample:
    p10, median, p90 = (
        torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    )
    return Sample(median, p10, p90, len(seconds))


def host_seconds(call: Call, device: torch.device, repeats: int) -> float:
    """Median host time of a call. Choose ``repeats`` so small that the device's launch queue does not fill up."""
    seconds = []
    for i in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - start)
    synchronize(device)
    return sorted(seconds)[len(seconds) // 2]


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Peak memory of one call beyond what was allocated before, including its results; None on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_rate(device: torch.device) -> float:
    """Bytes per second, reads plus writes, of a copy of a tensor that is larger than any cache."""
    size = 2**30 if device.type == "cuda" else 2**24
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / measure({"copy": lambda i: target.copy_(source)}, device, 0.1)["copy"].median


def matmul_rate(device: torch.device) -> float:
    """FLOP per second of a large bf16 matrix product of random numbers, in the fastest tenth of its calls.

    It is the bound of other times, and such products run into a card's power limit: medians of a tenth of a second, one
    after the other on the same H200, were 769, 690 and 709 TFLOP/s.
    """
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / measure({"matmul": lambda i: a @ b}, device, 0.1)["matmul"].p10


def environment(device: torch.device, commit: str | None = None) -> dict[str, str | None]:
    """The device, the versions of software and the commit of a measurement (``commit``, or else git's)."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit or _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
