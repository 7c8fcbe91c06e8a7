"""A driver for Triton that compiles kernels for a GPU without having one, and loads and launches nothing."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program can have, by compute capability."""


class Utilities:
    def __init__(self, shared_memory: int) -> None:
        self.shared_memory = shared_memory
        self.loaded: list[str] = []
        """Names of the kernels that were to be loaded."""

    def load_binary(self, name: str, *_: object) -> tuple[int, ...]:
        self.loaded.append(name)
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        del device
        names = ("max_num_regs", "multiprocessor_count", "sm_clock_rate", "mem_clock_rate", "mem_bus_width")
        return {**dict.fromkeys(names, 1), "max_shared_mem": self.shared_memory, "warpSize": 32}


class Driver:
    """For ``triton.runtime.driver.set_active``. ``capability`` is 90 for compute capability 9.0."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.target, self.utils = GPUTarget("cuda", capability, 32), Utilities(SHARED_MEMORY[capability])
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps the kernels of each device

    def get_current_stream(self, device: int | None = None) -> int:
        del device
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def map_python_to_cpp_type(self, kind: str) -> str:
        del kind
        return "int"
