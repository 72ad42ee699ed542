"""Claims of attention beyond the equivalence grid: memory, rings, splits, packing, padding, decoding, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqlib import use_backend
from seqlib.dispatch import resolve
from seqlib.errors import BackendUnavailable, ConfigError, UnsupportedInput
from seqlib.layers.rotary import Rotary
from seqlib.mixers import build_mixer
from seqlib.ops import attention
from seqlib.ops.attention import OP, KVState, facts, step
from seqlib.sequence import SequenceInfo

windows = pytest.mark.parametrize("window", [None, 1, 2, 5, 16])


def _qkv(batch: int, seqlen: int, nheads: int = 4, nheads_kv: int = 2, headdim: int = 8, dtype=torch.float64):
    return tuple(torch.randn(batch, seqlen, h, headdim, dtype=dtype) for h in (nheads, nheads_kv, nheads_kv))


def _same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


class Largest(TorchDispatchMode):
    """Records the most entries that any newly made tensor has, views and in-place results aside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            tensors = [t for t in (made if isinstance(made, (tuple, list)) else (made,)) if isinstance(t, Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return made


def _largest(run: Callable[[], object]) -> int:
    with Largest() as recorder:
        run()
    return recorder.numel


def test_the_recorder_sees_a_square() -> None:
    q, k, v = (t.transpose(1, 2) for t in _qkv(1, 300, 2, 2))
    square = torch.ones(300, 300, dtype=torch.bool)
    assert _largest(lambda: F.scaled_dot_product_attention(q, k, v, square.tril())) >= 300 * 300


@pytest.mark.parametrize("grad", [False, True])
def test_windows_take_linear_memory(grad: bool) -> None:
    seqlen, window = 32768, 64
    q, k, v = (t.requires_grad_(grad) for t in _qkv(1, seqlen, 2, 1, dtype=torch.float32))

    def run() -> None:
        y, state = attention(q, k, v, window=window)
        if grad:
            (y.sum() + state.k.sum()).backward()

    assert _largest(run) <= 2 * seqlen * window < seqlen * seqlen // 200


def test_windows_from_a_ring_and_in_documents_take_linear_memory() -> None:
    seqlen, window = 16384, 64
    q, k, v = _qkv(2, seqlen, 2, 1, dtype=torch.float32)
    _, state = attention(q[:, :100], k[:, :100], v[:, :100], window=window)
    starts = torch.rand(2, seqlen) < 0.001
    seq = SequenceInfo(starts, torch.rand(2, seqlen) < 0.9)
    assert _largest(lambda: attention(q, k, v, window=window, state=state, seq=seq)) <= 4 * seqlen * window


@pytest.mark.parametrize("what", ["padded", "packed", "state", "bidirectional"])
def test_long_full_attention_makes_no_square(what: str) -> None:
    seqlen, options = 8192, {}
    q, k, v = _qkv(2, seqlen, 1, 1, dtype=torch.float32)
    if what == "state":
        state = KVState.empty(2, seqlen, 1, 8)
        options["state"] = attention(q[:, :50], k[:, :50], v[:, :50], state=state)[1]
        q, k, v = (t[:, : seqlen - 50] for t in (q, k, v))
    elif what == "packed":
        options["seq"] = SequenceInfo(torch.arange(seqlen).expand(2, -1) % 3000 == 0)
    else:
        real = torch.arange(seqlen) >= torch.tensor([[0], [1000]])
        options |= {"seq": SequenceInfo(padding_mask=real), "causal": what == "padded"}
    assert _largest(lambda: attention(q, k, v, **options)) <= seqlen * seqlen // 64


def test_reference_is_the_textbook_formula() -> None:
    """An independent writing: query head h reads key head h // 2, scores scaled, softmax over what is in the window."""
    q, k, v = _qkv(2, 21)
    got, _ = attention(q, k, v, window=6, scale=0.3, backend="reference")
    for h in range(4):
        scores = 0.3 * q[:, :, h] @ k[:, :, h // 2].transpose(1, 2)
        visible = torch.ones(21, 21, dtype=torch.bool).tril() & ~torch.ones(21, 21, dtype=torch.bool).tril(-6)
        _same(got[:, :, h], scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, :, h // 2])


def test_auto_cuts_only_what_is_longer_than_its_window() -> None:
    forms = {}
    for window in (None, 8, 9, 10):
        q, k, v = _qkv(1, 9)
        forms[window] = resolve(OP, facts(q, k, v, window=window)).impl.form
    assert forms == {None: "parallel", 8: "chunked", 9: "parallel", 10: "parallel"}


@pytest.mark.parametrize("window", [1, 3, 16])
def test_ring_equals_full_attention_in_a_window(window: int) -> None:
    """A ring of `window` slots, gone round many times, sees what a mask over everything would let it see."""
    q, k, v = _qkv(3, 150)
    distance = torch.arange(150)[:, None] - torch.arange(150)
    mask = (distance >= 0) & (distance < window)
    want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, enable_gqa=True)
    state = KVState.empty(3, window, 2, 8, dtype=torch.float64)
    for t in range(150):
        _same(step(q[:, t], k[:, t], v[:, t], state, window=window), want[:, :, t])
    assert state.capacity == window
    assert state.length.tolist() == [150] * 3


@windows
@pytest.mark.parametrize("rows", ["even", "uneven"])
def test_steps_equal_forward(window: int | None, rows: str) -> None:
    q, k, v = _qkv(3, 40)
    seq = None
    if rows == "uneven":
        seq = SequenceInfo(padding_mask=torch.arange(20) >= torch.tensor([[0], [13], [20]]))
    start = KVState.empty(3, window or 40, 2, 8, dtype=torch.float64)
    _, state = attention(q[:, :20], k[:, :20], v[:, :20], window=window, state=start, seq=seq)
    before = state.clone()
    want, final = attention(q[:, 20:], k[:, 20:], v[:, 20:], window=window, state=state)
    buffers = [t.data_ptr() for t in state.tensors()]
    for t in range(20):
        _same(step(q[:, 20 + t], k[:, 20 + t], v[:, 20 + t], state, window=window), want[:, t])
    assert [t.data_ptr() for t in state.tensors()] == buffers
    for a, b in zip(state.tensors(), final.tensors()):
        _same(a, b)
    assert not torch.equal(state.k, before.k)


@windows
def test_split_invariance(window: int | None) -> None:
    """Outputs, final state and gradients do not depend on where a sequence is cut."""
    q, k, v = (t.requires_grad_() for t in _qkv(2, 83))
    want, last = attention(q, k, v, window=window)
    weight = torch.randn_like(want)
    wanted = torch.autograd.grad((want * weight).sum() + last.v.sum(), (q, k, v))
    for cuts in ([1], [40], [3, 4, 20, 21, 70], list(range(1, 83, 7))):
        state, parts = None, []
        for begin, end in zip([0, *cuts], [*cuts, 83]):
            y, state = attention(*(t[:, begin:end] for t in (q, k, v)), window=window, state=state)
            parts.append(y)
        _same(torch.cat(parts, 1), want)
        held = 83 if window is None else window
        _same(state.k[:, :held], last.k)
        assert torch.equal(state.length, last.length)
        got = torch.autograd.grad((torch.cat(parts, 1) * weight).sum() + state.v.sum(), (q, k, v))
        for a, b in zip(got, wanted):
            _same(a, b)


@windows
def test_packed_equals_separate(window: int | None) -> None:
    lengths = [5, 1, 1, 40, 3, 17]
    q, k, v = _qkv(1, sum(lengths))
    y, state = attention(q, k, v, window=window, seq=SequenceInfo.packed(lengths))
    parts = zip(*(t.split(lengths, 1) for t in (q, k, v, y)))
    for dq, dk, dv, got in parts:
        want, alone = attention(dq, dk, dv, window=window)
        _same(got, want)
    assert state.length.tolist() == [17]
    held = min(17, state.capacity)
    _same(state.k[:, :held], alone.k[:, :held])


@windows
def test_padding_is_absent(window: int | None) -> None:
    """Left, right, inner and total padding, with and without a state; what stands there, even NaN, moves nothing."""
    q, k, v = _qkv(4, 30)
    real = torch.ones(4, 30, dtype=torch.bool)
    real[0, :11], real[1, 20:], real[2, 5:9], real[3] = False, False, False, False
    for t in (q, k, v):
        t[~real] = torch.nan
    _, start = attention(*_qkv(4, 7), window=window)
    for state in (None, start):
        y, after = attention(q, k, v, window=window, state=state, seq=SequenceInfo(padding_mask=real))
        assert bool((y[~real] == 0).all())
        for row in range(3):
            alone = state and state.reorder(torch.tensor([row]))
            want, own = attention(*(t[row : row + 1, real[row]] for t in (q, k, v)), window=window, state=alone)
            _same(y[row, real[row]], want[0])
            held = min(int(own.length), own.capacity)
            assert int(after.length[row]) == int(own.length)
            _same(after.k[row, :held], own.k[0, :held])
        assert int(after.length[3]) == (7 if state else 0)


def test_padding_sends_no_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(2, 20))
    real = torch.arange(20) >= torch.tensor([[0], [8]])
    with torch.no_grad():
        v[~real] = torch.inf
    y, _ = attention(q, k, v, seq=SequenceInfo(padding_mask=real))
    y.sum().backward()
    for t in (q, k, v):
        assert bool(torch.isfinite(t.grad).all())
        assert bool((t.grad[~real] == 0).all())


def test_given_state_is_left_alone_and_grows() -> None:
    q, k, v = _qkv(2, 30)
    _, state = attention(q[:, :4], k[:, :4], v[:, :4])
    before = state.clone()
    _, after = attention(q[:, 4:], k[:, 4:], v[:, 4:], state=state)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors()))
    assert (state.capacity, after.capacity) == (4, 30)
    _, later = attention(q[:, :1], k[:, :1], v[:, :1], state=after)
    assert later.capacity == 60
    assert later.reserve(10).capacity == 60


def test_step_makes_nothing_as_large_as_its_cache() -> None:
    nheads, capacity = 4, 4096
    q, k, v = (t[:, 0] for t in _qkv(1, 1, nheads, 2, 64, torch.float32))
    state = KVState(torch.zeros(1, capacity, 2, 64), torch.zeros(1, capacity, 2, 64), torch.tensor([capacity - 1]))
    assert _largest(lambda: step(q, k, v, state)) <= nheads * capacity


@windows
def test_step_never_asks_for_a_value(window: int | None) -> None:
    """On the meta device every read of a value on the host is an error, as a wait for the device would be on a GPU."""
    q, k, v = (t[:, 0].to("meta") for t in _qkv(3, 1))
    state = KVState.empty(3, window or 9, 2, 8, dtype=torch.float64, device="meta")
    assert step(q, k, v, state, window=window).shape == (3, 4, 8)
    with pytest.raises(RuntimeError):
        int(state.length.max())


def test_bidirectional_sees_everything() -> None:
    q, k, v = _qkv(2, 33)
    y, _ = attention(q, k, v, causal=False)
    flipped, _ = attention(q.flip(1), k.flip(1), v.flip(1), causal=False)
    _same(flipped.flip(1), y)
    near, _ = attention(q, k, v, causal=False, window=4)
    moved = v.clone()
    moved[:, 20] += 1
    change = (attention(q, k, moved, causal=False, window=4)[0] - near).abs().amax((0, 2, 3))
    assert (change > 0).nonzero()[:, 0].tolist() == list(range(17, 24))


def test_half_precision_keeps_its_dtype_and_its_sums() -> None:
    """4096 equal keys: weights of 1/4096 would be lost in a bfloat16 sum."""
    q, k = torch.zeros(1, 4096, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 4096, 1, 8, dtype=torch.bfloat16)
    v = torch.ones(1, 4096, 1, 8, dtype=torch.bfloat16)
    y, state = attention(q, k, v)
    assert y.dtype == state.k.dtype == torch.bfloat16
    assert bool((y == 1).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 6, 3, 8), "v": torch.zeros(2, 6, 3, 8)}, "divide"),
        ({"k": torch.zeros(2, 5, 2, 8)}, "share batch and seqlen"),
        ({"k": torch.zeros(2, 6, 2, 7)}, "headdim"),
        ({"v": torch.zeros(2, 6, 1, 8)}, "share"),
        ({"q": torch.zeros(2, 6, 32)}, "must be"),
        ({"q": torch.zeros(2, 0, 4, 8), "k": torch.zeros(2, 0, 2, 8), "v": torch.zeros(2, 0, 2, 8)}, "not empty"),
        ({"k": torch.zeros(2, 6, 2, 8, dtype=torch.bfloat16)}, "one floating dtype"),
        ({"v": torch.zeros(2, 6, 2, 8, device="meta")}, "one device"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": 4, "state": KVState.empty(2, 5, 2, 8)}, "a state of that capacity"),
        ({"state": KVState.empty(3, 5, 2, 8)}, "state.k must be"),
        ({"state": KVState.empty(2, 5, 4, 8)}, "state.k must be"),
        ({"state": KVState.empty(2, 5, 2, 8, 9)}, "state.v must be"),
        ({"state": KVState.empty(2, 5, 2, 8, dtype=torch.float64)}, "like k"),
        ({"state": KVState(torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 8), torch.tensor([1]))}, "state.length"),
        ({"state": KVState(torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 8), torch.tensor([6, 1]))}, "dropped keys"),
        ({"causal": False, "state": KVState.empty(2, 5, 2, 8)}, "takes no state"),
        ({"seq": SequenceInfo.packed([6])}, "the inputs are"),
        ({"seq": SequenceInfo(group="ranks")}, "one process"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    good = {"q": torch.zeros(2, 6, 4, 8), "k": torch.zeros(2, 6, 2, 8), "v": torch.zeros(2, 6, 2, 8)}
    attention(**good)
    with pytest.raises(UnsupportedInput, match=message):
        attention(**(good | change))


def test_bad_steps_are_refused() -> None:
    q, k = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    full = KVState(torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8), torch.tensor([3, 0]))
    with pytest.raises(UnsupportedInput, match="full"):
        step(q, k, k, full)
    with pytest.raises(UnsupportedInput, match="capacity"):
        step(q, k, k, full, window=4)
    with pytest.raises(UnsupportedInput, match="of the state"):
        step(q, k[:1], k[:1], full)
    assert full.length.tolist() == [3, 0]


@pytest.mark.parametrize(("fraction", "interleaved"), [(1.0, False), (0.5, False), (1.0, True), (0.25, True)])
def test_rotary_is_complex_multiplication_and_sees_distances(fraction: float, interleaved: bool) -> None:
    rotary = Rotary(16, 100.0, fraction, interleaved, scaling=2.0)
    x = torch.randn(1, 12, 3, 16)
    positions = torch.arange(12)[None]
    width = rotary.width
    got, _ = rotary(positions, x, x)
    head = x[..., :width]
    pairs = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    angle = positions[0, :, None, None] / 2.0 * 100.0 ** (-torch.arange(0, width, 2) / width)
    turned = torch.complex(*pairs) * torch.polar(torch.ones_like(angle), angle)
    pair = (turned.real, turned.imag)
    want = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    torch.testing.assert_close(got, torch.cat([want, x[..., width:]], -1))
    a, b = rotary(positions, x, x + 1)
    c, d = rotary(positions + 1000, x, x + 1)
    scores, shifted = (torch.einsum("blhp,bshp->bhls", *pair) for pair in ((a, b), (c, d)))
    torch.testing.assert_close(scores, shifted, atol=2e-3, rtol=0)


def test_mixer_matches_transformers() -> None:
    """The LLaMA attention of transformers with the same weights: head order, rotation, scale, names."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, rope_theta=500.0)
    config._attn_implementation = "eager"
    theirs = LlamaAttention(config, layer_idx=0)
    ours = build_mixer({"kind": "attention", "nheads": 4, "nheads_kv": 2, "rope_theta": 500.0}, 64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 19, 64)
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(19)[None])
    mask = torch.full((19, 19), -torch.inf).triu(1)[None, None]
    torch.testing.assert_close(ours(x)[0], theirs(x, rotary, mask)[0], atol=1e-6, rtol=1e-5)


def test_mixer_made_on_meta_works_once_filled() -> None:
    """Nothing of the rotation lives in buffers, so loading the parameters restores the whole module."""
    config = {"kind": "attention", "nheads": 4, "qk_norm": True}
    want = build_mixer(config, 32)
    got = build_mixer(config, 32).to("meta")
    got(torch.zeros(1, 3, 32, device="meta"))
    got.load_state_dict(want.state_dict(), assign=True)
    x = torch.randn(1, 9, 32)
    assert torch.equal(got(x)[0], want(x)[0])


def test_mixer_decodes_under_autocast() -> None:
    mixer, x = build_mixer({"kind": "attention", "nheads": 2}, 32), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, mixer.initial_state(2, 10))
        _, state = mixer.step(x[:, 0], state)
    assert state.k.dtype == torch.float32
    torch.testing.assert_close(y.float(), mixer(x)[0], atol=2e-2, rtol=0)


def test_mixer_grows_its_cache_while_decoding() -> None:
    mixer, x = build_mixer({"kind": "attention", "nheads": 2}, 32).double(), torch.randn(1, 50, 32).double()
    want, _ = mixer(x)
    state = mixer.initial_state(1)
    with torch.no_grad():
        for t in range(50):
            y, state = mixer.step(x[:, t], state)
            _same(y, want[:, t])


def test_mixer_traces_as_one_graph() -> None:
    for window in (None, 4):
        mixer = build_mixer({"kind": "attention", "nheads": 2, "window": window}, 32)
        compiled = torch.compile(lambda x, m=mixer: m(x)[0], fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 9, 32)
        torch.testing.assert_close(compiled(x), mixer(x)[0])


def test_a_backend_for_an_op_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="unknown op attenton"), use_backend(attenton="torch"):
        pass


def test_mixer_backend_is_the_one_its_config_pins() -> None:
    pinned = build_mixer({"kind": "attention", "nheads": 2, "backend": "native"}, 32)
    with pytest.raises(BackendUnavailable, match="backend='native' was asked for"):
        pinned(torch.randn(1, 9, 32))
    with use_backend("reference"):
        pinned(torch.randn(1, 9, 32))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "attention", "nheads": 5}, "nheads must divide d_model=32"),
        ({"kind": "attention", "nheads": 4, "nheads_kv": 3}, "nheads_kv must divide nheads=4"),
        ({"kind": "attention", "headdim": 7}, "headdim must divide"),
        ({"kind": "attention", "nheads": 0}, "positive integer"),
        ({"kind": "attention", "nheads": 4, "rotary_fraction": 0.4}, "must be even"),
        ({"kind": "sliding_attention", "nheads": 4, "window": None}, "positive integer"),
        ({"kind": "sliding_attention", "nheads": 4, "window": 0}, "positive integer"),
    ],
)
def test_bad_configs_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_mixer(config, 32)


def test_bidirectional_mixer_refuses_states() -> None:
    mixer = build_mixer({"kind": "attention", "nheads": 2, "causal": False, "rotary": False}, 32)
    x = torch.randn(1, 9, 32)
    torch.testing.assert_close(mixer(x.flip(1))[0].flip(1), mixer(x)[0])
    with pytest.raises(UnsupportedInput, match="takes no state"):
        mixer(x, mixer.initial_state(1, 9))
    with pytest.raises(UnsupportedInput, match="token by token"):
        mixer.step(x[:, 0], mixer.initial_state(1, 9))
