"""Training: a recipe and a corpus become a run folder, on transformers' Trainer."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from seqlib.dispatch import use_backend, used
from seqlib.errors import ConfigError, CorpusError, SeqlibError
from seqlib.hf import SeqlibConfig, SeqlibForCausalLM, SeqlibTrainer
from seqlib.hf.runs import write_aside

from .corpus import Corpus, read_corpus, stdlib_corpus
from .data import PackedRows, Tokens, load_tokenizer, tokenize
from .evaluate import evaluate
from .progress import MetricsCallback, ProgressCallback, plot_loss
from .recipes import Recipe

__all__ = ["DataSpec", "Run", "build_model", "open_run", "resume", "train"]


@dataclass(frozen=True)
class DataSpec:
    """How a corpus was found, so that a resumed run and an evaluation find the same one."""

    sources: tuple[str, ...] = ()
    """Files, folders and data set names; empty for the standard library of the running Python."""
    suffixes: tuple[str, ...] = ()
    column: str | None = None

    def read(self, recipe: Recipe) -> Corpus:
        if not self.sources:
            return stdlib_corpus(seed=recipe.seed)
        return read_corpus(
            self.sources, seed=recipe.seed, held_out=recipe.held_out, suffixes=self.suffixes, column=self.column
        )

    @classmethod
    def of(cls, sources: Sequence[str], suffixes: Sequence[str] = (), column: str | None = None) -> DataSpec:
        """Paths are made absolute, so that a run can be continued from anywhere."""
        found = (str(Path(source).absolute()) if Path(source).exists() else source for source in sources)
        return cls(tuple(found), tuple(suffixes), column)


@dataclass(frozen=True)
class Run:
    """A run folder: recipe.json, metrics.jsonl, loss.png, checkpoints/ and, once finished, model/."""

    folder: Path
    recipe: Recipe
    data: DataSpec
    digest: str

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def corpus(self) -> Corpus:
        """The corpus of this run; an error if the text is no longer the same."""
        corpus = self.data.read(self.recipe)
        if corpus.digest != self.digest:
            raise CorpusError(
                f"the text of {self.folder} has changed since the run began; restore it or start a new run"
            )
        return corpus

    def write(self) -> None:
        """Store what the run is, with the versions, the machine and the kernels that ran."""
        values = {
            "recipe": self.recipe.to_dict(),
            "data": {"sources": self.data.sources, "suffixes": self.data.suffixes, "column": self.data.column},
            "corpus": self.digest,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("seqlib", "torch", "transformers", "accelerate", "datasets")},
            "machine": {
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            },
            "backends": used(),
        }
        write_aside(self.folder / "recipe.json", json.dumps(values, indent=2) + "\n")


def open_run(folder: Path) -> Run:
    """Read a run folder back.

    Raises:
        ConfigError: there is no run, or one of another version.
    """
    path = folder / "recipe.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder (it has no recipe.json); give the --output of an earlier train")
    try:
        values = json.loads(path.read_text())
        data = values["data"]
        spec = DataSpec(tuple(data["sources"]), tuple(data["suffixes"]), data["column"])
        return Run(folder, Recipe.from_dict(values["recipe"]), spec, values["corpus"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); start a new run") from error


def train(
    recipe: Recipe,
    data: DataSpec,
    folder: Path,
    *,
    console: Console,
    corpus: Corpus | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Train from the beginning into a new run folder.

    Args:
        corpus: what `data` reads, where the caller has read it already.
        callbacks: of transformers, beside those that report.

    Raises:
        ConfigError: the folder holds a run already, or the recipe describes no model.
        CorpusError: there is no text to train on.
    """
    corpus = corpus or data.read(recipe)
    run = Run(folder, recipe, data, corpus.digest)
    arguments = _arguments(run)
    if arguments.process_index == 0 and (folder / "recipe.json").exists():
        raise ConfigError(f"{folder} holds a run already; continue it with --resume {folder}, or give another --output")
    parts = _prepare(run, arguments, corpus)  # every wrong setting is found before anything is written
    if arguments.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        run.write()
    return _fit(run, arguments, parts, console, None, callbacks)


def resume(folder: Path, *, console: Console) -> Run:
    """Continue a run from its last whole checkpoint; the losses are those of a run that was never interrupted."""
    run = open_run(folder)
    if run.model.exists():
        raise ConfigError(f"{folder} is finished; its model is {run.model}. Start a new run to train further")
    checkpoint = get_last_checkpoint(str(run.checkpoints)) if run.checkpoints.is_dir() else None
    console.print(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet, starting from the beginning")
    arguments = _arguments(run)
    return _fit(run, arguments, _prepare(run, arguments, run.corpus()), console, checkpoint)


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """A freshly initialised model; the recipe's seed decides the weights."""
    set_seed(recipe.seed)
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


class _Trainer(SeqlibTrainer):
    """Evaluates with the state carried through whole documents, and says what is left when a checkpoint fails."""

    held_out: tuple[Tokens, int]
    """Documents, and how many of their bytes are scored."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        tokens, max_bytes = self.held_out
        found = evaluate(self.model, tokens, max_bytes=max_bytes)
        metrics = {
            f"{metric_key_prefix}_bits_per_byte": found.bits_per_byte,
            f"{metric_key_prefix}_perplexity": found.perplexity,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = Path(self.args.output_dir or ".")
            last = get_last_checkpoint(str(folder))
            raise SeqlibError(
                f"the checkpoint of step {self.state.global_step} could not be written ({error}). "
                + (f"{last} is whole" if last else "there is none before it")
                + f": make room and continue with --resume {folder.parent}"
            ) from error


class _RecordBackends(TrainerCallback):
    """Rewrites recipe.json after the first step, when it is known which kernels run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.done and state.is_world_process_zero:
            self.run.write()
        self.done = True


class _Parts(NamedTuple):
    tokenizer: Any
    model: Any
    rows: PackedRows
    validation: Tokens


def _prepare(run: Run, arguments: TrainingArguments, corpus: Corpus) -> _Parts:
    recipe = run.recipe
    tokenizer = load_tokenizer(recipe.tokenizer)
    model = build_model(recipe, tokenizer).to(arguments.device)
    with arguments.main_process_first():
        rows = PackedRows(tokenize(corpus.train, tokenizer), recipe.seqlen)
        validation = tokenize(corpus.validation, tokenizer)
    with _scope(recipe):  # a backend that cannot run here says so now
        model(**{name: value[None].to(arguments.device) for name, value in rows[0].items()}, use_cache=False)
    return _Parts(tokenizer, model, rows, validation)


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
    checkpoint: str | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    recipe = run.recipe
    tokens_per_step = recipe.batch_size * recipe.accumulation * recipe.seqlen * arguments.world_size
    metrics = MetricsCallback(run.metrics, tokens_per_step, parts.rows.tokens.bytes_per_token)
    progress = ProgressCallback(metrics, console)
    reports = [metrics, progress] if arguments.process_index == 0 else []
    trainer = _Trainer(
        model=parts.model,
        args=arguments,
        train_dataset=parts.rows,
        eval_dataset=[],  # transformers wants one; what is evaluated is held_out
        callbacks=[*reports, _RecordBackends(run), *callbacks],
    )
    trainer.held_out = parts.validation, recipe.eval_bytes
    trainer.remove_callback(PrinterCallback)
    try:
        with _scope(recipe):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.close()
    if arguments.process_index == 0:
        plot_loss(run.metrics, run.folder / "loss.png")
        aside = run.folder / ".model-being-written"
        parts.model.save_pretrained(aside)
        parts.tokenizer.save_pretrained(aside)
        os.replace(aside, run.model)
    return run
