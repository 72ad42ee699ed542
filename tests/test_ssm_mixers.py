"""Time-invariant mixers: their equations, starts, two directions and kept kernels. Their laws are in test_mixers.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.readout import OUTPUTS, Readout
from seqlib.mixers import Mixer, build_mixer
from seqlib.sequence import SequenceInfo

D_MODEL = 6
PLAIN = {"activation": "none", "output": "none"}


def _mixer(**config) -> Mixer:
    torch.manual_seed(0)
    return build_mixer(config, config.pop("d_model", D_MODEL)).double()


def _input(batch: int, seqlen: int, d_model: int = D_MODEL) -> Tensor:
    return torch.randn(batch, seqlen, d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _same(got: Tensor, want: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def _recurrence(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, D: Tensor, x: Tensor, bilinear: bool) -> Tensor:
    """y of h' = A h + B x by dense bilinear steps, or by exact ones; A, B, C (d, n), every state on its own."""
    z = dt[:, None] * A
    decay = (1 + z / 2) / (1 - z / 2) if bilinear else torch.exp(z)
    B_bar = dt[:, None] * B / (1 - z / 2) if bilinear else B * (torch.exp(z) - 1) / A
    h = torch.zeros_like(decay).expand(x.shape[0], -1, -1)
    ys = []
    for t in range(x.shape[1]):
        h = decay * h + B_bar * x[:, t, :, None]
        ys.append((C * h).sum(-1).real * (2 if A.is_complex() else 1) + D * x[:, t])
    return torch.stack(ys, 1)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "inv2", "quad", "legs", "real"])
def test_s4d_is_its_equation(init: str, discretization: str) -> None:
    mixer = _mixer(kind="s4d", d_state=8, init=init, discretization=discretization, n_ssm=3, **PLAIN)
    x = _input(2, 40)
    A = -mixer.A_log.exp()
    B, C = mixer.B, mixer.C[0]
    if init != "real":
        A = torch.complex(A, mixer.A_imag)
        B, C = torch.view_as_complex(B), torch.view_as_complex(C)
    A, B = A[torch.arange(D_MODEL) % 3], B[torch.arange(D_MODEL) % 3]  # channel i has number i % n_ssm
    dt = nn.functional.softplus(mixer.inv_dt)
    _same(mixer(x)[0], _recurrence(A, B, C, dt, mixer.D, x, discretization == "bilinear"))


def test_s4d_starts_as_published() -> None:
    mixer = build_mixer({"kind": "s4d", "init": "legs", "d_state": 4}, 256)
    torch.testing.assert_close(mixer.A_log.exp(), torch.full((1, 2), 0.5))
    torch.testing.assert_close(mixer.A_imag, torch.tensor([[-4.60329301, -0.55650112]]))
    torch.testing.assert_close(mixer.B, torch.tensor([[[2.0, 0.0], [0.96693117, 0.0]]]))  # 2.658 is clipped at 2
    lin = build_mixer({"kind": "s4d", "init": "lin", "d_state": 8, "dt_transform": "exp"}, 256)
    torch.testing.assert_close(lin.A_imag, -torch.pi * torch.arange(4.0)[None])
    for made in (mixer, lin):
        dt = made.dt().detach()
        assert 0.999e-3 <= float(dt.min()) < 1.5e-3 and 0.07 < float(dt.max()) <= 0.1001
        assert float(dt.log().std()) == pytest.approx(torch.log(torch.tensor(100.0)).item() / 12**0.5, rel=0.1)
    assert float(torch.view_as_complex(lin.C).abs().square().mean()) == pytest.approx(1.0, rel=0.15)
    assert float(lin.D.std()) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "s4d", "n_ssm": 4, "d_state": 3},
        {"kind": "s4d", "n_ssm": 4},
        {"kind": "s4d", "init": "fout"},
        {"kind": "s4d", "discretization": "dss"},
        {"kind": "s4d", "dt_transform": "relu"},
        {"kind": "s4d", "dt_min": 0.2, "dt_max": 0.1},
        {"kind": "s4d", "rate": 0.0},
        {"kind": "s4d", "activation": "tanh"},
        {"kind": "s4d", "output": "glu2"},
    ],
    ids=lambda c: "-".join(f"{v}" for v in list(c.values())[1:]),
)
def test_bad_configs_are_refused(config: dict) -> None:
    """n_ssm 4 does not divide 6 channels; the message names the field."""
    field = list(config)[-1]
    with pytest.raises(ConfigError, match=field):
        build_mixer(config, D_MODEL)


BIDIRECTIONAL = [{"kind": "s4d", "d_state": 4}]
both = pytest.mark.parametrize("config", BIDIRECTIONAL, ids=lambda c: c["kind"])


@both
def test_two_directions_are_two_convolutions(config: dict) -> None:
    """Kernel 0 on lags 0, 1, ..., kernel 1 on lags -1, -2, ...: an impulse shows both."""
    mixer = _mixer(**config, bidirectional=True, **PLAIN)
    x = torch.zeros(1, 9, D_MODEL, dtype=torch.float64)
    x[0, 4] = 1
    kernel = mixer.kernel(9)
    y = mixer(x)[0][0]
    _same(y[4:] - torch.eye(5, 1) * mixer.D, kernel[0, :, :5].T)
    _same(y[:4].flip(0), kernel[1, :, :4].T)


@both
def test_two_directions_have_no_state(config: dict) -> None:
    mixer = _mixer(**config, bidirectional=True)
    x = _input(2, 7)
    _, state = mixer(x)
    assert state.nbytes == mixer.state_bytes(2, 7) == 0
    _same(mixer(x, state)[0], mixer(x)[0])  # the empty state says nothing
    causal = _mixer(**config)
    with pytest.raises(UnsupportedInput, match="takes no state"):
        mixer(x, causal(x)[1])
    with pytest.raises(UnsupportedInput, match="cannot decode"):
        mixer.initial_state(2)


@both
def test_two_directions_pack_and_pad(config: dict) -> None:
    mixer = _mixer(**config, bidirectional=True)
    x = _input(1, 12)
    y, _ = mixer(x, None, SequenceInfo.packed([5, 1, 6]))
    for part, got in zip(x.split([5, 1, 6], 1), y.split([5, 1, 6], 1)):
        _same(got, mixer(part)[0])
    real = torch.tensor([[False, True, True, False, True, True, True, False, False, True, False, True]])
    y, _ = mixer(x, None, SequenceInfo(padding_mask=real))
    _same(y[real], mixer(x[real][None])[0][0])


KERNELS = [{"kind": "s4d", "d_state": 4}]


@pytest.mark.parametrize("config", KERNELS, ids=lambda c: c["kind"])
def test_kernels_are_kept_until_a_parameter_changes(config: dict) -> None:
    mixer, x = _mixer(**config), _input(1, 20)
    other = _mixer(**config)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)

    def fresh() -> Tensor:
        return copy.deepcopy(mixer)(x)[0]  # a copy has kept nothing

    with torch.no_grad():
        first, _ = mixer(x)
        assert mixer.kernel(20) is mixer.kernel(20)
        assert torch.equal(mixer(x)[0], first)
        names = [n for group, _ in mixer.param_groups() for n in group] + ["C"]
        for name in names:
            before = mixer(x)[0]
            dict(mixer.named_parameters())[name].mul_(0.9)  # as an optimizer writes
            assert not torch.equal(mixer(x)[0], before), name
            assert torch.equal(mixer(x)[0], fresh()), name
            setattr(mixer, name, nn.Parameter(getattr(mixer, name) * 1.2))  # another tensor, perhaps at its address
            assert torch.equal(mixer(x)[0], fresh()), name
        mixer.load_state_dict(other.state_dict())
        assert torch.equal(mixer(x)[0], other(x)[0])
        # Steps hear of changes too.
        mixer.step(x[:, 0], mixer.initial_state(1))
        mixer.C.mul_(2)
        _same(mixer.step(x[:, 0], mixer.initial_state(1))[0], fresh()[:, 0])
    mixer(x)[0].sum().backward()  # and with gradients nothing is kept
    assert all(p.grad is not None for p in mixer.parameters())


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_rate_multiplies_dt(discretization: str) -> None:
    """A layer at half the sample rate: twice the step, and close outputs on every second sample of a smooth input."""
    config = {"kind": "s4d", "d_state": 8, "discretization": discretization, "dt_max": 1e-2, **PLAIN}
    mixer = _mixer(**config)
    t = torch.arange(400, dtype=torch.float64)[None, :, None]
    x = torch.sin(t / 60 + torch.arange(D_MODEL))
    with torch.no_grad():
        full = mixer(x)[0]
        mixer.rate = 2.0
        half = mixer(x[:, ::2])[0]
        _same(mixer.dt(), 2 * _mixer(**config).dt())
        change = (half - full[:, ::2])[:, 50:].abs().mean() / full.abs().mean()
        assert float(change) < 0.03
        mixer.rate = 1.0
        assert torch.equal(mixer(x)[0], full)
    _same(_mixer(**config, rate=2.0)(x[:, ::2])[0], half)


def test_state_space_parameters_have_their_own_options() -> None:
    mixer = _mixer(kind="s4d")
    assert mixer.param_groups() == [(["inv_dt", "A_log", "B", "A_imag"], {"weight_decay": 0.0, "lr": 1e-3})]
    assert _mixer(kind="s4d", lr=None).param_groups()[0][1] == {"weight_decay": 0.0}
    assert _mixer(kind="s4d", lr=5e-4, init="real").param_groups() == [
        (["inv_dt", "A_log", "B"], {"weight_decay": 0.0, "lr": 5e-4})
    ]


@pytest.mark.parametrize("output", OUTPUTS)
def test_readout_is_its_equation(output: str) -> None:
    torch.manual_seed(0)
    readout = Readout(4, "gelu", output)
    readout.reset_parameters()
    y = torch.randn(3, 4)
    a = nn.functional.gelu(y)
    W, b = (None, None) if readout.proj is None else (readout.proj.weight, readout.proj.bias)
    want = {
        "glu": lambda: (a @ W[:4].T + b[:4]) * torch.sigmoid(a @ W[4:].T + b[4:]),
        "linear": lambda: a @ W.T + b,
        "half_glu1": lambda: a * torch.sigmoid(a @ W.T + b),
        "half_glu2": lambda: y * torch.sigmoid(a @ W.T + b),
        "none": lambda: a,
    }[output]()
    torch.testing.assert_close(readout(y), want)


def test_only_the_value_of_a_gate_is_scaled_by_depth() -> None:
    deep = build_mixer({"kind": "s4d"}, 64, n_layer=16)
    value, gate = deep.readout.proj.weight.abs().chunk(2)
    assert float(value.max()) <= 64**-0.5 / 4 and 0.98 * 64**-0.5 < float(gate.max()) <= 64**-0.5
