"""Time-invariant mixers: their equations, starts, two directions and kept kernels. Their laws are in test_mixers.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.hippo import hippo, nplr
from seqlib.layers.linear import Linear
from seqlib.layers.readout import OUTPUTS, Readout
from seqlib.mixers import Mixer, build_mixer
from seqlib.ops import gelu_glu
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
    assert float(torch.view_as_complex(lin.C.detach()).abs().square().mean()) == pytest.approx(1.0, rel=0.15)
    assert float(lin.D.detach().std()) == pytest.approx(1.0, rel=0.15)


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
        {"kind": "s4", "d_state": 7},
        {"kind": "s4", "init": "lin"},
        {"kind": "s4", "l_max": 0},
        {"kind": "dss", "version": "relu"},
        {"kind": "lru", "r_max": 1.5},
        {"kind": "lru", "max_phase": 7.0},
        {"kind": "s5", "blocks": 3, "d_state": 8},
        {"kind": "s5", "C_init": "normal"},
    ],
    ids=lambda c: "-".join(f"{v}" for v in c.values()),
)
def test_bad_configs_are_refused(config: dict) -> None:
    """n_ssm 4 does not divide 6 channels; the message names the field."""
    field = list(config)[-1]
    with pytest.raises(ConfigError, match=field):
        build_mixer(config, D_MODEL)


@pytest.mark.parametrize("measure", ["legs", "legt", "fourier"])
def test_s4_starts_as_hippo(measure: str) -> None:
    """The kernel is that of the dense HiPPO matrix with bilinear steps; Re A of legt and fourier starts at -1e-4."""
    n, length = 6, 30
    mixer = build_mixer({"kind": "s4", "init": measure, "d_state": n, "l_max": 40, "B_clip": None, **PLAIN}, 3)
    mixer.double().reset_parameters()
    A, B = hippo(measure, n)
    A = A if measure == "legs" else A - 1e-4 * torch.eye(n)
    V = nplr(measure, n).V
    with torch.no_grad():
        kernel = mixer.kernel(length)[0]
        system = mixer.system()
        re, im = system.dense.C.chunk(2, -1)  # y = re Re(h) + im Im(h) and h = V* x
        for i, dt in enumerate(mixer.dt()):
            C = (torch.complex(re, -im)[i].to(V.dtype) @ V.mH).real
            left = torch.eye(n) - dt / 2 * A
            A_bar = torch.linalg.solve(left, torch.eye(n) + dt / 2 * A)
            h = torch.linalg.solve(left, dt * B)
            for step in range(length):
                assert float(kernel[i, step]) == pytest.approx(float(C @ h), abs=1e-9), (i, step)
                h = A_bar @ h


def test_s4_stores_the_readout_of_the_truncated_kernel() -> None:
    mixer = build_mixer({"kind": "s4", "l_max": 128}, 256)
    re, im = mixer.system().dense.C.detach().chunk(2, -1)
    plain = torch.complex(re, -im) / 2
    assert float(plain.abs().square().mean()) == pytest.approx(1.0, rel=0.05)
    assert int(mixer.state_dict()["l_kernel"]) == 128
    assert mixer.A_imag[0].tolist() == pytest.approx(nplr("legs", 64).A.imag.tolist(), rel=1e-6)
    assert mixer.B.max() == 2 and mixer.P.shape == (1, 1, 32, 2)


def test_s4_extends_to_other_lengths() -> None:
    """Whatever length C is stored for, the layer is the same; causal layers go beyond it by themselves."""
    config = {"kind": "s4", "d_state": 8, "l_max": 16}
    mixer, x = _mixer(**config), _input(2, 50)
    with torch.no_grad():
        want, last = mixer(x)
        for length in (64, 50, 9, 16):
            mixer.extend(length)
            y, state = mixer(x)
            _same(y, want, 1e-9)
            _same(state.ssm, last.ssm, 1e-9)
        mixer.extend(50)
        loaded = _mixer(**config)
        loaded.load_state_dict(mixer.state_dict())  # the length comes with the weights
        _same(loaded(x)[0], want, 1e-9)
        two = _mixer(**config, bidirectional=True)
        with pytest.raises(UnsupportedInput, match="extend"):
            two(x)
        short = two(x[:, :16])[0]
        two.extend(50)
        _same(two(x[:, :16])[0], short, 1e-9)
        assert two(x)[0].shape == x.shape
    with pytest.raises(UnsupportedInput, match="at least 1"):
        mixer.extend(0)


@pytest.mark.parametrize("measure", ["legs", "legt", "fourier"])
def test_s4_in_float32_is_as_exact_in_steps(measure: str) -> None:
    """256 steps, chunks and one convolution within 1e-5 of float64 on outputs of size 9; an eigenbasis loses 0.2."""
    config = {"kind": "s4", "d_state": 16, "l_max": 256, "init": measure, **PLAIN}
    torch.manual_seed(0)
    mixer = build_mixer(config, 16)
    exact, x = copy.deepcopy(mixer).double(), _input(1, 256, 16)
    with torch.no_grad():
        want, _ = exact(x)
        state, steps = mixer.initial_state(1), []
        for t in range(256):
            y, state = mixer.step(x[:, t].float(), state)
            steps.append(y)
        first, half = mixer(x[:, :128].float())
        second, _ = mixer(x[:, 128:].float(), half)
        for got in (mixer(x.float())[0], torch.stack(steps, 1), torch.cat([first, second], 1)):
            assert float((got - want).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "config", [{"kind": "s4d", "d_state": 4}, {"kind": "s4", "d_state": 4}, {"kind": "dss"}], ids=str
)
def test_a_state_is_made_when_it_is_looked_at(config: dict) -> None:
    """With gradients, also under no_grad and after the weights have moved, it is that of its own pass."""
    mixer, x = _mixer(**config), _input(2, 9).requires_grad_()
    with torch.no_grad():
        want = mixer(x)[1].ssm
    y, state = mixer(x)
    assert "ssm" not in vars(state)
    y.sum().backward()
    with torch.no_grad():
        for p in mixer.parameters():
            p.mul_(1.1)
        ssm = state.ssm
    assert ssm.requires_grad and state.ssm is ssm
    _same(torch.view_as_real(ssm.detach()), torch.view_as_real(want), 1e-9)
    copied = copy.deepcopy(mixer(x.detach())[1].detach())
    assert copied.ssm.shape == want.shape
    with pytest.raises(AttributeError, match="kv"):
        _ = state.kv


def test_lru_is_its_equation_and_starts_in_a_ring() -> None:
    mixer, x = _mixer(kind="lru", d_state=10, r_min=0.4, r_max=0.8, max_phase=1.0, **PLAIN), _input(2, 30)
    decay = torch.exp(torch.complex(-mixer.nu_log.exp(), mixer.theta_log.exp()))
    B, C = torch.view_as_complex(mixer.B), torch.view_as_complex(mixer.C[0])
    h, ys = torch.zeros(2, 10, dtype=torch.complex128), []
    for t in range(30):
        h = decay * h + mixer.gamma_log.exp() * (x[:, t].to(B.dtype) @ B.T)
        ys.append((h @ C.T).real + mixer.D * x[:, t])
    _same(mixer(x)[0], torch.stack(ys, 1))
    torch.manual_seed(0)
    wide = build_mixer({"kind": "lru", "d_state": 4000, "r_min": 0.4, "r_max": 0.8, "max_phase": 1.0}, 8)
    with torch.no_grad():
        decay = wide.recurrence()[0]
        assert float(decay.abs().min()) >= 0.4 and float(decay.abs().max()) <= 0.8
        assert float(decay.angle().min()) >= 0 and float(decay.angle().max()) <= 1.0
        assert float(decay.abs().square().mean()) == pytest.approx(0.4, rel=0.02)  # uniform in area: (.16 + .64) / 2
        torch.testing.assert_close(wide.gamma_log.exp(), torch.sqrt(1 - decay.abs().square()))
        assert float(wide.B.std()) == pytest.approx(16**-0.5, rel=0.02)
        assert float(wide.C.std()) == pytest.approx(4000**-0.5, rel=0.02)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_s5_is_its_equation(discretization: str) -> None:
    mixer = _mixer(kind="s5", d_state=8, blocks=2, discretization=discretization, **PLAIN)
    x = _input(2, 30)
    A = torch.complex(mixer.A_real, mixer.A_imag)
    z = A * mixer.log_dt.exp()
    B, C = torch.view_as_complex(mixer.B), torch.view_as_complex(mixer.C[0])
    zoh = discretization == "zoh"
    decay = torch.exp(z) if zoh else (1 + z / 2) / (1 - z / 2)
    gain = (torch.exp(z) - 1) / A if zoh else mixer.log_dt.exp() / (1 - z / 2)
    h, ys = torch.zeros(2, 4, dtype=torch.complex128), []
    for t in range(30):
        h = decay * h + gain * (x[:, t].to(B.dtype) @ B.T)
        ys.append(2 * (h @ C.T).real + mixer.D * x[:, t])
    _same(mixer(x)[0], torch.stack(ys, 1))


def test_s5_starts_as_blocks_of_hippo() -> None:
    torch.manual_seed(0)
    mixer = build_mixer({"kind": "s5", "d_state": 64, "blocks": 8}, 128)
    imag = [-19.85741037, -5.35420852, -1.95779415, -0.42748871]
    assert mixer.A_imag.tolist() == pytest.approx(imag * 8)
    assert mixer.A_real.tolist() == pytest.approx([-0.5] * 32)
    # Half an orthonormal change of basis keeps the variance of B and of C: 1 / d_state per real number drawn.
    assert float(torch.view_as_complex(mixer.B.detach()).abs().square().mean()) == pytest.approx(1 / 64, rel=0.1)
    assert float(torch.view_as_complex(mixer.C.detach()).abs().square().mean()) == pytest.approx(2 / 64, rel=0.1)
    held = build_mixer({"kind": "s5", "d_state": 4, "clip_eigs": True}, 4)
    with torch.no_grad():
        held.A_real.fill_(0.5)
        assert float(held.recurrence()[0].abs().max()) < 1


@pytest.mark.parametrize("kind", ["lru", "s5"])
def test_two_scans_meet_at_the_current_input(kind: str) -> None:
    """The second scan is the first one on the reversed sequence with the other C, the current input included."""
    torch.manual_seed(0)
    mixer = build_mixer({"kind": kind, "d_state": 6, "bidirectional": True, **PLAIN}, D_MODEL).double()
    x = _input(2, 15)
    parts = []
    for direction, u in ((0, x), (1, x.flip(1))):
        one = build_mixer({"kind": kind, "d_state": 6, **PLAIN}, D_MODEL).double()
        one.load_state_dict(mixer.state_dict() | {"C": mixer.C[direction : direction + 1]})
        parts.append(one(u)[0])
    _same(mixer(x)[0], parts[0] + parts[1].flip(1) - mixer.D * x)


@pytest.mark.parametrize("version", ["exp", "softmax"])
def test_dss_is_its_equation(version: str) -> None:
    length = 30
    mixer = _mixer(kind="dss", d_state=5, version=version, l_max=length, **PLAIN)
    with torch.no_grad():
        assert mixer.A_imag[0].tolist() == pytest.approx((-nplr("legs", 10).A.imag).tolist(), rel=1e-6)
        mixer.inv_dt[:, 1] += 0.7  # two steps: of the real and of the imaginary part
        dt = mixer.inv_dt.exp()
        A = torch.complex(-mixer.A_log.exp(), mixer.A_imag)
        z = torch.complex(dt[:, :1] * A.real, dt[:, 1:] * A.imag)
        modes = torch.exp(z[..., None] * torch.arange(length))  # d n l
        modes = modes / modes.sum(-1, keepdim=True) if version == "softmax" else (torch.exp(z) - 1)[..., None] * modes
        want = torch.einsum("dn,dnl->dl", torch.view_as_complex(mixer.C[0]) / A, modes).real
        # The source guards its division by 1e-7, which weighs on modes with a small sum.
        _same(mixer.kernel(length)[0], want, 1e-5 if version == "softmax" else 1e-11)


BIDIRECTIONAL = [
    {"kind": "dss", "d_state": 4},
    {"kind": "s4d", "d_state": 4},
    {"kind": "s4", "d_state": 4, "l_max": 16},
    {"kind": "lru", "d_state": 5},
    {"kind": "s5", "d_state": 6},
]
both = pytest.mark.parametrize("config", BIDIRECTIONAL, ids=lambda c: c["kind"])


@pytest.mark.parametrize("config", BIDIRECTIONAL[:3], ids=lambda c: c["kind"])
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


@pytest.mark.native
def test_compiled_readout_keeps_its_contract() -> None:
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 40, 33), (34, 33), (34,)))
    gelu_glu(x, weight, bias, backend="native")
    for given in ((x, weight, bias, True), (x, weight, None, True)):
        torch.library.opcheck(torch.ops.seqlib.gelu_glu.default, given)
    y, mixed = torch.ops.seqlib.gelu_glu.default(x.detach(), weight.detach(), bias.detach(), True)
    torch.library.opcheck(torch.ops.seqlib.gelu_glu_bwd.default, (y, x.detach(), weight.detach(), mixed))
    assert torch.ops.seqlib.gelu_glu.default(x.detach(), weight.detach(), None, False)[1].numel() == 0


def test_a_readout_calls_its_projection_for_whoever_listens() -> None:
    """Hooks, a patched `forward` and adapters in its place; otherwise activation, product and gate are one op."""
    torch.manual_seed(0)
    plain, y, calls = Readout(40), torch.randn(2, 50, 40), []
    plain.reset_parameters()
    want = plain(y)
    hooked, patched, adapted = (copy.deepcopy(plain) for _ in range(3))
    hooked.proj.register_forward_hook(lambda *_: calls.append("hook"))
    patched.proj.forward = lambda x: calls.append("patch") or plain.proj(x)
    adapted.proj.__class__ = type(
        "Adapter", (Linear,), {"forward": lambda m, x: calls.append("adapter") or plain.proj(x)}
    )
    for readout in (hooked, patched, adapted):
        assert torch.allclose(readout(y), want, atol=1e-6)
    assert calls == ["hook", "patch", "adapter"]
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(y).dtype == torch.bfloat16


def test_only_the_value_of_a_gate_is_scaled_by_depth() -> None:
    deep = build_mixer({"kind": "s4d"}, 64, n_layer=16)
    value, gate = deep.readout.proj.weight.detach().abs().chunk(2)
    assert float(value.max()) <= 64**-0.5 / 4 and 0.98 * 64**-0.5 < float(gate.max()) <= 64**-0.5
