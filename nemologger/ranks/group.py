"""The processes of one run, seen from one of them."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar, cast
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch.distributed as dist

from nemologger.errors import RankError
from nemologger.ranks.tree import RankTree

try:
    import resource
except ImportError:  # Windows: no such limit
    resource = None  # type: ignore[assignment]

T = TypeVar("T")
R = TypeVar("R")

#: How long one rank waits for another, unless it is told.
DEFAULT_TIMEOUT = timedelta(minutes=10)

#: Descriptors for what training opens later: files, workers of loaders, NCCL.
_SPARE = 256


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
        """Rank 0's ``answer`` to every rank's ``value``, on every rank. Only rank 0 calls ``answer``; it may raise."""

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks at each place, on every rank. Far cheaper than the others: nothing is pickled."""

    def missing_at(self, point: str, seconds: float) -> int | None:
        """How many ranks do not come to ``point`` within ``seconds``. For where it is not known that all of them will.

        None if nobody can tell any more.
        """


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

    def missing_at(self, point: str, seconds: float) -> int | None:
        """No rank: this one is there."""
        return 0


class ProcessGroup:
    """The ranks of an initialized ``torch.distributed``.

    Values travel over a gloo group of their own: they stay off the GPU, and a rank that does not answer within ``timeout``
    ends the wait with a :class:`~nemologger.errors.SilentRankError` that names it, whatever the training group's patience.
    Rank 0 itself is given up after twice that time: it may be waiting for another one.

    Every rank of a gloo group is connected to every other: descriptors and threads on all of them, which are given back with
    the process group of the run and no sooner. Two groups of 512 ranks are more descriptors than many a system gives a
    process. So :func:`connect` shares one among all, whatever their patience.

    Args:
        timeout: How long to wait for a rank.
        shared: Use the group that others have made, if there is one and no rank has been silent in it. The same on all
            ranks.

    Raises:
        RankError: The ranks cannot reach each other.
    """

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT, *, shared: bool = False) -> None:
        leave_at_exit()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._seconds = timeout.total_seconds()
        self._tree = _shared_tree(timeout) if shared else _new_tree(timeout)
        self._name = self.broadcast(uuid4().hex)  # its points are not those of others in the same group

    def gather(self, value: T) -> list[T]:
        """See :class:`Ranks`."""
        return self.exchange(value, lambda values: values)

    def broadcast(self, value: T) -> T:
        """See :class:`Ranks`."""
        return self._tree.broadcast(value, self._seconds)  # type: ignore[no-any-return]

    def exchange(self, value: T, answer: Callable[[list[T]], R]) -> R:
        """See :class:`Ranks`."""
        return self._tree.exchange(value, answer, self._seconds)  # type: ignore[no-any-return]

    def largest(self, values: Sequence[float]) -> list[float]:
        """See :class:`Ranks`."""
        return self._tree.largest(values, self._seconds)

    def missing_at(self, point: str, seconds: float) -> int | None:
        """See :class:`Ranks`."""
        return self._tree.missing_at(f"{self._name}/{point}", seconds)


# torch has one process group for the whole process, and what is made of it is here as long as that is there.
_TREES: WeakKeyDictionary[dist.ProcessGroup, RankTree] = WeakKeyDictionary()


def _shared_tree(timeout: timedelta) -> RankTree:
    world = dist.group.WORLD
    if world is None:
        raise RankError("torch.distributed is not initialized: there are no ranks to connect to")
    tree = _TREES.get(world)
    if tree is None or tree.is_broken:
        tree = _TREES[world] = _new_tree(timeout)
    return tree


def _new_tree(timeout: timedelta) -> RankTree:
    _make_room(dist.get_world_size())
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:  # NCCL may get through all the same: it looks for an interface by itself
        raise RankError(
            f"rank {dist.get_rank()} cannot reach the others, beside training, over the network interface that its host "
            f"name stands for: {error}\nName the one that connects the hosts in the environment of all ranks, for example "
            "GLOO_SOCKET_IFNAME=eth0"
        ) from error
    return RankTree(cast(dist.ProcessGroup, group), timeout.total_seconds())  # all ranks are members


def _make_room(connections: int) -> None:
    """Let this process have so many more descriptors: gloo ends it without an exception where it may not.

    Many a system lets a process open 1024, and more if it says so. With hundreds of ranks that is too few.

    Raises:
        RankError: It may not have as many.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        held = len(os.listdir("/proc/self/fd"))
    except OSError:
        held = _SPARE
    wanted = held + connections + _SPARE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
        soft = possible
    if soft < held + connections:
        raise RankError(
            f"rank {dist.get_rank()} needs a connection to each of {connections} ranks, but its process may have only {soft}"
            f" files and connections open, and has {held}: raise the limit on all hosts (ulimit -Hn, LimitNOFILE, or that of"
            " the container)"
        )


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
