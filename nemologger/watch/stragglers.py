"""Which rank is slow: a decision over numbers that all ranks have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemologger.watch.own_time import OwnTime


@dataclass(frozen=True)
class RankTime:
    """What one rank tells the others.

    Attributes:
        host: Where it runs.
        own: How long it worked on a batch.
        elapsed: Seconds since the last report, everything included.
    """

    host: str
    own: OwnTime
    elapsed: float


@dataclass(frozen=True)
class Score:
    """How fast one rank is: 1.0 as fast as what it is compared with, 0.5 half as fast.

    Attributes:
        rank: Its number.
        time: What it told.
        relative: Compared with the fastest rank of this report; None if that was not asked for.
        individual: Compared with the best report of the rank itself; None if that was not asked for.
    """

    rank: int
    time: RankTime
    relative: float | None
    individual: float | None


@dataclass(frozen=True)
class Straggler:
    """A slow rank.

    Attributes:
        rank: Its number.
        host: Where it runs.
        reason: What is slow about it, in words.
    """

    rank: int
    host: str
    reason: str


def scores(
    times: Sequence[RankTime], best: Sequence[float], *, relative: bool = True, individual: bool = True
) -> list[Score]:
    """Compare ranks.

    Args:
        times: What each rank told.
        best: The shortest time of each rank so far, this report included.
        relative: Compare each with the fastest.
        individual: Compare each with its own best.

    Example:
        >>> slow, fast = (RankTime("a", OwnTime(0.0, seconds, 9), 1.0) for seconds in (0.4, 0.1))
        >>> [(score.relative, score.individual) for score in scores([slow, fast], [0.2, 0.1])]
        [(0.25, 0.5), (1.0, 1.0)]
    """
    fastest = min(time.own.seconds for time in times)
    return [
        Score(
            rank,
            time,
            _ratio(fastest, time.own.seconds) if relative else None,
            _ratio(best[rank], time.own.seconds) if individual else None,
        )
        for rank, time in enumerate(times)
    ]


def stragglers(found: Sequence[Score], relative_threshold: float, individual_threshold: float) -> list[Straggler]:
    """The ranks whose scores are below a threshold, in rank order."""
    fastest = min(found, key=lambda score: score.time.own.seconds)
    slow = []
    for score in found:
        own = score.time.own
        parts = f"{own.seconds * 1e3:.3g} ms a batch by itself, {own.data * 1e3:.3g} ms of it for data"
        reasons = []
        if score.relative is not None and score.relative < relative_threshold:
            reasons.append(
                f"{score.relative:.2f} times as fast as rank {fastest.rank} on host {fastest.time.host} "
                f"({fastest.time.own.seconds * 1e3:.3g} ms)"
            )
        if score.individual is not None and score.individual < individual_threshold:
            reasons.append(f"{score.individual:.2f} times as fast as it was at its best")
        if reasons:
            slow.append(Straggler(score.rank, score.time.host, f"{parts}: {' and '.join(reasons)}"))
    return slow


def batches_to_wait(elapsed: float, batches: int, interval: float) -> int:
    """After how many more batches ranks should look at the clock together; 0: the interval is over.

    Every rank computes it from the same numbers, so that nothing need be exchanged in between. It looks ahead no further
    than it has seen: a rate measured over few batches is a guess.

    Args:
        elapsed: Seconds since the last report.
        batches: Batches in them, at least 1.
        interval: Seconds between two reports.

    Example:
        >>> batches_to_wait(2.0, 1, 300.0), batches_to_wait(200.0, 100, 300.0), batches_to_wait(300.0, 150, 300.0)
        (1, 50, 0)
    """
    if elapsed >= interval:
        return 0
    left = math.ceil((interval - elapsed) / max(elapsed / batches, 1e-9))
    return max(1, min(left, batches))


def _ratio(reference: float, value: float) -> float:
    return 1.0 if value <= 0.0 else min(reference / value, 1.0)
