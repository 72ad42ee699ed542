"""The suite, comparisons and the table of Long Range Arena, and the sizes that mixers get in small models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_lra_train import QUIET, source, tiny
from typer.testing import CliRunner

from seqlib.bench import markdown
from seqlib.errors import ConfigError
from seqlib.lra import charts, cli, leaderboard, seeds, suite
from seqlib.lra.compare import compare_runs, plot_comparison
from seqlib.lra.scores import GROUPS, rows
from seqlib.mixers import MIXERS, build_mixer, looks_ahead, sized

NEED_OPTIONS = {"sum", "shared"}  # of other mixers
CAUSAL = [kind for kind in MIXERS if kind not in NEED_OPTIONS and not looks_ahead({"kind": kind})]


def test_runs_of_one_recipe_side_by_side(tmp_path: Path) -> None:
    """Best first, on the page too; runs that were trained otherwise are no comparison."""
    for name, mixer, rate in (("a", "gated_conv", "1e-3"), ("b", "linear_transformer", "1e-3"), ("c", "lru", "1e-2")):
        options = ["--recipe", "tiny", "--mixer", mixer, "--set", f"learning_rate={rate}"]
        call = CliRunner().invoke(cli.app, ["train", "copying", *options, "--output", str(tmp_path / name)])
        assert call.exit_code == 0, call.output
    bench = tmp_path / "bench"
    bench.mkdir()
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    files = ["--json", str(bench / "x.json"), "--chart", str(bench / "x.svg")]
    assert CliRunner().invoke(cli.app, ["compare", *runs, *files]).exit_code == 0
    found = json.loads((bench / "x.json").read_text())
    rows = found["comparison"]
    assert rows[0]["mean"] >= rows[1]["mean"]
    assert {row["mixers"]["m"]["kind"] for row in rows} == {"gated_conv", "linear_transformer"}
    score = json.loads((tmp_path / "a" / "summary.json").read_text())["mean"]
    gain = score - found["baselines"]["any symbol"]
    page = markdown.page(bench)
    assert f"| gated_conv | {100 * score:.1f} % | {100 * gain:+.1f} | 12 |" in page and "![x](bench/x.svg)" in page
    with pytest.raises(ConfigError, match="a chart ends in one of"):
        plot_comparison(found, bench / "x.txt")
    with pytest.raises(ConfigError, match="differs in learning_rate"):
        compare_runs([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ConfigError, match="has no summary.json"):
        compare_runs([tmp_path])


@pytest.mark.parametrize("kind", CAUSAL)
def test_mixers_by_name_are_sized_for_the_model(kind: str) -> None:
    """As the suite sizes them, whatever else is set, and every kind that needs no further option fits."""
    recipe = seeds.configure("small", "parity", ["d_model=32", "n_layer=1"], kind, None)
    assert recipe.mixers == {"m": suite.named_mixers([kind], 32)[kind][0]} == {"m": sized({"kind": kind}, 32)}
    build_mixer(recipe.mixers["m"], 32)


def test_what_is_said_of_a_mixer_is_kept() -> None:
    heads = seeds.configure("small", "parity", ["mixers.m.nheads=1"], "gla", None)
    assert heads.mixers["m"]["nheads"] == 1
    default = MIXERS["gla"].Config().nheads  # said, although it is the default
    said = f'{{"kind": "gla", "nheads": {default}}}'
    assert seeds.configure("small", "parity", ["d_model=32"], said, None).mixers["m"]["nheads"] == default
    assert suite.named_mixers([said], 32)[f"gla nheads={default}"][0]["nheads"] == default
    with pytest.raises(ConfigError, match="unknown mixer kind|needs the mixer"):
        seeds.configure("small", "parity", [], "gala", None)


def test_published_averages_recompute() -> None:
    """Every published average follows from its row in one of both conventions, but for two."""
    wrong = set()
    for row in rows():
        if row.published_average is not None:
            distances = [
                abs(v - row.published_average) for v in (row.average(False), row.average(True)) if v is not None
            ]
            wrong |= {row.model} if min(distances) > 0.051 and "Table 3" not in row.source else set()
            assert min(distances) < 0.25, row.model
    assert wrong == {"Sinkhorn", "RWKV-4"}
    transformer = next(row for row in rows("jax") if row.model == "Transformer")
    assert transformer.average(False) == pytest.approx(54.39, abs=0.01)
    assert transformer.average(True) == pytest.approx(53.66, abs=0.01)


def test_table_holds_published_and_own_rows(tmp_path: Path) -> None:
    seeds.train_seeds(tiny("listops", "steps=4"), source(tmp_path), tmp_path / "mine", [0, 1], console=QUIET)
    leaderboard.show([tmp_path / "mine"], None, tmp_path / "out", QUIET)
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"table.txt", "table.md", "table.json", "table.png"}
    values = json.loads(written["table.json"].read_text())
    assert set(values["published"]) == set(GROUPS) and values["ours"][0]["seeds"] == [0, 1]
    for name in ("table.txt", "table.md"):
        text = written[name].read_text()
        assert "Megalodon" in text and "mine (tiny)" in text and "±" in text
    with pytest.raises(ConfigError, match="no summary.json"):
        leaderboard.show([tmp_path], None, None, QUIET)


def test_suite_ranks_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = (
        suite.Trial("parity 8", "parity", {"seqlen": 8}, 50),
        suite.Trial("copy", "copying", {"seqlen": 16, "tokens": 2}, 50),
    )
    monkeypatch.setitem(suite.TIERS, "smoke", suite.Tier(trials, 5, d_model=16, n_layer=1, batch_size=8))
    asked = {
        "mixers": ["mamba", '{"kind": "attention", "nheads": 2}'],
        "seeds": 1,
        "folder": tmp_path,
        "console": QUIET,
    }
    part = suite.run_suite("smoke", minutes=0, **asked)
    assert part["left_out"] == 4 and part["rows"] == []
    result = suite.run_suite("smoke", minutes=5, **asked)
    assert {entry["mixer"] for entry in result["ranking"]} == {"mamba", "attention nheads=2"} and len(
        result["rows"]
    ) == 4
    means = [entry["mean"] for entry in result["ranking"]]
    assert means == sorted(means, reverse=True)
    assert result["rows"][0]["by_length"].keys() == {"8", "16", "32"}
    assert {"suite.json", "suite.md", "state.png", "length.png"} <= {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(suite, "train", None)  # nothing is trained a second time
    assert suite.run_suite("smoke", minutes=5, **asked)["rows"] == result["rows"]
    with pytest.raises(ConfigError, match="unknown mixer kind 'x'"):
        suite.run_suite("smoke", minutes=5, **(asked | {"mixers": ["x"]}))


# These two have no size of their own: they say which mixers they are made of.
@pytest.mark.parametrize("kind", sorted(MIXERS.keys() - {"shared", "sum"}))
def test_every_mixer_has_a_size_for_the_suite(kind: str) -> None:
    for d_model in (16, 64):
        ((config,),) = suite.named_mixers([kind], d_model).values()
        mixer = build_mixer(config, d_model)
        assert mixer.state_bytes(1, 64) < 1 << 20


def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """Figures that are drawn from now on."""
    figures: list = []
    monkeypatch.setattr(charts, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def row(trial: str, mixer: str, state: int, by_length: dict[str, float]) -> dict:
    return {"trial": trial, "mixer": mixer, "state_bytes": state, "accuracy": 0.5, "by_length": by_length,
            "baselines": {"any symbol": 0.1, "either bit": 0.5}}  # fmt: skip


def test_charts_have_plain_numbers_and_trivial_answers_and_no_empty_panel(monkeypatch, tmp_path: Path) -> None:
    figures = drawn(monkeypatch)
    made = [row("a", "x", 19_456, {"64": 0.5}), row("a", "y", 140_288, {"64": 0.2, "128": 0.1}), row("b", "x", 900, {})]
    charts.plot_state(made, tmp_path / "state.png")
    charts.plot_length(made, tmp_path / "length.png")
    state, length = figures
    for figure in figures:
        figure.canvas.draw()
    assert [panel.get_title() for panel in state.axes] == ["a", "b"]
    assert [panel.get_title() for panel in length.axes] == ["a"]  # nothing is known of the other
    assert [text.get_text() for text in state.axes[0].get_xticklabels()] == ["19,456", "140,288"]
    assert [text.get_text() for text in length.axes[0].get_xticklabels()] == ["64", "128"]
    for panel in (*state.axes, *length.axes):
        assert {text.get_text() for text in panel.texts} == {"any symbol", "either bit"}
        assert not [text for text in panel.get_xticklabels(minor=True) if text.get_text()]


def test_chart_of_the_table_leaves_out_tasks_without_scores(monkeypatch, tmp_path: Path) -> None:
    figures = drawn(monkeypatch)
    mine = {"task": "listops", "mean": 0.5, "std": None, "mixers": {"m": {"kind": "mamba"}}, "recipe": "tiny"}
    charts.plot_leaderboard({"small": rows("small")}, [mine | {"reduced": "60 examples"}], tmp_path / "x.png")
    assert [panel.get_title() for panel in figures[0].axes] == ["ListOps", "Text", "Retrieval", "Image", "Pathfinder"]
    line = figures[0].axes[0].lines[-1]
    assert line.get_linestyle() == "--" and "reduced data" in line.get_label()


def test_curve_of_a_run_without_an_evaluation_has_one_panel(monkeypatch, tmp_path: Path) -> None:
    figures = drawn(monkeypatch)
    (tmp_path / "m.jsonl").write_text('{"step": 2, "loss": 0.5}\n')
    charts.plot_curve(tmp_path / "m.jsonl", tmp_path / "c.png", {"majority class": 0.5})
    assert [panel.get_ylabel() for panel in figures[0].axes] == ["training loss (nats)"]


def test_suite_says_where_its_results_are_and_nothing_of_others(tmp_path: Path) -> None:
    """In processes of their own, as the command line runs it."""
    code = """
from seqlib.lra import cli, suite
if __name__ == "__main__":
    trials = (suite.Trial("parity 8", "parity", {"seqlen": 8}, 50),)
    suite.TIERS["smoke"] = suite.Tier(trials, 5, d_model=16, n_layer=1, batch_size=8)
    cli.main()
"""
    (tmp_path / "run.py").write_text(code)
    command = [
        sys.executable,
        str(tmp_path / "run.py"),
        "suite",
        "smoke",
        "--mixer",
        "mamba",
        "--mixer",
        "lru",
        "--output",
        "s",
    ]
    call = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert call.stderr == ""
    assert (
        "parity 8  mamba  seed 0: " in call.stdout
        and "written to s:" in call.stdout
        and "state.png, length.png" in " ".join(call.stdout.split())
    )


def test_suite_does_not_show_runs_of_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(steps: int) -> dict:
        trials = (suite.Trial("parity 8", "parity", {"seqlen": 8}, steps),)
        monkeypatch.setitem(suite.TIERS, "smoke", suite.Tier(trials, 5, d_model=16, n_layer=1, batch_size=8))
        console = Console(quiet=True)
        return suite.run_suite("smoke", mixers=["mamba"], seeds=1, minutes=5, folder=tmp_path, console=console)

    once(50)
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        once(100)
