"""Every option of every command with bad values: one line says what is wrong, never a traceback.

Each command line runs in a forked process. What is tried is a table: values by the kind of the option, fields and
values for `--set`, and a base of arguments per command that works. A few values of each option are drawn from the
table; `SEQLIB_FUZZ=all` tries every one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import datasets
import pytest
import torch
import typer
from huggingface_hub import HfApi
from matplotlib import figure
from test_lra_data import imdb_folder, listops_folder

from seqlib import lm, lra
from seqlib.errors import SeqlibError
from seqlib.hf import ByteTokenizer, console
from seqlib.hf.runs import override
from seqlib.lm import bench, corpus, demo, generate, runs, scoring, settings, sweep, train
from seqlib.lm import cli as lm_cli
from seqlib.lm import recipes as lm_recipes
from seqlib.lra import cli as lra_cli
from seqlib.lra import compare, leaderboard, recipes, report, seeds, speed, suite, throughput

# Loaded once, before the forks.
LOADED = (lm, lra, datasets, figure, bench, generate, scoring, sweep, train, compare, leaderboard, report, seeds, speed,
          suite, throughput)  # fmt: skip
WHOLE = os.environ.get("SEQLIB_FUZZ") == "all"  # an hour on two cores
FEW, SETTINGS = 4, 16  # values of an option, and of --set, that are drawn otherwise

INTEGERS = ["-1", "0", "9" * 25, "abc", "", "nan", "1e400", "0x10", "--", "½"]
NUMBERS = ["nan", "inf", "-inf", "-1", "abc", "", "1e400"]
TEXTS = [
    "", " ", "abc", "[/b]", "{", "{}", "[]", "3", "null", '{"kind": 3}', '{"kind": "mamba", "d_state": NaN}',
    "mamba " * 50, '{"kind": "mamba", "x": 1}', '{"kind": "fnet"}', "[" * 3000,
    "{kind:mamba}", "\udcff", "é\n", "-", "../..", "%s%n", '{"kind": "sum", "mixers": 3}',
]  # fmt: skip
PATHS = [
    "", "nowhere", "nobody/nothing", "empty", "file.bin", "text.txt", "a[/b]", "x" * 300, "\udcff", "/dev/null",
    "/proc/self/mem", "/dev/zero", ".", "-", "closed", "link", "run", "run/seed-0", "run/model", "broken", "lo",
    "binary_metrics", "deep.json", "bad.jsonl", "bad.parquet", "bad.txt.gz", "pipe",
]  # fmt: skip
VALUES = [
    "", "-1", "0", "3.5", "NaN", "Infinity", "-1e400", "9" * 12, "true", "null", "abc", "[]", "{}", '{"m": 3}',
    '{"m": {}}', '[1, "x"]', '"' + "x" * 3000 + '"',
]  # fmt: skip
_MODEL = ["mixers.m", "mixers.m.kind", "mixers.m.d_state", "mixers.m.x.y", "mlp.d_mlp", "mlp.gated", "mlp.activation",
          "steps.x", ".", ""]  # fmt: skip


@dataclass
class App:
    """A command line, and what is tried with it."""

    cli: ModuleType
    base: dict[str, list[str]]
    """Arguments of each command that work, positional ones first."""
    fields: dict[str, list[str]]
    """Of `--set`, by command; "" for all others."""
    paths: set[str] = field(default_factory=set)
    """Options and arguments that name files, folders or models, though they are text."""
    instead: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """Other arguments for one option of a command."""


_FEW = ["--set", "train=20", "--set", "test=20", "--set", "validation=20", "--set", "min_length=4", "--set",
        "max_length=30"]  # fmt: skip
_IMAGES = ["--set", "size=16", "--set", "train=4", "--set", "validation=4", "--set", "test=4", "--processes", "1"]
APPS = {
    "seqlib-lra": App(
        lra_cli,
        {
            "tasks": [],
            "recipes": [],
            "prepare": ["listops", "--data", "lo", "--any-size", "--cache", "c"],
            "train": ["parity", "--recipe", "tiny", "--set", "steps=2", "--output", "out"],
            "compare": ["run"],
            "evaluate": ["--model", "run/seed-0"],
            "suite": ["smoke", "--minutes", "0", "--output", "s", "--processes", "1"],
            "speed": ["--no-long", "--repeats", "1", "--budget", "0.01"],
            "throughput": ["listops", "--recipe", "tiny", "--data", "lo", "--any-size", "--repeats", "1"],
            "table": ["run", "--output", "t"],
        },
        {
            "train": [f.name for f in dataclasses.fields(recipes.Recipe)]
            + ["data.seqlen", "data.every", "data.mix", *_MODEL],
            "": ["train", "max_depth", "x", ""],
        },
        {"--model"},
        {
            ("prepare", "--set"): ["listops", "--generate", "--cache", "c", *_FEW],
            ("prepare", "--seed"): ["pathfinder", "--generate", "--cache", "c", *_IMAGES],
        },
    ),
    "seqlib-lm": App(
        lm_cli,
        {
            "recipes": [],
            "train": ["texts", "--recipe", "tiny", "--set", "steps=2", "--output", "out"],
            "evaluate": ["run"],
            "generate": ["run", "--prompt", "a", "--max-new-tokens", "2"],
            "sweep": ["texts", "--mixer", "mamba", "--recipe", "tiny", "--set", "steps=1", "--set", "mlp.d_mlp=256",
                      "--output", "out"],
            "bench": ["gelu_glu", "--repeats", "1", "--budget", "0.001"],
            "demo": ["--minutes", "0.02", "--set", "steps=1", "--output", "out"],
        },
        {
            "generate": [*settings.FIELDS, *settings.REFUSED, "x", ""],
            "": [*(f.name for f in dataclasses.fields(lm_recipes.Recipe)), *_MODEL],
        },
        {"model", "sources", "--tokenizer", "--from"},
        {
            ("generate", "--lines"): ["run", "--max-new-tokens", "2"],
            ("generate", "--prompt-file"): ["run", "--max-new-tokens", "2"],
            ("generate", "--batch-size"): ["run", "--max-new-tokens", "2", "--lines", "lines.jsonl"],
            ("train", "--resume"): [],
            ("train", "--from"): ["texts", "--recipe", "tiny", "--set", "steps=2", "--output", "out"],
            ("evaluate", "--split"): ["run", "texts"],
            ("evaluate", "--seed"): ["run", "texts", "--split", "test"],
            ("evaluate", "--column"): ["run", "texts", "new.jsonl"],
            ("evaluate", "--suffix"): ["run", "texts"],
        },
    ),
}  # fmt: skip


def _offline(self: Any, repo_id: str, **_: Any) -> None:
    raise ConnectionError("no route to the Hub")


def _small() -> None:
    """Nothing is asked of the Hub, and the demonstration is quick."""
    HfApi.repo_info = _offline  # type: ignore[method-assign, assignment]
    runs.stdlib_corpus = functools.partial(corpus.stdlib_corpus, train_bytes=30_000, held_out_bytes=4_000)  # type: ignore[assignment]
    demo.demo = lm_recipes.tiny


def call(app: str, root: Path, arguments: list[str], seconds: int = 120) -> tuple[int, str]:
    """Exit status and output of a command line, in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        torch.set_num_threads(1)  # threads of the parent are not there any more
        os.close(read)
        os.chdir(root)
        _small()
        said, status = io.StringIO(), 70
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            sys.argv = [app, *arguments]
            sys.stdin = io.TextIOWrapper(io.BytesIO(b"piped"))
            try:
                console.run(APPS[app].cli.app)
                status = 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            except BaseException:
                traceback.print_exc()
        os.write(write, said.getvalue().encode(errors="replace")[-60_000:])
        os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), told


def right(status: int, told: str) -> bool:
    """Done or refused, in words of ours."""
    return status in (0, 1, 2) and "Traceback" not in told and (not status or len(told) < 6000)


@pytest.fixture(scope="module", params=APPS)
def room(request, tmp_path_factory) -> tuple[str, Path]:
    """A folder with a finished run, data, and everything that is neither."""
    return request.param, make_room(request.param, tmp_path_factory.mktemp("fuzz"))


def make_room(app: str, root: Path) -> Path:
    for name in ("empty", "closed", "broken/seed-0", "binary_metrics/seed-0", "texts"):
        (root / name).mkdir(parents=True)
    listops_folder(root / "lo" / "listops-1000", 40)
    imdb_folder(root / "lo")
    choose = random.Random(0)
    for i in range(14):
        (root / "texts" / f"{i}.txt").write_text(" ".join(choose.choices(["some", "words", "and", "more"], k=40)))
    (root / "file.bin").write_bytes(bytes(range(256)) * 4)
    (root / "text.txt").write_text("no data")
    (root / "new.jsonl").write_text('{"text": "new", "title": "t"}\n')
    (root / "lines.jsonl").write_text('{"prompt": "a"}\n{"prompt": "bc"}\n')
    (root / "deep.json").write_text("[" * 100_000)
    (root / "bad.jsonl").write_bytes(b'{"prompt": 3}\n\xff\xfe{"text": ')
    (root / "bad.parquet").write_bytes(b"PAR1" + bytes(100))
    (root / "bad.txt.gz").write_bytes(b"\x1f\x8b noise")
    os.mkfifo(root / "pipe")
    for folder, content in (("broken", b"{"), ("binary_metrics", bytes(range(256)))):
        for name in ("plan.json", "summary.json", "recipe.json", "metrics.jsonl", "config.json", "seed-0/recipe.json",
                     "seed-0/result.json", "seed-0/config.json", "seed-0/metrics.jsonl"):  # fmt: skip
            (root / folder / name).write_bytes(content)
    (root / "link").symlink_to("link")
    (root / "closed").chmod(0)
    base = APPS[app].base["train"]
    status, told = call(app, root, ["train", *base[: base.index("--output")], "--output", "run"])
    assert status == 0, told
    return root


def options(app: App, name: str) -> list[tuple[str, int, list[str]]]:
    """Every option of a command with the bad values of its kind; an argument has its position instead of a name."""
    command = typer.main.get_command(app.cli.app).commands[name]  # type: ignore[attr-defined]
    kinds = get_type_hints(getattr(app.cli, name))
    found, position = [], 0
    for parameter in command.params:
        named, kind = parameter.opts[0].startswith("-"), str(kinds.get(parameter.name))
        flag = parameter.opts[0] if named else ""
        at, position = (-1, position) if named else (position, position + 1)
        if parameter.name not in kinds or "bool" in kind:
            continue
        values = INTEGERS if "int" in kind else NUMBERS if "float" in kind else TEXTS
        values = PATHS if "Path" in kind or {flag, parameter.name} & app.paths else values
        if flag in ("--json", "--chart", "--prompt-file", "--lines"):  # which may wait for the other end, as it should
            values = [path for path in values if path not in ("pipe", "/dev/zero")]
        if flag == "--set":
            values = [f"{key}={value}" for key in app.fields.get(name, app.fields[""]) for value in VALUES]
        if name == "suite" and flag == "--minutes":  # without an end it runs to its own
            values = [value for value in values if value not in ("inf", "1e400")]
        if not WHOLE:
            few = SETTINGS if flag == "--set" else FEW
            values = random.Random(f"{name} {parameter.name}").sample(values, min(few, len(values)))
        found.append((flag or str(parameter.name), at, values))
    return found


CASES = [
    (app, name, flag, at, values)
    for app, what in APPS.items()
    for name in what.base
    for flag, at, values in options(what, name)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "name", "flag", "at", "values"),
    CASES,
    indirect=["room"],
    ids=[f"{app} {name} {flag}" for app, name, flag, _, _ in CASES],
)
def test_bad_values_are_told_in_a_line(name: str, flag: str, at: int, values: list[str], room) -> None:
    faults = [fault for number, value in enumerate(values) if (fault := fault_of(room, name, flag, at, value, number))]
    assert not faults, f"{len(faults)} of {len(values)}\n" + "\n".join(faults)


@pytest.mark.parametrize("room", APPS, indirect=True)
def test_a_few_bad_values_are_told_in_a_line(room) -> None:
    choose = random.Random(0)
    cases = choose.sample([case[1:] for case in CASES if case[0] == room[0]], 8)
    faults = [fault for *case, values in cases if (fault := fault_of(room, *case, choose.choice(values), 0))]
    assert not faults, "\n".join(faults)


def fault_of(room: tuple[str, Path], name: str, flag: str, at: int, value: str, number: int) -> str | None:
    app, root = room
    base = APPS[app].instead.get((name, flag), APPS[app].base[name])
    arguments = [f"{a}{number}" if a == "out" else a for a in tried(base, flag, at, value)]
    status, told = call(app, root, [name, *arguments])
    return None if right(status, told) else f"{name} {flag} {value[:60]!r}: {status} {told.strip()[-900:]}"


def tried(base: list[str], flag: str, at: int, value: str) -> list[str]:
    """The base command with one value in the place of what is tried."""
    if at >= 0:
        given = next((i for i, word in enumerate(base) if word.startswith("-")), len(base))
        return [*base[: min(at, given)], value, *base[min(at + 1, given) :]]
    if flag in base and flag != "--set":
        base = [*base[: base.index(flag)], *base[base.index(flag) + 2 :]]
    return [*base, flag, value]


MAKERS: dict[str, Callable[[str], Any]] = {
    "seqlib-lm": lambda setting: train.build_model(
        override(lm_recipes.tiny(), ["d_model=16", "n_layer=1", 'mixers={"m": {"kind": "mamba"}}', "layer_pattern=m",
                                     setting]), ByteTokenizer()),
    "seqlib-lra": lambda setting: seeds.configure("tiny", "parity", [setting], None, None),
}  # fmt: skip


@pytest.mark.parametrize("app", APPS)
def test_every_field_of_a_recipe_with_every_bad_value(app: str) -> None:
    """All of what `--set` is given above, without a process each: it makes a model, or is refused on purpose."""
    fields = {key for of in APPS[app].fields.values() for key in of} - settings.FIELDS.keys() - settings.REFUSED.keys()
    made = 0
    for setting in (f"{key}={value}" for key in sorted(fields) for value in VALUES):
        try:
            MAKERS[app](setting)
            made += 1
        except SeqlibError as error:
            assert str(error), setting
        except Exception as error:
            raise AssertionError(f"{setting[:80]} ends in {error!r}") from error
    assert made > 20


READERS: dict[str, tuple[Callable[[Path], bool], list[list[str]]]] = {
    "seqlib-lra": (
        lambda path: "seed-0" in path.parts,
        [["evaluate", "--model", "run/seed-0"], ["train", "--resume", "run"], ["compare", "run"], ["table", "run"]],
    ),
    "seqlib-lm": (
        lambda path: True,
        [["evaluate", "run"], ["evaluate", "run", "text.txt"], ["generate", "run", "--prompt", "a"],
         ["train", "--resume", "run"]],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("room", APPS, indirect=True)
def test_files_of_a_run_in_noise(room: tuple[str, Path]) -> None:
    """Every file of a run folder replaced, one at a time: what reads it says so."""
    app, root = room
    of_run, commands = READERS[app]
    files = [p for p in (root / "run").rglob("*") if p.is_file() and "checkpoints" not in p.parts and of_run(p)]
    assert len(files) > 4
    faults, choose = [], random.Random(0)
    for path in files:
        before = path.read_bytes()
        for content in (b"", b"\xff\xfe", b"[]", b"{}", b"null", before[: len(before) // 2], b"[" * 50_000):
            path.write_bytes(content)
            for arguments in commands if WHOLE else choose.sample(commands, 1):
                status, told = call(app, root, arguments)
                if not right(status, told):
                    faults.append(f"{path} {content[:9]!r} {arguments} {told[-900:]}")
        path.write_bytes(before)
    assert not faults, "\n".join(faults)
    assert json.loads(next((root / "run").rglob("config.json")).read_text())
