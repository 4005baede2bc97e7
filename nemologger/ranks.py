"""Rank 0 decides, all agree: the outcome of a step, an error included, is the same on every rank.

The functions here are collective: every rank calls them, in the same order, from its main thread.
"""

from __future__ import annotations

import atexit
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch.distributed as dist

from nemologger.errors import NemologgerError, RankError
from nemologger.rank_tree import RankTree

T = TypeVar("T")
R = TypeVar("R")

#: How long one rank waits for another, unless it is told.
DEFAULT_TIMEOUT = timedelta(minutes=10)


class Ranks(Protocol):
    """The processes of one run, seen from one of them."""

    @property
    def rank(self) -> int:
        """This process's number, 0 to ``world_size - 1``."""

    @property
    def world_size(self) -> int:
        """How many processes there are."""

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, on every rank, in rank order."""

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value``, on every rank."""

    def exchange(self, value: T, answer: Callable[[list[T]], R]) -> R:
        """Rank 0's ``answer`` to every rank's ``value``, on every rank. Only rank 0 calls ``answer``."""

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks at each place, on every rank. Far cheaper than the others: nothing is pickled."""

    def missing_at(self, point: str, seconds: float) -> int:
        """How many ranks do not come to ``point`` within ``seconds``. For where it is not known that all of them will."""


@dataclass(frozen=True)
class SingleProcess:
    """One process: nobody to agree with."""

    rank: int = 0
    world_size: int = 1

    def gather(self, value: T) -> list[T]:
        """This one's."""
        return [value]

    def broadcast(self, value: T) -> T:
        """This one's."""
        return value

    def exchange(self, value: T, answer: Callable[[list[T]], R]) -> R:
        """Its own answer to itself."""
        return answer([value])

    def largest(self, values: Sequence[float]) -> list[float]:
        """This one's."""
        return list(values)

    def missing_at(self, point: str, seconds: float) -> int:
        """None: this one is there."""
        return 0


class ProcessGroup:
    """The ranks of an initialized ``torch.distributed``.

    Values travel over a gloo group of their own: they stay off the GPU, and a rank that does not answer within ``timeout``
    ends the wait with a :class:`~nemologger.errors.SilentRankError` that names it, whatever the training group's patience.
    Rank 0 itself is given up after twice that time: it may be waiting for another one.

    Every rank of a gloo group is connected to every other: descriptors and threads on all of them, which are given back with
    the process group of the run and no sooner. So :func:`connect` shares one group among all who have the same patience.

    Args:
        timeout: How long to wait for a rank.
        shared: Use the group that others have made with this timeout, if there is one and no rank has been silent in it.
            The same on all ranks.

    Raises:
        RankError: The ranks cannot reach each other.
    """

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT, *, shared: bool = False) -> None:
        leave_at_exit()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._tree = _shared_tree(timeout) if shared else _new_tree(timeout)
        self._name = self.broadcast(uuid4().hex)  # its points are not those of others in the same group

    def gather(self, value: T) -> list[T]:
        """See :class:`Ranks`."""
        return self.exchange(value, lambda values: values)

    def broadcast(self, value: T) -> T:
        """See :class:`Ranks`."""
        return self._tree.broadcast(value)  # type: ignore[no-any-return]

    def exchange(self, value: T, answer: Callable[[list[T]], R]) -> R:
        """See :class:`Ranks`."""
        return self._tree.exchange(value, answer)  # type: ignore[no-any-return]

    def largest(self, values: Sequence[float]) -> list[float]:
        """See :class:`Ranks`."""
        return self._tree.largest(values)

    def missing_at(self, point: str, seconds: float) -> int:
        """See :class:`Ranks`."""
        return self._tree.missing_at(f"{self._name}/{point}", seconds)


# torch has one process group for the whole process, and what is made of it is here as long as that is there.
_TREES: WeakKeyDictionary[dist.ProcessGroup, dict[timedelta, RankTree]] = WeakKeyDictionary()


def _shared_tree(timeout: timedelta) -> RankTree:
    world = dist.group.WORLD
    if world is None:
        raise RankError("torch.distributed is not initialized: there are no ranks to connect to")
    trees = _TREES.setdefault(world, {})
    if timeout not in trees or trees[timeout].is_broken:
        whole = next((tree for tree in trees.values() if not tree.is_broken), None)
        if whole is not None:
            # Who makes a group does not see that a rank has died which has not come to it yet; a group that is there does.
            whole.exchange(None, len)
        trees[timeout] = _new_tree(timeout)
    return trees[timeout]


def _new_tree(timeout: timedelta) -> RankTree:
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:  # NCCL may get through all the same: it looks for an interface by itself
        raise RankError(
            f"rank {dist.get_rank()} cannot reach the others, beside training, over the network interface that its host "
            f"name stands for: {error}\nName the one that connects the hosts in the environment of all ranks, for example "
            "GLOO_SOCKET_IFNAME=eth0"
        ) from error
    return RankTree(group, timeout)


def leave_at_exit() -> None:
    """Take the process groups down before the interpreter goes.

    Gloo's threads, still there when it is torn down, now and then end a process that has done all its work with SIGABRT.
    Lightning takes care of NCCL's, but not of several backends at once (``"cpu:gloo,cuda:nccl"``).
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_backend() != "nccl":
        dist.destroy_process_group()


def connect(timeout: timedelta = DEFAULT_TIMEOUT) -> Ranks:
    """The ranks of this process: those of ``torch.distributed`` if it is initialized, else this one alone. Collective."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroup(timeout, shared=True)
    return SingleProcess()


@dataclass(frozen=True)
class Failure:
    """An exception on its way to the other ranks."""

    kind: type[NemologgerError]
    message: str

    @staticmethod
    def of(error: BaseException, rank: int) -> Failure:
        """``error`` as it will be seen by the others."""
        if isinstance(error, NemologgerError):
            return Failure(type(error), str(error))
        return Failure(RankError, f"rank {rank}: {type(error).__name__}: {error}")

    def error(self, rank: int | None = None) -> NemologgerError:
        """The exception to raise, naming ``rank`` if one is given."""
        named = rank is None or self.message.startswith(f"rank {rank}: ")
        return self.kind(self.message if named else f"rank {rank}: {self.message}")


def decide(ranks: Ranks, step: Callable[[], T]) -> T:
    """Run ``step`` on rank 0 and return its result on every rank.

    Raises:
        Exception: What ``step`` raised, on every rank: rank 0 raises it as it is, the others an error of this package
            with the same message.

    Example:
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
        shared = ranks.broadcast(outcome)
    except NemologgerError as silent:
        raise silent from cause  # it may be why the others are silent
    if cause is not None:
        raise cause
    if isinstance(shared, Failure):
        raise shared.error()
    return shared  # type: ignore[return-value]  # None only if T is


def together(ranks: Ranks, step: Callable[[], T]) -> list[T]:
    """Run ``step`` on every rank and return all results, in rank order, on every rank.

    Raises:
        Exception: If ``step`` failed anywhere. The ranks where it did raise their own error, the others one that names
            the first of those ranks.

    Example:
        >>> together(SingleProcess(), lambda: 42)
        [42]
    """
    return _agree(ranks, step, lambda results: results)


def together_at_zero(ranks: Ranks, step: Callable[[], T]) -> list[T]:
    """As :func:`together`, but only rank 0 gets the results; the others an empty list.

    Thousands of ranks need not all know what each of them did.

    Example:
        >>> together_at_zero(SingleProcess(), lambda: 42)
        [42]
    """
    results: list[T] = []
    _agree(ranks, step, results.extend)
    return results


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
        shared = ranks.exchange(outcome, answer)
    except NemologgerError as silent:
        raise silent from cause  # it may be why the others are silent
    if cause is not None:
        raise cause
    if isinstance(shared, _FailedRank):
        raise shared.failure.error(shared.rank)
    return shared


@dataclass(frozen=True)
class _FailedRank:
    rank: int
    failure: Failure


class Poll:
    """Asks all ranks, again and again, whether one of them wants something; cheap enough for every training step.

    All ranks call it at the same points and get the same answer. With one process the answer is its own wish. With
    several, they exchange a few bytes in at most every call; where calls follow each other faster than ``seconds``, only in
    some of them, which the ranks settle from the time that the slowest of them took since the last exchange.

    Args:
        ranks: The processes.
        seconds: How long an answer may be old.

    Example:
        >>> poll = Poll(SingleProcess())
        >>> poll(False), poll(True)
        (False, True)
    """

    MOST = 16  # calls in a row without an exchange: when steps suddenly take longer, so many of them pass unasked

    def __init__(self, ranks: Ranks, seconds: float = 0.1) -> None:
        self._ranks = ranks
        self._seconds = seconds
        self._calls = 0
        self._next = 1
        self._asked = time.monotonic()

    def __call__(self, wish: bool, *, now: bool = False) -> bool:
        """Whether any rank wants it, as far as is known. Collective.

        Args:
            wish: Whether this one does.
            now: Ask in this call. The same on all ranks.
        """
        if self._ranks.world_size == 1:
            return wish
        self._calls += 1
        if self._calls < self._next and not now:
            return False
        elapsed = (time.monotonic() - self._asked) / self._calls
        wanted, slowest = self._ranks.largest([float(wish), elapsed])
        self._next = max(1, min(self.MOST, int(self._seconds / max(slowest, 1e-9))))
        self._calls, self._asked = 0, time.monotonic()
        return wanted > 0
