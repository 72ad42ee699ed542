"""The command line: seqlib-lm train | evaluate | generate | demo."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from seqlib.errors import ConfigError, SeqlibError

from .corpus import SPLITS, Corpus

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


def _for_writing(path: Path | None) -> Path | None:
    from seqlib.hf.runs import for_writing

    return for_writing(path)


JsonFile = Annotated[Path | None, typer.Option("--json", callback=_for_writing, help="Write the figures here.")]
Suffix = Annotated[list[str] | None, typer.Option(help="Take only files of folders that end so, such as .py.")]
Column = Annotated[str | None, typer.Option(help="Text column of data sets.")]


@app.command()
def train(
    sources: Sources = None,
    recipe: Annotated[str | None, typer.Option(help="Name of a recipe; default: demo.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, changes a field of the recipe.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder to create.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to continue; nothing else is given then.")] = None,
    suffix: Suffix = None,
    column: Column = None,
) -> None:
    """Train a model into a run folder, or continue a run that was interrupted."""
    from seqlib.hf.runs import override

    from . import train as training
    from .recipes import RECIPES

    console = _console()
    if resume is not None:
        if sources or recipe or settings or output or suffix or column:
            raise ConfigError("--resume takes text and recipe from the run folder; leave out everything else")
        run = training.resume(resume, console=console)
    else:
        if (recipe or "demo") not in RECIPES:
            raise ConfigError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
        if output is None:
            raise ConfigError("say where the run goes with --output FOLDER")
        chosen = override(RECIPES[recipe or "demo"](), settings or [])
        data = training.DataSpec.of(sources or (), suffix or (), column)
        corpus = data.read(chosen)
        tell_corpus(console, corpus)
        run = training.train(chosen, data, output, console=console, corpus=corpus)
    console.print(f"model: {run.model}\nmetrics: {run.metrics}\nplot: {run.folder / 'loss.png'}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub name.")],
    sources: Sources = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test; default: test of the run's own text.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens per forward; bounds memory, changes nothing else.")] = 2048,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Stop after the document that reaches it.")] = None,
    output: JsonFile = None,
    seed: Annotated[int, typer.Option(help="Seed of the split, where --split is given with sources.")] = 0,
    suffix: Suffix = None,
    column: Column = None,
) -> None:
    """Bits per byte and perplexity, the state carried through whole documents.

    Every byte counts; the first of a document is predicted from the token that stands before each document.
    """
    from .corpus import read_corpus, read_documents
    from .data import tokenize
    from .evaluate import evaluate as score
    from .generate import load_model
    from .train import open_run

    if sources and split:
        documents = list(read_corpus(sources, seed=seed, suffixes=suffix or (), column=column).split(split))
    elif sources:
        documents = read_documents(sources, suffixes=suffix or (), column=column)
    elif not (Path(model) / "recipe.json").is_file():
        raise ConfigError(f"{model} is no run folder that knows its test text; say which text to evaluate on")
    else:
        documents = list(open_run(Path(model)).corpus().split(split or "test"))
    loaded, tokenizer = load_model(model)
    found = score(loaded, tokenize(documents, tokenizer), chunk=chunk, max_bytes=max_bytes)
    _console().print(evaluation_table(found))
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
    batch_size: Annotated[int, typer.Option(min=1, help="Lines continued together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Share of the probability to sample from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Number of tokens to sample from; 0: all.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, any field of transformers' GenerationConfig.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub name, if not with the model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Continue a prompt, streaming to the terminal, or many prompts of a file."""
    from . import generate as generation
    from .settings import parse_settings

    if lines is not None and (prompt is not None or prompt_file is not None):
        raise ConfigError("give either --lines or a prompt, not both")
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
        for row in generation.generate_lines(loaded, words, file, batch_size=batch_size, **options):
            print(json.dumps(row, ensure_ascii=False), flush=True)
            count += row["new_tokens"]
    _tell_speed(count, time.perf_counter() - begun)


def _tell_speed(new_tokens: int, seconds: float) -> None:
    Console(stderr=True).print(f"{new_tokens} tokens, {new_tokens / seconds:.1f} tokens/s", style="dim")


def _readable(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


@app.command()
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="Ops; or mamba-130m for whole models, linear-family for its table; none: all ops."),
    ] = None,
    json_file: JsonFile = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for ops.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each contender.")] = 15,
    budget: Annotated[float, typer.Option(help="Seconds for each contender and comparison.")] = 5.0,
) -> None:
    """Time ops and models beside their peers in transformers, each checked for equal results first."""
    from seqlib.bench import report

    from .bench import OP_PEERS, report_linear_family, report_mamba

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
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, changes a field of the recipe.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of runs; finished ones in it are kept.")] = Path("runs/sweep"),
    max_bytes: Annotated[int, typer.Option(min=1, help="Test bytes to score, in whole documents.")] = 300_000,
    json_file: JsonFile = None,
    suffix: Suffix = None,
    column: Column = None,
) -> None:
    """Train every mixer on the same text with as many parameters and steps, and rank them by bits per byte."""
    from seqlib.hf.runs import override

    from .recipes import RECIPES
    from .sweep import run_sweep, sweep_table
    from .train import DataSpec

    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    chosen, data, console = (
        override(RECIPES[recipe](), settings or []),
        DataSpec.of(sources or (), suffix or (), column),
        _console(),
    )
    made = run_sweep(output, chosen, mixers=mixers, data=data, max_bytes=max_bytes, console=console)
    console.print("", sweep_table(made))
    if json_file is not None:
        json_file.write_text(json.dumps(made, indent=1) + "\n")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Run folder; an earlier demo in it is replaced.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Time for everything; training gets what the rest leaves.")] = 5.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, changes a field of the recipe.")
    ] = None,
) -> None:
    """Train on Python's own sources, compare with an n-gram model, save, load, generate."""
    from .demo import run_demo

    run_demo(output, minutes=minutes, settings=settings or [], console=_console())


def _console() -> Console:
    """No markup, because names of files are printed; no wrapping, because lines may be read by programs."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def tell_corpus(console: Console, corpus: Corpus) -> None:
    """How much text there is, and what was passed over."""
    parts = [f"{split} {len(corpus.split(split)):,} documents, {corpus.nbytes(split):,} bytes" for split in SPLITS]
    console.print("text: " + "; ".join(parts))
    if corpus.skipped:
        shown = "; ".join(f"{name}: {reason}" for name, reason in corpus.skipped[:3])
        console.print(f"skipped {len(corpus.skipped)} files ({shown}{'; ...' if len(corpus.skipped) > 3 else ''})")


def evaluation_table(found: Any) -> Table:
    """Bits per byte and perplexity, then bits per token by position."""
    table = Table("position in document", "tokens", "bits per token", title=None)
    for bucket in found.buckets:
        table.add_row(f"{bucket.begin:,} - {bucket.end - 1:,}", f"{bucket.tokens:,}", f"{bucket.bits_per_token:.4f}")
    table.caption = (
        f"{found.documents:,} documents, {found.bytes:,} bytes\n"
        f"{found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.4f} per token"
    )
    return table


def main() -> None:
    """Run the command line; an error of the library is one line, not a traceback."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        app()
    except (SeqlibError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
