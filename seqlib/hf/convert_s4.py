"""Layers of state-spaces/s4 as ours: a config and a state dict. Pure maps on names and values; nothing is loaded."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import CheckpointMismatch, ConfigError
from seqlib.mixers import build_mixer
from seqlib.mixers.s4 import S4

__all__ = ["layers_from_s4", "mixer_from_s4"]

Converted = tuple[dict[str, Any], dict[str, Tensor]]


class _Layout(NamedTuple):
    """How one generation of the code names and stores a spectrum."""

    name: str
    real: str
    imag: str
    dt: str
    sign: int
    """Of Im A as stored."""
    dt_transform: str | None
    discretization: str | None


_LAYOUTS = (
    _Layout("v4", "A_real", "A_imag", "inv_dt", -1, None, "zoh"),
    _Layout("v3 S4", "inv_w_real", "w_imag", "log_dt", 1, "exp", None),
    _Layout("v3 S4", "log_w_real", "w_imag", "log_dt", 1, "exp", None),
    _Layout("v3 S4D", "inv_A_real", "A_imag", "log_dt", 1, "exp", "bilinear"),
    _Layout("minimal S4D", "log_A_real", "A_imag", "log_dt", 1, "exp", "zoh"),
)
_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "softplus": F.softplus,
    "relu": lambda x: F.relu(x) + 1e-4,
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}
_KERNEL = re.compile(r"(?:layer\.)?kernel\.(?:kernel\.)?(\w+)")
_PLAIN = {
    "D": "D",
    "layer.D": "D",
    "output_linear.0.weight": "readout.proj.weight",
    "output_linear.0.bias": "readout.proj.bias",
}


def mixer_from_s4(
    weights: Mapping[str, Tensor],
    *,
    dt_transform: str | None = None,
    real_transform: str = "exp",
    discretization: str | None = None,
    activation: str = "gelu",
    l_max: int | None = None,
) -> Converted:
    """One layer of state-spaces/s4, of version 4, of version 3 or the minimal S4D, as an `s4` or `s4d` mixer.

    What shapes say is read off them: low rank, sizes, n_ssm, both directions, the product at the end. The rest:

    Args:
        weights: tensors by their names within the layer, as `kernel.C`, `layer.kernel.C` or `kernel.kernel.C`.
        dt_transform: "softplus" or "exp"; version 4 has both, so there it must be given (`dt_transform` of the
            checkpoint's config, "softplus" in configs/model/layer/s4.yaml). The other layouts have "exp".
        real_transform: "exp", "softplus", "relu", "sigmoid" or "none", as the checkpoint's config has it.
        discretization: of S4D, "zoh" or "bilinear"; None is the default of the layout.
        activation: after the convolution.
        l_max: positions that `C` shall be stored for. None keeps those of the checkpoint; another number rewrites C,
            with a warning. It must be given where C has not met a sequence yet (l_kernel 0).

    Returns:
        A mixer config as a dict, and a state dict for `build_mixer(config, d_model)`.

    Raises:
        CheckpointMismatch: names, shapes or values do not fit.
        ConfigError: what the weights cannot say is missing.

    Source: state-spaces/s4, models/s4/s4.py, models/s4/s4d.py and checkpoints/convert_v3_to_v4.py.
    """
    kernel, made = _sort(weights)
    layout = next((known for known in _LAYOUTS if known.real in kernel), None)
    if layout is None or not {"C", layout.dt} <= kernel.keys():
        raise CheckpointMismatch(f"not a layer of state-spaces/s4: its kernel has only {', '.join(sorted(kernel))}")
    dt_transform = dt_transform or layout.dt_transform
    if dt_transform not in ("exp", "softplus"):
        raise ConfigError(
            f"{layout.name} weights do not say how dt is stored; pass dt_transform='softplus' or 'exp', as in the "
            f"config of the checkpoint (got {dt_transform!r})"
        )
    low_rank, real = "P" in kernel, layout.imag not in kernel
    d_model, n = made["D"].shape[-1], kernel[layout.real].shape[-1]
    A_log = _log_real(kernel[layout.real], real_transform).view(-1, n)
    directions = 1 if kernel["C"].dim() == 3 and not real else len(kernel["C"])
    config: dict[str, Any] = {
        "kind": "s4" if low_rank else "s4d",
        "d_state": n if real else 2 * n,
        "n_ssm": len(A_log),
        "dt_transform": dt_transform,
        "activation": activation,
        "bidirectional": directions == 2,
        "output": _output(made, d_model),
    }
    made |= {
        "D": made["D"].reshape(-1),
        "inv_dt": kernel[layout.dt].reshape(-1),
        "A_log": A_log,
        # The published sum takes the real numbers of `is_real` for halves of pairs too.
        "C": 2 * kernel["C"] if real else _axes(kernel["C"], 4),
        "B": _axes(kernel["B"], 2 if real else 3) if "B" in kernel else _one(A_log),
    }
    if not real:
        made["A_imag"] = layout.sign * kernel[layout.imag]
    if low_rank:
        stored = int(kernel.get("l_kernel", kernel.get("L", torch.tensor(0))))
        # Decays this slow are those of fourier, whose kernels need float64.
        measure = "legt" if len(kernel["P"]) == 2 else "fourier" if float(A_log.min()) < math.log(0.01) else "legs"
        config |= {"init": measure, "l_max": stored or l_max}
        made |= {"P": kernel["P"], "l_kernel": torch.tensor(stored or 0)}
    else:
        config |= {"init": "real" if real else "legs"}
        config |= {"discretization": discretization or layout.discretization}
    _check(config, made, d_model)
    if low_rank:
        made = _at_length(config, made, d_model, l_max)
    return config, made


def layers_from_s4(weights: Mapping[str, Tensor], **options: Any) -> dict[str, Converted]:
    """Every such layer of a model's weights, by the prefix of its names; options as for `mixer_from_s4`."""
    found = {}
    for convolution in {m[1] for name in weights if (m := re.fullmatch(r"(.*?)kernel\.(?:kernel\.)?C", name))}:
        # A block of version 4 holds its convolution one level deeper than the product behind it.
        nested = f"{convolution}kernel.inv_dt" in weights and f"{convolution}output_linear.0.weight" not in weights
        prefix = convolution.removesuffix("layer.") if nested else convolution
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(f"{convolution}kernel.") or name.removeprefix(prefix) in _PLAIN
        }
        found[prefix] = mixer_from_s4(own, **options)
    if not found:
        raise CheckpointMismatch("there is no layer of state-spaces/s4 here: no name ends in kernel.C")
    return dict(sorted(found.items()))


def _sort(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What belongs to the kernel, by its bare name, and the rest under our names."""
    kernel, made, unknown = {}, {}, []
    for name, tensor in weights.items():
        if tensor.is_complex():
            raise CheckpointMismatch(
                f"{name} is {tensor.dtype}; this layout stores complex numbers as pairs of reals (torch.view_as_real)"
            )
        inside = _KERNEL.fullmatch(name)
        if inside:
            kernel[inside[1]] = tensor
        elif name in _PLAIN:
            made[_PLAIN[name]] = tensor
        else:
            unknown.append(name)
    known = {"C", "B", "P", "L", "l_kernel"} | {n for layout in _LAYOUTS for n in (layout.real, layout.imag, layout.dt)}
    unknown += sorted(kernel.keys() - known)
    if unknown or "D" not in made:
        wrong = f"it has {', '.join(unknown[:8])}" if unknown else "it has no D"
        raise CheckpointMismatch(f"not a layer of state-spaces/s4 that seqlib knows: {wrong}")
    return kernel, made


def _log_real(stored: Tensor, transform: str) -> Tensor:
    """log(-Re A) of what is stored for it."""
    if transform not in _TRANSFORMS:
        raise ConfigError(f"real_transform must be one of {', '.join(_TRANSFORMS)}, got {transform!r}")
    decay = _TRANSFORMS[transform](stored)
    if not bool((decay > 0).all() and decay.isfinite().all()):
        raise CheckpointMismatch(
            f"Re A must be negative, and with real_transform={transform!r} it reaches {-float(decay.min()):.3g}: "
            "such a layer grows without bound. Is it the transform of the checkpoint's config?"
        )
    return stored if transform == "exp" else decay.log()


def _output(made: dict[str, Tensor], d_model: int) -> str:
    """Which product follows, and its weight without the axes of a convolution."""
    weight = made.get("readout.proj.weight")
    if weight is None:
        return "none"
    made["readout.proj.weight"] = weight.view(*weight.shape[:2])
    made["readout.proj.bias"] = made["readout.proj.bias"].reshape(-1)
    return "glu" if len(weight) == 2 * d_model else "linear"


def _axes(tensor: Tensor, count: int) -> Tensor:
    """With a first axis of 1 put before it or taken off."""
    return tensor[None] if tensor.dim() < count else tensor.squeeze(0) if tensor.dim() > count else tensor


def _one(A_log: Tensor) -> Tensor:
    """B of the minimal layer, which has none."""
    return torch.stack([torch.ones_like(A_log), torch.zeros_like(A_log)], -1)


def _check(config: dict[str, Any], made: dict[str, Tensor], d_model: int) -> None:
    with torch.device("meta"):
        wanted = build_mixer(config | ({"l_max": 1} if config["kind"] == "s4" else {}), d_model).state_dict()
    wrong = [
        f"{n} {tuple(t.shape)} for {tuple(wanted[n].shape)}" for n, t in made.items() if t.shape != wanted[n].shape
    ]
    wrong += [f"no {n}" for n in wanted.keys() - made.keys()]
    if wrong:
        raise CheckpointMismatch(
            f"these weights do not fit a {config['kind']} of width {d_model} and d_state {config['d_state']}: "
            f"{'; '.join(sorted(wrong))}. Several heads per channel and a dt per state are not supported"
        )


def _at_length(config: dict[str, Any], made: dict[str, Tensor], d_model: int, l_max: int | None) -> dict[str, Tensor]:
    """C stored for l_max positions: truncated if it is plain, rewritten if it is stored for another number."""
    stored = int(made["l_kernel"])
    if not stored and l_max is None:
        raise CheckpointMismatch(
            "C is plain (l_kernel is 0 or absent): this layer has not met a sequence yet, or comes from code that "
            "never truncated C; pass l_max, the length it is trained for"
        )
    wanted = l_max or stored
    config["l_max"] = wanted
    if stored == wanted:
        return made
    mixer = build_mixer(config, d_model)
    assert isinstance(mixer, S4)
    mixer.load_state_dict(made)
    if stored:
        warnings.warn(f"C was stored for {stored} positions and is rewritten for {wanted}", stacklevel=3)
        mixer.extend(wanted)
    else:
        mixer.truncate(wanted)
    return mixer.state_dict()
