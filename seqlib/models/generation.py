"""Prefill, step and sample: the generation loop, which knows a backbone's `forward` and `step` and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.models.backbone import Backbone
from seqlib.sequence import SequenceInfo, StateList

__all__ = ["generate", "greedy", "prefill", "sampler", "step"]


class _Model(Protocol):
    """What generation needs of a language model."""

    @property
    def embed_tokens(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def backbone(self) -> Backbone: ...
    @property
    def lm_head(self) -> Callable[[Tensor], Tensor]: ...


@torch.no_grad()
def prefill(
    model: _Model,
    ids: Tensor,
    state: StateList | None = None,
    *,
    seq: SequenceInfo | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, StateList]:
    """Read a prompt (batch, seqlen): logits after its last real token (batch, vocab_size), and the state.

    `max_seqlen`, prompt and continuation together, lets key-value caches be allocated once.
    """
    x = model.embed_tokens(ids)
    if state is None and max_seqlen is not None:
        state = model.backbone.initial_state(ids.shape[0], max_seqlen, x.device, x.dtype)
    hidden, state = model.backbone(x, state, seq)
    last = hidden[:, -1]
    if seq is not None and seq.padding_mask is not None:
        index = torch.where(seq.padding_mask, torch.arange(ids.shape[1], device=ids.device), 0).amax(1)
        last = hidden[torch.arange(ids.shape[0], device=ids.device), index]
    return model.lm_head(last), state


@torch.no_grad()
def step(model: _Model, ids: Tensor, state: StateList) -> tuple[Tensor, StateList]:
    """One token per row, ids: (batch,): next logits (batch, vocab_size). Writes into `state`."""
    hidden, state = model.backbone.step(model.embed_tokens(ids), state)
    return model.lm_head(hidden), state


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row."""
    return logits.argmax(-1)


def sampler(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Callable[[Tensor], Tensor]:
    """A function that draws from softmax(logits / temperature), cut to the top_k tokens and to probability top_p."""
    if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UnsupportedInput(
            f"need temperature > 0, top_k >= 0, 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}. "
            "Use greedy for temperature 0"
        )

    def draw(logits: Tensor) -> Tensor:
        logits = logits.float() / temperature
        if top_k:
            cut = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < cut, -torch.inf)
        if top_p < 1:
            ordered, index = logits.sort(descending=True)
            mass = ordered.softmax(-1)
            beyond = mass.cumsum(-1) - mass >= top_p  # the token that crosses top_p stays
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)

    return draw


def generate(
    model: _Model,
    ids: Tensor,
    *,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor] = greedy,
    eos: int | None = None,
    seq: SequenceInfo | None = None,
) -> Iterator[Tensor]:
    """Yield one token per row (batch,) at a time, after reading the prompt ids (batch, seqlen).

    Stops after `max_new_tokens`, or once every row has drawn `eos`; a row that has goes on yielding it.
    """
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise UnsupportedInput(f"a prompt must have shape (batch, seqlen >= 1), got {tuple(ids.shape)}")
    logits, state = prefill(model, ids, seq=seq, max_seqlen=ids.shape[1] + max_new_tokens)
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for i in range(max_new_tokens):
        token = choose(logits)
        if eos is not None:
            token = torch.where(done, eos, token)
            done |= token == eos
        yield token
        if i + 1 == max_new_tokens or (eos is not None and bool(done.all())):
            return
        logits, state = step(model, token, state)
