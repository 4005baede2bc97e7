"""Values between the ranks of a run, up and down a tree: whoever does not answer is known by number.

torch's collectives fail on all ranks without saying whose fault it is. Here every rank waits for the few below it, one by
one, and for the one above it. What it finds out goes up with the values, and comes down to everybody as the answer.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nemologger.errors import SilentRankError

FAN_OUT = 32
#: Seconds that a rank waits longer than those below it, so that the lowest one that knows is the one that tells.
_MARGIN = 2.0
#: The first message of a value: its length, and the value itself if it is small.
_FIRST = 4096
_LENGTH = 8


@dataclass(frozen=True)
class _Up:
    """What a rank knows of itself and all below it: values by rank, and why there is none."""

    values: dict[int, Any]
    silent: dict[int, str]


@dataclass(frozen=True)
class _Silent:
    """Instead of an answer: who is silent, and why."""

    ranks: dict[int, str]


class RankTree:
    """The ranks of a gloo group as a tree with rank 0 at its root.

    Args:
        group: The group; all ranks of the run are in it.
        timeout: How long to wait for a rank.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group = group
        self._timeout = timeout.total_seconds()
        self._broken: _Silent | None = None

    def exchange(self, value: Any, answer: Callable[[list[Any]], Any]) -> Any:
        """Bring every rank's ``value`` to rank 0, and rank 0's ``answer`` to them back to every rank.

        Raises:
            SilentRankError: On every rank that is left, if one did not answer within the timeout.
        """
        self._check()
        up = self._hear_below(value)
        if self.rank:
            self._tell(self._above, pickle.dumps(up))
            return self.broadcast(None)
        if up.silent:
            self._fail(_Silent(up.silent))
        return self.broadcast(answer([up.values[rank] for rank in range(self.world_size)]))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank.

        Raises:
            SilentRankError: If it did not come.
        """
        self._check()
        if self.rank:
            try:
                message = self._receive(self._above, 2 * self._timeout + _MARGIN)
            except RuntimeError as error:
                self._fail(_Silent({self._above: _short(error)}))
            value = pickle.loads(message)  # noqa: S301  of a rank of this run
            if isinstance(value, _Silent):
                self._fail(value)
        else:
            message = pickle.dumps(value)
        self._pass_on(message)
        return value

    def _hear_below(self, value: Any) -> _Up:
        values, silent = {self.rank: value}, {}
        begin = time.monotonic()
        for child in self._below:
            patience = self._timeout + _MARGIN * self._height(child)
            # Whoever waits for one that is late need not wait as long for the next.
            remaining = max(begin + patience - time.monotonic(), _MARGIN)
            try:
                heard: _Up = pickle.loads(self._receive(child, remaining))  # noqa: S301  of a rank of this run
            except RuntimeError as error:
                silent[child] = _short(error)
            else:
                values.update(heard.values)
                silent.update(heard.silent)
        return _Up(values, silent)

    def _fail(self, silent: _Silent) -> None:
        self._broken = silent
        self._pass_on(pickle.dumps(silent))
        self._check()

    def _check(self) -> None:
        """Nothing can be exchanged any more once a rank was silent: its answer may still come, to another question."""
        if self._broken is None:
            return
        who = ", ".join(f"rank {rank}" for rank in sorted(self._broken.ranks))
        why = "; ".join(sorted(set(self._broken.ranks.values())))
        raise SilentRankError(
            f"{who} of {self.world_size} did not answer (seen by rank {self.rank}, timeout {self._timeout:g} s): {why}. "
            "It has probably died, or hangs; look for the first error in its log file."
        )

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

    def _pass_on(self, message: bytes) -> None:
        for child in self._below:
            self._tell(child, message)

    def _tell(self, rank: int, message: bytes) -> None:
        """Send, if there is anybody to receive it: one who is gone is noticed where its answer is missing."""
        first = torch.zeros(_FIRST, dtype=torch.uint8)
        head = len(message).to_bytes(_LENGTH, "little") + message[: _FIRST - _LENGTH]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        rest = message[_FIRST - _LENGTH :]
        try:
            self._wait(dist.isend(first, rank, group=self._group), self._timeout)
            if rest:
                payload = torch.frombuffer(bytearray(rest), dtype=torch.uint8)
                self._wait(dist.isend(payload, rank, group=self._group), self._timeout)
        except RuntimeError:
            return

    def _receive(self, rank: int, seconds: float) -> bytes:
        first = torch.empty(_FIRST, dtype=torch.uint8)
        self._wait(dist.irecv(first, rank, group=self._group), seconds)
        head = first.numpy().tobytes()
        length = int.from_bytes(head[:_LENGTH], "little")
        message = head[_LENGTH : _LENGTH + length]
        if len(message) < length:
            rest = torch.empty(length - len(message), dtype=torch.uint8)
            self._wait(dist.irecv(rest, rank, group=self._group), seconds)
            message += rest.numpy().tobytes()
        return message

    def _wait(self, work: dist.Work | None, seconds: float) -> None:
        if work is not None:
            work.wait(timedelta(seconds=seconds))


def _short(error: RuntimeError) -> str:
    """The last part of gloo's message; what comes before is where in its source it was raised."""
    first = str(error).split("\n")[0]
    return first.rsplit("] ", 1)[-1].rstrip(". ") or type(error).__name__
