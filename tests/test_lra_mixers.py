"""Long Range Arena's baseline attentions: outputs on one small input, patterns, and what their published code does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.feature_maps import FEATURE_MAPS
from seqlib.mixers import Mixer, build_mixer
from seqlib.mixers.low_rank import nystrom
from seqlib.mixers.sorted_blocks import strided_blocks
from seqlib.mixers.whole import softmax_attention
from seqlib.ops import attention, linear_attention
from seqlib.sequence import SequenceInfo

Q = torch.tensor([[1, 0], [0, 1], [1, 1], [-1, 0.5]])[None, :, None]
K = torch.tensor([[0.5, 1], [1, -0.5], [0, 2], [-1, 0]])[None, :, None]
V = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])[None, :, None]


def _close(y: Tensor, first_column: list[float]) -> None:
    """Values are such that the second column of any average is the first plus 1."""
    want = torch.tensor(first_column, dtype=y.dtype)
    torch.testing.assert_close(y[0, :, 0], torch.stack([want, want + 1], 1), atol=2e-6, rtol=0)


def _mixer(kind: str, d_model: int = 2, **fields) -> Mixer:
    torch.manual_seed(0)
    return build_mixer({"kind": kind, **({} if kind == "fnet" else {"nheads": 1}), **fields}, d_model)


def _with(mixer: Mixer, **values: Tensor) -> Mixer:
    for name, value in values.items():
        getattr(mixer, name).data = value
    return mixer


def test_softmax_attention_full_and_local() -> None:
    _close(attention(Q, K, V, causal=False)[0], [3.227294, 4.041654, 3.495836, 4.859195])
    _close(attention(Q, K, V, causal=False, window=2)[0], [2.174958, 3.609372, 4.691216, 6.0])
    blocks = _mixer("local_attention", block=2)
    _close(blocks.attend(Q, K, V), [2.174958, 1.514366, 5.214082, 5.999999])


def test_linear_attention() -> None:
    for name, want in (
        ("elu1", [3.42485, 3.68976, 3.563995, 3.784017]),
        ("relu", [2.333332, 3.666666, 3.222222, 3.666664]),
    ):
        q, k, v = FEATURE_MAPS[name](Q), FEATURE_MAPS[name](K), torch.nn.functional.pad(V, (0, 1), value=1.0)
        y = linear_attention(q, k, v, causal=False)[0]
        torch.testing.assert_close(
            (y[..., :-1] / (y[..., -1:] + 1e-6))[0, :, 0, 0], torch.tensor(want), atol=5e-6, rtol=0
        )


def test_linformer() -> None:
    mixer = _mixer("linformer", rank=2, max_seqlen=4)
    E = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, -1]])
    F = torch.tensor([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]])
    _close(_with(mixer, E=E, F=F).attend(Q, K, V), [4.971267, 3.028733, 4.0, 2.676979])


def test_nystrom() -> None:
    want = torch.tensor([3.17114, 4.089094, 3.498227, 4.442398])
    got = nystrom(Q, K, V, 2, iterations=6, per_matrix=False)[0, :, 0, 0]
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    exact = torch.tensor([3.171137, 4.089095, 3.498227, 4.4424])
    got = nystrom(Q.double(), K.double(), V.double(), 2, iterations=12)[0, :, 0, 0]
    torch.testing.assert_close(got.float(), exact, atol=2e-6, rtol=0)


def test_performer() -> None:
    mixer = _with(_mixer("performer", n_features=3), features=torch.tensor([[1.0, 0], [0, 1], [1, -1]]))
    q, k = mixer._features(Q, K)
    exact = mixer._map(Q, False)
    torch.testing.assert_close(
        torch.einsum("lr,sr->ls", exact[0, :, 0], k[0, :, 0])[0],
        torch.tensor([1.109024, 2.138898, 0.462347, 0.493069]), atol=1e-6, rtol=0,
    )  # fmt: skip
    y = linear_attention(q, k, torch.nn.functional.pad(V, (0, 1), value=1.0), causal=False)[0]
    _close(y[..., :-1] / y[..., -1:], [3.16152, 3.417279, 3.288511, 3.459354])


def test_performer_approaches_softmax_attention() -> None:
    """More features come closer to what they estimate, on average over draws."""
    want = attention(Q, K, V, causal=False)[0]
    errors = {}
    for n in (8, 2048):
        found = []
        for seed in range(8):
            torch.manual_seed(seed)
            mixer = build_mixer({"kind": "performer", "nheads": 1, "n_features": n}, 2)
            q, k = mixer._features(Q, K)
            y = linear_attention(q, k, torch.nn.functional.pad(V, (0, 1), value=1.0), causal=False)[0]
            found.append((y[..., :-1] / y[..., -1:] - want).abs().mean())
        errors[n] = float(torch.stack(found).mean())
    assert errors[2048] < 0.5 * errors[8]


def test_luna() -> None:
    mixer = _mixer("luna", d_packed=2)
    pack = torch.eye(2)[None, :, None]
    packed = softmax_attention(pack, K, V)
    _close(packed, [3.227294, 4.041654])
    _close(softmax_attention(Q, packed, packed), [3.748574, 3.748574, 3.846059, 3.576258])
    # The mixer has one projection for keys and values.
    want = softmax_attention(pack, V, V)
    _close(mixer.attend(Q, V, pack), softmax_attention(Q, want, want)[0, :, 0, 0].tolist())


def test_fnet() -> None:
    y = _mixer("fnet", normalized=False).mix(V[:, :, 0])
    torch.testing.assert_close(y, torch.tensor([[[36.0, -4], [-8, 0], [-8, 0], [-8, 0]]]))
    y = _mixer("fnet", d_model=8).mix(torch.randn(2, 50, 8))
    assert float(y.detach().square().mean()) == pytest.approx(0.5, rel=0.3)  # the real half of a unitary transform


def test_sparse_patterns() -> None:
    def shown(kind: str, n: int, **fields) -> list[str]:
        return ["".join(".x"[int(s)] for s in row) for row in _mixer(kind, **fields).allowed(n)]

    assert shown("sparse_attention", 6, block=3, summary=1) == ["xxxx.x", "xxxx.x", "xxxx.x", "x.xxxx"] + 2 * ["x.xxxx"]
    assert shown("sparse_attention", 4, block=3, summary=1, lra_faithful=True) == ["x...", "xx..", "xxx.", "x.xx"]
    assert shown("longformer", 5, window=2, n_global=0) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    assert shown("longformer", 5, window=3, n_global=1) == ["xx...", "xxx..", "xxxx.", "x.xxx", "x..xx"]
    assert shown("bigbird", 8, block=1, n_random=0)[4] == "x..xxx.x"
    rows = _mixer("bigbird", block=1, n_random=2).allowed(40).sum(1)
    assert set(rows[2:-2].tolist()) <= {5, 6, 7} and (rows[[0, -1]] == 40).all()
    assert shown("bigbird", 40, block=2, n_random=2) == shown("bigbird", 40, block=2, n_random=2)


def test_global_tokens_have_projections_of_their_own() -> None:
    mixer = _mixer("longformer", d_model=4, nheads=2, window=3, n_global=1).double()
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    before = mixer(x)[0]
    mixer.global_k_proj.weight.data.mul_(2)
    moved = (mixer(x)[0] - before).abs().amax(-1)[0]
    assert bool(moved[0] > 0) and not bool(moved[1:].any())


def test_reformer_in_one_bucket_is_attention_without_the_token_itself() -> None:
    mixer = _mixer("reformer", d_model=4, bucket=12).double()
    q, v = torch.randn(2, 1, 12, 1, 4, dtype=torch.float64)
    mask = ~torch.eye(12, dtype=torch.bool)
    want = softmax_attention(q, torch.nn.functional.normalize(q, dim=-1), v, mask)
    torch.testing.assert_close(mixer.attend(q, v), want)
    # Two chunks: each sees itself and the other, so all see all, in each round once.
    for rounds in (1, 3):
        mixer = _mixer("reformer", d_model=4, bucket=6, n_hashes=rounds).double()
        torch.testing.assert_close(mixer.attend(q, v), want)
    torch.testing.assert_close(mixer.attend(q[:, :1], v[:, :1]), v[:, :1])  # nobody else to see


def test_reformer_sees_what_is_like_it() -> None:
    """Tokens of two directions, interleaved: each attends to its own kind only."""
    mixer = _mixer("reformer", d_model=4, bucket=8, n_hashes=1)
    q = torch.eye(4)[torch.arange(64) % 2][None, :, None] * 5
    v = (torch.arange(64) % 2).float()[None, :, None, None].expand(-1, -1, -1, 4)
    if not bool((mixer.rotations[0, :2].abs().argmax(-1) == 0).all()):
        torch.testing.assert_close(mixer.attend(q, v), v, atol=0.1, rtol=0)


def test_sinkhorn_sorts_blocks() -> None:
    """Scores that are a clear permutation give the permutation, and each block then attends to its partner."""
    mixer = _mixer("sinkhorn", block=2, max_seqlen=4, iterations=20)
    order = mixer._order(torch.zeros(1, 2, 2))
    torch.testing.assert_close(order, torch.full((1, 2, 2), 0.5))
    mixer.sort_proj.weight.data = torch.tensor([[0.0, 50.0], [50.0, 0.0]])
    order = mixer._order(torch.eye(2)[None])
    torch.testing.assert_close(order, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    blocks = [t.unflatten(1, (2, 2)) for t in (Q, K, V)]
    y = mixer._attend(
        torch.eye(2)[None, :, None].expand(1, 2, 2, 2), blocks, torch.ones(1, 2, 2, dtype=torch.bool)
    ).flatten(1, 2)
    own = softmax_attention(*(t[0] for t in blocks))
    other = softmax_attention(blocks[0][0], blocks[1][0].flip(0), blocks[2][0].flip(0))
    torch.testing.assert_close(y[0], (own + other).flatten(0, 1))


def test_synthesizer_scores() -> None:
    mixer = _with(_mixer("synthesizer", scores="random", max_seqlen=4), R=(Q @ K.mT)[..., 0].expand(1, 4, 4) * 0)
    torch.testing.assert_close(mixer._scores(torch.zeros(1, 3, 2)), torch.zeros(1, 1, 3, 3))
    dense = _mixer("synthesizer", d_model=4, nheads=2, scores="dense", max_seqlen=3)
    wrong = _mixer("synthesizer", d_model=4, nheads=2, scores="dense", max_seqlen=3, lra_faithful=True)
    x = torch.randn(1, 3, 4)
    a, b = dense._scores(x), wrong._scores(x)
    assert torch.equal(a.transpose(1, 2).flatten(), b.flatten()) and not torch.equal(a, b)


def test_published_local_attention_is_not_local() -> None:
    """Tokens with equal index modulo the number of blocks attend to each other, and a whole block is added to 12."""
    at = torch.arange(12.0)[None, :, None, None]
    (groups,), mask = strided_blocks([at + 1], 4, None, _mixer("local_attention", block=4).config)
    assert groups[0, :, :, 0, 0].tolist() == [[1, 5, 9, 0], [2, 6, 10, 0], [3, 7, 11, 0], [4, 8, 12, 0]]
    assert bool(mask.all())
    for kind in ("local_attention", "sinkhorn"):
        faithful = _mixer(kind, d_model=4, block=4, lra_faithful=True)
        plain = _mixer(kind, d_model=4, block=4)
        x = torch.randn(1, 12, 4)
        moved = x.clone()
        moved[:, 11] += 1
        change = (faithful(moved)[0] - faithful(x)[0]).abs().amax(-1)[0] > 0
        assert change[[3, 7, 11]].all()
        if kind == "local_attention":
            assert change.nonzero().flatten().tolist() == [3, 7, 11]
            assert ((plain(moved)[0] - plain(x)[0]).abs().amax(-1)[0] > 0).nonzero()[0] == 8


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "linformer", "max_seqlen": 12, "rank": 2},
        {"kind": "linear_transformer", "causal": False},
        {"kind": "local_attention", "block": 4},
    ],
    ids=lambda c: c["kind"],
)
def test_published_code_reads_padding(config: dict) -> None:
    """With lra_faithful the answer to a token depends on what stands at padding; without it does not."""
    x = torch.randn(1, 12, 4)
    moved = x.clone()
    moved[:, 9:] += 1
    seq = SequenceInfo(padding_mask=torch.arange(12)[None] < 9)
    for faithful in (False, True):
        mixer = _mixer(d_model=4, lra_faithful=faithful, **config)
        change = float((mixer(moved, None, seq)[0] - mixer(x, None, seq)[0])[:, :9].detach().abs().max())
        assert (change > 1e-4) == faithful
    with pytest.raises(UnsupportedInput, match="packed"):
        mixer(x, None, SequenceInfo.packed([5, 7]))


def test_published_nystromformer_depends_on_its_neighbours() -> None:
    x = 4 * torch.randn(3, 40, 4)
    for faithful in (False, True):
        mixer = _mixer("nystromformer", d_model=4, landmarks=4, iterations=1, lra_faithful=faithful)
        change = float((mixer(x)[0][:1] - mixer(x[:1])[0]).detach().abs().max())
        assert (change > 1e-5) == faithful


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "nystromformer", "conv": 4}, "conv must be odd"),
        ({"kind": "reformer", "max_buckets": 3}, "max_buckets must be even"),
        ({"kind": "bigbird", "near": 2}, "odd near"),
        ({"kind": "synthesizer", "scores": "keys"}, "random, factorized or dense"),
        ({"kind": "synthesizer", "lra_faithful": True}, "dense scores only"),
        ({"kind": "performer", "feature_map": "elu1"}, "softmax or relu"),
        ({"kind": "linformer", "nheads": 0}, "nheads must be a positive integer"),
        ({"kind": "sparse_attention", "summary": 200}, "at most block"),
        ({"kind": "longformer", "n_global": -1}, "n_global must be 0 or more"),
    ],
)
def test_wrong_settings_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_mixer(config, 8)


@pytest.mark.parametrize("kind", ["linformer", "synthesizer", "sinkhorn", "learned_positions"])
def test_longer_documents_than_there_are_weights_for(kind: str) -> None:
    mixer = build_mixer({"kind": kind, "max_seqlen": 8} | ({"block": 4} if kind == "sinkhorn" else {}), 8)
    mixer(torch.zeros(1, 8, 8))
    with pytest.raises(UnsupportedInput, match="raise max_seqlen or cut"):
        mixer(torch.zeros(1, 9, 8))
    mixer(torch.zeros(1, 9, 8), None, SequenceInfo.packed([4, 5]))
