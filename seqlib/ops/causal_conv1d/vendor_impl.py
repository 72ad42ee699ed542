"""The causal convolution of causal-conv1d, in its channels-last layout."""

from __future__ import annotations

from torch import Tensor

from seqlib.sequence import SequenceInfo

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    from causal_conv1d import causal_conv1d_fn

    y, final = causal_conv1d_fn(
        x.transpose(1, 2),
        weight,
        bias,
        initial_states=None if initial_state is None else initial_state.transpose(1, 2),
        return_final_states=True,
        activation=activation,
    )
    return y.transpose(1, 2), final.transpose(1, 2)
