"""An object store as a :class:`~nemologger.disk.Disk`."""

from __future__ import annotations

import contextlib
import errno
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import ClassVar

from nemologger import names
from nemologger.stores.path import LINK, StorePath, in_store, link_to, storage_path
from nemologger.stores.store import Store

_AHEAD = 4  # parts: each may be a copy of a tensor's


class RemoteDisk:
    """Writes to a store. What is written is durable when the store has taken it; there is nothing to sync.

    A store renames nothing, so a name that a complete checkpoint has is not used again while it has it.

    Args:
        store: Where.
    """

    can_rename: ClassVar[bool] = False

    def __init__(self, store: Store) -> None:
        self.store = store

    def path(self, text: str) -> Path:
        """See :class:`~nemologger.disk.Disk`."""
        found = storage_path(text, self.store.options)
        remote = in_store(found)
        # Each store opens a client of its own, which takes longer than a request; and it knows when the server was gone.
        return found if remote is None or remote.store != self.store else remote.within(self.store)

    def make_directory(self, path: Path) -> None:
        """See :class:`~nemologger.disk.Disk`. Directories need not be made: ask whether they could be written to."""
        self.store.check(str(path))

    def try_out(self, directory: Path) -> None:
        """Write, read and remove an object in ``directory``, as every save is going to: whether that is allowed.

        Raises:
            OSError: If not; it says what.
        """
        # Named as what a killed process may leave behind, so that the next run removes it.
        url = f"{directory}/{secrets.token_hex(8)}{names.UNFINISHED}"
        for what, call in (
            ("written", lambda: self.store.create(url, b"")),
            ("read", lambda: self.store.read(url)),
            ("removed", lambda: self.store.remove_object(url)),
        ):
            try:
                call()
            except OSError as error:
                raise OSError(error.errno, f"an object could not be {what} there: {error.strerror}", url) from error

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """See :class:`~nemologger.disk.Disk`."""
        self.store.write(str(path), parts)

    def commit(self, path: Path, content: bytes) -> None:
        """See :class:`~nemologger.disk.Disk`."""
        self.store.create(str(path), content)

    def link(self, source: Path, target: Path) -> None:
        """See :class:`~nemologger.disk.Disk`."""
        self.store.copy(str(source), str(target))

    def can_link(self, source: Path, target: Path) -> bool:
        """See :class:`~nemologger.disk.Disk`."""
        return False

    def symlink(self, path: Path, points_to: str) -> None:
        """See :class:`~nemologger.disk.Disk`."""
        self.store.write(str(path) + LINK, [link_to(points_to)])

    def can_symlink(self, path: Path, points_to: str) -> bool:
        """See :class:`~nemologger.disk.Disk`."""
        return True

    def rename(self, source: Path, target: Path) -> None:
        """Not possible.

        Raises:
            OSError: Always.
        """
        raise OSError(errno.ENOTSUP, "a store renames nothing", str(source))

    def remove(self, path: Path) -> None:
        """See :class:`~nemologger.disk.Disk`."""
        link = in_store(path)
        if link is not None and link.is_symlink():
            self.store.remove_object(str(path) + LINK)
        elif path.name.endswith(names.UNFINISHED):  # an object, with nothing below
            self.store.remove_object(str(path))
        else:
            self.store.remove(str(path))

    def sync(self, directory: Path) -> None:
        """Nothing to do."""


class OverlappingDisk(RemoteDisk):
    """As :class:`RemoteDisk`, but the files of one save are uploaded side by side.

    :meth:`write` returns when all parts have been taken, whose memory must stay as it is until :meth:`sync`, which waits for
    all that was written so far. Everything else does so first.

    Args:
        store: Where.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._uploads: list[_Upload] = []

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """See :class:`RemoteDisk`."""
        upload = _Upload(self.store, str(path))
        self._uploads.append(upload)
        upload.feed(parts)

    def commit(self, path: Path, content: bytes) -> None:
        """See :class:`RemoteDisk`."""
        self.sync(path)
        super().commit(path, content)

    def remove(self, path: Path) -> None:
        """See :class:`RemoteDisk`. What was being written is waited for, and whether that failed no longer matters."""
        with contextlib.suppress(OSError):
            self.sync(path)
        super().remove(path)

    def sync(self, directory: Path) -> None:
        """Wait for all uploads.

        Raises:
            OSError: If one has failed.
        """
        uploads, self._uploads = self._uploads, []
        errors = [error for upload in uploads if (error := upload.wait()) is not None]
        if errors:
            raise errors[0]


class _Upload:
    """One file on its way, in a thread of its own."""

    def __init__(self, store: Store, url: str) -> None:
        self._parts: Queue[bytes | memoryview | BaseException | None] = Queue(_AHEAD)
        self._ended = False
        self._error: OSError | None = None
        self._thread = Thread(target=self._run, args=(store, url), name="nemologger-upload", daemon=True)
        self._thread.start()

    def feed(self, parts: Iterable[bytes | memoryview]) -> None:
        """Hand over all parts."""
        try:
            for part in parts:
                self._parts.put(part)
        except BaseException as error:
            self._parts.put(error)
            raise
        self._parts.put(None)

    def wait(self) -> OSError | None:
        """Wait for the end; what went wrong, if something did."""
        self._thread.join()
        return self._error

    def _taken(self) -> Iterator[bytes | memoryview]:
        while not self._ended:
            part = self._parts.get()
            self._ended = part is None or isinstance(part, BaseException)
            if isinstance(part, BaseException):
                raise OSError(errno.ECANCELED, f"its parts could not be read: {part}")
            if part is not None:
                yield part

    def _run(self, store: Store, url: str) -> None:
        taken = self._taken()
        try:
            store.write(url, taken)
        except Exception as error:  # noqa: BLE001  raised again where it is waited for
            self._error = error if isinstance(error, OSError) else OSError(errno.EIO, str(error), url)
            with contextlib.suppress(OSError):
                for _ in self._taken():  # whoever feeds it is not to wait for ever
                    pass


def disk_of(path: Path) -> RemoteDisk | None:
    """The disk that ``path`` is on, if that is a store."""
    found: StorePath | None = in_store(path)
    return None if found is None else RemoteDisk(found.store)
