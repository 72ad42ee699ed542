"""Tiny random checkpoints of published families, made by their public implementations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97
COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shaken(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Every parameter off its start, so that none is a 0 or 1 that hides a mistake; dynamics stay stable."""
    made = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=made)
            spread = 0.1 if name.endswith(("A_log", "dt_bias", "dt_proj.bias", "recurrent_param")) else scale
            if weight.dim() > 1 and not name.endswith("A_log"):
                fan = weight.shape[-1] if "conv" not in name else 1
                weight.copy_(noise * (1.0 if "embed" in name else fan**-0.5))
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
PORTS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "mamba": ("mamba-hf", lambda: port("mamba", **MAMBA, use_bias=False)),
    "mamba-bias": ("mamba-hf", lambda: port("mamba", **MAMBA, time_step_rank=5, conv_kernel=3, expand=3)),
    "mamba2": ("mamba2-hf", lambda: port("mamba2", **MAMBA2, n_groups=2)),
    "mamba2-tied": ("mamba2-hf", lambda: port("mamba2", **MAMBA2, n_groups=1, tie_word_embeddings=True)),
    "falcon_mamba": ("falcon_mamba", lambda: port("falcon_mamba", **MAMBA, tie_word_embeddings=False)),
}
"""Layout and maker by the name of the case."""


def uncached(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of one pass over rows without padding."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def save(model: Any, folder: Path, **options: Any) -> None:
    model.save_pretrained(folder, **options)
