"""Who is slow, as a decision over numbers."""

from __future__ import annotations

import pytest

from nemologger.watch.own_time import OwnTime
from nemologger.watch.stragglers import RankTime, batches_to_wait, scores, stragglers


def times(*seconds: float) -> list[RankTime]:
    return [RankTime(f"host{rank}", OwnTime(0.25 * s, 0.75 * s, 9), 1.0) for rank, s in enumerate(seconds)]


@pytest.mark.parametrize(
    ("now", "best", "relative", "individual"),
    [
        ([0.1, 0.1], [0.1, 0.1], [], []),
        ([0.1, 0.2], [0.1, 0.2], [1], []),  # always was slow
        ([0.2, 0.2], [0.2, 0.1], [], [1]),  # as slow as the other, but was faster
        ([0.3, 0.1], [0.1, 0.1], [0], [0]),
        ([0.1, 0.13], [0.1, 0.13], [], []),  # 0.77
        ([0.0, 0.0], [0.0, 0.0], [], []),
    ],
)
def test_scores_against_thresholds(now, best, relative, individual):
    both = scores(times(*now), best)
    only_relative = scores(times(*now), best, individual=False)
    only_individual = scores(times(*now), best, relative=False)
    assert [s.rank for s in stragglers(only_relative, 0.7, 0.7)] == relative
    assert [s.rank for s in stragglers(only_individual, 0.7, 0.7)] == individual
    assert [s.rank for s in stragglers(both, 0.7, 0.7)] == sorted({*relative, *individual})
    assert all(s.relative is None for s in only_individual)


def test_a_straggler_is_named_with_its_numbers():
    (slow,) = stragglers(scores(times(0.1, 0.4), [0.1, 0.2]), 0.7, 0.7)
    assert (slow.rank, slow.host) == (1, "host1")
    assert "400 ms a batch by itself, 100 ms of it for data" in slow.reason
    assert "0.25 times as fast as rank 0 on host host0 (100 ms)" in slow.reason
    assert "0.50 times as fast as it was at its best" in slow.reason


@pytest.mark.parametrize("seconds", [0.001, 0.3, 7.0, 500.0])
def test_looks_at_the_clock_are_few_and_the_interval_is_met(seconds):
    interval, batches, looks = 300.0, 0, 0
    more = 1
    while more:
        batches += more
        looks += 1
        more = batches_to_wait(batches * seconds, batches, interval)
    assert interval <= batches * seconds < interval + 2 * seconds
    assert looks <= 22  # doubling up to 300000 batches
