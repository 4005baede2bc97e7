"""One live run for a directory: an advisory lock that dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from nemologger.disk.there import exists, is_dir
from nemologger.errors import ConfigurationError, DirectoryInUseError

try:
    import fcntl
except ImportError:  # Windows: no lock, and no protection
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

FILE = ".lock"
_HOW = os.O_CREAT | os.O_RDWR
_TAKEN = {errno.EACCES, errno.EAGAIN}
#: What a file system without locks answers: Lustre and NFS may be set up so, and many others know none.
_NONE_HERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
#: What is answered for a file that its owner has removed since it was found there. A network file system goes on finding it
#: for as long as it remembers names; GlusterFS, for a second, and the second of these is its answer.
_REMOVED = {errno.ESTALE, errno.ENOENT}
#: How often, and after how many seconds, to try again then.
_TRIES, _PAUSE = 100, 0.05
#: Seconds that a network file system may keep the lock of a host that has crashed: NFS servers give it 90.
_LEASE = 120.0
_LOOK_EVERY = 1.0


@dataclass
class _Held:
    """The lock of a directory, by this process, for so many who have taken it."""

    path: Path
    descriptor: int
    process: int
    signed: str  # what this process has written into it, "" if it could not
    of_process: bool  # the lock is the process's, and lost as soon as anything in it closes the file
    #: Its owner before has not given it back: most have been killed, but one that stands still goes on some day, and must
    #: find then that somebody had it meanwhile. So the file stays, with what this process has written into it.
    inherited: bool
    takers: int = 1


# The kernel's lock is the whole process's as well: whoever takes it a second time must not be refused, and the first one to
# release it must not give it away.
_HELD: dict[Path, _Held] = {}
# Where no lock could be had, which is said once for each answer.
_TOLD: set[tuple[Path, int | None]] = set()


class DirectoryLock:
    """Held from :meth:`take` until :meth:`release`, or until the process ends in whatever way.

    Several in one process may hold the lock of one directory; other processes have it when the last one has released it. It
    is not inherited by processes that are forked later, data loader workers for example, which may live on for a moment.

    Args:
        directory: What is locked.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._held: _Held | None = None

    def take(self) -> None:
        """Take the lock. On file systems that have none, or that fail to give one, nothing happens but a line in the log.

        A holder that cannot be seen to be alive, because it is on another host or has just died, is waited for: a network
        file system keeps the locks of a host that has crashed for a while.

        Raises:
            DirectoryInUseError: If another process holds it.
            ConfigurationError: If nothing can be written there.
        """
        if fcntl is None or self._held is not None:
            return
        self._path = self._path.parent.resolve() / FILE
        shared = _HELD.get(self._path)
        if shared is not None and _is_at(self._path, shared.descriptor):
            shared.takers += 1
            self._held = shared
            return
        end, told, gone = time.monotonic() + _LEASE, False, 0
        while self._held is None:
            descriptor = _open(self._path)
            try:
                of_process = _lock(self._path, descriptor)
            except OSError as error:
                owner = _who(_owner(descriptor))
                _close(descriptor)
                if error.errno in _REMOVED and gone < _TRIES:
                    gone += 1
                    time.sleep(_PAUSE)
                    continue
                if error.errno not in _TAKEN:
                    _say_without(self._path.parent, error)
                    return
                if (is_alive := _is_alive(owner)) or time.monotonic() > end:
                    raise DirectoryInUseError(_refusal(self._path, owner, is_alive=is_alive)) from error
                if not told:
                    log.warning(
                        "%s is locked by another run (%s), which may have ended: waiting for up to %.0f s",
                        self._path.parent,
                        owner or "unknown process",
                        _LEASE,
                    )
                    told = True
                time.sleep(_LOOK_EVERY)
            else:
                inherited = bool(_owner(descriptor))
                self._held = _HELD[self._path] = _Held(
                    self._path, descriptor, os.getpid(), _sign(descriptor), of_process, inherited
                )

    def hold(self) -> None:
        """Take it again if its file has been removed by somebody meanwhile: else a second run would not be refused.

        The run goes on in any case. That another run has it now is said, once. One that had it, and has left the file, is
        what :func:`taken_over_by` tells of.
        """
        held = self._held
        if held is None or held.process != os.getpid() or _HELD.get(held.path) is not held or not _is_gone(held):
            return
        try:
            descriptor = os.open(held.path, _HOW, 0o666)
            try:
                of_process = _lock(held.path, descriptor)
            except OSError:
                _close(descriptor)
                raise
        except OSError as error:
            _say_without(held.path.parent, error)
            return
        if _owner(descriptor) not in ("", held.signed):  # ours is there again where the directory has been copied back
            _close(descriptor)
            return
        held.signed = _sign(descriptor)
        _close(held.descriptor)
        held.descriptor, held.of_process = descriptor, of_process

    def release(self) -> None:
        """Give it back; nothing to do if it is not held."""
        held, self._held = self._held, None
        if held is None or held.process != os.getpid():
            return
        held.takers -= 1
        if held.takers == 0:
            if _HELD.get(held.path) is held:
                del _HELD[held.path]
            is_ours = not held.inherited and _owner(held.descriptor) in (held.signed, "")
            if is_ours and _is_at(held.path, held.descriptor):
                # Where the disk has become read-only the file stays, which nobody minds: it is not locked. An error here
                # would replace the one that the run ends with.
                with contextlib.suppress(OSError):
                    held.path.unlink(missing_ok=True)
            _close(held.descriptor)


def taken_over_by(directory: Path) -> str:
    """Who has the lock of ``directory`` that this process had, and does not know it has lost; "" for nobody.

    A network file system gives the lock of a host away that it has not heard of for a while. The host may only have stood
    still, or have been cut off: what runs there goes on as if nothing had happened. It may also be that somebody has removed
    the file. Who had it meanwhile may have ended by now.
    """
    held = _HELD.get(directory.resolve() / FILE)
    if held is None or held.process != os.getpid() or not held.signed:
        return ""
    if held.of_process and _is_at(held.path, held.descriptor):  # opened anew, it would be lost with closing that
        owner = _owner(held.descriptor)
    else:  # opened anew: a network file system may say what was there before
        try:
            owner = held.path.read_text(errors="replace").strip()
        except OSError:
            return ""
    return "" if owner == held.signed else _who(owner)


def _open(path: Path) -> int:
    tries = 0
    while True:
        try:
            return os.open(path, _HOW, 0o666)
        except OSError as error:
            # A network file system may find the file of an owner who removes it just now, and then not find it.
            if error.errno not in _REMOVED or tries == _TRIES or not os.path.isdir(path.parent):
                raise ConfigurationError(
                    f"{path.parent} cannot be written to: {error.strerror} ({path.name})"
                ) from error
        tries += 1
        time.sleep(_PAUSE)


def _sign(descriptor: int) -> str:
    """Say who holds the lock, and return that: a line to be read, and one that no other process has.

    Containers may have the same number of the process and the same name of the host. On a full disk nobody can sign, and ""
    is returned: what dead runs have left there goes when the lock is taken.
    """
    signature = f"process {os.getpid()} on {socket.gethostname()}\n{uuid4().hex}"
    try:
        os.ftruncate(descriptor, 0)
        written = os.pwrite(descriptor, signature.encode(), 0)
    except OSError:
        return ""
    return signature if written == len(signature.encode()) else ""


def _owner(descriptor: int) -> str:
    """Who has signed; "" if that cannot be read, as on a mount that lets nobody read what is open for writing."""
    try:
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    except OSError:
        return ""


def _who(owner: str) -> str:
    """The line of it that is to be read."""
    return owner.split("\n")[0]


def _close(descriptor: int) -> None:
    """Close it. A disk that answers no more may say so here; the descriptor, and its lock, is given up all the same."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _say_without(directory: Path, error: OSError) -> None:
    """That nothing keeps a second run out: quietly where there are no locks, aloud where there should be."""
    if (directory, error.errno) in _TOLD:
        return
    _TOLD.add((directory, error.errno))
    if error.errno in _NONE_HERE:
        log.info("the file system of %s has no locks: a second run in it would not be refused", directory)
        return
    log.warning(
        "%s could not be locked: %s. The run goes on, but a second one in this directory would not be refused, and the two "
        "would remove each other's checkpoints: see that there is none",
        directory,
        error.strerror,
    )


def _lock(path: Path, descriptor: int) -> bool:
    """Lock the file that is at ``path``, as :func:`_lock_opened` does.

    Raises:
        OSError: As of :func:`_lock_opened`; ESTALE if its owner has removed it since it was opened.
    """
    of_process = _lock_opened(descriptor)
    if not _is_at(path, descriptor):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
    return of_process


def _lock_opened(descriptor: int) -> bool:
    """Lock the file for this opening of it, where there is such a lock, else for this process.

    A lock of the process is lost as soon as anything in it closes the file: a copy of the directory does, or an upload.

    Returns:
        Whether it is one of the process.

    Raises:
        OSError: If somebody else has locked it, or that is not possible here.
    """
    by_opening = getattr(fcntl, "F_OFD_SETLK", None)
    if by_opening is not None and struct.calcsize("l") == 8:
        whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(descriptor, by_opening, whole)
        except OSError as error:
            if error.errno in _TAKEN:
                raise
        else:
            return False
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _is_gone(held: _Held) -> bool:
    """Whether another file, or none, is where the locked one was. A disk that does not answer says nothing of that."""
    try:
        there = held.path.stat() if exists(held.path) else None
        if there is None:
            return is_dir(held.path.parent)
        return not os.path.samestat(os.fstat(held.descriptor), there)
    except OSError:
        return False


def _refusal(path: Path, owner: str, *, is_alive: bool) -> str:
    refusal = (
        f"another run is writing to {path.parent} ({owner or 'unknown process'}): two of them would remove each other's "
        "checkpoints. Stop that one, or give this run another name or version."
    )
    return refusal if is_alive else f"{refusal} If its host has gone for good, remove {path}, which is still locked."


def _is_alive(owner: str) -> bool:
    """Whether the process that the file names is seen from here: another one than this, which does not hold the lock."""
    named = re.fullmatch(r"process (\d+) on (.+)", owner)
    if named is None or named[2] != socket.gethostname() or int(named[1]) == os.getpid():
        return False
    try:
        os.kill(int(named[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _forget() -> None:
    """In a process that was just forked: the lock is not its own, and must not live on with it."""
    for held in _HELD.values():
        with contextlib.suppress(OSError):
            os.close(held.descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
