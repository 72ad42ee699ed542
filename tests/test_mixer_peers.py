"""The mixers give the numbers of the published modules as transformers has them, from the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seqlib.mixers import Mixer, build_mixer

D_MODEL = 16


def made(kind: str, **config) -> Mixer:
    return build_mixer({"kind": kind, **config}, D_MODEL, layer_index=1, n_layer=4)


def draw(module: nn.Module) -> nn.Module:
    """Every parameter of a size that matters; uninitialised ones too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.uniform_(0.1, 1.5) if name.endswith(("A_log", "norm.weight")) else p.normal_(0.0, 0.3)
    return module.eval()


def same(theirs: nn.Module, ours: Mixer, weights: dict[str, Tensor], **call) -> None:
    x = torch.randn(2, 41, D_MODEL)
    ours.load_state_dict(weights)
    with torch.no_grad():
        want = theirs(hidden_states=x, attention_mask=None, **call)
        want = want[0] if isinstance(want, tuple) else want
        torch.testing.assert_close(ours(x)[0], want, atol=2e-5, rtol=2e-5)


def test_minimax() -> None:
    from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=D_MODEL, num_attention_heads=3, head_dim=8, num_hidden_layers=4, block_size=16,
        layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    theirs = draw(MiniMaxLightningAttention(config, 1))
    qkv = theirs.qkv_proj.weight.view(3, 3, 8, D_MODEL).transpose(0, 1).reshape(72, D_MODEL)  # interleaved by head
    weights = {
        "qkvu_proj.weight": torch.cat([qkv, theirs.output_gate.weight]),
        "norm_weight": theirs.norm.weight,
        "out_proj.weight": theirs.out_proj.weight,
    }
    ours = made("lightning", nheads=3, headdim=8, variant="minimax")
    same(theirs, ours, weights, position_embeddings=None)


def test_mamba2() -> None:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        hidden_size=D_MODEL, num_heads=4, head_dim=8, state_size=6, n_groups=2, num_hidden_layers=4, chunk_size=16,
    )  # fmt: skip
    theirs = draw(Mamba2Mixer(config, 1))
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("norm.")}
    weights |= {"conv1d.weight": theirs.conv1d.weight.squeeze(1), "D": theirs.D[:, None]}
    weights["norm_weight"] = theirs.norm.weight
    same(theirs, made("mamba2", d_state=6, headdim=8, ngroups=2), weights)


def test_gated_deltanet() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=D_MODEL, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
        linear_value_head_dim=9, num_hidden_layers=4, rms_norm_eps=1e-6,
    )  # fmt: skip
    theirs = draw(Qwen3NextGatedDeltaNet(config, 1))
    q, k, v, z = theirs.in_proj_qkvz.weight.view(2, -1, D_MODEL).split([6, 6, 18, 18], 1)  # by key head
    b, a = theirs.in_proj_ba.weight.view(2, -1, D_MODEL).split([2, 2], 1)
    weights = {
        "qkv_proj.weight": torch.cat([t.flatten(0, 1) for t in (q, k, v)]),
        "g_proj.weight": z.flatten(0, 1),
        "a_proj.weight": a.flatten(0, 1),
        "b_proj.weight": b.flatten(0, 1),
        "conv1d.weight": theirs.conv1d.weight.squeeze(1),
        "A_log": theirs.A_log,
        "dt_bias": theirs.dt_bias,
        "norm_weight": theirs.norm.weight,
        "o_proj.weight": theirs.out_proj.weight,
    }
    same(theirs, made("gated_deltanet", nheads=2, nheads_v=4, headdim=6, expand_v=1.5), weights)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_kda(lower_bound: float | None) -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearConfig, KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=D_MODEL, linear_num_heads=2, linear_head_dim=6, num_hidden_layers=4, rms_norm_eps=1e-6,
        layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    theirs = draw(KimiLinearDeltaAttention(config, 1))
    state = theirs.state_dict()
    weights = {k.replace("forget_gate.", ""): v for k, v in state.items() if not k.startswith(("q_", "k_", "v_"))}
    weights["A_log"] = weights["A_log"].flatten()
    weights["conv1d.weight"] = weights["conv1d.weight"].squeeze(1)
    weights["norm_weight"] = weights.pop("o_norm.weight")
    weights["qkv_proj.weight"] = torch.cat([state[f"{name}_proj.weight"] for name in "qkv"])
    if lower_bound is not None:  # the gate of GLM and Ling around the same projections

        def gate(x: Tensor) -> Tensor:
            g = theirs.forget_gate
            f = (g.f_b_proj(g.f_a_proj(x)) + g.dt_bias).unflatten(-1, (2, 6))
            return lower_bound * torch.sigmoid(g.A_log.exp() * f)

        theirs.forget_gate.forward = gate
    same(theirs, made("kda", nheads=2, headdim=6, norm_eps=1e-6, lower_bound=lower_bound), weights)
