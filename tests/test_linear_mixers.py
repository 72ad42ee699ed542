"""The mixers around matrix states: what they equal, how they start, published vectors, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.decay import alibi_slopes, lightning_log_decay, retention_log_decay
from seqlib.layers.feature_maps import taylor
from seqlib.layers.init import fill_
from seqlib.layers.lrpe import HouseholderLRPE
from seqlib.mixers import Mixer, build_mixer
from seqlib.mixers.matrix import MatrixState
from seqlib.ops import rms_norm, selective_scan


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def made(kind: str, d_model: int, **config) -> Mixer:
    torch.manual_seed(0)
    return build_mixer({"kind": kind, **config}, d_model, layer_index=1, n_layer=4).double()


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_mamba2_is_a_selective_scan(norm_before_gate: bool) -> None:
    """With A, D and dt repeated over a head's channels Mamba-2 is Mamba-1's scan."""
    m = made("mamba2", 16, d_state=6, headdim=4, ngroups=2, norm_before_gate=norm_before_gate)
    u = torch.randn(2, 33, 16, dtype=torch.float64)
    z, xBC, dt = m.in_proj(u).split([32, 32 + 2 * 2 * 6, 8], -1)
    x, B, C = m.conv1d(xBC, None, None)[0].split([32, 12, 12], -1)
    A = -m.A_log.exp().repeat_interleave(4)[:, None].expand(-1, 6)
    y, _ = selective_scan(
        x, dt.repeat_interleave(4, -1), A, B.unflatten(-1, (2, 6)), C.unflatten(-1, (2, 6)),
        D=m.D[:, 0].repeat_interleave(4), dt_bias=m.dt_bias.repeat_interleave(4), dt_softplus=True,
    )  # fmt: skip
    gated = y if norm_before_gate else y * F.silu(z)
    y = rms_norm(gated, m.norm_weight, group_size=16)
    close(m(u)[0], m.out_proj(y * F.silu(z) if norm_before_gate else y))


def test_mamba2_holds_dt_in_its_limits() -> None:
    """Where every step size is cut to one value, they are the same as dt that starts there; step and forward alike."""
    limited = made("mamba2", 16, d_state=4, headdim=8, dt_limit_min=0.3, dt_limit_max=0.3)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    want = limited(x)[0]
    with torch.no_grad():
        limited.dt_bias += 7
    close(limited(x)[0], want)
    state = limited.initial_state(1)
    with torch.no_grad():
        for t in range(5):
            close(limited.step(x[:, t], state)[0], want[:, t])


def test_mamba2_starts_as_published() -> None:
    m = build_mixer({"kind": "mamba2"}, 1024, n_layer=16)
    assert m.nheads == 32 and m.in_proj.weight.shape == (2 * 2048 + 2 * 128 + 32, 1024)
    A, dt = m.A_log.exp(), F.softplus(m.dt_bias)
    assert 1 <= A.min() < 4 and 12 < A.max() <= 16
    assert 0.999e-3 <= dt.min() < 3e-3 and 3e-2 < dt.max() <= 0.1001
    assert torch.equal(m.D, torch.ones(32, 1)) and torch.equal(m.norm_weight, torch.ones(2048))
    assert 0.98 * 2048**-0.5 / 4 < m.out_proj.weight.abs().max() <= 2048**-0.5 / 4


def test_slopes_are_those_of_the_releases() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(12) == [*alibi_slopes(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    first = lightning_log_decay(8, 0, 24)
    assert first == pytest.approx([-(2.0**-h) * (1 + 1e-5) for h in range(1, 9)], rel=1e-12)
    assert lightning_log_decay(8, 23, 24)[0] == pytest.approx(-0.5e-5, rel=1e-9)  # the last layer hardly forgets
    assert math.log(2) / -lightning_log_decay(8, 23, 24)[0] == pytest.approx(139e3, rel=0.01)  # tokens to one half
    assert lightning_log_decay(4, 6, 13)[0] == pytest.approx(-0.25 * (0.5 + 1e-5), rel=1e-12)
    assert lightning_log_decay(4, 0, 1)[0] == pytest.approx(-0.25 * (1 + 1e-5), rel=1e-12)
    # MiniMax: no rule of its own for other numbers of heads, and a layer factor whose end is not quite 1e-5.
    assert lightning_log_decay(12, 0, 4, "minimax")[11] == pytest.approx(-(2.0**-8) * (1 + 1e-5), rel=1e-12)
    assert lightning_log_decay(2, 3, 4, "minimax")[0] == pytest.approx(-(1 - 3 / 3.00001 + 1e-5) / 16, rel=1e-12)
    assert retention_log_decay(2) == pytest.approx([math.log(31 / 32), math.log(63 / 64)], rel=1e-12)


def test_decays_survive_casting_and_inference_mode() -> None:
    with torch.inference_mode():
        build_mixer({"kind": "lightning", "nheads": 7}, 14)(torch.randn(1, 3, 14))
    mixer = build_mixer({"kind": "lightning", "nheads": 7}, 14)
    mixer(torch.randn(1, 3, 14))[0].sum().backward()  # what was kept there can be saved for a backward pass
    _, state = mixer.bfloat16()(torch.randn(1, 3, 14).bfloat16())
    assert state.state.dtype == torch.float32


def _recurrent(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The recurrence as the sheets print it: (l, h, n), (l, h, n), (l, h, p), (h,)."""
    state, ys = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=q.dtype), []
    for t in range(q.shape[0]):
        state = log_decay.exp()[:, None, None] * state + k[t][:, :, None] * v[t][:, None, :]
        ys.append((q[t][:, None, :] @ state)[:, 0])
    return torch.stack(ys)


@pytest.mark.parametrize("lrpe", [False, True])
def test_transnormerllm_token_mixer(lrpe: bool) -> None:
    """Against a plain reading of the released model: angles that start per channel of all heads, norm, then gate."""
    m = made("lightning", 12, nheads=3, lrpe=lrpe)
    x = torch.randn(19, 12, dtype=torch.float64)
    q, k, v, u = (x @ m.qkvu_proj.weight.T).chunk(4, -1)
    q, k = F.silu(q), F.silu(k)
    q, k, v = (t.view(19, 3, 4) for t in (q, k, v))
    if lrpe:
        theta = torch.tensor([[10000 ** (-2 * (4 * h + j) / 12) for j in range(4)] for h in range(3)]).double()
        close(m.lrpe.theta, theta, 1e-6)  # was float32 once
        angle = torch.arange(19)[:, None, None] * m.lrpe.theta
        q, k = (torch.cat([t * angle.cos(), t * angle.sin()], -1) for t in (q, k))
    slopes = torch.tensor([2**-4.0, 2**-8.0, 2**-2.0]).double()  # of 2 heads, then the first of 4
    y = _recurrent(q, k, v, -slopes * (1 - 1 / 3 + 1e-5)).reshape(19, 12)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    close(m(x[None])[0][0], (u * y) @ m.out_proj.weight.T)


def test_lrpe_sees_distances_only() -> None:
    m = made("lightning", 8, nheads=2, lrpe=True)
    q, k = torch.randn(2, 1, 2, 4, dtype=torch.float64)
    near = [m.lrpe(torch.tensor([t]), x, x)[0] for t, x in ((7, q), (3, k))]
    far = [m.lrpe(torch.tensor([t]), x, x)[0] for t, x in ((1007, q), (1003, k))]
    close((near[0] * near[1]).sum(-1), (far[0] * far[1]).sum(-1))
    close((near[0] * near[1]).sum(-1), (q * k * torch.cos(4 * m.lrpe.theta)).sum(-1))


def test_minimax_token_mixer() -> None:
    """Slopes of MiniMax, silu on v too, a norm with weights and a sigmoid gate."""
    m = made("lightning", 12, nheads=3, variant="minimax")
    fill_(m.norm_weight, torch.rand(12))
    x = torch.randn(19, 12, dtype=torch.float64)
    qkv, u = F.silu(x @ m.qkvu_proj.weight[:36].T), x @ m.qkvu_proj.weight[36:].T
    slopes = 2.0 ** (-8 * torch.arange(1, 4).double() / 3)
    y = _recurrent(*qkv.view(19, 3, 3, 4).unbind(1), -slopes * (1 - 1 / (3 + 1e-5) + 1e-5)).reshape(19, 12)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * m.norm_weight
    close(m(x[None])[0][0], (torch.sigmoid(u) * y) @ m.out_proj.weight.T)


def test_ring_token_mixer() -> None:
    """Ring-linear: no activation, half of each head rotated, scaled scores, and a norm in groups."""
    m = made("lightning", 16, nheads=4, variant="ring", norm_groups=2, qk_norm=True)
    fill_(m.q_norm.weight, torch.rand(4))
    x = torch.randn(19, 16, dtype=torch.float64)
    q, k, v, u = (t.view(19, 4, 4) for t in (x @ m.qkvu_proj.weight.T).chunk(4, -1))
    q, k = (
        t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * n.weight for t, n in ((q, m.q_norm), (k, m.k_norm))
    )
    turn = torch.polar(torch.ones(19).double(), torch.arange(19).double())[:, None]
    q, k = (
        torch.cat([torch.view_as_real(torch.view_as_complex(t[..., :2].contiguous()) * turn), t[..., 2:]], -1)
        for t in (q, k)
    )
    slopes = 2.0 ** (-2 * torch.arange(1, 5).double())
    y = _recurrent(q / 2, k, v, -slopes * (1 - 1 / 3 + 1e-5)).view(19, 2, 8)
    y = (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).reshape(19, 16)
    close(m(x[None])[0][0], (torch.sigmoid(u.flatten(1)) * y) @ m.out_proj.weight.T, 1e-6)  # angles are float32


def test_states_of_the_other_convention_are_refused_or_converted() -> None:
    """The Triton kernels of lightning attention and LASP carry a state that has decayed once more."""
    m = made("lightning", 12, nheads=3)
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    want, _ = m(x)
    _, state = m(x[:, :11])
    log_decay = torch.tensor(m.log_decay).double()
    theirs = state.state * log_decay.exp()[:, None, None]
    with pytest.raises(UnsupportedInput, match="off by one decay per head; make it with MatrixState.undecayed"):
        MatrixState(theirs, decayed=True)
    close(m(x[:, 11:], MatrixState.undecayed(theirs, log_decay))[0], want[:, 11:])


def test_retnet_by_its_parallel_form() -> None:
    m = made("retnet", 16, nheads=2, rotary=False, expand_v=1.0)
    x = torch.randn(1, 21, 16, dtype=torch.float64)
    q, k, v, g = ((x @ p.weight.T).view(21, 2, 8) for p in (m.q_proj, m.k_proj, m.v_proj, m.g_proj))
    distance = torch.arange(21)[:, None] - torch.arange(21)
    gamma = torch.tensor([31 / 32, 63 / 64]).double()[:, None, None]
    mask = gamma ** distance.clamp(min=0) * (distance >= 0)
    y = torch.einsum("lhn,shn,hls,shp->lhp", q, k, mask, v) / math.sqrt(8)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * F.silu(g)
    close(m(x)[0][0], y.reshape(21, 16) @ m.o_proj.weight.T)


TOY = torch.tensor(
    [[1, 0, 0.5, 1, 1, 2], [0, 1, 1, -0.5, 3, 4], [1, 1, 0, 2, 5, 6], [-1, 0.5, -1, 0, 7, 8]], dtype=torch.float64
)  # q, k, v of four tokens


def _toy(**config) -> Tensor:
    """A linear transformer of one head whose projections pick q, k and v out of the toy inputs."""
    m = made("linear_transformer", 6, nheads=1, d_feature=2, **config)
    eye = torch.eye(6, dtype=torch.float64)
    picks = {"q_proj": eye[:2], "k_proj": eye[2:4], "v_proj": torch.cat([eye[4:], eye[:4]]), "o_proj": eye}
    for name, pick in picks.items():
        fill_(getattr(m, name).weight, pick)
    return m(TOY[None])[0][0, :, :2]


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, [1.0, 1.737527, 3.098945, 3.784017]),
        ({"causal": False}, [3.42485, 3.68976, 3.563995, 3.784017]),
        ({"causal": False, "feature_map": "relu"}, [2.333332, 3.666666, 3.222222, 3.666664]),
    ],
)
def test_linear_transformer_vectors(config: dict, want: list[float]) -> None:
    y = _toy(**config)
    close(y[:, 0], torch.tensor(want).double(), 2e-6)
    close(y[:, 1], y[:, 0] + 1, 5e-6)  # averages of values whose second column is the first plus 1


def test_taylor_features_are_packed() -> None:
    q, k = torch.randn(2, 5, 16, dtype=torch.float64)
    assert taylor(q).shape == (5, 153)
    score = (q * k).sum(-1)
    close((taylor(q) * taylor(k)).sum(-1), 1 + score / 4 + score.square() / 32)
    mixer = build_mixer({"kind": "based"}, 1024)
    assert mixer.matrix_shape == (16, 153, 65)


def test_based_by_its_quadratic_form() -> None:
    m = made("based", 12, nheads=2, d_feature=4)
    x = torch.randn(17, 12, dtype=torch.float64)
    q, k, v = ((x @ p.weight.T).view(17, 2, -1) for p in (m.q_proj, m.k_proj, m.v_proj))
    score = torch.einsum("lhn,shn->hls", q, k)
    weights = (1 + score / 2 + score.square() / 8).tril()
    y = torch.einsum("hls,shp->lhp", weights / weights.sum(-1, keepdim=True), v)
    close(m(x[None])[0][0], y.reshape(17, 12) @ m.o_proj.weight.T)


def test_transnormer_divides_by_the_norm() -> None:
    """T1: elu features, whose negative sums would spoil a denominator; the norm over both heads together."""
    m = made("transnormer", 12, nheads=2, feature_map="elu")
    x = torch.randn(17, 12, dtype=torch.float64)
    q, k, v = ((x @ p.weight.T).view(17, 2, -1) for p in (m.q_proj, m.k_proj, m.v_proj))
    y = torch.einsum("lhn,shn,ls,shp->lhp", F.elu(q), F.elu(k), torch.ones(17, 17).double().tril(), v).reshape(17, 12)
    close(m(x[None])[0][0], (y / (y.norm(dim=-1, keepdim=True) / math.sqrt(12) + 1e-8)) @ m.o_proj.weight.T, 1e-7)


@pytest.mark.parametrize("causal", [True, False])
def test_diag_attention_is_attention_per_block(causal: bool) -> None:
    m = made("diag_attention", 12, nheads=2, window=5, causal=causal)
    whole = build_mixer({"kind": "attention", "nheads": 2, "rotary": False, "causal": causal}, 12).double()
    whole.load_state_dict(m.state_dict())
    x = torch.randn(2, 17, 12, dtype=torch.float64)
    close(m(x)[0], torch.cat([whole(block)[0] for block in x.split(5, 1)], 1))


@pytest.mark.parametrize("causal", [True, False])
def test_t1_rectifies_within_blocks_and_norms_after(causal: bool) -> None:
    m = made("diag_attention", 12, nheads=2, window=5, causal=causal, activation="relu")
    x = torch.randn(17, 12, dtype=torch.float64)
    q, k, v = ((x @ p.weight.T).view(17, 2, 6) for p in (m.q_proj, m.k_proj, m.v_proj))
    block = torch.arange(17) // 5
    seen = block[:, None] == block
    scores = torch.einsum("lhp,shp->hls", q, k).relu() / math.sqrt(6) * (seen.tril() if causal else seen)
    y = torch.einsum("hls,shp->lhp", scores, v).reshape(17, 12)
    y = y / (y.norm(dim=-1, keepdim=True) / math.sqrt(12) + 1e-8)
    close(m(x[None])[0][0], y @ m.o_proj.weight.T, 1e-6)  # ours adds the square of 1e-8 under the root


def test_householder_lrpe_sees_distances_only() -> None:
    """x (I - 2 u u^T) rotated by pairs: a product of matrices, lengths kept, and nothing but the distance matters."""
    lrpe = HouseholderLRPE(6).double()
    assert not lrpe.v.requires_grad and HouseholderLRPE(6, learned=True).v.requires_grad
    close(lrpe.theta, 10000 ** (-torch.arange(3) / 3).double(), 1e-6)  # was float32 once
    q, k = torch.randn(2, 1, 2, 6, dtype=torch.float64)
    u = lrpe.v / lrpe.v.norm()
    angles = 7 * lrpe.theta
    turn = torch.block_diag(
        *(torch.stack([torch.stack([a.cos(), a.sin()]), torch.stack([-a.sin(), a.cos()])]) for a in angles)
    )
    turned, _ = lrpe(torch.tensor([7]), q, k)
    close(turned, q @ (torch.eye(6).double() - 2 * u[:, None] * u) @ turn)
    close(turned.norm(dim=-1), q.norm(dim=-1))
    near = lrpe(torch.tensor([7]), q, k)[0] * lrpe(torch.tensor([3]), q, k)[1]
    far = lrpe(torch.tensor([1007]), q, k)[0] * lrpe(torch.tensor([1003]), q, k)[1]
    close(near.sum(-1), far.sum(-1))


def test_transnormer_places_its_features() -> None:
    m = made("transnormer", 12, nheads=2, lrpe=True)
    x = torch.randn(17, 12, dtype=torch.float64)
    q, k, v = ((x @ p.weight.T).view(17, 2, 6) for p in (m.q_proj, m.k_proj, m.v_proj))
    q, k = m.lrpe(torch.arange(17), F.elu(q) + 1, F.elu(k) + 1)
    y = torch.einsum("lhn,shn,ls,shp->lhp", q, k, torch.ones(17, 17).double().tril(), v).reshape(17, 12)
    close(m(x[None])[0][0], (y / (y.norm(dim=-1, keepdim=True) / math.sqrt(12) + 1e-8)) @ m.o_proj.weight.T, 1e-7)


def test_gated_deltanet_and_kda_start_as_published() -> None:
    for kind, low in (("gated_deltanet", 1e-4), ("kda", 1.0)):
        m = build_mixer({"kind": kind, "nheads": 64, "headdim": 4}, 32)
        A, dt = m.A_log.exp(), F.softplus(m.dt_bias)
        assert low <= A.min() < 3 and 12 < A.max() <= 16.001
        assert 0.999e-3 <= dt.min() < 5e-3 and 2e-2 < dt.max() <= 0.1001


def test_sum_adds_its_mixers() -> None:
    configs = [{"kind": "attention", "nheads": 2}, {"kind": "mamba2", "headdim": 8, "d_state": 4}]
    m = made("sum", 16, mixers=configs)
    gated = made("sum", 16, mixers=configs, gate=True)
    gated.load_state_dict(m.state_dict(), strict=False)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    want = m.mixers[0](x)[0] + m.mixers[1](x)[0]
    close(m(x)[0], want)
    close(gated(x)[0], want / 2)  # the gate starts at one half
    names = [name for names, _ in m.param_groups() for name in names]
    assert names == ["mixers.1.A_log", "mixers.1.D", "mixers.1.dt_bias"]


def test_bidirectional_layers_refuse_to_decode() -> None:
    m = made("linear_transformer", 8, nheads=2, causal=False)
    with pytest.raises(UnsupportedInput, match="causal=False"):
        m.step(torch.zeros(1, 8).double(), m.initial_state(1))


def test_places_outside_the_stack_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer_index must be in 0 .. n_layer - 1 = 3, got 4"):
        build_mixer({"kind": "lightning", "nheads": 4}, 32, layer_index=4, n_layer=4)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("mamba2", {"headdim": 24}, "headdim must divide d_inner=64, got 24"),
        ("mamba2", {"headdim": 16, "ngroups": 3}, "ngroups must divide nheads=4, got 3"),
        ("mamba2", {"dt_limit_min": 0.2, "dt_limit_max": 0.1}, "dt_limit_min <= dt_limit_max"),
        ("mamba2", {"A_min": 0.0}, "0 < A_min"),
        ("lightning", {"nheads": 5}, "nheads must divide d_model=32, got 5"),
        ("lightning", {}, "headdim must divide d_model=32, got 128"),
        ("lightning", {"nheads": 4, "variant": "rong"}, "'transnormer', 'minimax' or 'ring', got 'rong'"),
        ("lightning", {"nheads": 4, "norm_groups": 2}, "'transnormer' has no norm_groups"),
        ("lightning", {"nheads": 4, "variant": "ring", "lrpe": True}, "'ring' has no lrpe"),
        ("lightning", {"nheads": 4, "variant": "ring", "norm_groups": 3}, "norm_groups must divide"),
        ("transnormer", {"nheads": 32, "lrpe": True}, "an even number of them, got 1"),
        ("diag_attention", {"activation": "gelu"}, "'softmax' or 'relu', got 'gelu'"),
        ("diag_attention", {"lrpe": True, "rotary": True}, "lrpe or rotary"),
        ("retnet", {"nheads": 3}, "nheads must divide expand_k \\* d_model=32, got 3"),
        ("retnet", {"nheads": 32}, "rotary"),
        ("linear_transformer", {"nheads": 5}, "nheads must divide d_model=32, got 5"),
        ("linear_transformer", {"feature_map": "exp"}, "known: elu, elu1, identity, relu, taylor"),
        ("linear_transformer", {"feature_map": "identity"}, "normalized=False"),
        ("transnormer", {"normalized": True}, "linear_transformer"),
        ("diag_attention", {"window": None}, "length of a block"),
        ("gla", {"nheads": 5}, "nheads must divide expand_k \\* d_model=16, got 5"),
        ("gla", {"gate_normalizer": 0.0}, "gate_normalizer must be positive"),
        ("deltanet", {"nheads": 5}, "nheads must divide d_model=32, got 5"),
        ("deltanet", {"expand_v": 0.1}, r"expand_v \* headdim must be at least 1, got 0.1 \* 2"),
        ("gated_deltanet", {"nheads": 2, "nheads_v": 3}, "nheads must divide nheads_v=3, got 2"),
        ("gated_deltanet", {"gate_activation": "tanh"}, "'silu' or 'sigmoid'"),
        ("kda", {"nheads_v": 32}, "nheads_v must be nheads"),
        ("kda", {"lower_bound": 5.0}, "must be negative or None, got 5.0"),
        ("sum", {"mixers": [{"kind": "mamba"}]}, "at least two"),
        ("sum", {"mixers": [{"kind": "mamba"}, {"kind": "mumba"}]}, "unknown mixer kind 'mumba'"),
    ],
)
def test_wrong_configs_are_refused(kind: str, config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_mixer({"kind": kind, **config}, 32)
