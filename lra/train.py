"""Training: a recipe becomes a run folder with one model per seed, on transformers' Trainer."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments

from seqlib.dispatch import use_backend, used
from seqlib.errors import ConfigError
from seqlib.hf import (
    SeqlibConfig,
    SeqlibForCausalLM,
    SeqlibForPairClassification,
    SeqlibForSequenceClassification,
    SeqlibTrainer,
)
from seqlib.hf.checkpoints import last_whole
from seqlib.hf.keep import disk_errors, locked, whole_folder
from seqlib.hf.recipes import built
from seqlib.hf.runs import write_aside

from .charts import plot_curve
from .data import DataSource, Rows, RunData, load_data, reduced
from .evaluate import collate, gains, invariance, peak_memory, score_examples, score_recall
from .folder import check_same_data, describe, open_run
from .protocols import get_protocol
from .recall import Stream
from .recipes import Recipe
from .runs import Follow, Reporter, is_over
from .synthetic import Batch

__all__ = ["build_model", "check_length", "train"]


def build_model(recipe: Recipe, data: RunData) -> Any:
    """A freshly initialised model; the recipe's seed decides the weights."""
    protocol = get_protocol(recipe.protocol)
    shared: dict[str, Any] = {
        "vocab_size": data.vocab_size,
        "d_model": recipe.d_model,
        "n_layer": recipe.n_layer,
        "layer_pattern": recipe.layer_pattern,
        "mixers": {name: dict(mixer) for name, mixer in recipe.mixers.items()},
        "mlp": None if recipe.mlp is None else dict(recipe.mlp),
        "max_position_embeddings": data.seqlen,
    }
    if data.task is None:
        return built(recipe.name, recipe.seed, lambda: SeqlibForCausalLM(SeqlibConfig(**shared)))
    task = data.task.task
    shared |= {"num_labels": task.classes, "pad_token_id": data.pad}
    shared |= {"embedding": "number"} if recipe.numbers else {}
    shared |= {"pooling": protocol.pooling, "pair_head": protocol.pair_head}
    classes: Any = SeqlibForSequenceClassification if task.width == 1 else SeqlibForPairClassification
    return built(recipe.name, recipe.seed, lambda: classes(SeqlibConfig(**shared)))


def check_length(model: Any, seqlen: int) -> None:
    """Raise ConfigError unless every mixer has weights for sequences of `seqlen`."""
    for name, config in model.config.backbone.mixers.items():
        limit = getattr(config, "max_seqlen", None)
        if limit is not None and limit < seqlen:
            raise ConfigError(
                f"mixer {name} ({config.kind}) has weights for {limit} positions, the longest sequence has {seqlen}; "
                f"train with --set mixers.{name}.max_seqlen={seqlen}, or take shorter data"
            )


class _Trainer(SeqlibTrainer):
    """Evaluates with our own scores; takes streams in their order."""

    pad: int | None = None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        held_out: Any = self.eval_dataset
        if isinstance(held_out, Batch):
            accuracy = score_recall(self.model, held_out)["answers"].accuracy
        else:
            accuracy = score_examples(self.model, held_out, self.pad).accuracy
        metrics = {f"{metric_key_prefix}_accuracy": accuracy}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if isinstance(dataset, Stream) else super()._get_train_sampler(train_dataset)


class _StopWhenSolved(TrainerCallback):
    def __init__(self, enough: float) -> None:
        self.enough = enough

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if metrics["eval_accuracy"] >= self.enough:
            control.should_training_stop = True


class _Moved(TrainerCallback):
    """Names the best checkpoint where it is now: a run folder may have been moved, or seen from another folder."""

    def __init__(self, best: Path) -> None:
        self.best = best

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.best_model_checkpoint is not None or state.best_metric is not None:
            state.best_model_checkpoint = str(self.best)


def train(
    recipe: Recipe,
    source: DataSource,
    folder: Path,
    *,
    console: Console,
    resume: bool = False,
    data: RunData | None = None,
) -> dict[str, Any]:
    """Train one model and score it on test data with the weights that were best on held-out data.

    A run that was interrupted goes on from its last whole checkpoint with `resume`, and ends as it would have ended.

    Returns:
        What is written to result.json: score, interval, baselines and gains, steps, curve, seconds, memory, versions.

    Raises:
        ConfigError: the folder holds a run already, or the recipe describes no model.
    """
    _check_begun(folder, resume)
    data = data or load_data(recipe, source)
    if resume and data.task is not None:
        check_same_data(folder, open_run(folder)[2], data.task.manifest, "bring the old files back, or start a new run")
    model = build_model(recipe, data)
    check_length(model, data.seqlen)
    with locked(folder), disk_errors(folder):
        _check_begun(folder, resume)  # another process may have been there meanwhile
        describe(folder, recipe, source, data)
        return _train(model, recipe, source, folder, data, console, resume)


def _check_begun(folder: Path, resume: bool) -> None:
    if (folder / "result.json").exists():
        raise ConfigError(f"{folder} is finished; start a new run in another --output")
    if (folder / "recipe.json").exists() != resume:
        hint = "continue it with --resume, or give another --output" if not resume else "there is no run to resume"
        raise ConfigError(f"{folder}: {hint}")


def _train(
    model: Any, recipe: Recipe, source: DataSource, folder: Path, data: RunData, console: Console, resume: bool
) -> dict[str, Any]:
    """Train, and write model, curve and result."""
    reporter = Reporter(folder / "metrics.jsonl", recipe.batch_size * recipe.accumulation)
    follow = Follow(reporter, console, f"{recipe.task} seed {recipe.seed}")
    checkpoints = folder / "checkpoints"
    start = last_whole(checkpoints, model, lambda line: console.print(line, markup=False)) if resume else None
    trainer = _trainer(model, recipe, folder, data, [reporter, follow])
    scope = contextlib.nullcontext() if recipe.backend == "auto" else use_backend(recipe.backend)
    with scope:
        if start is not None and is_over(start.state, recipe):
            trainer.model = type(model).from_pretrained(start.best).to(trainer.args.device)
            trainer.state = start.state
            reporter.on_train_begin(None, start.state, None)
        else:
            if start is not None:
                trainer.add_callback(_Moved(start.best))
            try:
                trainer.train(resume_from_checkpoint=None if start is None else str(start.path))
            finally:
                follow.close()
        result = _result(trainer, recipe, data, reporter)
    with whole_folder(folder / "model") as aside:
        trainer.save_model(str(aside))
    plot_curve(folder / "metrics.jsonl", folder / "curve.png", data.baselines)
    describe(folder, recipe, source, data)
    write_aside(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _trainer(model: Any, recipe: Recipe, folder: Path, data: RunData, callbacks: list[TrainerCallback]) -> _Trainer:
    if recipe.patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=recipe.patience))
    if recipe.enough < 1:
        callbacks.append(_StopWhenSolved(recipe.enough))
    rows = data.train

    def batch(features: list[Any]) -> dict[str, torch.Tensor]:
        if isinstance(rows, Rows):
            return collate(rows.examples, np.array(features), data.pad)
        return {name: torch.stack([f[name] for f in features]) for name in features[0]}

    trainer = _Trainer(
        model=model, args=_arguments(recipe, folder), train_dataset=rows, eval_dataset=data.validation,  # type: ignore[arg-type]
        data_collator=batch, callbacks=callbacks,
    )  # fmt: skip
    trainer.pad = data.pad
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.beta2,
        max_grad_norm=recipe.clip,
        bf16=recipe.dtype == "bfloat16",
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # a NaN must stop the run, not vanish from the average
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        save_steps=recipe.eval_every,
        save_total_limit=2,  # the last may turn out to be damaged
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def _result(trainer: Any, recipe: Recipe, data: RunData, reporter: Reporter) -> dict[str, Any]:
    model = trainer.model
    if isinstance(data.test, Batch):
        scores = score_recall(model, data.test)
        score, check = scores["answers"], None
        extra = {"whole_examples": scores["examples"].to_dict()}
    else:
        score, check, extra = score_examples(model, data.test, data.pad), invariance(model, data.test, data.pad), {}
    latest = reporter.latest
    chance = max(v for k, v in data.baselines.items() if not k.startswith("lists")) if data.baselines else 0.0
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "task": recipe.task,
        "protocol": recipe.protocol if data.task is not None else None,
        "recipe": recipe.name,
        "mixers": {name: dict(mixer) for name, mixer in recipe.mixers.items()},
        "layer_pattern": recipe.layer_pattern,
        "seed": recipe.seed,
        "data": data.name,
        "reduced": reduced(recipe.task, data.task.manifest) if data.task is not None else "",
        "test": score.to_dict(),
        "baselines": data.baselines,
        "gains": gains(score.accuracy, data.baselines),
        "failed": score.interval[1] <= chance + 0.02,  # no better than the best answer that reads nothing in order
        "invariance": check,
        "best_step": trainer.state.best_global_step,
        "best_held_out": trainer.state.best_metric,
        "steps": trainer.state.global_step,
        "examples_per_s": latest.get("examples_per_s"),
        "data_s": latest.get("data_s"),
        "seconds": latest.get("elapsed_s"),
        "parameters": parameters,
        "state_bytes": model.model.backbone.state_bytes(1, data.seqlen),
        "seqlen": data.seqlen,
        "memory": peak_memory(),
        "backends": used(),
        **extra,
    }
