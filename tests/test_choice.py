"""The benchmark of the choice of kernels: its problems, its entries and its arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import choice, implementations, random_shapes, runner
from benchmarks.implementations import OURS, Implementation, Layout
from benchmarks.random_shapes import FLOOR_MS, H200, MOST_BYTES, draw
from benchmarks.workloads import Inputs, Mode, Variant, Workload, add_variant, floor, make_inputs
from natten_layers import neighborhood_attention
from natten_layers.kernels.host import problem as host_problem
from natten_layers.kernels.host.tiling import Kind, ProblemClass
from natten_layers.kernels.host.tuned import variant_for

CPU = torch.device("cpu")
RATES = runner.Rates(copy=1e10, matmul=1e11)
NAMES = ["own", "other", "wrong"]
PROBLEM = ProblemClass("made up", 163 * 1024, (1, 32, 32), (1, 7, 7), 1, 64, 64, 4)


@pytest.fixture(scope="module")
def drawn() -> list[Workload]:
    return [draw(0, number) for number in range(200)]


def test_drawn_problems_are_valid_and_of_bounded_size(drawn: list[Workload]) -> None:
    for workload in drawn:
        assert workload.window.rank == len(workload.spatial)  # makes the window, which is checked
        assert workload.heads % workload.kv_heads == 0
        assert workload.heads <= random_shapes.MOST_HEADS
        assert workload.heads // workload.kv_heads <= 16
        assert 1 <= workload.batch <= 64
        assert FLOOR_MS[0] <= 1e3 * floor(workload, "fwd").seconds(*H200) <= FLOOR_MS[1]
        assert workload.dtype.itemsize * workload.elements() <= MOST_BYTES


def test_drawn_problems_depend_on_seed_and_number_alone(drawn: list[Workload]) -> None:
    assert [draw(0, number) for number in (7, 3)] == [drawn[7], drawn[3]]
    assert len({replace(workload, name="") for workload in drawn}) == len(drawn)
    assert replace(draw(1, 3), name="") != replace(drawn[3], name="")


@pytest.mark.parametrize(
    "has",
    [
        *(lambda w, rank=rank: w.window.rank == rank for rank in (1, 2, 3)),
        *(lambda w, dim=dim: w.head_dim == dim for dim in random_shapes.HEAD_DIMS),
        *(lambda w, dtype=dtype: w.dtype == dtype for dtype in random_shapes.DTYPES),
        lambda w: w.value_dim is not None,
        lambda w: max(w.window.stride) > 1,
        lambda w: max(w.window.dilation) > 1,
        lambda w: any(w.window.is_causal),
        lambda w: any(w.window.is_periodic),
        lambda w: w.registers > 0,
        lambda w: w.learned_sink,
        lambda w: w.land,
        lambda w: w.heads > w.kv_heads,
        lambda w: any(length % 2 for length in w.spatial),
        lambda w: len(set(w.kernel_size)) > 1,
        lambda w: min(w.kernel_size) == 3,
        lambda w: w.kernel_size[0] > 1000,
    ],
)
def test_every_option_is_drawn(has: Callable[[Workload], bool], drawn: list[Workload]) -> None:
    assert 0 < sum(map(has, drawn)) < len(drawn)


def row(implementation: str, ms: float | None) -> runner.Row:
    times_floor = None if ms is None else ms / 0.5
    failure = "wrong result" if ms is None else None
    return runner.Row("0-1", "bwd", implementation, OURS, "", 0.5, failure, median_ms=ms, times_floor=times_floor)


def test_regrets_by_hand() -> None:
    known: dict[Kind, list[str]] = {"backward_query": ["small", "large", "portable"], "backward_key": ["portable", "a"]}
    rows = [row("chosen", 3.0), row("backward_query large", None), row("backward_query portable", 2.0)]
    rows.append(row("backward_key a", 3.5))
    query, key = choice.regrets("its shape", rows, known)
    assert (query.chosen, query.chosen_ms, query.fastest, query.fastest_ms) == ("small", 3.0, "portable", 2.0)
    assert (query.ratio, query.times_floor) == (1.5, 6.0)
    assert (key.chosen, key.fastest, key.ratio) == ("portable", "portable", 1.0)
    lines = choice.table([key, query])
    assert lines[2] == "| 0-1 | its shape | backward_query | small | 3 | portable | 2 | 1.50 | 6.00 |"
    assert lines[-2:] == [
        "\nall: choices 2, median 1.250, above 1.1 1",
        "\nbwd: problems 1, median 6.00 times the floor, worst 6.00",
    ]
    assert runner.failures(rows)[1:] == ["- 0-1 bwd backward_query large: wrong result"]
    assert not list(choice.regrets("its shape", [row("chosen", None), *rows[1:]], known))


def test_every_variant_that_can_compute_a_kernel_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card of which there is only the name, so that portable kernels and pairs of fp16 alone can."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(host_problem, "device_traits", lambda device: ("made up", 163 * 1024))
    workload = Workload("test", 1, (32, 32), 4, 4, 64, (7, 7), dtype=torch.float32)
    known = choice.rivals_of(workload, "bwd", torch.device("cuda", 0))
    assert {kind: sorted(names) for kind, names in known.items()} == {
        kind: ["fp16 pairs", "portable"] for kind in choice.KERNELS["bwd"]
    }
    alone = choice.rivals_of(workload, "bwd", torch.device("cuda", 0), others=False)
    assert alone == {kind: known[kind][:1] for kind in choice.KERNELS["bwd"]}
    own, *others = choice.entries(workload, known, CPU)
    assert own.name == choice.CHOSEN
    assert [entry.name for entry in others] == [f"{kind} {known[kind][1]}" for kind in choice.KERNELS["bwd"]]
    for entry, kind in zip(others, choice.KERNELS["bwd"], strict=True):
        with entry.context():
            asked = [variant_for(each, PROBLEM) for each in choice.KERNELS["bwd"]]
        assert asked == [known[kind][1] if each == kind else None for each in choice.KERNELS["bwd"]]


def test_a_backward_pass_is_timed_without_its_forward_pass() -> None:
    forwards: list[Inputs] = []

    def forward(inputs: Inputs) -> Tensor:
        forwards.append(inputs)
        return neighborhood_attention(inputs.query, inputs.key, inputs.value, 3)

    workload = Workload("test", 1, (24,), 2, 1, 16, (3,))
    entry = Implementation("own", OURS, Variant(), workload, forward, Layout())
    inputs = [add_variant(make_inputs(workload, CPU, seed), Variant(), seed) for seed in range(2)]
    call = runner.call(entry, inputs, "bwd")
    results = [call(i) for i in (0, 1, 2)]
    assert len(forwards) == 2
    for i, found in enumerate(results):
        expected = runner.call(entry, inputs, "fwdbwd")(i)
        assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (timed,) = runner.run(workload, "bwd", [entry], RATES, 0.0, CPU)
    assert timed.failure is None
    assert timed.errors is not None
    assert set(timed.errors) == {"out", "d_query", "d_key", "d_value"}
    forward_floor, backward, both = (floor(workload, mode) for mode in ("fwd", "bwd", "fwdbwd"))
    assert (forward_floor.flop + backward.flop, forward_floor.bytes + backward.bytes) == (both.flop, both.bytes)


def test_choice_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up rivals, of which one is wrong."""

    def rivals_of(workload: Workload, mode: Mode, device: torch.device, others: bool) -> choice.Rivals:
        return dict.fromkeys(choice.KERNELS[mode], NAMES if others else NAMES[:1])

    monkeypatch.setattr(choice, "rivals_of", rivals_of)
    attend = implementations.neighborhood_attention

    def breaks(*args: Any, **options: Any) -> Tensor:
        out = attend(*args, **options)
        return 2 * out if variant_for("forward", PROBLEM) == "wrong" else out

    monkeypatch.setattr(implementations, "neighborhood_attention", breaks)
    path = tmp_path / "choice.json"
    flags = f"--device cpu --smoke --budget-s 0 --seed 0 --problems 1,5 --commit abc --out {path}"
    assert choice.main(flags.split()) == 0
    report = json.loads(path.read_text())
    assert report["environment"]["commit"] == "abc"
    assert [(one["problem"], one["kernel"]) for one in report["regrets"]] == [
        (name, kind) for name in ("0-1", "0-5") for kind in ("forward", "backward_query", "backward_key")
    ]
    assert all(one["chosen"] == "own" and one["ratio"] >= 1 for one in report["regrets"])
    failed = {(row["mode"], row["implementation"]) for row in report["rows"] if row["failure"]}
    assert failed == {("fwd", "forward wrong")}
    printed = capsys.readouterr().out
    ratios = [float(line.split(" | ")[7]) for line in printed.splitlines() if line.startswith("| 0-")]
    assert len(ratios) == 6
    assert ratios == sorted(ratios, reverse=True)
    assert "- 0-5 fwd forward wrong: wrong result" in printed
    assert choice.main([*flags.split(), "--no-rivals"]) == 0
    report = json.loads(path.read_text())
    assert [row["implementation"] for row in report["rows"]] == [choice.CHOSEN] * 4
    assert all(one["ratio"] == 1 for one in report["regrets"])
    printed = capsys.readouterr().out
    floors = [
        float(line.split(" | ")[8].removesuffix(" |")) for line in printed.splitlines() if line.startswith("| 0-")
    ]
    assert floors == sorted(floors, reverse=True)
    assert "fwd: problems 2, median" in printed


def test_choice_stops_in_time_and_refuses_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "choice.json"
    flags = f"--device cpu --smoke --count 2 --limit-s 0 --out {path}".split()
    assert choice.main([*flags, "--compile-only"]) == 0
    assert choice.main(flags) == 1
    assert not path.exists()
    assert capsys.readouterr().err.startswith("error: nothing was timed, and nothing written: --limit-s 0, ")
    for wrong in (["--problems", "gemma3"], ["--problems", "-5"], ["--problems", ""], ["--count", "0"]):
        with pytest.raises(SystemExit):
            choice.main(wrong)
        assert f"{wrong[0]} takes" in capsys.readouterr().err
