"""Laws of causal_conv1d and of its decoding step that the case grid does not state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqlib import native, use_backend
from seqlib.errors import BackendUnavailable, UnsupportedInput
from seqlib.ops.causal_conv1d import causal_conv1d, step
from seqlib.sequence import SequenceInfo

BACKENDS = ("reference", "torch", "native")


@pytest.fixture(autouse=True)
def _native() -> None:
    reason = native.why_unavailable()
    if reason:
        pytest.skip(f"no native library: {reason}")


def _draw(batch: int = 2, seqlen: int = 40, d: int = 35, d_conv: int = 4, dtype=torch.float32) -> dict[str, Tensor]:
    shapes = {"x": (batch, seqlen, d), "weight": (d, d_conv), "bias": (d,), "initial_state": (batch, d_conv - 1, d)}
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def _conv(t: dict[str, Tensor], backend: str, **changed: Any) -> tuple[Tensor, Tensor]:
    return causal_conv1d(**{**t, "activation": "silu", **changed}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(20, 20), (1, 39), (2, 1, 1, 36), (1,) * 40])
def test_split_invariance(backend: str, sizes: tuple[int, ...]) -> None:
    t = _draw()
    y, final = _conv(t, backend)
    state, parts = t["initial_state"], []
    for x in t["x"].split(sizes, 1):
        part, state = _conv(t, backend, x=x, initial_state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, final)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("continues", [False, True])
def test_packed_equals_separate(backend: str, continues: bool) -> None:
    """Outputs and gradients of documents in one row, the first of which may go on from the state, are their own."""
    lengths = [3, 1, 1, 2, 33]
    t = {k: v.requires_grad_() for k, v in _draw(batch=1).items()}
    y, final = _conv(t, backend, seq=SequenceInfo.packed(lengths, continues=continues))
    parts = []
    for i, x in enumerate(t["x"].split(lengths, 1)):
        goes_on = t["initial_state"] if continues and i == 0 else None
        part, state = _conv(t, backend, x=x, initial_state=goes_on)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, final)
    names = [k for k in t if continues or k != "initial_state"]
    ways = torch.randn(y.shape), torch.randn(final.shape)
    got, want = (
        torch.autograd.grad((out * ways[0]).sum() + (last * ways[1]).sum(), [t[k] for k in names])
        for out, last in ((y, final), (torch.cat(parts, 1), state))
    )
    for name, a, b in zip(names, got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["left", "right", "inside", "everywhere"])
def test_padding_is_absence(backend: str, where: str) -> None:
    t = _draw()
    mask = torch.ones(2, 40, dtype=torch.bool)
    hidden = {"left": slice(0, 9), "right": slice(30, 40), "inside": slice(17, 19), "everywhere": slice(0, 40)}
    mask[1, hidden[where]] = False
    y, final = _conv(
        {**t, "x": t["x"].masked_fill(~mask[..., None], 1e3)}, backend, seq=SequenceInfo(padding_mask=mask)
    )
    assert not y[~mask].any()
    for row in range(2):
        kept, state = t["x"][row, mask[row]][None], t["initial_state"][row, None]
        want, last = _conv(t, backend, x=kept, initial_state=state) if kept.numel() else (kept, state)
        torch.testing.assert_close(y[row, mask[row]][None], want, rtol=1e-6, atol=1e-6)
        assert torch.equal(final[row, None], last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_conv", [1, 2, 4, 7])
def test_step_loop_equals_forward(backend: str, dtype: torch.dtype, d_conv: int) -> None:
    t = _draw(seqlen=9, d=70, d_conv=d_conv, dtype=dtype)
    y, final = _conv(t, backend)
    state = t["initial_state"].clone()
    steps = [step(x, t["weight"], t["bias"], state, activation="silu", backend=backend) for x in t["x"].unbind(1)]
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, final)


def test_inputs_are_not_modified_and_the_state_is_no_view() -> None:
    for backend in BACKENDS:
        t = _draw()
        before = {k: v.clone() for k, v in t.items()}
        _, final = _conv(t, backend)
        final.zero_()
        assert all(torch.equal(t[k], before[k]) for k in t), backend


@pytest.mark.parametrize("changed", [{}, {"seq": SequenceInfo.packed([1, 4], continues=True)}, {"bias": None}])
def test_gradcheck(changed: dict[str, Any]) -> None:
    t = {k: v.requires_grad_() for k, v in _draw(1, 5, 2, 3, torch.float64).items()}
    t = {**t, **changed}
    names = [k for k, v in t.items() if isinstance(v, Tensor)]
    rest = {k: v for k, v in t.items() if k not in names}
    tensors = [t[k] for k in names]
    assert torch.autograd.gradcheck(lambda *v: _conv(dict(zip(names, v)), "torch", **rest), tensors)


def test_native_gradient_of_the_state_alone() -> None:
    t = {k: v.requires_grad_() for k, v in _draw().items()}
    _, final = _conv(t, "native")
    (dx,) = torch.autograd.grad(final.sum(), t["x"])
    assert torch.equal(dx[:, -3:], torch.ones(2, 3, 35)) and not dx[:, :-3].any()


def test_native_results_do_not_depend_on_threads() -> None:
    def run() -> list[Tensor]:
        t = {k: v.requires_grad_() for k, v in _draw(3, 700, 130).items()}
        y, final = _conv(t, "native")
        return [y, final, *torch.autograd.grad(y.square().sum() + final.sum(), list(t.values()))]

    before = torch.get_num_threads()
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(run())
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_native_reads_any_strides() -> None:
    t = _draw(2, 40, 35)
    want = _conv(t, "native")
    for x in (t["x"].transpose(1, 2).contiguous().transpose(1, 2), t["x"].transpose(0, 1).contiguous().transpose(0, 1)):
        assert not x.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(_conv(t, "native", x=x), want))


def test_values_outside_the_window_do_not_leak() -> None:
    """An infinite input is seen by d_conv outputs and no others, also across tiles and documents."""
    for backend in BACKENDS:
        t = _draw(1, 300, 17)
        t["x"][0, 127] = float("inf")
        y, _ = _conv(t, backend, seq=SequenceInfo.packed([129, 171]))
        assert torch.equal((~y.isfinite()).any(-1)[0].nonzero()[:, 0], torch.tensor([127, 128])), backend


def test_native_schemas() -> None:
    t = {k: v.requires_grad_() for k, v in _draw(2, 6, 17).items()}
    x, weight, bias, state = t.values()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    for spans in (None, SequenceInfo(padding_mask=mask).spans):
        torch.library.opcheck(torch.ops.seqlib.causal_conv1d.default, (x, weight, bias, state, spans, True))
    torch.library.opcheck(torch.ops.seqlib.causal_conv1d.default, (x, weight, None, None, None, False))
    plain = [v.detach() for v in t.values()]
    grads = (torch.randn(2, 6, 17), torch.randn(2, 3, 17))
    torch.library.opcheck(torch.ops.seqlib.causal_conv1d_bwd.default, (*grads, *plain, None, True))
    x, weight, bias, state = plain
    torch.library.opcheck(torch.ops.seqlib.causal_conv1d_step.default, (x[:, 0], weight, bias, state, True))


def test_bad_input_says_what_to_do() -> None:
    t = _draw()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"x": t["x"][0]}, r"x must have shape \(batch, seqlen, d\)"),
        ({"x": t["x"][:, :0]}, "none of them 0"),
        ({"weight": t["weight"].T}, r"weight must have shape \(d=35"),
        ({"bias": t["bias"][:3]}, r"bias must have shape \(35,\)"),
        ({"weight": t["weight"].long()}, "floating-point"),
        ({"activation": "swish"}, 'None or "silu"'),
        ({"initial_state": t["initial_state"].transpose(1, 2)}, r"\(2, 3, 35\)"),
        ({"initial_state": t["initial_state"].double()}, "float64"),
        ({"bias": t["bias"].to("meta")}, "one device"),
        ({"seq": SequenceInfo.packed([40])}, r"\(1, 40\)"),
    ]
    for changed, message in bad:
        with pytest.raises(UnsupportedInput, match=message):
            causal_conv1d(**{**t, **changed})
    with pytest.raises(UnsupportedInput, match=r"\(batch, d\)"):
        step(t["x"], t["weight"], None, t["initial_state"])
    with pytest.raises(UnsupportedInput, match="contiguous"):
        step(t["x"][:, 0], t["weight"], None, t["initial_state"].transpose(0, 1).contiguous().transpose(0, 1))
    wide = _draw(d_conv=9)
    with pytest.raises(BackendUnavailable, match="d_conv is 9"):
        _conv(wide, "native")
    with use_backend("native"), pytest.raises(BackendUnavailable, match="gradients are needed"):
        step(t["x"][:, 0], t["weight"].requires_grad_(), None, t["initial_state"])
