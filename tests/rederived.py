# ruff: noqa: RUF012 - tables of a class, never written to
"""Families that no public implementation runs on a CPU: their equations once more, plainly, token by token in float64.

Each class makes a random checkpoint under the published names and computes its logits from those very tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

VOCAB, D, LAYERS = 97, 32, 3


def rms(x: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def conv(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Causal depthwise convolution of (seqlen, d) with (d, 1, width)."""
    taps = weight[:, 0]
    padded = F.pad(x, (0, 0, taps.shape[1] - 1, 0))
    return sum(padded[k : k + len(x)] * taps[:, k] for k in range(taps.shape[1])) + bias


def rotate(x: Tensor, theta: float = 1e4, width: int | None = None) -> Tensor:
    """(seqlen, nheads, headdim): halves of the first `width` features are pairs."""
    width = width or x.shape[-1]
    half = width // 2
    angle = torch.arange(len(x)).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = torch.complex(x[..., :half], x[..., half:width]) * turn
    return torch.cat([turned.real, turned.imag, x[..., width:]], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """(seqlen, nheads, headdim); a query sees `window` keys."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("lhd,shd->hls", q, k) * q.shape[-1] ** -0.5
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (distance >= 0) & (distance < (window or len(q)))
    return torch.einsum("hls,shd->lhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(1)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1))


class Rederived:
    """A random checkpoint, its folder and its logits."""

    layout: str
    file = "model.safetensors"
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(11)
        self.weights: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            noise = torch.randn(shape, generator=made)
            if len(shape) > 1 and not name.endswith("A_log"):
                fan = 1.0 if "embed" in name else 2.0 * shape[-1] if "conv" not in name else shape[-1]
                self.weights[name] = noise * fan**-0.5
            else:
                self.weights[name] = 0.3 * noise + (1.0 if "norm" in name or name.endswith(".D") else 0.0)

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.file.endswith(".bin"):
            torch.save(self.weights, folder / self.file)
        else:
            save_file(self.weights, folder / self.file, metadata={"format": "pt"})

    def __call__(self, ids: Tensor) -> Tensor:
        w = {name: weight.double() for name, weight in self.weights.items()}
        return torch.stack([self.row(w, row) for row in ids])

    def row(self, w: dict[str, Tensor], ids: Tensor) -> Tensor:
        raise NotImplementedError


class Fla(Rederived):
    """The block of flash-linear-attention around the mixer of a subclass."""

    mixer: dict[str, tuple[int, ...]]
    layers = LAYERS
    width = 256

    def __init__(self) -> None:
        self.shapes = {"model.embeddings.weight": (VOCAB, D), "model.norm.weight": (D,), "lm_head.weight": (VOCAB, D)}
        for i in range(self.layers):
            names = {f"attn.{name}": shape for name, shape in self.mixer.items()}
            names |= {"attn_norm.weight": (D,), "mlp_norm.weight": (D,), "mlp.down_proj.weight": (D, self.width)}
            names |= dict.fromkeys(("mlp.gate_proj.weight", "mlp.up_proj.weight"), (self.width, D))
            self.shapes |= {f"model.layers.{i}.{name}": shape for name, shape in names.items()}
        super().__init__()

    def row(self, w: dict[str, Tensor], ids: Tensor) -> Tensor:
        x = w["model.embeddings.weight"][ids]
        for i in range(self.layers):
            p = {name.removeprefix(f"model.layers.{i}."): t for name, t in w.items() if f"layers.{i}." in name}
            x = x + self.mix({n.removeprefix("attn."): t for n, t in p.items()}, rms(x, p["attn_norm.weight"]))
            h = rms(x, p["mlp_norm.weight"])
            x = (
                x
                + (F.silu(h @ p["mlp.gate_proj.weight"].T) * (h @ p["mlp.up_proj.weight"].T))
                @ p["mlp.down_proj.weight"].T
            )
        return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T

    def mix(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        raise NotImplementedError


class Gla(Fla):
    layout = "fla-gla"
    config = {"model_type": "gla", "hidden_size": D, "num_heads": 4, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    config |= {"intermediate_size": 256, "fuse_norm": True, "max_position_embeddings": 2048}
    mixer = {
        **{"q_proj.weight": (16, D), "k_proj.weight": (16, D), "v_proj.weight": (D, D), "g_proj.weight": (D, D)},
        **{"gk_proj.0.weight": (16, D), "gk_proj.1.weight": (16, 16), "gk_proj.1.bias": (16,), "o_proj.weight": (D, D)},
        "g_norm_swish_gate.weight": (8,),
    }

    def mix(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v, g = (heads(x @ p[f"{n}_proj.weight"].T, 4) for n in "qkvg")
        low = x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"]
        decay = heads(torch.sigmoid(low) ** (1 / 16), 4)
        state, out = torch.zeros(4, 4, 8).double(), []
        for t in range(len(x)):
            state = decay[t][:, :, None] * state + k[t][:, :, None] * v[t][:, None]
            out.append(torch.einsum("hk,hkv->hv", q[t], state) * 4**-0.5)
        y = rms(torch.stack(out), p["g_norm_swish_gate.weight"]) * F.silu(g)
        return y.flatten(1) @ p["o_proj.weight"].T


class FusedGla(Gla):
    """As files were before 2025: gate and up in one tensor, no fused norm."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(self.layers):
            mlp = f"model.layers.{i}.mlp."
            both = [self.weights[f"{mlp}gate_proj.weight"], self.weights.pop(f"{mlp}up_proj.weight")]
            self.weights[f"{mlp}gate_proj.weight"] = torch.cat(both)

    def row(self, w: dict[str, Tensor], ids: Tensor) -> Tensor:
        for i in range(self.layers):
            mlp = f"model.layers.{i}.mlp."
            w[f"{mlp}gate_proj.weight"], w[f"{mlp}up_proj.weight"] = w[f"{mlp}gate_proj.weight"].chunk(2)
        return super().row(w, ids)

    def __call__(self, ids: Tensor) -> Tensor:
        w = {name: weight.double() for name, weight in self.weights.items()}
        return torch.stack([self.row(dict(w), row) for row in ids])


class RetNet(Fla):
    layout = "fla-retnet"
    config = {
        "model_type": "retnet",
        "hidden_size": D,
        "num_heads": 4,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
    }
    mixer = {
        **{"q_proj.weight": (D, D), "k_proj.weight": (D, D), "v_proj.weight": (64, D), "g_proj.weight": (64, D)},
        **{"o_proj.weight": (D, 64), "g_norm_swish_gate.weight": (16,)},
    }

    def mix(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v, g = (heads(x @ p[f"{n}_proj.weight"].T, 4) for n in "qkvg")
        q, k = rotate(q), rotate(k)
        gamma = 1 - 2.0 ** (-5 - torch.arange(4).double())
        at = torch.arange(len(x)).double()
        decay = torch.tril(gamma[:, None, None] ** (at[:, None] - at).clamp(min=0))
        y = torch.einsum("hls,lhd,shd,she->lhe", decay, q, k, v) * 8**-0.5
        return (rms(y, p["g_norm_swish_gate.weight"]) * F.silu(g)).flatten(1) @ p["o_proj.weight"].T


class DeltaNet(Fla):
    layout = "fla-delta_net"
    config = {"model_type": "delta_net", "hidden_size": D, "num_heads": 4, "num_hidden_layers": LAYERS}
    config |= {"vocab_size": VOCAB, "use_gate": True, "expand_k": 0.5, "intermediate_size": 256}
    sizes = (16, 16, D)
    mixer = {
        **{f"{n}_proj.weight": (size, D) for n, size in zip("qkv", sizes)},
        **{f"{n}_conv1d.weight": (size, 1, 4) for n, size in zip("qkv", sizes)},
        **{"b_proj.weight": (4, D), "g_proj.weight": (D, D), "o_proj.weight": (D, D), "o_norm.weight": (8,)},
    }

    def decay(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.ones(len(x), 4).double()

    def gated(self, y: Tensor, g: Tensor) -> Tensor:
        return y * F.silu(g)

    def mix(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v = (F.silu(conv(x @ p[f"{n}_proj.weight"].T, p[f"{n}_conv1d.weight"])) for n in "qkv")
        nheads = p["b_proj.weight"].shape[0]
        keys = self.config.get("num_heads", nheads)
        q, k = (heads(t, keys) / (heads(t, keys).square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        q, k = (t.repeat_interleave(nheads // keys, 1) for t in (q, k))
        v, g = heads(v, nheads), heads(x @ p["g_proj.weight"].T, nheads)
        beta, decay = torch.sigmoid(x @ p["b_proj.weight"].T), self.decay(p, x)
        state, out = torch.zeros(nheads, q.shape[-1], v.shape[-1]).double(), []
        for t in range(len(x)):
            state = decay[t][:, None, None] * state
            error = v[t] - torch.einsum("hk,hkv->hv", k[t], state)
            state = state + (beta[t][:, None] * k[t])[:, :, None] * error[:, None]
            out.append(torch.einsum("hk,hkv->hv", q[t], state) * q.shape[-1] ** -0.5)
        y = self.gated(rms(torch.stack(out), p["o_norm.weight"]), g)
        return y.flatten(1) @ p["o_proj.weight"].T


class GatedDeltaNet(DeltaNet):
    layout = "fla-gated_deltanet"
    config = {"model_type": "gated_deltanet", "hidden_size": D, "num_heads": 2, "head_dim": 8, "num_v_heads": 4}
    config |= {"num_hidden_layers": LAYERS, "vocab_size": VOCAB, "expand_v": 1.5, "intermediate_size": 256}
    config |= {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 6}}
    mixer = {
        **{f"{n}_proj.weight": (size, D) for n, size in zip("qkv", (16, 16, 48))},
        **{f"{n}_conv1d.weight": (size, 1, 4) for n, size in zip("qkv", (16, 16, 48))},
        **{"a_proj.weight": (4, D), "b_proj.weight": (4, D), "g_proj.weight": (48, D), "o_proj.weight": (D, 48)},
        **{"A_log": (4,), "dt_bias": (4,), "o_norm.weight": (12,)},
    }

    def __init__(self) -> None:
        super().__init__()
        for name in [name for name in self.weights if name.startswith("model.layers.1.attn.")]:
            del self.weights[name]
        made = torch.Generator().manual_seed(12)
        for n, size in zip("qkvo", (D, 16, 16, D)):
            self.weights[f"model.layers.1.attn.{n}_proj.weight"] = torch.randn(size, D, generator=made) * 0.15

    def decay(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.exp(-p["A_log"].exp() * F.softplus(x @ p["a_proj.weight"].T + p["dt_bias"]))

    def mix(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        if "A_log" in p:
            return super().mix(p, x)
        q, k, v = (heads(x @ p[f"{n}_proj.weight"].T, count) for n, count in zip("qkv", (4, 2, 2)))
        return attend(rotate(q), rotate(k), v, window=6) @ p["o_proj.weight"].T


class TransNormer(Rederived):
    layout = "transnormer"
    nheads, headdim, glu = 4, 8, 40
    config = {"model_type": "transnormer", "decoder_embed_dim": D, "decoder_layers": LAYERS, "hidden_dim": D}
    config |= {"decoder_attention_heads": 4, "vocab_size": VOCAB, "glu_dim": 40, "linear_use_lrpe_list": [1, 0, 0]}
    config |= {"tie_word_embeddings": False}

    def __init__(self) -> None:
        self.shapes = {"model.embed_tokens.weight": (VOCAB, D), "lm_head.weight": (VOCAB, D)}
        for i in range(LAYERS):
            names = {"token_mixer.qkvu_proj.weight": (4 * D, D), "token_mixer.out_proj.weight": (D, D)}
            names |= {"channel_mixer.l1.weight": (40, D), "channel_mixer.l2.weight": (40, D)}
            names |= {"channel_mixer.l3.weight": (D, 40)}
            self.shapes |= {f"model.layers.{i}.{name}": shape for name, shape in names.items()}
        self.shapes["model.layers.0.token_mixer.lrpe.theta"] = (4, 1, 8)
        super().__init__()

    def row(self, w: dict[str, Tensor], ids: Tensor) -> Tensor:
        x = w["model.embed_tokens.weight"][ids] * D**0.5
        at = torch.arange(len(ids)).double()
        distance = at[:, None] - at
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / 4) for h in range(4)]).double()
        for i in range(LAYERS):
            p = f"model.layers.{i}."
            q, k, v, u = (rms(x) @ w[f"{p}token_mixer.qkvu_proj.weight"].T).chunk(4, -1)
            q, k, v = heads(F.silu(q), 4), heads(F.silu(k), 4), heads(v, 4)
            theta = w.get(f"{p}token_mixer.lrpe.theta")
            if theta is not None:
                angle = at[:, None, None] * theta[:, 0]
                q, k = (torch.cat([t * angle.cos(), t * angle.sin()], -1) for t in (q, k))
            rate = slopes * (1 - i / (LAYERS - 1) + 1e-5)
            decay = torch.tril(torch.exp(-rate[:, None, None] * distance.clamp(min=0)))
            y = torch.einsum("hls,lhd,shd,she->lhe", decay, q, k, v).flatten(1)
            x = x + (u * rms(y)) @ w[f"{p}token_mixer.out_proj.weight"].T
            l1, l2, l3 = (w[f"{p}channel_mixer.l{n}.weight"] for n in (1, 2, 3))
            x = x + ((rms(x) @ l1.T) * (rms(x) @ l2.T)) @ l3.T
        return rms(x) @ w["lm_head.weight"].T


class Based(Rederived):
    layout, file = "based", "pytorch_model.bin"
    config: dict[str, Any] = {
        **{"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_inner": 256, "vocab_size": VOCAB - 1, "rms_norm": True},
        **{"activation_function": "swiglu", "qkv_proj_bias": False, "out_proj_bias": False, "mlp_fc1_bias": False},
        **{"mlp_fc2_bias": False, "rotary_emb_fraction": 1, "max_position_embeddings": 0, "residual_in_fp32": True},
        **{"pad_vocab_size_multiple": 97, "alt_mixer_layers": [1], "alt_mixer_2_layers": [2]},
        "mixer": {"_target_": "based.models.mixers.convolution.BaseConv", "use_bias": True, "expand_proj": 4},
        "alt_mixer": {
            "_target_": "based.models.mixers.linear_attention.LinearAttention",
            "feature_map": {"_target_": "based.models.mixers.linear_attention.TaylorExp"},
            **{"feature_dim": 4, "num_heads": 4},
        },
        "alt_mixer_2": {"_target_": "based.models.mixers.slide_attention.SlidingAttention", "window_size": 10},
    }

    def __init__(self) -> None:
        base = "model.transformer."
        self.shapes = {f"{base}embeddings.word_embeddings.weight": (VOCAB, D), f"{base}ln_f.weight": (D,)}
        mixers = [
            {"in_proj.weight": (128, D), "in_proj.bias": (128,), "out_proj.weight": (D, 64), "out_proj.bias": (D,)},
            {"proj_q.weight": (16, D), "proj_k.weight": (16, D), "proj_v.weight": (D, D), "out_proj.weight": (D, D)},
            {"Wqkv.weight": (3 * D, D), "out_proj.weight": (D, D)},
        ]
        mixers[0]["conv.conv.weight"] = (64, 1, 3)
        for i, mixer in enumerate(mixers):
            names: dict[str, tuple[int, ...]] = {f"mixer.{name}": shape for name, shape in mixer.items()}
            names |= {"norm1.weight": (D,), "norm2.weight": (D,)}
            names |= {"mlp.fc1.weight": (512, D), "mlp.fc2.weight": (D, 256)}
            self.shapes |= {f"{base}layers.{i}.{name}": shape for name, shape in names.items()}
        super().__init__()
        for name in [name for name in self.weights if "ln_f" in name]:
            self.weights[name] += 1.0
        self.weights["model.lm_head.weight"] = self.weights[f"{base}embeddings.word_embeddings.weight"].clone()

    def row(self, w: dict[str, Tensor], ids: Tensor) -> Tensor:
        base = "model.transformer."
        x = w[f"{base}embeddings.word_embeddings.weight"][ids]
        for i, mix in enumerate((self.convolve, self.taylor, self.slide)):
            p = {name.removeprefix(f"{base}layers.{i}."): t for name, t in w.items() if f"layers.{i}." in name}
            x = x + mix({n.removeprefix("mixer."): t for n, t in p.items()}, rms(x, p["norm1.weight"], 1e-5))
            up, gate = (rms(x, p["norm2.weight"], 1e-5) @ p["mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ p["mlp.fc2.weight"].T
        return rms(x, w[f"{base}ln_f.weight"], 1e-5) @ w["model.lm_head.weight"].T

    def convolve(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        u, g = (x @ p["in_proj.weight"].T + p["in_proj.bias"]).chunk(2, -1)
        return (F.silu(conv(u, p["conv.conv.weight"])) * g) @ p["out_proj.weight"].T + p["out_proj.bias"]

    def taylor(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v = (heads(x @ p[f"proj_{n}.weight"].T, 4) for n in "qkv")
        product = torch.einsum("lhd,shd->hls", q, k) / 2
        weights = torch.tril(1 + product + product.square() / 2)
        y = torch.einsum("hls,shd->lhd", weights / weights.sum(-1, keepdim=True), v)
        return y.flatten(1) @ p["out_proj.weight"].T

    def slide(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v = (heads(t, 4) for t in (x @ p["Wqkv.weight"].T).chunk(3, -1))
        return attend(rotate(q), rotate(k), v, window=6) @ p["out_proj.weight"].T


class Original(Rederived):
    """state-spaces/mamba with MLPs and an attention layer that convolves q, k and v."""

    layout, file = "state-spaces", "pytorch_model.bin"
    config = {
        **{"d_model": D, "n_layer": LAYERS, "vocab_size": 91, "pad_vocab_size_multiple": 97, "d_intermediate": 100},
        "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 2, "d_conv": 3, "rmsnorm": True},
        "attn_layer_idx": [1],
        "attn_cfg": {
            **{"causal": True, "d_conv": 4, "head_dim": 8, "num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4},
            **{"qkv_proj_bias": False, "out_proj_bias": False},
        },
        **{"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True},
    }

    def __init__(self) -> None:
        ssm = {"in_proj.weight": (64 + 64 + 24 + 8, D), "conv1d.weight": (88, 1, 3), "conv1d.bias": (88,)}
        ssm |= {"dt_bias": (8,), "A_log": (8,), "D": (8,), "norm.weight": (64,), "out_proj.weight": (D, 64)}
        attention = {"in_proj.weight": (64, D), "conv1d.weight": (64, 1, 4), "conv1d.bias": (64,)}
        attention |= {"out_proj.weight": (D, 32)}
        self.shapes = {"backbone.embedding.weight": (VOCAB, D), "backbone.norm_f.weight": (D,)}
        for i in range(LAYERS):
            mixer = attention if i == 1 else ssm
            names: dict[str, tuple[int, ...]] = {f"mixer.{name}": shape for name, shape in mixer.items()}
            names |= {"norm.weight": (D,), "norm2.weight": (D,)}
            names |= {"mlp.fc1.weight": (256, D), "mlp.fc2.weight": (D, 128)}
            self.shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in names.items()}
        super().__init__()
        self.weights["lm_head.weight"] = self.weights["backbone.embedding.weight"].clone()

    def row(self, w: dict[str, Tensor], ids: Tensor) -> Tensor:
        x = w["backbone.embedding.weight"][ids]
        for i in range(LAYERS):
            p = {name.removeprefix(f"backbone.layers.{i}."): t for name, t in w.items() if f"layers.{i}." in name}
            mix = self.attention if i == 1 else self.ssm
            x = x + mix(
                {n.removeprefix("mixer."): t for n, t in p.items() if "mixer." in n}, rms(x, p["norm.weight"], 1e-5)
            )
            up, gate = (rms(x, p["norm2.weight"], 1e-5) @ p["mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (up * F.silu(gate)) @ p["mlp.fc2.weight"].T
        return rms(x, w["backbone.norm_f.weight"], 1e-5) @ w["lm_head.weight"].T

    def ssm(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        z, xbc, dt = (x @ p["in_proj.weight"].T).split([64, 88, 8], -1)
        xs, b, c = F.silu(conv(xbc, p["conv1d.weight"], p["conv1d.bias"])).split([64, 12, 12], -1)
        xs, b, c = heads(xs, 8), *(heads(t, 2).repeat_interleave(4, 1) for t in (b, c))
        dt = F.softplus(dt + p["dt_bias"])
        state, out = torch.zeros(8, 8, 6).double(), []
        for t in range(len(x)):
            state = torch.exp(-dt[t] * p["A_log"].exp())[:, None, None] * state
            state = state + (dt[t][:, None] * xs[t])[:, :, None] * b[t][:, None]
            out.append(torch.einsum("hpn,hn->hp", state, c[t]) + p["D"][:, None] * xs[t])
        y = torch.stack(out).flatten(1) * F.silu(z)
        return (rms(heads(y, 2), eps=1e-5).flatten(1) * p["norm.weight"]) @ p["out_proj.weight"].T

    def attention(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        qkv = conv(x @ p["in_proj.weight"].T, p["conv1d.weight"], p["conv1d.bias"])
        q, k, v = (heads(t, count) for t, count in zip(qkv.split([32, 16, 16], -1), (4, 2, 2)))
        return attend(rotate(q, width=4), rotate(k, width=4), v) @ p["out_proj.weight"].T


REDERIVED: dict[str, type[Rederived]] = {
    "original-hybrid": Original,
    "transnormer": TransNormer,
    "based": Based,
    "gla": Gla,
    "gla-fused": FusedGla,
    "retnet": RetNet,
    "delta_net": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
}
