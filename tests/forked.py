"""Processes that need not import torch and Lightning: they are forked from one that has (see :mod:`zygote`)."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO

_ZYGOTE = Path(__file__).with_name("zygote.py")


class Forked:
    """A process that runs a script; to be used like a ``subprocess.Popen``.

    Args:
        arguments: The script, and what it is given.
        environment: Its environment.
        out: Where its output goes; ``subprocess.PIPE`` for :attr:`stdout`, None for where this process's own goes.
        error: The same for its errors; ``subprocess.STDOUT`` for where its output goes.
        session: Give it a session of its own.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: Mapping[str, str],
        *,
        out: IO[str] | int | None = None,
        error: IO[str] | int | None = None,
        session: bool = False,
    ) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        asked = {
            "arguments": arguments,
            "environment": dict(environment),
            "directory": os.getcwd(),
            "session": session,
        }
        close = []
        if out == subprocess.PIPE:
            reading, writing = os.pipe()
            self.stdout = os.fdopen(reading)
            close.append(writing)
        else:
            writing = 1 if out is None else out.fileno()
        errors = writing if error == subprocess.STDOUT else 2 if error is None else error.fileno()
        self._report, report = os.pipe()
        channel = _zygote()
        socket.send_fds(channel, [json.dumps(asked).encode()], [writing, errors, report])
        self.pid = int(channel.recv(64))
        for number in (*close, report):
            os.close(number)

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended."""
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], seconds)[0]:
            said = os.read(self._report, 64)
            os.close(self._report)
            self.returncode = int(said) if said else -signal.SIGKILL  # the zygote is gone, and all of them with it
        return self.returncode


@cache
def _zygote() -> socket.socket:
    from processes import environment  # it imports this

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, str(_ZYGOTE), str(theirs.fileno())]
    # In a session of its own: Ctrl-C is for who waits for the tests.
    process = subprocess.Popen(command, env=environment(), pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    atexit.register(_end, process, ours)
    assert ours.recv(64) == b"ready"
    return ours


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    process.wait(timeout=30)
