"""A process for one combination: started, waited for, and gone when the one that waits for it is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

# The end of a pipe, for the process itself and not for those that it starts: whoever has it is the one that the
# combination's record comes from.
LIFELINE = "NEMOLOGGER_SWEEP_LIFELINE"
_GRACE = 60.0  # seconds that a process has to save and stop


def run(
    command: Sequence[str], environment: Mapping[str, str], *, directory: str, output: Path | None, parent: int | None
) -> int:
    """Run ``command`` to its end.

    Args:
        command: Program and arguments.
        environment: All of it, but for the lifeline.
        directory: Where it is started.
        output: A file that what it prints is appended to; by default it prints where this process does.
        parent: The process that this one works for: when it dies, the child is stopped.

    Returns:
        The exit code; negative for a signal.
    """
    with ExitStack() as stack:
        theirs, ours = os.pipe()
        stack.callback(os.close, ours)
        try:
            file = None if output is None else stack.enter_context(output.open("ab"))
            child = subprocess.Popen(
                command,
                env={**environment, LIFELINE: str(theirs)},
                cwd=directory,
                stdout=file,
                stderr=None if file is None else subprocess.STDOUT,
                pass_fds=(theirs,),
            )
        finally:
            os.close(theirs)
        try:
            return _wait(child, parent)
        except BaseException:
            _stop(child)  # Ctrl-C: the terminal has told it too
            raise


def hold_lifeline(environment: MutableMapping[str, str]) -> bool:
    """In the child: stop as by SIGTERM when the process that waits for it dies.

    Returns:
        Whether this process is such a child; the processes it starts are not.
    """
    descriptor = environment.pop(LIFELINE, None)
    if descriptor is None:
        return False
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
        # Slurm sends it to all processes when the time is nearly over. It is for submitit, in the process that waits, which
        # has the job requeued, or gives up: this one gets SIGTERM then, and saves.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(int(descriptor),), name="sweep-lifeline", daemon=True).start()
    return True


def _watch(descriptor: int) -> None:
    with suppress(OSError):
        os.read(descriptor, 1)  # returns when nobody has the other end any more
    os.kill(os.getpid(), signal.SIGTERM)


def _wait(child: subprocess.Popen[bytes], parent: int | None) -> int:
    while parent is not None:
        try:
            return child.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent:
                child.terminate()
                parent = None
    return child.wait()


def _stop(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(timeout=_GRACE / 2)
    except subprocess.TimeoutExpired:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_GRACE / 2)
        child.kill()  # nothing happens if it has ended
        child.wait()
