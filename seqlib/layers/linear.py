"""Linear layers that read their weight at full speed when there are only a few rows to multiply.

The rule for everything above: a layer that is an `nn.Linear` or an `nn.Embedding` may be replaced by an adapter or a
quantised layer at any time, so it is called, and its weight is not looked at. Parameters that are read are bare, or
in a module that is neither (`Affine`, `ShortConv`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqlib.context import counted
from seqlib.errors import UnsupportedInput
from seqlib.ops.fused import is_plain
from seqlib.ops.linear import FEW_ROWS, few_rows
from seqlib.ops.linear.torch_impl import product

__all__ = ["Affine", "Linear", "ordinary", "stored", "takes_few_rows"]


def takes_few_rows(layer: nn.Linear, x: Tensor) -> bool:
    """Whether `ops.linear.few_rows` may run in the layer's place: up to FEW_ROWS rows, no gradient, no autocast."""
    few = (
        counted(x.numel()) <= FEW_ROWS * layer.in_features and x.dtype == layer.weight.dtype and is_plain(layer.weight)
    )
    return few and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


class Linear(nn.Linear):
    """`nn.Linear`, taking `ops.linear` for up to FEW_ROWS rows where no gradient is recorded: the case of decoding.

    Of more rows the product is torch's, in 16 bits by way of float32 where the CPU has no 16-bit products.

    It is an `nn.Linear` in every other respect, so PEFT and checkpoints see nothing new. Quantisers that look for
    `nn.Linear` itself, subclasses left out, find it after `ordinary`; `quantize_dynamic` would pass over it in silence.

    Raises:
        UnsupportedInput: `qconfig` is set, as the functions of torch.ao.quantization do.
    """

    @property
    def qconfig(self) -> None:
        """For torch.ao.quantization, which writes it."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        raise UnsupportedInput(
            "torch.ao.quantization converts layers whose type is torch.nn.Linear, and this one is a subclass of it; "
            "call seqlib.layers.linear.ordinary(model) first, which makes all of them torch.nn.Linear"
        )

    def forward(self, x: Tensor) -> Tensor:
        return (few_rows if takes_few_rows(self, x) else product)(x, self.weight, self.bias)


class Affine(nn.Module):
    """Weight (d_out, d_in) and bias of a map that is read, not called: adapters and quantisers pass over it."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


def ordinary(model: nn.Module) -> nn.Module:
    """`model`, with every `Linear` in it made an `nn.Linear`: the same results, without the gain for few rows.

    For quantisers that look for that type and no other, as torch.ao.quantization and bitsandbytes do.
    """
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model


def stored(layer: nn.Module, owner: nn.Module) -> Tensor:
    """A tensor whose dtype and device are those of what `layer` of `owner` makes, whatever has replaced the layer.

    The first parameter of the layer, then of the owner, in a dtype that is computed in; quantised ones are passed over.
    """
    held = [*layer.parameters(), *owner.parameters(), *owner.buffers()]
    for tensor in held:
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return tensor
    return torch.empty(0, device=held[0].device if held else None)
