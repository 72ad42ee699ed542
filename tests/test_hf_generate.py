"""Caches and generation: the same tokens whatever the batch, the padding, the cache and the way they are asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import PAD, STACKS, left_padded, prompt, talker, tiny, tiny_config
from transformers import DynamicCache, TextStreamer, pipeline

from seqlib.errors import UnsupportedInput
from seqlib.hf import ByteTokenizer, SeqlibCache, SeqlibForCausalLM, SeqlibForSequenceClassification, SeqlibModel
from seqlib.hf.names import CACHE, CACHE_NAMES, returned_cache
from seqlib.hf.pair import SeqlibForPairClassification
from seqlib.models import generation

CLOSE = {"rtol": 0, "atol": 1e-5}
stacks = pytest.mark.parametrize("stack", STACKS)


@pytest.fixture(params=STACKS)
def model(request) -> SeqlibForCausalLM:
    return talker(request.param)


def greedy(model: SeqlibForCausalLM, ids: torch.Tensor, new: int = 8, **kwargs) -> torch.Tensor:
    kwargs = {"eos_token_id": None, "pad_token_id": PAD} | kwargs
    return model.generate(ids, max_new_tokens=new, do_sample=False, **kwargs)


def test_cached_generation_equals_recomputing_everything(model) -> None:
    (ids,) = prompt(9)
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, use_cache=False), expected)


def test_left_padded_batch_equals_single_and_whole(model) -> None:
    prompts = prompt(3, 11, 7)
    ids, mask = left_padded(prompts)
    together = greedy(model, ids, 24, attention_mask=mask)
    for row, p in zip(together, prompts):
        assert torch.equal(row[ids.shape[1] :], greedy(model, p, 24)[0, p.shape[1] :])
        assert torch.equal(row[ids.shape[1] :], greedy(model, p, 24, use_cache=False)[0, p.shape[1] :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_logit_and_no_state(model, side: str) -> None:
    prompts = prompt(4, 9)
    ids, mask = left_padded(prompts, side)
    padded = model(ids, attention_mask=mask, use_cache=True)
    following = torch.tensor([[5], [6]])
    after = model(following, past_key_values=padded.past_key_values)
    for row, p in enumerate(prompts):
        alone = model(p, use_cache=True)
        torch.testing.assert_close(padded.logits[row][mask[row].bool()], alone.logits[0], **CLOSE)
        next_alone = model(following[row : row + 1], past_key_values=alone.past_key_values)
        torch.testing.assert_close(after.logits[row], next_alone.logits[0], **CLOSE)


def test_continuation_with_many_tokens_is_exact(model) -> None:
    (ids,) = prompt(14)
    whole = model(ids).logits
    cache, parts = SeqlibCache(), []
    for part in ids.split([5, 1, 6, 2], 1):
        parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    assert cache.get_seq_length() == 14 and cache.get_mask_sizes(3, 0) == (17, 0)


@pytest.mark.parametrize("allocated", [None, 20])
def test_single_steps_are_exact(model, allocated) -> None:
    (ids,) = prompt(12)
    whole = model(ids).logits
    cache = SeqlibCache(max_seqlen=allocated)
    with torch.no_grad():
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)


def test_generation_goes_on_from_a_returned_cache(model) -> None:
    (ids,) = prompt(6)
    first = greedy(model, ids, 3, return_dict_in_generate=True)
    more = greedy(model, first.sequences, 4, past_key_values=copy.deepcopy(first.past_key_values))
    assert torch.equal(more, greedy(model, ids, 7, use_cache=False))


def test_chunked_prefill(model) -> None:
    prompts = prompt(4, 11)
    ids, mask = left_padded(prompts)
    for row, p in zip(greedy(model, ids, 24, attention_mask=mask, prefill_chunk_size=4), prompts):
        assert torch.equal(row[ids.shape[1] :], greedy(model, p, 24, use_cache=False)[0, p.shape[1] :])


def test_inputs_embeds_equal_ids(model) -> None:
    (ids,) = prompt(7)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    generated = greedy(model, None, inputs_embeds=embeds)
    assert torch.equal(generated, greedy(model, ids)[:, 7:])


def test_beam_search_equals_beam_search_without_cache(model) -> None:
    prompts, asked = prompt(4, 8), {"num_beams": 3, "num_return_sequences": 2}
    ids, mask = left_padded(prompts)
    with_cache = greedy(model, ids, attention_mask=mask, **asked)
    assert with_cache.shape == (4, 16)
    for rows, p in zip(with_cache.split(2), prompts):
        assert torch.equal(rows[:, 8:], greedy(model, p, use_cache=False, **asked)[:, p.shape[1] :])


def test_sampling_draws_several_sequences_per_prompt(model) -> None:
    (ids,) = prompt(5)
    torch.manual_seed(0)
    drawn = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=16, num_return_sequences=3, eos_token_id=None)
    assert drawn.shape == (3, 21) and bool((drawn[:, :5] == ids).all())
    assert len({tuple(row.tolist()) for row in drawn}) > 1
    torch.manual_seed(0)
    again = model.generate(
        ids, do_sample=True, top_k=0, max_new_tokens=16, num_return_sequences=3, eos_token_id=None, use_cache=False
    )
    assert torch.equal(drawn, again)


def test_rows_stop_at_eos_and_are_padded(model) -> None:
    ids, mask = left_padded(prompt(4, 8))
    free = greedy(model, ids, 8, attention_mask=mask)
    stop = int(free[0, ids.shape[1] + 2])  # what row 0 says third
    stopped = greedy(model, ids, 8, attention_mask=mask, eos_token_id=stop)
    said = free[0, ids.shape[1] :].tolist().index(stop)
    assert stopped[0, ids.shape[1] + said] == stop
    assert bool((stopped[0, ids.shape[1] + said + 1 :] == PAD).all())


def test_own_loop_and_transformers_loop_agree(model) -> None:
    (ids,) = prompt(9)
    own = torch.stack(list(generation.generate(_Parts(model), ids, max_new_tokens=8)), 1)
    assert torch.equal(torch.cat([ids, own], 1), greedy(model, ids))


class _Parts:
    """The three parts that seqlib's own generation loop asks for."""

    def __init__(self, model: SeqlibForCausalLM) -> None:
        self.embed_tokens, self.backbone, self.lm_head = model.model.embed_tokens, model.model.backbone, model.lm_head


def test_cache_batch_operations(model) -> None:
    ids = torch.cat(prompt(6, 6))
    cache = model(ids, use_cache=True).past_key_values
    assert cache.batch_size == 2 and cache and len(cache) == model.config.num_hidden_layers
    expected = model(torch.tensor([[5], [6]]), past_key_values=copy.deepcopy(cache)).logits

    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    logits = model(torch.tensor([[5], [5], [6], [6]]), past_key_values=repeated).logits
    torch.testing.assert_close(logits, expected.repeat_interleave(2, 0), **CLOSE)

    for rows in (torch.tensor([1]), torch.tensor([False, True])):
        selected = copy.deepcopy(cache)
        selected.batch_select_indices(rows)
        torch.testing.assert_close(model(torch.tensor([[6]]), past_key_values=selected).logits, expected[1:], **CLOSE)

    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    logits = model(torch.tensor([[6], [5]]), past_key_values=swapped).logits
    torch.testing.assert_close(logits, expected.flip(0), **CLOSE)

    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)
    assert not cache.is_compileable


def test_generation_allocates_the_key_value_states_once() -> None:
    model = tiny("attention")
    (ids,) = prompt(5)
    sizes = set()
    run = model.model.backbone.step

    def watch(x, state, *rest):
        sizes.add(state.nbytes)
        return run(x, state, *rest)

    model.model.backbone.step = watch
    greedy(model, ids, 10)
    assert len(sizes) == 1


@stacks
def test_pipeline_and_streamer_with_bytes(stack: str, capsys) -> None:
    tokenizer = ByteTokenizer()
    model = tiny(stack, vocab_size=len(tokenizer), pad_token_id=256, bos_token_id=257, eos_token_id=258)
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "return_full_text": False}
    texts = ["to be", "or not to be"]
    together = speak(texts, batch_size=2, **asked)
    for text, (answer,) in zip(texts, together):
        assert speak(text, **asked)[0]["generated_text"] == answer["generated_text"]
    ids = torch.tensor([tokenizer("to be")["input_ids"]])
    streamed = greedy(model, ids, 5, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(streamed[0, 5:]) + "\n"


def test_what_does_not_fit_is_refused(model) -> None:
    (ids,) = prompt(5)
    with pytest.raises(UnsupportedInput, match="SeqlibCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(UnsupportedInput, match="cache_implementation"):
        model.generate(ids, max_new_tokens=2, cache_implementation="offloaded")
    with pytest.raises(UnsupportedInput, match="exactly one"):
        model()
    with pytest.raises(UnsupportedInput, match="attention_mask must have shape"):
        model(ids, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(UnsupportedInput, match="attention_mask must have shape"):
        model(ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(UnsupportedInput, match="1 at real tokens and 0 at padding"):
        model(ids, attention_mask=torch.tensor([[-torch.inf, -torch.inf, 0.0, 0.0, 0.0]]))
    for wrong in ({"position_ids": torch.arange(4)[None]}, {"seq_idx": torch.zeros(1, 4, dtype=torch.long)}):
        with pytest.raises(UnsupportedInput, match=r"must have shape \(1, 5\), got \(1, 4\)"):
            model(ids, **wrong)


def test_masks_by_layer_type_and_static_caches_are_taken(model) -> None:
    prompts = prompt(3, 6)
    ids, mask = left_padded(prompts)
    four = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    given = model(ids, attention_mask={"full_attention": four, "linear_attention": mask}).logits
    torch.testing.assert_close(model(ids, attention_mask={"linear_attention": None}).logits, model(ids).logits)
    said = greedy(model, ids, 24, attention_mask=mask, cache_implementation="static")
    for logits, row, p in zip(given, said, prompts):
        torch.testing.assert_close(logits[-p.shape[1] :], model(p).logits[0], **CLOSE)
        assert torch.equal(row[6:], greedy(model, p, 24, use_cache=False)[0, p.shape[1] :])


def test_the_cache_has_two_names_of_which_one_is_given(model) -> None:
    (ids,) = prompt(9)
    whole = model(ids).logits
    for name in CACHE_NAMES:
        before = returned_cache(model(ids[:, :5], use_cache=True))
        torch.testing.assert_close(model(ids[:, 5:], **{name: before}).logits, whole[:, 5:], **CLOSE)
    for call in (model, model.generate):
        with pytest.raises(UnsupportedInput, match="two names of one argument"):
            call(ids, cache=SeqlibCache(), past_key_values=SeqlibCache())


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_either_name_of_the_cache_is_good_for_whatever_generates(model, name: str) -> None:
    """In every version: as an argument, and of what comes back."""
    (ids,) = prompt(6)
    want = greedy(model, ids, 9, use_cache=False)
    first = greedy(model, ids, 3, return_dict_in_generate=True)
    before = getattr(first, name)
    assert before is returned_cache(first) and before.get_seq_length() == 8
    assert torch.equal(greedy(model, first.sequences, 6, **{name: copy.deepcopy(before)}), want)
    beams = greedy(model, first.sequences, 6, num_beams=2, return_dict_in_generate=True)
    given = {name: SeqlibCache()}
    again = greedy(model, first.sequences, 6, num_beams=2, return_dict_in_generate=True, **given)
    assert torch.equal(again.sequences, beams.sequences) and getattr(again, name) is given[name]
    output = model(ids, use_cache=True)
    assert getattr(output, name) is returned_cache(output)
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **{name: SeqlibCache()})
    assert [type(inputs[key]) for key in CACHE_NAMES if key in inputs] == [SeqlibCache]


def test_lists_by_layer_of_a_cache_have_an_entry_for_each() -> None:
    """transformers asks any() and all() of them, and empty lists would be neither."""
    cache = SeqlibCache()
    for n in (1, 3):
        for name in ("is_linear", "is_sliding", "is_dummy"):
            assert getattr(cache, name) == [False] * n
        tiny("hybrid")(prompt(4)[0], cache=cache)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ({"attention_maks": 1}, "attention_mask"),
        ({"cu_seqlens": 1}, "cu_seq_lens_q"),
        ({"label": 1}, "labels"),
        ({"past_key_value": None}, "past_key_values"),
        ({"output_hidden_state": True}, "output_hidden_states"),
        ({"seqidx": 1}, "seq_idx"),
        ({"shift_label": 1}, "shift_labels"),
        ({"num_item_in_batch": 1}, "num_items_in_batch"),
        ({"zzz": 1}, None),
    ],
)
def test_an_argument_that_nobody_knows_is_refused_with_the_nearest(wrong: dict, meant: str | None) -> None:
    """In every forward, instead of results without it."""
    ids = torch.ones(1, 2, 4, dtype=torch.long)
    for cls in (SeqlibForCausalLM, SeqlibModel, SeqlibForSequenceClassification, SeqlibForPairClassification):
        model = cls(tiny_config("mamba"))
        with pytest.raises(UnsupportedInput, match=f"{cls.__name__} has no argument {next(iter(wrong))!r}") as error:
            model(ids if cls is SeqlibForPairClassification else ids[0], **wrong)
        name, said = next(iter(wrong)), str(error.value)
        if meant is None:
            assert f"no argument {name!r}. Its arguments are " in said
        elif f"{meant}, " in said.partition("Its arguments are ")[2]:
            assert f"did you mean {meant!r}? Its" in said
        else:
            assert cls is not SeqlibForCausalLM


@pytest.mark.parametrize("name", ["output_attentions", "token_type_ids", "cache_params", "encoder_hidden_states"])
def test_what_these_models_lack_may_be_declined_but_not_asked_for(name: str) -> None:
    model, (ids,) = tiny("mamba"), prompt(5)
    for nothing in (None, False, 0):
        assert torch.equal(model(ids, **{name: nothing}).logits, model(ids).logits)
    for wanted in (True, ids):
        with pytest.raises(UnsupportedInput, match=f"nothing for {name}="):
            model(ids, **{name: wanted})


def test_what_transformers_passes_to_any_model_is_let_through() -> None:
    model, (ids,) = tiny("mamba"), prompt(5)
    flat = {"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 5]), "max_length_q": 5}
    passed = {"output_attentions": False, "return_dict": True, "num_items_in_batch": 4, "max_length_k": 5, **flat}
    assert torch.equal(model(ids, **passed).logits, model(ids).logits)


def test_a_prefix_read_in_inference_mode_goes_on_outside(model) -> None:
    (ids,) = prompt(9)
    whole = model(ids).logits
    for grad in (False, True):
        with torch.inference_mode():
            cache = returned_cache(model(ids[:, :4], use_cache=True))
            model(ids[:, 4:5], cache=cache)
        with torch.set_grad_enabled(grad):
            one = model(ids[:, 5:6], cache=cache).logits
            rest = model(ids[:, 6:], cache=cache).logits
        torch.testing.assert_close(torch.cat([one, rest], 1), whole[:, 5:], **CLOSE)


def test_speculation_goes_on_from_a_cache_without_reading_it_twice(model) -> None:
    (ids,) = prompt(9)
    cache = returned_cache(model(ids[:, :-1], use_cache=True))
    cache.activate_past_recording()
    said = greedy(model, ids, 12, prompt_lookup_num_tokens=3, **{CACHE: cache})
    assert torch.equal(said, greedy(model, ids, 12, use_cache=False))
