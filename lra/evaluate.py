"""Scores with their uncertainty, and whether they depend on how examples are batched or padded."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqlib.errors import UnsupportedInput

from .store import Examples
from .synthetic import IGNORE, Batch

__all__ = ["Score", "collate", "invariance", "peak_memory", "score_examples", "score_recall", "wilson"]

_TOKENS = 1 << 16  # per forward
_SAME = 1e-3  # largest difference of logits that rounding may cause between two ways of batching


@dataclass(frozen=True)
class Score:
    """Accuracy on n examples (or answers) and what goes with it."""

    accuracy: float
    n: int
    interval: tuple[float, float]
    """95 % by Wilson."""
    per_class: dict[str, float] = field(default_factory=dict)
    examples_per_s: float = 0.0
    tokens_per_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share, which stays inside 0 .. 1 and is honest near its ends.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    >>> wilson(1200, 2000)
    (0.5783, 0.6213)
    """
    if n < 1:
        return 0.0, 1.0
    p, zz = right / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def collate(examples: Examples, index: NDArray[Any], pad: int | None, extra: int = 0) -> dict[str, Tensor]:
    """A batch of examples as a model takes it: right-padded ids, a mask where there is padding, labels.

    Args:
        pad: id at padding; None for tasks whose sequences all have one length.
        extra: positions of padding beyond the longest sequence.
    """
    width = examples.width
    at = (np.asarray(index)[:, None] * width + np.arange(width)).ravel()
    lengths = (examples.offsets[at + 1] - examples.offsets[at]).astype(np.int64)
    seqlen = int(lengths.max()) + extra
    ids = np.full((len(at), seqlen), pad or 0, np.int64)
    for row, (begin, length) in enumerate(zip(examples.offsets[at], lengths)):
        ids[row, :length] = examples.tokens[begin : begin + length]
    batch = {"input_ids": torch.from_numpy(ids)}
    if int(lengths.min()) < seqlen:
        if pad is None:
            raise UnsupportedInput("sequences of different lengths need a padding id")
        batch["attention_mask"] = torch.from_numpy(np.arange(seqlen) < lengths[:, None]).long()
    if width > 1:
        batch = {name: tensor.unflatten(0, (-1, width)) for name, tensor in batch.items()}
    return batch | {"labels": torch.from_numpy(examples.labels[index].astype(np.int64))}


def batches(examples: Examples, tokens: int) -> Iterator[NDArray[Any]]:
    """Indices in batches of about `tokens` padded tokens, long examples together."""
    longest = examples.lengths.max(1)
    order = np.argsort(-longest, kind="stable")
    begin = 0
    while begin < len(order):
        size = max(1, int(tokens // (longest[order[begin]] * examples.width)))
        yield order[begin : begin + size]
        begin += size


@torch.no_grad()
def logits_of(model: Any, examples: Examples, index: NDArray[Any], pad: int | None, extra: int = 0) -> Tensor:
    batch = collate(examples, index, pad, extra)
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    if "attention_mask" not in inputs:  # said outright, so that no id is taken for padding by its value
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if examples.width == 1:
        return model(**inputs, use_cache=False).logits.float().cpu()
    return model(**inputs).logits.float().cpu()


def score_examples(model: Any, examples: Examples, pad: int | None, *, tokens: int = _TOKENS) -> Score:
    """Accuracy of a classifier."""
    was_training = model.training
    model.eval()
    found = np.zeros(len(examples), np.int64)
    begun = time.perf_counter()
    for index in batches(examples, tokens):
        found[index] = logits_of(model, examples, index, pad).argmax(-1).numpy()
    seconds = time.perf_counter() - begun
    model.train(was_training)
    right = found == examples.labels
    classes = {str(c): round(float(right[examples.labels == c].mean()), 4) for c in np.unique(examples.labels)}
    return Score(
        float(right.mean()), len(right), wilson(int(right.sum()), len(right)), classes,
        round(len(right) / seconds, 2), round(float(examples.lengths.sum()) / seconds, 1),
    )  # fmt: skip


@torch.no_grad()
def score_recall(model: Any, batch: Batch, *, tokens: int = _TOKENS) -> dict[str, Score]:
    """Accuracy of a causal language model by answer and by example (all answers of it right)."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    size = max(1, tokens // batch.ids.shape[1])
    right, asked = np.zeros(batch.ids.shape, bool), batch.targets != IGNORE
    begun = time.perf_counter()
    for begin in range(0, len(batch.ids), size):
        rows = slice(begin, begin + size)
        hidden = model.model(torch.from_numpy(batch.ids[rows]).to(device), use_cache=False).last_hidden_state
        where = torch.from_numpy(asked[rows]).to(device)
        answers = model.lm_head(hidden[where]).argmax(-1).cpu().numpy()  # logits only where something is asked
        part = np.zeros(asked[rows].shape, bool)
        part[asked[rows]] = answers == batch.targets[rows][asked[rows]]
        right[rows] = part
    seconds = time.perf_counter() - begun
    model.train(was_training)
    n = int(asked.sum())
    whole = (right | ~asked).all(1)
    speed = round(len(whole) / seconds, 2), round(batch.ids.size / seconds, 1)
    return {
        "answers": Score(float(right.sum() / n), n, wilson(int(right.sum()), n), {}, *speed),
        "examples": Score(float(whole.mean()), len(whole), wilson(int(whole.sum()), len(whole)), {}, *speed),
    }


def invariance(model: Any, examples: Examples, pad: int | None, *, n: int = 16) -> dict[str, Any]:
    """Whether the answer to an example depends on its company: alone, in a batch of n, and with more padding.

    Returns:
        largest differences of logits by `batch` and `padding`, and `holds`, whether both are rounding only.
    """
    model.eval()
    some = examples.take(np.linspace(0, len(examples) - 1, min(n, len(examples))).astype(np.int64))
    everyone = np.arange(len(some))
    together = logits_of(model, some, everyone, pad)
    alone = torch.cat([logits_of(model, some, everyone[i : i + 1], pad) for i in everyone])
    found: dict[str, Any] = {"batch": float((together - alone).abs().max())}
    if pad is not None:
        found["padding"] = float((together - logits_of(model, some, everyone, pad, extra=37)).abs().max())
    return found | {"holds": all(value < _SAME for value in found.values())}


def peak_memory() -> dict[str, int]:
    """Bytes: the process at its largest, and the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found


def gains(accuracy: float, baselines: Mapping[str, float]) -> dict[str, float]:
    """How far a score is above each trivial answer, in points."""
    return {name: round(100 * (accuracy - value), 2) for name, value in baselines.items()}
