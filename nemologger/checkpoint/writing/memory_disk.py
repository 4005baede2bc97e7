"""A disk that keeps what is written to it, for somebody else to write for real."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar


class MemoryDisk:
    """Collects files; their directories, and syncing them, are the business of who writes them."""

    can_rename: ClassVar[bool] = True

    def __init__(self) -> None:
        self.files: dict[Path, bytes] = {}

    def path(self, text: str) -> Path:
        """Any will do."""
        return Path(text)

    def make_directory(self, path: Path) -> None:
        """Nothing to do."""

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """Keep the file."""
        self.files[path] = b"".join(bytes(part) for part in parts)

    def commit(self, path: Path, content: bytes) -> None:
        """Keep the file."""
        self.files[path] = content

    def link(self, source: Path, target: Path) -> None:
        """Keep it under both names."""
        self.files[target] = self.files[source]

    def can_link(self, source: Path, target: Path) -> bool:
        """See :class:`~nemologger.disk.Disk`."""
        return True

    def symlink(self, path: Path, points_to: str) -> None:
        """Not needed for what is written new.

        Raises:
            OSError: Always.
        """
        raise OSError(errno.ENOTSUP, "a link cannot be kept", str(path))

    def can_symlink(self, path: Path, points_to: str) -> bool:
        """See :class:`~nemologger.disk.Disk`."""
        return False

    def rename(self, source: Path, target: Path) -> None:
        """Keep it under the other name."""
        self.files[target] = self.files.pop(source)

    def remove(self, path: Path) -> None:
        """Forget the file, or all below it."""
        for file in [file for file in self.files if file == path or path in file.parents]:
            del self.files[file]

    def sync(self, directory: Path) -> None:
        """Nothing to do."""
