"""Named input sets of an op, written once and used by the tests and by the benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqlib.sequence import State

__all__ = ["LOG_DECAY_ENDS", "Case", "at_ends", "outputs"]

LOG_DECAY_ENDS = (0.0, -1e4, -1e30, -math.inf)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Args:
        name: unique within the op; says what is special about it.
        build: makes the arguments of the public function by name from a seeded generator, tensors in float64 on the CPU
            and within the op's legal ranges.
        keep: tensors that stay float32 when the inputs are 16-bit (parameters such as A, D, dt_bias; states).
        bench: True for the large shapes that `python -m seqlib.bench` times; the tests leave them out.
        flops: floating-point operations of one forward call, by the textbook count of the op.
        nbytes: bytes that must move at least once in float32, inputs plus outputs.
    """

    name: str
    build: Callable[[torch.Generator], dict[str, Any]]
    keep: frozenset[str] = frozenset()
    bench: bool = False
    flops: float = 0.0
    nbytes: float = 0.0

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", *, seed: int = 0, requires_grad: bool = False
    ) -> dict[str, Any]:
        """The arguments in `dtype`, states included; integer and bool tensors and options stay as they are."""
        half = dtype in (torch.float16, torch.bfloat16)

        def cast(name: str, value: Any) -> Any:
            if isinstance(value, State):
                return value.map(lambda t: cast(name, t))
            if isinstance(value, list):
                return [cast(name, part) for part in value]
            if not isinstance(value, Tensor):
                return value
            if value.is_complex():
                value = value.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
            elif value.is_floating_point():
                value = value.to(device, torch.float32 if half and name in self.keep else dtype)
            else:
                return value.to(device)
            return value.requires_grad_(requires_grad)

        made = self.build(torch.Generator().manual_seed(seed))
        return {name: cast(name, value) for name, value in made.items()}


def at_ends(t: Tensor, ends: tuple[float, ...] = LOG_DECAY_ENDS) -> Tensor:
    """t with these values at every other place, in turn: decays at the ends of their range among ordinary ones."""
    flat = t.flatten().clone()
    for i, end in enumerate(ends):
        flat[2 * i :: 2 * len(ends) + 1] = end
    return flat.view_as(t)


def outputs(result: Any) -> list[Tensor]:
    """The tensors an op returned, states and nested tuples flattened, None dropped."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple):
        return [t for part in result for t in outputs(part)]
    return list(result.tensors()) if hasattr(result, "tensors") else []
