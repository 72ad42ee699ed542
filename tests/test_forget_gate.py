"""Claims of the forget gate of attention beyond the equivalence grid: formula, memory, rounding, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_attention import _largest, _qkv, _same

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.mixers import build_mixer
from seqlib.ops import attention
from seqlib.ops.attention import KVState, step


def test_mixer_is_the_published_formula() -> None:
    """FoX: softmax(q k / sqrt(headdim) + F_i - F_j) v, F the running sum of logsigmoid(f_proj(x)), not scaled."""
    mixer = build_mixer({"kind": "attention", "nheads": 2, "rotary": False, "forget_gate": True}, 12).double()
    x = torch.randn(1, 33, 12, dtype=torch.float64)
    q, k, v = ((x @ p.weight.T).view(33, 2, 6) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    sums = F.logsigmoid(x[0] @ mixer.f_proj.weight.T + mixer.f_proj.bias).cumsum(0).T
    scores = torch.einsum("lhp,shp->hls", q, k) / 6**0.5 + sums[:, :, None] - sums[:, None]
    weights = scores.masked_fill(~torch.ones(33, 33, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    y = torch.einsum("hls,shp->lhp", weights, v).reshape(33, 12)
    _same(mixer(x)[0][0], y @ mixer.o_proj.weight.T)


def test_nothing_forgotten_is_plain_attention() -> None:
    q, k, v = _qkv(2, 40)
    want, _ = attention(q, k, v)
    for form in ("parallel", "reference"):
        _same(attention(q, k, v, torch.zeros(2, 40, 4), form=form)[0], want)


@pytest.mark.parametrize("window", [None, 64])
def test_gradients_take_linear_memory(window: int | None) -> None:
    seqlen = 4096
    q, k, v = (t.requires_grad_() for t in _qkv(1, seqlen, 2, 1, dtype=torch.float32))
    log_decay = torch.full((1, seqlen, 2), -0.01, requires_grad=True)
    held = 0

    def count(t: torch.Tensor) -> torch.Tensor:
        nonlocal held
        held += t.numel()
        return t

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            y, _ = attention(q, k, v, log_decay, window=window)
        y.sum().backward()

    assert _largest(run) <= seqlen * seqlen // 16
    assert held <= seqlen * 1200  # copies of the keys of every block of queries would be seqlen^2 / 8


def test_long_memories_keep_their_precision() -> None:
    """Sums of thousands have no digits left for the decays of neighbours; in float32 the result must not show it."""
    q, k, v = _qkv(1, 3000, 1, 1)
    log_decay = F.logsigmoid(torch.randn(1, 3000, 1, dtype=torch.float64) - 1)
    want, exact = attention(q, k, v, log_decay)
    got, state = attention(*(t.float() for t in (q, k, v, log_decay)))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    assert float(exact.log_decay.min()) < -3000
    near = state.log_decay[:, -20:].double()
    torch.testing.assert_close(near, exact.log_decay[:, -20:], atol=1e-5, rtol=0)


def test_steps_round_no_more_than_forward_in_bfloat16() -> None:
    q, k, v = _qkv(1, 200, 2, 1)
    log_decay = F.logsigmoid(torch.randn(1, 200, 2, dtype=torch.float64) + 3)
    want, _ = attention(*(t.bfloat16().double() for t in (q, k, v)), log_decay)
    state = KVState.empty(1, 200, 1, 8, nheads_decay=2, dtype=torch.bfloat16)
    half = [t.bfloat16() for t in (q, k, v)]
    got = torch.stack([step(*(t[:, i] for t in half), state, log_decay[:, i]) for i in range(200)], 1).double()
    assert float((got - want).square().mean().sqrt()) <= 6e-3 * float(want.square().mean().sqrt())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_decay": torch.zeros(2, 6, 2)}, "log_decay must be real"),
        ({"log_decay": torch.zeros(2, 6, 4, dtype=torch.long)}, "log_decay must be real"),
        ({"causal": False}, "needs causal=True"),
        ({"relu": True}, "use only one"),
        ({"log_decay": torch.ones(2, 6, 4), "backend": "reference"}, "at most 0, got a largest value of 1.0"),
        ({"state": KVState.empty(2, 5, 2, 8)}, "state.log_decay must be"),
        ({"state": KVState.empty(2, 5, 2, 8, nheads_decay=2)}, "state.log_decay must be"),
        ({"log_decay": None, "state": KVState.empty(2, 5, 2, 8, nheads_decay=4)}, "beside no log_decay"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    good = {"q": torch.zeros(2, 6, 4, 8), "k": torch.zeros(2, 6, 2, 8), "v": torch.zeros(2, 6, 2, 8)}
    good["log_decay"] = torch.zeros(2, 6, 4)
    attention(**good)
    with pytest.raises(UnsupportedInput, match=message):
        attention(**(good | change))


def test_gates_and_states_go_together_when_decoding() -> None:
    q, k = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    with pytest.raises(UnsupportedInput, match="only then"):
        step(q, k, k, KVState.empty(2, 5, 2, 8), torch.zeros(2, 4))
    with pytest.raises(UnsupportedInput, match="only then"):
        step(q, k, k, KVState.empty(2, 5, 2, 8, nheads_decay=4))


def test_a_gate_that_looks_ahead_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs causal=True"):
        build_mixer({"kind": "attention", "nheads": 2, "forget_gate": True, "causal": False}, 32)
