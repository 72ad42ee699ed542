"""Claims of PaTH attention beyond the equivalence grid: the definition, decoding, splits, memory, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_attention import _largest
from torch import Tensor

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.mixers import build_mixer
from seqlib.ops import attention, path_attention
from seqlib.ops.attention import KVState
from seqlib.ops.path_attention import PathState, step
from seqlib.sequence import SequenceInfo


def _inputs(batch: int, seqlen: int, nheads: int = 2, headdim: int = 6, dtype=torch.float64) -> list[Tensor]:
    q, k, v, w = (torch.randn(batch, seqlen, nheads, headdim, dtype=dtype) for _ in range(4))
    beta = 2 * torch.rand(batch, seqlen, nheads, dtype=dtype)
    return [q, k, v, F.normalize(w, dim=-1), beta, F.logsigmoid(torch.randn(batch, seqlen, nheads, dtype=dtype))]


def _close(got: Tensor, want: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def test_it_is_the_published_formula() -> None:
    """The product of matrices H_i ... H_{j+1} written out for every pair."""
    q, k, v, w, beta, log_decay = _inputs(1, 23, 1)
    H = torch.eye(6).double() - beta[0, :, 0, None, None] * w[0, :, 0, :, None] * w[0, :, 0, None]
    scores = torch.full((23, 23), -torch.inf, dtype=torch.float64)
    for i in range(23):
        row = q[0, i, 0]
        for j in range(i, -1, -1):
            scores[i, j] = row @ k[0, j, 0] / 6**0.5 + log_decay[0, j + 1 : i + 1, 0].sum()
            row = row @ H[j]
    want = scores.softmax(-1) @ v[0, :, 0]
    for chunk_size in (4, 23, 64):
        _close(path_attention(q, k, v, w, beta, log_decay, chunk_size=chunk_size)[0][0, :, 0], want)


def test_without_maps_it_is_attention() -> None:
    q, k, v, w, _, log_decay = _inputs(2, 40)
    want, kept = attention(q, k, v, log_decay)
    got, state = path_attention(q, k, v, w, torch.zeros(2, 40, 2).double(), log_decay, chunk_size=16)
    _close(got, want)
    _close(state.k, kept.k)


def test_keys_are_rewritten_while_decoding() -> None:
    """Steps in place, rows of different lengths, equal the blockwise form and end in its state."""
    inputs = _inputs(3, 30)
    want, final = path_attention(*inputs, chunk_size=8)
    state = PathState.empty(3, 32, 2, 6, nheads_decay=2, dtype=torch.float64)
    buffers = [t.data_ptr() for t in state.tensors()]
    for t in range(30):
        q, k, v, w, beta, log_decay = (x[:, t] for x in inputs)
        _close(step(q, k, v, w, beta, state, log_decay), want[:, t])
    assert [t.data_ptr() for t in state.tensors()] == buffers
    _close(state.k[:, :30], final.k)
    _close(state.log_decay[:, :30], final.log_decay)


def test_a_reflection_forgets_no_length_and_a_projection_does() -> None:
    """beta = 2 turns keys into their mirror images; beta = 1 removes the part along w for good."""
    q, k, v, w, _, _ = _inputs(1, 2)
    for beta, kept in ((2.0, True), (1.0, False)):
        _, state = path_attention(q, k, v, w, torch.full((1, 2, 2), beta).double())
        along = (state.k[0, 0] * w[0, 1]).sum(-1)
        _close(along, -(k[0, 0] * w[0, 1]).sum(-1) if kept else torch.zeros(2).double())


def test_keys_stay_float32_in_a_16_bit_model() -> None:
    mixer = build_mixer({"kind": "path", "nheads": 2}, 16).bfloat16()
    _, state = mixer(torch.randn(1, 5, 16).bfloat16())
    assert (state.kv.k.dtype, state.kv.v.dtype) == (torch.float32, torch.bfloat16)
    assert mixer.initial_state(1, 4).kv.k.dtype == torch.float32


def test_padding_is_absent_whatever_stands_there() -> None:
    inputs = _inputs(3, 20)
    real = torch.ones(3, 20, dtype=torch.bool)
    real[0, :11], real[1, 15:], real[1, 5:7], real[2] = False, False, False, False
    for t in inputs:
        t[~real] = torch.nan
    _, start = path_attention(*_inputs(3, 7))
    for state in (None, start):
        y, after = path_attention(*inputs, state=state, seq=SequenceInfo(padding_mask=real), chunk_size=4)
        assert bool((y[~real] == 0).all())
        for row in range(2):
            alone = None if state is None else state.reorder(torch.tensor([row]))
            want, own = path_attention(*(t[row : row + 1, real[row]] for t in inputs), state=alone, chunk_size=4)
            _close(y[row, real[row]], want[0])
            _close(after.k[row, : int(own.length)], own.k[0, : int(own.length)])


def test_gradients_take_linear_memory() -> None:
    seqlen = 4096
    inputs = [t.requires_grad_() for t in _inputs(1, seqlen, 1, 8, torch.float32)]
    held = 0

    def count(t: Tensor) -> Tensor:
        nonlocal held
        held += t.numel()
        return t

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            y, _ = path_attention(*inputs)
        y.sum().backward()

    assert _largest(run) <= seqlen * seqlen // 16
    assert held <= seqlen * 2000  # the scores alone would be seqlen^2 / 2


def test_the_mixer_is_the_released_layer() -> None:
    """Low-rank w through a convolution, gate scaled with the scores, against a plain reading."""
    mixer = build_mixer({"kind": "path", "nheads": 2, "w_rank": 5, "forget_gate": True}, 12).double()
    x = torch.randn(1, 19, 12, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = ((x @ p.weight.T).view(1, 19, 2, 6) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        w = x @ mixer.w_proj[0].weight.T @ mixer.w_proj[1].weight.T
        w = sum(F.pad(w, (0, 0, 2 - i, 0))[:, :19] * mixer.w_conv1d.weight[:, i] for i in range(3))
        w = F.silu(w).view(1, 19, 2, 6)
        w = w / (w.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        beta = 2 * torch.sigmoid(x @ mixer.bt_proj.weight.T + mixer.bt_proj.bias)
        gate = F.logsigmoid(x @ mixer.g_proj.weight.T + mixer.g_proj.bias) / 6**0.5
        y, _ = path_attention(q, k, v, w, beta, gate, backend="reference")
        _close(mixer(x)[0], y.flatten(2) @ mixer.o_proj.weight.T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 6, 3, 8), "v": torch.zeros(2, 6, 3, 8)}, "divide"),
        ({"w": torch.zeros(2, 6, 4, 8)}, "w must be real with shape"),
        ({"beta": torch.zeros(2, 6, 4)}, "beta must be real with shape"),
        ({"log_decay": torch.zeros(2, 6, 2)}, "log_decay must be real with shape"),
        ({"v": torch.zeros(2, 6, 2, 8, dtype=torch.bfloat16)}, "one floating dtype"),
        ({"w": torch.zeros(2, 6, 2, 8, device="meta")}, "every tensor must be on"),
        ({"q": torch.zeros(2, 0, 4, 8)}, "not empty"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"state": KVState.empty(2, 5, 2, 8)}, "PathState.*got KVState"),
        ({"state": PathState.empty(3, 5, 2, 8)}, "state.k must be"),
        ({"state": PathState.empty(2, 5, 2, 8, nheads_decay=4)}, "state.log_decay must be None"),
        ({"state": PathState.empty(2, 5, 2, 8, dtype=torch.float64)}, "state.v must be torch.float32"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    good = {"q": torch.zeros(2, 6, 4, 8), "k": torch.zeros(2, 6, 2, 8), "v": torch.zeros(2, 6, 2, 8)}
    good |= {"w": torch.zeros(2, 6, 2, 8), "beta": torch.zeros(2, 6, 2)}
    path_attention(**good)
    with pytest.raises(UnsupportedInput, match=message):
        path_attention(**(good | change))


def test_keys_of_one_kind_of_attention_are_no_state_of_the_other() -> None:
    q, k = torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 8)
    with pytest.raises(UnsupportedInput, match="KVState.*got PathState"):
        attention(q, k, k, state=PathState.empty(2, 5, 2, 8))
    with pytest.raises(UnsupportedInput, match="PathState"):
        step(q[:, 0], k[:, 0], k[:, 0], k[:, 0], k[:, 0, :, 0], KVState.empty(2, 5, 2, 8))
    full = PathState.empty(2, 1, 2, 8)
    full.length += 1
    with pytest.raises(UnsupportedInput, match="full"):
        step(q[:, 0], k[:, 0], k[:, 0], k[:, 0], k[:, 0, :, 0], full)


def test_the_mixer_decodes_under_autocast() -> None:
    mixer, x = build_mixer({"kind": "path", "nheads": 2}, 32), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, mixer.initial_state(2, 10))
        _, state = mixer.step(x[:, 0], state)
    assert state.kv.k.dtype == state.kv.v.dtype == torch.float32
    torch.testing.assert_close(y.float(), mixer(x)[0], atol=2e-2, rtol=0)


def test_bad_configs_are_refused() -> None:
    for config, message in (
        ({"nheads": 5}, "nheads must divide d_model=32, got 5"),
        ({"nheads": 4, "nheads_kv": 3}, "nheads_kv must divide nheads=4, got 3"),
        ({"nheads": 4, "w_rank": 0}, "w_rank must be a positive integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_mixer({"kind": "path", **config}, 32)
