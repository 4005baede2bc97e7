"""Values between the ranks of a run, up and down a tree: whoever does not answer is known by number.

torch's collectives fail on all ranks without saying whose fault it is. Here every rank waits for the few below it, one by
one, and for the one above it. When one does not answer, who waited for it closes all its connections, and so on: those
who are still there say so in the store that the run was started with, and whom they missed. Who was missed and says nothing
is the one.

The only file that uses what torch keeps to itself about process groups.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllreduceOptions, PrefixStore, _get_default_store

from nemologger.errors import SilentRankError
from nemologger.ranks.failure import Failure
from nemologger.ranks.notes import Notes

FAN_OUT = 32
#: Seconds that a rank waits longer than those below it, so that the lowest one that knows is the one that tells.
_MARGIN = 2.0
#: Seconds that all who are still there have to say so.
_GRACE = 2.0
#: Seconds that rank 0 stays for those who have not read yet what the others say.
_STAY = 10.0
_LOOK_EVERY = 0.05
#: The first message of a value: its length, and the value itself if it is small.
_FIRST = 4096
_LENGTH = 8
#: The tag of a message that nobody sends.
_NEVER = 1


@dataclass(frozen=True)
class _Unanswered:
    """In place of an answer: a failure may be one, too."""

    why: Failure


class RankTree:
    """The ranks of a gloo group as a tree with rank 0 at its root.

    Whoever asks says how many seconds a rank is waited for, the same on all ranks.

    Args:
        group: The group; all ranks of the run are in it.
        seconds: How long a rank is waited for here.
    """

    def __init__(self, group: dist.ProcessGroup, seconds: float) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group = group
        self._broken = ""
        self._come_to: set[str] = set()
        self._notes = Notes(PrefixStore("nemologger", _get_default_store()))  # until the ranks have agreed on a name
        self._hosts: list[str] = []
        name, self._hosts = self.exchange(socket.gethostname(), lambda hosts: (uuid4().hex, hosts), seconds)
        self._notes = Notes(PrefixStore(f"nemologger/{name}", _get_default_store()))

    @property
    def is_broken(self) -> bool:
        """Whether a rank has been silent: nothing can be exchanged any more."""
        return bool(self._broken)

    def exchange(self, value: Any, answer: Callable[[list[Any]], Any], seconds: float) -> Any:
        """Bring every rank's ``value`` to rank 0, and rank 0's ``answer`` to them back to every rank.

        Raises:
            SilentRankError: On every rank that is left, if one did not answer within ``seconds``.
            Exception: What ``answer`` raised: rank 0 raises it as it is, the others an error of this package.
        """
        self._check()
        values = self._hear_below(value, seconds)
        if self.rank:
            self._tell(self._above, pickle.dumps(values), seconds)
            told = self.broadcast(None, seconds)
            if isinstance(told, _Unanswered):
                raise told.why.error()
            return told
        try:
            told = answer([values[rank] for rank in range(self.world_size)])
            message = pickle.dumps(told)
        except Exception as error:
            self.broadcast(_Unanswered(Failure.of(error, 0)), seconds)
            raise
        self._tell_below(message, seconds)
        return told

    def broadcast(self, value: Any, seconds: float) -> Any:
        """Rank 0's ``value``, on every rank.

        Raises:
            SilentRankError: If it did not come.
        """
        self._check()
        # Rank 0 may be waiting for another one.
        patience = 2 * seconds + _MARGIN
        message = self._receive(self._above, patience, seconds) if self.rank else pickle.dumps(value)
        self._tell_below(message, seconds)
        return pickle.loads(message) if self.rank else value  # noqa: S301  of a rank of this run

    def largest(self, values: Sequence[float], seconds: float) -> list[float]:
        """The largest of all ranks at each place, on every rank: a single collective, for every training step.

        Raises:
            SilentRankError: On every rank that is left, if one did not answer within ``seconds``.
        """
        self._check()
        shared = torch.tensor(values, dtype=torch.float64)
        options = AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        options.timeout = timedelta(seconds=seconds)  # not that of the group, which somebody else may have made
        try:
            self._group.allreduce([shared], options).wait()
        except RuntimeError as error:  # it does not say who
            self._miss([*([self._above] if self.rank else []), *self._below], error, seconds)
        return shared.tolist()

    def missing_at(self, point: str, seconds: float) -> int | None:
        """How many ranks do not come to ``point`` within ``seconds``; asks the store, so nobody is waited for longer.

        This rank has come with its first call, and may ask again. None if nobody can tell: the store does not answer.
        """
        if self._broken:
            return 1
        end = time.monotonic() + seconds
        try:
            missing = self.world_size - self._notes.add(f"at/{point}", int(point not in self._come_to))
            self._come_to.add(point)
            while missing > 0 and time.monotonic() < end:
                time.sleep(_LOOK_EVERY)
                missing = self.world_size - self._notes.add(f"at/{point}", 0)
        except RuntimeError:  # it was rank 0's, or its launcher's, and went or fell silent with it
            return None
        return max(missing, 0)

    def _hear_below(self, value: Any, seconds: float) -> dict[int, Any]:
        values = {self.rank: value}
        begin = time.monotonic()
        for child in self._below:
            patience = seconds + _MARGIN * self._height(child)
            # Whoever waits for one that is late need not wait as long for the next.
            remaining = max(begin + patience - time.monotonic(), _MARGIN)
            values.update(pickle.loads(self._receive(child, remaining, seconds)))  # noqa: S301  of a rank of this run
        return values

    def _tell_below(self, message: bytes, seconds: float) -> None:
        for child in self._below:
            self._tell(child, message, seconds)

    def _check(self) -> None:
        """Nothing can be exchanged any more once a rank was silent: its answer may still come, to another question."""
        if self._broken:
            raise SilentRankError(self._broken)

    def _miss(self, ranks: Sequence[int], error: RuntimeError, seconds: float) -> NoReturn:
        """One of ``ranks`` does not answer; find out with the others who is to blame.

        Raises:
            SilentRankError: Always.
        """
        self._hang_up()
        missed = self._compare_notes(ranks, _short(error))
        who = ", ".join(f"rank {number}" for number in sorted(missed))
        why = "; ".join(sorted(set(missed.values())))
        self._broken = (
            f"{who} of {self.world_size} did not answer (seen by rank {self.rank}, timeout {seconds:g} s): {why}. It "
            f"has probably died, or hangs{self._where(missed)}; look for the first error in its log file."
        )
        raise SilentRankError(self._broken) from error

    def _where(self, missed: Iterable[int]) -> str:
        """Their hosts, which may be what has gone, for the message; "" while these are not known yet."""
        hosts = sorted({self._hosts[rank] for rank in missed}) if self._hosts else []
        return f", or its host has gone ({', '.join(hosts)})" if hosts else ""

    def _hang_up(self) -> None:
        """Close all connections, as gloo does when a wait is over, and not when a rank has died.

        The others notice while this rank is still there to tell. When it has gone too, they would take it for the one.
        """
        for rank in (*([self._above] if self.rank else []), *self._below):
            with contextlib.suppress(RuntimeError):  # the first that is there makes gloo close all of them
                self._wait(dist.irecv(torch.empty(1), rank, group=self._group, tag=_NEVER), 0.001)

    def _compare_notes(self, ranks: Sequence[int], why: str) -> dict[int, str]:
        """Whom the ranks have missed that has not missed anybody itself; if all have, the one who was missed first."""
        notes: list[tuple[int, int, str]] = [(self.rank, missed, why) for missed in ranks]
        try:
            for note in notes:
                self._notes.set(f"missed/{self._notes.add('missed', 1)}", json.dumps(note))
            time.sleep(_GRACE)
            count = self._notes.add("missed", 0)
            notes = [tuple(json.loads(self._notes.get(f"missed/{number}"))) for number in range(1, count + 1)]
        except RuntimeError:  # as above
            pass
        here = {by for by, _, _ in notes}
        silent = {missed: reason for _, missed, reason in reversed(notes) if missed not in here}
        silent = silent or {notes[0][1]: notes[0][2]}
        with contextlib.suppress(RuntimeError):
            self._let_read(self.world_size - len(silent))
        return silent

    def _let_read(self, readers: int) -> None:
        """This rank has read the notes; rank 0, whose the store may be, stays until all of ``readers`` have."""
        have = self._notes.add("read", 1)
        end = time.monotonic() + _STAY
        while self.rank == 0 and have < readers and time.monotonic() < end:
            time.sleep(_LOOK_EVERY)
            have = self._notes.add("read", 0)

    @property
    def _above(self) -> int:
        return (self.rank - 1) // FAN_OUT

    @property
    def _below(self) -> range:
        first = self.rank * FAN_OUT + 1
        return range(min(first, self.world_size), min(first + FAN_OUT, self.world_size))

    def _height(self, rank: int) -> int:
        """How many floors there are below ``rank``."""
        height = 0
        while (rank := rank * FAN_OUT + 1) < self.world_size:
            height += 1
        return height

    def _tell(self, rank: int, message: bytes, seconds: float) -> None:
        first = torch.zeros(_FIRST, dtype=torch.uint8)
        head = len(message).to_bytes(_LENGTH, "little") + message[: _FIRST - _LENGTH]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        rest = message[_FIRST - _LENGTH :]
        try:
            self._wait(dist.isend(first, rank, group=self._group), seconds)
            if rest:
                payload = torch.frombuffer(bytearray(rest), dtype=torch.uint8)
                self._wait(dist.isend(payload, rank, group=self._group), seconds)
        except RuntimeError as error:
            self._miss([rank], error, seconds)

    def _receive(self, rank: int, patience: float, seconds: float) -> bytes:
        first = torch.empty(_FIRST, dtype=torch.uint8)
        try:
            self._wait(dist.irecv(first, rank, group=self._group), patience)
            head = first.numpy().tobytes()
            length = int.from_bytes(head[:_LENGTH], "little")
            message = head[_LENGTH : _LENGTH + length]
            if len(message) < length:
                rest = torch.empty(length - len(message), dtype=torch.uint8)
                self._wait(dist.irecv(rest, rank, group=self._group), patience)
                message += rest.numpy().tobytes()
        except RuntimeError as error:
            self._miss([rank], error, seconds)
        return message

    def _wait(self, work: dist.Work | None, seconds: float) -> None:
        if work is not None:
            work.wait(timedelta(seconds=seconds))


def _short(error: RuntimeError) -> str:
    """What gloo's message says; what comes before is where in its source it was raised, and behind it is advice."""
    first = str(error).split("\n")[0].split(". This is typically")[0]
    return first.rsplit("] ", 1)[-1].rstrip(". ") or type(error).__name__
