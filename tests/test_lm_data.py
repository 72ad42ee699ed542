"""Text for language models: corpora, tokens, packed rows, and the n-gram model that a trained one is held against."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from seqlib.errors import ConfigError, CorpusError
from seqlib.hf import ByteTokenizer
from seqlib.lm.corpus import SPLITS, Document, read_corpus, stdlib_corpus
from seqlib.lm.data import PackedRows, Tokens, tokenize
from seqlib.lm.ngram import NGram

WORDS = ["state", "space", "models", "carry", "a", "through", "documents", "and", "forget", "it", "at", "their", "end"]


def _documents(*texts: bytes) -> list[Document]:
    return [Document.of(str(i), text) for i, text in enumerate(texts)]


def _tokens(path: Path, *texts: bytes) -> Tokens:
    return tokenize(_documents(*texts), ByteTokenizer(), path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files."""
    folder = tmp_path_factory.mktemp("text")
    choose = random.Random(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(choose.choices(WORDS, k=250)))
    return folder


# Corpora


def test_splits_are_disjoint_complete_and_repeatable(text: Path) -> None:
    first, again, other = (read_corpus([text], seed=seed, held_out=0.1) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    names = [d.name for split in SPLITS for d in first.split(split)]
    assert all(first.split(split) for split in SPLITS)
    parts = Counter(b"".join(d.read() for split in SPLITS for d in first.split(split)))
    assert parts == Counter(b"".join(p.read_bytes() for p in text.iterdir())), "no byte is lost or doubled"
    assert len(names) == len(set(names))


def test_one_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Zeile {i}: schön\n" for i in range(2000)))
    corpus = read_corpus([path], held_out=0.1)
    pieces = [corpus.split(split)[0].read() for split in ("train", "test", "validation")]
    assert sorted(b"".join(pieces)) == sorted(path.read_bytes())
    assert all(piece.endswith(b"\n") and piece.startswith(b"Zeile") for piece in pieces)
    assert 0.08 < len(pieces[1]) / path.stat().st_size < 0.12


def test_binary_empty_hidden_and_double_files_are_left_out(tmp_path: Path, text: Path) -> None:
    for i, path in enumerate(sorted(text.iterdir())):
        (tmp_path / f"{i}.txt").write_bytes(path.read_bytes())
    (tmp_path / "nul").write_bytes(b"text\0text")
    (tmp_path / "noise").write_bytes(bytes(range(128, 256)) * 20)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "copy.txt").write_bytes((tmp_path / "3.txt").read_bytes())
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / "latin1.txt").write_bytes("Käse und Brot und Wein und Fisch\n".encode("latin-1"))
    corpus = read_corpus([tmp_path])
    reasons = dict(corpus.skipped)
    assert set(reasons) == {"nul", "noise", "empty.txt", "copy.txt"} or set(reasons) == {
        "nul",
        "noise",
        "empty.txt",
        "3.txt",
    }
    assert "NUL" in reasons["nul"] and "UTF-8" in reasons["noise"] and reasons["empty.txt"] == "empty"
    every = b"".join(d.read() for split in SPLITS for d in corpus.split(split))
    assert b"secret" not in every and "Käse".encode("latin-1") in every


@pytest.mark.parametrize("content", [{}, {"a.txt": b""}, {"a": b"\0\1", "b": b"\0"}, {"a.txt": b"x"}])
def test_a_corpus_without_text_is_refused(tmp_path: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match="found no text|too few"):
        read_corpus([tmp_path])


def test_data_sets_keep_their_splits(tmp_path: Path) -> None:
    import datasets

    def table(*rows: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": list(rows), "label": [0] * len(rows)})

    saved = datasets.DatasetDict(
        {"train": table("eins", "", "zwei"), "validation": table("drei"), "test": table("vier")}
    )
    saved.save_to_disk(tmp_path / "set")
    corpus = read_corpus([tmp_path / "set"])
    found = {split: [d.read() for d in corpus.split(split)] for split in SPLITS}
    assert found == {"train": [b"eins", b"zwei"], "validation": [b"drei"], "test": [b"vier"]}
    saved.pop("validation")
    saved.save_to_disk(tmp_path / "two")
    corpus = read_corpus([tmp_path / "two"], held_out=0.4)
    assert corpus.validation and [d.read() for d in corpus.test] == [b"vier"]
    assert sorted(b"".join(d.read() for d in corpus.train + corpus.validation)) == sorted(b"einszwei")
    with pytest.raises(CorpusError, match="--column"):
        read_corpus([tmp_path / "set"], column="label")


def test_a_document_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one line\n" * 100)
    corpus = read_corpus([path])
    path.write_text("two line\n" * 100)
    with pytest.raises(CorpusError, match="changed"):
        corpus.train[0].read()


def test_the_standard_library_is_a_corpus() -> None:
    corpus = stdlib_corpus(train_bytes=300_000, held_out_bytes=40_000)
    digests = [d.digest for split in SPLITS for d in corpus.split(split)]
    assert len(digests) == len(set(digests))
    assert 200_000 < corpus.nbytes("train") <= 300_000 and 20_000 < corpus.nbytes("test") <= 40_000
    assert not any({"test", "tests", "site-packages"} & set(Path(d.name).parts) for d in corpus.train)
    assert corpus.digest == stdlib_corpus(train_bytes=300_000, held_out_bytes=40_000).digest
    assert corpus.digest != stdlib_corpus(seed=1, train_bytes=300_000, held_out_bytes=40_000).digest


# Tokens and packing


def test_tokens_are_cached_once_and_hold_every_byte(tmp_path: Path) -> None:
    texts = [bytes([i % 256]) * (i + 1) for i in range(600)]  # more than one record batch
    tokens = _tokens(tmp_path, *texts)
    assert [bytes(ids[1:].tolist()) for ids, _ in tokens.documents()] == texts
    assert {int(ids[0]) for ids, _ in tokens.documents()} == {ByteTokenizer().bos_token_id}
    assert tokens.bytes_per_token == 1.0 and int(tokens.nbytes.sum()) == sum(map(len, texts))
    (cache,) = tmp_path.iterdir()
    written = cache.stat().st_mtime_ns
    _tokens(tmp_path, *texts)
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [written]
    _tokens(tmp_path, *texts[:-1])
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_cache_leaves_nothing(tmp_path: Path) -> None:
    good, bad = Document.of("good", b"good"), Document("bad", "0" * 64, 3, lambda: b"bad")
    with pytest.raises(CorpusError, match="changed"):
        tokenize([good, bad], ByteTokenizer(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_packing_predicts_each_byte_once_and_no_start(tmp_path: Path) -> None:
    texts = [os.urandom(n) for n in (1, 2, 30, 7, 100, 63, 64, 65, 500)]
    rows = PackedRows(_tokens(tmp_path, *texts), 64)
    predicted = torch.cat([row["labels"][1:][row["labels"][1:] != -100] for row in rows])
    laid_out = b"".join(texts)
    assert bytes(predicted.tolist()) == laid_out[: len(predicted)]
    assert len(laid_out) - len(predicted) < 64
    for row in rows:
        start = row["input_ids"] == ByteTokenizer().bos_token_id
        assert bool((row["labels"][start] == -100).all()) and bool((row["position_ids"][start] == 0).all())
        assert bool(((row["position_ids"].diff() == 1) | start[1:]).all())


def test_too_little_text_for_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="lower seqlen"):
        PackedRows(_tokens(tmp_path, b"short"), 64)


# n-grams


def _kneser_ney(order: int, texts: list[bytes], context: tuple[int, ...], byte: int, d: float, a: float) -> float:
    """The recursion of `NGram`, word by word."""
    grams: Counter[tuple[int, ...]] = Counter()
    for document in texts:
        symbols = (256,) * (order - 1) + tuple(document)
        grams.update(symbols[i : i + order] for i in range(len(document)))
    for _ in range(order - 1 - len(context)):
        grams = Counter(gram[1:] for gram in grams)
    followers = {gram[-1]: n for gram, n in grams.items() if gram[:-1] == context}
    lower = _kneser_ney(order, texts, context[1:], byte, d, a) if context else 1 / 256
    if not followers:
        return lower
    mass = (d * len(followers) + a) * lower
    return (max(followers.get(byte, 0) - d, 0) + mass) / (sum(followers.values()) + a)


def test_ngram_follows_its_definition() -> None:
    texts, document = [b"abracadabra", b"abba", b"barbara"], b"abrazz"
    model = NGram(3).fit(texts)
    symbols = (256, 256, *document)
    expected = [_kneser_ney(3, texts, symbols[i : i + 2], byte, 0.7, 1.0) for i, byte in enumerate(document)]
    assert model.bits_per_byte([document]) == pytest.approx(-np.log2(expected).mean(), abs=1e-12)


@pytest.mark.parametrize("order", [1, 4, 7])
def test_ngram_is_a_distribution_after_tuning(order: int) -> None:
    texts = [p.encode() for p in ("the cat sat on the mat", "the dog sat on the log", "a cat and a dog")]
    model = NGram(order).fit(texts[:2]).tune(texts[2:])
    for context in (b"", b"the c", b"zzzzzzzz"):
        before = model.bits_per_byte([context]) * len(context) if context else 0.0
        p = [2 ** (before - model.bits_per_byte([context + bytes([b])]) * (len(context) + 1)) for b in range(256)]
        assert sum(p) == pytest.approx(1, abs=1e-9)


def test_ngram_tuning_helps_and_more_context_helps(text: Path) -> None:
    *train, validation, test = [p.read_bytes() for p in sorted(text.iterdir())]
    plain = NGram(4).fit(train).bits_per_byte([validation])
    bits = [NGram(order).fit(train).tune([validation]).bits_per_byte([test]) for order in (1, 2, 4)]
    assert NGram(4).fit(train).tune([validation]).bits_per_byte([validation]) < plain
    assert bits[0] > bits[1] > bits[2]
    with pytest.raises(ConfigError, match="1 to 7"):
        NGram(8)
    with pytest.raises(CorpusError, match="no bytes"):
        NGram(2).fit([b""])
