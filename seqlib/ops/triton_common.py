"""What the Triton rows share: tile sizes, how input dtypes are multiplied, launching, and the gate.

Compilers for some devices give wrong products in silence, so no configuration runs before its results were compared
with the torch form on that device, with that Triton and that assembler. What passed is kept in a table, by the op, its
sizes and the versions of both: `triton_admitted.json` beside this file for known machines, and one in the user's cache.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.nvidia import compiler as nvidia

from seqlib import native
from seqlib.dispatch import Verdict
from seqlib.ops.case import outputs

__all__ = [
    "Products",
    "admit",
    "capability",
    "chosen",
    "configuration",
    "launch",
    "leading",
    "products",
    "tile",
    "trial",
]

SHIPPED = Path(__file__).with_name("triton_admitted.json")
# Largest errors that a configuration may have on outputs and gradients: of the largest value, in 16 bits as RMS.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (6e-3, 1e-2), torch.float16: (6e-3, 1e-2)}


_live: dict[str, Any] = {}


class Products(NamedTuple):
    """How tiles are multiplied: dtype of operands and precision of float32 ones; the same for operands that hold large
    and small factors side by side, for which bfloat16 has no digits; dtype of states that wait for the gradients."""

    dot: tl.dtype
    precision: str
    fine: tl.dtype
    fine_precision: str
    stored: torch.dtype


def products(dtype: torch.dtype) -> Products:
    """float32 keeps its precision; float16 is widened, since scores and states may leave its range."""
    if dtype == torch.bfloat16:
        return Products(tl.bfloat16, "tf32", tl.float32, "tf32", torch.bfloat16)
    precision = "tf32" if dtype == torch.float16 else "tf32x3"
    return Products(tl.float32, precision, tl.float32, precision, torch.float32)


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as Triton counts it, 90 for Hopper. What is not a CUDA device is taken for the smallest."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile(size: int, largest: int) -> int:
    """The power of two that covers `size`, at least 16 as matrix units ask for, at most `largest`."""
    return min(max(16, triton.next_power_of_2(size)), largest)


def leading(*tensors: Tensor | None) -> tuple[int, ...]:
    """The first three strides of each tensor, zeros for None. The last axis is contiguous."""
    return tuple(s for t in tensors for s in (t.stride()[:3] if t is not None else (0, 0, 0)))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its tensors; the one place through which all launches go."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=True, **options)


@functools.cache
def configuration(op: str, dtype: torch.dtype, arch: int, *about: object) -> str:
    """The name of a plan in the table: "op sizes dtype sm_90 triton 3.6.0 ptxas 12.8.93"."""
    words = (op, *about, str(dtype).removeprefix("torch."), f"sm_{arch}", "triton", triton.__version__)
    return " ".join(map(str, (*words, "ptxas", _assembler(arch))))


@functools.cache
def _assembler(arch: int) -> str:
    told = subprocess.run([nvidia.get_ptxas(arch).path, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", told.stdout)
    return found[1] if found else told.stdout.strip()


def chosen(name: str, candidates: Sequence[Any]) -> Any:
    """The plan admitted under this name, the first candidate as long as none was judged."""
    if name not in _live:
        admitted = _table().get(name, {}).get("plan")
        _live[name] = next((c for c in candidates if _text(c) == admitted), candidates[0])
    return _live[name]


def admit(name: str, candidates: Sequence[Any], trial: Callable[[], str]) -> Verdict:
    """Admit under this name the first candidate with which `trial` finds no fault, once for all."""
    table = _table()
    if name not in table:
        rejected: dict[str, str] = {}
        table[name] = {"plan": None, "rejected": rejected}
        for plan in candidates:
            _live[name] = plan
            try:
                fault = trial()
            except (triton.TritonError, RuntimeError) as error:  # too large for this device, or its assembler fails
                fault = str(error).splitlines()[0]
            if not fault:
                table[name]["plan"] = _text(plan)
                break
            rejected[_text(plan)] = fault
        _keep(name, table[name])
    entry = table[name]
    if entry["plan"] is None:
        faults = "; ".join(f"{plan}: {fault}" for plan, fault in entry["rejected"].items())
        return Verdict(f"no configuration gives right results here ({name}): {faults}; try another Triton or ptxas")
    return Verdict(note=f"({entry['plan']}, admitted for {name})")


def trial(row: Callable[..., Any], truth: Callable[..., Any], inputs: dict[str, Any]) -> str:
    """What is wrong with the outputs and gradients of `row` beside those of `truth` in float64, twice over: an error
    that moves is a race. Nothing when they agree."""
    tensors = {k: t for k, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()}
    dtype = next(iter(tensors.values())).dtype
    exact = inputs | {k: t.double() for k, t in tensors.items()}
    want, first, second = _results(truth, exact), _results(row, inputs), _results(row, inputs)
    for name, right in want.items():
        difference, size = (first[name].double() - right).abs(), right.abs()
        if dtype == torch.float32:
            error = float(difference.max() / size.max().clamp(min=1.0))
        else:
            error = float(difference.square().mean().sqrt() / size.square().mean().sqrt().clamp(min=1e-12))
        if not error <= BOUNDS[dtype]["gradient" in name]:
            return f"{name} is off by {error:.1e}"
        if not torch.equal(first[name], second[name]):
            return f"{name} differs from run to run"
    return ""


def _results(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {
        k: t.detach().requires_grad_() for k, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    with torch.enable_grad():
        made = outputs(function(**inputs | leaves))
        given = [torch.arange(t.numel(), device=t.device).cos().view(t.shape).to(t.dtype) for t in made]
        grads = torch.autograd.grad(made, list(leaves.values()), given)
    named = {f"output {i}": t.detach() for i, t in enumerate(made)}
    return named | {f"gradient of {k}": t for k, t in zip(leaves, grads)}


def _text(plan: Any) -> str:
    return " ".join(str(v) for v in plan).replace(", ", ",").replace("(", "").replace(")", "")


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return {
        name: entry
        for path in (SHIPPED, _own())
        if path.is_file()
        for name, entry in json.loads(path.read_text()).items()
    }


def _own() -> Path:
    return native._cache_folder() / "triton_admitted.json"


def _keep(name: str, entry: dict[str, Any]) -> None:
    """Into the user's table, whole at any moment: other processes read and write it too."""
    path = _own()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known | {name: entry}, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
