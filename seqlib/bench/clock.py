"""The clock, and the machine that it stands in."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seqlib import native
from seqlib.errors import NativeUnavailable

__all__ = ["DTYPES", "ROTATED_BYTES", "Timing", "interleaved", "keep_freed_memory", "limits", "machine", "use_threads"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROTATED_BYTES = 80e6  # inputs in turn exceed this, so that caches do not flatter anyone


@dataclass
class Timing:
    """Seconds of repeated runs: wall clock, and processor time of all threads."""

    wall: list[float]
    cpu: list[float]

    def as_dict(self) -> dict[str, float]:
        return {
            "wall_s": statistics.median(self.wall),
            "wall_min_s": min(self.wall),
            "cpu_s": statistics.median(self.cpu),
            "repeats": len(self.wall),
        }


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int, budget: float) -> dict[str, Timing]:
    """Time several functions in turns, after one warm-up each.

    A function stops taking part once it has used `budget` seconds; if its warm-up did, that is its one timing.
    """

    def timed(run: Callable[[], Any]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - wall, time.process_time() - cpu

    timings = {name: Timing([], []) for name in runs}
    for name, run in runs.items():
        wall, cpu = timed(run)
        if wall > budget:
            timings[name] = Timing([wall], [cpu])
    for _ in range(repeats):
        for name, run in runs.items():
            timing = timings[name]
            if sum(timing.wall) <= budget:
                wall, cpu = timed(run)
                timing.wall.append(wall)
                timing.cpu.append(cpu)
    return timings


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Run the block on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory, so that large results cost no page faults; for all contenders alike.

    Returns False where it cannot (a C library other than glibc): times then include the faults, often more than the op.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    wanted = {mmap_threshold: 2**30, trim_threshold: 2**31 - 1, top_pad: 2**28}
    return mallopt is not None and all([mallopt(name, value) for name, value in wanted.items()])


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if cpuinfo.exists():
        model = next((s.split(":")[1].strip() for s in cpuinfo.read_text().splitlines() if "model name" in s), model)
    try:
        compiler = native.compiler_version()
    except NativeUnavailable as error:
        compiler = str(error)
    missing = native.why_unavailable("cpu")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": missing or torch.ops.seqlib.isa(None),
        "compiler": compiler,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "load_average": os.getloadavg(),
    }


def limits(threads: int) -> dict[str, float]:
    """What the machine can do at best with that many threads: copy memory, and multiply large matrices."""
    arrays = [torch.ones(int(ROTATED_BYTES) // 8) for _ in range(4)]
    turn = itertools.cycle(range(4))

    def copy() -> None:
        i = next(turn)
        arrays[i].copy_(arrays[i - 1])

    square = {name: torch.randn(1024, 1024).to(dtype) for name, dtype in DTYPES.items()}
    with use_threads(threads):
        runs = {"copy": copy} | {name: partial(torch.mm, m, m) for name, m in square.items()}
        best = {name: min(timing.wall) for name, timing in interleaved(runs, 12, 5.0).items()}
    gflops = {f"matmul_{name}_gflop_s": 2e-9 * 1024**3 / best[name] for name in square}
    return {"copy_gb_s": 2e-9 * arrays[0].nbytes / best["copy"]} | gflops
