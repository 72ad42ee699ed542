"""What mixers have in common that read whole documents at once: projections, padding, packing, and the causal form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.layers.init import linear_
from seqlib.layers.linear import Linear, stored
from seqlib.mixers.base import Mixer, MixerConfig, positive
from seqlib.mixers.lti import NoState, refuse_state
from seqlib.mixers.matrix import divide
from seqlib.ops.attention.torch_impl import softmax_attention as fused_attention
from seqlib.sequence import SequenceInfo, State

__all__ = ["HeadsConfig", "PastInputs", "WholeHeads", "WholeMixer", "softmax_attention"]


@dataclass
class PastInputs(State):
    """All inputs of the document so far, for mixers that have no smaller state.

    inputs: (batch, capacity, d_model), the first `length` of each row in use; length: (batch,) int64.
    """

    inputs: Tensor
    length: Tensor


C = TypeVar("C", bound=MixerConfig)


class WholeMixer(Mixer[C]):
    """A mixer given by what it does to whole documents without padding, `mix`.

    Documents of one length are cut out of the batch and mixed together, so padding and neighbours cannot be seen by any
    mechanism, whatever it sorts, averages or transforms; the price is one call per different length. Mixers whose
    config says `causal` may also go on from a state, which is all inputs so far and is read again.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "bidirectional"})
    layer_type: ClassVar[str] = "full_attention"

    def mix(self, x: Tensor) -> Tensor:
        """(ndocs, n, d_model) -> the same: documents of one length, nothing else."""
        raise NotImplementedError

    @property
    def causal(self) -> bool:
        return getattr(self.config, "causal", False)

    def forward(self, x: Tensor, state: Any = None, seq: SequenceInfo | None = None) -> tuple[Tensor, Any]:
        self.check(x, seq)
        if not self.causal:
            refuse_state(self.config, state)
            return self._each_document(x, seq), NoState()
        seen = 0 if state is None else state.inputs.shape[1]
        if state is not None:
            x, seq = _after(state, x, seq)
        y = self._each_document(x, seq)[:, seen:]
        return y, _past(x, seq)

    def _each_document(self, x: Tensor, seq: SequenceInfo | None) -> Tensor:
        if seq is None or seq.shape is None:
            return self.mix(x)
        flat = x.flatten(0, 1)
        y = torch.zeros_like(flat)
        for index in _documents(seq, x.device):
            y = y.index_copy(0, index.flatten(), self.mix(flat[index]).flatten(0, 1).to(y.dtype))
        return y.unflatten(0, x.shape[:2])

    def step(self, x: Tensor, state: PastInputs) -> tuple[Tensor, PastInputs]:
        if not self.causal:
            raise UnsupportedInput(f"{self.config.kind} reads in both directions and cannot decode token by token")
        y, state = self.forward(x[:, None], state)
        return y[:, 0], state

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PastInputs:
        if not self.causal:
            raise UnsupportedInput(f"{self.config.kind} reads in both directions: it has no state and cannot decode")
        like = stored(self, self)
        device = device or like.device
        return PastInputs(
            torch.zeros(batch, max_seqlen or 0, self.d_model, dtype=dtype or like.dtype, device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
        )

    def state_bytes(self, batch: int, seqlen: int) -> int:
        if not self.causal:
            return 0
        return batch * (seqlen * self.d_model * stored(self, self).element_size() + torch.long.itemsize)


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(MixerConfig):
    """Hyperparameters of every whole-document mixer with queries, keys and values."""

    nheads: int = 8
    bias: bool = False

    def __post_init__(self) -> None:
        positive(self, "nheads")


H = TypeVar("H", bound=HeadsConfig)


class WholeHeads(WholeMixer[H]):
    """Projections around `attend`, which sees heads of whole documents."""

    projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: H, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.headdim = divide(config.kind, "d_model", d_model, "nheads", config.nheads)
        for name in (*self.projections, "o_proj"):
            self.add_module(name, Linear(d_model, d_model, bias=config.bias))

    def reset_parameters(self) -> None:
        for name in self.projections:
            linear_(self.get_submodule(name))  # type: ignore[arg-type]
        linear_(self.get_submodule("o_proj"), self.residual_scale)  # type: ignore[arg-type]

    def mix(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.heads(x)), x)

    def attend(self, *heads: Tensor) -> Tensor:
        """(ndocs, n, nheads, headdim) per projection -> one of that shape."""
        raise NotImplementedError

    def heads(self, x: Tensor) -> list[Tensor]:
        """One (..., nheads, headdim) per projection."""
        return [self.get_submodule(name)(x).unflatten(-1, (-1, self.headdim)) for name in self.projections]

    def out(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads y of inputs like x through the last projection."""
        return self.get_submodule("o_proj")(y.flatten(-2).to(x.dtype))


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v for q (b, n, h, p), k and v (b, m, h, p); mask (n, m) or (b, 1, n, m), True where seen."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return fused_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _documents(seq: SequenceInfo, device: torch.device) -> Iterator[Tensor]:
    """Flat indices (ndocs, n) of the real tokens of the documents of one length n, length by length."""
    like = seq.starts if seq.starts is not None else seq.padding_mask
    assert like is not None
    real = torch.ones_like(like) if seq.padding_mask is None else seq.padding_mask
    number = torch.zeros_like(like, dtype=torch.long) if seq.document_ids is None else seq.document_ids
    rows = torch.arange(like.shape[0], device=device)[:, None] * (like.shape[1] + 1)
    token = real.flatten().nonzero()[:, 0]
    _, count = torch.unique_consecutive((number + rows).flatten()[token], return_counts=True)
    first = count.cumsum(0) - count
    for n in count.unique().tolist():
        yield token[first[count == n, None] + torch.arange(n, device=device)]


def _after(state: PastInputs, x: Tensor, seq: SequenceInfo | None) -> tuple[Tensor, SequenceInfo]:
    """The past and the span as one, the free places of the past as padding."""
    batch, capacity = state.inputs.shape[:2]
    kept = torch.arange(capacity, device=x.device) < state.length[:, None]
    real, starts = torch.ones(batch, x.shape[1], dtype=torch.bool, device=x.device), None
    if seq is not None and seq.padding_mask is not None:
        real = seq.padding_mask
    if seq is not None and seq.starts is not None:
        starts = F.pad(seq.starts, (capacity, 0))
    joined = torch.cat([state.inputs.to(x.dtype), x], 1)
    return joined, SequenceInfo(starts, torch.cat([kept, real], 1))


def _past(x: Tensor, seq: SequenceInfo | None) -> PastInputs:
    """The inputs of the last document of every row, moved to the front."""
    if seq is None or seq.shape is None:
        return PastInputs(x, torch.full((x.shape[0],), x.shape[1], device=x.device))
    last = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if seq.padding_mask is not None:
        last = seq.padding_mask
    if seq.document_ids is not None:
        last = last & (seq.document_ids == seq.document_ids[:, -1:])
    length = last.sum(1)
    order = torch.argsort(~last, dim=1, stable=True)[:, : int(length.max())]
    moved = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    used = torch.arange(order.shape[1], device=x.device) < length[:, None]
    return PastInputs(moved.masked_fill(~used[..., None], 0), length)
