"""Tests of the tests: what generation must not lose, taken away on purpose, makes its tests fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_hf_generate as generating
import test_hf_train as training
import torch
from hf_models import OTHERS, PAD, STACKS, left_padded, prompt, talker, tiny
from test_mixers import VARIANTS
from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.hf import SeqlibCache, SeqlibForCausalLM, SeqlibModel, modeling
from seqlib.hf.names import returned_cache
from seqlib.mixers import MIXERS, looks_ahead


def without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every span begins anew; only positions are counted."""
    advance = SeqlibModel._advance

    def forgetful(self: Any, cache: Any, new: Any, *rest: Any) -> Any:
        seen = cache.get_seq_length()
        cache.states = cache.record = None
        hidden = advance(self, cache, new, *rest)
        cache.states.seqlen += seen
        return hidden

    monkeypatch.setattr(SeqlibModel, "_advance", forgetful)


def ignoring(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        info = modeling.sequence_info
        monkeypatch.setattr(modeling, "sequence_info", lambda *a, **k: info(*a, **{**k, **dict.fromkeys(names, None)}))

    return mutate


# generate() makes positions from the mask, which tell where a row begins.
without_mask = ignoring("attention_mask", "position_ids")
without_positions = ignoring("position_ids", "seq_idx", "cu_seq_lens_q")
CASES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Any], None]]] = [
    (without_cache, generating.test_cached_generation_equals_recomputing_everything),
    (without_cache, generating.test_left_padded_batch_equals_single_and_whole),
    (without_cache, generating.test_continuation_with_many_tokens_is_exact),
    (without_cache, lambda model: generating.test_single_steps_are_exact(model, 20)),
    (without_cache, generating.test_generation_goes_on_from_a_returned_cache),
    (without_cache, generating.test_chunked_prefill),
    (without_cache, generating.test_beam_search_equals_beam_search_without_cache),
    (without_cache, generating.test_sampling_draws_several_sequences_per_prompt),
    (without_cache, training.test_packed_row_goes_on_from_a_cache),
    (without_cache, generating.test_masks_by_layer_type_and_static_caches_are_taken),
    (without_mask, generating.test_masks_by_layer_type_and_static_caches_are_taken),
    (without_mask, lambda model: generating.test_padding_moves_no_logit_and_no_state(model, "left")),
    (without_mask, lambda model: generating.test_padding_moves_no_logit_and_no_state(model, "right")),
    (without_positions, training.test_packed_row_goes_on_from_a_cache),
    *(
        (without_positions, lambda model, way=way: training.test_packed_documents_do_not_see_each_other(model, way))
        for way in ("position_ids", "seq_idx", "cu_seq_lens_q")
    ),
]


@pytest.mark.parametrize("stack", [*STACKS, *OTHERS])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_is_taken_away_is_missed(case: int, stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, test = CASES[case]
    test(talker(stack))
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test(talker(stack))


@pytest.mark.parametrize("stack", [*STACKS, *OTHERS])
def test_tiny_models_do_not_repeat_themselves(stack: str) -> None:
    (ids,) = prompt(9)
    said = generating.greedy(talker(stack), ids, 24)[0, 9:].tolist()
    assert len(set(said)) > 8, said


# The same of every kind of mixer, by logits: padded rows and packed documents, cached, against each alone and uncached,
# where none of this can go wrong.
CLOSE = {"rtol": 0, "atol": 1e-3}
NEW = 4
STATELESS = {"channel"}  # knows one position only
KINDS = [kind for kind in MIXERS if kind not in STATELESS and not looks_ahead({"kind": kind, **VARIANTS[kind][0]})]
WIDTH = 32  # of the configs in VARIANTS


def of_kind(kind: str) -> SeqlibForCausalLM:
    mixer = {"kind": kind, **VARIANTS[kind][0]}
    return tiny("mamba", mixer=mixer, d_model=WIDTH, tie_word_embeddings=False)


def alone(model: SeqlibForCausalLM, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits[0]


def in_steps(model: SeqlibForCausalLM) -> None:
    prompts, following = prompt(3, 9), torch.cat(prompt(NEW, NEW))
    ids, mask = left_padded(prompts) if supports(model, "padded") else (torch.cat(prompt(9, 9)), None)
    rows = prompts if mask is not None else list(ids.split(1))
    with torch.no_grad():
        cache = returned_cache(model(ids, attention_mask=mask, use_cache=True))
        steps = []
        for t in range(NEW):
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            steps.append(model(following[:, t : t + 1], attention_mask=mask, cache=cache).logits)
        for got, row, after in zip(torch.cat(steps, 1), rows, following.split(1)):
            torch.testing.assert_close(got, alone(model, torch.cat([row, after], 1))[-NEW:], **CLOSE)


def in_generate(model: SeqlibForCausalLM, **options: Any) -> None:
    ids, mask = left_padded(prompt(3, 10)) if supports(model, "padded") else (torch.cat(prompt(10, 10)), None)
    asked = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **asked, **options)
    for row, said, logits in zip(ids, out.sequences, torch.stack(out.logits, 1)):
        begin = 0 if mask is None else int((row == PAD).sum())
        torch.testing.assert_close(logits, alone(model, said[None, begin:])[-NEW - 1 : -1], **CLOSE)


def in_chunked_prefill(model: SeqlibForCausalLM) -> None:
    in_generate(model, prefill_chunk_size=4)


def in_packed_rows(model: SeqlibForCausalLM) -> None:
    """Cut inside the second of three documents, which goes on from the cache."""
    documents = prompt(4, 5, 3)
    ids, positions = torch.cat(documents, 1), torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    with torch.no_grad():
        first = model(ids[:, :6], position_ids=positions[:, :6], use_cache=True)
        second = model(ids[:, 6:], position_ids=positions[:, 6:], cache=returned_cache(first))
        want = torch.cat([alone(model, document) for document in documents])
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1)[0], want, **CLOSE)


def supports(model: SeqlibForCausalLM, what: str) -> bool:
    return all(what in layer.mixer.supports for layer in model.model.backbone.layers)


def without_state_of(layer: int) -> Callable[[pytest.MonkeyPatch], None]:
    """One layer begins every span anew, as if its state had not been handed on."""

    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        advance = SeqlibModel._advance

        def forgetful(self: Any, cache: Any, new: Any, *rest: Any) -> Any:
            hidden = advance(self, cache, new, *rest)
            batch, room = len(new.x), cache.max_seqlen or 64
            cache.states.states[layer] = self.backbone.mixer(layer).initial_state(batch, room, dtype=new.x.dtype)
            return hidden

        monkeypatch.setattr(SeqlibModel, "_advance", forgetful)

    return mutate


def without_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache says that it holds nothing."""
    monkeypatch.setattr(SeqlibCache, "get_seq_length", lambda *_: 0)


LOST = [without_cache, without_state_of(0), without_state_of(1)]
WAYS: dict[Callable[[SeqlibForCausalLM], None], list[Callable[[pytest.MonkeyPatch], None]]] = {
    in_steps: [*LOST, without_mask],
    in_generate: [*LOST, without_mask],
    in_chunked_prefill: [*LOST, without_mask, without_count],
    in_packed_rows: [*LOST, without_positions],
}


@pytest.mark.parametrize("check", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_any_mixer_loses_is_missed(kind: str, check: Callable[[SeqlibForCausalLM], None]) -> None:
    model = of_kind(kind)
    if check is in_packed_rows and not supports(model, "packed"):
        pytest.skip("the mixer declares no packing; test_packed_equals_separate checks the refusal")
    check(model)
    for mutate in WAYS[check]:
        if mutate is without_mask and not supports(model, "padded"):
            continue
        with pytest.MonkeyPatch.context() as monkeypatch:
            mutate(monkeypatch)
            with pytest.raises((AssertionError, UnsupportedInput)):
                check(model)
