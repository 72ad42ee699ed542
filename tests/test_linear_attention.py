"""What linear attention promises beyond the equivalence grid: its relatives, its laws, its refusals."""

from __future__ import annotations

import math

import pytest
import torch

from seqlib import explain, native
from seqlib.errors import UnsupportedInput
from seqlib.ops import linear_attention, selective_scan
from seqlib.ops.linear_attention import combine, step, summarize, torch_impl
from seqlib.sequence import SequenceInfo

KINDS = ("none", "head", "token", "channel")
B, L, H, N, P = 2, 70, 4, 6, 5


def draw(kind: str, seqlen: int = L, dtype: torch.dtype = torch.float64, batch: int = B):
    q, k = torch.randn(2, batch, seqlen, H, N, dtype=dtype)
    v = torch.randn(batch, seqlen, H, P, dtype=dtype)
    shapes = {"head": (H,), "token": (batch, seqlen, H), "channel": (batch, seqlen, H, N)}
    g = -torch.rand(shapes[kind], dtype=dtype) if kind in shapes else None
    return q, k, v, g


def part(g: torch.Tensor | None, begin: int, end: int) -> torch.Tensor | None:
    return g if g is None or g.dim() == 1 else g[:, begin:end]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_mamba2_is_linear_attention() -> None:
    """SSD with A repeated over a head's channels: q = C, k = B, v = x dt, log_decay = A dt."""
    groups = 2
    x = torch.randn(B, L, H, P, dtype=torch.float64)
    dt = torch.rand(B, L, H, dtype=torch.float64)
    A = -torch.rand(H, dtype=torch.float64) - 0.1
    k, q = torch.randn(2, B, L, groups, N, dtype=torch.float64)
    state = torch.randn(B, H, N, P, dtype=torch.float64)
    y, final = linear_attention(q, k, x * dt[..., None], A * dt, initial_state=state)
    repeated = (A.repeat_interleave(P)[:, None].expand(-1, N), k, q)
    wide = dt.repeat_interleave(P, 2)
    want, want_final = selective_scan(
        x.flatten(2), wide, *repeated, initial_state=state.transpose(2, 3).reshape(B, H * P, N)
    )
    close(y.flatten(2), want)
    close(final.transpose(2, 3).reshape(B, H * P, N), want_final)


@pytest.mark.parametrize("rates", ["lightning", "retnet"])
def test_constant_decays_by_the_quadratic_formula(rates: str) -> None:
    slopes = {"lightning": [2 ** (-8 * (h + 1) / H) for h in range(H)]}
    log_decay = torch.tensor(slopes.get(rates, [-math.log(1 - 2 ** (-5 - h)) for h in range(H)])).double().neg()
    q, k, v, _ = draw("none")
    distance = torch.arange(L)[:, None] - torch.arange(L)
    mask = torch.exp(log_decay[:, None, None] * distance.clamp(min=0)) * (distance >= 0)
    want = torch.einsum("blhn,bshn,hls,bshp->blhp", q, k, mask, v)
    close(linear_attention(q, k, v, log_decay)[0], want)
    per_token = log_decay.expand(B, L, H)
    close(linear_attention(q, k, v, per_token)[0], want)
    close(linear_attention(q, k, v, per_token[..., None].expand(B, L, H, N))[0], want)


def test_states_hold_the_last_token_undecayed() -> None:
    """The other published convention decays once more per step: its state is exp(log_decay) times ours."""
    q, k, v, g = draw("head")
    _, state = linear_attention(q, k, v, g)
    other = torch.zeros_like(state)
    for t in range(L):
        other = torch.exp(g)[:, None, None] * (other + k[:, t, ..., None] * v[:, t, :, None])
    close(other, torch.exp(g)[:, None, None] * state)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_decay_gradient_is_read_off_q_and_k(kind: str) -> None:
    """dlog_decay_t = sum_{s>=t} (q_s dq_s - k_s dk_s) + <S, dS>, with states and gradients at both ends."""
    q, k, v, g = (t.requires_grad_() for t in draw(kind))
    state = torch.randn(B, H, N, P, dtype=torch.float64)
    y, final = linear_attention(q, k, v, g, initial_state=state, backend="reference")
    dfinal = torch.randn_like(final)
    dq, dk, dg = torch.autograd.grad([y, final], [q, k, g], [torch.randn_like(y), dfinal])
    terms, kept = q * dq - k * dk, (final * dfinal).sum(-1)
    if kind == "token":
        terms, kept = terms.sum(-1), kept.sum(-1)
    close(terms.flip(1).cumsum(1).flip(1) + kept[:, None], dg)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 16, 63, 64, 69])
def test_split_invariance(kind: str, cut: int) -> None:
    q, k, v, g = draw(kind)
    y, final = linear_attention(q, k, v, g)
    left, state = linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], part(g, 0, cut))
    before = state.clone()
    right, state = linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], part(g, cut, L), initial_state=state)
    close(torch.cat([left, right], 1), y)
    close(state, final)
    again = linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], part(g, cut, L), initial_state=before)[0]
    close(again, right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_sequence(kind: str, dtype: torch.dtype) -> None:
    q, k, v, g = (None if t is None else t.to(dtype) for t in draw(kind))
    q, k = q[:, :, :2], k[:, :, :1]
    y, final = linear_attention(q, k, v, g, scale=0.5)
    state = torch.zeros_like(final)
    for t in range(L):
        g_t = g if g is None or g.dim() == 1 else g[:, t]
        y_t = step(q[:, t], k[:, t], v[:, t], g_t, state, scale=0.5)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
        close(y_t, y[:, t], tolerance)
    close(state, final, 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate(kind: str) -> None:
    lengths = [3, 1, 40, 26]
    q, k, v, g = draw(kind, batch=1)
    y, final = linear_attention(q, k, v, g, seq=SequenceInfo.packed(lengths))
    begin = 0
    for n in lengths:
        s = slice(begin, begin + n)
        alone, state = linear_attention(q[:, s], k[:, s], v[:, s], part(g, begin, begin + n))
        close(y[:, s], alone)
        begin += n
    close(final, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_absent(kind: str, side: str) -> None:
    q, k, v, g = draw(kind)
    state = torch.randn(B, H, N, P, dtype=torch.float64)
    mask = torch.ones(B, L, dtype=torch.bool)
    real = slice(9, L) if side == "left" else slice(0, L - 9)
    mask[1] = False
    mask[1, real] = True
    y, final = linear_attention(q, k, v, g, initial_state=state, seq=SequenceInfo(padding_mask=mask))
    one = None if g is None else g if g.dim() == 1 else g[1:, real]
    alone, alone_final = linear_attention(q[1:, real], k[1:, real], v[1:, real], one, initial_state=state[1:])
    close(y[1:, real], alone)
    close(final[1:], alone_final)
    assert not y[1, ~mask[1]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_long_inputs_go_through_segments(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments give what one gives, gradients included, with documents across their borders."""
    starts = torch.zeros(B, L, dtype=torch.bool)
    starts[0, [7, 64, 65]] = starts[1, 0] = True
    inputs = [t.requires_grad_() if t is not None else None for t in draw(kind)]
    leaves = [t for t in inputs if t is not None]
    state = torch.randn(B, H, N, P, dtype=torch.float64, requires_grad=True)

    def run() -> list[torch.Tensor]:
        y, final = linear_attention(*inputs, initial_state=state, seq=SequenceInfo(starts=starts), backend="torch")
        grads = torch.autograd.grad([y.sin().sum() + final.sin().sum()], [*leaves, state])
        return [y, final, *grads]

    whole = run()
    monkeypatch.setattr(torch_impl, "SEGMENT", 1)
    monkeypatch.setattr(torch_impl, "CHUNK", 16)
    for a, b in zip(run(), whole):
        close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_summaries_give_the_state(kind: str, packed: bool) -> None:
    q, k, v, g = draw(kind, batch=1)
    seq = SequenceInfo.packed([30, 40], continues=True) if packed else None
    state = torch.randn(1, H, N, P, dtype=torch.float64)
    decay, added = summarize(k, v, g, seq=seq)
    close(decay[..., None] * state + added, linear_attention(q, k, v, g, initial_state=state, seq=seq)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_combine_is_associative_and_joins_spans(kind: str) -> None:
    _, k, v, g = draw(kind)
    spans = [(0, 13), (13, 14), (14, L)]
    a, b, c = (summarize(k[:, i:j], v[:, i:j], part(g, i, j)) for i, j in spans)
    whole = summarize(k, v, g)
    for joined in (combine(combine(a, b), c), combine(a, combine(b, c))):
        for got, want in zip(joined, whole):
            close(got, want)
    identity = (torch.ones_like(a[0]), torch.zeros_like(a[1]))
    for joined in (combine(identity, a), combine(a, identity)):
        for got, want in zip(joined, a):
            close(got, want)


@pytest.mark.parametrize("kind", ["head", "token", "channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_decay_of_zero_forgets(kind: str, dtype: torch.dtype) -> None:
    """log_decay may be -inf, and what it forgets leaves no trace."""
    q, k, v, g = draw(kind, dtype=dtype)
    g[..., ::3] = -math.inf
    got = linear_attention(q, k, v, g)
    for a, b in zip(got, linear_attention(q, k, v, g, backend="reference")):
        close(a, b, 1e-10 if dtype == torch.float64 else 1e-4)
    close(summarize(k, v, g)[1], got[1], 1e-10 if dtype == torch.float64 else 1e-4)


def test_refusals_name_the_remedy() -> None:
    q, k, v, g = draw("token")
    with pytest.raises(UnsupportedInput, match="at most 0"):
        linear_attention(q, k, v, torch.tensor([0.1, 0, 0, 0]))
    with pytest.raises(UnsupportedInput, match="at most 0"):
        linear_attention(q, k, v, -g, backend="reference")
    with pytest.raises(UnsupportedInput, match="not defined"):
        linear_attention(q, k, v, g, causal=False)
    with pytest.raises(UnsupportedInput, match="initial_state"):
        linear_attention(q, k, v, causal=False, initial_state=torch.zeros(B, H, N, P))
    with pytest.raises(UnsupportedInput, match="dividing nheads"):
        linear_attention(q[:, :, :3], k, v)
    with pytest.raises(UnsupportedInput, match="one real float dtype"):
        linear_attention(q.float(), k, v)
    with pytest.raises(UnsupportedInput, match="log_decay must be"):
        linear_attention(q, k, v, g[:, :1])
    with pytest.raises(UnsupportedInput, match="the state must be"):
        linear_attention(q, k, v, initial_state=torch.zeros(B, H, P, N))
    with pytest.raises(UnsupportedInput, match="updated in place"):
        step(q[:, 0], k[:, 0], v[:, 0], None, torch.zeros(B, H, N, P))


needs_native = pytest.mark.skipif(native.why_unavailable("cpu") is not None, reason="needs the compiled library")


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("kind", ["token", "channel"])
def test_native_is_deterministic_and_alike_for_any_number_of_threads(kind: str) -> None:
    inputs = [None if t is None else t.float().requires_grad_() for t in draw(kind, 200, batch=1)]
    inputs[2] = torch.randn(1, 200, H, 130, requires_grad=True)  # wide heads are split when threads are many

    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        y, state = linear_attention(*inputs, backend="native")
        return [y, state, *torch.autograd.grad(y.sin().sum() + state.sin().sum(), inputs)]

    before = torch.get_num_threads()
    try:
        first = run(1)
        for threads in (1, 2, 16):
            assert all(torch.equal(a, b) for a, b in zip(run(threads), first)), threads
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("kind", ["token", "channel"])
@pytest.mark.parametrize("sizes", [(64, 64), (80, 40), (260, 130)])
def test_native_long_spans_use_their_checkpoints(sizes: tuple[int, int], kind: str) -> None:
    """Spans longer than the distance of checkpoints, for each distance, against the torch form in float64."""
    n, p = sizes
    q, k = torch.randn(2, 2, 700, 1, n, dtype=torch.float64) / n**0.5
    v = torch.randn(2, 700, 1, p, dtype=torch.float64)
    g = -0.1 * torch.rand(2, 700, 1, *((n,) if kind == "channel" else ()), dtype=torch.float64)
    starts = torch.zeros(2, 700, dtype=torch.bool)
    starts[0, 620] = True

    def run(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v, g)]
        y, state = linear_attention(*inputs, seq=SequenceInfo(starts=starts), backend=backend)
        return [y, state, *torch.autograd.grad(y.sin().sum() + state.sin().sum(), inputs)]

    for got, want in zip(run(torch.float32, "native"), run(torch.float64, "torch")):
        got, want = got.detach(), want.detach()
        assert float((got - want).abs().max()) < 2e-5 * float(want.abs().max())


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_native_rounding_of_weak_decays_does_not_add_up(kind: str) -> None:
    """exp(-1e-4) rounded to float32 and applied 20000 times is wrong by 4e-4; sums of a chunk are rounded once."""
    tokens = 20000
    shape = {"head": (1,), "token": (1, tokens, 1), "channel": (1, tokens, 1, 4)}[kind]
    q, v = torch.zeros(1, tokens, 1, 4), torch.zeros(1, tokens, 1, 2)
    state = torch.ones(1, 1, 4, 2)
    final = linear_attention(q, q, v, torch.full(shape, -1e-4), initial_state=state, backend="native")[1]
    assert float((final * math.exp(1e-4 * tokens) - 1).abs().max()) < 2e-5


@needs_native
@pytest.mark.native
def test_native_reads_strided_inputs_in_place() -> None:
    """Slices of one projection, and gradients that are expanded scalars."""
    x = torch.randn(B, L, H * (2 * N + P), requires_grad=True)
    g = -torch.rand(B, L, H)

    def run(backend: str) -> list[torch.Tensor]:
        q, k, v = (t.unflatten(-1, (H, -1)) for t in x.split([H * N, H * N, H * P], -1))
        y, _ = linear_attention(q, k, v, g, backend=backend)
        return [y, *torch.autograd.grad(y.sum(), [x])]

    for got, want in zip(run("native"), run("torch")):
        close(got, want, 1e-4)


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("kind", ["none", "head", "token", "channel"])
def test_native_schemas_are_sound(kind: str) -> None:
    q, k, v, g = (None if t is None else t.float().requires_grad_() for t in draw(kind, 20))
    linear_attention(q, k, v, g, backend="native")
    call = torch.ops.seqlib.linear_attention.default
    torch.library.opcheck(call, (q, k, v, g, None, None, 1.0, True))
    spans = SequenceInfo.packed([7, 13]).spans
    torch.library.opcheck(
        call, (*(t if t is None or t.dim() == 1 else t[:1] for t in (q, k, v, g)), None, spans, 1.0, True)
    )


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("kind", ["none", "token", "channel"])
def test_native_compiles_whole(kind: str) -> None:
    q, k, v, g = (None if t is None else t.float().requires_grad_() for t in draw(kind, 20))
    leaves = [t for t in (q, k, v, g) if t is not None]

    def loss(q, k, v, g):
        y, state = linear_attention(q, k, v, g)
        return y.sin().sum() + state.sum()

    want = torch.autograd.grad(loss(q, k, v, g), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k, v, g), leaves)
    for a, b in zip(got, want):
        close(a, b, 1e-5)


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_native_step_equals_torch(kind: str, dtype: torch.dtype) -> None:
    headdim = 70
    q, k, _, g = (None if t is None else t.to(dtype) for t in draw(kind, 1))
    q, k, v, g = (
        q[:, 0, :2],
        k[:, 0],
        torch.randn(B, H, headdim, dtype=dtype),
        g if g is None or g.dim() == 1 else g[:, 0],
    )
    state = torch.randn(B, H, N, headdim)
    states = [state, state.clone()]
    ys = [step(q, k, v, g, s, scale=0.5, backend=b) for s, b in zip(states, ("native", "torch"))]
    close(*states, 1e-5)
    close(*ys, 1e-5 if dtype == torch.float32 else 2e-2)


@needs_native
@pytest.mark.native
def test_explain_names_the_instruction_set() -> None:
    """Whether 16-bit numbers are multiplied as such is not hidden."""
    before = torch.ops.seqlib.isa(None)
    q, k, v, g = (t.bfloat16() for t in draw("token"))
    try:
        torch.ops.seqlib.isa("portable")
        assert "runs, loops for portable" in explain("linear_attention", q, k, v, g)
    finally:
        torch.ops.seqlib.isa(before)
