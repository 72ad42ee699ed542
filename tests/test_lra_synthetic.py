"""Synthetic tasks: layout, ranges, distributions, and labels that a causal language model scores where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seqlib.errors import ConfigError
from seqlib.hf import SeqlibConfig, SeqlibForCausalLM
from seqlib.lra import synthetic
from seqlib.lra.synthetic import Batch, for_causal_lm

MAKE = {
    "mqar": lambda s, n: synthetic.mqar(s, n, 64, pairs=8, vocab_size=128),
    "mqar zeros": lambda s, n: synthetic.mqar(s, n, 64, pairs=16, vocab_size=128, random_filler=False),
    "selective_copying": lambda s, n: synthetic.selective_copying(s, n, 48, tokens=6, vocab_size=10),
    "copying": lambda s, n: synthetic.copying(s, n, 48, tokens=6, vocab_size=10),
    "induction": lambda s, n: synthetic.induction(s, n, 32),
    "key_value": lambda s, n: synthetic.key_value(s, n, 40, pairs=5, vocab_size=32),
    "passkey": lambda s, n: synthetic.passkey(s, n, 50),
    "needle": lambda s, n: synthetic.needle(s, n, 200, distractors=2),
    "flip_flop": lambda s, n: synthetic.flip_flop(s, n, 40),
    "parity": lambda s, n: synthetic.parity(s, n, 20),
}


def answers(batch: Batch) -> list[list[tuple[int, int]]]:
    return [[(int(t), int(row[t])) for t in np.flatnonzero(row != -100)] for row in batch.targets]


@pytest.mark.parametrize("name", MAKE)
def test_a_batch_is_a_function_of_its_seed(name: str) -> None:
    first, again, other = MAKE[name](3, 5), MAKE[name](3, 5), MAKE[name](4, 5)
    assert first.ids.dtype == first.targets.dtype == np.int64
    assert np.array_equal(first.ids, again.ids) and np.array_equal(first.targets, again.targets)
    assert not np.array_equal(first.ids, other.ids)
    assert ((first.targets != -100).sum(1) >= 1).all()


@pytest.mark.parametrize("name", ["mqar", "mqar zeros"])
def test_mqar_layout(name: str) -> None:
    pairs = 8 if name == "mqar" else 16
    batch = MAKE[name](0, 200)
    keys, values = batch.ids[:, : 2 * pairs : 2], batch.ids[:, 1 : 2 * pairs : 2]
    assert keys.min() >= 1 and keys.max() <= 63 and values.min() >= 64 and values.max() <= 127
    for row, (key, value) in enumerate(zip(keys, values)):
        assert len(set(key)) == len(set(value)) == pairs
        known = dict(zip(key.tolist(), value.tolist()))
        asked = answers(batch)[row]
        assert sorted(batch.ids[row, t] for t, _ in asked) == sorted(key)
        assert all(known[int(batch.ids[row, t])] == answer and t >= 2 * pairs and t % 2 == 0 for t, answer in asked)
    if name == "mqar zeros":
        filler = batch.targets[:, 2 * pairs :] == -100
        assert (batch.ids[:, 2 * pairs :][filler] == 0).all()


def test_mqar_gaps_follow_the_power_law() -> None:
    """One pair: the gap itself is distributed as (g + 1)^(power - 1)."""
    for power in (0.01, 1.0):
        batch = synthetic.mqar(0, 20_000, 34, pairs=1, vocab_size=64, power=power)
        gaps = ((batch.targets != -100).argmax(1) - 2) // 2
        expected = np.arange(1, 17) ** (power - 1)
        expected /= expected.sum()
        found = np.bincount(gaps, minlength=16) / len(gaps)
        assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / len(gaps))


def test_keys_are_uniform() -> None:
    batch = synthetic.mqar(0, 4000, 32, pairs=8, vocab_size=64)
    counts = np.bincount(batch.ids[:, 0:16:2].ravel(), minlength=32)[1:32]
    assert np.abs(counts / counts.sum() - 1 / 31).max() < 0.005


@pytest.mark.parametrize("scattered", [True, False])
def test_copying_layout(scattered: bool) -> None:
    batch = MAKE["selective_copying" if scattered else "copying"](0, 100)
    for ids, targets in zip(batch.ids, batch.targets):
        where = np.flatnonzero(ids[:42])
        assert len(where) == 6 and (ids[42:] == 9).all()
        assert np.array_equal(ids[where], targets[42:]) and ids[where].max() <= 8
        assert scattered or np.array_equal(where, np.arange(6))
        assert (targets[:42] == -100).all()
    if scattered:
        assert len({tuple(np.flatnonzero(row[:42])) for row in batch.ids}) > 90


def test_symbols_that_are_held_are_the_same_ones() -> None:
    """Every symbol, marker and target `hold` times, blanks in between; hold 1 is the plain task."""
    plain = synthetic.copying(3, 20, 12, tokens=6, vocab_size=10)
    held = synthetic.copying(3, 20, 50, tokens=6, vocab_size=10, hold=4)
    assert np.array_equal(held.ids[:, :24], plain.ids[:, :6].repeat(4, 1))
    assert (held.ids[:, 24:26] == 0).all() and (held.targets[:, :26] == -100).all()
    assert np.array_equal(held.targets[:, 26:], held.ids[:, :24]) and (held.ids[:, 26:] == 9).all()
    with pytest.raises(ConfigError, match="hold"):
        synthetic.copying(0, 1, 47, tokens=6, hold=4)


def test_induction_layout() -> None:
    batch = MAKE["induction"](0, 500)
    first = (batch.ids == 16).argmax(1)
    assert (batch.ids[:, -1] == 16).all() and ((batch.ids == 16).sum(1) == 2).all()
    assert np.array_equal(batch.targets[:, -1], batch.ids[np.arange(500), first + 1])
    assert first.min() == 0 and first.max() == 29 and batch.targets[:, -1].max() <= 15


def test_key_value_layout() -> None:
    for ids, targets in zip(*MAKE["key_value"](0, 200)):
        known = {int(ids[t]): int(ids[t + 1]) for t in range(39) if 1 <= ids[t] < 16}
        assert len(known) == 5 and known[int(ids[-1])] == targets[-1] >= 16


@pytest.mark.parametrize("depth", [None, 0.0, 1.0])
def test_passkey_layout(depth: float | None) -> None:
    batch = synthetic.passkey(0, 100, 50, digits=4, depth=depth)
    for ids, targets in zip(*batch):
        at = int((ids == 10).argmax())
        assert (ids == 10).sum() == 1 and ids[-5] == 11
        assert np.array_equal(ids[at + 1 : at + 5], ids[-4:])
        assert np.array_equal(targets[45:49], ids[-4:]) and (np.delete(targets, range(45, 49)) == -100).all()
        assert at == {None: at, 0.0: 0, 1.0: 40}[depth]


def test_needle_is_text_with_one_answer() -> None:
    batch = MAKE["needle"](0, 30)
    for ids, targets in zip(*batch):
        text = bytes(ids.astype(np.uint8)).decode("ascii")
        asked, _, number = text[text.rindex("The code of ") :].removeprefix("The code of ").partition(" is ")
        assert text.count("The code of ") == 4 and f"The code of {asked} is {number}. " in text
        assert bytes(targets[-6:-1].astype(np.uint8)).decode() == number and (targets[:-6] == -100).all()


def test_flip_flop_reads_what_was_written() -> None:
    batch = synthetic.flip_flop(0, 300, 60, ignore=0.6)
    for ids, targets in zip(*batch):
        bit = None
        for t in range(0, 60, 2):
            if ids[t] == 2:
                bit = ids[t + 1]
            assert targets[t] == (bit if ids[t] == 3 else -100) and (ids[t] != 3 or ids[t + 1] == bit)
    inner = batch.ids[:, 2:-2:2]
    assert (batch.ids[:, 0] == 2).all() and (batch.ids[:, -2] == 3).all()
    assert abs((inner == 4).mean() - 0.6) < 0.02 and abs((inner == 2).mean() - 0.2) < 0.02


def test_parity_counts_ones() -> None:
    batch = synthetic.parity(0, 50, 20)
    assert all(batch.targets[b, t] == batch.ids[b, : t + 1].sum() % 2 for b in range(50) for t in range(20))
    last = synthetic.parity(0, 50, 20, every=False)
    assert (last.targets[:, :-1] == -100).all() and np.array_equal(last.targets[:, -1], batch.targets[:, -1])


@pytest.mark.parametrize(
    "call",
    [
        lambda: synthetic.mqar(0, 1, 33, pairs=2),
        lambda: synthetic.mqar(0, 1, 32, pairs=9),
        lambda: synthetic.mqar(0, 1, 64, pairs=2, vocab_size=64),
        lambda: synthetic.copying(0, 1, 10, tokens=6),
        lambda: synthetic.key_value(0, 1, 10, pairs=5),
        lambda: synthetic.passkey(0, 1, 8, digits=4),
        lambda: synthetic.passkey(0, 1, 80, depth=1.5),
        lambda: synthetic.needle(0, 1, 20),
        lambda: synthetic.flip_flop(0, 1, 7),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ConfigError):
        call()


@pytest.mark.parametrize("name", ["mqar", "induction", "parity", "passkey"])
def test_loss_of_a_causal_lm_is_that_of_the_unshifted_targets(name: str) -> None:
    """The model shifts labels; what it scores is targets[t] from what was read up to t, the last position included."""
    batch = MAKE[name](0, 3)
    model = SeqlibForCausalLM(SeqlibConfig(d_model=16, n_layer=1, vocab_size=128, mixer="mamba", initializer_range=0.3))
    inputs = for_causal_lm(batch)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.ids)).logits
        lean = model(**inputs, return_logits=False).loss
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
    torch.testing.assert_close(lean, expected, rtol=0, atol=1e-5)
