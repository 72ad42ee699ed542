"""The generation loop against full forward passes."""

from __future__ import annotations

import pytest
import torch

from seqlib.errors import UnsupportedInput
from seqlib.models import BackboneConfig, LanguageModel
from seqlib.models.generation import generate, greedy, prefill, sampler, step
from seqlib.sequence import SequenceInfo

MIXERS = {
    "m": {"kind": "mamba", "d_state": 4},
    "a": {"kind": "attention", "nheads": 4},
    "w": {"kind": "sliding_attention", "nheads": 2, "window": 5},
}


@pytest.fixture(params=["m", "a", "w", "m a w m"])
def model(request) -> LanguageModel:
    torch.manual_seed(3)
    used = {name: MIXERS[name] for name in request.param.split()}
    config = BackboneConfig(d_model=32, n_layer=4, mixers=used, layer_pattern=request.param)
    made = LanguageModel(config, 40).double()
    torch.nn.init.normal_(made.embed_tokens.weight, std=1.0)  # spread logits: greedy choices without ties
    return made


def _greedy_by_forward(model: LanguageModel, ids: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, -n:]


def test_greedy_equals_full_forward(model: LanguageModel) -> None:
    ids = torch.randint(40, (3, 9))
    got = torch.stack(list(generate(model, ids, max_new_tokens=20)), 1)
    assert torch.equal(got, _greedy_by_forward(model, ids, 20))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_equal_their_own(model: LanguageModel, side: str) -> None:
    lengths = [9, 3, 1]
    ids, mask = torch.randint(40, (3, 9)), torch.zeros(3, 9, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, slice(9 - n, 9) if side == "left" else slice(0, n)] = True
    got = torch.stack(list(generate(model, ids, max_new_tokens=12, seq=SequenceInfo(padding_mask=mask))), 1)
    for row in range(3):
        assert torch.equal(got[row], _greedy_by_forward(model, ids[row, mask[row]][None], 12)[0])


def test_prefill_in_parts(model: LanguageModel) -> None:
    ids = torch.randint(40, (2, 17))
    want, whole = prefill(model, ids)
    _, state = prefill(model, ids[:, :6], max_seqlen=17)
    got, state = prefill(model, ids[:, 6:], state)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    a, _ = step(model, ids[:, 0], state)
    b, _ = step(model, ids[:, 0], whole)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_eos_stops_rows(model: LanguageModel) -> None:
    ids = torch.randint(40, (2, 5))
    free = torch.stack(list(generate(model, ids, max_new_tokens=10)), 1)
    eos = int(free[0, 2])
    got = torch.stack(list(generate(model, ids, max_new_tokens=10, eos=eos)), 1)
    for row in range(2):
        first = (free[row] == eos).nonzero()
        end = int(first[0]) + 1 if len(first) else got.shape[1]
        assert torch.equal(got[row, :end], free[row, :end])
        assert bool((got[row, end:] == eos).all())


def test_state_does_not_grow_for_recurrent_layers() -> None:
    config = BackboneConfig(d_model=32, n_layer=2, mixers={"m": {"kind": "mamba"}}, layer_pattern="m")
    model = LanguageModel(config, 40)
    _, short = prefill(model, torch.randint(40, (1, 3)))
    _, long = prefill(model, torch.randint(40, (1, 300)))
    assert short.nbytes == long.nbytes == model.backbone.state_bytes(1, 10**6)


def test_sampling() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([sampler(generator=generator)(logits) for _ in range(4000)])
    frequency = draws.bincount(minlength=4) / 4000
    torch.testing.assert_close(frequency, logits.exp()[0], atol=0.03, rtol=0)
    assert {int(sampler(top_k=2)(logits)) for _ in range(50)} == {0, 1}
    assert {int(sampler(top_p=0.5)(logits)) for _ in range(50)} == {0}
    assert int(sampler(temperature=1e-3)(logits)) == int(greedy(logits))


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_is_refused(wrong: dict) -> None:
    with pytest.raises(UnsupportedInput, match="temperature > 0"):
        sampler(**wrong)


def test_empty_prompt_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UnsupportedInput, match="prompt"):
        next(generate(model, torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1))
