"""Rank 0 decides, all agree: the outcome of a step, an error included, is the same on every rank."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from nemologger.errors import NemologgerError
from nemologger.ranks.failure import Failure
from nemologger.ranks.group import Ranks

T = TypeVar("T")
R = TypeVar("R")


def decide(ranks: Ranks, step: Callable[[], T]) -> T:
    """Run ``step`` on rank 0 and return its result on every rank.

    Raises:
        Exception: What ``step`` raised, on every rank: rank 0 raises it as it is, the others an error of this package
            with the same message.

    Example:
        >>> from nemologger.ranks import SingleProcess
        >>> decide(SingleProcess(), lambda: 42)
        42
    """
    outcome: T | Failure | None = None
    cause: BaseException | None = None
    if ranks.rank == 0:
        try:
            outcome = step()
            if ranks.world_size > 1:
                pickle.dumps(outcome)
        except Exception as error:  # noqa: BLE001  raised again below, on every rank
            cause, outcome = error, Failure.of(error, 0)
    try:
        try:
            shared = ranks.broadcast(outcome)
        except NemologgerError as silent:
            raise silent from cause  # it may be why the others are silent
        if cause is not None:
            raise cause
    finally:
        cause = None  # see _agree
    if isinstance(shared, Failure):
        raise shared.error()
    return shared  # type: ignore[return-value]  # None only if T is


def together(ranks: Ranks, step: Callable[[], T]) -> list[T]:
    """Run ``step`` on every rank and return all results, in rank order, on every rank.

    Raises:
        Exception: If ``step`` failed anywhere. The ranks where it did raise their own error, the others one that names
            the first of those ranks.

    Example:
        >>> from nemologger.ranks import SingleProcess
        >>> together(SingleProcess(), lambda: 42)
        [42]
    """
    return _agree(ranks, step, lambda results: results)


def together_at_zero(ranks: Ranks, step: Callable[[], T]) -> list[T]:
    """As :func:`together`, but only rank 0 gets the results; the others an empty list.

    Thousands of ranks need not all know what each of them did.

    Example:
        >>> from nemologger.ranks import SingleProcess
        >>> together_at_zero(SingleProcess(), lambda: 42)
        [42]
    """
    results: list[T] = []
    _agree(ranks, step, results.extend)
    return results


def all_together(ranks: Ranks, step: Callable[[], bool]) -> bool:
    """As :func:`together`, whether ``step`` says yes on all ranks.

    Example:
        >>> from nemologger.ranks import SingleProcess
        >>> all_together(SingleProcess(), lambda: True)
        True
    """
    return _agree(ranks, step, all)


def _agree(ranks: Ranks, step: Callable[[], T], keep: Callable[[list[T]], R]) -> R:
    """What ``keep`` makes of all results on rank 0; or the first failure, raised on every rank."""
    outcome: T | Failure
    cause: BaseException | None = None
    try:
        outcome = step()
        if ranks.world_size > 1:
            pickle.dumps(outcome)
    except Exception as error:  # noqa: BLE001  raised again below, on every rank
        cause, outcome = error, Failure.of(error, ranks.rank)

    def answer(outcomes: list[T | Failure]) -> R | _FailedRank:
        for rank, other in enumerate(outcomes):
            if isinstance(other, Failure):
                return _FailedRank(rank, other)
        return keep(outcomes)  # type: ignore[arg-type]  # no Failure is among them

    try:
        try:
            shared = ranks.exchange(outcome, answer)
        except NemologgerError as silent:
            raise silent from cause  # it may be why the others are silent
        if cause is not None:
            raise cause
    finally:
        # Its traceback holds this frame, and so all that the callers have in theirs: a failed save's tensors, for example.
        cause = None
    if isinstance(shared, _FailedRank):
        raise shared.failure.error(shared.rank)
    return shared


@dataclass(frozen=True)
class _FailedRank:
    rank: int
    failure: Failure
