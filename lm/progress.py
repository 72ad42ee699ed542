"""What a training run tells while it goes: a bar in the terminal, JSON lines, and a plot of the loss."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from seqlib.errors import SeqlibError
from seqlib.hf.runs import read_metrics, save_figure, write_aside

__all__ = ["CurvesCallback", "MetricsCallback", "ProgressCallback", "plot_loss"]

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal to draw a bar in


class MetricsCallback(TrainerCallback):
    """Appends a JSON line per log to `metrics.jsonl` and stops a run whose loss is no longer a number.

    Keys: step, tokens (read so far, as transformers counts them), loss (nats per token), bits_per_byte, grad_norm,
    learning_rate, tokens_per_s (of the steps since the line before, without saving and evaluating), elapsed_s; lines of
    evaluations have step, tokens and eval_*. On resume, lines after the checkpoint are dropped: they come again.
    """

    def __init__(self, path: Path, bytes_per_token: float) -> None:
        self.path, self.bytes_per_token = path, bytes_per_token
        self.latest: dict[str, Any] = {}
        self.earlier_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
        write_aside(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.earlier_s = max((row.get("elapsed_s", 0.0) for row in kept), default=0.0)
        self.begun = time.perf_counter()
        self.logged_tokens, self.busy_s = _tokens(state), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.busy_s += time.perf_counter() - self.step_begun
        if state.global_step >= state.max_steps:
            control.should_log = True  # also of a run that is shorter than log_every

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise SeqlibError(
                    f"the loss is {loss} at step {state.global_step}; earlier checkpoints are untouched: "
                    "start again with a lower learning_rate, a longer warm-up or tighter clipping"
                )
            tokens = _tokens(state)
            tokens_per_s = (tokens - self.logged_tokens) / self.busy_s
            self.logged_tokens, self.busy_s = tokens, 0.0
            row = {
                "step": state.global_step,
                "tokens": tokens,
                "loss": loss,
                "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
                "grad_norm": logs.get("grad_norm"),
                "learning_rate": logs.get("learning_rate"),
                "tokens_per_s": round(tokens_per_s, 1),
                "elapsed_s": round(self.earlier_s + time.perf_counter() - self.begun, 3),
            }
        elif any(key.startswith("eval_") for key in logs):
            found = {name: value for name, value in logs.items() if name.startswith("eval_")}
            row = {"step": state.global_step, "tokens": _tokens(state)} | found
        else:
            return
        self.latest |= row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class CurvesCallback(TrainerCallback):
    """Writes every logged number for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        for name, value in (logs or {}).items():
            if isinstance(value, (int, float)):
                title = name.replace("eval_", "eval/", 1) if name.startswith("eval_") else f"train/{name}"
                self.writer.add_scalar(title, value, state.global_step)
        self.writer.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.writer.close()


class ProgressCallback(TrainerCallback):
    """Steps, loss, bits per byte, tokens per second and time left: a bar in a terminal, lines elsewhere."""

    def __init__(self, metrics: MetricsCallback, console: Console) -> None:
        self.metrics, self.console = metrics, console
        self.bar: Progress | None = None
        self.last_line = -math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            BarColumn(bar_width=10), TextColumn("{task.completed}/{task.total}  {task.fields[figures]}"),
            TimeRemainingColumn(), TextColumn("left"), console=self.console,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, figures="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs, row = logs or {}, self.metrics.latest
        if "eval_bits_per_byte" in logs:
            self.console.print(
                f"step {state.global_step}: {logs['eval_bits_per_byte']:.3f} bits/byte on validation text"
            )
        if "loss" not in logs:
            return
        figures = f"loss {row['loss']:.3f}  {row['bits_per_byte']:.3f} bits/byte  {row['tokens_per_s']:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, figures=figures)
            return
        now, done = time.perf_counter(), state.global_step >= state.max_steps
        if done or now - self.last_line >= _LINE_EVERY:
            self.last_line = now
            per_step = row["tokens"] / state.global_step
            left = (state.max_steps - state.global_step) * per_step / row["tokens_per_s"]
            self.console.print(f"step {state.global_step}/{state.max_steps}  {figures}  {_clock(left)} left")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also when training ends in an error."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def plot_loss(metrics: Path, png: Path) -> None:
    """Draw bits per byte over training tokens, as logged and smoothed, with the evaluations."""
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    train = [(row["tokens"], row["bits_per_byte"]) for row in rows if "loss" in row]
    if not train:
        return
    held_out = [(row["tokens"], row["eval_bits_per_byte"]) for row in rows if "eval_bits_per_byte" in row]
    tokens, values = zip(*train)
    reach = len(values) // 50
    smooth = [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    few = "o-" if len(values) < 20 else "-"  # a line through one point is nothing
    axes.plot(tokens, values, few, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(tokens, smooth, few, markersize=3, color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out), "o-", color="tab:orange", label="validation")
    axes.axhline(8, color="gray", linestyle="--", linewidth=1, label="every byte alike")
    axes.set(xlabel="tokens", ylabel="bits per byte", ylim=(0, 8.5))
    axes.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, png)


def _tokens(state: Any) -> int:
    return int(state.num_input_tokens_seen)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
