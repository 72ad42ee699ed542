"""The linear family beside its floors and peers: what it promises in speed, and whether it is kept."""

from __future__ import annotations

import itertools
import multiprocessing
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.bench.clock import ROTATED_BYTES, interleaved, keep_freed_memory, limits, machine
from seqlib.errors import SeqlibError
from seqlib.mixers import build_mixer
from seqlib.ops import delta_rule, linear, linear_attention

__all__ = ["bench_linear_family"]

CHUNK = 64
STEP_WIDTH = 1024
FAMILY = (
    "mamba", "mamba2", "lightning", "transnormer", "retnet", "gla", "based", "linear_transformer", "deltanet",
    "gated_deltanet", "kda",
)  # fmt: skip

Runs = Mapping[str, Callable[[], Any]]


def bench_linear_family(*, repeats: int = 15, budget: float = 20.0) -> dict[str, Any]:
    """Every row of the family's speed table.

    Args:
        repeats, budget: as in `seqlib.bench.bench_op`, for each comparison.

    Returns:
        A report: machine, limits, options, the rows, and the memory of long inputs. A row holds `what`, seconds of ours
        and of what it is held `against`, their `ratio` and the `aim`: at most so many times a floor, or at least so
        many times as fast as a peer.

    Raises:
        SeqlibError: a peer computes something else; its speed would mean nothing.
    """
    count = torch.get_num_threads()
    options = {"keeps_freed_memory": keep_freed_memory(), "threads": count, "repeats": repeats, "budget_s": budget}
    report: dict[str, Any] = {"machine": machine(), "options": options, "limits": limits(count)}
    time = partial(_seconds, repeats=repeats, budget=budget)
    rows = [*_attention(time), *_long(time), *_delta(time), *_steps(time)]
    report["linear_family"] = {"rows": rows, "memory": _memory()}
    return report


def _seconds(runs: Runs, *, repeats: int, budget: float) -> dict[str, float]:
    return {name: timing.as_dict()["wall_s"] for name, timing in interleaved(runs, repeats, budget).items()}


def _row(what: str, ours: float, against: str, other: float, *, floor: float = 0.0, speedup: float = 0.0) -> dict:
    """Held against a floor, at most so many times, or against a peer, at least so many times as fast."""
    ratio = ours / other if floor else other / ours
    aim = f"<= {floor}" if floor else f">= {speedup}"
    return {"what": what, "ours_s": ours, "against": against, "other_s": other, "ratio": ratio, "aim": aim}


def _draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale


def _attend(log_decay: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, log_decay)[0]


def _trained(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """A run of forward and backward."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    dy = torch.randn_like(call(*inputs))
    return lambda: torch.autograd.grad(call(*leaves), leaves, dy)


def _attention(time: Callable[[Runs], dict[str, float]]) -> list[dict[str, Any]]:
    """linear_attention at (1, 4096, 8, 64) over the arithmetic of dense blocks, and beside softmax attention."""
    seqlen, heads, d = 4096, 8, 64
    q, k, v = (_draw(1, seqlen, heads, d, scale=d**-0.25) for _ in range(3))
    flops = seqlen * heads * (2.0 * CHUNK * 2 * d + 4.0 * d * d)
    square = torch.randn(1024, 1024)
    decays = {"constant decay": -torch.rand(heads), "decay per channel": -torch.rand(1, seqlen, heads, d)}

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    forward = time(
        {"matmul": lambda: square @ square, "softmax": lambda: softmax(q, k, v)}
        | {name: partial(_attend, g, q, k, v) for name, g in decays.items()}
        | {"bfloat16": partial(_attend, decays["constant decay"], *(t.bfloat16() for t in (q, k, v)))}
    )
    both = time(
        {"matmul": lambda: square @ square, "softmax": _trained(softmax, q, k, v)}
        | {name: _trained(partial(_attend, g), q, k, v) for name, g in decays.items()}
    )
    rows = []
    for kind, found, times, floor, faster in (
        ("forward", forward, 1, 1.25, 20),
        ("forward + backward", both, 3, 1.5, 15),
    ):
        dense = found["matmul"] * times * flops / (2.0 * 1024**3)
        for name in found.keys() - {"matmul", "softmax"}:
            what = f"linear_attention (1, {seqlen}, {heads}, {d}), {name}, {kind}"
            rows.append(
                _row(what, found[name], "dense blocks of 64 at the speed of a matrix product", dense, floor=floor)
            )
            rows.append(_row(what, found[name], "torch SDPA, causal", found["softmax"], speedup=faster))
    return sorted(rows, key=lambda row: row["what"])


def _long(time: Callable[[Runs], dict[str, float]]) -> list[dict[str, Any]]:
    """Seconds per token of long inputs over those of short ones: constant speed is what the family promises."""
    short, long, heads, d = 2048, 131072, 4, 64
    rows = []
    for kind in ("forward", "forward + backward"):
        runs: dict[str, Callable[[], Any]] = {}
        for seqlen in (short, long):
            inputs = [_draw(1, seqlen, heads, d, scale=d**-0.25) for _ in range(3)]
            call = partial(_attend, -torch.rand(1, seqlen, heads))
            runs[str(seqlen)] = partial(call, *inputs) if kind == "forward" else _trained(call, *inputs)
        # As many tokens of either, so that both meet the same disturbances.
        once = runs[str(short)]
        runs[str(short)] = lambda once=once: [once() for _ in range(long // short)]  # type: ignore[misc]
        found = time(runs)
        what = f"linear_attention (1, {long}, {heads}, {d}), decay per token, {kind}"
        rows.append(_row(what, found[str(long)], f"as many tokens at seqlen {short}", found[str(short)], floor=1.1))
    return rows


def _peak(seqlen: int, queue: Any) -> None:
    """Bytes that a process has held at most, having trained on one long row."""
    heads, d = 4, 64
    inputs = [_draw(1, seqlen, heads, d) for _ in range(3)]
    _trained(partial(_attend, -torch.rand(1, seqlen, heads)), *inputs)()
    # Not getrusage: a new process starts with its parent's peak there.
    status = Path("/proc/self/status").read_text()
    queue.put(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]))  # type: ignore[index]


def _memory() -> dict[str, Any]:
    """Peak memory of forward and backward by length, each in a process of its own, and its slope."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for seqlen in (16384, 65536, 131072):
        queue = context.Queue()
        process = context.Process(target=_peak, args=(seqlen, queue))
        process.start()
        peaks[seqlen] = queue.get(timeout=300)
        process.join()
    lengths = list(peaks)
    slopes = [(peaks[b] - peaks[a]) / (b - a) for a, b in itertools.pairwise(lengths)]
    what = "linear_attention, 4 heads of 64, decay per token, forward + backward"
    return {"what": what, "peak_bytes": peaks, "bytes_per_token": slopes}


def _delta(time: Callable[[Runs], dict[str, float]]) -> list[dict[str, Any]]:
    """The gated delta rule beside the two forms that transformers has for machines without its kernels."""
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    heads, d, rows = 4, 64, []
    for seqlen in (64, 128, 256, 512, 1024, 2048):
        q, k = (F.normalize(_draw(1, seqlen, heads, d), dim=-1) for _ in range(2))
        v, beta, g = _draw(1, seqlen, heads, d), torch.rand(1, seqlen, heads), -torch.rand(1, seqlen, heads)
        peers = {
            "transformers, chunked": theirs.torch_chunk_gated_delta_rule,
            "transformers, token by token": theirs.torch_recurrent_gated_delta_rule,
        }
        runs = {"ours": lambda: delta_rule(q, k, v, beta, g, scale=d**-0.5)[0]}  # noqa: B023
        runs |= {name: partial(lambda f: f(q, k, v, g, beta)[0], peer) for name, peer in peers.items()}  # noqa: B023
        want = runs["ours"]()
        for name in peers:
            error = float((runs[name]() - want).abs().max() / want.abs().max())
            if not error < 1e-4:
                raise SeqlibError(f"{name}: outputs differ by {error:.1e} of the largest; no speed is reported")
        with torch.no_grad():
            found = time(runs)
        for name in peers:
            aim = 20 if "chunked" in name and seqlen == 2048 else 1
            what = f"delta_rule (1, {seqlen}, {heads}, {d}), decay per token, forward"
            rows.append(_row(what, found["ours"], name, found[name], speedup=aim))
    return rows


def _steps(time: Callable[[Runs], dict[str, float]]) -> list[dict[str, Any]]:
    """One decoding step of each mixer over reading its weights and its state once.

    Several copies take turns, so that weights come from memory as they do in a model of many layers; the reading speed
    is that of one matrix-vector product as large as all of them.
    """
    x, rows = torch.randn(1, STEP_WIDTH), []
    big = torch.randn(int(2 * ROTATED_BYTES) // 4 // STEP_WIDTH, STEP_WIDTH)
    for kind in FAMILY:
        first = build_mixer({"kind": kind}, STEP_WIDTH, 0, 24)
        size = sum(p.nbytes for p in first.parameters()) + first.state_bytes(1, 0)
        layers = [
            first,
            *(build_mixer({"kind": kind}, STEP_WIDTH, i, 24) for i in range(1, round(2 * ROTATED_BYTES / size))),
        ]
        states = [layer.initial_state(1) for layer in layers]

        def step(layers=layers, states=states) -> None:
            for layer, state in zip(layers, states):
                layer.step(x, state)

        with torch.inference_mode():
            step()  # what layers compute once and keep is not part of it
            found = time({"read": lambda: linear(x, big), "step": step})
        what = f"{kind}, one step at d_model {STEP_WIDTH}, {size / 1e6:.1f} MB"
        read = found["read"] * size / big.nbytes
        rows.append(_row(what, found["step"] / len(layers), "reading weights and state once", read, floor=1.5))
    return rows
