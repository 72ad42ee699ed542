"""Mixers whose kernels are no state space: kernels, sheet values, streams. Their laws are in test_mixers.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.mixers import Mixer, build_mixer
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


STREAMS = [{"kind": "sgconv", "l_max": 20, "kernel_dim": 3}, {"kind": "sgconv", "l_max": 1, "kernel_dim": 1}]


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


@pytest.mark.parametrize("config", STREAMS[:1])
@torch.no_grad()
def test_streams_hear_of_a_new_kernel(config: dict) -> None:
    mixer, x = _mixer(**config), _input(1, 30)
    state = mixer.initial_state(1, dtype=x.dtype)
    for t in range(20):
        _, state = mixer.step(x[:, t], state)
    for name, parameter in mixer.named_parameters():
        before = mixer.step(x[:, 20], state.clone())[0]
        parameter.mul_(1.5)
        after, _ = mixer.step(x[:, 20], state.clone())
        assert not torch.equal(before, after), name
        _same(after, mixer(x[:, :21])[0][:, -1])


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
