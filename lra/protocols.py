"""Protocols: the choices that make two scores comparable, or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seqlib.errors import ConfigError

__all__ = ["PROTOCOLS", "Protocol", "get_protocol"]


@dataclass(frozen=True)
class Protocol:
    """How data becomes token ids and splits, and what the model reads off at the end."""

    name: str
    note: str
    seqlen: dict[str, int]
    """Longest sequence per task; what is longer loses its end."""
    units: Literal["bytes", "characters"]
    """Of text: bytes (id = byte + 1, 0 is padding) or characters that occur at least 15 times in the training text."""
    text_validation: Literal["held-out", "test"]
    """A tenth of the training reviews, or the test reviews themselves, which selects the model on the test set."""
    image_split: Literal["order", "torch-42", "seeded"]
    """Images for validation and test: the last ones, torch's random_split with seed 42, or our own permutation."""
    gray: Literal["truncated", "rounded"]
    """CIFAR-10 to gray: 0.2989 R + 0.5870 G + 0.1140 B of 0 .. 1, times 255.5 and cut to an integer, as TensorFlow
    does it, or ITU-R 601 rounded."""
    pooling: Literal["last", "mean"] = "mean"
    pair_head: Literal["concat", "nli"] = "nli"


def _lengths(listops: int, text: int, retrieval: int) -> dict[str, int]:
    images = {"image": 1024, "pathfinder": 1024, "pathx": 16384, "pathfinder256": 65536}
    return {"listops": listops, "text": text, "retrieval": retrieval} | images


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            "seqlib", "nothing is selected on test data; a tenth of the training reviews is held out",
            _lengths(2048, 4096, 4000), "bytes", "held-out", "seeded", "rounded",
        ),
        Protocol(
            "lra", "google-research/long-range-arena: text validates on test; the last token is read where the "
            "published code reads a CLS token; text at the paper's 4000 (the code's base config says 1000)",
            _lengths(2000, 4000, 4000), "bytes", "test", "order", "truncated", "last", "concat",
        ),
        Protocol(
            "s4", "state-spaces/s4, also S5 and SGConv: characters, text validates on test, torch seed 42 for images; "
            "the recipes of that family read pixels as one real channel",
            _lengths(2048, 4096, 4000), "characters", "test", "torch-42", "rounded",
        ),
        Protocol(
            "nys", "mlpen/Nystromformer and Skyformer: small models, bytes, models picked on validation data; the "
            "image split is unseeded there and seeded here",
            _lengths(2000, 4000, 4000), "bytes", "test", "seeded", "truncated",
        ),
    )
}  # fmt: skip


def get_protocol(name: str) -> Protocol:
    """A protocol by name."""
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
