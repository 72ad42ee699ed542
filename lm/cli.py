"""The command line: seqlib-lm train | recipes | evaluate | generate | sweep | bench | demo."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from seqlib.errors import ConfigError
from seqlib.hf.console import interruptible, run
from seqlib.hf.runs import for_folder, for_writing, is_run, override

from .recipes import RECIPES, Recipe
from .runs import DataSpec, check_new
from .show import evaluation_table, plain_console, recipe_lines, tell_corpus, tell_run

__all__ = ["main"]

app = typer.Typer(
    help="Train, evaluate and generate with state-space, linear-attention and hybrid language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Sources = Annotated[
    list[str] | None,
    typer.Argument(help="Text files, folders or data set names, in any mix; none: Python's standard library."),
]


JsonFile = Annotated[Path | None, typer.Option("--json", callback=for_writing, help="Write the figures here.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value, changes a field of the recipe.")]
Suffix = Annotated[list[str] | None, typer.Option(help="Take only files of folders that end so, such as .py.")]
Column = Annotated[str | None, typer.Option(help="Text column of data sets.")]


@app.command()
def train(
    sources: Sources = None,
    recipe: Annotated[str | None, typer.Option(help="Name, see `seqlib-lm recipes`; default: demo.")] = None,
    settings: Settings = None,
    output: Annotated[Path | None, typer.Option(callback=for_folder, help="Run folder to create.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Train further: a finished run, or a folder or hub name of a model.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to continue; nothing else is given then.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write curves for TensorBoard too.")] = False,
    suffix: Suffix = None,
    column: Column = None,
) -> None:
    """Train a model into a run folder, or continue a run that was interrupted."""
    from . import train as training

    console = plain_console()
    if resume is not None:
        if sources or recipe or settings or output or suffix or column or start or tensorboard:
            raise ConfigError("--resume takes text and recipe from the run folder; leave out everything else")
        with interruptible(f"continue with: {_resuming(resume)}"):
            run = training.resume(resume, console=console)
    else:
        if output is None:
            raise ConfigError("say where the run goes with --output FOLDER")
        data, chosen = _data(sources, suffix, column), _recipe(recipe or "demo", settings)
        if start is not None:
            start = str(Path(start).absolute()) if Path(start).exists() else start
            _refuse_sizes(settings)
            chosen = training.started_from(chosen, start)
        check_new(output)
        corpus = data.read(chosen)
        tell_corpus(console, corpus)

        def go_on() -> str:
            begun = is_run(output)
            return f"continue with: {_resuming(output)}" if begun else "nothing was kept; give the same command again"

        with interruptible(go_on):
            run = training.train(
                chosen, data, output, console=console, corpus=corpus, start=start, tensorboard=tensorboard
            )
    tell_run(console, run)


def _resuming(folder: Path) -> str:
    return f"seqlib-lm train --resume {shlex.quote(str(folder))}"


def _data(sources: list[str] | None, suffix: list[str] | None, column: str | None) -> DataSpec:
    if not sources and (suffix or column):
        raise ConfigError("--suffix and --column choose from text that is named; name it, or leave them out")
    return DataSpec.of(sources or (), suffix or (), column)


def _recipe(name: str, settings: list[str] | None) -> Recipe:
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return override(RECIPES[name](), settings or [])


def _refuse_sizes(settings: list[str] | None) -> None:
    from .train import FROM_START

    useless = {setting.partition("=")[0].split(".")[0].strip() for setting in settings or []} & {*FROM_START}
    if useless:
        raise ConfigError(f"--from brings its own {', '.join(sorted(useless))}; leave out --set of it")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show every field of this one.")] = None,
) -> None:
    """List the recipes, or the fields of one, which --set changes."""
    print("\n".join(recipe_lines(name)))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub name.")],
    sources: Sources = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test; default: test of the run's own text.")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward; bounds memory, changes nothing else.")] = 2048,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Stop after the document that reaches it.")] = None,
    output: JsonFile = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=(1 << 32) - 1, help="Of the split of sources; default: 0.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub name, if not with the model.")] = None,
    suffix: Suffix = None,
    column: Column = None,
) -> None:
    """Bits per byte and perplexity, the state carried through whole documents.

    Every byte counts; the first of a document is predicted from the token that stands before each document. Documents
    that a run was trained on are left out of other text, unless --split train asks for them.
    """
    from .data import tokenize
    from .evaluate import evaluate as score
    from .generate import load_model
    from .scoring import Following, documents_of

    if seed is not None and not (sources and split):
        raise ConfigError("--seed decides how sources are split for --split; leave it out, or give both")
    console = plain_console()
    documents = documents_of(model, _data(sources, suffix, column), split, seed or 0, console)
    loaded, words = load_model(model, tokenizer)
    tokens = tokenize(documents, words)
    with interruptible("nothing was kept; --max-bytes scores a part"), Following(tokens, max_bytes) as following:
        found = score(loaded, tokens, chunk=chunk, max_bytes=max_bytes, progress=following)
    console.print(evaluation_table(found))
    if output is not None:
        output.write_text(json.dumps({"model": model, "chunk": chunk} | found.to_dict(), indent=2) + "\n")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Run folder, or folder or hub name of a checkpoint we can open.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; default: standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File that holds the prompt.")] = None,
    lines: Annotated[
        Path | None, typer.Option(help='JSON lines with a "prompt" or "messages" each; answers come as JSON lines.')
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=1 << 16, help="Lines continued together; default: 8.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Share of the probability to sample from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Number of tokens to sample from; 0: all.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, any field of transformers' GenerationConfig.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub name, if not with the model.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=(1 << 32) - 1, help="Makes sampling repeatable.")] = None,
) -> None:
    """Continue a prompt, streaming to the terminal, or many prompts of a file."""
    from . import generate as generation
    from .settings import parse_settings

    if lines is not None and (prompt is not None or prompt_file is not None):
        raise ConfigError("give either --lines or a prompt, not both")
    if batch_size is not None and lines is None:
        raise ConfigError("--batch-size is for --lines; leave it out")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "raw": raw,
        "settings": parse_settings(settings or []),
    }
    given = generation.read_prompt(prompt, prompt_file) if lines is None else None
    loaded, words = generation.load_model(model, tokenizer)
    if given is not None:
        found = generation.generate(loaded, words, given, out=sys.stdout, **options)
        _tell_speed(found.new_tokens, found.seconds)
        return
    assert lines is not None
    begun, count = time.perf_counter(), 0
    with _readable(lines) as file:
        for row in generation.generate_lines(loaded, words, file, batch_size=batch_size or 8, **options):
            print(_json_line(row), flush=True)
            count += row["new_tokens"]
    _tell_speed(count, time.perf_counter() - begun)


def _json_line(row: dict[str, Any]) -> str:
    """As readable as it can be written: halves of characters, which fields may hold, only as escapes."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(row)
    return line


def _tell_speed(new_tokens: int, seconds: float) -> None:
    Console(stderr=True).print(f"{new_tokens} tokens, {new_tokens / seconds:.1f} tokens/s", style="dim")


def _readable(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


@app.command()
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="Ops; mamba-130m for whole models, linear-family for its table, busy; none: all ops."),
    ] = None,
    json_file: JsonFile = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for ops.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Timed runs of each contender.")] = 15,
    budget: Annotated[float, typer.Option(min=0, max=86_400, help="Seconds for each contender and comparison.")] = 5.0,
) -> None:
    """Time ops and models beside their peers in transformers, each checked for equal results first."""
    from seqlib.bench import report

    from .bench import OP_PEERS, report_busy, report_linear_family, report_mamba

    if what == ["busy"]:
        report_busy(json_file, repeats=repeats)
        return
    if what == ["linear-family"]:
        report_linear_family(json_file, repeats=repeats, budget=budget)
        return
    if what == ["mamba-130m"]:
        report_mamba(json_file, repeats=repeats, budget=budget)
        return
    arguments = [*(what or []), "--dtype", dtype, "--repeats", str(repeats), "--budget", str(budget)]
    raise typer.Exit(report.main([*arguments, *(["--json", str(json_file)] if json_file else [])], peers=OP_PEERS))


@app.command()
def sweep(
    sources: Sources = None,
    mixers: Annotated[
        list[str] | None, typer.Option("--mixer", help="A kind, or a JSON config with a kind; none: all kinds.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="What every mixer is trained with.")] = "mixer_sweep",
    settings: Settings = None,
    output: Annotated[
        Path, typer.Option(callback=for_folder, help="Folder of runs; finished ones in it are kept.")
    ] = Path("runs/sweep"),
    max_bytes: Annotated[int, typer.Option(min=1, help="Test bytes to score, in whole documents.")] = 300_000,
    json_file: JsonFile = None,
    suffix: Suffix = None,
    column: Column = None,
) -> None:
    """Train every mixer on the same text with as many parameters and steps, and rank them by bits per byte."""
    from .sweep import run_sweep, sweep_table

    chosen, data, console = _recipe(recipe, settings), _data(sources, suffix, column), plain_console()
    with interruptible("finished runs are kept; give the same command again to go on"):
        made = run_sweep(output, chosen, mixers=mixers, data=data, max_bytes=max_bytes, console=console)
    console.print("", sweep_table(made))
    if json_file is not None:
        json_file.write_text(json.dumps(made, indent=1) + "\n")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(callback=for_folder, help="Run folder; an earlier demo in it is replaced, nothing else.")
    ] = Path("runs/demo"),
    minutes: Annotated[
        float,
        typer.Option(
            help="Time for everything but compiling the kernels; up to three times as much until the model beats a "
            "4-gram model."
        ),
    ] = 5.0,
    settings: Settings = None,
) -> None:
    """Train on Python's own sources, compare with an n-gram model, save, load, generate."""
    from .demo import run_demo

    with interruptible("give the same command again to begin anew"):
        run_demo(output, minutes=minutes, settings=settings or [], console=plain_console())


def main() -> None:
    """Run the command line; an error of the library is one line, not a traceback."""
    run(app)


if __name__ == "__main__":
    main()
