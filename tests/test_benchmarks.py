"""The benchmarks' arithmetic, and above all their refusal of wrong results."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import benchmarks
from benchmarks import (
    attention,
    bias,
    census,
    check,
    forward_mode,
    generation,
    host,
    implementations,
    models,
    pages,
    plot,
    regression,
    repeat,
    runner,
    step,
    sweep,
    timing,
    windows,
)
from benchmarks import problem as own_problem
from benchmarks.check import Reference, wrong_result
from benchmarks.implementations import HeadsFirst, Implementation, Layout
from benchmarks.shapes import CENSUS
from benchmarks.workloads import MODES, WORKLOADS, Inputs, Variant, Workload, add_variant, floor, make_inputs, smoke
from natten_layers import Kernel, explain, neighborhood_attention
from natten_layers.eager import dense_attention_state
from natten_layers.geometry import window_mask
from natten_layers.kernels.host.tiling import Kind
from natten_layers.kernels.host.tuned import is_portable_only

CPU = torch.device("cpu")
QKV = "query", "key", "value"
RATES = runner.Rates(copy=1e10, matmul=1e11)


@pytest.fixture(scope="module", autouse=True)
def called_twice() -> Iterator[None]:
    """Let every call be timed once, after one to warm up, as a test looks at results alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SLOW", 0.0)
        patch.setattr(timing, "MIN_SAMPLES", 1)
        yield


def problem(
    spatial: tuple[int, ...], kernel: tuple[int, ...], registers: int = 0, sink: Any = None, **fields: Any
) -> tuple[Workload, Inputs]:
    workload = Workload("test", 2 if spatial else 1, spatial, 4, 2, 8, kernel, **fields)
    return workload, add_variant(make_inputs(workload, CPU, 0), Variant(registers, sink, workload.variant.bias), 0)


def dense(workload: Workload, inputs: Inputs) -> Tensor:
    """Dense attention by the oracle, which shares no code with the benchmarks' checker, in the inputs' dtype."""
    registers = (inputs.additional_keys, inputs.additional_values)
    qkv = (inputs.query, inputs.key, inputs.value)
    if workload.shapes:
        sizes = [math.prod(shape) for shape in workload.shapes]
        samples = zip(workload.images, *(x.split(sizes) for x in qkv), strict=True)
        outs = [
            dense(
                image,
                replace(inputs, **{n: x.unflatten(0, (1, *image.spatial)) for n, x in zip(QKV, own, strict=True)}),
            )
            for image, *own in samples
        ]
        return torch.cat([out.flatten(0, -3) for out in outs])
    window, mask = workload.window, inputs.key_mask
    return dense_attention_state(*qkv, *registers, inputs.sink, window, workload.scale, inputs.rpb, key_mask=mask)[0]


def dense_gradients(workload: Workload, inputs: Inputs) -> dict[str, Tensor]:
    names = ["query", "key", "value"] + (
        ["additional_keys", "additional_values"] if inputs.additional_keys is not None else []
    )
    names += ["sink"] if isinstance(inputs.sink, Tensor) else []
    names += ["rpb"] if inputs.rpb is not None else []
    leaves = {name: getattr(inputs, name).double().requires_grad_() for name in names}
    out = dense(workload, replace(inputs, **leaves))
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out.double())
    return {"out": out.detach(), **{f"d_{name}": g for name, g in zip(names, gradients, strict=True)}}


@pytest.mark.parametrize(
    ("name", "forward_ms", "both_ms"),
    [
        ("hdit-l0", 0.126, 0.377),
        ("hdit-l1", 0.063, 0.189),
        ("hdit-gqa", 0.079, 0.236),
        ("seed", 0.071, 0.212),
        ("flux-4k", 7.0, 24.5),
        ("hunyuan", 19.9, 69.8),
        ("mistral", 2.8, 9.8),
        ("gpt-oss", 0.071, 0.212),
    ],
)
def test_floors(name: str, forward_ms: float, both_ms: float) -> None:
    """Floors computed by hand for an H200 with a copy bandwidth of 4.27 TB/s and 736 TFLOP/s."""
    seconds = [floor(WORKLOADS[name], mode).seconds(4.27e12, 736e12) for mode in ("fwd", "fwdbwd")]
    assert [1e3 * s for s in seconds] == pytest.approx([forward_ms, both_ms], rel=0.01)


def test_floor_counts() -> None:
    """5 tokens, 3 keys: 15 pairs, or 1 + 2 + 3 + 3 + 3 = 12 if causal; 2 heads of 8 over 1 KV head, batch 3, bf16."""
    workload = Workload("hand", 3, (5,), 2, 1, 8, (3,))
    assert workload.visible_pairs() == 15
    assert replace(workload, causal=True).visible_pairs() == 12
    assert replace(workload, spatial=(5, 4), kernel_size=(3, 4)).visible_pairs() == 15 * 16
    assert floor(workload, "fwd").flop == 2 * (2 * 8) * 15 * 2 * 3
    assert floor(workload, "fwdbwd").flop == 7 * (2 * 8) * 15 * 2 * 3
    assert floor(workload, "fwd").bytes == 2 * (2 * 3 * 5 * 2 * 8 + 2 * 3 * 5 * 8)


@pytest.mark.parametrize("band_pairs", [check.BAND_PAIRS, 64])
@pytest.mark.parametrize(
    "arguments",
    [
        {"spatial": (23,), "kernel": (5,), "causal": True, "sink": "learned"},
        {"spatial": (9, 11), "kernel": (3, 6), "registers": 3, "sink": "zero"},
        {"spatial": (4, 5, 6), "kernel": (3, 2, 3), "registers": 1, "sink": "learned"},
        {"spatial": (5, 6), "kernel": (5, 6)},
        {"spatial": (11, 12), "kernel": (3, 4), "dilation": (3, 1), "stride": (2, 3), "registers": 2, "value_dim": 16},
        {
            "spatial": (5, 7, 6),
            "kernel": (2, 3, 2),
            "dilation": (2, 2, 1),
            "causal": (True, False, True),
            "sink": "learned",
        },
        {"spatial": (19,), "kernel": (5,), "causal": True, "stride": 4, "dtype": torch.float16},
        {"spatial": (9, 12), "kernel": (3, 4), "dilation": (3, 2), "stride": (2, 3), "periodic": (True, False)},
        {"spatial": (6, 10), "kernel": (6, 4), "stride": (1, 3), "periodic": True, "registers": 2, "land": True},
        {"spatial": (12, 9), "kernel": (1, 2), "land": True},
        {"spatial": (9, 12), "kernel": (3, 4), "causal": (True, False), "land": True, "sink": "learned"},
        {"spatial": (9, 5), "kernel": (2, 5), "key_spatial": (4, 7), "registers": 1, "sink": "learned"},
        {"spatial": (4, 3), "kernel": (2, 3), "key_spatial": (9, 8), "periodic": (False, True), "land": True},
        {"spatial": (9, 12), "kernel": (3, 4), "stride": (2, 1), "dilation": (1, 2), "bias": True, "registers": 2},
        {"spatial": (11, 6), "kernel": (4, 6), "periodic": True, "bias": True, "sink": "learned"},
        {"spatial": (), "kernel": (5,), "shapes": ((3,), (17,), (1,)), "causal": True, "sink": "learned"},
        {"spatial": (), "kernel": (3, 4), "shapes": ((2, 9), (7, 5), (1, 1)), "dilation": (1, 2), "stride": (2, 1)},
    ],
)
def test_reference_is_exact(arguments: Any, band_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BAND_PAIRS", band_pairs)
    workload, inputs = problem(**arguments)
    truth = dense_gradients(workload, inputs)
    errors = Reference(workload, inputs, "fwdbwd").errors(truth)
    assert errors.keys() == truth.keys()
    assert all(error < 1e-12 for error, _ in errors.values()), errors


def test_the_reference_computes_few_pairs_at_a_time_on_any_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one frame of a video has too many."""
    pairs: list[int] = []
    find_rows = Reference._rows

    def watched(self: Reference, grid: check.Grid, head: int, box: check.Box, *args: Any) -> Any:
        keys = self._bounds(check.key_bounds, box, grid)
        pairs.append(math.prod(last - first + 1 for first, last in (*box, *keys)))
        return find_rows(self, grid, head, box, *args)

    monkeypatch.setattr(check, "BAND_PAIRS", 64)
    monkeypatch.setattr(Reference, "_rows", watched)
    Reference(*problem((2, 6, 6), (2, 3, 3), sink="learned"), "fwdbwd")
    assert 32 < max(pairs) <= 64


def test_budget_admits_bf16_and_little_more() -> None:
    workload, inputs = problem((96,), (64,), causal=True)
    reference = Reference(workload, inputs, "fwd")
    out = dense(workload, inputs)
    error, allowed = reference.errors({"out": out})["out"]
    assert error < allowed < 0.01
    error, allowed = reference.errors({"out": out * 1.02})["out"]
    assert error > allowed


@pytest.mark.parametrize(
    "fields",
    [
        {"periodic": True},
        {"land": True},
        {"land": True, "periodic": (False, True), "kernel_size": (4, 5)},
        {"land": True, "key_spatial": (5, 8)},
        {"key_spatial": (5, 8)},
        {"spatial": (), "shapes": ((3, 9), (2, 2))},
        {"spatial": (), "shapes": ((3, 9), (8, 4)), "dilation": 2, "causal": True},
    ],
)
def test_pairs_are_counted_exactly(fields: dict[str, Any]) -> None:
    """Against masks of all pairs."""
    workload = replace(Workload("test", 1, (10, 12), 4, 2, 8, (3, 3)), **fields)
    pairs = 0
    for image in workload.images:
        mask = window_mask(image.spatial, image.window, key_spatial=image.key_spatial or None)
        land = image.key_mask()
        pairs += int((mask if land is None else mask & land.flatten()).sum())
    assert workload.visible_pairs() == pairs
    inputs = make_inputs(workload, CPU, 0)
    assert workload.elements() == sum(x.numel() for x in (inputs.query, inputs.key, inputs.value, inputs.grad_out))


def peers_on_a_cpu(workload: Workload, *names: str) -> list[Implementation | tuple[str, str]]:
    return list(implementations.implementations(workload, [workload.variant], list(names), ["raster"], CPU))[1:]


@pytest.mark.parametrize("peer", ["flex", "natten"])
def test_a_peer_that_stores_all_scores_on_a_cpu_runs_few_tokens_there(peer: str) -> None:
    if peer == "natten":
        pytest.importorskip("natten")
    large = Workload("large", 1, (128, 128), 8, 8, 64, (7, 7))
    reason = "on a CPU it stores the scores of all pairs of tokens, here 8.0 GiB"
    assert peers_on_a_cpu(large, peer) == [(peer, reason)]
    (small,) = peers_on_a_cpu(smoke(large), peer)
    assert isinstance(small, Implementation)


def test_models_run_flex_attention_on_few_tokens_on_a_cpu() -> None:
    query = torch.empty(1, 32768, 32, 1, dtype=torch.bfloat16)
    with pytest.raises(implementations.UnsupportedError, match=r"scores of all pairs of tokens, here 128\.0 GiB"):
        models.flex_attend(query, query, query, 4096, is_causal=True)


def _lose_causal(workload: Workload, inputs: Inputs) -> Tensor:
    return dense(replace(workload, causal=False), inputs)


def _lose_one_key(workload: Workload, inputs: Inputs) -> Tensor:
    return dense(replace(workload, kernel_size=(workload.kernel_size[0] - 1,)), inputs)


def _lose_sink(workload: Workload, inputs: Inputs) -> Tensor:
    return dense(workload, replace(inputs, sink=None))


def _lose_registers(workload: Workload, inputs: Inputs) -> Tensor:
    return dense(workload, replace(inputs, additional_keys=None, additional_values=None))


def _interleave_groups(workload: Workload, inputs: Inputs) -> Tensor:
    named = {name: getattr(inputs, name) for name in ("key", "value", "additional_keys", "additional_values")}
    return dense(workload, replace(inputs, **{name: t.repeat(1, 1, 2, 1) for name, t in named.items()}))


def _poison(workload: Workload, inputs: Inputs) -> Tensor:
    return dense(workload, inputs) * torch.nan


def _raise(workload: Workload, inputs: Inputs) -> Tensor:
    raise RuntimeError("no kernel image")


MISTAKES = (_lose_causal, _lose_one_key, _lose_sink, _lose_registers, _interleave_groups, _poison)


def implementation(
    workload: Workload, forward: Callable[[Workload, Inputs], Tensor], variant: Variant
) -> Implementation:
    def call(inputs: Inputs) -> Tensor:
        return forward(workload, inputs)

    return Implementation(forward.__name__, "natten_layers", variant, workload, call, Layout())


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_wrong_results_get_no_time(mode: Any) -> None:
    variant = Variant(2, "learned")
    workload = Workload("test", 1, (64,), 4, 2, 16, (24,), causal=True)
    entries = [implementation(workload, f, variant) for f in (dense, *MISTAKES, _raise)]
    right, *wrong = runner.run(workload, mode, [*entries, ("absent", "not installed")], RATES, 0.0, CPU)
    assert right.failure is None
    assert right.median_ms is not None
    assert right.p10_ms is not None
    assert right.p90_ms is not None
    assert 0 < right.p10_ms <= right.median_ms <= right.p90_ms
    assert right.times_floor == pytest.approx(right.median_ms / right.floor_ms)
    assert [row.median_ms for row in wrong] == [None] * len(wrong)
    reasons = [row.failure for row in wrong]
    assert all(reason and reason.startswith("wrong result") for reason in reasons[:-2]), reasons
    assert reasons[-2:] == ["RuntimeError: no kernel image", "not installed"]


@pytest.mark.parametrize("name", ["query", "key", "value", "additional_keys", "additional_values", "sink"])
def test_wrong_gradients_are_refused(name: str) -> None:
    workload, inputs = problem((24,), (6,), causal=True, registers=2, sink="learned")
    truth = dense_gradients(workload, inputs)
    truth[f"d_{name}"] = truth[f"d_{name}"] * 1.05
    errors = Reference(workload, inputs, "fwdbwd").errors(truth)
    assert {n for n, (error, allowed) in errors.items() if error > allowed} == {f"d_{name}"}


def test_errors_that_cancel_in_a_sum_are_allowed_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation's errors cancel in the sum over queries, by chance; a kernel's, as large, do not."""
    find_rows = Reference._rows

    def cancelling(self: Reference, *args: Any) -> check.Rows:
        signs = (-1.0) ** torch.arange(24, dtype=torch.float64)
        return replace(find_rows(self, *args), d_sink=1 + 0.01 * args[-1] * signs)

    monkeypatch.setattr(Reference, "_rows", cancelling)
    workload, inputs = problem((24,), (6,), sink="learned")
    reference = Reference(workload, inputs, "fwdbwd")
    error, allowed = reference.errors({"d_sink": torch.full((workload.heads,), 24 * workload.batch + 0.0)})["d_sink"]
    assert error == 0.0
    assert allowed == pytest.approx(check.ERROR_FACTOR * 0.01 / math.sqrt(24 * workload.batch))


def test_what_exceeds_its_limit_or_has_none_is_wrong() -> None:
    results = [(0.1, 0.1), (0.2, 0.1), (math.nan, 0.1), (0.1, math.nan), (0.1, math.inf)]
    assert [wrong_result(*result) is None for result in results] == [True, False, False, False, False]
    assert wrong_result(0.2, 0.1) == "wrong result, relative error 0.2 > 0.1"


def test_missing_gradient_of_this_library_is_a_failure() -> None:
    def forget(workload: Workload, inputs: Inputs) -> Tensor:
        sink = inputs.sink
        return dense(workload, replace(inputs, sink=sink.detach() if isinstance(sink, Tensor) else sink))

    workload = Workload("test", 1, (24,), 4, 2, 16, (6,), causal=True)
    ours = implementation(workload, forget, Variant(sink="learned"))
    (row, peer) = runner.run(workload, "fwdbwd", [ours, replace(ours, name="peer", peer="peer")], RATES, 0.0, CPU)
    assert (row.failure, row.median_ms) == ("without d_sink", None)
    assert peer.median_ms is not None
    assert peer.note == "without d_sink"


@pytest.mark.parametrize(("spatial", "tile"), [((16, 32), (8, 16)), ((4, 8, 16), (2, 8, 8)), ((200,), None)])
def test_flex_layout_and_blocks(spatial: tuple[int, ...], tile: tuple[int, ...] | None) -> None:
    layout = HeadsFirst(tile)
    tensor = torch.arange(2 * 3 * torch.Size(spatial).numel()).reshape(2, *spatial, 3, 1)
    packed = layout.pack(tensor)
    assert packed.shape == (2, 3, torch.Size(spatial).numel(), 1)
    assert torch.equal(layout.unpack(packed, spatial), tensor)

    dilation = tuple(1 + i for i in range(len(spatial)))  # 7 = 2 * 3 + 1: residue classes differ in length
    causal = tuple(n % 3 == 2 for n in spatial)
    workload = Workload("test", 1, spatial, 1, 1, 8, (3,) * len(spatial), causal, stride=2, dilation=dilation)
    mask = implementations.flex_mask(workload, layout, CPU)
    expected = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu")
    for field in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, field), getattr(expected, field)), field
    assert torch.equal(mask.to_dense(), expected.to_dense())

    tokens = torch.arange(packed.shape[2])
    zero = torch.zeros((), dtype=torch.long)
    visible = mask.mask_mod(zero, zero, tokens[:, None], tokens[None, :])
    raster = layout.pack(tokens.view(1, *spatial, 1, 1)).flatten()
    assert torch.equal(visible, window_mask(spatial, workload.window)[raster][:, raster])


def test_measure_takes_turns_and_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_SAMPLES", 8)
    monkeypatch.setattr(timing, "SLOW", 0.1)
    seen: list[tuple[str, int]] = []
    calls = {name: lambda i, name=name: seen.append((name, i)) for name in ("a", "b")}
    samples = timing.measure(calls, CPU, budget_s=10.0)
    assert [samples[name].count for name in calls] == [8, 8]
    rounds = seen[-16:]
    assert len(seen) == 16 + 2 * (1 + timing.WARM_UP + 3 + 3)  # before: the first call, warm-up, host times, estimates
    assert all({name for name, _ in rounds[i : i + 2]} == {"a", "b"} for i in range(0, 16, 2))
    assert [i for name, i in rounds if name == "a"] == list(range(8))


README = Path(benchmarks.__file__).with_name("README.md").read_text()
COMMANDS = set(re.findall(r"^\| `python -m benchmarks\.(\w+)", README, re.MULTILINE))
BENCHMARKS = sorted(COMMANDS - {"cpu", "pages", "plot", "regression"})
"""Commands that write JSON of what they measure; README says that `cpu` does not, and the others measure nothing"""


def command(name: str) -> Any:
    return pytest.importorskip(f"benchmarks.{name}")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_the_flags_of_all(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(name).main(["--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--smoke tiny sizes" in said
    assert f"JSON to write, default runs/{name}.json" in said
    for device in ("cuda", "cuda:300", "nowhere"):
        with pytest.raises(SystemExit) as stop:
            command(name).main(["--device", device])
        assert stop.value.code == 2
        message = f"{device}: this PyTorch finds no CUDA device"
        message = f"expected cpu, cuda or cuda:N, got {device}" if device == "nowhere" else message
        assert capsys.readouterr().err.endswith(f"error: argument --device: {message}\n")


def test_times_of_a_cpu_are_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(timing, "environment", lambda *args: {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def said(*flags: str) -> str:
        args = runner.make_parser("census", None, budget_s=1.0, timed="it").parse_args(flags)
        runner.Report(args, torch.device(args.device), RATES)
        return capsys.readouterr().err

    assert said("--device", "cuda") == said("--device", "cpu", "--smoke") == ""
    assert said("--device", "cpu").startswith("timing the CPU at full size, as this PyTorch finds no CUDA device; ")


@pytest.mark.parametrize("flags", [("decode",), ("repeat", "--mode", "fwd"), ("census", "--rows", "fp32", "--peers=")])
def test_a_run_leaves_the_record_alone(flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(repeat, "WORKLOADS", repeat.WORKLOADS[:1])
    monkeypatch.setattr(repeat, "GROUPS", (1,))
    name, *own = flags
    assert command(name).main(["--device", "cpu", "--smoke", "--budget-s", "0", *own]) == 0
    assert json.loads((tmp_path / "runs" / f"{name}.json").read_text())["arguments"]["smoke"]
    assert not runner.RESULTS.exists()


@pytest.mark.parametrize("module", [census, own_problem])
def test_help_says_which_peers_are_timed_and_of_what(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "default fa2,natten,fa4, with --portable fa2,natten " in said
    assert "fa2 and fa4 (causal texts)" in said
    assert {name for name in implementations.PEERS if name in said} == set(implementations.PEERS)


def test_attention_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "smoke.json"
    flags = "--device cpu --smoke --workloads hunyuan,gpt-oss --peers fa2,cudnn,fa4 --registers 2 --sink zero --host"
    flags += " --budget-s 0 --copy-rate 1e10 --matmul-rate 2e10 --commit abc"
    assert attention.main([*flags.split(), "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {"device", "driver", "torch", "triton", "commit", "date", "python"} <= report["environment"].keys()
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["commit"] == "abc"
    assert report["rates"] == {"copy": 1e10, "matmul": 2e10}
    assert set(report["host_us"]) == {"ours fwd", "ours fwdbwd", "sdpa fwd", "sdpa fwdbwd"}
    rows = report["rows"]
    ours = [row for row in rows if row["peer"] == "natten_layers"]
    assert len(ours) == 2 * 2 * 3  # workloads, modes, variants
    assert all(row["median_ms"] > 0 and row["first_call_s"] > 0 and row["errors"] for row in ours)
    assert all(row["failure"] and row["median_ms"] is None for row in rows if row not in ours)
    assert "| gpt-oss | fwdbwd | natten_layers (learned sink) |" in capsys.readouterr().out

    best = plot.best_rows(rows)
    assert len(best) == 2 * 2
    assert best["fwd", "gpt-oss", "natten_layers"]["variant"] == "learned sink"
    plot.main([str(path)])
    ours_ms = best["fwd", "gpt-oss", "natten_layers"]["median_ms"]
    assert f"| gpt-oss | forward | {best['fwd', 'gpt-oss', 'natten_layers']['floor_ms']:.3g} | {ours_ms:.3g} |" in (
        capsys.readouterr().out
    )
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_processes_that_compile_take_the_flags_of_the_run() -> None:
    given = ["--workloads", "mistral,seed", "--peers=", "--flex-order", "tiled", "--registers", "16", "--sink", "zero"]
    args = attention._parse([*given, "--mode", "fwd"])
    again = vars(attention._parse(attention._flags(args, args.workloads[:1])))
    assert again == vars(args) | {"workloads": ["mistral"]}
    with pytest.raises(SystemExit):
        attention._parse(["--workloads="])


def test_what_is_compiled_beforehand_is_what_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    """Every implementation in every mode, with its registers; an error of one is printed, and left to the timed run."""
    seen: list[tuple[str, bool, bool]] = []

    def watched(workload: Workload, inputs: Inputs) -> Tensor:
        seen.append(("first", inputs.query.requires_grad, inputs.additional_keys is not None))
        return dense(workload, inputs)

    workload, _ = problem((6, 5), (3, 3))
    entries = [implementation(workload, f, Variant(2)) for f in (_raise, watched)]
    runner.compile_ahead(workload, [("absent", "not installed"), *entries], MODES, CPU)
    assert seen == [("first", False, True), ("first", True, True)]
    assert capsys.readouterr().err.count("_raise: RuntimeError: no kernel image") == 2


def test_checkouts_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "before"
    (other / "natten_layers").mkdir(parents=True)
    asked: list[tuple[str, bool]] = []

    def measured(checkout: Path, flags: Sequence[str]) -> host.Round:
        slower = 2.0 if checkout == other else 1.0
        asked.append((checkout.name, "--checked" in flags))
        times = {f"{name} {mode}": slower * len(asked) for name in ("ours", "sdpa") for mode in MODES}
        return host.Round(str(checkout), times, {"seed fwd": 4 * slower}, {})

    monkeypatch.setattr(host, "measured", measured)
    flags = ["--device", "cpu", "--against", str(other), "--rounds", "2", "--out", str(tmp_path / "host.json")]
    assert host.main(flags) == 0
    here = host.ROOT.name
    assert asked == [(here, True), ("before", True), ("before", False), (here, False)]
    printed = capsys.readouterr().out
    assert "| ours fwd | 2.5 (1 - 4) | 5 (4 - 6) | 0.500 |" in printed
    assert "| seed fwd | 4 (4 - 4) | 8 (8 - 8) | 0.500 |" in printed
    assert set(json.loads((tmp_path / "host.json").read_text())["rounds"]) == {"this", str(other)}
    monkeypatch.setattr(host, "measured", lambda *args: host.Round("", {}, {}, {"seed fwd": "wrong result"}))
    assert host.main(flags) == 1
    with pytest.raises(SystemExit):
        host.main([*flags, "--against", str(tmp_path)])
    assert "has no natten_layers" in capsys.readouterr().err


def test_a_round_imports_the_package_of_its_checkout(tmp_path: Path) -> None:
    (tmp_path / "natten_layers").symlink_to(host.ROOT / "natten_layers")
    flags = ["--device", "cpu", "--smoke", "--budget-s", "0", "--workloads", "gpt-oss", "--checked"]
    found = host.measured(tmp_path, flags)
    assert found.package == str(tmp_path / "natten_layers")
    assert set(found.host_us) == {"ours fwd", "ours fwdbwd", "sdpa fwd", "sdpa fwdbwd"}
    assert set(found.device_ms) == {"gpt-oss fwd", "gpt-oss fwdbwd"}
    assert not found.failures


def test_the_census_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, peer: str, mode: str, ratio: float) -> dict[str, Any]:
        return {"workload": name, "peer": peer, "mode": mode, "variant": "", "median_ms": ratio, "times_floor": ratio,
                "floor_ms": 1.0, "kernel": "portable"}  # fmt: skip

    rows = [row(name, "natten_layers", mode, 2.0) for name in ("mid-2d", "gemma3") for mode in ("fwd", "fwdbwd")]
    rows += [row("gemma3", "fa2", "fwd", 1.5), row("gemma3", "flex", "fwd", 3.0)]
    best = plot.best_rows(rows)
    assert plot.fastest_peer(best, "fwd", "gemma3") == rows[-2]
    assert plot.fastest_peer(best, "fwd", "mid-2d") is None
    report = tmp_path / "census.json"
    report.write_text(json.dumps({"environment": {"device": "some", "torch": "2", "triton": "3"}, "rows": rows}))
    plot.main([str(report)])
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| gemma3 | forward | 1 | 2 | 1.5 | 3 |" in printed
    assert f"written to {report.with_suffix('.png')}" in printed


def test_what_is_no_report_of_times_over_a_floor_is_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "choice.json"
    path.write_text(json.dumps({"rows": [{"workload": "0-0", "mode": "bwd", "times_floor": 2.0}]}))
    with pytest.raises(SystemExit):
        plot.main([str(path)])
    assert "no report of benchmarks.attention or benchmarks.census" in capsys.readouterr().err
    assert not path.with_suffix(".png").exists()
    assert runner.command(lambda: plot.main([str(tmp_path / "none.json")])) == 2
    assert capsys.readouterr().err.endswith("none.json: No such file or directory\n")


def test_pages_are_not_written_when_help_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "PAGES", ("no such page",))
    with pytest.raises(SystemExit) as stop:
        pages.main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m benchmarks.pages")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A page with a table that is out of date, then one of the census; and the folder of their records."""
    results = tmp_path / "results"
    shutil.copytree(pages.RESULTS, results)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "RESULTS", results)
    names = {"first.md": "decode", "second.md": "portable", "third.md": "layer"}
    monkeypatch.setattr(pages, "PAGES", tuple(names))
    for name, table in names.items():
        (tmp_path / name).write_text(f"<!-- table: {table} -->\nold\n<!-- end -->\n")
    return tmp_path, results


def test_pages_are_filled_from_the_records(copied: tuple[Path, Path]) -> None:
    assert pages.main([]) == 0
    assert [(copied[0] / name).read_text().count("\n| ") > 2 for name in pages.PAGES] == [True] * 3


def _lose_a_row(record: dict[str, Any]) -> None:
    record["rows"] = [row for row in record["rows"] if row["workload"] != "gemma3"]


def _lose_all_rows(record: dict[str, Any]) -> None:
    record["rows"] = []


def _lose_the_rows(record: dict[str, Any]) -> None:
    del record["rows"]


def _take_tiny_sizes(record: dict[str, Any]) -> None:
    record.setdefault("arguments", {})["smoke"] = True


def _take_a_cpu(record: dict[str, Any]) -> None:
    record["environment"]["cuda"] = None


def _lose_a_time(record: dict[str, Any]) -> None:
    record["rows"][0] |= {"median_ms": None, "failure": "wrong result"}


@pytest.mark.parametrize(
    ("record", "damage", "why", "command"),
    [
        ("census", _lose_a_row, "lacks fwd, gemma3, natten_layers", "census"),
        ("census", _lose_the_rows, "lacks rows", "census"),
        ("census", _take_tiny_sizes, "has times of a CPU, or of tiny sizes", "census"),
        ("census", _take_a_cpu, "has times of a CPU, or of tiny sizes", "census"),
        ("census-portable", _lose_the_rows, "lacks rows", "census --portable"),
        ("module", _lose_a_time, "has a row without a time (wrong result)", "module"),
        ("module", _lose_all_rows, None, "module"),
    ],
)
def test_no_page_is_written_of_a_record_that_lacks_what_it_shows(
    record: str, damage: Callable[[dict[str, Any]], None], why: str | None, command: str,
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, results = copied
    path = results / f"{record}.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    before = [(folder / name).read_text() for name in pages.PAGES]
    assert pages.main([]) == 2
    assert [(folder / name).read_text() for name in pages.PAGES] == before
    made = f"on a GPU, python -m benchmarks.{command} --out benchmarks/results/{record}.json makes a whole record"
    said = "no record has a row for the table layer" if why is None else f"{path} {why}; {made}"
    assert capsys.readouterr() == ("", f"error: {said}\n")


def test_no_page_is_written_without_a_record(copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (copied[1] / "module.json").write_text("{")
    assert pages.main([]) == 2
    (copied[1] / "module.json").unlink()
    assert pages.main([]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "module.json is no JSON: " in first
    assert "No such file or directory: " in second


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (attention, "--workloads"),
        (attention, "--peers"),
        (bias, "--problems"),
        (bias, "--ways"),
        (census, "--rows"),
        (forward_mode, "--workloads"),
        (host, "--workloads"),
        (step, "--models"),
        (sweep, "--kinds"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.removeprefix("benchmarks."),
)
def test_commands_take_names_with_commas_and_no_unknown_ones(
    command: ModuleType, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([flag, "no,nor"])
    assert f"error: argument {flag}: unknown no, nor; choose from " in capsys.readouterr().err


def test_every_workload_has_a_small_twin() -> None:
    for workload in (*WORKLOADS.values(), *CENSUS.values()):
        small = smoke(workload)
        assert small.heads * workload.kv_heads == workload.heads * small.kv_heads
        assert (small.window.is_causal, small.learned_sink) == (workload.window.is_causal, workload.learned_sink)
        for what in ("stride", "dilation"):  # options that are not at their defaults stay so
            assert [s > 1 for s in getattr(small.window, what)] == [s > 1 for s in getattr(workload.window, what)]
        assert (small.registers > 0, small.dtype) == (workload.registers > 0, workload.dtype)
        assert len({*small.head_dims}) == len({*workload.head_dims})


def test_census_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "census.json"
    names = "dinat-s3,mimo,hdit-reg,fp32,causal-video,flux-gna"
    names += ",ocean,packed-texts,upsample"
    flags = f"--device cpu --smoke --budget-s 0 --peers fa2 --rows {names} --out {path}"
    assert census.main(flags.split()) == 0
    rows = json.loads(path.read_text())["rows"]
    ours = [row for row in rows if row["peer"] == "natten_layers"]
    assert [(row["workload"], row["mode"]) for row in ours] == [(n, m) for n in names.split(",") for m in MODES]
    assert all(row["median_ms"] > 0 and row["errors"] and row["kernel"] == "eager" for row in ours)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    ratios = [float(line.split("|")[6]) for line in printed]
    assert len(ratios) == len(ours)
    assert ratios == sorted(ratios, reverse=True)


TINY = "--device cpu --budget-s 0 --peers="


def test_ones_own_problem_has_a_row_as_in_the_census(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "problem.json"
    flags = "9x8 --kernel-size 3 --heads 4 --kv-heads 2 --head-dim 16 --value-dim 8 --dtype fp32 --batch 2 --causal 1x0"
    flags += (
        f" --dilation 1x2 --stride 2x1 --registers 3 --learned-sink --device cpu --budget-s 0 --peers= --out {path}"
    )
    assert own_problem.main(flags.split()) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["mode"], row["kernel"], row["failure"]) for row in rows] == [(mode, "eager", None) for mode in MODES]
    assert all(row["errors"] and row["times_floor"] == row["median_ms"] / row["floor_ms"] for row in rows)
    printed = capsys.readouterr().out
    described = "2, 9x8, 4/2, 16/8, 3x3, stride 2x1, dilation 1x2, causal 1x0, 3 registers + learned sink, float32"
    assert printed.count(f"| yours | {described} | ") == 2
    record = json.loads(regression.RECORD.read_text())
    assert printed.index("The census on record, of one NVIDIA") < printed.index(census.summary(record["rows"])[0])


def test_ones_own_problem_may_have_rings_and_a_bias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"8x9 --kernel-size 3x5 --heads 2 {TINY} --mode fwd --out {tmp_path / 'problem.json'}"
    assert own_problem.main([*flags.split(), "--periodic", "--bias"]) == 0
    assert "| yours | 1, 8x9, 2/2, 64, 3x5, periodic, bias | fwd |" in capsys.readouterr().out


def test_ones_own_problem_says_which_peers_are_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"8x9 --kernel-size 3x5 --heads 2 --peers fa2 --mode fwd --device cpu --budget-s 0 --out {tmp_path / 'own'}"
    assert own_problem.main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert "\nnot timed:\n\n- yours fwd fa2: its window is causal and one-dimensional\n" in printed


def test_ones_own_problem_without_kernels_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(own_problem, "_why_eager", lambda workload, device: f"head_dim {workload.head_dim}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        own_problem.main(["9x8", "--kernel-size", "3", "--heads", "2", "--head-dim", "12", "--device", "cuda"])
    assert "error: there are no kernels for this problem: head_dim 12\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("9x8", "--kernel-size and --heads are needed"),
        ("9x8 --kernel-size 3 --heads 0", "--heads must be at least 1, got 0"),
        ("9x8 --kernel-size 3 --heads 2 --registers -1", "--registers must be at least 0, got -1"),
        ("9x8 --kernel-size 3 --heads 2 --stride 2x2x2", "--stride 2x2x2 has another number of axes than tokens, 9x8"),
        ("9x8 --kernel-size 3 --heads 2 --causal 1x2", "expected 0 or 1 for each axis"),
        ("9x8 --kernel-size 3 --heads 2 --peers fa5", "argument --peers: unknown fa5"),
        ("9x8 --kernel-size 3x9 --heads 2", "exceeds the width axis of length 8"),
        ("9x8 --kernel-size 3 --heads 3 --kv-heads 2", "multiple of KV heads"),
    ],
)
def test_what_is_no_problem_is_refused_before_anything_is_timed(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        own_problem.main([*flags.split(), "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_portable_kernels_alone_have_a_census(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are, the calls that are timed and the record, beside peers that run where these kernels do."""
    pytest.importorskip("triton")
    seen: list[bool] = []
    attend = implementations.neighborhood_attention

    def watched(*args: Any, **options: Any) -> Tensor:
        seen.append(is_portable_only())
        out = attend(*args, **options)
        if out.requires_grad:
            out.register_hook(lambda grad: seen.append(is_portable_only()))
        return out

    monkeypatch.setattr(implementations, "neighborhood_attention", watched)
    monkeypatch.setattr(census, "kernel_of", lambda *args: f"portable only: {is_portable_only()}")
    peers: list[str] = []
    entries_of = census.implementations

    def listed(workload: Workload, variants: Any, wanted: list[str], *args: Any) -> Iterator[Any]:
        peers.extend(wanted)
        hopper = replace(implementation(workload, dense, Variant()), name="natten, hopper-fna", peer="natten")
        yield from (*entries_of(workload, variants, [], *args), hopper, replace(hopper, name="natten, cutlass-fna"))

    monkeypatch.setattr(census, "implementations", listed)
    flags = ["--device", "cpu", "--smoke", "--budget-s", "0", "--portable", "--rows", "fp32"]
    flags += ["--out", str(tmp_path / "census-portable.json")]
    assert census.main(flags) == 0
    report = json.loads((tmp_path / "census-portable.json").read_text())
    assert {row["kernel"] for row in report["rows"]} == {"portable only: True"}
    assert [row["implementation"] for row in report["rows"]] == ["natten_layers", "natten, cutlass-fna"] * 2
    assert seen
    assert all(seen)
    assert not is_portable_only()
    assert set(peers) == set(census.PORTABLE_PEERS)


def test_census_stops_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "census.json"
    flags = f"--device cpu --smoke --budget-s 0 --peers= --mode fwd --rows fp32,globe --limit-s 0 --out {path}"
    path.write_text("an earlier report")
    assert census.main(flags.split()) == 1
    assert path.read_text() == "an earlier report"
    why = "--limit-s 0, which includes compiling, was over before the first"
    assert capsys.readouterr() == ("", f"error: nothing was timed, and nothing written: {why}\n")
    with pytest.raises(SystemExit):
        census.main(["--help"])
    assert "begin no row after so many seconds, of which compiling" in " ".join(capsys.readouterr().out.split())


def test_reports_hold_null_for_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    def no_json(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    path = tmp_path / "census.json"
    flags = f"--device cpu --smoke --budget-s 0 --peers= --mode fwd --rows fp32 --out {path}"
    assert census.main(flags.split()) == 0
    report = json.loads(path.read_text(), parse_constant=no_json)
    assert report["arguments"]["limit_s"] is None
    row = runner.Row("fp32", "fwd", "ours", "ours", "", 0.5, errors={"out": (math.nan, 0.1)})
    runner.save({"rows": [row], "times": (1.5, -math.inf)}, path)
    report = json.loads(path.read_text(), parse_constant=no_json)
    assert report["rows"][0]["errors"] == {"out": [None, 0.1]}
    assert report["times"] == [1.5, None]


def test_census_table_names_the_best_peer() -> None:
    def row(implementation: str, peer: str, ms: float | None, failure: str | None = None) -> tuple[runner.Row, str]:
        ratio = None if ms is None else ms / 0.5
        return runner.Row(
            "fp32", "fwd", implementation, peer, "", 0.5, failure, median_ms=ms, times_floor=ratio
        ), "portable"  # fmt: skip

    rows = [
        row("natten_layers", "natten_layers", 2.0),
        row("a", "a", 4.0),
        row("b", "b", 3.0),
        row("c", "c", None, "no"),
    ]
    line = census.table(rows, CENSUS)[2]
    assert line.endswith("| fwd | 2 | 0.5 | 4.00 | b 3 | 1.50 | portable |  |")
    rows[0] = row("natten_layers", "natten_layers", None, "wrong result")
    assert census.table(rows, CENSUS)[2].endswith("| fwd | - | 0.5 | - | b 3 | - | portable | wrong result |")
    assert f"| {census.shape(CENSUS['fp32'])} |" in census.table(rows, CENSUS)[2]
    assert f"| {census.shape(smoke(CENSUS['fp32']))} |" in census.table(rows, {"fp32": smoke(CENSUS["fp32"])})[2]


def test_census_shapes_are_described() -> None:
    assert census.shape(CENSUS["flux-text"]) == "1, 128x128, 24/24, 128, 40x40, 512 registers"
    assert census.shape(CENSUS["mimo"]) == "1, 16384, 64/8, 192/128, 128, causal, learned sink"
    described = "1, 30x48x80, 24/24, 128, 18x24x24, stride 16x8x8"
    assert census.shape(CENSUS["hunyuan-gna"]) == described
    assert census.shape(CENSUS["ocean"]) == "4, 332x362, 8/8, 64, 7x7, periodic 0x1, masked"
    described = "1, 32768 in 7 samples, 64/8, 64, 128, causal, learned sink"
    assert census.shape(CENSUS["packed-texts"]) == described
    assert census.shape(CENSUS["upsample"]) == "8, 128x128 over 64x64, 8/8, 64, 5x5"
    assert census.shape(CENSUS["longformer-d2"]) == "8, 4096, 16/16, 64, 257, dilation 2, float16"


@pytest.mark.parametrize("name", ["globe-ring", "ocean", "packed-images", "packed-texts", "upsample", "pool"])
def test_the_census_names_the_kernels_of_every_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``explain`` does for the same call, on a device of which there is only the name."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="made up"))
    named = census.kernel_of(smoke(CENSUS[name]), "fwdbwd", torch.device("cuda", 0))
    assert [kernel.split()[0] for kernel in named.split(", ")] == ["portable"] * 3


@pytest.mark.parametrize("lost", ["periodic", "land", "shapes", "key_spatial"])
def test_a_kind_that_is_lost_gets_no_time(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "periodic": {"spatial": (12, 9), "periodic": (False, True)},
        "land": {"spatial": (12, 9), "land": True},
        "shapes": {"spatial": (), "shapes": ((6, 9), (5, 8))},
        "key_spatial": {"spatial": (12, 9), "key_spatial": (9, 12)},
    }
    workload, _ = problem(kernel=(3, 4), **options[lost])

    def loses(inputs: Inputs) -> Tensor:
        if lost == "land":
            return implementations.ours(workload)(replace(inputs, key_mask=None))
        if lost == "periodic":
            return implementations.ours(replace(workload, periodic=False))(inputs)
        if lost == "shapes":
            return implementations.ours(replace(workload, shapes=((5, 8), (6, 9))))(inputs)
        flipped = {n: getattr(inputs, n).flip(2) for n in ("query", "key", "value")}
        return implementations.ours(workload)(replace(inputs, **flipped)).flip(
            2
        )  # windows of 4 have 2 keys before their leader

    entries = [
        Implementation("right", implementations.OURS, Variant(), workload, implementations.ours(workload), Layout()),
        Implementation("wrong", implementations.OURS, Variant(), workload, loses, Layout()),
    ]
    for mode in MODES:
        right, wrong = runner.run(workload, mode, entries, RATES, 0.0, CPU)
        assert right.failure is None
        assert wrong.failure is not None
        assert wrong.failure.startswith("wrong result")


def test_fp32_results_are_held_to_fp32() -> None:
    workload, inputs = problem((9, 11), (3, 5), dtype=torch.float32)
    reference = Reference(workload, inputs, "fwdbwd")
    exact = dense_gradients(workload, inputs)
    for name, (error, allowed) in reference.errors({n: t.float() for n, t in exact.items()}).items():
        assert error < allowed < 5e-6, name
    in_tf32 = exact["out"].float().view(torch.int32).bitwise_and(-(2**13)).view(torch.float32)
    assert not reference.errors({"out": in_tf32})["out"][0] < reference.errors({"out": in_tf32})["out"][1]


def test_sweep_refuses_wrong_tiles_and_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    timer = sweep.Timer(CPU, miniature=True)
    subject = sweep.Subject(sweep.workload_of("fp32", True), CPU)
    configs = list(dict.fromkeys(sweep.grid("forward", subject.problem)))
    assert len(configs) > 5
    trials = [
        sweep.Trial("fp32", "forward", tile_config, "grid", ms=ms)
        for tile_config, ms in zip(configs[:3], (3.0, 2.0, 4.0), strict=True)
    ]
    best = sweep.best_of([*trials, replace(trials[0], ms=None, failure="wrong result")])
    assert best["fp32", "forward"] == trials[1]
    assert "| fp32 | forward | 3 | - | 2 |" in sweep.table(trials)[2]
    assert timer(replace(trials[0], failure="does not compile")).failure == "does not compile"


@pytest.fixture(scope="module")
def launched() -> sweep.Timer:
    """A timer that has launched all kernels with the rule's tiles, on tensors that hold numbers."""
    pytest.importorskip("triton")
    timer = sweep.Timer(CPU, miniature=True)
    config = sweep.rule("forward", sweep.Subject(sweep.workload_of("fp32", True), CPU).problem.problem_class)
    timer(sweep.Trial("fp32", "forward", config, "rule"))
    return timer


@pytest.mark.parametrize("kind", sweep.KINDS)
def test_sweep_launches_what_the_operators_launch(
    kind: Kind, launched: sweep.Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep.rule(kind, launched.subjects["fp32"].problem.problem_class)
    trial = sweep.Trial("fp32", kind, replace(config, stages=1), "grid")
    timed = launched(trial)
    assert timed.failure is None
    assert timed.ms is not None
    monkeypatch.setitem(launched.expected, ("fp32", kind), tuple(x + 1 for x in launched.expected["fp32", kind]))
    assert (launched(trial).failure or "").startswith("wrong result")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12, of fork
def test_sweep_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One row by default, and few launches of it, with a bar."""
    pytest.importorskip("triton")
    totals: list[int] = []
    bar = sweep.progress
    monkeypatch.setattr(sweep, "progress", lambda total, text: totals.append(total) or bar(total, text))
    monkeypatch.setattr(sweep, "neighbors", lambda *args: [])
    path = tmp_path / "sweep.json"
    flags = ["--device", "cpu", "--smoke", "--kinds", "forward", "--jobs", "1", "--out", str(path)]
    assert sweep.main(flags) == 0
    trials = json.loads(path.read_text())["trials"]
    assert {trial["row"] for trial in trials} == {sweep.ROWS[0]}
    assert sorted(trial["origin"] for trial in trials) == ["grid", "rule"]  # in the order in which they were compiled
    assert all(trial["ms"] > 0 for trial in trials)
    assert totals[0] == 2
    assert f"| {sweep.ROWS[0]} | forward | 2 | " in capsys.readouterr().out
    monkeypatch.setattr(sweep, "ERROR", dict.fromkeys(sweep.ERROR, -1.0))
    assert sweep.main(flags) == 1
    printed = capsys.readouterr()
    assert "launches not timed: wrong result, relative error " in printed.out
    assert printed.err.endswith("error: no launch was timed\n")


def test_sweep_takes_the_interpreter_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    calls: list[tuple[list[str], str]] = []
    monkeypatch.setattr(
        sweep.subprocess, "call", lambda command, env: calls.append((command[1:], env[sweep.INTERPRETED])) or 3
    )
    monkeypatch.delenv(sweep.INTERPRETED)
    flags = ["--device", "cpu", "--smoke"]
    assert sweep.main(flags) == 3
    assert calls == [(["-m", "benchmarks.sweep", *flags], "1")]
    for wrong, message in (
        (["--device", "cpu"], "a CPU times no tiles"),
        (["--rows", "no"], "unknown no; choose from"),
    ):
        with pytest.raises(SystemExit):
            sweep.main(wrong)
        assert message in capsys.readouterr().err


def test_repeat_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "WORKLOADS", repeat.WORKLOADS[1:2])
    monkeypatch.setattr(repeat, "GROUPS", (1, 8))
    path = tmp_path / "repeat.json"
    assert repeat.main(["--device", "cpu", "--smoke", "--budget-s", "0", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    keys = [(row["workload"], row["group"], row["mode"], row["implementation"]) for row in rows]
    assert len(set(keys)) == len(rows) == 2 * 2 * 3
    assert all(row["median_ms"] > 0 for row in rows)
    assert "| 13x13 | 8 | fwdbwd |" in capsys.readouterr().out

    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{repeat.BEGIN}\nold\n{repeat.END}\n\nAfter.\n")
    for _ in range(2):  # a page that is already filled can be filled again
        assert repeat.main(["--report", str(path), str(path), "--page", str(page)]) == 0
    filled = page.read_text()
    assert filled.startswith("Before.\n")
    assert filled.endswith("\nAfter.\n")
    assert filled.count("| 13x13 | 8 | fwdbwd |") == 2  # once for each report
    assert "old" not in filled
    unmarked = tmp_path / "unmarked.md"
    unmarked.write_text("no marks")
    for report, target, message in (
        (path, unmarked, repeat.BEGIN),
        (tmp_path / "none", page, "none"),
        (page, page, "line 1"),
    ):
        with pytest.raises(SystemExit):
            repeat.main(["--report", str(report), "--page", str(target)])
        assert message in capsys.readouterr().err
    assert (page.read_text(), unmarked.read_text()) == (filled, "no marks")


def test_repeat_table() -> None:
    row = {"workload": "7x7", "group": 4, "mode": "fwd"}
    ways = {"repeat": (0.6, 96.0), "unpacked": (0.4, 64.0), "packed": (0.2, 64.0)}
    rows = [{**row, "implementation": way, "median_ms": ms, "peak_mib": peak} for way, (ms, peak) in ways.items()]
    assert repeat.table(rows)[2:] == ["| 7x7 | 4 | fwd | 0.6 | 0.4 | 0.2 | 3.00x | 96 / 64 / 64 |"]
    rows[0]["median_ms"] = rows[0]["peak_mib"] = None
    assert repeat.table(rows)[2:] == ["| 7x7 | 4 | fwd | - | 0.4 | 0.2 | - | - / 64 / 64 |"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_step_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    flags = ["--device", "cpu", "--smoke", "--budget-s", "0", "--compile", "no", "--out", str(path)]
    assert step.main(flags) == 0
    rows = json.loads(path.read_text())["rows"]
    ours = [row for row in rows if row["attention"].startswith("natten_layers")]
    assert [(row["model"], row["step"]) for row in ours].count(("hdit-flowers", "sample")) == 3
    assert all(row["median_ms"] > 0 and 0 < row["error"] <= row["allowed"] for row in ours)
    sampled = [row for row in rows if row["attention"].startswith("flex") and row["step"] == "sample"]
    assert len(sampled) == 2
    assert all(row["median_ms"] > 0 and 0 < row["error"] <= row["allowed"] for row in sampled)
    assert "| hdit-flowers | sample | flex, GQA 4 | no |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "compiled"), [([], [False]), (["--compile", "both"], [False, True]), (["--compile", "yes"], [True])]
)
def test_tiny_steps_are_compiled_on_request_alone(
    flags: list[str], compiled: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling takes minutes."""
    seen: list[bool] = []
    monkeypatch.setattr(step, "run", lambda name, variants, compiled, *args, **options: seen.append(compiled) or [])
    own = ["--device", "cpu", "--smoke", "--models", "mistral-block", "--out", str(tmp_path / "step.json")]
    assert step.main([*own, *flags]) == 0
    assert seen == compiled


def test_a_step_is_reported_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[int] = []
    bar = step.progress
    monkeypatch.setattr(step, "progress", lambda total, text: totals.append(total) or bar(total, text))
    variants = {"GQA 4": models.make_subjects(models.SMOKE, CPU)["mistral-block"]["GQA 4"]}
    reports: list[list[float | None]] = []
    rows = step.run(
        "mistral-block", variants, False, CPU, 0.0, peers=(), report=lambda rows: reports.append([rows[0].median_ms])
    )
    assert [row.attention for row in rows] == ["natten_layers, GQA 4"]
    assert reports == [[None], [rows[0].median_ms]]
    assert totals == [1]


@pytest.mark.parametrize(("model", "variant"), [("mistral-block", "GQA 4"), ("hdit-flowers", "multi-head")])
def test_a_step_that_computes_something_else_gets_no_time(
    model: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(*args: Any, **options: Any) -> Tensor:
        return 1.1 * neighborhood_attention(*args, **options)

    monkeypatch.setattr(step, "flex_attend", attend)
    variants = {variant: models.make_subjects(models.SMOKE, CPU)[model][variant]}
    right, *_, wrong = step.run(model, variants, False, CPU, 0.0)
    assert right.failure is None
    assert right.median_ms is not None
    assert wrong.failure is not None
    assert wrong.failure.startswith("wrong result")
    assert wrong.median_ms is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("kernel_size", "is_causal"), [((3, 5), False), ((8, 6), False), (7, True), (48, True)])
def test_flex_in_a_model_is_the_same_operation(kernel_size: int | tuple[int, ...], is_causal: bool) -> None:
    spatial = (48,) if isinstance(kernel_size, int) else (8, 6)
    q, k, v = (torch.randn(2, *spatial, heads, 16) for heads in (4, 2, 2))
    options: dict[str, Any] = {"is_causal": is_causal, "scale": 0.3}
    expected = neighborhood_attention(q, k, v, kernel_size, **options)
    torch.testing.assert_close(models.flex_attend(q, k, v, kernel_size, **options), expected)
    with pytest.raises(implementations.UnsupportedError):
        models.flex_attend(q, k, v, kernel_size, sink=0.0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["hdit-gqa", "gpt-oss"])
def test_two_ways_to_registers_agree(name: str) -> None:
    pytest.importorskip("triton")
    workload = smoke(WORKLOADS[name])
    variant = Variant(5, "learned")
    plain = make_inputs(workload, CPU, 0)
    wide = {f: getattr(plain, f).float() for f in ("query", "key", "value", "grad_out")}
    inputs = add_variant(replace(plain, **wide), variant, 0)
    entries = implementations.implementations(workload, [variant], ["registers"], [], CPU)
    ways = [entry for entry in entries if isinstance(entry, Implementation)]
    assert [way.peer for way in ways] == ["natten_layers", "registers"]
    with torch.no_grad():
        expected, *others = (way.forward(inputs) for way in ways)
    for out in others:
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_generation_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "generation.json"
    flags = ["--device", "cpu", "--smoke", "--budget-s", "0", "--batch-sizes", "3", "--out", str(path)]
    assert generation.main(flags) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["median_ms"] > 0
    assert 0 < row["error"] <= row["allowed"]
    assert row["of_copy"] == pytest.approx(row["floor_ms"] / row["median_ms"])
    assert "| 3 | " in capsys.readouterr().out
    monkeypatch.setattr(generation, "check", lambda config, device: (2.0, 1.0))
    assert generation.main(flags) == 1
    assert json.loads(path.read_text())["rows"][0]["median_ms"] is None
    with pytest.raises(SystemExit):
        generation.main(["--device", "cpu"])
    assert "7 billion weights and full caches need a GPU" in capsys.readouterr().err


def test_generation_floor_and_full_caches() -> None:
    """The floor computed by hand: 7.11e9 weights without the embedding, and half a GiB of cache per text."""
    with torch.device("meta"):
        model = generation.make_model(generation.MISTRAL_7B, torch.device("meta"))
    assert generation.floor_bytes(model, 0) == 2 * (7241732096 - 32000 * 4096)
    assert generation.floor_bytes(model, 1) - generation.floor_bytes(model, 0) == 2**29 + 2 * 4096
    small = generation.make_model(generation.SMOKE, CPU)
    cache = generation.full_cache(small, 2, torch.bfloat16)
    with torch.inference_mode():
        small(generation.draw_ids(small, 2), cache=cache)
    for layer in cache.layers:
        assert sorted(layer.positions[0, :-1].tolist()) == list(range(1, 13))  # the first token has left the window


def test_forward_mode_is_checked_before_it_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "forward_mode.json"
    flags = f"--device cpu --smoke --budget-s 0 --workloads hdit-gqa,mistral,full-4k --out {path}".split()
    monkeypatch.setattr(forward_mode, "peer_attention", lambda: None)
    assert forward_mode.main(flags) == 0
    rows = json.loads(path.read_text())["rows"]
    assert all((row["median_ms"] is None) == row["implementation"].startswith(forward_mode.PEER) for row in rows)
    assert "not installed" in capsys.readouterr().out

    def forgets_a_tangent(workload: Workload) -> dict[str, Any]:
        return {
            "natten_layers": lambda q, k, v: neighborhood_attention(
                q, k.detach(), v, workload.kernel_size, is_causal=workload.causal
            )
        }

    monkeypatch.setattr(forward_mode, "implementations", forgets_a_tangent)
    assert forward_mode.main(flags) == 1
    assert "wrong result" in capsys.readouterr().out


def test_calls_without_a_mask_can_take_the_kernels_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On compute capability 9.0 these are not all portable."""
    pytest.importorskip("triton.experimental.gluon")
    from problems import contiguous, problem_of_image

    from natten_layers.kernels import dispatch

    problem, masked = (problem_of_image(monkeypatch, **x) for x in ({}, {"key_mask": contiguous((8, 128, 128, 1, 1))}))

    def chosen(problem: Any) -> list[str]:
        question = dispatch.Question(problem, True, contiguous(problem.query.shape))
        query, key, *_ = dispatch.choose_backward(question)
        return [choice.variant.name for choice in (dispatch.choose("forward", question), query, key)]

    kernels = [
        Kernel(direction, name, (), ())
        for direction, name in zip(("forward", "backward_query", "backward_key"), chosen(masked), strict=True)
    ]
    assert chosen(problem) != chosen(masked)
    with windows.taking(kernels)():
        assert chosen(problem) == chosen(masked)


def test_windows_are_checked_before_they_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "windows.json"
    names = ["seed, mask", "mistral, packed"]
    flags = ["--device", "cpu", "--smoke", "--budget-s", "0", "--out", str(path), "--comparisons", *names]
    assert windows.main(flags) == 0
    rows = json.loads(path.read_text())["rows"]
    own = [row for row in rows if row["implementation"] != windows.PEER]
    assert {row["workload"] for row in own} == set(names)
    assert all(row["median_ms"] > 0 for row in own)
    assert len(own) == len(rows) - 2 == 2 * 2 * 3
    assert "| mistral, packed | fwdbwd | " in capsys.readouterr().out

    def forgets_borders(workload: Workload) -> Callable[[Inputs], Tensor]:
        return implementations.ours(replace(workload, shapes=((192,),)) if workload.shapes else workload)

    monkeypatch.setattr(windows, "ours", forgets_borders)
    flags = flags[: -len(names)] + names[-1:]
    assert windows.main(flags) == 1
    assert "many shapes, packed: wrong result" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_bias_is_checked_before_it_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bias.json"
    flags = ["--device", "cpu", "--smoke", "--budget-s", "0", "--problems", "nat-64", "--out", str(path)]
    assert bias.main(flags) == 0
    rows = json.loads(path.read_text())["rows"]
    timed = {(row["peer"], row["mode"]) for row in rows if row["median_ms"] is not None}
    # FlexAttention has no gradients on a CPU.
    assert timed == {(way, mode) for way in bias.WAYS for mode in MODES} - {("flex", "fwdbwd")}
    assert {name for row in rows for name in row["errors"] or {}} == {"out", *(f"d_{n}" for n in (*QKV, "rpb"))}
    assert "| nat-64 | fwdbwd | " in capsys.readouterr().out

    def shrinks_the_bias(workload: Workload) -> Callable[[Inputs], Tensor]:
        return lambda inputs: attend(replace(inputs, rpb=inputs.rpb * 0.9 if inputs.rpb is not None else None))

    attend = implementations.ours(smoke(bias.PROBLEMS["nat-64"]))
    monkeypatch.setattr(implementations, "ours", shrinks_the_bias)
    assert bias.main([*flags, "--ways", bias.PLAIN]) == 1
    assert "nat-64 fwdbwd, natten_layers: wrong result" in capsys.readouterr().out


def test_speed_counts_the_work_of_each_way() -> None:
    """Texts whose windows hold half of the pairs, in half of the time, are no faster."""
    rows = [
        runner.Row("texts", "fwd", way, "", "", least, median_ms=ms, p10_ms=ms, p90_ms=ms, times_floor=ms / least)
        for way, least, ms in ((windows.ALIKE, 2.0, 8.0), (windows.EQUAL, 2.0, 4.0), (windows.MIXED, 1.0, 4.0))
    ]
    assert windows.tables(rows)[-1].split(" | ")[5:7] == ["1.000", "0.500"]
    workload = Workload("texts", 2, (6,), 2, 1, 8, (4,), causal=True)
    comparison = windows.packs(workload, ((2,), (10,)), CPU)
    found = windows.measure("texts", comparison, "fwd", runner.Rates(1e30, 1e3), 0.0, CPU)
    # By hand: 1 + 2 + 3 + 4 + 4 + 4 pairs in each of two texts, or 1 + 2 and 1 + 2 + 3 + 7 * 4
    assert [row.floor_ms / (2 * 2 * 16) for row in found] == pytest.approx([36, 36, 37, 37])


def test_kernels_of_a_mask_compute_a_call_without_one() -> None:
    """Other tiles than it would take by itself."""
    pytest.importorskip("triton")
    q, k = torch.empty(1, 8, 8, 4, 32), torch.empty(1, 8, 8, 2, 32)
    said = explain(q, k, k, 5, key_mask=torch.ones(1, 8, 8, dtype=torch.bool), needs_grad=True, impl="fused")
    other = [
        replace(kernel, settings=tuple((dict(kernel.settings) | {"num_warps": 8}).items())) for kernel in said.kernels
    ]
    with windows.taking(other)():
        assert explain(q, k, k, 5, needs_grad=True, impl="fused").kernels == tuple(
            replace(kernel, passed_over=ANY) for kernel in other
        )


def test_the_check_of_tangents_is_exact() -> None:
    """Against forward mode of the eager path, in fp64."""
    workload, inputs = problem((5, 6), (3, 4), causal=(True, False), dtype=torch.float64)
    primals, tangents = ((x.query, x.key, x.value) for x in (inputs, make_inputs(workload, CPU, 1)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, workload.kernel_size, is_causal=workload.causal)

    _, found, *_ = torch.func.jvp(attend, primals, tangents)
    assert forward_mode.errors(workload, primals, tangents, found)[0] < 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_benchmark_of_ltx_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ltx = pytest.importorskip("benchmarks.ltx")
    monkeypatch.setattr(ltx, "WINDOWS", {(3, 5, 5): (3, 6, 6)})
    monkeypatch.setattr(ltx, "check_decoder", lambda device: ltx.Check("decoder", 0.0, 0.0))  # as test_diffusers does
    path = tmp_path / "ltx.json"
    flags = ["--device", "cpu", "--smoke", "--budget-s", "0", "--repeats", "1", "--flex-tokens", "0"]
    flags += ["--out", str(path)]
    assert ltx.main(flags) == 0
    report = json.loads(path.read_text())
    assert [stage["layers"] for stage in report["stages"]] == [1, 1, 2, 2]
    assert set(report["stages"][0]["ms"]) == {*ltx.COLUMNS} - {"layer, its own processor"}
    assert {one["processor"] for one in report["decode"]} == {"natten_layers", "steps in PyTorch"}
    monkeypatch.setattr(implementations, "MOST_SCORES", 0)
    stage = ltx.Stage((3, 6, 6), 2, (3, 5, 5), 1)
    ltx.measure(stage, CPU, torch.float32, 0.0, ltx.FLEX_TOKENS)
    assert set(stage.ms) == {*ltx.COLUMNS} - {"layer, its own processor"}
    ours = "natten_layers.integrations.diffusers.ltx_decoder.attend_with_qk_prep"
    monkeypatch.setattr(ours, lambda call, norm, angles: call.inputs.query)
    (check,) = ltx.check_layers(torch.device("cpu"))
    assert "layer of (3, 5, 5) in bf16: error" in check.failure


@pytest.mark.parametrize("broken", [False, True])
def test_windows_of_transformers_are_timed_if_they_are_right(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = pytest.importorskip("benchmarks.diffusers_attention")
    if broken:
        monkeypatch.setattr(benchmark, "windows", lambda problem: lambda sequence: benchmark.dense(sequence))
    path = tmp_path / "windows.json"
    flags = ["--device", "cpu", "--smoke", "--budget-s", "0", "--problems", "flux-4k,wan-720p", "--out", str(path)]
    assert benchmark.main(flags) == broken
    rows = json.loads(path.read_text())["rows"]
    assert [row["implementation"] for row in rows] == [benchmark.WINDOWS, benchmark.DENSE] * 2
    assert all((row["median_ms"] is None) == (broken and row["implementation"] == benchmark.WINDOWS) for row in rows)
    assert set(rows[0]["errors"]) == {"image", "text"}


# A run of the census against the record


def report(**times: float | None) -> dict[str, Any]:
    """A made-up report of the census: milliseconds by "row", or "row__peer"; the floor of every row is 1 ms."""
    rows = []
    for name, ms in times.items():
        workload, _, peer = name.partition("__")
        peer = peer or implementations.OURS
        row = runner.Row(workload, "fwd", peer, peer, "", 1.0, median_ms=ms, times_floor=ms)
        row.failure = "wrong result" if ms is None else None
        rows.append(vars(row))
    names = ("device", "driver", "torch", "triton", "commit", "date")
    arguments = {"rows": sorted({row["workload"] for row in rows}), "modes": ["fwd"], "smoke": False}
    rates = {"copy": 1e12, "matmul": 1e14}
    return {"environment": dict.fromkeys(names, "-"), "arguments": arguments, "rates": rates, "rows": rows}


def verdicts(record: dict[str, Any], run: dict[str, Any]) -> dict[str, bool]:
    return {change.key[0]: change.is_worse(1.1) for change in regression.compare(record, run)}


def test_a_row_that_is_ten_percent_worse_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, run = report(same=2.0, slower=2.0, faster=2.0), report(same=2.19, slower=2.21, faster=1.0)
    assert verdicts(record, run) == {"same": False, "slower": True, "faster": False}
    for name, content in (("record", record), ("run", run)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    arguments = [str(tmp_path / "run.json"), "--record", str(tmp_path / "record.json")]
    assert regression.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "| slower | fwd | 2.00 | 2.21 | +10% | - | WORSE |" in printed
    assert printed.count("WORSE") == 1
    assert printed.endswith("3 rows, 1 worse than 1.1 times the record: slower fwd\n")
    assert regression.main([*arguments, "--limit", "1.2"]) == 0
    with pytest.raises(SystemExit, match="2"):
        regression.main([*arguments, "--limit", "nan"])


def without(content: dict[str, Any], name: str) -> None:
    del content[name]


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "rows that are a number": lambda content: content.update(rows=3),
    "no rates": lambda content: without(content, "rates"),
    "no environment": lambda content: content.update(environment=None),
    "a time in quotes": lambda content: content["rows"][0].update(median_ms="1"),
    "a floor of zero": lambda content: content["rows"][0].update(times_floor=0),
    "portable kernels": lambda content: content["arguments"].update(portable=True),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "cut short"])
@pytest.mark.parametrize("name", ["record", "run"])
def test_a_damaged_report_is_no_regression(
    damage: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named in one line, with another status than that of a row that is worse."""
    for other in ("record", "run"):
        (tmp_path / f"{other}.json").write_text(json.dumps(report(row=2.0)))
    content = report(row=2.0)
    DAMAGE.get(damage, lambda content: None)(content)
    text = json.dumps(content)
    (tmp_path / f"{name}.json").write_text(text if damage in DAMAGE else text[: len(text) // 2])
    assert regression.main([str(tmp_path / "run.json"), "--record", str(tmp_path / "record.json")]) == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert f"the {name} " in said or f"{name}.json" in said


def test_tiny_shapes_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "smoke.json"
    flags = f"--device cpu --smoke --budget-s 0 --peers= --mode fwd --rows fp32 --out {path}"
    assert census.main(flags.split()) == 0
    capsys.readouterr()
    assert regression.main([str(path)]) == 2
    said = "error: the run timed tiny shapes, by --smoke, which say nothing of speed\n"
    assert capsys.readouterr() == ("", said)
    assert regression.main([str(path), "--record", str(path)]) == 2
    assert "the record and the run timed tiny shapes" in capsys.readouterr().err


def test_rows_may_be_compared_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a run, and of them those that are named; rows that the record does not have yet are named."""
    record = report(same=2.0, same__fa2=3.0, slower=2.0, slower__fa2=3.0)
    run = report(same=2.0, same__fa2=3.0, slower=3.0, slower__fa2=3.0, new=1.0)
    arguments = [str(tmp_path / "run.json"), "--record", str(tmp_path / "record.json")]
    for name, content in (("record", record), ("run", run)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert regression.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "| slower | fwd | 2.00 | 3.00 | +50% | +50% | WORSE |" in printed
    assert "not in the record, so not compared: new" in printed
    assert regression.main([*arguments, "--rows", "same"]) == 0
    assert "slower" not in capsys.readouterr().out
    assert regression.main([*arguments, "--rows", "same,slower"]) == 1
    assert regression.main([*arguments, "--rows", "same,new"]) == 2
    assert "no time of new in the record" in capsys.readouterr().err


def test_a_card_that_multiplies_faster_in_one_run_is_no_regression() -> None:
    """Its floors are lower then, and the times as they were; of another card times say nothing."""
    record, run = report(row=2.0), report(row=2.0)
    run["rows"][0]["times_floor"] = 2.4
    assert verdicts(record, run) == {"row": False}
    run["environment"]["device"] = "another"
    assert verdicts(record, run) == {"row": True}


def test_a_card_on_which_the_peer_is_slower_too_is_no_regression() -> None:
    record = report(row=2.0, row__fa2=4.0)
    assert verdicts(record, report(row=2.6, row__fa2=5.2)) == {"row": False}
    assert verdicts(record, report(row=2.6, row__fa2=4.0)) == {"row": True}
    assert verdicts(record, report(row=2.6, row__fa2=None)) == {"row": True}


def test_a_row_that_lost_its_time_is_worse() -> None:
    record = report(row=2.0, other=2.0, wide=None)
    run = report(row=None, other=2.0, wide=None)
    assert verdicts(record, run) == {"row": True, "other": False}
    (change, _) = regression.compare(record, run)
    assert change.failure == "wrong result"
    run["rows"] = [row for row in run["rows"] if row["workload"] != "other"]
    assert verdicts(record, run) == {"row": True, "other": True}  # as where the time was up before it


def test_rows_that_were_not_asked_for_do_not_count() -> None:
    assert verdicts(report(row=2.0, other=2.0), report(row=2.0)) == {"row": False}
    with pytest.raises(ValueError, match="no row in common"):
        regression.compare(report(row=2.0), report(other=2.0))


def test_the_record_equals_itself() -> None:
    record = json.loads(regression.RECORD.read_text())
    changes = regression.compare(record, record)
    assert len(changes) == len([row for row in record["rows"] if row["peer"] == implementations.OURS])
    assert all(change.beside_floor == 1 and change.beside_peers in (1, None) for change in changes)


def test_the_page_on_benchmarks_says_what_each_record_was_made_from() -> None:
    records = list(regression.RECORD.parent.glob("*.json"))
    assert records
    for record in records:
        commit = json.loads(record.read_text())["environment"]["commit"]
        assert f"`{record.stem}`" in README, record.stem
        assert commit[:7] in README, record.stem


TINY_CENSUS = ["--device", "cpu", "--smoke", "--budget-s", "0", "--peers=", "--rows", "fp32"]


@pytest.mark.parametrize("flags", [["--budget-s", "nan"], ["--budget-s", "-1"], ["--jobs", "0"], ["--limit-s", "nan"]])
def test_numbers_that_make_no_sense_are_named(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        census.main([*TINY_CENSUS, *flags])
    assert re.search(f"argument {flags[0]}: must be (finite and )?at least", capsys.readouterr().err)


def test_processes_that_compile_take_no_limit_as_a_limit() -> None:
    """As choice gives them a part of its own."""
    parser = runner.make_parser("choice", None, budget_s=1.0, timed="it")
    runner.add_limit(parser, "problem")
    assert parser.parse_args(["--limit-s", str(0.6 * math.inf)]).limit_s == math.inf


@pytest.mark.parametrize("path", ["/dev/full", ".", "/dev/null/x.json"])
def test_a_report_that_cannot_be_written_ends_the_command_before_its_work(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "copy_rate", lambda device: pytest.fail("it measured"))
    monkeypatch.setattr(runner, "statuses", lambda processes: pytest.fail("it compiled"))
    assert runner.command(lambda: census.main([*TINY_CENSUS, "--jobs", "2", "--out", path])) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --out {path}")
    assert said.count("\n") == 1


def test_an_own_problem_keeps_the_pass_that_was_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = census.timed

    def interrupted(*arguments: Any) -> Iterator[census.Timed]:
        yield next(timed(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(census, "timed", interrupted)
    path = tmp_path / "problem.json"
    flags = f"12x12 --kernel-size 3 --heads 2 --device cpu --smoke --budget-s 0 --peers= --out {path}".split()
    assert runner.command(lambda: own_problem.main(flags)) == 130
    assert [row["mode"] for row in json.loads(path.read_text())["rows"]] == ["fwd"]
    assert capsys.readouterr().err.endswith("interrupted; what was written before is kept\n")


def test_processes_that_compile_end_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, started = tmp_path / "python", []
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)

    start = subprocess.Popen

    def noted(words: list[str]) -> subprocess.Popen[bytes]:
        started.append(start(words))
        return started[-1]

    def interrupted(process: subprocess.Popen[bytes]) -> int:
        raise KeyboardInterrupt

    args: Any = SimpleNamespace(jobs=2, device="cpu", smoke=True, out=tmp_path / "report.json")
    with monkeypatch.context() as patch:
        patch.setattr(runner.sys, "executable", str(python))
        patch.setattr(start, "wait", interrupted)
        patch.setattr(subprocess, "Popen", noted)
        with pytest.raises(KeyboardInterrupt):
            runner.compile_in_processes("census", args, ["a", "b"], list)
    assert len(started) == 2
    assert [process.wait(timeout=60) for process in started] == [-15, -15]


def test_a_picture_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "census.json"
    path.write_text(json.dumps(report(row=2.0, row__fa2=3.0)))
    path.with_suffix(".png").write_bytes(b"before")

    def full(figure: object, file: Path, **options: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", full)
        assert runner.command(lambda: plot.main([str(path)])) == 2
    assert capsys.readouterr().err == f"error: cannot write {path.with_suffix('.png')}: No space left on device\n"
    assert path.with_suffix(".png").read_bytes() == b"before"
    assert sorted(tmp_path.iterdir()) == [path, path.with_suffix(".png")]
    assert plot.main([str(path)]) == 0
    for text in ('{"rows": []}', '{"rows": 3}', "[]", "{", json.dumps(report(row=None))):
        path.write_text(text)
        with pytest.raises((SystemExit, ValueError), match=r"^2$|census\.json"):
            plot.main([str(path)])
