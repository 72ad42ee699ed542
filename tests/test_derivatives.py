"""Derivatives beyond a plain backward pass are right or refused: of gradients, by torch.func, and in forward mode."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import test_ops
import torch
from torch import Tensor

from seqlib.dispatch import Impl, Op, resolve
from seqlib.errors import BackendUnavailable, UnsupportedInput
from seqlib.ops.case import outputs

Inputs = dict[str, Any]


def _rows():
    for name, op in test_ops.OPS.items():
        for impl in op.impls:
            if impl.grad and impl.name != "reference" and "cpu" in (*impl.devices, "cpu")[:1]:
                yield pytest.param(op, impl, id=f"{name}-{impl.name}-{impl.form}")


def _inputs(op: Op, impl: Impl | None, dtype: torch.dtype) -> Inputs:
    """Those of the op's first case that the row takes."""
    for case in test_ops.CASES[op.name]:
        inputs = case.inputs(dtype, requires_grad=True)
        try:
            resolve(op, op.facts(**inputs), *(("auto", "auto") if impl is None else (impl.form, impl.name)))
            return inputs
        except BackendUnavailable:
            continue
    pytest.fail(f"no case of {op.name} is for this row")


def _loss(op: Op, inputs: Inputs, form: str, backend: str) -> Tensor:
    function = getattr(importlib.import_module(f"seqlib.ops.{op.name}"), op.function)
    made = outputs(function(**inputs, form=form, backend=backend))
    return _sum([t for t in made if t.is_floating_point() or t.is_complex()])


def _sum(tensors: list[Tensor]) -> Tensor:
    """A fixed nonlinear number of tensors."""
    g = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.real.dtype) for t in tensors]
    return sum(((t.real * w).sin().sum() for t, w in zip(tensors, weights)), torch.zeros(()))


def _second(op: Op, inputs: Inputs, form: str, backend: str) -> dict[str, Tensor | None]:
    leaves = test_ops._leaves(inputs)
    first = torch.autograd.grad(
        _loss(op, inputs, form, backend), list(leaves.values()), create_graph=True, allow_unused=True
    )
    again = torch.autograd.grad(_sum([g for g in first if g is not None]), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, again))


@pytest.mark.parametrize(("op", "impl"), list(_rows()))
def test_gradients_of_gradients_are_right_or_refused(op: Op, impl: Impl) -> None:
    exact = not impl.dtypes or torch.float64 in impl.dtypes
    inputs = _inputs(op, impl, torch.float64 if exact else torch.float32)
    try:
        got = _second(op, inputs, impl.form, impl.name)
    except (UnsupportedInput, RuntimeError) as error:  # torch says so of its own attention
        assert "first derivatives only" in str(error) or "is not implemented" in str(error), error
        return
    want = _second(op, inputs, "reference", "reference")
    assert exact, f"{impl.name} rows have no second derivatives and did not say so"
    for name, value in want.items():
        other = got[name]
        if value is not None and value.abs().max() > 0:
            assert other is not None, name
            torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-8 * max(1.0, float(value.abs().max())))


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in test_ops.OPS.items() if not op.writes])
def test_torch_func_and_forward_mode(op: Op) -> None:
    """What runs by default in float32 has the derivatives of the reference, or an error says that it has none."""
    inputs = _inputs(op, None, torch.float32)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]
    fixed = {k: v.map(Tensor.detach) if hasattr(v, "map") else v for k, v in inputs.items() if k not in names}
    leaves = {k: inputs[k] for k in names}
    want = torch.autograd.grad(_loss(op, fixed | leaves, "reference", "reference"), list(leaves.values()))
    points = tuple(t.detach() for t in leaves.values())

    def loss(*tensors: Tensor) -> Tensor:
        return _loss(op, fixed | dict(zip(names, tensors)), "auto", "auto")

    got = torch.func.grad(loss, argnums=tuple(range(len(points))))(*points)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max())))
    along = tuple(torch.randn_like(t) for t in points)
    try:
        _, slope = torch.func.jvp(loss, points, along)
    except (RuntimeError, NotImplementedError) as error:
        assert "forward" in str(error).lower() or "jvp" in str(error), error
        return
    expected = sum((a.conj() * b).real.sum() for a, b in zip(want, along))
    torch.testing.assert_close(slope, expected, rtol=2e-3, atol=2e-3)
