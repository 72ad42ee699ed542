"""Who takes part in a comparison, and the gate that each must pass: a wrong result has no speed."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqlib.dispatch import Op, resolve
from seqlib.errors import BackendUnavailable
from seqlib.ops.case import outputs

__all__ = ["SHORT", "Peer", "check", "forward", "gradients", "rows_of", "shortened", "with_leaves"]

SHORT = 64  # positions of the gate on gradients
REFERENCE = "reference/reference"
# Bounds on outputs and on gradients: largest error over the largest value in float32, ratio of RMS in 16 bits.
BOUNDS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (6e-3, 1e-2)}


@dataclass(frozen=True)
class Peer:
    """Someone else's implementation of an op.

    Args:
        prepare: from the arguments of our public function by name to the peer's own, in its own layout; not timed.
        run: the call; returns y as ours, with seqlen second.
    """

    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    run: Callable[..., Any]


def rows_of(op: Op, inputs: dict[str, Any]) -> tuple[dict[str, Peer], dict[str, str]]:
    """The op's rows that can take these inputs, in the form of peers, and why the others cannot."""
    function = getattr(importlib.import_module(f"seqlib.ops.{op.name}"), op.function)
    can, cannot = {}, {}
    for impl in op.impls:
        name = f"{impl.name}/{impl.form}"
        try:
            resolve(op, op.facts(**inputs), impl.form, impl.name)
            can[name] = Peer(dict, functools.partial(function, form=impl.form, backend=impl.name))
        except BackendUnavailable as error:
            lines = (line.strip() for line in str(error).splitlines())
            cannot[name] = next(line for line in lines if line.startswith(f"{name}: ")).removeprefix(f"{name}: ")
    return can, cannot


def _tensors(inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {k: change(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _exact(t: Tensor, wide: torch.dtype) -> Tensor:
    if t.is_complex():
        return t.to(torch.complex128)
    return t.to(wide) if t.is_floating_point() else t


def shortened(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """The first `length` positions of every tensor that begins with the (batch, seqlen) of the first one."""
    lead = next(v for v in inputs.values() if isinstance(v, Tensor)).shape[:2]

    def cut(t: Tensor) -> Tensor:
        return t[:, :length] if t.dim() > 2 and t.shape[:2] == lead else t

    return _tensors(inputs, cut)


def with_leaves(peer: Peer, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The peer's own arguments as leaves of a gradient."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(t.is_floating_point() or t.is_complex())

    made = _tensors(peer.prepare(inputs), leaf)
    return made, [v for v in made.values() if isinstance(v, Tensor) and v.requires_grad]


def forward(peer: Peer, arguments: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return outputs(peer.run(**arguments))


def gradients(peer: Peer, arguments: dict[str, Any], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    y = outputs(peer.run(**arguments))[0]
    return torch.autograd.grad(y, leaves, _incoming(y.shape, y.stride(), y.dtype, y.device), allow_unused=True)


@functools.lru_cache(8)
def _incoming(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A gradient of y in the layout of y: no one pays for it, nor for another's layout."""
    values = torch.linspace(-1, 1, shape[-1], dtype=dtype, device=device) if shape else torch.ones((), device=device)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(values)


def _error(got: Sequence[Tensor | None], want: Sequence[Tensor | None], dtype: torch.dtype) -> float:
    """The largest error of the pairs: over the largest value in float32, as a ratio of RMS in 16 bits."""
    worst = 0.0
    for a, b in zip(got, want):
        if a is None or b is None or not b.numel():
            continue
        if a.shape != b.shape:
            return math.inf
        difference, size = (a.to(b.dtype) - b).abs().double(), b.abs().double()
        if dtype == torch.float32:
            error = float(difference.max()) / max(1.0, float(size.max()))
        else:
            error = float(difference.square().mean().sqrt() / size.square().mean().sqrt().clamp(min=1e-12))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def check(
    op: Op, rows: dict[str, Peer], peers: dict[str, Peer], inputs: dict[str, Any], slow: set[str]
) -> dict[str, Any]:
    """Errors of every contender: outputs at full length and shortened, and of our rows the gradients, shortened.

    The truth is the reference on the same numbers in float64 (float32 for 16-bit inputs, as in the tests). Where it is
    among the `slow` ones, the torch row in float64 stands in at full length. The slow are themselves checked shortened.
    """
    dtype = op.facts(**inputs).dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    exact = _tensors(inputs, lambda t: _exact(t, wide))
    torch_row = next((name for name in rows if name.startswith("torch/")), REFERENCE)
    judge = torch_row if REFERENCE in slow else REFERENCE
    short, short_exact = shortened(inputs, SHORT), shortened(exact, SHORT)
    truth, short_truth = forward(rows[judge], exact), forward(rows[REFERENCE], short_exact)
    true_gradients = gradients(rows[REFERENCE], *with_leaves(rows[REFERENCE], short_exact))
    verdicts = {}
    for name, peer in (rows | peers).items():
        verdict: dict[str, Any] = {"short_error": _error(forward(peer, peer.prepare(short)), short_truth, dtype)}
        if name not in slow:
            verdict["error"] = _error(forward(peer, peer.prepare(inputs)), truth, dtype)
        verdict["passed"] = max(verdict.values()) <= BOUNDS[dtype][0]
        if name in rows:
            error = _error(gradients(peer, *with_leaves(peer, short)), true_gradients, dtype)
            verdict |= {"gradient_error": error, "passed": verdict["passed"] and error <= BOUNDS[dtype][1]}
        verdicts[name] = verdict
    return {
        "truth": f"{judge} in {wide}".replace("torch.", ""),
        "short_seqlen": SHORT,
        "bounds": dict(zip(("outputs", "gradients"), BOUNDS[dtype])),
        "contenders": verdicts,
    }
