"""Seqlib's backbone as transformers models: thin wrappers, no mathematics of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.hf.cache import SeqlibCache
from seqlib.hf.card import Card
from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.inputs import after_tokens, padding_mask, sequence_info
from seqlib.hf.loading import load_checked
from seqlib.hf.names import CACHE, CACHE_NAMES, given_cache, output, refuse_unknown, returned_cache
from seqlib.hf.rollback import Span
from seqlib.layers.init import normal_
from seqlib.layers.linear import Linear, ordinary, weight_is_all
from seqlib.layers.mlp import MLP
from seqlib.layers.moe import MoE
from seqlib.layers.norm import RMSNorm
from seqlib.layers.watched import has_hooks
from seqlib.mixers import Mixer, looks_ahead
from seqlib.models.aside import Aside, AsideUse, LowRank
from seqlib.models.backbone import Backbone
from seqlib.models.block import Block
from seqlib.models.heads import Embedding, NumberEmbedding, finish_logits, lm_loss, pool
from seqlib.sequence import StateList

__all__ = ["SeqlibForCausalLM", "SeqlibForSequenceClassification", "SeqlibModel", "SeqlibPreTrainedModel"]

# Trainer's label smoothing compares the output with the next token for classes in this list, else with the same token.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(SeqlibConfig.model_type, "SeqlibForCausalLM")


class SeqlibPreTrainedModel(PreTrainedModel):
    """What the models share: loading, initialisation and what transformers wants to know about them."""

    config: SeqlibConfig
    config_class = SeqlibConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - instance attributes of the base class
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _can_record_outputs = {"hidden_states": Block}  # noqa: RUF012
    card: Card | None = None
    """What the model card says beside the config; set it before saving or pushing."""
    _is_stateful = False  # our caches take rejected tokens back, so generate() may speculate

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, except that a checkpoint which does not fit is an error.

        Raises:
            CheckpointMismatch: weights of the backbone that are missing, left over, of another shape, NaN or infinite,
                or a file that cannot be read. Only a head may be missing: it starts anew, with transformers' warning.
                `ignore_mismatched_sizes=True` accepts all but NaN and infinity.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with a model card: `self.card` if it was set, else one where the folder has none."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self._write_card(Path(save_directory), replace=self.card is not None)

    def _write_card(self, folder: Path, *, replace: bool) -> None:
        file = folder / "README.md"
        if replace or not file.exists():
            file.write_text((self.card or Card()).render(self), encoding="utf-8")

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Every way of pushing ends here, with a card of transformers' own in place of the one that was saved.
        known = HfApi().file_exists(repo_id, "README.md", token=kwargs.get("token"))
        self._write_card(Path(working_dir), replace=self.card is not None or not known)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        for module in self.modules():
            if isinstance(module, Backbone):
                module.gradient_checkpointing, module.checkpoint_every = enable, every_n_layers
                module._gradient_checkpointing_func = gradient_checkpointing_func

    def post_init(self) -> None:
        super().post_init()
        if getattr(self.config, "quantization_config", None) is not None:
            ordinary(self)  # quantisers look for that type

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("embed_tokens", "lm_head") and hasattr(value, "base_layer") and self.config.tie_word_embeddings:
            # An adapter of PEFT on one of two layers with one weight: merged, it would change the other as well.
            base = value.base_layer
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
            self.config.tie_word_embeddings = False
        super().__setattr__(name, value)

    def init_weights(self) -> None:
        self.tie_weights()  # every part has initialised itself in its constructor

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise what a checkpoint lacks; loaded tensors carry a mark that keeps them as they are."""
        heads = [child for child in self.children() if isinstance(child, nn.Linear)]
        for module in self.modules():
            owned = (*module.parameters(), *module.buffers())
            if all(getattr(tensor, "_is_hf_initialized", False) for tensor in owned):
                continue
            if isinstance(module, (nn.Embedding, NumberEmbedding)) or module in heads:
                self._init_weights(module)
            elif isinstance(module, (Mixer, MLP, MoE, RMSNorm, Aside, AsideUse, LowRank)):
                module.reset_parameters()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """An embedding or a head; transformers also calls it for the rows of a larger embedding."""
        if isinstance(module, (nn.Linear, nn.Embedding, NumberEmbedding)):
            normal_(module.weight, self.config.initializer_range)


class SeqlibModel(SeqlibPreTrainedModel):
    """Embedding and backbone: hidden states."""

    def __init__(self, config: SeqlibConfig) -> None:
        super().__init__(config)
        self.embed_tokens = (
            NumberEmbedding(config.vocab_size, config.d_model)
            if config.embedding == "number"
            else Embedding(config.vocab_size, config.d_model, config.embed_scale)
        )
        self.backbone = Backbone(config.backbone)
        normal_(self.embed_tokens.weight, config.initializer_range)
        # What has optimizer options of its own (A_log, D, dt_bias) also wants full precision, built or loaded.
        special = self.backbone.special_parameters()
        for name, parameter in self.backbone.named_parameters():
            if name in special and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        self._keep_in_fp32_modules_strict = {rf"(?<![^.]){name.rpartition('.')[2]}$" for name in special}  # patterns
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: SeqlibCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: SeqlibCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a span of tokens.

        Args:
            input_ids: (batch, seqlen) int64; or inputs_embeds: (batch, seqlen, d_model).
            attention_mask: (batch, seqlen) or (batch, seen + seqlen), 0 at padding on either side.
            cache: what came before; brought up to date in place. Any number of tokens may follow. `past_key_values` is
                its older name.
            use_cache: return a cache; None: config.use_cache when not training.
            position_ids, seq_idx, cu_seq_lens_q: where documents of packed rows start, see `hf.inputs.sequence_info`.
            output_hidden_states, return_dict: as in transformers.

        Raises:
            UnsupportedInput: an argument that nobody knows, or inputs that do not fit together.
        """
        refuse_unknown(self, kwargs)
        past_key_values = given_cache(cache, past_key_values)
        outputs = self._hidden_states(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, seq_idx, cu_seq_lens_q,
            **kwargs,
        )  # fmt: skip
        seqlen = outputs.last_hidden_state.shape[1]
        if any(h is not None and h.shape[1] > seqlen for h in outputs.hidden_states or ()):
            # Tokens that ran once more after a crop come first.
            outputs.hidden_states = tuple(h if h is None else h[:, -seqlen:] for h in outputs.hidden_states)
        return outputs

    @capture_outputs
    def _hidden_states(
        self,
        input_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: SeqlibCache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        seq_idx: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise UnsupportedInput("give exactly one of input_ids and inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, SeqlibCache):
            raise UnsupportedInput(
                f"the cache must be a seqlib.hf.SeqlibCache, got {type(past_key_values).__name__}; "
                "pass SeqlibCache(), or what an earlier call returned"
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, seqlen = x.shape[:2]
        cache = past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = SeqlibCache()
        depth = self.config.n_layer  # transformers lowers it while the first layers draft tokens
        if cache is not None and cache.states is None and cache.max_seqlen is not None:
            cache.states = self.backbone.initial_state(batch, cache.max_seqlen, x.device, x.dtype, depth)
        seq = sequence_info(
            batch,
            seqlen,
            0 if cache is None else cache.get_seq_length(),
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
        )
        recorded = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if cache is None:
            hidden, _ = self.backbone(x, None, seq, depth)
        else:
            hidden = self._advance(cache, Span(x, seq), depth, bool(recorded))
        return output(BaseModelOutputWithPast, last_hidden_state=hidden, cache=cache if use_cache else None)

    def _advance(self, cache: SeqlibCache, new: Span, depth: int, recorded: bool) -> Tensor:
        """Hidden states of a span that follows the cache, which then stands behind it."""
        state, record = cache.states, cache.record
        plain = len(new) == 1 and new.seq is None and not torch.is_grad_enabled() and not recorded
        if plain and not has_hooks(self.backbone) and state is not None and (record is None or not record.broken):
            if self._has_room(cache, state, new.x.device):
                if record is not None:
                    state = record.note_step(state, new)
                hidden, cache.states = self.backbone.step(new.x[:, 0], state, depth)
                return hidden.unsqueeze(1)
        if record is None:
            hidden, cache.states = self.backbone(new.x, state, new.seq, depth)
        else:
            run = partial(self.backbone, depth=depth)
            hidden, cache.states = record.forward(run, state, new, whole=recorded)
        return hidden

    def _has_room(self, cache: SeqlibCache, state: StateList, device: torch.device) -> bool:
        """Whether `step` may write one more token. On a GPU it does not look, so that nothing waits for the device."""
        grows = device.type != "cpu" and "full_attention" in (self.config.layer_types or ())
        return not grows or state.seqlen < (cache.max_seqlen or 0)


class SeqlibForCausalLM(SeqlibPreTrainedModel, GenerationMixin):
    """Language model: embedding, backbone and a head, tied to the embedding unless the config says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    computes_loss_without_logits = True

    def __init__(self, config: SeqlibConfig) -> None:
        ahead = sorted({m.kind for m in config.backbone.mixers.values() if looks_ahead(m)})
        if ahead:
            raise ConfigError(
                f"{', '.join(ahead)} reads what follows, so a language model would see the tokens it predicts; use a "
                "causal mixer, or a classification model"
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
        past_key_values: SeqlibCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        cache: SeqlibCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and with labels their loss. Arguments as for `SeqlibModel.forward`, and:

        Args:
            labels: (batch, seqlen), the input ids themselves, -100 where a token is not scored. A token after padding
                is not: nothing is known before it.
            logits_to_keep: how many of the last positions get logits (0: all), or their indices.
            return_logits: False with labels computes the loss from the hidden states, a few positions at a time, and
                leaves `logits` None: at long lengths the logits are most of the memory. `SeqlibTrainer` asks for it
                wherever nobody looks at logits.
            shift_labels: (batch, seqlen), labels that are shifted already (as for sequences that are split over
                devices), in place of `labels`; logits are then always made.
            num_items_in_batch: what the summed loss is divided by; None: the number of scored tokens.
        """
        past_key_values = given_cache(cache, past_key_values)
        num_items = kwargs.pop("num_items_in_batch", None)
        shift_labels = kwargs.pop(
            "shift_labels", None
        )  # Trainer takes every argument named so for a column of its data
        refuse_unknown(self, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden, logits, loss = outputs.last_hidden_state, None, None
        labels = labels if labels is None else after_tokens(labels, attention_mask)
        plain = weight_is_all(self.lm_head)
        shape: dict[str, Any] = {"scale": self.config.logit_scale, "softcap": self.config.logit_softcap}
        if labels is not None and shift_labels is None and not return_logits and plain:
            loss = lm_loss(hidden, self.lm_head.weight, labels, num_items=num_items, **shape)
        elif return_logits or labels is not None or shift_labels is not None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = finish_logits(self.lm_head(hidden[:, keep]), **shape)
            if labels is not None or shift_labels is not None:
                options = {"vocab_size": logits.shape[-1], "num_items_in_batch": num_items}
                loss = self.loss_function(logits=logits, labels=labels, shift_labels=shift_labels, **options)
        return output(
            CausalLMOutputWithPast,
            loss=loss,
            logits=logits if return_logits else None,
            cache=returned_cache(outputs),
            hidden_states=outputs.hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, whose speculative decoding passes a prefix that the cache holds once more."""
        for name in ("tokenizer", "assistant_tokenizer"):  # read by stop strings; transformers hands them on
            kwargs.pop(name, None)
        seen = 0 if kwargs.get(CACHE) is None else kwargs[CACHE].get_seq_length()
        whole = attention_mask is None or attention_mask.shape[-1] == input_ids.shape[1]
        if next_sequence_length is None and is_first_iteration and whole and 0 < seen < input_ids.shape[1]:
            next_sequence_length = input_ids.shape[1] - seen
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if CACHE in inputs:
            inputs[CACHE_NAMES[-1]] = inputs.pop(CACHE)  # prompt tuning of PEFT knows the older name only
        return inputs

    def _prepare_cache_for_generation(  # type: ignore[override] # it returns nothing, whatever its annotation says
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate` our cache, with key-value states allocated once for the longest sequence."""
        given = model_kwargs.get(CACHE)
        if given is not None:
            given._is_user_defined = True  # so that it is returned up to date
        if generation_config.use_cache is False or given is not None:
            return
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic", "static"):
            raise UnsupportedInput(
                f"cache_implementation={wanted!r} is not available for seqlib models; leave it out: states are "
                "allocated once and key-value states only exist in attention layers"
            )
        cache = SeqlibCache(max_seqlen=max_cache_length)
        if generation_config.is_assistant:
            cache.activate_past_recording()  # the other model will take drafts back
        model_kwargs[CACHE] = cache


class SeqlibForSequenceClassification(SeqlibPreTrainedModel):
    """One label per sequence, from the last real token or the mean over the real tokens (config.pooling)."""

    accepts_loss_kwargs = False  # the loss is a mean, which Trainer must divide by its accumulation steps

    def __init__(self, config: SeqlibConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 2  # never None, but typed so
        self.model = SeqlibModel(config)
        self.score = nn.Linear(config.d_model, self.num_labels, bias=False)
        normal_(self.score.weight, config.initializer_range)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        past_key_values: SeqlibCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: SeqlibCache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Label logits (batch, num_labels), and with labels their loss.

        Args:
            attention_mask: (batch, seqlen), 0 at padding. None: leading and trailing config.pad_token_id are padding;
                without a pad token every position is real.
            labels: (batch,) classes or numbers, or (batch, num_labels), by config.problem_type.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = _without_outer(input_ids, self.config.pad_token_id)
        refuse_unknown(self, kwargs)
        past_key_values = given_cache(cache, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        batch, seqlen = hidden.shape[:2]
        seen = max(0, (0 if past_key_values is None else past_key_values.get_seq_length()) - seqlen)
        logits = self.score(pool(hidden, self.config.pooling, padding_mask(batch, seqlen, seen, attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return output(
            SequenceClassifierOutputWithPast,
            loss=loss,
            logits=logits,
            cache=returned_cache(outputs),
            hidden_states=outputs.hidden_states,
        )


def _without_outer(ids: Tensor, pad: int) -> Tensor:
    """(batch, seqlen) bool: from the first to the last token that is not `pad`."""
    real = ids != pad
    return (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)
