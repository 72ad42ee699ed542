"""Tests of the tests: what generation must not lose, taken away on purpose, makes its tests fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_hf_generate as generating
import test_hf_train as training
from hf_models import STACKS, prompt, talker

from seqlib.hf import SeqlibModel, modeling


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
    (without_mask, lambda model: generating.test_padding_moves_no_logit_and_no_state(model, "left")),
    (without_mask, lambda model: generating.test_padding_moves_no_logit_and_no_state(model, "right")),
    (without_positions, training.test_packed_row_goes_on_from_a_cache),
    *(
        (without_positions, lambda model, way=way: training.test_packed_documents_do_not_see_each_other(model, way))
        for way in ("position_ids", "seq_idx", "cu_seq_lens_q")
    ),
]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_is_taken_away_is_missed(case: int, stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, test = CASES[case]
    test(talker(stack))
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test(talker(stack))


@pytest.mark.parametrize("stack", STACKS)
def test_tiny_models_do_not_repeat_themselves(stack: str) -> None:
    (ids,) = prompt(9)
    said = generating.greedy(talker(stack), ids, 24)[0, 9:].tolist()
    assert len(set(said)) > 8, said
