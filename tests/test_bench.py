"""The benchmark reports what it says it reports, and gives a wrong row no speed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqlib import bench, dispatch, native
from seqlib.bench import FLOORS, clock, markdown, report
from seqlib.bench.gate import shortened
from seqlib.errors import UnsupportedInput
from seqlib.lm import bench_linear
from seqlib.ops.case import Case
from seqlib.ops.causal_conv1d import IMPLS, cases


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A bench case of a few positions in place of the op's own, and a machine that is measured in no time."""
    case = Case("tiny", cases._build(1, 80, 20, 4), cases._KEEP, bench=True, flops=1e4, nbytes=1e4)
    monkeypatch.setattr(cases, "CASES", (case,))
    monkeypatch.setattr(clock, "ROTATED_BYTES", 1e6)
    monkeypatch.setattr(bench, "ROTATED_BYTES", 3e4)
    monkeypatch.setattr(report, "keep_freed_memory", lambda: False)  # it would hold for the other tests too
    return case


def _run(*options: str) -> int:
    return report.main(["causal_conv1d", "--repeats", "2", "--budget", "1", "--threads", "1", *options])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_json_has_every_figure(tiny: Case, tmp_path: Path, capsys: pytest.CaptureFixture, dtype: str) -> None:
    file = tmp_path / "out.json"
    assert _run("--json", str(file), "--dtype", dtype) == 0
    assert "tiny" in capsys.readouterr().out
    made = json.loads(file.read_text())
    assert {"cpu", "cores", "isa", "compiler", "torch", "load_average"} <= made["machine"].keys()
    assert made["options"]["threads"] == 1 and made["options"]["dtype"] == dtype
    assert made["limits"].keys() == {"copy_gb_s", "matmul_float32_gflop_s", "matmul_bfloat16_gflop_s"}
    (result,) = made["results"]
    names = {f"{i.name}/{i.form}" for i in IMPLS} - result["cannot_run"].keys() | {"torch conv1d"}
    assert result["gate"]["contenders"].keys() == names and not result["wrong"]
    for kind in ("forward", "forward_backward"):
        floors = set(FLOORS["causal_conv1d"]) if kind == "forward" and native.why_unavailable("cpu") is None else set()
        assert result[kind].keys() == names | floors
        for timing in result[kind].values():
            assert {"wall_s", "wall_min_s", "one_core_s", "repeats", "over_reference", "over_torch"} <= timing.keys()
            assert timing["wall_s"] > 0 and timing["repeats"] == 2
    assert result["forward"]["torch/parallel"]["gflop_s"] > 0
    assert result["forward"]["torch/parallel"]["over_torch"] == 1


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_a_wrong_row_is_not_timed(
    tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, fault: str
) -> None:
    target = next(i.target for i in IMPLS if i.name == "torch")
    right = dispatch._load(target)

    def wrong(x: Tensor, weight: Tensor, *rest, **options) -> tuple[Tensor, Tensor]:
        if fault == "gradient":
            return right(x, weight.detach() + 0 * weight, *rest, **options)
        y, state = right(x, weight, *rest, **options)
        return y + 1e-2 * (torch.arange(y.shape[1]) == y.shape[1] - 1)[:, None], state

    monkeypatch.setitem(dispatch._loaded, target, wrong)
    monkeypatch.setattr(dispatch, "_choices", {})
    file = tmp_path / "out.json"
    assert _run("--json", str(file)) == 1
    assert "torch/parallel" in capsys.readouterr().err
    (result,) = json.loads(file.read_text())["results"]
    assert result["wrong"] == ["torch/parallel"]
    assert "torch/parallel" not in result["forward"] and "reference/reference" in result["forward"]


def test_slow_runs_are_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forecast from short runs sees linear and quadratic growth."""
    now = 0.0
    monkeypatch.setattr(bench.time, "process_time", lambda: now)
    inputs = {"x": torch.zeros(1, 800, 2)}
    for cost in (lambda n: 3.0 * n, lambda n: 2.0 * n + 0.5 * n * n):

        def run(short: dict[str, Tensor], cost=cost) -> None:
            nonlocal now
            now += cost(short["x"].shape[1])

        assert bench._expected(run, inputs) == pytest.approx(cost(800))


def test_interleaved_stops_at_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)

    def run(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        calls.append(name)

    costs = {"fast": 0.1, "middling": 2.0, "slow": 7.0}
    runs = {name: partial(run, name, seconds) for name, seconds in costs.items()}
    timings = clock.interleaved(runs, repeats=6, budget=5.0)
    assert {name: len(t.wall) for name, t in timings.items()} == {"fast": 6, "middling": 3, "slow": 1}
    assert calls[:5] == ["fast", "middling", "slow", "fast", "middling"]
    assert timings["slow"].as_dict()["wall_s"] == pytest.approx(7.0)


def test_shortened_cuts_what_has_positions() -> None:
    inputs = {"x": torch.zeros(1, 9, 4), "B": torch.zeros(1, 9, 2, 3), "A": torch.zeros(9, 4), "scale": 2.0}
    made = shortened(inputs, 5)
    assert made["x"].shape == (1, 5, 4) and made["B"].shape == (1, 5, 2, 3)
    assert made["A"].shape == (9, 4) and made["scale"] == 2.0


def test_unknown_op_is_named() -> None:
    with pytest.raises(UnsupportedInput, match="causal_conv1d"):
        bench.bench_op("conv")


def test_page_has_the_speed_table_of_the_linear_family(tmp_path: Path) -> None:
    """Floors bound a ratio from above, peers from below, and the page shows both with what was aimed at."""
    rows = [
        bench_linear._row("one", 2.0, "a floor", 1.0, floor=1.5),
        bench_linear._row("two", 2.0, "a peer", 50.0, speedup=20),
    ]
    assert [row["ratio"] for row in rows] == [2.0, 25.0]
    memory = {"what": "it", "peak_bytes": {"10": 5, "20": 35}, "bytes_per_token": [3.0]}
    made = {
        "machine": clock.machine(),
        "options": {"threads": 2},
        "limits": {"copy_gb_s": 1, "matmul_float32_gflop_s": 1},
    }
    (tmp_path / "x.json").write_text(json.dumps(made | {"linear_family": {"rows": rows, "memory": memory}}))
    text = markdown.page(tmp_path)
    assert "| one | 2e+03 | a floor | 1e+03 | 2 | <= 1.5 |" in text and "| 25 | >= 20 |" in text
    assert "3 bytes per token between lengths 10, 20" in text


def test_isa_holds_torch_and_ours_to_one_set(tmp_path: Path) -> None:
    """In a process of its own, because torch's libraries read their limits when they start."""
    if native.why_unavailable("cpu") is not None:
        pytest.skip(native.why_unavailable("cpu"))
    file = tmp_path / "out.json"
    assert report.main(["norm", "--isa", "portable", "--repeats", "1", "--budget", "0.01", "--json", str(file)]) == 0
    made = json.loads(file.read_text())
    assert made["machine"]["isa"] == made["options"]["isa"] == "portable"
    with pytest.raises(SystemExit):
        report.main(["norm", "--isa", "portable"], peers={"norm": {}})
