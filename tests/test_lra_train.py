"""Training, evaluation, the suite and the table of Long Range Arena, on models of seconds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from typer.testing import CliRunner

from seqlib.errors import ConfigError, SeqlibError
from seqlib.hf.runs import override, read_metrics
from seqlib.lra import cli, report, seeds
from seqlib.lra import train as training
from seqlib.lra.evaluate import collate, invariance, score_examples, score_recall, wilson
from seqlib.lra.published import PUBLISHED
from seqlib.lra.recall import RECALL, Stream, make_batch
from seqlib.lra.recipes import Recipe, find_recipe
from seqlib.lra.store import Examples
from seqlib.lra.synthetic import Batch
from seqlib.lra.tasks import TASKS
from seqlib.mixers import MIXERS

QUIET = Console(quiet=True)


def source(folder: Path) -> training.DataSource:
    return training.DataSource(cache=str(folder / "cache"))


def tiny(task: str, *settings: str, mixer: str | None = None) -> Recipe:
    return seeds.configure("tiny", task, settings, mixer, None)


class Kill(TrainerCallback):
    """Stops a run in the middle of a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("task", ["listops", "mqar"])
def test_resumed_run_ends_as_an_unbroken_one(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(task)
    whole = training.train(recipe, source(tmp_path), tmp_path / "whole", console=QUIET)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "Follow", lambda *a: type("F", (Kill,), {"close": lambda self: None})(6))
        training.train(recipe, source(tmp_path), tmp_path / "broken", console=QUIET)
    with pytest.raises(ConfigError, match="continue it with --resume"):
        training.train(recipe, source(tmp_path), tmp_path / "broken", console=QUIET)
    again = training.train(recipe, source(tmp_path), tmp_path / "broken", console=QUIET, resume=True)
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert whole["test"]["accuracy"] == again["test"]["accuracy"] and whole["best_step"] == again["best_step"]
    with pytest.raises(ConfigError, match="is finished"):
        training.train(recipe, source(tmp_path), tmp_path / "whole", console=QUIET)
    (tmp_path / "broken" / "result.json").unlink()  # as if killed after the model was saved
    once_more = training.train(recipe, source(tmp_path), tmp_path / "broken", console=QUIET, resume=True)
    assert once_more["test"]["accuracy"] == whole["test"]["accuracy"]


def test_run_folder_tells_everything_and_loads_with_auto_classes(tmp_path: Path) -> None:
    result = training.train(tiny("listops"), source(tmp_path), tmp_path / "run", console=QUIET)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.json", "result.json", "metrics.jsonl", "curve.png", "model"} <= names
    assert result["invariance"]["holds"] and result["baselines"]["lists to depth 4"] == 1.0
    low, high = result["test"]["interval"]
    assert low <= result["test"]["accuracy"] <= high and result["test"]["n"] == 60
    told = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert told["versions"]["torch"] == torch.__version__ and told["examples"]["vocab_size"] == 16 and told["backends"]
    assert told["recipe"] == tiny("listops").to_dict()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.num_labels == 10 and loaded.config.pooling == "mean"
    found = report.evaluate_model(str(tmp_path / "run"))
    assert found["accuracy"] == result["test"]["accuracy"] and found["baselines"] == result["baselines"]
    longer = report.evaluate_model(str(tmp_path / "run"), generate={"max_args": 5, "min_length": 60, "max_length": 90})
    assert longer["seqlen"] > result["seqlen"] and longer["n"] == 60
    with pytest.raises(ConfigError, match="needs a SeqlibForPairClassification"):
        report.evaluate_model(str(tmp_path / "run"), "retrieval", data=tmp_path)


def test_seeds_are_summed_up_and_finished_ones_kept(tmp_path: Path) -> None:
    recipe = tiny("parity", "steps=4")
    first = seeds.train_seeds(recipe, source(tmp_path), tmp_path / "r", [0], console=QUIET)
    stamp = (tmp_path / "r" / "seed-0" / "result.json").stat().st_mtime_ns
    both = seeds.train_seeds(recipe, source(tmp_path), tmp_path / "r", [0, 1], console=QUIET)
    assert (tmp_path / "r" / "seed-0" / "result.json").stat().st_mtime_ns == stamp
    assert both["accuracies"][0] == first["mean"] and both["mean"] == pytest.approx(np.mean(both["accuracies"]))
    assert first["std"] is None and both["std"] == pytest.approx(np.std(both["accuracies"], ddof=1))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "seed-1" / "model").config.vocab_size, int)


def test_pairs_train(tmp_path: Path) -> None:
    for name, n in (("train", 24), ("eval", 8), ("test", 8)):
        lines = [f"{i % 2}.0\t{i}\t{i}\t{'cited' if i % 2 else 'other'} {'x' * (i % 5)}\ttext {i}" for i in range(n)]
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text("\n".join(lines) + "\n")
    settings = {
        "d_model": 16,
        "n_layer": 1,
        "steps": 4,
        "batch_size": 8,
        "warmup_steps": 1,
        "log_every": 1,
        "eval_every": 2,
    }
    recipe = Recipe(name="pairs", task="retrieval", mixers={"m": {"kind": "mamba"}}, **settings)
    where = training.DataSource(str(tmp_path), True, str(tmp_path / "cache"))
    result = training.train(recipe, where, tmp_path / "run", console=QUIET)
    assert result["test"]["n"] == 8 and result["invariance"]["holds"]
    assert report.load_model(str(tmp_path / "run")).config.pair_head == "nli"


def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(SeqlibError, match="the loss is (nan|inf)"):
        training.train(
            tiny("parity", "learning_rate=1e30", "clip=0", "warmup_steps=0"),
            source(tmp_path),
            tmp_path / "r",
            console=QUIET,
        )


def test_sequences_that_are_longer_than_a_mixer_has_weights_for(tmp_path: Path) -> None:
    """Found before a run folder is made, and before an evaluation begins."""
    limited = {"n_layer": 2, "layer_pattern": "p m", "mixers": {"p": {"kind": "learned_positions", "max_seqlen": 60}}}
    recipe = dataclasses.replace(tiny("listops"), **limited | {"mixers": limited["mixers"] | {"m": {"kind": "fnet"}}})
    longer = {"max_args": 5, "min_length": 60, "max_length": 90}
    with pytest.raises(ConfigError, match=r"mixer p \(learned_positions\) has weights for 60 positions"):
        training.train(
            dataclasses.replace(recipe, data=recipe.data | longer), source(tmp_path), tmp_path / "r", console=QUIET
        )
    assert not (tmp_path / "r").exists()
    result = training.train(recipe, source(tmp_path), tmp_path / "r", console=QUIET)
    assert result["invariance"]["holds"]
    with pytest.raises(ConfigError, match="or take shorter data"):
        report.evaluate_model(str(tmp_path / "r"), generate=longer)


def test_pixels_as_numbers(tmp_path: Path) -> None:
    """A linear map of the intensity takes the place of 256 embeddings, also after loading."""
    result = training.train(
        tiny("pathfinder", "numbers=true", "steps=4"), source(tmp_path), tmp_path / "r", console=QUIET
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r" / "model")
    weight = model.model.embed_tokens.weight
    assert weight.shape == (2, 16) and result["test"]["n"] == 20
    x = model.model.embed_tokens(torch.tensor([0, 255, 51]))
    torch.testing.assert_close(
        x, torch.stack([weight[1] - weight[0], weight[1] + weight[0], weight[1] - 0.6 * weight[0]])
    )
    with pytest.raises(ConfigError, match="numbers must be False but for image"):
        tiny("listops", "numbers=true")


def test_recall_tasks_refuse_mixers_that_look_ahead() -> None:
    attention = '{"kind": "attention", "nheads": 2, "causal": false}'
    for mixer in (
        "fnet",
        attention,
        '{"kind": "s4d", "bidirectional": true}',
        '{"kind": "sum", "mixers": [{"kind": "mamba"}, {"kind": "fnet"}]}',
        f'{{"kind": "shared", "mixer": {attention}}}',
    ):
        with pytest.raises(ConfigError, match="reads what follows"):
            tiny("mqar", mixer=mixer)


def test_a_model_learns(tmp_path: Path) -> None:
    """The smallest proof that data, shifted labels, loss, optimiser and score fit together."""
    recipe = Recipe(
        name="learn",
        task="copying",
        data={"seqlen": 8, "tokens": 1, "vocab_size": 6},
        d_model=16,
        n_layer=1,
        mixers={"m": {"kind": "attention", "nheads": 2}},
        batch_size=32,
        steps=120,
        learning_rate=1e-2,
        warmup_steps=10,
        enough=0.99,
        log_every=20,
        eval_every=20,
        eval_examples=100,
    )
    result = training.train(recipe, source(tmp_path), tmp_path / "run", console=QUIET)
    assert result["test"]["accuracy"] > 0.95 and not result["failed"] and result["steps"] < 120


@pytest.mark.parametrize(
    ("mixer", "learns"),
    [
        ({"kind": "s4d", "d_state": 32}, True),
        ({"kind": "s4", "d_state": 32, "l_max": 257}, True),
        ({"kind": "sgconv", "kernel_dim": 16, "l_max": 257}, True),
        ({"kind": "gated_conv"}, False),
    ],
    ids=lambda m: m["kind"] if isinstance(m, dict) else "",
)
def test_long_kernels_recall_what_short_ones_cannot(mixer: dict, learns: bool, tmp_path: Path) -> None:
    """The recipe "far" in small: two symbols 224 positions later; what is guessed scores 1/14."""
    recipe = dataclasses.replace(
        find_recipe("far", "copying"), data={"seqlen": 256, "tokens": 2, "hold": 16}, d_model=16, n_layer=1,
        mixers={"m": mixer}, batch_size=16, steps=160, eval_every=80, learning_rate=2e-2, enough=1.0,
    )  # fmt: skip
    result = training.train(recipe, source(tmp_path), tmp_path / "run", console=QUIET)
    accuracy = result["test"]["accuracy"]
    assert accuracy > 0.75 if learns else accuracy < 0.15


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train", "copying", "--output", "{}/x", "--seeds", "0"], "should be greater than or equal to 1"),
        (["suite", "smoke", "--processes", "0"], "should be greater than or equal to 1"),
        (["suite", "smoke", "--minutes", "-1"], "should be greater than or equal to 0"),
        (["compare", "{}", "--json", "{}/nowhere/x.json"], "cannot be written"),
        (["evaluate", "--model", "{}"], "no run of seqlib-lra"),
    ],
)
def test_wrong_options_are_refused_before_any_work(arguments: list[str], reason: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": {"name": "demo"}, "data": {}}))
    call = CliRunner().invoke(cli.app, [a.format(tmp_path) for a in arguments])
    assert call.exit_code and reason in call.output + str(call.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize("task", RECALL)
def test_streams_repeat_and_move_on(task: str) -> None:
    a, b = (Stream(RECALL[task], {}, seed=3, batch_size=4, batches=5) for _ in range(2))
    assert len(a) == 20
    assert torch.equal(a[6]["input_ids"], b.batch(1)["input_ids"][2])
    assert torch.equal(a[0]["labels"], b[0]["labels"]) and not torch.equal(a[1]["input_ids"], a[5]["input_ids"])
    full = {**RECALL[task].defaults}
    made = make_batch(RECALL[task], {}, 0, 64)
    assert made.ids.max() < RECALL[task].vocab_size(full) and made.targets.max() < RECALL[task].vocab_size(full)
    assert all(0 < value < 1 for value in RECALL[task].guesses(full).values())


def test_curriculum_takes_turns() -> None:
    mix = [{"seqlen": 32, "pairs": 4}, {"seqlen": 64, "pairs": 8}]
    stream = Stream(RECALL["mqar"], {"mix": mix}, seed=0, batch_size=2, batches=4)
    assert [stream.batch(i)["input_ids"].shape[1] for i in range(4)] == [32, 64, 32, 64]
    with pytest.raises(ConfigError, match="no option pair;"):
        Stream(RECALL["mqar"], {"mix": [{"pair": 3}]}, seed=0, batch_size=2, batches=4)


def test_wilson_interval() -> None:
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0
    assert wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-3)  # z^2 / (n + z^2)
    low, high = wilson(1200, 2000)
    assert high - low == pytest.approx(0.043, abs=1e-3) and low < 0.6 < high


def test_scores_by_class_and_by_answer() -> None:
    class Fixed(torch.nn.Module):
        """Answers 1 wherever the first token is odd."""

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            odd = (input_ids[:, 0] % 2).float()
            return type("O", (), {"logits": torch.stack([1 - odd, odd], -1)})

    sequences = [np.array([i, *range(i % 3)]) for i in range(10)]
    examples = Examples.pack(sequences, [0, 1, 0, 1, 0, 1, 0, 0, 0, 0], vocab_size=16)
    score = score_examples(Fixed(), examples, 15, tokens=7)
    assert score.accuracy == 0.8 and score.per_class == {"0": round(5 / 7, 4), "1": 1.0} and score.n == 10


def test_recall_score_counts_answers_and_whole_examples() -> None:
    class Echo(torch.nn.Module):
        """Answers the token it reads."""

        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(4, 4, bias=False)
            self.lm_head.weight.data = torch.eye(4)

        def model(self, ids, use_cache):
            return type("O", (), {"last_hidden_state": torch.nn.functional.one_hot(ids, 4).float()})

    ids = np.array([[0, 1, 2], [3, 2, 1]])
    targets = np.array([[0, -100, 1], [-100, 2, 1]])
    found = score_recall(Echo(), Batch(ids, targets), tokens=3)
    assert found["answers"].accuracy == 0.75 and found["examples"].accuracy == 0.5


def test_invariance_notices_a_model_that_reads_padding() -> None:
    class Leaky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            mean = input_ids.float().mean(1)
            return type("O", (), {"logits": torch.stack([mean, -mean], -1)})

    examples = Examples.pack([np.arange(1, 2 + i) for i in range(6)], [0, 1] * 3, vocab_size=16)
    found = invariance(Leaky(), examples, 0)
    assert not found["holds"] and found["padding"] > 0.1
    batch = collate(examples, np.array([0, 2]), 0, extra=1)
    assert batch["input_ids"].tolist() == [[1, 0, 0, 0], [1, 2, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_published_recipes_describe_models_or_name_what_is_missing() -> None:
    for name, by_task in PUBLISHED.items():
        for task, values in by_task.items():
            kinds = {mixer["kind"] for mixer in values["mixers"].values()}
            if kinds <= set(MIXERS):
                recipe = find_recipe(name, task)
                assert recipe.note and recipe.steps > 1000 and recipe.task in TASKS
                assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
            else:
                with pytest.raises(ConfigError, match=f"needs the mixer {kinds.pop()}"):
                    find_recipe(name, task)
    assert {"s4", "s4d", "s5", "sgconv", "mega", "transnormer", "transformer", "mamba", "lightning"} <= set(PUBLISHED)


def test_settings_change_recipes() -> None:
    recipe = tiny("mqar", "data.pairs=4", "data.seqlen=32", "learning_rate=1", mixer='{"kind": "mamba", "d_state": 4}')
    assert recipe.data == {"pairs": 4, "seqlen": 32} and recipe.learning_rate == 1.0
    assert recipe.mixers == {"m": {"kind": "mamba", "d_state": 4}}
    for wrong, message in {
        "step=3": "did you mean steps",
        "steps=x": "is not int",
        "steps": "key=value",
    }.items():
        with pytest.raises(ConfigError, match=message):
            override(recipe, [wrong])
    for change in (
        {"schedule": "step"},
        {"eval_every": 3},
        {"learning_rate": 0.0},
        {"task": "lists"},
        {"protocol": "s5"},
    ):
        with pytest.raises(ConfigError):
            dataclasses.replace(recipe, **change)
    turns = tiny("mqar", "n_layer=2", mixer="gated_conv based")
    assert turns.layer_pattern == "m m1" and [m["kind"] for m in turns.mixers.values()] == ["gated_conv", "based"]
    with pytest.raises(ConfigError, match="no JSON object"):
        tiny("mqar", mixer='{"kind": mamba}')
    with pytest.raises(ConfigError, match="there is no recipe 's4' for mqar"):
        find_recipe("s4", "mqar")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["seqlib-lra", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0

    monkeypatch.chdir(tmp_path)
    small = [
        "--set",
        "train=50",
        "--set",
        "validation=10",
        "--set",
        "test=20",
        "--set",
        "max_length=60",
        "--set",
        "min_length=4",
    ]
    assert run("prepare", "listops", "--generate", *small, "--set", "max_depth=4", "--cache", "c") == 0
    assert "first operator" in capsys.readouterr().out
    assert run("train", "parity", "--recipe", "tiny", "--set", "steps=4", "--output", "run") == 0
    assert run("train", "--resume", "run") == 0
    assert run("evaluate", "--model", "run/seed-0", "--json", "e.json") == 0
    assert json.loads(Path("e.json").read_text())["task"] == "parity"
    capsys.readouterr()
    assert run("train", "parity", "--recipe", "tiny", "--output", "run") == 2
    assert "error: run is not empty" in capsys.readouterr().err
    assert run("prepare", "image", "--data", "nowhere") == 2
    assert "cifar-10-batches-py" in capsys.readouterr().err
