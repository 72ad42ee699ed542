"""The model card beside saved weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

__all__ = ["Card"]


@dataclass(frozen=True)
class Card:
    """What a model card says beyond the config.

    >>> print(Card(license="mit").header(["seqlib"]))
    ---
    library_name: transformers
    license: mit
    tags:
    - seqlib
    ---
    """

    license: str | None = None
    """An identifier of the Hub's list, such as "apache-2.0"; None leaves it out."""
    figures: Mapping[str, float | str] = field(default_factory=dict)
    """What was measured, by name: {"bits per byte, held-out text": 1.31}."""
    text: str = ""
    """Further paragraphs."""

    def header(self, tags: list[str], task: str | None = None) -> str:
        """The metadata block that the Hub reads."""
        lines = ["library_name: transformers"]
        lines += [f"license: {self.license}"] if self.license else []
        lines += [f"pipeline_tag: {task}"] if task else []
        lines += ["tags:", *(f"- {tag}" for tag in tags)]
        return "\n".join(["---", *lines, "---"])

    def render(self, model: Any) -> str:
        """The whole card of a seqlib model."""
        config = model.config
        writes = hasattr(model, "lm_head")
        layers = [f"{sum(1 for _ in run)} x {name}" for name, run in groupby(config.layer_pattern)]
        kinds = {name: json.dumps(fields, sort_keys=True) for name, fields in config.mixers.items()}
        parts = [
            self.header(["seqlib"], "text-generation" if writes else None),
            f"# {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
            self.text,
            f"Width {config.d_model}, {config.n_layer} layers, vocabulary {config.vocab_size}, "
            f"made for {config.max_position_embeddings} positions.",
            f"Layers from the first to the last: {', '.join(layers)}.",
            "\n".join(["| name | mixer |", "|---|---|", *(f"| {n} | `{k}` |" for n, k in kinds.items())]),
            "" if config.mlp is None else f"After every mixer an MLP: `{json.dumps(config.mlp, sort_keys=True)}`.",
            _figures(self.figures),
            "Open it with\n\n```python\nimport seqlib\nfrom transformers import "
            + ("AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM" if writes else "AutoModel\n\nmodel = AutoModel")
            + '.from_pretrained("this folder or its name on the Hub")\n```',
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _figures(figures: Mapping[str, float | str]) -> str:
    if not figures:
        return ""
    return "\n".join(
        ["| measured | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items())]
    )
