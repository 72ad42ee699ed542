"""Whether data ever keeps a model waiting, how fast it trains and evaluates, and how fast the official S4 code does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from seqlib.bench.clock import interleaved, machine
from seqlib.errors import ConfigError
from seqlib.models.backbone import param_groups

from .data import DataSource, RunData, load_data
from .evaluate import collate, peak_memory, score_examples
from .recall import RECALL
from .recipes import Recipe
from .speed import published_s4
from .train import build_model

__all__ = ["measure", "official_s4"]

_FEW = {"train": 500, "validation": 50, "test": 200}


def measure(
    recipe: Recipe, source: DataSource, *, peer_s4: Path | None, repeats: int, console: Console
) -> dict[str, Any]:
    """Seconds for reading a batch, for a training step on it, and examples per second in evaluation.

    Args:
        peer_s4: a checkout of state-spaces/s4; the recipe must have layers of kind s4 or s4d only.

    Raises:
        ConfigError: a task without examples, or a recipe that the peer cannot run.
    """
    if recipe.task in RECALL:
        raise ConfigError(f"{recipe.task} is made step by step; speed is measured on tasks of Long Range Arena")
    if source.folder is None:
        recipe = replace(recipe, data=_FEW | dict(recipe.data))
    data = load_data(recipe, source, baselines=False)
    assert data.task is not None
    examples, rng = data.task.splits["train"], np.random.default_rng(0)

    def read() -> dict[str, Tensor]:
        return collate(examples, rng.choice(len(examples), recipe.batch_size, replace=False), data.pad)

    model = build_model(recipe, data).train()
    batch = read()
    runs: dict[str, Callable[[], Any]] = {"read": read, "step": _step(model, recipe, lambda: model(**batch).loss)}
    if peer_s4 is not None:
        peer = official_s4(peer_s4, recipe, data)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        inputs = batch["input_ids"], mask.sum(1), batch["labels"]
        runs["peer"] = _step(peer, recipe, lambda: peer(*inputs))
    timings = {name: timing.as_dict() for name, timing in interleaved(runs, repeats, 120.0).items()}
    score = score_examples(model, data.task.splits["test"], data.pad)
    found: dict[str, Any] = {
        "task": recipe.task, "recipe": recipe.name, "batch_size": recipe.batch_size,
        "seqlen": batch["input_ids"].shape[-1],
        "threads": torch.get_num_threads(), "timings": timings,
        "data_over_model": timings["step"]["wall_min_s"] / timings["read"]["wall_min_s"],
        "train_examples_per_s": recipe.batch_size / timings["step"]["wall_min_s"],
        "evaluation_examples_per_s": score.examples_per_s, "evaluation_tokens_per_s": score.tokens_per_s,
        "memory": peak_memory(), "machine": machine(),
    }  # fmt: skip
    if peer_s4 is not None:
        found["over_peer"] = timings["peer"]["wall_min_s"] / timings["step"]["wall_min_s"]
    _show(found, console)
    return found


def _step(model: nn.Module, recipe: Recipe, loss: Callable[[], Tensor]) -> Callable[[], None]:
    groups = param_groups(model, recipe.learning_rate, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def official_s4(checkout: Path, recipe: Recipe, data: RunData) -> nn.Module:
    """The recipe's model from blocks of the official code: `model(ids, lengths, labels)` is its loss.

    Raises:
        ConfigError: mixers other than S4 and S4D, or a task of images.
        SeqlibError: no checkout.
    """
    kinds = [recipe.mixers[name] for name in recipe.layer_pattern.split()]
    if any(mixer["kind"] not in ("s4", "s4d") for mixer in kinds) or data.pad is None:
        raise ConfigError("--peer-s4 takes recipes of s4 or s4d layers, on tasks of tokens")
    _, module = published_s4(checkout)
    layers = (kinds * recipe.n_layer)[: recipe.n_layer]
    return _Official([_block(module, recipe.d_model, mixer) for mixer in layers], recipe, data)


def _block(module: Any, d_model: int, mixer: Any) -> nn.Module:
    mode, init = ("diag", "diag-legs") if mixer["kind"] == "s4d" else ("nplr", "legs")
    return module.S4Block(
        d_model, mode=mode, init=init, d_state=mixer.get("d_state", 64), n_ssm=mixer.get("n_ssm", 1),
        bidirectional=mixer.get("bidirectional", False), transposed=True,
    )  # fmt: skip


class _Official(nn.Module):
    """Post-norm residual blocks with BatchNorm, mean over the real tokens, as the published ListOps recipe has them."""

    def __init__(self, blocks: list[nn.Module], recipe: Recipe, data: RunData) -> None:
        super().__init__()
        assert data.task is not None
        self.embedding = nn.Embedding(data.vocab_size, recipe.d_model)
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.BatchNorm1d(recipe.d_model) for _ in blocks)
        self.head = nn.Linear(recipe.d_model, data.task.task.classes)

    def forward(self, ids: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids).mT
        for block, norm in zip(self.blocks, self.norms):
            x = norm(x + block(x, lengths=lengths)[0])
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        mean = (x * real[:, None]).sum(-1) / lengths[:, None]
        return nn.functional.cross_entropy(self.head(mean), labels)


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table("", "ms", title=f"{found['task']}, recipe {found['recipe']}, batch of {found['batch_size']}")
    names = {"read": "reading a batch", "step": "training step", "peer": "training step, official S4 code"}
    for name, timing in found["timings"].items():
        table.add_row(names[name], f"{1e3 * timing['wall_min_s']:,.2f}")
    console.print(table)
    console.print(
        f"data comes {found['data_over_model']:,.0f} times as fast as the model takes it; evaluation "
        f"{found['evaluation_examples_per_s']:,.1f} examples/s, {found['evaluation_tokens_per_s']:,.0f} tokens/s"
        + (f"; {found['over_peer']:.2f} times as fast as the official code" if "over_peer" in found else "")
    )
