"""A process that has imported torch, Lightning and this package, and forks one that runs a script when it is asked to.

To import them takes seconds of the processor's time, and hundreds of processes are started. What it forks is a process like
any other: it has its own script as ``__main__``, its own environment, working directory and descriptors, can be killed, and
ends as the interpreter does. Only hash seeds are the same in all of them.

It is started, and asked, by :mod:`processes`; it ends when the one who started it does.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import socket
import sys
import types
from contextlib import suppress

import lightning.pytorch  # noqa: F401
import numpy
import torch
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

import nemologger
import nemologger.callbacks

MESSAGE = 1 << 20


def serve(channel: socket.socket) -> dict:
    """Fork whatever is asked for. Returns in the new process, with what it is to do."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    waited_for: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([channel, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
        for pid in list(waited_for):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                report = waited_for.pop(pid)
                _tell(report, str(os.waitstatus_to_exitcode(status)))
                os.close(report)
        if channel in readable:
            message, given, _, _ = socket.recv_fds(channel, MESSAGE, 3)
            if not message:
                os._exit(0)
            out, error, report = given
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number in (channel.fileno(), woken, wake, report, *waited_for.values()):
                    os.close(number)
                channel.detach()
                os.dup2(out, 1)
                os.dup2(error, 2)
                os.close(out)
                os.close(error)
                return json.loads(message)
            os.close(out)
            os.close(error)
            waited_for[pid] = report
            channel.send(str(pid).encode())


def _tell(report: int, text: str) -> None:
    with suppress(BrokenPipeError):  # nobody waits for it
        os.write(report, text.encode())


def become(asked: dict) -> None:
    """Take over what was asked for, and run the script."""
    faulthandler.enable()  # where a library has crashed, it is told in which line of python
    if asked["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    os.chdir(asked["directory"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    run(*asked["arguments"])


def run(script: str, *arguments: str) -> None:
    """Do what ``python SCRIPT ARGUMENTS`` does."""
    numpy.random.seed(None)
    rank_zero_only.rank = _get_rank() or 0  # Lightning has looked at the environment
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [os.path.dirname(script), *given, *(entry for entry in sys.path[1:] if entry not in given)]
    sys.argv = [script, *arguments]
    main = types.ModuleType("__main__")
    vars(main).update(__file__=script, __spec__=None)
    sys.modules["__main__"] = main
    with open(script, encoding="utf-8") as file:
        exec(compile(file.read(), script, "exec"), vars(main))


def start() -> None:
    """Import the rest, say so, and serve."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    for package in (nemologger, nemologger.callbacks):
        for name in package.__all__:
            getattr(package, name)
    torch.set_num_threads(1)
    channel.send(b"ready")
    become(serve(channel))


if __name__ == "__main__":
    start()
