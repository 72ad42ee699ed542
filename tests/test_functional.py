"""Every mixer under torch.func: called with other parameters, per-sample gradients, forward mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_mixers import D_MODEL, ROWS
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from seqlib.mixers import Mixer, build_mixer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script. is deprecated", "ignore:There is a performance drop"
)
every = pytest.mark.parametrize("config", ROWS)


def made(config: dict[str, Any]) -> tuple[Mixer, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    mixer = build_mixer(config, D_MODEL).eval()
    x = torch.randn(3, 9, D_MODEL, generator=torch.Generator().manual_seed(1))
    return mixer, {name: p.detach() for name, p in mixer.named_parameters() if p.requires_grad}, x


def loss(mixer: Mixer, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(mixer, parameters, (x,))[0].square().sum()


def plain(mixer: Mixer, x: Tensor) -> dict[str, Tensor]:
    """Gradients of one call by the usual way."""
    mixer.zero_grad()
    if x.requires_grad or any(p.requires_grad for p in mixer.parameters()):
        mixer(x)[0].square().sum().backward()
    return {n: p.grad.clone() for n, p in mixer.named_parameters() if p.grad is not None}


@every
def test_other_parameters_are_taken(config: dict) -> None:
    mixer, _, x = made(config)
    torch.manual_seed(5)
    other = build_mixer(config, D_MODEL).eval()
    with torch.no_grad():
        mixer(x)  # whatever is remembered is remembered now
        got = functional_call(mixer, dict(other.named_parameters()) | dict(other.named_buffers()), (x,))[0]
        torch.testing.assert_close(got, other(x)[0])


@every
def test_gradients_by_sample(config: dict) -> None:
    mixer, parameters, x = made(config)
    got = vmap(grad(lambda p, row: loss(mixer, p, row[None])), (None, 0))(parameters, x)
    for i in range(len(x)):
        for name, want in plain(mixer, x[i : i + 1]).items():
            bound = 2e-4 * max(1.0, float(want.abs().max()))
            torch.testing.assert_close(got[name][i], want, atol=bound, rtol=1e-3, msg=f"{name} of sample {i}")


@every
def test_forward_mode(config: dict) -> None:
    """Along a direction of all parameters and inputs; the slope is the product with the gradient."""
    mixer, parameters, x = made(config)
    g = torch.Generator().manual_seed(2)
    along = {n: torch.randn(p.shape, generator=g) * 0.1 for n, p in parameters.items()}
    toward = torch.randn(x.shape, generator=g)
    _, slope = jvp(lambda p, x: loss(mixer, p, x), (parameters, x), (along, toward))
    leaf = x.clone().requires_grad_()
    want = plain(mixer, leaf)
    assert leaf.grad is not None or not mixer.reads_input
    expected = sum(((want[n] * along[n]).sum() for n in along), torch.zeros(()))
    expected = expected + (0 if leaf.grad is None else (leaf.grad * toward).sum())
    torch.testing.assert_close(slope, expected, rtol=2e-3, atol=2e-3 * max(1.0, float(expected.detach().abs())))
