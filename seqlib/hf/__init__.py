"""Seqlib models inside Hugging Face transformers: the only room that imports transformers.

Importing it registers the models with AutoConfig, AutoModel, AutoModelForCausalLM and those of the other heads, and
AutoTokenizer; `import seqlib` does the same as soon as transformers' auto classes are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.registration import register_models

if TYPE_CHECKING:
    from seqlib.hf.cache import SeqlibCache
    from seqlib.hf.card import Card
    from seqlib.hf.heads import SeqlibForMaskedLM, SeqlibForQuestionAnswering, SeqlibForTokenClassification
    from seqlib.hf.modeling import (
        SeqlibForCausalLM,
        SeqlibForSequenceClassification,
        SeqlibModel,
        SeqlibPreTrainedModel,
    )
    from seqlib.hf.pair import SeqlibForPairClassification
    from seqlib.hf.tokenizer import ByteTokenizer
    from seqlib.hf.trainer import SeqlibTrainer

__all__ = [
    "ByteTokenizer",
    "Card",
    "SeqlibCache",
    "SeqlibConfig",
    "SeqlibForCausalLM",
    "SeqlibForMaskedLM",
    "SeqlibForPairClassification",
    "SeqlibForQuestionAnswering",
    "SeqlibForSequenceClassification",
    "SeqlibForTokenClassification",
    "SeqlibModel",
    "SeqlibPreTrainedModel",
    "SeqlibTrainer",
]

_MODULES = {
    "ByteTokenizer": "tokenizer",
    "Card": "card",
    "SeqlibCache": "cache",
    "SeqlibTrainer": "trainer",
    "SeqlibForMaskedLM": "heads",
    "SeqlibForPairClassification": "pair",
    "SeqlibForQuestionAnswering": "heads",
    "SeqlibForTokenClassification": "heads",
}


def __getattr__(name: str) -> Any:
    # Lazy, because AutoConfig needs the configuration while transformers itself is still being imported.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register_models()
    return getattr(importlib.import_module(f"seqlib.hf.{_MODULES.get(name, 'modeling')}"), name)
