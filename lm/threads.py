"""How many threads a training run uses, found out while it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from seqlib.dispatch import threads_are_given

__all__ = ["ThreadsCallback"]

_TRIED = 2  # steps with another number of threads; the better one counts, since a step may meet a bad moment
_FIRST_AFTER = 8  # steps; the first ones also load kernels
_RECENT = 5  # steps, whose median says how fast the run is now
_GAIN = 0.95  # of the time of a step: what is not clearly faster is not taken
_CHANGED = 1.4  # times slower or faster than after the last try: other programs have come or gone
_SOONEST, _LATEST = 16, 256  # steps between two tries


class ThreadsCallback(TrainerCallback):
    """Tries half and twice the threads now and then, and keeps what makes steps shortest.

    Where other programs compute too, threads wait for the slowest of them at the end of every operation, so that two
    can be several times slower than one. A try takes two steps. The next one comes after 16 steps, after twice as many
    whenever a try changed nothing (up to 256), and within a few when steps become 1.4 times slower or faster.

    Sums over threads differ in their last digits with the number of threads. A number that the environment variable
    OMP_NUM_THREADS gives is therefore left alone, as it is on GPUs and where several processes train.

    Args:
        say: called with a sentence when the number changes.
        now: the clock, in seconds.
        set_threads: what sets the number.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        now: Callable[[], float] = time.perf_counter,
        set_threads: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self.say, self.now, self.set_threads = say, now, set_threads
        self.most = self.threads = self.before = 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        alone = args.device.type == "cpu" and args.world_size == 1 and not threads_are_given()
        self.before = torch.get_num_threads()
        self.most = self.threads = self.before if alone else 1
        self.recent: list[float] = []
        self.trying: list[int] = []  # numbers that are still to be tried
        self.tried: list[float] = []
        self.best = math.inf, self.threads  # seconds per step, and with which number
        self.usual = 0.0  # seconds per step after the last try
        self.since, self.every = 0, _FIRST_AFTER

    @property
    def current(self) -> int:
        """The number of the next step: what was chosen, or what is being tried."""
        return self.trying[0] if self.trying else self.threads

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.most == 1:
            return
        seconds = self.now() - self.begun
        if self.trying:
            self._try(seconds)
            return
        self.recent = [*self.recent[1 - _RECENT :], seconds]
        self.since += 1
        if self.since == _RECENT:
            self.usual = median(self.recent)
        changed = self.since >= 2 * _RECENT and not 1 / _CHANGED < median(self.recent) / self.usual < _CHANGED
        if changed or self.since >= self.every:
            self.every = _SOONEST if changed else self.every
            self.best = min(self.recent[-_TRIED:]), self.threads
            self.trying = sorted({max(1, self.threads // 2), min(self.most, 2 * self.threads)} - {self.threads})
            self.set_threads(self.trying[0])

    def _try(self, seconds: float) -> None:
        self.tried.append(seconds)
        if len(self.tried) < _TRIED:
            return
        self.best = min(self.best, (min(self.tried) / _GAIN, self.trying.pop(0)))
        self.tried = []
        if self.trying:
            self.set_threads(self.trying[0])
            return
        chosen = self.best[1]
        if chosen == self.threads:
            self.every = min(_LATEST, 2 * max(self.every, _FIRST_AFTER))
        else:
            self.every = _SOONEST
            self.say(f"threads: {chosen} from here on, as steps take less time than with {self.threads}")
        self.threads, self.since, self.recent = chosen, 0, []
        self.set_threads(chosen)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the process its number back, also when training ends in an error."""
        if self.most > 1:
            self.set_threads(self.before)
