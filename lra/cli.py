"""The command line: seqlib-lra prepare | train | compare | evaluate | suite | speed | throughput | table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from seqlib.errors import ConfigError, SeqlibError

__all__ = ["main"]

app = typer.Typer(
    help="Long Range Arena and synthetic recall: data, training, evaluation, leaderboard.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _for_writing(path: Path | None) -> Path | None:
    from seqlib.hf.runs import for_writing

    return for_writing(path)


JsonFile = Annotated[Path | None, typer.Option("--json", callback=_for_writing, help="Write the figures here.")]
Data = Annotated[Path | None, typer.Option(help="Folder or archive that holds the data of the task.")]
Generate = Annotated[bool, typer.Option("--generate", help="Make the examples here (listops, pathfinder).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, changes an option or a field of the recipe.")
]
Protocol = Annotated[str, typer.Option(help="seqlib, lra, s4 or nys: how data is cut, split and read.")]
AnySize = Annotated[bool, typer.Option("--any-size", help="Accept splits of other sizes than the published ones.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of prepared data; default: the cache of `datasets`.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that generate images.")]
Seed = Annotated[int, typer.Option(help="Seed of generated data.")]


@app.command()
def prepare(
    task: Annotated[str, typer.Argument(help="listops, text, retrieval, image, pathfinder, pathx or pathfinder256.")],
    data: Data = None,
    generate: Generate = False,
    settings: Settings = None,
    protocol: Protocol = "seqlib",
    seed: Seed = 0,
    any_size: AnySize = False,
    cache: Cache = None,
    processes: Processes = 2,
) -> None:
    """Read or make the examples of a task, check them, cache them, and show the trivial answers."""
    console = Console()
    found = _prepared(task, data, generate, settings, protocol, seed, any_size, cache, processes)
    console.print(examples_table(found))
    console.print(baselines_table(found.task.baselines(found.splits)))


@app.command()
def train(
    task: Annotated[str | None, typer.Argument(help="A task of Long Range Arena or of the synthetic suite.")] = None,
    recipe: Annotated[str, typer.Option(help="Name of a recipe.")] = "small",
    mixer: Annotated[
        str | None, typer.Option(help='A kind for every layer, "gated_conv based" in turn, or JSON.')
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="seqlib, lra, s4 or nys; default: the recipe's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, with seeds 0, 1, ...")] = 1,
    settings: Settings = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the runs.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of runs to continue; nothing else is given then.")] = None,
    data: Data = None,
    any_size: AnySize = False,
    cache: Cache = None,
    processes: Processes = 2,
) -> None:
    """Train a recipe with one or more seeds, or continue what was interrupted."""
    from . import seeds as training
    from .train import DataSource

    console = Console()
    if resume is not None:
        if task or output or settings or data:
            raise ConfigError("--resume takes everything from the folder; leave out task, --output, --set and --data")
        chosen, source, count = training.open_plan(resume)
        folder = resume
    else:
        if task is None or output is None:
            raise ConfigError("say what to train and where it goes: seqlib-lra train TASK --output FOLDER")
        chosen = training.configure(recipe, task, settings or [], mixer, protocol)
        source = DataSource(
            None if data is None else str(data), any_size, None if cache is None else str(cache), processes
        )
        count, folder = seeds, output
        training.write_plan(folder, chosen, source, count)
    summary = training.train_seeds(chosen, source, folder, range(count), console=console)
    console.print(summary_table(summary))
    if chosen.note:
        console.print(f"[dim]differs from the published recipe: {chosen.note}[/dim]")
    console.print(f"{folder / 'summary.json'}; model, metrics and curve of each seed are beside it")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Outputs of train with one recipe and different mixers.")],
    json_file: JsonFile = None,
    chart: Annotated[
        Path | None, typer.Option(callback=_for_writing, help="Draw them here: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Put finished runs that differ only in their mixers side by side."""
    from .compare import compare_runs, plot_comparison, show_comparison

    found = compare_runs(runs)
    show_comparison(found, Console())
    if chart is not None:
        plot_comparison(found, chart)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Run folder, model folder or hub name.")],
    task: Annotated[str | None, typer.Option(help="Default: the task of the run.")] = None,
    data: Data = None,
    generate: Generate = False,
    settings: Settings = None,
    protocol: Annotated[str | None, typer.Option(help="Default: the protocol of the run.")] = None,
    seed: Seed = 0,
    any_size: AnySize = False,
    cache: Cache = None,
    output: JsonFile = None,
) -> None:
    """Accuracy with its interval, by class, speed, memory, and whether it depends on batching or padding."""
    from . import report

    found = report.evaluate_model(
        model, task, data=data, generate=_options(settings) if generate else None, protocol=protocol, seed=seed,
        any_size=any_size, cache=cache,
    )  # fmt: skip
    report.show_evaluation(found, Console())
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n")


@app.command()
def suite(
    tier: Annotated[str, typer.Argument(help="smoke (a minute), quick (15 minutes on two cores) or long.")] = "quick",
    mixer: Annotated[
        list[str] | None,
        typer.Option(
            help='Kinds to rank, "gated_conv based" for layers in turn, or JSON; default: some of each family.'
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per task and mixer.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="No run begins after this long; default: the tier's, per seed.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder; finished runs in it are kept.")] = Path("runs/suite"),
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time, each on one thread if there are several.")] = 2,
) -> None:
    """Rank mixers on recall and state tracking: accuracy, steps to 90 %, state size, longer sequences."""
    from .suite import run_suite

    run_suite(tier, mixers=mixer, seeds=seeds, minutes=minutes, folder=output, console=Console(), processes=processes)


@app.command()
def speed(
    peer: Annotated[
        Path | None, typer.Option("--peer-s4", help="Checkout of state-spaces/s4; needs einops and scipy.")
    ] = None,
    long: Annotated[bool, typer.Option(help="Also one sequence of 1,048,576 positions (24 GB).")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each contender.")] = 7,
    budget: Annotated[float, typer.Option(help="Seconds for each contender and comparison.")] = 60.0,
    json_file: JsonFile = None,
) -> None:
    """Time state-space layers beside the code that published them, checked for equal results first."""
    from .speed import LONG, bench_state_spaces, show_state_spaces

    found = bench_state_spaces(peer, long=LONG if long else None, repeats=repeats, budget=budget)
    show_state_spaces(found, json_file, Console())


@app.command()
def throughput(
    task: Annotated[str, typer.Argument(help="A task of Long Range Arena.")] = "listops",
    recipe: Annotated[str, typer.Option(help="Name of a recipe.")] = "s4d",
    mixer: Annotated[str | None, typer.Option(help="A mixer for every layer, a kind or JSON.")] = None,
    settings: Settings = None,
    data: Data = None,
    any_size: AnySize = False,
    cache: Cache = None,
    peer_s4: Annotated[Path | None, typer.Option(help="Checkout of state-spaces/s4; needs einops and scipy.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 10,
    output: JsonFile = None,
) -> None:
    """Time reading, training and evaluating; generated tasks make a few hundred examples for it."""
    from . import seeds
    from .throughput import measure
    from .train import DataSource

    chosen = seeds.configure(recipe, task, settings or [], mixer, None)
    source = DataSource(None if data is None else str(data), any_size, None if cache is None else str(cache))
    found = measure(chosen, source, peer_s4=peer_s4, repeats=repeats, console=Console())
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n")


@app.command()
def table(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders with a summary.json to show beside it.")] = None,
    group: Annotated[str | None, typer.Option(help="jax, small or ssm; default: all published rows.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for table.txt, .md, .json and .png.")] = None,
) -> None:
    """The published leaderboard with sources, our runs beside it, and both ways of averaging."""
    from .leaderboard import show

    show(runs or [], group, output, Console())


def _options(settings: list[str] | None) -> dict[str, Any]:
    options = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals or not text.lstrip("-").isdigit():
            raise ConfigError(f"--set takes NAME=NUMBER here, got {setting!r}")
        options[key.strip()] = int(text)
    return options


def _prepared(
    task: str, data: Path | None, generate: bool, settings: list[str] | None, protocol: str, seed: int, any_size: bool,
    cache: Path | None, processes: int,
) -> Any:  # fmt: skip
    from . import prepare as preparing

    if generate and data is not None:
        raise ConfigError("give --data or --generate, not both")
    if settings and not generate:
        raise ConfigError("--set changes what is generated; add --generate")
    return preparing.prepare(
        task, protocol, data=data, generate=_options(settings) if generate else None, seed=seed, any_size=any_size,
        cache=cache, processes=processes,
    )  # fmt: skip


def examples_table(found: Any) -> Table:
    """Sizes, labels and lengths of the splits."""
    shown = Table("split", "examples", "mean length", "longest", "labels (%)", title=found.task.title)
    for split, facts in found.manifest["splits"].items():
        shares = " ".join(f"{100 * n / facts['examples']:.1f}" for n in facts["labels"])
        shown.add_row(
            split, f"{facts['examples']:,}", f"{facts['mean_length']:,}", f"{facts['lengths']['1']:,}", shares
        )
    return shown


def baselines_table(found: dict[str, float]) -> Table:
    shown = Table("answers without a sequence model", "test accuracy (%)")
    for name, value in found.items():
        shown.add_row(name, f"{100 * value:.1f}")
    return shown


def summary_table(summary: dict[str, Any]) -> Table:
    """Score over seeds and its gain over every trivial answer."""
    mean, std = 100 * summary["mean"], summary["std"]
    spread = f" ± {100 * std:.2f} ({len(summary['seeds'])} seeds)" if std is not None else ""
    interval = summary["interval"]
    if interval:
        spread = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f}, 95 %)"
    shown = Table(
        "", "test accuracy (%)", "gain", title=f"{summary['task']}, {summary['layer_pattern']} {summary['mixers']}"
    )
    shown.add_row("this model", f"{mean:.2f}{spread}", "")
    for name, value in summary["baselines"].items():
        shown.add_row(name, f"{100 * value:.1f}", f"{mean - 100 * value:+.1f}")
    if summary["failed_seeds"]:
        shown.caption = f"seeds that learnt nothing: {', '.join(map(str, summary['failed_seeds']))}"
    return shown


def main() -> None:
    """Run the command line; an error of the library is one line, not a traceback."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        app()
    except (SeqlibError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; training continues with `seqlib-lra train --resume FOLDER`", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
