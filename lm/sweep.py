"""One text, one recipe, every mixer: models of equal size and equal training, ranked by bits per byte."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seqlib.errors import ConfigError
from seqlib.hf.recipes import checked_mixer, layers_of
from seqlib.hf.runs import is_run, read_json, write_aside
from seqlib.mixers import MIXERS, looks_ahead, mixer_config, sized

from .corpus import Corpus
from .data import load_tokenizer, tokenize
from .evaluate import evaluate
from .generate import load_model
from .recipes import Recipe
from .runs import DataSpec, open_run
from .train import build_model, resume, train

__all__ = ["equal_recipes", "run_sweep", "sweep_table"]

_WINDOW = 64  # of windowed mixers, so that rows of a few hundred tokens are longer
_PARTS = (
    "sum",
    "shared",
    "channel",
    "learned_positions",
)  # no mixers of their own, or of mixers that a user has to name
_KEYS = (
    "mixer", "config", "d_mlp", "parameters", "state_bytes", "bits_per_byte", "bits_per_byte_whole", "bytes",
    "max_bytes",
)  # fmt: skip
_STATE_AT = 4096  # tokens after which the size of the state is told


def equal_recipes(recipe: Recipe, wanted: Sequence[str] | None = None) -> dict[str, Recipe]:
    """The recipe once per mixer, the width of its MLP chosen so that all models have as many parameters.

    The number is that of the model with `attention` and the MLP of `recipe`.

    Args:
        wanted: kinds, or JSON configs with a kind; None: every kind that runs causally with its defaults.

    Raises:
        ConfigError: an unknown mixer, or one that is larger than the whole model is to be.
    """
    mlp = dict(recipe.mlp or {})
    target = _size(_with(recipe, "attention", {"kind": "attention"}, mlp))
    found = {}
    for text in wanted or _alone():
        config = _one(text)
        shown = " ".join(str(v) if k == "kind" else f"{k}={v}" for k, v in config.items())
        config = mixer_config(checked_mixer(f"--mixer {text}", config)).to_dict()
        narrow, wide = (_size(_with(recipe, shown, config, mlp | {"d_mlp": width})) for width in (8, 16))
        width = round(8 + 8 * (target - narrow) / (wide - narrow))
        if width < 8:
            raise ConfigError(f"{shown} alone has more than the {target:,} parameters of the whole; raise mlp.d_mlp")
        found[shown] = _with(recipe, shown, config, mlp | {"d_mlp": width})
    return found


def _one(text: str) -> dict[str, Any]:
    layers = layers_of(text)
    if len(layers) != 1:
        raise ConfigError(f"--mixer {text!r} names several; a sweep has one kind in each model: repeat --mixer")
    if layers[0]["kind"] in MIXERS and looks_ahead(mixer_config(checked_mixer(f"--mixer {text}", layers[0]))):
        raise ConfigError(f"--mixer {text!r} reads what follows, which no language model may")
    return layers[0]


def _alone() -> list[str]:
    return [kind for kind in MIXERS if kind not in _PARTS and not looks_ahead({"kind": kind})]


def _with(recipe: Recipe, name: str, config: Mapping[str, Any], mlp: Mapping[str, Any]) -> Recipe:
    mixers = {"m": sized(config, recipe.d_model, window=_WINDOW)}
    return dataclasses.replace(recipe, name=f"{recipe.name} {name}", layer_pattern="m", mixers=mixers, mlp=mlp)


def _size(recipe: Recipe) -> int:
    return sum(p.numel() for p in build_model(recipe, load_tokenizer(recipe.tokenizer)).parameters())


def run_sweep(
    folder: Path,
    recipe: Recipe,
    *,
    mixers: Sequence[str] | None,
    data: DataSpec,
    max_bytes: int,
    console: Console,
) -> dict[str, Any]:
    """Train and score every mixer in a run folder of its own; write sweep.json after each.

    Finished runs in `folder` are kept, so that a sweep that was interrupted goes on.

    Args:
        max_bytes: of the test text that is scored; whole documents until they are reached.

    Raises:
        ConfigError: the folder holds runs of another recipe, or a mixer is wrong.
    """
    recipes = equal_recipes(recipe, mixers)
    corpus = data.read(recipe)
    rows = []
    for name, one in recipes.items():
        path = folder / "".join(c if c.isalnum() or c in "-." else "_" for c in name)
        _check_same(path, one, corpus)
        row = _scored(path, max_bytes)
        if row is None:
            console.print(f"{name}: d_mlp {(one.mlp or {})['d_mlp']}", style="bold")
            row = _row(name, one, path, data, corpus, max_bytes, console)
            write_aside(path / "row.json", json.dumps(row) + "\n")
        rows.append(row)
        made = {"recipe": recipe.to_dict(), "corpus": corpus.digest, "state_at": _STATE_AT, "sweep": rows}
        write_aside(folder / "sweep.json", json.dumps(made, indent=1) + "\n")
    return made


def _check_same(path: Path, recipe: Recipe, corpus: Corpus) -> None:
    """Raise ConfigError if a run in `path` is another one than is wanted."""
    if not is_run(path):
        return
    run = open_run(path)
    if run.recipe != recipe:
        raise ConfigError(f"{path} holds a run of another recipe; give another --output")
    if run.digest != corpus.digest:
        raise ConfigError(f"{path} holds a run on another text; give another --output")


def _scored(path: Path, max_bytes: int) -> dict[str, Any] | None:
    """The row of a finished run, if it was scored on as many bytes."""
    if not (path / "row.json").is_file() or not (path / "model").is_dir():
        return None
    row = read_json(path / "row.json", lambda values: {key: values[key] for key in _KEYS})
    return row if row["max_bytes"] == max_bytes else None


def _row(
    name: str, recipe: Recipe, path: Path, data: DataSpec, corpus: Corpus, max_bytes: int, console: Console
) -> dict[str, Any]:
    if is_run(path):
        run = open_run(path) if (path / "model").exists() else resume(path, console=console)
    else:
        run = train(recipe, data, path, console=console, corpus=corpus)
    model, tokenizer = load_model(str(run.model))
    test = tokenize(corpus.test, tokenizer)
    found = evaluate(model, test, context=recipe.seqlen, max_bytes=max_bytes)
    whole = evaluate(model, test, max_bytes=max_bytes)
    return {
        "mixer": name,
        "config": dict(recipe.mixers["m"]),
        "d_mlp": (recipe.mlp or {})["d_mlp"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": model.model.backbone.state_bytes(1, _STATE_AT),
        "bits_per_byte": found.bits_per_byte,
        "bits_per_byte_whole": whole.bits_per_byte,
        "bytes": found.bytes,
        "max_bytes": max_bytes,
    }


def sweep_table(made: Mapping[str, Any]) -> Table:
    """The rows, best first. Bits per byte are of parts as long as the rows of the training, and of whole documents."""
    table = Table(
        "mixer", "bits per byte", "over attention", "documents", "d_mlp", "parameters", f"state at {made['state_at']}"
    )  # fmt: skip
    rows = sorted(made["sweep"], key=lambda row: row["bits_per_byte"])
    softmax = next((row["bits_per_byte"] for row in rows if row["mixer"] == "attention"), None)
    for row in rows:
        over = f"{row['bits_per_byte'] / softmax:.3f}" if softmax else "-"
        table.add_row(
            row["mixer"], f"{row['bits_per_byte']:.3f}", over, f"{row['bits_per_byte_whole']:.3f}", str(row["d_mlp"]),
            f"{row['parameters']:,}", f"{row['state_bytes']:,}",
        )  # fmt: skip
    return table
