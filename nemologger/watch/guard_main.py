"""The monitor process of a rank: ends the rank when it hangs, and says where.

It is started by :class:`nemologger.watch.guard.Guard` and imports no torch. When the rank is gone, it ends.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemologger.watch.board import Board, Sign

_STACK_TIMEOUT = 3.0
_END_TIMEOUT = 30.0
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
_STATES = {"T": "stopped by a signal", "D": "in a system call that cannot be interrupted", "Z": "dead"}

# Where a thread that waits for other ranks, or for their store, is. The last one is Lightning asking rank 0 whether to stop.
_WAITS = re.compile(r"/torch/distributed/|/nemologger/ranks/notes\.py|in _broadcast_sigterm_tensor$")
# Further out it is everybody's who trains, or decides for the others. In ours, torch waits without a frame of Python.
_WAITS_INNERMOST = re.compile(r"/torch/nn/parallel/distributed\.py|/nemologger/ranks/tree\.py")
_INNERMOST = 4  # frames


@dataclass(frozen=True)
class Orders:
    """What a monitor is told when it is started.

    Attributes:
        pid: The rank's process.
        main_thread: Its main thread.
        rank: Its number.
        interval: Seconds between looks.
        end_with: Number of the signal for a rank that hangs.
        log_level: What to log.
        log_files: Where to, besides stderr.
        ask: Number of the signal that makes the rank write its stacks; None if it cannot.
        channel: Descriptor; anything said there, or its end, ends the monitor.
        board: Descriptor of the signs of life.
        stacks: Descriptor of the file that the rank writes its stacks to.
    """

    pid: int
    main_thread: int
    rank: int
    interval: float
    end_with: int
    log_level: int
    log_files: list[str]
    ask: int | None
    channel: int
    board: int
    stacks: int


class Silence:
    """Measures how long nothing has changed.

    Time in which the monitor itself was held up (a suspended job, a machine that sleeps) does not count.

    Args:
        interval: Seconds between looks.
        now: The clock.
    """

    def __init__(self, interval: float, now: Callable[[], float] = time.monotonic) -> None:
        self._longest_look = 2 * interval + 1.0
        self._now = now
        self._looked = now()
        self._count = -1
        self.seconds = 0.0

    def look(self, count: int) -> float:
        """How long ``count`` has been what it is, in seconds."""
        now = self._now()
        passed, self._looked = now - self._looked, now
        if count != self._count:
            self._count, self.seconds = count, 0.0
        else:
            self.seconds += min(passed, self._longest_look)
        return self.seconds


def waits_for_others(stacks: str, main_thread: int) -> bool:
    """Whether the main thread, of the ``stacks`` that faulthandler wrote, is waiting for other ranks."""
    frames: list[str] = []
    inside = False
    for line in stacks.splitlines():
        if not line.startswith(" "):
            inside = f"0x{main_thread:016x}" in line
        elif inside:
            frames.append(line)
    return any(_WAITS.search(frame) for frame in frames[:_INNERMOST]) or any(map(_WAITS_INNERMOST.search, frames[:1]))


class Monitor:
    """Looks after one rank.

    Args:
        orders: What it was told.
        board: The rank's signs of life.
        log: Where it says what it does.
    """

    def __init__(self, orders: Orders, board: Board, log: logging.Logger) -> None:
        self._orders = orders
        self._board = board
        self._log = log
        self._silence = Silence(orders.interval)
        self._noted = -1
        self._who = f"rank {orders.rank} on host {socket.gethostname()} (process {orders.pid})"

    @property
    def is_needed(self) -> bool:
        """Whether the rank is there: it is this process's parent, until it ends."""
        return os.getppid() == self._orders.pid

    def look(self) -> bool:
        """Look once. Returns whether to go on looking."""
        sign = self._board.last_sign()
        silent = self._silence.look(sign.count)
        timeout = self._board.timeout(sign.section)
        if silent < timeout or (self._noted == sign.count and silent < 2 * timeout):
            return True
        stacks = self._ask()
        if self._board.last_sign().count != sign.count:
            return True  # it was only slow
        waits = sign.waiting or waits_for_others(stacks, self._orders.main_thread)
        if waits and silent < 2 * timeout:
            # Who waits is not the one that hangs; that one's own monitor ends it. Unless all wait, for each other.
            self._noted = sign.count
            self._log.warning(
                "%s has been waiting for other ranks for %.3g s (%s, step %d, timeout %.3g s); one of them is slow or hangs",
                self._who,
                silent,
                sign.section.words,
                sign.step,
                timeout,
            )
            return True
        self._end(sign, silent, timeout, stacks, waits=waits)
        return False

    def _end(self, sign: Sign, silent: float, timeout: float, stacks: str, *, waits: bool) -> None:
        name = signal.Signals(self._orders.end_with).name
        state = _STATES.get(self._state())
        self._log.error(
            "%s hangs: no sign of life for %.3g s (timeout %.3g s) while %s, step %d%s%s. It is ended with %s, so that the "
            "launcher can restart the run. It was here:\n%s",
            self._who,
            silent,
            timeout,
            sign.section.words,
            sign.step,
            f", {state}" if state else "",
            ", waiting for other ranks" if waits else "",
            name,
            stacks.rstrip() or "(it did not answer: no Python stack)",
        )
        if self._signal(self._orders.end_with) and self._orders.end_with != _KILL:
            until = time.monotonic() + _END_TIMEOUT
            while self.is_needed and time.monotonic() < until:
                time.sleep(0.05)
            if self._signal(_KILL):
                self._log.error("%s has not ended within %g s of %s: killed", self._who, _END_TIMEOUT, name)

    def _ask(self) -> str:
        """The stacks of the rank's threads, "" if it does not write them."""
        file, ask = self._orders.stacks, self._orders.ask
        before = size = os.fstat(file).st_size
        if ask is None or self._state() in ("T", "Z") or not self._signal(ask):
            return ""
        until = time.monotonic() + _STACK_TIMEOUT
        while time.monotonic() < until:
            time.sleep(0.1)
            earlier, size = size, os.fstat(file).st_size
            if earlier == size > before:
                break
        return os.pread(file, size - before, before).decode(errors="replace")

    def _signal(self, number: int) -> bool:
        """Send a signal to the rank, if it is there."""
        if not self.is_needed:
            return False
        os.kill(self._orders.pid, number)
        return True

    def _state(self) -> str:
        """The rank's state, as the kernel calls it; "" where it is not known."""
        try:
            stat = Path(f"/proc/{self._orders.pid}/stat").read_text()
        except OSError:
            return ""
        return stat.rpartition(")")[2].split()[0]


class _ExistingFile(logging.Handler):
    """Appends to a file that a log is being written to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if not self._path.exists():
            return
        try:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.format(record) + "\n")
        except OSError:
            self.handleError(record)


def _logger(orders: Orders) -> logging.Logger:
    logger = logging.getLogger(__name__)
    logger.setLevel(orders.log_level)
    formatter = logging.Formatter(f"%(asctime)s %(levelname)s [rank {orders.rank}] nemologger.watch: %(message)s")
    for handler in (logging.StreamHandler(sys.stderr), *(_ExistingFile(Path(path)) for path in orders.log_files)):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


def main() -> None:
    """Look after the rank that started this process, until it ends or says so."""
    orders = Orders(**json.loads(sys.argv[1]))
    monitor = Monitor(orders, Board(orders.board), _logger(orders))
    channel = socket.socket(fileno=orders.channel)
    channel.send(b"x")
    while monitor.is_needed:
        spoken, _, _ = select.select([channel], [], [], orders.interval)
        if spoken or not monitor.is_needed or not monitor.look():
            return
