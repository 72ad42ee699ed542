"""HiPPO matrices, kernels of state spaces, and the states at the ends of a span."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seqlib import native
from seqlib.errors import BackendUnavailable, ConfigError, UnsupportedInput
from seqlib.layers.hippo import DIAGONAL, MEASURES, diagonal, hippo, nplr
from seqlib.ops import long_conv, ssm_kernel_diag, ssm_kernel_dplr
from seqlib.ops.ssm_kernel import (
    dense_final_state,
    dense_state_outputs,
    discretize,
    dplr_dense,
    dplr_truncate,
    final_state,
    state_outputs,
)

# Imaginary parts of the eigenvalues and sizes of V*B, as state-spaces/s4 computes them.
LEGS = {
    4: ([-4.60329301, -0.55650112], [2.65801507, 0.96693117]),
    8: ([-19.85741037, -5.35420852, -1.95779415, -0.42748871], [5.15562552, 1.84386891, 1.17495995, 0.79946359]),
}


@pytest.mark.parametrize("n", LEGS)
def test_legs_has_its_published_spectrum(n: int) -> None:
    made = nplr("legs", n)
    imag, sizes = LEGS[n]
    assert torch.allclose(made.A, torch.complex(torch.full((n // 2,), -0.5).double(), torch.tensor(imag).double()))
    assert torch.allclose(made.B.real, torch.tensor(sizes).double()) and float(made.B.imag.abs().max()) == 0


def test_spectra_of_other_measures() -> None:
    made = nplr("legs", 64)
    assert made.A.imag[0].item() == pytest.approx(-1303.27384, abs=1e-4)
    assert made.A.imag[-1].item() == pytest.approx(-0.26385693, abs=1e-7)
    assert made.B.real.min().item() == pytest.approx(0.5945, abs=1e-4)
    assert made.B.real.max().item() == pytest.approx(40.752, abs=1e-3)
    assert nplr("legt", 8).A.imag.tolist() == pytest.approx([-12.0658, -9.2437, -4.3363, -1.4719], abs=1e-4)
    assert nplr("fourier", 8).A.imag.tolist() == pytest.approx([-3 * math.pi, -2 * math.pi, -math.pi, 0])


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("n", [2, 8, 64])
def test_nplr_is_the_hippo_matrix(measure: str, n: int) -> None:
    """V (diag(A) - P P*) V* over whole conjugate pairs is the HiPPO matrix, and B goes with it."""
    A, B = hippo(measure, n)
    made = nplr(measure, n)
    V = torch.cat([made.V, made.V.conj()], 1)
    values, P, read = (torch.cat([t, t.conj()], -1) for t in (made.A, made.P, made.B))
    inner = torch.diag(values) - P.mT @ P.conj()
    assert torch.allclose(V @ inner @ V.mH, A.to(V.dtype), atol=1e-10 * n)
    assert torch.allclose(V @ read, B.to(V.dtype), atol=1e-10 * n)
    assert bool((made.A.real <= 0).all()) and bool((made.A.imag <= 0).all())


def test_diagonal_initialisations() -> None:
    assert diagonal("lin", 6)[0].imag.tolist() == pytest.approx([0, -math.pi, -2 * math.pi])
    assert diagonal("inv", 4)[0].imag.tolist() == pytest.approx([-4 / math.pi * 3, -4 / math.pi / 3])
    assert diagonal("inv2", 4)[0].imag.tolist() == pytest.approx([-4 / math.pi * 3, -4 / math.pi])
    assert diagonal("quad", 4)[0].imag.tolist() == pytest.approx([-1 / math.pi, -9 / math.pi])
    assert diagonal("real", 4)[0].tolist() == [-1, -2, -3, -4]
    assert diagonal("legs", 64)[1].real.max() > 40 and diagonal("legs", 64, clip=2.0)[1].real.max() == 2
    for name in DIAGONAL:
        A, B = diagonal(name, 8)
        assert A.shape == B.shape and bool((A.real <= -0.5).all())
    with pytest.raises(ConfigError, match="even"):
        diagonal("lin", 7)
    with pytest.raises(ConfigError, match="lin, inv"):
        diagonal("linear", 8)


def test_discretizations_are_their_definitions() -> None:
    A = torch.tensor([[-0.5 + 3j, -2 - 1j, -1e-9 + 1e-9j, -1e-4]], dtype=torch.complex128)
    B, dt = torch.ones(1, 4, dtype=torch.complex128), torch.tensor([0.3], dtype=torch.float64)
    log_decay, B_bar = discretize(A, B, dt, "zoh")
    series = sum((0.3 * A) ** k / math.factorial(k + 1) for k in range(20)) * 0.3
    assert torch.allclose(log_decay, 0.3 * A) and torch.allclose(B_bar, series, rtol=1e-12)
    log_decay, B_bar = discretize(A, B, dt, "bilinear")
    assert torch.allclose(torch.exp(log_decay), (1 + 0.15 * A) / (1 - 0.15 * A))
    assert torch.allclose(B_bar, 0.3 / (1 - 0.15 * A))
    zero = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    _, B_bar = discretize(zero, torch.ones(1, 2), dt, "zoh")
    (slope,) = torch.autograd.grad(B_bar.sum(), zero)
    assert torch.allclose(B_bar, dt[:, None].expand(1, 2)) and torch.allclose(slope, torch.tensor(0.045).double())


def _diag(d: int, n: int, dtype: torch.dtype, name: str = "lin") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A, B = (t.expand(d, -1) for t in diagonal(name, 2 * n))
    C = torch.randn(d, n, dtype=torch.complex128) * 0.5**0.5
    dt = torch.exp(torch.linspace(math.log(1e-3), math.log(1e-1), d, dtype=torch.float64))
    narrow = torch.complex64 if dtype == torch.float32 else torch.complex128
    # Rounded to float32 in both precisions, so that only the arithmetic differs.
    A, B, C = (t.to(torch.complex64).to(narrow) for t in (A, B, C))
    return A, B, C, dt.float().to(dtype)


@pytest.mark.parametrize("name", ["lin", "inv", "legs"])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_diag_is_accurate_at_length_16384(name: str, discretization: str) -> None:
    def kernel(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        return ssm_kernel_diag(*_diag(16, 32, dtype, name), 16384, discretization=discretization).double()

    got, want = kernel(torch.float32), kernel(torch.float64)
    assert float(((got - want).norm(dim=1) / want.norm(dim=1)).max()) < 1e-5


@pytest.mark.native
@pytest.mark.parametrize("length", [64, 65, 5000])
def test_compiled_diag_has_the_exact_gradients(length: int) -> None:
    """Of both readouts, far out and where the last block is not full."""

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        torch.manual_seed(0)
        A, B, C, dt = _diag(3, 5, dtype)
        leaves = [t.detach().clone().requires_grad_() for t in (A, B, torch.stack([C, 2 * C.conj()]), dt)]
        kernel = ssm_kernel_diag(*leaves, length, backend=backend)
        weight = torch.randn(2, 3, length, dtype=torch.float64)
        return [kernel.detach(), *torch.autograd.grad((kernel * weight.to(dtype)).sum(), leaves)]

    for got, want in zip(gradients(torch.float32, "native"), gradients(torch.float64, "reference")):
        assert float((got.to(want.dtype) - want).norm() / want.norm()) < 2e-5


@pytest.mark.native
def test_compiled_diag_keeps_its_contract() -> None:
    ssm_kernel_diag(*_diag(2, 3, torch.float32), 10, backend="native")
    log_decay = torch.complex(-torch.rand(3, 5).double(), torch.randn(3, 5).double()).requires_grad_()
    weight = torch.randn(3, 2, 5, dtype=torch.complex64, requires_grad=True)
    torch.library.opcheck(torch.ops.seqlib.diag_kernel.default, (log_decay, weight, 70))
    plain = torch.randn(3, 2, 70), log_decay.detach(), weight.detach()
    torch.library.opcheck(torch.ops.seqlib.diag_kernel_bwd.default, plain)


def test_diag_under_autocast_stays_float32() -> None:
    given = _diag(4, 8, torch.float32)
    want = ssm_kernel_diag(*given, 100)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssm_kernel_diag(*given, 100), want)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear", "dirac"])
@pytest.mark.parametrize("real", [False, True])
def test_diag_spans_and_steps_equal_one_pass(discretization: str, real: bool) -> None:
    """Convolution, chunks with a carried state, and the recurrence are one and the same map."""
    A, B, C, dt = _diag(3, 4, torch.float64, "inv")
    if real:
        A, B, C = (t.real for t in (A, B, C))
    x = torch.randn(2, 150, 3, dtype=torch.float64)
    K = ssm_kernel_diag(A, B, C, dt, 150, discretization=discretization)
    whole, _ = long_conv(x, K)
    log_decay, B_bar = discretize(A, B, dt, discretization)

    ys, h = [], torch.zeros(2, 3, 4, dtype=log_decay.dtype)
    for part in x.split([1, 70, 79], 1):
        y, _ = long_conv(part, K[:, : part.shape[1]].contiguous())
        ys.append(y + state_outputs(log_decay, C, h, part.shape[1], pairs=not real))
        h = final_state(log_decay, B_bar, part, h)
    assert torch.allclose(torch.cat(ys, 1), whole, atol=1e-12)
    assert torch.allclose(final_state(log_decay, B_bar, x), h, atol=1e-12)

    s = torch.zeros_like(h)
    for t in range(150):
        s = torch.exp(log_decay) * s + B_bar * x[:, t, :, None]
        assert torch.allclose((1 if real else 2) * (C * s).sum(-1).real, whole[:, t], atol=1e-12)
    assert torch.allclose(s, h, atol=1e-12)


def test_states_that_die_at_once_stay_finite() -> None:
    A = torch.tensor([[-1e5, -1.0]])
    log_decay, B_bar = discretize(A, torch.ones(1, 2), torch.ones(1))
    h = final_state(log_decay, B_bar, torch.ones(1, 5000, 1))
    assert torch.allclose(h, torch.tensor([[[1e-5, 1.0]]]))
    assert torch.allclose(
        ssm_kernel_diag(A, torch.ones(2), torch.ones(1, 2), torch.ones(1), 5000)[0, -1], torch.zeros(())
    )


def _dplr(d: int, n: int, measure: str, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    made = nplr(measure, n)
    # S4 keeps real parts away from 0 by its parameterisation; fourier and legt start there.
    A = torch.complex(made.A.real.clamp(max=-1e-4), made.A.imag).expand(d, -1)
    P, B = made.P[:, None].expand(-1, d, -1), made.B.expand(d, -1)
    C = torch.randn(d, n // 2, dtype=torch.complex128) * 0.5**0.5
    dt = torch.exp(torch.linspace(math.log(1e-3), math.log(1e-1), d, dtype=torch.float64)).float().double()
    A, P, B = (t.to(torch.complex64).to(torch.complex128) for t in (A, P, B))
    truncated = dplr_truncate(A, P, C, dt, length).to(torch.complex64).to(torch.complex128)
    narrow = torch.complex64 if dtype == torch.float32 else torch.complex128
    return *(t.to(narrow) for t in (A, P, B, truncated)), dt.to(dtype)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", [1, 2, 31, 64])
def test_dplr_kernel_is_the_recurrence(measure: str, length: int) -> None:
    given = _dplr(3, 8, measure, 64)
    leaves = [t.clone().requires_grad_() for t in given]
    got = ssm_kernel_dplr(*leaves, length, l_kernel=64, backend="torch")
    want = ssm_kernel_dplr(*leaves, length, l_kernel=64, backend="reference")
    assert torch.allclose(got, want, atol=1e-10)
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((want * weight).sum(), leaves)
    ):
        assert torch.allclose(a, b, atol=1e-8 * max(1.0, float(b.abs().max())))


@pytest.mark.native
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize(("readouts", "d_state", "length"), [(1, 8, 64), (2, 6, 31), (1, 2, 1), (2, 64, 200)])
def test_compiled_dplr_is_the_exact_one(isa: str, readouts: int, d_state: int, length: int) -> None:
    """Kernel and gradients against float64, for every instruction set of this machine."""
    if native.why_unavailable("cpu"):
        pytest.skip(f"no native library: {native.why_unavailable('cpu')}")
    native.load("cpu")
    before = torch.ops.seqlib.isa(None)
    try:
        torch.ops.seqlib.isa(isa)
    except RuntimeError as error:
        pytest.skip(f"this machine has no {isa}: {error}")
    try:
        A, P, B, C, dt = _dplr(3, d_state, "legs", length, torch.float32)
        C = torch.stack([C, C.conj() * 1j][:readouts])
        made = []
        for wide in (False, True):
            given = (A, P, B, C, dt)
            if wide:
                given = tuple(t.to(torch.complex128 if t.is_complex() else torch.float64) for t in given)
            leaves = [t.clone().requires_grad_() for t in given]
            K = ssm_kernel_dplr(*leaves, max(1, length - 3), l_kernel=length, backend="torch" if wide else "native")
            weight = torch.cos(torch.arange(K.numel()).double()).view(K.shape)
            made.append((K.detach(), *torch.autograd.grad((K.double() * weight).sum(), leaves)))
        # At length 1 the kernel hardly depends on dt: what is left of that gradient is rounding.
        for got, want in zip(*(m[: 5 if length == 1 else 6] for m in made)):
            assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
    finally:
        torch.ops.seqlib.isa(before)


@pytest.mark.native
def test_compiled_dplr_keeps_its_contract() -> None:
    """Schema, shapes without data, and registered gradient agree; other ranks are refused by name."""
    if native.why_unavailable("cpu"):
        pytest.skip(f"no native library: {native.why_unavailable('cpu')}")
    native.load("cpu")
    sin, cos = (torch.linspace(0.1, 0.9, 16).square().roll(i) for i in (0, 3))
    weights, square, real, dt = torch.rand(2, 3, 8), 1 + torch.rand(2, 3), -torch.rand(2, 3), torch.rand(2)
    leaves = [t.requires_grad_() for t in (weights, square, real, dt)]
    torch.library.opcheck(torch.ops.seqlib.dplr_spectrum.default, (*leaves, sin, cos, 13))
    with pytest.raises(BackendUnavailable, match="rank 2"):
        ssm_kernel_dplr(*_dplr(2, 8, "legt", 16, torch.float32), 16, backend="native")


@pytest.mark.parametrize("measure", ["legs", "fourier"])
def test_dplr_is_accurate_at_length_16384(measure: str) -> None:
    """Typical relative error below 1e-5, worst below 1e-4; the published form loses 1e-3 here."""

    def kernel(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        return ssm_kernel_dplr(*_dplr(16, 64, measure, 16384, dtype), 16384).double()

    got, want = kernel(torch.float32), kernel(torch.float64)
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    assert float(error.median()) < 1e-5 and float(error.max()) < 1e-4


def test_dplr_prefix_and_channels() -> None:
    A, P, B, C, dt = _dplr(2, 8, "legs", 64)
    full = ssm_kernel_dplr(A, P, B, C, dt, 64)
    assert torch.allclose(ssm_kernel_dplr(A, P, B, C, dt, 10, l_kernel=64), full[:, :10])
    two = ssm_kernel_dplr(A, P, B, torch.stack([C, 2 * C]), dt, 64)
    assert two.shape == (2, 2, 64) and torch.allclose(two[1], 2 * full)
    with pytest.raises(UnsupportedInput, match="65 is beyond the 64"):
        ssm_kernel_dplr(A, P, B, C, dt, 65, l_kernel=64)


@pytest.mark.parametrize("measure", MEASURES)
def test_dplr_spans_and_steps_equal_one_pass(measure: str) -> None:
    A, P, B, C, dt = _dplr(3, 8, measure, 100)
    x = torch.randn(2, 100, 3, dtype=torch.float64)
    K = ssm_kernel_dplr(A, P, B, C, dt, 100)
    whole, _ = long_conv(x, K)
    ssm = dplr_dense(A, P, B, C, dt, l_kernel=100)
    ys, h = [], torch.zeros(2, 3, 8, dtype=torch.float64)
    for part in x.split([1, 62, 37], 1):
        y, _ = long_conv(part, K[:, : part.shape[1]].contiguous())
        ys.append(y + dense_state_outputs(ssm, h, part.shape[1]))
        h = dense_final_state(ssm, part, h)
    assert torch.allclose(torch.cat(ys, 1), whole, atol=1e-10)
    s = torch.zeros_like(h)
    for t in range(100):
        s = torch.einsum("dnm,bdm->bdn", ssm.A, s) + ssm.B * x[:, t, :, None]
        assert torch.allclose((ssm.C * s).sum(-1), whole[:, t], atol=1e-10)
    assert torch.allclose(s, h, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(3, dtype=torch.complex64)}, "A must have shape"),
        ({"C": torch.zeros(2, 3, dtype=torch.complex64)}, "C must have shape"),
        ({"B": torch.zeros(5, dtype=torch.complex64)}, "B must broadcast"),
        ({"dt": torch.ones(3)}, "dt must be real"),
        ({"A": torch.zeros(2, 4)}, "A is real"),
        ({"length": 0}, "at least 1"),
        ({"discretization": "euler"}, "zoh, bilinear, dirac"),
    ],
)
def test_bad_input_says_what_to_do(change: dict, message: str) -> None:
    z = torch.zeros(2, 4, dtype=torch.complex64)
    given: dict = {"A": z, "B": z, "C": z, "dt": torch.ones(2), "length": 4} | change
    with pytest.raises(UnsupportedInput, match=message):
        ssm_kernel_diag(**given)
