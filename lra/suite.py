"""Ranks mixers on the synthetic suite: accuracy, steps to 90 %, size of the state, longer sequences."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from seqlib.bench.clock import machine
from seqlib.errors import ConfigError
from seqlib.hf.console import quiet
from seqlib.hf.keep import locked
from seqlib.hf.recipes import checked_mixer, layers_of
from seqlib.hf.runs import read_metrics, write_aside
from seqlib.mixers import sized

from .charts import plot_length, plot_state
from .data import DataSource
from .evaluate import score_recall
from .folder import open_run, read_json
from .recall import get_recall, make_batch
from .recipes import Recipe
from .report import load_model
from .train import train

__all__ = ["TIERS", "Tier", "Trial", "run_suite"]

_LONGER = (1, 2, 4)


@dataclass(frozen=True)
class Trial:
    """One task of a tier."""

    label: str
    task: str
    data: dict[str, Any]
    steps: int
    score: bool = True
    """Counts for the ranking; the others only show whether a mixer learns at all."""


@dataclass(frozen=True)
class Tier:
    """A list of trials and what they are trained with."""

    trials: tuple[Trial, ...]
    minutes: float
    d_model: int = 64
    n_layer: int = 2
    batch_size: int = 64


def _mqar(seqlen: int, pairs: int, steps: int, vocab_size: int = 1024) -> Trial:
    """Random filler, which needs more steps, from the vocabulary on at which it seldom is a key."""
    data = {"seqlen": seqlen, "pairs": pairs, "vocab_size": vocab_size, "random_filler": vocab_size >= 1024}
    return Trial(f"mqar {seqlen}/{pairs}", "mqar", data, steps)


MIXERS_TO_RANK = (
    "attention", "conv_attention", "gated_conv based", "linear_transformer", "retnet", "gla", "s4d", "mamba", "mamba2",
    "deltanet", "gated_deltanet",
)  # fmt: skip
"""One or two of each family."""


TIERS: dict[str, Tier] = {
    "smoke": Tier((Trial("induction 32", "induction", {"seqlen": 32}, 200), _mqar(32, 4, 300, 64)), 2, batch_size=32),
    "quick": Tier(
        (
            Trial("induction 64", "induction", {"seqlen": 64}, 400),
            _mqar(32, 4, 600, 64),
            _mqar(64, 8, 1000, 128),
            _mqar(128, 16, 1000, 256),
            Trial("flip-flop 64", "flip_flop", {"seqlen": 64}, 400),
        ),
        15,
        batch_size=32,
    ),
    "long": Tier(
        (
            Trial("induction 256", "induction", {"seqlen": 256}, 2000),
            _mqar(64, 4, 4000),
            _mqar(128, 16, 6000),
            _mqar(256, 64, 6000),
            Trial("selective copying 256/16", "selective_copying", {"seqlen": 256, "tokens": 16}, 10_000),
            Trial("flip-flop 256", "flip_flop", {"seqlen": 256}, 2000),
            Trial("parity 64", "parity", {"seqlen": 64}, 4000, score=False),
        ),
        600,
    ),
}


def run_suite(
    tier: str,
    *,
    mixers: Sequence[str] | None,
    seeds: int,
    minutes: float | None,
    folder: Path,
    console: Console,
    processes: int = 1,
) -> dict[str, Any]:
    """Train every mixer on every trial of a tier and write suite.json, suite.md, state.png and length.png.

    Finished runs in `folder` are kept, so a suite that was interrupted goes on; a run takes the place of its turn in
    the order seed, trial, mixer, so that what time leaves out is missing for every mixer alike.

    Args:
        mixers: kinds, kinds that take turns ("gated_conv based") or JSON configs; None: `MIXERS_TO_RANK`.
        minutes: no run begins after this long; None: the tier's own limit times `seeds`.
        processes: runs at a time, each on one thread if there are several; at most one per core.

    Raises:
        ConfigError: an unknown tier or mixer, or one that looks ahead.
    """
    if tier not in TIERS:
        raise ConfigError(f"unknown tier {tier!r}; known: {', '.join(TIERS)}")
    plan = TIERS[tier]
    layers = named_mixers(mixers or MIXERS_TO_RANK, plan.d_model)
    end = time.time() + 60 * (plan.minutes * seeds if minutes is None else minutes)
    jobs = [
        _Job(trial.label, name, _recipe(plan, trial, layers[name], seed), trial.score, end,
             folder / "runs" / _slug(f"{tier}-{trial.label}-{name}-{seed}"))
        for seed in range(seeds) for trial in plan.trials for name in layers
    ]  # fmt: skip
    with locked(folder):
        return _run_all(tier, seeds, folder, console, processes, jobs)


def _run_all(
    tier: str, seeds: int, folder: Path, console: Console, processes: int, jobs: Sequence[_Job]
) -> dict[str, Any]:
    begun, plan = time.perf_counter(), TIERS[tier]
    rows: list[dict[str, Any]] = []
    for job, row in zip(jobs, _each(jobs, processes)):
        if row is not None:
            rows.append(row)
            console.print(f"{job.trial}  {job.mixer}  seed {job.recipe.seed}: {100 * row['accuracy']:.1f} %")
    result = {
        "tier": tier, "seeds": seeds, "d_model": plan.d_model, "n_layer": plan.n_layer,
        "left_out": len(jobs) - len(rows), "processes": processes,
        "minutes": round((time.perf_counter() - begun) / 60, 2),
        "seconds": round(sum(row["seconds"] for row in rows), 1), "machine": machine(), "ranking": ranking(rows),
        "rows": rows,
    }  # fmt: skip
    text = markdown(result)
    write_aside(folder / "suite.json", json.dumps(result | {"markdown": text.splitlines()}, indent=2) + "\n")
    write_aside(folder / "suite.md", text)
    plot_state(rows, folder / "state.png")
    plot_length(rows, folder / "length.png")
    console.print(_table(result))
    console.print(f"written to {folder}: suite.json, suite.md, state.png, length.png", markup=False)
    if result["left_out"]:
        console.print(
            f"[bold]{result['left_out']} runs left out for want of time[/bold]; run the same command again to go on"
        )
    return result


def named_mixers(wanted: Sequence[str], d_model: int) -> dict[str, list[dict[str, Any]]]:
    """Configs of the layers that take turns, by the name that is shown; what is not said is sized for `d_model`.

    Raises:
        ConfigError: a kind or field that does not exist.
    """
    found = {}
    for text in wanted:
        configs = layers_of(text)
        shown = " ".join(str(v) if k == "kind" else f"{k}={v}" for config in configs for k, v in config.items())
        found[shown] = [sized(checked_mixer(f"--mixer {text}", config), d_model) for config in configs]
    return found


@dataclass(frozen=True)
class _Job:
    trial: str
    mixer: str
    recipe: Recipe
    scores: bool
    end: float
    """Seconds of the clock after which it does not begin."""
    folder: Path


def _recipe(plan: Tier, trial: Trial, layers: Sequence[Mapping[str, Any]], seed: int) -> Recipe:
    mixers = {f"m{i}": dict(config) for i, config in enumerate(layers)}
    return Recipe(
        name=f"suite {trial.label}", task=trial.task, data=trial.data, d_model=plan.d_model, n_layer=plan.n_layer,
        layer_pattern=" ".join(mixers), mixers=mixers, batch_size=plan.batch_size, steps=trial.steps,
        learning_rate=4e-3, warmup_steps=min(100, trial.steps // 5), weight_decay=0.1, beta2=0.98, enough=0.99,
        seed=seed, log_every=50, eval_every=50, eval_examples=256,
    )  # fmt: skip


def _each(jobs: Sequence[_Job], processes: int) -> Iterator[dict[str, Any] | None]:
    processes = min(processes, len(jobs), os.cpu_count() or 1)
    if processes == 1:
        yield from map(_run, jobs)
        return
    with get_context("spawn").Pool(processes, _begin) as pool:
        yield from pool.imap(_run, jobs)


def _begin() -> None:
    """Of a process that runs some of the jobs: one thread, no lines of others, and Ctrl-C is for the parent to tell."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()


def _run(job: _Job) -> dict[str, Any] | None:
    """The row of a run, which is trained unless it is finished; None where there was no time for it."""
    done = job.folder / "row.json"
    if (job.folder / "recipe.json").is_file() and open_run(job.folder)[0] != job.recipe:
        raise ConfigError(f"{job.folder} holds a run of another recipe; give another --output, or remove that folder")
    if not done.is_file():
        if time.time() > job.end:
            return None
        _train(job)
    return read_json(done, dict)


def _train(job: _Job) -> None:
    path, recipe = job.folder, job.recipe
    resume = (path / "recipe.json").is_file()
    if not (path / "result.json").is_file():
        train(recipe, DataSource(), path, console=Console(quiet=True), resume=resume)
    result = read_json(path / "result.json", dict)
    solved = [row["step"] for row in read_metrics(path / "metrics.jsonl") if row.get("accuracy", 0) >= 0.9]
    kept = ("baselines", "failed", "steps", "state_bytes", "parameters", "seconds")
    row = {key: result[key] for key in kept} | {
        "mixer": job.mixer,
        "trial": job.trial,
        "task": recipe.task,
        "seed": recipe.seed,
        "scores": job.scores,
        "accuracy": result["test"]["accuracy"],
        "interval": result["test"]["interval"],
        "steps_to_90": solved[0] if solved else None,
        "by_length": _by_length(recipe, path),
    }
    write_aside(path / "row.json", json.dumps(row, indent=2) + "\n")


def _by_length(recipe: Recipe, path: Path) -> dict[str, float]:
    """Accuracy at one, two and four times the trained length, with as many pairs as in training."""
    model, task = load_model(str(path)), get_recall(recipe.task)
    full = {**task.defaults, **recipe.data}
    found = {}
    for factor in _LONGER:
        seqlen = full["seqlen"] * factor
        if recipe.task == "mqar" and seqlen >= full["vocab_size"]:
            continue  # the task has no such length
        batch = make_batch(task, {**recipe.data, "seqlen": seqlen}, recipe.seed + (1 << 34) + factor, 256)
        found[str(seqlen)] = score_recall(model, batch)["answers"].accuracy
    return found


def ranking(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mixers by their mean accuracy over the trials that every mixer has run, then by steps to 90 %."""
    mixers = list(dict.fromkeys(row["mixer"] for row in rows))
    trials = [row["trial"] for row in rows if row["scores"]]
    complete = [t for t in dict.fromkeys(trials) if {r["mixer"] for r in rows if r["trial"] == t} == set(mixers)]
    made = []
    for mixer in mixers:
        own = [row for row in rows if row["mixer"] == mixer]
        by_trial = {
            trial: [row["accuracy"] for row in own if row["trial"] == trial]
            for trial in dict.fromkeys(row["trial"] for row in own)
        }
        shown = {k: {"mean": statistics.fmean(v), "std": _std(v), "seeds": len(v)} for k, v in by_trial.items()}
        counted = [statistics.fmean(by_trial[trial]) for trial in complete]
        solved = [row["steps_to_90"] for row in own if row["steps_to_90"]]
        made.append(
            {
                "mixer": mixer,
                "mean": statistics.fmean(counted) if counted else 0.0,
                "trials": shown,
                "solved": len(solved),
                "runs": len(own),
                "steps_to_90": statistics.fmean(solved) if solved else None,
                "state_bytes": max(row["state_bytes"] for row in own),
            }
        )
    return sorted(made, key=lambda m: (-m["mean"], m["steps_to_90"] or float("inf")))


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    trials = list(dict.fromkeys(row["trial"] for row in result["rows"]))
    header = ["mixer", "mean", *trials, "solved", "steps to 90 %", "state bytes"]
    body = []
    for entry in result["ranking"]:
        cells = []
        for trial in trials:
            found = entry["trials"].get(trial)
            spread = "" if found is None or found["std"] is None else f" ±{100 * found['std']:.1f}"
            cells.append("-" if found is None else f"{100 * found['mean']:.1f}{spread}")
        steps = "-" if entry["steps_to_90"] is None else f"{entry['steps_to_90']:.0f}"
        body.append(
            [entry["mixer"], f"{100 * entry['mean']:.1f}", *cells, f"{entry['solved']}/{entry['runs']}", steps,
             f"{entry['state_bytes']:,}"]
        )  # fmt: skip
    return header, body


def markdown(result: Mapping[str, Any]) -> str:
    """The ranking as a Markdown table, with how long it took and what trivial answers score."""
    header, body = _cells(result)
    took = (
        f"`seqlib-lra suite {result['tier']} --seeds {result['seeds']} --processes {result['processes']}`: "
        f"{result['minutes']:.1f} minutes, {result['left_out']} of {len(result['rows']) + result['left_out']} runs "
        f"left out; d_model {result['d_model']}, {result['n_layer']} layers. Accuracy in %."
    )
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]
    guesses = {row["trial"]: row["baselines"] for row in result["rows"]}
    notes = [f"{t}: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in b.items()) for t, b in guesses.items()]
    return "\n".join([took, "", *lines, "", "Trivial answers (%): " + "; ".join(notes) + ".", ""])


def _table(result: Mapping[str, Any]) -> Table:
    header, body = _cells(result)
    table = Table(*header, title=f"suite {result['tier']}: accuracy (%), {result['seeds']} seed(s)")
    for row in body:
        table.add_row(*row)
    return table


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text)
