"""Every option of every command of seqlib-lra with bad values: one line says what is wrong, never a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import get_type_hints

import datasets
import pytest
import typer
from matplotlib import figure
from test_lra_data import imdb_folder, listops_folder

from seqlib.hf import console
from seqlib.lra import cli, compare, leaderboard, report, seeds, speed, suite, throughput
from seqlib.lra.recipes import Recipe

LOADED = (compare, leaderboard, report, seeds, speed, suite, throughput, datasets, figure)  # once, before the forks
pytestmark = pytest.mark.slow

INTEGERS = ["-1", "0", "9" * 25, "abc", "", "nan", "1e400", "0x10", "--", "½"]
NUMBERS = ["nan", "inf", "-inf", "-1", "abc", "", "1e400"]
TEXTS = [
    "", " ", "abc", "[/b]", "{", "{}", "[]", "3", "null", '{"kind": 3}', '{"kind": "mamba", "d_state": NaN}',
    "mamba " * 50, '{"kind": "mamba", "x": 1}',
    "{kind:mamba}", "\udcff", "é\n", "-", "../..", "%s%n", '{"kind": "sum", "mixers": 3}',
]  # fmt: skip
PATHS = [
    "", "nowhere", "empty", "file.bin", "text.txt", "a[/b]", "x" * 300, "\udcff", "/dev/null", "/proc/self", ".", "-",
    "closed", "link", "run", "run/seed-0", "broken", "lo", "binary_metrics", "deep.json",
]  # fmt: skip
FIELDS = [field.name for field in dataclasses.fields(Recipe)] + [
    "data.seqlen", "data.every", "data.mix", "mixers.m", "mixers.m.kind", "mixers.m.d_state", "mixers.m.x.y",
    "mlp.d_mlp", "mlp.gated", "mlp.activation", "steps.x", ".", "",
]  # fmt: skip
VALUES = [
    "", "-1", "0", "3.5", "NaN", "Infinity", "-1e400", "9" * 12, "true", "null", "abc", "[]", "{}", '{"m": 3}',
    '{"m": {}}', '[1, "x"]', '"' + "x" * 3000 + '"',
]  # fmt: skip

BASE = {
    "tasks": [],
    "recipes": [],
    "prepare": ["listops", "--data", "lo", "--any-size", "--cache", "c"],
    "train": ["parity", "--recipe", "tiny", "--set", "steps=2", "--output", "out"],
    "compare": ["run"],
    "evaluate": ["--model", "run/seed-0"],
    "suite": ["smoke", "--minutes", "0", "--output", "s", "--processes", "1"],
    "speed": ["--no-long", "--repeats", "1", "--budget", "0.01"],
    "throughput": ["listops", "--recipe", "tiny", "--data", "lo", "--any-size", "--cache", "c", "--repeats", "1"],
    "table": ["run", "--output", "t"],
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with a finished run, data, and everything that is neither."""
    root = tmp_path_factory.mktemp("fuzz")
    listops_folder(root / "lo" / "listops-1000", 40)
    imdb_folder(root / "lo")
    for name in ("empty", "closed", "broken/seed-0", "binary_metrics/seed-0"):
        (root / name).mkdir(parents=True)
    (root / "file.bin").write_bytes(bytes(range(256)) * 4)
    (root / "text.txt").write_text("no data")
    (root / "deep.json").write_text("[" * 100_000)
    for folder, content in (("broken", b"{"), ("binary_metrics", bytes(range(256)))):
        for name in ("plan.json", "summary.json", "seed-0/recipe.json", "seed-0/result.json", "seed-0/config.json",
                     "seed-0/metrics.jsonl"):  # fmt: skip
            (root / folder / name).write_bytes(content)
    (root / "link").symlink_to("link")
    (root / "closed").chmod(0)
    assert call(root, ["train", *BASE["train"][:-1], "run"])[0] == 0
    return root


def call(root: Path, arguments: list[str], seconds: int = 60) -> tuple[int, str]:
    """Exit status and output of a command line, in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        os.close(read)
        os.chdir(root)
        said, status = io.StringIO(), 70
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            sys.argv = ["seqlib-lra", *arguments]
            try:
                console.run(cli.app)
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


def options(name: str) -> list[tuple[str, list[str]]]:
    """Every option of a command with the bad values of its kind; an argument's name is empty."""
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    kinds = get_type_hints(getattr(cli, name))
    found = []
    for parameter in command.params:
        flag, kind = parameter.opts[0] if parameter.opts[0].startswith("-") else "", str(kinds.get(parameter.name))
        if parameter.name not in kinds or "bool" in kind:
            continue
        values = INTEGERS if "int" in kind else NUMBERS if "float" in kind else TEXTS
        values = PATHS if "Path" in kind or flag == "--model" else values
        if flag == "--set":
            values = [f"{field}={value}" for field in FIELDS for value in VALUES] if name == "train" else \
                [f"{field}={value}" for field in ("train", "max_depth", "x", "") for value in VALUES]  # fmt: skip
        found.append((flag, values))
    return found


CASES = [(name, flag, values) for name in BASE for flag, values in options(name)]


@pytest.mark.parametrize(("name", "flag", "values"), CASES, ids=[f"{name} {flag}" for name, flag, _ in CASES])
def test_bad_values_are_told_in_a_line(name: str, flag: str, values: list[str], room: Path) -> None:
    faults = []
    for number, value in enumerate(values):
        arguments = _without(BASE[name], flag) if flag else BASE[name][1:]
        arguments = [value, *arguments] if not flag else [*arguments, flag, value]
        if name == "prepare" and flag == "--set":
            arguments = ["listops", "--generate", "--cache", "c", flag, value, "--set", "train=20", "--set", "test=20",
                         "--set", "validation=20", "--set", "min_length=4", "--set", "max_length=30"]  # fmt: skip
        if name == "prepare" and flag == "--seed":
            arguments = ["pathfinder", "--generate", "--cache", "c", "--set", "size=16", "--set", "train=4", "--set",
                         "validation=4", "--set", "test=4", "--processes", "1", flag, value]  # fmt: skip
        arguments = [f"{a}{number}" if a == "out" else a for a in arguments]
        status, told = call(room, [name, *arguments])
        if status not in (0, 1, 2) or "Traceback" in told or (status and len(told) > 6000):
            faults.append(f"{value[:60]!r}: {status} {told.strip()[-600:]}")
    assert not faults, "\n".join(faults)


def _without(arguments: list[str], flag: str) -> list[str]:
    """The base command without the option that is tried."""
    if flag not in arguments or flag == "--set":
        return list(arguments)
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


def test_a_config_that_names_everything_wrong(room: Path) -> None:
    """Models that cannot be read: every file of a run folder replaced by noise, one at a time."""
    for path in [p for p in (room / "run" / "seed-0").rglob("*") if p.is_file() and "checkpoints" not in str(p)]:
        before = path.read_bytes()
        for content in (b"", b"\xff\xfe", b"[]", b"{}", b"null", before[: len(before) // 2], b"[" * 50_000):
            path.write_bytes(content)
            for arguments in (["evaluate", "--model", "run/seed-0"], ["train", "--resume", "run"], ["compare", "run"],
                              ["table", "run"]):  # fmt: skip
                status, told = call(room, arguments)
                assert status in (0, 1, 2) and "Traceback" not in told, (
                    f"{path} {content[:9]!r} {arguments} {told[-900:]}"
                )
        path.write_bytes(before)
    assert json.loads((room / "run" / "summary.json").read_text())["task"] == "parity"
