"""Bits per byte with the state carried through whole documents: no window, no token left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqlib.errors import CorpusError, UnsupportedInput
from seqlib.hf.names import CACHE, returned_cache

from .data import Tokens

__all__ = ["Bucket", "Evaluation", "evaluate", "score"]

_FIRST_BUCKET = 64
_PROBE = 512  # tokens on which a cache is held against a forward without one; past common sliding windows


@dataclass(frozen=True)
class Bucket:
    """Mean over the tokens at positions begin..end-1 of their documents."""

    begin: int
    end: int
    tokens: int
    bits_per_token: float


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text. The first token of a document is predicted from the start token and counts."""

    documents: int
    bytes: int
    tokens: int
    bits_per_byte: float
    perplexity: float
    """exp of the mean negative log-likelihood per token."""
    buckets: tuple[Bucket, ...]
    """By position in the document, edges at powers of two from 64."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate(
    model: Any,
    tokens: Tokens,
    *,
    chunk: int = 2048,
    context: int | None = None,
    max_bytes: int | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Evaluation:
    """Score documents with the state carried exactly from their first token to their last, or in parts.

        bits_per_byte = sum over tokens of -log2 p(token | everything before it in its document) / bytes of text

    Args:
        model: a causal language model of transformers whose cache continues a sequence exactly; this is checked.
        tokens: the documents.
        chunk: tokens per forward, >= 1; bounds memory and changes nothing else.
        context: tokens of a part of a document, of which the next part knows nothing but its last token; None: whole
            documents.
        max_bytes: stop after the document that reaches it; None scores every document.
        progress: called with the bytes of each document when it is done.

    Raises:
        CorpusError: there is nothing to score.
        UnsupportedInput: the model returns no cache, or one that does not continue exactly.
    """
    was_training = model.training
    model.eval()
    try:
        return _evaluate(model, tokens, chunk, context, max_bytes, progress)
    finally:
        model.train(was_training)


def _evaluate(
    model: Any,
    tokens: Tokens,
    chunk: int,
    context: int | None,
    max_bytes: int | None,
    progress: Callable[[int], None],
) -> Evaluation:
    for name, value in (("chunk", chunk), ("context", context), ("max_bytes", max_bytes)):
        if value is not None and value < 1:
            raise UnsupportedInput(f"{name} must be at least 1, got {value}")
    if len(tokens) == tokens.ndocuments:
        raise CorpusError("there are no tokens to score; give at least one document that is not empty")
    longest = int(tokens.lengths.max())
    sums = torch.zeros(int(_bucket(torch.tensor(longest))) + 1, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    ndocuments = nbytes = 0
    _check_cache(model, tokens, _PROBE if context is None else min(_PROBE, context))
    for ids, document_bytes in tokens.documents():
        parts = [ids] if context is None else [ids[at : at + context + 1] for at in range(0, len(ids) - 1, context)]
        nats = torch.cat([score(model, part, chunk=chunk) for part in parts or [ids]])
        bucket = _bucket(torch.arange(len(nats)))
        sums.index_add_(0, bucket, nats)
        counts.index_add_(0, bucket, torch.ones_like(nats))
        ndocuments, nbytes = ndocuments + 1, nbytes + document_bytes
        progress(document_bytes)
        if max_bytes is not None and nbytes >= max_bytes:
            break
    total = float(sums.sum())
    if not math.isfinite(total):
        raise UnsupportedInput("the model gives a likelihood that is NaN or infinite; its weights are damaged")
    ntokens = int(counts.sum())
    return Evaluation(
        documents=ndocuments,
        bytes=nbytes,
        tokens=ntokens,
        bits_per_byte=total / math.log(2) / nbytes,
        perplexity=math.exp(total / ntokens),
        buckets=tuple(
            Bucket(_edge(k), _edge(k + 1), int(n), float(s) / math.log(2) / int(n))
            for k, (s, n) in enumerate(zip(sums, counts))
            if n
        ),
    )


@torch.no_grad()
def score(model: Any, ids: Tensor, *, chunk: int = 2048) -> Tensor:
    """Negative log-likelihood in nats of ids[1:], each given all before it: (seqlen,) -> (seqlen - 1,) float64."""
    device = model.device
    cache: Any = None
    found = []
    for begin in range(0, len(ids) - 1, chunk):
        end = min(begin + chunk, len(ids) - 1)
        out = model(input_ids=ids[None, begin:end].to(device), **{CACHE: cache}, use_cache=True)
        cache = returned_cache(out)
        if cache is None and end < len(ids) - 1:
            raise UnsupportedInput(_no_cache(model))
        targets = ids[begin + 1 : end + 1].to(device)
        found.append(torch.nn.functional.cross_entropy(out.logits[0].float(), targets, reduction="none").double().cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _check_cache(model: Any, tokens: Tokens, probe: int) -> None:
    """Refuse a model whose cache does not continue a sequence exactly, instead of reporting a wrong number."""
    longest = int(tokens.lengths.argmax())
    begin, length = int(tokens.starts[longest]), min(int(tokens.lengths[longest]), probe + 1)
    ids = torch.from_numpy(tokens.span(begin, begin + length))
    if length < 3:
        return
    whole, carried = score(model, ids, chunk=length), score(model, ids, chunk=length // 2 - length // 8)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.3
    worst = float((whole - carried).abs().max())
    if not worst <= tolerance:
        raise UnsupportedInput(
            f"the cache of {type(model).__name__} does not continue a sequence exactly: with it a token costs up to "
            f"{worst:.3g} nats more or less than without; load the model with seqlib.from_pretrained"
        )


def _no_cache(model: Any) -> str:
    return f"{type(model).__name__} returns no cache, so its state cannot be carried; use a model with a cache"


def _bucket(position: Tensor) -> Tensor:
    """0 for positions below 64, then one more for each doubling."""
    return torch.floor(
        torch.log2((position // _FIRST_BUCKET).clamp(min=1).double()) + (position >= _FIRST_BUCKET)
    ).long()


def _edge(bucket: int) -> int:
    return 0 if bucket == 0 else _FIRST_BUCKET << (bucket - 1)
