"""Heads for every position: token classes, spans that answer a question, and masked tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, QuestionAnsweringModelOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.modeling import SeqlibModel, SeqlibPreTrainedModel
from seqlib.hf.names import refuse_unknown
from seqlib.layers.init import fill_, normal_
from seqlib.layers.linear import Linear
from seqlib.mixers import looks_ahead
from seqlib.models.heads import finish_logits

__all__ = ["SeqlibForMaskedLM", "SeqlibForQuestionAnswering", "SeqlibForTokenClassification"]


class SeqlibForTokenClassification(SeqlibPreTrainedModel):
    """One label per position, with what the mixers know there: causal ones have read nothing behind it."""

    def __init__(self, config: SeqlibConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 2  # never None, but typed so
        self.model = SeqlibModel(config)
        self.score = _head(config, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Label logits (batch, seqlen, num_labels), and with labels their loss. Other arguments as for `SeqlibModel`.

        Args:
            labels: (batch, seqlen) classes, -100 where a position is not scored.
            num_items_in_batch: what the summed loss is divided by; None: the number of scored positions.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        refuse_unknown(self, kwargs)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **_uncached(kwargs))
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            _check_labels(labels, logits)
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class SeqlibForQuestionAnswering(SeqlibPreTrainedModel):
    """Where a span begins and ends in the sequence, question and text in one."""

    accepts_loss_kwargs = False  # the loss is a mean, which Trainer must divide by its accumulation steps

    def __init__(self, config: SeqlibConfig) -> None:
        super().__init__(config)
        self.model = SeqlibModel(config)
        self.qa_outputs = _head(config, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Logits of begin and end, (batch, seqlen) each, and with both positions their loss.

        Other arguments as for `SeqlibModel`.

        Args:
            start_positions, end_positions: (batch,) first and last position of the span; one outside the sequence is
                not scored. The loss is the mean of both.
        """
        refuse_unknown(self, kwargs)
        if (start_positions is None) != (end_positions is None):
            raise UnsupportedInput("give both start_positions and end_positions for a loss, or neither")
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **_uncached(kwargs))
        start, end = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, hidden_states=outputs.hidden_states
        )


class SeqlibForMaskedLM(SeqlibPreTrainedModel):
    """Tokens that were replaced by a mask, from what stands on both sides of them; tied as `SeqlibForCausalLM` is.

    Raises:
        ConfigError: no mixer of the stack looks both ways.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SeqlibConfig) -> None:
        mixers = config.backbone.mixers.values()
        if not any(looks_ahead(mixer) for mixer in mixers):
            raise ConfigError(
                f"{', '.join(sorted({m.kind for m in mixers}))} looks one way only, so a masked token would be told "
                "from what stands before it alone; use a mixer that looks both ways (causal=False or "
                "bidirectional=True where it has that field), or SeqlibForCausalLM"
            )
        super().__init__(config)
        self.model = SeqlibModel(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        normal_(self.lm_head.weight, config.initializer_range)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Token logits (batch, seqlen, vocab_size), and with labels their loss. Other arguments as for `SeqlibModel`.

        Args:
            labels: (batch, seqlen) the token that stood at each position, -100 where it is not scored: at all that
                were not masked.
            num_items_in_batch: what the summed loss is divided by; None: the number of scored positions.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        refuse_unknown(self, kwargs)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **_uncached(kwargs))
        logits = self.lm_head(outputs.last_hidden_state)
        logits = finish_logits(logits, scale=self.config.logit_scale, softcap=self.config.logit_softcap)
        loss = None
        if labels is not None:
            _check_labels(labels, logits)
            loss = self.loss_function(logits, labels, logits.shape[-1], num_items_in_batch=num_items)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def _head(config: SeqlibConfig, width: int) -> nn.Linear:
    """A linear map of each position, started as transformers' heads are."""
    head = nn.Linear(config.d_model, width)
    normal_(head.weight, config.initializer_range)
    fill_(head.bias, 0.0)
    return head


def _uncached(arguments: dict[str, Any]) -> dict[str, Any]:
    """All positions are read at once, so nothing is kept for later ones unless it is asked for."""
    return {"use_cache": False, **arguments}


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:2]:
        raise UnsupportedInput(
            f"labels must have shape (batch, seqlen) = {tuple(logits.shape[:2])}, got {tuple(labels.shape)}"
        )
