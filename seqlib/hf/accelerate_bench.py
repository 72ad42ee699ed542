"""`python -m seqlib.hf.accelerate_bench`: what `accelerate_transformers` brings to a stock Mamba of 130M."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from seqlib.bench.clock import machine
from seqlib.hf.accelerate import accelerate_transformers

__all__ = ["measure"]

SIZES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mamba-130m": (MambaForCausalLM, MambaConfig, {"hidden_size": 768, "num_hidden_layers": 24}),
    "mamba2-130m": (
        Mamba2ForCausalLM,
        Mamba2Config,
        {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "n_groups": 1},
    ),
}
VOCABULARY = 50280


def measure(model: Any, seqlen: int, train_seqlen: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of a forward pass with and without the head, of a training step and a token; logits to compare."""
    ids = torch.randint(0, VOCABULARY, (1, max(seqlen, train_seqlen)), generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.no_grad():
            model(ids[:, :seqlen], use_cache=False)

    def hidden() -> None:
        with torch.no_grad():
            model.base_model(ids[:, :seqlen], use_cache=False)

    def train() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        model(ids[:, :train_seqlen], labels=ids[:, :train_seqlen], use_cache=False).loss.backward()
        model.eval()

    def decode() -> None:
        model.generate(
            ids[:, :4], min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )

    with torch.no_grad():
        logits = model(ids[:, :64], use_cache=False).logits
    return {
        "forward_s": _best(forward, repeats),
        "forward_without_head_s": _best(hidden, repeats),
        "train_s": _best(train, repeats),
        "decode_s_per_token": _best(decode, repeats) / new_tokens,
        "logits": logits,
    }


def _best(run: Callable[[], None], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SIZES, default="mamba-130m")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--train-seqlen", type=int, default=256, help="the stock backward pass keeps every state")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, help="fewer than the real model, for a quick look")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    cls, config, options = SIZES[asked.model]
    torch.manual_seed(0)
    layers = asked.layers or options["num_hidden_layers"]
    model = cls(config(vocab_size=VOCABULARY, **options | {"num_hidden_layers": layers})).eval()
    sizes = (asked.seqlen, asked.train_seqlen, asked.new_tokens, asked.repeats)
    stock = measure(model, *sizes)
    with accelerate_transformers(verbose=False):
        ours = measure(model, *sizes)
    expected, got = stock.pop("logits"), ours.pop("logits")
    result = {
        "model": asked.model,
        "layers": layers,
        "seqlen": asked.seqlen,
        "train_seqlen": asked.train_seqlen,
        "stock": stock,
        "accelerated": ours,
        "times_faster": {name: stock[name] / ours[name] for name in stock},
        "logits_relative_difference": float((got - expected).abs().max() / expected.abs().max()),
        "machine": machine(),
    }
    print(json.dumps(result, indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    _main()
