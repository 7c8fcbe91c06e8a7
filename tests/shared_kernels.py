"""Count the kernels that random calls on an H200 are compiled for: ``python tests/shared_kernels.py 200``.

Nothing is compiled and nothing runs: a driver that only describes the GPU replaces CUDA's, and Triton tells what it
would compile. Prints as JSON the number of calls, of their kernels, and of those of the first call of each group, as if
each was alone; and of the first calls of ``GROUPS`` groups the percentages that take each kernel, by name, with those
for compute capability 9.0 that none takes.
"""

from __future__ import annotations

import json
import pkgutil
import sys
from collections import Counter
from importlib import import_module
from typing import Any

import offline  # first: it keeps Triton from interpreting
import pytest
import torch
from helpers import Inputs, arguments, make_inputs, operation, run
from tangents import attend, detached, directional
from triton import JITFunction, knobs
from triton.runtime import driver

from natten_layers.kernels import sm90
from natten_layers.kernels.host import problem
from natten_layers.kernels.ops import attention as attention_ops
from natten_layers.kernels.sm90.available import gluon_gap

GROUPS = 100
"""in which every kind of calls has its share"""
Kernels = set[tuple[str, str]]
"""Names, and Triton's descriptions of what each is compiled for"""
asked_for: Kernels = set()


def draws_on_a_gpu() -> Any:
    """``random_calls.py`` as it is on a machine with a GPU, where it draws larger calls."""
    is_available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    module = import_module("random_calls")
    torch.cuda.is_available = is_available
    return module


def note(*, fn: Any, key: str, **_: object) -> bool:
    asked_for.add((fn.name, key))
    return True  # do not compile it


def kernels_of(draws: Any, seed: int) -> Kernels:
    """What Triton compiles for a call where nothing is compiled yet."""
    asked_for.clear()
    call = draws.draw_call(seed)
    inputs = draws.laid_out(make_inputs(call.case), call.layout)
    with torch.no_grad():
        operation(call.case)(**arguments(call.case, inputs), impl="fused")
    run(call.case, inputs, "fused")
    if call.moving:
        move(call, inputs)
    return set(asked_for)


def move(call: Any, inputs: Inputs) -> None:
    """Make a call in forward mode, with gradients and without."""
    fused, tangents = attend(call.case, "fused", call.moves_lse), detached({n: inputs[n] for n in call.moving})
    directional(fused, inputs, tangents)
    with torch.no_grad():
        directional(fused, detached(inputs), tangents)


def sm90_kernels() -> set[str]:
    """Names of the kernels for compute capability 9.0, the device functions that are launched; none without Gluon."""
    if gluon_gap() is not None:
        return set()
    modules = [import_module(f"{sm90.__name__}.{found.name}") for found in pkgutil.iter_modules(sm90.__path__)]
    functions = (x for module in modules for x in vars(module).values() if isinstance(x, JITFunction))
    return {f.__name__ for f in functions if f.__name__.endswith("_kernel") and f.__module__.startswith(sm90.__name__)}


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


def sharing(draws: Any, calls: int) -> dict[str, int]:
    """How many kernels calls take together, and how many the first calls of their groups take, each alone."""
    found, of_first_calls = Kernels(), 0
    for seeds in draws.groups(range(calls)):
        kernels = [kernels_of(draws, seed) for seed in seeds]
        of_first_calls += len(kernels[0])
        found.update(*kernels)
    return {"calls": calls, "kernels": len(found), "of first calls": of_first_calls}


def shares(draws: Any) -> dict[str, int]:
    """The percentages of groups whose first call takes a kernel."""
    taken = Counter[str]()
    for group in range(GROUPS):
        taken.update({name.rpartition(".")[2] for name, _ in kernels_of(draws, group * draws.GROUP)})
    names = sorted({*taken, *sm90_kernels()}, key=lambda name: -taken[name])
    return {name: round(100 * taken[name] / GROUPS) for name in names}


def main(calls: int) -> None:
    pretend_to_have_an_h200()
    draws = draws_on_a_gpu()
    with pytest.MonkeyPatch.context() as patch:
        draws.lower_thresholds(patch)
        patch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))  # nobody reads the values
        print(json.dumps(sharing(draws, calls) | {"shares": shares(draws)}, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]))
