"""Tiny random checkpoints of published families, made by their public implementations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.bamba import modeling_bamba
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

VOCAB = 97
COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _norms_by_groups(mixer: type[nn.Module]) -> None:
    """transformers up to 5.17 norms over all groups of Mamba-2 at once, unlike the code that the weights come from.

    Source: state-spaces/mamba, mamba_ssm/modules/mamba2.py (group_size = d_ssm // ngroups); right in 5.23.
    """
    build = mixer.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if not hasattr(self.norm, "group_size"):
            width = self.intermediate_size
            self.norm = Zamba2RMSNormGated(width, width // self.n_groups, self.layer_norm_epsilon)

    mixer.__init__ = made  # type: ignore[method-assign]


_norms_by_groups(modeling_mamba2.Mamba2Mixer)
_norms_by_groups(modeling_bamba.BambaMixer)
_norms_by_groups(modeling_granitemoehybrid.GraniteMoeHybridMambaLayer)


def shaken(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Every parameter off its start, so that none is a 0 or 1 that hides a mistake; dynamics stay stable."""
    made = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=made)
            spread = 0.1 if name.endswith(("A_log", "dt_bias", "dt_proj.bias", "recurrent_param")) else scale
            if weight.dim() > 1 and not name.endswith("A_log"):
                fan = weight.shape[-1] if "conv" not in name else 1
                weight.copy_(noise * (1.0 if "embed" in name else 0.7 * fan**-0.5))
            else:
                weight.add_(spread * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=made))
    return model.eval()


def port(model_type: str, **fields: Any) -> nn.Module:
    """The family's model in transformers, with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(COMMON | fields))
    return shaken(AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32))


MAMBA = {"hidden_size": 32, "state_size": 6, "num_hidden_layers": 2}
MAMBA2 = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "chunk_size": 16}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
HYBRID = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, **ATTENTION}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 16}
FALCON_H1 = {
    **HYBRID,
    **SSM,
    "head_dim": 6,
    "mamba_d_ssm": 64,
    "rope_theta": 1e11,
    "embedding_multiplier": 5.65,
    "lm_head_multiplier": 0.04,
    "key_multiplier": 0.39,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.94,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.24,
    "ssm_multipliers": [0.35, 0.25, 0.36, 0.5, 0.37],
    "mlp_multipliers": [0.88, 0.59],
}
NEMOTRON = {
    **HYBRID,
    "num_hidden_layers": 5,
    "hybrid_override_pattern": "M-*EM",
    "head_dim": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 6,
    "chunk_size": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 20,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
GRANITE = {
    **HYBRID,
    **SSM,
    "layer_types": ["mamba", "attention", "mamba"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 20,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 8.0,
}
MINIMAX = {
    **HYBRID,
    "head_dim": 8,
    "layer_types": ["full_attention", "linear_attention", "linear_attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "block_size": 16,
    **{f"{part}_alpha_factor": 1.7 for part in ("linear_attn", "full_attn", "mlp")},
    **{f"{part}_beta_factor": 0.8 for part in ("linear_attn", "full_attn", "mlp")},
}
GEMMA = {
    **HYBRID,
    "num_hidden_layers": 5,
    **{"num_key_value_heads": 1, "lru_width": 32, "head_dim": 8, "attention_window_size": 7},
}
DELTA = {
    **HYBRID,
    "num_hidden_layers": 4,
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6},
}
QWEN = {
    **DELTA,
    "head_dim": 8,
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    **{"decoder_sparse_step": 2, "full_attention_interval": 3},
}
OLMO = {**DELTA, "linear_num_value_heads": 2, "linear_value_head_dim": 12}
ZAMBA = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid"],
    "intermediate_size": 40,
    **{"mamba_d_state": 6, "n_mamba_heads": 8, "mamba_ngroups": 2, "chunk_size": 16, "adapter_rank": 5},
}
XLSTM = {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "chunk_size": 16}
JAMBA = {
    **HYBRID,
    "num_hidden_layers": 4,
    "num_experts": 3,
    "mamba_d_state": 5,
    **{"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 4, "attn_layer_offset": 2},
}
PORTS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "mamba": ("mamba-hf", lambda: port("mamba", **MAMBA, use_bias=False)),
    "mamba-bias": ("mamba-hf", lambda: port("mamba", **MAMBA, time_step_rank=5, conv_kernel=3, expand=3)),
    "mamba2": ("mamba2-hf", lambda: port("mamba2", **MAMBA2, n_groups=2)),
    "mamba2-tied": ("mamba2-hf", lambda: port("mamba2", **MAMBA2, n_groups=1, tie_word_embeddings=True)),
    "falcon_mamba": ("falcon_mamba", lambda: port("falcon_mamba", **MAMBA, tie_word_embeddings=False)),
    "jamba": ("jamba", lambda: port("jamba", **JAMBA)),
    "jamba-attention-experts": ("jamba", lambda: port("jamba", **JAMBA | {"expert_layer_offset": 0})),
    "bamba": ("bamba", lambda: port("bamba", **HYBRID, **SSM, attn_layer_indices=[1])),
    "bamba-pure": ("bamba", lambda: port("bamba", **HYBRID, **SSM, tie_word_embeddings=True)),
    "zamba2": ("zamba2", lambda: port("zamba2", **ZAMBA, num_mem_blocks=1)),
    "zamba2-two-blocks": (
        "zamba2",
        lambda: port("zamba2", **ZAMBA, num_mem_blocks=2, use_shared_attention_adapter=True, use_mem_rope=True),
    ),
    "falcon_h1": ("falcon_h1", lambda: port("falcon_h1", **FALCON_H1, mamba_rms_norm=False)),
    "falcon_h1-norm": ("falcon_h1", lambda: port("falcon_h1", **FALCON_H1, mamba_rms_norm=True)),
    "falcon_h1-gate-first": (
        "falcon_h1",
        lambda: port("falcon_h1", **FALCON_H1, mamba_rms_norm=True, mamba_norm_before_gate=False, projectors_bias=True),
    ),
    "nemotron_h": ("nemotron_h", lambda: port("nemotron_h", **NEMOTRON)),
    "nemotron_h-latent": ("nemotron_h", lambda: port("nemotron_h", **NEMOTRON, moe_latent_size=16)),
    "granite": ("granite_hybrid", lambda: port("granitemoehybrid", **GRANITE)),
    "granite-rope-dense": (
        "granite_hybrid",
        lambda: port("granitemoehybrid", **GRANITE | {"num_local_experts": 0}, position_embedding_type="rope"),
    ),
    "minimax": ("minimax", lambda: port("minimax", **MINIMAX)),
    "recurrent_gemma": ("recurrent_gemma", lambda: port("recurrent_gemma", **GEMMA)),
    "qwen3_next": ("qwen3_next", lambda: port("qwen3_next", **QWEN)),
    "qwen3_next-experts": ("qwen3_next", lambda: port("qwen3_next", **QWEN | {"decoder_sparse_step": 1})),
    "olmo_hybrid": (
        "olmo_hybrid",
        lambda: port("olmo_hybrid", **OLMO, rope_parameters={"rope_type": "default", "rope_theta": None}),
    ),
    "olmo_hybrid-rope": ("olmo_hybrid", lambda: port("olmo_hybrid", **OLMO)),
    "xlstm": ("xlstm", lambda: port("xlstm", **XLSTM)),
}
"""Layout and maker by the name of the case."""


def uncached(model: Any, ids: Tensor) -> Tensor:
    """Logits of one pass over rows without padding."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits if isinstance(model, nn.Module) else model(ids)


def save(model: Any, folder: Path) -> None:
    """As released: where transformers renames on saving, back to the published names."""
    model.save_pretrained(folder)
    if model.config.model_type == "olmo_hybrid":
        file, c = folder / "model.safetensors", model.config
        weights = load_file(file)
        key = c.linear_num_key_heads * c.linear_key_head_dim
        for i, kind in enumerate(c.layer_types):
            prefix = f"model.layers.{i}."
            if kind == "full_attention":
                norm = weights.pop(prefix + "feedforward_layer_norm.weight")
                weights[prefix + "post_attention_layernorm.weight"] = norm
            else:
                names = [f"{prefix}linear_attn.{part}_conv1d.weight" for part in "qkv"]
                joined = torch.cat([weights[name] for name in names])
                split = joined.split([key, key, len(joined) - 2 * key])
                weights |= {name: part.clone() for name, part in zip(names, split)}
        save_file(weights, file, metadata={"format": "pt"})
