"""Tiny transformers models of every kind of stack, for the tests of seqlib.hf."""

from __future__ import annotations

from typing import Any

import torch

from seqlib.hf import SeqlibConfig, SeqlibForCausalLM

VOCAB, PAD, EOS = 64, 0, 1
STACKS: dict[str, dict[str, Any]] = {
    "mamba": {"mixer": {"kind": "mamba", "d_state": 4}, "n_layer": 2},
    "attention": {"mixer": {"kind": "attention", "nheads": 2}, "n_layer": 2, "mlp": {"d_mlp": 32}},
    "hybrid": {
        "layer_pattern": "m m a",
        "mixers": {"m": {"kind": "mamba", "d_state": 4}, "a": {"kind": "attention", "nheads": 2, "window": 5}},
        "n_layer": 3,
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "mamba2": {"mixer": {"kind": "mamba2", "d_state": 4, "headdim": 8}, "n_layer": 2},
    "lightning": {"mixer": {"kind": "lightning", "nheads": 2}, "n_layer": 2},
    "hybrid-delta": {
        "layer_pattern": "d a",
        "mixers": {"d": {"kind": "gated_deltanet", "nheads": 2, "headdim": 8}, "a": {"kind": "attention", "nheads": 2}},
        "n_layer": 2,
        "mlp": {"d_mlp": 24},
    },
}


def tiny_config(stack: str, **changes: Any) -> SeqlibConfig:
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
    return SeqlibConfig(**({"d_model": 16, "vocab_size": VOCAB, **ids, **(STACKS | OTHERS)[stack]} | changes))


def tiny(stack: str, **changes: Any) -> SeqlibForCausalLM:
    """A language model whose logits are spread enough that greedy choices do not hang on rounding."""
    torch.manual_seed(0)
    return SeqlibForCausalLM(tiny_config(stack, initializer_range=0.5, **changes)).eval()


def talker(stack: str, **changes: Any) -> SeqlibForCausalLM:
    """A tiny language model that says what its history makes it say (tests/test_mutations.py).

    The head is not tied, which would repeat the last token, and mixers add more to the stream than a fresh model's do.
    """
    model = tiny(stack, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        for name, weight in model.model.backbone.named_parameters():
            if name.endswith(("mixer.out_proj.weight", "mixer.o_proj.weight")):
                weight.mul_(24 if stack == "lightning" else 4)
        model.lm_head.weight[[PAD, EOS]] = 0  # generate() would take what it said itself for padding
    return model


def prompt(*lengths: int) -> list[torch.Tensor]:
    """Random token ids without specials, one (1, length) tensor per length."""
    made = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCAB, (1, n), generator=made) for n in lengths]


def left_padded(prompts: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """ids and attention mask of a batch padded to the longest."""
    width = max(p.shape[1] for p in prompts)
    ids, mask = torch.full((len(prompts), width), PAD), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, p in enumerate(prompts):
        where = slice(width - p.shape[1], None) if side == "left" else slice(0, p.shape[1])
        ids[row, where], mask[row, where] = p[0], 1
    return ids, mask
