"""The kernels compile for GPUs, on a machine without one: errors that the interpreter cannot find."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from math import ceil, prod
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import natten_layers
from natten_layers import neighborhood_attention
from natten_layers.geometry import query_bounds
from natten_layers.kernels.host.problem import in_units, stride_unit
from natten_layers.kernels.host.tiling import (
    Box,
    Kind,
    ProblemClass,
    Room,
    best_boxes,
    boxes,
    column_parts,
    executed,
    fit,
    has_operands_in_registers,
    packed_heads,
    register_block,
    register_limit,
    register_memory,
    register_tile,
    room,
    rule,
    shared_memory,
)
from natten_layers.kernels.ops.attention import compiler_gap
from natten_layers.kernels.sm90.available import gluon_gap

triton = pytest.importorskip("triton")

KERNELS = (
    "forward_kernel",
    "jvp_kernel",
    "backward_query_kernel",
    "backward_key_kernel",
    "backward_register_kernel",
    "bias_gradient_kernel",
    "bias_sum_kernel",
    "decode_kernel",
    "merge_kernel",
    "qk_prep_kernel",
    "qk_prep_jvp_kernel",
    "qk_prep_backward_kernel",
    "row_sums_kernel",
    "sample_kernel",
    "split_kernel",
    "settle_kernel",
    "pair_forward_kernel",
    "pair_query_kernel",
    "pair_key_kernel",
)

SM90_KERNELS = {
    "large": (
        "large_forward_kernel",
        "large_dq_kernel",
        "large_dkv_kernel",
        "large_registers_kernel",
        "statistics_kernel",
        "repair_kernel",
        "repair_query_kernel",
        "repair_key_kernel",
    ),
    "medium": (
        "medium_forward_kernel",
        "medium_dq_kernel",
        "medium_dkv_kernel",
        "medium_bias_kernel",
        "bias_sum_kernel",
        "medium_jvp_kernel",
        "medium_pair_forward_kernel",
        "medium_pair_dq_kernel",
        "medium_pair_dkv_kernel",
        "sample_kernel",
        "split_kernel",
        "settle_kernel",
    ),
    "small": (
        "small_forward_kernel",
        "small_forward_rolling_kernel",
        "small_dq_kernel",
        "small_dkv_kernel",
        "repair_query_kernel",
        "repair_key_kernel",
    ),
}
"""Names for each kind of windows"""


FENCES = {
    # One for each group of warps that computes, as these hand buffers back to TMA; none where values have other widths.
    "large_forward_kernel": {0, 2, 3},
    "large_dq_kernel": {2, 3},
    "large_dkv_kernel": {2, 0},  # none for wide heads, whose results do not pass through shared memory
    # More where threads write keys and values, too: zeros over masked ones, or all of packed images.
    "small_forward_kernel": {1, 2},
    "small_dq_kernel": {1, 2},
    "small_dkv_kernel": {1, 2},
    "medium_forward_kernel": {1, 2},
    "medium_dq_kernel": {1, 2},
    "medium_dkv_kernel": {2, 5},
    "medium_jvp_kernel": {2, 3},  # one for each result of which threads write the rows, and one for masked keys
    "medium_pair_forward_kernel": {2},  # around the tiles that threads split, whose shared memory the ring takes
    "medium_pair_dq_kernel": {1},
    "medium_pair_dkv_kernel": {1},
    "small_forward_rolling_kernel": {1, 2},  # 2 where it rotates queries and keys, which tensor cores read afterwards
}
"""Numbers of proxy fences of a kernel's variants. None comes from the compiler: behind what threads write to shared
memory, and before what reads or overwrites it by another way (TMA, tensor cores), there must be one in the source."""


PTXAS_LOG = "ptxas.log"
MOST_SPILLED = {"portable": 480, "sm90-large": 512, "sm90-medium": 256, "sm90-small": 128}
"""Bytes that a thread of a kernel of each part may spill, a little more than there are with Triton 3.7's ptxas."""
SPILLING = {"repair_kernel": 1200}
"""Bytes of kernels that may spill more, as they have nothing to do unless a result is not finite."""
SPILLING_ON_SM90 = {"forward_kernel": 760, "backward_register_kernel": 2400}
"""Bytes of portable kernels that spill more on 9.0, where others take their place: with biases and a mask, and of 40
register tokens of 256 channels."""


def unfenced_copies(ptx: str) -> list[str]:
    """Copies from shared to global memory by TMA without both a proxy fence and, behind it, a barrier of all threads
    since the last write of threads to shared memory. Without the fence, TMA may read what was there before; without
    the barrier, so it may with what other threads wrote than the one that starts the copy.
    """
    unfenced, fenced, ready = [], False, False
    for line in ptx.splitlines():
        if re.search(r"\b(st\.shared|stmatrix)", line):
            fenced = ready = False
        elif "fence.proxy.async" in line:
            fenced = True
        elif re.search(r"\b(bar|barrier)\.(cta\.)?sync", line):
            ready = fenced
        elif re.search(r"cp\.async\.bulk\.tensor\.\dd\.global\.shared::cta", line) and not ready:
            unfenced.append(line.strip())
    return unfenced


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (["write", "fence", "barrier", "copy", "copy"], 0),
        (["write", "barrier", "write", "fence", "copy", "barrier", "copy"], 1),
        (["write", "barrier", "fence", "copy"], 1),
        (["write", "barrier", "copy"], 1),
        (["write", "fence", "barrier", "write", "copy"], 1),
    ],
)
def test_copies_without_a_fence_are_found(lines: list[str], count: int) -> None:
    words = {
        "write": "\tstmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1+32768], {%r2, %r3, %r4, %r5};",
        "fence": "\tfence.proxy.async.shared::cta;",
        "barrier": "\tbar.sync \t0;",
        "copy": "\t@%p8 cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%rd1, {%r1, %r2, %r3, %r4, %r5}], [%r6];",  # noqa: E501,
    }
    assert len(unfenced_copies("\n".join(words[line] for line in lines))) == count


@pytest.mark.parametrize("capability", [90, 100])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    (compiled,) = compiled_offline((capability,), "portable", tmp_path)
    assert set(compiled) == set(KERNELS)
    assert compiled.count("forward_kernel") == (9 if capability == 90 else 8)
    if capability == 90:
        check_spills("portable", tmp_path, SPILLING_ON_SM90)


def test_kernels_compile_for_less_shared_memory(tmp_path: Path) -> None:
    """For 8.0, and those that take other tiles for 8.6. The rest is the same code, as the script checks, too."""
    all_kernels, smaller = compiled_offline((80, 86), "portable", tmp_path)
    assert set(all_kernels) == set(KERNELS)
    assert all_kernels.count("forward_kernel") == 8
    assert len(smaller) == 11
    assert smaller.count("forward_kernel") == 3
    check_spills("portable", tmp_path)


@pytest.mark.parametrize("windows", SM90_KERNELS)
def test_sm90_kernels_compile(windows: str, tmp_path: Path) -> None:
    if (reason := gluon_gap()) is not None:
        pytest.skip(reason)
    (compiled,) = compiled_offline((90,), f"sm90-{windows}", tmp_path)
    assert set(compiled) == set(SM90_KERNELS[windows])
    if windows == "small":
        assert compiled.count("small_forward_rolling_kernel") == 5  # two of them normalise and rotate
    check_fences(windows, tmp_path)
    check_spills(f"sm90-{windows}", tmp_path)


def check_spills(part: str, cache: Path, exceptions: Mapping[str, int] = SPILLING) -> None:
    """Check that no kernel of a part spills many registers, with the release of Triton that the limits are from."""
    most = most_spilled(cache)
    assert set(KERNELS if part == "portable" else SM90_KERNELS[part.removeprefix("sm90-")]) <= set(most)
    if not triton.__version__.startswith("3.7."):
        return
    assert {name: n for name, n in most.items() if n > exceptions.get(name, MOST_SPILLED[part])} == {}


def compiled_offline(capabilities: tuple[int, ...], part: str, cache: Path) -> list[list[str]]:
    """Names of the kernels of a part that were compiled for each capability, into a cache of their own."""
    for capability in capabilities:
        if (reason := compiler_gap(divmod(capability, 10), triton.__version__)) is not None:
            pytest.skip(reason)
    script = Path(__file__).with_name("offline.py")
    settings = {"PYTHONPATH": str(script.parents[1]), "TRITON_CACHE_DIR": str(cache), "TRITON_DUMP_PTXAS_LOG": "1"}
    command = [sys.executable, str(script), ",".join(map(str, capabilities)), part]
    # Before the Makefile's limit for a test, at which the whole process would end without its output.
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stderr[-2000:]
    (cache / PTXAS_LOG).write_text(done.stdout.split("kernels that spill:")[0])
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("kernels: ")]


def most_spilled(cache: Path) -> dict[str, int]:
    """For each kernel that was compiled into a folder the most bytes that a thread spills, by ptxas' own report."""
    report = (
        r"Function properties for (\w+)\n *\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    most: dict[str, int] = {}
    for name, *spilled in re.findall(report, (cache / PTXAS_LOG).read_text()):
        most[name] = max(most.get(name, 0), *map(int, spilled))
    return most


def check_fences(windows: str, cache: Path) -> None:
    """Check the fences of all kernels that were compiled into a folder of Triton's cache."""
    found: dict[str, list[int]] = {}
    for file in (file for file in cache.rglob("*.ptx") if file.stem in FENCES):
        ptx = file.read_text()
        assert unfenced_copies(ptx) == [], file.stem
        found.setdefault(file.stem, []).append(ptx.count("fence.proxy.async"))
        of_packed_images = file.stem.startswith("small") and "cp.async.cg" in ptx  # they store without TMA
        stores_by_tma = not of_packed_images and "large" not in file.stem and "pair" not in file.stem
        assert ("global.shared::cta" in ptx) == stores_by_tma, file.stem
        assert not of_packed_images or "cp.async.bulk" not in ptx, file.stem
    expected = {name: counts for name, counts in FENCES.items() if name in SM90_KERNELS[windows]}
    assert {name: set(counts) for name, counts in found.items()} == expected
    if windows == "small":
        assert sorted(found["small_forward_rolling_kernel"]) == [1, 1, 1, 2, 2]


def test_no_device_function_returns_none_by_name() -> None:
    """Triton 3.6 does not compile ``return None if a else b``; it takes a variable that is None."""
    kernels = Path(natten_layers.__file__).parent / "kernels"
    found, jitted = [], 0
    for path in sorted(kernels.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            if not any(ast.unparse(decorator).endswith(".jit") for decorator in function.decorator_list):
                continue
            jitted += 1
            returned = [part.value for part in ast.walk(function) if isinstance(part, ast.Return) and part.value]
            for value in returned:
                branches = (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)
                if any(isinstance(branch, ast.Constant) and branch.value is None for branch in branches):
                    found.append(f"{path.name}, {function.name}: return {ast.unparse(value)}")
    assert jitted > 50
    assert not found


def test_blackwell_needs_a_triton_that_compiles_for_it() -> None:
    assert "3.8 can" in (compiler_gap((10, 0), "3.7.1") or "")
    assert compiler_gap((10, 3), "3.6.0") is not None
    assert [compiler_gap(c, v) for c, v in (((10, 0), "3.8.0"), ((9, 0), "3.6.0"), ((12, 0), "3.7.1+git1"))] == [
        None
    ] * 3


@pytest.mark.parametrize("limit", [64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("width", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_fit_into_shared_memory(limit: int, width: int, element_size: int) -> None:
    space = Room(limit, width, element_size)
    rows, keys, stages = fit("backward_query", 128, 128, 3, space)
    assert rows >= 16
    assert keys >= 16
    assert stages >= 1
    least = shared_memory("backward_query", 16, 16, 1, space)
    assert shared_memory("backward_query", rows, keys, stages, space) <= max(limit, least)
    assert fit("backward_query", rows, keys, stages, space) == (rows, keys, stages)
    assert fit("forward", 64, 64, 3, Room(227 * 1024, 64, 2)) == (64, 64, 3)  # nothing changes where there is room


@pytest.mark.parametrize(
    ("kind", "rows", "keys", "stages", "width", "element_size", "taken"),
    [
        ("forward", 128, 128, 3, 32, 4, 107008),
        ("forward", 128, 128, 2, 64, 4, 115200),
        ("forward", 128, 64, 2, 128, 4, 98304),
        ("forward", 128, 128, 3, 16, 2, 53248),
        ("forward", 128, 128, 2, 64, 2, 81920),
        ("backward_query", 128, 64, 3, 32, 4, 65536),
        ("backward_query", 64, 64, 2, 128, 4, 81920),
        ("backward_key", 64, 32, 3, 32, 4, 25088),
        ("backward_key", 64, 32, 3, 128, 2, 70144),
    ],
)
def test_shared_memory_is_not_less_than_compiled_kernels_take(
    kind: Kind, rows: int, keys: int, stages: int, width: int, element_size: int, taken: int
) -> None:
    """The estimate is at least what Triton 3.6 needed for compute capability 8.6."""
    found = shared_memory(kind, rows, keys, stages, Room(0, width, element_size))
    assert taken <= found < 1.5 * taken


@pytest.mark.parametrize(
    ("kind", "rows", "keys", "stages", "width", "taken"),
    [
        ("forward", 128, 128, 3, 128, 262144),
        ("forward", 64, 32, 2, 256, 131072),
        ("forward", 16, 16, 2, 512, 98304),
        ("backward_query", 64, 32, 2, 256, 196608),
        ("backward_query", 16, 16, 2, 512, 131072),
    ],
)
def test_tiles_of_fp32_are_counted_twice(kind: Kind, rows: int, keys: int, stages: int, width: int, taken: int) -> None:
    """The estimate fits what Triton 3.7 needed on compute capability 9.0, with each product as three in TF32."""
    problem = ProblemClass("stub", 227 * 1024, (1, 1, 2048), (1, 1, 1024), 4, width // 2, width // 2, 4)
    space = room(problem)
    assert space.width == width
    assert taken <= shared_memory(kind, rows, keys, stages, space) < 1.1 * taken
    assert room(problem._replace(element_size=2)).copies == 1


@pytest.mark.parametrize("limit", [64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("element_size", [2, 4])
def test_gradients_of_registers_fit_into_shared_memory(limit: int, head_dim: int, element_size: int) -> None:
    problem = ProblemClass("stub", limit, (1, 64, 64), (1, 7, 7), 1, head_dim, head_dim, element_size)
    registers, rows = register_block(problem, register_tile(problem, 100))
    assert registers >= 16
    assert rows >= 16
    width, copies = head_dim * element_size // 2, room(problem).copies
    assert register_memory(registers, rows, width, copies) <= max(limit, register_memory(16, 16, width, copies))
    assert register_block(problem, 16)[0] == 16
    assert register_memory(64, 64, 256) >= 263168  # what ptxas asked for, for an H100
    assert register_memory(64, 16, 512, copies=2) >= 360704


def test_operands_have_room_in_registers_where_products_read_them_from_there() -> None:
    """An RTX 4090 and an A100 raise limits of a thread's hardware registers, an H200 keeps them."""
    rooms = [Room(limit * 1024, 64, 2) for limit in (99, 163, 227)]
    assert [has_operands_in_registers(each.limit) for each in rooms] == [True, True, False]
    assert [register_limit(96, each) for each in rooms] == [168, 168, 96]
    assert [register_limit(200, each) for each in rooms] == [200, 200, 200]
    assert [register_limit(None, each) for each in rooms] == [None, None, None]


LIMITS = (99 * 1024, 163 * 1024, 227 * 1024)


@st.composite
def problem_classes(draw: st.DrawFn) -> ProblemClass:
    """Problem classes of all kinds that the kernels support."""
    rank = draw(st.integers(1, 3))
    lengths = [1] * (3 - rank) + draw(st.lists(st.integers(1, 500), min_size=rank, max_size=rank))
    t, h, w = ((n, draw(st.integers(1, n))) for n in lengths)
    head_dim, value_dim = (8 * draw(st.integers(1, 32)) for _ in range(2))
    group, limit = draw(st.integers(1, 64)), draw(st.sampled_from(LIMITS))
    axes = (t[0], h[0], w[0]), (t[1], h[1], w[1])
    return ProblemClass("stub", limit, *axes, group, head_dim, value_dim, draw(st.sampled_from((2, 4))))


@given(problem=problem_classes(), kind=st.sampled_from(get_args(Kind)))
def test_rule_serves_every_problem(problem: ProblemClass, kind: Kind) -> None:
    config = rule(kind, problem)
    rows, keys = prod(config.tile) * config.pack, prod(config.chunk)
    space = room(problem)
    least = shared_memory(kind, 16, 16, 1, space)
    assert shared_memory(kind, rows, keys, config.stages, space) <= max(problem.shared_memory, least)
    assert min(rows, keys) >= 16
    assert all(side & (side - 1) == 0 for side in (*config.tile, *config.chunk, config.pack, config.num_warps))
    # Accumulators of the wider tensor, and of both where there are two: 255 registers a thread hold no more.
    tensors = 2 if kind == "backward_key" else 1
    columns = space.width // max(1, problem.element_size // 2)
    assert rows * columns * tensors <= 160 * 32 * config.num_warps
    if kind == "backward_key":
        assert config.pack == 1
    else:
        assert ceil(problem.group / config.pack) * config.pack <= problem.group * 8 / 7


@given(head_dim=st.integers(1, 32).map(lambda n: 8 * n))
def test_columns_come_in_parts_that_hold_them(head_dim: int) -> None:
    parts = column_parts(head_dim)
    assert len(parts) <= 2
    assert all(part >= 16 and part & (part - 1) == 0 for part in parts)
    assert sum(parts[:-1]) < head_dim <= sum(parts)
    assert sum(parts) <= max(16, 2 * head_dim - 8)


def test_columns_by_hand() -> None:
    dims = (8, 32, 40, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256)
    parts = [(16,), (32,), (32, 16), (64,), (64, 16), (64, 16), (64, 32), (64, 32), (128,), (128,)]
    assert [column_parts(dim) for dim in dims] == [*parts, (128, 32), (128, 64), (256,)]


def test_packed_heads_leave_few_rows_idle() -> None:
    groups = (1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 16, 24, 64)
    assert [packed_heads(group, 64) for group in groups] == [1, 2, 1, 4, 1, 2, 8, 8, 4, 16, 16, 8, 16]
    assert packed_heads(16, 4) == 4


def test_boxes_waste_no_rows_on_a_short_axis() -> None:
    """On an axis of 24, a tile of length 32 would see the fewest keys, but a quarter of its rows would be idle."""
    tile, _ = best_boxes(128, 64, (24, 68, 80), (11, 11, 11))
    assert tile[0] <= 8


def test_chunks_cover_the_queries_of_keys_near_a_border() -> None:
    """Keys 8 to 15 of 9x9 windows are seen by queries 0 to 19, as those of the border see keys 0 to 8."""
    axes = (1, 64, 64), (1, 9, 9)
    assert best_boxes(64, 16, *axes, rows_are_keys=True) == ((1, 8, 8), (1, 4, 4))
    assert best_boxes(64, 16, *axes) == ((1, 8, 8), (1, 1, 16))


@given(problem=problem_classes())
def test_tiles_of_keys_compute_no_more_scores_than_others(problem: ProblemClass) -> None:
    config = rule("backward_key", problem)
    axes = [(n, k, 1, False) for n, k in zip(problem.lengths, problem.kernel, strict=True)]

    def scores(tile: Box, chunk: Box) -> int:
        return prod(executed(*sides, query_bounds) for sides in zip(axes, tile, chunk, strict=True))

    unions = [min(n, prod(config.tile) + k - 1) for n, k in zip(problem.lengths, problem.kernel, strict=True)]
    others = boxes(prod(config.chunk), unions)
    assert scores(config.tile, config.chunk) <= min(scores(config.tile, chunk) for chunk in others)


def test_strides_are_counted_in_units_that_divide_all_of_them() -> None:
    assert stride_unit([(40, 0, 80), (72,)]) == 8
    assert stride_unit([(40, 80), (36,)]) == 1
    assert in_units([(40, 0, 80), (72,)], 8) == ((5, 0, 10), (9,))


@pytest.mark.parametrize("room_after", [0, 3])
def test_heads_may_lie_anywhere(room_after: int) -> None:
    """Heads may have any strides, multiples of 8 or not."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 1, 5, 6, 2, 40 + room_after, generator=generator)
    query, key, value = whole[..., :40].requires_grad_()
    out = neighborhood_attention(query, key, value, 3, impl="fused")
    expected = neighborhood_attention(query, key, value, 3, impl="eager")
    torch.testing.assert_close(out, expected)
    gradients = (torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (out, expected))
    torch.testing.assert_close(*gradients)
