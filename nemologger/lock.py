"""One live run for a directory: an advisory lock that dies with the process that holds it."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from nemologger.errors import DirectoryInUseError

try:
    import fcntl
except ImportError:  # Windows: no lock, and no protection
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
_TAKEN = {errno.EACCES, errno.EAGAIN}


class DirectoryLock:
    """Held from :meth:`take` until :meth:`release`, or until the process ends in whatever way.

    A POSIX record lock on a file in the directory: unlike ``flock`` it is not inherited by processes that are forked later,
    data loader workers for example, which may live on for a moment.

    Args:
        directory: What is locked.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock. On file systems that have none, nothing happens.

        Raises:
            DirectoryInUseError: If another process holds it.
        """
        while fcntl is not None and self._descriptor is None:
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                os.close(descriptor)
                if error.errno not in _TAKEN:
                    return  # this file system has no locks
                raise DirectoryInUseError(
                    f"another run is writing to {self._path.parent} ({owner or 'unknown process'}): two of them would "
                    "remove each other's checkpoints. Stop that one, or give this run another name or version."
                ) from error
            # The file may have been removed by its owner between open and lock.
            if self._is_ours(descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def release(self) -> None:
        """Give it back; nothing to do if it is not held."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _is_ours(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False
