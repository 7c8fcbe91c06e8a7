"""Count the kernels that random calls on an H200 are compiled for: ``python tests/shared_kernels.py 200``.

Nothing is compiled and nothing runs: a driver that only describes the GPU replaces CUDA's, and Triton tells what it
would compile. Prints as many calls, their kernels, and those of the first call of each group, as if each was alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import offline  # first: it keeps Triton from interpreting
import torch
from helpers import arguments, make_inputs, operation, run
from triton import knobs
from triton.runtime import driver

from natten_layers.kernels.host import problem
from natten_layers.kernels.ops import attention as attention_ops
from natten_layers.kernels.sm90.available import gluon_gap

Kernels = set[tuple[str, str]]
"""Names, and Triton's descriptions of what each is compiled for"""
asked_for: Kernels = set()


def random_calls() -> Any:
    """``test_random.py`` as it is on a machine with a GPU, where it draws larger calls."""
    is_available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    module = import_module("test_random")
    torch.cuda.is_available = is_available
    return module


def note(*, fn: Any, key: str, **_: object) -> bool:
    asked_for.add((fn.name, key))
    return True  # do not compile it


def kernels_of(test_random: Any, seed: int) -> Kernels:
    """What Triton compiles for a call where nothing is compiled yet."""
    asked_for.clear()
    case, layout = test_random.draw_call(seed)
    inputs = test_random.laid_out(make_inputs(case), layout)
    with torch.no_grad():
        operation(case)(**arguments(case, inputs), impl="fused")
    run(case, inputs, "fused")
    return set(asked_for)


def pretend_to_have_an_h200() -> None:
    driver.set_active(offline.Driver(90))  # pyright: ignore[reportArgumentType]
    attention_ops.unsupported = lambda *_: None
    problem.device_traits = lambda device: ("stub", offline.SHARED_MEMORY[90])
    import_module("natten_layers.kernels.dispatch")
    for name, module in list(sys.modules.items()):
        if name.startswith("natten_layers.kernels.") and hasattr(module, "device_gap"):
            setattr(module, "device_gap", lambda _: gluon_gap())  # noqa: B010
        if name.startswith("natten_layers.kernels.") and hasattr(module, "multiprocessors"):
            setattr(module, "multiprocessors", lambda _: 132)  # noqa: B010
    knobs.runtime.jit_cache_hook = note


def main(calls: int) -> None:
    pretend_to_have_an_h200()
    test_random, found = random_calls(), Kernels()
    of_first_calls = 0
    for seeds in test_random.groups(range(calls)):
        kernels = [kernels_of(test_random, seed) for seed in seeds]
        of_first_calls += len(kernels[0])
        found.update(*kernels)
    print(calls, len(found), of_first_calls)


if __name__ == "__main__":
    main(int(sys.argv[1]))
