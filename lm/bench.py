"""Whole models against their peers in transformers: same weights, same logits, then the clock."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqlib.bench import Peer, Timing, interleaved, limits, machine
from seqlib.errors import SeqlibError

from .bench_busy import AIMS, bench_busy
from .bench_linear import bench_linear_family

__all__ = ["OP_PEERS", "bench_mamba", "report_busy", "report_linear_family", "report_mamba"]


def _scan_channels_first(t: dict[str, Any]) -> dict[str, Any]:
    timed = {"hidden_states": "x", "dt": "dt", "B": "B", "C": "C", "z": "z"}
    made = {name: t[ours].transpose(1, 2).contiguous() for name, ours in timed.items()}
    return made | {"A": t["A"], "D": t["D"], "delta_bias": t["dt_bias"], "delta_softplus": t["dt_softplus"]}


def _scan(**arguments: Any) -> Tensor:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan(**arguments).transpose(1, 2)


# For `seqlib.bench.report`, which may not import transformers itself.
OP_PEERS = {"selective_scan": {"transformers": Peer(_scan_channels_first, _scan)}}


def _pair(n_layer: int) -> tuple[nn.Module, nn.Module]:
    """A Mamba of 130M geometry with random weights: ours, and transformers' with the very same weights."""
    from transformers import MambaConfig, MambaForCausalLM

    from seqlib import from_pretrained

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=768, num_hidden_layers=n_layer, vocab_size=50280)
    theirs = MambaForCausalLM(config).eval()
    # transformers draws projections from N(0, 0.1), which makes logits chaotic; published models start small.
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 2 and not name.endswith("A_log"):
            nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return from_pretrained(folder), theirs


def bench_mamba(
    *,
    n_layer: int = 24,
    train_layers: int = 2,
    seqlen: int = 512,
    new_tokens: int = 32,
    repeats: int = 5,
    budget: float = 60.0,
) -> dict[str, Any]:
    """Forward, training step and greedy decoding of a 130M Mamba beside transformers' MambaForCausalLM.

    The training step is compared on `train_layers` layers of the same width, because the peer's backward is quadratic
    in seqlen and takes minutes at full depth.

    Raises:
        SeqlibError: logits or greedy tokens differ; a wrong model has no speed.
    """
    ids = torch.randint(50280, (1, seqlen), generator=torch.Generator().manual_seed(1))
    report = {"n_layer": n_layer, "seqlen": seqlen, "train_layers": train_layers, "new_tokens": new_tokens}
    report |= _inference(_pair(n_layer), ids, new_tokens, repeats, budget)
    models = dict(zip(("seqlib", "transformers"), _pair(train_layers)))
    steps = {name: _training_step(model, ids) for name, model in models.items()}
    return report | {"train": _ratio(interleaved(steps, repeats, budget))}


def report_mamba(json_file: Path | None, *, repeats: int, budget: float) -> None:
    """Run `bench_mamba`, print what is asked most, and write everything to `json_file`."""
    count = torch.get_num_threads()
    report: dict[str, Any] = {"machine": machine(), "options": {"threads": count}, "limits": limits(count)}
    report["mamba_130m"] = made = bench_mamba(repeats=repeats, budget=budget)
    for kind in ("forward", "train", "decode"):
        ours, theirs = (1e3 * made[kind][name]["wall_s"] for name in ("seqlib", "transformers"))
        print(f"{kind:<8} seqlib {ours:8.0f} ms   transformers {theirs:8.0f} ms   {made[kind]['ratio']:.1f}x")
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")


def report_busy(json_file: Path | None, *, repeats: int) -> None:
    """Run `bench_busy`, print its ratios beside what is aimed at, and write everything to `json_file`."""
    report = bench_busy(repeats=repeats)
    for case, rows in ((name, rows) for name, rows in report["busy"].items() if name != "threads"):
        for count, row in rows.items():
            aim = f" (at most {AIMS[int(count)]})" if int(count) in AIMS else ""
            print(f"{case:<20}{count} busy  {1e3 * row['wall_s']:9.2f} ms  {row['ratio']:5.2f}{aim}")
    threads = report["busy"]["threads"]
    print("threads: " + ", ".join(f"{number} beside {count}" for count, number in threads.items() if count != "most"))
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")


def report_linear_family(json_file: Path | None, *, repeats: int, budget: float) -> None:
    """Run `bench_linear_family`, print its rows, and write everything to `json_file`."""
    report = bench_linear_family(repeats=repeats, budget=budget)
    for row in report["linear_family"]["rows"]:
        print(f"{1e3 * row['ours_s']:9.3f} ms  {row['ratio']:7.2f} ({row['aim']})  {row['what']}; {row['against']}")
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")


@torch.no_grad()
def _inference(pair: tuple[Any, Any], ids: Tensor, new_tokens: int, repeats: int, budget: float) -> dict[str, Any]:
    ours, theirs = pair
    got, want = ours(ids).logits, theirs(ids).logits
    error = float((got - want).norm() / want.norm())
    if error > 2e-5:
        raise SeqlibError(f"logits differ by {error:.1e} relative; no speed is reported")
    models = {"seqlib": ours, "transformers": theirs}
    forward = interleaved({name: partial(model, ids) for name, model in models.items()}, repeats, budget)

    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    generate = {name: partial(model.generate, ids[:, :16], **lengths) for name, model in models.items()}
    if not torch.equal(generate["seqlib"](), generate["transformers"]()):
        raise SeqlibError("greedy continuations differ; no speed is reported")
    decode = interleaved(generate, repeats, budget)
    speeds = {f"{name}_tokens_per_s": new_tokens / statistics.median(t.wall) for name, t in decode.items()}
    return {"logits_relative_error": error, "forward": _ratio(forward), "decode": _ratio(decode) | speeds}


def _training_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def run() -> None:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    return run


def _ratio(timings: dict[str, Timing]) -> dict[str, Any]:
    made: dict[str, Any] = {name: timing.as_dict() for name, timing in timings.items()}
    made["ratio"] = made["transformers"]["wall_s"] / made["seqlib"]["wall_s"]
    return made
