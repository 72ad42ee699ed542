"""Writes docs/BENCHMARKS.md from the JSON files in docs/bench: `python -m seqlib.bench.markdown docs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["page"]

HEAD = """# Benchmarks

Every number here comes from a JSON file in `docs/bench/`, written by `seqlib-lm bench OPS --json FILE`,
`seqlib-lm bench mamba-130m --json FILE` or `seqlib-lra speed --peer-s4 DIR --json FILE`; this page is written by
`python -m seqlib.bench.markdown docs`. Ratios compare runs that took turns in one process. Processor time of one core
is steadier than wall time where neighbours share the machine. Freed memory is kept by the process (glibc's mallopt),
for all contenders alike.
"""


def page(folder: Path) -> str:
    """The page for all JSON files of a folder."""
    parts = [HEAD]
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        parts.append(f"## {path.stem}\n\n{_machine(report)}")
        parts += [_case(result) for result in report.get("results", [])]
        if "mamba_130m" in report:
            parts.append(_model(report["mamba_130m"]))
        if "state_spaces" in report:
            parts.append(_state_spaces(report))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _machine(report: dict[str, Any]) -> str:
    facts, limit = report["machine"], report["limits"]
    load = ", ".join(f"{x:.1f}" for x in facts["load_average"])
    return (
        f"{facts['cpu']}, {report['options']['threads']} threads, {facts['isa']}, torch {facts['torch']}, load {load} "
        f"at the start. In the same run: copy {limit['copy_gb_s']:.0f} GB/s, matrix product "
        f"{limit['matmul_float32_gflop_s']:.0f} GFLOP/s in float32."
    )


def _case(result: dict[str, Any]) -> str:
    lines = []
    for kind in ("forward", "forward_backward"):
        for name, t in result[kind].items():
            ratios = [f"{t[key]:.3g}" if key in t else "" for key in ("over_torch", "over_reference")]
            cells = [
                kind.replace("_", " + "),
                name,
                f"{1e3 * t['wall_s']:.3g}",
                f"{1e3 * t['one_core_s']:.3g}",
                *ratios,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    left_out = "; ".join(f"{k}: {v}" for k, v in (result["skipped"] | result["cannot_run"]).items())
    table = ["| | who | wall ms | one core ms | x torch | x reference |", "|---|---|---|---|---|---|", *lines]
    return (
        f"### {result['op']}: {result['case']}, {result['dtype']}\n\n"
        + "\n".join(table)
        + (f"\n\nLeft out: {left_out}." if left_out else "")
    )


def _model(made: dict[str, Any]) -> str:
    what = {
        "forward": f"forward, batch 1, seqlen {made['seqlen']}",
        "train": f"training step, {made['train_layers']} of {made['n_layer']} layers",
        "decode": f"greedy generate(), 16 + {made['new_tokens']} tokens",
    }
    lines = ["| Mamba 130M, same weights and logits | seqlib s | transformers s | ratio |", "|---|---|---|---|"]
    for kind, name in what.items():
        t = made[kind]
        lines.append(f"| {name} | {t['seqlib']['wall_s']:.3f} | {t['transformers']['wall_s']:.3f} | {t['ratio']:.1f} |")
    speeds = [made["decode"][f"{name}_tokens_per_s"] for name in ("seqlib", "transformers")]
    error = made["logits_relative_error"]
    return "\n".join(lines) + (
        f"\n\nDecoding: {speeds[0]:.1f} tokens/s beside {speeds[1]:.1f}. Logits differ by {error:.1e} relative."
    )


def _state_spaces(report: dict[str, Any]) -> str:
    sizes = "batch {batch}, seqlen {seqlen}, d_model {d_model}, d_state {d_state}".format(**report["options"])
    lines = [
        f"| {sizes} | who | wall ms | one core ms | x | x one core | kernel's share |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, made in report["state_spaces"].items():
        for kind in ("forward", "forward_backward"):
            for who, t in made[kind].items():
                if not isinstance(t, dict):
                    continue
                ours = who == "seqlib"
                ratios = [
                    f"{made[kind][k]:.1f}" if ours and k in made[kind] else "" for k in ("ratio", "ratio_one_core")
                ]
                share = f"{100 * made['kernel_share'][kind]:.0f} %" if ours and "kernel_share" in made else ""
                cells = [f"{name}, {kind.replace('_', ' + ')}", who, f"{1e3 * t['wall_s']:.3g}"]
                lines.append("| " + " | ".join([*cells, f"{1e3 * t['one_core_s']:.3g}", *ratios, share]) + " |")
    us = report["decoding_us"]
    text = (
        f"One position of S4D, batch 1, one thread: {us['s4d_state_update']:.0f} microseconds for the state and its "
        f"output, {us['s4d_layer']:.0f} for the whole layer."
    )
    if "long" in report:
        long = report["long"]
        text += (
            f" {long['seqlen']:,} positions of S4D, batch 1: {long['forward']['peak_gb']:.1f} GB forward, "
            f"{long['forward_backward']['peak_gb']:.1f} GB with gradients."
        )
    return "\n".join(lines) + "\n\n" + text


if __name__ == "__main__":
    root = Path(sys.argv[1])
    (root / "BENCHMARKS.md").write_text(page(root / "bench"))
