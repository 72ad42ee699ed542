"""The command line of the benchmark: tables in the terminal, everything in a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from seqlib import cpu, native
from seqlib.bench import Peer, bench_op, limits, machine
from seqlib.bench.clock import DTYPES, keep_freed_memory
from seqlib.dispatch import op_names

__all__ = ["main", "run", "show"]


def run(
    ops: Sequence[str],
    *,
    dtype: str = "float32",
    threads: int | None = None,
    repeats: int = 15,
    budget: float = 5.0,
    peers: Mapping[str, Mapping[str, Peer]] | None = None,
) -> dict[str, Any]:
    """The report on several ops: machine, limits, options and one record per case. Shows each table as it comes."""
    count = threads or torch.get_num_threads()
    options = {
        "keeps_freed_memory": keep_freed_memory(),
        "dtype": dtype,
        "threads": count,
        "repeats": repeats,
        "budget_s": budget,
    }
    report: dict[str, Any] = {"machine": machine(), "options": options, "limits": limits(count), "results": []}
    for name in ops:
        more = (peers or {}).get(name, {})
        for result in bench_op(name, dtype=DTYPES[dtype], threads=count, repeats=repeats, budget=budget, peers=more):
            report["results"].append(result)
            show(result, report["limits"])
    report["load_average_after"] = os.getloadavg()
    return report


def show(result: dict[str, Any], limit: Mapping[str, float]) -> None:
    """Print one record: a table of times, then who was left out and why."""
    header = ["", "ms", "one core ms", "x torch", "x reference", "GFLOP/s", "GB/s"]
    for kind in ("forward", "forward_backward"):
        lines = [
            [
                name,
                f"{1e3 * t['wall_s']:.3g}",
                f"{1e3 * t['one_core_s']:.3g}",
                *(f"{t[f'over_{base}']:.3g}" if f"over_{base}" in t else "" for base in ("torch", "reference")),
                *(f"{t[unit]:.3g}" if unit in t else "" for unit in ("gflop_s", "gb_s")),
            ]
            for name, t in result[kind].items()
        ]
        if kind == "forward":
            best = limit[f"matmul_{result['dtype']}_gflop_s"], limit["copy_gb_s"]
            lines.append(["machine's limit", "", "", "", "", *(f"{b:.3g}" for b in best)])
        units = header if kind == "forward" else header[:-2]
        _table(
            f"{result['op']} {result['case']} {result['dtype']} {kind.replace('_', '+')}",
            units,
            [line[: len(units)] for line in lines],
        )
    gate = result["gate"]
    print(f"gate: outputs against {gate['truth']}, gradients against the reference at seqlen {gate['short_seqlen']}")
    for name in result["wrong"]:
        print(f"WRONG, not timed: {name}: {gate['contenders'][name]}")
    for name, reason in result["skipped"].items() | result["cannot_run"].items():
        print(f"left out: {name}: {reason}")


def _table(title: str, header: list[str], lines: list[list[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:  # comes with the lm extra
        width = [max(map(len, column)) for column in zip(header, *lines)]
        print(title)
        for line in (header, *lines):
            print("  ".join([line[0].ljust(width[0]), *(v.rjust(w) for v, w in zip(line[1:], width[1:]))]))
        return
    table = Table(title=title, title_justify="left")
    table.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def main(arguments: Sequence[str] | None = None, peers: Mapping[str, Mapping[str, Peer]] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqlib.bench", description="time every implementation of the ops")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of: {', '.join(op_names())}; all if none is given")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, help="of the wall-clock figures")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds per contender and comparison")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--isa", choices=cpu.HELD, help="as on a machine without anything beyond it: ours, torch and peers"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - set(op_names()))
    if unknown:
        parser.error(f"unknown op {', '.join(unknown)}; known: {', '.join(op_names())}")
    if options.isa:
        if held := cpu.held_environment(options.isa):
            again = [sys.executable, "-m", "seqlib.bench", *(sys.argv[1:] if arguments is None else arguments)]
            if peers:
                parser.error(f"--isa {options.isa} is for python -m seqlib.bench, without peers of other packages")
            return subprocess.run(again, env=held, check=False).returncode
        native.load("cpu")
        try:
            torch.ops.seqlib.isa(options.isa)
        except RuntimeError as error:
            parser.error(str(error).splitlines()[0])
    report = run(
        options.ops or op_names(),
        dtype=options.dtype,
        threads=options.threads,
        repeats=options.repeats,
        budget=options.budget,
        peers=peers,
    )
    report["options"]["isa"] = options.isa
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [f"{r['op']} {r['case']}: {name}" for r in report["results"] for name in r["wrong"]]
    if wrong:
        print("wrong results: " + "; ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0
