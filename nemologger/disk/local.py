"""The file system, behind one small protocol: everything that writes, links or removes goes through here.

That makes the order of operations visible in one place, and lets a test fail the n-th of them. Nothing else in the
package renames or deletes. Reading needs no protocol: it changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, ClassVar, Protocol, runtime_checkable

from nemologger.disk import direct_file
from nemologger.disk.mounts import has_lost, mount_of
from nemologger.disk.there import is_dir, is_symlink


@runtime_checkable
class Disk(Protocol):
    """What a save asks of a file system. Every method is durable when it returns, but for the entries of a directory.

    Attributes:
        can_rename: Whether there is a rename, and so directories to be set aside; an object store has none.
    """

    can_rename: ClassVar[bool]

    def path(self, text: str) -> Path:
        """The path on this disk that ``text`` was made of."""

    def make_directory(self, path: Path) -> None:
        """Create ``path`` and its parents; one that is there is fine."""

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """Write ``parts`` one after the other into a new file at ``path``, atomically: all of it or no file."""

    def commit(self, path: Path, content: bytes) -> None:
        """As :meth:`write`, a file that makes others count: where several may write it, one does."""

    def link(self, source: Path, target: Path) -> None:
        """Give the file ``source`` a second name, or copy it where the file system has no hard links."""

    def can_link(self, source: Path, target: Path) -> bool:
        """Whether :meth:`link` gives a second name, rather than a copy. ``target`` is not there before or after."""

    def symlink(self, path: Path, points_to: str) -> None:
        """Make ``path`` a symbolic link to ``points_to``, atomically replacing an earlier link."""

    def can_symlink(self, path: Path, points_to: str) -> bool:
        """Whether :meth:`symlink` makes one. ``path`` is not there afterwards."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename ``source`` to ``target``, which must not be there."""

    def remove(self, path: Path) -> None:
        """Remove a file, a link, or a directory with all it holds; nothing to do if it is not there."""

    def sync(self, directory: Path) -> None:
        """Make the entries of ``directory`` durable: what was created, renamed or removed in it."""


class LocalDisk:
    """A POSIX file system.

    A directory that it has been asked for stays on the disk that it was on then. If that is not mounted any more, what were
    made there would lie below the mount, out of sight when the disk is back: nothing is.
    """

    can_rename: ClassVar[bool] = True
    _homes: Mapping[Path, Path] = MappingProxyType({})  # by directory, where its disk is mounted

    def path(self, text: str) -> Path:
        """See :class:`Disk`."""
        return Path(text)

    def make_directory(self, path: Path) -> None:
        """See :class:`Disk`."""
        home = next((self._homes[one] for one in (path, *path.parents) if one in self._homes), None)
        if home is not None and has_lost(path, home):
            raise OSError(errno.ENODEV, f"{home} is not mounted any more", str(path))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:  # which of them is in the way, they do not say
            found = next(one for one in (path, *path.parents) if os.path.lexists(one))
            what = "a link that leads to none" if is_symlink(found) else "no directory"
            raise NotADirectoryError(errno.ENOTDIR, f"{found} is {what}", str(path)) from error
        if home is None and (home := mount_of(path)) is not None:
            self._homes = {**self._homes, path: home}

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """See :class:`Disk`."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            _write_durably(partial, (memoryview(part).cast("B") for part in parts))
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """As :meth:`write`, for somebody who asks for a file to write to."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def commit(self, path: Path, content: bytes) -> None:
        """See :class:`Disk`. Whoever writes here holds the directory's lock."""
        self.write(path, [content])

    def write_image(self, path: Path, padded: memoryview, size: int) -> None:
        """As :meth:`write`, the first ``size`` bytes of ``padded``: whole pages of memory that begin on a page."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            descriptor = direct_file.open_direct(partial) if size >= direct_file.WORTHWHILE else None
            content = padded
            if descriptor is None:
                descriptor = os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
                content = padded[:size]
            try:
                with naming(partial):
                    direct_file.write_pages(descriptor, content, size)
            finally:
                os.close(descriptor)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def link(self, source: Path, target: Path) -> None:
        """See :class:`Disk`."""
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            with source.open("rb") as file:  # where the disk has failed, this fails as well
                self.write(target, reading(source, file))

    def can_link(self, source: Path, target: Path) -> bool:
        """See :class:`Disk`."""
        try:
            os.link(source, target)
        except OSError as error:
            return error.errno not in _NO_HARD_LINKS
        with contextlib.suppress(OSError):  # it goes when the next run starts
            target.unlink()
        return True

    def symlink(self, path: Path, points_to: str) -> None:
        """See :class:`Disk`."""
        fresh = path.with_name(f".{path.name}.partial")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(points_to)
        os.replace(fresh, path)

    def can_symlink(self, path: Path, points_to: str) -> bool:
        """See :class:`Disk`. Any error is a no: which one is given, file systems do not agree on."""
        try:
            path.unlink(missing_ok=True)
            path.symlink_to(points_to)
            is_one = is_symlink(path)
            path.unlink()
        except OSError:
            return False
        return is_one

    def rename(self, source: Path, target: Path) -> None:
        """See :class:`Disk`."""
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)

    def remove(self, path: Path) -> None:
        """See :class:`Disk`."""
        if is_symlink(path) or not is_dir(path):
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)

    def sync(self, directory: Path) -> None:
        """See :class:`Disk`."""
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot sync a directory; their entries are synchronous anyway.
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
                raise
        finally:
            os.close(descriptor)


_READ_SIZE = 16 << 20

# The last two are what some network mounts answer to what they do not know.
_NO_HARD_LINKS = {
    errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EACCES, errno.EINVAL, errno.EIO,
}  # fmt: skip


def _write_durably(path: Path, parts: Iterator[memoryview]) -> None:
    first: list[memoryview] = []
    size = 0  # added up once: there may be thousands of small parts
    while size < direct_file.WORTHWHILE and (part := next(parts, None)) is not None:
        first.append(part)
        size += len(part)
    descriptor = direct_file.open_direct(path) if size >= direct_file.WORTHWHILE else None
    direct = descriptor is not None
    if descriptor is None:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
    try:
        with naming(path):
            if direct:
                direct_file.write_direct(descriptor, chain(first, parts))
            else:
                size = 0
                for part in chain(first, parts):
                    write_all(descriptor, part)
                    size += len(part)
                direct_file.make_durable(descriptor, size)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name ``path`` in errors of what is done with a descriptor: the kernel does not say which file it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def reading(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of ``file``, which is ``path`` opened, in parts."""
    while True:
        with naming(path):
            part = file.read(_READ_SIZE)
        if not part:
            return
        yield part


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of ``data``: one call of the kernel takes at most 2 GiB, and a nearly full disk takes less."""
    while data:
        data = data[os.write(descriptor, data) :]
