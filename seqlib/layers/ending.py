"""How mixers with a matrix state end: what is read from the state is normed, gated and projected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from seqlib.dispatch import preferred
from seqlib.layers.binding import bound, fusable
from seqlib.ops.matrix_step import bind
from seqlib.ops.matrix_step.torch_impl import finish, read

__all__ = ["NormLinear", "RatioLinear"]


class NormLinear(NamedTuple):
    """linear(rms_norm(y) * weight * activation(gate)) of y (..., nheads, headdim).

    weight: (headdim,), or (nheads * headdim,) with a group_size; None for a norm without.
    gate: (..., nheads * headdim) in the dtype of y, or None.
    activation: "silu", "sigmoid" or "none".
    group_size: features with a norm of their own, counted over all heads together; None is each head.
    """

    linear: nn.Linear
    weight: Tensor | None
    gate: Tensor | None = None
    activation: str = "silu"
    group_size: int | None = None
    eps: float = 1e-6

    def __call__(self, y: Tensor) -> Tensor:
        linear, weight, gate, activation, group_size, eps = self
        return finish(y, linear, "rms", weight, gate, activation, group_size or 0, eps)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        *,
        beta: Tensor | None = None,
        scale: float = 1.0,
        unit: bool = False,
        config: str = "auto",
    ) -> Tensor:
        """The end of one token: `ops.matrix_step`, of linear attention or with beta of the delta rule.

        With `unit`, every head of q and k is brought to length 1 first. `config` is the backend that the mixer pins.
        """
        linear, weight, gate, activation, group_size, eps = self
        options = (scale, unit, "rms", weight, gate, activation, group_size or 0, eps)
        return _step(linear, (q, k, v, beta, log_decay, state), options, config)


class RatioLinear(NamedTuple):
    """linear(y[..., :-1] / (y[..., -1:] + eps)) of y (..., nheads, headdim + 1): values over what they were weighed by.

    The last column comes of a column of ones beside v. Without eps there is none, and nothing is divided. `dtype` is
    that of what linear is given.
    """

    linear: nn.Linear
    eps: float | None
    dtype: Any

    def __call__(self, y: Tensor) -> Tensor:
        return finish(y, self._cast, *self._norm())

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        *,
        config: str = "auto",
    ) -> Tensor:
        """As `NormLinear.step`, of v (batch, nheads, headdim) without the column of ones."""
        return _step(self.linear, (q, k, v, None, log_decay, state), (1.0, False, *self._norm()), config)

    def _norm(self) -> tuple[Any, ...]:
        """Norm, weight, gate, activation, group_size and eps."""
        return ("none" if self.eps is None else "ratio", None, None, "none", 0, self.eps or 0.0)

    def _cast(self, y: Tensor) -> Tensor:
        return self.linear(y.to(self.dtype))


def _step(linear: nn.Linear, tensors: tuple[Any, ...], options: tuple[Any, ...], config: str) -> Tensor:
    """`matrix_step` with the weights of `linear`, or with its calls where somebody wants them."""
    scale, unit, norm, _, gate, *_ = options
    v = tensors[2]

    def in_calls(*given: Any) -> Tensor:
        dtype = given[2].dtype
        return finish(read(*given[:9]), lambda y: linear(y.to(dtype)), *given[8:])

    def make() -> Callable[..., Tensor]:
        if not fusable(linear, on=v):
            return in_calls
        end = (linear.weight, linear.bias)
        run = bind(*tensors, *options, *end, backend=preferred("matrix_step", config=config))
        return lambda *given: run(*given, *end)

    return bound((linear, norm, unit, scale), make, *tensors, gate)(*tensors, *options)
