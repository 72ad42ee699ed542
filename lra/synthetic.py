"""Synthetic tasks of recall and state tracking: pure functions of a seed and sizes, vectorised over examples.

Each returns `Batch(ids, targets)`, both (n, seqlen) int64. **Targets are not shifted**: targets[b, t] is what a model
that has read ids[b, :t + 1] should answer, -100 where it is not asked. `for_causal_lm` turns them into labels for a
model that shifts labels itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqlib.errors import ConfigError

__all__ = [
    "Batch", "copying", "flip_flop", "for_causal_lm", "induction", "key_value", "mqar", "needle", "parity", "passkey",
    "selective_copying",
]  # fmt: skip

IGNORE = -100
_ROWS = 1 << 22  # random numbers held at a time where distinct symbols are drawn from a large vocabulary


class Batch(NamedTuple):
    """Inputs and unshifted targets, (n, seqlen) int64 each."""

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]


def for_causal_lm(batch: Batch) -> dict[str, Tensor]:
    """`input_ids` and `labels` for a causal language model, which scores position t against labels[:, t + 1].

    labels[:, t + 1] = targets[:, t]. Where the last position is asked, one token (0) is appended to carry its label;
    the model is causal, so the token is never seen by a position that is scored.
    """
    ids, targets = (torch.from_numpy(a) for a in batch)
    if bool((targets[:, -1] != IGNORE).any()):
        ids = torch.nn.functional.pad(ids, (0, 1))
        targets = torch.nn.functional.pad(targets, (0, 1), value=IGNORE)
    labels = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=IGNORE)
    return {"input_ids": ids, "labels": labels}


def mqar(
    seed: int,
    n: int,
    seqlen: int,
    *,
    pairs: int,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_filler: bool = True,
) -> Batch:
    """Multi-query associative recall: `pairs` keys with their values, then each key once more, its value to be named.

    Keys are distinct in 1 .. vocab_size / 2 - 1, values distinct in vocab_size / 2 .. vocab_size - 1. After the context
    k1 v1 .. kK vK, key i stands at 2 K + 2 g_i, where the K distinct gaps g < (seqlen - 2 K) / 2 are drawn without
    replacement with p(g) proportional to (g + 1)^(power - 1): with a small power most queries follow closely.

    Args:
        seqlen: even, at least 4 * pairs, below vocab_size.
        random_filler: positions in between hold uniform random tokens; otherwise 0.

    Source: HazyResearch/zoology, zoology/data/multiquery_ar.py (Arora et al. 2023, arXiv 2312.04927). There the filler
    comes from a generator that the seed does not reach; here it does.
    """
    _need(seqlen % 2 == 0 and pairs >= 1, f"mqar takes an even seqlen and at least one pair, got {seqlen} and {pairs}")
    _need(
        4 * pairs <= seqlen < vocab_size,
        f"mqar needs 4 * pairs <= seqlen < vocab_size, got {pairs=} {seqlen=} {vocab_size=}",
    )
    rng = np.random.default_rng([seed, 0])
    half = vocab_size // 2
    keys = 1 + _distinct(rng, n, half - 1, pairs)
    values = half + _distinct(rng, n, vocab_size - half, pairs)
    context, space = 2 * pairs, (seqlen - 2 * pairs) // 2
    log_p = (power - 1) * np.log(np.arange(1, space + 1))
    gaps = _distinct(rng, n, space, pairs, log_p)
    ids = rng.integers(0, vocab_size, (n, seqlen)) if random_filler else np.zeros((n, seqlen), np.int64)
    targets = np.full((n, seqlen), IGNORE)
    ids[:, :context:2], ids[:, 1:context:2] = keys, values
    np.put_along_axis(ids, context + 2 * gaps, keys, 1)
    np.put_along_axis(targets, context + 2 * gaps, values, 1)
    return Batch(ids, targets)


def selective_copying(seed: int, n: int, seqlen: int, *, tokens: int = 16, vocab_size: int = 16) -> Batch:
    """Copy `tokens` symbols that stand scattered among blanks, in order, at the markers that end the sequence.

    Blank 0, symbols 1 .. vocab_size - 2, marker vocab_size - 1; the last `tokens` positions are markers.

    Source: Gu & Dao 2023 (arXiv 2312.00752), appendix E.1; layout of state-spaces/s4, dataloaders/datasets/copying.py.
    """
    return _copying(seed, n, seqlen, tokens, vocab_size, scattered=True)


def copying(seed: int, n: int, seqlen: int, *, tokens: int = 16, vocab_size: int = 16, hold: int = 1) -> Batch:
    """As `selective_copying`, the symbols all at the beginning; each of them, and its marker, stands `hold` times.

    Symbols that are held can be told from a long distance by kernels that see it coarsely.
    """
    part = tokens * hold
    _need(hold >= 1, f"copying needs hold >= 1, got {hold=}")
    _need(seqlen >= 2 * part, f"copying needs seqlen >= 2 * tokens * hold, got {seqlen=} {tokens=} {hold=}")
    short = _copying(seed, n, 2 * tokens, tokens, vocab_size, scattered=False)
    ids, targets = np.zeros((n, seqlen), np.int64), np.full((n, seqlen), IGNORE)
    for long, a in zip((ids, targets), short):
        held = a.repeat(hold, 1)
        long[:, :part], long[:, seqlen - part :] = held[:, :part], held[:, part:]
    return Batch(ids, targets)


def induction(seed: int, n: int, seqlen: int, *, vocab_size: int = 16) -> Batch:
    """Name the symbol that followed the trigger when the trigger comes again, as the last token.

    Symbols 0 .. vocab_size - 1, trigger vocab_size; the first trigger stands anywhere before position seqlen - 2.

    Source: Gu & Dao 2023 (arXiv 2312.00752), appendix E.1.
    """
    _need(
        seqlen >= 3 and vocab_size >= 2, f"induction needs seqlen >= 3 and vocab_size >= 2, got {seqlen=} {vocab_size=}"
    )
    rng = np.random.default_rng([seed, 2])
    ids = rng.integers(0, vocab_size, (n, seqlen))
    at, rows = rng.integers(0, seqlen - 2, n), np.arange(n)
    ids[rows, at] = ids[:, -1] = vocab_size
    targets = np.full((n, seqlen), IGNORE)
    targets[:, -1] = ids[rows, at + 1]
    return Batch(ids, targets)


def key_value(seed: int, n: int, seqlen: int, *, pairs: int, vocab_size: int = 256) -> Batch:
    """Pairs of key and value scattered in a stream of filler 0; the last token asks for one key.

    Keys are distinct in 1 .. vocab_size / 2 - 1, values any of vocab_size / 2 .. vocab_size - 1.

    Args:
        seqlen: at least 2 * pairs + 1.
    """
    half = vocab_size // 2
    _need(1 <= pairs < half, f"key_value needs 1 <= pairs < vocab_size / 2, got {pairs=} {vocab_size=}")
    _need(seqlen >= 2 * pairs + 1, f"key_value needs seqlen >= 2 * pairs + 1, got {seqlen=} {pairs=}")
    rng = np.random.default_rng([seed, 3])
    keys = 1 + _distinct(rng, n, half - 1, pairs)
    values = rng.integers(half, vocab_size, (n, pairs))
    ids = np.zeros((n, seqlen), np.int64)
    slots = 2 * _distinct(rng, n, (seqlen - 1) // 2, pairs)
    np.put_along_axis(ids, slots, keys, 1)
    np.put_along_axis(ids, slots + 1, values, 1)
    asked, rows = rng.integers(0, pairs, n), np.arange(n)
    ids[:, -1] = keys[rows, asked]
    targets = np.full((n, seqlen), IGNORE)
    targets[:, -1] = values[rows, asked]
    return Batch(ids, targets)


def passkey(
    seed: int, n: int, seqlen: int, *, digits: int = 5, vocab_size: int = 32, depth: float | None = None
) -> Batch:
    """A number after a mark somewhere in noise; at the end a second mark asks for it, digit by digit.

    Digits 0-9, mark 10, question 11, noise 12 .. vocab_size - 1. The digits stand after the question as well, so each
    is predicted from the ones before it; greedy decoding finds the number exactly where all of them are right.

    Args:
        depth: place of the mark, 0 at the beginning to 1 right before the question; None draws it for every example.
    """
    _need(vocab_size > 12, f"passkey needs vocab_size > 12, got {vocab_size}")
    free = seqlen - 2 * digits - 1  # places of the mark
    _need(digits >= 1 and free >= 1, f"passkey needs seqlen >= 2 * digits + 2, got {seqlen=} {digits=}")
    rng = np.random.default_rng([seed, 4])
    ids = rng.integers(12, vocab_size, (n, seqlen))
    number = rng.integers(0, 10, (n, digits))
    at = _places(rng, n, free, depth)
    ids[np.arange(n), at] = 10
    np.put_along_axis(ids, at[:, None] + 1 + np.arange(digits), number, 1)
    ids[:, -digits - 1] = 11
    ids[:, -digits:] = number
    targets = np.full((n, seqlen), IGNORE)
    targets[:, -digits - 1 : -1] = number
    return Batch(ids, targets)


_FILLER = (
    b"The road runs along the river. ", b"A cart is standing in the yard. ", b"Rain fell in the hills at noon. ",
    b"Nobody has opened the north gate. ", b"Two lamps are burning in the hall. ", b"The clerk went home before dark. ",
)  # fmt: skip
_NAMES = (b"anchor", b"barley", b"copper", b"dragon", b"ember", b"falcon", b"garnet", b"harbor")


def needle(
    seed: int, n: int, seqlen: int, *, digits: int = 5, distractors: int = 0, depth: float | None = None
) -> Batch:
    """A sentence with a number hidden in English text over bytes, asked for at the end; ids are bytes.

    "The code of ember is 48213." stands between filler sentences, with `distractors` more codes of other names; the
    text ends with "The code of ember is " and the number, which is predicted digit by digit.

    Source: the form of the task as in RULER (Hsieh et al. 2024, arXiv 2404.06654), single and multi-key needles.
    """
    _need(
        0 <= distractors < len(_NAMES),
        f"needle has {len(_NAMES)} names, so distractors < {len(_NAMES)}, got {distractors}",
    )
    rng = np.random.default_rng([seed, 5])
    ids, targets = np.zeros((n, seqlen), np.int64), np.full((n, seqlen), IGNORE)
    for row in range(n):
        names = [_NAMES[i] for i in rng.permutation(len(_NAMES))[: distractors + 1]]
        numbers = [b"%d" % rng.integers(10 ** (digits - 1), 10**digits) for _ in names]
        facts = [b"The code of %b is %b. " % pair for pair in zip(names, numbers)]
        question = b"The code of %b is %b" % (names[0], numbers[0])
        room = seqlen - len(question) - sum(map(len, facts))
        _need(room >= 0, f"needle with {distractors} distractors and {digits} digits does not fit seqlen={seqlen}")
        sentences = [_FILLER[i] for i in rng.integers(0, len(_FILLER), room // min(map(len, _FILLER)) + 1)]
        ends = np.cumsum([len(s) for s in sentences])
        sentences = sentences[: int((ends <= room).sum())]
        first = _places(rng, 1, len(sentences) + 1, depth)[0]
        places = [first, *rng.integers(0, len(sentences) + 1, distractors)]
        for place, fact in sorted(zip(places, facts), reverse=True):
            sentences.insert(int(place), fact)
        body = b"".join(sentences)
        ids[row] = np.frombuffer((b" " * (seqlen - len(body) - len(question))) + body + question, np.uint8)
        targets[row, -digits - 1 : -1] = ids[row, -digits:]
    return Batch(ids, targets)


def flip_flop(seed: int, n: int, seqlen: int, *, ignore: float = 0.8) -> Batch:
    """A one-bit memory: "write b", "ignore b" and "read" instructions; every read asks for the bit written last.

    Tokens: bits 0 and 1, write 2, read 3, ignore 4. The first instruction writes and the last reads; in between
    ignoring has probability `ignore`, writing and reading share the rest. The bit of an ignore is random, that of a
    read correct.

    Args:
        seqlen: even, at least 4.

    Source: Liu et al. 2023, "Exposing attention glitches with flip-flop language modeling" (arXiv 2306.00946),
    section 3.
    """
    _need(seqlen >= 4 and seqlen % 2 == 0, f"flip_flop needs an even seqlen >= 4, got {seqlen}")
    _need(0 <= ignore < 1, f"flip_flop: ignore must be in [0, 1), got {ignore}")
    rng = np.random.default_rng([seed, 6])
    steps = seqlen // 2
    write, read = (1 - ignore) / 2, (1 - ignore) / 2
    what = rng.choice(np.array([2, 3, 4]), (n, steps), p=[write, read, ignore])
    what[:, 0], what[:, -1] = 2, 3
    bits = rng.integers(0, 2, (n, steps))
    written = np.maximum.accumulate(np.where(what == 2, np.arange(steps), 0), 1)
    bits = np.where(what == 3, np.take_along_axis(bits, written, 1), bits)
    ids, targets = np.empty((n, seqlen), np.int64), np.full((n, seqlen), IGNORE)
    ids[:, ::2], ids[:, 1::2] = what, bits
    targets[:, ::2] = np.where(what == 3, bits, IGNORE)
    return Batch(ids, targets)


def parity(seed: int, n: int, seqlen: int, *, every: bool = True) -> Batch:
    """Whether the number of ones so far is odd, at every position, or at the last only."""
    _need(seqlen >= 1, f"parity needs seqlen >= 1, got {seqlen}")
    ids = np.random.default_rng([seed, 7]).integers(0, 2, (n, seqlen))
    targets = ids.cumsum(1) % 2
    if not every:
        targets[:, :-1] = IGNORE
    return Batch(ids, targets)


def _copying(seed: int, n: int, seqlen: int, tokens: int, vocab_size: int, *, scattered: bool) -> Batch:
    space = seqlen - tokens
    _need(tokens >= 1 and space >= tokens, f"copying needs seqlen >= 2 * tokens, got {seqlen=} {tokens=}")
    _need(vocab_size >= 4, f"copying needs vocab_size >= 4 (blank, marker and two symbols), got {vocab_size}")
    rng = np.random.default_rng([seed, 1])
    symbols = rng.integers(1, vocab_size - 1, (n, tokens))
    where = (
        np.sort(_distinct(rng, n, space, tokens), 1) if scattered else np.broadcast_to(np.arange(tokens), (n, tokens))
    )
    ids, targets = np.zeros((n, seqlen), np.int64), np.full((n, seqlen), IGNORE)
    np.put_along_axis(ids, where, symbols, 1)
    ids[:, space:], targets[:, space:] = vocab_size - 1, symbols
    return Batch(ids, targets)


def _distinct(
    rng: np.random.Generator, n: int, size: int, count: int, log_p: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """(n, count) distinct numbers below `size` in each row, in the order of drawing without replacement.

    The `count` largest of log p + Gumbel noise are a draw without replacement, largest first; one pass over n * size
    random numbers replaces n loops.
    """
    made = np.empty((n, count), np.int64)
    step = max(1, _ROWS // size)
    for begin in range(0, n, step):
        noise = rng.random((min(step, n - begin), size))
        if log_p is not None:
            noise = log_p - np.log(-np.log1p(-noise) + np.finfo(np.float64).tiny)
        top = np.argpartition(noise, size - count, axis=1)[:, size - count :] if count < size else (
            np.broadcast_to(np.arange(size), noise.shape)
        )  # fmt: skip
        order = np.argsort(-np.take_along_axis(noise, top, 1), 1)
        made[begin : begin + len(noise)] = np.take_along_axis(top, order, 1)
    return made


def _places(rng: np.random.Generator, n: int, count: int, depth: float | None) -> NDArray[np.int64]:
    """One of `count` places per row: drawn, or the one at `depth` of the way."""
    if depth is None:
        return rng.integers(0, count, n)
    _need(0 <= depth <= 1, f"depth must be between 0 and 1, got {depth}")
    return np.full(n, round(depth * (count - 1)))


def _need(right: bool, message: str) -> None:
    if not right:
        raise ConfigError(message)
