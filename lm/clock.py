"""Training by the clock: how far a run has come, its learning rate and its end follow from the time that has passed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from seqlib.errors import ConfigError

__all__ = ["Clock"]

_WARMUP = 0.05  # share of the time
_WARMUP_STEPS = 10  # at least
_KNOWN_AFTER, _KNOWN_SHARE = 20.0, 0.1  # seconds, and share of the time, after the first of which a speed is believed
_LONGER = 1.5  # by how much a run goes on whose model is not good enough


class Clock(TrainerCallback):
    """Fits a run to a span of time, whatever its speed is and however that changes.

    The learning rate rises, then falls as a cosine of the share of the time that has passed, or of the steps where
    those end first. Nothing is planned from a trial: a machine that becomes slower trains fewer steps, all of the
    schedule nevertheless. `state.max_steps` is what the speed so far lets expect, for those who show it.

    Args:
        seconds: time of the training.
        longest: time that it may take while `enough` steps are not reached or `good` says no.
        enough: steps that such a model is known to need.
        good: whether the model may be left as it is; asked at the end of the time.
        final: where the cosine ends, as a share of the learning rate.
        say: called with a sentence when the plan changes.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        *,
        seconds: float,
        longest: float,
        enough: int,
        good: Callable[[Any], bool],
        final: float,
        say: Callable[[str], None],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0 < seconds <= longest < math.inf:
            raise ConfigError(f"the time must be positive and at most {longest} s, got {seconds} s")
        self.seconds, self.longest, self.enough = seconds, longest, enough
        self.good, self.final, self.say, self.now = good, final, say, now
        self.end = seconds
        self.too_slow = False
        self.steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.begun, self.earlier, self.most = self.now(), state.global_step, state.max_steps
        scheduler = getattr(parts["lr_scheduler"], "scheduler", parts["lr_scheduler"])  # accelerate's wrapper
        scheduler.lr_lambdas = [self.factor] * len(scheduler.lr_lambdas)
        for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs):
            group["lr"] = base * self.factor(0)

    def factor(self, step: int) -> float:
        """The learning rate, as a share of the highest, of the step after `step` steps."""
        share = self.share(step)
        rising = min(share / _WARMUP, (step + 1) / _WARMUP_STEPS)
        falling = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share))
        return max(min(rising, falling), 0.01)

    def share(self, step: int) -> float:
        """How much of the run is done, 0 to 1."""
        return min(1.0, max((self.now() - self.begun) / self.end, step / self.most))

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.steps = step = state.global_step
        elapsed = self.now() - self.begun
        self._expect(step - self.earlier, elapsed)
        share = self.share(step)
        state.max_steps = min(self.most, max(step + 2, round(step / share)))  # + 2: transformers ends at this number
        if share < 1:
            return
        may_go_on = step < self.most and not self.too_slow and elapsed < self.longest
        if not self.good(parts["model"]) and may_go_on:
            self.seconds = self.end = min(self.longest, _LONGER * max(elapsed, self.end))
            self.say(f"not good enough yet: training goes on, until {_minutes(self.end)} at most")
            return
        state.max_steps = step
        control.should_training_stop = control.should_log = control.should_save = True

    def _expect(self, steps: int, elapsed: float) -> None:
        """Move the end to where `enough` steps are done, if that is within the longest time; if not, say so."""
        if elapsed < min(_KNOWN_AFTER, _KNOWN_SHARE * self.seconds) or steps < 2 or self.enough >= self.most:
            return
        needed = self.enough * elapsed / steps
        if needed <= self.longest:
            if needed > 1.2 * self.end:
                self.say(
                    f"this machine is slow now: training takes up to {_minutes(needed)} instead of the planned time"
                )
            self.too_slow, self.end = False, max(self.seconds, needed)
            return
        if not self.too_slow:
            self.say(
                f"this machine is too slow now: {elapsed / steps:.1f} s per step, so about {self.enough} steps, which "
                f"the model needs, would take {_minutes(needed)} of at most {_minutes(self.longest)}. It trains for "
                f"{_minutes(self.seconds)} all the same and will be worse. Stop other programs, or give more time with "
                f"--minutes {math.ceil(1.3 * needed / 60)}"
            )
        self.too_slow, self.end = True, self.seconds


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"
