"""Pairs of sequences: both heads, padding, order, saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import prompt, tiny_config
from transformers import AutoModelForNextSentencePrediction

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.hf import SeqlibForPairClassification


def model(stack: str = "hybrid", **changes) -> SeqlibForPairClassification:
    torch.manual_seed(0)
    return SeqlibForPairClassification(tiny_config(stack, num_labels=3, initializer_range=0.5, **changes)).eval()


def pairs(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = prompt(*lengths), max(lengths)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, ids_ in enumerate(rows):
        ids[row, : ids_.shape[1]], mask[row, : ids_.shape[1]] = ids_[0], 1
    return ids.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))


@pytest.mark.parametrize("head", ["nli", "concat"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@torch.no_grad()
def test_padding_changes_no_logits(head: str, pooling: str) -> None:
    net = model(pair_head=head, pooling=pooling)
    ids, mask = pairs(7, 11, 4, 9)
    whole = net(ids, attention_mask=mask).logits
    assert whole.shape == (2, 3)
    alone, alone_mask = ids[1:, :, :9], mask[1:, :, :9]
    torch.testing.assert_close(net(alone, attention_mask=alone_mask).logits, whole[1:], rtol=0, atol=1e-5)
    swapped = net(ids.flip(1), attention_mask=mask.flip(1)).logits
    assert not torch.allclose(swapped, whole, atol=1e-3)


def test_nli_head_by_hand() -> None:
    net = model(pooling="last", stack="mamba")
    ids, _ = pairs(8, 8)
    a, b = (net.model(ids[:, i]).last_hidden_state[:, -1] for i in (0, 1))
    first, second = net.score.layers
    hidden = torch.nn.functional.gelu(first(torch.cat([a, b, a - b, a * b], -1)))
    torch.testing.assert_close(net(ids).logits, second(hidden))


@pytest.mark.parametrize("head", ["nli", "concat"])
def test_loss_and_gradients(head: str) -> None:
    net = model(pair_head=head).train()
    ids, mask = pairs(7, 11, 4, 9)
    out = net(ids, attention_mask=mask, labels=torch.tensor([2, 0]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([2, 0])))
    out.loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_saves_and_loads(tmp_path: Path) -> None:
    net = model(pair_head="concat")
    net.save_pretrained(tmp_path)
    loaded = AutoModelForNextSentencePrediction.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, SeqlibForPairClassification) and loaded.config.pair_head == "concat"
    ids, mask = pairs(5, 6)
    torch.testing.assert_close(loaded(ids, attention_mask=mask).logits, net(ids, attention_mask=mask).logits)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="pair_head"):
        tiny_config("mamba", pair_head="sum")
    with pytest.raises(UnsupportedInput, match="2, seqlen"):
        model()(torch.zeros(2, 5, dtype=torch.long))
