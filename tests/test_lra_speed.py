"""The speed table of state spaces: every figure is there, a wrong peer has no speed, and the page renders it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from seqlib.bench import clock, markdown
from seqlib.errors import SeqlibError
from seqlib.lra import speed

# A stand-in for the published file: the plain recurrence of minimal S4D, so that weights and outputs must agree.
PEER = """
import torch
from torch import nn
from src.models.nn import DropoutNd


class Kernel(nn.Module):
    def __init__(self, h, n):
        super().__init__()
        self.C = nn.Parameter(torch.randn(h, n // 2, 2))
        self.log_dt = nn.Parameter(torch.linspace(-6, -3, h))
        self.log_A_real = nn.Parameter(torch.full((h, n // 2), -0.7))
        self.A_imag = nn.Parameter(3.14 * torch.arange(n // 2).float().repeat(h, 1))

    def forward(self, length):
        z = self.log_dt.exp()[:, None] * torch.complex(-self.log_A_real.exp(), self.A_imag)
        C = torch.view_as_complex(self.C) * (z.exp() - 1) / torch.complex(-self.log_A_real.exp(), self.A_imag)
        return 2 * (C[..., None] * torch.exp(z[..., None] * torch.arange(length))).sum(1).real


class S4D(nn.Module):
    def __init__(self, d_model, d_state=64, transposed=True):
        super().__init__()
        self.D = nn.Parameter(torch.randn(d_model))
        self.kernel = Kernel(d_model, d_state)
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1), nn.GLU(dim=1))

    def forward(self, x):
        u, n = x.mT, 2 * x.shape[1]
        y = torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(self.kernel(x.shape[1]), n), n)[..., : x.shape[1]]
        return self.output_linear(nn.functional.gelu(y + self.D[:, None] * u)).mT SCALE, None


def S4Block(d_model, d_state=64, transposed=True, **_):
    return S4D(d_model, d_state)
"""
SIZES = {"batch": 2, "seqlen": 32, "d_model": 8, "d_state": 4, "repeats": 1, "budget": 1.0}


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: False)  # it would hold for the other tests too
    monkeypatch.setattr(clock, "ROTATED_BYTES", 1e6)
    folder = tmp_path / "models" / "s4"
    folder.mkdir(parents=True)
    for file in ("s4", "s4d"):
        (folder / f"{file}.py").write_text(PEER.replace("SCALE", ""))
    return tmp_path


def test_the_table_has_every_figure(peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = speed.mixer_from_s4
    monkeypatch.setattr(speed, "mixer_from_s4", lambda weights, dt_transform: convert(weights))
    found = speed.bench_state_spaces(peer, long=2000, **SIZES)
    assert list(found["state_spaces"]) == ["convolution", "s4d", "s4"]
    for name, made in found["state_spaces"].items():
        for kind in ("forward", "forward_backward"):
            assert made[kind]["ratio"] > 0 and made[kind]["ratio_one_core"] > 0
            if name != "convolution":
                assert made["kernel_share"][kind] > 0
    assert all(us > 0 for us in found["decoding_us"].values())
    assert found["long"]["forward_backward"]["peak_gb"] > 0
    file = tmp_path / "bench" / "cpu_state_spaces.json"
    file.parent.mkdir()
    speed.show_state_spaces(found, file, Console())
    assert json.loads(file.read_text())["state_spaces"].keys() == found["state_spaces"].keys()
    page = markdown.page(file.parent)
    assert "state-spaces/s4" in page and "torch FFT" in page and "2,000 positions" in page


def test_a_wrong_peer_has_no_speed(peer: Path) -> None:
    (peer / "models" / "s4" / "s4d.py").write_text(PEER.replace("SCALE", "* 1.01"))
    with pytest.raises(SeqlibError, match="outputs differ"):
        speed.bench_state_spaces(peer, long=None, **SIZES)
    with pytest.raises(SeqlibError, match="takes a checkout"):
        speed.bench_state_spaces(peer / "models", long=None, **SIZES)


def test_it_runs_without_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(clock, "ROTATED_BYTES", 1e6)
    found = speed.bench_state_spaces(None, long=None, **SIZES)
    assert "ratio" not in found["state_spaces"]["s4"]["forward"]
    assert torch.get_num_threads() >= 1
