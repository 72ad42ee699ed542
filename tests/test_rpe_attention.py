"""Claims of kernelized attention with relative positions beyond the grid: formula, forms, decoding, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_attention import _largest
from torch import Tensor

from seqlib.dispatch import resolve
from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.feature_maps import positive_random, random_directions_
from seqlib.mixers import build_mixer
from seqlib.ops import linear_attention, rpe_attention
from seqlib.ops.attention import KVState
from seqlib.ops.rpe_attention import OP, ExponentialState, WindowState, facts, fit_exponentials, step
from seqlib.sequence import SequenceInfo

forms = pytest.mark.parametrize("form", ["chunked", "parallel", "reference"])


def _inputs(seqlen: int, window: int, n: int = 4, dtype=torch.float64) -> list[Tensor]:
    q, k = (torch.rand(2, seqlen, 3, n, dtype=dtype) + 0.1 for _ in range(2))
    return [q, k, torch.randn(2, seqlen, 3, 5, dtype=dtype), torch.randn(3, window, dtype=dtype)]


def _close(got: Tensor, want: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@forms
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_published_formula(form: str, causal: bool) -> None:
    q, k, v, bias = _inputs(29, 29 if causal else 57)
    distance = torch.arange(29)[:, None] - torch.arange(29)
    table = bias.exp()[:, distance + 28 if not causal else distance.clamp(min=0)]
    weights = torch.einsum("blhn,bshn->bhls", q, k) * (table.tril() if causal else table)
    want = torch.einsum("bhls,bshp->blhp", weights / weights.sum(-1, keepdim=True), v)
    _close(rpe_attention(q, k, v, bias, causal=causal, form=form)[0], want)


@forms
def test_one_exponential_is_lightning_attention(form: str) -> None:
    """A bias that falls linearly with the distance is a constant decay, normalised."""
    q, k, v, _ = _inputs(40, 40)
    log_decay = -torch.tensor([0.5, 0.1, 0.02], dtype=torch.float64)
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    sums, _ = linear_attention(q, k, ones, log_decay)
    got, _ = rpe_attention(q, k, v, log_decay[:, None] * torch.arange(24), form=form)
    _close(got[:, :24], (sums[..., :-1] / sums[..., -1:])[:, :24])  # beyond the window nothing is seen


@forms
def test_a_constant_on_the_bias_changes_nothing(form: str) -> None:
    q, k, v, bias = _inputs(20, 9)
    want, _ = rpe_attention(q, k, v, bias)
    _close(rpe_attention(q, k, v, bias + 1000, form=form)[0], want)
    _close(rpe_attention(q, k, v, bias[:, :1], form=form)[0], v)  # a window of one token


def test_transforms_do_not_lose_small_weights() -> None:
    """Row 0 sees one token of the smallest weight that counts, e^-16; in float32 transforms its sum would be noise."""
    q, k, v, bias = _inputs(3000, 3000, dtype=torch.float32)
    bias = torch.cat([torch.full((3, 1), -16.0), torch.zeros(3, 2999)], 1)
    want, _ = rpe_attention(*(t.double() for t in (q, k, v, bias)), form="chunked")
    got, _ = rpe_attention(q, k, v, bias, form="parallel")
    _close(got.double(), want, 1e-4)


def test_auto_takes_transforms_where_they_are_faster() -> None:
    def form(seqlen: int, window: int, width: int) -> str:
        shape = (1, seqlen, 1, width)
        q, bias = torch.empty(shape, device="meta"), torch.empty(1, window, device="meta")
        return resolve(OP, facts(q, q, q, bias)).impl.form

    assert [form(n, n, 16) for n in (1024, 4096, 16384)] == ["chunked", "chunked", "parallel"]
    assert form(16384, 512, 16) == form(65536, 65536, 64) == "chunked"
    assert form(1 << 18, 1 << 18, 64) == "parallel"


@pytest.mark.parametrize("form", ["chunked", "parallel"])
def test_gradients_take_linear_memory(form: str) -> None:
    seqlen = 4096
    inputs = [t[:1].requires_grad_() for t in _inputs(seqlen, seqlen, dtype=torch.float32)[:3]]
    bias = torch.zeros(3, seqlen, requires_grad=True)
    held = 0

    def count(t: Tensor) -> Tensor:
        nonlocal held
        held += t.numel()
        return t

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            y, _ = rpe_attention(*inputs, bias, form=form)
        y.sum().backward()

    assert _largest(run) <= 3 * seqlen * seqlen // 16
    assert held <= 3 * seqlen * 500


@pytest.mark.parametrize("kind", ["window", "exponentials", "bidirectional"])
def test_padding_is_absent_whatever_stands_there(kind: str) -> None:
    q, k, v, bias = _inputs(20, 9)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :11], real[1, 15:], real[1, 5:7] = False, False, False
    for t in (q, k, v):
        t[~real] = torch.nan
    options: dict = {"causal": kind != "bidirectional"}
    if kind == "exponentials":
        options["exponentials"] = fit_exponentials(bias, 3)
    starts = [None]
    if options["causal"]:
        starts.append(rpe_attention(*_inputs(7, 9)[:3], bias, **options)[1])
    for state in starts:
        y, after = rpe_attention(q, k, v, bias, state=state, seq=SequenceInfo(padding_mask=real), **options)
        assert bool((y[~real] == 0).all())
        for row in range(2):
            alone = None if state is None else state.reorder(torch.tensor([row]))
            want, own = rpe_attention(*(t[row : row + 1, real[row]] for t in (q, k, v)), bias, state=alone, **options)
            _close(y[row, real[row]], want[0])
            for a, b in zip(after.tensors(), own.tensors()):
                _close(a[row], b[0])


def test_steps_through_a_window_are_exact() -> None:
    q, k, v, bias = _inputs(40, 7)
    want, final = rpe_attention(q, k, v, bias)
    ring = KVState.empty(2, 7, 3, 4, 5, dtype=torch.float64)
    state = WindowState(ring.k, ring.v, ring.length)
    for t in range(40):
        _close(step(q[:, t], k[:, t], v[:, t], bias, state), want[:, t])
    for a, b in zip(state.tensors(), final.tensors()):
        _close(a, b)


def _smooth(window: int) -> Tensor:
    """Biases a model might learn: a power law, a hump, and a decay with a ripple."""
    r = torch.arange(window, dtype=torch.float64)
    return torch.stack([-torch.log1p(r), -((r - 6) ** 2) / 40, -r / 30 + 0.3 * torch.cos(r / 3)])


def test_fitted_exponentials_come_close_with_few_terms() -> None:
    bias = _smooth(256)
    errors = [fit_exponentials(bias, n).error for n in (1, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1e-2 and errors[3] < 1e-3
    exact = torch.stack(
        [torch.arange(50) * -0.1, torch.log(0.7 * 0.9 ** torch.arange(50) + 0.3 * 0.5 ** torch.arange(50))]
    )
    assert fit_exponentials(exact.double(), 4).error < 1e-7


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_narrow_windows_are_fitted_too(window: int) -> None:
    fit = fit_exponentials(-torch.rand(2, window).cumsum(1), 8)
    assert bool((fit.rates.abs() <= 1).all())
    assert fit.error < (1e-7 if window == 1 else 0.5)


def test_steps_of_fitted_exponentials_err_as_little_as_the_fit() -> None:
    """Decoding from sums of fixed size: the outputs differ from the exact ones by about the error of the weights."""
    bias = _smooth(256)
    q, k, v, _ = _inputs(120, 1)
    fit = fit_exponentials(bias, 16)
    want, _ = rpe_attention(q, k, v, bias)
    whole, final = rpe_attention(q, k, v, bias, exponentials=fit)
    assert torch.equal(whole, want)  # exact inside a span
    state = ExponentialState(torch.zeros(2, 3, 16, 4, 6, dtype=torch.complex128))
    half, handed = rpe_attention(q[:, :60], k[:, :60], v[:, :60], bias, exponentials=fit)
    rest, after = rpe_attention(q[:, 60:], k[:, 60:], v[:, 60:], bias, exponentials=fit, state=handed)
    bound = 200 * fit.error
    for t in range(120):
        _close(step(q[:, t], k[:, t], v[:, t], bias, state, exponentials=fit), want[:, t], bound)
    _close(torch.cat([half, rest], 1), want, bound)
    for got in (after.sums, state.sums):
        _close(got, final.sums, 1e-9 * float(final.sums.abs().max()))
    assert 0 < fit.error < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, 6, 4, 9)}, "d_feature"),
        ({"v": torch.ones(2, 6, 3, 8)}, "d_feature"),
        ({"v": torch.ones(2, 6, 4, 8, dtype=torch.float64)}, "one floating dtype"),
        ({"bias": torch.zeros(3, 5)}, r"bias must be real, \(nheads=4"),
        ({"bias": torch.zeros(5)}, "bias must be real"),
        ({"causal": False, "bias": torch.zeros(4, 6)}, "an odd number, got 6"),
        ({"causal": False, "state": WindowState(*KVState.empty(2, 3, 4, 8).tensors())}, "takes no state"),
        ({"causal": False, "exponentials": fit_exponentials(torch.zeros(4, 5), 2)}, "for causal=True"),
        ({"exponentials": fit_exponentials(torch.zeros(3, 5), 2)}, "4 heads.*3 heads"),
        ({"state": KVState.empty(2, 5, 4, 8)}, "is a WindowState, got KVState"),
        ({"state": WindowState(*KVState.empty(2, 4, 4, 8).tensors())}, "state.k must be"),
        ({"state": WindowState(*KVState.empty(2, 5, 4, 8, dtype=torch.float64).tensors())}, "like q"),
        (
            {
                "exponentials": fit_exponentials(torch.zeros(4, 9), 2),
                "state": WindowState(*KVState.empty(2, 5, 4, 8).tensors()),
            },
            "is a ExponentialState, got WindowState",
        ),
        ({"bias": torch.zeros(4, 5, device="meta")}, "on the device of q"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    good = {name: torch.ones(2, 6, 4, 8) for name in "qkv"} | {"bias": torch.zeros(4, 5)}
    rpe_attention(**good)
    with pytest.raises(UnsupportedInput, match=message):
        rpe_attention(**(good | change))


def test_random_features_estimate_the_exponential_of_the_cosine() -> None:
    directions = torch.empty(2, 40000, 4)
    random_directions_(directions)
    x = torch.randn(2, 2, 4)
    q, k = positive_random(x, directions)
    torch.testing.assert_close((q * k).sum(-1), F.cosine_similarity(*x, dim=-1).exp(), atol=0, rtol=0.05)
    block = directions[0, :4]
    torch.testing.assert_close(block @ block.T, torch.diag(block.square().sum(-1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_random_features_cannot_overflow(dtype: torch.dtype) -> None:
    directions = torch.empty(2, 256, 128)
    random_directions_(directions)
    for size in (0.0, 1e-20, 1.0, 1e4):
        features = positive_random((size * torch.randn(3, 2, 128)).to(dtype), directions)
        assert features.dtype == torch.float32
        assert bool(torch.isfinite(features).all()) and bool((features > 0).all())


def test_squares_refuse_float16() -> None:
    for kind in ("based", "linear_transformer"):
        mixer = build_mixer({"kind": kind, "nheads": 2, "feature_map": "taylor"}, 32).half()
        with pytest.raises(UnsupportedInput, match="float16.*use bfloat16 or float32"):
            mixer(torch.randn(1, 3, 32).half())


def test_the_mixer_says_how_it_decodes() -> None:
    config = {"kind": "rpe_attention", "nheads": 2, "window": 64}
    exact, fitted = (build_mixer({**config, "decode": how}, 16) for how in ("window", "exponentials"))
    assert isinstance(exact.initial_state(1), WindowState) and exact.fitted() is None
    assert isinstance(fitted.initial_state(1), ExponentialState) and fitted.fitted().error < 1e-6
    assert "decode='exponentials'" in repr(fitted)
    with pytest.raises(UnsupportedInput, match="is a WindowState, got ExponentialState"):
        exact(torch.zeros(1, 3, 16), fitted.initial_state(1))


def test_a_trained_bias_decodes_as_well_as_its_fit() -> None:
    """The same weights with both ways to decode; the fit follows when the bias is changed in place."""
    config = {"kind": "rpe_attention", "nheads": 3, "window": 128, "n_exponentials": 16}
    exact, fitted = (build_mixer({**config, "decode": how}, 24).double() for how in ("window", "exponentials"))
    fitted.load_state_dict(exact.state_dict())
    with torch.no_grad():
        assert fitted.fitted() is fitted.fitted()
        for mixer in (exact, fitted):
            mixer.rpe.copy_(_smooth(128))
        x, state = torch.randn(1, 60, 24).double(), fitted.initial_state(1)
        want, _ = exact(x)
        error = max(float((fitted.step(x[:, t], state)[0] - want[:, t]).abs().max()) for t in range(60))
    assert 0 < fitted.fitted().error < 1e-3
    assert error < 50 * fitted.fitted().error


def test_bad_configs_are_refused() -> None:
    for config, message in (
        ({"nheads": 5}, "nheads must divide d_model=32, got 5"),
        ({"feature_map": "relu"}, "'nprf', 'elu1' or 'taylor'"),
        ({"decode": "ring"}, "'window' or 'exponentials', got 'ring'"),
        ({"decode": "exponentials", "causal": False}, "needs causal=True"),
        ({"window": 0}, "window must be a positive integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_mixer({"kind": "rpe_attention", **config}, 32)


def test_bidirectional_layers_refuse_to_decode() -> None:
    mixer = build_mixer({"kind": "rpe_attention", "nheads": 2, "causal": False}, 8)
    with pytest.raises(UnsupportedInput, match="token by token"):
        mixer.step(torch.zeros(1, 8), mixer.initial_state(1))
