"""Scores are of the examples that they name: samples, caches, folders, comparisons and tables."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_lra_data import aan_folder, imdb_folder, listops_folder, mega_folder, pathfinder_folder
from typer.testing import CliRunner

from seqlib.errors import ConfigError, CorpusError
from seqlib.lra import cli, leaderboard, lists, report, seeds
from seqlib.lra.compare import compare_runs
from seqlib.lra.data import DataSource, load_data, reduced
from seqlib.lra.prepare import prepare
from seqlib.lra.protocols import PROTOCOLS
from seqlib.lra.recall import RECALL
from seqlib.lra.recipes import Recipe
from seqlib.lra.store import Examples
from seqlib.lra.tasks import TASKS
from seqlib.lra.tasks.base import NotHere

QUIET = Console(quiet=True)
TINY = ["--recipe", "tiny", "--set", "steps=4"]
SMALL = {"steps": 4, "eval_examples": 8, "d_model": 16, "n_layer": 1, "batch_size": 4, "log_every": 2, "eval_every": 2}


def run(*arguments: object) -> str:
    call = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert call.exit_code == 0, call.output + repr(call.exception)
    return call.output


def refusal(*arguments: object) -> str:
    """What a command line is refused with."""
    call = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert call.exit_code and isinstance(call.exception, (ConfigError, CorpusError, SystemExit)), call.output
    return call.output + str(call.exception)


def sorted_examples(counts: list[int]) -> Examples:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Examples.pack([np.full(2 + i % 3, i % 200, np.uint8) for i in range(len(labels))], labels, vocab_size=256)


@pytest.mark.parametrize("counts", [[500, 500], [900, 100], [30, 60, 10]])
def test_a_sample_has_the_shares_of_a_sorted_file(counts: list[int]) -> None:
    examples = sorted_examples(counts)
    for n in (10, 50):
        part = examples.sample(n)
        shares = np.bincount(part.labels, minlength=len(counts)) / n
        assert np.abs(shares - np.array(counts) / sum(counts)).max() <= 1 / n
        assert part.digest() == examples.sample(n).digest() != examples.sample(n, seed=1).digest()
    assert examples.sample(10_000) is examples


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_text_selects_its_model_on_both_classes(protocol: str, tmp_path: Path) -> None:
    root = imdb_folder(tmp_path / "data", 40)
    recipe = Recipe(name="x", task="text", protocol=protocol, **SMALL | {"eval_examples": 4})
    held_out = load_data(recipe, DataSource(str(root), True, str(tmp_path / "c")), baselines=False).validation
    assert np.bincount(held_out.labels).tolist() == [2, 2]


@pytest.mark.parametrize("task", [*TASKS, *RECALL])
def test_a_held_out_set_of_one_class_is_refused(task: str, tmp_path: Path) -> None:
    recipe = Recipe(name="x", task=task, **SMALL | {"eval_examples": 1})
    if task in RECALL:
        options = {"every": False} if task == "parity" else {"ignore": 0.0, "seqlen": 4} if task == "flip_flop" else {}
        one = {"selective_copying": {"tokens": 1}, "copying": {"tokens": 1}, "passkey": {"digits": 1}}.get(task, {})
        one |= {"mqar": {"pairs": 1, "seqlen": 8}, "needle": {"digits": 1}}.get(task, {})
        recipe = Recipe(name="x", task=task, data=options | one, **SMALL | {"eval_examples": 1})
        source = DataSource()
    else:
        pixels = {"image": 32, "pathfinder": 32, "pathx": 128, "pathfinder256": 256}.get(task)
        row = " ".join(["1"] * (pixels**2 if pixels else 3))
        folder = mega_folder(tmp_path / task, ["0", "1"] * 2, *[[row] * 4] * TASKS[task].width)
        (folder / "label" / "valid.label").write_text("1\n" * 4)
        source = DataSource(str(tmp_path), True, str(tmp_path / "c"))
    with pytest.raises(ConfigError, match="has one class only"):
        load_data(recipe, source, baselines=False)


def test_larger_splits_of_one_class_are_refused_when_they_are_prepared(tmp_path: Path) -> None:
    folder = mega_folder(tmp_path / "text", ["0", "1"] * 10, ["1 2 3"] * 20)
    (folder / "label" / "test.label").write_text("1\n" * 20)
    with pytest.raises(CorpusError, match=r"test has labels of one class only \(1\)"):
        prepare("text", data=tmp_path, any_size=True, cache=tmp_path / "c")


FOLDERS = {
    "listops": lambda root: listops_folder(root / "listops-1000").parent,
    "text": imdb_folder,
    "retrieval": aan_folder,
    "pathfinder": lambda root: pathfinder_folder(root / "pathfinder32" / "curv_contour_length_14") and root,
    "image": lambda root: mega_folder(root / "image", ["0", "1"] * 2, ["1 " * 1024] * 4).parent,
}


@pytest.mark.parametrize("task", FOLDERS)
def test_changed_files_are_read_again(task: str, tmp_path: Path) -> None:
    """Every file that a reader opens is part of the name of what was prepared: size, time, and that it is there."""
    root = FOLDERS[task](tmp_path / "data")
    names = []
    for _ in range(2):
        prepare(task, data=root, any_size=True, cache=tmp_path / "c")
        names.append(sorted(os.listdir(tmp_path / "c")))
    assert names[0] == names[1] and len(names[0]) == 1
    files = [path for path in root.rglob("*") if path.is_file()]
    for path in files if len(files) < 20 else files[:: len(files) // 10]:
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
        before = len(os.listdir(tmp_path / "c"))
        prepare(task, data=root, any_size=True, cache=tmp_path / "c")
        assert len(os.listdir(tmp_path / "c")) == before + 1, path


def test_counts_are_checked_on_every_load(tmp_path: Path) -> None:
    root = listops_folder(tmp_path / "listops").parent
    prepare("listops", data=root, any_size=True, cache=tmp_path / "c")
    with pytest.raises(CorpusError, match="train has 20 examples, the published data 96,000"):
        prepare("listops", data=root, cache=tmp_path / "c")
    next((tmp_path / "c").glob("*/test.arrow")).unlink()
    with pytest.raises(CorpusError, match="is damaged .*test.arrow"):
        prepare("listops", data=root, any_size=True, cache=tmp_path / "c")


def test_manifest_and_files_must_agree(tmp_path: Path) -> None:
    root = listops_folder(tmp_path / "listops").parent
    prepare("listops", data=root, any_size=True, cache=tmp_path / "c")
    path = next((tmp_path / "c").glob("*/manifest.json"))
    manifest = json.loads(path.read_text())
    manifest["splits"]["validation"]["examples"] = 7
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match="validation has 20 examples, 7 were written"):
        prepare("listops", data=root, any_size=True, cache=tmp_path / "c")
    for text in ("[]", "{}", "nonsense"):
        path.write_text(text)
        with pytest.raises(CorpusError, match="is damaged"):
            prepare("listops", data=root, any_size=True, cache=tmp_path / "c")


@pytest.mark.parametrize("task", ["text", "image"])
def test_a_folder_without_the_data_never_asks_the_hub(task: str, tmp_path: Path, monkeypatch) -> None:
    import datasets

    asked: list[str] = []

    def load_dataset(name: str) -> None:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(imdb_folder(tmp_path / "here"))  # the folder one stands in is not data either
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotHere, match="data under .*empty. It needs"):
        prepare(task, data=tmp_path / "empty", any_size=True, cache=tmp_path / "c")
    assert not asked
    with pytest.raises(NotHere, match="neither in that cache nor reachable"):
        prepare(task, any_size=True, cache=tmp_path / "c")
    assert asked == [TASKS[task].hub]


def test_a_list_longer_than_the_protocol_is_refused_or_taken_whole(tmp_path: Path) -> None:
    shape = lists.Shape(min_length=2300, max_length=2600)
    made = lists.generate(4, shape)
    labels = [lists.evaluate(ids) for ids in made]
    assert len(set(labels)) > 1
    for name in ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"):
        lists.write_tsv(tmp_path / name, made, labels)
    sizes = {"train": 4, "validation": 4, "test": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(TASKS["listops"]), "counts", sizes)
        with pytest.raises(CorpusError, match=r"has 2,\d+ tokens, protocol s4 reads at most 2,048; pass --any-size"):
            prepare("listops", "s4", data=tmp_path, cache=tmp_path / "c")
    found = prepare("listops", "s4", data=tmp_path, any_size=True, cache=tmp_path / "c")
    assert found.seqlen > 2300 and "first operator" in found.task.baselines(found.splits)


@pytest.mark.parametrize("folder", ["aan", "tsv_data", "."])
def test_archives_may_have_any_layout_that_folders_have(folder: str, tmp_path: Path) -> None:
    import tarfile

    source = aan_folder(tmp_path / "data") / "tsv_data"
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as archive:
        for path in source.iterdir():
            archive.add(path, f"{folder}/{path.name}")
    found = prepare("retrieval", data=tmp_path / "data.tar.gz", any_size=True, cache=tmp_path / "c")
    assert len(found.splits["train"]) == 12


def corpus(folder: Path, seed: int) -> Path:
    """A ListOps folder of its own lists."""
    folder.mkdir(parents=True)
    made = lists.generate(120, lists.Shape(max_depth=4, max_args=4, min_length=4, max_length=40), seed=seed)
    for i, name in enumerate(("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")):
        part = made[40 * i : 40 * (i + 1)]
        lists.write_tsv(folder / name, part, [lists.evaluate(ids) for ids in part])
    return folder


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `a` with data and a run that was started there with a relative --data."""
    corpus(tmp_path / "a" / "lo", 0)
    monkeypatch.chdir(tmp_path / "a")
    run("train", "listops", *TINY, "--data", "lo", "--any-size", "--cache", tmp_path / "c", "--output", "run")
    return tmp_path / "a"


def test_a_run_is_scored_on_its_own_data_from_every_folder(trained: Path, tmp_path: Path, monkeypatch) -> None:
    corpus(tmp_path / "b" / "lo", 1)
    monkeypatch.chdir(tmp_path / "b")
    result = json.loads((trained / "run" / "seed-0" / "result.json").read_text())
    found = report.evaluate_model(str(trained / "run" / "seed-0"))
    assert found["accuracy"] == result["test"]["accuracy"] and found["examples"] == str(trained / "lo")
    other = report.evaluate_model(str(trained / "run" / "seed-0"), data=Path("lo"), any_size=True)
    assert other["examples"] == str(tmp_path / "b" / "lo")
    shutil.rmtree(trained / "lo")
    corpus(trained / "lo", 2)
    with pytest.raises(ConfigError, match="the files changed; name the data to score it on with --data"):
        report.evaluate_model(str(trained / "run" / "seed-0"))
    recipe = trained / "run" / "seed-0" / "recipe.json"
    values = json.loads(recipe.read_text())
    values["data"]["folder"] = "lo"  # as early versions wrote it
    recipe.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="give --data FOLDER"):
        report.evaluate_model(str(trained / "run" / "seed-0"))


def test_a_run_does_not_go_on_with_other_data(trained: Path, tmp_path: Path) -> None:
    part = trained / "run" / "seed-0"
    for name in ("result.json", "model"):
        shutil.rmtree(part / name) if (part / name).is_dir() else (part / name).unlink()
    shutil.rmtree(trained / "lo")
    corpus(trained / "lo", 2)
    assert "the files changed" in refusal("train", "--resume", trained / "run")


def test_runs_on_different_data_are_not_ranked(trained: Path, tmp_path: Path) -> None:
    corpus(tmp_path / "b", 1)
    shutil.copytree(trained / "lo", tmp_path / "same")
    for name, folder in (("other", tmp_path / "b"), ("again", tmp_path / "same")):
        options = ["--data", folder, "--any-size", "--cache", tmp_path / "c", "--mixer", "gated_conv"]
        run("train", "listops", *TINY, *options, "--output", tmp_path / name)
    with pytest.raises(ConfigError, match="on different examples"):
        compare_runs([trained / "run", tmp_path / "other"])
    assert len(compare_runs([trained / "run", tmp_path / "again"])["comparison"]) == 2


def test_seeds_on_different_data_have_no_mean(tmp_path: Path) -> None:
    recipe = seeds.configure("tiny", "parity", ["steps=2"], None, None)
    seeds.train_seeds(recipe, DataSource(), tmp_path, [0, 1], console=QUIET)
    path = tmp_path / "seed-1" / "result.json"
    path.write_text(path.read_text().replace('"data": "', '"data": "x'))
    with pytest.raises(ConfigError, match="different examples"):
        seeds.train_seeds(recipe, DataSource(), tmp_path, [0, 1], console=QUIET)


def test_the_table_marks_reduced_data(trained: Path, tmp_path: Path) -> None:
    [row] = leaderboard.own_rows([trained / "run"])
    assert row["reduced"].startswith("40 + 40 + 40 examples of ")
    summary = trained / "run" / "summary.json"
    values = json.loads(summary.read_text())
    del values["reduced"]  # as early versions wrote it
    summary.write_text(json.dumps(values))
    assert leaderboard.own_rows([trained / "run"])[0]["reduced"] == row["reduced"]
    shown = run("table", trained / "run", "--group", "small", "--output", tmp_path / "t")
    for text in (shown, (tmp_path / "t" / "table.md").read_text(), (tmp_path / "t" / "table.txt").read_text()):
        assert "listops*" in text and "no rival of the published scores" in " ".join(text.split())
    generated = prepare("listops", generate={"train": 20, "validation": 20, "test": 20}, cache=tmp_path / "c")
    published = {
        split: {"examples": n, "lengths": {"0": 501, "1": 1999}} for split, n in TASKS["listops"].counts.items()
    }
    assert reduced("listops", generated.manifest)
    assert not reduced("listops", {"splits": published, "protocol": {"name": "seqlib"}})


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_keep_every_number(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = run("table")
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    for number in ("53.66", "62.15", "98.58", "87.46", "37.11"):
        assert number in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train", "parity", *TINY, "--set", "seed=5", "--output", "x"], "--seeds N"),
        (["train", "parity", *TINY, "--data", "x", "--output", "x"], "made while it trains; leave out --data"),
        (["train", "mqar", *TINY, "--any-size", "--cache", "c", "--output", "x"], "leave out --any-size, --cache"),
        (["train", "mqar", *TINY, "--protocol", "s4", "--output", "x"], "leave out --protocol"),
        (["train", "mqar", *TINY, "--set", "protocol=s4", "--output", "x"], "leave out --set protocol="),
        (["train", "listops", *TINY, "--any-size", "--output", "x"], "leave out --any-size"),
        (["train", "listops", *TINY, "--data", "x", "--set", "data.train=5", "--output", "x"], "leave out one of them"),
        (["evaluate", "--model", "x", "--set", "train=5"], "--generate makes; leave out --set"),
        (["evaluate", "--model", "x", "--generate", "--data", "y"], "leave out --data"),
        (["evaluate", "--model", "x", "--data", "y", "--seed", "3"], "leave out --seed"),
        (["prepare", "listops", "--set", "train=5"], "leave out --set"),
        (["prepare", "listops", "--data", "x", "--seed", "1"], "leave out --seed"),
        (["prepare", "listops", "--generate", "--data", "x"], "leave out --data"),
        (["prepare", "listops", "--generate", "--any-size"], "leave out --any-size"),
        *(
            (["train", *option, "--resume", "x"], f"leave out {name}")
            for name, option in {
                "TASK": ["mqar"], "--recipe": ["--recipe", "tiny"], "--mixer": ["--mixer", "mamba"],
                "--protocol": ["--protocol", "s4"], "--seeds": ["--seeds", "2"], "--set": ["--set", "steps=2"],
                "--output": ["--output", "x"], "--data": ["--data", "x"], "--any-size": ["--any-size"],
                "--cache": ["--cache", "x"], "--processes": ["--processes", "1"],
            }.items()
        ),
    ],
)  # fmt: skip
def test_options_that_would_be_ignored_are_refused(arguments, reason: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in refusal(*arguments)
    assert not list(tmp_path.iterdir())
