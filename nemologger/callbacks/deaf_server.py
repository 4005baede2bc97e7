"""Python's fork server, when a signal comes that the process which trains deals with.

The server starts the workers of data loaders, by default from Python 3.14 on, and they end when it does. It imports this
module as it starts, see :mod:`nemologger.callbacks.deaf_workers`. In any other process this module does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing import forkserver

#: Those that schedulers send.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def _let_this_server_be_deaf() -> None:
    server = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    # The process that trains may ignore some, or have blocked them: this server does so, too, and so do its children.
    heard = [sig for sig in _SIGNALS if signal.getsignal(sig) is signal.SIG_DFL and sig not in blocked]

    def before() -> None:
        if os.getpid() == server:  # a child that is ended as soon as it is there is to hear of it
            signal.pthread_sigmask(signal.SIG_BLOCK, heard)

    def in_server() -> None:
        if os.getpid() == server:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)

    def in_child() -> None:
        if os.getppid() == server:  # not in what a child of the server forks: it may have handlers of its own
            for sig in heard:
                signal.signal(sig, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)

    os.register_at_fork(before=before, after_in_parent=in_server, after_in_child=in_child)
    for sig in heard:
        # Not SIG_IGN, which children would have before they can be told otherwise. The server ends when nobody uses it.
        signal.signal(sig, lambda signum, frame: None)


if any(forkserver.__name__ in argument for argument in sys.orig_argv):
    _let_this_server_be_deaf()
