"""Training by the clock, and the threads that it chooses, on clocks that the tests turn."""

from __future__ import annotations

import functools
import math
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from seqlib.errors import ConfigError
from seqlib.lm import clock as clocks
from seqlib.lm import threads as teams
from seqlib.lm.bench_busy import bench_busy, neighbours
from seqlib.lm.clock import Clock
from seqlib.lm.recipes import tiny
from seqlib.lm.threads import ThreadsCallback


class _Run:
    """A loop of `most` steps, as transformers drives its callbacks, on a clock that moves by `seconds(step)`."""

    def __init__(self, seconds: Callable[[int], float], *, most: int = 4000) -> None:
        self.seconds, self.time = seconds, 1000.0
        self.said: list[tuple[float, str]] = []
        self.rates: list[float] = []
        self.state = SimpleNamespace(global_step=0, max_steps=most)
        self.control = SimpleNamespace(should_training_stop=False, should_log=False, should_save=False)

    def now(self) -> float:
        return self.time

    def say(self, sentence: str) -> None:
        self.said.append((self.time - 1000, sentence))

    def clock(self, **given: Any) -> Clock:
        usual = {"seconds": 200, "longest": 800, "enough": 100, "good": lambda _: True, "final": 0.1}
        return Clock(say=self.say, now=self.now, **(usual | given))

    def go(self, clock: Clock) -> float:
        """Train to the end and return how long it took."""
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 60, self.state.max_steps, min_lr_rate=0.1)
        clock.on_train_begin(None, self.state, self.control, lr_scheduler=scheduler)
        while not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.time += self.seconds(self.state.global_step)
            optimizer.step()
            scheduler.step()
            self.state.global_step += 1
            clock.on_step_end(None, self.state, self.control, model=None)
        return self.time - 1000


SPEEDS: dict[str, Callable[[int], float]] = {
    "steady": lambda step: 0.2,
    "slower": lambda step: 0.1 if step < 500 else 0.6,
    "faster": lambda step: 0.5 if step < 100 else 0.05,
    "slow start": lambda step: 15 if step < 2 else 0.2,
    "uneven": lambda step: 2.0 if step % 7 == 0 else 0.1,
}


@pytest.mark.parametrize("name", SPEEDS)
def test_a_run_ends_in_time_and_its_schedule_is_whole(name: str) -> None:
    """Whatever the speed is, and whenever it changes: the rate has risen to its top and fallen to its end."""
    run = _Run(SPEEDS[name])
    took = run.go(clock := run.clock())
    assert run.control.should_training_stop and 200 <= took <= 205
    assert max(run.rates) > 1.9 and run.rates[-1] == pytest.approx(0.2, rel=0.05)
    top = run.rates.index(max(run.rates))
    assert all(a <= b for a, b in zip(run.rates[:top], run.rates[1:top]))
    assert all(a >= b for a, b in zip(run.rates[top:], run.rates[top + 1 :]))
    assert clock.steps == run.state.global_step == run.state.max_steps


def test_a_fast_machine_takes_all_steps_and_no_more() -> None:
    run = _Run(lambda step: 0.001, most=500)
    assert run.go(run.clock(enough=100)) < 1 and run.state.global_step == 500
    assert run.rates[-1] == pytest.approx(0.2, rel=0.05)


def test_a_slow_machine_gets_the_time_that_it_needs() -> None:
    run = _Run(lambda step: 5.0)
    assert run.go(run.clock()) == pytest.approx(500, abs=10)
    assert run.state.global_step == pytest.approx(100, abs=2) and run.rates[-1] == pytest.approx(0.2, rel=0.1)
    (when, said), *more = run.said
    assert when <= 25 and "this machine is slow now: training takes up to 8.3 minutes" in said
    assert len(more) <= 3, "it is not said at every step"


def test_a_machine_that_is_too_slow_is_told_early_and_what_to_do() -> None:
    run = _Run(lambda step: 10.0)
    assert run.go(run.clock(good=lambda _: False)) == pytest.approx(200, abs=11)
    ((when, said),) = run.said
    assert when <= 25
    assert "too slow now: 10.0 s per step" in said and "16.7 minutes of at most 13.3 minutes" in said
    assert "Stop other programs, or give more time with --minutes 22" in said


def test_a_machine_that_recovers_is_too_slow_no_longer() -> None:
    run = _Run(lambda step: 10.0 if step < 5 else 0.5)
    assert run.go(run.clock()) == pytest.approx(200, abs=5) and run.state.global_step > 250


def test_a_model_that_is_not_good_trains_on_until_it_is() -> None:
    """Asked at the end only; the schedule falls again to its end."""
    asked: list[float] = []

    def good(_: Any) -> bool:
        asked.append(run.time - 1000)
        return len(asked) > 1

    run = _Run(lambda step: 0.25)
    took = run.go(run.clock(good=good))
    assert len(asked) == 2 and asked[0] == pytest.approx(200, abs=1) and took == pytest.approx(300, abs=1)
    assert "not good enough yet" in run.said[0][1] and run.rates[-1] == pytest.approx(0.2, rel=0.05)


def test_a_model_that_never_is_good_ends_at_the_longest_time() -> None:
    run = _Run(lambda step: 0.25)
    assert run.go(run.clock(good=lambda _: False)) == pytest.approx(800, abs=2)


@pytest.mark.parametrize("times", [(0, 10), (20, 10), (math.nan, 10), (5, math.inf)])
def test_times_are_checked(times: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="the time must be positive"):
        _Run(lambda step: 1).clock(seconds=times[0], longest=times[1])


def test_times_are_told_in_words() -> None:
    assert clocks._minutes(42.4) == "42 s" and clocks._minutes(200) == "3.3 minutes"


class _Machine:
    """`cores` cores, some with busy programs, and a step divided among threads that wait for each other."""

    def __init__(self, busy: Callable[[int], int], *, cores: int = 2) -> None:
        self.busy, self.cores, self.time = busy, cores, 0.0
        self.used: list[int] = []
        self.said: list[str] = []

    def seconds(self, step: int, threads: int) -> float:
        waits = threads + self.busy(step) > self.cores and threads > 1
        return 0.36 / threads * (4 if waits else 1.05)

    def go(self, monkeypatch: pytest.MonkeyPatch, steps: int, **arguments: Any) -> None:
        team = [self.cores]
        monkeypatch.setattr(teams.torch, "get_num_threads", lambda: team[0])
        callback = ThreadsCallback(
            self.said.append, now=lambda: self.time, set_threads=lambda n: team.__setitem__(0, n)
        )
        args = SimpleNamespace(**({"device": torch.device("cpu"), "world_size": 1} | arguments))
        callback.on_train_begin(args, None, None)
        for step in range(steps):
            callback.on_step_begin(args, None, None)
            self.used.append(team[0])
            self.time += self.seconds(step, team[0])
            callback.on_step_end(args, None, None)
        callback.on_train_end(args, None, None)
        self.left = team[0]


@pytest.fixture
def free_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_a_quiet_machine_keeps_its_threads(free_threads, monkeypatch) -> None:
    machine = _Machine(lambda step: 0)
    machine.go(monkeypatch, 1000)
    assert machine.used.count(1) <= 16 and not machine.said, "tries are rare where they change nothing"


def test_threads_follow_a_neighbour_that_comes_and_goes(free_threads, monkeypatch) -> None:
    machine = _Machine(lambda step: 100 <= step < 500)
    machine.go(monkeypatch, 800)
    assert machine.used[120:500].count(1) > 340, "one thread beside it, but for tries"
    assert machine.used[620:].count(2) > 150, "and two when it has gone"
    assert machine.said == [
        "threads: 1 from here on, as steps take less time than with 2",
        "threads: 2 from here on, as steps take less time than with 1",
    ]
    assert machine.left == 2, "the process gets its number back"


def test_a_neighbour_is_noticed_within_steps(free_threads, monkeypatch) -> None:
    machine = _Machine(lambda step: step >= 300)
    machine.go(monkeypatch, 340)
    assert machine.used[312:].count(1) > 20


def test_more_cores_are_halved_where_that_helps(free_threads, monkeypatch) -> None:
    machine = _Machine(lambda step: 3, cores=8)
    machine.go(monkeypatch, 300)
    assert machine.used[-100:].count(4) > 80 and 1 not in machine.used


@pytest.mark.parametrize("arguments", [{"device": torch.device("cuda")}, {"world_size": 2}, {"named": True}])
def test_numbers_of_others_are_left_alone(free_threads, monkeypatch, arguments: dict[str, Any]) -> None:
    if arguments.pop("named", False):
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    machine = _Machine(lambda step: 1)
    machine.go(monkeypatch, 100, **arguments)
    assert set(machine.used) == {2}


def test_busy_programs_are_there_and_go(monkeypatch) -> None:
    """And the figures beside them have a quiet one to be compared with."""
    made = bench_busy(recipe=tiny(), counts=(0, 1), rounds=1, repeats=2)["busy"]
    assert set(made) == {"threads", "train", "train, all threads", "token"}
    for case in ("train", "train, all threads", "token"):
        assert made[case]["0"]["ratio"] == 1 and made[case]["1"]["ratio"] > 0 and made[case]["1"]["repeats"] == 2
    started = []
    monkeypatch.setattr(subprocess, "Popen", functools.partial(_kept, started, subprocess.Popen))
    with pytest.raises(KeyboardInterrupt), neighbours(2):
        assert [program.poll() for program in started] == [None, None]
        raise KeyboardInterrupt
    assert all(program.poll() is not None for program in started)


def _kept(started: list[Any], popen: Callable[..., Any], *arguments: Any) -> Any:
    started.append(popen(*arguments))
    return started[-1]
