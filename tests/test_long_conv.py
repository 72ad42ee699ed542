"""The long convolution: where impulses land, what spans carry, documents, and inputs that arrive one by one."""

from __future__ import annotations

import pytest
import torch

from seqlib import native
from seqlib.errors import UnsupportedInput
from seqlib.ops import long_conv
from seqlib.ops.long_conv import OnlineConv, SparseConv, step
from seqlib.ops.long_conv.torch_impl import fast_length
from seqlib.sequence import SequenceInfo

BACKENDS = ["reference", "torch", pytest.param("native", marks=pytest.mark.native)]


@pytest.fixture(autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("native") and native.why_unavailable("cpu"):
        pytest.skip(f"no native library: {native.why_unavailable('cpu')}")


def _draw(batch: int, seqlen: int, d: int, length: int, dtype: torch.dtype = torch.float32):
    kernel = torch.randn(d, length, dtype=dtype) / length**0.5
    return torch.randn(batch, seqlen, d, dtype=dtype), kernel, torch.randn(d, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impulse_lands_on_its_lags(backend: str) -> None:
    """Column j of the kernel is lag j, column j of the reverse kernel is lag -(j + 1)."""
    x = torch.zeros(1, 16, 1)
    x[0, 6] = 1
    kernel, reverse = torch.arange(1.0, 17)[None], -torch.arange(1.0, 17)[None]
    y, _ = long_conv(x, kernel, backend=backend)
    assert torch.allclose(y[0, :, 0], torch.tensor([0.0] * 6 + list(range(1, 11))), atol=1e-5)
    y, state = long_conv(x, kernel, reverse_kernel=reverse, backend=backend)
    want = [-6.0, -5, -4, -3, -2, -1, *range(1, 11)]
    assert torch.allclose(y[0, :, 0], torch.tensor(want), atol=1e-5) and state is None


def test_kernels_that_share_lag_zero_convert() -> None:
    """Hyena, Mega and S5 count lag 0 in both directions; their reverse kernel moves by one and its head goes to D."""
    x, k, D = _draw(2, 20, 3, 20, torch.float64)
    r = torch.randn(3, 20, dtype=torch.float64)
    forward, _ = long_conv(x, k, D=D)
    backward, _ = long_conv(x.flip(1), r)
    y, _ = long_conv(x, k, D=D + r[:, 0], reverse_kernel=r[:, 1:])
    assert torch.allclose(y, forward + backward.flip(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 5, 60, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spans_equal_one_pass(backend: str, length: int, dtype: torch.dtype) -> None:
    x, kernel, D = _draw(3, 60, 18, length)
    x = x.to(dtype)
    whole, last = long_conv(x, kernel, D=D, backend=backend)
    ys, state = [], None
    for part in x.split([1, 17, 40, 2], 1):
        y, state = long_conv(part, kernel, D=D, initial_state=state, backend=backend)
        ys.append(y)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert torch.allclose(torch.cat(ys, 1), whole, atol=tolerance * float(whole.abs().max()))
    assert state is not None and last is not None
    assert torch.equal(state, last) and state.dtype == dtype and state.shape == (3, length - 1, 18)


def test_state_is_memory_of_its_own() -> None:
    """`step` writes into the state; the inputs it was made from must not move."""
    x, kernel, _ = _draw(1, 8, 2, 4)
    before = x.clone()
    _, state = long_conv(x, kernel)
    assert state is not None
    step(torch.randn(1, 2), kernel, state)
    assert torch.equal(x, before)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_steps_equal_one_pass(length: int) -> None:
    x, kernel, D = _draw(2, 50, 3, length, torch.float64)
    whole, last = long_conv(x, kernel, D=D)
    state = torch.zeros(2, length - 1, 3, dtype=torch.float64)
    ys = [step(x[:, t], kernel, state, D=D) for t in range(50)]
    assert torch.allclose(torch.stack(ys, 1), whole)
    assert last is not None and torch.equal(state, last)


@pytest.mark.parametrize("length", [1, 2, 3, 31, 64, 100, 300])
@pytest.mark.parametrize("prompt", [0, 1, 45, 200])
def test_online_equals_one_pass(length: int, prompt: int) -> None:
    """Tiles meet every pair of input and output once, also after they have wrapped round the ring several times."""
    x, kernel, D = _draw(2, prompt + 300, 3, length, torch.float64)
    whole, _ = long_conv(x, kernel, D=D)
    conv = OnlineConv(kernel, D)
    state = conv.start(x[:, :prompt])
    ys = [conv.step(x[:, t], state) for t in range(prompt, prompt + 300)]
    assert torch.allclose(torch.stack(ys, 1), whole[:, prompt:], atol=1e-12)
    rows = state.reorder(torch.tensor([1, 1]))
    assert torch.equal(rows.inputs[0], state.inputs[1]) and rows.position == 300


def _straight_pieces(d: int, *lengths: int) -> torch.Tensor:
    """Kernels of straight pieces that meet with jumps."""
    pieces = [torch.randn(d, 1) + torch.randn(d, 1) * torch.linspace(0, 1, n, dtype=torch.float64) for n in lengths]
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("lengths", [(1,), (3,), (1, 1, 2, 4, 8), (30, 60)])
@pytest.mark.parametrize("prompt", [0, 1, 45, 200])
def test_straight_kernels_equal_one_pass_by_their_bends(lengths: tuple[int, ...], prompt: int) -> None:
    kernel = _straight_pieces(3, *lengths)
    x, _, D = _draw(2, prompt + 300, 3, 1, torch.float64)
    whole, _ = long_conv(x, kernel, D=D)
    conv = SparseConv(kernel, D)
    assert len(conv.taps) <= 4 * len(lengths) + 1
    state = conv.start(x[:, :prompt])
    ys = [conv.step(x[:, t], state) for t in range(prompt, prompt + 300)]
    assert torch.allclose(torch.stack(ys, 1), whole[:, prompt:], atol=1e-10)
    kept = min(300, kernel.shape[1] - 1)
    assert torch.allclose(state.last(kept), x[:, x.shape[1] - kept :], atol=1e-10)


def test_double_sums_do_not_grow() -> None:
    """Thousands of equal inputs: without what is taken off them the sums would reach 10^7 here and lose digits."""
    kernel = _straight_pieces(2, 16, 16, 32)
    conv = SparseConv(kernel)
    state = conv.start(torch.zeros(1, 0, 2))
    for _ in range(5000):
        y = conv.step(torch.ones(1, 2).double(), state)
        assert float(state.sums.abs().max()) < 2 * 66**2
    assert torch.allclose(y[0], kernel.sum(1), atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("both", [False, True])
def test_documents_do_not_meet(backend: str, both: bool) -> None:
    lengths = [3, 20, 1, 17]
    x, kernel, D = _draw(1, sum(lengths), 5, 30)
    reverse = torch.randn(5, 30) if both else None
    y, _ = long_conv(x, kernel, D=D, reverse_kernel=reverse, seq=SequenceInfo.packed(lengths), backend=backend)
    alone = [long_conv(part, kernel, D=D, reverse_kernel=reverse, backend=backend)[0] for part in x.split(lengths, 1)]
    assert torch.allclose(y, torch.cat(alone, 1), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("both", [False, True])
def test_padding_is_as_if_absent(backend: str, both: bool) -> None:
    x, kernel, D = _draw(2, 12, 5, 12)
    reverse = torch.randn(5, 12) if both else None
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0], [1] * 12], dtype=torch.bool)
    x[0, ~mask[0]] = float("inf")
    y, state = long_conv(x, kernel, D=D, reverse_kernel=reverse, seq=SequenceInfo(padding_mask=mask), backend=backend)
    want, last = long_conv(x[:1, mask[0]], kernel, D=D, reverse_kernel=reverse, backend=backend)
    assert torch.allclose(y[:1, mask[0]], want, atol=1e-5) and float(y[0, ~mask[0]].abs().max()) == 0
    if not both:
        assert state is not None and last is not None
        assert torch.equal(state[:1], last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_looks_ahead(backend: str) -> None:
    """The gradient of an output with respect to later inputs is zero, exactly where it is summed and nearly by FFT."""
    x, kernel, D = _draw(1, 40, 3, 40)
    x.requires_grad_()
    y, _ = long_conv(x, kernel, D=D, backend=backend)
    (dx,) = torch.autograd.grad(y[0, 17].sum(), x)
    assert float(dx[0, 18:].abs().max()) < 1e-6 and float(dx[0, 17].abs().min()) > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_dtypes_of_parameters(backend: str) -> None:
    x, kernel, D = _draw(2, 40, 6, 40)
    want, _ = long_conv(x, kernel, D=D, reverse_kernel=kernel, backend=backend)
    wide = torch.stack([kernel.T, kernel.T], 2).double()[..., 0].T  # every second number of a transposed tensor
    skip = torch.stack([D, D], 1)[:, 1]
    got, _ = long_conv(x.mT.contiguous().mT, wide, D=skip, reverse_kernel=wide, backend=backend)
    assert got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-5)


def test_autocast_leaves_it_in_float32() -> None:
    x, kernel, D = _draw(2, 100, 4, 100)
    want, _ = long_conv(x, kernel, D=D)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = long_conv(x, kernel, D=D)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.native
@pytest.mark.parametrize("options", [{}, {"reverse": 9}, {"state": True}])
def test_compiled_op_keeps_its_contract(options: dict) -> None:
    """Schema, shapes without data, and registered gradient agree (torch.library.opcheck)."""
    native.load("cpu")
    x, kernel, D = (t.requires_grad_() for t in _draw(2, 9, 18, 10))
    reverse = torch.randn(18, 8) if "reverse" in options else None
    state = torch.randn(2, 9, 18) if "state" in options else None
    torch.library.opcheck(torch.ops.seqlib.long_conv.default, (x, kernel, D, reverse, state))


@pytest.mark.native
def test_threads_do_not_change_the_result() -> None:
    x, kernel, D = (t.requires_grad_() for t in _draw(5, 70, 40, 70))
    made = []
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        y, _ = long_conv(x, kernel, D=D, backend="native")
        made.append((y, *torch.autograd.grad(y.square().sum(), (x, kernel, D))))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other))


def test_fast_length_is_even_and_smooth() -> None:
    assert [fast_length(n) for n in (1, 2, 4095, 4097, 1030, 127)] == [2, 2, 4096, 4320, 1080, 128]
    for n in range(1, 3000, 7):
        m = fast_length(n)
        rest = m
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        assert m >= n and m % 2 == 0 and rest == 1 and 4 * m <= 5 * max(n, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "x must have shape"),
        ({"x": torch.zeros(2, 4, 3, dtype=torch.long)}, "real floating-point"),
        ({"kernel": torch.zeros(4, 5)}, "kernel must be"),
        ({"kernel": torch.zeros(3, 0)}, "kernel must be"),
        ({"D": torch.zeros(2)}, "D must be"),
        ({"initial_state": torch.zeros(2, 5, 3)}, "initial_state must be"),
        ({"initial_state": torch.zeros(2, 4, 3).double()}, "initial_state must be"),
        ({"reverse_kernel": torch.zeros(2, 5)}, "reverse_kernel must be"),
        ({"reverse_kernel": torch.zeros(3, 5), "initial_state": torch.zeros(2, 4, 3)}, "cannot go with reverse_kernel"),
        ({"seq": SequenceInfo.packed([2, 3])}, "seq describes"),
    ],
)
def test_bad_input_says_what_to_do(change: dict, message: str) -> None:
    given: dict = {"x": torch.zeros(2, 4, 3), "kernel": torch.zeros(3, 5)} | change
    with pytest.raises(UnsupportedInput, match=message):
        long_conv(**given)
