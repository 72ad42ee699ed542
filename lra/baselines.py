"""Answers that need no sequence model, computed on the very data a score is measured on."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .store import Examples

__all__ = ["bag_of_tokens", "best_per_key", "majority"]

_LIMIT = 20_000  # training examples that a linear model sees; more change the third digit


def majority(train: Examples, test: Examples) -> float:
    """Accuracy of the commonest training label."""
    return float((test.labels == np.bincount(train.labels).argmax()).mean())


def best_per_key(
    train_keys: NDArray, train: NDArray, test_keys: NDArray, test: NDArray
) -> tuple[float, dict[int, int]]:
    """Accuracy of answering each key with its commonest training label, and those answers."""
    answers = {int(key): int(np.bincount(train[train_keys == key]).argmax()) for key in np.unique(train_keys)}
    default = int(np.bincount(train).argmax())
    found = np.array([answers.get(int(key), default) for key in test_keys])
    return float((found == test).mean()), answers


def bag_of_tokens(train: Examples, test: Examples, classes: int) -> float:
    """Accuracy of logistic regression on how often each token occurs (for images: on the histogram of intensities).

    For pairs the features are both histograms and their product.
    """
    if len(train) > _LIMIT:
        train = train.take(np.random.default_rng(0).permutation(len(train))[:_LIMIT])
    vocab = int(max(train.tokens.max(), test.tokens.max())) + 1
    x, y = _features(train, vocab), torch.from_numpy(train.labels.astype(np.int64))
    x_test = _features(test, vocab)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = (x - mean) / std, ((x_test - mean) / std).clamp(-10, 10)
    with torch.enable_grad(), torch.random.fork_rng():
        model = nn.Linear(x.shape[1], classes)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y) + 1e-3 * model.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        found = model(x_test).argmax(1).numpy()
    return float((found == test.labels).mean())


def _features(examples: Examples, vocab: int) -> torch.Tensor:
    nseq = len(examples) * examples.width
    counts = np.zeros((nseq, vocab), np.float32)
    lengths = np.diff(examples.offsets)
    for begin in range(0, nseq, 512):
        rows = slice(begin, min(begin + 512, nseq))
        tokens = examples.tokens[examples.offsets[rows.start] : examples.offsets[rows.stop]].astype(np.int64)
        key = np.repeat(np.arange(rows.stop - rows.start), lengths[rows]) * vocab + tokens
        counts[rows] = np.bincount(key, minlength=(rows.stop - rows.start) * vocab).reshape(-1, vocab)
    counts /= np.maximum(lengths, 1)[:, None]
    if examples.width == 1:
        return torch.from_numpy(counts)
    sides = counts.reshape(len(examples), 2, vocab)
    return torch.from_numpy(np.concatenate([sides[:, 0], sides[:, 1], sides[:, 0] * sides[:, 1]], 1))
