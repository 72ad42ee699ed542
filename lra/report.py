"""Evaluation of a saved model: run folder, model folder or hub name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoConfig

from seqlib.errors import ConfigError, SeqlibError
from seqlib.hf import SeqlibForCausalLM, SeqlibForPairClassification, SeqlibForSequenceClassification

from .data import reduced
from .evaluate import gains, invariance, peak_memory, score_examples, score_recall
from .folder import check_same_data, open_run
from .prepare import prepare
from .recall import RECALL, full_options, get_recall, make_batch
from .tasks import TASKS
from .train import check_length

__all__ = ["evaluate_model", "load_model", "show_evaluation"]

_EXAMPLES = 2000


def load_model(name: str) -> Any:
    """A model that was trained here, of whichever class it was saved as."""
    where = _model_folder(Path(name)) if Path(name).exists() else _hub_name(name)
    classes = {c.__name__: c for c in (SeqlibForCausalLM, SeqlibForSequenceClassification, SeqlibForPairClassification)}
    try:
        config = AutoConfig.from_pretrained(where)
        architectures = getattr(config, "architectures", None) or ()
        found = [classes[a] for a in architectures if a in classes]
        if found:
            return found[0].from_pretrained(where).eval()
    except (ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SeqlibError):
            raise
        raise ConfigError(f"the model in {name} cannot be read: {str(error).strip().splitlines()[0]}") from error
    raise ConfigError(f"{name} holds {', '.join(architectures) or 'no model'}, not one of {', '.join(classes)}")


def _model_folder(folder: Path) -> Path:
    """Where the config of a run or model folder is."""
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "config.json").is_file():
        return folder
    seeds = sorted(path.parent.name for path in folder.glob("seed-*/model"))
    if seeds:
        raise ConfigError(f"{folder} holds one model per seed; give one of them: {folder / seeds[0]}")
    if (folder / "recipe.json").is_file() or (folder / "plan.json").is_file():
        raise ConfigError(f"{folder} is a run without a model: it is not finished; continue its training with --resume")
    raise ConfigError(f"{folder} holds no model (no config.json); give a run folder, a model folder or a hub name")


def _hub_name(name: str) -> str:
    """A name that a hub could have, so that a mistyped folder is told at once."""
    if name.count("/") != 1 or not all(part.strip(".~") for part in name.split("/")):
        raise ConfigError(f"{name} does not exist; give a run folder, a model folder or a hub name OWNER/NAME")
    return name


def evaluate_model(
    name: str,
    task: str | None = None,
    *,
    data: Path | None = None,
    generate: Mapping[str, Any] | None = None,
    protocol: str | None = None,
    seed: int = 0,
    any_size: bool = False,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Score a model on the test examples of a task.

    Args:
        task, protocol, data: default to those of the run, where `name` is a run folder; its examples must then be
            those that it was trained with.
        generate: options with which to make other examples than those of the run, e.g. longer ones.

    Raises:
        ConfigError: the model does not fit the task, or nobody says which task.
    """
    run = open_run(Path(name)) if (Path(name) / "recipe.json").is_file() else None
    model = load_model(name)
    own_examples = None  # what the run's recipe.json says, where they are to be scored again
    if run is not None:
        recipe, source, told = run
        same_task = task in (None, recipe.task)
        own = same_task and data is None and generate is None and seed == 0 and protocol in (None, recipe.protocol)
        own_examples = told if own and told.get("examples") else None
        task, protocol = task or recipe.task, protocol or recipe.protocol
        if same_task and data is None and generate is None and source.folder is not None:
            data, any_size = _recorded(name, source.folder), source.any_size
        if same_task and data is None:
            generate = {**recipe.data, **(generate or {})}
        cache = cache or (None if source.cache is None else Path(source.cache))
    if task is None:
        raise ConfigError("say which task to evaluate on with --task")
    if task in RECALL:
        return _evaluate_recall(model, name, task, generate or {}, seed)
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; known: {', '.join([*TASKS, *RECALL])}")
    wanted = SeqlibForSequenceClassification if TASKS[task].width == 1 else SeqlibForPairClassification
    if not isinstance(model, wanted):
        raise ConfigError(f"{name} is a {type(model).__name__}; {task} needs a {wanted.__name__}")
    generates = data is None and (generate is not None) and bool(TASKS[task].generates)
    found = prepare(
        task, protocol or "seqlib", data=data, generate=generate if generates else None, seed=seed, any_size=any_size,
        cache=cache,
    )  # fmt: skip
    if own_examples is not None:
        check_same_data(Path(name), own_examples, found.manifest, "name the data to score it on with --data")
    has, needs = (model.config.vocab_size, model.config.num_labels), (found.vocab_size, found.task.classes)
    if has[0] < needs[0] or has[1] != needs[1]:
        raise ConfigError(f"{name} has {has[0]} ids and {has[1]} classes; {task} here needs {needs[0]} and {needs[1]}")
    check_length(model, found.seqlen)
    test = found.splits["test"]
    score = score_examples(model, test, found.pad)
    baselines = found.task.baselines(found.splits)
    return {
        "model": name, "task": task, "protocol": protocol or "seqlib", "examples": _where(found.manifest),
        "reduced": reduced(task, found.manifest), **score.to_dict(), "baselines": baselines,
        "gains": gains(score.accuracy, baselines), "invariance": invariance(model, test, found.pad),
        "memory": peak_memory(), "state_bytes": model.model.backbone.state_bytes(1, found.seqlen),
        "seqlen": found.seqlen,
    }  # fmt: skip


def _recorded(name: str, folder: str) -> Path:
    """The folder of data that a run names; early versions wrote it as it was given, from wherever they were started."""
    if not Path(folder).is_absolute():
        raise ConfigError(
            f"{name} was trained on {folder}, seen from a folder that it does not name; give --data FOLDER"
        )
    return Path(folder)


def _where(manifest: Mapping[str, Any]) -> str:
    """Where examples come from, for people."""
    if "generated" in manifest:
        return f"generated with seed {manifest['seed']}"
    return str(manifest.get("data") or f"the data set {manifest.get('hub')}")


def _evaluate_recall(model: Any, name: str, task: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    spec = get_recall(task)
    full = full_options(spec, options)
    if not isinstance(model, SeqlibForCausalLM) or model.config.vocab_size < spec.vocab_size(full):
        raise ConfigError(
            f"{name} is a {type(model).__name__} of {model.config.vocab_size} ids; {task} needs a SeqlibForCausalLM of "
            f"{spec.vocab_size(full)}"
        )
    scores = score_recall(model, make_batch(spec, options, seed + (1 << 33), _EXAMPLES))
    baselines = spec.guesses(full)
    return {
        "model": name, "task": task, **scores["answers"].to_dict(), "whole_examples": scores["examples"].to_dict(),
        "baselines": baselines, "gains": gains(scores["answers"].accuracy, baselines), "memory": peak_memory(),
        "state_bytes": model.model.backbone.state_bytes(1, full["seqlen"]), "seqlen": full["seqlen"],
    }  # fmt: skip


def show_evaluation(found: Mapping[str, Any], console: Console) -> None:
    """Print what `evaluate_model` found."""
    low, high = found["interval"]
    table = Table("", "accuracy (%)", "gain (points)", title=escape(f"{found['model']} on {found['task']}"))
    table.add_row("this model", f"{100 * found['accuracy']:.2f}  ({100 * low:.1f} to {100 * high:.1f}, 95 %)", "")
    for name, value in found["baselines"].items():
        table.add_row(name, f"{100 * value:.1f}", f"{found['gains'][name]:+.1f}")
    if "examples" in found:
        table.caption = f"examples: {escape(found['examples'])}"
        table.caption += f"; reduced: {found['reduced']}" if found["reduced"] else ""
    console.print(table)
    if found["per_class"]:
        console.print("by class: " + ", ".join(f"{c} {100 * v:.1f}" for c, v in found["per_class"].items()))
    if "invariance" in found:
        parts = ", ".join(f"{k} {v:.1e}" for k, v in found["invariance"].items() if k != "holds")
        verdict = "does not depend" if found["invariance"]["holds"] else "[bold red]DEPENDS[/bold red]"
        console.print(f"the answer {verdict} on batch and padding (largest change of a logit: {parts})")
    console.print(
        f"{found['n']:,} answers, {found['examples_per_s']:,.1f} examples/s, {found['tokens_per_s']:,.0f} tokens/s, "
        f"peak memory {found['memory']['process'] / 2**20:,.0f} MiB, state {found['state_bytes']:,} bytes at length "
        f"{found['seqlen']:,}"
    )
