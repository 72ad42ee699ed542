"""Where text comes from: tables, packed files, splits by any name, what is passed over, and what was trained on."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from pathlib import Path

import datasets
import pytest
from families import MAMBA, port, save
from rich.console import Console

from seqlib.errors import ConfigError, CorpusError
from seqlib.hf import ByteTokenizer
from seqlib.lm import cli
from seqlib.lm import train as training
from seqlib.lm.corpus import SPLITS, read_corpus, read_documents
from seqlib.lm.data import tokenize
from seqlib.lm.documents import Document
from seqlib.lm.recipes import tiny
from seqlib.lm.runs import DataSpec, trained_on
from seqlib.lm.sweep import run_sweep

TEXTS = [f"text number {i}, " * (3 + i) for i in range(20)]
QUIET = Console(quiet=True)
WORDS = ["some", "words", "that", "are", "not", "many"]


def lines(key: str = "text", **more: str) -> bytes:
    return "".join(json.dumps({key: text, **more}) + "\n" for text in TEXTS).encode()


def contents(folder: Path | str, **options) -> set[str]:
    corpus = read_corpus([folder], held_out=0.2, **options)
    return {document.read().decode() for split in SPLITS for document in corpus.split(split)}


FILES = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "a.JSONL": lambda path: path.write_bytes(lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.parquet": lambda path: datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(path),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_tables_are_read_row_by_row(name: str, inside: bool, tmp_path: Path) -> None:
    """Given as files or found in folders; the raw bytes of a table are never text."""
    FILES[name](tmp_path / name)
    assert contents(tmp_path if inside else tmp_path / name) == set(TEXTS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_column_is_the_one_that_was_named(name: str, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"body": TEXTS, "title": ["t"] * len(TEXTS)})
    data = lines("body", title="t")
    if name.endswith("parquet"):
        table.to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert contents(tmp_path / name, column="body") == set(TEXTS)
    with pytest.raises((CorpusError, ConfigError), match="--column, one of: body, title"):
        read_corpus([tmp_path / name])
    (tmp_path / "plain.txt").write_text("some text\n" * 50)
    assert any(file == name and "--column" in why for file, why in read_corpus([tmp_path]).skipped), "told in folders"
    with pytest.raises((CorpusError, ConfigError), match=r"--column|no text in 'nope'"):
        read_corpus([tmp_path / name], column="nope")
    with pytest.raises(ConfigError, match="there are none"):
        read_corpus([tmp_path / "plain.txt"], column="body")


def test_packed_text_is_unpacked_and_damaged_files_are_told(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "half.txt.gz").write_bytes(gzip.compress(os.urandom(999))[:500])
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(lines())[:100])
    (tmp_path / "noise.parquet").write_bytes(b"PAR1 noise")
    rows = [b'{"text": "good"}', b"no json", b"[3]", b'{"text": 3}', b'{"text": ""}', b'{"text": "\\ud800"}', b""]
    (tmp_path / "some.jsonl").write_bytes(b"\n".join(rows))
    told = dict(read_corpus([tmp_path], held_out=0.2).skipped)
    assert {"half.txt.gz", "half.jsonl.gz", "noise.parquet"} <= told.keys()
    assert {f"some.jsonl:{row}" for row in (2, 3, 4, 5)} <= told.keys()
    assert {*TEXTS, "good", "?"} == contents(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_folders_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    assert any(name == "closed" for name, _ in read_corpus([tmp_path]).skipped)


def test_an_error_of_a_folder_is_told(tmp_path: Path, monkeypatch) -> None:
    """The same for root, who reads everything."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    scan = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert ("closed", "Permission denied (a folder)") in read_corpus([tmp_path]).skipped


def test_links_pipes_and_names_that_are_no_utf8(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "sub" / "b.txt").write_text("elsewhere")
    folder = tmp_path / "in"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    (folder / "linked").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "file.txt").symlink_to(outside / "sub" / "b.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("a name of Latin-1")
    corpus = read_corpus([folder], held_out=0.2)
    told = dict(corpus.skipped)
    assert all("link to a folder" in told[name] for name in ("linked", "loop"))
    assert told["pipe.txt"] == "no regular file" and "No such file" in told["gone.txt"]
    assert contents(folder) == {*TEXTS, "elsewhere", "a name of Latin-1"}
    assert corpus.digest == read_corpus([folder], held_out=0.2).digest


SPLIT_NAMES = {
    "validation": ["validation", "valid", "val", "dev", "Validation", "dev_clean", "validation_matched", "eval"],
    "test": ["test", "Test", "test_other", "held_out", "heldout", "testing"],
    "train": ["train", "training", "train_clean"],
}


@pytest.mark.parametrize("ours, theirs", [(ours, name) for ours, names in SPLIT_NAMES.items() for name in names])
def test_splits_count_by_their_names(ours: str, theirs: str, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({theirs: table, "unsupervised": table}).save_to_disk(tmp_path / "set")
    if ours == "train":
        corpus = read_corpus([tmp_path / "set"], held_out=0.2)
        assert corpus.train and corpus.validation and corpus.test
        assert {d.read().decode() for s in SPLITS for d in corpus.split(s)} == set(TEXTS)
    else:
        (tmp_path / "more.txt").write_text("\n".join(f"line {i}" for i in range(500)))
        corpus = read_corpus([tmp_path / "set", tmp_path / "more.txt"], held_out=0.2)
        assert {d.read().decode() for d in corpus.split(ours)} == set(TEXTS)
    assert any("unsupervised" in name for name, _ in corpus.skipped)


def test_no_text_stands_in_two_splits(tmp_path: Path) -> None:
    """What is held out stays as it is; copies leave the training text, also those that came without a split."""
    a, b, c, d = ("a" * 40, "b" * 40, "c" * 40, "d" * 40)
    tables = {"train": [a, b, c, d], "validation": [b, c], "test": [c, c]}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in tables.items()}).save_to_disk(
        tmp_path / "s"
    )
    (tmp_path / "copy.txt").write_text(c)
    corpus = read_corpus([tmp_path / "s", tmp_path / "copy.txt"])
    found = {split: [x.read().decode() for x in corpus.split(split)] for split in SPLITS}
    assert found == {"train": [a, d], "validation": [b], "test": [c, c]}
    assert len(corpus.skipped) == 4


def test_a_cut_token_cache_is_made_again(tmp_path: Path) -> None:
    """At every length, a boundary between two record batches among them."""
    texts = [bytes([i % 251]) * (i % 40 + 1) for i in range(900)]
    documents = [Document.of(str(i), text) for i, text in enumerate(texts)]
    expected = [ids.tolist() for ids, _ in tokenize(documents, ByteTokenizer(), tmp_path).documents()]
    (cache,) = tmp_path.iterdir()
    whole = cache.read_bytes()
    batch = len(whole) // 4
    for length in sorted({1, 100, *range(0, len(whole), batch // 8), *(len(whole) - i for i in (1, 8, 9))}):
        cache.write_bytes(whole[:length])
        tokens = tokenize(documents, ByteTokenizer(), tmp_path)
        assert tokens.ndocuments == 900 and [ids.tolist() for ids, _ in tokens.documents()] == expected, length
        assert len(list(tmp_path.iterdir())) == 1
        if length < len(whole) - 8:
            assert cache.read_bytes() == whole, length


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[training.Run, Path]:
    folder, choose = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(25):
        (folder / f"{i}.txt").write_text(" ".join(choose.choices(WORDS, k=60)))
    data = DataSpec.of([str(folder)])
    run = training.train(tiny(), data, folder.parent / f"{folder.name}-run", console=QUIET)
    return run, folder


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["seqlib-lm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out + said.err


@pytest.mark.parametrize("named", ["folder", "model"])
def test_training_documents_are_not_scored_as_held_out(named, trained, monkeypatch, capsys, tmp_path: Path) -> None:
    run, folder = trained
    model = run.folder if named == "folder" else run.model
    corpus = run.corpus()
    code, said = call(monkeypatch, capsys, "evaluate", model, folder, "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and f"left out {len(corpus.train)} of 25 documents: trained on them" in said
    assert found["documents"] == 25 - len(corpus.train)
    assert found["bytes"] == corpus.nbytes("test") + corpus.nbytes("validation")
    code, said = call(monkeypatch, capsys, "evaluate", model, folder, "--split", "test", "--seed", 5)
    assert code == 2 or "left out" in said, "another split of the same text"
    code, said = call(monkeypatch, capsys, "evaluate", model, folder, "--split", "train")
    assert code == 0 and "left out" not in said
    seen = tmp_path / "seen"
    seen.mkdir()
    (seen / "renamed.txt").write_bytes(corpus.train[0].read())
    code, said = call(monkeypatch, capsys, "evaluate", model, seen)
    assert code == 2 and "was trained on all 1 documents" in said


def test_a_document_of_which_a_part_was_trained_on_counts_as_trained(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {i} of a book\n" for i in range(400)))
    data = DataSpec.of([str(tmp_path / "book.txt")])
    run = training.train(tiny(), data, tmp_path / "run", console=QUIET)
    (whole,) = read_documents([tmp_path / "book.txt"])[0]
    assert trained_on(str(run.folder)) == {whole.digest[:16]}


def test_evaluate_says_what_it_passed_over_and_takes_a_tokenizer(trained, monkeypatch, capsys, tmp_path: Path) -> None:
    run, _ = trained
    for name, data in {"a.txt": b"new text", "b.bin": b"\0\1", "c.txt": b""}.items():
        (tmp_path / name).write_bytes(data)
    weights = tmp_path / "weights"
    save(port("mamba", **MAMBA, vocab_size=259, pad_token_id=256, bos_token_id=257, eos_token_id=258), weights)
    code, said = call(monkeypatch, capsys, "evaluate", weights, tmp_path / "a.txt")
    assert code == 2 and "name one with --tokenizer" in said
    code, said = call(monkeypatch, capsys, "evaluate", weights, tmp_path, "--suffix", ".txt", "--suffix", ".bin",
                      "--tokenizer", run.model)  # fmt: skip
    assert code == 0 and "skipped 2 (b.bin: binary" in said and "1 documents, 8 bytes" in said


def test_a_sweep_never_shows_rows_of_other_text_or_another_recipe(tmp_path: Path) -> None:
    from seqlib.hf.runs import override

    texts = []
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(12):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i} " * 60)
        texts.append(DataSpec.of([str(tmp_path / name)]))
    recipe = override(tiny(), ["steps=2", "layer_pattern=m", "mlp.d_mlp=256", "eval_every=0"])
    options = {"mixers": ["mamba"], "console": QUIET}
    made = run_sweep(tmp_path / "sweep", recipe, data=texts[0], max_bytes=500, **options)
    assert run_sweep(tmp_path / "sweep", recipe, data=texts[0], max_bytes=500, **options) == made
    with pytest.raises(ConfigError, match="another text"):
        run_sweep(tmp_path / "sweep", recipe, data=texts[1], max_bytes=500, **options)
    with pytest.raises(ConfigError, match="another recipe"):
        run_sweep(tmp_path / "sweep", override(recipe, ["steps=3"]), data=texts[0], max_bytes=500, **options)
    more = run_sweep(tmp_path / "sweep", recipe, data=texts[0], max_bytes=900, **options)
    assert more["sweep"][0]["max_bytes"] == 900 and made["sweep"][0]["max_bytes"] == 500, "scored again"


@pytest.mark.parametrize(
    "command",
    [
        "evaluate NAME TEXT",
        "generate NAME --prompt a",
        "train TEXT --from NAME --output r",
        "train TEXT --recipe tiny --set tokenizer=NAME --output r",
        "train NAME --output r",
        "generate RUN --prompt a --tokenizer NAME",
        "evaluate RUN NEW --tokenizer NAME",
    ],
)
@pytest.mark.parametrize("name", ["my_modle", "nobody-at-all/nothing", "a b", "./gone", "../x", "a/b/c", "x" * 300])
def test_mistyped_names_fail_at_once(command: str, name: str, trained, monkeypatch, capsys, tmp_path: Path) -> None:
    """The Hub is asked once, and not at all for what cannot be a name there."""
    import time

    from huggingface_hub import HfApi

    asked = []

    def unknown(self, repo_id, **options):
        asked.append(options["timeout"])
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "repo_info", unknown)
    monkeypatch.chdir(tmp_path)
    run, folder = trained
    (tmp_path / "new.txt").write_text("new text")
    given = {"NAME": name, "TEXT": str(folder), "RUN": str(run.folder), "NEW": "new.txt"}
    words = [word.replace("NAME", name) if "=" in word else given.get(word, word) for word in command.split()]
    begun = time.perf_counter()
    code, said = call(monkeypatch, capsys, *words)
    assert code == 2 and time.perf_counter() - begun < 2 and len(asked) <= 1
    assert said.count("error: ") == 1 and name[:60] in said and not (tmp_path / "r").exists()
