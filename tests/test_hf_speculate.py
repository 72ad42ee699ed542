"""Taking tokens back: speculative decoding says what greedy decoding says, whatever carries the states."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import OTHERS, PAD, STACKS, left_padded, prompt, talker, tiny

from seqlib.errors import UnsupportedInput
from seqlib.hf import SeqlibCache, SeqlibForCausalLM
from seqlib.hf.rollback import DEPTH, TOGETHER

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(params=[*STACKS, *OTHERS])
def model(request) -> SeqlibForCausalLM:
    return talker(request.param)


def greedy(model: SeqlibForCausalLM, ids: torch.Tensor, new: int = 24, **kwargs):
    return model.generate(
        ids, **({"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD} | kwargs)
    )


class Passes:
    """Counts how often a model reads all its weights."""

    def __init__(self, model: SeqlibForCausalLM) -> None:
        self.lengths: list[int] = []
        self.hook = model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs, output) -> None:
        self.lengths.append(kwargs["input_ids"].shape[1])

    def __enter__(self) -> list[int]:
        return self.lengths

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("length", [9, DEPTH + 50])
def test_prompt_lookup_says_what_greedy_says(model, length: int) -> None:
    ids = torch.cat(prompt(5) * (length // 5), 1)
    with Passes(model) as lengths:
        assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=4), greedy(model, ids, use_cache=False))
    assert max(lengths[1:]) > 1  # something was drafted


def test_an_assistant_that_errs_costs_time_and_no_token(model) -> None:
    (ids,) = prompt(11)
    expected = greedy(model, ids)
    other = tiny("hybrid", d_model=8)
    assert torch.equal(greedy(model, ids, assistant_model=other, num_assistant_tokens=5), expected)


def test_an_assistant_that_never_errs_saves_passes(model) -> None:
    (ids,) = prompt(11)
    expected = greedy(model, ids)
    twin = copy.deepcopy(model)
    twin.generation_config.update(num_assistant_tokens=5, assistant_confidence_threshold=0.0, eos_token_id=None)
    with Passes(model) as lengths:
        assert torch.equal(greedy(model, ids, assistant_model=twin), expected)
    assert len(lengths) == 24 / 6


def test_the_first_layers_draft_for_the_whole_model(model) -> None:
    (ids,) = prompt(11)
    expected = greedy(model, ids, return_dict_in_generate=True, output_logits=True)
    drafted = greedy(model, ids, assistant_early_exit=1, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(drafted.sequences, expected.sequences)
    torch.testing.assert_close(drafted.logits, expected.logits, **CLOSE)
    assert model.config.n_layer == len(model.model.backbone.layers)


def test_speculation_samples_and_goes_on_from_a_cache(model) -> None:
    (ids,) = prompt(9)
    first = greedy(model, ids, 6, return_dict_in_generate=True, prompt_lookup_num_tokens=3)
    more = greedy(model, first.sequences, 6, past_key_values=first.past_key_values, prompt_lookup_num_tokens=3)
    assert torch.equal(more, greedy(model, ids, 12))
    torch.manual_seed(0)
    drawn = greedy(model, ids, 6, do_sample=True, assistant_model=copy.deepcopy(model))
    assert drawn.shape == (1, 15)


# Lengths of spans, and how many tokens to take back after each.
CUTS = [
    ([7, 3, 4], [2, 0, 1]),
    ([12, 1, 1, 1, 5], [0, 0, 1, 1, 5]),
    ([5, 1, 1, 1, 1, 1], [0, None, None, None, 3, 1]),
    ([6, TOGETHER + 4, 1, 1], [0, 1, 1, 0]),
    ([DEPTH + 9, 2, 3], [DEPTH, 1, 2]),
    ([4, 3], [4, 2]),
]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_what_follows_a_crop_is_as_if_it_had_never_been(model, cuts, padded: bool) -> None:
    made = torch.Generator().manual_seed(1)
    kept, real = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    cache = SeqlibCache()
    cache.activate_past_recording()
    for length, back in zip(*cuts):
        ids = torch.randint(3, 64, (2, length), generator=made)
        mask = torch.ones_like(ids)
        if padded and not kept.shape[1]:
            mask[1, : length // 2] = 0
        kept, real = torch.cat([kept, ids], 1), torch.cat([real, mask], 1)
        got = model(ids, attention_mask=real, past_key_values=cache).logits
        expected = model(kept, attention_mask=real, use_cache=False).logits[:, -length:]
        torch.testing.assert_close(got * mask[..., None], expected * mask[..., None], **CLOSE)
        if back is None:
            continue
        cache.crop(-back)
        kept, real = kept[:, : kept.shape[1] - back], real[:, : real.shape[1] - back]
        assert cache.get_seq_length() == kept.shape[1]


@torch.no_grad()
def test_hidden_states_are_those_of_the_new_tokens_alone(model) -> None:
    (ids,) = prompt(DEPTH + 12)
    cache = SeqlibCache()
    cache.activate_past_recording()
    model(ids[:, :-4], past_key_values=cache, output_hidden_states=True)
    cache.crop(-3)
    got = model(ids[:, -7:], past_key_values=cache, output_hidden_states=True).hidden_states
    expected = model(ids, output_hidden_states=True).hidden_states
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b[:, -7:], **CLOSE)


@torch.no_grad()
def test_rows_may_change_between_a_crop_and_what_follows(model) -> None:
    ids, mask = left_padded(prompt(6, 9))
    cache = SeqlibCache()
    cache.activate_past_recording()
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-2)
    other = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    for kept, rows in ((cache, [1, 0, 1]), (other, [0, 1])):
        following = torch.tensor([[5], [6], [7]])[: len(rows)]
        whole = torch.cat([ids[rows, :-2], following], 1)
        real = torch.cat([mask[rows, :-2], torch.ones_like(following)], 1)
        expected = model(whole, attention_mask=real).logits[:, -1:]
        torch.testing.assert_close(model(following, past_key_values=kept).logits, expected, **CLOSE)


def test_one_prefix_serves_many_continuations(model) -> None:
    (prefix,) = prompt(17)
    shared = model(prefix, use_cache=True).past_key_values
    before = [t.clone() for state in shared.states for t in state.tensors()]
    for tail in prompt(1, 4, 7):
        whole = torch.cat([prefix, tail], 1)
        assert torch.equal(greedy(model, whole, 6, past_key_values=copy.deepcopy(shared)), greedy(model, whole, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, (t for s in shared.states for t in s.tensors())))
    batch = copy.deepcopy(shared)
    batch.batch_repeat_interleave(3)
    tails = torch.cat(prompt(5, 5, 5))
    whole = torch.cat([prefix.expand(3, -1), tails], 1)
    assert torch.equal(greedy(model, whole, 6, past_key_values=batch), greedy(model, whole, 6))


def test_what_was_not_recorded_cannot_be_taken_back(model) -> None:
    (ids,) = prompt(DEPTH + 10)
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(UnsupportedInput, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(UnsupportedInput, match="minus the number"):
        cache.crop(3)
    cache.activate_past_recording()
    assert cache.is_croppable and cache.is_recording_past(0)
    with pytest.raises(UnsupportedInput, match="can take back 0 tokens, asked for 1"):
        cache.crop(-1)
    cache.reset()
    model(ids, past_key_values=cache)
    with pytest.raises(UnsupportedInput, match=f"can take back {DEPTH} tokens, asked for {DEPTH + 1}"):
        cache.crop(-DEPTH - 1)
    with pytest.raises(UnsupportedInput, match="depth must be from 1"):
        model.config.n_layer = 9
        model(ids)
