"""`python -m seqlib.bench gpu` without a GPU: cases fit the ops, gate and report work, and it says what it lacks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from seqlib.bench import gpu
from seqlib.bench.gpu_cases import CASES, GpuCase
from seqlib.bench.peers import PEERS


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock and the limits of a device, as numbers."""
    monkeypatch.setattr(gpu, "timed", lambda run, *_: run() is not None and 1e-3)
    monkeypatch.setattr(gpu, "limits", lambda: gpu.Limits(1e12, 1e14))
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SHORT", 20)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_pass_the_gate(case: GpuCase, on_cpu) -> None:
    """Every case builds, its rows agree with the reference there, and its counts are positive."""
    record = gpu.bench_case(case, (1, 24), gpu.Limits(1e12, 1e14), 0.0)
    assert record["gate"] and all(verdict["passed"] for verdict in record["gate"].values()), record["gate"]
    assert not record["failed"] and record["forward"].keys() == record["forward_backward"].keys()
    assert all(t["tflop_s"] > 0 and t["gb_s"] > 0 and t["of_roofline"] > 0 for t in record["forward"].values())


def test_report_and_charts(on_cpu, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """One call gives records for each shape, ratios to the best peer, and charts; what had no time is named."""
    report = gpu.run(["causal_conv1d"], [(1, 16), (2, 8)], budget=60.0)
    assert [(r["batch"], r["seqlen"]) for r in report["results"]] == [(1, 16), (2, 8)] and not report["left_out"]
    peer = next(iter(PEERS["causal_conv1d"]))
    assert report["results"][0]["forward"][peer]["over_best_peer"] == pytest.approx(1.0)
    assert "of the roofline" in capsys.readouterr().out
    gpu.draw(report, tmp_path)
    assert len(list(tmp_path.glob("*.svg"))) == 2
    late: dict[str, Any] = gpu.run(["norm"], [(1, 16)], budget=0.0)
    assert late["left_out"] == ["gated_norm_d5120 1x16"]


def test_no_device_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = subprocess.run([sys.executable, "-m", "seqlib.bench", "gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "torch sees no CUDA device" in done.stderr
