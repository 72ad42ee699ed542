"""What a busy neighbour costs: a training step and a decoded token of the demo's model beside other programs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from seqlib.bench import Timing, machine, use_threads
from seqlib.hf.names import CACHE, returned_cache

from .data import load_tokenizer
from .recipes import Recipe, demo
from .threads import ThreadsCallback
from .train import build_model

__all__ = ["AIMS", "bench_busy", "neighbours"]

AIMS = {1: 1.8, 2: 3.0}
"""Times the quiet figure that a step or a token may take beside one and two busy programs on two cores."""
_SETTLING_S = 0.3  # until a program that was started keeps a core busy


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Run the block beside `count` programs that compute without end."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        if programs:
            time.sleep(_SETTLING_S)
        yield
    finally:
        for program in programs:
            program.kill()
        for program in programs:
            program.wait()


def bench_busy(
    *, recipe: Recipe | None = None, counts: tuple[int, ...] = (0, 1, 2), rounds: int = 6, repeats: int = 15
) -> dict[str, Any]:
    """Seconds of a training step and of a token, beside each of `counts` busy programs in turns.

    `train` chooses its threads while it runs, as training does; `train, all threads` does not. The first round is not
    counted: threads are found out in it. Ratios are of medians over the quiet ones of the same run.
    """
    recipe = recipe or demo()
    runs = {"train": _training_step(recipe), "token": _token(recipe)}
    most = torch.get_num_threads()
    chosen = {count: ThreadsCallback(lambda _: None) for count in counts}
    for callback in chosen.values():
        callback.on_train_begin(SimpleNamespace(device=torch.device("cpu"), world_size=1), None, None)
    cases = ("train", "train, all threads", "token")
    timings = {case: {count: Timing([], []) for count in counts} for case in cases}
    with use_threads(most):
        for run in runs.values():
            run()
        for turn in range(rounds + 1):
            for count in counts:
                with neighbours(count):
                    for case in cases:
                        threads = chosen[count] if case == "train" else None
                        torch.set_num_threads(threads.current if threads else most)
                        timing = timings[case][count] if turn else Timing([], [])
                        _time(runs[case.split(",")[0]], timing, repeats, threads)
    made: dict[str, Any] = {"threads": {"most": most} | {str(count): chosen[count].threads for count in counts}}
    for case, by_count in timings.items():
        rows = {str(count): timing.as_dict() for count, timing in by_count.items()}
        quiet = rows[str(min(counts))]["wall_s"]
        made[case] = {count: row | {"ratio": row["wall_s"] / quiet} for count, row in rows.items()}
    return {"machine": machine(), "options": {"rounds": rounds, "repeats": repeats}, "busy": made}


def _time(run: Callable[[], None], timing: Timing, repeats: int, callback: ThreadsCallback | None) -> None:
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        if callback:
            callback.on_step_begin(None, None, None)
        run()
        if callback:
            callback.on_step_end(None, None, None)
        timing.wall.append(time.perf_counter() - wall)
        timing.cpu.append(time.process_time() - cpu)


def _training_step(recipe: Recipe) -> Callable[[], None]:
    model = build_model(recipe, load_tokenizer(recipe.tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    ids = torch.randint(256, (recipe.batch_size, recipe.seqlen), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def _token(recipe: Recipe) -> Callable[[], None]:
    model = build_model(recipe, load_tokenizer(recipe.tokenizer)).eval()
    cache = None
    ids = torch.tensor([[100]])

    def run() -> None:
        nonlocal cache
        with torch.no_grad():
            cache = returned_cache(model(input_ids=ids, **{CACHE: cache}, use_cache=True))

    return run
