"""DataLoader workers, when a signal comes that the process which trains deals with.

A scheduler sends it to all processes of a job. A worker that it ends takes training along, which was to go on to the end of
the step, and to save.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import get_worker_info

if TYPE_CHECKING:
    from types import FrameType

_LEAVING = 5.0  # seconds
_IN_SERVER = "nemologger.callbacks.deaf_server"


class DeafWorkers:
    """Lets workers that start from now on go on working when they get a signal, until :meth:`end`.

    Args:
        sig: The signal.
    """

    def __init__(self, sig: int) -> None:
        self._sig = sig
        self._listens = torch.ones(1, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        _end_all_at_exit()
        forkserver.set_forkserver_preload([*_preloaded(), _IN_SERVER])

    def add(self, loader: Any) -> None:
        """Let the workers of ``loader`` be deaf, if it has some."""
        if getattr(loader, "num_workers", 0) > 0 and hasattr(loader, "worker_init_fn") and self._in(loader)[1] is None:
            loader.worker_init_fn = _Deaf(loader.worker_init_fn, self._sig, self._listens)

    def give_back(self, loader: Any) -> None:
        """Let ``loader`` start its workers as it did before."""
        outer, deaf = self._in(loader)
        if deaf is not None:
            if outer is None:
                loader.worker_init_fn = deaf.inner
            else:
                outer.inner = deaf.inner

    def end(self) -> None:
        """The process that trains no longer deals with the signal: it ends those that are still there."""
        self._listens.zero_()
        forkserver.set_forkserver_preload([module for module in _preloaded() if module != _IN_SERVER])

    def _in(self, loader: Any) -> tuple[Any, _Deaf | None]:
        """What ``loader`` has of this, and what holds it, if that is another ``worker_init_fn`` of this package."""
        outer, function = None, getattr(loader, "worker_init_fn", None)
        while function is not None and not (isinstance(function, _Deaf) and function.sig == self._sig):
            outer, function = function, getattr(function, "inner", None)
        return outer, function


class _Deaf:
    """A ``worker_init_fn``.

    Args:
        inner: The loader's own.
        sig: The signal.
        listens: In shared memory: not 0 while the process that trains deals with it.
    """

    def __init__(self, inner: Callable[[int], None] | None, sig: int, listens: torch.Tensor) -> None:
        self.inner = inner
        self.sig = sig
        self.listens = listens
        self.parent = 0

    def __call__(self, worker: int) -> None:
        """Prepare worker number ``worker``: torch has had the signal end it. What it starts itself is not deaf.

        One that is a thread, as MONAI's ThreadDataLoader makes them, gets no signals, and must not take the trainer's.
        """
        if get_worker_info() is not None and threading.current_thread() is threading.main_thread():
            self.parent = os.getppid()
            signal.signal(self.sig, self._receive)
        if self.inner is not None:
            self.inner(worker)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self.listens.item() or os.getppid() != self.parent:
            os._exit(0)  # as torch's handler does


def _preloaded() -> list[str]:
    """The modules that Python's fork server imports when it starts. There is no public way to ask."""
    return list(forkserver._forkserver._preload_modules)  # type: ignore[attr-defined]  # noqa: SLF001


@cache
def _end_all_at_exit() -> Finalize:
    """At exit Python ends such processes by SIGTERM, and waits for them: one that hangs would not hear it."""
    return Finalize(None, _end_all, exitpriority=0)


def _end_all() -> None:
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises wherever we are when a worker is killed
    for child in children:
        child.terminate()
    for child in children:
        child.join(_LEAVING)
        if child.is_alive():
            child.kill()
