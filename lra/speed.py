"""State-space layers against the code that published them: same weights, same outputs, then the clock."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from seqlib.bench import Timing, interleaved, limits, machine
from seqlib.bench.clock import keep_freed_memory, use_threads
from seqlib.errors import SeqlibError
from seqlib.hf.convert_s4 import mixer_from_s4
from seqlib.mixers import Mixer, build_mixer
from seqlib.mixers.lti import TimeInvariant
from seqlib.ops import long_conv

__all__ = ["bench_state_spaces", "published_s4", "show_state_spaces"]

KINDS = ("forward", "forward_backward")
LONG = 1 << 20


def bench_state_spaces(
    peer: Path | None,
    *,
    batch: int = 8,
    seqlen: int = 2048,
    d_model: int = 256,
    d_state: int = 64,
    long: int | None = LONG,
    repeats: int = 7,
    budget: float = 60.0,
) -> dict[str, Any]:
    """Convolution, layers, kernels, decoding and one very long sequence, on as many threads as torch has.

    Args:
        peer: a checkout of state-spaces/s4; its layers need einops and scipy. None leaves them out.
        long: positions of the long sequence, batch 1; None leaves it out.

    Returns:
        A report for JSON.

    Raises:
        SeqlibError: results differ; what is wrong has no speed.
    """
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    x = torch.randn(batch, seqlen, d_model)
    report: dict[str, Any] = {"machine": machine(), "limits": limits(threads)}
    report["options"] = {
        "keeps_freed_memory": keep_freed_memory(), "threads": threads, "batch": batch, "seqlen": seqlen,
        "d_model": d_model, "d_state": d_state, "repeats": repeats, "budget_s": budget,
    }  # fmt: skip
    time = partial(_time, threads=threads, repeats=repeats, budget=budget)
    made: dict[str, Any] = {"convolution": time(_convolutions(x), x)}
    for name, ours, theirs in _layers(peer, d_model, d_state, seqlen):
        run = {"seqlib": _layer(ours)} | ({} if theirs is None else {"state-spaces/s4": _layer(theirs)})
        made[name] = time(run, x)
        kernel = time({"seqlib": partial(_kernel, ours)}, x)
        made[name]["kernel"] = {kind: kernel[kind]["seqlib"] for kind in KINDS}
        made[name]["kernel_share"] = {
            kind: kernel[kind]["seqlib"]["one_core_s"] / made[name][kind]["seqlib"]["one_core_s"] for kind in KINDS
        }
    report["state_spaces"] = made
    report["decoding_us"] = _decoding(d_model, d_state, repeats, budget)
    if long is not None:
        report["long"] = _long(long, d_model, d_state)
    return report


Run = Callable[[Tensor], tuple[Tensor, list[Tensor]]]
"""From x (batch, seqlen, d_model) to y of that shape and what gradients are taken of, x apart."""


def _convolutions(x: Tensor) -> dict[str, Run]:
    """Ours, and the few lines that everybody writes, with x in the layout that suits them."""
    d, length = x.shape[2], x.shape[1]
    kernel = (torch.randn(d, length) / length**0.5).requires_grad_()
    D = torch.randn(d).requires_grad_()

    def plain(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        u = x.transpose(1, 2)
        spectrum = torch.fft.rfft(u, 2 * length) * torch.fft.rfft(kernel, 2 * length)
        y = torch.fft.irfft(spectrum, 2 * length)[..., :length] + D[:, None] * u
        return y.transpose(1, 2), [kernel, D]

    return {"seqlib": lambda x: (long_conv(x, kernel, D=D)[0], [kernel, D]), "torch FFT": plain}


def _layers(
    peer: Path | None, d_model: int, d_state: int, seqlen: int
) -> list[tuple[str, TimeInvariant, nn.Module | None]]:
    """Name, our layer, and theirs with the same weights."""
    if peer is None:
        ours = {"s4d": {"kind": "s4d", "n_ssm": d_model}, "s4": {"kind": "s4", "n_ssm": d_model, "l_max": seqlen}}
        return [(name, _own({"d_state": d_state} | config, d_model), None) for name, config in ours.items()]
    diagonal, full = published_s4(peer)
    made = []
    for name, theirs in (
        ("s4d", diagonal.S4D(d_model, d_state=d_state, transposed=False)),
        ("s4", full.S4Block(d_model, d_state=d_state, transposed=False, dt_transform="softplus", verbose=False)),
    ):
        with torch.no_grad():
            theirs(torch.zeros(1, seqlen, d_model))  # S4 learns its length from its first input
        config, weights = mixer_from_s4(theirs.state_dict(), dt_transform="exp" if name == "s4d" else "softplus")
        ours_ = _own(config, d_model)
        ours_.load_state_dict(weights)
        made.append((name, ours_, theirs))
    return made


def _own(config: dict[str, Any], d_model: int) -> TimeInvariant:
    mixer = build_mixer(config, d_model)
    assert isinstance(mixer, TimeInvariant)
    return mixer


def published_s4(peer: Path) -> tuple[Any, Any]:
    """models/s4/s4d.py and models/s4/s4.py, with stand-ins for what they import and these layers do not use."""
    stand_ins: dict[str, dict[str, Any]] = {
        "pytorch_lightning.utilities": {"rank_zero_only": lambda f: f},
        "src.models.nn": {"DropoutNd": nn.Dropout},
    }
    for name, values in stand_ins.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        vars(sys.modules[name]).update(values)
    found = []
    for file in ("s4d", "s4"):
        path = peer / "models" / "s4" / f"{file}.py"
        if not path.exists():
            raise SeqlibError(f"{path} is not there; --peer-s4 takes a checkout of state-spaces/s4")
        spec = importlib.util.spec_from_file_location(f"published_{file}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    return found[0], found[1]


def _kernel(mixer: TimeInvariant, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return mixer.kernel(x.shape[1]), list(mixer.parameters())


def _layer(module: nn.Module) -> Run:
    return lambda x: (module(x)[0], list(module.parameters()))


def _time(
    runs: Mapping[str, Run], x: Tensor, *, threads: int, repeats: int, budget: float
) -> dict[str, dict[str, Any]]:
    """Forward as in training, and with the gradients of x and of all parameters; results must agree first."""
    outputs = {name: run(x)[0].detach() for name, run in runs.items()}
    want = list(outputs.values())[-1]
    for name, got in outputs.items():
        error = float((got - want).norm() / want.norm())
        if error > 1e-4:
            raise SeqlibError(f"{name}: outputs differ by {error:.1e} relative; no speed is reported")
    leaf = x.clone().requires_grad_()

    def both(run: Run) -> None:
        y, leaves = run(leaf)
        torch.autograd.grad(y.sum(), [leaf, *leaves], allow_unused=True)

    made = {}
    for kind, timed in (("forward", lambda run: run(leaf)), ("forward_backward", both)):
        contenders = {name: partial(timed, run) for name, run in runs.items()}
        with use_threads(threads):
            found: dict[str, Any] = _seconds(interleaved(contenders, repeats, budget))
        with use_threads(1):
            for name, timing in _seconds(interleaved(contenders, repeats, budget)).items():
                found[name]["one_core_s"] = timing["cpu_min_s"]
        made[kind] = found
        if len(runs) == 2:
            ours, theirs = found.values()
            found["ratio"] = theirs["wall_s"] / ours["wall_s"]
            found["ratio_one_core"] = theirs["one_core_s"] / ours["one_core_s"]
    return made


def _seconds(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: timing.as_dict() | {"cpu_min_s": min(timing.cpu)} for name, timing in timings.items()}


@torch.no_grad()
def _decoding(d_model: int, d_state: int, repeats: int, budget: float) -> dict[str, float]:
    """Microseconds of one position, batch 1, on one thread: the state update with its output, and the whole layer."""
    calls = 300
    found = {}
    for name, config in (("s4d_state_update", {"activation": "none", "output": "none"}), ("s4d_layer", {})):
        mixer: Mixer = build_mixer({"kind": "s4d", "d_state": d_state, **config}, d_model).eval()
        x, state = torch.randn(1, d_model), mixer.initial_state(1)

        def run(mixer: Mixer = mixer, x: Tensor = x, state: Any = state) -> None:
            for _ in range(calls):
                mixer.step(x, state)

        with use_threads(1):
            found[name] = 1e6 * min(interleaved({name: run}, repeats, budget)[name].cpu) / calls
    return found


def _long(seqlen: int, d_model: int, d_state: int) -> dict[str, Any]:
    """Peak memory and seconds of S4D on one sequence, forward alone and with gradients, each in its own process."""
    found: dict[str, Any] = {"seqlen": seqlen}
    for kind in KINDS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[kind] = pool.apply(_one_long, (kind, seqlen, d_model, d_state, torch.get_num_threads()))
    return found


def _one_long(kind: str, seqlen: int, d_model: int, d_state: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    mixer = build_mixer({"kind": "s4d", "d_state": d_state}, d_model)
    x = torch.randn(1, seqlen, d_model).requires_grad_(kind == "forward_backward")

    def run() -> None:
        with torch.set_grad_enabled(x.requires_grad):
            y, _ = mixer(x)
        if y.requires_grad:
            y.sum().backward()

    seconds = interleaved({kind: run}, 0, 0.0)[kind].wall[0]
    from .evaluate import peak_memory  # after the peak: it brings transformers along

    return {"seconds": seconds, "peak_gb": 1e-9 * peak_memory()["process"]}


def show_state_spaces(report: dict[str, Any], json_file: Path | None, console: Console) -> None:
    """Print the figures, and write everything to `json_file`."""
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("", "", "seqlib ms", "peer ms", "x", "x one core", "kernel")
    for name, made in report["state_spaces"].items():
        for kind in KINDS:
            times = [f"{1e3 * t['wall_s']:.1f}" for t in made[kind].values() if isinstance(t, dict)]
            ratios = [f"{made[kind][key]:.1f}" for key in ("ratio", "ratio_one_core") if key in made[kind]]
            share = f"{100 * made['kernel_share'][kind]:.0f} %" if "kernel_share" in made else ""
            blank = [""] * (2 - len(times)), [""] * (2 - len(ratios))
            table.add_row(name, kind.replace("_", " + "), *times, *blank[0], *ratios, *blank[1], share)
    console.print(table)
    for name, us in report["decoding_us"].items():
        console.print(f"{name.replace('_', ' ')}: {us:.0f} microseconds a position")
    for kind in KINDS if "long" in report else ():
        made = report["long"][kind]
        length = report["long"]["seqlen"]
        console.print(f"{length:,} positions, {kind}: {made['seconds']:.1f} s, {made['peak_gb']:.1f} GB")
