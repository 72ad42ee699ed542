"""Rotation of pairs of features of a few tokens by the compiled kernel: what torch does in a dozen calls."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native

__all__ = ["rotate"]

native.load("cpu")
_step = torch.ops.seqlib.rotary_step.default


def rotate(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, *, pairs: str) -> tuple[Tensor, Tensor]:
    turned, other = _step([q, k], positions.contiguous(), theta.contiguous(), pairs == "neighbours")
    return turned, other


@torch.library.register_fake("seqlib::rotary_step")
def _fake(heads: list[Tensor], positions: Tensor, frequencies: Tensor, interleaved: bool) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in heads]
