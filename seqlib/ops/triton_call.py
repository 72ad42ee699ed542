"""A call of a chunked op with a matrix state: its tensors, its sizes, and what every kernel is told about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from seqlib.ops import triton_common as common

__all__ = ["BLOCK_BYTES", "Call", "contiguous_rows", "cut", "float_state", "like_decay", "sum_groups"]

BLOCK_BYTES = 1 << 30  # states of chunks that exist at one time, forward and backward ones each

C = TypeVar("C", bound="Call")


class Call:
    """One call or, from `part`, a block of it. Subclasses find the plan and launch.

    Args:
        gates: tensors by token beside q, k and v; the first is log_decay or None.
        ids: (batch, seqlen) number of the document of each token, 0 being that of the incoming state; None: one.
        before: the same of the token before each.
    """

    plan: Any

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor | None, ...],
        ids: Tensor | None,
        scale: float,
        before: Tensor | None = None,
    ) -> None:
        self.q, self.k, self.v = (contiguous_rows(t) for t in (q, k, v))
        g = gates[0]
        self.kind = "none" if g is None else {1: "head", 3: "token", 4: "channel"}[g.dim()]
        self.g = contiguous_rows(g) if g is not None and self.kind == "channel" else g
        self.gates = (self.g, *gates[1:])
        if ids is not None and before is None:
            ids = ids.int()
            before = torch.nn.functional.pad(ids[:, :-1], (1, 0))
        self.ids, self.before, self.scale = ids, before, scale
        self.batch, self.seqlen, self.nheads = v.shape[:3]
        self.headdim, self.d_state = int(v.shape[3]), int(k.shape[3])  # plans are for known ones, also while tracing
        self.products = common.products(v.dtype)
        self.find_plan((self.kind, v.dtype, self.d_state, self.headdim, common.capability(v.device)))
        self.nchunks = triton.cdiv(self.seqlen, self.plan.chunk)

    def find_plan(self, about: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def block(self) -> int:
        """Tokens that are worked on at a time, so that states of chunks take bounded memory."""
        per_chunk = self.batch * self.nheads * self.d_state * self.headdim * self.products.stored.itemsize
        return self.plan.chunk * max(1, BLOCK_BYTES // per_chunk)

    def blocks(self) -> Iterator[tuple[int, int]]:
        length = self.block()
        for begin in range(0, self.seqlen, length):
            yield begin, min(begin + length, self.seqlen)

    def part(self: C, begin: int, end: int) -> C:
        q, k, v = (t[:, begin:end] for t in (self.q, self.k, self.v))
        gates = tuple(t if t is None or t.dim() == 1 else t[:, begin:end] for t in self.gates)
        return type(self)(q, k, v, gates, cut(self.ids, begin, end), self.scale, cut(self.before, begin, end))

    def tokens(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for something of every token and value head."""
        return torch.empty(self.batch, self.seqlen, self.nheads, width, dtype=dtype, device=self.v.device)

    def states(self, dtype: torch.dtype = torch.float32, count: int = 1) -> Tensor:
        """Room for `count` states of every head."""
        shape = (self.batch, self.nheads, *([count] if count > 1 else []), self.d_state, self.headdim)
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def shared(self, t: Tensor) -> int:
        """How many value heads share a head of t."""
        return self.nheads // t.shape[2]

    def gradient_of(self, t: Tensor) -> Tensor:
        """Room for the gradient of q or k, for every value head; shared ones are summed in float32."""
        return self.tokens(t.shape[3], t.dtype if self.shared(t) == 1 else torch.float32)

    def gate_strides(self) -> tuple[int, ...]:
        """Of log_decay by batch, token and head, and of the document numbers by batch."""
        constant = (0, 0, self.g.stride(0)) if self.g is not None and self.g.dim() == 1 else None
        return *(constant or common.leading(self.g)), self.ids.stride(0) if self.ids is not None else 0

    def constants(self, width: int, height: int, warps: int, stages: int, *, fine: bool = True) -> dict[str, Any]:
        """What every kernel is compiled for; `fine` for those that multiply by decays per channel."""
        made: dict[str, Any] = {
            "N": self.d_state,
            "P": self.headdim,
            "BN": width,
            "BP": height,
            "C": self.plan.chunk,
            "KIND": self.kind,
            "PACKED": self.ids is not None,
            "DOT": self.products.dot,
            "PRECISION": self.products.precision,
            "num_warps": warps,
            "num_stages": stages,
        }
        if fine:
            made |= {"FINE": self.products.fine, "FINE_PRECISION": self.products.fine_precision}
        return made


def contiguous_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def cut(t: Tensor | None, begin: int, end: int) -> Any:
    return None if t is None else t[:, begin:end]


def float_state(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.float().contiguous()


def sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of heads that several value heads share."""
    if grad.shape[2] != like.shape[2]:
        grad = grad.unflatten(2, (like.shape[2], -1)).sum(3)
    return grad.to(like.dtype)


def like_decay(grad: Tensor | None, log_decay: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of log_decay from that of each token and tile; empty where there is none."""
    if grad is None or log_decay is None:
        return like.new_empty(0)
    if log_decay.dim() < 4:
        grad = grad.sum(-1)
    return (grad.sum((0, 1)) if log_decay.dim() == 1 else grad).to(log_decay.dtype)
