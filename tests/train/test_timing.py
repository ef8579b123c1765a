"""When a run stops before its end, by a clock that the test moves."""

from __future__ import annotations

from hpc_oialr.train.timing import Stopping, StopRequest


class Clock:
    def __init__(self):
        self.now = 10_000.0

    def __call__(self):
        return self.now

    def ticks(self, stopping, seconds, most=10_000):
        """Steps of so many seconds until the run wants to stop; how many."""
        for step in range(1, most):
            self.now += seconds
            if stopping.wanted():
                return step
        return most


def make(left_s, checkpoint_s=0.0):
    clock = Clock()
    deadline = None if left_s is None else clock.now + left_s
    return clock, Stopping(StopRequest(deadline=deadline), checkpoint_s=checkpoint_s, clock=clock)


def test_without_an_end_and_a_request_a_run_goes_on():
    clock, stopping = make(None)
    assert clock.ticks(stopping, 1.0) == 10_000


def test_a_request_counts_at_once():
    asked = iter(["", "", "signal USR2"])
    word = "signal USR2"
    stopping = Stopping(StopRequest(lambda: next(asked, word)))
    assert [stopping.wanted() for _ in range(3)] == [False, False, True]
    assert stopping.reason == "signal USR2"


def test_a_known_checkpoint_just_fits():
    """Two steps and two checkpoints of the longest kind, and ten seconds to leave."""
    clock, stopping = make(1_000, checkpoint_s=30)
    assert clock.ticks(stopping, 5.0) == (1_000 - 2 * (5 + 30) - 10) / 5
    assert stopping.reason == "80 s before the end of the job"


def test_the_longest_step_counts():
    """A conversion, or an evaluation, may come again."""
    clock, stopping = make(1_000, checkpoint_s=30)
    clock.ticks(stopping, 100.0, most=2)
    assert clock.ticks(stopping, 5.0) == (900 - 2 * (100 + 30) - 10) / 5


def test_checkpoints_are_measured_and_are_no_steps():
    clock, stopping = make(1_000, checkpoint_s=1)
    clock.ticks(stopping, 5.0, most=2)
    clock.now += 50
    stopping.saved(50)
    assert stopping.needed_s == 2 * (5 + 50) + 10
    assert clock.ticks(stopping, 5.0) == (945 - 2 * (5 + 50) - 10) / 5


def test_before_the_first_checkpoint_a_tenth_of_the_time_is_kept_for_it():
    assert make(60)[1].needed_s == 2 * 6 + 10
    assert make(100_000)[1].needed_s == 2 * 120 + 10


def test_the_time_before_the_first_step_is_none():
    clock, stopping = make(1_000, checkpoint_s=1)
    clock.now += 100
    stopping.restart()
    assert not stopping.wanted()
    assert stopping.needed_s == 2 * 1 + 10


def test_another_process_asks():
    assert make(None)[1].reason == "stop requested by another rank"
