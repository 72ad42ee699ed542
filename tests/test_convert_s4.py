"""Published layouts of state-spaces/s4: converted layers compute the published equations."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from seqlib.errors import CheckpointMismatch, ConfigError
from seqlib.hf.convert_s4 import layers_from_s4, mixer_from_s4
from seqlib.layers.hippo import nplr
from seqlib.mixers import build_mixer

H, N, S = 6, 4, 2  # width, pairs of states, copies of A and B

Weights = dict[str, Tensor]


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _kernel_weights(low_rank: bool, directions: int = 1) -> Weights:
    """As version 4 names them, within the kernel."""
    torch.manual_seed(0)
    start = nplr("legs", 2 * N)
    made = {
        "C": _drawn(directions, H, N, 2),
        "B": torch.view_as_real(start.B).expand(1, S, N, 2) + 0.1 * _drawn(1, S, N, 2),
        "A_real": torch.log(-start.A.real).expand(S, N) + 0.1 * _drawn(S, N),
        "A_imag": -start.A.imag.expand(S, N) + 0.1 * _drawn(S, N),
        "inv_dt": torch.linspace(-4, -1, H).double()[:, None],
    }
    if low_rank:
        made["P"] = torch.view_as_real(start.P)[:, None].expand(1, S, N, 2).clone()
    return made


def _block(kernel: Weights, conv: str, rows: int = 2 * H) -> Weights:
    """A layer around a kernel whose names begin with `conv`."""
    made = {f"{conv}kernel.{n}": t for n, t in kernel.items()} | {f"{conv}D": _drawn(1, H)}
    return made | {"output_linear.0.weight": _drawn(rows, H), "output_linear.0.bias": _drawn(rows)}


def _version_3(kernel: Weights) -> Weights:
    """The same layer in the older names: dt is exp(log_dt), Im A has the other sign, the length is called L."""
    old = dict(kernel)
    old["log_dt"] = torch.log(nn.functional.softplus(old.pop("inv_dt")))[:, 0]
    if "P" in kernel:
        old |= {"inv_w_real": old.pop("A_real"), "w_imag": -old.pop("A_imag")}
    else:
        old |= {"inv_A_real": old.pop("A_real"), "A_imag": -old.pop("A_imag")}
    if "l_kernel" in old:
        old["L"] = old.pop("l_kernel")
    return {f"kernel.{n}": t for n, t in old.items()}


def _dense(kernel: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A of all 2N conjugate states per channel (low rank included), B, C of every direction, and dt."""
    copy = torch.arange(H) % S
    A = torch.complex(-kernel["A_real"].exp(), -kernel["A_imag"])[copy]
    B = torch.view_as_complex(kernel["B"][0].contiguous())[copy]
    C = torch.view_as_complex(kernel["C"])
    full = torch.diag_embed(torch.cat([A, A.conj()], -1))
    if "P" in kernel:
        P = torch.view_as_complex(kernel["P"])[:, copy]
        P = torch.cat([P, P.conj()], -1)
        full = full - torch.einsum("rhn,rhm->hnm", P, P.conj())
    dt = nn.functional.softplus(kernel["inv_dt"])[:, 0]
    return full, torch.cat([B, B.conj()], -1), torch.cat([C, C.conj()], -1), dt


def _discrete(A: Tensor, B: Tensor, dt: Tensor, bilinear: bool) -> tuple[Tensor, Tensor]:
    eye = torch.eye(2 * N)
    step = dt[:, None, None] * A
    if bilinear:
        left = torch.linalg.inv(eye - step / 2)
        return left @ (eye + step / 2), (left @ (dt[:, None] * B)[..., None])[..., 0]
    A_bar = torch.matrix_exp(step)
    return A_bar, (torch.linalg.inv(A) @ (A_bar - eye) @ B[..., None])[..., 0]


def _responses(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """(directions, H, length)"""
    columns, h = [], B_bar
    for _ in range(length):
        columns.append(torch.einsum("chn,hn->ch", C, h).real)
        h = (A_bar @ h[..., None])[..., 0]
    return torch.stack(columns, -1)


def _layer(kernel: Tensor, weights: Weights, conv: str, x: Tensor) -> Tensor:
    """What the published layer does with its kernel, by plain sums."""
    length = x.shape[1]
    y = weights[f"{conv}D"] * x
    for t in range(length):
        for s in range(length):
            if s <= t:
                y[:, t] += kernel[0, :, t - s] * x[:, s]
            elif len(kernel) == 2:
                y[:, t] += kernel[1, :, s - t - 1] * x[:, s]
    y = nn.functional.gelu(y) @ weights["output_linear.0.weight"].T + weights["output_linear.0.bias"]
    return nn.functional.glu(y) if y.shape[-1] == 2 * H else y


def _outputs(converted: tuple, x: Tensor) -> Tensor:
    config, weights = converted
    mixer = build_mixer(config, H).double()
    mixer.load_state_dict(weights)
    with torch.no_grad():
        return mixer(x)[0]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", ["v4", "v4 convolution", "v3"])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_s4d_layers(layout: str, discretization: str, directions: int) -> None:
    kernel, x = _kernel_weights(False, directions), _drawn(2, 15, H)
    conv = "layer." if layout == "v4" else ""
    weights = _block(kernel, conv, H)
    A, B, C, dt = _dense(kernel)
    want = _layer(_responses(*_discrete(A, B, dt, discretization == "bilinear"), C, 15), weights, conv, x)
    options: dict = {"dt_transform": "softplus", "discretization": discretization}
    if layout == "v3":
        rest = {n: t for n, t in weights.items() if "kernel" not in n}
        weights, options = (
            rest | {f"kernel.{n}": t for n, t in _version_3(kernel).items()},
            {"discretization": discretization},
        )
    torch.testing.assert_close(_outputs(mixer_from_s4(weights, **options), x), want, atol=1e-9, rtol=1e-9)


def _truncated(kernel: Weights, length: int) -> Weights:
    """C as a trained S4 stores it: C (1 - A_bar^length), the first half of the conjugate pairs."""
    A, B, C, dt = _dense(kernel)
    A_bar, _ = _discrete(A, B, dt, True)
    stored = C - torch.einsum("chn,hnm->chm", C, torch.matrix_power(A_bar, length))
    return kernel | {"C": torch.view_as_real(stored[..., :N].contiguous()), "l_kernel": torch.tensor(length)}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", ["v4", "v3"])
def test_s4_layers_undo_the_length_that_c_is_stored_for(layout: str, directions: int) -> None:
    """The stored C belongs to 20 positions; the layer's kernel is that of the plain C behind it."""
    kernel, x = _kernel_weights(True, directions), _drawn(2, 15, H)
    A, B, C, dt = _dense(kernel)
    responses = _responses(*_discrete(A, B, dt, True), C, 40)
    stored = _truncated(kernel, 20)
    weights, options = _block(stored, "layer."), {"dt_transform": "softplus"}
    want = _layer(responses, weights, "layer.", x)
    if layout == "v3":
        weights = {n: t for n, t in weights.items() if "kernel" not in n}
        weights["D"] = weights.pop("layer.D")
        weights, options = weights | {f"kernel.{n}": t for n, t in _version_3(stored).items()}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = mixer_from_s4(weights, **options)
    assert converted[0]["l_max"] == 20
    torch.testing.assert_close(_outputs(converted, x), want, atol=1e-8, rtol=1e-8)
    # Another length: rewritten by the same rule, and said so.
    with pytest.warns(UserWarning, match="stored for 20 positions and is rewritten for 40"):
        longer = mixer_from_s4(weights, l_max=40, **options)
    mixer = build_mixer(longer[0], H).double()
    mixer.load_state_dict(longer[1])
    with torch.no_grad():
        torch.testing.assert_close(mixer.kernel(40), responses, atol=1e-5, rtol=0)  # C passed through float32


def test_a_plain_c_is_truncated_when_its_length_is_given() -> None:
    kernel = _kernel_weights(True)
    for l_kernel in ({}, {"l_kernel": torch.tensor(0)}):
        weights = _block(kernel | l_kernel, "layer.")
        with pytest.raises(CheckpointMismatch, match="C is plain .* pass l_max"):
            mixer_from_s4(weights, dt_transform="softplus")
        config, made = mixer_from_s4(weights, dt_transform="softplus", l_max=20)
        mixer = build_mixer(config, H).double()
        mixer.load_state_dict(made)
        A, B, C, dt = _dense(kernel)
        with torch.no_grad():
            want = _responses(*_discrete(A, B, dt, True), C, 20)
            torch.testing.assert_close(mixer.kernel(20), want, atol=1e-5, rtol=0)
            assert int(mixer.l_kernel) == 20


def test_minimal_s4d() -> None:
    """No B, a spectrum per channel, positive Im A, the product as a convolution of one tap."""
    torch.manual_seed(0)
    weights = {
        "D": _drawn(H),
        "kernel.C": _drawn(H, N, 2),
        "kernel.log_dt": torch.linspace(-4, -1, H).double(),
        "kernel.log_A_real": torch.log(torch.full((H, N), 0.5)).double() + 0.1 * _drawn(H, N),
        "kernel.A_imag": torch.pi * torch.arange(N).double().expand(H, N) + 0.1 * _drawn(H, N),
        "output_linear.0.weight": _drawn(2 * H, H, 1),
        "output_linear.0.bias": _drawn(2 * H),
    }
    A = torch.complex(-weights["kernel.log_A_real"].exp(), weights["kernel.A_imag"])
    dt, C = weights["kernel.log_dt"].exp()[:, None], torch.view_as_complex(weights["kernel.C"])
    modes = (C * (torch.exp(dt * A) - 1) / A)[..., None] * torch.exp((dt * A)[..., None] * torch.arange(15))
    kernel, x = 2 * modes.sum(1).real[None], _drawn(2, 15, H)
    plain = weights | {"output_linear.0.weight": weights["output_linear.0.weight"][..., 0]}
    want = _layer(kernel, plain, "", x)
    torch.testing.assert_close(_outputs(mixer_from_s4(weights), x), want, atol=1e-9, rtol=1e-9)


def test_real_states() -> None:
    """`is_real` sums real modes as if each stood for a pair."""
    torch.manual_seed(0)
    weights = {
        "D": _drawn(1, H), "kernel.C": _drawn(1, H, N), "kernel.B": _drawn(1, S, N), "kernel.A_real": _drawn(S, N),
        "kernel.inv_dt": torch.linspace(-4, -1, H).double()[:, None],
    }  # fmt: skip
    config, made = mixer_from_s4(weights, dt_transform="exp")
    assert config["output"] == "none" and config["init"] == "real"
    mixer = build_mixer(config, H).double()
    mixer.load_state_dict(made)
    A, B = -weights["kernel.A_real"].exp()[torch.arange(H) % S], weights["kernel.B"][0, torch.arange(H) % S]
    dt = weights["kernel.inv_dt"].exp()
    modes = (weights["kernel.C"][0] * B * (torch.exp(dt * A) - 1) / A)[..., None]
    want = 2 * (modes * torch.exp((dt * A)[..., None] * torch.arange(9))).sum(1)
    torch.testing.assert_close(mixer.kernel(9)[0].detach(), want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("transform", ["softplus", "relu", "sigmoid", "none"])
def test_other_transforms_of_the_real_part(transform: str) -> None:
    kernel = _kernel_weights(False)
    kernel["A_real"] = kernel["A_real"].exp()
    decay = {
        "softplus": nn.functional.softplus, "relu": lambda a: a + 1e-4, "sigmoid": torch.sigmoid, "none": lambda a: a,
    }[transform](kernel["A_real"])  # fmt: skip
    _, got = mixer_from_s4(_block(kernel, "layer."), dt_transform="softplus", real_transform=transform)
    torch.testing.assert_close(got["A_log"].exp(), decay)


def test_every_layer_of_a_model_is_found() -> None:
    """Blocks of version 4 in a model, whose own layers are called `layer` too; everything else is left alone."""
    weights: Weights = {"encoder.weight": _drawn(3, 3)}
    for i in range(2):
        block = _block(_kernel_weights(False), "layer.")
        weights |= {f"model.layers.{i}.layer.{n}": t + i for n, t in block.items()}
        weights[f"model.layers.{i}.norm.norm.weight"] = _drawn(H)
    found = layers_from_s4(weights, dt_transform="softplus")
    assert list(found) == ["model.layers.0.layer.", "model.layers.1.layer."]
    assert torch.equal(found["model.layers.1.layer."][1]["D"], weights["model.layers.1.layer.layer.D"][0])
    for config, made in found.values():
        build_mixer(config, H).load_state_dict(made)
    old = {f"layers.3.layer.kernel.{n}": t for n, t in _version_3(_kernel_weights(False)).items()}
    assert list(layers_from_s4(old | {"layers.3.layer.D": _drawn(1, H)})) == ["layers.3.layer."]
    with pytest.raises(CheckpointMismatch, match="no name ends in"):
        layers_from_s4({"encoder.weight": _drawn(3, 3)})


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"dt_transform": None}, ConfigError, "do not say how dt is stored"),
        ({}, {"real_transform": "tanh"}, ConfigError, "real_transform must be"),
        ({"layer.kernel.A_real": torch.full((S, N), -1.0)}, {"real_transform": "none"}, CheckpointMismatch, "negative"),
        ({"layer.kernel.A_real": torch.full((S, N), float("nan"))}, {}, CheckpointMismatch, "negative"),
        ({"layer.kernel.C": torch.zeros(1, H, N, dtype=torch.cfloat)}, {}, CheckpointMismatch, "view_as_real"),
        ({"layer.kernel.inv_dt": torch.zeros(H, N)}, {}, CheckpointMismatch, "inv_dt .* a dt per state"),
        ({"layer.kernel.C": torch.zeros(1, H, N + 1, 2)}, {}, CheckpointMismatch, "C"),
        ({"layer.D": torch.zeros(2, H)}, {}, CheckpointMismatch, "D .* Several heads"),
        ({"input_gate.weight": torch.zeros(H, H)}, {}, CheckpointMismatch, "input_gate"),
        ({"layer.D": None}, {}, CheckpointMismatch, "no D"),
        ({"layer.kernel.A_real": None}, {}, CheckpointMismatch, "kernel has only"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, options: dict, error: type, message: str) -> None:
    weights = _block(_kernel_weights(False), "layer.") | change
    weights = {n: t for n, t in weights.items() if t is not None}
    with pytest.raises(error, match=message):
        mixer_from_s4(weights, **{"dt_transform": "softplus", **options})
