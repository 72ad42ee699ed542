"""Classification of pairs: two sequences through one model, their vectors joined in a small head."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from seqlib.errors import UnsupportedInput
from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.inputs import padding_mask
from seqlib.hf.modeling import SeqlibModel, SeqlibPreTrainedModel
from seqlib.hf.names import refuse_unknown
from seqlib.layers.init import linear_
from seqlib.models.heads import pool

__all__ = ["PairHead", "SeqlibForPairClassification"]


class PairHead(nn.Module):
    """Label logits from two pooled vectors a, b of width d.

        nli:     W2 gelu(W1 [a, b, a - b, a * b])                 hidden width d
        concat:  W3 relu(W2 relu(W1 [a, b]))                      hidden widths 4 d and 2 d

    Source: "nli" state-spaces/s4, models/sequence/heads (RetrievalHead) and mlpen/Nystromformer, LRA/code; "concat"
    google-research/long-range-arena, models/layers/common_layers.py (classifier_head_dual).
    """

    def __init__(self, kind: str, d_model: int, num_labels: int) -> None:
        super().__init__()
        self.kind = kind
        joined = [4 * d_model, d_model] if kind == "nli" else [2 * d_model, 4 * d_model, 2 * d_model]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise([*joined, num_labels]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.layers:
            linear_(cast(nn.Linear, layer))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = torch.cat([a, b, a - b, a * b] if self.kind == "nli" else [a, b], -1)
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x)) if self.kind == "nli" else F.relu(layer(x))
        return self.layers[-1](x)


class SeqlibForPairClassification(SeqlibPreTrainedModel):
    """One label per pair of sequences, both read by the same weights (config.pooling, config.pair_head).

    AutoModelForNextSentencePrediction, transformers' class for pairs, opens its checkpoints.
    """

    def __init__(self, config: SeqlibConfig, **unknown: Any) -> None:
        super().__init__(config, **unknown)
        self.loss_type = "ForSequenceClassification"  # transformers goes by the name of the class otherwise
        self.model = SeqlibModel(config)
        self.score = PairHead(config.pair_head, config.d_model, int(config.num_labels or 2))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Label logits (batch, num_labels), and with labels their loss.

        Args:
            input_ids: (batch, 2, seqlen) int64, both sequences padded to one length.
            attention_mask: (batch, 2, seqlen), 0 at padding; None: every position is real.
            labels: (batch,) classes.
        """
        if input_ids.dim() != 3 or input_ids.shape[1] != 2:
            raise UnsupportedInput(f"input_ids must have shape (batch, 2, seqlen), got {tuple(input_ids.shape)}")
        refuse_unknown(self, kwargs)
        batch, _, seqlen = input_ids.shape
        mask = None if attention_mask is None else attention_mask.reshape(2 * batch, seqlen)
        outputs = self.model(
            input_ids=input_ids.reshape(2 * batch, seqlen), attention_mask=mask, use_cache=False, **kwargs
        )
        pooled = pool(outputs.last_hidden_state, self.config.pooling, padding_mask(2 * batch, seqlen, 0, mask))
        logits = self.score(*pooled.unflatten(0, (batch, 2)).unbind(1))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
