"""transformers' Trainer with the optimizer groups, the loss and the safe checkpoints that long models want."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from seqlib.layers.kept import accumulating
from seqlib.models.backbone import param_groups

from .checkpoints import write_sums
from .inputs import after_tokens
from .keep import follow_umask
from .modeling import SeqlibForCausalLM

__all__ = ["SeqlibTrainer"]

STAGING = "checkpoint-being-written"
"""Folder beside the checkpoints that holds one until it is whole."""


class SeqlibTrainer(Trainer):
    """The loop, resuming and mixed precision are transformers'. What differs:

    - weight decay falls on matrices only, and mixers get the learning rate and decay they ask for (A_log, D, dt_bias);
    - while nobody looks at logits, a language model computes its loss without them;
    - with gradient accumulation on one process, the kernels of long convolutions are made once per step;
    - a checkpoint is written aside and renamed when it is whole, so a killed process or a full disk leaves the one
      before it as the last, with a checksum of every file, by which damage is found on resume.

    Args:
        packed: lay the examples of a batch end to end in one row instead of padding them. States are reset and labels
            masked where a document starts. Needs examples with `input_ids` (and `labels`).
        args, kwargs: as for transformers.Trainer.
    """

    _staged = False
    _first_pass = True

    def __init__(self, *args: Any, packed: bool = False, **kwargs: Any) -> None:
        if packed:
            kwargs["data_collator"] = DataCollatorWithFlattening()
        super().__init__(*args, **kwargs)
        self._passes = ExitStack()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        shares = self.args.gradient_accumulation_steps > 1 and self.args.world_size == 1 and self.args.n_gpu <= 1
        first = self._first_pass
        with self._passes as passes:
            if shares and first:
                passes.enter_context(accumulating(model))
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._first_pass = self.accelerator.sync_gradients
            if not self._first_pass:
                self._passes = passes.pop_all()
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and not options.keys() & _OWN_GROUPS:
                groups = param_groups(model, self.args.learning_rate, self.args.weight_decay)
                self.optimizer = cls(groups, **options)
        return super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not return_outputs:
            inputs = self._without_logits(inputs)
        if self.label_smoother is not None and "labels" in inputs and isinstance(self._plain(), SeqlibForCausalLM):
            inputs = {**inputs, "labels": after_tokens(inputs["labels"], inputs.get("attention_mask"))}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if prediction_loss_only:
            inputs = self._without_logits(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _plain(self) -> Any:
        """The model without wrappers, PEFT's among them."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _without_logits(self, inputs: dict[str, Any]) -> dict[str, Any]:
        own_loss = self.label_smoother is not None or self.compute_loss_func is not None
        if own_loss or "labels" not in inputs or not getattr(self._plain(), "computes_loss_without_logits", False):
            return inputs
        return {**inputs, "return_logits": False}

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING) if self._staged else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging, final = os.path.join(run_dir, STAGING), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        # transformers writes into _get_output_dir and then deletes what exceeds the limit, which must come after.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._staged = True
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)  # half a checkpoint only takes room
            raise
        finally:
            self._staged, self.args.save_total_limit = False, limit
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = final
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(os.path.join(staging, name, TRAINER_STATE_NAME))
            write_sums(Path(staging, name))
            follow_umask(Path(staging, name))
            shutil.rmtree(final, ignore_errors=True)  # the same step of an earlier run
            os.replace(os.path.join(staging, name), final)
            os.rmdir(staging)
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()


_OWN_GROUPS = {"params", "model", "optimizer_dict"}
"""Keys by which transformers' optimizers (GaLore, LOMO, layer-wise ones) bring groups of their own."""
