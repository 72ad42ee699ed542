"""Runs of seqlib-lm that are interrupted: what they go on from, when they are over, and that nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_lra_resume import DAMAGE, FILES, Fail, names
from typer.testing import CliRunner

from seqlib.errors import ConfigError, SeqlibError
from seqlib.hf import ByteTokenizer
from seqlib.hf.console import quiet
from seqlib.hf.keep import locked
from seqlib.hf.runs import override, read_metrics
from seqlib.lm import cli, evaluate
from seqlib.lm import train as training
from seqlib.lm.corpus import read_corpus
from seqlib.lm.data import tokenize
from seqlib.lm.generate import load_model
from seqlib.lm.recipes import Recipe, tiny
from seqlib.lm.runs import DataSpec, Run, open_run

QUIET = Console(quiet=True)
WORDS = ["state", "space", "models", "carry", "a", "through", "documents", "and", "forget", "it", "at", "their", "end"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder, choose = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(choose.choices(WORDS, k=120)))
    return folder


def recipe(*settings: str) -> Recipe:
    return override(tiny(), ["d_model=16", "n_layer=2", "layer_pattern=m a", "save_every=4", "eval_every=4", "steps=12",
                             "eval_bytes=200", *settings])  # fmt: skip


def train(chosen: Recipe, text: Path, folder: Path, *, stop: tuple[int, BaseException] | None = None, **options) -> Run:
    callbacks = [Fail(*stop)] if stop else []
    data = DataSpec.of([str(text)])
    return training.train(chosen, data, folder, console=options.pop("console", QUIET), callbacks=callbacks, **options)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    return losses(a) == losses(b) and all(torch.equal(weights(a)[k], v) for k, v in weights(b).items())


@pytest.fixture(scope="module")
def killed(text: Path, tmp_path_factory) -> tuple[Path, Path]:
    """A run that ended at step 12, and one that was killed at step 10 with checkpoints of the steps 4 and 8."""
    root = tmp_path_factory.mktemp("killed")
    train(recipe(), text, root / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), text, root / "part", stop=(10, KeyboardInterrupt()))
    assert sorted(p.name for p in (root / "part" / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-8"]
    return root / "whole", root / "part"


def resumed(folder: Path, tmp_path: Path) -> str:
    with (tmp_path / "said").open("w") as file:
        training.resume(folder, console=Console(file=file, width=400))
    return (tmp_path / "said").read_text()


def test_a_run_that_was_over_takes_no_further_step(killed, tmp_path: Path, monkeypatch) -> None:
    """Killed between the last checkpoint and the model: the same weights, without training, as often as it happens."""
    part = shutil.copytree(killed[0], tmp_path / "part")
    monkeypatch.setattr(training._Trainer, "training_step", None)
    for _ in range(2):
        shutil.rmtree(part / "model")
        assert "resuming from" in resumed(part, tmp_path)
        assert same(part, killed[0]) and losses(part)[-1][0] == 12


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(name: str, damage: str, killed, tmp_path: Path) -> None:
    part = shutil.copytree(killed[1], tmp_path / "part")
    DAMAGE[damage](part / "checkpoints" / "checkpoint-8" / name)
    said = resumed(part, tmp_path)
    assert "checkpoint-8 is passed over: " in said and names(said, name)
    assert "training goes on from checkpoint-4" in said and same(part, killed[0])


@pytest.mark.parametrize("name", ["*", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_of_another_model_is_passed_over(name: str, killed, text: Path, tmp_path: Path) -> None:
    part = shutil.copytree(killed[1], tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        train(recipe("d_model=24", "steps=20"), text, tmp_path / "other", stop=(14, KeyboardInterrupt()))
    for path in (tmp_path / "other" / "checkpoints" / "checkpoint-12").glob(name):
        shutil.copy(path, part / "checkpoints" / "checkpoint-8" / path.name)
    assert "checkpoint-8 is passed over" in resumed(part, tmp_path) and same(part, killed[0])


def test_a_run_without_a_whole_checkpoint_begins_again(killed, tmp_path: Path) -> None:
    part = shutil.copytree(killed[1], tmp_path / "part")
    for step in (4, 8):
        (part / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    assert "starting from the beginning" in resumed(part, tmp_path) and same(part, killed[0])


def test_two_runs_in_one_folder_are_kept_apart(text: Path, killed, tmp_path: Path) -> None:
    part = shutil.copytree(killed[1], tmp_path / "part")
    code = (
        "import sys, time, pathlib; from seqlib.hf.keep import locked\n"
        "with locked(pathlib.Path(sys.argv[1])), locked(pathlib.Path(sys.argv[2])):\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new"), str(part)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(ConfigError, match="another process works in"):
            train(recipe(), text, tmp_path / "new")
        with pytest.raises(ConfigError, match="another process works in"):
            training.resume(part, console=QUIET)
    finally:
        other.kill()
        other.wait()
    assert not (tmp_path / "new" / "recipe.json").exists()
    train(recipe("steps=1"), text, tmp_path / "new")  # the lock ends with its process
    with locked(tmp_path / "new"):
        pass


def test_a_disk_that_is_full_at_the_end_keeps_the_checkpoints(text: Path, killed, tmp_path: Path, monkeypatch) -> None:
    part = shutil.copytree(killed[0], tmp_path / "part")
    shutil.rmtree(part / "model")
    with monkeypatch.context() as patch, pytest.raises(SeqlibError, match="no space is left .* --resume"):
        patch.setattr(ByteTokenizer, "save_pretrained", _full)
        training.resume(part, console=QUIET)
    assert not [path.name for path in part.iterdir() if "model" in path.name]
    training.resume(part, console=QUIET)
    assert same(part, killed[0])


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="making a small disk needs root")
def test_a_small_disk_loses_nothing(text: Path, killed, tmp_path: Path) -> None:
    """On a real file system without room, at every size from the first file to the last."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        filler = disk / "filler"
        for kilobytes in (590, 560, 500, 440, 380, 250):
            filler.write_bytes(b"0" * (kilobytes * 1000))
            shutil.rmtree(disk / "run", ignore_errors=True)
            with pytest.raises((SeqlibError, OSError), match=r"no space|No space"):
                train(recipe(), text, disk / "run")
            whole = [p.name for p in disk.glob("run/checkpoints/checkpoint-[0-9]*")]
            for name in whole:
                assert {path.name for path in (disk / "run" / "checkpoints" / name).iterdir()} >= set(FILES)
        filler.unlink()
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    training.resume(tmp_path / "run", console=QUIET)
    assert same(tmp_path / "run", killed[0])


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_what_is_written_follows_the_umask(mask: int, text: Path, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        train(recipe("steps=4"), text, tmp_path / "r")
    finally:
        os.umask(before)
    for path in (tmp_path / "r").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_ctrl_c_says_how_to_go_on(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    options = ["train", str(text), "--recipe", "tiny", "--set", "steps=100000", "--output", str(folder)]
    run = subprocess.Popen(
        [sys.executable, "-m", "seqlib.lm", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs ignore it
    )  # fmt: skip
    end = time.time() + 120
    while not list(folder.glob("checkpoints/checkpoint-[0-9]*")) and time.time() < end and run.poll() is None:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    _, told = run.communicate(timeout=300)
    assert run.returncode == 130
    assert told.strip() == f"interrupted; continue with: seqlib-lm train --resume {shlex.quote(str(folder))}"


def test_output_inside_the_text_is_no_text(text: Path, tmp_path: Path) -> None:
    inside = shutil.copytree(text, tmp_path / "text")
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), inside, inside / "runs" / "a", stop=(6, KeyboardInterrupt()))
    run = training.resume(inside / "runs" / "a", console=QUIET)
    assert run.corpus().digest == read_corpus([inside]).digest == read_corpus([text]).digest
    assert ("runs/a", "a run of this program") in read_corpus([inside]).skipped


def test_the_best_checkpoint_is_kept_and_named(text: Path, tmp_path: Path) -> None:
    """The learning rate is far too high, so that the first evaluation stays the best."""
    with (tmp_path / "said").open("w") as file:
        run = train(recipe("learning_rate=3", "steps=20", "clip=0", "eval_every=2"), text, tmp_path / "r",
                    console=Console(file=file, width=300))  # fmt: skip
    rows = read_metrics(run.metrics)
    scored = {row["step"]: row["eval_bits_per_byte"] for row in rows if "eval_bits_per_byte" in row}
    best = min(scored, key=scored.__getitem__)
    assert best != 20 and (run.checkpoints / f"checkpoint-{best}").is_dir()
    assert f"best on validation text: step {best} with" in (tmp_path / "said").read_text()
    model, tokenizer = load_model(str(run.checkpoints / f"checkpoint-{best}"), str(run.model))
    found = evaluate.evaluate(model, tokenize(run.corpus().validation, tokenizer), max_bytes=200)
    assert found.bits_per_byte == pytest.approx(scored[best], abs=1e-6)


@pytest.mark.parametrize("fresh", [False, True])
def test_training_goes_on_from_a_finished_run(fresh: bool, text: Path, killed, tmp_path: Path) -> None:
    """The first loss is the old model's, not that of fresh weights; an interrupted fine-tuning resumes exactly."""
    start = str(killed[0] / "model") if fresh else str(killed[0])
    chosen = training.started_from(override(tiny(), ["steps=8", "save_every=4", "learning_rate=1e-4"]), start)
    assert (chosen.d_model, chosen.n_layer) == (16, 2)
    whole = train(chosen, text, tmp_path / "whole", start=start)
    assert losses(whole.folder)[0][1] < losses(killed[0])[0][1] - 0.3
    with pytest.raises(KeyboardInterrupt):
        train(chosen, text, tmp_path / "part", start=start, stop=(6, KeyboardInterrupt()))
    assert open_run(tmp_path / "part").start == start
    training.resume(tmp_path / "part", console=QUIET)
    assert same(tmp_path / "part", whole.folder)


def test_training_goes_on_from_a_published_checkpoint(text: Path, killed, tmp_path: Path) -> None:
    from families import MAMBA, port, save

    theirs = port("mamba", **MAMBA, vocab_size=259, pad_token_id=256, bos_token_id=257, eos_token_id=258)
    save(theirs, tmp_path / "theirs")
    ByteTokenizer().save_pretrained(tmp_path / "theirs")
    command = ["train", str(text), "--recipe", "tiny", "--set", "steps=2", "--from", str(tmp_path / "theirs")]
    done = CliRunner().invoke(cli.app, [*command, "--output", str(tmp_path / "r")])
    assert done.exit_code == 0 and losses(tmp_path / "r")
    assert open_run(tmp_path / "r").recipe.n_layer == theirs.config.num_hidden_layers
    load_model(str(tmp_path / "r"))


def test_a_run_says_where_everything_is(text: Path, tmp_path: Path, monkeypatch) -> None:
    """Also one that is shorter than log_every; only what is there is named; curves where they were asked for."""
    written = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            written.append(log_dir)

        def __getattr__(self, name: str):
            return lambda *arguments, **_: written.append((name, *arguments))

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(training, "_has_tensorboard", lambda: True)
    quiet()
    command = ["train", str(text), "--recipe", "tiny", "--set", "steps=2", "--set", "log_every=5", "--tensorboard"]
    done = CliRunner().invoke(cli.app, [*command, "--set", "eval_every=0", "--output", str(tmp_path / "r")])
    assert done.exit_code == 0, done.output
    told = [line for line in done.output.splitlines() if line.startswith(("model", "metrics", "plot"))]
    named = dict(line.split(": ", 1) for line in told)
    assert len(named) == 3 and all(Path(path).exists() for path in named.values())
    assert losses(tmp_path / "r")[-1][0] == 2
    assert str(tmp_path / "r" / "tensorboard") in written and any("train/loss" in row for row in written)


def test_tensorboard_is_asked_for_before_anything_is_done(text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "_has_tensorboard", lambda: False)
    with pytest.raises(ConfigError, match="install it"):
        train(recipe(), text, tmp_path / "r", tensorboard=True)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["recipe.json", "metrics.jsonl", "trained.txt"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b"null", b"[" * 50_000, bytes(range(256))])
def test_files_of_a_run_that_cannot_be_read_are_one_line(name: str, content: bytes, killed, tmp_path: Path) -> None:
    part = shutil.copytree(killed[1], tmp_path / "part")
    (part / name).write_bytes(content)
    if name == "recipe.json":
        with pytest.raises(ConfigError):
            training.resume(part, console=QUIET)
    else:
        training.resume(part, console=QUIET)


def test_recipes_are_listed_with_their_fields() -> None:
    names = CliRunner().invoke(cli.app, ["recipes"]).output
    assert all(name in names for name in ("demo", "tiny", "mixer_sweep"))
    lines = CliRunner().invoke(cli.app, ["recipes", "tiny"]).output.splitlines()
    fields = dict(line.split(maxsplit=1) for line in lines)
    assert {name: json.loads(value) for name, value in fields.items()} == {
        name: value for name, value in tiny().to_dict().items() if name != "name"
    }
