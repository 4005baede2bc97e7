"""The monitor process of a rank, seen from the rank."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from nemologger.errors import NemologgerError
from nemologger.signals import unheard
from nemologger.watch.board import Board
from nemologger.watch.guard_main import Orders

_START_TIMEOUT = 60.0
_END_TIMEOUT = 30.0

log = logging.getLogger(__name__)


class Guard:
    """Starts the monitor of this process; it ends with :meth:`close`, or with this process, however that may end.

    It is started afresh, not forked from a process with threads, and hears no signal that is sent to all processes of a job.
    A real-time signal that nothing else handles makes this process write down where its threads are; that is taken
    back by :meth:`close`.

    Args:
        board: What this process gives its signs of life on.
        rank: Global rank, for messages.
        interval: Seconds between two looks at the board.
        end_with: Number of the signal that ends this process if it hangs.
        log_level: What the monitor logs.
        log_files: Where its messages go besides stderr, as far as these files exist.

    Raises:
        NemologgerError: The monitor could not be started.
    """

    def __init__(
        self,
        board: Board,
        *,
        rank: int,
        interval: float,
        end_with: int,
        log_level: int = logging.INFO,
        log_files: Sequence[Path] = (),
    ) -> None:
        stacks = tempfile.TemporaryFile()  # noqa: SIM115  closed by _end
        ask = _free_signal()
        if ask is not None:
            faulthandler.register(ask, file=stacks, all_threads=True, chain=False)
        ours, theirs = socket.socketpair()
        orders = Orders(
            pid=os.getpid(),
            main_thread=threading.main_thread().ident or 0,
            rank=rank,
            interval=interval,
            end_with=end_with,
            log_level=log_level,
            log_files=[str(path) for path in log_files],
            ask=ask,
            channel=theirs.fileno(),
            board=board.descriptor,
            stacks=stacks.fileno(),
        )
        try:
            with unheard():
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _CODE, json.dumps(asdict(orders))],
                    pass_fds=(theirs.fileno(), board.descriptor, stacks.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
        except OSError as error:
            _forget(ask, stacks, ours)
            raise NemologgerError(f"the monitor of rank {rank} could not be started: {error}") from error
        finally:
            theirs.close()
        self._end = weakref.finalize(self, _end, self._process, ours, ask, stacks)
        if not _has_started(ours):
            self._process.kill()
            self._end()
            raise NemologgerError(
                f"the monitor of rank {rank} did not start within {_START_TIMEOUT:g} s (exit code "
                f"{self._process.returncode}); what went wrong is on stderr"
            )

    @property
    def pid(self) -> int:
        """Of the monitor."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the monitor is there."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the monitor."""
        self._end()


_CODE = "from nemologger.watch.guard_main import main; main()"


def _has_started(monitor: socket.socket) -> bool:
    monitor.settimeout(_START_TIMEOUT)
    try:
        return bool(monitor.recv(1))
    except OSError:
        return False


def _free_signal() -> int | None:
    """A signal that this process makes no use of; None where there are no real-time signals."""
    last: int | None = getattr(signal, "SIGRTMAX", None)
    if last is None:
        return None
    numbers = range(last - 1, signal.SIGRTMIN, -1)
    return next((number for number in numbers if signal.getsignal(number) == signal.SIG_DFL), None)


def _end(process: subprocess.Popen[bytes], channel: socket.socket, ask: int | None, stacks: IO[bytes]) -> None:
    with contextlib.suppress(OSError):
        channel.send(b"x")  # forked processes may hold the channel: closing it would not do
    try:
        process.wait(timeout=_END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _forget(ask, stacks, channel)


def _forget(ask: int | None, stacks: IO[bytes], channel: socket.socket) -> None:
    if ask is not None:
        faulthandler.unregister(ask)
    stacks.close()
    channel.close()
