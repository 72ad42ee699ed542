"""Training: a recipe and a corpus become a run folder, on transformers' Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from seqlib.dispatch import use_backend
from seqlib.errors import ConfigError
from seqlib.hf import SeqlibConfig, SeqlibForCausalLM, SeqlibTrainer
from seqlib.hf.checkpoints import Checkpoint, last_whole
from seqlib.hf.keep import disk_errors, locked, whole_folder
from seqlib.hf.recipes import built

from .corpus import Corpus
from .data import PackedRows, Tokens, load_tokenizer, tokenize
from .evaluate import evaluate
from .generate import load_model
from .progress import CurvesCallback, MetricsCallback, ProgressCallback, plot_loss
from .recipes import Recipe
from .runs import DataSpec, Run, check_new, open_run
from .threads import ThreadsCallback

__all__ = ["build_model", "resume", "started_from", "train"]

FROM_START = ("d_model", "n_layer", "layer_pattern", "mixers", "mlp", "tie_embeddings", "tokenizer")
"""Fields of a recipe that a model brings along which training starts from."""


def train(
    recipe: Recipe,
    data: DataSpec,
    folder: Path,
    *,
    console: Console,
    corpus: Corpus | None = None,
    start: str | None = None,
    tensorboard: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Train from the beginning into a new run folder.

    Args:
        corpus: what `data` reads, where the caller has read it already.
        start: a model to begin with, see `started_from`; None: fresh weights.
        tensorboard: write curves for TensorBoard too.
        callbacks: of transformers, beside those that report.

    Raises:
        ConfigError: the folder holds something already, or the recipe describes no model.
        CorpusError: there is no text to train on.
    """
    corpus = corpus or data.read(recipe)
    run = Run(folder, recipe, data, corpus.digest, start)
    arguments = _arguments(run)
    first = arguments.process_index == 0
    if first:
        check_new(folder)
    if tensorboard and not _has_tensorboard():
        raise ConfigError("--tensorboard needs the package tensorboard; install it, or leave the option out")
    parts = _prepare(run, arguments, corpus)  # every wrong setting is found before anything is written
    with contextlib.ExitStack() as held:
        if first:
            held.enter_context(locked(folder))
            held.enter_context(disk_errors(folder))
            check_new(folder)  # another process may have been there meanwhile
            run.write_trained(corpus)
            run.write()
            if tensorboard:
                run.tensorboard.mkdir()
        return _fit(run, arguments, parts, console, None, callbacks)


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def resume(folder: Path, *, console: Console) -> Run:
    """Continue a run from its last whole checkpoint; the losses are those of a run that was never interrupted.

    To the last digit they are where OMP_NUM_THREADS fixes the number of threads; see `ThreadsCallback`.

    A run that had taken all its steps takes no further one: its model is written from the last checkpoint.
    """
    run = open_run(folder)
    arguments = _arguments(run)
    with contextlib.ExitStack() as held:
        if arguments.process_index == 0:
            held.enter_context(locked(folder))
            held.enter_context(disk_errors(folder))
        if run.model.exists():
            raise ConfigError(f"{folder} is finished; its model is {run.model}. Start a new run to train further")
        parts = _prepare(run, arguments, run.corpus())
        last = last_whole(run.checkpoints, parts.model, console.print, needs_best=False)
        console.print(f"resuming from {last.path}" if last else "no whole checkpoint yet, starting from the beginning")
        return _fit(run, arguments, parts, console, last)


def started_from(recipe: Recipe, start: str) -> Recipe:
    """The recipe with the sizes and the tokenizer of a model that training begins with.

    Args:
        start: a finished run, or a folder or hub name of a model in any layout of docs/CHECKPOINTS.md.
    """
    model, _ = load_model(start)
    config = model.config
    return dataclasses.replace(
        recipe,
        d_model=config.d_model,
        n_layer=config.n_layer,
        layer_pattern=config.layer_pattern if isinstance(config.layer_pattern, str) else " ".join(config.layer_pattern),
        mixers=config.mixers,
        mlp=config.mlp,
        tie_embeddings=bool(config.tie_word_embeddings),
        tokenizer=start,
    )


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """A freshly initialised model; the recipe's seed decides the weights."""

    def make() -> SeqlibForCausalLM:
        return SeqlibForCausalLM(
            SeqlibConfig(
                vocab_size=len(tokenizer),
                d_model=recipe.d_model,
                n_layer=recipe.n_layer,
                layer_pattern=recipe.layer_pattern,
                mixers={name: dict(mixer) for name, mixer in recipe.mixers.items()},
                mlp=None if recipe.mlp is None else dict(recipe.mlp),
                tie_word_embeddings=recipe.tie_embeddings,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    return built(recipe.name, recipe.seed, make)


class _Trainer(SeqlibTrainer):
    """Evaluates with the state carried through whole documents, and keeps the checkpoint of the best."""

    held_out: tuple[Tokens, int]
    """Documents, and how many of their bytes are scored."""
    context: int | None = None
    """Tokens after which a document is cut, where weights exist for so many positions only."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        tokens, max_bytes = self.held_out
        found = evaluate(self.model, tokens, max_bytes=max_bytes, context=self.context)
        metrics = {
            f"{metric_key_prefix}_bits_per_byte": found.bits_per_byte,
            f"{metric_key_prefix}_perplexity": found.perplexity,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save = self.control.should_save or best  # what is best is kept
        return best


class _RecordBackends(TrainerCallback):
    """Rewrites recipe.json after the first step, when it is known which kernels run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.done and state.is_world_process_zero:
            self.run.write()
        self.done = True


class _Moved(TrainerCallback):
    """Names the best checkpoint where it is now: a run folder may have been moved, or seen from another folder."""

    def __init__(self, last: Checkpoint) -> None:
        self.last = last

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.best_model_checkpoint = self.last.state.best_model_checkpoint


class _Parts(NamedTuple):
    tokenizer: Any
    model: Any
    rows: PackedRows
    validation: Tokens


def _prepare(run: Run, arguments: TrainingArguments, corpus: Corpus) -> _Parts:
    recipe = run.recipe
    if run.start is not None:
        model, tokenizer = load_model(run.start)
        model = model.float()  # mixed precision keeps weights in float32
    else:
        tokenizer = load_tokenizer(recipe.tokenizer)
        model = build_model(recipe, tokenizer)
    model.to(arguments.device)
    with arguments.main_process_first():
        rows = PackedRows(tokenize(corpus.train, tokenizer), recipe.seqlen)
        validation = tokenize(corpus.validation, tokenizer)
    limit = _positions(model)
    if limit is not None and limit < recipe.seqlen:
        raise ConfigError(f"a mixer has weights for {limit} positions, rows have seqlen={recipe.seqlen}; lower seqlen")
    with _scope(recipe):  # a backend that cannot run here says so now
        model(**{name: value[None].to(arguments.device) for name, value in rows[0].items()}, use_cache=False)
    return _Parts(tokenizer, model, rows, validation)


def _positions(model: Any) -> int | None:
    """How many positions the mixers have weights for; None: any number."""
    configs = model.config.backbone.mixers.values()
    return min((config.max_seqlen for config in configs if getattr(config, "max_seqlen", None)), default=None)


def _scope(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if recipe.backend == "auto" else use_backend(recipe.backend)


def _arguments(run: Run) -> TrainingArguments:
    recipe = run.recipe
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.beta2,
        max_grad_norm=recipe.clip,
        bf16=recipe.dtype == "bfloat16",
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # a NaN must stop the run, not vanish from the average
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every or None,
        metric_for_best_model="bits_per_byte" if recipe.eval_every else None,
        greater_is_better=False,
        include_num_input_tokens_seen="all",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def _fit(
    run: Run,
    arguments: TrainingArguments,
    parts: _Parts,
    console: Console,
    last: Checkpoint | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    recipe, model = run.recipe, parts.model
    metrics = MetricsCallback(run.metrics, parts.rows.tokens.bytes_per_token)
    progress = ProgressCallback(metrics, console)
    reports: list[TrainerCallback] = [metrics, progress] if arguments.process_index == 0 else []
    if run.tensorboard.is_dir() and arguments.process_index == 0:
        reports.append(CurvesCallback(run.tensorboard))
    threads = ThreadsCallback(console.print)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=parts.rows,
        eval_dataset=[],  # transformers wants one; what is evaluated is held_out
        callbacks=[threads, *reports, _RecordBackends(run), *callbacks],
    )
    trainer.held_out = parts.validation, recipe.eval_bytes
    trainer.context = _positions(model)
    trainer.remove_callback(PrinterCallback)
    if last is not None and last.step >= recipe.steps:
        model = type(model).from_pretrained(last.path)
        trainer.state = last.state
    else:
        if last is not None:
            trainer.add_callback(_Moved(last))
        try:
            with _scope(recipe):
                trainer.train(resume_from_checkpoint=None if last is None else str(last.path))
        finally:
            progress.close()
            threads.close()
    if arguments.process_index == 0:
        plot_loss(run.metrics, run.plot)
        with whole_folder(run.model) as aside:
            model.save_pretrained(aside)
            parts.tokenizer.save_pretrained(aside)
        _tell_best(trainer.state, run, console)
    return run


def _tell_best(state: Any, run: Run, console: Console) -> None:
    """Where the best weights are, if they are not the last."""
    if state.best_global_step not in (None, 0, state.global_step):
        console.print(
            f"best on validation text: step {state.best_global_step} with {state.best_metric:.3f} bits/byte, kept in "
            f"{run.checkpoints / f'checkpoint-{state.best_global_step}'}"
        )
