"""Build, check and time every op on the GPU against every peer that is installed: `python -m seqlib.bench gpu`.

Each contender first agrees with the reference on a short input, outputs and gradients; a wrong one has no speed. Times
are medians of CUDA events with a cold cache. Beside them stands the roofline: the larger of the bytes that must move at
the copy speed, and the operations at the speed of a large matrix product, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seqlib import native
from seqlib.bench.gate import Peer, check, rows_of, with_leaves
from seqlib.bench.gpu_cases import CASES, GpuCase
from seqlib.bench.peers import PEERS, YARDSTICKS
from seqlib.errors import SeqlibError
from seqlib.ops.case import outputs

__all__ = ["SHAPES", "main", "run"]

SHAPES = ((1, 131072), (1, 16384), (4, 8192), (8, 2048), (16, 2048))  # batch, seqlen
SHORT = 256  # positions of the check; some peers want a power of two
DEVICE = "cuda"
L2_BYTES = 256e6  # overwritten before each run, so that nothing is found in the cache


@dataclass(frozen=True)
class Limits:
    """What this GPU does at best: copied bytes (read and written) and operations of a matrix product, per second."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, nbytes: float, flops: float) -> float:
        return max(nbytes / self.bytes_per_s, flops / self.flops_per_s)


def timed(run: Callable[[], Any], seconds: float = 0.5, least: int = 5) -> float:
    """Median seconds of a run on the device, cold, within about `seconds` of wall time."""
    cache = torch.empty(int(L2_BYTES) // 4, device="cuda")
    times: list[float] = []
    run()
    run()
    torch.cuda.synchronize()
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < 100):
        cache.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e-3 * start.elapsed_time(stop))
    return statistics.median(times)


def limits() -> Limits:
    a = torch.ones(1 << 28, dtype=torch.bfloat16, device="cuda")
    b = torch.empty_like(a)
    m = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copied = timed(lambda: b.copy_(a))
    return Limits(2 * a.nbytes / copied, 2 * 8192**3 / timed(lambda: m @ m))


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    made: dict[str, Any] = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "arch": native.device_arch(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "native": native.why_unavailable("cuda") or "ready",
        "peers": {name: sorted(peers) for name, peers in PEERS.items()},
    }
    return made


def _gate(case: GpuCase, contenders: Mapping[str, Peer], rows: Mapping[str, Peer]) -> dict[str, Any]:
    """Verdicts of `seqlib.bench.gate` on a short input of this case."""
    mine = {name: peer for name, peer in contenders.items() if name in rows}
    others = {name: peer for name, peer in contenders.items() if name not in rows}
    reference = {"reference/reference": rows["reference/reference"]}
    with torch.device(DEVICE):
        inputs = case.build(2, SHORT)
    return check(case.op, mine | reference, others, inputs, set())["contenders"]


def _runs(peer: Peer, inputs: dict[str, Any], backward: bool) -> Callable[[], Any]:
    if not backward:
        arguments = peer.prepare(inputs)

        def forward() -> Any:
            with torch.no_grad():
                return peer.run(**arguments)

        return forward
    arguments, leaves = with_leaves(peer, inputs)
    dy = torch.randn_like(outputs(peer.run(**arguments))[0])
    return lambda: torch.autograd.grad(outputs(peer.run(**arguments))[0], leaves, dy, allow_unused=True)


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def bench_case(
    case: GpuCase, shape: tuple[int, int], best: Limits, seconds: float, without: Sequence[str] = ()
) -> dict[str, Any]:
    """One record: verdicts, failures, and milliseconds with roofline and ratios by contender."""
    with torch.device(DEVICE):
        inputs = case.build(*shape)
    rows, cannot = rows_of(case.op, inputs)
    contenders = {n: p for n, p in rows.items() if not n.startswith("reference")} | PEERS.get(case.op.name, {})
    contenders = {n: p for n, p in contenders.items() if n not in without}
    record: dict[str, Any] = {"op": case.op.name, "case": case.name, "batch": shape[0], "seqlen": shape[1]}
    record |= {"cannot_run": cannot, "failed": {}, "gate": {}}
    right = {}
    for name, peer in contenders.items():
        try:
            record["gate"][name] = _gate(case, {name: peer}, rows)[name]
            if record["gate"][name]["passed"]:
                right[name] = peer
        except (RuntimeError, TypeError, ValueError, SeqlibError) as error:  # a peer may refuse in its own words
            record["failed"][name] = _failure(error)
    right |= YARDSTICKS.get(case.op.name, {})
    for kind in ("forward", "forward_backward"):
        backward = kind == "forward_backward"
        floor = best.seconds(case.nbytes(*shape) * (1 + 2 * backward), case.flops(*shape) * (1 + 2 * backward))
        record[kind] = times = {}
        for name, peer in right.items():
            try:
                ms = 1e3 * timed(_runs(peer, inputs, backward), seconds)
            except RuntimeError as error:  # out of memory, or a kernel that the peer lacks
                record["failed"][f"{name} {kind}"] = _failure(error)
                continue
            times[name] = {
                "ms": ms,
                "tflop_s": 1e-9 * case.flops(*shape) * (1 + 2 * backward) / ms,
                "gb_s": 1e-6 * case.nbytes(*shape) * (1 + 2 * backward) / ms,
                "of_roofline": 1e3 * floor / ms,
            }
        others = [t["ms"] for name, t in times.items() if _is_peer(case.op.name, name)]
        for t in times.values() if others else ():
            t["over_best_peer"] = min(others) / t["ms"]
    return record


def _is_peer(op: str, name: str) -> bool:
    ours = name.partition("/")[0] in ("native", "triton", "torch", "reference")
    return not ours and name not in YARDSTICKS.get(op, {})


def run(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    budget: float,
    without: Sequence[str] = (),
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """All records within about `budget` seconds; what no time was left for is named under "left_out".

    Args:
        without: contenders that do not take part; some peers try configurations for minutes when first called.
        keep: called with the report after every record, since a machine may be taken back at any time.
    """
    started = time.perf_counter()
    best = limits()
    facts = machine()
    report: dict[str, Any] = {"machine": facts, "limits": best.__dict__, "results": [], "left_out": []}
    chosen = [case for case in CASES if not names or case.op.name in names]
    work = [(case, shape) for shape in shapes for case in chosen if not case.longest or shape[1] <= case.longest]
    for done, (case, shape) in enumerate(work):
        left = budget - (time.perf_counter() - started)
        if left < 2:
            report["left_out"] += [f"{c.name} {s[0]}x{s[1]}" for c, s in work[done:]]
            break
        record = bench_case(case, shape, best, min(0.5, left / (len(work) - done) / 12), without)
        report["results"].append(record)
        show(record)
        keep(report)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    report["seconds"] = time.perf_counter() - started
    return report


def show(record: dict[str, Any]) -> None:
    for kind in ("forward", "forward_backward"):
        print(f"{record['op']} {record['case']} {record['batch']}x{record['seqlen']} {kind.replace('_', ' + ')}")
        for name, t in sorted(record[kind].items(), key=lambda item: item[1]["ms"]):
            ratio = f"{t['over_best_peer']:6.2f}x" if "over_best_peer" in t else ""
            print(
                f"  {name:28}{t['ms']:10.3f} ms {t['tflop_s']:8.1f} TFLOP/s {t['gb_s']:7.0f} GB/s "
                f"{100 * t['of_roofline']:5.1f} % of the roofline {ratio}"
            )
    for name, verdict in record["gate"].items():
        if not verdict["passed"]:
            print(f"  WRONG, not timed: {name}: {verdict}")
    for name, reason in record["failed"].items():
        print(f"  failed: {name}: {reason}")


def draw(report: dict[str, Any], folder: Path) -> None:
    """One chart for each case and kind: milliseconds over positions, one line per contender, with the roofline."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for case in dict.fromkeys(r["case"] for r in report["results"]):
        records = [r for r in report["results"] if r["case"] == case]
        labels = [f"{r['batch']}x{r['seqlen']}" for r in records]
        for kind in ("forward", "forward_backward"):
            figure, axes = plt.subplots(figsize=(7, 4))
            for name in dict.fromkeys(n for r in records for n in r[kind]):
                axes.plot(labels, [r[kind].get(name, {}).get("ms") for r in records], "o-", label=name)
            axes.set(title=f"{case}, {kind.replace('_', ' + ')}", ylabel="ms", yscale="log", xlabel="batch x seqlen")
            axes.legend(fontsize=8)
            figure.savefig(folder / f"{case}_{kind}.svg", bbox_inches="tight")
            plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqlib.bench gpu", description="time the ops on the GPU")
    parser.add_argument("ops", nargs="*", metavar="op", help="all if none is given")
    parser.add_argument("--shapes", default=",".join(f"{b}x{s}" for b, s in SHAPES), help="such as 1x16384,8x2048")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything, building apart")
    parser.add_argument("--without", default="", metavar="NAME,...", help="such as vendor/chunked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written anew after every shape of every case")
    parser.add_argument("--charts", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    known = sorted({case.op.name for case in CASES})
    if unknown := sorted(set(options.ops) - set(known)):
        parser.error(f"unknown op {', '.join(unknown)}; known: {', '.join(known)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; this command times one")
    shapes = [(int(b), int(s)) for b, _, s in (text.partition("x") for text in options.shapes.split(","))]

    def keep(report: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    report = run(options.ops, shapes, options.budget, options.without.split(","), keep)
    keep(report)
    if options.charts:
        draw(report, options.charts)
    wrong = [f"{r['case']}: {n}" for r in report["results"] for n, v in r["gate"].items() if not v["passed"]]
    if wrong:
        print("wrong results: " + "; ".join(sorted(set(wrong))))
    return 1 if wrong else 0
