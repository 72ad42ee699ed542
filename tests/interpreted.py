"""Runs in a process of its own, whose Triton interprets kernels on CPU tensors: rows for CUDA against the reference."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from typing import Any

import torch
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["checked_by_torch", "equals_reference", "in_parts", "refused_by_gate", "start", "traced_is_the_same"]


def start() -> None:
    """Before Triton is imported: kernels are interpreted from here on."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    _repair_interpreter()


def _repair_interpreter() -> None:
    """Triton 3.6's interpreter multiplies bfloat16 as integers, rounds to it wrongly, refuses NumPy 2.4 where a loop
    bound is a tensor, and looks through its whole language again at every call of a function from a function."""
    from triton.runtime import interpreter

    language = interpreter.tl
    convert, dot, patch = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang
    patch_tensor = interpreter._patch_lang_tensor

    def as_torch(data: Any) -> torch.Tensor:
        return torch.from_numpy(data.view("int16").copy()).view(torch.bfloat16)

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (language.bfloat16, language.float32):
            return as_torch(data).float().numpy().view("uint32")
        if (source, target) == (language.float32, language.bfloat16):
            rounded = torch.from_numpy(data.view("float32").copy()).bfloat16()
            return rounded.view(torch.int16).numpy().view("uint16")
        return convert(data, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == language.bfloat16:
            a, b = (interpreter.TensorHandle(as_torch(t.data).float().numpy(), language.float32) for t in (a, b))
        return dot(self, a, b, *rest)

    def tensor_patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched: set[Any] = set()

    class Once:
        """Patches the language where no caller has done so."""

        def __init__(self, fn: Any) -> None:
            self.new = {m for m in fn.__globals__.values() if m is language or m is language.core} - patched
            self.scope = patch(fn) if self.new else None
            patched.update(self.new)

        def restore(self) -> None:
            patched.difference_update(self.new)
            if self.scope is not None:
                self.scope.restore()

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = tensor_patch
    interpreter._patch_lang = Once


@functools.cache
def _op(name: str) -> Any:
    """The op, with its Triton rows open to the CPU."""
    op = importlib.import_module(f"seqlib.ops.{name}").OP
    rows = tuple(dataclasses.replace(i, devices=(), needs=(), gate=None) if i.name == "triton" else i for i in op.impls)
    object.__setattr__(op, "impls", rows)
    return op


def equals_reference(op_name: str, case_name: str, dtype: torch.dtype) -> str:
    """Outputs and gradients of the row equal the reference; returns why the row refuses the case, or nothing."""
    import test_ops

    op = _op(op_name)
    case = next(c for c in test_ops.CASES[op_name] if c.name == case_name)
    impl = next(i for i in op.impls if i.name == "triton")
    inputs = case.inputs(dtype, requires_grad=True)
    facts = op.facts(**inputs)
    reason = impl.limits and impl.limits(facts)
    if reason or impl.refuses & facts.features:
        return reason or f"it does not support {', '.join(sorted(impl.refuses & facts.features))}"
    test_ops.compare(op, impl, inputs, dtype)
    return ""


def in_parts(op_name: str, case_name: str) -> str:
    """As `equals_reference`, with memory for one block of queries at a time."""
    row = importlib.import_module(f"seqlib.ops.{op_name}.triton_impl")
    room, row.CARRIED_BYTES = row.CARRIED_BYTES, 1
    try:
        return equals_reference(op_name, case_name, torch.float32)
    finally:
        row.CARRIED_BYTES = room


class _Calls(TorchDispatchMode):
    """Calls of registered Triton ops, one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "seqlib_triton":
            self.found.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def checked_by_torch(op_name: str, case_name: str) -> list[str]:
    """Names of the registered ops that a case calls, each of which passed `torch.library.opcheck`."""
    import test_ops

    op = _op(op_name)
    case = next(c for c in test_ops.CASES[op_name] if c.name == case_name)
    impl = next(i for i in op.impls if i.name == "triton")
    with _Calls() as calls:
        test_ops._run(op, case.inputs(torch.float32, requires_grad=True), impl.form, impl.name)
    for func, args in calls.found.items():
        smooth = _maybe_get_opdef(func)._backward_fn is not None
        given = [
            t.detach().requires_grad_(smooth and t.is_floating_point()) if isinstance(t, torch.Tensor) else t
            for t in args
        ]
        torch.library.opcheck(func, given)
    return sorted(func._opname for func in calls.found)


def traced_is_the_same(op_name: str, case_name: str) -> None:
    """A call and its backward pass as one graph give what they give without a compiler."""
    import test_ops

    op = _op(op_name)
    case = next(c for c in test_ops.CASES[op_name] if c.name == case_name)
    impl = next(i for i in op.impls if i.name == "triton")
    function = getattr(importlib.import_module(f"seqlib.ops.{op_name}"), op.function)
    outputs = importlib.import_module("seqlib.ops.case").outputs
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, traced):
        inputs = case.inputs(torch.float32, requires_grad=True)
        made = [t for t in outputs(call(**inputs, form=impl.form, backend=impl.name)) if t.requires_grad]
        torch.autograd.backward(made, [torch.ones_like(t) for t in made])
        results.append([*made, *(t.grad for t in test_ops._leaves(inputs).values())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def refused_by_gate(op_name: str, case_name: str, dtype: torch.dtype, cache: str) -> str | None:
    """What the row's own gate says about a case on this "device"."""
    import test_ops

    os.environ["SEQLIB_CACHE"] = cache
    module = importlib.import_module(f"seqlib.ops.{op_name}")
    case = next(c for c in test_ops.CASES[op_name] if c.name == case_name)
    gate = importlib.import_module(f"seqlib.ops.{op_name}.triton_impl").gate
    return gate(module.OP.facts(**case.inputs(dtype))).refusal
