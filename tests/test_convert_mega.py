"""The published layout of Mega: converted layers compute the published equations, written out here in its names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from seqlib.errors import CheckpointMismatch
from seqlib.hf.convert_mega import layers_from_mega, mixer_from_mega
from seqlib.mixers import build_mixer

D, N, Z, E, L = 5, 3, 4, 7, 12


def _weights(directions: int, rotary: bool, reach: int = L) -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows = directions * D
    shapes: dict[str, tuple[int, ...]] = {
        "move.delta": (rows, N, 1), "move.alpha": (rows, N, 1), "move.beta": (rows, N, 1), "move.gamma": (rows, N),
        "move.omega": (D,), "v_proj.weight": (E, D), "v_proj.bias": (E,), "h_proj.weight": (D, E), "h_proj.bias": (D,),
        "mx_proj.weight": (Z + E + 2 * D, D), "mx_proj.bias": (Z + E + 2 * D,), "gamma": (2, Z), "beta": (2, Z),
        "norm.norm.weight": (D,), "norm.norm.bias": (D,),
    }  # fmt: skip
    if rotary:
        shapes |= {"rel_pos_bias.alpha": (1, Z), "rel_pos_bias.beta": (1, Z), "rel_pos_bias._float_tensor": (1,)}
    else:
        shapes["rel_pos_bias.rel_pos_bias"] = (2 * reach - 1,)
    return {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}


def _published(w: dict[str, Tensor], x: Tensor, residual: Tensor, scores: str, chunk: int) -> Tensor:
    """The layer without its norm: the residual mixed with the candidate by the update gate."""
    p, q = torch.sigmoid(w["move.delta"]), 1 - torch.sigmoid(w["move.delta"]) * torch.sigmoid(w["move.alpha"])
    kernel = (w["move.gamma"][..., None] * N**-0.5 * p * w["move.beta"] * q ** torch.arange(L)).sum(1)
    m = w["move.omega"] * x
    for t in range(L):
        for s in range(L):
            if s <= t:
                m[:, t] += kernel[:D, t - s] * x[:, s]
            if s >= t and len(kernel) == 2 * D:
                m[:, t] += kernel[D:, s - t] * x[:, s]
    base = nn.functional.silu(m) @ w["mx_proj.weight"].T + w["mx_proj.bias"]
    u, zr, hx = base.split([D, Z + E, D], -1)
    z, r = nn.functional.silu(zr).split([Z, E], -1)
    queries, keys = z * w["gamma"][0] + w["beta"][0], z * w["gamma"][1] + w["beta"][1]
    v = nn.functional.silu(x @ w["v_proj.weight"].T + w["v_proj.bias"])
    causal = len(kernel) == D
    attended = torch.zeros_like(v)
    for begin in range(0, L, chunk):
        part = slice(begin, begin + chunk)
        dots, bias = queries[:, part] @ keys[:, part].mT, _bias(w, chunk)
        visible = torch.ones(chunk, chunk).tril() if causal else torch.ones(chunk, chunk)
        if scores == "softmax":
            a = torch.softmax((dots * Z**-0.5 + bias).masked_fill(visible == 0, -math.inf), -1)
        else:
            s = dots / visible.sum(-1, keepdim=True) + bias
            a = visible * (s.relu() ** 2 if scores == "relu2" else 0.5 * (1 + torch.erf((s - 0.707107) / 0.398942)))
        attended[:, part] = a @ v[:, part]
    h = nn.functional.silu(hx + (attended * r) @ w["h_proj.weight"].T + w["h_proj.bias"])
    return residual + torch.sigmoid(u) * (h - residual)


def _bias(w: dict[str, Tensor], size: int) -> Tensor:
    if "rel_pos_bias.rel_pos_bias" in w:
        table = w["rel_pos_bias.rel_pos_bias"]
        middle = len(table) // 2
        return torch.stack([table[middle - i : middle - i + size] for i in range(size)])
    angle = torch.arange(size)[:, None] * 10000.0 ** (-torch.arange(Z // 2).double() / (Z // 2))
    turned = []
    for name in ("alpha", "beta"):
        a, b = w[f"rel_pos_bias.{name}"][0].chunk(2)
        turned.append(torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1))
    return turned[0] @ turned[1].T


@pytest.mark.parametrize("scores", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("directions", "chunk"), [(1, 4), (2, 4), (1, None), (2, None)])
@torch.no_grad()
def test_mega_layers(scores: str, rotary: bool, directions: int, chunk: int | None) -> None:
    weights = _weights(directions, rotary, chunk or L)
    x, residual = torch.randn(2, L, D, dtype=torch.float64), torch.randn(2, L, D, dtype=torch.float64)
    config, made = mixer_from_mega(weights, scores=scores, chunk_size=chunk)
    mixer = build_mixer(config, D).double()
    mixer.load_state_dict(made)
    want = _published(weights, x, residual, scores, chunk or L)
    # The published laplace has its constants to six digits.
    torch.testing.assert_close(residual + mixer(x, residual=residual)[0], want, atol=1e-5, rtol=1e-5)


def test_every_layer_of_a_model_is_found() -> None:
    weights = {f"encoder.layers.{i}.mega_layer.{n}": t for i in range(2) for n, t in _weights(2, False).items()}
    weights["encoder.layers.0.nffn.fc1.weight"] = torch.zeros(3, D)
    found = layers_from_mega(weights, scores="laplace")
    assert list(found) == ["encoder.layers.0.mega_layer.", "encoder.layers.1.mega_layer."]
    assert all(config["scores"] == "laplace" and config["max_positions"] == L for config, _ in found.values())
    with pytest.raises(CheckpointMismatch, match="no name ends in"):
        layers_from_mega({"fc1.weight": torch.zeros(3, D)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"move.delta": None}, "no move.delta"),
        ({"v_proj.weight": None}, "no v_proj.weight"),
        ({"rel_pos_bias.rel_pos_bias": None}, "no position_bias"),
        ({"h_proj.weight": torch.zeros(D, E + 1)}, "h_proj.weight"),
        ({"q_proj.weight": torch.zeros(D, E)}, "it has q_proj.weight"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    weights = {n: t for n, t in (_weights(1, False) | change).items() if t is not None}
    with pytest.raises(CheckpointMismatch, match=message):
        mixer_from_mega(weights)
