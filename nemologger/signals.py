"""Signals that reach all processes of a job, of which those that only help the one that trains are to hear none."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

#: What schedulers, terminals and people send: ``--signal`` of Slurm, the end of a job's time, Ctrl-C.
_SENT_TO_ALL = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def unheard() -> Iterator[None]:
    """A process that is started in here never gets such a signal, not even before its first line.

    Blocked signals stay blocked in a new program, unlike handlers. This process loses nothing: what comes meanwhile goes to
    another thread, or is dealt with afterwards. Whoever starts a process so has to end it in other ways.

    Example:
        >>> with unheard():
        ...     signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        True
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SENT_TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
