"""Losses, gradients, packing, classification, Trainer and PEFT."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import PAD, STACKS, VOCAB, left_padded, prompt, tiny, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.hf import SeqlibConfig, SeqlibForCausalLM, SeqlibForSequenceClassification, SeqlibTrainer

CLOSE = {"rtol": 0, "atol": 1e-5}
DATA = [{"input_ids": p[0].tolist(), "labels": p[0].tolist()} for p in prompt(*[8] * 8)]


@pytest.fixture(params=STACKS)
def model(request) -> SeqlibForCausalLM:
    return tiny(request.param)


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close_gradients(model: torch.nn.Module, a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, **CLOSE)
    ours, theirs = gradients(model, a), gradients(model, b)
    assert ours.keys() == theirs.keys() and len(ours) == len(list(model.parameters()))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("items", [None, 100, torch.tensor(7)])
def test_loss_without_logits_equals_loss_with_logits(model, items) -> None:
    ids, mask = left_padded(prompt(4, 9))
    labels = ids.masked_fill(mask == 0, -100)
    asked = {"input_ids": ids, "attention_mask": mask, "labels": labels, "num_items_in_batch": items}
    lean = model(**asked, return_logits=False)
    assert lean.logits is None
    close_gradients(model, lean.loss, model(**asked).loss)


@pytest.mark.parametrize("with_logits", [True, False])
def test_loss_does_not_depend_on_the_side_of_padding(model, with_logits: bool) -> None:
    prompts = prompt(3, 8)
    losses = []
    for side in ("left", "right"):
        ids, mask = left_padded(prompts, side)
        labels = ids.masked_fill(mask == 0, -100)
        losses.append(model(ids, attention_mask=mask, labels=labels, return_logits=with_logits).loss)
    torch.testing.assert_close(*losses)
    alone = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in prompts]
    torch.testing.assert_close(losses[0], sum(alone) / (3 + 8 - 2))


@pytest.mark.parametrize("kind", [Trainer, SeqlibTrainer])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("items", [None, 3])
def test_label_smoothing_is_of_the_next_token(kind, adapted: bool, items, tmp_path) -> None:
    model = tiny("mamba").eval()
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["in_proj"]))
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.3)
    (ids,) = prompt(9)
    labels = ids.clone()
    labels[0, 4] = -100
    got = kind(model=model, args=arguments).compute_loss(model, {"input_ids": ids, "labels": labels}, False, items)
    z = model(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(z, labels[0, 1:], label_smoothing=0.3, reduction="sum")
    torch.testing.assert_close(got, expected / (items or 7))


@pytest.mark.parametrize("side", ["left", "right"])
def test_label_smoothing_does_not_see_padding(side: str, model, tmp_path) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.3)
    trainer, prompts = SeqlibTrainer(model=model, args=arguments), prompt(3, 8)
    ids, mask = left_padded(prompts, side)
    labels = ids.masked_fill(mask == 0, -100)
    got = trainer.compute_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    alone = [trainer.compute_loss(model, {"input_ids": p, "labels": p.clone()}) * (p.shape[1] - 1) for p in prompts]
    torch.testing.assert_close(got, sum(alone) / (3 + 8 - 2))


def test_label_smoothing_of_classes_is_not_shifted(tmp_path) -> None:
    model = SeqlibForSequenceClassification(tiny_config("mamba", num_labels=3)).eval()
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.3)
    inputs = {"input_ids": torch.cat(prompt(5, 5)), "labels": torch.tensor([0, 2])}
    logits = model(inputs["input_ids"]).logits
    expected = torch.nn.functional.cross_entropy(logits, inputs["labels"], label_smoothing=0.3)
    torch.testing.assert_close(SeqlibTrainer(model=model, args=arguments).compute_loss(model, inputs), expected)


def test_a_mixer_that_looks_ahead_makes_no_language_model() -> None:
    mixers = {"m": {"kind": "mamba"}, "f": {"kind": "fnet"}}
    config = SeqlibConfig(d_model=16, n_layer=2, vocab_size=9, layer_pattern="m f", mixers=mixers)
    with pytest.raises(ConfigError, match="fnet reads what follows"):
        SeqlibForCausalLM(config)


def test_number_of_items_divides_the_sum(model) -> None:
    (ids,) = prompt(9)
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=2).loss, mean * 4)
    by_hand = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(mean, by_hand)


def test_logits_to_keep(model) -> None:
    (ids,) = prompt(9)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


def test_hidden_states(model) -> None:
    (ids,) = prompt(6)
    outputs = model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.n_layer + 1
    torch.testing.assert_close(outputs.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    cache = model(ids, use_cache=True).past_key_values
    with torch.no_grad():
        one = model(torch.tensor([[5]]), past_key_values=cache, output_hidden_states=True)
    assert [h.shape for h in one.hidden_states] == [(1, 1, 16)] * (model.config.n_layer + 1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(model, reentrant: bool) -> None:
    (ids,) = prompt(9)
    model.train()
    plain = model(ids, labels=ids).loss
    expected = gradients(model, plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    handle = model.model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *a: calls.append(1))
    loss = model(ids, labels=ids).loss
    got = gradients(model, loss)
    handle.remove()
    assert len(calls) == 2, "the layer was not run again"
    torch.testing.assert_close(loss, plain)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, **CLOSE)


def test_every_nth_layer_is_checkpointed(model) -> None:
    (ids,) = prompt(9)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        pytest.skip("this transformers checkpoints every layer")
    enable(every_n_layers=2)
    calls = []
    for i, layer in enumerate(model.model.backbone.layers):
        layer.mixer.register_forward_pre_hook(lambda *a, i=i: calls.append(i))
    model(ids, labels=ids).loss.backward()
    assert [calls.count(i) for i in range(model.config.n_layer)] == [2, 1, 2][: model.config.n_layer]


def test_resized_embeddings_stay_tied(model) -> None:
    (ids,) = prompt(6)
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 5)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.vocab_size == VOCAB + 5
    after = model(ids).logits
    torch.testing.assert_close(after[..., :VOCAB], before)
    assert bool(torch.isfinite(after).all())


def packing_kwargs(lengths: list[int]) -> dict[str, dict[str, Tensor]]:
    """The three ways in which documents of one row are told apart."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)},
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).int().unsqueeze(0)},
        "cu_seq_lens_q": {"cu_seq_lens_q": ends.int()},
    }


@pytest.mark.parametrize("way", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_documents_do_not_see_each_other(model, way: str) -> None:
    prompts = prompt(5, 3, 8)
    packed = model(torch.cat(prompts, 1), **packing_kwargs([5, 3, 8])[way]).logits
    torch.testing.assert_close(packed, torch.cat([model(p).logits for p in prompts], 1), **CLOSE)


def test_packed_row_goes_on_from_a_cache(model) -> None:
    first, second = prompt(7, 4)
    cache = model(first[:, :3], use_cache=True).past_key_values
    rest = torch.cat([first[:, 3:], second], 1)
    positions = torch.cat([torch.arange(3, 7), torch.arange(4)]).unsqueeze(0)
    logits = model(rest, position_ids=positions, past_key_values=cache).logits
    expected = torch.cat([model(first).logits[:, 3:], model(second).logits], 1)
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_positions_of_padded_batches_are_not_documents(model) -> None:
    ids, mask = left_padded(prompt(4, 9), "right")
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    torch.testing.assert_close(
        model(ids, attention_mask=mask, position_ids=positions).logits, model(ids, attention_mask=mask).logits
    )
    arange = torch.arange(ids.shape[1]).unsqueeze(0)
    torch.testing.assert_close(
        model(ids, attention_mask=mask, position_ids=arange).logits, model(ids, attention_mask=mask).logits
    )


def test_lengths_that_do_not_fill_the_row_are_refused(model) -> None:
    (ids,) = prompt(9)
    with pytest.raises(UnsupportedInput, match="seq describes"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 8]))


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("stack", STACKS)
def test_classification_ignores_padding(stack: str, pooling: str) -> None:
    torch.manual_seed(0)
    config = tiny_config(stack, pooling=pooling, num_labels=3, initializer_range=0.5)
    classifier = SeqlibForSequenceClassification(config).eval()
    prompts = prompt(4, 9, 7)
    alone = torch.cat([classifier(p).logits for p in prompts])
    assert alone.shape == (3, 3)
    for side in ("left", "right"):
        ids, mask = left_padded(prompts, side)
        torch.testing.assert_close(classifier(ids, attention_mask=mask).logits, alone, **CLOSE)
        torch.testing.assert_close(classifier(ids).logits, alone, **CLOSE)
    labels = torch.tensor([0, 2, 1])
    loss = classifier(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(alone, labels))


def test_a_pad_token_inside_a_text_is_text() -> None:
    classifier = SeqlibForSequenceClassification(tiny_config("mamba", initializer_range=0.5)).eval()
    ids = torch.tensor([[5, PAD, 6, 7]])
    assert torch.equal(classifier(ids).logits, classifier(ids, attention_mask=torch.ones(1, 4)).logits)


def test_lora_trains_saves_and_merges(model, tmp_path) -> None:
    (ids,) = prompt(9)
    before = model(ids).logits
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    touched = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert touched and all("lora" in name for name in touched)
    lora.eval()
    adapted = lora(ids).logits
    assert not torch.allclose(adapted, before)
    assert len(gradients(lora, lora(ids, labels=ids, return_logits=False).loss)) == len(touched)
    lora.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_like(model), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, adapted, **CLOSE)
    merged = again.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)  # W + BA is rounded once, W x + BA x twice


def tiny_like(model: SeqlibForCausalLM) -> SeqlibForCausalLM:
    for stack in STACKS:
        if tiny_config(stack).backbone == model.config.backbone:
            return tiny(stack)
    raise AssertionError("no such stack")


def trainer(model: torch.nn.Module, folder: Path, **kwargs: Any) -> SeqlibTrainer:
    """A short run on eight examples that one can learn by heart."""
    names = ("packed", "data_collator", "callbacks", "compute_metrics")
    ours = {name: kwargs.pop(name) for name in names if name in kwargs}
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "seed": 0}
    options |= {"logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "weight_decay": 0.1}
    args = TrainingArguments(output_dir=str(folder), **(options | kwargs))
    return SeqlibTrainer(model=model, args=args, train_dataset=DATA, eval_dataset=DATA, **ours)


def test_trainer_learns_and_leaves_logits_out(model, tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("seqlib.hf.modeling.finish_logits", lambda *a, **k: seen.append(1))
    run = trainer(model, tmp_path, max_steps=30)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.5 * before
    assert not seen, "logits were computed although nobody asked"
    monkeypatch.undo()
    torch.testing.assert_close(
        run.evaluate()["eval_loss"], evaluate_by_hand(model, run.eval_dataset), rtol=1e-4, atol=1e-5
    )


def evaluate_by_hand(model: SeqlibForCausalLM, data: Any) -> float:
    with torch.no_grad():
        ids = torch.tensor([row["input_ids"] for row in data])
        return model(ids, labels=ids).loss.item()


def test_logits_reach_the_metrics(tmp_path) -> None:
    run = trainer(tiny("mamba"), tmp_path, compute_metrics=lambda p: {"shape": p.predictions.shape})
    assert run.evaluate()["eval_shape"] == (8, 8, VOCAB)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("classify", "changes"), [(False, {}), (True, {}), (False, {"mixer": {"kind": "s4d"}})])
def test_gradient_accumulation_and_checkpointing_train_alike(
    classify: bool, changes: dict, checkpointing: bool, tmp_path
) -> None:
    """The passes of a step share the kernels of s4d."""
    weights = []
    for steps, batch in ((1, 8), (4, 2)):
        torch.manual_seed(0)
        model = SeqlibForSequenceClassification(tiny_config("mamba")) if classify else tiny("mamba", **changes)
        run = trainer(
            model, tmp_path, max_steps=2, gradient_accumulation_steps=steps, per_device_train_batch_size=batch,
            gradient_checkpointing=checkpointing, optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        if classify:
            run.train_dataset = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(DATA)]
        run.train()
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1])


def test_packed_training_equals_unpacked(tmp_path) -> None:
    losses = []
    for packed in (False, True):
        run = trainer(tiny("hybrid"), tmp_path, packed=packed)
        assert isinstance(run.data_collator, DataCollatorWithFlattening) == packed
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)


def test_weight_decay_falls_on_matrices_only(tmp_path) -> None:
    run = trainer(tiny("mamba", mlp={"d_mlp": 32}), tmp_path)
    names = {id(p): name for name, p in run.model.named_parameters()}
    groups = run.create_optimizer().param_groups
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    free = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert decayed | free == set(names.values()) and not decayed & free
    assert any("in_proj" in name for name in decayed)
    for name in names.values():
        if name.endswith(("A_log", ".D", "dt_bias", "bias", "norm.weight")):
            assert name in free, name


def test_trainer_keeps_loras_only(tmp_path) -> None:
    lora = get_peft_model(tiny("mamba"), LoraConfig(r=2, target_modules=["in_proj", "out_proj"]))
    run = trainer(lora, tmp_path, max_steps=20)
    before = run.evaluate()["eval_loss"]
    trained = {id(p) for group in run.create_optimizer().param_groups for p in group["params"]}
    assert trained == {id(p) for p in lora.parameters() if p.requires_grad}
    run.train()
    assert run.evaluate()["eval_loss"] < before


def test_checkpoints_rotate_and_resume(tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(tiny("mamba"), tmp_path, max_steps=6, save_total_limit=2, load_best_model_at_end=True, **options)
    run.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-6"]
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    resumed = trainer(tiny("mamba"), tmp_path, max_steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for a, b in zip(resumed.model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class FullDisk(TrainerCallback):
    """Makes the third save fail half-way."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise_at_save(kwargs["model"])


def raise_at_save(model: torch.nn.Module) -> None:
    save = model.save_pretrained

    def fail(folder: str, **kwargs: Any) -> None:
        save(folder, **kwargs)
        raise OSError(28, "No space left on device")

    model.save_pretrained = fail  # type: ignore[method-assign]


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    run = trainer(tiny("mamba"), tmp_path, callbacks=[FullDisk()], **options)
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-6").exists()
    resumed = trainer(tiny("mamba"), tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-6"]
