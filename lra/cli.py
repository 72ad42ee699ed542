"""The command line: seqlib-lra tasks | recipes | prepare | train | compare | evaluate | suite | table | speed | ..."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from seqlib.errors import ConfigError
from seqlib.hf.console import interruptible, run

from .arguments import (
    AnySize,
    Cache,
    Data,
    Generate,
    JsonFile,
    Processes,
    Protocol,
    Seed,
    Settings,
    for_folder,
    for_output,
    generated_with,
    given,
    refuse,
    refuse_for_training,
)  # fmt: skip

__all__ = ["main"]

app = typer.Typer(
    help="Long Range Arena and synthetic recall: data, training, evaluation, leaderboard.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def tasks(
    task: Annotated[str | None, typer.Argument(help="Show the options and sources of this one.")] = None,
) -> None:
    """List the tasks, what they ask, where their examples come from and which recipes they have."""
    from .recipes import check_task
    from .tables import task_lines, tasks_table

    if task is None:
        Console().print(tasks_table())
        return
    check_task(task)
    print("\n".join(task_lines(task)))


@app.command()
def recipes(
    task: Annotated[str | None, typer.Argument(help="Show the recipes of this task.")] = None,
    recipe: Annotated[str | None, typer.Argument(help="Show every field of this one.")] = None,
) -> None:
    """List the recipes, or every field of one with its value."""
    from .recipes import check_task, find_recipe
    from .tables import recipe_table, recipes_table

    if task is not None:
        check_task(task)
    Console().print(recipes_table(task) if task is None or recipe is None else recipe_table(find_recipe(recipe, task)))


@app.command()
def prepare(
    context: typer.Context,
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
    from . import prepare as preparing
    from .tables import baselines_table, examples_table

    console = Console()
    if generate:
        refuse(context, ["data", "any_size"], "--generate makes the examples here")
    else:
        refuse(context, ["settings", "seed"], "these options change what --generate makes")
    with interruptible("nothing was kept; give the same command again"):
        found = preparing.prepare(
            task, protocol, data=data, generate=generated_with(settings) if generate else None, seed=seed,
            any_size=any_size, cache=cache, processes=processes,
        )  # fmt: skip
    console.print(examples_table(found))
    console.print(baselines_table(found.task.baselines(found.splits)))


@app.command()
def train(
    context: typer.Context,
    task: Annotated[str | None, typer.Argument(help="A task of Long Range Arena or of the synthetic suite.")] = None,
    recipe: Annotated[str, typer.Option(help="Name of a recipe.")] = "small",
    mixer: Annotated[
        str | None, typer.Option(help='A kind for every layer, "gated_conv based" in turn, or JSON.')
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="seqlib, lra, s4 or nys; default: the recipe's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs, with seeds 0, 1, ...")] = 1,
    settings: Settings = None,
    output: Annotated[Path | None, typer.Option(callback=for_folder, help="Folder for the runs.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of runs to continue; nothing else is given then.")] = None,
    data: Data = None,
    any_size: AnySize = False,
    cache: Cache = None,
    processes: Processes = 2,
) -> None:
    """Train a recipe with one or more seeds, or continue what was interrupted."""
    from seqlib.hf.keep import locked

    from . import seeds as training
    from .data import DataSource
    from .folder import open_plan, write_plan
    from .tables import summary_table

    console = Console()
    if resume is not None:
        refuse(context, given(context).keys() - {"resume"}, "--resume takes everything from the folder")
        chosen, source, count = open_plan(resume)
        folder = resume
    else:
        if task is None or output is None:
            raise ConfigError("say what to train and where it goes: seqlib-lra train TASK --output FOLDER")
        chosen = training.configure(recipe, task, settings or [], mixer, protocol)
        refuse_for_training(context, task, settings or [], data)
        if data is not None:
            chosen = replace(chosen, data={})  # options of a generator that is not used
        source = DataSource(
            None if data is None else str(data), any_size, None if cache is None else str(cache), processes
        ).absolute()
        count, folder = seeds, output
    with locked(folder), interruptible(f"continue with: seqlib-lra train --resume {shlex.quote(str(folder))}"):
        if resume is None:
            write_plan(folder, chosen, source, count)
        summary = training.train_seeds(chosen, source, folder, range(count), console=console)
    console.print(summary_table(summary))
    if chosen.note:
        console.print(f"differs from the published recipe: {chosen.note}", style="dim", markup=False)
    console.print(f"{folder / 'summary.json'}; model, metrics and curve of each seed are beside it", markup=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Outputs of train with one recipe and different mixers.")],
    json_file: JsonFile = None,
    chart: Annotated[Path | None, typer.Option(callback=for_output, help="Draw them here: .png, .svg or .pdf.")] = None,
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
    context: typer.Context,
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

    if generate:
        refuse(context, ["data", "any_size"], "--generate makes the examples here")
    else:
        refuse(context, ["settings"], "--set changes what --generate makes")
    if data is not None:
        refuse(context, ["seed"], "--data names examples that are not generated")
    found = report.evaluate_model(
        model, task, data=data, generate=generated_with(settings) if generate else None, protocol=protocol, seed=seed,
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
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs per task and mixer.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="No run begins after this long; default: the tier's, per seed.")
    ] = None,
    output: Annotated[Path, typer.Option(callback=for_folder, help="Folder; finished runs in it are kept.")] = Path(
        "runs/suite"
    ),
    processes: Annotated[
        int, typer.Option(min=1, help="Runs at a time, each on one thread; at most one per core.")
    ] = 2,
) -> None:
    """Rank mixers on recall and state tracking: accuracy, steps to 90 %, state size, longer sequences."""
    from .suite import run_suite

    with interruptible("finished runs are kept; give the same command again to go on"):
        run_suite(
            tier, mixers=mixer, seeds=seeds, minutes=minutes, folder=output, console=Console(), processes=processes
        )


@app.command()
def speed(
    peer: Annotated[
        Path | None, typer.Option("--peer-s4", help="Checkout of state-spaces/s4; needs einops and scipy.")
    ] = None,
    long: Annotated[bool, typer.Option(help="Also one sequence of 1,048,576 positions (24 GB).")] = True,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Timed runs of each contender.")] = 7,
    budget: Annotated[float, typer.Option(min=0, max=86_400, help="Seconds for each contender and comparison.")] = 60.0,
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
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Timed runs of each.")] = 10,
    output: JsonFile = None,
) -> None:
    """Time reading, training and evaluating; generated tasks make a few hundred examples for it."""
    from . import seeds
    from .data import DataSource
    from .throughput import measure

    chosen = seeds.configure(recipe, task, settings or [], mixer, None)
    source = DataSource(None if data is None else str(data), any_size, None if cache is None else str(cache))
    found = measure(chosen, source, peer_s4=peer_s4, repeats=repeats, console=Console())
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n")


@app.command()
def table(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders with a summary.json to show beside it.")] = None,
    group: Annotated[str | None, typer.Option(help="jax, small or ssm; default: all published rows.")] = None,
    output: Annotated[
        Path | None, typer.Option(callback=for_folder, help="Folder for table.txt, .md, .json and .png.")
    ] = None,
) -> None:
    """The published leaderboard with sources, our runs beside it, and both ways of averaging."""
    from .leaderboard import show

    show(runs or [], group, output, Console())


def main() -> None:
    """Run the command line; an error of the library is one line, not a traceback."""
    run(app)


if __name__ == "__main__":
    main()
