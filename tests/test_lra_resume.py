"""Runs of seqlib-lra that are interrupted: what they go on from, when they are over, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback
from typer.testing import CliRunner

from seqlib.errors import ConfigError, SeqlibError
from seqlib.hf.keep import locked
from seqlib.hf.runs import read_metrics
from seqlib.lra import cli, seeds
from seqlib.lra import train as training
from seqlib.lra.data import DataSource
from seqlib.lra.folder import open_plan
from seqlib.lra.prepare import prepare
from seqlib.lra.recipes import Recipe

QUIET = Console(quiet=True)


def recipe(*settings: str) -> Recipe:
    return seeds.configure("tiny", "parity", settings, None, None)


def train(chosen: Recipe, folder: Path, **options) -> dict:
    return training.train(chosen, DataSource(), folder, console=options.pop("console", QUIET), **options)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def unfinished(folder: Path, into: Path) -> Path:
    """A copy of a finished run as a kill leaves it that comes after the last checkpoint."""
    shutil.copytree(folder, into)
    shutil.rmtree(into / "model")
    (into / "result.json").unlink()
    return into


class Fail(TrainerCallback):
    """Raises at the end of a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            raise self.error


def broken(chosen: Recipe, folder: Path, step: int, error: BaseException, monkeypatch) -> None:
    made = training._trainer

    def with_fault(*arguments):
        trainer = made(*arguments)
        trainer.add_callback(Fail(step, error))
        return trainer

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(training, "_trainer", with_fault)
        train(chosen, folder)


ENDS = {
    "all steps": ("steps=12",),
    "solved": ("enough=0.01", "steps=40"),
    "patience": ("patience=1", "steps=40", "learning_rate=1e-9"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_was_over_takes_no_further_step(end: str, tmp_path: Path, monkeypatch) -> None:
    """Killed between the last checkpoint and the model: the same result, without training, as often as it happens."""
    chosen = recipe(*ENDS[end])
    whole = train(chosen, tmp_path / "whole")
    assert whole["steps"] == {"all steps": 12, "solved": 4, "patience": 8}[end]
    part = unfinished(tmp_path / "whole", tmp_path / "part")
    monkeypatch.setattr(training._Trainer, "training_step", None)
    for _ in range(2):
        again = train(chosen, part, resume=True)
        for key in ("test", "steps", "best_step", "best_held_out", "seconds", "seed", "data"):
            kept = {k: v for k, v in again[key].items() if "per_s" not in k} if key == "test" else again[key]
            told = {k: v for k, v in whole[key].items() if "per_s" not in k} if key == "test" else whole[key]
            assert kept == told, key
        assert losses(part) == losses(tmp_path / "whole")
        shutil.rmtree(part / "model")
        (part / "result.json").unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json",
         "training_args.bin", "SHA256SUMS")  # fmt: skip
DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "one bit": flip,
    "noise": lambda path: path.write_bytes(os.urandom(500)),
}


def names(said: str, damaged: str) -> bool:
    """Whether the file is named that was damaged; a wrong sum may be that of any file."""
    return f"checkpoint-8/{damaged} " in said or (damaged == "SHA256SUMS" and damaged in said)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, Path]:
    """A run that ended at step 12, and one that was killed at step 10 with checkpoints of the steps 4 and 8."""
    root = tmp_path_factory.mktemp("killed")
    chosen = recipe("steps=12")
    train(chosen, root / "whole")
    with pytest.MonkeyPatch.context() as patch:
        broken(chosen, root / "part", 10, KeyboardInterrupt(), patch)
    assert sorted(p.name for p in (root / "part" / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-8"]
    return root / "whole", root / "part"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(name: str, damage: str, killed, tmp_path: Path) -> None:
    whole, part = killed[0], shutil.copytree(killed[1], tmp_path / "part")
    DAMAGE[damage](part / "checkpoints" / "checkpoint-8" / name)
    with (tmp_path / "said").open("w") as file:
        train(recipe("steps=12"), part, resume=True, console=Console(file=file, width=400))
    said = (tmp_path / "said").read_text()
    assert "checkpoint-8 is passed over: " in said and names(said, name)
    assert "training goes on from checkpoint-4" in said and losses(part) == losses(whole)


@pytest.mark.parametrize("name", ["*", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_of_another_model_is_passed_over(name: str, killed, tmp_path: Path, monkeypatch) -> None:
    part = shutil.copytree(killed[1], tmp_path / "part")
    broken(recipe("steps=20", "d_model=24"), tmp_path / "other", 14, KeyboardInterrupt(), monkeypatch)
    other = tmp_path / "other" / "checkpoints" / "checkpoint-12"
    for path in other.glob(name):
        shutil.copy(path, part / "checkpoints" / "checkpoint-8" / path.name)
    with (tmp_path / "said").open("w") as file:
        train(recipe("steps=12"), part, resume=True, console=Console(file=file, width=400))
    assert "checkpoint-8 is passed over" in (tmp_path / "said").read_text()
    assert losses(part) == losses(killed[0])


def test_a_run_without_a_whole_checkpoint_begins_again(killed, tmp_path: Path) -> None:
    part = shutil.copytree(killed[1], tmp_path / "part")
    for step in (4, 8):
        (part / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    train(recipe("steps=12"), part, resume=True)
    assert losses(part) == losses(killed[0])


def test_a_moved_run_takes_its_best_weights_along(tmp_path: Path, monkeypatch) -> None:
    """The best checkpoint is found by its name, not by the path it had."""
    chosen = recipe("steps=12", "learning_rate=0.5", "clip=0")
    whole = train(chosen, tmp_path / "whole")
    best = whole["best_step"]
    monkeypatch.chdir(tmp_path)
    broken(chosen, Path("part"), 10, KeyboardInterrupt(), monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "part", tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = train(chosen, Path("moved"), resume=True)
    assert again["best_step"] == best and again["test"]["accuracy"] == whole["test"]["accuracy"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:860] . PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_a_full_disk_is_one_sentence_and_loses_nothing(error: Exception, tmp_path: Path, monkeypatch) -> None:
    chosen = recipe("steps=12")
    whole = train(chosen, tmp_path / "whole")
    save = torch.save

    def full(values, path, *arguments, **options) -> None:
        if "optimizer" in str(path) and list((tmp_path / "part" / "checkpoints").glob("checkpoint-[0-9]*")):
            Path(path).write_bytes(b"half")
            raise error
        save(values, path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(SeqlibError, match="no space is left .* --resume"):
        patch.setattr(torch, "save", full)
        train(chosen, tmp_path / "part")
    kept = [p.name for p in (tmp_path / "part" / "checkpoints").glob("checkpoint-[0-9]*")]
    assert kept == ["checkpoint-4"]
    again = train(chosen, tmp_path / "part", resume=True)
    assert again["test"]["accuracy"] == whole["test"]["accuracy"]
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_end_keeps_the_checkpoints(tmp_path: Path, monkeypatch) -> None:
    def full(self, output_dir=None, _internal_call=False) -> None:
        if not _internal_call:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, output_dir, _internal_call=True)

    save = training._Trainer.save_model
    with monkeypatch.context() as patch, pytest.raises(SeqlibError, match="no space is left"):
        patch.setattr(training._Trainer, "save_model", full)
        train(recipe("steps=12"), tmp_path / "r")
    assert not [path.name for path in (tmp_path / "r").iterdir() if "model" in path.name]
    assert train(recipe("steps=12"), tmp_path / "r", resume=True)["steps"] == 12


def test_two_runs_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from seqlib.hf.keep import locked\n"
        f"with locked(pathlib.Path({str(tmp_path)!r}) / 'run'):\n    print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(ConfigError, match="another process works in"):
            train(recipe("steps=4"), tmp_path / "run")
        options = ["parity", "--recipe", "tiny", "--output", str(tmp_path / "run")]
        call = CliRunner().invoke(cli.app, ["train", *options])
        assert "another process works in" in str(call.exception) and not (tmp_path / "run" / "plan.json").exists()
    finally:
        other.kill()
        other.wait()
    train(recipe("steps=4"), tmp_path / "run")  # the lock ends with its process
    with locked(tmp_path / "run"):
        pass


def test_a_plan_that_never_began_does_not_block_the_corrected_command(tmp_path: Path) -> None:
    command = ["train", "listops", "--recipe", "tiny", "--set", "steps=2", "--output", str(tmp_path / "r")]
    wrong = CliRunner().invoke(cli.app, [*command, "--data", str(tmp_path / "typo")])
    assert "does not exist" in str(wrong.exception)
    wrong = CliRunner().invoke(cli.app, [*command, "--set", "mixers.m.d_state=-1"])
    assert wrong.exit_code
    right = CliRunner().invoke(cli.app, command)
    assert right.exit_code == 0, right.output


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_what_is_written_follows_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        train(recipe("steps=4"), tmp_path / "r")
        small = {"train": 20, "validation": 20, "test": 20, "max_depth": 4, "min_length": 4, "max_length": 40}
        prepare("listops", generate=small, cache=tmp_path / "c")
    finally:
        os.umask(before)
    for path in [*(tmp_path / "r").rglob("*"), *(tmp_path / "c").rglob("*")]:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    options = ["parity", "--recipe", "tiny", "--set", "steps=100000", "--output", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    run = subprocess.Popen(
        [sys.executable, "-m", "seqlib.lra", "train", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs ignore it
    )  # fmt: skip
    end = time.time() + 120
    while not list(folder.glob("seed-0/checkpoints/checkpoint-*")) and time.time() < end and run.poll() is None:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    _, told = run.communicate(timeout=300)
    assert run.returncode == 130
    assert told.strip() == f"interrupted; continue with: seqlib-lra train --resume '{folder}'"
    plan = json.loads((folder / "plan.json").read_text())
    plan["recipe"]["steps"] = 4  # shorter than what is done: over at once
    (folder / "plan.json").write_text(json.dumps(plan))
    call = CliRunner().invoke(cli.app, ["train", "--resume", str(folder)])
    assert call.exit_code == 0, call.output


def test_plans_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for values in ("[]", "{}", "nonsense", '{"recipe": 3}', '{"recipe": {}, "data": {}, "seeds": 1}', "\x00\xff"):
        (tmp_path / "plan.json").write_bytes(values.encode("latin-1"))
        with pytest.raises(ConfigError, match="start a new run"):
            open_plan(tmp_path)
