from __future__ import annotations

import time

import pytest

from nemologger.callbacks.step_timer import StepTimer
from nemologger.errors import ConfigurationError


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", 3.0), ("sum", 9.0), ("min", 1.0), ("max", 5.0), ("none", 3.0)]
)
def test_the_last_steps_are_reduced(reduction, expected):
    timer = StepTimer(buffer_size=3, reduction=reduction)
    assert timer.value is None
    for seconds in (100.0, 1.0, 5.0, 3.0):
        timer.add(seconds)
    assert timer.value == expected
    assert timer.total == 9.0


@pytest.mark.parametrize("size", [1, 0, -1])
def test_without_a_window_it_is_the_last_step(size):
    timer = StepTimer(buffer_size=size)
    timer.add(1.0)
    timer.add(2.0)
    assert timer.value == 2.0


@pytest.mark.usefixtures("clock")
def test_it_measures():
    timer = StepTimer(buffer_size=5, reduction="min")
    for _ in range(3):
        timer.start()
        time.sleep(0.02)
        timer.stop()
    assert timer.value == pytest.approx(0.02)


@pytest.mark.usefixtures("clock")
def test_laps_follow_each_other_without_a_gap():
    timer = StepTimer(buffer_size=10, reduction="sum")
    timer.start()
    for _ in range(3):
        time.sleep(0.01)
        timer.lap()
    assert timer.value == pytest.approx(0.03)


def test_an_end_without_a_beginning_is_no_step():
    timer = StepTimer()
    timer.stop()
    assert timer.value is None
    timer.lap()
    assert timer.value is None


@pytest.mark.parametrize("kwargs", [{"reduction": "median"}, {"buffer": 3}, {"buffer_size": "many"}])
def test_what_is_wrong_is_named(kwargs):
    with pytest.raises(ConfigurationError, match=r"Owner\(timer_kwargs=.*buffer_size, reduction and sync_cuda"):
        StepTimer.made_of("Owner", kwargs)
