"""Our classes in transformers' Auto classes: the config at once, the models when the first config is made."""

from __future__ import annotations

from functools import cache

from transformers.models.auto.configuration_auto import AutoConfig

from seqlib.hf.configuration import SeqlibConfig

__all__ = ["register_models"]


@cache
def register_models() -> None:
    """Make the Auto classes know our models and our tokenizer.

    Not on import, which may happen inside an import of transformers (see `seqlib._register`), when what models are made
    of is only half there. No Auto class opens a model of ours without making its config first.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForNextSentencePrediction,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    from seqlib.hf import heads, modeling
    from seqlib.hf.pair import SeqlibForPairClassification
    from seqlib.hf.tokenizer import ByteTokenizer

    AutoModel.register(SeqlibConfig, modeling.SeqlibModel, exist_ok=True)
    AutoModelForCausalLM.register(SeqlibConfig, modeling.SeqlibForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(SeqlibConfig, modeling.SeqlibForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(SeqlibConfig, heads.SeqlibForTokenClassification, exist_ok=True)
    AutoModelForQuestionAnswering.register(SeqlibConfig, heads.SeqlibForQuestionAnswering, exist_ok=True)
    AutoModelForMaskedLM.register(SeqlibConfig, heads.SeqlibForMaskedLM, exist_ok=True)
    AutoModelForNextSentencePrediction.register(SeqlibConfig, SeqlibForPairClassification, exist_ok=True)
    AutoTokenizer.register(SeqlibConfig, fast_tokenizer_class=ByteTokenizer, exist_ok=True)


AutoConfig.register(SeqlibConfig.model_type, SeqlibConfig, exist_ok=True)
SeqlibConfig.on_use = register_models
