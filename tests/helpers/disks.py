"""Disks for tests: one that fails at its n-th call, one without hard links, one that remembers."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemologger.disk import LocalDisk

METHODS = ("make_directory", "write", "link", "symlink", "rename", "remove", "sync")


class FailingDisk(LocalDisk):
    """Fails at its ``at``-th call, counted over the methods in ``only``.

    Args:
        at: Which call fails, from 0.
        forever: All later calls fail too: the disk is gone, rather than full for a moment.
        only: The methods that count; default all.
    """

    def __init__(self, at: int, *, forever: bool = False, only: tuple[str, ...] = METHODS) -> None:
        self.at = at
        self.forever = forever
        self.only = only
        self.calls = 0

    def _call(self, method: str) -> bool:
        """Whether this call fails."""
        if method not in self.only:
            return False
        self.calls += 1
        return self.calls - 1 == self.at or (self.forever and self.calls - 1 > self.at)

    @property
    def has_failed(self) -> bool:
        return self.calls > self.at

    def make_directory(self, path: Path) -> None:
        self._do("make_directory", path)

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        # A disk fills up in the middle of a file.
        super().write(path, _cut_short(parts) if self._call("write") else parts)

    def link(self, source: Path, target: Path) -> None:
        self._do("link", source, target)

    def symlink(self, path: Path, points_to: str) -> None:
        self._do("symlink", path, points_to)

    def rename(self, source: Path, target: Path) -> None:
        self._do("rename", source, target)

    def remove(self, path: Path) -> None:
        self._do("remove", path)

    def sync(self, directory: Path) -> None:
        self._do("sync", directory)

    def _do(self, method: str, *arguments: Any) -> None:
        if self._call(method):
            raise full()
        getattr(super(), method)(*arguments)


def full() -> OSError:
    """What a full disk answers."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut_short(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for part in parts:
        yield memoryview(part)[: len(part) // 2]
        break
    raise full()


class RecordingDisk(LocalDisk):
    """Remembers what it was asked to do: ``(method, arguments)``, the bytes of a write included."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, ...]] = []

    def note(self, *what: Any) -> None:
        """Put a remark between the operations."""
        self.operations.append(("note", *what))

    def make_directory(self, path: Path) -> None:
        self.operations.append(("make_directory", path))
        super().make_directory(path)

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        content = b"".join(parts)
        self.operations.append(("write", path, content))
        super().write(path, [content])

    def write_image(self, path: Path, padded: memoryview, size: int) -> None:
        self.write(path, [bytes(padded[:size])])

    def link(self, source: Path, target: Path) -> None:
        self.operations.append(("link", source, target))
        super().link(source, target)

    def symlink(self, path: Path, points_to: str) -> None:
        self.operations.append(("symlink", path, points_to))
        super().symlink(path, points_to)

    def rename(self, source: Path, target: Path) -> None:
        self.operations.append(("rename", source, target))
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self.operations.append(("remove", path))
        super().remove(path)

    def sync(self, directory: Path) -> None:
        self.operations.append(("sync", directory))
        super().sync(directory)
