"""The writer process, seen from the process that trains."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe

from nemologger.checkpoint.writing import writer_main
from nemologger.checkpoint.writing.arena import Arena
from nemologger.checkpoint.writing.writer_main import STAND_BY, Job, Outcome
from nemologger.errors import SaveFailedError
from nemologger.signals import unheard

log = logging.getLogger(__name__)

_START_TIMEOUT = 60.0
#: It has nothing to do but to take what it is sent: jobs come when there is none.
_SEND_TIMEOUT = 60.0
_END_TIMEOUT = 30.0
_KILL_TIMEOUT = 2.0


class Writer:
    """Writes the files of ``arena`` in a process of its own, one job at a time.

    It is started afresh, not forked from a process with threads, and hears no signal that is sent to all processes of a job:
    the one that trains wants to save then. It ends when this object is closed or collected, and when this process ends,
    however that may be.

    Args:
        arena: The memory that both see.
        always: Files that are the same in every job, by their path below the checkpoint: ``.metadata`` of thousands of ranks
            takes hundreds of MB.

    Attributes:
        sent: Bytes of the job that are on disk, or have gone to a store, as the process has said last.
        heard: How often it has said so.

    """

    def __init__(self, arena: Arena, always: Mapping[str, bytes]) -> None:
        ours, theirs = Pipe()
        arguments = (theirs.fileno(), arena.descriptor, arena.size, os.getpid(), arena.may_move)
        # Modules are looked for where this process looks, and nowhere else: not in the current directory, for example, where
        # a file may be called like one of Python's own.
        places = [place for place in sys.path if isinstance(place, str)]
        start = f"import sys; sys.path[:] = {places}\nfrom {writer_main.__name__} import main; main{arguments}"
        with unheard():
            self._process = subprocess.Popen(
                [sys.executable, "-c", start],
                pass_fds=(theirs.fileno(), arena.descriptor),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        theirs.close()
        _limit_sends(ours, _SEND_TIMEOUT)
        self._connection = ours
        self._busy = False
        self.sent = self.heard = 0
        self._end = weakref.finalize(self, _end, self._process, ours, os.getpid())
        self._always: dict[str, bytes] | None = dict(always)  # until it is sent
        self._latest = time.monotonic() + _START_TIMEOUT

    @property
    def busy(self) -> bool:
        """Whether a job is under way whose outcome was not asked for."""
        return self._busy

    @property
    def alive(self) -> bool:
        """Whether the process is there, and can be given jobs."""
        return self._end.alive and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def begins(self, timeout: float) -> bool:
        """Whether the process is ready for jobs, which is waited for so many seconds.

        Raises:
            SaveFailedError: If it could not be started, or is not ready after a minute.
        """
        if self._always is not None:
            left = max(self._latest - time.monotonic(), 0.0)
            if self._connection.poll(min(timeout, left)):
                self._receive()
                self._send(self._always)
                self._always = None
            elif left <= timeout:
                self._end()
                raise SaveFailedError(f"the writer process did not start within {_START_TIMEOUT:g} s")
        return self._always is None

    def stand_by(self) -> None:
        """The arena is about to be filled for a job: leave it alone until that comes."""
        with contextlib.suppress(OSError):  # it has died, as whoever submits the job will be told
            self.begins(_START_TIMEOUT)
            self._connection.send(STAND_BY)

    def submit(self, job: Job) -> None:
        """Hand over a job; the arena must not change until its outcome is known. The process is ready, or waited for.

        Raises:
            SaveFailedError: If the process has died, or hangs, which ends it.
        """
        self.begins(_START_TIMEOUT)
        self._send(job)
        self._busy = True
        self.sent = 0

    def outcome(self, timeout: float | None = 0.0) -> Outcome | None:
        """The outcome of the job, or None if it is not known within ``timeout`` seconds (None waits for ever).

        How far it is by then is :attr:`sent`.

        Raises:
            SaveFailedError: If the process has died.
        """
        while self._connection.poll(timeout):
            received = self._receive()
            if not isinstance(received, int):
                break
            self.sent, timeout = received, None if timeout is None else 0.0
            self.heard += 1
        else:
            return None
        self._busy = False
        if not isinstance(received, Outcome):
            self.kill()
            raise SaveFailedError(f"the writer process {self.pid} answered {received!r}, and was ended")
        return received

    def close(self) -> None:
        """End the process. A job under way is finished first, and not published."""
        self._end()

    def kill(self) -> None:
        """End the process now, whatever it does."""
        self._end.detach()
        self._process.kill()
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it cannot end while the kernel waits for storage
            self._process.wait(timeout=_KILL_TIMEOUT)

    def _send(self, what: object) -> None:
        try:
            self._connection.send(what)
        except BlockingIOError as error:  # it is stopped, or waits for memory; what is half sent is of no use to it
            self.kill()
            raise SaveFailedError(
                f"the writer process {self.pid} has taken nothing for {_SEND_TIMEOUT:g} s, and was ended"
            ) from error
        except OSError as error:
            raise self._died() from error

    def _receive(self) -> object:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._busy = False
            raise self._died() from error

    def _died(self) -> SaveFailedError:
        """What is to be said of a process that does not listen any more, or does not speak. It is not there afterwards."""
        try:
            code = self._process.wait(timeout=_END_TIMEOUT)
        except subprocess.TimeoutExpired:  # what it has begun may keep it in the kernel for longer than its connection
            self.kill()
            return SaveFailedError(
                f"the writer process {self.pid} has hung up, did not end within {_END_TIMEOUT:g} s, and was ended"
            )
        return SaveFailedError(f"the writer process {self.pid} has died (exit code {code})")


def _limit_sends(connection: Connection, seconds: float) -> None:
    """Have the kernel let ``connection.send()`` wait no longer for room than so; it raises BlockingIOError then."""
    whole, part = divmod(seconds, 1)
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(whole), int(part * 1e6)))


def _end(process: subprocess.Popen[bytes], connection: Connection, owner: int) -> None:
    if os.getpid() != owner:  # a process that was forked comes to its end
        return
    # To close it is not enough: processes that were forked since, data loader workers for example, have it open too.
    with contextlib.suppress(OSError):
        connection.send(None)
    connection.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_END_TIMEOUT)
        return
    log.warning("the writer process %d did not end within %g s: it is killed", process.pid, _END_TIMEOUT)
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel waits for storage that does not answer
        process.wait(timeout=_KILL_TIMEOUT)
        return
    log.warning("the writer process %d is still there: it waits for a storage that does not answer", process.pid)
