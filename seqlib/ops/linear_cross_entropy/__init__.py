"""Cross entropy of a linear map: the loss of a language model without all of its logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import TRANSFORMED, Facts, Impl, Op
from seqlib.errors import UnsupportedInput

__all__ = ["IMPLS", "OP", "linear_cross_entropy"]

_HERE = "seqlib.ops.linear_cross_entropy"
IMPLS = (
    Impl(
        "triton",
        "chunked",
        f"{_HERE}.triton_impl:linear_cross_entropy",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("triton>=3.6",),
        gate=f"{_HERE}.triton_impl:gate",
    ),
    Impl("torch", "chunked", f"{_HERE}.torch_impl:linear_cross_entropy", refuses=frozenset({TRANSFORMED})),
    Impl("reference", "reference", f"{_HERE}.reference:linear_cross_entropy"),
)


def facts(x: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> Facts:
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return Facts(x.device.type, weight.dtype, x.shape[0], needs_grad)


OP = Op("linear_cross_entropy", IMPLS, facts, "linear_cross_entropy")


@undisturbed
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    divisor: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of x weight^T with the targets, in nats.

        loss = sum_t -log softmax(z_t)[targets_t] / divisor,   z = scale * x weight^T, or softcap * tanh(z / softcap)

    Logits exist for some rows at a time, and their gradients are taken on the spot: memory is O(d * vocab_size), not
    O(rows * vocab_size). Losses are computed in float32 (float64 for float64) from logits in the dtype of weight.

    Args:
        x: (rows, d); multiplied in the dtype of weight.
        weight: (vocab_size, d).
        targets: (rows,) int64; `ignore_index` marks rows that are not scored.
        divisor: a scalar; None is the number of scored rows.

    Returns:
        A float32 scalar (float64 for float64 inputs). NaN if nothing is scored and divisor is None, as in torch.

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or tuple(targets.shape) != (x.shape[0],):
        raise UnsupportedInput(
            f"x (rows, d), weight (vocab_size, d) and targets (rows,) do not fit: got {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if not x.device == weight.device == targets.device:
        raise UnsupportedInput(f"tensors must be on one device, got {x.device}, {weight.device}, {targets.device}")
    if divisor is None:
        divisor = (targets != ignore_index).sum()
    run = OP.choose(facts(x, weight, targets), form, backend)
    return run(x, weight, targets, divisor=divisor, ignore_index=ignore_index, scale=scale, softcap=softcap)
