"""Weights of a published layout into a model of ours and back, one correspondence at a time."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from seqlib.errors import CheckpointMismatch
from seqlib.hf.families.base import Part
from seqlib.hf.loading import listed

__all__ = ["HEAD", "fit", "read", "write"]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def fit(
    source: object,
    parts: Iterable[Part],
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
) -> list[Part]:
    """The parts that apply, with the names that the files use, after everything was found to fit.

    Args:
        ours: our tensors; they may be on the meta device.
        theirs: shapes of the tensors in the files.
        ignored: patterns of names in the files that carry nothing.

    Raises:
        CheckpointMismatch: what is missing, left over or of another shape, all by name.
    """
    found: list[Part] = []
    missing: dict[tuple[str, ...], list[str]] = {}
    misshapen: dict[tuple[str, ...], list[str]] = {}
    used, filled = set[str](), set[str]()
    for part in parts:
        if filled & set(part.ours) or not all(name in ours for name in part.ours):
            continue
        names = tuple(next((n for n in t.split("|") if n in theirs), t.split("|")[0]) for t in part.theirs)
        absent = [name for name in names if name not in theirs]
        if absent:
            missing.setdefault(part.ours, absent)
            continue
        used.update(names)
        wanted = _shapes(part, [ours[name] for name in part.ours])
        wrong = [f"{n} {theirs[n]} for {shape}" for n, shape in zip(names, wanted) if theirs[n] != shape]
        if wrong:
            misshapen.setdefault(part.ours, wrong)
            continue
        filled.update(part.ours)
        found.append(dataclasses.replace(part, theirs=names))
    placed = filled.union(*missing, *misshapen)
    left = [name for name in theirs if name not in used and not any(re.search(p, name) for p in ignored)]
    problems = {
        "missing": [
            n for key, names in missing.items() if not filled >= {*key} and key not in misshapen for n in names
        ],
        "not part of the model": left,
        "of another shape": [n for key, names in misshapen.items() if not filled >= {*key} for n in names],
        "without a place in this layout": [name for name in ours if name not in placed],
    }
    told = [f"{what}: {listed(sorted(names))}" for what, names in problems.items() if names]
    if told:
        raise CheckpointMismatch(f"{source} does not fit its config; {'; '.join(told)}")
    return found


def read(parts: Iterable[Part], ours: Mapping[str, Tensor], get: Callable[[str], Tensor]) -> None:
    """Fill our tensors, holding no more of theirs than one part needs at a time."""
    with torch.no_grad():
        for part in parts:
            mine = [ours[name] for name in part.ours]
            if part.value is not None:
                for tensor in mine:
                    tensor.fill_(part.value)
            elif part.order is not None:
                width = _width(mine[0])
                joined = torch.cat([get(name).reshape(-1, width) for name in part.theirs])[part.order]
                for tensor, block in zip(mine, joined.split([t.numel() // width for t in mine])):
                    tensor.copy_(block.view(tensor.shape))
            else:
                _pour((get(name) for name in part.theirs), mine)


def write(parts: Iterable[Part], ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors by name, made of ours.

    Raises:
        CheckpointMismatch: ours have moved where the layout has no place for them.
    """
    written = set[str]()
    for part in parts:
        if written & set(part.ours) or not all(name in ours for name in part.ours):
            continue
        written.update(part.ours)
        mine = [ours[name].detach() for name in part.ours]
        if part.value is not None:
            if any(bool((tensor != part.value).any()) for tensor in mine):
                raise CheckpointMismatch(f"this layout has no place for {', '.join(part.ours)} other than {part.value}")
            continue
        width = _width(mine[0])
        joined = torch.cat([tensor.reshape(-1, width) for tensor in mine])
        if part.order is not None:
            joined = torch.empty_like(joined).index_copy_(0, part.order.to(joined.device), joined)
        shapes = _shapes(part, mine)
        for name, shape, block in zip(part.theirs, shapes, joined.split([math.prod(s) // width for s in shapes])):
            yield name.split("|")[0], block.reshape(shape).contiguous()


def _pour(sources: Iterable[Tensor], targets: list[Tensor]) -> None:
    """Copy the sources, end to end, into the targets, end to end."""
    waiting = [target.view(-1) for target in targets]
    for source in sources:
        rest = source.reshape(-1)
        while rest.numel():
            size = min(rest.numel(), waiting[0].numel())
            waiting[0][:size].copy_(rest[:size])
            rest = rest[size:]
            waiting[0] = waiting[0][size:]
            if not waiting[0].numel():
                del waiting[0]


def _shapes(part: Part, mine: list[Tensor]) -> list[tuple[int, ...]]:
    """The shape of each of theirs."""
    if not part.theirs:
        return []
    count = len(part.theirs)
    if count == len(mine) == 1 and part.tail is None:
        return [tuple(mine[0].shape)]
    width, total = _width(mine[0]), sum(tensor.numel() for tensor in mine)
    sizes = [total // count] * count if part.shares is None else [share * width for share in part.shares]
    tail = part.tail if part.tail is not None else (() if mine[0].dim() == 1 else (width,))
    if -1 in tail:
        known = math.prod(n for n in tail if n != -1)
        tail = tuple(width // known if n == -1 else n for n in tail)
    return [(size // max(1, math.prod(tail)), *tail) for size in sizes]


def _width(tensor: Tensor) -> int:
    return 1 if tensor.dim() == 1 else tensor.shape[-1]
