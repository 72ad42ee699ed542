"""What the CPU of this machine can do, and what torch is told to use of it."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import torch

__all__ = ["HELD", "features", "held_environment", "multiplies"]

_CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def features() -> frozenset[str] | None:
    """What this CPU can do, in the words of Linux; None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in _CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return None


_PRODUCTS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of a 16-bit dtype on this CPU as such; where not, it is slower than float32.

    True where the system does not tell. oneDNN does it, and may be told to use less than there is (ONEDNN_MAX_CPU_ISA).
    """
    able, most = features(), os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    allowed = most in ("DEFAULT", "ALL") or any(
        word in most for word in ("AMX", "AVX10", "FP16", *(("BF16",) if dtype == torch.bfloat16 else ()))
    )
    return able is None or (allowed and not able.isdisjoint(_PRODUCTS[dtype]))


# What holds torch and its libraries to an instruction set; they read it when they start.
HELD = {
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def held_environment(isa: str) -> dict[str, str] | None:
    """The environment of a process whose torch keeps to `isa`, a key of HELD; None where this process is one."""
    wanted = HELD[isa] | {"SEQLIB_ISA": "all"}
    return None if wanted.items() <= os.environ.items() else dict(os.environ) | wanted
