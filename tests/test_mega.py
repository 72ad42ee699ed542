"""Mega against plain definitions of its average and its attention. Its laws are in test_mixers.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.mixers import Mixer, build_mixer
from seqlib.models import Backbone, BackboneConfig
from seqlib.sequence import SequenceInfo

D_MODEL = 6


def _mixer(**config) -> Mixer:
    torch.manual_seed(0)
    mixer = build_mixer({"kind": "mega", "d_state": 3, "d_qk": 4, **config}, D_MODEL).double()
    with torch.no_grad():  # away from the small weights of the start
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def _input(batch: int, seqlen: int) -> Tensor:
    return torch.randn(batch, seqlen, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _ema(mixer: Mixer, x: Tensor, direction: int = 0) -> Tensor:
    """One direction, by the recurrence."""
    e = mixer.ema
    p, q = torch.sigmoid(e.delta[direction]), 1 - torch.sigmoid(e.delta[direction]) * torch.sigmoid(e.alpha[direction])
    h, ys = torch.zeros(len(x), *p.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = q * h + p * e.beta[direction] * x[:, t, :, None]
        ys.append((e.gamma[direction] * h).sum(-1) / math.sqrt(p.shape[1]))
    return torch.stack(ys, 1)


def _plain(mixer: Mixer, x: Tensor, residual: Tensor) -> Tensor:
    """The layer by its equations, position by position."""
    c = mixer.config
    m = _ema(mixer, x)
    if c.bidirectional:
        m = m + _ema(mixer, x.flip(1), 1).flip(1)
    m = nn.functional.silu(m + mixer.ema.omega * x)
    u, z, r, s = mixer.m_proj(m).split(mixer.sizes, -1)
    z, v = nn.functional.silu(z), nn.functional.silu(mixer.v_proj(x))
    q, k = (z * mixer.qk_weight[i] + mixer.qk_bias[i] for i in (0, 1))
    length, ys = x.shape[1], []
    size = c.chunk_size or length
    for i in range(length):
        first = i // size * size
        seen = range(first, min(first + size, length)) if c.bidirectional else range(first, i + 1)
        at = torch.tensor(list(seen))
        dots = (k[:, at] @ q[:, i, :, None])[..., 0]
        bias = torch.stack([_bias(mixer, i, j) for j in seen])
        if c.scores == "softmax":
            weight = torch.softmax(dots / math.sqrt(c.d_qk) + bias, -1)
        else:
            a = dots / len(at) + bias
            weight = a.clamp(min=0) ** 2
            if c.scores == "laplace":
                weight = torch.special.ndtr((a - math.sqrt(0.5)) / math.sqrt(0.25 / math.pi))
        ys.append((weight[..., None] * v[:, at]).sum(1))
    o = torch.stack(ys, 1)
    h = nn.functional.silu(s + mixer.h_proj(o * nn.functional.silu(r)))
    return torch.sigmoid(u) * (h - residual)


def _bias(mixer: Mixer, i: int, j: int) -> Tensor:
    if mixer.config.bias == "simple":
        return mixer.position_bias[(len(mixer.position_bias) - 1) // 2 + j - i]
    half = mixer.config.d_qk // 2
    turned = []
    for vector, position in zip(mixer.position_bias, (i, j)):
        z = torch.complex(vector[:half], vector[half:])
        turned.append(
            z * torch.polar(torch.ones(half).double(), position * 10000.0 ** (-torch.arange(half).double() / half))
        )
    return (turned[0] * turned[1].conj()).real.sum()


@pytest.mark.parametrize("scores", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("bias", ["rotary", "simple"])
@pytest.mark.parametrize("chunk_size", [5, None])
@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_mega_is_its_equations(scores: str, bias: str, chunk_size: int | None, bidirectional: bool) -> None:
    mixer = _mixer(
        scores=scores, bias=bias, chunk_size=chunk_size, bidirectional=bidirectional, max_positions=chunk_size or 13
    )
    x, residual = _input(2, 13), _input(2, 13) + 1
    want = _plain(mixer, x, residual)
    torch.testing.assert_close(mixer(x, residual=residual)[0], want, atol=1e-11, rtol=0)


@torch.no_grad()
def test_moving_average_has_its_reference_values() -> None:
    """Numbers of the published code, one channel with two averages: kernel, output and state, in spans and steps."""
    mixer = build_mixer({"kind": "mega", "d_state": 2, "d_qk": 2, "chunk_size": 4}, 1).double()
    ema = mixer.ema
    given = {"delta": [0.0, 1], "alpha": [0.0, -1], "beta": [1.0, -1], "gamma": [0.5, 2], "omega": [0.1]}
    for name, values in given.items():
        parameter = ema.get_parameter(name)
        parameter.copy_(torch.tensor(values).view(parameter.shape))
    x = torch.tensor([1.0, 2, 0, -1]).double().view(1, 4, 1)
    assert ema.kernel(4).flatten().tolist() == pytest.approx([-0.857096, -0.698019, -0.567858, -0.461519], abs=1e-6)
    y, state = ema(x, None, None, "auto")
    want = [-0.241723, -0.218255, -0.24165, -0.253307]
    assert y.flatten().tolist() == pytest.approx(want, abs=1e-6)
    assert state.flatten().tolist() == pytest.approx([0.2734375, -0.591717], abs=1e-6)
    state = torch.zeros(1, 1, 2, dtype=torch.float64)
    assert [float(ema.step(x[:, t], state)) for t in range(4)] == pytest.approx(want, abs=1e-6)
    assert state.flatten().tolist() == pytest.approx([0.2734375, -0.591717], abs=1e-6)


@torch.no_grad()
def test_both_averages_count_the_current_input() -> None:
    """An impulse shows kernel 0 on lags 0, 1, ... and kernel 1 on lags 0, -1, ..., unlike S4's reverse kernel."""
    mixer = _mixer(bidirectional=True)
    x = torch.zeros(1, 9, D_MODEL, dtype=torch.float64)
    x[0, 4] = 1
    kernel = mixer.ema.kernel(5)
    want = torch.zeros(9, D_MODEL, dtype=torch.float64)
    want[4:] += kernel[0].T
    want[:5] += kernel[1].flip(1).T
    want[4] += mixer.ema.omega
    y, state = mixer.ema(x, None, None, "auto")
    torch.testing.assert_close(y[0], nn.functional.silu(want), atol=1e-12, rtol=0)
    assert state is None


@torch.no_grad()
@pytest.mark.parametrize("scores", ["softmax", "laplace"])
def test_two_directions_pack_and_pad(scores: str) -> None:
    mixer = _mixer(bidirectional=True, scores=scores, chunk_size=4)
    x = _input(1, 12)
    y, _ = mixer(x, None, SequenceInfo.packed([5, 1, 6]))
    torch.testing.assert_close(y, torch.cat([mixer(p)[0] for p in x.split([5, 1, 6], 1)], 1), atol=1e-12, rtol=0)
    real = torch.tensor([[False, True, True, False, True, True, True, False, False, True, False, True]])
    y, _ = mixer(x, None, SequenceInfo(padding_mask=real))
    torch.testing.assert_close(y[real], mixer(x[real][None])[0][0], atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_highway_gate_mixes_with_the_stream_before_the_norm() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(d_model=D_MODEL, n_layer=1, layer_pattern="m", mixers={"m": {"kind": "mega", "d_qk": 4}})
    block = Backbone(config).double().layers[0]
    x = 3 * _input(2, 7)
    want, _ = block.mixer(block.norm(x), residual=x)
    torch.testing.assert_close(block(x, None, None)[0], x + want)
    state = block.mixer.initial_state(2, dtype=x.dtype)
    for t in range(7):
        y, state = block.step(x[:, t], state)
        torch.testing.assert_close(y, (x + want)[:, t])


def test_bad_mega_is_refused() -> None:
    for config in ({"scores": "relu"}, {"bias": "alibi"}, {"chunk_size": None, "bias": "simple"}, {"d_qk": 5}):
        with pytest.raises(ConfigError, match="mega"):
            _mixer(**config)
    short = _mixer(bias="simple", chunk_size=None, max_positions=5)
    with pytest.raises(UnsupportedInput, match="reaches 5 positions, got 6"):
        short(_input(1, 6))
    two = _mixer(bidirectional=True)
    with pytest.raises(UnsupportedInput, match="cannot decode"):
        two.initial_state(1)
    with pytest.raises(UnsupportedInput, match="takes no state"):
        two(_input(1, 3), _mixer().initial_state(1, dtype=torch.float64))
