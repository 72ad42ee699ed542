"""Our classes as transformers' own test suites want to see them; runs inside the folder that `run.py` makes."""

from __future__ import annotations

import unittest
from unittest.mock import patch

import torch
from transformers.models.auto import modeling_auto

import seqlib.hf
from seqlib.hf import SeqlibCache

modeling_auto.MODEL_MAPPING_NAMES["seqlib"] = "SeqlibModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["seqlib"] = "SeqlibForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["seqlib"] = "SeqlibForSequenceClassification"
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["seqlib"] = "SeqlibForTokenClassification"
modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES["seqlib"] = "SeqlibForQuestionAnswering"
modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES["seqlib"] = "SeqlibForPairClassification"

from ...generation.test_utils import GenerationTesterMixin  # noqa: E402
from ...test_configuration_common import ConfigTester  # noqa: E402
from ...test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402

STACKS = {
    "recurrent": {"mixer": {"kind": "mamba", "d_state": 4}},
    "hybrid": {
        "layer_pattern": "m a",
        "mixers": {"m": {"kind": "mamba2", "d_state": 8, "headdim": 16}, "a": {"kind": "attention", "nheads": 4}},
        "mlp": {"d_mlp": 48},
    },
}


PADDED = ("test_left_padding_compatibility", "test_eager_padding_matches_padding_free_with_position_ids")


class Tester:
    """Tiny configs and inputs, with the attributes that the suites read."""

    is_training = True
    batch_size = 13
    seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    num_labels = 3
    type_sequence_label_size = 2

    def __init__(self, parent: unittest.TestCase, stack: str) -> None:
        self.parent, self.stack = parent, stack

    def get_config(self) -> seqlib.hf.SeqlibConfig:
        return seqlib.hf.SeqlibConfig(
            d_model=self.hidden_size,
            n_layer=self.num_hidden_layers,
            vocab_size=self.vocab_size,
            pad_token_id=98,
            bos_token_id=97,
            eos_token_id=96,
            **STACKS[self.stack],
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[seqlib.hf.SeqlibConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size - 3), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class _Suite(ModelTesterMixin, GenerationTesterMixin):
    stack = ""
    all_model_classes = (
        seqlib.hf.SeqlibModel,
        seqlib.hf.SeqlibForCausalLM,
        seqlib.hf.SeqlibForSequenceClassification,
        seqlib.hf.SeqlibForTokenClassification,
        seqlib.hf.SeqlibForQuestionAnswering,
    )

    def setUp(self) -> None:
        # Maps of attention are never made, but some tests take the two attributes for a sign of padding and packing.
        self.has_attentions = self._testMethodName in PADDED
        self.enterContext(patch.object(seqlib.hf.SeqlibForCausalLM, "_supports_attention_backend", self.has_attentions))
        self.model_tester = Tester(self, self.stack)
        self.config_tester = ConfigTester(
            self, config_class=seqlib.hf.SeqlibConfig, common_properties=["hidden_size", "num_hidden_layers"]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    # Our cache holds states in place of transformers' layers.

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: SeqlibCache, seq_length: int, config: seqlib.hf.SeqlibConfig
    ) -> None:
        self.assertIsInstance(past_key_values, SeqlibCache)
        self.assertEqual(past_key_values.get_seq_length(), seq_length)
        self.assertEqual(len(past_key_values), config.n_layer)
        for tensor in (tensor for state in past_key_values.states for tensor in state.tensors()):
            self.assertEqual(len(tensor), batch_size)
            self.assertTrue(tensor.isfinite().all())

    def _check_caches_are_equal(self, cache1: SeqlibCache, cache2: SeqlibCache) -> None:
        self.assertEqual(cache1.get_seq_length(), cache2.get_seq_length())
        for state1, state2 in zip(cache1.states, cache2.states, strict=True):
            self.assertIs(type(state1), type(state2))
            for one, other in zip(state1.tensors(), state2.tensors(), strict=True):
                room = [max(sizes) for sizes in zip(one.shape, other.shape, strict=True)]
                torch.testing.assert_close(*(_with_room(tensor, room) for tensor in (one, other)))


def _with_room(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Key-value states are allocated for the longest sequence; free slots hold zeros."""
    made = tensor.new_zeros(shape)
    made[tuple(map(slice, tensor.shape))] = tensor
    return made


class RecurrentTest(_Suite, unittest.TestCase):
    stack = "recurrent"


class HybridTest(_Suite, unittest.TestCase):
    stack = "hybrid"
