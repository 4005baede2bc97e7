"""Work that rank 0 asks all ranks for in the middle of a decision: slow as it may be, nobody is taken for dead meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from nemologger.ranks.agreement import decide
from nemologger.ranks.failure import Failure
from nemologger.ranks.group import Ranks

T = TypeVar("T")
Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True)
class _Question:
    what: Any


def decide_with_help(
    ranks: Ranks,
    step: Callable[[Callable[[Q], list[R]]], T],
    work: Callable[[Q], Generator[int, None, R]],
    report: Callable[[int], None] = lambda remaining: None,
) -> T:
    """As :func:`~nemologger.ranks.decide`, of a step that may ask all ranks to work.

    Args:
        ranks: The processes.
        step: What rank 0 does. It is given a function that lets every rank work on a question, and returns what they have
            found, in rank order. It may ask any number of times.
        work: How a rank works on a question. It yields now and then, more often than the ranks' timeout, how much it still
            has to do, and returns what it has found.
        report: Called on rank 0 with how much all ranks still have to do, as often as the slowest of them yields.

    Raises:
        Exception: What ``step`` raised, on every rank, as by :func:`~nemologger.ranks.decide`. If the work failed on some
            rank, the question raises an error that names the first of those, in ``step``.

    Example:
        >>> from nemologger.ranks import SingleProcess
        >>> def squares(below):
        ...     yield below
        ...     return [number**2 for number in range(below)]
        >>> decide_with_help(SingleProcess(), lambda ask: sum(ask(4)[0]), squares)
        14
    """

    def ask(question: Q) -> list[R]:
        if ranks.world_size > 1:
            ranks.broadcast(_Question(question))
        return _found(_work(ranks, work(question), report))

    if ranks.rank == 0:
        return decide(ranks, lambda: step(ask))
    shared: Any = ranks.broadcast(None)
    while isinstance(shared, _Question):
        _work(ranks, work(shared.what), report)
        shared = ranks.broadcast(None)
    if isinstance(shared, Failure):
        raise shared.error()
    return shared  # type: ignore[no-any-return]


def _work(ranks: Ranks, steps: Generator[int, None, R], report: Callable[[int], None]) -> list[R | Failure]:
    """Take part until all ranks are done: what each has found, or why it has not, on rank 0."""
    found: list[R | Failure] = []
    remaining = 0
    mine: list[R | Failure] = []

    def answer(states: list[tuple[int, list[R | Failure]]]) -> bool:
        finished = all(outcome for _, outcome in states)
        if finished:
            found.extend(outcome[0] for _, outcome in states)
        else:
            report(sum(left for left, outcome in states if not outcome))
        return finished

    with closing(steps):
        finished = False
        while not finished:
            if not mine:
                try:
                    remaining = next(steps)
                except StopIteration as end:
                    mine.append(end.value)
                except Exception as error:  # noqa: BLE001  raised again on rank 0
                    mine.append(Failure.of(error, ranks.rank))
            finished = ranks.exchange((remaining, mine), answer)
    return found


def _found(outcomes: list[R | Failure]) -> list[R]:
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            raise outcome.error(rank)
    return [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
