"""Time every implementation of every op on the cases that the op names: `python -m seqlib.bench [op ...]`.

A wrong row has no speed: each contender first passes a gate against the reference. Then all of them take turns, so that
a disturbance of the machine meets them alike, and medians are reported beside the machine's own limits, measured in the
same run.
"""

from __future__ import annotations

import importlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib import native
from seqlib.bench.clock import ROTATED_BYTES, Timing, interleaved, limits, machine, use_threads
from seqlib.bench.gate import SHORT, Peer, check, forward, gradients, rows_of, shortened, with_leaves
from seqlib.dispatch import Op, op_names
from seqlib.errors import UnsupportedInput
from seqlib.ops.case import Case

__all__ = ["PEERS", "Peer", "Timing", "bench_op", "interleaved", "limits", "machine"]


def _conv_channels_first(t: dict[str, Any]) -> dict[str, Any]:
    x, weight = t["x"].transpose(1, 2).contiguous(), t["weight"][:, None].to(t["x"].dtype)
    bias = t["bias"] if t["bias"] is None else t["bias"].to(x.dtype)
    return {"x": x, "weight": weight, "bias": bias, "activation": t["activation"]}


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = F.conv1d(x, weight, bias, padding=weight.shape[-1] - 1, groups=x.shape[1])[..., : x.shape[-1]]
    return (F.silu(y) if activation else y).transpose(1, 2)


KINDS = ("forward", "forward_backward")
PEERS: dict[str, dict[str, Peer]] = {"causal_conv1d": {"torch conv1d": Peer(_conv_channels_first, _conv1d)}}


def _exponentials(t: dict[str, Any]) -> Callable[[], Any]:
    """Nothing but the exponentials of the scan, from L1 on one thread: compare it by the time of one core."""
    count = t["x"].numel() * t["A"].shape[1]
    tile = torch.linspace(-8, 0, 4096)
    return partial(torch.ops.seqlib.exp_floor.default, tile, count // tile.numel())


def _copy(t: dict[str, Any]) -> Callable[[], Any]:
    y = torch.empty_like(t["x"])
    return partial(y.copy_, t["x"])


# What no implementation can beat: timed beside the forward of an op, and not an implementation of it.
FLOORS: dict[str, dict[str, Callable[[dict[str, Any]], Callable[[], Any]]]] = {
    "selective_scan": {"floor: its exponentials": _exponentials},
    "causal_conv1d": {"floor: copy x to y": _copy},
}


def _expected(run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> float:
    """Seconds that a run will take, from two short ones: linear in seqlen, plus a square that some gradients have."""
    seqlen = next(v for v in inputs.values() if isinstance(v, Tensor)).shape[1]
    part = seqlen // 8
    if part < SHORT:
        return 0.0
    times = []
    for n in (part, 2 * part):
        short, tries = shortened(inputs, n), []
        for _ in range(2):
            start = time.process_time()  # the wall clock would show what else the machine does
            run(short)
            tries.append(time.process_time() - start)
        times.append(min(tries))
    square = max(0.0, times[1] - 2 * times[0]) / 2
    return 64 * square + 8 * max(0.0, times[0] - square)


def _prepared(kind: str, peer: Peer, inputs: dict[str, Any]) -> Callable[[], Any]:
    if kind == "forward":
        return partial(forward, peer, peer.prepare(inputs))
    return partial(gradients, peer, *with_leaves(peer, inputs))


def _bench_case(
    op: Op, case: Case, dtype: torch.dtype, peers: dict[str, Peer], threads: int, repeats: int, budget: float
) -> dict[str, Any]:
    inputs = case.inputs(dtype)
    rows, cannot = rows_of(op, inputs)
    contenders, patience = rows | peers, 6 * budget
    seconds = {
        (kind, name): _expected(lambda i, kind=kind, peer=peer: _prepared(kind, peer, i)(), inputs)  # type: ignore[misc]
        for kind in KINDS
        for name, peer in contenders.items()
    }
    gate = check(op, rows, peers, inputs, {name for name in contenders if seconds["forward", name] > patience})
    wrong = [name for name, verdict in gate["contenders"].items() if not verdict["passed"]]
    skipped = {
        f"{name} {kind}": f"one run would take about {expected:.0f} s"
        for (kind, name), expected in seconds.items()
        if expected > patience and name not in wrong
    }
    size = sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor))
    sets = [inputs, *(case.inputs(dtype, seed=i) for i in range(1, min(8, math.ceil(ROTATED_BYTES / size))))]
    result: dict[str, Any] = {
        "op": op.name,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "input_sets": len(sets),
    }
    result |= {"gate": gate, "cannot_run": cannot, "wrong": wrong, "skipped": skipped}
    for kind in KINDS:
        runs = {
            name: _in_turns([_prepared(kind, peer, i) for i in sets])
            for name, peer in contenders.items()
            if name not in wrong and f"{name} {kind}" not in skipped
        }
        if kind == "forward" and native.why_unavailable("cpu") is None:
            floors = FLOORS.get(op.name, {}).items()
            runs |= {name: _in_turns([prepare(i) for i in sets]) for name, prepare in floors}
        result[kind] = _timed(runs, threads, repeats, budget)
    scale = 0.5 if dtype == torch.bfloat16 else 1.0
    for name in result["forward"].keys() & contenders.keys():
        timing = result["forward"][name]
        timing["gflop_s"] = 1e-9 * case.flops / timing["wall_s"]
        timing["gb_s"] = 1e-9 * case.nbytes * scale / timing["wall_s"]
    return result


def _in_turns(runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    turns = itertools.cycle(runs)

    def run() -> Any:
        return next(turns)()

    return run


def _timed(
    runs: Mapping[str, Callable[[], Any]], threads: int, repeats: int, budget: float
) -> dict[str, dict[str, float]]:
    """Times of each, and how many times faster it is than the reference and than the first torch row."""
    with use_threads(threads):
        timings = {name: timing.as_dict() for name, timing in interleaved(runs, repeats, budget).items()}
    with use_threads(1):
        single = interleaved(runs, repeats, budget)
    for name, timing in timings.items():
        timing["one_core_s"] = single[name].as_dict()["cpu_s"]
    for base in ("reference", "torch"):
        found = [timing for name, timing in timings.items() if name.startswith(f"{base}/")]
        for timing in timings.values() if found else ():
            timing[f"over_{base}"] = found[0]["wall_s"] / timing["wall_s"]
            timing[f"over_{base}_one_core"] = found[0]["one_core_s"] / timing["one_core_s"]
    return timings


def bench_op(
    name: str,
    *,
    cases: Sequence[Case] | None = None,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    repeats: int = 15,
    budget: float = 5.0,
    peers: Mapping[str, Peer] | None = None,
) -> list[dict[str, Any]]:
    """Gate and time every row of one op, and its peers.

    Args:
        cases: what to run; None for the op's bench cases.
        dtype: float32 or bfloat16.
        threads: of the wall-clock timings; None for torch's own choice. Processor time is taken with one thread.
        budget: seconds for which each contender takes part in one comparison. One that would need more than six times
            as much for a single run is skipped, and said so.
        peers: further implementations by name, beside PEERS.

    Returns:
        One record per case: gate, who cannot run and why, who is wrong, and timings by contender.
    """
    if name not in op_names():
        raise UnsupportedInput(f"unknown op {name!r}; known: {', '.join(op_names())}")
    op: Op = importlib.import_module(f"seqlib.ops.{name}").OP
    if cases is None:
        cases = [c for c in importlib.import_module(f"seqlib.ops.{name}.cases").CASES if c.bench]
    everyone = PEERS.get(name, {}) | dict(peers or {})
    count = threads or torch.get_num_threads()
    return [_bench_case(op, case, dtype, everyone, count, repeats, budget) for case in cases]
