"""An object store as a :class:`~nemologger.disk.Disk`."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from nemologger.store import Store
from nemologger.store_path import LINK, StorePath, in_store, link_to, storage_path


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
        return storage_path(text, self.store.options)

    def make_directory(self, path: Path) -> None:
        """See :class:`~nemologger.disk.Disk`. Directories need not be made: ask whether they could be written to."""
        self.store.check(str(path))

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """See :class:`~nemologger.disk.Disk`."""
        self.store.write(str(path), parts)

    def commit(self, path: Path, content: bytes) -> None:
        """See :class:`~nemologger.disk.Disk`."""
        self.store.create(str(path), content)

    def link(self, source: Path, target: Path) -> None:
        """See :class:`~nemologger.disk.Disk`."""
        self.store.copy(str(source), str(target))

    def symlink(self, path: Path, points_to: str) -> None:
        """See :class:`~nemologger.disk.Disk`."""
        self.store.write(str(path) + LINK, [link_to(points_to)])

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
        self.store.remove(str(path))

    def sync(self, directory: Path) -> None:
        """Nothing to do."""


def disk_of(path: Path) -> RemoteDisk | None:
    """The disk that ``path`` is on, if that is a store."""
    found: StorePath | None = in_store(path)
    return None if found is None else RemoteDisk(found.store)
