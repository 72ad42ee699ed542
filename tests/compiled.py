"""Compiles what a Triton row would launch, to machine code for a GPU that need not be there."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["SHARED", "Built", "launches"]

SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that one block may have


class Built(NamedTuple):
    kernel: str
    plan: dict[str, Any]
    shared: int
    registers: int
    stack: int
    spilled: int


def launches(arch: int, run: Callable[[], Any]) -> list[Built]:
    """Each distinct kernel that `run`, on tensors without data, would launch on a device of `arch`."""
    common = importlib.import_module("seqlib.ops.triton_common")
    built: dict[str, Built] = {}

    def record(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        assert all(g >= 1 for g in grid) and all(g < 1 << 16 for g in grid[1:]), grid
        key = kernel.__name__ + str([_kind(a) for a in args]) + str(options)
        if key not in built:
            built[key] = _build(kernel, args, options, arch)

    with _replaced(common, launch=record, capability=lambda _: arch):
        run()
    return list(built.values())


@contextlib.contextmanager
def _replaced(module: Any, **names: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _kind(value: Any) -> str:
    """How Triton would specialise an argument."""
    from triton.runtime.jit import type_canonicalisation_dict

    if isinstance(value, Tensor):
        return "*" + type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
    if value is None or (value == 1 and not isinstance(value, float)):
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _build(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    settings = {name: options.pop(name) for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    named = dict(zip(kernel.arg_names, args)) | options
    assert named.keys() == set(kernel.arg_names), named.keys() ^ set(kernel.arg_names)
    named = {name: named[name] for name in kernel.arg_names}
    signature = {k: "constexpr" if k in options else _kind(v) for k, v in named.items()}
    constants = {(i,): v for i, (k, v) in enumerate(named.items()) if signature[k] == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (k, v) in enumerate(named.items())
        if signature[k] != "constexpr" and (isinstance(v, Tensor) or (isinstance(v, int) and v % 16 == 0))
    }
    log = io.StringIO()
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        source = ASTSource(kernel, signature, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)
    text = log.getvalue()
    registers, stack, stores, loads = (
        int(re.search(pattern, text)[1])  # type: ignore[index]
        for pattern in (r"Used (\d+) reg", r"(\d+) bytes stack", r"(\d+) bytes spill st", r"(\d+) bytes spill lo")
    )
    kept = {k: v for k, v in options.items() if isinstance(v, int | str)} | settings
    return Built(kernel.__name__, kept, made.metadata.shared, registers, stack, max(stores, loads))
