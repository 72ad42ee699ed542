"""Several runs of one recipe: one per seed, and their mean."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from seqlib.errors import ConfigError
from seqlib.hf.recipes import layers_of
from seqlib.hf.runs import override, write_aside
from seqlib.mixers import sized

from .data import DataSource
from .folder import read_json
from .recipes import Recipe, find_recipe
from .train import train

__all__ = ["configure", "train_seeds"]

_NEEDED = ("task", "protocol", "recipe", "mixers", "layer_pattern", "data", "baselines", "parameters", "state_bytes",
           "seqlen", "test", "seed", "failed", "steps", "seconds")  # fmt: skip
_SMALL = 256  # width up to which mixers are sized for small models


def train_seeds(
    recipe: Recipe, source: DataSource, folder: Path, seeds: Sequence[int], *, console: Console
) -> dict[str, Any]:
    """One run per seed in `folder/seed-N`, and their mean, standard deviation and failures in `folder/summary.json`.

    Finished seeds are kept, an interrupted one goes on and missing ones are run.
    """
    results = []
    for seed in seeds:
        part = folder / f"seed-{seed}"
        done = part / "result.json"
        if done.is_file():
            results.append(read_json(done, lambda values: {key: values[key] for key in _NEEDED} | values))
            continue
        begun = (part / "recipe.json").is_file()
        results.append(train(replace(recipe, seed=seed), source, part, console=console, resume=begun))
    summary = summarise(results)
    write_aside(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of results of one recipe.

    Raises:
        ConfigError: the seeds were not trained on the same examples.
    """
    if len({result["data"] for result in results}) > 1:
        raise ConfigError(
            "the seeds were trained on different examples: the files changed between them; start a new run"
        )
    scores = [result["test"]["accuracy"] for result in results]
    first = results[0]
    return {
        **{key: first[key] for key in ("task", "protocol", "recipe", "mixers", "layer_pattern", "data", "baselines",
                                       "parameters", "state_bytes", "seqlen")},
        "reduced": first.get("reduced"),
        "seeds": [result["seed"] for result in results],
        "accuracies": scores,
        "mean": statistics.fmean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else None,
        "failed_seeds": [result["seed"] for result in results if result["failed"]],
        "n": first["test"]["n"],
        "interval": first["test"]["interval"] if len(results) == 1 else None,
        "steps": [result["steps"] for result in results],
        "seconds": sum(result["seconds"] or 0 for result in results),
    }  # fmt: skip


def configure(name: str, task: str, settings: Sequence[str], mixer: str | None, protocol: str | None) -> Recipe:
    """A recipe by name with what the command line changes.

    A mixer that is named there is sized for a small model where it does not say its heads and windows itself, as the
    suite sizes it: defaults are made for large models.
    """
    changes = [] if protocol is None else [f"protocol={protocol}"]
    if mixer is not None:
        layers = {f"m{i or ''}": config for i, config in enumerate(layers_of(mixer))}
        changes += [f"mixers={json.dumps(layers)}", f"layer_pattern={' '.join(layers)}"]
    recipe = override(find_recipe(name, task), [*changes, *settings])
    if mixer is None or recipe.d_model > _SMALL:
        return recipe
    mixers = {layer: sized(config, recipe.d_model) for layer, config in recipe.mixers.items()}
    return replace(recipe, mixers=mixers)
