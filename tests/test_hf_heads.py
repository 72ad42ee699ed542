"""Heads for every position behave as those of transformers' models do, and configs have what tools read of any."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import OTHERS, STACKS, left_padded, prompt, tiny, tiny_config
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    MambaConfig,
    MambaForCausalLM,
    TrainingArguments,
    pipeline,
)

import seqlib
from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.hf import (
    ByteTokenizer,
    SeqlibConfig,
    SeqlibForCausalLM,
    SeqlibForMaskedLM,
    SeqlibForQuestionAnswering,
    SeqlibForTokenClassification,
    SeqlibTrainer,
)

BOTH_WAYS: dict[str, dict[str, Any]] = {
    "attention": {"mixer": {"kind": "attention", "nheads": 2, "causal": False}},
    "s4d": {"mixer": {"kind": "s4d", "d_state": 8, "bidirectional": True}},
    "fnet": {"mixer": {"kind": "fnet"}},
    "beside a causal one": {
        "layer_pattern": "m a",
        "mixers": {"m": {"kind": "mamba"}, "a": {"kind": "attention", "nheads": 2, "causal": False}},
    },
}
stacks = pytest.mark.parametrize("stack", [*STACKS, *OTHERS])
both_ways = pytest.mark.parametrize("fields", BOTH_WAYS.values(), ids=list(BOTH_WAYS))


def tagger(stack: str = "mamba", **changes: Any) -> SeqlibForTokenClassification:
    torch.manual_seed(0)
    fields = {"num_labels": 3, "initializer_range": 0.5} | changes
    return SeqlibForTokenClassification(tiny_config(stack, **fields)).eval()


def reader(stack: str = "mamba", **changes: Any) -> SeqlibForQuestionAnswering:
    torch.manual_seed(0)
    return SeqlibForQuestionAnswering(tiny_config(stack, initializer_range=0.5, **changes)).eval()


def guesser(fields: dict[str, Any], **changes: Any) -> SeqlibForMaskedLM:
    torch.manual_seed(0)
    layers = {"n_layer": 2, "d_model": 16, "vocab_size": 64, "initializer_range": 0.5}
    return SeqlibForMaskedLM(SeqlibConfig(**layers | fields | changes)).eval()


@stacks
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_as_if_it_were_not_there(stack: str, side: str) -> None:
    prompts = prompt(4, 9)
    ids, mask = left_padded(prompts, side)
    tags, spans = tagger(stack), reader(stack)
    labels = ids.masked_fill(mask == 0, -100) % 3
    labels[mask == 0] = -100
    out, span = tags(ids, attention_mask=mask, labels=labels), spans(ids, attention_mask=mask)
    scored = []
    for row, alone in enumerate(prompts):
        real = mask[row] == 1
        want = tags(alone).logits[0]
        torch.testing.assert_close(out.logits[row, real], want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(span.start_logits[row, real], spans(alone).start_logits[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(span.end_logits[row, real], spans(alone).end_logits[0], atol=1e-5, rtol=1e-4)
        scored.append(F.cross_entropy(want, labels[row, real], reduction="sum"))
    total = sum(scored, torch.zeros(()))
    torch.testing.assert_close(out.loss, total / int(mask.sum()))
    torch.testing.assert_close(tags(ids, attention_mask=mask, labels=labels, num_items_in_batch=2).loss, total / 2)


def test_spans_outside_the_sequence_are_not_scored() -> None:
    model, ids = reader(), torch.cat(prompt(6, 6))
    out = model(ids, start_positions=torch.tensor([2, 99]), end_positions=torch.tensor([[4], [5]]))
    want = (
        F.cross_entropy(out.start_logits[:1], torch.tensor([2])) + F.cross_entropy(out.end_logits, torch.tensor([4, 5]))
    ) / 2
    torch.testing.assert_close(out.loss, want)
    with pytest.raises(UnsupportedInput, match="both start_positions and end_positions"):
        model(ids, start_positions=torch.tensor([2, 3]))


@both_ways
@torch.no_grad()
def test_a_masked_token_is_told_from_both_sides(fields: dict[str, Any]) -> None:
    model, (ids,) = guesser(fields), prompt(9)
    labels = torch.full_like(ids, -100)
    labels[0, 4] = ids[0, 4]
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[0, 4:5], ids[0, 4:5]))
    for side in (3, 5):
        other = ids.clone()
        other[0, side] += 1
        assert not torch.allclose(model(other).logits[0, 4], out.logits[0, 4])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_masked_tokens_want_a_mixer_that_looks_both_ways() -> None:
    mixers = {"m": {"kind": "mamba"}, "a": {"kind": "attention", "nheads": 2}}
    config = SeqlibConfig(d_model=16, n_layer=2, vocab_size=9, layer_pattern="m a", mixers=mixers)
    with pytest.raises(ConfigError, match="attention, mamba looks one way only"):
        SeqlibForMaskedLM(config)


def test_arguments_and_labels_that_do_not_fit_are_refused() -> None:
    (ids,) = prompt(5)
    for model in (tagger(), reader(), guesser(BOTH_WAYS["attention"])):
        with pytest.raises(UnsupportedInput, match="did you mean 'attention_mask'"):
            model(ids, attention_masks=ids)
    for model in (tagger(), guesser(BOTH_WAYS["attention"])):
        with pytest.raises(UnsupportedInput, match="labels must have shape"):
            model(ids, labels=ids[:, 1:])


@pytest.mark.parametrize(
    ("make", "auto"),
    [
        (tagger, AutoModelForTokenClassification),
        (reader, AutoModelForQuestionAnswering),
        (lambda: guesser(BOTH_WAYS["s4d"]), AutoModelForMaskedLM),
    ],
)
@torch.no_grad()
def test_saved_and_opened_by_every_way(make: Any, auto: Any, tmp_path) -> None:
    model, (ids,) = make(), prompt(7)
    want = model(ids, output_hidden_states=True, return_dict=False)
    model.save_pretrained(tmp_path)
    for again in (
        auto.from_pretrained(tmp_path),
        seqlib.from_pretrained(tmp_path),
        type(model).from_pretrained(tmp_path),
    ):
        assert type(again) is type(model)
        assert again.config.id2label == model.config.id2label
        torch.testing.assert_close(again(ids)[0], want[0])
    assert len(want[-1]) == model.config.n_layer + 1


def test_a_new_head_on_a_trained_backbone_starts_as_its_own_would(tmp_path) -> None:
    tiny("mamba").save_pretrained(tmp_path)
    for auto, head in ((AutoModelForTokenClassification, "score"), (AutoModelForQuestionAnswering, "qa_outputs")):
        layer = getattr(auto.from_pretrained(tmp_path, initializer_range=0.02), head)
        assert isinstance(layer, nn.Linear) and layer.bias is not None
        assert bool((layer.bias == 0).all()) and 0 < float(layer.weight.detach().abs().max()) < 0.1


def train(model: nn.Module, rows: list[dict[str, Any]], folder: Any, steps: int = 60, **options: Any) -> SeqlibTrainer:
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-2,
        lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    trainer = SeqlibTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return trainer


def ids_of(n: int) -> Tensor:
    return torch.randint(3, 64, (n, 8), generator=torch.Generator().manual_seed(0))


def test_a_tagger_trains(tmp_path) -> None:
    """Whether the token before was an even one; the labels alone tell Trainer what to score."""
    rows = [{"input_ids": x, "labels": torch.cat([torch.tensor([-100]), x[:-1] % 2])} for x in ids_of(64)]
    trainer = train(tagger(num_labels=2).train(), rows, tmp_path)
    found = trainer.predict(rows)
    kept = found.label_ids >= 0
    assert (found.predictions.argmax(-1) == found.label_ids)[kept].mean() > 0.95


def test_a_reader_trains(tmp_path) -> None:
    """Where the largest token stands, which only a pass over all of them tells."""
    rows = [{"input_ids": x, "start_positions": x.argmax(), "end_positions": x.argmax()} for x in ids_of(64)]
    trainer = train(
        reader("attention", mixer={"kind": "attention", "nheads": 2, "causal": False}).train(), rows, tmp_path
    )
    assert set(trainer.label_names) == {"start_positions", "end_positions"}
    start, end = trainer.predict(rows).predictions
    want = torch.stack([row["start_positions"] for row in rows]).numpy()
    assert (start.argmax(-1) == want).mean() > 0.8 and (end.argmax(-1) == want).mean() > 0.8


def test_a_masked_language_model_trains_alike_in_smaller_batches(tmp_path) -> None:
    """A token and its neighbours are one, so both sides tell it; gradients that are summed over two batches count each
    scored token once, although the batches have different numbers of them."""
    rows = []
    for i, (x,) in enumerate(zip(ids_of(64)[:, :1])):
        ids, labels = x.expand(8).clone(), torch.full((8,), -100)
        for t in range(1, 2 + i % 3):
            labels[2 * t], ids[2 * t] = ids[2 * t].item(), 1
        rows.append({"input_ids": ids, "labels": labels})
    one, two = guesser(BOTH_WAYS["attention"]).train(), guesser(BOTH_WAYS["attention"]).train()
    train(one, rows, tmp_path, steps=1)
    halves = {"gradient_accumulation_steps": 2}
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, max_steps=1, per_device_train_batch_size=4, learning_rate=3e-2,
        lr_scheduler_type="constant", disable_tqdm=True, save_strategy="no", **halves,
    )  # fmt: skip
    SeqlibTrainer(model=two, args=arguments, train_dataset=rows).train()
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)
    history = train(one, rows, tmp_path, steps=80).state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]


def test_pipelines_know_the_heads(tmp_path) -> None:
    torch.manual_seed(0)
    model = SeqlibForTokenClassification(tiny_config("mamba", vocab_size=300, num_labels=2)).eval()
    found = pipeline("token-classification", model=model, tokenizer=ByteTokenizer())("héllo")
    assert {entry["entity"] for entry in found} <= {"LABEL_0", "LABEL_1"} and len(found) >= 5


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_configs_and_models_have_what_those_of_transformers_have(tmp_path) -> None:
    """Tools read these of any model without asking whether it has them; a few are of the mixers of others."""
    ours = tiny("mamba")
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8, state_size=4)
    theirs = MambaForCausalLM(config)
    names = ({n for n in dir(c) if hasattr(c, n)} for c in (config, BertConfig(), GPT2Config()))
    everywhere = set.intersection(*names)
    assert not [name for name in everywhere if not hasattr(ours.config, name)]
    own = {"_is_hf_initialized", "backbone"}
    assert not [name for name in dir(theirs) if not hasattr(ours, name) and name not in own]
    assert ours.config.auto_map == {} and "auto_map" not in json.loads(ours.config.to_json_string())
    SeqlibForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        ours.save_pretrained(tmp_path)
    finally:
        SeqlibForCausalLM._auto_class = None
    assert "AutoModelForCausalLM" in AutoConfig.from_pretrained(tmp_path).auto_map and not tiny("mamba").config.auto_map
    assert AutoConfig.for_model("seqlib", auto_map={"AutoModel": "a.B"}).auto_map == {"AutoModel": "a.B"}


@pytest.mark.parametrize("name", ["sdpa", "eager", None])
def test_attention_implementations_are_accepted_and_reported(name: str | None, tmp_path) -> None:
    model, (ids,) = tiny("attention"), prompt(6)
    model.save_pretrained(tmp_path)
    again = SeqlibForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    assert again.config._attn_implementation == (name or "sdpa")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="flash_attention_2|not support"):
        SeqlibForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
