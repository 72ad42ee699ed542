"""Layers may be replaced by adapters and quantised ones: a law over every mixer, and the packages that do it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from test_mixers import D_MODEL, ROWS
from torch import Tensor, nn

from seqlib.mixers import build_mixer, looks_ahead, mixer_config

LENGTH = 9


class Packed(nn.Module):
    """A linear layer in 8 bits, kept in two packed halves: whoever reads `weight` gets the wrong shape and dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        w = layer.weight.detach()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = w.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
        self.weight = nn.Parameter((w / self.scale).round().to(torch.int8).reshape(-1, 1), requires_grad=False)
        self.bias = layer.bias

    def whole(self) -> Tensor:
        return self.weight.view(self.out_features, -1) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole().to(x.dtype), self.bias)


class Foreign(Tensor):
    """A tensor of another class, as torchao keeps its weights: no compiled op of this library may be given one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if str(func).startswith("seqlib."):
            raise AssertionError(f"{func} was given a tensor of another class")
        made = super().__torch_function__(func, types, args, kwargs)
        return made.as_subclass(Tensor) if func is F.linear else made


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, m) for name, m in list(module.named_modules()) if isinstance(m, nn.Linear))


def packed(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`module` with every linear layer in 8 bits, and the same with ordinary layers of those weights."""
    small, same = copy.deepcopy(module), copy.deepcopy(module)
    for name, layer in linears(small):
        quantised = Packed(layer)
        small.set_submodule(name, quantised)
        with torch.no_grad():
            same.get_submodule(name).weight.copy_(quantised.whole())
    return small, same


def built(row: dict) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    mixer = build_mixer(row, D_MODEL).eval()
    with torch.no_grad():
        for _, layer in linears(mixer):  # some start at zero
            layer.weight.add_(0.05 * torch.randn_like(layer.weight))
    return mixer, torch.randn(2, LENGTH, D_MODEL)


def decoded(mixer: nn.Module, x: Tensor) -> Tensor:
    state = mixer.initial_state(len(x), LENGTH)
    with torch.no_grad():
        ys = []
        for t in range(LENGTH):
            y, state = mixer.step(x[:, t], state)
            ys.append(y)
    return torch.stack(ys, 1)


def decodes(row: dict) -> bool:
    return not looks_ahead(mixer_config(row))


@pytest.mark.parametrize("row", ROWS)
def test_every_linear_layer_of_a_mixer_is_called(row: dict) -> None:
    mixer, x = built(row)
    small, same = packed(mixer)
    with torch.no_grad():
        torch.testing.assert_close(small(x)[0], same(x)[0], rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(small(x[:1, :3])[0], same(x[:1, :3])[0], rtol=2e-4, atol=2e-5)
    if decodes(row):
        torch.testing.assert_close(decoded(small, x), decoded(same, x), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("row", ROWS)
def test_no_compiled_op_reads_a_tensor_of_another_class(row: dict) -> None:
    mixer, x = built(row)
    foreign = copy.deepcopy(mixer)
    for _, layer in linears(foreign):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Foreign), requires_grad=False)
        assert type(layer.weight) is not nn.Parameter
    with torch.no_grad():
        for part in (x, x[:1, :3]):
            torch.testing.assert_close(foreign(part)[0], mixer(part)[0], rtol=2e-4, atol=2e-5)
    if decodes(row):
        torch.testing.assert_close(decoded(foreign, x), decoded(mixer, x), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("row", ROWS)
def test_adapters_of_every_linear_layer_learn_decode_and_merge(row: dict) -> None:
    mixer, x = built(row)
    mixer(x.clone().requires_grad_())[0].square().sum().backward()
    # A few options leave a projection without use; a mixer says so by the gradient of the layer itself.
    names = [name for name, layer in linears(mixer) if layer.weight.grad is not None and layer.weight.grad.any()]
    mixer.zero_grad()
    if not names:
        return
    adapted = get_peft_model(mixer, LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    inner = adapted.base_model.model
    y = inner(x)[0]
    y.square().sum().backward()
    still = [n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still
    if decodes(row):
        torch.testing.assert_close(decoded(inner, x), y.detach(), rtol=1e-3, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x)[0], y, rtol=1e-3, atol=1e-4)
