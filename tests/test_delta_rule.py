"""Laws of delta_rule and of its decoding step that the case grid does not state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqlib import native
from seqlib.errors import BackendUnavailable, UnsupportedInput
from seqlib.ops import delta_rule
from seqlib.ops.delta_rule import combine, step, summarize
from seqlib.sequence import SequenceInfo

KINDS = ("none", "token", "channel")
BACKENDS = ("reference", "torch", "native")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _native(request: pytest.FixtureRequest) -> None:
    wants = getattr(request.node, "callspec", None)
    if wants and wants.params.get("backend") == "native" and native.why_unavailable():
        pytest.skip(f"no native library: {native.why_unavailable()}")


def _draw(
    kind: str,
    batch: int = 2,
    seqlen: int = 81,
    nheads: int = 2,
    d_state: int = 18,
    headdim: int = 9,
    dtype=torch.float64,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    made: dict[str, Any] = {name: draw(batch, seqlen, nheads, d_state) for name in "qk"}
    made["k"] = made["k"] / made["k"].norm(dim=-1, keepdim=True)
    made["v"] = draw(batch, seqlen, nheads, headdim)
    made["beta"] = 2 * torch.rand(batch, seqlen, nheads, generator=g, dtype=torch.float64)
    shape = {"none": None, "token": (batch, seqlen, nheads), "channel": (batch, seqlen, nheads, d_state)}[kind]
    made["log_decay"] = None if shape is None else -draw(*shape).abs()
    made["initial_state"] = draw(batch, nheads, d_state, headdim)
    return {k: v if v is None else v.to(dtype) for k, v in made.items()}


def _dtype(backend: str) -> torch.dtype:
    return torch.float32 if backend == "native" else torch.float64


def _part(t: dict[str, Any], where: Any, **changed: Any) -> dict[str, Any]:
    """The call on some positions; states stay whole."""
    return {k: v if v is None or k == "initial_state" else v[:, where] for k, v in t.items()} | changed


def _assert_close(got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(64, 17), (1, 79, 1), (33, 16, 32)])
def test_split_invariance(kind: str, backend: str, sizes: tuple[int, ...]) -> None:
    """Outputs, final state and gradients do not depend on where a sequence is cut."""
    t = _draw(kind, dtype=_dtype(backend))
    leaves = [v.requires_grad_() for v in t.values() if v is not None]
    y, final = delta_rule(**t, backend=backend)
    state, parts, begin = t["initial_state"], [], 0
    for size in sizes:
        span = slice(begin, begin + size)
        part, state = delta_rule(**_part(t, span, initial_state=state), backend=backend)
        parts.append(part)
        begin += size
    split = torch.cat(parts, 1)
    _assert_close(split, y)
    _assert_close(state, final)
    ways = torch.randn_like(y), torch.randn_like(final)
    got, want = (
        torch.autograd.grad((out * ways[0]).sum() + (last * ways[1]).sum(), leaves)
        for out, last in ((split, state), (y, final))
    )
    for g, w in zip(got, want):
        _assert_close(g / w.abs().max(), w / w.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("continues", [False, True])
def test_packed_equals_separate(kind: str, backend: str, continues: bool) -> None:
    """Documents in one row are each computed alone; the first may go on from the state."""
    lengths = [3, 1, 1, 63, 13]
    t = _draw(kind, batch=1, dtype=_dtype(backend))
    y, final = delta_rule(**t, backend=backend, seq=SequenceInfo.packed(lengths, continues=continues))
    begin, state = 0, None
    for i, length in enumerate(lengths):
        goes_on = t["initial_state"] if continues and i == 0 else None
        part, state = delta_rule(**_part(t, slice(begin, begin + length), initial_state=goes_on), backend=backend)
        _assert_close(y[:, begin : begin + length], part)
        begin += length
    _assert_close(final, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["left", "right", "inside", "everywhere"])
def test_padding_is_absence(kind: str, backend: str, where: str) -> None:
    t = _draw(kind, dtype=_dtype(backend))
    mask = torch.ones(2, 81, dtype=torch.bool)
    hidden = {"left": slice(0, 9), "right": slice(60, 81), "inside": slice(17, 70), "everywhere": slice(0, 81)}
    mask[1, hidden[where]] = False
    garbage = {k: v if v is None or k == "initial_state" else v.clone() for k, v in t.items()}
    for name, value in garbage.items():
        if value is not None and name != "initial_state":
            value[~mask] = torch.nan
    y, final = delta_rule(**garbage, backend=backend, seq=SequenceInfo(padding_mask=mask))
    assert not y[~mask].any()
    for row in range(2):
        own = {k: v if v is None else v[row : row + 1] for k, v in t.items()}
        if not mask[row].any():
            assert torch.equal(final[row], t["initial_state"][row])
            continue
        want, last = delta_rule(**_part(own, mask[row]), backend=backend)
        _assert_close(y[row, mask[row]][None], want)
        _assert_close(final[row : row + 1], last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.bfloat16), ("native", torch.float32), ("native", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("headdim", [9, 100])
def test_step_loop_equals_forward(kind: str, backend: str, dtype: torch.dtype, headdim: int) -> None:
    t = _draw(kind, seqlen=20, nheads=4, headdim=headdim, dtype=dtype)
    t["q"], t["k"] = t["q"][:, :, :2], t["k"][:, :, :1]
    t["initial_state"] = t["initial_state"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    y, final = delta_rule(**t, scale=0.3, backend=backend)
    state = t["initial_state"].clone()
    names = ("q", "k", "v", "beta", "log_decay")
    ys = [
        step(*(None if t[n] is None else t[n][:, i] for n in names), state, scale=0.3, backend=backend)
        for i in range(20)
    ]
    _assert_close(torch.stack(ys, 1), y)
    _assert_close(state, final)


@pytest.mark.parametrize("kind", KINDS)
def test_future_does_not_reach_the_past(kind: str) -> None:
    t = _draw(kind)
    y, _ = delta_rule(**t)
    later = {k: v if v is None or k == "initial_state" else v.clone() for k, v in t.items()}
    for name in ("q", "k", "v", "beta"):
        later[name][:, 50:] *= 0.5
    changed, _ = delta_rule(**later)
    assert torch.equal(changed[:, :50], y[:, :50]) and not torch.equal(changed[:, 50:], y[:, 50:])


@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal_keys_are_linear_attention(kind: str) -> None:
    """Keys that have nothing to correct make it a decaying sum of beta k v^T."""
    t = _draw(kind, seqlen=16, d_state=16)
    t["k"] = torch.eye(16, dtype=torch.float64).view(1, 16, 1, 16).expand(2, 16, 2, 16)
    y, _ = delta_rule(**{**t, "initial_state": None})
    G = torch.zeros(2, 16, 2, 16, dtype=torch.float64)
    if t["log_decay"] is not None:
        G = G + (t["log_decay"] if kind == "channel" else t["log_decay"].unsqueeze(-1)).cumsum(1)
    pairs = (G[:, :, None] - G[:, None]).exp()  # b t s h n
    scores = torch.einsum("bthn,bshn,btshn->bths", t["q"], t["k"], pairs)
    scores = scores * torch.ones(16, 16).tril().to(scores)[:, None]
    _assert_close(y, torch.einsum("bths,bsh,bshp->bthp", scores, t["beta"], t["v"]))


def test_beta_one_stores_the_value_and_beta_two_reflects() -> None:
    t = _draw("none", seqlen=1, nheads=1)
    k, S, v = t["k"][:, 0, 0], t["initial_state"][:, 0], t["v"][:, 0, 0]
    for beta in (1.0, 2.0):
        _, final = delta_rule(**{**t, "beta": torch.full_like(t["beta"], beta)})
        before, after = (torch.einsum("bn,bnp->bp", k, s) for s in (S, final[:, 0]))
        _assert_close(after, v if beta == 1 else 2 * v - before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("log_decay", "y", "state"),
    [
        (None, [[0.316228, 0.632456], [0.158114, 0.632456], [1.60328, 2.427051], [4.875506, 5.746118]],
         [[-7, -8], [1.417705, 2.17082]]),
        ([0.9, 0.8, 0.7, 0.6],
         [[0.316228, 0.632456], [0.031623, 0.379473], [1.231533, 1.767411], [4.668815, 5.397707]],
         [[-7, -8], [0.764087, 1.069047]]),
        ([[0.9, 0.5], [0.8, 0.6], [0.7, 0.7], [0.6, 0.8]],
         [[0.316228, 0.632456], [-0.082219, 0.151789], [1.17675, 1.657843], [4.727973, 5.467628]],
         [[-7, -8], [0.951164, 1.290158]]),
    ],
    ids=KINDS,
)  # fmt: skip
def test_known_vectors(backend: str, log_decay: list | None, y: list, state: list) -> None:
    """Four tokens whose outputs were computed apart from this library, to six digits."""

    def heads(rows: list) -> Tensor:
        return torch.tensor(rows, dtype=_dtype(backend))[None, :, None]

    q, k = heads([[1, 0], [0, 1], [1, 1], [-1, 0.5]]), heads([[0.5, 1], [1, -0.5], [0, 2], [-1, 0]])
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
    v, beta = heads([[1, 2], [3, 4], [5, 6], [7, 8]]), heads([1, 0.5, 0.25, 1])
    decay = None if log_decay is None else heads(log_decay).log()
    got, final = delta_rule(q, k, v, beta, decay, scale=2**-0.5, backend=backend)
    _assert_close(got, heads(y), 1e-6)
    _assert_close(final[0, 0], torch.tensor(state, dtype=_dtype(backend)), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "seq", [None, SequenceInfo.packed([30, 51], continues=True), "padded"], ids=["alone", "packed", "padded"]
)
def test_summaries_give_the_state(kind: str, seq: Any) -> None:
    """transition S + state is the final state from S, whatever q is; a document start leaves nothing of S."""
    t = _draw(kind, batch=1)
    if seq == "padded":
        seq = SequenceInfo(padding_mask=torch.arange(81)[None] >= 9)
    given = {name: t[name] for name in ("k", "v", "beta", "log_decay")}
    transition, state = summarize(**given, seq=seq)
    _assert_close(transition @ t["initial_state"] + state, delta_rule(**t, seq=seq)[1])
    if seq is not None and seq.starts is not None:
        assert not transition.any()


@pytest.mark.parametrize("kind", KINDS)
def test_combine_is_associative_and_joins_spans(kind: str) -> None:
    t = _draw(kind)
    t.pop("initial_state")
    t.pop("q")
    a, b, c = (summarize(**_part(t, slice(*span))) for span in ((0, 30), (30, 31), (31, 81)))
    identity = (torch.eye(18, dtype=torch.float64).expand_as(a[0]), torch.zeros_like(a[1]))
    for joined in (combine(combine(a, b), c), combine(a, combine(b, c)), combine(identity, summarize(**t))):
        for got, want in zip(joined, summarize(**t)):
            _assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(kind: str, packed: bool) -> None:
    t = {k: v if v is None else v.requires_grad_() for k, v in _draw(kind, 1, 9, 2, 3, 2).items()}
    names = [k for k, v in t.items() if v is not None]
    seq = SequenceInfo.packed([2, 7], continues=True) if packed else None

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule(**{**t, **dict(zip(names, tensors))}, seq=seq, chunk_size=4, backend="torch")

    assert torch.autograd.gradcheck(run, [t[k] for k in names])


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_decay_forgets_without_losing_what_follows(kind: str, backend: str) -> None:
    """A reset by a huge decay leaves the digits of small decays after it alone, in float32."""
    t = _draw(kind, batch=1, seqlen=60)
    t["log_decay"] = t["log_decay"] * 0.01
    t["log_decay"][:, 20:40] = -1e5
    want, last = delta_rule(**t, backend="reference")
    y, final = delta_rule(**{k: v.float() for k, v in t.items()}, backend=backend)
    _assert_close(y.double(), want, 1e-5)
    _assert_close(final.double(), last, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seq", [None, SequenceInfo(padding_mask=torch.zeros(2, 81, dtype=torch.bool))], ids=str)
def test_inputs_are_not_modified_and_the_state_is_no_view(backend: str, seq: SequenceInfo | None) -> None:
    t = _draw("channel", dtype=_dtype(backend))
    before = {k: v.clone() for k, v in t.items()}
    _, final = delta_rule(**t, backend=backend, seq=seq)
    final.zero_()
    assert all(torch.equal(t[k], before[k]) for k in t)


@pytest.mark.parametrize("backend", ["native"])
@pytest.mark.parametrize("kind", KINDS)
def test_native_results_do_not_depend_on_threads(backend: str, kind: str) -> None:
    """Threads share heads, or the columns of one head, without changing a bit."""

    def run(nheads: int) -> list[Tensor]:
        t = {k: v if v is None else v.requires_grad_() for k, v in _draw(kind, 1, 300, nheads, 20, 130).items()}
        t = {k: v if v is None else v.float() for k, v in t.items()}
        y, final = delta_rule(**t, backend=backend)
        leaves = [v for v in t.values() if v is not None]
        return [y, final, *torch.autograd.grad(y.square().sum() + final.sum(), leaves)]

    before = torch.get_num_threads()
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(run(1) + run(4))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made))


@pytest.mark.parametrize("backend", ["native"])
def test_native_reads_any_strides(backend: str) -> None:
    """Heads first, and slices of one wider projection."""
    t = _draw("channel", d_state=9, dtype=torch.float32)
    want = delta_rule(**t, backend=backend)
    names = ("q", "k", "v")
    heads_first = {n: t[n].transpose(1, 2).contiguous().transpose(1, 2) for n in names}
    joined = dict(zip(names, torch.cat([t[n] for n in names], -1).split(9, -1)))
    width_first = {n: t[n].transpose(1, 3).contiguous().transpose(1, 3) for n in names}
    for given in (heads_first, joined, width_first):
        assert not given["v"].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(delta_rule(**{**t, **given}, backend=backend), want))


@pytest.mark.parametrize("backend", ["native"])
def test_native_schemas(backend: str) -> None:
    t = _draw("token", 2, 70, 2, 5, 3, torch.float32)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :2] = False
    ops = torch.ops.seqlib
    leaves = [v.requires_grad_() for v in t.values()]
    torch.library.opcheck(ops.delta_rule.default, (*leaves, None, 0.5, True))
    plain = [v.detach() for v in leaves]
    spans = SequenceInfo(padding_mask=mask).spans
    torch.library.opcheck(ops.delta_rule.default, (*plain[:4], None, None, spans, 0.5, False))
    y, final, saved = ops.delta_rule.default(*plain, spans, 0.5, True)
    torch.library.opcheck(ops.delta_rule_bwd.default, (y, final, saved, *plain, spans, 0.5))
    torch.library.opcheck(ops.delta_rule_step.default, (*(v[:, 0] for v in plain[:5]), plain[5], 0.5))


def test_bad_input_says_what_to_do() -> None:
    t = _draw("token", dtype=torch.float32)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"v": t["v"][0]}, r"v must be \(batch, seqlen"),
        ({"q": t["q"][:, :, :, :3]}, r"q must have shape \(2, 81, 2, 18\)"),
        ({"k": t["k"].repeat(1, 1, 2, 1)}, "dividing nheads=2"),
        ({"k": t["k"].double()}, "share one real float dtype"),
        ({"beta": t["beta"][..., None]}, r"beta must be real with shape \(2, 81, 2\)"),
        ({"beta": t["beta"].long()}, "beta must be real"),
        ({"log_decay": t["log_decay"][0]}, r"\(2, 81, 2\) or \(2, 81, 2, 18\)"),
        ({"initial_state": t["initial_state"].transpose(2, 3)}, r"\(2, 2, 18, 9\)"),
        ({"beta": t["beta"].to("meta")}, "device of v"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"seq": SequenceInfo.packed([81])}, r"\(1, 81\)"),
    ]
    for changed, message in bad:
        with pytest.raises(UnsupportedInput, match=message):
            delta_rule(**{**t, **changed})
    one = {k: v if k == "initial_state" else v[:, 0] for k, v in t.items()}
    state = one.pop("initial_state")
    with pytest.raises(UnsupportedInput, match="contiguous"):
        step(**one, state=state.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(UnsupportedInput, match=r"v must have shape \(batch, nheads, headdim\)"):
        step(**{**one, "v": t["v"]}, state=state)


def test_wide_states_run_in_torch() -> None:
    t = _draw("none", 1, 3, 1, 300, 4, torch.float32)
    with pytest.raises(BackendUnavailable, match="d_state is 300; it takes up to 256"):
        delta_rule(**t, backend="native")
    _assert_close(delta_rule(**t)[0], delta_rule(**t, backend="reference")[0])
