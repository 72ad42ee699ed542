"""Writes docs/BENCHMARKS.md from the JSON files in docs/bench: `python -m seqlib.bench.markdown docs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["page"]

HEAD = """# Benchmarks

Every number here comes from a JSON file in `docs/bench/`; this page is written by `python -m seqlib.bench.markdown
docs`. Speed is measured by `seqlib-lm bench WHAT --json FILE`, where WHAT are ops, `mamba-130m` or `linear-family`,
and by `seqlib-lra speed --peer-s4 DIR --json FILE`, of stock models by `python -m seqlib.hf.accelerate_bench`; on a
GPU by `python -m seqlib.bench gpu --json FILE` and `python -m seqlib.lm.bench_decode PRESET --json FILE`. Ratios
compare runs that took turns in one process. Processor time of one core is steadier than wall time where neighbours
share the machine. Freed memory is kept by the process (glibc's mallopt), for all contenders alike. Quality is measured
by `seqlib-lm sweep --json FILE`, by `seqlib-lra suite`, and by `seqlib-lra train`, whose runs `seqlib-lra compare RUNS
--json FILE --chart FILE` puts side by side; seconds of training runs are those of a machine that had other work too.
"""


def page(folder: Path) -> str:
    """The page for all JSON files of a folder."""
    parts = [HEAD]
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        parts.append(f"## {path.stem}" + (f"\n\n{_machine(report)}" if "machine" in report else ""))
        parts += [_case(result) for result in report.get("results", [])]
        parts += [section(report) for name, section in SECTIONS.items() if name in report]
        charts = sorted(p for p in folder.glob(f"{path.stem}*") if p.suffix in (".svg", ".png"))
        parts += [f"![{chart.stem}](bench/{chart.name})" for chart in charts]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _machine(report: dict[str, Any]) -> str:
    facts = report["machine"]
    if "gpu" in facts:
        return f"{facts['gpu']}, torch {facts['torch']}, CUDA {facts['cuda']}."
    if "limits" not in report:
        return f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}, torch {facts['torch']}."
    limit = report["limits"]
    held = ", torch held to the same set" if report["options"].get("isa") else ""
    load = ", ".join(f"{x:.1f}" for x in facts["load_average"])
    return (
        f"{facts['cpu']}, {report['options']['threads']} threads, {facts['isa']}, torch {facts['torch']}{held}, "
        f"load {load} at the start. In the same run: copy {limit['copy_gb_s']:.0f} GB/s, matrix product "
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


def _model(report: dict[str, Any]) -> str:
    made = report["mamba_130m"]
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


def _family(report: dict[str, Any]) -> str:
    made = report["linear_family"]
    lines = ["| what | ms | against | its ms | ratio | aim |", "|---|---|---|---|---|---|"]
    for row in made["rows"]:
        times = [f"{1e3 * row[key]:.3g}" for key in ("ours_s", "other_s")]
        cells = [row["what"], times[0], row["against"], times[1], f"{row['ratio']:.3g}", row["aim"]]
        lines.append("| " + " | ".join(cells) + " |")
    memory = made["memory"]
    slopes = " and ".join(f"{slope:.0f}" for slope in memory["bytes_per_token"])
    lengths = ", ".join(memory["peak_bytes"])
    return "\n".join(lines) + (
        "\n\nAgainst a floor the ratio is time over floor, at most the aim; against a peer it is how many times faster "
        f"ours is, at least the aim.\n\nPeak memory of {memory['what']}, inputs and gradients included: {slopes} bytes "
        f"per token between lengths {lengths}."
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


def _sweep(report: dict[str, Any]) -> str:
    recipe, rows = report["recipe"], sorted(report["sweep"], key=lambda row: row["bits_per_byte"])
    softmax = next((row["bits_per_byte"] for row in rows if row["mixer"] == "attention"), None)
    lines = [
        "| mixer | bits per byte | over softmax attention | whole documents | d_mlp | parameters | "
        f"state after {report['state_at']:,} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        over = f"{row['bits_per_byte'] / softmax:.3f}" if softmax else "-"
        sizes = [f"{row[key]:,}" for key in ("d_mlp", "parameters", "state_bytes")]
        figures = [f"{row['bits_per_byte']:.3f}", over, f"{row['bits_per_byte_whole']:.3f}"]
        lines.append("| " + " | ".join([row["mixer"], *figures, *sizes]) + " |")
    return (
        f"Every mixer in the same model: d_model {recipe['d_model']}, {recipe['n_layer']} layers, an MLP whose width "
        f"makes sizes equal, {recipe['steps']} steps of {recipe['batch_size']} x {recipe['seqlen']} bytes of Python's "
        f"standard library, one seed and one learning rate ({recipe['learning_rate']:g}). Bits per byte on held-out "
        f"files, lower is better: in parts of {recipe['seqlen']} bytes, and with the state carried through whole "
        "documents.\n\n" + "\n".join(lines)
    )


def _accelerated(report: dict[str, Any]) -> str:
    told = {
        "forward_s": f"forward, {report['seqlen']} tokens",
        "forward_without_head_s": "forward without the head",
        "train_s": f"training step, {report['train_seqlen']} tokens",
        "decode_s_per_token": "greedy `generate()`, a token",
    }
    lines = ["| | stock, s | accelerated, s | times faster |", "|---|---|---|---|"]
    for key, what in told.items():
        stock, ours = (f"{report[side][key]:.3g}" for side in ("stock", "accelerated"))
        lines.append(f"| {what} | {stock} | {ours} | {report['times_faster'][key]:.2f} |")
    return (
        f"transformers' own {report['model']} with {report['layers']} layers and random weights, before and after "
        f"`seqlib.accelerate_transformers()`; the largest difference of the logits is "
        f"{report['logits_relative_difference']:.1g} of the largest one.\n\n" + "\n".join(lines)
    )


def _decoding(report: dict[str, Any]) -> str:
    lines = [
        "| preset | batch | dtype | from a CUDA graph | from Python | its bytes at the speed of a copy | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["decoding"]:
        times = [f"{row[key]:.3f} ms" for key in ("graph_ms", "python_ms", "floor_ms")]
        ratio = f"{row['graph_ms'] / row['floor_ms']:.2f}"
        lines.append(f"| {row['preset']} | {row['batch']} | {row['dtype']} | {' | '.join(times)} | {ratio} |")
    return (
        "One decoding step of a whole model with random weights, logits included, beside reading its weights once and "
        "reading and writing its state.\n\n" + "\n".join(lines)
    )


def _comparison(report: dict[str, Any]) -> str:
    recipe, baselines = report["recipe"], report["baselines"]
    options = ", ".join(f"{name} {value}" for name, value in recipe["data"].items())
    guesses = ", ".join(f"{name} {100 * value:.1f} %" for name, value in baselines.items())
    header = ["mixer", "test accuracy", *(f"over {name}" for name in baselines), "steps", "seconds", "parameters"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in report["comparison"]:
        mixers = " ".join(" ".join(f"{k}={v}" for k, v in m.items()) for m in row["mixers"].values())
        spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
        cells = [
            f"{100 * row['mean']:.1f}{spread} %",
            *(f"{100 * (row['mean'] - value):+.1f}" for value in baselines.values()),
            str(max(row["steps"])),
            f"{row['seconds']:.0f}",
            f"{row['parameters']:,}",
        ]
        lines.append("| " + " | ".join([mixers.replace("kind=", ""), *cells]) + " |")
    seeds = max(len(row["seeds"]) for row in report["comparison"])
    early = "" if recipe["enough"] == 1 else f" Training ends at {100 * recipe['enough']:g} % on held-out data."
    return (
        f"`seqlib-lra train {recipe['task']} --recipe {recipe['name']} --mixer MIXER --seeds {seeds}`: {options}; "
        f"d_model {recipe['d_model']}, {recipe['n_layer']} layers, at most {recipe['steps']} steps of "
        f"{recipe['batch_size']} sequences, threads: {report['threads']}.{early} Trivial answers score: {guesses}.\n\n"
        + "\n".join(lines)
    )


def _throughput(report: dict[str, Any]) -> str:
    names = {"read": "reading a batch", "step": "training step", "peer": "training step, official S4 code"}
    lines = ["| | ms |", "|---|---|"]
    lines += [f"| {names[name]} | {1e3 * t['wall_min_s']:.3g} |" for name, t in report["timings"].items()]
    over = f" and {report['over_peer']:.2f} times as fast as the official code" if "over_peer" in report else ""
    return (
        f"`seqlib-lra throughput {report['task']} --recipe {report['recipe']}`: batch {report['batch_size']}, seqlen "
        f"{report['seqlen']}, threads: {report['threads']}. Training is {report['data_over_model']:,.0f} times slower "
        f"than its data{over}; evaluation takes {report['evaluation_tokens_per_s']:,.0f} tokens a second.\n\n"
        + "\n".join(lines)
    )


SECTIONS = {
    "mamba_130m": _model,
    "linear_family": _family,
    "state_spaces": _state_spaces,
    "sweep": _sweep,
    "comparison": _comparison,
    "data_over_model": _throughput,
    "decoding": _decoding,
    "times_faster": _accelerated,
    "markdown": lambda report: "\n".join(report["markdown"]),
}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    (root / "BENCHMARKS.md").write_text(page(root / "bench"))
