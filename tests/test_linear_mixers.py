"""The mixers around matrix states: what they equal, how they start, published vectors, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import ConfigError
from seqlib.mixers import Mixer, build_mixer
from seqlib.ops import rms_norm, selective_scan


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def made(kind: str, d_model: int, **config) -> Mixer:
    torch.manual_seed(0)
    return build_mixer({"kind": kind, **config}, d_model, layer_index=1, n_layer=4).double()


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_mamba2_is_a_selective_scan(norm_before_gate: bool) -> None:
    """With A, D and dt repeated over a head's channels Mamba-2 is Mamba-1's scan."""
    m = made("mamba2", 16, d_state=6, headdim=4, ngroups=2, norm_before_gate=norm_before_gate)
    u = torch.randn(2, 33, 16, dtype=torch.float64)
    z, xBC, dt = m.in_proj(u).split([32, 32 + 2 * 2 * 6, 8], -1)
    x, B, C = m.conv1d(xBC, None, None)[0].split([32, 12, 12], -1)
    A = -m.A_log.exp().repeat_interleave(4)[:, None].expand(-1, 6)
    y, _ = selective_scan(
        x, dt.repeat_interleave(4, -1), A, B.unflatten(-1, (2, 6)), C.unflatten(-1, (2, 6)),
        D=m.D[:, 0].repeat_interleave(4), dt_bias=m.dt_bias.repeat_interleave(4), dt_softplus=True,
    )  # fmt: skip
    gated = y if norm_before_gate else y * F.silu(z)
    y = rms_norm(gated, m.norm_weight, group_size=16)
    close(m(u)[0], m.out_proj(y * F.silu(z) if norm_before_gate else y))


def test_mamba2_holds_dt_in_its_limits() -> None:
    """Where every step size is cut to one value, they are the same as dt that starts there; step and forward alike."""
    limited = made("mamba2", 16, d_state=4, headdim=8, dt_limit_min=0.3, dt_limit_max=0.3)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    want = limited(x)[0]
    with torch.no_grad():
        limited.dt_bias += 7
    close(limited(x)[0], want)
    state = limited.initial_state(1)
    with torch.no_grad():
        for t in range(5):
            close(limited.step(x[:, t], state)[0], want[:, t])


def test_mamba2_starts_as_published() -> None:
    m = build_mixer({"kind": "mamba2"}, 1024, n_layer=16)
    assert m.nheads == 32 and m.in_proj.weight.shape == (2 * 2048 + 2 * 128 + 32, 1024)
    A, dt = m.A_log.exp(), F.softplus(m.dt_bias)
    assert 1 <= A.min() < 4 and 12 < A.max() <= 16
    assert 0.999e-3 <= dt.min() < 3e-3 and 3e-2 < dt.max() <= 0.1001
    assert torch.equal(m.D, torch.ones(32, 1)) and torch.equal(m.norm_weight, torch.ones(2048))
    assert 0.98 * 2048**-0.5 / 4 < m.out_proj.weight.abs().max() <= 2048**-0.5 / 4


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("mamba2", {"headdim": 24}, "headdim must divide d_inner=64, got 24"),
        ("mamba2", {"headdim": 16, "ngroups": 3}, "ngroups must divide nheads=4, got 3"),
        ("mamba2", {"dt_limit_min": 0.2, "dt_limit_max": 0.1}, "dt_limit_min <= dt_limit_max"),
        ("mamba2", {"A_min": 0.0}, "0 < A_min"),
    ],
)
def test_wrong_configs_are_refused(kind: str, config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_mixer({"kind": kind, **config}, 32)
