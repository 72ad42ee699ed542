"""Kernels that are kept for evaluation and shared by the passes of one step: exact, and made no more often."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqlib.errors import UnsupportedInput
from seqlib.layers.kept import accumulating
from seqlib.mixers import Mixer, build_mixer

CONFIGS = [
    {"kind": "s4d", "d_state": 4},
    {"kind": "s4", "d_state": 4, "l_max": 16},
    {"kind": "dss", "d_state": 4},
    {"kind": "sgconv", "l_max": 16, "kernel_dim": 4},
    {"kind": "hyena", "l_max": 16, "d_filter": 4},
    {"kind": "mega", "d_state": 2, "d_qk": 4},
]
every = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["kind"])


def _mixer(config: dict) -> Mixer:
    torch.manual_seed(0)
    return build_mixer(config, 4)


def _input(seed: int = 1) -> Tensor:
    return torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(seed))


def _sgd(mixer: Mixer) -> None:
    for p in mixer.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(mixer.parameters(), lr=0.1).step()


def _adam(mixer: Mixer) -> None:
    for p in mixer.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(mixer.parameters(), lr=0.1, foreach=True).step()


def _other_weights(mixer: Mixer) -> dict[str, Tensor]:
    return {k: v * 0.9 if v.is_floating_point() else v for k, v in mixer.state_dict().items()}


def _write_data(mixer: Mixer) -> None:
    for p in mixer.parameters():
        p.data.mul_(0.9)  # torch does not count this write


def _swap_data(mixer: Mixer) -> None:
    for p in mixer.parameters():
        p.data = p.data * 0.9


def _swap_data_there_and_back(mixer: Mixer) -> None:
    """The old memory again, with other numbers in it."""
    for p in mixer.parameters():
        old = p.data
        p.data = p.data.clone()
        old.mul_(0.9)
        p.data = old


def _replace(mixer: Mixer) -> None:
    for part in mixer.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(p.detach() * 0.9))


CHANGES: list[Callable[[Mixer], object]] = [
    _sgd,
    _adam,
    lambda mixer: mixer.load_state_dict(_other_weights(mixer)),
    lambda mixer: mixer.load_state_dict(_other_weights(mixer), assign=True),
    lambda mixer: nn.utils.vector_to_parameters(
        0.9 * nn.utils.parameters_to_vector(mixer.parameters()).detach(), mixer.parameters()
    ),
    _write_data,
    _swap_data,
    _swap_data_there_and_back,
    _replace,
]
NAMES = ["sgd", "adam", "load", "assign", "vector", "write data", "swap data", "there and back", "replace"]


@pytest.mark.parametrize("config", [*CONFIGS, {"kind": "lru", "d_state": 4}], ids=lambda c: c["kind"])
@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_change_of_a_parameter_is_heard(config: dict, change: Callable[[Mixer], object], mode: Callable) -> None:
    """Spans and steps after the change equal those of a copy, which has kept nothing."""
    mixer, x = _mixer(config), _input()
    with mode():
        before, _ = mixer(x)
        state = mixer.step(x[:, 0], mixer.initial_state(2))[1]
    change(mixer)
    fresh = copy.deepcopy(mixer)
    with mode():
        after, _ = mixer(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh(x)[0])
        got, want = (m.step(x[:, 1], state.clone())[0] for m in (mixer, fresh))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@every
@torch.no_grad()
def test_other_dtypes_are_heard(config: dict) -> None:
    mixer, x = _mixer(config), _input()
    narrow = mixer(x)[0]
    wide = mixer.double()(x.double())[0]
    assert wide.dtype == torch.float64 and torch.equal(wide, copy.deepcopy(mixer)(x.double())[0])
    assert not torch.equal(wide.float(), narrow)
    assert torch.equal(mixer.float()(x)[0], narrow)


def _count(monkeypatch: pytest.MonkeyPatch, mixer: Mixer) -> list[int]:
    made: list[int] = []
    owner = mixer.ema if hasattr(mixer, "ema") else mixer
    name = next(n for n in ("make_kernel", "_make", "_make_kernel", "_whole") if hasattr(owner, n))
    make = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: (made.append(1), make(*args))[1])
    return made


@every
def test_nothing_is_made_twice(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = _mixer(config), _input()
    made = _count(monkeypatch, mixer)
    with torch.no_grad():
        assert torch.equal(mixer(x)[0], mixer(x)[0])
    assert len(made) == 1
    with accumulating(mixer):
        for seed in range(3):
            mixer(_input(seed))[0].sum().backward()
    assert len(made) == 2
    mixer(x)[0].sum().backward()
    assert len(made) == 3  # outside of both every pass makes its own


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_gradients_are_those_of_separate_passes(config: dict, checkpointing: bool) -> None:
    mixer = _mixer(config).double()
    plain = copy.deepcopy(mixer)

    def run(m: Mixer, seed: int) -> None:
        x = _input(seed).double()[:, : 16 - 4 * (seed % 2)]  # two lengths
        y = checkpoint(lambda u: m(u)[0], x, use_reentrant=False) if checkpointing else m(x)[0]
        y.square().sum().backward()

    with accumulating(nn.Sequential(mixer)):
        for seed in range(4):
            run(mixer, seed)
    for seed in range(4):
        run(plain, seed)
    for (name, p), q in zip(mixer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-12, rtol=1e-10, msg=name)


def test_a_step_inside_is_refused_and_leaves_nothing_behind() -> None:
    mixer, x = _mixer(CONFIGS[0]), _input()
    with pytest.raises(UnsupportedInput, match="before optimizer.step"), accumulating(mixer):
        mixer(x)[0].sum().backward()
        _sgd(mixer)
        mixer(x)
    with pytest.raises(UnsupportedInput, match="already at work"), accumulating(mixer), accumulating(mixer):
        pass
    mixer.zero_grad()
    mixer(x)[0].sum().backward()
    want = copy.deepcopy(mixer)
    want.zero_grad()
    want(x)[0].sum().backward()
    assert torch.equal(mixer.C.grad, want.C.grad)
