"""Mixers whose kernels are no state space: kernels, sheet values, streams. Their laws are in test_mixers.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.hippo import hippo
from seqlib.mixers import Mixer, build_mixer
from seqlib.mixers.lmu import _discrete
from seqlib.ops.long_conv import SparseConv
from seqlib.sequence import SequenceInfo

D_MODEL = 6
PLAIN = {"activation": "none", "output": "none"}


def _mixer(d_model: int = D_MODEL, **config) -> Mixer:
    torch.manual_seed(0)
    return build_mixer(config, d_model).double()


def _input(batch: int, seqlen: int, d_model: int = D_MODEL) -> Tensor:
    return torch.randn(batch, seqlen, d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _same(got: Tensor, want: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


# Published settings of the Long Range Arena: config, width, segments, parameters per layer, taps of the second
# difference.
LRA = {
    "listops": ({"l_max": 2048, "kernel_dim": 1}, 128, [1, 1, *(1 << i for i in range(1, 11))], 3_072, 24),
    "text": ({"l_max": 4096, "kernel_dim": 2}, 256, [2, 2, *(1 << i for i in range(2, 12))], 12_288, None),
    "retrieval": ({"l_max": 4000, "kernel_dim": 1}, 256, [1, 1, *(1 << i for i in range(1, 12))], 6_656, 26),
    "image": (
        {"l_max": 1024, "kernel_dim": 32, "decay": "fixed_power", "decay_min": 1.0, "decay_max": 1.0},
        512,
        [32, 32, 64, 128, 256, 512],
        196_608,
        None,
    ),
    "pathfinder": ({"l_max": 1024, "kernel_dim": 32}, 256, [32, 32, 64, 128, 256, 512], 98_304, 328),
    "pathx": (
        {"l_max": 16384, "kernel_dim": 64, "init_scale": 1, "kernel_init": "cos", "decay_min": 1.0, "decay_max": 3.0},
        256,
        [128, 128, *(128 << i for i in range(1, 7))],
        262_144,
        None,
    ),
}


@pytest.mark.parametrize(("task", "sparse"), [("listops", True), ("text", True), ("image", False), ("pathx", False)])
@torch.no_grad()
def test_published_kernels_of_few_bends_decode_by_them(task: str, sparse: bool) -> None:
    mixer = _mixer(2, kind="sgconv", **LRA[task][0])
    _, state = mixer.step(torch.zeros(1, 2).double(), mixer.initial_state(1))
    assert isinstance(state.conv, SparseConv) == sparse


@pytest.mark.parametrize("task", LRA)
def test_sgconv_has_its_published_sizes(task: str) -> None:
    config, d_model, lengths, parameters, taps = LRA[task]
    made = build_mixer({"kind": "sgconv", "bidirectional": True, **config}, d_model)
    assert made.config.lengths == lengths and made.config.length == sum(lengths) >= config["l_max"]
    assert made.kernels.numel() == parameters
    if taps is None:
        return
    mixer = _mixer(2, kind="sgconv", **config)
    with torch.no_grad():
        bends = nn.functional.pad(mixer.kernel()[0], (2, 2)).diff(n=2).abs()
    assert int((bends > 1e-12 * bends.amax()).sum(-1).max()) == taps


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_sgconv_is_its_construction(interpolation: str) -> None:
    """Every lag by the formula: half-pixel positions, held at the ends, scale weights from decay_min to decay_max."""
    config = {"l_max": 24, "kernel_dim": 3, "init_scale": 1, "decay_min": 1.0, "decay_max": 3.0}
    mixer = _mixer(kind="sgconv", interpolation=interpolation, **config)
    lengths = mixer.config.lengths
    assert lengths == [6, 6, 12]
    multiplier = torch.linspace(1, 3, D_MODEL, dtype=torch.float64)
    columns = []
    for i, n in enumerate(lengths):
        w = mixer.kernels.detach()[i, 0]
        for j in range(n):
            at = min(max((j + 0.5) * 3 / n - 0.5, 0.0), 2.0)
            low = int(at)
            value = w[:, low] + (at - low) * (w[:, min(low + 1, 2)] - w[:, low])
            if interpolation == "nearest":
                value = w[:, j * 3 // n]
            columns.append(value * multiplier ** (len(lengths) - 1 - i))
    whole = torch.stack(columns, -1)
    kernel = mixer.kernel().detach()[0]
    _same(kernel, whole / whole.norm(dim=-1, keepdim=True), 1e-6)  # the norm was taken in float32
    _same(mixer.kernel_norm[0], whole.norm(dim=-1, keepdim=True), 1e-4)


def test_sgconv_sums_scales_and_learns_powers() -> None:
    mixer = _mixer(kind="sgconv", l_max=8, kernel_dim=2, combine="sum", decay="power", decay_min=0.5, decay_max=1.5)
    assert mixer.config.lengths == [2, 4, 8] and mixer.config.length == 8
    w = mixer.kernels.detach()[:, 0]
    parts = [nn.functional.interpolate(w[i][None], size=2 << i, mode="linear")[0] for i in range(3)]
    whole = sum(nn.functional.pad(part, (0, 8 - part.shape[1])) for part in parts)
    whole = whole * torch.arange(1.0, 9).double() ** -mixer.powers.detach()[:, None]
    _same(mixer.kernel().detach()[0], whole / mixer.kernel_norm[0])
    assert float(mixer.powers.detach().min()) >= 0.5 and float(mixer.powers.detach().max()) <= 1.5
    assert mixer.param_groups() == [(["kernels", "powers"], {"lr": 1e-3})]  # weight decay acts on kernels
    fixed = _mixer(kind="sgconv", l_max=8, kernel_dim=2, decay="fixed_power", lr=None)
    assert "powers" in fixed.state_dict() and fixed.param_groups() == []


def test_sgconv_keeps_the_norm_it_started_with() -> None:
    mixer = _mixer(kind="sgconv", l_max=20, kernel_dim=2, bidirectional=True)
    with torch.no_grad():
        torch.testing.assert_close(mixer.kernel().norm(dim=-1), torch.ones(2, D_MODEL).double(), atol=1e-6, rtol=0)
        mixer.kernels.mul_(3)
        torch.testing.assert_close(mixer.kernel().norm(dim=-1), torch.full((2, D_MODEL), 3.0).double())
        other = _mixer(kind="sgconv", l_max=20, kernel_dim=2, bidirectional=True, kernel_init="cos")
        other.load_state_dict(mixer.state_dict())
        assert torch.equal(other.kernel(), mixer.kernel())


def test_cosines_are_dealt_to_the_channels() -> None:
    mixer = _mixer(kind="sgconv", kernel_init="cos", l_max=64, kernel_dim=16, bidirectional=True)
    waves = torch.cos(torch.linspace(0, 2 * torch.pi, 16) * torch.arange(D_MODEL)[:, None]).double()
    for scale in mixer.kernels.detach():
        assert torch.equal(scale[0], scale[1])
        order = torch.cdist(scale[0], waves).argmin(1)
        assert sorted(order.tolist()) == list(range(D_MODEL))
        _same(scale[0], waves[order], 1e-6)


def test_two_directions_of_sgconv() -> None:
    mixer = _mixer(kind="sgconv", l_max=8, kernel_dim=2, bidirectional=True, **PLAIN)
    x = torch.zeros(1, 9, D_MODEL, dtype=torch.float64)
    x[0, 4] = 1
    kernel = mixer.kernel()
    y, state = mixer(x)
    _same(y[0, 4:] - torch.eye(5, 1) * mixer.D, kernel[0, :, :5].T)
    _same(y[0, :4].flip(0), kernel[1, :, :4].T)
    assert state.nbytes == 0
    x = _input(1, 12)
    y, _ = mixer(x, None, SequenceInfo.packed([5, 7]))
    _same(y, torch.cat([mixer(x[:, :5])[0], mixer(x[:, 5:])[0]], 1))
    with pytest.raises(UnsupportedInput, match="takes no state"):
        mixer(x, _mixer(kind="sgconv", l_max=8, kernel_dim=2).initial_state(1))
    with pytest.raises(UnsupportedInput, match="cannot decode"):
        mixer.initial_state(1)


STREAMS = [
    {"kind": "sgconv", "l_max": 20, "kernel_dim": 3},  # few bends
    {"kind": "sgconv", "l_max": 160, "kernel_dim": 40},  # many
    {"kind": "sgconv", "l_max": 20, "kernel_dim": 2, "interpolation": "nearest"},
    {"kind": "sgconv", "l_max": 20, "kernel_dim": 3, "decay": "power"},
    {"kind": "hyena", "l_max": 20, "d_filter": 5},
    {"kind": "sgconv", "l_max": 1, "kernel_dim": 1},
]


@pytest.mark.parametrize("config", STREAMS)
@torch.no_grad()
def test_streams_change_between_steps_and_spans(config: dict) -> None:
    """Steps, spans, steps again, and rows reordered on the way: all of it is one sequence."""
    mixer, x = _mixer(**config), _input(2, 90)
    want, _ = mixer(x)
    state = mixer.initial_state(2, dtype=x.dtype)
    begin = 0
    for length, stepwise in ((37, True), (5, False), (1, True), (2, True), (1, False), (40, True)):
        if stepwise:
            for t in range(begin, begin + length):
                y, state = mixer.step(x[:, t], state)
                _same(y, want[:, t])
        else:
            y, after = mixer(x[:, begin : begin + length], state)
            _same(y, want[:, begin : begin + length])
            state = after
        begin += length
        kept = state.clone()
    swapped = kept.reorder(torch.tensor([1, 1, 0]))
    y, _ = mixer.step(x[[1, 1, 0], begin], swapped)
    _same(y, want[[1, 1, 0], begin])
    _same(mixer.step(x[:, begin], state)[0], want[:, begin])


@pytest.mark.parametrize("config", [STREAMS[0], STREAMS[1], STREAMS[4]], ids=str)
@torch.no_grad()
def test_streams_hear_of_a_new_kernel(config: dict) -> None:
    mixer, x = _mixer(**config), _input(1, 30)
    state = mixer.initial_state(1, dtype=x.dtype)
    for t in range(20):
        _, state = mixer.step(x[:, t], state)
    for name, parameter in mixer.named_parameters():
        if name.startswith(("in_proj", "conv1d")):  # the state holds what they made of the past
            continue
        before = mixer.step(x[:, 20], state.clone())[0]
        parameter.mul_(1.5)
        after, _ = mixer.step(x[:, 20], state.clone())
        assert not torch.equal(before, after), name
        _same(after, mixer(x[:, :21])[0][:, -1])


def test_hyena_is_its_equations() -> None:
    """The kernel lag by lag, then gate * (conv(k v) + D k v) between a short convolution and a projection."""
    length, width = 12, 5
    mixer, x = _mixer(kind="hyena", l_max=length, d_filter=width, d_position=5, shift=0.1), _input(2, length)
    t = torch.arange(length).double()
    angle = 2 * torch.pi * t / length
    features = [t / (length - 1), *((1e-4 * angle).cos(), angle.cos()), *(-(1e-4 * angle).sin(), -angle.sin())]
    _same(mixer.positions, torch.stack(features, 1), 1e-6)  # drawn in float32
    fast, slow = math.log(0.01) / 0.3, math.log(0.01) / 1.5
    columns = []
    for lag in range(length):
        h = mixer.positions[lag]
        for layer in mixer.filter[:-1]:
            h = torch.sin(mixer.frequency * (layer.weight @ h + layer.bias))
        rate = slow + (fast - slow) * torch.arange(D_MODEL).double() / (D_MODEL - 1)
        columns.append(mixer.filter[-1].weight @ h * (torch.exp(rate * lag / (length - 1)) + 0.1))
    kernel = torch.stack(columns, 1)
    _same(mixer.kernel(), kernel)
    short = nn.functional.conv1d(
        mixer.in_proj(x).mT, mixer.conv1d.weight[:, None], mixer.conv1d.bias, padding=2, groups=3 * D_MODEL
    )
    g, k, v = short[..., :length].mT.chunk(3, -1)
    u = k * v
    y = torch.stack([sum(kernel[:, j] * u[:, i - j] for j in range(i + 1)) for i in range(length)], 1)
    _same(mixer(x)[0], mixer.out_proj(g * (y + mixer.D * u)), 1e-10)
    assert mixer.param_groups()[1] == (["positions"], {"weight_decay": 0.0, "lr": 1e-5})


def test_memory_has_its_reference_values() -> None:
    """Two coefficients over a window of four: the numbers of the published code, in a span and in steps."""
    A_bar, B_bar = _discrete(2, 4.0)
    assert A_bar.flatten().tolist() == pytest.approx([0.717509, -0.148493, 0.445480, 0.420522], abs=1e-6)
    assert B_bar.tolist() == pytest.approx([0.282491, -0.445480], abs=1e-6)
    mixer = _mixer(1, kind="lmu", d_state=2, theta=4.0)
    with torch.no_grad():
        mixer.u_proj.weight.fill_(1)
        mixer.u_proj.bias.fill_(0)
        x = torch.tensor([1.0, 0, 2, 1]).double().view(1, 4, 1)
        want = [[0.282491, -0.44548], [0.268841, -0.06149], [0.767008, -0.797055], [0.951184, -0.438973]]
        state = mixer.initial_state(1)
        for t in range(4):
            _, state = mixer.step(x[:, t], state)
            assert state.memory.flatten().tolist() == pytest.approx(want[t], abs=1e-6)
            _, whole = mixer(x[:, : t + 1])
            assert whole.memory.flatten().tolist() == pytest.approx(want[t], abs=1e-6)


def test_memory_is_hippo_legt() -> None:
    """The same system in another basis: coefficients scaled by (-1)^i sqrt(2i + 1), time by theta / 2."""
    n, theta = 8, 20.0
    A, B = hippo("legt", n)
    i = torch.arange(n).double()
    scale = (-1.0) ** i * torch.sqrt(2 * i + 1)
    A, B = 2 / theta * scale[:, None] * A / scale, 2 / theta * scale * B
    A_bar, B_bar = _discrete(n, theta)
    _same(A_bar, torch.linalg.matrix_exp(A))
    _same(B_bar, torch.linalg.solve(A, (A_bar - torch.eye(n)) @ B))


def test_memory_reads_its_window_back() -> None:
    """Legendre polynomials over the coefficients give the input of any delay up to theta."""
    n, theta = 24, 100.0
    t = torch.arange(300).double()
    u = 1 + torch.sin(t / 15)
    A_bar, B_bar = _discrete(n, theta)
    m = torch.zeros(n, dtype=torch.float64)
    for value in u:
        m = A_bar @ m + B_bar * value
    for delay in (20, 50, 80):
        legendre = [1.0, 2 * delay / theta - 1]
        for k in range(1, n - 1):
            legendre.append(((2 * k + 1) * legendre[1] * legendre[k] - k * legendre[k - 1]) / (k + 1))
        held = float(u[299 - delay] + u[300 - delay]) / 2  # an input is held for one step
        assert float(torch.tensor(legendre).double() @ m) == pytest.approx(held, abs=1e-3)


def test_memory_made_without_gradients_serves_them_later() -> None:
    x = _input(1, 5)
    with torch.inference_mode():
        _mixer(kind="lmu", d_state=3, theta=11.0)(x)
    mixer = _mixer(kind="lmu", d_state=3, theta=11.0)
    mixer(x)[0].sum().backward()
    assert mixer.u_proj.weight.grad is not None


@pytest.mark.parametrize("config", [{"kind": "lmu", "theta": 0.0}, {"kind": "hyena", "d_position": 4}], ids=str)
def test_bad_lmu_and_hyena_are_refused(config: dict) -> None:
    with pytest.raises(ConfigError, match=list(config)[-1]):
        build_mixer(config, D_MODEL)


@pytest.mark.parametrize(
    "config",
    [
        {"kernel_dim": 64, "l_max": 1},
        {"init_scale": -1},
        {"combine": "add"},
        {"interpolation": "cubic"},
        {"decay": "hankel"},
        {"kernel_init": "zeros"},
        {"decay_max": 1.0},
    ],
    ids="-".join,
)
def test_bad_sgconv_configs_are_refused(config: dict) -> None:
    with pytest.raises(ConfigError, match=list(config)[-1]):
        build_mixer({"kind": "sgconv", **config}, D_MODEL)
