"""Our ops under transformers' own models: the same logits and gradients, and everything put back."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import transformers
from hf_models import left_padded, prompt

import seqlib
from seqlib.errors import UnsupportedInput
from seqlib.hf import accelerate, stand_ins

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
# Head class and its tiny config, by family.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", {"state_size": 8}),
    "falcon_mamba": ("FalconMambaForCausalLM", {"state_size": 8}),
    "mamba2": ("Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8}),
    "jamba": (
        "JambaForCausalLM",
        {**HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "num_experts": 2,
         "num_experts_per_tok": 1},
    ),
    "bamba": ("BambaForCausalLM", {**HEADS, **MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1ForCausalLM", {**HEADS, **MAMBA2, "mamba_d_ssm": 64, "head_dim": 8}),
    "zamba": (
        "ZambaForCausalLM",
        {**HEADS, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
         "n_mamba_heads": 2, "mamba_d_state": 8, "num_key_value_heads": 4},
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        {**HEADS, "num_hidden_layers": 4, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
         "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2, "mamba_d_state": 8, "chunk_size": 8,
         "num_key_value_heads": 4, "hybrid_layer_ids": [2]},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {**HEADS, **MAMBA2, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16,
         "layer_types": ["mamba", "attention"]},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {**HEADS, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8,
         "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8, "head_dim": 8},
    ),
    "qwen3_next": ("Qwen3NextForCausalLM", {**HEADS, **EXPERTS, **DELTA, "head_dim": 8}),
    "qwen3_5": ("Qwen3_5ForCausalLM", {**HEADS, **DELTA, "head_dim": 8}),
    "olmo_hybrid": ("OlmoHybridForCausalLM", {**HEADS, **DELTA}),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "bos_token_id": 2,
         "linear_num_heads": 4, "linear_head_dim": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 8, "num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm2": ("Lfm2ForCausalLM", {**HEADS, "layer_types": ["conv", "full_attention"]}),
    "minimax": (
        "MiniMaxForCausalLM",
        {**HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8, "head_dim": 8,
         "layer_types": ["linear_attention", "full_attention"]},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {**HEADS, "block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 16},
    ),
}  # fmt: skip


def build(family: str) -> transformers.PreTrainedModel:
    name, options = MODELS[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(0)
    cls = getattr(module, name)
    model = cls(cls.config_class(**SMALL | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # weights of zero or one would hide what they multiply
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def everything(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits of a prompt, of a padded batch, of what is generated after it, and gradients."""
    (ids,) = prompt(21)
    padded, mask = left_padded(prompt(5, 13))
    seen = {}
    with torch.no_grad():
        seen["prompt"] = model(ids, use_cache=False).logits
        seen["padded"] = model(padded, attention_mask=mask, use_cache=False).logits[:, -5:]
    said = model.generate(
        padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    seen["decoding"] = torch.stack(said.logits)
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    seen |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return seen


@pytest.mark.parametrize("family", MODELS)
def test_logits_and_gradients_stay_what_they_are(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(f"transformers.models.{family}") is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    expected = everything(build(family))
    calls: set[str] = set()
    with seqlib.accelerate_transformers([family], verbose=False) as done:
        assert done.replaced and not done.kept
        model = build(family)
        for op in ("causal_conv1d", "delta_rule", "linear_attention", "linear_scan", "selective_scan", "linear"):
            _watch(monkeypatch, op, calls)
        got = everything(model)
    assert calls - {"linear"}, "none of our ops ran"
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        close = 2e-5 * max(float(wanted.abs().max()), 1.0)
        torch.testing.assert_close(got[name], wanted, rtol=0, atol=close, msg=f"{name} differs")


def _watch(monkeypatch: pytest.MonkeyPatch, op: str, calls: set[str]) -> None:
    run = getattr(stand_ins, op)

    def noted(*args, **kwargs):
        calls.add(op)
        return run(*args, **kwargs)

    monkeypatch.setattr(stand_ins, op, noted)


def test_everything_is_put_back(capsys) -> None:
    from transformers.models.mamba import modeling_mamba
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    def places() -> list[Any]:
        functions = [getattr(modeling_mamba, name) for name in stand_ins.FUNCTIONS if hasattr(modeling_mamba, name)]
        return [*functions, MiniMaxLightningAttention.forward, torch.nn.Linear.forward]

    before = places()
    done = seqlib.accelerate_transformers()
    assert not any(a is b for a, b in zip(before, places()))
    assert "mamba" in capsys.readouterr().out and done.kept.keys() == {"xlstm"}
    with pytest.raises(UnsupportedInput, match="accelerated already"):
        seqlib.accelerate_transformers()
    done.undo()
    done.undo()
    assert places() == before
    with pytest.raises(UnsupportedInput, match="no stand-ins for bert"):
        seqlib.accelerate_transformers(["bert"])
    with seqlib.accelerate_transformers(["mamba"], linear=False, verbose=False) as done:
        assert torch.nn.Linear.forward is before[-1] and "linear=False" in done.kept["torch.nn.Linear.forward"]
    assert not accelerate._active
