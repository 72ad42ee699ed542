"""Decoding on a GPU beside what it must read: `python -m seqlib.lm.bench_decode mamba2-1.3b --json FILE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqlib.bench import gpu
from seqlib.models.backbone import Backbone
from seqlib.models.presets import PRESETS

__all__ = ["bench_decode", "main"]


def bench_decode(name: str, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """One step of a preset with random weights, logits included.

    Returns:
        milliseconds called from Python and replayed from a CUDA graph; bytes of weights, and of the state, which is
        read and written; and `floor_ms`, those bytes at the speed of a large copy in the same run.
    """
    preset = PRESETS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            backbone = Backbone(preset.backbone).eval()
            head = torch.randn(preset.vocab_size, preset.backbone.d_model)
    finally:
        torch.set_default_dtype(before)
    state = backbone.initial_state(batch, device="cuda", dtype=dtype)
    x = torch.randn(batch, preset.backbone.d_model, device="cuda", dtype=dtype)

    def step() -> Tensor:
        return backbone.step(x, state)[0].to(dtype) @ head.t()

    weights = sum(t.nbytes for t in backbone.parameters()) + head.nbytes
    floor = gpu.limits().seconds(weights + 2 * state.nbytes, 0.0)
    with torch.no_grad():
        replay = _captured(step)
        return {
            "preset": name,
            "batch": batch,
            "dtype": str(dtype).removeprefix("torch."),
            "weight_bytes": weights,
            "state_bytes": state.nbytes,
            "python_ms": 1e3 * gpu.timed(step),
            "graph_ms": 1e3 * gpu.timed(replay),
            "floor_ms": 1e3 * floor,
        }


def _captured(step: Callable[[], Tensor]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m seqlib.lm.bench_decode", description=__doc__)
    parser.add_argument("presets", nargs="+", choices=sorted(PRESETS), metavar="preset")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; this command times one")
    rows = []
    for name in options.presets:
        rows.append(row := bench_decode(name, options.batch))
        print(
            f"{name} batch {row['batch']}: {row['graph_ms']:.3f} ms from a graph, {row['python_ms']:.2f} from Python; "
            f"{row['graph_ms'] / row['floor_ms']:.2f}x of {row['floor_ms']:.3f} ms for its bytes",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": gpu.machine(), "decoding": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
